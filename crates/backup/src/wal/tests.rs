//! The archive: what comes back, what is refused, what is quarantined, and proofs over holes.

use std::sync::Arc;

use super::*;
use crate::breakage::breaking;
use crate::store::Store;
use crate::testing::{
    Cloud, PLACE, Random, SEGMENT_BYTES, SYSTEM, archive, archive_of, encrypted, repository, run, segment,
    segments, wal,
};

#[test]
fn segments_partials_and_histories_come_back() {
    run(async {
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let archive = archive(&repository);
            for number in [0, 7] {
                let segment = segment(1, number);
                let content = wal(segment, number);
                assert_eq!(archive.put_segment(segment, &content).await.unwrap(), Archived::Created);
                assert_eq!(archive.segment(segment).await.unwrap(), content);
            }
            let missing = archive.segment(segment(1, 8)).await.unwrap_err();
            assert!(missing.is_absent(), "{missing}");
            let file = b"1\t0/300060\tno recovery target specified\n";
            assert_eq!(archive.put_history(Timeline(2), file).await.unwrap(), Archived::Created);
            assert_eq!(archive.history(Timeline(2)).await.unwrap().forks().len(), 1);
            let inventory = archive.inventory().await.unwrap();
            assert_eq!(inventory.segments().collect::<Vec<_>>(), [segment(1, 0), segment(1, 7)]);
        }
    });
}

#[test]
fn the_same_again_is_fine_also_in_another_encryption() {
    run(async {
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let archive = archive(&repository);
            let content = wal(segment(1, 3), 1);
            archive.put_segment(segment(1, 3), &content).await.unwrap();
            assert_eq!(archive.put_segment(segment(1, 3), &content).await.unwrap(), Archived::Same);
            cloud.bad(|weather| weather.lose_answers = 1);
            let content = wal(segment(1, 4), 1);
            archive.put_segment(segment(1, 4), &content).await.unwrap_err();
            assert_eq!(archive.put_segment(segment(1, 4), &content).await.unwrap(), Archived::Same);
        }
    });
}

/// Puts two contents under one name; says which is there, and whether the second was reported and kept.
fn two_primaries() -> (bool, bool) {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive(&repository);
        let (first, second) = (wal(segment(1, 3), 1), wal(segment(1, 3), 2));
        archive.put_segment(segment(1, 3), &first).await.unwrap();
        let told = match archive.put_segment(segment(1, 3), &second).await {
            Err(WalError::Conflict { quarantine, .. }) => {
                // Again: the same alarm, and no second copy.
                let again = archive.put_segment(segment(1, 3), &second).await;
                assert!(matches!(again, Err(WalError::Conflict { .. })));
                let (_, kept) = archive.read(&quarantine).await.unwrap();
                kept == second
            }
            _ => false,
        };
        (archive.segment(segment(1, 3)).await.unwrap() == first, told)
    })
}

#[test]
fn case_12_another_content_is_quarantined_and_the_first_is_untouched() {
    assert_eq!(two_primaries(), (true, true));
    let (_, told) = breaking(Some(Broken::WalOverwritten), two_primaries);
    assert!(!told, "a build that does not compare contents is caught");
}

#[test]
fn case_08_partials_of_one_name_are_both_kept_and_are_no_segment() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive(&repository);
        for salt in [1, 2] {
            let content = &wal(segment(1, 3), salt)[..100_000];
            assert_eq!(archive.put_partial(segment(1, 3), content).await.unwrap(), Archived::Created);
        }
        assert_eq!(repository.store().list_all(&PLACE.all(Names::Partials)).await.unwrap().len(), 2);
        assert!(archive.segment(segment(1, 3)).await.unwrap_err().is_absent());
        assert_eq!(archive.inventory().await.unwrap().segments().count(), 0);
    });
}

#[test]
fn case_10_wal_of_another_cluster_is_refused() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let other = Archive::new(&repository, SystemId(1), segments());
        let error = other.put_segment(segment(1, 3), &wal(segment(1, 3), 1)).await.unwrap_err();
        assert!(
            matches!(error, WalError::Segment(SegmentError::OtherSystem { found: SYSTEM, .. })),
            "{error}"
        );
        assert!(!cloud.names().iter().any(|name| name.contains("/wal/")), "nothing was written");
    });
}

