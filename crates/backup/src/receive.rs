//! Receiving WAL: what becomes of a stream, as a machine without sockets and clocks.
//!
//! It is told what came ([`Receiver::receive`]), that a timeline has ended ([`Receiver::end_timeline`]) and what was put, and
//! says what is to be put ([`Receiver::next_put`]) and what may be reported ([`Receiver::durable`]).
//!
//! * What is reported is durable: everything before it is in the archive, not only on its way there.
//! * Nothing is spliced: WAL that does not follow what came before is an error with both positions.
//! * A timeline's history is put behind everything of the timeline before and before anything of its own. So whatever of the new
//!   one is there, the old one is complete, with the partial segment in which it ended.
//! * A timeline begins at the beginning of the segment that it branches off in: the server's file of the new timeline has the
//!   old one's beginning, too.
//! * What came of a segment that is not complete is put as a piece ([`Receiver::tick`]), one at a time, and only when everything
//!   before it is durable.
//! * Several segments are put at a time, but not the first one of a life or a timeline: whoever goes on after a death finds
//!   a hole only behind a segment that is there ([`resume`]).
//!
//! * Where commits wait for it, what was put is reported behind a question only (`voting`).
//!
//! Left out: connections, retries, which server, what is done about a branch that was left. Hazard: a server forgets what was
//! reported to it, so a position too far is WAL that nobody has any more.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use pgherd_core::types::{Instant, Lsn, Timeline};

use crate::breakage::{Broken, broken};
use crate::wal::{History, HistoryError, Inventory, Segment, Segments};

mod voting;

use voting::Voting;
pub use voting::{Answer, Question};

/// Segments that are put at a time: enough to hide the time that an object store takes to answer.
pub const MAX_PUTS: usize = 4;
/// What waits for being put at most, unless it is a single segment; then nothing more is read from the server.
const MAX_WAITING_BYTES: usize = 96 * 1024 * 1024;

/// Why a stream cannot be received.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    #[error("WAL from {found} on came where that from {wanted} on of timeline {timeline} follows")]
    Misplaced { timeline: Timeline, wanted: Lsn, found: Lsn },
    #[error("timeline {timeline} is said to have ended at {end}, and its WAL has come up to {position}")]
    EndsElsewhere { timeline: Timeline, end: Lsn, position: Lsn },
    #[error("timeline {next} follows timeline {timeline} at {end}, and its history says something else")]
    OtherHistory { timeline: Timeline, end: Lsn, next: Timeline },
    #[error(transparent)]
    History(#[from] HistoryError),
    /// What was archived is not part of the server's history: joining the two would be splicing.
    #[error(
        "the server has left timeline {timeline} at {fork}, and the archive has its WAL up to {archived}"
    )]
    Unreachable { timeline: Timeline, fork: Lsn, archived: Lsn },
    #[error(
        "the archive has WAL of timeline {timeline} up to {archived}, which the server's history does not know"
    )]
    NotInHistory { timeline: Timeline, archived: Lsn },
    #[error(
        "the server has left timeline {timeline} for {next}, and commits are confirmed on {timeline} only"
    )]
    Left { timeline: Timeline, next: Timeline },
    #[error("the archive has timeline {archived}, and the server is still on timeline {server}")]
    ServerBehind { archived: Timeline, server: Timeline },
}

/// What to do where the archive has WAL that is not part of the server's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    Refuse,
    /// It stays in the archive, under its timeline, and the server's is received from where it left.
    Leave,
}

/// Where a stream begins: at the beginning of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    pub segment: Segment,
    /// Everything before it is in the archive; zero if nothing is known to be.
    pub durable: Lsn,
    /// Up to where its pieces are in the archive; where it begins if there are none.
    pub pieced: Lsn,
    /// The history of its timeline is not in the archive yet.
    pub needs_history: bool,
}

/// Where to go on behind what is in the archive, with a server that has this history. Where nothing of it is there, a stream
/// begins in the segment of `otherwise`: where the slot keeps WAL from, or where the server's ends.
pub fn resume(
    segments: Segments,
    inventory: &Inventory,
    history: &History,
    otherwise: (Timeline, Lsn),
    branch: Branch,
) -> Result<Begin, ReceiveError> {
    let newest = inventory.newest_timeline();
    if let Some(archived) = newest.filter(|newest| *newest > history.timeline()) {
        return Err(ReceiveError::ServerBehind { archived, server: history.timeline() });
    }
    let begin = |segment: Segment, durable| {
        let needs_history = segment.timeline > Timeline(1) && !inventory.has_history(segment.timeline);
        let pieced = inventory.beginning_of(segment).unwrap_or(segments.start(segment));
        Begin { segment, durable, pieced, needs_history }
    };
    let legs: Vec<_> = history.legs().collect();
    for (at, leg) in legs.iter().enumerate().rev() {
        let timeline = leg.timeline;
        let missing = inventory.range_of(timeline).map(|(first, last)| {
            // Those that were on their way together may have arrived in any order.
            let mut recent = last.saturating_sub(MAX_PUTS as u64).max(first)..=last;
            let missing = recent.find(|number| !inventory.has(Segment { timeline, number: *number }));
            missing.unwrap_or(last + 1)
        });
        let Some(number) = missing.or(inventory.last_beginning(timeline)) else { continue };
        let segment = Segment { timeline, number };
        let archived = inventory.beginning_of(segment).unwrap_or(segments.start(segment));
        return match (leg.end, legs.get(at + 1), branch) {
            (Some(fork), _, Branch::Refuse) if archived > fork => {
                Err(ReceiveError::Unreachable { timeline, fork, archived })
            }
            (Some(fork), Some(next), Branch::Leave) if archived > fork => {
                Ok(begin(Segment { timeline: next.timeline, number: segments.number(fork) }, fork))
            }
            _ => Ok(begin(segment, archived)),
        };
    }
    let (timeline, position) = otherwise;
    Ok(begin(Segment { timeline, number: segments.number(position) }, Lsn::ZERO))
}

