//! Collections: what goes and what stays, refusals, and a model of writers, deleters and collectors that interleave at
//! random while listings are late.

use std::sync::Arc;

use super::*;
use crate::backup::{Backup, Beginning, CommitError};
use crate::breakage::breaking;
use crate::former::{self, Wanted};
use crate::map::{Entry, changes_of};
use crate::pack::{FULL_FRAME_PAGES, Kept, PAGE_BYTES};
use crate::receive::Object;
use crate::testing::{
    Cloud, PLACE, Random, SEGMENT_BYTES, archive, archive_of, beginning, facts, read_back, repository, run,
    segment, take, wal,
};
use pgherd_core::types::{Term, Timeline};

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Patience = Patience { grace: HOUR, lease: HOUR };
/// In the model, where listings are late by ten minutes at most.
const HASTY: Patience = Patience { grace: Duration::from_secs(1200), lease: HOUR };

fn start(number: u64) -> Lsn {
    Lsn(number * u64::from(SEGMENT_BYTES) + 0x28)
}

/// A backup whose first file is its own and whose second is the parent's.
async fn child(
    repository: &Repository,
    cloud: &Arc<Cloud>,
    parent: &Manifest,
    number: u64,
    slow: Duration,
) -> Option<(Manifest, Vec<u8>)> {
    let begun = beginning(Some(parent.id), start(number), cloud.now());
    let mut backup = Backup::begin(repository, begun).await.ok()?;
    let (mut packs, mut maps) = (backup.packs(FULL_FRAME_PAGES), backup.maps());
    let own = Random(number).bytes(3000);
    let mut file = packs.file();
    file.write(&own).await.ok()?;
    maps.push(&Entry::file("a", 0o600, file.finish().await.ok()?)).await.ok()?;
    for _ in 0..4 {
        cloud.pass(slow / 4);
        backup.beat(cloud.now()).await.ok()?;
    }
    let mut entries = parent.entries(repository);
    while let Some(entry) = entries.next().await.ok()? {
        if entry.path == b"b" {
            let mut file = packs.file();
            file.keep(&entry.runs, entry.size, Kept::Unread(&entry.changes)).await.ok()?;
            maps.push(&Entry::file("b", 0o600, file.finish().await.ok()?)).await.ok()?;
        }
    }
    let packs = packs.finish().await.ok()?;
    let maps = maps.finish().await.ok()?;
    let archive = archive(repository);
    archive.put_segment(segment(1, number), &wal(segment(1, number), number)).await.ok()?;
    let proof = archive.prove(Timeline(1), start(number), Lsn(start(number).0 + 9)).await.ok()?;
    let facts = facts(start(number), Timeline(1), cloud.now());
    let manifest = backup.commit(vec![packs], maps, proof, facts).await.ok()?;
    Some((manifest, own))
}

/// A full backup that goes on from whatever the last attempt has left, and leaves what it has stored for the next one if it dies.
async fn attempt(
    repository: &Repository,
    cloud: &Arc<Cloud>,
    number: u64,
    slow: Duration,
    came_back: &std::cell::Cell<usize>,
) -> Option<Manifest> {
    let wanted = Wanted { node: "a".parse().ok()?, term: Term(1), parent: None, silence: Duration::ZERO };
    let continues = former::find(repository, PLACE, &wanted, cloud.now()).await.ok()?;
    let begun = Beginning { continues, ..beginning(None, start(number), cloud.now()) };
    let mut backup = Backup::begin(repository, begun).await.ok()?;
    let content = first_files()[1].1.clone();
    let known = match backup.former() {
        Some(former) => former.left(repository).file(b"b").await,
        None => None,
    };
    let changes = changes_of(repository, &content);
    let is_same = |known: &Entry| {
        known.changes.len() == changes.len()
            && known.changes.iter().zip(&changes).all(|(before, now)| before.is_same(*now))
    };
    let (mut packs, mut maps) = (backup.packs(FULL_FRAME_PAGES), backup.maps());
    let mut file = packs.file();
    match known.filter(is_same) {
        Some(known) => {
            file.keep(&known.runs, known.size, Kept::Read(&content, &changes)).await.ok()?;
        }
        None => file.write(&content).await.ok()?,
    }
    maps.push(&Entry::file("b", 0o600, file.finish().await.ok()?)).await.ok()?;
    let first = packs.finish().await.ok()?;
    maps.settle().await.ok()?;
    for _ in 0..4 {
        cloud.pass(slow / 4);
        backup.beat(cloud.now()).await.ok()?;
    }
    let mut packs = backup.packs(FULL_FRAME_PAGES);
    let mut file = packs.file();
    file.write(&Random(number).bytes(3000)).await.ok()?;
    maps.push(&Entry::file("c", 0o600, file.finish().await.ok()?)).await.ok()?;
    let packs = vec![first, packs.finish().await.ok()?];
    let maps = maps.finish().await.ok()?;
    let archive = archive(repository);
    archive.put_segment(segment(1, number), &wal(segment(1, number), number)).await.ok()?;
    let proof = archive.prove(Timeline(1), start(number), Lsn(start(number).0 + 9)).await.ok()?;
    let facts = facts(start(number), Timeline(1), cloud.now());
    let committed = backup.commit(packs, maps, proof, facts).await;
    if let Err(CommitError::Abandoned { .. }) = committed {
        came_back.set(came_back.get() + 1);
    }
    committed.ok()
}

