//! What of a data directory belongs into a base backup, as a stream in order of paths.
//!
//! PostgreSQL's own exclusions: contents of directories that it makes anew, temporary files and relations, all forks of an
//! unlogged relation but the one that it is made from, and what says that this server runs or what it is to do. Paths are
//! bytes from the data directory, and grow strictly by bytes: a directory, then what is in it. Memory holds the names of
//! the directories on the way, so it grows with the largest directory and not with the number of files.
//!
//! A tablespace is a link below `pg_tblspc`; of where it leads to, only this version's directory is ours. Where else a link
//! stands among PostgreSQL's files, the listing fails: a file that is left out of a backup without a word is lost.
//!
//! Leaves out: contents. Hazard: what is missing here is missing on the day of the restore. What is not known is taken.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::base_backup::BaseBackupError;
use crate::control::ControlFile;
use crate::error::Error;

/// Directories whose contents PostgreSQL makes anew, at the top of a data directory.
const EMPTIED: [&[u8]; 8] = [
    b"pg_wal",
    b"pg_replslot",
    b"pg_dynshmem",
    b"pg_notify",
    b"pg_serial",
    b"pg_snapshots",
    b"pg_stat_tmp",
    b"pg_subtrans",
];

/// Left out at the top of a data directory: of this run of the server, of another backup, and what a server is to do.
const LEFT_OUT: [&[u8]; 17] = [
    b"postmaster.pid",
    b"postmaster.opts",
    b"postgresql.auto.conf.tmp",
    b"current_logfiles",
    b"current_logfiles.tmp",
    b"backup_label",
    b"backup_label.old",
    b"tablespace_map",
    b"tablespace_map.old",
    b"backup_manifest",
    b"backup_manifest.tmp",
    b"recovery.signal",
    b"standby.signal",
    b"promote",
    b"logrotate",
    b".pgherd_probe",
    super::MARKER.as_bytes(),
];

/// PostgreSQL's temporary files, and the caches that it writes anew, wherever they are.
const LEFT_OUT_PREFIXES: [&[u8]; 2] = [b"pgsql_tmp", b"pg_internal.init"];

const TABLESPACES: &[u8] = b"pg_tblspc";
pub(super) const CONTROL: &[u8] = b"global/pg_control";

/// Whether a path of a data directory does not belong into a copy of it.
pub fn is_left_out(path: &[u8]) -> bool {
    let is_in = |directory: &&[u8]| path.strip_prefix(*directory).is_some_and(|rest| rest.starts_with(b"/"));
    LEFT_OUT.contains(&path) || EMPTIED.iter().any(is_in)
}

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File(Content),
    /// With what the link says.
    Symlink(Vec<u8>),
}

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Pages of a relation; the first of them has this number.
    Pages {
        first_block: u32,
    },
    /// PostgreSQL's control file, which is read last.
    Control,
    Other,
}

/// One path of a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// From the data directory.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permissions.
    pub mode: u32,
    /// Bytes when it was seen; what is added later comes from WAL.
    pub size: u64,
}

/// Goes through a data directory. Blocks.
#[derive(Debug)]
pub struct Listing {
    data_dir: PathBuf,
    rules: Option<Rules>,
    /// Directories that were begun, the innermost last.
    open: Vec<std::vec::IntoIter<Step>>,
}

#[derive(Debug)]
struct Rules {
    /// `PG_15_202209061`.
    version_dir: Vec<u8>,
    file_pages: u32,
}

#[derive(Debug)]
enum Step {
    /// Look at this path.
    At(Vec<u8>),
    /// Go into this directory.
    Inside(Vec<u8>),
}

impl Step {
    /// Whatever is in `a` comes behind `a.1`, as by their bytes `a/b` does.
    fn key(&self) -> Vec<u8> {
        match self {
            Step::At(path) => path.clone(),
            Step::Inside(path) => [path.as_slice(), b"/"].concat(),
        }
    }
}

