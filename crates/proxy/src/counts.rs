//! What is counted: transactions, bytes, times, refusals.
//!
//! Sessions count for themselves ([`Meter`]), in plain numbers, and add what they have to the shared ones when a transaction
//! is over: some ten additions without a lock. Times come from the clock that the fence has read anyhow. What a pool knows
//! already (who waits, who has which server) is not counted at all, but looked up when somebody asks.
//!
//! Leaves out: who asks ([`crate::console`], the metrics). Hazard: a number per database and user is memory that clients cause;
//! so their names have a limit ([`MOST_NAMES`]).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgherd_core::types::{Instant, NodeName};
use pgherd_pgwire::SqlState;

use crate::roster::{Card, ServerCard};
use crate::session::{Lost, Session};
use crate::sql::{Tie, Ties, Unmovable};

/// Pairs of database and user that are counted apart: as many as clients can be. Those beyond are counted together.
const MOST_NAMES: usize = 10_000;
/// Nodes of one herd, and some that were replaced.
const MOST_NODES: usize = 256;
/// What is counted together once there are too many.
const OTHERS: &str = "(others)";
/// A transaction that moves more is counted in parts.
const LARGE_BYTES: u64 = 1 << 20;

/// Upper ends of the buckets of a [`Histogram`]: from what a lookup takes to what somebody should look at.
pub const BUCKETS_US: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 10_000_000, 60_000_000,
];

/// How often something took how long.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    /// The last one is for what took longer.
    buckets: [AtomicU64; BUCKETS_US.len() + 1],
    sum_us: AtomicU64,
}

/// A [`Histogram`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    pub buckets: [u64; BUCKETS_US.len() + 1],
    pub sum_us: u64,
}

impl Histogram {
    /// `times` together took that long.
    fn add(&self, took: Duration, times: u64) {
        let us = as_us(took);
        let each = us / times.max(1);
        let bucket = BUCKETS_US.iter().position(|bound| each <= *bound).unwrap_or(BUCKETS_US.len());
        self.buckets[bucket].fetch_add(times, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    fn spread(&self) -> Spread {
        Spread {
            buckets: std::array::from_fn(|bucket| self.buckets[bucket].load(Ordering::Relaxed)),
            sum_us: self.sum_us.load(Ordering::Relaxed),
        }
    }
}

impl Spread {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    fn add(&mut self, other: &Spread) {
        self.buckets.iter_mut().zip(other.buckets).for_each(|(to, from)| *to += from);
        self.sum_us += other.sum_us;
    }
}

fn as_us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What a session has seen go by, from its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// ReadyForQuery: simple queries, and extended ones up to their Sync.
    pub queries: u64,
    /// Those of them after which no transaction was open.
    pub transactions: u64,
    /// Parse and Bind of the client,
    pub parses: u64,
    pub binds: u64,
    /// and Parse that the server was sent.
    pub server_parses: u64,
}

/// Of one database and user, since the proxy was started.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    queries: AtomicU64,
    parses: AtomicU64,
    binds: AtomicU64,
    server_parses: AtomicU64,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    query_us: AtomicU64,
    /// One for each transaction.
    transaction_time: Histogram,
    /// One for each server that was lent.
    wait_time: Histogram,
    /// Clients that had to wait since nobody knew a primary.
    held: AtomicU64,
    logins: AtomicU64,
    opened: AtomicU64,
    closed: AtomicU64,
}

/// [`Counts`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub queries: u64,
    pub parses: u64,
    pub binds: u64,
    pub server_parses: u64,
    /// From clients, and to them.
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub query_us: u64,
    pub transaction_time: Spread,
    pub wait_time: Spread,
    pub held: u64,
    pub logins: u64,
    pub opened: u64,
    pub closed: u64,
}

impl Counts {
    pub(crate) fn waited(&self, time: Duration) {
        self.wait_time.add(time, 1);
    }

    pub(crate) fn held(&self) {
        add(&self.held, 1);
    }

    pub(crate) fn login(&self) {
        add(&self.logins, 1);
    }

