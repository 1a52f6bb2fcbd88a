//! One file of a running server, read from its beginning to the size that it had when it was listed.
//!
//! Pages are compared with their checksums on the way. One that looks damaged is read again: while PostgreSQL writes it, a
//! reader sees half of it, and WAL has the whole. What stays wrong, and the same, is reported and copied as it is: a backup
//! with a damaged page is worth more than none, and nobody can tell for certain.
//!
//! Leaves out: which files. Hazard: takes the disk from the server; whoever reads has to hold back.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_core::types::Lsn;
use rustix::fs::{Advice, fadvise};

use crate::base_backup::listing::{Content, Found, is_gone};
use crate::control::ControlFile;
use crate::error::{Error, Result};
use crate::page;

/// How often a page that looks damaged is read again. The kernel copies a page in microseconds; more than one try is
/// for a writer that was taken from its processor in the middle of it.
const REREADS: u32 = 5;
const BETWEEN_REREADS: Duration = Duration::from_millis(4);

/// By what pages are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksums {
    pub page_bytes: u32,
    /// Pages that were changed since then are in WAL.
    pub start: Lsn,
}

impl Checksums {
    /// None where the cluster has no checksums.
    pub fn of(control: &ControlFile, start: Lsn) -> Option<Checksums> {
        control.data_checksums.then_some(Checksums { page_bytes: control.page_bytes, start })
    }
}

/// The position behind the last record that has changed a page, by its first eight bytes. What is shorter has none.
pub fn page_lsn(page: &[u8]) -> Lsn {
    if page.len() < 8 { Lsn::ZERO } else { page::lsn(page) }
}

/// A file that is being read. Blocks.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
    at: u64,
    end: u64,
    judged: Option<(Checksums, u32)>,
    damaged: Vec<u32>,
}

impl Reader {
    /// None if it is gone: PostgreSQL has dropped it since it was listed, and WAL says so.
    pub fn open(data_dir: &Path, found: &Found, checksums: Option<Checksums>) -> Result<Option<Reader>> {
        let path = data_dir.join(std::ffi::OsStr::from_bytes(&found.path));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        // Read ahead; a kernel that does not want to is as well.
        fadvise(&file, 0, None, Advice::Sequential).ok();
        let judged = match found.kind {
            super::listing::Kind::File(Content::Pages { first_block }) => {
                checksums.map(|by| (by, first_block))
            }
            _ => None,
        };
        Ok(Some(Reader { file, path, at: 0, end: found.size, judged, damaged: Vec::new() }))
    }

    /// Replaces `piece` by the next bytes, as many as fit into its capacity or are left; none at the end. Pieces begin at
    /// whole pages if the capacity is a number of them.
    pub fn read(&mut self, piece: &mut Vec<u8>) -> Result<()> {
        self.read_part(piece, u64::MAX)
    }

    /// Goes on at another place, a whole page's. Behind the end there is nothing.
    pub fn seek(&mut self, at: u64) {
        self.at = at.min(self.end);
    }

    /// That only parts will be read; the kernel would read ahead in vain.
    pub fn is_scattered(&self) {
        fadvise(&self.file, 0, None, Advice::Random).ok();
    }

    /// That a part will be read soon.
    pub fn announce(&self, at: u64, bytes: u64) {
        fadvise(&self.file, at, std::num::NonZeroU64::new(bytes), Advice::WillNeed).ok();
    }

    /// Like [`Reader::read`], and `most` bytes.
    pub fn read_part(&mut self, piece: &mut Vec<u8>, most: u64) -> Result<()> {
        let wanted = (piece.capacity() as u64).min(most).min(self.end - self.at) as usize;
        piece.resize(wanted, 0);
        let got = self.read_at(self.at, piece)?;
        piece.truncate(got);
        if got < wanted {
            // Truncated since it was listed.
            self.end = self.at + got as u64;
        }
        if let Some((by, first_block)) = self.judged {
            self.judge(piece, by, first_block)?;
        }
        self.at += got as u64;
        Ok(())
    }

    /// The numbers of pages that stay damaged, as far as it was read.
    pub fn damaged(&self) -> &[u32] {
        &self.damaged
    }

    fn judge(&mut self, piece: &mut [u8], by: Checksums, first_block: u32) -> Result<()> {
        let bytes = by.page_bytes as usize;
        let before = (self.at / u64::from(by.page_bytes)) as u32;
        for (number, page) in piece.chunks_exact_mut(bytes).enumerate() {
            let block = first_block.wrapping_add(before).wrapping_add(number as u32);
            if page::looks_damaged(page, block, by.start)
                && self.stays_damaged(page, self.at + (number * bytes) as u64, block, by.start)?
            {
                self.damaged.push(block);
            }
        }
        Ok(())
    }