#[test]
fn case_14_a_proof_names_the_first_missing_segment() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive_of(&repository, [3, 4, 6]).await;
        let at = |number: u64| Lsn(number * u64::from(SEGMENT_BYTES));
        archive.prove(Timeline(1), at(3), at(5)).await.unwrap();
        let error = archive.prove(Timeline(1), at(3), Lsn(at(5).0 + 1)).await.unwrap_err();
        let missing = segment(1, 5);
        assert!(
            matches!(&error, WalError::Missing { segment, from, .. } if *segment == missing && *from == at(5)),
            "{error}"
        );
        let error = archive.prove(Timeline(2), at(3), at(4)).await.unwrap_err();
        assert!(matches!(error, WalError::Read(read) if read.is_absent()), "the history is part of it");
    });
}

#[test]
fn a_segment_under_the_name_of_another_is_no_proof() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive_of(&repository, [3, 4]).await;
        let name = |number| PLACE.wal(Timeline(1), &segments().file_name(segment(1, number))).to_string();
        cloud.damage(&name(3), cloud.bytes(&name(4)).unwrap());
        assert!(archive.segment(segment(1, 3)).await.is_err());
        let start = Lsn(3 * u64::from(SEGMENT_BYTES));
        assert!(archive.prove(Timeline(1), start, Lsn(start.0 + 5)).await.is_err());
    });
}

#[test]
fn a_store_that_cannot_be_written_loses_nothing_and_says_so() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive(&repository);
        cloud.bad(|weather| weather.unwritable = true);
        let error = archive.put_segment(segment(1, 3), &wal(segment(1, 3), 1)).await.unwrap_err();
        assert!(matches!(&error, WalError::Write(WriteError::Store(store)) if store.failure.is_unsure()));
        cloud.bad(|weather| weather.unwritable = false);
        let again = archive.put_segment(segment(1, 3), &wal(segment(1, 3), 1)).await.unwrap();
        assert_eq!(again, Archived::Created);
    });
}

#[test]
fn what_there_is_of_a_segment_is_given_where_nothing_lies_behind_it() {
    run(async {
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let archive = archive_of(&repository, [3]).await;
            let of = |timeline, number: u64, from: u32, to: u32| {
                let segment = segment(timeline, number);
                let content = wal(segment, number)[from as usize..to as usize].to_vec();
                Object::Piece { segment, from, content: content.into() }
            };
            for (from, to) in [(0, 9000), (8000, 70_000), (80_000, 90_000)] {
                assert_eq!(archive.put(&of(1, 4, from, to)).await.unwrap(), Archived::Created);
                assert_eq!(archive.put(&of(1, 4, from, to)).await.unwrap(), Archived::Same);
            }
            let Fetched::Beginning { content, end } = archive.fetch(segment(1, 4)).await.unwrap() else {
                panic!()
            };
            assert_eq!(end, Lsn(4 * u64::from(SEGMENT_BYTES) + 70_000), "up to the hole");
            assert_eq!(content.len(), SEGMENT_BYTES as usize);
            assert_eq!(content[..70_000], wal(segment(1, 4), 4)[..70_000]);
            assert!(content[70_000..].iter().all(|byte| *byte == 0));
            assert_eq!(archive.inventory().await.unwrap().beginning_of(segment(1, 4)), Some(end));
            let whole = archive.fetch(segment(1, 3)).await.unwrap();
            assert_eq!(whole, Fetched::Whole(wal(segment(1, 3), 3).into()));
            assert!(archive.fetch(segment(1, 5)).await.unwrap_err().is_absent());

            // In front of something else it is a hole, whatever that is, and recovery must not end there as if it were all.
            archive.put(&of(2, 5, 0, 100)).await.unwrap();
            assert!(archive.fetch(segment(1, 4)).await.unwrap_err().is_absent());
            archive.put_segment(segment(2, 6), &wal(segment(2, 6), 6)).await.unwrap();
            assert!(archive.fetch(segment(2, 5)).await.unwrap_err().is_absent());
            // What is complete needs no pieces.
            archive.put_segment(segment(1, 4), &wal(segment(1, 4), 4)).await.unwrap();
            assert!(matches!(archive.fetch(segment(1, 4)).await.unwrap(), Fetched::Whole(_)));
            assert_eq!(archive.inventory().await.unwrap().beginning_of(segment(1, 4)), None);
            // They are cleared where it is, and nowhere else.
            let pieces = async || {
                let all = Place(SYSTEM).all(crate::name::Kind::Pieces);
                repository.store().list_all(&all).await.unwrap().len()
            };
            assert_eq!(pieces().await, 4);
            assert!(archive.clear_pieces(segment(2, 5)).await.unwrap_err().is_absent());
            archive.clear_pieces(segment(1, 4)).await.unwrap();
            assert_eq!(pieces().await, 1);
        }
    });
}

