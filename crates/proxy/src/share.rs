//! A client whose servers are its own for a transaction only.
//!
//! Between two transactions it has none, and is nothing but a socket that is waited for. When it says something it is lent a
//! server, which is first brought to what this client has set; when its transaction is over, the server is asked for what it
//! may have left there, and goes to the next client, unless something in it cannot move ([`sql::Tie`], [`Unmovable`]): then it is
//! kept until that is gone.
//!
//! Leaves out what is left behind ([`crate::session::shared`], [`crate::sql`]). Hazard: a server that is given away before it
//! is known what is in it.

use std::sync::Arc;

use bytes::BytesMut;
use pgherd_core::types::Instant;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::message::build;

use crate::backend::{Backend, NotDone};
use crate::cancel::Ticket;
use crate::client::{
    Farewell, Left, Lookup, NotBegun, Stopped, Wants, begin, committed_and_gone, give_up, gone, greet, leave,
    left, look_up, lost_commit, stop_at_server, stops_waiting, use_server,
};
use crate::clock;
use crate::commit::Check;
use crate::counts::Pins;
use crate::net::Stream;
use crate::pool::Place;
use crate::pools::{Lent, OnePool};
use crate::positions::{Positions, Reader};
use crate::proxy::Access;
use crate::readers::find_reader;
use crate::reads::{is_readable, may_only_read};
use crate::relay::{End, Link};
use crate::routes::Role;
use crate::session::{Loan, Lost, Mode, Session};
use crate::settings::Values;
use crate::sql::{self, Effects, Ties, Unmovable};
use crate::statements::Known;
use crate::timer::timeout;
use crate::trial::Outcome;
use crate::watch::Overdue;
use crate::world::World;

/// A client is given so many servers that are lost before they were of use; then something is wrong with all of them.
const MOST_SERVERS: usize = 10;

/// What follows a client from server to server, besides its statements.
struct Sharing<'a> {
    wants: &'a Wants,
    ticket: &'a Ticket,
    world: &'a Arc<World>,
    /// What it came in with,
    startup: Arc<Values>,
    /// and what it has now,
    settings: Arc<Values>,
    /// for which a server has to have this.
    wanted: Arc<Values>,
    /// What it was told of its server's parameters.
    told: Arc<Vec<(Vec<u8>, Vec<u8>)>>,
    /// Why it kept its server, as it was last logged: an application that does so does so all day.
    reported: Option<String>,
    /// It asks for what sequences gave it, and must not get what they gave to others.
    recalls_sequences: bool,
    /// It has written nothing since.
    wrote: Instant,
    /// Somebody takes positions of servers for it.
    _reader: Option<Reader>,
    /// What comes next was asked before of a server that was lost, and is to change nothing now.
    is_repeating: bool,
    /// Where it writes: known from the beginning, so that nobody has to look it up for each transaction.
    primaries: Arc<OnePool>,
}

