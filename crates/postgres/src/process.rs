//! Starting, adopting, watching and ending one PostgreSQL.
//!
//! It is started detached, in a session of its own, so that it outlives the agent; another agent finds it again
//! by `postmaster.pid` and believes that file only where `/proc` agrees. It is started as a standby always
//! (rule 7): `standby.signal` is on disk before the program runs.
//!
//! [`ensure_gone`] is rule 13. Backends are sessions of their own, so killing the postmaster's process group
//! leaves them running, and one of them can still write (S12): so every process that stands in the data
//! directory is killed, until none is seen twice in a row and the kernel says that the shared memory is free.
//!
//! Leaves out: when to do any of this. Hazard: a second server on one data directory, or a backend that writes
//! behind a confirmed stop, loses data.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::conf;
use crate::control::ControlFile;
use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::instance::Instance;
use crate::logs;
use crate::proc::{self, Held, Process};
use crate::rewind;
use crate::sync_names;
use crate::wal::{self, history};

const POSTMASTER_PID: &str = "postmaster.pid";
/// How often `postmaster.pid` is looked at while a server starts. There is no event to wait for that PostgreSQL
/// gives in every version.
const START_POLL: Duration = Duration::from_millis(2);
/// Between two looks at `/proc` while processes die.
const GONE_POLL: Duration = Duration::from_millis(2);
/// After a SIGQUIT PostgreSQL's own patience with its children is 5 s; ours is shorter.
const IMMEDIATE_STOP: Duration = Duration::from_secs(1);
/// For the log collector, when all others are gone.
const LAST_LINES: Duration = Duration::from_millis(100);
/// The startup log is cut before a start when it is longer.
const STARTUP_LOG_MAX_BYTES: u64 = 1 << 20;
/// Of the logs, how much an error quotes.
const QUOTED_BYTES: u64 = 2000;
const FILES: Duration = Duration::from_secs(10);

/// What `postmaster.pid` says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Starting,
    /// In recovery and not yet consistent: no connections.
    Standby,
    /// Accepts connections, as a primary or as a hot standby.
    Ready,
    Stopping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Ends sessions, writes a checkpoint, waits until the standbys have all WAL.
    Fast,
    /// Drops everything; what was not written is recovered at the next start.
    Immediate,
    Kill,
}

/// What it took in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    Cleanly,
    Immediately,
    Killed,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    #[error("{} has no data", .data_dir.display())]
    NoData { data_dir: PathBuf },

    #[error("PostgreSQL already runs in {} (processes {})", .data_dir.display(), pid_list(.pids))]
    AlreadyRunning { data_dir: PathBuf, pids: Vec<i32> },

    #[error("{} was being rewound when that was cut off", .data_dir.display())]
    HalfRewound { data_dir: PathBuf },

    #[error("PostgreSQL did not start in {}: {log}", .data_dir.display())]
    Failed { data_dir: PathBuf, log: String },

    #[error("PostgreSQL in {} was not ready within {} ms ({status:?}): {log}", .data_dir.display(), .after.as_millis())]
    NotReady { data_dir: PathBuf, after: Duration, status: Option<Status>, log: String },

    #[error(transparent)]
    Other(#[from] Error),
}

impl StartError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            StartError::HalfRewound { .. } => Some("it has to be cloned again: pgherd reinit"),
            StartError::NoData { .. } => Some("the node has to be cloned or restored first: pgherd reinit"),
            StartError::AlreadyRunning { .. } => {
                Some("another program started it; stop it there, pgherd does not")
            }
            StartError::Failed { log, .. } if log.contains("Address already in use") => {
                Some("another program listens on this port: ss -ltnp")
            }
            StartError::Failed { log, .. } if log.contains("could not create shared memory segment") => {
                Some("shared_buffers is more than the machine gives")
            }
            StartError::Failed { log, .. } if log.contains("is not a child of this server's history") => {
                Some("this node went another way than the primary: it has to be rewound or cloned again")
            }
            StartError::Failed { .. } | StartError::NotReady { .. } => Some("the whole log: pgherd logs"),
            StartError::Other(error) => error.hint(),
        }
    }
}

