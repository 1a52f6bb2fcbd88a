//! The console, as people and drivers speak to it, and what its commands do to clients.

use std::time::Duration;

use pgherd_proxy::Settings;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::harness::{
    PASSWORD, SOON, Scene, connect, connect_and_watch, last_word, one, settings, story, told, until,
};
use crate::programs::{psql, with_tls};

/// Alice may do everything, bob may look.
fn with_console(mut settings: Settings) -> Settings {
    settings.console.admins.insert("alice".to_owned());
    settings.console.readers.insert("bob".to_owned());
    settings
}

/// The first value of a column by its name.
fn cells(messages: &[SimpleQueryMessage], column: &str) -> Vec<String> {
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(column).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    rows.collect()
}

impl Scene {
    fn console_conninfo(&self, more: &str) -> String {
        self.conninfo("alice", more).replace("dbname=shop", "dbname=pgbouncer")
    }

    async fn console(&self) -> Client {
        self.proxy.replace(with_console(settings()));
        connect(&self.console_conninfo("")).await.unwrap()
    }

    async fn mall(&self) -> Client {
        connect(&self.conninfo("alice", "").replace("dbname=shop", "dbname=mall")).await.unwrap()
    }
}

async fn say(console: &Client, text: &str) -> Vec<SimpleQueryMessage> {
    tokio::time::timeout(SOON, console.simple_query(text)).await.expect("in time").unwrap()
}

async fn column(console: &Client, text: &str, name: &str) -> Vec<String> {
    cells(&say(console, text).await, name)
}

/// SQLSTATE of what is refused.
async fn refused(console: &Client, text: &str) -> String {
    told(&console.simple_query(text).await.unwrap_err()).0
}

story! {
    async fn it_lets_in_whom_the_herd_file_names(scene) {
        let error = connect(&scene.console_conninfo("")).await.map(|_| ()).unwrap_err();
        let told_of = error.as_db_error().unwrap();
        assert_eq!(told_of.code().code(), "28000");
        assert!(told_of.hint().unwrap().contains("console_admins = [\"alice\"]"), "{told_of:?}");
        scene.proxy.replace(with_console(settings()));
        for name in ["pgbouncer", "pgherd"] {
            let conninfo = scene.conninfo("alice", "").replace("dbname=shop", &format!("dbname={name}"));
            assert_eq!(column(&connect(&conninfo).await.unwrap(), "SHOW STATE", "value").await[0], "yes");
        }
        // A password is needed as everywhere.
        let wrong = scene.console_conninfo("").replace(PASSWORD, "wrong");
        assert_eq!(told(&connect(&wrong).await.map(|_| ()).unwrap_err()).0, "28P01");
        // Whoever may look changes nothing.
        let bob = scene.console_conninfo("").replace("user=alice", "user=bob").replace(PASSWORD, "else");
        let bob = connect(&bob).await.unwrap();
        assert_eq!(refused(&bob, "PAUSE").await, "42501");
        assert_eq!(column(&bob, "SHOW STATE", "value").await[1], "no");
        // Whoever is taken off the list is off at once.
        let console = connect(&scene.console_conninfo("")).await.unwrap();
        scene.proxy.replace(settings());
        assert_eq!(refused(&console, "PAUSE").await, "42501");
        assert_eq!(refused(&console, "SHOW STATE").await, "42501");
        let refusals = column(&bob_again(scene).await, "SHOW EVENTS", "count").await;
        assert!(refusals.iter().any(|count| count != "0"), "{refusals:?}");
    }
}

async fn bob_again(scene: &Scene) -> Client {
    scene.proxy.replace(with_console(settings()));
    let bob = scene.console_conninfo("").replace("user=alice", "user=bob").replace(PASSWORD, "else");
    connect(&bob).await.unwrap()
}

