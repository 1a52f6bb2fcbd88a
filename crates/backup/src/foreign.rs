//! What other programs have kept: repositories of pgBackRest and servers of Barman, read so that they can be restored.
//!
//! | module | what it reads |
//! |---|---|
//! | `pgbackrest`, `info` | its catalogue and manifests, which have a checksum each, and SHA-1 of every file |
//! | `barman`, `python`, `server_manifest` | its catalogue, directories of files, and the manifest that PostgreSQL wrote where there is one |
//! | [`archive`] | their WAL, as [`Wal`](crate::wal::Wal) |
//! | `compressed` | what they compress with |
//!
//! What a format can have and is not read here is refused by name when a backup is [opened](Foreign::contents), which is before anybody
//! writes anything; so is a file that is missing, or of another length than it should have.
//!
//! Left out: writing into these places, which nothing here can; cloud stores; encryption. Hazard: everything here was written by somebody
//! else, and may be damaged or made up. Names are taken apart before they become paths, no link is followed, nothing is believed to be
//! as large as it says, and a file is what it should be only after its checksum.

use std::collections::BTreeMap;
use std::fs::{self, File as Opened};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use pgherd_core::types::{Lsn, SystemId, Timeline};
use pgherd_postgres::restoring::{self, LABEL, MAP};

use crate::name::BackupId;
use crate::wal::BackupRange;

pub mod archive;
mod barman;
mod checksum;
mod compressed;
mod info;
mod pgbackrest;
mod python;
mod server_manifest;

pub use checksum::{Check, Checking};
use compressed::Compression;

/// Of a catalogue, a label or a control file; larger ones are no such files.
const MAX_SMALL_BYTES: u64 = 64 * 1024 * 1024;
/// Entries of a backup. PostgreSQL has some thousand for each database.
const MAX_ITEMS: usize = 50_000_000;
/// Linux takes no longer path.
const MAX_PATH_BYTES: usize = 4096;
const PRIVATE_DIRECTORY: u32 = 0o700;
const TABLESPACES: &str = "pg_tblspc";
const BUNDLES: &str = "bundle";

/// Whose format it is, and which server's backups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A repository with `backup` and `archive` in it. The stanza may be left out where there is one.
    PgBackRest { repository: PathBuf, stanza: Option<String> },
    /// Barman's home, with a directory for each server.
    Barman { home: PathBuf, server: Option<String> },
}

impl Source {
    pub fn program(&self) -> &'static str {
        match self {
            Source::PgBackRest { .. } => "pgBackRest",
            Source::Barman { .. } => "Barman",
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignError {
    #[error("cannot {doing} {path}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is damaged: {what}")]
    Damaged { path: PathBuf, what: String },
    #[error("{place} is no place of {program}'s: {why}")]
    NoRepository { place: PathBuf, program: &'static str, why: String },
    #[error("{place} has several {what}: {names}")]
    Several { place: PathBuf, what: &'static str, names: String },
    #[error("{place} has nothing of {what}")]
    Unknown { place: PathBuf, what: String },
    /// The format has it, and this program does not read it.
    #[error("{what}, which pgherd does not read")]
    Unsupported { what: String, way: String },
    #[error("backup {backup} cannot be restored: {why}")]
    Unusable { backup: String, why: String },
}

impl ForeignError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ForeignError {
        move |source| ForeignError::Io { doing, path: path.to_owned(), source }
    }

    fn damaged(path: &Path, what: impl Into<String>) -> ForeignError {
        ForeignError::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            ForeignError::NoRepository { program: "pgBackRest", .. } => Some(
                "name repo1-path of its configuration: a directory with archive and backup in it".to_owned(),
            ),
            ForeignError::NoRepository { .. } => Some(
                "name barman_home of its configuration: a directory with one for each server in it"
                    .to_owned(),
            ),
            ForeignError::Several { what, .. } => Some(format!(
                "name one of them, by --{}",
                if *what == "stanzas" { "stanza" } else { "server" }
            )),
            ForeignError::Unsupported { way, .. } => Some(way.clone()),
            ForeignError::Damaged { .. } => {
                Some("choose another backup with --backup, which may have another copy of it".to_owned())
            }
            ForeignError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run it as a user who may read all of the repository and run PostgreSQL".to_owned())
            }
            _ => None,
        }
    }

    /// Whether somebody asked for what there is not, or what is not read here, and nothing is wrong.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, ForeignError::Io { .. } | ForeignError::Damaged { .. })
    }
}