fn pid_list(pids: &[i32]) -> String {
    pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")
}

/// Some processes could not be brought to an end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GoneError {
    #[error("PostgreSQL in {} could not be killed within {} ms: {}", .data_dir.display(), .after.as_millis(), left_list(.left))]
    ProcessesLeft { data_dir: PathBuf, after: Duration, left: Vec<Left> },

    #[error("{attached} processes still hold the shared memory {id} of {}", .data_dir.display())]
    SharedMemoryHeld { data_dir: PathBuf, id: i64, attached: u64 },

    #[error(transparent)]
    Other(#[from] Error),
}

impl GoneError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            GoneError::ProcessesLeft { left, .. } if left.iter().any(|process| process.state == 'D') => Some(
                "a process in state D waits for a disk that does not answer: only that or a reboot ends it",
            ),
            GoneError::ProcessesLeft { .. } => Some("a frozen cgroup does not die before it is thawed"),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub pid: i32,
    /// The kernel's letter: `D` waits for a disk, `T` is frozen.
    pub state: char,
    pub command: String,
}

impl Left {
    fn of(process: &proc::Seen) -> Left {
        Left {
            pid: process.pid.as_raw_nonzero().get(),
            state: char::from(process.state),
            command: String::from_utf8_lossy(&process.command).into_owned(),
        }
    }
}

fn left_list(left: &[Left]) -> String {
    let each = left
        .iter()
        .map(|process| format!("{} ({}) in state {}", process.pid, process.command, process.state));
    each.collect::<Vec<_>>().join(", ")
}

/// What is there when an agent comes back.
#[derive(Debug)]
pub enum Found {
    Running(Server),
    /// Processes without a postmaster, or with one that is not ours: [`ensure_gone`] before anything else.
    Leftovers(Vec<i32>),
    Nothing,
}

/// A running PostgreSQL. Dropping this neither stops nor harms it.
#[derive(Clone, Debug)]
pub struct Server {
    instance: Instance,
    postmaster: Arc<Process>,
}

impl Server {
    /// Starts it as a standby and returns when it holds its data directory and its sockets; connections come later,
    /// see [`Server::ready`].
    pub async fn start(instance: &Instance, deadline: Duration) -> Result<Server, StartError> {
        let until = Instant::now() + deadline;
        let prepared = {
            let instance = instance.clone();
            blocking("preparing the data directory", FILES.min(deadline), move || prepare(&instance)).await?
        };
        let mut child = spawn(instance, prepared.log)?;
        let pid = Pid::from_child(&child);
        let vanished = || Error::Answer { what: "PostgreSQL vanished while it started".into() };
        let postmaster = Process::open(pid)?.ok_or_else(vanished)?;
        let server = Server { instance: instance.clone(), postmaster: Arc::new(postmaster) };

        // Whoever starts a program has to take note of its end, else its process number stays taken.
        let watched = Arc::clone(&server.postmaster);
        tokio::spawn(async move {
            watched.ended().await;
            if let Err(error) = child.wait() {
                tracing::warn!(%error, "cannot take note of the end of PostgreSQL");
            }
        });

        loop {
            if server.status()?.is_some() {
                let noted = server.clone();
                blocking("noting the start", FILES, move || sync_names::note_start(&noted)).await?;
                return Ok(server);
            }
            if server.postmaster.ended_within(START_POLL).await {
                last_lines(instance).await?;
                let left = ensure_gone(instance, IMMEDIATE_STOP).await;
                let failed = server.failed(prepared.log_from);
                return Err(match left {
                    Ok(_) => failed,
                    Err(error) => Error::Answer { what: format!("{failed}; {error}") }.into(),
                });
            }
            if Instant::now() >= until {
                let log = quote(instance, prepared.log_from);
                let data_dir = instance.data_dir.clone();
                return Err(StartError::NotReady { data_dir, after: deadline, status: None, log });
            }
        }
    }

