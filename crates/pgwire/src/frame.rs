//! Where messages begin and end in a stream of bytes, in either direction.
//!
//! A [`Scanner`] reads the five bytes in front of each message, refuses what PostgreSQL would refuse, and
//! counts the body off in whatever parts it arrives. It holds no bytes: what it hands out is borrowed from
//! the caller's buffer, so a message of a gigabyte costs what a message of ten bytes costs. Leaves out the
//! packets that open a connection, which have no type byte ([`crate::startup`]), and what bodies mean
//! ([`crate::message`]).
//!
//! Hazard: a length believed wrongly makes data look like messages. After the first error a scanner repeats
//! it for ever, so that nobody goes on reading at a place where no message begins.

use std::fmt;

use crate::SqlState;

/// Type byte and length.
pub const HEADER_BYTES: usize = 5;
/// Greatest length of a large message: PostgreSQL's `PQ_LARGE_MESSAGE_LIMIT`, one less than `MaxAllocSize`.
pub const LARGE_MESSAGE_BYTES: u32 = 0x3fff_fffe;
/// Greatest length of what a client has no reason to send long: `PQ_SMALL_MESSAGE_LIMIT` in `libpq.h`.
pub const SMALL_MESSAGE_BYTES: u32 = 10_000;
/// Greatest length while a client proves who it is: `PG_MAX_AUTH_TOKEN_LENGTH` in `auth.h`.
pub const AUTHENTICATION_MESSAGE_BYTES: u32 = 65_535;
/// Greatest length of what a server has no reason to send long: the limit of `pqParseInput3` in
/// `fe-protocol3.c`.
pub const SMALL_ANSWER_BYTES: u32 = 30_000;
/// Greatest length of an Authentication message: the limit of `PQconnectPoll` in `fe-connect.c`.
pub const AUTHENTICATION_REQUEST_BYTES: u32 = 2_000;
/// Type, number and object identifiers of 65535 parameters.
const PARAMETER_DESCRIPTION_BYTES: u32 = 4 + 2 + 4 * 65_535;

/// Who sends the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Client => "client",
            Side::Server => "server",
        })
    }
}

/// What the connection is busy with after its startup packet; it decides which types are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Until AuthenticationOk. A client sends nothing but answers of type `p`.
    Authentication,
    /// From AuthenticationOk to the first ReadyForQuery.
    Starting,
    Session,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Authentication => "during authentication",
            Phase::Starting => "before the first ReadyForQuery",
            Phase::Session => "in a session",
        })
    }
}

/// A stream that is not a stream of messages any more; the connection it came from must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("invalid {side} message type {kind:#04x} {phase}")]
    UnexpectedType { side: Side, phase: Phase, kind: u8 },
    #[error("invalid length {length} of {side} message type {kind:#04x}")]
    Length { side: Side, kind: u8, length: u32 },
    /// Legal, but more than the caller set aside for looking inside.
    #[error("a body of {body_bytes} bytes does not fit into {max_bytes}")]
    TooLargeToHold { body_bytes: u32, max_bytes: usize },
}

impl FrameError {
    /// What PostgreSQL reports for it.
    pub fn sqlstate(&self) -> SqlState {
        match self {
            FrameError::UnexpectedType { .. } | FrameError::Length { .. } => SqlState::PROTOCOL_VIOLATION,
            FrameError::TooLargeToHold { .. } => SqlState::PROGRAM_LIMIT_EXCEEDED,
        }
    }
}

