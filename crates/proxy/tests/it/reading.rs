//! Clients that write, and read from standbys what they provably only read.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant as Moment};

use pgherd_proxy::Settings;
use pgherd_proxy::routes::{Standby, Table, Target};
use tokio_postgres::Client;

use crate::harness::{PASSWORD, Scene, connect, one, settings, story, told, until};
use crate::server::Server;

impl Scene {
    /// Standbys of the scene's server, which is the primary; from now on the proxy knows of them.
    fn with_standbys(&self, count: usize) -> Vec<Server> {
        let standbys: Vec<Server> = (0..count).map(|_| Server::standby_of(&self.server)).collect();
        self.tell_of(&standbys);
        standbys
    }

    fn tell_of(&self, standbys: &[Server]) {
        let table = Table { standbys: self.standbys(standbys), ..self.table(1, Some("a")) };
        assert!(self.proxy.learn(table));
    }

    fn standbys(&self, standbys: &[Server]) -> Vec<Standby> {
        let names = ["b", "c", "d"].iter();
        let standby = |(name, server): (&&str, &Server)| {
            let (node, address) = (name.parse().unwrap(), Ipv4Addr::LOCALHOST.into());
            let target = Target { node, address, port: server.port, socket_dir: None };
            Standby { target, weight: 1 }
        };
        names.zip(standbys).map(standby).collect()
    }

    async fn splitter(&self) -> Client {
        let conninfo = self.conninfo("alice", "options='-c pgherd.split_reads=on'");
        connect(&conninfo.replace("dbname=shop", "dbname=mall")).await.unwrap()
    }
}

/// So that nobody waits for a replay that a busy machine delays.
fn patient() -> Settings {
    let mut settings = settings();
    settings.reads.wait = Duration::from_secs(5);
    settings
}

/// Of the server that answered.
const PORT: &str = "SELECT current_setting('port')";

async fn admin_of(server: &Server) -> Client {
    connect(&format!("host=127.0.0.1 port={} user=postgres dbname=mall", server.port)).await.unwrap()
}

story! {
    async fn whoever_reads_goes_on_at_a_standby_that_follows_the_next_primary(scene) {
        scene.proxy.replace(patient());
        let standbys = scene.with_standbys(1);
        let standby = standbys[0].port.to_string();
        // With a server of its own, and with one for the transaction.
        let reading = scene.reading();
        let (kept, lent) = (connect(&reading).await.unwrap(), connect(&reading.replace("dbname=shop", "dbname=mall")).await.unwrap());
        let mut waiting = Vec::new();
        for reader in [&kept, &lent] {
            reader.batch_execute("BEGIN").await.unwrap();
            assert_eq!(one(reader, PORT).await, standby);
        }
        assert!(scene.proxy.learn(Table { standbys: Vec::new(), ..scene.table(2, None) }));
        for reader in [kept, lent] {
            waiting.push(tokio::spawn(async move { (one(&reader, PORT).await, reader) }));
        }
        // sleep: what must not happen has time to happen.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(waiting.iter().all(|asked| !asked.is_finished()), "nothing is sent while nobody leads");
        assert!(scene.proxy.learn(Table { standbys: scene.standbys(&standbys), ..scene.table(2, Some("a")) }));
        for asked in waiting {
            let (port, reader) = asked.await.unwrap();
            assert_eq!(port, standby);
            reader.batch_execute("COMMIT").await.unwrap();
            assert_eq!(one(&reader, PORT).await, standby);
        }
    }
}

