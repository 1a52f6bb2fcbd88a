//! `pgherd restore`: a backup and the WAL behind it into a directory, up to a moment, or tables of that moment into a server that works.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::foreign;
use pgherd_agent::backups::recover::{self, Along, AtTarget, Order, RecoverError, Wanted};
use pgherd_agent::backups::tables::TableName;
use pgherd_agent::backups::target::Until;
use pgherd_api::backup::{Restore, RestorePlan, Restored, Standing, Transaction};
use tokio::sync::watch;

use super::kept::{KeptArgs, of_foreign};
use crate::args::Global;
use crate::failure::Failure;
use crate::output::confirm::confirm;
use crate::output::numbers::{bytes, counted, listed, span};
use crate::output::{note, print, print_json, progress};

mod cluster;
pub(super) mod scratch;
mod tables;

/// Restore a backup into a directory, up to a moment
///
/// Says first which backup it takes, which WAL recovery will read, the last transaction that will be there and the first one that will
/// not, what comes onto which disk, and which settings are taken out; --dry-run ends there. The directory is a data directory that
/// recovers when PostgreSQL is started in it: it fetches its WAL by itself. Whatever the plan cannot promise is refused before
/// anything is touched, and no other target is taken instead. What lets a copy archive into, or stream from, the original is taken out of its
/// configuration.
///
/// With --table, tables of that moment are brought into a server that works: all is restored into a scratch server beside it, which nobody
/// else hears of and which is removed afterwards, and the tables come over in one transaction. Nothing that is there is written over: they come
/// into the schema "restored", or where --into-schema, --as or --in-place say.
///
/// With --cluster, the whole cluster goes back, with all its nodes. One node is taken there first and held, which the others and their clients do not
/// notice; then, after another question, it leads, and the others follow it. What came behind the moment is given up, and stays in the
/// repository.
///
/// With --from-pgbackrest or --from-barman the backup is one that pgBackRest or Barman has taken, and WAL comes from their archive. Nothing is
/// written there. What of their formats is not read is refused by name.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// File that says where the repository is and what opens it [default: that of the herd on this host]
    #[arg(long, value_name = "FILE")]
    repository: Option<PathBuf>,
    #[command(flatten)]
    kept: KeptArgs,
    /// Directory that becomes the data directory; nothing may be in it, or see --delta. With --cluster the node that is taken back first
    #[arg(long, value_name = "DIR|NODE", required_unless_present_any = ["table", "cluster"], conflicts_with = "table")]
    to: Option<PathBuf>,
    /// System identifier of the cluster, where the repository has several
    #[arg(long, value_name = "ID")]
    cluster_system: Option<String>,
    #[command(flatten)]
    target: TargetArgs,
    /// Without what is at the target itself: the transaction, the record, all that ended at that time
    #[arg(long)]
    exclusive: bool,
    /// Line of history to follow: latest, current (that of the backup) or the number of a timeline
    #[arg(long, value_name = "TIMELINE", default_value = "latest", value_parser = along)]
    target_timeline: Along,
    /// What PostgreSQL does at the target, pause if nothing is said; without a target it becomes a primary
    #[arg(long, value_name = "ACTION", value_enum, conflicts_with = "table")]
    target_action: Option<Action>,
    /// This backup and no other: a name such as 20261120T205454, as its program calls it, or first or last [default: the newest that leads there]
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Restore over a stopped server's data directory, or what an interrupted restore left: only what differs is fetched, and what does not
    /// belong is deleted
    #[arg(long, conflicts_with = "table")]
    delta: bool,
    /// Place of a tablespace, by its OID [default: where it was]
    #[arg(long, value_name = "OID=DIR", value_parser = tablespace, conflicts_with = "table")]
    tablespace: Vec<(u32, PathBuf)>,
    /// Directory of WAL, to which pg_wal becomes a link
    #[arg(long, value_name = "DIR", conflicts_with = "table")]
    wal_dir: Option<PathBuf>,
    /// Files that are written beside each other
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Limit of all of them together, in MiB a second
    #[arg(long, value_name = "MIB")]
    max_rate: Option<NonZeroU64>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask before files are overwritten, or tables brought in
    #[arg(long)]
    yes: bool,
    // Last: options that follow a group would be shown under its heading.
    #[command(flatten)]
    whole: cluster::ClusterArgs,
    #[command(flatten)]
    tables: tables::TablesArgs,
}

