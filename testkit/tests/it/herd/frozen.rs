//! Processes that live and do nothing.

use super::*;

/// Shorter than the default, so that a story does not wait for most of its time; the protocol is the same.
const GRACE: &str = r#"agent_grace = "4s""#;
const GRACE_S: u64 = 4;

#[test]
fn b25_a_primarys_agent_that_is_frozen_for_longer_than_its_grace_is_fenced_and_handed_over() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_time(GRACE).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let postmaster = herd.postmaster("a");
    let agent = herd.agent("a");
    let frozen_at = Instant::now();
    agent.freeze();
    postmaster.wait_gone(Duration::from_secs(GRACE_S) * SLACK);
    let history = workload.history();
    let last = history.acknowledged().map(|insert| insert.ended_at).max().expect("writes flowed before");
    let served = last.saturating_duration_since(frozen_at);
    assert!(served >= Duration::from_secs(GRACE_S - 1), "clients were served for {served:?} of the grace");
    let after = fails_over(&herd, &workload, &before, frozen_at, AT_ONCE);
    assert_ne!(primary(&after), Some("a"));
    agent.thaw();
    herd.wait_until_whole(WHOLE);
    assert_eq!(elections(&herd, "fenced"), 1, "the fence's word closes the term, nobody's silence does");
    all_is_well(&herd, workload);
}

#[test]
fn with_the_fence_gone_as_well_the_silence_of_the_agent_alone_hands_over() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_time(GRACE).start();
    // Nobody is left on the host who could stop its PostgreSQL. It acknowledges nothing more, but whoever asks it
    // by its own address may read what was; it is the port of the proxy that never leads there.
    let before = herd.status().unwrap();
    let workload = herd.start_workload_with(pgherd_testkit::Plan { register: false, ..herd.plan() });
    let agent = herd.agent("a");
    let frozen_at = Instant::now();
    agent.freeze();
    herd.fence("a").kill();
    let after = fails_over(&herd, &workload, &before, frozen_at, Duration::from_millis(4_500));
    assert_ne!(primary(&after), Some("a"));
    agent.thaw();
    herd.wait_until_whole(WHOLE);
    assert_eq!(elections(&herd, "agent-silent"), 1, "nothing else could close the term");
    all_is_well(&herd, workload);
}

#[test]
fn b26_a_frozen_postmaster_is_handed_over_while_its_sessions_still_answer() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let frozen_at = Instant::now();
    herd.postmaster("a").freeze();
    let after = fails_over(&herd, &workload, &before, frozen_at, Duration::from_secs(10));
    assert_ne!(primary(&after), Some("a"));
    herd.wait_until_whole(WHOLE);
    let history = herd.history_from(&herd.primary()).unwrap();
    let codes: Vec<&str> = history.iter().map(|entry| entry.reason_code.as_str()).collect();
    for code in ["barred", "election-damage", "unbarred"] {
        assert!(codes.contains(&code), "{code} is not among {codes:?}");
    }
    all_is_well(&herd, workload);
}
