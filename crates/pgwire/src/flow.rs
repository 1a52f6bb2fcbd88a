//! What a server still owes its client.
//!
//! A [`Flow`] is told every message of a session in both directions, by type, and knows which request each
//! answer belongs to, what the server skips after an error, who speaks in a COPY, and whether the connection
//! is clean: idle, nothing outstanding, fit for somebody else. It follows `PostgresMain` in `postgres.c`,
//! `CopyGetData` in `copyfromparse.c` and the manual's 55.2. Leaves out the contents of messages, and what a
//! clean connection still remembers of its last user: settings, temporary tables, locks.
//!
//! Hazard: one answer taken for another, or one ReadyForQuery too few, and the next client of this server
//! reads what was meant for this one. So an answer that no request explains is a [`Breach`], after which
//! nothing is believed; and where nobody outside the server can know what it read (see [`Flow::in_doubt`]),
//! the connection is never clean again.

use std::collections::VecDeque;

use crate::SqlState;
use crate::message::server::ServerMessage;
use crate::message::{Defect, Malformed, TransactionStatus};

/// Requests that may be outstanding on one connection: some pages of memory, and far more than a driver
/// pipelines. Whoever has no room stops reading from the client until there is.
pub const MAX_OUTSTANDING: usize = 16_384;
/// A queue that grew beyond this is given back when it is empty, so that an idle connection holds little.
const KEPT_OUTSTANDING: usize = 64;

/// What a client sends, as far as answers depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Query,
    Parse,
    Bind,
    DescribeStatement,
    DescribePortal,
    Execute,
    Close,
    Sync,
    Flush,
    FunctionCall,
    CopyData,
    CopyDone,
    CopyFail,
    Terminate,
}

impl Request {
    /// By the type and, for Describe only, the first byte of the body.
    pub fn of(kind: u8, first: Option<u8>) -> Result<Request, Malformed> {
        Ok(match kind {
            b'Q' => Request::Query,
            b'P' => Request::Parse,
            b'B' => Request::Bind,
            b'D' => match first {
                Some(b'S') => Request::DescribeStatement,
                Some(b'P') => Request::DescribePortal,
                _ => return Err(Malformed::value("Describe")),
            },
            b'E' => Request::Execute,
            b'C' => Request::Close,
            b'S' => Request::Sync,
            b'H' => Request::Flush,
            b'F' => Request::FunctionCall,
            b'd' => Request::CopyData,
            b'c' => Request::CopyDone,
            b'f' => Request::CopyFail,
            b'X' => Request::Terminate,
            kind => return Err(Malformed { message: "client", defect: Defect::Type { kind } }),
        })
    }

    /// Part of a batch that ends with Sync.
    fn is_extended(self) -> bool {
        use Request::{Bind, Close, DescribePortal, DescribeStatement, Execute, Parse};
        matches!(self, Parse | Bind | DescribeStatement | DescribePortal | Execute | Close)
    }
}

/// What a server sends, as far as requests are answered by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    ParseComplete,
    BindComplete,
    CloseComplete,
    ParameterDescription,
    RowDescription,
    NoData,
    DataRow,
    CommandComplete,
    EmptyQuery,
    PortalSuspended,
    CopyIn,
    CopyOut,
    CopyBoth,
    CopyData,
    CopyDone,
    FunctionCallResponse,
    Ready(TransactionStatus),
    Error {
        fatal: bool,
    },
    /// ParameterStatus, NoticeResponse, NotificationResponse: may come at any time, answer nothing; manual
    /// 55.2.7.
    Asynchronous,
}

impl Answer {
    /// The body is looked at for ReadyForQuery and ErrorResponse only; see [`Answer::needs_body`].
    pub fn of(kind: u8, body: &[u8]) -> Result<Answer, Malformed> {
        Ok(match kind {
            b'1' => Answer::ParseComplete,
            b'2' => Answer::BindComplete,
            b'3' => Answer::CloseComplete,
            b't' => Answer::ParameterDescription,
            b'T' => Answer::RowDescription,
            b'n' => Answer::NoData,
            b'D' => Answer::DataRow,
            b'C' => Answer::CommandComplete,
            b'I' => Answer::EmptyQuery,
            b's' => Answer::PortalSuspended,
            b'G' => Answer::CopyIn,
            b'H' => Answer::CopyOut,
            b'W' => Answer::CopyBoth,
            b'd' => Answer::CopyData,
            b'c' => Answer::CopyDone,
            b'V' => Answer::FunctionCallResponse,
            b'S' | b'N' | b'A' => Answer::Asynchronous,
            b'Z' | b'E' => match ServerMessage::parse(kind, body)? {
                ServerMessage::ReadyForQuery(status) => Answer::Ready(status),
                ServerMessage::ErrorResponse(fields) => Answer::Error { fatal: fields.is_fatal() },
                _ => return Err(Malformed::value("server")),
            },
            kind => return Err(Malformed { message: "server", defect: Defect::Type { kind } }),
        })
    }

