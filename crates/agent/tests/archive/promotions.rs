//! The timeline changes: while WAL is received, while nobody receives any, and twice.

use pgherd_agent::archive::{ArchiveError, Archiving};
use pgherd_backup::receive::{Branch, ReceiveError};
use pgherd_backup::wal::Segment;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::process::StopMode;
use pgherd_postgres::promote::{Order, Promoted, promote};

use crate::harness::{Node, SOON, ask, start, story, superuser, until};
use crate::scene::{SEGMENT_BYTES, Scene, durable, fill, shows, write};

pub(crate) async fn promoted(node: &Node, timeline: u32) -> Promoted {
    let order = Order { timeline: Timeline(timeline), at_least: Lsn(0), names: SyncNames::Empty };
    promote(&node.server, &order, SOON).await.unwrap()
}

pub(crate) async fn replayed(node: &Node, up_to: Lsn) {
    let session = node.session().await;
    until("the standby has it", async || {
        let has: Lsn = ask(&session, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
        (has >= up_to).then_some(())
    })
    .await;
}

/// The partial segments in the repository, but for that of the timeline that a new cluster begins on.
fn partials(scene: &Scene) -> Vec<String> {
    let mut found = Vec::new();
    let place = scene.herd.path().join("repository/cluster").join(scene.system.to_string()).join("partial");
    for timeline in std::fs::read_dir(place).into_iter().flatten().flatten() {
        for file in std::fs::read_dir(timeline.path()).unwrap().flatten() {
            let name = file.file_name().into_string().unwrap();
            found.push(name.split('-').next().unwrap().to_owned());
        }
    }
    found.retain(|name| !name.starts_with("00000001"));
    found.sort();
    found
}

/// What a partial segment of a fork is called.
fn partial_of(promoted: &Promoted) -> String {
    let segments = pgherd_backup::wal::Segments::new(SEGMENT_BYTES as u32).unwrap();
    segments.file_name(Segment { timeline: promoted.forked_from, number: segments.number(promoted.fork) })
}

story! {
    async fn case_04_a_standby_is_promoted_in_the_middle_of_a_segment_while_it_is_streamed_from() {
        let scene = Scene::new(&["b"]).await;
        let [a, b] = &scene.nodes[..] else { unreachable!() };
        let archiving = Archiving::begin(scene.order(1).await);
        let whole = fill(&a.session().await).await;
        durable(&archiving, whole).await;
        let written = write(&a.session().await).await;
        replayed(b, written).await;
        shows(&archiving, "the beginning of a segment came", |status| status.received >= Some(written)).await;

        let promoted = promoted(b, 5).await;
        assert!(promoted.fork.0 % SEGMENT_BYTES != 0, "in the middle of a segment");
        shows(&archiving, "it follows", |status| status.timeline == Some(Timeline(5))).await;
        shows(&archiving, "the fork is durable", |status| status.durable >= Some(promoted.fork)).await;
        let end = fill(&b.session().await).await;
        let status = durable(&archiving, end).await;
        assert_eq!(status.connections, 1, "the connection outlived the switch");
        archiving.end().await;

        let number = promoted.fork.0 / SEGMENT_BYTES;
        let inventory = scene.inventory().await;
        assert!(!inventory.has(Segment { timeline: Timeline(2), number }), "it was never complete");
        assert!(Scene::has_all(&inventory, Timeline(5), number, end.0 / SEGMENT_BYTES));
        assert_eq!(partials(&scene), [partial_of(&promoted)]);
        let history = scene.archive().history(Timeline(5)).await.unwrap();
        assert_eq!(history.forks().last().unwrap().until, promoted.fork);
        let compared = scene.compare(1, Timeline(2)).await;
        assert!(compared.contains(&(Timeline(5), number)), "with the old timeline's beginning: {compared:?}");
    }
}

story! {
    async fn case_04_05_two_promotions_while_nobody_receives_are_followed() {
        let scene = Scene::new(&["b", "c"]).await;
        let [a, b, c] = &scene.nodes[..] else { unreachable!() };
        let archiving = Archiving::begin(scene.order(0).await);
        let whole = fill(&a.session().await).await;
        durable(&archiving, whole).await;
        let written = write(&a.session().await).await;
        shows(&archiving, "the beginning of a segment came", |status| status.received >= Some(written)).await;
        archiving.end().await;

        replayed(b, written).await;
        replayed(c, written).await;
        a.server.stop(StopMode::Kill, SOON).await.unwrap();
        let first = promoted(b, 4).await;
        pgherd_postgres::slots::ensure(&b.session().await, &c.member, SOON).await.unwrap();
        scene.herd.follow(c.instance(), Some(&c.server), b.instance(), &c.member).await;
        let written = write(&b.session().await).await;
        replayed(c, written).await;
        b.server.stop(StopMode::Kill, SOON).await.unwrap();
        let second = promoted(c, 9).await;
        assert_eq!(first.fork.0 / SEGMENT_BYTES, second.fork.0 / SEGMENT_BYTES, "in one segment");
        let end = fill(&c.session().await).await;

        let archiving = Archiving::begin(scene.order(2).await);
        durable(&archiving, end).await;
        archiving.end().await;
        let inventory = scene.inventory().await;
        let number = second.fork.0 / SEGMENT_BYTES;
        assert!(Scene::has_all(&inventory, Timeline(9), number, end.0 / SEGMENT_BYTES));
        assert!(inventory.has_history(Timeline(4)) && inventory.has_history(Timeline(9)));
        assert_eq!(partials(&scene), [partial_of(&first), partial_of(&second)]);
        let compared = scene.compare(2, Timeline(2)).await;
        assert!(compared.contains(&(Timeline(9), number)), "{compared:?}");
        // From the first segment on there is no hole, as far as the window can see.
        let first = inventory.range_of(Timeline(2)).unwrap().0;
        let start = Lsn(first * SEGMENT_BYTES);
        let backup = pgherd_backup::wal::BackupRange {
            id: "20261122T000000".parse().unwrap(),
            timeline: Timeline(2),
            start,
            stop: Lsn(start.0 + 1),
            stopped: "2026-11-22T00:00:00Z".parse().unwrap(),
        };
        let window = pgherd_backup::wal::window(&[backup], &inventory);
        assert_eq!(window.to, Some((Timeline(9), end)));
        assert_eq!(window.gaps, []);
    }
}

story! {
    async fn case_05_a_timeline_that_left_before_what_is_archived_is_not_joined_to_it() {
        let scene = Scene::new(&["b"]).await;
        let [a, b] = &scene.nodes[..] else { unreachable!() };
        let archiving = Archiving::begin(scene.order(0).await);
        let shared = fill(&a.session().await).await;
        durable(&archiving, shared).await;
        let written = write(&a.session().await).await;
        replayed(b, written).await;
        // What follows only the primary has, and the archive.
        b.server.stop(StopMode::Fast, SOON).await.unwrap();
        let alone = fill(&a.session().await).await;
        durable(&archiving, alone).await;
        archiving.end().await;
        a.server.stop(StopMode::Kill, SOON).await.unwrap();
        let again = Node { member: b.member.clone(), server: start(b.instance()).await };
        let promoted = promoted(&again, 3).await;
        assert!(promoted.fork < alone);
        let session = superuser(b.instance()).await;
        let end = fill(&session).await;

        let mut order = scene.order(1).await;
        let archiving = Archiving::begin(order.clone());
        let status = shows(&archiving, "it is refused", |status| status.last_error.is_some()).await;
        let error = status.last_error.unwrap();
        let ArchiveError::Receive(ReceiveError::Unreachable { timeline, fork, archived }) = &*error else {
            panic!("{error}")
        };
        assert_eq!((*timeline, *fork, *archived), (Timeline(2), promoted.fork, alone));
        assert_eq!(status.received, None);
        archiving.end().await;
        assert!(!scene.inventory().await.has_history(Timeline(3)), "nothing was put");

        // Told to leave it, it goes on from where the server left.
        order.branch = Branch::Leave;
        let archiving = Archiving::begin(order);
        durable(&archiving, end).await;
        archiving.end().await;
        let inventory = scene.inventory().await;
        let number = promoted.fork.0 / SEGMENT_BYTES;
        assert!(inventory.has(Segment { timeline: Timeline(2), number }), "what was left stays");
        assert!(Scene::has_all(&inventory, Timeline(3), number, end.0 / SEGMENT_BYTES));
        // Of the old timeline the two servers have different files.
        assert!(!scene.compare(1, Timeline(3)).await.is_empty());
    }
}
