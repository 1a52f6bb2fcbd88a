//! What somebody wants back, as it is written on a command line: a time with its zone, a position, a transaction, a restore point.
//!
//! Leaves out: whether it can be had. Hazard: a time that is understood as another one. A time without a zone is refused, and so is one
//! that a clock showed twice.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use pgherd_backup::recovery::Target;
use pgherd_core::types::Lsn;

/// PostgreSQL takes no longer name of a restore point.
const MAX_NAME_BYTES: usize = 63;

/// A target in the words of whoever asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Until {
    Latest,
    Immediate,
    Time(String),
    Lsn(String),
    Xid(String),
    Name(String),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("\"{text}\" does not say in which time zone it is")]
    NoZone { text: String },
    #[error("\"{text}\" is no time")]
    NoTime { text: String },
    #[error("\"{zone}\" is no time zone that this host knows")]
    UnknownZone { zone: String },
    #[error("clocks in {zone} showed {time} twice, or never: they were set back or forward there")]
    Ambiguous { time: String, zone: String },
    #[error("\"{text}\" is no position in WAL: two hexadecimal numbers, such as 0/3000060")]
    Lsn { text: String },
    #[error("\"{text}\" is no transaction: a number, as pg_current_xact_id() returns")]
    Xid { text: String },
    #[error("\"{text}\" is no restore point: a name has one byte at least, and {MAX_NAME_BYTES} at most")]
    Name { text: String },
    #[error("only a time, an LSN and a transaction can be left out of what is restored")]
    NotExclusive,
}

impl TargetError {
    pub fn hint(&self) -> Option<String> {
        match self {
            TargetError::NoZone { text } => Some(format!("write \"{text}+00\" for UTC, or \"{text} Europe/Berlin\"")),
            TargetError::NoTime { .. } => Some(
                "write \"2026-11-20 20:54:54+01\", \"2026-11-20T19:54:54Z\" or \"2026-11-20 20:54:54 Europe/Berlin\""
                    .to_owned(),
            ),
            TargetError::UnknownZone { .. } => {
                Some("names are those of /usr/share/zoneinfo; \"+01\" needs none".to_owned())
            }
            TargetError::Ambiguous { time, .. } => {
                Some(format!("write the difference from UTC instead: \"{time}+01\""))
            }
            _ => None,
        }
    }
}

impl Until {
    /// `inclusive`: with what is at the target itself.
    pub fn target(&self, inclusive: bool) -> Result<Target, TargetError> {
        match self {
            Until::Time(text) => Ok(Target::Time { at: time(text)?, inclusive }),
            Until::Lsn(text) => {
                let at = text.parse::<Lsn>().map_err(|_| TargetError::Lsn { text: text.clone() })?;
                Ok(Target::Lsn { at, inclusive })
            }
            Until::Xid(text) => {
                let xid = text.parse::<u64>().ok().filter(|xid| *xid as u32 > 0);
                // Above its lower half is the epoch, which is not in WAL.
                let xid = xid.ok_or_else(|| TargetError::Xid { text: text.clone() })? as u32;
                Ok(Target::Xid { xid, inclusive })
            }
            _ if !inclusive => Err(TargetError::NotExclusive),
            Until::Latest => Ok(Target::Latest),
            Until::Immediate => Ok(Target::Immediate),
            Until::Name(name) if name.is_empty() || name.len() > MAX_NAME_BYTES => {
                Err(TargetError::Name { text: name.clone() })
            }
            Until::Name(name) => Ok(Target::Name(name.clone())),
        }
    }
}