    pub const fn needs_body(kind: u8) -> bool {
        matches!(kind, b'Z' | b'E')
    }
}

/// Who made a request, and who answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A client, of the server.
    Client,
    /// The proxy, of the server: the answer must not reach the client.
    Proxy,
    /// A client, of the proxy, which keeps it from the server and answers when it is its turn: see
    /// [`Flow::take_local`].
    Local,
}

/// A request that waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owed {
    /// Rises by one with every request that was queued. Of requests with lower tickets than the one being
    /// answered nothing more will be heard: they were answered, or skipped after an error.
    pub ticket: u64,
    pub request: Request,
    pub origin: Origin,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Its answer will name this ticket.
    Queued(u64),
    /// The server does not answer it: Flush, CopyData, Terminate, or the end of a COPY that there is not.
    Silent,
    /// The COPY under way takes it, and if it is a Sync, the server ignores it; manual 55.2.6.
    InCopy,
    /// The server ignores it because of an error, up to the next Sync; manual 55.2.3.
    Skipped,
    /// The server is closing and will not read it.
    Lost,
    /// See [`Flow::in_doubt`].
    Doubtful,
}

/// What an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Belongs to the connection, not to a request.
    Asynchronous,
    /// More of the answer will follow.
    Part(Owed),
    /// The answer is complete.
    Done(Owed),
    /// An error instead of the answer. What follows it in its batch is skipped; a Query, a FunctionCall and a
    /// Sync are still followed by [`Event::Ready`].
    Failed(Owed),
    /// A Query, a FunctionCall or a batch has ended.
    Ready(Owed, TransactionStatus),
    /// The server closes the connection.
    Closing,
    /// See [`Flow::in_doubt`].
    Doubtful,
}

/// A message that must not come now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    #[error("the server sent {answer:?} while answering {request:?}")]
    Unexpected { answer: Answer, request: Request },
    #[error("the server sent {answer:?} that nobody asked for")]
    Unasked { answer: Answer },
    #[error("the server sent {answer:?} after its last message")]
    AfterLast { answer: Answer },
    #[error("the client sent {request:?} after Terminate")]
    AfterTerminate { request: Request },
    #[error("more than {MAX_OUTSTANDING} requests are outstanding")]
    TooMany,
    #[error("the connection has broken the protocol before")]
    Broken,
}

impl Breach {
    pub fn sqlstate(&self) -> SqlState {
        match self {
            Breach::TooMany => SqlState::PROGRAM_LIMIT_EXCEEDED,
            _ => SqlState::PROTOCOL_VIOLATION,
        }
    }
}

/// How far the answer to the present request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Begin,
    /// A statement's parameters are described, its rows are not.
    Described,
    Rows,
    /// A Query has a complete result; another one or ReadyForQuery follows. For a FunctionCall: it has its
    /// value.
    Complete,
    CopyIn {
        input: Input,
        ignored_syncs: bool,
    },
    CopyOut,
    /// The data of an executed COPY is out; its CommandComplete is not.
    CopiedOut,
    CopyBoth {
        client_done: bool,
        server_done: bool,
    },
    /// Only ReadyForQuery can follow.
    Failed,
}

/// What the client has said about the end of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    Open,
    Done,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    /// FATAL came, or the end of a walsender.
    Closing,
    Broken,
}

/// A session from the first ReadyForQuery on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// What is being answered, and how far.
    current: Option<(Owed, At)>,
    /// What comes after it. Never begins with CopyDone or CopyFail while nothing is being answered.
    queue: VecDeque<Owed>,
    next_ticket: u64,
    /// The server ignores everything up to a Sync that the client has yet to send.
    skipping: bool,
    /// The server has begun a batch and not ended it by ReadyForQuery. What is still in the queue is not
    /// counted.
    batch_open: bool,
    terminated: bool,
    in_doubt: bool,
    end: End,
    status: TransactionStatus,
}

impl Flow {
    /// After a ReadyForQuery with this status.
    pub fn new(status: TransactionStatus) -> Flow {
        Flow {
            current: None,
            queue: VecDeque::new(),
            next_ticket: 0,
            skipping: false,
            batch_open: false,
            terminated: false,
            in_doubt: false,
            end: End::Open,
            status,
        }
    }

