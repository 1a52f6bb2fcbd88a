//! The operating system's view of PostgreSQL's processes: `/proc`, pidfds, signals.
//!
//! Leaves out: what to do about them. Hazard: a process number is reused as soon as its process is gone; so a
//! signal goes through a pidfd that was opened before the process was recognised, never to a bare number.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};

/// The name that the kernel keeps of the program. PostgreSQL changes the command line, not this.
const COMMAND: &[u8] = b"postgres";

/// A process, held so that its number cannot come to mean another.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) pid: Pid,
    fd: OwnedFd,
}

impl Held {
    /// `None` if it is gone already.
    pub(crate) fn open(pid: Pid) -> Result<Option<Held>> {
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => Ok(Some(Held { pid, fd })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(errno) => Err(Error::io("watch", proc_path(pid, ""))(errno.into())),
        }
    }

    /// `false` if it was gone already.
    pub(crate) fn signal(&self, signal: Signal) -> Result<bool> {
        match pidfd_send_signal(&self.fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(errno) => Err(Error::io("signal", proc_path(self.pid, ""))(errno.into())),
        }
    }

    /// Waits on this thread until it has ended. A zombie has.
    pub(crate) fn wait(&self, deadline: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        let timeout = Timespec::try_from(deadline).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        matches!(poll(&mut polled, Some(&timeout)), Ok(ready) if ready > 0)
    }
}

impl AsRawFd for Held {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

/// The same on a runtime.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    held: AsyncFd<Held>,
}

impl Process {
    /// `None` if it is gone already.
    pub(crate) fn open(pid: Pid) -> Result<Option<Process>> {
        let Some(held) = Held::open(pid)? else { return Ok(None) };
        #[allow(unsafe_code)]
        // SAFETY: an OwnedFd names one open descriptor until it is dropped, and it is dropped with the AsyncFd.
        let registered = unsafe { AsyncFd::register_with_interest(held, tokio::io::Interest::READABLE) };
        let held = registered.map_err(|refused| Error::io("watch", proc_path(pid, ""))(refused.into()))?;
        Ok(Some(Process { pid, held }))
    }

    /// Returns once it has ended.
    pub(crate) async fn ended(&self) {
        // A pidfd becomes readable when its process ends and stays so; the only other way out is a runtime that
        // shuts down, and then nobody is left to be told.
        if self.held.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub(crate) async fn ended_within(&self, deadline: Duration) -> bool {
        tokio::time::timeout(deadline, self.ended()).await.is_ok()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.held.get_ref().wait(Duration::ZERO)
    }

    /// `false` if it was gone already.
    pub(crate) fn signal(&self, signal: Signal) -> Result<bool> {
        self.held.get_ref().signal(signal)
    }
}

/// What `/proc` says of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) pid: Pid,
    pub(crate) parent: Option<Pid>,
    /// `R`, `S`, `D`, `T`, `Z`, …
    pub(crate) state: u8,
    pub(crate) command: Vec<u8>,
}

impl Seen {
    /// Ended, and only waiting for its parent to be told: it holds no file, no memory and no directory.
    pub(crate) fn is_zombie(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }

    pub(crate) fn is_postgres(&self) -> bool {
        self.command == COMMAND
    }

    /// What PostgreSQL shows in a process list: `postgres: a: walreceiver streaming 0/3000148`. Reading it takes a lock
    /// of that process's memory, and can hang where that waits for a disk.
    pub(crate) fn title(&self) -> String {
        let bytes = fs::read(proc_path(self.pid, "cmdline")).unwrap_or_default();
        let text: Vec<u8> = bytes.into_iter().map(|byte| if byte == 0 { b' ' } else { byte }).collect();
        String::from_utf8_lossy(&text).trim_end().to_owned()
    }
}

pub(crate) fn proc_path(pid: Pid, file: &str) -> std::path::PathBuf {
    format!("/proc/{}/{file}", pid.as_raw_nonzero()).into()
}

/// `None` if there is no such process.
pub(crate) fn look(pid: Pid) -> Option<Seen> {
    let stat = fs::read(proc_path(pid, "stat")).ok()?;
    // The command stands in parentheses and may contain any byte, parentheses too.
    let open = stat.iter().position(|byte| *byte == b'(')?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(close + 2..)?).ok()?;
    let mut fields = rest.split(' ');
    let state = *fields.next()?.as_bytes().first()?;
    let parent = fields.next()?.parse().ok().and_then(Pid::from_raw);
    Some(Seen { pid, parent, state, command: stat[open + 1..close].to_vec() })
}

