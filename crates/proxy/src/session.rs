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
//! When a server is lost, [`Session::lost`] says what is true of the work that was on it.
//!
//! Leaves out: sockets, and who gets which server. Hazard: see [`pgherd_pgwire::flow`]; and a farewell that reaches the
//! server ends a connection that was to be lent again.

use bytes::BytesMut;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::flow::{Answer, Breach, Flow, Origin, Request};
use pgherd_pgwire::frame::{FrameError, HEADER_BYTES, Header, Phase, Piece, Scanner, Side, Spill, TypeSet};
use pgherd_pgwire::message::build::{self, Report, Severity};
use pgherd_pgwire::message::{Malformed, ServerMessage, TransactionStatus};

/// A report longer than this is passed on unread. The longest of those that matter has some 300 bytes.
const MAX_READ_BYTES: u32 = 32 * 1024;
/// Reports a canceled wait: `SyncRepWaitForLSN` in `syncrep.c`.
const SYNC_REP_WAIT: &[u8] = b"SyncRepWaitForLSN";

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

/// What is to be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass<'a> {
    /// These bytes of what was received.
    AsItCame(&'a [u8]),
    /// What was appended to `edited`.
    Edited,
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed<'a> {
    pub pass: Pass<'a>,
    /// So many bytes were taken; the others, the beginning of a header, must come first in the next chunk.
    pub taken_bytes: usize,
}

/// What is true of the work that was on a server that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Nothing was under way.
    Nothing,
    /// A transaction was open, and nothing that could have committed it was under way.
    Transaction,
    /// A statement was under way, and nobody knows whether it committed.
    Unknown,
}

impl Lost {
    pub fn sqlstate(self) -> SqlState {
        match self {
            Lost::Nothing => SqlState::ADMIN_SHUTDOWN,
            Lost::Transaction => SqlState::SERIALIZATION_FAILURE,
            Lost::Unknown => SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
        }
    }

