//! A backup is restored into a directory: the plan as data, then the deed.
//!
//! [`plan`] reads the backup's manifest, maps and configuration, and looks at the target; it refuses whatever the deed would
//! refuse, and touches nothing. [`restore`] does what a plan says, with several readers beside each other. Over what is there,
//! only groups of 32 KiB that differ are fetched. Interrupted at any moment it is done again, as a delta.
//!
//! Leaves out: which backup leads to a moment, and starting PostgreSQL. Hazard: a byte that is not the backup's. Every
//! frame is compared with its hash before it is written, and every file with the hash of the whole.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pgherd_backup::document::ReadError;
use pgherd_backup::format::Repository;
use pgherd_backup::hash::Hashing;
use pgherd_backup::manifest::Manifest;
use pgherd_backup::map::{Change, Entry, GROUP_BYTES, Kind, changes_of};
use pgherd_backup::pack::{PAGE_BYTES, PackReader, part_of};
use pgherd_core::types::Lsn;
use pgherd_postgres::control::Limits;
use pgherd_postgres::disk;
use pgherd_postgres::restoring::{
    self, Admitted, Configuration, End, Ending, Over, Recovery, Restored, Restoring, RestoringError,
    Standing, Tablespace, Target, Writing, adapt, look,
};
use tokio::sync::{mpsc, watch};

use super::storing::spans;
use super::{Done, MAX_READERS, PIECE_BYTES, Progress, QUEUE, REPORT, Stop, Throttle, on_a_thread};

/// Of a configuration file and of the control file; larger ones are no such files.
pub(super) const MAX_SMALL_BYTES: u64 = 1024 * 1024;
/// `server_version_num` of a major version's first release.
const MAJOR: u32 = 10_000;

/// What somebody wants restored, and where.
#[derive(Clone, Debug)]
pub struct Wish {
    pub data_dir: PathBuf,
    pub wal_dir: Option<PathBuf>,
    /// Tablespaces that are to lie elsewhere than they did.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// The directory of all others, by their numbers; none where they lie where they did.
    pub tablespaces_in: Option<PathBuf>,
    pub over: Over,
    pub recovery: Recovery,
}

/// What a restore will do, before it does anything.
#[derive(Clone, Debug)]
pub struct Plan {
    pub manifest: Manifest,
    pub target: Target,
    pub over: Over,
    pub standing: Standing,
    pub recovery: Recovery,
    pub files: u64,
    pub bytes: u64,
    pub volumes: Vec<Volume>,
    /// What will be changed in the configuration. Over a data directory, too, the backup's is restored first.
    pub configuration: Configuration,
}

/// A file system, and what comes onto it. WAL that recovery fetches is not counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub places: Vec<PathBuf>,
    pub needed_bytes: u64,
    pub free_bytes: u64,
}

impl Plan {
    /// Refuses what does not fit.
    pub fn check(&self) -> Result<(), RestoreError> {
        let Some(Volume { places, needed_bytes, free_bytes }) = self.shortage() else { return Ok(()) };
        let place = places.first().cloned().unwrap_or_default();
        Err(RestoreError::NoSpace { place, needed: *needed_bytes, free: *free_bytes })
    }

    /// The volume that is too small.
    pub fn shortage(&self) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.needed_bytes > volume.free_bytes)
    }
}

