//! What a connection begins with: requests for encryption, for a cancel, or for a session.
//!
//! An [`Opening`] takes the first bytes of a connection, up to the startup packet, and refuses bytes that
//! came before they could be meant. Leaves out encryption itself, passwords, and what a user may do: until
//! authentication has ended, a parameter is a text and nothing more (CVE-2025-12819).
//!
//! Hazard: everybody who can reach the port gets this far. Bytes that were sent in clear before the handshake
//! and are read after it let a man in the middle speak as the client (CVE-2021-23214) or as the server
//! (CVE-2021-23222).

use crate::SqlState;
use crate::message::cursor::Cursor;
use crate::message::{Key, Malformed};

pub mod options;

/// Greatest startup packet without its length: `MAX_STARTUP_PACKET_LENGTH` in `pqcomm.h`.
pub const MAX_PACKET_BYTES: usize = 10_000;
const LENGTH_BYTES: usize = 4;

pub const CANCEL_REQUEST: u32 = 80_877_102;
pub const SSL_REQUEST: u32 = 80_877_103;
pub const GSS_ENC_REQUEST: u32 = 80_877_104;

/// The first byte of a TLS handshake record. As the first byte of a length it would mean more than 368 MB.
const TLS_HANDSHAKE: u8 = 0x16;

/// A version of the protocol as it stands in a startup packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl Version {
    pub const V3_0: Version = Version(3 << 16);
    pub const V3_2: Version = Version(3 << 16 | 2);

    pub fn major(self) -> u16 {
        (self.0 >> 16) as u16
    }

    pub fn minor(self) -> u16 {
        self.0 as u16
    }

    /// The version that is spoken with who asked for this one. 3.1 was never spoken by anybody, but claimed
    /// by old poolers, so whoever asks for it gets 3.0 (PostgreSQL 18, 54.1).
    pub fn spoken(self) -> Version {
        if self.minor() >= 2 { Version::V3_2 } else { Version::V3_0 }
    }
}

/// A beginning that is none; the connection must be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    #[error("invalid length of startup packet: {length}")]
    Length { length: u32 },
    #[error("unsupported frontend protocol {}.{}", .version.major(), .version.minor())]
    Version { version: Version },
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("no PostgreSQL user name specified in startup packet")]
    NoUser,
    #[error("received unencrypted data after a request for encryption")]
    DataBeforeAnswer,
    #[error("encryption was requested again")]
    RequestedAgain,
    #[error("unexpected answer {byte:#04x} to a request for encryption")]
    Answer { byte: u8 },
    #[error("the opening of this connection has ended")]
    Ended,
}

impl StartupError {
    /// What PostgreSQL reports for it.
    pub fn sqlstate(&self) -> SqlState {
        match self {
            StartupError::Version { .. } => SqlState::FEATURE_NOT_SUPPORTED,
            StartupError::NoUser => SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
            _ => SqlState::PROTOCOL_VIOLATION,
        }
    }
}

/// What a client opens its connection with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// A TLS handshake without SSLRequest, as of PostgreSQL 17. None of its bytes was taken.
    DirectTls,
    Ssl,
    GssEnc,
    Cancel(CancelRequest<'a>),
    Startup(StartupMessage<'a>),
}

/// CancelRequest, manual 55.7; as of 3.2 with a key of up to 256 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CancelRequest<'a> {
    pub pid: u32,
    pub key: Key<'a>,
}

/// How a request for encryption was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// `S` or `G`: what follows is a handshake.
    Granted,
    /// `N`: the connection goes on in clear.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// Nothing may come from the client until it was told yes or no.
    Unanswered(Asked),
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Ssl,
    GssEnc,
}

/// The server's side of the beginning of a connection.
#[derive(Clone, Debug)]
pub struct Opening {
    state: State,
    at_first_byte: bool,
    /// One request of each kind, none once encrypted: so the opening has an end (CVE-2026-6479).
    ssl_done: bool,
    gss_done: bool,
}

impl Default for Opening {
    fn default() -> Opening {
        Opening::new()
    }
}

impl Opening {
    pub fn new() -> Opening {
        Opening { state: State::Open, at_first_byte: true, ssl_done: false, gss_done: false }
    }

