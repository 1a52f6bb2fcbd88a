//! The commit point: proofs, validation, and damage to all that a backup consists of.

use std::sync::Arc;

use super::*;
use crate::backup::{Backup, BeginError, CommitError};
use crate::breakage::{Broken, breaking};
use crate::intent::Abandoned;
use crate::map::Entry;
use crate::pack::FULL_FRAME_PAGES;
use crate::seal::Protection;
use crate::store::Failure;
use crate::testing::{
    Cloud, PLACE, Random, SEGMENT_BYTES, archive, archive_of, beginning, encrypted, facts, prepare,
    read_back, repository, run, segment, take, wal,
};
use crate::wal::WalError;

const START: Lsn = Lsn(3 * SEGMENT_BYTES as u64 + 0x28);

fn files() -> Vec<(&'static [u8], Vec<u8>)> {
    let mut random = Random(9);
    vec![
        (b"base/1/1", random.bytes(20_000)),
        (b"base/1/2", random.bytes(150_000)),
        (b"small", random.bytes(99)),
    ]
}

/// Tries to commit a backup whose last segment is not archived; says whether there is a manifest then.
fn committed_without_wal() -> bool {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let backup = Backup::begin(&repository, beginning(None, START, cloud.now())).await.unwrap();
        let (id, packs, mut maps) = (backup.id(), backup.packs(FULL_FRAME_PAGES), backup.maps());
        maps.push(&Entry::directory("base", 0o700)).await.unwrap();
        let archive = archive(&repository);
        archive.put_segment(segment(1, 3), &wal(segment(1, 3), 3)).await.unwrap();
        let stop = Lsn(START.0 + u64::from(SEGMENT_BYTES));
        match archive.prove(Timeline(1), START, stop).await {
            Ok(proof) => {
                let (packs, maps) = (packs.finish().await.unwrap(), maps.finish().await.unwrap());
                backup
                    .commit(vec![packs], maps, proof, facts(START, Timeline(1), cloud.now()))
                    .await
                    .unwrap();
            }
            Err(error) => {
                assert!(
                    matches!(error, WalError::Missing { segment: missing, .. } if missing == segment(1, 4))
                );
            }
        }
        outcome(&repository, PLACE, id).await.unwrap().is_some()
    })
}

#[test]
fn case_14_without_all_wal_there_is_no_manifest() {
    assert!(!committed_without_wal());
    let without = breaking(Some(Broken::ManifestBeforeWal), committed_without_wal);
    assert!(without, "a build that writes the manifest before WAL is complete is caught");
}

#[test]
fn a_backup_is_what_was_written_or_nothing() {
    run(async {
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let manifest = take(&repository, None, &files(), 3, cloud.now()).await;
            assert_eq!((manifest.files, manifest.bytes), (3, 170_099));
            let all = outcomes(&repository, PLACE).await.unwrap();
            assert_eq!(all[&manifest.id], Outcome::Committed(Box::new(manifest.clone())));
            let expected = files().into_iter().map(|(path, content)| (path.to_vec(), content)).collect();
            assert_eq!(read_back(&repository, &manifest).await.unwrap(), expected);
        }
    });
}

#[test]
fn case_15_a_crash_at_any_write_leaves_no_backup_and_the_next_one_works() {
    run(async {
        // The store stops taking anything after so many objects.
        for allowed in 0..6 {
            let cloud = Cloud::new(1);
            let repository = repository(&cloud).await;
            let before = cloud.names().len();
            let weather = Arc::clone(&cloud);
            let crash = async move {
                let backup = Backup::begin(&repository, beginning(None, START, weather.now())).await.ok()?;
                let stop_at = |done: usize| weather.bad(|weather| weather.unwritable = done >= allowed);
                stop_at(1);
                archive(&repository).put_segment(segment(1, 3), &wal(segment(1, 3), 3)).await.ok()?;
                let (mut packs, mut maps) = (backup.packs(FULL_FRAME_PAGES), backup.maps());
                let mut file = packs.file();
                stop_at(2);
                file.write(&Random(1).bytes(5000)).await.ok()?;
                maps.push(&Entry::file("a", 0o600, file.finish().await.ok()?)).await.ok()?;
                let packs = packs.finish().await.ok()?;
                stop_at(3);
                let maps = maps.finish().await.ok()?;
                stop_at(4);
                let proof = archive(&repository).prove(Timeline(1), START, Lsn(START.0 + 9)).await.ok()?;
                let facts = facts(START, Timeline(1), weather.now());
                backup.commit(vec![packs], maps, proof, facts).await.ok()
            };
            cloud.bad(|weather| weather.unwritable = allowed == 0);
            let done = crash.await;
            assert_eq!(done.is_some(), allowed > 4, "{allowed} objects were written");
            cloud.bad(|weather| weather.unwritable = false);
            assert_eq!(cloud.names().len() - before, allowed, "one object for each step");

            let store = crate::store::Store::over(Arc::clone(&cloud) as Arc<dyn object_store::ObjectStore>);
            let again = Repository::open(store, None).await.unwrap();
            let there = outcomes(&again, PLACE).await.unwrap();
            assert_eq!(there.len(), usize::from(done.is_some()));
            cloud.pass(std::time::Duration::from_secs(1));
            let next = take(&again, None, &files(), 3, cloud.now()).await;
            assert_eq!(read_back(&again, &next).await.unwrap().len(), 3);
        }
    });
}

