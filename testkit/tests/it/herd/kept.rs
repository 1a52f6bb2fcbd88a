//! A repository on the disk of a witness: the herd is gone, and everything is there.

use pgherd_testkit::herd::{BUCKET_HOST, Medium, Place};

use super::*;

/// Nothing waits any more for its way into the repository.
fn archived(status: &Status) -> bool {
    let backup = status.cluster().backup.as_ref().expect("the file names a repository");
    let is_close = backup.wal_lag_seconds.is_some_and(|lag| lag < 3.0);
    is_close && backup.last.is_some() && backup.gaps.is_empty() && backup.trouble.is_none()
}

#[test]
fn what_a_keeper_has_outlives_every_node() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b"]).with_keeper("k").start();
    let first = agent_says(&herd, "a", "a first base backup", archived);
    let backup = first.cluster().backup.as_ref().unwrap();
    assert_eq!(first.cluster().member("k").expect("k is in the file").role, "keeper");
    assert_eq!(backup.repository, format!("file://{} on k", herd.repository("k").display()));
    assert_eq!(backup.owner.as_deref(), Some("b"), "a standby's, beside the primary's host");
    let listed = |agent: &str| herd.pgherd(agent).args(["backup", "list"]).run();
    let last = backup.last.as_deref().unwrap();
    for agent in ["a", "b", "k"] {
        assert!(listed(agent).contains(last), "on its own disk, and through the keeper: {}", listed(agent));
    }

    // A keeper out of reach holds up nobody who writes, and misses nothing.
    let workload = herd.start_workload();
    let cut = herd.net().isolate("k");
    let cut_at = Instant::now();
    agent_says(&herd, "a", "WAL to wait", |status| {
        status.cluster().backup.as_ref().is_some_and(|backup| backup.trouble.is_some())
    });
    writes_go_on(&workload, cut_at, AT_ONCE);
    let output = herd.pgherd("a").args(["backup", "list"]).output();
    assert!(!output.status.success(), "nobody knows what is there");
    herd.net().lift(cut);
    let after = agent_says(&herd, "a", "the archive to come up", archived);
    assert_eq!(term(&after), term(&first), "who was cut off itself takes nobody for silent");

    // Its agent dies in the middle of it, and another node leads.
    let killed_at = Instant::now();
    herd.agent("k").kill();
    writes_go_on(&workload, killed_at, AT_ONCE);
    herd.start_agent("k");
    herd.switch_over(Some("b"));
    workload.wait_for_writes(SOON);
    agent_says(&herd, "b", "the other node to own the archive", |status| {
        let owner = status.cluster().backup.as_ref().and_then(|backup| backup.owner.as_deref());
        owner == Some("a") && archived(status)
    });
    let asked = herd.pgherd("b").args(["backup", "create"]).run();
    agent_says(&herd, "b", "what was asked for to be seen", |status| {
        status.cluster().backup.as_ref().is_some_and(|backup| backup.last.as_deref() == Some(asked.trim()))
    });

    // All of it, read over the network, and what is there when no node is any more.
    let history = workload.stop();
    let rows = history.acknowledged().count();
    agent_says(&herd, "b", "the last second to be archived", archived);
    let drilled = |agent: &str, rows: usize| {
        let scratch = herd.host(agent).dir().join("scratch");
        let query = format!("app=SELECT count(*) >= {rows} FROM writes");
        let drill = herd.pgherd(agent).args(["backup", "drill", "--query", &query, "--scratch-dir"]);
        drill.arg(&scratch).output()
    };
    let drill = drilled("a", rows);
    assert!(drill.status.success(), "{drill:?}");
    herd.crash("a");
    herd.crash("b");
    let drill = drilled("k", rows);
    assert!(drill.status.success(), "{drill:?}");
    assert!(!drilled("k", rows + 1_000_000).status.success(), "a drill that cannot fail shows nothing");
}

