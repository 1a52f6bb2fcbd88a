//! The repository where it votes: a place of objects that are put once, and whoever puts, seals and lists them.
//!
//! Assumed of the real one: what was put stays; a listing that begins after a put has ended sees it; so does a look for one name. Not assumed: that a
//! call arrives, or is answered, or is carried out only while its caller lives; that a listing shows what is put while it is made, or shows it in
//! order.
//!
//! WAL is kept here as spans of records of each hand. Its names have only the number of a timeline, so a number
//! that two hands share would be one name; a checker sees to it that this does not happen.
//!
//! The owner keeps the contract in `pgherd_core::action::Duties`: it adopts, lists, streams; puts, asks, tells.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use pgherd_core::action::{Duties, SealOrder, StreamOrder};
use pgherd_core::ha::{election, repository};
use pgherd_core::observation::{Copy, SealedRepository};
use pgherd_core::record::{Position, Record};
use pgherd_core::types::{Incarnation, Instant, Member, NodeName, Term, Timeline};

use crate::breakage::Breakage;
use crate::checkers;
use crate::postgres::{Sender, State};
use crate::wal::{HandId, Point, Wal, lsn};
use crate::world::{Event, Layer, MS, SECOND, Time, World, micros};

/// Where a WAL sender or a slot has the index of a node, this is the repository's.
pub const REPOSITORY: usize = usize::MAX;

/// A call without an answer is given up after this long, and made again.
const ATTEMPT: Time = 400 * MS;
/// After so many calls in a row without an answer the owner ends its connection to the server.
const UNANSWERED_MAX: u8 = 3;
/// Between two attempts of the owner to begin.
const RETRY: (Time, Time) = (150 * MS, 500 * MS);
/// Pieces that were put longer ago than any listing takes are in every one.
const RECENT: Time = 5 * SECOND;

#[derive(Debug)]
pub struct Repository {
    /// This herd's repository votes, or did.
    pub used: bool,
    pub up: bool,
    pub slow: Time,
    pub cut: Vec<u8>,
    /// The next stream begins where the server is, as if nobody had kept the WAL before.
    pub skips: bool,
    /// What is there of each hand: spans that neither touch nor overlap, in order.
    spans: BTreeMap<HandId, Vec<(u64, u64)>>,
    recent: VecDeque<Piece>,
    backups: Vec<Point>,
    seals: BTreeSet<(Incarnation, Term)>,
    adopted: BTreeMap<(Incarnation, Timeline), Term>,
}

/// WAL of one hand, under the number of its timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    hand: HandId,
    from: u64,
    to: u64,
    put_at: Time,
}

/// What is asked of it.
#[derive(Clone, Debug)]
pub enum Call {
    /// The owner takes the term and the timeline up.
    Adopt(StreamOrder),
    Put(Piece),
    /// Is there a seal above the term of this stream?
    LookForSeal(StreamOrder),
    Seal(SealOrder),
    /// A listing begins,
    List(Lister),
    /// and ends; begun at that time.
    ListEnds(Lister, Time),
    Ping(Instant),
}

#[derive(Clone, Debug)]
pub enum Lister {
    Owner(StreamOrder),
    Sealer(SealOrder),
}

#[derive(Clone, Debug)]
pub enum Told {
    Done,
    /// Nothing came back; it may have happened.
    Nothing,
    SealedAbove(bool),
    Found(Box<SealedRepository>),
}

/// Which of the agent's tasks made the call, and in which life of it: what is left of a former one does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    Stream(u32),
    Seal(u32),
    Ping(u32),
}

/// The owner's task.
#[derive(Debug)]
pub struct Stream {
    order: StreamOrder,
    token: u32,
    link: Option<usize>,
    hand: HandId,
    /// Everything before is in the repository, without a hole.
    done: u64,
    /// Where the piece ends that is put, or was put last.
    sent: u64,
    /// What has come from the server.
    arrived: u64,
    under_way: bool,
    /// Calls in a row that nothing came back of.
    unanswered: u8,
}

