//! A base backup is taken: from the intent to the manifest.
//!
//! ```text
//! intent              the repository keeps the parent and WAL from here on
//! pg_backup_start     beside it, WAL since the parent is read for the pages that it has changed
//!   listing ─► pairing with the parent's entries ─► readers ─► entries in order of paths ─► maps
//!   the control file, last
//! pg_backup_stop
//! WAL up to the stop is in the archive
//! manifest            from here on the backup exists
//! ```
//!
//! Memory is bounded: files go to readers in order of their paths, and so much work is under way at a time that the
//! entries which wait for a slower one before them fit into [`WINDOW_KIB`].
//!
//! Dropping the future ends it, as does a kill at any line. A backup that is begun again has another name, a start and an intent of its own, and reads everything
//! again. Where it reads all there is, it goes on from what was left: what is the same is not stored again. So maps are put every minute, and with them the way to what is in the
//! packs. What nobody goes on from a collection removes.
//!
//! Where files come as a stream there are a beginning and an end like these, and [`streamed`](super::streamed) between them.
//!
//! Leaves out: archiving WAL. Hazard: a manifest of what cannot be recovered. [`pgherd_backup::backup`] asks for the proofs.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgherd_backup::backup::{Backup, BeginError, Beginning, CommitError};
use pgherd_backup::document::{ReadError, WriteError};
use pgherd_backup::format::Repository;
use pgherd_backup::former::{self, Left};
use pgherd_backup::manifest::{Changes, Facts, FoundBy, Manifest, Settings, Text};
use pgherd_backup::map::sorting::SortError;
use pgherd_backup::map::{Ahead, DurableMaps, Entry};
use pgherd_backup::name::{BackupId, Place};
use pgherd_backup::pack::{DurablePacks, FULL_FRAME_PAGES, INCREMENTAL_FRAME_PAGES};
use pgherd_backup::wal::{Archive, ProvenWal, SegmentError, Segments, WalError};
use pgherd_core::throttle::Floor;
use pgherd_core::types::{Lsn, NodeName, SystemId, Term, Timeline};
use pgherd_postgres::base_backup::listing::{Content, Found, Kind, Listing};
use pgherd_postgres::base_backup::reading::Checksums;
use pgherd_postgres::base_backup::sent::SentError;
use pgherd_postgres::base_backup::streamed::StreamError;
use pgherd_postgres::base_backup::{
    self, BaseBackup, BaseBackupError, Checkpoint, Survey, checkpoint_now, switch_wal,
};
use pgherd_postgres::control::ControlFile;
use pgherd_postgres::sql::Session;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::finding::{self, Finding};
use super::storing::{Known, Shared, Stored, Storing, Unexplained};
use super::{Done, MAX_READERS, Progress, QUEUE, REPORT, Stop, Throttle, on_a_thread, throttling};

/// Entries that are under way at a time, in KiB: readers of some hundred files of a gigabyte, or of 60,000 small ones.
const WINDOW_KIB: u32 = 64 * 1024;
/// Bytes of a file that make an entry one KiB longer, where every third page was changed and everything is a run of its own.
const BYTES_FOR_A_KIB: u64 = 280_000;
/// A sign of life. Who collects gives a writer up after many of them.
const BEAT: Duration = Duration::from_secs(30);
/// A checkpoint that is spread takes as long as `checkpoint_timeout`, which is a day at most and minutes in general.
pub(super) const CHECKPOINT: Duration = Duration::from_secs(3600);
const STATEMENT: Duration = Duration::from_secs(60);
/// Between two looks whether WAL has come into the archive: at first so long, each time twice as long,
const FIRST_WAL_POLL: Duration = Duration::from_millis(10);
/// and so long at last.
const WAL_POLL: Duration = Duration::from_millis(320);
/// Between two requests for a new segment.
const SWITCH_AGAIN: Duration = Duration::from_secs(10);
/// Backups are named by the second in which they begin; who meets another one, or his parent, takes the next.
const NAMES_TRIED: usize = 3;
/// What an attempt loses that is interrupted, beside what readers have in their packs.
pub(super) const SETTLE_EVERY: Duration = Duration::from_secs(60);
/// Damaged files that a report names.
pub(super) const MAX_DAMAGED: usize = 1000;

