//! WAL that the archive lacks is had of whoever still has it, and of nobody else.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use pgherd_agent::archive::holes::{Holes, Member, NotGiven, Round, Want, fill};
use pgherd_agent::archive::shelf::Shelf;
use pgherd_agent::archive::{Archiving, Gap, Order};
use pgherd_backup::receive::Branch;
use pgherd_backup::wal::{BackupRange, History, Segment, Segments, Wanted, missing, window};
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::process::StopMode;

use crate::harness::{Node, SOON, ask, start, story, superuser, until};
use crate::promotions::{promoted, replayed};
use crate::scene::{
    SEGMENT_BYTES, SLOT, Scene, configure, durable, fill as fill_segment, make_slot, shows, write,
};

fn segments() -> Segments {
    Segments::new(SEGMENT_BYTES as u32).unwrap()
}

fn segment(timeline: u32, number: u64) -> Segment {
    Segment { timeline: Timeline(timeline), number }
}

fn shelf(node: &Node) -> Box<dyn Member> {
    Box::new(Shelf::new(node.member.node.as_str(), node.instance().data_dir.clone()))
}

/// Takes an object out of the repository.
fn withhold(scene: &Scene, segment: Segment) {
    let wal = scene.herd.path().join("repository/cluster").join(scene.system.to_string()).join("wal");
    let file = wal.join(format!("{:08X}", segment.timeline.0)).join(segments().file_name(segment));
    std::fs::remove_file(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
}

/// What is missing up to a position on the way to a timeline.
async fn holes(scene: &Scene, timeline: u32, from: Lsn, to: Lsn) -> Holes {
    let (archive, inventory) = (scene.archive(), scene.inventory().await);
    let history = inventory.history(Timeline(timeline)).unwrap().clone();
    let ends = archive.ends().await.unwrap();
    let missing = missing(&inventory, &history, from..to, |segment| ends.contains(&segment));
    Holes { archive, inventory, history, missing }
}

/// A backup that needs everything from a position on.
fn backup_from(timeline: u32, start: Lsn) -> BackupRange {
    BackupRange {
        id: "20261122T000000".parse().unwrap(),
        timeline: Timeline(timeline),
        start,
        stop: Lsn(start.0 + 1),
        stopped: "2026-11-22T00:00:00Z".parse().unwrap(),
    }
}

fn files(segments_of: &[Segment]) -> Vec<String> {
    segments_of.iter().map(|of| segments().file_name(*of)).collect()
}

fn filled(round: &Round) -> Vec<(&str, &str)> {
    round.filled.iter().map(|(file, from)| (file.as_str(), from.as_str())).collect()
}

/// Gives what another one has, with a byte changed in the middle.
struct Liar(Box<dyn Member>);

impl Member for Liar {
    fn name(&self) -> &str {
        "liar"
    }

    fn ask<'a>(&'a self, want: &'a Want) -> BoxFuture<'a, Result<Bytes, NotGiven>> {
        async move {
            let mut bytes = self.0.ask(want).await?.to_vec();
            // In a row of `filled`, which is text.
            let at = bytes.iter().skip(bytes.len() / 4).position(|byte| byte.is_ascii_hexdigit()).unwrap();
            let at = at + bytes.len() / 4;
            bytes[at] ^= 1;
            Ok(bytes.into())
        }
        .boxed()
    }
}

/// Never answers; counts how often it was waited for.
#[derive(Default)]
struct Silent(std::sync::Arc<AtomicU32>);

impl Member for Silent {
    fn name(&self) -> &str {
        "silent"
    }

    fn ask<'a>(&'a self, _: &'a Want) -> BoxFuture<'a, Result<Bytes, NotGiven>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Err(NotGiven::Silent("no answer within 15 s".to_owned()))).boxed()
    }
}

/// A directory that looks like a server's of the same cluster, with files of other segments under these names.
fn recycled(scene: &Scene, node: &Node, files: &[(String, Vec<u8>)]) -> PathBuf {
    let dir = tempfile::Builder::new().prefix("recycled").tempdir_in(scene.herd.path()).unwrap().keep();
    for place in ["global", "pg_wal"] {
        std::fs::create_dir(dir.join(place)).unwrap();
    }
    std::fs::copy(node.instance().data_dir.join("global/pg_control"), dir.join("global/pg_control")).unwrap();
    for (file, content) in files {
        std::fs::write(dir.join("pg_wal").join(file), content).unwrap();
    }
    dir
}

