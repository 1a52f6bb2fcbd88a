//! From when to when any moment can be restored: the recovery window, from what is really there.
//!
//! A backup reaches as far as its WAL has no hole, along a history that passes through it. Where a timeline left another
//! inside a segment, the new timeline's first segment begins with the old one's bytes, so either file will do up to that
//! position, and only the new one behind it.
//!
//! A pure function: what it looks at is an [`Inventory`] and the ranges of the backups. Left out: times of commits, which
//! are in the records. Hazard: a window that is wider than what can be restored; so a hole counts wherever it is.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use pgherd_core::types::{Lsn, Timeline};

use super::{History, Piece, Segment, Segments, piece};
use crate::manifest::Manifest;
use crate::name::BackupId;

/// Which segments and histories are there.
#[derive(Clone, Debug)]
pub struct Inventory {
    segments: Segments,
    there: BTreeMap<Timeline, BTreeSet<u64>>,
    histories: BTreeMap<Timeline, History>,
    /// Up to where the pieces of a segment that is not complete lead from its beginning.
    beginnings: BTreeMap<Segment, Lsn>,
}

impl Inventory {
    pub fn new(segments: Segments) -> Inventory {
        let histories = BTreeMap::from([(Timeline(1), History::first())]);
        Inventory { segments, there: BTreeMap::new(), histories, beginnings: BTreeMap::new() }
    }

    /// The size of what is counted here.
    pub(crate) fn segment_size(&self) -> Segments {
        self.segments
    }

    pub fn add(&mut self, segment: Segment) {
        self.there.entry(segment.timeline).or_default().insert(segment.number);
    }

    pub fn add_history(&mut self, history: History) {
        self.histories.insert(history.timeline(), history);
    }

    pub fn has(&self, segment: Segment) -> bool {
        self.there.get(&segment.timeline).is_some_and(|numbers| numbers.contains(&segment.number))
    }

    /// The pieces of one segment.
    pub fn add_pieces(&mut self, pieces: &[Piece]) {
        if let Some(last) = piece::joined(pieces).last() {
            let end = Lsn(self.segments.start(last.segment).0 + u64::from(last.to));
            self.beginnings.insert(last.segment, end);
        }
    }

    /// Up to where there is something of a segment that is not complete.
    pub fn beginning_of(&self, segment: Segment) -> Option<Lsn> {
        self.beginnings.get(&segment).copied()
    }

    /// The highest number of a timeline's segments of which there is something and not all.
    pub fn last_beginning(&self, timeline: Timeline) -> Option<u64> {
        let all = Segment { timeline, number: 0 }..=Segment { timeline, number: u64::MAX };
        self.beginnings.range(all).next_back().map(|(segment, _)| segment.number)
    }

    pub fn has_history(&self, timeline: Timeline) -> bool {
        self.histories.contains_key(&timeline)
    }

    /// The latest timeline of which anything is there; `None` if nothing is.
    pub fn newest_timeline(&self) -> Option<Timeline> {
        // The history of timeline 1 is nobody's file.
        let histories = self.histories.keys().filter(|timeline| **timeline > Timeline(1));
        let beginnings = self.beginnings.keys().map(|segment| &segment.timeline);
        histories.chain(self.there.keys()).chain(beginnings).max().copied()
    }

    /// The lowest and the highest number of a timeline's segments.
    pub fn range_of(&self, timeline: Timeline) -> Option<(u64, u64)> {
        let numbers = self.there.get(&timeline)?;
        Some((*numbers.first()?, *numbers.last()?))
    }

    pub fn segments(&self) -> impl Iterator<Item = Segment> {
        self.there.iter().flat_map(|(timeline, numbers)| {
            numbers.iter().map(|number| Segment { timeline: *timeline, number: *number })
        })
    }

    pub fn history(&self, timeline: Timeline) -> Option<&History> {
        self.histories.get(&timeline)
    }

    /// In order of their timelines.
    pub fn histories(&self) -> impl DoubleEndedIterator<Item = &History> {
        self.histories.values()
    }