    /// As of the last ReadyForQuery.
    pub fn status(&self) -> TransactionStatus {
        self.status
    }

    /// Requests whose answers are not complete.
    pub fn outstanding(&self) -> usize {
        self.queue.len() + usize::from(self.current.is_some())
    }

    pub fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// So many more requests can be made.
    pub fn room(&self) -> usize {
        MAX_OUTSTANDING - self.queue.len()
    }

    /// Nothing is outstanding, no transaction and no batch is open, and nobody has left or misbehaved: the
    /// server's next message about a request will be about the next request.
    pub fn is_clean(&self) -> bool {
        self.outstanding() == 0
            && self.status == TransactionStatus::Idle
            && !(self.skipping || self.batch_open || self.terminated || self.in_doubt)
            && self.end == End::Open
    }

    /// A COPY from the client failed after a Sync was sent into it. If the server had read the Sync by then,
    /// it ignored it; if not, it answers it. No message tells which. From here on everything passes unjudged,
    /// and the connection belongs to its client until it is closed.
    pub fn in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// The server ignores everything up to a Sync that the client has yet to send.
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// The request that is next to be answered, if the proxy answers it itself: everything before it is answered.
    /// To be called, until there is none, after each request and each answer.
    pub fn take_local(&mut self) -> Option<Owed> {
        let is_next = self.current.is_none() && self.queue.front()?.origin == Origin::Local;
        let owed = if is_next { self.queue.pop_front() } else { None };
        if owed.is_some() {
            self.finish();
        }
        owed
    }

    /// Were the COPY under way to fail now, the connection would be [`Flow::in_doubt`].
    pub fn may_fall_into_doubt(&self) -> bool {
        matches!(self.current, Some((_, At::CopyIn { ignored_syncs: true, .. })))
    }

    /// What waits for its answer, in order, and whether a part of that has come.
    pub fn owed(&self) -> impl Iterator<Item = (Owed, bool)> {
        let current = self.current.map(|(owed, at)| (owed, at != At::Begin));
        current.into_iter().chain(self.queue.iter().map(|owed| (*owed, false)))
    }

    /// Everything that waits for an answer was asked by the client, of the server.
    pub fn is_all_the_clients(&self) -> bool {
        self.queue.iter().all(|owed| owed.origin == Origin::Client)
    }

    /// The server owes nothing: whatever waits for an answer the proxy answers.
    pub fn is_all_local(&self) -> bool {
        self.current.is_none() && self.queue.iter().all(|owed| owed.origin == Origin::Local)
    }

    /// The client's data goes into a COPY now; its CopyData need not be shown to [`Flow::request`].
    pub fn is_copying_in(&self) -> bool {
        let taking = |at| {
            matches!(at, At::CopyIn { input: Input::Open, .. } | At::CopyBoth { client_done: false, .. })
        };
        // Behind another request, or when it is over, data is nobody's.
        let next = self.queue.is_empty() && !self.terminated && self.end == End::Open;
        next && self.current.is_some_and(|(_, at)| taking(at))
    }

    /// The type of answer that may come now any number of times without changing anything: rows inside a
    /// result, data inside a COPY. Such messages need not be shown to [`Flow::answer`], so that a run of them
    /// is passed on unseen ([`crate::frame::Scanner::run`] with [`crate::frame::TypeSet::all_but`]).
    pub fn repeatable(&self) -> Option<u8> {
        match self.current? {
            _ if self.end != End::Open || self.in_doubt => None,
            (_, At::Rows) => Some(b'D'),
            (_, At::CopyOut | At::CopyBoth { server_done: false, .. }) => Some(b'd'),
            _ => None,
        }
    }

