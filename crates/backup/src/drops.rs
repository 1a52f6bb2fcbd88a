//! Where a table was dropped, read from a backup and the WAL behind it.
//!
//! Who drops a table removes what PostgreSQL's statistics have of it, and the record of the commit says so with the table's OID (from version 15
//! on). Neither `TRUNCATE` nor `VACUUM FULL` does that, which give a table another file and let go of the one before. Which table an OID was is in
//! `pg_class`: as the backup has it, and as WAL adds to it. Rows are taken whether they are visible or not: a name that was given up has an OID that nobody
//! drops any more, or one whose drop is what is looked for.
//!
//! The files of a whole database are deleted before its `DROP DATABASE` is committed, and before that it is marked as invalid in `pg_database`, whatever becomes of
//! the transaction; so the position is that of the mark, and of the deletion where a server of an older minor version made none.
//!
//! Leaves out: a table in a database that was created behind the backup; one that got its name by `ALTER TABLE … RENAME` behind the backup, unless its page of `pg_class` was written as a whole since; and one that was
//! made while `wal_compression` was lz4, if its row came with such a page. Hazard: another table's drop. So what is found has the OID, database and schema of the one that
//! is meant, and whoever restores sees its transaction before anything is done.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use jiff::Timestamp;
use pgherd_core::types::Lsn;

use crate::document::ReadError;
use crate::format::Repository;
use crate::manifest::Manifest;
use crate::map::{Entry, Kind};
use crate::pack::PackReader;
use crate::recovery::{Refusal, Sources, walk};
use crate::wal::History;
use crate::wal::records::{Landmark, RelationFile, rows};

/// The first version whose commits say what was dropped.
const MIN_VERSION: u32 = 150_000;

const PAGE_BYTES: usize = 8192;
/// `relmapper.c`.
const MAP: &[u8] = b"pg_filenode.map";
const MAP_MAGIC: u32 = 0x59_2717;
const MAP_HEADER_BYTES: usize = 8;
/// Catalogs with OIDs that never change.
const PG_DATABASE: u32 = 1262;
const PG_CLASS: u32 = 1259;
const PG_NAMESPACE: u32 = 2615;
const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;
/// Where the columns lie that are looked at, in each version.
const NAME: std::ops::Range<usize> = 4..68;
const CLASS_NAMESPACE: usize = 68;
const CLASS_FILE: usize = 88;
const DATABASE_LIMIT: usize = 80;
/// `DATCONNLIMIT_INVALID_DB`: what there is of it cannot be connected to any more.
const INVALID: u32 = -2_i32 as u32;
/// Schemas of PostgreSQL's own.
const OWN: [&str; 3] = ["pg_catalog", "information_schema", "pg_toast"];

/// Which table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Any, if none is named.
    pub database: Option<String>,
    /// Any but PostgreSQL's own, if none is named.
    pub schema: Option<String>,
    pub name: String,
}

/// Where it was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drop {
    pub database: String,
    pub schema: String,
    pub name: String,
    pub oid: u32,
    pub xid: u32,
    pub at: Timestamp,
    /// Whether its database was dropped, and it therefore.
    pub with_database: bool,
    /// Everything before this position is from before the drop.
    pub lsn: Lsn,
}

