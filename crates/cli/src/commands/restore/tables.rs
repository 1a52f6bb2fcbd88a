//! `pgherd restore --table`: tables of an earlier moment into a server that works.

use std::num::NonZeroU64;

use clap::Args;
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::recover;
use pgherd_agent::backups::scratch::{self, RESERVE_BYTES, Ready};
use pgherd_agent::backups::tables::{
    self, Interrupted, Live, Placing, SCHEMA, TableName, TablesError, Target, Wanted, identifier,
};
use pgherd_api::backup::{Brought, BroughtTable, PlannedTable, TablePlan, TableRestore, TableTarget};
use tokio::sync::watch;

use super::scratch::ScratchArgs;
use crate::args::Global;
use crate::commands::psql;
use crate::failure::Failure;
use crate::output::confirm::confirm;
use crate::output::numbers::{bytes, counted, listed, span};
use crate::output::{note, print, print_json, progress};

/// Which tables, and where they come.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options for tables")]
pub(super) struct TablesArgs {
    /// Bring this table back into a server that works, and restore nothing else; may be given several times
    #[arg(long, value_name = "[SCHEMA.]TABLE")]
    table: Vec<TableName>,
    /// Database that the tables were in [default: that of --before-drop, else the one that they are brought into]
    #[arg(long, value_name = "NAME")]
    pub(super) database: Option<String>,
    /// Connection string of the server that gets them; a password is better kept in ~/.pgpass [default: the primary of the herd on this host]
    #[arg(long, value_name = "CONNINFO", requires = "table")]
    into: Option<String>,
    /// Schema that they come into, made if it is not there [default: restored]
    #[arg(long, value_name = "SCHEMA", requires = "table", value_parser = identifier, conflicts_with = "in_place")]
    into_schema: Option<String>,
    /// Name that the table gets; it stays in its schema, unless --into-schema says another
    #[arg(long = "as", value_name = "NAME", requires = "table", value_parser = identifier, conflicts_with = "in_place")]
    renamed: Option<String>,
    /// Bring them back as they were: with their names, foreign keys, triggers, rules, policies, owners and grants. Nothing may have their names
    #[arg(long, requires = "table")]
    in_place: bool,
    /// Without owners and grants: they belong to who brings them in
    #[arg(long, requires = "table")]
    no_owner: bool,
    #[command(flatten)]
    scratch: ScratchArgs,
}

impl TablesArgs {
    pub(super) fn is_wanted(&self) -> bool {
        !self.table.is_empty()
    }

    fn placing(&self) -> Placing {
        match (self.in_place, &self.into_schema, &self.renamed) {
            (true, _, _) => Placing::InPlace,
            (false, None, None) => Placing::Copy { schema: Some(SCHEMA.to_owned()), name: None },
            (false, schema, name) => Placing::Copy { schema: schema.clone(), name: name.clone() },
        }
    }
}

/// How it is done.
pub(super) struct Way {
    pub(super) readers: usize,
    pub(super) rate: Option<NonZeroU64>,
    pub(super) dry_run: bool,
    pub(super) yes: bool,
}

/// Why it was not.
enum Undone {
    Scratch(scratch::Error),
    Tables(TablesError),
}

pub(super) async fn run(
    args: TablesArgs,
    recovery: recover::Order,
    way: Way,
    global: &Global,
) -> Result<(), Failure> {
    if args.renamed.is_some() && args.table.len() > 1 {
        return Err(Failure::usage("--as gives one table a name, and several are to come")
            .hint("--into-schema keeps their names"));
    }
    let placing = args.placing();
    let conninfo = match args.into {
        Some(conninfo) => conninfo,
        None => psql::of_primary(global, args.database.as_deref())
            .await
            .map_err(|failure| failure.hint("--into CONNINFO names the server that gets the tables"))?,
    };
    let ready = scratch::prepare(args.scratch.order(recovery, false, false)?)
        .await
        .map_err(super::scratch::failed)?;
    let live = Live { installation: ready.installation().clone(), conninfo };
    let of_drop = ready.report().dropped.map(|dropped| dropped.database);
    let (tables, database, no_owner) = (args.table, args.database.or(of_drop), args.no_owner);
    let wanted = Wanted { tables, database, placing, no_owner, live };
    let target = tables::look(&wanted).await.map_err(failed)?;
    let plan = plan(&ready, &wanted, &target);
    if !global.json {
        print(&told(&plan))?;
    }
    if way.dry_run {
        if global.json {
            print_json(&TableRestore { plan, brought: None })?;
        }
        return match ready.check(RESERVE_BYTES) {
            Err(scratch::Error::Recover(recover::RecoverError::Root)) | Ok(()) => Ok(()),
            Err(error) => Err(super::scratch::failed(error)),
        };
    }
    ready.check(RESERVE_BYTES).map_err(super::scratch::failed)?;
    let names: Vec<String> = plan.tables.iter().map(|table| table.brought_as.clone()).collect();
    let what = format!(
        "{} will be written into database {} {}; what is there is not touched.",
        listed(&names, "and"),
        plan.into.database,
        at(&plan.into)
    );
    confirm(&what, "Bring back?", way.yes)?;
    super::scratch::tidy(ready.dir()).await;

    let sender = watch::Sender::new(Progress::default());
    let seen = sender.subscribe();
    let work = async {
        let note = format!("Tables are fetched from backup {}.", plan.restore.backup);
        let mut running = ready.run(&note, way.readers, way.rate, &sender).await.map_err(Undone::Scratch)?;
        let came = tables::bring(&mut running, &wanted, &target, &sender).await.map_err(Undone::Tables);
        let (restore_seconds, recovery_seconds) = (running.restored.seconds, running.recovery.as_secs_f64());
        sender.send_replace(Progress { step: Some("removing the scratch server"), ..Progress::default() });
        let dir = running.scratch.dir().display().to_string();
        let removed = running.scratch.remove().await;
        let (tables, bytes, transfer_seconds) = came?;
        let brought = Brought { tables, bytes, restore_seconds, recovery_seconds, transfer_seconds };
        Ok((brought, removed.err().map(|error| format!("warning: {dir} is not removed: {error}"))))
    };
    let (brought, left) = match progress::shown("restoring", "flushing", seen, work).await {
        Ok(Ok(done)) => done,
        Ok(Err(Undone::Scratch(error))) => return Err(super::scratch::failed(error)),
        Ok(Err(Undone::Tables(error))) => return Err(failed(error)),
        Err(interrupted) => {
            note(match tables::interrupted(&wanted, &target).await {
                Ok(Interrupted::Nothing) => {
                    "interrupted: nothing was brought in; the scratch server is removed"
                }
                Ok(Interrupted::TooLate) => {
                    "interrupted too late: the tables are there; the scratch server is removed"
                }
                Ok(Interrupted::Unsettled) | Err(_) => {
                    "interrupted, and it is not known yet whether the tables come: look for them; the scratch server is removed"
                }
            });
            return Err(interrupted);
        }
    };
    if let Some(left) = left {
        note(&left);
    }
    if global.json {
        return print_json(&TableRestore { plan, brought: Some(brought) });
    }
    note(&done(&brought));
    Ok(())
}

