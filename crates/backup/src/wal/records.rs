//! What WAL says: its records in order, and those of them at which a recovery can end.
//!
//! [`Records`] is told the content of segments that follow each other and finds every record that begins in them, by the rules of
//! PostgreSQL's recovery (`xlogreader.c`): a page counts if its magic, address, system identifier and segment size are right, a
//! record if its length, its link to the record before it and its CRC-32C are. It ends where nothing continues the log.
//!
//! Of each record it keeps the beginning, where everything is that is looked at here: `xl_xact_commit` and its like, and
//! restore points. What a record changes is not decoded, but for rows that are put into one table (`added`): of `pg_class`, so that a
//! name is known of what is dropped later. Which pages it changes is (`touched`), for incremental backups.
//!
//! Left out: which segments follow each other (`History`), and which file of a position is read. Hazard: an end that is taken
//! for the end of all there is makes a plan promise less than is there; one that is passed over makes it promise what cannot be
//! restored. `postgres::wal` reads a server's own files for a node's vote; it looks at no content, and has rules for files that a
//! server writes at that moment, which an archive has not.

use crc_fast::{CrcAlgorithm, Digest};
use jiff::{SignedDuration, Timestamp};
use pgherd_core::types::{Lsn, SystemId};

use super::Segments;

const SHORT_HEADER_BYTES: u64 = 24;
const LONG_HEADER_BYTES: u64 = 40;
const RECORD_HEADER_BYTES: usize = 24;
/// Of the header, what its own CRC covers: all before the CRC.
const HEADER_BEFORE_CRC: usize = 20;
const ALIGNMENT: u64 = 8;

const FIRST_IS_CONTINUATION: u16 = 0x0001;
const LONG_HEADER: u16 = 0x0002;
/// The record that the previous page began was given up at the end of a crash recovery.
const OVERWRITES_CONTINUATION: u16 = 0x0008;
const ALL_FLAGS: u16 = 0x000F;

/// PostgreSQL writes no longer record (`XLogRecordMaxSize`).
const MAX_RECORD_BYTES: u32 = 1020 << 20;
/// How much of a record's beginning is kept: at least a page.
const KEPT_BYTES: usize = 64 * 1024;
/// Of a transaction's end: a commit that drops some 20,000 tables. Of a longer one the dropped relations are known, and not
/// always which prepared transaction it was.
const KEPT_BYTES_OF_TRANSACTION: usize = 16 * 1024 * 1024;

/// `rmgrlist.h`.
const RM_XLOG: u8 = 0;
const RM_XACT: u8 = 1;
const RM_DBASE: u8 = 4;

/// Types of records are in the upper half of the byte.
const TYPE_BITS: u8 = 0xF0;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_RESTORE_POINT: u8 = 0x70;

/// `xact.h`.
const XACT_TYPE_BITS: u8 = 0x70;
const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;
const XACT_HAS_INFO: u8 = 0x80;
const HAS_DBINFO: u32 = 1 << 0;
const HAS_SUBXACTS: u32 = 1 << 1;
const HAS_RELFILELOCATORS: u32 = 1 << 2;
const HAS_INVALS: u32 = 1 << 3;
const HAS_TWOPHASE: u32 = 1 << 4;
const HAS_DROPPED_STATS: u32 = 1 << 8;

/// `xlogrecord.h`: what the parts in front of a record's data begin with.
const MAX_BLOCK_ID: u8 = 32;
const BLOCK_DATA_SHORT: u8 = 255;
const BLOCK_DATA_LONG: u8 = 254;
const BLOCK_ORIGIN: u8 = 253;
const BLOCK_TOPLEVEL_XID: u8 = 252;

/// `PgStat_Kind`, the same in each version that has it.
const KIND_RELATION: u32 = 2;
/// From this version on an object of the statistics has eight bytes, the lower half first.
const WIDE_OBJECTS: u16 = 18;

