//! Processes: recognised beyond doubt, watched to their end, signalled without hitting another.
//!
//! A process number comes back to life as another process. So a process that is to be taken over must have
//! the number, start time and boot that were noted, run a program of this herd, and stand in its node's
//! directory; and it is held by a descriptor before it is looked at.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// What tells one process from all others, before and after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessId {
    pub(super) pid: i32,
    /// Clock ticks from boot to its start.
    start_ticks: u64,
    /// Random, anew at each boot.
    boot: String,
}

impl ProcessId {
    /// `None` if there is no such process, or only what is left of one.
    pub(super) fn of(pid: i32) -> Option<ProcessId> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        Some(ProcessId { pid, start_ticks: start_ticks(pid)?, boot })
    }
}

/// From `/proc/PID/stat`; the name in it stands in parentheses and may hold any character.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    (!matches!(fields.first(), Some(&"Z" | &"X"))).then_some(())?;
    fields.get(19)?.parse().ok()
}

/// A process that is held by a descriptor: signals reach it or nobody.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) id: ProcessId,
    fd: AsyncFd<OwnedFd>,
}

impl Running {
    pub(super) fn open(pid: i32) -> io::Result<Option<Running>> {
        let Some(raw) = Pid::from_raw(pid) else { return Ok(None) };
        let fd = match pidfd_open(raw, PidfdFlags::NONBLOCK) {
            Ok(fd) => watched(fd)?,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Whom the descriptor names is looked at only now, when it cannot change any more.
        Ok(ProcessId::of(pid).map(|id| Running { id, fd }))
    }

    /// The process that was noted, if it still runs.
    pub(super) fn reopen(id: &ProcessId) -> io::Result<Option<Running>> {
        Ok(Running::open(id.pid)?.filter(|running| running.id == *id))
    }

    pub(super) async fn ended(&self) {
        if self.fd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub(super) async fn ended_within(&self, deadline: Duration) -> bool {
        tokio::time::timeout(deadline, self.ended()).await.is_ok()
    }

    /// `false` if it was gone already.
    pub(super) fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(self.fd.get_ref(), signal).is_ok()
    }

    pub(super) fn runs_program_in(&self, bin_dir: &Path) -> bool {
        program(self.id.pid).is_some_and(|program| program.starts_with(bin_dir))
    }

    pub(super) fn runs(&self, of: &Path) -> bool {
        program(self.id.pid).is_some_and(|program| program == of)
    }

    pub(super) fn stands_in(&self, dir: &Path) -> bool {
        stands_in(self.id.pid, dir)
    }
}

fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[allow(unsafe_code, reason = "the safe constructor is deprecated")]
    // SAFETY: an OwnedFd names one open descriptor for as long as it lives, which is as long as the AsyncFd.
    let registered = unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) };
    registered.map_err(io::Error::from)
}

/// The program that a process runs, also where its file was removed since.
fn program(pid: i32) -> Option<PathBuf> {
    let link = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let text = link.to_str()?;
    Some(PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(text)))
}

fn stands_in(pid: i32, dir: &Path) -> bool {
    let real = fs::canonicalize(dir);
    real.is_ok_and(|real| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == real))
}

fn arguments(pid: i32) -> Vec<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    raw.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

fn all_pids() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Processes whose program lies in `bin_dir`, that were started as `command`, and that stand in `dir` if one is
/// named.
pub(super) fn of_command(bin_dir: &Path, dir: Option<&Path>, command: &str) -> Vec<i32> {
    let ours = |pid: &i32| {
        program(*pid).is_some_and(|program| program.starts_with(bin_dir))
            && dir.is_none_or(|dir| stands_in(*pid, dir))
            && arguments(*pid).get(1).is_some_and(|argument| argument == command)
    };
    all_pids().into_iter().filter(ours).collect()
}

