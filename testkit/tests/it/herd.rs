//! Stories of whole herds. Those with a number replay that scenario of the black-box list.

use std::time::{Duration, Instant};

use pgherd_testkit::herd::{POSTGRES_PORT, Status};
use pgherd_testkit::{Herd, Verdict, Workload, alone};

/// A failover that needs nobody's silence to be waited for, on a machine that may be busy.
const AT_ONCE: Duration = Duration::from_secs(10);
/// One that has to wait for silence.
const AFTER_SILENCE: Duration = Duration::from_secs(30);
/// Back to full redundancy, with a rewind or a clone of a small database.
const WHOLE: Duration = Duration::from_secs(120);

/// The store takes a member in before that member's agent listens.
const JOINING: &str = "no connection to";

fn term(status: &Status) -> u64 {
    status.cluster().term.expect("a herd that is whole has had a primary")
}

/// The end of most stories: writes flow, the herd is whole, and nothing was lost.
#[track_caller]
fn all_is_well(herd: &Herd, workload: Workload) -> Verdict {
    workload.wait_for_writes(AFTER_SILENCE);
    herd.wait_until_whole(WHOLE);
    let verdict = herd.verdict(&workload.stop());
    verdict.assert_clean();
    verdict
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b01_three_nodes_come_up_by_themselves_and_take_writes() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let status = herd.status().unwrap();
    assert_eq!(status.cluster().primary.as_deref(), Some("a"), "the node that was initialized first");
    assert_eq!(status.store.members.iter().filter(|member| member.voter).count(), 3);
    let workload = herd.start_workload();
    all_is_well(&herd, workload);
    herd.assert_quiet(&[JOINING]);
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b03_a_killed_postmaster_means_failover_at_once() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let killed_at = herd.kill_postmaster("a");
    workload.wait_for_writes(AT_ONCE);
    let after = herd.wait_until_whole(WHOLE);
    assert_ne!(after.cluster().primary.as_deref(), Some("a"));
    assert_eq!(term(&after), term(&before) + 1, "one cause, one election");
    let gap = workload.history().write_gap(killed_at).expect("writes came back");
    assert!(gap < AT_ONCE, "{gap:?}");
    all_is_well(&herd, workload);
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b05_a_killed_agent_that_comes_back_adopts_its_postgresql() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let postmaster = herd.postmaster("a");
    let workload = herd.start_workload();
    herd.agent("a").kill();
    herd.start_agent("a");
    workload.wait_for_writes(AT_ONCE);
    let after = herd.wait_until_whole(WHOLE);
    assert!(postmaster.is_alive(), "PostgreSQL was restarted");
    assert_eq!((term(&after), &after.cluster().primary), (term(&before), &before.cluster().primary));
    all_is_well(&herd, workload);
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b06_the_primarys_host_loses_power() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    herd.crash("a");
    workload.wait_for_writes(AFTER_SILENCE);
    assert_ne!(herd.primary(), "a");
    herd.power_on("a");
    all_is_well(&herd, workload);
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b10_a_planned_switchover_under_load_loses_nothing() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    herd.switch_over(Some("b"));
    assert_eq!(herd.primary(), "b");
    workload.wait_for_writes(AT_ONCE);
    herd.wait_until_whole(WHOLE);
    herd.switch_over(None);
    assert_ne!(herd.primary(), "b");
    all_is_well(&herd, workload);
    herd.assert_quiet(&[JOINING]);
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b13_every_node_has_been_primary() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    for next in ["b", "c", "a"] {
        herd.kill_postmaster(&herd.primary());
        workload.wait_for_writes(AT_ONCE);
        herd.wait_until_whole(WHOLE);
        if herd.primary() != next {
            herd.switch_over(Some(next));
            herd.wait_until_whole(WHOLE);
        }
        assert_eq!(herd.primary(), next);
    }
    all_is_well(&herd, workload);
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b17_all_hosts_lose_power_and_come_back_in_any_order() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    for host in ["a", "b", "c"] {
        herd.crash(host);
    }
    for host in ["c", "a", "b"] {
        herd.power_on(host);
    }
    all_is_well(&herd, workload);
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b18_a_primary_alone_stops_serving_before_the_majority_goes_on() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    // Clients still reach it: those with open sessions as well.
    herd.net().partition(&[&["a"], &["b", "c"]]);
    herd.wait_for("the majority to have a primary of its own", AFTER_SILENCE, |_| {
        let status = herd.status_from("b")?;
        match status.cluster().primary.as_deref() {
            Some("a") | None => Err(format!("{status}")),
            Some(_) => Ok(()),
        }
    });
    workload.wait_for_writes(AFTER_SILENCE);
    herd.net().heal();
    // The register's readers are the ones that would have seen a stale value.
    let verdict = all_is_well(&herd, workload);
    assert!(verdict.primary_reads > 0, "{verdict}");
}

#[test]
#[ignore = "takes minutes and a machine of its own: make test-full"]
fn b21_without_replication_commits_wait_and_nobody_is_promoted() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    for standby in ["b", "c"] {
        herd.net().cut_port("a", standby, POSTGRES_PORT);
    }
    let cut_at = Instant::now();
    // sleep: longer than any time limit after which somebody might be promoted.
    std::thread::sleep(Duration::from_secs(15));
    let history = workload.history();
    let unreplicated = history.acknowledged().filter(|insert| insert.asked_at > cut_at).count();
    assert_eq!(unreplicated, 0, "writes were acknowledged that no standby can have");
    let during = herd.status().unwrap();
    assert_eq!((term(&during), &during.cluster().primary), (term(&before), &before.cluster().primary));
    herd.net().heal();
    all_is_well(&herd, workload);
}
