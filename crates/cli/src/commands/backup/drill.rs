//! `pgherd backup drill`: a backup is restored, looked at and thrown away.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::Args;
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::drill::{self, Query, Wanted};
use pgherd_agent::backups::recover::{Along, Order};
use pgherd_agent::backups::scratch::{self, RESERVE_BYTES};
use pgherd_agent::backups::target::Until;
use pgherd_api::backup::{Drill, DrillOutcome};
use tokio::sync::watch;

use crate::args::Global;
use crate::commands::restore::scratch::{ScratchArgs, failed, tidy};
use crate::commands::restore::{TargetArgs, along, program};
use crate::failure::Failure;
use crate::output::numbers::{bytes, counted, span};
use crate::output::{note, print, print_json, progress};

/// Restore a backup into a scratch server, check everything there, and throw it away
///
/// Shows that what is in the repository can be restored, and how long that takes. The newest backup and all WAL behind it, or what the options
/// say: recovery has to end where the plan says, each query has to return something that is neither false nor null, amcheck compares each B-tree with its
/// table, and pg_checksums reads each page. The server listens nowhere, archives nothing, runs at the lowest priority, and is removed in the end. Exits
/// with 0 if everything passed, and 1 otherwise.
#[derive(Debug, Args)]
pub(super) struct DrillArgs {
    /// File that says where the repository is and what opens it [default: that of the herd on this host]
    #[arg(long, value_name = "FILE")]
    repository: Option<PathBuf>,
    /// System identifier of the cluster, where the repository has several
    #[arg(long, value_name = "ID")]
    cluster_system: Option<String>,
    #[command(flatten)]
    target: TargetArgs,
    /// At any moment of the recovery window, another one each time
    #[arg(
        long,
        conflicts_with_all = ["target_time", "target_lsn", "target_xid", "target_name", "target_immediate", "before_drop", "backup"]
    )]
    random: bool,
    /// Line of history to follow: latest, current (that of the backup) or the number of a timeline
    #[arg(long, value_name = "TIMELINE", default_value = "latest", value_parser = along)]
    target_timeline: Along,
    /// This backup and no other: a name such as 20261120T205454, first or last [default: the newest that leads there]
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Question to ask in the end, with the database that it is asked in; may be given several times
    #[arg(long, value_name = "DATABASE=SQL")]
    query: Vec<Query>,
    /// Without comparing indexes with their tables
    #[arg(long)]
    no_amcheck: bool,
    /// Files that are written beside each other
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Limit of all of them together, in MiB a second
    #[arg(long, value_name = "MIB")]
    max_rate: Option<NonZeroU64>,
    #[command(flatten)]
    scratch: ScratchArgs,
}

pub(super) async fn run(args: DrillArgs, global: &Global) -> Result<(), Failure> {
    let repository = crate::commands::repository_file(global, args.repository)?;
    let before_drop = args.target.drop_of(None);
    let until = match args.random {
        true => Until::Time(
            drill::random_moment(&repository, args.cluster_system.as_deref())
                .await
                .map_err(super::of_catalog)?
                .ok_or_else(|| Failure::refused("there is no recovery window to choose a moment from"))?,
        ),
        false => args.target.until(),
    };
    let recovery = Order {
        system: args.cluster_system,
        until,
        before_drop,
        along: args.target_timeline,
        backup: args.backup,
        ..Order::of_everything(repository, program()?)
    };
    let ready = scratch::prepare(args.scratch.order(recovery, true, true)?).await.map_err(failed)?;
    ready.check(RESERVE_BYTES).map_err(failed)?;
    tidy(ready.dir()).await;
    let wanted = Wanted { queries: args.query, without_amcheck: args.no_amcheck };
    let sender = watch::Sender::new(Progress::default());
    let seen = sender.subscribe();
    let rate = args.max_rate.map(|rate| rate.saturating_mul(super::MIB));
    let work = drill::run(ready, &wanted, args.jobs.into(), rate, &sender);
    let drill = match progress::shown("restoring", "flushing", seen, work).await {
        Ok(drill) => drill,
        Err(interrupted) => {
            note("interrupted: the scratch server is removed, and nothing is known");
            return Err(interrupted);
        }
    };
    match global.json {
        true => print_json(&drill)?,
        false => print(&told(&drill))?,
    }
    if drill.passed { Ok(()) } else { Err(Failure::Silent(1)) }
}

fn told(drill: &Drill) -> String {
    let spent = |seconds: f64| span((seconds * 1000.0) as u64);
    let mut lines = vec![
        (
            "backup".to_owned(),
            format!("{}, PostgreSQL {}, in {}", drill.backup, drill.postgresql_version, drill.repository),
        ),
        ("target".to_owned(), drill.target.clone()),
    ];
    if let Some(seconds) = drill.restore_seconds {
        let files = counted(drill.files as usize, "file", "files");
        lines.push(("restore".to_owned(), format!("{files}, {} in {}", bytes(drill.bytes), spent(seconds))));
    }
    if let Some(recovery) = &drill.recovery {
        lines.push((
            "recovery".to_owned(),
            format!("{} of WAL in {}", bytes(recovery.wal_bytes), spent(recovery.seconds)),
        ));
    }
    for check in &drill.checks {
        let outcome = match check.outcome {
            DrillOutcome::Passed => "ok",
            DrillOutcome::Failed => "FAILED",
            DrillOutcome::Skipped => "skipped",
        };
        let mut told = check.told.iter();
        let first = told.next().map_or("", String::as_str);
        lines.push((format!("{} {outcome}", check.name), first.to_owned()));
        lines.extend(told.map(|more| (String::new(), more.clone())));
    }
    let verdict = if drill.passed { "it can be restored" } else { "IT CANNOT BE RELIED UPON" };
    lines.push(("verdict".to_owned(), format!("{verdict}; {} in all", spent(drill.seconds))));
    let width = lines.iter().map(|(heading, _)| heading.len()).max().unwrap_or(0);
    lines.iter().map(|(heading, text)| format!("{heading:width$}  {text}\n")).collect()
}
