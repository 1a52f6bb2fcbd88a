//! A restore as somebody asks for it: which backup leads to the target, where recovery will end, and what is done to the directory, in one
//! plan; then the deed.
//!
//! [`prepare`] joins [`recovery::plan`] with [`restore::plan`] and touches nothing; [`Prepared::run`] does it.
//! What is started in the directory afterwards fetches its WAL by `pgherd wal fetch` from the same repository, and ends where the plan says.
//!
//! Leaves out: starting PostgreSQL, and asking. Hazard: a directory that recovers to another moment than the one that was promised. So the
//! target that PostgreSQL is given is the plan's own, and its timeline a number.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Instant;

use jiff::Timestamp;
use pgherd_api::backup::{
    DroppedTable, RecoveryEnd, RestorePlan, Restored, SettingChange, SettingOutside, Standing,
    TablespacePlace, Transaction, Volume,
};
use pgherd_api::change::RestoreMoment;
use pgherd_backup::document::ReadError;
pub use pgherd_backup::drops::Wanted;
use pgherd_backup::drops::{self, Drop, DropError};
use pgherd_backup::format::Repository;
use pgherd_backup::manifest::Manifest;
use pgherd_backup::name::BackupId;
use pgherd_backup::recovery::{self, Commit, Line, Refusal, Sources, Target};
use pgherd_backup::wal::{BackupRange, Wal};
use pgherd_core::types::{Lsn, SystemId, Timeline};
use pgherd_postgres::restoring::{self, Action, Come, End, FollowTimeline, Over, Recovery};
use tokio::sync::watch;

use super::Progress;
use super::catalog::{Catalog, CatalogError, Which, time, version};
use super::restore::{self, RestoreError};
use super::tables::TableName;
use super::target::{TargetError, Until};

/// Which line of history is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// The one that leads to the latest timeline.
    Latest,
    /// The timeline of the backup itself.
    Current,
    /// The one that leads to this timeline.
    To(u32),
}

/// What PostgreSQL does when it has reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtTarget {
    Pause,
    Promote,
    Shutdown,
}

impl AtTarget {
    fn name(self) -> &'static str {
        match self {
            AtTarget::Pause => "pause",
            AtTarget::Promote => "promote",
            AtTarget::Shutdown => "shutdown",
        }
    }
}

/// What is to be restored, and where.
#[derive(Clone, Debug)]
pub struct Order {
    /// File that names the repository.
    pub repository: PathBuf,
    /// Needed where the repository has several clusters.
    pub system: Option<String>,
    pub until: Until,
    /// Instead of that: just before this table was dropped.
    pub before_drop: Option<Wanted>,
    /// Without what is at the target itself.
    pub exclusive: bool,
    pub along: Along,
    /// This one and no other.
    pub backup: Option<String>,
    pub to: PathBuf,
    pub wal_dir: Option<PathBuf>,
    /// By their numbers, those that are to lie elsewhere than they did.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// Where all others lie, by their numbers; where they did if there is none.
    pub tablespaces_in: Option<PathBuf>,
    pub delta: bool,
    pub at_target: AtTarget,
    /// That the restored server calls for its WAL.
    pub program: PathBuf,
}

