//! Sessions, from the first byte to the last, and what becomes of them when something changes.

use std::time::Duration;

use pgherd_proxy::hba::Hba;
use pgherd_proxy::routes::{Role, Table};
use tokio_postgres::SimpleQueryMessage;

use crate::harness::{
    PASSWORD, SOON, connect, connect_and_watch, last_word, one, settings, story, told, until,
};

story! {
    async fn whoever_knows_the_password_comes_in(scene) {
        let client = scene.alice().await;
        assert_eq!(one(&client, "SELECT current_user || '@' || current_database()").await, "alice@shop");
        let no = |user: &str| ("28P01".to_owned(), format!("password authentication failed for user \"{user}\""));
        for user in ["bob", "nobody", "late", "nologin"] {
            let error = connect(&scene.conninfo(user, "")).await.map(|_| ()).unwrap_err();
            assert_eq!(told(&error), no(user));
        }
        let conninfo = scene.conninfo("alice", "").replace("shop", "shed");
        let error = connect(&conninfo).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&error), ("3D000".to_owned(), "database \"shed\" does not exist".to_owned()));
        let error = connect(&scene.conninfo("pgherd_proxy", "")).await.map(|_| ()).unwrap_err();
        assert_eq!(
            told(&error),
            ("28000".to_owned(), "role \"pgherd_proxy\" does not come in through a proxy".to_owned())
        );

        // A new password is good at once for those who come, and the old one no more.
        scene.admin().await.batch_execute("ALTER ROLE alice PASSWORD 'new'").await.unwrap();
        until("the new password is known", async || {
            connect(&scene.conninfo("alice", "").replace(PASSWORD, "new")).await.is_ok()
        })
        .await;
        let error = connect(&scene.conninfo("alice", "")).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&error), no("alice"));
        assert_eq!(one(&client, "SELECT 'still'").await, "still");

        // Lines are replaced for those who come.
        let mut changed = settings();
        changed.hba = Hba::parse(["host shop bob all scram-sha-256"]).unwrap();
        scene.proxy.replace(changed);
        let error = connect(&scene.conninfo("alice", "")).await.map(|_| ()).unwrap_err();
        assert_eq!(
            told(&error),
            (
                "28000".to_owned(),
                "no pg_hba.conf entry for host \"127.0.0.1\", user \"alice\", database \"shop\", no encryption"
                    .to_owned()
            )
        );
    }
}

story! {
    /// CVE-2025-12819, CVE-2026-55769.
    async fn a_search_path_does_not_reach_the_question_for_a_password(scene) {
        // An equality that never holds, in front of PostgreSQL's, wherever somebody could put it.
        let port = scene.server.port;
        let admin = connect(&format!("host=127.0.0.1 port={port} user=postgres dbname=postgres")).await.unwrap();
        admin
            .batch_execute(
                "CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO PUBLIC;\
                 CREATE FUNCTION evil.never(name, name) RETURNS bool LANGUAGE sql AS 'SELECT false';\
                 CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, FUNCTION = evil.never);\
                 ALTER ROLE pgherd_proxy SET search_path = evil, pg_catalog;\
                 ALTER DATABASE postgres SET search_path = evil, pg_catalog",
            )
            .await
            .unwrap();
        let path = connect(&format!("host=127.0.0.1 port={port} user=pgherd_proxy dbname=postgres")).await.unwrap();
        assert_eq!(one(&path, "SELECT 'a'::name = 'a'::name").await, "f", "it is in the way");
        let client = connect(&scene.conninfo("alice", "options='-c search_path=evil,pg_catalog'")).await.unwrap();
        assert_eq!(one(&client, "SHOW search_path").await, "evil, pg_catalog".replace(", ", ","));
    }
}

