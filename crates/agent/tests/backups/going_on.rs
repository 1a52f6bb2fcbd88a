//! A backup that was interrupted is gone on from: by a new one, which does not store again what is there.

use std::time::Duration;

use jiff::Timestamp;
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::catalog::{self, Catalog, Which};
use pgherd_agent::backups::check::{Expected, check};
use pgherd_agent::backups::take::{Order, Taken, take};
use pgherd_api::report::CheckState;
use pgherd_backup::collect::{Patience, collect};
use pgherd_backup::manifest::{Outcome, outcomes};
use pgherd_backup::name::{BackupId, Kind, Place};
use pgherd_backup::tombstone;
use tokio::sync::watch;

use crate::harness::{ask, story, until};
use crate::original::{Original, digest, order, slow};
use crate::restored::{Copy, at};

/// Leaves what it has stored to be found soon, and goes on from whatever is there.
fn going_on(order: Order) -> Order {
    Order { silence: Duration::ZERO, settle_every: Duration::from_millis(100), ..order }
}

/// Begins a backup, and drops it after so many bytes; or what came of it.
async fn interrupted(original: &Original, order: Order, bytes: u64) -> Option<Taken> {
    let (progress, mut seen) = watch::channel(Progress::default());
    let source = original.source(0, original.session().await, None);
    let far = async {
        seen.wait_for(|seen| seen.done_bytes >= bytes).await.ok();
    };
    tokio::select! {
        taken = take(&original.repository, source, &order, &progress) => taken.ok(),
        () = far => None,
    }
}

async fn place(original: &Original) -> Place {
    let system = ask(&original.session().await, "SELECT system_identifier FROM pg_control_system()").await;
    Place(system.parse().unwrap())
}

/// Collects as if a day had gone by; nothing is older than that, and it takes no time to become so.
async fn collect_all(original: &Original) -> pgherd_backup::collect::Report {
    let patience = Patience { grace: Duration::ZERO, lease: Duration::ZERO };
    collect(&original.repository, place(original).await, patience, Timestamp::now()).await.unwrap()
}

async fn given_up(original: &Original) -> Vec<BackupId> {
    let all = outcomes(&original.repository, place(original).await).await.unwrap();
    all.into_iter()
        .filter(|(_, outcome)| matches!(outcome, Outcome::Abandoned(_)))
        .map(|(id, _)| id)
        .collect()
}

async fn packs(original: &Original) -> usize {
    let packs = place(original).await.all(Kind::Packs);
    original.repository.store().list_all(&packs).await.unwrap().len()
}

/// What is restored is what is there, when nobody works any more.
async fn restored_is_right(original: &Original, taken: &Taken) {
    let quiet = original.session().await;
    until("nothing goes on", async || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND state = 'active'";
        (ask(&quiet, busy).await == "1").then_some(())
    })
    .await;
    let (wanted, end) = (original.digest().await, original.archive_everything().await);
    let archive = original.archive_as_files().await;
    let copy = Copy::of(original, "r").await;
    copy.restore(original, &taken.manifest, copy.wish(&archive, at(end))).await.unwrap();
    assert_eq!(digest(&copy.recover().await).await, wanted);
    copy.amcheck();
    copy.stop();
}

/// Tables that come behind others in the order of paths, with content that does not compress well: packs are full soon.
async fn incompressible(original: &Original) {
    original
        .run(
            "CREATE TABLE large AS SELECT n, gen_random_uuid() a, gen_random_uuid() b, gen_random_uuid() c, gen_random_uuid() d \
             FROM generate_series(1, 500000) n; CREATE INDEX ON large (a); CREATE TABLE large_2 AS TABLE large; \
             CREATE TABLE large_3 AS TABLE large; CREATE TABLE large_4 AS TABLE large; CREATE TABLE large_5 AS TABLE large; \
             CREATE TABLE large_6 AS TABLE large; CHECKPOINT",
        )
        .await;
}