    /// The highest number of which anything is there on a line of history.
    pub(crate) fn last_on(&self, history: &History) -> Option<u64> {
        let on_leg = |leg: super::history::Leg| {
            let pieces = self.last_beginning(leg.timeline);
            let last = self.range_of(leg.timeline).map(|(_, last)| last).max(pieces)?;
            // What was written behind the point at which it was left is not on the line.
            Some(leg.end.map_or(last, |end| last.min(self.segments.number(Lsn(end.0.saturating_sub(1))))))
        };
        history.legs().filter_map(on_leg).max()
    }

    /// The lowest number of a segment that is there on a line of history.
    pub fn first_on(&self, history: &History) -> Option<u64> {
        history.legs().filter_map(|leg| Some(self.range_of(leg.timeline)?.0)).min()
    }

    /// The file that a recovery along a line of history reads at a number, if it goes on that way up to the end of it.
    pub fn whole_on(&self, history: &History, number: u64) -> Option<Segment> {
        let newest = candidates(history, self.segments, number).into_iter().next()?.segment;
        self.has(newest).then_some(newest)
    }

    /// Which files a recovery along a line of history reads from the segment `first` on, until one is not there.
    pub fn files(&self, history: &History, first: u64) -> Files {
        let mut files = Files { present: Vec::new(), gap: None };
        let numbers = self.numbers(history, first);
        let Some(last) = numbers.last().copied() else { return files };
        for number in first..=last {
            let candidates = candidates(history, self.segments, number);
            let there = candidates.iter().position(|file| self.has(file.segment));
            let missing_from = match there {
                Some(at) => {
                    files.present.push(candidates[at]);
                    candidates[at].until
                }
                None => Some(self.segments.position(number)),
            };
            if let Some(from) = missing_from {
                // At the end it is no hole: nothing is behind it.
                let next = numbers.range(number + 1..).next();
                let timeline = history.timeline_at(from);
                files.gap = next.map(|next| Gap { timeline, from, to: self.segments.position(*next) });
                break;
            }
        }
        files
    }

    /// The numbers from `first` on of which there is a file on some timeline of a way.
    fn numbers(&self, history: &History, first: u64) -> BTreeSet<u64> {
        let there = history.legs().filter_map(|leg| self.there.get(&leg.timeline));
        there.flat_map(|numbers| numbers.range(first..).copied()).collect()
    }
}

/// What a recovery reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    pub present: Vec<ArchivedFile>,
    /// What is missing behind them, if something is there behind that.
    pub gap: Option<Gap>,
}

/// A file of the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArchivedFile {
    pub segment: Segment,
    /// Where its line of history was left, if what is behind that is in another file.
    pub until: Option<Lsn>,
}

/// Which files can have a segment of a line of history, the one that has most first: as PostgreSQL does, since a newer timeline's
/// file has what the older ones wrote in the same segment, too.
pub(crate) fn candidates(history: &History, segments: Segments, number: u64) -> Vec<ArchivedFile> {
    let (begin, end) = (segments.position(number), segments.position(number + 1));
    let in_it = |leg: &super::history::Leg| leg.begin < end && leg.end.is_none_or(|until| until > begin);
    let mut legs: Vec<super::history::Leg> = history.legs().filter(in_it).collect();
    legs.reverse();
    let file = |(at, leg): (usize, &super::history::Leg)| {
        let segment = Segment { timeline: leg.timeline, number };
        ArchivedFile { segment, until: leg.end.filter(|_| at > 0) }
    };
    legs.iter().enumerate().map(file).collect()
}

/// What counts of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupRange {
    pub id: BackupId,
    pub timeline: Timeline,
    pub start: Lsn,
    pub stop: Lsn,
    pub stopped: Timestamp,
}

impl From<&Manifest> for BackupRange {
    fn from(manifest: &Manifest) -> BackupRange {
        BackupRange {
            id: manifest.id,
            timeline: manifest.timeline,
            start: manifest.start,
            stop: manifest.stop,
            stopped: manifest.facts.stopped,
        }
    }
}

/// WAL that is missing, with something behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gap {
    /// The timeline that the first missing byte belongs to.
    pub timeline: Timeline,
    pub from: Lsn,
    pub to: Lsn,
}

/// How far a backup can be recovered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    pub backup: BackupRange,
    /// Where the way leads: the latest timeline that descends from the backup.
    pub target: Timeline,
    /// The first position whose WAL is not there, and its timeline. None if WAL of the backup itself is missing.
    pub end: Option<(Timeline, Lsn)>,
}