/// The repository is what a herd can do without for a while: commits never wait for it, and what it missed comes later.
#[test]
fn a_repository_whose_disk_is_full_hangs_or_dies_holds_up_nobody_and_misses_nothing() {
    const DISK_BYTES: u64 = 1 << 30;
    let _alone = alone();
    let layout = Herd::of(&["a", "b"]).with_keeper("k");
    let herd = layout.with_volume("k", Place::Repository, Medium::Disk, DISK_BYTES).start();
    agent_says(&herd, "a", "a first base backup", archived);
    let troubled = |what: &str, trouble: &str| {
        agent_says(&herd, "a", what, |status| {
            let said = status.cluster().backup.as_ref().and_then(|backup| backup.trouble.as_deref());
            said.is_some_and(|said| said.contains(trouble))
        })
    };
    let workload = herd.start_workload();

    let full_at = Instant::now();
    herd.volume("k").fill();
    troubled("the disk to be full", "no space is left");
    writes_go_on(&workload, full_at, AT_ONCE);
    let refused = herd.pgherd("a").args(["backup", "create"]).output();
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && words.contains("no space is left"), "{words}");
    herd.volume("k").free();
    agent_says(&herd, "a", "the archive to come up once there is room", archived);
    herd.pgherd("a").args(["backup", "create"]).run();

    let hangs_at = Instant::now();
    herd.volume("k").hang();
    troubled("nothing to come back from the disk", "");
    writes_go_on(&workload, hangs_at, AT_ONCE);
    herd.volume("k").resume();
    agent_says(&herd, "a", "the archive to come up once the disk goes on", archived);

    // What was reported was synced, and the rest is sent again.
    let died_at = Instant::now();
    herd.volume("k").die();
    troubled("the disk to be gone", "");
    writes_go_on(&workload, died_at, AT_ONCE);
    herd.agent("k").kill();
    herd.volume("k").remount();
    herd.start_agent("k");
    agent_says(&herd, "a", "the archive to come up on what the disk had kept", archived);

    let history = workload.stop();
    let rows = history.acknowledged().count();
    agent_says(&herd, "a", "the last second to be archived", archived);
    herd.pgherd("a").args(["backup", "check"]).run();
    herd.pgherd("a").args(["backup", "verify"]).run();
    let query = format!("app=SELECT count(*) >= {rows} FROM writes");
    let drill = herd.pgherd("a").args(["backup", "drill", "--query", &query, "--scratch-dir"]);
    drill.arg(herd.host("a").dir().join("scratch")).run();
}

/// A bucket has everything that a keeper would have; while it is out of reach nobody waits for it, and a lost node comes back from it.
#[test]
fn what_a_bucket_has_outlives_every_node_and_makes_a_lost_one_anew() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_bucket().start();
    let first = agent_says(&herd, "a", "a first base backup", archived);
    let backup = first.cluster().backup.as_ref().unwrap();
    assert!(backup.repository.starts_with("s3://herd/story at http://"), "{}", backup.repository);
    let workload = herd.start_workload();

    let cut = herd.net().isolate(BUCKET_HOST);
    let cut_at = Instant::now();
    agent_says(&herd, "a", "WAL to wait", |status| {
        status.cluster().backup.as_ref().is_some_and(|backup| backup.trouble.is_some())
    });
    writes_go_on(&workload, cut_at, AT_ONCE);
    herd.net().lift(cut);
    agent_says(&herd, "a", "the archive to come up", archived);

    // The primary's host is lost with its disk, and the owner of the archive follows the next one.
    let killed_at = Instant::now();
    herd.crash("a");
    std::fs::remove_dir_all(herd.data_dir("a")).expect("nobody uses it");
    writes_go_on(&workload, killed_at, AFTER_SILENCE);
    let next = herd.primary();
    agent_says(&herd, &next, "the archive to follow", archived);
    herd.pgherd(&next).args(["backup", "create"]).run();
    herd.power_on("a");
    herd.wait_until_whole(WHOLE);
    let log = std::fs::read_to_string(herd.agent_log("a")).expect("its agent has one");
    assert!(log.contains("made from the repository"), "it was the first one, and made from nothing before");

    let history = workload.stop();
    let rows = history.acknowledged().count();
    agent_says(&herd, &next, "the last second to be archived", archived);
    herd.pgherd("a").args(["backup", "verify"]).run();
    for other in ["b", "c"] {
        herd.crash(other);
    }
    let query = format!("app=SELECT count(*) >= {rows} FROM writes");
    let drill = herd.pgherd("a").args(["backup", "drill", "--query", &query, "--scratch-dir"]);
    drill.arg(herd.host("a").dir().join("scratch")).run();
}

