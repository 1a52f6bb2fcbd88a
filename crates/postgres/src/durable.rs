//! Files that are whole and on disk, or not there: the only way this crate writes.
//!
//! Each step survives a kill between any two lines: a file is written beside its name, synced, renamed, and the
//! directory synced. Leaves out: deciding what to write. Hazard: an unsynced seal or `standby.signal` is
//! forgotten by a power cut, and with it the promise made on it.
//!
//! Everything here blocks; callers on the runtime go through [`crate::error::blocking`].

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// For what PostgreSQL or pgherd alone may read.
pub(crate) const PRIVATE: u32 = 0o600;

/// Replaces `path` by `bytes`, durably. Readers see the old content or the new one.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    replace(path, bytes, mode)?;
    sync_parent(path)
}

/// The same as far as the content goes; the caller syncs the directory.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let beside = beside(path);
    let file = write_beside(&beside, bytes, mode)?;
    file.sync_all().map_err(Error::io("sync", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("replace", path))
}

/// The same without waiting for the disk, for what may be lost with the machine; [`write_if_changed`] makes up for it.
/// The content may be lost as well.
pub(crate) fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let beside = beside(path);
    write_beside(&beside, bytes, mode)?;
    fs::rename(&beside, path).map_err(Error::io("replace", path))
}

fn write_beside(beside: &Path, bytes: &[u8], mode: u32) -> Result<File> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(beside)
        .map_err(Error::io("create", beside))?;
    file.write_all(bytes).map_err(Error::io("write", beside))?;
    // `mode` above is cut by the umask, and ignored for a file left from an earlier attempt.
    file.set_permissions(Permissions::from_mode(mode)).map_err(Error::io("set the mode of", beside))?;
    Ok(file)
}

/// The same, unless the file already says so; `true` if it was written. What is visible need not be on disk: a
/// writer can have been killed between the rename and the last sync, so that is done again.
pub(crate) fn write_if_changed(path: &Path, bytes: &[u8], mode: u32) -> Result<bool> {
    if read(path)?.as_deref() == Some(bytes) {
        sync_file(path)?;
        sync_parent(path)?;
        return Ok(false);
    }
    write(path, bytes, mode)?;
    Ok(true)
}

/// Creates an empty file if it is not there, and syncs it and its directory in both cases: a file that is
/// visible need not be durable yet.
pub(crate) fn touch(path: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(PRIVATE)
        .open(path)
        .map_err(Error::io("create", path))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    sync_parent(path)
}

/// Removes a file durably; `false` if there was none. The directory is synced even then: an earlier removal may
/// not have reached the disk.
pub(crate) fn remove(path: &Path) -> Result<bool> {
    let removed = match fs::remove_file(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io("remove", path)(error)),
    };
    match sync_parent(path) {
        Err(error) if !removed && error.io_kind() == Some(io::ErrorKind::NotFound) => Ok(false),
        Err(error) => Err(error),
        Ok(()) => Ok(removed),
    }
}

/// The content, or `None` where there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    Ok(read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Syncs what was written to `path` by anyone.
pub(crate) fn sync_file(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    let opened = File::open(dir).map_err(Error::io("open", dir))?;
    opened.sync_all().map_err(Error::io("sync", dir))
}

/// A directory that only its owner enters, with its name on disk.
pub(crate) fn create_private_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(Error::io("set the mode of", dir))?;
    sync_parent(dir)
}

pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => sync_dir(Path::new(".")),
    }
}

/// Renames durably within one file system.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename", from))?;
    sync_parent(to)?;
    if from.parent() != to.parent() { sync_parent(from) } else { Ok(()) }
}

/// True where the directory is missing or has no entries.
pub(crate) fn is_empty_or_missing(dir: &Path) -> Result<bool> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(Error::io("list", dir)(error)),
    }
}

/// PostgreSQL removes names that end in `.tmp` from no directory that we write to, and reads none of them.
fn beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_has_its_content_mode_and_no_rest_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgherd.conf");
        write(&path, b"one", PRIVATE).unwrap();
        write(&path, b"two", PRIVATE).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, PRIVATE);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(!write_if_changed(&path, b"two", PRIVATE).unwrap());
        assert!(write_if_changed(&path, b"three", PRIVATE).unwrap());
    }

    #[test]
    fn what_a_killed_writer_left_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conf");
        fs::write(beside(&path), "half of something much longer").unwrap();
        write(&path, b"whole", 0o640).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn removing_says_whether_there_was_anything() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("passfile");
        touch(&path).unwrap();
        assert!(remove(&path).unwrap());
        assert!(!remove(&path).unwrap());
        assert!(!remove(&dir.path().join("missing/passfile")).unwrap());
    }
}
