//! An old primary comes back: `pg_rewind` undoes what the new primary does not have.
//!
//! Each trap that the program has is met before it runs (S10): the target is brought to a clean stop as a standby,
//! because a crashed one would be recovered by a single-user server, which refuses `standby.signal`; the source must
//! have written a checkpoint on its timeline, because until then the program sees the old one and finds nothing to
//! do; and its exit code is not believed, the control file is. What it would erase is copied beside the data
//! directory first, with a list of it (rule 11).
//!
//! A rewind that was cut off leaves a directory that is of no use: a note refuses its start until it was cloned.
//!
//! Leaves out: whether this node's copy is still needed. Hazard: erases commits; the caller has proof that none of
//! them was acknowledged.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgherd_core::types::{Lsn, SystemId, Timeline};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::watch;

use crate::clone::{Progress, parse_progress};
use crate::conf::{
    self, ConfError, Conninfo, Managed, Settings, SyncNames, passfile_line, read_blocking, write_blocking,
};
use crate::control::{ControlFile, State};
use crate::durable;
use crate::error::{Error, Result, blocking, within};
use crate::hba::{self, Gate, HbaError, Rules};
use crate::instance::Instance;
use crate::process::{GoneError, Server, StartError, StopMode, ensure_gone};
use crate::roles;
use crate::secret::Secret;
use crate::sql::{Remote, Session};
use crate::sync_names;
use crate::wal::history::{self, History};
use crate::wal::{self, EndOfWal, WalFiles};

const FILES: Duration = Duration::from_secs(600);
const SOURCE: Duration = Duration::from_secs(10);
const LISTING: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(60);
/// Of what the program says, how much an outcome quotes.
const QUOTED_LINES: usize = 8;
/// A copy of what is erased needs this much room beyond itself.
const ROOM_BYTES: u64 = 256 << 20;

