//! Clients that have a server for a transaction only.

use std::sync::Arc;
use std::time::Duration;

use pgherd_proxy::Settings;
use rustix::process::{Pid, Signal};
use tokio_postgres::Client;

use crate::harness::{SOON, Scene, connect, connect_and_watch, last_word, one, settings, story, told, until};
use crate::server::Server;

/// Longer than a story.
const LASTING: Duration = Duration::from_secs(600);

/// One server for all of them, so that each finds what the last one left.
fn one_server() -> Settings {
    let mut settings = settings();
    settings.limits.size = 1;
    settings
}

impl Scene {
    pub(crate) fn sharing(&self, user: &str, more: &str) -> String {
        self.conninfo(user, more).replace("dbname=shop", "dbname=mall")
    }

    pub(crate) async fn sharer(&self) -> Client {
        connect(&self.sharing("alice", "")).await.unwrap()
    }

    /// Servers that are lent, in all pools.
    pub(crate) fn lent(&self) -> u32 {
        self.proxy.pools().iter().map(|(_, counts)| counts.lent).sum()
    }
}

async fn pid(client: &Client) -> String {
    one(client, "SELECT pg_backend_pid()::text").await
}

/// Its SQLSTATE.
async fn refused(client: &Client, statement: &str) -> String {
    told(&client.simple_query(statement).await.unwrap_err()).0
}

story! {
    async fn clients_take_turns_by_transaction(scene) {
        scene.proxy.replace(one_server());
        let (first, second) = (scene.sharer().await, scene.sharer().await);
        assert_eq!(pid(&first).await, pid(&second).await);
        until("it is given back", async || scene.lent() == 0).await;
        // Who has only begun has no server yet.
        first.batch_execute("BEGIN").await.unwrap();
        assert_eq!(scene.lent(), 0);
        first.batch_execute("CREATE TABLE t (id int)").await.unwrap();
        let waits = tokio::spawn(async move { (one(&second, "SELECT count(*)::text FROM t").await, second) });
        until("the other one waits", async || scene.proxy.pools().iter().any(|(_, is)| is.waiting == 1)).await;
        first.batch_execute("INSERT INTO t VALUES (1); COMMIT").await.unwrap();
        let (count, second) = waits.await.unwrap();
        assert_eq!(count, "1");
        // Whoever leaves in the middle of a transaction leaves nothing of it.
        first.batch_execute("BEGIN; INSERT INTO t VALUES (2)").await.unwrap();
        drop(first);
        assert_eq!(one(&second, "SELECT count(*)::text FROM t").await, "1");
        // An error inside of a transaction is its client's until that has heard of it.
        second.batch_execute("BEGIN").await.unwrap();
        assert_eq!(refused(&second, "SELECT no").await, "42703");
        assert_eq!((refused(&second, "SELECT 1").await, scene.lent()), ("25P02".to_owned(), 1));
        second.batch_execute("ROLLBACK").await.unwrap();
        until("it is given back", async || scene.lent() == 0).await;
    }
}

story! {
    async fn settings_follow_their_client(scene) {
        scene.proxy.replace(one_server());
        let first = connect(&scene.sharing("alice", "application_name=till options='-c work_mem=7MB'")).await.unwrap();
        let second = scene.sharer().await;
        let show = "SELECT concat_ws(' ', current_setting('application_name'), current_setting('work_mem'), \
            current_setting('search_path'), current_setting('app.tenant', true), current_user)";
        let plain = " 4MB \"$user\", public alice";
        assert_eq!(one(&first, show).await, "till 7MB \"$user\", public alice");
        assert_eq!(one(&second, show).await, plain);
        first.batch_execute("SET search_path = a, b; SET app.tenant = '7; DROP'").await.unwrap();
        first.batch_execute("SELECT set_config('work_mem', '9MB', false)").await.unwrap();
        assert_eq!(one(&second, show).await, " 4MB \"$user\", public  alice", "an empty one is what PostgreSQL leaves");
        assert_eq!(one(&first, show).await, "till 9MB a, b 7; DROP alice");
        // Rolled back, or for a transaction only.
        first.batch_execute("BEGIN; SET work_mem = '1GB'; SET LOCAL search_path = c; ROLLBACK").await.unwrap();
        first.batch_execute("BEGIN; SET LOCAL work_mem = '1GB'; COMMIT").await.unwrap();
        pid(&second).await;
        assert_eq!(one(&first, show).await, "till 9MB a, b 7; DROP alice");
        // As somebody else, in whose name nothing else is done.
        first.batch_execute("SET ROLE carol").await.unwrap();
        assert_eq!(one(&second, "SELECT current_user::text").await, "alice");
        assert_eq!(one(&first, show).await, "till 9MB a, b 7; DROP carol");
        first.batch_execute("SET work_mem TO DEFAULT").await.unwrap();
        pid(&second).await;
        assert_eq!(one(&first, show).await, "till 7MB a, b 7; DROP carol", "as it came in");
        first.batch_execute("RESET ALL; RESET ROLE").await.unwrap();
        pid(&second).await;
        assert_eq!(one(&first, show).await, "till 7MB \"$user\", public  alice");
        first.batch_execute("DO $$ BEGIN SET work_mem = '2MB'; END $$").await.unwrap();
        pid(&second).await;
        assert_eq!(one(&first, "SHOW work_mem").await, "2MB");
        first.batch_execute("DISCARD ALL").await.unwrap();
        pid(&second).await;
        assert_eq!(one(&first, "SHOW work_mem").await, "7MB");
        // What it asks for is judged when it comes in.
        let error = connect(&scene.sharing("alice", "options='-c work_mem=much'")).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&error).0, "22023");
        assert_eq!(one(&second, "SHOW work_mem").await, "4MB");
    }
}