story! {
    async fn what_provably_reads_is_read_from_a_standby_and_nothing_else(scene) {
        scene.proxy.replace(patient());
        let standbys = scene.with_standbys(1);
        let (primary, standby) = (scene.server.port.to_string(), standbys[0].port.to_string());
        let client = scene.splitter().await;
        client
            .batch_execute(
                "CREATE TABLE t (id int, n int); INSERT INTO t VALUES (1, 1); \
                 CREATE FUNCTION more() RETURNS int LANGUAGE sql VOLATILE AS 'UPDATE t SET n = n + 1 RETURNING n'; \
                 CREATE FUNCTION where_it_is() RETURNS text LANGUAGE sql STABLE AS $$ SELECT current_setting('port') $$; \
                 CREATE VIEW sly AS SELECT more() AS n, current_setting('port') AS port",
            )
            .await
            .unwrap();
        assert_eq!(one(&client, PORT).await, standby);
        assert_eq!(one(&client, "SELECT n::text FROM t").await, "1", "what it wrote it reads");
        for on_the_primary in [
            "SELECT current_setting('port') FROM t FOR UPDATE",
            "SELECT current_setting('port') FROM pg_stat_activity",
            "SELECT more(), current_setting('port')",
            "SELECT pg_advisory_xact_lock(1), current_setting('port')",
            "INSERT INTO t SELECT 2, 2 RETURNING current_setting('port')",
        ] {
            let rows = client.query(on_the_primary, &[]).await.unwrap();
            let row = &rows[0];
            assert_eq!(row.get::<_, String>(row.len() - 1), primary, "{on_the_primary}");
        }
        // In a transaction everything is.
        client.batch_execute("BEGIN").await.unwrap();
        assert_eq!(one(&client, PORT).await, primary);
        client.batch_execute("COMMIT").await.unwrap();
        // Also one that says that it only reads: it may say otherwise, and do what only the primary does.
        for begin in ["BEGIN READ ONLY", "START TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"] {
            client.batch_execute(begin).await.unwrap();
            client.batch_execute("SET TRANSACTION READ WRITE; LISTEN something").await.unwrap();
            assert_eq!(one(&client, "SELECT more()::text").await, "3");
            assert_eq!(one(&client, PORT).await, primary, "{begin}");
            client.batch_execute("ROLLBACK").await.unwrap();
        }
        // A statement that has a name is prepared where it is wanted.
        let named = client.prepare("SELECT current_setting('port') FROM t WHERE id = $1").await.unwrap();
        for _ in 0..3 {
            assert_eq!(client.query_one(&named, &[&1]).await.unwrap().get::<_, String>(0), standby);
        }
        // Settings follow there, too.
        client.batch_execute("SET work_mem = '7MB'; SET search_path = public").await.unwrap();
        assert_eq!(one(&client, "SELECT current_setting('work_mem') || current_setting('port')").await, format!("7MB{standby}"));
        // What a view hides the standby refuses; the client hears nothing of that, and it is done once.
        let before = one(&client, "SELECT n::text FROM t WHERE id = 1").await.parse::<i32>().unwrap();
        for done in 1..4 {
            let row = client.query_one("SELECT n, port FROM sly WHERE n > 0", &[]).await.unwrap();
            assert_eq!((row.get::<_, i32>(0), row.get::<_, String>(1)), (before + done, primary.clone()));
        }
        assert_eq!(one(&client, "SELECT n::text FROM t WHERE id = 1").await, (before + 3).to_string());
        // An error that is none of the standby's is the client's.
        assert_eq!(told(&client.simple_query("SELECT 1/0").await.unwrap_err()).0, "22012");
        // A function that a user made after the proxy asked is not known, and one that is stable is when it asks again.
        assert_eq!(one(&client, "SELECT where_it_is()").await, primary);
        assert_eq!(one(&scene.splitter().await, "SELECT where_it_is()").await, primary);
        // Whoever does not want it writes and reads in one place; as do those whose texts cannot be told apart.
        assert_eq!(one(&connect(&scene.sharing("alice", "")).await.unwrap(), PORT).await, primary);
        client.batch_execute("SET standard_conforming_strings = off").await.unwrap();
        assert_eq!(one(&client, PORT).await, primary);
    }
}