/// As which a repository is among the voters.
const REPOSITORY: &str = "pgherd_repository";

/// It counts for commits, and has everything.
fn votes(status: &Status) -> bool {
    status.cluster().durability.voters.iter().any(|voter| voter == REPOSITORY) && archived(status)
}

/// Each commit waits for the standby and for the repository, so both of the others may be lost with their disks.
#[test]
fn a_repository_that_votes_has_every_acknowledged_row_when_both_disks_are_lost() {
    let _alone = alone();
    let layout =
        Herd::of(&["a", "b"]).with_keeper("k").with_cluster("needed = 2").with_backup("voter = true");
    let herd = layout.start();
    agent_says(&herd, "a", "the repository to vote", votes);
    let workload = herd.start_workload();
    workload.wait_for_writes(SOON);
    herd.switch_over(Some("b"));
    workload.wait_for_writes(SOON);
    let before = agent_says(&herd, "b", "the repository to vote on the next line", votes);
    // sleep: some WAL that no base backup has.
    std::thread::sleep(Duration::from_secs(5));
    workload.wait_for_writes(SOON);

    herd.crash("a");
    herd.crash("b");
    for node in ["a", "b"] {
        std::fs::remove_dir_all(herd.data_dir(node)).expect("the node had a copy");
    }
    herd.power_on("a");
    herd.power_on("b");
    herd.wait_for("a copy from the repository to lead", WHOLE, |status| {
        let open = status.cluster().gate == "open" && status.cluster().primary.is_some();
        if term(status) > term(&before) && open { Ok(()) } else { Err("not yet".to_owned()) }
    });
    all_is_well(&herd, workload);
    agent_says(&herd, "a", "the repository to vote again", votes);
    let lines = herd.history_from(&herd.primary()).expect("the primary's agent answers");
    assert!(lines.iter().any(|line| line.reason_code == "inherits"), "{lines:?}");
}

/// One node, and a repository without which no commit is acknowledged: the node is lost for good, and an empty one takes its place.
#[test]
fn an_empty_node_takes_the_place_of_the_only_one_with_every_acknowledged_row() {
    let _alone = alone();
    let herd = Herd::of(&["a"]).with_keeper("k").with_witness("w").with_backup("voter = true").start();
    agent_says(&herd, "a", "the repository to vote", votes);
    let workload = herd.start_workload();
    workload.wait_for_writes(SOON);

    // Without the repository commits wait, and go on with it.
    let cut = herd.net().isolate("k");
    // sleep: what was on its way is acknowledged yet.
    std::thread::sleep(Duration::from_secs(2));
    let waits_from = Instant::now();
    // sleep: nobody is to be acknowledged meanwhile.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(acknowledged_after(&workload, waits_from), 0, "nobody but the repository has it");
    herd.net().lift(cut);
    workload.wait_for_writes(SOON);

    herd.crash("a");
    std::fs::remove_dir_all(herd.data_dir("a")).expect("the node had a copy");
    herd.power_on("a");
    workload.wait_for_writes(WHOLE);
    all_is_well(&herd, workload);
    agent_says(&herd, "a", "the repository to vote again", votes);
}

/// Nobody notices that a standby receives nothing, and commits go on with the repository: when the primary is lost, that alone has them.
#[test]
fn what_only_a_repository_that_votes_has_is_taken_from_it_by_the_next_primary() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b"]).with_keeper("k").with_backup("voter = true").start();
    let before = agent_says(&herd, "a", "the repository to vote", votes);
    let workload = herd.start_workload();
    workload.wait_for_writes(SOON);
    herd.postgres_process("b", "walreceiver").freeze();
    let alone_from = Instant::now();
    // sleep: some commits without the standby.
    std::thread::sleep(Duration::from_secs(1));
    assert!(acknowledged_after(&workload, alone_from) > 0, "the repository is enough for a commit");

    herd.crash("a");
    let crashed_at = Instant::now();
    let after = fails_over(&herd, &workload, &before, crashed_at, AFTER_SILENCE + AFTER_SILENCE);
    assert_eq!(primary(&after), Some("b"));
    herd.power_on("a");
    all_is_well(&herd, workload);
    agent_says(&herd, "b", "the repository to vote on", votes);
}
