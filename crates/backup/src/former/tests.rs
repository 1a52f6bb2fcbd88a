//! A backup that was not completed, and those that go on from it, beside collections.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use pgherd_core::types::{Lsn, Timeline};

use super::*;
use crate::backup::{Backup, Beginning, CommitError};
use crate::breakage::{Broken, breaking};
use crate::collect::{CollectError, Patience, Report, collect};
use crate::keys::Secret;
use crate::map::changes_of;
use crate::pack::{FULL_FRAME_PAGES, Kept, part_of};
use crate::store::Store;
use crate::store::directory::{Directory, Step};
use crate::testing::{
    Cloud, PLACE, Random, SEGMENT_BYTES, archive_of, beginning, encrypted, facts, prepare, read_back,
    repository, run, take,
};

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Patience = Patience { grace: HOUR, lease: HOUR };

fn file(number: u64) -> Vec<u8> {
    Random(number).bytes(6 * GROUP_BYTES + 100)
}

fn wanted(silence: Duration) -> Wanted {
    Wanted { node: "a".parse().unwrap(), term: Term(1), parent: None, silence }
}

fn start(number: u64) -> Lsn {
    Lsn(number * u64::from(SEGMENT_BYTES) + 0x28)
}

/// Begins a full backup, which goes on from another one if there is any.
async fn begin(repository: &Repository, cloud: &Arc<Cloud>, continues: Option<BackupId>) -> Backup {
    let begun = Beginning { continues, ..beginning(None, start(3), cloud.now()) };
    Backup::begin(repository, begun).await.unwrap()
}

/// Stores files up to somewhere, what is there already as a reference, and leaves it so.
async fn store(repository: &Repository, backup: &Backup, files: &[(&str, Vec<u8>)]) -> Stored {
    let (mut packs, mut maps) = (backup.packs(FULL_FRAME_PAGES), backup.maps());
    let mut left = backup.former().map(|former| former.left(repository));
    let mut kept = 0;
    for (path, content) in files {
        let known = match &mut left {
            Some(left) => left.file(path.as_bytes()).await,
            None => None,
        };
        let mut file = packs.file();
        let changes = changes_of(repository, content);
        for (number, group) in content.chunks(GROUP_BYTES).enumerate() {
            let is_same = |known: &&Entry| {
                known.changes.get(number).is_some_and(|before| before.is_same(changes[number]))
            };
            match known.as_ref().filter(is_same) {
                None => file.write(group).await.unwrap(),
                Some(known) => {
                    let page = (number * GROUP_BYTES / PAGE_BYTES) as u64;
                    let runs = part_of(&known.runs, page, group.len().div_ceil(PAGE_BYTES) as u64);
                    let same = Kept::Read(group, &changes[number..=number]);
                    file.keep(&runs, group.len() as u64, same).await.unwrap();
                    kept += group.len();
                }
            }
        }
        maps.push(&Entry::file(*path, 0o600, file.finish().await.unwrap())).await.unwrap();
    }
    maps.settle().await.unwrap();
    Stored { packs: packs.finish().await.unwrap(), maps, kept }
}

struct Stored {
    packs: crate::pack::DurablePacks,
    maps: crate::map::MapWriter,
    kept: usize,
}

async fn commit(
    repository: &Repository,
    cloud: &Arc<Cloud>,
    backup: Backup,
    stored: Stored,
) -> Result<Manifest, CommitError> {
    let archive = archive_of(repository, [3]).await;
    let proof = archive.prove(Timeline(1), start(3), Lsn(start(3).0 + 9)).await.unwrap();
    let facts = facts(start(3), Timeline(1), cloud.now());
    backup.commit(vec![stored.packs], stored.maps.finish().await.unwrap(), proof, facts).await
}

async fn collected(repository: &Repository, cloud: &Arc<Cloud>) -> Result<Report, CollectError> {
    collect(repository, PLACE, PATIENCE, cloud.now()).await
}

fn count(cloud: &Cloud, kind: &str) -> usize {
    cloud.names().iter().filter(|name| name.contains(kind)).count()
}

