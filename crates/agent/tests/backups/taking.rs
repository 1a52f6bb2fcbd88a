//! Backups are taken while everything goes on, and what is recovered from them is what was there.

use std::time::Duration;

use pgherd_agent::backups::Progress;
use pgherd_agent::backups::take::{Order, TakeError, take};
use pgherd_backup::manifest::{Outcome, outcomes};
use pgherd_backup::name::Place;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::base_backup::BaseBackupError;
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::promote::{self, promote};
use pgherd_postgres::restoring::End;
use tokio::sync::watch;

use crate::harness::{SOON, ask, story, superuser, until};
use crate::original::{Original, digest, order, run, slow};
use crate::restored::{Copy, at};

/// What happens to tables while a backup is taken, as many times as there is time.
const CHURN: &str = "\
    CREATE TABLE made (n int PRIMARY KEY, t text);\
    INSERT INTO made SELECT n, repeat('x', 300) FROM generate_series(1, 3000) n;\
    CREATE TABLE IF NOT EXISTS kept (n int, t text);\
    INSERT INTO kept SELECT n, repeat('y', 500) FROM generate_series(1, 500) n;\
    TRUNCATE shrinking;\
    INSERT INTO shrinking SELECT n FROM generate_series(1, 5000) n;\
    ALTER TABLE moving SET TABLESPACE other;\
    ALTER TABLE moving SET TABLESPACE pg_default;\
    INSERT INTO moving SELECT n FROM generate_series(1, 100) n;\
    DROP TABLE made;";

story! {
    async fn case_16_tables_are_made_dropped_truncated_extended_and_moved_during_the_copy() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        let place = original.herd.path().join("space");
        std::fs::create_dir(&place).unwrap();
        original.pgbench(&["-i", "-s", "3", "-q"]).await;
        original.run(&format!("CREATE TABLESPACE other LOCATION '{}'", place.display())).await;
        // Recovery stops at such a tablespace, unless the server is allowed to have some.
        original.run("ALTER SYSTEM SET allow_in_place_tablespaces = on; SELECT pg_reload_conf()").await;
        original.run("SET allow_in_place_tablespaces = on; CREATE TABLESPACE inside LOCATION ''").await;
        original.run(
            "CREATE TABLE shrinking (n int); CREATE TABLE moving (n int); CREATE TABLE empty ();\
             CREATE TABLE elsewhere TABLESPACE other AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n;\
             CREATE TABLE in_place TABLESPACE inside AS SELECT n FROM generate_series(1, 1000) n;\
             CREATE INDEX ON elsewhere (md5); CREATE UNLOGGED TABLE unlogged AS SELECT 1;",
        ).await;
        let mut bench = original.start_pgbench(&["-c", "4", "-T", "600"]);
        let session = original.session().await;
        let churning = tokio::spawn(async move {
            let mut times = 0;
            while run(&session, CHURN).await.is_ok() {
                times += 1;
            }
            times
        });

        let progress = watch::Sender::new(Progress::default());
        let source = original.source(0, original.session().await, None);
        // Slow enough for everything to happen some times.
        let slow = slow(None, 20_000_000);
        let taken = take(&original.repository, source, &slow, &progress).await.unwrap();
        churning.abort();
        bench.kill().await.unwrap();
        let seen = *progress.borrow();
        assert!(seen.done_bytes > 50_000_000 && seen.total_bytes > 0, "{seen:?}");
        assert!(taken.damaged.is_empty(), "{:?}", taken.damaged);
        eprintln!("{} files gone, {} of {} bytes stored", taken.vanished, taken.stored_bytes, taken.read_bytes);

        let quiet = original.session().await;
        until("nothing goes on", async || {
            let busy = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND state = 'active'";
            (ask(&quiet, busy).await == "1").then_some(())
        })
        .await;
        let (wanted, end) = (original.digest().await, original.archive_everything().await);
        assert!(end > taken.manifest.stop);
        let archive = original.archive_as_files().await;

        let copy = Copy::of(&original, "r").await;
        let mut wish = copy.wish(&archive, at(end));
        let space: u32 = ask(&quiet, "SELECT oid FROM pg_tablespace WHERE spcname = 'other'").await.parse().unwrap();
        let refused = copy.restore(&original, &taken.manifest, wish.clone()).await.unwrap_err();
        assert!(refused.to_string().contains("is not empty"), "the tablespace is the original's: {refused}");
        assert!(!copy.instance.data_dir.exists(), "a plan touches nothing");
        wish.tablespaces.insert(space, original.herd.path().join("copied space"));
        let (plan, _) = copy.restore(&original, &taken.manifest, wish).await.unwrap();
        assert_eq!(plan.target.tablespaces[0].was, place);
        let recovered = copy.recover().await;
        assert_eq!(digest(&recovered).await, wanted);
        assert_eq!(ask(&recovered, "SELECT count(*) FROM unlogged").await, "0", "it is empty, and it is there");
        for setting in ["archive_command", "primary_conninfo", "synchronous_standby_names"] {
            let value = ask(&recovered, &format!("SHOW {setting}")).await;
            assert!(value.is_empty() || value == "(disabled)", "{setting} = {value}");
        }
        copy.amcheck();
        copy.stop();
    }
}