    pub fn sentence(self) -> &'static str {
        match self {
            Lost::Nothing => "no statement was under way",
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
    has_left: bool,
    server_has_ended: bool,
    used: bool,
    /// A statement is under way that may commit the open transaction, or cannot be read.
    may_commit: bool,
}

impl Session {
    /// The server has just said ReadyForQuery, idle.
    pub fn new() -> Session {
        Session {
            flow: Flow::new(TransactionStatus::Idle),
            client: Stream { scanner: Scanner::new(Side::Client, Phase::Session), reading: None },
            server: Stream { scanner: Scanner::new(Side::Server, Phase::Session), reading: None },
            spill: Spill::new(MAX_READ_BYTES as usize),
            muted: false,
            hidden: false,
            has_left: false,
            server_has_ended: false,
            used: false,
            may_commit: false,
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

    /// The client has heard whole messages only, so that the proxy can say something in the server's place.
    pub fn can_be_told(&self) -> bool {
        // What is read before it is passed on, or not passed on at all, the client has heard nothing of.
        self.server.reading.is_some() || self.hidden || self.server.scanner.body_left_bytes() == 0
    }

    /// It asked the server for something.
    pub fn used(&self) -> bool {
        self.used
    }

    /// More of what the client sends can be taken. If not: once the server has answered some.
    pub fn has_room(&self) -> bool {
        self.flow.has_room()
    }

    /// The server owes nothing, no transaction is open, and neither side is in the middle of a message.
    pub fn is_clean(&self) -> bool {
        let between = |stream: &Stream| stream.scanner.body_left_bytes() == 0 && stream.reading.is_none();
        self.flow.is_clean() && !self.muted && between(&self.client) && between(&self.server)
    }

    /// No transaction is open and nothing is under way: a moment at which a session can be ended without loss.
    pub fn is_idle(&self) -> bool {
        self.flow.outstanding() == 0 && self.flow.status() == TransactionStatus::Idle
    }

    pub fn lost(&self) -> Lost {
        let under_way = self.flow.outstanding() > 0 || self.client.scanner.body_left_bytes() > 0;
        let open = self.flow.status() != TransactionStatus::Idle;
        match (under_way, open) {
            (false, false) => Lost::Nothing,
            (false, true) => Lost::Transaction,
            (true, true) if !self.may_commit => Lost::Transaction,
            (true, _) => Lost::Unknown,
        }
    }

    /// Bytes from the client, for the server.
    pub fn from_client<'a>(&mut self, chunk: &'a [u8], edited: &mut BytesMut) -> Result<Passed<'a>, Fault> {
        let (mut input, mut cut) = (chunk, Cut::new(chunk, edited));
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
            b'Q' => text.is_none_or(may_commit),
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
        self.flow.request(request, Origin::Client).map(|_| ())
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
                let message =
                    Message { header, begin: header_at.unwrap_or(body_at), end: chunk.len() - input.len() };
                let read = match body {
                    Some(body) => {
                        self.server.reading = None;
                        self.read(message, body, header_at.is_some(), &mut cut).map(|()| true)
                    }
                    // What is here of it is gathered, and passed on, or not, when it was read.
                    None => {
                        cut.skip(message.begin, message.end);
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
        Ok(cut.end(chunk.len() - input.len()))
    }

    fn server_header(&mut self, header: Header, begin: usize, cut: &mut Cut<'_, '_>) -> Result<(), Fault> {
        let Header { kind, body_bytes } = header;
        if matches!(kind, b'Z' | b'E' | b'N') && body_bytes <= MAX_READ_BYTES {
            self.server.reading = Some(header);
            return Ok(());
        }
        let answer = match kind {
            // Nobody writes a text that long for the last error of a connection.
            b'E' => Ok(Answer::Error { fatal: false }),
            _ => Answer::of(kind, &[]),
        };
        self.flow.answer(answer.map_err(|error| Fault::Server(error.to_string()))?).map_err(server_fault)?;
        if self.muted && !is_asynchronous(kind) {
            cut.skip(begin, begin + HEADER_BYTES);
            self.hidden = body_bytes > 0;
        }
        Ok(())
    }

    /// A message whose contents count. `is_here`: all of it is in this chunk.
    fn read(
        &mut self,
        message: Message,
        body: &[u8],
        is_here: bool,
        cut: &mut Cut<'_, '_>,
    ) -> Result<(), Fault> {
        let kind = message.header.kind;
        let wrong = |error: Malformed| Fault::Server(error.to_string());
        if kind == b'N' && !self.muted {
            let ServerMessage::NoticeResponse(fields) = ServerMessage::parse(kind, body).map_err(wrong)?
            else {
                return Err(Fault::Server("a notice that is none".to_owned()));
            };
            if fields.get(b'R') == Some(SYNC_REP_WAIT) {
                cut.skip(message.begin, message.end);
                cut.insert(not_confirmed);
                self.muted = true;
                return Ok(());
            }
        }
        let answer = Answer::of(kind, body).map_err(wrong)?;
        self.flow.answer(answer).map_err(server_fault)?;
        self.server_has_ended |= answer == Answer::Error { fatal: true };
        if self.server_has_ended || matches!(answer, Answer::Ready(_)) {
            self.muted = false;
        }
        if self.muted && !is_asynchronous(kind) {
            cut.skip(message.begin, message.end);
        } else if !is_here {
            cut.skip(message.begin, message.end);
            cut.insert(|to| {
                to.extend_from_slice(&message.header.to_bytes());
                to.extend_from_slice(body);
            });
        }
        Ok(())
    }
}

/// A message, and the part of the chunk that it, or what came of it in this chunk, takes up.
#[derive(Clone, Copy, Debug)]
struct Message {
    header: Header,
    begin: usize,
    end: usize,
}

impl Default for Session {
    fn default() -> Session {
        Session::new()
    }
}

/// Could it end a transaction? Its first word decides; what begins otherwise, or holds several statements, could.
fn may_commit(text: &[u8]) -> bool {
    let text = text.strip_suffix(b"\0").unwrap_or(text).trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text);
    let word = &text[..text.iter().position(|byte| !byte.is_ascii_alphabetic()).unwrap_or(text.len())];
    let ends = [&b"commit"[..], b"end", b"prepare", b"call", b"do"];
    word.is_empty() || text.contains(&b';') || ends.iter().any(|end| word.eq_ignore_ascii_case(end))
}

fn is_asynchronous(kind: u8) -> bool {
    matches!(kind, b'S' | b'N' | b'A')
}

fn not_confirmed(to: &mut BytesMut) {
    let report = Report {
        severity: Severity::Error,
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

/// Takes parts out of a chunk and puts others in. As long as only an end was cut off nothing is copied.
#[derive(Debug)]
struct Cut<'a, 'b> {
    chunk: &'a [u8],
    /// From here on it is kept, up to where it is cut next.
    from: usize,
    edited: &'b mut BytesMut,
    is_edited: bool,
}

impl<'a, 'b> Cut<'a, 'b> {
    fn new(chunk: &'a [u8], edited: &'b mut BytesMut) -> Cut<'a, 'b> {
        Cut { chunk, from: 0, edited, is_edited: false }
    }

    /// Leaves a part out.
    fn skip(&mut self, begin: usize, end: usize) {
        if begin > self.from {
            self.edited.extend_from_slice(&self.chunk[self.from..begin]);
            self.is_edited = true;
        }
        self.from = end;
    }

    /// To be called behind a [`Cut::skip`].
    fn insert(&mut self, write: impl FnOnce(&mut BytesMut)) {
        write(self.edited);
        self.is_edited = true;
    }

    fn end(mut self, taken_bytes: usize) -> Passed<'a> {
        if !self.is_edited {
            let pass = Pass::AsItCame(&self.chunk[self.from.min(taken_bytes)..taken_bytes]);
            return Passed { pass, taken_bytes };
        }
        self.skip(taken_bytes, taken_bytes);
        Passed { pass: Pass::Edited, taken_bytes }
    }
}

#[cfg(test)]
mod tests;
