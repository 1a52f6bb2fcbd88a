//! What is said on a connection for physical replication: commands, their answers, and what is inside CopyData; manual 55.4.
//!
//! Leaves out: when what is said, and WAL itself. Positions are plain numbers here, since this crate knows none of the
//! workspace's types; they are read and written as PostgreSQL shows them. Hazard: a position read wrongly puts WAL where it
//! does not belong, so whatever does not read in full is an error.

use std::fmt;

use bytes::{BufMut, BytesMut};

use crate::message::build::{self, Unsendable};
use crate::message::client::Values;
use crate::message::cursor::Cursor;
use crate::message::{Defect, Malformed};

/// WAL in one CopyData at most. A WAL sender sends 16 blocks (`MAX_SEND_SIZE`), and a block has 32 KiB at most.
pub const MAX_WAL_BYTES: usize = 16 * 32 * 1024;
/// What stands in front of the WAL in a CopyData.
pub const WAL_HEADER_BYTES: usize = 1 + 8 + 8 + 8;
/// A row of an answer: the largest has a timeline's history, of some hundred bytes for each timeline.
pub const MAX_ROW_BYTES: usize = 1024 * 1024;
/// `NAMEDATALEN` without the zero.
const MAX_SLOT_NAME_BYTES: usize = 63;

/// What a WAL sender sends in CopyData.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Streamed<'a> {
    /// XLogData.
    Wal {
        /// The position of its first byte.
        start: u64,
        wal: &'a [u8],
        /// The end of WAL on the server, as far as it has been flushed there.
        server_end: u64,
    },
    /// Primary keepalive message.
    Keepalive { server_end: u64, wants_reply: bool },
}

impl<'a> Streamed<'a> {
    pub fn parse(body: &'a [u8]) -> Result<Streamed<'a>, Malformed> {
        let mut cursor = Cursor::new("CopyData", body);
        match cursor.u8()? {
            b'w' => {
                let mut cursor = Cursor::new("XLogData", &body[1..]);
                let (start, server_end, _sent_at) = (cursor.u64()?, cursor.u64()?, cursor.u64()?);
                let wal = cursor.rest();
                let fits = wal.len() <= MAX_WAL_BYTES && start.checked_add(wal.len() as u64).is_some();
                if !fits {
                    return Err(cursor.wrong(Defect::Value));
                }
                Ok(Streamed::Wal { start, wal, server_end })
            }
            b'k' => {
                let mut cursor = Cursor::new("Primary keepalive", &body[1..]);
                let (server_end, _sent_at) = (cursor.u64()?, cursor.u64()?);
                let wants_reply = cursor.u8()? != 0;
                cursor.end(Streamed::Keepalive { server_end, wants_reply })
            }
            kind => Err(cursor.wrong(Defect::Type { kind })),
        }
    }
}

/// WAL is data of users.
impl fmt::Debug for Streamed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Streamed::Wal { start, wal, .. } => write!(f, "Wal({} bytes at {})", wal.len(), shown(*start)),
            Streamed::Keepalive { server_end, .. } => write!(f, "Keepalive({})", shown(*server_end)),
        }
    }
}

/// What a receiver says of itself. `applied` is not said: whoever keeps WAL replays none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusUpdate {
    pub written: u64,
    pub flushed: u64,
    /// Microseconds since the beginning of 2000, in UTC.
    pub at: i64,
    pub wants_reply: bool,
}

impl StatusUpdate {
    /// Appends a standby status update in its CopyData.
    pub fn write(&self, to: &mut BytesMut) -> Result<(), Unsendable> {
        let mut body = BytesMut::with_capacity(1 + 4 * 8 + 1);
        body.put_u8(b'r');
        body.put_u64(self.written);
        body.put_u64(self.flushed);
        body.put_u64(0);
        body.put_i64(self.at);
        body.put_u8(u8::from(self.wants_reply));
        build::copy_data(to, &body)
    }
}

/// The name of a slot, as `ReplicationSlotValidateName` takes it, so that it is one word in a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotName(String);

