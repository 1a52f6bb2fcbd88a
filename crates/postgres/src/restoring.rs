//! A data directory is written from a backup, so that no server starts in it before it is whole.
//!
//! ```text
//! look()              what stands there; refuses before anything is touched
//! Restoring::begin    the marker is durable, and the control file gone: PostgreSQL does not start without one
//!   .directory() …    in order of paths; what does not belong is deleted on the way, contents are written by anyone
//!   .finish()         label, configuration and recovery settings; all of it flushed; the control file; the marker goes
//! ```
//!
//! It happens in its place and not beside it, as [`crate::clone`] does: a repeated restore uses what is there, a data
//! directory may be a mount point, and there is seldom space for two. What `making` reaches by renaming is reached by the
//! control file, which comes last. It says for ever that its checkpoint cannot be found: whoever removes `backup_label` has
//! no server that starts, instead of one that forgot what was written during the backup. Only a herd's own member
//! ([`Come::Member`]) keeps it as it was.
//!
//! Leaves out: where contents come from, and which backup. Hazard: deletes what does not belong. So it goes only into
//! what is empty, or what is a data directory of the same cluster, and follows no link but those that it made itself.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgherd_core::types::SystemId;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::base_backup::BaseBackupError;
use crate::base_backup::MARKER;
use crate::base_backup::listing::{Found, Kind, Listing, is_gone, is_tablespace};
use crate::control::{self, ControlFile, Limits};
use crate::durable;
use crate::error::{Error, Result};
use crate::proc;
use past_cache::{GATHERED_BYTES, Gathered};

mod configuration;
mod past_cache;

pub use crate::base_backup::listing::is_left_out;
pub use configuration::{Action, Change, Come, Configuration, End, FollowTimeline, Recovery, adapt};

/// Names in a backup that are treated by themselves.
pub const CONTROL: &[u8] = b"global/pg_control";
pub const LABEL: &[u8] = b"backup_label";
pub const MAP: &[u8] = b"tablespace_map";
pub const WAL: &[u8] = b"pg_wal";
pub const VERSION: &[u8] = b"PG_VERSION";
const TABLESPACES: &str = "pg_tblspc";

/// Where a backup goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub data_dir: PathBuf,
    /// The directory that `pg_wal` leads to; `None`: it is inside, or leads where it did.
    pub wal_dir: Option<PathBuf>,
    pub tablespaces: Vec<Tablespace>,
}

/// A tablespace that is not inside of the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    pub oid: u32,
    /// Where the server that was backed up had it.
    pub was: PathBuf,
    pub place: PathBuf,
}

impl Target {
    /// Which of its places a path of the backup comes to lie in: the tablespace, or `None` for the data directory.
    pub fn tablespace_of(&self, path: &[u8]) -> Option<&Tablespace> {
        let rest = path.strip_prefix(TABLESPACES.as_bytes())?.strip_prefix(b"/")?;
        let oid = rest.split(|byte| *byte == b'/').next()?;
        self.tablespaces.iter().find(|space| space.oid.to_string().as_bytes() == oid)
    }

    /// Bytes that a file of the backup has already. Blocks.
    pub fn present_bytes(&self, path: &[u8]) -> u64 {
        let place = self.data_dir.join(OsStr::from_bytes(path));
        fs::symlink_metadata(place).map_or(0, |seen| if seen.is_file() { seen.len() } else { 0 })
    }
}

/// The tablespace that a link of a backup leads to.
pub fn tablespace(path: &[u8]) -> Option<u32> {
    let name = path.rsplit(|byte| *byte == b'/').next().filter(|_| is_tablespace(path))?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// What a restore may go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Nothing is there.
    Nothing,
    /// A data directory of the same cluster whose server is stopped, or what an interrupted restore left.
    Delta,
}

