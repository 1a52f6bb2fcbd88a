//! Where something is in the WAL of an archive: a position, a time, a transaction.
//!
//! A position is looked up by the names of segments. For a time each timeline is searched by halves: times of transactions grow, as
//! far as the server's clock did. A transaction can be anywhere, so for it everything is read, from the first segment on.
//!
//! A timeline's first segments have what the one before it wrote, too, up to the fork; that is told of the older one only. Leaves out
//! what a record changes. Hazard: none for data; a hole in the archive can hide the first one, so holes are told.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pgherd_backup::wal::records::{Landmark, Record, Records};
use pgherd_backup::wal::{Fetched, Inventory, Segment};
use pgherd_core::types::{Lsn, Timeline};
use serde::Serialize;
use tokio::sync::watch;

use super::{FileError, Files, Run, runs};
use crate::backups::Progress;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    Lsn(Lsn),
    /// The first end of a transaction, or restore point, at that time or later.
    Time(Timestamp),
    /// Its first record, and its end.
    Xid(u32),
}

/// A record that was sought.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub timeline: u32,
    /// The file in which it begins.
    pub segment: String,
    pub lsn: String,
    /// Where the next record can begin.
    pub end: String,
    #[serde(flatten)]
    pub what: What,
    /// Whether it is on the way to the newest timeline. What is not was left behind by a promotion.
    pub is_current: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum What {
    Commit {
        xid: u32,
        at: Timestamp,
    },
    Abort {
        xid: u32,
        at: Timestamp,
    },
    RestorePoint {
        name: String,
        at: Timestamp,
    },
    /// Of a transaction, or of none.
    Other {
        xid: Option<u32>,
    },
    /// No record that begins in this segment; it begins before, or there is none.
    Nothing,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub findings: Vec<Finding>,
    /// What the archive has, with each hole.
    pub runs: Vec<Run>,
}

/// Whether reading goes on.
type Goes = std::ops::ControlFlow<()>;

impl Files {
    pub async fn find(&self, sought: Sought, progress: &watch::Sender<Progress>) -> Result<Found, FileError> {
        let inventory = self.archive.inventory().await?;
        let mut by_timeline: BTreeMap<Timeline, Vec<Segment>> = BTreeMap::new();
        for segment in inventory.segments() {
            by_timeline.entry(segment.timeline).or_default().push(segment);
        }
        // Behind what is whole there may be the beginning of one.
        for (timeline, segments) in &mut by_timeline {
            if let Some(number) = inventory.last_beginning(*timeline)
                && segments.last().is_none_or(|last| last.number < number)
            {
                segments.push(Segment { timeline: *timeline, number });
            }
        }
        let search = Search { files: self, inventory: &inventory, progress };
        let mut findings = Vec::new();
        if let Sought::Xid(_) = sought {
            search.expect(by_timeline.values().map(Vec::len).sum());
        }
        for (timeline, segments) in &by_timeline {
            match sought {
                Sought::Lsn(lsn) => search.position(lsn, segments, &mut findings).await?,
                Sought::Time(at) => search.time(at, *timeline, segments, &mut findings).await?,
                Sought::Xid(xid) => search.transaction(xid, *timeline, segments, &mut findings).await?,
            }
        }
        Ok(Found { findings, runs: runs(&inventory, self.archive.segments()) })
    }
}

struct Search<'a> {
    files: &'a Files,
    inventory: &'a Inventory,
    progress: &'a watch::Sender<Progress>,
}