pub(crate) async fn share(
    stream: &mut Stream,
    out: &mut BytesMut,
    wants: &Wants,
    startup: Vec<(String, String)>,
    ticket: &Ticket,
    mode: Mode,
    world: &Arc<World>,
) -> Result<Left, Farewell> {
    let (pool, mut lent, startup) = match Box::pin(first(stream, wants, startup, world)).await? {
        Ok(first) => first,
        Err(left) => return Ok(left),
    };
    let wanted = world.shelf.one(startup.for_server());
    let reads = wants.splits() || wants.access() == Access::ReadOnly;
    let mut sharing = Sharing {
        wants,
        ticket,
        world,
        settings: Arc::clone(&startup),
        wanted,
        startup,
        told: Arc::clone(lent.backend.welcome.shelved(&world.reported)),
        reported: None,
        recalls_sequences: false,
        is_repeating: false,
        // What its client wrote before, by another connection, it is not to miss.
        wrote: wants.mark().last(),
        _reader: reads.then(|| Positions::reader(world)),
        primaries: wants.pool(&Role::Primary, world),
    };
    let is_greeted = greet(stream, out, &lent.backend, ticket).await.is_ok();
    Box::pin(sharing.give_back(&pool, lent)).await;
    if !is_greeted {
        return Ok(Left::ByItself);
    }
    let mut session = Session::sharing(mode, Arc::clone(&world.statements));
    wants.card.statements.set(0);
    session.hide_warnings(sharing.settings.hides_warnings());
    let mut link = Link::asking(&wants.card, world);
    link.watch(world.settings.load().timeouts);
    loop {
        let timeouts = link.timeouts();
        let asking = link.is_asked(stream);
        let (within, overdue) = match session.has_begun() {
            true => (timeouts.idle_transaction.or(timeouts.transaction), Overdue::IdleInTransaction),
            false => (timeouts.idle, Overdue::Idle),
        };
        let is_asked = match within {
            None => asking.await,
            // In a box, so that only those carry it who are waited for with a watch in hand.
            Some(within) => Box::pin(timeout(within, asking)).await.map_err(|_| overdue.farewell())?,
        };
        if !is_asked {
            return Ok(if wants.card.is_dismissed() { Left::Dismissed } else { Left::ByItself });
        }
        match link.answer_aside(&session) {
            Ok(true) => continue,
            Ok(false) => {}
            Err(fault) => {
                *out = link.take_unsaid();
                return Err(fault.into());
            }
        }
        if link.unread().first() == Some(&b'X') {
            return Ok(Left::ByItself);
        }
        if link.answer(|unread, answers| session.answer_without_server(unread, answers)) {
            continue;
        }
        // In a box, so that a client between transactions does not carry what one takes. It is made for each of them: what few
        // transactions take is in boxes of its own, and this one small.
        let done = Box::pin(sharing.transaction(stream, &mut session, &mut link)).await;
        match done {
            Ok(None) => {}
            Ok(Some(left)) => {
                *out = link.take_unsaid();
                return Ok(left);
            }
            Err(farewell) => {
                *out = link.take_unsaid();
                return Err(farewell);
            }
        }
    }
}

/// What the client has asked was canceled before a server was found for it. Whoever has more to be told than that a statement
/// has failed is closed.
fn canceled(session: &mut Session, link: &mut Link) -> Result<Option<Left>, Farewell> {
    link.forget_first();
    match link.answer(|unread, answers| session.cancel_unasked(unread, answers)) {
        true => Ok(None),
        false => Err(Farewell::canceled()),
    }
}

/// Its first server, and what is set there for it; or it has left meanwhile.
async fn first(
    stream: &Stream,
    wants: &Wants,
    startup: Vec<(String, String)>,
    world: &Arc<World>,
) -> Result<Result<(Arc<OnePool>, Lent, Arc<Values>), Left>, Farewell> {
    let mut lost = None;
    for _ in 0..MOST_SERVERS {
        let (pool, lent) = tokio::select! {
            found = wants.first(world) => found?,
            left = gone(stream, &wants.card) => return Ok(Err(left)),
        };
        let startup = world.shelf.one(Arc::new(wants.settings(startup.clone(), &lent.backend)));
        match begin(&pool, lent, &world.shelf.one(startup.for_server()), false, world).await {
            Ok(lent) => return Ok(Ok((pool, lent, startup))),
            Err(NotBegun::Refused(farewell)) => return Err(farewell),
            Err(NotBegun::Lost(farewell)) => lost = Some(farewell),
        }
    }
    Err(lost.unwrap_or_else(too_many_lost))
}

