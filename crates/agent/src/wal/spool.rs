//! Segments that were fetched before recovery asked for them, in a directory beside `pg_wal`.
//!
//! They lie below the number of this boot of the machine, since they are not flushed: after a loss of power a file of the right
//! length can hold zeros, which recovery would take for the end of the WAL.
//!
//! Hazard: a file that is not what its name says. Only what was verified against its hash is put here, by renaming.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::FlockOperation;

use super::FileError;

const DIRECTORY: &str = "pgherd_fetch";
const LOCK: &str = "lock";
const UNFINISHED: &str = "unfinished";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

pub(super) struct Spool {
    root: PathBuf,
    /// None where a boot has no number: then nothing is kept.
    directory: Option<PathBuf>,
}

/// The one process that fills a spool; until it is dropped.
pub(super) struct Filling {
    directory: PathBuf,
    _lock: File,
}

impl Spool {
    pub(super) fn of(data_dir: &Path) -> Spool {
        let root = data_dir.join(DIRECTORY);
        let boot = fs::read_to_string(BOOT_ID).ok().map(|id| id.trim().to_owned());
        let directory = boot.filter(|id| !id.is_empty()).map(|id| root.join(id));
        Spool { root, directory }
    }

    pub(super) fn has(&self, file: &str) -> bool {
        self.directory.as_ref().is_some_and(|directory| directory.join(file).exists())
    }

    /// Moves a file to where it is wanted. `false`: it is not here.
    pub(super) fn take(&self, file: &str, to: &Path) -> Result<bool, FileError> {
        let Some(directory) = &self.directory else { return Ok(false) };
        let from = directory.join(file);
        match fs::rename(&from, to) {
            Ok(()) => Ok(true),
            // Another file system, as where pg_wal is a link: fetching it again is no slower than a copy of a copy.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::CrossesDevices) => {
                Ok(false)
            }
            Err(error) => Err(FileError::file("rename", &from)(error)),
        }
    }

    /// Whether another process is about to put it here.
    pub(super) fn is_coming(&self, file: &str) -> bool {
        let Some(directory) = &self.directory else { return false };
        let Ok(lock) = File::open(directory.join(LOCK)) else { return false };
        let is_held = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared)
            .is_err_and(|error| error == rustix::io::Errno::WOULDBLOCK);
        let Some((first, last)) = io::read_to_string(&lock).ok().filter(|_| is_held).and_then(|text| {
            let (first, last) = text.trim().split_once(' ')?;
            Some((first.to_owned(), last.to_owned()))
        }) else {
            return false;
        };
        // It puts them in their order: behind it there is nothing yet.
        let is_passed = |name: &str| name.len() == file.len() && name > file;
        let mut there = fs::read_dir(directory).into_iter().flatten().flatten();
        (first.as_str()..=last.as_str()).contains(&file)
            && !there.any(|entry| entry.file_name().to_str().is_some_and(is_passed))
    }

    /// For the segments from `first` to `last`, in their order. `None`: another process fills it.
    pub(super) fn fill(&self, first: &str, last: &str) -> Result<Option<Filling>, FileError> {
        let Some(directory) = &self.directory else { return Ok(None) };
        fs::create_dir_all(directory).map_err(FileError::file("create", directory))?;
        let path = directory.join(LOCK);
        // What another one has written there stays until this one has the lock.
        let opened = File::options().create(true).truncate(false).write(true).open(&path);
        let mut lock = opened.map_err(FileError::file("create", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(FileError::file("lock", &path)(error.into())),
        }
        let written = lock.set_len(0).and_then(|()| lock.write_all(format!("{first} {last}\n").as_bytes()));
        written.map_err(FileError::file("write", &path))?;
        Ok(Some(Filling { directory: directory.clone(), _lock: lock }))
    }

    /// At the end of the WAL nothing more will be asked for. What cannot be removed does no harm.
    pub(super) fn remove(&self) {
        if self.root.exists()
            && let Err(error) = fs::remove_dir_all(&self.root)
        {
            tracing::debug!(directory = %self.root.display(), %error, "a spool of WAL stays");
        }
    }
}

impl Filling {
    pub(super) fn put(&self, file: &str, content: &Bytes) -> Result<(), FileError> {
        let unfinished = self.directory.join(UNFINISHED);
        fs::write(&unfinished, content).map_err(FileError::file("write", &unfinished))?;
        fs::rename(&unfinished, self.directory.join(file)).map_err(FileError::file("rename", &unfinished))
    }

    /// Behind the end of the WAL there is nothing to keep.
    pub(super) fn end(self, spool: &Spool) {
        let mut entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        if entries.all(|entry| entry.file_name() == LOCK) {
            spool.remove();
        }
    }

    /// Removes the segments of names that sort before `first`, and what other boots left.
    pub(super) fn forget_before(&self, first: &str) -> Result<(), FileError> {
        let list = |directory: &Path| {
            let entries = fs::read_dir(directory).map_err(FileError::file("list", directory))?;
            Ok::<_, FileError>(entries.flatten().map(|entry| entry.path()).collect::<Vec<_>>())
        };
        let name =
            |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        for path in list(&self.directory)? {
            let name = name(&path);
            if name.len() == first.len() && *name < *first {
                fs::remove_file(&path).map_err(FileError::file("remove", &path))?;
            }
        }
        let root = self.directory.parent().unwrap_or(&self.directory);
        for path in list(root)?.into_iter().filter(|path| *path != self.directory) {
            fs::remove_dir_all(&path).map_err(FileError::file("remove", &path))?;
        }
        Ok(())
    }
}
