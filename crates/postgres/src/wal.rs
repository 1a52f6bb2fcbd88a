//! The write-ahead log on disk: where its last complete record ends, and which timelines led there.
//!
//! A node's vote is its position, and the position is read from the files, because a server cannot say it:
//! after a restart its receive position is null, and it counts a torn record at the end (S2). [`end_of_wal`]
//! follows pages and records as PostgreSQL's own recovery does and stops where that would stop.
//!
//! Leaves out: what a record says. Hazard: an end reported too low loses acknowledged commits in an election;
//! one too high elects a node that cannot deliver what it claimed.

use std::path::{Path, PathBuf};

use pgherd_core::types::{Lsn, SystemId, Timeline};

use crate::control::ControlFile;
use crate::durable;
use crate::error::{Error, Result};
use crate::instance::Instance;

pub mod history;
mod reader;

pub use history::History;
use reader::{Reader, Start, Stop};

/// Sizes and names of one cluster's WAL files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalFiles {
    pub dir: PathBuf,
    pub segment_bytes: u32,
    pub page_bytes: u32,
    pub system_id: SystemId,
    /// `XLOG_PAGE_MAGIC` of the major version that wrote them.
    pub page_magic: u16,
}

impl WalFiles {
    pub fn of(instance: &Instance, control: &ControlFile) -> Result<WalFiles> {
        let major = instance.installation.version.major;
        let Some(page_magic) = page_magic(major) else {
            return Err(Error::Answer { what: format!("the WAL of PostgreSQL {major} is unknown") });
        };
        Ok(WalFiles {
            dir: instance.pg_wal(),
            segment_bytes: control.wal_segment_bytes,
            page_bytes: control.wal_page_bytes,
            system_id: control.system_id,
            page_magic,
        })
    }

    pub fn segment_of(&self, lsn: Lsn) -> u64 {
        lsn.0 / u64::from(self.segment_bytes)
    }

    /// `000000010000000000000001`: timeline and number in PostgreSQL's three groups of eight digits.
    pub fn segment_name(&self, timeline: Timeline, segment: u64) -> String {
        let per_group = (1_u64 << 32) / u64::from(self.segment_bytes);
        format!("{:08X}{:08X}{:08X}", timeline.0, segment / per_group, segment % per_group)
    }

    pub fn segment_path(&self, timeline: Timeline, segment: u64) -> PathBuf {
        self.dir.join(self.segment_name(timeline, segment))
    }

    /// The timeline and number in a name; `None` for `.history`, `.partial`, `.backup` and everything else.
    pub fn parse_segment_name(&self, name: &str) -> Option<(Timeline, u64)> {
        if name.len() != 24 || !name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F')) {
            return None;
        }
        let group = |at: usize| u64::from_str_radix(&name[at..at + 8], 16).ok();
        let per_group = (1_u64 << 32) / u64::from(self.segment_bytes);
        let (timeline, high, low) = (group(0)?, group(8)?, group(16)?);
        (low < per_group).then(|| (Timeline(timeline as u32), high * per_group + low))
    }
}

/// PostgreSQL changes it whenever the format of WAL changes.
fn page_magic(major: u16) -> Option<u16> {
    Some(match major {
        14 => 0xD10D,
        15 => 0xD110,
        16 => 0xD113,
        17 => 0xD116,
        18 => 0xD118,
        _ => return None,
    })
}

/// A place in WAL where a record is known to end: one that was replayed, or an earlier answer of [`end_of_wal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    pub timeline: Timeline,
    pub lsn: Lsn,
}

/// What a node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndOfWal {
    /// Of the last complete record. A record that ends exactly at a fork belongs to the older timeline.
    pub timeline: Timeline,
    /// Where that record ends.
    pub lsn: Lsn,
    /// Where that record starts; `None` if none was read behind the boundary that the search began at.
    pub last_record: Option<Lsn>,
    /// The line of history that the record is on. The end is that of the files: where another timeline forked off
    /// before it, what lies behind the fork is counted all the same, and is for the caller to judge (rule 4).
    pub history: History,
    /// The newest line of history that descends from where this node has been; a start follows it.
    pub newest: Timeline,
    /// Behind the end the start of an unfinished record was found. Not counted in `lsn`.
    pub torn: bool,
    /// All that a restart needs to become consistent is there. False for a half-made clone or rewind.
    pub consistent: bool,
    /// The file of a newer timeline that ends before `lsn` although an older file of the same segment holds
    /// everything up to it. PostgreSQL would read the newer one and stop too early; a start moves it away.
    pub covered_by: Option<PathBuf>,
    /// WAL read to find the end.
    pub bytes_read: u64,
}