/// From whom, as what.
#[derive(Clone, Debug)]
pub struct RewindOrder {
    /// The source, as `pgherd_rewind` reaches it. It has written a checkpoint on its timeline.
    pub source: Remote,
    /// Fetches the WAL of this node that `pg_rewind` reads and that is not here any more: all since the last checkpoint before
    /// the fork. Run as PostgreSQL runs it, in the data directory.
    pub restore_command: Option<String>,
    /// Kills the program.
    pub deadline: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rewound {
    /// What this node holds is part of the source's history: it can follow as it is.
    NotNeeded {
        end: Box<EndOfWal>,
    },
    Rewound {
        fork: Lsn,
        source_timeline: Timeline,
        saved: Saved,
    },
    /// It has to be cloned again.
    CannotRewind {
        why: String,
        saved: Option<Saved>,
    },
}

/// What a rewind or a clone erases, kept beside the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    pub dir: PathBuf,
    /// From the fork to the end.
    pub from: Lsn,
    pub to: Lsn,
    pub bytes: u64,
    /// Commits among it; `None` if `pg_waldump` could not read it.
    pub commits: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewindError {
    #[error("{source_node} is another cluster: its system identifier is {theirs}, and {ours} here")]
    AnotherCluster { source_node: String, ours: SystemId, theirs: SystemId },

    #[error("{source_node} has not written a checkpoint on timeline {timeline} yet")]
    NotCheckpointed { source_node: String, timeline: Timeline },

    #[error("what a rewind would erase ({bytes} bytes) does not fit beside the data directory")]
    NoRoomToSave { bytes: u64 },

    #[error(transparent)]
    NotGone(#[from] GoneError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Conf(#[from] ConfError),
    #[error(transparent)]
    Hba(#[from] HbaError),
    #[error(transparent)]
    Other(#[from] Error),
}

impl RewindError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            RewindError::NotCheckpointed { .. } => Some("it writes one by itself soon after its promotion"),
            RewindError::NoRoomToSave { .. } => {
                Some("free space on the volume of the agent's state directory")
            }
            RewindError::NotGone(error) => error.hint(),
            RewindError::Start(error) => error.hint(),
            RewindError::Conf(error) => error.hint(),
            RewindError::Other(error) => error.hint(),
            _ => None,
        }
    }
}

/// Makes this node's data directory one that can follow the source. Stops the server if it runs; leaves it stopped,
/// sealed, with the gate closed.
pub async fn rewind(
    instance: &Instance,
    settings: &Settings,
    order: &RewindOrder,
    progress: watch::Sender<Progress>,
) -> Result<Rewound, RewindError> {
    ensure_stopped(instance).await?;
    let source = Source::ask(order).await?;
    let (control, end) = read_target(instance).await?;
    if control.system_id != source.system_id {
        let source_node = order.source.host.clone();
        return Err(RewindError::AnotherCluster {
            source_node,
            ours: control.system_id,
            theirs: source.system_id,
        });
    }
    if source.history.contains(end.timeline, end.lsn) {
        return Ok(Rewound::NotNeeded { end: Box::new(end) });
    }
    // Of timeline numbers alone it could be the same line; what was written on it tells.
    let Some((_, fork)) = end.history.common_with(&source.history) else {
        let why =
            format!("timelines {} and {} have nothing in common", end.timeline, source.history.timeline());
        return Ok(Rewound::CannotRewind { why, saved: None });
    };
    let saved = save(instance, &end, fork).await?;

    let names = sync_names::written(instance).await?;
    if let Err(why) = stop_cleanly(instance, &control, &end, &source.history).await? {
        return Ok(Rewound::CannotRewind { why, saved: Some(saved) });
    }
    match run(instance, order, &progress).await? {
        Ok(()) => {}
        Err(why) => return Ok(Rewound::CannotRewind { why, saved: Some(saved) }),
    }
    // The program changed what it copied the control file into; that it says so proves that it went to its end.
    let (instance_, timeline) = (instance.clone(), source.history.timeline());
    let judged = blocking("judging a rewind", FILES, move || {
        let control = ControlFile::read(&instance_.control_file())?;
        let labelled = instance_.data_dir.join("backup_label").exists();
        let right = control.state == State::InArchiveRecovery && control.timeline() == timeline && labelled;
        Ok::<_, Error>((right, control))
    })
    .await?;
    if let (false, control) = judged {
        let why = format!("pg_rewind left it {:?} on timeline {}", control.state, control.timeline());
        return Ok(Rewound::CannotRewind { why, saved: Some(saved) });
    }
    restore_own_files(instance, settings, &judged.1, names).await?;
    Ok(Rewound::Rewound { fork, source_timeline: source.history.timeline(), saved })
}

/// True if a rewind was begun and not ended: the data directory has to be cloned again. Blocks.
pub fn interrupted(instance: &Instance) -> Result<bool> {
    Ok(durable::read(&note_path(instance))?.is_some())
}

pub(crate) fn forget_interrupted(instance: &Instance) -> Result<()> {
    durable::remove(&note_path(instance)).map(drop)
}

/// What the source is.
struct Source {
    system_id: SystemId,
    history: History,
}

impl Source {
    async fn ask(order: &RewindOrder) -> Result<Source, RewindError> {
        within("asking the source of a rewind", SOURCE, async {
            let session = Session::remote(&order.source, SOURCE).await?;
            let row = session
                .query_one(
                    "SELECT s.system_identifier, c.timeline_id, \
                     CASE WHEN pg_catalog.pg_is_in_recovery() THEN c.timeline_id ELSE \
                       ('x' || substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int \
                     END FROM pg_catalog.pg_control_system() s, pg_catalog.pg_control_checkpoint() c",
                    &[],
                )
                .await
                .map_err(Error::sql("show its control file"))?;
            let (checkpointed, writes): (i32, i32) = (row.get(1), row.get(2));
            let timeline = Timeline(writes.cast_unsigned());
            if checkpointed != writes {
                return Err(RewindError::NotCheckpointed { source_node: order.source.host.clone(), timeline });
            }
            let history = if timeline == Timeline(1) {
                History::root(timeline)
            } else {
                let path = format!("pg_wal/{}", wal::history_name(timeline));
                let row = session
                    .query_one("SELECT pg_catalog.pg_read_binary_file($1)", &[&path])
                    .await
                    .map_err(Error::sql("read its timeline history"))?;
                let text = String::from_utf8_lossy(row.get(0)).into_owned();
                History::parse(timeline, &text).map_err(|what| Error::Answer { what })?
            };
            Ok(Source { system_id: SystemId(row.get::<_, i64>(0).cast_unsigned()), history })
        })
        .await
    }
}

async fn ensure_stopped(instance: &Instance) -> Result<(), RewindError> {
    use crate::process::Found;
    if let Found::Running(server) = Server::find(instance).await? {
        server.stop(StopMode::Fast, STOP).await?;
    }
    ensure_gone(instance, STOP).await?;
    Ok(())
}

async fn read_target(instance: &Instance) -> Result<(ControlFile, EndOfWal)> {
    let instance = instance.clone();
    blocking("reading the end of WAL", FILES, move || {
        let control = ControlFile::read(&instance.control_file())?;
        Ok((control, wal::end_of_wal(&instance, None)?))
    })
    .await
}

/// Copies the WAL that only this node has, and lists it. Also for a node that is to be cloned again.
pub async fn save(instance: &Instance, end: &EndOfWal, from: Lsn) -> Result<Saved, RewindError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let dir = instance.private_dir.join("erased").join(format!("{now}-{}-{}", end.timeline, hex(from)));
    let (copied, target, wanted) = (instance.clone(), dir.clone(), end.clone());
    let bytes =
        blocking("saving what a rewind erases", FILES, move || copy_wal(&copied, &target, &wanted, from))
            .await?;
    let listing = list(instance, &dir, end, from).await;
    let commits = match listing {
        Ok(commits) => Some(commits),
        Err(error) => {
            tracing::warn!(node = %instance.node, %error, "the WAL that is erased could not be listed; its copy is kept");
            None
        }
    };
    Ok(Saved { dir, from, to: end.lsn, bytes, commits })
}

