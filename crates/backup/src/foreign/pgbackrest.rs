//! A repository of pgBackRest: `backup/<stanza>` with a catalogue and a directory for each backup, `archive/<stanza>` with WAL.
//!
//! ```text
//! backup/main/backup.info                              the catalogue, and backup.info.copy
//! backup/main/20261122-214843F/backup.manifest         every file of a full backup, and backup.manifest.copy
//! backup/main/20261122-214843F/pg_data/base/1/112.gz   one of them
//! backup/main/20261122-214843F/bundle/1                several of them, with repo-bundle
//! backup/main/20261122-214843F_20261122-214850I/…      an incremental one: its manifest names all files, and where they are
//! ```
//!
//! Left out: encryption and files that are kept block by block, which are refused by name. Hazard: a manifest says where a file goes and
//! where it is read from; both are taken apart before they are paths.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use pgherd_core::types::{Lsn, SystemId, Timeline};
use serde::Deserialize;

use super::checksum::{Check, sha1};
use super::compressed::Compression;
use super::{
    Backup, Bundled, Contents, File, Folder, ForeignError, Item, Items, Kind, Layout, PRIVATE_DIRECTORY,
    Problem, info, is_name, is_place, is_tablespace, oid_of, open, range,
};

const PROGRAM: &str = "pgBackRest";
const CATALOGUE: &str = "backup.info";
const MANIFEST: &str = "backup.manifest";
/// Nobody can do anything with what only the server's own user may read, so that is what it becomes where nothing is said.
const PRIVATE_FILE: u32 = 0o600;

/// A cluster that a stanza had: another one after each `stanza-upgrade`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cluster {
    pub(super) system: SystemId,
    pub(super) version: String,
}

/// The backups of one stanza.
#[derive(Debug)]
pub(super) struct Stanza {
    repository: PathBuf,
    name: String,
    clusters: BTreeMap<u32, Cluster>,
    current: Cluster,
    listed: Vec<(String, Listed)>,
}

/// What the catalogue says of a backup.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Listed {
    backup_archive_start: Option<String>,
    backup_lsn_start: Option<String>,
    backup_lsn_stop: Option<String>,
    backup_timestamp_stop: i64,
    db_id: u32,
    #[serde(default = "yes")]
    option_online: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct DbHistory {
    db_system_id: u64,
    db_version: String,
}

/// A file in a manifest.
#[derive(Deserialize)]
struct Written {
    /// Bytes of the map of its blocks, if it is kept block by block.
    #[serde(default)]
    bim: u64,
    /// Bundle, and where in it.
    bni: Option<u64>,
    #[serde(default)]
    bno: u64,
    checksum: Option<String>,
    #[serde(rename = "checksum-page")]
    checksum_page: Option<bool>,
    mode: Option<String>,
    reference: Option<String>,
    #[serde(rename = "repo-size")]
    repo_size: Option<u64>,
    size: u64,
}

#[derive(Deserialize)]
struct WrittenPath {
    mode: Option<String>,
}

#[derive(Deserialize)]
struct WrittenLink {
    destination: String,
}

/// Everything that a manifest says, before it is known to be whole.
#[derive(Default)]
struct Manifest {
    label: Option<String>,
    system: Option<u64>,
    start: Option<String>,
    stop: Option<String>,
    compression: Option<String>,
    bundle_raw: bool,
    files: Vec<(Vec<u8>, Written)>,
    paths: Vec<(Vec<u8>, Option<String>)>,
    links: Vec<(Vec<u8>, String)>,
    file_mode: Option<String>,
    path_mode: Option<String>,
}

