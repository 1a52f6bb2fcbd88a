//! What an operator bounds: how many clients there are, and how long they may take.

use std::time::Duration;

use pgherd_proxy::{Settings, Timeouts};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::harness::{SOON, Scene, connect, connect_and_watch, last_word, one, settings, story, told, until};

const SHORT: Option<Duration> = Some(Duration::from_millis(150));
/// Longer than that, on whatever machine.
const LONG: Option<Duration> = Some(Duration::from_secs(60));

fn within(timeouts: Timeouts) -> Settings {
    let mut settings = settings();
    settings.timeouts = timeouts;
    settings
}

story! {
    async fn clients_are_counted_by_user_and_by_database(scene) {
        let mut few = settings();
        (few.max_user_clients, few.max_database_clients) = (Some(2), Some(3));
        scene.proxy.replace(few);
        let refused = async |conninfo: &str| told(&connect(conninfo).await.map(|_| ()).unwrap_err());
        let code = || "53300".to_owned();
        let (alice, carol) = (scene.sharing("alice", ""), scene.sharing("carol", ""));
        let (first, _second) = (connect(&alice).await.unwrap(), connect(&alice).await.unwrap());
        assert_eq!(refused(&alice).await, (code(), "too many connections for role \"alice\"".to_owned()));
        let _third = connect(&carol).await.unwrap();
        assert_eq!(refused(&carol).await, (code(), "too many connections for database \"mall\"".to_owned()));
        drop(first);
        until("one has left", async || connect(&alice).await.is_ok()).await;
    }
}

/// The same with either pooling.
async fn is_ended(scene: &Scene, timeouts: Timeouts, beginning: &str, query: &str, code: &str) {
    scene.proxy.replace(within(timeouts));
    for conninfo in [scene.conninfo("alice", ""), scene.sharing("alice", "")] {
        let (client, ending) = connect_and_watch(&conninfo).await.unwrap();
        client.batch_execute(beginning).await.unwrap();
        match query {
            "" => assert_eq!(last_word(ending).await.0, code, "{beginning}"),
            query => assert_eq!(told(&client.simple_query(query).await.unwrap_err()).0, code, "{query}"),
        }
        // Nothing of it goes on.
        let admin = scene.admin().await;
        let running =
            "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'alice' AND state <> 'idle'";
        until("its server is free of it", async || one(&admin, running).await == "0").await;
    }
}

story! {
    async fn what_lasts_too_long_is_ended_and_told_why(scene) {
        let none = Timeouts::default();
        is_ended(scene, Timeouts { idle: SHORT, ..none }, "SELECT 1", "", "57P05").await;
        is_ended(scene, Timeouts { idle_transaction: SHORT, ..none }, "BEGIN; SELECT 1", "", "25P03").await;
        is_ended(scene, Timeouts { idle_transaction: SHORT, ..none }, "BEGIN", "", "25P03").await;
        is_ended(scene, Timeouts { transaction: SHORT, ..none }, "BEGIN; SELECT 1", "", "25P04").await;
        is_ended(scene, Timeouts { query: SHORT, ..none }, "SELECT 1", "SELECT pg_sleep(100)", "57014").await;
        is_ended(scene, Timeouts { transaction: SHORT, ..none }, "SELECT 1", "SELECT pg_sleep(100)", "25P04").await;

        // What is fast is not taken for the whole that it is part of.
        let all = Timeouts { idle: LONG, idle_transaction: LONG, transaction: LONG, query: SHORT };
        scene.proxy.replace(within(all));
        for conninfo in [scene.conninfo("alice", ""), scene.sharing("alice", "")] {
            let client = connect(&conninfo).await.unwrap();
            for _ in 0..20 {
                one(&client, "SELECT pg_sleep(0.02)").await;
            }
            client.batch_execute("BEGIN").await.unwrap();
            for _ in 0..20 {
                one(&client, "SELECT pg_sleep(0.02)").await;
            }
            client.batch_execute("COMMIT").await.unwrap();
        }
        let quick = Timeouts { transaction: SHORT, idle_transaction: SHORT, ..none };
        scene.proxy.replace(within(quick));
        for conninfo in [scene.conninfo("alice", ""), scene.sharing("alice", "")] {
            let client = connect(&conninfo).await.unwrap();
            for _ in 0..20 {
                client.batch_execute("BEGIN; SELECT pg_sleep(0.02); COMMIT").await.unwrap();
            }
            // sleep: nothing is open, and that may last.
            tokio::time::sleep(SHORT.unwrap() * 2).await;
            assert_eq!(one(&client, "SELECT 'there'").await, "there");
        }
    }
}

story! {
    async fn who_does_not_come_in_in_time_is_told_why(scene) {
        let mut impatient = settings();
        impatient.login_timeout = Duration::from_millis(300);
        scene.proxy.replace(impatient);
        let mut silent = TcpStream::connect(scene.proxy.addresses()[0]).await.unwrap();
        let mut heard = Vec::new();
        tokio::time::timeout(SOON, silent.read_to_end(&mut heard)).await.expect("in time").unwrap();
        let heard = String::from_utf8_lossy(&heard);
        assert!(heard.contains("C57014\0Mcanceling authentication due to timeout"), "{heard}");
        // It is the proxy that keeps this one waiting: there is nobody whom it could ask for the password.
        assert!(scene.proxy.learn(scene.table(2, None)));
        for conninfo in [scene.conninfo("alice", ""), scene.reading()] {
            let refused = connect(&conninfo).await.map(|_| ()).unwrap_err();
            assert_eq!(told(&refused).0, "57P03");
        }
    }
}