story! {
    async fn a_read_whose_standby_dies_is_asked_elsewhere(scene) {
        scene.proxy.replace(patient());
        let mut standbys = scene.with_standbys(2);
        let client = scene.splitter().await;
        let long = "SELECT count(*)::text || ' ' || current_setting('port') FROM generate_series(1, 20000000)";
        let asking = tokio::spawn(async move { (one(&client, long).await, client) });
        let running = "SELECT coalesce(max(pid), 0)::text FROM pg_stat_activity \
                       WHERE query LIKE '%20000000)' AND state = 'active' AND pid <> pg_backend_pid()";
        let admins = [admin_of(&standbys[0]).await, admin_of(&standbys[1]).await];
        let mut at = (0, String::new());
        until("it is read somewhere", async || {
            for (number, admin) in admins.iter().enumerate() {
                at = (number, one(admin, running).await);
                if at.1 != "0" {
                    return true;
                }
            }
            false
        })
        .await;
        let (at, backend) = at;
        let first = standbys[at].port.to_string();
        assert!(Command::new("kill").args(["-9", &standbys[at].postmaster(), &backend]).status().unwrap().success());
        let other = standbys[1 - at].port.to_string();
        let (answer, client) = asking.await.unwrap();
        let elsewhere = [&other, &scene.server.port.to_string()].map(|port| format!("20000000 {port}"));
        assert!(elsewhere.contains(&answer), "{answer}");
        drop(standbys.remove(at));
        // Nobody has told the proxy yet that it is gone.
        let read_from = one(&client, PORT).await;
        assert_ne!(read_from, first);
    }
}

story! {
    async fn a_standby_that_was_killed_is_not_taken_for_what_it_was(scene) {
        let mut settings = settings();
        settings.reads.wait = Duration::from_millis(200);
        scene.proxy.replace(settings);
        let mut standbys = scene.with_standbys(1);
        let (client, standby) = (scene.splitter().await, standbys[0].port.to_string());
        client.batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await.unwrap();
        let read = "SELECT n || ' ' || current_setting('port') FROM t";
        until("it has replayed that", async || one(&client, read).await == format!("1 {standby}")).await;
        // Its replay begins at its last restartpoint, lets readers in early, and comes no further for an hour.
        tokio::task::block_in_place(|| standbys[0].kill_and_start("recovery_min_apply_delay = '1h'\n"));
        let admin = admin_of(&standbys[0]).await;
        assert_eq!(one(&admin, "SELECT count(*)::text FROM pg_class WHERE relname = 't'").await, "0");
        // A connection that is opened now sees none of it, though the position that was known of this standby has it.
        assert_eq!(one(&client, read).await, format!("1 {}", scene.server.port));
        assert_eq!(one(&client, "SELECT 1 || current_setting('port')").await, format!("1{}", scene.server.port));
    }
}

story! {
    async fn whoever_reads_needs_no_primary(scene) {
        scene.proxy.replace(patient());
        let standbys = scene.with_standbys(1);
        let writer = connect(&scene.sharing("alice", "")).await.unwrap();
        writer.batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (7); GRANT SELECT ON t TO dave").await.unwrap();
        let admin = admin_of(&standbys[0]).await;
        let replayed = "SELECT count(*)::text FROM pg_class WHERE relname = 't' AND relacl IS NOT NULL";
        until("it is replayed", async || one(&admin, replayed).await == "1").await;
        // Whoever wrote himself might wait for a position that nobody can tell any more.
        let reader = connect(&scene.reading().replace("dbname=shop", "dbname=mall").replace("user=alice", "user=dave")).await.unwrap();
        let read = "SELECT n || ' ' || current_setting('port') FROM t";
        let expected = format!("7 {}", standbys[0].port);
        assert_eq!(one(&reader, read).await, expected);
        // An election, and then a term in which nobody leads yet.
        for term in [1, 2] {
            let mut table = scene.table(term, None);
            table.standbys = scene.standbys(&standbys);
            assert!(scene.proxy.learn(table));
            for _ in 0..5 {
                assert_eq!(one(&reader, read).await, expected);
            }
        }
    }
}

