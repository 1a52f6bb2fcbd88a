//! Which backups stay: kept by hand, deleted and taken back, or let go by a retention policy; and the collection behind it.
//!
//! Leaves out: the policy, which is `core::retention`'s, and what a collection may delete, which is `backup::collect`'s. Hazard: somebody's
//! only copy. So nothing is gone before its grace has passed, and what is kept by hand never goes.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::date;
use jiff::tz::TimeZone;
use pgherd_api::backup::{Collected, Expiry, Verdict};
use pgherd_backup::collect::{self, CollectError, Patience};
use pgherd_backup::keep::{self, KeepError};
use pgherd_backup::manifest::Manifest;
use pgherd_backup::name::BackupId;
use pgherd_backup::tombstone::{self, TombstoneError};
use pgherd_backup::wal::{Window, window};
use pgherd_core::retention::{self, Calendar, Keep, MayNot, Policy, Retention, Tiers, Wal};
use pgherd_core::types::Malformed;

use super::catalog::{Catalog, CatalogError, Which};
use super::target::{self, TargetError};

/// From a deletion until it is carried out.
pub const GRACE: Duration = Duration::from_secs(24 * 3600);
/// Nothing shorter: a listing of an object store may be late, and so may a person be.
pub const MIN_GRACE: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
pub enum KeepingError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("backup {id} is not deleted: {why}")]
    MayNot { id: BackupId, why: MayNot },
    #[error("backup {id} is not kept by hand")]
    NotKept { id: BackupId },
    #[error("{until} is over")]
    Over { until: Timestamp },
    #[error(transparent)]
    Until(#[from] TargetError),
    #[error(transparent)]
    Policy(#[from] Malformed),
    #[error("nothing was deleted: backups have changed since this was shown")]
    Changed,
    #[error("a grace is {} minutes at least", MIN_GRACE.as_secs() / 60)]
    Grace,
    #[error(transparent)]
    Keep(#[from] KeepError),
    #[error(transparent)]
    Tombstone(#[from] TombstoneError),
    #[error(transparent)]
    Collect(#[from] CollectError),
}

impl KeepingError {
    pub fn hint(&self) -> Option<String> {
        match self {
            KeepingError::Catalog(error) => error.hint(),
            KeepingError::MayNot { id, why: MayNot::Kept { .. } } => {
                Some(format!("pgherd backup keep {id} --release takes that back"))
            }
            KeepingError::MayNot { why: MayNot::TooFew { .. }, .. } => {
                Some("take another one first, or lower --minimum-redundancy".to_owned())
            }
            KeepingError::Keep(KeepError::Deleted { id })
            | KeepingError::Tombstone(TombstoneError::Swept { id }) => {
                Some(format!("pgherd backup show {id} says how it stands"))
            }
            KeepingError::Until(error) => error.hint(),
            KeepingError::Changed => Some("look again, and decide anew".to_owned()),
            KeepingError::Collect(CollectError::ClocksDiffer { .. } | CollectError::ClockWentBack { .. }) => {
                Some("set the clocks right: a grace is measured by them".to_owned())
            }
            _ => None,
        }
    }

    /// Whether a rule says no, and nothing is wrong.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            KeepingError::MayNot { .. }
                | KeepingError::Changed
                | KeepingError::NotKept { .. }
                | KeepingError::Keep(KeepError::Deleted { .. })
                | KeepingError::Tombstone(TombstoneError::Swept { .. } | TombstoneError::NotDeleted { .. })
        )
    }

    /// Whether it was asked for in a wrong way.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            KeepingError::Over { .. }
                | KeepingError::Until(_)
                | KeepingError::Policy(_)
                | KeepingError::Grace
        )
    }
}

