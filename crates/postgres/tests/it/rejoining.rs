//! An old primary comes back, and a clone is made, throttled, cancelled and refused.

use std::time::Duration;

use pgherd_core::types::Timeline;
use pgherd_postgres::clone::{CloneError, Progress, clone, discard, remove_leftovers};
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::observe::checkpoint;
use pgherd_postgres::process::{StartError, StopMode};
use pgherd_postgres::promote::{Order, promote};
use pgherd_postgres::rewind::{RewindError, RewindOrder, Rewound, interrupted, rewind};
use pgherd_postgres::seal::{is_sealed_on_disk, seal};
use pgherd_postgres::wal::end_of_wal;
use pgherd_postgres::{Instance, MakingError, Server, follow, roles, slots};
use tokio::sync::watch;

use crate::harness::{Herd, Node, SOON, ask, settings, start, story, superuser, until, upstream};

fn no_progress() -> watch::Sender<Progress> {
    watch::Sender::new(Progress::default())
}

async fn rewind_order(herd: &Herd, source: &Instance) -> RewindOrder {
    let source = herd.remote(source, roles::REWIND, &herd.secrets.rewind).await;
    RewindOrder { source, restore_command: None, deadline: SOON }
}

/// `b` takes over from `a`, which dies with rows that nobody else has.
async fn failover_with_a_lost_tail(a: &Node, b: &Node) {
    a.session().await.batch_execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS id").await.unwrap();
    seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
    let alone = a.session().await;
    alone.batch_execute("SET synchronous_commit = local").await.unwrap();
    for id in 101..=107 {
        alone.batch_execute(&format!("INSERT INTO t VALUES ({id})")).await.unwrap();
    }
    a.server.stop(StopMode::Kill, SOON).await.unwrap();
    let order = Order { timeline: Timeline(4), at_least: Default::default(), names: SyncNames::Empty };
    promote(&b.server, &order, SOON).await.unwrap();
}

story! {
    async fn a_crashed_primary_is_rewound_and_what_only_it_had_is_kept_and_counted() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        failover_with_a_lost_tail(a, b).await;
        let session = b.session().await;
        session.batch_execute("CREATE TABLE later (id int)").await.unwrap();

        // What lies behind a fork is told, too: the caller knows which forks count.
        let alone = end_of_wal(a.instance(), None).unwrap();
        let fork = std::fs::copy(b.instance().pg_wal().join("00000004.history"), a.instance().pg_wal().join("00000004.history"));
        fork.unwrap();
        for unused in [2, 3] {
            let name = format!("{unused:08X}.history");
            std::fs::copy(b.instance().pg_wal().join(&name), a.instance().pg_wal().join(&name)).unwrap();
        }
        let told = end_of_wal(a.instance(), None).unwrap();
        assert_eq!((told.timeline, told.lsn, told.newest), (Timeline(2), alone.lsn, Timeline(4)));

        let order = rewind_order(&herd, b.instance()).await;
        match rewind(a.instance(), &settings(), &order, no_progress()).await {
            // Only if its first checkpoint was slower than this.
            Err(RewindError::NotCheckpointed { .. }) => {}
            Ok(Rewound::Rewound { .. }) => return,
            other => panic!("{other:?}"),
        }
    }
}

