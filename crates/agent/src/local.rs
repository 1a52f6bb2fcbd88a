//! A whole herd on one machine: what `pgherd up` and `pgherd down` do.
//!
//! Responsible for: the directory, ports and files of such a herd; starting one agent process per node,
//! starting dead ones again, taking over those that run, and one proxy beside them; the way from nothing to a healthy herd, through the
//! same commands that people run on many hosts; and the way down in an order that loses nothing.
//!
//! Leaves out: every decision about PostgreSQL, which is the agents' alone, and all printing: what happens is
//! told as [`Event`]s.
//!
//! Nothing depends on this process. When it is killed, agents and PostgreSQL go on, and the next one takes
//! them over.
//!
//! Hazard: two supervisors of one directory, or one that takes a stranger's process for its agent. A lock
//! forbids the first, and a process is recognised by number, start time, program and directory together.

mod account;
mod agents;
mod board;
mod control;
mod delete;
mod event;
mod herd;
mod home;
pub(crate) mod passfile;
mod ports;
mod process;
mod program;
mod proxy;
mod stop;
mod supervisor;

use std::io;
use std::path::{Path, PathBuf};

use pgherd_core::types::NodeName;
use pgherd_postgres::installation::InstallationError;

pub use board::{Board, Subscription};
pub use control::{Ask, Attachment, attach};
pub use delete::{Remains, remains};
pub use event::Event;
pub use home::{ClientFiles, Home, Lock, client_files};
pub use supervisor::{Options, Supervisor, differing_file};

use crate::files::Findings;

/// The signal that asks an agent to stop its PostgreSQL and keep it stopped, while the agent itself goes on
/// and still votes. SIGTERM is something else: it ends the agent and leaves PostgreSQL running.
pub const STOP_POSTGRES: rustix::process::Signal = rustix::process::Signal::USR1;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalError {
    #[error("cannot {doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },

    #[error("the herd file has mistakes")]
    HerdFile(Findings),

    #[error("{} is not a list of this program's ports: {why}", .path.display())]
    PortsMalformed { path: PathBuf, why: String },

    #[error("no block of {wanted} free ports from {first} on")]
    NoPorts { wanted: usize, first: u16 },

    #[error("port {port}, which belongs to {node}, is taken by another program")]
    PortTaken { node: NodeName, port: u16 },

    #[error("there is no user {user} to run PostgreSQL as, which refuses root")]
    NoUser { user: &'static str },

    #[error("user {user} cannot enter {}", .path.display())]
    OutOfReach { user: String, path: PathBuf },

    #[error(transparent)]
    PostgreSql(#[from] InstallationError),

    #[error("{} was made by another user", .path.display())]
    NotOurs { path: PathBuf },

    #[error("{what} failed: {output}")]
    Step { what: String, output: String },

    #[error("{what} took longer than {after_s} s")]
    Deadline { what: String, after_s: u64 },

    #[error("the supervisor in {} has the herd's lock and does not answer", .dir.display())]
    SupervisorSilent { dir: PathBuf },

    #[error("the supervisor ended before the herd was up")]
    SupervisorEnded { log: PathBuf },

    #[error("{} holds what pgherd did not make: {}", .dir.display(), .names.join(", "))]
    Unknown { dir: PathBuf, names: Vec<String> },

    #[error("processes of {} did not end", .nodes.join(", "))]
    StillRunning { nodes: Vec<String> },
}

/// How to have a PostgreSQL without the package making a cluster of its own.
const INSTALL: &str = "on Debian, as root:\n\
    mkdir -p /etc/postgresql-common\n\
    echo 'create_main_cluster = false' >> /etc/postgresql-common/createcluster.conf\n\
    apt-get install postgresql";

impl LocalError {
    fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> LocalError {
        let path = path.into();
        move |source| LocalError::Io { doing, path, source }
    }

    /// What to do next, in full sentences or a command.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            LocalError::Io { source, path, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                format!(
                    "it belongs to another user; run this as that user, or name a directory other than {} with --dir",
                    path.display()
                )
            }
            LocalError::Io { .. } => return None,
            LocalError::HerdFile(_) => "pgherd validate shows every mistake".to_owned(),
            LocalError::PortsMalformed { path, .. } => {
                format!(
                    "put {} back as it was: the herd's own specification names these ports",
                    path.display()
                )
            }
            LocalError::NoPorts { .. } => {
                "end what holds them, or run the herd in a network namespace".to_owned()
            }
            LocalError::PortTaken { port, .. } => {
                format!("see who has it with: ss -ltnp 'sport = :{port}'")
            }
            LocalError::NoUser { .. } => "PostgreSQL's package makes it; make up installs that".to_owned(),
            LocalError::OutOfReach { user, .. } => {
                format!("name a directory that {user} can reach with --dir, such as /var/lib/pgherd")
            }
            LocalError::PostgreSql(InstallationError::NoneInstalled { .. }) => INSTALL.to_owned(),
            LocalError::PostgreSql(error) => return error.hint(),
            LocalError::NotOurs { path } => {
                format!("nothing of this herd may stand there; have {} removed", path.display())
            }
            LocalError::Deadline { .. } => {
                "pgherd explain says what it waits for, pgherd logs shows why".to_owned()
            }
            LocalError::SupervisorSilent { dir } => {
                format!("it may be frozen; who holds it: fuser {}", dir.join("lock").display())
            }
            LocalError::SupervisorEnded { log } => format!("its log says why: {}", log.display()),
            LocalError::Unknown { .. } => "move it elsewhere and try again; nothing was removed".to_owned(),
            LocalError::StillRunning { .. } => {
                "a process that waits for a broken disk cannot be ended: look at dmesg".to_owned()
            }
            LocalError::Step { .. } => {
                "pgherd logs shows more; pgherd up goes on where it stopped".to_owned()
            }
        })
    }
}

/// The herd file's text with hosts and ports as the herd in `dir` has them; `None` if none lives there.
pub fn mapped_to(dir: &Path, text: &str) -> Result<Option<String>, LocalError> {
    let Some(ports) = ports::Ports::load(&Home::at(dir))? else { return Ok(None) };
    let read = crate::files::herd::read("herd.toml", text).map_err(LocalError::HerdFile)?;
    Ok(Some(crate::files::herd::write(&herd::mapped(read.spec, &ports))))
}

/// Where this machine keeps PostgreSQL's programs, newest version first.
pub fn postgres_bin_dirs() -> Vec<PathBuf> {
    let places = |major: u16| [format!("/usr/lib/postgresql/{major}/bin"), format!("/usr/pgsql-{major}/bin")];
    let all = pgherd_postgres::installation::SUPPORTED.rev().flat_map(places).map(PathBuf::from);
    all.filter(|dir| dir.is_dir()).collect()
}