#[test]
fn a_lost_answer_to_the_manifest_is_found_out() {
    run(async {
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let now = cloud.now();
            let (backup, packs, maps, proof) = prepare(&repository, None, &files(), 3, now).await;
            cloud.bad(|weather| weather.lose_answers = 1);
            let facts = facts(proof.start, Timeline(1), now);
            let manifest = backup.commit(packs, maps, proof, facts).await.unwrap();
            assert_eq!(read_back(&repository, &manifest).await.unwrap().len(), 3);

            // Nor can it be asked what came of it: then nobody says that it is there.
            cloud.pass(std::time::Duration::from_secs(1));
            let now = cloud.now();
            let (backup, packs, maps, proof) = prepare(&repository, None, &files(), 4, now).await;
            let (id, facts) = (backup.id(), self::facts(proof.start, Timeline(1), now));
            cloud.bad(|weather| (weather.lose_answers, weather.cut) = (1, 1));
            let error = backup.commit(packs, maps, proof, facts).await.unwrap_err();
            assert!(matches!(error, CommitError::Write(_)), "{error}");
            cloud.bad(|weather| weather.cut = 0);
            let there = outcomes(&repository, PLACE).await.unwrap();
            assert!(matches!(there[&id], Outcome::Committed(_)), "whoever looks later finds it");
        }
    });
}

#[test]
fn proofs_are_compared_with_each_other() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let archive = archive_of(&repository, [3, 4]).await;
        let begin = async || {
            cloud.pass(std::time::Duration::from_secs(1));
            Backup::begin(&repository, beginning(None, START, cloud.now())).await.unwrap()
        };
        let proof = archive.prove(Timeline(1), START, Lsn(START.0 + 9)).await.unwrap();
        let facts = facts(START, Timeline(1), cloud.now());

        // A map of a file whose pack was begun, and never finished.
        let backup = begin().await;
        let (mut packs, mut maps) = (backup.packs(FULL_FRAME_PAGES), backup.maps());
        let mut file = packs.file();
        file.write(b"content").await.unwrap();
        maps.push(&Entry::file("a", 0o600, file.finish().await.unwrap())).await.unwrap();
        drop(packs);
        let maps = maps.finish().await.unwrap();
        let error = backup.commit(Vec::new(), maps, proof.clone(), facts.clone()).await.unwrap_err();
        assert!(matches!(error, CommitError::PackNotProven { number: 0, .. }), "{error}");

        // The maps of another backup.
        let (one, other) = (begin().await, begin().await);
        let mut maps = other.maps();
        maps.push(&Entry::directory("a", 0o700)).await.unwrap();
        let maps = maps.finish().await.unwrap();
        let error = one.commit(Vec::new(), maps, proof.clone(), facts.clone()).await.unwrap_err();
        assert!(matches!(error, CommitError::OtherProof { .. }), "{error}");

        // WAL that nobody kept for it.
        let late = Lsn(START.0 + 5);
        cloud.pass(std::time::Duration::from_secs(1));
        let backup = Backup::begin(&repository, beginning(None, late, cloud.now())).await.unwrap();
        let mut maps = backup.maps();
        maps.push(&Entry::directory("a", 0o700)).await.unwrap();
        let maps = maps.finish().await.unwrap();
        let error = backup.commit(Vec::new(), maps, proof.clone(), facts.clone()).await.unwrap_err();
        assert!(matches!(error, CommitError::NotPinned { .. }), "{error}");

        // A label of another position: recovery would begin elsewhere.
        let backup = begin().await;
        let mut maps = backup.maps();
        maps.push(&Entry::directory("a", 0o700)).await.unwrap();
        let maps = maps.finish().await.unwrap();
        let label = Facts { backup_label: Text::new(b"START WAL LOCATION: 0/28 (file x)\n"), ..facts };
        let error = backup.commit(Vec::new(), maps, proof, label).await.unwrap_err();
        assert!(format!("{error:?}").contains("does not begin at"), "{error:?}");
    });
}

