//! A base backup as a server sends it over its replication protocol: `BASE_BACKUP`, taken apart as it comes.
//!
//! ```text
//! Shape::of           version, sizes of pages and files, checksums
//! BackupStream::begin the server makes its checkpoint, and says where the backup begins and which tablespaces there are
//!   .next()           a member of an archive, its content in pieces, the manifest in pieces, the end
//! ```
//!
//! One archive for each tablespace, the data directory's last, and in that the control file last. Paths are those of the data directory:
//! what a tablespace has is below `pg_tblspc/`, and its link is made up from the list, since the server leaves it out.
//!
//! Leaves out: where contents go, and waiting for WAL. Hazard: a stream that ends early looks like a small server; only
//! [`Event::End`] says that all has come.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_pgwire::message::ServerMessage;
use pgherd_pgwire::replication::{BackedUp, BackupEdge, BackupPiece, Command, segment_bytes};

use super::listing::{CONTROL, Content, content_of, is_left_out};
use super::reading::Checksums;
use super::tar::{self, Archive, Member, MemberKind, TarError};
use crate::error::{Error, within};
use crate::page;
use crate::replication::{Replication, ReplicationError};

const ASKING: Duration = Duration::from_secs(10);
/// Before it the grammar was another one, and each archive had a stream of its own.
const ONE_STREAM_IN: u32 = 150_000;
const OLDEST: u32 = 140_000;
/// Tablespaces of one server.
const MAX_TABLESPACES: usize = 10_000;
const DOING: &str = "BASE_BACKUP";

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    #[error(transparent)]
    Driver(#[from] Error),
    #[error("the archive {archive} of the server cannot be read")]
    Archive { archive: String, source: TarError },
    #[error("PostgreSQL {version} has no base backup that is understood here")]
    Version { version: u32 },
    #[error("the server broke the protocol of a base backup: {what}")]
    Protocol { what: String },
}

impl StreamError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            StreamError::Replication(ReplicationError::NotIn { .. }) => Some(
                "the role needs REPLICATION (ALTER ROLE … REPLICATION) and a line of pg_hba.conf for the database replication; \
                 PGPASSWORD is used where the server asks for a password",
            ),
            StreamError::Replication(ReplicationError::Refused { sqlstate, .. })
                if sqlstate.as_bytes() == b"42501" =>
            {
                Some("the role needs REPLICATION: ALTER ROLE … REPLICATION")
            }
            StreamError::Replication(ReplicationError::Io { .. }) => Some(
                "see whether host and port are right, whether it listens there, and whether the certificate is one that sslrootcert has signed",
            ),
            StreamError::Replication(ReplicationError::Closed { .. } | ReplicationError::Refused { .. })
            | StreamError::Archive { .. }
            | StreamError::Protocol { .. } => {
                Some("see the server's log; what has come is no backup, begin again")
            }
            StreamError::Driver(error) => error.hint(),
            StreamError::Version { .. } => Some("pgherd takes backups of PostgreSQL 14 and later"),
            _ => None,
        }
    }
}

type Result<T, E = StreamError> = std::result::Result<T, E>;

/// What of a server has to be known before its files come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// As in `server_version_num`.
    pub version: u32,
    pub page_bytes: u32,
    pub file_pages: u32,
    pub data_checksums: bool,
}

impl Shape {
    pub async fn of(replication: &mut Replication) -> Result<Shape> {
        let version = replication.show("server_version_num", ASKING).await?;
        let page_bytes = replication.show("block_size", ASKING).await?;
        let data_checksums = replication.show("data_checksums", ASKING).await? == "on";
        let file_bytes = within("asking for a setting", ASKING, async {
            let row = replication.row(&Command::Show("segment_size")).await?;
            replication.read(&row, segment_bytes)
        })
        .await?;
        let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number > 0);
        let known = number(&version).zip(number(&page_bytes));
        let unreadable =
            || StreamError::Protocol { what: format!("{version} and {page_bytes} are no numbers") };
        let (version, page_bytes) = known.ok_or_else(unreadable)?;
        if version < OLDEST {
            return Err(StreamError::Version { version });
        }
        Ok(Shape { version, page_bytes, file_pages: file_bytes / page_bytes, data_checksums })
    }
}

/// What becomes of a file that comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What the server says of the backup, and no file of its own.
    BackupLabel,
    TablespaceMap,
    Control,
    /// It does not belong into a copy.
    LeftOut,
    File,
}

impl Part {
    pub fn of(path: &[u8]) -> Part {
        match path {
            b"backup_label" => Part::BackupLabel,
            b"tablespace_map" => Part::TablespaceMap,
            CONTROL => Part::Control,
            path if is_left_out(path) => Part::LeftOut,
            _ => Part::File,
        }
    }
}

