//! Cancel requests: who a key belongs to, and what of it is being done where.
//!
//! A client gets a number and a key of the proxy's own, and its cancel goes to whatever server is its own at that moment;
//! to what waits here, a statement for a server or a command of the console; or nowhere. While one is on its way the server is not given to anybody else, so that it cannot hit another client's
//! statement (pgbouncer issue 38).
//!
//! Hazard: a key that can be guessed lets anybody cancel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::constant_time;
use tokio::sync::Notify;

use crate::backend::{self, Cancelable};
use crate::net::ServerTls;
use crate::world::{NoRandomness, random};

/// As of protocol 3.0. PostgreSQL's own key with 3.2.
const KEY_BYTES: usize = 4;
const LONG_KEY_BYTES: usize = 32;

/// A client's key, and the server that it has now.
#[derive(Debug)]
struct Slot {
    key: Box<[u8]>,
    has: Mutex<Has>,
    /// None is on its way any more.
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Has {
    work: Option<Work>,
    /// Cancels that are on their way to it, or to the former one, which stays this client's as long as there are any.
    on_their_way: u32,
}

/// What a cancel is about.
#[derive(Clone, Debug)]
enum Work {
    At(Arc<Cancelable>),
    /// What waits in the proxy hears of it.
    Here(Arc<Notify>),
}

impl Slot {
    fn has(&self) -> MutexGuard<'_, Has> {
        self.has.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A cancel that has not arrived.
struct OnItsWay<'a>(&'a Slot);

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        let mut has = self.0.has();
        has.on_their_way -= 1;
        if has.on_their_way == 0 {
            self.0.arrived.notify_one();
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Cancels {
    by_pid: Mutex<HashMap<u32, Arc<Slot>>>,
}

/// A client's number and key; forgotten when it is dropped.
pub(crate) struct Ticket {
    cancels: Arc<crate::world::World>,
    pub(crate) pid: u32,
    slot: Arc<Slot>,
}

impl Ticket {
    pub(crate) fn key(&self) -> &[u8] {
        &self.slot.key
    }

    /// From now on its client has this server. Waits for cancels that are on their way to the former one.
    pub(crate) async fn has(&self, server: Option<&Arc<Cancelable>>) {
        let mut on_their_way = {
            let mut has = self.slot.has();
            has.work = server.cloned().map(Work::At);
            has.on_their_way
        };
        // Most often there are none.
        while on_their_way > 0 {
            self.slot.arrived.notified().await;
            on_their_way = self.slot.has().on_their_way;
        }
    }
}

impl Ticket {
    /// From now on its client waits for something here, and a cancel is told to it; `None`: for nothing.
    pub(crate) fn waits_for(&self, what: Option<&Arc<Notify>>) {
        self.slot.has().work = what.cloned().map(Work::Here);
    }

    /// Its client has no server, and waits for one.
    pub(crate) fn waits(&self) -> Waits<'_> {
        let canceled = Arc::new(Notify::new());
        self.waits_for(Some(&canceled));
        Waits { ticket: self, canceled }
    }
}

/// A client waits for a server as long as there is this.
pub(crate) struct Waits<'a> {
    ticket: &'a Ticket,
    canceled: Arc<Notify>,
}

impl Waits<'_> {
    pub(crate) async fn canceled(&self) {
        self.canceled.notified().await;
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.ticket.waits_for(None);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.cancels.cancels.known().remove(&self.pid);
    }
}

impl Cancels {
    fn known(&self) -> MutexGuard<'_, HashMap<u32, Arc<Slot>>> {
        self.by_pid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `long`: the client speaks a protocol with long keys.
    pub(crate) fn enter(world: &Arc<crate::world::World>, long: bool) -> Result<Ticket, NoRandomness> {
        let mut key = random::<LONG_KEY_BYTES>()?.to_vec();
        if !long {
            key.truncate(KEY_BYTES);
        }
        let slot = Slot { key: key.into(), has: Mutex::default(), arrived: Notify::new() };
        let slot = Arc::new(slot);
        let mut known = world.cancels.known();
        let pid = loop {
            // A process number for whoever shows it as one: positive, and free.
            let pid = u32::from_ne_bytes(random::<4>()?) & 0x7fff_ffff;
            if pid != 0 && !known.contains_key(&pid) {
                break pid;
            }
        };
        known.insert(pid, Arc::clone(&slot));
        drop(known);
        Ok(Ticket { cancels: Arc::clone(world), pid, slot })
    }

