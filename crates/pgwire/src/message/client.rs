//! Messages that clients send, as views of their bodies; manual 55.7.
//!
//! Leaves out the packets that open a connection ([`crate::startup`]). Hazard: type `p` stands for four
//! different messages that only the state of the authentication tells apart, so each of them has its own
//! function here.

pub use super::cursor::{Formats, Oids, Values};

use super::cursor::Cursor;
use super::{Defect, Malformed, Target};

/// A message of a session. `p` is not among them: see [`password`], [`SaslInitial`] and [`sasl_response`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientMessage<'a> {
    Query { text: &'a [u8] },
    Parse(Parse<'a>),
    Bind(Bind<'a>),
    Describe { target: Target, name: &'a [u8] },
    Execute { portal: &'a [u8], max_rows: u32 },
    Close { target: Target, name: &'a [u8] },
    Sync,
    Flush,
    FunctionCall(FunctionCall<'a>),
    CopyData(&'a [u8]),
    CopyDone,
    CopyFail { reason: &'a [u8] },
    Terminate,
}

impl<'a> ClientMessage<'a> {
    pub fn parse(kind: u8, body: &'a [u8]) -> Result<ClientMessage<'a>, Malformed> {
        let text_only = |message| {
            let mut cursor = Cursor::new(message, body);
            let text = cursor.text()?;
            cursor.end(text)
        };
        let empty = |message, parsed| Cursor::new(message, body).end(parsed);
        match kind {
            b'Q' => Ok(ClientMessage::Query { text: text_only("Query")? }),
            b'P' => Parse::read(body).map(ClientMessage::Parse),
            b'B' => Bind::read(body).map(ClientMessage::Bind),
            b'D' => named("Describe", body).map(|(target, name)| ClientMessage::Describe { target, name }),
            b'E' => {
                let mut cursor = Cursor::new("Execute", body);
                let portal = cursor.text()?;
                // PostgreSQL takes a number of zero or less for no limit.
                let max_rows = u32::try_from(cursor.i32()?).unwrap_or(0);
                cursor.end(ClientMessage::Execute { portal, max_rows })
            }
            b'C' => named("Close", body).map(|(target, name)| ClientMessage::Close { target, name }),
            b'S' => empty("Sync", ClientMessage::Sync),
            b'H' => empty("Flush", ClientMessage::Flush),
            b'F' => FunctionCall::read(body).map(ClientMessage::FunctionCall),
            b'd' => Ok(ClientMessage::CopyData(body)),
            b'c' => empty("CopyDone", ClientMessage::CopyDone),
            b'f' => Ok(ClientMessage::CopyFail { reason: text_only("CopyFail")? }),
            b'X' => empty("Terminate", ClientMessage::Terminate),
            kind => Err(Malformed { message: "client", defect: Defect::Type { kind } }),
        }
    }
}

fn named<'a>(message: &'static str, body: &'a [u8]) -> Result<(Target, &'a [u8]), Malformed> {
    let mut cursor = Cursor::new(message, body);
    let target = match cursor.u8()? {
        b'S' => Target::Statement,
        b'P' => Target::Portal,
        _ => return Err(cursor.wrong(Defect::Value)),
    };
    let name = cursor.text()?;
    cursor.end((target, name))
}

/// Parse: a statement and the types of those parameters that the client cares for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parse<'a> {
    /// Empty for the unnamed statement.
    pub name: &'a [u8],
    pub text: &'a [u8],
    pub types: Oids<'a>,
}

impl<'a> Parse<'a> {
    pub fn read(body: &'a [u8]) -> Result<Parse<'a>, Malformed> {
        let mut cursor = Cursor::new("Parse", body);
        let (name, text) = (cursor.text()?, cursor.text()?);
        let types = cursor.oids()?;
        cursor.end(Parse { name, text, types })
    }
}

/// Bind: values for the parameters of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bind<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
    /// None for text, one for all values, or one for each.
    pub formats: Formats<'a>,
    pub values: Values<'a>,
    pub result_formats: Formats<'a>,
}

impl<'a> Bind<'a> {
    pub fn read(body: &'a [u8]) -> Result<Bind<'a>, Malformed> {
        let mut cursor = Cursor::new("Bind", body);
        let (portal, statement) = (cursor.text()?, cursor.text()?);
        let (formats, values) = (cursor.formats()?, cursor.values()?);
        // As exec_bind_message in postgres.c.
        if formats.count() > 1 && formats.count() != values.count() {
            return Err(cursor.wrong(Defect::Value));
        }
        let result_formats = cursor.formats()?;
        cursor.end(Bind { portal, statement, formats, values, result_formats })
    }
}

/// The two names at the beginning of a Bind, from as much of its body as there is; `None` if they do not end
/// in it. So a Bind of any size can be redirected without holding its values.
pub fn bind_names(beginning: &[u8]) -> Option<BindNames<'_>> {
    let mut cursor = Cursor::new("Bind", beginning);
    Some(BindNames { portal: cursor.text().ok()?, statement: cursor.text().ok()? })
}

/// What a Bind joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindNames<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
}

/// FunctionCall: a function by its identifier, without SQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionCall<'a> {
    pub function: u32,
    pub formats: Formats<'a>,
    pub arguments: Values<'a>,
    pub binary_result: bool,
}

impl<'a> FunctionCall<'a> {
    pub fn read(body: &'a [u8]) -> Result<FunctionCall<'a>, Malformed> {
        let mut cursor = Cursor::new("FunctionCall", body);
        let function = cursor.u32()?;
        let (formats, arguments) = (cursor.formats()?, cursor.values()?);
        if formats.count() > 1 && formats.count() != arguments.count() {
            return Err(cursor.wrong(Defect::Value));
        }
        let binary_result = match cursor.u16()? {
            0 => false,
            1 => true,
            _ => return Err(cursor.wrong(Defect::Value)),
        };
        cursor.end(FunctionCall { function, formats, arguments, binary_result })
    }
}

/// PasswordMessage: a password in clear or as an MD5 digest.
pub fn password(body: &[u8]) -> Result<&[u8], Malformed> {
    let mut cursor = Cursor::new("PasswordMessage", body);
    let password = cursor.text()?;
    // An empty password is refused before anybody compares it, as recv_password_packet in auth.c does.
    if password.is_empty() {
        return Err(cursor.wrong(Defect::Value));
    }
    cursor.end(password)
}

/// SASLInitialResponse.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SaslInitial<'a> {
    pub mechanism: &'a [u8],
    pub response: Option<&'a [u8]>,
}

impl<'a> SaslInitial<'a> {
    pub fn read(body: &'a [u8]) -> Result<SaslInitial<'a>, Malformed> {
        let mut cursor = Cursor::new("SASLInitialResponse", body);
        let (mechanism, response) = (cursor.text()?, cursor.value()?);
        cursor.end(SaslInitial { mechanism, response })
    }
}

/// SASLResponse: the whole body is the mechanism's.
pub fn sasl_response(body: &[u8]) -> &[u8] {
    body
}