/// A backup in a catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// As its own program calls it.
    pub name: String,
    /// `full`, `diff` or `incr`.
    pub kind: &'static str,
    /// Where it can be restored: between which positions, under a name of ours that is made of its time.
    pub range: Option<BackupRange>,
    pub system: SystemId,
    /// `15`, or `15.18`.
    pub version: String,
    /// Why it cannot be restored.
    problem: Option<Problem>,
}

/// What is wrong with a backup, as the catalogue tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Problem {
    Unusable(String),
    Unsupported { what: String, way: String },
}

impl Backup {
    /// Why it cannot be restored, if its catalogue says so.
    pub fn problem(&self) -> Option<ForeignError> {
        let backup = self.name.clone();
        self.problem.as_ref().map(|problem| match problem.clone() {
            Problem::Unusable(why) => ForeignError::Unusable { backup, why },
            Problem::Unsupported { what, way } => {
                ForeignError::Unsupported { what: format!("backup {backup} {what}"), way }
            }
        })
    }
}

/// What a backup consists of.
#[derive(Debug)]
pub struct Contents {
    pub backup: Backup,
    /// By paths from the data directory, in order of bytes: each directory before what is in it.
    pub items: BTreeMap<Vec<u8>, Item>,
    pub files: u64,
    pub bytes: u64,
    pub backup_label: Vec<u8>,
    pub tablespace_map: Vec<u8>,
    /// What whoever restores it should know.
    pub remarks: Vec<String>,
    /// Directories that files lie in.
    folders: Vec<Folder>,
}

/// Something of a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub mode: u32,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    /// A tablespace's link below `pg_tblspc`, or another one at the top, with what it says.
    Link(PathBuf),
    File(File),
}

/// Content of a file, and where it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub size: u64,
    /// None where nobody has noted one.
    pub check: Option<Check>,
    folder: u32,
    /// In a file with others; else in one of its own name.
    bundled: Option<Box<Bundled>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bundled {
    number: u64,
    offset: u64,
    bytes: u64,
}

/// Where files of a backup lie, and how they are compressed.
#[derive(Clone, Debug)]
struct Folder {
    place: PathBuf,
    layout: Layout,
    compression: Compression,
    /// In bundles.
    bundled: Compression,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `pg_data/base/1/2`, `pg_tblspc/16384/…`.
    PgBackRest,
    /// `data/base/1/2`, `16384/…`.
    Barman,
}

impl Folder {
    fn path(&self, item: &[u8], file: &File) -> PathBuf {
        match file.bundled.as_deref() {
            Some(bundled) => self.place.join(BUNDLES).join(bundled.number.to_string()),
            None => self.alone(item),
        }
    }

    /// In a file of its own name.
    fn alone(&self, item: &[u8]) -> PathBuf {
        let in_tablespace = item.strip_prefix(b"pg_tblspc/".as_slice());
        let mut path = match (self.layout, in_tablespace) {
            (Layout::PgBackRest, Some(_)) => self.place.clone(),
            (Layout::PgBackRest, None) => self.place.join("pg_data"),
            (Layout::Barman, Some(rest)) => return self.place.join(std::ffi::OsStr::from_bytes(rest)),
            (Layout::Barman, None) => self.place.join("data"),
        };
        path.push(std::ffi::OsStr::from_bytes(item));
        let mut path = path.into_os_string();
        path.push(self.compression.extension());
        path.into()
    }
}

impl Contents {
    fn of(backup: &Backup, items: Items, folders: Vec<Folder>, remarks: Vec<String>) -> Contents {
        let Items { items, files, bytes, .. } = items;
        let backup = backup.clone();
        let (backup_label, tablespace_map) = (Vec::new(), Vec::new());
        Contents { backup, items, files, bytes, backup_label, tablespace_map, remarks, folders }
    }

    /// Takes what PostgreSQL is to begin recovery with out of the files, which are written by themselves.
    fn take_labels(&mut self, place: &Path) -> Result<(), ForeignError> {
        for name in [LABEL, MAP] {
            let Some(content) = self.read_small(name)? else { continue };
            if let Some(Item { kind: Kind::File(file), .. }) = self.items.remove(name) {
                self.files -= 1;
                self.bytes -= file.size;
            }
            match name {
                LABEL => self.backup_label = content,
                _ => self.tablespace_map = content,
            }
        }
        match self.backup_label.is_empty() {
            true => Err(ForeignError::damaged(place, "the backup has no backup_label")),
            false => Ok(()),
        }
    }