story! {
    async fn a_setting_is_what_it_would_be_on_a_server_of_ones_own_wherever_its_client_goes(scene) {
        let client = scene.sharer().await;
        let here = pid(&client).await;
        client.batch_execute("DO 'BEGIN END'").await.unwrap();
        for forbidden in ["SET log_statement = 'all'", "SET plpgsql.variable_conflict = 'use_column'"] {
            assert_eq!(refused(&client, forbidden).await, "42501");
        }
        client.batch_execute("SET app.tenant = '7'").await.unwrap();
        client.batch_execute("RESET app.tenant").await.unwrap();
        scene.route(2, "b");
        assert_ne!(pid(&client).await, here, "what it may not set nobody sets for it");
        assert_eq!(one(&client, "SELECT current_setting('app.tenant') || '.'").await, ".", "empty, and not unknown");
    }
}

story! {
    async fn a_commit_that_no_standby_has_is_an_error_also_for_those_who_want_no_warnings(scene) {
        let admin = scene.admin().await;
        admin.batch_execute("ALTER ROLE alice SET client_min_messages = error").await.unwrap();
        let by_role = scene.sharer().await;
        for forgets in ["", "RESET ALL", "DISCARD ALL"] {
            by_role.batch_execute(forgets).await.unwrap();
            assert_eq!(one(&by_role, "SHOW client_min_messages").await, "warning", "after {forgets:?}");
        }
        let quiet = connect(&scene.sharing("alice", "options='-c client_min_messages=error'")).await.unwrap();
        let kept = connect(&scene.conninfo("alice", "options='-c client_min_messages=fatal'")).await.unwrap();
        let later = scene.sharer().await;
        for client in [&quiet, &kept] {
            client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
        }
        later.batch_execute("SET client_min_messages = error; SELECT pg_advisory_lock(1)").await.unwrap();
        admin.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        until("it is so", async || one(&later, "SHOW synchronous_standby_names").await == "nobody").await;
        // Commits wait only when the checkpointer has heard of it, too.
        let waiting = "SELECT coalesce(max(pid), 0)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        let first = scene.admin().await;
        let waits = tokio::spawn(async move { while first.batch_execute("SELECT pg_current_xact_id()").await.is_ok() {} });
        until("a commit waits", async || one(&admin, waiting).await != "0").await;
        admin.batch_execute(&format!("SELECT pg_terminate_backend(({waiting})::int)")).await.unwrap();
        waits.await.unwrap();
        for client in [quiet, kept, later, by_role] {
            let writes = tokio::spawn(async move { (refused(&client, "INSERT INTO t VALUES (1)").await, client) });
            until("it waits", async || one(&admin, waiting).await != "0").await;
            admin.batch_execute(&format!("SELECT pg_cancel_backend(({waiting})::int)")).await.unwrap();
            let (code, client) = writes.await.unwrap();
            assert_eq!(code, "08007");
            // It asked for silence, and has it.
            let messages = client.simple_query("DO $$ BEGIN RAISE WARNING 'unheard'; END $$; SELECT 1").await;
            assert!(messages.is_ok());
        }
    }
}

story! {
    async fn nobody_deceives_the_proxy_about_what_is_set(scene) {
        scene.proxy.replace(one_server());
        let (first, second) = (scene.sharer().await, scene.sharer().await);
        // Operators that find and say something else, where the client's search_path finds them first.
        first
            .batch_execute(
                "CREATE SCHEMA trap; \
                 CREATE FUNCTION trap.never(text, text) RETURNS bool LANGUAGE sql AS 'SELECT false'; \
                 CREATE OPERATOR trap.= (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.never); \
                 CREATE FUNCTION trap.less(text, text) RETURNS text LANGUAGE sql AS 'SELECT $1'; \
                 CREATE OPERATOR trap.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.less); \
                 SET search_path = trap, pg_catalog; SET work_mem = '9MB'",
            )
            .await
            .unwrap();
        first.batch_execute("RESET timezone; SELECT pg_advisory_lock(7)").await.unwrap();
        assert_eq!(scene.lent(), 1, "it is known that it holds a lock");
        first.batch_execute("SELECT pg_advisory_unlock(7)").await.unwrap();
        until("it is given back", async || scene.lent() == 0).await;
        assert_eq!(one(&second, "SHOW search_path").await, "\"$user\", public");
        assert_eq!(one(&first, "SHOW work_mem").await, "9MB");
    }
}