impl Listing {
    /// What belongs into a backup.
    pub fn begin(data_dir: &Path, control: &ControlFile) -> Result<Listing, BaseBackupError> {
        let version = data_dir.join("PG_VERSION");
        let major = fs::read_to_string(&version).map_err(Error::io("read", &version))?;
        let version_dir = format!("PG_{}_{}", major.trim(), control.catalog_version).into_bytes();
        let rules = Rules { version_dir, file_pages: control.file_pages };
        Ok(Listing::new(data_dir, Some(rules)))
    }

    /// Everything that is there; of links, only those to tablespaces are followed.
    pub(crate) fn of_all(data_dir: &Path) -> Listing {
        Listing::new(data_dir, None)
    }

    fn new(data_dir: &Path, rules: Option<Rules>) -> Listing {
        let top = vec![Step::Inside(Vec::new())].into_iter();
        Listing { data_dir: data_dir.to_owned(), rules, open: vec![top] }
    }

    fn place(&self, path: &[u8]) -> PathBuf {
        self.data_dir.join(OsStr::from_bytes(path))
    }

    fn enter(&self, path: &[u8]) -> Result<Vec<Step>, BaseBackupError> {
        let place = self.place(path);
        let entries = match fs::read_dir(&place) {
            Ok(entries) => entries,
            // Dropped since it was seen.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_empty() => {
                return Ok(Vec::new());
            }
            Err(error) => return Err(Error::io("list", place)(error).into()),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &place))?;
            let kind = entry.file_type().map_err(Error::io("look at", entry.path()))?;
            found.push((entry.file_name().into_vec(), kind));
        }
        if let Some(rules) = &self.rules {
            let unlogged: BTreeSet<u64> = found
                .iter()
                .filter_map(|(name, _)| RelationFile::parse(name))
                .filter(|file| file.fork == Fork::Init)
                .map(|file| file.number)
                .collect();
            found.retain(|(name, _)| !rules.leave_out(path, name, &unlogged));
        }
        let mut steps = Vec::new();
        for (name, kind) in found {
            let inner = if path.is_empty() { name } else { [path, b"/", &name].concat() };
            let emptied = self.rules.is_some() && EMPTIED.contains(&inner.as_slice());
            let tablespace = kind.is_symlink() && is_tablespace(&inner);
            if (kind.is_dir() || tablespace) && !emptied {
                steps.push(Step::Inside(inner.clone()));
            }
            steps.push(Step::At(inner));
        }
        steps.sort_by_cached_key(Step::key);
        Ok(steps)
    }

    fn look(&self, path: Vec<u8>) -> Result<Option<Found>, BaseBackupError> {
        let place = self.place(&path);
        let mut seen = match fs::symlink_metadata(&place) {
            Ok(seen) => seen,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(Error::io("look at", place)(error).into()),
        };
        let mut kind = seen.file_type();
        if kind.is_symlink() && !is_tablespace(&path) && self.rules.is_some() {
            let refuse = |place| BaseBackupError::Link { path: place };
            let outer = path.split(|byte| *byte == b'/').next().unwrap_or_default();
            let top = outer.len() == path.len();
            let own = outer == b"base" || outer == b"global" || outer.starts_with(b"pg_");
            match fs::metadata(&place) {
                // WAL on a volume of its own, whose contents stay out.
                Ok(at) if at.is_dir() && path == b"pg_wal" => (seen, kind) = (at.clone(), at.file_type()),
                // A configuration file that lies elsewhere: its content is what a restored server needs.
                Ok(at) if at.is_file() && top => (seen, kind) = (at.clone(), at.file_type()),
                _ if own && path != b"pg_hba.conf" && path != b"pg_ident.conf" => return Err(refuse(place)),
                _ => {}
            }
        }
        let mode = seen.permissions().mode() & 0o7777;
        let (kind, size) = if kind.is_dir() {
            (Kind::Directory, 0)
        } else if kind.is_file() {
            (Kind::File(self.content(&path)), seen.len())
        } else if kind.is_symlink() {
            let to = fs::read_link(&place).map_err(Error::io("read", place))?;
            (Kind::Symlink(to.into_os_string().into_vec()), 0)
        } else {
            // A socket or a pipe: PostgreSQL has none that outlives it.
            return Ok(None);
        };
        Ok(Some(Found { path, kind, mode, size }))
    }

    fn content(&self, path: &[u8]) -> Content {
        content_of(path, self.rules.as_ref().map(|rules| rules.file_pages))
    }
}