#[test]
fn whoever_was_given_up_cannot_commit() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        archive(&repository).put_segment(segment(1, 3), &wal(segment(1, 3), 3)).await.unwrap();
        let backup = Backup::begin(&repository, beginning(None, START, cloud.now())).await.unwrap();
        let mut maps = backup.maps();
        maps.push(&Entry::directory("a", 0o700)).await.unwrap();
        let abandoned =
            Abandoned { id: backup.id(), at: cloud.now(), why: "a test".to_owned(), continued_by: None };
        let name = PLACE.backup(backup.id());
        document::put(repository.store(), &name, &abandoned, repository.protection()).await.unwrap();
        let proof = archive(&repository).prove(Timeline(1), START, Lsn(START.0 + 9)).await.unwrap();
        let maps = maps.finish().await.unwrap();
        let facts = facts(START, Timeline(1), cloud.now());
        let error = backup.commit(Vec::new(), maps, proof, facts).await.unwrap_err();
        assert!(matches!(error, CommitError::Abandoned { .. }), "{error}");
    });
}

#[test]
fn a_parent_that_is_going_or_never_was_is_not_built_upon() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let parent = take(&repository, None, &files(), 3, cloud.now()).await.id;
        let begin = async |parent: BackupId| {
            cloud.pass(std::time::Duration::from_secs(1));
            Backup::begin(&repository, beginning(Some(parent), START, cloud.now())).await
        };
        assert_eq!(begin(parent).await.unwrap().parent().unwrap().id, parent);
        crate::tombstone::bury(&repository, PLACE, parent, "a test", cloud.now()).await.unwrap();
        let error = begin(parent).await.unwrap_err();
        assert!(matches!(error, BeginError::Parent { .. }), "{error}");
        crate::tombstone::undelete(&repository, PLACE, parent, cloud.now()).await.unwrap();
        begin(parent).await.unwrap();
        let never = begin("20200101T000000".parse().unwrap()).await.unwrap_err();
        assert!(never.to_string().contains("there is no such backup"), "{never}");

        let one = Backup::begin(&repository, beginning(None, START, cloud.now())).await;
        assert!(matches!(one.unwrap_err(), BeginError::Taken { .. }), "the second of the last one is taken");
    });
}

/// What a restore would get: all files, or an error.
async fn restored(repository: &Repository, id: BackupId) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ReadError> {
    match outcome(repository, PLACE, id).await? {
        Some(Outcome::Committed(manifest)) => read_back(repository, &manifest).await,
        other => panic!("the manifest became {other:?}"),
    }
}

#[test]
fn every_changed_byte_of_a_manifest_and_a_map_is_noticed() {
    run(async {
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let id = take(&repository, None, &files(), 3, cloud.now()).await.id;
            let expected = restored(&repository, id).await.unwrap();
            for name in [PLACE.backup(id), PLACE.map(id, 0)] {
                let right = cloud.bytes(name.as_str()).unwrap();
                for at in 0..right.len() {
                    let mut wrong = right.to_vec();
                    wrong[at] ^= 1 << (at % 8);
                    cloud.damage(name.as_str(), wrong);
                    if let Ok(read) = restored(&repository, id).await {
                        assert_eq!(read, expected, "{name}: byte {at} of {} was read wrongly", right.len());
                    }
                }
                cloud.damage(name.as_str(), right);
            }
        }
    });
}

