//! Streams WAL into a repository that votes: what is told to the server as flushed is what commits wait for.
//!
//! As the order says: `adopted` and `seal` are put, it is listed, and only then anybody connects. If a base backup leads to the order's timeline
//! with all WAL behind it, the stream has the member's name and slot, and begins where that WAL ends. If not, what is missing is
//! archived as by any other owner, under a name that no rule has, and it begins anew once that is so.
//!
//! Whatever fails, a new connection begins with all of it. A connection that confirms nothing although WAL waits is ended: the server would go on
//! showing it as one that streams, and by that it is told who is lost.
//!
//! Leaves out: what may be told ([`pgherd_backup::receive`]), and when the order is another one. Hazard: a report that outlives its order.
//! The order stands in this task and never changes; another one is another task.

use std::convert::Infallible;

use pgherd_backup::name::Place;
use pgherd_backup::receive::{Answer, Begin, Object, Question};
use pgherd_backup::voter::{Backups, Voter};
use pgherd_backup::wal::Segment;
use pgherd_core::action::StreamOrder;
use pgherd_core::types::Stream as Name;

use super::*;
use crate::backoff::Backoff;

/// A connection that confirms nothing for so long while WAL waits is as good as none,
const CONFIRMED_WITHIN: Duration = Duration::from_secs(1);
/// unless it is so much that putting it takes longer: a whole segment, where the stream is behind. Slower than this no repository keeps up with
/// a server that is worth the name.
const SLOWEST_BYTES_A_SECOND: u64 = 2 << 20;
/// From one attempt to the next, and from one look at a seal above to the next.
const AGAIN: Duration = Duration::from_millis(500);
/// Where attempts go on failing behind a listing of everything, which costs something.
const AGAIN_AT_LEAST: Duration = Duration::from_secs(5);
/// From one look to the next whether everything behind a backup is there by now: behind a failover that is so in a moment,
const LOOK_SOON: Duration = Duration::from_millis(250);
/// and where it is not, a base backup has to end, or what is missing has to come from elsewhere.
const LOOK_AT_LEAST: Duration = Duration::from_secs(60);
/// From one look at the names of base backups to the next.
const LOOK_AT_BACKUPS: Duration = Duration::from_secs(5);
/// From a put or a question that has failed to the next one: a disk that is full says so at once, and would be asked without end.
const CALL_AGAIN: Duration = Duration::from_millis(100);
/// What came is put at once; a tick is for what nothing else wakes.
const TICK: Duration = Duration::from_millis(100);

/// What is streamed, from where.
#[derive(Clone, Debug)]
pub struct Votes {
    pub order: StreamOrder,
    /// The order's server.
    pub source: Source,
    /// Of the member, and of the archive for what is no vote yet.
    pub slot: SlotName,
    pub archive_slot: SlotName,
    pub repository: Repository,
    pub system: SystemId,
    pub piece_every: Option<Duration>,
}

impl Archiving {
    /// As a member of the durability rule.
    pub fn begin_voting(votes: Votes) -> Archiving {
        let (shows, status) = watch::channel(Status::default());
        let (end, ends) = oneshot::channel();
        let task = tokio::spawn(Voting { votes, shows, hole: None, has_listed: false }.run(ends));
        Archiving { status, end, task }
    }
}

struct Voting {
    votes: Votes,
    shows: watch::Sender<Status>,
    /// The server has not got any more what comes behind it.
    hole: Option<Lsn>,
    /// Whether the present attempt has listed everything.
    has_listed: bool,
}

impl Voting {
    async fn run(mut self, mut ends: oneshot::Receiver<()>) {
        let work = async {
            let mut backoff = Backoff::between(AGAIN, AGAIN_AT_LEAST);
            loop {
                self.show(|status| (status.state, status.votes) = (State::Connecting, false));
                let begun = Instant::now();
                self.has_listed = false;
                let Err(error) = self.attempt().await else { continue };
                self.failed(error);
                self.show(|status| (status.state, status.votes) = (State::Pausing, false));
                let pause = if self.has_listed { backoff.after(begun.elapsed()) } else { AGAIN };
                tokio::time::sleep(pause).await;
            }
        };
        tokio::select! {
            () = work => {}
            _ = &mut ends => {}
        }
        self.show(|status| (status.state, status.votes) = (State::Ended, false));
    }