fn own(node: &Node, file: &str) -> Vec<u8> {
    std::fs::read(node.instance().pg_wal().join(file)).unwrap()
}

fn has(dir: &Path, file: &str) -> bool {
    dir.join("pg_wal").join(file).exists()
}

story! {
    async fn case_06_a_hole_is_filled_by_whoever_has_it_and_nothing_else_is_taken() {
        let scene = Scene::new(&["b"]).await;
        let [a, b] = &scene.nodes[..] else { unreachable!() };
        let archiving = Archiving::begin(scene.order(0).await);
        let session = a.session().await;
        let mut end = Lsn(0);
        for _ in 0..5 {
            end = fill_segment(&session).await;
        }
        durable(&archiving, end).await;
        archiving.end().await;
        replayed(b, end).await;
        let last = end.0 / SEGMENT_BYTES - 1;
        let lost = [segment(2, last - 3), segment(2, last - 2)];
        let start = Lsn((last - 4) * SEGMENT_BYTES);
        lost.iter().for_each(|lost| withhold(&scene, *lost));
        let gaps = window(&[backup_from(2, start)], &scene.inventory().await).gaps;
        assert_eq!(gaps.len(), 1, "{gaps:?}");

        // Nobody has it: one has the names, with what was there before, one has half of them, one says something else, one nothing.
        let names = files(&lost);
        let before = own(b, &segments().file_name(segment(2, last - 4)));
        let mut half = own(b, &names[1])[..SEGMENT_BYTES as usize / 8].to_vec();
        half.extend(&before[half.len()..]);
        let dir = recycled(&scene, b, &[(names[0].clone(), before.clone()), (names[1].clone(), half)]);
        let (asked, empty) = (Silent::default(), recycled(&scene, b, &[]));
        let count = std::sync::Arc::clone(&asked.0);
        let nobody: [Box<dyn Member>; 4] = [
            Box::new(asked),
            Box::new(Shelf::new("recycled", dir)),
            Box::new(Shelf::new("empty", empty)),
            Box::new(Liar(shelf(b))),
        ];
        let round = fill(holes(&scene, 2, start, end).await, &nobody).await.unwrap();
        assert_eq!(round.filled, []);
        assert_eq!(round.left, lost.map(Wanted::Segment));
        assert_eq!(count.load(Ordering::Relaxed), 1, "who does not answer is not waited for again");
        eprintln!("{:#?}", round.said);
        assert!(round.said["recycled"].contains("something else"), "{:?}", round.said);
        assert!(round.said["empty"].contains(&names[0]), "{:?}", round.said);
        assert!(round.said["liar"].contains("WAL ends in"), "{:?}", round.said);
        assert!(round.said["silent"].contains("no answer"), "{:?}", round.said);
        assert_eq!(window(&[backup_from(2, start)], &scene.inventory().await).gaps, gaps);

        // The same, and then somebody who has it.
        let mut somebody = Vec::from(nobody);
        somebody.push(shelf(b));
        let round = fill(holes(&scene, 2, start, end).await, &somebody).await.unwrap();
        let given: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "b")).collect();
        assert_eq!((filled(&round), round.left.len()), (given, 0));
        assert_eq!(window(&[backup_from(2, start)], &scene.inventory().await).gaps, []);
        for lost in lost {
            assert!(scene.compare(0, Timeline(2)).await.contains(&(lost.timeline, lost.number)));
        }
        assert_eq!(holes(&scene, 2, start, end).await.missing, []);

        // What is there already with another content stays as it is.
        let mut again = holes(&scene, 2, start, end).await;
        again.missing = vec![Wanted::Segment(lost[0])];
        assert_eq!(fill(again, &somebody).await.unwrap().filled.len(), 1);
        assert!(!scene.herd.path().join("repository/cluster").join(scene.system.to_string()).join("quarantine").exists());
    }
}

