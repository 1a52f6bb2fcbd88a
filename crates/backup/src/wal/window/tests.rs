//! Windows over holes, forks inside and at the edge of segments, missing histories; and against a slow definition.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::{Fork, History};
use super::*;
use crate::testing::{SEGMENT_BYTES, segment, segments, time};

const SEG: u64 = SEGMENT_BYTES as u64;

fn backup(second: u8, timeline: u32, start: u64, stop: u64) -> BackupRange {
    let time = time(&format!("2026-11-20T00:00:{second:02}Z"));
    let (id, timeline) = (BackupId::at(time), Timeline(timeline));
    BackupRange { id, timeline, start: Lsn(start), stop: Lsn(stop), stopped: time }
}

fn inventory(there: &[(u32, std::ops::Range<u64>)], histories: &[(u32, &[(u32, u64)])]) -> Inventory {
    let mut inventory = Inventory::new(segments());
    for (timeline, numbers) in there {
        numbers.clone().for_each(|number| inventory.add(segment(*timeline, number)));
    }
    for (timeline, forks) in histories {
        let fork =
            |(timeline, until): &(u32, u64)| Fork { timeline: Timeline(*timeline), until: Lsn(*until) };
        let forks = forks.iter().map(fork).collect();
        inventory.add_history(History::new(Timeline(*timeline), forks).unwrap());
    }
    inventory
}

#[test]
fn without_holes_everything_from_the_first_backup_on_is_there() {
    let backups = [backup(1, 1, 2 * SEG + 40, 2 * SEG + 400), backup(2, 1, 5 * SEG, 5 * SEG + 1)];
    let window = window(&backups, &inventory(&[(1, 2..9)], &[]));
    assert_eq!(window.from, Some(backups[0]));
    assert_eq!(window.to, Some((Timeline(1), Lsn(9 * SEG))));
    assert_eq!(window.gaps, []);
}

#[test]
fn case_06_a_hole_breaks_the_window_and_is_shown() {
    let backups = [backup(1, 1, 2 * SEG, 2 * SEG + 9), backup(2, 1, 6 * SEG, 6 * SEG + 9)];
    let window = window(&backups, &inventory(&[(1, 2..4), (1, 5..9)], &[]));
    assert_eq!(window.reaches[0].end, Some((Timeline(1), Lsn(4 * SEG))), "up to the hole");
    assert_eq!(window.from, Some(backups[1]), "from the first backup behind the hole on");
    let gap = Gap { timeline: Timeline(1), from: Lsn(4 * SEG), to: Lsn(5 * SEG) };
    assert_eq!(window.gaps, [gap]);
}

#[test]
fn a_backup_without_its_own_wal_reaches_nowhere() {
    let backups = [backup(1, 1, 2 * SEG, 4 * SEG + 9)];
    let window = window(&backups, &inventory(&[(1, 2..4), (1, 5..9)], &[]));
    assert_eq!((window.reaches[0].end, window.from, window.to), (None, None, None));
    assert_eq!(window.gaps.len(), 1);
    let nothing = super::window(&backups, &inventory(&[], &[]));
    assert_eq!((nothing.from, nothing.to, nothing.gaps), (None, None, Vec::new()));
}

#[test]
fn case_04_a_new_timeline_begins_with_the_old_ones_bytes() {
    // The old timeline's segment 4 stayed a .partial; the new one's has all of it.
    let backups = [backup(1, 1, 2 * SEG, 2 * SEG + 9)];
    let forks: &[(u32, &[(u32, u64)])] = &[(2, &[(1, 4 * SEG + 500)])];
    let window = window(&backups, &inventory(&[(1, 2..4), (2, 4..7)], forks));
    assert_eq!(window.to, Some((Timeline(2), Lsn(7 * SEG))));
    assert_eq!((window.from, window.gaps.len()), (Some(backups[0]), 0));

    // Without the new timeline's first segment there is WAL up to the fork, from the complete old one.
    let window = super::window(&backups, &inventory(&[(1, 2..5), (2, 5..7)], forks));
    assert_eq!(window.to, Some((Timeline(2), Lsn(4 * SEG + 500))));
    let gap = Gap { timeline: Timeline(2), from: Lsn(4 * SEG + 500), to: Lsn(5 * SEG) };
    assert_eq!(window.gaps, [gap], "a complete segment of the old timeline is not the new one's");
}

#[test]
fn case_05_two_switches_in_one_segment() {
    let backups = [backup(1, 1, 2 * SEG, 2 * SEG + 9)];
    let forks: &[(u32, &[(u32, u64)])] =
        &[(2, &[(1, 4 * SEG + 500)]), (3, &[(1, 4 * SEG + 500), (2, 4 * SEG + 900)])];
    let window = window(&backups, &inventory(&[(1, 2..4), (3, 4..6)], forks));
    assert_eq!(window.to, Some((Timeline(3), Lsn(6 * SEG))), "the last one's first segment has all of it");
    assert_eq!(window.gaps, []);
}

