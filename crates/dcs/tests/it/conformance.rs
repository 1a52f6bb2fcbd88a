//! What every store promises, run over each of them: the handles given are of different nodes.

use std::time::Duration;

use pgherd_dcs::{CommitError, Keys, Memory, Revision, Store, StoreError, Transaction};

use crate::herd::{Herd, TIMEOUT, name};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    let memory = Memory::new();
    let stores: Vec<Store> = ["a", "b", "c"].map(|node| memory.handle(&name(node)).into()).into();
    conforms(&stores).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_with_three_members() {
    let herd = Herd::new(&["a", "b", "c"]).await;
    conforms(&herd.stores()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_with_one_member() {
    let herd = Herd::new(&["a"]).await;
    conforms(&[herd.store("a"), herd.store("a")]).await;
}

async fn conforms(stores: &[Store]) {
    an_empty_store_reads_empty(stores).await;
    a_transaction_is_all_or_nothing(stores).await;
    a_write_is_read_through_every_handle(stores).await;
    increments_are_never_lost(stores).await;
    one_of_many_creators_wins(stores).await;
    a_confirmation_ends_with_the_next_write(stores).await;
    reads_select_keys_at_one_moment(stores).await;
    values_are_any_bytes(stores).await;
    watches_end_with_the_last_state(stores).await;
    what_breaks_a_limit_is_refused(stores).await;
}

async fn an_empty_store_reads_empty(stores: &[Store]) {
    for store in stores {
        assert!(store.read(&Keys::All, TIMEOUT).await.unwrap().is_empty());
        assert!(!store.confirm("nothing", Revision(0), TIMEOUT).await.unwrap());
    }
}

async fn a_transaction_is_all_or_nothing(stores: &[Store]) {
    let store = &stores[0];
    let both = Transaction::new().require_absent("x").require_absent("y").put("x", "1").put("y", "1");
    let first = store.commit(both.clone(), TIMEOUT).await.unwrap();
    let again = stores[1].commit(both, TIMEOUT).await.unwrap_err();
    assert_eq!(again, CommitError::Conflict { key: "x".to_owned() });

    let half =
        Transaction::new().require("x", first).require("y", Revision(first.0 + 1)).put("x", "2").delete("y");
    let refused = stores[1].commit(half, TIMEOUT).await.unwrap_err();
    assert_eq!(refused, CommitError::Conflict { key: "y".to_owned() });
    let seen = store.read(&Keys::All, TIMEOUT).await.unwrap();
    assert_eq!((seen.get("x").unwrap().value.as_slice(), seen.len()), (b"1".as_slice(), 2));

    let right = Transaction::new().require("x", first).require("y", first).put("x", "2").delete("y");
    let second = stores[1].commit(right, TIMEOUT).await.unwrap();
    assert!(second > first);
    let seen = store.read(&Keys::All, TIMEOUT).await.unwrap();
    assert_eq!(seen.get("x").unwrap().revision, second);
    assert!(seen.get("y").is_none());
    assert_eq!(seen.revision(), second);
    store.commit(Transaction::new().delete("x").delete("never there"), TIMEOUT).await.unwrap();
}

async fn a_write_is_read_through_every_handle(stores: &[Store]) {
    for round in 0..10 {
        for writer in stores {
            let revision =
                writer.commit(Transaction::new().put("here", format!("{round}")), TIMEOUT).await.unwrap();
            for reader in stores {
                let seen = reader.read(&Keys::one("here"), TIMEOUT).await.unwrap();
                assert_eq!(seen.get("here").unwrap().revision, revision, "a read came from the past");
            }
        }
    }
}

async fn increments_are_never_lost(stores: &[Store]) {
    const TASKS: usize = 6;
    const EACH: u64 = 10;
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let store = stores[task % stores.len()].clone();
            tokio::spawn(async move {
                for _ in 0..EACH {
                    while !increment(&store).await {}
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let seen = stores[0].read(&Keys::one("counter"), TIMEOUT).await.unwrap();
    let count: u64 = String::from_utf8(seen.get("counter").unwrap().value.clone()).unwrap().parse().unwrap();
    assert_eq!(count, TASKS as u64 * EACH);
}

async fn increment(store: &Store) -> bool {
    let seen = store.read(&Keys::one("counter"), TIMEOUT).await.unwrap();
    let entry = seen.get("counter");
    let count: u64 = entry.map_or(0, |entry| std::str::from_utf8(&entry.value).unwrap().parse().unwrap());
    let next = Transaction::new().require_unchanged("counter", entry).put("counter", (count + 1).to_string());
    match store.commit(next, TIMEOUT).await {
        Ok(_) => true,
        Err(CommitError::Conflict { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

async fn one_of_many_creators_wins(stores: &[Store]) {
    let tasks: Vec<_> = (0..12)
        .map(|task| {
            let store = stores[task % stores.len()].clone();
            let create = Transaction::new().require_absent("crown").put("crown", task.to_string());
            tokio::spawn(async move { store.commit(create, TIMEOUT).await })
        })
        .collect();
    let mut winners = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => winners += 1,
            Err(error) => assert_eq!(error, CommitError::Conflict { key: "crown".to_owned() }),
        }
    }
    assert_eq!(winners, 1);
}

async fn a_confirmation_ends_with_the_next_write(stores: &[Store]) {
    let first = stores[0].commit(Transaction::new().put("term", "1"), TIMEOUT).await.unwrap();
    for store in stores {
        assert!(store.confirm("term", first, TIMEOUT).await.unwrap());
    }
    stores[1].commit(Transaction::new().put("other", "1"), TIMEOUT).await.unwrap();
    assert!(stores[0].confirm("term", first, TIMEOUT).await.unwrap(), "another key's write changes nothing");
    let second =
        stores[1].commit(Transaction::new().require("term", first).put("term", "1"), TIMEOUT).await.unwrap();
    for store in stores {
        assert!(!store.confirm("term", first, TIMEOUT).await.unwrap(), "the same value is another revision");
        assert!(store.confirm("term", second, TIMEOUT).await.unwrap());
    }
    stores[0].commit(Transaction::new().delete("term"), TIMEOUT).await.unwrap();
    assert!(!stores[1].confirm("term", second, TIMEOUT).await.unwrap());
}

async fn reads_select_keys_at_one_moment(stores: &[Store]) {
    let put = Transaction::new().put("p/1", "").put("p/2", "").put("q", "");
    stores[0].commit(put, TIMEOUT).await.unwrap();
    let names = async |keys: Keys| {
        let seen = stores[1].read(&keys, TIMEOUT).await.unwrap();
        seen.iter().map(|(key, _)| key.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(Keys::prefix("p/")).await, ["p/1", "p/2"]);
    assert_eq!(names(Keys::These(vec!["q".into(), "none".into()])).await, ["q"]);
    assert!(names(Keys::prefix("none/")).await.is_empty());

    // Two keys that are always written together are never seen apart.
    let writer = stores[0].clone();
    let writing = tokio::spawn(async move {
        for round in 0..30 {
            let both = Transaction::new().put("p/1", round.to_string()).put("p/2", round.to_string());
            writer.commit(both, TIMEOUT).await.unwrap();
        }
    });
    while !writing.is_finished() {
        let seen = stores[1].read(&Keys::prefix("p/"), TIMEOUT).await.unwrap();
        assert_eq!(seen.get("p/1").unwrap(), seen.get("p/2").unwrap());
    }
    writing.await.unwrap();
}

async fn values_are_any_bytes(stores: &[Store]) {
    let values: [&[u8]; 5] =
        [b"", b"{\"json\":\"\\u0000\"}", b"\x00\xff\xfe", "größer".as_bytes(), &[0x80; 70_000]];
    for value in values {
        stores[0].commit(Transaction::new().put("bytes", value), TIMEOUT).await.unwrap();
        let seen = stores[1].read(&Keys::one("bytes"), TIMEOUT).await.unwrap();
        assert_eq!(seen.get("bytes").unwrap().value, value);
    }
}

async fn watches_end_with_the_last_state(stores: &[Store]) {
    let mut views: Vec<_> = stores.iter().map(Store::watch).collect();
    let mut last = Revision(0);
    for round in 0..40_usize {
        let store = &stores[round % stores.len()];
        last = store.commit(Transaction::new().put("seen", round.to_string()), TIMEOUT).await.unwrap();
    }
    for view in &mut views {
        let mut before = Revision(0);
        let waiting = view.wait_for(|view| {
            assert!(view.revision() >= before, "a view went back");
            before = view.revision();
            view.revision() == last
        });
        let seen =
            tokio::time::timeout(TIMEOUT, waiting).await.expect("every view arrives at the end").unwrap();
        assert_eq!(seen.get("seen").unwrap().value, b"39");
    }
    let unchanged = stores[0].watch();
    let refused = Transaction::new().require_absent("seen").put("seen", "never");
    stores[1].commit(refused, TIMEOUT).await.unwrap_err();
    stores[0].read(&Keys::All, TIMEOUT).await.unwrap();
    assert!(!unchanged.has_changed().unwrap(), "what changed nothing wakes nobody");
}

async fn what_breaks_a_limit_is_refused(stores: &[Store]) {
    let large = Transaction::new().put("large", vec![b'x'; pgherd_dcs::MAX_VALUE_BYTES + 1]);
    let Err(CommitError::Refused { why }) = stores[1].commit(large, TIMEOUT).await else {
        panic!("a value beyond the limit was taken")
    };
    assert!(why.contains("the limit is"), "{why}");
    let largest = Transaction::new().put("large", vec![b'x'; pgherd_dcs::MAX_VALUE_BYTES]);
    stores[1].commit(largest, TIMEOUT).await.unwrap();
    stores[0].commit(Transaction::new().delete("large"), TIMEOUT).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn memory_faults_hit_one_handle_only() {
    let memory = Memory::new();
    let (a, b) = (memory.handle(&name("a")), memory.handle(&name("b")));
    let view = b.watch();
    b.set_unreachable(true);
    let store: Store = b.clone().into();
    let short = Duration::from_millis(200);
    let unavailable = StoreError::Unavailable { why: "b is cut off by the test".to_owned() };
    assert_eq!(store.read(&Keys::All, short).await, Err(unavailable.clone()));
    assert_eq!(store.confirm("k", Revision(1), short).await, Err(unavailable));
    a.commit(Transaction::new().put("k", "1"), short).await.unwrap();
    assert!(view.borrow().is_empty(), "the view of a handle that is cut off stands still");
    b.set_unreachable(false);
    assert_eq!(view.borrow().get("k").unwrap().value, b"1");

    a.lose_answers(1);
    let lost = a.commit(Transaction::new().put("k", "2"), short).await;
    assert!(matches!(lost, Err(CommitError::Unknown { .. })));
    assert_eq!(view.borrow().get("k").unwrap().value, b"2", "an unknown commit may have happened");

    b.set_delay(Duration::from_millis(500));
    assert!(b.read(&Keys::All, short).await.is_err());
    assert!(b.read(&Keys::All, Duration::from_secs(1)).await.is_ok());
}
