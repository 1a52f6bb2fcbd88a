//! Messages that servers send, as views of their bodies; manual 55.7 and 55.8.
//!
//! Leaves out rows as values of a type. Hazard: a server may be hostile or broken; an error without an
//! SQLSTATE (CVE-2026-6666) or with a field twice is still an error, and is read as one.

pub use super::cursor::{Formats, Oids, Values};

use super::cursor::Cursor;
use super::{Defect, Format, Key, Malformed, TransactionStatus};
use crate::SqlState;
use crate::startup::Version;

/// A message of a server, from authentication to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerMessage<'a> {
    Authentication(Authentication<'a>),
    NegotiateProtocolVersion(NegotiateProtocolVersion<'a>),
    BackendKeyData { pid: u32, key: Key<'a> },
    ParameterStatus { name: &'a [u8], value: &'a [u8] },
    ReadyForQuery(TransactionStatus),
    CommandComplete { tag: &'a [u8] },
    EmptyQueryResponse,
    ErrorResponse(Fields<'a>),
    NoticeResponse(Fields<'a>),
    NotificationResponse { pid: u32, channel: &'a [u8], payload: &'a [u8] },
    ParseComplete,
    BindComplete,
    CloseComplete,
    NoData,
    PortalSuspended,
    ParameterDescription(Oids<'a>),
    RowDescription(RowDescription<'a>),
    DataRow(Values<'a>),
    CopyInResponse(CopyFormat<'a>),
    CopyOutResponse(CopyFormat<'a>),
    CopyBothResponse(CopyFormat<'a>),
    CopyData(&'a [u8]),
    CopyDone,
    FunctionCallResponse(Option<&'a [u8]>),
}

impl<'a> ServerMessage<'a> {
    pub fn parse(kind: u8, body: &'a [u8]) -> Result<ServerMessage<'a>, Malformed> {
        let empty = |message, parsed| Cursor::new(message, body).end(parsed);
        match kind {
            b'R' => Authentication::parse(body).map(ServerMessage::Authentication),
            b'v' => NegotiateProtocolVersion::parse(body).map(ServerMessage::NegotiateProtocolVersion),
            b'K' => {
                let mut cursor = Cursor::new("BackendKeyData", body);
                let pid = cursor.u32()?;
                Ok(ServerMessage::BackendKeyData { pid, key: Key::new(cursor.rest())? })
            }
            b'S' => {
                let mut cursor = Cursor::new("ParameterStatus", body);
                let (name, value) = (cursor.text()?, cursor.text()?);
                cursor.end(ServerMessage::ParameterStatus { name, value })
            }
            b'Z' => {
                let mut cursor = Cursor::new("ReadyForQuery", body);
                let status = cursor.u8()?;
                let status = TransactionStatus::from_byte(status).ok_or(cursor.wrong(Defect::Value))?;
                cursor.end(ServerMessage::ReadyForQuery(status))
            }
            b'C' => {
                let mut cursor = Cursor::new("CommandComplete", body);
                let tag = cursor.text()?;
                cursor.end(ServerMessage::CommandComplete { tag })
            }
            b'I' => empty("EmptyQueryResponse", ServerMessage::EmptyQueryResponse),
            b'E' => Fields::parse("ErrorResponse", body).map(ServerMessage::ErrorResponse),
            b'N' => Fields::parse("NoticeResponse", body).map(ServerMessage::NoticeResponse),
            b'A' => {
                let mut cursor = Cursor::new("NotificationResponse", body);
                let pid = cursor.u32()?;
                let (channel, payload) = (cursor.text()?, cursor.text()?);
                cursor.end(ServerMessage::NotificationResponse { pid, channel, payload })
            }
            b'1' => empty("ParseComplete", ServerMessage::ParseComplete),
            b'2' => empty("BindComplete", ServerMessage::BindComplete),
            b'3' => empty("CloseComplete", ServerMessage::CloseComplete),
            b'n' => empty("NoData", ServerMessage::NoData),
            b's' => empty("PortalSuspended", ServerMessage::PortalSuspended),
            b't' => {
                let mut cursor = Cursor::new("ParameterDescription", body);
                let oids = cursor.oids()?;
                cursor.end(ServerMessage::ParameterDescription(oids))
            }
            b'T' => RowDescription::parse(body).map(ServerMessage::RowDescription),
            b'D' => {
                let mut cursor = Cursor::new("DataRow", body);
                let values = cursor.values()?;
                cursor.end(ServerMessage::DataRow(values))
            }
            b'G' => CopyFormat::parse("CopyInResponse", body).map(ServerMessage::CopyInResponse),
            b'H' => CopyFormat::parse("CopyOutResponse", body).map(ServerMessage::CopyOutResponse),
            b'W' => CopyFormat::parse("CopyBothResponse", body).map(ServerMessage::CopyBothResponse),
            b'd' => Ok(ServerMessage::CopyData(body)),
            b'c' => empty("CopyDone", ServerMessage::CopyDone),
            b'V' => {
                let mut cursor = Cursor::new("FunctionCallResponse", body);
                let value = cursor.value()?;
                cursor.end(ServerMessage::FunctionCallResponse(value))
            }
            kind => Err(Malformed { message: "server", defect: Defect::Type { kind } }),
        }
    }
}

/// The messages of type `R`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authentication<'a> {
    Ok,
    KerberosV5,
    CleartextPassword,
    Md5Password { salt: [u8; 4] },
    Gss,
    GssContinue(&'a [u8]),
    Sspi,
    Sasl(Mechanisms<'a>),
    SaslContinue(&'a [u8]),
    SaslFinal(&'a [u8]),
}

impl<'a> Authentication<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Authentication<'a>, Malformed> {
        let mut cursor = Cursor::new("Authentication", body);
        let parsed = match cursor.u32()? {
            0 => Authentication::Ok,
            2 => Authentication::KerberosV5,
            3 => Authentication::CleartextPassword,
            5 => {
                let salt = cursor.u32()?.to_be_bytes();
                Authentication::Md5Password { salt }
            }
            7 => Authentication::Gss,
            8 => Authentication::GssContinue(cursor.rest()),
            9 => Authentication::Sspi,
            10 => {
                let names = Mechanisms { cursor };
                while !cursor.text()?.is_empty() {}
                Authentication::Sasl(names)
            }
            11 => Authentication::SaslContinue(cursor.rest()),
            12 => Authentication::SaslFinal(cursor.rest()),
            _ => return Err(cursor.wrong(Defect::Value)),
        };
        cursor.end(parsed)
    }
}

/// SASL mechanisms in the order of the server's preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mechanisms<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Mechanisms<'a> {
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut cursor = self.cursor;
        std::iter::from_fn(move || cursor.text().ok().filter(|name| !name.is_empty()))
    }
}

/// NegotiateProtocolVersion: the newest version that the server speaks, and options that it does not know.
/// The manual of 15 says "minor version"; the server has always sent the whole number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NegotiateProtocolVersion<'a> {
    pub version: Version,
    count: u32,
    cursor: Cursor<'a>,
}

impl<'a> NegotiateProtocolVersion<'a> {
    pub fn parse(body: &'a [u8]) -> Result<NegotiateProtocolVersion<'a>, Malformed> {
        let mut cursor = Cursor::new("NegotiateProtocolVersion", body);
        let (version, count) = (Version(cursor.u32()?), cursor.u32()?);
        let parsed = NegotiateProtocolVersion { version, count, cursor };
        // However great the number, the loop ends with the body: every text has one byte at least.
        for _ in 0..count {
            cursor.text()?;
        }
        cursor.end(parsed)
    }

    pub fn unknown_options(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut cursor = self.cursor;
        (0..self.count).map_while(move |_| cursor.text().ok())
    }
}

/// The fields of an ErrorResponse or NoticeResponse, manual 55.8. Unknown ones are to be ignored; of a field
/// that comes twice the first one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Fields<'a> {
    fn parse(message: &'static str, body: &'a [u8]) -> Result<Fields<'a>, Malformed> {
        let mut cursor = Cursor::new(message, body);
        let fields = Fields { cursor };
        while cursor.u8()? != 0 {
            cursor.text()?;
        }
        cursor.end(fields)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u8, &'a [u8])> + use<'a> {
        let mut cursor = self.cursor;
        std::iter::from_fn(move || {
            let code = cursor.u8().ok().filter(|code| *code != 0)?;
            Some((code, cursor.text().ok()?))
        })
    }

    pub fn get(&self, code: u8) -> Option<&'a [u8]> {
        self.iter().find(|(known, _)| *known == code).map(|(_, value)| value)
    }

    /// The severity in English (`V`, as of 9.6), or else as it is shown (`S`).
    pub fn severity(&self) -> Option<&'a [u8]> {
        self.get(b'V').or_else(|| self.get(b'S'))
    }

    /// `None` if it is missing or no SQLSTATE (CVE-2026-6666).
    pub fn sqlstate(&self) -> Option<SqlState> {
        SqlState::new(self.get(b'C')?)
    }

    pub fn message(&self) -> Option<&'a [u8]> {
        self.get(b'M')
    }

    /// The server closes the connection behind it.
    pub fn is_fatal(&self) -> bool {
        matches!(self.severity(), Some(b"FATAL" | b"PANIC"))
    }
}

/// RowDescription: the columns of the rows to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowDescription<'a> {
    count: u16,
    cursor: Cursor<'a>,
}

/// One column of a RowDescription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    pub name: &'a [u8],
    pub table: u32,
    pub attribute: u16,
    pub type_oid: u32,
    pub type_bytes: i16,
    pub type_modifier: i32,
    pub format: Format,
}

impl<'a> RowDescription<'a> {
    fn parse(body: &'a [u8]) -> Result<RowDescription<'a>, Malformed> {
        let mut cursor = Cursor::new("RowDescription", body);
        let count = cursor.u16()?;
        let columns = RowDescription { count, cursor };
        for _ in 0..count {
            Column::read(&mut cursor)?;
        }
        cursor.end(columns)
    }

    pub fn count(&self) -> usize {
        usize::from(self.count)
    }

    pub fn columns(&self) -> impl Iterator<Item = Column<'a>> + use<'a> {
        let mut cursor = self.cursor;
        (0..self.count).map_while(move |_| Column::read(&mut cursor).ok())
    }
}

impl<'a> Column<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Column<'a>, Malformed> {
        Ok(Column {
            name: cursor.text()?,
            table: cursor.u32()?,
            attribute: cursor.u16()?,
            type_oid: cursor.u32()?,
            type_bytes: cursor.u16()? as i16,
            type_modifier: cursor.i32()?,
            format: match cursor.u16()? {
                0 => Format::Text,
                1 => Format::Binary,
                _ => return Err(cursor.wrong(Defect::Value)),
            },
        })
    }
}

/// How the data of a COPY is written: as a whole and by column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyFormat<'a> {
    pub overall: Format,
    pub columns: Formats<'a>,
}

impl<'a> CopyFormat<'a> {
    fn parse(message: &'static str, body: &'a [u8]) -> Result<CopyFormat<'a>, Malformed> {
        let mut cursor = Cursor::new(message, body);
        let overall = match cursor.u8()? {
            0 => Format::Text,
            1 => Format::Binary,
            _ => return Err(cursor.wrong(Defect::Value)),
        };
        let columns = cursor.formats()?;
        cursor.end(CopyFormat { overall, columns })
    }
}
