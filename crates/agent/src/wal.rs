//! One file of WAL into a repository, or out of it: what `archive_command` and `restore_command` call.
//!
//! Which cluster it is, and how large its segments are, is read from the `pg_control` of the data directory that PostgreSQL calls
//! the command in.
//!
//! Left out: streaming, which needs no command. Hazard: PostgreSQL takes exit code 1 of a `restore_command` for the end of the
//! WAL and promotes. So [`Files::fetch`] says [`Fetched::Absent`] only for what is not there for certain; anything else is an
//! error, for which the program exits with a code above 125, and recovery stops.

use std::path::{Path, PathBuf};

use pgherd_backup::document::ReadError;
use pgherd_backup::foreign::ForeignError;
use pgherd_backup::wal::{Archive, Archived, Inventory, Segment, SegmentError, Segments, WalError};
use pgherd_core::types::Timeline;
use pgherd_postgres::control::ControlFile;

use crate::repository::RepositoryError;

mod fetch;
pub mod find;
mod foreign;
mod spool;
pub mod switch;

pub use fetch::{AHEAD_BYTES, Fetched};
pub use foreign::ForeignFiles;

/// `000000010000000000000001.00000028.backup` and `00000002.history` have no more.
const MAX_NAME_BYTES: usize = 64;
const HISTORY: &str = ".history";
const PARTIAL: &str = ".partial";
const BACKUP: &str = ".backup";

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("\"{name}\" is no name of a file of WAL with segments of {segment_bytes} bytes")]
    Name { name: String, segment_bytes: u32 },
    #[error("{data_dir} is no data directory")]
    DataDir { data_dir: PathBuf, source: pgherd_postgres::Error },
    #[error("cannot {doing} {path}")]
    File { doing: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Wal(#[from] WalError),
    #[error(transparent)]
    Foreign(#[from] ForeignError),
}

impl FileError {
    fn file(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FileError {
        move |source| FileError::File { doing, path: path.to_owned(), source }
    }
}

/// The WAL of one cluster in a repository, file by file.
pub struct Files {
    archive: Archive,
    data_dir: PathBuf,
}

/// Segments of one timeline that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub timeline: u32,
    pub first: String,
    pub last: String,
    pub segments: u64,
}

impl Files {
    /// Of the cluster that a data directory belongs to, in the repository that a file names.
    pub async fn open(repository: &Path, data_dir: &Path) -> Result<Files, FileError> {
        let no_data_dir = |source| FileError::DataDir { data_dir: data_dir.to_owned(), source };
        let control = ControlFile::of(data_dir).map_err(no_data_dir)?;
        let segments = Segments::new(control.wal_segment_bytes)?;
        let repository = crate::repository::open(repository).await?;
        let archive = Archive::new(&repository, control.system_id, segments);
        Ok(Files { archive, data_dir: data_dir.to_owned() })
    }

    /// Archives a file; it is durable when this returns.
    pub async fn push(&self, file: &Path) -> Result<Pushed, FileError> {
        push(&self.archive, file).await
    }

    /// Brings the file `name` to `to`, which is there as a whole or not at all.
    pub async fn fetch(&self, name: &str, to: &Path) -> Result<Fetched, FileError> {
        fetch::fetch(&self.archive, &self.data_dir, name, to).await
    }

    /// Fetches the segment `first` and those behind it before they are asked for. `false`: another process does.
    pub async fn fill(&self, first: &str) -> Result<bool, FileError> {
        fetch::fill(&self.archive, &self.data_dir, first).await
    }

    /// What is there. A new run begins behind each hole.
    pub async fn runs(&self) -> Result<Vec<Run>, FileError> {
        Ok(runs(&self.archive.inventory().await?, self.archive.segments()))
    }
}

fn runs(inventory: &Inventory, segments: Segments) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut before: Option<Segment> = None;
    for segment in inventory.segments() {
        let name = segments.file_name(segment);
        let follows = before
            .is_some_and(|before| before.timeline == segment.timeline && before.number + 1 == segment.number);
        match runs.last_mut() {
            Some(run) if follows => (run.last, run.segments) = (name, run.segments + 1),
            _ => {
                let (timeline, last) = (segment.timeline.0, name.clone());
                runs.push(Run { timeline, first: name, last, segments: 1 });
            }
        }
        before = Some(segment);
    }
    runs
}

/// What PostgreSQL calls a file of WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileName {
    Segment(Segment),
    /// A segment that a promotion left.
    Partial(Segment),
    History(Timeline),
    /// Written at the end of a base backup, for people.
    Backup,
}

impl FileName {
    fn parse(name: &str, segments: Segments) -> Result<FileName, FileError> {
        let timeline = |digits: &str| {
            let fits = digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            fits.then(|| u32::from_str_radix(digits, 16).ok()).flatten().map(Timeline)
        };
        let backup = |rest: &str| {
            rest.split_once('.').is_some_and(|(segment, offset)| {
                segments.parse(segment).is_some() && timeline(offset).is_some()
            })
        };
        let parsed = if name.len() > MAX_NAME_BYTES {
            None
        } else if let Some(digits) = name.strip_suffix(HISTORY) {
            timeline(digits).map(FileName::History)
        } else if let Some(segment) = name.strip_suffix(PARTIAL) {
            segments.parse(segment).map(FileName::Partial)
        } else if let Some(rest) = name.strip_suffix(BACKUP) {
            backup(rest).then_some(FileName::Backup)
        } else {
            segments.parse(name).map(FileName::Segment)
        };
        parsed.ok_or_else(|| FileError::Name { name: name.to_owned(), segment_bytes: segments.bytes() })
    }
}

/// How a push came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    Created,
    /// It was there with the same content.
    Same,
    /// Nothing of it is needed: a note of a base backup.
    NotNeeded,
}

async fn push(archive: &Archive, file: &Path) -> Result<Pushed, FileError> {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let read = || std::fs::read(file).map_err(FileError::file("read", file));
    let archived = match FileName::parse(name, archive.segments())? {
        FileName::Segment(segment) => archive.put_segment(segment, &read()?).await?,
        FileName::Partial(segment) => archive.put_partial(segment, &read()?).await?,
        FileName::History(timeline) => archive.put_history(timeline, &read()?).await?,
        FileName::Backup => return Ok(Pushed::NotNeeded),
    };
    Ok(match archived {
        Archived::Created => Pushed::Created,
        Archived::Same => Pushed::Same,
    })
}

#[cfg(test)]
mod tests;