#[test]
fn what_was_stored_is_referred_to_and_stays_as_long_as_somebody_needs_it() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let first = begin(&repository, &cloud, None).await;
        let left = first.id();
        store(&repository, &first, &[("a", file(1)), ("b", file(2))]).await;
        cloud.pass(HOUR / 2);
        assert_eq!(find(&repository, PLACE, &wanted(HOUR), cloud.now()).await.unwrap(), None, "it may live");
        assert_eq!(find(&repository, PLACE, &wanted(HOUR / 2), cloud.now()).await.unwrap(), Some(left));

        let second = begin(&repository, &cloud, Some(left)).await;
        assert_eq!(second.former().unwrap().id(), left);
        cloud.pass(HOUR / 2);
        let mut changed = file(2);
        changed[GROUP_BYTES + 5] ^= 1;
        let files = [("a", file(1)), ("b", changed.clone()), ("c", file(3))];
        let stored = store(&repository, &second, &files).await;
        assert_eq!(stored.kept, file(1).len() + file(2).len() - GROUP_BYTES, "all but what has changed");
        // The former one is older than any lease, and given up.
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!((report.packs, report.maps, report.abandoned.len()), (0, 0, 0));
        let id = second.id();
        let manifest = commit(&repository, &cloud, second, stored).await.unwrap();
        assert_eq!((manifest.parent, manifest.continues), (None, Some(left)));
        assert_eq!(manifest.packs.keys().copied().collect::<Vec<_>>(), [left, id]);

        cloud.pass(3 * HOUR);
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!((report.packs, report.maps), (0, 1), "its pack is needed, and its map is not");
        let read = read_back(&repository, &manifest).await.unwrap();
        for (path, content) in &files {
            assert_eq!(&read[path.as_bytes()], content, "{path}");
        }
        tombstone::bury(&repository, PLACE, id, "retention", cloud.now()).await.unwrap();
        cloud.pass(2 * HOUR);
        collected(&repository, &cloud).await.unwrap();
        assert_eq!((count(&cloud, "/packs/"), count(&cloud, "/maps/")), (0, 0), "nobody needs it any more");
    });
}

#[test]
fn a_build_that_does_not_look_who_goes_on_is_caught() {
    let lost = |rule| {
        breaking(rule, || {
            run(async {
                let cloud = Cloud::new(2);
                let repository = repository(&cloud).await;
                let first = begin(&repository, &cloud, None).await;
                store(&repository, &first, &[("a", file(1))]).await;
                cloud.pass(2 * HOUR);
                let second = begin(&repository, &cloud, Some(first.id())).await;
                let stored = store(&repository, &second, &[("a", file(1))]).await;
                collected(&repository, &cloud).await.unwrap();
                let manifest = commit(&repository, &cloud, second, stored).await.unwrap();
                read_back(&repository, &manifest).await.is_err()
            })
        })
    };
    assert!(!lost(None));
    assert!(lost(Some(Broken::FormerIgnored)));
}

#[test]
fn one_of_two_goes_on_and_the_former_writer_cannot_commit_any_more() {
    run(async {
        let cloud = Cloud::new(3);
        let repository = repository(&cloud).await;
        let (first, packs, maps, proof) =
            prepare(&repository, None, &[(b"a", file(1))], 3, cloud.now()).await;
        let left = first.id();
        cloud.pass(Duration::from_secs(5));
        let second = begin(&repository, &cloud, Some(left)).await;
        assert!(second.former().is_some());
        cloud.pass(Duration::from_secs(5));
        let third = begin(&repository, &cloud, Some(left)).await;
        assert!(third.former().is_none(), "it begins from nothing");
        let late = first.commit(packs, maps, proof, facts(start(3), Timeline(1), cloud.now())).await;
        assert!(matches!(late.unwrap_err(), CommitError::Abandoned { .. }));
        for (backup, continues) in [(second, Some(left)), (third, None)] {
            let stored = store(&repository, &backup, &[("a", file(1))]).await;
            assert_eq!(stored.kept > 0, continues.is_some());
            let manifest = commit(&repository, &cloud, backup, stored).await.unwrap();
            assert_eq!(manifest.continues, continues);
            assert_eq!(read_back(&repository, &manifest).await.unwrap()[b"a".as_slice()], file(1));
        }
    });
}

