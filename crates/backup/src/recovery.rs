//! From what somebody wants back to what has to be restored: the backup, the timelines, the WAL, and where exactly it will end.
//!
//! [`plan`] answers before anything is touched. It reads the WAL that a recovery would read and applies PostgreSQL's own rules of
//! when to stop (`recoveryStopsBefore` and `recoveryStopsAfter` in `xlogrecovery.c`), so that it names the last transaction that will
//! be there, and refuses what PostgreSQL would find out at the end of a long recovery: a target that is never reached, one inside
//! a backup, one on a timeline that does not lead there, a hole in between.
//!
//! It never takes another target than the one that was asked for.
//!
//! Left out: restoring. Hazard: a plan that ends elsewhere than the recovery; the rules are held against real recoveries in `tests/`.

use std::fmt;
use std::ops::ControlFlow;

use futures_util::StreamExt;
use jiff::Timestamp;
use pgherd_core::types::{Lsn, Timeline};

use crate::document::ReadError;
use crate::name::BackupId;
use crate::wal::records::{Landmark, Record, Records};
use crate::wal::{Archive, BackupRange, Fetched, Fork, Gap, History, Inventory, Wal, WalError, candidates};

/// Segments that are read ahead while one is looked at.
const AHEAD: usize = 4;

/// What is wanted back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Everything that is there.
    Latest,
    /// A base backup as it was when it was consistent.
    Immediate,
    /// Up to the first transaction that ended later than that, or not earlier. PostgreSQL counts microseconds.
    Time { at: Timestamp, inclusive: bool },
    /// Up to the record at this position, with or without it.
    Lsn { at: Lsn, inclusive: bool },
    /// Up to the end of this transaction, with or without it.
    Xid { xid: u32, inclusive: bool },
    /// A restore point; of several with one name the first behind the start of the backup.
    Name(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let without = |inclusive: &bool| if *inclusive { "" } else { ", exclusive" };
        match self {
            Target::Latest => f.write_str("the end of the WAL"),
            Target::Immediate => f.write_str("the end of the backup"),
            Target::Time { at, inclusive } => write!(f, "time {at}{}", without(inclusive)),
            Target::Lsn { at, inclusive } => write!(f, "LSN {at}{}", without(inclusive)),
            Target::Xid { xid, inclusive } => write!(f, "transaction {xid}{}", without(inclusive)),
            Target::Name(name) => write!(f, "restore point \"{name}\""),
        }
    }
}

impl Target {
    /// As PostgreSQL can be told: what is below a microsecond is left out.
    fn as_postgresql_has_it(&self) -> Target {
        match self {
            Target::Time { at, inclusive } => {
                let at = Timestamp::from_microsecond(at.as_microsecond()).unwrap_or(*at);
                Target::Time { at, inclusive: *inclusive }
            }
            other => other.clone(),
        }
    }

    /// `recovery_target` and its like, of which PostgreSQL takes one kind only. Values are to be quoted.
    fn settings(&self) -> Vec<(&'static str, String)> {
        let (kind, inclusive) = match self {
            Target::Latest => return Vec::new(),
            Target::Immediate => return vec![("recovery_target", "immediate".to_owned())],
            Target::Name(name) => return vec![("recovery_target_name", name.clone())],
            Target::Time { at, inclusive } => {
                let at = at.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string();
                (("recovery_target_time", at), inclusive)
            }
            Target::Lsn { at, inclusive } => (("recovery_target_lsn", at.to_string()), inclusive),
            Target::Xid { xid, inclusive } => (("recovery_target_xid", xid.to_string()), inclusive),
        };
        let inclusive = if *inclusive { "on" } else { "off" };
        vec![kind, ("recovery_target_inclusive", inclusive.to_owned())]
    }
}

/// Which line of history is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// The one that leads to the latest timeline there is.
    Latest,
    /// The one that leads to this timeline.
    To(Timeline),
}

/// The end of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    pub xid: u32,
    pub at: Timestamp,
    /// Where its record begins.
    pub lsn: Lsn,
}

/// Where a recovery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Everything before this position is applied.
    pub lsn: Lsn,
    pub timeline: Timeline,
    /// The last transaction that will be there, of those since the start of the backup.
    pub last: Option<Commit>,
    /// The first one that will not.
    pub next: Option<Commit>,
}

/// What a restore does, and where it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub target: Target,
    pub backup: BackupRange,
    /// Where recovery goes: this number stands for the whole line.
    pub timeline: Timeline,
    pub forks: Vec<Fork>,
    /// WAL that recovery reads.
    pub wal_from: Lsn,
    pub wal_segments: u64,
    pub end: End,
}

