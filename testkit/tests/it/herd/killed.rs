//! Processes that are killed while their host goes on.

use std::net::SocketAddr;

use pgherd_testkit::connection::Login;
use pgherd_testkit::handover::{self, Account, Clients, Step};
use pgherd_testkit::herd::PROXY_READ_PORT;

use super::*;

#[test]
fn b03_a_killed_postmaster_means_failover_at_once() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let killed_at = herd.kill_postmaster("a");
    fails_over(&herd, &workload, &before, killed_at, AT_ONCE);
    let after = herd.wait_until_whole(WHOLE);
    assert_ne!(primary(&after), Some("a"));
    assert_eq!(term(&after), term(&before) + 1, "one cause, one election");
    all_is_well(&herd, workload);
}

/// PostgreSQL takes the death of either for a crash of everything, and would come back as a primary by itself.
#[test]
fn a_killed_backend_and_a_killed_checkpointer_mean_failover_at_once() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    for title in ["app app", "checkpointer"] {
        let (old, before) = (herd.primary(), herd.status().unwrap());
        let killed_at = Instant::now();
        herd.postgres_process(&old, title).kill();
        fails_over(&herd, &workload, &before, killed_at, AT_ONCE);
        let after = herd.wait_until_whole(WHOLE);
        assert_ne!(primary(&after), Some(old.as_str()), "after the death of {title}");
        assert_eq!(term(&after), term(&before) + 1, "one cause, one election");
    }
    all_is_well(&herd, workload);
}

#[test]
fn without_a_voter_a_killed_postmaster_leads_again_in_place_and_nobody_is_let_in_before_one_is_back() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b"]).with_witness("w").start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    herd.crash("b");
    let killed_at = herd.kill_postmaster("a");
    let what = "a to lead again with its gate closed";
    let during = agent_says(&herd, "a", what, |status| {
        let member = status.cluster().member("a").expect("a is in the file");
        term(status) > term(&before) && member.role == "primary" && member.state == "running"
    });
    assert_eq!(during.cluster().gate, "closed", "its first WAL is on no other node");
    assert!(
        during.cluster().member("a").unwrap().timeline > before.cluster().member("a").unwrap().timeline,
        "a reign that does not begin with a timeline of its own cannot be told from the last: {during}"
    );
    assert_eq!(acknowledged_after(&workload, killed_at), 0, "no voter can have these");
    herd.power_on("b");
    let after = herd.wait_until_whole(WHOLE);
    assert_eq!(primary(&after), Some("a"));
    all_is_well(&herd, workload);
}

#[test]
fn b05_a_killed_agent_that_comes_back_adopts_its_postgresql() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let postmaster = herd.postmaster("a");
    // An idle stream of WAL is as silent as a dead one: first without a client, then with all of them.
    away(&herd);
    let workload = herd.start_workload();
    let killed_at = Instant::now();
    away(&herd);
    let after = herd.wait_until_whole(WHOLE);
    assert!(postmaster.is_alive(), "PostgreSQL was restarted");
    assert_eq!((term(&after), primary(&after)), (term(&before), primary(&before)));
    // An adopted server is not only alive, it is led: a list or a gate that is set anew holds commits up.
    writes_go_on(&workload, killed_at, Duration::from_millis(300));
    all_is_well(&herd, workload);
}

/// The primary's agent is killed, and comes back within its grace.
fn away(herd: &Herd) {
    herd.agent("a").kill();
    // sleep: longer than `suspect`, so that only the answers of its PostgreSQL speak for the primary.
    std::thread::sleep(Duration::from_secs(4));
    herd.start_agent("a");
    herd.wait_until_whole(WHOLE);
}

#[test]
fn everything_killed_on_the_primarys_node_means_failover_and_its_agent_brings_it_back() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let killed_at = Instant::now();
    herd.kill_everything("a");
    let after = fails_over(&herd, &workload, &before, killed_at, AFTER_SILENCE);
    assert_ne!(primary(&after), Some("a"));
    herd.start_agent("a");
    all_is_well(&herd, workload);
}

#[test]
fn everything_killed_on_a_standbys_node_costs_its_vote_and_no_write_is_lost() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let killed_at = Instant::now();
    herd.kill_everything("b");
    agent_says(&herd, "a", "b to lose its vote", |status| status.cluster().durability.voters == ["c"]);
    writes_go_on(&workload, killed_at, Duration::from_secs(3));
    herd.start_agent("b");
    let after = herd.wait_until_whole(WHOLE);
    assert_eq!((term(&after), primary(&after)), (term(&before), primary(&before)));
    all_is_well(&herd, workload);
}