    pub(crate) fn opened(&self) {
        add(&self.opened, 1);
    }

    pub(crate) fn closed(&self) {
        add(&self.closed, 1);
    }

    fn totals(&self) -> Totals {
        let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Totals {
            queries: of(&self.queries),
            parses: of(&self.parses),
            binds: of(&self.binds),
            server_parses: of(&self.server_parses),
            received_bytes: of(&self.received_bytes),
            sent_bytes: of(&self.sent_bytes),
            query_us: of(&self.query_us),
            transaction_time: self.transaction_time.spread(),
            wait_time: self.wait_time.spread(),
            held: of(&self.held),
            logins: of(&self.logins),
            opened: of(&self.opened),
            closed: of(&self.closed),
        }
    }
}

impl Totals {
    pub fn add(&mut self, other: &Totals) {
        for (to, from) in [
            (&mut self.queries, other.queries),
            (&mut self.parses, other.parses),
            (&mut self.binds, other.binds),
            (&mut self.server_parses, other.server_parses),
            (&mut self.received_bytes, other.received_bytes),
            (&mut self.sent_bytes, other.sent_bytes),
            (&mut self.query_us, other.query_us),
            (&mut self.held, other.held),
            (&mut self.logins, other.logins),
            (&mut self.opened, other.opened),
            (&mut self.closed, other.closed),
        ] {
            *to += from;
        }
        self.transaction_time.add(&other.transaction_time);
        self.wait_time.add(&other.wait_time);
    }
}

/// Most often there is nothing to add, and then nobody else has to hear of it.
fn add(to: &AtomicU64, number: u64) {
    if number > 0 {
        to.fetch_add(number, Ordering::Relaxed);
    }
}

/// What went to one node.
#[derive(Debug, Default)]
pub(crate) struct NodeCounts {
    queries: AtomicU64,
    transactions: AtomicU64,
}

/// What one client moves, until it is added to what all have moved.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    told: Tally,
    transaction: Option<Instant>,
    query: Option<Instant>,
    pub(crate) received_bytes: u64,
    pub(crate) sent_bytes: u64,
}

impl Meter {
    /// After something was moved. `now`: when that began.
    pub(crate) fn look(
        &mut self,
        session: &Session,
        now: Instant,
        client: Option<&Card>,
        server: Option<&ServerCard>,
    ) {
        let Tally { queries, transactions, .. } = session.tally();
        let (queries, transactions) = (queries - self.told.queries, transactions - self.told.transactions);
        if queries > 0 || self.received_bytes + self.sent_bytes > LARGE_BYTES {
            self.add(session, now, transactions, client, server);
        }
        if session.is_idle() {
            (self.transaction, self.query) = (None, None);
            return;
        }
        if self.query.is_none() && session.is_asked() {
            self.query = Some(now);
        }
        if self.transaction.is_none() {
            self.transaction = Some(now);
            if let Some(client) = client {
                client.asked(now);
            }
        }
    }

    /// What is left, when a client has its server no more.
    pub(crate) fn finish(
        &mut self,
        session: &Session,
        now: Instant,
        client: Option<&Card>,
        server: Option<&ServerCard>,
    ) {
        let transactions = session.tally().transactions - self.told.transactions;
        // Most often its last answer was counted when it came.
        if self.received_bytes + self.sent_bytes > 0 || *session.tally() != self.told {
            self.add(session, now, transactions, client, server);
        }
        (self.transaction, self.query) = (None, None);
    }