#[test]
fn one_that_was_completed_or_collected_is_not_gone_on_from() {
    run(async {
        let cloud = Cloud::new(4);
        let repository = repository(&cloud).await;
        let whole = begin(&repository, &cloud, None).await;
        let stored = store(&repository, &whole, &[("a", file(1))]).await;
        let whole = commit(&repository, &cloud, whole, stored).await.unwrap();
        cloud.pass(Duration::from_secs(5));
        let given_up = begin(&repository, &cloud, None).await.id();
        cloud.pass(2 * HOUR);
        assert_eq!(collected(&repository, &cloud).await.unwrap().abandoned, [given_up].into());
        let now = cloud.now();
        assert_eq!(find(&repository, PLACE, &wanted(Duration::ZERO), now).await.unwrap(), None);
        for former in [whole.id, given_up] {
            cloud.pass(Duration::from_secs(5));
            assert!(begin(&repository, &cloud, Some(former)).await.former().is_none());
        }
    });
}

#[test]
fn only_what_the_same_has_left_is_found() {
    run(async {
        let cloud = Cloud::new(5);
        let repository = repository(&cloud).await;
        let left = begin(&repository, &cloud, None).await.id();
        cloud.pass(Duration::from_secs(5));
        let found = async |wanted: Wanted| find(&repository, PLACE, &wanted, cloud.now()).await.unwrap();
        let like = wanted(Duration::ZERO);
        assert_eq!(found(like.clone()).await, Some(left));
        assert_eq!(found(Wanted { node: "b".parse().unwrap(), ..like.clone() }).await, None);
        assert_eq!(found(Wanted { term: Term(7), ..like.clone() }).await, Some(left), "a later term");
        assert_eq!(
            found(Wanted { term: Term(0), ..like.clone() }).await,
            None,
            "by hand, and not by its agent"
        );
        assert_eq!(found(Wanted { parent: Some(left), ..like }).await, None);
    });
}

#[test]
fn attempts_one_behind_the_other_keep_what_each_has_stored() {
    run(async {
        let cloud = Cloud::new(6);
        let repository = repository(&cloud).await;
        let files: Vec<(&str, Vec<u8>)> =
            ["a", "b", "c", "d"].into_iter().zip(1..).map(|(path, number)| (path, file(number))).collect();
        let mut left = None;
        // The last of them does not come as far as the one before.
        for (reached, kept) in [(1, 0), (3, 1), (2, 2)] {
            let backup = begin(&repository, &cloud, left).await;
            let stored = store(&repository, &backup, &files[..reached]).await;
            assert_eq!(stored.kept, kept * file(1).len(), "up to {reached}");
            left = Some(backup.id());
            // Each of them lasts for less than a lease, and all of them for more.
            cloud.pass(HOUR / 2);
            assert_eq!(collected(&repository, &cloud).await.unwrap().packs, 0, "up to {reached}");
        }
        let last = begin(&repository, &cloud, left).await;
        let stored = store(&repository, &last, &files).await;
        assert_eq!(stored.kept, 3 * file(1).len());
        let manifest = commit(&repository, &cloud, last, stored).await.unwrap();
        assert_eq!(manifest.packs.len(), 3, "the one that came least far has stored nothing");
        cloud.pass(3 * HOUR);
        collected(&repository, &cloud).await.unwrap();
        let read = read_back(&repository, &manifest).await.unwrap();
        for (path, content) in &files {
            assert_eq!(&read[path.as_bytes()], content, "{path}");
        }
    });
}

#[test]
fn what_lies_in_packs_that_were_never_put_is_stored_again() {
    run(async {
        let cloud = Cloud::new(7);
        let repository = repository(&cloud).await;
        let first = begin(&repository, &cloud, None).await;
        // Its map is there, and its writer was killed before the pack was.
        let (mut packs, mut maps) = (first.packs(FULL_FRAME_PAGES), first.maps());
        let mut writing = packs.file();
        writing.write(&file(1)).await.unwrap();
        maps.push(&Entry::file("a", 0o600, writing.finish().await.unwrap())).await.unwrap();
        maps.settle().await.unwrap();
        drop(packs);
        cloud.pass(Duration::from_secs(5));
        let second = begin(&repository, &cloud, Some(first.id())).await;
        let stored = store(&repository, &second, &[("a", file(1))]).await;
        assert_eq!(stored.kept, 0);
        let manifest = commit(&repository, &cloud, second, stored).await.unwrap();
        assert_eq!(read_back(&repository, &manifest).await.unwrap()[b"a".as_slice()], file(1));
    });
}

