//! Files of WAL in and out of a repository, by their names, with a spool that is filled, used up, and not believed after a boot.

use std::fs;

use jiff::Timestamp;
use pgherd_backup::format::Repository;
use pgherd_backup::receive::Object;
use pgherd_backup::store::Store;
use pgherd_core::types::SystemId;

use super::fetch::{Fetched, fetch, fill};
use super::*;

const SEGMENT_BYTES: u32 = 1 << 20;
const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);

struct Scene {
    dir: tempfile::TempDir,
    archive: Archive,
}

impl Scene {
    async fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        for name in ["objects", "data", "pg_wal"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let store = Store::directory(dir.path().join("objects"));
        let repository = Repository::create(store, None, Timestamp::now()).await.unwrap();
        let archive = Archive::new(&repository, SYSTEM, Segments::new(SEGMENT_BYTES).unwrap());
        Scene { dir, archive }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn name(&self, number: u64) -> String {
        self.archive.segments().file_name(Segment { timeline: Timeline(1), number })
    }

    /// A segment as far as its first page's header goes.
    fn content(&self, number: u64) -> Vec<u8> {
        let mut content = vec![number as u8; SEGMENT_BYTES as usize];
        content[0..2].copy_from_slice(&0xD110_u16.to_le_bytes());
        content[2..4].copy_from_slice(&2_u16.to_le_bytes());
        content[4..8].copy_from_slice(&1_u32.to_le_bytes());
        content[8..16].copy_from_slice(&(number * u64::from(SEGMENT_BYTES)).to_le_bytes());
        content[24..32].copy_from_slice(&SYSTEM.0.to_le_bytes());
        content[32..36].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
        content
    }

    async fn push(&self, name: &str, content: &[u8]) -> Result<Pushed, FileError> {
        let file = self.at("pg_wal").join(name);
        fs::write(&file, content).unwrap();
        push(&self.archive, &file).await
    }

    async fn fetch(&self, name: &str) -> Result<Fetched, FileError> {
        fetch(&self.archive, &self.at("data"), name, &self.at("RECOVERYXLOG")).await
    }

    async fn fill(&self, number: u64) -> bool {
        fill(&self.archive, &self.at("data"), &self.name(number)).await.unwrap()
    }

    fn spooled(&self) -> Vec<String> {
        let boots = fs::read_dir(self.at("data").join("pgherd_fetch")).into_iter().flatten().flatten();
        let files = boots.flat_map(|boot| fs::read_dir(boot.path()).unwrap().flatten());
        let mut names: Vec<String> = files.map(|file| file.file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "lock");
        names.sort();
        names
    }
}

#[tokio::test]
async fn what_is_pushed_is_fetched_and_what_is_not_is_absent_for_certain() {
    let scene = Scene::new().await;
    let name = scene.name(3);
    assert_eq!(scene.push(&name, &scene.content(3)).await.unwrap(), Pushed::Created);
    assert_eq!(scene.push(&name, &scene.content(3)).await.unwrap(), Pushed::Same);
    let mut other = scene.content(3);
    other[70_000] ^= 1;
    assert!(matches!(scene.push(&name, &other).await, Err(FileError::Wal(WalError::Conflict { .. }))));
    assert!(matches!(scene.fetch(&name).await.unwrap(), Fetched::Found { .. }));
    assert_eq!(fs::read(scene.at("RECOVERYXLOG")).unwrap(), scene.content(3));
    assert_eq!(scene.fetch(&scene.name(4)).await.unwrap(), Fetched::Absent);

    let history = b"1\t0/300060\tno recovery target specified\n";
    assert_eq!(scene.push("00000002.history", history).await.unwrap(), Pushed::Created);
    assert_eq!(scene.fetch("00000002.history").await.unwrap(), Fetched::Found { ahead: None });
    assert_eq!(fs::read(scene.at("RECOVERYXLOG")).unwrap(), history);
    assert_eq!(scene.fetch("00000003.history").await.unwrap(), Fetched::Absent);

    let partial = format!("{}.partial", scene.name(5));
    assert_eq!(scene.push(&partial, &scene.content(5)).await.unwrap(), Pushed::Created);
    assert_eq!(
        scene.fetch(&scene.name(5)).await.unwrap(),
        Fetched::Absent,
        "a partial one is not its segment"
    );
    let note = format!("{}.00000028.backup", scene.name(3));
    assert_eq!(scene.push(&note, b"START WAL LOCATION").await.unwrap(), Pushed::NotNeeded);
    assert_eq!(scene.fetch(&note).await.unwrap(), Fetched::Absent);

    for wrong in
        ["", "postgresql.conf", "000000010000000000000", "0000000100000000FFFFFFFF", "1.history", "x.partial"]
    {
        assert!(matches!(scene.fetch(wrong).await, Err(FileError::Name { .. })), "{wrong:?}");
    }
}

#[tokio::test]
async fn case_24_a_repository_that_is_not_there_is_no_end_of_the_wal() {
    let scene = Scene::new().await;
    scene.push(&scene.name(3), &scene.content(3)).await.unwrap();
    fs::rename(scene.at("objects"), scene.at("unmounted")).unwrap();
    for name in [scene.name(3), scene.name(4), "00000002.history".to_owned()] {
        let failed = scene.fetch(&name).await.unwrap_err();
        assert!(matches!(&failed, FileError::Read(error) if !error.is_absent()), "{name}: {failed:?}");
    }
    fs::create_dir(scene.at("objects")).unwrap();
    let failed = scene.fetch(&scene.name(4)).await.unwrap_err();
    assert!(
        matches!(&failed, FileError::Read(error) if !error.is_absent()),
        "an empty mount point: {failed:?}"
    );
}

#[tokio::test]
async fn case_24_a_damaged_segment_is_not_fetched_and_no_end_of_the_wal() {
    let scene = Scene::new().await;
    scene.push(&scene.name(3), &scene.content(3)).await.unwrap();
    let object = scene.at(&format!("objects/cluster/{SYSTEM}/wal/00000001/{}", scene.name(3)));
    let mut bytes = fs::read(&object).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&object, bytes).unwrap();
    assert!(matches!(scene.fetch(&scene.name(3)).await, Err(FileError::Read(error)) if !error.is_absent()));
    assert!(!scene.at("RECOVERYXLOG").exists());
    let filled = fill(&scene.archive, &scene.at("data"), &scene.name(3)).await;
    assert!(filled.is_err());
    assert_eq!(scene.spooled(), Vec::<String>::new());
}