/// What stands at a target that is not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Empty,
    /// An earlier restore did not come to its end.
    Interrupted,
    DataDirectory,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoringError {
    #[error("PostgreSQL runs in {}", .data_dir.display())]
    Running { data_dir: PathBuf },

    #[error("another restore writes into {}", .data_dir.display())]
    Busy { data_dir: PathBuf },

    #[error("{} is not empty", .dir.display())]
    NotEmpty { dir: PathBuf },

    #[error("an earlier restore into {} did not come to its end", .data_dir.display())]
    Interrupted { data_dir: PathBuf },

    #[error("{} is no data directory, and has something in it", .data_dir.display())]
    NotADataDirectory { data_dir: PathBuf },

    #[error("{} is a data directory of cluster {found}, and the backup is of {wanted}", .data_dir.display())]
    OtherCluster { data_dir: PathBuf, found: SystemId, wanted: SystemId },

    #[error("{what} cannot be in {}: {why}", .place.display())]
    Place { what: String, place: PathBuf, why: &'static str },

    #[error("the backup has \"{path}\", which {why}")]
    Entry { path: String, why: &'static str },

    #[error("the control file of the backup cannot be used: {what}")]
    Control { what: String },

    #[error(transparent)]
    Listing(#[from] BaseBackupError),
    #[error(transparent)]
    Other(#[from] Error),
}

impl RestoringError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            RestoringError::Running { .. } => Some("stop it first"),
            RestoringError::Busy { .. } => {
                Some("one that was interrupted ends within moments; try again then")
            }
            RestoringError::NotEmpty { .. } => Some(
                "choose another directory, or restore over it with --delta, which deletes what does not belong",
            ),
            RestoringError::Interrupted { .. } => Some("go on with --delta"),
            RestoringError::NotADataDirectory { .. } | RestoringError::OtherCluster { .. } => {
                Some("is it the right directory? --delta would delete what is there")
            }
            RestoringError::Other(error) => error.hint(),
            _ => None,
        }
    }
}

/// Refuses what must not be written over, and touches nothing. Blocks.
pub fn look(
    target: &Target,
    over: Over,
    system_id: SystemId,
    major: u32,
) -> Result<Standing, RestoringError> {
    let data_dir = &target.data_dir;
    places_are_apart(target)?;
    if !proc::of_data_dir(data_dir)?.is_empty() {
        return Err(RestoringError::Running { data_dir: data_dir.clone() });
    }
    let standing = if durable::is_empty_or_missing(data_dir)? {
        Standing::Empty
    } else if data_dir.join(MARKER).exists() {
        Standing::Interrupted
    } else {
        Standing::DataDirectory
    };
    match (standing, over) {
        (Standing::Interrupted, Over::Nothing) => {
            return Err(RestoringError::Interrupted { data_dir: data_dir.clone() });
        }
        (Standing::DataDirectory, Over::Nothing) => {
            return Err(RestoringError::NotEmpty { dir: data_dir.clone() });
        }
        (Standing::DataDirectory, Over::Delta) if !data_dir.join("PG_VERSION").is_file() => {
            return Err(RestoringError::NotADataDirectory { data_dir: data_dir.clone() });
        }
        _ => {}
    }
    // One that cannot be read says nothing, and goes anyway.
    if let Ok(control) = ControlFile::read(&data_dir.join("global/pg_control"))
        && control.system_id != system_id
    {
        let (data_dir, found) = (data_dir.clone(), control.system_id);
        return Err(RestoringError::OtherCluster { data_dir, found, wanted: system_id });
    }
    if over == Over::Delta && standing != Standing::Empty {
        return Ok(standing);
    }
    if let Some(dir) = &target.wal_dir
        && !durable::is_empty_or_missing(dir)?
    {
        return Err(RestoringError::NotEmpty { dir: dir.clone() });
    }
    for tablespace in &target.tablespaces {
        for name in names(&tablespace.place)? {
            // Others may use the same directory.
            if is_version_dir(&name, major) {
                let dir = tablespace.place.join(OsStr::from_bytes(&name));
                return Err(RestoringError::NotEmpty { dir });
            }
        }
    }
    Ok(standing)
}

fn places_are_apart(target: &Target) -> Result<(), RestoringError> {
    let wal = target.wal_dir.iter().map(|dir| ("WAL".to_owned(), dir));
    let spaces = target.tablespaces.iter().map(|space| (format!("tablespace {}", space.oid), &space.place));
    let mut taken: Vec<&PathBuf> = Vec::new();
    for (what, place) in
        std::iter::once(("the data directory".to_owned(), &target.data_dir)).chain(wal).chain(spaces)
    {
        let refuse = |why| Err(RestoringError::Place { what: what.clone(), place: place.clone(), why });
        if !place.is_absolute() {
            return refuse("the path is not absolute");
        }
        if taken.iter().any(|other| place.starts_with(other) || other.starts_with(place)) {
            return refuse("something else of this server is there");
        }
        taken.push(place);
    }
    Ok(())
}

/// `PG_15_202209061`.
fn is_version_dir(name: &[u8], major: u32) -> bool {
    name.starts_with(format!("PG_{major}_").as_bytes())
}

fn names(dir: &Path) -> Result<Vec<Vec<u8>>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    let name = |entry: io::Result<fs::DirEntry>| entry.map(|entry| entry.file_name().into_vec());
    entries.map(name).collect::<io::Result<_>>().map_err(Error::io("list", dir))
}