/// Where recovery ends; at the end of the WAL where none is given.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(super) struct TargetArgs {
    /// Up to a time with its zone: "2026-11-20 20:54:54+01", "2026-11-20T19:54:54Z", "2026-11-20 20:54:54 Europe/Berlin"
    #[arg(long, value_name = "TIME")]
    target_time: Option<String>,
    /// Up to a position in WAL, such as 0/3000060
    #[arg(long, value_name = "LSN")]
    target_lsn: Option<String>,
    /// Up to the end of a transaction
    #[arg(long, value_name = "XID")]
    target_xid: Option<String>,
    /// Up to a restore point, as pg_create_restore_point() makes them
    #[arg(long, value_name = "NAME")]
    target_name: Option<String>,
    /// Only until the backup is consistent
    #[arg(long)]
    target_immediate: bool,
    /// Just before this table was dropped, the last time if it was several times; the WAL is looked through for it. From PostgreSQL 15 on
    #[arg(long, value_name = "[SCHEMA.]TABLE")]
    before_drop: Option<TableName>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Action {
    /// Answers reads and waits for pg_wal_replay_resume(), which ends recovery
    Pause,
    /// Becomes a primary on a timeline of its own
    Promote,
    /// Stops
    Shutdown,
}

pub(super) fn along(text: &str) -> Result<Along, String> {
    match text {
        "latest" => Ok(Along::Latest),
        "current" => Ok(Along::Current),
        number => match number.parse() {
            Ok(number) if number > 0 => Ok(Along::To(number)),
            _ => Err("it is latest, current or the number of a timeline".to_owned()),
        },
    }
}

fn tablespace(text: &str) -> Result<(u32, PathBuf), String> {
    let parsed = text.split_once('=').and_then(|(oid, place)| {
        let oid = oid.parse().ok()?;
        (!place.is_empty()).then(|| (oid, PathBuf::from(place)))
    });
    parsed.ok_or_else(|| "it is a tablespace's OID, = and a directory: 16385=/var/lib/space".to_owned())
}

impl TargetArgs {
    /// The table before whose drop recovery ends.
    pub(super) fn drop_of(&self, database: Option<&str>) -> Option<Wanted> {
        let TableName { schema, name } = self.before_drop.clone()?;
        Some(Wanted { database: database.map(str::to_owned), schema, name })
    }

    pub(super) fn until(self) -> Until {
        let TargetArgs { target_time, target_lsn, target_xid, target_name, target_immediate, .. } = self;
        let named = [
            target_time.map(Until::Time),
            target_lsn.map(Until::Lsn),
            target_xid.map(Until::Xid),
            target_name.map(Until::Name),
            target_immediate.then_some(Until::Immediate),
        ];
        named.into_iter().flatten().next().unwrap_or(Until::Latest)
    }
}

pub(crate) async fn run(args: RestoreArgs, global: &Global) -> Result<(), Failure> {
    if args.tables.database.is_some() && !args.tables.is_wanted() && args.target.before_drop.is_none() {
        return Err(Failure::usage("--database means nothing without --table or --before-drop"));
    }
    if global.url.is_some() && args.whole.cluster.is_none() {
        return Err(Failure::usage("--url means nothing without --cluster"));
    }
    let before_drop = args.target.drop_of(args.tables.database.as_deref());
    let until = args.target.until();
    if until == Until::Latest && before_drop.is_none() && args.target_action.is_some() {
        return Err(Failure::usage("--target-action means nothing without a target")
            .because("at the end of the WAL PostgreSQL always ends recovery and is a primary")
            .hint("name a target, or leave it out"));
    }
    let mut tablespaces = BTreeMap::new();
    for (oid, place) in args.tablespace {
        if tablespaces.insert(oid, place).is_some() {
            return Err(Failure::usage(format!("--tablespace names two places of tablespace {oid}")));
        }
    }
    let source = args.kept.source();
    let own_only = args.tables.is_wanted() || before_drop.is_some() || args.whole.cluster.is_some();
    if source.is_some() && own_only {
        return Err(Failure::usage("--cluster, --table and --before-drop read a repository of pgherd")
            .hint("restore all of it with --to, and copy the table from there with pg_dump"));
    }
    if args.whole.is_only_a_word() {
        return cluster::say(args.whole, args.yes, global).await;
    }
    let repository = match &source {
        None => super::repository_file(global, args.repository)?,
        // Nothing but another program's place is looked at.
        Some(_) => PathBuf::new(),
    };
    let order = Order {
        repository,
        system: args.cluster_system,
        until,
        before_drop,
        exclusive: args.exclusive,
        along: args.target_timeline,
        backup: args.backup,
        // Of tables there is no such place.
        to: args.to.unwrap_or_default(),
        wal_dir: args.wal_dir,
        tablespaces,
        tablespaces_in: None,
        delta: args.delta,
        at_target: match args.target_action {
            Some(Action::Promote) => AtTarget::Promote,
            Some(Action::Shutdown) => AtTarget::Shutdown,
            Some(Action::Pause) | None => AtTarget::Pause,
        },
        program: program()?,
    };
    if args.whole.cluster.is_some() {
        return cluster::run(args.whole, order, args.dry_run, args.yes, global).await;
    }
    let rate = args.max_rate.map(|rate| rate.saturating_mul(super::backup::MIB));
    if args.tables.is_wanted() {
        let way = tables::Way { readers: args.jobs.into(), rate, dry_run: args.dry_run, yes: args.yes };
        return tables::run(args.tables, order, way, global).await;
    }
    let ready = match &source {
        None => Ready::Own(Box::new(recover::prepare(&order).await.map_err(failed)?)),
        Some(source) => Ready::Foreign(Box::new(foreign::prepare(source, &order).await.map_err(of_foreign)?)),
    };
    let plan = ready.report();
    if !global.json {
        print(&told(&plan))?;
    }
    if args.dry_run {
        if global.json {
            print_json(&Restore { plan, restored: None })?;
        }
        // What would be refused then is refused now, but for who asks.
        return ready.check_for(Asker::Anybody);
    }
    ready.check_for(Asker::ThisUser)?;
    if ready.overwrites() {
        let what = format!(
            "{} is a data directory. It becomes that of backup {}: what differs is overwritten, and what does not belong is deleted.",
            plan.data_dir, plan.backup
        );
        confirm(&what, "Restore over it?", args.yes)?;
    }
    let sender = watch::Sender::new(Progress::default());
    let seen = sender.subscribe();
    let work = ready.run(args.jobs.into(), rate, &sender);
    let restored = match progress::shown("restoring", "flushing", seen, work).await {
        Ok(Ok(restored)) => restored,
        Ok(Err(failure)) => {
            let begun = PathBuf::from(&plan.data_dir).join("pgherd.restoring").exists();
            let hint = "the directory does not start as it is; the same command with --delta goes on with it";
            return Err(if begun { failure.hint(hint) } else { failure });
        }
        Err(interrupted) => {
            note(&format!(
                "interrupted: {} does not start as it is; the same command with --delta goes on with it",
                plan.data_dir
            ));
            return Err(interrupted);
        }
    };
    if global.json {
        return print_json(&Restore { plan, restored: Some(restored) });
    }
    note(&done(&plan, &restored));
    Ok(())
}

