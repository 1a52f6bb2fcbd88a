//! Stories of a pool, and a world around it that remembers what it was told and believes nothing else.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    size: 3,
    opening: 2,
    waiting: 5,
    query_wait: Duration::from_secs(10),
    hold: Duration::from_secs(4),
    server_idle: Duration::from_secs(60),
    server_lifetime: Duration::from_secs(300),
    retry: Duration::from_secs(1),
};
const ONE: Worker = Worker(1);
const TWO: Worker = Worker(2);
const NODES: [&str; 3] = ["a", "b", "c"];

fn at(seconds: u64) -> Instant {
    Instant::from_boot(Duration::from_secs(seconds))
}

fn place(node: &str, term: u64) -> Place {
    Place { node: node.parse().unwrap(), term: Term(term) }
}

fn orders(pool: &mut Pool) -> Vec<Order> {
    std::iter::from_fn(|| pool.poll()).collect()
}

/// A pool with a route, on which `count` servers of worker one were opened and are idle.
fn with_idle(limits: Limits, count: u64) -> Pool {
    let mut pool = Pool::new(limits, at(0));
    pool.route(place("a", 1), at(0));
    for client in 0..count {
        assert_eq!(pool.request(ClientId(client), ONE, at(0)), Answer::Waits);
        let opened = orders(&mut pool);
        assert!(
            matches!(opened[..], [Order::Open { server: ServerId(id), worker: ONE, .. }] if id == client)
        );
        pool.opened(ServerId(client), at(0));
        assert!(matches!(orders(&mut pool)[..], [Order::Lend { .. }]));
    }
    for server in 0..count {
        pool.release(ServerId(server), true, at(0));
    }
    assert_eq!(orders(&mut pool), []);
    pool
}