#[test]
fn what_cannot_be_read_is_stored_again() {
    run(async {
        let cloud = Cloud::new(8);
        let repository = repository(&cloud).await;
        let files = [("a", file(1)), ("b", file(2))];
        for damaged in ["/packs/", "/maps/", "/heartbeat/", "/intent/"] {
            let mut first = begin(&repository, &cloud, None).await;
            first.beat(cloud.now()).await.unwrap();
            store(&repository, &first, &files).await;
            cloud.pass(Duration::from_secs(5));
            let name = cloud.names().into_iter().rfind(|name| name.contains(damaged)).unwrap();
            let right = cloud.bytes(&name).unwrap();
            // The end of a container is where it says what is in it.
            cloud.damage(&name, right.slice(..right.len() - 1));
            let found = find(&repository, PLACE, &wanted(Duration::from_secs(1)), cloud.now()).await.unwrap();
            let is_found = ["/packs/", "/maps/"].contains(&damaged);
            assert_eq!(found, is_found.then_some(first.id()), "{damaged}");
            let second = begin(&repository, &cloud, Some(first.id())).await;
            let stored = store(&repository, &second, &files).await;
            assert_eq!(stored.kept > 0, !is_found, "{damaged}");
            let manifest = commit(&repository, &cloud, second, stored).await.unwrap();
            assert_eq!(
                read_back(&repository, &manifest).await.unwrap()[b"b".as_slice()],
                file(2),
                "{damaged}"
            );
            cloud.pass(Duration::from_secs(5));
            cloud.damage(&name, right);
        }
    });
}

#[test]
fn whoever_died_before_he_said_that_he_goes_on_leaves_what_he_wanted_to_the_next() {
    run(async {
        let cloud = Cloud::new(9);
        let repository = repository(&cloud).await;
        let first = begin(&repository, &cloud, None).await.id();
        cloud.pass(Duration::from_secs(5));
        let second = begin(&repository, &cloud, Some(first)).await.id();
        let found = async || find(&repository, PLACE, &wanted(Duration::ZERO), cloud.now()).await.unwrap();
        cloud.pass(Duration::from_secs(5));
        assert_eq!(found().await, Some(second));
        // His intent is durable, and the word is not.
        cloud.remove(PLACE.backup(first).as_str());
        assert_eq!(found().await, Some(first));
    });
}

#[test]
fn a_sign_of_life_counts_by_the_clock_of_the_store_as_well() {
    run(async {
        let cloud = Cloud::new(10);
        let repository = repository(&cloud).await;
        let mut first = begin(&repository, &cloud, None).await;
        cloud.pass(HOUR);
        let late = cloud.now();
        first.beat(late - HOUR).await.unwrap();
        let found = async |silence, now| find(&repository, PLACE, &wanted(silence), now).await.unwrap();
        assert_eq!(found(HOUR / 2, late + HOUR / 4).await, None, "its host's clock is behind, and it lives");
        assert_eq!(found(HOUR / 2, late + HOUR).await, Some(first.id()));
        // An agent knows that none of its own lives, whatever the clock of the store says.
        assert_eq!(found(Duration::ZERO, late - HOUR / 2).await, Some(first.id()));
    });
}