/// A data directory that is not yet one. All of it blocks.
#[derive(Debug)]
pub struct Restoring {
    target: Target,
    major: u32,
    /// What was there before; none where there was nothing.
    before: Option<std::iter::Peekable<Listing>>,
    /// The last link of the backup: nothing may come to lie behind it.
    link: Option<Vec<u8>>,
    /// Opened before the first write, so that flushing them tells of every write that failed since.
    volumes: Vec<(PathBuf, File)>,
    /// The data directory, locked.
    alone: Arc<File>,
    deleted: u64,
}

/// A file that is to get its content.
#[derive(Debug)]
pub struct Writing {
    place: PathBuf,
    mode: u32,
    size: u64,
    /// A restore that nobody waits for any more may still write this one: the directory is its until then.
    _alone: Arc<File>,
}

/// What is to be done with a file of the backup.
#[derive(Debug)]
pub enum Admitted {
    Write(Writing),
    /// It is for [`Ending::control`].
    Control,
}

/// What a restore ends with.
#[derive(Clone, Debug)]
pub struct Ending {
    /// The content of the backup's control file.
    pub control: Vec<u8>,
    /// As the server returned them.
    pub backup_label: Vec<u8>,
    pub tablespace_map: Vec<u8>,
    pub recovery: Recovery,
    /// Recovery does not begin with less.
    pub at_least: Limits,
}

/// What a restore has changed besides writing the backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    pub configuration: Configuration,
    /// Files and directories that did not belong.
    pub deleted: u64,
}

impl Restoring {
    /// After [`look`]. `note` says for people which backup this is going to be.
    pub fn begin(
        target: Target,
        over: Over,
        system_id: SystemId,
        major: u32,
        note: &str,
    ) -> Result<Restoring, RestoringError> {
        let standing = look(&target, over, system_id, major)?;
        let data_dir = &target.data_dir;
        if let Some(parent) = data_dir.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        durable::create_private_dir(data_dir)?;
        let alone = lock(data_dir)?;
        let marker = format!(
            "{note}\nIt is being restored, or was when that was interrupted, and is no data directory.\n"
        );
        durable::write(&data_dir.join(MARKER), marker.as_bytes(), durable::PRIVATE)?;
        if standing != Standing::Empty {
            durable::remove(&data_dir.join("global/pg_control"))?;
        }
        link_wal(&target)?;
        link_tablespaces(&target)?;
        let places = [Some(data_dir), target.wal_dir.as_ref()].into_iter().flatten().cloned();
        let mut volumes = Vec::new();
        for place in places.chain(target.tablespaces.iter().map(|space| space.place.clone())) {
            let opened = File::open(&place).map_err(Error::io("open", &place))?;
            volumes.push((place, opened));
        }
        let before = (standing != Standing::Empty).then(|| Listing::of_all(data_dir).peekable());
        Ok(Restoring { target, major, before, link: None, volumes, alone, deleted: 0 })
    }

