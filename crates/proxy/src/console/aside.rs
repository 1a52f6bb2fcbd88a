//! `show pool_nodes` in an ordinary session, as users of Pgpool-II type it.
//!
//! Between two statements, what a client sends next is looked at: if it is one of these, by the simple protocol or by the
//! extended one, it is answered here, and PostgreSQL hears nothing of it. Most clients never say so, and for them a byte or two
//! of each message are compared.
//!
//! Hazard: an answer that comes before one that the server still owes. So it is only looked at when nothing is outstanding,
//! and once a Parse was taken, everything up to its Sync is.

use std::sync::Arc;

use bytes::BytesMut;
use pgherd_pgwire::frame::HEADER_BYTES;
use pgherd_pgwire::message::TransactionStatus;
use pgherd_pgwire::message::client::bind_names;

use super::command::{self, Command, Refused, Show};
use super::{Console, Step, shown};
use crate::session::Fault;
use crate::world::World;

const PREFIX: &[u8] = b"show pool_";
/// A text that may be meant is not longer.
const MAX_TEXT_BYTES: usize = 256;

/// What is asked of the proxy by one client in passing.
pub(crate) struct Aside {
    world: Arc<World>,
    /// Once something was asked.
    conversation: Option<Box<Conversation>>,
}

struct Conversation {
    console: Console,
    /// Up to the next Sync everything is said to the proxy.
    has_the_word: bool,
}

impl Aside {
    pub(crate) fn new(world: &Arc<World>) -> Aside {
        Aside { world: Arc::clone(world), conversation: None }
    }

    /// The rest of a message was not there yet.
    pub(crate) fn is_in_a_message(&self) -> bool {
        self.conversation.as_ref().is_some_and(|conversation| conversation.console.reading.is_some())
    }

    /// How much of `unread` was answered, since it was meant for the proxy. `status`: that of the session, in which nothing is
    /// outstanding. `unread` begins with a message, unless the beginning of one was taken before.
    pub(crate) fn answer(
        &mut self,
        unread: &[u8],
        status: TransactionStatus,
        answers: &mut BytesMut,
    ) -> Result<Option<usize>, Fault> {
        if !self.is_meant(unread) {
            if let Some(conversation) = &mut self.conversation {
                // From now on the unnamed one may be PostgreSQL's.
                conversation.console.statements.remove(&b""[..]);
            }
            return Ok(None);
        }
        let conversation = self.conversation.get_or_insert_with(|| {
            let console = Console::reading(read, false);
            Box::new(Conversation { console, has_the_word: false })
        });
        let mut input = unread;
        while conversation.message(&mut input, status, &self.world, answers)? && conversation.has_the_word {}
        if !conversation.has_the_word && conversation.console.statements.is_empty() {
            // It may never ask again.
            self.conversation = None;
        }
        let taken = unread.len() - input.len();
        Ok((taken > 0).then_some(taken))
    }

    fn is_meant(&self, unread: &[u8]) -> bool {
        let Some(kind) = unread.first() else { return false };
        if let Some(conversation) = &self.conversation
            && conversation.is_meant(*kind, unread)
        {
            return true;
        }
        let body = || unread.get(HEADER_BYTES..).unwrap_or_default();
        let is_asked = match kind {
            b'Q' => begins(body()),
            // Behind the statement's name.
            b'P' => {
                let name_end = body().iter().take(MAX_TEXT_BYTES).position(|byte| *byte == 0);
                name_end.is_some_and(|end| begins(&body()[end + 1..]))
            }
            _ => false,
        };
        is_asked && whole(unread).is_some_and(|body| body.len() <= MAX_TEXT_BYTES)
    }
}

impl Conversation {
    /// Of somebody who has asked before.
    fn is_meant(&self, kind: u8, unread: &[u8]) -> bool {
        if self.has_the_word {
            return true;
        }
        let Some(body) = whole(unread) else { return false };
        match kind {
            b'B' => {
                bind_names(body).is_some_and(|names| self.console.statements.contains_key(names.statement))
            }
            b'D' | b'C' if body.first() == Some(&b'S') => {
                let name = &body[1..];
                self.console.statements.contains_key(name.strip_suffix(b"\0").unwrap_or(name))
            }
            _ => false,
        }
    }

    /// Answers one message. `false`: it is not all there, or not meant for the proxy.
    fn message(
        &mut self,
        input: &mut &[u8],
        status: TransactionStatus,
        world: &World,
        answers: &mut BytesMut,
    ) -> Result<bool, Fault> {
        let fault = |(sqlstate, message)| Fault::Client { sqlstate, message };
        let kind = match self.console.reading {
            Some(header) => header.kind,
            // Whoever leaves leaves the session.
            None if input.first() == Some(&b'X') => {
                self.has_the_word = false;
                return Ok(false);
            }
            None => match input.first() {
                Some(kind) => *kind,
                None => return Ok(false),
            },
        };
        self.console.status = status;
        let step = self.console.message(input, answers).map_err(fault)?;
        let Some(step) = step else {
            self.has_the_word = true;
            return Ok(false);
        };
        if let Step::Perform(command) = step {
            self.perform(&command, world, answers);
        }
        while let Some(command) = self.console.next_command(answers) {
            self.perform(&command, world, answers);
        }
        self.has_the_word = !matches!(kind, b'Q' | b'S');
        Ok(true)
    }

    fn perform(&mut self, command: &Command, world: &World, answers: &mut BytesMut) {
        let table = match command {
            Command::Show(show) => shown::table(*show, &world.see()),
            _ => None,
        };
        let outcome = table.map(Into::into).ok_or_else(|| Refused::new(b"0A000", "it is not shown here"));
        self.console.performed(command, outcome, answers);
    }
}

/// The body of the first message, if it is all there.
fn whole(unread: &[u8]) -> Option<&[u8]> {
    let ([_, length @ ..], rest) = unread.split_first_chunk::<HEADER_BYTES>()?;
    rest.get(..u32::from_be_bytes(*length).checked_sub(4)? as usize)
}

fn begins(text: &[u8]) -> bool {
    matches!(text.first(), Some(b's' | b'S'))
        && text.get(..PREFIX.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(PREFIX))
}

/// What anybody may see; the others name users and databases, and are in the console.
fn read(text: &str) -> Result<Command, Refused> {
    match command::parse(text)? {
        command @ Command::Show(
            Show::PoolNodes | Show::PoolVersion | Show::PoolBackendStats | Show::PoolHealthCheckStats,
        ) => Ok(command),
        Command::Show(show @ (Show::PoolPools | Show::PoolProcesses | Show::PoolStatus)) => {
            Err(Refused::new(b"42501", format!("permission denied for SHOW {}", show.word().to_uppercase()))
                .hint("It is shown in the console: connect to the database pgbouncer."))
        }
        _ => Err(Refused::new(b"0A000", "nothing else is answered in the same pipeline")
            .hint("Send it after the next Sync.")),
    }
}
