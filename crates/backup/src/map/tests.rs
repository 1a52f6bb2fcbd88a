//! Maps: arbitrary entries come back in order over several objects, and nothing else is believed.

use proptest::prelude::*;

use super::*;
use crate::testing::{Cloud, PLACE, Random, encrypted, repository, run};

fn backup() -> BackupId {
    "20261120T000000".parse().unwrap()
}

fn file(path: Vec<u8>, size: u64, seed: u64) -> Entry {
    let mut random = Random(seed);
    let mut runs = Vec::new();
    let mut left = pages_of(size);
    while left > 0 {
        let pages = (1 + random.below(128)).min(left) as u32;
        let pack = PackId { backup: backup(), number: random.below(300) as u32 };
        runs.push(Run { pages, pack, frame: random.next() as u32, at: random.below(1 << 20) as u32 });
        left -= u64::from(pages);
    }
    let groups = 0..size.div_ceil(GROUP_BYTES as u64);
    let changes = groups.map(|_| Change(random.next().to_le_bytes())).collect();
    let hash = (random.below(2) == 0).then(|| Hash::of(&path));
    Entry::file(path, 0o600, Placed { size, hash, runs, changes })
}

fn part() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("a part of a path", |byte| !matches!(byte, 0 | b'/'));
    proptest::collection::vec(byte, 1..8).prop_filter("not special", |part| part != b"." && part != b"..")
}

fn entry() -> impl Strategy<Value = Entry> {
    let path = proptest::collection::vec(part(), 1..4).prop_map(|parts| parts.join(&b'/'));
    (path, 0u8..4, 0u64..40_000_000, any::<u64>()).prop_map(|(path, kind, size, seed)| match kind {
        0 => Entry::directory(path, 0o700),
        1 => Entry::symlink(path, b"../elsewhere".as_slice()),
        _ => file(path, size, seed),
    })
}

async fn write(repository: &Repository, entries: &[Entry], target: usize) -> Result<DurableMaps, WriteError> {
    let mut maps = MapWriter::new(repository.clone(), PLACE, backup()).with_target(target);
    for entry in entries {
        maps.push(entry).await?;
    }
    maps.finish().await
}

async fn read(repository: &Repository, maps: &[MapEntry]) -> Result<Vec<Entry>, ReadError> {
    let mut reader = MapReader::new(repository.clone(), PLACE, backup(), maps.to_vec());
    let mut entries = Vec::new();
    while let Some(entry) = reader.next().await? {
        entries.push(entry);
    }
    Ok(entries)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn arbitrary_entries_come_back(
        entries in proptest::collection::btree_map(part(), entry(), 1..40),
        target in prop_oneof![Just(1usize), Just(3000), Just(TARGET_BYTES)],
        sealed: bool,
    ) {
        let mut entries: Vec<Entry> = entries.into_values().collect();
        entries.sort_by(|one, next| one.path.cmp(&next.path));
        entries.dedup_by(|one, next| one.path == next.path);
        run(async {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let durable = write(&repository, &entries, target).await.unwrap();
            assert_eq!(read(&repository, &durable.maps).await.unwrap(), entries);
            assert_eq!(durable.maps.iter().map(|map| map.entries).sum::<u64>(), entries.len() as u64);
            let packs: std::collections::BTreeSet<PackId> =
                entries.iter().flat_map(|entry| entry.runs.iter().map(|run| run.pack)).collect();
            assert_eq!(durable.packs, packs);
        });
    }

    #[test]
    fn any_bytes_are_an_entry_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        // What is decoded can be encoded again to the same bytes: no entry has two spellings.
        if let Ok(Some((entry, length))) = decode(&bytes)
            && entry.validate().is_ok()
            && entry.kind != Kind::File
        {
            let mut again = Vec::new();
            encode(&entry, &mut again).unwrap();
            prop_assert_eq!(&again[..], &bytes[..length]);
        }
    }
}