fn hex(lsn: Lsn) -> String {
    lsn.to_string().replace('/', "-")
}

fn copy_wal(instance: &Instance, dir: &Path, end: &EndOfWal, from: Lsn) -> Result<u64, RewindError> {
    let control = ControlFile::read(&instance.control_file())?;
    let files = WalFiles::of(instance, &control)?;
    let mut wanted = Vec::new();
    for segment in files.segment_of(from)..=files.segment_of(end.lsn) {
        for timeline in end.history.timelines() {
            let path = files.segment_path(timeline, segment);
            if path.exists() {
                wanted.push(path);
            }
        }
    }
    wanted.extend(
        end.history
            .timelines()
            .map(|timeline| wal::history_path(&files.dir, timeline))
            .filter(|path| path.exists()),
    );
    let bytes = wanted.iter().filter_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.len()).sum();
    durable::create_private_dir(&instance.private_dir.join("erased"))?;
    durable::create_private_dir(dir)?;
    if crate::disk::space(dir)?.free_bytes < bytes + ROOM_BYTES {
        return Err(RewindError::NoRoomToSave { bytes });
    }
    for path in wanted {
        let copy = dir.join(path.file_name().unwrap_or_default());
        fs::copy(&path, &copy).map_err(Error::io("copy", &path))?;
        durable::sync_file(&copy)?;
    }
    durable::sync_dir(dir)?;
    Ok(bytes)
}

/// Writes `erased.txt` and counts the commits.
async fn list(instance: &Instance, dir: &Path, end: &EndOfWal, from: Lsn) -> Result<u64> {
    let program = instance.installation.program("pg_waldump");
    let listing = dir.join("erased.txt");
    let out = fs::File::create(&listing).map_err(Error::io("create", &listing))?;
    let mut command = tokio::process::Command::new(&program);
    command
        .arg("--path")
        .arg(dir)
        .args([
            "--timeline",
            &end.timeline.to_string(),
            "--start",
            &from.to_string(),
            "--end",
            &end.lsn.to_string(),
        ])
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let child = command.spawn().map_err(Error::io("run", &program))?;
    let output = within("listing what is erased", LISTING, async {
        child.wait_with_output().await.map_err(Error::io("wait for", &program))
    })
    .await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Program {
            program: "pg_waldump",
            status: output.status.to_string(),
            output: said,
        });
    }
    blocking("counting what is erased", LISTING, move || {
        use std::io::BufRead;
        let file = fs::File::open(&listing).map_err(Error::io("open", &listing))?;
        let mut commits = 0;
        for line in std::io::BufReader::new(file).lines() {
            let line = line.map_err(Error::io("read", &listing))?;
            commits += u64::from(line.contains("desc: COMMIT"));
        }
        Ok(commits)
    })
    .await
}

/// Recovers a crashed target as a standby of nobody, and stops it. The inner error says why that cannot be.
async fn stop_cleanly(
    instance: &Instance,
    control: &ControlFile,
    end: &EndOfWal,
    source: &History,
) -> Result<Result<(), String>, RewindError> {
    if control.state.stopped_cleanly() {
        return Ok(Ok(()));
    }
    let (prepared, timeline, lsn, source) = (instance.clone(), end.timeline, end.lsn, source.timeline());
    blocking("sealing the target of a rewind", FILES, move || {
        let sealed = read_blocking(&prepared)?.sealed();
        write_blocking(&prepared, &sealed)?;
        durable::remove(&prepared.passfile())?;
        // Histories that it cannot follow would keep it from starting. The source has them all.
        for (number, history) in history::files(&prepared.pg_wal())? {
            if number > timeline && number <= source && !history.contains(timeline, lsn) {
                durable::remove(&wal::history_path(&prepared.pg_wal(), number))?;
            }
        }
        Ok::<_, Error>(())
    })
    .await?;
    let server = match Server::start(instance, STOP).await {
        Ok(server) => server,
        Err(StartError::Failed { log, .. }) => {
            return Ok(Err(format!("it could not be recovered first: {log}")));
        }
        Err(error) => return Err(error.into()),
    };
    let ready = server.ready(STOP).await;
    server.stop(StopMode::Fast, STOP).await?;
    if let Err(error) = ready {
        return Ok(Err(format!("it could not be recovered first: {error}")));
    }
    let path = instance.control_file();
    let control = blocking("reading pg_control", FILES, move || ControlFile::read(&path)).await?;
    match control.state.stopped_cleanly() {
        true => Ok(Ok(())),
        false => Ok(Err(format!("it could not be stopped cleanly: {:?}", control.state))),
    }
}

