//! A session whose server is its own for a transaction only.
//!
//! Two things make that unseen. Statements are prepared under names that mean the same on every server, and once more where
//! they are missing ([`crate::statements`]). And what a transaction may have left behind is noted ([`Effects`]), so that
//! whoever takes the server back can ask for it, and gives it to nobody else before it is known.
//!
//! Of a client's messages those are looked into that name a statement or hold its text; values are passed on in place,
//! however long.
//!
//! Hazard: a message that is answered here while the server skips, or the other way round, and every answer behind it is
//! taken for another one's.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::flow::{Accepted, Event, Flow, Origin, Request};
use pgherd_pgwire::frame::{FrameError, HEADER_BYTES, Header, Piece, Side, Spill, TypeSet};
use pgherd_pgwire::login;
use pgherd_pgwire::message::build::{self, Report, Severity};
use pgherd_pgwire::message::client::{ClientMessage, Parse, bind_names};
use pgherd_pgwire::message::server::Fields;
use pgherd_pgwire::message::{Target, TransactionStatus};

use super::cut::{Cut, Message};
use super::{CANCELED, Fault, Session, Stream, client_fault, client_frame, malformed};
use crate::sql::{self, Bracket, Effects};
use crate::statements::{
    Known, MAX_KEPT_BYTES, NO_TICKET, NONE, Names, Need, PREFIX, Registry, Room, Statement, UNKNOWN,
};

/// A query that is longer is searched as it goes by, and read no closer.
const MAX_QUERY_BYTES: u32 = 1 << 20;
/// A statement that is longer is not prepared.
const MAX_STATEMENT_BYTES: u32 = 16 << 20;
/// What is longer is not whole in what is read at once.
const NEEDS_ROOM_BYTES: u32 = 64 << 10;
/// The names of a portal and of a statement.
const MAX_NAMES_BYTES: usize = 16 << 10;
/// One message of a client can become as many requests: another statement is closed, one is closed and parsed, and then it
/// comes itself.
pub(super) const MOST_REQUESTS: usize = 4;
/// One chunk of a client becomes no more than this, and one message beyond it: each of its messages may need a statement
/// to be parsed once more, and a statement may be long.
const MAX_EDITED_BYTES: usize = 1 << 20;
/// A list of used statements that grew beyond this is given back when it is empty.
const KEPT_USED: usize = 64;
/// Reports that a statement's rows are not what they were: `RevalidateCachedQuery` in `plancache.c`.
pub(crate) const REVALIDATE: &[u8] = b"RevalidateCachedQuery";

/// For how long a server is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Transaction,
    /// For a statement; transactions of several are refused.
    Statement,
}

