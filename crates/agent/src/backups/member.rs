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
use pgherd_backup::voter::VoterError;
use pgherd_backup::wal::{Archive, ArchivedFile, Fetched, History, Inventory, Segment};
use pgherd_core::record::{Moment, Record};
use pgherd_core::spec::RepositorySpec;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::clone::{CloneError, Filling};
use pgherd_postgres::disk;
use pgherd_postgres::restoring::{Action, Come, End, FollowTimeline, Over, Recovery};
use pgherd_postgres::wal::{history, history_name};
use tokio::sync::watch;
use tokio::time::Instant;

use super::catalog::{Catalog, CatalogError, Which};
use super::restore::{self, RestoreError, Wish};
use super::{MAX_READERS, Progress};
use crate::repository::{self, RepositoryError};

/// For one look at the repository. A primary is there, too, and does not keep one waiting.
const LOOK: Duration = Duration::from_secs(30);
/// For so long the archive may catch up with what the source keeps.
const CATCH_UP: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Without a byte of progress for so long, the repository is given up.
pub(super) const STALL: Duration = Duration::from_secs(60);
/// Segments that are fetched at the same time.
pub(super) const AT_ONCE: usize = 4;
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
pub struct Filled {
    pub backup: String,
    pub bytes: u64,
    pub segments: u64,
    /// Behind this everything is streamed.
    pub end: Lsn,
}