async fn run(
    instance: &Instance,
    order: &RewindOrder,
    progress: &watch::Sender<Progress>,
) -> Result<Result<(), String>, RewindError> {
    let passfile = instance.private_dir.join("rewind.pgpass");
    {
        let (noted, passfile) = (instance.clone(), passfile.clone());
        let line = passfile_line(roles::REWIND, &Secret::new(order.source.password.reveal()));
        let restore_command = order.restore_command.clone();
        blocking("beginning a rewind", FILES, move || {
            durable::write(&passfile, line.as_bytes(), durable::PRIVATE)?;
            durable::write(&note_path(&noted), b"a rewind was begun\n", durable::PRIVATE)?;
            // The program asks the configuration. From here on nothing starts with it: the note refuses that until the node's own
            // files are back.
            if let Some(restore_command) = restore_command {
                let before = read_blocking(&noted)?;
                write_blocking(&noted, &Managed { restore_command, ..before })?;
            }
            Ok::<_, Error>(())
        })
        .await?;
    }
    let conninfo = Conninfo {
        host: &order.source.host,
        address: order.source.address,
        port: order.source.port,
        user: roles::REWIND,
        application_name: "pgherd_rewind",
        database: Some("postgres"),
        passfile: &passfile,
        tls: &instance.tls,
    }
    .to_string();
    let program = instance.installation.program("pg_rewind");
    let mut command = tokio::process::Command::new(&program);
    command
        .arg("--target-pgdata")
        .arg(&instance.data_dir)
        .args(["--source-server", &conninfo, "--progress", "--no-ensure-shutdown"])
        .args(order.restore_command.as_ref().map(|_| "--restore-target-wal"))
        .current_dir(&instance.data_dir)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(Error::io("run", &program))?;
    let stderr = child.stderr.take().expect("it was piped");
    let mut said: Vec<String> = Vec::new();
    let status = within("rewinding", order.deadline, async {
        let mut lines = BufReader::new(stderr).split(b'\n');
        while let Some(line) =
            lines.next_segment().await.map_err(Error::io("read what it says:", &program))?
        {
            for line in String::from_utf8_lossy(&line).split('\r') {
                match parse_progress(line) {
                    Some(now) => {
                        progress.send_replace(now);
                    }
                    None if line.trim().is_empty() => {}
                    None => said.push(line.trim().to_owned()),
                }
            }
        }
        child.wait().await.map_err(Error::io("wait for", &program))
    })
    .await;
    blocking("removing a password", FILES, move || durable::remove(&passfile)).await?;
    let quoted = said[said.len().saturating_sub(QUOTED_LINES)..].join("; ");
    Ok(match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("pg_rewind failed ({status}): {quoted}")),
        Err(error) => Err(format!("{error}: {quoted}")),
    })
}

/// The source's files came along where they differ from ours.
async fn restore_own_files(
    instance: &Instance,
    settings: &Settings,
    control: &ControlFile,
    names: SyncNames,
) -> Result<(), RewindError> {
    let restored = instance.clone();
    blocking("restoring a node's own files", FILES, move || {
        write_blocking(&restored, &Managed { synchronous_standby_names: names, ..Managed::default() })?;
        durable::write(&restored.data_dir.join(conf::AUTO_CONF), b"", durable::PRIVATE)?;
        durable::touch(&restored.standby_signal())
    })
    .await?;
    let settings = Settings {
        at_least: Some(control.limits),
        data_checksums: control.data_checksums,
        ..settings.clone()
    };
    conf::write(instance, &settings).await?;
    hba::write(instance, Gate::Closed, &Rules::default()).await?;
    let done = instance.clone();
    blocking("ending a rewind", FILES, move || {
        durable::sync_dir(&done.data_dir)?;
        forget_interrupted(&done)
    })
    .await?;
    Ok(())
}

fn note_path(instance: &Instance) -> PathBuf {
    instance.private_dir.join("rewinding")
}
