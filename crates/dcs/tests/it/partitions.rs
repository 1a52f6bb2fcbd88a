//! Cut wires: who may go on, who must not, and what returns when they are mended.

use std::time::Duration;

use pgherd_dcs::{CommitError, Keys, Role, StoreError, Transaction};
use tokio::time::Instant;

use crate::herd::{Herd, PATIENCE, TIMEOUT, eventually, name};

const ABC: [&str; 3] = ["a", "b", "c"];
const SHORT: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_is_replaced_and_can_confirm_nothing() {
    let herd = Herd::new(&ABC).await;
    let old = herd.leader().await;
    let (old_store, others) = (herd.store(&old), herd.others(&ABC, &old));
    let before = old_store.commit(Transaction::new().put("term", "1"), TIMEOUT).await.unwrap();
    let old_view = old_store.watch();

    herd.isolate(&old);
    let started = Instant::now();
    let confirmed = old_store.confirm("term", before, SHORT).await;
    assert!(matches!(confirmed, Err(StoreError::Unavailable { .. })), "{confirmed:?}");
    assert!(matches!(old_store.read(&Keys::All, SHORT).await, Err(StoreError::Unavailable { .. })));
    assert!(started.elapsed() < SHORT * 3, "a deadline is a deadline");

    let new = herd.leader_among(&others).await;
    let after =
        herd.store(&new).commit(Transaction::new().require("term", before).put("term", "2"), TIMEOUT).await;
    let after = after.unwrap();
    let stale = old_store.commit(Transaction::new().require("term", before).put("term", "old"), SHORT).await;
    assert!(
        matches!(stale, Err(CommitError::Unavailable { .. } | CommitError::Unknown { .. })),
        "an old leader acknowledged a commit: {stale:?}"
    );
    assert!(matches!(old_store.confirm("term", before, SHORT).await, Err(StoreError::Unavailable { .. })));
    assert_eq!(old_view.borrow().get("term").unwrap().revision, before, "its view is old, and may be");

    herd.heal();
    assert!(!old_store.confirm("term", before, TIMEOUT).await.unwrap());
    assert!(old_store.confirm("term", after, TIMEOUT).await.unwrap());
    let seen = old_store.read(&Keys::one("term"), TIMEOUT).await.unwrap();
    assert_eq!(seen.get("term").unwrap().value, b"2");
    herd.leader().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_everything_ends_at_its_deadline() {
    let mut herd = Herd::new(&ABC).await;
    let revision = herd.store("a").commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    let leader = herd.leader().await;
    for other in herd.others(&ABC, &leader) {
        herd.stop(other).await;
    }
    let store = herd.store(&leader);
    for _ in 0..3 {
        let started = Instant::now();
        let read = store.read(&Keys::All, SHORT).await;
        assert!(matches!(read, Err(StoreError::Unavailable { .. })), "{read:?}");
        let confirmed = store.confirm("k", revision, SHORT).await;
        assert!(matches!(confirmed, Err(StoreError::Unavailable { .. })), "{confirmed:?}");
        assert!(started.elapsed() < SHORT * 3);
    }
    // Its lease is over by now, so the commit was not even begun, and that is certain.
    let commit = store.commit(Transaction::new().put("k", "2"), SHORT).await;
    let Err(CommitError::Unavailable { why }) = commit else { panic!("{commit:?}") };
    assert!(why.contains("majority"), "{why}");
    assert_eq!(store.watch().borrow().get("k").unwrap().revision, revision, "the view goes on serving");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_five_members_the_three_go_on_and_the_two_do_not() {
    let names = ["a", "b", "c", "d", "e"];
    let herd = Herd::new(&names).await;
    let revision = herd.store("e").commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    let leader = herd.leader().await;
    let second = herd.others(&names, &leader)[0];
    let three: Vec<_> = names.into_iter().filter(|node| *node != leader && *node != second).collect();
    for inside in [leader.as_str(), second] {
        for outside in &three {
            herd.cut(inside, outside);
            herd.cut(outside, inside);
        }
    }
    herd.leader_among(&three).await;
    for outside in &three {
        assert!(herd.store(outside).confirm("k", revision, TIMEOUT).await.unwrap());
    }
    herd.store(three[0]).commit(Transaction::new().put("k", "2"), TIMEOUT).await.unwrap();
    for inside in [leader.as_str(), second] {
        let confirmed = herd.store(inside).confirm("k", revision, SHORT).await;
        assert!(matches!(confirmed, Err(StoreError::Unavailable { .. })), "{confirmed:?}");
    }
    herd.heal();
    for inside in [leader.as_str(), second] {
        assert!(!herd.store(inside).confirm("k", revision, TIMEOUT).await.unwrap());
    }
}

/// Pre-vote: what it asks while it is alone must not raise the term of the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_returns_does_not_disturb_the_leader() {
    let herd = Herd::new(&ABC).await;
    let leader = herd.leader().await;
    let lonely = herd.others(&ABC, &leader)[0];
    let term = herd.health(&leader).raft_term;
    let contact = || herd.health(lonely).members.iter().filter_map(|member| member.last_contact).min();
    let last_heard = contact();

    herd.isolate(lonely);
    // It has stood for election in vain: calls from the outside have failed for several election times.
    let calls = || herd.health(lonely).members.iter().filter(|member| member.trouble.is_some()).count();
    eventually("the lonely follower asks for votes", async || calls() == 2).await;
    // sleep: nothing may happen in this time.
    tokio::time::sleep(herd.times.election * 3).await;
    assert_eq!(herd.health(lonely).raft_term, term, "nobody granted, so the term must stand");
    herd.heal();
    eventually("the leader is heard again", async || contact() > last_heard && calls() == 0).await;
    herd.store(lonely).commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    assert_eq!(herd.health(&leader).raft_term, term);
    assert_eq!(herd.leader().await, leader);
}

/// A can send and not hear, the case in which leaders without a lease live for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hears_nobody_stops_confirming() {
    let herd = Herd::new(&ABC).await;
    let leader = herd.leader().await;
    let revision = herd.store(&leader).commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    for other in herd.others(&ABC, &leader) {
        herd.cut(other, &leader);
    }
    let store = herd.store(&leader);
    let confirmed = store.confirm("k", revision, SHORT).await;
    assert!(matches!(confirmed, Err(StoreError::Unavailable { .. })), "{confirmed:?}");
    herd.heal();
    assert!(store.confirm("k", revision, TIMEOUT).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_was_lost_happens_once() {
    let herd = Herd::new(&ABC).await;
    let leader = herd.leader().await;
    let follower = herd.store(herd.others(&ABC, &leader)[0]);
    for round in 0_u64..5 {
        herd.wires.lose_answers("lead", 2);
        let seen = follower.watch().borrow().get("k").map(|entry| entry.revision);
        let mut put = Transaction::new().put("k", round.to_string());
        put = match seen {
            Some(revision) => put.require("k", revision),
            None => put.require_absent("k"),
        };
        // Applied twice, it would conflict with itself.
        let revision = follower.commit(put, TIMEOUT).await.unwrap();
        assert!(follower.confirm("k", revision, TIMEOUT).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_survive_a_change_of_leader_and_lose_no_acknowledged_write() {
    let herd = std::sync::Arc::new(Herd::new(&ABC).await);
    let writers: Vec<_> = ABC
        .map(|node| {
            let store = herd.store(node);
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for round in 0..40 {
                    let key = format!("{node}/{round}");
                    match store.commit(Transaction::new().require_absent(&key).put(&key, ""), PATIENCE).await
                    {
                        Ok(_) => acknowledged.push(key),
                        Err(error) => panic!("a writer with a majority on its side failed: {error}"),
                    }
                }
                acknowledged
            })
        })
        .into();
    for _ in 0..3 {
        let leader = herd.leader().await;
        herd.isolate(&leader);
        herd.leader_among(&herd.others(&ABC, &leader)).await;
        herd.heal();
    }
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    let seen = herd.store("a").read(&Keys::All, PATIENCE).await.unwrap();
    for key in acknowledged {
        assert!(seen.get(&key).is_some(), "{key} was acknowledged and is gone");
    }
}

/// openraft times heartbeats out after one interval; here the round trip is three times as long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_trips_longer_than_a_heartbeat_change_nothing() {
    let mut times = crate::herd::TIMES;
    times.heartbeat = Duration::from_millis(80);
    times.election = Duration::from_millis(2000);
    let herd = Herd::with_times(&ABC, times).await;
    let leader = herd.leader().await;
    let term = herd.health(&leader).raft_term;
    let revision = herd.store(&leader).commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    herd.wires.set_delay(Duration::from_millis(240));
    // A quiet time longer than the leader's lease, in which only heartbeats can keep it.
    // sleep: the quiet time itself.
    tokio::time::sleep(times.election).await;
    herd.store(&leader).commit(Transaction::new().put("other", "0"), times.election).await.unwrap();
    let until = Instant::now() + times.election * 3;
    while Instant::now() < until {
        for node in ABC {
            assert!(herd.store(node).confirm("k", revision, TIMEOUT).await.unwrap());
        }
        herd.store(&leader).commit(Transaction::new().put("other", "1"), TIMEOUT).await.unwrap();
    }
    assert_eq!(herd.health(&leader).raft_term, term);
    assert_eq!(herd.health(&leader).role, Role::Leader);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_where_it_is_sent_and_nowhere_else() {
    let mut herd = Herd::new(&ABC).await;
    for target in ["b", "c", "a"] {
        let term = herd.health(target).raft_term;
        let started = Instant::now();
        herd.raft("b").transfer_leadership(&name(target), TIMEOUT).await.unwrap();
        assert_eq!(herd.leader().await, target);
        assert!(herd.health(target).raft_term <= term + 1);
        // An election by timeout would take most of the election time.
        assert!(started.elapsed() < herd.times.election, "handed over, not waited out");
        herd.store("c").commit(Transaction::new().put("k", target), TIMEOUT).await.unwrap();
    }
    herd.stop("b").await;
    eventually("b is missed", async || {
        let survey = herd.raft("c").survey(TIMEOUT).await.unwrap();
        let b = survey.iter().find(|member| member.name == name("b")).unwrap();
        b.trouble.is_some() && b.last_contact.is_none_or(|heard| heard.elapsed() > Duration::from_millis(500))
    })
    .await;
    let refused = herd.raft("a").transfer_leadership(&name("b"), SHORT).await.unwrap_err();
    assert!(refused.to_string().contains("b is silent"), "{refused}");
    let refused = herd.raft("a").transfer_leadership(&name("nobody"), TIMEOUT).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Refused { why } if why.contains("does not vote")), "{refused}");
    herd.store("a").commit(Transaction::new().put("k", "still led by a"), TIMEOUT).await.unwrap();
    assert_eq!(herd.leader().await, "a");
}
