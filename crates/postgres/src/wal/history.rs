//! Timeline history files: which line of history a position belongs to.
//!
//! Also the placeholders that make PostgreSQL pass over a reserved number: it takes the number behind the last
//! history file that exists without a gap. A placeholder holds a comment only, so it is nobody's descendant:
//! a standby that meets one logs it and stays where it is.
//!
//! Hazard: two promotions with one number leave two histories that no tool tells apart (S3).

use std::path::Path;

use pgherd_core::types::{Lsn, Timeline};

use crate::durable;
use crate::error::{Error, Result};
use crate::wal::history_path;

/// A line of history: its timeline, and the forks that led to it, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    timeline: Timeline,
    /// Timelines rise, and ends do not fall.
    forks: Vec<Fork>,
}

/// One line of a history file: `timeline` was left at `end`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fork {
    pub timeline: Timeline,
    pub end: Lsn,
    pub reason: String,
}

impl History {
    /// That of a timeline without ancestors.
    pub fn root(timeline: Timeline) -> History {
        History { timeline, forks: Vec::new() }
    }

    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    pub fn forks(&self) -> &[Fork] {
        &self.forks
    }

    /// Of a number that was reserved and not taken: a history without any fork can only be that of timeline 1.
    pub fn is_placeholder(&self) -> bool {
        self.forks.is_empty() && self.timeline > Timeline(1)
    }

    /// Newest first.
    pub fn timelines(&self) -> impl Iterator<Item = Timeline> {
        std::iter::once(self.timeline).chain(self.forks.iter().rev().map(|fork| fork.timeline))
    }

