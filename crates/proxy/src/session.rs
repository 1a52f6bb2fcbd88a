//! What happens to the bytes between a client and the server that is its own for a while.
//!
//! A [`Session`] is shown what was received, in both directions, in whatever pieces it came. It says what of it is to be
//! passed on, which most often is all of it, in place. It looks inside few messages:
//!
//! - Terminate is the client's farewell to the proxy, not to the server, which may serve somebody else next.
//! - ReadyForQuery and ErrorResponse tell whether a transaction is open and whether the server will close.
//! - The warning that a wait for synchronous replication was canceled comes with a commit that no standby may have. It is
//!   known by the routine that reports it, since its text is translated, and becomes the error that it is: 08007, in place
//!   of everything up to the next ReadyForQuery. Clients that read no warnings took such commits for safe.
//!
//! A session whose server is shared ([`Session::sharing`]) also has its statements renamed, and knows what it may leave behind:
//! see [`shared`].
//!
//! When a server is lost, [`Session::lost`] says what is true of the work that was on it.
//!
//! Leaves out: sockets, and who gets which server. Hazard: see [`pgherd_pgwire::flow`]; and a farewell that reaches the
//! server ends a connection that was to be lent again.

use bytes::BytesMut;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::flow::{Answer, Breach, Flow, Origin, Owed, Request};
use pgherd_pgwire::frame::{FrameError, HEADER_BYTES, Header, Phase, Piece, Scanner, Side, Spill, TypeSet};
use pgherd_pgwire::message::build::{self, Report, Severity};
use pgherd_pgwire::message::server::Fields;
use pgherd_pgwire::message::{ClientMessage, Malformed, ServerMessage, TransactionStatus};

use cut::{Cut, Message};
pub use cut::{Pass, Passed};
pub(crate) use shared::REVALIDATE;
pub use shared::{Loan, Mode};
use shared::{Shared, messages};

use crate::counts::Tally;
use crate::sql::{self, Bracket};

mod cut;
pub mod shared;

/// A report longer than this is passed on unread. The longest of those that matter has some 300 bytes.
const MAX_READ_BYTES: u32 = 32 * 1024;
/// Report that the postmaster is gone, of a backend that reads a command or writes an answer: `be-secure.c`.
const ORPHANED: [&[u8]; 2] = [SECURE_READ, b"secure_write"];
const SECURE_READ: &[u8] = b"secure_read";
/// Reports a canceled wait: `SyncRepWaitForLSN` in `syncrep.c`.
pub(crate) const SYNC_REP_WAIT: &[u8] = b"SyncRepWaitForLSN";

/// Why a session cannot go on. Both connections are closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The client sent what no client may send.
    #[error("{message}")]
    Client { sqlstate: SqlState, message: String },
    /// The server did.
    #[error("the server broke the protocol: {0}")]
    Server(String),
}

/// What is true of the work that was on a server that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Nothing was under way.
    Nothing,
    /// A statement was under way, and the server was still waiting for one.
    Unbegun,
    /// A transaction was open, and nothing that could have committed it was under way.
    Transaction,
    /// A statement was under way, and nobody knows whether it committed.
    Unknown,
}

impl Lost {
    pub fn sqlstate(self) -> SqlState {
        match self {
            Lost::Nothing => SqlState::ADMIN_SHUTDOWN,
            Lost::Unbegun | Lost::Transaction => SqlState::SERIALIZATION_FAILURE,
            Lost::Unknown => SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
        }
    }

    pub fn sentence(self) -> &'static str {
        match self {
            Lost::Nothing => "no statement was under way",
            Lost::Unbegun => "nothing was done of the statement that was under way",
            Lost::Transaction => "the open transaction was rolled back",
            Lost::Unknown => "whether the statement that was under way has committed is not known",
        }
    }
}

/// One side's part of a session.
#[derive(Debug)]
struct Stream {
    scanner: Scanner,
    /// The message whose body is being gathered.
    reading: Option<Header>,
}

impl Stream {
    fn of(side: Side) -> Stream {
        Stream { scanner: Scanner::new(side, Phase::Session), reading: None }
    }
}