#[test]
fn beside_a_parent_both_are_referred_to_and_the_parent_waits() {
    run(async {
        let cloud = Cloud::new(11);
        let repository = repository(&cloud).await;
        let parent = take(&repository, None, &[(b"a", file(1)), (b"b", file(2))], 3, cloud.now()).await;
        cloud.pass(Duration::from_secs(5));
        let mut changed = file(1);
        changed[7] ^= 1;
        let files = [("a", changed.clone()), ("b", file(2)), ("c", file(3))];
        let under = |continues| Beginning { continues, ..beginning(Some(parent.id), start(3), cloud.now()) };
        // The first one has gone by the parent, as a reader does that compares.
        let first = Backup::begin(&repository, under(None)).await.unwrap();
        let (mut packs, mut maps) = (first.packs(FULL_FRAME_PAGES), first.maps());
        let mut entries = parent.entries(&repository);
        for (path, content) in &files[..2] {
            let before = entries.next().await.unwrap().unwrap();
            let changes = changes_of(&repository, content);
            let same = changes
                .iter()
                .zip(&before.changes)
                .take_while(|(now, before)| !now.is_same(**before))
                .count();
            let mut file = packs.file();
            let (own, kept) = content.split_at(same * GROUP_BYTES);
            file.write(own).await.unwrap();
            let runs = part_of(
                &before.runs,
                (own.len() / PAGE_BYTES) as u64,
                kept.len().div_ceil(PAGE_BYTES) as u64,
            );
            file.keep(&runs, kept.len() as u64, Kept::Read(kept, &changes[same..])).await.unwrap();
            maps.push(&Entry::file(*path, 0o600, file.finish().await.unwrap())).await.unwrap();
        }
        maps.settle().await.unwrap();
        packs.finish().await.unwrap();

        tombstone::bury(&repository, PLACE, parent.id, "retention", cloud.now()).await.unwrap();
        cloud.pass(Duration::from_secs(5));
        let refused = Backup::begin(&repository, under(Some(first.id()))).await.unwrap_err();
        assert!(refused.to_string().contains("it is being deleted"), "{refused}");
        tombstone::undelete(&repository, PLACE, parent.id, cloud.now()).await.unwrap();
        cloud.pass(Duration::from_secs(5));
        let like = Wanted { parent: Some(parent.id), ..wanted(Duration::ZERO) };
        let found = find(&repository, PLACE, &like, cloud.now()).await.unwrap();
        assert_eq!(found, Some(first.id()), "whoever was refused has stored nothing");
        let second = Backup::begin(&repository, under(found)).await.unwrap();
        tombstone::bury(&repository, PLACE, parent.id, "retention", cloud.now()).await.unwrap();
        let stored = store(&repository, &second, &files).await;
        assert_eq!(stored.kept, file(1).len() + file(2).len(), "of the first one's and of the parent's");
        cloud.pass(2 * HOUR - Duration::from_secs(60));
        let mut second = second;
        second.beat(cloud.now()).await.unwrap();
        assert_eq!(collected(&repository, &cloud).await.unwrap().waiting, [parent.id].into());
        let id = second.id();
        let manifest = commit(&repository, &cloud, second, stored).await.unwrap();
        assert_eq!(manifest.packs.keys().copied().collect::<Vec<_>>(), [parent.id, first.id(), id]);
        cloud.pass(3 * HOUR);
        assert_eq!(collected(&repository, &cloud).await.unwrap().swept, [parent.id].into());
        let read = read_back(&repository, &manifest).await.unwrap();
        for (path, content) in &files {
            assert_eq!(&read[path.as_bytes()], content, "{path}");
        }
    });
}

#[test]
fn an_encrypted_repository_is_gone_on_in_with_another_key() {
    run(async {
        let cloud = Cloud::new(12);
        let before = encrypted(&cloud).await;
        let first = begin(&before, &cloud, None).await;
        store(&before, &first, &[("a", file(1))]).await;
        let opened = |key: u8| {
            let store = Store::over(Arc::clone(&cloud) as Arc<dyn object_store::ObjectStore>);
            async move { Repository::open(store, Some(&Secret::Key([key; 32]))).await.unwrap() }
        };
        let keys = before.keys().unwrap();
        keys.rotate(before.store(), &Secret::Key([8; 32]), true).await.unwrap();
        let repository = opened(8).await;
        cloud.pass(Duration::from_secs(5));
        let second = begin(&repository, &cloud, Some(first.id())).await;
        let stored = store(&repository, &second, &[("a", file(1)), ("b", file(2))]).await;
        assert_eq!(stored.kept, file(1).len());
        let manifest = commit(&repository, &cloud, second, stored).await.unwrap();
        let read = read_back(&opened(8).await, &manifest).await.unwrap();
        assert_eq!((&read[b"a".as_slice()], &read[b"b".as_slice()]), (&file(1), &file(2)));
    });
}

#[test]
fn not_all_attempts_are_followed_and_none_is_lost_that_is() {
    run(async {
        let cloud = Cloud::new(13);
        let repository = repository(&cloud).await;
        let mut left = None;
        // Each of them stores one file more than the one before.
        let numbers = 1..=MAX_ATTEMPTS + 2;
        let paths: Vec<String> = numbers.clone().map(|number| format!("f{number:03}")).collect();
        let files: Vec<(&str, Vec<u8>)> = paths
            .iter()
            .map(String::as_str)
            .zip(numbers.map(|number| Random(number as u64).bytes(900)))
            .collect();
        for reached in 1..files.len() {
            let backup = begin(&repository, &cloud, left).await;
            store(&repository, &backup, &files[..reached]).await;
            left = Some(backup.id());
            cloud.pass(Duration::from_secs(1));
        }
        let last = begin(&repository, &cloud, left).await;
        assert_eq!(last.former().unwrap().attempts.len(), MAX_ATTEMPTS);
        let stored = store(&repository, &last, &files).await;
        assert_eq!(stored.kept, MAX_ATTEMPTS * 900, "but for the last one and the first one");
        let manifest = commit(&repository, &cloud, last, stored).await.unwrap();
        cloud.pass(3 * HOUR);
        collected(&repository, &cloud).await.unwrap();
        assert_eq!(read_back(&repository, &manifest).await.unwrap().len(), files.len());
        assert_eq!(count(&cloud, "/packs/"), MAX_ATTEMPTS + 1);
    });
}