/// A time with its zone.
pub fn time(text: &str) -> Result<Timestamp, TargetError> {
    let text = text.trim();
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    if let Ok(zoned) = text.parse::<Zoned>() {
        return Ok(zoned.timestamp());
    }
    let no_time = || TargetError::NoTime { text: text.to_owned() };
    if text.parse::<DateTime>().is_ok() {
        return Err(TargetError::NoZone { text: text.to_owned() });
    }
    // "2026-11-20 20:54:54 Europe/Berlin", and with "+01" behind a space.
    let (civil, zone) = text.rsplit_once(' ').ok_or_else(no_time)?;
    let (civil, zone) = (civil.trim(), zone.trim());
    if zone.starts_with(['+', '-']) {
        return format!("{civil}{zone}").parse().map_err(|_| no_time());
    }
    let civil: DateTime = civil.parse().map_err(|_| no_time())?;
    let tz = TimeZone::get(zone).map_err(|_| TargetError::UnknownZone { zone: zone.to_owned() })?;
    let ambiguous =
        || TargetError::Ambiguous { time: civil.to_string().replace('T', " "), zone: zone.to_owned() };
    tz.to_ambiguous_timestamp(civil).unambiguous().map_err(|_| ambiguous())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_22_a_time_is_understood_in_its_zone_or_refused() {
        for same in [
            "2026-11-20T19:54:54Z",
            "2026-11-20 19:54:54+00",
            "2026-11-20 20:54:54+01",
            "2026-11-20 20:54:54 +01:00",
            "2026-11-20 20:54:54 Europe/Berlin",
            "2026-11-20T20:54:54[Europe/Berlin]",
            " 2026-11-20 19:54:54 UTC ",
        ] {
            let expected = "2026-11-20T19:54:54Z".parse::<Timestamp>();
            assert_eq!(time(same).ok(), expected.ok(), "{same}");
        }
        let micros = time("2026-11-20 19:54:54.123456+00").map(|at| at.to_string());
        assert_eq!(micros.as_deref(), Ok("2026-11-20T19:54:54.123456Z"));
        for text in ["2026-11-20 20:54:54", "2026-11-20", "2026-11-20T20:54"] {
            assert_eq!(time(text), Err(TargetError::NoZone { text: text.to_owned() }));
        }
        for text in ["", "yesterday", "20:54", "2026-13-20 20:54:54+01", "2026-11-20 25:00 UTC"] {
            assert_eq!(time(text), Err(TargetError::NoTime { text: text.to_owned() }), "{text}");
        }
        let unknown = time("2026-11-20 20:54:54 Europe/Atlantis");
        assert_eq!(unknown, Err(TargetError::UnknownZone { zone: "Europe/Atlantis".to_owned() }));
        // In the night in which clocks are set back, and that in which they are set forward.
        for text in ["2026-10-25 02:30 Europe/Berlin", "2026-03-29 02:30 Europe/Berlin"] {
            assert!(matches!(time(text), Err(TargetError::Ambiguous { .. })), "{text}");
        }
        assert!(time("2026-10-25 02:30+02").is_ok());
    }

    #[test]
    fn targets_are_what_was_written_or_refused() {
        let until = |until: Until, inclusive| until.target(inclusive);
        assert_eq!(
            until(Until::Xid("4294968029".to_owned()), false),
            Ok(Target::Xid { xid: 733, inclusive: false })
        );
        for wrong in ["", "0", "-1", "x", "4294967296"] {
            let text = wrong.to_owned();
            assert_eq!(until(Until::Xid(text.clone()), true), Err(TargetError::Xid { text }));
        }
        let lsn = Lsn(0x300_0060);
        assert_eq!(
            until(Until::Lsn("0/3000060".to_owned()), true),
            Ok(Target::Lsn { at: lsn, inclusive: true })
        );
        assert!(until(Until::Lsn("3000060".to_owned()), true).is_err());
        assert!(until(Until::Name("x".repeat(64)), true).is_err());
        assert!(until(Until::Name(String::new()), true).is_err());
        for without in [Until::Latest, Until::Immediate, Until::Name("here".to_owned())] {
            assert!(until(without.clone(), true).is_ok());
            assert_eq!(until(without, false), Err(TargetError::NotExclusive));
        }
    }
}