story! {
    async fn psql_and_drivers_speak_to_it_with_tls_and_without(scene) {
        let console = scene.console().await;
        // The extended protocol, with binary values.
        let client = scene.alice().await;
        one(&client, "SELECT 1").await;
        let rows = console.query("SHOW POOLS", &[]).await.unwrap();
        let (database, user, active): (&str, &str, i32) = (rows[0].get(0), rows[0].get(1), rows[0].get("cl_active"));
        assert_eq!((database, user, active), ("shop", "alice", 1));
        let clients = console.query("SHOW CLIENTS", &[]).await.unwrap();
        assert_eq!(clients.len(), 1, "the console is none of them");
        assert_eq!((clients[0].get::<_, &str>("state"), clients[0].get::<_, &str>("addr")), ("active", "127.0.0.1"));
        let port: i32 = clients[0].get("local_port");
        assert_eq!(port, i32::from(scene.proxy.addresses()[0].port()));
        let statement = console.prepare("SHOW SERVERS").await.unwrap();
        for _ in 0..2 {
            let servers = console.query(&statement, &[]).await.unwrap();
            assert_eq!(servers[0].get::<_, &str>("state"), "active");
            assert_eq!(servers[0].get::<_, &str>("link"), clients[0].get::<_, &str>("ptr"));
            let pid: i32 = servers[0].get("remote_pid");
            assert_eq!(pid.to_string(), one(&client, "SELECT pg_backend_pid()::text").await);
        }
        assert_eq!(console.execute("RELOAD", &[]).await.unwrap(), 0);
        tokio::time::timeout(SOON, scene.proxy.reload_wanted()).await.expect("somebody hears of it");
        let error = console.query("SHOW NOTHING", &[]).await.unwrap_err();
        assert_eq!(told(&error).0, "42601");
        assert_eq!(console.query("SHOW STATE", &[]).await.unwrap().len(), 3, "and goes on");

        let version = psql(&scene.console_conninfo(""), "SHOW VERSION").await.unwrap();
        assert!(version.starts_with("PgBouncer 1.25.0 as spoken by pgherd"), "{version}");
        let unknown = psql(&scene.console_conninfo(""), "\\d").await.unwrap_err();
        assert!(unknown.contains("invalid command") && unknown.contains("HINT:  SHOW HELP|"), "{unknown}");
        let dir = tempfile::tempdir().unwrap();
        with_tls(scene, dir.path(), true);
        let encrypted = format!("sslmode=verify-full sslrootcert={}", dir.path().join("ca.pem").display());
        assert!(psql(&scene.console_conninfo(&encrypted), "SHOW STATE").await.unwrap_err().contains("may not use"));
    }
}

story! {
    async fn it_counts_what_is_prepared_at_clients_and_at_servers(scene) {
        let console = scene.console().await;
        // A server comes back a moment after its client has heard the answer: the next one must not get another.
        let mut changed = with_console(settings());
        changed.limits.size = 1;
        scene.proxy.replace(changed);
        let counted = async |of: &str| column(&console, &format!("SHOW {of}"), "prepared_statements").await;
        // Until the drivers' own messages, which they send by themselves, have come.
        let shows = async |of: &str, wanted: &[&str]| {
            until("it is counted", async || {
                let mut counted = counted(of).await;
                counted.sort();
                counted == wanted
            })
            .await;
        };
        let (one_client, other) = (scene.mall().await, scene.mall().await);
        shows("CLIENTS", &["0", "0"]).await;
        shows("SERVERS", &["0"]).await;
        let same = "SELECT 1 + 1";
        let prepared = one_client.prepare(same).await.unwrap();
        let further = one_client.prepare("SELECT 1 + 2").await.unwrap();
        let shared = other.prepare(same).await.unwrap();
        // In a transaction, too, which has its server still.
        one_client.batch_execute("BEGIN").await.unwrap();
        one_client.query(&prepared, &[]).await.unwrap();
        shows("CLIENTS", &["1", "2"]).await;
        shows("SERVERS", &["2"]).await;
        let third = one_client.prepare("SELECT 1 + 3").await.unwrap();
        shows("CLIENTS", &["1", "3"]).await;
        shows("SERVERS", &["3"]).await;
        one_client.batch_execute("COMMIT").await.unwrap();
        // A client gives its names back; servers keep what they have.
        drop((prepared, further, third));
        one(&one_client, "SELECT 1").await;
        shows("CLIENTS", &["0", "1"]).await;
        shows("SERVERS", &["3"]).await;
        drop(shared);
        // What a session with a server of its own says nobody reads.
        let own = scene.alice().await;
        drop((one_client, other));
        own.query(same, &[]).await.unwrap();
        shows("CLIENTS", &["NULL"]).await;
        shows("SERVERS", &["3", "NULL"]).await;
        drop(own);
        shows("SERVERS", &["0", "3"]).await;
    }
}

