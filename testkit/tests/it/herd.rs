//! Stories of whole herds: each row of the fault table, on hosts of their own, under writers that keep book.
//!
//! The setting is always the same. Eight writers that look for the primary, and one that never leaves its node,
//! write into a table without a key; a register is counted up and read wherever a server says that it is a
//! primary. A fault comes, and at the end the herd has to be whole again by itself and every promise kept: each
//! acknowledged row on every node, once; no two nodes that acknowledge in one term; no stale read.
//!
//! Terms are told apart by PostgreSQL's timelines, which is stricter: every reign begins with a promotion, hence
//! a timeline of its own, and a primary that is confirmed in office goes on with both its node and its timeline.
//!
//! Stories whose name begins with a number replay that scenario of the black-box list.

mod commits;
mod cut_off;
mod frozen;
mod kept;
mod killed;
mod lost;
mod planned;
mod readers;
mod vip;

use std::time::{Duration, Instant};

use pgherd_testkit::herd::{POSTGRES_PORT, Status};
use pgherd_testkit::{Herd, Verdict, Workload, alone};

/// The bounds of the fault table are those of a quiet machine with two cores. This one also runs the clients,
/// the checks and three hosts, so each may take as many times its bound.
const SLACK: u32 = 3;
/// Nobody's silence has to be waited for: a dead server, a clean stop.
const AT_ONCE: Duration = Duration::from_secs(1);
/// A host without a word: `suspect`, the votes, the lease of reads.
const AFTER_SILENCE: Duration = Duration::from_millis(4_700);
/// Back to full redundancy, with a rewind or a clone of a small database.
const WHOLE: Duration = Duration::from_secs(60);
/// A state that only has to show: a vote is taken away, a node is barred.
const SOON: Duration = Duration::from_secs(30);

/// The store takes a member in before that member's agent listens.
const JOINING: &str = "no connection to";

fn term(status: &Status) -> u64 {
    status.cluster().term.expect("a herd that is whole has had a primary")
}

fn primary(status: &Status) -> Option<&str> {
    status.cluster().primary.as_deref()
}

/// Waits until a term after that of `before` serves clients, and judges how long nothing was written.
#[track_caller]
fn fails_over(herd: &Herd, workload: &Workload, before: &Status, fault: Instant, bound: Duration) -> Status {
    // Sessions of a server that has died may answer for another moment, so writes alone would prove nothing.
    let after = herd.wait_for("the next term to serve clients", bound * SLACK + SOON, |status| {
        let open = status.cluster().gate == "open" && status.cluster().primary.is_some();
        if term(status) > term(before) && open { Ok(()) } else { Err("not yet".to_owned()) }
    });
    writes_go_on(workload, fault, bound);
    after
}

/// Waits until writes are acknowledged, and judges for how long none were since the fault.
#[track_caller]
fn writes_go_on(workload: &Workload, fault: Instant, bound: Duration) {
    // Time enough to say by how much it was missed.
    workload.wait_for_writes(bound * SLACK + SOON);
    let gap = workload.history().write_gap(fault).expect("writes came back");
    assert!(gap <= bound * SLACK, "no write was acknowledged for {gap:.1?}; {bound:?} is promised");
}

/// The end of every story: writes flow, the herd is whole, and no promise was broken.
#[track_caller]
fn all_is_well(herd: &Herd, workload: Workload) -> Verdict {
    workload.wait_for_writes(SOON);
    herd.wait_until_whole(WHOLE);
    let verdict = herd.verdict(&workload.stop());
    verdict.assert_clean();
    verdict
}

/// Waits until one agent tells something that satisfies `met`.
#[track_caller]
fn agent_says(herd: &Herd, agent: &str, what: &str, met: impl Fn(&Status) -> bool) -> Status {
    pgherd_testkit::wait_until(what, SOON, || {
        let status = herd.status_from(agent)?;
        if met(&status) { Ok(status) } else { Err(status.to_string()) }
    })
}

/// How often each election was opened, by the code of its cause.
#[track_caller]
fn elections(herd: &Herd, cause: &str) -> usize {
    let history = herd.history_from(&herd.primary()).expect("the primary's agent answers");
    history.iter().filter(|entry| entry.reason_code == format!("election-{cause}")).count()
}

/// Commits under way at the moment of a cut may still be acknowledged by what had left before.
fn acknowledged_after(workload: &Workload, moment: Instant) -> usize {
    workload.history().acknowledged().filter(|insert| insert.asked_at > moment).count()
}

#[test]
fn b01_three_nodes_come_up_by_themselves_and_take_writes() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let status = herd.status().unwrap();
    assert_eq!(primary(&status), Some("a"), "the node that was initialized first");
    assert_eq!(status.store.members.iter().filter(|member| member.voter).count(), 3);
    let workload = herd.start_workload();
    all_is_well(&herd, workload);
    herd.assert_quiet(&[JOINING]);
}
