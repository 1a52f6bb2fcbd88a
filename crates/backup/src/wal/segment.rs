//! Segments of WAL: numbers, names, positions, and what a segment says of itself in its first page.
//!
//! Left out: records. Hazard: a size that is wrong by a factor makes every name mean another position.

use std::fmt;

use pgherd_core::types::{Lsn, SystemId, Timeline};

const MIN_BYTES: u32 = 1024 * 1024;
const MAX_BYTES: u32 = 1024 * 1024 * 1024;
/// The header of the first page of a segment: `XLogLongPageHeaderData`.
const LONG_HEADER_BYTES: usize = 40;
/// Says in `xlp_info` that the header is a long one.
const LONG_HEADER: u16 = 0x0002;

/// A segment of a timeline; its number counts from position 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Segment {
    pub timeline: Timeline,
    pub number: u64,
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "segment {:X} of timeline {}", self.number, self.timeline)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    #[error("{bytes} bytes is no size of WAL segments: a power of two from 1 MiB to 1 GiB")]
    Size { bytes: u32 },
    #[error("{segment} has {bytes} bytes, and segments have {wanted}")]
    Length { segment: Segment, bytes: usize, wanted: u32 },
    #[error("what came as {segment} does not begin like a segment of WAL")]
    NoHeader { segment: Segment },
    #[error("what came as {segment} is WAL of cluster {found}, and this is the archive of {wanted}")]
    OtherSystem { segment: Segment, found: SystemId, wanted: SystemId },
    #[error("what came as {segment} begins at {found}, not at {wanted}")]
    OtherPosition { segment: Segment, found: Lsn, wanted: Lsn },
    #[error("what came as {segment} is of timeline {found}, which comes later")]
    LaterTimeline { segment: Segment, found: Timeline },
    #[error("what came as {segment} has segments of {found} bytes, and this archive has {wanted}")]
    OtherSize { segment: Segment, found: u32, wanted: u32 },
}

/// The size of a cluster's segments, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments(u32);

impl Segments {
    pub fn new(bytes: u32) -> Result<Segments, SegmentError> {
        match bytes.is_power_of_two() && (MIN_BYTES..=MAX_BYTES).contains(&bytes) {
            true => Ok(Segments(bytes)),
            false => Err(SegmentError::Size { bytes }),
        }
    }

    pub fn bytes(self) -> u32 {
        self.0
    }

    fn per_id(self) -> u64 {
        (1 << 32) / u64::from(self.0)
    }

    /// The number of the segment that has the byte at `position`.
    pub fn number(self, position: Lsn) -> u64 {
        position.0 / u64::from(self.0)
    }

    pub fn start(self, segment: Segment) -> Lsn {
        self.position(segment.number)
    }

    /// The first position behind it.
    pub fn end(self, segment: Segment) -> Lsn {
        self.position(segment.number + 1)
    }

    pub fn position(self, number: u64) -> Lsn {
        Lsn(number.saturating_mul(u64::from(self.0)))
    }

    /// The segments with the bytes from `start` up to `stop`, which is not among them; at least that of `start`.
    pub fn covering(self, timeline: Timeline, start: Lsn, stop: Lsn) -> impl Iterator<Item = Segment> {
        let last = self.number(Lsn(stop.0.saturating_sub(1))).max(self.number(start));
        (self.number(start)..=last).map(move |number| Segment { timeline, number })
    }

    /// PostgreSQL's name of the file.
    pub fn file_name(self, segment: Segment) -> String {
        let (id, part) = (segment.number / self.per_id(), segment.number % self.per_id());
        format!("{:08X}{id:08X}{part:08X}", segment.timeline.0)
    }

    pub fn parse(self, file: &str) -> Option<Segment> {
        let upper = |byte: u8| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte);
        if file.len() != 24 || !file.bytes().all(upper) {
            return None;
        }
        let part = |at: usize| u32::from_str_radix(&file[at..at + 8], 16).ok().map(u64::from);
        let (timeline, id, part) = (part(0)?, part(8)?, part(16)?);
        let number = id * self.per_id() + part;
        (timeline != 0 && part < self.per_id())
            .then_some(Segment { timeline: Timeline(timeline as u32), number })
    }

    /// Compares content with the name it came under. The first pages of a timeline's first segment are the former
    /// timeline's, so an earlier timeline in the page is right.
    pub(crate) fn check(
        self,
        segment: Segment,
        system: SystemId,
        content: &[u8],
        whole: bool,
    ) -> Result<(), SegmentError> {
        let (bytes, wanted) = (content.len(), self.0);
        if bytes > wanted as usize || whole && bytes != wanted as usize {
            return Err(SegmentError::Length { segment, bytes, wanted });
        }
        let header = content.get(..LONG_HEADER_BYTES).ok_or(SegmentError::NoHeader { segment })?;
        let two = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let four = |at: usize| u32::from(two(at)) | u32::from(two(at + 2)) << 16;
        let eight = |at: usize| u64::from(four(at)) | u64::from(four(at + 4)) << 32;
        // The magic number changes with each version of PostgreSQL; all of them begin with the same digit.
        if two(0) >> 12 != 0xD || two(2) & LONG_HEADER == 0 {
            return Err(SegmentError::NoHeader { segment });
        }
        let found = SystemId(eight(24));
        if found != system {
            return Err(SegmentError::OtherSystem { segment, found, wanted: system });
        }
        let found = four(32);
        if found != wanted {
            return Err(SegmentError::OtherSize { segment, found, wanted });
        }
        let (found, wanted) = (Lsn(eight(8)), self.start(segment));
        if found != wanted {
            return Err(SegmentError::OtherPosition { segment, found, wanted });
        }
        let found = Timeline(four(4));
        if found > segment.timeline || found.0 == 0 {
            return Err(SegmentError::LaterTimeline { segment, found });
        }
        Ok(())
    }
}

