//! A standby becomes the primary, and the others follow it.

use std::time::{Duration, Instant};

use pgherd_core::types::{Lsn, Member, Timeline};
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::process::{Found, Status, StopMode, ensure_gone};
use pgherd_postgres::promote::{Order, PromoteError, pending, promote, settle};
use pgherd_postgres::seal::seal;
use pgherd_postgres::wal::end_of_wal;
use pgherd_postgres::{Instance, InstanceSpec, MakingError, Server, follow};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Herd, SOON, ask, story, stream, until, upstream};

story! {
    async fn a_failover_by_hand_loses_nothing_and_takes_the_reserved_timeline() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b", "c"]).await;
        let [a, b, c] = &nodes[..] else { unreachable!() };
        herd.wait_for(a, 1, &[&b.member, &c.member]).await;
        let session = a.session().await;
        session.batch_execute("CREATE TABLE kept (id int); INSERT INTO kept SELECT generate_series(1, 1000)").await.unwrap();
        drop(session);
        a.server.stop(StopMode::Kill, SOON).await.unwrap();

        let began = Instant::now();
        let (on_b, on_c) = tokio::join!(
            seal(b.instance(), Some(&b.server), None, SOON),
            seal(c.instance(), Some(&c.server), None, SOON),
        );
        let (on_b, on_c) = (on_b.unwrap(), on_c.unwrap());
        eprintln!("sealed both in {:?}: {:?} and {:?}", began.elapsed(), on_b.took, on_c.took);
        assert!(on_b.alive && on_c.alive && on_b.end.consistent);
        assert_eq!(on_b.end.timeline, Timeline(2));
        let (winner, loser, voted) = if on_b.end.lsn >= on_c.end.lsn { (b, c, on_b) } else { (c, b, on_c) };

        let names = SyncNames::Any { needed: 1, streams: vec![stream(&loser.member)] };
        let order = Order { timeline: Timeline(7), at_least: voted.end.lsn, names };
        let promoted = promote(&winner.server, &order, SOON).await.unwrap();
        eprintln!("promoted in {:?}", promoted.took);
        assert_eq!(promoted.timeline, Timeline(7));
        assert_eq!((promoted.forked_from, promoted.fork), (Timeline(2), voted.end.lsn));
        assert!(promoted.end > promoted.fork);
        assert!(winner.instance().standby_signal().exists(), "it does not come back as a primary by itself");
        assert_eq!(pending(winner.instance()).unwrap(), None);

        let session = winner.session().await;
        pgherd_postgres::slots::ensure(&session, &loser.member, SOON).await.unwrap();
        let pointed = Instant::now();
        herd.follow(loser.instance(), Some(&loser.server), winner.instance(), &loser.member).await;
        session.batch_execute("INSERT INTO kept VALUES (1001)").await.unwrap();
        eprintln!("first synchronous commit {:?} after pointing, {:?} in all", pointed.elapsed(), began.elapsed());
        assert_eq!(ask(&session, "SELECT count(*) FROM kept").await, "1001");

        // The old primary went no further than the fork, so that it follows without being rewound.
        let end = end_of_wal(a.instance(), None).unwrap();
        assert_eq!(end.timeline, Timeline(2));
        if end.lsn <= promoted.fork {
            pgherd_postgres::slots::ensure(&session, &a.member, SOON).await.unwrap();
            herd.follow(a.instance(), None, winner.instance(), &a.member).await;
            let again = crate::harness::start(a.instance()).await;
            let session = crate::harness::superuser(again.instance()).await;
            follow::streaming(&session, &upstream(winner.instance(), &a.member), SOON).await.unwrap();
            until("the old primary has replayed all", async || {
                (ask(&session, "SELECT count(*) FROM kept").await == "1001").then_some(())
            })
            .await;
        }
    }
}

