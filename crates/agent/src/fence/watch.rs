//! When to fire: the deadline, and what to make of time in which this process did not run.

use std::time::Duration;

use pgherd_core::types::Instant;

use super::Deadline;

/// Between two looks at the clock, at most. Timers do not count the time in which a host is suspended.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A look that comes so much too late says that this process did not run: it was frozen, the host was
/// suspended, or there was no CPU for it.
const LATE: Duration = Duration::from_secs(1);
/// What an agent gets to speak in after such a time: several turns of its loop.
const MOMENT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Watch {
    last_look: Instant,
    /// Until when the agent may still speak. Given once for each silence.
    moment: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Look again after this long, or when there is news.
    Wait(Duration),
    Fire,
}

impl Watch {
    pub(super) fn new(now: Instant) -> Watch {
        Watch { last_look: now, moment: None }
    }

    /// Called at every turn, with what the agent's page says *after* this turn began.
    pub(super) fn look(&mut self, now: Instant, deadline: Option<Deadline>) -> Verdict {
        let was_away = now.since(self.last_look) > LOOK_EVERY + LATE;
        self.last_look = now;
        let Some(deadline) = deadline else {
            self.moment = None;
            return Verdict::Wait(LOOK_EVERY);
        };
        let left = deadline.at.since(now);
        if !left.is_zero() {
            self.moment = None;
            return Verdict::Wait(left.min(LOOK_EVERY));
        }
        if was_away && deadline.patient {
            self.moment.get_or_insert(now + MOMENT);
        }
        match self.moment.map(|until| until.since(now)) {
            Some(left) if deadline.patient && !left.is_zero() => Verdict::Wait(left.min(LOOK_EVERY)),
            _ => Verdict::Fire,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(ms))
    }

    fn patient(ms: u64) -> Option<Deadline> {
        Some(Deadline { at: at(ms), patient: true })
    }

    fn wait(ms: u64) -> Verdict {
        Verdict::Wait(Duration::from_millis(ms))
    }

    #[test]
    fn it_fires_at_the_deadline_and_not_a_moment_later() {
        let mut watch = Watch::new(at(0));
        assert_eq!(watch.look(at(100), patient(450)), wait(200));
        assert_eq!(watch.look(at(300), patient(450)), wait(150));
        assert_eq!(watch.look(at(450), patient(450)), Verdict::Fire);
    }

    #[test]
    fn a_newer_deadline_counts_and_a_disarmed_fence_never_fires() {
        let mut watch = Watch::new(at(0));
        assert_eq!(watch.look(at(100), patient(150)), wait(50));
        assert_eq!(watch.look(at(150), patient(10_150)), wait(200));
        assert_eq!(watch.look(at(900_000), None), wait(200));
    }

    #[test]
    fn an_agent_that_resumes_together_with_the_fence_gets_one_moment() {
        let mut watch = Watch::new(at(0));
        // The host slept for a minute.
        assert_eq!(watch.look(at(60_000), patient(10_000)), wait(200));
        assert_eq!(watch.look(at(60_200), patient(10_000)), wait(200));
        // It speaks, so nothing happens, and the next silence is a new one.
        assert_eq!(watch.look(at(60_300), patient(70_300)), wait(200));
        assert_eq!(watch.look(at(120_000), patient(70_300)), wait(200));
        assert_eq!(watch.look(at(120_900), patient(70_300)), wait(100));
        // Being away again does not prolong it.
        assert_eq!(watch.look(at(125_000), patient(70_300)), Verdict::Fire);
    }

    #[test]
    fn at_the_end_of_a_lease_there_is_no_moment() {
        let mut watch = Watch::new(at(0));
        let lease = Some(Deadline { at: at(2_600), patient: false });
        assert_eq!(watch.look(at(60_000), lease), Verdict::Fire);
    }
}
