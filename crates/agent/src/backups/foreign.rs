//! A backup that another program took, pgBackRest or Barman, is restored into a directory: the plan, then the deed.
//!
//! As [`super::recover`] with [`super::restore`] does with our own: the same targets, the same refusals before anything is touched, the same
//! directory that starts only when it is whole. What is started in it fetches its WAL by `pgherd wal fetch` from the other program's archive, and
//! archives nothing.
//!
//! Leaves out: writing into such a place. Hazard: what a format does not say cannot be verified; the plan says what was.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pgherd_api::backup::{RestorePlan, Restored};
use pgherd_backup::document::ReadError;
use pgherd_backup::foreign::archive::Archive;
use pgherd_backup::foreign::{Backup, Contents, File, Foreign, ForeignError, Kind};
use pgherd_backup::name::BackupId;
use pgherd_backup::recovery::{self, Refusal, Sources};
use pgherd_backup::wal::{BackupRange, SegmentError, Segments};
use pgherd_core::types::SystemId;
use pgherd_postgres::conf::CONF;
use pgherd_postgres::control::{ControlFile, Limits};
use pgherd_postgres::restoring::{
    self, Action, Admitted, CONTROL, Come, Configuration, Ending, FollowTimeline, Over, Recovery, Restoring,
    RestoringError, Standing, Tablespace, VERSION, Writing, adapt, look,
};
use tokio::sync::{mpsc, watch};

use super::recover::{self, About, AtTarget, Order, RecoverError, absolute, end, plan_along, quoted};
use super::restore::{MAX_SMALL_BYTES, RestoreError, Volume, volumes};
use super::{Done, MAX_READERS, PIECE_BYTES, Progress, QUEUE, REPORT, Stop, Throttle, on_a_thread};

