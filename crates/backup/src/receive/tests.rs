//! A server that goes on, switches and forgets, a store that takes its time, and a receiver that is cut off and killed in
//! between: in the end the archive is what an uncut stream gives.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::breakage::breaking;
use crate::testing::{Random, SEGMENT_BYTES, archive, repository, run, segments, wal};
use crate::wal::{Fork, Piece};

mod voting;

const SEG: u64 = SEGMENT_BYTES as u64;
const SEGMENTS: u64 = 5;
/// Where every story begins: in the middle of a segment, as a slot is made.
const FIRST: Lsn = Lsn(2 * SEG + 12_345);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Segment(Segment),
    Partial(Segment, u64),
    Piece(Segment, u32, u64),
    History(Timeline),
}

type Store = BTreeMap<Key, Bytes>;

fn key(object: &Object) -> (Key, Bytes) {
    match object {
        Object::Segment { segment, content } => (Key::Segment(*segment), content.clone()),
        Object::Partial { segment, content } => {
            (Key::Partial(*segment, content.len() as u64), content.clone())
        }
        Object::Piece { segment, from, content } => {
            (Key::Piece(*segment, *from, content.len() as u64), content.clone())
        }
        Object::History { timeline, content } => (Key::History(*timeline), content.clone()),
    }
}

fn inventory(store: &Store) -> Inventory {
    let mut inventory = Inventory::new(segments());
    let mut pieces: BTreeMap<Segment, Vec<Piece>> = BTreeMap::new();
    for (key, content) in store {
        match key {
            Key::Segment(segment) => inventory.add(*segment),
            Key::Partial(..) => {}
            Key::Piece(segment, from, bytes) => {
                let piece = Piece { segment: *segment, from: *from, to: from + *bytes as u32 };
                pieces.entry(*segment).or_default().push(piece);
            }
            Key::History(timeline) => inventory.add_history(History::parse(*timeline, content).unwrap()),
        }
    }
    for (segment, pieces) in pieces {
        if !inventory.has(segment) {
            inventory.add_pieces(&pieces);
        }
    }
    inventory
}

/// The server, or rather whoever is the primary: it writes, and leaves its timeline at each fork.
struct Server {
    wal: Vec<u8>,
    forks: Vec<Fork>,
    /// How many of the forks lie behind it.
    switches: usize,
    end: Lsn,
    /// What its slot keeps from.
    restart: Lsn,
    /// Where it stops writing.
    last: Lsn,
}

impl Server {
    fn new(forks: &[u64], last: Lsn) -> Server {
        let mut random = Random(forks.iter().sum());
        let words = (SEGMENTS * SEG / 8) as usize;
        let wal = (0..words).flat_map(|_| random.next().to_le_bytes()).collect();
        // A number is left out, as where one was reserved and not taken.
        let fork =
            |(at, until): (usize, &u64)| Fork { timeline: Timeline(1 + 2 * at as u32), until: Lsn(*until) };
        let forks = forks.iter().enumerate().map(fork).collect();
        Server { wal, forks, switches: 0, end: FIRST, restart: FIRST, last }
    }

    fn bytes(&self, from: Lsn, to: Lsn) -> &[u8] {
        &self.wal[(from.0 - 2 * SEG) as usize..(to.0 - 2 * SEG) as usize]
    }

    fn timeline(&self) -> Timeline {
        Timeline(1 + 2 * self.switches as u32)
    }

    fn history(&self, timeline: Timeline) -> (History, Bytes) {
        let forks: Vec<Fork> = self.forks.iter().copied().filter(|fork| fork.timeline < timeline).collect();
        let lines = forks.iter().map(|fork| format!("{}\t{}\tno reason\n", fork.timeline, fork.until));
        let text = lines.collect::<String>();
        (History::new(timeline, forks).unwrap(), text.into())
    }

    /// Writes so much, but not beyond the next fork.
    fn write(&mut self, bytes: u64) {
        let most = self.forks.get(self.switches).map_or(self.last, |fork| fork.until);
        self.end = Lsn(self.end.0 + bytes).min(most);
    }

    fn switch(&mut self) {
        if self.forks.get(self.switches).is_some_and(|fork| fork.until == self.end) {
            self.switches += 1;
        }
    }