story! {
    async fn what_cannot_move_keeps_its_server_until_it_is_gone(scene) {
        let client = scene.sharer().await;
        for (tie, untie) in [
            ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_unlock(7)"),
            ("CREATE TEMP TABLE mine (id int)", "DROP TABLE mine"),
            ("DECLARE mine CURSOR WITH HOLD FOR SELECT 1", "CLOSE mine"),
            ("LISTEN news", "UNLISTEN news"),
            ("PREPARE mine AS SELECT 1", "DEALLOCATE mine"),
            ("CREATE TEMP TABLE mine (id int)", "DISCARD ALL"),
        ] {
            client.batch_execute(tie).await.unwrap();
            let kept = pid(&client).await;
            assert_eq!((pid(&client).await, scene.lent()), (kept, 1), "{tie}");
            client.batch_execute(untie).await.unwrap();
            until(untie, async || scene.lent() == 0).await;
        }
        for nothing in [
            "BEGIN; CREATE TEMP TABLE mine (id int) ON COMMIT DROP; COMMIT",
            "BEGIN; CREATE TEMP TABLE mine (id int); ROLLBACK",
            "BEGIN; SELECT pg_advisory_xact_lock(7); COMMIT",
            "SELECT pg_advisory_lock(7), pg_advisory_unlock(7)",
        ] {
            client.batch_execute(nothing).await.unwrap();
            until(nothing, async || scene.lent() == 0).await;
        }
        // What it is lent with is gone when it leaves.
        scene.proxy.replace(one_server());
        client.batch_execute("SELECT pg_advisory_lock(7); CREATE TEMP TABLE mine (id int)").await.unwrap();
        let kept = pid(&client).await;
        drop(client);
        let other = scene.sharer().await;
        assert_eq!(one(&other, "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory'").await, "0");
        assert_eq!(one(&other, "SELECT coalesce(to_regclass('mine')::text, 'none')").await, "none");
        assert_eq!(pid(&other).await, kept, "cleaned");
        other.batch_execute("SELECT setseed(0.5)").await.unwrap();
        assert_eq!(scene.lent(), 1);
        drop(other);
        assert_ne!(pid(&scene.sharer().await).await, kept, "nobody can know what was in it");
    }
}

story! {
    async fn who_keeps_a_server_hears_of_its_end(scene) {
        let admin = scene.admin().await;
        let ties = ["LISTEN news", "CREATE TEMP TABLE mine (id int)", "SELECT pg_advisory_lock(7)", "PREPARE mine AS SELECT 1"];
        for (term, tie) in (2..).zip(ties) {
            let keeps = async || {
                let (client, ending) = connect_and_watch(&scene.sharing("alice", "")).await.unwrap();
                client.batch_execute(tie).await.unwrap();
                (pid(&client).await, client, ending)
            };
            let (kept, _client, ending) = keeps().await;
            admin.batch_execute(&format!("SELECT pg_terminate_backend({kept})")).await.unwrap();
            assert_eq!(last_word(ending).await.0, "57P01", "{tie}");
            let (_, _client, ending) = keeps().await;
            scene.route(term, "b");
            assert_eq!(last_word(ending).await.0, "57P01", "{tie}");
        }
    }
}

story! {
    async fn nobody_is_told_what_a_sequence_gave_to_somebody_else(scene) {
        scene.proxy.replace(one_server());
        let (first, second) = (scene.sharer().await, scene.sharer().await);
        first.batch_execute("CREATE SEQUENCE s").await.unwrap();
        one(&first, "SELECT nextval('s')::text").await;
        for question in ["SELECT lastval()", "SELECT currval('s')"] {
            assert_eq!(refused(&second, question).await, "55000");
        }
        assert_eq!(one(&first, "BEGIN; SELECT 'n' || nextval('s'); SELECT lastval()").await, "n2");
        assert_eq!(one(&first, "SELECT lastval()::text").await, "2");
        first.batch_execute("COMMIT").await.unwrap();
        let statement = second.prepare("SELECT lastval()").await.unwrap();
        one(&first, "SELECT nextval('s')::text").await;
        for _ in 0..2 {
            let error = second.query(&statement, &[]).await.unwrap_err();
            assert_eq!(told(&error).0, "55000");
        }
    }
}