    /// Reads one request off the front of `input`, which must hold everything that was received; `None` if it
    /// needs more, at most [`MAX_PACKET_BYTES`] and four. Of what comes behind a request that is to be
    /// answered in clear nothing is read: it is refused.
    pub fn read<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Request<'a>>, StartupError> {
        match self.state {
            State::Open => {}
            State::Unanswered(_) if input.is_empty() => return Ok(None),
            State::Unanswered(_) => return Err(self.end(StartupError::DataBeforeAnswer)),
            State::Ended => return Err(StartupError::Ended),
        }
        if self.at_first_byte && input.first() == Some(&TLS_HANDSHAKE) {
            self.encrypted();
            return Ok(Some(Request::DirectTls));
        }
        let body = match packet(input) {
            Ok(Some(body)) => body,
            Ok(None) => return Ok(None),
            Err(error) => return Err(self.end(error)),
        };
        self.at_first_byte = false;
        let request = match parse(body) {
            Ok(request) => request,
            Err(error) => return Err(self.end(error)),
        };
        let (asked, done) = match request {
            Request::Ssl => (Asked::Ssl, self.ssl_done),
            Request::GssEnc => (Asked::GssEnc, self.gss_done),
            _ => {
                self.state = State::Ended;
                return Ok(Some(request));
            }
        };
        if done {
            return Err(self.end(StartupError::RequestedAgain));
        }
        if !input.is_empty() {
            return Err(self.end(StartupError::DataBeforeAnswer));
        }
        self.state = State::Unanswered(asked);
        Ok(Some(request))
    }

    /// The request for encryption was answered. `unread` is what the socket had received by then, before any
    /// handshake: it was not encrypted, so it must be nothing.
    pub fn answered(&mut self, answer: Answer, unread: &[u8]) -> Result<(), StartupError> {
        let State::Unanswered(asked) = self.state else { return Err(self.end(StartupError::Ended)) };
        if !unread.is_empty() {
            return Err(self.end(StartupError::DataBeforeAnswer));
        }
        match (answer, asked) {
            (Answer::Granted, _) => self.encrypted(),
            (Answer::Refused, Asked::Ssl) => self.ssl_done = true,
            (Answer::Refused, Asked::GssEnc) => self.gss_done = true,
        }
        self.state = State::Open;
        Ok(())
    }

    fn encrypted(&mut self) {
        (self.at_first_byte, self.ssl_done, self.gss_done) = (false, true, true);
    }

    fn end(&mut self, error: StartupError) -> StartupError {
        self.state = State::Ended;
        error
    }
}

/// The client's side: the server's answer to SSLRequest (`granting` is `S`) or GSSENCRequest (`G`), which is
/// one byte. Whatever came behind it was not encrypted and is refused (CVE-2021-23222), and so is the text of
/// an ErrorResponse, because nobody knows whom it is from (CVE-2024-10977).
pub fn encryption_answer(received: &[u8], granting: u8) -> Result<Option<Answer>, StartupError> {
    match received {
        [] => Ok(None),
        [b'N'] => Ok(Some(Answer::Refused)),
        [byte] if *byte == granting => Ok(Some(Answer::Granted)),
        [byte, ..] if *byte == b'N' || *byte == granting => Err(StartupError::DataBeforeAnswer),
        [byte, ..] => Err(StartupError::Answer { byte: *byte }),
    }
}

/// Takes one packet off the front of `input`, without its length.
fn packet<'a>(input: &mut &'a [u8]) -> Result<Option<&'a [u8]>, StartupError> {
    let Some(&head) = input.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
    let length = u32::from_be_bytes(head);
    let body_bytes = (length as usize).wrapping_sub(LENGTH_BYTES);
    // The checks of ProcessStartupPacket in postmaster.c: a version at least.
    if length < 8 || body_bytes > MAX_PACKET_BYTES {
        return Err(StartupError::Length { length });
    }
    let Some(body) = input[LENGTH_BYTES..].get(..body_bytes) else { return Ok(None) };
    *input = &input[LENGTH_BYTES + body_bytes..];
    Ok(Some(body))
}

