//! The directory of a herd on one machine: what lies where, who owns it, and the lock that has one supervisor.
//!
//! ```text
//! <dir>/                root's, or the user's
//!   herd.toml           what the store was given first; edited by people, applied by `pgherd apply`
//!   ports.json          which ports are whose; marks the directory as a herd of `pgherd up`
//!   pgpass  ca.pem      what clients need
//!   bin/pgherd-<hash>   the program that the agents run, so that a new build does not change it under them
//!   lock  run/  log/    of the supervisor
//!   backups/            the repository of a herd that `up` made by itself, the agents' user's
//!   proxy/              of its proxy, the agents' user's: its file, certificates and log
//!   a/  b/  c/          one per node, the agents' user's: agent file, data, store, certificates, logs
//! ```

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pgherd_core::types::NodeName;
use rustix::fs::{FlockOperation, flock};

use super::LocalError;
use super::account::Account;
use crate::paths;
use crate::proxy::RUN_DIR;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    dir: PathBuf,
}

impl Home {
    pub fn at(dir: impl Into<PathBuf>) -> Home {
        Home { dir: dir.into() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn herd_file(&self) -> PathBuf {
        self.dir.join("herd.toml")
    }

    pub(super) fn ports_file(&self) -> PathBuf {
        self.dir.join("ports.json")
    }

    pub fn passfile(&self) -> PathBuf {
        self.dir.join("pgpass")
    }

    pub(super) fn ca_file(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    pub(super) fn bin_dir(&self) -> PathBuf {
        self.dir.join("bin")
    }

    pub(super) fn lock_file(&self) -> PathBuf {
        self.dir.join("lock")
    }

    pub(super) fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// What a supervisor in the background says.
    pub fn supervisor_log(&self) -> PathBuf {
        self.log_dir().join("supervisor.log")
    }

    /// Opened to append to; directories are made where they are missing.
    pub fn open_supervisor_log(&self) -> Result<File, LocalError> {
        make_dir(&self.log_dir(), 0o700)?;
        let path = self.supervisor_log();
        File::options().create(true).append(true).open(&path).map_err(LocalError::io("open", path))
    }

    pub(super) fn socket_dir(&self) -> PathBuf {
        paths::socket_dir(&self.dir)
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.socket_dir().join("supervisor.sock")
    }

    pub(super) fn node_dir(&self, node: &NodeName) -> PathBuf {
        self.dir.join(node.as_str())
    }

    pub(super) fn agent_file(&self, node: &NodeName) -> PathBuf {
        self.node_dir(node).join("agent.toml")
    }

    pub(super) fn pid_file(&self, node: &NodeName) -> PathBuf {
        self.dir.join("run").join(format!("{node}.json"))
    }

    pub(super) fn proxy_dir(&self) -> PathBuf {
        self.dir.join("proxy")
    }

    /// Where its processes find each other.
    pub(super) fn proxy_run_dir(&self) -> PathBuf {
        self.proxy_dir().join(RUN_DIR)
    }

    pub(super) fn proxy_file(&self) -> PathBuf {
        self.proxy_dir().join("proxy.toml")
    }

    pub(super) fn proxy_log(&self) -> PathBuf {
        paths::log_dir(&self.proxy_dir()).join("proxy.log")
    }

    pub(super) fn proxy_pid_file(&self) -> PathBuf {
        // No node can have this name.
        self.dir.join("run").join("-proxy.json")
    }

    /// Whether `up` has made a herd here.
    pub fn has_herd(&self) -> bool {
        self.ports_file().is_file()
    }

    /// Makes the directories of the supervisor.
    pub(super) fn make(&self, account: Option<&Account>) -> Result<(), LocalError> {
        // Agents that run as another user pass through it.
        let mode = if account.is_some() { 0o755 } else { 0o700 };
        make_dir(&self.dir, mode)?;
        make_dir(&self.bin_dir(), mode)?;
        make_dir(&self.log_dir(), 0o700)?;
        make_dir(&self.dir.join("run"), 0o700)?;
        let sockets = self.socket_dir();
        make_dir(&sockets, 0o700)?;
        // In a shared place somebody else could have made it, to listen in.
        let meta = fs::symlink_metadata(&sockets).map_err(LocalError::io("look at", &sockets))?;
        if meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw() {
            return Ok(());
        }
        Err(LocalError::NotOurs { path: sockets })
    }

    /// Makes a node's directory, for the user that its agent runs as.
    pub(super) fn make_node(&self, node: &NodeName, account: Option<&Account>) -> Result<(), LocalError> {
        let dir = self.node_dir(node);
        make_dir(&dir, 0o700)?;
        give_to(&dir, account)
    }

    /// Where WAL and base backups go, in a herd that `up` made by itself.
    pub(super) fn backups_dir(&self) -> PathBuf {
        self.dir.join("backups")
    }

    pub(super) fn make_backups(&self, account: Option<&Account>) -> Result<(), LocalError> {
        make_dir(&self.backups_dir(), 0o700)?;
        give_to(&self.backups_dir(), account)
    }

    /// Makes the proxy's directories, for the user that agents run as too.
    pub(super) fn make_proxy(&self, account: Option<&Account>) -> Result<(), LocalError> {
        let dir = self.proxy_dir();
        for dir in [dir.clone(), paths::log_dir(&dir), dir.join("pki")] {
            make_dir(&dir, 0o700)?;
            give_to(&dir, account)?;
        }
        Ok(())
    }
}

/// A directory that exists keeps its mode: somebody may have had a reason.
fn make_dir(dir: &Path, mode: u32) -> Result<(), LocalError> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(LocalError::io("create", dir))?;
    // The umask may have taken away what another user needs.
    fs::set_permissions(dir, fs::Permissions::from_mode(mode)).map_err(LocalError::io("set the mode of", dir))
}

pub(super) fn give_to(path: &Path, account: Option<&Account>) -> Result<(), LocalError> {
    let Some(account) = account else { return Ok(()) };
    std::os::unix::fs::chown(path, Some(account.uid), Some(account.gid))
        .map_err(LocalError::io("change the owner of", path))
}

/// Held by the one supervisor of a directory for as long as it lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// `None` if another process has it.
    pub fn take(home: &Home) -> Result<Option<Lock>, LocalError> {
        make_dir(home.dir(), if rustix::process::geteuid().is_root() { 0o755 } else { 0o700 })?;
        let path = home.lock_file();
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(LocalError::io("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(LocalError::io("lock", path)(error.into())),
        }
    }
}

/// What a client on this machine needs besides addresses; absent where `up` did not make it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientFiles {
    pub passfile: Option<PathBuf>,
    pub ca: Option<PathBuf>,
}

pub fn client_files(dir: &Path) -> ClientFiles {
    let home = Home::at(dir);
    let existing = |path: PathBuf| path.is_file().then_some(path);
    // In the state directory of a host's own agent the authority is with its certificates.
    let ca = existing(home.ca_file()).or_else(|| existing(dir.join("pki").join("ca.pem")));
    ClientFiles { passfile: existing(home.passfile()), ca }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_supervisor_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("herd"));
        let first = Lock::take(&home).unwrap();
        assert!(first.is_some());
        assert!(Lock::take(&home).unwrap().is_none());
        drop(first);
        assert!(Lock::take(&home).unwrap().is_some());
    }

    #[test]
    fn a_directory_without_ports_is_no_herd() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Home::at(dir.path()).has_herd());
        assert_eq!(client_files(dir.path()), ClientFiles::default());
    }
}
