//! The whole herd goes back to a moment: one node is held there while the others go on, and then it leads.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;

use crate::backed_up::backup;
use crate::herd::{Herd, kill, wait_for};
use crate::repository::{said, story};

fn restore(herd: &Herd) -> Result<Value, String> {
    Ok(herd.status()?["clusters"][0]["restore"].clone())
}

/// A failover, and everything whole behind it.
fn fail_over(herd: &Herd) {
    let former = herd.primary().unwrap();
    kill(herd.postmaster(&former).unwrap(), Signal::KILL).unwrap();
    wait_for("another primary", || match herd.primary()? {
        primary if primary == former => Err(primary),
        _ => Ok(()),
    });
}

/// The restore's arguments with this target.
fn back<'a>(xid: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["restore", "--cluster", "main", "--target-xid", xid];
    arguments.extend(more);
    arguments
}

#[test]
fn as_root_a_whole_herd_goes_back_to_a_moment() {
    story("restore_cluster::as_root_a_whole_herd_goes_back_to_a_moment", || {
        let herd = Herd::new();
        herd.up();
        herd.wait_whole();
        wait_for("something that can be restored", || {
            let backup = backup(&herd)?;
            if backup["recovery_window"].is_null() { Err(backup.to_string()) } else { Ok(()) }
        });
        herd.sql("create table kept (n int primary key)").unwrap();
        herd.run(&["backup", "create"]);
        herd.sql("insert into kept select generate_series(1, 1000)").unwrap();
        fail_over(&herd);
        herd.wait_whole();
        // The moment: everything up to here, and nothing of what comes.
        let xid =
            herd.sql("insert into kept values (1001) returning pg_current_xact_id()::text::bigint").unwrap();
        herd.sql("delete from kept where n > 10").unwrap();
        herd.sql("create table later (n int)").unwrap();
        // Its segment is to be found in the file of the next timeline.
        fail_over(&herd);
        herd.wait_whole();
        herd.sql("insert into later values (1)").unwrap();
        let primary = herd.primary().unwrap();
        let dry = wait_for("the moment to be archived", || {
            let output = herd.output(&back(&xid, &["--dry-run", "--json"]));
            match output.status.success() {
                true => serde_json::from_slice::<Value>(&output.stdout).map_err(|error| error.to_string()),
                false => Err(said(&output)),
            }
        });
        assert_eq!(dry["end"]["last"]["xid"].to_string(), xid, "{dry}");
        assert!(dry["lost_wal_bytes"].as_u64().is_some_and(|lost| lost > 0), "{dry}");
        assert_eq!(restore(&herd).unwrap(), Value::Null, "a plan does nothing");

        // What cannot be is refused, with a way on.
        let refused = herd.output(&back(&xid, &["--to", &primary, "--yes"]));
        assert!(!refused.status.success());
        assert!(said(&refused).contains("is the primary"), "{}", said(&refused));
        let nobody = herd.output(&["restore", "--cluster", "main", "--lead", "--yes"]);
        assert!(said(&nobody).contains("no node of cluster main is held"), "{}", said(&nobody));

        // One node goes there, and the others go on.
        let told = herd.run(&back(&xid, &["--hold", "--yes"]));
        let held = restore(&herd).unwrap();
        assert_eq!((held["held"].as_bool(), &held["end_lsn"]), (Some(true), &dry["end"]["lsn"]), "{told}");
        let node = held["node"].as_str().unwrap().to_owned();
        assert_ne!(node, primary);
        herd.sql("insert into later values (2)").unwrap();

        // It stays there: without its agent, without its server, and when another one has to lead.
        kill(herd.agent(&node).unwrap(), Signal::KILL).unwrap();
        kill(herd.postmaster(&node).unwrap(), Signal::KILL).unwrap();
        fail_over(&herd);
        herd.sql("insert into later values (3)").unwrap();
        assert_ne!(herd.primary().unwrap(), node, "an ordinary election does not choose it");
        wait_for("it to be held again", || {
            let explained = herd.run(&["explain"]);
            let held = explained.contains("neither follows nor votes");
            if held { Ok(()) } else { Err(explained) }
        });
        assert_eq!(restore(&herd).unwrap()["held"], true);
        wait_for("the two others to be whole", || {
            let status = herd.status()?;
            let voters = status["clusters"][0]["durability"]["voters"].clone();
            let other =
                voters.as_array().is_some_and(|voters| voters.len() == 1 && voters[0] != node.as_str());
            if other { Ok(()) } else { Err(status.to_string()) }
        });

        // A session through the proxy, from before to after.
        let mut psql = herd.command(&["psql", "--", "--no-psqlrc", "-qAt"]);
        let mut psql = psql.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut answers = BufReader::new(psql.stdout.take().unwrap()).lines();
        let mut asks = psql.stdin.take().unwrap();
        let mut ask = |statement: &str| {
            writeln!(asks, "{statement};").unwrap();
            asks.flush().unwrap();
            answers.next().expect("the session goes on").unwrap()
        };
        assert_eq!(ask("select count(*) from later"), "3");

        herd.run(&["restore", "--cluster", "main", "--lead", "--yes"]);
        assert_eq!(herd.primary().unwrap(), node);
        assert_eq!(ask("select count(*), max(n) from kept"), "1001|1001", "all up to the moment");
        assert_eq!(ask("select to_regclass('later') is null"), "t", "and nothing behind it");
        drop(asks);
        psql.wait().unwrap();
        herd.sql("insert into kept values (-1)").unwrap();
        let status = herd.wait_whole();
        assert_eq!(status["clusters"][0]["restore"], Value::Null);
        assert!(herd.run(&["history"]).contains("gave up what came behind"));

        // The line goes on, and is archived: the present can be had back, too.
        wait_for("the new line to be archived", || {
            let backup = backup(&herd)?;
            let close = backup["wal_lag_seconds"].as_f64().is_some_and(|lag| lag < 5.0);
            if close && backup["trouble"].is_null() { Ok(()) } else { Err(backup.to_string()) }
        });
        herd.run(&["backup", "create"]);

        // Another one is begun, at the end of what is archived, and given up.
        herd.sql("insert into kept values (-2)").unwrap();
        let held = herd.run(&["restore", "--cluster", "main", "--hold", "--yes", "--json"]);
        assert!(held.contains("\"node\""), "{held}");
        assert!(herd.run(&["status"]).contains("--let-go gives it up"));
        herd.run(&["restore", "--cluster", "main", "--let-go"]);
        herd.wait_whole();
        assert_eq!(herd.sql("select count(*) from kept").unwrap(), "1003");
        herd.run(&["down", "--delete", "--yes"]);
    });
}
