//! Whole repositories, segments and backups for tests, with as few words as possible.
//!
//! Left out: faults (`cloud`). Hazard: content that compresses to nothing or is the same everywhere would make tests pass
//! that should not; so it comes from seeds.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use object_store::ObjectStore;
use pgherd_core::types::{Lsn, NodeName, SystemId, Term, Timeline};

use super::{Cloud, Random};
use crate::backup::{Backup, Beginning};
use crate::format::Repository;
use crate::manifest::{Facts, Manifest, Settings, Text};
use crate::map::{DurableMaps, Entry};
use crate::name::{BackupId, Place};
use crate::pack::{DurablePacks, FULL_FRAME_PAGES};
use crate::store::Store;
use crate::wal::{Archive, ProvenWal, Segment, Segments, segment_header};

pub(crate) const SYSTEM: SystemId = SystemId(7_710_000_000_000_000_001);
pub(crate) const PLACE: Place = Place(SYSTEM);
pub(crate) const SEGMENT_BYTES: u32 = 1 << 20;

pub(crate) async fn repository(cloud: &Arc<Cloud>) -> Repository {
    let store = Store::over(Arc::clone(cloud) as Arc<dyn ObjectStore>);
    Repository::create(store, None, cloud.now()).await.unwrap()
}

/// A repository with a key file, which costs no time.
pub(crate) async fn encrypted(cloud: &Arc<Cloud>) -> Repository {
    let store = Store::over(Arc::clone(cloud) as Arc<dyn ObjectStore>);
    let secret = crate::keys::Secret::Key([9; 32]);
    Repository::create(store, Some(&secret), cloud.now()).await.unwrap()
}

pub(crate) fn segments() -> Segments {
    Segments::new(SEGMENT_BYTES).unwrap()
}

pub(crate) fn archive(repository: &Repository) -> Archive {
    Archive::new(repository, SYSTEM, segments())
}

/// The archive with these segments of timeline 1.
pub(crate) async fn archive_of(repository: &Repository, numbers: impl IntoIterator<Item = u64>) -> Archive {
    let archive = archive(repository);
    for number in numbers {
        archive.put_segment(segment(1, number), &wal(segment(1, number), number)).await.unwrap();
    }
    archive
}

pub(crate) fn segment(timeline: u32, number: u64) -> Segment {
    Segment { timeline: Timeline(timeline), number }
}

/// The content of a segment, a different one for each `salt`.
pub(crate) fn wal(segment: Segment, salt: u64) -> Vec<u8> {
    let mut content = segment_header(segments(), segment, SYSTEM);
    content.extend(Random(salt).bytes(2000));
    content.resize(SEGMENT_BYTES as usize, 0);
    content
}

pub(crate) fn facts(start: Lsn, timeline: Timeline, now: Timestamp) -> Facts {
    let label = format!(
        "START WAL LOCATION: {start} (file x)\nCHECKPOINT LOCATION: {start}\nBACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: now\nLABEL: pgherd\nSTART TIMELINE: {timeline}\n"
    );
    Facts {
        postgresql_version: 150_018,
        page_bytes: 8192,
        data_checksums: true,
        settings: Settings {
            max_connections: 100,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
        },
        started: now,
        stopped: now,
        backup_label: Text::new(label.as_bytes()),
        tablespace_map: Text::new(b""),
    }
}

pub(crate) fn beginning(parent: Option<BackupId>, from: Lsn, now: Timestamp) -> Beginning {
    Beginning {
        system_identifier: SYSTEM,
        parent,
        continues: None,
        timeline: Timeline(1),
        wal_from: from,
        node: "a".parse::<NodeName>().unwrap(),
        term: Term(1),
        now,
    }
}

/// A backup of these files on timeline 1 that lacks nothing but its manifest, with one segment of WAL that is archived by the way.
pub(crate) async fn prepare(
    repository: &Repository,
    parent: Option<BackupId>,
    files: &[(&[u8], Vec<u8>)],
    wal_number: u64,
    now: Timestamp,
) -> (Backup, Vec<DurablePacks>, DurableMaps, ProvenWal) {
    let start = Lsn(wal_number * u64::from(SEGMENT_BYTES) + 0x28);
    let backup = Backup::begin(repository, beginning(parent, start, now)).await.unwrap();
    let (mut packs, mut maps) = (backup.packs(FULL_FRAME_PAGES), backup.maps());
    for (path, content) in files {
        let mut file = packs.file();
        file.write(content).await.unwrap();
        maps.push(&Entry::file(*path, 0o600, file.finish().await.unwrap())).await.unwrap();
    }
    let archive = archive_of(repository, [wal_number]).await;
    let stop = Lsn(start.0 + 0x100);
    let proof = archive.prove(Timeline(1), start, stop).await.unwrap();
    let packs = vec![packs.finish().await.unwrap()];
    (backup, packs, maps.finish().await.unwrap(), proof)
}

/// Takes a whole backup.
pub(crate) async fn take(
    repository: &Repository,
    parent: Option<BackupId>,
    files: &[(&[u8], Vec<u8>)],
    wal_number: u64,
    now: Timestamp,
) -> Manifest {
    let (backup, packs, maps, proof) = prepare(repository, parent, files, wal_number, now).await;
    let facts = facts(proof.start, Timeline(1), now);
    backup.commit(packs, maps, proof, facts).await.unwrap()
}

/// Takes a whole backup of WAL that is archived already, from the beginning of a segment on.
pub(crate) async fn take_archived(
    repository: &Repository,
    wal_number: u64,
    stop: Lsn,
    now: Timestamp,
) -> Manifest {
    let start = Lsn(wal_number * u64::from(SEGMENT_BYTES) + 0x28);
    let backup = Backup::begin(repository, beginning(None, start, now)).await.unwrap();
    let (packs, mut maps) = (backup.packs(FULL_FRAME_PAGES), backup.maps());
    maps.push(&Entry::directory("base", 0o700)).await.unwrap();
    let proof = archive(repository).prove(Timeline(1), start, stop).await.unwrap();
    let packs = vec![packs.finish().await.unwrap()];
    backup.commit(packs, maps.finish().await.unwrap(), proof, facts(start, Timeline(1), now)).await.unwrap()
}

/// All files of a backup with their contents.
pub(crate) async fn read_back(
    repository: &Repository,
    manifest: &Manifest,
) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, crate::document::ReadError> {
    let (mut entries, mut contents) = (manifest.entries(repository), manifest.contents(repository));
    let mut files = BTreeMap::new();
    while let Some(entry) = entries.next().await? {
        let mut content = Vec::new();
        let take = async |piece: &[u8]| {
            content.extend_from_slice(piece);
            Ok::<_, crate::document::ReadError>(())
        };
        contents.read_file(&entry, take).await?;
        files.insert(entry.path, content);
    }
    Ok(files)
}