    /// Reads a page again, and leaves what was read last in `page`.
    fn stays_damaged(&self, page: &mut [u8], at: u64, block: u32, start: Lsn) -> Result<bool> {
        let mut again = vec![0; page.len()];
        for _ in 0..REREADS {
            std::thread::sleep(BETWEEN_REREADS);
            if self.read_at(at, &mut again)? < again.len() {
                // It is cut off by now, and so it will be by WAL.
                return Ok(false);
            }
            let changed = again != page;
            page.copy_from_slice(&again);
            // Whoever changed it did so after the start.
            if changed || !page::looks_damaged(page, block, start) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<usize> {
        let mut read = 0;
        while read < to.len() {
            match self.file.read_at(&mut to[read..], at + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.path)(error)),
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base_backup::listing::Kind;

    fn found(content: Content, size: u64) -> Found {
        Found { path: b"16384".to_vec(), kind: Kind::File(content), mode: 0o600, size }
    }

    const BY: Checksums = Checksums { page_bytes: 8192, start: Lsn(1000) };
    const PAGES: Content = Content::Pages { first_block: 131_072 };

    fn whole(dir: &Path, found: &Found) -> (Vec<u8>, Vec<u32>) {
        let mut reader = Reader::open(dir, found, Some(BY)).unwrap().unwrap();
        let (mut all, mut piece) = (Vec::new(), Vec::with_capacity(2 * 8192));
        loop {
            reader.read(&mut piece).unwrap();
            if piece.is_empty() {
                return (all, reader.damaged().to_vec());
            }
            all.extend_from_slice(&piece);
        }
    }

    #[test]
    fn a_file_is_read_up_to_the_size_that_it_was_listed_with() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
        std::fs::write(dir.path().join("16384"), &content).unwrap();
        for size in [0, 1, 16_384, 90_000, 100_000] {
            assert_eq!(whole(dir.path(), &found(Content::Other, size)).0, content[..size as usize]);
        }
        assert_eq!(whole(dir.path(), &found(Content::Other, 200_000)).0, content, "it was truncated since");
        std::fs::remove_file(dir.path().join("16384")).unwrap();
        assert!(Reader::open(dir.path(), &found(Content::Other, 1), None).unwrap().is_none(), "dropped");
    }

    #[test]
    fn parts_of_a_file_are_read_at_their_places_and_judged_by_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let mut content = vec![0; 6 * 8192];
        for page in [2, 4] {
            content[page * 8192 + 77] = page as u8;
        }
        std::fs::write(dir.path().join("16384"), &content).unwrap();
        let mut reader =
            Reader::open(dir.path(), &found(PAGES, content.len() as u64), Some(BY)).unwrap().unwrap();
        reader.is_scattered();
        reader.announce(4 * 8192, 8192);
        let mut piece = Vec::with_capacity(3 * 8192);
        reader.seek(4 * 8192);
        reader.read_part(&mut piece, 8192).unwrap();
        assert_eq!(piece, content[4 * 8192..5 * 8192]);
        assert_eq!(reader.damaged(), [131_072 + 4], "the other one was not looked at");
        reader.read_part(&mut piece, u64::MAX).unwrap();
        assert_eq!(piece.len(), 8192, "it goes on behind it, up to the end");
        reader.seek(9 * 8192);
        reader.read_part(&mut piece, 8192).unwrap();
        assert!(piece.is_empty(), "behind the end there is nothing");
    }

    #[test]
    fn a_page_that_stays_damaged_is_reported_and_copied() {
        let dir = tempfile::tempdir().unwrap();
        let mut content = vec![0; 5 * 8192];
        content[3 * 8192 + 77] = 1;
        std::fs::write(dir.path().join("16384"), &content).unwrap();
        let (copied, damaged) = whole(dir.path(), &found(PAGES, content.len() as u64));
        assert_eq!(copied, content);
        assert_eq!(damaged, [131_072 + 3]);
        let other = found(Content::Other, content.len() as u64);
        assert!(whole(dir.path(), &other).1.is_empty(), "what is no relation has no pages");
    }

    #[test]
    fn case_17_a_page_that_is_being_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("16384");
        let mut torn = vec![0; 2 * 8192];
        torn[8192 + 77] = 1;
        std::fs::write(&path, &torn).unwrap();
        let mut reader =
            Reader::open(dir.path(), &found(PAGES, torn.len() as u64), Some(BY)).unwrap().unwrap();
        let mut page = torn[8192..].to_vec();
        // Between the two looks the writer has come to its end.
        std::fs::write(&path, vec![0; 2 * 8192]).unwrap();
        assert!(!reader.stays_damaged(&mut page, 8192, 131_073, BY.start).unwrap());
        assert_eq!(page, vec![0; 8192], "what was read last is copied");
        let mut piece = Vec::with_capacity(8192);
        reader.read(&mut piece).unwrap();
        assert!(reader.damaged().is_empty());
    }
}