    fn add(
        &mut self,
        session: &Session,
        now: Instant,
        transactions: u64,
        client: Option<&Card>,
        server: Option<&ServerCard>,
    ) {
        if let (Some((names, known)), Some(client), Some(server)) = (session.statements(), client, server) {
            client.statements.set(names);
            server.statements.set(known);
        }
        let tally = *session.tally();
        let told = std::mem::replace(&mut self.told, tally);
        let (received_bytes, sent_bytes) =
            (std::mem::take(&mut self.received_bytes), std::mem::take(&mut self.sent_bytes));
        let queries = tally.queries - told.queries;
        let query = if queries > 0 { self.query.take() } else { None };
        let transaction = if transactions > 0 { self.transaction.take() } else { None };
        let Some(ServerCard { counts, node_counts, .. }) = server else { return };
        add(&counts.received_bytes, received_bytes);
        add(&counts.sent_bytes, sent_bytes);
        add(&counts.queries, queries);
        add(&counts.parses, tally.parses - told.parses);
        add(&counts.binds, tally.binds - told.binds);
        add(&counts.server_parses, tally.server_parses - told.server_parses);
        add(&counts.query_us, query.map_or(0, |began| as_us(now.since(began))));
        add(&node_counts.queries, queries);
        add(&node_counts.transactions, transactions);
        if transactions > 0 {
            let took = transaction.map_or(Duration::ZERO, |began| now.since(began));
            counts.transaction_time.add(took, transactions);
        }
    }
}

macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $word:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($variant),* }

        impl $name {
            pub const ALL: &[$name] = &[$($name::$variant),*];

            /// As it is called in tables and metrics.
            pub fn word(self) -> &'static str {
                match self { $($name::$variant => $word),* }
            }
        }
    };
}

reasons! {
    /// Why somebody did not come in.
    NoEntry {
        Hba = "hba",
        Password = "password",
        Protocol = "protocol",
        TooMany = "too_many_clients",
        Unavailable = "unavailable",
        TooLate = "timeout",
        Disabled = "disabled",
        Console = "console",
        Server = "server",
    }
}

impl NoEntry {
    /// What an error of this kind, told while somebody logs in, means.
    pub(crate) fn of(sqlstate: SqlState) -> NoEntry {
        match sqlstate {
            SqlState::INVALID_AUTHORIZATION_SPECIFICATION => NoEntry::Hba,
            SqlState::INVALID_PASSWORD => NoEntry::Password,
            _ => NoEntry::Protocol,
        }
    }
}

reasons! {
    /// Why a client keeps its server beyond its transaction.
    Pin {
        AdvisoryLock = "advisory_lock",
        TemporaryTable = "temporary_table",
        HoldableCursor = "holdable_cursor",
        Listen = "listen",
        PreparedStatement = "sql_prepare",
        Library = "load",
        RandomSeed = "setseed",
        UnknownSetting = "unknown_setting",
        TooLarge = "large_query",
        Unanswered = "no_answer",
    }
}

impl From<Tie> for Pin {
    fn from(tie: Tie) -> Pin {
        match tie {
            Tie::AdvisoryLock => Pin::AdvisoryLock,
            Tie::TemporaryTable => Pin::TemporaryTable,
            Tie::HoldableCursor => Pin::HoldableCursor,
            Tie::Listen => Pin::Listen,
            Tie::PreparedStatement => Pin::PreparedStatement,
        }
    }
}

impl From<Unmovable> for Pin {
    fn from(why: Unmovable) -> Pin {
        match why {
            Unmovable::Library => Pin::Library,
            Unmovable::RandomSeed => Pin::RandomSeed,
            Unmovable::UnknownSetting => Pin::UnknownSetting,
            Unmovable::TooLarge => Pin::TooLarge,
            Unmovable::Unanswered => Pin::Unanswered,
        }
    }
}

/// Several of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins(pub(crate) u32);

impl Pins {
    pub fn of(ties: Ties, unmovable: Option<Unmovable>) -> Pins {
        let pins = ties.iter().map(Pin::from).chain(unmovable.map(Pin::from));
        Pins(pins.fold(0, |bits, pin| bits | 1 << pin as u32))
    }