/// Finds the end of the last complete record of `instance` and syncs everything up to it. Blocks.
///
/// The server may be dead, or running and sealed; on a primary the answer is old when it arrives. `known`
/// shortens the search from all WAL since the last checkpoint to what lies behind a known boundary.
pub fn end_of_wal(instance: &Instance, known: Option<Boundary>) -> Result<EndOfWal> {
    let control = ControlFile::read(&instance.control_file())?;
    let files = WalFiles::of(instance, &control)?;
    let unfinished_backup = instance.data_dir.join("backup_label").exists();
    find_end(&files, &control, unfinished_backup, known)
}

fn find_end(
    files: &WalFiles,
    control: &ControlFile,
    unfinished_backup: bool,
    known: Option<Boundary>,
) -> Result<EndOfWal> {
    let replayed = match control.min_recovery_timeline == control.timeline() {
        true => control.min_recovery_point.max(control.checkpoint),
        false => control.checkpoint,
    };
    let been = Boundary { timeline: control.timeline(), lsn: replayed };
    let known = known.filter(|known| known.timeline >= been.timeline && known.lsn >= been.lsn);
    let been = known.unwrap_or(been);
    let history = History::newest_from(&files.dir, been.timeline, been.lsn)?;
    let mut reader = Reader::new(files, &history);

    let end = 'found: {
        if let Some(known) = known
            && reader.has_page_before(known.lsn)?
        {
            break 'found reader.read_to_end(Start::Boundary(known.lsn))?;
        }
        // pg_rewind and the end of a base backup write a minimum recovery point of their own making, which need not
        // be a boundary: it saves time only where a record follows it.
        if control.min_recovery_point > control.checkpoint {
            let end = reader.read_to_end(Start::Boundary(control.min_recovery_point))?;
            if end.last_record.is_some() {
                break 'found end;
            }
        }
        let end = reader.read_to_end(Start::Checkpoint(control.checkpoint))?;
        if end.last_record.is_none() {
            let what =
                format!("the record of the last checkpoint at {} is missing or broken", control.checkpoint);
            return Err(Error::damaged(&files.dir, what));
        }
        end
    };
    let mut bytes_read = reader.bytes_read();
    let newest = history.timeline();
    let (mut end, mut history) = (end, history);
    // It stopped where a newer timeline forked off of which there is nothing here. The files may go on.
    if end.timeline != newest && history.end_of(end.timeline) == Some(end.lsn) {
        let own = History::read(&files.dir, end.timeline)?.unwrap_or(History::root(end.timeline));
        let mut reader = Reader::new(files, &own);
        let further = reader.read_to_end(Start::Boundary(end.lsn))?;
        bytes_read += reader.bytes_read();
        if further.last_record.is_some() {
            end = further;
            history = own;
        }
    }
    // Also what was replayed: a primary that crashed and came back as a standby replays WAL that nobody synced.
    sync(files, &history, control.checkpoint.min(end.lsn), end.lsn)?;

    let at_least = control.min_recovery_point.max(control.backup_start);
    let consistent = end.lsn >= at_least && !unfinished_backup && !control.backup_end_required;
    Ok(EndOfWal {
        timeline: end.timeline,
        lsn: end.lsn,
        last_record: end.last_record,
        torn: matches!(end.stop, Stop::Torn),
        covered_by: end.covered_by,
        history,
        newest,
        consistent,
        bytes_read,
    })
}

/// Puts a segment or a history beside the WAL of a copy that receives none, durably. A server that runs finds it when it looks there next. Blocks.
pub fn put_beside(instance: &Instance, name: &str, content: &[u8]) -> Result<()> {
    durable::write(&instance.pg_wal().join(name), content, durable::PRIVATE)
}

