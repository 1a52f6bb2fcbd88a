//! No agent is heard any more: what goes on, what waits, and what is never done.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant as Moment};

use pgherd_core::types::{Instant, Term};
use pgherd_proxy::routes::{Standby, Table, Target};

use crate::harness::{PASSWORD, SOON, Scene, connect, one, settings, story, told, until};
use crate::server::Server;

impl Scene {
    /// What an agent of that node's reign says, with a proof for so long.
    pub(crate) fn says(&self, term: u64, primary: &Server, standbys: &[&Server], lasts: Duration) -> Table {
        let target = |server: &Server| Target {
            node: format!("n{}", server.port).parse().unwrap(),
            address: Ipv4Addr::LOCALHOST.into(),
            port: server.port,
            socket_dir: None,
        };
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let since_boot = Duration::new(now.tv_sec.try_into().unwrap(), now.tv_nsec.try_into().unwrap());
        Table {
            term: Term(term),
            primary: Some(target(primary)),
            gate_open: true,
            standbys: standbys.iter().map(|standby| Standby { target: target(standby), weight: 1 }).collect(),
            forks: Vec::new(),
            draining: None,
            valid_until: Instant::from_boot(since_boot) + lasts,
        }
    }
}

const PORT: &str = "SELECT current_setting('port')";

