//! A server in Barman's home: directories of backups as files, and its WAL.
//!
//! ```text
//! main/meta/20261122T220611-backup.info       what it knows of a backup; before 3.13: main/base/20261122T220611/backup.info
//! main/base/20261122T220611/data/…            the data directory
//! main/base/20261122T220611/16384/…           a tablespace, by its number
//! main/wals/0000000100000000/0000000100…03    WAL, compressed or not; histories lie in main/wals
//! main/incoming, main/streaming               WAL that is not in its place yet
//! ```
//!
//! Barman has no checksums of its own. Backups by its method `postgres` have the manifest that PostgreSQL wrote.
//!
//! Left out: backups as archives (`backup_compression`), encrypted, incremental (PostgreSQL 17) and snapshots, which are refused by name.
//! Hazard: what rsync has left out of a directory, nobody can tell.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use pgherd_core::types::{Lsn, SystemId, Timeline};
use pgherd_postgres::restoring::{LABEL, WAL};

use super::compressed::{Compression, Recognised};
use super::{
    Backup, Contents, File, Folder, ForeignError, Item, Items, Kind, Layout, Problem, is_left_out, is_name,
    is_place, is_tablespace, open, python, range, read_small, server_manifest,
};

const PROGRAM: &str = "Barman";
const MANIFEST: &str = "backup_manifest";
/// Of 50 million files.
const MAX_MANIFEST_BYTES: u64 = 16 * 1024 * 1024 * 1024;
/// The end of a manifest, with its ranges of WAL.
const TAIL_BYTES: u64 = 16 * 1024;

/// The backups of one server.
#[derive(Debug)]
pub(super) struct Server {
    name: String,
    dir: PathBuf,
}

/// What Barman knows of a backup: `key=value` in each line.
#[derive(Debug)]
struct Info {
    path: PathBuf,
    values: BTreeMap<String, String>,
}

impl Info {
    fn read(path: PathBuf) -> Result<Option<Info>, ForeignError> {
        let Some(content) = read_small(&path)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&content);
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        let values = pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect();
        Ok(Some(Info { path, values }))
    }

    /// What is there and is not Python's nothing.
    fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str).filter(|value| !value.is_empty() && *value != "None")
    }

    fn tablespaces(&self) -> Result<Vec<python::Tablespace>, ForeignError> {
        let text = self.values.get("tablespaces").map_or("None", String::as_str);
        let spaces = python::tablespaces(text);
        let spaces = spaces.filter(|spaces| spaces.iter().all(|(_, _, place)| is_place(place)));
        spaces.ok_or_else(|| ForeignError::damaged(&self.path, "its tablespaces cannot be understood"))
    }
}

