//! Everything of a backup is read back: each map, each frame of each file with its hash, each file with the hash of the whole, and WAL.
//!
//! What is damaged is told by file and object, and the rest is read all the same. Or only what is stored is compared ([`Depth::Stored`]).
//! Leaves out: repair. Hazard: something that is called sound and is not; so it goes through the same code as a restore.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pgherd_api::backup::{Damage, Verification, VerifiedBackup, VerifiedWal, WalGap};
use pgherd_backup::document::ReadError;
use pgherd_backup::format::Repository;
use pgherd_backup::manifest::Manifest;
use pgherd_backup::map::{Entry, Kind};
use pgherd_backup::pack::PackId;
use pgherd_backup::wal::{Segment, window};
use tokio::sync::{mpsc, watch};

use super::catalog::{Catalog, CatalogError, Which};
use super::{Done, MAX_READERS, Progress, QUEUE, REPORT, Stop, on_a_thread};

/// Of one backup, damages that are told.
const MAX_TOLD: usize = 1000;

/// How far it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// To the content of each file.
    Content,
    /// Each object as it is stored, against the hash that it was stored with. What went wrong before that, in memory or in the compressor, is not
    /// seen; nothing is decompressed.
    Stored,
}

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("the archive cannot be listed")]
    Read(#[from] ReadError),
    #[error("a reader ended early")]
    Reader(#[from] tokio::task::JoinError),
}

/// Reads one backup with its own WAL, or all of them with all WAL since the oldest. Dropping the future ends it.
pub async fn verify(
    catalog: &Catalog,
    which: Option<Which>,
    depth: Depth,
    readers: usize,
    progress: &watch::Sender<Progress>,
) -> Result<Verification, VerifyError> {
    let manifests: Vec<&Manifest> = match which {
        Some(which) => vec![catalog.manifest(which)?],
        None => catalog.manifests().collect(),
    };
    let shared = Arc::new(Shared {
        repository: catalog.repository.on_own_thread(),
        stop: Stop::default(),
        done: Done::default(),
    });
    let _ended = shared.stop.when_dropped();
    let bytes = |manifest: &&Manifest| match depth {
        Depth::Content => manifest.bytes,
        Depth::Stored => manifest.all_packs().map(|(_, pack)| pack.bytes).sum(),
    };
    shared.done.total_bytes.store(manifests.iter().map(bytes).sum(), Ordering::Relaxed);
    let mut reports = tokio::time::interval(REPORT);
    let mut backups = Vec::new();
    for manifest in &manifests {
        let work = {
            let (shared, manifest) = (Arc::clone(&shared), (*manifest).clone());
            let readers = readers.clamp(1, MAX_READERS);
            on_a_thread(move || async move {
                match depth {
                    Depth::Content => contents(shared, manifest, readers).await,
                    Depth::Stored => stored(shared, manifest, readers).await,
                }
            })
        };
        let mut work = std::pin::pin!(work);
        backups.push(loop {
            tokio::select! {
                done = &mut work => break done??,
                _ = reports.tick() => { progress.send_replace(shared.done.progress()); }
            }
        });
    }
    progress.send_replace(shared.done.progress());
    let wal = wal(catalog, which.is_some(), depth, &manifests).await?;
    Ok(Verification { backups, wal })
}

struct Shared {
    repository: Repository,
    stop: Stop,
    done: Done,
}

async fn contents(
    shared: Arc<Shared>,
    manifest: Manifest,
    readers: usize,
) -> Result<VerifiedBackup, VerifyError> {
    let (jobs, waiting) = mpsc::channel::<Entry>(QUEUE);
    let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
    let manifest = Arc::new(manifest);
    let readers: Vec<_> = (0..readers)
        .map(|_| {
            let (shared, manifest, waiting) =
                (Arc::clone(&shared), Arc::clone(&manifest), Arc::clone(&waiting));
            on_a_thread(move || read(shared, manifest, waiting))
        })
        .collect();
    drop(waiting);
    let mut damaged = Vec::new();
    let mut entries = manifest.entries(&shared.repository);
    loop {
        match entries.next().await {
            Ok(Some(entry)) if entry.kind == Kind::File => {
                if shared.stop.is_wanted() || jobs.send(entry).await.is_err() {
                    break;
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            // What is behind it in the list is not known.
            Err(error) => {
                damaged.push(Damage { file: None, what: told(&error) });
                break;
            }
        }
    }
    drop(jobs);
    let (mut files, mut bytes) = (0, 0);
    for reader in readers {
        let read = reader.await?;
        files += read.files;
        bytes += read.bytes;
        damaged.extend(read.damaged);
    }
    damaged.sort_by(|one, other| one.file.cmp(&other.file));
    damaged.truncate(MAX_TOLD);
    Ok(VerifiedBackup { id: manifest.id.to_string(), files, bytes, damaged })
}

/// Packs first, each once; then the files that have something in those that are damaged.
async fn stored(
    shared: Arc<Shared>,
    manifest: Manifest,
    readers: usize,
) -> Result<VerifiedBackup, VerifyError> {
    let packs: Vec<PackId> = manifest.all_packs().map(|(id, _)| id).collect();
    let manifest = Arc::new(manifest);
    let next = Arc::new(AtomicUsize::new(0));
    let packs = Arc::new(packs);
    let readers: Vec<_> = (0..readers)
        .map(|_| {
            let (shared, manifest) = (Arc::clone(&shared), Arc::clone(&manifest));
            let (packs, next) = (Arc::clone(&packs), Arc::clone(&next));
            on_a_thread(move || async move {
                let contents = manifest.contents(&shared.repository);
                let mut damaged = BTreeMap::new();
                while let Some(pack) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if shared.stop.is_wanted() {
                        break;
                    }
                    match contents.stored(*pack).await {
                        Ok(bytes) => {
                            shared.done.bytes.fetch_add(bytes, Ordering::Relaxed);
                        }
                        Err(error) => {
                            damaged.insert(*pack, told(&error));
                        }
                    }
                }
                damaged
            })
        })
        .collect();
    let mut damaged_packs = BTreeMap::new();
    for reader in readers {
        damaged_packs.extend(reader.await?);
    }
    let (mut files, mut bytes, mut damaged) = (0, 0, Vec::new());
    let mut entries = manifest.entries(&shared.repository);
    loop {
        match entries.next().await {
            Ok(Some(entry)) if entry.kind == Kind::File => {
                match entry.runs.iter().find_map(|run| damaged_packs.get(&run.pack)) {
                    None => (files, bytes) = (files + 1, bytes + entry.size),
                    Some(what) if damaged.len() < MAX_TOLD => {
                        let file = String::from_utf8_lossy(&entry.path).into_owned();
                        damaged.push(Damage { file: Some(file), what: what.clone() });
                    }
                    Some(_) => {}
                }
                shared.done.files.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            // What is behind it in the list is not known.
            Err(error) => {
                damaged.push(Damage { file: None, what: told(&error) });
                break;
            }
        }
    }
    Ok(VerifiedBackup { id: manifest.id.to_string(), files, bytes, damaged })
}

#[derive(Default)]
struct Read {
    files: u64,
    bytes: u64,
    damaged: Vec<Damage>,
}

/// One reader, until there are no more files.
async fn read(
    shared: Arc<Shared>,
    manifest: Arc<Manifest>,
    waiting: Arc<tokio::sync::Mutex<mpsc::Receiver<Entry>>>,
) -> Read {
    let mut contents = manifest.contents(&shared.repository);
    let mut read = Read::default();
    loop {
        let job = waiting.lock().await.recv().await;
        let Some(entry) = job.filter(|_| !shared.stop.is_wanted()) else { return read };
        match contents.read_file(&entry, async |_: &[u8]| Ok::<_, ReadError>(())).await {
            Ok(()) => (read.files, read.bytes) = (read.files + 1, read.bytes + entry.size),
            Err(error) if read.damaged.len() < MAX_TOLD => {
                let file = String::from_utf8_lossy(&entry.path).into_owned();
                read.damaged.push(Damage { file: Some(file), what: told(&error) });
            }
            Err(_) => {}
        }
        shared.done.bytes.fetch_add(entry.size, Ordering::Relaxed);
        shared.done.files.fetch_add(1, Ordering::Relaxed);
    }
}

/// With what lies below it.
fn told(error: &ReadError) -> String {
    let (mut text, mut below) = (error.to_string(), std::error::Error::source(error));
    while let Some(cause) = below {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        below = cause.source();
    }
    text
}

/// Own WAL of the one that is meant, or everything that any of them needs.
async fn wal(
    catalog: &Catalog,
    own: bool,
    depth: Depth,
    manifests: &[&Manifest],
) -> Result<VerifiedWal, VerifyError> {
    let mut wal = VerifiedWal { segments: 0, damaged: Vec::new(), gaps: Vec::new() };
    let Some(archive) = catalog.archive()? else { return Ok(wal) };
    let segments = archive.segments();
    let covered = |manifest: &&Manifest| segments.covering(manifest.timeline, manifest.start, manifest.stop);
    let mut wanted: BTreeSet<Segment> = manifests.iter().flat_map(covered).collect();
    if !own {
        let inventory = archive.inventory().await?;
        let from = manifests.iter().map(|manifest| segments.number(manifest.start)).min();
        wanted.extend(inventory.segments().filter(|segment| from.is_some_and(|from| segment.number >= from)));
        let gaps = window(&catalog.ranges(), &inventory).gaps.into_iter();
        wal.gaps = gaps
            .map(|gap| WalGap {
                timeline: gap.timeline.0,
                from: gap.from.to_string(),
                to: gap.to.to_string(),
            })
            .collect();
    }
    for segment in wanted {
        let read = match depth {
            Depth::Content => archive.segment(segment).await.map(|_| ()),
            Depth::Stored => archive.stored(segment).await,
        };
        match read {
            Ok(()) => wal.segments += 1,
            Err(error) => {
                let file = Some(segments.file_name(segment));
                wal.damaged.push(Damage { file, what: told(&error) });
            }
        }
    }
    Ok(wal)
}