/// What comes next.
#[derive(Clone, PartialEq, Eq)]
pub enum Event {
    /// With its path from the data directory.
    Member(Member),
    /// Of the member before.
    Content(Bytes),
    Manifest(Bytes),
    /// All of it has come.
    End {
        stop: Lsn,
        timeline: Timeline,
    },
}

/// Contents are data of users.
impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Member(member) => write!(f, "{member:?}"),
            Event::Content(bytes) => write!(f, "Content({} bytes)", bytes.len()),
            Event::Manifest(bytes) => write!(f, "Manifest({} bytes)", bytes.len()),
            Event::End { stop, timeline } => write!(f, "End({stop}, {timeline})"),
        }
    }
}

/// A base backup that comes. Dropping it ends the connection, and with it the backup.
pub struct BackupStream {
    replication: Replication,
    shape: Shape,
    start: Lsn,
    timeline: Timeline,
    /// One archive for each, in this order.
    archives: Vec<BackedUp>,
    /// Links to tablespaces that are still to be told of.
    links: Vec<Member>,
    began: usize,
    now: Now,
    pending: Bytes,
    stop: Option<BackupEdge>,
}

/// Of what a piece would be.
enum Now {
    Nothing,
    Archive { name: String, prefix: Vec<u8>, archive: Archive },
    Manifest,
}

impl BackupStream {
    /// Begins with a checkpoint, so it takes its time.
    pub async fn begin(
        mut replication: Replication,
        shape: Shape,
        label: &str,
        fast: bool,
        deadline: Duration,
    ) -> Result<BackupStream> {
        within("beginning a backup", deadline, async {
            let is_15 = shape.version >= ONE_STREAM_IN;
            let command = Command::BaseBackup { label, fast, is_15 };
            replication.ask(&command).await?;
            let (mut edge, mut archives): (Option<BackupEdge>, Vec<BackedUp>) = (None, Vec::new());
            let mut answers = 0;
            while answers < 2 {
                let (kind, body) = replication.message().await?;
                match replication.parse(kind, &body)? {
                    ServerMessage::DataRow(_) if answers == 0 => {
                        edge = Some(replication.read(&body, BackupEdge::read)?);
                    }
                    ServerMessage::DataRow(_) if archives.len() < MAX_TABLESPACES => {
                        archives.push(replication.read(&body, BackedUp::read)?);
                    }
                    ServerMessage::CommandComplete { .. } => answers += 1,
                    message => replication.pass_over(&message, &DOING)?,
                }
            }
            let edge = edge.ok_or_else(|| protocol("it does not say where it begins"))?;
            let links = archives.iter().filter_map(|archive| archive.tablespace.as_ref());
            let link = |(oid, to): &(u32, Vec<u8>)| Member {
                path: format!("pg_tblspc/{oid}").into_bytes(),
                kind: MemberKind::Symlink(to.clone()),
                mode: 0o777,
                size: 0,
            };
            Ok(BackupStream {
                links: links.map(link).collect(),
                replication,
                shape,
                start: Lsn(edge.at),
                timeline: Timeline(edge.timeline),
                archives,
                began: 0,
                now: Now::Nothing,
                pending: Bytes::new(),
                stop: None,
            })
        })
        .await
    }

    /// Where recovery of the copy will begin.
    pub fn start(&self) -> Lsn {
        self.start
    }

    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// As the server estimates it.
    pub fn bytes(&self) -> u64 {
        self.archives.iter().map(|archive| archive.kib.saturating_mul(1024)).sum()
    }

    /// By what pages are judged; none where the cluster has no checksums.
    pub fn checksums(&self) -> Option<Checksums> {
        let by = Checksums { page_bytes: self.shape.page_bytes, start: self.start };
        self.shape.data_checksums.then_some(by)
    }

    /// How the file at a path is read.
    pub fn content(&self, path: &[u8]) -> Content {
        content_of(path, Some(self.shape.file_pages))
    }