    fn show(&self, change: impl FnOnce(&mut Status)) {
        self.shows.send_modify(change);
    }

    fn failed(&self, error: ArchiveError) {
        let text = causes::on_one_line(&error);
        let is_new =
            self.shows.borrow().last_error.as_ref().is_none_or(|last| causes::on_one_line(last) != text);
        // What goes on failing is shown, and not told again and again.
        if is_new {
            tracing::warn!(source = %self.votes.source, error = text, "the repository confirms nothing at the moment");
        }
        self.show(|status| status.last_error = Some(Arc::new(error)));
    }

    fn voter(&self) -> Voter {
        let place = Place(self.votes.system);
        Voter::new(&self.votes.repository, place, self.votes.order.member.incarnation)
    }

    /// From the beginning: adopt, seal, list, and connect. Ends without an error where more was archived, so that it can vote now.
    async fn attempt(&mut self) -> Result<(), ArchiveError> {
        let (voter, order) = (self.voter(), self.votes.order.clone());
        voter.adopt(order.timeline, order.line).await?;
        voter.seal(order.term).await?;
        if voter.is_sealed_above(order.term).await? {
            return Err(ArchiveError::Sealed { term: order.term });
        }
        // Nothing is listed for a server that does not answer.
        let name = Name { member: order.member, timeline: order.timeline }.to_string();
        let mut connection = Replication::open_as(&self.votes.source, &name, ANSWER_WITHIN).await?;
        let server = connection.identify(ANSWER_WITHIN).await?;
        self.fits(&server)?;
        self.has_listed = true;
        let Some((begin, archive)) = self.goes_on_at().await? else {
            drop(connection);
            return self.fill_up().await;
        };
        let (found, wanted) = (server.segment_bytes, archive.segments().bytes());
        if found != wanted {
            return Err(ArchiveError::OtherSegmentSize { found, wanted });
        }
        let at = begin.durable;
        let Err(error) = self.stream(connection, begin, archive).await;
        if matches!(&error, ArchiveError::Replication(error) if error.refusal() == Some(Refusal::WalRemoved))
        {
            self.hole = Some(at);
        }
        Err(error)
    }

    /// Where all WAL behind a base backup ends, on the timeline of the order.
    async fn goes_on_at(&self) -> Result<Option<(Begin, Archive)>, ArchiveError> {
        let backups = Backups::read(&self.votes.repository, Place(self.votes.system)).await?;
        let Some(archive) = backups.archive()? else { return Ok(None) };
        let inventory = archive.inventory().await?;
        let Some(history) = inventory.history(self.votes.order.timeline) else { return Ok(None) };
        let Some(reached) = backups.reached(&archive, &inventory, history).await? else { return Ok(None) };
        let begin = reached.begin(&inventory, history).filter(|begin| self.hole != Some(begin.durable));
        Ok(begin.map(|begin| (begin, archive)))
    }

    /// Archives as an owner does whose repository has no vote, until it could have one.
    async fn fill_up(&mut self) -> Result<(), ArchiveError> {
        let Votes { source, archive_slot, repository, system, piece_every, .. } = self.votes.clone();
        let archiving = Archiving::begin(Order {
            source,
            slot: Some(archive_slot),
            repository,
            system,
            branch: Branch::Leave,
            gap: Gap::Leave,
            piece_every,
            until: Some(self.votes.order.timeline),
        });
        let mut status = archiving.status();
        let until = async {
            let mut pauses = Backoff::between(LOOK_SOON, LOOK_AT_LEAST);
            let mut backups = None;
            loop {
                let mut left = pauses.after(Duration::ZERO);
                while !left.is_zero() {
                    let step = left.min(LOOK_AT_BACKUPS);
                    tokio::time::sleep(step).await;
                    left -= step;
                    match Backups::names(&self.votes.repository, Place(self.votes.system)).await {
                        Ok(names) => {
                            let has_come = backups.as_ref().is_some_and(|known| *known != names);
                            backups = Some(names);
                            if has_come {
                                break;
                            }
                        }
                        Err(error) => self.failed(error.into()),
                    }
                }
                match self.goes_on_at().await {
                    Ok(None) => {}
                    Ok(Some(_)) => return,
                    Err(error) => self.failed(error),
                }
            }
        };
        let shown = async {
            loop {
                let now = status.borrow_and_update().clone();
                self.shows.send_replace(now);
                if status.changed().await.is_err() {
                    pending::<()>().await;
                }
            }
        };
        tokio::select! {
            () = until => {}
            () = shown => {}
        }
        archiving.end().await;
        Ok(())
    }