/// What a session knows of the server that it has now.
#[derive(Debug)]
pub struct Loan {
    pub known: Known,
    /// Of the settings that the client has ([`crate::settings::Values::meaning`]).
    pub meaning: u64,
    /// What the server said since of its parameters, which the client has heard; each once.
    pub noted: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Loan {
    /// Of a server that has these statements.
    pub fn new(known: Known, meaning: u64) -> Loan {
        Loan { known, meaning, noted: Vec::new() }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    mode: Mode,
    registry: Arc<Registry>,
    names: Names,
    loan: Loan,
    /// Of everything that was sent to the server since it was lent, or since it was asked what came of it.
    effects: Effects,
    /// Something was sent since.
    worked: bool,
    /// The server is kept for what is in it.
    keeps: bool,
    /// The client has begun a transaction, and no server knows of it yet: the statement that began it.
    begun: Option<Vec<u8>>,
    /// A server was told of it, and has not answered yet.
    is_beginning: bool,
    /// A statement was parsed since, and what it means may depend on what was set before it.
    parsed: bool,
    /// All of the client's statements will be gone if nothing fails.
    clearing: bool,
    spill: Spill,
    /// Of the message that is gathered there, if it is a long one.
    room: Option<Room>,
    /// What is bound or described and not answered, with its ticket.
    used: VecDeque<(u64, Arc<Statement>)>,
    /// The last error was that a statement's rows are not what they were.
    has_changed: bool,
    /// What comes next has to wait for the end of a COPY.
    waits: bool,
    /// The names at the beginning of a Bind that came in pieces.
    bind: Vec<u8>,
    /// A query that is too long to be held: the end of what was seen, and whether it may matter.
    passing: Option<(Vec<u8>, bool)>,
    /// Nothing is read behind the first Query or Sync: what follows may not be for this server.
    only_one: bool,
    has_one: bool,
}

impl Session {
    /// As [`Session::new`], for a client that shares its servers. It has none yet: see [`Session::attach`].
    pub fn sharing(mode: Mode, registry: Arc<Registry>) -> Session {
        let shared = Shared {
            mode,
            registry,
            names: Names::default(),
            loan: Loan::new(Known::new(1), 0),
            effects: Effects::default(),
            worked: false,
            keeps: false,
            begun: None,
            is_beginning: false,
            parsed: false,
            clearing: false,
            spill: Spill::new(MAX_STATEMENT_BYTES as usize),
            room: None,
            used: VecDeque::new(),
            has_changed: false,
            waits: false,
            bind: Vec::new(),
            passing: None,
            only_one: false,
            has_one: false,
        };
        Session { shared: Some(Box::new(shared)), ..Session::new() }
    }

    /// How many prepared statements the client has, and the server that it has now; `None`: nobody reads them.
    pub fn statements(&self) -> Option<(usize, usize)> {
        self.shared.as_ref().map(|shared| (shared.names.len(), shared.loan.known.len()))
    }

    /// What can be answered without a server, of a client that has none: what begins a transaction, which the first statement
    /// takes along, and what ends one in which there was none. How much of `unread` that was; `None`: it needs a server.
    pub fn answer_without_server(&mut self, unread: &[u8], answers: &mut BytesMut) -> Option<usize> {
        let shared = self.shared.as_mut().filter(|shared| shared.mode == Mode::Transaction)?;
        let (header, rest) = unread.split_first_chunk::<HEADER_BYTES>()?;
        let [b'Q', length @ ..] = header else { return None };
        let body = rest.get(..u32::from_be_bytes(*length).checked_sub(4)? as usize)?;
        let text = body.strip_suffix(b"\0").filter(|text| memchr::memchr(0, text).is_none())?;
        let (tag, status) = match (sql::bracket(text)?, &shared.begun) {
            (Bracket::Begin(tag), None) => (tag, TransactionStatus::InTransaction),
            (Bracket::Commit, Some(_)) => ("COMMIT", TransactionStatus::Idle),
            (Bracket::Rollback, Some(_)) => ("ROLLBACK", TransactionStatus::Idle),
            // What PostgreSQL warns of it says itself.
            _ => return None,
        };
        shared.begun = (status != TransactionStatus::Idle).then(|| text.to_vec());
        shared.names.forget_unnamed();
        build::command_complete(answers, tag).ok()?;
        build::ready_for_query(answers, status);
        Some(HEADER_BYTES + body.len())
    }

    /// The client has canceled what it asks first, of which no server has heard: the answer, as PostgreSQL gives it. How much
    /// that is, up to and with a Query, a function call or Sync; `None` where it is not here to its end, or the client would have to be told
    /// that its transaction has failed.
    pub fn cancel_unasked(&mut self, unread: &[u8], answers: &mut BytesMut) -> Option<usize> {
        self.shared.as_ref().filter(|shared| shared.begun.is_none())?;
        let mut at = 0;
        loop {
            let (header, rest) = unread.get(at..)?.split_first_chunk::<HEADER_BYTES>()?;
            let [kind, length @ ..] = header;
            let body = rest.get(..u32::from_be_bytes(*length).checked_sub(4)? as usize)?;
            let is_first = at == 0;
            at += HEADER_BYTES + body.len();
            match kind {
                b'S' => break,
                b'Q' | b'F' if is_first => break,
                b'P' | b'B' | b'D' | b'E' | b'C' | b'H' => {}
                _ => return None,
            }
        }
        let report = Report {
            severity: Severity::Error,
            sqlstate: SqlState::QUERY_CANCELED,
            message: CANCELED,
            detail: None,
            hint: None,
        };
        build::error_response(answers, &report);
        build::ready_for_query(answers, TransactionStatus::Idle);
        Some(at)
    }

    /// Does what a client has sent, that has no server, only read, and is it here to its end? `only_reads` judges texts. How much
    /// that is, up to and with a Query or Sync. What gives a statement a name is not among it, since nobody could do it a
    /// second time.
    pub fn reads(&self, unread: &[u8], only_reads: impl Fn(&[u8]) -> bool) -> Option<usize> {
        let shared = self.shared.as_ref().filter(|shared| shared.begun.is_none())?;
        let mut unnamed = None;
        let (mut at, mut bound) = (0, false);
        loop {
            let (header, rest) = unread.get(at..)?.split_first_chunk::<HEADER_BYTES>()?;
            let [kind, length @ ..] = header;
            let body = rest.get(..u32::from_be_bytes(*length).checked_sub(4)? as usize)?;
            at += HEADER_BYTES + body.len();
            match ClientMessage::parse(*kind, body).ok()? {
                ClientMessage::Query { text } if at == HEADER_BYTES + body.len() => {
                    return only_reads(text).then_some(at);
                }
                ClientMessage::Parse(parse) if parse.name.is_empty() => {
                    unnamed = Some(only_reads(parse.text).then_some(())?);
                }
                ClientMessage::Bind(bind) if bind.statement.is_empty() => {
                    if unnamed.is_none() {
                        let known = shared.names.unnamed();
                        unnamed = Some((known.number != NONE && only_reads(&known.text)).then_some(())?);
                    }
                    bound = true;
                }
                ClientMessage::Bind(bind) => {
                    let known = shared.names.get(bind.statement).filter(|known| !known.is_retired())?;
                    bound = only_reads(known.text()).then_some(true)?;
                }
                ClientMessage::Sync => return bound.then_some(at),
                ClientMessage::Describe { .. } | ClientMessage::Execute { .. } | ClientMessage::Flush => {}
                ClientMessage::Close { target: Target::Portal, .. } => {}
                _ => return None,
            }
        }
    }

    /// The texts of it.
    pub fn texts_of<'a>(&'a self, read: &'a [u8], mut tell: impl FnMut(&[u8])) {
        let Some(shared) = &self.shared else { return };
        for message in messages(read) {
            match message {
                ClientMessage::Query { text } => tell(text),
                ClientMessage::Parse(parse) => tell(parse.text),
                ClientMessage::Bind(bind) if bind.statement.is_empty() => tell(&shared.names.unnamed().text),
                ClientMessage::Bind(bind) => {
                    if let Some(known) = shared.names.get(bind.statement) {
                        tell(known.text());
                    }
                }
                _ => {}
            }
        }
    }

    /// Is this, of a client that has no server, one Query, or all up to one Sync?
    pub fn is_one_query(&self, unread: &[u8]) -> bool {
        let mut at = 0;
        while let Some((header, rest)) =
            unread.get(at..).and_then(|rest| rest.split_first_chunk::<HEADER_BYTES>())
        {
            let [kind, length @ ..] = header;
            let body_bytes = u32::from_be_bytes(*length).saturating_sub(4) as usize;
            if matches!(kind, b'Q' | b'S') {
                return rest.len() == body_bytes && (*kind == b'S' || at == 0) && !self.has_begun();
            }
            at += HEADER_BYTES + body_bytes;
        }
        false
    }

    /// Of what is under way, and was sent like this: the client was told nothing yet of the rows of the statements in it, so
    /// that it makes no difference to it whether they were parsed before a table has changed or after.
    pub fn uses_only_new(&self, asked: &[u8]) -> bool {
        let Some(shared) = &self.shared else { return false };
        let mut used = used(asked).peekable();
        used.peek().is_some() && used.all(|name| shared.names.is_new_in(name, self.query()))
    }

    /// What was sent like this will be sent once more, and what it prepares and uses is to be parsed anew.
    pub fn renew(&mut self, asked: &[u8]) {
        let Some(shared) = &mut self.shared else { return };
        for message in messages(asked) {
            if let ClientMessage::Parse(parse) = message {
                shared.names.undo(parse.name);
            }
        }
        for name in used(asked) {
            if let Some(statement) = shared.names.get(name) {
                let fresh = shared.registry.again(statement, statement.meaning());
                shared.names.renew(name, fresh);
            }
        }
    }

    /// The number of the query that is under way, or comes next.
    fn query(&self) -> u64 {
        self.tally.queries + 1
    }

    /// Reads no further than the next Query or Sync, as long as the client has the server that it is given next.
    pub fn read_only_one(&mut self) {
        if let Some(shared) = &mut self.shared {
            (shared.only_one, shared.has_one) = (true, false);
        }
    }

    /// The server is lost, and the client has heard nothing of what it asked for since it has it: takes it all back, so that it
    /// can be asked of another server.
    pub fn forget_unanswered(&mut self) {
        if let Some(shared) = &mut self.shared {
            shared.names.settle(NO_TICKET, &mut shared.loan.known);
            shared.used.clear();
            (shared.clearing, shared.has_changed, shared.waits, shared.is_beginning) =
                (false, false, false, false);
            shared.worked = false;
        }
        self.flow = Flow::new(TransactionStatus::Idle);
        self.server = Stream::of(Side::Server);
        (self.server_has_ended, self.is_cut_off, self.hidden, self.muted) = (false, false, false, false);
        (self.answered, self.begun_nothing) = (false, false);
        (self.server_leaves, self.is_orphaned) = (false, false);
    }

    /// It has begun a transaction of which no server knows.
    pub fn has_begun(&self) -> bool {
        self.shared.as_ref().is_some_and(|shared| shared.begun.is_some())
    }

    /// The client has a server now, which owes nothing to anybody.
    pub fn attach(&mut self, loan: Loan) {
        if let Some(shared) = &mut self.shared {
            shared.loan = loan;
            shared.worked = false;
            shared.has_one = false;
            shared.keeps = false;
        }
        (self.server_leaves, self.begun_nothing) = (false, false);
        if self.server_has_ended {
            // The former one did, and nothing that the client had said was lost with it.
            self.server_has_ended = false;
            self.flow = Flow::new(TransactionStatus::Idle);
            self.server = Stream::of(Side::Server);
            self.is_cut_off = false;
        }
    }

    /// Nothing of what the client says has been looked at since it has this server, and any other one would do as well.
    pub fn is_untouched(&self) -> bool {
        self.shared.as_ref().is_some_and(|shared| !(shared.worked || shared.keeps)) && self.is_idle()
    }

    /// The proxy has asked the server something itself, by the statement without a name.
    pub fn lost_unnamed(&mut self) {
        if let Some(shared) = &mut self.shared {
            shared.loan.known.set_unnamed(UNKNOWN);
        }
    }

    /// Reads on behind the Query or Sync that [`Session::read_only_one`] ended at.
    pub fn read_on(&mut self) {
        if let Some(shared) = &mut self.shared {
            (shared.only_one, shared.has_one) = (false, false);
        }
    }

    /// The client keeps its server, since it has something there that no other one has. It may have other settings.
    pub fn go_on(&mut self, meaning: u64) {
        if let Some(shared) = &mut self.shared {
            shared.loan.meaning = meaning;
            shared.worked = false;
            shared.keeps = true;
        }
    }

    /// The client has it no more.
    pub fn detach(&mut self) -> Option<Loan> {
        let shared = self.shared.as_mut()?;
        shared.only_one = false;
        Some(std::mem::replace(&mut shared.loan, Loan::new(Known::new(1), 0)))
    }

    /// A transaction is over, and the server could be somebody else's, as far as [`Session::take_effects`] lets it.
    pub fn is_over(&self) -> bool {
        self.shared.as_ref().is_some_and(|shared| shared.worked) && self.is_clean()
    }

    /// What the server has to be asked for. It is not told a second time.
    pub fn take_effects(&mut self) -> Effects {
        let Some(shared) = &mut self.shared else { return Effects::default() };
        shared.worked = false;
        let effects = std::mem::take(&mut shared.effects);
        if std::mem::take(&mut shared.parsed) && !effects.changed.is_empty() {
            // They may have been read under settings that nobody else has.
            shared.loan.known.doubt_all();
        }
        effects
    }

    pub(super) fn read_client<'a>(
        &mut self,
        shared: &mut Shared,
        chunk: &'a [u8],
        input: &mut &'a [u8],
        cut: &mut Cut<'a, '_>,
    ) -> Result<(), Fault> {
        // Where the header of the message that is being read stands, if it is in this chunk.
        let mut header_at = None;
        while !self.has_left && self.flow.room() >= MOST_REQUESTS {
            if shared.has_had_enough() {
                return Ok(());
            }
            if self.client.reading.is_none() && cut.edited_bytes() > MAX_EDITED_BYTES {
                // The rest comes again when the server has taken this.
                return Ok(());
            }
            let at = chunk.len() - input.len();
            if let Some(header) = self.client.reading {
                let begin = header_at.unwrap_or(at);
                let is_here = header_at.take().is_some();
                let read = if header.kind == b'B' {
                    self.bind(shared, header, begin, chunk, input, cut)?
                } else {
                    let mut spill = std::mem::replace(&mut shared.spill, Spill::new(0));
                    let body = self.client.scanner.whole(input, &mut spill).map_err(client_frame);
                    let message = Message { header, begin, end: chunk.len() - input.len(), is_here };
                    let read = match body {
                        Ok(Some(body)) => {
                            self.client.reading = None;
                            self.message(shared, message, body, cut).map(|()| true)
                        }
                        Ok(None) => {
                            message.skip(cut);
                            Ok(false)
                        }
                        Err(error) => Err(error),
                    };
                    if self.client.reading.is_none() {
                        shared.room = None;
                        if !is_here {
                            spill.release();
                        }
                    }
                    shared.spill = spill;
                    read?
                };
                if !read {
                    return Ok(());
                }
                continue;
            }
            // Where nobody may ever know which answer comes next, none of the proxy's own is to be among them.
            let belongs_to_copy = |kind: &u8| b"dcfSHX".contains(kind);
            shared.waits = self.client.scanner.body_left_bytes() == 0
                && self.flow.may_fall_into_doubt()
                && input.first().is_some_and(|kind| !belongs_to_copy(kind));
            if shared.waits {
                return Ok(());
            }
            if self.flow.is_copying_in() && shared.passing.is_none() {
                self.client.scanner.run(input, TypeSet::all_but(b"d")).map_err(client_frame)?;
            }
            let at = chunk.len() - input.len();
            match self.client.scanner.next(input).map_err(client_frame)? {
                None => return Ok(()),
                Some(Piece::Header(header)) => {
                    shared.worked = true;
                    header_at = Some(at);
                    if let Some(begun) = shared.begun.take() {
                        cut.skip(at, at);
                        self.ask(Request::Query, Origin::Proxy)?;
                        put(cut, |to| build::query(to, &begun))?;
                        shared.is_beginning = true;
                        shared.loan.known.set_unnamed(NONE);
                    }
                    self.header(shared, header)?;
                    if self.has_left {
                        cut.skip(at, chunk.len() - input.len());
                    }
                }
                Some(Piece::Body { part, last }) => shared.passes(part, last),
            }
        }
        Ok(())
    }