story! {
    async fn nothing_of_a_session_is_left_for_the_next_one(scene) {
        let mut changed = settings();
        changed.limits.size = 1;
        scene.proxy.replace(changed);
        let options = "application_name=till options='-c search_path=x,public -c work_mem=7MB'";
        let first = connect(&scene.conninfo("alice", options)).await.unwrap();
        assert_eq!(one(&first, "SHOW search_path").await, "x,public");
        assert_eq!(one(&first, "SHOW work_mem").await, "7MB");
        assert_eq!(one(&first, "SHOW application_name").await, "till");
        let pid = one(&first, "SELECT pg_backend_pid()::text").await;
        first
            .batch_execute(
                "CREATE TEMP TABLE left_behind (id int); SET work_mem = '9MB'; LISTEN news;\
                 SELECT pg_advisory_lock(7); PREPARE it AS SELECT 1; DECLARE c CURSOR WITH HOLD FOR SELECT 1",
            )
            .await
            .unwrap();
        drop(first);
        let second = scene.alice().await;
        assert_eq!(one(&second, "SELECT pg_backend_pid()::text").await, pid, "the same server");
        let left = "SELECT concat(current_setting('search_path'), ' ', current_setting('work_mem'), ' ',\
            current_setting('application_name'), ' ', to_regclass('left_behind'), \
            (SELECT count(*) FROM pg_prepared_statements WHERE name = 'it'), \
            (SELECT count(*) FROM pg_cursors WHERE name = 'c'), \
            (SELECT count(*) FROM pg_listening_channels()), \
            (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'))";
        assert_eq!(one(&second, left).await, "\"$user\", public 4MB  0000");

        // One that is left in the middle of a transaction is nobody's any more.
        second.batch_execute("BEGIN; CREATE TABLE never (id int)").await.unwrap();
        drop(second);
        let third = scene.alice().await;
        assert_ne!(one(&third, "SELECT pg_backend_pid()::text").await, pid);
        assert_eq!(one(&third, "SELECT coalesce(to_regclass('never')::text, 'gone')").await, "gone");
        drop(third);

        let error = connect(&scene.conninfo("alice", "options='-c no.such=1 -c work_mem=much'")).await;
        let (sqlstate, message) = told(&error.map(|_| ()).unwrap_err());
        assert_eq!((sqlstate.as_str(), message.as_str()), ("22023", "invalid value for parameter \"work_mem\": \"much\""));
        let error = connect(&scene.conninfo("alice", "options='-B 100'")).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&error).0, "0A000");
        let such = "SELECT coalesce(current_setting('no.such', true), '')";
        assert_eq!(one(&scene.alice().await, such).await, "", "what was set before the error is gone");
    }
}

story! {
    async fn there_are_no_more_servers_than_the_limit_and_the_others_wait(scene) {
        let clients = futures(4, async |_| scene.conninfo("alice", "")).await;
        let mut there = Vec::new();
        for conninfo in &clients[..3] {
            there.push(connect(conninfo).await.unwrap());
        }
        let last = clients[3].clone();
        let waiting = tokio::spawn(async move { connect(&last).await.unwrap() });
        until("one waits", async || scene.proxy.pools()[0].1.waiting == 1).await;
        assert_eq!(scene.proxy.pools()[0].1.lent, 3);
        drop(there.pop());
        let served = waiting.await.unwrap();
        assert_eq!(one(&served, "SELECT 'served'").await, "served");

        // Who waits and goes leaves the queue.
        let gone = tokio::spawn({
            let conninfo = scene.conninfo("alice", "");
            async move { connect(&conninfo).await.map(|_| ()) }
        });
        until("another one waits", async || scene.proxy.pools()[0].1.waiting == 1).await;
        gone.abort();
        until("it has left the queue", async || scene.proxy.pools()[0].1.waiting == 0).await;

        let mut changed = settings();
        changed.limits.query_wait = Duration::from_millis(50);
        scene.proxy.replace(changed.clone());
        let error = connect(&scene.conninfo("alice", "")).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&error), ("53300".to_owned(), "no server connection became free in time".to_owned()));
        changed.max_clients = 3;
        scene.proxy.replace(changed);
        until("the one who was refused is gone", async || scene.proxy.clients() == 3).await;
        let error = connect(&scene.conninfo("alice", "")).await.map(|_| ()).unwrap_err();
        assert_eq!(told(&error), ("53300".to_owned(), "sorry, too many clients already".to_owned()));
    }
}

async fn futures<T>(count: usize, mut make: impl AsyncFnMut(usize) -> T) -> Vec<T> {
    let mut made = Vec::new();
    for number in 0..count {
        made.push(make(number).await);
    }
    made
}