/// That a restored server calls.
pub(super) fn program() -> Result<PathBuf, Failure> {
    std::env::current_exe()
        .map_err(|error| Failure::failed("it is not known where this program is").because(error))
}

/// What was planned, of a repository of ours or of another program's.
enum Ready {
    Own(Box<recover::Prepared>),
    Foreign(Box<foreign::Prepared>),
}

/// Whether root, as whom nothing is restored, only wants to know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asker {
    Anybody,
    ThisUser,
}

impl Ready {
    fn report(&self) -> RestorePlan {
        match self {
            Ready::Own(prepared) => prepared.report(),
            Ready::Foreign(prepared) => prepared.report(),
        }
    }

    fn overwrites(&self) -> bool {
        match self {
            Ready::Own(prepared) => prepared.overwrites(),
            Ready::Foreign(prepared) => prepared.overwrites(),
        }
    }

    fn check_for(&self, asker: Asker) -> Result<(), Failure> {
        let anybody = asker == Asker::Anybody;
        match self {
            Ready::Own(prepared) => match prepared.check() {
                Err(RecoverError::Root) if anybody => Ok(()),
                checked => checked.map_err(failed),
            },
            Ready::Foreign(prepared) => match prepared.check() {
                Err(error) if anybody && error.is_root() => Ok(()),
                checked => checked.map_err(of_foreign),
            },
        }
    }

    async fn run(
        self,
        readers: usize,
        rate: Option<NonZeroU64>,
        progress: &watch::Sender<Progress>,
    ) -> Result<Restored, Failure> {
        match self {
            Ready::Own(prepared) => prepared.run(readers, rate, progress).await.map_err(failed),
            Ready::Foreign(prepared) => prepared.run(readers, rate, progress).await.map_err(of_foreign),
        }
    }
}

/// The plan for people.
fn told(plan: &RestorePlan) -> String {
    let mut lines = recovery_lines(plan);
    let standing = match plan.standing {
        Standing::Empty => "nothing is there",
        Standing::Interrupted => "an earlier restore did not come to its end there",
        Standing::DataDirectory => "over the data directory that is there",
    };
    lines.push(("to", format!("{} ({standing})", plan.data_dir)));
    if let Some(dir) = &plan.wal_dir {
        lines.push(("", format!("WAL in {dir}")));
    }
    for space in &plan.tablespaces {
        let was = if space.place == space.was { String::new() } else { format!(", it was in {}", space.was) };
        lines.push(("", format!("tablespace {} in {}{was}", space.oid, space.place)));
    }
    lines.extend(size_lines(plan));
    for (at, setting) in plan.settings.iter().enumerate() {
        let heading = if at == 0 { "settings" } else { "" };
        let text = match (&setting.was, &setting.now) {
            (_, None) => format!("{} is taken out of {}", setting.name, setting.file),
            (None, Some(now)) => format!("{} = {now}", setting.name),
            (Some(was), Some(now)) => format!("{} = {now}, it was {was}", setting.name),
        };
        lines.push((heading, text));
    }
    for (at, setting) in plan.outside.iter().enumerate() {
        let heading = if at == 0 { "stays, look at it" } else { "" };
        lines.push((heading, format!("{} = {} in {}", setting.name, setting.value, setting.file)));
    }
    for (at, remark) in plan.remarks.iter().enumerate() {
        lines.push((if at == 0 { "note" } else { "" }, remark.clone()));
    }
    aligned(&lines)
}