    fn header(&mut self, shared: &mut Shared, header: Header) -> Result<(), Fault> {
        let Header { kind, body_bytes } = header;
        shared.has_one |= kind == b'S';
        if self.flow.status() == TransactionStatus::Idle || self.flow.outstanding() == 0 {
            self.may_commit = false;
        }
        match kind {
            b'P' if body_bytes > MAX_STATEMENT_BYTES => {
                let max_bytes = MAX_STATEMENT_BYTES as usize;
                return Err(client_frame(FrameError::TooLargeToHold { body_bytes, max_bytes }));
            }
            b'Q' if body_bytes > MAX_QUERY_BYTES => {
                shared.query();
                shared.passing = Some((Vec::new(), false));
                self.may_commit = true;
            }
            b'P' | b'B' | b'D' | b'C' | b'Q' if body_bytes > 0 => {
                if kind != b'B' && body_bytes > NEEDS_ROOM_BYTES {
                    shared.room = Some(shared.registry.room_for(body_bytes as usize).ok_or_else(no_room)?);
                }
                self.client.reading = Some(header);
                return Ok(());
            }
            b'F' => {
                // Which function it is stands in its body; that it is one of these can be asked for.
                shared.effects.ties = shared.effects.ties.and(sql::Ties::of(&[sql::Tie::AdvisoryLock]));
                self.may_commit = true;
            }
            _ => {}
        }
        let request = Request::of(kind, None).unwrap_or(Request::DescribeStatement);
        self.request(request).map_err(client_fault)
    }

