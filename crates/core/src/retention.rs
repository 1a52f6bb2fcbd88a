//! Which base backups are kept and which may go, with the reason for each: Barman's language, and tiers behind it.
//!
//! | rule | keeps |
//! |---|---|
//! | `REDUNDANCY n` | the newest `n` backups, with all WAL since the oldest of them |
//! | `RECOVERY WINDOW OF n DAYS` | what is needed to restore any moment of the last `n` days |
//! | tiers | the last backup of each day, week or month, for so many of them, each with its own WAL only |
//! | `keep` | a backup that somebody named, with all later WAL or with its own |
//! | `minimum_redundancy` | so many whole backups at least, whatever the others say |
//!
//! [`Retention::judge`] looks at all backups of one cluster in one repository and at nothing else. What it lets go gets a tombstone, and can
//! be taken back until its grace has passed; deleting is `backup::collect`'s.
//!
//! Where Barman is followed: labels, `MONTHS` of 31 days, and that a backup older than the window is kept if nothing newer
//! reaches back as far. Where it is not: a backup counts only if it can be restored, and one on a line of history that was left, by
//! a recovery to an earlier moment, does not replace one that leads to the present.
//!
//! Hazard: a backup that is let go too early is somebody's only copy. When anything looks wrong, all are kept.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::types::Malformed;

const DAY_S: i64 = 24 * 3600;
/// As in Barman, where a month of retention has 31 days.
const MONTH_DAYS: u32 = 31;
/// A longer window would be a mistake in a unit.
const MAX_WINDOW_DAYS: u32 = 100 * 366;
/// More backups than anybody takes.
const MAX_REDUNDANCY: u32 = 100_000;
/// A backup that ended so far in the future shows that a clock is wrong, by which nobody's age can be told.
pub const CLOCK_TOLERANCE_S: i64 = 300;

/// What the operator wants to be able to restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The newest so many.
    Redundancy(u32),
    /// Any moment of the last so many of the unit.
    Window { count: u32, unit: Unit },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Days,
    Weeks,
    Months,
}

impl Unit {
    fn days(self) -> u32 {
        match self {
            Unit::Days => 1,
            Unit::Weeks => 7,
            Unit::Months => MONTH_DAYS,
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Days => "DAYS",
            Unit::Weeks => "WEEKS",
            Unit::Months => "MONTHS",
        })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Redundancy(count) => write!(f, "REDUNDANCY {count}"),
            Policy::Window { count, unit } => write!(f, "RECOVERY WINDOW OF {count} {unit}"),
        }
    }
}

impl FromStr for Policy {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Policy, Malformed> {
        let malformed = || Malformed {
            what: "a retention policy: \"REDUNDANCY 3\", or \"RECOVERY WINDOW OF 7 DAYS\" (or WEEKS, or MONTHS)",
            text: text.to_owned(),
        };
        let upper = text.to_ascii_uppercase();
        let words: Vec<&str> = upper.split_ascii_whitespace().collect();
        let number = |word: &str| word.parse::<u32>().ok().filter(|number| *number > 0);
        let policy = match words.as_slice() {
            ["REDUNDANCY", count] => {
                number(count).filter(|count| *count <= MAX_REDUNDANCY).map(Policy::Redundancy)
            }
            ["RECOVERY", "WINDOW", "OF", count, unit] => {
                let unit = match unit.strip_suffix('S').unwrap_or(unit) {
                    "DAY" => Some(Unit::Days),
                    "WEEK" => Some(Unit::Weeks),
                    "MONTH" => Some(Unit::Months),
                    _ => None,
                };
                let fits = |(count, unit): &(u32, Unit)| {
                    count.checked_mul(unit.days()).is_some_and(|days| days <= MAX_WINDOW_DAYS)
                };
                number(count).zip(unit).filter(fits).map(|(count, unit)| Policy::Window { count, unit })
            }
            _ => None,
        };
        policy.ok_or_else(malformed)
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Policy, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Everything that says what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    /// Without one nothing goes by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// So many whole backups stay at least.
    pub minimum_redundancy: u32,
    #[serde(default, skip_serializing_if = "Tiers::is_none")]
    pub tiers: Tiers,
}

/// For how many days, weeks and months the last backup of each is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tiers {
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
}