fn first_files() -> Vec<(&'static [u8], Vec<u8>)> {
    vec![(b"a", Random(100).bytes(5000)), (b"b", Random(200).bytes(3 * PAGE_BYTES))]
}

async fn collected(repository: &Repository, cloud: &Arc<Cloud>) -> Result<Report, CollectError> {
    collect(repository, PLACE, PATIENCE, cloud.now()).await
}

fn count(cloud: &Cloud, kind: &str) -> usize {
    cloud.names().iter().filter(|name| name.contains(kind)).count()
}

#[test]
fn a_backup_goes_after_its_grace_and_what_others_need_of_it_stays() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let parent = take(&repository, None, &first_files(), 3, cloud.now()).await;
        cloud.pass(HOUR);
        let (child, own) = child(&repository, &cloud, &parent, 9, Duration::ZERO).await.unwrap();
        tombstone::bury(&repository, PLACE, parent.id, "retention", cloud.now()).await.unwrap();
        cloud.pass(HOUR / 2);
        let early = collected(&repository, &cloud).await.unwrap();
        assert_eq!(early, Report { waiting: [parent.id].into(), ..Report::default() });

        cloud.pass(HOUR);
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!(report.swept, [parent.id].into());
        assert_eq!((report.packs, report.maps), (0, 1), "the child needs the parent's pack, and not its map");
        assert_eq!(report.wal, 1, "WAL before the child's start");
        let read = read_back(&repository, &child).await.unwrap();
        assert_eq!((&read[b"a".as_slice()], &read[b"b".as_slice()]), (&own, &first_files()[1].1));
        assert_eq!(manifest::outcome(&repository, PLACE, parent.id).await.unwrap(), None);
        let gone = tombstone::undelete(&repository, PLACE, parent.id, cloud.now()).await.unwrap_err();
        assert!(matches!(gone, TombstoneError::Swept { .. }), "{gone}");

        // When the child goes as well, there is nothing left to keep.
        tombstone::bury(&repository, PLACE, child.id, "retention", cloud.now()).await.unwrap();
        cloud.pass(2 * HOUR);
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!((report.packs, report.wal), (2, 0), "without a backup no WAL is deleted");
        assert_eq!((count(&cloud, "/packs/"), count(&cloud, "/maps/"), count(&cloud, "/wal/")), (0, 0, 1));
        assert_eq!(collected(&repository, &cloud).await.unwrap().packs, 0, "again, with nothing to do");
    });
}

#[test]
fn a_backup_that_is_kept_by_hand_stays_whatever_tombstone_it_has() {
    use crate::keep::{self, KeepError};
    use pgherd_core::retention::Keep;
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let backup = take(&repository, None, &first_files(), 3, cloud.now()).await.id;
        let keep =
            async |keep, until| keep::put(&repository, PLACE, backup, (keep, until), cloud.now()).await;
        keep(Some(Keep::Full), None).await.unwrap();
        tombstone::bury(&repository, PLACE, backup, "somebody was faster", cloud.now()).await.unwrap();
        cloud.pass(2 * HOUR);
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!(report, Report { waiting: [backup].into(), ..Report::default() });
        let refused = keep(Some(Keep::Standalone), None).await.unwrap_err();
        assert!(matches!(refused, KeepError::Deleted { .. }), "{refused}");

        let until = cloud.now() + HOUR;
        tombstone::undelete(&repository, PLACE, backup, cloud.now()).await.unwrap();
        let kept = keep(Some(Keep::Standalone), Some(until)).await.unwrap();
        assert_eq!(
            (kept.number, kept.holds(cloud.now()), kept.holds(until)),
            (3, Some(Keep::Standalone), None)
        );
        tombstone::bury(&repository, PLACE, backup, "retention", cloud.now()).await.unwrap();
        cloud.pass(2 * HOUR);
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!(report.swept, [backup].into(), "its time is over");
        assert_eq!(count(&cloud, "/keep/"), 0);
    });
}