story! {
    async fn case_06_what_a_server_has_removed_comes_from_a_standby_and_recycled_files_are_none() {
        let scene = Scene::new(&["b"]).await;
        let [a, b] = &scene.nodes[..] else { unreachable!() };
        let session = a.session().await;
        let archiving = Archiving::begin(scene.order(0).await);
        let archived = fill_segment(&session).await;
        durable(&archiving, archived).await;
        archiving.end().await;
        configure(&session, "wal_keep_size", "0").await;
        configure(&session, "max_slot_wal_keep_size", "1MB").await;
        let mut end = Lsn(0);
        for _ in 0..3 {
            end = fill_segment(&session).await;
        }
        replayed(b, end).await;
        session.batch_execute("CHECKPOINT").await.unwrap();
        let first_lost = segment(2, archived.0 / SEGMENT_BYTES);
        let pg_wal = &a.instance().data_dir;
        until("the server has removed it", async || {
            (!has(pg_wal, &segments().file_name(first_lost))).then_some(())
        })
        .await;
        let active = format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        until("nobody uses the slot", async || (ask(&session, &active).await == "f").then_some(())).await;
        ask(&session, &format!("SELECT pg_drop_replication_slot('{SLOT}')")).await;
        make_slot(&session).await;
        let archiving = Archiving::begin(Order { gap: Gap::Leave, ..scene.order(0).await });
        let end = fill_segment(&session).await;
        let status = durable(&archiving, end).await;
        assert_eq!(status.gaps, 1);
        archiving.end().await;

        let start = Lsn(archived.0 - SEGMENT_BYTES);
        let holes_now = holes(&scene, 2, start, end).await;
        assert_eq!(holes_now.missing[0], Wanted::Segment(first_lost));
        let lost = holes_now.missing.len();
        // Old files that wait for being written again have names of segments that are still to come.
        let current = end.0 / SEGMENT_BYTES;
        let ahead = (current + 1..current + 50).find(|number| {
            has(pg_wal, &segments().file_name(segment(2, *number)))
        });
        let ahead = segment(2, ahead.expect("the checkpoint has recycled a file"));
        let want = Want { system: scene.system, segments: segments(), wanted: Wanted::Segment(ahead) };
        let said = shelf(a).ask(&want).await.unwrap_err();
        assert!(matches!(&said, NotGiven::Absent(why) if why.contains("something else")), "{said:?}");
        // Nor is the one given that is being written.
        let want = Want { wanted: Wanted::Segment(segment(2, current)), ..want };
        let said = shelf(a).ask(&want).await.unwrap_err();
        assert!(matches!(&said, NotGiven::Absent(why) if why.contains("WAL ends in")), "{said:?}");

        let round = fill(holes_now, &[shelf(a), shelf(b)]).await.unwrap();
        assert_eq!((round.filled.len(), round.left.len()), (lost, 0), "{round:?}");
        assert_eq!(round.givers().into_iter().collect::<Vec<_>>(), ["b"]);
        assert_eq!(window(&[backup_from(2, start)], &scene.inventory().await).gaps, []);
        let compared = scene.compare(1, Timeline(2)).await;
        assert!(compared.contains(&(Timeline(2), first_lost.number)), "{compared:?}");
    }
}