#[test]
fn pieces_that_are_none_are_refused_and_other_contents_are_quarantined() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive(&repository);
        let put = async |from: u32, content: Vec<u8>| {
            archive.put(&Object::Piece { segment: segment(1, 4), from, content: content.into() }).await
        };
        for (from, bytes) in [(0, 0), (SEGMENT_BYTES, 1), (SEGMENT_BYTES - 9, 10), (u32::MAX, 1)] {
            assert!(
                matches!(put(from, vec![0; bytes]).await, Err(WalError::Segment(_))),
                "{bytes} at {from}"
            );
        }
        assert!(matches!(put(0, vec![7; 9000]).await, Err(WalError::Segment(_))), "it is no WAL");
        put(500, vec![1; 100]).await.unwrap();
        assert!(matches!(put(500, vec![2; 100]).await, Err(WalError::Conflict { .. })));
        let stray: Name = format!("cluster/{SYSTEM}/piece/00000001/notes").parse().unwrap();
        repository.store().put(&stray, "x".into()).await.unwrap();
        assert!(archive.inventory().await.unwrap_err().to_string().contains("notes"));
    });
}

#[test]
fn what_does_not_belong_into_the_archive_is_noticed() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive(&repository);
        let stray: Name = format!("cluster/{SYSTEM}/wal/00000001/notes").parse().unwrap();
        repository.store().put(&stray, "x".into()).await.unwrap();
        let error = archive.inventory().await.unwrap_err();
        assert!(error.to_string().contains("notes"), "{error}");
    });
}

#[test]
fn damage_to_wal_objects_is_never_read() {
    run(async {
        let mut random = Random(17);
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let archive = archive(&repository);
            let content = wal(segment(1, 3), 5);
            archive.put_segment(segment(1, 3), &content).await.unwrap();
            let name = PLACE.wal(Timeline(1), &segments().file_name(segment(1, 3))).to_string();
            let right = cloud.bytes(&name).unwrap();
            archive.stored(segment(1, 3)).await.unwrap();
            for _ in 0..350 {
                let mut wrong = right.to_vec();
                let at = random.below(wrong.len() as u64) as usize;
                wrong[at] ^= 1 << random.below(8);
                cloud.damage(&name, wrong);
                assert!(archive.segment(segment(1, 3)).await.is_err(), "byte {at}");
                assert!(archive.stored(segment(1, 3)).await.is_err(), "byte {at}, as it is stored");
            }
        }
    });
}

#[test]
fn a_segment_in_a_directory_is_there_after_a_restart() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let store = Store::directory(root.path());
        let now = crate::testing::time("2026-11-20T00:00:00Z");
        let repository = Repository::create(store, None, now).await.unwrap();
        archive(&repository).put_segment(segment(1, 3), &wal(segment(1, 3), 1)).await.unwrap();
        let again = Repository::open(Store::directory(root.path()), None).await.unwrap();
        assert_eq!(archive(&again).segment(segment(1, 3)).await.unwrap(), wal(segment(1, 3), 1));
        assert_eq!(Arc::new(again.format().clone()), Arc::new(repository.format().clone()));
    });
}