/// An object that is to be put into the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Segment {
        segment: Segment,
        content: Bytes,
    },
    /// The beginning of a segment that its timeline ended in.
    Partial {
        segment: Segment,
        content: Bytes,
    },
    /// What came of a segment from an offset on.
    Piece {
        segment: Segment,
        from: u32,
        content: Bytes,
    },
    History {
        timeline: Timeline,
        content: Bytes,
    },
}

impl Object {
    pub fn content(&self) -> &Bytes {
        match self {
            Object::Segment { content, .. }
            | Object::Partial { content, .. }
            | Object::Piece { content, .. }
            | Object::History { content, .. } => content,
        }
    }
}

/// Which put it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Wanted,
    Begun,
    Durable,
}

#[derive(Debug)]
struct Put {
    ticket: Ticket,
    object: Object,
    /// The first position behind it.
    end: Lsn,
    state: State,
}

/// One stream from its beginning, through disconnections and changes of the timeline.
#[derive(Debug)]
pub struct Receiver {
    segments: Segments,
    /// The one that is being received.
    segment: Segment,
    /// What came of it, from its beginning.
    content: Vec<u8>,
    /// In order of positions; the first one is not durable yet.
    puts: VecDeque<Put>,
    durable: Lsn,
    tickets: u64,
    /// A segment of this timeline was put in this life.
    is_anchored: bool,
    /// Up to where pieces of the segment were wanted; where it begins if none was.
    pieced: Lsn,
    pieces: Option<Pieces>,
    voting: Option<Voting>,
}

/// How often pieces are put.
#[derive(Debug)]
struct Pieces {
    every: Duration,
    /// Not before then.
    next: Instant,
}

impl Receiver {
    /// `history` is that of the timeline, if the archive needs it.
    pub fn new(segments: Segments, begin: Begin, history: Option<Bytes>) -> Receiver {
        let mut this = Receiver {
            segments,
            segment: begin.segment,
            content: Vec::new(),
            puts: VecDeque::new(),
            durable: begin.durable,
            tickets: 0,
            is_anchored: false,
            pieced: begin.pieced,
            pieces: None,
            voting: None,
        };
        if let Some(content) = history {
            this.want(Object::History { timeline: begin.segment.timeline, content }, Lsn::ZERO);
        }
        this
    }

    /// Puts pieces of segments, too, so often at most.
    pub fn with_pieces(self, every: Duration) -> Receiver {
        let next = Instant::from_boot(Duration::ZERO);
        Receiver { pieces: Some(Pieces { every, next }), ..self }
    }

    pub fn timeline(&self) -> Timeline {
        self.segment.timeline
    }

    /// Up to where WAL has come; what the server is asked for next.
    pub fn position(&self) -> Lsn {
        Lsn(self.segments.start(self.segment).0 + self.content.len() as u64)
    }

    /// What may be reported: everything before it is in the archive.
    pub fn durable(&self) -> Lsn {
        if broken(Broken::FeedbackBeforeFsync) {
            return self.durable.max(self.position());
        }
        match &self.voting {
            Some(voting) => self.told_unasked().unwrap_or(voting.told()),
            None => self.durable,
        }
    }

    /// Whether more may be read from the server.
    pub fn has_room(&self) -> bool {
        self.puts.len() <= 1
            || self.puts.iter().map(|put| put.object.content().len()).sum::<usize>() < MAX_WAITING_BYTES
    }

    /// Another connection, to a server with this history: from where on it is asked. Drops what is part of no other segment
    /// than the one that is being received, where the server has left its timeline before; it was never reported.
    pub fn reconnect(&mut self, history: &History) -> Result<(Timeline, Lsn), ReceiveError> {
        let timeline = self.segment.timeline;
        let Some(leg) = history.legs().find(|leg| leg.timeline == timeline) else {
            return Err(ReceiveError::NotInHistory { timeline, archived: self.pieced });
        };
        if let Some(fork) = leg.end.filter(|fork| *fork < self.position()) {
            let archived = self.pieced;
            if fork < archived {
                return Err(ReceiveError::Unreachable { timeline, fork, archived });
            }
            self.content.clear();
        }
        Ok((timeline, self.position()))
    }