story! {
    async fn a_rewind_puts_its_own_files_back_and_the_node_follows() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        failover_with_a_lost_tail(a, b).await;
        let session = b.session().await;
        checkpoint(&session, SOON).await.unwrap();

        let order = rewind_order(&herd, b.instance()).await;
        let outcome = rewind(a.instance(), &settings(), &order, no_progress()).await.unwrap();
        let Rewound::Rewound { saved, source_timeline, fork } = outcome else { panic!("{outcome:?}") };
        assert_eq!(source_timeline, Timeline(4));
        let listing = std::fs::read_to_string(saved.dir.join("erased.txt")).unwrap();
        assert_eq!((saved.commits, saved.from), (Some(7), fork), "{saved:?} {listing}");
        assert_eq!(listing.matches("desc: INSERT").count(), 7, "{listing}");
        assert!(is_sealed_on_disk(a.instance()).unwrap());
        let conf = std::fs::read_to_string(a.instance().data_dir.join("postgresql.conf")).unwrap();
        assert!(conf.contains(&format!("port = '{}'", a.instance().port)), "its own configuration");

        slots::ensure(&session, &a.member, SOON).await.unwrap();
        herd.follow(a.instance(), None, b.instance(), &a.member).await;
        let again = start(a.instance()).await;
        let on_a = superuser(again.instance()).await;
        follow::streaming(&on_a, &upstream(b.instance(), &a.member), SOON).await.unwrap();
        until("the tail is gone and the rest is there", async || {
            (ask(&on_a, "SELECT max(id) FROM t").await == "100").then_some(())
        })
        .await;

        // Once more: nothing to do.
        again.stop(StopMode::Fast, SOON).await.unwrap();
        let outcome = rewind(a.instance(), &settings(), &order, no_progress()).await.unwrap();
        assert!(matches!(outcome, Rewound::NotNeeded { .. }), "{outcome:?}");
    }
}

story! {
    async fn a_rewind_fetches_what_this_node_has_no_more_of_its_own_wal() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        // The last checkpoint that both have, and some segments behind it.
        let on_a = a.session().await;
        on_a.batch_execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS id").await.unwrap();
        for _ in 0..3 {
            on_a.batch_execute("SELECT pg_switch_wal()").await.unwrap();
            on_a.batch_execute("INSERT INTO t SELECT generate_series(1, 100)").await.unwrap();
        }
        seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        on_a.batch_execute("SET synchronous_commit = local; INSERT INTO t VALUES (101)").await.unwrap();
        checkpoint(&on_a, SOON).await.unwrap();
        a.server.stop(StopMode::Kill, SOON).await.unwrap();
        let order = Order { timeline: Timeline(4), at_least: Default::default(), names: SyncNames::Empty };
        promote(&b.server, &order, SOON).await.unwrap();
        checkpoint(&b.session().await, SOON).await.unwrap();

        // As if a had removed what it does not need for itself.
        let archive = herd.path().join("archive it's");
        std::fs::create_dir(&archive).unwrap();
        let last = end_of_wal(a.instance(), None).unwrap().lsn.0 >> 24;
        for number in 1..last {
            let name = format!("{:08X}{:08X}{:08X}", 2, number >> 8, number & 0xFF);
            let there = a.instance().pg_wal().join(&name);
            if there.exists() {
                std::fs::rename(there, archive.join(name)).unwrap();
            }
        }
        let mut order = rewind_order(&herd, b.instance()).await;
        let outcome = rewind(a.instance(), &settings(), &order, no_progress()).await.unwrap();
        let Rewound::CannotRewind { why, .. } = outcome else { panic!("{outcome:?}") };
        assert!(why.contains("could not open file"), "{why}");

        // Called in the data directory, as PostgreSQL calls it: a relative path, too, leads there.
        let from = archive.display().to_string().replace('\'', "'\\''");
        order.restore_command = Some(format!("test -f PG_VERSION && cp '{from}'/%f %p"));
        let outcome = rewind(a.instance(), &settings(), &order, no_progress()).await.unwrap();
        assert!(matches!(outcome, Rewound::Rewound { .. }), "{outcome:?}");
        assert!(is_sealed_on_disk(a.instance()).unwrap(), "of the command nothing is left");
        herd.follow(a.instance(), None, b.instance(), &a.member).await;
        slots::ensure(&b.session().await, &a.member, SOON).await.unwrap();
        let again = start(a.instance()).await;
        assert_eq!(ask(&superuser(again.instance()).await, "SELECT count(*) FROM t").await, "400");
    }
}