    /// Finds the server that an earlier agent started. See [`crate::promote::pending`] for what that agent may have been
    /// in the middle of.
    pub async fn find(instance: &Instance) -> Result<Found> {
        let looked = instance.clone();
        let (running, others) = blocking("looking for PostgreSQL", FILES, move || {
            let file = PostmasterPid::read(&looked.data_dir)?;
            let seen = proc::of_data_dir(&looked.data_dir)?;
            let main = file.filter(|file| seen.iter().any(|process| process.pid == file.pid));
            Ok::<_, Error>((main, seen))
        })
        .await?;
        let Some(file) = running else {
            let pids: Vec<i32> = others.iter().map(|process| process.pid.as_raw_nonzero().get()).collect();
            return Ok(if pids.is_empty() { Found::Nothing } else { Found::Leftovers(pids) });
        };
        // Held first, recognised after: the number could have changed hands since the scan.
        let Some(postmaster) = Process::open(file.pid)? else { return Ok(Found::Nothing) };
        let parent_is_postgres = proc::look(file.pid)
            .and_then(|seen| seen.parent)
            .and_then(proc::look)
            .is_some_and(|parent| parent.is_postgres());
        let same_program =
            match (proc::executable(file.pid), fs::canonicalize(instance.installation.program("postgres"))) {
                (Some(runs), Ok(ours)) => runs == ours,
                // The package was upgraded and its directory is gone: the server that runs is still ours.
                (Some(runs), Err(_)) => runs.file_name().is_some_and(|name| name == "postgres"),
                (None, _) => false,
            };
        if !proc::is_postgres_in(file.pid, &instance.data_dir)? || parent_is_postgres || !same_program {
            return Ok(Found::Leftovers(vec![file.pid.as_raw_nonzero().get()]));
        }
        Ok(Found::Running(Server { instance: instance.clone(), postmaster: Arc::new(postmaster) }))
    }

    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    pub fn pid(&self) -> i32 {
        self.postmaster.pid.as_raw_nonzero().get()
    }

    pub(crate) fn postmaster(&self) -> &Process {
        &self.postmaster
    }

    /// Returns at once when the postmaster ends.
    pub async fn dead(&self) {
        self.postmaster.ended().await;
    }

    pub fn is_dead(&self) -> bool {
        self.postmaster.has_ended()
    }

    /// What it says of itself; `None` while it has not said anything yet.
    pub fn status(&self) -> Result<Option<Status>> {
        Ok(self.postmaster_pid()?.and_then(|file| file.status))
    }

    /// Waits until it accepts connections.
    pub async fn ready(&self, deadline: Duration) -> Result<(), StartError> {
        let until = Instant::now() + deadline;
        loop {
            let status = self.status()?;
            if status == Some(Status::Ready) {
                return Ok(());
            }
            if self.postmaster.ended_within(START_POLL).await {
                return Err(self.failed(0));
            }
            if Instant::now() >= until {
                let data_dir = self.instance.data_dir.clone();
                let log = quote(&self.instance, 0);
                return Err(StartError::NotReady { data_dir, after: deadline, status, log });
            }
        }
    }

    /// Makes it read its configuration again. It says nothing about when each process has.
    pub fn reload(&self) -> Result<()> {
        self.signal(Signal::HUP)
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        match self.postmaster.signal(signal)? {
            true => Ok(()),
            false => Err(Error::Answer { what: format!("PostgreSQL (process {}) is gone", self.pid()) }),
        }
    }