    /// Does nothing if nobody has this key, and a client is not told. `false`: it is not of this process.
    pub(crate) async fn cancel(&self, pid: u32, key: &[u8], tls: &dyn ServerTls) -> bool {
        let slot = match self.known().get(&pid) {
            Some(slot) if constant_time::verify_slices_are_equal(&slot.key, key).is_ok() => Arc::clone(slot),
            _ => return false,
        };
        let (server, _arrives) = {
            let mut has = slot.has();
            match has.work.clone() {
                None => return true,
                Some(Work::Here(command)) => {
                    command.notify_one();
                    return true;
                }
                Some(Work::At(server)) => {
                    has.on_their_way += 1;
                    (server, OnItsWay(&slot))
                }
            }
        };
        backend::cancel(&server, tls).await;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::{Context, Waker};

    use bytes::BytesMut;
    use pgherd_core::spec::TlsMode;
    use pgherd_pgwire::message::{Key, build};
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    use super::*;
    use crate::hba::Hba;
    use crate::net::InClear;
    use crate::routes::Target;
    use crate::verifiers::{AuthQuery, Verifiers};
    use crate::world::{Settings, World};

    fn world() -> Arc<World> {
        let query = AuthQuery { user: "proxy".to_owned(), database: "postgres".to_owned(), secret_of: None };
        let verifiers = Verifiers::new(query).unwrap();
        Arc::new(World::new(Settings::new(Hba::default()), Arc::new(InClear), verifiers, Vec::new()))
    }

    /// A server that counts who comes to cancel, and closes when it is told to.
    async fn server() -> (Arc<Cancelable>, Arc<AtomicU32>, oneshot::Sender<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (came, (close, closing)) = (Arc::new(AtomicU32::new(0)), oneshot::channel());
        let counted = Arc::clone(&came);
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 20];
            stream.read_exact(&mut asked).await.unwrap();
            let mut expected = BytesMut::new();
            build::cancel_request(&mut expected, 4711, Key::new(b"keykeyke").unwrap());
            assert_eq!(asked, expected[..]);
            counted.fetch_add(1, Ordering::Relaxed);
            closing.await.unwrap();
            drop(stream);
            while listener.accept().await.is_ok() {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let target = Target { node: "a".parse().unwrap(), address, port, socket_dir: None };
        (
            Arc::new(Cancelable { target, mode: TlsMode::Disable, pid: 4711, key: b"keykeyke".to_vec() }),
            came,
            close,
        )
    }

    #[test]
    fn keys_are_all_different_and_look_like_those_of_postgresql() {
        let world = world();
        let tickets: Vec<Ticket> = (0..500).map(|at| Cancels::enter(&world, at % 2 == 0).unwrap()).collect();
        let keys: BTreeSet<&[u8]> = tickets.iter().map(Ticket::key).collect();
        let pids: BTreeSet<u32> = tickets.iter().map(|ticket| ticket.pid).collect();
        // Of 250 keys of four bytes two are alike once in a hundred thousand times.
        assert!(keys.len() >= 499 && pids.len() == 500, "{} keys, {} numbers", keys.len(), pids.len());
        assert!(pids.iter().all(|pid| *pid > 0 && *pid < 1 << 31), "a number that tools take for negative");
        assert!(tickets.iter().all(|ticket| matches!(ticket.key().len(), KEY_BYTES | LONG_KEY_BYTES)));
        drop(tickets);
        assert!(world.cancels.known().is_empty(), "whoever is gone is forgotten");
    }

    #[tokio::test]
    async fn nothing_but_the_whole_key_cancels() {
        let (world, (who, came, close)) = (world(), server().await);
        let (ticket, other) = (Cancels::enter(&world, true).unwrap(), Cancels::enter(&world, true).unwrap());
        let gone = Cancels::enter(&world, true).unwrap();
        let (gone_pid, gone_key) = (gone.pid, gone.key().to_vec());
        gone.has(Some(&who)).await;
        drop(gone);
        ticket.has(Some(&who)).await;
        let longer = [ticket.key(), &[0]].concat();
        let mut flipped = ticket.key().to_vec();
        flipped[31] ^= 1;
        for key in
            [&b""[..], &ticket.key()[..4], &ticket.key()[..31], &longer, &flipped, other.key(), &gone_key]
        {
            world.cancels.cancel(ticket.pid, key, &InClear).await;
        }
        world.cancels.cancel(other.pid, ticket.key(), &InClear).await;
        world.cancels.cancel(other.pid, other.key(), &InClear).await;
        world.cancels.cancel(gone_pid, &gone_key, &InClear).await;
        close.send(()).unwrap();
        world.cancels.cancel(ticket.pid, ticket.key(), &InClear).await;
        assert_eq!(came.load(Ordering::Relaxed), 1, "the last one came, and no other one");
    }

    #[tokio::test]
    async fn while_a_cancel_is_on_its_way_the_server_is_nobody_elses() {
        let (world, (who, came, close)) = (world(), server().await);
        let ticket = Cancels::enter(&world, false).unwrap();
        ticket.has(Some(&who)).await;
        let canceling = tokio::spawn({
            let (world, pid, key) = (Arc::clone(&world), ticket.pid, ticket.key().to_vec());
            async move { world.cancels.cancel(pid, &key, &InClear).await }
        });
        while came.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        let mut given_back = std::pin::pin!(ticket.has(None));
        let waits = given_back.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
        assert!(waits, "whoever gives the server back has to");
        assert!(
            world.cancels.cancel(ticket.pid, ticket.key(), &InClear).await,
            "it is too late for another one"
        );
        close.send(()).unwrap();
        given_back.await;
        assert_eq!(came.load(Ordering::Relaxed), 1);
        assert!(canceling.await.unwrap());
    }
}
