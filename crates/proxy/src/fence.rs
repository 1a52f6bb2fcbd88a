//! What everybody in a proxy knows of the routes, and who is told when it changes.
//!
//! An [`Admission`] says of one server connection whether it may be used at this moment. Most often that costs a look at a
//! number and at the clock. Leaves out what a route is ([`crate::routes`]). Hazard: a connection to a former primary that
//! still takes statements.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;

use pgherd_core::types::{Instant, Lsn, NodeName, Term};
use tokio::sync::watch;

use crate::clock;
use crate::pool::Place;
use crate::pools::Seat;
use crate::roster::ServerCard;
use crate::routes::{Role, Route, Routes, Table};

#[derive(Debug)]
pub(crate) struct Fence {
    routes: Mutex<Routes>,
    /// Rises with every table.
    version: AtomicU64,
    changes: watch::Sender<u64>,
    /// Of the server connections.
    bells: Mutex<Vec<Weak<Bell>>>,
    hold_ms: AtomicU64,
    /// Standbys that an operator wants to be sent nothing.
    detached: Mutex<BTreeSet<NodeName>>,
}

/// May a server connection be used now?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Admitted,
    /// For what is under way; nothing is to be begun.
    Draining,
    /// Nobody knows at the moment.
    Unknown,
    /// Never again.
    Superseded,
}

impl Fence {
    /// A session that hears nothing of the route of its server for `hold` is ended.
    pub(crate) fn new(hold: Duration) -> Fence {
        let fence = Fence {
            routes: Mutex::default(),
            version: AtomicU64::new(1),
            changes: watch::Sender::new(1),
            bells: Mutex::default(),
            hold_ms: AtomicU64::new(0),
            detached: Mutex::default(),
        };
        fence.set_hold(hold);
        fence
    }

    pub(crate) fn set_hold(&self, hold: Duration) {
        self.hold_ms.store(u64::try_from(hold.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn hold(&self) -> Duration {
        Duration::from_millis(self.hold_ms.load(Ordering::Relaxed))
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        locked(&self.routes)
    }

    /// `false`: the table is of a former term.
    pub(crate) fn learn(&self, table: Table) -> bool {
        let learnt = self.routes().learn(table);
        if learnt {
            self.look_again();
        }
        learnt
    }

    pub(crate) fn route(&self, role: &Role) -> Route {
        self.routes().route(role, clock::now())
    }

    /// Where what is under way can go on.
    pub(crate) fn place(&self, role: &Role) -> Route {
        self.routes().place(role, clock::now())
    }

    /// See [`Routes::fork`].
    pub(crate) fn fork(&self, former: Term, now: Term) -> Option<Lsn> {
        self.routes().fork(former, now)
    }

    pub(crate) fn standbys(&self) -> Vec<(NodeName, u32)> {
        let mut standbys = self.routes().standbys();
        let detached = self.detached();
        standbys.retain(|(node, _)| !detached.contains(node));
        standbys
    }

    pub(crate) fn detached(&self) -> MutexGuard<'_, BTreeSet<NodeName>> {
        locked(&self.detached)
    }

    /// Could an agent prove now what is known of the routes?
    pub(crate) fn is_proven(&self) -> bool {
        self.routes().is_proven(clock::now())
    }

    /// When [`Fence::route`] changes by itself.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.routes().wake_at()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// One that rings with every change from now on, for as long as it is there.
    pub(crate) fn bell(&self) -> Arc<Bell> {
        let bell = Arc::default();
        let mut bells = locked(&self.bells);
        if bells.len() == bells.capacity() {
            bells.retain(|bell| bell.strong_count() > 0);
        }
        bells.push(Arc::downgrade(&bell));
        bell
    }

    /// Every session asks again.
    pub(crate) fn look_again(&self) {
        // Before anybody is woken: whoever takes a bell that has rung already sees this version.
        let version = self.version.fetch_add(1, Ordering::AcqRel) + 1;
        self.changes.send_replace(version);
        locked(&self.bells).retain(|bell| bell.upgrade().inspect(|bell| bell.ring()).is_some());
    }
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes whoever uses a server connection when the routes change.
///
/// It is the connection's, and hangs as long as that lives: a client that is lent it only says that it is the one to be woken.
/// Whoever was the last one stays so, and may be woken for nothing.
#[derive(Debug, Default)]
pub(crate) struct Bell(Mutex<Option<Waker>>);

impl Bell {
    fn ring(&self) {
        if let Some(waker) = &*locked(&self.0) {
            waker.wake_by_ref();
        }
    }

    fn wakes(&self, waker: &Waker) {
        let mut woken = locked(&self.0);
        if !woken.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *woken = Some(waker.clone());
        }
    }
}

/// By which version of the table a server was admitted, and until when that holds by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Admitted {
    seen: u64,
    until: Instant,
}

impl Default for Admitted {
    /// By none.
    fn default() -> Admitted {
        Admitted { seen: 0, until: Instant::from_boot(Duration::ZERO) }
    }
}

/// The right to use one server connection.
#[derive(Debug)]
pub(crate) struct Admission {
    fence: Arc<Fence>,
    role: Role,
    place: Place,
    admitted: Admitted,
    unknown_since: Option<Instant>,
    /// When it was looked at last.
    looked_at: Instant,
    /// What goes over it is counted here.
    card: Option<Arc<ServerCard>>,
    /// Where it is noted that its client rests while the server is drained.
    seat: Option<Seat>,
    bell: Arc<Bell>,
}

impl Admission {
    /// `bell`: the connection's.
    pub(crate) fn new(
        fence: Arc<Fence>,
        role: Role,
        place: Place,
        bell: Arc<Bell>,
        seat: Option<Seat>,
    ) -> Admission {
        Admission {
            fence,
            role,
            place,
            bell,
            seat,
            card: None,
            looked_at: Instant::from_boot(Duration::ZERO),
            admitted: Admitted::default(),
            unknown_since: None,
        }
    }