impl Plan {
    /// What a server has to be told, besides where to get its WAL from. The timeline is a number: the latest one when recovery
    /// begins need not be the one of now.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let mut settings = self.target.settings();
        settings.push(("recovery_target_timeline", self.timeline.to_string()));
        settings
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("there is no base backup")]
    NoBackup,
    #[error("there is no backup {id}")]
    NoSuchBackup { id: BackupId },
    #[error("there is no timeline {timeline}")]
    NoTimeline { timeline: Timeline },
    #[error("no backup is on the line of history that leads to timeline {timeline}")]
    NoBackupOnLine { timeline: Timeline },
    #[error(
        "{target} is before the first moment that can be restored: backup {backup} is consistent from {stop} on, which it reached at {at}"
    )]
    BeforeWindow { target: Target, backup: BackupId, stop: Lsn, at: Timestamp },
    #[error("{target} is not reached: WAL is there up to {end} on timeline {timeline}{}", last_of(.last))]
    AfterEnd { target: Target, end: Lsn, timeline: Timeline, last: Option<Commit> },
    #[error("{target} is not in the WAL that can be recovered from backup {backup}, which goes from {from} to {end}{}", last_of(.last))]
    NotFound { target: Target, backup: BackupId, from: Lsn, end: Lsn, last: Option<Commit> },
    #[error("{target} cannot be reached from backup {backup}: WAL is missing from {} to {} on timeline {}", gap.from, gap.to, gap.timeline)]
    Hole { target: Target, backup: BackupId, gap: Gap },
    #[error(transparent)]
    Wal(#[from] WalError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

fn last_of(last: &Option<Commit>) -> String {
    match last {
        Some(Commit { xid, at, .. }) => format!("; the last transaction in it is {xid}, of {at}"),
        None => "; no transaction ends in it".to_owned(),
    }
}

/// Everything a plan is made from.
pub struct Sources<'a, A = Archive> {
    pub archive: &'a A,
    pub inventory: &'a Inventory,
    /// Those that can be restored, in any order.
    pub backups: &'a [BackupRange],
}

/// What has to be restored to have `target` back. `backup` is used if one is named, else the newest that leads there.
pub async fn plan<A: Wal>(
    sources: &Sources<'_, A>,
    target: &Target,
    line: Line,
    backup: Option<BackupId>,
) -> Result<Plan, Refusal> {
    let target = &target.as_postgresql_has_it();
    let backups = named(sources.backups, backup)?;
    let history = followed(sources.inventory, &backups, line)?;
    let timeline = history.timeline();
    // The newest first: the less WAL there is to read, the sooner it is over.
    let mut on_line: Vec<BackupRange> =
        backups.into_iter().filter(|backup| history.passes(backup.timeline, backup.stop)).collect();
    on_line.sort_by_key(|backup| std::cmp::Reverse((backup.stop, backup.id)));
    let Some(oldest) = on_line.last().copied() else { return Err(Refusal::NoBackupOnLine { timeline }) };

    let mut found: Option<Refusal> = None;
    for backup in on_line.iter().filter(|backup| may_lead_to(backup, target)) {
        match from(sources, target, history, backup).await {
            Ok(plan) => return Ok(plan),
            // In the middle of this backup; an older one is consistent by then. Also a name or a transaction may be older.
            Err(Missed::Earlier) => {}
            Err(Missed::Not(refusal @ Refusal::NotFound { .. })) => {
                found.get_or_insert(refusal);
            }
            Err(Missed::Not(refusal)) => return Err(refusal),
        }
    }
    let BackupRange { id, stop, stopped, .. } = oldest;
    Err(found.unwrap_or(Refusal::BeforeWindow { target: target.clone(), backup: id, stop, at: stopped }))
}

fn named(backups: &[BackupRange], id: Option<BackupId>) -> Result<Vec<BackupRange>, Refusal> {
    match id {
        None if backups.is_empty() => Err(Refusal::NoBackup),
        None => Ok(backups.to_vec()),
        Some(id) => match backups.iter().find(|backup| backup.id == id) {
            Some(backup) => Ok(vec![*backup]),
            None => Err(Refusal::NoSuchBackup { id }),
        },
    }
}

