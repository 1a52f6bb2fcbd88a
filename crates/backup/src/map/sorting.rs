//! Entries that come in any order and are wanted in that of their paths, and a parent's that are asked for in any order.
//!
//! A backup that comes as a stream comes in the order of the other server's directories. What does not fit into [`RUN_BYTES`] lies in a file that has
//! no name any more, so that memory does not grow with the number of files, and nothing is left behind.
//!
//! Leaves out: what is in an entry. Blocks; for threads of their own.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::coding::{decode, encode};
use super::{Entry, MapReader};
use crate::document::ReadError;

/// Entries that are sorted in memory.
const RUN_BYTES: usize = 16 * 1024 * 1024;
/// Read of a file at a time, and the distance between two marks of an index.
const READ_BYTES: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum SortError {
    #[error("the temporary file of entries cannot be {doing}")]
    Io { doing: &'static str, source: io::Error },
    #[error("the temporary file of entries is damaged")]
    Damaged,
    #[error("{path} came twice")]
    Twice { path: String },
    #[error(transparent)]
    Read(#[from] ReadError),
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> SortError {
    move |source| SortError::Io { doing, source }
}

/// A file of entries without a name.
#[derive(Debug)]
struct Spool {
    file: File,
    bytes: u64,
}

impl Spool {
    fn new(dir: &Path) -> Result<Spool, SortError> {
        let random = crate::seal::random::<8>().map_err(|_| SortError::Damaged)?;
        let path = dir.join(format!("pgherd-entries-{:016x}", u64::from_le_bytes(random)));
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(failed("made"))?;
        std::fs::remove_file(&path).map_err(failed("unlinked"))?;
        Ok(Spool { file, bytes: 0 })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), SortError> {
        self.file.write_all_at(bytes, self.bytes).map_err(failed("written"))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Entries of a part of a spool, one behind the other.
#[derive(Debug)]
struct Run {
    at: u64,
    end: u64,
    buffer: Vec<u8>,
    read: usize,
}

impl Run {
    fn new(range: std::ops::Range<u64>) -> Run {
        Run { at: range.start, end: range.end, buffer: Vec::new(), read: 0 }
    }

    fn next(&mut self, spool: &Spool) -> Result<Option<Entry>, SortError> {
        loop {
            if let Some((entry, bytes)) = decode(&self.buffer[self.read..]).map_err(|_| SortError::Damaged)? {
                self.read += bytes;
                return Ok(Some(entry));
            }
            if self.at == self.end {
                return if self.read == self.buffer.len() { Ok(None) } else { Err(SortError::Damaged) };
            }
            self.buffer.drain(..self.read);
            self.read = 0;
            let more = (READ_BYTES as u64).min(self.end - self.at) as usize;
            let had = self.buffer.len();
            self.buffer.resize(had + more, 0);
            spool.file.read_exact_at(&mut self.buffer[had..], self.at).map_err(failed("read"))?;
            self.at += more as u64;
        }
    }
}

/// Takes entries in any order.
#[derive(Debug)]
pub struct Sorter {
    spool: Spool,
    runs: Vec<std::ops::Range<u64>>,
    /// With their paths, as they are stored.
    held: Vec<(Vec<u8>, Vec<u8>)>,
    held_bytes: usize,
    run_bytes: usize,
}

impl Sorter {
    /// With its file in `dir`.
    pub fn new(dir: &Path) -> Result<Sorter, SortError> {
        let spool = Spool::new(dir)?;
        Ok(Sorter { spool, runs: Vec::new(), held: Vec::new(), held_bytes: 0, run_bytes: RUN_BYTES })
    }

    pub fn push(&mut self, entry: &Entry) -> Result<(), SortError> {
        let mut bytes = Vec::new();
        encode(entry, &mut bytes).map_err(|_| SortError::Damaged)?;
        self.held_bytes += bytes.len() + entry.path.len();
        self.held.push((entry.path.clone(), bytes));
        if self.held_bytes >= self.run_bytes { self.put_down() } else { Ok(()) }
    }

    fn put_down(&mut self) -> Result<(), SortError> {
        self.held.sort_unstable();
        let from = self.spool.bytes;
        let mut piece = Vec::with_capacity(READ_BYTES);
        for (_, bytes) in self.held.drain(..) {
            piece.extend_from_slice(&bytes);
            if piece.len() >= READ_BYTES {
                self.spool.append(&piece)?;
                piece.clear();
            }
        }
        self.spool.append(&piece)?;
        self.runs.push(from..self.spool.bytes);
        self.held_bytes = 0;
        Ok(())
    }

    /// All of them, in order of their paths.
    pub fn finish(mut self) -> Result<Sorted, SortError> {
        self.put_down()?;
        let mut sorted = Sorted {
            runs: self.runs.into_iter().map(Run::new).collect(),
            spool: self.spool,
            heads: BinaryHeap::new(),
            entries: Vec::new(),
            before: None,
        };
        for run in 0..sorted.runs.len() {
            sorted.entries.push(None);
            sorted.advance(run)?;
        }
        Ok(sorted)
    }
}

/// Entries in order of their paths.
#[derive(Debug)]
pub struct Sorted {
    spool: Spool,
    runs: Vec<Run>,
    /// The path of the next entry of each run.
    heads: BinaryHeap<Reverse<(Vec<u8>, usize)>>,
    entries: Vec<Option<Entry>>,
    before: Option<Vec<u8>>,
}

impl Sorted {
    fn advance(&mut self, run: usize) -> Result<(), SortError> {
        self.entries[run] = self.runs[run].next(&self.spool)?;
        if let Some(entry) = &self.entries[run] {
            self.heads.push(Reverse((entry.path.clone(), run)));
        }
        Ok(())
    }

    #[expect(clippy::should_implement_trait, reason = "it can fail, and says of each entry whether it did")]
    pub fn next(&mut self) -> Result<Option<Entry>, SortError> {
        let Some(Reverse((path, run))) = self.heads.pop() else { return Ok(None) };
        let entry = self.entries[run].take();
        self.advance(run)?;
        if self.before.as_ref() == Some(&path) {
            return Err(SortError::Twice { path: String::from_utf8_lossy(&path).into_owned() });
        }
        self.before = Some(path);
        Ok(entry)
    }
}

/// The entries of a backup, to be asked for in any order.
#[derive(Debug)]
pub struct Former {
    spool: Spool,
    /// The path of every entry with which a piece of the file begins, in order.
    marks: Vec<(Vec<u8>, u64)>,
}

impl Former {
    /// Reads all of them into a file in `dir`.
    pub async fn read(mut reader: MapReader, dir: &Path) -> Result<Former, SortError> {
        let mut former = Former { spool: Spool::new(dir)?, marks: Vec::new() };
        let mut piece = Vec::new();
        while let Some(entry) = reader.next().await? {
            if piece.is_empty() {
                former.marks.push((entry.path.clone(), former.spool.bytes));
            }
            encode(&entry, &mut piece).map_err(|_| SortError::Damaged)?;
            if piece.len() >= READ_BYTES {
                former.spool.append(&piece)?;
                piece.clear();
            }
        }
        former.spool.append(&piece)?;
        Ok(former)
    }

    pub fn find(&self, path: &[u8]) -> Result<Option<Entry>, SortError> {
        let behind = self.marks.partition_point(|(mark, _)| mark.as_slice() <= path);
        let Some((_, from)) = behind.checked_sub(1).map(|at| &self.marks[at]) else { return Ok(None) };
        let end = self.marks.get(behind).map_or(self.spool.bytes, |(_, at)| *at);
        let mut run = Run::new(*from..end);
        while let Some(entry) = run.next(&self.spool)? {
            if entry.path.as_slice() >= path {
                return Ok(Some(entry).filter(|entry| entry.path == path));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn entries_come_in_order_however_many_runs_they_make() {
        let dir = tempfile::tempdir().unwrap();
        for run_bytes in [1, 300, RUN_BYTES] {
            let mut sorter = Sorter { run_bytes, ..Sorter::new(dir.path()).unwrap() };
            let mut random = Random(7);
            let mut paths: Vec<String> = (0..200).map(|number| format!("base/{number}")).collect();
            for at in (1..paths.len()).rev() {
                paths.swap(at, random.below(at as u64 + 1) as usize);
            }
            for path in &paths {
                sorter.push(&Entry::symlink(path.as_str(), "to")).unwrap();
            }
            let mut sorted = sorter.finish().unwrap();
            let mut came = Vec::new();
            while let Some(entry) = sorted.next().unwrap() {
                came.push(String::from_utf8(entry.path).unwrap());
            }
            paths.sort();
            assert_eq!(came, paths);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn a_path_that_comes_twice_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut sorter = Sorter { run_bytes: 1, ..Sorter::new(dir.path()).unwrap() };
        for path in ["a", "b", "a"] {
            sorter.push(&Entry::directory(path, 0o700)).unwrap();
        }
        let mut sorted = sorter.finish().unwrap();
        sorted.next().unwrap();
        assert!(matches!(sorted.next(), Err(SortError::Twice { path }) if path == "a"));
    }
}
