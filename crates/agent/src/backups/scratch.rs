//! A backup that is recovered in a scratch server, for as long as something is to be fetched from it or looked at.
//!
//! ```text
//! prepare      which backup, where it ends, which programs, whether it fits; touches nothing
//! Ready::run   restores beside everything else, starts the server, waits for the end of recovery
//! Running      the server; dropped, it is ended and removed
//! ```
//!
//! It is promoted at its target: what is looked for may need a change, and a server that nobody else knows of harms nobody. Leaves out: what is done with
//! it. Hazard: takes disk and memory from the servers of this host; so it is refused where it does not fit with something to spare.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgherd_api::backup::{RestorePlan, Restored};
use pgherd_backup::wal::{SegmentError, Segments};
use pgherd_core::types::Lsn;
use pgherd_postgres::Installation;
use pgherd_postgres::installation::InstallationError;
use pgherd_postgres::scratch::{self as server, How, Leftover, Scratch, ScratchError, State};
use tokio::sync::watch;

use super::Progress;
use super::recover::{self, AtTarget, Prepared, RecoverError};

/// For WAL between two restart points, the log, and what is written at the end of recovery.
pub const RESERVE_BYTES: u64 = 1 << 30;
/// Between two looks at how far it is.
const POLL: Duration = Duration::from_millis(100);
/// The original's limits were raised so often, at most, between the backup and the target.
const MAX_RAISED: u32 = 8;
/// `server_version_num` of a major version's first release.
const MAJOR: u32 = 10_000;

