//! When base backups are due by a schedule of cron. In UTC: hosts of a herd may be in several time zones, and in most of them an
//! hour is missing once a year and another one is there twice.

use croner::Cron;
use croner::errors::CronError;
use jiff::Timestamp;
use jiff::tz::TimeZone;

#[derive(Clone, Debug)]
pub(crate) struct Schedule(Cron);

impl Schedule {
    pub(crate) fn parse(text: &str) -> Result<Schedule, CronError> {
        let cron: Cron = text.parse()?;
        // What never comes, as the 30th of February, is told now and not waited for.
        cron.find_next_occurrence(&Timestamp::now().to_zoned(TimeZone::UTC), false)?;
        Ok(Schedule(cron))
    }

    /// The last moment that it names, up to `now`, in seconds since 1970; `None`: there has been none.
    pub(crate) fn last(&self, now: Timestamp) -> Option<i64> {
        let now = now.to_zoned(TimeZone::UTC);
        self.0.find_previous_occurrence(&now, true).ok().map(|at| at.timestamp().as_second())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(schedule: &str, now: &str) -> Option<String> {
        let at = Schedule::parse(schedule).unwrap().last(now.parse().unwrap())?;
        Some(Timestamp::from_second(at).unwrap().to_string())
    }

    #[test]
    fn the_last_moment_is_found_in_utc() {
        let cases = [
            ("0 2 * * *", "2026-11-22T01:59:59Z", "2026-11-21T02:00:00Z"),
            ("0 2 * * *", "2026-11-22T02:00:00Z", "2026-11-22T02:00:00Z"),
            ("30 1 * * 7", "2026-11-25T00:00:00+09:00", "2026-11-22T01:30:00Z"),
            ("0 0 29 2 *", "2026-11-22T00:00:00Z", "2024-02-29T00:00:00Z"),
        ];
        for (schedule, now, at) in cases {
            assert_eq!(last(schedule, now).as_deref(), Some(at), "{schedule} at {now}");
        }
    }

    #[test]
    fn what_is_none_and_what_never_comes_is_refused() {
        for text in ["", "2 o'clock", "61 * * * *", "0 0 30 2 *"] {
            assert!(Schedule::parse(text).is_err(), "{text}");
        }
    }
}