    pub(crate) fn counting(self, card: Option<Arc<ServerCard>>) -> Admission {
        Admission { card, ..self }
    }

    /// The same server was admitted so, and need not be looked up again as long as that holds.
    pub(crate) fn admitted_before(self, admitted: Admitted) -> Admission {
        Admission { admitted, ..self }
    }

    pub(crate) fn admitted(&self) -> Admitted {
        self.admitted
    }

    pub(crate) fn card(&self) -> Option<&ServerCard> {
        self.card.as_deref()
    }

    /// When [`Admission::verdict`] was asked for last.
    pub(crate) fn looked_at(&self) -> Instant {
        self.looked_at
    }

    /// From now on this is woken whenever the verdict may be another one; to be called before it is asked for.
    pub(crate) fn wakes(&self, waker: &Waker) {
        self.bell.wakes(waker);
    }

    /// Notes whether the client begins nothing until the verdict is another one. `true`: that is new.
    pub(crate) fn rest(&mut self, rests: bool) -> bool {
        self.seat.as_mut().is_some_and(|seat| seat.rest(rests))
    }

    /// A standby goes on being one under the next primary, and what was begun there with it: somewhere else it would be lost.
    fn is_at(&self, place: &Place) -> bool {
        match self.role {
            Role::Primary => *place == self.place,
            Role::Standby(_) => place.node == self.place.node,
        }
    }

    /// Is it known, while nothing leads here, that nothing ever will? A standby is none for a moment, until it follows the next
    /// primary; one that has become the primary would take writes of those who came to read.
    fn is_over(&self, routes: &Routes, now: Instant) -> bool {
        match self.role {
            Role::Primary => routes.term().is_some_and(|term| term > self.place.term),
            Role::Standby(_) => {
                matches!(routes.place(&Role::Primary, now), Route::To(place, _) if place.node == self.place.node)
            }
        }
    }