/// Why the repository is not what this member is made from. Another way is open always.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
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
    #[error("its WAL up to {end} is not whole: {file} is missing in it")]
    Missing { end: Lsn, file: String },
    #[error("the way to {end} on timeline {timeline} is not one that the cluster has gone")]
    NotOurs { end: Lsn, timeline: Timeline },
    #[error("what was made of it ends at {end} on timeline {timeline}, and not where it was to")]
    EndsElsewhere { end: Lsn, timeline: Timeline },
    #[error("its {file} differs from what this copy has of it")]
    Differs { file: String },
    #[error("{0}")]
    Repository(RepositoryError),
    #[error(transparent)]
    Voter(#[from] VoterError),
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
pub(super) struct Found {
    pub(super) repository: Repository,
    pub(super) archive: Archive,
    pub(super) manifest: Manifest,
    pub(super) timeline: Timeline,
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

/// Fills a directory with a backup and the WAL behind it up to a moment, and not a record more: what the last segment has behind it is
/// zeros, as PostgreSQL leaves them where a timeline begins.
pub(crate) async fn fill_up_to(
    repository: &RepositorySpec,
    record: &Record,
    moment: &Moment,
    filling: &Filling,
    progress: &watch::Sender<Progress>,
) -> Result<Filled, MemberError> {
    let (found, archived) = in_time(async {
        let (repository, catalog) = open(repository, record).await?;
        let archive = catalog.archive()?.ok_or(MemberError::NoBackup(moment.timeline))?;
        let manifest = catalog.manifest(moment.backup.parse::<Which>()?)?.clone();
        let inventory = archive.inventory().await?;
        let archived = files_up_to(&archive, &inventory, record, &manifest, moment)?;
        room(filling, &manifest, archived.len() as u64 * u64::from(archive.segments().bytes()))?;
        Ok((Found { repository, archive, manifest, timeline: moment.timeline }, archived))
    })
    .await?;
    let work = async {
        let bytes = restore(&found, filling, progress).await?;
        put_histories(&found, filling).await?;
        let segments = archived.len() as u64;
        let wal_bytes = segments * u64::from(found.archive.segments().bytes());
        progress.send_modify(|progress| progress.total_bytes += wal_bytes);
        for candidates in archived {
            let (name, content) = fetch_up_to(&found.archive, &candidates, moment).await?;
            let bytes = content.len() as u64;
            filling.put_wal(name, content).await?;
            progress.send_modify(|progress| progress.done_bytes += bytes);
        }
        Ok(Filled { backup: found.manifest.id.to_string(), bytes, segments, end: moment.end })
    };
    tokio::select! {
        done = work => done,
        () = stalled(progress.subscribe()) => Err(MemberError::Stalled(STALL)),
    }
}

/// For each segment from the start of the backup to the moment those that may have it, the best first.
fn files_up_to(
    archive: &Archive,
    inventory: &Inventory,
    record: &Record,
    manifest: &Manifest,
    moment: &Moment,
) -> Result<Vec<Vec<Segment>>, MemberError> {
    let (segments, end) = (archive.segments(), moment.end);
    let line = |timeline| inventory.history(timeline).ok_or(MemberError::NoBackup(timeline));
    let (history, along) = (line(moment.timeline)?, line(moment.along)?);
    let last_byte = Lsn(end.0.saturating_sub(1));
    // What is agreed of timelines is said twice, and has to be the same.
    let agreed = record.line(moment.timeline).is_some()
        && record.left(manifest.timeline, moment.timeline).is_some_and(|left| manifest.stop <= left);
    let leads = history.passes(manifest.timeline, manifest.stop)
        && along.timeline_at(last_byte) == moment.timeline
        && manifest.stop <= end;
    if !agreed || !leads {
        return Err(MemberError::NotOurs { end, timeline: moment.timeline });
    }
    let (first, last) = (segments.number(manifest.start), segments.number(last_byte));
    let present = inventory.files(along, first).present;
    // Before a fork in it a segment of a later timeline is that of the one before it, and may be all that there is.
    let later = along.forks().iter().map(|fork| fork.timeline).chain([along.timeline()]);
    let mut at_the_end: Vec<Timeline> = later.filter(|timeline| *timeline >= moment.timeline).collect();
    at_the_end.reverse();
    (first..=last)
        .map(|number| {
            if number == last {
                let candidates = at_the_end.iter().map(|timeline| Segment { timeline: *timeline, number });
                return Ok(candidates.collect());
            }
            let file = present.iter().find(|file| file.segment.number == number && file.until.is_none());
            file.map(|file| vec![file.segment]).ok_or_else(|| {
                let wanted = Segment {
                    timeline: along
                        .timeline_at(segments.start(Segment { timeline: moment.timeline, number })),
                    number,
                };
                MemberError::Missing { end, file: segments.file_name(wanted) }
            })
        })
        .collect()
}

/// The first of these that has everything up to the moment, under the name that it has there.
async fn fetch_up_to(
    archive: &Archive,
    candidates: &[Segment],
    moment: &Moment,
) -> Result<(String, Vec<u8>), MemberError> {
    let segments = archive.segments();
    for segment in candidates {
        let ends_in_it = segments.end(*segment) >= moment.end;
        let fetched = match archive.fetch(*segment).await {
            Err(absent) if absent.is_absent() => continue,
            fetched => fetched?,
        };
        let mut content = match fetched {
            Fetched::Whole(content) => content.to_vec(),
            Fetched::Beginning { content, end } if ends_in_it && end >= moment.end => content.to_vec(),
            Fetched::Beginning { .. } => continue,
        };
        let mut name = *segment;
        if ends_in_it {
            name.timeline = moment.timeline;
            let kept =
                usize::try_from(moment.end.bytes_since(segments.start(*segment))).unwrap_or(usize::MAX);
            if let Some(behind) = content.get_mut(kept..) {
                behind.fill(0);
            }
        }
        return Ok((segments.file_name(name), content));
    }
    let file = candidates.last().map(|segment| segments.file_name(*segment)).unwrap_or_default();
    Err(MemberError::Missing { end: moment.end, file })
}

pub(super) async fn stalled(mut progress: watch::Receiver<Progress>) {
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

pub(super) async fn in_time<T>(look: impl Future<Output = Result<T, MemberError>>) -> Result<T, MemberError> {
    tokio::time::timeout(LOOK, look).await.unwrap_or(Err(MemberError::Silent(LOOK)))
}

/// Chooses a backup, and refuses what could not come to a good end.
async fn look(order: &Order, filling: &Filling) -> Result<Found, MemberError> {
    let reign = order.record.reign.as_ref().ok_or(MemberError::NotAgreed)?;
    let timeline = reign.timeline;
    in_time(async {
        let (repository, catalog) = open(&order.repository, &order.record).await?;
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

/// The repository that was agreed on, and what is in it now.
pub(super) async fn open(
    repository: &RepositorySpec,
    record: &Record,
) -> Result<(Repository, Catalog), MemberError> {
    let system = record.system.ok_or(MemberError::NotAgreed)?;
    let repository = agreed(repository, record).await?;
    let catalog = Catalog::read(repository.clone(), Place(system)).await?;
    Ok((repository, catalog))
}

pub(super) async fn agreed(repository: &RepositorySpec, record: &Record) -> Result<Repository, MemberError> {
    let known = record.archive.as_ref().and_then(|archive| archive.repository.clone());
    let known = known.ok_or(MemberError::NotAgreed)?;
    let repository = repository::open_at(repository).await.map_err(MemberError::Repository)?;
    if repository.format().repository != known {
        return Err(MemberError::AnotherRepository);
    }
    Ok(repository)
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

pub(super) fn room(filling: &Filling, manifest: &Manifest, wal_bytes: u64) -> Result<(), MemberError> {
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

pub(super) async fn restore(
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
    // While one of a pair waits for the disk, the other one unpacks.
    let readers = (2 * available_parallelism().map_or(1, usize::from)).clamp(1, MAX_READERS);
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
    put_histories(found, filling).await?;
    let inventory = archive.inventory().await?;
    let history = inventory.history(*timeline).ok_or(MemberError::NoBackup(*timeline))?;
    let wal = whole(archive, &inventory, history, manifest.start);
    let wanted: Vec<Segment> = wal.iter().map(|file| file.segment).collect();
    let wal_bytes = wal.len() as u64 * u64::from(segments.bytes());
    progress.send_modify(|progress| progress.total_bytes += wal_bytes);
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

/// Of the line that is followed, and of no other: PostgreSQL follows the latest that it finds. It looks for that without gaps, so that
/// numbers between have placeholders, as where they were promoted past.
async fn put_histories(found: &Found, filling: &Filling) -> Result<(), MemberError> {
    let Found { archive, timeline, .. } = found;
    let history = match *timeline {
        Timeline(1) => return Ok(()),
        timeline => archive.history(timeline).await?,
    };
    let on_the_way: Vec<Timeline> =
        history.forks().iter().map(|fork| fork.timeline).chain([*timeline]).collect();
    for number in 2..=timeline.0 {
        let content = match on_the_way.contains(&Timeline(number)) {
            true => archive.history_file(Timeline(number)).await?.1,
            false => history::placeholder(Timeline(number)).into(),
        };
        filling.put_wal(history_name(Timeline(number)), content).await?;
    }
    Ok(())
}
