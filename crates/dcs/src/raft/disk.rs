//! One redb file and the thread that writes it: the log, the vote, the commit point, the snapshot, the
//! identity.
//!
//! Everything is read once, at the start; afterwards memory answers reads (`log`, `state_machine`) and this
//! thread only writes, in the order asked. Jobs that have piled up share one fsync. A job is done when its
//! data is on the disk, or, where a loss would only cost time (the commit point, a purge), when it is
//! written.
//!
//! Hazard: an answer before the fsync. A vote or an entry that was promised and is forgotten breaks Raft.
//! After the first error nothing is written any more: redb refuses, and so does this file, because after a
//! failed fsync the kernel may report success for pages that it has dropped.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::{oneshot, watch};

use super::record::{self, Identity};

const FILE: &str = "raft.redb";
/// The reads of one start and the pages of one transaction; the default of a gigabyte would be absurd.
const CACHE_BYTES: usize = 4 * 1024 * 1024;
/// A file larger than this at the start is compacted; redb gives no space back by itself.
const COMPACT_ABOVE_BYTES: u64 = 32 * 1024 * 1024;
/// Jobs that share one fsync.
const MAX_BATCH: usize = 256;
/// A commit slower than this is worth a line: elections are timed in seconds.
const SLOW: Duration = Duration::from_secs(1);

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

pub(super) const IDENTITY: &str = "identity";
pub(super) const VOTE: &str = "vote";
pub(super) const COMMITTED: &str = "committed";
pub(super) const PURGED: &str = "purged";
pub(super) const SNAPSHOT: &str = "snapshot";

pub(super) enum Write {
    Put(&'static str, Vec<u8>),
    Append(Vec<(u64, Vec<u8>)>),
    /// Removes this entry and all after it.
    CutFrom(u64),
    /// Removes this entry and all before it.
    PurgeTo(u64),
}

type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

struct Job {
    writes: Vec<Write>,
    durable: bool,
    done: Done,
}

enum Message {
    Job(Job),
    Close(oneshot::Sender<()>),
}

/// What was on the disk at the start, not yet parsed.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) log: Vec<(u64, Vec<u8>)>,
    pub(super) vote: Option<Vec<u8>>,
    pub(super) committed: Option<Vec<u8>>,
    pub(super) purged: Option<Vec<u8>>,
    pub(super) snapshot: Option<Vec<u8>>,
}

#[derive(Clone)]
pub(super) struct Disk {
    path: PathBuf,
    jobs: mpsc::Sender<Message>,
    failed: watch::Receiver<Option<String>>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is in use by another process")]
    InUse { path: PathBuf },
    #[error("{path}: {why}")]
    Damaged { path: PathBuf, why: String },
}

/// The identity in `dir`, or `None` if no store was ever begun there.
pub(super) fn identity(dir: &Path) -> Result<Option<Identity>, DiskError> {
    let path = dir.join(FILE);
    match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DiskError::Io { path, source }),
        Ok(_) => {}
    }
    let database = database(&path, None)?;
    read_identity(&path, &database)
}

/// Makes the directory and writes `identity` into it, or over the one that is there.
pub(super) fn write_identity(dir: &Path, identity: &Identity) -> Result<(), DiskError> {
    let path = dir.join(FILE);
    let io_error = |source| DiskError::Io { path: path.clone(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error)?;
    let database = database(&path, None)?;
    let job = [Write::Put(IDENTITY, record::encode(identity))];
    write(&database, job.iter(), true).map_err(|error| damaged(&path, &error))?;
    // The file's name has to survive a power cut as well as its contents.
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    for dir in [Some(dir), parent].into_iter().flatten() {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error)?;
    }
    Ok(())
}

impl Disk {
    /// Reads everything and starts the thread. Blocks.
    pub(super) fn open(dir: &Path) -> Result<(Disk, Contents), DiskError> {
        Disk::open_with(dir, None)
    }

