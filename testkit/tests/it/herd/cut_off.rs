//! Links that are cut while everybody lives.

use super::*;

/// Waits until b and c have a primary of their own. The command line on a would go on asking a.
#[track_caller]
fn majority_leads(herd: &Herd, before: &Status) {
    agent_says(herd, "b", "the majority to have a primary of its own", |status| {
        let open = status.cluster().gate == "open";
        open && term(status) > term(before) && !matches!(primary(status), Some("a") | None)
    });
}

#[test]
fn a_primarys_host_that_nobody_hears_is_replaced() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let cut_at = Instant::now();
    herd.net().isolate("a");
    majority_leads(&herd, &before);
    writes_go_on(&workload, cut_at, AFTER_SILENCE);
    herd.net().heal();
    let verdict = all_is_well(&herd, workload);
    assert!(verdict.primary_reads > 0, "{verdict}");
}

#[test]
fn b18_a_primary_alone_stops_serving_before_the_majority_goes_on() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    // Clients still reach it: those with open sessions as well.
    let cut_at = Instant::now();
    herd.net().partition(&[&["a"], &["b", "c"]]);
    majority_leads(&herd, &before);
    writes_go_on(&workload, cut_at, AFTER_SILENCE);
    herd.net().heal();
    // The register's readers are the ones that would have seen a stale value.
    let verdict = all_is_well(&herd, workload);
    assert!(verdict.primary_reads > 0, "{verdict}");
}

#[test]
fn b21_without_replication_commits_wait_and_nobody_is_promoted() {
    let _alone = alone();
    // Every time limit after which somebody might be promoted is shorter than the story.
    let herd = Herd::of(&["a", "b", "c"]).with_time(r#"agent_grace = "4s""#).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    for standby in ["b", "c"] {
        herd.net().cut_port("a", standby, POSTGRES_PORT);
    }
    let cut_at = Instant::now();
    // sleep: longer than `agent_grace`, and than the time after which a lost voter loses its vote.
    std::thread::sleep(Duration::from_secs(8));
    assert_eq!(acknowledged_after(&workload, cut_at), 0, "writes were acknowledged that no standby can have");
    let during = herd.status().unwrap();
    assert_eq!((term(&during), primary(&during)), (term(&before), primary(&before)));
    herd.net().heal();
    let after = herd.wait_until_whole(WHOLE);
    assert_eq!((term(&after), primary(&after)), (term(&before), primary(&before)));
    all_is_well(&herd, workload);
}
