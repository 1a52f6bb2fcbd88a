//! `client.toml`: what an operator needs to talk to a herd from another machine. Written by `pgherd operator
//! add`, beside the certificate and the key that it names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

pub(crate) const NAME: &str = "client.toml";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClientFile {
    pub(crate) herd: String,
    pub(crate) operator: String,
    /// `https://host:port` of every agent.
    pub(crate) urls: Vec<String>,
    /// Paths of PEM files; relative ones are beside this file.
    pub(crate) ca: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl ClientFile {
    /// Reads the one in `dir`, with its paths made whole.
    pub(crate) fn load(dir: &Path) -> Result<ClientFile, Failure> {
        let path = dir.join(NAME);
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Failure::io("read", &path, &error)
                .hint("pgherd operator add, run on a host of the herd, makes it; --dir names where it is")
        })?;
        let mut file: ClientFile = toml::from_str(&text).map_err(|error| {
            Failure::usage(format!("{} does not read", path.display())).because(error.to_string().trim_end())
        })?;
        for part in [&mut file.ca, &mut file.certificate, &mut file.key] {
            *part = dir.join(&*part);
        }
        Ok(file)
    }

    pub(crate) fn text(&self) -> Result<String, Failure> {
        let body = toml::to_string(self)
            .map_err(|error| Failure::failed("client.toml cannot be written").because(error))?;
        Ok(format!(
            "# Made by `pgherd operator add`. Whoever has the key beside it is this operator.\n{body}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back_with_whole_paths() {
        let dir = tempfile::tempdir().unwrap();
        let file = ClientFile {
            herd: "shop".to_owned(),
            operator: "anna".to_owned(),
            urls: vec!["https://a:8009".to_owned()],
            ca: "ca.pem".into(),
            certificate: "anna.pem".into(),
            key: "/elsewhere/anna.key".into(),
        };
        std::fs::write(dir.path().join(NAME), file.text().unwrap()).unwrap();
        let read = ClientFile::load(dir.path()).unwrap();
        assert_eq!((read.ca, read.key), (dir.path().join("ca.pem"), PathBuf::from("/elsewhere/anna.key")));
        assert_eq!(ClientFile::load(&dir.path().join("absent")).unwrap_err().exit_code(), 1);
    }
}