story! {
    async fn where_a_rewind_cannot_work_it_says_so_and_a_clone_does() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        failover_with_a_lost_tail(a, b).await;
        let session = b.session().await;
        checkpoint(&session, SOON).await.unwrap();
        // The source refuses one of the functions that pg_rewind needs, so it stops half-way.
        session
            .batch_execute("REVOKE EXECUTE ON FUNCTION pg_read_binary_file(text, bigint, bigint, boolean) FROM pgherd_rewind")
            .await
            .unwrap();
        let order = rewind_order(&herd, b.instance()).await;
        let outcome = rewind(a.instance(), &settings(), &order, no_progress()).await.unwrap();
        let Rewound::CannotRewind { why, saved } = outcome else { panic!("{outcome:?}") };
        assert!(why.contains("permission denied") && saved.unwrap().commits == Some(7), "{why}");
        assert!(interrupted(a.instance()).unwrap());
        assert!(matches!(Server::start(a.instance(), SOON).await, Err(StartError::HalfRewound { .. })));

        discard(a.instance()).await.unwrap();
        assert!(!a.instance().data_dir.exists());
        slots::ensure(&session, &a.member, SOON).await.unwrap();
        let order = herd.clone_order(b.instance(), Some(&a.member)).await;
        clone(a.instance(), &settings(), &order, no_progress()).await.unwrap();
        herd.follow(a.instance(), None, b.instance(), &a.member).await;
        let again = start(a.instance()).await;
        let on_a = superuser(again.instance()).await;
        assert_eq!(ask(&on_a, "SELECT max(id) FROM t").await, "100");
    }
}

story! {
    async fn a_clone_that_is_cut_off_leaves_nothing_that_could_be_started() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let session = nodes[0].session().await;
        ask(&session, "CREATE TABLE big AS SELECT repeat(md5(i::text), 30) x FROM generate_series(1, 30000) i").await;
        let instance = herd.node("b").await;
        let mut order = herd.clone_order(nodes[0].instance(), None).await;
        order.max_rate_kb = Some(1024);
        let (tell, mut told) = watch::channel(Progress::default());
        {
            let settings = settings();
            let cloning = clone(&instance, &settings, &order, tell);
            tokio::select! {
                done = cloning => panic!("at 1 MB a second it takes longer: {done:?}"),
                seen = told.wait_for(|progress| progress.done_bytes > 2 << 20) => {
                    assert!(seen.unwrap().total_bytes > 30 << 20);
                }
            }
        }
        assert!(!instance.data_dir.exists());
        let half = instance.data_dir.with_file_name("data.pgherd_unfinished");
        assert!(half.exists());
        until("the source is left alone", async || {
            (ask(&session, "SELECT count(*) FROM pg_stat_replication").await == "0").then_some(())
        })
        .await;
        remove_leftovers(&instance).await.unwrap();
        assert!(!half.exists());

        order.max_rate_kb = None;
        clone(&instance, &settings(), &order, no_progress()).await.unwrap();
        assert!(is_sealed_on_disk(&instance).unwrap(), "it connects to nobody by itself");
        let started = start(&instance).await;
        assert_eq!(ask(&superuser(started.instance()).await, "SELECT count(*) FROM big").await, "30000");
        let refused = clone(&instance, &settings(), &order, no_progress()).await;
        assert!(matches!(refused, Err(CloneError::Making(MakingError::NotEmpty { .. }))));
    }
}

story! {
    async fn a_tablespace_nobody_named_a_place_for_is_refused_before_anything_is_copied() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let place = herd.path().join("space");
        std::fs::create_dir(&place).unwrap();
        let session = nodes[0].session().await;
        ask(&session, &format!("CREATE TABLESPACE fast LOCATION '{}'", place.display())).await;
        ask(&session, "CREATE TABLE t TABLESPACE fast AS SELECT 1 AS id").await;
        let instance = herd.node("b").await;
        let mut order = herd.clone_order(nodes[0].instance(), None).await;
        let refused = clone(&instance, &settings(), &order, no_progress()).await;
        assert!(matches!(refused, Err(CloneError::Tablespace { .. })), "{refused:?}");
        assert!(!instance.data_dir.with_file_name("data.pgherd_unfinished").exists());

        let there = place.display().to_string();
        order.tablespaces = vec![(there.clone(), format!("{there}_b"))];
        clone(&instance, &settings(), &order, no_progress()).await.unwrap();
        let started = start(&instance).await;
        assert_eq!(ask(&superuser(started.instance()).await, "SELECT id FROM t").await, "1");
        assert!(Duration::ZERO < SOON);
    }
}
