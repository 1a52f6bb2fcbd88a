//! Processes: finds them by what they are (namespace, directory, parent), signals them, waits for the effect.
//!
//! A process is its number and its start time together, so that a number that the kernel gave out again is
//! never signalled. A zombie counts as gone: it holds no lock, no socket and no memory.
//!
//! Hazard: a signal to a wrong process kills another test's PostgreSQL, or the developer's editor.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::wait::wait_until;

/// SIGKILL takes effect when the kernel next looks; on a loaded machine that can take a while.
const SIGNAL_EFFECT_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pid: i32,
    start_ticks: u64,
    name: String,
}

struct Stat {
    name: String,
    state: u8,
    parent: i32,
    cpu_ticks: u64,
    start_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold any character, parentheses too.
    let (head, tail) = text.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = tail.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        name,
        state: *fields.first()?.as_bytes().first()?,
        parent: fields.get(1)?.parse().ok()?,
        cpu_ticks: number(11)? + number(12)?,
        start_ticks: number(19)?,
    })
}

impl Process {
    /// `None` if there is no such process, or only its zombie.
    pub fn by_pid(pid: i32) -> Option<Process> {
        let stat = stat(pid).filter(|stat| stat.state != b'Z')?;
        Some(Process { pid, start_ticks: stat.start_ticks, name: stat.name })
    }

    /// A child that nobody has waited for yet, though it may have ended.
    pub(crate) fn of_child(child: &std::process::Child) -> Process {
        let pid = child.id().cast_signed();
        let stat = stat(pid).expect("a child stays in the process table until somebody waits for it");
        Process { pid, start_ticks: stat.start_ticks, name: stat.name }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn is_alive(&self) -> bool {
        Process::by_pid(self.pid).is_some_and(|found| found.start_ticks == self.start_ticks)
    }

    /// The arguments it was started with; PostgreSQL's own processes write their title there.
    pub fn command_line(&self) -> Vec<String> {
        let raw = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        raw.split(|byte| *byte == 0)
            .filter(|part| !part.is_empty())
            .map(|part| String::from_utf8_lossy(part).into_owned())
            .collect()
    }

    fn stat(&self) -> Option<Stat> {
        stat(self.pid).filter(|stat| stat.start_ticks == self.start_ticks)
    }

    pub fn parent(&self) -> Option<i32> {
        self.stat().map(|stat| stat.parent)
    }

    /// CPU time that it has used, user and system, in the kernel's ticks of 10 ms.
    pub fn cpu_ticks(&self) -> Option<u64> {
        self.stat().map(|stat| stat.cpu_ticks)
    }

    fn working_directory(&self) -> Option<PathBuf> {
        std::fs::read_link(format!("/proc/{}/cwd", self.pid)).ok()
    }

    /// Sends a signal; `false` if the process was gone before.
    pub fn signal(&self, signal: Signal) -> bool {
        let Some(pid) = Pid::from_raw(self.pid) else { return false };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
        // The descriptor now names one process for good; only then is its identity worth a look.
        self.is_alive() && pidfd_send_signal(&pidfd, signal).is_ok()
    }

    /// `kill -9`, and waits until it is gone.
    #[track_caller]
    pub fn kill(&self) {
        assert!(self.signal(Signal::KILL), "fault not injected: {self} was gone before the kill");
        self.wait_gone(SIGNAL_EFFECT_DEADLINE);
    }

    /// SIGSTOP, and waits until the kernel shows it stopped.
    #[track_caller]
    pub fn freeze(&self) {
        assert!(self.signal(Signal::STOP), "fault not injected: {self} is gone, it cannot be stopped");
        wait_until(&format!("{self} to be stopped"), SIGNAL_EFFECT_DEADLINE, || match stat(self.pid) {
            Some(stat) if stat.state == b'T' || stat.state == b't' => Ok(()),
            Some(stat) => Err(format!("state is {}", char::from(stat.state))),
            None => Err("it is gone".to_owned()),
        });
    }

    /// SIGCONT. A process that was killed while frozen needs none.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    #[track_caller]
    pub fn wait_gone(&self, deadline: Duration) {
        wait_until(&format!("{self} to end"), deadline, || match self.is_alive() {
            true => Err("still there".to_owned()),
            false => Ok(()),
        });
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// All processes but this one for which `wanted` says yes.
pub fn all(wanted: impl Fn(i32) -> bool) -> Vec<Process> {
    let own = std::process::id();
    std::fs::read_dir("/proc")
        .expect("/proc is mounted")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| pid.unsigned_abs() != own && wanted(*pid))
        .filter_map(Process::by_pid)
        .collect()
}

/// Every process of the PostgreSQL in `data_dir`. PostgreSQL's processes have it as their working directory,
/// and keep it when the postmaster is dead and they belong to nobody.
pub fn of_data_dir(data_dir: &Path) -> Vec<Process> {
    let Ok(data_dir) = data_dir.canonicalize() else { return Vec::new() };
    all(|pid| {
        Process::by_pid(pid).is_some_and(|found| {
            found.name == "postgres" && found.working_directory().as_ref() == Some(&data_dir)
        })
    })
}

/// The postmaster among them: the one whose parent is not one of them.
pub fn postmaster_of(data_dir: &Path) -> Option<Process> {
    let family = of_data_dir(data_dir);
    let pid = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    let pid: i32 = pid.lines().next()?.trim().parse().ok()?;
    family.into_iter().find(|process| process.pid == pid)
}

/// Kills until a look finds nobody: a process that was forked during the first round is found by the next.
/// For teardown: it never panics, and gives up after a while.
pub(crate) fn kill_all(find: impl Fn() -> Vec<Process>) {
    let give_up = Instant::now() + SIGNAL_EFFECT_DEADLINE;
    loop {
        let found = find();
        if found.is_empty() || Instant::now() > give_up {
            return;
        }
        for process in &found {
            process.signal(Signal::KILL);
        }
        // sleep: between two looks for processes that were forked meanwhile.
        std::thread::sleep(Duration::from_millis(2));
    }
}