/// Not a test of right and wrong: prints what the steps of a failover take on this machine.
async fn measure(pointed_early: bool) {
    let herd = Herd::new().await;
    let nodes = herd.cluster("a", &["b", "c"]).await;
    let [a, b, c] = &nodes[..] else { unreachable!() };
    herd.wait_for(a, 1, &[&b.member, &c.member]).await;
    a.session().await.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    let (winner, loser) = (b, c);
    a.server.stop(StopMode::Fast, SOON).await.unwrap();
    let began = Instant::now();
    let (on_winner, on_loser) = tokio::join!(
        seal(winner.instance(), Some(&winner.server), None, SOON),
        seal(loser.instance(), Some(&loser.server), None, SOON),
    );
    let (on_winner, _) = (on_winner.unwrap(), on_loser.unwrap());
    let sealed = began.elapsed();
    let names = SyncNames::Any { needed: 1, streams: vec![stream(&loser.member)] };
    let order = Order { timeline: Timeline(3), at_least: on_winner.end.lsn, names };
    let point = async || {
        herd.follow(loser.instance(), Some(&loser.server), winner.instance(), &loser.member).await;
    };
    // The slot is there before, as in a herd.
    pgherd_postgres::slots::ensure(&winner.session().await, &loser.member, SOON).await.unwrap();
    let promoted = if pointed_early {
        tokio::join!(promote(&winner.server, &order, SOON), point()).0.unwrap()
    } else {
        let promoted = promote(&winner.server, &order, SOON).await.unwrap();
        point().await;
        promoted
    };
    let pointed = began.elapsed();
    winner.session().await.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    let committed = began.elapsed();
    eprintln!(
        "early {pointed_early}: sealed {sealed:?}, {:?}, pointed at {pointed:?}, commit at {committed:?}",
        promoted.took
    );
    if std::env::var_os("PGHERD_TEST_SHOW_LOGS").is_some() {
        crate::harness::show_logs(winner.instance());
        crate::harness::show_logs(loser.instance());
    }
}

story! {
    #[ignore = "a measurement"]
    async fn how_long_a_failover_takes() {
        for early in [false, true, false, true, false, true] {
            measure(early).await;
        }
    }
}

story! {
    /// What the winner had received ends in the middle of a record. Its WAL sender has passed that on to a standby that
    /// was there before the promotion, and shows it as flushed until the standby first answers on the new timeline.
    async fn wal_goes_on_beyond_what_an_early_standby_can_have_flushed() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b", "c"]).await;
        let [a, b, c] = &nodes[..] else { unreachable!() };
        a.session().await.batch_execute("CREATE TABLE t (id int)").await.unwrap();
        // A record that takes long to send, and its senders, stopped: one before it, the other in the middle of it.
        let (on_a, on_b) = (a.session().await, b.session().await);
        let walsender = async |name: &Member| {
            let named = format!("SELECT pid FROM pg_stat_replication WHERE application_name = '{}'", stream(name));
            Pid::from_raw(until("it streams", async || ask(&on_a, &named).await.parse().ok()).await).unwrap()
        };
        let (to_b, to_c) = (walsender(&b.member).await, walsender(&c.member).await);
        kill_process(to_b, Signal::STOP).unwrap();
        kill_process(to_c, Signal::STOP).unwrap();
        let big = "SELECT pg_logical_emit_message(false, 'big', repeat('x', 200000000))::text";
        let whole: Lsn = ask(&on_a, big).await.parse().unwrap();
        kill_process(to_b, Signal::CONT).unwrap();
        let grown = "SELECT (pg_last_wal_receive_lsn() - pg_last_wal_replay_lsn() > 300000)::text";
        until("b has received a part of it", async || (ask(&on_b, grown).await == "true").then_some(())).await;
        kill_process(to_b, Signal::STOP).unwrap();
        a.server.stop(StopMode::Kill, SOON).await.unwrap();
        drop(on_a);

        let sealed = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        let on_c = seal(c.instance(), Some(&c.server), None, SOON).await.unwrap();
        assert!(on_c.end.lsn <= sealed.end.lsn && sealed.end.lsn < whole, "neither has the whole record");
        let received: Lsn = ask(&on_b, "SELECT pg_last_wal_receive_lsn()::text").await.parse().unwrap();
        assert!(received > sealed.end.lsn, "{received} ends in the middle of a record");

        pgherd_postgres::slots::ensure(&on_b, &c.member, SOON).await.unwrap();
        drop(on_b);
        herd.follow(c.instance(), Some(&c.server), b.instance(), &c.member).await;
        let early = b.session().await;
        let flushed = "SELECT coalesce(max(flush_lsn)::text, '0/0') FROM pg_stat_replication";
        until("c has flushed a part of a record from b", async || {
            (ask(&early, flushed).await.parse::<Lsn>().unwrap() > sealed.end.lsn).then_some(())
        })
        .await;
        drop(early);

        let names = SyncNames::Any { needed: 1, streams: vec![stream(&c.member)] };
        let order = Order { timeline: Timeline(4), at_least: sealed.end.lsn, names };
        let promoted = promote(&b.server, &order, SOON).await.unwrap();
        assert_eq!(promoted.fork, sealed.end.lsn);
        assert!(promoted.end > received, "{} proves nothing below {received}", promoted.end);
        let session = b.session().await;
        session.batch_execute("INSERT INTO t VALUES (7)").await.unwrap();
        drop(session);
        b.server.stop(StopMode::Kill, SOON).await.unwrap();
        until("c has what was acknowledged", async || {
            (ask(&c.session().await, "SELECT count(*) FROM t WHERE id = 7").await == "1").then_some(())
        })
        .await;
    }
}

