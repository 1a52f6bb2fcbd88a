//! After the seal nothing can be acknowledged that waits for the sealed standby, whatever held its replay up (S1).

use std::time::{Duration, Instant};

use pgherd_core::types::Lsn;
use pgherd_postgres::observe::resume_replay;
use pgherd_postgres::process::StopMode;
use pgherd_postgres::seal::{Sealed, is_sealed_on_disk, seal, stop_receiving};
use pgherd_postgres::sql::Session;
use pgherd_postgres::wal::end_of_wal;

use crate::harness::{Herd, Node, SOON, ask, story, superuser, until};

/// How long a commit is watched that must not be acknowledged. PostgreSQL tries a lost upstream again every 100 ms.
const WATCH: Duration = Duration::from_secs(2);

/// Seals `standby` and shows that a commit on `primary` that waits for it stays unacknowledged.
async fn seal_and_watch(primary: &Node, standby: &Node) -> Sealed {
    let before = primary.session().await;
    before.batch_execute("CREATE TABLE IF NOT EXISTS acknowledged (id serial)").await.unwrap();
    let at: Lsn = ask(&before, "INSERT INTO acknowledged DEFAULT VALUES; SELECT pg_current_wal_flush_lsn()")
        .await
        .parse()
        .unwrap();

    let sealed = seal(standby.instance(), Some(&standby.server), None, SOON).await.unwrap();
    assert!(sealed.end.lsn >= at, "what was acknowledged is counted: {} and {at}", sealed.end.lsn);
    assert!(is_sealed_on_disk(standby.instance()).unwrap());

    let session = primary.session().await;
    let commit = session.batch_execute("INSERT INTO acknowledged DEFAULT VALUES");
    let late = tokio::time::timeout(WATCH, commit).await;
    assert!(late.is_err(), "a commit was acknowledged after the seal");
    let again = end_of_wal(standby.instance(), None).unwrap();
    assert_eq!(again.lsn, sealed.end.lsn, "not a byte came after the seal");
    sealed
}

story! {
    async fn an_ordinary_standby() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let sealed = seal_and_watch(&nodes[0], &nodes[1]).await;
        eprintln!("sealed in {:?}", sealed.took);
        assert!(sealed.alive);
        assert_eq!(ask(&nodes[1].session().await, "SELECT 1").await, "1", "it still serves reads");
    }
}

story! {
    async fn a_standby_whose_replay_is_paused() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        nodes[1].session().await.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
        let sealed = seal_and_watch(&nodes[0], &nodes[1]).await;
        eprintln!("sealed in {:?}", sealed.took);
        assert!(sealed.alive);
        // Also when replay goes on, and asks for WAL again.
        resume_replay(&nodes[1].session().await, SOON).await.unwrap();
        // sleep: time in which a broken seal would let more in.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(end_of_wal(nodes[1].instance(), None).unwrap().lsn, sealed.end.lsn);
    }
}

/// Opens a snapshot on the standby that replay has to wait for.
pub(crate) async fn conflict(primary: &Node, standby: &Node) -> Session {
    let write = primary.session().await;
    write
        .batch_execute("CREATE TABLE held (id int); INSERT INTO held SELECT generate_series(1, 100)")
        .await
        .unwrap();
    let read = standby.session().await;
    until("the table is on the standby", async || read.simple_query("SELECT FROM held").await.ok()).await;
    read.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM held").await.unwrap();
    write.batch_execute("SET synchronous_commit = local; DROP TABLE held").await.unwrap();
    until("replay waits for the reader", async || {
        let watch = superuser(standby.instance()).await;
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'startup' AND wait_event_type = 'Lock'";
        (ask(&watch, waits).await == "1").then_some(())
    })
    .await;
    read
}

story! {
    async fn a_standby_whose_replay_waits_for_a_reader() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let standby = nodes[1].session().await;
        standby.batch_execute("ALTER SYSTEM SET max_standby_streaming_delay = -1").await.unwrap();
        standby.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        let _reader = conflict(&nodes[0], &nodes[1]).await;
        let sealed = seal_and_watch(&nodes[0], &nodes[1]).await;
        eprintln!("sealed in {:?}", sealed.took);
        assert!(sealed.alive, "the reader goes on reading");
    }
}

story! {
    async fn a_standby_that_is_not_connected() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let at = nodes[1].session().await;
        let before: Lsn = ask(&at, "SELECT pg_last_wal_receive_lsn()").await.parse().unwrap();
        nodes[0].server.stop(StopMode::Kill, SOON).await.unwrap();
        let sealed = seal(nodes[1].instance(), Some(&nodes[1].server), None, SOON).await.unwrap();
        assert!(sealed.alive && sealed.end.lsn >= before);
    }
}