fn parse(body: &[u8]) -> Result<Request<'_>, StartupError> {
    let mut cursor = Cursor::new("startup packet", body);
    let code = cursor.u32()?;
    match code {
        SSL_REQUEST => cursor.end(Request::Ssl).map_err(Into::into),
        GSS_ENC_REQUEST => cursor.end(Request::GssEnc).map_err(Into::into),
        CANCEL_REQUEST => {
            let pid = cursor.u32()?;
            Ok(Request::Cancel(CancelRequest { pid, key: Key::new(cursor.rest())? }))
        }
        _ if Version(code).major() == 3 => {
            StartupMessage::parse(Version(code), cursor.rest()).map(Request::Startup)
        }
        _ => Err(StartupError::Version { version: Version(code) }),
    }
}

/// StartupMessage, manual 55.7: pairs of names and values, each ended by a zero, and a zero at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartupMessage<'a> {
    pub version: Version,
    pairs: &'a [u8],
}

/// What kind of walsender the client wants, if any; manual 55.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replication {
    Off,
    Physical,
    /// Connected to its database.
    Logical,
}

impl<'a> StartupMessage<'a> {
    fn parse(version: Version, body: &'a [u8]) -> Result<StartupMessage<'a>, StartupError> {
        let mut cursor = Cursor::new("StartupMessage", body);
        // An empty name ends the list (CVE-2026-107349 is a loop that did not).
        while !cursor.text()?.is_empty() {
            cursor.text()?;
        }
        let message = cursor.end(StartupMessage { version, pairs: body })?;
        if message.get(b"user").is_none_or(<[u8]>::is_empty) {
            return Err(StartupError::NoUser);
        }
        message.replication()?;
        Ok(message)
    }

    /// Names and values in their order, protocol options (`_pq_.`) among them.
    pub fn parameters(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let mut cursor = Cursor::new("StartupMessage", self.pairs);
        std::iter::from_fn(move || {
            let name = cursor.text().ok().filter(|name| !name.is_empty())?;
            Some((name, cursor.text().ok()?))
        })
    }

    /// The value of a parameter; of several the last one counts, as for PostgreSQL.
    pub fn get(&self, name: &[u8]) -> Option<&'a [u8]> {
        self.parameters().filter(|(known, _)| *known == name).last().map(|(_, value)| value)
    }

    pub fn user(&self) -> &'a [u8] {
        self.get(b"user").unwrap_or_default()
    }

    /// The user's name if none is given.
    pub fn database(&self) -> &'a [u8] {
        self.get(b"database").filter(|name| !name.is_empty()).unwrap_or_else(|| self.user())
    }

    /// The command-line arguments for the backend; [`options`] reads them.
    pub fn options(&self) -> Option<&'a [u8]> {
        self.get(b"options")
    }

    pub fn application_name(&self) -> Option<&'a [u8]> {
        self.get(b"application_name")
    }

    pub fn replication(&self) -> Result<Replication, Malformed> {
        let Some(value) = self.get(b"replication") else { return Ok(Replication::Off) };
        if value == b"database" {
            return Ok(Replication::Logical);
        }
        match boolean(value) {
            Some(true) => Ok(Replication::Physical),
            Some(false) => Ok(Replication::Off),
            None => Err(Malformed::value("StartupMessage")),
        }
    }

    /// Names of the options of the protocol itself, all of which a server that knows none lists in its
    /// NegotiateProtocolVersion.
    pub fn protocol_options(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.parameters().map(|(name, _)| name).filter(|name| name.starts_with(b"_pq_."))
    }

    /// The client must be told by NegotiateProtocolVersion what is spoken instead of what it asked for.
    pub fn must_negotiate(&self) -> bool {
        self.version != self.version.spoken() || self.protocol_options().next().is_some()
    }
}

/// PostgreSQL's `parse_bool`: any unambiguous beginning of these words, in either case.
fn boolean(value: &[u8]) -> Option<bool> {
    let begins = |word: &str, least: usize| {
        value.len() >= least
            && word.as_bytes().get(..value.len()).is_some_and(|w| w.eq_ignore_ascii_case(value))
    };
    if begins("true", 1) || begins("yes", 1) || begins("on", 2) || value == b"1" {
        return Some(true);
    }
    (begins("false", 1) || begins("no", 1) || begins("off", 2) || value == b"0").then_some(false)
}

#[cfg(test)]
mod tests;