    fn is_done(&self) -> bool {
        self.switches == self.forks.len() && self.end == self.last
    }
}

/// A receiver's life, as far as it is connected.
struct Life {
    receiver: Receiver,
    begun: Vec<(Ticket, Object)>,
    is_connected: bool,
}

struct Story {
    server: Server,
    store: Store,
    random: Random,
    deaths: usize,
    pieces: bool,
}

impl Story {
    fn born(&self) -> Result<Life, String> {
        let (history, _) = self.server.history(self.server.timeline());
        let inventory = inventory(&self.store);
        let otherwise = (history.timeline_at(self.server.restart), self.server.restart);
        let begin = resume(segments(), &inventory, &history, otherwise, Branch::Refuse);
        let begin = begin.map_err(|error| error.to_string())?;
        let needed = begin.needs_history.then(|| self.server.history(begin.segment.timeline).1);
        let receiver = Receiver::new(segments(), begin, needed);
        let receiver = match self.pieces {
            true => receiver.with_pieces(Duration::from_millis(20)),
            false => receiver,
        };
        Ok(Life { receiver, begun: Vec::new(), is_connected: false })
    }

    /// Whether every byte from the first one to `position` is in the store, as the server has it.
    fn is_durable(&self, position: Lsn) -> bool {
        let range = |(key, content): (&Key, &Bytes)| {
            let (segment, from) = match key {
                Key::Segment(segment) | Key::Partial(segment, _) => (segment, 0),
                Key::Piece(segment, from, _) => (segment, *from),
                Key::History(_) => return None,
            };
            let start = Lsn(segments().start(*segment).0 + u64::from(from));
            Some((start, Lsn(start.0 + content.len() as u64), content.clone()))
        };
        let ranges: Vec<_> = self.store.iter().filter_map(range).collect();
        let mut reached = Lsn(2 * SEG);
        loop {
            let further = ranges.iter().filter(|(start, end, _)| *start <= reached && *end > reached);
            match further.map(|(_, end, _)| *end).max() {
                Some(further) => reached = further,
                None => break,
            }
        }
        position <= reached
            && ranges.iter().all(|(start, end, content)| content == self.server.bytes(*start, *end))
    }

    /// One put of those that are under way has come to its end.
    fn settle(&mut self, life: &mut Life, works: bool) {
        if life.begun.is_empty() {
            return;
        }
        let at = self.random.below(life.begun.len() as u64) as usize;
        let (ticket, object) = life.begun.swap_remove(at);
        if works {
            let (key, content) = key(&object);
            if let Some(there) = self.store.get(&key) {
                assert_eq!(*there, content, "{key:?} is never put with another content");
            }
            self.store.insert(key, content);
            life.receiver.put(ticket);
        } else {
            life.receiver.put_failed(ticket);
        }
    }

    fn connect(&mut self, life: &mut Life) -> Result<(), String> {
        let (history, _) = self.server.history(self.server.timeline());
        let (timeline, position) = life.receiver.reconnect(&history).map_err(|error| error.to_string())?;
        if segments().number(position) < segments().number(self.server.restart) {
            return Err(format!(
                "{position} of {timeline} was removed: {} was reported",
                self.server.restart
            ));
        }
        life.is_connected = true;
        Ok(())
    }