/// `XLOG_DBASE_DROP`, which got another number when `CREATE DATABASE` learned a second way.
const DBASE_DROP: u8 = 0x20;
const DBASE_DROP_BEFORE_15: u8 = 0x10;

/// A restore point's name ends with a zero byte.
const RESTORE_POINT_NAME_BYTES: usize = 64;

/// `XLOG_PAGE_MAGIC` of each major version.
const MAGICS: [(u16, u16); 5] = [(0xD10D, 14), (0xD110, 15), (0xD113, 16), (0xD116, 17), (0xD118, 18)];

/// A file of a relation, as PostgreSQL names it: tablespace, database, and the number that `pg_relation_filenode` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    pub tablespace: u32,
    pub database: u32,
    pub number: u32,
}

/// Something that a transaction dropped: of which nothing is left in PostgreSQL's statistics. Known from version 15 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dropped {
    pub database: u32,
    /// As in `pg_class.oid`, for relations.
    pub oid: u32,
}

/// A record at which a recovery can end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Landmark {
    Commit {
        xid: u32,
        at: Timestamp,
        /// Relations whose files are gone from then on: also of those that were truncated or rewritten.
        dropped: Vec<RelationFile>,
        /// Relations that are gone themselves.
        relations: Vec<Dropped>,
    },
    Abort {
        xid: u32,
        at: Timestamp,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        name: String,
        at: Timestamp,
    },
}

/// A record that is whole.
#[derive(Debug)]
pub struct Record<'a> {
    pub start: Lsn,
    /// Where the next one can begin.
    pub end: Lsn,
    /// Where the version of a server is asked for: its major.
    pub major: u16,
    /// Its beginning, with its header.
    head: &'a [u8],
}

/// Why there is no further record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Nothing continues the log there: zeros, or what was there before.
    Here(Lsn),
    /// A record begins there and is not whole.
    Torn(Lsn),
}

impl Ended {
    pub fn at(self) -> Lsn {
        match self {
            Ended::Here(at) | Ended::Torn(at) => at,
        }
    }
}

/// Finds records in what it is told.
pub struct Records {
    system: SystemId,
    segments: Segments,
    /// The first byte that was not told yet.
    position: Lsn,
    major: Option<(u16, u16)>,
    page_bytes: u64,
    /// Whether the beginning of a record was met: before that, the rest of one that began earlier is passed over.
    has_begun: bool,
    /// Behind a switch the rest of the segment means nothing.
    skip_to: Lsn,
    open: Option<Open>,
    last: Option<Lsn>,
    ended: Option<Ended>,
}

/// A record of which not all was told.
struct Open {
    start: Lsn,
    /// None until four bytes are there, which are on one page always.
    length: u32,
    taken: u64,
    head: Vec<u8>,
    digest: Digest,
}

impl Records {
    /// From the beginning of a segment on.
    pub fn new(system: SystemId, segments: Segments, number: u64) -> Records {
        Records {
            system,
            segments,
            position: segments.position(number),
            major: None,
            page_bytes: 0,
            has_begun: false,
            skip_to: Lsn::ZERO,
            open: None,
            last: None,
            ended: None,
        }
    }