    pub(crate) fn verdict(&mut self) -> Verdict {
        let now = clock::now();
        self.looked_at = now;
        let version = self.fence.version.load(Ordering::Acquire);
        if version == self.admitted.seen && now < self.admitted.until {
            return Verdict::Admitted;
        }
        let routes = self.fence.routes();
        match routes.place(&self.role, now) {
            Route::To(place, _) if place == self.place && routes.is_draining(&self.role, &place, now) => {
                self.unknown_since = None;
                Verdict::Draining
            }
            Route::To(place, _) if self.is_at(&place) => {
                let until = match self.role {
                    Role::Primary => routes.wake_at().unwrap_or(now),
                    // Until another table is learnt.
                    Role::Standby(_) => Instant::from_boot(Duration::MAX),
                };
                self.admitted = Admitted { seen: version, until };
                self.unknown_since = None;
                Verdict::Admitted
            }
            Route::To(..) => Verdict::Superseded,
            Route::Hold(_) if self.is_over(&routes, now) => Verdict::Superseded,
            Route::Hold(_) => {
                let since = *self.unknown_since.get_or_insert(now);
                if now.since(since) >= self.fence.hold() { Verdict::Superseded } else { Verdict::Unknown }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use pgherd_core::types::Term;

    use super::*;
    use crate::routes::{Standby, Target};

    fn table(term: u64, node: Option<&str>, lasts: Duration) -> Table {
        let target = |node: &str| Target {
            node: node.parse().unwrap(),
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            port: 5432,
            socket_dir: None,
        };
        Table {
            term: Term(term),
            primary: node.map(target),
            gate_open: true,
            standbys: Vec::new(),
            forks: Vec::new(),
            draining: None,
            valid_until: clock::now() + lasts,
        }
    }

    fn admit(fence: &Arc<Fence>, role: Role, place: Place) -> Admission {
        Admission::new(Arc::clone(fence), role, place, fence.bell(), None)
    }

    #[test]
    fn a_connection_is_good_while_its_place_is_and_never_again_after() {
        let long = Duration::from_secs(60);
        let fence = Arc::new(Fence::new(long));
        let place = Place { node: "a".parse().unwrap(), term: Term(4) };
        let mut admission = admit(&fence, Role::Primary, place.clone());
        assert_eq!(admission.verdict(), Verdict::Unknown, "nobody has said anything");
        fence.learn(table(4, Some("a"), long));
        assert_eq!(admission.verdict(), Verdict::Admitted);
        fence.learn(table(4, None, long));
        assert_eq!(admission.verdict(), Verdict::Unknown);
        fence.learn(table(4, Some("a"), Duration::ZERO));
        assert_eq!(admission.verdict(), Verdict::Unknown, "its proof has run out");
        fence.learn(table(4, Some("a"), long));
        assert_eq!(admission.verdict(), Verdict::Admitted);
        fence.learn(table(5, None, long));
        assert_eq!(admission.verdict(), Verdict::Superseded, "whoever will be the primary");
        assert!(!fence.learn(table(4, Some("a"), long)));
        assert_eq!(admission.verdict(), Verdict::Superseded);
        let mut other = admit(&fence, Role::Primary, Place { term: Term(5), ..place });
        fence.learn(table(5, Some("b"), long));
        assert_eq!(other.verdict(), Verdict::Superseded);
    }

    #[test]
    fn a_reader_goes_on_until_another_table_is_heard() {
        let fence = Arc::new(Fence::new(Duration::ZERO));
        let standby: NodeName = "s".parse().unwrap();
        let of = |term, standbys, lasts| {
            let target = Target {
                node: "s".parse().unwrap(),
                address: std::net::Ipv4Addr::LOCALHOST.into(),
                port: 5432,
                socket_dir: None,
            };
            let standbys = if standbys { vec![Standby { target, weight: 1 }] } else { Vec::new() };
            Table { standbys, ..table(term, Some("a"), lasts) }
        };
        fence.learn(of(4, true, Duration::ZERO));
        let place = Place { node: standby.clone(), term: Term(4) };
        let mut admission = admit(&fence, Role::Standby(standby), place);
        assert_eq!(admission.verdict(), Verdict::Admitted, "no agent is heard any more");
        assert_eq!(admission.verdict(), Verdict::Admitted);
        assert!(!fence.is_proven());
        fence.learn(of(4, true, Duration::from_secs(60)));
        assert!(fence.is_proven());
        assert_eq!(admission.verdict(), Verdict::Admitted);
        fence.learn(of(4, false, Duration::from_secs(60)));
        assert_eq!(admission.verdict(), Verdict::Superseded, "nothing is held for reads");
    }

    #[test]
    fn a_reader_stays_with_a_standby_that_follows_the_next_primary_and_leaves_one_that_becomes_it() {
        let long = Duration::from_secs(60);
        let fence = Arc::new(Fence::new(long));
        let node: NodeName = "s".parse().unwrap();
        let with_standby = |term, primary| {
            let table = table(term, primary, long);
            let target = Target { node: node.clone(), ..table.primary.clone().unwrap() };
            Table { standbys: vec![Standby { target, weight: 1 }], ..table }
        };
        fence.learn(with_standby(4, Some("a")));
        let place = Place { node: node.clone(), term: Term(4) };
        let mut admission = admit(&fence, Role::Standby(node.clone()), place);
        assert_eq!(admission.verdict(), Verdict::Admitted);
        fence.learn(table(5, None, long));
        assert_eq!(admission.verdict(), Verdict::Unknown, "nobody leads");
        fence.learn(table(5, Some("b"), long));
        assert_eq!(admission.verdict(), Verdict::Unknown, "it does not follow yet");
        fence.learn(with_standby(5, Some("b")));
        assert_eq!(admission.verdict(), Verdict::Admitted);
        fence.learn(table(6, Some("s"), long));
        assert_eq!(admission.verdict(), Verdict::Superseded);
    }

    #[derive(Default)]
    struct Woken(AtomicU64);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn every_change_wakes_whoever_uses_a_connection() {
        let fence = Arc::new(Fence::new(Duration::ZERO));
        let place = Place { node: "a".parse().unwrap(), term: Term(4) };
        let [first, second, other] = [(); 3].map(|()| Arc::<Woken>::default());
        let times = || [&first, &second, &other].map(|woken| woken.0.load(Ordering::Relaxed));
        let (connection, another) = (fence.bell(), fence.bell());
        let lent = |bell: &Arc<Bell>| {
            Admission::new(Arc::clone(&fence), Role::Primary, place.clone(), Arc::clone(bell), None)
        };
        lent(&connection).wakes(&Arc::clone(&first).into());
        lent(&another).wakes(&Arc::clone(&other).into());
        fence.look_again();
        fence.learn(table(4, Some("a"), Duration::ZERO));
        assert_eq!(times(), [2, 0, 2]);
        lent(&connection).wakes(&Arc::clone(&second).into());
        drop(another);
        fence.look_again();
        assert_eq!(times(), [2, 1, 2], "whoever has it now, and nobody whose connection is gone");
    }

    #[test]
    fn bells_of_connections_that_are_gone_take_no_room() {
        let fence = Fence::new(Duration::ZERO);
        let kept = fence.bell();
        for _ in 0..1000 {
            drop(fence.bell());
        }
        assert!(locked(&fence.bells).capacity() < 10, "nothing has changed meanwhile");
        fence.look_again();
        assert_eq!(locked(&fence.bells).len(), 1);
        drop(kept);
    }

    #[test]
    fn nobody_waits_for_a_route_for_ever() {
        let fence = Arc::new(Fence::new(Duration::ZERO));
        let place = Place { node: "a".parse().unwrap(), term: Term(4) };
        assert_eq!(admit(&fence, Role::Primary, place).verdict(), Verdict::Superseded);
    }
}
