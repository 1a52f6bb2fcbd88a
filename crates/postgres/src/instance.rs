//! One PostgreSQL as the agent describes it: programs, directories, addresses, certificates.
//!
//! Leaves out: everything that changes while it runs. Hazard: two instances on one data directory destroy it,
//! so nothing here has a default.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pgherd_core::types::NodeName;

use crate::installation::Installation;

/// The file in a data directory by which a running PostgreSQL is found, for those who can only stop one.
pub const POSTMASTER_PID: &str = "postmaster.pid";

/// The kernel's `sun_path` has 108 bytes, and the last one is the terminator.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Files of the server's own certificate and of the herd's CA, outside the data directory, so that neither a
/// clone nor a rewind brings another node's. The same certificate identifies the node as a standby.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
}

/// What it takes to describe one PostgreSQL; see [`Instance::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceSpec {
    pub installation: Installation,
    pub node: NodeName,
    pub data_dir: PathBuf,
    /// `pg_wal` on a volume of its own; `None`: inside the data directory.
    pub wal_dir: Option<PathBuf>,
    /// Mode 0700, on no account inside the data directory: the upstream's passfile, and what a rewind saves.
    pub private_dir: PathBuf,
    pub socket_dir: PathBuf,
    pub log_dir: PathBuf,
    pub port: u16,
    pub listen_addresses: Vec<String>,
    pub tls: TlsFiles,
    /// The operating system's name of the user that runs the agent and PostgreSQL.
    pub os_user: String,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstanceError {
    #[error("the socket path {}/.s.PGSQL.{port} has {bytes} bytes, more than the {MAX_SOCKET_PATH_BYTES} that fit", .socket_dir.display())]
    SocketPathTooLong { socket_dir: PathBuf, port: u16, bytes: usize },

    #[error("{what} {} must be an absolute path without control characters, quotes or commas", .path.display())]
    Path { what: &'static str, path: PathBuf },

    #[error("{what} {} must not lie inside the data directory", .path.display())]
    InsideDataDir { what: &'static str, path: PathBuf },

    #[error("\"{user}\" is not the name of an operating system user")]
    OsUser { user: String },
}

impl InstanceError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            InstanceError::SocketPathTooLong { .. } => Some("use a shorter directory for the socket"),
            _ => None,
        }
    }
}

/// One PostgreSQL of this machine. Cheap to clone; holds nothing open.
#[derive(Clone, Debug)]
pub struct Instance(std::sync::Arc<InstanceSpec>);

impl std::ops::Deref for Instance {
    type Target = InstanceSpec;
    fn deref(&self) -> &InstanceSpec {
        &self.0
    }
}

impl Instance {
    pub fn new(spec: InstanceSpec) -> Result<Instance, InstanceError> {
        let socket = spec.socket_dir.join(format!(".s.PGSQL.{}", spec.port));
        let bytes = socket.as_os_str().as_bytes().len();
        if bytes > MAX_SOCKET_PATH_BYTES {
            return Err(InstanceError::SocketPathTooLong {
                socket_dir: spec.socket_dir,
                port: spec.port,
                bytes,
            });
        }
        let named = [
            ("the data directory", &spec.data_dir),
            ("the private directory", &spec.private_dir),
            ("the socket directory", &spec.socket_dir),
            ("the log directory", &spec.log_dir),
            ("the certificate", &spec.tls.cert),
            ("the key", &spec.tls.key),
            ("the CA certificate", &spec.tls.ca),
        ];
        let wal = spec.wal_dir.iter().map(|dir| ("the WAL directory", dir));
        for (what, path) in named.into_iter().chain(wal) {
            if !usable_path(path) {
                return Err(InstanceError::Path { what, path: path.clone() });
            }
            if what != "the data directory" && path.starts_with(&spec.data_dir) {
                return Err(InstanceError::InsideDataDir { what, path: path.clone() });
            }
        }
        let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.@\\".contains(&byte);
        if spec.os_user.is_empty() || !spec.os_user.bytes().all(usual) {
            return Err(InstanceError::OsUser { user: spec.os_user });
        }
        Ok(Instance(std::sync::Arc::new(spec)))
    }