    /// Whether it is the server of the order.
    fn fits(&self, server: &Identified) -> Result<(), ArchiveError> {
        let server_name = self.votes.source.to_string();
        if server.system != self.votes.system {
            let wanted = self.votes.system;
            return Err(ArchiveError::OtherSystem { server_name, found: server.system, wanted });
        }
        if server.timeline != self.votes.order.timeline {
            let wanted = self.votes.order.timeline;
            return Err(ArchiveError::OtherTimeline { server_name, found: server.timeline, wanted });
        }
        Ok(())
    }

    /// One connection in the member's name.
    async fn stream(
        &self,
        mut connection: Replication,
        begin: Begin,
        archive: Archive,
    ) -> Result<Infallible, ArchiveError> {
        let Votes { order, source, slot, .. } = &self.votes;
        let segments = archive.segments();
        let receiver = Receiver::new(segments, begin, None).as_voter();
        let from = receiver.position();
        match connection.start(Some(slot), order.timeline, from, ANSWER_WITHIN).await? {
            Started::Streaming => {}
            Started::Ended(next) => {
                return Err(ReceiveError::Left { timeline: order.timeline, next: next.timeline }.into());
            }
        }
        tracing::info!(%source, timeline = %order.timeline, term = %order.term, %from, "the repository confirms commits");
        self.show(|status| {
            (status.state, status.votes) = (State::Streaming, true);
            status.connections += 1;
        });
        Connected {
            this: self,
            archive,
            voter: self.voter(),
            receiver,
            calls: JoinSet::new(),
            calls_from: None,
            clearing: JoinSet::new(),
            lag: Lag::default(),
        }
        .run(&mut connection)
        .await
    }
}

/// How long so much may wait until more of it is confirmed: one object is put at a time, which is a segment at most.
fn within(waiting: u64, segment_bytes: u32) -> Duration {
    let bytes = waiting.min(u64::from(segment_bytes));
    CONFIRMED_WITHIN + Duration::from_millis(bytes * 1000 / SLOWEST_BYTES_A_SECOND)
}

/// What came back from the repository.
enum Told {
    /// With the segment, if it is a whole one.
    Put(Ticket, Result<Option<Segment>, WalError>),
    Answered(Question, Result<bool, VoterError>),
}

/// A connection that confirms.
struct Connected<'a> {
    this: &'a Voting,
    archive: Archive,
    voter: Voter,
    receiver: Receiver,
    /// One at a time, as the receiver gives them out.
    calls: JoinSet<Told>,
    /// None is begun before, since one has failed.
    calls_from: Option<Instant>,
    /// Of pieces that nobody needs any more: each commit may have made one.
    clearing: JoinSet<()>,
    lag: Lag,
}