    /// Stops it, harder after each deadline, and returns when every process of it is gone.
    pub async fn stop(&self, mode: StopMode, deadline: Duration) -> Result<Stopped, GoneError> {
        let mut how = Stopped::Killed;
        if mode == StopMode::Fast {
            self.postmaster.signal(Signal::INT)?;
            if self.postmaster.ended_within(deadline).await {
                let path = self.instance.control_file();
                let control = blocking("reading pg_control", FILES, move || ControlFile::read(&path)).await?;
                if control.state.stopped_cleanly() {
                    how = Stopped::Cleanly;
                }
            }
        }
        if mode != StopMode::Kill && how != Stopped::Cleanly {
            self.postmaster.signal(Signal::QUIT)?;
            if self.postmaster.ended_within(IMMEDIATE_STOP).await {
                how = Stopped::Immediately;
            }
        }
        if how != Stopped::Killed {
            last_lines(&self.instance).await?;
        }
        ensure_gone(&self.instance, deadline.max(IMMEDIATE_STOP)).await?;
        Ok(how)
    }

    fn postmaster_pid(&self) -> Result<Option<PostmasterPid>> {
        Ok(PostmasterPid::read(&self.instance.data_dir)?.filter(|file| file.pid == self.postmaster.pid))
    }

    fn failed(&self, log_from: u64) -> StartError {
        let log = quote(&self.instance, log_from);
        StartError::Failed { data_dir: self.instance.data_dir.clone(), log }
    }
}

/// How [`ensure_gone`] found things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone {
    pub killed: usize,
}

/// Kills every process of this PostgreSQL and returns when they are gone and their shared memory is free. Then, and
/// only then, a stale `postmaster.pid` is removed. Works on a frozen server, and where nothing runs.
pub async fn ensure_gone(instance: &Instance, deadline: Duration) -> Result<Gone, GoneError> {
    let data_dir = instance.data_dir.clone();
    blocking("killing PostgreSQL", deadline + IMMEDIATE_STOP, move || {
        ensure_gone_blocking(&data_dir, deadline)
    })
    .await
}

/// The same for a program without a runtime: the fence.
pub fn ensure_gone_blocking(data_dir: &Path, deadline: Duration) -> Result<Gone, GoneError> {
    let until = Instant::now() + deadline;
    let file = data_dir.join(POSTMASTER_PID);
    let shm = PostmasterPid::read(data_dir)?.and_then(|file| file.shm_id);
    let mut killed = std::collections::BTreeSet::new();
    let mut empty_looks = 0;
    while empty_looks < 2 {
        let seen = proc::of_data_dir(data_dir)?;
        if seen.is_empty() {
            empty_looks += 1;
            continue;
        }
        empty_looks = 0;
        if Instant::now() >= until {
            let left = seen.iter().map(Left::of).collect();
            return Err(GoneError::ProcessesLeft { data_dir: data_dir.to_owned(), after: deadline, left });
        }
        let mut dying = Vec::new();
        for process in seen {
            let Some(held) = Held::open(process.pid)? else { continue };
            // Held first, compared after: the number can have changed hands since the look.
            let same = proc::look(process.pid).is_some_and(|now| now.command == process.command);
            if same && held.signal(Signal::KILL)? {
                killed.insert(process.pid.as_raw_nonzero());
                dying.push(held);
            }
        }
        for process in &dying {
            process.wait(GONE_POLL);
        }
    }
    if let Some(id) = shm {
        while let Some(attached) = proc::attached_to_shm(id)?.filter(|attached| *attached > 0) {
            if Instant::now() >= until {
                return Err(GoneError::SharedMemoryHeld { data_dir: data_dir.to_owned(), id, attached });
            }
            std::thread::sleep(GONE_POLL);
        }
    }
    match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", &file)(error).into())
        }
        _ => Ok(Gone { killed: killed.len() }),
    }
}

