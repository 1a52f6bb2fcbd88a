//! How long to wait before what has ended is begun again: an agent that died, a stream that broke.

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

/// As for a process.
impl Default for Backoff {
    fn default() -> Backoff {
        Backoff::between(FIRST, LONGEST)
    }
}

impl Backoff {
    pub(crate) fn between(first: Duration, longest: Duration) -> Backoff {
        Backoff { first, longest, next: first }
    }

    /// The pause after a run that lasted `ran`. One of more than twice the longest pause was healthy, and its end is a new
    /// story.
    pub(crate) fn after(&mut self, ran: Duration) -> Duration {
        if ran >= 2 * self.longest {
            self.next = self.first;
        }
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_half_a_minute_and_begin_again_after_a_healthy_one() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u64> = (0..7).map(|_| backoff.after(Duration::ZERO).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        let healthy = Duration::from_secs(60);
        assert_eq!(backoff.after(healthy), FIRST);
        assert_eq!(backoff.after(healthy - Duration::from_millis(1)), 2 * FIRST);
    }
}
