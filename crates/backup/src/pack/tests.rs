//! Files through packs: arbitrary ones come back, small ones share, parents are referred to, memory stays bounded.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::backup::Backup;
use crate::map::{GROUP_BYTES, changes_of};
use crate::testing::{Cloud, PLACE, Random, beginning, encrypted, read_back, repository, run, take};
use pgherd_core::types::Lsn;

fn writer(repository: &Repository, target: usize, frame_pages: usize) -> PackWriter {
    let id = "20261120T000000".parse().unwrap();
    PackWriter::new(repository.clone(), PLACE, id, Arc::default(), frame_pages).with_target(target)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn arbitrary_files_come_back(
        sizes in proptest::collection::vec(prop_oneof![0usize..100, 8000usize..9000, 100_000usize..300_000], 1..8),
        cuts in proptest::collection::vec(1usize..50_000, 1..4),
        seed: u64,
        sealed: bool,
        target in prop_oneof![Just(1usize), Just(60_000), Just(TARGET_BYTES)],
        frame_pages in 1usize..40,
    ) {
        let mut random = Random(seed);
        let contents: Vec<Vec<u8>> = sizes.iter().map(|size| random.bytes(*size)).collect();
        run(async {
            let cloud = Cloud::new(seed);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let mut packs = writer(&repository, target, frame_pages);
            let mut entries = Vec::new();
            for content in &contents {
                let mut file = packs.file();
                let mut rest = content.as_slice();
                for cut in cuts.iter().cycle() {
                    let (now, later) = rest.split_at((*cut).min(rest.len()));
                    file.write(now).await.unwrap();
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
                let placed = file.finish().await.unwrap();
                assert_eq!(placed.hash, Some(Hash::of(content)));
                assert_eq!(placed.changes, changes_of(&repository, content));
                entries.push(Entry::file(b"x".as_slice(), 0o600, placed));
            }
            let durable = packs.finish().await.unwrap();
            let hashes = durable.packs.iter().map(|pack| {
                (PackId { backup: durable.backup, number: pack.number }, pack.hash)
            });
            let mut reader = PackReader::new(repository.clone(), PLACE, hashes.collect());
            for (entry, content) in entries.iter().zip(&contents) {
                let mut read = Vec::new();
                let take = async |piece: &[u8]| {
                    read.extend_from_slice(piece);
                    Ok::<_, ReadError>(())
                };
                reader.read_file(entry, take).await.unwrap();
                assert_eq!(&read, content);
            }
        });
    }
}

#[test]
fn small_files_share_frames_and_packs_are_closed_in_time() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let mut packs = writer(&repository, 200_000, FULL_FRAME_PAGES);
        let mut frames = std::collections::BTreeSet::new();
        let mut random = Random(3);
        for _ in 0..200 {
            let mut file = packs.file();
            file.write(&random.bytes(700)).await.unwrap();
            let placed = file.finish().await.unwrap();
            frames.insert((placed.runs[0].pack, placed.runs[0].frame));
        }
        assert_eq!(frames.len(), 1, "200 files of 700 bytes fit into one frame");
        for _ in 0..10 {
            let mut file = packs.file();
            file.write(&random.bytes(200_000)).await.unwrap();
            file.finish().await.unwrap();
        }
        let durable = packs.finish().await.unwrap();
        assert!(durable.packs.len() >= 5, "{} packs", durable.packs.len());
        let largest = durable.packs.iter().map(|pack| pack.bytes).max().unwrap();
        assert!(largest < 200_000 + 2 * MAX_FRAME_BYTES as u64, "a pack has {largest} bytes");
    });
}