story! {
    async fn a_pause_lets_what_is_under_way_end_and_holds_what_is_new(scene) {
        let console = scene.console().await;
        let (busy, idle) = (scene.mall().await, scene.mall().await);
        busy.batch_execute("BEGIN; CREATE TABLE t (id int)").await.unwrap();
        one(&idle, "SELECT 1").await;
        let pausing = tokio::spawn(async move { (console.simple_query("PAUSE mall").await.map(|_| ()), console) });
        let watch = connect(&scene.console_conninfo("")).await.unwrap();
        until("it is paused", async || column(&watch, "SHOW DATABASES", "paused").await.contains(&"1".to_owned())).await;
        let waiting = tokio::spawn(async move { one(&idle, "SELECT count(*)::text FROM t").await });
        until("the other one waits", async || {
            column(&watch, "SHOW CLIENTS", "state").await.contains(&"waiting".to_owned())
        })
        .await;
        // A transaction is not interrupted, and another database is not held.
        assert!(!pausing.is_finished(), "a transaction is open");
        assert_eq!(one(&scene.alice().await, "SELECT 'open'").await, "open");
        busy.batch_execute("INSERT INTO t VALUES (1); COMMIT").await.unwrap();
        let (paused, console) = tokio::time::timeout(SOON, pausing).await.unwrap().unwrap();
        paused.unwrap();
        let left = column(&console, "SHOW SERVERS", "database").await;
        assert!(!left.contains(&"mall".to_owned()), "{left:?}");
        assert!(!waiting.is_finished());
        assert_eq!(refused(&console, "PAUSE mall").await, "55000");
        // New clients wait as well, and a drain is not held up.
        let newcomer = {
            let conninfo = scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall");
            tokio::spawn(async move { connect(&conninfo).await.map(|_| ()) })
        };
        until("both wait", async || {
            column(&watch, "SHOW POOLS", "cl_waiting").await.contains(&"2".to_owned())
        })
        .await;
        tokio::time::timeout(SOON, scene.proxy.drained()).await.expect("what is paused has nothing under way");
        scene.route(2, "b");
        say(&console, "RESUME mall").await;
        assert_eq!(waiting.await.unwrap(), "1");
        newcomer.await.unwrap().unwrap();
        assert_eq!(refused(&console, "RESUME mall").await, "55000");
        one(&busy, "SELECT 1").await;
    }
}

story! {
    async fn a_command_that_waits_can_be_canceled_and_a_pause_is_taken_back(scene) {
        let console = scene.console().await;
        let (busy, idle) = (scene.mall().await, scene.mall().await);
        let cancel = console.cancel_token();
        // Until it is over, since a cancel may come before the command waits.
        let canceled = async |text: &str| {
            let is_over = std::cell::Cell::new(false);
            let waiting = async {
                let outcome = tokio::time::timeout(SOON, console.simple_query(text)).await.expect("in time");
                is_over.set(true);
                outcome.unwrap_err()
            };
            let canceling = async {
                while !is_over.get() {
                    cancel.cancel_query(NoTls).await.unwrap();
                }
            };
            let (error, ()) = tokio::join!(waiting, canceling);
            assert_eq!(told(&error), ("57014".to_owned(), "canceling statement due to user request".to_owned()));
            error.as_db_error().unwrap().hint().unwrap().to_owned()
        };
        let paused = async || column(&console, "SHOW DATABASES", "paused").await.contains(&"1".to_owned());
        busy.batch_execute("BEGIN; SELECT 1").await.unwrap();
        for text in ["PAUSE mall", "PAUSE"] {
            assert_eq!(canceled(text).await, "What it has paused goes on.");
            assert!(!paused().await, "{text}");
            assert_eq!(one(&idle, "SELECT 'open'").await, "open");
        }
        say(&console, "RECONNECT mall").await;
        assert!(canceled("WAIT_CLOSE mall").await.contains("when it is given back"));
        // Where nothing waits nothing is canceled, now or later.
        busy.batch_execute("COMMIT").await.unwrap();
        cancel.cancel_query(NoTls).await.unwrap();
        say(&console, "WAIT_CLOSE mall").await;
        say(&console, "PAUSE mall").await;
        // It is over, and so it holds.
        cancel.cancel_query(NoTls).await.unwrap();
        assert!(paused().await);
        say(&console, "RESUME mall").await;
    }
}