story! {
    async fn neither_a_reader_nor_a_pause_holds_a_promotion_up() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b", "c"]).await;
        let [a, b, c] = &nodes[..] else { unreachable!() };
        // On b replay waits for a reader for ever; on c it is paused.
        let on_b = b.session().await;
        on_b.batch_execute("ALTER SYSTEM SET max_standby_streaming_delay = -1").await.unwrap();
        on_b.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        let reader = crate::sealing::conflict(a, b).await;
        c.session().await.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
        a.session().await.batch_execute("SET synchronous_commit = local; CREATE TABLE t AS SELECT 7 AS id").await.unwrap();
        a.server.stop(StopMode::Fast, SOON).await.unwrap();

        for (node, timeline) in [(b, 3), (c, 4)] {
            let sealed = seal(node.instance(), Some(&node.server), None, SOON).await.unwrap();
            assert!(sealed.alive);
            let order = Order { timeline: Timeline(timeline), at_least: sealed.end.lsn, names: SyncNames::Empty };
            let promoted = promote(&node.server, &order, SOON).await.unwrap();
            eprintln!("promoted in {:?}", promoted.took);
            assert_eq!(promoted.fork, sealed.end.lsn, "all that was received was replayed");
            assert_eq!(ask(&node.session().await, "SELECT id FROM t").await, "7");
        }
        assert!(reader.simple_query("SELECT 1").await.is_err(), "its session was ended");
    }
}

