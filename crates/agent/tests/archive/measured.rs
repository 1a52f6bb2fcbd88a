//! How fast a backlog comes into the archive. Not a test of right and wrong: it prints.

use std::time::Instant;

use pgherd_agent::archive::Archiving;

use crate::harness::{ask, story};
use crate::scene::{Scene, fill};

const SEGMENTS: usize = 64;

story! {
    #[ignore = "a measurement, of a GiB: run it alone, in release"]
    async fn a_backlog_of_a_gib() {
        let scene = Scene::new(&[]).await;
        let session = scene.nodes[0].session().await;
        session.batch_execute("CREATE TABLE backlog (n int, text text)").await.unwrap();
        // Ordinary WAL, of rows with text that compresses somewhat.
        let rows = "INSERT INTO backlog SELECT n, md5(n::text) || md5((n * 7)::text) FROM generate_series(1, 130000) AS n";
        for _ in 0..SEGMENTS {
            session.batch_execute(rows).await.unwrap();
        }
        let end = fill(&session).await;
        let begun = Instant::now();
        let archiving = Archiving::begin(scene.order(0).await);
        let mut status = archiving.status();
        status.wait_for(|status| status.durable >= Some(end)).await.unwrap();
        let took = begun.elapsed();
        archiving.end().await;
        let segments = scene.inventory().await.segments().count();
        let bytes = ask(&session, "SELECT pg_size_pretty(pg_current_wal_lsn() - '0/0'::pg_lsn)").await;
        let rate = segments as f64 * 16.0 * 1.048_576 / took.as_secs_f64();
        eprintln!("{segments} segments in {took:?}: {rate:.0} MB/s; WAL ends at {bytes}");
    }
}