impl Tiers {
    fn is_none(&self) -> bool {
        *self == Tiers::default()
    }

    fn count(&self, period: Period) -> u32 {
        match period {
            Period::Day => self.daily,
            Period::Week => self.weekly,
            Period::Month => self.monthly,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Period {
    Day,
    Week,
    Month,
}

impl Period {
    const ALL: [Period; 3] = [Period::Day, Period::Week, Period::Month];
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Period::Day => "day",
            Period::Week => "week",
            Period::Month => "month",
        })
    }
}

/// Which day, week and month of the operator's calendar a backup ended in, as numbers that grow by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calendar {
    pub day: i64,
    pub week: i64,
    pub month: i64,
}

impl Calendar {
    fn number(&self, period: Period) -> i64 {
        match period {
            Period::Day => self.day,
            Period::Week => self.week,
            Period::Month => self.month,
        }
    }
}

/// What somebody said of a backup, in Barman's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// With all WAL since.
    Full,
    /// With the WAL that makes it consistent.
    Standalone,
}

/// What counts of a backup. Only those that were committed, and not deleted, are asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup<Id> {
    pub id: Id,
    /// When it ended, in seconds since 1970.
    pub ended_s: i64,
    pub calendar: Calendar,
    /// Its own WAL is complete, so that it can be restored at all.
    pub is_whole: bool,
    /// It is on the line of history that led to the latest timeline. Those that are not were left behind by a recovery to an
    /// earlier moment.
    pub leads_to_present: bool,
    pub keep: Option<Keep>,
}

/// Whether a backup stays, in Barman's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Label {
    Valid,
    Obsolete,
    /// Only because of `minimum_redundancy`.
    PotentiallyObsolete,
    /// No policy says anything of it.
    None,
    #[serde(rename = "KEEP:FULL")]
    KeepFull,
    #[serde(rename = "KEEP:STANDALONE")]
    KeepStandalone,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Label::Valid => "VALID",
            Label::Obsolete => "OBSOLETE",
            Label::PotentiallyObsolete => "POTENTIALLY_OBSOLETE",
            Label::None => "NONE",
            Label::KeepFull => "KEEP:FULL",
            Label::KeepStandalone => "KEEP:STANDALONE",
        })
    }
}

