//! Large files are written past the page cache (`O_DIRECT`, open(2)).
//!
//! Through it each page is copied into a new page of memory, taken up by the cache's lists, and written by another thread
//! later: half of what a restore costs. And what it displaces is in use by somebody, where what it keeps is seldom read
//! before it has been displaced as well.
//!
//! The kernel wants all three aligned: the memory, the place in the file, the length. So pieces are gathered, and what is
//! left at the end goes through the cache. File systems that cannot do it say so with EINVAL, at once or at the first
//! write; there everything goes through the cache.
//!
//! Leaves out: flushing. What is written so can still be in the disk's own cache, and the file's size and extents are in
//! the journal: they come with the flush of the whole volume.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// Of one write. Smaller ones wait more often for the disk, and files below it go through the cache.
pub(super) const GATHERED_BYTES: usize = 1 << 20;
/// No block of a disk and no page of memory is larger where PostgreSQL runs; those that are say EINVAL.
const ALIGNED_BYTES: usize = 4096;

/// A file that is written from its beginning to its end.
#[derive(Debug)]
pub(super) struct Gathered {
    memory: Vec<u8>,
    /// Where in `memory` the aligned part begins, [`GATHERED_BYTES`] long.
    begin: usize,
    filled: usize,
    /// Where in the file the gathered bytes belong.
    at: u64,
}

impl Gathered {
    /// `None`: not on this file system.
    pub(super) fn begin(file: &File) -> io::Result<Option<Gathered>> {
        match set_direct(file, true) {
            Ok(()) => {}
            Err(Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        let memory = vec![0; GATHERED_BYTES + ALIGNED_BYTES];
        let begin = memory.as_ptr().align_offset(ALIGNED_BYTES);
        Ok(Some(Gathered { memory, begin, filled: 0, at: 0 }))
    }

    /// Where the next byte belongs.
    pub(super) fn end(&self) -> u64 {
        self.at + self.filled as u64
    }

    /// Takes bytes that belong to its end.
    pub(super) fn push(&mut self, file: &File, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(GATHERED_BYTES - self.filled));
            self.memory[self.begin + self.filled..][..now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == GATHERED_BYTES {
                self.write(file, GATHERED_BYTES)?;
            }
        }
        Ok(())
    }

    /// Writes what is left. From here on the file is written through the cache.
    pub(super) fn finish(mut self, file: &File) -> io::Result<()> {
        self.write(file, self.filled - self.filled % ALIGNED_BYTES)?;
        set_direct(file, false)?;
        file.write_all_at(&self.memory[self.begin..][..self.filled], self.at)
    }

    /// As if the disk had larger blocks: what is written from now on is refused.
    #[cfg(test)]
    pub(super) fn misalign(&mut self) {
        self.begin += 1;
    }

    /// Writes the first `bytes` of what is gathered.
    fn write(&mut self, file: &File, bytes: usize) -> io::Result<()> {
        let gathered = &self.memory[self.begin..][..bytes];
        match file.write_all_at(gathered, self.at) {
            // Some of it may have been written: the same bytes, at the same place.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                set_direct(file, false)?;
                file.write_all_at(gathered, self.at)?;
            }
            other => other?,
        }
        self.memory.copy_within(self.begin + bytes..self.begin + self.filled, self.begin);
        self.filled -= bytes;
        self.at += bytes as u64;
        Ok(())
    }
}

fn set_direct(file: &File, wanted: bool) -> rustix::io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, wanted);
    fcntl_setfl(file, flags)
}