story! {
    async fn whoever_reads_by_the_other_port_sees_what_he_wrote_by_the_first(scene) {
        scene.proxy.replace(patient());
        let standbys = scene.with_standbys(1);
        let standby = standbys[0].port.to_string();
        let writer = connect(&scene.sharing("alice", "")).await.unwrap();
        let reader = connect(&scene.reading().replace("dbname=shop", "dbname=mall")).await.unwrap();
        writer.batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (0)").await.unwrap();
        let admin = admin_of(&standbys[0]).await;
        for round in 1..50 {
            writer.batch_execute(&format!("UPDATE t SET n = {round}")).await.unwrap();
            let read = one(&reader, "SELECT n || ' ' || current_setting('port') FROM t").await;
            assert_eq!(read, format!("{round} {standby}"));
        }
        // A replay that stands still shows nothing new: the primary does, when the standby has had its time.
        let mut hasty = settings();
        hasty.reads.wait = Duration::from_millis(20);
        scene.proxy.replace(hasty);
        admin.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
        until("it stands still", async || one(&admin, "SELECT pg_get_wal_replay_pause_state()").await == "paused").await;
        writer.batch_execute("UPDATE t SET n = 50").await.unwrap();
        assert_eq!(one(&reader, "SELECT n || ' ' || current_setting('port') FROM t").await, format!("50 {}", scene.server.port));
        // Who has written nothing reads there all the same.
        let port = scene.proxy.addresses()[1].port();
        let other = format!("host=127.0.0.1 port={port} user=carol dbname=mall password='{PASSWORD}'");
        assert_eq!(one(&connect(&other).await.unwrap(), PORT).await, standby);
        admin.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
        // By name, on whatever port.
        let named = connect(&scene.sharing("alice", "options='-c pgherd.target_session_attrs=standby'")).await.unwrap();
        until("it reads there again", async || one(&named, PORT).await == standby).await;
        let wrong = connect(&scene.sharing("alice", "options='-c pgherd.target_session_attrs=best'")).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&wrong), ("22023".to_owned(), "invalid value for parameter \"pgherd.target_session_attrs\": \"best\"".to_owned()));
    }
}

/// What came of a load that reads what it wrote.
#[derive(Debug, Default)]
struct Tally {
    by_standbys: AtomicU64,
    by_the_primary: AtomicU64,
    stale: AtomicU64,
}

const CLIENTS: i32 = 50;
const READS_PER_WRITE: usize = 4;
/// Least share of the reads that standbys are to serve.
const BY_STANDBYS: f64 = 0.6;

/// Writes and reads while the replay of the standbys stands still, now of one, now of both.
async fn write_and_read(scene: &Scene, standbys: &[Server], lasting: Duration) -> Tally {
    let tally = Arc::new(Tally::default());
    let primary = scene.server.port.to_string();
    let admin = admin_of(&scene.server).await;
    admin
        .batch_execute(
            "DROP TABLE IF EXISTS counts; CREATE TABLE counts (client int PRIMARY KEY, n int); \
             ALTER TABLE counts OWNER TO alice",
        )
        .await
        .unwrap();
    let until = Moment::now() + lasting;
    let mut clients = Vec::new();
    for id in 0..CLIENTS {
        let (client, tally, primary) = (scene.splitter().await, Arc::clone(&tally), primary.clone());
        clients.push(tokio::spawn(async move {
            let write =
                "INSERT INTO counts VALUES ($1, $2) ON CONFLICT (client) DO UPDATE SET n = excluded.n";
            let write = client.prepare(write).await.unwrap();
            let read = client
                .prepare("SELECT n, current_setting('port') FROM counts WHERE client = $1")
                .await
                .unwrap();
            let mut count = 0;
            while Moment::now() < until {
                count += 1;
                client.execute(&write, &[&id, &count]).await.unwrap();
                for _ in 0..READS_PER_WRITE {
                    let row = client.query_opt(&read, &[&id]).await.unwrap();
                    let (found, port) = row.map_or((0, String::new()), |row| (row.get(0), row.get(1)));
                    let served = if port == primary { &tally.by_the_primary } else { &tally.by_standbys };
                    served.fetch_add(1, Ordering::Relaxed);
                    tally.stale.fetch_add(u64::from(found != count), Ordering::Relaxed);
                }
            }
        }));
    }
    let mut admins = Vec::new();
    for standby in standbys {
        admins.push(admin_of(standby).await);
    }
    let bursts = AtomicU32::new(0);
    while Moment::now() < until {
        let number = bursts.fetch_add(1, Ordering::Relaxed) as usize;
        let paused = match number % 4 {
            3 => &admins[..],
            at => &admins[at % admins.len()..][..1],
        };
        for admin in paused {
            admin.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
        }
        // sleep: a burst of standing still.
        tokio::time::sleep(Duration::from_millis(150)).await;
        for admin in paused {
            admin.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
        }
        // sleep: between two of them.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    for client in clients {
        client.await.unwrap();
    }
    Arc::into_inner(tally).expect("all clients have ended")
}

