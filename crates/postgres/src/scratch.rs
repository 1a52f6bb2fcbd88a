//! A server that nobody else knows of, in a directory of its own, for as long as something is to be looked up or fetched from it.
//!
//! ```text
//! DIR/pgherd-scratch-1a2b3c4d/     entered by its owner alone
//!   pgherd.scratch                 says what it is; locked for as long as somebody works with it
//!   data/  tablespaces/            written by a restore
//!   postgresql.conf  hba.conf …    its own configuration; the original's is not read
//!   .s.PGSQL.5432  log             its socket, its log
//! ```
//!
//! It listens on no address, archives nothing, streams from nobody, and loads no library that it is not told to: so no job, no
//! subscription, no trigger and no hook of the original does anything in it. Who comes in is the owner of the directory, as the roles that
//! were named. Its memory is small, and its limits are those that recovery needs.
//!
//! When it is dropped, its processes are killed and its directory is removed. The server does not outlive the program that started it; the
//! directory that a killed program has left is found by its marker, of which nobody holds the lock, and is removed by [`remove_leftovers`].
//!
//! Leaves out: what is in it. Hazard: it deletes a directory with everything in it, and kills the server there. So it touches only what has its
//! marker and belongs to who runs it alone: in a place where everybody may write, anybody can give a directory its name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal};

use crate::control::{ControlFile, Limits};
use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::installation::Installation;
use crate::instance::MAX_SOCKET_PATH_BYTES;
use crate::proc::{self, Process};
use crate::process::{GoneError, PostmasterPid, Status, ensure_gone_blocking};
use crate::sql::{SCRATCH_OPTIONS, SearchPath, Session};

mod checksums;
mod transfer;

pub use checksums::{Checksums, checksums};
pub use transfer::{Dump, Live, LiveError, Transferred, transfer};

