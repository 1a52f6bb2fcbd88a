//! `pgherd wal`: WAL into a repository and out of it, one file at a time.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::target;
use pgherd_agent::named_server::NamedServer;
use pgherd_agent::wal::find::{Finding, Sought, What};
use pgherd_agent::wal::switch::{self, SwitchError};
use pgherd_agent::wal::{Fetched, FileError, Files, ForeignFiles, Run};
use serde_json::json;
use tokio::sync::watch;

use super::kept::KeptArgs;
use super::password_from_environment;
use crate::args::Global;
use crate::failure::Failure;
use crate::output::numbers::span;
use crate::output::{note, print, print_json, print_line, progress};

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
    ///
    /// With --from-pgbackrest or --from-barman it is fetched from what those programs have archived.
    Fetch {
        #[command(flatten)]
        of: From,
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
    /// Find which segment and timeline hold an LSN, a time or a transaction
    ///
    /// Of an LSN the record that is there; of a time the first transaction that ended then or later; of a transaction its first
    /// record and its end. Of a transaction everything is read, from the first segment on; of a time a few segments. What a
    /// promotion has left behind is told as such. It fails if nothing is found.
    Find {
        #[command(flatten)]
        of: Of,
        #[command(flatten)]
        sought: SoughtArgs,
    },
    /// Begin a new segment on a primary of this host, and wait until the one before is in the repository
    ///
    /// For a server that archives by archive_command, or by a stream, outside of a herd: before an important moment, or to see that
    /// archiving works. Where nothing was written since the last switch it does nothing but see that the last segment is there.
    /// A herd has each second of its WAL in the repository anyhow.
    Switch(SwitchArgs),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SoughtArgs {
    /// A position in the WAL: 16/B374D848
    #[arg(long, value_name = "LSN")]
    lsn: Option<String>,
    /// A time with its zone, as for pgherd restore --target-time
    #[arg(long, value_name = "TIME")]
    time: Option<String>,
    /// A transaction's number, as pg_current_xact_id() gives it or without its epoch
    #[arg(long, value_name = "XID")]
    xid: Option<u64>,
}

impl SoughtArgs {
    fn sought(&self) -> Result<Sought, Failure> {
        match self {
            SoughtArgs { lsn: Some(lsn), .. } => lsn.trim().parse().map(Sought::Lsn).map_err(|_| {
                Failure::usage(format!("\"{lsn}\" is no position in the WAL"))
                    .hint("one looks like 16/B374D848")
            }),
            SoughtArgs { time: Some(time), .. } => target::time(time).map(Sought::Time).map_err(|error| {
                let hint = error.hint();
                hint.into_iter().fold(Failure::usage(error.to_string()), Failure::hint)
            }),
            // Records have no epoch.
            SoughtArgs { xid, .. } => match xid.unwrap_or_default() & u64::from(u32::MAX) {
                0..=2 => Err(Failure::usage("it is no transaction's number").hint("the first one is 3")),
                xid => Ok(Sought::Xid(xid as u32)),
            },
        }
    }
}

#[derive(Debug, Args)]
struct SwitchArgs {
    #[command(flatten)]
    of: Of,
    /// Directory of its socket, or an address of this host [default: what its postmaster.pid says]
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Port that it listens on [default: what its postmaster.pid says]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// A superuser, or one who may execute pg_switch_wal(); $PGPASSWORD is used if the server asks for a password
    #[arg(long, value_name = "ROLE", default_value = "postgres")]
    user: String,
    /// How long the segment may take to come into the repository
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    timeout: Duration,
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

/// Which repository, or which place of another program, and which cluster.
#[derive(Debug, Args)]
struct From {
    /// File that says where the repository is and what opens it
    #[arg(long, value_name = "FILE", required_unless_present_any = ["from_pgbackrest", "from_barman"])]
    repository: Option<PathBuf>,
    #[command(flatten)]
    kept: KeptArgs,
    /// Data directory of the cluster; PostgreSQL runs its commands in it
    #[arg(long, value_name = "DIR", default_value = ".")]
    data_dir: PathBuf,
}

/// WAL of one cluster, wherever it is.
enum Place {
    Own(Files),
    Foreign(ForeignFiles),
}

impl From {
    async fn open(&self) -> Result<Place, FileError> {
        match self.kept.source() {
            Some(source) => Ok(Place::Foreign(ForeignFiles::open(&source, &self.data_dir).await?)),
            None => {
                let repository = self.repository.clone().unwrap_or_default();
                Ok(Place::Own(Files::open(&repository, &self.data_dir).await?))
            }
        }
    }

    async fn fetch(&self, name: &str, to: &Path) -> Result<Fetched, FileError> {
        match self.open().await? {
            Place::Own(files) => files.fetch(name, to).await,
            Place::Foreign(files) => files.fetch(name, to).await,
        }
    }

    async fn fill(&self, first: &str) -> Result<bool, FileError> {
        match self.open().await? {
            Place::Own(files) => files.fill(first).await,
            Place::Foreign(files) => files.fill(first).await,
        }
    }

    /// As they were given.
    fn arguments(&self) -> Vec<OsString> {
        let KeptArgs { from_pgbackrest, stanza, from_barman, server } = &self.kept;
        let path = |path: &Option<PathBuf>| path.clone().map(PathBuf::into_os_string);
        let name = |name: &Option<String>| name.clone().map(OsString::from);
        let options = [
            ("--repository", path(&self.repository)),
            ("--from-pgbackrest", path(from_pgbackrest)),
            ("--stanza", name(stanza)),
            ("--from-barman", path(from_barman)),
            ("--server", name(server)),
            ("--data-dir", Some(self.data_dir.clone().into_os_string())),
        ];
        let given = options.into_iter().filter_map(|(option, value)| Some([option.into(), value?]));
        given.flatten().collect()
    }
}

impl Of {
    async fn files(&self) -> Result<Files, FileError> {
        Files::open(&self.repository, &self.data_dir).await
    }
}

/// Whether this command line is PostgreSQL's, which must not take a mistake in it for the end of the WAL.
pub(crate) fn is_fetch(mut arguments: impl Iterator<Item = OsString>) -> bool {
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
            of.fill(&name).await.map_err(failed)?;
            Ok(())
        }
        Action::Fetch { to: None, .. } => Err(Failure::usage("it is not said where the file goes")
            .hint("restore_command = 'pgherd wal fetch --repository FILE %f %p'")),
        Action::List { of } => list(&of, global).await,
        Action::Find { of, sought } => find(&of, sought.sought()?, global).await,
        Action::Switch(args) => switch_segment(args, global).await,
    }
}