#[test]
fn case_23_a_timeline_that_does_not_pass_through_a_backup_is_not_its_way() {
    // Timeline 2 left before the backup ended, so the backup stays on timeline 1.
    let backups = [backup(1, 1, 4 * SEG, 4 * SEG + 900)];
    let forks: &[(u32, &[(u32, u64)])] = &[(2, &[(1, 4 * SEG + 500)])];
    let window = window(&backups, &inventory(&[(1, 4..6), (2, 4..9)], forks));
    assert_eq!(window.reaches[0].target, Timeline(1));
    assert_eq!(window.to, Some((Timeline(1), Lsn(6 * SEG))));
    // A backup of a timeline whose history is missing reaches nowhere.
    let lost = super::window(&[backup(1, 3, 4 * SEG, 5 * SEG)], &inventory(&[(3, 4..9)], forks));
    assert_eq!(lost.to, None);
}

#[test]
fn pieces_lead_on_where_nothing_lies_behind_them() {
    let backups = [backup(1, 1, 2 * SEG, 2 * SEG + 9)];
    let piece = |timeline, number, from, to| Piece { segment: segment(timeline, number), from, to };
    let mut there = inventory(&[(1, 2..4)], &[]);
    there.add_pieces(&[piece(1, 4, 0, 100), piece(1, 4, 100, 300), piece(1, 4, 301, 400)]);
    assert_eq!(window(&backups, &there).to, Some((Timeline(1), Lsn(4 * SEG + 300))));
    // With something behind them it is a hole.
    there.add(segment(1, 5));
    let holed = window(&backups, &there);
    assert_eq!(holed.to, Some((Timeline(1), Lsn(4 * SEG))));
    assert_eq!(holed.gaps.len(), 1);

    // The old timeline's pieces count up to the fork, and the new one's, which repeat them, further.
    let forks: &[(u32, &[(u32, u64)])] = &[(2, &[(1, 4 * SEG + 200)])];
    let mut there = inventory(&[(1, 2..4)], forks);
    there.add_pieces(&[piece(1, 4, 0, 300)]);
    assert_eq!(window(&backups, &there).to, Some((Timeline(2), Lsn(4 * SEG + 200))));
    there.add_pieces(&[piece(2, 4, 0, 250)]);
    assert_eq!(window(&backups, &there).to, Some((Timeline(2), Lsn(4 * SEG + 250))));
    // A backup whose own end is in a piece is complete.
    let late = [backup(1, 2, 4 * SEG + 10, 4 * SEG + 240)];
    assert_eq!(window(&late, &there).reaches[0].end, Some((Timeline(2), Lsn(4 * SEG + 250))));
}

#[test]
fn a_timeline_that_was_left_where_it_began_has_the_bytes_before() {
    let forks: &[(u32, &[(u32, u64)])] =
        &[(2, &[(1, 5 * SEG + 300)]), (3, &[(1, 5 * SEG + 300), (2, 5 * SEG + 300)])];
    let backups = [backup(1, 1, 4 * SEG, 4 * SEG + 9)];
    // PostgreSQL asks for the segment of timeline 3, then of 2, which is there.
    let window = window(&backups, &inventory(&[(1, 4..5), (2, 5..6), (3, 6..7)], forks));
    assert_eq!(window.reaches[0].end, Some((Timeline(3), Lsn(5 * SEG + 300))));
}