#[test]
fn paths_that_lead_elsewhere_and_entries_that_contradict_themselves_are_refused() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        for path in ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", "./a", "a\0b"] {
            let refused = write(&repository, &[Entry::directory(path, 0o700)], 1).await;
            assert!(refused.is_err(), "{path:?}");
        }
        let long = Entry::directory(vec![b'x'; MAX_PATH_BYTES + 1], 0o700);
        assert!(write(&repository, &[long], 1).await.is_err());
        let order = [Entry::directory("b", 0o700), Entry::directory("a", 0o700)];
        assert!(write(&repository, &order, 1 << 20).await.is_err(), "out of order");
        let twice = [Entry::directory("b", 0o700), Entry::directory("b", 0o700)];
        assert!(write(&repository, &twice, 1 << 20).await.is_err(), "twice");

        let good = file(b"a".to_vec(), 100_000, 1);
        let mut short = good.clone();
        short.runs.pop();
        let mut hashes = good.clone();
        hashes.changes.pop();
        for wrong in [short, hashes, Entry { mode: 0o10_000, ..good.clone() }] {
            assert!(write(&repository, &[wrong], 1).await.is_err());
        }
        assert!(write(&repository, &[good], 1).await.is_ok());
    });
}

#[test]
fn maps_that_are_missing_swapped_or_shortened_are_noticed() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let entries: Vec<Entry> =
            (0..30u8).map(|number| file(vec![b'a' + number], 200_000, u64::from(number))).collect();
        let maps = write(&repository, &entries, 1000).await.unwrap().maps;
        assert!(maps.len() > 2);

        let swapped = [maps[1].clone(), maps[0].clone()];
        assert!(read(&repository, &swapped).await.is_err(), "paths go back");
        let mut fewer = maps.clone();
        fewer[0].entries += 1;
        assert!(read(&repository, &fewer).await.is_err(), "an entry is missing");
        let mut other = maps.clone();
        other[0].hash = maps[1].hash;
        assert!(read(&repository, &other).await.is_err(), "the manifest means another one");
    });
}

#[test]
fn an_entry_that_comes_last_stands_where_its_path_belongs() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let entries: Vec<Entry> = [b"base", b"glob", b"late", b"xact"]
            .iter()
            .zip(0..)
            .map(|(path, seed)| file(path.to_vec(), 200_000, seed))
            .collect();
        for late in 0..entries.len() {
            let mut maps = MapWriter::new(repository.clone(), PLACE, backup_of(late)).with_target(2000);
            let mut room = None;
            for (at, entry) in entries.iter().enumerate() {
                match at == late {
                    true => room = Some(maps.leave_room(&entry.path).await.unwrap()),
                    false => maps.push(entry).await.unwrap(),
                }
            }
            maps.fill(room.unwrap(), &entries[late]).await.unwrap();
            let durable = maps.finish().await.unwrap();
            assert_eq!(durable.files, 4);
            let place = backup_of(late);
            let mut reader = MapReader::new(repository.clone(), PLACE, place, durable.maps);
            for entry in &entries {
                assert_eq!(reader.next().await.unwrap().as_ref(), Some(entry));
            }
            assert_eq!(reader.next().await.unwrap(), None);
        }
        let mut maps = MapWriter::new(repository.clone(), PLACE, backup_of(7));
        let room = maps.leave_room(b"late").await.unwrap();
        maps.push(&entries[3]).await.unwrap();
        assert!(maps.fill(room, &entries[1]).await.is_err(), "another path");
        assert!(maps.finish().await.is_err(), "a place is empty");
    });
}

fn backup_of(number: usize) -> BackupId {
    format!("20261121T00000{number}").parse().unwrap()
}

#[test]
fn memory_does_not_grow_with_the_number_of_files() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let mut maps = MapWriter::new(repository.clone(), PLACE, backup());
        for number in 0..20_000u32 {
            let path = format!("base/16384/{number:08}").into_bytes();
            maps.push(&file(path, 8192, 1)).await.unwrap();
            assert!(maps.buffer.len() < FRAME_BYTES, "the writer holds less than a frame");
        }
        let durable = maps.finish().await.unwrap();
        let mut reader = MapReader::new(repository, PLACE, backup(), durable.maps);
        let mut count = 0;
        while reader.next().await.unwrap().is_some() {
            let held = reader.open.as_ref().map_or(0, |open| open.buffer.len());
            assert!(held <= FRAME_BYTES + 1024, "the reader holds {held} bytes");
            count += 1;
        }
        assert_eq!(count, 20_000);
    });
}

#[test]
fn change_hashes_of_two_repositories_differ() {
    run(async {
        let (one, two) = (repository(&Cloud::new(1)).await, repository(&Cloud::new(2)).await);
        let content = [7; GROUP_BYTES + 1];
        assert_eq!(changes_of(&one, &content).len(), 2);
        assert_ne!(
            changes_of(&one, &content),
            changes_of(&two, &content),
            "nobody can compute them in advance"
        );
    });
}
