//! Who is here: one card for each client and each server.
//!
//! A card is made when somebody comes in, and shows what does not change. What changes with every transaction (who has which
//! server, who waits) the pools know, and it is not written here as well. A client's card is also how somebody else ends it:
//! [`Card::dismiss`] leaves word and wakes its task, which looks at [`Card::is_dismissed`] whenever it is polled.
//!
//! Leaves out: what is counted ([`crate::counts`]). Hazard: a card that outlives its client shows somebody who is not there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::SystemTime;

use pgherd_core::types::Instant;
use pgherd_pgwire::startup::Replication;

use crate::clock;
use crate::counts::{Counts, NodeCounts, Pins};
use crate::pool::{ClientId, Place};

/// A client that is in.
#[derive(Debug)]
pub(crate) struct Card {
    pub(crate) id: ClientId,
    pub(crate) address: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) user: Box<str>,
    pub(crate) database: Box<str>,
    pub(crate) application_name: Box<str>,
    pub(crate) replication: Replication,
    pub(crate) is_encrypted: bool,
    pub(crate) came_at: SystemTime,
    /// When its last transaction began.
    asked_us: AtomicU64,
    /// Why it keeps its server, and since when.
    pins: AtomicU32,
    pinned_us: AtomicU64,
    /// That it has prepared under a name.
    pub(crate) statements: Statements,
    dismissed: AtomicBool,
    task: OnceLock<Waker>,
}

/// How many prepared statements somebody has, by the protocol. Nobody knows of a session that has a server of its own: what it says
/// is passed on unread.
#[derive(Debug)]
pub(crate) struct Statements(AtomicU32);

impl Statements {
    const UNKNOWN: u32 = u32::MAX;

    pub(crate) fn set(&self, number: usize) {
        let number = u32::try_from(number).unwrap_or(Self::UNKNOWN - 1);
        // Most often it is the same, and nobody else has to hear of it.
        if self.0.load(Ordering::Relaxed) != number {
            self.0.store(number, Ordering::Relaxed);
        }
    }

    pub(crate) fn forget(&self) {
        self.0.store(Self::UNKNOWN, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> Option<u32> {
        Some(self.0.load(Ordering::Relaxed)).filter(|number| *number != Self::UNKNOWN)
    }
}

impl Default for Statements {
    fn default() -> Statements {
        Statements(AtomicU32::new(Self::UNKNOWN))
    }
}

impl Card {
    pub(crate) fn asked(&self, now: Instant) {
        self.asked_us.store(us(now), Ordering::Relaxed);
    }

    /// When its last transaction began; `None`: it has not had one.
    pub(crate) fn last_asked(&self) -> Option<Instant> {
        from_us(self.asked_us.load(Ordering::Relaxed))
    }

    /// `true`: that is new.
    pub(crate) fn pin(&self, pins: Pins) -> bool {
        if self.pins.swap(pins.0, Ordering::Relaxed) == pins.0 {
            return false;
        }
        self.pinned_us.store(us(clock::now()), Ordering::Relaxed);
        true
    }

    pub(crate) fn unpin(&self) {
        if self.pins.load(Ordering::Relaxed) != 0 {
            self.pins.store(0, Ordering::Relaxed);
        }
    }

    /// Why it keeps its server, and since when; `None`: it does not.
    pub(crate) fn pinned(&self) -> Option<(Pins, Instant)> {
        let pins = Pins(self.pins.load(Ordering::Relaxed));
        let since = from_us(self.pinned_us.load(Ordering::Relaxed)).unwrap_or_else(clock::now);
        (!pins.is_empty()).then_some((pins, since))
    }

    /// Ends the client, whatever it does.
    pub(crate) fn dismiss(&self) {
        self.dismissed.store(true, Ordering::Release);
        if let Some(task) = self.task.get() {
            task.wake_by_ref();
        }
    }

    pub(crate) fn is_dismissed(&self) -> bool {
        self.dismissed.load(Ordering::Acquire)
    }
}

fn us(at: Instant) -> u64 {
    u64::try_from(at.since_boot().as_micros()).unwrap_or(u64::MAX)
}

fn from_us(us: u64) -> Option<Instant> {
    (us > 0).then(|| Instant::from_boot(std::time::Duration::from_micros(us)))
}

/// A server of a pool, as long as it is open.
#[derive(Debug)]
pub(crate) struct ServerCard {
    /// Unlike the pool's own number, unique in this proxy.
    pub(crate) number: u64,
    pub(crate) place: Place,
    /// Nothing for a Unix socket.
    pub(crate) address: Option<SocketAddr>,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) is_encrypted: bool,
    pub(crate) pid: u32,
    pub(crate) opened_at: SystemTime,
    /// That are prepared in it.
    pub(crate) statements: Statements,
    pub(crate) counts: Arc<Counts>,
    pub(crate) node_counts: Arc<NodeCounts>,
}

/// The clients that are in.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    clients: Mutex<BTreeMap<ClientId, Arc<Card>>>,
    /// Numbers of servers.
    pub(crate) next_server: AtomicU64,
}