    /// A message that is here from its beginning to its end.
    fn message(
        &mut self,
        shared: &mut Shared,
        message: Message,
        body: &[u8],
        cut: &mut Cut<'_, '_>,
    ) -> Result<(), Fault> {
        match ClientMessage::parse(message.header.kind, body).map_err(malformed)? {
            ClientMessage::Query { text } => {
                self.may_commit |= sql::may_commit(text);
                shared.has_one = true;
                shared.query();
                let effects = sql::effects(text);
                if !effects.is_none() {
                    let is_known =
                        |(name, _): &(Vec<u8>, std::ops::Range<usize>)| shared.names.get(name).is_some();
                    if self.flow.status() != TransactionStatus::Failed
                        && !self.flow.is_skipping()
                        && let Some((name, _)) = sql::deallocated(text).filter(is_known)
                    {
                        // Of the protocol's statements the server has its own names, and keeps them.
                        let ticket = self.ask(Request::Query, Origin::Local)?;
                        shared.names.remove(&name, ticket);
                        message.skip(cut);
                        return Ok(());
                    }
                    shared.affected(&effects);
                }
                self.request(Request::Query).map_err(client_fault)?;
                message.keep(body, cut);
            }
            _ if self.flow.is_skipping() => {
                // The server throws it away, whatever it says.
                let request = Request::of(message.header.kind, body.first().copied()).map_err(malformed)?;
                self.request(request).map_err(client_fault)?;
                message.keep(body, cut);
            }
            ClientMessage::Parse(parse) => self.parse(shared, &parse, message, body, cut)?,
            ClientMessage::Describe { target: Target::Statement, name } => {
                match self.use_statement(shared, name, message.begin, cut)? {
                    Some(statement) => {
                        message.skip(cut);
                        put(cut, |to| build::describe(to, Target::Statement, statement.name()))?;
                        let ticket = self.ask(Request::DescribeStatement, Origin::Client)?;
                        shared.has_used(ticket, statement);
                    }
                    None => {
                        message.keep(body, cut);
                        self.request(Request::DescribeStatement).map_err(client_fault)?;
                    }
                }
            }
            ClientMessage::Close { target: Target::Statement, name }
                if self.flow.in_doubt()
                    && let Some(statement) = shared.names.get(name).map(Arc::clone) =>
            {
                // Answers of the proxy's own have no place any more.
                let ticket = self.ask(Request::Close, Origin::Client)?;
                shared.names.remove(name, ticket);
                shared.loan.known.doubt(&statement);
                message.skip(cut);
                put(cut, |to| build::close(to, Target::Statement, statement.name()))?;
            }
            ClientMessage::Close { target: Target::Statement, name } if shared.names.get(name).is_some() => {
                let ticket = self.ask(Request::Close, Origin::Local)?;
                shared.names.remove(name, ticket);
                message.skip(cut);
            }
            ClientMessage::Close { target: Target::Statement, name } => {
                let ticket = self.ask(Request::Close, Origin::Client)?;
                if name.is_empty() {
                    shared.names.remove_unnamed(ticket);
                    shared.loan.known.set_unnamed(NONE);
                }
                message.keep(body, cut);
            }
            _ => {
                let request = Request::of(message.header.kind, body.first().copied()).map_err(malformed)?;
                self.request(request).map_err(client_fault)?;
                message.keep(body, cut);
            }
        }
        Ok(())
    }

