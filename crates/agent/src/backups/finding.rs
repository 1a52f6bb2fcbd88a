//! What WAL says has changed since the parent of a backup, found while the server still makes the checkpoint that the backup begins with.
//!
//! It is found by WAL unless something is in doubt; then everything is read and compared, and the backup says why. Each
//! [`CHECKED_EVERY`]th backup of a line does both and holds the one against the other, and so does every one behind a backup where they differed,
//! until they agree again.
//!
//! WAL comes from the archive, and what has not come there yet from the server itself, whose own log is what its pages have been changed by.
//!
//! Leaves out: what a record says (`pgherd_backup::changed`), and which pages are read. Hazard: as there; so whatever is not certain is a reason
//! to compare.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgherd_backup::changed::{Changed, Collecting, Nearby, Stopped, Uncovered};
use pgherd_backup::document::ReadError;
use pgherd_backup::manifest::{Changes, FoundBy, Manifest};
use pgherd_backup::pack::PAGE_BYTES;
use pgherd_backup::wal::{Archive, History, HistoryError, Segments};
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::base_backup::{own_history, own_wal};
use pgherd_postgres::control::ControlFile;
use pgherd_postgres::sql::Session;
use tokio::task::JoinHandle;

use super::storing::Unexplained;
use super::take::Find;
use super::{Stop, StopWhenDropped, on_a_thread};

/// So much WAL is read however small the cluster is: most of it are ends of segments that were let go of.
const MIN_MUCH_BYTES: u64 = 256 * 1024 * 1024;
/// So many backups of a line read everything once: each week, if there is one a day.
const CHECKED_EVERY: u32 = 7;
const ASKING: Duration = Duration::from_secs(10);

/// The server that is backed up, as far as its WAL is concerned.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) data_dir: PathBuf,
    pub(super) control: ControlFile,
    pub(super) timeline: Timeline,
}

/// It is being found.
pub(super) struct Finding {
    by: FoundBy,
    parent_stop: Lsn,
    /// As far as WAL is complete; none where it is not asked at all.
    reading: Option<Result<JoinHandle<Result<Collecting, Uncovered>>, Unknown>>,
    /// WAL since then that is more than the parent is not read.
    most: Option<(Lsn, u64)>,
    /// Whatever way this ends, whoever reads WAL ends with it.
    _ended: StopWhenDropped,
}

