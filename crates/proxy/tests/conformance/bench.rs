//! pgbench through the proxy: no transaction fails, and none is lost or done twice.

use std::fs;
use std::time::Duration;

use pgherd_proxy::PoolMode;
use tempfile::TempDir;

use crate::harness::{Stand, finish, story};
use crate::server::programs;

const SOON: Duration = Duration::from_secs(120);
const CLIENTS: u32 = 8;

/// pgbench's own transaction, in one go.
const PIPELINE: &str = r"
\set aid random(1, 100000)
\set tid random(1, 10)
\set delta random(-5000, 5000)
\startpipeline
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = 1;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, 1, :aid, :delta, now());
END;
\endpipeline
";

/// The same where one of two that meet has to begin again. What it knows of the other one it reads from the server.
const SERIALIZABLE: &str = r"
\set aid random(1, 100000)
\set delta random(-5000, 5000)
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT tid FROM pgbench_tellers ORDER BY tbalance, tid LIMIT 1 \gset
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = 1;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, 1, :aid, :delta, now());
END;
";

story! {
    fn pgbench_loses_no_transaction_with_session_pooling() {
        loses_none(PoolMode::Session);
    }
}

story! {
    fn pgbench_loses_no_transaction_with_transaction_pooling() {
        loses_none(PoolMode::Transaction);
    }
}

fn loses_none(mode: PoolMode) {
    let stand = Stand::new(Some(mode));
    let dir = TempDir::new().unwrap();
    let [pipeline, serializable] =
        [("pipeline", PIPELINE), ("serializable", SERIALIZABLE)].map(|(name, text)| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        });
    pgbench(&stand, &["-i", "-s", "1", "-q"]);
    let mut done = 0;
    let mut run = |each: u32, arguments: &[&str]| {
        done += each * CLIENTS;
        let count = each.to_string();
        let clients = CLIENTS.to_string();
        let said = pgbench(&stand, &[&["-n", "-c", &clients, "-j", "2", "-t", &count], arguments].concat());
        let all = each * CLIENTS;
        let processed = format!("number of transactions actually processed: {all}/{all}");
        assert!(said.contains(&processed), "{arguments:?}: {said}");
        assert!(said.contains("number of failed transactions: 0 (0.000%)"), "{arguments:?}: {said}");
        assert_consistent(&stand, done, arguments);
    };
    for protocol in ["simple", "extended", "prepared"] {
        run(200, &["-M", protocol]);
        run(10, &["-M", protocol, "-C"]);
        run(50, &["-M", protocol, "-f", &serializable, "--max-tries", "1000"]);
    }
    for protocol in ["extended", "prepared"] {
        run(200, &["-M", protocol, "-f", &pipeline]);
        run(10, &["-M", protocol, "-f", &pipeline, "-C"]);
    }
}

fn pgbench(stand: &Stand, arguments: &[&str]) -> String {
    let mut command = stand.command(programs().join("pgbench"));
    let ended = finish(command.args(arguments).arg("postgres"), SOON);
    let said = ended.stdout + &ended.stderr;
    assert!(ended.status.success(), "{arguments:?}: {}\n{said}", ended.status);
    said
}

/// Each transaction is in the history once, and each change of it in all three balances.
fn assert_consistent(stand: &Stand, transactions: u32, arguments: &[&str]) {
    let sums = stand.psql(
        "SELECT count(*), sum(delta), (SELECT sum(abalance) FROM pgbench_accounts),\
         (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(bbalance) FROM pgbench_branches)\
         FROM pgbench_history",
    );
    let sums: Vec<i64> = sums.split('|').map(|number| number.parse().unwrap()).collect();
    let [count, deltas, balances @ ..] = &sums[..] else { panic!("{sums:?}") };
    assert_eq!(*count, i64::from(transactions), "{arguments:?}");
    assert!(balances.iter().all(|balance| balance == deltas), "{arguments:?}: {sums:?}");
}
