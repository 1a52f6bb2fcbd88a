//! A store in this process, shared by several handles, with faults that a test can switch on.
//!
//! Same contract as the Raft store and held to it by the same suite. Left out: disks, members, elections.
//! Each handle belongs to one simulated node: cutting one off leaves the others as they are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgherd_core::types::NodeName;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::state::{Conflict, State};
use crate::store::{CommitError, Health, Keys, Kind, MemberHealth, Revision, Role};
use crate::store::{Snapshot, StoreError, Transaction};

/// The agreement shared by the handles made from it.
#[derive(Clone, Default)]
pub struct Memory {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    state: State,
    nodes: Vec<Arc<Node>>,
}

struct Node {
    name: NodeName,
    view: watch::Sender<Snapshot>,
    health: watch::Sender<Health>,
    faults: watch::Sender<Faults>,
}

#[derive(Clone, Default)]
struct Faults {
    unreachable: bool,
    delay: Duration,
    answers_to_lose: u32,
}

/// One node's handle.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Mutex<Shared>>,
    node: Arc<Node>,
}

impl Memory {
    pub fn new() -> Memory {
        Memory::default()
    }

    pub fn handle(&self, name: &NodeName) -> MemoryStore {
        let mut shared = lock(&self.shared);
        let health = Health {
            kind: Kind::Memory,
            leader: None,
            role: Role::Follower,
            raft_term: 0,
            members: Vec::new(),
            failed: None,
        };
        let node = Arc::new(Node {
            name: name.clone(),
            view: watch::Sender::new(shared.state.snapshot()),
            health: watch::Sender::new(health),
            faults: watch::Sender::default(),
        });
        shared.nodes.push(Arc::clone(&node));
        shared.publish_health();
        MemoryStore { shared: Arc::clone(&self.shared), node }
    }
}

impl Shared {
    fn publish(&self) {
        let snapshot = self.state.snapshot();
        for node in self.nodes.iter().filter(|node| !node.faults.borrow().unreachable) {
            node.view.send_if_modified(|view| {
                let changed = view.revision() != snapshot.revision();
                *view = snapshot.clone();
                changed
            });
        }
    }

    fn publish_health(&self) {
        let member = |node: &Arc<Node>| MemberHealth {
            raft_id: 0,
            name: node.name.clone(),
            address: String::new(),
            host: String::new(),
            voter: true,
            last_contact: None,
            trouble: node.faults.borrow().unreachable.then(|| "cut off by the test".to_owned()),
        };
        let members: Vec<_> = self.nodes.iter().map(member).collect();
        for node in &self.nodes {
            node.health.send_if_modified(|health| {
                let changed = health.members != members;
                health.members.clone_from(&members);
                changed
            });
        }
    }
}

impl MemoryStore {
    /// Cuts this handle off, or connects it again: calls fail at their deadlines, the view stands still.
    pub fn set_unreachable(&self, unreachable: bool) {
        self.node.faults.send_modify(|faults| faults.unreachable = unreachable);
        let shared = lock(&self.shared);
        shared.publish();
        shared.publish_health();
    }

    /// Time that every call through this handle takes.
    pub fn set_delay(&self, delay: Duration) {
        self.node.faults.send_modify(|faults| faults.delay = delay);
    }

    /// The next `count` commits through this handle happen, and their callers learn
    /// [`CommitError::Unknown`].
    pub fn lose_answers(&self, count: u32) {
        self.node.faults.send_modify(|faults| faults.answers_to_lose = count);
    }

    pub async fn read(&self, keys: &Keys, timeout: Duration) -> Result<Snapshot, StoreError> {
        self.reach(timeout).await.map_err(|why| StoreError::Unavailable { why })?;
        Ok(lock(&self.shared).state.snapshot().select(keys))
    }

    pub async fn commit(&self, transaction: Transaction, timeout: Duration) -> Result<Revision, CommitError> {
        let now = lock(&self.shared).state.snapshot();
        transaction.validate(&now).map_err(|why| CommitError::Refused { why })?;
        drop(now);
        self.reach(timeout).await.map_err(|why| CommitError::Unavailable { why })?;
        let mut shared = lock(&self.shared);
        let revision = Revision(shared.state.revision().0 + 1);
        let outcome = shared.state.apply(&transaction, revision);
        if outcome.is_ok() {
            shared.publish();
        }
        let lose = self.node.faults.send_if_modified(|faults| {
            let lose = faults.answers_to_lose > 0;
            faults.answers_to_lose = faults.answers_to_lose.saturating_sub(1);
            lose
        });
        if lose {
            return Err(CommitError::Unknown { why: "the answer was lost by the test".to_owned() });
        }
        outcome.map(|()| revision).map_err(|Conflict(key)| CommitError::Conflict { key })
    }

    pub async fn confirm(
        &self,
        key: &str,
        revision: Revision,
        timeout: Duration,
    ) -> Result<bool, StoreError> {
        let snapshot = self.read(&Keys::one(key), timeout).await?;
        Ok(snapshot.get(key).is_some_and(|entry| entry.revision == revision))
    }

    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.node.view.subscribe()
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        self.node.health.subscribe()
    }

    /// Waits out the delay, and for the handle to be reachable.
    async fn reach(&self, timeout: Duration) -> Result<(), String> {
        let until = Instant::now() + timeout;
        let mut faults = self.node.faults.subscribe();
        let reached = timeout_at(until, async {
            let delay = faults.borrow().delay;
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            faults.wait_for(|faults| !faults.unreachable).await.is_ok()
        });
        match reached.await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(format!("{} is cut off by the test", self.node.name)),
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // A test that panicked while it held the lock has failed already.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
