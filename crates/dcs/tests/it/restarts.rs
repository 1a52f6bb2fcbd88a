//! What the disk keeps: restarts, crashes, compaction, snapshots.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use pgherd_dcs::{Config, Keys, RaftStore, Role, Snapshot, Transaction};
use tempfile::TempDir;

use crate::herd::{End, Herd, PATIENCE, TIMEOUT, TIMES, eventually, name};

const ABC: [&str; 3] = ["a", "b", "c"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_all_keeps_everything() {
    let mut herd = Herd::new(&ABC).await;
    let mut before = Snapshot::default();
    for round in 0..3 {
        let put = Transaction::new().put(format!("round/{round}"), "x").put("last", round.to_string());
        herd.store("b").commit(put, TIMEOUT).await.unwrap();
        let seen = herd.store("a").read(&Keys::All, TIMEOUT).await.unwrap();
        assert!(before.iter().all(|(key, entry)| key == "last" || seen.get(key) == Some(entry)));
        before = seen;
        for node in ABC {
            herd.stop(node).await;
        }
        for node in ABC {
            herd.start(node).await;
        }
        for node in ABC {
            assert_eq!(herd.store(node).read(&Keys::All, PATIENCE).await.unwrap(), before, "{node} forgot");
        }
        let health = herd.health("a");
        assert_eq!(health.members.iter().filter(|member| member.voter).count(), 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_away_catches_up() {
    let mut herd = Herd::new(&ABC).await;
    let leader = herd.leader().await;
    let away = herd.others(&ABC, &leader)[0];
    herd.stop(away).await;
    for round in 0..20 {
        herd.store(&leader).commit(Transaction::new().put("k", round.to_string()), TIMEOUT).await.unwrap();
    }
    herd.start(away).await;
    let mut view = herd.store(away).watch();
    let arrived = view.wait_for(|view| view.get("k").is_some_and(|entry| entry.value == b"19"));
    tokio::time::timeout(PATIENCE, arrived).await.expect("the view arrives without any read").unwrap();
    assert_eq!(herd.leader().await, leader, "its return changes nothing for the others");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_member_leads_again_at_once() {
    let mut herd = Herd::new(&["a"]).await;
    let revision = herd.store("a").commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    herd.stop("a").await;
    herd.start("a").await;
    assert!(herd.store("a").confirm("k", revision, herd.times.election).await.unwrap());
    assert_eq!(herd.health("a").role, Role::Leader);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_join_after_a_compaction_get_the_snapshot() {
    let mut herd = Herd::new(&ABC).await;
    let leader = herd.leader().await;
    let away = herd.others(&ABC, &leader)[0].to_owned();
    // Large enough for several parts of a snapshot.
    for part in 0..8 {
        let put = Transaction::new().put(format!("large/{part}"), vec![b'x'; 200_000]);
        herd.store(&leader).commit(put, TIMEOUT).await.unwrap();
    }
    herd.stop(&away).await;
    // More than is kept behind a snapshot, whichever of the two policies makes it.
    let mut writers = Vec::new();
    for writer in 0..20 {
        let store = herd.store(&leader);
        writers.push(tokio::spawn(async move {
            for round in 0..150 {
                let put = Transaction::new().put(format!("w/{writer}"), round.to_string());
                store.commit(put, PATIENCE).await.unwrap();
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let seen = herd.store(&leader).read(&Keys::All, TIMEOUT).await.unwrap();

    let parts_before = herd.wires.last_sent("snapshot");
    assert!(parts_before.is_none(), "nobody needed a snapshot so far");
    herd.start(&away).await;
    herd.join("d", &leader).await;
    for node in [away.as_str(), "d"] {
        assert_eq!(herd.store(node).read(&Keys::All, PATIENCE).await.unwrap(), seen, "{node} differs");
        let mut view = herd.store(node).watch();
        let same = view.wait_for(|view| *view == seen);
        tokio::time::timeout(PATIENCE, same).await.expect("the view is the snapshot's").unwrap();
    }
    assert!(herd.wires.last_sent("snapshot").is_some(), "the log alone cannot have done it");

    // And the snapshot is what they restart from.
    for node in [away.as_str(), "d"] {
        herd.stop(node).await;
        herd.start(node).await;
        assert_eq!(herd.store(node).read(&Keys::All, PATIENCE).await.unwrap(), seen);
    }
    let file = herd.config(&leader).dir.join("raft.redb");
    let bytes = std::fs::metadata(file).unwrap().len();
    assert!(bytes < 64 * 1024 * 1024, "3000 small commits over 1.6 MB of state left a file of {bytes} bytes");
}

/// Entries are counted, and weighed as well: a thousand of the largest would not fit into anybody's memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn few_but_large_entries_are_compacted_too() {
    let mut herd = Herd::new(&ABC).await;
    for round in 0..60_u8 {
        let put = Transaction::new().put("large", vec![round; 200_000]);
        herd.store("a").commit(put, TIMEOUT).await.unwrap();
    }
    let seen = herd.store("a").read(&Keys::All, TIMEOUT).await.unwrap();
    eventually("somebody new is given the snapshot instead of twelve megabytes of log", async || {
        herd.join("d", "a").await;
        assert_eq!(herd.store("d").read(&Keys::All, PATIENCE).await.unwrap(), seen);
        herd.stop("d").await;
        herd.raft("a").remove_member(&name("d"), TIMEOUT).await.unwrap();
        herd.wipe("d");
        herd.wires.last_sent("snapshot").is_some()
    })
    .await;
}

/// The writer of the next test. Alone it does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_that_is_killed() {
    let Ok(dir) = std::env::var("PGHERD_DCS_CHILD_DIR") else { return };
    let config = lone_config(dir.into());
    let end = std::sync::Arc::new(End { wires: Default::default(), own: name("a") });
    let store = RaftStore::create(config, end).await.unwrap();
    for number in 0_u64.. {
        let put = Transaction::new().put("last", number.to_string()).put(format!("n/{}", number % 50), "x");
        store.commit(put, TIMEOUT).await.unwrap();
        println!("acknowledged {number}");
    }
}

fn lone_config(dir: std::path::PathBuf) -> Config {
    let (herd, address, host) = ("herd-1".to_owned(), "a.test:8009".to_owned(), "a".to_owned());
    Config { dir, herd, name: name("a"), address, host, times: TIMES }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kill_9() {
    for _ in 0..3 {
        let dir = TempDir::new().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "restarts::child_that_is_killed", "--nocapture"])
            .env("PGHERD_DCS_CHILD_DIR", dir.path().join("raft"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut numbers = lines.filter_map(|line| line.strip_prefix("acknowledged ")?.parse::<u64>().ok());
        let mut acknowledged = numbers.by_ref().take(200).last().expect("the child commits");
        child.kill().unwrap();
        acknowledged = numbers.last().unwrap_or(acknowledged);
        child.wait().unwrap();

        let end = std::sync::Arc::new(End { wires: Default::default(), own: name("a") });
        let store = RaftStore::open(lone_config(dir.path().join("raft")), end).await.unwrap();
        let seen = store.read(&Keys::one("last"), PATIENCE).await.unwrap();
        let last: u64 = String::from_utf8(seen.get("last").unwrap().value.clone()).unwrap().parse().unwrap();
        assert!(last >= acknowledged, "{acknowledged} was acknowledged, {last} is there");
        store.shutdown().await;
    }
}

/// Not a test: numbers for the documentation. `cargo nextest run -p pgherd-dcs --run-ignored only measure`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures, with the machine otherwise idle"]
async fn measure_commit_latency_and_idle_cpu() {
    let herd = Herd::with_times(&ABC, pgherd_dcs::Times::default()).await;
    let leader = herd.leader().await;
    let follower = herd.others(&ABC, &leader)[0];
    for (at, node) in [("the leader", leader.as_str()), ("a follower", follower)] {
        let store = herd.store(node);
        let (mut commits, mut confirms) = (Vec::new(), Vec::new());
        for round in 0..300 {
            let started = std::time::Instant::now();
            let put = Transaction::new().put("k", format!("{round:0500}"));
            let revision = store.commit(put, TIMEOUT).await.unwrap();
            commits.push(started.elapsed());
            let started = std::time::Instant::now();
            assert!(store.confirm("k", revision, TIMEOUT).await.unwrap());
            confirms.push(started.elapsed());
        }
        for (what, mut times) in [("commit", commits), ("confirm", confirms)] {
            times.sort();
            println!("{what} at {at}: p50 {:?}, p99 {:?}", times[150], times[297]);
        }
    }
    let (cpu, calls) = (cpu_ms(), herd.wires.calls.load(std::sync::atomic::Ordering::Relaxed));
    // sleep: what is measured is a rest.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let (cpu, calls) = (cpu_ms() - cpu, herd.wires.calls.load(std::sync::atomic::Ordering::Relaxed) - calls);
    println!("idle, three members: {} ms of CPU and {} calls a second", cpu as f64 / 20.0, calls / 20);
    eventually("still led", async || herd.health(&leader).role == Role::Leader).await;
}

/// User and system time of this process so far.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = |field: usize| fields[field].parse::<u64>().unwrap();
    (ticks(11) + ticks(12)) * 10
}
