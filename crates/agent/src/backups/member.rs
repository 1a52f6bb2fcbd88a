//! The data directory of a member of a herd, out of the repository: for a new standby, or for a node that has lost its disk. The primary
//! is asked for no more than the newest WAL.
//!
//! All WAL that a whole archive has behind the backup is put into `pg_wal`, along the line of history that leads to the reign's timeline and
//! never beyond a fork. What remains is streamed. PostgreSQL gets no `restore_command`: a member that could fetch WAL by itself could
//! not be sealed.
//!
//! Leaves out: whether this node may be made anew, which is decided. Hazard: a copy with a hole between what is archived and what its
//! source still keeps for it; so it is refused before it is put in its place.

use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use pgherd_backup::document::ReadError;
use pgherd_backup::format::Repository;
use pgherd_backup::manifest::Manifest;
use pgherd_backup::name::Place;
use pgherd_backup::wal::{Archive, ArchivedFile, History, Inventory, Segment};
use pgherd_core::record::Record;
use pgherd_core::spec::RepositorySpec;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::clone::{CloneError, Filling};
use pgherd_postgres::disk;
use pgherd_postgres::restoring::{Action, Come, End, FollowTimeline, Over, Recovery};
use tokio::sync::watch;
use tokio::time::Instant;

use super::catalog::{Catalog, CatalogError};
use super::restore::{self, RestoreError, Wish};
use super::{MAX_READERS, Progress};
use crate::repository::{self, RepositoryError};

/// For one look at the repository. A primary is there, too, and does not keep one waiting.
const LOOK: Duration = Duration::from_secs(30);
/// For so long the archive may catch up with what the source keeps.
const CATCH_UP: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Without a byte of progress for so long, the repository is given up.
const STALL: Duration = Duration::from_secs(60);
/// Segments that are fetched at the same time.
const AT_ONCE: usize = 4;
/// Replay is done by one process. Behind more WAL than this, and than the copy has bytes, copying all of it from the primary is sooner
/// over.
const MUCH_WAL_BYTES: u64 = 4 << 30;

/// What a member is made from.
pub(crate) struct Order {
    pub(crate) repository: RepositorySpec,
    /// What is agreed.
    pub(crate) record: Record,
    /// From here on the source keeps WAL for this node.
    pub(crate) kept_from: Lsn,
}

/// What was made.
#[derive(Debug)]
pub(crate) struct Filled {
    pub(crate) backup: String,
    pub(crate) bytes: u64,
    pub(crate) segments: u64,
    /// Behind this everything is streamed.
    pub(crate) end: Lsn,
}

