//! The one thread that has the privileges: it does what it was told last, and what is due by the clock.
//!
//! It never holds an address beyond what the main loop has said last, so a loop that is stuck loses it in time although
//! this thread is well; if the thread is not, the kernel does it.
//!
//! Hazard: whatever is waited for here delays the moment in which an address goes. Nothing is, but the kernel's answers.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pgherd_core::action::Address;
use pgherd_core::spec::VipSpec;
use pgherd_core::types::Instant;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio::sync::{oneshot, watch};

use super::announce::{Neighbours, station};
use super::netlink::{self, Netlink, Present};
use super::{privilege, sockets};
use crate::clock;

/// After it was taken, the address is announced so often: at once, soon after for whoever lost that, and later for
/// switches and neighbours that were not listening yet.
const ANNOUNCE_AFTER_MS: [u64; 7] = [0, 100, 500, 1_000, 2_000, 5_000, 10_000];
/// While somebody else claims it, neighbours are put right so often.
const DEFEND_EVERY: Duration = Duration::from_secs(1);
/// For so long after it was last heard a claim is shown.
const CLAIM_LASTS: Duration = Duration::from_secs(30);
/// A lifetime is prolonged when that gains so much: others who watch addresses need not hear of each proof.
const PROLONG_BY: Duration = Duration::from_millis(500);
/// Where nothing is held, what would be in the way is looked for so often.
const INSPECT_EVERY: Duration = Duration::from_secs(2);
/// Whoever is about to shut clients out waits no longer for the address to go; the kernel takes it in time.
const SETTLE_WITHIN: Duration = Duration::from_millis(500);

/// What the main loop wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) vip: Option<VipSpec>,
    /// PostgreSQL's.
    pub(crate) port: u16,
    pub(crate) address: Address,
}

/// What has come of it, for those who show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) held: Option<VipSpec>,
    /// Why this host cannot have it.
    pub(crate) trouble: Option<String>,
    /// The station that has said that it has the address as well.
    pub(crate) claimed_by: Option<String>,
}

enum Order {
    Wish(Wish),
    Settle(oneshot::Sender<()>),
}

/// The way to the thread. Clones lead to the same one.
#[derive(Clone, Debug)]
pub struct Keeper {
    orders: mpsc::Sender<Order>,
    wake: Arc<OwnedFd>,
    state: watch::Receiver<State>,
}

impl Keeper {
    /// To be called while the process has one thread: afterwards only the one that it starts is privileged.
    pub fn start() -> io::Result<Keeper> {
        let (orders, received) = mpsc::channel();
        let (state, shown) = watch::channel(State::default());
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (missing, wakes) = (privilege::missing(), Arc::clone(&wake));
        let netlink = Netlink::route()?;
        std::thread::Builder::new().name("address".to_owned()).spawn(move || {
            let missing = missing.or_else(privilege::keep_for_this_thread);
            let wish = Wish::default();
            Thread {
                received,
                wakes,
                state,
                netlink,
                missing,
                wish,
                held: None,
                clean: false,
                inspect_at: None,
            }
            .run();
        })?;
        privilege::renounce()?;
        Ok(Keeper { orders, wake, state: shown })
    }

    /// The newest one counts. Never waits.
    pub(crate) fn wish(&self, wish: Wish) {
        self.order(Order::Wish(wish));
    }

    /// Returns when everything that was wished for before is done.
    pub(crate) async fn settled(&self) {
        let (done, settled) = oneshot::channel();
        self.order(Order::Settle(done));
        if !matches!(tokio::time::timeout(SETTLE_WITHIN, settled).await, Ok(Ok(()))) {
            tracing::warn!("the address that moves with the gate is not known to be gone; it goes by itself");
        }
    }

    fn order(&self, order: Order) {
        // Both fail only when the thread is gone, and then the address goes by itself.
        let sent = self.orders.send(order).map_err(|_| io::Error::other("the thread has ended"));
        let woken = sent.and_then(|()| Ok(rustix::io::write(&*self.wake, &1_u64.to_ne_bytes())?));
        if let Err(error) = woken {
            tracing::error!(%error, "the address that moves with the gate cannot be seen to");
        }
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }
}