story! {
    async fn clients_wait_while_there_is_no_primary_and_go_on_with_the_next_one(scene) {
        let (idle, idle_ends) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        let (open, open_ends) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        open.batch_execute("BEGIN; CREATE TABLE undone (id int)").await.unwrap();
        let busy = scene.alice().await;
        let sleeping = tokio::spawn(async move { busy.simple_query("SELECT pg_sleep(600)").await.map(|_| ()) });
        let admin = scene.admin().await;
        let sleeps = "SELECT count(*)::text FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'";
        until("it sleeps", async || one(&admin, sleeps).await == "1").await;

        // Nobody is the primary: nothing is sent to the former one, not even by those who are in.
        assert!(scene.proxy.learn(scene.table(1, None)));
        let asked = tokio::spawn(async move { (idle.simple_query("SELECT 1").await, idle) });
        let newcomer = tokio::spawn({
            let conninfo = scene.conninfo("alice", "");
            async move { connect(&conninfo).await }
        });
        until("the newcomer waits", async || scene.proxy.clients() == 4).await;
        // sleep: what must not happen has time to happen.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!asked.is_finished() && !newcomer.is_finished());

        // The same one is still it.
        scene.route(1, "a");
        let (answer, idle) = asked.await.unwrap();
        assert!(matches!(answer.unwrap()[..], [.., SimpleQueryMessage::CommandComplete(1)]));
        // It waits for one of three servers now, which all are taken.
        assert!(!newcomer.is_finished());

        // Another one is it.
        scene.route(2, "b");
        let changed = |sentence: &str| format!("the primary has changed; {sentence}");
        let error = sleeping.await.unwrap().unwrap_err();
        assert_eq!(
            told(&error),
            (
                "08007".to_owned(),
                changed("whether the statement that was under way has committed is not known")
            )
        );
        assert_eq!(last_word(open_ends).await, ("40001".to_owned(), changed("the open transaction was rolled back")));
        assert_eq!(last_word(idle_ends).await, ("57P01".to_owned(), changed("no statement was under way")));
        drop((open, idle));
        let newcomer = newcomer.await.unwrap().unwrap();
        assert_eq!(one(&newcomer, "SELECT coalesce(to_regclass('undone')::text, 'undone')").await, "undone");
        assert!(!scene.proxy.learn(scene.table(1, Some("a"))), "the former term is over");
    }
}

story! {
    async fn an_answer_of_a_server_that_stood_still_is_not_passed_on_when_another_one_leads(scene) {
        let (client, ending) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        let pid: i32 = one(&client, "SELECT pg_backend_pid()").await.parse().unwrap();
        let backend = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(backend, rustix::process::Signal::STOP).unwrap();
        let asked = tokio::spawn(async move { client.simple_query("SELECT 'old'").await.map(|_| ()) });
        // sleep: so that the question stands in the server's socket.
        tokio::time::sleep(Duration::from_millis(100)).await;
        // Its proof runs out first; nobody knows who leads.
        let ran_out = pgherd_core::types::Instant::from_boot(Duration::ZERO);
        assert!(scene.proxy.learn(Table { valid_until: ran_out, ..scene.table(1, Some("a")) }));
        rustix::process::kill_process(backend, rustix::process::Signal::CONT).unwrap();
        let admin = scene.admin().await;
        let state = format!("SELECT state FROM pg_stat_activity WHERE pid = {pid}");
        until("it has answered", async || one(&admin, &state).await == "idle").await;
        assert!(!asked.is_finished(), "what it said is not passed on");
        scene.route(2, "b");
        let error = asked.await.unwrap().unwrap_err();
        let told = match error.as_db_error() {
            Some(_) => told(&error),
            None => last_word(ending).await,
        };
        assert_eq!(told.0, "08007");
    }
}

story! {
    async fn a_cancel_ends_the_statement_of_its_client_and_of_nobody_else(scene) {
        let (client, other) = (scene.alice().await, scene.alice().await);
        let token = client.cancel_token();
        let sleeping = tokio::spawn(async move { (client.simple_query("SELECT pg_sleep(600)").await, client) });
        let others = tokio::spawn(async move { other.simple_query("SELECT pg_sleep(1)").await.map(|_| ()) });
        let admin = scene.admin().await;
        let sleeps = "SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(%'";
        until("both sleep", async || one(&admin, sleeps).await == "2").await;
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
        let (error, client) = tokio::time::timeout(SOON, sleeping).await.expect("in time").unwrap();
        assert_eq!(told(&error.unwrap_err()).0, "57014");
        assert_eq!(one(&client, "SELECT 'goes on'").await, "goes on");
        others.await.unwrap().unwrap();
        // When nothing is under way it does nothing.
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
        assert_eq!(one(&client, "SELECT 'goes on'").await, "goes on");
        drop(client);
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
        assert_eq!(one(&scene.alice().await, "SELECT 'goes on'").await, "goes on");
    }
}