/// A page header, for tests that make segments.
#[cfg(test)]
pub(crate) fn header(segments: Segments, segment: Segment, system: SystemId) -> Vec<u8> {
    let mut header = vec![0; LONG_HEADER_BYTES];
    header[0..2].copy_from_slice(&0xD110u16.to_le_bytes());
    header[2..4].copy_from_slice(&LONG_HEADER.to_le_bytes());
    header[4..8].copy_from_slice(&segment.timeline.0.to_le_bytes());
    header[8..16].copy_from_slice(&segments.start(segment).0.to_le_bytes());
    header[24..32].copy_from_slice(&system.0.to_le_bytes());
    header[32..36].copy_from_slice(&segments.bytes().to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_09_names_are_postgresqls_for_every_segment_size() {
        let segments = Segments::new(16 << 20).unwrap();
        let segment = Segment { timeline: Timeline(3), number: 0x1_02 };
        assert_eq!(segments.file_name(segment), "000000030000000100000002");
        assert_eq!(segments.start(segment), "1/2000000".parse().unwrap());
        let large = Segments::new(1 << 30).unwrap();
        assert_eq!(large.file_name(segment), "000000030000004000000002");
        for shift in 20..=30 {
            let segments = Segments::new(1 << shift).unwrap();
            for number in [0, 1, 3, 4, 255, 256, 4095, 4096, 1 << 30] {
                let segment = Segment { timeline: Timeline(0xA), number };
                assert_eq!(segments.parse(&segments.file_name(segment)), Some(segment));
                assert_eq!(segments.number(segments.start(segment)), number);
                assert_eq!(segments.number(Lsn(segments.end(segment).0 - 1)), number);
            }
        }
        for wrong in ["", "000000030000000100000100", "00000003000000010000000a", "000000000000000100000001"]
        {
            assert_eq!(segments.parse(wrong), None, "{wrong}");
        }
        for wrong in [0, 1 << 19, 1 << 31, 3 << 20] {
            assert!(Segments::new(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_range_has_the_segments_of_its_bytes() {
        let segments = Segments::new(1 << 20).unwrap();
        let numbers = |start: u64, stop: u64| {
            let covering = segments.covering(Timeline(1), Lsn(start), Lsn(stop));
            covering.map(|segment| segment.number).collect::<Vec<_>>()
        };
        assert_eq!(numbers(1 << 20, 2 << 20), [1], "what ends where a segment ends needs not the next");
        assert_eq!(numbers(1 << 20, (2 << 20) + 1), [1, 2]);
        assert_eq!(numbers(1 << 20, 1 << 20), [1]);
    }

    #[test]
    fn what_a_segment_says_of_itself_must_fit_its_name() {
        let segments = Segments::new(1 << 20).unwrap();
        let system = SystemId(42);
        let segment = Segment { timeline: Timeline(2), number: 7 };
        let content = |segments, segment, system| {
            let mut content = header(segments, segment, system);
            content.resize(1 << 20, 0);
            content
        };
        let check = |content: &[u8], whole| segments.check(segment, system, content, whole);
        let right = content(segments, segment, system);
        assert_eq!(check(&right, true), Ok(()));
        let before = Segment { timeline: Timeline(1), ..segment };
        assert_eq!(
            check(&content(segments, before, system), true),
            Ok(()),
            "the old prefix of a new timeline"
        );
        assert_eq!(check(&right[..9000], false), Ok(()), "a partial one");

        let wrong = check(&content(segments, segment, SystemId(43)), true).unwrap_err();
        assert!(matches!(wrong, SegmentError::OtherSystem { found: SystemId(43), .. }));
        let wrong = check(&content(segments, Segment { number: 8, ..segment }, system), true).unwrap_err();
        assert!(matches!(wrong, SegmentError::OtherPosition { .. }));
        let later = Segment { timeline: Timeline(3), ..segment };
        assert!(matches!(
            check(&content(segments, later, system), true),
            Err(SegmentError::LaterTimeline { .. })
        ));
        let larger = Segments::new(2 << 20).unwrap();
        let other = Segment { number: 7, ..segment };
        assert!(matches!(
            check(&content(larger, other, system), true),
            Err(SegmentError::OtherSize { found, .. }) if found == 2 << 20
        ));
        assert!(matches!(check(&right[..100], true), Err(SegmentError::Length { .. })));
        assert!(matches!(check(&vec![0; 1 << 20], true), Err(SegmentError::NoHeader { .. })));
        assert!(matches!(check(&[], false), Err(SegmentError::NoHeader { .. })));
    }
}