/// Its directories are named so, and found by that.
const PREFIX: &str = "pgherd-scratch-";
const MARKER: &str = "pgherd.scratch";
/// Only a part of the name of its socket: it listens on no address.
const PORT: u16 = 5432;
/// How it is told in lists of processes, and from other servers.
const CLUSTER_NAME: &str = "pgherd scratch";
/// Enough for a checkpoint's worth of hot pages, and little beside the servers that work on this host.
const SHARED_BUFFERS: &str = "128MB";
/// Behind so much WAL a restart point lets go of it, so that its directory does not grow with the length of the recovery.
const MAX_WAL: &str = "512MB";
/// PostgreSQL keeps some connections to itself.
const MIN_CONNECTIONS: u32 = 20;
/// From this version on triggers can be set off by a login.
const LOGIN_TRIGGERS: u16 = 17;
/// How long its processes may take to end, and whoever still writes into its directory.
const ENDING: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
const FILES: Duration = Duration::from_secs(10);
const CONNECTING: Duration = Duration::from_secs(30);
/// Of its log, how much an error quotes.
const QUOTED_BYTES: u64 = 4000;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScratchError {
    #[error("the name of a socket in {} would have {bytes} bytes, and {MAX_SOCKET_PATH_BYTES} fit", .dir.display())]
    TooLong { dir: PathBuf, bytes: usize },

    #[error("{} must be an absolute path without quotes, commas or control characters", .dir.display())]
    Path { dir: PathBuf },

    #[error("\"{role}\" cannot be the name of a role")]
    Role { role: String },

    #[error("the scratch server ended: {log}")]
    Ended { log: String },

    #[error("the scratch server did not come to the end of its recovery: it waits at {at}")]
    Waits { at: String },

    #[error("none of the roles {} is a superuser of the scratch server: {why}", .tried.join(", "))]
    NoRole { tried: Vec<String>, why: String },

    #[error("the scratch server could not be ended")]
    Gone(#[from] GoneError),

    #[error(transparent)]
    Other(#[from] Error),
}

impl ScratchError {
    pub fn hint(&self) -> Option<String> {
        match self {
            ScratchError::TooLong { .. } | ScratchError::Path { .. } => {
                Some("choose another directory, with a short path, with --scratch-dir".to_owned())
            }
            ScratchError::NoRole { .. } => {
                Some("--superuser names one of the restored cluster's superusers".to_owned())
            }
            ScratchError::Ended { log } if log.contains("resource manager") => Some(
                "an extension writes WAL of its own kind: --preload names its library, as shared_preload_libraries did".to_owned(),
            ),
            ScratchError::Ended { log } if log.contains("shared memory") => {
                Some("the original's max_connections and max_locks_per_transaction take memory here, too".to_owned())
            }
            ScratchError::Other(error) => error.hint().map(str::to_owned),
            ScratchError::Gone(error) => error.hint().map(str::to_owned),
            _ => None,
        }
    }
}

/// How it is run.
#[derive(Clone, Debug)]
pub struct How {
    /// As who it is connected to, the first that is there and a superuser.
    pub roles: Vec<String>,
    /// Libraries that recovery or the data need; none of the original's are loaded by themselves.
    pub preload: String,
    /// Without it nothing is flushed, which is much faster, and takes nothing from who throws it away.
    pub flush: bool,
    /// Takes processor and disk only where nobody else wants them.
    pub modest: bool,
}

/// Where it has got to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It replays. The segment is that of its process title; there is none while it looks for its WAL.
    Recovering { segment: Option<String> },
    /// Waits at its target, and answers reads.
    Paused,
    /// Recovery has ended, and it takes writes.
    Primary,
    /// It has stopped by itself, at a target perhaps.
    Ended,
}

/// What an earlier program left, and what became of it.
#[derive(Debug)]
pub struct Leftover {
    pub dir: PathBuf,
    pub removed: Result<(), ScratchError>,
}

/// A name for a directory that is not there yet.
pub fn choose(parent: &Path) -> Result<PathBuf, ScratchError> {
    let plain = |byte: &u8| !byte.is_ascii_control() && !b"'\"\\,`$ #".contains(byte);
    if !parent.is_absolute() || parent.to_str().is_none() || !parent.as_os_str().as_bytes().iter().all(plain)
    {
        return Err(ScratchError::Path { dir: parent.to_owned() });
    }
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let number = since.subsec_nanos() ^ (std::process::id() << 12);
    let dir = parent.join(format!("{PREFIX}{number:08x}"));
    let bytes = dir.join(format!(".s.PGSQL.{PORT}")).as_os_str().len();
    if bytes > MAX_SOCKET_PATH_BYTES {
        return Err(ScratchError::TooLong { dir, bytes });
    }
    Ok(dir)
}

/// The data directory in a directory of [`choose`], and where its tablespaces lie.
pub fn places(dir: &Path) -> (PathBuf, PathBuf) {
    (dir.join("data"), dir.join("tablespaces"))
}

/// Ends and removes what earlier programs left in `parent`. Blocks.
pub fn remove_leftovers(parent: &Path) -> Vec<Leftover> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().as_bytes().starts_with(PREFIX.as_bytes()));
    let mut leftovers = Vec::new();
    for dir in named.map(|entry| entry.path()).filter(|dir| is_own(dir)) {
        // None of ours: not there.
        let Ok(marker) = OpenOptions::new().read(true).write(true).open(dir.join(MARKER)) else { continue };
        if flock(&marker, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let removed = remove(&dir);
        leftovers.push(Leftover { dir, removed });
    }
    leftovers
}

/// Whether nobody else can have put anything into a directory, or can put another one in its place.
fn is_own(dir: &Path) -> bool {
    let owner = rustix::process::geteuid().as_raw();
    // Not followed: a link leads anywhere.
    fs::symlink_metadata(dir)
        .is_ok_and(|found| found.is_dir() && found.uid() == owner && found.mode() & 0o077 == 0)
}

/// The directory of a server that is not wanted any more, with its processes. The marker goes last, so that what is cut off is
/// found again.
fn remove(dir: &Path) -> Result<(), ScratchError> {
    let (data, _) = places(dir);
    ensure_gone_blocking(&data, ENDING)?;
    let until = Instant::now() + ENDING;
    loop {
        let tried = remove_all_but_marker(dir);
        // A reader of a restore that was given up may still be at its last file.
        match tried {
            Err(_) if Instant::now() < until => std::thread::sleep(POLL),
            other => {
                other?;
                break;
            }
        }
    }
    fs::remove_file(dir.join(MARKER)).map_err(Error::io("remove", dir.join(MARKER)))?;
    Ok(fs::remove_dir(dir).map_err(Error::io("remove", dir))?)
}