    pub fn directory(&mut self, path: &[u8], mode: u32) -> Result<(), RestoringError> {
        self.admit(path, |kind| matches!(kind, Kind::Directory))?;
        let place = self.place(path);
        match fs::create_dir(&place) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(Error::io("create", &place))?,
        }
        // WAL elsewhere has the mode that it has.
        if path != WAL || !place.is_symlink() {
            fs::set_permissions(&place, Permissions::from_mode(mode))
                .map_err(Error::io("set the mode of", &place))?;
        }
        Ok(())
    }

    /// A link, which was made before if it leads to a tablespace.
    pub fn symlink(&mut self, path: &[u8], to: &[u8]) -> Result<(), RestoringError> {
        self.admit(path, |kind| matches!(kind, Kind::Symlink(_)))?;
        if is_tablespace(path) {
            return match self.target.tablespaces.iter().any(|space| path == link_path(space).as_bytes()) {
                true => Ok(()),
                false => Err(refused(path, "is a tablespace that has no place here")),
            };
        }
        if path.contains(&b'/') {
            return Err(refused(path, "is a link among PostgreSQL's files"));
        }
        self.link = Some(path.to_vec());
        let place = self.place(path);
        let to = Path::new(OsStr::from_bytes(to));
        if fs::read_link(&place).ok().as_deref() == Some(to) {
            return Ok(());
        }
        remove_link(&place)?;
        Ok(symlink(to, &place).map_err(Error::io("link", &place))?)
    }

    pub fn file(&mut self, path: &[u8], mode: u32, size: u64) -> Result<Admitted, RestoringError> {
        self.admit(path, |kind| matches!(kind, Kind::File(_)))?;
        if path == CONTROL {
            return Ok(Admitted::Control);
        }
        let (place, _alone) = (self.place(path), Arc::clone(&self.alone));
        Ok(Admitted::Write(Writing { place, mode, size, _alone }))
    }

    /// After everything was written.
    pub fn finish(mut self, ending: &Ending) -> Result<Restored, RestoringError> {
        self.delete_before(None)?;
        let data_dir = &self.target.data_dir;
        let come = ending.recovery.come;
        let control = match come {
            Come::Member => ControlFile::parse(&ending.control).map(|_| ending.control.clone()),
            Come::Primary | Come::Standby => control::poisoned(&ending.control),
        };
        let control = control.map_err(|what| RestoringError::Control { what })?;
        let write = |name: &str, bytes: &[u8]| durable::write(&data_dir.join(name), bytes, durable::PRIVATE);
        write("backup_label", &ending.backup_label)?;
        let map = moved(&ending.tablespace_map, &self.target.tablespaces);
        if !map.is_empty() {
            write("tablespace_map", &map)?;
        }
        let configuration = adapt(&read_configuration(data_dir)?, &ending.recovery, ending.at_least);
        if come != Come::Member {
            for (name, text) in &configuration.files {
                write(name, text)?;
            }
        }
        durable::touch(&data_dir.join(come.signal()))?;
        for (place, volume) in &self.volumes {
            rustix::fs::syncfs(volume)
                .map_err(|errno| Error::io("flush the volume of", place)(errno.into()))?;
        }
        write("global/pg_control", &control)?;
        durable::remove(&data_dir.join(MARKER))?;
        Ok(Restored { configuration, deleted: self.deleted })
    }

    fn place(&self, path: &[u8]) -> PathBuf {
        self.target.data_dir.join(OsStr::from_bytes(path))
    }

    /// Deletes what was there up to this path, and what is there if it is not of this kind.
    fn admit(&mut self, path: &[u8], same: fn(&Kind) -> bool) -> Result<(), RestoringError> {
        let behind =
            |link: &Vec<u8>| path.strip_prefix(link.as_slice()).is_some_and(|rest| rest.starts_with(b"/"));
        if self.link.as_ref().is_some_and(behind) {
            return Err(refused(path, "lies behind a link"));
        }
        self.delete_before(Some(path))?;
        let Some(before) = &mut self.before else { return Ok(()) };
        if let Some(Ok(found)) = before.next_if(|found| matches!(found, Ok(found) if found.path == path)) {
            let wal_elsewhere = path == WAL && matches!(found.kind, Kind::Symlink(_));
            if !same(&found.kind) && !wal_elsewhere {
                self.delete(&found)?;
            }
        }
        Ok(())
    }

    /// Deletes what was there and comes before `path`, or all of it.
    fn delete_before(&mut self, path: Option<&[u8]>) -> Result<(), RestoringError> {
        loop {
            let Some(before) = &mut self.before else { return Ok(()) };
            let comes = |found: &Result<Found, BaseBackupError>| match found {
                Ok(found) => path.is_none_or(|path| found.path.as_slice() < path),
                Err(_) => true,
            };
            let Some(found) = before.next_if(comes) else { return Ok(()) };
            let found = found?;
            self.delete(&found)?;
        }
    }

    fn delete(&mut self, found: &Found) -> Result<(), RestoringError> {
        let mut parts = found.path.split(|byte| *byte == b'/');
        let outer = (parts.next(), parts.next(), parts.next());
        // Of the directory of a tablespace, only this version's part is ours.
        let foreign = match outer {
            (Some(b"pg_tblspc"), Some(_), Some(name)) => !is_version_dir(name, self.major),
            _ => false,
        };
        let made_by_us = found.path == MARKER.as_bytes()
            || self.target.tablespaces.iter().any(|space| found.path == link_path(space).as_bytes());
        if foreign || made_by_us {
            return Ok(());
        }
        let place = self.place(&found.path);
        let removed = match found.kind {
            Kind::Directory => fs::remove_dir_all(&place),
            _ => fs::remove_file(&place),
        };
        match removed {
            Err(error) if is_gone(&error) => Ok(()),
            Err(error) => Err(Error::io("delete", place)(error).into()),
            Ok(()) => {
                self.deleted += 1;
                Ok(())
            }
        }
    }
}