#[test]
fn of_a_backup_that_stands_alone_only_its_own_wal_stays() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let old = take(&repository, None, &first_files(), 3, cloud.now()).await;
        cloud.pass(HOUR);
        let archive = archive(&repository);
        for number in 4..9 {
            archive.put_segment(segment(1, number), &wal(segment(1, number), number)).await.unwrap();
        }
        let newer = take(&repository, None, &first_files(), 9, cloud.now()).await;
        cloud.pass(2 * HOUR);
        let numbers = async || -> Vec<u64> {
            archive.inventory().await.unwrap().segments().map(|segment| segment.number).collect()
        };
        assert_eq!(collected(&repository, &cloud).await.unwrap().wal, 0);
        let alone = [old.id].into();
        let report = collect_beside(&repository, PLACE, PATIENCE, &alone, cloud.now()).await.unwrap();
        assert_eq!((report.wal, numbers().await), (5, vec![3, 9]));
        archive.prove(Timeline(1), old.start, old.stop).await.unwrap();
        // Where all stand alone, what is behind the newest one stays.
        archive.put_segment(segment(1, 10), &wal(segment(1, 10), 10)).await.unwrap();
        cloud.pass(2 * HOUR);
        let alone = [old.id, newer.id].into();
        collect_beside(&repository, PLACE, PATIENCE, &alone, cloud.now()).await.unwrap();
        assert_eq!(numbers().await, [3, 9, 10]);
    });
}

#[test]
fn a_backup_that_nobody_takes_any_more_is_given_up_and_a_live_one_is_not() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let begin = beginning(None, start(5), cloud.now());
        let mut backup = Backup::begin(&repository, begin).await.unwrap();
        let mut packs = backup.packs(FULL_FRAME_PAGES);
        let mut file = packs.file();
        file.write(b"content").await.unwrap();
        let placed = file.finish().await.unwrap();
        let packs = packs.finish().await.unwrap();
        for _ in 0..3 {
            cloud.pass(HOUR - Duration::from_secs(60));
            backup.beat(cloud.now()).await.unwrap();
            let report = collected(&repository, &cloud).await.unwrap();
            assert_eq!(report, Report::default(), "it shows signs of life");
        }
        cloud.pass(2 * HOUR);
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!((report.abandoned, report.packs), ([backup.id()].into(), 1));

        // It was only slow: what it writes now is collected too, and it cannot commit.
        let mut maps = backup.maps();
        maps.push(&Entry::file("a", 0o600, placed)).await.unwrap();
        let maps = maps.finish().await.unwrap();
        let archive = archive(&repository);
        archive.put_segment(segment(1, 5), &wal(segment(1, 5), 5)).await.unwrap();
        let proof = archive.prove(Timeline(1), start(5), Lsn(start(5).0 + 9)).await.unwrap();
        let facts = facts(start(5), Timeline(1), cloud.now());
        backup.commit(vec![packs], maps, proof, facts).await.unwrap_err();
        assert_eq!(collected(&repository, &cloud).await.unwrap().maps, 1);
    });
}

#[test]
fn a_tombstone_on_a_backup_that_is_being_taken_waits_until_it_has_ended() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let begin = beginning(None, start(5), cloud.now());
        let mut backup = Backup::begin(&repository, begin).await.unwrap();
        tombstone::bury(&repository, PLACE, backup.id(), "a mistake", cloud.now()).await.unwrap();
        for _ in 0..3 {
            cloud.pass(HOUR - Duration::from_secs(60));
            backup.beat(cloud.now()).await.unwrap();
            assert_eq!(collected(&repository, &cloud).await.unwrap(), Report::default());
        }
        tombstone::undelete(&repository, PLACE, backup.id(), cloud.now()).await.unwrap();
    });
}