/// Programs below `bin_dir` that some process runs.
pub(super) fn programs_in_use(bin_dir: &Path) -> Vec<PathBuf> {
    all_pids().into_iter().filter_map(program).filter(|program| program.starts_with(bin_dir)).collect()
}

/// Every process of the PostgreSQL in this data directory. All stand in it, and keep on when the postmaster is
/// dead.
fn postgres_in(data_dir: &Path) -> Vec<i32> {
    let is_postgres = |pid: i32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "postgres")
            && start_ticks(pid).is_some()
    };
    all_pids().into_iter().filter(|pid| is_postgres(*pid) && stands_in(*pid, data_dir)).collect()
}

pub(super) fn postgres_stands_in(data_dir: &Path) -> bool {
    !postgres_in(data_dir).is_empty()
}

/// Signals the postmaster, which passes it on; a kill, and whatever has no postmaster, goes to all.
pub(super) fn signal_postgres_in(data_dir: &Path, signal: Signal) {
    let family = postgres_in(data_dir);
    let pid_file =
        fs::read_to_string(data_dir.join(pgherd_postgres::instance::POSTMASTER_PID)).unwrap_or_default();
    let postmaster = pid_file.lines().next().and_then(|line| line.trim().parse::<i32>().ok());
    let chosen = match postmaster.filter(|pid| family.contains(pid)) {
        Some(postmaster) if signal != Signal::KILL => vec![postmaster],
        _ => family,
    };
    for pid in chosen.into_iter().filter_map(Pid::from_raw) {
        // Held first, recognised again afterwards: the number may have changed hands.
        let Ok(held) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if stands_in(pid.as_raw_nonzero().get(), data_dir) && pidfd_send_signal(&held, signal).is_err() {
            tracing::debug!(pid = pid.as_raw_nonzero().get(), "a process was gone before its signal");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_process_is_known_by_more_than_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("60").current_dir(dir.path()).spawn().unwrap();
        let pid = child.id().cast_signed();
        let running = Running::open(pid).unwrap().unwrap();
        assert!(running.stands_in(dir.path()) && !running.stands_in(Path::new("/")));
        assert!(!running.runs_program_in(dir.path()));
        assert!(Running::reopen(&running.id).unwrap().is_some());
        let earlier = ProcessId { start_ticks: running.id.start_ticks - 1, ..running.id.clone() };
        assert!(Running::reopen(&earlier).unwrap().is_none(), "another process had this number before");
        let other_boot = ProcessId { boot: "another".to_owned(), ..running.id.clone() };
        assert!(Running::reopen(&other_boot).unwrap().is_none());

        assert!(!running.ended_within(Duration::from_millis(10)).await);
        assert!(running.signal(Signal::KILL));
        assert!(running.ended_within(Duration::from_secs(10)).await);
        assert!(Running::open(pid).unwrap().is_none(), "a zombie is gone");
        child.wait().unwrap();
        assert!(!running.signal(Signal::KILL));
    }

    #[test]
    fn a_command_is_found_by_its_program_directory_and_name() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::copy("/bin/sleep", bin.join("pgherd-x")).unwrap();
        let mut child = Command::new(bin.join("pgherd-x")).arg("60").current_dir(dir.path()).spawn().unwrap();
        let pid = child.id().cast_signed();
        // The kernel lets the parent go on a moment before the child's arguments can be read.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while of_command(&bin, Some(dir.path()), "60") != [pid] {
            assert!(std::time::Instant::now() < deadline, "{:?}", arguments(pid));
        }
        assert!(of_command(&bin, Some(dir.path()), "61").is_empty());
        assert!(of_command(&bin, Some(&bin), "60").is_empty());
        fs::remove_file(bin.join("pgherd-x")).unwrap();
        assert_eq!(of_command(&bin, Some(dir.path()), "60"), [pid], "an upgrade removed its program");
        assert!(!programs_in_use(&bin).is_empty());
        assert!(!postgres_stands_in(dir.path()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(of_command(&bin, Some(dir.path()), "60").is_empty());
    }
}
