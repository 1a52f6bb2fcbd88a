//! How soon an action is tried again that PostgreSQL or the disk has refused.
//!
//! The first time at once: most often something else was decided meanwhile, or a moment was wrong. What goes on failing, such as
//! a start with a full disk, would otherwise keep a core busy and fill the log.

use std::mem::{Discriminant, discriminant};
use std::time::Duration;

use pgherd_core::action::Action;

const FIRST: Duration = Duration::from_millis(100);
/// What was put right is noticed after this, at the latest.
const LONGEST: Duration = Duration::from_secs(1);

/// Of one node, which does one thing after another.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// What failed last, and how often in a row.
    failed: Option<(Discriminant<Action>, u32)>,
}

impl Pace {
    /// To be waited for before this is done.
    pub(crate) fn before(&self, action: &Action) -> Duration {
        match self.failed {
            Some((failed, times)) if times > 1 && failed == discriminant(action) => {
                LONGEST.min(FIRST * 2_u32.pow((times - 2).min(8)))
            }
            _ => Duration::ZERO,
        }
    }

    pub(crate) fn failed(&mut self, action: &Action) {
        let kind = discriminant(action);
        let times = match self.failed {
            Some((failed, times)) if failed == kind => times.saturating_add(1),
            _ => 1,
        };
        self.failed = Some((kind, times));
    }

    pub(crate) fn done(&mut self, action: &Action) {
        self.failed.take_if(|(failed, _)| *failed == discriminant(action));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_again_and_again_is_tried_ever_more_slowly_until_it_succeeds() {
        let mut pace = Pace::default();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push(pace.before(&Action::StartSealed).as_millis());
            // What comes before it in a list makes no difference.
            pace.done(&Action::StopNow);
            pace.failed(&Action::StartSealed);
        }
        assert_eq!(pauses, [0, 0, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(pace.before(&Action::StopNow), Duration::ZERO, "something else is done at once");
        pace.done(&Action::StartSealed);
        assert_eq!(pace.before(&Action::StartSealed), Duration::ZERO);
        pace.failed(&Action::StartSealed);
        assert_eq!(pace.before(&Action::StartSealed), Duration::ZERO, "that is a new story");
    }

    #[test]
    fn however_often_it_fails() {
        let mut pace = Pace { failed: Some((discriminant(&Action::StopNow), u32::MAX)) };
        pace.failed(&Action::StopNow);
        assert_eq!(pace.before(&Action::StopNow), LONGEST);
    }
}