/// The least and the greatest value of the length field, which counts itself; `None` if the type is not
/// allowed. Types and limits are those of `SocketBackend` in `postgres.c` for clients, of `pqParseInput3` for
/// servers.
const fn length_bounds(side: Side, phase: Phase, kind: u8) -> Option<(u32, u32)> {
    let bounds = match (side, phase, kind) {
        (Side::Client, Phase::Authentication, b'p') => (4, AUTHENTICATION_MESSAGE_BYTES),
        (Side::Client, Phase::Authentication, _) => return None,
        // A client that does not wait for ReadyForQuery is not wrong: PostgreSQL reads it when it gets there.
        (Side::Client, _, kind) => match kind {
            b'Q' | b'P' | b'B' | b'F' | b'd' => (4, LARGE_MESSAGE_BYTES),
            b'C' | b'D' | b'E' | b'c' | b'f' | b'X' => (4, SMALL_MESSAGE_BYTES),
            // A Sync with a body would be answered by an error instead of what everybody counts on.
            b'S' | b'H' => (4, 4),
            _ => return None,
        },
        (Side::Server, Phase::Authentication, kind) => match kind {
            b'R' => (8, AUTHENTICATION_REQUEST_BYTES),
            b'E' | b'v' => (5, SMALL_ANSWER_BYTES),
            _ => return None,
        },
        (Side::Server, Phase::Starting, kind) => match kind {
            b'K' => (12, 4 + 4 + 256),
            b'S' => (6, SMALL_ANSWER_BYTES),
            b'E' | b'N' | b'A' => (5, LARGE_MESSAGE_BYTES),
            b'Z' => (5, 5),
            _ => return None,
        },
        (Side::Server, Phase::Session, kind) => match kind {
            b'T' | b'D' | b'd' | b'V' | b'E' | b'N' | b'A' => (4, LARGE_MESSAGE_BYTES),
            b't' => (6, PARAMETER_DESCRIPTION_BYTES),
            b'C' | b'S' | b'G' | b'H' | b'W' => (5, SMALL_ANSWER_BYTES),
            b'1' | b'2' | b'3' | b'n' | b's' | b'I' | b'c' => (4, 4),
            b'Z' => (5, 5),
            _ => return None,
        },
    };
    Some(bounds)
}

/// The five bytes in front of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: u8,
    /// Bytes that follow; the length on the wire is four more.
    pub body_bytes: u32,
}

impl Header {
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let [a, b, c, d] = (self.body_bytes + 4).to_be_bytes();
        [self.kind, a, b, c, d]
    }
}

/// What the scanner finds next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A message begins; if its body is empty, it also ends.
    Header(Header),
    /// A part of the body, never empty; `last` if the message ends with it.
    Body { part: &'a [u8], last: bool },
}

/// A set of message types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeSet(u128);

impl TypeSet {
    /// Types are ASCII; a byte above is never a type and is left out.
    pub const fn of(kinds: &[u8]) -> TypeSet {
        let mut bits = 0;
        let mut at = 0;
        while at < kinds.len() {
            if kinds[at] < 128 {
                bits |= 1 << kinds[at];
            }
            at += 1;
        }
        TypeSet(bits)
    }

    pub const fn all_but(kinds: &[u8]) -> TypeSet {
        TypeSet(!TypeSet::of(kinds).0)
    }

    pub const fn contains(self, kind: u8) -> bool {
        kind < 128 && self.0 >> kind & 1 == 1
    }
}

/// Reads one direction of one connection. Bytes that it leaves in the caller's input are the beginning of a
/// header, at most four; they must come first in the next input.
#[derive(Clone, Debug)]
pub struct Scanner {
    side: Side,
    phase: Phase,
    body_left_bytes: u32,
    failed: Option<FrameError>,
}