/// What a restore did.
#[derive(Clone, Debug)]
pub struct Report {
    pub restored: Restored,
    pub files: u64,
    pub bytes: u64,
    /// Written, because it was not there.
    pub fetched_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    #[error(transparent)]
    Target(#[from] RestoringError),
    #[error("the backup cannot be read")]
    Read(#[from] ReadError),
    #[error(transparent)]
    Driver(#[from] pgherd_postgres::Error),
    #[error("backup {backup} has no tablespace {oid}")]
    NoTablespace { backup: String, oid: u32 },
    #[error("recovery cannot end at {at}: the backup is not consistent before {stop}")]
    EndsInsideBackup { at: Lsn, stop: Lsn },
    #[error("{needed} bytes come to {}, and {free} are free", .place.display())]
    NoSpace { place: PathBuf, needed: u64, free: u64 },
    #[error("the backup has no control file")]
    NoControl,
    #[error("the restore was stopped")]
    Stopped,
    #[error("a reader ended early")]
    Reader(#[from] tokio::task::JoinError),
}

impl RestoreError {
    pub fn hint(&self) -> Option<String> {
        match self {
            RestoreError::Target(error) => error.hint().map(str::to_owned),
            RestoreError::Driver(error) => error.hint().map(str::to_owned),
            RestoreError::NoTablespace { .. } => {
                Some("a plan without it names the tablespaces that there are: --dry-run".to_owned())
            }
            RestoreError::EndsInsideBackup { .. } => {
                Some("choose an older backup, or a later target".to_owned())
            }
            RestoreError::NoSpace { .. } => {
                Some("free some space there, or choose another place; WAL needs some more of it".to_owned())
            }
            RestoreError::Stopped => Some("go on with --delta".to_owned()),
            _ => None,
        }
    }

    /// Whether the place does not do, and nothing is wrong.
    pub fn is_refusal(&self) -> bool {
        match self {
            RestoreError::Target(error) => !matches!(
                error,
                RestoringError::Listing(_) | RestoringError::Other(_) | RestoringError::Control { .. }
            ),
            RestoreError::NoTablespace { .. }
            | RestoreError::EndsInsideBackup { .. }
            | RestoreError::NoSpace { .. } => true,
            _ => false,
        }
    }
}

/// Finds out what a restore would do. Touches nothing.
pub async fn plan(repository: &Repository, manifest: &Manifest, wish: Wish) -> Result<Plan, RestoreError> {
    if let End::Lsn { at, .. } = wish.recovery.end
        && at < manifest.stop
    {
        return Err(RestoreError::EndsInsideBackup { at, stop: manifest.stop });
    }
    let (repository, manifest) = (repository.on_own_thread(), manifest.clone());
    on_a_thread(move || survey(repository, manifest, wish)).await?
}

async fn survey(repository: Repository, manifest: Manifest, wish: Wish) -> Result<Plan, RestoreError> {
    let Wish { data_dir, wal_dir, tablespaces: mut moved, tablespaces_in, over, recovery } = wish;
    let mut target = Target { data_dir, wal_dir, tablespaces: Vec::new() };
    // Links come before what is in them, so that each file finds its tablespace.
    let mut sizes: BTreeMap<PathBuf, u64> = BTreeMap::new();
    let mut contents = manifest.contents(&repository);
    let (mut names, mut files) = (Configuration::first(), BTreeMap::new());
    let mut later: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut entries = manifest.entries(&repository);
    while let Some(entry) = entries.next().await? {
        match &entry.kind {
            Kind::Directory => {}
            Kind::Symlink(to) => {
                if let Some(oid) = restoring::tablespace(&entry.path) {
                    let was = PathBuf::from(std::ffi::OsString::from_vec(to.clone()));
                    let apart = || tablespaces_in.as_ref().map(|dir| dir.join(oid.to_string()));
                    let place = moved.remove(&oid).or_else(apart).unwrap_or_else(|| was.clone());
                    target.tablespaces.push(Tablespace { oid, was, place });
                }
            }
            Kind::File => {
                let space = target.tablespace_of(&entry.path).map(|space| &space.place);
                let place = space.unwrap_or(&target.data_dir).clone();
                let grows = match over {
                    Over::Nothing => entry.size,
                    Over::Delta => entry.size.saturating_sub(target.present_bytes(&entry.path)),
                };
                *sizes.entry(place).or_default() += grows;
                // Every file that could be included by another one lies at the top.
                let name = std::str::from_utf8(&entry.path).ok().filter(|name| name.ends_with(".conf"));
                if let Some(name) = name.filter(|name| !name.contains('/'))
                    && entry.size <= MAX_SMALL_BYTES
                {
                    later.insert(name.to_owned(), whole(&mut contents, &entry).await?);
                }
            }
        }
    }
    if let Some(oid) = moved.into_keys().next() {
        return Err(RestoreError::NoTablespace { backup: manifest.id.to_string(), oid });
    }
    while let Some(name) = names.pop() {
        if let Some(text) = later.remove(&name) {
            names.extend(Configuration::included(&text));
            files.insert(name, text);
        }
    }
    let major = manifest.facts.postgresql_version / MAJOR;
    let standing = look(&target, over, manifest.system_identifier, major)?;
    Ok(Plan {
        configuration: adapt(&files, &recovery, limits(&manifest)),
        volumes: volumes(&sizes)?,
        files: manifest.files,
        bytes: manifest.bytes,
        manifest,
        target,
        over,
        standing,
        recovery,
    })
}

fn limits(manifest: &Manifest) -> Limits {
    let settings = manifest.facts.settings;
    Limits {
        max_connections: settings.max_connections,
        max_worker_processes: settings.max_worker_processes,
        max_wal_senders: settings.max_wal_senders,
        max_prepared_transactions: settings.max_prepared_transactions,
        max_locks_per_transaction: settings.max_locks_per_transaction,
    }
}

/// Places by the file systems that they are on, or will be.
pub(super) fn volumes(sizes: &BTreeMap<PathBuf, u64>) -> Result<Vec<Volume>, RestoreError> {
    let mut volumes: BTreeMap<u64, Volume> = BTreeMap::new();
    for (place, bytes) in sizes {
        let there = place.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
        let device = disk::device(there)?;
        let free_bytes = disk::space(there)?.free_bytes;
        let volume =
            volumes.entry(device).or_insert(Volume { places: Vec::new(), needed_bytes: 0, free_bytes });
        volume.places.push(place.clone());
        volume.needed_bytes += bytes;
    }
    Ok(volumes.into_values().collect())
}

/// The content of a small file.
async fn whole(contents: &mut PackReader, entry: &Entry) -> Result<Vec<u8>, RestoreError> {
    let mut content = Vec::new();
    let take = async |piece: &[u8]| {
        content.extend_from_slice(piece);
        Ok::<_, RestoreError>(())
    };
    contents.read_file(entry, take).await?;
    Ok(content)
}

/// What readers share.
#[derive(Debug)]
struct Shared {
    repository: Repository,
    manifest: Manifest,
    throttle: Throttle,
    stop: Stop,
    done: Done,
    fetched_bytes: AtomicU64,
}

/// Does what the plan says. Dropping the future ends it, within a piece of each reader.
pub async fn restore(
    repository: &Repository,
    plan: Plan,
    readers: usize,
    max_bytes_per_second: Option<NonZeroU64>,
    progress: &watch::Sender<Progress>,
) -> Result<Report, RestoreError> {
    plan.check()?;
    let shared = Arc::new(Shared {
        repository: repository.on_own_thread(),
        manifest: plan.manifest.clone(),
        throttle: Throttle::new(max_bytes_per_second),
        stop: Stop::default(),
        done: Done::default(),
        fetched_bytes: AtomicU64::new(0),
    });
    shared.done.total_bytes.store(plan.bytes, Ordering::Relaxed);
    let _ended = shared.stop.when_dropped();
    let mut work = {
        let (shared, readers) = (Arc::clone(&shared), readers.clamp(1, MAX_READERS));
        on_a_thread(move || write(shared, plan, readers))
    };
    let mut reports = tokio::time::interval(REPORT);
    let restored = loop {
        tokio::select! {
            done = &mut work => break done??,
            _ = reports.tick() => {
                progress.send_replace(shared.done.progress());
            }
        }
    };
    let Progress { done_bytes: bytes, done_files: files, .. } = shared.done.progress();
    progress.send_replace(shared.done.progress());
    Ok(Report { restored, files, bytes, fetched_bytes: shared.fetched_bytes.load(Ordering::Relaxed) })
}

/// A file for a reader.
type Job = (Entry, Writing);

async fn write(shared: Arc<Shared>, plan: Plan, readers: usize) -> Result<Restored, RestoreError> {
    let Plan { manifest, target, over, recovery, .. } = plan;
    let major = manifest.facts.postgresql_version / MAJOR;
    let note = format!("Backup {} of cluster {}.", manifest.id, manifest.system_identifier);
    let mut restoring = Restoring::begin(target, over, manifest.system_identifier, major, &note)?;
    let (jobs, waiting) = mpsc::channel::<Job>(QUEUE);
    let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
    let readers: Vec<_> = (0..readers)
        .map(|_| {
            let (shared, waiting) = (Arc::clone(&shared), Arc::clone(&waiting));
            on_a_thread(move || fill(shared, waiting))
        })
        .collect();
    drop(waiting);

    let mut entries = manifest.entries(&shared.repository);
    let mut control = None;
    while let Some(entry) = entries.next().await? {
        if shared.stop.is_wanted() {
            return Err(RestoreError::Stopped);
        }
        match &entry.kind {
            Kind::Directory => restoring.directory(&entry.path, entry.mode)?,
            Kind::Symlink(to) => restoring.symlink(&entry.path, to)?,
            Kind::File => match restoring.file(&entry.path, entry.mode, entry.size)? {
                Admitted::Control => {
                    control = Some(whole(&mut manifest.contents(&shared.repository), &entry).await?);
                }
                Admitted::Write(writing) => {
                    // All readers are gone, and one of them says why.
                    if jobs.send((entry, writing)).await.is_err() {
                        break;
                    }
                }
            },
        }
    }
    drop(jobs);
    for reader in readers {
        reader.await??;
    }
    let text = |text: &pgherd_backup::manifest::Text| text.bytes().unwrap_or_default();
    let ending = Ending {
        control: control.ok_or(RestoreError::NoControl)?,
        backup_label: text(&manifest.facts.backup_label),
        tablespace_map: text(&manifest.facts.tablespace_map),
        recovery,
        at_least: limits(&manifest),
    };
    Ok(restoring.finish(&ending)?)
}

/// One reader, until there are no more files. The first that fails stops the others.
async fn fill(
    shared: Arc<Shared>,
    waiting: Arc<tokio::sync::Mutex<mpsc::Receiver<Job>>>,
) -> Result<(), RestoreError> {
    let mut contents = shared.manifest.contents(&shared.repository);
    loop {
        let job = waiting.lock().await.recv().await;
        let Some((entry, writing)) = job else { return Ok(()) };
        if let Err(error) = shared.file(&mut contents, &entry, writing).await {
            waiting.lock().await.close();
            return Err(error);
        }
    }
}

impl Shared {
    async fn file(
        &self,
        contents: &mut PackReader,
        entry: &Entry,
        writing: Writing,
    ) -> Result<(), RestoreError> {
        let mut written = writing.open()?;
        // What is there may look the same to the short hashes of groups and not be: then all of it is written.
        if written.before() == 0 || !self.patch(contents, entry, &mut written).await? {
            let mut at = 0;
            let put = async |piece: &[u8]| {
                self.pass(piece.len()).await?;
                written.write(piece, at)?;
                at += piece.len() as u64;
                Ok::<_, RestoreError>(())
            };
            contents.read_file(entry, put).await?;
            self.fetched_bytes.fetch_add(entry.size, Ordering::Relaxed);
        }
        written.finish()?;
        self.done.bytes.fetch_add(entry.size, Ordering::Relaxed);
        self.done.files.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Fetches the groups that differ. Says whether the file is the backup's then.
    async fn patch(
        &self,
        contents: &mut PackReader,
        entry: &Entry,
        written: &mut restoring::Written,
    ) -> Result<bool, RestoreError> {
        let mut hash = Hashing::default();
        let (mut there, mut fetched) = (Vec::with_capacity(PIECE_BYTES), 0);
        let mut at = 0;
        while at < entry.size {
            let bytes = (entry.size - at).min(PIECE_BYTES as u64) as usize;
            written.read(&mut there, at, bytes)?;
            self.pass(bytes).await?;
            let found = changes_of(&self.repository, &there);
            let first = (at / GROUP_BYTES as u64) as usize;
            let wanted: &[Change] = entry.changes.get(first..).unwrap_or_default();
            let wanted = &wanted[..wanted.len().min(bytes.div_ceil(GROUP_BYTES))];
            for span in spans(wanted, &found) {
                let from = span.groups.start * GROUP_BYTES;
                let to = (span.groups.end * GROUP_BYTES).min(bytes);
                if span.same {
                    hash.update(&there[from..to]);
                    continue;
                }
                let mut place = at + from as u64;
                let mut left = to - from;
                for run in part_of(&entry.runs, place / PAGE_BYTES as u64, left.div_ceil(PAGE_BYTES) as u64) {
                    let part = left.min(run.pages as usize * PAGE_BYTES);
                    let content = contents.read(&run, part).await?;
                    hash.update(&content);
                    written.write(&content, place)?;
                    place += part as u64;
                    left -= part;
                    fetched += part as u64;
                }
            }
            at += bytes as u64;
        }
        self.fetched_bytes.fetch_add(fetched, Ordering::Relaxed);
        Ok(entry.hash.is_none_or(|wanted| wanted == hash.finish()))
    }

    async fn pass(&self, bytes: usize) -> Result<(), RestoreError> {
        if self.stop.is_wanted() {
            return Err(RestoreError::Stopped);
        }
        self.throttle.pass(bytes).await;
        Ok(())
    }
}