    fn parse(
        &mut self,
        shared: &mut Shared,
        parse: &Parse<'_>,
        message: Message,
        body: &[u8],
        cut: &mut Cut<'_, '_>,
    ) -> Result<(), Fault> {
        if let Some((name, at)) = sql::deallocated(parse.text)
            && let Some(statement) = shared.names.get(&name).map(Arc::clone)
        {
            // It is the client's no more when this was executed, and hardly anybody parses it for another reason.
            self.ensure(shared, &statement, message.begin, cut)?;
            let text = [&parse.text[..at.start], statement.name(), &parse.text[at.end..]].concat();
            let ticket = self.ask(Request::Parse, Origin::Client)?;
            shared.names.remove(&name, ticket);
            shared.loan.known.doubt(&statement);
            if parse.name.is_empty() {
                shared.define_unnamed(&text, [].into_iter(), ticket)?;
            }
            message.skip(cut);
            return put(cut, |to| build::parse(to, parse.name, &text, &[]));
        }
        shared.parsed = true;
        if parse.name.is_empty() {
            let ticket = self.ask(Request::Parse, Origin::Client)?;
            shared.define_unnamed(parse.text, parse.types.iter(), ticket)?;
            message.keep(body, cut);
            return Ok(());
        }
        if let Some(statement) = shared.names.get(parse.name).map(Arc::clone) {
            // It has one of that name; the server says so.
            self.ensure(shared, &statement, message.begin, cut)?;
            self.ask(Request::Parse, Origin::Client)?;
            message.skip(cut);
            return put(cut, |to| build::parse(to, statement.name(), b"", &[]));
        }
        let types: Vec<u32> = parse.types.iter().collect();
        let statement = match self.flow.in_doubt() {
            false => shared.registry.of(parse.text, &types, shared.loan.meaning),
            // Certainly not there yet, so that the server itself answers.
            true => shared.registry.unshared(parse.text, &types, shared.loan.meaning),
        };
        let (statement, room) =
            statement.zip(shared.registry.room_for_name(parse.name)).ok_or_else(no_room_to_keep)?;
        message.skip(cut);
        let need = match shared.loan.known.need(&statement) {
            // The server refuses it in a transaction that has failed, unless it ends that.
            Need::Nothing if self.flow.status() == TransactionStatus::Failed => Need::CloseAndParse,
            need => need,
        };
        if need == Need::Nothing {
            let ticket = self.ask(Request::Parse, Origin::Local)?;
            shared.names.define(parse.name, statement, room, ticket, false);
            return Ok(());
        }
        if need == Need::CloseAndParse {
            self.close(shared, &statement, cut)?;
        }
        let ticket = self.ask(Request::Parse, Origin::Client)?;
        put(cut, |to| build::parse(to, statement.name(), parse.text, &types))?;
        shared.names.define(parse.name, statement, room, ticket, true);
        self.evict(shared, cut)
    }

