//! Follows pages and records from a known boundary to the last record that is complete and valid.
//!
//! The rules are those of PostgreSQL's recovery: a page counts if its magic, address, system identifier and
//! timeline are right, which recycled segments fail by their address; a record counts if its length, its link
//! to the record before it and its CRC-32C are right, which torn tails and old bytes inside a page fail.
//!
//! Hazard: reads files that a server may be writing. Every page is judged by what one read returned.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crc_fast::{CrcAlgorithm, Digest};
use pgherd_core::types::{Lsn, Timeline};

use crate::error::{Error, Result};
use crate::wal::{History, WalFiles};

const SHORT_HEADER_BYTES: u64 = 24;
const LONG_HEADER_BYTES: u64 = 40;
const RECORD_HEADER_BYTES: u64 = 24;
/// Of the header, what its own CRC covers: all before the CRC.
const HEADER_BEFORE_CRC: usize = 20;
const ALIGNMENT: u64 = 8;

const FIRST_IS_CONTINUATION: u16 = 0x0001;
const LONG_HEADER: u16 = 0x0002;
/// The record that the previous page began was given up at the end of a crash recovery.
const OVERWRITES_CONTINUATION: u16 = 0x0008;
const ALL_FLAGS: u16 = 0x000F;

/// `RM_XLOG_ID` and its record type for the end of a segment that was left early.
const XLOG: u8 = 0;
const SWITCH: u8 = 0x40;
const TYPE_BITS: u8 = 0xF0;

/// PostgreSQL writes no longer record (`XLogRecordMaxSize`); a longer one is garbage in a recycled page.
const MAX_RECORD_BYTES: u32 = 1020 << 20;

/// Read at a time. The usual search ends within one or two.
const WINDOW_BYTES: u64 = 512 << 10;

pub(crate) struct Reader<'a> {
    files: &'a WalFiles,
    history: &'a History,
    window: Window,
    /// The page whose header was checked last, so that its records do not check it again.
    checked: Option<(Timeline, u64, PageHeader)>,
    /// A segment file that is not there, so that its records do not look again.
    missing: Option<(Timeline, u64)>,
    bytes_read: u64,
}

/// A piece of one segment file in memory.
struct Window {
    timeline: Timeline,
    start: u64,
    bytes: Vec<u8>,
    file: Option<(Timeline, u64, File)>,
}

/// Where reading began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// A checkpoint's record, as the control file says.
    Checkpoint(Lsn),
    /// Behind some record. What follows is only believed if it links back to a record that ends there: behind the
    /// end of the log, a recycled segment holds old records that are perfect but for that.
    Boundary(Lsn),
}

/// Where reading ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) timeline: Timeline,
    pub(crate) lsn: Lsn,
    pub(crate) last_record: Option<Lsn>,
    pub(crate) stop: Stop,
    pub(crate) covered_by: Option<PathBuf>,
}

/// Why there is no further record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Nothing that continues the log: zeros, old bytes, no file.
    Nothing,
    /// A record begins and is not whole.
    Torn,
}

