//! Writes messages: appends them, whole, to a buffer.
//!
//! Everything that a proxy says by itself, as a server to its clients and as a client to its servers; the
//! other messages are passed on as they came. Leaves out when to say it.
//!
//! Hazard: a zero inside a text would end it early and make the rest a message of its own, so a text with a
//! zero is refused, and an error text, which must come out whatever is in it, gets a `?` there.

use bytes::{BufMut, BytesMut};

use super::{Format, Key, Target, TransactionStatus};
use crate::SqlState;
use crate::frame::{LARGE_MESSAGE_BYTES, SMALL_MESSAGE_BYTES};
use crate::startup::{CANCEL_REQUEST, GSS_ENC_REQUEST, MAX_PACKET_BYTES, SSL_REQUEST, Version};

/// A message that cannot be written; the buffer is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsendable {
    #[error("a text for {message} contains a zero byte")]
    Zero { message: &'static str },
    #[error("{message} would be too long")]
    TooLong { message: &'static str },
}

/// A message under construction. Everything is written first and judged at the end, so that nothing is left
/// of it if it cannot be sent.
struct Draft<'a> {
    to: &'a mut BytesMut,
    message: &'static str,
    begin: usize,
    max_bytes: usize,
    wrong: Option<Unsendable>,
}

impl<'a> Draft<'a> {
    fn new(to: &'a mut BytesMut, kind: u8, message: &'static str) -> Draft<'a> {
        to.put_u8(kind);
        Draft::packet(to, message, LARGE_MESSAGE_BYTES as usize)
    }

    /// Of a type that a server reads only if it is short.
    fn small(to: &'a mut BytesMut, kind: u8, message: &'static str) -> Draft<'a> {
        to.put_u8(kind);
        Draft::packet(to, message, SMALL_MESSAGE_BYTES as usize)
    }

    /// Without a type byte.
    fn packet(to: &'a mut BytesMut, message: &'static str, max_bytes: usize) -> Draft<'a> {
        let begin = to.len();
        to.put_u32(0);
        Draft { to, message, begin, max_bytes, wrong: None }
    }

    fn u8(mut self, value: u8) -> Self {
        self.room(1).put_u8(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.room(2).put_u16(value);
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.room(4).put_u32(value);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.room(bytes.len());
        if !matches!(self.wrong, Some(Unsendable::TooLong { .. })) {
            self.to.put_slice(bytes);
        }
        self
    }

    fn text(mut self, text: &[u8]) -> Self {
        if text.contains(&0) {
            self.wrong.get_or_insert(Unsendable::Zero { message: self.message });
        }
        self.bytes(text).u8(0)
    }

    fn value(self, value: Option<&[u8]>) -> Self {
        match value {
            None => self.u32(u32::MAX),
            // A length that does not fit is also too long a message, which `bytes` notes.
            Some(bytes) => self.u32(u32::try_from(bytes.len()).unwrap_or(0)).bytes(bytes),
        }
    }

    fn count(mut self, count: usize) -> Self {
        if count > usize::from(u16::MAX) {
            self.wrong.get_or_insert(Unsendable::TooLong { message: self.message });
        }
        self.u16(count as u16)
    }

    fn formats(self, formats: &[Format]) -> Self {
        let counted = self.count(formats.len());
        formats.iter().fold(counted, |draft, format| draft.u16(u16::from(*format == Format::Binary)))
    }

    /// No table, no type modifier, format text.
    fn column(self, column: &ColumnOut<'_>) -> Self {
        let typed = self.text(column.name.as_bytes()).u32(0).u16(0).u32(column.type_oid);
        typed.u16(column.type_bytes as u16).u32(u32::MAX).u16(0)
    }

    fn room(&mut self, bytes: usize) -> &mut BytesMut {
        if self.to.len() - self.begin + bytes > self.max_bytes {
            self.wrong = Some(Unsendable::TooLong { message: self.message });
        }
        self.to
    }

    /// Puts the length where it belongs, or takes everything back. `type_bytes` stand in front of the length.
    fn finish(self, type_bytes: usize) -> Result<(), Unsendable> {
        if let Some(wrong) = self.wrong {
            self.to.truncate(self.begin - type_bytes);
            return Err(wrong);
        }
        let length = (self.to.len() - self.begin) as u32;
        self.to[self.begin..self.begin + 4].copy_from_slice(&length.to_be_bytes());
        Ok(())
    }

    fn end(self) -> Result<(), Unsendable> {
        self.finish(1)
    }

    fn end_packet(self) -> Result<(), Unsendable> {
        self.finish(0)
    }
}