#[test]
fn wal_goes_only_before_every_kept_and_every_begun_backup_and_histories_never() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive_of(&repository, 1..9).await;
        archive.put_partial(segment(1, 2), &wal(segment(1, 2), 2)[..9000]).await.unwrap();
        archive.put_history(Timeline(2), b"1\t0/300060\tx\n").await.unwrap();
        let there = async || -> Vec<u64> {
            archive.inventory().await.unwrap().segments().map(|segment| segment.number).collect()
        };
        cloud.pass(2 * HOUR);
        assert_eq!(collected(&repository, &cloud).await.unwrap().wal, 0, "without a backup none goes");
        let live = Backup::begin(&repository, beginning(None, start(4), cloud.now())).await.unwrap();
        cloud.pass(Duration::from_secs(10));
        take(&repository, None, &first_files(), 6, cloud.now()).await;
        assert_eq!(collected(&repository, &cloud).await.unwrap().wal, 4, "1 to 3 and the partial one");
        assert_eq!(there().await, [4, 5, 6, 7, 8], "the begun backup needs it from 4 on");
        drop(live);
        cloud.pass(2 * HOUR);
        collected(&repository, &cloud).await.unwrap();
        assert_eq!(there().await, [6, 7, 8]);
        assert_eq!((count(&cloud, "/history/"), count(&cloud, "/partial/")), (1, 0));
        // What came a moment ago stays, wherever it is: somebody may be about to need it.
        archive.put_segment(segment(1, 1), &wal(segment(1, 1), 1)).await.unwrap();
        assert_eq!(collected(&repository, &cloud).await.unwrap().wal, 0);
    });
}

#[test]
fn pieces_go_when_their_segment_is_there() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive(&repository);
        take(&repository, None, &first_files(), 6, cloud.now()).await;
        let piece = async |number, range: std::ops::Range<u32>| {
            let segment = segment(1, number);
            let content = wal(segment, number)[range.start as usize..range.end as usize].to_vec();
            archive
                .put(&Object::Piece { segment, from: range.start, content: content.into() })
                .await
                .unwrap();
        };
        piece(6, 0..9000).await;
        piece(7, 0..9000).await;
        piece(7, 9000..9500).await;
        assert_eq!(collected(&repository, &cloud).await.unwrap().wal, 1, "that of the segment that is there");
        assert_eq!(count(&cloud, "/piece/"), 2);
        archive.put_segment(segment(1, 7), &wal(segment(1, 7), 7)).await.unwrap();
        assert_eq!(collected(&repository, &cloud).await.unwrap().wal, 2);
        assert_eq!((count(&cloud, "/piece/"), count(&cloud, "/wal/")), (0, 2));
    });
}

