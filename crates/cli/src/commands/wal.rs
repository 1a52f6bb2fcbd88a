//! `pgherd wal`: WAL into a repository and out of it, one file at a time.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{Args, Subcommand};
use pgherd_agent::wal::{Fetched, FileError, Files};
use serde_json::json;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{note, print, print_json};

/// What `fetch` exits with when there is no such file, and nothing else does.
const ABSENT: u8 = 1;
/// What it exits with when it cannot tell whether a file is there. PostgreSQL ends its recovery with an error at codes
/// above 125, and takes those below for the end of the WAL.
const UNSURE: u8 = 200;

/// Archive WAL of a server, and fetch it back in recovery
///
/// For a server that streams into a repository none of it is needed. These are the commands for one that does not, and for a copy
/// that is recovered: PostgreSQL calls them as archive_command and restore_command.
#[derive(Debug, Args)]
pub(crate) struct WalArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Archive a file; archive_command = 'pgherd wal push --repository FILE %p'
    ///
    /// It is durable in the repository when this exits with 0. The same file again is fine; another content under a name that is
    /// there is kept apart, and an error.
    Push {
        #[command(flatten)]
        of: Of,
        /// Path of the file, as PostgreSQL's %p
        file: PathBuf,
    },
    /// Fetch a file; restore_command = 'pgherd wal fetch --repository FILE %f %p'
    ///
    /// Exits with 0 if it is there, with 1 if it is absent for certain, and with 200 if nobody knows, so that recovery stops
    /// instead of promoting too early. Segments that come next are fetched ahead, 256 MiB at most, into pgherd_fetch in the data
    /// directory.
    Fetch {
        #[command(flatten)]
        of: Of,
        /// Name of the file, as PostgreSQL's %f
        name: String,
        /// Where it goes, as PostgreSQL's %p
        to: Option<PathBuf>,
        /// Fetch it and what follows ahead, and write no file
        #[arg(long, hide = true, conflicts_with = "to")]
        ahead: bool,
        /// Fetch nothing ahead
        #[arg(long, conflicts_with = "ahead")]
        no_ahead: bool,
    },
    /// Show which segments are there, with each hole
    List {
        #[command(flatten)]
        of: Of,
    },
}

/// Which repository and which cluster.
#[derive(Debug, Args)]
struct Of {
    /// File that says where the repository is and what opens it
    #[arg(long, value_name = "FILE")]
    repository: PathBuf,
    /// Data directory of the cluster; PostgreSQL runs its commands in it
    #[arg(long, value_name = "DIR", default_value = ".")]
    data_dir: PathBuf,
}

impl Of {
    async fn files(&self) -> Result<Files, FileError> {
        Files::open(&self.repository, &self.data_dir).await
    }
}

/// Whether this command line is PostgreSQL's, which must not take a mistake in it for the end of the WAL.
pub(crate) fn is_fetch(mut arguments: impl Iterator<Item = std::ffi::OsString>) -> bool {
    arguments.any(|argument| argument == "wal") && arguments.any(|argument| argument == "fetch")
}

/// Says what happened; the exit code says that nothing is known of the file.
pub(crate) fn unsure(failure: &Failure) -> Failure {
    if let Failure::Told(_) = failure {
        note(failure.text().trim_end());
    }
    Failure::Silent(UNSURE)
}

pub(crate) async fn run(args: WalArgs, global: &Global) -> Result<(), Failure> {
    match args.action {
        Action::Push { of, file } => push(&of, &file).await,
        Action::Fetch { of, name, to: Some(to), no_ahead, .. } => {
            match fetch(&of, &name, &to, !no_ahead).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(Failure::Silent(ABSENT)),
                Err(failure) => Err(unsure(&failure)),
            }
        }
        Action::Fetch { of, name, to: None, ahead: true, .. } => {
            of.files().await.map_err(failed)?.fill(&name).await.map_err(failed)?;
            Ok(())
        }
        Action::Fetch { to: None, .. } => Err(Failure::usage("it is not said where the file goes")
            .hint("restore_command = 'pgherd wal fetch --repository FILE %f %p'")),
        Action::List { of } => list(&of, global).await,
    }
}

async fn push(of: &Of, file: &Path) -> Result<(), Failure> {
    // PostgreSQL runs it in the data directory, and gives a path from there.
    let file = of.data_dir.join(file);
    // Whether it was there already is all the same to PostgreSQL.
    of.files().await.map_err(failed)?.push(&file).await.map(|_| ()).map_err(failed)
}

/// Whether it was there.
async fn fetch(of: &Of, name: &str, to: &Path, wants_ahead: bool) -> Result<bool, Failure> {
    let to = of.data_dir.join(to);
    match of.files().await.map_err(failed)?.fetch(name, &to).await.map_err(failed)? {
        Fetched::Absent => Ok(false),
        Fetched::Found { ahead } => {
            if let Some(next) = ahead.filter(|_| wants_ahead) {
                fetch_ahead(of, &next);
            }
            Ok(true)
        }
    }
}

/// Leaves a process behind. If it cannot be started, each segment is fetched when it is asked for.
fn fetch_ahead(of: &Of, next: &str) {
    let Ok(program) = std::env::current_exe() else { return };
    let started = Command::new(program)
        .args(["wal", "fetch", "--ahead", "--repository"])
        .arg(&of.repository)
        .arg("--data-dir")
        .arg(&of.data_dir)
        .arg(next)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // What ends recovery ends its commands as a group; this one ends by itself.
        .process_group(0)
        .spawn();
    if let Err(error) = started {
        note(&format!("nothing is fetched ahead: {error}"));
    }
}

async fn list(of: &Of, global: &Global) -> Result<(), Failure> {
    let runs = of.files().await.map_err(failed)?.runs().await.map_err(failed)?;
    if global.json {
        let runs = runs.iter().map(|run| {
            json!({ "timeline": run.timeline, "first": run.first, "last": run.last, "segments": run.segments })
        });
        return print_json(&json!({ "runs": runs.collect::<Vec<_>>() }));
    }
    if runs.is_empty() {
        note("there is no WAL of this cluster in the repository");
    }
    let lines = runs.iter().map(|run| format!("{}  {}  {} segments\n", run.first, run.last, run.segments));
    print(&lines.collect::<String>())
}

fn failed(error: FileError) -> Failure {
    match error {
        FileError::Repository(error) => super::backup::failed(error),
        error => {
            let hint = matches!(error, FileError::DataDir { .. })
                .then_some("--data-dir names the data directory; PostgreSQL runs its commands in it");
            hint.into_iter().fold(crate::failure::with_sources(&error), Failure::hint)
        }
    }
}