fn fixed(to: &mut BytesMut, kind: u8, body: &[u8]) {
    to.put_u8(kind);
    to.put_u32(4 + body.len() as u32);
    to.put_slice(body);
}

/// How bad it is, as the `S` and `V` fields say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    Error,
    Fatal,
    Warning,
    Notice,
}

impl Severity {
    fn word(self) -> &'static str {
        match self {
            Severity::Error => "ERROR",
            Severity::Fatal => "FATAL",
            Severity::Warning => "WARNING",
            Severity::Notice => "NOTICE",
        }
    }
}

/// What an ErrorResponse or NoticeResponse reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report<'a> {
    pub severity: Severity,
    pub sqlstate: SqlState,
    pub message: &'a str,
    pub detail: Option<&'a str>,
    pub hint: Option<&'a str>,
}

impl Report<'_> {
    /// Longer texts are cut: what a peer sent may be part of one.
    pub const MAX_TEXT_BYTES: usize = 8_000;

    fn write(&self, to: &mut BytesMut, kind: u8) {
        to.put_u8(kind);
        let begin = to.len();
        to.put_u32(0);
        let mut field = |code: u8, text: &str| {
            to.put_u8(code);
            let mut length = text.len().min(Report::MAX_TEXT_BYTES);
            while !text.is_char_boundary(length) {
                length -= 1;
            }
            to.extend(text[..length].bytes().map(|byte| if byte == 0 { b'?' } else { byte }));
            to.put_u8(0);
        };
        field(b'S', self.severity.word());
        field(b'V', self.severity.word());
        field(b'C', &self.sqlstate.to_string());
        field(b'M', self.message);
        for (code, text) in [(b'D', self.detail), (b'H', self.hint)] {
            if let Some(text) = text {
                field(code, text);
            }
        }
        to.put_u8(0);
        let length = (to.len() - begin) as u32;
        to[begin..begin + 4].copy_from_slice(&length.to_be_bytes());
    }
}

// What a server says.

pub fn error_response(to: &mut BytesMut, report: &Report<'_>) {
    report.write(to, b'E');
}

pub fn notice_response(to: &mut BytesMut, report: &Report<'_>) {
    report.write(to, b'N');
}

pub fn authentication_ok(to: &mut BytesMut) {
    fixed(to, b'R', &[0, 0, 0, 0]);
}

pub fn authentication_cleartext_password(to: &mut BytesMut) {
    fixed(to, b'R', &[0, 0, 0, 3]);
}

pub fn authentication_md5_password(to: &mut BytesMut, salt: [u8; 4]) {
    let [a, b, c, d] = salt;
    fixed(to, b'R', &[0, 0, 0, 5, a, b, c, d]);
}

/// AuthenticationSASL with mechanisms in the order of preference; none of them empty, because that ends the
/// list.
pub fn authentication_sasl(to: &mut BytesMut, mechanisms: &[&str]) -> Result<(), Unsendable> {
    let draft = Draft::new(to, b'R', "AuthenticationSASL").u32(10);
    let named = mechanisms.iter().filter(|name| !name.is_empty());
    named.fold(draft, |draft, name| draft.text(name.as_bytes())).u8(0).end()
}

pub fn authentication_sasl_continue(to: &mut BytesMut, data: &[u8]) -> Result<(), Unsendable> {
    Draft::new(to, b'R', "AuthenticationSASLContinue").u32(11).bytes(data).end()
}

