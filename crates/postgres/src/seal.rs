//! The seal (rule 3): not one further byte of the old term reaches this node, and that survives any restart.
//!
//! A reload alone is no seal: PostgreSQL's startup process drops its WAL receiver only when replay next waits for
//! WAL, which a reader in conflict or a paused replay delays for ever, and meanwhile the receiver goes on
//! acknowledging (S1). Nor is ending the receiver: the startup process asks for another one with the connection
//! string that it still has in memory. So the seal rests on the password:
//!
//! 1. `primary_conninfo` and `restore_command` are emptied on disk, so that no start connects anywhere;
//! 2. the upstream's passfile is removed, durably: a receiver that is started from here on cannot authenticate,
//!    whatever connection string it is given;
//! 3. every receiver that exists just after that is ended and its exit seen; a process that was forked and shows no
//!    title yet is waited for until it does. A receiver that dies flushes what it has first.
//!
//! When no receiver is left that could have read the passfile, what is on disk is all that this node will ever hold
//! of the old term, and its end is read and synced. If that is not so within [`RECEIVERS_END`], the whole server is
//! killed and the node sealed dead.
//!
//! Leaves out: the term and the vote. Hazard: a seal that lets one more acknowledgement out loses that commit.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::conf::{self, read_blocking, replace_blocking};
use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::instance::Instance;
use crate::proc::{self, Process};
use crate::process::{GoneError, Server, ensure_gone};
use crate::receivers::{self, Kind};
use crate::wal::{self, Boundary, EndOfWal};

/// From the removal of the passfile. A receiver that lives takes some milliseconds to end.
pub const RECEIVERS_END: Duration = Duration::from_millis(300);
/// For reading the end of WAL. It takes long where much was written since the last checkpoint and nothing is known of
/// how far it is whole; giving up would only begin it anew.
const READING: Duration = Duration::from_secs(600);
/// Between two looks while something is ending.
const POLL: Duration = Duration::from_millis(3);
/// Of what `ALTER SYSTEM` may have set, what would undo a seal.
const UNDOING: [&str; 3] = ["primary_conninfo", "restore_command", "primary_slot_name"];

/// What a vote is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The server still runs and answers reads.
    pub alive: bool,
    pub end: EndOfWal,
    /// Settings of `ALTER SYSTEM` that had to be removed. Worth a warning: somebody made them by hand.
    pub removed: Vec<String>,
    /// Receivers that were ended.
    pub receivers: usize,
    pub took: Duration,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    #[error("not sealed: {0}")]
    NotGone(#[from] GoneError),

    #[error("not sealed: {0}")]
    Other(#[from] Error),
}

impl SealError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            SealError::NotGone(error) => error.hint(),
            SealError::Other(error) => error.hint(),
        }
    }
}

/// Seals this node and says what it holds. `server` is the one that runs, if one does. `known` is a place up to which
/// WAL was replayed, and makes finding the end quick. `deadline` is for the disk; there is no seal without it.
pub async fn seal(
    instance: &Instance,
    server: Option<&Server>,
    known: Option<Boundary>,
    deadline: Duration,
) -> Result<Sealed, SealError> {
    let began = Instant::now();
    let LetGo { alive, removed, receivers } = let_go(instance, server, deadline).await?;
    let end = {
        let instance = instance.clone();
        blocking("reading the end of WAL", READING, move || wal::end_of_wal(&instance, known)).await?
    };
    let alive = alive && server.is_some_and(|server| !server.is_dead());
    Ok(Sealed { alive, end, removed, receivers, took: began.elapsed() })
}

/// The seal without a position: this node receives nothing more. `false`: its server had to be killed for that.
pub async fn stop_receiving(
    instance: &Instance,
    server: Option<&Server>,
    deadline: Duration,
) -> Result<bool, SealError> {
    Ok(let_go(instance, server, deadline).await?.alive)
}

struct LetGo {
    alive: bool,
    removed: Vec<String>,
    receivers: usize,
}

