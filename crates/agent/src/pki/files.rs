//! PEM files: written so that a crash leaves the old or the new one, with modes that PostgreSQL accepts.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A certificate has less than 4 KiB; a file above this is not one.
const MAX_FILE_BYTES: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", .path.display())]
pub struct FileError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl FileError {
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Mode 0600: keys and passwords.
pub fn write_private(path: &Path, contents: &str) -> Result<(), FileError> {
    write(path, contents, 0o600)
}

/// Mode 0644: certificates.
pub fn write_public(path: &Path, contents: &str) -> Result<(), FileError> {
    write(path, contents, 0o644)
}

/// Beside the target, synced, renamed over it, and the directory synced: after a power loss the file is
/// whole, and once this has returned it is the new one. The mode is there before the contents are.
fn write(path: &Path, contents: &str, mode: u32) -> Result<(), FileError> {
    let fail = |what, path: &Path| {
        let path = path.to_owned();
        move |source| FileError { what, path, source }
    };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    match fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail("replace", &temporary)(error)),
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .map_err(fail("create", &temporary))?;
    // The umask may have taken bits away that PostgreSQL's user needs.
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(fail("set the mode of", &temporary))?;
    file.write_all(contents.as_bytes()).map_err(fail("write", &temporary))?;
    file.sync_all().map_err(fail("sync", &temporary))?;
    fs::rename(&temporary, path).map_err(fail("put in place", path))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(fail("sync the directory of", path))
}

pub fn read_limited(path: &Path) -> Result<String, FileError> {
    let fail = |source| FileError { what: "read", path: path.to_owned(), source };
    let mut contents = String::new();
    let file = File::open(path).map_err(fail)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut contents).map_err(fail)?;
    if contents.len() as u64 > MAX_FILE_BYTES {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidData, "it is too large for a PEM file")));
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_hold_whatever_was_there_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(directory.path().join("node.key.new"), "left behind by a crash").unwrap();

        write_private(&path, "secret").unwrap();

        assert_eq!(fs::read_to_string(&path).unwrap(), "secret");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!directory.path().join("node.key.new").exists());
        write_public(&path, "public").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }

    /// A link planted at the temporary name must not have the key written through it.
    #[test]
    fn a_planted_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        std::os::unix::fs::symlink(&victim, directory.path().join("node.key.new")).unwrap();
        write_private(&directory.path().join("node.key"), "secret").unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    }

    #[test]
    fn errors_name_the_path() {
        let error = write_private(Path::new("/nonexistent/node.key"), "").unwrap_err();
        assert!(error.to_string().starts_with("cannot create /nonexistent/node.key.new: "), "{error}");
        assert!(read_limited(Path::new("/nonexistent")).unwrap_err().is_not_found());
    }
}