impl Order {
    /// Everything that is there, for who restores into a place of its own: where to is not said.
    pub fn of_everything(repository: PathBuf, program: PathBuf) -> Order {
        Order {
            repository,
            system: None,
            until: Until::Latest,
            before_drop: None,
            exclusive: false,
            along: Along::Latest,
            backup: None,
            to: PathBuf::new(),
            wal_dir: None,
            tablespaces: BTreeMap::new(),
            tablespaces_in: None,
            delta: false,
            at_target: AtTarget::Promote,
            program,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Drop(#[from] DropError),
    #[error("no table {table} was dropped in the WAL that is there behind the backups")]
    NotDropped { table: String },
    #[error("the archive cannot be read")]
    Read(#[from] ReadError),
    #[error("there is no absolute path of {path}")]
    Path { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} has a name that PostgreSQL's configuration cannot have: it is not UTF-8, or has a line end in it"
    )]
    Name { path: PathBuf },
    #[error("PostgreSQL does not run as root, and what root restores nobody else can use")]
    Root,
    #[error("backup {backup} has tablespaces, and nobody says where they are to lie on each node")]
    Tablespaces { backup: String },
}

impl RecoverError {
    pub fn hint(&self) -> Option<String> {
        match self {
            RecoverError::Catalog(error) => error.hint(),
            RecoverError::Target(error) => error.hint(),
            RecoverError::Refused(refusal) => of_refusal(refusal).map(str::to_owned),
            RecoverError::Drop(DropError::Version { .. }) => {
                Some("--target-time and --target-xid name the moment".to_owned())
            }
            RecoverError::NotDropped { .. } => Some(
                "it is looked for by the name that it had in the backup, or was created with; --database and a schema in front of it say which; \
                 else --target-time names the moment"
                    .to_owned(),
            ),
            RecoverError::Drop(DropError::Walk(refusal)) => of_refusal(refusal).map(str::to_owned),
            RecoverError::Drop(DropError::Read(_)) => None,
            RecoverError::Restore(error) => error.hint(),
            RecoverError::Root => Some(
                "run it as the user who will run the server: runuser -u postgres -- pgherd restore …"
                    .to_owned(),
            ),
            RecoverError::Tablespaces { .. } => Some(
                "restore it into a directory, where --tablespace says it: pgherd restore --to DIR; or one table: --table".to_owned(),
            ),
            RecoverError::Read(_) | RecoverError::Path { .. } | RecoverError::Name { .. } => None,
        }
    }

    /// Whether somebody asked for what there is not, and nothing is wrong.
    pub fn is_refusal(&self) -> bool {
        match self {
            RecoverError::Refused(Refusal::Wal(_) | Refusal::Read(_)) => false,
            RecoverError::Refused(_)
            | RecoverError::Root
            | RecoverError::Tablespaces { .. }
            | RecoverError::NotDropped { .. }
            | RecoverError::Drop(DropError::Version { .. }) => true,
            RecoverError::Restore(error) => error.is_refusal(),
            _ => false,
        }
    }
}

pub(super) fn of_refusal(refusal: &Refusal) -> Option<&'static str> {
    match refusal {
        Refusal::NoBackup => Some("pgherd backup create takes one"),
        Refusal::NoSuchBackup { .. } => Some("pgherd backup list shows those that there are"),
        Refusal::NoTimeline { .. } | Refusal::NoBackupOnLine { .. } => Some(
            "pgherd wal list shows the timelines; --target-timeline names another one, --target-timeline current that of the backup",
        ),
        Refusal::BeforeWindow { .. } => Some(
            "choose a later moment; --target-immediate gives the backup as it was when it became consistent",
        ),
        Refusal::AfterEnd { .. } => Some(
            "without a target everything that is there is restored; WAL that came since may not be archived yet",
        ),
        Refusal::NotFound { .. } => {
            Some("it may be on another timeline: --target-timeline; or older than the backups that are left")
        }
        Refusal::Hole { .. } => Some(
            "a server that still has these segments in pg_wal can archive them: pgherd wal push; else choose a moment before the hole",
        ),
        Refusal::Wal(_) | Refusal::Read(_) => None,
    }
}

/// A restore that nothing speaks against.
#[derive(Debug)]
pub struct Prepared {
    repository: Repository,
    recovery: recovery::Plan,
    restore: restore::Plan,
    dropped: Option<Drop>,
}

/// Which backup leads to what was asked for, and where that is.
struct Chosen {
    file: PathBuf,
    catalog: Catalog,
    recovery: recovery::Plan,
    dropped: Option<Drop>,
}

async fn choose(order: &Order) -> Result<Chosen, RecoverError> {
    let which = order.backup.as_deref().map(str::parse::<Which>).transpose()?;
    let file = absolute(&order.repository)?;
    let catalog = Catalog::open(&file, order.system.as_deref()).await?;
    let only = which.map(|which| catalog.manifest(which).map(|manifest| manifest.id)).transpose()?;
    let dropped = match &order.before_drop {
        Some(_) if order.exclusive => return Err(TargetError::NotExclusive.into()),
        Some(wanted) => Some(dropped(&catalog, wanted, order.along, only).await?),
        None => None,
    };
    let target = match &dropped {
        Some(drop) => Target::Lsn { at: drop.lsn, inclusive: false },
        None => order.until.target(!order.exclusive)?,
    };
    let recovery = plan(&catalog, &target, order.along, only).await?;
    Ok(Chosen { file, catalog, recovery, dropped })
}

/// A moment to which a whole cluster goes back.
#[derive(Debug)]
pub struct Back {
    place: String,
    manifest: Manifest,
    recovery: recovery::Plan,
    dropped: Option<Drop>,
}

/// Finds out where the moment is that was asked for. Touches nothing.
pub async fn back(order: &Order) -> Result<Back, RecoverError> {
    let Chosen { catalog, recovery, dropped, .. } = choose(order).await?;
    let manifest = catalog.manifest(Which::Named(recovery.backup.id))?.clone();
    if manifest.facts.tablespace_map.bytes().is_none_or(|map| !map.is_empty()) {
        return Err(RecoverError::Tablespaces { backup: manifest.id.to_string() });
    }
    let place = catalog.repository.store().place().to_owned();
    Ok(Back { place, manifest, recovery, dropped })
}

impl Back {
    /// As a node is told.
    pub fn moment(&self) -> RestoreMoment {
        RestoreMoment {
            backup: self.manifest.id.to_string(),
            timeline: self.recovery.end.timeline.0,
            end_lsn: self.recovery.end.lsn.to_string(),
            along: self.recovery.timeline.0,
        }
    }