/// The tasks of an agent that have to do with the repository.
#[derive(Debug, Default)]
pub struct Tasks {
    /// Rises with every task, over all lives of the agent.
    token: u32,
    pub stream: Option<Stream>,
    sealing: Option<(SealOrder, u32)>,
    /// What a broken sealer has listed before it has sealed.
    early: Option<Box<SealedRepository>>,
    pinging: Option<u32>,
}

impl Tasks {
    pub fn of_next_life(&self) -> Tasks {
        Tasks { token: self.token + 1, ..Tasks::default() }
    }
}

impl Repository {
    pub fn new(nodes: usize) -> Repository {
        Repository {
            used: false,
            up: true,
            slow: 0,
            cut: vec![0; nodes],
            skips: false,
            spans: BTreeMap::new(),
            recent: VecDeque::new(),
            backups: Vec::new(),
            seals: BTreeSet::new(),
            adopted: BTreeMap::new(),
        }
    }

    /// A base backup that can be restored from there on.
    pub fn add_backup(&mut self, at: Point) {
        self.backups.push(at);
    }

    pub fn add(&mut self, hand: HandId, from: u64, to: u64) {
        let spans = self.spans.entry(hand).or_default();
        spans.push((from, to));
        spans.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(spans.len());
        for (from, to) in spans.drain(..) {
            match merged.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => merged.push((from, to)),
            }
        }
        *spans = merged;
    }

    fn put(&mut self, piece: Piece) {
        self.add(piece.hand, piece.from, piece.to);
        while self.recent.front().is_some_and(|old| old.put_at + RECENT < piece.put_at) {
            self.recent.pop_front();
        }
        self.recent.push_back(piece);
    }

    pub fn adopt(&mut self, incarnation: Incarnation, timeline: Timeline, term: Term) {
        self.adopted.insert((incarnation, timeline), term);
    }

    pub fn is_sealed(&self, incarnation: Incarnation, term: Term) -> bool {
        self.seals.range((incarnation, term)..=(incarnation, Term(u64::MAX))).next().is_some()
    }

    pub fn adopted(&self, incarnation: Incarnation) -> BTreeMap<Timeline, Term> {
        let all = self.adopted.iter().filter(|((of, _), _)| *of == incarnation);
        all.map(|((_, timeline), term)| (*timeline, *term)).collect()
    }

    /// The highest incarnation that has left something.
    fn admitted(&self) -> Incarnation {
        let seals = self.seals.iter().map(|(incarnation, _)| *incarnation);
        let adopted = self.adopted.keys().map(|(incarnation, _)| *incarnation);
        seals.chain(adopted).max().unwrap_or_default()
    }

    /// How far WAL goes on the line of history of `hand` from `at`, up to the first hole.
    fn reaches(
        &self,
        wal: &Wal,
        hand: HandId,
        mut at: u64,
        sees: &impl Fn(HandId) -> Vec<(u64, u64)>,
    ) -> u64 {
        for (from, to) in line_of(wal, hand, sees) {
            if from <= at {
                at = at.max(to);
            }
        }
        at
    }

    /// From where on there is WAL without a hole up to an end that can be had.
    fn had_from(&self, wal: &Wal, end: Point, sees: &impl Fn(HandId) -> Vec<(u64, u64)>) -> u64 {
        let mut line = line_of(wal, end.hand, sees);
        line.sort_unstable_by_key(|(_, to)| std::cmp::Reverse(*to));
        let mut at = end.at;
        for (from, to) in line {
            if to >= at {
                at = at.min(from);
            }
        }
        at
    }

    /// Is there what comes right before `point`, wherever the hole in front of that is?
    fn has_before(&self, wal: &Wal, point: Point) -> bool {
        let sees = self.all();
        let before = |from: u64, to: u64| from < point.at && point.at <= to;
        let there = wal.lineage(point.hand).any(|id| sees(id).into_iter().any(|(from, to)| before(from, to)));
        there || self.backups.contains(&point)
    }

    /// What can be made of it on the line of `hand`: from a base backup to the first hole.
    fn copy_on(&self, wal: &Wal, hand: HandId, sees: &impl Fn(HandId) -> Vec<(u64, u64)>) -> Option<u64> {
        let tip = Point { hand, at: u64::MAX };
        let backups = self.backups.iter().filter(|backup| wal.holds(tip, **backup));
        backups.map(|backup| self.reaches(wal, hand, backup.at, sees)).max()
    }

    /// Where a stream of this hand begins, and whether everything before can be had.
    fn goes_on_at(&self, wal: &Wal, hand: HandId) -> (bool, u64) {
        let sees = self.all();
        match self.copy_on(wal, hand, &sees) {
            Some(at) => (true, at),
            None => (false, self.reaches(wal, hand, 0, &sees)),
        }
    }

    fn all(&self) -> impl Fn(HandId) -> Vec<(u64, u64)> + '_ {
        |hand| self.spans.get(&hand).cloned().unwrap_or_default()
    }

    /// Can everything up to `point` be had of it?
    pub fn holds(&self, wal: &Wal, point: Point) -> bool {
        let point = wal.settle(point);
        let sees = self.all();
        self.copy_on(wal, point.hand, &sees).is_some_and(|end| end >= point.at)
            || self.ends(wal, &sees).into_iter().any(|end| wal.holds(end, point))
    }

    /// What its vote would say if it were sealed now.
    pub fn position(&self, wal: &Wal, record: &Record, adopted: &BTreeMap<Timeline, Term>) -> Position {
        let worth = |end: Point| {
            let begins = wal.begins(end.hand);
            election::position(record, adopted, wal.number(end), lsn(end.at), &begins).0
        };
        self.ends(wal, &self.all()).into_iter().map(worth).max().unwrap_or_default()
    }

    /// Every end that can be had of it.
    fn ends(&self, wal: &Wal, sees: &impl Fn(HandId) -> Vec<(u64, u64)>) -> Vec<Point> {
        let hands: BTreeSet<HandId> =
            self.spans.keys().copied().chain(self.backups.iter().map(|backup| backup.hand)).collect();
        let ends = hands.into_iter().filter_map(|hand| {
            let at = self.copy_on(wal, hand, sees)?;
            Some(wal.settle(Point { hand, at }))
        });
        ends.collect()
    }
}