story! {
    async fn a_server_that_is_stopped_or_killed_or_frozen_is_sealed_dead() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let b = &nodes[1];
        let at: Lsn = ask(&nodes[0].session().await, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        until("the standby has it", async || {
            let has: Lsn = ask(&b.session().await, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
            (has >= at).then_some(())
        })
        .await;

        // Frozen: the receiver cannot end, so the whole server is killed.
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let cwd = std::fs::read_link(process.path().join("cwd")).unwrap_or_default();
            if cwd == b.instance().data_dir {
                let pid: i32 = process.file_name().to_str().unwrap().parse().unwrap();
                rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::STOP).unwrap();
            }
        }
        let began = Instant::now();
        let sealed = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        eprintln!("sealed dead in {:?}", began.elapsed());
        assert!(!sealed.alive && b.server.is_dead());
        assert!(sealed.end.lsn >= at);

        // Sealed again, it says the same.
        let again = seal(b.instance(), None, None, SOON).await.unwrap();
        assert_eq!((again.alive, again.end.lsn), (false, sealed.end.lsn));
    }
}

story! {
    async fn what_the_startup_process_still_remembers_is_of_no_use_to_it() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        let remembered = ask(&b.session().await, "SHOW primary_conninfo").await;
        let sealed = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();

        // As if it had not read its configuration: the old connection string is in force again.
        let conf = b.instance().data_dir.join("pgherd.conf");
        let text = std::fs::read_to_string(&conf).unwrap();
        let old = text.replace("primary_conninfo = ''", &format!("primary_conninfo = '{remembered}'"));
        assert_ne!(old, text);
        std::fs::write(&conf, old).unwrap();
        b.server.reload().unwrap();
        until("a receiver was refused", async || {
            let logged = pgherd_postgres::logs::tail(b.instance(), 50).await.unwrap()?.text;
            logged.contains("no password supplied").then_some(())
        })
        .await;
        let session = a.session().await;
        let commit = session.batch_execute("CREATE TABLE t ()");
        assert!(tokio::time::timeout(WATCH, commit).await.is_err(), "a commit was acknowledged after the seal");
        assert_eq!(end_of_wal(b.instance(), None).unwrap().lsn, sealed.end.lsn);
    }
}

story! {
    async fn a_standby_whose_restore_command_hangs_is_sealed_dead_and_alter_system_does_not_undo_a_seal() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let b = &nodes[1];
        let session = b.session().await;
        ask(&session, "ALTER SYSTEM SET restore_command = 'sleep 60'").await;
        ask(&session, "ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'").await;
        ask(&session, "SELECT pg_reload_conf()").await;
        until("it tries to restore", async || {
            let title = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'startup' AND wait_event ILIKE '%restore%'";
            (ask(&session, title).await == "1").then_some(())
        })
        .await;
        assert!(!is_sealed_on_disk(b.instance()).unwrap());
        let began = Instant::now();
        let mut sealed = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        eprintln!("sealed dead in {:?}", began.elapsed());
        sealed.removed.sort();
        assert_eq!(sealed.removed, ["primary_conninfo", "restore_command"]);
        assert!(!sealed.alive && is_sealed_on_disk(b.instance()).unwrap());
    }
}

story! {
    async fn sessions_that_come_and_go_do_not_hold_a_seal_up() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let b = &nodes[1];
        let mut storm = Vec::new();
        for _ in 0..8 {
            let instance = b.instance().clone();
            storm.push(tokio::spawn(async move {
                while let Ok(session) = Session::local(&instance, "postgres", SOON).await {
                    session.simple_query("SELECT 1").await.ok();
                }
            }));
        }
        // sleep: the load must have begun.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let sealed = seal_and_watch(&nodes[0], b).await;
        eprintln!("sealed in {:?}", sealed.took);
        assert!(sealed.alive);
        storm.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

story! {
    /// Where no vote follows nobody waits for the end of WAL, which takes long behind an old checkpoint.
    async fn a_standby_stops_receiving_and_follows_again() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        a.session().await.batch_execute("CREATE TABLE t (id int)").await.unwrap();
        let on_b = b.session().await;
        let is_there = "SELECT (to_regclass('t') IS NOT NULL)::text";
        until("b has the table", async || (ask(&on_b, is_there).await == "true").then_some(())).await;
        assert!(stop_receiving(b.instance(), Some(&b.server), SOON).await.unwrap(), "its server goes on");
        assert!(is_sealed_on_disk(b.instance()).unwrap());
        let receivers = "SELECT count(*) FROM pg_stat_wal_receiver";
        until("no receiver is left", async || (ask(&on_b, receivers).await == "0").then_some(())).await;
        // Nobody is there who could acknowledge it.
        let alone = "SET synchronous_commit = local; INSERT INTO t VALUES (1)";
        a.session().await.batch_execute(alone).await.unwrap();
        herd.follow(b.instance(), Some(&b.server), a.instance(), &b.member).await;
        until("b has caught up", async || {
            (ask(&on_b, "SELECT count(*) FROM t").await == "1").then_some(())
        })
        .await;
    }
}