    /// The server sends a piece of what there is of the timeline, or says that it has ended.
    fn send(&mut self, life: &mut Life) -> Result<(), String> {
        let receiver = &mut life.receiver;
        let (timeline, position) = (receiver.timeline(), receiver.position());
        let ended =
            self.server.forks.iter().take(self.server.switches).find(|fork| fork.timeline == timeline);
        let end = ended.map_or(self.server.end, |fork| fork.until);
        if position < end && receiver.has_room() {
            let bytes = (1 + self.random.below(SEG * 3 / 2)).min(end.0 - position.0);
            let to = Lsn(position.0 + bytes);
            receiver.receive(position, self.server.bytes(position, to)).map_err(|error| error.to_string())?;
        } else if position == end && ended.is_some() {
            let next = Timeline(timeline.0 + 2);
            let (_, history) = self.server.history(next);
            receiver.end_timeline(next, end, history).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn report(&mut self, life: &Life) -> Result<(), String> {
        let durable = life.receiver.durable();
        if durable > FIRST && !self.is_durable(durable) {
            return Err(format!("{durable} was reported and is not durable"));
        }
        self.server.restart = self.server.restart.max(durable);
        Ok(())
    }
}

/// What is in the store when all is received, with so many deaths and any number of cuts in between.
fn received(forks: &[u64], seed: u64, deaths: usize, pieces: bool) -> Result<Store, String> {
    // Without pieces the end of a segment that is not complete stays with the server.
    let last = Lsn((2 + SEGMENTS) * SEG - if pieces { 4_321 } else { 0 });
    let (server, random) = (Server::new(forks, last), Random(seed));
    let mut story = Story { server, store: Store::new(), random, deaths, pieces };
    let mut life = story.born()?;
    for step in 0_u64.. {
        if step > 20_000 {
            return Err(format!("it does not come to an end: {:?}", life.receiver));
        }
        let quiet = story.deaths == 0;
        life.receiver.tick(Instant::from_boot(Duration::from_millis(step)));
        match story.random.below(24) {
            0..4 => story.server.write(SEG / 3),
            4 => story.server.switch(),
            5..13 if life.is_connected => story.send(&mut life)?,
            5..7 => story.connect(&mut life)?,
            13..16 => {
                if let Some(put) = life.receiver.next_put() {
                    life.begun.push(put);
                }
            }
            16..19 => story.settle(&mut life, true),
            19 if !quiet => story.settle(&mut life, false),
            20 if !quiet => life.is_connected = false,
            21 if !quiet => {
                // What was under way may have arrived, and nobody is told.
                while !life.begun.is_empty() {
                    let arrives = story.random.below(2) == 0;
                    if arrives {
                        story.settle(&mut life, true);
                    } else {
                        life.begun.pop();
                    }
                }
                story.deaths -= 1;
                life = story.born()?;
            }
            22..24 if life.is_connected => story.report(&life)?,
            _ => {}
        }
        let is_received = life.receiver.position() == story.server.last;
        if story.server.is_done() && is_received && life.receiver.durable() == story.server.last {
            return match story.is_durable(story.server.last) {
                true => Ok(story.store),
                false => Err("it says that all is durable, and it is not".to_owned()),
            };
        }
    }
    unreachable!()
}

fn forks() -> impl Strategy<Value = Vec<u64>> {
    let within = FIRST.0 + 1..(2 + SEGMENTS) * SEG - SEG / 2;
    // Forks in one segment, at its edges, and anywhere.
    let one = prop_oneof![within, (3..2 + SEGMENTS).prop_map(|number| number * SEG)];
    proptest::collection::vec(one, 0..4).prop_map(|mut forks| {
        forks.sort_unstable();
        forks.dedup();
        forks
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn case_01_any_cuts_deaths_and_switches_give_the_archive_of_an_uncut_stream(
        forks in forks(),
        seed in any::<u64>(),
        deaths in 0_usize..12,
        pieces in any::<bool>(),
    ) {
        let uncut = received(&forks, 1, 0, pieces).map_err(TestCaseError::fail)?;
        let cut = received(&forks, seed, deaths, pieces).map_err(TestCaseError::fail)?;
        // Where pieces were cut is a matter of moments; that they lead to the end was asked of both.
        let whole = |mut store: Store| {
            store.retain(|key, _| !matches!(key, Key::Piece(..)));
            store
        };
        let (uncut, cut) = (whole(uncut), whole(cut));
        let keys = |store: &Store| store.keys().copied().collect::<Vec<_>>();
        prop_assert_eq!(keys(&cut), keys(&uncut));
        prop_assert!(cut == uncut, "the contents differ");
    }
}

#[test]
fn case_03_feedback_is_never_ahead_of_what_is_durable() {
    let fork = [3 * SEG + 777];
    let stories = || (0..12).map(|seed| received(&fork, seed, 4, seed % 2 == 0)).collect::<Vec<_>>();
    for told in stories() {
        told.unwrap();
    }
    let broken = breaking(Some(Broken::FeedbackBeforeFsync), stories);
    let caught = broken.iter().filter(|told| told.is_err()).count();
    assert_eq!(caught, broken.len(), "a build that reports what it has received is caught every time");
}

fn at(timeline: u32, number: u64) -> Begin {
    let segment = Segment { timeline: Timeline(timeline), number };
    let start = segments().start(segment);
    Begin { segment, durable: start, pieced: start, needs_history: false }
}

fn history(timeline: u32, forks: &[(u32, u64)]) -> (History, Bytes) {
    let lines = forks.iter().map(|(left, until)| format!("{left}\t{}\tx\n", Lsn(*until)));
    let text: Bytes = lines.collect::<String>().into();
    (History::parse(Timeline(timeline), &text).unwrap(), text)
}

/// Takes every put that may be made now.
fn puts(receiver: &mut Receiver) -> Vec<(Ticket, Object)> {
    std::iter::from_fn(|| receiver.next_put()).collect()
}

#[test]
fn case_02_nothing_is_spliced() {
    let mut receiver = Receiver::new(segments(), at(1, 2), None);
    receiver.receive(Lsn(2 * SEG), &[1; 100]).unwrap();
    for found in [2 * SEG, 2 * SEG + 99, 2 * SEG + 101] {
        let wanted = Lsn(2 * SEG + 100);
        let error = receiver.receive(Lsn(found), &[1]).unwrap_err();
        assert_eq!(error, ReceiveError::Misplaced { timeline: Timeline(1), wanted, found: Lsn(found) });
    }
    let (_, file) = history(2, &[(1, 2 * SEG + 99)]);
    let error = receiver.end_timeline(Timeline(2), Lsn(2 * SEG + 99), file.clone()).unwrap_err();
    assert!(matches!(error, ReceiveError::EndsElsewhere { .. }), "{error}");
    let error = receiver.end_timeline(Timeline(2), Lsn(2 * SEG + 100), file).unwrap_err();
    assert!(matches!(error, ReceiveError::OtherHistory { .. }), "{error}");
    assert_eq!((receiver.position(), puts(&mut receiver)), (Lsn(2 * SEG + 100), Vec::new()));
}

#[test]
fn case_04_the_old_segment_stays_partial_and_the_new_one_begins_with_its_bytes() {
    let fork = 2 * SEG + 500;
    let mut receiver = Receiver::new(segments(), at(1, 2), None);
    receiver.receive(Lsn(2 * SEG), &[7; 500]).unwrap();
    let (_, file) = history(2, &[(1, fork)]);
    receiver.end_timeline(Timeline(2), Lsn(fork), file.clone()).unwrap();
    assert_eq!((receiver.timeline(), receiver.position()), (Timeline(2), Lsn(2 * SEG)));
    let [(ticket, Object::Partial { segment, content })] = &puts(&mut receiver)[..] else { panic!() };
    assert_eq!((segment.timeline, segment.number, &content[..]), (Timeline(1), 2, &[7; 500][..]));
    receiver.put(*ticket);
    assert_eq!(receiver.durable(), Lsn(fork));
    // The new timeline's segment waits for its history.
    receiver.receive(Lsn(2 * SEG), &vec![7; SEG as usize]).unwrap();
    let [(ticket, Object::History { timeline: Timeline(2), content })] = &puts(&mut receiver)[..] else {
        panic!()
    };
    assert_eq!(*content, file);
    receiver.put(*ticket);
    let [(ticket, Object::Segment { segment, .. })] = &puts(&mut receiver)[..] else { panic!() };
    assert_eq!((segment.timeline, segment.number), (Timeline(2), 2));
    receiver.put(*ticket);
    assert_eq!(receiver.durable(), Lsn(3 * SEG));
}

#[test]
fn case_07_a_history_is_put_before_anything_of_its_timeline() {
    let begin = Begin { needs_history: true, ..at(3, 4) };
    let (_, file) = history(3, &[(1, 4 * SEG + 9)]);
    let mut receiver = Receiver::new(segments(), begin, Some(file));
    receiver.receive(Lsn(4 * SEG), &vec![1; 2 * SEG as usize]).unwrap();
    let [(ticket, Object::History { .. })] = &puts(&mut receiver)[..] else { panic!() };
    receiver.put_failed(*ticket);
    let [(ticket, Object::History { .. })] = &puts(&mut receiver)[..] else { panic!("it is tried again") };
    receiver.put(*ticket);
    assert_eq!(puts(&mut receiver).len(), 1, "the first segment of a life is put alone");
}

#[test]
fn a_few_segments_are_put_at_a_time_and_what_waits_is_limited() {
    let mut receiver = Receiver::new(segments(), at(1, 2), None);
    let mut came = 0;
    while receiver.has_room() {
        receiver.receive(receiver.position(), &vec![1; SEG as usize]).unwrap();
        came += 1;
    }
    assert_eq!(came, MAX_WAITING_BYTES / SEG as usize);
    let [(first, _)] = &puts(&mut receiver)[..] else { panic!() };
    receiver.put(*first);
    let begun = puts(&mut receiver);
    assert_eq!(begun.len(), MAX_PUTS);
    // The last of them arrives first: nothing more is durable in one piece.
    receiver.put(begun[3].0);
    assert_eq!(receiver.durable(), Lsn(3 * SEG));
    receiver.put(begun[0].0);
    assert_eq!(receiver.durable(), Lsn(4 * SEG));
}

#[test]
fn case_01_a_hole_that_a_death_has_left_is_gone_back_to() {
    let mut there = Inventory::new(segments());
    for number in [10, 11, 13, 14] {
        there.add(Segment { timeline: Timeline(1), number });
    }
    let (way, otherwise) = (History::first(), (Timeline(1), Lsn(40 * SEG)));
    let begin = |there: &Inventory| resume(segments(), there, &way, otherwise, Branch::Refuse).unwrap();
    assert_eq!(begin(&there), at(1, 12));
    there.add(Segment { timeline: Timeline(1), number: 12 });
    assert_eq!(begin(&there), at(1, 15));
    // An older one is filled from elsewhere: the server does not have it any more.
    there.add(Segment { timeline: Timeline(1), number: 30 });
    (26..30).for_each(|number| there.add(Segment { timeline: Timeline(1), number }));
    assert_eq!(begin(&there), at(1, 31));
    let nothing = begin(&Inventory::new(segments()));
    assert_eq!((nothing.segment.number, nothing.durable), (40, Lsn::ZERO));
}

#[test]
fn case_05_a_timeline_that_cannot_be_reached_is_refused_or_left() {
    let mut there = Inventory::new(segments());
    (2..7).for_each(|number| there.add(Segment { timeline: Timeline(1), number }));
    let fork = 5 * SEG + 100;
    let (way, _) = history(4, &[(1, fork), (3, 6 * SEG)]);
    let otherwise = (Timeline(4), Lsn(fork));
    let go_on = |branch| resume(segments(), &there, &way, otherwise, branch);
    let expected =
        ReceiveError::Unreachable { timeline: Timeline(1), fork: Lsn(fork), archived: Lsn(7 * SEG) };
    assert_eq!(go_on(Branch::Refuse), Err(expected));
    let left = Begin { durable: Lsn(fork), needs_history: true, ..at(3, 5) };
    assert_eq!(go_on(Branch::Leave), Ok(left));

    // The same while it lives: what is received and not archived may be dropped, what is archived not.
    let mut receiver = Receiver::new(segments(), at(1, 5), None);
    receiver.receive(Lsn(5 * SEG), &[1; 200]).unwrap();
    assert_eq!(receiver.reconnect(&way), Ok((Timeline(1), Lsn(5 * SEG))), "it begins its segment again");
    receiver.receive(Lsn(5 * SEG), &vec![1; SEG as usize]).unwrap();
    let refused = receiver.reconnect(&way).unwrap_err();
    assert!(matches!(refused, ReceiveError::Unreachable { archived, .. } if archived == Lsn(6 * SEG)));
    let (elsewhere, _) = history(4, &[(2, fork)]);
    let unknown = receiver.reconnect(&elsewhere).unwrap_err();
    assert!(matches!(unknown, ReceiveError::NotInHistory { timeline: Timeline(1), .. }), "{unknown}");

    // An old primary that was not told.
    there.add_history(history(9, &[(1, fork)]).0);
    let behind = ReceiveError::ServerBehind { archived: Timeline(9), server: Timeline(4) };
    assert_eq!(resume(segments(), &there, &way, otherwise, Branch::Leave), Err(behind));
}

#[test]
fn pieces_follow_one_another_while_nothing_else_is_to_be_put() {
    let now = |ms| Instant::from_boot(Duration::from_millis(ms));
    let mut receiver = Receiver::new(segments(), at(1, 2), None).with_pieces(Duration::from_millis(1000));
    receiver.tick(now(0));
    assert_eq!(puts(&mut receiver), [], "nothing came");
    receiver.receive(Lsn(2 * SEG), &[1; 100]).unwrap();
    receiver.tick(now(10));
    let [(first, Object::Piece { from: 0, content, .. })] = &puts(&mut receiver)[..] else { panic!() };
    assert_eq!(content.len(), 100);
    receiver.receive(Lsn(2 * SEG + 100), &[2; 50]).unwrap();
    receiver.tick(now(5000));
    assert_eq!(puts(&mut receiver), [], "one is under way");
    assert_eq!(receiver.durable(), Lsn(2 * SEG));
    receiver.put(*first);
    assert_eq!(receiver.durable(), Lsn(2 * SEG + 100));
    receiver.tick(now(900));
    assert_eq!(puts(&mut receiver), [], "it is too early for the next one");
    receiver.tick(now(1010));
    let [(second, Object::Piece { from: 100, content, .. })] = &puts(&mut receiver)[..] else { panic!() };
    assert_eq!(content[..], [2; 50]);
    receiver.put(*second);
    receiver.tick(now(9000));
    assert_eq!(puts(&mut receiver), [], "nothing came since");

    // Where the server left its timeline before a piece's end, that is not dropped in silence.
    let (before, _) = history(2, &[(1, 2 * SEG + 149)]);
    assert!(matches!(receiver.reconnect(&before), Err(ReceiveError::Unreachable { .. })));
    let (behind, _) = history(2, &[(1, 2 * SEG + 150)]);
    assert_eq!(receiver.reconnect(&behind), Ok((Timeline(1), Lsn(2 * SEG + 150))));
}

#[test]
fn whoever_is_next_goes_on_behind_the_pieces() {
    let mut there = Inventory::new(segments());
    let piece = |number, from, to| {
        let segment = Segment { timeline: Timeline(1), number };
        Piece { segment, from, to }
    };
    there.add_pieces(&[piece(7, 0, 100), piece(7, 100, 300), piece(7, 400, 500)]);
    let begin = |there: &Inventory| {
        let otherwise = (Timeline(1), Lsn(40 * SEG));
        resume(segments(), there, &History::first(), otherwise, Branch::Refuse).unwrap()
    };
    let reached = Lsn(7 * SEG + 300);
    assert_eq!(begin(&there), Begin { durable: reached, pieced: reached, ..at(1, 7) });
    let mut receiver = Receiver::new(segments(), begin(&there), None).with_pieces(Duration::ZERO);
    receiver.receive(Lsn(7 * SEG), &[1; 350]).unwrap();
    receiver.tick(Instant::from_boot(Duration::ZERO));
    let [(_, Object::Piece { from: 300, content, .. })] = &puts(&mut receiver)[..] else { panic!() };
    assert_eq!(content.len(), 50);
    there.add(Segment { timeline: Timeline(1), number: 6 });
    assert_eq!(begin(&there).segment.number, 7);
}

/// The machine with the archive itself, over a store whose answers get lost.
#[test]
fn what_is_received_is_what_the_archive_gives_back() {
    run(async {
        let cloud = crate::testing::Cloud::new(3);
        let repository = repository(&cloud).await;
        let archive = archive(&repository);
        let mut receiver = Receiver::new(segments(), at(1, 2), None);
        let contents = [2, 3, 4].map(|number| wal(Segment { timeline: Timeline(1), number }, number));
        for content in &contents {
            receiver.receive(receiver.position(), content).unwrap();
        }
        let mut attempts = 0;
        while receiver.durable() < Lsn(5 * SEG) {
            attempts += 1;
            cloud.bad(|weather| weather.lose_answers = attempts % 2);
            for (ticket, object) in puts(&mut receiver) {
                match archive.put(&object).await {
                    Ok(_) => receiver.put(ticket),
                    Err(_) => receiver.put_failed(ticket),
                }
            }
        }
        assert!(attempts > 2, "answers were lost");
        for (content, number) in contents.iter().zip(2..) {
            let there = archive.segment(Segment { timeline: Timeline(1), number }).await.unwrap();
            assert_eq!(there, *content);
        }
    });
}