impl Stanza {
    pub(super) fn open(repository: &Path, stanza: Option<&str>) -> Result<Stanza, ForeignError> {
        let name = match stanza {
            Some(name) if is_name(name) => name.to_owned(),
            Some(name) => return Err(nothing(repository, format!("a stanza \"{name}\""))),
            None => only(repository)?,
        };
        if !repository.join("backup").is_dir() {
            return Err(no_repository(repository, "there is no directory \"backup\" in it"));
        }
        let dir = repository.join("backup").join(&name);
        let (mut clusters, mut current, mut listed) = (BTreeMap::new(), None, Vec::new());
        let found = load(&dir.join(CATALOGUE), &mut |from| {
            (clusters, current, listed) = (BTreeMap::new(), None, Vec::new());
            info::read(from, |section, key, value| {
                let key = std::str::from_utf8(key).map_err(|_| "it has a key that is no text".to_owned())?;
                match (section, key) {
                    (b"db", "db-id") => current = Some(parsed::<u32>(key, value)?),
                    (b"db:history", id) => {
                        let DbHistory { db_system_id, db_version: version } = parsed(key, value)?;
                        let id = id.parse().map_err(|_| format!("\"{id}\" is no number of a cluster"))?;
                        clusters.insert(id, Cluster { system: SystemId(db_system_id), version });
                    }
                    (b"backup:current", label) if is_label(label) => {
                        listed.push((label.to_owned(), parsed::<Listed>(key, value)?));
                    }
                    (b"backup:current", label) => return Err(format!("\"{label}\" is no backup")),
                    _ => {}
                }
                Ok(())
            })
        })?;
        if !found {
            return Err(nothing(repository, format!("a stanza \"{name}\"")));
        }
        let current = current.and_then(|id: u32| clusters.get(&id)).cloned();
        let current = current.ok_or_else(|| {
            ForeignError::damaged(&dir.join(CATALOGUE), "it does not say whose backups these are")
        })?;
        Ok(Stanza { repository: repository.to_owned(), name, clusters, current, listed })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn place(&self) -> PathBuf {
        self.repository.join("backup").join(&self.name)
    }

    pub(super) fn system(&self) -> SystemId {
        self.current.system
    }

    pub(super) fn backups(&self) -> Result<Vec<Backup>, ForeignError> {
        let backup = |(label, listed): &(String, Listed)| {
            let cluster = self.clusters.get(&listed.db_id).ok_or_else(|| {
                let what = format!("it does not say which cluster backup {label} is of");
                ForeignError::damaged(&self.place().join(CATALOGUE), what)
            })?;
            let timeline = listed.backup_archive_start.as_deref().and_then(timeline_of);
            let position = |text: &Option<String>| text.as_deref().and_then(|text| text.parse::<Lsn>().ok());
            // It counts seconds, and the end is not before the last of them was over.
            let stopped = Timestamp::from_second(listed.backup_timestamp_stop).ok();
            let stopped = stopped.and_then(|at| at.checked_add(SignedDuration::from_secs(1)).ok());
            let between = (|| {
                let (start, stop) = (position(&listed.backup_lsn_start)?, position(&listed.backup_lsn_stop)?);
                range(label, timeline?, start, stop, stopped?)
            })();
            let problem = match (&between, listed.option_online) {
                (_, false) => Some(Problem::Unsupported {
                    what: "was taken of a stopped server (--no-online)".to_owned(),
                    way: format!("pgbackrest --stanza={} --set={label} restore does", self.name),
                }),
                (None, true) => Some(Problem::Unusable(
                    "the catalogue does not say between which positions it was taken".to_owned(),
                )),
                (Some(_), true) => None,
            };
            Ok(Backup {
                name: label.clone(),
                kind: match label.as_bytes().last() {
                    Some(b'D') => "diff",
                    Some(b'I') => "incr",
                    _ => "full",
                },
                range: between.filter(|_| listed.option_online),
                system: cluster.system,
                version: cluster.version.clone(),
                problem,
            })
        };
        self.listed.iter().map(backup).collect()
    }

    /// Everything that a backup consists of.
    pub(super) fn contents(&self, backup: &Backup) -> Result<Contents, ForeignError> {
        let dir = self.place().join(&backup.name);
        let place = dir.join(MANIFEST);
        let mut manifest = Manifest::default();
        let found = load(&place, &mut |from| {
            manifest = Manifest::default();
            info::read(from, |section, key, value| manifest.take(section, key, value))
        })?;
        let missing = || ForeignError::io("read", &place)(io::ErrorKind::NotFound.into());
        if !found {
            return Err(missing());
        }
        self.of_manifest(backup, manifest, &place)
    }

    fn of_manifest(
        &self,
        backup: &Backup,
        manifest: Manifest,
        place: &Path,
    ) -> Result<Contents, ForeignError> {
        let damaged = |what: String| ForeignError::damaged(place, what);
        if manifest.label.as_deref() != Some(&*backup.name) || manifest.system != Some(backup.system.0) {
            return Err(damaged("it is the manifest of another backup".to_owned()));
        }
        let positions = [&manifest.start, &manifest.stop].map(|text| text.as_deref()?.parse::<Lsn>().ok());
        if backup.range.map(|range| [Some(range.start), Some(range.stop)]) != Some(positions) {
            return Err(damaged("it and the catalogue name other positions".to_owned()));
        }
        let kind = manifest.compression.as_deref().unwrap_or("none");
        let compression = Compression::named(kind).ok_or_else(|| {
            let what = format!("backup {} is compressed by \"{kind}\"", backup.name);
            self.unsupported(what, &backup.name)
        })?;
        let bundled = match compression {
            Compression::Gz if manifest.bundle_raw => Compression::Deflate,
            other => other,
        };
        if let Some((path, _)) = manifest.files.iter().find(|(_, file)| file.bim > 0) {
            let path = String::from_utf8_lossy(path).escape_debug().to_string();
            let (name, has) = (&backup.name, "has files that are kept block by block (repo-block)");
            return Err(self.unsupported(format!("backup {name} {has}, {path} for one"), name));
        }
        let mut folders = vec![Folder {
            place: self.place().join(&backup.name),
            layout: Layout::PgBackRest,
            compression,
            bundled,
        }];
        let mut by_label: BTreeMap<String, u32> = BTreeMap::from([(backup.name.clone(), 0)]);
        let (mut items, mut stored) = (Items::default(), BTreeMap::new());
        let mut remarks =
            vec!["every file is compared with its SHA-1 in the manifest of pgBackRest".to_owned()];
        for (path, place) in &manifest.links {
            match path.strip_prefix(b"pg_data/".as_slice()) {
                Some(link) if is_tablespace(link) && is_place(place) => {
                    let item = Item { mode: PRIVATE_DIRECTORY, kind: Kind::Link(place.into()) };
                    items.add(link.to_vec(), item).map_err(damaged)?;
                }
                Some(link) if super::is_inside(link) && !is_tablespace(link) => {
                    let link = String::from_utf8_lossy(link).escape_debug().to_string();
                    let place = place.escape_debug();
                    remarks.push(format!(
                        "{link} was a link to {place}; what it led to comes into the data directory"
                    ));
                }
                _ => {
                    let path = String::from_utf8_lossy(path).escape_debug().to_string();
                    return Err(damaged(format!("\"{path}\" is a link to \"{}\"", place.escape_debug())));
                }
            }
        }
        let links: BTreeSet<Vec<u8>> =
            items.items.keys().filter(|path| is_tablespace(path)).cloned().collect();
        let mode_of = |mode: Option<&str>, default: Option<&str>, otherwise: u32| match mode.or(default) {
            None => Ok(otherwise),
            Some(digits) => u32::from_str_radix(digits, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777)
                // Whoever restores it must be able to read and to write it.
                .map(|mode| mode & 0o777 | otherwise)
                .ok_or_else(|| damaged(format!("\"{}\" is no mode", digits.escape_debug()))),
        };
        for (path, mode) in &manifest.paths {
            let Some(inside) = inside(path, &links).map_err(damaged)? else { continue };
            let mode = mode_of(mode.as_deref(), manifest.path_mode.as_deref(), PRIVATE_DIRECTORY)?;
            items.add(inside, Item { mode, kind: Kind::Directory }).map_err(damaged)?;
        }
        let mut of_label = |label: &str| match by_label.get(label) {
            Some(folder) => Ok(*folder),
            None if is_label(label) => {
                self.has(&backup.name, label)?;
                let place = self.place().join(label);
                folders.push(Folder { place, layout: Layout::PgBackRest, compression, bundled });
                by_label.insert(label.to_owned(), folders.len() as u32 - 1);
                Ok(folders.len() as u32 - 1)
            }
            None => Err(damaged(format!("\"{}\" is no backup", label.escape_debug()))),
        };
        let mut bad_pages = 0_u64;
        for (path, file) in manifest.files {
            let shown = || String::from_utf8_lossy(&path).escape_debug().to_string();
            let Some(inside) = inside(&path, &links).map_err(damaged)? else {
                return Err(damaged(format!("\"{}\" is no file", shown())));
            };
            bad_pages += u64::from(file.checksum_page == Some(false));
            let folder = match &file.reference {
                None => 0,
                Some(label) => of_label(label)?,
            };
            let check = match file.checksum.as_deref() {
                Some(digits) => {
                    let digest = sha1(digits)
                        .ok_or_else(|| damaged(format!("the checksum of {} is none", shown())))?;
                    Some(Check::Sha1(digest))
                }
                None if file.size == 0 => None,
                None => return Err(damaged(format!("it has no checksum of {}", shown()))),
            };
            let bytes = file.repo_size.unwrap_or(file.size);
            let bundled = file.bni.filter(|number| *number > 0);
            let bundled = bundled.map(|number| Box::new(Bundled { number, offset: file.bno, bytes }));
            if bundled.is_none() {
                stored.insert(inside.clone(), bytes);
            }
            let mode = mode_of(file.mode.as_deref(), manifest.file_mode.as_deref(), PRIVATE_FILE)?;
            let kind = Kind::File(File { size: file.size, check, folder, bundled });
            items.add(inside, Item { mode, kind }).map_err(damaged)?;
        }
        if bad_pages > 0 {
            remarks.push(format!(
                "pages of {bad_pages} files had wrong checksums when pgBackRest took it; they are restored as they are"
            ));
        }
        let mut contents = Contents::of(backup, items, folders, remarks);
        contents.is_there(&stored)?;
        contents.take_labels(place)?;
        Ok(contents)
    }

    /// Refuses a backup that is not there and that another one refers to.
    fn has(&self, backup: &str, reference: &str) -> Result<(), ForeignError> {
        let manifest = self.place().join(reference).join(MANIFEST);
        let copy = self.place().join(reference).join(format!("{MANIFEST}.copy"));
        if manifest.is_file() || copy.is_file() {
            return Ok(());
        }
        let why = format!("it has files in backup {reference}, which is not there");
        Err(ForeignError::Unusable { backup: backup.to_owned(), why })
    }

    fn unsupported(&self, what: String, label: &str) -> ForeignError {
        let way = format!(
            "pgbackrest --stanza={} --set={label} restore does; take a backup of what it restored",
            self.name
        );
        ForeignError::Unsupported { what, way }
    }
}

impl Manifest {
    fn take(&mut self, section: &[u8], key: &[u8], value: &str) -> Result<(), String> {
        let name = std::str::from_utf8(key).unwrap_or_default();
        match section {
            b"backup" => match name {
                "backup-label" => self.label = parsed(name, value)?,
                "backup-lsn-start" => self.start = parsed(name, value)?,
                "backup-lsn-stop" => self.stop = parsed(name, value)?,
                "backup-bundle-raw" => self.bundle_raw = parsed(name, value)?,
                _ => {}
            },
            b"backup:db" if name == "db-system-id" => self.system = parsed(name, value)?,
            b"backup:option" => match name {
                // Before there was another one; it comes first.
                "option-compress" if parsed::<bool>(name, value)? => self.compression = Some("gz".to_owned()),
                "option-compress-type" => self.compression = parsed(name, value)?,
                _ => {}
            },
            b"target:file" => self.files.push((key.to_vec(), parsed(name, value)?)),
            b"target:path" => self.paths.push((key.to_vec(), parsed::<WrittenPath>(name, value)?.mode)),
            b"target:link" => {
                self.links.push((key.to_vec(), parsed::<WrittenLink>(name, value)?.destination));
            }
            b"target:file:default" if name == "mode" => self.file_mode = parsed(name, value)?,
            b"target:path:default" if name == "mode" => self.path_mode = parsed(name, value)?,
            _ => {}
        }
        Ok(())
    }
}

fn parsed<T: serde::de::DeserializeOwned>(key: &str, value: &str) -> Result<T, String> {
    serde_json::from_str(value)
        .map_err(|error| format!("the value of \"{}\" is none: {error}", key.escape_debug()))
}

/// The path from the data directory; `None` for what stands for the directory itself.
fn inside(path: &[u8], links: &BTreeSet<Vec<u8>>) -> Result<Option<Vec<u8>>, String> {
    if path == b"pg_data" || path == b"pg_tblspc" {
        return Ok(None);
    }
    let shown = || String::from_utf8_lossy(path).escape_debug().to_string();
    if let Some(rest) = path.strip_prefix(b"pg_data/".as_slice()) {
        // Only the other spelling leads into a tablespace.
        let own = rest.starts_with(b"pg_tblspc/");
        return if own {
            Err(format!("\"{}\" is in a tablespace", shown()))
        } else {
            Ok(Some(rest.to_vec()))
        };
    }
    let mut parts = path.splitn(3, |byte| *byte == b'/');
    let (top, oid) = (parts.next(), parts.next());
    let space = match (top, oid) {
        (Some(b"pg_tblspc"), Some(oid)) if oid_of(oid).is_some() => [b"pg_tblspc/", oid].concat(),
        _ => return Err(format!("\"{}\" is no path of a backup", shown())),
    };
    match links.contains(&space) {
        true => Ok(Some(path.to_vec())),
        false => Err(format!("\"{}\" is in a tablespace that the backup has not", shown())),
    }
}

/// `20261122-214843F`, and behind it `_20261122-214850D` or `I`.
fn is_label(label: &str) -> bool {
    let part = |part: &str, ends: &[u8]| {
        let bytes = part.as_bytes();
        bytes.len() == 16
            && ends.contains(&bytes[15])
            && bytes[..15]
                .iter()
                .enumerate()
                .all(|(at, byte)| if at == 8 { *byte == b'-' } else { byte.is_ascii_digit() })
    };
    match label.split_once('_') {
        None => part(label, b"F"),
        Some((full, own)) => part(full, b"F") && part(own, b"DI"),
    }
}

/// Of a segment's name.
fn timeline_of(segment: &str) -> Option<Timeline> {
    let digits = segment.get(..8).filter(|_| segment.len() == 24)?;
    u32::from_str_radix(digits, 16).ok().map(Timeline)
}

fn nothing(repository: &Path, what: String) -> ForeignError {
    ForeignError::Unknown { place: repository.to_owned(), what }
}

fn no_repository(repository: &Path, why: &str) -> ForeignError {
    ForeignError::NoRepository { place: repository.to_owned(), program: PROGRAM, why: why.to_owned() }
}

/// The one stanza of a repository.
pub(super) fn only(repository: &Path) -> Result<String, ForeignError> {
    let dir = repository.join("backup");
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(no_repository(repository, "there is no directory \"backup\" in it"));
        }
        other => other.map_err(ForeignError::io("list", &dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(ForeignError::io("list", &dir))?.file_name();
        let has = |file: &str| dir.join(&name).join(file).exists();
        if has(CATALOGUE) || has("backup.info.copy") {
            names.push(String::from_utf8_lossy(name.as_bytes()).into_owned());
        }
    }
    names.sort();
    match names.as_slice() {
        [name] if is_name(name) => Ok(name.clone()),
        [] | [_] => Err(no_repository(repository, "there is no stanza with a backup in it")),
        names => Err(ForeignError::Several {
            place: repository.to_owned(),
            what: "stanzas",
            names: names.join(", "),
        }),
    }
}

/// Reads a file of information, or its copy where it is damaged or missing. `false`: there is neither.
pub(super) fn load(
    path: &Path,
    read: &mut dyn FnMut(BufReader<Box<dyn Read>>) -> Result<(), String>,
) -> Result<bool, ForeignError> {
    let mut copy = path.as_os_str().to_owned();
    copy.push(OsStr::from_bytes(b".copy"));
    let mut first: Option<ForeignError> = None;
    for path in [path.to_owned(), PathBuf::from(copy)] {
        let mut opened = match open(&path) {
            Err(ForeignError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                first.get_or_insert(error);
                continue;
            }
            Ok(opened) => opened,
        };
        let mut begin = [0; info::ENCRYPTED.len()];
        let begun = opened.read(&mut begin).map_err(ForeignError::io("read", &path))?;
        if begin == info::ENCRYPTED {
            return Err(ForeignError::Unsupported {
                what: format!("{} is encrypted (repo-cipher-type)", path.display()),
                way: "pgbackrest restore does; take a backup of what it restored".to_owned(),
            });
        }
        let from: Box<dyn Read> = Box::new(io::Cursor::new(begin[..begun].to_vec()).chain(opened));
        match read(BufReader::with_capacity(1 << 20, from)) {
            Ok(()) => return Ok(true),
            Err(what) => {
                first.get_or_insert(ForeignError::damaged(&path, what));
            }
        }
    }
    first.map_or(Ok(false), Err)
}

/// The clusters that an archive has had, by the directories that their WAL is in, the newest first.
pub(super) fn archives(repository: &Path, stanza: &str) -> Result<Vec<(String, Cluster)>, ForeignError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct History {
        db_id: u64,
        db_version: String,
    }
    let path = repository.join("archive").join(stanza).join("archive.info");
    let mut clusters: BTreeMap<u32, Cluster> = BTreeMap::new();
    let found = load(&path, &mut |from| {
        clusters.clear();
        info::read(from, |section, key, value| {
            let key = std::str::from_utf8(key).map_err(|_| "it has a key that is no text".to_owned())?;
            if section == b"db:history" {
                let id = key.parse().map_err(|_| format!("\"{key}\" is no number of a cluster"))?;
                // Here it is the system identifier that is called so.
                let History { db_id, db_version: version } = parsed(key, value)?;
                if !version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
                    return Err(format!("\"{version}\" is no version"));
                }
                clusters.insert(id, Cluster { system: SystemId(db_id), version });
            }
            Ok(())
        })
    })?;
    if !found {
        return Err(ForeignError::io("read", &path)(io::ErrorKind::NotFound.into()));
    }
    Ok(clusters
        .into_iter()
        .rev()
        .map(|(id, cluster)| (format!("{}-{id}", cluster.version), cluster))
        .collect())
}