fn plan(ready: &Ready, wanted: &Wanted, target: &Target) -> TablePlan {
    let planned = |table: &TableName| PlannedTable {
        table: table.to_string(),
        brought_as: wanted.placing.of(table).to_string(),
    };
    TablePlan {
        restore: ready.report(),
        database: wanted.database.clone().unwrap_or_else(|| target.database.clone()),
        tables: wanted.tables.iter().map(planned).collect(),
        in_place: wanted.placing == Placing::InPlace,
        into: target.report.clone(),
    }
}

fn at(target: &TableTarget) -> String {
    match (&target.address, target.port) {
        (Some(address), Some(port)) => format!("at {address}, port {port}"),
        _ => "of this host".to_owned(),
    }
}

fn told(plan: &TablePlan) -> String {
    let mut lines = super::recovery_lines(&plan.restore);
    let scratch = std::path::Path::new(&plan.restore.data_dir).parent().map(|dir| dir.display().to_string());
    lines.push(("scratch server", format!("{}, removed afterwards", scratch.unwrap_or_default())));
    lines.extend(super::size_lines(&plan.restore));
    for (at, table) in plan.tables.iter().enumerate() {
        let heading = if at == 0 { "tables" } else { "" };
        let becomes = if plan.in_place { "as it was".to_owned() } else { format!("as {}", table.brought_as) };
        lines.push((heading, format!("{} of database {}, {becomes}", table.table, plan.database)));
    }
    let into = &plan.into;
    lines.push((
        "into",
        format!(
            "database {} {}, PostgreSQL {}, as {}",
            into.database,
            at(into),
            into.postgresql_version,
            into.role
        ),
    ));
    super::aligned(&lines)
}

fn done(brought: &Brought) -> String {
    let mut lines: Vec<String> = brought.tables.iter().flat_map(told_of).collect();
    let spent = |seconds: f64| span((seconds * 1000.0) as u64);
    lines.push(format!(
        "restored in {}, recovered in {}, brought over {} in {}",
        spent(brought.restore_seconds),
        spent(brought.recovery_seconds),
        bytes(brought.bytes),
        spent(brought.transfer_seconds)
    ));
    lines.join("\n")
}

fn told_of(table: &BroughtTable) -> Vec<String> {
    let mut first = format!(
        "{} is there as {}, with {}",
        table.table,
        table.brought_as,
        counted(table.rows as usize, "row", "rows")
    );
    if table.partitions > 0 {
        first.push_str(&format!(" in {}", counted(table.partitions as usize, "partition", "partitions")));
    }
    if let Some(owner) = &table.owner {
        first.push_str(&format!(", owned by {owner}"));
    }
    let mut lines = vec![first];
    for (what, names) in
        [("indexes", &table.indexes), ("constraints", &table.constraints), ("sequences", &table.sequences)]
    {
        if !names.is_empty() {
            lines.push(format!("  {what}: {}", names.join(", ")));
        }
    }
    if !table.left_out.is_empty() {
        lines.push(format!("  left out: {}", table.left_out.join(", ")));
    }
    lines
}

fn failed(error: TablesError) -> Failure {
    let hint = error.hint();
    let failure = match &error {
        error if error.is_refusal() => Failure::refused(error.to_string()),
        error => crate::failure::with_sources(error),
    };
    hint.into_iter().fold(failure, Failure::hint)
}
