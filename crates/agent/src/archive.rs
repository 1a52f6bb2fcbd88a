//! Streams a cluster's WAL into a repository, for as long as it is told to.
//!
//! A task binds three things: a connection ([`pgherd_postgres::replication`]), the machine that says what becomes of what comes
//! ([`pgherd_backup::receive`]), and the archive. It connects again when the connection ends, puts again what could not be put,
//! and shows where it is.
//!
//! Where the repository votes, commits wait for what is reported ([`voting`]), and every agent may have to seal it ([`sealing`]).
//!
//! What a stream cannot get, because its server has removed it, the members are asked for ([`holes`], [`shelf`]).
//!
//! Left out: who streams from whom and when (`core`), the slot (whoever keeps the members' slots). Hazard: see
//! [`pgherd_backup::receive`]; what is reported here is what that says, and nothing else.

use std::fmt;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pgherd_backup::document::ReadError;
use pgherd_backup::format::Repository;
use pgherd_backup::receive::{Branch, ReceiveError, Receiver, Ticket, resume};
use pgherd_backup::voter::VoterError;
use pgherd_backup::wal::{
    Archive, Archived, History, HistoryError, Inventory, SegmentError, Segments, WalError,
};
use pgherd_core::types::{Lsn, SystemId, Term, Timeline};
use pgherd_postgres::replication::{
    Identified, Message, NextTimeline, Refusal, Replication, ReplicationError, SlotName, Source, Started,
};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};

use crate::backoff::Backoff;
use crate::causes;
use crate::clock;

mod asking;
pub mod holes;
mod lag;
pub(crate) mod owner;
pub(crate) mod sealing;
pub mod shelf;
pub mod voting;

use lag::Lag;

/// For each question to the server.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A server that hears nothing for `wal_sender_timeout` (60 s) ends the connection, and one of PostgreSQL's receivers reports
/// every 10 s. A slot that moves on each second keeps little.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// However often pieces are wanted.
const LEAST_TICK: Duration = Duration::from_millis(10);
/// A server that has said nothing for so long is asked to,
const ASK_AFTER: Duration = Duration::from_secs(5);
/// and one that has not answered by then is given up.
const SILENT_AFTER: Duration = Duration::from_secs(15);
/// So often WAL is asked for that the server says it has removed, before it is given up.
const ASKED_FOR_REMOVED: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Between attempts to connect, and to put what could not be put. An owner that cannot go on is replaced after five seconds.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What is to be archived, from where to where.
#[derive(Clone, Debug)]
pub struct Order {
    pub source: Source,
    /// Without one the server keeps nothing for this stream.
    pub slot: Option<SlotName>,
    pub repository: Repository,
    /// WAL of another cluster is refused.
    pub system: SystemId,
    /// What to do when the archive has WAL that is not part of the server's history.
    pub branch: Branch,
    /// What to do when the server has removed WAL that the archive has not got.
    pub gap: Gap,
    /// How often what came of a segment that is not complete is put, too. `None`: only whole segments are.
    pub piece_every: Option<Duration>,
    /// No timeline behind this one is archived: where the repository votes, another number means WAL that nobody has agreed on yet.
    pub until: Option<Timeline>,
}

/// Missing WAL behind which there is more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    Refuse,
    /// The archive goes on with what the slot keeps: moments behind the gap can be restored again from the next base backup on.
    Leave,
}