fn remove_all_but_marker(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let path = entry.path();
        if entry.file_name() == MARKER {
            continue;
        }
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A directory that is there for as long as this value is, with the server in it.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    /// Locked.
    _marker: File,
    postmaster: Option<Arc<Process>>,
    role: Option<String>,
    removed: bool,
}

impl Scratch {
    /// Makes the directory that was chosen. `note` says for people what it is for.
    pub fn make(dir: &Path, note: &str) -> Result<Scratch, ScratchError> {
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        fs::DirBuilder::new().mode(0o700).create(dir).map_err(Error::io("create", dir))?;
        // Locked before it has the name by which it is found.
        let beside = dir.join("marker");
        let opened = OpenOptions::new().write(true).create_new(true).mode(durable::PRIVATE).open(&beside);
        let mut marker = opened.map_err(Error::io("create", &beside))?;
        flock(&marker, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| Error::io("lock", &beside)(errno.into()))?;
        let text = format!("{note}\nIt is removed when that is over, or by the next one that comes here.\n");
        marker.write_all(text.as_bytes()).map_err(Error::io("write", &beside))?;
        fs::rename(&beside, dir.join(MARKER)).map_err(Error::io("rename", &beside))?;
        Ok(Scratch { dir: dir.to_owned(), _marker: marker, postmaster: None, role: None, removed: false })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn data_dir(&self) -> PathBuf {
        places(&self.dir).0
    }

    /// Starts the server in the data directory that was restored. Recovery goes on behind this, see [`Scratch::state`]. It ends with the thread that
    /// calls this.
    pub async fn start(&mut self, installation: &Installation, how: &How) -> Result<(), ScratchError> {
        let os_user = crate::instance::os_user().await?;
        let (dir, data) = (self.dir.clone(), self.data_dir());
        let control = {
            let data = data.clone();
            blocking("reading pg_control", FILES, move || ControlFile::of(&data)).await?
        };
        let mut map = String::new();
        for role in &how.roles {
            if role.is_empty() || role.contains(['"', '\n', '\r', '\0']) {
                return Err(ScratchError::Role { role: role.clone() });
            }
            map.push_str(&format!("scratch \"{os_user}\" \"{role}\"\n"));
        }
        let write = |name: &str, text: &str| durable::put(&dir.join(name), text.as_bytes(), durable::PRIVATE);
        write(
            "postgresql.conf",
            "# Everything is said on the command line; the original's file is not read.\n",
        )?;
        write("hba.conf", "local all all peer map=scratch\n")?;
        write("ident.conf", &map)?;
        let log_path = self.log_path();
        // A new one each time: what an earlier start said is over.
        durable::remove(&log_path)?;
        let log = OpenOptions::new().create(true).append(true).mode(durable::PRIVATE).open(&log_path);
        let log = log.map_err(Error::io("open", &log_path))?;
        let mut command = Command::new(installation.program("postgres"));
        command.arg("-D").arg(&data);
        for (name, value) in settings(&self.dir, installation.version.major, control.limits, how) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("LANG", "C.UTF-8")
            .current_dir(&data)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(Error::io("open", &log_path))?)
            .stderr(log);
        let modest = how.modest;
        #[allow(unsafe_code)]
        // SAFETY: between fork and exec only setsid(2), prctl(2) and setpriority(2) are called, which allocate nothing.
        unsafe {
            command.pre_exec(move || {
                rustix::process::setsid()?;
                // An immediate stop when the thread ends that starts it, as it does when its program is killed.
                rustix::process::set_parent_process_death_signal(Some(Signal::QUIT))?;
                if modest {
                    // What the disk's scheduler makes of it follows from it.
                    rustix::process::setpriority_process(None, LOWEST_PRIORITY)?;
                }
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(Error::io("run", installation.program("postgres")))?;
        let pid = Pid::from_child(&child);
        let vanished = || Error::Answer { what: "PostgreSQL vanished while it started".into() };
        let postmaster = Arc::new(Process::open(pid)?.ok_or_else(vanished)?);
        self.postmaster = Some(Arc::clone(&postmaster));
        self.role = None;
        tokio::spawn(async move {
            postmaster.ended().await;
            if let Err(error) = child.wait() {
                tracing::warn!(%error, "cannot take note of the end of a scratch server");
            }
        });
        Ok(())
    }

    /// Where it has got to, after a look at its files and processes, and a question once it answers. Blocks for moments.
    pub async fn state(&mut self, how: &How) -> Result<State, ScratchError> {
        let Some(postmaster) = self.postmaster.clone() else { return Ok(State::Ended) };
        if postmaster.has_ended() {
            return Ok(State::Ended);
        }
        let file = PostmasterPid::read(&self.data_dir())?.filter(|file| file.pid == postmaster.pid);
        if file.and_then(|file| file.status) != Some(Status::Ready) {
            return Ok(State::Recovering { segment: replaying(&postmaster)? });
        }
        let session = match self.connect("postgres", how).await {
            // Recovery may come to its end, or fail, between the look and the question.
            Err(ScratchError::Other(Error::Connect { .. })) if postmaster.has_ended() => {
                return Ok(State::Ended);
            }
            other => other?,
        };
        let question = "SELECT pg_catalog.pg_is_in_recovery(), \
                        CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_get_wal_replay_pause_state() END";
        let row = match session.query_one(question, &[]).await {
            Ok(row) => row,
            // The end of recovery ends no session; whatever else it was is asked again, or is the end.
            Err(_) if postmaster.has_ended() => return Ok(State::Ended),
            Err(source) => return Err(Error::sql("say whether it recovers")(source).into()),
        };
        let (recovers, pause): (bool, Option<String>) = (row.get(0), row.get(1));
        Ok(match (recovers, pause.as_deref()) {
            (false, _) => State::Primary,
            (true, Some("paused")) => State::Paused,
            (true, _) => State::Recovering { segment: replaying(&postmaster)? },
        })
    }

    /// A session of a superuser.
    pub async fn connect(&mut self, database: &str, how: &How) -> Result<Session, ScratchError> {
        self.connect_with(database, SearchPath::Empty, how).await
    }

    /// The same, with another path.
    pub async fn connect_with(
        &mut self,
        database: &str,
        path: SearchPath,
        how: &How,
    ) -> Result<Session, ScratchError> {
        if let Some(role) = &self.role {
            return Ok(Session::scratch(&self.dir, PORT, role, database, path, CONNECTING).await?);
        }
        let mut why = String::new();
        for role in &how.roles {
            match Session::scratch(&self.dir, PORT, role, database, path, CONNECTING).await {
                Ok(session) => {
                    let asked = session
                        .query_one(
                            "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user",
                            &[],
                        )
                        .await;
                    if asked.is_ok_and(|row| row.get(0)) {
                        self.role = Some(role.clone());
                        return Ok(session);
                    }
                    why = format!("{role} is none");
                }
                Err(Error::Connect { source, server }) => {
                    let refused = source.as_db_error().is_some_and(|error| {
                        *error.code() == tokio_postgres::error::SqlState::INVALID_AUTHORIZATION_SPECIFICATION
                    });
                    if !refused {
                        return Err(Error::Connect { source, server }.into());
                    }
                    why = Error::Connect { source, server }.to_string();
                }
                Err(other) => return Err(other.into()),
            }
        }
        Err(ScratchError::NoRole { tried: how.roles.clone(), why })
    }

    /// How libpq comes in, after somebody has connected.
    pub fn conninfo(&self, database: &str) -> String {
        let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
        let role = self.role.as_deref().unwrap_or_default();
        format!(
            "host={} port={PORT} user={} dbname={} options={}",
            quoted(&self.dir.display().to_string()),
            quoted(role),
            quoted(database),
            quoted(SCRATCH_OPTIONS)
        )
    }

    /// Stops it as who wants its files to be whole.
    pub async fn stop(&mut self, deadline: Duration) -> Result<(), ScratchError> {
        let Some(postmaster) = self.postmaster.take() else { return Ok(()) };
        let asked = postmaster.signal(Signal::INT)?;
        if asked && !postmaster.ended_within(deadline).await {
            return Err(Error::Deadline { doing: "stopping the scratch server", after: deadline }.into());
        }
        let data = self.data_dir();
        let control = blocking("reading pg_control", FILES, move || ControlFile::of(&data)).await?;
        match control.state.stopped_cleanly() {
            true => Ok(()),
            false => Err(ScratchError::Ended { log: self.quote() }),
        }
    }

    /// Ends it as it is, so that it can be started with other limits.
    pub async fn end(&mut self) -> Result<(), ScratchError> {
        self.postmaster = None;
        let data = self.data_dir();
        Ok(blocking("ending the scratch server", ENDING * 2, move || ensure_gone_blocking(&data, ENDING))
            .await
            .map(drop)?)
    }

    /// Why it ended, as its log says.
    pub fn ended(&self) -> ScratchError {
        ScratchError::Ended { log: self.quote() }
    }

    /// Whether it waits because the original's limits were raised on the way, so that its own are too low.
    pub fn lacks_limits(&self) -> bool {
        self.tail().contains("insufficient parameter settings")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn tail(&self) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.log_path())?;
            let end = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(end.saturating_sub(QUOTED_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(QUOTED_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }

    fn quote(&self) -> String {
        let text = self.tail();
        let telling = |line: &&str| {
            ["FATAL:", "PANIC:", "ERROR:", "HINT:", "DETAIL:", "could not"]
                .iter()
                .any(|word| line.contains(word))
        };
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let chosen: Vec<&str> = lines.iter().copied().filter(telling).collect();
        let chosen = if chosen.is_empty() { lines } else { chosen };
        chosen[chosen.len().saturating_sub(4)..].join(" | ")
    }

    /// Ends it and removes its directory.
    pub async fn remove(mut self) -> Result<(), ScratchError> {
        self.removed = true;
        let dir = self.dir.clone();
        blocking("removing the scratch server", ENDING * 3, move || remove(&dir)).await
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        if let Err(error) = remove(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "a scratch server is left");
        }
    }
}

const LOWEST_PRIORITY: i32 = 19;

/// All that makes it one that nobody else hears of. On the command line they win over what `ALTER SYSTEM` has left in the data directory.
fn settings(dir: &Path, major: u16, limits: Limits, how: &How) -> Vec<(&'static str, String)> {
    let at = |name: &str| dir.join(name).display().to_string();
    let mut settings = vec![
        ("config_file", at("postgresql.conf")),
        ("hba_file", at("hba.conf")),
        ("ident_file", at("ident.conf")),
        ("external_pid_file", String::new()),
        ("listen_addresses", String::new()),
        ("port", PORT.to_string()),
        ("unix_socket_directories", dir.display().to_string()),
        ("unix_socket_permissions", "0700".to_owned()),
        ("unix_socket_group", String::new()),
        ("ssl", "off".to_owned()),
        ("cluster_name", CLUSTER_NAME.to_owned()),
        ("update_process_title", "on".to_owned()),
        ("logging_collector", "off".to_owned()),
        ("log_destination", "stderr".to_owned()),
        ("log_min_messages", "warning".to_owned()),
        ("log_statement", "none".to_owned()),
        // Neither into the original's archive nor from its servers.
        ("archive_mode", "off".to_owned()),
        ("primary_conninfo", String::new()),
        ("primary_slot_name", String::new()),
        ("synchronous_standby_names", String::new()),
        ("recovery_min_apply_delay", "0".to_owned()),
        ("max_logical_replication_workers", "0".to_owned()),
        // Libraries can start workers, jobs and telemetry.
        ("shared_preload_libraries", how.preload.clone()),
        ("session_preload_libraries", String::new()),
        ("local_preload_libraries", String::new()),
        // Neither triggers nor event triggers.
        ("session_replication_role", "replica".to_owned()),
        ("autovacuum", "off".to_owned()),
        ("hot_standby", "on".to_owned()),
        ("restart_after_crash", "off".to_owned()),
        ("shared_buffers", SHARED_BUFFERS.to_owned()),
        ("huge_pages", "off".to_owned()),
        ("max_wal_size", MAX_WAL.to_owned()),
        ("min_wal_size", "80MB".to_owned()),
        ("wal_keep_size", "0".to_owned()),
        ("fsync", if how.flush { "on" } else { "off" }.to_owned()),
    ];
    if major >= LOGIN_TRIGGERS {
        settings.push(("event_triggers", "off".to_owned()));
        settings.push(("summarize_wal", "off".to_owned()));
    }
    for (name, least) in limits.named() {
        let least = if name == "max_connections" { least.max(MIN_CONNECTIONS) } else { least };
        settings.push((name, least.to_string()));
    }
    settings
}

/// The segment that its startup process says it is at.
fn replaying(postmaster: &Process) -> Result<Option<String>> {
    let titles = proc::children_of(postmaster.pid)?.into_iter().map(|child| child.title());
    Ok(titles.filter(|title| title.contains("startup")).find_map(|title| segment_of(&title)))
}

/// `postgres: pgherd scratch: startup recovering 000000010000000000000003`
fn segment_of(title: &str) -> Option<String> {
    let name = title.trim_end().rsplit(' ').next()?;
    let is_segment = name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_segment.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn how() -> How {
        How { roles: vec!["postgres".into()], preload: String::new(), flush: false, modest: false }
    }

    #[test]
    fn a_directory_goes_with_its_value_and_what_was_left_goes_with_the_next_one() {
        let parent = tempfile::tempdir().unwrap();
        let dir = choose(parent.path()).unwrap();
        let scratch = Scratch::make(&dir, "a test").unwrap();
        let (data, spaces) = places(&dir);
        fs::create_dir_all(data.join("base/1")).unwrap();
        fs::create_dir_all(spaces.join("16385")).unwrap();
        fs::write(data.join("base/1/1259"), "x").unwrap();
        assert!(remove_leftovers(parent.path()).is_empty(), "somebody works with it");
        drop(scratch);
        assert!(!dir.exists());

        let dir = choose(parent.path()).unwrap();
        let mut scratch = Scratch::make(&dir, "a test").unwrap();
        fs::create_dir_all(places(&dir).0).unwrap();
        // As a killed program leaves it.
        scratch.removed = true;
        drop(scratch);
        let like_ours = |name: &str, mode: u32, marker: bool| {
            let dir = parent.path().join(format!("{PREFIX}{name}"));
            fs::DirBuilder::new().mode(mode).create(&dir).unwrap();
            fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
            fs::write(dir.join("thesis"), "x").unwrap();
            if marker {
                fs::write(dir.join(MARKER), "").unwrap();
            }
            dir.join("thesis")
        };
        let without_marker = like_ours("mine", 0o700, false);
        let open_to_all = like_ours("open", 0o777, true);
        let elsewhere = parent.path().join("elsewhere");
        fs::rename(like_ours("linked", 0o700, true).parent().unwrap(), &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, parent.path().join("pgherd-scratch-linked")).unwrap();
        let left = remove_leftovers(parent.path());
        assert!(left.len() == 1 && left[0].dir == dir && left[0].removed.is_ok(), "{left:?}");
        assert!(!dir.exists());
        assert!(without_marker.exists() && open_to_all.exists());
        assert!(elsewhere.join("thesis").exists(), "what a link leads to is somebody's");
    }

    #[test]
    fn a_path_that_a_socket_does_not_fit_into_is_refused_before_anything_is_made() {
        let long = format!("/{}", "x".repeat(90));
        assert!(matches!(choose(Path::new(&long)), Err(ScratchError::TooLong { .. })));
        assert!(matches!(choose(Path::new("/it's")), Err(ScratchError::Path { .. })));
        assert!(matches!(choose(Path::new("relative")), Err(ScratchError::Path { .. })));
    }

    #[test]
    fn nobody_hears_of_it_and_recovery_has_what_it_needs() {
        let limits = Limits {
            max_connections: 5000,
            max_worker_processes: 9,
            max_wal_senders: 11,
            max_prepared_transactions: 3,
            max_locks_per_transaction: 65,
        };
        let settings = settings(Path::new("/s"), 17, limits, &how());
        let of = |name: &str| {
            let mut all =
                settings.iter().filter(|(known, _)| *known == name).map(|(_, value)| value.as_str());
            let value = all.next().unwrap_or_else(|| panic!("{name}"));
            assert!(all.next().is_none(), "{name} is said twice");
            value.to_owned()
        };
        for (name, value) in [
            ("listen_addresses", ""),
            ("archive_mode", "off"),
            ("primary_conninfo", ""),
            ("shared_preload_libraries", ""),
            ("event_triggers", "off"),
            ("max_connections", "5000"),
            ("max_prepared_transactions", "3"),
            ("unix_socket_directories", "/s"),
        ] {
            assert_eq!(of(name), value, "{name}");
        }
    }

    #[test]
    fn a_startup_process_says_where_it_is() {
        let title = "postgres: pgherd scratch: startup recovering 000000010000000A000000F3";
        assert_eq!(segment_of(title).as_deref(), Some("000000010000000A000000F3"));
        assert_eq!(segment_of("postgres: startup "), None);
    }
}