impl World {
    fn reaches_repository(&self, node: usize) -> bool {
        self.repository.up && self.repository.cut[node] == 0
    }

    fn repository_trip(&mut self) -> Time {
        let slow = self.repository.slow;
        self.span_or((2 * MS, 18 * MS), 30, (50 * MS, 2 * SECOND)) + slow
    }

    fn call(&mut self, node: usize, task: Task, call: Call) {
        let takes = self.repository_trip();
        self.after(takes, Event::Objects { node, task, call });
    }

    /// A call arrives. Whoever made it may be dead by now.
    pub fn objects(&mut self, node: usize, task: Task, call: Call) {
        if !self.reaches_repository(node) || self.random.once_in(200) {
            self.after(ATTEMPT, Event::ObjectsAnswer { node, task, told: Told::Nothing });
            return;
        }
        let told = match call {
            Call::Adopt(order) => {
                let incarnation = order.member.incarnation;
                self.repository.adopt(incarnation, order.timeline, order.line);
                self.repository.seals.insert((incarnation, order.term));
                Told::Done
            }
            Call::Put(piece) => {
                let piece = Piece { put_at: self.now, ..piece };
                checkers::repository::put(self, piece.hand);
                self.repository.put(piece);
                Told::Done
            }
            Call::LookForSeal(order) => {
                Told::SealedAbove(self.repository.is_sealed(order.member.incarnation, order.term.next()))
            }
            Call::Seal(order) => {
                self.repository.seals.insert((order.member.incarnation, order.term));
                self.tell(Some(node), |_| format!("has sealed the repository for term {}", order.term));
                Told::Done
            }
            Call::List(lister) => {
                let takes = self.span_or((MS, 10 * MS), 20, (20 * MS, SECOND));
                let begun = self.now;
                self.after(takes, Event::Objects { node, task, call: Call::ListEnds(lister, begun) });
                return;
            }
            Call::ListEnds(lister, begun) => Told::Found(Box::new(self.found(lister, begun))),
            Call::Ping(_) => Told::Done,
        };
        let (takes, told) =
            if self.random.once_in(150) { (ATTEMPT, Told::Nothing) } else { (self.repository_trip(), told) };
        self.after(takes, Event::ObjectsAnswer { node, task, told });
    }