/// How the file at `path` is read; `file_pages` is that of the cluster, if relations are to be known.
pub(super) fn content_of(path: &[u8], file_pages: Option<u32>) -> Content {
    if path == CONTROL {
        return Content::Control;
    }
    let Some(file_pages) = file_pages else { return Content::Other };
    let (folder, name) = parts(path);
    match RelationFile::parse(name).filter(|_| holds_relations(folder)) {
        Some(file) => {
            Content::Pages { first_block: file.segment.saturating_mul(u64::from(file_pages)) as u32 }
        }
        None => Content::Other,
    }
}

impl Iterator for Listing {
    type Item = Result<Found, BaseBackupError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let found = match self.open.last_mut()?.next() {
                None => {
                    self.open.pop();
                    continue;
                }
                Some(Step::Inside(path)) => match self.enter(&path) {
                    Ok(steps) => {
                        self.open.push(steps.into_iter());
                        continue;
                    }
                    Err(error) => Err(error),
                },
                Some(Step::At(path)) => match self.look(path) {
                    Ok(None) => continue,
                    Ok(Some(found)) => Ok(found),
                    Err(error) => Err(error),
                },
            };
            return Some(found);
        }
    }
}

impl Rules {
    fn leave_out(&self, folder: &[u8], name: &[u8], unlogged: &BTreeSet<u64>) -> bool {
        if LEFT_OUT_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            return true;
        }
        // A file of pgherd's that is being written, beside its name.
        let unfinished = name.starts_with(b".") && name.ends_with(b".tmp");
        if folder.is_empty() && (LEFT_OUT.contains(&name) || unfinished) {
            return true;
        }
        // A tablespace's directory may be shared with other versions, and with what is not PostgreSQL's at all.
        if is_tablespace(folder) {
            return name != self.version_dir;
        }
        match RelationFile::parse(name).filter(|_| holds_relations(folder)) {
            Some(file) => file.temporary || file.fork != Fork::Init && unlogged.contains(&file.number),
            None => false,
        }
    }
}

pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// `pg_tblspc/16385`, whether it is a link or, where it was made in place, a directory.
pub(crate) fn is_tablespace(path: &[u8]) -> bool {
    let (folder, name) = parts(path);
    folder == TABLESPACES && !name.is_empty() && name.iter().all(u8::is_ascii_digit)
}

fn parts(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// `global`, `base/5`, `pg_tblspc/16385/PG_15_202209061/5`.
fn holds_relations(folder: &[u8]) -> bool {
    let (outer, database) = parts(folder);
    let numbered = !database.is_empty() && database.iter().all(u8::is_ascii_digit);
    folder == b"global" || numbered && (outer == b"base" || is_tablespace(parts(outer).0))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fork {
    Main,
    FreeSpace,
    Visibility,
    Init,
}

/// The name of a file of a relation: `16384_fsm.2`, or `t3_16384` where it is temporary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RelationFile {
    number: u64,
    fork: Fork,
    segment: u64,
    temporary: bool,
}

impl RelationFile {
    fn parse(name: &[u8]) -> Option<RelationFile> {
        let name = std::str::from_utf8(name).ok()?;
        let (temporary, name) = match name.strip_prefix('t') {
            Some(rest) => (true, rest.split_once('_').filter(|(backend, _)| digits(backend).is_some())?.1),
            None => (false, name),
        };
        let (name, segment) = match name.split_once('.') {
            Some((name, segment)) => (name, digits(segment)?),
            None => (name, 0),
        };
        let (number, fork) = match name.split_once('_') {
            None => (name, Fork::Main),
            Some((number, "fsm")) => (number, Fork::FreeSpace),
            Some((number, "vm")) => (number, Fork::Visibility),
            Some((number, "init")) => (number, Fork::Init),
            Some(_) => return None,
        };
        Some(RelationFile { number: digits(number)?, fork, segment, temporary })
    }
}

fn digits(text: &str) -> Option<u64> {
    // Oids and numbers of segments have ten at most.
    let right = (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    right.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests;