impl Connected<'_> {
    async fn run(mut self, connection: &mut Replication) -> Result<Infallible, ArchiveError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut reported, mut report_at) = (Instant::now(), Lsn::ZERO, Instant::now());
        // Since when something waits, and nothing was confirmed.
        let mut waits_since: Option<Instant> = None;
        loop {
            self.begin_calls();
            let mut wants_report = false;
            tokio::select! {
                message = connection.next(), if self.receiver.has_room() => {
                    heard = Instant::now();
                    wants_report = self.heard(connection, message?).await?;
                }
                Some(told) = self.calls.join_next() => {
                    // A call that has panicked is a mistake of ours, and would never be told of otherwise.
                    self.settle(told.expect("a call returns its outcome"));
                }
                () = due(self.calls_from) => self.calls_from = None,
                _ = ticks.tick() => {
                    while self.clearing.try_join_next().is_some() {}
                    if !self.receiver.has_room() {
                        // Nobody listens to it at the moment.
                        heard = Instant::now();
                    }
                    if heard.elapsed() >= SILENT_AFTER {
                        return Err(ArchiveError::Silent);
                    }
                }
            }
            if self.receiver.is_sealed() {
                // Without another report.
                return Err(ArchiveError::Sealed { term: self.this.votes.order.term });
            }
            let told = self.receiver.durable();
            let waits = self.receiver.position() > told;
            waits_since = match waits_since {
                Some(since) if waits && told <= reported => Some(since),
                _ => waits.then(Instant::now),
            };
            let within = within(self.receiver.position().bytes_since(told), self.archive.segments().bytes());
            if waits_since.is_some_and(|since| since.elapsed() >= within) {
                return Err(ArchiveError::Unconfirmed);
            }
            self.update(told);
            let asks = heard.elapsed() >= ASK_AFTER;
            if wants_report || told > reported || report_at.elapsed() >= REPORT_EVERY {
                connection.report(told, asks).await?;
                (reported, report_at) = (told, Instant::now());
            }
        }
    }

    /// Whether the server wants to be told where it is.
    async fn heard(&mut self, connection: &mut Replication, message: Message) -> Result<bool, ArchiveError> {
        match message {
            Message::Wal { start, wal, server_end } => {
                self.receiver.receive(start, &wal)?;
                self.this.show(|status| status.server_end = Some(server_end));
                Ok(false)
            }
            Message::Keepalive { server_end, wants_reply } => {
                self.this.show(|status| status.server_end = Some(server_end));
                Ok(wants_reply)
            }
            Message::TimelineEnds => {
                let next = connection.next_timeline(ANSWER_WITHIN).await?;
                let ended = self.receiver.end_timeline(next.timeline, next.from, Bytes::new());
                ended.map(|()| false).map_err(ArchiveError::from)
            }
        }
    }

    fn begin_calls(&mut self) {
        self.receiver.tick(clock::now());
        if self.calls_from.is_some() {
            return;
        }
        while let Some((ticket, object)) = self.receiver.next_put() {
            let archive = self.archive.clone();
            self.calls.spawn(async move {
                let put = archive.put(&object).await;
                let whole = match object {
                    Object::Segment { segment, .. } => Some(segment),
                    _ => None,
                };
                Told::Put(ticket, put.map(|_| whole))
            });
        }
        while let Some(question) = self.receiver.next_question() {
            let (voter, term) = (self.voter.clone(), self.this.votes.order.term);
            self.calls.spawn(async move { Told::Answered(question, voter.is_sealed_above(term).await) });
        }
    }

    fn settle(&mut self, told: Told) {
        match told {
            Told::Put(ticket, Ok(whole)) => {
                self.receiver.put(ticket);
                if let Some(segment) = whole {
                    let archive = self.archive.clone();
                    // What stays is left to a collection.
                    self.clearing.spawn(async move {
                        if let Err(error) = archive.clear_pieces(segment).await {
                            tracing::debug!(
                                error = causes::on_one_line(&error),
                                "pieces of a whole segment stay"
                            );
                        }
                    });
                }
            }
            Told::Put(ticket, Err(error)) => {
                self.receiver.put_failed(ticket);
                self.fails(error.into());
            }
            Told::Answered(question, Ok(is_sealed)) => {
                let answer = if is_sealed { Answer::Sealed } else { Answer::NotSealed };
                self.receiver.answered(question, answer);
                self.this.show(|status| status.last_error = None);
            }
            Told::Answered(question, Err(error)) => {
                self.receiver.answered(question, Answer::Lost);
                self.fails(error.into());
            }
        }
    }

    fn fails(&mut self, error: ArchiveError) {
        self.calls_from = Some(Instant::now() + CALL_AGAIN);
        self.this.failed(error);
    }

    fn update(&mut self, told: Lsn) {
        let (receiver, lag) = (&self.receiver, &mut self.lag);
        self.this.show(|status| {
            status.timeline = Some(receiver.timeline());
            status.received = Some(receiver.position());
            status.durable = Some(told).filter(|told| *told > Lsn::ZERO);
            status.behind_since = status.server_end.and_then(|end| lag.since(Instant::now(), end, told));
        });
    }
}