/// Two restores into one directory would take each other's files for what was there before.
fn lock(data_dir: &Path) -> Result<Arc<File>, RestoringError> {
    let dir = File::open(data_dir).map_err(Error::io("open", data_dir))?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Arc::new(dir)),
        Err(Errno::WOULDBLOCK) => Err(RestoringError::Busy { data_dir: data_dir.to_owned() }),
        Err(errno) => Err(Error::io("lock", data_dir)(errno.into()).into()),
    }
}

fn refused(path: &[u8], why: &'static str) -> RestoringError {
    RestoringError::Entry { path: String::from_utf8_lossy(path).escape_debug().to_string(), why }
}

fn link_path(space: &Tablespace) -> String {
    format!("{TABLESPACES}/{}", space.oid)
}

fn remove_link(place: &Path) -> Result<()> {
    match fs::remove_file(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::io("remove", place)),
    }
}

/// Makes `pg_wal` lead where it shall, and empties it: old WAL would be taken for the backup's.
fn link_wal(target: &Target) -> Result<()> {
    let place = target.data_dir.join(OsStr::from_bytes(WAL));
    let leads = fs::read_link(&place).ok();
    if let Some(dir) = &target.wal_dir {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(Error::io("set the mode of", dir))?;
        if leads.as_ref() != Some(dir) {
            match leads.is_some() {
                true => remove_link(&place)?,
                false if place.exists() => {
                    fs::remove_dir_all(&place).map_err(Error::io("remove", &place))?;
                }
                false => {}
            }
            symlink(dir, &place).map_err(Error::io("link", &place))?;
        }
    }
    if place.is_symlink() {
        for name in names(&place)? {
            let inner = place.join(OsStr::from_bytes(&name));
            let is_dir = fs::symlink_metadata(&inner).is_ok_and(|seen| seen.is_dir());
            let removed = if is_dir { fs::remove_dir_all(&inner) } else { fs::remove_file(&inner) };
            removed.map_err(Error::io("delete", inner))?;
        }
    }
    Ok(())
}

/// Links to the tablespaces of the backup, and to no other: behind another link may be the files of whoever this data
/// directory was copied from. What it led to is left alone.
fn link_tablespaces(target: &Target) -> Result<()> {
    let folder = target.data_dir.join(TABLESPACES);
    for name in names(&folder)? {
        let place = folder.join(OsStr::from_bytes(&name));
        let Ok(leads) = fs::read_link(&place) else { continue };
        let wanted = |space: &Tablespace| space.oid.to_string().as_bytes() == name && space.place == leads;
        if !target.tablespaces.iter().any(wanted) {
            remove_link(&place)?;
        }
    }
    for space in &target.tablespaces {
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        durable::create_private_dir(&space.place)?;
        let place = target.data_dir.join(link_path(space));
        if !place.is_symlink() {
            if place.is_dir() {
                fs::remove_dir_all(&place).map_err(Error::io("remove", &place))?;
            }
            symlink(&space.place, &place).map_err(Error::io("link", &place))?;
        }
    }
    Ok(())
}

