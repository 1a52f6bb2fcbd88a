//! A standby becomes the primary, and the others follow it.

use std::time::Instant;

use pgherd_core::types::Timeline;
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::follow;
use pgherd_postgres::process::StopMode;
use pgherd_postgres::promote::{Order, pending, promote};
use pgherd_postgres::seal::seal;
use pgherd_postgres::wal::end_of_wal;

use crate::harness::{Herd, SOON, ask, story, until, upstream};

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

        let names = SyncNames::Any { needed: 1, members: vec![loser.member.clone()] };
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
    let names = SyncNames::Any { needed: 1, members: vec![loser.member.clone()] };
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
