//! Since when something that the server has is not in the archive.
//!
//! Positions alone say how many bytes are missing, and bytes say nothing of time: a server that has been idle for a day is behind
//! by nothing, and one that is always written to is always behind by something. So moments are remembered, each with the position
//! that the server reached after it: what it wrote while nobody looked, it may have written at once. Hazard: a lag that looks small hides an
//! archive that has stopped.

use std::collections::VecDeque;
use std::time::Duration;

use pgherd_core::types::Lsn;
use tokio::time::Instant;

/// How exact it is.
const APART: Duration = Duration::from_millis(500);
/// Half an hour of them; the oldest one is what counts, and stays.
const MAX_MARKS: usize = 3600;

#[derive(Debug, Default)]
pub(super) struct Lag {
    looked: Option<Instant>,
    marks: VecDeque<(Instant, Lsn)>,
}

impl Lag {
    /// The server has WAL up to `end` by now, and the archive up to `durable`. `None`: nothing is missing.
    pub(super) fn since(&mut self, now: Instant, end: Lsn, durable: Lsn) -> Option<Instant> {
        while self.marks.front().is_some_and(|(_, end)| *end <= durable) {
            self.marks.pop_front();
        }
        let is_new =
            self.marks.back().is_none_or(|(at, last)| end > *last && now.duration_since(*at) >= APART);
        if end > durable && is_new && self.marks.len() < MAX_MARKS {
            self.marks.push_back((self.looked.unwrap_or(now), end));
        }
        self.looked = Some(now);
        self.marks.front().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_always_ahead_is_behind_since_a_moment_ago() {
        let begun = Instant::now();
        let at = |second: u64| begun + Duration::from_secs(second);
        let mut lag = Lag::default();
        assert_eq!(lag.since(at(0), Lsn(100), Lsn(100)), None);
        for second in 1..100 {
            // It writes ten bytes a second, and they are durable two seconds later.
            let since = lag.since(at(second), Lsn(100 + 10 * second), Lsn(80 + 10 * second));
            assert!(since >= Some(at(second.saturating_sub(3))), "{second}");
        }
        let stopped = lag.since(at(100), Lsn(1100), Lsn(1070)).unwrap();
        for second in 101..200 {
            assert_eq!(lag.since(at(second), Lsn(100 + 10 * second), Lsn(1070)), Some(stopped));
        }
        assert_eq!(lag.since(at(200), Lsn(2090), Lsn(2090)), None);
    }

    #[test]
    fn what_was_written_while_nobody_looked_is_as_old_as_the_last_look() {
        let begun = Instant::now();
        let at = |second: u64| begun + Duration::from_secs(second);
        let mut lag = Lag::default();
        assert_eq!(lag.since(at(0), Lsn(100), Lsn(100)), None);
        // The connection was gone for a minute.
        assert_eq!(lag.since(at(60), Lsn(900), Lsn(100)), Some(at(0)));
        assert_eq!(lag.since(at(61), Lsn(910), Lsn(500)), Some(at(0)));
        assert_eq!(lag.since(at(62), Lsn(920), Lsn(905)), Some(at(60)));
        assert_eq!(lag.since(at(63), Lsn(920), Lsn(920)), None);
    }

    #[test]
    fn what_is_remembered_is_limited_and_the_oldest_moment_stays() {
        let begun = Instant::now();
        let mut lag = Lag::default();
        for second in 0..10_000 {
            let now = begun + Duration::from_secs(second);
            assert_eq!(lag.since(now, Lsn(1 + second), Lsn(0)), Some(begun));
        }
        assert_eq!(lag.marks.len(), MAX_MARKS);
    }
}
