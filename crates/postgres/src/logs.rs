//! PostgreSQL's own log files: which there are, their last lines, and an end to their number.
//!
//! PostgreSQL begins a new file by size and age and never removes one. Leaves out: following a file for ever;
//! the caller asks again from where the last answer ended.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result, blocking};
use crate::instance::Instance;

/// `log_filename` is this, a time that sorts, and `.log`.
pub(crate) const PREFIX: &str = "postgresql-";

/// More is never read into memory at once.
const MAX_TAIL_BYTES: u64 = 8 << 20;
const FILES: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFile {
    pub path: PathBuf,
    pub bytes: u64,
    pub modified: SystemTime,
}

/// Text from a log, and where to go on reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    pub next: Position,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub path: PathBuf,
    pub offset: u64,
}

/// Oldest first.
pub async fn list(instance: &Instance) -> Result<Vec<LogFile>> {
    let dir = instance.log_dir.clone();
    blocking("listing the log files", FILES, move || list_dir(&dir)).await
}

/// The last `lines` lines of the newest file; `None` if PostgreSQL has not logged yet.
pub async fn tail(instance: &Instance, lines: usize) -> Result<Option<Piece>> {
    let dir = instance.log_dir.clone();
    blocking("reading the log", FILES, move || {
        let Some(newest) = list_dir(&dir)?.pop() else { return Ok(None) };
        let from = newest.bytes.saturating_sub(MAX_TAIL_BYTES);
        let mut piece = read_from(&newest.path, from)?;
        let mut starts: Vec<usize> = piece.text.match_indices('\n').map(|(at, _)| at + 1).collect();
        starts.retain(|start| *start < piece.text.len());
        if from == 0 {
            starts.insert(0, 0);
        }
        if let Some(start) = starts.len().checked_sub(lines).and_then(|skip| starts.get(skip)) {
            piece.text.drain(..*start);
        }
        Ok(Some(piece))
    })
    .await
}

/// What was logged since; moves on to the next file when PostgreSQL has.
pub async fn since(instance: &Instance, position: Position) -> Result<Piece> {
    let dir = instance.log_dir.clone();
    blocking("reading the log", FILES, move || {
        // Looked up first: if a newer file exists already, the old one is complete.
        let newer = list_dir(&dir)?.into_iter().find(|file| file.path > position.path);
        let piece = match read_from(&position.path, position.offset) {
            Err(error) if error.io_kind() == Some(std::io::ErrorKind::NotFound) => {
                Piece { text: String::new(), next: position }
            }
            other => other?,
        };
        match newer {
            Some(newer) if piece.text.is_empty() => read_from(&newer.path, 0),
            _ => Ok(piece),
        }
    })
    .await
}

/// Removes the oldest files while all of them are larger than `max_bytes` together or one is older than `max_age`;
/// never the newest. Returns how many.
pub async fn prune(instance: &Instance, max_bytes: u64, max_age: Duration) -> Result<usize> {
    let dir = instance.log_dir.clone();
    blocking("removing old log files", FILES, move || {
        let mut files = list_dir(&dir)?;
        files.pop();
        let mut total: u64 = files.iter().map(|file| file.bytes).sum();
        let mut removed = 0;
        for file in files {
            let age = SystemTime::now().duration_since(file.modified).unwrap_or_default();
            if total <= max_bytes && age <= max_age {
                break;
            }
            fs::remove_file(&file.path).map_err(Error::io("remove", &file.path))?;
            total -= file.bytes;
            removed += 1;
        }
        Ok(removed)
    })
    .await
}

pub(crate) fn newest(instance: &Instance) -> Result<Option<PathBuf>> {
    Ok(list_dir(&instance.log_dir)?.pop().map(|file| file.path))
}

fn list_dir(dir: &Path) -> Result<Vec<LogFile>> {
    let listing = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("list", dir))?,
    };
    let mut files = Vec::new();
    for entry in listing {
        let entry = entry.map_err(Error::io("list", dir))?;
        let name = entry.file_name();
        let is_log = name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(".log"));
        // A file can be removed between the listing and this.
        if let (true, Ok(metadata)) = (is_log, entry.metadata()) {
            let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            files.push(LogFile { path: entry.path(), bytes: metadata.len(), modified });
        }
    }
    files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn read_from(path: &Path, offset: u64) -> Result<Piece> {
    let mut file = fs::File::open(path).map_err(Error::io("open", path))?;
    file.seek(SeekFrom::Start(offset)).map_err(Error::io("read", path))?;
    let mut bytes = Vec::new();
    file.take(MAX_TAIL_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    let next = Position { path: path.to_owned(), offset: offset + bytes.len() as u64 };
    Ok(Piece { text: String::from_utf8_lossy(&bytes).into_owned(), next })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_files_are_listed_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "postgresql-20260102_000000.log",
            "postgresql-20260101_000000.log",
            "agent.log",
            "postgresql-x.txt",
        ] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let listed = list_dir(dir.path()).unwrap();
        let names: Vec<_> =
            listed.iter().map(|file| file.path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["postgresql-20260101_000000.log", "postgresql-20260102_000000.log"]);
    }
}