pub use pgherd_backup::foreign::Source;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignRestoreError {
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// In the words of whose backup it is.
    #[error("{what}")]
    Refused { what: String, refusal: Box<Refusal> },
    #[error("the archive cannot be read")]
    Read(#[from] ReadError),
    #[error("there is no backup {name} in {place}")]
    NoBackup { name: String, place: PathBuf, there: Vec<String> },
    #[error("there is no backup in {place} that was completed")]
    None { place: PathBuf },
    #[error("{place} has no backup of cluster {system}")]
    NoCluster { place: PathBuf, system: String, there: Vec<String> },
    #[error("backup {backup} has no control file of its cluster: {what}")]
    Control { backup: String, what: String },
    #[error(transparent)]
    Segments(#[from] SegmentError),
    #[error("a reader ended early")]
    Reader(#[from] tokio::task::JoinError),
}

impl From<RestoreError> for ForeignRestoreError {
    fn from(error: RestoreError) -> ForeignRestoreError {
        RecoverError::from(error).into()
    }
}

impl From<RestoringError> for ForeignRestoreError {
    fn from(error: RestoringError) -> ForeignRestoreError {
        RestoreError::from(error).into()
    }
}

impl From<pgherd_postgres::Error> for ForeignRestoreError {
    fn from(error: pgherd_postgres::Error) -> ForeignRestoreError {
        RestoreError::from(error).into()
    }
}

impl ForeignRestoreError {
    pub fn hint(&self) -> Option<String> {
        match self {
            ForeignRestoreError::Foreign(error) => error.hint(),
            ForeignRestoreError::Recover(error) => error.hint(),
            ForeignRestoreError::Refused { refusal, .. } => of_refusal(refusal).map(str::to_owned),
            ForeignRestoreError::NoBackup { there, .. } if !there.is_empty() => {
                Some(format!("there are: {}", there.join(", ")))
            }
            ForeignRestoreError::NoCluster { there, .. } if !there.is_empty() => {
                Some(format!("it has: {}", there.join(", ")))
            }
            _ => None,
        }
    }

    /// Whether nothing is in the way but that root asks.
    pub fn is_root(&self) -> bool {
        matches!(self, ForeignRestoreError::Recover(RecoverError::Root))
    }

    /// Whether somebody asked for what there is not, and nothing is wrong.
    pub fn is_refusal(&self) -> bool {
        match self {
            ForeignRestoreError::Foreign(error) => error.is_refusal(),
            ForeignRestoreError::Recover(error) => error.is_refusal(),
            ForeignRestoreError::Refused { refusal, .. } => {
                !matches!(**refusal, Refusal::Wal(_) | Refusal::Read(_))
            }
            ForeignRestoreError::NoBackup { .. }
            | ForeignRestoreError::None { .. }
            | ForeignRestoreError::NoCluster { .. } => true,
            _ => false,
        }
    }
}

/// As for a repository of ours, but for what names its commands.
fn of_refusal(refusal: &Refusal) -> Option<&'static str> {
    match refusal {
        Refusal::NoTimeline { .. } | Refusal::NoBackupOnLine { .. } => {
            Some("--target-timeline names another one, --target-timeline current that of the backup")
        }
        Refusal::Hole { .. } => Some("choose a moment before the hole"),
        Refusal::NoBackup | Refusal::NoSuchBackup { .. } => None,
        other => recover::of_refusal(other),
    }
}

/// A restore that nothing speaks against.
#[derive(Debug)]
pub struct Prepared {
    place: String,
    contents: Contents,
    control: Vec<u8>,
    /// As the control file has them.
    system: SystemId,
    major: u32,
    at_least: Limits,
    range: BackupRange,
    recovery: recovery::Plan,
    target: restoring::Target,
    over: Over,
    standing: Standing,
    settings: Recovery,
    volumes: Vec<Volume>,
    configuration: Configuration,
}

/// Finds out what a restore would do, and where it would end. Touches nothing. The repository of the order is not looked at.
pub async fn prepare(source: &Source, order: &Order) -> Result<Prepared, ForeignRestoreError> {
    let (source, order) = (in_full(source)?, order.clone());
    on_a_thread(move || survey(source, order)).await?
}

/// With absolute paths: PostgreSQL calls for WAL from its data directory.
fn in_full(source: &Source) -> Result<Source, RecoverError> {
    Ok(match source {
        Source::PgBackRest { repository, stanza } => {
            Source::PgBackRest { repository: absolute(repository)?, stanza: stanza.clone() }
        }
        Source::Barman { home, server } => Source::Barman { home: absolute(home)?, server: server.clone() },
    })
}

async fn survey(source: Source, order: Order) -> Result<Prepared, ForeignRestoreError> {
    let wanted = order.until.target(!order.exclusive).map_err(RecoverError::from)?;
    let foreign = Foreign::open(&source)?;
    let system = cluster(&foreign, order.system.as_deref())?;
    let (ranges, only) = choose(&foreign, system, order.backup.as_deref())?;
    let mut known = None;
    let segments = segments(&foreign, &ranges, &mut known)?;
    let source = foreign.named();
    let archive = Archive::open(&source, system, segments)?;
    let inventory = archive.inventory()?;
    let all = Sources { archive: &archive, inventory: &inventory, backups: &ranges };
    let planned = plan_along(&all, &wanted, order.along, only).await;
    let recovery = planned.map_err(|refusal| refused(&foreign, refusal))?;
    let range = recovery.backup;
    let contents = match known.filter(|contents: &Contents| contents.backup.range == Some(range)) {
        Some(contents) => contents,
        None => foreign
            .contents(of_id(&foreign, range.id).ok_or(Refusal::NoBackup).map_err(RecoverError::from)?)?,
    };
    let (control, parsed) = control(&contents)?;
    let (target, sizes, files) = places(&contents, &order)?;
    let over = if order.delta { Over::Delta } else { Over::Nothing };
    let settings = Recovery {
        restore_command: restore_command(&order.program, &source)?,
        end: end(&recovery.target),
        timeline: FollowTimeline::Number(recovery.timeline),
        action: match order.at_target {
            AtTarget::Pause => Action::Pause,
            AtTarget::Promote => Action::Promote,
            AtTarget::Shutdown => Action::Shutdown,
        },
        come: Come::Primary,
    };
    let major = major(&contents)?;
    let standing = look(&target, over, system, major)?;
    Ok(Prepared {
        place: format!("{} of {}", foreign.place.display(), source.program()),
        control,
        system,
        major,
        at_least: parsed.limits,
        range,
        recovery,
        standing,
        volumes: volumes(&sizes)?,
        configuration: adapt(&files, &settings, parsed.limits),
        target,
        over,
        settings,
        contents,
    })
}

/// The cluster that is meant: that whose backups are taken now, where none is named.
fn cluster(foreign: &Foreign, named: Option<&str>) -> Result<SystemId, ForeignRestoreError> {
    let mut there: Vec<SystemId> = foreign.backups.iter().map(|backup| backup.system).collect();
    there.sort();
    there.dedup();
    let Some(named) = named else {
        return foreign.system().ok_or_else(|| ForeignRestoreError::None { place: foreign.place.clone() });
    };
    let system = named.parse::<SystemId>().ok().filter(|system| there.contains(system));
    system.ok_or_else(|| ForeignRestoreError::NoCluster {
        place: foreign.place.clone(),
        system: named.to_owned(),
        there: there.iter().map(ToString::to_string).collect(),
    })
}

/// The backups that come into question, and the one that was named.
fn choose(
    foreign: &Foreign,
    system: SystemId,
    named: Option<&str>,
) -> Result<(Vec<BackupRange>, Option<BackupId>), ForeignRestoreError> {
    let of_system: Vec<&Backup> = foreign.backups.iter().filter(|backup| backup.system == system).collect();
    let usable: Vec<&Backup> = of_system.iter().filter(|backup| backup.range.is_some()).copied().collect();
    let named = match named {
        None => None,
        Some(name) => {
            let found = match name {
                "first" => usable.first().copied(),
                "last" => usable.last().copied(),
                name => foreign.backups.iter().find(|backup| backup.name == name),
            };
            Some(found.ok_or_else(|| ForeignRestoreError::NoBackup {
                name: name.to_owned(),
                place: foreign.place.clone(),
                there: usable.iter().map(|backup| backup.name.clone()).collect(),
            })?)
        }
    };
    if let Some(problem) = named.and_then(Backup::problem) {
        return Err(problem.into());
    }
    if let Some(other) = named.filter(|backup| backup.system != system) {
        return Err(ForeignRestoreError::NoCluster {
            place: foreign.place.clone(),
            system: format!("{system}, and {} is one of cluster {}", other.name, other.system),
            there: vec![format!("--cluster-system {}", other.system)],
        });
    }
    if usable.is_empty() {
        // The newest one tells more than that there is none.
        return Err(match of_system.last().and_then(|backup| backup.problem()) {
            Some(problem) => problem.into(),
            None => ForeignRestoreError::None { place: foreign.place.clone() },
        });
    }
    let ranges = usable.iter().filter_map(|backup| backup.range).collect();
    Ok((ranges, named.and_then(|backup| backup.range).map(|range| range.id)))
}

fn of_id(foreign: &Foreign, id: BackupId) -> Option<&Backup> {
    foreign.backups.iter().find(|backup| backup.range.is_some_and(|range| range.id == id))
}

/// How large the segments of WAL are, from the newest control file that can be read; `known` becomes the backup that has it.
fn segments(
    foreign: &Foreign,
    ranges: &[BackupRange],
    known: &mut Option<Contents>,
) -> Result<Segments, ForeignRestoreError> {
    let mut first = None;
    for range in ranges.iter().rev() {
        let Some(backup) = of_id(foreign, range.id) else { continue };
        let read = foreign.contents(backup).map_err(ForeignRestoreError::from).and_then(|contents| {
            let (_, control) = control(&contents)?;
            Ok((Segments::new(control.wal_segment_bytes)?, contents))
        });
        match read {
            Ok((segments, contents)) => {
                *known = Some(contents);
                return Ok(segments);
            }
            Err(error) => {
                first.get_or_insert(error);
            }
        }
    }
    Err(first.unwrap_or_else(|| ForeignRestoreError::None { place: foreign.place.clone() }))
}

/// The backup's control file, which is one of its cluster.
fn control(contents: &Contents) -> Result<(Vec<u8>, ControlFile), ForeignRestoreError> {
    let backup = &contents.backup;
    let wrong = |what: String| ForeignRestoreError::Control { backup: backup.name.clone(), what };
    let control = contents.read_small(CONTROL)?.ok_or_else(|| wrong("there is none".to_owned()))?;
    let parsed = ControlFile::parse(&control).map_err(wrong)?;
    match parsed.system_id == backup.system {
        true => Ok((control, parsed)),
        false => Err(wrong(format!("it is of {}, and the backup of {}", parsed.system_id, backup.system))),
    }
}

/// The first number of `PG_VERSION`, by which directories in tablespaces are called.
fn major(contents: &Contents) -> Result<u32, ForeignRestoreError> {
    let content = contents.read_small(VERSION)?.unwrap_or_default();
    let major = String::from_utf8_lossy(&content).trim().parse().ok();
    major.ok_or_else(|| ForeignRestoreError::Control {
        backup: contents.backup.name.clone(),
        what: "PG_VERSION has no version".to_owned(),
    })
}

type Sizes = BTreeMap<PathBuf, u64>;
type Files = BTreeMap<String, Vec<u8>>;

/// Where everything goes, how much comes to each place, and the configuration as it is in the backup.
fn places(
    contents: &Contents,
    order: &Order,
) -> Result<(restoring::Target, Sizes, Files), ForeignRestoreError> {
    let mut target = restoring::Target {
        data_dir: absolute(&order.to)?,
        wal_dir: order.wal_dir.as_deref().map(absolute).transpose()?,
        tablespaces: Vec::new(),
    };
    let mut moved = order.tablespaces.clone();
    for (path, item) in &contents.items {
        if let (Kind::Link(was), Some(oid)) = (&item.kind, restoring::tablespace(path)) {
            let place = moved.remove(&oid).map(|place| absolute(&place)).transpose()?;
            let place = place.unwrap_or_else(|| was.clone());
            target.tablespaces.push(Tablespace { oid, was: was.clone(), place });
        }
    }
    if let Some(oid) = moved.into_keys().next() {
        return Err(RestoreError::NoTablespace { backup: contents.backup.name.clone(), oid }.into());
    }
    let (mut sizes, mut later) = (Sizes::new(), Files::new());
    for (path, item) in &contents.items {
        let Kind::File(file) = &item.kind else { continue };
        let place = target.tablespace_of(path).map_or(&target.data_dir, |space| &space.place).clone();
        let grows =
            if order.delta { file.size.saturating_sub(target.present_bytes(path)) } else { file.size };
        *sizes.entry(place).or_default() += grows;
        let name =
            std::str::from_utf8(path).ok().filter(|name| name.ends_with(".conf") && !name.contains('/'));
        if let Some(name) = name.filter(|_| file.size <= MAX_SMALL_BYTES) {
            later.extend(contents.read_small(path)?.map(|content| (name.to_owned(), content)));
        }
    }
    let (mut names, mut files) = (Configuration::first(), Files::new());
    while let Some(name) = names.pop() {
        if let Some(text) = later.remove(&name) {
            names.extend(Configuration::included(&text));
            files.insert(name, text);
        }
    }
    Ok((target, sizes, files))
}

/// A refusal calls backups by names of ours; their own program calls them otherwise.
fn refused(foreign: &Foreign, refusal: Refusal) -> ForeignRestoreError {
    let mut what = refusal.to_string();
    for backup in &foreign.backups {
        if let Some(range) = backup.range {
            what = what.replace(&format!("backup {}", range.id), &format!("backup {}", backup.name));
        }
    }
    match refusal {
        // They have causes of their own.
        Refusal::Read(error) => error.into(),
        refusal => ForeignRestoreError::Refused { what, refusal: Box::new(refusal) },
    }
}

/// A shell runs it, after PostgreSQL has put in `%f` and `%p`.
fn restore_command(program: &Path, source: &Source) -> Result<String, RecoverError> {
    let name = |name: &Option<String>| quoted(Path::new(name.as_deref().unwrap_or_default()));
    let from = match source {
        Source::PgBackRest { repository, stanza } => {
            format!("--from-pgbackrest {} --stanza {}", quoted(repository)?, name(stanza)?)
        }
        Source::Barman { home, server } => {
            format!("--from-barman {} --server {}", quoted(home)?, name(server)?)
        }
    };
    Ok(format!("{} wal fetch {from} %f %p", quoted(program)?))
}

impl Prepared {
    /// Whether files of a server are written over, and what does not belong is deleted.
    pub fn overwrites(&self) -> bool {
        self.standing == Standing::DataDirectory
    }

    /// Refuses what would fail for sure.
    pub fn check(&self) -> Result<(), ForeignRestoreError> {
        if rustix::process::geteuid().is_root() {
            return Err(RecoverError::Root.into());
        }
        let short = self.volumes.iter().find(|volume| volume.needed_bytes > volume.free_bytes);
        let Some(Volume { places, needed_bytes, free_bytes }) = short else { return Ok(()) };
        let place = places.first().cloned().unwrap_or_default();
        Err(RestoreError::NoSpace { place, needed: *needed_bytes, free: *free_bytes }.into())
    }

    /// As it is told.
    pub fn report(&self) -> RestorePlan {
        let mut remarks = self.contents.remarks.clone();
        if !self.contents.items.contains_key(CONF.as_bytes()) {
            remarks.push(
                "there is no postgresql.conf in the backup: the server had it elsewhere, and PostgreSQL does not start without one"
                    .to_owned(),
            );
        }
        let about = About {
            repository: self.place.clone(),
            system: self.system,
            version: self.contents.backup.version.clone(),
            backup: self.contents.backup.name.clone(),
            timeline: self.range.timeline,
            stop: self.range.stop,
            stopped: self.range.stopped,
            target: &self.target,
            standing: self.standing,
            files: self.contents.files,
            bytes: self.contents.bytes,
            volumes: &self.volumes,
            recovery: &self.settings,
            configuration: &self.configuration,
            dropped: None,
            remarks,
        };
        about.told(&self.recovery)
    }

    /// Does it. Dropping the future ends it; the directory does not start then, and a delta goes on with it.
    pub async fn run(
        self,
        readers: usize,
        max_bytes_per_second: Option<NonZeroU64>,
        progress: &watch::Sender<Progress>,
    ) -> Result<Restored, ForeignRestoreError> {
        self.check()?;
        let began = Instant::now();
        let shared = Arc::new(Shared {
            prepared: self,
            throttle: Throttle::new(max_bytes_per_second),
            stop: Stop::default(),
            done: Done::default(),
            fetched_bytes: AtomicU64::new(0),
        });
        shared.done.total_bytes.store(shared.prepared.contents.bytes, Ordering::Relaxed);
        let _ended = shared.stop.when_dropped();
        let mut work = {
            let (shared, readers) = (Arc::clone(&shared), readers.clamp(1, MAX_READERS));
            on_a_thread(move || write(shared, readers))
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
        Ok(Restored {
            files,
            bytes,
            fetched_bytes: shared.fetched_bytes.load(Ordering::Relaxed),
            deleted: restored.deleted,
            seconds: began.elapsed().as_secs_f64(),
        })
    }
}

/// What readers share.
#[derive(Debug)]
struct Shared {
    prepared: Prepared,
    throttle: Throttle,
    stop: Stop,
    done: Done,
    fetched_bytes: AtomicU64,
}

/// A file for a reader.
type Job = (Vec<u8>, File, Writing);

async fn write(shared: Arc<Shared>, readers: usize) -> Result<restoring::Restored, ForeignRestoreError> {
    let prepared = &shared.prepared;
    let contents = &prepared.contents;
    let note =
        format!("Backup {} of cluster {}, from {}.", contents.backup.name, prepared.system, prepared.place);
    let (target, over) = (prepared.target.clone(), prepared.over);
    let mut restoring = Restoring::begin(target, over, prepared.system, prepared.major, &note)?;
    let (jobs, waiting) = mpsc::channel::<Job>(QUEUE);
    let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
    let readers: Vec<_> = (0..readers)
        .map(|_| {
            let (shared, waiting) = (Arc::clone(&shared), Arc::clone(&waiting));
            on_a_thread(move || fill(shared, waiting))
        })
        .collect();
    drop(waiting);
    for (path, item) in &contents.items {
        if shared.stop.is_wanted() {
            return Err(RestoreError::Stopped.into());
        }
        match &item.kind {
            Kind::Directory => restoring.directory(path, item.mode)?,
            Kind::Link(to) => restoring.symlink(path, to.as_os_str().as_encoded_bytes())?,
            Kind::File(file) => match restoring.file(path, item.mode, file.size)? {
                // The one of the plan.
                Admitted::Control => {}
                Admitted::Write(writing) => {
                    // All readers are gone, and one of them says why.
                    if jobs.send((path.clone(), file.clone(), writing)).await.is_err() {
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
    let ending = Ending {
        control: prepared.control.clone(),
        backup_label: contents.backup_label.clone(),
        tablespace_map: contents.tablespace_map.clone(),
        recovery: prepared.settings.clone(),
        at_least: prepared.at_least,
    };
    Ok(restoring.finish(&ending)?)
}

/// One reader, until there are no more files. The first that fails stops the others.
async fn fill(
    shared: Arc<Shared>,
    waiting: Arc<tokio::sync::Mutex<mpsc::Receiver<Job>>>,
) -> Result<(), ForeignRestoreError> {
    loop {
        let job = waiting.lock().await.recv().await;
        let Some((path, file, writing)) = job else { return Ok(()) };
        if let Err(error) = shared.file(&path, &file, writing).await {
            waiting.lock().await.close();
            return Err(error);
        }
    }
}

impl Shared {
    async fn file(&self, path: &[u8], file: &File, writing: Writing) -> Result<(), ForeignRestoreError> {
        let mut written = writing.open()?;
        if !self.is_there(file, &written).await? {
            let mut reading = self.prepared.contents.open(path, file)?;
            let (mut piece, mut there, mut at) = (vec![0; PIECE_BYTES], Vec::new(), 0);
            loop {
                let read = reading.read(&mut piece)?;
                if read == 0 {
                    break;
                }
                self.pass(read).await?;
                written.read(&mut there, at, read)?;
                if there != piece[..read] {
                    written.write(&piece[..read], at)?;
                    self.fetched_bytes.fetch_add(read as u64, Ordering::Relaxed);
                }
                at += read as u64;
            }
        }
        written.finish()?;
        self.done.bytes.fetch_add(file.size, Ordering::Relaxed);
        self.done.files.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Whether what is there is the backup's by its checksum.
    async fn is_there(&self, file: &File, written: &restoring::Written) -> Result<bool, ForeignRestoreError> {
        let Some(check) = file.check.as_ref().filter(|_| written.before() == file.size) else {
            return Ok(false);
        };
        let (mut checking, mut there, mut at) = (check.begin(), Vec::new(), 0);
        while at < file.size {
            let bytes = (file.size - at).min(PIECE_BYTES as u64) as usize;
            written.read(&mut there, at, bytes)?;
            self.pass(bytes).await?;
            checking.update(&there);
            at += bytes as u64;
        }
        Ok(checking.finish() == *check)
    }

    async fn pass(&self, bytes: usize) -> Result<(), ForeignRestoreError> {
        if self.stop.is_wanted() {
            return Err(RestoreError::Stopped.into());
        }
        self.throttle.pass(bytes).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_names_what_it_fetches_from() {
        let program = Path::new("/opt/pgherd");
        let source =
            Source::PgBackRest { repository: "/var/it's".into(), stanza: Some("main 100%".to_owned()) };
        let expected =
            r"'/opt/pgherd' wal fetch --from-pgbackrest '/var/it'\''s' --stanza 'main 100%%' %f %p";
        assert_eq!(restore_command(program, &source).ok().as_deref(), Some(expected));
        let source = Source::Barman { home: "/var/lib/barman".into(), server: Some("main".to_owned()) };
        let expected = "'/opt/pgherd' wal fetch --from-barman '/var/lib/barman' --server 'main' %f %p";
        assert_eq!(restore_command(program, &source).ok().as_deref(), Some(expected));
    }
}