impl Server {
    pub(super) fn open(home: &Path, server: Option<&str>) -> Result<Server, ForeignError> {
        let name = match server {
            Some(name) if is_name(name) => name.to_owned(),
            Some(name) => return Err(nothing(home, format!("a server \"{name}\""))),
            None => only(home)?,
        };
        let dir = home.join(&name);
        match dir.join("base").is_dir() {
            true => Ok(Server { name, dir }),
            false if home.is_dir() => Err(nothing(home, format!("a server \"{name}\""))),
            false => Err(no_home(home, "there is no such directory".to_owned())),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn place(&self) -> PathBuf {
        self.dir.clone()
    }

    pub(super) fn backups(&self) -> Result<Vec<Backup>, ForeignError> {
        let mut ids = BTreeSet::new();
        for (folder, ending) in [("base", ""), ("meta", "-backup.info")] {
            let dir = self.dir.join(folder);
            for name in names(&dir)?.unwrap_or_default() {
                let id = name.to_str().and_then(|name| name.strip_suffix(ending)).filter(|id| is_id(id));
                ids.extend(id.map(str::to_owned));
            }
        }
        let mut backups = Vec::new();
        for id in ids {
            if let Some(info) = self.info(&id)? {
                backups.push(self.backup(id, &info)?);
            }
        }
        Ok(backups)
    }

    /// None where a backup was deleted, and only its directory is left.
    fn info(&self, id: &str) -> Result<Option<Info>, ForeignError> {
        let new = self.dir.join("meta").join(format!("{id}-backup.info"));
        match Info::read(new)? {
            Some(info) => Ok(Some(info)),
            None => Info::read(self.base(id).join("backup.info")),
        }
    }

    fn base(&self, id: &str) -> PathBuf {
        self.dir.join("base").join(id)
    }

    fn backup(&self, id: String, info: &Info) -> Result<Backup, ForeignError> {
        let damaged = |what: String| ForeignError::damaged(&info.path, what);
        let status = info.get("status").unwrap_or("EMPTY").to_owned();
        let number = |key: &str| info.get(key).and_then(|value| value.parse::<u64>().ok());
        let system = number("systemid").or_else(|| self.identity());
        let between = (|| {
            let timeline = number("timeline").and_then(|number| u32::try_from(number).ok())?;
            let start: Lsn = info.get("begin_xlog")?.parse().ok()?;
            let said: Lsn = info.get("end_xlog")?.parse().ok()?;
            let stopped = info.get("end_time")?.parse::<Timestamp>().ok()?;
            // With pg_basebackup Barman knows only in which segment it ended; PostgreSQL knows better.
            let noted = self.stop_of(&id).or_else(|| self.noted_in_wal(info));
            let noted = noted.filter(|(begin, _)| *begin == start).map(|(_, stop)| stop);
            range(&id, Timeline(timeline), start, noted.unwrap_or(said), stopped)
        })();
        let way = format!("barman restore {} {id} does; take a backup of what it restored", self.name);
        let unsupported = |what: &str| Some(Problem::Unsupported { what: what.to_owned(), way: way.clone() });
        let problem = match (status.as_str(), &between) {
            ("DONE" | "WAITING_FOR_WALS", _) if info.get("snapshots_info").is_some() => {
                unsupported("is a snapshot of volumes")
            }
            ("DONE" | "WAITING_FOR_WALS", _) if info.get("encryption").is_some() => {
                unsupported("is encrypted")
            }
            ("DONE" | "WAITING_FOR_WALS", _) if info.get("compression").is_some() => {
                unsupported("is kept as compressed archives (backup_compression)")
            }
            ("DONE" | "WAITING_FOR_WALS", _) if info.get("parent_backup_id").is_some() => {
                unsupported("is an incremental one of PostgreSQL 17")
            }
            ("DONE" | "WAITING_FOR_WALS", None) => {
                Some(Problem::Unusable("it is not known between which positions it was taken".to_owned()))
            }
            ("DONE" | "WAITING_FOR_WALS", Some(_)) => None,
            (status, _) => Some(Problem::Unusable(format!("its status is {}", status.escape_debug()))),
        };
        let version = number("version").map(|version| format!("{}.{}", version / 10_000, version % 10_000));
        let (system, version) = match (system, version, &problem) {
            (Some(system), Some(version), _) => (system, version),
            // One that failed may have got no further.
            (system, version, Some(_)) => (system.unwrap_or_default(), version.unwrap_or_default()),
            _ => {
                return Err(damaged(
                    "it does not say which cluster it is of, or of which version".to_owned(),
                ));
            }
        };
        let range = between.filter(|_| problem.is_none());
        Ok(Backup { name: id, kind: "full", range, system: SystemId(system), version, problem })
    }

    /// The cluster that Barman has noted for all backups of the server.
    fn identity(&self) -> Option<u64> {
        let content = read_small(&self.dir.join("identity.json")).ok().flatten()?;
        let identity: serde_json::Value = serde_json::from_slice(&content).ok()?;
        identity["systemid"].as_str()?.parse().ok()
    }

    /// What PostgreSQL's manifest of the backup says of the WAL that it needs.
    fn stop_of(&self, id: &str) -> Option<(Lsn, Lsn)> {
        let mut manifest = open(&self.base(id).join("data").join(MANIFEST)).ok()?;
        let bytes = manifest.metadata().ok()?.len();
        manifest.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES))).ok()?;
        let mut tail = Vec::new();
        manifest.take(TAIL_BYTES).read_to_end(&mut tail).ok()?;
        server_manifest::stop(&tail)
    }

    /// What the server has written about the backup into its WAL archive.
    fn noted_in_wal(&self, info: &Info) -> Option<(Lsn, Lsn)> {
        let segment = info.get("begin_wal").filter(|name| name.len() == 24)?;
        let offset: u32 = info.get("begin_offset")?.parse().ok()?;
        let name = format!("{segment}.{offset:08X}.backup");
        let folder = segment.get(..16).filter(|_| is_name(segment))?;
        let places = [self.dir.join("wals").join(folder).join(&name), self.dir.join("incoming").join(&name)];
        let content = places.iter().find_map(|path| read_small(path).ok().flatten())?;
        let Recognised::As(compression) = Compression::recognise(&content) else { return None };
        let mut text = String::new();
        let from = compression.decoder(Box::new(io::Cursor::new(content)));
        from.take(TAIL_BYTES).read_to_string(&mut text).ok()?;
        let position = |heading: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(heading))?;
            line.split_ascii_whitespace().next()?.parse::<Lsn>().ok()
        };
        Some((position("START WAL LOCATION: ")?, position("STOP WAL LOCATION: ")?))
    }

    /// Everything that a backup consists of.
    pub(super) fn contents(&self, backup: &Backup) -> Result<Contents, ForeignError> {
        let base = self.base(&backup.name);
        let info = self.info(&backup.name)?.ok_or_else(|| ForeignError::Unusable {
            backup: backup.name.clone(),
            why: "it is not there any more".to_owned(),
        })?;
        let mut walk = Walk { items: Items::default(), noted: self.noted(&base)? };
        let data = base.join("data");
        for (_, oid, place) in info.tablespaces()? {
            let link = format!("pg_tblspc/{oid}").into_bytes();
            let item = Item { mode: super::PRIVATE_DIRECTORY, kind: Kind::Link(place.into()) };
            walk.items.add(link.clone(), item).map_err(|what| ForeignError::damaged(&info.path, what))?;
            walk.directory(&base.join(oid.to_string()), link)?;
        }
        walk.directory(&data, Vec::new())?;
        let mut remarks = Vec::new();
        let Walk { items, noted } = walk;
        match noted {
            None => remarks.push(
                "Barman keeps no checksums of its files: damage in them is not found here; pages have PostgreSQL's own if data checksums are on"
                    .to_owned(),
            ),
            Some(noted) => {
                let lost = noted.keys().find(|path| !is_left_out(path) && !items.items.contains_key(*path));
                if let Some(path) = lost {
                    let what = format!("{} is in it, and not in the backup", String::from_utf8_lossy(path).escape_debug());
                    return Err(ForeignError::damaged(&data.join(MANIFEST), what));
                }
                remarks.push("every file is compared with its checksum in the manifest that PostgreSQL wrote".to_owned());
            }
        }
        let mut contents = Contents::of(backup, items, vec![folder(&base)], remarks);
        // Of older versions the label may be in the catalogue alone.
        contents.backup_label = info
            .get(&String::from_utf8_lossy(LABEL))
            .and_then(python::string)
            .unwrap_or_default()
            .into_bytes();
        contents.take_labels(&data)?;
        Ok(contents)
    }

    /// What PostgreSQL's manifest says of every file, if the backup has one.
    fn noted(&self, base: &Path) -> Result<Option<BTreeMap<Vec<u8>, server_manifest::Noted>>, ForeignError> {
        let path = base.join("data").join(MANIFEST);
        let opened = match open(&path) {
            Err(ForeignError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let mut text = Vec::new();
        opened.take(MAX_MANIFEST_BYTES).read_to_end(&mut text).map_err(ForeignError::io("read", &path))?;
        let files = server_manifest::files(&text).map_err(|what| ForeignError::damaged(&path, what))?;
        Ok(Some(files))
    }
}

fn folder(base: &Path) -> Folder {
    let compression = Compression::None;
    Folder { place: base.to_owned(), layout: Layout::Barman, compression, bundled: compression }
}

/// A backup's files while they are looked for.
struct Walk {
    items: Items,
    noted: Option<BTreeMap<Vec<u8>, server_manifest::Noted>>,
}

impl Walk {
    /// Everything below a directory. `inside`: what it is in the data directory.
    fn directory(&mut self, dir: &Path, inside: Vec<u8>) -> Result<(), ForeignError> {
        let mut open: Vec<(PathBuf, Vec<u8>)> = vec![(dir.to_owned(), inside)];
        while let Some((dir, inside)) = open.pop() {
            let missing = || ForeignError::io("list", &dir)(io::ErrorKind::NotFound.into());
            for name in names(&dir)?.ok_or_else(missing)? {
                let place = dir.join(&name);
                let mut path = inside.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name.as_bytes());
                let seen = fs::symlink_metadata(&place).map_err(ForeignError::io("look at", &place))?;
                let mode = seen.mode() & 0o777;
                let kind = if seen.is_dir() {
                    open.push((place.clone(), path.clone()));
                    Kind::Directory
                } else if seen.is_file() {
                    Kind::File(self.file(&path, seen.len(), &place)?)
                } else if is_tablespace(&path) {
                    // It leads to where this backup has it, and its directory was taken in by itself.
                    continue;
                } else if path == WAL {
                    Kind::Directory
                } else {
                    let what = format!("backup has \"{}\", which is a link or no file", place.display());
                    let way = "barman restore does; take a backup of what it restored".to_owned();
                    return Err(ForeignError::Unsupported { what, way });
                };
                let item = Item {
                    mode: if matches!(kind, Kind::Directory) { mode | 0o700 } else { mode | 0o600 },
                    kind,
                };
                self.items.add(path, item).map_err(|what| ForeignError::damaged(&place, what))?;
            }
        }
        Ok(())
    }

    fn file(&self, path: &[u8], size: u64, place: &Path) -> Result<File, ForeignError> {
        let noted = self.noted.as_ref().and_then(|noted| noted.get(path));
        if let Some(noted) = noted.filter(|noted| noted.size != size) {
            let what = format!("it has {size} bytes and should have {}", noted.size);
            return Err(ForeignError::damaged(place, what));
        }
        let check = noted.and_then(|noted| noted.check.clone());
        Ok(File { size, check, folder: 0, bundled: None })
    }
}