/// The line of history that these backups are recovered along.
pub fn followed<'i>(
    inventory: &'i Inventory,
    backups: &[BackupRange],
    line: Line,
) -> Result<&'i History, Refusal> {
    match line {
        Line::To(timeline) => inventory.history(timeline).ok_or(Refusal::NoTimeline { timeline }),
        Line::Latest => latest(inventory, backups),
    }
}

/// The line to the highest timeline that any of the backups is on the way to.
fn latest<'i>(inventory: &'i Inventory, backups: &[BackupRange]) -> Result<&'i History, Refusal> {
    let leads =
        |history: &&History| backups.iter().any(|backup| history.passes(backup.timeline, backup.stop));
    let highest = backups.iter().map(|backup| backup.timeline).max().unwrap_or_default();
    inventory.histories().rev().find(leads).ok_or(Refusal::NoTimeline { timeline: highest })
}

/// Whether it can be told without reading that the target is not before the end of this backup.
fn may_lead_to(backup: &BackupRange, target: &Target) -> bool {
    match target {
        Target::Lsn { at, .. } => *at >= backup.stop,
        // It may have in itself what was committed until it ended, although its WAL shows no end of a transaction.
        Target::Time { at, .. } => backup.stopped <= *at,
        Target::Latest | Target::Immediate | Target::Xid { .. } | Target::Name(_) => true,
    }
}

/// Why a backup does not do.
enum Missed {
    /// The target is before this backup is consistent.
    Earlier,
    Not(Refusal),
}

impl<E: Into<Refusal>> From<E> for Missed {
    fn from(error: E) -> Missed {
        Missed::Not(error.into())
    }
}

/// Follows a recovery from one backup to its end.
async fn from<A: Wal>(
    sources: &Sources<'_, A>,
    target: &Target,
    history: &History,
    backup: &BackupRange,
) -> Result<Plan, Missed> {
    // A backup by itself needs nothing of what came after it, and a later timeline's beginning may be missing.
    let history = match target {
        Target::Immediate => {
            let timeline = backup.timeline;
            sources.inventory.history(timeline).ok_or(Refusal::NoTimeline { timeline })?
        }
        _ => history,
    };
    let mut recovery = Recovery::new(target.clone(), backup);
    let walked = walk(sources.archive, sources.inventory, history, backup.start, |record, landmark| {
        recovery.look(record, landmark)
    })
    .await?;
    let reached = recovery.stopped.or(match target {
        // Both end where the WAL does, if that is behind the end of the backup.
        Target::Latest if walked.end >= backup.stop => Some(walked.end),
        _ => None,
    });
    let Some(lsn) = reached else {
        if let Some(gap) = walked.gap {
            return Err(Missed::Not(Refusal::Hole { target: target.clone(), backup: backup.id, gap }));
        }
        let (target, last) = (target.clone(), recovery.last);
        return Err(Missed::Not(match target {
            Target::Xid { .. } | Target::Name(_) => {
                Refusal::NotFound { target, backup: backup.id, from: backup.start, end: walked.end, last }
            }
            _ => Refusal::AfterEnd { target, end: walked.end, timeline: walked.timeline, last },
        }));
    };
    if lsn < backup.stop {
        return Err(Missed::Earlier);
    }
    // A hole behind the end of what is known is no hole of this recovery, but the end of the WAL it must not be.
    if let (Target::Latest, Some(gap)) = (target, walked.gap) {
        return Err(Missed::Not(Refusal::Hole { target: target.clone(), backup: backup.id, gap }));
    }
    let end = End {
        lsn,
        timeline: history.timeline_at(Lsn(lsn.0.saturating_sub(1))),
        last: recovery.last,
        next: recovery.next,
    };
    let segments = sources.archive.segments();
    let wal_segments = segments.covering(backup.timeline, backup.start, lsn).count() as u64;
    Ok(Plan {
        target: target.clone(),
        backup: *backup,
        timeline: history.timeline(),
        forks: history.forks().to_vec(),
        wal_from: backup.start,
        wal_segments,
        end,
    })
}

/// PostgreSQL's rules of where a recovery stops, told of each record that it would apply.
struct Recovery {
    target: Target,
    /// Where a backup's records begin and where it is consistent.
    start: Lsn,
    consistent: Lsn,
    stopped: Option<Lsn>,
    last: Option<Commit>,
    next: Option<Commit>,
}

impl Recovery {
    fn new(target: Target, backup: &BackupRange) -> Recovery {
        let (start, consistent) = (backup.start, backup.stop);
        Recovery { target, start, consistent, stopped: None, last: None, next: None }
    }