    pub fn contains(self, pin: Pin) -> bool {
        self.0 & 1 << pin as u32 != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = Pin> {
        Pin::ALL.iter().copied().filter(move |pin| self.contains(*pin))
    }
}

reasons! {
    /// What was true of the work of a session that a lost server or another primary has ended.
    Ended {
        Nothing = "nothing",
        Unbegun = "unbegun",
        Transaction = "transaction",
        Unknown = "unknown",
    }
}

impl From<Lost> for Ended {
    fn from(lost: Lost) -> Ended {
        match lost {
            Lost::Nothing => Ended::Nothing,
            Lost::Unbegun => Ended::Unbegun,
            Lost::Transaction => Ended::Transaction,
            Lost::Unknown => Ended::Unknown,
        }
    }
}

/// For `avg_…`: what was there at the last two beginnings of a period.
#[derive(Debug, Default)]
struct Periods {
    begun: Option<(Instant, BTreeMap<Owner, Totals>)>,
    before: Option<(Instant, BTreeMap<Owner, Totals>)>,
}

/// A database and a user.
pub type Owner = (String, String);

/// All that the proxy counts.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    owners: Mutex<BTreeMap<Owner, Arc<Counts>>>,
    nodes: Mutex<BTreeMap<NodeName, Arc<NodeCounts>>>,
    periods: Mutex<Periods>,
    no_entry: [AtomicU64; NoEntry::ALL.len()],
    pins: [AtomicU64; Pin::ALL.len()],
    ended: [AtomicU64; Ended::ALL.len()],
    /// Clients that were given another server instead.
    spared: AtomicU64,
}

/// What happened since [`Totals`] were taken.
#[derive(Clone, Debug, Default)]
pub struct Since {
    pub totals: Totals,
    pub period: Duration,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    pub(crate) fn of(&self, database: &str, user: &str) -> Arc<Counts> {
        let mut owners = lock(&self.owners);
        let mut owner = (database.to_owned(), user.to_owned());
        if owners.len() >= MOST_NAMES && !owners.contains_key(&owner) {
            owner = (OTHERS.to_owned(), OTHERS.to_owned());
        }
        Arc::clone(owners.entry(owner).or_default())
    }

    pub(crate) fn of_node(&self, node: &NodeName) -> Arc<NodeCounts> {
        let mut nodes = lock(&self.nodes);
        if nodes.len() >= MOST_NODES && !nodes.contains_key(node) {
            return Arc::default();
        }
        Arc::clone(nodes.entry(node.clone()).or_default())
    }

    /// Forgets names of which nothing is counted, and nobody does.
    pub(crate) fn tidy(&self) {
        lock(&self.owners)
            .retain(|_, counts| Arc::strong_count(counts) > 1 || counts.opened.load(Ordering::Relaxed) > 0);
    }

    /// A period of the averages begins.
    pub(crate) fn period(&self, now: Instant) {
        let totals = self.totals();
        let mut periods = lock(&self.periods);
        periods.before = periods.begun.replace((now, totals));
    }

    pub(crate) fn totals(&self) -> BTreeMap<Owner, Totals> {
        lock(&self.owners).iter().map(|(owner, counts)| (owner.clone(), counts.totals())).collect()
    }

    /// Totals as they were at the beginning of the period before this one, for whom there were any, and when that was.
    pub(crate) fn before(&self, started: Instant) -> (Instant, BTreeMap<Owner, Totals>) {
        let periods = lock(&self.periods);
        let known = periods.before.as_ref().or(periods.begun.as_ref());
        known.map_or((started, BTreeMap::new()), |(at, totals)| (*at, totals.clone()))
    }

    /// Queries and transactions of each node.
    pub(crate) fn nodes(&self) -> BTreeMap<NodeName, (u64, u64)> {
        let of = |counts: &NodeCounts| {
            (counts.queries.load(Ordering::Relaxed), counts.transactions.load(Ordering::Relaxed))
        };
        lock(&self.nodes).iter().map(|(node, counts)| (node.clone(), of(counts))).collect()
    }

    pub(crate) fn no_entry(&self, why: NoEntry) {
        add(&self.no_entry[why as usize], 1);
    }

    pub(crate) fn pinned(&self, pins: Pins) {
        pins.iter().for_each(|pin| add(&self.pins[pin as usize], 1));
    }

    pub(crate) fn ended(&self, what: Lost) {
        add(&self.ended[Ended::from(what) as usize], 1);
    }