pub fn authentication_sasl_final(to: &mut BytesMut, data: &[u8]) -> Result<(), Unsendable> {
    Draft::new(to, b'R', "AuthenticationSASLFinal").u32(12).bytes(data).end()
}

/// NegotiateProtocolVersion: what is spoken, and which protocol options are unknown.
pub fn negotiate_protocol_version<'b>(
    to: &mut BytesMut,
    version: Version,
    unknown_options: impl Iterator<Item = &'b [u8]> + Clone,
) -> Result<(), Unsendable> {
    let draft = Draft::new(to, b'v', "NegotiateProtocolVersion").u32(version.0);
    let draft = draft.u32(unknown_options.clone().count() as u32);
    unknown_options.fold(draft, |draft, name| draft.text(name)).end()
}

/// Four bytes of key for a client that speaks 3.0.
pub fn backend_key_data(to: &mut BytesMut, pid: u32, key: Key<'_>) {
    to.put_u8(b'K');
    to.put_u32(8 + key.as_bytes().len() as u32);
    to.put_u32(pid);
    to.put_slice(key.as_bytes());
}

pub fn parameter_status(to: &mut BytesMut, name: &[u8], value: &[u8]) -> Result<(), Unsendable> {
    Draft::new(to, b'S', "ParameterStatus").text(name).text(value).end()
}

pub fn ready_for_query(to: &mut BytesMut, status: TransactionStatus) {
    fixed(to, b'Z', &[status.to_byte()]);
}

pub fn command_complete(to: &mut BytesMut, tag: &str) -> Result<(), Unsendable> {
    Draft::new(to, b'C', "CommandComplete").text(tag.as_bytes()).end()
}

pub fn empty_query_response(to: &mut BytesMut) {
    fixed(to, b'I', &[]);
}

pub fn parse_complete(to: &mut BytesMut) {
    fixed(to, b'1', &[]);
}

pub fn bind_complete(to: &mut BytesMut) {
    fixed(to, b'2', &[]);
}

pub fn close_complete(to: &mut BytesMut) {
    fixed(to, b'3', &[]);
}

pub fn no_data(to: &mut BytesMut) {
    fixed(to, b'n', &[]);
}

/// ParameterDescription.
pub fn parameter_description(to: &mut BytesMut, types: &[u32]) -> Result<(), Unsendable> {
    let draft = Draft::new(to, b't', "ParameterDescription").count(types.len());
    types.iter().fold(draft, |draft, oid| draft.u32(*oid)).end()
}

/// A column of a table that the proxy makes up, such as those of its console: no table, text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnOut<'a> {
    pub name: &'a str,
    pub type_oid: u32,
    /// As `pg_type.typlen`: -1 if it varies.
    pub type_bytes: i16,
}

