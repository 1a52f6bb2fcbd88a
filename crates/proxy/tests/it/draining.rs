//! A primary that is about to hand over.

use std::time::Duration;

use pgherd_proxy::routes::Table;

use crate::harness::{SOON, Scene, connect, connect_and_watch, last_word, one, story, until};

impl Scene {
    fn drains(&self, draining: bool) {
        assert!(self.proxy.learn(Table { draining: Some(draining), ..self.table(1, Some("a")) }));
    }

    /// Within a moment, if it is so by itself.
    async fn is_drained(&self) -> bool {
        tokio::time::timeout(Duration::from_millis(100), self.proxy.drained()).await.is_ok()
    }

    pub(crate) fn waiting(&self) -> u32 {
        self.proxy.pools().iter().map(|(_, counts)| counts.waiting).sum()
    }
}

story! {
    async fn what_is_under_way_ends_and_what_is_new_waits_for_the_next_primary(scene) {
        let sharing = scene.conninfo("alice", "").replace("dbname=shop", "dbname=mall");
        let (first, second) = (connect(&sharing).await.unwrap(), connect(&sharing).await.unwrap());
        first.batch_execute("BEGIN; CREATE TABLE t (id int)").await.unwrap();
        scene.drains(true);
        assert!(!scene.is_drained().await);
        let asks = tokio::spawn(async move { (one(&second, "SELECT count(*)::text FROM t").await, second) });
        let comes = tokio::spawn({ let sharing = sharing.clone(); async move { connect(&sharing).await } });
        until("both wait", async || scene.waiting() == 2).await;
        first.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
        assert!(!scene.is_drained().await);
        // Another agent, which does not know.
        assert!(scene.proxy.learn(scene.table(1, Some("a"))));
        first.batch_execute("COMMIT").await.unwrap();
        tokio::time::timeout(SOON, scene.proxy.drained()).await.unwrap();
        // Who was in a transaction a moment ago has no privilege.
        let goes_on = tokio::spawn(async move { one(&first, "SELECT count(*)::text FROM t").await });
        until("all wait", async || scene.waiting() == 3).await;
        assert!(!asks.is_finished() && !comes.is_finished());
        scene.route(2, "b");
        assert_eq!(goes_on.await.unwrap(), "1");
        assert_eq!(asks.await.unwrap().0, "1");
        comes.await.unwrap().unwrap();
    }
}

story! {
    async fn who_keeps_a_server_and_has_nothing_under_way_does_not_delay_it_and_goes_on_if_it_is_given_up(scene) {
        let client = scene.alice().await;
        let pid = one(&client, "SELECT pg_backend_pid()::text").await;
        client.batch_execute("BEGIN").await.unwrap();
        scene.drains(true);
        assert!(!scene.is_drained().await, "a transaction is open");
        client.batch_execute("COMMIT").await.unwrap();
        tokio::time::timeout(SOON, scene.proxy.drained()).await.unwrap();
        let asks = tokio::spawn(async move { (one(&client, "SELECT pg_backend_pid()::text").await, client) });
        assert!(scene.is_drained().await, "nothing is begun");
        assert!(!asks.is_finished());
        scene.drains(false);
        let (answer, client) = asks.await.unwrap();
        assert_eq!(answer, pid);
        // The next drain begins anew.
        client.batch_execute("BEGIN").await.unwrap();
        scene.drains(true);
        assert!(!scene.is_drained().await);
    }
}

story! {
    async fn whose_transaction_takes_too_long_is_told_what_became_of_it(scene) {
        let admin = scene.admin().await;
        let end_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'alice'";
        for (statement, state, told) in [
            ("BEGIN; SELECT 1", "idle in transaction", "40001"),
            ("SELECT pg_sleep(600)", "active", "08007"),
            ("SELECT 1", "idle", "57P01"),
        ] {
            let (client, ending) = connect_and_watch(&scene.conninfo("alice", "")).await.unwrap();
            let runs = tokio::spawn(async move { (client.batch_execute(statement).await, client) });
            let look = format!("SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'alice' AND state = '{state}' AND query = '{statement}'");
            until("it runs", async || one(&admin, &look).await == "1").await;
            scene.drains(true);
            assert_eq!(scene.is_drained().await, state == "idle");
            admin.batch_execute(end_all).await.unwrap();
            let word = match state {
                "active" => crate::harness::told(&runs.await.unwrap().0.unwrap_err()),
                _ => last_word(ending).await,
            };
            assert_eq!(word.0, told, "{statement}: {word:?}");
            scene.drains(false);
        }
    }
}