/// Which WAL a backup that stays needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Wal {
    /// All from its start on.
    Since,
    /// From its start to its stop.
    Own,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum Reason {
    AmongNewest {
        policy: Policy,
    },
    WithinWindow {
        policy: Policy,
    },
    /// The newest that is older than the window: moments at its beginning are restored from it.
    CarriesWindow {
        policy: Policy,
    },
    /// All newer ones that are older than the window are on lines of history that were left.
    NothingNewerLeads {
        policy: Policy,
    },
    LastOf {
        period: Period,
        among: u32,
    },
    KeptByHand {
        keep: Keep,
    },
    TooFewOtherwise {
        minimum_redundancy: u32,
    },
    NoPolicy,
    ClockIsWrong,
    NotAmongNewest {
        policy: Policy,
    },
    OlderThanWindow {
        policy: Policy,
    },
    CannotBeRestored,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::AmongNewest { policy } => write!(f, "{policy} keeps it"),
            Reason::WithinWindow { policy } => write!(f, "it ended within {policy}"),
            Reason::CarriesWindow { policy } => {
                write!(f, "moments at the beginning of {policy} are restored from it")
            }
            Reason::NothingNewerLeads { policy } => {
                write!(f, "newer backups that are older than {policy} are on lines of history that were left")
            }
            Reason::LastOf { period, among } => {
                write!(f, "the last of its {period}, of {among} that are kept")
            }
            Reason::KeptByHand { keep: Keep::Full } => f.write_str("kept by hand, with all WAL since"),
            Reason::KeptByHand { keep: Keep::Standalone } => f.write_str("kept by hand, with its own WAL"),
            Reason::TooFewOtherwise { minimum_redundancy } => {
                write!(f, "obsolete, but minimum_redundancy is {minimum_redundancy}")
            }
            Reason::NoPolicy => f.write_str("there is no retention policy"),
            Reason::ClockIsWrong => {
                f.write_str("a backup is of the future: a clock is wrong, and nothing goes")
            }
            Reason::NotAmongNewest { policy } => write!(f, "{policy} does not keep it"),
            Reason::OlderThanWindow { policy } => {
                write!(f, "older than {policy}, and a newer one carries that")
            }
            Reason::CannotBeRestored => {
                f.write_str("WAL that it needs is missing, so that it cannot be restored")
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict<Id> {
    pub id: Id,
    pub label: Label,
    /// None if the backup may go.
    pub wal: Option<Wal>,
    pub reason: Reason,
}

impl<Id> Verdict<Id> {
    pub fn goes(&self) -> bool {
        self.wal.is_none()
    }
}

impl Retention {
    /// One verdict for each backup, the newest first. `now_s` is in seconds since 1970.
    pub fn judge<Id: Copy + Ord>(&self, now_s: i64, backups: &[Backup<Id>]) -> Vec<Verdict<Id>> {
        let mut newest_first: Vec<&Backup<Id>> = backups.iter().collect();
        newest_first.sort_by_key(|backup| std::cmp::Reverse((backup.ended_s, backup.id)));
        let is_of_the_future =
            |backup: &&&Backup<Id>| backup.ended_s > now_s.saturating_add(CLOCK_TOLERANCE_S);
        if newest_first.iter().find(is_of_the_future).is_some() {
            return newest_first
                .iter()
                .map(|backup| stays(backup, Label::Valid, Wal::Since, Reason::ClockIsWrong))
                .collect();
        }
        let mut verdicts: Vec<Verdict<Id>> = match self.policy {
            None => newest_first
                .iter()
                .map(|backup| stays(backup, Label::None, Wal::Since, Reason::NoPolicy))
                .collect(),
            Some(policy @ Policy::Redundancy(count)) => {
                redundancy(policy, count.max(self.minimum_redundancy), &newest_first)
            }
            Some(policy @ Policy::Window { count, unit }) => {
                let days = i64::from(count) * i64::from(unit.days());
                window(policy, now_s.saturating_sub(days * DAY_S), &newest_first)
            }
        };
        self.last_of_periods(&newest_first, &mut verdicts);
        for (backup, verdict) in newest_first.iter().zip(&mut verdicts) {
            let Some(keep) = backup.keep else { continue };
            let (label, wal) = match keep {
                Keep::Full => (Label::KeepFull, Wal::Since),
                Keep::Standalone => (Label::KeepStandalone, Wal::Own),
            };
            // What the policy needs of it, it needs all the same.
            let wal = if verdict.wal == Some(Wal::Since) { Wal::Since } else { wal };
            *verdict = stays(backup, label, wal, Reason::KeptByHand { keep });
        }
        self.at_least_the_minimum(&newest_first, &mut verdicts);
        verdicts
    }

    /// What a policy would let go stays as the last of its day, week or month, with its own WAL.
    fn last_of_periods<Id: Copy>(&self, newest_first: &[&Backup<Id>], verdicts: &mut [Verdict<Id>]) {
        for period in Period::ALL {
            let among = self.tiers.count(period);
            let mut seen = BTreeSet::new();
            for (backup, verdict) in newest_first.iter().zip(verdicts.iter_mut()) {
                if !backup.is_whole || !seen.insert(backup.calendar.number(period)) {
                    continue;
                }
                if seen.len() > among as usize {
                    break;
                }
                if verdict.goes() {
                    *verdict = stays(backup, Label::Valid, Wal::Own, Reason::LastOf { period, among });
                }
            }
        }
    }

    fn at_least_the_minimum<Id: Copy>(&self, newest_first: &[&Backup<Id>], verdicts: &mut [Verdict<Id>]) {
        let minimum_redundancy = self.minimum_redundancy;
        let stay = newest_first
            .iter()
            .zip(verdicts.iter())
            .filter(|(backup, verdict)| backup.is_whole && !verdict.goes());
        let mut count = stay.count();
        for (backup, verdict) in newest_first.iter().zip(verdicts) {
            if count >= minimum_redundancy as usize {
                return;
            }
            if backup.is_whole && verdict.goes() {
                let reason = Reason::TooFewOtherwise { minimum_redundancy };
                *verdict = stays(backup, Label::PotentiallyObsolete, Wal::Since, reason);
                count += 1;
            }
        }
    }

    /// Whether one backup may be deleted by hand: not one that is kept by hand, nor one of the last `minimum_redundancy`.
    pub fn may_delete<Id: Copy + Ord>(&self, id: Id, backups: &[Backup<Id>]) -> Result<(), MayNot> {
        let Some(backup) = backups.iter().find(|backup| backup.id == id) else { return Ok(()) };
        if let Some(keep) = backup.keep {
            return Err(MayNot::Kept { keep });
        }
        let others = backups.iter().filter(|other| other.id != id && other.is_whole).count();
        if backup.is_whole && others < self.minimum_redundancy as usize {
            return Err(MayNot::TooFew { others, minimum_redundancy: self.minimum_redundancy });
        }
        Ok(())
    }
}

/// Why a backup is not deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayNot {
    Kept { keep: Keep },
    TooFew { others: usize, minimum_redundancy: u32 },
}

impl fmt::Display for MayNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MayNot::Kept { .. } => f.write_str("it is kept by hand"),
            MayNot::TooFew { others, minimum_redundancy } => {
                write!(f, "{others} would be left, and minimum_redundancy is {minimum_redundancy}")
            }
        }
    }
}