    fn look(&mut self, record: &Record<'_>, landmark: Option<Landmark>) -> ControlFlow<()> {
        if record.start < self.start {
            return ControlFlow::Continue(());
        }
        let commit = match &landmark {
            Some(Landmark::Commit { xid, at, .. }) => Some(Commit { xid: *xid, at: *at, lsn: record.start }),
            _ => None,
        };
        // Behind the end only the first transaction is of interest, and of that only who it is.
        if self.stopped.is_some() {
            self.next = self.next.or(commit);
            return if self.next.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        }
        if self.stops_before(record, landmark.as_ref()) {
            self.stopped = Some(record.start);
            self.next = commit;
            return ControlFlow::Break(());
        }
        self.last = commit.or(self.last);
        if self.stops_after(record, landmark.as_ref()) {
            self.stopped = Some(record.end);
        }
        ControlFlow::Continue(())
    }

    fn stops_before(&self, record: &Record<'_>, landmark: Option<&Landmark>) -> bool {
        let ended = match landmark {
            Some(Landmark::Commit { xid, at, .. } | Landmark::Abort { xid, at }) => Some((*xid, *at)),
            Some(Landmark::RestorePoint { .. }) | None => None,
        };
        match (&self.target, ended) {
            // Consistent as soon as everything before the end of the backup is applied.
            (Target::Immediate, _) => record.start >= self.consistent,
            (Target::Lsn { at, inclusive: false }, _) => record.start >= *at,
            (Target::Xid { xid, inclusive: false }, Some((ended, _))) => ended == *xid,
            (Target::Time { at, inclusive: true }, Some((_, ended))) => ended > *at,
            (Target::Time { at, inclusive: false }, Some((_, ended))) => ended >= *at,
            _ => false,
        }
    }

    fn stops_after(&self, record: &Record<'_>, landmark: Option<&Landmark>) -> bool {
        match (&self.target, landmark) {
            (Target::Immediate, _) => record.end >= self.consistent,
            (Target::Lsn { at, inclusive: true }, _) => record.start >= *at,
            (
                Target::Xid { xid, inclusive: true },
                Some(Landmark::Commit { xid: ended, .. } | Landmark::Abort { xid: ended, .. }),
            ) => ended == xid,
            (Target::Name(name), Some(Landmark::RestorePoint { name: this, .. })) => this == name,
            _ => false,
        }
    }
}

/// How far WAL was followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Behind the last record that was looked at.
    pub end: Lsn,
    pub timeline: Timeline,
    /// Why it went no further, if something is behind it.
    pub gap: Option<Gap>,
}

/// Looks at each record from the segment of `from` on, along a line of history, until `each` breaks or nothing more is there.
pub async fn walk<A: Wal>(
    archive: &A,
    inventory: &Inventory,
    history: &History,
    from: Lsn,
    mut each: impl FnMut(&Record<'_>, Option<Landmark>) -> ControlFlow<()>,
) -> Result<Walked, Refusal> {
    let segments = archive.segments();
    let files = inventory.files(history, segments.number(from));
    let mut records = Records::new(archive.system(), segments, segments.number(from));
    let mut contents = futures_util::stream::iter(files.present.iter().copied())
        .map(|file| async move { (file, archive.segment(file.segment).await) })
        .buffered(AHEAD);
    let (mut broke, mut ended) = (false, false);
    let mut end = from;
    let mut read = |content: &[u8], until: Option<Lsn>| {
        let over = records.read(content, |record| {
            // In a file of an older timeline what is behind the fork is of a line that was left.
            if broke || until.is_some_and(|until| record.start >= until) {
                return;
            }
            end = record.end;
            broke = each(record, record.landmark()).is_break();
        });
        broke || over.is_some()
    };
    while let Some((file, content)) = contents.next().await {
        ended = read(&content?, file.until);
        if ended {
            break;
        }
    }
    // Behind the last whole file there may be the beginning of the next one.
    let last = files.present.last();
    if !ended && files.gap.is_none() && last.is_none_or(|file| file.until.is_none()) {
        let number = last.map_or(segments.number(from), |file| file.segment.number + 1);
        for file in candidates(history, segments, number) {
            match archive.fetch(file.segment).await {
                Ok(Fetched::Whole(content) | Fetched::Beginning { content, .. }) => {
                    read(&content, file.until);
                    break;
                }
                Err(error) if error.is_absent() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    let timeline = history.timeline_at(Lsn(end.0.saturating_sub(1)));
    Ok(Walked { end, timeline, gap: files.gap.filter(|_| !broke) })
}