impl Search<'_> {
    fn expect(&self, segments: usize) {
        let bytes = u64::from(self.files.archive.segments().bytes());
        self.progress.send_modify(|progress| progress.total_bytes += bytes * segments as u64);
    }

    async fn content(&self, segment: Segment) -> Result<bytes::Bytes, FileError> {
        let (Fetched::Whole(content) | Fetched::Beginning { content, .. }) =
            self.files.archive.fetch(segment).await?;
        let read_bytes = content.len() as u64;
        self.progress.send_modify(|progress| progress.done_bytes += read_bytes);
        Ok(content)
    }

    /// Where a timeline's own WAL begins: before that it has what the one before it wrote.
    fn begin_of(&self, timeline: Timeline) -> Lsn {
        let forks = self.inventory.history(timeline).map(|history| history.forks());
        forks.and_then(|forks| forks.last()).map_or(Lsn::ZERO, |fork| fork.until)
    }

    fn finding(&self, timeline: Timeline, start: Lsn, end: Lsn, what: What) -> Finding {
        let segments = self.files.archive.segments();
        let segment = Segment { timeline, number: segments.number(start) };
        let newest = self.inventory.newest_timeline();
        let is_current = newest == Some(timeline)
            || newest
                .and_then(|newest| self.inventory.history(newest))
                .is_some_and(|history| history.timeline_at(start) == timeline);
        Finding {
            timeline: timeline.0,
            segment: segments.file_name(segment),
            lsn: start.to_string(),
            end: end.to_string(),
            what,
            is_current,
        }
    }

    /// Each record of these segments, in order; anew behind each hole.
    async fn read(
        &self,
        segments: &[Segment],
        mut each: impl FnMut(&Record<'_>) -> Goes,
    ) -> Result<(), FileError> {
        let archive = &self.files.archive;
        let mut records: Option<Records> = None;
        for segment in segments {
            let position = archive.segments().start(*segment);
            if records.as_ref().is_none_or(|records| records.position() != position) {
                records = None;
            }
            let content = match self.content(*segment).await {
                Ok(content) => content,
                // It went meanwhile, or is a beginning of which the first piece is not there.
                Err(FileError::Read(error)) if error.is_absent() => {
                    records = None;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let reading = records
                .get_or_insert_with(|| Records::new(archive.system(), archive.segments(), segment.number));
            let mut goes = Goes::Continue(());
            let ended = reading.read(&content, |record| {
                if goes.is_continue() {
                    goes = each(record);
                }
            });
            if goes.is_break() {
                return Ok(());
            }
            if ended.is_some() {
                records = None;
            }
        }
        Ok(())
    }

    async fn position(&self, lsn: Lsn, segments: &[Segment], to: &mut Vec<Finding>) -> Result<(), FileError> {
        let number = self.files.archive.segments().number(lsn);
        let Some(at) = segments.iter().position(|segment| segment.number == number) else { return Ok(()) };
        // A record may begin in the one before, and end in the one behind.
        let from = at.saturating_sub(1);
        let around = &segments[from..segments.len().min(at + 2)];
        self.expect(around.len());
        let mut found = None;
        self.read(around, |record| {
            if record.start <= lsn && lsn < record.end {
                found = Some((record.start, record.end, what(record)));
            }
            if record.start > lsn || found.is_some() { Goes::Break(()) } else { Goes::Continue(()) }
        })
        .await?;
        let timeline = segments[at].timeline;
        let (start, end, what) = found.unwrap_or((lsn, lsn, What::Nothing));
        let mut finding = self.finding(timeline, start, end, what);
        // It is the file that was asked for.
        finding.segment = self.files.archive.segments().file_name(segments[at]);
        to.push(finding);
        Ok(())
    }

    async fn time(
        &self,
        at: Timestamp,
        timeline: Timeline,
        segments: &[Segment],
        to: &mut Vec<Finding>,
    ) -> Result<(), FileError> {
        let (mut low, mut high) = (0, segments.len());
        while low < high {
            let middle = low.midpoint(high);
            match self.latest(segments, middle, high).await? {
                Some((there, latest)) if latest < at => low = there + 1,
                _ => high = middle,
            }
        }
        // What begins in the segment before and ends here.
        let from = low.saturating_sub(1);
        let begin = self.begin_of(timeline);
        let mut found = None;
        self.read(&segments[from..], |record| {
            let is_it =
                record.start >= begin && record.landmark().is_some_and(|landmark| time_of(&landmark) >= at);
            if is_it {
                found = Some((record.start, record.end, what(record)));
                return Goes::Break(());
            }
            Goes::Continue(())
        })
        .await?;
        to.extend(found.map(|(start, end, what)| self.finding(timeline, start, end, what)));
        Ok(())
    }

    /// The latest time in the first segment from there on that has one, and which segment that is.
    async fn latest(
        &self,
        segments: &[Segment],
        from: usize,
        until: usize,
    ) -> Result<Option<(usize, Timestamp)>, FileError> {
        for at in from..until {
            let mut latest: Option<Timestamp> = None;
            self.read(&segments[at..=at], |record| {
                latest = latest.max(record.landmark().map(|landmark| time_of(&landmark)));
                Goes::Continue(())
            })
            .await?;
            if let Some(latest) = latest {
                return Ok(Some((at, latest)));
            }
        }
        Ok(None)
    }

    async fn transaction(
        &self,
        xid: u32,
        timeline: Timeline,
        segments: &[Segment],
        to: &mut Vec<Finding>,
    ) -> Result<(), FileError> {
        let begin = self.begin_of(timeline);
        let (mut first, mut last) = (None, None);
        self.read(segments, |record| {
            if record.start < begin {
                return Goes::Continue(());
            }
            let what = what(record);
            let is_end = match &what {
                What::Commit { xid: ended, .. } | What::Abort { xid: ended, .. } => *ended == xid,
                _ => false,
            };
            if is_end {
                last = Some((record.start, record.end, what));
                return Goes::Break(());
            }
            if record.xid() == Some(xid) && first.is_none() {
                first = Some((record.start, record.end, what));
            }
            Goes::Continue(())
        })
        .await?;
        let found = first.into_iter().chain(last);
        to.extend(found.map(|(start, end, what)| self.finding(timeline, start, end, what)));
        Ok(())
    }
}

fn what(record: &Record<'_>) -> What {
    match record.landmark() {
        Some(Landmark::Commit { xid, at, .. }) => What::Commit { xid, at },
        Some(Landmark::Abort { xid, at }) => What::Abort { xid, at },
        Some(Landmark::RestorePoint { name, at }) => What::RestorePoint { name, at },
        None => What::Other { xid: record.xid() },
    }
}

fn time_of(landmark: &Landmark) -> Timestamp {
    match landmark {
        Landmark::Commit { at, .. } | Landmark::Abort { at, .. } | Landmark::RestorePoint { at, .. } => *at,
    }
}