story! {
    async fn who_waits_for_a_paused_database_is_told_so_in_time(scene) {
        let console = scene.console().await;
        let mut impatient = with_console(settings());
        impatient.limits.query_wait = Duration::from_millis(200);
        scene.proxy.replace(impatient);
        let client = scene.mall().await;
        say(&console, "PAUSE").await;
        let (code, message) = told(&client.simple_query("SELECT 1").await.unwrap_err());
        assert_eq!((code.as_str(), message.as_str()), ("57P03", "the database is paused"));
        say(&console, "RESUME").await;
        assert_eq!(one(&scene.mall().await, "SELECT 1::text").await, "1");
    }
}

story! {
    async fn kill_ends_clients_at_once_and_holds_their_database(scene) {
        let console = scene.console().await;
        let (idle, idle_end) = connect_and_watch(&scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall")).await.unwrap();
        let (busy, busy_end) = connect_and_watch(&scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall")).await.unwrap();
        let (other, other_end) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        one(&idle, "SELECT 1").await;
        let slow = tokio::spawn(async move { told(&busy.simple_query("SELECT pg_sleep(60)").await.unwrap_err()) });
        until("it is busy", async || scene.proxy.pools().iter().map(|(_, is)| is.lent).sum::<u32>() == 2).await;
        say(&console, "KILL mall").await;
        let forced = ("57P01".to_owned(), "admin forced disconnect".to_owned());
        assert_eq!(tokio::time::timeout(SOON, slow).await.unwrap().unwrap(), forced);
        drop(busy_end);
        assert_eq!(last_word(idle_end).await, forced);
        assert_eq!(one(&other, "SELECT 'here'").await, "here");
        let conninfo = scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall");
        let newcomer = tokio::spawn(async move { connect(&conninfo).await.map(|_| ()) });
        until("it waits", async || column(&console, "SHOW POOLS", "cl_waiting").await.contains(&"1".to_owned())).await;
        say(&console, "RESUME mall").await;
        newcomer.await.unwrap().unwrap();

        // One client, by its id; also one that waits.
        let id = column(&console, "SHOW CLIENTS", "id").await;
        let of = column(&console, "SHOW CLIENTS", "database").await;
        let at = of.iter().position(|database| database == "shop").unwrap();
        say(&console, &format!("KILL_CLIENT {}", id[at])).await;
        assert_eq!(last_word(other_end).await, forced);
        assert_eq!(refused(&console, &format!("KILL_CLIENT {}", id[at])).await, "42704");
        say(&console, "PAUSE mall").await;
        let (_, waiting_end) = {
            let conninfo = scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall");
            let connecting = tokio::spawn(async move { connect_and_watch(&conninfo).await.map(|_| ()) });
            until("it waits", async || {
                column(&console, "SHOW CLIENTS", "state").await.contains(&"waiting".to_owned())
            })
            .await;
            let states = column(&console, "SHOW CLIENTS", "state").await;
            let id = column(&console, "SHOW CLIENTS", "id").await;
            let at = states.iter().position(|state| state == "waiting").unwrap();
            say(&console, &format!("KILL_CLIENT {}", id[at])).await;
            ((), tokio::time::timeout(SOON, connecting).await.unwrap().unwrap().unwrap_err())
        };
        assert_eq!(told(&waiting_end), forced);
        say(&console, "RESUME").await;
    }
}

story! {
    async fn fresh_servers_are_made_and_waited_for(scene) {
        let console = scene.console().await;
        let client = scene.mall().await;
        let pid = async || one(&client, "SELECT pg_backend_pid()::text").await;
        let first = pid().await;
        assert_eq!(pid().await, first);
        say(&console, "RECONNECT mall; WAIT_CLOSE mall").await;
        assert_ne!(pid().await, first);
        // One that is in use is closed when it is given back, and until then it is shown.
        client.batch_execute("BEGIN; SELECT 1").await.unwrap();
        say(&console, "RECONNECT").await;
        let close_needed = column(&console, "SHOW SERVERS", "close_needed").await;
        assert_eq!(close_needed, ["1"]);
        let waiting = tokio::spawn(async move { say(&console, "WAIT_CLOSE").await.len() });
        let second = pid().await;
        assert!(!waiting.is_finished());
        client.batch_execute("COMMIT").await.unwrap();
        tokio::time::timeout(SOON, waiting).await.unwrap().unwrap();
        assert_ne!(pid().await, second);
    }
}

story! {
    async fn a_database_can_be_closed_to_those_who_come(scene) {
        let console = scene.console().await;
        let client = scene.alice().await;
        say(&console, "DISABLE shop").await;
        let error = connect(&scene.conninfo("alice", "")).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&error), ("57P03".to_owned(), "database \"shop\" is disabled".to_owned()));
        assert_eq!(one(&client, "SELECT 'in'").await, "in", "whoever is in stays in");
        say(&console, "ENABLE shop").await;
        scene.alice().await;
    }
}

