//! Records that are found in a server's WAL, held against those that `pg_waldump` finds.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use jiff::Timestamp;
use pgherd_backup::wal::Segments;
use pgherd_backup::wal::records::{Ended, Landmark, Records};
use pgherd_core::types::{Lsn, SystemId};

use crate::server::{Server, as_user, programs, sql};

const SEGMENT_BYTES: u32 = 16 << 20;

/// What `pg_waldump` says of the records: where each begins, and its description if it is one that we look at.
fn dumped(directory: &Path, first: &str, last: &str) -> BTreeMap<Lsn, String> {
    let output = Command::new(programs().join("pg_waldump"))
        .env("TZ", "UTC")
        .arg("-p")
        .arg(directory)
        .args([first, last])
        .output()
        .unwrap();
    let mut records = BTreeMap::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let (_, rest) = line.split_once("lsn: ").unwrap();
        let (lsn, rest) = rest.split_once(',').unwrap();
        let (_, description) = rest.split_once("desc: ").unwrap();
        let xid = line.split_once("tx:").unwrap().1.split(',').next().unwrap().trim();
        records.insert(lsn.parse().unwrap(), format!("{xid} {description}"));
    }
    assert!(!records.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    records
}

/// `COMMIT 2026-11-22 11:20:00.123456 UTC; …` as the time.
fn time_in(description: &str) -> Timestamp {
    let words: Vec<&str> = description.split_whitespace().collect();
    let at = words.iter().position(|word| word.len() == 10 && word.as_bytes()[4] == b'-').unwrap();
    format!("{}T{}Z", words[at], words[at + 1]).parse().unwrap()
}

