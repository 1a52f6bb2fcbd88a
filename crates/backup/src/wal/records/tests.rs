//! Records in WAL that is made here: every way to lie on pages, every way to break off.

use super::*;
use crate::testing::Random;

const SEGMENT_BYTES: u32 = 1 << 20;
const PAGE: usize = 8192;
const SYSTEM: SystemId = SystemId(42);
pub(crate) const FIRST: u64 = 3;

/// Writes WAL as a server does.
#[derive(Clone)]
pub(crate) struct Writer {
    system: SystemId,
    pub(crate) timeline: u32,
    pub(crate) bytes: Vec<u8>,
    last: u64,
    /// Where each record begins, and how many bytes it has.
    written: Vec<(u64, usize)>,
    /// Which of them let go of the rest of their segment.
    switches: Vec<u64>,
}

impl Writer {
    fn new() -> Writer {
        Writer::of(SYSTEM)
    }

    /// From segment [`FIRST`] on, in segments of 1 MiB.
    pub(crate) fn of(system: SystemId) -> Writer {
        let (written, switches) = (Vec::new(), Vec::new());
        Writer { system, timeline: 1, bytes: Vec::new(), last: 0, written, switches }
    }

    /// Where the next record begins.
    pub(crate) fn next(&mut self) -> Lsn {
        self.align();
        self.page(0, 0);
        Lsn(self.position())
    }

    fn position(&self) -> u64 {
        FIRST * u64::from(SEGMENT_BYTES) + self.bytes.len() as u64
    }

    /// Begins a page if one is full; `rest` is what a record has still to say.
    fn page(&mut self, flags: u16, rest: usize) {
        if !self.bytes.len().is_multiple_of(PAGE) {
            return;
        }
        let is_first = self.bytes.len().is_multiple_of(SEGMENT_BYTES as usize);
        let continued = if rest > 0 { FIRST_IS_CONTINUATION } else { 0 };
        let flags = flags | continued | if is_first { LONG_HEADER } else { 0 };
        let mut header = vec![0; if is_first { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES } as usize];
        header[0..2].copy_from_slice(&0xD110_u16.to_le_bytes());
        header[2..4].copy_from_slice(&flags.to_le_bytes());
        header[4..8].copy_from_slice(&self.timeline.to_le_bytes());
        header[8..16].copy_from_slice(&self.position().to_le_bytes());
        header[16..20].copy_from_slice(&(rest as u32).to_le_bytes());
        if is_first {
            header[24..32].copy_from_slice(&self.system.0.to_le_bytes());
            header[32..36].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
            header[36..40].copy_from_slice(&(PAGE as u32).to_le_bytes());
        }
        self.bytes.extend(header);
    }

    fn record(&self, manager: u8, info: u8, data: &[u8]) -> Vec<u8> {
        let mut record = vec![0; RECORD_HEADER_BYTES];
        record[0..4].copy_from_slice(&((RECORD_HEADER_BYTES + data.len()) as u32).to_le_bytes());
        record[4..8].copy_from_slice(&77_u32.to_le_bytes());
        record[8..16].copy_from_slice(&self.last.to_le_bytes());
        (record[16], record[17]) = (info, manager);
        record.extend_from_slice(data);
        let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
        digest.update(&record[RECORD_HEADER_BYTES..]);
        digest.update(&record[..HEADER_BEFORE_CRC]);
        record[20..24].copy_from_slice(&(digest.finalize() as u32).to_le_bytes());
        record
    }

    pub(crate) fn write(&mut self, manager: u8, info: u8, data: &[u8]) {
        self.align();
        self.page(0, 0);
        let record = self.record(manager, info, data);
        self.last = self.position();
        self.written.push((self.position(), record.len()));
        self.lay_down(&record, record.len());
        if (manager, info) == (RM_XLOG, XLOG_SWITCH) {
            self.switches.push(self.last);
            self.bytes.resize(self.bytes.len().next_multiple_of(SEGMENT_BYTES as usize), 0);
        }
    }

    /// The first `most` bytes of a record.
    fn lay_down(&mut self, record: &[u8], most: usize) {
        let mut done = 0;
        while done < most {
            self.page(0, if done == 0 { 0 } else { record.len() - done });
            let room = PAGE - self.bytes.len() % PAGE;
            let piece = room.min(most - done);
            self.bytes.extend_from_slice(&record[done..done + piece]);
            done += piece;
        }
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
    }