    /// The timeline that writes the byte at `lsn`.
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        let left = self.forks.partition_point(|fork| fork.end <= lsn);
        self.forks.get(left).map_or(self.timeline, |fork| fork.timeline)
    }

    /// From where `timeline` writes in this history, if it belongs to it.
    pub fn begin_of(&self, timeline: Timeline) -> Option<Lsn> {
        let at = match self.place_of(timeline) {
            Some(at) => at,
            None if timeline == self.timeline => self.forks.len(),
            None => return None,
        };
        Some(self.begin(at))
    }

    /// Of the fork that `timeline` was left by. Herds that have failed over for years have many of them, and they are looked
    /// up for every record that is read.
    fn place_of(&self, timeline: Timeline) -> Option<usize> {
        self.forks.binary_search_by_key(&timeline, |fork| fork.timeline).ok()
    }

    fn begin(&self, at: usize) -> Lsn {
        at.checked_sub(1).map_or(Lsn::ZERO, |before| self.forks[before].end)
    }

    /// Timelines that had begun before `before` and had not been left by `at`; newest first.
    pub fn writers(&self, at: Lsn, before: Lsn) -> impl Iterator<Item = Timeline> {
        let first = self.forks.partition_point(|fork| fork.end <= at);
        let last = self.forks.partition_point(|fork| fork.end < before);
        let line = |at: usize| self.forks.get(at).map_or(self.timeline, |fork| fork.timeline);
        (first..=last).rev().map(line)
    }

    /// Where `timeline` was left in this history: `None` for its last one, and for one it never had.
    pub fn end_of(&self, timeline: Timeline) -> Option<Lsn> {
        self.place_of(timeline).map(|at| self.forks[at].end)
    }

    /// True if what was written on `timeline` up to `lsn` is part of this history.
    pub fn contains(&self, timeline: Timeline, lsn: Lsn) -> bool {
        match self.end_of(timeline) {
            Some(end) => lsn <= end,
            None => timeline == self.timeline,
        }
    }

    /// Where two histories part: the end of what they share.
    pub fn common_with(&self, other: &History) -> Option<(Timeline, Lsn)> {
        let line = |history: &History| {
            let mut line: Vec<_> = history.forks.iter().map(|fork| (fork.timeline, fork.end)).collect();
            line.push((history.timeline, Lsn(u64::MAX)));
            line
        };
        let (ours, theirs) = (line(self), line(other));
        let shared = ours.iter().zip(&theirs).take_while(|(a, b)| a.0 == b.0);
        let mut common = None;
        for ((timeline, end), (_, their_end)) in shared {
            common = Some((*timeline, *end.min(their_end)));
            if end != their_end {
                break;
            }
        }
        common
    }

    pub fn parse(timeline: Timeline, text: &str) -> Result<History, String> {
        let mut forks: Vec<Fork> = Vec::new();
        for line in text.lines() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut fields = line.splitn(3, char::is_whitespace);
            let number = fields.next().and_then(|field| field.parse().ok()).map(Timeline);
            let end = fields.next().and_then(|field| field.parse().ok());
            let (Some(number), Some(end)) = (number, end) else {
                return Err(format!("\"{line}\" is not a line of a timeline history"));
            };
            if forks.last().is_some_and(|last| number <= last.timeline || end < last.end)
                || number >= timeline
            {
                return Err(format!("timeline {number} is out of order"));
            }
            forks.push(Fork { timeline: number, end, reason: fields.next().unwrap_or("").trim().to_owned() });
        }
        Ok(History { timeline, forks })
    }

    /// Reads it from `pg_wal`. `None` where there is no file, which is normal for timeline 1. Blocks.
    pub fn read(pg_wal: &Path, timeline: Timeline) -> Result<Option<History>> {
        let path = history_path(pg_wal, timeline);
        let Some(text) = durable::read_text(&path)? else { return Ok(None) };
        History::parse(timeline, &text).map(Some).map_err(|what| Error::damaged(&path, what))
    }

    /// The newest history in `pg_wal` that goes on from `lsn` on `timeline`, looking without gaps as PostgreSQL
    /// does; the one of `timeline` itself if there is none. Blocks.
    pub fn newest_from(pg_wal: &Path, timeline: Timeline, lsn: Lsn) -> Result<History> {
        let mut newest = History::read(pg_wal, timeline)?.unwrap_or(History::root(timeline));
        let mut next = Timeline(timeline.0.saturating_add(1));
        while let Some(history) = History::read(pg_wal, next)? {
            if history.timeline != timeline && history.end_of(timeline).is_some_and(|end| lsn <= end) {
                newest = history;
            }
            next = Timeline(next.0.saturating_add(1));
        }
        Ok(newest)
    }
}

/// Makes PostgreSQL's next promotion here take the number `reserved`: every lower number behind `current` that
/// has no history file gets a placeholder. Blocks.
///
/// The placeholders stay: a follower asks its upstream for each history file between its own timeline and the
/// newest, and cannot stream while one is missing.
pub fn reserve(pg_wal: &Path, current: Timeline, reserved: Timeline) -> Result<(), ReserveError> {
    if reserved <= current {
        return Err(ReserveError::NotAhead { current, reserved });
    }
    // A file at or above the number is the trace of a promotion: a standby that has it would follow it. Nothing
    // here may remove it.
    if let Some((timeline, _)) = files(pg_wal)?.into_iter().find(|(timeline, _)| *timeline >= reserved) {
        return Err(ReserveError::Taken { timeline, reserved });
    }
    for number in current.0 + 1..reserved.0 {
        let path = history_path(pg_wal, Timeline(number));
        if !path.exists() {
            // Synced with the directory when PostgreSQL writes the real one; and one that is empty does as well.
            std::fs::write(&path, placeholder(Timeline(number))).map_err(Error::io("write", &path))?;
        }
    }
    Ok(())
}

/// The history file of a number that no timeline on the way to a later one has. PostgreSQL looks for the newest timeline without gaps.
pub fn placeholder(reserved: Timeline) -> String {
    format!("# timeline {reserved} was reserved and has no history\n")
}

