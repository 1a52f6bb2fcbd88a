//! What stands in a stream's way is shown, and gone when it is gone.

use pgherd_agent::archive::{self, ArchiveError, Archiving, Gap, State};
use pgherd_backup::wal::Segment;
use pgherd_core::types::{Lsn, SystemId, Timeline};
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::process::StopMode;
use pgherd_postgres::promote::{Order, promote};
use pgherd_postgres::replication::{Refusal, Replication, SlotName, Started};

use crate::harness::{SOON, ask, start, story, superuser, until};
use crate::scene::{SEGMENT_BYTES, SLOT, Scene, configure, durable, fill, make_slot, shows};

fn refusal(error: &ArchiveError) -> Option<Refusal> {
    match error {
        ArchiveError::Replication(error) => error.refusal(),
        _ => None,
    }
}

story! {
    async fn case_06_a_slot_that_is_missing_or_somebody_elses_is_waited_for() {
        let scene = Scene::new(&[]).await;
        let session = scene.nodes[0].session().await;
        let order = scene.order(0).await;
        ask(&session, &format!("SELECT pg_drop_replication_slot('{SLOT}')")).await;
        let archiving = Archiving::begin(order.clone());
        let is_missing = |error: &ArchiveError| matches!(error, ArchiveError::SlotMissing { .. });
        shows(&archiving, "it is missing", |status| status.last_error.as_deref().is_some_and(is_missing)).await;
        assert!(!scene.herd.path().join("repository/cluster").exists(), "nothing is archived without it");

        archiving.end().await;

        make_slot(&session).await;
        let mut other = Replication::open(&order.source, SOON).await.unwrap();
        let end = other.identify(SOON).await.unwrap().end;
        let slot = SlotName::new(SLOT).unwrap();
        let start = Lsn(end.0 / SEGMENT_BYTES * SEGMENT_BYTES);
        assert_eq!(other.start(Some(&slot), Timeline(2), start, SOON).await.unwrap(), Started::Streaming);
        let archiving = Archiving::begin(order);
        let is_in_use = |error: &ArchiveError| refusal(error) == Some(Refusal::SlotInUse);
        let status = shows(&archiving, "it is in use", |status| status.last_error.as_deref().is_some_and(is_in_use)).await;
        assert_ne!(status.state, State::Streaming);
        drop(other);
        let end = fill(&session).await;
        let status = durable(&archiving, end).await;
        assert!(status.last_error.is_none(), "{status:?}");
        archiving.end().await;
    }
}

story! {
    async fn case_06_wal_that_the_server_has_removed_is_said_to_be_missing() {
        let scene = Scene::new(&[]).await;
        let session = scene.nodes[0].session().await;
        let archiving = Archiving::begin(scene.order(0).await);
        let archived = fill(&session).await;
        durable(&archiving, archived).await;
        archiving.end().await;
        // The slot keeps one segment at most, and others go with the next checkpoint.
        configure(&session, "wal_keep_size", "0").await;
        configure(&session, "max_slot_wal_keep_size", "1MB").await;
        for _ in 0..3 {
            fill(&session).await;
        }
        session.batch_execute("CHECKPOINT").await.unwrap();
        let status = format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        assert_eq!(ask(&session, &status).await, "lost");

        let archiving = Archiving::begin(scene.order(0).await);
        let is_removed = |error: &ArchiveError| {
            matches!(refusal(error), Some(Refusal::WalRemoved | Refusal::SlotInvalidated))
        };
        let status = shows(&archiving, "it is removed", |status| status.last_error.as_deref().is_some_and(is_removed)).await;
        let said = status.last_error.unwrap().to_string();
        eprintln!("{said}");
        archiving.end().await;
        let behind = archived.0 / SEGMENT_BYTES;
        let last = scene.inventory().await.range_of(Timeline(2)).unwrap().1;
        assert_eq!(last + 1, behind, "nothing is archived behind the hole");

        // Where a gap is left, what the next slot keeps is archived behind it.
        let active = format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        until("the server has noticed that nobody uses the slot", async || {
            (ask(&session, &active).await == "f").then_some(())
        })
        .await;
        ask(&session, &format!("SELECT pg_drop_replication_slot('{SLOT}')")).await;
        make_slot(&session).await;
        let archiving = Archiving::begin(archive::Order { gap: Gap::Leave, ..scene.order(0).await });
        let end = fill(&session).await;
        let status = durable(&archiving, end).await;
        assert!(status.last_error.is_none(), "{status:?}");
        archiving.end().await;
        let inventory = scene.inventory().await;
        assert!(!inventory.has(Segment { timeline: Timeline(2), number: behind }), "that is gone for good");
        assert!(inventory.has(Segment { timeline: Timeline(2), number: end.0 / SEGMENT_BYTES - 1 }));
    }
}

story! {
    async fn case_10_another_clusters_server_is_refused() {
        let scene = Scene::new(&[]).await;
        let mut order = scene.order(0).await;
        order.system = SystemId(42);
        let archiving = Archiving::begin(order);
        let is_other = |error: &ArchiveError| matches!(error, ArchiveError::OtherSystem { found, .. } if *found == scene.system);
        shows(&archiving, "it is refused", |status| status.last_error.as_deref().is_some_and(is_other)).await;
        archiving.end().await;
        assert!(!scene.herd.path().join("repository/cluster").exists());
    }
}

story! {
    async fn a_server_that_comes_back_and_a_store_that_comes_back_are_gone_on_with() {
        let scene = Scene::new(&[]).await;
        let archiving = Archiving::begin(scene.order(0).await);
        let session = scene.nodes[0].session().await;
        let end = fill(&session).await;
        durable(&archiving, end).await;
        // The disk of the repository is not mounted.
        let (place, aside) = (scene.herd.path().join("repository"), scene.herd.path().join("aside"));
        std::fs::rename(&place, &aside).unwrap();
        let end = fill(&session).await;
        let is_unmounted = |error: &ArchiveError| matches!(error, ArchiveError::Put(_));
        let status = shows(&archiving, "it cannot be put", |status| {
            status.last_error.as_deref().is_some_and(is_unmounted) && status.behind_since.is_some()
        })
        .await;
        assert!(status.durable < Some(end), "{status:?}");
        assert_eq!(status.state, State::Streaming, "what comes is received meanwhile");
        std::fs::rename(&aside, &place).unwrap();
        let status = durable(&archiving, end).await;
        assert!(status.last_error.is_none());
        shows(&archiving, "it is not behind", |status| status.behind_since.is_none()).await;
        drop(session);

        // Its postmaster is killed.
        scene.nodes[0].server.stop(StopMode::Kill, SOON).await.unwrap();
        shows(&archiving, "it is gone", |status| status.state != State::Streaming).await;
        let again = start(scene.nodes[0].instance()).await;
        let order = Order { timeline: Timeline(3), at_least: Lsn(0), names: SyncNames::Empty };
        promote(&again, &order, SOON).await.unwrap();
        let session = superuser(scene.nodes[0].instance()).await;
        let end = fill(&session).await;
        let status = durable(&archiving, end).await;
        assert_eq!(status.connections, 2);
        archiving.end().await;
        assert!(!scene.compare(0, Timeline(2)).await.is_empty());
    }
}