/// A position can be read if it is in a file of the way that has the byte: its own timeline's segment, or the first one of
/// a later timeline that begins behind it in the same segment.
fn readable(history: &History, inventory: &Inventory, position: u64) -> bool {
    let number = position / SEG;
    let own = history.timeline_at(Lsn(position));
    let mut timelines = vec![own];
    let forks = history.forks();
    for (at, fork) in forks.iter().enumerate() {
        // Whoever left `fork.timeline` inside this segment and behind the position has its bytes too; also one that was left
        // where it had begun.
        if fork.until.0 > position && fork.until.0 / SEG == number {
            timelines.push(forks.get(at + 1).map_or(history.timeline(), |next| next.timeline));
        }
    }
    timelines.iter().any(|timeline| inventory.has(Segment { timeline: *timeline, number }))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn the_window_is_what_can_be_read_byte_by_byte(
        first in 0u64..6 * 8,
        second in 0u64..6 * 8,
        missing in proptest::collection::btree_set((1u32..4, 0u64..7), 0..8),
        start in 1u64..4 * 8,
    ) {
        // Positions in eighths of a segment; forks anywhere, also at edges and in one segment.
        let eighth = SEG / 8;
        let (first, second) = (first.min(second) * eighth, first.max(second) * eighth);
        let forks: &[(u32, &[(u32, u64)])] = &[(2, &[(1, first)]), (3, &[(1, first), (2, second)])];
        let mut there = inventory(&[], forks);
        for (timeline, number) in (1..4).flat_map(|timeline| (0..7).map(move |number| (timeline, number))) {
            if !missing.contains(&(timeline, number)) {
                there.add(segment(timeline, number));
            }
        }
        let begin = start * eighth;
        let history = History::new(
            Timeline(3),
            vec![Fork { timeline: Timeline(1), until: Lsn(first) }, Fork { timeline: Timeline(2), until: Lsn(second) }],
        ).unwrap();
        let at = history.timeline_at(Lsn(begin));
        let ranges = [backup(1, at.0, begin, begin)];
        // Only where the backup's end is on this way.
        prop_assume!(history.passes(at, Lsn(begin)));
        let window = window(&ranges, &there);
        let last = there.numbers(&history, begin / SEG).last().map_or(0, |last| (last + 1) * SEG);
        let mut end = begin;
        while end < last && readable(&history, &there, end) {
            end += eighth;
        }
        let found = window.reaches[0].end.map(|(_, end)| end.0);
        prop_assert_eq!(found, (end > begin).then_some(end));
        // Gaps are what cannot be read and has something behind it.
        let positions = |from: u64, to: u64| (from..to).step_by(eighth as usize);
        let unreadable: BTreeSet<u64> =
            positions(begin, last).filter(|position| !readable(&history, &there, *position)).collect();
        let behind = positions(begin, last).filter(|position| readable(&history, &there, *position)).max();
        let expected: BTreeSet<u64> =
            unreadable.into_iter().filter(|position| behind.is_some_and(|behind| *position < behind)).collect();
        let shown: BTreeSet<u64> =
            window.gaps.iter().flat_map(|gap| positions(gap.from.0, gap.to.0)).collect();
        prop_assert_eq!(shown, expected);
    }
}

/// Timeline and number of a file, and where what counts of it ends before it does.
type ShortFile = (u32, u64, Option<u64>);

/// What recovery reads.
fn files(inventory: &Inventory, timeline: u32, first: u64) -> (Vec<ShortFile>, Option<Gap>) {
    let files = inventory.files(inventory.history(Timeline(timeline)).unwrap(), first);
    let short =
        |file: &ArchivedFile| (file.segment.timeline.0, file.segment.number, file.until.map(|until| until.0));
    (files.present.iter().map(short).collect(), files.gap)
}

#[test]
fn recovery_reads_the_newest_timelines_file_of_each_segment() {
    let fork = 3 * SEG + 100;
    let whole = inventory(&[(1, 1..6), (2, 3..5)], &[(2, &[(1, fork)])]);
    assert_eq!(files(&whole, 2, 1), (vec![(1, 1, None), (1, 2, None), (2, 3, None), (2, 4, None)], None));
    assert_eq!(files(&whole, 1, 4).0, [(1, 4, None), (1, 5, None)], "the line that was left");
    // The new timeline's first file is not there: the old one's is read up to the fork, and then nothing.
    let without = inventory(&[(1, 1..6), (2, 4..5)], &[(2, &[(1, fork)])]);
    let gap = Gap { timeline: Timeline(2), from: Lsn(fork), to: Lsn(4 * SEG) };
    assert_eq!(files(&without, 2, 2), (vec![(1, 2, None), (1, 3, Some(fork))], Some(gap)));
    // Left at the edge of a segment, the older file has nothing of the newer line, and the newer nothing of the older.
    let edge = inventory(&[(1, 1..6), (2, 3..5)], &[(2, &[(1, 3 * SEG)])]);
    assert_eq!(files(&edge, 2, 2).0, [(1, 2, None), (2, 3, None), (2, 4, None)]);
    // Two forks in one segment.
    let twice = inventory(
        &[(1, 1..4), (2, 2..3), (3, 2..4)],
        &[(2, &[(1, 2 * SEG + 8)]), (3, &[(1, 2 * SEG + 8), (2, 2 * SEG + 16)])],
    );
    assert_eq!(files(&twice, 3, 1).0, [(1, 1, None), (3, 2, None), (3, 3, None)]);
}

#[test]
fn recovery_reads_up_to_a_hole() {
    let hole = inventory(&[(1, 1..3), (1, 4..6)], &[]);
    let gap = Gap { timeline: Timeline(1), from: Lsn(3 * SEG), to: Lsn(4 * SEG) };
    assert_eq!(files(&hole, 1, 1), (vec![(1, 1, None), (1, 2, None)], Some(gap)));
    assert_eq!(files(&hole, 1, 4), (vec![(1, 4, None), (1, 5, None)], None), "nothing is behind the end");
    assert_eq!(files(&hole, 1, 3).0, [], "the first one is missing");
    assert_eq!(files(&hole, 1, 9), (Vec::new(), None));
}
