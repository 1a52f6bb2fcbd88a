//! `pgherd backup list`, `show` and `verify`: what is there, and whether it can be read back.

use std::path::PathBuf;

use clap::Args;
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::catalog::{self, Catalog, Which};
use pgherd_agent::backups::verify::{Depth, VerifyError, verify};
use pgherd_api::backup::{
    Backup, BackupMode, BackupStatus, Backups, Damage, FoundBy, FoundChanges, Keep, RecoveryWindow,
    Verification,
};
use tokio::sync::watch;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::numbers::{bytes, counted, span};
use crate::output::style::{Style, Tone};
use crate::output::table::{Cell, Table};
use crate::output::{note, print, print_json, print_line, progress};

/// Which repository, and which cluster in it.
#[derive(Debug, Args)]
pub(super) struct Of {
    /// File that says where the repository is and what opens it [default: that of the herd on this host]
    #[arg(long, value_name = "FILE")]
    repository: Option<PathBuf>,
    /// System identifier of the cluster, where the repository has several
    #[arg(long, value_name = "ID")]
    cluster_system: Option<String>,
}

impl Of {
    pub(super) async fn open(&self, global: &Global) -> Result<Catalog, Failure> {
        let file = crate::commands::repository_file(global, self.repository.clone())?;
        Catalog::open(&file, self.cluster_system.as_deref()).await.map_err(super::of_catalog)
    }
}

pub(super) fn which(text: &str) -> Result<Which, Failure> {
    text.parse().map_err(super::of_catalog)
}

pub(super) async fn list(of: &Of, global: &Global) -> Result<(), Failure> {
    let catalog = of.open(global).await?;
    let backups = catalog::list(&catalog).await.map_err(super::of_catalog)?;
    if global.json {
        return print_json(&backups);
    }
    if backups.backups.is_empty() {
        note("there is no backup; pgherd backup create takes one");
    } else {
        print_line(&table(&backups).lines(Style::of_stdout()).join("\n"))?;
    }
    for gap in &backups.gaps {
        note(&format!(
            "warning: WAL is missing from {} to {} on timeline {}",
            gap.from, gap.to, gap.timeline
        ));
    }
    match &backups.recovery_window {
        Some(window) => note(&told(window)),
        None => note("nothing can be restored"),
    }
    Ok(())
}

fn told(window: &RecoveryWindow) -> String {
    let RecoveryWindow { from, to, to_lsn, to_timeline, .. } = window;
    match to {
        Some(to) => format!(
            "any moment can be restored from {from} to {to}, the last transaction that is there, before {to_lsn} on timeline {to_timeline}"
        ),
        None => {
            format!("any moment can be restored from {from} on, up to {to_lsn} on timeline {to_timeline}")
        }
    }
}

fn table(backups: &Backups) -> Table {
    let mut table =
        Table::new(&["BACKUP", "STATUS", "MODE", "ENDED", "SIZE", "STORED", "TIMELINE", "KEEP", "WHY"]);
    let text = |text: &Option<String>| Cell::new(text.clone().unwrap_or_default());
    let size = |size: Option<u64>| Cell::new(size.map_or_else(String::new, bytes)).right();
    for backup in &backups.backups {
        let why = match (&backup.why, backup.can_be_restored) {
            (None, Some(false)) => Some("WAL of it is missing, so that it cannot be restored".to_owned()),
            (why, _) => why.clone(),
        };
        table.row(vec![
            Cell::new(backup.id.clone()),
            Cell::new(status(backup.status)).toned(tone(backup)),
            Cell::new(backup.mode.map_or("", mode)),
            text(&backup.end_time),
            size(backup.size_bytes),
            size(backup.stored_bytes),
            Cell::new(backup.timeline.map_or_else(String::new, |timeline| timeline.to_string())).right(),
            Cell::new(backup.keep.as_ref().map_or_else(String::new, kept)),
            text(&why),
        ]);
    }
    table
}

fn tone(backup: &Backup) -> Tone {
    match (backup.status, backup.can_be_restored) {
        (BackupStatus::Failed, _) | (BackupStatus::Done, Some(false)) => Tone::Bad,
        (BackupStatus::Done, _) => Tone::Good,
        _ => Tone::Doubtful,
    }
}

fn status(status: BackupStatus) -> &'static str {
    match status {
        BackupStatus::Started => "STARTED",
        BackupStatus::Done => "DONE",
        BackupStatus::Failed => "FAILED",
        BackupStatus::Deleted => "DELETED",
        BackupStatus::Unknown => "UNKNOWN",
    }
}

fn mode(mode: BackupMode) -> &'static str {
    match mode {
        BackupMode::Full => "full",
        BackupMode::Incremental => "incremental",
    }
}

fn kept(keep: &Keep) -> String {
    match &keep.until {
        Some(until) => format!("{} until {until}", keep.target),
        None => keep.target.clone(),
    }
}

pub(super) async fn show(of: &Of, backup: &str, global: &Global) -> Result<(), Failure> {
    let which = which(backup)?;
    let catalog = of.open(global).await?;
    let backup = catalog::show(&catalog, which).await.map_err(super::of_catalog)?;
    if global.json {
        return print_json(&backup);
    }
    print(&lines(&catalog, &backup))
}

