//! A base backup as somebody asks for it, of a server on this host or of one that sends its files: which server, which backup it is
//! built upon, and then [`take`] or [`streamed`].
//!
//! No herd is needed; WAL has to come into the repository by `pgherd wal push`, or by a stream. Leaves out: when. Hazard: a backup of
//! another server than the one that was meant; the directory's cluster is compared with that of the server before anything is written.

use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgherd_api::backup::{Created, DamagedFile};
use pgherd_backup::manifest::Outcome;
use pgherd_backup::name::Place;
use pgherd_backup::tombstone::State;
use pgherd_backup::wal::{Archive, SegmentError, Segments};
pub use pgherd_core::throttle::Floor;
use pgherd_core::types::{Malformed, NodeName, Term, Timeline};
use pgherd_postgres::base_backup::Checkpoint;
use pgherd_postgres::sql::Session;
use tokio::sync::watch;

use super::Progress;
use super::catalog::{Catalog, CatalogError, Entry, report};
use super::streamed;
use super::take::{self, Damaged, Find, Source, TakeError, Taken};
use crate::causes::on_one_line;
use crate::foreign_server::{ForeignServer, ForeignServerError, Reached};
use crate::named_server::{self, NamedServer, NamedServerError};
use crate::repository::{self, RepositoryError};

const ASKING: Duration = Duration::from_secs(10);
/// Somebody may take one beside. He gives a sign of life each half minute.
const SILENCE: Duration = Duration::from_secs(120);

/// The server that is backed up.
#[derive(Clone)]
pub enum Server {
    /// Its data directory is read.
    Here(NamedServer),
    /// It sends its files. Lists of them are held in files of this directory.
    Sends { server: ForeignServer, scratch_dir: PathBuf },
}