/// Removes the placeholders behind the newest real history: a start would take the last of them for the timeline
/// to follow and fail. They are left by a promotion that did not happen, or by a receiver that was killed while
/// it fetched them. Only for a stopped server. Blocks.
pub(crate) fn drop_unused_placeholders(pg_wal: &Path) -> Result<()> {
    for (timeline, history) in files(pg_wal)?.into_iter().rev() {
        if !history.is_placeholder() {
            break;
        }
        durable::remove(&history_path(pg_wal, timeline))?;
    }
    Ok(())
}

/// Every history file in `pg_wal`, lowest number first.
pub(crate) fn files(pg_wal: &Path) -> Result<Vec<(Timeline, History)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(pg_wal).map_err(Error::io("list", pg_wal))? {
        let name = entry.map_err(Error::io("list", pg_wal))?.file_name();
        let number =
            name.to_str().and_then(|name| name.strip_suffix(".history")).filter(|hex| hex.len() == 8);
        let Some(Ok(number)) = number.map(|hex| u32::from_str_radix(hex, 16)) else { continue };
        if let Some(history) = History::read(pg_wal, Timeline(number))? {
            found.push((Timeline(number), history));
        }
    }
    found.sort_unstable_by_key(|(timeline, _)| *timeline);
    Ok(found)
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    #[error("timeline {reserved} cannot follow timeline {current}")]
    NotAhead { current: Timeline, reserved: Timeline },
    #[error("timeline {reserved} cannot be taken: pg_wal has the history of timeline {timeline}")]
    Taken { timeline: Timeline, reserved: Timeline },
    #[error(transparent)]
    Other(#[from] Error),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn history(timeline: u32, text: &str) -> History {
        History::parse(Timeline(timeline), text).unwrap()
    }

    const THREE: &str =
        "1\t0/3000098\tno recovery target specified\n\n2\t0/5000000\tno recovery target specified\n";

    #[test]
    fn a_position_belongs_to_the_timeline_that_wrote_it() {
        let history = history(3, THREE);
        assert_eq!(history.timeline_at(Lsn(0x3000097)), Timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x3000098)), Timeline(2));
        assert_eq!(history.timeline_at(Lsn(0x9000000)), Timeline(3));
        assert_eq!(history.begin_of(Timeline(1)), Some(Lsn(0)));
        assert_eq!(history.begin_of(Timeline(3)), Some(Lsn(0x5000000)));
        assert_eq!(history.begin_of(Timeline(4)), None);
        assert!(history.contains(Timeline(1), Lsn(0x3000098)));
        assert!(!history.contains(Timeline(1), Lsn(0x3000099)), "it was written behind the fork");
        assert!(history.contains(Timeline(3), Lsn(u64::MAX)));
    }

    #[test]
    fn where_two_histories_part() {
        let three = history(3, THREE);
        let four = history(4, "1\t0/3000098\tx\n2\t0/4000000\tx\n");
        assert_eq!(three.common_with(&four), Some((Timeline(2), Lsn(0x4000000))));
        assert_eq!(three.common_with(&history(5, "1\t0/2000000\tx\n")), Some((Timeline(1), Lsn(0x2000000))));
        assert_eq!(three.common_with(&three.clone()), Some((Timeline(3), Lsn(u64::MAX))));
        assert_eq!(three.common_with(&History::root(Timeline(9))), None);
    }

    #[test]
    fn a_broken_history_is_refused() {
        for text in ["1 0/1 x\n1 0/2 x", "2 0/1 x", "x 0/1", "1\n", "1\t0/5\tx\n2\t0/4\tx\n"] {
            let timeline = Timeline(if text.starts_with('2') { 2 } else { 3 });
            assert!(History::parse(timeline, text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_placeholder_is_nobodys_descendant() {
        let dir = tempfile::tempdir().unwrap();
        reserve(dir.path(), Timeline(1), Timeline(4)).unwrap();
        assert!(!history_path(dir.path(), Timeline(4)).exists());
        let newest = History::newest_from(dir.path(), Timeline(1), Lsn(0x100)).unwrap();
        assert_eq!(newest, History::root(Timeline(1)));
        std::fs::write(history_path(dir.path(), Timeline(4)), "1\t0/200\tx\n").unwrap();
        let newest = |lsn| History::newest_from(dir.path(), Timeline(1), Lsn(lsn)).unwrap().timeline();
        assert_eq!(newest(0x200), Timeline(4), "found behind the placeholders");
        assert_eq!(newest(0x201), Timeline(1), "it forked before this position");
    }

    #[test]
    fn a_number_that_is_taken_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(history_path(dir.path(), Timeline(3)), "1\t0/200\tx\n").unwrap();
        for reserved in [2, 3] {
            let refused = reserve(dir.path(), Timeline(1), Timeline(reserved));
            assert!(matches!(refused, Err(ReserveError::Taken { timeline: Timeline(3), .. })));
        }
        assert!(matches!(reserve(dir.path(), Timeline(3), Timeline(3)), Err(ReserveError::NotAhead { .. })));
        reserve(dir.path(), Timeline(1), Timeline(4)).unwrap();
        let kept = std::fs::read_to_string(history_path(dir.path(), Timeline(3))).unwrap();
        assert_eq!(kept, "1\t0/200\tx\n", "a real history is never overwritten");
    }

    #[test]
    fn placeholders_go_before_a_start_unless_a_real_history_stands_on_them() {
        let dir = tempfile::tempdir().unwrap();
        let left = || files(dir.path()).unwrap().iter().map(|(timeline, _)| timeline.0).collect::<Vec<_>>();
        reserve(dir.path(), Timeline(1), Timeline(4)).unwrap();
        std::fs::write(history_path(dir.path(), Timeline(4)), "1\t0/200\tx\n").unwrap();
        reserve(dir.path(), Timeline(4), Timeline(7)).unwrap();
        assert_eq!(left(), [2, 3, 4, 5, 6]);
        drop_unused_placeholders(dir.path()).unwrap();
        assert_eq!(left(), [2, 3, 4]);
    }

    proptest! {
        /// What is looked up quickly is what a look at every line finds.
        #[test]
        fn lines_are_found_in_long_histories(
            steps in proptest::collection::vec((1_u32..4, 0_u64..300), 0..60),
            at in 0_u64..9_000,
            more in 1_u64..600,
        ) {
            let (mut timeline, mut end) = (0, 0);
            let mut forks = Vec::new();
            for (further, written) in steps {
                timeline += further;
                end += written;
                forks.push(Fork { timeline: Timeline(timeline), end: Lsn(end), reason: String::new() });
            }
            let history = History { timeline: Timeline(timeline + 1), forks: forks.clone() };
            let mut lines = Vec::new();
            let mut begin = Lsn::ZERO;
            for fork in &forks {
                lines.push((fork.timeline, begin, fork.end));
                begin = fork.end;
            }
            lines.push((history.timeline, begin, Lsn(u64::MAX)));
            for number in 0..timeline + 3 {
                let line = lines.iter().find(|line| line.0 == Timeline(number));
                prop_assert_eq!(history.begin_of(Timeline(number)), line.map(|line| line.1));
                let end = line.map(|line| line.2).filter(|end| end.0 < u64::MAX);
                prop_assert_eq!(history.end_of(Timeline(number)), end);
            }
            let (at, before) = (Lsn(at), Lsn(at + more));
            let writes = lines.iter().find(|line| at < line.2).unwrap().0;
            prop_assert_eq!(history.timeline_at(at), writes);
            let reached = |line: &&(Timeline, Lsn, Lsn)| line.1 < before && line.2 > at;
            let writers: Vec<Timeline> = lines.iter().rev().filter(reached).map(|line| line.0).collect();
            prop_assert_eq!(history.writers(at, before).collect::<Vec<_>>(), writers);
        }
    }
}