    fn open_with(dir: &Path, faults: Option<Faults>) -> Result<(Disk, Contents), DiskError> {
        let path = dir.join(FILE);
        let mut database = database(&path, faults)?;
        let bytes = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if bytes > COMPACT_ABOVE_BYTES {
            database.compact().map_err(|error| damaged(&path, &error))?;
        }
        let contents = read_contents(&database).map_err(|error| damaged(&path, &error))?;
        let (jobs, inbox) = mpsc::channel();
        let (failed, failed_view) = watch::channel(None);
        let place = path.clone();
        std::thread::Builder::new()
            .name("raft-disk".to_owned())
            .spawn(move || {
                let closing = run(&place, &database, &inbox, &failed);
                // The file is free before the caller of `close` goes on.
                drop(database);
                if let Some(closing) = closing {
                    // Whoever asked may have gone.
                    closing.send(()).ok();
                }
            })
            .map_err(|source| DiskError::Io { path: path.clone(), source })?;
        Ok((Disk { path, jobs, failed: failed_view }, contents))
    }

    #[cfg(test)]
    pub(super) fn open_failing(dir: &Path, faults: &Faults) -> Result<(Disk, Contents), DiskError> {
        Disk::open_with(dir, Some(faults.clone()))
    }

    /// The sentence of the first error; the disk is not used after it.
    pub(super) fn failed(&self) -> watch::Receiver<Option<String>> {
        self.failed.clone()
    }

    /// Queues `writes` as one atomic change; `done` runs on the disk's thread and must not block.
    pub(super) fn submit(
        &self,
        writes: Vec<Write>,
        durable: bool,
        done: impl FnOnce(io::Result<()>) + Send + 'static,
    ) {
        let job = Job { writes, durable, done: Box::new(done) };
        if let Err(mpsc::SendError(Message::Job(job))) = self.jobs.send(Message::Job(job)) {
            (job.done)(Err(self.closed()));
        }
    }

    /// Queues `writes` now; the future is done when they are.
    pub(super) fn write(
        &self,
        writes: Vec<Write>,
        durable: bool,
    ) -> impl Future<Output = io::Result<()>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        self.submit(writes, durable, move |result| {
            // Nobody waits any more when the caller was cancelled; the write happened all the same.
            drop(sender.send(result));
        });
        let closed = self.clone();
        async move { receiver.await.unwrap_or_else(|_| Err(closed.closed())) }
    }

    /// Finishes what is queued and closes the file. Later jobs fail.
    pub(super) async fn close(&self) {
        let (sender, receiver) = oneshot::channel();
        if self.jobs.send(Message::Close(sender)).is_ok() {
            // An error is a thread that has ended already.
            drop(receiver.await);
        }
    }

    fn closed(&self) -> io::Error {
        let why = self.failed.borrow().clone().unwrap_or_else(|| "it was closed".to_owned());
        io::Error::other(format!("{}: {why}", self.path.display()))
    }
}

fn run(
    path: &Path,
    database: &Database,
    inbox: &mpsc::Receiver<Message>,
    failed: &watch::Sender<Option<String>>,
) -> Option<oneshot::Sender<()>> {
    let mut closing = None;
    while closing.is_none() {
        let Ok(first) = inbox.recv() else { return None };
        let mut batch = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next.take() {
            match message {
                Message::Job(job) => batch.push(job),
                Message::Close(closed) => closing = Some(closed),
            }
            if batch.len() < MAX_BATCH && closing.is_none() {
                next = inbox.try_recv().ok();
            }
        }
        if batch.is_empty() {
            continue;
        }
        let earlier = failed.borrow().clone();
        let result = match earlier {
            Some(why) => Err(why),
            None => write_batch(path, database, &batch),
        };
        if let Err(why) = &result
            && failed.borrow().is_none()
        {
            failed.send_replace(Some(format!("the disk of the raft log failed: {}: {why}", path.display())));
        }
        for job in batch {
            (job.done)(result.clone().map_err(io::Error::other));
        }
    }
    closing
}

fn write_batch(path: &Path, database: &Database, batch: &[Job]) -> Result<(), String> {
    let started = Instant::now();
    let durable = batch.iter().any(|job| job.durable);
    let writes = batch.iter().flat_map(|job| &job.writes);
    // A damaged file can make redb panic; that must not take the process, and PostgreSQL's guard, with it.
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| write(database, writes, durable)));
    let took = started.elapsed();
    if took > SLOW {
        tracing::warn!(path = %path.display(), ms = took.as_millis(), "slow write to the raft log");
    }
    match result {
        Ok(written) => written.map_err(|error| error.to_string()),
        Err(_) => Err("the database is damaged: redb panicked".to_owned()),
    }
}