impl Scanner {
    pub fn new(side: Side, phase: Phase) -> Scanner {
        Scanner { side, phase, body_left_bytes: 0, failed: None }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// From the next header on the types of `phase` are allowed.
    pub fn enter(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// Bytes of the present body that did not come yet; 0 between messages.
    pub fn body_left_bytes(&self) -> u32 {
        self.body_left_bytes
    }

    /// Takes the next piece off the front of `input`; `None` if it needs more bytes.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, FrameError> {
        if let Some(failed) = self.failed {
            return Err(failed);
        }
        if self.body_left_bytes > 0 {
            let part = self.take_body(input);
            let last = self.body_left_bytes == 0;
            return Ok((!part.is_empty()).then_some(Piece::Body { part, last }));
        }
        let Some(header) = self.peek(input)? else { return Ok(None) };
        *input = &input[HEADER_BYTES..];
        self.body_left_bytes = header.body_bytes;
        Ok(Some(Piece::Header(header)))
    }

    /// Takes everything that may be passed on unseen, in one slice: what is left of the present body, then
    /// messages, whole or cut off, up to the first whose type is in `stop`, up to an incomplete header, or up
    /// to an error, which the next call returns.
    pub fn run<'a>(&mut self, input: &mut &'a [u8], stop: TypeSet) -> Result<&'a [u8], FrameError> {
        if let Some(failed) = self.failed {
            return Err(failed);
        }
        let whole = *input;
        self.take_body(input);
        while self.body_left_bytes == 0 {
            match self.peek(input) {
                Ok(Some(header)) if !stop.contains(header.kind) => {
                    *input = &input[HEADER_BYTES..];
                    self.body_left_bytes = header.body_bytes;
                    self.take_body(input);
                }
                Ok(_) => break,
                Err(error) if whole.len() == input.len() => return Err(error),
                Err(_) => {
                    // It is found again where it then stands first.
                    self.failed = None;
                    break;
                }
            }
        }
        Ok(&whole[..whole.len() - input.len()])
    }

    /// Takes the rest of the present body as one slice, for a caller that must look inside; to be called
    /// after the header. Borrowed from `input` if it is all there, else gathered in `spill`; `None` if it
    /// needs more bytes.
    pub fn whole<'input: 'body, 'body>(
        &mut self,
        input: &mut &'input [u8],
        spill: &'body mut Spill,
    ) -> Result<Option<&'body [u8]>, FrameError> {
        if let Some(failed) = self.failed {
            return Err(failed);
        }
        if std::mem::take(&mut spill.complete) {
            spill.bytes.clear();
        }
        let max_bytes = spill.max_bytes;
        if self.body_left_bytes as usize > max_bytes - spill.bytes.len() {
            return Err(self.fail(FrameError::TooLargeToHold { body_bytes: self.body_left_bytes, max_bytes }));
        }
        let part = self.take_body(input);
        if self.body_left_bytes == 0 && spill.bytes.is_empty() {
            return Ok(Some(part));
        }
        spill.bytes.extend_from_slice(part);
        if self.body_left_bytes > 0 {
            return Ok(None);
        }
        spill.complete = true;
        Ok(Some(&spill.bytes))
    }

    fn take_body<'a>(&mut self, input: &mut &'a [u8]) -> &'a [u8] {
        let here = input.len().min(self.body_left_bytes as usize);
        let (part, rest) = input.split_at(here);
        *input = rest;
        self.body_left_bytes -= here as u32;
        part
    }

    /// Checks the header at the front of `input` without taking it. A wrong type is refused by its first
    /// byte: a stranger need not be waited for.
    fn peek(&mut self, input: &[u8]) -> Result<Option<Header>, FrameError> {
        let Scanner { side, phase, .. } = *self;
        let Some(&kind) = input.first() else { return Ok(None) };
        let Some((least, greatest)) = length_bounds(side, phase, kind) else {
            return Err(self.fail(FrameError::UnexpectedType { side, phase, kind }));
        };
        let Some(&[a, b, c, d]) = input[1..].first_chunk() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]);
        if length < least || length > greatest {
            return Err(self.fail(FrameError::Length { side, kind, length }));
        }
        Ok(Some(Header { kind, body_bytes: length - 4 }))
    }

    fn fail(&mut self, error: FrameError) -> FrameError {
        self.failed = Some(error);
        error
    }
}

/// A bounded place for a body that arrives in parts and must be seen whole; reused from message to message.
#[derive(Debug)]
pub struct Spill {
    bytes: Vec<u8>,
    max_bytes: usize,
    complete: bool,
}

impl Spill {
    /// Allocates nothing before the first body that needs it.
    pub fn new(max_bytes: usize) -> Spill {
        Spill { bytes: Vec::new(), max_bytes, complete: false }
    }

    /// What it occupies now.
    pub fn capacity_bytes(&self) -> usize {
        self.bytes.capacity()
    }

    /// Gives the memory back; an idle client should hold none.
    pub fn release(&mut self) {
        self.bytes = Vec::new();
        self.complete = false;
    }
}

#[cfg(test)]
mod tests;