    /// Up to the end of a segment, with zeros.
    pub(crate) fn filled(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len().next_multiple_of(SEGMENT_BYTES as usize), 0);
        bytes
    }
}

fn read(bytes: &[u8]) -> (Vec<u64>, Ended) {
    read_from(FIRST, bytes)
}

fn read_from(number: u64, bytes: &[u8]) -> (Vec<u64>, Ended) {
    let mut records = Records::new(SYSTEM, Segments::new(SEGMENT_BYTES).unwrap(), number);
    let mut found = Vec::new();
    for segment in bytes.chunks(SEGMENT_BYTES as usize) {
        records.read(segment, |record| found.push(record.start.0));
    }
    (found, records.end())
}

/// Records of all lengths, of which some fill pages to the last byte, over several segments.
fn some(random: &mut Random) -> Writer {
    let mut writer = Writer::new();
    while writer.bytes.len() < 3 * SEGMENT_BYTES as usize {
        let room = PAGE - writer.bytes.len() % PAGE;
        let bytes = match random.below(12) {
            0 => random.below(200_000) as usize,
            1 => room.saturating_sub(RECORD_HEADER_BYTES),
            2 => 0,
            _ => random.below(3_000) as usize,
        };
        match random.below(400) {
            0 => writer.write(RM_XLOG, XLOG_SWITCH, &[]),
            _ => writer.write(10, 0, &random.bytes(bytes)),
        }
    }
    writer
}

#[test]
fn every_record_is_found_wherever_it_lies() {
    let mut count = 0;
    for seed in 0..40 {
        let writer = some(&mut Random(seed));
        let (found, ended) = read(&writer.filled());
        let written: Vec<u64> = writer.written.iter().map(|(start, _)| *start).collect();
        assert_eq!(found, written, "seed {seed}");
        count += found.len();
        let end = writer.position().next_multiple_of(ALIGNMENT);
        assert!(matches!(ended, Ended::Here(_)), "seed {seed}: {ended:?}");
        // Behind a switch that is the next segment, and at the end of a page the next record's place is not decided.
        assert!(ended.at().0 >= end, "seed {seed}: {ended:?}, the last one ends at {end}");
        // From a later segment on, what begins there is found.
        let second = SEGMENT_BYTES as usize;
        let later: Vec<u64> =
            written.into_iter().filter(|start| *start >= (FIRST + 1) * u64::from(SEGMENT_BYTES)).collect();
        assert_eq!(read_from(FIRST + 1, &writer.filled()[second..]).0, later, "seed {seed}");
    }
    assert!(count > 10_000, "{count}");
}

#[test]
fn what_breaks_off_ends_at_the_record_that_is_not_whole() {
    let mut torn = 0;
    for seed in 0..300 {
        let mut random = Random(seed);
        let writer = some(&mut random);
        let cut = random.below(writer.bytes.len() as u64) as usize;
        let mut bytes = writer.filled();
        bytes[cut..].fill(0);
        let (found, ended) = read(&bytes);
        let at = FIRST * u64::from(SEGMENT_BYTES) + cut as u64;
        for (start, length) in &writer.written {
            // A record that is cut can be whole all the same, where what was cut off are zeros.
            if start + *length as u64 <= at && !found.contains(start) {
                let pages = *length as u64 / PAGE as u64 + 2;
                let reaches = start + *length as u64 + pages * LONG_HEADER_BYTES;
                assert!(reaches > at, "seed {seed}: the record at {start} was not found; cut at {at}");
            }
        }
        assert!(
            writer.written.iter().map(|(start, _)| *start).take(found.len()).eq(found.iter().copied()),
            "seed {seed}"
        );
        let was_let_go = found.last().is_some_and(|last| writer.switches.contains(last));
        let unit = if was_let_go { u64::from(SEGMENT_BYTES) } else { PAGE as u64 };
        assert!(ended.at().0 <= at.next_multiple_of(unit), "seed {seed}: {ended:?}, cut at {at}");
        torn += usize::from(matches!(ended, Ended::Torn(_)));
    }
    assert!(torn > 100, "{torn}");
}

