//! Hosts that lose power, one after the other or all together.

use super::*;

#[test]
fn b06_the_primarys_host_loses_power() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let crashed_at = Instant::now();
    herd.crash("a");
    let after = fails_over(&herd, &workload, &before, crashed_at, AFTER_SILENCE);
    assert_ne!(primary(&after), Some("a"));
    herd.power_on("a");
    all_is_well(&herd, workload);
}

#[test]
fn b31_a_lost_standby_loses_its_vote_and_writes_go_on_with_the_other() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let crashed_at = Instant::now();
    herd.crash("b");
    agent_says(&herd, "a", "b to lose its vote", |status| status.cluster().durability.voters == ["c"]);
    writes_go_on(&workload, crashed_at, Duration::from_secs(3));
    herd.power_on("b");
    let after = herd.wait_until_whole(WHOLE);
    assert_eq!((term(&after), primary(&after)), (term(&before), primary(&before)));
    all_is_well(&herd, workload);
}

#[test]
fn b32_when_the_last_voter_is_lost_commits_wait_and_every_command_says_so() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b"]).with_witness("w").start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    herd.crash("b");
    let crashed_at = Instant::now();
    let of_a = pgherd_testkit::wait_until("the witness to say that commits wait", SOON, || {
        let explained = herd.explain_from("w")?;
        let of_a = explained.into_iter().find(|line| line.node == "a").ok_or("a is not explained")?;
        if of_a.reason_code == "commits-wait" { Ok(of_a) } else { Err(format!("{of_a:?}")) }
    });
    assert!(of_a.hint.as_ref().is_some_and(|hint| hint.contains("bring a voter back")), "{of_a:?}");
    let during = herd.status_from("a").unwrap();
    let reason = &during.cluster().member("a").expect("a is in the file").reason;
    assert!(reason.contains("commits wait"), "{during}");
    let check = herd.check_from("a").unwrap();
    assert!(check.exit == Some(2) && check.text.contains("commits wait"), "{check:?}");
    assert_eq!(acknowledged_after(&workload, crashed_at), 0, "no voter can have these");
    herd.power_on("b");
    let after = herd.wait_until_whole(WHOLE);
    assert_eq!((term(&after), primary(&after)), (term(&before), primary(&before)));
    all_is_well(&herd, workload);
}

#[test]
fn when_the_last_voter_is_lost_commits_go_on_if_the_file_says_so_and_every_command_says_degraded() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b"]).with_witness("w").with_cluster(r#"degrade_after = "3s""#).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let crashed_at = Instant::now();
    herd.crash("b");
    writes_go_on(&workload, crashed_at, Duration::from_secs(5));
    let during = herd.status_from("w").unwrap();
    assert!(during.cluster().durability.degraded, "{during}");
    assert!(during.cluster().durability.voters.is_empty(), "{during}");
    let check = herd.check_from("a").unwrap();
    assert!(check.exit == Some(1) && check.text.contains("degraded"), "{check:?}");
    herd.power_on("b");
    let after = herd.wait_until_whole(WHOLE);
    assert_eq!((term(&after), primary(&after)), (term(&before), primary(&before)));
    all_is_well(&herd, workload);
}

#[test]
fn b23_without_the_majority_of_the_store_writes_go_on() {
    let _alone = alone();
    let layout = Herd::of(&["a", "b"]).with_witness("u").with_witness("v").with_witness("w");
    let herd = layout.start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let lost_at = Instant::now();
    for witness in ["u", "v", "w"] {
        herd.crash(witness);
    }
    // sleep: several leases, none of which the store can confirm.
    std::thread::sleep(Duration::from_secs(10));
    let check = herd.check_from("a").unwrap();
    assert!(check.exit == Some(2) && check.text.contains("the store has no majority"), "{check:?}");
    writes_go_on(&workload, lost_at, Duration::from_millis(300));
    for witness in ["u", "v", "w"] {
        herd.power_on(witness);
    }
    let after = herd.wait_until_whole(WHOLE);
    assert_eq!((term(&after), primary(&after)), (term(&before), primary(&before)));
    all_is_well(&herd, workload);
}

#[test]
fn b14_without_the_primary_and_its_only_voter_nobody_is_promoted_and_the_override_is_named() {
    let _alone = alone();
    // c has no vote, and may lack what was acknowledged; the witnesses keep the majority of the store.
    let layout = Herd::of(&["a", "b", "c"]).with_witness("v").with_witness("w");
    let herd = layout.with_node("c", r#"follow = "b""#).with_time(r#"agent_grace = "4s""#).start();
    assert_eq!(herd.status().unwrap().cluster().durability.voters, ["b"]);
    let workload = herd.start_workload();
    herd.crash("b");
    herd.crash("a");
    let crashed_at = Instant::now();
    // sleep: longer than `agent_grace`, after which nothing else could bring an election about.
    std::thread::sleep(Duration::from_secs(8));
    let explained = herd.explain_from("c").unwrap();
    let of_c = explained.iter().find(|line| line.node == "c").expect("c is in the file");
    let waits_for = of_c.waiting_for.join("; ");
    assert!(waits_for.contains("an acknowledged commit may be only there"), "{explained:?}");
    let hint = of_c.hint.as_deref().unwrap_or_default();
    assert!(hint.contains("pgherd failover --to c --accept-data-loss"), "{explained:?}");
    assert_eq!(acknowledged_after(&workload, crashed_at), 0, "nobody may lead");
    // Either of them has all that was acknowledged.
    herd.power_on("b");
    workload.wait_for_writes(SOON);
    let during = herd.status_from("b").unwrap();
    assert_ne!(primary(&during), Some("a"), "{during}");
    herd.power_on("a");
    all_is_well(&herd, workload);
}

#[test]
fn a_winner_that_is_lost_before_it_led_is_followed_by_the_next() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    // b receives more than c, so it wins; and its promotion takes until it is lost.
    herd.net().cut_port("a", "c", POSTGRES_PORT);
    workload.wait_for_writes(SOON);
    let startup = herd.postgres_process("b", "startup");
    startup.freeze();
    let gone_at = herd.kill_postmaster_and_backends("a");
    let elected = agent_says(&herd, "c", "b to win the election", |status| {
        term(status) > term(&before) && primary(status) == Some("b")
    });
    assert_ne!(elected.cluster().gate, "open", "it cannot lead yet: {elected}");
    herd.crash("b");
    assert_eq!(acknowledged_after(&workload, gone_at), 0, "nobody has led since");
    herd.net().heal();
    let lost_at = Instant::now();
    agent_says(&herd, "c", "the next to lead", |status| {
        !matches!(primary(status), Some("b") | None) && term(status) > term(&elected)
    });
    workload.wait_for_writes(AFTER_SILENCE * SLACK);
    assert!(lost_at.elapsed() < AFTER_SILENCE * SLACK, "{:?}", lost_at.elapsed());
    herd.power_on("b");
    all_is_well(&herd, workload);
}

#[test]
fn b17_all_hosts_lose_power_and_come_back_in_any_order() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    for order in [["c", "a", "b"], ["b", "c", "a"]] {
        for host in ["a", "b", "c"] {
            herd.crash(host);
        }
        for host in order {
            herd.power_on(host);
        }
        workload.wait_for_writes(WHOLE);
        herd.wait_until_whole(WHOLE);
    }
    all_is_well(&herd, workload);
}