story! {
    async fn case_19_a_standby_is_backed_up_while_the_primary_is_busy_and_while_it_is_idle() {
        let original = Original::new(&["b"]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "2", "-q"]).await;
        let mut bench = original.start_pgbench(&["-c", "2", "-T", "600"]);
        for busy in [true, false] {
            let standby = original.nodes[1].session().await;
            let source = original.source(1, standby, Some(original.session().await));
            let progress = watch::Sender::new(Progress::default());
            let slow = slow(None, 30_000_000);
            let taken = take(&original.repository, source, &slow, &progress).await.unwrap();
            assert!(taken.manifest.facts.backup_label.bytes().unwrap().windows(7).any(|text| text == b"standby"));
            if busy {
                bench.kill().await.unwrap();
            }
            original.run("CREATE TABLE IF NOT EXISTS afterwards (n int); INSERT INTO afterwards VALUES (1)").await;
            let (wanted, end) = (original.digest().await, original.archive_everything().await);
            let archive = original.archive_as_files().await;
            let copy = Copy::of(&original, if busy { "r" } else { "s" }).await;
            copy.restore(&original, &taken.manifest, copy.wish(&archive, at(end))).await.unwrap();
            let recovered = copy.recover().await;
            assert_eq!(digest(&recovered).await, wanted);
            copy.amcheck();
            copy.stop();
        }
    }
}

story! {
    async fn case_19_a_standby_that_is_promoted_ends_its_backup() {
        let original = Original::new(&["b"]).await;
        original.pgbench(&["-i", "-s", "2", "-q"]).await;
        until("the standby has it all", async || {
            let at = ask(&original.session().await, "SELECT pg_current_wal_flush_lsn()").await;
            let there = format!("SELECT pg_last_wal_replay_lsn() >= '{at}'");
            (ask(&original.nodes[1].session().await, &there).await == "t").then_some(())
        })
        .await;
        let progress = watch::Sender::new(Progress::default());
        let mut seen = progress.subscribe();
        let source = original.source(1, original.nodes[1].session().await, Some(original.session().await));
        let repository = original.repository.clone();
        let taking = tokio::spawn(async move { take(&repository, source, &slow(None, 8_000_000), &progress).await });
        seen.wait_for(|seen| seen.done_bytes > 1_000_000).await.unwrap();
        let order = promote::Order { timeline: Timeline(3), at_least: Lsn(0), names: SyncNames::Empty };
        promote(&original.nodes[1].server, &order, SOON).await.unwrap();
        let failed = taking.await.unwrap().unwrap_err();
        assert!(
            matches!(&failed, TakeError::Postgres(BaseBackupError::Promoted | BaseBackupError::Other(_))),
            "{failed:?}"
        );
        assert!(committed(&original).await.is_empty());
    }
}