/// What was found.
pub(super) struct Found {
    pub(super) by: FoundBy,
    /// None where it is compared only.
    pub(super) changed: Mutex<Option<Changed>>,
    pub(super) why: Option<String>,
    pub(super) wal_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
enum Unknown {
    #[error(transparent)]
    Uncovered(#[from] Uncovered),
    #[error("the history of timeline {timeline} cannot be read: {error}")]
    History { timeline: Timeline, error: ReadError },
    #[error("the repository has another history of timeline {timeline} than the server")]
    OtherHistory { timeline: Timeline },
    #[error(transparent)]
    Malformed(#[from] HistoryError),
    #[error("the server does not say how far its WAL goes")]
    Position,
}

impl Finding {
    pub(super) async fn begin(
        archive: &Archive,
        parent: &Manifest,
        server: Server,
        find: Find,
        session: &Session,
    ) -> Finding {
        let by = match find {
            Find::Comparison => FoundBy::Comparison,
            Find::Both => FoundBy::Both,
            Find::Wal => FoundBy::Wal,
            Find::Automatic => automatic(parent.changes.as_ref()),
        };
        let most = (find == Find::Automatic).then_some((parent.start, parent.bytes.max(MIN_MUCH_BYTES)));
        let stop = Stop::default();
        let reading = match by {
            FoundBy::Comparison => None,
            FoundBy::Wal | FoundBy::Both => Some(begin(archive, parent, &server, session, most, &stop).await),
        };
        Finding { by, parent_stop: parent.stop, reading, most, _ended: stop.when_dropped() }
    }

    /// Where the backup begins, all is known.
    pub(super) async fn up_to(self, start: Lsn) -> Found {
        let found = |by, changed, why, wal_bytes| Found { by, changed: Mutex::new(changed), why, wal_bytes };
        let Some(reading) = self.reading else { return found(FoundBy::Comparison, None, None, 0) };
        let parent_stop = self.parent_stop;
        let most = self.most;
        let known = async {
            let collecting = reading?.await.map_err(Uncovered::from)??;
            if start < parent_stop {
                return Err(Uncovered::Overlaps { stop: parent_stop, start }.into());
            }
            too_much(most, start)?;
            let work = on_a_thread(move || collecting.up_to(start));
            Ok::<_, Unknown>(work.await.map_err(Uncovered::from)??)
        };
        match known.await {
            Ok((changed, wal_bytes)) => found(self.by, Some(changed), None, wal_bytes),
            Err(error) => {
                let why = error.to_string();
                tracing::warn!(why, "what has changed is not known from WAL; everything is compared");
                found(FoundBy::Comparison, None, Some(why), 0)
            }
        }
    }
}

/// Backups of the line that were made by WAL alone since both ways were held against each other, up to this one. So many that the next one does
/// both, if it has to: pages were damaged, which nobody would read again, or the two ways differed and nothing has shown yet that they agree.
pub(super) fn unchecked(by: FoundBy, parent: Option<&Changes>, is_damaged: bool) -> u32 {
    let before = parent.map_or(0, |changes| changes.unchecked);
    let differed = parent.is_some_and(|changes| changes.unexplained > 0);
    match by {
        _ if is_damaged => CHECKED_EVERY,
        FoundBy::Both => 0,
        FoundBy::Wal | FoundBy::Comparison if differed => CHECKED_EVERY,
        FoundBy::Wal => before.saturating_add(1),
        FoundBy::Comparison => before,
    }
}

/// By what the parent says of itself; a full backup says nothing.
fn automatic(parent: Option<&Changes>) -> FoundBy {
    let differed = parent.is_some_and(|changes| changes.unexplained > 0);
    let unchecked = parent.map_or(0, |changes| changes.unchecked);
    match differed || unchecked.saturating_add(1) >= CHECKED_EVERY {
        true => FoundBy::Both,
        false => FoundBy::Wal,
    }
}

fn too_much(most: Option<(Lsn, u64)>, position: Lsn) -> Result<(), Uncovered> {
    match most {
        Some((from, bytes)) if position.0.saturating_sub(from.0) > bytes => Err(Uncovered::MuchWal),
        _ => Ok(()),
    }
}

async fn begin(
    archive: &Archive,
    parent: &Manifest,
    server: &Server,
    session: &Session,
    most: Option<(Lsn, u64)>,
    stop: &Stop,
) -> Result<JoinHandle<Result<Collecting, Uncovered>>, Unknown> {
    let control = &server.control;
    let other = |what| Err(Unknown::from(Uncovered::OtherServer { what }));
    if control.page_bytes as usize != PAGE_BYTES {
        return Err(Uncovered::PageSize { bytes: control.page_bytes }.into());
    }
    if parent.facts.page_bytes != control.page_bytes {
        return other("pages");
    }
    if parent.wal_segment_bytes != control.wal_segment_bytes {
        return other("segments of WAL");
    }
    // pg_checksums writes them into every page, and not into WAL.
    if parent.facts.data_checksums != control.data_checksums {
        return other("checksums");
    }
    let history = history(archive, server).await?;
    if !history.passes(parent.timeline, parent.stop) {
        let (timeline, stop) = (parent.timeline, parent.stop);
        return Err(Uncovered::NotOnTheLine { timeline, stop }.into());
    }
    // A standby begins at a checkpoint that it has had for some time.
    let written = position(session).await.ok_or(Unknown::Position)?;
    too_much(most, written)?;
    let mut collecting = collect(archive, server, history, parent.start, stop);
    Ok(on_a_thread(move || async move {
        collecting.through(written).await?;
        Ok(collecting)
    }))
}

/// Where no backup begins before that is begun from now on.
async fn position(session: &Session) -> Option<Lsn> {
    let query = "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN redo_lsn \
                 ELSE pg_catalog.pg_current_wal_flush_lsn() END::pg_catalog.text \
                 FROM pg_catalog.pg_control_checkpoint()";
    let asked = tokio::time::timeout(ASKING, session.query_one(query, &[])).await;
    let text: String = asked.ok()?.ok()?.try_get(0).ok()?;
    text.parse().ok()
}

fn collect(archive: &Archive, server: &Server, history: History, from: Lsn, stop: &Stop) -> Collecting {
    let (data_dir, segments) = (server.data_dir.clone(), archive.segments());
    let nearby: Nearby =
        Arc::new(move |segment| own_wal(&data_dir, &segments.file_name(segment), Segments::bytes(segments)));
    let stop = stop.clone();
    let stopped: Stopped = Arc::new(move || stop.is_wanted());
    Collecting::begin(archive.on_own_thread(), history, from, server.control.file_pages, nearby, stopped)
}

async fn history(archive: &Archive, server: &Server) -> Result<History, Unknown> {
    let timeline = server.timeline;
    if timeline == Timeline(1) {
        return Ok(History::first());
    }
    let own = own_history(&server.data_dir, timeline)
        .map(|content| History::parse(timeline, &content))
        .transpose()?;
    match (archive.history(timeline).await, own) {
        (Ok(history), Some(own)) if history != own => Err(Unknown::OtherHistory { timeline }),
        (Ok(history), _) | (Err(_), Some(history)) => Ok(history),
        (Err(error), None) => Err(Unknown::History { timeline, error }),
    }
}

/// What of this was not changed while the backup was taken either: between the start and the end WAL names more.
pub(super) async fn without_later(
    pages: Vec<Unexplained>,
    archive: &Archive,
    server: &Server,
    start: Lsn,
    stop: Lsn,
) -> Vec<Unexplained> {
    if pages.is_empty() {
        return pages;
    }
    let ending = Stop::default();
    let _ended = ending.when_dropped();
    let later = async {
        let collecting = collect(archive, server, history(archive, server).await?, start, &ending);
        let work = on_a_thread(move || collecting.whole(stop));
        Ok::<_, Unknown>(work.await.map_err(Uncovered::from)??)
    };
    match later.await {
        Ok(later) => pages.into_iter().filter(|page| !later.has(&page.file, page.page)).collect(),
        Err(error) => {
            tracing::warn!(%error, "WAL of the backup cannot be looked through");
            pages
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn behind(parent: Option<&Changes>, found_by: FoundBy, is_damaged: bool) -> Changes {
        let unchecked = unchecked(found_by, parent, is_damaged);
        Changes { found_by, why: None, read_bytes: 0, wal_bytes: 0, unchecked, unexplained: 0 }
    }

    #[test]
    fn each_seventh_backup_and_those_behind_a_difference_are_made_both_ways() {
        let mut before: Option<Changes> = None;
        let mut ways = Vec::new();
        for _ in 0..9 {
            let found_by = automatic(before.as_ref());
            before = Some(behind(before.as_ref(), found_by, false));
            ways.push(found_by == FoundBy::Both);
        }
        assert_eq!(ways, [false, false, false, false, false, false, true, false, false]);
        let differed = Changes { unexplained: 1, ..behind(before.as_ref(), FoundBy::Both, false) };
        assert_eq!(automatic(Some(&differed)), FoundBy::Both);
        // Neither way alone says that the two agree again.
        for found_by in [FoundBy::Comparison, FoundBy::Wal] {
            let next = behind(Some(&differed), found_by, false);
            assert_eq!(automatic(Some(&next)), FoundBy::Both);
            let after = behind(Some(&next), FoundBy::Both, false);
            assert_eq!(automatic(Some(&after)), FoundBy::Wal);
        }
    }

    #[test]
    fn behind_damaged_pages_everything_is_read() {
        let damaged = behind(None, FoundBy::Wal, true);
        assert_eq!(automatic(Some(&damaged)), FoundBy::Both);
        assert_eq!(
            automatic(Some(&behind(Some(&damaged), FoundBy::Both, true))),
            FoundBy::Both,
            "as long as they are"
        );
        assert_eq!(automatic(Some(&behind(Some(&damaged), FoundBy::Both, false))), FoundBy::Wal);
    }

    #[test]
    fn more_wal_than_there_are_files_is_not_read() {
        let most = Some((Lsn(1000), 500));
        assert!(too_much(most, Lsn(1500)).is_ok());
        assert!(matches!(too_much(most, Lsn(1501)), Err(Uncovered::MuchWal)));
        assert!(too_much(None, Lsn(1 << 60)).is_ok());
    }
}