pub fn row_description(to: &mut BytesMut, columns: &[ColumnOut<'_>]) -> Result<(), Unsendable> {
    let draft = Draft::new(to, b'T', "RowDescription").count(columns.len());
    columns.iter().fold(draft, Draft::column).end()
}

pub fn data_row(to: &mut BytesMut, values: &[Option<&[u8]>]) -> Result<(), Unsendable> {
    let draft = Draft::new(to, b'D', "DataRow").count(values.len());
    values.iter().fold(draft, |draft, value| draft.value(*value)).end()
}

// What a client says.

/// StartupMessage; `parameters` must have a `user`.
pub fn startup_message(
    to: &mut BytesMut,
    version: Version,
    parameters: &[(&[u8], &[u8])],
) -> Result<(), Unsendable> {
    let draft = Draft::packet(to, "StartupMessage", MAX_PACKET_BYTES + 4).u32(version.0);
    // An empty name would end the list and leave the rest hanging.
    let named = parameters.iter().filter(|(name, _)| !name.is_empty());
    named.fold(draft, |draft, (name, value)| draft.text(name).text(value)).u8(0).end_packet()
}

pub fn ssl_request(to: &mut BytesMut) {
    to.put_u32(8);
    to.put_u32(SSL_REQUEST);
}

pub fn gss_enc_request(to: &mut BytesMut) {
    to.put_u32(8);
    to.put_u32(GSS_ENC_REQUEST);
}

pub fn cancel_request(to: &mut BytesMut, pid: u32, key: Key<'_>) {
    to.put_u32(12 + key.as_bytes().len() as u32);
    to.put_u32(CANCEL_REQUEST);
    to.put_u32(pid);
    to.put_slice(key.as_bytes());
}

/// PasswordMessage.
pub fn password(to: &mut BytesMut, password: &[u8]) -> Result<(), Unsendable> {
    Draft::new(to, b'p', "PasswordMessage").text(password).end()
}

pub fn sasl_initial_response(
    to: &mut BytesMut,
    mechanism: &str,
    response: Option<&[u8]>,
) -> Result<(), Unsendable> {
    Draft::new(to, b'p', "SASLInitialResponse").text(mechanism.as_bytes()).value(response).end()
}

pub fn sasl_response(to: &mut BytesMut, data: &[u8]) -> Result<(), Unsendable> {
    Draft::new(to, b'p', "SASLResponse").bytes(data).end()
}

pub fn query(to: &mut BytesMut, text: &[u8]) -> Result<(), Unsendable> {
    Draft::new(to, b'Q', "Query").text(text).end()
}

pub fn parse(to: &mut BytesMut, name: &[u8], text: &[u8], types: &[u32]) -> Result<(), Unsendable> {
    let draft = Draft::new(to, b'P', "Parse").text(name).text(text).count(types.len());
    types.iter().fold(draft, |draft, oid| draft.u32(*oid)).end()
}

/// What a Bind is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct BindOut<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
    pub formats: &'a [Format],
    pub values: &'a [Option<&'a [u8]>],
    pub result_formats: &'a [Format],
}

pub fn bind(to: &mut BytesMut, bind: &BindOut<'_>) -> Result<(), Unsendable> {
    let draft = Draft::new(to, b'B', "Bind").text(bind.portal).text(bind.statement).formats(bind.formats);
    let counted = draft.count(bind.values.len());
    bind.values.iter().fold(counted, |draft, value| draft.value(*value)).formats(bind.result_formats).end()
}

pub fn describe(to: &mut BytesMut, target: Target, name: &[u8]) -> Result<(), Unsendable> {
    Draft::small(to, b'D', "Describe").u8(target_byte(target)).text(name).end()
}

/// `max_rows` 0 for all rows.
pub fn execute(to: &mut BytesMut, portal: &[u8], max_rows: u32) -> Result<(), Unsendable> {
    Draft::small(to, b'E', "Execute").text(portal).u32(max_rows).end()
}

pub fn close(to: &mut BytesMut, target: Target, name: &[u8]) -> Result<(), Unsendable> {
    Draft::small(to, b'C', "Close").u8(target_byte(target)).text(name).end()
}

fn target_byte(target: Target) -> u8 {
    match target {
        Target::Statement => b'S',
        Target::Portal => b'P',
    }
}

pub fn sync(to: &mut BytesMut) {
    fixed(to, b'S', &[]);
}

pub fn flush(to: &mut BytesMut) {
    fixed(to, b'H', &[]);
}

/// CopyData, of either side.
pub fn copy_data(to: &mut BytesMut, data: &[u8]) -> Result<(), Unsendable> {
    Draft::new(to, b'd', "CopyData").bytes(data).end()
}

/// CopyDone, of either side.
pub fn copy_done(to: &mut BytesMut) {
    fixed(to, b'c', &[]);
}

pub fn copy_fail(to: &mut BytesMut, reason: &[u8]) -> Result<(), Unsendable> {
    Draft::small(to, b'f', "CopyFail").text(reason).end()
}

pub fn terminate(to: &mut BytesMut) {
    fixed(to, b'X', &[]);
}