#[test]
fn packs_of_whoever_was_killed_before_a_flush_are_durable_before_they_are_referred_to() {
    run(async {
        let root = tempfile::tempdir().unwrap();
        let now = "2026-11-20T00:00:00Z".parse::<Timestamp>().unwrap();
        Repository::create(Store::directory(root.path()), None, now).await.unwrap();
        // He is killed when his pack has its name, and before it is sure to keep it.
        let killed = |step: Step, path: &Path| {
            let unsure = step == Step::SyncDirectory && path.to_string_lossy().contains("/packs/");
            if unsure { Err(std::io::Error::other("killed")) } else { Ok(true) }
        };
        let his = Store::with_directory(Directory::with_hook(root.path().to_owned(), killed));
        let his = Repository::open(his, None).await.unwrap();
        let first = Backup::begin(&his, beginning(None, start(3), now)).await.unwrap();
        let mut packs = first.packs(FULL_FRAME_PAGES);
        let mut writing = packs.file();
        writing.write(&file(1)).await.unwrap();
        writing.finish().await.unwrap();
        packs.finish().await.unwrap_err();

        let steps: Arc<Mutex<Vec<(Step, PathBuf)>>> = Arc::default();
        let hook = {
            let steps = Arc::clone(&steps);
            move |step: Step, path: &Path| {
                steps.lock().unwrap().push((step, path.to_owned()));
                Ok(true)
            }
        };
        let mine = Store::with_directory(Directory::with_hook(root.path().to_owned(), hook));
        let mine = Repository::open(mine, None).await.unwrap();
        let later = now + Duration::from_secs(5);
        let begun = Beginning { continues: Some(first.id()), ..beginning(None, start(3), later) };
        let second = Backup::begin(&mine, begun).await.unwrap();
        let pack = PackId { backup: first.id(), number: 0 };
        assert!(second.former().unwrap().packs.contains_key(&pack));
        let folder = root.path().join(PLACE.pack(first.id(), 0).as_str());
        let folder = folder.parent().unwrap();
        let steps = steps.lock().unwrap();
        for (step, path) in [
            (Step::SyncDirectory, folder),
            (Step::SyncParent, folder.parent().unwrap()),
            (Step::SyncParent, root.path()),
        ] {
            assert!(steps.contains(&(step, path.to_owned())), "{step:?} of {} in {steps:?}", path.display());
        }
    });
}

#[test]
fn what_somebody_else_went_on_from_is_left_to_him() {
    run(async {
        let cloud = Cloud::new(14);
        let repository = repository(&cloud).await;
        let first = begin(&repository, &cloud, None).await;
        store(&repository, &first, &[("a", file(1))]).await;
        cloud.pass(Duration::from_secs(5));
        let faster = begin(&repository, &cloud, Some(first.id())).await.id();
        cloud.pass(Duration::from_secs(5));
        let slower = begin(&repository, &cloud, Some(first.id())).await;
        store(&repository, &slower, &[("b", file(2))]).await;
        cloud.pass(HOUR / 2);
        let last = begin(&repository, &cloud, Some(slower.id())).await;
        let stored = store(&repository, &last, &[("a", file(1)), ("b", file(2))]).await;
        assert_eq!(stored.kept, file(2).len(), "the slower one wanted the first file, and did not get it");
        // Whoever got it is given up, and what he was kept for goes.
        cloud.pass(HOUR * 3 / 4);
        let report = collected(&repository, &cloud).await.unwrap();
        assert_eq!((report.abandoned, report.packs), ([faster].into(), 1));
        let manifest = commit(&repository, &cloud, last, stored).await.unwrap();
        assert_eq!(read_back(&repository, &manifest).await.unwrap().len(), 2);
    });
}