#[derive(Debug)]
pub struct Session {
    flow: Flow,
    client: Stream,
    server: Stream,
    spill: Spill,
    /// A commit was not confirmed: the client has its error, and what else the server says of it is not passed on.
    muted: bool,
    /// The body that is going by belongs to a message that is not passed on.
    hidden: bool,
    /// Of the server's next message a part of the header has come.
    is_cut_off: bool,
    has_left: bool,
    server_has_ended: bool,
    /// The server has said its last word, whether or not the client was to hear it.
    server_leaves: bool,
    used: bool,
    /// A statement is under way that may commit the open transaction, or cannot be read.
    may_commit: bool,
    /// The server is about to end, and what it says of that says nothing of the client's work.
    expects_shutdown: bool,
    /// The server has said something since it was last ready, besides what nobody asked for.
    answered: bool,
    /// The server ended before it had begun anything of what is under way.
    begun_nothing: bool,
    /// The server has ended because its postmaster is gone.
    is_orphaned: bool,
    /// The client wants no warnings; the server sends them all the same.
    hides_warnings: bool,
    tally: Tally,
    /// Servers are this client's for a transaction only.
    shared: Option<Box<Shared>>,
}

/// What a client does, and which time it is: another number is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    Idle { transaction: u64 },
    IdleInTransaction { cycle: u64, transaction: u64 },
    Waits { cycle: u64, transaction: u64 },
}

impl Default for Doing {
    fn default() -> Doing {
        Doing::Idle { transaction: 0 }
    }
}

impl Doing {
    pub fn is_idle(self) -> bool {
        matches!(self, Doing::Idle { .. })
    }

    pub fn transaction(self) -> u64 {
        match self {
            Doing::Idle { transaction }
            | Doing::IdleInTransaction { transaction, .. }
            | Doing::Waits { transaction, .. } => transaction,
        }
    }
}

impl Session {
    /// The server has just said ReadyForQuery, idle.
    pub fn new() -> Session {
        Session {
            flow: Flow::new(TransactionStatus::Idle),
            client: Stream::of(Side::Client),
            server: Stream::of(Side::Server),
            spill: Spill::new(MAX_READ_BYTES as usize),
            muted: false,
            hidden: false,
            is_cut_off: false,
            has_left: false,
            server_has_ended: false,
            server_leaves: false,
            used: false,
            may_commit: false,
            expects_shutdown: false,
            answered: false,
            begun_nothing: false,
            is_orphaned: false,
            hides_warnings: false,
            tally: Tally::default(),
            shared: None,
        }
    }

    /// The client has said Terminate.
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    /// The server has said its last word, which the client has heard.
    pub fn server_has_ended(&self) -> bool {
        self.server_has_ended
    }

    /// The server has said its last word, and would read nothing of what the client says from now on.
    pub fn server_leaves(&self) -> bool {
        self.server_leaves
    }

    /// The server's postmaster is gone, and with it whoever else it has begun.
    pub fn server_is_orphaned(&self) -> bool {
        self.is_orphaned
    }

    /// The client has heard whole messages only, so that the proxy can say something in the server's place.
    pub fn can_be_told(&self) -> bool {
        // What is read before it is passed on, or not passed on at all, the client has heard nothing of.
        self.server.reading.is_some() || self.hidden || self.server.scanner.body_left_bytes() == 0
    }

    /// If the server says that it is shut down, the client is told instead what is true of its work: [`Session::lost`].
    pub fn expect_shutdown(&mut self, expected: bool) {
        self.expects_shutdown = expected;
    }

    /// What has gone by.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// At a moment at which the proxy could answer something in the server's place: the status that it would tell. Nothing is
    /// outstanding then, both sides are between messages, and a transaction that is open has not failed.
    pub fn lull(&self) -> Option<TransactionStatus> {
        let between = |stream: &Stream| stream.scanner.body_left_bytes() == 0 && stream.reading.is_none();
        let is_lull = self.flow.outstanding() == 0
            && !(self.muted || self.is_cut_off || self.has_left || self.flow.in_doubt())
            && between(&self.client)
            && between(&self.server);
        let has_begun = self.shared.as_ref().is_some_and(|shared| shared.has_begun());
        match self.flow.status() {
            _ if !is_lull => None,
            TransactionStatus::Idle if has_begun => Some(TransactionStatus::InTransaction),
            TransactionStatus::Failed => None,
            status => Some(status),
        }
    }

    /// The server owes an answer.
    pub fn is_asked(&self) -> bool {
        self.flow.outstanding() > 0
    }

    /// It asked the server for something.
    pub fn used(&self) -> bool {
        self.used
    }

    /// More of what the client sends can be taken. If not: once the server has answered some.
    pub fn has_room(&self) -> bool {
        let waits = self.shared.as_ref().is_some_and(|shared| shared.waits(&self.flow));
        self.flow.room() >= self.most_requests() && !waits
    }