/// Why the repository is not what this member is made from. Another way is open always.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemberError {
    #[error("nothing was agreed of a repository yet")]
    NotAgreed,
    #[error("the source keeps no WAL for this node yet")]
    NothingKept,
    #[error("the repository there is another one than the cluster's")]
    AnotherRepository,
    #[error("it did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("no progress for {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("it has no backup with its WAL on the way to timeline {0}")]
    NoBackup(Timeline),
    #[error("backup {backup} has tablespaces, which are not managed")]
    Tablespaces { backup: String },
    #[error("{wal_bytes} bytes of WAL came behind backup {backup} of {bytes} bytes")]
    MuchWal { backup: String, bytes: u64, wal_bytes: u64 },
    #[error("backup {backup} and the WAL behind it are {needed} bytes, and {free} are free in {}", .place.display())]
    NoSpace { backup: String, place: PathBuf, needed: u64, free: u64 },
    #[error("its WAL ends at {end}, and the source keeps none before {kept_from}")]
    Hole { end: Lsn, kept_from: Lsn },
    #[error("{0}")]
    Repository(RepositoryError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("its WAL cannot be read")]
    Read(#[from] ReadError),
    #[error(transparent)]
    Clone(#[from] CloneError),
    #[error(transparent)]
    Driver(#[from] pgherd_postgres::Error),
}

/// What was found good enough.
struct Found {
    repository: Repository,
    archive: Archive,
    manifest: Manifest,
    timeline: Timeline,
}

/// Fills a directory with a backup and all WAL that is archived behind it. Dropping the future ends it.
pub(crate) async fn fill(
    order: &Order,
    filling: &Filling,
    progress: &watch::Sender<Progress>,
) -> Result<Filled, MemberError> {
    let found = look(order, filling).await?;
    tracing::info!(
        backup = %found.manifest.id,
        bytes = found.manifest.bytes,
        repository = found.repository.store().place(),
        "restoring a base backup"
    );
    let work = async {
        let bytes = restore(&found, filling, progress).await?;
        // Behind the copy, which took its time: the less is left to be streamed, the better.
        let (segments, end) = bring(&found, filling, progress).await?;
        Ok(Filled { backup: found.manifest.id.to_string(), bytes, segments, end })
    };
    tokio::select! {
        done = work => done,
        () = stalled(progress.subscribe()) => Err(MemberError::Stalled(STALL)),
    }
}

async fn stalled(mut progress: watch::Receiver<Progress>) {
    let mut last = *progress.borrow_and_update();
    loop {
        // Said again without a change it is no progress.
        let more = async {
            loop {
                if progress.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                let now = *progress.borrow_and_update();
                if now != last {
                    last = now;
                    return;
                }
            }
        };
        if tokio::time::timeout(STALL, more).await.is_err() {
            return;
        }
    }
}

async fn in_time<T>(look: impl Future<Output = Result<T, MemberError>>) -> Result<T, MemberError> {
    tokio::time::timeout(LOOK, look).await.unwrap_or(Err(MemberError::Silent(LOOK)))
}

/// Chooses a backup, and refuses what could not come to a good end.
async fn look(order: &Order, filling: &Filling) -> Result<Found, MemberError> {
    let Order { record, .. } = order;
    let reign = record.reign.as_ref().ok_or(MemberError::NotAgreed)?;
    let system = record.system.ok_or(MemberError::NotAgreed)?;
    let known = record.archive.as_ref().and_then(|archive| archive.repository.clone());
    let known = known.ok_or(MemberError::NotAgreed)?;
    let timeline = reign.timeline;
    in_time(async {
        let opened = repository::open_at(&order.repository).await;
        let repository = opened.map_err(MemberError::Repository)?;
        if repository.format().repository != known {
            return Err(MemberError::AnotherRepository);
        }
        let catalog = Catalog::read(repository.clone(), Place(system)).await?;
        let archive = catalog.archive()?.ok_or(MemberError::NoBackup(timeline))?;
        let waits_until = Instant::now() + CATCH_UP;
        loop {
            match choose(order, &catalog, &archive, timeline).await {
                // Behind a failover, or the loss of its owner, the archive needs a moment.
                Err(MemberError::NoBackup(_) | MemberError::Hole { .. }) if Instant::now() < waits_until => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(error) => return Err(error),
                Ok((manifest, wal_bytes)) => {
                    room(filling, &manifest, wal_bytes)?;
                    return Ok(Found { repository, archive, manifest, timeline });
                }
            }
        }
    })
    .await
}

/// The newest backup that leads to the timeline with what is archived now, and how much WAL that is.
async fn choose(
    order: &Order,
    catalog: &Catalog,
    archive: &Archive,
    timeline: Timeline,
) -> Result<(Manifest, u64), MemberError> {
    let inventory = archive.inventory().await?;
    let history = inventory.history(timeline).ok_or(MemberError::NoBackup(timeline))?;
    // What is agreed of forks is said twice, and has to be the same.
    let leads = |manifest: &&Manifest| {
        let left = order.record.left(manifest.timeline, timeline);
        history.passes(manifest.timeline, manifest.stop) && left.is_none_or(|left| manifest.stop <= left)
    };
    // Consistent by what would be put beside it: until it has run, its end is read from that.
    let mut candidates = catalog.manifests().rev().filter(leads).map(|manifest| {
        let wal = whole(archive, &inventory, history, manifest.start);
        (manifest, wal.len() as u64, end(archive, &wal, manifest.start))
    });
    let found = candidates.find(|(manifest, _, end)| *end >= manifest.stop);
    let (manifest, files, end) = found.ok_or(MemberError::NoBackup(timeline))?;
    let wal_bytes = files * u64::from(archive.segments().bytes());
    if wal_bytes > manifest.bytes.max(MUCH_WAL_BYTES) {
        let backup = manifest.id.to_string();
        return Err(MemberError::MuchWal { backup, bytes: manifest.bytes, wal_bytes });
    }
    // A stream begins with the whole segment in which the copy ends.
    let segments = archive.segments();
    if segments.number(end) < segments.number(order.kept_from) {
        return Err(MemberError::Hole { end, kept_from: order.kept_from });
    }
    Ok((manifest.clone(), wal_bytes))
}

/// Files of WAL to put beside the backup, in order. A file of an older timeline whose end is on another way is left out, with all that
/// comes behind it.
fn whole(archive: &Archive, inventory: &Inventory, history: &History, from: Lsn) -> Vec<ArchivedFile> {
    let files = inventory.files(history, archive.segments().number(from));
    files.present.into_iter().take_while(|file| file.until.is_none()).collect()
}

fn end(archive: &Archive, wal: &[ArchivedFile], start: Lsn) -> Lsn {
    wal.last().map_or(start, |last| archive.segments().end(last.segment))
}

fn room(filling: &Filling, manifest: &Manifest, wal_bytes: u64) -> Result<(), MemberError> {
    let backup = manifest.id.to_string();
    let needs = match filling.wal_dir() {
        Some(wal_dir) if disk::device(wal_dir)? != disk::device(filling.data_dir())? => {
            vec![(filling.data_dir(), manifest.bytes), (wal_dir, wal_bytes)]
        }
        _ => vec![(filling.data_dir(), manifest.bytes + wal_bytes)],
    };
    for (place, needed) in needs {
        let free = disk::space(place)?.free_bytes;
        if needed > free {
            return Err(MemberError::NoSpace { backup, place: place.to_owned(), needed, free });
        }
    }
    Ok(())
}

async fn restore(
    found: &Found,
    filling: &Filling,
    progress: &watch::Sender<Progress>,
) -> Result<u64, MemberError> {
    let wish = Wish {
        data_dir: filling.data_dir().to_owned(),
        wal_dir: filling.wal_dir().map(ToOwned::to_owned),
        tablespaces: Default::default(),
        tablespaces_in: None,
        over: Over::Nothing,
        recovery: Recovery {
            restore_command: String::new(),
            end: End::Latest,
            timeline: FollowTimeline::Latest,
            action: Action::Promote,
            come: Come::Member,
        },
    };
    let plan = in_time(async { Ok(restore::plan(&found.repository, &found.manifest, wish).await?) }).await?;
    if !plan.target.tablespaces.is_empty() {
        return Err(MemberError::Tablespaces { backup: found.manifest.id.to_string() });
    }
    let readers = available_parallelism().map_or(1, usize::from).clamp(1, MAX_READERS);
    Ok(restore::restore(&found.repository, plan, readers, None, progress).await?.bytes)
}

/// How many segments, and where they end.
async fn bring(
    found: &Found,
    filling: &Filling,
    progress: &watch::Sender<Progress>,
) -> Result<(u64, Lsn), MemberError> {
    let Found { archive, manifest, timeline, .. } = found;
    let segments = archive.segments();
    let inventory = archive.inventory().await?;
    let history = inventory.history(*timeline).ok_or(MemberError::NoBackup(*timeline))?;
    let wal = whole(archive, &inventory, history, manifest.start);
    let line = history.forks().iter().map(|fork| fork.timeline).chain([*timeline]);
    for timeline in line.filter(|timeline| *timeline > Timeline(1)) {
        let (_, content) = archive.history_file(timeline).await?;
        filling.put_wal(format!("{:08X}.history", timeline.0), content).await?;
    }
    let wanted: Vec<Segment> = wal.iter().map(|file| file.segment).collect();
    let fetch = |segment| {
        let archive = archive.clone();
        async move { Ok::<_, ReadError>((segment, archive.segment(segment).await?)) }
    };
    let mut contents = futures_util::stream::iter(wanted.into_iter().map(fetch)).buffered(AT_ONCE);
    while let Some((segment, content)) = contents.try_next().await? {
        let bytes = content.len() as u64;
        filling.put_wal(segments.file_name(segment), content).await?;
        progress.send_modify(|progress| progress.done_bytes += bytes);
    }
    Ok((wal.len() as u64, end(archive, &wal, manifest.start)))
}