    /// What a listing shows that began then: everything that was there, and of what came since whatever it happened to see.
    fn found(&mut self, lister: Lister, begun: Time) -> SealedRepository {
        let late: Vec<Piece> =
            self.repository.recent.iter().copied().filter(|piece| piece.put_at > begun).collect();
        let mut unseen = Vec::new();
        for piece in late {
            if self.random.once_in(2) {
                unseen.push(piece);
            }
        }
        let counts_holes = self.broken(Breakage::HoleCountedAsCovered);
        let (spans, wal) = (&self.repository.spans, &self.wal);
        let sees = |hand: HandId| {
            let mut seen = spans.get(&hand).cloned().unwrap_or_default();
            for piece in unseen.iter().filter(|piece| piece.hand == hand) {
                seen = without(&seen, piece.from, piece.to);
            }
            if counts_holes && let (Some(first), Some(last)) = (seen.first(), seen.last()) {
                seen = vec![(first.0.min(wal.hand(hand).begin), last.1)];
            }
            seen
        };
        let order = match lister {
            Lister::Owner(order) => SealOrder { member: order.member, term: order.term },
            Lister::Sealer(order) => order,
        };
        let adopted = self.repository.adopted(order.member.incarnation);
        let record = Rc::clone(&self.store.record);
        let copies = self.repository.ends(wal, &sees).into_iter().map(|end| {
            let copy = Copy {
                system: record.system,
                timeline: wal.number(end),
                end: Some(lsn(end.at)),
                begins: wal.begins(end.hand),
            };
            (copy, lsn(self.repository.had_from(wal, end, &sees)))
        });
        let worth = |(copy, _): &(Copy, _)| {
            let end = copy.end.unwrap_or_default();
            election::position(&record, &adopted, copy.timeline, end, &copy.begins)
        };
        let (copy, from) = copies.max_by_key(worth).unwrap_or_default();
        SealedRepository { order, copy, from, adopted }
    }

    pub fn objects_answer(&mut self, node: usize, task: Task, told: Told) {
        if !self.agent_runs(node) {
            return;
        }
        match task {
            Task::Stream(token) => {
                if self.nodes[node].agent.tasks.stream.as_ref().is_some_and(|stream| stream.token == token) {
                    self.stream_told(node, told);
                }
            }
            Task::Seal(token) => self.seal_told(node, token, told),
            Task::Ping(token) => {
                if self.nodes[node].agent.tasks.pinging == Some(token) {
                    self.ping_told(node, &told);
                }
            }
        }
    }

    // What the agent was given to do.

    pub fn repository_duties(&mut self, node: usize, duties: &Duties) {
        if !self.repository.used {
            return;
        }
        let outlives = self.broken(Breakage::StreamOutlivesItsOrder);
        let tasks = &mut self.nodes[node].agent.tasks;
        if let (true, Some(stream), Some(order)) = (outlives, &mut tasks.stream, &duties.voter) {
            stream.order = order.clone();
        }
        if tasks.stream.as_ref().map(|stream| &stream.order) != duties.voter.as_ref() {
            self.end_stream(node);
            if let Some(order) = duties.voter.clone() {
                let token = self.next_token(node);
                self.nodes[node].agent.tasks.stream = Some(Stream {
                    order,
                    token,
                    link: None,
                    hand: 0,
                    done: 0,
                    sent: 0,
                    arrived: 0,
                    under_way: false,
                    unanswered: 0,
                });
                self.adopt_and_list(node);
            }
        }
        let tasks = &self.nodes[node].agent.tasks;
        if tasks.sealing.as_ref().map(|(order, _)| order) != duties.seal_repository.as_ref() {
            let token = self.next_token(node);
            let tasks = &mut self.nodes[node].agent.tasks;
            tasks.early = None;
            tasks.sealing = duties.seal_repository.clone().map(|order| (order, token));
            self.seal_or_list(node);
        }
        let tasks = &self.nodes[node].agent.tasks;
        if duties.ask_repository != tasks.pinging.is_some() {
            let token = self.next_token(node);
            self.nodes[node].agent.tasks.pinging = duties.ask_repository.then_some(token);
            self.ping(node, token);
        }
    }