/// A record that was found whole.
struct Record {
    start: u64,
    /// Where the one behind it begins, or the page on which it does.
    next: u64,
    /// `xl_prev`.
    link: u64,
    is_checkpoint: bool,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(files: &'a WalFiles, history: &'a History) -> Reader<'a> {
        let window = Window { timeline: Timeline(0), start: 0, bytes: Vec::new(), file: None };
        Reader { files, history, window, checked: None, missing: None, bytes_read: 0 }
    }

    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Reads every record from `start` on. With none there, the end is `start` itself.
    pub(crate) fn read_to_end(&mut self, start: Start) -> Result<End> {
        let (Start::Checkpoint(Lsn(mut end)) | Start::Boundary(Lsn(mut end))) = start;
        let mut last = None;
        let mut covered_by = None;
        let mut settled: Option<(Timeline, u64)> = None;
        loop {
            let mut stop = Stop::Nothing;
            let mut found = None;
            let segment = self.files.segment_of(Lsn(end));
            // The file of the newest timeline first, as PostgreSQL does. Where that breaks off, an older one may
            // still hold what this node acknowledged before the fork, and then it is read on to there.
            let mut writers = self.writers_of(end);
            if let Some((timeline, in_segment)) = settled
                && in_segment == segment
                && writers.contains(&timeline)
            {
                writers = vec![timeline];
            }
            for timeline in &writers {
                match self.read_record(*timeline, end, last)? {
                    Ok(record) => {
                        if *timeline != writers[0] {
                            settled = Some((*timeline, segment));
                            let newer = self.files.segment_path(writers[0], segment);
                            covered_by = newer.exists().then_some(newer).or(covered_by);
                        }
                        found = Some((*timeline, record));
                        break;
                    }
                    Err(Stop::Torn) => stop = Stop::Torn,
                    Err(Stop::Nothing) => {}
                }
            }
            if let (Some((timeline, record)), None) = (&found, last) {
                let believed = match start {
                    Start::Checkpoint(_) => record.is_checkpoint,
                    Start::Boundary(_) => self.follows_its_link(*timeline, record)?,
                };
                if !believed {
                    found = None;
                    covered_by = None;
                }
            }
            let Some((_, record)) = found else {
                let timeline = match last {
                    Some(last) => self.history.timeline_at(Lsn(last)),
                    None => self.history.timeline_at(Lsn(end.saturating_sub(1))),
                };
                return Ok(End { timeline, lsn: Lsn(end), last_record: last.map(Lsn), stop, covered_by });
            };
            last = Some(record.start);
            end = record.next;
        }
    }

    /// True if the record that `record` names as the one before it is there and ends where this one begins.
    fn follows_its_link(&mut self, timeline: Timeline, record: &Record) -> Result<bool> {
        let mut writers = self.writers_of(record.link);
        writers.retain(|writer| *writer <= timeline);
        for writer in writers {
            if let Ok(before) = self.read_record(writer, record.link, None)? {
                let header = match before.next.is_multiple_of(u64::from(self.files.page_bytes)) {
                    true if before.next.is_multiple_of(u64::from(self.files.segment_bytes)) => {
                        LONG_HEADER_BYTES
                    }
                    true => SHORT_HEADER_BYTES,
                    false => 0,
                };
                return Ok(before.start == record.link && before.next + header == record.start);
            }
        }
        Ok(false)
    }

    /// True if the page of the byte before `lsn` continues the log.
    pub(crate) fn has_page_before(&mut self, lsn: Lsn) -> Result<bool> {
        let Some(before) = lsn.0.checked_sub(1) else { return Ok(false) };
        for timeline in self.writers_of(before) {
            if self.page(timeline, before - before % u64::from(self.files.page_bytes))?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The timelines whose files can hold the record at `at`: those that had begun by the end of its segment and
    /// had not ended before it.
    fn writers_of(&self, at: u64) -> Vec<Timeline> {
        let behind = (self.files.segment_of(Lsn(at)) + 1) * u64::from(self.files.segment_bytes);
        self.history.writers(Lsn(at), Lsn(behind)).collect()
    }

    fn read_record(
        &mut self,
        timeline: Timeline,
        at: u64,
        previous: Option<u64>,
    ) -> Result<Result<Record, Stop>> {
        let page_bytes = u64::from(self.files.page_bytes);
        let mut start = at.next_multiple_of(ALIGNMENT);
        'restart: loop {
            let mut page = start - start % page_bytes;
            let Some(header) = self.page(timeline, page)? else { return Ok(Err(Stop::Nothing)) };
            if start == page {
                start += header.bytes;
            }
            let at_first = start == page + header.bytes;
            if start < page + header.bytes || (at_first && header.continues() && !header.overwrites()) {
                return Ok(Err(Stop::Nothing));
            }

            // The length is always on the first page, because records are aligned; the rest of the header need
            // not be.
            let length = u32::from_le_bytes(self.bytes::<4>(start));
            if u64::from(length) < RECORD_HEADER_BYTES || length > MAX_RECORD_BYTES {
                return Ok(Err(Stop::Nothing));
            }
            let mut record = [0; RECORD_HEADER_BYTES as usize];
            let mut filled = 0;
            let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
            let mut left = u64::from(length);
            let mut from = start;
            loop {
                let here = left.min(page + page_bytes - from);
                let mut piece = self.window.slice(from, here);
                if filled < record.len() {
                    let take = piece.len().min(record.len() - filled);
                    record[filled..filled + take].copy_from_slice(&piece[..take]);
                    filled += take;
                    piece = &piece[take..];
                    // As soon as the header is there it is judged, before gigabytes are read for a wrong length.
                    if filled == record.len() && !header_fits(&record, start, previous) {
                        return Ok(Err(Stop::Nothing));
                    }
                }
                if !piece.is_empty() {
                    digest.update(piece);
                }
                left -= here;
                from += here;
                if left == 0 {
                    break;
                }
                page += page_bytes;
                let torn = if filled < record.len() { Stop::Nothing } else { Stop::Torn };
                let Some(header) = self.page(timeline, page)? else { return Ok(Err(torn)) };
                if header.overwrites() {
                    start = page;
                    continue 'restart;
                }
                if !header.continues() || u64::from(header.rest) != left {
                    return Ok(Err(torn));
                }
                from = page + header.bytes;
            }
            digest.update(&record[..HEADER_BEFORE_CRC]);
            let wanted = u32::from_le_bytes([record[20], record[21], record[22], record[23]]);
            if digest.finalize() as u32 != wanted {
                return Ok(Err(Stop::Torn));
            }
            let mut next = from.next_multiple_of(ALIGNMENT);
            if record[17] == XLOG && record[16] & TYPE_BITS == SWITCH {
                next = next.next_multiple_of(u64::from(self.files.segment_bytes));
            }
            let is_checkpoint = record[17] == XLOG && matches!(record[16] & TYPE_BITS, 0x00 | 0x10);
            let link = u64::from_le_bytes(record[8..16].try_into().expect("eight bytes"));
            return Ok(Ok(Record { start, next, link, is_checkpoint }));
        }
    }

    fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        self.window.slice(at, N as u64).try_into().expect("the slice has the length that was asked for")
    }

    /// Brings the page at `address` into the window and checks its header. `None`: it does not continue the log.
    fn page(&mut self, timeline: Timeline, address: u64) -> Result<Option<PageHeader>> {
        if !self.load(timeline, address)? {
            return Ok(None);
        }
        if let Some((its, at, header)) = self.checked
            && (its, at) == (timeline, address)
        {
            return Ok(Some(header));
        }
        let header = self.bytes::<{ SHORT_HEADER_BYTES as usize }>(address);
        let narrow =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let magic = u16::from_le_bytes([header[0], header[1]]);
        let flags = u16::from_le_bytes([header[2], header[3]]);
        let wrote = Timeline(narrow(4));
        let itself = u64::from(narrow(12)) << 32 | u64::from(narrow(8));
        if magic != self.files.page_magic || flags & !ALL_FLAGS != 0 || itself != address {
            return Ok(None);
        }
        let first_of_segment = address.is_multiple_of(u64::from(self.files.segment_bytes));
        if first_of_segment != (flags & LONG_HEADER != 0) {
            return Ok(None);
        }
        if first_of_segment {
            let long = self.bytes::<{ LONG_HEADER_BYTES as usize }>(address);
            let part = |at: usize| u32::from_le_bytes([long[at], long[at + 1], long[at + 2], long[at + 3]]);
            let system_id = u64::from(part(28)) << 32 | u64::from(part(24));
            let same = system_id == self.files.system_id.0
                && part(32) == self.files.segment_bytes
                && part(36) == self.files.page_bytes;
            if !same {
                return Ok(None);
            }
        }
        // The segment of a fork is a copy up to there, so that its pages name older timelines; and the page of
        // the fork itself keeps the name of the timeline that began it.
        let rightful = self.history.timeline_at(Lsn(address));
        if wrote > timeline || wrote < rightful.min(timeline) || self.history.begin_of(wrote).is_none() {
            return Ok(None);
        }
        let bytes = if first_of_segment { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES };
        let header = PageHeader { flags, rest: narrow(16), bytes };
        self.checked = Some((timeline, address, header));
        Ok(Some(header))
    }

    /// Fills the window so that it holds the page at `address`; `false` if the file is missing or too short.
    fn load(&mut self, timeline: Timeline, address: u64) -> Result<bool> {
        let page_bytes = u64::from(self.files.page_bytes);
        let segment_bytes = u64::from(self.files.segment_bytes);
        if self.window.timeline == timeline && self.window.holds(address, page_bytes) {
            return Ok(true);
        }
        let segment = address / segment_bytes;
        if self.missing == Some((timeline, segment)) {
            return Ok(false);
        }
        self.checked = None;
        let path = self.files.segment_path(timeline, segment);
        if self.window.file.as_ref().is_none_or(|(of, number, _)| (*of, *number) != (timeline, segment)) {
            match File::open(&path) {
                Ok(file) => self.window.file = Some((timeline, segment, file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.missing = Some((timeline, segment));
                    return Ok(false);
                }
                Err(error) => return Err(Error::io("open", &path)(error)),
            }
        }
        let (_, _, file) = self.window.file.as_ref().expect("it was opened above");
        let offset = address % segment_bytes;
        let wanted = WINDOW_BYTES.max(page_bytes).min(segment_bytes - offset) as usize;
        self.window.bytes.resize(wanted, 0);
        let mut filled = 0;
        while filled < wanted {
            match file.read_at(&mut self.window.bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.window.bytes.clear();
                    return Err(Error::io("read", &path)(error));
                }
            }
        }
        self.window.bytes.truncate(filled - filled % page_bytes as usize);
        self.window.timeline = timeline;
        self.window.start = address;
        self.bytes_read += filled as u64;
        Ok(self.window.holds(address, page_bytes))
    }
}

impl Window {
    fn holds(&self, at: u64, count: u64) -> bool {
        at >= self.start && at + count <= self.start + self.bytes.len() as u64
    }

    fn slice(&self, at: u64, count: u64) -> &[u8] {
        let from = (at - self.start) as usize;
        &self.bytes[from..from + count as usize]
    }
}

#[derive(Clone, Copy)]
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

/// `xl_prev` links a record to the one before it. Behind a boundary whose record is not known it can only be
/// required to point backwards; the CRC then decides.
fn header_fits(header: &[u8; RECORD_HEADER_BYTES as usize], start: u64, previous: Option<u64>) -> bool {
    let link = u64::from_le_bytes(header[8..16].try_into().expect("eight bytes"));
    match previous {
        Some(previous) => link == previous,
        None => link < start,
    }
}