/// How a backup is to be taken.
#[derive(Clone, Debug)]
pub struct Order {
    /// The backup that this one refers to for what has not changed.
    pub parent: Option<BackupId>,
    /// How it is found what that is.
    pub find: Find,
    /// Who takes it, and under which term.
    pub node: NodeName,
    pub term: Term,
    pub checkpoint: Checkpoint,
    pub readers: usize,
    pub max_bytes_per_second: Option<NonZeroU64>,
    /// How slowly it is read at most, where the server would become slow for its clients; none: it is not held back.
    pub throttle: Option<Floor>,
    /// An earlier attempt of the same node that has shown no sign of life for so long is gone on from.
    pub silence: Duration,
    /// After so long, what has been stored by then is found by a later attempt.
    pub settle_every: Duration,
    /// So much of what has not changed since the oldest backup is written anew.
    pub refresh_bytes: u64,
    /// How long WAL may take to come into the archive, behind the end of the copy.
    pub wal_deadline: Duration,
}

/// How it is found what has changed since the parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Find {
    /// By WAL, and by both from time to time.
    #[default]
    Automatic,
    /// By WAL, however much of it there is; by comparison where it does not say everything.
    Wal,
    Comparison,
    Both,
}

impl Order {
    /// What WAL names is read and stored anew in any case, and it is little: then nothing is gone on from.
    pub(super) fn compares_everything(&self) -> bool {
        self.parent.is_none() || self.find == Find::Comparison
    }

    async fn former(&self, repository: &Repository, place: Place) -> Result<Option<BackupId>, TakeError> {
        let wanted = former::Wanted {
            node: self.node.clone(),
            term: self.term,
            parent: self.parent,
            silence: self.silence,
        };
        let found = former::find(repository, place, &wanted, Timestamp::now()).await;
        Ok(found.map_err(BeginError::from)?)
    }
}

/// The server that is backed up.
#[derive(Debug)]
pub struct Source {
    pub data_dir: PathBuf,
    /// A superuser's, and for nothing else.
    pub session: Session,
    /// On the primary, where the source is a standby: nobody else can begin a new segment of WAL.
    pub primary: Option<Session>,
    /// Another one, over which it is seen whether the server answers slowly. Without one that is not seen.
    pub probe: Option<Session>,
}

/// A backup that exists.
#[derive(Clone, Debug)]
pub struct Taken {
    pub manifest: Manifest,
    /// What was read, what of it was the same as in the parent, and what of that was written anew.
    pub read_bytes: u64,
    pub kept_bytes: u64,
    pub refreshed_bytes: u64,
    /// Its own packs.
    pub stored_bytes: u64,
    /// Files that were dropped while it was taken.
    pub vanished: u64,
    /// Pages whose checksums are wrong, and have been in the backup as they are.
    pub damaged: Vec<Damaged>,
    /// Pages that differ from the parent's though no WAL has changed them. The backup has them as they are.
    pub unexplained: Vec<Damaged>,
}