async fn let_go(
    instance: &Instance,
    server: Option<&Server>,
    deadline: Duration,
) -> Result<LetGo, SealError> {
    let server = server.filter(|server| !server.is_dead());
    let removed = {
        let (instance, server) = (instance.clone(), server.cloned());
        blocking("sealing on disk", deadline, move || on_disk(&instance, server.as_ref())).await?
    };
    let mut receivers = 0;
    let mut alive = false;
    if let Some(server) = server {
        alive = end_receivers(server, &mut receivers).await?;
    }
    if !alive {
        ensure_gone(instance, deadline).await?;
    }
    Ok(LetGo { alive, removed, receivers })
}

/// Makes a stopped server's next start connect to nobody: what is done before each start, until the store has told the
/// node the term (rule 3). Not a vote; that takes [`seal`].
pub async fn disconnect(instance: &Instance, deadline: Duration) -> Result<Vec<String>> {
    let instance = instance.clone();
    blocking("forgetting the upstream", deadline, move || on_disk(&instance, None)).await
}

/// True if nothing on disk would let this node connect to anybody. Blocks.
pub fn is_sealed_on_disk(instance: &Instance) -> Result<bool> {
    let managed = read_blocking(instance)?;
    let empty = managed.primary_conninfo.is_empty() && managed.restore_command.is_empty();
    Ok(empty && !instance.passfile().exists() && !conf::auto_conf_sets(instance, &UNDOING)?)
}

fn on_disk(instance: &Instance, server: Option<&Server>) -> Result<Vec<String>> {
    let sealed = read_blocking(instance)?.sealed();
    replace_blocking(instance, &sealed)?;
    let removed = conf::remove_from_auto_conf(instance, &UNDOING)?;
    if let Some(server) = server {
        // Early, so that the startup process has seldom anything left to ask for when its receiver ends. If the
        // server died just now, there is nobody to tell.
        if let Err(error) = server.reload()
            && !server.is_dead()
        {
            return Err(error);
        }
    }
    durable::remove(&instance.passfile())?;
    // Syncs the directory as well, and with it the name of the file above.
    durable::touch(&instance.standby_signal())?;
    Ok(removed)
}

/// Ends every receiver that can have read the passfile. `false`: not in time, or the server died.
///
/// Those are the ones that the first look finds, or that become receivers from what it finds: whatever is forked later
/// is forked behind the removal of the passfile. A later receiver is ended as well, for quiet, but not waited for.
async fn end_receivers(server: &Server, ended: &mut usize) -> Result<bool> {
    let until = Instant::now() + RECEIVERS_END;
    let mut waited_for: Option<HashMap<Pid, Process>> = None;
    loop {
        if server.is_dead() {
            return Ok(false);
        }
        let left = until.saturating_duration_since(Instant::now());
        let children = match receivers::children(server, left.max(POLL)).await {
            // Titles that cannot be read are those of processes that wait for a disk.
            Err(Error::Deadline { .. }) => return Ok(false),
            other => other?,
        };
        let first = waited_for.is_none();
        let waiting = waited_for.get_or_insert_default();
        let mut restoring = false;
        for (kind, seen) in children {
            match kind {
                Kind::WalReceiver => {
                    if let Some(process) = receivers::hold(&seen)? {
                        process.signal(Signal::TERM)?;
                        *ended += 1;
                        if first {
                            waiting.insert(seen.pid, process);
                        }
                    }
                }
                Kind::Nascent => {
                    if first && let Some(process) = receivers::hold(&seen)? {
                        waiting.insert(seen.pid, process);
                    }
                }
                // A restore command that runs may still bring a segment of the old term.
                Kind::Startup => restoring |= !proc::children_of(seen.pid)?.is_empty(),
                Kind::Own | Kind::Monitor | Kind::Session => {
                    // It was nascent, and has become something that receives nothing.
                    waiting.remove(&seen.pid);
                }
            }
        }
        waiting.retain(|_, process| !process.has_ended());
        if waiting.is_empty() && !restoring {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        match waiting.values().next() {
            Some(process) => drop(process.ended_within(POLL).await),
            None => tokio::time::sleep(POLL).await,
        }
    }
}