/// Flips bits all over packs; says how many restores were wrong, and how many failed.
fn flips_over_packs(rounds: u64) -> (u64, u64) {
    run(async {
        let (mut wrong, mut failed) = (0, 0);
        let mut random = Random(23);
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let manifest = take(&repository, None, &files(), 3, cloud.now()).await;
            let expected = read_back(&repository, &manifest).await.unwrap();
            let name = PLACE.pack(manifest.id, 0);
            let right = cloud.bytes(name.as_str()).unwrap();
            for _ in 0..rounds {
                let mut damaged = right.to_vec();
                for _ in 0..=random.below(3) {
                    let at = random.below(damaged.len() as u64) as usize;
                    damaged[at] ^= 1 << random.below(8);
                }
                cloud.damage(name.as_str(), damaged);
                match read_back(&repository, &manifest).await {
                    Ok(read) => wrong += u64::from(read != expected),
                    Err(_) => failed += 1,
                }
            }
        }
        (wrong, failed)
    })
}

#[test]
fn damage_to_packs_is_never_restored() {
    let (wrong, failed) = flips_over_packs(700);
    assert_eq!(wrong, 0);
    assert!(failed >= 1390, "nearly every flip hits something: {failed} of 1400");
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let good = take(&repository, None, &files(), 3, cloud.now()).await;
        good.validate().unwrap();
        type Change = fn(&mut Manifest);
        let changes: &[(&str, Change)] = &[
            ("not older", |manifest| manifest.parent = Some(manifest.id)),
            ("PostgreSQL's version", |manifest| manifest.facts.postgresql_version = 90_600),
            ("pages of", |manifest| manifest.facts.page_bytes = 5000),
            ("no size of WAL segments", |manifest| manifest.wal_segment_bytes = 5 << 20),
            ("WAL from", |manifest| manifest.stop = Lsn(1)),
            ("is empty", |manifest| manifest.timeline = Timeline(2)),
            ("does not begin before", |manifest| {
                manifest.timeline = Timeline(2);
                manifest.history = vec![Fork { timeline: Timeline(1), until: Lsn(u64::MAX) }];
            }),
            ("label", |manifest| manifest.start = Lsn(manifest.start.0 - 8)),
            ("label that is not", |manifest| {
                manifest.facts.backup_label = Text::Bytes { hex: "0g".to_owned() };
            }),
            ("no map", |manifest| manifest.maps.clear()),
            ("not numbered", |manifest| manifest.maps[0].number = 1),
            ("not in order", |manifest| {
                let packs = manifest.packs.values_mut().next().unwrap();
                packs.push(packs[0]);
            }),
            ("which is not before it", |manifest| {
                let packs = manifest.packs.pop_first().unwrap().1;
                manifest.packs.insert("20991231T000000".parse().unwrap(), packs);
            }),
        ];
        for (what, change) in changes {
            let mut wrong = good.clone();
            change(&mut wrong);
            let error = wrong.validate().unwrap_err();
            assert!(error.contains(what), "{what}: {error}");
            let name = PLACE.backup(good.id);
            assert!(document::encode(&wrong, &name, &Protection::Plain).is_err(), "{what} is not written");
        }
        // One manifest under the name of another.
        let name = PLACE.backup("20301231T000000".parse().unwrap());
        let bytes = cloud.bytes(PLACE.backup(good.id).as_str()).unwrap();
        repository.store().put(&name, bytes).await.unwrap();
        let error = outcomes(&repository, PLACE).await.unwrap_err();
        assert!(format!("{error:?}").contains("OtherObject"), "{error:?}");
    });
}

#[test]
fn text_is_kept_byte_by_byte() {
    for bytes in [b"".as_slice(), b"16384 /srv/a b\n", b"16384 /srv/\xff\n"] {
        let text = Text::new(bytes);
        let stored = serde_json::to_string(&text).unwrap();
        assert_eq!(serde_json::from_str::<Text>(&stored).unwrap().bytes().unwrap(), bytes);
    }
}

#[test]
fn a_full_repository_is_an_error_and_what_was_there_stays() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let manifest = take(&repository, None, &files(), 3, cloud.now()).await;
        cloud.pass(std::time::Duration::from_secs(1));
        cloud.bad(|weather| weather.unwritable = true);
        let error = Backup::begin(&repository, beginning(Some(manifest.id), START, cloud.now())).await;
        let BeginError::Write(document::WriteError::Store(error)) = error.unwrap_err() else { panic!() };
        assert_eq!(error.failure, Failure::Failed);
        assert_eq!(read_back(&repository, &manifest).await.unwrap().len(), 3);
    });
}