    fn next_token(&mut self, node: usize) -> u32 {
        let tasks = &mut self.nodes[node].agent.tasks;
        tasks.token += 1;
        tasks.token
    }

    // Asking whether it answers.

    pub fn ping(&mut self, node: usize, token: u32) {
        if self.agent_runs(node) && self.nodes[node].agent.tasks.pinging == Some(token) {
            let asked = self.nodes[node].clock.local(self.now);
            self.nodes[node].agent.pinged = asked;
            self.call(node, Task::Ping(token), Call::Ping(asked));
            self.after(micros(repository::ASK_EVERY), Event::Pings { node, token });
        }
    }

    fn ping_told(&mut self, node: usize, told: &Told) {
        if matches!(told, Told::Done) {
            let agent = &mut self.nodes[node].agent;
            // The answer may be that of an earlier one, which says less.
            let asked = agent.pinged;
            agent.local.repository.answered = agent.local.repository.answered.max(Some(asked));
            self.think_within(node, 5 * MS);
        }
    }

    // Sealing.

    fn seal_or_list(&mut self, node: usize) {
        let Some((order, token)) = self.nodes[node].agent.tasks.sealing.clone() else { return };
        let call = if self.broken(Breakage::ListingBeforeTheSeal) {
            Call::List(Lister::Sealer(order))
        } else {
            Call::Seal(order)
        };
        self.call(node, Task::Seal(token), call);
    }

    fn seal_told(&mut self, node: usize, token: u32, told: Told) {
        let tasks = &mut self.nodes[node].agent.tasks;
        let Some((order, _)) = tasks.sealing.clone().filter(|(_, of)| *of == token) else { return };
        let first = self.broken(Breakage::ListingBeforeTheSeal);
        let tasks = &mut self.nodes[node].agent.tasks;
        match told {
            Told::Done if first => {
                if let Some(found) = tasks.early.take() {
                    self.repository_seen(node, *found);
                }
            }
            Told::Done => self.call(node, Task::Seal(token), Call::List(Lister::Sealer(order))),
            Told::Found(found) if first => {
                tasks.early = Some(found);
                let takes = self.repository_trip() + self.span(20 * MS, 400 * MS);
                self.after(takes, Event::Objects { node, task: Task::Seal(token), call: Call::Seal(order) });
            }
            Told::Found(found) => self.repository_seen(node, *found),
            Told::Nothing | Told::SealedAbove(_) => self.seal_or_list(node),
        }
    }

    fn repository_seen(&mut self, node: usize, found: SealedRepository) {
        self.nodes[node].agent.local.repository.sealed = Some(found);
        self.think_within(node, MS);
    }

    // Streaming.

    fn stream(&mut self, node: usize) -> Option<&mut Stream> {
        self.nodes[node].agent.tasks.stream.as_mut()
    }

    fn stream_calls(&mut self, node: usize, call: Call) {
        if let Some(token) = self.stream(node).map(|stream| stream.token) {
            self.call(node, Task::Stream(token), call);
        }
    }

    fn adopt_and_list(&mut self, node: usize) {
        let order = self.stream(node).map(|stream| stream.order.clone());
        if let Some(order) = order {
            self.stream_calls(node, Call::Adopt(order));
        }
    }