    /// The names at the beginning of a Bind are read, and the rest of it goes by. `false`: they are not here yet.
    fn bind<'a>(
        &mut self,
        shared: &mut Shared,
        header: Header,
        begin: usize,
        chunk: &'a [u8],
        input: &mut &'a [u8],
        cut: &mut Cut<'a, '_>,
    ) -> Result<bool, Fault> {
        let at = chunk.len() - input.len();
        let here = &input[..input.len().min(self.client.scanner.body_left_bytes() as usize)];
        let is_whole_here = shared.bind.is_empty() && begin < at;
        if is_whole_here && let Some(names) = bind_names(here) {
            let names_bytes = names.portal.len() + names.statement.len() + 2;
            self.client.reading = None;
            if let Some(statement) = self.bound(shared, names.statement, begin, cut)? {
                cut.skip(begin, at + names_bytes);
                cut.insert(|to| bind_beginning(to, header, names_bytes, names.portal, statement.name()));
                let ticket = self.ask(Request::Bind, Origin::Client)?;
                shared.has_used(ticket, statement);
            } else {
                self.request(Request::Bind).map_err(client_fault)?;
            }
            // They are taken: were there no room for more now, they would come again.
            let (mut names, behind) = input.split_at(names_bytes);
            self.client.scanner.next(&mut names).map_err(client_frame)?;
            *input = behind;
            return Ok(true);
        }
        let last = match self.client.scanner.next(input).map_err(client_frame)? {
            Some(Piece::Body { part, last }) => {
                shared.bind.extend_from_slice(part);
                last
            }
            _ => false,
        };
        cut.skip(begin, chunk.len() - input.len());
        let beginning = std::mem::take(&mut shared.bind);
        let Some(names) = bind_names(&beginning) else {
            if last || beginning.len() > MAX_NAMES_BYTES {
                let message = "the names at the beginning of a Bind message have no end".to_owned();
                return Err(Fault::Client { sqlstate: SqlState::PROTOCOL_VIOLATION, message });
            }
            shared.bind = beginning;
            return Ok(false);
        };
        self.client.reading = None;
        let names_bytes = names.portal.len() + names.statement.len() + 2;
        let statement = self.bound(shared, names.statement, chunk.len() - input.len(), cut)?;
        let name = statement.as_ref().map_or(names.statement, |statement| statement.name());
        cut.insert(|to| {
            bind_beginning(to, header, names_bytes, names.portal, name);
            to.extend_from_slice(&beginning[names_bytes..]);
        });
        match statement {
            Some(statement) => {
                let ticket = self.ask(Request::Bind, Origin::Client)?;
                shared.has_used(ticket, statement);
            }
            None => self.request(Request::Bind).map_err(client_fault)?,
        }
        Ok(true)
    }

    /// A statement is about to be bound, and then executed.
    fn bound(
        &mut self,
        shared: &mut Shared,
        name: &[u8],
        at: usize,
        cut: &mut Cut<'_, '_>,
    ) -> Result<Option<Arc<Statement>>, Fault> {
        if self.flow.is_skipping() {
            return Ok(None);
        }
        let statement = self.use_statement(shared, name, at, cut)?;
        match &statement {
            Some(statement) => {
                self.may_commit |= statement.may_commit();
                if !statement.effects().is_none() {
                    shared.affected(statement.effects());
                }
            }
            None if name.is_empty() => {
                self.may_commit |= shared.names.unnamed().may_commit;
                if !shared.names.unnamed().effects.is_none() {
                    let effects = shared.names.unnamed().effects.clone();
                    shared.affected(&effects);
                }
            }
            // Prepared by SQL, if at all.
            None => self.may_commit = true,
        }
        Ok(statement)
    }

    /// The server has the statement when it reads what follows. `None`: it is known by the name that the client gave.
    fn use_statement(
        &mut self,
        shared: &mut Shared,
        name: &[u8],
        at: usize,
        cut: &mut Cut<'_, '_>,
    ) -> Result<Option<Arc<Statement>>, Fault> {
        if name.is_empty() {
            let number = shared.names.unnamed().number;
            if shared.loan.known.unnamed() != number && !self.flow.in_doubt() {
                cut.skip(at, at);
                let ticket = if number == NONE {
                    // It is somebody else's.
                    let ticket = self.ask(Request::Close, Origin::Proxy)?;
                    put(cut, |to| build::close(to, Target::Statement, b""))?;
                    ticket
                } else {
                    let ticket = self.ask(Request::Parse, Origin::Proxy)?;
                    let unnamed = shared.names.unnamed();
                    put(cut, |to| build::parse(to, b"", &unnamed.text, &unnamed.types))?;
                    ticket
                };
                shared.loan.known.set_unnamed(number);
                shared.names.unnamed_at_server(ticket);
            }
            return Ok(None);
        }
        let Some(mut statement) = shared.names.use_in(name, self.query()) else {
            if name.starts_with(PREFIX) {
                let message =
                    format!("prepared statement \"{}\" does not exist", String::from_utf8_lossy(name));
                let sqlstate = SqlState::new(b"26000").unwrap_or(SqlState::PROTOCOL_VIOLATION);
                return Err(Fault::Client { sqlstate, message });
            }
            return Ok(None);
        };
        if statement.is_retired() && !shared.loan.known.has(&statement) {
            // A server that has it says what has changed, and this one that it has none of that name.
            return Ok(None);
        }
        if self.flow.in_doubt() {
            // Nothing can be prepared unseen.
            return Ok(Some(statement).filter(|statement| shared.loan.known.has(statement)));
        }
        if statement.meaning() != shared.loan.meaning {
            let under = shared.registry.again(&statement, shared.loan.meaning);
            shared.names.replace(name, Arc::clone(&under));
            statement = under;
        }
        self.ensure(shared, &statement, at, cut)?;
        Ok(Some(statement))
    }

    fn ensure(
        &mut self,
        shared: &mut Shared,
        statement: &Arc<Statement>,
        at: usize,
        cut: &mut Cut<'_, '_>,
    ) -> Result<(), Fault> {
        let need = shared.loan.known.need(statement);
        if need == Need::Nothing {
            return Ok(());
        }
        shared.parsed = true;
        cut.skip(at, at);
        if need == Need::CloseAndParse {
            self.close(shared, statement, cut)?;
        }
        let ticket = self.ask(Request::Parse, Origin::Proxy)?;
        put(cut, |to| build::parse(to, statement.name(), statement.text(), statement.types()))?;
        shared.names.at_server(Arc::clone(statement), ticket);
        self.evict(shared, cut)
    }

    fn evict(&mut self, shared: &mut Shared, cut: &mut Cut<'_, '_>) -> Result<(), Fault> {
        match shared.loan.known.evict() {
            Some(evicted) => self.close(shared, &evicted, cut),
            None => Ok(()),
        }
    }

    fn close(
        &mut self,
        shared: &mut Shared,
        statement: &Arc<Statement>,
        cut: &mut Cut<'_, '_>,
    ) -> Result<(), Fault> {
        let ticket = self.ask(Request::Close, Origin::Proxy)?;
        shared.names.at_server(Arc::clone(statement), ticket);
        put(cut, |to| build::close(to, Target::Statement, statement.name()))
    }

    /// Its ticket. The server does not skip, so that it reads what is asked.
    fn ask(&mut self, request: Request, origin: Origin) -> Result<u64, Fault> {
        self.used = true;
        self.count(request, origin);
        match self.flow.request(request, origin).map_err(client_fault)? {
            Accepted::Queued(ticket) => Ok(ticket),
            // Nothing will be heard of it, and nothing is settled by it.
            _ => Ok(NO_TICKET),
        }
    }
}