impl Sharing<'_> {
    /// From the first word of a transaction to its end. `None`: the client stays.
    async fn transaction(
        &mut self,
        stream: &mut Stream,
        session: &mut Session,
        link: &mut Link,
    ) -> Result<Option<Left>, Farewell> {
        let mut reads = self.reads(session, link.unread());
        for _ in 0..MOST_SERVERS {
            let (pool, lent) = tokio::select! {
                biased;
                found = self.find(reads.is_some()) => found?,
                stopped = stops_waiting(stream, &self.wants.card, self.ticket) => match stopped {
                    Stopped::Left(left) => return Ok(Some(left)),
                    Stopped::Canceled => return canceled(session, link),
                },
            };
            let recalls = self.recalls_sequences || sql::may_recall_sequences(link.unread());
            let is_standbys = !pool.is_of_the_primary();
            let mut lent = match begin(&pool, lent, &self.wanted, recalls, self.world).await {
                Ok(lent) => lent,
                // The primary can do it, or say why not.
                Err(_) if is_standbys && reads.is_some() => {
                    reads = None;
                    continue;
                }
                // It was told nothing of what its client wants.
                Err(NotBegun::Lost(_)) => continue,
                Err(NotBegun::Refused(farewell)) => return Err(farewell),
            };
            let mut held = Held::default();
            let mut only_reads = is_standbys;
            if let Some(bytes) = reads.take() {
                if is_standbys {
                    link.try_out(bytes);
                } else {
                    // What a standby has never answered could write all the same, say by a view.
                    only_reads = true;
                    session.texts_of(&link.unread()[..bytes], |text| {
                        only_reads &= self.world.answered.remembers(text);
                    });
                }
                session.read_only_one();
            } else if session.is_one_query(link.unread()) {
                link.keep_first();
            }
            let writes = (!only_reads).then(|| self.wants.mark().writes());
            let end = self.use_server(stream, &pool, &mut lent, session, &mut held, link).await;
            if writes.is_some() {
                drop(writes);
                if self.wants.splits() {
                    self.wrote = clock::now();
                }
                self.world.positions.written();
            }
            if let Some(mark) = lost_commit(&end, session, link) {
                let place = lent.backend.place.clone();
                give_up(&pool, lent, &end, self.world);
                let lookup = look_up(&mark, stream, session, link, self.wants, &self.wanted, self.world);
                return match Box::pin(lookup).await {
                    Lookup::Left(left) => Ok(Some(left)),
                    Lookup::Lost(lost) => end.farewell(lost, session, &place).map(Some),
                    // Nobody can ask any more what it had set, or made.
                    Lookup::Committed if session.take_effects().is_none() && held.is_nothing() => Ok(None),
                    Lookup::Committed => Err(committed_and_gone(&place)),
                };
            }
            if self.must_be_asked_again(&end, session, link) {
                self.take_back(&pool, lent, &end);
                continue;
            }
            link.end_trial();
            if end.takes_the_server() && session.is_untouched() {
                // It was told nothing of what its client wants; another one will be.
                self.world.ledger.spared();
                self.take_back(&pool, lent, &end);
                continue;
            }
            if is_unbegun(&end, session, link) {
                self.world.ledger.spared();
                session.forget_unanswered();
                link.ask_first_again();
                self.take_back(&pool, lent, &end);
                continue;
            }
            if could_be_repeated(&end, session, link) {
                let lost = session.lost();
                let farewell = end.farewell(lost, session, &lent.backend.place);
                let ended =
                    Ended { farewell, last_word: link.take_last_word(), place: lent.backend.place.clone() };
                self.take_back(&pool, lent, &end);
                return Box::pin(self.repeat(stream, session, link, lost, ended)).await;
            }
            // If it is not repeated, the client hears how its server ended.
            let last_word = link.take_last_word();
            link.say(|to| to.unsplit(last_word));
            link.forget_first();
            return self.finish(end, &pool, lent, session, &held).await;
        }
        Err(too_many_lost())
    }

    /// A server was lost, and its client has heard nothing of what it had asked: that is asked once more if it provably only
    /// reads. If not, the client hears what is true of it.
    async fn repeat(
        &mut self,
        stream: &mut Stream,
        session: &mut Session,
        link: &mut Link,
        lost: Lost,
        ended: Ended,
    ) -> Result<Option<Left>, Farewell> {
        session.forget_unanswered();
        link.ask_first_again();
        self.is_repeating = true;
        let Ended { farewell, last_word, place } = ended;
        let left = (!last_word.is_empty()).then_some(&place);
        let repeated = self.read_again(stream, session, link, left).await;
        self.is_repeating = false;
        match repeated {
            Some(done) => {
                self.world.ledger.spared();
                done
            }
            None => {
                self.world.ledger.ended(lost);
                link.say(|to| to.unsplit(last_word));
                farewell.map(Some)
            }
        }
    }

    /// `left`: the server that has ended the session in its own words. Where that goes on taking clients, which only a connection
    /// that is opened now can tell, somebody has ended this one, and means it.
    ///
    /// Under settings by which it changes nothing: had it written after all, the first one could have been committed. `None`: it
    /// does not only read, or there is nobody to ask.
    async fn read_again(
        &mut self,
        stream: &mut Stream,
        session: &mut Session,
        link: &mut Link,
        left: Option<&Place>,
    ) -> Option<Result<Option<Left>, Farewell>> {
        let wanted = Arc::new(self.wanted.with("default_transaction_read_only", "on"));
        let mut is_opened_since = false;
        for _ in 0..MOST_SERVERS {
            let (pool, lent) = tokio::select! {
                biased;
                found = self.find(false) => found.ok()?,
                left = gone(stream, &self.wants.card) => return Some(Ok(Some(left))),
            };
            if let Some(place) = left.filter(|place| **place == lent.backend.place) {
                pool.give_back(lent, true, self.world);
                if is_opened_since {
                    return None;
                }
                // A server that shuts down ends its sessions one after the other, and those that are idle may not have heard of it yet.
                pool.replace_idle(place, self.world);
                is_opened_since = true;
                continue;
            }
            let recalls = self.recalls_sequences || sql::may_recall_sequences(link.unread());
            // Others that were idle at the same primary are as lost.
            let Ok(mut lent) = begin(&pool, lent, &wanted, recalls, self.world).await else { continue };
            let asked_bytes = link.unread().len();
            // What was known of functions before may have changed.
            match self.world.catalog.ask(self.wants.names().0, &mut lent.backend).await {
                Ok(()) if self.readable(session, link.unread()) == Some(asked_bytes) => {}
                Err(NotDone::Lost(_)) => {
                    pool.gone(lent.server, self.world);
                    continue;
                }
                Ok(()) | Err(NotDone::Refused { .. }) => {
                    pool.give_back(lent, true, self.world);
                    return None;
                }
            }
            link.try_out(asked_bytes);
            session.read_only_one();
            let mut held = Held::default();
            let end = self.use_server(stream, &pool, &mut lent, session, &mut held, link).await;
            if self.must_be_asked_again(&end, session, link) {
                self.take_back(&pool, lent, &end);
                if matches!(end, End::Over) {
                    return None;
                }
                continue;
            }
            link.end_trial();
            if end.takes_the_server() && session.is_untouched() {
                self.take_back(&pool, lent, &end);
                continue;
            }
            return Some(self.finish(end, &pool, lent, session, &held).await);
        }
        None
    }

    /// Of a server with which nothing more is to be done for what was under way.
    fn take_back(&self, pool: &Arc<OnePool>, lent: Lent, end: &End) {
        match end {
            End::Over => pool.give_back(lent, true, self.world),
            end => give_up(pool, lent, end, self.world),
        }
    }

    /// What becomes of the server, and of the client.
    async fn finish(
        &self,
        end: End,
        pool: &Arc<OnePool>,
        lent: Lent,
        session: &Session,
        held: &Held,
    ) -> Result<Option<Left>, Farewell> {
        stop_at_server(&end, &lent.backend, self.world);
        let gone = left(&end, session, &lent.backend, self.world);
        match end {
            End::Over => {
                match session.server_leaves() {
                    true => pool.give_back(lent, false, self.world),
                    false => self.give_back(pool, lent).await,
                }
                return Ok(None);
            }
            // What was tied to it is let go; what nobody knows goes with the connection.
            End::ClientLeft if session.is_clean() && held.unmovable.is_none() => {
                Box::pin(leave(pool, lent, true, self.world)).await;
            }
            end => give_up(pool, lent, &end, self.world),
        }
        gone.map(Some)
    }

    async fn use_server(
        &mut self,
        stream: &mut Stream,
        pool: &Arc<OnePool>,
        lent: &mut Lent,
        session: &mut Session,
        held: &mut Held,
        link: &mut Link,
    ) -> End {
        let Lent { server, backend } = lent;
        let checks = pool.is_of_the_primary() && self.world.settings.load().checks_commits;
        link.check = Check::new(checks);
        self.tell(backend, link);
        let known = std::mem::replace(&mut backend.known, Known::new(1));
        session.attach(Loan::new(known, self.settings.meaning()));
        let end = loop {
            let mut admission = pool.admission(*server, backend, self.world);
            let end = use_server(stream, backend, &mut admission, session, link, self.ticket).await;
            backend.admitted = admission.admitted();
            if !matches!(end, End::Over) {
                break end;
            }
            let effects = session.take_effects();
            let settled = match effects.is_none() {
                true => Ok(held.is_nothing()),
                false => Box::pin(self.settle(effects, backend, session, held)).await,
            };
            let overheard = backend.overheard.split();
            link.say(|to| to.extend_from_slice(&overheard));
            match settled {
                Ok(true) => break End::Over,
                Ok(false) => session.go_on(self.settings.meaning()),
                Err(end) => break end,
            }
        };
        if session.server_is_orphaned() {
            pool.replace_idle(&backend.place, self.world);
        }
        self.wants.card.unpin();
        // A cancel that is on its way hits this client's server, and nobody else's.
        self.ticket.has(None).await;
        if let Some(loan) = session.detach() {
            backend.known = loan.known;
            // One too many is not told to the next client; whoever reports so many is not PostgreSQL.
            let _has_room = loan.noted.iter().all(|(name, value)| backend.welcome.note(name, value));
        }
        if !self.is_repeating {
            self.told = Arc::clone(backend.welcome.shelved(&self.world.reported));
        }
        end
    }

    /// `reads`: what comes next may be read from a standby.
    async fn find(&self, reads: bool) -> Result<(Arc<OnePool>, Lent), Farewell> {
        if self.wants.access() == Access::ReadOnly {
            return Box::pin(self.wants.find(self.world)).await;
        }
        if reads {
            let since = self.world.settings.load().reads.your_writes.then_some(self.wrote);
            // The primary says why, if it does not let this client in either.
            if let Ok(Some(found)) = Box::pin(find_reader(self.wants, since, self.world)).await {
                return Ok(found);
            }
        }
        let lent = self.wants.lend(&self.primaries, self.world).await?;
        Ok((Arc::clone(&self.primaries), lent))
    }

    /// How much of what the client has sent may be read from a standby.
    fn reads(&self, session: &Session, unread: &[u8]) -> Option<usize> {
        if self.wants.splits() { self.readable(session, unread) } else { None }
    }

    /// How much of it provably only reads.
    fn readable(&self, session: &Session, unread: &[u8]) -> Option<usize> {
        let told = |wanted: &[u8]| {
            let found = self.told.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
            found.map_or(&b""[..], |(_, value)| value)
        };
        let is_readable = is_readable(told(b"client_encoding"), told(b"standard_conforming_strings"));
        // A standby has no snapshots that are serializable (manual 13.2.3).
        if !is_readable || self.settings.get("default_transaction_isolation") == Some("serializable") {
            return None;
        }
        let (functions, _) = self.world.catalog.functions(self.wants.names().0);
        session.reads(unread, |text| functions.only_read_in(text) && !self.world.refused.remembers(text))
    }

    /// A standby was asked, and the client has heard nothing of its answer: is another server to be asked? Then that is
    /// prepared.
    fn must_be_asked_again(&self, end: &End, session: &mut Session, link: &mut Link) -> bool {
        if let (Some(first), End::Over) = (link.first().filter(|first| first.is_outdated()), end) {
            session.renew(first.asked());
            link.ask_first_again();
            return true;
        }
        match (link.tried(), end) {
            (Some((Outcome::Refused { for_good }, asked)), End::Over) => {
                if for_good {
                    session.texts_of(asked, |text| self.world.refused.remember(text));
                }
            }
            (Some((Outcome::Open, _)), End::ServerLost(_) | End::Rerouted) if !session.is_untouched() => {
                session.forget_unanswered();
            }
            (Some((Outcome::Answered, asked)), End::Over) => {
                session.texts_of(asked, |text| self.world.answered.remember(text));
                return false;
            }
            _ => return false,
        }
        link.ask_again();
        true
    }

    /// As clean as a fresh one. It is asked before, now and then, what functions there are, if that matters to this client.
    async fn give_back(&self, pool: &Arc<OnePool>, mut lent: Lent) {
        let database = self.wants.names().0;
        if self.wants.splits() && pool.is_of_the_primary() && self.world.catalog.functions(database).1 {
            match Box::pin(self.world.catalog.ask(database, &mut lent.backend)).await {
                Ok(()) => {}
                Err(NotDone::Lost(why)) => {
                    tracing::info!(why, database, "a server was lost while it was asked for its functions");
                    return pool.gone(lent.server, self.world);
                }
                Err(NotDone::Refused { sqlstate, message }) => {
                    tracing::warn!(%sqlstate, message, database, "a server does not tell its functions, and nothing is read elsewhere");
                }
            }
        }
        pool.give_back(lent, true, self.world);
    }

    /// What is different at this server, though the client has not changed it.
    fn tell(&mut self, backend: &mut Backend, link: &mut Link) {
        let is = backend.welcome.shelved(&self.world.reported);
        if Arc::ptr_eq(is, &self.told) {
            return;
        }
        // Of a client that may write, and of a read elsewhere, it is none of the client's business where that was.
        // Nor what is set for as long as something is repeated.
        let is_its_own = |name: &[u8]| match name {
            b"in_hot_standby" => self.wants.access() == Access::ReadOnly,
            b"default_transaction_read_only" => !self.is_repeating,
            _ => true,
        };
        let news = is.iter().filter(|parameter| !self.told.contains(parameter));
        for (name, value) in news.filter(|(name, _)| is_its_own(name)) {
            link.say(|to| {
                // They came in such a message.
                let fits = build::parameter_status(to, name, value);
                debug_assert!(fits.is_ok(), "{fits:?}");
            });
        }
    }

    /// A transaction is over that may have left something. `false`: something in the server cannot move.
    async fn settle(
        &mut self,
        effects: Effects,
        backend: &mut Backend,
        session: &mut Session,
        held: &mut Held,
    ) -> Result<bool, End> {
        self.recalls_sequences |= effects.recalls_sequences;
        held.unmovable = held.unmovable.or(effects.unmovable);
        held.effects.absorb(&effects);
        session.lost_unnamed();
        match backend.inspect(&held.effects, &self.startup).await {
            Ok(mut found) => {
                found.keep_silence(&self.settings, &held.effects.changed);
                self.settings = match found.client == *self.settings {
                    true => Arc::clone(&self.settings),
                    false => self.world.shelf.one(Arc::new(found.client)),
                };
                self.wanted = self.world.shelf.one(self.settings.for_server());
                session.hide_warnings(self.settings.hides_warnings());
                held.ties = found.ties;
            }
            Err(NotDone::Lost(why)) => return Err(End::ServerLost(why)),
            Err(NotDone::Refused { sqlstate, message }) => {
                tracing::warn!(%sqlstate, message, "a server does not say what a client left in it, and stays with it");
                held.unmovable = Some(Unmovable::Unanswered);
            }
        }
        if !held.is_nothing()
            && !backend.is_like(&self.wanted)
            && let Err(NotDone::Lost(why)) = backend.become_like(&self.wanted, false).await
        {
            return Err(End::ServerLost(why));
        }
        let pins = Pins::of(held.ties, held.unmovable);
        if !pins.is_empty() && self.wants.card.pin(pins) {
            self.world.ledger.pinned(pins);
        }
        if held.is_nothing() {
            held.effects = Effects::default();
        } else if self.reported.as_ref() != Some(&held.reasons()) {
            let reasons = held.reasons();
            let (database, user) = self.wants.names();
            tracing::info!(
                database,
                user,
                pid = backend.welcome.pid,
                "a client keeps its server for {reasons}"
            );
            self.reported = Some(reasons);
        }
        Ok(held.is_nothing())
    }
}