impl std::error::Error for MayNot {}

fn stays<Id: Copy>(backup: &Backup<Id>, label: Label, wal: Wal, reason: Reason) -> Verdict<Id> {
    Verdict { id: backup.id, label, wal: Some(wal), reason }
}

fn goes<Id: Copy>(backup: &Backup<Id>, reason: Reason) -> Verdict<Id> {
    Verdict { id: backup.id, label: Label::Obsolete, wal: None, reason }
}

/// One that cannot be restored does not count, and stays as long as it is newer than one that does: its WAL may be found.
fn redundancy<Id: Copy>(policy: Policy, count: u32, newest_first: &[&Backup<Id>]) -> Vec<Verdict<Id>> {
    let mut whole = 0;
    let mut verdict = |backup: &&Backup<Id>| {
        if whole >= count {
            return goes(backup, Reason::NotAmongNewest { policy });
        }
        if !backup.is_whole {
            return stays(backup, Label::None, Wal::Since, Reason::CannotBeRestored);
        }
        whole += 1;
        stays(backup, Label::Valid, Wal::Since, Reason::AmongNewest { policy })
    };
    newest_first.iter().map(&mut verdict).collect()
}

/// All that ended within the window, and of those before it the newest ones, up to one that leads to the present. Where WAL is
/// missing an older one leads no further than a newer one does.
fn window<Id: Copy>(policy: Policy, begin_s: i64, newest_first: &[&Backup<Id>]) -> Vec<Verdict<Id>> {
    let mut is_carried = false;
    let mut verdict = |backup: &&Backup<Id>| {
        if backup.ended_s > begin_s && backup.is_whole {
            return stays(backup, Label::Valid, Wal::Since, Reason::WithinWindow { policy });
        }
        if backup.ended_s > begin_s {
            return stays(backup, Label::None, Wal::Since, Reason::CannotBeRestored);
        }
        if is_carried {
            return goes(backup, Reason::OlderThanWindow { policy });
        }
        if !backup.is_whole {
            return goes(backup, Reason::CannotBeRestored);
        }
        is_carried = backup.leads_to_present;
        let reason = match is_carried {
            true => Reason::CarriesWindow { policy },
            false => Reason::NothingNewerLeads { policy },
        };
        stays(backup, Label::Valid, Wal::Since, reason)
    };
    newest_first.iter().map(&mut verdict).collect()
}

#[cfg(test)]
mod tests;
