//! Holes: what an archive lacks and could have of a server that still keeps it.
//!
//! Asked for is what lies on one line of history, that which the herd has agreed on. A former primary may have written behind the point at which
//! its successor left; that is on no line, and nobody asks for it. Nor is anything asked for that has nothing behind it: a stream brings that.
//!
//! A pure function. Left out: who has it, and whether what somebody gives is that ([`super::offered`]). Hazard: WAL that the herd has given up
//! would come into the archive under a name that a recovery reads.

use std::ops::Range;

use pgherd_core::types::{Lsn, Timeline};

use super::{History, Inventory, Segment, candidates};

/// What is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wanted {
    History(Timeline),
    /// What a timeline has of the segment that it was left in: `until` belongs to the next one.
    End {
        segment: Segment,
        until: Lsn,
    },
    Segment(Segment),
}

/// What is missing of a line of history in a range, in the order in which it is to be archived: histories first, and then by positions. Behind the
/// range a stream may be putting several segments at a time, of which a later one can be there first.
///
/// Segments that timelines ended in may be there without being known to the inventory: `has_end` is asked.
pub fn missing(
    inventory: &Inventory,
    history: &History,
    range: Range<Lsn>,
    has_end: impl Fn(Segment) -> bool,
) -> Vec<Wanted> {
    let segments = inventory.segment_size();
    let (from, first) = (range.start, segments.number(range.start));
    let Some(last) = inventory.last_on(history) else { return Vec::new() };
    let last = last.min(segments.number(Lsn(range.end.0.saturating_sub(1))));
    let mut missing: Vec<Wanted> = history
        .legs()
        .filter(|leg| leg.end.is_none_or(|end| end > from) && segments.number(leg.begin) <= last)
        .map(|leg| leg.timeline)
        .filter(|timeline| *timeline > Timeline(1) && !inventory.has_history(*timeline))
        .map(Wanted::History)
        .collect();
    for number in first..=last {
        let files = candidates(history, segments, number);
        // The newest timeline's comes first, and has what the older ones wrote in the same segment.
        for older in files.iter().skip(1).rev() {
            let Some(until) = older.until.filter(|until| *until > from) else { continue };
            let in_pieces = inventory.beginning_of(older.segment).is_some_and(|end| end >= until);
            if !inventory.has(older.segment) && !in_pieces && !has_end(older.segment) {
                missing.push(Wanted::End { segment: older.segment, until });
            }
        }
        if let Some(newest) = files.first().filter(|file| number < last && !inventory.has(file.segment)) {
            missing.push(Wanted::Segment(newest.segment));
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SEGMENT_BYTES, segment, segments};
    use crate::wal::{Fork, Piece};

    const SEG: u64 = SEGMENT_BYTES as u64;

    fn history(timeline: u32, forks: &[(u32, u64)]) -> History {
        let fork =
            |(timeline, until): &(u32, u64)| Fork { timeline: Timeline(*timeline), until: Lsn(*until) };
        History::new(Timeline(timeline), forks.iter().map(fork).collect()).unwrap()
    }

    fn inventory(there: &[(u32, Range<u64>)], histories: &[History]) -> Inventory {
        let mut inventory = Inventory::new(segments());
        for (timeline, numbers) in there {
            numbers.clone().for_each(|number| inventory.add(segment(*timeline, number)));
        }
        histories.iter().for_each(|history| inventory.add_history(history.clone()));
        inventory
    }

    fn wanted(inventory: &Inventory, history: &History, from: u64) -> Vec<Wanted> {
        missing(inventory, history, Lsn(from)..Lsn(u64::MAX), |_| false)
    }

    #[test]
    fn case_06_what_is_missing_has_something_behind_it() {
        let there = inventory(&[(1, 2..4), (1, 6..9)], &[]);
        let hole = [Wanted::Segment(segment(1, 4)), Wanted::Segment(segment(1, 5))];
        assert_eq!(wanted(&there, &History::first(), 2 * SEG), hole);
        assert_eq!(
            wanted(&there, &History::first(), 5 * SEG + 9),
            hole[1..],
            "no backup needs what is before"
        );
        assert_eq!(wanted(&there, &History::first(), 7 * SEG), [], "behind the last one is no hole");
        assert_eq!(wanted(&inventory(&[], &[]), &History::first(), 0), []);
        let below = |below| missing(&there, &History::first(), Lsn(0)..Lsn(below), |_| false).len();
        assert_eq!([below(4 * SEG), below(6 * SEG), below(6 * SEG + 1)], [2, 3, 4]);
    }

    #[test]
    fn pieces_behind_a_hole_show_it_and_before_one_do_not_close_it() {
        let mut there = inventory(&[(1, 2..4)], &[]);
        there.add_pieces(&[Piece { segment: segment(1, 3 + 1), from: 0, to: 512 }]);
        assert_eq!(wanted(&there, &History::first(), 2 * SEG), [], "it is being written");
        there.add_pieces(&[Piece { segment: segment(1, 5), from: 0, to: 8 }]);
        assert_eq!(wanted(&there, &History::first(), 2 * SEG), [Wanted::Segment(segment(1, 4))]);
    }

    #[test]
    fn nothing_is_wanted_of_a_timeline_behind_where_it_was_left() {
        // Left in the middle of segment 5; the former primary went on up to segment 8.
        let line = history(2, &[(1, 5 * SEG + 100)]);
        let there = inventory(&[(1, 2..3), (1, 7..9), (2, 7..10)], std::slice::from_ref(&line));
        let (end, until) = (segment(1, 5), Lsn(5 * SEG + 100));
        assert_eq!(
            wanted(&there, &line, 2 * SEG),
            [
                Wanted::Segment(segment(1, 3)),
                Wanted::Segment(segment(1, 4)),
                Wanted::End { segment: end, until },
                Wanted::Segment(segment(2, 5)),
                Wanted::Segment(segment(2, 6)),
            ]
        );
        let known = missing(&there, &line, Lsn(2 * SEG)..Lsn(9 * SEG), |segment| segment == end);
        assert!(!known.contains(&Wanted::End { segment: end, until }), "{known:?}");
    }

    #[test]
    fn an_end_that_is_there_as_pieces_or_whole_or_at_an_edge_is_not_wanted() {
        let line = history(2, &[(1, 5 * SEG + 100)]);
        let there = [(1, 2..5), (2, 5..9)];
        let mut pieces = inventory(&there, std::slice::from_ref(&line));
        pieces.add_pieces(&[Piece { segment: segment(1, 5), from: 0, to: 99 }]);
        assert_eq!(wanted(&pieces, &line, 2 * SEG).len(), 1, "a byte is missing");
        pieces.add_pieces(&[Piece { segment: segment(1, 5), from: 0, to: 200 }]);
        assert_eq!(wanted(&pieces, &line, 2 * SEG), []);
        let whole = inventory(&[(1, 2..6), (2, 5..9)], std::slice::from_ref(&line));
        assert_eq!(wanted(&whole, &line, 2 * SEG), []);
        let line = history(2, &[(1, 5 * SEG)]);
        assert_eq!(wanted(&inventory(&there, std::slice::from_ref(&line)), &line, 2 * SEG), []);
    }

    #[test]
    fn histories_on_the_way_are_wanted_as_far_as_anything_is_there() {
        let line = history(9, &[(3, SEG), (4, 3 * SEG), (7, 5 * SEG)]);
        let there = inventory(&[(4, 2..3), (7, 3..5), (9, 5..7)], std::slice::from_ref(&line));
        let of = |timeline| Wanted::History(Timeline(timeline));
        assert_eq!(wanted(&there, &line, 2 * SEG), [of(4), of(7)], "nothing begins on timeline 3");
    }
}
