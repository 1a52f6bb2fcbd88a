//! Whether WAL that somebody gives is what was asked for, and all of it.
//!
//! A file in `pg_wal` may have the right name and be another one's: PostgreSQL renames old segments to names that are still to come, and writes over
//! them from the beginning. It may end in the middle, be of a server that has parted from the herd, or be damaged. So each page has to have its
//! address and the timeline that the line of history had there, records have to be whole, linked, and to lead to the end of it, and what is archived
//! before and behind it has to be joined by records as well.
//!
//! The last record of a segment most often goes on in the next one, and only there it shows whether its beginning was right. So what comes later is looked for first.
//!
//! Left out: who gives it. Hazard: what is archived stays, and is what is restored. A byte that no record has (padding, and the rest of a page behind a switch) may
//! be damaged unseen; recovery does not look at it either.

use pgherd_core::types::{Lsn, SystemId, Timeline};

use super::records::{Ended, Record, Records};
use super::{History, Segment, SegmentError, Segments};

/// Where `xlp_xlog_blcksz` is in the header of a segment's first page.
const PAGE_BYTES_AT: usize = 36;

/// Why it is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("WAL ends in {segment} at {at}: it is not complete, damaged, or what was there before")]
    Ends { segment: Segment, at: Lsn },
    #[error("at {at} {segment} is of timeline {found}, and the herd's history was on timeline {wanted}")]
    OtherTimeline { segment: Segment, at: Lsn, found: Timeline, wanted: Timeline },
    #[error("{segment} has something behind {at}, where it was let go of")]
    BehindSwitch { segment: Segment, at: Lsn },
    #[error("{segment} does not go on where the archived WAL before it ends")]
    DoesNotFollow { segment: Segment },
    #[error("the WAL behind it does not go on where {segment} ends")]
    DoesNotLead { segment: Segment },
    #[error("timeline {} does not end at {until} in {segment}, but at {found}", .segment.timeline)]
    EndsElsewhere { segment: Segment, until: Lsn, found: Lsn },
}

/// What is known of a segment's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Nothing goes on behind it, or the one behind it has shown that it is right.
    Sure,
    /// A record begins at `at` of which the rest was not looked at.
    Open { at: Lsn },
}

/// Which WAL it has to be.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    pub system: SystemId,
    pub segments: Segments,
    /// The line of history that was agreed on. None where it is not known: then only that it is a segment, and complete.
    pub history: Option<&'a History>,
    /// The archived segment before it, if that is on the same line up to its end.
    pub before: Option<&'a [u8]>,
    /// And the one behind it.
    pub behind: Option<&'a [u8]>,
}

/// A whole segment. Without the one behind it its end may have to be taken on trust, which the answer says.
pub fn whole(expected: Expected<'_>, segment: Segment, content: &[u8]) -> Result<Tail, Unfit> {
    let segments = expected.segments;
    segments.check(segment, expected.system, content, true)?;
    let (start, end) = (segments.start(segment), segments.end(segment));
    let mut records = follow(expected, segment);
    let (mut follows, mut switch) = (false, None);
    let ended = records.read(content, |record| {
        follows |= record.end > start;
        if record.is_switch() {
            switch = Some(record.start);
        }
    });
    stopped(ended, follows, segment)?;
    if records.position() != end {
        return Err(Unfit::Ends { segment, at: records.position() });
    }
    pages(expected.history, segments, segment, content, switch)?;
    match (expected.behind, records.end()) {
        (Some(behind), _) => {
            let mut leads = false;
            let ended = records.read(behind, |record| leads |= record.end > end);
            match ended.is_some() && !leads {
                true => Err(Unfit::DoesNotLead { segment }),
                false => Ok(Tail::Sure),
            }
        }
        (None, Ended::Torn(at)) => Ok(Tail::Open { at }),
        (None, Ended::Here(_)) => Ok(Tail::Sure),
    }
}