/// Looks for processes on a thread of its own: to compare directories can hang with the disk they are on.
async fn look(instance: &Instance, until: Instant) -> Result<Vec<proc::Seen>> {
    let data_dir = instance.data_dir.clone();
    let left = until.saturating_duration_since(Instant::now()).max(IMMEDIATE_STOP);
    blocking("looking for PostgreSQL's processes", left, move || proc::of_data_dir(&data_dir)).await
}

/// The log collector ends by itself behind all others, and has then written down why they did.
async fn last_lines(instance: &Instance) -> Result<()> {
    let until = Instant::now() + LAST_LINES;
    while Instant::now() < until && !look(instance, until).await?.is_empty() {
        tokio::time::sleep(GONE_POLL).await;
    }
    Ok(())
}

struct Prepared {
    log: fs::File,
    log_from: u64,
}

/// All that has to be on disk before the program runs.
fn prepare(instance: &Instance) -> Result<Prepared, StartError> {
    let data_dir = instance.data_dir.clone();
    if !instance.has_data() {
        return Err(StartError::NoData { data_dir });
    }
    if rewind::interrupted(instance)? {
        return Err(StartError::HalfRewound { data_dir });
    }
    let running = proc::of_data_dir(&data_dir)?;
    if !running.is_empty() {
        let pids = running.iter().map(|process| process.pid.as_raw_nonzero().get()).collect();
        return Err(StartError::AlreadyRunning { data_dir, pids });
    }
    // Nobody runs here, so the file is stale; after a reboot its number may belong to anyone, and PostgreSQL would
    // refuse to start.
    let stale = PostmasterPid::read(&instance.data_dir)?;
    if let Some(attached) =
        stale.and_then(|file| file.shm_id).and_then(|id| proc::attached_to_shm(id).transpose())
    {
        let attached = attached?;
        if attached > 0 {
            let what = format!("{attached} processes hold the shared memory of {}", data_dir.display());
            return Err(Error::Answer { what }.into());
        }
    }
    durable::remove(&data_dir.join(POSTMASTER_PID))?;

    durable::touch(&instance.standby_signal())?;
    for leftover in ["recovery.signal", "promote", "fallback_promote"] {
        durable::remove(&data_dir.join(leftover))?;
    }
    history::drop_unused_placeholders(&instance.pg_wal())?;
    wal::uncover(instance)?;

    let path = instance.startup_log();
    fs::create_dir_all(&instance.log_dir).map_err(Error::io("create", &instance.log_dir))?;
    let mut log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(durable::PRIVATE)
        .open(&path)
        .map_err(Error::io("open", &path))?;
    let mut log_from = log.seek(SeekFrom::End(0)).map_err(Error::io("read", &path))?;
    if log_from > STARTUP_LOG_MAX_BYTES {
        log.set_len(0).map_err(Error::io("cut", &path))?;
        log_from = 0;
    }
    Ok(Prepared { log, log_from })
}

fn spawn(instance: &Instance, log: fs::File) -> Result<std::process::Child> {
    let program = instance.installation.program("postgres");
    let stderr = log.try_clone().map_err(Error::io("open", instance.startup_log()))?;
    let mut command = Command::new(&program);
    command.arg("-D").arg(&instance.data_dir);
    for (name, value) in conf::on_the_command_line(instance) {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LANG", "C.UTF-8")
        .current_dir(&instance.data_dir)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(stderr);
    // A session of its own: no terminal that closes and no signal to the agent's group reaches it.
    #[allow(unsafe_code)]
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
    }
    command.spawn().map_err(Error::io("run", &program))
}

/// Where the server of a data directory says that it listens: the directory of its first socket, else an address, and the port. `None`
/// where no server runs.
pub fn listens_at(data_dir: &Path) -> Result<Option<(String, u16)>> {
    if proc::of_data_dir(data_dir)?.is_empty() {
        return Ok(None);
    }
    Ok(durable::read_text(&data_dir.join(POSTMASTER_PID))?.and_then(|text| place_of(&text)))
}