fn write<'a>(
    database: &Database,
    writes: impl Iterator<Item = &'a Write>,
    durable: bool,
) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(if durable { Durability::Immediate } else { Durability::None })?;
    {
        let mut meta = transaction.open_table(META)?;
        let mut log = transaction.open_table(LOG)?;
        for write in writes {
            match write {
                Write::Put(key, bytes) => {
                    meta.insert(*key, bytes.as_slice())?;
                }
                Write::Append(entries) => {
                    for (index, bytes) in entries {
                        log.insert(index, bytes.as_slice())?;
                    }
                }
                Write::CutFrom(index) => log.retain_in(*index.., |_, _| false)?,
                Write::PurgeTo(index) => log.retain_in(..=*index, |_, _| false)?,
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn read_contents(database: &Database) -> Result<Contents, redb::Error> {
    let transaction = database.begin_read()?;
    let meta = transaction.open_table(META)?;
    let get = |key: &str| Ok::<_, redb::Error>(meta.get(key)?.map(|bytes| bytes.value().to_vec()));
    let mut contents = Contents {
        log: Vec::new(),
        vote: get(VOTE)?,
        committed: get(COMMITTED)?,
        purged: get(PURGED)?,
        snapshot: get(SNAPSHOT)?,
    };
    for row in transaction.open_table(LOG)?.iter()? {
        let (index, bytes) = row?;
        contents.log.push((index.value(), bytes.value().to_vec()));
    }
    Ok(contents)
}

fn read_identity(path: &Path, database: &Database) -> Result<Option<Identity>, DiskError> {
    let read = || -> Result<_, redb::Error> {
        let transaction = database.begin_read()?;
        let meta = match transaction.open_table(META) {
            // The process died between making the file and writing into it.
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            table => table?,
        };
        Ok(meta.get(IDENTITY)?.map(|bytes| bytes.value().to_vec()))
    };
    let bytes = read().map_err(|error| damaged(path, &error))?;
    bytes
        .map(|bytes| record::decode("the identity", &bytes))
        .transpose()
        .map_err(|error| damaged(path, &error))
}

fn database(path: &Path, faults: Option<Faults>) -> Result<Database, DiskError> {
    let io_error = |source| DiskError::Io { path: path.to_owned(), source };
    // The state holds the herd's secrets, hence 0600.
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(io_error)?;
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let opened = match faults {
        None => builder.create_file(file),
        #[cfg(test)]
        Some(faults) => builder.create_with_backend(FailingFile::new(file, faults)?),
        #[cfg(not(test))]
        Some(never) => match never {},
    };
    opened.map_err(|error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => DiskError::InUse { path: path.to_owned() },
        redb::DatabaseError::Storage(redb::StorageError::Io(source)) => io_error(source),
        error => damaged(path, &error),
    })
}

fn damaged(path: &Path, error: &dyn std::fmt::Display) -> DiskError {
    DiskError::Damaged { path: path.to_owned(), why: error.to_string() }
}

#[cfg(not(test))]
#[derive(Clone)]
enum Faults {}

#[cfg(test)]
pub(super) use faults::{FailingFile, Faults};

#[cfg(test)]
mod faults {
    use std::fs::File;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use redb::StorageBackend;
    use redb::backends::FileBackend;

    /// When switched on, every write and fsync is an I/O error.
    #[derive(Clone, Debug, Default)]
    pub(in super::super) struct Faults(pub(in super::super) Arc<AtomicBool>);

    #[derive(Debug)]
    pub(in super::super) struct FailingFile {
        file: FileBackend,
        faults: Faults,
    }

    impl FailingFile {
        pub(super) fn new(file: File, faults: Faults) -> Result<FailingFile, super::DiskError> {
            let file = FileBackend::new(file).expect("a test's own file");
            Ok(FailingFile { file, faults })
        }

        fn check(&self) -> std::io::Result<()> {
            if self.faults.0.load(Ordering::SeqCst) {
                return Err(std::io::Error::from_raw_os_error(5));
            }
            Ok(())
        }
    }

    impl StorageBackend for FailingFile {
        fn len(&self) -> std::io::Result<u64> {
            self.file.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
            self.file.read(offset, out)
        }
        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.check()?;
            self.file.set_len(len)
        }
        fn sync_data(&self) -> std::io::Result<()> {
            self.check()?;
            self.file.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            self.check()?;
            self.file.write(offset, data)
        }
        fn close(&self) -> std::io::Result<()> {
            self.file.close()
        }
    }
}
