//! Who this node is in which herd: `<state_dir>/herd.json`, written once when the node was admitted.
//!
//! It is the last thing that `init` and `join` write, so its presence means that everything else is there:
//! certificates, the store's directory, the founder's first values.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pgherd_core::types::NodeName;
use serde::{Deserialize, Serialize};

use crate::durable::write_synced;

const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    format: u32,
    pub herd: NodeName,
    pub herd_id: String,
    pub node: NodeName,
    /// `host:port` under which the other agents reach this one.
    pub api_address: String,
    pub host: String,
    /// What the store's member was admitted as; the founder has no admission.
    pub admission: Option<pgherd_dcs::Joined>,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{} belongs to no herd", .state_dir.display())]
    NotAdmitted { state_dir: PathBuf },
    #[error("{} does not read as a node's identity: {why}", .path.display())]
    Malformed { path: PathBuf, why: String },
    #[error("{doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl Identity {
    pub fn new(
        herd: NodeName,
        herd_id: String,
        node: NodeName,
        api_address: String,
        host: String,
        admission: Option<pgherd_dcs::Joined>,
    ) -> Identity {
        Identity { format: FORMAT, herd, herd_id, node, api_address, host, admission }
    }

    pub fn load(state_dir: &Path) -> Result<Identity, IdentityError> {
        let path = path(state_dir);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(IdentityError::NotAdmitted { state_dir: state_dir.to_owned() });
            }
            Err(source) => return Err(IdentityError::Io { doing: "read", path, source }),
        };
        let malformed = |why: String| IdentityError::Malformed { path: path.clone(), why };
        let identity: Identity = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        if identity.format != FORMAT {
            return Err(malformed(format!("format {}, this program reads {FORMAT}", identity.format)));
        }
        Ok(identity)
    }

    pub fn save(&self, state_dir: &Path) -> Result<(), IdentityError> {
        let path = path(state_dir);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| IdentityError::Malformed { path: path.clone(), why: error.to_string() })?;
        write_synced(&path, &text, 0o600).map_err(|source| IdentityError::Io { doing: "write", path, source })
    }
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("herd.json")
}