#[derive(Debug, thiserror::Error)]
pub enum DropError {
    #[error("PostgreSQL {} does not write into WAL which tables were dropped", version / 10_000)]
    Version { version: u32 },
    #[error(transparent)]
    Walk(#[from] Refusal),
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// The last drop of a table behind a backup, on a line of history. `None`: there is none, or its name is not known there.
pub async fn find(
    sources: &Sources<'_>,
    repository: &Repository,
    manifest: &Manifest,
    history: &History,
    wanted: &Wanted,
) -> Result<Option<Drop>, DropError> {
    let version = manifest.facts.postgresql_version;
    if version < MIN_VERSION {
        return Err(DropError::Version { version });
    }
    let mut names = Names::read(repository, manifest, wanted).await?;
    let mut last: Option<Drop> = None;
    // The files of databases that went, by the transactions that have to be committed yet.
    let mut deleted: BTreeMap<u32, (u32, Lsn)> = BTreeMap::new();
    walk(sources.archive, sources.inventory, history, manifest.start, |record, landmark| {
        let mut seen = Vec::new();
        record.added(
            PAGE_BYTES,
            |file| names.files.contains_key(file),
            |file, row| seen.push((file, row.to_vec())),
        );
        for (file, row) in seen {
            names.add(file, &row, record.start);
        }
        if let (Some(database), Some(xid)) = (record.drops_database(), record.xid()) {
            let marked = names.invalid.get(&database).copied();
            deleted.insert(xid, (database, marked.unwrap_or(record.start)));
        }
        if let Some(Landmark::Commit { xid, at, relations, .. }) = landmark {
            let gone = deleted.remove(&xid);
            let found = match gone {
                Some((database, lsn)) => names.in_database(database).map(|found| (found, lsn, true)),
                None => relations
                    .iter()
                    .find_map(|dropped| names.of(dropped.database, dropped.oid))
                    .map(|found| (found, record.start, false)),
            };
            // With its database only what is still in it goes.
            names.gone.extend(relations.iter().map(|dropped| (dropped.database, dropped.oid)));
            if let Some((Found { database, schema, name, oid }, lsn, with_database)) = found
                && lsn >= manifest.stop
            {
                last = Some(Drop { database, schema, name, oid, xid, at, with_database, lsn });
            }
        }
        ControlFlow::Continue(())
    })
    .await?;
    Ok(last)
}

struct Found {
    database: String,
    schema: String,
    name: String,
    oid: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Catalog {
    Class,
    Namespace,
    Database,
}

#[derive(Default)]
struct Database {
    name: String,
    schemas: BTreeMap<u32, String>,
    /// Of the wanted name, by their OIDs: in which schema.
    tables: BTreeMap<u32, u32>,
}

/// What is known of names.
struct Names {
    wanted: Wanted,
    files: BTreeMap<RelationFile, Catalog>,
    databases: BTreeMap<u32, Database>,
    /// Databases and OIDs of what was dropped: rows of it stay on their pages.
    gone: BTreeSet<(u32, u32)>,
    /// Databases that were marked as invalid, and where.
    invalid: BTreeMap<u32, Lsn>,
}

impl Names {
    async fn read(repository: &Repository, manifest: &Manifest, wanted: &Wanted) -> Result<Names, ReadError> {
        let mut names = Names {
            wanted: wanted.clone(),
            files: BTreeMap::new(),
            databases: BTreeMap::new(),
            gone: BTreeSet::new(),
            invalid: BTreeMap::new(),
        };
        let mut contents = manifest.contents(repository);
        // Names of files are in maps, which come behind some of the files that they name.
        let (mut classes, mut shared) = (BTreeMap::new(), None);
        let mut entries = manifest.entries(repository);
        while let Some(entry) = entries.next().await? {
            let Some((place, MAP)) = split(&entry) else { continue };
            let map = whole(&mut contents, &entry).await?;
            if place == b"global" {
                shared = mapped(&map, PG_DATABASE);
            } else if let Some((tablespace, database)) = database_of(place)
                && let Some(number) = mapped(&map, PG_CLASS)
            {
                classes.insert(RelationFile { tablespace, database, number }, place.to_vec());
            }
        }
        if let Some(number) = shared {
            let file = RelationFile { tablespace: GLOBAL_TABLESPACE, database: 0, number };
            names.files.insert(file, Catalog::Database);
        }
        let mut namespaces = BTreeMap::new();
        let mut entries = manifest.entries(repository);
        while let Some(entry) = entries.next().await? {
            let Some((place, name)) = split(&entry) else { continue };
            let Some(number) = file_number(name) else { continue };
            if place == b"global" && Some(number) == shared {
                let file = RelationFile { tablespace: GLOBAL_TABLESPACE, database: 0, number };
                pages(&whole(&mut contents, &entry).await?, |row| {
                    if let Some((oid, name)) = named(row) {
                        names.databases.entry(oid).or_default().name = name;
                    }
                    names.add(file, row, manifest.start);
                });
            } else if let Some((tablespace, database)) = database_of(place) {
                let file = RelationFile { tablespace, database, number };
                if classes.contains_key(&file) {
                    names.files.insert(file, Catalog::Class);
                    pages(&whole(&mut contents, &entry).await?, |row| {
                        if row.get(..4) == Some(&PG_NAMESPACE.to_le_bytes())
                            && let Some(number) = u32_of(row, CLASS_FILE)
                        {
                            namespaces.insert(RelationFile { number, ..file }, ());
                        }
                        names.add(file, row, manifest.start);
                    });
                }
            }
        }
        let mut entries = manifest.entries(repository);
        while let Some(entry) = entries.next().await? {
            let found =
                split(&entry).and_then(|(place, name)| Some((database_of(place)?, file_number(name)?)));
            let Some(((tablespace, database), number)) = found else { continue };
            let file = RelationFile { tablespace, database, number };
            if namespaces.contains_key(&file) {
                names.files.insert(file, Catalog::Namespace);
                pages(&whole(&mut contents, &entry).await?, |row| names.add(file, row, manifest.start));
            }
        }
        Ok(names)
    }

    /// A row that was written at this position, or before it.
    fn add(&mut self, file: RelationFile, row: &[u8], at: Lsn) {
        let Some((oid, name)) = named(row) else { return };
        match self.files.get(&file) {
            Some(Catalog::Database) if u32_of(row, DATABASE_LIMIT) == Some(INVALID) => {
                self.invalid.entry(oid).or_insert(at);
            }
            Some(Catalog::Namespace) => {
                self.databases.entry(file.database).or_default().schemas.insert(oid, name);
            }
            Some(Catalog::Class) if name == self.wanted.name => {
                let tables = &mut self.databases.entry(file.database).or_default().tables;
                tables.extend(u32_of(row, CLASS_NAMESPACE).map(|schema| (oid, schema)));
            }
            _ => {}
        }
    }

    /// What is wanted, if this is it.
    fn of(&self, database: u32, oid: u32) -> Option<Found> {
        let known = self.databases.get(&database)?;
        let schema = known.schemas.get(known.tables.get(&oid)?)?;
        let fits = match &self.wanted.schema {
            Some(wanted) => wanted == schema,
            None => !OWN.contains(&schema.as_str()),
        };
        let meant = self.wanted.database.as_ref().is_none_or(|wanted| *wanted == known.name);
        let (database, schema, name) = (known.name.clone(), schema.clone(), self.wanted.name.clone());
        (fits && meant).then_some(Found { database, schema, name, oid })
    }

    fn in_database(&self, database: u32) -> Option<Found> {
        let there = self.databases.get(&database)?.tables.keys().rev();
        there.filter(|oid| !self.gone.contains(&(database, **oid))).find_map(|oid| self.of(database, *oid))
    }
}

/// A file's directory and its name.
fn split(entry: &Entry) -> Option<(&[u8], &[u8])> {
    let at = entry.path.iter().rposition(|byte| *byte == b'/').filter(|_| entry.kind == Kind::File)?;
    Some((&entry.path[..at], &entry.path[at + 1..]))
}

/// `base/5`, or `pg_tblspc/16385/PG_15_202209061/5`: the tablespace and the database.
fn database_of(place: &[u8]) -> Option<(u32, u32)> {
    let number = |part: &str| part.parse::<u32>().ok();
    let parts: Vec<&str> = std::str::from_utf8(place).ok()?.split('/').collect();
    match parts.as_slice() {
        ["base", database] => Some((DEFAULT_TABLESPACE, number(database)?)),
        ["pg_tblspc", tablespace, _, database] => Some((number(tablespace)?, number(database)?)),
        _ => None,
    }
}

/// `1259` and `1259.1`, but no fork of it.
fn file_number(name: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(name).ok()?;
    text.split_once('.').map_or(text, |(number, _)| number).parse().ok()
}

/// Which file a catalog has.
fn mapped(map: &[u8], oid: u32) -> Option<u32> {
    let count = u32_of(map, 4).filter(|_| u32_of(map, 0) == Some(MAP_MAGIC))? as usize;
    let pairs = (0..count).map(|number| MAP_HEADER_BYTES + number * 8);
    pairs
        .map_while(|at| Some((u32_of(map, at)?, u32_of(map, at + 4)?)))
        .find(|(of, _)| *of == oid)
        .map(|(_, file)| file)
}

fn pages(content: &[u8], mut each: impl FnMut(&[u8])) {
    for page in content.chunks_exact(PAGE_BYTES) {
        rows(page, &mut each);
    }
}

/// The OID and the name that rows of these catalogs begin with.
fn named(row: &[u8]) -> Option<(u32, String)> {
    let name = row.get(NAME)?;
    let end = name.iter().position(|byte| *byte == 0)?;
    Some((u32_of(row, 0)?, String::from_utf8_lossy(&name[..end]).into_owned()))
}

fn u32_of(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
}

async fn whole(contents: &mut PackReader, entry: &Entry) -> Result<Vec<u8>, ReadError> {
    let mut content = Vec::new();
    let take = async |piece: &[u8]| {
        content.extend_from_slice(piece);
        Ok::<_, ReadError>(())
    };
    contents.read_file(entry, take).await?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_databases_are_known_by_their_paths() {
        assert_eq!(database_of(b"base/5"), Some((DEFAULT_TABLESPACE, 5)));
        assert_eq!(database_of(b"pg_tblspc/16385/PG_15_202209061/5"), Some((16385, 5)));
        assert_eq!(database_of(b"base/5/deeper"), None);
        assert_eq!(
            (file_number(b"1259"), file_number(b"1259.1"), file_number(b"1259_fsm")),
            (Some(1259), Some(1259), None)
        );
    }

    #[test]
    fn a_map_says_which_file_a_catalog_has() {
        let words = [MAP_MAGIC, 2, 1249, 1249, PG_CLASS, 16400];
        let map: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(mapped(&map, PG_CLASS), Some(16400));
        assert_eq!(mapped(&map, 1262), None);
        assert_eq!(mapped(&map[4..], PG_CLASS), None, "it is no map");
        assert_eq!(mapped(&map[..12], PG_CLASS), None, "it is cut");
    }

    #[test]
    fn a_table_is_known_by_database_schema_and_name() {
        let wanted = Wanted { database: None, schema: Some("shop".to_owned()), name: "orders".to_owned() };
        let class = RelationFile { tablespace: DEFAULT_TABLESPACE, database: 5, number: PG_CLASS };
        let namespace = RelationFile { number: PG_NAMESPACE, ..class };
        let mut names = Names {
            wanted,
            files: [(class, Catalog::Class), (namespace, Catalog::Namespace)].into(),
            databases: [(5, Database { name: "app".to_owned(), ..Database::default() })].into(),
            gone: BTreeSet::new(),
            invalid: BTreeMap::new(),
        };
        let row = |oid: u32, name: &str, schema: u32| {
            let mut row = oid.to_le_bytes().to_vec();
            row.extend(name.as_bytes());
            row.resize(68, 0);
            row.extend(schema.to_le_bytes());
            row
        };
        names.add(namespace, &row(2200, "public", 0), Lsn(8));
        names.add(namespace, &row(16390, "shop", 0), Lsn(8));
        names.add(class, &row(16400, "orders", 2200), Lsn(8));
        names.add(class, &row(16401, "orders", 16390), Lsn(8));
        names.add(class, &row(16402, "other", 16390), Lsn(8));
        assert!(names.of(5, 16400).is_none() && names.of(5, 16402).is_none() && names.of(6, 16401).is_none());
        assert_eq!(
            names.of(5, 16401).map(|found| (found.database, found.oid)),
            Some(("app".to_owned(), 16401))
        );
        assert_eq!(names.in_database(5).map(|found| found.oid), Some(16401));
        names.gone.insert((5, 16401));
        assert!(names.in_database(5).is_none(), "it went before its database");
        names.gone.clear();
        names.files.insert(RelationFile { number: PG_DATABASE, ..class }, Catalog::Database);
        for (limit, at) in [(u32::MAX, 16), (INVALID, 24), (INVALID, 32)] {
            let mut row = row(5, "app", 0);
            row.resize(DATABASE_LIMIT, 0);
            row.extend(limit.to_le_bytes());
            names.add(RelationFile { number: PG_DATABASE, ..class }, &row, Lsn(at));
        }
        assert_eq!(names.invalid, [(5, Lsn(24))].into(), "where it was marked first");
        names.wanted.database = Some("another".to_owned());
        assert!(names.of(5, 16401).is_none());
    }
}