impl Shared {
    /// A transaction that no server has heard of yet.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Of a statement of the client's.
    pub(super) fn text(&self, name: &[u8]) -> Option<&[u8]> {
        if name.is_empty() {
            let unnamed = self.names.unnamed();
            return (unnamed.number != NONE).then_some(&unnamed.text);
        }
        self.names.get(name).map(|statement| statement.text())
    }

    /// A simple query, after which there is no unnamed statement; manual 55.2.3.
    fn query(&mut self) {
        self.names.forget_unnamed();
        self.loan.known.set_unnamed(NONE);
    }

    /// The server has this one now.
    fn define_unnamed(
        &mut self,
        text: &[u8],
        types: impl Iterator<Item = u32>,
        ticket: u64,
    ) -> Result<(), Fault> {
        let defined = self.names.define_unnamed(&self.registry, text, types, ticket);
        self.loan.known.set_unnamed(defined.ok_or_else(no_room_to_keep)?);
        Ok(())
    }

    fn has_used(&mut self, ticket: u64, statement: Arc<Statement>) {
        if ticket != NO_TICKET {
            self.used.push_back((ticket, statement));
        }
    }

    fn affected(&mut self, effects: &Effects) {
        self.effects.absorb(effects);
        if effects.forgets_statements {
            self.loan.known.doubt_all();
            self.clearing = true;
        }
    }

    /// A piece of a query that is not held.
    fn passes(&mut self, part: &[u8], last: bool) {
        let Some((tail, matters)) = &mut self.passing else { return };
        let tail_bytes = tail.len();
        tail.extend_from_slice(&part[..part.len().min(sql::WORD_OVERLAP_BYTES)]);
        *matters |= sql::may_matter(tail) || sql::may_matter(part);
        tail.drain(..tail_bytes);
        tail.clear();
        tail.extend_from_slice(&part[part.len().saturating_sub(sql::WORD_OVERLAP_BYTES)..]);
        if last {
            if *matters {
                self.effects.absorb(&Effects::unknown());
                self.loan.known.doubt_all();
            }
            self.passing = None;
        }
    }

    /// The open transaction began with what the server has not answered yet.
    pub(super) fn is_beginning(&self) -> bool {
        self.is_beginning
    }

    pub(super) fn waits(&self, flow: &Flow) -> bool {
        self.waits && flow.may_fall_into_doubt() || self.has_had_enough()
    }

    /// What follows is for whoever the client is given next.
    fn has_had_enough(&self) -> bool {
        self.only_one && self.has_one
    }