async fn push(of: &Of, file: &Path) -> Result<(), Failure> {
    // PostgreSQL runs it in the data directory, and gives a path from there.
    let file = of.data_dir.join(file);
    // Whether it was there already is all the same to PostgreSQL.
    of.files().await.map_err(failed)?.push(&file).await.map(|_| ()).map_err(failed)
}

/// Whether it was there.
async fn fetch(of: &From, name: &str, to: &Path, wants_ahead: bool) -> Result<bool, Failure> {
    let to = of.data_dir.join(to);
    match of.fetch(name, &to).await.map_err(failed)? {
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
fn fetch_ahead(of: &From, next: &str) {
    let Ok(program) = std::env::current_exe() else { return };
    let started = Command::new(program)
        .args(["wal", "fetch", "--ahead"])
        .args(of.arguments())
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
        return print_json(&json!({ "runs": as_json(&runs) }));
    }
    if runs.is_empty() {
        note("there is no WAL of this cluster in the repository");
    }
    let lines = runs.iter().map(|run| format!("{}  {}  {} segments\n", run.first, run.last, run.segments));
    print(&lines.collect::<String>())
}

fn as_json(runs: &[Run]) -> Vec<serde_json::Value> {
    let runs = runs.iter().map(|run| {
        json!({ "timeline": run.timeline, "first": run.first, "last": run.last, "segments": run.segments })
    });
    runs.collect()
}

async fn find(of: &Of, sought: Sought, global: &Global) -> Result<(), Failure> {
    let files = of.files().await.map_err(failed)?;
    let sender = watch::Sender::new(Progress::default());
    let work = files.find(sought, &sender);
    let found = progress::shown("reading", "looking", sender.subscribe(), work).await?.map_err(failed)?;
    let what = match sought {
        Sought::Lsn(lsn) => format!("LSN {lsn}"),
        Sought::Time(at) => format!("a transaction that ended at {at} or later"),
        Sought::Xid(xid) => format!("transaction {xid}"),
    };
    if global.json {
        let holes = found.runs.len().saturating_sub(1);
        print_json(&json!({ "findings": found.findings, "runs": as_json(&found.runs), "breaks": holes }))?;
    } else {
        print(&found.findings.iter().map(told).collect::<String>())?;
    }
    if found.findings.is_empty() {
        let there: Vec<String> =
            found.runs.iter().map(|run| format!("{} to {}", run.first, run.last)).collect();
        let failure = Failure::failed(format!("{what} is not in the archive"));
        return Err(match there.is_empty() {
            true => failure.hint("there is no WAL of this cluster in the repository"),
            false => failure.hint(format!("there is {}", there.join(", "))),
        });
    }
    Ok(())
}

fn told(finding: &Finding) -> String {
    let Finding { timeline, segment, lsn, what, is_current, .. } = finding;
    let what = match what {
        What::Commit { xid, at } => format!("commit of transaction {xid} at {at}"),
        What::Abort { xid, at } => format!("end of transaction {xid}, which was rolled back, at {at}"),
        What::RestorePoint { name, at } => format!("restore point \"{name}\" at {at}"),
        What::Other { xid: Some(xid) } => format!("a record of transaction {xid}"),
        What::Other { xid: None } => "a record of no transaction".to_owned(),
        What::Nothing => "no record".to_owned(),
    };
    let left = if *is_current { "" } else { "  (left behind by a promotion)" };
    format!("{segment}  timeline {timeline}  {lsn}  {what}{left}\n")
}

async fn switch_segment(args: SwitchArgs, global: &Global) -> Result<(), Failure> {
    let SwitchArgs { of, host, port, user, timeout } = args;
    let order = switch::Order {
        repository: of.repository,
        server: NamedServer {
            data_dir: of.data_dir,
            host,
            port,
            role: user,
            password: password_from_environment(),
        },
        deadline: timeout,
    };
    let began = Instant::now();
    let switched = switch::switch(order).await.map_err(not_switched)?;
    let how = if switched.was_switched { "nothing was written since" } else { "has ended" };
    note(&format!("{} {how}; waits until it is in {}", switched.file, switched.place()));
    let nothing = watch::Sender::new(Progress::default());
    let waited = progress::shown("waiting", "waiting", nothing.subscribe(), switched.wait()).await;
    match waited {
        Ok(done) => done.map_err(not_switched)?,
        Err(interrupted) => {
            note("interrupted: the server has switched, and whoever archives goes on");
            return Err(interrupted);
        }
    }
    if global.json {
        return print_json(&json!({
            "segment": switched.file,
            "end": switched.end.to_string(),
            "was_switched": switched.was_switched,
            "seconds": began.elapsed().as_secs_f64(),
        }));
    }
    note(&format!("it is there, after {}", span(began.elapsed().as_millis() as u64)));
    print_line(&switched.file)
}

fn not_switched(error: SwitchError) -> Failure {
    match error {
        SwitchError::Repository(error) => super::backup::failed(error),
        error => {
            let hint = error.hint();
            hint.into_iter().fold(crate::failure::with_sources(&error), Failure::hint)
        }
    }
}

fn failed(error: FileError) -> Failure {
    match error {
        FileError::Repository(error) => super::backup::failed(error),
        FileError::Foreign(error) => super::kept::of_foreign(error.into()),
        error => {
            let hint = matches!(error, FileError::DataDir { .. })
                .then_some("--data-dir names the data directory; PostgreSQL runs its commands in it");
            hint.into_iter().fold(crate::failure::with_sources(&error), Failure::hint)
        }
    }
}