story! {
    async fn statements_follow_their_client(scene) {
        scene.proxy.replace(one_server());
        let (first, second) = (scene.sharer().await, scene.sharer().await);
        first.batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (7)").await.unwrap();
        // tokio-postgres calls its statements by the same names in every session: s0, s1, …
        let double = first.prepare("SELECT $1::int * 2").await.unwrap();
        let triple = second.prepare("SELECT $1::int * 3").await.unwrap();
        let same = second.prepare("SELECT $1::int * 2").await.unwrap();
        for factor in 0_i32..3 {
            let of = async |client: &Client, statement| -> i32 {
                client.query_one(statement, &[&factor]).await.unwrap().get(0)
            };
            assert_eq!(of(&first, &double).await, 2 * factor);
            assert_eq!(of(&second, &triple).await, 3 * factor);
            assert_eq!(of(&second, &same).await, 2 * factor);
        }
        let there = "SELECT count(*)::text FROM pg_prepared_statements WHERE statement LIKE '%* 2'";
        assert_eq!(one(&first, there).await, "1", "both mean the same");

        // The same text means another thing elsewhere.
        first.batch_execute("CREATE SCHEMA x; CREATE TABLE x.t (id text); INSERT INTO x.t VALUES ('x')").await.unwrap();
        second.batch_execute("SET search_path = x").await.unwrap();
        let (here, there) = (first.prepare("SELECT id FROM t").await.unwrap(), second.prepare("SELECT id FROM t").await.unwrap());
        for _ in 0..2 {
            assert_eq!(first.query_one(&here, &[]).await.unwrap().get::<_, i32>(0), 7);
            assert_eq!(second.query_one(&there, &[]).await.unwrap().get::<_, String>(0), "x");
        }

        // A fresh server has none of them.
        let server = pid(&first).await;
        let admin = scene.admin().await;
        admin.batch_execute(&format!("SELECT pg_terminate_backend({server})")).await.unwrap();
        let there = format!("SELECT count(*)::text FROM pg_stat_activity WHERE pid = {server}");
        until("it is gone", async || one(&admin, &there).await == "0").await;
        assert_ne!(pid(&first).await, server);
        assert_eq!(first.query_one(&double, &[&4_i32]).await.unwrap().get::<_, i32>(0), 8);

        // Gone at its client's wish, and nobody else's.
        second.batch_execute("DISCARD ALL").await.unwrap();
        let error = second.query(&same, &[&1_i32]).await.unwrap_err();
        let (sqlstate, message) = told(&error);
        assert!(sqlstate == "26000" && !message.contains("pgherd"), "{sqlstate} {message}");
        assert_eq!(first.query_one(&double, &[&5_i32]).await.unwrap().get::<_, i32>(0), 10);
        first.batch_execute("DEALLOCATE s0").await.unwrap();
        let error = first.query(&double, &[&1_i32]).await.unwrap_err();
        assert_eq!(told(&error).0, "26000");

        // One that fails is not there, and the name is free again.
        let error = first.prepare("SELECT no FROM t").await.unwrap_err();
        assert_eq!(told(&error).0, "42703");
        assert_eq!(first.query_one("SELECT $1::int + 1", &[&1_i32]).await.unwrap().get::<_, i32>(0), 2);
    }
}

story! {
    async fn a_table_that_changed_is_told_until_its_statement_is_prepared_anew(scene) {
        scene.proxy.replace(one_server());
        let (first, second) = (scene.sharer().await, scene.sharer().await);
        first.batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (7)").await.unwrap();
        let statement = first.prepare("SELECT * FROM t").await.unwrap();
        first.query(&statement, &[]).await.unwrap();
        second.batch_execute("ALTER TABLE t ADD COLUMN more text").await.unwrap();
        for _ in 0..2 {
            let error = first.query(&statement, &[]).await.unwrap_err();
            assert_eq!(told(&error), ("0A000".to_owned(), "cached plan must not change result type".to_owned()));
        }
        let again = first.prepare("SELECT * FROM t").await.unwrap();
        assert_eq!((again.columns().len(), first.query(&again, &[]).await.unwrap().len()), (2, 1));
        // Who prepares it only after the change is none of those whom it concerns, though others' statements are there still.
        second.prepare("SELECT * FROM t").await.unwrap();
        second.batch_execute("ALTER TABLE t ADD COLUMN still text").await.unwrap();
        let third = scene.sharer().await;
        let anew = third.prepare("SELECT * FROM t").await.unwrap();
        assert_eq!((anew.columns().len(), third.query(&anew, &[]).await.unwrap().len()), (3, 1));
        assert_eq!(told(&first.query(&again, &[]).await.unwrap_err()).0, "0A000");
        let again = first.prepare("SELECT * FROM t").await.unwrap();
        assert_eq!(first.query(&again, &[]).await.unwrap().len(), 1);
        // Nor does another server give rows that the client would take for the old ones.
        let server = pid(&first).await;
        let admin = scene.admin().await;
        admin.batch_execute(&format!("SELECT pg_terminate_backend({server})")).await.unwrap();
        let there = format!("SELECT count(*)::text FROM pg_stat_activity WHERE pid = {server}");
        until("it is gone", async || one(&admin, &there).await == "0").await;
        assert_eq!(told(&first.query(&statement, &[]).await.unwrap_err()).0, "26000");
        assert_eq!(first.query(&again, &[]).await.unwrap().len(), 1);
    }
}