story! {
    async fn a_promotion_that_does_not_give_what_was_decided_leaves_no_primary() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let b = &nodes[1];
        let sealed = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        let taken = Order { timeline: Timeline(2), at_least: sealed.end.lsn, names: SyncNames::Nobody };
        let refused = promote(&b.server, &taken, SOON).await;
        assert!(matches!(refused, Err(PromoteError::Reserve(_))), "{refused:?}");
        assert!(!b.server.is_dead(), "nothing was begun");

        let more = Order { timeline: Timeline(3), at_least: Lsn(sealed.end.lsn.0 + 8), names: SyncNames::Nobody };
        let short = promote(&b.server, &more, SOON).await;
        assert!(matches!(short, Err(PromoteError::FellShort { .. })), "{short:?}");
        assert!(b.server.is_dead());

        // It was promoted, though, and is started as a standby on that timeline.
        let again = crate::harness::start(b.instance()).await;
        let frozen = Order { timeline: Timeline(4), at_least: Lsn(0), names: SyncNames::Nobody };
        kill_process(Pid::from_raw(again.pid()).unwrap(), Signal::STOP).unwrap();
        let slow = promote(&again, &frozen, Duration::from_millis(500)).await;
        assert!(slow.is_err(), "{slow:?}");
        ensure_gone(b.instance(), SOON).await.unwrap();
        assert_eq!(pending(b.instance()).unwrap(), None);
        assert_eq!(crate::harness::start(b.instance()).await.status().unwrap(), Some(Status::Ready));
    }
}

story! {
    async fn wal_on_a_volume_of_its_own_is_made_cloned_and_removed() {
        let herd = Herd::new().await;
        let on_own_volume = |instance: &Instance| {
            let wal_dir = Some(instance.private_dir.with_file_name("wal"));
            Instance::new(InstanceSpec { wal_dir, ..InstanceSpec::clone(instance) }).unwrap()
        };
        let a = on_own_volume(&herd.node("a").await);
        pgherd_postgres::initdb::initdb(&a, &crate::harness::settings(), &herd.secrets.superuser, SOON).await.unwrap();
        let server = crate::harness::start(&a).await;
        let order = Order { timeline: Timeline(2), at_least: Lsn(0), names: SyncNames::Empty };
        promote(&server, &order, SOON).await.unwrap();
        let session = crate::harness::superuser(&a).await;
        pgherd_postgres::roles::ensure_own(&session, &herd.own_roles(), SOON).await.unwrap();

        let b = on_own_volume(&herd.node("b").await);
        for _ in 0..2 {
            let order = herd.clone_order(&a, None).await;
            let progress = tokio::sync::watch::Sender::new(Default::default());
            pgherd_postgres::clone::clone(&b, &crate::harness::settings(), &order, progress).await.unwrap();
            assert!(std::fs::symlink_metadata(b.pg_wal()).unwrap().is_symlink());
            assert!(b.wal_dir.as_ref().unwrap().join("pg_wal").read_dir().unwrap().count() > 0);
            let server = crate::harness::start(&b).await;
            assert!(matches!(pgherd_postgres::clone::discard(&b).await, Err(MakingError::Running { .. })));
            server.stop(StopMode::Fast, SOON).await.unwrap();
            pgherd_postgres::clone::discard(&b).await.unwrap();
            assert!(!b.data_dir.exists() && !b.wal_dir.as_ref().unwrap().join("pg_wal").exists());
        }
    }
}

story! {
    async fn a_promotion_whose_agent_died_is_ended_by_the_next() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let b = &nodes[1];
        let sealed = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        // The agent dies at some moment of the promotion: here, when it has been triggered and PostgreSQL is slow.
        let startup = ask(&b.session().await, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'startup'").await;
        let startup = Pid::from_raw(startup.parse().unwrap()).unwrap();
        kill_process(startup, Signal::STOP).unwrap();
        let order = Order { timeline: Timeline(5), at_least: sealed.end.lsn, names: SyncNames::Nobody };
        let died = tokio::time::timeout(Duration::from_secs(2), promote(&b.server, &order, SOON)).await;
        assert!(died.is_err(), "{died:?}");
        assert_eq!(pending(b.instance()).unwrap(), Some(Timeline(5)));

        kill_process(startup, Signal::CONT).unwrap();
        let Found::Running(adopted) = Server::find(b.instance()).await.unwrap() else { panic!("it runs") };
        let control = settle(&adopted, SOON).await.unwrap();
        assert_eq!(control.timeline(), Timeline(5));
        assert!(b.instance().standby_signal().exists());
        assert_eq!(pending(b.instance()).unwrap(), None);
    }
}