impl SlotName {
    pub fn new(name: &str) -> Option<SlotName> {
        let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        let fits = (1..=MAX_SLOT_NAME_BYTES).contains(&name.len()) && name.bytes().all(letter);
        fits.then(|| SlotName(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A command, sent as a Query; it displays as its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    IdentifySystem,
    /// Size of WAL segments.
    ShowSegmentBytes,
    TimelineHistory(u32),
    /// As of PostgreSQL 15.
    ReadReplicationSlot(&'a SlotName),
    StartReplication {
        slot: Option<&'a SlotName>,
        start: u64,
        timeline: u32,
    },
    /// A setting.
    Show(&'static str),
    /// With the server's manifest, and without looking at checksums, which is the receiver's.
    BaseBackup {
        label: &'a str,
        fast: bool,
        /// As of PostgreSQL 15 options stand in parentheses, and all archives come in one stream.
        is_15: bool,
    },
}

impl fmt::Display for Command<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::IdentifySystem => f.write_str("IDENTIFY_SYSTEM"),
            Command::ShowSegmentBytes => f.write_str("SHOW wal_segment_size"),
            Command::TimelineHistory(timeline) => write!(f, "TIMELINE_HISTORY {timeline}"),
            // A name that is a word of the grammar is a name in quotes only.
            Command::ReadReplicationSlot(slot) => write!(f, "READ_REPLICATION_SLOT \"{slot}\""),
            Command::StartReplication { slot, start, timeline } => {
                f.write_str("START_REPLICATION ")?;
                if let Some(slot) = slot {
                    write!(f, "SLOT \"{slot}\" ")?;
                }
                write!(f, "PHYSICAL {} TIMELINE {timeline}", shown(*start))
            }
            Command::Show(setting) => write!(f, "SHOW {setting}"),
            Command::BaseBackup { label, fast, is_15: true } => {
                let (label, checkpoint) = (label.replace('\'', "''"), if *fast { "fast" } else { "spread" });
                write!(
                    f,
                    "BASE_BACKUP (LABEL '{label}', CHECKPOINT '{checkpoint}', PROGRESS, WAIT false, TABLESPACE_MAP, \
                     VERIFY_CHECKSUMS false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C')"
                )
            }
            Command::BaseBackup { label, fast, is_15: false } => {
                let (label, checkpoint) = (label.replace('\'', "''"), if *fast { " FAST" } else { "" });
                write!(
                    f,
                    "BASE_BACKUP LABEL '{label}' PROGRESS{checkpoint} NOWAIT TABLESPACE_MAP NOVERIFY_CHECKSUMS \
                     MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
                )
            }
        }
    }
}

/// The answer to IDENTIFY_SYSTEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub system_identifier: u64,
    pub timeline: u32,
    /// Where its WAL ends, as far as it has been flushed.
    pub end: u64,
}

impl Identity {
    pub fn read(row: &Values<'_>) -> Result<Identity, Malformed> {
        let mut fields = Row::new("answer to IDENTIFY_SYSTEM", row);
        Ok(Identity {
            system_identifier: fields.number()?,
            timeline: fields.timeline()?,
            end: fields.position()?,
        })
    }
}

/// The answer to `SHOW wal_segment_size`, such as `16MB`.
pub fn segment_bytes(row: &Values<'_>) -> Result<u32, Malformed> {
    let mut fields = Row::new("answer to SHOW wal_segment_size", row);
    let text = fields.text()?.ok_or(fields.wrong())?;
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit: u32 = match &text[digits..] {
        "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return Err(fields.wrong()),
    };
    let number: u32 = text[..digits].parse().map_err(|_| fields.wrong())?;
    number.checked_mul(unit).ok_or(fields.wrong())
}

/// The answer to TIMELINE_HISTORY: the content of the file.
pub fn timeline_history<'a>(timeline: u32, row: &Values<'a>) -> Result<&'a [u8], Malformed> {
    let mut fields = Row::new("answer to TIMELINE_HISTORY", row);
    if fields.text()? != Some(&format!("{timeline:08X}.history")) {
        return Err(fields.wrong());
    }
    fields.next()?.ok_or(fields.wrong())
}

/// What a physical slot keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotPosition {
    /// `None`: it keeps nothing, since it was never used, or was invalidated.
    pub restart: Option<Restart>,
}

/// From where on WAL is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    pub at: u64,
    pub timeline: u32,
}

impl SlotPosition {
    /// The answer to READ_REPLICATION_SLOT; `None` if there is no such slot.
    pub fn read(row: &Values<'_>) -> Result<Option<SlotPosition>, Malformed> {
        let mut fields = Row::new("answer to READ_REPLICATION_SLOT", row);
        match fields.text()? {
            None => return Ok(None),
            Some("physical") => {}
            Some(_) => return Err(fields.wrong()),
        }
        let Some(at) = fields.text()? else { return Ok(Some(SlotPosition { restart: None })) };
        let at = read_position(at).ok_or(fields.wrong())?;
        let timeline = fields.timeline()?;
        Ok(Some(SlotPosition { restart: Some(Restart { at, timeline }) }))
    }
}

/// What follows a timeline that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    pub timeline: u32,
    /// Where it begins.
    pub from: u64,
}

impl Next {
    /// The row behind a stream that has ended with its timeline.
    pub fn read(row: &Values<'_>) -> Result<Next, Malformed> {
        let mut fields = Row::new("answer to START_REPLICATION", row);
        Ok(Next { timeline: fields.timeline()?, from: fields.position()? })
    }
}

