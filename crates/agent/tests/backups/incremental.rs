//! A backup that refers to its parent for what has not changed is the same as one that does not.

use std::collections::BTreeMap;

use pgherd_agent::backups::take::Order;
use pgherd_backup::hash::Hash;
use pgherd_backup::manifest::Manifest;
use pgherd_postgres::Instance;
use pgherd_postgres::restoring::End;

use crate::harness::{ask, story};
use crate::original::{Original, digest, order};
use crate::restored::{Copy, at};

story! {
    async fn case_21_an_incremental_is_page_by_page_what_a_full_of_the_same_position_is() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "5", "-q"]).await;
        original.run("ALTER SYSTEM SET autovacuum = off; SELECT pg_reload_conf()").await;
        original.run("CREATE TABLE t AS SELECT n, repeat('x', 100) AS x FROM generate_series(1, 30000) n").await;
        let mut parent = original.full().await;
        let full = parent.stored_bytes;
        for round in 0..3 {
            original.pgbench(&["-c", "2", "-t", "500"]).await;
            original.run("DELETE FROM t WHERE n > 10000; VACUUM t; CREATE TABLE IF NOT EXISTS u AS SELECT 1").await;
            original.run("CHECKPOINT").await;
            // Nothing goes on, but a server may still write a hint somewhere: then it is another position.
            let (mut before, mut tries) = (hashes(&original, &original.full().await.manifest).await, 0);
            let taken = loop {
                let taken = original.take(&order(Some(parent.manifest.id))).await.unwrap();
                let after = hashes(&original, &original.full().await.manifest).await;
                if before == after {
                    assert_eq!(hashes(&original, &taken.manifest).await, after);
                    break taken;
                }
                tries += 1;
                assert!(tries < 5, "something goes on");
                before = after;
            };
            eprintln!(
                "round {round}: read {}, kept {}, stored {}, the full {full}",
                taken.read_bytes, taken.kept_bytes, taken.stored_bytes
            );
            assert!(taken.kept_bytes > taken.read_bytes / 2);
            assert!(taken.stored_bytes < full, "{} and {full}", taken.stored_bytes);
            parent = taken;
        }
        let (wanted, end) = (original.digest().await, original.archive_everything().await);
        let archive = original.archive_as_files().await;
        let copy = Copy::of(&original, "r").await;
        copy.restore(&original, &parent.manifest, copy.wish(&archive, at(end))).await.unwrap();
        assert_eq!(digest(&copy.recover().await).await, wanted);
        copy.amcheck();
        copy.stop();
    }
}

story! {
    async fn case_18_checksums_are_switched_off_and_on_between_backups() {
        let original = Original::new(&[]).await;
        original.pgbench(&["-i", "-s", "2", "-q"]).await;
        let mut parent = {
            let _archiving = original.archiving();
            original.full().await
        };
        for mode in ["--disable", "--enable"] {
            control(original.primary(), &["-m", "fast", "stop"]);
            checksums(original.primary(), mode);
            start_as_primary(original.primary());
            let _archiving = original.archiving();
            original.run("UPDATE pgbench_accounts SET abalance = 1 WHERE aid < 1000; CHECKPOINT").await;
            parent = original.take(&order(Some(parent.manifest.id))).await.unwrap();
            assert!(parent.damaged.is_empty(), "{mode}: {:?}", parent.damaged);
            let full = original.full().await.manifest;
            assert_eq!(hashes(&original, &parent.manifest).await, hashes(&original, &full).await, "{mode}");
        }
        let archive = original.archive_as_files().await;
        let copy = Copy::of(&original, "r").await;
        copy.restore(&original, &parent.manifest, copy.wish(&archive, End::Immediate)).await.unwrap();
        copy.recover().await;
        copy.amcheck();
        copy.stop();
        checksums(&copy.instance, "--check");
        control(original.primary(), &["-m", "immediate", "stop"]);
    }
}

story! {
    // After a rewind or the restore of an older backup: pages with older positions, in files with older times.
    async fn case_20_a_file_that_went_back_to_what_it_was_is_found() {
        let original = Original::new(&[]).await;
        original.run("CREATE TABLE t AS SELECT n, repeat('x', 100) AS x FROM generate_series(1, 10000) n").await;
        let session = original.session().await;
        let path = ask(&session, "SELECT pg_relation_filepath('t')").await;
        drop(session);
        let file = original.primary().data_dir.join(&path);
        control(original.primary(), &["-m", "fast", "stop"]);
        let (content, modified) = (std::fs::read(&file).unwrap(), std::fs::metadata(&file).unwrap().modified().unwrap());
        start_as_primary(original.primary());
        let parent = {
            let _archiving = original.archiving();
            original.run("UPDATE t SET x = repeat('y', 100); VACUUM t; CHECKPOINT").await;
            original.full().await
        };
        control(original.primary(), &["-m", "fast", "stop"]);
        assert_ne!(std::fs::read(&file).unwrap(), content);
        std::fs::write(&file, &content).unwrap();
        std::fs::File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();

        start_as_primary(original.primary());
        let _archiving = original.archiving();
        let taken = original.take(&order(Some(parent.manifest.id))).await.unwrap();
        let found = hashes(&original, &taken.manifest).await;
        assert_eq!(found, hashes(&original, &original.full().await.manifest).await);
        assert_ne!(found[path.as_bytes()], hashes(&original, &parent.manifest).await[path.as_bytes()]);
        control(original.primary(), &["-m", "immediate", "stop"]);
    }
}

story! {
    async fn the_oldest_packs_are_written_anew_a_slice_at_a_time() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "2", "-q"]).await;
        let first = original.full().await.manifest.id;
        let mut parent = first;
        let mut rounds = 0;
        loop {
            rounds += 1;
            let slice = Order { refresh_bytes: 20_000_000, ..order(Some(parent)) };
            let taken = original.take(&slice).await.unwrap();
            parent = taken.manifest.id;
            if !taken.manifest.packs.contains_key(&first) {
                break;
            }
            assert!(taken.refreshed_bytes >= 20_000_000 && taken.refreshed_bytes < 30_000_000, "{taken:?}");
            assert!(rounds < 20, "nobody needs the first one after some time");
        }
        assert!(rounds > 2, "{rounds}");
    }
}

/// As an operator does it: the driver's starts are those of a member, which waits to be told that it leads.
pub(crate) fn control(instance: &Instance, command: &[&str]) {
    let status = std::process::Command::new(instance.installation.program("pg_ctl"))
        .args(["-D", instance.data_dir.to_str().unwrap(), "-w", "-l", "/dev/null"])
        .args(command)
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

pub(crate) fn start_as_primary(instance: &Instance) {
    // A clean stop leaves it behind.
    std::fs::remove_file(instance.standby_signal()).ok();
    control(instance, &["start"]);
}

/// Of a server that is stopped.
pub(crate) fn checksums(instance: &Instance, mode: &str) {
    let output = std::process::Command::new(instance.installation.program("pg_checksums"))
        .args([mode, "-D", instance.data_dir.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{mode}: {output:?}");
}

/// The hash of every file that is the same as long as nothing goes on.
async fn hashes(original: &Original, manifest: &Manifest) -> BTreeMap<Vec<u8>, Option<Hash>> {
    let mut entries = manifest.entries(&original.repository);
    let mut hashes = BTreeMap::new();
    while let Some(entry) = entries.next().await.unwrap() {
        hashes.insert(entry.path, entry.hash);
    }
    // It has the position of the backup's own checkpoint.
    assert!(hashes.remove(b"global/pg_control".as_slice()).is_some());
    hashes
}