story! {
    async fn a_former_primary_gives_what_was_agreed_on_and_its_own_branch_is_not_taken() {
        let scene = Scene::new(&["b"]).await;
        let [a, b] = &scene.nodes[..] else { unreachable!() };
        let archiving = Archiving::begin(scene.order(0).await);
        let start = Lsn(fill_segment(&a.session().await).await.0 - SEGMENT_BYTES);
        let shared = fill_segment(&a.session().await).await;
        durable(&archiving, shared).await;
        let written = write(&a.session().await).await;
        replayed(b, written).await;
        // What follows only the primary has, and the archive.
        b.server.stop(StopMode::Fast, SOON).await.unwrap();
        let alone = fill_segment(&a.session().await).await;
        durable(&archiving, alone).await;
        archiving.end().await;
        a.server.stop(StopMode::Kill, SOON).await.unwrap();
        let again = Node { member: b.member.clone(), server: start_again(b).await };
        let promoted = promoted(&again, 3).await;
        let fork = promoted.fork;
        assert!(fork < alone && !fork.0.is_multiple_of(SEGMENT_BYTES));
        let session = superuser(b.instance()).await;
        fill_segment(&session).await;
        let end = fill_segment(&session).await;
        let archiving = Archiving::begin(Order { branch: Branch::Leave, ..scene.order(1).await });
        durable(&archiving, end).await;
        shows(&archiving, "it is on the new timeline", |status| status.timeline == Some(Timeline(3))).await;
        archiving.end().await;

        // The segment before the fork, the one with it on both timelines, and the history of the new one are lost.
        let number = fork.0 / SEGMENT_BYTES;
        for lost in [segment(2, number - 1), segment(2, number), segment(3, number)] {
            withhold(&scene, lost);
        }
        let lost = holes(&scene, 3, start, end).await;
        let last = segment(2, number);
        assert_eq!(
            lost.missing,
            [
                Wanted::Segment(segment(2, number - 1)),
                Wanted::End { segment: last, until: fork },
                Wanted::Segment(segment(3, number)),
            ],
            "nothing of the old timeline behind the fork"
        );

        // Its branch is a whole segment to the former primary, and is on no line.
        let want = Want { system: scene.system, segments: segments(), wanted: Wanted::Segment(last) };
        let branch = shelf(a).ask(&want).await.unwrap();
        let mut asked = lost.clone();
        asked.missing = vec![want.wanted];
        let round = fill(asked, &[shelf(a)]).await.unwrap();
        assert_eq!(round.left, [want.wanted]);
        assert!(round.said["a"].contains("is of timeline 2"), "{:?}", round.said);
        // Nor is it taken for the new timeline's.
        struct Other(Bytes);
        impl Member for Other {
            fn name(&self) -> &str {
                "other"
            }
            fn ask<'a>(&'a self, _: &'a Want) -> BoxFuture<'a, Result<Bytes, NotGiven>> {
                std::future::ready(Ok(self.0.clone())).boxed()
            }
        }
        let mut asked = lost.clone();
        asked.missing = vec![Wanted::Segment(segment(3, number))];
        let round = fill(asked, &[Box::new(Other(branch)) as Box<dyn Member>]).await.unwrap();
        assert_eq!(round.filled, []);

        let round = fill(lost, &[shelf(a), shelf(b)]).await.unwrap();
        let names = files(&[segment(2, number - 1), last, segment(3, number)]);
        assert_eq!(
            filled(&round),
            [(names[0].as_str(), "a"), (&format!("{}.partial", names[1]), "a"), (names[2].as_str(), "b")]
        );
        let inventory = scene.inventory().await;
        assert!(!inventory.has(last), "it was left, and is no whole segment");
        assert!(scene.archive().ends().await.unwrap().contains(&last));
        assert_eq!(window(&[backup_from(2, start)], &inventory).gaps, []);
        assert!(scene.compare(1, Timeline(3)).await.contains(&(Timeline(3), number)));

        // A history that the archive has not got has to be the one that led here.
        let want = Wanted::History(Timeline(2));
        let line = History::new(
            Timeline(3),
            vec![pgherd_backup::wal::Fork { timeline: Timeline(1), until: Lsn(8) }, promoted_from(2, fork)],
        );
        let mut other = holes(&scene, 3, start, end).await;
        (other.history, other.missing) = (line.unwrap(), vec![want]);
        let round = fill(other, &[shelf(a)]).await.unwrap();
        assert!(round.said["a"].contains("is not the one"), "{:?}", round.said);
        let mut right = holes(&scene, 3, start, end).await;
        right.missing = vec![want];
        assert_eq!(filled(&fill(right, &[shelf(a)]).await.unwrap()), [("00000002.history", "a")]);
    }
}

fn promoted_from(timeline: u32, until: Lsn) -> pgherd_backup::wal::Fork {
    pgherd_backup::wal::Fork { timeline: Timeline(timeline), until }
}

async fn start_again(node: &Node) -> pgherd_postgres::Server {
    start(node.instance()).await
}