/// `tablespace_map` as it was returned, but for tablespaces that lie elsewhere now: PostgreSQL makes the links anew from it.
fn moved(map: &[u8], tablespaces: &[Tablespace]) -> Vec<u8> {
    let changed: BTreeMap<String, &Tablespace> = tablespaces
        .iter()
        .filter(|space| space.was != space.place)
        .map(|space| (space.oid.to_string(), space))
        .collect();
    if changed.is_empty() {
        return map.to_vec();
    }
    let mut moved = Vec::with_capacity(map.len());
    for line in lines(map) {
        let oid = line.split(|byte| *byte == b' ').next().unwrap_or_default();
        let space = std::str::from_utf8(oid).ok().and_then(|oid| changed.get(oid));
        match space {
            Some(space) => {
                moved.extend_from_slice(oid);
                moved.push(b' ');
                for byte in space.place.as_os_str().as_bytes() {
                    if matches!(byte, b'\n' | b'\r' | b'\\') {
                        moved.push(b'\\');
                    }
                    moved.push(*byte);
                }
                moved.push(b'\n');
            }
            None => moved.extend_from_slice(line),
        }
    }
    moved
}

/// Lines with their ends; an end of line inside of a path has a backslash before it.
fn lines(map: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut escaped = false;
    map.split_inclusive(move |byte| {
        let end = *byte == b'\n' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        end
    })
}

/// The files of a data directory that hold its configuration, which are read by names alone.
fn read_configuration(data_dir: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut wanted = Configuration::first();
    while let Some(name) = wanted.pop() {
        if files.contains_key(&name) {
            continue;
        }
        if let Some(text) = durable::read(&data_dir.join(&name))? {
            wanted.extend(Configuration::included(&text));
            files.insert(name, text);
        }
    }
    Ok(files)
}

impl Writing {
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Opens it with the content that it has.
    pub fn open(self) -> Result<Written> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(durable::PRIVATE)
            // What stands here is no link, and if it became one, nobody is written through it.
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(&self.place);
        let file = opened.map_err(Error::io("open", &self.place))?;
        let before = file.metadata().map_err(Error::io("look at", &self.place))?.len();
        let gathered = match before == 0 && self.size >= GATHERED_BYTES as u64 {
            true => Gathered::begin(&file).map_err(Error::io("write", &self.place))?,
            false => None,
        };
        Ok(Written { file, before, gathered, writing: self })
    }
}

/// A file that gets its content: from its beginning to its end if it was empty, else in any order.
#[derive(Debug)]
pub struct Written {
    file: File,
    before: u64,
    /// What comes to its end, while it is written past the page cache.
    gathered: Option<Gathered>,
    writing: Writing,
}

impl Written {
    /// Bytes that it had.
    pub fn before(&self) -> u64 {
        self.before
    }

    /// Replaces `piece` by `bytes` bytes from `at` on, or as many as there are.
    pub fn read(&self, piece: &mut Vec<u8>, at: u64, bytes: usize) -> Result<()> {
        let there = self.before.saturating_sub(at).min(bytes as u64) as usize;
        piece.resize(there, 0);
        self.file.read_exact_at(piece, at).map_err(Error::io("read", &self.writing.place))
    }

    pub fn write(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.put(bytes, at).map_err(Error::io("write", &self.writing.place))
    }

    fn put(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        if let Some(gathered) = self.gathered.take_if(|gathered| gathered.end() != at) {
            gathered.finish(&self.file)?;
        }
        match &mut self.gathered {
            Some(gathered) => gathered.push(&self.file, bytes),
            None => self.file.write_all_at(bytes, at),
        }
    }

    /// Gives it its size and permissions. It is flushed with all others.
    pub fn finish(mut self) -> Result<()> {
        let Writing { place, mode, size, .. } = &self.writing;
        if let Some(gathered) = self.gathered.take() {
            gathered.finish(&self.file).map_err(Error::io("write", place))?;
        }
        if self.before > *size {
            self.file.set_len(*size).map_err(Error::io("truncate", place))?;
        }
        let written = self.file.metadata().map_err(Error::io("look at", place))?.len();
        if written != *size {
            return Err(Error::damaged(place, format!("it has {written} bytes and should have {size}")));
        }
        self.file.set_permissions(Permissions::from_mode(*mode)).map_err(Error::io("set the mode of", place))
    }
}

#[cfg(test)]
mod tests;
