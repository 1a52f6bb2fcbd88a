//! Where an agent keeps its sockets and logs, so that the agent and the command line agree without asking.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// In the state directory: where the repository of the node's cluster is, for commands on its host.
pub const REPOSITORY_FILE: &str = "repository.toml";

/// The kernel's `sun_path` has 108 bytes with its terminator.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The longest name that a socket of ours has: PostgreSQL's lock file for the highest port.
const LONGEST_SOCKET_NAME: &str = ".s.PGSQL.65535.lock";

/// The directory of the agent's and of PostgreSQL's sockets: `run` in the state directory or, where that
/// would be too long for a socket, a short name under `/tmp`. Not under a runtime directory: that differs
/// between the agent's user and whoever runs the command line, and both must come to the same place. The
/// agent makes it for itself alone, and refuses one that somebody else made.
pub fn socket_dir(state_dir: &Path) -> PathBuf {
    let near = state_dir.join("run");
    if near.join(LONGEST_SOCKET_NAME).as_os_str().as_bytes().len() <= MAX_SOCKET_PATH_BYTES {
        return near;
    }
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, near.as_os_str().as_bytes());
    let short: String = hash.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Path::new("/tmp").join(format!("pgherd-{short}"))
}

/// The agent's own socket, for the command line on this host.
pub fn api_socket(state_dir: &Path) -> PathBuf {
    socket_dir(state_dir).join("agent.sock")
}

/// Certificates and key, readable for the agent's user only.
pub fn pki_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("pki")
}

/// Logs of the agent and of PostgreSQL.
pub fn log_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("log")
}

/// The agent's own log, when a supervisor keeps it in a file.
pub fn agent_log(state_dir: &Path) -> PathBuf {
    log_dir(state_dir).join("agent.log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_path_moves_to_a_short_one_and_stays_there() {
        assert_eq!(socket_dir(Path::new("/var/lib/pgherd/a")), Path::new("/var/lib/pgherd/a/run"));
        let long = PathBuf::from(format!("/{}", "x".repeat(120)));
        let moved = socket_dir(&long);
        assert!(moved.join(LONGEST_SOCKET_NAME).as_os_str().len() <= MAX_SOCKET_PATH_BYTES);
        assert_eq!(moved, socket_dir(&long));
    }
}