fn place_of(text: &str) -> Option<(String, u16)> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let port = lines.get(3)?.parse().ok()?;
    let host = match (*lines.get(4)?, *lines.get(5)?) {
        ("", "" | "*" | "0.0.0.0") => "127.0.0.1",
        ("", "::") => "::1",
        ("", address) => address,
        (socket_dir, _) => socket_dir,
    };
    Some((host.to_owned(), port))
}

/// The lines of `postmaster.pid` that matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PostmasterPid {
    pub(crate) pid: Pid,
    pub(crate) shm_id: Option<i64>,
    pub(crate) status: Option<Status>,
}

impl PostmasterPid {
    /// `None` where there is no file, or one that a starting server has not filled yet.
    pub(crate) fn read(data_dir: &Path) -> Result<Option<PostmasterPid>> {
        Ok(durable::read_text(&data_dir.join(POSTMASTER_PID))?.and_then(|text| PostmasterPid::parse(&text)))
    }

    fn parse(text: &str) -> Option<PostmasterPid> {
        let lines: Vec<&str> = text.lines().collect();
        // A negative number is that of a single-user server.
        let pid =
            lines.first()?.trim().parse::<i32>().ok().and_then(|pid| Pid::from_raw(pid.checked_abs()?))?;
        let shm_id = lines.get(6).and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        let status = lines.get(7).and_then(|line| {
            Some(match line.trim() {
                "starting" => Status::Starting,
                "standby" => Status::Standby,
                "ready" => Status::Ready,
                "stopping" => Status::Stopping,
                _ => return None,
            })
        });
        Some(PostmasterPid { pid, shm_id, status })
    }
}

/// What the logs say about a start: what came before the log collector ran, and the collector's newest file.
fn quote(instance: &Instance, startup_log_from: u64) -> String {
    let tail = |path: &Path, from: u64| -> io::Result<String> {
        let mut file = fs::File::open(path)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(end.saturating_sub(QUOTED_BYTES).max(from.min(end))))?;
        let mut bytes = Vec::new();
        file.take(QUOTED_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let mut text = tail(&instance.startup_log(), startup_log_from).unwrap_or_default();
    if let Some(newest) = logs::newest(instance).ok().flatten() {
        text.push_str(&tail(&newest, 0).unwrap_or_default());
    }
    // The last lines say why; the first ones are how it began.
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let telling: Vec<&str> = lines
        .iter()
        .copied()
        .filter(|line| {
            ["FATAL:", "PANIC:", "ERROR:", "HINT:", "DETAIL:", "could not"]
                .iter()
                .any(|word| line.contains(word))
        })
        .collect();
    let chosen = if telling.is_empty() { lines } else { telling };
    chosen[chosen.len().saturating_sub(6)..].join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_postmasters_file() {
        let text =
            "4711\n/herd/a/data\n1792000000\n21000\n/herd/a\n127.0.0.1\n  1310785         5\nready   \n";
        let file = PostmasterPid::parse(text).unwrap();
        assert_eq!(file.pid.as_raw_nonzero().get(), 4711);
        assert_eq!((file.shm_id, file.status), (Some(5), Some(Status::Ready)));
        let starting = PostmasterPid::parse("4711\n/herd/a/data\n1792000000\n").unwrap();
        assert_eq!((starting.shm_id, starting.status), (None, None));
        assert_eq!(PostmasterPid::parse(""), None);
        assert_eq!(place_of(text), Some(("/herd/a".to_owned(), 21_000)));
        for (address, said) in [("*", "127.0.0.1"), ("::", "::1"), ("10.0.0.1", "10.0.0.1")] {
            let without_socket = text.replace("/herd/a\n127.0.0.1", &format!("\n{address}"));
            assert_eq!(place_of(&without_socket), Some((said.to_owned(), 21_000)), "{without_socket}");
        }
        assert_eq!(place_of("4711\n/herd/a/data\n1792000000\n"), None);
    }
}