#[test]
fn a_changed_byte_ends_it_or_changes_nothing() {
    for seed in 0..300 {
        let mut random = Random(seed);
        let writer = some(&mut random);
        let mut bytes = writer.filled();
        let at = random.below(writer.bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
        let (found, _) = read(&bytes);
        let written = writer.written.iter().map(|(start, _)| *start);
        assert!(written.take(found.len()).eq(found.iter().copied()), "seed {seed}: something else was found");
    }
}

#[test]
fn a_record_that_was_given_up_is_passed_over() {
    let mut writer = Writer::new();
    writer.write(10, 0, &[1; 100]);
    // A crash in the middle of a record: what was begun stays, and the next page says that it was given up.
    writer.align();
    let lost = writer.record(10, 0, &vec![2; 3 * PAGE]);
    let room = PAGE - writer.bytes.len() % PAGE;
    writer.lay_down(&lost, room);
    writer.page(OVERWRITES_CONTINUATION, 0);
    writer.write(RM_XLOG, 0xD0, &[3; 16]);
    writer.write(10, 0, &[4; 100]);
    let (found, ended) = read(&writer.filled());
    assert_eq!(found, writer.written.iter().map(|(start, _)| *start).collect::<Vec<_>>());
    assert_eq!(ended, Ended::Here(Lsn(writer.position().next_multiple_of(ALIGNMENT))));
}

#[test]
fn wal_of_another_cluster_or_size_is_none() {
    let mut writer = Writer::new();
    writer.write(10, 0, &[1; 100]);
    let right = writer.filled();
    for at in [0, 8, 24, 32, 36] {
        let mut bytes = right.clone();
        bytes[at] ^= 4;
        assert_eq!(
            read(&bytes),
            (Vec::new(), Ended::Here(Lsn(FIRST * u64::from(SEGMENT_BYTES)))),
            "byte {at}"
        );
    }
    assert_eq!(read(&[]).0, Vec::<u64>::new());
    assert_eq!(read(&right[..100]).0, Vec::<u64>::new());
}

#[test]
fn ends_of_transactions_say_who_and_when() {
    let at: Timestamp = "2026-11-22T11:20:00.123456Z".parse().unwrap();
    let micros = at.as_microsecond() - 946_684_800_000_000;
    let mut data = vec![BLOCK_DATA_SHORT, 8 + 4 + 4 + 24 + 4 + 24];
    data.extend(micros.to_le_bytes());
    data.extend((HAS_RELFILELOCATORS | HAS_DROPPED_STATS).to_le_bytes());
    data.extend([2_u32, 1663, 5, 16384, 1663, 5, 16385].iter().flat_map(|word| word.to_le_bytes()));
    // A relation, and a function of the same number.
    data.extend([2_u32, 2, 5, 16384, 3, 5, 16384].iter().flat_map(|word| word.to_le_bytes()));
    let mut writer = Writer::new();
    writer.write(RM_XACT, XACT_COMMIT | XACT_HAS_INFO, &data);
    writer.write(RM_XACT, XACT_ABORT, &data[..10]);
    // PREPARE TRANSACTION ends nothing.
    writer.write(RM_XACT, 0x10, &data[..10]);
    // What says more than is there.
    writer.write(RM_XACT, XACT_COMMIT | XACT_HAS_INFO, &data[..18]);
    writer.write(RM_XACT, XACT_COMMIT, &data[..5]);
    let mut point = vec![BLOCK_DATA_SHORT, 72];
    point.extend(micros.to_le_bytes());
    point.extend(b"before");
    point.resize(2 + 72, 0);
    writer.write(RM_XLOG, XLOG_RESTORE_POINT, &point);
    let mut records = Records::new(SYSTEM, Segments::new(SEGMENT_BYTES).unwrap(), FIRST);
    let mut landmarks = Vec::new();
    records.read(&writer.filled(), |record| landmarks.push(record.landmark()));
    let file = |number| RelationFile { tablespace: 1663, database: 5, number };
    assert_eq!(
        landmarks,
        [
            Some(Landmark::Commit {
                xid: 77,
                at,
                dropped: vec![file(16384), file(16385)],
                relations: vec![Dropped { database: 5, oid: 16384 }],
            }),
            Some(Landmark::Abort { xid: 77, at }),
            None,
            Some(Landmark::Commit { xid: 77, at, dropped: Vec::new(), relations: Vec::new() }),
            None,
            Some(Landmark::RestorePoint { name: "before".to_owned(), at }),
        ]
    );
}