    /// What one message of the client can become on its way to the server.
    fn most_requests(&self) -> usize {
        if self.shared.is_some() { shared::MOST_REQUESTS } else { 1 }
    }

    /// The server owes nothing, no transaction is open, and neither side is in the middle of a message.
    pub fn is_clean(&self) -> bool {
        let between = |stream: &Stream| stream.scanner.body_left_bytes() == 0 && stream.reading.is_none();
        self.flow.is_clean()
            && !(self.muted || self.is_cut_off)
            && between(&self.client)
            && between(&self.server)
    }

    /// No transaction is open and nothing is under way: a moment at which a session can be ended without loss.
    pub fn is_idle(&self) -> bool {
        self.flow.outstanding() == 0 && self.flow.status() == TransactionStatus::Idle
    }

    /// From now on the client sees warnings, or does not.
    pub fn hide_warnings(&mut self, hides: bool) {
        self.hides_warnings = hides;
    }

    pub fn doing(&self) -> Doing {
        let (cycle, transaction) = (self.tally.queries, self.tally.transactions);
        if self.flow.outstanding() > 0 {
            Doing::Waits { cycle, transaction }
        } else if self.flow.status() != TransactionStatus::Idle {
            Doing::IdleInTransaction { cycle, transaction }
        } else {
            Doing::Idle { transaction }
        }
    }

    /// Is what the client sends next, and is here to its end, up to and with one Query or Sync, a COMMIT and nothing else? Then
    /// [`Session::committed`] can answer it.
    pub fn commits(&self, unread: &[u8]) -> bool {
        let commits = |text: &[u8]| sql::bracket(text) == Some(Bracket::Commit);
        let (mut parsed, mut bound, mut executed) = (None, 0, 0);
        for (place, message) in messages(unread).enumerate() {
            match message {
                ClientMessage::Query { text } => return place == 0 && commits(text),
                ClientMessage::Parse(parse) if commits(parse.text) => parsed = Some(parse.name),
                ClientMessage::Bind(bind) => {
                    let known = || self.shared.as_ref().and_then(|shared| shared.text(bind.statement));
                    if parsed != Some(bind.statement) && !known().is_some_and(commits) {
                        return false;
                    }
                    bound += 1;
                }
                ClientMessage::Execute { .. } => executed += 1,
                ClientMessage::Sync => return (bound, executed) == (1, 1),
                ClientMessage::Describe { .. } | ClientMessage::Flush => {}
                _ => return false,
            }
        }
        false
    }

    /// The server is lost, and what it owed an answer for was a COMMIT of which it is known that it has committed: answers what
    /// the client has not heard of yet. `false`: it was not that alone, and nothing is answered.
    pub fn committed(&mut self, answers: &mut BytesMut) -> bool {
        let owed: Vec<(Owed, bool)> = self.flow.owed().collect();
        let is_end = |owed: &Owed| matches!(owed.request, Request::Query | Request::Sync);
        let ends = owed.iter().position(|(owed, _)| is_end(owed));
        if self.muted || ends.is_none_or(|at| at + 1 != owed.len()) {
            return false;
        }
        let mut said = BytesMut::new();
        if !owed.iter().all(|(owed, is_heard)| answer_to_commit(&mut said, *owed, *is_heard)) {
            return false;
        }
        answers.unsplit(said);
        if let Some(shared) = &mut self.shared {
            owed.iter().for_each(|(owed, _)| shared.confirm(owed.ticket));
        }
        self.tally.queries += 1;
        self.tally.transactions += 1;
        self.forget_unanswered();
        true
    }

    pub fn lost(&self) -> Lost {
        let under_way = self.flow.outstanding() > 0 || self.client.scanner.body_left_bytes() > 0;
        let begins = self.shared.as_ref().is_some_and(|shared| shared.is_beginning());
        let open = begins || self.flow.status() != TransactionStatus::Idle;
        match (under_way, open) {
            (false, false) => Lost::Nothing,
            (false, true) => Lost::Transaction,
            (true, true) if !self.may_commit || self.begun_nothing => Lost::Transaction,
            (true, false) if self.begun_nothing => Lost::Unbegun,
            (true, _) => Lost::Unknown,
        }
    }