/// What the file of a segment has up to one of its bytes; `None`: there is no such file, or it is shorter. Blocks.
pub fn beginning(instance: &Instance, name: &str, bytes: usize) -> Result<Option<Vec<u8>>> {
    let path = instance.pg_wal().join(name);
    let content = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        content => content.map_err(Error::io("read", &path))?,
    };
    Ok(content.get(..bytes).map(<[u8]>::to_vec))
}

/// Syncs every file that may hold WAL between two positions, then the directory: what a vote counts must
/// survive a power cut, also where the server had not come to sync it.
fn sync(files: &WalFiles, history: &History, from: Lsn, to: Lsn) -> Result<()> {
    for segment in files.segment_of(from)..=files.segment_of(to) {
        for timeline in history.timelines() {
            match durable::sync_file(&files.segment_path(timeline, segment)) {
                Err(error) if error.io_kind() == Some(std::io::ErrorKind::NotFound) => {}
                other => other?,
            }
        }
    }
    durable::sync_dir(&files.dir)
}

/// Puts shorter files of newer timelines out of PostgreSQL's way, so that a start reads the older file that holds more.
/// Such a file is left by a standby that was killed while it fetched the segment of a fork anew, which PostgreSQL does
/// from the segment's beginning. Only for a stopped server. Blocks.
pub(crate) fn uncover(instance: &Instance) -> Result<()> {
    let control = ControlFile::read(&instance.control_file())?;
    let files = WalFiles::of(instance, &control)?;
    let history = History::newest_from(&files.dir, control.timeline(), control.checkpoint)?;
    let mut newer_of = history.forks().iter().skip(1).map(|fork| fork.timeline).chain([history.timeline()]);
    let mut differ = false;
    for fork in history.forks() {
        let newer = newer_of.next().unwrap_or(history.timeline());
        let segment = files.segment_of(fork.end);
        let length = (fork.end.0 % u64::from(files.segment_bytes)) as usize;
        let newer = durable::read(&files.segment_path(newer, segment))?;
        let older = durable::read(&files.segment_path(fork.timeline, segment))?;
        // Up to the fork one is a copy of the other, where both are complete.
        if let (Some(newer), Some(older)) = (newer, older) {
            differ |= newer.get(..length) != older.get(..length);
        }
    }
    if differ && let Some(newer) = end_of_wal(instance, None)?.covered_by {
        tracing::info!(file = %newer.display(), "moved away: it was fetched in part, and an older file holds more");
        durable::rename(&newer, &newer.with_extension("incomplete"))?;
    }
    Ok(())
}

/// Segments of `pg_wal` from a timeline, in order.
pub fn segments(files: &WalFiles, timeline: Timeline) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&files.dir).map_err(Error::io("list", &files.dir))? {
        let entry = entry.map_err(Error::io("list", &files.dir))?;
        if let Some((its, number)) =
            entry.file_name().to_str().and_then(|name| files.parse_segment_name(name))
            && its == timeline
        {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// `00000002.history`.
pub fn history_name(timeline: Timeline) -> String {
    format!("{:08X}.history", timeline.0)
}

pub(crate) fn history_path(dir: &Path, timeline: Timeline) -> PathBuf {
    dir.join(history_name(timeline))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(segment_bytes: u32) -> WalFiles {
        WalFiles {
            dir: "/pg_wal".into(),
            segment_bytes,
            page_bytes: 8192,
            system_id: SystemId(1),
            page_magic: 0xD110,
        }
    }

    #[test]
    fn segment_names_are_postgresqls() {
        let usual = files(16 << 20);
        assert_eq!(usual.segment_name(Timeline(1), 0x1_02), "000000010000000100000002");
        assert_eq!(usual.segment_name(Timeline(0x1F), 0xFF), "0000001F00000000000000FF");
        let small = files(1 << 20);
        assert_eq!(small.segment_name(Timeline(1), 0x1000), "000000010000000100000000");
        for (timeline, segment) in [(1, 0), (2, 0xFFF), (3, 0x12345)] {
            let name = small.segment_name(Timeline(timeline), segment);
            assert_eq!(small.parse_segment_name(&name), Some((Timeline(timeline), segment)));
        }
        for other in
            ["00000002.history", "000000010000000000000001.partial", "00000001000000000000FFFF", "xlogtemp.1"]
        {
            assert_eq!(usual.parse_segment_name(other), None, "{other}");
        }
    }
}