/// Pages of a file that are not as PostgreSQL wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    pub path: String,
    pub pages: Vec<u32>,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakeError {
    #[error(transparent)]
    Postgres(#[from] BaseBackupError),
    #[error(transparent)]
    Driver(#[from] pgherd_postgres::Error),
    #[error(transparent)]
    Begin(#[from] BeginError),
    #[error("the backup cannot be written")]
    Write(#[from] WriteError),
    #[error("the parent cannot be read")]
    Parent(#[from] ReadError),
    #[error(transparent)]
    Segments(#[from] SegmentError),
    #[error("WAL up to {stop} has not come into the archive within {} s", .after.as_secs())]
    WalIsMissing {
        stop: Lsn,
        after: Duration,
        #[source]
        last: WalError,
    },
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error("the backup was stopped")]
    Stopped,
    #[error("a reader ended early")]
    Reader(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Sent(#[from] SentError),
    #[error(transparent)]
    Sort(#[from] SortError),
    #[error("the server has said nothing for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("what the server has sent is no backup: {what}")]
    Incomplete { what: &'static str },
}

impl TakeError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            TakeError::Postgres(error) => error.hint(),
            TakeError::Driver(error) => error.hint(),
            TakeError::Stream(error) => error.hint(),
            TakeError::WalIsMissing { .. } => Some(
                "there is no backup without its WAL: see whether archive_command = 'pgherd wal push --repository FILE %p' is set and \
                 works (pg_stat_archiver, the server's log), or whether the stream runs; then begin again",
            ),
            TakeError::Sent(SentError::Io(_)) | TakeError::Sort(SortError::Io { .. }) => {
                Some("--scratch-dir says where there is room for lists of files")
            }
            TakeError::Sent(_) | TakeError::Incomplete { .. } | TakeError::Silent(_) => {
                Some("see the server's log, and begin again")
            }
            _ => None,
        }
    }
}

/// What a backup is of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) system: SystemId,
    pub(super) timeline: Timeline,
    /// It does not begin before.
    pub(super) wal_from: Lsn,
}

/// Takes a backup. Dropping the future ends it, within a piece of each reader.
pub async fn take(
    repository: &Repository,
    source: Source,
    order: &Order,
    progress: &watch::Sender<Progress>,
) -> Result<Taken, TakeError> {
    let Source { data_dir, session, primary, probe } = source;
    let began = Timestamp::now();
    let mut survey = Survey::of(&session).await?;
    if survey.is_standby {
        // It notes in its control file which timeline it replays, by a checkpoint at the latest.
        checkpoint_now(&session, CHECKPOINT).await?;
        survey = Survey::of(&session).await?;
    }
    let control = read_control(&data_dir).await?.1;
    let segments = Segments::new(control.wal_segment_bytes)?;
    let archive = Archive::new(repository, survey.system_id, segments);
    let version = survey.version;

    let origin = Origin { system: survey.system_id, timeline: survey.timeline, wal_from: survey.redo };
    let former = match order.compares_everything() {
        true => order.former(repository, Place(survey.system_id)).await?,
        false => None,
    };
    let mut backup = begin(repository, &origin, order, former).await?;
    if let Some(former) = backup.former() {
        let (backup, former) = (backup.id(), former.id());
        tracing::info!(%backup, %former, "the backup goes on from what another attempt has left");
    }
    let label = format!("pgherd {}", backup.id());
    let server =
        finding::Server { data_dir: data_dir.clone(), control: control.clone(), timeline: survey.timeline };
    let found = match backup.parent() {
        Some(parent) => Some(Finding::begin(&archive, parent, server.clone(), order.find, &session).await),
        None => None,
    };
    let throttle = Arc::new(Throttle::new(order.max_bytes_per_second));
    let throttling =
        order.throttle.map(|floor| throttling::begin(floor, probe, data_dir.clone(), Arc::clone(&throttle)));
    let start = BaseBackup::begin(session, survey, &label, order.checkpoint, CHECKPOINT);
    let running = while_alive(&mut backup, start).await?;
    let found = match found {
        Some(finding) => Some(while_alive(&mut backup, finding.up_to(running.start())).await),
        None => None,
    };
    let known = found.as_ref().zip(backup.parent()).and_then(|(found, parent)| {
        Some(Known {
            changed: found.changed.lock().unwrap_or_else(PoisonError::into_inner).take()?,
            start: running.start(),
            only_check: found.by == FoundBy::Both,
            parent: parent.clone(),
            unexplained: Mutex::default(),
        })
    });
    let shared = Arc::new(Shared {
        repository: repository.clone(),
        data_dir: data_dir.clone(),
        checksums: Checksums::of(&control, running.start()),
        throttle: Arc::clone(&throttle),
        stop: Stop::default(),
        done: Done::default(),
        oldest: backup.parent().and_then(|parent| parent.packs.keys().next().copied()),
        refresh_bytes: AtomicU64::new(order.refresh_bytes),
        refreshed_bytes: AtomicU64::new(0),
        kept_bytes: AtomicU64::new(0),
        read_bytes: AtomicU64::new(0),
        known,
    });
    throttle.begin();
    let copied = copy(&mut backup, &running, &control, order, &shared, progress).await?;
    drop(throttling);
    let (start, timeline) = (running.start(), running.timeline());
    let finished = while_alive(&mut backup, running.finish(STATEMENT)).await?;
    let proving = prove(&archive, timeline, (start, finished.stop), order.wal_deadline, primary.as_ref());
    let wal = while_alive(&mut backup, proving).await?;

    let unexplained = match &shared.known {
        Some(known) => {
            let pages = known.unexplained.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let during = finding::without_later(pages, &archive, &server, start, finished.stop);
            while_alive(&mut backup, during).await
        }
        None => Vec::new(),
    };
    if let Some(found) = found {
        tell(&mut backup, found, &copied, &unexplained, &shared);
    }
    backup.tell_held_back(throttle.held_back());
    let ending = Ending {
        packs: copied.packs,
        maps: copied.maps,
        control: copied.control,
        vanished: copied.vanished,
        damaged: copied.damaged,
        unexplained: by_files(unexplained),
        version,
        began,
        backup_label: finished.backup_label,
        tablespace_map: finished.tablespace_map,
    };
    conclude(backup, wal, ending, &shared).await
}

/// How it was found what has changed, for the manifest.
fn tell(
    backup: &mut Backup,
    found: finding::Found,
    copied: &Copied,
    unexplained: &[Unexplained],
    shared: &Shared,
) {
    let before = backup.parent().and_then(|parent| parent.changes.as_ref());
    let unchecked = finding::unchecked(found.by, before, !copied.damaged.is_empty());
    backup.tell_changes(Changes {
        found_by: found.by,
        why: found.why,
        read_bytes: shared.read_bytes.load(Ordering::Relaxed),
        wal_bytes: found.wal_bytes,
        unchecked,
        unexplained: unexplained.len() as u64,
    });
}

/// Pages in order of their files, as far as a report names them.
fn by_files(mut pages: Vec<Unexplained>) -> Vec<Damaged> {
    pages.sort_unstable_by(|one, next| (&one.path, one.page).cmp(&(&next.path, next.page)));
    let mut files: Vec<Damaged> = Vec::new();
    for Unexplained { path, page, .. } in pages {
        let path = String::from_utf8_lossy(&path).into_owned();
        let are_many = files.len() >= MAX_DAMAGED;
        match files.last_mut() {
            Some(last) if last.path == path => last.pages.push(page),
            _ if are_many => break,
            _ => files.push(Damaged { path, pages: vec![page] }),
        }
    }
    files
}

/// What a manifest says beside its WAL.
pub(super) struct Ending {
    pub(super) packs: Vec<DurablePacks>,
    pub(super) maps: DurableMaps,
    /// As it is in the backup.
    pub(super) control: ControlFile,
    pub(super) vanished: u64,
    pub(super) damaged: Vec<Damaged>,
    pub(super) unexplained: Vec<Damaged>,
    /// As in `server_version_num`.
    pub(super) version: u32,
    pub(super) began: Timestamp,
    pub(super) backup_label: Vec<u8>,
    pub(super) tablespace_map: Vec<u8>,
}

/// Commits.
pub(super) async fn conclude(
    backup: Backup,
    wal: ProvenWal,
    ending: Ending,
    shared: &Shared,
) -> Result<Taken, TakeError> {
    let limits = ending.control.limits;
    let facts = Facts {
        postgresql_version: ending.version,
        page_bytes: ending.control.page_bytes,
        data_checksums: ending.control.data_checksums,
        settings: Settings {
            max_connections: limits.max_connections,
            max_worker_processes: limits.max_worker_processes,
            max_wal_senders: limits.max_wal_senders,
            max_prepared_transactions: limits.max_prepared_transactions,
            max_locks_per_transaction: limits.max_locks_per_transaction,
        },
        started: ending.began,
        stopped: Timestamp::now(),
        backup_label: Text::new(&ending.backup_label),
        tablespace_map: Text::new(&ending.tablespace_map),
    };
    let manifest = backup.commit(ending.packs, ending.maps, wal, facts).await?;
    let own = manifest.packs.get(&manifest.id).into_iter().flatten();
    Ok(Taken {
        stored_bytes: own.map(|pack| pack.bytes).sum(),
        manifest,
        read_bytes: shared.read_bytes.load(Ordering::Relaxed),
        kept_bytes: shared.kept_bytes.load(Ordering::Relaxed),
        refreshed_bytes: shared.refreshed_bytes.load(Ordering::Relaxed),
        vanished: ending.vanished,
        damaged: ending.damaged,
        unexplained: ending.unexplained,
    })
}

pub(super) async fn begin(
    repository: &Repository,
    origin: &Origin,
    order: &Order,
    former: Option<BackupId>,
) -> Result<Backup, TakeError> {
    let mut tried = 0;
    loop {
        tried += 1;
        let now = Timestamp::now();
        // One that builds upon a backup has a later name; a clock that is far behind is refused.
        if order.parent.max(former).is_some_and(|before| before >= BackupId::at(now)) && tried < NAMES_TRIED {
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        let beginning = Beginning {
            system_identifier: origin.system,
            parent: order.parent,
            continues: former,
            timeline: origin.timeline,
            wal_from: origin.wal_from,
            node: order.node.clone(),
            term: order.term,
            now,
        };
        match Backup::begin(repository, beginning).await {
            Err(BeginError::Taken { .. }) if tried < NAMES_TRIED => {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            other => return Ok(other?),
        }
    }
}

/// Does something while the repository is told that somebody lives. A sign that is not written is made up for by the next.
pub(super) async fn while_alive<T>(backup: &mut Backup, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut beats = beats();
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = beats.tick() => beat(backup).await,
        }
    }
}

pub(super) fn beats() -> tokio::time::Interval {
    let mut beats = tokio::time::interval_at(tokio::time::Instant::now() + BEAT, BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beats
}

pub(super) async fn beat(backup: &mut Backup) {
    if let Err(error) = backup.beat(Timestamp::now()).await {
        let backup = backup.id();
        tracing::warn!(%backup, %error, "a sign of life of a backup was not written");
    }
}

async fn read_control(data_dir: &Path) -> Result<(Vec<u8>, ControlFile), TakeError> {
    let data_dir = data_dir.to_owned();
    Ok(tokio::task::spawn_blocking(move || base_backup::control(&data_dir)).await??)
}

/// What was copied.
struct Copied {
    packs: Vec<DurablePacks>,
    maps: DurableMaps,
    /// As it is in the backup.
    control: ControlFile,
    vanished: u64,
    damaged: Vec<Damaged>,
}

/// A file for a reader.
struct Job {
    number: u64,
    found: Found,
    parent: Option<Entry>,
    permit: OwnedSemaphorePermit,
}

/// What came of a path.
enum Came {
    Entry(Entry),
    Stored(Stored),
    Gone,
    /// It is read last.
    Control(Found),
}

struct Outcome {
    number: u64,
    came: Came,
    /// Given back when the entry is in the map.
    permit: OwnedSemaphorePermit,
}

type Results = mpsc::UnboundedSender<Result<Outcome, TakeError>>;

async fn copy(
    backup: &mut Backup,
    running: &BaseBackup,
    control: &ControlFile,
    order: &Order,
    shared: &Arc<Shared>,
    progress: &watch::Sender<Progress>,
) -> Result<Copied, TakeError> {
    // Whatever way this ends, readers end with it.
    let _ended = shared.stop.when_dropped();
    count(shared, control)?;
    let (jobs, waiting) = mpsc::channel(QUEUE);
    let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
    // Its length is bounded by the window.
    let (results, mut came) = mpsc::unbounded_channel();
    let parent = backup.parent().map(|parent| parent.entries(&shared.repository.on_own_thread()));
    let parent = parent.map(Ahead::of);
    let former = backup.former().map(|former| former.left(&shared.repository.on_own_thread()));
    let pairing = Pairing { parent, former, jobs, results: results.clone(), stop: shared.stop.clone() };
    let listing = Listing::begin(&shared.data_dir, control)?;
    let _pairing = on_a_thread(move || pairing.run(listing));
    let frame_pages = if order.parent.is_some() { INCREMENTAL_FRAME_PAGES } else { FULL_FRAME_PAGES };
    let readers: Vec<_> = (0..order.readers.clamp(1, MAX_READERS))
        .map(|_| {
            let storing = Storing::new(backup.packs(frame_pages), Arc::clone(shared));
            let (waiting, results, stop) = (Arc::clone(&waiting), results.clone(), shared.stop.clone());
            on_a_thread(move || read(storing, waiting, results, stop))
        })
        .collect();
    drop((results, waiting));

    let mut maps = backup.maps();
    let (mut vanished, mut damaged) = (0, Vec::new());
    let mut early: BTreeMap<u64, Outcome> = BTreeMap::new();
    let (mut next, mut room) = (0, None);
    let (mut beats, mut reports) = (beats(), tokio::time::interval(REPORT));
    let mut settled = Instant::now();
    loop {
        if settled.elapsed() >= order.settle_every {
            settled = Instant::now();
            maps.settle().await?;
        }
        let result = tokio::select! {
            result = came.recv() => result,
            _ = beats.tick() => {
                running.still().await?;
                beat(backup).await;
                continue;
            }
            _ = reports.tick() => {
                progress.send_replace(shared.progress());
                continue;
            }
        };
        let Some(result) = result else { break };
        let result = result?;
        early.insert(result.number, result);
        while let Some(Outcome { came, permit, .. }) = early.remove(&next) {
            next += 1;
            match came {
                Came::Entry(entry) => maps.push(&entry).await?,
                Came::Stored(Stored { entry, damaged: pages }) => {
                    if !pages.is_empty() && damaged.len() < MAX_DAMAGED {
                        let path = String::from_utf8_lossy(&entry.path).into_owned();
                        tracing::warn!(path, pages = ?pages, "pages of the server are damaged");
                        damaged.push(Damaged { path, pages });
                    }
                    maps.push(&entry).await?;
                }
                Came::Gone => vanished += 1,
                Came::Control(found) => room = Some((maps.leave_room(&found.path).await?, found)),
            }
            drop(permit);
        }
    }
    let mut packs = Vec::new();
    for reader in readers {
        packs.extend(reader.await??);
    }
    let Some((room, found)) = room else { return Err(TakeError::Stopped) };
    let (bytes, control) = read_control(&shared.data_dir).await?;
    running.judge(&control)?;
    let mut last = backup.packs(frame_pages);
    let mut file = last.file();
    file.write(&bytes).await?;
    let placed = file.finish().await?;
    maps.fill(room, &Entry::file(found.path, found.mode, placed)).await?;
    packs.push(last.finish().await?);
    progress.send_replace(shared.progress());
    Ok(Copied { packs, maps: maps.finish().await?, control, vanished, damaged })
}

/// Counts what there is, beside everything else.
fn count(shared: &Arc<Shared>, control: &ControlFile) -> Result<(), TakeError> {
    let listing = Listing::begin(&shared.data_dir, control)?;
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || {
        // What cannot be listed is told of by the listing that counts.
        let sizes =
            listing.take_while(|_| !shared.stop.is_wanted()).map_while(Result::ok).map(|found| found.size);
        let total: u64 = sizes.sum();
        shared.done.total_bytes.store(total, Ordering::Relaxed);
        shared.throttle.total_bytes.store(total, Ordering::Relaxed);
    });
    Ok(())
}

/// Gives each file the entry of the same path that it is compared with, and a number in the order of paths.
struct Pairing {
    parent: Option<Ahead>,
    /// What it has is newer.
    former: Option<Left>,
    jobs: mpsc::Sender<Job>,
    results: Results,
    stop: Stop,
}

impl Pairing {
    async fn run(mut self, listing: Listing) {
        // Nobody listens any more when this fails.
        if let Err(error) = self.pair(listing).await {
            self.results.send(Err(error)).ok();
        }
    }

    async fn pair(&mut self, listing: Listing) -> Result<(), TakeError> {
        let window = Arc::new(Semaphore::new(WINDOW_KIB as usize));
        for (number, found) in (0..).zip(listing) {
            let found = found?;
            let weight = (1 + found.size / BYTES_FOR_A_KIB).min(u64::from(WINDOW_KIB)) as u32;
            let permit =
                Arc::clone(&window).acquire_many_owned(weight).await.map_err(|_| TakeError::Stopped)?;
            if self.stop.is_wanted() {
                return Err(TakeError::Stopped);
            }
            let came = match &found.kind {
                Kind::Directory => Came::Entry(Entry::directory(found.path, found.mode)),
                Kind::Symlink(to) => Came::Entry(Entry::symlink(found.path, to.clone())),
                Kind::File(Content::Control) => Came::Control(found),
                Kind::File(_) => {
                    let parent = self.parent_of(&found.path).await?;
                    let job = Job { number, found, parent, permit };
                    self.jobs.send(job).await.map_err(|_| TakeError::Stopped)?;
                    continue;
                }
            };
            self.results.send(Ok(Outcome { number, came, permit })).map_err(|_| TakeError::Stopped)?;
        }
        Ok(())
    }

    async fn parent_of(&mut self, path: &[u8]) -> Result<Option<Entry>, TakeError> {
        let former = match &mut self.former {
            Some(former) => former.file(path).await,
            None => None,
        };
        let parent = match &mut self.parent {
            Some(parent) => parent.file(path).await?,
            None => None,
        };
        Ok(former.or(parent))
    }
}

/// One reader, until there are no more files.
async fn read(
    mut storing: Storing,
    waiting: Arc<tokio::sync::Mutex<mpsc::Receiver<Job>>>,
    results: Results,
    stop: Stop,
) -> Result<Option<DurablePacks>, TakeError> {
    loop {
        let job = waiting.lock().await.recv().await;
        if stop.is_wanted() {
            return Ok(None);
        }
        let Some(Job { number, found, parent, permit }) = job else { break };
        let result = match storing.store(found, parent.as_ref()).await {
            Ok(Some(stored)) => Ok(Outcome { number, came: Came::Stored(stored), permit }),
            Ok(None) => Ok(Outcome { number, came: Came::Gone, permit }),
            Err(error) => Err(error),
        };
        let failed = result.is_err();
        if results.send(result).is_err() || failed {
            return Ok(None);
        }
    }
    match storing.into_packs().finish().await {
        Ok(packs) => Ok(Some(packs)),
        Err(error) => Err(error.into()),
    }
}

/// Waits until all WAL of the backup is in the archive. An archive that cannot be reached now may be later.
pub(super) async fn prove(
    archive: &Archive,
    timeline: Timeline,
    (start, stop): (Lsn, Lsn),
    deadline: Duration,
    primary: Option<&Session>,
) -> Result<ProvenWal, TakeError> {
    let began = Instant::now();
    let mut switched: Option<Instant> = None;
    // What was there once is not asked for again until all is.
    let mut from = start;
    let mut poll = FIRST_WAL_POLL;
    loop {
        let last = match archive.prove(timeline, from, stop).await {
            Ok(proof) if from == start => return Ok(proof),
            Ok(_) => {
                from = start;
                continue;
            }
            Err(WalError::Missing { segment, from: at, place }) => {
                from = at;
                WalError::Missing { segment, from: at, place }
            }
            Err(error) => error,
        };
        if began.elapsed() >= deadline {
            return Err(TakeError::WalIsMissing { stop, after: deadline, last });
        }
        // An idle primary would not complete the last segment for hours.
        if let Some(primary) = primary
            && switched.is_none_or(|at| at.elapsed() >= SWITCH_AGAIN)
        {
            switched = Some(Instant::now());
            if let Err(error) = switch_wal(primary, STATEMENT).await {
                tracing::warn!(%error, "the primary does not begin a new segment for a backup");
            }
        }
        tokio::time::sleep(poll).await;
        poll = WAL_POLL.min(poll * 2);
    }
}