story! {
    async fn more_statements_than_a_server_keeps_can_be_used(scene) {
        scene.proxy.replace(one_server());
        let client = scene.sharer().await;
        let mut statements = Vec::new();
        for number in 0..250_i32 {
            statements.push((number, client.prepare(&format!("SELECT {number}")).await.unwrap()));
        }
        for (number, statement) in statements.iter().chain(&statements) {
            assert_eq!(client.query_one(statement, &[]).await.unwrap().get::<_, i32>(0), *number);
        }
        assert_eq!(one(&client, "SELECT count(*)::text FROM pg_prepared_statements").await, "200");
    }
}

story! {
    async fn a_client_between_transactions_never_notices_another_primary(scene) {
        let (idle, busy) = (scene.sharer().await, scene.sharer().await);
        let (open, open_ends) = connect_and_watch(&scene.sharing("alice", "")).await.unwrap();
        let statement = idle.prepare("SELECT 'still'").await.unwrap();
        idle.batch_execute("SET work_mem = '9MB'").await.unwrap();
        open.batch_execute("BEGIN; CREATE TABLE undone (id int)").await.unwrap();
        let sleeping = tokio::spawn(async move { busy.simple_query("SELECT pg_sleep(600)").await.map(|_| ()) });
        let admin = scene.admin().await;
        let sleeps = "SELECT count(*)::text FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'";
        until("it sleeps", async || one(&admin, sleeps).await == "1").await;
        assert!(scene.proxy.learn(scene.table(2, None)));
        let asked = tokio::spawn(async move { (idle.query(&statement, &[]).await, idle) });
        // sleep: what must not happen has time to happen.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!asked.is_finished());
        scene.route(2, "b");
        let (rows, idle) = tokio::time::timeout(SOON, asked).await.expect("in time").unwrap();
        assert_eq!(rows.unwrap()[0].get::<_, String>(0), "still");
        assert_eq!(one(&idle, "SHOW work_mem").await, "9MB");
        assert_eq!(told(&sleeping.await.unwrap().unwrap_err()).0, "08007");
        assert_eq!(last_word(open_ends).await.0, "40001");
    }
}

/// Kills the server of whoever runs this, as no administrator would: nothing is said to its client.
async fn kill_whoever_runs(scene: &Scene, text: &str) {
    // It lets nobody in while it recovers from the last one, and ends whoever came in just before.
    let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=shop", scene.server.port);
    let query =
        format!("SELECT max(pid) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '{text}%'");
    let mut pid = None;
    until("it runs", async || {
        let Ok(admin) = connect(&conninfo).await else { return false };
        let row = admin.query_one(&query, &[]).await;
        pid = row.ok().and_then(|row| row.get::<_, Option<i32>>(0));
        pid.is_some()
    })
    .await;
    let pid = pid.expect("it runs");
    let process = std::path::PathBuf::from(format!("/proc/{pid}"));
    let pid = Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    // All others are ended for it: what is asked next is not for one of those.
    until("the postmaster has seen it", async || !process.exists()).await;
    until("it lets somebody in again", async || connect(&conninfo).await.is_ok()).await;
}

/// A server that stands still, and is no more when the story ends.
struct Stopped {
    pid: Pid,
    /// The proxy's end of its connection.
    port: u16,
}

impl Stopped {
    /// Of this client, in a transaction.
    async fn of(client: &Client) -> Stopped {
        let found = one(client, "SELECT pg_backend_pid() || ' ' || inet_client_port()").await;
        let (pid, port) = found.split_once(' ').unwrap();
        Stopped { pid: Pid::from_raw(pid.parse().unwrap()).unwrap(), port: port.parse().unwrap() }
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid, signal).unwrap();
    }

    /// It was sent something that it has not read.
    fn was_asked(&self) -> bool {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let from = format!("0100007F:{:04X}", self.port);
        table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|columns| {
            columns[2] == from && columns[4].split_once(':').is_some_and(|(_, unread)| unread != "00000000")
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        rustix::process::kill_process(self.pid, Signal::KILL).ok();
    }
}

const LONG: &str = "(SELECT count(*) FROM generate_series(1, 3000000) a, generate_series(1, 2) b)";