/// When it began, in the kernel's ticks since boot: tells two processes of one number apart.
pub(crate) fn started_at(pid: Pid) -> Option<u64> {
    const FIELD: usize = 22;
    let stat = fs::read_to_string(proc_path(pid, "stat")).ok()?;
    // Counted from behind the command, which is the second field.
    stat.get(stat.rfind(')')? + 2..)?.split(' ').nth(FIELD - 3)?.parse().ok()
}

/// Every process of this machine that we can see.
pub(crate) fn all() -> Result<Vec<Seen>> {
    let listing = fs::read_dir("/proc").map_err(Error::io("list", "/proc"))?;
    let mut seen = Vec::new();
    for entry in listing {
        let entry = entry.map_err(Error::io("list", "/proc"))?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        seen.extend(number.and_then(look));
    }
    Ok(seen)
}

/// The living children of a process.
pub(crate) fn children_of(parent: Pid) -> Result<Vec<Seen>> {
    let mut seen = all()?;
    seen.retain(|process| process.parent == Some(parent) && !process.is_zombie());
    Ok(seen)
}

/// Every living process of the PostgreSQL that runs in `data_dir`: those named `postgres` that stand in it, as all
/// of them do, and whatever descends from one. A shell that someone opened there is not one of them.
pub(crate) fn of_data_dir(data_dir: &Path) -> Result<Vec<Seen>> {
    let Some(wanted) = identity(data_dir)? else { return Ok(Vec::new()) };
    let all = all()?;
    let stands_there = |process: &Seen| {
        let cwd = fs::metadata(proc_path(process.pid, "cwd"));
        cwd.is_ok_and(|cwd| (cwd.dev(), cwd.ino()) == wanted)
    };
    let (mut ours, mut others): (Vec<Seen>, Vec<Seen>) = all
        .into_iter()
        .filter(|process| !process.is_zombie())
        .partition(|process| process.is_postgres() && stands_there(process));
    loop {
        let is_child = |process: &Seen| ours.iter().any(|our| process.parent == Some(our.pid));
        let (found, rest): (Vec<Seen>, Vec<Seen>) = others.into_iter().partition(is_child);
        others = rest;
        if found.is_empty() {
            return Ok(ours);
        }
        ours.extend(found);
    }
}

/// Device and inode: the same directory whatever path led there. `None` if it is missing.
fn identity(path: &Path) -> Result<Option<(u64, u64)>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("look at", path)(error)),
    }
}

/// True if the process is a `postgres` that stands in `data_dir`.
pub(crate) fn is_postgres_in(pid: Pid, data_dir: &Path) -> Result<bool> {
    let Some(seen) = look(pid) else { return Ok(false) };
    let Some(wanted) = identity(data_dir)? else { return Ok(false) };
    let cwd = fs::metadata(proc_path(pid, "cwd"));
    Ok(!seen.is_zombie() && seen.is_postgres() && cwd.is_ok_and(|cwd| (cwd.dev(), cwd.ino()) == wanted))
}

/// The program that a process runs. The kernel marks one that was replaced by an upgrade.
pub(crate) fn executable(pid: Pid) -> Option<std::path::PathBuf> {
    let link = fs::read_link(proc_path(pid, "exe")).ok()?;
    let bytes = link.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    Some(std::path::PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
}

/// How many processes hold a System V shared memory segment; `None` if it does not exist.
pub(crate) fn attached_to_shm(id: i64) -> Result<Option<u64>> {
    let table = fs::read_to_string("/proc/sysvipc/shm").map_err(Error::io("read", "/proc/sysvipc/shm"))?;
    Ok(parse_shm(&table, id))
}

fn parse_shm(table: &str, id: i64) -> Option<u64> {
    let mut lines = table.lines();
    let heads: Vec<&str> = lines.next()?.split_whitespace().collect();
    let column = |name: &str| heads.iter().position(|head| *head == name);
    let (id_at, attached_at) = (column("shmid")?, column("nattch")?);
    lines.find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let same = fields.get(id_at)?.parse::<i64>().ok()? == id;
        same.then(|| fields.get(attached_at)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen_with_its_parent() {
        let seen = look(rustix::process::getpid()).unwrap();
        assert_eq!(seen.parent, rustix::process::getppid());
        assert!(!seen.is_zombie() && !seen.is_postgres());
        assert!(children_of(seen.parent.unwrap()).unwrap().iter().any(|child| child.pid == seen.pid));
        assert!(executable(seen.pid).unwrap().is_absolute());
    }

    #[test]
    fn the_kernels_table_of_shared_memory() {
        let table = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid\n\
                     \u{20}  1310785          5   600                    56   931  1000      6   101   104\n\
                     \u{20}  1310786         12   600                    56   931  1000      0   101   104\n";
        assert_eq!(parse_shm(table, 5), Some(6));
        assert_eq!(parse_shm(table, 12), Some(0));
        assert_eq!(parse_shm(table, 6), None);
    }
}