/// Which server, and how.
#[derive(Clone)]
pub struct Order {
    /// File that names the repository.
    pub repository: PathBuf,
    pub server: Server,
    /// By this name the backup remembers where it comes from.
    pub node: String,
    /// Built upon no other one.
    pub full: bool,
    /// How it is found what has changed since the parent.
    pub find: Find,
    pub checkpoint_fast: bool,
    pub readers: usize,
    pub max_bytes_per_second: Option<NonZeroU64>,
    /// How slowly a server here is read at most, where it would become slow for its clients; none: it is not held back.
    pub throttle: Option<Floor>,
    /// How long WAL may take to come into the repository behind the end of the copy.
    pub wal_deadline: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Name(#[from] Malformed),
    #[error("{} belongs to another user", .data_dir.display())]
    OtherUser { data_dir: PathBuf },
    #[error(transparent)]
    Server(#[from] NamedServerError),
    #[error(transparent)]
    Foreign(#[from] ForeignServerError),
    #[error(transparent)]
    Segments(#[from] SegmentError),
    #[error(transparent)]
    Take(#[from] TakeError),
}

impl CreateError {
    pub fn hint(&self) -> Option<String> {
        match self {
            CreateError::Repository(error) => error.hint(),
            CreateError::Catalog(error) => error.hint(),
            CreateError::OtherUser { .. } => Some(
                "run it as the owner, so that the server's own commands can use what is written: runuser -u postgres -- pgherd backup create …"
                    .to_owned(),
            ),
            CreateError::Server(error) => error.hint(),
            CreateError::Foreign(error) => error.hint(),
            CreateError::Take(error) => error.hint().map(str::to_owned),
            _ => None,
        }
    }
}

/// What there is to be said before a backup begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remark {
    /// Nothing archives, and nothing of this cluster is in the repository.
    NothingArchives { archive_mode: String },
    /// There is no session over which the server could be asked how it does, which is no reason to take no backup.
    NotProbed { cause: String },
}

impl std::fmt::Display for Remark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Remark::NothingArchives { archive_mode } => write!(
                f,
                "archive_mode is {archive_mode}, and no WAL of this server is in the repository: the backup fails in the end unless some comes"
            ),
            Remark::NotProbed { cause } => write!(
                f,
                "it is not seen whether the server answers its clients slowly, and the backup does not give way to that: {cause}"
            ),
        }
    }
}

/// Where files come from.
enum Files {
    Directory(Box<Source>),
    Stream(Box<streamed::Source>),
}

/// A server that was found and asked, and the repository that its backup goes to.
pub struct Prepared {
    source: Files,
    order: take::Order,
    repository: pgherd_backup::format::Repository,
    pub remarks: Vec<Remark>,
}

/// Finds the server and the parent; writes nothing.
pub async fn prepare(order: Order) -> Result<Prepared, CreateError> {
    match order.server.clone() {
        Server::Here(server) => prepare_here(order, server).await,
        Server::Sends { server, scratch_dir } => {
            let node: NodeName = order.node.parse()?;
            let repository = repository::open(&order.repository).await?;
            let Reached { replication, identified, shape, archive_mode } = server.reach().await?;
            let segments = Segments::new(identified.segment_bytes)?;
            let archive = Archive::new(&repository, identified.system, segments);
            let catalog = Catalog::read(repository.clone(), Place(identified.system)).await?;
            let found = Found { repository, archive, catalog, timeline: identified.timeline };
            let source = streamed::Source { replication, identified, shape, scratch_dir };
            found.prepared(&order, node, Files::Stream(Box::new(source)), Some(archive_mode)).await
        }
    }
}

async fn prepare_here(order: Order, server: NamedServer) -> Result<Prepared, CreateError> {
    let node: NodeName = order.node.parse()?;
    let data_dir = server.data_dir.clone();
    let located = server.locate()?;
    let segments = Segments::new(located.control.wal_segment_bytes)?;
    let owner = std::fs::metadata(&data_dir).map(|found| found.uid());
    if owner.is_ok_and(|owner| owner != rustix::process::geteuid().as_raw()) {
        return Err(CreateError::OtherUser { data_dir });
    }
    let repository = repository::open(&order.repository).await?;
    let named_server::Reached { session, survey } = located.reach().await?;
    let archive = Archive::new(&repository, survey.system_id, segments);
    let catalog = Catalog::read(repository.clone(), Place(survey.system_id)).await?;
    let archive_mode = archive_mode(&session).await;
    let found = Found { repository, archive, catalog, timeline: survey.timeline };
    let (mut probe, mut not_probed) = (None, None);
    if order.throttle.is_some() {
        match located.reach().await {
            Ok(reached) => probe = Some(reached.session),
            Err(error) => not_probed = Some(Remark::NotProbed { cause: on_one_line(&error) }),
        }
    }
    let source = Files::Directory(Box::new(Source { data_dir, session, primary: None, probe }));
    let mut prepared = found.prepared(&order, node, source, archive_mode).await?;
    prepared.remarks.extend(not_probed);
    Ok(prepared)
}

/// What there is of the server already.
struct Found {
    repository: pgherd_backup::format::Repository,
    archive: Archive,
    catalog: Catalog,
    timeline: Timeline,
}

impl Found {
    async fn prepared(
        self,
        order: &Order,
        node: NodeName,
        source: Files,
        archive_mode: Option<String>,
    ) -> Result<Prepared, CreateError> {
        let Found { repository, archive, catalog, timeline } = self;
        let parent = if order.full { None } else { parent(&catalog, &archive, timeline).await? };
        // Only a remark hangs on it.
        let remarks = match archive_mode.filter(|mode| mode == "off") {
            Some(archive_mode) => {
                let inventory = archive.inventory().await.map_err(CatalogError::from)?;
                let nothing = inventory.newest_timeline().is_none();
                nothing.then_some(Remark::NothingArchives { archive_mode }).into_iter().collect()
            }
            None => Vec::new(),
        };
        let order = take::Order {
            parent,
            find: order.find,
            node,
            // Outside of a herd there are none.
            term: Term(0),
            checkpoint: if order.checkpoint_fast { Checkpoint::Fast } else { Checkpoint::Spread },
            readers: order.readers,
            max_bytes_per_second: order.max_bytes_per_second,
            throttle: order.throttle,
            silence: SILENCE,
            settle_every: take::SETTLE_EVERY,
            refresh_bytes: refreshed(&catalog),
            wal_deadline: order.wal_deadline,
        };
        Ok(Prepared { source, order, repository, remarks })
    }
}

/// The newest one whose files the server's have come from: on its timeline, or on one that led there.
pub(super) async fn parent(
    catalog: &Catalog,
    archive: &Archive,
    timeline: Timeline,
) -> Result<Option<pgherd_backup::name::BackupId>, CatalogError> {
    let inventory = archive.inventory().await?;
    let leads = |range: &pgherd_backup::wal::BackupRange| {
        range.timeline == timeline
            || inventory.history(timeline).is_some_and(|history| history.passes(range.timeline, range.stop))
    };
    Ok(catalog.ranges().into_iter().rev().find(leads).map(|range| range.id))
}

/// A thirtieth of the newest backup: in a month of days all of it is written anew.
pub(super) fn refreshed(catalog: &Catalog) -> u64 {
    const BACKUPS: u64 = 30;
    catalog.manifests().next_back().map_or(0, |newest| newest.bytes / BACKUPS)
}

async fn archive_mode(session: &Session) -> Option<String> {
    let asked = session.query_one("SELECT pg_catalog.current_setting('archive_mode')", &[]);
    Some(tokio::time::timeout(ASKING, asked).await.ok()?.ok()?.get(0))
}

impl Prepared {
    /// The backup that this one refers to for what has not changed.
    pub fn parent(&self) -> Option<String> {
        self.order.parent.map(|parent| parent.to_string())
    }

    /// Whether another one goes on from it, should it not come to its end.
    pub fn can_be_gone_on_from(&self) -> bool {
        matches!(self.source, Files::Directory(_)) && self.order.compares_everything()
    }

    /// Takes it. Dropping the future ends it, and no backup is there.
    pub async fn run(self, progress: &watch::Sender<Progress>) -> Result<Created, CreateError> {
        let began = Instant::now();
        let Prepared { source, order, repository, .. } = self;
        let taken = match source {
            Files::Directory(source) => take::take(&repository, *source, &order, progress).await?,
            Files::Stream(source) => streamed::take(&repository, *source, &order, progress).await?,
        };
        let Taken { manifest, read_bytes, kept_bytes, refreshed_bytes, vanished, .. } = taken;
        let files = |pages: Vec<Damaged>| {
            pages.into_iter().map(|Damaged { path, pages }| DamagedFile { path, pages }).collect()
        };
        let id = manifest.id;
        let entry = Entry {
            outcome: Some(Outcome::Committed(Box::new(manifest))),
            state: State::Kept { next: 1 },
            kept: None,
        };
        Ok(Created {
            repository: repository.store().place().to_owned(),
            backup: report(id, &entry),
            read_bytes,
            kept_bytes,
            refreshed_bytes,
            vanished,
            damaged: files(taken.damaged),
            unexplained: files(taken.unexplained),
            seconds: began.elapsed().as_secs_f64(),
        })
    }
}