/// What is not known has no line.
fn lines(catalog: &Catalog, backup: &Backup) -> String {
    let text = |text: &Option<String>| text.clone();
    let size = |size: Option<u64>| size.map(bytes);
    let can =
        backup.can_be_restored.map(|can| if can { "yes" } else { "no: WAL of it is missing" }.to_owned());
    let checksums = backup.data_checksums.map(|on| if on { "on" } else { "off" }.to_owned());
    let changes = backup.changes.as_ref();
    let all: [(&str, Option<String>); 28] = [
        ("backup", Some(backup.id.clone())),
        ("status", Some(status(backup.status).to_owned())),
        ("why", text(&backup.why)),
        ("keep", backup.keep.as_ref().map(kept)),
        ("can be restored", can),
        ("system identifier", Some(catalog.place.0.to_string())),
        ("node", text(&backup.node)),
        ("term", backup.term.map(|term| term.to_string())),
        ("PostgreSQL", text(&backup.postgresql_version)),
        ("data checksums", checksums),
        ("mode", backup.mode.map(|of| mode(of).to_owned())),
        ("parent", text(&backup.parent)),
        ("went on from", text(&backup.continues)),
        ("changes found by", changes.map(found)),
        (
            "read for it",
            changes.map(|changes| {
                format!("{}, and {} of WAL", bytes(changes.read_bytes), bytes(changes.wal_bytes))
            }),
        ),
        (
            "changed without WAL",
            changes
                .map(|changes| changes.unexplained_pages)
                .filter(|pages| *pages > 0)
                .map(|pages| counted(pages as usize, "page", "pages")),
        ),
        ("timeline", backup.timeline.map(|timeline| timeline.to_string())),
        ("begin time", text(&backup.begin_time)),
        ("end time", text(&backup.end_time)),
        (
            "held back",
            backup
                .held_back_seconds
                .map(|seconds| format!("{} for the server's clients", span(seconds.saturating_mul(1000)))),
        ),
        ("begin LSN", text(&backup.begin_lsn)),
        ("end LSN", text(&backup.end_lsn)),
        ("begin WAL", text(&backup.begin_wal)),
        ("end WAL", text(&backup.end_wal)),
        ("files", backup.files.map(|files| files.to_string())),
        ("size", size(backup.size_bytes)),
        ("stored by it", size(backup.stored_bytes)),
        ("refers to", size(backup.referenced_bytes)),
    ];
    let known: Vec<(&str, String)> = all.into_iter().filter_map(|(what, text)| Some((what, text?))).collect();
    let width = known.iter().map(|(what, _)| what.len()).max().unwrap_or(0);
    known.iter().map(|(what, text)| format!("{what:width$}  {text}\n")).collect()
}

fn found(changes: &FoundChanges) -> String {
    let by = match changes.found_by {
        FoundBy::Wal => "WAL",
        FoundBy::Comparison => "comparison",
        FoundBy::Both => "comparison, held against WAL",
        FoundBy::Unknown => "other means",
    };
    match &changes.why {
        Some(why) => format!("{by}: {why}"),
        None => by.to_owned(),
    }
}

pub(super) async fn verified(
    of: &Of,
    backup: Option<&str>,
    depth: Depth,
    jobs: u8,
    global: &Global,
) -> Result<(), Failure> {
    let meant = backup.map(which).transpose()?;
    let catalog = of.open(global).await?;
    if catalog.manifests().next().is_none() {
        return Err(super::of_catalog(catalog::CatalogError::NoneDone));
    }
    let sender = watch::Sender::new(Progress::default());
    let seen = sender.subscribe();
    let work = verify(&catalog, meant, depth, jobs.into(), &sender);
    let verification = match progress::shown("reading", "reading WAL", seen, work).await? {
        Ok(verification) => verification,
        Err(VerifyError::Catalog(error)) => return Err(super::of_catalog(error)),
        Err(error) => return Err(crate::failure::with_sources(&error)),
    };
    if global.json {
        print_json(&verification)?;
    } else {
        print(&of_verification(&verification, depth))?;
    }
    match verification.is_sound() {
        true => Ok(()),
        false => Err(Failure::failed("not everything can be read back")
            .hint("restore from another backup or repository, and take a new backup with --full; what is damaged stays as it is")),
    }
}

fn of_verification(verification: &Verification, depth: Depth) -> String {
    let sound = match depth {
        Depth::Content => "as they were written",
        Depth::Stored => "stored as they were",
    };
    let mut text = String::new();
    let damages = |text: &mut String, damaged: &[Damage]| {
        for Damage { file, what } in damaged {
            text.push_str(&format!("  {}: {what}\n", file.as_deref().unwrap_or("the list of files")));
        }
    };
    for backup in &verification.backups {
        text.push_str(&format!(
            "backup {}: {}, {}, {}\n",
            backup.id,
            counted(backup.files as usize, "file", "files"),
            bytes(backup.bytes),
            if backup.damaged.is_empty() { sound } else { "and damaged ones" }
        ));
        damages(&mut text, &backup.damaged);
    }
    let wal = &verification.wal;
    text.push_str(&format!(
        "WAL: {}{}\n",
        counted(wal.segments as usize, "segment", "segments"),
        if wal.damaged.is_empty() { format!(" {sound}") } else { ", and damaged ones".to_owned() }
    ));
    damages(&mut text, &wal.damaged);
    for gap in &wal.gaps {
        text.push_str(&format!("  missing from {} to {} on timeline {}\n", gap.from, gap.to, gap.timeline));
    }
    text
}