    /// From the beginning, after a while; calls of before are nobody's.
    fn stream_again(&mut self, node: usize) {
        self.end_link(node);
        let token = self.next_token(node);
        let Some(stream) = self.stream(node) else { return };
        (stream.token, stream.under_way, stream.unanswered) = (token, false, 0);
        let late = self.span(RETRY.0, RETRY.1);
        self.after(late, Event::StreamBegins { node, token });
    }

    pub fn stream_begins(&mut self, node: usize, token: u32) {
        if self.agent_runs(node) && self.stream(node).is_some_and(|stream| stream.token == token) {
            self.adopt_and_list(node);
        }
    }

    fn stream_told(&mut self, node: usize, told: Told) {
        let Some(stream) = self.stream(node) else { return };
        let (order, linked, puts) = (stream.order.clone(), stream.link.is_some(), stream.under_way);
        let (hand, from, to) = (stream.hand, stream.done, stream.sent);
        stream.unanswered = if matches!(told, Told::Nothing) { stream.unanswered + 1 } else { 0 };
        let is_lost = stream.unanswered >= UNANSWERED_MAX;
        match told {
            // Without a connection it is seen by the primary that it confirms nothing.
            Told::Nothing if linked && is_lost => self.stream_again(node),
            Told::Done if !linked && puts => {
                // What was put before it streams as a voter: a piece behind a hole, or what was missing.
                self.stream_again(node);
            }
            Told::Done if !linked => self.stream_calls(node, Call::List(Lister::Owner(order))),
            Told::Done => {
                if self.broken(Breakage::PieceReportedBeforeTheQuestion) {
                    self.stream_tells(node);
                    let takes = self.span(100 * MS, 600 * MS);
                    let token = self.stream(node).map_or(0, |stream| stream.token);
                    let call = Call::LookForSeal(order);
                    self.after(takes, Event::Objects { node, task: Task::Stream(token), call });
                    if let Some(stream) = self.stream(node) {
                        stream.under_way = false;
                    }
                    return self.put_next(node);
                }
                self.stream_calls(node, Call::LookForSeal(order));
            }
            Told::Found(_) => self.stream_connects(node),
            Told::SealedAbove(true) => {
                self.tell(Some(node), |_| "finds the repository sealed, and tells nothing".to_owned());
                self.stream_again(node);
            }
            Told::SealedAbove(false) => {
                self.stream_tells(node);
                if let Some(stream) = self.stream(node) {
                    stream.under_way = false;
                }
                self.put_next(node);
            }
            // Both are done again: a piece that is there already is the same one.
            Told::Nothing if linked && to > from => {
                self.stream_calls(node, Call::Put(Piece { hand, from, to, put_at: 0 }));
            }
            Told::Nothing if linked => self.stream_calls(node, Call::LookForSeal(order)),
            Told::Nothing => self.stream_again(node),
        }
    }

    /// How far it has come in the repository is told to the server, as flushed.
    fn stream_tells(&mut self, node: usize) {
        let Some(stream) = self.stream(node) else { return };
        stream.done = stream.sent;
        let (at, hand, Some(link)) = (stream.done, stream.hand, stream.link) else { return };
        checkers::repository::told(self, Point { hand, at });
        let takes = self.wire();
        self.after(takes, Event::Replies { link, at });
    }