    /// Reads a file of it. Blocks, as all of this does.
    pub fn open(&self, path: &[u8], file: &File) -> Result<Reading, ForeignError> {
        let checking = file.check.as_ref().map(Check::begin);
        let mut reading = Reading {
            from: Box::new(io::empty()),
            place: PathBuf::new(),
            size: file.size,
            read: 0,
            check: file.check.clone(),
            checking,
        };
        // Of an empty file there need not be any.
        if file.size == 0 {
            return Ok(reading);
        }
        let folder = self.folder(file)?;
        reading.place = folder.path(path, file);
        let opened = open(&reading.place)?;
        reading.from = match file.bundled.as_deref() {
            Some(bundled) => {
                let mut opened = opened;
                let at = SeekFrom::Start(bundled.offset);
                opened.seek(at).map_err(ForeignError::io("read", &reading.place))?;
                folder.bundled.decoder(Box::new(opened.take(bundled.bytes)))
            }
            None => folder.compression.decoder(Box::new(opened)),
        };
        Ok(reading)
    }

    /// The content of a small file, verified.
    pub fn read_small(&self, path: &[u8]) -> Result<Option<Vec<u8>>, ForeignError> {
        let Some(Item { kind: Kind::File(file), .. }) = self.items.get(path) else { return Ok(None) };
        let mut reading = self.open(path, file)?;
        if file.size > MAX_SMALL_BYTES {
            return Err(ForeignError::damaged(&reading.place, format!("it has {} bytes", file.size)));
        }
        let (mut content, mut piece) = (Vec::new(), vec![0; 64 * 1024]);
        loop {
            match reading.read(&mut piece)? {
                0 => return Ok(Some(content)),
                read => content.extend_from_slice(&piece[..read]),
            }
        }
    }

    fn folder(&self, file: &File) -> Result<&Folder, ForeignError> {
        let folder = self.folders.get(file.folder as usize);
        folder.ok_or_else(|| ForeignError::Unknown {
            place: PathBuf::from(&self.backup.name),
            what: "the backup that a file is kept in".to_owned(),
        })
    }

    /// Shows, by names and lengths alone, that everything is there. `stored`: the bytes that a path takes, where they are known.
    fn is_there(&self, stored: &BTreeMap<Vec<u8>, u64>) -> Result<(), ForeignError> {
        let mut bundles: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for (path, item) in &self.items {
            let Kind::File(file) = &item.kind else { continue };
            if file.size == 0 {
                continue;
            }
            let place = self.folder(file)?.path(path, file);
            let (bytes, wanted) = match file.bundled.as_deref() {
                Some(bundled) => {
                    let bytes = match bundles.get(&place) {
                        Some(bytes) => *bytes,
                        None => length(&place)?,
                    };
                    bundles.insert(place.clone(), bytes);
                    let end = bundled.offset.checked_add(bundled.bytes);
                    (bytes.min(end.unwrap_or(bytes)), end)
                }
                None => (length(&place)?, stored.get(path).copied()),
            };
            let fits = match file.bundled {
                Some(_) => wanted == Some(bytes),
                None => wanted.is_none_or(|wanted| wanted == bytes),
            };
            if !fits {
                let wanted = wanted.unwrap_or_default();
                return Err(ForeignError::damaged(
                    &place,
                    format!("it has {bytes} bytes and should have {wanted}"),
                ));
            }
        }
        Ok(())
    }
}

/// A file that is read from its beginning to its end, where its checksum is compared.
pub struct Reading {
    from: Box<dyn Read + Send>,
    place: PathBuf,
    size: u64,
    read: u64,
    check: Option<Check>,
    checking: Option<Checking>,
}

impl Reading {
    /// The next bytes; none at its end, which is `Ok` only if all of it was as it should be.
    pub fn read(&mut self, piece: &mut [u8]) -> Result<usize, ForeignError> {
        let damaged = |what: String| ForeignError::damaged(&self.place, what);
        let read = match self.from.read(piece) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return self.read(piece),
            // A decompressor says so of what it cannot make sense of.
            Err(error) if is_of_content(&error) => return Err(damaged(error.to_string())),
            Err(error) => return Err(ForeignError::io("read", &self.place)(error)),
        };
        self.read += read as u64;
        let size = self.size;
        if self.read > size {
            return Err(damaged(format!("its content is longer than {size} bytes")));
        }
        if let Some(checking) = &mut self.checking {
            checking.update(&piece[..read]);
        }
        if read > 0 {
            return Ok(read);
        }
        if self.read < size {
            return Err(damaged(format!("its content has {} bytes and should have {size}", self.read)));
        }
        if let (Some(check), Some(checking)) = (self.check.take(), self.checking.take()) {
            let found = checking.finish();
            if found != check {
                return Err(damaged(format!("its content has {found} and should have {check}")));
            }
        }
        Ok(0)
    }
}