/// What comes onto which disk.
fn size_lines(plan: &RestorePlan) -> Vec<(&'static str, String)> {
    let mut lines =
        vec![("size", format!("{}, {}", counted(plan.files as usize, "file", "files"), bytes(plan.bytes)))];
    for volume in &plan.volumes {
        lines.push((
            "",
            format!(
                "{} come to {}, where {} are free",
                bytes(volume.needed_bytes),
                listed(&volume.places, "and"),
                bytes(volume.free_bytes)
            ),
        ));
    }
    lines
}

fn aligned(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(heading, _)| heading.len()).max().unwrap_or(0);
    lines.iter().map(|(heading, text)| format!("{heading:width$}  {text}\n")).collect()
}

/// Which backup, which WAL, and where it ends.
fn recovery_lines(plan: &RestorePlan) -> Vec<(&'static str, String)> {
    let mut lines: Vec<(&str, String)> = vec![
        (
            "backup",
            format!(
                "{} of cluster {}, PostgreSQL {}, in {}",
                plan.backup, plan.system_identifier, plan.postgresql_version, plan.repository
            ),
        ),
        ("", format!("consistent from {} on, reached at {}", plan.backup_end_lsn, plan.backup_ended)),
        ("target", plan.target.clone()),
    ];
    if let Some(dropped) = &plan.dropped {
        let how = if dropped.with_database { "went with its database" } else { "was dropped" };
        lines.push((
            "",
            format!(
                "before {} of database {} (OID {}) {how}, by transaction {}, committed at {}",
                dropped.table, dropped.database, dropped.oid, dropped.xid, dropped.at
            ),
        ));
    }
    let timelines: Vec<String> = plan.timelines.iter().map(ToString::to_string).collect();
    lines.push((
        "WAL",
        format!(
            "{} from {} on, over timeline {}",
            counted(plan.wal_segments as usize, "segment", "segments"),
            plan.wal_from,
            listed(&timelines, "and")
        ),
    ));
    let transaction = |transaction: &Transaction| {
        format!(
            "transaction {}, committed at {}, its record at {}",
            transaction.xid, transaction.at, transaction.lsn
        )
    };
    lines.push(("end", format!("{} on timeline {}", plan.end.lsn, plan.end.timeline)));
    lines.push((
        "the last there",
        plan.end.last.as_ref().map_or_else(
            || "what the backup has: no transaction was committed between its start and there".to_owned(),
            transaction,
        ),
    ));
    lines.push((
        "the first not there",
        plan.end
            .next
            .as_ref()
            .map_or_else(|| "none: no later transaction is in the repository".to_owned(), transaction),
    ));
    lines
}

fn done(plan: &RestorePlan, restored: &Restored) -> String {
    let deleted = match restored.deleted {
        0 => String::new(),
        deleted => format!(", deleted {deleted} that did not belong"),
    };
    let then = match plan.target_action.as_deref() {
        None | Some("promote") => "is a primary then".to_owned(),
        Some("shutdown") => "stops there".to_owned(),
        Some(_) => "waits there: SELECT pg_wal_replay_resume() makes it a primary".to_owned(),
    };
    format!(
        "restored {} in {}, fetched {}{deleted}\nstart PostgreSQL {} in {}: it recovers up to {} and {then}",
        bytes(restored.bytes),
        span((restored.seconds * 1000.0) as u64),
        bytes(restored.fetched_bytes),
        plan.postgresql_version.split('.').next().unwrap_or_default(),
        plan.data_dir,
        plan.end.lsn
    )
}

pub(super) fn failed(error: RecoverError) -> Failure {
    if let RecoverError::Catalog(error) = error {
        return super::backup::of_catalog(error);
    }
    let hint = error.hint();
    let failure = match &error {
        RecoverError::Target(_) => Failure::usage(error.to_string()),
        error if error.is_refusal() => Failure::refused(error.to_string()),
        error => crate::failure::with_sources(error),
    };
    hint.into_iter().fold(failure, Failure::hint)
}