#[tokio::test]
async fn a_list_shows_holes_as_the_beginning_of_another_run() {
    let scene = Scene::new().await;
    for number in [3, 4, 5, 7] {
        scene.push(&scene.name(number), &scene.content(number)).await.unwrap();
    }
    let files = Files { archive: scene.archive.clone(), data_dir: scene.at("data") };
    let run = |first, last, segments| Run {
        timeline: 1,
        first: scene.name(first),
        last: scene.name(last),
        segments,
    };
    assert_eq!(files.runs().await.unwrap(), [run(3, 5, 3), run(7, 7, 1)]);
}

#[tokio::test]
async fn the_beginning_of_the_last_segment_is_fetched_and_never_ahead() {
    let scene = Scene::new().await;
    scene.push(&scene.name(3), &scene.content(3)).await.unwrap();
    let (segment, beginning) =
        (Segment { timeline: Timeline(1), number: 4 }, scene.content(4)[..9000].to_vec());
    let piece = Object::Piece { segment, from: 0, content: beginning.clone().into() };
    scene.archive.put(&piece).await.unwrap();
    assert!(scene.fill(3).await);
    assert_eq!(scene.spooled(), [scene.name(3)], "what there is of the last one grows");
    assert!(matches!(scene.fetch(&scene.name(4)).await.unwrap(), Fetched::Found { .. }));
    let mut padded = beginning;
    padded.resize(SEGMENT_BYTES as usize, 0);
    assert_eq!(fs::read(scene.at("RECOVERYXLOG")).unwrap(), padded);
    // Something is behind it: now it is a hole, and not the end.
    scene.push(&scene.name(5), &scene.content(5)).await.unwrap();
    assert_eq!(scene.fetch(&scene.name(4)).await.unwrap(), Fetched::Absent);
}