    /// A request goes to the server, in this order.
    pub fn request(&mut self, request: Request, origin: Origin) -> Result<Accepted, Breach> {
        match self.end {
            _ if self.terminated => return Err(Breach::AfterTerminate { request }),
            End::Broken => return Err(Breach::Broken),
            End::Closing => return Ok(Accepted::Lost),
            End::Open => {}
        }
        if request == Request::Terminate {
            self.terminated = true;
            return Ok(Accepted::Silent);
        }
        if self.in_doubt {
            return Ok(Accepted::Doubtful);
        }
        // What was sent in front of it decides whether the COPY gets it.
        if self.queue.is_empty()
            && let Some((_, at)) = &mut self.current
            && Flow::taken_by_copy(at, request)
        {
            return Ok(Accepted::InCopy);
        }
        match request {
            Request::Flush | Request::CopyData => return Ok(Accepted::Silent),
            Request::CopyDone | Request::CopyFail if self.outstanding() == 0 => return Ok(Accepted::Silent),
            Request::Sync => self.skipping = false,
            _ if self.skipping => return Ok(Accepted::Skipped),
            _ => {}
        }
        if !self.has_room() {
            return Err(Breach::TooMany);
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.queue.push_back(Owed { ticket, request, origin });
        Ok(Accepted::Queued(ticket))
    }

    /// Whether the COPY under way takes the client's message instead of the main loop of the server.
    fn taken_by_copy(at: &mut At, request: Request) -> bool {
        match (at, request) {
            (At::CopyIn { input: Input::Open, .. }, Request::CopyData | Request::Flush) => {}
            (At::CopyIn { input: Input::Open, ignored_syncs }, Request::Sync) => *ignored_syncs = true,
            (At::CopyIn { input: input @ Input::Open, .. }, Request::CopyDone) => *input = Input::Done,
            (At::CopyIn { input: input @ Input::Open, .. }, Request::CopyFail) => *input = Input::Failed,
            (At::CopyBoth { client_done: false, .. }, Request::CopyData) => {}
            (at @ At::CopyBoth { .. }, Request::CopyDone) => match *at {
                At::CopyBoth { client_done: false, server_done: true } => *at = At::Begin,
                At::CopyBoth { client_done: false, server_done: false } => {
                    *at = At::CopyBoth { client_done: true, server_done: false };
                }
                _ => return false,
            },
            _ => return false,
        }
        true
    }

    /// A message came from the server, in this order.
    pub fn answer(&mut self, answer: Answer) -> Result<Event, Breach> {
        match self.end {
            End::Open => {}
            End::Closing => return Err(self.breach(Breach::AfterLast { answer })),
            End::Broken => return Err(Breach::Broken),
        }
        match answer {
            Answer::Asynchronous => return Ok(Event::Asynchronous),
            Answer::Error { fatal: true } => {
                self.end = End::Closing;
                return Ok(Event::Closing);
            }
            Answer::Ready(status) if self.in_doubt => {
                self.status = status;
                return Ok(Event::Doubtful);
            }
            _ if self.in_doubt => return Ok(Event::Doubtful),
            _ => {}
        }
        let Some((owed, at)) = self.current.or_else(|| Some((self.queue.pop_front()?, At::Begin))) else {
            return Err(self.breach(Breach::Unasked { answer }));
        };
        let Some(next) = Flow::step(owed.request, at, answer) else {
            return Err(self.breach(Breach::Unexpected { answer, request: owed.request }));
        };
        self.batch_open |= owed.request.is_extended();
        Ok(match next {
            Next::At(at) => {
                self.current = Some((owed, self.entered(at)));
                Event::Part(owed)
            }
            Next::Done => {
                self.finish();
                Event::Done(owed)
            }
            Next::Ready(status) => {
                (self.status, self.batch_open) = (status, false);
                self.finish();
                Event::Ready(owed, status)
            }
            Next::Failed => {
                self.in_doubt = matches!(at, At::CopyIn { ignored_syncs: true, .. });
                if owed.request.is_extended() {
                    self.skip();
                } else {
                    self.current = Some((owed, At::Failed));
                }
                Event::Failed(owed)
            }
            Next::Closing => {
                self.end = End::Closing;
                Event::Closing
            }
        })
    }

    /// The grammar: what may come next in the answer to a request, and where it leads.
    fn step(request: Request, at: At, answer: Answer) -> Option<Next> {
        use Answer::{
            CommandComplete, CopyBoth, CopyIn, CopyOut, DataRow, EmptyQuery, Error, Ready, RowDescription,
        };
        let copy_in = At::CopyIn { input: Input::Open, ignored_syncs: false };
        let copy_both = At::CopyBoth { client_done: false, server_done: false };
        Some(match (request, at, answer) {
            (_, At::Failed, Ready(status)) => Next::Ready(status),
            (_, At::Failed, _) => return None,
            (_, _, Error { .. }) => Next::Failed,

            // The same in both protocols.
            (_, At::CopyOut, Answer::CopyData) => Next::At(at),
            (Request::Execute, At::CopyIn { input: Input::Done, .. }, CommandComplete) => Next::Done,
            (_, At::CopyIn { input: Input::Done, .. }, CommandComplete) => Next::At(At::Complete),

            // Simple query, manual 55.2.2; a walsender's commands too, which follow a COPY by further
            // results. Behind rows as well: a rule that adds a SELECT to a statement adds its rows, without a
            // CommandComplete.
            (Request::Query, At::Begin | At::Complete | At::Rows, RowDescription) => Next::At(At::Rows),
            (Request::Query, At::Begin | At::Complete, CopyIn) => Next::At(copy_in),
            (Request::Query, At::Begin | At::Complete, CopyOut) => Next::At(At::CopyOut),
            (Request::Query, At::Begin | At::Complete, CopyBoth) => Next::At(copy_both),
            (Request::Query, At::Begin | At::Complete | At::Rows, CommandComplete) => Next::At(At::Complete),
            (Request::Query, At::Begin, EmptyQuery) => Next::At(At::Complete),
            (Request::Query, At::Rows, DataRow) => Next::At(At::Rows),
            (Request::Query, At::CopyOut, Answer::CopyDone) => Next::At(At::Begin),
            (Request::Query | Request::FunctionCall, At::Complete, Ready(status)) => Next::Ready(status),

            // Streaming replication, manual 55.4.
            (_, At::CopyBoth { server_done: false, .. }, Answer::CopyData) => Next::At(at),
            (_, At::CopyBoth { client_done, server_done: false }, Answer::CopyDone) => {
                Next::At(if client_done {
                    At::Begin
                } else {
                    At::CopyBoth { client_done, server_done: true }
                })
            }
            // A walsender that shuts down says nothing more: WalSndDone in walsender.c.
            (_, At::CopyBoth { .. }, CommandComplete) => Next::Closing,

            // Extended query, manual 55.2.3.
            (Request::Parse, At::Begin, Answer::ParseComplete) => Next::Done,
            (Request::Bind, At::Begin, Answer::BindComplete) => Next::Done,
            (Request::Close, At::Begin, Answer::CloseComplete) => Next::Done,
            (Request::DescribeStatement, At::Begin, Answer::ParameterDescription) => Next::At(At::Described),
            (Request::DescribeStatement, At::Described, RowDescription | Answer::NoData) => Next::Done,
            (Request::DescribePortal, At::Begin, RowDescription | Answer::NoData) => Next::Done,
            (Request::Execute, At::Begin | At::Rows, DataRow) => Next::At(At::Rows),
            (Request::Execute, At::Begin | At::Rows, CommandComplete | Answer::PortalSuspended) => Next::Done,
            (Request::Execute, At::Begin, EmptyQuery) => Next::Done,
            (Request::Execute, At::Begin, CopyIn) => Next::At(copy_in),
            (Request::Execute, At::Begin, CopyOut) => Next::At(At::CopyOut),
            (Request::Execute, At::CopyOut, Answer::CopyDone) => Next::At(At::CopiedOut),
            (Request::Execute, At::CopiedOut, CommandComplete) => Next::Done,
            (Request::Sync, At::Begin, Ready(status)) => Next::Ready(status),

            // Function call, manual 55.2.5.
            (Request::FunctionCall, At::Begin, Answer::FunctionCallResponse) => Next::At(At::Complete),
            _ => return None,
        })
    }

    /// A COPY that begins takes what the client had sent ahead, as the server reads it in this order.
    fn entered(&mut self, mut at: At) -> At {
        while let Some(owed) = self.queue.front()
            && Flow::taken_by_copy(&mut at, owed.request)
        {
            self.queue.pop_front();
        }
        at
    }

    /// The server reads on to the next Sync and ignores what is before it.
    fn skip(&mut self) {
        while self.queue.front().is_some_and(|owed| owed.request != Request::Sync) {
            self.queue.pop_front();
        }
        self.skipping = self.queue.is_empty();
        self.finish();
    }

    /// The present request is answered. The end of a COPY that failed, or never began, is ignored by the
    /// server.
    fn finish(&mut self) {
        self.current = None;
        let stray = |owed: &Owed| matches!(owed.request, Request::CopyDone | Request::CopyFail);
        while self.queue.front().is_some_and(stray) {
            self.queue.pop_front();
        }
        if self.queue.is_empty() && self.queue.capacity() > KEPT_OUTSTANDING {
            self.queue = VecDeque::new();
        }
    }

    fn breach(&mut self, breach: Breach) -> Breach {
        self.end = End::Broken;
        breach
    }
}

/// Where an answer leads.
#[derive(Clone, Copy, Debug)]
enum Next {
    At(At),
    Done,
    Ready(TransactionStatus),
    Failed,
    Closing,
}

#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
pub(crate) mod tests;