story! {
    async fn a_read_whose_server_is_lost_is_asked_once_more(scene) {
        let admin = connect(&scene.conninfo("postgres", "")
            .replace(&format!("port={}", scene.proxy.addresses()[0].port()), &format!("port={}", scene.server.port))
            .replace("dbname=shop", "dbname=mall")).await.unwrap();
        admin.batch_execute(
            "CREATE TABLE noted (at timestamptz); GRANT ALL ON noted TO alice;\
             CREATE FUNCTION note() RETURNS bigint LANGUAGE sql VOLATILE AS \
             'INSERT INTO public.noted VALUES (now()); SELECT count(*) FROM generate_series(1, 3000000) a, generate_series(1, 2) b';\
             CREATE VIEW notes AS SELECT note() AS count; GRANT SELECT ON notes TO alice"
        ).await.unwrap();
        drop(admin);
        // By both protocols, and what the client has set goes along.
        let client = scene.sharer().await;
        client.batch_execute("SET application_name = 'kept'").await.unwrap();
        let simple = format!("SELECT {LONG} || current_setting('application_name') AS answer");
        let (answer, ()) = tokio::join!(one(&client, &simple), kill_whoever_runs(scene, "SELECT (SELECT count"));
        assert_eq!(answer, "6000000kept");
        let extended = format!("SELECT {LONG} AS prepared");
        let statement = client.prepare(&extended).await.unwrap();
        let (row, ()) = tokio::join!(client.query_one(&statement, &[]), kill_whoever_runs(scene, "SELECT (SELECT count"));
        assert_eq!(row.unwrap().get::<_, i64>(0), 6_000_000);
        // The client may write as before, and was not told otherwise.
        client.batch_execute("INSERT INTO noted VALUES (now())").await.unwrap();
        assert_eq!(one(&client, "SHOW default_transaction_read_only").await, "off");

        // What may have been committed is not done twice: told by its words, by its functions, and last by the server.
        for (text, head) in [
            (format!("INSERT INTO noted SELECT now() WHERE {LONG} > 0"), "INSERT INTO noted"),
            ("SELECT note()".to_owned(), "SELECT note"),
            ("SELECT count FROM notes".to_owned(), "SELECT count FROM notes"),
        ] {
            let client = scene.sharer().await;
            let (answered, ()) = tokio::join!(client.simple_query(&text), kill_whoever_runs(scene, head));
            assert_eq!(told(&answered.unwrap_err()).0, "08007", "{text}");
        }
        let client = scene.sharer().await;
        assert_eq!(one(&client, "SELECT count(*)::text FROM noted").await, "1");
        // Nor is anything of a transaction.
        client.batch_execute("BEGIN").await.unwrap();
        let (answered, ()) =
            tokio::join!(client.simple_query(&simple), kill_whoever_runs(scene, "SELECT (SELECT count"));
        assert_eq!(told(&answered.unwrap_err()).0, "40001");
    }
}

story! {
    async fn what_the_servers_of_a_killed_postmaster_never_read_is_done_by_the_next_primary(scene) {
        let standby = Server::standby_of(&scene.server);
        let mut changed = settings();
        changed.limits.hold = SOON;
        scene.proxy.replace(changed);
        assert!(scene.proxy.learn(scene.says(1, &scene.server, &[], LASTING)));
        let clients = [scene.sharer().await, scene.sharer().await, scene.sharer().await];
        clients[0].batch_execute("CREATE TABLE done (what text)").await.unwrap();
        let prepared = clients[1].prepare("INSERT INTO done VALUES ('prepared')").await.unwrap();
        let next = connect(&format!("host=127.0.0.1 port={} user=postgres dbname=mall", standby.port)).await.unwrap();
        let there = "SELECT count(*)::text FROM pg_tables WHERE tablename = 'done'";
        until("the standby has it", async || one(&next, there).await == "1").await;
        // Each has a server, and gives it back.
        let mut servers = Vec::new();
        for client in &clients {
            client.batch_execute("BEGIN").await.unwrap();
            servers.push(Stopped::of(client).await);
        }
        for client in &clients {
            client.batch_execute("COMMIT").await.unwrap();
        }
        // Not before they wait: who has yet to wait reads first what is there, and only then sees that the postmaster is gone.
        let direct = connect(&format!("host=127.0.0.1 port={} user=postgres dbname=mall", scene.server.port)).await.unwrap();
        let pids: Vec<_> = servers.iter().map(|server| server.pid.as_raw_nonzero().to_string()).collect();
        let wait = format!(
            "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'ClientRead' AND state = 'idle' AND pid IN ({})",
            pids.join(", ")
        );
        until("all of them wait", async || one(&direct, &wait).await == "3").await;
        servers.iter().for_each(|server| server.signal(Signal::STOP));
        let postmaster = scene.server.postmaster();
        let status = format!("/proc/{postmaster}/stat");
        let postmaster = Pid::from_raw(postmaster.parse().unwrap()).unwrap();
        rustix::process::kill_process(postmaster, Signal::KILL).unwrap();
        until("it is gone", async || std::fs::read_to_string(&status).map_or(true, |line| line.contains(") Z "))).await;

        let [simple, extended, reader] = clients;
        let asked = [
            tokio::spawn(async move { simple.batch_execute("INSERT INTO done VALUES ('simple')").await }),
            tokio::spawn(async move { extended.execute(&prepared, &[]).await.map(drop) }),
        ];
        let were_asked = || servers.iter().filter(|server| server.was_asked());
        until("both are sent", async || were_asked().count() == 2).await;
        // The third server stays as it is: it says nothing, and could not be told from one that can be used.
        were_asked().for_each(|server| server.signal(Signal::CONT));
        until("both wait for the next primary", async || scene.waiting() == 2).await;
        let read = tokio::spawn(async move { one(&reader, "SELECT count(*)::text FROM pg_tables WHERE tablename = 'done'").await });
        until("so does whoever comes now", async || scene.waiting() == 3).await;
        one(&next, "SELECT pg_promote()").await;
        assert!(scene.proxy.learn(scene.says(2, &standby, &[], LASTING)));
        for done in asked {
            done.await.unwrap().unwrap();
        }
        assert_eq!(read.await.unwrap(), "1");
        assert_eq!(one(&next, "SELECT string_agg(what, ' ' ORDER BY what) FROM done").await, "prepared simple");
    }
}

