//! `pgherd backup delete`, `undelete`, `keep` and `expire`: what stays.

use std::time::Duration;

use clap::Args;
use pgherd_agent::backups::keeping::{self, KeepingError, Rules};
use pgherd_api::backup::Expiry;

use super::catalog::{Of, which};
use crate::args::Global;
use crate::failure::Failure;
use crate::output::confirm::confirm;
use crate::output::numbers::{bytes, counted};
use crate::output::style::{Style, Tone};
use crate::output::table::{Cell, Table};
use crate::output::{note, print_json, print_line};

/// Delete a backup; it can be taken back until a collection after its grace
///
/// Any backup can be deleted alone: others do not depend on it. What it has goes with the first `pgherd backup expire` that comes a day later.
/// One that is kept by hand is not deleted, nor one of the last --minimum-redundancy.
#[derive(Debug, Args)]
pub(super) struct DeleteArgs {
    #[command(flatten)]
    of: Of,
    /// A name such as 20261120T205454, first or last
    #[arg(value_name = "BACKUP")]
    backup: String,
    /// So many backups that can be restored stay
    #[arg(long, value_name = "N", default_value_t = 1)]
    minimum_redundancy: u32,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Keep a backup whatever a retention policy says, or leave it to the policy again
#[derive(Debug, Args)]
pub(super) struct KeepArgs {
    #[command(flatten)]
    of: Of,
    /// A name such as 20261120T205454, first or last
    #[arg(value_name = "BACKUP")]
    backup: String,
    /// Only with the WAL that makes it consistent, instead of with all WAL since
    #[arg(long, conflicts_with = "release")]
    standalone: bool,
    /// Not for ever: a time with its zone
    #[arg(long, value_name = "TIME", conflicts_with = "release")]
    until: Option<String>,
    /// Do not keep it any more
    #[arg(long)]
    release: bool,
}

/// Delete what a retention policy lets go, and collect what was deleted longer ago than the grace
///
/// Says first what becomes of each backup and why; --dry-run ends there. What goes is deleted as with `pgherd backup delete`: until its
/// grace has passed it can be taken back, then its objects go with WAL that nothing needs. Nothing goes while a clock is wrong, or a
/// manifest cannot be read.
#[derive(Debug, Args)]
pub(super) struct ExpireArgs {
    #[command(flatten)]
    of: Of,
    /// "RECOVERY WINDOW OF 7 DAYS" (or WEEKS, or MONTHS), or "REDUNDANCY 3"
    #[arg(long, value_name = "POLICY")]
    retention: String,
    /// So many backups that can be restored stay at least
    #[arg(long, value_name = "N", default_value_t = 1)]
    minimum_redundancy: u32,
    /// Also the last backup of each of so many days, with its own WAL
    #[arg(long, value_name = "N", default_value_t = 0)]
    daily: u32,
    /// Also the last backup of each of so many weeks
    #[arg(long, value_name = "N", default_value_t = 0)]
    weekly: u32,
    /// Also the last backup of each of so many months
    #[arg(long, value_name = "N", default_value_t = 0)]
    monthly: u32,
    /// From a deletion until it is carried out
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = humantime::parse_duration)]
    grace: Duration,
    /// Say what would go, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(super) async fn delete(args: DeleteArgs, global: &Global) -> Result<(), Failure> {
    let which = which(&args.backup)?;
    let catalog = args.of.open(global).await?;
    let (id, _) = catalog.entry(which).map_err(super::of_catalog)?;
    let what = format!("Backup {id} of cluster {} is deleted.", catalog.place.0);
    confirm(&what, "Delete it?", args.yes)?;
    keeping::delete(&catalog, which, args.minimum_redundancy).await.map_err(failed)?;
    note(&format!("deleted {id}; pgherd backup undelete {id} takes that back, until it is collected"));
    Ok(())
}

pub(super) async fn undelete(of: &Of, backup: &str, global: &Global) -> Result<(), Failure> {
    let which = which(backup)?;
    let id = keeping::undelete(&of.open(global).await?, which).await.map_err(failed)?;
    note(&format!("backup {id} is there again"));
    Ok(())
}

pub(super) async fn keep(args: KeepArgs, global: &Global) -> Result<(), Failure> {
    let which = which(&args.backup)?;
    let catalog = args.of.open(global).await?;
    if args.release {
        let id = keeping::release(&catalog, which).await.map_err(failed)?;
        note(&format!("backup {id} is kept no longer than the policy wants it"));
        return Ok(());
    }
    let kept = keeping::keep(&catalog, which, args.standalone, args.until.as_deref()).await;
    let id = kept.map_err(failed)?;
    let wal = if args.standalone { "its own WAL" } else { "all WAL since" };
    note(&format!("backup {id} is kept with {wal}"));
    Ok(())
}

pub(super) async fn expire(args: ExpireArgs, global: &Global) -> Result<(), Failure> {
    if args.grace < keeping::MIN_GRACE {
        return Err(failed(KeepingError::Grace));
    }
    let rules = Rules {
        policy: args.retention,
        minimum_redundancy: args.minimum_redundancy,
        daily: args.daily,
        weekly: args.weekly,
        monthly: args.monthly,
    };
    let catalog = args.of.open(global).await?;
    let preview = keeping::preview(&catalog, &rules).await.map_err(failed)?;
    if !global.json && !preview.verdicts.is_empty() {
        print_line(&table(&preview).lines(Style::of_stdout()).join("\n"))?;
    }
    if args.dry_run {
        return if global.json { print_json(&preview) } else { Ok(()) };
    }
    let go = preview.verdicts.iter().filter(|verdict| verdict.goes).count();
    if go > 0 {
        let what =
            format!("{} by {}.", counted(go, "backup is deleted", "backups are deleted"), preview.policy);
        confirm(&what, "Go on?", args.yes)?;
    }
    let done = keeping::expire(&catalog, &rules, preview, args.grace).await.map_err(failed)?;
    if global.json {
        return print_json(&done);
    }
    if let Some(collected) = &done.collected {
        note(&format!(
            "collected {}, {}, {} of WAL: {}; {} until the grace has passed",
            counted(collected.swept.len(), "backup", "backups"),
            counted(collected.packs as usize, "pack", "packs"),
            counted(collected.wal as usize, "object", "objects"),
            bytes(collected.bytes),
            counted(collected.waiting.len(), "waits", "wait"),
        ));
        for id in &collected.abandoned {
            note(&format!("backup {id} was given up: nobody was taking it any more"));
        }
    }
    Ok(())
}

fn table(expiry: &Expiry) -> Table {
    let mut table = Table::new(&["BACKUP", "LABEL", "", "WAL", "WHY"]);
    for verdict in &expiry.verdicts {
        let (word, tone) = if verdict.goes { ("goes", Tone::Doubtful) } else { ("stays", Tone::Good) };
        let wal = match verdict.wal.as_deref() {
            Some("own") => "its own",
            Some(_) => "all since",
            None => "",
        };
        table.row(vec![
            Cell::new(verdict.id.clone()),
            Cell::new(verdict.label.clone()),
            Cell::new(word).toned(tone),
            Cell::new(wal),
            Cell::new(verdict.reason.clone()),
        ]);
    }
    table
}

fn failed(error: KeepingError) -> Failure {
    let hint = error.hint();
    let failure = match error {
        KeepingError::Catalog(error) => return super::of_catalog(error),
        error if error.is_usage() => Failure::usage(error.to_string()),
        error if error.is_refusal() => Failure::refused(error.to_string()),
        error => crate::failure::with_sources(&error),
    };
    hint.into_iter().fold(failure, Failure::hint)
}
