//! A COMMIT that is lost with its server, and looked up.

use std::sync::Mutex;
use std::time::Duration;

use pgherd_core::types::{Lsn, Term};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinHandle};
use tokio_postgres::Client;

use crate::harness::{Scene, connect, connect_and_watch, last_word, one, settings, story, told, until};

/// What stands between the proxy and its server, and can be cut.
struct Wire {
    port: u16,
    carried: std::sync::Arc<Mutex<Vec<AbortHandle>>>,
    carrier: JoinHandle<()>,
}

impl Wire {
    async fn to(server_port: u16) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let carried = std::sync::Arc::new(Mutex::new(Vec::new()));
        let all = std::sync::Arc::clone(&carried);
        let carrier = tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let carrying = tokio::spawn(async move {
                    let mut far = TcpStream::connect(("127.0.0.1", server_port)).await.unwrap();
                    drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
                });
                all.lock().unwrap().push(carrying.abort_handle());
            }
        });
        Wire { port, carried, carrier }
    }

    /// Both sides see that the other one is gone; new connections are carried as before.
    fn cut(&self) {
        self.carried.lock().unwrap().drain(..).for_each(|carrying| carrying.abort());
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.cut();
        self.carrier.abort();
    }
}

/// A server whose commits wait for a standby that is not there, and a proxy that reaches it by a wire.
struct Waiting<'a> {
    scene: &'a Scene,
    wire: Wire,
    conninfo: String,
    admin: Client,
}

impl Waiting<'_> {
    async fn new(scene: &Scene) -> Waiting<'_> {
        let mut settings = settings();
        settings.checks_commits = true;
        settings.limits.hold = Duration::from_secs(20);
        scene.proxy.replace(settings);
        let wire = Wire::to(scene.server.port).await;
        let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=mall", scene.server.port);
        let admin = connect(&conninfo).await.unwrap();
        for database in ["mall", "shop"] {
            let admin = connect(&conninfo.replace("mall", database)).await.unwrap();
            admin
                .batch_execute("CREATE TABLE done (id int PRIMARY KEY); GRANT ALL ON done TO alice")
                .await
                .unwrap();
        }
        let waiting = Waiting { scene, wire, conninfo, admin };
        waiting.lead(2, None);
        waiting
    }

    /// The primary of this term, whose history left the one before there.
    fn lead(&self, term: u64, fork: Option<Lsn>) {
        let mut table = self.scene.table(term, Some("a"));
        table.primary.as_mut().unwrap().port = self.wire.port;
        table.forks = fork.map(|lsn| (Term(term - 1), lsn)).into_iter().collect();
        assert!(self.scene.proxy.learn(table));
    }

    /// Whether commits wait from now on, those under way included.
    async fn wait(&self, waits: bool) {
        let names = if waits { "nobody" } else { "" };
        let set = format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'");
        self.admin.batch_execute(&set).await.unwrap();
        self.admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        // The checkpointer tells everybody, in its own time. Who waits here is released with the others.
        let commit = "SELECT pg_logical_emit_message(true, 'waits', '')";
        until("it is so", async || {
            let probe = connect(&self.conninfo).await.unwrap();
            let commits = probe.batch_execute(commit);
            tokio::time::timeout(Duration::from_millis(200), commits).await.is_err() == waits
        })
        .await;
    }

    /// Until so many commits of clients wait for their standby.
    async fn are_waiting(&self, count: usize) {
        let query =
            "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = 'alice'";
        until("they wait", async || one(&self.admin, query).await == count.to_string()).await;
    }

    async fn rows(&self) -> String {
        one(&self.admin, "SELECT string_agg(id::text, ',' ORDER BY id) FROM done").await
    }
}

async fn write(client: &Client, id: i32) {
    client.batch_execute(&format!("BEGIN; INSERT INTO done VALUES ({id})")).await.unwrap();
}

story! {
    async fn whoever_committed_at_a_lost_connection_hears_so_and_stays(scene) {
        let waiting = Waiting::new(scene).await;
        // As many as there may be servers: nobody keeps the lost one while another is waited for.
        let (simple, third, extended) = (scene.sharer().await, scene.sharer().await, scene.sharer().await);
        let commit = extended.prepare("COMMIT").await.unwrap();
        waiting.wait(true).await;
        write(&simple, 1).await;
        write(&extended, 2).await;
        write(&third, 3).await;
        let simple = tokio::spawn(async move { (simple.simple_query("COMMIT").await, simple) });
        let extended = tokio::spawn(async move { (extended.execute(&commit, &[]).await, extended) });
        let third = tokio::spawn(async move { third.simple_query("COMMIT").await });
        waiting.are_waiting(3).await;
        waiting.wire.cut();
        // It is found in progress, and asked for until it is over.
        let asked = "SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '%pg_xact_status%' AND usename = 'alice'";
        until("it is looked up", async || one(&waiting.admin, asked).await != "0").await;
        assert!(!simple.is_finished() && !extended.is_finished(), "nobody knows yet");
        waiting.wait(false).await;
        let (answered, simple) = simple.await.unwrap();
        assert!(answered.is_ok(), "{answered:?}");
        let (answered, extended) = extended.await.unwrap();
        assert!(answered.is_ok(), "{answered:?}");
        let answered = third.await.unwrap();
        assert!(answered.is_ok(), "{answered:?}");
        assert_eq!(waiting.rows().await, "1,2,3");
        // They go on as if nothing had been.
        assert_eq!(one(&simple, "SELECT count(*)::text FROM done").await, "3");
        let statement = extended.prepare("SELECT 7").await.unwrap();
        assert_eq!(extended.query_one(&statement, &[]).await.unwrap().get::<_, i32>(0), 7);
        until("nothing is lent", async || scene.lent() == 0).await;
    }
}