    /// May be cancelled at any time: what came is kept.
    pub async fn next(&mut self) -> Result<Event> {
        if let Some(link) = self.links.pop() {
            return Ok(Event::Member(link));
        }
        loop {
            if let Now::Archive { name, prefix, archive } = &mut self.now {
                let broken = |source| StreamError::Archive { archive: name.clone(), source };
                match archive.next(&mut self.pending).map_err(broken)? {
                    Some(tar::Part::Content(bytes)) => return Ok(Event::Content(bytes)),
                    Some(tar::Part::Member(mut member)) => {
                        member.path = [prefix.as_slice(), &member.path].concat();
                        return Ok(Event::Member(member));
                    }
                    None => {}
                }
            }
            let is_15 = self.shape.version >= ONE_STREAM_IN;
            let (kind, body) = self.replication.message().await?;
            match self.replication.parse(kind, &body)? {
                ServerMessage::CopyOutResponse(_) if is_15 => {}
                ServerMessage::CopyOutResponse(_) => self.begin_next()?,
                ServerMessage::CopyData(_) if !is_15 => {
                    if let Some(event) = self.take(body)? {
                        return Ok(event);
                    }
                }
                ServerMessage::CopyData(data) => {
                    match BackupPiece::parse(data).map_err(|error| protocol(error.to_string()))? {
                        BackupPiece::Archive { name } => {
                            let name = String::from_utf8_lossy(name).into_owned();
                            self.begin_archive(name)?;
                        }
                        BackupPiece::Manifest => self.begin_manifest()?,
                        BackupPiece::Content(content) => {
                            if let Some(event) = self.take(body.slice_ref(content))? {
                                return Ok(event);
                            }
                        }
                        BackupPiece::Progress => {}
                    }
                }
                ServerMessage::CopyDone => self.end()?,
                ServerMessage::DataRow(_) => {
                    self.stop = Some(self.replication.read(&body, BackupEdge::read)?);
                }
                ServerMessage::ReadyForQuery(_) => {
                    self.replication.is_answered();
                    return self.ended();
                }
                message => self.replication.pass_over(&message, &DOING)?,
            }
        }
    }

    fn take(&mut self, bytes: Bytes) -> Result<Option<Event>> {
        match &self.now {
            Now::Nothing => Err(protocol("a content that belongs to nothing")),
            Now::Manifest => Ok(Some(Event::Manifest(bytes))),
            Now::Archive { .. } => {
                self.pending = bytes;
                Ok(None)
            }
        }
    }

    /// Before 15 archives have no names, and the manifest comes behind the last.
    fn begin_next(&mut self) -> Result<()> {
        match self.archives.get(self.began).map(|archive| archive.tablespace.as_ref().map(|(oid, _)| *oid)) {
            Some(Some(oid)) => self.begin_archive(format!("{oid}.tar")),
            Some(None) => self.begin_archive("base.tar".to_owned()),
            None => self.begin_manifest(),
        }
    }

    fn begin_archive(&mut self, name: String) -> Result<()> {
        self.end()?;
        self.began += 1;
        let oid = name.strip_suffix(".tar").unwrap_or_default();
        let is_listed = |archive: &BackedUp| match &archive.tablespace {
            Some((number, _)) => number.to_string() == oid,
            None => oid == "base",
        };
        if !self.archives.iter().any(is_listed) {
            return Err(protocol(format!("an archive {name} that is not in its list")));
        }
        let prefix = if oid == "base" { Vec::new() } else { format!("pg_tblspc/{oid}/").into_bytes() };
        self.now = Now::Archive { name, prefix, archive: Archive::default() };
        Ok(())
    }

    fn begin_manifest(&mut self) -> Result<()> {
        self.end()?;
        self.now = Now::Manifest;
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.now, Now::Nothing) {
            Now::Archive { name, archive, .. } => {
                archive.finish().map_err(|source| StreamError::Archive { archive: name, source })
            }
            Now::Nothing | Now::Manifest => Ok(()),
        }
    }

    fn ended(&self) -> Result<Event> {
        let stop = self.stop.ok_or_else(|| protocol("it does not say where it ends"))?;
        if self.began != self.archives.len() {
            return Err(protocol("archives of its list are missing"));
        }
        Ok(Event::End { stop: Lsn(stop.at), timeline: Timeline(stop.timeline) })
    }
}

impl fmt::Debug for BackupStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BackupStream(from {} on timeline {})", self.start, self.timeline)
    }
}

fn protocol(what: impl Into<String>) -> StreamError {
    StreamError::Protocol { what: what.into() }
}

/// Pages of a piece that look damaged. `at` is where it begins in its file, at a whole page. What the server was writing while
/// it sent it looks so, too: nobody can read it again.
pub fn damaged_pages(piece: &[u8], at: u64, by: Checksums, first_block: u32) -> Vec<u32> {
    let before = (at / u64::from(by.page_bytes)) as u32;
    let pages = piece.chunks_exact(by.page_bytes as usize).zip(0..);
    let pages = pages.map(|(page, number)| (page, first_block.wrapping_add(before).wrapping_add(number)));
    pages
        .filter(|(page, block)| page::looks_damaged(page, *block, by.start))
        .map(|(_, block)| block)
        .collect()
}