    /// How much WAL is behind it, as far as `written`. Behind an earlier restore that may lie before what was given up then.
    pub fn behind(&self, written: &str) -> Option<u64> {
        let written: Lsn = written.parse().ok()?;
        written.0.checked_sub(self.recovery.end.lsn.0)
    }

    /// As it is told, without a directory: each node has its own.
    pub fn report(&self) -> RestorePlan {
        let nowhere = restoring::Target { data_dir: PathBuf::new(), wal_dir: None, tablespaces: Vec::new() };
        About {
            repository: self.place.clone(),
            system: self.manifest.system_identifier,
            version: version(self.manifest.facts.postgresql_version),
            backup: self.manifest.id.to_string(),
            timeline: self.manifest.timeline,
            stop: self.manifest.stop,
            stopped: self.manifest.facts.stopped,
            target: &nowhere,
            standing: restoring::Standing::Empty,
            dropped: self.dropped.as_ref().map(dropped_table),
            files: self.manifest.files,
            bytes: self.manifest.bytes,
            volumes: &[],
            recovery: &Recovery {
                restore_command: String::new(),
                end: end(&self.recovery.target),
                timeline: FollowTimeline::Number(self.recovery.timeline),
                action: Action::Shutdown,
                come: Come::Member,
            },
            configuration: &restoring::Configuration::default(),
            remarks: Vec::new(),
        }
        .told(&self.recovery)
    }
}

/// Finds out what a restore would do, and where it would end. Touches nothing.
pub async fn prepare(order: &Order) -> Result<Prepared, RecoverError> {
    let Chosen { file, catalog, recovery, dropped } = choose(order).await?;
    let manifest = catalog.manifest(Which::Named(recovery.backup.id))?;
    let wish = restore::Wish {
        data_dir: absolute(&order.to)?,
        wal_dir: order.wal_dir.as_deref().map(absolute).transpose()?,
        tablespaces: order
            .tablespaces
            .iter()
            .map(|(oid, place)| Ok((*oid, absolute(place)?)))
            .collect::<Result<_, RecoverError>>()?,
        tablespaces_in: order.tablespaces_in.as_deref().map(absolute).transpose()?,
        over: if order.delta { Over::Delta } else { Over::Nothing },
        recovery: Recovery {
            restore_command: restore_command(&order.program, &file, Ahead::Some)?,
            end: end(&recovery.target),
            timeline: FollowTimeline::Number(recovery.timeline),
            action: match order.at_target {
                AtTarget::Pause => Action::Pause,
                AtTarget::Promote => Action::Promote,
                AtTarget::Shutdown => Action::Shutdown,
            },
            come: Come::Primary,
        },
    };
    let restore = restore::plan(&catalog.repository, manifest, wish).await?;
    Ok(Prepared { repository: catalog.repository, recovery, restore, dropped })
}

/// Where a table was dropped last: looked for behind the newest backup that leads along the line, and behind an older one where that
/// does not have it any more.
async fn dropped(
    catalog: &Catalog,
    wanted: &Wanted,
    along: Along,
    only: Option<BackupId>,
) -> Result<Drop, RecoverError> {
    let ranges = catalog.ranges();
    let Some(archive) = catalog.archive()? else { return Err(Refusal::NoBackup.into()) };
    let inventory = archive.inventory().await?;
    let line = match along {
        Along::Latest => Line::Latest,
        Along::To(timeline) => Line::To(Timeline(timeline)),
        Along::Current => Line::To(ranges.last().map_or(Timeline(1), |newest| newest.timeline)),
    };
    let sources = Sources { archive: &archive, inventory: &inventory, backups: &ranges };
    let history = recovery::followed(&inventory, &ranges, line)?;
    let leads = |manifest: &&Manifest| {
        history.passes(manifest.timeline, manifest.stop) && only.is_none_or(|id| id == manifest.id)
    };
    for manifest in catalog.manifests().rev().filter(leads) {
        if let Some(drop) = drops::find(&sources, &catalog.repository, manifest, history, wanted).await? {
            return Ok(drop);
        }
    }
    let name = TableName { schema: wanted.schema.clone(), name: wanted.name.clone() };
    Err(RecoverError::NotDropped { table: name.to_string() })
}

/// Which backup, and where it ends.
async fn plan(
    catalog: &Catalog,
    target: &Target,
    along: Along,
    only: Option<BackupId>,
) -> Result<recovery::Plan, RecoverError> {
    let ranges = catalog.ranges();
    let Some(archive) = catalog.archive()? else { return Err(Refusal::NoBackup.into()) };
    let inventory = archive.inventory().await?;
    let all = Sources { archive: &archive, inventory: &inventory, backups: &ranges };
    Ok(plan_along(&all, target, along, only).await?)
}

/// Which of these backups, and where it ends.
pub(super) async fn plan_along<A: Wal>(
    all: &Sources<'_, A>,
    target: &Target,
    along: Along,
    only: Option<BackupId>,
) -> Result<recovery::Plan, Refusal> {
    match along {
        Along::Latest => recovery::plan(all, target, Line::Latest, only).await,
        Along::To(timeline) => recovery::plan(all, target, Line::To(Timeline(timeline)), only).await,
        Along::Current => {
            // The newest timeline first, each with its own backups: what leads there is what was asked for.
            let named = |range: &&BackupRange| only.is_none_or(|id| id == range.id);
            let timelines: BTreeSet<Timeline> =
                all.backups.iter().filter(named).map(|range| range.timeline).collect();
            let mut first: Option<Refusal> = None;
            for timeline in timelines.into_iter().rev() {
                let own: Vec<BackupRange> =
                    all.backups.iter().filter(|range| range.timeline == timeline).copied().collect();
                let sources = Sources { archive: all.archive, inventory: all.inventory, backups: &own };
                match recovery::plan(&sources, target, Line::To(timeline), only).await {
                    Ok(plan) => return Ok(plan),
                    Err(refusal) => {
                        first.get_or_insert(refusal);
                    }
                }
            }
            Err(first.unwrap_or(Refusal::NoBackup))
        }
    }
}

/// What PostgreSQL is told, which is what was planned.
pub(super) fn end(target: &Target) -> End {
    match target {
        Target::Latest => End::Latest,
        Target::Immediate => End::Immediate,
        Target::Lsn { at, inclusive } => End::Lsn { at: *at, inclusive: *inclusive },
        Target::Time { at, inclusive } => {
            End::Time { at: at.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string(), inclusive: *inclusive }
        }
        Target::Xid { xid, inclusive } => End::Xid { xid: u64::from(*xid), inclusive: *inclusive },
        Target::Name(name) => End::Name(name.clone()),
    }
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf, RecoverError> {
    std::path::absolute(path).map_err(|source| RecoverError::Path { path: path.to_owned(), source })
}

/// Whether segments are fetched before they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    Some,
    Nothing,
}

/// A shell runs it, after PostgreSQL has put in `%f` and `%p`.
pub(crate) fn restore_command(
    program: &Path,
    repository: &Path,
    ahead: Ahead,
) -> Result<String, RecoverError> {
    let alone = if ahead == Ahead::Nothing { " --no-ahead" } else { "" };
    Ok(format!("{} wal fetch{alone} --repository {} %f %p", quoted(program)?, quoted(repository)?))
}

/// A word for a shell, in a command in which PostgreSQL puts in `%f` and `%p`.
pub(super) fn quoted(path: &Path) -> Result<String, RecoverError> {
    let text = path.to_str().filter(|text| !text.contains(['\n', '\r', '\0']));
    let text = text.ok_or_else(|| RecoverError::Name { path: path.to_owned() })?;
    Ok(format!("'{}'", text.replace('\'', "'\\''").replace('%', "%%")))
}

impl Prepared {
    /// Of the backup.
    pub fn manifest(&self) -> &Manifest {
        &self.restore.manifest
    }