/// What a client says of itself.
pub(crate) struct Newcomer<'a> {
    pub(crate) id: ClientId,
    pub(crate) address: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) user: &'a str,
    pub(crate) database: &'a str,
    pub(crate) application_name: &'a str,
    pub(crate) replication: Replication,
    pub(crate) is_encrypted: bool,
}

/// An entry that is removed when it is dropped.
pub(crate) struct Entry {
    roster: Arc<Roster>,
    pub(crate) card: Arc<Card>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.roster.all().remove(&self.card.id);
    }
}

impl Roster {
    fn all(&self) -> MutexGuard<'_, BTreeMap<ClientId, Arc<Card>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called in the client's own task, which is woken when it is dismissed.
    pub(crate) async fn enter(self: &Arc<Self>, newcomer: Newcomer<'_>) -> Entry {
        let Newcomer { id, address, local, user, database, application_name, replication, is_encrypted } =
            newcomer;
        let card = Card {
            id,
            address,
            local,
            user: user.into(),
            database: database.into(),
            application_name: application_name.into(),
            replication,
            is_encrypted,
            came_at: SystemTime::now(),
            asked_us: AtomicU64::new(0),
            pins: AtomicU32::new(0),
            pinned_us: AtomicU64::new(0),
            statements: Statements::default(),
            dismissed: AtomicBool::new(false),
            task: OnceLock::new(),
        };
        std::future::poll_fn(|cx| {
            card.task.get_or_init(|| cx.waker().clone());
            std::task::Poll::Ready(())
        })
        .await;
        let card = Arc::new(card);
        self.all().insert(id, Arc::clone(&card));
        Entry { roster: Arc::clone(self), card }
    }

    pub(crate) fn find(&self, id: ClientId) -> Option<Arc<Card>> {
        self.all().get(&id).cloned()
    }

    /// In the order in which they came.
    pub(crate) fn cards(&self) -> Vec<Arc<Card>> {
        self.all().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;
    use crate::counts::Pin;
    use crate::sql::{Tie, Ties};

    async fn enter(roster: &Arc<Roster>, id: u64) -> Entry {
        let here = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1);
        let newcomer = Newcomer {
            id: ClientId(id),
            address: here,
            local: here,
            user: "alice",
            database: "shop",
            application_name: "till",
            replication: Replication::Off,
            is_encrypted: false,
        };
        roster.enter(newcomer).await
    }

    #[tokio::test]
    async fn whoever_has_gone_is_not_shown_and_whoever_is_dismissed_hears_of_it() {
        let roster = Arc::new(Roster::default());
        let first = enter(&roster, 1).await;
        let waiting = {
            let roster = Arc::clone(&roster);
            tokio::spawn(async move {
                let entry = enter(&roster, 2).await;
                std::future::poll_fn(|_| match entry.card.is_dismissed() {
                    true => std::task::Poll::Ready(()),
                    false => std::task::Poll::Pending,
                })
                .await;
            })
        };
        while roster.cards().len() < 2 {
            tokio::task::yield_now().await;
        }
        roster.find(ClientId(2)).unwrap().dismiss();
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap();
        assert_eq!(roster.cards().iter().map(|card| card.id).collect::<Vec<_>>(), [ClientId(1)]);
        drop(first);
        assert!(roster.find(ClientId(1)).is_none() && roster.cards().is_empty());
    }

    #[tokio::test]
    async fn a_pin_lasts_until_it_is_gone_and_is_new_once() {
        let roster = Arc::new(Roster::default());
        let card = Arc::clone(&enter(&roster, 1).await.card);
        assert!(card.pinned().is_none());
        let lock = Pins::of(Ties::of(&[Tie::AdvisoryLock]), None);
        assert!(card.pin(lock) && !card.pin(lock));
        let (pins, _) = card.pinned().unwrap();
        assert_eq!(pins.iter().collect::<Vec<_>>(), [Pin::AdvisoryLock]);
        card.unpin();
        assert!(card.pinned().is_none());
        assert!(card.pin(lock), "it is counted again");
    }

    /// What a client costs that says nothing, besides its session: docs/concepts/console.md says so.
    #[test]
    fn a_card_is_small() {
        assert_eq!((size_of::<Card>(), size_of::<crate::counts::Meter>()), (192, 88));
    }
}