/// Deletes a backup; it can be taken back until a collection after the grace.
pub async fn delete(
    catalog: &Catalog,
    which: Which,
    minimum_redundancy: u32,
) -> Result<BackupId, KeepingError> {
    let (id, entry) = catalog.entry(which)?;
    let now = Timestamp::now();
    // One that never came to its end counts for nothing.
    if entry.manifest().is_some() {
        let retention = Retention { policy: None, minimum_redundancy, tiers: Tiers::default() };
        let judged = judged(catalog, now).await?;
        retention.may_delete(id, &judged).map_err(|why| KeepingError::MayNot { id, why })?;
    }
    tombstone::bury(&catalog.repository, catalog.place, id, "deleted by hand", now).await?;
    Ok(id)
}

/// Takes a deletion back.
pub async fn undelete(catalog: &Catalog, which: Which) -> Result<BackupId, KeepingError> {
    let (id, _) = catalog.entry(which)?;
    tombstone::undelete(&catalog.repository, catalog.place, id, Timestamp::now()).await?;
    Ok(id)
}

/// Keeps a backup whatever a policy says: alone, or with all WAL since; until a time, or until it is released.
pub async fn keep(
    catalog: &Catalog,
    which: Which,
    standalone: bool,
    until: Option<&str>,
) -> Result<BackupId, KeepingError> {
    let id = catalog.manifest(which)?.id;
    let now = Timestamp::now();
    let until = until.map(target::time).transpose()?;
    if let Some(until) = until.filter(|until| *until <= now) {
        return Err(KeepingError::Over { until });
    }
    let keep = if standalone { Keep::Standalone } else { Keep::Full };
    keep::put(&catalog.repository, catalog.place, id, (Some(keep), until), now).await?;
    Ok(id)
}

/// Leaves a backup to the policy again.
pub async fn release(catalog: &Catalog, which: Which) -> Result<BackupId, KeepingError> {
    let (id, entry) = catalog.entry(which)?;
    let now = Timestamp::now();
    if entry.kept.as_ref().and_then(|kept| kept.holds(now)).is_none() {
        return Err(KeepingError::NotKept { id });
    }
    keep::put(&catalog.repository, catalog.place, id, (None, None), now).await?;
    Ok(id)
}

/// What is to be kept, as it is written on a command line.
#[derive(Clone, Debug)]
pub struct Rules {
    pub policy: String,
    pub minimum_redundancy: u32,
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
}

/// What a policy makes of each backup, and nothing else.
pub async fn preview(catalog: &Catalog, rules: &Rules) -> Result<Expiry, KeepingError> {
    let now = Timestamp::now();
    let policy: Policy = rules.policy.parse()?;
    let tiers = Tiers { daily: rules.daily, weekly: rules.weekly, monthly: rules.monthly };
    let retention = Retention { policy: Some(policy), minimum_redundancy: rules.minimum_redundancy, tiers };
    let verdicts = retention.judge(now.as_second(), &judged(catalog, now).await?);
    let told = |verdict: &retention::Verdict<BackupId>| Verdict {
        id: verdict.id.to_string(),
        label: verdict.label.to_string(),
        goes: verdict.goes(),
        wal: verdict.wal.map(|wal| if wal == Wal::Own { "own" } else { "since" }.to_owned()),
        reason: verdict.reason.to_string(),
    };
    Ok(Expiry {
        policy: policy.to_string(),
        minimum_redundancy: rules.minimum_redundancy,
        verdicts: verdicts.iter().map(told).collect(),
        collected: None,
    })
}