story! {
    async fn what_is_counted_is_what_was_done(scene) {
        let console = scene.console().await;
        let client = scene.mall().await;
        let total = async |what: &str| -> u64 {
            let rows = say(&console, "SHOW STATS").await;
            let at = cells(&rows, "database").iter().position(|database| database == "mall").unwrap();
            cells(&rows, what)[at].parse().unwrap()
        };
        let before = (total("total_xact_count").await, total("total_query_count").await);
        for _ in 0..5 {
            one(&client, "SELECT 1").await;
        }
        client.batch_execute("BEGIN").await.unwrap();
        client.batch_execute("SELECT pg_sleep(0.05)").await.unwrap();
        client.batch_execute("COMMIT").await.unwrap();
        // Prepared and executed, each up to a Sync; it is closed when it is dropped.
        let statement = client.prepare("SELECT $1::int4").await.unwrap();
        client.query(&statement, &[&7_i32]).await.unwrap();
        // An answer is counted when it was passed on.
        until("all of it is counted", async || total("total_xact_count").await - before.0 == 5 + 1 + 2).await;
        assert_eq!(total("total_query_count").await - before.1, 5 + 3 + 2);
        assert!(total("total_xact_time").await >= 50_000 && total("total_query_time").await >= 50_000);
        assert!(total("total_query_time").await <= total("total_xact_time").await);
        assert_eq!(total("total_server_assignment_count").await, 1 + 5 + 1 + 2, "one more to come in with");
        assert_eq!((total("total_client_parse_count").await, total("total_bind_count").await), (1, 1));
        // Bytes.
        let (received, sent) = (total("total_received").await, total("total_sent").await);
        one(&client, "SELECT repeat('x', 100000)").await;
        until("its bytes are counted", async || total("total_sent").await - sent >= 100_000).await;
        assert!(total("total_sent").await - sent < 101_000);
        assert!(total("total_received").await - received < 500);
        // A session of its own is counted while it lasts.
        let own = scene.alice().await;
        one(&own, "SELECT 1").await;
        until("it is counted", async || {
            let rows = say(&console, "SHOW STATS_TOTALS").await;
            let at = cells(&rows, "database").iter().position(|database| database == "shop").unwrap();
            cells(&rows, "xact_count")[at] == "1"
        })
        .await;
        let totals = say(&console, "SHOW TOTALS").await;
        let at = cells(&totals, "name").iter().position(|name| name == "total_xact_count").unwrap();
        let all: u64 = cells(&totals, "value")[at].parse().unwrap();
        assert_eq!(all, total("total_xact_count").await + 1);
        // Averages are of the time since the proxy was started, as long as there was no whole period.
        let rows = say(&console, "SHOW STATS_AVERAGES").await;
        let at = cells(&rows, "database").iter().position(|database| database == "mall").unwrap();
        let time: u64 = cells(&rows, "xact_time")[at].parse().unwrap();
        assert!(time > 0 && time <= total("total_xact_time").await, "{time}");
    }
}