story! {
    async fn what_has_committed_on_one_server_alone_is_told_once_it_is_safe(scene) {
        let waiting = Waiting::new(scene).await;
        let client = scene.sharer().await;
        waiting.wait(true).await;
        write(&client, 1).await;
        let committing = tokio::spawn(async move { client.simple_query("COMMIT").await });
        waiting.are_waiting(1).await;
        waiting.wire.cut();
        // The backend ends its wait, and nobody is there to hear of that.
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query = 'COMMIT'";
        one(&waiting.admin, end).await;
        until("it is there", async || waiting.rows().await == "1").await;
        let secures = "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'alice' AND wait_event = 'SyncRep' AND query LIKE '%emit_message%'";
        until("the proxy waits for the standby, too", async || one(&waiting.admin, secures).await == "1").await;
        assert!(!committing.is_finished());
        waiting.wait(false).await;
        assert!(committing.await.unwrap().is_ok());
    }
}

story! {
    async fn another_history_decides_whether_the_commit_is_in_it(scene) {
        let waiting = Waiting::new(scene).await;
        // One server is all primaries here, so that only the fork makes the difference.
        for (term, fork, told_as) in [(3, Some(Lsn(u64::MAX)), None), (4, Some(Lsn(1)), Some("40001")), (5, None, Some("08007"))] {
            let client = scene.sharer().await;
            waiting.wait(true).await;
            write(&client, i32::try_from(term).unwrap()).await;
            let committing = tokio::spawn(async move { client.simple_query("COMMIT").await });
            waiting.are_waiting(1).await;
            waiting.lead(term, fork);
            waiting.wire.cut();
            waiting.wait(false).await;
            let answered = committing.await.unwrap();
            assert_eq!(answered.err().map(|error| told(&error).0).as_deref(), told_as, "in term {term}");
        }
    }
}

story! {
    async fn what_went_with_the_server_ends_the_session_after_the_commit_is_told(scene) {
        let waiting = Waiting::new(scene).await;
        for (number, conninfo) in [scene.sharing("alice", ""), scene.conninfo("alice", "")].into_iter().enumerate() {
            let (client, ends) = connect_and_watch(&conninfo).await.unwrap();
            waiting.wait(true).await;
            client.batch_execute("BEGIN; SET work_mem = '9MB'").await.unwrap();
            let id = 10 + number;
            client.batch_execute(&format!("INSERT INTO done VALUES ({id})")).await.unwrap();
            let committing = tokio::spawn(async move { client.simple_query("COMMIT").await });
            waiting.are_waiting(1).await;
            waiting.wire.cut();
            waiting.wait(false).await;
            assert!(committing.await.unwrap().is_ok(), "{conninfo}");
            let (sqlstate, message) = last_word(ends).await;
            assert_eq!(sqlstate, "57P01");
            assert!(message.contains("has committed"), "{message}");
        }
    }
}

story! {
    async fn what_has_no_mark_stays_unknown_and_what_fails_before_the_commit_is_rolled_back(scene) {
        let waiting = Waiting::new(scene).await;
        // A statement that commits by itself has no moment at which its number could be asked for.
        let client = scene.sharer().await;
        waiting.wait(true).await;
        let committing = tokio::spawn(async move { client.simple_query("INSERT INTO done VALUES (1)").await });
        waiting.are_waiting(1).await;
        waiting.wire.cut();
        assert_eq!(told(&committing.await.unwrap().unwrap_err()).0, "08007");
        waiting.wait(false).await;
        // Whoever has written nothing is asked nothing more, and whoever rolls back neither.
        let client = scene.sharer().await;
        for text in ["BEGIN; SELECT 1", "COMMIT", "BEGIN; SELECT 1", "ROLLBACK", "BEGIN; SELECT 1", "COMMIT AND CHAIN", "END"] {
            client.batch_execute(text).await.unwrap();
        }
        assert_eq!(one(&client, "SELECT 'still'").await, "still");
        // The question itself fails, and with it the transaction; nobody hears of a COMMIT.
        let revoke = "REVOKE EXECUTE ON FUNCTION pg_current_wal_insert_lsn() FROM PUBLIC";
        waiting.admin.batch_execute(revoke).await.unwrap();
        write(&client, 2).await;
        let refused = client.simple_query("COMMIT").await.unwrap_err();
        assert_eq!(told(&refused).0, "40001");
        let detail = refused.as_db_error().unwrap().detail().unwrap();
        assert!(detail.contains("commit_check") && detail.contains("permission denied"), "{detail}");
        assert_eq!(waiting.rows().await, "1");
    }
}