/// Why it does not go on at the moment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("WAL cannot be archived: {0}")]
    Put(#[from] WalError),
    #[error("what is in the archive cannot be seen: {0}")]
    Read(#[from] ReadError),
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("the server gave a history that is none: {0}")]
    History(#[from] HistoryError),
    #[error("{server_name} is of cluster {found}, and the WAL of {wanted} is archived here")]
    OtherSystem { server_name: String, found: SystemId, wanted: SystemId },
    #[error("the server's segments have {found} bytes now, and had {wanted}")]
    OtherSegmentSize { found: u32, wanted: u32 },
    #[error("replication slot {slot} does not exist on {server_name}")]
    SlotMissing { slot: SlotName, server_name: String },
    #[error("the server has said nothing for {} s", SILENT_AFTER.as_secs())]
    Silent,
    #[error("the repository cannot vote: {0}")]
    Voter(#[from] VoterError),
    #[error("the repository is sealed for a later term than {term}")]
    Sealed { term: Term },
    #[error("{server_name} is on timeline {found}, and the repository votes on {wanted}")]
    OtherTimeline { server_name: String, found: Timeline, wanted: Timeline },
    #[error("it has not confirmed anything in time, and WAL waits")]
    Unconfirmed,
}

/// What it is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Connecting,
    Streaming,
    /// Before it connects again.
    Pausing,
    Ended,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Connecting => "connecting",
            State::Streaming => "streaming",
            State::Pausing => "pausing",
            State::Ended => "ended",
        })
    }
}

/// Where it is. What is not known is `None`.
#[derive(Clone, Debug, Default)]
pub struct Status {
    pub state: State,
    pub timeline: Option<Timeline>,
    /// Up to where WAL has come.
    pub received: Option<Lsn>,
    /// Up to where it is in the archive; this is what is reported to the server.
    pub durable: Option<Lsn>,
    /// The end of the server's WAL, as it said last.
    pub server_end: Option<Lsn>,
    /// Since when the server has had something that should be in the archive and is not.
    pub behind_since: Option<Instant>,
    /// Why it paused, or could not put something, last; gone when it has worked since.
    pub last_error: Option<Arc<ArchiveError>>,
    /// Connections that were made.
    pub connections: u64,
    /// How often it went on behind WAL that the server has removed.
    pub gaps: u64,
    /// It streams as a member of the durability rule, so that what is reported counts.
    pub votes: bool,
}

/// A stream that is kept up. Dropping it ends it.
#[derive(Debug)]
pub struct Archiving {
    status: watch::Receiver<Status>,
    end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Archiving {
    pub fn begin(order: Order) -> Archiving {
        let (shows, status) = watch::channel(Status::default());
        let (end, ends) = oneshot::channel();
        let task = tokio::spawn(Stream::new(order, shows).run(ends));
        Archiving { status, end, task }
    }

    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Ends it, and waits until nothing of it is left. What was received and is not durable is received again by whoever is next.
    pub async fn end(self) {
        // Gone already, if it has panicked; then there is nothing to end.
        self.end.send(()).ok();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "archiving WAL has ended by itself");
        }
    }
}

/// What is put, how it came out, and with which ticket.
type Puts = JoinSet<(Ticket, Result<Archived, WalError>)>;

struct Stream {
    order: Order,
    shows: watch::Sender<Status>,
    /// Since the first connection.
    receiver: Option<(Receiver, Archive, Segments)>,
    puts: Puts,
    /// Nothing is put before then: the last one has failed.
    puts_from: Option<Instant>,
    puts_backoff: Backoff,
    lag: Lag,
    /// How often in a row the server has said that what comes next is removed.
    removed: u32,
}

impl Stream {
    fn new(order: Order, shows: watch::Sender<Status>) -> Stream {
        Stream {
            order,
            shows,
            receiver: None,
            puts: JoinSet::new(),
            puts_from: None,
            puts_backoff: Backoff::between(FIRST_PAUSE, LONGEST_PAUSE),
            lag: Lag::default(),
            removed: 0,
        }
    }

    async fn run(mut self, mut ends: oneshot::Receiver<()>) {
        let work = async {
            let mut backoff = Backoff::between(FIRST_PAUSE, LONGEST_PAUSE);
            loop {
                let begun = Instant::now();
                self.show(|status| status.state = State::Connecting);
                let Err(error) = self.stream().await;
                if matches!(&error, ArchiveError::Replication(error) if error.refusal() == Some(Refusal::WalRemoved))
                {
                    self.removed += 1;
                }
                self.failed(error);
                self.show(|status| status.state = State::Pausing);
                self.pause(begun.elapsed(), &mut backoff).await;
            }
        };
        tokio::select! {
            () = work => {}
            _ = &mut ends => {}
        }
        self.puts.shutdown().await;
        self.show(|status| status.state = State::Ended);
    }