    /// From where recovery reads WAL, and where it will end.
    pub fn wal(&self) -> (Lsn, Lsn) {
        (self.recovery.wal_from, self.recovery.end.lsn)
    }

    /// What comes onto which file system.
    pub fn volumes(&self) -> &[restore::Volume] {
        &self.restore.volumes
    }

    /// Whether files of a server are written over, and what does not belong is deleted.
    pub fn overwrites(&self) -> bool {
        self.restore.standing == restoring::Standing::DataDirectory
    }

    /// Refuses what would fail for sure.
    pub fn check(&self) -> Result<(), RecoverError> {
        if rustix::process::geteuid().is_root() {
            return Err(RecoverError::Root);
        }
        Ok(self.restore.check()?)
    }

    /// As it is told.
    pub fn report(&self) -> RestorePlan {
        let (recovery, restore) = (&self.recovery, &self.restore);
        let manifest = &restore.manifest;
        About {
            repository: self.repository.store().place().to_owned(),
            system: manifest.system_identifier,
            version: version(manifest.facts.postgresql_version),
            backup: manifest.id.to_string(),
            timeline: manifest.timeline,
            stop: manifest.stop,
            stopped: manifest.facts.stopped,
            target: &restore.target,
            standing: restore.standing,
            dropped: self.dropped.as_ref().map(dropped_table),
            files: restore.files,
            bytes: restore.bytes,
            volumes: &restore.volumes,
            recovery: &restore.recovery,
            configuration: &restore.configuration,
            remarks: Vec::new(),
        }
        .told(recovery)
    }