#[test]
fn b13_every_node_has_been_primary() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    for next in ["b", "c", "a"] {
        let before = herd.status().unwrap();
        let killed_at = herd.kill_postmaster(&herd.primary());
        fails_over(&herd, &workload, &before, killed_at, AT_ONCE);
        herd.wait_until_whole(WHOLE);
        if herd.primary() != next {
            herd.switch_over(Some(next));
            herd.wait_until_whole(WHOLE);
        }
        assert_eq!(herd.primary(), next);
    }
    all_is_well(&herd, workload);
}

/// Clients of a proxy, while no agent is there to say who may be written to: it is the fence that stops the primary.
#[test]
fn with_every_agent_killed_reads_go_on_and_writes_wait_until_agents_are_back() {
    /// Longer than the fence lets a primary be without its agent, shorter than `hold`.
    const AWAY: Duration = Duration::from_secs(15);
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let (_proxy, address) = herd.start_proxy("front");
    handover::create_table(&mut herd.session("a"));
    let reader = Login { user: "reader".to_owned(), ..herd.login() };
    herd.ask_locally("a", &format!("CREATE ROLE reader LOGIN PASSWORD '{}'", reader.password)).unwrap();
    let client = herd.net().client();
    let writers = Clients::start(client, address, herd.login(), 20, Some(100.0), 0);
    // As another user: nobody reads what may lack what he has just written, and what that is no agent says.
    let to_standbys = SocketAddr::new(address.ip(), PROXY_READ_PORT);
    let readers = Clients::reading(client, to_standbys, reader, 10, 50.0);
    writers.wait_for_writes(WHOLE);

    let postmaster = herd.postmaster("a");
    let killed_at = Instant::now();
    for agent in herd.agents() {
        herd.agent(agent).kill();
    }
    postmaster.wait_gone(AWAY);
    let stopped_at = Instant::now();
    // sleep: for so long nobody is there.
    std::thread::sleep(AWAY.saturating_sub(killed_at.elapsed()));
    let back_at = Instant::now();
    for agent in herd.agents() {
        herd.start_agent(agent);
    }
    writers.wait_for_writes(WHOLE);
    herd.wait_until_whole(WHOLE);

    let read = readers.stop();
    // What is under way where an agent that is back promotes its server ends with that.
    let (alone, led): (Vec<_>, Vec<_>) = read.iter().cloned().partition(|one| one.ended_at < back_at);
    assert_eq!(handover::failures(&alone), Default::default(), "reads need no agent");
    let cut = handover::failures(&led);
    let honest = |sqlstate: &str| ["57P01", "08007"].contains(&sqlstate);
    assert!(cut.keys().all(|(step, sqlstate)| *step == Step::Reading && honest(sqlstate)), "{cut:?}");
    let meanwhile = read.iter().filter(|one| one.began_at > stopped_at && one.ended_at < back_at);
    let (reads, longest) = meanwhile.fold((0, Duration::ZERO), |(reads, longest), one| {
        (reads + 1, longest.max(one.ended_at - one.began_at))
    });
    assert!(reads > 20, "{reads} reads, and some 50 a second were to be");
    assert!(longest < AT_ONCE * SLACK, "a read took {longest:?}");

    let written = writers.stop();
    let failures = handover::failures(&written);
    println!("{} transactions, {failures:?}; {reads} reads, the longest {longest:?}, {cut:?}", written.len());
    let waited = written.iter().filter(|one| one.began_at > stopped_at && one.began_at < back_at);
    for one in waited {
        assert_eq!(one.failed, None, "who comes while nobody is there waits");
        assert!(one.ended_at > back_at, "nobody could know whether this was safe");
    }
    // Of what was under way when the fence stopped the primary.
    let honest = |sqlstate: &str| ["40001", "08007", "57P01"].contains(&sqlstate);
    assert!(failures.keys().all(|(_, sqlstate)| honest(sqlstate)), "{failures:?}");
    let rows = handover::rows(&mut herd.session(&herd.primary()));
    let Account { acknowledged, lost, doubled, denied, .. } = handover::account(&written, &rows);
    assert_eq!((lost, doubled, denied), (0, 0, 0), "of {acknowledged}");
}