/// What is to be recovered, and where.
#[derive(Clone, Debug)]
pub struct Order {
    /// Its places are not read: they are in the scratch directory.
    pub recovery: recover::Order,
    /// In which the directory is made.
    pub parent: PathBuf,
    /// Of PostgreSQL's programs; those of the distribution if there is none.
    pub bin_dir: Option<PathBuf>,
    /// To connect as; if there is none, as usual.
    pub superuser: Option<String>,
    pub preload: String,
    pub flush: bool,
    pub modest: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Recover(#[from] RecoverError),
    #[error(transparent)]
    Server(#[from] ScratchError),
    #[error(transparent)]
    Installation(#[from] InstallationError),
    #[error("backup is of PostgreSQL {wanted}, and {} has {found}", .bin_dir.display())]
    OtherVersion { wanted: u32, found: u16, bin_dir: PathBuf },
    #[error(transparent)]
    Segments(#[from] SegmentError),
    #[error("{needed} bytes come to {}, {spare} have to stay free behind them for WAL and whoever else writes there, and {free} are free", .place.display())]
    NoSpace { place: PathBuf, needed: u64, spare: u64, free: u64 },
}

impl Error {
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Recover(error) => error.hint(),
            Error::Server(error) => error.hint(),
            Error::Installation(error) => error.hint(),
            Error::OtherVersion { wanted, .. } => {
                Some(format!("--bin-dir names the directory of the programs of PostgreSQL {wanted}"))
            }
            Error::NoSpace { .. } => Some("--scratch-dir names another place".to_owned()),
            Error::Segments(_) => None,
        }
    }
}

/// A scratch server that nothing speaks against.
#[derive(Debug)]
pub struct Ready {
    prepared: Prepared,
    installation: Installation,
    dir: PathBuf,
    how: How,
}

/// Finds out what would be done. Touches nothing.
pub async fn prepare(order: Order) -> Result<Ready, Error> {
    let Order { mut recovery, parent, bin_dir, superuser, preload, flush, modest } = order;
    let dir = server::choose(&parent)?;
    let (data, tablespaces) = server::places(&dir);
    recovery.to = data;
    recovery.wal_dir = None;
    recovery.tablespaces.clear();
    recovery.tablespaces_in = Some(tablespaces);
    recovery.delta = false;
    recovery.at_target = AtTarget::Promote;
    let prepared = recover::prepare(&recovery).await?;
    let wanted = prepared.manifest().facts.postgresql_version / MAJOR;
    let installation = match &bin_dir {
        Some(bin_dir) => Installation::at(bin_dir).await?,
        None => Installation::of_version(wanted.try_into().unwrap_or(u16::MAX)).await?,
    };
    let found = installation.version.major;
    if u32::from(found) != wanted {
        return Err(Error::OtherVersion { wanted, found, bin_dir: installation.bin_dir });
    }
    let roles = match superuser {
        Some(named) => vec![named],
        None => usual_roles().await?,
    };
    Ok(Ready { prepared, installation, dir, how: How { roles, preload, flush, modest } })
}

/// Clusters are made by one of these, mostly.
async fn usual_roles() -> Result<Vec<String>, Error> {
    let own = pgherd_postgres::instance::os_user().await.map_err(ScratchError::from)?;
    let mut roles = vec![pgherd_postgres::roles::SUPERUSER.to_owned()];
    if own != roles[0] {
        roles.push(own);
    }
    Ok(roles)
}

/// Ends and removes what programs that were killed have left.
pub async fn remove_leftovers(parent: &Path) -> Vec<Leftover> {
    let parent = parent.to_owned();
    tokio::task::spawn_blocking(move || server::remove_leftovers(&parent)).await.unwrap_or_default()
}

/// A scratch server whose recovery has ended.
#[derive(Debug)]
pub struct Running {
    pub scratch: Scratch,
    pub how: How,
    pub installation: Installation,
    pub plan: RestorePlan,
    pub restored: Restored,
    /// From its start to the end of recovery.
    pub recovery: Duration,
    /// WAL between the start of the backup and the end of recovery.
    pub wal_bytes: u64,
}

impl Ready {
    /// As it is told.
    pub fn report(&self) -> RestorePlan {
        self.prepared.report()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Refuses what would fail for sure. `spare`: so much has to stay free beside the files of the backup.
    pub fn check(&self, spare: u64) -> Result<(), Error> {
        self.prepared.check()?;
        for volume in self.prepared.volumes() {
            let needed = volume.needed_bytes;
            if needed.saturating_add(spare) > volume.free_bytes {
                let place = self.dir.clone();
                return Err(Error::NoSpace { place, needed, spare, free: volume.free_bytes });
            }
        }
        Ok(())
    }

    /// Does it. Dropping the future ends and removes it all.
    pub async fn run(
        self,
        note: &str,
        readers: usize,
        max_bytes_per_second: Option<NonZeroU64>,
        progress: &watch::Sender<Progress>,
    ) -> Result<Running, Error> {
        let Ready { prepared, installation, dir, how } = self;
        let plan = prepared.report();
        let (from, to) = prepared.wal();
        let segments = Segments::new(prepared.manifest().wal_segment_bytes)?;
        let mut scratch = Scratch::make(&dir, note)?;
        let restored = prepared.run(readers, max_bytes_per_second, progress).await?;
        let began = Instant::now();
        let replay = Replay { segments, from, to };
        let mut raised = 0;
        scratch.start(&installation, &how).await?;
        loop {
            match scratch.state(&how).await? {
                State::Primary => break,
                State::Recovering { segment } => {
                    let done_bytes = segment.and_then(|segment| replay.done(&segment));
                    progress.send_modify(|progress| {
                        progress.done_bytes = done_bytes.unwrap_or(progress.done_bytes.min(replay.total()));
                        progress.total_bytes = replay.total();
                        progress.step = Some("recovering");
                    });
                }
                State::Paused | State::Ended if scratch.lacks_limits() && raised < MAX_RAISED => {
                    raised += 1;
                    scratch.end().await?;
                    scratch.start(&installation, &how).await?;
                }
                State::Paused => return Err(ScratchError::Waits { at: to.to_string() }.into()),
                State::Ended => return Err(scratch.ended().into()),
            }
            tokio::time::sleep(POLL).await;
        }
        let wal_bytes = replay.total();
        Ok(Running { scratch, how, installation, plan, restored, recovery: began.elapsed(), wal_bytes })
    }
}

/// How far a recovery is, by the segment that it reads.
struct Replay {
    segments: Segments,
    from: Lsn,
    to: Lsn,
}

impl Replay {
    fn total(&self) -> u64 {
        self.to.0.saturating_sub(self.from.0)
    }

    fn done(&self, segment: &str) -> Option<u64> {
        let start = self.segments.start(self.segments.parse(segment)?);
        Some(start.0.saturating_sub(self.from.0).min(self.total()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_is_as_far_as_its_segment() {
        let segments = Segments::new(16 << 20).unwrap();
        let replay = Replay { segments, from: Lsn(0x300_0028), to: Lsn(0x700_0000) };
        assert_eq!(replay.done("000000010000000000000003"), Some(0));
        assert_eq!(replay.done("000000020000000000000005"), Some(0x200_0000 - 0x28));
        assert_eq!(replay.done("000000020000000000000009"), Some(replay.total()));
        assert_eq!(replay.done("00000002.history"), None);
    }
}