    /// Does it. Dropping the future ends it; the directory does not start then, and a delta goes on with it.
    pub async fn run(
        self,
        readers: usize,
        max_bytes_per_second: Option<NonZeroU64>,
        progress: &watch::Sender<Progress>,
    ) -> Result<Restored, RecoverError> {
        self.check()?;
        let began = Instant::now();
        let Prepared { repository, restore, .. } = self;
        let report = restore::restore(&repository, restore, readers, max_bytes_per_second, progress).await?;
        Ok(Restored {
            files: report.files,
            bytes: report.bytes,
            fetched_bytes: report.fetched_bytes,
            deleted: report.restored.deleted,
            seconds: began.elapsed().as_secs_f64(),
        })
    }
}

fn dropped_table(drop: &Drop) -> DroppedTable {
    let name = TableName { schema: Some(drop.schema.clone()), name: drop.name.clone() };
    DroppedTable {
        table: name.to_string(),
        database: drop.database.clone(),
        oid: drop.oid,
        with_database: drop.with_database,
        xid: drop.xid,
        at: time(drop.at),
        lsn: drop.lsn.to_string(),
    }
}

/// Everything that is told of a restore besides where its recovery ends.
pub(super) struct About<'a> {
    pub(super) repository: String,
    pub(super) system: SystemId,
    pub(super) version: String,
    pub(super) backup: String,
    pub(super) timeline: Timeline,
    pub(super) stop: Lsn,
    pub(super) stopped: Timestamp,
    pub(super) target: &'a restoring::Target,
    pub(super) standing: restoring::Standing,
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) volumes: &'a [restore::Volume],
    pub(super) recovery: &'a Recovery,
    pub(super) configuration: &'a restoring::Configuration,
    pub(super) dropped: Option<DroppedTable>,
    pub(super) remarks: Vec<String>,
}