story! {
    async fn case_14_without_its_wal_a_backup_is_none() {
        let original = Original::new(&[]).await;
        let impatient = Order { wal_deadline: Duration::from_millis(300), ..order(None) };
        let failed = original.take(&impatient).await.unwrap_err();
        assert!(matches!(failed, TakeError::WalIsMissing { .. }), "{failed:?}");
        assert!(committed(&original).await.is_empty());
        // With an archive it is one.
        let _archiving = original.archiving();
        let taken = original.full().await;
        assert_eq!(committed(&original).await, [taken.manifest.id.to_string()]);
    }
}

story! {
    async fn case_15_a_backup_that_is_given_up_anywhere_leaves_none_and_the_next_one_is_whole() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "1", "-q"]).await;
        let mut given_up = 0;
        for step in 0..8u64 {
            let progress = watch::Sender::new(Progress::default());
            let mut seen = progress.subscribe();
            let source = original.source(0, original.session().await, None);
            let order = slow(None, 30_000_000);
            let work = take(&original.repository, source, &order, &progress);
            let far = async {
                seen.wait_for(|seen| seen.done_bytes >= step * 5_000_000 && seen.total_bytes > 0).await.ok();
            };
            tokio::select! {
                _ = work => {}
                () = far => given_up += 1,
            }
        }
        assert!(given_up >= 4, "{given_up}");
        let whole = committed(&original).await.len();
        assert_eq!(whole + given_up, 8);
        let session = original.session().await;
        let open = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_backup_start%' AND pid <> pg_backend_pid()";
        until("the server knows of no backup", async || (ask(&session, open).await == "0").then_some(())).await;

        let taken = original.full().await;
        let (wanted, archive) = (original.digest().await, original.archive_everything().await);
        let files = original.archive_as_files().await;
        let copy = Copy::of(&original, "r").await;
        copy.restore(&original, &taken.manifest, copy.wish(&files, at(archive))).await.unwrap();
        assert_eq!(digest(&copy.recover().await).await, wanted);
        copy.stop();
    }
}

story! {
    async fn a_damaged_page_is_reported_with_its_place_and_the_backup_is_taken() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.run("CREATE TABLE t AS SELECT n, repeat('x', 100) FROM generate_series(1, 2000) n; CHECKPOINT").await;
        let path = ask(&original.session().await, "SELECT pg_relation_filepath('t')").await;
        let file = std::fs::File::options().write(true).open(original.primary().data_dir.join(&path)).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"rot", 3 * 8192 + 5000).unwrap();
        let taken = original.full().await;
        let damaged: Vec<_> = taken.damaged.iter().map(|damaged| (damaged.path.clone(), damaged.pages.clone())).collect();
        assert_eq!(damaged, [(path, vec![3])]);
    }
}

story! {
    async fn case_22_recovery_does_not_end_inside_the_backup() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        let taken = original.full().await;
        let copy = Copy::of(&original, "r").await;
        let inside = copy.wish(original.herd.path(), at(taken.manifest.start));
        let refused = copy.restore(&original, &taken.manifest, inside).await.unwrap_err();
        assert!(refused.to_string().contains("not consistent before"), "{refused}");
        let mut other = copy.wish(original.herd.path(), End::Latest);
        other.tablespaces.insert(77, "/nowhere".into());
        let refused = copy.restore(&original, &taken.manifest, other).await.unwrap_err();
        assert!(refused.to_string().contains("no tablespace 77"), "{refused}");
    }
}

/// Names of the backups that exist.
async fn committed(original: &Original) -> Vec<String> {
    let session = superuser(original.primary()).await;
    let system = ask(&session, "SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
    let all = outcomes(&original.repository, Place(system)).await.unwrap();
    all.into_iter()
        .filter(|(_, outcome)| matches!(outcome, Outcome::Committed(_)))
        .map(|(id, _)| id.to_string())
        .collect()
}