#[test]
fn what_did_not_change_is_referred_to() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let mut random = Random(5);
        let old = random.bytes(40 * PAGE_BYTES);
        let parent = take(&repository, None, &[(b"base/1/1", old.clone())], 3, cloud.now()).await;
        let entry = parent.entries(&repository).next().await.unwrap().unwrap();

        cloud.pass(std::time::Duration::from_secs(60));
        let mut new = old.clone();
        new[9 * PAGE_BYTES..10 * PAGE_BYTES].copy_from_slice(&random.bytes(PAGE_BYTES));
        let changes = changes_of(&repository, &new);
        let differ: Vec<usize> = (0..changes.len()).filter(|at| changes[*at] != entry.changes[*at]).collect();
        assert_eq!(differ, [2], "page 9 is in the third group of four pages");

        let begun = beginning(Some(parent.id), Lsn(3 << 20), cloud.now());
        let backup = Backup::begin(&repository, begun).await.unwrap();
        let mut packs = backup.packs(INCREMENTAL_FRAME_PAGES);
        for unread in [false, true] {
            let mut file = packs.file();
            for (group, content) in new.chunks(GROUP_BYTES).enumerate() {
                if differ.contains(&group) {
                    file.write(content).await.unwrap();
                } else {
                    let pages = pages_of(content.len() as u64);
                    let runs = part_of(&entry.runs, group as u64 * 4, pages);
                    let kept = match unread {
                        true => Kept::Unread(&entry.changes[group..=group]),
                        false => Kept::Read(content, &changes[group..=group]),
                    };
                    file.keep(&runs, content.len() as u64, kept).await.unwrap();
                }
            }
            let placed = file.finish().await.unwrap();
            assert_eq!(placed.changes, changes);
            assert_eq!(placed.hash.is_none(), unread);
            let own = placed.runs.iter().filter(|run| run.pack.backup == backup.id()).count();
            assert_eq!(own, 1, "one group was written");
        }
        let mut file = packs.file();
        let odd = file.keep(&entry.runs, 5, Kept::Read(b"12345", &changes[..1])).await;
        assert!(odd.is_err(), "runs of 40 pages are not five bytes");
    });
}

#[test]
fn a_pack_that_the_manifest_does_not_name_or_that_is_another_is_not_read() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let file = || (b"a".as_slice(), Random(1).bytes(5000));
        let manifest = take(&repository, None, &[file()], 3, cloud.now()).await;
        assert_eq!(read_back(&repository, &manifest).await.unwrap().len(), 1);

        let mut without = manifest.clone();
        without.packs.clear();
        let error = read_back(&repository, &without).await.unwrap_err();
        assert!(format!("{error:?}").contains("does not name it"), "{error:?}");
        let id = PackId { backup: manifest.id, number: 0 };
        let error = without.contents(&repository).stored(id).await.unwrap_err();
        assert!(format!("{error:?}").contains("does not name it"), "{error:?}");

        // A complete and correct pack of the same name, from another life of the repository.
        let pack = PLACE.pack(manifest.id, 0);
        let mut writer = Writer::new(Kind::Pack, pack.clone(), repository.protection()).unwrap();
        writer.push(&Random(2).bytes(5000)).unwrap();
        cloud.damage(pack.as_str(), writer.finish(&[]).unwrap().bytes);
        let error = read_back(&repository, &manifest).await.unwrap_err();
        assert!(format!("{error:?}").contains("OtherObject"), "{error:?}");
        let error = manifest.contents(&repository).stored(id).await.unwrap_err();
        assert!(format!("{error:?}").contains("OtherObject"), "{error:?}");

        cloud.remove(pack.as_str());
        let error = read_back(&repository, &manifest).await.unwrap_err();
        assert!(error.is_absent(), "{error}");
    });
}

#[test]
fn damage_to_a_pack_is_seen_without_decompressing_it() {
    run(async {
        let mut random = Random(17);
        for sealed in [false, true] {
            let cloud = Cloud::new(1);
            let repository = if sealed { encrypted(&cloud).await } else { repository(&cloud).await };
            let file = (b"a".as_slice(), random.bytes(5000));
            let manifest = take(&repository, None, &[file], 3, cloud.now()).await;
            let id = PackId { backup: manifest.id, number: 0 };
            let name = PLACE.pack(manifest.id, 0).to_string();
            let right = cloud.bytes(&name).unwrap();
            let stored = manifest.contents(&repository).stored(id).await.unwrap();
            assert_eq!(stored, right.len() as u64);
            for _ in 0..350 {
                let mut wrong = right.to_vec();
                let at = random.below(wrong.len() as u64) as usize;
                wrong[at] ^= 1 << random.below(8);
                cloud.damage(&name, wrong);
                assert!(manifest.contents(&repository).stored(id).await.is_err(), "byte {at}");
            }
        }
    });
}

#[test]
fn a_part_of_runs_has_the_pages_asked_for() {
    let pack = PackId { backup: "20261120T000000".parse().unwrap(), number: 0 };
    let runs = [Run { pages: 4, pack, frame: 0, at: 0 }, Run { pages: 3, pack, frame: 1, at: 8192 }];
    let part = part_of(&runs, 3, 3);
    assert_eq!(part[0], Run { pages: 1, pack, frame: 0, at: 3 * 8192 });
    assert_eq!(part[1], Run { pages: 2, pack, frame: 1, at: 8192 });
    assert_eq!(part_of(&runs, 0, 7), runs);
    assert!(part_of(&runs, 7, 5).is_empty());
}