story! {
    async fn whoever_keeps_a_server_is_shown_with_the_reason(scene) {
        let console = scene.console().await;
        let client = scene.mall().await;
        assert_eq!(column(&console, "SHOW PINS", "reason").await, Vec::<String>::new());
        client.batch_execute("SELECT pg_advisory_lock(7)").await.unwrap();
        client.batch_execute("CREATE TEMP TABLE mine (id int)").await.unwrap();
        until("it is shown", async || column(&console, "SHOW PINS", "reason").await.len() == 2).await;
        let rows = say(&console, "SHOW PINS").await;
        assert_eq!(cells(&rows, "reason"), ["an advisory lock", "a temporary table"]);
        assert_eq!(cells(&rows, "database"), ["mall", "mall"]);
        assert_eq!(cells(&rows, "server_pid")[0], one(&client, "SELECT pg_backend_pid()::text").await);
        assert_eq!(column(&console, "SHOW PGHERD", "pins").await.concat(), "10");
        client.batch_execute("DROP TABLE mine; SELECT pg_advisory_unlock(7)").await.unwrap();
        until("it is gone", async || column(&console, "SHOW PINS", "reason").await.is_empty()).await;
        let rows = say(&console, "SHOW EVENTS").await;
        let count = |kind: &str| {
            let at = cells(&rows, "kind").iter().position(|known| known == kind).unwrap();
            cells(&rows, "count")[at].clone()
        };
        assert_eq!((count("temporary_table").as_str(), count("listen").as_str()), ("1", "0"));
    }
}

story! {
    async fn users_of_pgpool_see_the_nodes_in_any_session(scene) {
        let port = scene.server.port.to_string();
        for client in [scene.alice().await, scene.mall().await] {
            let rows = client.simple_query("show pool_nodes").await.unwrap();
            assert_eq!(cells(&rows, "role"), ["primary", "standby"]);
            assert_eq!(cells(&rows, "port"), [port.clone(), port.clone()]);
            assert_eq!(cells(&rows, "lb_weight"), ["0.000000", "1.000000"]);
            let rows = client.query("SHOW pool_version", &[]).await.unwrap();
            assert!(rows[0].get::<_, &str>(0).starts_with("4.7 (pgherd"));
            let statement = client.prepare("show pool_nodes").await.unwrap();
            for _ in 0..2 {
                assert_eq!(client.query(&statement, &[]).await.unwrap().len(), 2);
                assert_eq!(one(&client, "SELECT 'between'").await, "between");
            }
            // Also inside of a transaction, which goes on.
            client.batch_execute("BEGIN").await.unwrap();
            assert_eq!(cells(&client.simple_query("SHOW POOL_NODES;").await.unwrap(), "role").len(), 2);
            client.batch_execute("CREATE TEMP TABLE gone (id int)").await.unwrap();
            assert_eq!(client.query(&statement, &[]).await.unwrap().len(), 2);
            client.batch_execute("ROLLBACK").await.unwrap();
            assert_eq!(told(&client.simple_query("show pool_pools").await.unwrap_err()).0, "42501");
            // What only looks like it is PostgreSQL's.
            assert_eq!(told(&client.simple_query("SHOW pool").await.unwrap_err()).0, "42704");
        }
        let shown = psql(&scene.conninfo("alice", ""), "show pool_nodes").await.unwrap();
        assert!(shown.lines().next().unwrap().starts_with("0|127.0.0.1|"), "{shown}");
    }
}

story! {
    async fn a_node_that_is_detached_is_sent_no_reads(scene) {
        let console = scene.console().await;
        // It is one server in both roles here, and replays nothing.
        let mut careless = with_console(settings());
        careless.reads.your_writes = false;
        scene.proxy.replace(careless);
        let node = async |of: &str| {
            let rows = say(&console, "SHOW POOL_NODES").await;
            cells(&rows, of).pop().unwrap()
        };
        let read = async || {
            let reader = connect(&scene.reading()).await.unwrap();
            one(&reader, "SELECT 1").await;
            column(&console, "SHOW PGHERD", "sv_active").await
        };
        assert_eq!(read().await, ["0", "1"], "at the standby");
        assert_eq!((node("status").await.as_str(), node("load_balance_node").await.as_str()), ("up", "true"));
        let notice = say(&console, "DETACH s").await;
        assert!(notice.len() == 1);
        assert_eq!((node("status").await.as_str(), node("lb_weight").await.as_str()), ("down", "0.000000"));
        until("its servers are closed", async || node("status").await == "down" && scene.proxy.pools().iter().all(|(name, is)| {
            name.role == pgherd_proxy::routes::Role::Primary || is.lent + is.idle + is.closing == 0
        }))
        .await;
        assert_eq!(read().await, ["1", "0"], "at the primary");
        assert_eq!(refused(&console, "DETACH 0").await, "0A000", "the primary");
        assert_eq!(refused(&console, "DETACH nobody").await, "42704");
        say(&console, "pcp_attach_node 1").await;
        assert_eq!(node("lb_weight").await, "1.000000");
    }
}