    /// WAL that came.
    pub fn receive(&mut self, start: Lsn, mut wal: &[u8]) -> Result<(), ReceiveError> {
        let wanted = self.position();
        if start != wanted {
            return Err(ReceiveError::Misplaced { timeline: self.segment.timeline, wanted, found: start });
        }
        let whole = self.segments.bytes() as usize;
        while !wal.is_empty() {
            if self.content.capacity() < whole {
                self.content.reserve_exact(whole - self.content.len());
            }
            let (now, later) = wal.split_at(wal.len().min(whole - self.content.len()));
            self.content.extend_from_slice(now);
            wal = later;
            if self.content.len() == whole {
                let content = std::mem::take(&mut self.content).into();
                let segment = self.segment;
                self.want(Object::Segment { segment, content }, self.segments.end(segment));
                self.segment.number += 1;
                self.pieced = self.segments.start(self.segment);
            }
        }
        Ok(())
    }

    /// All of the timeline has come, and `next` follows it from `end` on, with this history file.
    pub fn end_timeline(&mut self, next: Timeline, end: Lsn, history: Bytes) -> Result<(), ReceiveError> {
        let (timeline, position) = (self.segment.timeline, self.position());
        if end != position {
            return Err(ReceiveError::EndsElsewhere { timeline, end, position });
        }
        if self.voting.is_some() {
            return Err(ReceiveError::Left { timeline, next });
        }
        let parsed = History::parse(next, &history)?;
        let follows =
            parsed.forks().last().is_some_and(|last| last.timeline == timeline && last.until == end);
        if !follows {
            return Err(ReceiveError::OtherHistory { timeline, end, next });
        }
        if !self.content.is_empty() {
            let content = std::mem::take(&mut self.content).into();
            self.want(Object::Partial { segment: self.segment, content }, end);
        }
        self.want(Object::History { timeline: next, content: history }, end);
        self.segment = Segment { timeline: next, number: self.segments.number(end) };
        self.pieced = self.segments.start(self.segment);
        Ok(())
    }

    /// It is now: what came and is not durable becomes a piece, if it is time for one and nothing else is to be put.
    pub fn tick(&mut self, now: Instant) {
        let (position, start) = (self.position(), self.segments.start(self.segment));
        let is_new = position > self.durable && position > self.pieced;
        let Some(pieces) = self.pieces.as_mut().filter(|pieces| is_new && pieces.next <= now) else { return };
        if !self.puts.is_empty() {
            return;
        }
        pieces.next = now + pieces.every;
        let from = (self.pieced.0 - start.0) as usize;
        let content = Bytes::copy_from_slice(&self.content[from..]);
        self.pieced = position;
        self.want(Object::Piece { segment: self.segment, from: from as u32, content }, position);
    }

    fn want(&mut self, object: Object, end: Lsn) {
        self.tickets += 1;
        self.puts.push_back(Put { ticket: Ticket(self.tickets), object, end, state: State::Wanted });
    }

    /// The next object that may be put now. It is given out once, unless its put fails.
    pub fn next_put(&mut self) -> Option<(Ticket, Object)> {
        let begun = self.puts.iter().filter(|put| put.state == State::Begun).count();
        let most = if self.is_anchored && self.voting.is_none() { MAX_PUTS } else { 1 };
        if begun >= most || self.voting.as_ref().is_some_and(|voting| !voting.may_put()) {
            return None;
        }
        let at = self.puts.iter().position(|put| put.state == State::Wanted)?;
        let is_history = |put: &Put| matches!(put.object, Object::History { .. });
        let before_is_open = self.puts.iter().take(at).any(|put| put.state != State::Durable);
        let history_before_is_open =
            self.puts.iter().take(at).any(|put| put.state != State::Durable && is_history(put));
        if history_before_is_open || before_is_open && is_history(&self.puts[at]) {
            return None;
        }
        let put = &mut self.puts[at];
        put.state = State::Begun;
        Some((put.ticket, put.object.clone()))
    }

    /// The object of this ticket is durable.
    pub fn put(&mut self, ticket: Ticket) {
        let begun = |put: &&mut Put| put.ticket == ticket && put.state == State::Begun;
        let Some(put) = self.puts.iter_mut().find(begun) else { return };
        put.state = State::Durable;
        match put.object {
            // The next ones need not wait for this one when somebody looks for what is missing.
            Object::Segment { .. } => self.is_anchored = true,
            Object::History { .. } => self.is_anchored = false,
            Object::Partial { .. } | Object::Piece { .. } => {}
        }
        match self.voting.as_mut() {
            Some(voting) => voting.ask(),
            None => self.settle(),
        }
    }

    /// What is durable in one piece is not waited for any more.
    fn settle(&mut self) {
        while let Some(put) = self.puts.front().filter(|put| put.state == State::Durable) {
            self.durable = self.durable.max(put.end);
            self.puts.pop_front();
        }
    }

    /// Nobody knows whether the object of this ticket is durable; it is given out again.
    pub fn put_failed(&mut self, ticket: Ticket) {
        if let Some(put) = self.puts.iter_mut().find(|put| put.ticket == ticket && put.state == State::Begun)
        {
            put.state = State::Wanted;
        }
    }
}

#[cfg(test)]
mod tests;
