//! Joining, voting, leaving, and the many ways of not being who one says.

use std::collections::BTreeSet;

use pgherd_dcs::{DiskId, Found, Joined, Keys, OpenError, RaftStore, Role, StoreError, Transaction};

use crate::herd::{Herd, TIMEOUT, eventually, name};

fn voters(herd: &Herd, node: &str) -> String {
    let members = herd.health(node).members;
    let mut voters: Vec<_> =
        members.iter().filter(|member| member.voter).map(|it| it.name.to_string()).collect();
    voters.sort();
    voters.join(" ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_herd_grows_from_one_and_always_has_an_odd_number_of_voters() {
    let mut herd = Herd::new(&["a"]).await;
    assert_eq!((voters(&herd, "a"), herd.health("a").role), ("a".to_owned(), Role::Leader));
    let revision = herd.store("a").commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();

    herd.join("b", "a").await;
    herd.settle(&["a", "b"]).await;
    assert_eq!(voters(&herd, "a"), "a");
    assert_eq!(herd.health("b").role, Role::Learner);
    assert!(herd.store("b").confirm("k", revision, TIMEOUT).await.unwrap(), "a learner reads like everybody");

    // Asked at a follower: the request finds the leader.
    herd.join("c", "b").await;
    herd.settle(&["a", "b", "c"]).await;
    assert_eq!(voters(&herd, "a"), "a b c");

    herd.join("d", "c").await;
    herd.settle(&["a", "b", "c", "d"]).await;
    assert_eq!(voters(&herd, "a"), "a b c");
    herd.raft("a").transfer_leadership(&name("a"), TIMEOUT).await.unwrap();
    eventually("the order of the file rules, and who has no vote leads no longer", async || {
        herd.settle(&["d", "c", "b", "a"]).await;
        voters(&herd, "d") == "b c d" && herd.leader().await != "a"
    })
    .await;
    herd.store("a").commit(Transaction::new().put("k", "2"), TIMEOUT).await.unwrap();

    herd.join("e", "a").await;
    herd.settle(&["a", "b", "c", "d", "e"]).await;
    assert_eq!(voters(&herd, &herd.leader().await), "a b c d e");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_voter_is_replaced_told_so_and_never_comes_back_as_itself() {
    let names = ["a", "b", "c", "d"];
    let mut herd = Herd::new(&names).await;
    let revision = herd.store("a").commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    let old_id = herd.raft("b").raft_id();

    herd.raft("c").remove_member(&name("b"), TIMEOUT).await.unwrap();
    herd.raft("c").remove_member(&name("b"), TIMEOUT).await.unwrap();
    eventually("d votes in place of b", async || {
        herd.settle(&["a", "c", "d"]).await;
        voters(&herd, &herd.leader().await) == "a c d"
    })
    .await;
    eventually("b knows", async || {
        // Its agent uses the store all the time, and is told at the first occasion.
        let refused = herd.store("b").confirm("k", revision, TIMEOUT).await;
        matches!(&refused, Err(StoreError::Refused { why }) if why.contains("was removed"))
    })
    .await;
    eventually("its health says so", async || herd.health("b").role == Role::Stopped).await;
    assert!(herd.health("b").failed.unwrap().contains("was removed"));

    herd.stop("b").await;
    herd.start("b").await;
    eventually("b knows after a restart as well", async || herd.health("b").failed.is_some()).await;
    let survivors = herd.store("a").read(&Keys::All, TIMEOUT).await.unwrap();
    assert_eq!(survivors.len(), 1);

    herd.stop("b").await;
    herd.wipe("b");
    herd.join("b", "a").await;
    assert!(herd.raft("b").raft_id() > old_id);
    assert!(herd.store("b").confirm("k", revision, TIMEOUT).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_can_remove_itself() {
    let names = ["a", "b", "c"];
    let herd = Herd::new(&names).await;
    let leader = herd.leader().await;
    herd.raft(&leader).remove_member(&name(&leader), TIMEOUT).await.unwrap();
    let others = herd.others(&names, &leader);
    let new = herd.leader_among(&others).await;
    herd.store(&new).commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    assert_eq!(voters(&herd, &new), others.join(" "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_voter_stays() {
    let mut herd = Herd::new(&["a"]).await;
    herd.join("b", "a").await;
    let refused = herd.raft("b").remove_member(&name("a"), TIMEOUT).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Refused { why } if why.contains("only voter")), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_disk_is_refused_under_its_old_number() {
    let names = ["a", "b", "c"];
    let mut herd = Herd::new(&names).await;
    let revision = herd.store("a").commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();
    let old_id = herd.raft("c").raft_id();
    herd.stop("c").await;
    herd.wipe("c");

    // An empty directory is nobody.
    let config = herd.config("c");
    let opened = RaftStore::open(config.clone(), herd.end("c")).await;
    assert!(matches!(opened, Err(OpenError::NoMember { .. })));
    assert_eq!(RaftStore::inspect(&config).await.unwrap(), Found::Nothing);

    // Under its old number, with the truth about the disk: refused at once. With a lie: by everybody else.
    let request = RaftStore::prepare(&config).await.unwrap();
    assert_eq!(RaftStore::inspect(&config).await.unwrap(), Found::Prepared);
    let stale = Joined { herd: "herd-1".to_owned(), generation: 1, raft_id: old_id, disk: some_disk().await };
    let refused = RaftStore::join(config.clone(), stale.clone(), herd.end("c")).await;
    assert!(matches!(refused, Err(OpenError::OtherDisk { .. })));
    let lie = Joined { disk: request.disk.clone(), ..stale };
    let liar = RaftStore::join(config.clone(), lie, herd.end("c")).await.unwrap();
    herd.plug("c", liar.clone());
    let leader = herd.leader_among(&["a", "b"]).await;
    eventually("the leader sees what it is", async || {
        let survey = herd.raft(&leader).survey(TIMEOUT).await.unwrap();
        let trouble = survey.iter().find(|member| member.name == name("c")).unwrap().trouble.clone();
        trouble.is_some_and(|why| why.contains("another disk"))
    })
    .await;
    assert!(liar.watch().borrow().is_empty(), "no log entry reaches a disk that is not the one that joined");
    let read = liar.read(&Keys::All, herd.times.election).await;
    assert!(read.is_err(), "{read:?}");

    // The right way: wipe again, ask for a new number; the old one is dropped because its disk is silent.
    herd.stop("c").await;
    herd.wipe("c");
    herd.join("c", "a").await;
    assert!(herd.raft("c").raft_id() > old_id);
    herd.settle(&names).await;
    assert_eq!(voters(&herd, "a"), "a b c");
    assert!(herd.store("c").confirm("k", revision, TIMEOUT).await.unwrap());
}

/// The number of some other disk.
async fn some_disk() -> DiskId {
    let mut other = Herd::new(&["x"]).await;
    RaftStore::prepare(&other.config("y")).await.unwrap().disk
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_member_of_a_living_ones_name_is_refused() {
    let mut herd = Herd::new(&["a", "b", "c"]).await;
    let mut double = herd.config("b");
    double.dir = double.dir.with_file_name("double");
    let request = RaftStore::prepare(&double).await.unwrap();
    let refused = herd.raft("a").add_member(request, TIMEOUT).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Refused { why } if why.contains("is alive")), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_can_be_asked_for_again_and_numbers_are_never_reused() {
    let mut herd = Herd::new(&["a"]).await;
    let config = herd.config("b");
    let request = RaftStore::prepare(&config).await.unwrap();
    let first = herd.raft("a").add_member(request.clone(), TIMEOUT).await.unwrap();
    // The answer was lost; the agent starts anew.
    assert_eq!(RaftStore::prepare(&config).await.unwrap(), request);
    assert_eq!(herd.raft("a").add_member(request, TIMEOUT).await.unwrap(), first);

    let mut numbers = BTreeSet::from([herd.raft("a").raft_id(), first.raft_id]);
    herd.raft("a").remove_member(&name("b"), TIMEOUT).await.unwrap();
    for round in 0..5 {
        let node = format!("n{round}");
        herd.join(&node, "a").await;
        assert!(numbers.insert(herd.raft(&node).raft_id()), "a number was used twice");
        herd.stop(&node).await;
        herd.raft("a").remove_member(&name(&node), TIMEOUT).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_with_a_sentence() {
    let mut herd = Herd::new(&["a", "b", "c"]).await;
    let (from, to, body) = herd.wires.last_sent("append").unwrap();
    let there = herd.raft(to.as_str()).clone();
    let says = async |caller: &str, rpc: &str, body: &str| {
        String::from_utf8(there.handle(&name(caller), rpc, body.as_bytes()).await).unwrap()
    };
    let body = String::from_utf8(body).unwrap();
    assert!(says(from.as_str(), "append", &body).await.contains("\"answer\""), "the right one is taken");
    let answer = says("z", "append", &body).await;
    assert!(answer.contains("the certificate names z"), "{answer}");
    let answer = says(from.as_str(), "append", &body.replace("herd-1", "herd-2")).await;
    assert!(answer.contains("another herd"), "{answer}");
    let answer = says(from.as_str(), "append", &body.replace("\"generation\":1", "\"generation\":2")).await;
    assert!(answer.contains("belongs to generation 1"), "{answer}");
    let answer = says(from.as_str(), "append", &body.replace("\"v\":1", "\"v\":2")).await;
    assert!(answer.contains("\"version\"") && answer.contains("speaks version 1"), "{answer}");
    let answer = says(from.as_str(), "compact", &body).await;
    assert!(answer.contains("no RPC is called"), "{answer}");
    for garbage in ["", "{}", "null", "[1,2", "\u{0}", &body[..body.len() / 2]] {
        let answer = says(from.as_str(), "append", garbage).await;
        assert!(answer.contains("\"malformed\""), "{answer}");
    }
    // None of it has hurt.
    herd.store(to.as_str()).commit(Transaction::new().put("k", "1"), TIMEOUT).await.unwrap();

    let mut foreign = herd.config("d");
    foreign.herd = "herd-2".to_owned();
    let request = RaftStore::prepare(&foreign).await.unwrap();
    let refused = herd.raft("a").add_member(request, TIMEOUT).await.unwrap_err();
    assert!(refused.to_string().contains("another herd"), "{refused}");

    // A member that believes in another generation of the store gets nowhere, and says why.
    let config = herd.config("e");
    let request = RaftStore::prepare(&config).await.unwrap();
    let joined = herd.raft("a").add_member(request, TIMEOUT).await.unwrap();
    let late = RaftStore::join(config, Joined { generation: 2, ..joined }, herd.end("e")).await.unwrap();
    herd.plug("e", late);
    let leader = herd.leader_among(&["a", "b", "c"]).await;
    eventually("the leader sees why", async || {
        let survey = herd.raft(&leader).survey(TIMEOUT).await.unwrap();
        let trouble = survey.iter().find(|member| member.name == name("e")).unwrap().trouble.clone();
        trouble.is_some_and(|why| why.contains("generation"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_belongs_to_one_member_of_one_herd() {
    let mut herd = Herd::new(&["a"]).await;
    let config = herd.config("a");
    let twice = RaftStore::open(config.clone(), herd.end("a")).await;
    assert!(
        matches!(&twice, Err(OpenError::Disk { why }) if why.contains("in use")),
        "two processes, one disk"
    );
    herd.stop("a").await;

    let again = RaftStore::create(config.clone(), herd.end("a")).await;
    assert!(matches!(again, Err(OpenError::Occupied { .. })), "a store is begun once");
    let prepared = RaftStore::prepare(&config).await;
    assert!(matches!(prepared, Err(OpenError::Occupied { .. })));
    let mut other = config.clone();
    other.herd = "herd-2".to_owned();
    let opened = RaftStore::open(other, herd.end("a")).await;
    assert!(matches!(&opened, Err(OpenError::Foreign { .. })));
    let mut other = config.clone();
    other.name = name("b");
    let opened = RaftStore::open(other, herd.end("a")).await;
    assert!(matches!(&opened, Err(OpenError::Foreign { .. })));
    let mut hasty = config.clone();
    hasty.times.election = hasty.times.heartbeat * 3;
    assert!(matches!(RaftStore::open(hasty, herd.end("a")).await, Err(OpenError::Times { .. })));

    let found = RaftStore::inspect(&config).await.unwrap();
    let member = Found::Member { herd: "herd-1".to_owned(), name: name("a"), raft_id: 1, generation: 1 };
    assert_eq!(found, member);
    herd.start("a").await;
    herd.settle(&["a"]).await;
    let metadata = std::fs::metadata(config.dir.join("raft.redb")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions());
    assert_eq!(mode & 0o777, 0o600, "the store holds secrets");
}