/// The answer to SHOW.
pub fn setting(row: &Values<'_>) -> Result<String, Malformed> {
    let mut fields = Row::new("answer to SHOW", row);
    Ok(fields.text()?.ok_or(fields.wrong())?.to_owned())
}

/// Where a base backup begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupEdge {
    pub at: u64,
    pub timeline: u32,
}

impl BackupEdge {
    /// The row before the list of tablespaces, and the last row.
    pub fn read(row: &Values<'_>) -> Result<BackupEdge, Malformed> {
        let mut fields = Row::new("answer to BASE_BACKUP", row);
        Ok(BackupEdge { at: fields.position()?, timeline: fields.timeline()? })
    }
}

/// A row of the list of tablespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackedUp {
    /// Its oid and where it lies; none for the data directory itself.
    pub tablespace: Option<(u32, Vec<u8>)>,
    /// As the server estimates it.
    pub kib: u64,
}

impl BackedUp {
    pub fn read(row: &Values<'_>) -> Result<BackedUp, Malformed> {
        let mut fields = Row::new("list of tablespaces", row);
        let oid = fields.text()?.map(|oid| oid.parse().map_err(|_| Malformed::value("list of tablespaces")));
        let location = fields.next()?.map(<[u8]>::to_vec);
        let kib = fields.number()?;
        match (oid.transpose()?, location) {
            (Some(oid), Some(location)) => Ok(BackedUp { tablespace: Some((oid, location)), kib }),
            (None, None) => Ok(BackedUp { tablespace: None, kib }),
            _ => Err(fields.wrong()),
        }
    }
}

/// What stands in the CopyData of a base backup, as of PostgreSQL 15.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum BackupPiece<'a> {
    /// Of which file these are; behind it comes its content.
    Archive {
        name: &'a [u8],
    },
    Manifest,
    Content(&'a [u8]),
    Progress,
}

impl<'a> BackupPiece<'a> {
    pub fn parse(body: &'a [u8]) -> Result<BackupPiece<'a>, Malformed> {
        let mut cursor = Cursor::new("CopyData", body);
        match cursor.u8()? {
            b'n' => {
                let name = body[1..].split(|byte| *byte == 0).next().unwrap_or_default();
                Ok(BackupPiece::Archive { name })
            }
            b'm' => Ok(BackupPiece::Manifest),
            b'd' => Ok(BackupPiece::Content(&body[1..])),
            b'p' => Ok(BackupPiece::Progress),
            kind => Err(cursor.wrong(Defect::Type { kind })),
        }
    }
}

/// Contents are data of users.
impl fmt::Debug for BackupPiece<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackupPiece::Archive { name } => write!(f, "Archive({})", String::from_utf8_lossy(name)),
            BackupPiece::Manifest => f.write_str("Manifest"),
            BackupPiece::Content(content) => write!(f, "Content({} bytes)", content.len()),
            BackupPiece::Progress => f.write_str("Progress"),
        }
    }
}

/// The fields of a row from the left.
struct Row<'a> {
    answer: &'static str,
    values: Box<dyn Iterator<Item = Option<&'a [u8]>> + 'a>,
}

impl<'a> Row<'a> {
    fn new(answer: &'static str, row: &Values<'a>) -> Row<'a> {
        Row { answer, values: Box::new(row.iter()) }
    }

    fn wrong(&self) -> Malformed {
        Malformed::value(self.answer)
    }

    fn next(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        self.values.next().ok_or(self.wrong())
    }

    fn text(&mut self) -> Result<Option<&'a str>, Malformed> {
        let field = self.next()?.map(std::str::from_utf8).transpose();
        field.map_err(|_| self.wrong())
    }

    /// Without sign.
    fn number(&mut self) -> Result<u64, Malformed> {
        let text = self.text()?.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        text.and_then(|text| text.parse().ok()).ok_or(self.wrong())
    }

    fn timeline(&mut self) -> Result<u32, Malformed> {
        let number = u32::try_from(self.number()?).ok().filter(|timeline| *timeline > 0);
        number.ok_or(self.wrong())
    }

    fn position(&mut self) -> Result<u64, Malformed> {
        self.text()?.and_then(read_position).ok_or(self.wrong())
    }
}

/// `16/B374D848`.
fn shown(position: u64) -> String {
    format!("{:X}/{:X}", position >> 32, position & 0xFFFF_FFFF)
}

fn read_position(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let half = |half: &str| {
        let fits = (1..=8).contains(&half.len()) && half.bytes().all(|byte| byte.is_ascii_hexdigit());
        fits.then(|| u64::from_str_radix(half, 16).ok())?
    };
    Some(half(high)? << 32 | half(low)?)
}

#[cfg(test)]
mod tests;