story! {
    async fn a_server_that_ends_tells_its_client_and_is_never_lent_again(scene) {
        let (client, ending) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        let pid = one(&client, "SELECT pg_backend_pid()::text").await;
        let admin = scene.admin().await;
        admin.simple_query(&format!("SELECT pg_terminate_backend({pid}, 5000)")).await.unwrap();
        let words = "terminating connection due to administrator command";
        assert_eq!(last_word(ending).await, ("57P01".to_owned(), words.to_owned()), "the server's");
        // An idle one that is gone is noticed before it is lent.
        let next = scene.alice().await;
        let pid = one(&next, "SELECT pg_backend_pid()::text").await;
        drop(next);
        until("it is idle", async || scene.proxy.pools()[0].1.idle == 1).await;
        admin.simple_query(&format!("SELECT pg_terminate_backend({pid}, 5000)")).await.unwrap();
        let after = scene.alice().await;
        assert_ne!(one(&after, "SELECT pg_backend_pid()::text").await, pid);
    }
}

story! {
    async fn what_a_killed_postmaster_leaves_is_told_as_it_is(scene) {
        let admin = scene.admin().await;
        let (open, ending) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        open.batch_execute("CREATE TABLE t (id int); BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
        let (_idle, idle_ending) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
        let busy = scene.alice().await;
        let runs = tokio::spawn(async move { told(&busy.simple_query("SELECT pg_sleep(600)").await.unwrap_err()).0 });
        let look = "SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '%sleep(600)' AND state = 'active'";
        until("it runs", async || one(&admin, look).await == "1").await;
        let postmaster = one(&admin, "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)").await;
        assert!(std::process::Command::new("kill").args(["-9", &postmaster]).status().unwrap().success());
        let (code, words) = last_word(ending).await;
        assert_eq!(code, "40001", "{words}");
        assert_eq!(last_word(idle_ending).await.0, "57P01");
        assert_eq!(runs.await.unwrap(), "08007", "a function that writes could have committed");
    }
}

story! {
    async fn large_results_and_copies_go_through(scene) {
        let client = scene.alice().await;
        let rows = client.query("SELECT repeat(n::text, 1000) FROM generate_series(1, 20000) n", &[]).await.unwrap();
        assert_eq!(rows.len(), 20_000);
        let long: String = one(&client, "SELECT repeat('x', 100000000)").await;
        assert_eq!(long.len(), 100_000_000);
        client.batch_execute("CREATE TABLE copied (line text)").await.unwrap();
        let sink = client.copy_in::<_, bytes::Bytes>("COPY copied FROM STDIN").await.unwrap();
        let mut sink = std::pin::pin!(sink);
        let line = bytes::Bytes::from("y".repeat(999) + "\n");
        for _ in 0..50_000 {
            std::future::poll_fn(|cx| futures_util::Sink::poll_ready(sink.as_mut(), cx)).await.unwrap();
            futures_util::Sink::start_send(sink.as_mut(), line.clone()).unwrap();
        }
        assert_eq!(sink.finish().await.unwrap(), 50_000);
        assert_eq!(one(&client, "SELECT sum(length(line))::text FROM copied").await, "49950000");
        let stream = client.copy_out("COPY copied TO STDOUT").await.unwrap();
        let mut stream = std::pin::pin!(stream);
        let mut length = 0;
        while let Some(part) =
            std::future::poll_fn(|cx| futures_util::Stream::poll_next(stream.as_mut(), cx)).await
        {
            length += part.unwrap().len();
        }
        assert_eq!(length, 50_000_000);
    }
}

story! {
    async fn reads_go_to_a_standby_and_without_one_to_a_primary_that_takes_no_writes(scene) {
        // It is one server in both roles here, and replays nothing.
        let mut careless = settings();
        careless.reads.your_writes = false;
        scene.proxy.replace(careless);
        let reader = connect(&scene.reading()).await.unwrap();
        assert_eq!(one(&reader, "SELECT 'read'").await, "read");
        let role = |node: &str| Role::Standby(node.parse().unwrap());
        assert_eq!(scene.proxy.pools()[0].0.role, role("s"));

        assert!(scene.proxy.learn(Table { standbys: Vec::new(), ..scene.table(1, Some("a")) }));
        let other = connect(&scene.reading()).await.unwrap();
        let error = other.batch_execute("CREATE TABLE never (id int)").await.unwrap_err();
        assert_eq!(told(&error).0, "25006");
        drop(other);
        // The server is a writer's, later.
        scene.alice().await.batch_execute("CREATE TABLE written (id int)").await.unwrap();
        assert!(scene.proxy.pools().iter().any(|(name, _)| name.role == Role::Primary));

        // Who reads from a standby that nobody hears of any more waits, and goes on when it is heard again.
        let asked = tokio::spawn(async move { one(&reader, "SELECT 'again'").await });
        // sleep: what must not happen has time to happen.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!asked.is_finished());
        scene.route(1, "a");
        assert_eq!(asked.await.unwrap(), "again");
    }
}