#[tokio::test]
async fn segments_that_come_next_are_fetched_ahead_and_used_up() {
    let scene = Scene::new().await;
    for number in 3..9 {
        scene.push(&scene.name(number), &scene.content(number)).await.unwrap();
    }
    let next = scene.name(4);
    assert_eq!(scene.fetch(&scene.name(3)).await.unwrap(), Fetched::Found { ahead: Some(next) });
    assert!(scene.fill(4).await);
    assert_eq!(scene.spooled(), (4..9).map(|number| scene.name(number)).collect::<Vec<_>>());
    // They come from there: the repository is not asked.
    fs::rename(scene.at("objects"), scene.at("unmounted")).unwrap();
    for number in 4..9 {
        assert!(matches!(scene.fetch(&scene.name(number)).await.unwrap(), Fetched::Found { .. }));
        assert_eq!(fs::read(scene.at("RECOVERYXLOG")).unwrap(), scene.content(number));
    }
    assert!(scene.fetch(&scene.name(9)).await.is_err(), "unsure");
    fs::rename(scene.at("unmounted"), scene.at("objects")).unwrap();
    assert_eq!(scene.fetch(&scene.name(9)).await.unwrap(), Fetched::Absent);
    assert!(!scene.at("data/pgherd_fetch").exists(), "nothing stays behind the end");
    assert!(scene.fill(9).await);
    assert!(!scene.at("data/pgherd_fetch").exists(), "nor of who looks there");
}

#[tokio::test]
async fn what_recovery_has_passed_and_what_another_boot_left_is_forgotten() {
    let scene = Scene::new().await;
    for number in 3..7 {
        scene.push(&scene.name(number), &scene.content(number)).await.unwrap();
    }
    let old = scene.at("data/pgherd_fetch/00000000-0000-0000-0000-000000000000");
    fs::create_dir_all(&old).unwrap();
    fs::write(old.join(scene.name(5)), vec![0; SEGMENT_BYTES as usize]).unwrap();
    assert!(matches!(scene.fetch(&scene.name(5)).await.unwrap(), Fetched::Found { .. }));
    assert_eq!(
        fs::read(scene.at("RECOVERYXLOG")).unwrap(),
        scene.content(5),
        "not the zeros of another boot"
    );
    assert!(scene.fill(3).await);
    assert!(!old.exists());
    assert!(scene.fill(6).await);
    assert_eq!(scene.spooled(), [scene.name(6)]);
    let spool = spool::Spool::of(&scene.at("data"));
    let filling = spool.fill(&scene.name(7), &scene.name(8)).unwrap();
    assert!(!scene.fill(6).await, "somebody else fills it");
    drop(filling);
    assert!(scene.fill(6).await);
}

#[tokio::test]
async fn what_another_process_is_about_to_bring_is_waited_for() {
    let scene = Scene::new().await;
    for number in 3..7 {
        scene.push(&scene.name(number), &scene.content(number)).await.unwrap();
    }
    let spool = spool::Spool::of(&scene.at("data"));
    let filling = spool.fill(&scene.name(4), &scene.name(5)).unwrap().unwrap();
    let bring = |number: u64| filling.put(&scene.name(number), &scene.content(number).into()).unwrap();
    // Nobody can fetch it himself.
    fs::rename(scene.at("objects"), scene.at("unmounted")).unwrap();
    let name = scene.name(4);
    let (fetched, ()) = tokio::join!(scene.fetch(&name), async { bring(4) });
    assert_eq!(fetched.unwrap(), Fetched::Found { ahead: None }, "somebody fetches ahead");
    assert_eq!(fs::read(scene.at("RECOVERYXLOG")).unwrap(), scene.content(4));
    fs::rename(scene.at("unmounted"), scene.at("objects")).unwrap();
    // What is not among these, or should have come before, is nothing to wait for.
    assert!(!spool.is_coming(&scene.name(6)) && !spool.is_coming(&scene.name(3)));
    assert!(spool.is_coming(&scene.name(5)));
    bring(5);
    assert!(!spool.is_coming(&scene.name(4)));
    drop(filling);
    assert!(!spool.is_coming(&scene.name(5)), "nobody brings it any more");
}