impl About<'_> {
    pub(super) fn told(self, recovery: &recovery::Plan) -> RestorePlan {
        let path = |path: &Path| path.display().to_string();
        let begins = recovery.forks.iter().map(|fork| fork.timeline).chain([recovery.timeline]);
        let of_backup =
            |timeline: &Timeline| *timeline >= self.timeline && *timeline <= recovery.end.timeline;
        RestorePlan {
            repository: self.repository,
            system_identifier: self.system.to_string(),
            postgresql_version: self.version,
            data_dir: path(&self.target.data_dir),
            standing: match self.standing {
                restoring::Standing::Empty => Standing::Empty,
                restoring::Standing::Interrupted => Standing::Interrupted,
                restoring::Standing::DataDirectory => Standing::DataDirectory,
            },
            backup: self.backup,
            backup_ended: time(self.stopped),
            backup_end_lsn: self.stop.to_string(),
            target: recovery.target.to_string(),
            dropped: self.dropped,
            timeline: recovery.timeline.0,
            timelines: begins.filter(of_backup).map(|timeline| timeline.0).collect(),
            wal_from: recovery.wal_from.to_string(),
            wal_segments: recovery.wal_segments,
            end: RecoveryEnd {
                lsn: recovery.end.lsn.to_string(),
                timeline: recovery.end.timeline.0,
                last: recovery.end.last.map(transaction),
                next: recovery.end.next.map(transaction),
            },
            files: self.files,
            bytes: self.bytes,
            volumes: self.volumes.iter().map(volume).collect(),
            wal_dir: self.target.wal_dir.as_deref().map(path),
            tablespaces: self
                .target
                .tablespaces
                .iter()
                .map(|space| TablespacePlace {
                    oid: space.oid,
                    was: path(&space.was),
                    place: path(&space.place),
                })
                .collect(),
            restore_command: self.recovery.restore_command.clone(),
            target_action: (self.recovery.end != End::Latest).then(|| {
                let action = match self.recovery.action {
                    Action::Pause => AtTarget::Pause,
                    Action::Promote => AtTarget::Promote,
                    Action::Shutdown => AtTarget::Shutdown,
                };
                action.name().to_owned()
            }),
            settings: self.configuration.changes.iter().map(change).collect(),
            outside: self
                .configuration
                .outside
                .iter()
                .map(|(file, name, value)| SettingOutside {
                    file: file.clone(),
                    name: name.clone(),
                    value: value.clone(),
                })
                .collect(),
            remarks: self.remarks,
        }
    }
}

fn transaction(commit: Commit) -> Transaction {
    Transaction { xid: commit.xid, at: time(commit.at), lsn: commit.lsn.to_string() }
}

fn volume(volume: &restore::Volume) -> Volume {
    Volume {
        places: volume.places.iter().map(|place| place.display().to_string()).collect(),
        needed_bytes: volume.needed_bytes,
        free_bytes: volume.free_bytes,
    }
}

fn change(change: &restoring::Change) -> SettingChange {
    let restoring::Change { file, name, was, now } = change.clone();
    SettingChange { file, name, was, now }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_quoted_for_a_shell_and_for_postgresql() {
        let command =
            restore_command(Path::new("/opt/it's/pgherd"), Path::new("/etc/100%.toml"), Ahead::Some);
        let expected = r"'/opt/it'\''s/pgherd' wal fetch --repository '/etc/100%%.toml' %f %p";
        assert_eq!(command.ok().as_deref(), Some(expected));
        assert!(restore_command(Path::new("/a\nb"), Path::new("/c"), Ahead::Nothing).is_err());
    }
}