/// The beginning of a segment in which its timeline was left: all of it up to `until`.
pub fn end(expected: Expected<'_>, segment: Segment, until: Lsn, content: &[u8]) -> Result<(), Unfit> {
    let segments = expected.segments;
    let start = segments.start(segment);
    segments.check(segment, expected.system, content, false)?;
    let found = Lsn(start.0 + content.len() as u64);
    if found != until {
        return Err(Unfit::EndsElsewhere { segment, until, found });
    }
    // Up to the end of the page, as its server has it.
    let mut filled = content.to_vec();
    filled.resize(content.len().next_multiple_of(page_bytes(content)), 0);
    let mut records = follow(expected, segment);
    let mut follows = false;
    let ended = records.read(&filled, |record: &Record<'_>| follows |= record.end > start);
    if records.end() != Ended::Here(until) {
        stopped(ended.filter(|ended| ended.at() < until), follows, segment)?;
        return Err(Unfit::EndsElsewhere { segment, until, found: records.end().at() });
    }
    pages(expected.history, segments, segment, &filled, None)
}

/// Has read what is archived before it, so that the first record has to be linked to that.
fn follow(expected: Expected<'_>, segment: Segment) -> Records {
    let Expected { system, segments, .. } = expected;
    let before = expected.before.zip(segment.number.checked_sub(1)).and_then(|(before, number)| {
        let mut records = Records::new(system, segments, number);
        // If it ends within, nothing can be joined to it, and what is given has to speak for itself.
        records.read(before, |_| {}).is_none().then_some(records)
    });
    before.unwrap_or_else(|| Records::new(system, segments, segment.number))
}

fn stopped(ended: Option<Ended>, follows: bool, segment: Segment) -> Result<(), Unfit> {
    match ended {
        None => Ok(()),
        Some(ended) if follows => Err(Unfit::Ends { segment, at: ended.at() }),
        Some(_) => Err(Unfit::DoesNotFollow { segment }),
    }
}

/// As the first page says; the reader of records has its own opinion of a wrong one.
fn page_bytes(content: &[u8]) -> usize {
    let there = content.get(PAGE_BYTES_AT..PAGE_BYTES_AT + 4);
    let bytes = there.map_or(0, |bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    match bytes.is_power_of_two() && (1024..=64 * 1024).contains(&bytes) {
        true => bytes as usize,
        false => 8192,
    }
}

/// Compares what each page says of its timeline with the history. Behind a switch there are zeros.
fn pages(
    history: Option<&History>,
    segments: Segments,
    segment: Segment,
    content: &[u8],
    switch: Option<Lsn>,
) -> Result<(), Unfit> {
    let bytes = page_bytes(content);
    let start = segments.start(segment);
    // A record without data has a header only, which may go on in the next page.
    let let_go = switch.map(|at| Lsn(at.0 / bytes as u64 * bytes as u64 + 2 * bytes as u64));
    for (number, page) in content.chunks(bytes).enumerate() {
        let at = Lsn(start.0 + (number * bytes) as u64);
        if let_go.is_some_and(|let_go| at >= let_go) {
            if page.iter().any(|byte| *byte != 0) {
                return Err(Unfit::BehindSwitch { segment, at });
            }
            continue;
        }
        let (Some(history), Some(header)) = (history, page.get(..8)) else { continue };
        let found = Timeline(u32::from_le_bytes([header[4], header[5], header[6], header[7]]));
        let wanted = history.timeline_at(at);
        // The page behind that of a switch is zeros, or has the rest of its record.
        let is_empty = switch.is_some_and(|switch| at > switch) && page.iter().all(|byte| *byte == 0);
        if found != wanted && !is_empty {
            return Err(Unfit::OtherTimeline { segment, at, found, wanted });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use crate::wal::Fork;
    use crate::wal::records::tests::{FIRST, Writer};

    const SYSTEM: SystemId = SystemId(42);
    const BYTES: usize = 1 << 20;
    const SWITCH: (u8, u8) = (0, 0x40);

    fn segments() -> Segments {
        Segments::new(BYTES as u32).unwrap()
    }

    fn segment(timeline: u32, number: u64) -> Segment {
        Segment { timeline: Timeline(timeline), number }
    }

    /// Four segments with something in each.
    fn wal(seed: u64) -> Vec<Vec<u8>> {
        let mut writer = Writer::of(SYSTEM);
        fill(&mut writer, &mut Random(seed), 4 * BYTES);
        cut(&writer)
    }

    fn fill(writer: &mut Writer, random: &mut Random, bytes: usize) {
        while writer.bytes.len() < bytes {
            let length = random.below(5000) as usize;
            let data = random.bytes(length);
            writer.write(10, 0, &data);
        }
    }

    fn cut(writer: &Writer) -> Vec<Vec<u8>> {
        writer.filled().chunks(BYTES).map(<[u8]>::to_vec).collect()
    }

    fn expected<'a>(
        history: &'a History,
        before: Option<&'a [u8]>,
        behind: Option<&'a [u8]>,
    ) -> Expected<'a> {
        Expected { system: SYSTEM, segments: segments(), history: Some(history), before, behind }
    }

    #[test]
    fn a_whole_segment_between_its_neighbours_is_taken() {
        let (wal, first) = (wal(1), History::first());
        for before in [None, Some(&wal[0][..])] {
            for behind in [None, Some(&wal[2][..])] {
                let tail = whole(expected(&first, before, behind), segment(1, FIRST + 1), &wal[1]).unwrap();
                assert_eq!(tail == Tail::Sure, behind.is_some(), "its last record goes on");
            }
        }
    }

    #[test]
    fn the_end_of_a_segment_is_only_known_from_the_one_behind_it() {
        let (wal, first) = (wal(2), History::first());
        let (wanted, mut content) = (segment(1, FIRST + 1), wal[1].clone());
        let Ok(Tail::Open { at }) = whole(expected(&first, None, None), wanted, &content) else { panic!() };
        assert!(at < segments().end(wanted));
        content[BYTES - 9..].copy_from_slice(&wal[0][BYTES - 9..]);
        assert_eq!(whole(expected(&first, None, None), wanted, &content), Ok(Tail::Open { at }));
        assert_eq!(
            whole(expected(&first, None, Some(&wal[2])), wanted, &content),
            Err(Unfit::DoesNotLead { segment: wanted })
        );
    }

    #[test]
    fn a_recycled_segment_is_refused_wherever_what_was_there_before_begins() {
        let (wal, first) = (wal(2), History::first());
        let wanted = segment(1, FIRST + 2);
        let old = whole(expected(&first, None, None), wanted, &wal[1]).unwrap_err();
        assert!(matches!(old, Unfit::Segment(SegmentError::OtherPosition { .. })), "{old}");
        // Written over up to some page, and up to the middle of one.
        for written in [8192, 3 * 8192, 3 * 8192 + 700, BYTES - 8192] {
            let mut content = wal[2][..written].to_vec();
            content.extend(&wal[1][written..]);
            let old = whole(expected(&first, None, None), wanted, &content).unwrap_err();
            assert!(matches!(old, Unfit::Ends { .. }), "{written}: {old}");
            content[written..].fill(0);
            let unwritten = whole(expected(&first, None, None), wanted, &content).unwrap_err();
            assert!(matches!(unwritten, Unfit::Ends { .. }), "{written}: {unwritten}");
        }
    }

    #[test]
    fn damage_in_any_record_is_found() {
        let (wal, first) = (wal(3), History::first());
        let mut random = Random(3);
        let (mut refused, tries) = (0, 200);
        for _ in 0..tries {
            let mut content = wal[1].clone();
            let at = random.below(BYTES as u64) as usize;
            content[at] ^= 1 << random.below(8);
            let found =
                whole(expected(&first, Some(&wal[0]), Some(&wal[2])), segment(1, FIRST + 1), &content);
            refused += usize::from(found.is_err());
        }
        // What is not found is padding, and words of headers that mean nothing there.
        assert!(refused >= tries * 95 / 100, "{refused} of {tries}");
    }

    #[test]
    fn another_clusters_or_sizes_wal_is_refused() {
        let (wal, first) = (wal(4), History::first());
        let other = Expected { system: SystemId(43), ..expected(&first, None, None) };
        let refused = whole(other, segment(1, FIRST), &wal[0]).unwrap_err();
        assert!(matches!(refused, Unfit::Segment(SegmentError::OtherSystem { .. })));
        let refused = whole(expected(&first, None, None), segment(1, FIRST), &wal[0][..9000]).unwrap_err();
        assert!(matches!(refused, Unfit::Segment(SegmentError::Length { .. })));
    }

    #[test]
    fn wal_that_is_not_joined_to_its_neighbours_is_refused() {
        // The same places, written by two servers that parted before.
        let (wal, other, first) = (wal(5), wal(6), History::first());
        let wanted = segment(1, FIRST + 1);
        assert!(whole(expected(&first, None, None), wanted, &other[1]).is_ok(), "alone nobody can tell");
        assert_eq!(
            whole(expected(&first, Some(&wal[0]), None), wanted, &other[1]),
            Err(Unfit::DoesNotFollow { segment: wanted })
        );
        assert_eq!(
            whole(expected(&first, None, Some(&wal[2])), wanted, &other[1]),
            Err(Unfit::DoesNotLead { segment: wanted })
        );
    }

    #[test]
    fn behind_a_switch_there_are_zeros() {
        let mut writer = Writer::of(SYSTEM);
        fill(&mut writer, &mut Random(7), BYTES / 2);
        writer.write(SWITCH.0, SWITCH.1, &[]);
        fill(&mut writer, &mut Random(7), 2 * BYTES);
        let (wal, first) = (cut(&writer), History::first());
        let wanted = segment(1, FIRST);
        assert_eq!(whole(expected(&first, None, Some(&wal[1])), wanted, &wal[0]), Ok(Tail::Sure));
        let mut content = wal[0].clone();
        content[BYTES - 5000] = 1;
        let refused = whole(expected(&first, None, Some(&wal[1])), wanted, &content).unwrap_err();
        assert!(matches!(refused, Unfit::BehindSwitch { .. }), "{refused}");
    }

    #[test]
    fn pages_are_of_the_timeline_that_the_history_was_on() {
        let mut writer = Writer::of(SYSTEM);
        fill(&mut writer, &mut Random(8), BYTES / 2);
        let fork = writer.next();
        let mut former = writer.clone();
        writer.timeline = 2;
        fill(&mut writer, &mut Random(9), 2 * BYTES);
        fill(&mut former, &mut Random(10), 2 * BYTES);
        let (wal, former) = (cut(&writer), cut(&former));
        let line = History::new(Timeline(2), vec![Fork { timeline: Timeline(1), until: fork }]).unwrap();
        let wanted = segment(2, FIRST);
        assert_eq!(whole(expected(&line, None, Some(&wal[1])), wanted, &wal[0]), Ok(Tail::Sure));
        // What the former primary wrote behind the fork.
        let refused = whole(expected(&line, None, None), wanted, &former[0]).unwrap_err();
        assert!(matches!(refused, Unfit::OtherTimeline { found: Timeline(1), .. }), "{refused}");
        let elsewhere =
            History::new(Timeline(2), vec![Fork { timeline: Timeline(1), until: Lsn(8192) }]).unwrap();
        let refused = whole(expected(&elsewhere, None, None), wanted, &wal[0]).unwrap_err();
        assert!(matches!(refused, Unfit::OtherTimeline { found: Timeline(1), wanted: Timeline(2), .. }));
        let unknown = Expected { history: None, ..expected(&line, None, None) };
        assert!(whole(unknown, wanted, &wal[0]).is_ok());

        // The end of the old timeline is in all of them.
        let last = segment(1, FIRST);
        let bytes = (fork.0 - segments().start(last).0) as usize;
        for content in [&wal[0], &former[0]] {
            assert_eq!(end(expected(&line, None, None), last, fork, &content[..bytes]), Ok(()));
        }
        let damaged = |at: usize| {
            let mut content = wal[0][..bytes].to_vec();
            content[at] ^= 1;
            end(expected(&line, None, None), last, fork, &content)
        };
        assert!(matches!(damaged(bytes / 2), Err(Unfit::Ends { .. } | Unfit::OtherTimeline { .. })));
        let short = end(expected(&line, None, None), last, fork, &wal[0][..bytes - 8]).unwrap_err();
        assert!(matches!(short, Unfit::EndsElsewhere { .. }), "{short}");
        let further = Lsn(fork.0 + 64);
        let elsewhere = end(expected(&line, None, None), last, further, &former[0][..bytes + 64]);
        assert!(elsewhere.is_err(), "{elsewhere:?}");
    }
}
