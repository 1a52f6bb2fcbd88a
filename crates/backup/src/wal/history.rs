//! Timeline histories: where a line of history left the one before it.
//!
//! Left out: why (the third column is for people). Hazard: a fork at a wrong position splices WAL of two histories.

use pgherd_core::types::{Lsn, Timeline};
use serde::{Deserialize, Serialize};

/// A timeline that history left, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fork {
    pub timeline: Timeline,
    /// The first position that is not this timeline's any more.
    pub until: Lsn,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    #[error("the history of timeline {timeline} has a line that is none: \"{line}\"")]
    Line { timeline: Timeline, line: String },
    #[error("the history of timeline {timeline} does not go forward")]
    Order { timeline: Timeline },
    #[error("the history of timeline {timeline} is empty")]
    Empty { timeline: Timeline },
    #[error("the history of timeline {timeline} has {bytes} bytes")]
    TooLong { timeline: Timeline, bytes: usize },
}

/// The way to a timeline from the first one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    timeline: Timeline,
    forks: Vec<Fork>,
}

/// A part of a history that is on one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leg {
    pub timeline: Timeline,
    pub begin: Lsn,
    /// None for the last one.
    pub end: Option<Lsn>,
}

impl History {
    /// Of timeline 1, which has no file.
    pub fn first() -> History {
        History { timeline: Timeline(1), forks: Vec::new() }
    }

    pub fn new(timeline: Timeline, forks: Vec<Fork>) -> Result<History, HistoryError> {
        let grows = forks.is_sorted_by(|one, next| one.timeline < next.timeline && one.until <= next.until);
        let ends = forks.last().is_none_or(|last| last.timeline < timeline);
        if !grows || !ends || timeline.0 == 0 || forks.first().is_some_and(|first| first.timeline.0 == 0) {
            return Err(HistoryError::Order { timeline });
        }
        // Every timeline but the first came from another one.
        if forks.is_empty() != (timeline == Timeline(1)) {
            return Err(HistoryError::Empty { timeline });
        }
        Ok(History { timeline, forks })
    }

    /// As PostgreSQL writes it: timeline, position and reason in each line, `#` before remarks.
    pub fn parse(timeline: Timeline, content: &[u8]) -> Result<History, HistoryError> {
        let mut forks = Vec::new();
        for line in content.split(|byte| *byte == b'\n') {
            let text = String::from_utf8_lossy(line);
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let mut words = text.split_ascii_whitespace();
            let fork = words.next().and_then(|number| number.parse().ok()).map(Timeline);
            let until = words.next().and_then(|position| position.parse().ok());
            let (Some(timeline), Some(until)) = (fork, until) else {
                return Err(HistoryError::Line { timeline, line: text.to_owned() });
            };
            forks.push(Fork { timeline, until });
        }
        History::new(timeline, forks)
    }

    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    pub fn forks(&self) -> &[Fork] {
        &self.forks
    }

    /// Which timeline the byte at `position` belongs to on the way here.
    pub fn timeline_at(&self, position: Lsn) -> Timeline {
        let fork = self.forks.iter().find(|fork| position < fork.until);
        fork.map_or(self.timeline, |fork| fork.timeline)
    }

    pub(crate) fn legs(&self) -> impl Iterator<Item = Leg> {
        let begins = [Lsn::ZERO].into_iter().chain(self.forks.iter().map(|fork| fork.until));
        let ends = self.forks.iter().map(|fork| Some(fork.until)).chain([None]);
        let timelines = self.forks.iter().map(|fork| fork.timeline).chain([self.timeline]);
        timelines.zip(begins).zip(ends).map(|((timeline, begin), end)| Leg { timeline, begin, end })
    }

    /// Whether what was at `position` on `timeline` is part of this history.
    pub fn passes(&self, timeline: Timeline, position: Lsn) -> bool {
        self.legs().any(|leg| {
            leg.timeline == timeline && leg.begin <= position && leg.end.is_none_or(|end| position <= end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_read_as_postgresql_writes_it() {
        let file =
            b"1\t0/3000060\tno recovery target specified\n\n# by hand\n2\t0/5000000\tbefore 2026-11-20\n";
        let history = History::parse(Timeline(3), file).unwrap();
        let at = |position: &str| history.timeline_at(position.parse().unwrap()).0;
        assert_eq!(
            [at("0/1"), at("0/300005F"), at("0/3000060"), at("0/4FFFFFF"), at("0/5000000")],
            [1, 1, 2, 2, 3]
        );
        assert!(history.passes(Timeline(1), Lsn(0x3000060)), "the fork itself belongs to both");
        assert!(!history.passes(Timeline(1), Lsn(0x3000061)));
        assert_eq!(history.legs().count(), 3);
    }

    #[test]
    fn a_history_that_goes_back_is_none() {
        for (timeline, file) in [
            (2, "2\t0/1\tx\n"),
            (3, "2\t0/1\n1\t0/2\n"),
            (3, "1\t0/2\n2\t0/1\n"),
            (2, "1\n"),
            (2, "one\t0/1\n"),
            (2, ""),
            (1, "1\t0/1\n"),
            (2, "0\t0/1\n"),
        ] {
            assert!(History::parse(Timeline(timeline), file.as_bytes()).is_err(), "{timeline}: {file:?}");
        }
    }
}