    /// Bytes from the client, for the server. What the proxy answers by itself is put into `answers`, for the client.
    pub fn from_client<'a>(
        &mut self,
        chunk: &'a [u8],
        edited: &mut BytesMut,
        answers: &mut BytesMut,
    ) -> Result<Passed<'a>, Fault> {
        let (mut input, mut cut) = (chunk, Cut::new(chunk, edited));
        if let Some(mut shared) = self.shared.take() {
            let read = self.read_client(&mut shared, chunk, &mut input, &mut cut);
            self.shared = Some(shared);
            read?;
            // What the server says next takes it along otherwise.
            if self.can_be_told() && self.flow.is_all_local() {
                self.answer_here(|write| write(answers));
            }
            return Ok(cut.end(chunk.len() - input.len()));
        }
        while !self.has_left && self.flow.has_room() {
            let stop = TypeSet::all_but(b"d");
            if self.flow.is_copying_in() && self.client.reading.is_none() {
                self.client.scanner.run(&mut input, stop).map_err(client_frame)?;
            }
            match self.client.scanner.next(&mut input).map_err(client_frame)? {
                None => break,
                Some(Piece::Header(header)) => {
                    let begin = chunk.len() - input.len() - HEADER_BYTES;
                    self.client_header(header, input).map_err(client_fault)?;
                    if self.has_left {
                        cut.skip(begin, chunk.len() - input.len());
                    }
                }
                Some(Piece::Body { part, .. }) => {
                    if let Some(header) = self.client.reading.take() {
                        let request = Request::of(header.kind, part.first().copied());
                        self.request(request.map_err(malformed)?).map_err(client_fault)?;
                    }
                }
            }
        }
        Ok(cut.end(chunk.len() - input.len()))
    }

    /// `behind`: what was received behind the header.
    fn client_header(&mut self, header: Header, behind: &[u8]) -> Result<(), Breach> {
        let kind = header.kind;
        if kind == b'D' && header.body_bytes > 0 {
            // What it describes stands in its body.
            self.client.reading = Some(header);
            return Ok(());
        }
        if self.flow.status() == TransactionStatus::Idle || self.flow.outstanding() == 0 {
            self.may_commit = false;
        }
        let text = (kind == b'Q').then(|| behind.get(..header.body_bytes as usize)).flatten();
        self.may_commit |= match kind {
            b'Q' => text.is_none_or(|text| sql::may_commit(text.strip_suffix(b"\0").unwrap_or(text))),
            b'E' | b'F' => true,
            _ => false,
        };
        match Request::of(kind, None) {
            Ok(request) => self.request(request),
            // The scanner lets nothing else through but a Describe of nothing, which the server refuses.
            Err(_) => self.request(Request::DescribeStatement),
        }
    }

    fn request(&mut self, request: Request) -> Result<(), Breach> {
        self.used = true;
        if request == Request::Terminate {
            self.has_left = true;
            return Ok(());
        }
        self.count(request, Origin::Client);
        self.flow.request(request, Origin::Client).map(|_| ())
    }

    fn count(&mut self, request: Request, origin: Origin) {
        self.tally.parses += u64::from(request == Request::Parse && origin != Origin::Proxy);
        self.tally.server_parses += u64::from(request == Request::Parse && origin != Origin::Local);
        self.tally.binds += u64::from(request == Request::Bind);
    }

    /// Bytes from the server, for the client.
    pub fn from_server<'a>(&mut self, chunk: &'a [u8], edited: &mut BytesMut) -> Result<Passed<'a>, Fault> {
        let (mut input, mut cut) = (chunk, Cut::new(chunk, edited));
        // Where the header of the message that is being read stands, if it is in this chunk.
        let mut header_at = None;
        loop {
            if let Some(header) = self.server.reading {
                let mut spill = std::mem::replace(&mut self.spill, Spill::new(0));
                let body_at = chunk.len() - input.len();
                let body = self.server.scanner.whole(&mut input, &mut spill).map_err(server_frame)?;
                let message = Message {
                    header,
                    begin: header_at.unwrap_or(body_at),
                    end: chunk.len() - input.len(),
                    is_here: header_at.is_some(),
                };
                let read = match body {
                    Some(body) => {
                        self.server.reading = None;
                        self.read(message, body, &mut cut).map(|()| true)
                    }
                    // What is here of it is gathered, and passed on, or not, when it was read.
                    None => {
                        message.skip(&mut cut);
                        Ok(false)
                    }
                };
                self.spill = spill;
                if !read? {
                    break;
                }
                continue;
            }
            if let Some(repeated) = self.flow.repeatable().filter(|_| !self.muted && !self.hidden) {
                self.server.scanner.run(&mut input, TypeSet::all_but(&[repeated])).map_err(server_frame)?;
            }
            let begin = chunk.len() - input.len();
            if self.shared.is_some() && self.server.scanner.body_left_bytes() == 0 {
                self.answer_here(|write| {
                    cut.skip(begin, begin);
                    cut.insert(write);
                });
            }
            match self.server.scanner.next(&mut input).map_err(server_frame)? {
                None => break,
                Some(Piece::Header(header)) => {
                    header_at = Some(begin);
                    self.server_header(header, begin, &mut cut)?;
                }
                Some(Piece::Body { last, .. }) => {
                    if self.hidden {
                        cut.skip(begin, chunk.len() - input.len());
                        self.hidden = !last;
                    }
                }
            }
        }
        self.is_cut_off = !input.is_empty();
        Ok(cut.end(chunk.len() - input.len()))
    }

    fn server_header(&mut self, header: Header, begin: usize, cut: &mut Cut<'_, '_>) -> Result<(), Fault> {
        let Header { kind, body_bytes } = header;
        // An error is read, and told of then.
        self.answered |= !is_asynchronous(kind) && kind != b'E';
        let is_read = matches!(kind, b'Z' | b'E' | b'N') || kind == b'S' && self.shared.is_some();
        if is_read && body_bytes <= MAX_READ_BYTES {
            self.server.reading = Some(header);
            return Ok(());
        }
        let answer = match kind {
            // Nobody writes a text that long for the last error of a connection.
            b'E' => Ok(Answer::Error { fatal: false }),
            _ => Answer::of(kind, &[]),
        };
        let answer = answer.map_err(|error| Fault::Server(error.to_string()))?;
        let is_own = self.answered(answer)?;
        if is_own || self.muted && !is_asynchronous(kind) {
            cut.skip(begin, begin + HEADER_BYTES);
            self.hidden = body_bytes > 0;
        }
        Ok(())
    }

    /// The server has answered. `true`: what the proxy had asked for itself.
    fn answered(&mut self, answer: Answer) -> Result<bool, Fault> {
        let event = self.flow.answer(answer).map_err(server_fault)?;
        if self.flow.in_doubt() && !self.flow.is_all_the_clients() {
            // Nobody knows where its answers belong.
            return Err(Fault::Server(
                "a COPY failed while requests of the proxy's own stood behind it".to_owned(),
            ));
        }
        match &mut self.shared {
            Some(shared) => shared.answered(event),
            None => Ok(false),
        }
    }

    /// What the proxy answers by itself, as far as it is its turn.
    fn answer_here(&mut self, mut put: impl FnMut(&mut dyn FnMut(&mut BytesMut))) {
        while let Some(owed) = self.flow.take_local() {
            let status = self.flow.status();
            match owed.request {
                Request::Parse => put(&mut build::parse_complete),
                Request::Query => put(&mut |to| shared::deallocated(to, status)),
                _ => put(&mut build::close_complete),
            }
            if let Some(shared) = &mut self.shared {
                shared.confirm(owed.ticket);
            }
        }
    }

    /// Does the server tell of its own end alone? Then the client is told what is true of its work.
    fn says_nothing_of_the_work(&mut self, fatal: &Fields<'_>) -> bool {
        if fatal.get(b'C') != Some(SqlState::ADMIN_SHUTDOWN.as_bytes()) {
            return false;
        }
        let routine = fatal.get(b'R').unwrap_or_default();
        // Whatever was done before, its answer came before this one; so this goes for what had none.
        self.begun_nothing = routine == SECURE_READ && !self.answered;
        self.is_orphaned = ORPHANED.contains(&routine);
        self.expects_shutdown || self.is_orphaned
    }

    /// A message whose contents count.
    fn read(&mut self, message: Message, body: &[u8], cut: &mut Cut<'_, '_>) -> Result<(), Fault> {
        let kind = message.header.kind;
        let wrong = |error: Malformed| Fault::Server(error.to_string());
        if kind == b'N' && !self.muted {
            let ServerMessage::NoticeResponse(fields) = ServerMessage::parse(kind, body).map_err(wrong)?
            else {
                return Err(Fault::Server("a notice that is none".to_owned()));
            };
            if fields.get(b'R') == Some(SYNC_REP_WAIT) {
                // Behind it a server that is told to end says nothing more.
                let is_last = fields.get(b'C') == Some(SqlState::ADMIN_SHUTDOWN.as_bytes());
                message.skip(cut);
                cut.insert(|to| not_confirmed(to, if is_last { Severity::Fatal } else { Severity::Error }));
                self.muted = true;
                self.server_has_ended |= is_last;
                self.server_leaves |= is_last;
                return Ok(());
            }
            // Not localized; all servers of this age send it.
            if self.hides_warnings && fields.get(b'V') == Some(b"WARNING") {
                message.skip(cut);
                return Ok(());
            }
        }
        let answer = Answer::of(kind, body).map_err(wrong)?;
        self.server_leaves |= answer == Answer::Error { fatal: true };
        if answer == (Answer::Error { fatal: true })
            && let ServerMessage::ErrorResponse(fields) = ServerMessage::parse(kind, body).map_err(wrong)?
            && self.says_nothing_of_the_work(&fields)
        {
            message.skip(cut);
            return Ok(());
        }
        if let (b'E' | b'S', Some(shared)) = (kind, &mut self.shared) {
            match ServerMessage::parse(kind, body).map_err(wrong)? {
                ServerMessage::ErrorResponse(fields) => shared.failed(&fields),
                ServerMessage::ParameterStatus { name, value } => shared.note(name, value)?,
                _ => {}
            }
        }
        let is_untouched = self.is_untouched();
        let is_own = self.answered(answer)?;
        self.server_has_ended |= answer == Answer::Error { fatal: true };
        self.answered = !matches!(answer, Answer::Ready(_));
        if let Answer::Ready(status) = answer {
            self.tally.queries += 1;
            self.tally.transactions += u64::from(status == TransactionStatus::Idle);
        }
        if self.server_has_ended || matches!(answer, Answer::Ready(_)) {
            self.muted = false;
        }
        // Another server can do what this one has not begun.
        let is_spared = self.server_has_ended && is_untouched;
        if is_spared || is_own || self.muted && !is_asynchronous(kind) {
            message.skip(cut);
        } else {
            message.keep(body, cut);
        }
        Ok(())
    }
}