fn lent(answer: Answer) -> ServerId {
    match answer {
        Answer::Lent { server, .. } => server,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_newest_idle_server_comes_first_and_the_oldest_client() {
    let mut pool = with_idle(Limits { size: 2, ..LIMITS }, 2);
    pool.request(ClientId(10), ONE, at(1));
    let newest = lent(pool.request(ClientId(11), ONE, at(1)));
    pool.release(newest, true, at(2));
    assert_eq!(lent(pool.request(ClientId(12), ONE, at(3))), newest);
    for client in [20, 21] {
        assert_eq!(pool.request(ClientId(client), ONE, at(4)), Answer::Waits);
    }
    pool.release(newest, true, at(5));
    assert_eq!(orders(&mut pool), [Order::Lend { client: ClientId(20), server: newest, worker: ONE }]);
    assert!(pool.leave(ClientId(21)) && !pool.leave(ClientId(21)) && !pool.leave(ClientId(20)));
    pool.release(newest, true, at(6));
    assert_eq!(pool.counts(at(6)), Counts { lent: 1, idle: 1, ..Counts::default() });
}

#[test]
fn a_client_moves_to_the_worker_that_has_an_idle_server() {
    let mut pool = with_idle(LIMITS, 1);
    let answer = pool.request(ClientId(9), TWO, at(1));
    assert_eq!(answer, Answer::Lent { server: ServerId(0), worker: ONE });
    assert_eq!(orders(&mut pool), [], "none is opened beside it");
}

#[test]
fn one_limit_for_all_workers_and_only_some_are_opened_at_once() {
    let mut pool = Pool::new(LIMITS, at(0));
    pool.route(place("a", 1), at(0));
    for client in 0..5 {
        assert_eq!(
            pool.request(ClientId(client), Worker(u16::try_from(client).unwrap()), at(0)),
            Answer::Waits
        );
    }
    assert_eq!(pool.request(ClientId(5), ONE, at(0)), Answer::Refused(Refusal::TooManyWaiting));
    let open = |server, worker| Order::Open {
        server: ServerId(server),
        worker: Worker(worker),
        place: place("a", 1),
    };
    assert_eq!(orders(&mut pool), [open(0, 0), open(1, 1)]);
    pool.opened(ServerId(1), at(1));
    let first = Order::Lend { client: ClientId(0), server: ServerId(1), worker: Worker(1) };
    assert_eq!(orders(&mut pool), [first, open(2, 2)], "whichever is first is for the first client");
    pool.opened(ServerId(0), at(1));
    pool.opened(ServerId(2), at(1));
    assert_eq!(orders(&mut pool).len(), 2);
    assert_eq!(
        pool.counts(at(1)),
        Counts { lent: 3, waiting: 2, max_wait: Duration::from_secs(1), ..Counts::default() }
    );
}

#[test]
fn a_dirty_server_is_closed_and_another_one_takes_its_place() {
    let mut pool = with_idle(Limits { size: 1, ..LIMITS }, 1);
    let server = lent(pool.request(ClientId(1), ONE, at(1)));
    pool.request(ClientId(2), TWO, at(1));
    pool.release(server, false, at(2));
    assert_eq!(orders(&mut pool), [Order::Close { server, worker: ONE, why: Closing::Dirty }]);
    // Until it is gone it counts for PostgreSQL, too.
    pool.tick(at(3));
    assert_eq!(orders(&mut pool), []);
    pool.closed(server, at(4));
    assert_eq!(orders(&mut pool), [Order::Open { server: ServerId(1), worker: TWO, place: place("a", 1) }]);
}

#[test]
fn what_was_opened_for_a_former_term_is_never_lent_again() {
    let mut pool = with_idle(LIMITS, 3);
    let kept = lent(pool.request(ClientId(1), ONE, at(1)));
    pool.hold(at(2));
    assert_eq!(pool.request(ClientId(2), ONE, at(2)), Answer::Waits);
    assert_eq!(orders(&mut pool), [], "idle ones are kept: the route may come back as it was");
    // The same node in a new term is another place.
    pool.route(place("a", 2), at(3));
    let now = orders(&mut pool);
    assert!(matches!(now[0], Order::Close { why: Closing::Rerouted, .. }), "{now:?}");
    assert!(matches!(now[1], Order::Close { why: Closing::Rerouted, .. }), "{now:?}");
    // Servers of the former place take no room, though none is gone yet.
    assert_eq!(now[2..], [Order::Open { server: ServerId(3), worker: ONE, place: place("a", 2) }]);
    pool.release(kept, true, at(4));
    assert_eq!(orders(&mut pool), [Order::Close { server: kept, worker: ONE, why: Closing::Rerouted }]);
    // One that was on its way while the route changed comes too late.
    pool.route(place("b", 3), at(5));
    let open = Order::Open { server: ServerId(4), worker: ONE, place: place("b", 3) };
    assert_eq!(orders(&mut pool), [open]);
    pool.opened(ServerId(3), at(6));
    assert_eq!(
        orders(&mut pool),
        [Order::Close { server: ServerId(3), worker: ONE, why: Closing::Rerouted }]
    );
    pool.opened(ServerId(4), at(6));
    assert_eq!(orders(&mut pool), [Order::Lend { client: ClientId(2), server: ServerId(4), worker: ONE }]);
}

#[test]
fn a_route_that_comes_back_finds_its_idle_servers() {
    let mut pool = with_idle(LIMITS, 2);
    pool.hold(at(1));
    for client in [5, 6, 7] {
        assert_eq!(pool.request(ClientId(client), ONE, at(1)), Answer::Waits);
    }
    pool.route(place("a", 1), at(2));
    let now = orders(&mut pool);
    assert!(matches!(now[0], Order::Lend { client: ClientId(5), .. }), "{now:?}");
    assert!(matches!(now[1], Order::Lend { client: ClientId(6), .. }), "{now:?}");
    assert!(matches!(now[2], Order::Open { .. }) && now.len() == 3, "{now:?}");
}

#[test]
fn waits_are_bounded_with_a_route_and_without() {
    let mut pool = with_idle(Limits { size: 1, ..LIMITS }, 1);
    lent(pool.request(ClientId(1), ONE, at(0)));
    pool.request(ClientId(2), ONE, at(1));
    pool.tick(at(10));
    assert_eq!(orders(&mut pool), []);
    pool.tick(at(11));
    assert_eq!(orders(&mut pool), [Order::Refuse { client: ClientId(2), why: Refusal::QueryWait }]);
    // Who waited before counts the hold from its beginning.
    pool.request(ClientId(3), ONE, at(12));
    pool.hold(at(14));
    pool.request(ClientId(4), ONE, at(16));
    pool.tick(at(18));
    assert_eq!(orders(&mut pool), [Order::Refuse { client: ClientId(3), why: Refusal::NoRoute }]);
    pool.tick(at(20));
    assert_eq!(orders(&mut pool), [Order::Refuse { client: ClientId(4), why: Refusal::NoRoute }]);
}

#[test]
fn a_server_that_cannot_be_opened_is_tried_again_later_and_elsewhere_at_once() {
    let mut pool = Pool::new(LIMITS, at(0));
    pool.route(place("a", 1), at(0));
    pool.request(ClientId(1), ONE, at(0));
    pool.poll();
    pool.failed(ServerId(0), at(5));
    pool.request(ClientId(2), ONE, at(5));
    assert_eq!(orders(&mut pool), []);
    pool.tick(at(6));
    assert_eq!(orders(&mut pool).len(), 2, "for both");
    pool.failed(ServerId(1), at(7));
    pool.route(place("b", 2), at(7));
    assert_eq!(orders(&mut pool).len(), 2, "another node need not be waited for");
    // The attempt at the former place fails late, which says nothing of this one.
    pool.failed(ServerId(2), at(7));
    pool.request(ClientId(3), ONE, at(7));
    pool.opened(ServerId(3), at(7));
    let now = orders(&mut pool);
    assert!(matches!(now[..], [Order::Lend { .. }, Order::Open { .. }]), "{now:?}");
}

#[test]
fn what_a_server_would_say_again_is_told_to_who_waits_longest() {
    let mut pool = Pool::new(Limits { size: 1, ..LIMITS }, at(0));
    pool.route(place("a", 1), at(0));
    for client in [1, 2] {
        assert_eq!(pool.request(ClientId(client), ONE, at(0)), Answer::Waits);
    }
    assert_eq!(orders(&mut pool).len(), 1);
    pool.rejected(ServerId(0), at(1));
    let refused = Order::Refuse { client: ClientId(1), why: Refusal::Rejected };
    let again = Order::Open { server: ServerId(1), worker: ONE, place: place("a", 1) };
    assert_eq!(orders(&mut pool), [refused, again], "each hears it for itself");
    pool.rejected(ServerId(0), at(1));
    assert_eq!(orders(&mut pool), [], "it is gone already");
    pool.route(place("b", 2), at(2));
    assert_eq!(orders(&mut pool).len(), 1);
    pool.rejected(ServerId(1), at(3));
    assert_eq!(orders(&mut pool), [], "what a former primary says concerns nobody");
}

#[test]
fn a_pause_drains_and_ends_with_what_was_asked_for_meanwhile() {
    let mut pool = with_idle(LIMITS, 2);
    let server = lent(pool.request(ClientId(1), ONE, at(1)));
    pool.pause(at(2));
    assert!(matches!(
        orders(&mut pool)[..],
        [Order::Close { server: ServerId(0), why: Closing::Paused, .. }]
    ));
    pool.closed(ServerId(0), at(2));
    assert_eq!(pool.request(ClientId(2), ONE, at(2)), Answer::Waits);
    pool.route(place("b", 2), at(3));
    assert_eq!(orders(&mut pool), [], "a new route does not end it");
    pool.release(server, true, at(3));
    assert_eq!(orders(&mut pool).len(), 1);
    assert!(!pool.is_drained());
    pool.closed(server, at(3));
    assert!(pool.is_drained());
    pool.resume(at(4));
    assert_eq!(orders(&mut pool), [Order::Open { server: ServerId(2), worker: ONE, place: place("b", 2) }]);
}

#[test]
fn fresh_ones_are_lent_while_the_former_ones_are_still_in_use() {
    let mut pool = with_idle(LIMITS, 2);
    let former = lent(pool.request(ClientId(1), ONE, at(1)));
    pool.reconnect(at(2));
    assert!(matches!(orders(&mut pool)[..], [Order::Close { why: Closing::Reconnect, .. }]));
    pool.request(ClientId(2), ONE, at(2));
    let fresh = ServerId(2);
    assert_eq!(orders(&mut pool), [Order::Open { server: fresh, worker: ONE, place: place("a", 1) }]);
    pool.opened(fresh, at(3));
    pool.release(former, true, at(3));
    assert!(matches!(
        orders(&mut pool)[..],
        [Order::Lend { .. }, Order::Close { why: Closing::Reconnect, .. }]
    ));
}

#[test]
fn old_and_superfluous_servers_are_closed_when_nobody_uses_them() {
    let mut pool = with_idle(LIMITS, 3);
    let used = lent(pool.request(ClientId(1), ONE, at(50)));
    pool.tick(at(60));
    let now = orders(&mut pool);
    assert!(
        now.iter().all(|order| matches!(order, Order::Close { why: Closing::Idle, .. })) && now.len() == 2
    );
    pool.release(used, true, at(300));
    assert_eq!(orders(&mut pool), [Order::Close { server: used, worker: ONE, why: Closing::Lifetime }]);

    let mut pool = with_idle(LIMITS, 3);
    let used = lent(pool.request(ClientId(1), ONE, at(1)));
    pool.set_limits(Limits { size: 1, ..LIMITS }, at(2));
    let now = orders(&mut pool);
    assert!(
        now.iter().all(|order| matches!(order, Order::Close { why: Closing::OverLimit, .. }))
            && now.len() == 2
    );
    pool.release(used, true, at(3));
    assert_eq!(orders(&mut pool), [], "the last one stays, though the others are not gone yet");
}

/// What may happen to a pool.
#[derive(Clone, Debug)]
enum Happens {
    Request { worker: u16 },
    Release { which: usize, reusable: bool },
    Leave { which: usize },
    Opened { which: usize },
    Failed { which: usize },
    Rejected { which: usize },
    Closed { which: usize },
    Dies { which: usize },
    Route { node: usize, later_term: bool },
    Hold,
    Pause,
    Resume,
    Reconnect,
    Size { size: u32 },
    Passes { seconds: u64 },
}

fn happens() -> impl Strategy<Value = Happens> {
    use Happens::*;
    prop_oneof![
        12 => (0..3_u16).prop_map(|worker| Request { worker }),
        10 => (any::<usize>(), prop::bool::weighted(0.9)).prop_map(|(which, reusable)| Release { which, reusable }),
        2 => any::<usize>().prop_map(|which| Leave { which }),
        8 => any::<usize>().prop_map(|which| Opened { which }),
        2 => any::<usize>().prop_map(|which| Failed { which }),
        1 => any::<usize>().prop_map(|which| Rejected { which }),
        5 => any::<usize>().prop_map(|which| Closed { which }),
        1 => any::<usize>().prop_map(|which| Dies { which }),
        2 => (0..3_usize, any::<bool>()).prop_map(|(node, later_term)| Route { node, later_term }),
        1 => Just(Hold),
        1 => Just(Pause),
        2 => Just(Resume),
        1 => Just(Reconnect),
        1 => (1..5_u32).prop_map(|size| Size { size }),
        3 => (0..20_u64).prop_map(|seconds| Passes { seconds }),
    ]
}

/// The world around a pool, which remembers what it was told and believes nothing else.
struct World {
    pool: Pool,
    now: u64,
    limits: Limits,
    term: u64,
    place: Option<Place>,
    next_client: u64,
    /// In the order in which they came.
    waiting: Vec<ClientId>,
    lent: Vec<(ServerId, ClientId)>,
    opening: Vec<(ServerId, Place)>,
    closing: Vec<ServerId>,
    idle: BTreeSet<ServerId>,
    /// Given back as not reusable.
    dirty: BTreeSet<ServerId>,
    opened_for: BTreeMap<ServerId, Place>,
    may_lend: bool,
    paused: bool,
    held: bool,
}

impl World {
    fn new() -> World {
        World {
            pool: Pool::new(LIMITS, at(0)),
            now: 0,
            limits: LIMITS,
            term: 0,
            place: None,
            next_client: 0,
            waiting: Vec::new(),
            lent: Vec::new(),
            opening: Vec::new(),
            closing: Vec::new(),
            idle: BTreeSet::new(),
            dirty: BTreeSet::new(),
            opened_for: BTreeMap::new(),
            may_lend: false,
            paused: false,
            held: true,
        }
    }

    fn lend(&mut self, server: ServerId, client: ClientId) {
        assert!(self.may_lend, "{server:?} is lent while nothing may be");
        assert_eq!(self.opened_for.get(&server), self.place.as_ref(), "{server:?} is of another place");
        assert!(self.lent.iter().all(|(other, _)| *other != server), "{server:?} is lent twice");
        assert!(!self.closing.contains(&server), "{server:?} was to be closed");
        assert!(!self.dirty.contains(&server), "{server:?} is dirty");
        self.idle.remove(&server);
        self.lent.push((server, client));
    }

    fn step(&mut self, what: &Happens) {
        let now = at(self.now);
        let pick = |which: usize, len: usize| (len > 0).then(|| which % len);
        match *what {
            Happens::Request { worker } => {
                let client = ClientId(self.next_client);
                self.next_client += 1;
                match self.pool.request(client, Worker(worker), now) {
                    Answer::Lent { server, .. } => {
                        assert!(self.waiting.is_empty(), "{client:?} overtakes {:?}", self.waiting);
                        assert!(self.idle.contains(&server), "{server:?} was not idle");
                        self.lend(server, client);
                    }
                    Answer::Waits => self.waiting.push(client),
                    Answer::Refused(why) => {
                        assert_eq!(why, Refusal::TooManyWaiting);
                        assert_eq!(self.waiting.len(), self.limits.waiting as usize);
                    }
                }
            }
            Happens::Release { which, reusable } => {
                let Some(index) = pick(which, self.lent.len()) else { return };
                let (server, _) = self.lent.remove(index);
                self.idle.insert(server);
                if !reusable {
                    self.dirty.insert(server);
                }
                self.pool.release(server, reusable, now);
            }
            Happens::Leave { which } => {
                let Some(index) = pick(which, self.waiting.len()) else { return };
                assert!(self.pool.leave(self.waiting.remove(index)));
            }
            Happens::Opened { which } => {
                let Some(index) = pick(which, self.opening.len()) else { return };
                let (server, place) = self.opening.remove(index);
                self.opened_for.insert(server, place);
                self.idle.insert(server);
                self.pool.opened(server, now);
            }
            Happens::Failed { which } => {
                let Some(index) = pick(which, self.opening.len()) else { return };
                let (server, _) = self.opening.remove(index);
                self.pool.failed(server, now);
            }
            Happens::Rejected { which } => {
                let Some(index) = pick(which, self.opening.len()) else { return };
                let (server, _) = self.opening.remove(index);
                self.pool.rejected(server, now);
            }
            Happens::Closed { which } => {
                let Some(index) = pick(which, self.closing.len()) else { return };
                let server = self.closing.remove(index);
                self.pool.closed(server, now);
            }
            Happens::Dies { which } => {
                let all: Vec<ServerId> = self.idle.iter().copied().collect();
                let Some(index) = pick(which, all.len()) else { return };
                self.idle.remove(&all[index]);
                self.pool.closed(all[index], now);
            }
            Happens::Route { node, later_term } => {
                // Another primary is one of a later term.
                let elsewhere = self.place.as_ref().is_some_and(|place| place.node.as_str() != NODES[node]);
                self.term += u64::from(later_term || elsewhere);
                let place = place(NODES[node], self.term);
                (self.place, self.held) = (Some(place.clone()), false);
                self.may_lend = !self.paused;
                self.pool.route(place, now);
            }
            Happens::Hold => {
                (self.held, self.may_lend) = (true, false);
                self.pool.hold(now);
            }
            Happens::Pause => {
                (self.paused, self.may_lend) = (true, false);
                self.pool.pause(now);
            }
            Happens::Resume => {
                self.paused = false;
                self.may_lend = !self.held;
                self.pool.resume(now);
            }
            Happens::Reconnect => self.pool.reconnect(now),
            Happens::Size { size } => {
                self.limits.size = size;
                self.pool.set_limits(self.limits, now);
            }
            Happens::Passes { seconds } => {
                self.now += seconds;
                self.pool.tick(at(self.now));
            }
        }
        self.obey();
    }

    fn obey(&mut self) {
        while let Some(order) = self.pool.poll() {
            match order {
                Order::Lend { client, server, .. } => {
                    assert_eq!(self.waiting.first(), Some(&client), "somebody is overtaken");
                    self.waiting.remove(0);
                    self.lend(server, client);
                }
                Order::Refuse { client, .. } => {
                    assert_eq!(self.waiting.first(), Some(&client), "who waits longest is refused first");
                    self.waiting.remove(0);
                }
                Order::Open { server, place, .. } => {
                    assert!(self.may_lend && Some(&place) == self.place.as_ref());
                    self.opening.push((server, place));
                    // Each counts until it is gone.
                    let opened = self
                        .opened_for
                        .iter()
                        .filter(|(id, at)| self.is_there(**id) && Some(*at) == self.place.as_ref());
                    let all = opened.count() + self.opening_here();
                    assert!(all <= self.limits.size as usize, "{all} servers");
                }
                Order::Close { server, .. } => {
                    assert!(self.idle.remove(&server), "{server:?} is closed under somebody's hands");
                    self.closing.push(server);
                }
            }
        }
        self.check();
    }

    fn opening_here(&self) -> usize {
        self.opening.iter().filter(|(_, place)| Some(place) == self.place.as_ref()).count()
    }

    fn is_there(&self, server: ServerId) -> bool {
        self.idle.contains(&server)
            || self.closing.contains(&server)
            || self.lent.iter().any(|(other, _)| *other == server)
    }

    fn check(&self) {
        let here = |server: &ServerId| self.opened_for.get(server) == self.place.as_ref();
        let opening_here =
            self.opening.iter().filter(|(_, place)| Some(place) == self.place.as_ref()).count();
        assert!(opening_here <= self.limits.opening as usize, "{opening_here} are being opened");
        let counts = self.pool.counts(at(self.now));
        let expected =
            (self.lent.len(), self.idle.len(), self.opening.len(), self.closing.len(), self.waiting.len());
        let counted =
            [counts.lent, counts.idle, counts.opening, counts.closing, counts.waiting].map(|n| n as usize);
        assert_eq!(counted, <[usize; 5]>::from(expected));
        if self.may_lend && !self.waiting.is_empty() {
            assert!(!self.idle.iter().any(here), "somebody waits beside an idle server");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: no server has two clients, none of another place or of one that was closed is
    /// lent, nobody is overtaken, and nobody waits for ever once everything works.
    #[test]
    fn a_pool_keeps_its_promises(story in prop::collection::vec(happens(), 1..120)) {
        let mut world = World::new();
        for what in &story {
            world.step(what);
        }
        world.step(&Happens::Size { size: 2 });
        world.step(&Happens::Resume);
        world.step(&Happens::Route { node: 0, later_term: true });
        for _ in 0..200 {
            world.step(&Happens::Opened { which: 0 });
            world.step(&Happens::Release { which: 0, reusable: true });
            world.step(&Happens::Closed { which: 0 });
        }
        prop_assert!(world.waiting.is_empty(), "{:?} wait for ever", world.waiting);
        prop_assert!(world.lent.is_empty() && world.closing.is_empty() && world.opening.is_empty());
    }
}