fn too_many_lost() -> Farewell {
    let message = format!("{MOST_SERVERS} servers were lost before anything was sent to them");
    Farewell::new(SqlState::CONNECTION_FAILURE, message)
}

/// How a client would hear of its server's end.
struct Ended {
    farewell: Result<Left, Farewell>,
    /// What the server said itself, if it did.
    last_word: BytesMut,
    place: Place,
}

/// The server was lost before it had read what its client asked: whoever is asked next does it for the first time.
fn is_unbegun(end: &End, session: &Session, link: &Link) -> bool {
    end.takes_the_server() && session.lost() == Lost::Unbegun && link.first().is_some()
}

/// Its client has heard nothing of what it had asked, which looks as if it only read.
fn could_be_repeated(end: &End, session: &Session, link: &Link) -> bool {
    end.takes_the_server()
        && link.first().is_some_and(|first| {
            let is_unheard = !session.server_has_ended() || first.has_last_word();
            is_unheard && session.reads(first.asked(), may_only_read).is_some()
        })
}

/// What holds a client to its server.
#[derive(Debug, Default)]
struct Held {
    ties: Ties,
    unmovable: Option<Unmovable>,
    /// Of all that was done since it is held: what was prepared then may be executed now.
    effects: Effects,
}

impl Held {
    fn is_nothing(&self) -> bool {
        self.ties.is_empty() && self.unmovable.is_none()
    }

    fn reasons(&self) -> String {
        let ties = self.ties.iter().map(|tie| tie.to_string());
        ties.chain(self.unmovable.map(|why| why.to_string())).collect::<Vec<_>>().join(", ")
    }
}