/// From when to when any moment can be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// One for each backup, the oldest first.
    pub reaches: Vec<Reach>,
    /// The oldest backup from whose end on every moment up to the last position can be restored.
    pub from: Option<BackupRange>,
    /// The last position, on the latest timeline.
    pub to: Option<(Timeline, Lsn)>,
    pub gaps: Vec<Gap>,
}

pub fn window(backups: &[BackupRange], inventory: &Inventory) -> Window {
    let mut gaps = BTreeSet::new();
    let mut reaches: Vec<Reach> = backups.iter().map(|backup| reach(backup, inventory, &mut gaps)).collect();
    reaches.sort_by_key(|reach| reach.backup.id);
    // The end that counts is that of the latest timeline; on an older one is a branch that was left.
    let to = reaches.iter().filter_map(|reach| Some((reach.target, reach.end?))).max().map(|(_, end)| end);
    let from = reaches.iter().find(|reach| to.is_some() && reach.end == to).map(|reach| reach.backup);
    Window { reaches, from, to, gaps: gaps.into_iter().collect() }
}

fn reach(backup: &BackupRange, inventory: &Inventory, gaps: &mut BTreeSet<Gap>) -> Reach {
    let descends = |history: &&History| history.passes(backup.timeline, backup.stop);
    let Some(history) = inventory.histories.values().rev().find(descends) else {
        // The history of its own timeline is missing: nothing can be recovered along it.
        return Reach { backup: *backup, target: backup.timeline, end: None };
    };
    let segments = inventory.segments;
    let first = segments.number(backup.start);
    let (mut end, mut missing) = (None, None);
    let mut position = backup.start;
    for number in inventory.numbers(history, first) {
        let begin = segments.position(number).max(backup.start);
        if begin > position && missing.is_none() {
            missing = Some((history.timeline_at(position), position));
            end = end.or(missing);
        }
        position = begin;
        for (timeline, from, to) in pieces(history, segments, number, position) {
            match (covers(history, inventory, number, timeline, to), missing) {
                (true, Some((timeline, begin))) => {
                    gaps.insert(Gap { timeline, from: begin, to: from });
                    missing = None;
                }
                (false, None) => {
                    missing = Some((timeline, from));
                    end = end.or(missing);
                }
                _ => {}
            }
        }
        position = segments.position(number + 1);
    }
    let end = end.unwrap_or_else(|| {
        let position = with_pieces(history, inventory, position);
        (history.timeline_at(position), position)
    });
    // Up to a position is enough of it: the byte there is not needed.
    Reach {
        backup: *backup,
        target: history.timeline(),
        end: (end.1 >= backup.stop && end.1 > backup.start).then_some(end),
    }
}

/// How much further pieces lead behind which there is nothing.
fn with_pieces(history: &History, inventory: &Inventory, position: Lsn) -> Lsn {
    let number = inventory.segments.number(position);
    let reach = |leg: super::history::Leg| {
        let end = inventory.beginning_of(Segment { timeline: leg.timeline, number })?;
        Some(leg.end.map_or(end, |leg| leg.min(end)))
    };
    history.legs().filter_map(reach).max().map_or(position, |reach| reach.max(position))
}

/// A segment cut at the forks inside it: timeline, begin and end of each piece from `position` on.
fn pieces(history: &History, segments: Segments, number: u64, position: Lsn) -> Vec<(Timeline, Lsn, Lsn)> {
    let (begin, end) = (segments.position(number).max(position), segments.position(number + 1));
    let piece = |leg: super::history::Leg| {
        let (from, to) = (leg.begin.max(begin), leg.end.map_or(end, |leg| leg.min(end)));
        (from < to).then_some((leg.timeline, from, to))
    };
    history.legs().filter_map(piece).collect()
}

/// Whether a piece of a segment that ends at `to` is there: in a file of its own timeline, or in that of a later one that
/// begins in this segment and repeats what was before.
fn covers(history: &History, inventory: &Inventory, number: u64, timeline: Timeline, to: Lsn) -> bool {
    let has = |timeline| inventory.has(Segment { timeline, number });
    let later = |leg: super::history::Leg| {
        leg.timeline > timeline && leg.begin >= to && inventory.segments.number(leg.begin) == number
    };
    has(timeline) || history.legs().any(|leg| later(leg) && has(leg.timeline))
}

#[cfg(test)]
mod tests;