    pub(super) fn confirm(&mut self, ticket: u64) {
        self.names.confirm(ticket);
    }

    /// `true`: what the proxy had asked for itself.
    pub(super) fn answered(&mut self, event: Event) -> Result<bool, Fault> {
        match event {
            Event::Done(owed) => {
                self.names.confirm(owed.ticket);
                if self.used.front().is_some_and(|(ticket, _)| *ticket == owed.ticket) {
                    self.used.pop_front();
                }
                Ok(owed.origin == Origin::Proxy)
            }
            Event::Part(owed) => Ok(owed.origin == Origin::Proxy),
            Event::Failed(owed) => {
                self.names.refuse(owed.ticket);
                self.clearing = false;
                let failed = self.used.iter().find(|(ticket, _)| *ticket == owed.ticket);
                if let (true, Some((_, statement))) = (std::mem::take(&mut self.has_changed), failed) {
                    self.registry.retire(statement);
                }
                Ok(false)
            }
            Event::Ready(owed, status) => {
                if owed.origin == Origin::Proxy {
                    self.is_beginning = false;
                    return Ok(true);
                }
                self.names.settle(owed.ticket, &mut self.loan.known);
                while self.used.front().is_some_and(|(ticket, _)| *ticket < owed.ticket) {
                    self.used.pop_front();
                }
                if self.used.is_empty() && self.used.capacity() > KEPT_USED {
                    self.used = VecDeque::new();
                }
                if std::mem::take(&mut self.clearing) {
                    self.names.clear();
                }
                if self.mode == Mode::Statement && status != TransactionStatus::Idle {
                    let message = "transactions of several statements are not allowed with statement pooling";
                    let sqlstate = SqlState::FEATURE_NOT_SUPPORTED;
                    return Err(Fault::Client { sqlstate, message: message.to_owned() });
                }
                Ok(false)
            }
            Event::Asynchronous | Event::Closing | Event::Doubtful => Ok(false),
        }
    }

    /// A parameter of the server has this value now.
    pub(super) fn note(&mut self, name: &[u8], value: &[u8]) -> Result<(), Fault> {
        let has_room = login::note(&mut self.loan.noted, name, value);
        has_room.then_some(()).ok_or_else(|| Fault::Server("it reports too many parameters".to_owned()))
    }

    /// What an error says of statements and settings.
    pub(super) fn failed(&mut self, fields: &Fields<'_>) {
        self.has_changed = fields.get(b'R') == Some(REVALIDATE);
        // What the client may not set it has not set, and nobody is to set it for it: a value alone does not show that.
        self.effects.changed.reset |= !self.effects.changed.is_empty();
    }
}

/// The answer to a `DEALLOCATE` that the server does not see.
pub(super) fn deallocated(to: &mut BytesMut, status: TransactionStatus) {
    if build::command_complete(to, "DEALLOCATE").is_ok() {
        build::ready_for_query(to, status);
    }
}

/// Up to and with the names; `names_bytes`: how long they were.
fn bind_beginning(to: &mut BytesMut, header: Header, names_bytes: usize, portal: &[u8], statement: &[u8]) {
    let body_bytes = header.body_bytes as usize - names_bytes + portal.len() + statement.len() + 2;
    let body_bytes = u32::try_from(body_bytes).unwrap_or(u32::MAX);
    to.extend_from_slice(&Header { kind: b'B', body_bytes }.to_bytes());
    for name in [portal, statement] {
        to.extend_from_slice(name);
        to.put_u8(0);
    }
}

/// As a client sent them, as far as they are whole.
pub(super) fn messages(mut rest: &[u8]) -> impl Iterator<Item = ClientMessage<'_>> {
    std::iter::from_fn(move || {
        let ([kind, length @ ..], behind) = rest.split_first_chunk::<HEADER_BYTES>()?;
        let (body, behind) = behind.split_at_checked(u32::from_be_bytes(*length).checked_sub(4)? as usize)?;
        rest = behind;
        ClientMessage::parse(*kind, body).ok()
    })
}

fn no_room() -> Fault {
    Fault::Client {
        sqlstate: SqlState::OUT_OF_MEMORY,
        message: "too many long statements of clients are under way to the proxy".to_owned(),
    }
}

fn no_room_to_keep() -> Fault {
    Fault::Client {
        sqlstate: SqlState::OUT_OF_MEMORY,
        message: format!(
            "clients of the proxy have prepared statements of {} MiB together, which is all that it keeps",
            MAX_KEPT_BYTES >> 20
        ),
    }
}

/// The named statements that are bound or described in this.
fn used(asked: &[u8]) -> impl Iterator<Item = &[u8]> {
    let names = messages(asked).filter_map(|message| match message {
        ClientMessage::Bind(bind) => Some(bind.statement),
        ClientMessage::Describe { target: Target::Statement, name } => Some(name),
        _ => None,
    });
    names.filter(|name| !name.is_empty())
}

fn put(
    cut: &mut Cut<'_, '_>,
    write: impl FnOnce(&mut BytesMut) -> Result<(), build::Unsendable>,
) -> Result<(), Fault> {
    let mut written = Ok(());
    cut.insert(|to| written = write(to));
    written.map_err(|error| Fault::Client {
        sqlstate: SqlState::PROGRAM_LIMIT_EXCEEDED,
        message: error.to_string(),
    })
}

#[cfg(test)]
mod tests;