fn is_of_content(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof
    ) || error.kind() == io::ErrorKind::Other && error.raw_os_error().is_none()
}

/// A place that was opened: its catalogue, and the way to what is in it.
#[derive(Debug)]
pub struct Foreign {
    kind: Opening,
    pub source: Source,
    /// The directory of this stanza or server, for people.
    pub place: PathBuf,
    /// The oldest first.
    pub backups: Vec<Backup>,
}

#[derive(Debug)]
enum Opening {
    PgBackRest(pgbackrest::Stanza),
    Barman(barman::Server),
}

impl Foreign {
    /// Reads the catalogue. Blocks.
    pub fn open(source: &Source) -> Result<Foreign, ForeignError> {
        let source = source.clone();
        let (kind, place, mut backups) = match &source {
            Source::PgBackRest { repository, stanza } => {
                let stanza = pgbackrest::Stanza::open(repository, stanza.as_deref())?;
                let (place, backups) = (stanza.place(), stanza.backups()?);
                (Opening::PgBackRest(stanza), place, backups)
            }
            Source::Barman { home, server } => {
                let server = barman::Server::open(home, server.as_deref())?;
                let (place, backups) = (server.place(), server.backups()?);
                (Opening::Barman(server), place, backups)
            }
        };
        backups.sort_by(|one, other| time_of(&one.name).cmp(time_of(&other.name)));
        Ok(Foreign { kind, source, place, backups })
    }

    /// With the stanza or server that was meant, if none was named.
    pub fn named(&self) -> Source {
        match (&self.source, &self.kind) {
            (Source::PgBackRest { repository, .. }, Opening::PgBackRest(stanza)) => {
                Source::PgBackRest { repository: repository.clone(), stanza: Some(stanza.name().to_owned()) }
            }
            (Source::Barman { home, .. }, Opening::Barman(server)) => {
                Source::Barman { home: home.clone(), server: Some(server.name().to_owned()) }
            }
            (source, _) => source.clone(),
        }
    }

    /// The cluster whose backups are taken now.
    pub fn system(&self) -> Option<SystemId> {
        match &self.kind {
            Opening::PgBackRest(stanza) => Some(stanza.system()),
            Opening::Barman(_) => self.backups.last().map(|backup| backup.system),
        }
    }

    /// Everything that a backup consists of, after it was seen that it is there and can be read. Blocks.
    pub fn contents(&self, backup: &Backup) -> Result<Contents, ForeignError> {
        if let Some(problem) = backup.problem() {
            return Err(problem);
        }
        match &self.kind {
            Opening::PgBackRest(stanza) => stanza.contents(backup),
            Opening::Barman(server) => server.contents(backup),
        }
    }
}

/// A pgBackRest label begins with the time of its full backup and ends with its own.
fn time_of(name: &str) -> &str {
    name.rsplit('_').next().unwrap_or(name)
}

/// A name of ours for a backup that was begun at this time.
fn id_of(name: &str) -> Option<BackupId> {
    let digits: String = time_of(name).chars().filter(char::is_ascii_digit).collect();
    let (day, time) = digits.split_at_checked(8)?;
    format!("{day}T{time}").parse().ok()
}

fn range(name: &str, timeline: Timeline, start: Lsn, stop: Lsn, stopped: Timestamp) -> Option<BackupRange> {
    (start < stop && timeline.0 > 0).then_some(())?;
    Some(BackupRange { id: id_of(name)?, timeline, start, stop, stopped })
}

/// Opens a file, which is no link and no pipe.
fn open(path: &Path) -> Result<Opened, ForeignError> {
    let mut options = Opened::options();
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    options.read(true).custom_flags(flags.bits() as i32);
    let opened = options.open(path).map_err(ForeignError::io("read", path))?;
    let seen = opened.metadata().map_err(ForeignError::io("look at", path))?;
    match seen.is_file() {
        true => Ok(opened),
        false => Err(ForeignError::damaged(path, "it is no file")),
    }
}

fn length(path: &Path) -> Result<u64, ForeignError> {
    let seen = fs::symlink_metadata(path).map_err(ForeignError::io("look at", path))?;
    match seen.is_file() {
        true => Ok(seen.len()),
        false => Err(ForeignError::damaged(path, "it is no file")),
    }
}