impl Default for Session {
    fn default() -> Session {
        Session::new()
    }
}

/// What is left of the answer to one of the requests that make up a COMMIT. `false`: there are no such.
fn answer_to_commit(to: &mut BytesMut, owed: Owed, is_heard: bool) -> bool {
    let Owed { request, origin, .. } = owed;
    let said = match request {
        // It prepares what is missing, unseen.
        Request::Parse | Request::Close if origin == Origin::Proxy => Ok(()),
        Request::Parse => {
            build::parse_complete(to);
            Ok(())
        }
        Request::Bind => {
            build::bind_complete(to);
            Ok(())
        }
        Request::DescribeStatement => {
            let types = if is_heard { Ok(()) } else { build::parameter_description(to, &[]) };
            build::no_data(to);
            types
        }
        Request::DescribePortal => {
            build::no_data(to);
            Ok(())
        }
        Request::Execute => build::command_complete(to, "COMMIT"),
        Request::Query if origin == Origin::Client => {
            let tag = if is_heard { Ok(()) } else { build::command_complete(to, "COMMIT") };
            build::ready_for_query(to, TransactionStatus::Idle);
            tag
        }
        Request::Sync => {
            build::ready_for_query(to, TransactionStatus::Idle);
            Ok(())
        }
        _ => return false,
    };
    said.is_ok()
}