#[test]
fn nothing_is_deleted_when_anything_is_doubtful() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let parent = take(&repository, None, &first_files(), 3, cloud.now()).await;
        cloud.pass(HOUR);
        let (child, _) = child(&repository, &cloud, &parent, 9, Duration::ZERO).await.unwrap();
        tombstone::bury(&repository, PLACE, parent.id, "retention", cloud.now()).await.unwrap();
        cloud.pass(2 * HOUR);
        let before = cloud.names();
        let refused = async |what: &str| {
            let error = collected(&repository, &cloud).await.unwrap_err();
            assert_eq!(cloud.names(), before, "{what}: something was deleted or written");
            error
        };

        let manifest = PLACE.backup(child.id);
        let right = cloud.bytes(manifest.as_str()).unwrap();
        cloud.damage(manifest.as_str(), right.slice(..right.len() - 1));
        let error = refused("an unreadable manifest").await;
        assert!(matches!(error, CollectError::Read(ReadError::Damaged { .. })), "{error}");
        cloud.damage(manifest.as_str(), right);

        for folder in ["/backup/", "/packs/", "/maps/"] {
            cloud.bad(|weather| weather.listing_ends = Some((folder.to_owned(), 1)));
            let error = refused(folder).await;
            assert!(matches!(error, CollectError::NotListed { .. }), "{folder}: {error}");
        }
        cloud.bad(|weather| weather.listing_ends = None);

        let now = cloud.now() - HOUR;
        let error = collect(&repository, PLACE, PATIENCE, now).await.unwrap_err();
        assert!(matches!(error, CollectError::ClocksDiffer { .. }), "{error}");
        let error = collect(&repository, PLACE, PATIENCE, cloud.now() + HOUR).await.unwrap_err();
        assert!(matches!(error, CollectError::ClocksDiffer { .. }), "{error}");
        // Both clocks went back, as that of a host with its directory does.
        cloud.pass(4 * HOUR);
        tombstone::bury(&repository, PLACE, child.id, "retention", cloud.now()).await.unwrap();
        let name = PLACE.tombstone(child.id, 1);
        cloud.back(4 * HOUR);
        let error = collected(&repository, &cloud).await.unwrap_err();
        assert!(
            matches!(&error, CollectError::ClockWentBack { object, .. } if object == name.as_str()),
            "{error}"
        );
        cloud.remove(name.as_str());

        cloud.remove(PLACE.pack(parent.id, 0).as_str());
        let error = collected(&repository, &cloud).await.unwrap_err();
        assert!(
            matches!(&error, CollectError::Lost { by, .. } if [parent.id, child.id].contains(by)),
            "{error}"
        );
        let stray: Name = format!("{}notes", PLACE.all(Kind::Packs)).parse().unwrap();
        repository.store().put(&stray, "x".into()).await.unwrap();
        let error = collected(&repository, &cloud).await.unwrap_err();
        assert!(matches!(error, CollectError::Stray { .. }), "{error}");
    });
}

/// A pack that only a child needs, and a listing that hides the child.
fn hidden_child_survives() -> bool {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let parent = take(&repository, None, &first_files(), 3, cloud.now()).await;
        cloud.pass(HOUR);
        let (child, _) = child(&repository, &cloud, &parent, 9, Duration::ZERO).await.unwrap();
        tombstone::bury(&repository, PLACE, parent.id, "retention", cloud.now()).await.unwrap();
        cloud.pass(2 * HOUR);
        collected(&repository, &cloud).await.unwrap();
        cloud.bad(|weather| weather.listing_ends = Some(("/backup/".to_owned(), 0)));
        let refused = matches!(collected(&repository, &cloud).await, Err(CollectError::NotListed { .. }));
        refused && read_back(&repository, &child).await.is_ok()
    })
}

#[test]
fn a_listing_that_hides_a_backup_is_not_believed() {
    assert!(hidden_child_survives());
    let believed = breaking(Some(Broken::ListingBelieved), hidden_child_survives);
    assert!(!believed, "a build that believes listings is caught");
}

/// A parent gets its tombstone while a child is being taken, and collections run until it is done, with listings that are
/// `late`. Says whether the child can be read.
fn child_of_a_buried_parent(late: Duration, meanwhile: Duration) -> bool {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let parent = take(&repository, None, &first_files(), 3, cloud.now()).await;
        cloud.pass(2 * HOUR);
        let begun = beginning(Some(parent.id), start(9), cloud.now());
        let mut backup = Backup::begin(&repository, begun).await.unwrap();
        tombstone::bury(&repository, PLACE, parent.id, "retention", cloud.now()).await.unwrap();
        cloud.bad(|weather| weather.listing_late = late);
        for _ in 0..4 {
            cloud.pass(meanwhile);
            backup.beat(cloud.now()).await.unwrap();
            let report = collected(&repository, &cloud).await.unwrap();
            assert!(report.abandoned.is_empty());
        }
        let mut maps = backup.maps();
        let mut entries = parent.entries(&repository);
        while let Ok(Some(entry)) = entries.next().await {
            maps.push(&entry).await.unwrap();
        }
        let Ok(maps) = maps.finish().await else { return false };
        let archive = archive(&repository);
        archive.put_segment(segment(1, 9), &wal(segment(1, 9), 9)).await.unwrap();
        let proof = archive.prove(Timeline(1), start(9), Lsn(start(9).0 + 9)).await.unwrap();
        let facts = facts(start(9), Timeline(1), cloud.now());
        match backup.commit(Vec::new(), maps, proof, facts).await {
            Ok(manifest) => read_back(&repository, &manifest).await.is_ok_and(|files| files.len() == 2),
            Err(_) => false,
        }
    })
}