story! {
    async fn a_read_that_a_shutdown_ends_is_done_by_the_next_primary_though_another_server_there_is_idle(scene) {
        let standby = Server::standby_of(&scene.server);
        let mut changed = settings();
        changed.limits.hold = SOON;
        scene.proxy.replace(changed);
        assert!(scene.proxy.learn(scene.says(1, &scene.server, &[], LASTING)));
        let [direct, next] = [scene.server.port, standby.port].map(|port| format!("host=127.0.0.1 port={port} user=postgres dbname=mall"));
        let (direct, next) = (connect(&direct).await.unwrap(), connect(&next).await.unwrap());
        let (reader, other) = (scene.sharer().await, scene.sharer().await);
        let query = format!("SELECT ({LONG} + {LONG} + {LONG})::text");
        let read = tokio::spawn(async move { one(&reader, &query).await });
        let running = "SELECT count(*)::text FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT ((SELECT%'";
        until("it is read", async || one(&direct, running).await == "1").await;
        other.batch_execute("BEGIN").await.unwrap();
        let idle = Stopped::of(&other).await;
        other.batch_execute("COMMIT").await.unwrap();
        until("the other server is given back", async || scene.lent() == 1).await;
        // It ends later than the one that reads, as any of them may.
        idle.signal(Signal::STOP);
        let postmaster = Pid::from_raw(scene.server.postmaster().parse().unwrap()).unwrap();
        rustix::process::kill_process(postmaster, Signal::INT).unwrap();
        until("the read waits for the next primary", async || scene.waiting() == 1).await;
        one(&next, "SELECT pg_promote()").await;
        assert!(scene.proxy.learn(scene.says(2, &standby, &[], LASTING)));
        assert_eq!(read.await.unwrap(), "18000000");
    }
}

story! {
    async fn with_statement_pooling_a_transaction_is_refused(scene) {
        let client = connect(&scene.sharing("carol", "")).await.unwrap();
        assert_eq!(one(&client, "SELECT 'by itself'").await, "by itself");
        until("it is given back", async || scene.lent() == 0).await;
        let (sqlstate, message) = told(&client.simple_query("BEGIN").await.unwrap_err());
        assert_eq!(sqlstate, "0A000");
        assert!(message.contains("statement pooling"), "{message}");
        until("nothing of it is left", async || scene.lent() == 0).await;
    }
}

story! {
    async fn a_notification_is_heard_whenever_it_comes(scene) {
        let (client, mut connection) =
            tokio_postgres::connect(&scene.sharing("alice", ""), tokio_postgres::NoTls).await.unwrap();
        let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(message) = futures_util::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if let Ok(tokio_postgres::AsyncMessage::Notification(notification)) = message {
                    heard.send(notification.payload().to_owned()).unwrap();
                }
            }
        });
        let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=mall", scene.server.port);
        let admin = connect(&conninfo).await.unwrap();
        // Each of them comes at about the time at which the proxy asks what the last statement has left behind.
        for number in 0..50 {
            let listen = format!("LISTEN news; {} more", if number % 2 == 0 { "LISTEN" } else { "UNLISTEN" });
            let notify = format!("NOTIFY news, '{number}'");
            let (listened, notified) = tokio::join!(client.batch_execute(&listen), admin.batch_execute(&notify));
            listened.unwrap();
            notified.unwrap();
            if number > 0 {
                let heard = tokio::time::timeout(SOON, hears.recv()).await.expect("in time").unwrap();
                // The first one may have come before anybody listened.
                let heard = if heard == "0" { hears.recv().await.unwrap() } else { heard };
                assert_eq!(heard, number.to_string());
            }
        }
    }
}