    pub fn pg_wal(&self) -> PathBuf {
        self.data_dir.join("pg_wal")
    }

    pub fn control_file(&self) -> PathBuf {
        self.data_dir.join("global/pg_control")
    }

    pub fn standby_signal(&self) -> PathBuf {
        self.data_dir.join("standby.signal")
    }

    /// The password for the upstream. A WAL receiver cannot authenticate without it; the seal removes it.
    pub fn passfile(&self) -> PathBuf {
        self.private_dir.join("upstream.pgpass")
    }

    /// What PostgreSQL wrote before its log collector ran: why it did not start.
    pub fn startup_log(&self) -> PathBuf {
        self.log_dir.join("startup.log")
    }

    /// True once a data directory was made: by initdb, a clone or a restore.
    pub fn has_data(&self) -> bool {
        self.data_dir.join("PG_VERSION").is_file() && self.control_file().is_file()
    }
}

/// The name of the user that runs this process, as PostgreSQL's `peer` method will see it.
pub async fn os_user() -> crate::error::Result<String> {
    use crate::error::{Error, within};
    let asked = tokio::process::Command::new("id").arg("-un").kill_on_drop(true).output();
    let output = within("asking for the user's name", std::time::Duration::from_secs(10), async {
        asked.await.map_err(Error::io("run", "id"))
    })
    .await?;
    let name = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() && !name.is_empty() {
        return Ok(name);
    }
    Err(Error::Program {
        program: "id -un",
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Such a path needs no quoting in `postgresql.conf`, a conninfo or a list of directories.
fn usable_path(path: &Path) -> bool {
    let plain = |byte: &u8| !byte.is_ascii_control() && !b"'\"\\,`$".contains(byte);
    path.is_absolute() && path.to_str().is_some() && path.as_os_str().as_bytes().iter().all(plain)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::installation::Version;

    pub(crate) fn spec() -> InstanceSpec {
        InstanceSpec {
            installation: Installation {
                bin_dir: "/usr/lib/postgresql/15/bin".into(),
                version: Version { major: 15, minor: 0 },
            },
            node: "a".parse().unwrap(),
            data_dir: "/herd/a/data".into(),
            wal_dir: None,
            private_dir: "/herd/a/private".into(),
            socket_dir: "/herd/a".into(),
            log_dir: "/herd/a/log".into(),
            port: 21000,
            listen_addresses: vec!["127.0.0.1".into()],
            tls: TlsFiles { cert: "/herd/a/c".into(), key: "/herd/a/k".into(), ca: "/herd/a/ca".into() },
            os_user: "postgres".into(),
        }
    }

    #[test]
    fn a_socket_path_that_does_not_fit_is_refused_and_one_that_just_fits_is_not() {
        let name = ".s.PGSQL.21000".len();
        let fits = format!("/{}", "x".repeat(MAX_SOCKET_PATH_BYTES - name - 2));
        assert!(Instance::new(InstanceSpec { socket_dir: fits.clone().into(), ..spec() }).is_ok());
        let refused = Instance::new(InstanceSpec { socket_dir: format!("{fits}x").into(), ..spec() });
        assert!(matches!(refused, Err(InstanceError::SocketPathTooLong { bytes: 108, .. })));
    }

    #[test]
    fn what_a_clone_would_overwrite_or_bring_along_may_not_lie_in_the_data_directory() {
        let inside = InstanceSpec { private_dir: "/herd/a/data/private".into(), ..spec() };
        assert!(matches!(Instance::new(inside), Err(InstanceError::InsideDataDir { .. })));
        let relative = InstanceSpec { log_dir: "log".into(), ..spec() };
        assert!(matches!(Instance::new(relative), Err(InstanceError::Path { .. })));
        let quoted = InstanceSpec { data_dir: "/herd/it's".into(), ..spec() };
        assert!(matches!(Instance::new(quoted), Err(InstanceError::Path { .. })));
    }
}