/// Deletes what a preview lets go, and collects what was deleted longer ago than the grace.
pub async fn expire(
    catalog: &Catalog,
    rules: &Rules,
    preview: Expiry,
    grace: Duration,
) -> Result<Expiry, KeepingError> {
    if grace < MIN_GRACE {
        return Err(KeepingError::Grace);
    }
    // Somebody may have thought about the preview for an hour, in which another one has kept a backup.
    let catalog = &Catalog::read(catalog.repository.clone(), catalog.place).await?;
    if self::preview(catalog, rules).await? != preview {
        return Err(KeepingError::Changed);
    }
    let named = |verdict: &Verdict| verdict.id.parse::<BackupId>();
    for verdict in preview.verdicts.iter().filter(|verdict| verdict.goes) {
        let why = format!("{}: {}", preview.policy, verdict.reason);
        tombstone::bury(&catalog.repository, catalog.place, named(verdict)?, &why, Timestamp::now()).await?;
    }
    let alone = preview.verdicts.iter().filter(|verdict| verdict.wal.as_deref() == Some("own"));
    let alone: BTreeSet<BackupId> = alone.map(named).collect::<Result<_, _>>()?;
    let patience = Patience { grace, ..Patience::default() };
    let report =
        collect::collect_beside(&catalog.repository, catalog.place, patience, &alone, Timestamp::now())
            .await?;
    let names = |ids: BTreeSet<BackupId>| ids.into_iter().map(|id| id.to_string()).collect();
    let collected = Collected {
        swept: names(report.swept),
        abandoned: names(report.abandoned),
        waiting: names(report.waiting),
        packs: report.packs,
        maps: report.maps,
        wal: report.wal,
        bytes: report.bytes,
    };
    Ok(Expiry { collected: Some(collected), ..preview })
}

/// What `core` has to know of each backup.
async fn judged(catalog: &Catalog, now: Timestamp) -> Result<Vec<retention::Backup<BackupId>>, KeepingError> {
    let Some(archive) = catalog.archive()? else { return Ok(Vec::new()) };
    let inventory = archive.inventory().await.map_err(CatalogError::from)?;
    let window = window(&catalog.ranges(), &inventory);
    let backup = |manifest: &Manifest| {
        let kept = catalog.entries.get(&manifest.id).and_then(|entry| entry.kept.as_ref());
        let (is_whole, leads_to_present) = reach(&window, manifest.id);
        retention::Backup {
            id: manifest.id,
            ended_s: manifest.facts.stopped.as_second(),
            calendar: calendar(manifest.facts.stopped, &TimeZone::system()),
            is_whole,
            leads_to_present,
            keep: kept.and_then(|kept| kept.holds(now)),
        }
    };
    Ok(catalog.manifests().map(backup).collect())
}

/// Whether a backup can be restored, and whether it is on the way to the latest timeline.
fn reach(window: &Window, id: BackupId) -> (bool, bool) {
    let latest = window.reaches.iter().filter(|reach| reach.end.is_some()).map(|reach| reach.target).max();
    let reach = window.reaches.iter().find(|reach| reach.backup.id == id);
    reach.map_or((false, false), |reach| (reach.end.is_some(), Some(reach.target) == latest))
}

/// The days, weeks from Monday on and months of a zone, counted from 1970.
fn calendar(at: Timestamp, zone: &TimeZone) -> Calendar {
    let day = zone.to_datetime(at).date();
    let days = i64::from((day - date(1970, 1, 1)).get_days());
    Calendar {
        day: days,
        // The first of January 1970 was a Thursday.
        week: (days + 3).div_euclid(7),
        month: i64::from(day.year()) * 12 + i64::from(day.month()) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_weeks_and_months_are_those_of_the_place() {
        let utc = |text: &str| text.parse::<Timestamp>().map(|at| calendar(at, &TimeZone::UTC)).ok();
        let of = |day, week, month| Some(Calendar { day, week, month });
        assert_eq!(utc("1970-01-01T00:00:00Z"), of(0, 0, 1970 * 12));
        assert_eq!(utc("1970-01-04T23:59:59Z"), of(3, 0, 1970 * 12), "a Sunday");
        assert_eq!(utc("1970-01-05T00:00:00Z"), of(4, 1, 1970 * 12), "a Monday");
        assert_eq!(utc("2026-11-22T12:00:00Z").map(|calendar| calendar.day), Some(20_779));
        let east = TimeZone::fixed(jiff::tz::offset(9));
        let late = "1970-01-31T20:00:00Z".parse::<Timestamp>().map(|at| calendar(at, &east).month);
        assert_eq!(late.ok(), Some(1970 * 12 + 1), "it is February there");
    }
}
