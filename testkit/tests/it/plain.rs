//! Workloads and checkers on plain PostgreSQL: clean where it is sound, and not where it is broken on purpose.

use std::time::{Duration, Instant};

use pgherd_testkit::checker::{Holdings, Violation};
use pgherd_testkit::connection::Cause;
use pgherd_testkit::history::Outcome;
use pgherd_testkit::plain::Durability;
use pgherd_testkit::workload::{Writers, create_tables};
use pgherd_testkit::{History, Net, Plain, Plan, Verdict, Workload, alone, wait_until};

const SOON: Duration = Duration::from_secs(15);

fn cluster(net: &Net, durability: Durability) -> Plain {
    let mut cluster = Plain::start(net, &["a", "b", "c"], durability);
    create_tables(cluster.admin("a"));
    cluster
}

fn plan(cluster: &Plain) -> Plan {
    Plan::new(cluster.endpoints(), cluster.login())
}

fn verdict(cluster: &mut Plain, history: &History) -> Verdict {
    Verdict::of(history, &cluster.holdings())
}

/// Waits until so many more inserts are acknowledged.
fn more_writes(workload: &Workload, more: usize) {
    let target = workload.acknowledged() + more;
    wait_until("more writes", SOON, || {
        let now = workload.acknowledged();
        if now >= target { Ok(()) } else { Err(format!("{now} of {target} acknowledged")) }
    });
}

#[test]
fn a_scripted_failover_and_a_scripted_switchover_keep_every_promise() {
    let _alone = alone();
    let net = Net::new(&["a", "b", "c"]);
    let mut cluster = cluster(&net, Durability::AnyOne);
    let workload = Workload::start(net.client(), plan(&cluster));
    more_writes(&workload, 200);

    let killed_at = cluster.kill_primary();
    cluster.fail_over();
    workload.wait_for_writes(SOON);
    assert_ne!(cluster.primary(), "a");
    cluster.rejoin("a");
    cluster.wait_until_whole();
    more_writes(&workload, 200);

    let second = cluster.primary().to_owned();
    cluster.switch_over();
    workload.wait_for_writes(SOON);
    assert_ne!(cluster.primary(), second);
    cluster.rejoin(&second);
    cluster.wait_until_whole();
    more_writes(&workload, 200);

    let history = workload.stop();
    let verdict = verdict(&mut cluster, &history);
    verdict.assert_clean();
    assert!(verdict.primary_reads > 0, "{verdict}");
    let timelines: std::collections::BTreeSet<_> =
        history.acknowledged().map(|insert| insert.timeline).collect();
    assert_eq!(timelines, [Some(1), Some(2), Some(3)].into(), "each promotion starts a timeline");
    let gap = history.write_gap(killed_at).expect("writes came back");
    assert!(gap < SOON, "{gap:?}");
}

#[test]
fn a_commit_that_may_be_on_the_primary_alone_is_unknown() {
    let _alone = alone();
    let net = Net::new(&["a", "b", "c"]);
    let mut cluster = cluster(&net, Durability::AnyOne);
    net.isolate("b");
    net.isolate("c");
    // Longer than the patience of the client, so that it is the server that ends the wait.
    let long = Duration::from_secs(60);
    let one_writer =
        Plan { writers: Writers::Roaming(1), register: false, statement_deadline: long, ..plan(&cluster) };
    let workload =
        Workload::start(net.client(), Plan { endpoints: one_writer.endpoints[..1].to_vec(), ..one_writer });
    wait_until("the insert to be cancelled while it waits", SOON, || {
        let cancelled =
            "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        let count = cluster.admin("a").value(cancelled);
        if count.as_deref() == Some("1") { Ok(()) } else { Err(format!("{count:?} cancelled")) }
    });
    wait_until("the insert to end", SOON, || {
        let history = workload.history();
        let first = history.inserts.first().ok_or("it has not ended")?;
        assert_eq!(first.outcome, Outcome::Unknown(Cause::NotReplicated));
        Ok(())
    });
    net.heal();
    let history = workload.stop();
    let verdict = verdict(&mut cluster, &history);
    assert!(verdict.violations.is_empty(), "{verdict}");
    assert!(verdict.unknown_and_there >= 1, "the server did commit it: {verdict}");
}