story! {
    async fn columns_are_pgbouncers(scene) {
        let program = std::path::Path::new("/usr/sbin/pgbouncer");
        assert!(program.exists(), "Debian's package pgbouncer is not installed");
        let dir = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let file = dir.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\nshop = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             auth_type = any\nadmin_users = alice\nunix_socket_dir =\n",
            scene.server.port
        );
        std::fs::write(&file, text).unwrap();
        let mut running = tokio::process::Command::new(program)
            .arg("-q")
            .arg(&file)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let conninfo = format!("host=127.0.0.1 port={port} user=alice dbname=pgbouncer");
        until("it listens", async || connect(&conninfo).await.is_ok()).await;
        let peer = connect(&conninfo).await.unwrap();
        let console = scene.console().await;
        let columns = async |console: &Client, table: &str| -> Vec<String> {
            let rows = say(console, &format!("SHOW {table}")).await;
            rows.iter()
                .find_map(|message| match message {
                    SimpleQueryMessage::RowDescription(columns) => {
                        Some(columns.iter().map(|column| column.name().to_owned()).collect())
                    }
                    _ => None,
                })
                .unwrap()
        };
        for table in [
            "DATABASES", "POOLS", "CLIENTS", "SERVERS", "STATS", "STATS_TOTALS", "STATS_AVERAGES", "TOTALS", "LISTS",
            "USERS", "CONFIG", "VERSION",
        ] {
            let (theirs, mine) = (columns(&peer, table).await, columns(&console, table).await);
            // Later versions have more, and what this one has in its order; one was renamed in 1.24.
            let theirs: Vec<&str> = theirs
                .iter()
                .map(|name| if name == "reserve_pool" { "reserve_pool_size" } else { name.as_str() })
                .collect();
            let mut left = mine.iter();
            let missing: Vec<&&str> = theirs.iter().filter(|name| !left.any(|known| known == *name)).collect();
            assert!(missing.is_empty(), "SHOW {table}: {missing:?} of {theirs:?} in {mine:?}");
        }
        running.kill().await.unwrap();
    }
}

story! {
    async fn shutdown_waits_for_those_whom_it_names_and_lets_nobody_in_meanwhile(scene) {
        let console = scene.console().await;
        let (patient, ending) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        let mall = scene.mall().await;
        say(&console, "SHUTDOWN WAIT_FOR_CLIENTS").await;
        let how = tokio::time::timeout(SOON, scene.proxy.asked_to_end()).await.unwrap();
        assert_eq!(how, pgherd_proxy::Ending::AfterClients);
        let left = async {
            until("nobody is let in", async || {
                tokio_postgres::connect(&scene.conninfo("alice", ""), NoTls).await.is_err()
            })
            .await;
            assert_eq!(one(&patient, "SELECT 1").await, "1", "it stays as long as it likes");
            assert_eq!(one(&mall, "SELECT 2").await, "2");
            until("servers that nobody has are closed", async || {
                column(&console, "SHOW POOLS", "sv_idle").await.iter().all(|idle| idle == "0")
            })
            .await;
            // With less patience: only who has a server has time, and this one has it for its session.
            say(&console, "SHUTDOWN WAIT_FOR_SERVERS").await;
        };
        tokio::select! {
            () = scene.proxy.finish(how) => panic!("two clients and a console are there"),
            () = left => {}
        }
        let how = scene.proxy.asked_to_end().await;
        assert_eq!(how, pgherd_proxy::Ending::AfterServers { within: None });
        let left = async {
            assert_eq!(one(&patient, "SELECT 1").await, "1");
            say(&console, "SHUTDOWN").await;
            scene.proxy.asked_to_end().await
        };
        let how = tokio::select! {
            () = scene.proxy.finish(how) => panic!("a session has its server"),
            how = left => how,
        };
        assert_eq!(how, pgherd_proxy::Ending::Now);
        tokio::time::timeout(SOON, scene.proxy.finish(how)).await.unwrap();
        assert_eq!(last_word(ending).await.0, "57P01");
        assert_eq!(scene.proxy.clients(), 0);
    }
}