#[test]
fn a_parent_is_not_deleted_under_a_child_whose_intent_is_listed_or_late() {
    let half = HOUR / 2;
    assert!(child_of_a_buried_parent(Duration::ZERO, half));
    let ignored = breaking(Some(Broken::IntentsIgnored), || child_of_a_buried_parent(Duration::ZERO, half));
    assert!(!ignored, "a build that ignores intents is caught");

    // The listings show neither the intent nor anything else of the child.
    let minute = Duration::from_secs(60);
    assert!(child_of_a_buried_parent(half, minute));
    let hasty = breaking(Some(Broken::NoGrace), || child_of_a_buried_parent(half, minute));
    assert!(!hasty, "a build that does not wait is caught");
}

/// Of the model.
const WRITERS: u32 = 4;

/// What happened in one run of the model.
#[derive(Debug, Default)]
struct Outcomes {
    committed: usize,
    swept: usize,
    refused: usize,
    /// Committed with packs of an attempt before.
    gone_on: usize,
    /// Came to their end, and somebody had gone on from them meanwhile.
    came_back: usize,
    /// Backups that should be restorable and are not.
    lost: Vec<String>,
    /// Objects that nothing needs and that stayed.
    left: Vec<String>,
}

/// Writers, somebody who deletes and undeletes, and two collectors, interleaved by the seed.
fn model(seed: u64) -> Outcomes {
    run(async {
        let cloud = Cloud::new(seed);
        let repository = repository(&cloud).await;
        let mut random = Random(seed);
        let late = [0, 200, 600][random.below(3) as usize];
        let late = Duration::from_secs(late);
        cloud.bad(|weather| (weather.interleave, weather.listing_late) = (3, late));
        let known: std::cell::RefCell<Vec<Manifest>> = Default::default();
        let first = take(&repository, None, &first_files(), 1, cloud.now()).await;
        known.borrow_mut().push(first);
        let done = std::cell::Cell::new(0);

        let writer = async |seed: u64, numbers: std::ops::Range<u64>| {
            let mut random = Random(seed);
            for number in numbers {
                cloud.pass(Duration::from_secs(random.below(900)));
                let parent = {
                    let known = known.borrow();
                    known[known.len() - 1 - random.below(known.len().min(3) as u64) as usize].clone()
                };
                // Some are slow, some die in the middle.
                let slow = Duration::from_secs(random.below(4000));
                let taking = child(&repository, &cloud, &parent, number, slow);
                let committed = match random.below(4) {
                    0 => {
                        let patience = random.below(60);
                        let dying = async {
                            for _ in 0..patience {
                                tokio::task::yield_now().await;
                            }
                        };
                        let (taking, dying) = (std::pin::pin!(taking), std::pin::pin!(dying));
                        match futures_util::future::select(taking, dying).await {
                            futures_util::future::Either::Left((committed, _)) => committed,
                            futures_util::future::Either::Right(_) => None,
                        }
                    }
                    _ => taking.await,
                };
                known.borrow_mut().extend(committed.map(|(manifest, _)| manifest));
            }
            done.set(done.get() + 1);
        };
        let gone_on = std::cell::Cell::new(0);
        let came_back = std::cell::Cell::new(0);
        // Most of its attempts die, with others in between. There are two that take each other for dead: whoever goes on wins, and the other one comes back.
        let attempts = async |seed: u64, numbers: std::ops::Range<u64>| {
            let mut random = Random(seed);
            for number in numbers {
                cloud.pass(Duration::from_secs(random.below(900)));
                let slow = Duration::from_secs(random.below(4000));
                let patience = random.below(90);
                let dying = async {
                    for _ in 0..patience {
                        tokio::task::yield_now().await;
                    }
                };
                let taking = attempt(&repository, &cloud, number, slow, &came_back);
                let (taking, dying) = (std::pin::pin!(taking), std::pin::pin!(dying));
                if let futures_util::future::Either::Left((Some(manifest), _)) =
                    futures_util::future::select(taking, dying).await
                {
                    gone_on.set(gone_on.get() + usize::from(manifest.packs.len() > 1));
                    known.borrow_mut().push(manifest);
                }
            }
            done.set(done.get() + 1);
        };
        let deleter = async {
            let mut random = Random(seed ^ 2);
            while done.get() < WRITERS {
                let id = {
                    let known = known.borrow();
                    known[random.below(known.len() as u64) as usize].id
                };
                let now = cloud.now();
                if random.below(4) == 0 {
                    // Refused where there is nothing to take back.
                    tombstone::undelete(&repository, PLACE, id, now).await.ok();
                } else {
                    tombstone::bury(&repository, PLACE, id, "a test", now).await.unwrap();
                }
                for _ in 0..random.below(40) {
                    tokio::task::yield_now().await;
                }
            }
        };
        let refused = std::cell::Cell::new(0);
        let collector = async |seed: u64| {
            let mut random = Random(seed);
            while done.get() < WRITERS {
                if collect(&repository, PLACE, HASTY, cloud.now()).await.is_err() {
                    refused.set(refused.get() + 1);
                }
                cloud.pass(Duration::from_secs(random.below(600)));
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(
            writer(seed ^ 1, 2..7),
            writer(seed ^ 9, 20..25),
            attempts(seed ^ 5, 40..48),
            attempts(seed ^ 6, 60..66),
            deleter,
            collector(seed ^ 3),
            collector(seed ^ 4)
        );

        // The weather clears up; what is to go goes.
        cloud.bad(|weather| *weather = Default::default());
        let mut outcomes = Outcomes { committed: known.borrow().len(), ..Outcomes::default() };
        outcomes.refused = refused.get();
        (outcomes.gone_on, outcomes.came_back) = (gone_on.get(), came_back.get());
        for _ in 0..3 {
            cloud.pass(2 * HOUR);
            if let Err(error) = collected(&repository, &cloud).await {
                outcomes.lost.push(error.to_string());
            }
        }
        let mut needed: BTreeSet<String> = BTreeSet::new();
        for manifest in &known.take() {
            if tombstone::state(&repository, PLACE, manifest.id).await.unwrap() == State::Swept {
                outcomes.swept += 1;
                continue;
            }
            needed.extend(manifest.all_packs().map(|(id, _)| PLACE.pack(id.backup, id.number).to_string()));
            let read = read_back(&repository, manifest).await;
            let right = |files: &BTreeMap<Vec<u8>, Vec<u8>>| files[b"b".as_slice()] == first_files()[1].1;
            if !read.as_ref().is_ok_and(right) {
                outcomes.lost.push(format!("{}: {read:?}", manifest.id));
            }
            let archive = archive(&repository);
            if let Err(error) = archive.prove(Timeline(1), manifest.start, manifest.stop).await {
                outcomes.lost.push(error.to_string());
            }
        }
        let packs = cloud.names().into_iter().filter(|name| name.contains("/packs/"));
        outcomes.left = packs.filter(|name| !needed.contains(name)).collect();
        outcomes
    })
}

fn models(seeds: std::ops::Range<u64>) -> Vec<Outcomes> {
    seeds.map(model).collect()
}

#[test]
fn case_29_no_interleaving_loses_what_is_kept_or_keeps_what_is_not() {
    let mut total = Outcomes::default();
    for (seed, outcomes) in models(0..120).into_iter().enumerate() {
        assert!(outcomes.lost.is_empty(), "seed {seed} lost {:?}", outcomes.lost);
        assert!(outcomes.left.is_empty(), "seed {seed} left {:?}", outcomes.left);
        total.committed += outcomes.committed;
        total.swept += outcomes.swept;
        total.refused += outcomes.refused;
        total.gone_on += outcomes.gone_on;
        total.came_back += outcomes.came_back;
    }
    // The model is worth something only if all of this happens.
    assert!(total.committed > 300 && total.swept > 100 && total.refused > 50, "{total:?}");
    assert!(total.gone_on > 50 && total.came_back > 50, "{total:?}");
}

#[test]
fn the_model_catches_a_collection_that_ignores_intents() {
    let outcomes = breaking(Some(Broken::IntentsIgnored), || models(0..120));
    let caught = outcomes.iter().filter(|outcomes| !outcomes.lost.is_empty()).count();
    assert!(caught > 0, "nothing was lost in 120 runs");
}

#[test]
fn the_model_catches_a_collection_that_does_not_look_who_goes_on() {
    let outcomes = breaking(Some(Broken::FormerIgnored), || models(0..120));
    let caught = outcomes.iter().filter(|outcomes| !outcomes.lost.is_empty()).count();
    assert!(caught > 0, "nothing was lost in 120 runs");
}