    fn stream_connects(&mut self, node: usize) {
        let Some(order) = self.stream(node).map(|stream| stream.order.clone()) else { return };
        let sealed = self.repository.is_sealed(order.member.incarnation, order.term.next());
        let up = self.index(&order.source).filter(|up| !sealed && self.serves_repository(node, *up, &order));
        let Some(up) = up else { return self.stream_again(node) };
        let source = &self.nodes[up].postgres;
        let (hand, flushed, generation) = (source.hand, source.flushed, source.generation);
        let (covered, from) = self.repository.goes_on_at(&self.wal, hand);
        let skips = self.repository.skips && flushed > from + 1;
        let careless = skips && self.broken(Breakage::HoleReported);
        if skips {
            self.repository.skips = false;
        }
        let from = if skips { from.max(flushed - 1) } else { from };
        let voter = covered && !skips || careless;
        let Some(stream) = self.stream(node) else { return };
        (stream.hand, stream.done, stream.sent, stream.arrived) = (hand, from, from, from);
        if !voter {
            if flushed > from {
                stream.under_way = true;
                self.stream_calls(node, Call::Put(Piece { hand, from, to: flushed, put_at: 0 }));
            } else {
                self.stream_again(node);
            }
            return;
        }
        let link = self.add_repository_link(up, node, generation);
        let Some(stream) = self.stream(node) else { return };
        stream.link = Some(link);
        stream.under_way = true;
        let upstream = &mut self.nodes[up].postgres;
        upstream.pids += 1;
        upstream.senders.push(Sender {
            link: Some(link),
            pid: upstream.pids,
            node: REPOSITORY,
            incarnation: order.member.incarnation.0,
            timeline: order.timeline,
            streaming: false,
            flush: None,
            list: Rc::clone(&upstream.loaded),
        });
        upstream.touch();
        // What is there already counts as soon as nobody has sealed it.
        self.stream_calls(node, Call::LookForSeal(order));
    }

    /// Is that server the one that the order means, and can it be streamed from?
    fn serves_repository(&self, node: usize, up: usize, order: &StreamOrder) -> bool {
        let there = &self.nodes[up];
        let reachable = there.host_up
            && there.frozen_until <= self.now
            && (up == node || self.network.both_ways(Layer::Replication, node, up));
        let server = &there.postgres;
        reachable
            && server.state == State::Primary
            && self.wal.hand(server.hand).number == order.timeline
            && server.slots.contains(&REPOSITORY)
            && !server.senders.iter().any(|sender| sender.link.is_some() && sender.node == REPOSITORY)
    }

    /// WAL has come to the owner.
    pub fn repository_ships(&mut self, link: usize) {
        let (up, node) = (self.links[link].upstream, self.links[link].standby);
        let (hand, flushed) = (self.nodes[up].postgres.hand, self.nodes[up].postgres.flushed);
        let Some(stream) = self.stream(node) else { return };
        if stream.hand != hand {
            return self.stream_again(node);
        }
        stream.arrived = flushed;
        self.put_next(node);
    }

    /// One piece at a time.
    fn put_next(&mut self, node: usize) {
        let Some(stream) = self.stream(node) else { return };
        if stream.under_way || stream.arrived <= stream.sent || stream.link.is_none() {
            return;
        }
        stream.under_way = true;
        stream.sent = stream.arrived;
        let piece = Piece { hand: stream.hand, from: stream.done, to: stream.sent, put_at: 0 };
        self.stream_calls(node, Call::Put(piece));
    }

    /// Its connection ends; the task goes on.
    fn end_link(&mut self, node: usize) {
        let Some(link) = self.stream(node).and_then(|stream| stream.link.take()) else { return };
        let upstream = self.links[link].upstream;
        let told = self.nodes[node].host_up
            && (upstream == node || self.network.passes(Layer::Replication, node, upstream));
        let late = if told { self.wire() } else { 3 * SECOND };
        self.after(late, Event::SenderSeesEnd { link });
    }

    /// Its connection breaks, and it begins anew.
    pub fn stream_breaks(&mut self, node: usize) {
        if self.agent_runs(node) && self.stream(node).is_some() {
            self.stream_again(node);
        }
    }

    pub fn end_stream(&mut self, node: usize) {
        self.end_link(node);
        self.nodes[node].agent.tasks.stream = None;
    }

    /// The server that it streams from is gone, or the way to it.
    pub fn repository_link_ends(&mut self, link: usize) {
        let node = self.links[link].standby;
        if self.agent_runs(node) {
            self.stream_again(node);
        }
    }

    pub fn streams_over(&self, node: usize, link: usize) -> bool {
        let tasks = &self.nodes[node].agent.tasks;
        self.nodes[node].agent.up && tasks.stream.as_ref().is_some_and(|stream| stream.link == Some(link))
    }