story! {
    async fn what_waits_for_a_server_can_be_canceled_and_goes_with_its_client(scene) {
        scene.proxy.replace(one_server());
        let waits = async || scene.proxy.pools().iter().any(|(_, is)| is.waiting == 1);
        let waits_no_more = async || scene.proxy.pools().iter().all(|(_, is)| is.waiting == 0);
        let (first, second, third) = (scene.sharer().await, scene.sharer().await, scene.sharer().await);
        let fourth = tokio_postgres::connect(&scene.sharing("alice", ""), tokio_postgres::NoTls).await.unwrap();
        first.batch_execute("CREATE TABLE written (by text)").await.unwrap();
        first.batch_execute("BEGIN; SELECT 1").await.unwrap();

        // With the simple protocol, and with the extended one.
        let second = Arc::new(second);
        let token = second.cancel_token();
        for extended in [false, true] {
            let asks = Arc::clone(&second);
            let asked = tokio::spawn(async move {
                let statement = "INSERT INTO written VALUES ('canceled')";
                match extended {
                    false => told(&asks.simple_query(statement).await.unwrap_err()),
                    true => told(&asks.query(statement, &[]).await.unwrap_err()),
                }
            });
            until("it waits", waits).await;
            token.cancel_query(tokio_postgres::NoTls).await.unwrap();
            let canceled = "canceling statement due to user request";
            assert_eq!(asked.await.unwrap(), ("57014".to_owned(), canceled.to_owned()));
        }

        // What it has begun it would have to be told has failed.
        third.batch_execute("BEGIN").await.unwrap();
        let token = third.cancel_token();
        let asked = tokio::spawn(async move {
            let code = refused(&third, "INSERT INTO written VALUES ('begun')").await;
            (code, third)
        });
        until("it waits", waits).await;
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
        let (code, third) = asked.await.unwrap();
        assert_eq!(code, "57014");
        until("it is closed", async || third.is_closed()).await;

        // Who goes has said something more before that, which nobody has read yet.
        let (fourth, connection) = fourth;
        let connection = tokio::spawn(connection);
        let says = async || {
            let asked = fourth.batch_execute("INSERT INTO written VALUES ('gone')");
            assert!(tokio::time::timeout(Duration::from_millis(50), asked).await.is_err(), "it waits");
        };
        says().await;
        until("it waits", waits).await;
        says().await;
        connection.abort();
        until("it has left the queue", waits_no_more).await;

        first.batch_execute("COMMIT").await.unwrap();
        second.batch_execute("INSERT INTO written VALUES ('second')").await.unwrap();
        assert_eq!(one(&second, "SELECT string_agg(by, ', ') FROM written").await, "second");
    }
}

story! {
    async fn a_cancel_hits_the_server_that_its_client_has_now(scene) {
        let (client, other) = (scene.sharer().await, scene.sharer().await);
        let token = client.cancel_token();
        let port = scene.server.port;
        let admin = connect(&format!("host=127.0.0.1 port={port} user=postgres dbname=mall")).await.unwrap();
        admin.batch_execute("SELECT pg_advisory_lock(7)").await.unwrap();
        let others = tokio::spawn(async move { other.simple_query("SELECT pg_advisory_xact_lock(7)").await.map(|_| ()) });
        until("the other one has a server", async || scene.lent() == 1).await;
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
        let client = Arc::new(client);
        let sleep = || {
            let client = Arc::clone(&client);
            tokio::spawn(async move { client.simple_query("SELECT pg_sleep(600)").await.map(|_| ()) })
        };
        let mut sleeping = sleep();
        until("both have one", async || {
            // The library does not wait until a cancel was heard: the first one may have come as late as this statement.
            if let Ok(ended) = tokio::time::timeout(Duration::from_millis(20), &mut sleeping).await {
                assert_eq!(told(&ended.unwrap().unwrap_err()).0, "57014");
                sleeping = sleep();
            }
            scene.lent() == 2
        })
        .await;
        // A cancel that comes before the statement is lost, here as anywhere.
        let error = loop {
            token.cancel_query(tokio_postgres::NoTls).await.unwrap();
            if let Ok(ended) = tokio::time::timeout(Duration::from_millis(100), &mut sleeping).await {
                break ended.unwrap().unwrap_err();
            }
        };
        assert_eq!(told(&error).0, "57014");
        admin.batch_execute("SELECT pg_advisory_unlock(7)").await.unwrap();
        others.await.unwrap().unwrap();
    }
}