story! {
    async fn case_15_what_an_interrupted_backup_has_stored_is_not_stored_again() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "3", "-q"]).await;
        incompressible(&original).await;
        let size: u64 = ask(&original.session().await, "SELECT sum(pg_database_size(oid))::int8 FROM pg_database")
            .await.parse().unwrap();
        // One reader, so that one pack is lost.
        let first = Order { readers: 1, ..going_on(slow(None, 60_000_000)) };
        assert!(interrupted(&original, first, size / 10 * 9).await.is_none(), "it is in its middle");

        // While the second one is taken everything goes on, also what the first has copied.
        let mut bench = original.start_pgbench(&["-c", "2", "-T", "600"]);
        let session = original.session().await;
        until("something has changed", async || {
            (ask(&session, "SELECT count(*) > 100 FROM pgbench_history").await == "t").then_some(())
        })
        .await;
        let taken = original.take(&going_on(order(None))).await.unwrap();
        let manifest = &taken.manifest;
        let left = manifest.continues.expect("it goes on from the first");
        assert_eq!(manifest.parent, None, "and is complete all the same");
        let own: u64 = manifest.packs[&manifest.id].iter().map(|pack| pack.bytes).sum();
        let former: u64 = manifest.packs[&left].iter().map(|pack| pack.bytes).sum();
        assert!(own < former, "{own} bytes of its own, {former} of the first one");
        assert!(taken.kept_bytes > size / 4, "{} of {size}", taken.kept_bytes);
        bench.kill().await.unwrap();
        assert_eq!(given_up(&original).await, [left]);

        let catalog = Catalog::read(original.repository.clone(), place(&original).await).await.unwrap();
        let expected = Expected {
            minimum_redundancy: 1,
            backup_maximum_age: None,
            backup_minimum_bytes: None,
            wal_maximum_age: None,
        };
        let checked = check(&catalog, &expected).await.unwrap();
        let failed = checked.checks.iter().find(|item| item.check == "failed backups").unwrap();
        assert_eq!(failed.state, CheckState::Ok, "somebody has gone on from it: {failed:?}");
        let shown = catalog::show(&catalog, Which::Last).await.unwrap();
        assert_eq!((shown.id, shown.continues), (manifest.id.to_string(), Some(left.to_string())));
        assert_eq!(catalog::list(&catalog).await.unwrap().backups.len(), 1);

        // What it refers to stays, and it is all there.
        collect_all(&original).await;
        let referred: usize = manifest.packs.values().map(Vec::len).sum();
        assert_eq!(packs(&original).await, referred, "and nothing else");
        restored_is_right(&original, &taken).await;
        let place = place(&original).await;
        tombstone::bury(&original.repository, place, manifest.id, "a test", Timestamp::now()).await.unwrap();
        collect_all(&original).await;
        assert_eq!(packs(&original).await, 0, "all of it goes with it");
    }
}

story! {
    async fn case_15_attempt_after_attempt_comes_to_its_end() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        incompressible(&original).await;
        let mut attempts = Vec::new();
        for part in 1..=2 {
            let order = Order { readers: 1, ..going_on(slow(None, 60_000_000)) };
            assert!(interrupted(&original, order, part * 100_000_000).await.is_none(), "it is in its middle");
            attempts.push(given_up(&original).await.len());
            // Somebody makes room at the worst moment; whoever is gone on from by nobody yet has just shown a sign of life.
            let patience = Patience { grace: Duration::ZERO, lease: Duration::from_secs(3600) };
            collect(&original.repository, place(&original).await, patience, Timestamp::now()).await.unwrap();
        }
        assert_eq!(attempts, [0, 1], "each goes on from the one before");
        let taken = original.take(&going_on(order(None))).await.unwrap();
        assert!(taken.manifest.packs.len() > 2, "several attempts have a part in it: {:?}", taken.manifest.packs.keys());
        collect_all(&original).await;
        restored_is_right(&original, &taken).await;
    }
}

story! {
    async fn case_15_an_incremental_that_compares_goes_on_beside_its_parent() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "3", "-q"]).await;
        let parent = original.full().await.manifest.id;
        incompressible(&original).await;
        original.run("UPDATE pgbench_accounts SET abalance = 1 WHERE aid % 1000 = 0; CHECKPOINT").await;
        let first = Order { readers: 1, ..going_on(slow(Some(parent), 60_000_000)) };
        assert!(interrupted(&original, first, 250_000_000).await.is_none(), "it is in its middle");
        let taken = original.take(&going_on(order(Some(parent)))).await.unwrap();
        let manifest = &taken.manifest;
        let left = manifest.continues.expect("it goes on from the first");
        assert_eq!(manifest.parent, Some(parent));
        assert_eq!(manifest.packs.keys().copied().collect::<Vec<_>>(), [parent, left, manifest.id]);
        collect_all(&original).await;
        restored_is_right(&original, &taken).await;
    }
}