fn is_asynchronous(kind: u8) -> bool {
    matches!(kind, b'S' | b'N' | b'A')
}

/// What PostgreSQL says of a statement that was canceled.
pub(crate) const CANCELED: &str = "canceling statement due to user request";

fn not_confirmed(to: &mut BytesMut, severity: Severity) {
    let report = Report {
        severity,
        sqlstate: SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
        message: "the commit was not confirmed by the standbys",
        detail: Some(
            "The wait for synchronous replication was canceled. The transaction has committed on this server, and is lost if another one takes over now.",
        ),
        hint: Some("See whether it is there before you repeat it."),
    };
    build::error_response(to, &report);
}

fn client_frame(error: FrameError) -> Fault {
    Fault::Client { sqlstate: error.sqlstate(), message: error.to_string() }
}

fn client_fault(breach: Breach) -> Fault {
    Fault::Client { sqlstate: breach.sqlstate(), message: breach.to_string() }
}

fn malformed(error: Malformed) -> Fault {
    Fault::Client { sqlstate: error.sqlstate(), message: error.to_string() }
}

fn server_frame(error: FrameError) -> Fault {
    Fault::Server(error.to_string())
}

fn server_fault(breach: Breach) -> Fault {
    Fault::Server(breach.to_string())
}

#[cfg(test)]
mod tests;