story! {
    async fn fifty_clients_read_what_they_wrote_from_standbys_whose_replay_stands_still_in_bursts(scene) {
        let mut settings = settings();
        settings.limits.size = 20;
        scene.proxy.replace(settings.clone());
        let standbys = scene.with_standbys(2);
        let tally = write_and_read(scene, &standbys, Duration::from_secs(4)).await;
        let [by_standbys, by_the_primary, stale] =
            [&tally.by_standbys, &tally.by_the_primary, &tally.stale].map(|count| count.load(Ordering::Relaxed));
        let share = by_standbys as f64 / (by_standbys + by_the_primary) as f64;
        println!("{:.1} % of {} reads by standbys, {stale} stale", share * 100.0, by_standbys + by_the_primary);
        assert_eq!(stale, 0, "{tally:?}");
        assert!(share >= BY_STANDBYS, "{tally:?}");

        // Without the check the same load finds stale reads: it can.
        settings.reads.your_writes = false;
        scene.proxy.replace(settings);
        let unchecked = write_and_read(scene, &standbys, Duration::from_secs(2)).await;
        println!("without the check: {unchecked:?}");
        assert!(unchecked.stale.load(Ordering::Relaxed) > 0, "{unchecked:?}");
    }
}

/// Lets clients in or, as an agent does before it promotes, nobody but pgherd; whoever is in is ended.
async fn set_gate(server: &Server, is_open: bool) {
    let clients = if is_open { "host all all 127.0.0.1/32 scram-sha-256\n" } else { "" };
    server.admit(&format!("host all,replication postgres,pgherd_proxy 127.0.0.1/32 trust\n{clients}"));
    let admin = admin_of(server).await;
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let directly = format!("host=127.0.0.1 port={} user=bob dbname=mall password=else", server.port);
    until("its gate is set", async || connect(&directly).await.is_ok() == is_open).await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'alice'";
    admin.batch_execute(end).await.unwrap();
    let left = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'alice'";
    until("nobody is in", async || is_open || one(&admin, left).await == "0").await;
}

story! {
    async fn a_gate_that_was_closed_before_the_proxy_has_heard_of_it_is_told_nobody(scene) {
        let mut changed = patient();
        changed.limits.retry = Duration::from_millis(100);
        scene.proxy.replace(changed.clone());
        let [standby] = &scene.with_standbys(1)[..] else { panic!("one was asked for") };
        let [primary, other] = [&scene.server, standby].map(|server| server.port.to_string());
        let reading = scene.reading().replace("dbname=shop", "dbname=mall");
        let reader = connect(&reading).await.unwrap();
        assert_eq!(one(&reader, PORT).await, other);
        // The standby is about to be promoted.
        set_gate(standby, false).await;
        assert_eq!(one(&reader, PORT).await, primary);
        assert_eq!(one(&connect(&reading).await.unwrap(), PORT).await, primary);

        // And now the primary lets nobody in any more; of that the proxy hears a moment later.
        changed.limits.retry = Duration::from_secs(2);
        scene.proxy.replace(changed);
        let writer = connect(&scene.sharing("alice", "")).await.unwrap();
        set_gate(&scene.server, false).await;
        let writes = tokio::spawn(async move { (writer.batch_execute("CREATE TABLE t ()").await, writer) });
        // sleep: it asks, and is shut out.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!writes.is_finished());
        assert!(scene.proxy.learn(Table { gate_open: false, ..scene.table(1, Some("a")) }));
        set_gate(&scene.server, true).await;
        assert!(!writes.is_finished());
        assert!(scene.proxy.learn(scene.table(1, Some("a"))));
        let (written, writer) = writes.await.unwrap();
        written.unwrap();

        // Whoever is shut out for good hears it.
        set_gate(&scene.server, false).await;
        let refused = writer.batch_execute("CREATE TABLE u ()").await.unwrap_err();
        assert_eq!(told(&refused).0, "28000");
    }
}