    /// What has to be told next.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The next bytes: a whole segment, or its beginning. Calls `each` for every record that is whole by then. None while the
    /// log may go on.
    pub fn read(&mut self, content: &[u8], mut each: impl FnMut(&Record<'_>)) -> Option<Ended> {
        let mut at = 0;
        while self.ended.is_none() {
            if self.page_bytes == 0 {
                let Some(header) = content.get(at..at + LONG_HEADER_BYTES as usize) else { break };
                self.page_bytes = u64::from(u32_at(header, 36));
                if !self.page_bytes.is_power_of_two() || !(1024..=64 * 1024).contains(&self.page_bytes) {
                    self.ended = Some(Ended::Here(self.position));
                    break;
                }
            }
            // What is less than a page is the end of a segment that is not complete: PostgreSQL would not read it either.
            let Some(page) = content.get(at..at + self.page_bytes as usize) else { break };
            self.read_page(page, &mut each);
            at += page.len();
            self.position = Lsn(self.position.0 + page.len() as u64);
        }
        self.ended
    }

    /// Where the log ends, if nothing more comes.
    pub fn end(&self) -> Ended {
        match (self.ended, &self.open) {
            (Some(ended), _) => ended,
            (None, Some(open)) => Ended::Torn(open.start),
            (None, None) => Ended::Here(self.position),
        }
    }

    fn read_page(&mut self, page: &[u8], each: &mut impl FnMut(&Record<'_>)) {
        let address = self.position;
        if address < self.skip_to {
            return;
        }
        let Some(header) = self.header(page, address) else { return self.stop(address) };
        let mut from = header.bytes as usize;
        if header.overwrites() {
            self.open = None;
        }
        match &self.open {
            Some(open) => {
                let left = u64::from(open.length) - open.taken;
                if !header.continues() || u64::from(header.rest) != left {
                    return self.stop(address);
                }
            }
            None if header.continues() && !header.overwrites() => {
                // Of one that began before what was told; elsewhere it does not follow what is there.
                if self.has_begun {
                    return self.stop(address);
                }
                let rest = header.rest as usize;
                if rest >= page.len() - from {
                    return;
                }
                from = (from + rest).next_multiple_of(ALIGNMENT as usize);
            }
            None => {}
        }
        self.has_begun = true;
        while from < page.len() && self.ended.is_none() && address >= self.skip_to {
            from = match self.open.take() {
                Some(open) => self.go_on(open, page, address, from, each),
                None => self.begin(page, address, from),
            };
        }
    }

    fn begin(&mut self, page: &[u8], address: Lsn, from: usize) -> usize {
        let start = Lsn(address.0 + from as u64);
        // Records are aligned, so that the length is always on one page.
        let length = u32_at(page, from);
        if (length as usize) < RECORD_HEADER_BYTES || length > MAX_RECORD_BYTES {
            self.ended = Some(Ended::Here(start));
            return page.len();
        }
        let digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
        self.open = Some(Open { start, length, taken: 0, head: Vec::new(), digest });
        from
    }

    fn go_on(
        &mut self,
        mut open: Open,
        page: &[u8],
        address: Lsn,
        from: usize,
        each: &mut impl FnMut(&Record<'_>),
    ) -> usize {
        let left = (u64::from(open.length) - open.taken) as usize;
        let piece = &page[from..page.len().min(from + left)];
        let had_header = open.head.len() >= RECORD_HEADER_BYTES;
        let kept = match open.head.get(17) {
            Some(&RM_XACT) => KEPT_BYTES_OF_TRANSACTION,
            _ => KEPT_BYTES,
        };
        let room = kept.saturating_sub(open.head.len());
        open.head.extend_from_slice(&piece[..piece.len().min(room)]);
        // The CRC covers what is behind the header first, and then the header up to itself.
        let header_left = RECORD_HEADER_BYTES.saturating_sub(open.taken as usize).min(piece.len());
        if header_left < piece.len() {
            open.digest.update(&piece[header_left..]);
        }
        open.taken += piece.len() as u64;
        let has_header = open.head.len() >= RECORD_HEADER_BYTES;
        if has_header && !had_header && !self.follows(&open) {
            self.ended = Some(Ended::Here(open.start));
            return page.len();
        }
        let behind = from + piece.len();
        if open.taken < u64::from(open.length) {
            self.open = Some(open);
            return behind;
        }
        open.digest.update(&open.head[..HEADER_BEFORE_CRC]);
        if open.digest.finalize() as u32 != u32_at(&open.head, HEADER_BEFORE_CRC) {
            self.ended = Some(Ended::Torn(open.start));
            return page.len();
        }
        let next = behind.next_multiple_of(ALIGNMENT as usize);
        let mut end = Lsn(address.0 + next as u64);
        let major = self.major.map_or(0, |(_, major)| major);
        let record = Record { start: open.start, end, major, head: &open.head };
        if record.is_switch() {
            let number = self.segments.number(Lsn(end.0 - 1));
            end = self.segments.position(number + 1);
            self.skip_to = end;
        }
        self.last = Some(open.start);
        each(&Record { end, ..record });
        // Behind a switch nothing of this page counts either.
        if self.skip_to > address { page.len() } else { next }
    }

    /// `xl_prev` links a record to the one before it. Of the first one it can only be required to point backwards.
    fn follows(&self, open: &Open) -> bool {
        let link = u64_at(&open.head, 8);
        match self.last {
            Some(last) => link == last.0,
            None => link < open.start.0,
        }
    }

    /// The log does not go on at this page.
    fn stop(&mut self, address: Lsn) {
        self.ended = Some(match &self.open {
            Some(open) if open.head.len() >= RECORD_HEADER_BYTES => Ended::Torn(open.start),
            Some(open) => Ended::Here(open.start),
            None => Ended::Here(address),
        });
    }

    fn header(&mut self, page: &[u8], address: Lsn) -> Option<PageHeader> {
        let (magic, flags) = (u16_at(page, 0), u16_at(page, 2));
        let known = MAGICS.into_iter().find(|(known, _)| *known == magic)?;
        if *self.major.get_or_insert(known) != known
            || flags & !ALL_FLAGS != 0
            || u64_at(page, 8) != address.0
        {
            return None;
        }
        let is_first = self.segments.position(self.segments.number(address)) == address;
        if is_first != (flags & LONG_HEADER != 0) {
            return None;
        }
        if is_first {
            let same = u64_at(page, 24) == self.system.0
                && u32_at(page, 32) == self.segments.bytes()
                && u64::from(u32_at(page, 36)) == self.page_bytes;
            if !same {
                return None;
            }
        }
        let bytes = if is_first { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES };
        Some(PageHeader { flags, rest: u32_at(page, 16), bytes })
    }
}

struct PageHeader {
    flags: u16,
    /// Bytes of the continued record that are left at the start of this page.
    rest: u32,
    bytes: u64,
}

impl PageHeader {
    fn continues(&self) -> bool {
        self.flags & FIRST_IS_CONTINUATION != 0
    }

    fn overwrites(&self) -> bool {
        self.flags & OVERWRITES_CONTINUATION != 0
    }
}

impl Record<'_> {
    /// What ends a recovery, if this does.
    pub fn landmark(&self) -> Option<Landmark> {
        let (info, manager) = (self.head[16], self.head[17]);
        match manager {
            RM_XACT => self.end_of_transaction(info),
            RM_XLOG if info & TYPE_BITS == XLOG_RESTORE_POINT => {
                let mut data = self.data()?;
                let at = data.time()?;
                let name = data.take(RESTORE_POINT_NAME_BYTES)?;
                let name = name.split(|byte| *byte == 0).next()?;
                Some(Landmark::RestorePoint { name: String::from_utf8_lossy(name).into_owned(), at })
            }
            _ => None,
        }
    }

    /// Whether the rest of its segment is let go of.
    pub(super) fn is_switch(&self) -> bool {
        self.head[17] == RM_XLOG && self.head[16] & TYPE_BITS == XLOG_SWITCH
    }

    /// The database whose files this record deletes. Its transaction is committed behind that.
    pub fn drops_database(&self) -> Option<u32> {
        let drop = if self.major >= 15 { DBASE_DROP } else { DBASE_DROP_BEFORE_15 };
        match self.head[17] == RM_DBASE && self.head[16] & TYPE_BITS == drop {
            true => self.data()?.u32(),
            false => None,
        }
    }

    /// Of the transaction that wrote it, if one did.
    pub fn xid(&self) -> Option<u32> {
        Some(u32_at(self.head, 4)).filter(|xid| *xid != 0)
    }

    /// `xl_xact_commit`, `xl_xact_abort`, and what is behind them, in the order of `ParseCommitRecord`.
    fn end_of_transaction(&self, info: u8) -> Option<Landmark> {
        let is_commit = match info & XACT_TYPE_BITS {
            XACT_COMMIT | XACT_COMMIT_PREPARED => true,
            XACT_ABORT | XACT_ABORT_PREPARED => false,
            _ => return None,
        };
        let mut data = self.data()?;
        let at = data.time()?;
        let mut rest = Rest::default();
        if info & XACT_HAS_INFO != 0 {
            // What is cut off at the end of what is kept stays as it is.
            let _whole = data.rest_of_transaction(self.major, &mut rest);
        }
        let Rest { prepared, dropped, relations } = rest;
        let xid = prepared.or(self.xid()).unwrap_or_default();
        Some(match is_commit {
            true => Landmark::Commit { xid, at, dropped, relations },
            false => Landmark::Abort { xid, at },
        })
    }

    /// What stands behind the descriptions of blocks and of the data itself. None where there are blocks: of those records
    /// nothing is looked at.
    fn data(&self) -> Option<Data<'_>> {
        let mut data = Data(&self.head[RECORD_HEADER_BYTES..]);
        loop {
            match data.take(1)?[0] {
                BLOCK_DATA_SHORT => {
                    data.take(1)?;
                    return Some(data);
                }
                BLOCK_DATA_LONG => {
                    data.take(4)?;
                    return Some(data);
                }
                BLOCK_ORIGIN => data.take(2)?,
                BLOCK_TOPLEVEL_XID => data.take(4)?,
                0..=MAX_BLOCK_ID => return None,
                _ => return None,
            };
        }
    }
}

/// What is behind the time of a transaction's end.
#[derive(Default)]
struct Rest {
    /// Whose end it is, if it was prepared.
    prepared: Option<u32>,
    dropped: Vec<RelationFile>,
    relations: Vec<Dropped>,
}

/// Bytes of a record that were not read yet.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32_at(self.take(4)?, 0))
    }

    /// A number of parts and the parts, of which only the length is known.
    fn skip(&mut self, part_bytes: usize) -> Option<()> {
        let bytes = (self.u32()? as usize).checked_mul(part_bytes)?;
        self.take(bytes).map(|_| ())
    }

    /// Microseconds since 2000.
    fn time(&mut self) -> Option<Timestamp> {
        const EPOCH_S: i64 = 946_684_800;
        let micros = u64_at(self.take(8)?, 0) as i64;
        Timestamp::from_second(EPOCH_S).ok()?.checked_add(SignedDuration::from_micros(micros)).ok()
    }

    fn rest_of_transaction(&mut self, major: u16, rest: &mut Rest) -> Option<()> {
        let has = self.u32()?;
        if has & HAS_DBINFO != 0 {
            self.take(8)?;
        }
        if has & HAS_SUBXACTS != 0 {
            self.skip(4)?;
        }
        if has & HAS_RELFILELOCATORS != 0 {
            for _ in 0..self.u32()? {
                let (tablespace, database, number) = (self.u32()?, self.u32()?, self.u32()?);
                rest.dropped.push(RelationFile { tablespace, database, number });
            }
        }
        if has & HAS_DROPPED_STATS != 0 {
            for _ in 0..self.u32()? {
                let (kind, database, oid) = (self.u32()?, self.u32()?, self.u32()?);
                if major >= WIDE_OBJECTS {
                    self.u32()?;
                }
                if kind == KIND_RELATION {
                    rest.relations.push(Dropped { database, oid });
                }
            }
        }
        if has & HAS_INVALS != 0 {
            self.skip(16)?;
        }
        if has & HAS_TWOPHASE != 0 {
            rest.prepared = Some(self.u32()?);
        }
        Some(())
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

mod added;
mod touched;

pub use added::rows;
pub use touched::{Touched, Untold};

#[cfg(test)]
pub(crate) mod tests;