struct Thread {
    received: mpsc::Receiver<Order>,
    wakes: Arc<OwnedFd>,
    state: watch::Sender<State>,
    netlink: Netlink,
    /// The capabilities that it was not given.
    missing: Option<&'static str>,
    wish: Wish,
    held: Option<Held>,
    /// Nothing of a former life of this agent is left on this host.
    clean: bool,
    inspect_at: Option<Instant>,
}

/// An address that this thread has set.
#[derive(Debug)]
struct Held {
    vip: VipSpec,
    link: u32,
    /// By what the main loop has said.
    until: Instant,
    /// As it was last told to the kernel, which may be a little late.
    lives_until: Instant,
    neighbours: Option<Neighbours>,
    taken: Instant,
    announced: usize,
    defended: Option<Instant>,
    claimed: Option<([u8; 6], Instant)>,
}

impl Held {
    /// Where the kernel was not told of more in time, it is late with what it does at this moment.
    fn ends_at(&self) -> Instant {
        self.until.min(self.lives_until)
    }

    fn announces_at(&self) -> Option<Instant> {
        let after = ANNOUNCE_AFTER_MS.get(self.announced)?;
        self.neighbours.as_ref().map(|_| self.taken + Duration::from_millis(*after))
    }
}

impl Thread {
    fn run(mut self) {
        loop {
            let mut waiting = Vec::new();
            loop {
                match self.received.try_recv() {
                    Ok(Order::Wish(wish)) => self.take_up(wish),
                    Ok(Order::Settle(done)) => waiting.push(done),
                    Err(mpsc::TryRecvError::Empty) => break,
                    // The agent ends. The address is left to the next one, for as long as it lives.
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            }
            self.follow(clock::now());
            for done in waiting {
                let _gave_up_waiting = done.send(());
            }
            self.tend(clock::now());
            self.sleep(clock::now());
        }
    }

    fn take_up(&mut self, wish: Wish) {
        if wish.vip != self.wish.vip {
            self.clean = false;
            self.inspect_at = None;
        }
        self.wish = wish;
    }

    /// Brings what is there to what is wanted.
    fn follow(&mut self, now: Instant) {
        if let (Some(held), Address::Hold { until }) = (&mut self.held, self.wish.address) {
            held.until = until;
        }
        let ends = self.held.as_ref().is_some_and(|held| {
            let other = self.wish.vip.as_ref() != Some(&held.vip);
            self.wish.address == Address::Drop || other || now >= held.ends_at()
        });
        if ends {
            self.give_up();
        }
        let Some(vip) = self.wish.vip.clone() else {
            self.show(None);
            return;
        };
        match self.wish.address {
            Address::Hold { until } if now < until => {
                let life = until.since(now);
                match &self.held {
                    Some(_) => self.prolong(now, life),
                    None => self.take(vip, now, until),
                }
            }
            Address::Drop if !self.clean => self.clear(&vip),
            Address::Hold { .. } | Address::Drop | Address::Leave => {}
        }
    }

    fn take(&mut self, vip: VipSpec, now: Instant, until: Instant) {
        // The kernel counts in whole seconds, and it has to be gone by then.
        let life = Duration::from_secs(until.since(now).as_secs());
        if life.is_zero() {
            return;
        }
        match self.try_take(&vip, life) {
            Ok((link, neighbours)) => {
                tracing::info!(%vip, "clients are let in here, and the address has been taken");
                let held = Held {
                    vip,
                    link,
                    until,
                    lives_until: now + life,
                    neighbours,
                    taken: now,
                    announced: 0,
                    defended: None,
                    claimed: None,
                };
                (self.held, self.clean) = (Some(held), false);
                self.show(None);
            }
            Err(why) => self.show(Some(why)),
        }
    }

    fn try_take(&mut self, vip: &VipSpec, life: Duration) -> Result<(u32, Option<Neighbours>), String> {
        let address = vip.address.address;
        let failed = |error: io::Error| format!("{vip} cannot be set: {error}");
        let link = self.obstacles(vip)?;
        if !sockets::somebody_listens(address, self.wish.port).map_err(failed)? {
            return Err(format!("PostgreSQL does not listen on {address} until it is restarted"));
        }
        for present in self.netlink.present(address).map_err(failed)? {
            // Of a former life, on another interface or in another network.
            if (present.link, present.address) != (link.index, vip.address) {
                self.netlink.remove(present.link, present.address).map_err(failed)?;
            }
        }
        let neighbours = match Neighbours::of(&link, address) {
            Ok(neighbours) => neighbours,
            Err(error) => {
                tracing::error!(%vip, %error, "nobody can be told where the address is");
                None
            }
        };
        self.netlink.set(link.index, vip.address, life).map_err(failed)?;
        Ok((link.index, neighbours))
    }

    /// The interface, unless something is in the way.
    fn obstacles(&mut self, vip: &VipSpec) -> Result<netlink::Link, String> {
        let interface = &vip.interface;
        if let Some(missing) = self.missing {
            return Err(format!("this agent was started without {missing}, and cannot set {vip}"));
        }
        let failed = |error: io::Error| format!("{interface} cannot be looked at: {error}");
        let link = self.netlink.link(interface).map_err(failed)?;
        let link = link.ok_or_else(|| format!("there is no interface {interface} on this host"))?;
        if !link.is_up {
            return Err(format!("the interface {interface} is down"));
        }
        let present = self.netlink.present(vip.address.address).map_err(failed)?;
        if present.iter().any(|present| !is_ours(present)) {
            let address = vip.address.address;
            return Err(format!("{address} is on this host already, and was not put there by pgherd"));
        }
        Ok(link)
    }

    fn prolong(&mut self, now: Instant, life: Duration) {
        let life = Duration::from_secs(life.as_secs());
        let Some(held) = &mut self.held else { return };
        let gains = (now + life).since(held.lives_until);
        if life.is_zero() || gains < PROLONG_BY {
            return;
        }
        match self.netlink.set(held.link, held.vip.address, life) {
            Ok(()) => held.lives_until = now + life,
            Err(error) => {
                let why = format!("{} cannot be kept: {error}", held.vip);
                self.held = None;
                self.show(Some(why));
            }
        }
    }

    /// Ends the connections that would be cut off without a word, then removes it.
    fn give_up(&mut self) {
        let Some(held) = self.held.take() else { return };
        self.end_connections(held.vip.address.address);
        match self.netlink.remove(held.link, held.vip.address) {
            Ok(true) => tracing::info!(vip = %held.vip, "the address has been given up"),
            Ok(false) => tracing::info!(vip = %held.vip, "the address has gone by itself"),
            Err(error) => {
                tracing::error!(vip = %held.vip, %error, "the address cannot be given up, and goes by itself");
            }
        }
        self.clean = true;
        self.show(None);
    }

    fn end_connections(&self, address: IpAddr) {
        match sockets::end_all_of(address) {
            Ok(Some(ended)) => tracing::debug!(%address, ended, "connections were reset"),
            Ok(None) => {
                tracing::info!(%address, "this kernel resets no connections; clients notice by their keepalives");
            }
            Err(error) => tracing::warn!(%address, %error, "connections cannot be reset"),
        }
    }

    /// Removes what a former life of this agent has left.
    fn clear(&mut self, vip: &VipSpec) {
        self.clean = true;
        if self.missing.is_some() {
            return;
        }
        let address = vip.address.address;
        let left = self.netlink.present(address).unwrap_or_default();
        for present in left.iter().filter(|present| is_ours(present)) {
            self.end_connections(address);
            match self.netlink.remove(present.link, present.address) {
                Ok(_) => tracing::info!(%vip, "an address that was left here has been removed"),
                Err(error) => {
                    tracing::error!(%vip, %error, "an address that was left here cannot be removed");
                }
            }
        }
    }

    /// What is due by the clock: announcements, answers to those of others, and a look at what is in the way.
    fn tend(&mut self, now: Instant) {
        if let Some(held) = &mut self.held {
            let claims = held.neighbours.as_ref().map(Neighbours::others).and_then(Result::ok);
            let mut due = held.announces_at().is_some_and(|at| now >= at);
            held.announced += usize::from(due);
            // The first probe is as easily lost as an announcement, and nobody answers those.
            if due && let Some(Err(error)) = held.neighbours.as_ref().map(Neighbours::probe) {
                tracing::warn!(vip = %held.vip, %error, "cannot ask whether somebody else has the address");
            }
            if let Some(mac) = claims.and_then(|claims| claims.last().copied()) {
                if held.claimed.is_none_or(|(before, _)| before != mac) {
                    let station = station(mac);
                    tracing::warn!(vip = %held.vip, station, "another host says that it has this address");
                }
                held.claimed = Some((mac, now));
                if held.defended.is_none_or(|at| now.since(at) >= DEFEND_EVERY) {
                    held.defended = Some(now);
                    due = true;
                }
            }
            if held.claimed.is_some_and(|(_, at)| now.since(at) >= CLAIM_LASTS) {
                held.claimed = None;
            }
            if due && let Some(Err(error)) = held.neighbours.as_ref().map(Neighbours::announce) {
                tracing::warn!(vip = %held.vip, %error, "the address cannot be announced");
            }
            let claimed = held.claimed.map(|(mac, _)| station(mac));
            self.state.send_if_modified(|state| {
                let changed = state.claimed_by != claimed;
                state.claimed_by = claimed;
                changed
            });
            return;
        }
        let wants = matches!(self.wish.address, Address::Hold { .. });
        if wants || self.inspect_at.is_some_and(|at| now < at) {
            return;
        }
        if let Some(vip) = self.wish.vip.clone() {
            self.inspect_at = Some(now + INSPECT_EVERY);
            let why = self.obstacles(&vip).err();
            self.show(why);
        }
    }

    /// Until there is news, or something is due.
    fn sleep(&self, now: Instant) {
        let due = match &self.held {
            Some(held) => [Some(held.ends_at()), held.announces_at()].into_iter().flatten().min(),
            None => self.inspect_at,
        };
        let pause = due.map_or(INSPECT_EVERY, |at| at.since(now)).min(INSPECT_EVERY);
        let pause = Timespec { tv_sec: pause.as_secs().cast_signed(), tv_nsec: pause.subsec_nanos().into() };
        let neighbours = self.held.as_ref().and_then(|held| held.neighbours.as_ref());
        let mut polled = vec![PollFd::new(&*self.wakes, PollFlags::IN)];
        polled.extend(neighbours.map(|neighbours| PollFd::new(neighbours, PollFlags::IN)));
        match poll(&mut polled, Some(&pause)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "cannot wait for what becomes of the address"),
        }
        // An eventfd is read in one piece; an empty one says that nobody has called.
        let _calls = rustix::io::read(&*self.wakes, &mut [0; 8]);
    }

    fn show(&self, trouble: Option<String>) {
        let held = self.held.as_ref().map(|held| held.vip.clone());
        self.state.send_if_modified(|state| {
            if let (Some(why), true) = (&trouble, state.trouble != trouble) {
                tracing::warn!(why, "this host cannot have the address that moves with the gate");
            }
            let claimed_by = state.claimed_by.clone().filter(|_| held.is_some());
            let after = State { held, trouble, claimed_by };
            let changed = *state != after;
            *state = after;
            changed
        });
    }
}

/// An address with an end and the mark; kernels that know no marks show none.
fn is_ours(present: &Present) -> bool {
    let marked = match present.mark {
        Some(mark) => mark == netlink::OURS,
        None => !netlink::kernel_knows_marks(),
    };
    !present.permanent && marked
}