    pub(crate) fn spared(&self) {
        add(&self.spared, 1);
    }

    pub(crate) fn events(&self) -> Events {
        fn each<R: Copy, const N: usize>(all: &[R], numbers: &[AtomicU64; N]) -> Vec<(R, u64)> {
            all.iter().copied().zip(numbers.iter().map(|number| number.load(Ordering::Relaxed))).collect()
        }
        Events {
            no_entry: each(NoEntry::ALL, &self.no_entry),
            pins: each(Pin::ALL, &self.pins),
            ended: each(Ended::ALL, &self.ended),
            spared: self.spared.load(Ordering::Relaxed),
        }
    }
}

/// How often what has happened since the proxy was started.
#[derive(Clone, Debug, Default)]
pub struct Events {
    pub no_entry: Vec<(NoEntry, u64)>,
    pub pins: Vec<(Pin, u64)>,
    pub ended: Vec<(Ended, u64)>,
    pub spared: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_the_buckets_whose_ends_they_do_not_pass() {
        let histogram = Histogram::default();
        for (us, bucket) in [(0, 0), (100, 0), (101, 1), (1_000, 3), (60_000_000, 15), (60_000_001, 16)] {
            let before = histogram.spread().buckets[bucket];
            histogram.add(Duration::from_micros(us), 1);
            assert_eq!(histogram.spread().buckets[bucket], before + 1, "{us} us");
        }
        histogram.add(Duration::from_micros(3_000), 3);
        let spread = histogram.spread();
        assert_eq!((spread.buckets[3], spread.count()), (4, 9), "three of a millisecond each");
        assert_eq!(spread.sum_us, 120_000_001 + 1_201 + 3_000);
    }

    #[test]
    fn names_have_a_limit_and_those_that_nobody_uses_are_forgotten() {
        let ledger = Ledger::default();
        let kept: Vec<_> = (0..MOST_NAMES).map(|n| ledger.of(&n.to_string(), "u")).collect();
        let (one, other) = (ledger.of("x", "u"), ledger.of("y", "u"));
        assert!(Arc::ptr_eq(&one, &other), "those beyond are counted together");
        assert_eq!(ledger.totals().len(), MOST_NAMES + 1);
        kept[0].opened();
        drop((kept, one, other));
        ledger.tidy();
        assert_eq!(ledger.totals().keys().collect::<Vec<_>>(), [&("0".to_owned(), "u".to_owned())]);
        for n in 0..2 * MOST_NODES {
            ledger.of_node(&format!("n{n}").parse().unwrap());
        }
        assert_eq!(ledger.nodes().len(), MOST_NODES);
    }

    #[test]
    fn averages_are_over_the_last_whole_period_and_what_has_passed_of_this_one() {
        let at = |seconds| Instant::from_boot(Duration::from_secs(seconds));
        let ledger = Ledger::default();
        let counts = ledger.of("d", "u");
        let owner = ("d".to_owned(), "u".to_owned());
        assert_eq!(ledger.before(at(1)).0, at(1), "since the proxy was started");
        counts.login();
        ledger.period(at(60));
        counts.login();
        ledger.period(at(120));
        counts.login();
        let (since, totals) = ledger.before(at(1));
        assert_eq!((since, totals[&owner].logins), (at(60), 1));
        assert_eq!(ledger.totals()[&owner].logins, 3);
    }

    #[test]
    fn every_reason_has_a_word_of_its_own() {
        let words = |words: Vec<&str>| {
            let unique: std::collections::BTreeSet<&str> = words.iter().copied().collect();
            assert_eq!(unique.len(), words.len(), "{words:?}");
        };
        words(NoEntry::ALL.iter().map(|why| why.word()).collect());
        words(Pin::ALL.iter().map(|pin| pin.word()).collect());
        let all = Pins::of(Ties::ALL, Some(Unmovable::Library));
        assert_eq!(all.iter().count(), 6);
        assert!(Pins::of(Ties::NONE, None).is_empty());
    }
}