#[test]
fn losses_of_an_asynchronous_cluster_are_found() {
    let _alone = alone();
    let net = Net::new(&["a", "b", "c"]);
    let mut cluster = cluster(&net, Durability::Async);
    let workload = Workload::start(net.client(), plan(&cluster));
    more_writes(&workload, 100);
    net.partition(&[&["a"], &["b", "c"]]);
    more_writes(&workload, 100);
    cluster.kill_primary();
    cluster.fail_over();
    net.heal();
    workload.wait_for_writes(SOON);
    cluster.rejoin("a");
    cluster.wait_until_whole();
    let verdict = verdict(&mut cluster, &workload.stop());
    let lost =
        verdict.violations.iter().filter(|violation| matches!(violation, Violation::Lost { .. })).count();
    // Each is missing on all three nodes.
    assert!(lost >= 300, "{lost} found\n{verdict}");
}

#[test]
fn two_primaries_are_found_by_their_writers_and_readers() {
    let _alone = alone();
    let net = Net::new(&["a", "b", "c"]);
    let mut cluster = cluster(&net, Durability::Async);
    let workload = Workload::start(net.client(), plan(&cluster));
    more_writes(&workload, 100);
    // Nobody stops a: the writers that stay with their nodes go on writing to both.
    cluster.fail_over();
    let promoted_at = Instant::now();
    wait_until("both to acknowledge", SOON, || {
        let history = workload.history();
        let recent = || history.acknowledged().filter(|insert| insert.asked_at > promoted_at);
        let nodes: std::collections::BTreeSet<_> = recent().map(|insert| insert.node.to_string()).collect();
        if nodes.len() == 2 && recent().count() > 100 { Ok(()) } else { Err(format!("{nodes:?}")) }
    });
    let history = workload.stop();
    // Judged by what the clients saw: with two primaries there is no saying what the nodes should hold.
    let nobody = Holdings { node: "nobody".to_owned(), rows: Vec::new(), register: None };
    let verdict = Verdict::of(&history, &[nobody]);
    let found = |wanted: fn(&Violation) -> bool| verdict.violations.iter().any(wanted);
    assert!(found(|violation| matches!(violation, Violation::OldTimelineGoesOn { .. })), "{verdict}");
    assert!(found(|violation| matches!(violation, Violation::StaleRead { .. })), "{verdict}");
}

#[test]
fn rows_written_behind_the_back_of_the_workload_are_found() {
    let _alone = alone();
    let net = Net::new(&["a", "b", "c"]);
    let mut cluster = cluster(&net, Durability::AnyOne);
    let workload = Workload::start(net.client(), plan(&cluster));
    more_writes(&workload, 50);
    let history = workload.stop();
    let admin = cluster.admin("a");
    admin.run("INSERT INTO writes VALUES (4000000000, 1)");
    admin.run("INSERT INTO writes SELECT * FROM writes WHERE number = 1 AND writer = 0");
    admin.run("DELETE FROM writes WHERE number = 2 AND writer = 1");
    let verdict = verdict(&mut cluster, &history);
    let mut kinds = verdict.violations.iter().map(|violation| match violation {
        Violation::NeverAsked { row: (4_000_000_000, 1), .. } => "phantom",
        Violation::Duplicated { row: (0, 1), times: 2, .. } => "duplicate",
        Violation::Lost { row: (1, 2), .. } => "loss",
        other => panic!("{other} was not planted"),
    });
    assert_eq!(kinds.clone().count(), 9, "three on each of three nodes\n{verdict}");
    assert!(["phantom", "duplicate", "loss"].iter().all(|kind| kinds.any(|found| found == *kind)));
}