#[test]
fn every_record_of_a_servers_wal_is_found_and_the_same_ends_as_pg_waldump_shows() {
    as_user(
        "records::every_record_of_a_servers_wal_is_found_and_the_same_ends_as_pg_waldump_shows",
        &[],
        || {
            let mut server = Server::start();
            server.kill_and_start("max_prepared_transactions = 4\nwal_compression = pglz\n");
            let first = sql(&server, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
            sql(
                &server,
                "CREATE TABLE account (id int PRIMARY KEY, balance bigint); CREATE TABLE going (id int)",
            );
            let file = sql(&server, "SELECT pg_relation_filepath('going')");
            for round in 0..40 {
                sql(
                    &server,
                    &format!(
                        "INSERT INTO account SELECT {round} * 1000 + g, g FROM generate_series(1, 1000) g"
                    ),
                );
            }
            // Records of more than a page, of more than is kept, and one that crosses segments.
            sql(&server, "SELECT pg_logical_emit_message(true, 'big', repeat('x', 300000))");
            sql(&server, "SELECT pg_logical_emit_message(true, 'bigger', repeat('y', 20000000))");
            sql(&server, "BEGIN; INSERT INTO account VALUES (-1, 1); ROLLBACK");
            sql(&server, "BEGIN; INSERT INTO account VALUES (-2, 1); PREPARE TRANSACTION 'one'");
            sql(&server, "BEGIN; INSERT INTO account VALUES (-3, 1); PREPARE TRANSACTION 'two'");
            sql(&server, "COMMIT PREPARED 'one'");
            sql(&server, "ROLLBACK PREPARED 'two'");
            sql(&server, "SELECT pg_create_restore_point('before the drop')");
            sql(&server, "DROP TABLE going");
            sql(&server, "SELECT pg_switch_wal()");
            sql(&server, "INSERT INTO account VALUES (-4, 1)");
            // A thousand savepoints, and as many dropped tables: ends of transactions with much behind their times.
            sql(
                &server,
                "DO $$ BEGIN FOR i IN 1..300 LOOP EXECUTE 'CREATE TABLE t' || i || '(id int)'; END LOOP; END $$",
            );
            sql(&server, "DO $$ BEGIN FOR i IN 1..300 LOOP EXECUTE 'DROP TABLE t' || i; END LOOP; END $$");
            sql(&server, "SELECT pg_create_restore_point('end')");
            // It flushes nothing, and what is read ends at what is flushed.
            sql(&server, "INSERT INTO account VALUES (-5, 1)");

            let directory = server.data_dir().join("pg_wal");
            let system: u64 =
                sql(&server, "SELECT system_identifier FROM pg_control_system()").parse().unwrap();
            let last = sql(&server, "SELECT pg_walfile_name(pg_current_wal_flush_lsn())");
            let flushed: Lsn = sql(&server, "SELECT pg_current_wal_flush_lsn()").parse().unwrap();
            let segments = Segments::new(SEGMENT_BYTES).unwrap();
            let (from, to) = (segments.parse(&first).unwrap(), segments.parse(&last).unwrap());
            assert!(to.number >= from.number + 2, "{first} to {last}: not enough segments");

            let mut records = Records::new(SystemId(system), segments, from.number);
            let mut found: BTreeMap<Lsn, Option<Landmark>> = BTreeMap::new();
            let mut ended = None;
            for number in from.number..=to.number {
                let name =
                    segments.file_name(pgherd_backup::wal::Segment { timeline: from.timeline, number });
                let content = std::fs::read(directory.join(name)).unwrap();
                ended = records.read(&content, |record| {
                    found.insert(record.start, record.landmark());
                });
                assert!(ended.is_none() || number == to.number, "{number}: {ended:?}");
            }
            // Whatever the server wrote since is behind what was flushed.
            let end = ended.expect("the last segment is not full").at();
            assert!(end >= flushed, "{end} is before {flushed}");

            let dumped = dumped(&directory, &first, &last);
            let [ours, theirs] = [&found.keys().collect::<Vec<_>>(), &dumped.keys().collect::<Vec<_>>()];
            let both = ours.len().min(theirs.len());
            assert_eq!(ours[..both], theirs[..both]);
            assert!(ours.len().abs_diff(theirs.len()) < 20, "{} of {} records", ours.len(), theirs.len());
            assert!(both > 40_000, "only {both} records");

            let mut seen = BTreeMap::new();
            for (lsn, description) in &dumped {
                let Some(landmark) = found.get(lsn) else { continue };
                let (xid, description) = description.split_once(' ').unwrap();
                let kind = description.split([' ', ':', ';']).next().unwrap();
                let prepared = description.split_once(" prepared").is_some();
                match (kind, landmark) {
                    ("COMMIT" | "COMMIT_PREPARED", Some(Landmark::Commit { xid: ours, at, dropped, .. })) => {
                        assert_eq!(*at, time_in(description), "{lsn} {description}");
                        if kind == "COMMIT" && !prepared {
                            assert_eq!(ours.to_string(), xid, "{lsn} {description}");
                        } else {
                            let theirs = description
                                .split_once("COMMIT_PREPARED ")
                                .map(|(_, rest)| rest.split(':').next());
                            assert_eq!(Some(Some(ours.to_string().as_str())), theirs, "{lsn} {description}");
                        }
                        let rels = description
                            .split_once("rels: ")
                            .map_or("", |(_, rest)| rest.split(';').next().unwrap());
                        assert_eq!(dropped.len(), rels.split_whitespace().count(), "{lsn} {description}");
                        if rels == file {
                            *seen.entry("dropped").or_insert(0) += 1;
                            let number = file.rsplit('/').next().unwrap();
                            assert_eq!(dropped[0].number.to_string(), number);
                        }
                        *seen
                            .entry(if kind == "COMMIT" { "commit" } else { "commit prepared" })
                            .or_insert(0) += 1;
                    }
                    ("ABORT" | "ABORT_PREPARED", Some(Landmark::Abort { at, .. })) => {
                        assert_eq!(*at, time_in(description), "{lsn} {description}");
                        *seen.entry(if kind == "ABORT" { "abort" } else { "abort prepared" }).or_insert(0) +=
                            1;
                    }
                    ("RESTORE_POINT", Some(Landmark::RestorePoint { name, .. })) => {
                        assert_eq!(description, format!("RESTORE_POINT {name}"));
                        *seen.entry("restore point").or_insert(0) += 1;
                    }
                    ("COMMIT" | "COMMIT_PREPARED" | "ABORT" | "ABORT_PREPARED" | "RESTORE_POINT", other) => {
                        panic!("{lsn} {description}: {other:?}")
                    }
                    (_, landmark) => assert_eq!(*landmark, None, "{lsn} {description}"),
                }
            }
            assert!(seen["commit"] > 45, "{seen:?}");
            for once in ["commit prepared", "abort", "abort prepared", "dropped"] {
                assert!(seen.get(once).is_some_and(|count| *count >= 1), "{once}: {seen:?}");
            }
            assert_eq!(seen["restore point"], 2, "{seen:?}");
            assert!(matches!(records.end(), Ended::Here(_)), "{:?}", records.end());
        },
    );
}