    fn failed(&self, error: ArchiveError) {
        let text = causes::on_one_line(&error);
        // Some say how long it took.
        let numberless = |text: &str| text.replace(|character: char| character.is_ascii_digit(), "");
        let is_new = self
            .shows
            .borrow()
            .last_error
            .as_ref()
            .is_none_or(|last| numberless(&causes::on_one_line(last)) != numberless(&text));
        // What goes on failing is shown, and not told again and again.
        if is_new {
            tracing::warn!(source = %self.order.source, error = text, "WAL is not archived at the moment");
        }
        self.show(|status| status.last_error = Some(Arc::new(error)));
    }

    /// What was wrong is gone, if it was of this kind.
    fn works(&self, is_meant: impl Fn(&ArchiveError) -> bool) {
        self.shows.send_if_modified(|status| {
            let gone = status.last_error.take_if(|error| is_meant(error));
            gone.is_some()
        });
    }

    fn show(&self, change: impl FnOnce(&mut Status)) {
        self.shows.send_modify(change);
    }

    /// What is on its way to the archive goes on meanwhile.
    async fn pause(&mut self, ran: Duration, backoff: &mut Backoff) {
        let until = Instant::now() + backoff.after(ran);
        loop {
            self.begin_puts();
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                put = ended(&mut self.puts) => self.settle(put),
                () = due(self.puts_from) => self.puts_from = None,
            }
            self.update();
        }
    }

    /// One connection, from its beginning to its end.
    async fn stream(&mut self) -> Result<std::convert::Infallible, ArchiveError> {
        let mut connection = self.connect().await?;
        self.show(|status| {
            status.state = State::Streaming;
            status.connections += 1;
        });
        let every = self.order.piece_every.unwrap_or(REPORT_EVERY).clamp(LEAST_TICK, REPORT_EVERY);
        let mut reports = tokio::time::interval(every);
        reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut reported) = (Instant::now(), Lsn::ZERO);
        loop {
            self.begin_puts();
            let has_room = self.receiver.as_ref().is_some_and(|(receiver, ..)| receiver.has_room());
            let mut report = None;
            tokio::select! {
                message = connection.next(), if has_room => {
                    heard = Instant::now();
                    self.works(|error| !matches!(error, ArchiveError::Put(_)));
                    report = self.heard(&mut connection, message?).await?;
                }
                put = ended(&mut self.puts) => self.settle(put),
                () = due(self.puts_from) => self.puts_from = None,
                _ = reports.tick() => {
                    if !has_room {
                        // Nobody listens to it at the moment.
                        heard = Instant::now();
                    }
                    if heard.elapsed() >= SILENT_AFTER {
                        return Err(ArchiveError::Silent);
                    }
                    report = Some(heard.elapsed() >= ASK_AFTER);
                }
            }
            let durable = self.update();
            if let Some(wants_reply) = report.or((durable > reported).then_some(false)) {
                connection.report(durable, wants_reply).await?;
                reported = durable;
            }
        }
    }

    /// What a message asks for: a report, and with an answer to it.
    async fn heard(
        &mut self,
        connection: &mut Replication,
        message: Message,
    ) -> Result<Option<bool>, ArchiveError> {
        let Some((receiver, ..)) = &mut self.receiver else { return Ok(None) };
        match message {
            Message::Wal { start, wal, server_end } => {
                self.removed = 0;
                receiver.receive(start, &wal)?;
                self.show(|status| status.server_end = Some(server_end));
                Ok(None)
            }
            Message::Keepalive { server_end, wants_reply } => {
                self.show(|status| status.server_end = Some(server_end));
                Ok(wants_reply.then_some(false))
            }
            Message::TimelineEnds => {
                let next = connection.next_timeline(ANSWER_WITHIN).await?;
                self.follow(connection, next).await?;
                self.start(connection).await?;
                Ok(None)
            }
        }
    }

    async fn connect(&mut self) -> Result<Replication, ArchiveError> {
        let mut connection = Replication::open(&self.order.source, ANSWER_WITHIN).await?;
        let server = connection.identify(ANSWER_WITHIN).await?;
        let wanted = self.order.system;
        if server.system != wanted {
            let server_name = self.order.source.to_string();
            return Err(ArchiveError::OtherSystem { server_name, found: server.system, wanted });
        }
        self.allows(server.timeline)?;
        let segments = Segments::new(server.segment_bytes)?;
        let content = match server.timeline {
            Timeline(1) => Bytes::new(),
            timeline => connection.history(timeline, ANSWER_WITHIN).await?,
        };
        let history = History::parse(server.timeline, &content)?;
        let leaves_gap = self.order.gap == Gap::Leave && self.removed >= ASKED_FOR_REMOVED;
        let known = match &mut self.receiver {
            Some(_) if leaves_gap => None,
            Some((_, _, known)) if *known != segments => {
                let (found, wanted) = (segments.bytes(), known.bytes());
                return Err(ArchiveError::OtherSegmentSize { found, wanted });
            }
            Some((receiver, ..)) => Some(receiver.reconnect(&history)),
            None => None,
        };
        match known {
            Some(Ok(_)) => {}
            Some(Err(error)) if self.order.branch == Branch::Refuse => return Err(error.into()),
            // What is in the archive says where to go on: what is on its way there comes first.
            Some(Err(_)) | None => {
                while let Some(put) = self.puts.join_next().await {
                    self.settle(put.ok());
                }
                self.receiver = None;
                self.begin(&mut connection, &server, segments, &history, content).await?;
            }
        }
        self.start(&mut connection).await?;
        Ok(connection)
    }

    /// Finds out where the stream begins.
    async fn begin(
        &mut self,
        connection: &mut Replication,
        server: &Identified,
        segments: Segments,
        history: &History,
        content: Bytes,
    ) -> Result<(), ArchiveError> {
        let archive = Archive::new(&self.order.repository, self.order.system, segments);
        let archived = archive.inventory().await?;
        let leaves_gap = self.order.gap == Gap::Leave && self.removed >= ASKED_FOR_REMOVED;
        // As if nothing were there: what the slot keeps is all that can be had.
        let inventory = if leaves_gap { Inventory::new(segments) } else { archived };
        let kept = match &self.order.slot {
            Some(slot) => self.kept(connection, slot).await?,
            None => None,
        };
        let otherwise = kept.unwrap_or((server.timeline, server.end));
        let begin = resume(segments, &inventory, history, otherwise, self.order.branch)?;
        let needed = match (begin.needs_history, begin.segment.timeline) {
            (false, _) => None,
            (true, timeline) if timeline == server.timeline => Some(content),
            (true, timeline) => Some(connection.history(timeline, ANSWER_WITHIN).await?),
        };
        let from = segments.start(begin.segment);
        if leaves_gap {
            tracing::warn!(source = %self.order.source, %from, "WAL that the archive has not got is removed; it goes on behind a gap");
            self.show(|status| status.gaps += 1);
        }
        tracing::info!(source = %self.order.source, timeline = %begin.segment.timeline, %from, "WAL is archived");
        let receiver = Receiver::new(segments, begin, needed);
        let receiver = match self.order.piece_every {
            Some(every) => receiver.with_pieces(every),
            None => receiver,
        };
        self.receiver = Some((receiver, archive, segments));
        Ok(())
    }

    /// From where on the slot keeps WAL; `None` if it keeps nothing, or the server is too old to say it here.
    async fn kept(
        &self,
        connection: &mut Replication,
        slot: &SlotName,
    ) -> Result<Option<(Timeline, Lsn)>, ArchiveError> {
        const SYNTAX_ERROR: &[u8; 5] = b"42601";
        match connection.slot(slot, ANSWER_WITHIN).await {
            Ok(Some(kept)) => Ok(kept.0),
            Ok(None) => {
                let server_name = self.order.source.to_string();
                Err(ArchiveError::SlotMissing { slot: slot.clone(), server_name })
            }
            Err(ReplicationError::Refused { sqlstate, .. }) if sqlstate.as_bytes() == SYNTAX_ERROR => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Streams from where the receiver is, also over timelines that have nothing more.
    async fn start(&mut self, connection: &mut Replication) -> Result<(), ArchiveError> {
        while let Some((receiver, ..)) = &self.receiver {
            let (timeline, position) = (receiver.timeline(), receiver.position());
            let slot = self.order.slot.as_ref();
            match connection.start(slot, timeline, position, ANSWER_WITHIN).await? {
                Started::Streaming => break,
                Started::Ended(next) => self.follow(connection, next).await?,
            }
        }
        Ok(())
    }

    fn allows(&self, found: Timeline) -> Result<(), ArchiveError> {
        match self.order.until.filter(|until| found > *until) {
            Some(wanted) => {
                let server_name = self.order.source.to_string();
                Err(ArchiveError::OtherTimeline { server_name, found, wanted })
            }
            None => Ok(()),
        }
    }

    async fn follow(&mut self, connection: &mut Replication, next: NextTimeline) -> Result<(), ArchiveError> {
        self.allows(next.timeline)?;
        let history = connection.history(next.timeline, ANSWER_WITHIN).await?;
        if let Some((receiver, ..)) = &mut self.receiver {
            tracing::info!(from = %receiver.timeline(), to = %next.timeline, at = %next.from, "the timeline of archived WAL changes");
            receiver.end_timeline(next.timeline, next.from, history)?;
        }
        Ok(())
    }

    fn begin_puts(&mut self) {
        if self.puts_from.is_some() {
            return;
        }
        let Some((receiver, archive, _)) = &mut self.receiver else { return };
        receiver.tick(clock::now());
        while let Some((ticket, object)) = receiver.next_put() {
            let archive = archive.clone();
            self.puts.spawn(async move { (ticket, archive.put(&object).await) });
        }
    }

    fn settle(&mut self, put: Option<(Ticket, Result<Archived, WalError>)>) {
        let (Some((ticket, came)), Some((receiver, ..))) = (put, &mut self.receiver) else { return };
        match came {
            Ok(_) => {
                receiver.put(ticket);
                self.puts_backoff = Backoff::between(FIRST_PAUSE, LONGEST_PAUSE);
                self.works(|error| matches!(error, ArchiveError::Put(_)));
            }
            Err(error) => {
                receiver.put_failed(ticket);
                self.puts_from = Some(Instant::now() + self.puts_backoff.after(Duration::ZERO));
                self.failed(error.into());
            }
        }
    }

    /// Shows where it is; what may be reported.
    fn update(&mut self) -> Lsn {
        let Some((receiver, _, segments)) = &self.receiver else { return Lsn::ZERO };
        let (durable, lag) = (receiver.durable(), &mut self.lag);
        let has_pieces = self.order.piece_every.is_some();
        self.shows.send_modify(|status| {
            status.timeline = Some(receiver.timeline());
            status.received = Some(receiver.position());
            status.durable = Some(durable).filter(|durable| *durable > Lsn::ZERO);
            // Without pieces what is not a whole segment yet cannot be in the archive.
            let whole = if has_pieces { 1 } else { u64::from(segments.bytes()) };
            let end = status.server_end.map(|end| Lsn(end.0 / whole * whole));
            status.behind_since = end.and_then(|end| lag.since(Instant::now(), end, durable));
        });
        durable
    }
}

/// The next put that has ended; never, if there is none.
async fn ended(puts: &mut Puts) -> Option<(Ticket, Result<Archived, WalError>)> {
    match puts.join_next().await {
        // A put that has panicked is a mistake of ours, and would never be told of otherwise.
        Some(put) => Some(put.expect("a put returns its outcome")),
        None => pending().await,
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => pending().await,
    }
}