/// The content of a small file; none where there is no such file.
fn read_small(path: &Path) -> Result<Option<Vec<u8>>, ForeignError> {
    let opened = match open(path) {
        Err(ForeignError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut content = Vec::new();
    opened.take(MAX_SMALL_BYTES + 1).read_to_end(&mut content).map_err(ForeignError::io("read", path))?;
    match content.len() as u64 > MAX_SMALL_BYTES {
        true => Err(ForeignError::damaged(path, format!("it is longer than {MAX_SMALL_BYTES} bytes"))),
        false => Ok(Some(content)),
    }
}

/// A stanza's or a server's name, which becomes a part of paths.
fn is_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    single && !name.contains(['/', '\0', '\n']) && name.len() < 256
}

/// A path inside of a data directory, of parts that mean nothing to a file system.
fn is_inside(path: &[u8]) -> bool {
    let part = |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && !part.contains(&0);
    path.len() <= MAX_PATH_BYTES && path.split(|byte| *byte == b'/').all(part)
}

/// What a backup may have and a restored data directory must not get from it.
fn is_left_out(path: &[u8]) -> bool {
    // Before PostgreSQL 12 it said how to recover, and a newer one does not start with it.
    const OLD_RECOVERY: &[u8] = b"recovery.conf";
    path == OLD_RECOVERY || path != LABEL && path != MAP && restoring::is_left_out(path)
}

/// The items of a backup while they are read.
#[derive(Debug, Default)]
struct Items {
    items: BTreeMap<Vec<u8>, Item>,
    files: u64,
    bytes: u64,
}

impl Items {
    /// Takes an item in, with the directories that it lies in. `Err` says what is wrong.
    fn add(&mut self, path: Vec<u8>, item: Item) -> Result<(), String> {
        let shown = || String::from_utf8_lossy(&path).escape_debug().to_string();
        if !is_inside(&path) {
            return Err(format!("\"{}\" is no path inside of a data directory", shown()));
        }
        if is_left_out(&path) {
            return Ok(());
        }
        let mut at = 0;
        while let Some(next) = path[at..].iter().position(|byte| *byte == b'/') {
            at += next + 1;
            let parent = &path[..at - 1];
            match self.items.get(parent).map(|item| &item.kind) {
                Some(Kind::File(_)) => {
                    return Err(format!("\"{}\" lies in what is a file", shown()));
                }
                Some(Kind::Link(_)) if !is_tablespace(parent) => {
                    return Err(format!("\"{}\" lies behind a link", shown()));
                }
                Some(_) => {}
                None => {
                    let item = Item { mode: PRIVATE_DIRECTORY, kind: Kind::Directory };
                    self.items.insert(parent.to_vec(), item);
                }
            }
        }
        if let Kind::File(file) = &item.kind {
            self.files += 1;
            let bytes = self.bytes.checked_add(file.size).filter(|bytes| *bytes <= i64::MAX as u64);
            self.bytes = bytes.ok_or_else(|| format!("\"{}\" has an absurd size", shown()))?;
        }
        match (self.items.get(&path).map(|there| &there.kind), &item.kind) {
            // It was made for what is in it, and may have another mode; a tablespace's link stands for its directory.
            (None | Some(Kind::Directory), Kind::Directory) => {}
            (Some(Kind::Link(_)), Kind::Directory) if is_tablespace(&path) => return Ok(()),
            (Some(Kind::Directory), Kind::Link(_)) if is_tablespace(&path) => {}
            (None, _) => {}
            _ => return Err(format!("\"{}\" is there twice", shown())),
        }
        if self.items.len() >= MAX_ITEMS {
            return Err(format!("it has more than {MAX_ITEMS} entries"));
        }
        self.items.insert(path, item);
        Ok(())
    }
}

/// `pg_tblspc/16384`.
fn is_tablespace(path: &[u8]) -> bool {
    let rest = path.strip_prefix(TABLESPACES.as_bytes()).and_then(|rest| rest.strip_prefix(b"/"));
    rest.is_some_and(|oid| oid_of(oid).is_some())
}

/// As PostgreSQL writes it: without zeros in front.
fn oid_of(digits: &[u8]) -> Option<u32> {
    let oid: u32 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (oid.to_string().as_bytes() == digits).then_some(oid)
}

/// Absolute, and without a way back in it: what becomes the target of a link.
fn is_place(path: &str) -> bool {
    let place = Path::new(path);
    place.is_absolute()
        && !path.contains(['\0', '\n', '\r'])
        && path.len() <= MAX_PATH_BYTES
        && !place.components().any(|component| component == Component::ParentDir)
}

#[cfg(test)]
mod tests;