/// `20261122T220611`.
fn is_id(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() == 15
        && bytes
            .iter()
            .enumerate()
            .all(|(at, byte)| if at == 8 { *byte == b'T' } else { byte.is_ascii_digit() })
}

/// Names in a directory; none where there is no such directory.
fn names(dir: &Path) -> Result<Option<Vec<std::ffi::OsString>>, ForeignError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(ForeignError::io("list", dir))?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
    names.collect::<io::Result<_>>().map(Some).map_err(ForeignError::io("list", dir))
}

fn nothing(home: &Path, what: String) -> ForeignError {
    ForeignError::Unknown { place: home.to_owned(), what }
}

fn no_home(home: &Path, why: String) -> ForeignError {
    ForeignError::NoRepository { place: home.to_owned(), program: PROGRAM, why }
}

/// The one server of a home.
pub(super) fn only(home: &Path) -> Result<String, ForeignError> {
    let all = names(home)?.ok_or_else(|| no_home(home, "there is no such directory".to_owned()))?;
    let is_server = |name: &std::ffi::OsString| {
        home.join(name).join("base").is_dir() && home.join(name).join("wals").is_dir()
    };
    let servers = all.into_iter().filter(is_server);
    let mut names: Vec<String> =
        servers.map(|name| String::from_utf8_lossy(&name.into_vec()).into_owned()).collect();
    names.sort();
    match names.as_slice() {
        [name] if is_name(name) => Ok(name.clone()),
        [] | [_] => Err(no_home(home, "there is no server in it".to_owned())),
        names => {
            Err(ForeignError::Several { place: home.to_owned(), what: "servers", names: names.join(", ") })
        }
    }
}