    // What others ask about it.

    /// The repository as the member that it is now.
    pub fn repository_member(&self) -> Option<Member> {
        self.store.record.repository().filter(|_| self.repository.used)
    }

    pub fn name_of(&self, node: usize) -> NodeName {
        if node == REPOSITORY { NodeName::repository() } else { self.nodes[node].name.clone() }
    }

    /// As [`World::index`], and the repository's where it is asked for that.
    pub fn slot_index(&self, name: &NodeName) -> Option<usize> {
        if name.is_repository() { Some(REPOSITORY) } else { self.index(name) }
    }

    /// A slot for everybody.
    pub fn all_slots(&self) -> Vec<usize> {
        (0..self.nodes.len()).chain(self.repository.used.then_some(REPOSITORY)).collect()
    }

    pub fn admitted_before(&self, node: usize) -> Option<Incarnation> {
        let looks = self.repository.used && self.reaches_repository(node);
        looks.then(|| self.repository.admitted())
    }

    /// Is there a base backup that leads to where this node's server is? Where it votes another one is due without.
    pub fn repository_leads(&self, node: usize) -> bool {
        let hand = self.nodes[node].postgres.hand;
        !self.repository.used || self.repository.copy_on(&self.wal, hand, &self.repository.all()).is_some()
    }

    /// A base backup of this node's server; `false`: it is not complete, because the WAL in front of its end has not come yet.
    pub fn repository_backed_up(&mut self, node: usize) -> bool {
        let end = self.wal.settle(self.nodes[node].postgres.durable_end());
        let hand = self.wal.hand(end.hand);
        let agreed = self
            .store
            .record
            .line(hand.number)
            .is_some_and(|line| hand.number == Timeline(1) || hand.term == Some(line.term));
        if !self.repository.used || !agreed || !self.nodes[node].postgres.has_copy() {
            return true;
        }
        if !self.repository.has_before(&self.wal, end) {
            return false;
        }
        self.repository.add_backup(end);
        true
    }

    /// Fetches WAL up to `at` on the line of `timeline` to a copy that ends at `mine`. `None`: something is missing.
    pub fn fetched(&self, node: usize, timeline: Timeline, mine: Option<Point>, at: u64) -> Option<Point> {
        if !self.reaches_repository(node) {
            return None;
        }
        let hand = self.agreed_hand(&self.store.record, timeline)?;
        let sees = self.repository.all();
        let reached = match mine {
            Some(mine) => {
                self.wal.admits(Point { hand, at }, mine)?;
                self.repository.reaches(&self.wal, hand, mine.at, &sees)
            }
            None => self.repository.copy_on(&self.wal, hand, &sees)?,
        };
        (reached >= at).then_some(Point { hand, at })
    }

    pub fn repository_text(&self) -> String {
        let best =
            self.repository.ends(&self.wal, &self.repository.all()).into_iter().max_by_key(|end| end.at);
        best.map_or_else(|| "nothing".to_owned(), |end| self.point_text(end))
    }
}

/// What is there of a line of history, in order. Files of a timeline begin with what was before its fork, and end for this line where the next one
/// begins.
fn line_of(wal: &Wal, hand: HandId, sees: &impl Fn(HandId) -> Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut limit = u64::MAX;
    let mut line = Vec::new();
    for id in wal.lineage(hand) {
        line.extend(sees(id).into_iter().map(|(from, to)| (from, to.min(limit))));
        limit = wal.hand(id).begin;
    }
    line.sort_unstable();
    line
}

/// `spans` without what lies between.
fn without(spans: &[(u64, u64)], from: u64, to: u64) -> Vec<(u64, u64)> {
    let left = spans.iter().map(|span| (span.0, span.1.min(from)));
    let right = spans.iter().map(|span| (span.0.max(to), span.1));
    let mut kept: Vec<(u64, u64)> = left.chain(right).filter(|(from, to)| from < to).collect();
    kept.sort_unstable();
    kept
}
