//! A stream of WAL from a real server: who may have one, what it says, and how it ends.

use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::promote::{Order, promote};
use pgherd_postgres::replication::{
    Message, Refusal, Replication, ReplicationError, SlotName, Source, Started,
};
use pgherd_postgres::roles;
use pgherd_postgres::secret::Secret;
use pgherd_postgres::sql::Session;

use crate::harness::{Herd, Node, SOON, ask, story, until};

async fn source(herd: &Herd, node: &Node) -> Source {
    let remote = herd.remote(node.instance(), roles::REPLICATION, &herd.secrets.replication).await;
    Source::Remote(Box::new(remote))
}

async fn lsn(session: &Session, query: &str) -> Lsn {
    ask(session, query).await.parse().unwrap()
}

/// Reads up to `end`; what came, without the positions.
async fn received(stream: &mut Replication, start: Lsn, end: Lsn) -> Vec<u8> {
    let mut all = Vec::new();
    while start.0 + (all.len() as u64) < end.0 {
        match tokio::time::timeout(SOON, stream.next()).await.expect("the stream goes on").unwrap() {
            Message::Wal { start: at, wal, server_end } => {
                assert_eq!(at.0, start.0 + all.len() as u64, "nothing is left out");
                assert!(server_end.0 >= at.0 + wal.len() as u64);
                all.extend_from_slice(&wal);
            }
            Message::Keepalive { .. } => {}
            Message::TimelineEnds => panic!("it has not ended"),
        }
    }
    all
}

story! {
    async fn a_stream_has_the_bytes_of_pg_wal_and_what_is_reported_moves_the_slot() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let session = nodes[0].session().await;
        let slot = SlotName::new("keeper").unwrap();
        let mut stream = Replication::open(&source(&herd, &nodes[0]).await, SOON).await.unwrap();
        let identified = stream.identify(SOON).await.unwrap();
        assert_eq!((identified.timeline, identified.segment_bytes), (Timeline(2), 16 << 20));
        let system = ask(&session, "SELECT system_identifier FROM pg_control_system()").await;
        assert_eq!(identified.system.to_string(), system);
        let history = stream.history(Timeline(2), SOON).await.unwrap();
        let file = nodes[0].instance().pg_wal().join("00000002.history");
        assert_eq!(history, std::fs::read(file).unwrap());

        assert_eq!(stream.slot(&slot, SOON).await.unwrap(), None);
        ask(&session, "SELECT pg_create_physical_replication_slot('keeper', true)").await;
        let kept = stream.slot(&slot, SOON).await.unwrap().unwrap();
        assert!(kept.0.is_some_and(|(timeline, _)| timeline == Timeline(2)), "{kept:?}");

        let start = Lsn(identified.end.0 / (16 << 20) * (16 << 20));
        let begun = stream.start(Some(&slot), Timeline(2), start, SOON).await.unwrap();
        assert_eq!(begun, Started::Streaming);
        session.batch_execute("CREATE TABLE t AS SELECT generate_series(1, 20000) AS n").await.unwrap();
        let end = lsn(&session, "SELECT pg_current_wal_flush_lsn()").await;
        let wal = received(&mut stream, start, end).await;
        let name = ask(&session, &format!("SELECT pg_walfile_name('{start}'::pg_lsn + 1)")).await;
        let file = std::fs::read(nodes[0].instance().pg_wal().join(name)).unwrap();
        let shown = wal.len().min(file.len());
        assert!(wal[..shown] == file[..shown], "the server's file has the same bytes");

        stream.report(end, true).await.unwrap();
        loop {
            let said = tokio::time::timeout(SOON, stream.next()).await.expect("it was asked to answer").unwrap();
            if matches!(said, Message::Keepalive { .. }) {
                break;
            }
        }
        let query = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'keeper'";
        // The answer comes a moment before the slot has moved.
        until("the slot has moved", async || (lsn(&session, query).await == end).then_some(())).await;

        // Somebody else who wants the same slot is told so, and can act on it.
        let mut second = Replication::open(&source(&herd, &nodes[0]).await, SOON).await.unwrap();
        let refused = second.start(Some(&slot), Timeline(2), start, SOON).await.unwrap_err();
        assert_eq!(refused.refusal(), Some(Refusal::SlotInUse), "{refused}");
        let missing = SlotName::new("select").unwrap();
        let refused = second.start(Some(&missing), Timeline(2), start, SOON).await.unwrap_err();
        assert_eq!(refused.refusal(), Some(Refusal::SlotMissing), "{refused}");
    }
}

story! {
    async fn a_stream_ends_with_its_timeline_and_says_what_follows() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let mut stream = Replication::open(&source(&herd, &nodes[1]).await, SOON).await.unwrap();
        let start = Lsn(stream.identify(SOON).await.unwrap().end.0 / (16 << 20) * (16 << 20));
        stream.start(None, Timeline(2), start, SOON).await.unwrap();
        let order = Order { timeline: Timeline(4), at_least: Lsn(0), names: SyncNames::Empty };
        promote(&nodes[1].server, &order, SOON).await.unwrap();
        nodes[1].session().await.batch_execute("CREATE TABLE t (n int)").await.unwrap();

        let mut position = start;
        loop {
            match tokio::time::timeout(SOON, stream.next()).await.expect("it ends").unwrap() {
                Message::Wal { start, wal, .. } => position = Lsn(start.0 + wal.len() as u64),
                Message::Keepalive { .. } => {}
                Message::TimelineEnds => break,
            }
        }
        let next = stream.next_timeline(SOON).await.unwrap();
        assert_eq!((next.timeline, next.from), (Timeline(4), position));
        assert!(stream.start(None, Timeline(4), start, SOON).await.unwrap() == Started::Streaming);
        drop(stream);

        // From the fork on there is nothing on the old timeline.
        let mut stream = Replication::open(&source(&herd, &nodes[1]).await, SOON).await.unwrap();
        assert_eq!(stream.start(None, Timeline(2), position, SOON).await.unwrap(), Started::Ended(next));
        assert_eq!(stream.identify(SOON).await.unwrap().timeline, Timeline(4), "it can be asked again");
        let beyond = Lsn(position.0 + (16 << 20));
        let refused = stream.start(None, Timeline(2), beyond, SOON).await.unwrap_err();
        assert!(refused.to_string().contains("not in this server's history"), "{refused}");
        assert_eq!(refused.refusal(), None);
    }
}

story! {
    async fn nobody_has_a_stream_without_the_password_or_from_a_stranger() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let Source::Remote(right) = source(&herd, &nodes[0]).await else { unreachable!() };
        let wrong = Source::Remote(Box::new(pgherd_postgres::sql::Remote {
            password: Secret::new("another"),
            ..(*right).clone()
        }));
        let refused = Replication::open(&wrong, SOON).await.err().unwrap();
        assert!(matches!(&refused, ReplicationError::NotIn { .. }), "{refused}");
        assert!(!refused.to_string().contains("another"), "{refused}");
        let elsewhere = Source::Remote(Box::new(pgherd_postgres::sql::Remote {
            host: "b".to_owned(),
            ..(*right).clone()
        }));
        let refused = Replication::open(&elsewhere, SOON).await.err().unwrap();
        assert!(matches!(&refused, ReplicationError::Io { .. }), "its certificate names another: {refused}");
        let local = Source::local(nodes[0].instance(), roles::SUPERUSER);
        let refused = Replication::open(&local, SOON).await.err().unwrap();
        assert!(refused.to_string().contains("28000"), "the gate lets nobody replicate by the socket: {refused}");
    }
}