story! {
    async fn reads_go_on_logins_too_and_writes_wait_until_an_agent_is_heard(scene) {
        let standby = Server::standby_of(&scene.server);
        let (primary, port) = (&scene.server, standby.port.to_string());
        let hold = |hold| {
            let mut changed = settings();
            changed.limits.hold = hold;
            changed.reads.wait = Duration::from_secs(5);
            scene.proxy.replace(changed);
        };
        hold(SOON);
        let long = Duration::from_secs(600);
        assert!(scene.proxy.learn(scene.says(1, primary, &[&standby], long)));
        let writing = scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall");
        let reading = scene.reading().replace("dbname=shop", "dbname=mall");
        // Another user than the one who writes, since nobody reads what may lack his own writes.
        let reading = reading.replace("user=alice", "user=bob").replace(PASSWORD, "else");
        let (writer, reader) = (connect(&writing).await.unwrap(), connect(&reading).await.unwrap());
        writer.batch_execute("CREATE TABLE t (i int)").await.unwrap();
        assert_eq!(one(&reader, PORT).await, port);
        // In a session of its own, and in one that is in the middle of a transaction.
        let own = connect(&scene.reading()).await.unwrap();
        assert_eq!(one(&own, PORT).await, port);
        own.batch_execute("BEGIN; SELECT 1").await.unwrap();
        writer.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();

        // The last table has run out.
        assert!(scene.proxy.learn(scene.says(1, primary, &[&standby], Duration::from_millis(1))));
        // sleep: until its proof is over.
        tokio::time::sleep(Duration::from_millis(20)).await;
        for client in [&reader, &own] {
            assert_eq!(one(client, PORT).await, port, "reads go on");
            assert_eq!(one(client, "SELECT count(*) FROM pg_database WHERE datname = 'mall'").await, "1");
        }
        own.batch_execute("COMMIT").await.unwrap();
        let refused = reader.batch_execute("CREATE TABLE u ()").await.unwrap_err();
        assert_eq!(told(&refused).0, "25006", "and nothing but reads");
        // Who comes now is known by the standby, and PostgreSQL says who is not.
        let late = connect(&reading).await.unwrap();
        assert_eq!(one(&late, PORT).await, port);
        let wrong = connect(&reading.replace("else", "wrong")).await.unwrap_err();
        assert_eq!(told(&wrong).0, "28P01");

        // What writes waits, and nothing of it is sent.
        let committing = tokio::spawn(async move {
            let done = writer.batch_execute("COMMIT").await;
            (writer, done)
        });
        let coming = tokio::spawn({
            let writing = writing.clone();
            async move {
                let client = connect(&writing).await?;
                client.batch_execute("INSERT INTO t VALUES (2)").await?;
                Ok::<_, tokio_postgres::Error>(client)
            }
        });
        // sleep: both have had their time to do what they must not.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!committing.is_finished() && !coming.is_finished());
        let admin = connect(&format!("host=127.0.0.1 port={} user=postgres dbname=mall", primary.port)).await.unwrap();
        assert_eq!(one(&admin, "SELECT count(*) FROM t").await, "0");

        // An agent is back, of the same reign: everything goes on by itself.
        assert!(scene.proxy.learn(scene.says(1, primary, &[&standby], long)));
        let (_writer, done) = committing.await.unwrap();
        done.unwrap();
        coming.await.unwrap().unwrap();
        assert_eq!(one(&admin, "SELECT count(*) FROM t").await, "2");

        // For no longer than `hold`.
        hold(Duration::from_millis(300));
        assert!(scene.proxy.learn(scene.says(1, primary, &[&standby], Duration::from_millis(1))));
        let began = Moment::now();
        let refused = connect(&writing).await;
        let refused = match refused {
            Ok(client) => client.batch_execute("SELECT 1").await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(told(&refused).0, "57P03", "{refused:?}");
        assert!(began.elapsed() < SOON);
        assert_eq!(one(&late, PORT).await, port, "and reads go on still");
    }
}

story! {
    async fn a_standby_that_was_promoted_unheard_is_none_any_more(scene) {
        let standby = Server::standby_of(&scene.server);
        let (primary, port) = (&scene.server, standby.port.to_string());
        let mut changed = settings();
        changed.limits.hold = Duration::from_millis(500);
        changed.reads.wait = Duration::from_secs(5);
        scene.proxy.replace(changed.clone());
        let long = Duration::from_secs(600);
        assert!(scene.proxy.learn(scene.says(1, primary, &[&standby], long)));
        let reading = scene.reading().replace("dbname=shop", "dbname=mall");
        let reader = connect(&reading).await.unwrap();
        assert_eq!(one(&reader, PORT).await, port);
        assert!(scene.proxy.learn(scene.says(1, primary, &[&standby], Duration::from_millis(1))));
        // sleep: until its proof is over.
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(one(&reader, PORT).await, port);

        // As an agent does it that this proxy does not hear: sessions end, and then it is promoted.
        let admin = connect(&format!("host=127.0.0.1 port={port} user=postgres dbname=mall")).await.unwrap();
        one(&admin, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'").await;
        assert_eq!(one(&admin, "SELECT pg_promote()").await, "t");
        let refused = reader.simple_query(PORT).await.unwrap_err();
        assert_eq!(told(&refused).0, "57P03", "{refused:?}");
        let late = match connect(&reading).await {
            Ok(client) => client.simple_query("CREATE TABLE u ()").await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(told(&late).0, "57P03", "{late:?}");
        assert_eq!(one(&admin, "SELECT count(*) FROM pg_tables WHERE tablename = 'u'").await, "0");

        // Then it is heard of.
        assert!(scene.proxy.learn(scene.says(2, &standby, &[], long)));
        until("the new primary is read from", async || {
            match connect(&reading).await {
                Ok(client) => client.simple_query("SELECT 1").await.is_ok(),
                Err(_) => false,
            }
        })
        .await;
        let writer = connect(&scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall")).await.unwrap();
        writer.batch_execute("CREATE TABLE u ()").await.unwrap();
    }
}

story! {
    async fn a_read_is_asked_once_more_where_its_standby_lets_nobody_in_and_not_where_somebody_has_ended_it(scene) {
        let standby = Server::standby_of(&scene.server);
        let mut changed = settings();
        changed.limits.hold = SOON;
        changed.reads.wait = Duration::from_secs(5);
        scene.proxy.replace(changed);
        assert!(scene.proxy.learn(scene.says(1, &scene.server, &[&standby], Duration::from_secs(600))));
        let reading = scene.reading().replace("dbname=shop", "dbname=mall");
        let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=mall", standby.port);
        let admin = connect(&conninfo).await.unwrap();
        let long = "SELECT count(*) || ' ' || current_setting('port') FROM generate_series(1, 6000000)";
        let end = async |which: &str| {
            let runs = "SELECT count(*) FROM pg_stat_activity \
                        WHERE state = 'active' AND query LIKE 'SELECT count(*) ||%'";
            until("it runs", async || one(&admin, runs).await == "1").await;
            one(&admin, &format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {which}")).await;
        };
        // An operator has ended it, and it stays so.
        let reader = connect(&reading).await.unwrap();
        assert_eq!(one(&reader, PORT).await, standby.port.to_string());
        let asked = tokio::spawn(async move { reader.simple_query(long).await.map(drop) });
        end("state = 'active' AND query LIKE 'SELECT count(*) ||%'").await;
        let words = "terminating connection due to administrator command";
        assert_eq!(told(&asked.await.unwrap().unwrap_err()), ("57P01".to_owned(), words.to_owned()));

        // As an agent does it before it promotes: nobody is let in any more, and then sessions end.
        let reader = connect(&reading).await.unwrap();
        assert_eq!(one(&reader, PORT).await, standby.port.to_string());
        standby.admit("host all,replication postgres,pgherd_proxy 127.0.0.1/32 trust\n");
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        until("it lets nobody in", async || connect(&conninfo.replace("postgres", "alice")).await.is_err()).await;
        let asked = tokio::spawn(async move { one(&reader, long).await });
        end("usename NOT IN ('postgres', 'pgherd_proxy')").await;
        assert_eq!(asked.await.unwrap(), format!("6000000 {}", scene.server.port), "another one has answered");
    }
}
