//! Killing every process of one PostgreSQL, with nothing but `/proc` and signals.
//!
//! The same rule as the agent's own stop: a postmaster that is gone leaves backends behind, each in a session
//! of its own, and one of them can still write or answer. So whoever is called `postgres` and stands in the
//! data directory is killed, with all that descends from it, until two looks in a row find nobody and the
//! kernel says that the shared memory is free. A process in state D dies only when its disk answers: then
//! this takes as long, and no message is sent before.
//!
//! Hazard: a process number that has come to mean another. Signals go through a descriptor that was opened
//! before the process was recognised.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::wire::Directory;

/// The name that the kernel keeps of the program; PostgreSQL changes the command line, not this.
const COMMAND: &[u8] = b"postgres";
/// Between two looks while processes die; longer as they take longer.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// A running PostgreSQL, held so that it can be killed without asking anybody anything.
#[derive(Debug)]
pub(super) struct Server {
    postmaster: OwnedFd,
    pid: i32,
    directory: Directory,
    shm_id: Option<i64>,
}

impl Server {
    /// Fails where `postmaster` is not a PostgreSQL that stands in `directory`.
    pub(super) fn hold(postmaster: i32, directory: Directory, shm_id: Option<i64>) -> Result<Server, String> {
        let pid = Pid::from_raw(postmaster).ok_or_else(|| format!("{postmaster} is no process number"))?;
        let held =
            pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| format!("process {postmaster}: {errno}"))?;
        let seen = look(postmaster).ok_or_else(|| format!("process {postmaster} is gone"))?;
        if !seen.is_postgres_in(directory) {
            return Err(format!("process {postmaster} is not a PostgreSQL of this data directory"));
        }
        Ok(Server { postmaster: held, pid: postmaster, directory, shm_id })
    }

    /// Returns when nothing of it is left.
    pub(super) fn kill(&self) {
        self.kill_family();
        let mut pause = FIRST_PAUSE;
        let mut empty_looks = 0;
        while empty_looks < 2 {
            match self.kill_those_left() {
                Some(0) => empty_looks += 1,
                Some(_) | None => {
                    empty_looks = 0;
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        while self.shm_id.is_some_and(shared_memory_is_held) {
            std::thread::sleep(pause);
        }
    }

    /// The postmaster, then all that descend from it. This asks for no file outside `/proc`, whatever state
    /// the disk is in; and once the postmaster is dead nobody knows its children by their parent any more.
    fn kill_family(&self) {
        let processes = processes().unwrap_or_default();
        if ended(&self.postmaster) {
            return;
        }
        let family = with_descendants(&processes, |seen| seen.pid == self.pid);
        // It alone makes new processes, so it goes first.
        pidfd_send_signal(&self.postmaster, Signal::KILL).ok();
        for seen in family {
            seen.kill();
        }
    }

    /// How many there were; `None` if it could not be seen.
    fn kill_those_left(&self) -> Option<usize> {
        let processes = processes()?;
        let ours = with_descendants(&processes, |seen| seen.is_postgres_in(self.directory));
        for seen in &ours {
            seen.kill();
        }
        Some(ours.len())
    }

    /// The postmaster has ended; a zombie has.
    #[cfg(test)]
    pub(super) fn is_over(&self) -> bool {
        ended(&self.postmaster)
    }
}

/// Whether the process that `pidfd` holds has ended.
pub(super) fn ended(pidfd: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(pidfd, PollFlags::IN)];
    matches!(poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(ready) if ready > 0)
}

/// Kills one process that is not PostgreSQL: a fence that hangs, seen at the other end of `socket`.
pub(super) fn kill_peer(socket: BorrowedFd<'_>, pid: Pid) -> Result<(), rustix::io::Errno> {
    let held = pidfd_open(pid, PidfdFlags::empty())?;
    // Still connected: then the number was still its own when the descriptor was opened.
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    if polled[0].revents().contains(PollFlags::HUP) {
        return Ok(());
    }
    pidfd_send_signal(&held, Signal::KILL)?;
    let mut dying = [PollFd::from_borrowed_fd(held.as_fd(), PollFlags::IN)];
    poll(&mut dying, Some(&Timespec { tv_sec: 1, tv_nsec: 0 }))?;
    Ok(())
}

/// What `/proc` says of one process.
#[derive(Debug)]
struct Seen {
    pid: i32,
    parent: i32,
    /// `R`, `S`, `D`, `T`, `Z`, …
    state: u8,
    is_postgres: bool,
    /// In the kernel's ticks since boot; with the number it names one process.
    started: u64,
}

impl Seen {
    /// Ended, and only waiting for its parent to be told.
    fn is_over(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }

    /// Recognised again once its number cannot change hands.
    fn kill(&self) {
        let held = Pid::from_raw(self.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        if let Some(held) = held
            && look(self.pid).is_some_and(|now| now.started == self.started)
        {
            pidfd_send_signal(&held, Signal::KILL).ok();
        }
    }

    fn is_postgres_in(&self, directory: Directory) -> bool {
        let stands_in = || fs::metadata(format!("/proc/{}/cwd", self.pid));
        self.is_postgres && stands_in().is_ok_and(|metadata| Directory::of(&metadata) == directory)
    }
}

/// The living ones that are chosen, and all that descend from them.
fn with_descendants(processes: &BTreeMap<i32, Seen>, chosen: impl Fn(&Seen) -> bool) -> Vec<&Seen> {
    let mut family: Vec<&Seen> = processes.values().filter(|seen| !seen.is_over() && chosen(seen)).collect();
    let mut next = 0;
    while let Some(parent) = family.get(next).map(|seen| seen.pid) {
        next += 1;
        for child in processes.values().filter(|seen| seen.parent == parent && !seen.is_over()) {
            if !family.iter().any(|seen| seen.pid == child.pid) {
                family.push(child);
            }
        }
    }
    family
}

fn processes() -> Option<BTreeMap<i32, Seen>> {
    let mut processes = BTreeMap::new();
    for entry in fs::read_dir("/proc").ok()? {
        let number = entry.ok()?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(seen) = number.and_then(look) {
            processes.insert(seen.pid, seen);
        }
    }
    Some(processes)
}

fn look(pid: i32) -> Option<Seen> {
    parse(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(pid: i32, stat: &[u8]) -> Option<Seen> {
    // The command stands in parentheses and may contain any byte, parentheses too.
    let open = stat.iter().position(|byte| *byte == b'(')?;
    let close = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(close + 2..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let parent = fields.next()?.parse().ok()?;
    // The twenty-second of the line, two of which are gone with the command, two just now.
    let started = fields.nth(17)?.parse().ok()?;
    Some(Seen { pid, parent, state, is_postgres: stat.get(open + 1..close)? == COMMAND, started })
}

fn shared_memory_is_held(id: i64) -> bool {
    let Ok(table) = fs::read_to_string("/proc/sysvipc/shm") else { return false };
    attached(&table, id).is_some_and(|attached| attached > 0)
}

/// From the kernel's table, whose columns differ between versions but have names.
fn attached(table: &str, id: i64) -> Option<u64> {
    let mut lines = table.lines();
    let heads: Vec<&str> = lines.next()?.split_ascii_whitespace().collect();
    let column = |name: &str| heads.iter().position(|head| *head == name);
    let (id_at, attached_at) = (column("shmid")?, column("nattch")?);
    lines.find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let same = fields.get(id_at)?.parse::<i64>().ok()? == id;
        same.then(|| fields.get(attached_at)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_stat_with_a_hostile_command() {
        let stat = b"17 (post) gres) S) S 1 17 17 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3\n";
        let seen = parse(17, stat).unwrap();
        assert_eq!((seen.parent, seen.state, seen.started, seen.is_postgres), (1, b'S', 98_765, false));
        let stat = b"18 (postgres) Z 17 17 17 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98766 1 2 3\n";
        let seen = parse(18, stat).unwrap();
        assert!(seen.is_postgres && seen.is_over());
        assert!(parse(19, b"19 (x) S 1").is_none());
    }

    #[test]
    fn the_kernels_table_of_shared_memory() {
        let table = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid\n\
                     \u{20}  1310785          5   600                    56   931  1000      6   101   104\n";
        assert_eq!((attached(table, 5), attached(table, 6)), (Some(6), None));
    }

    #[test]
    fn what_is_not_a_postgresql_of_this_directory_is_not_held() {
        let here = Directory::of(&fs::metadata("/proc/self/cwd").unwrap());
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(Server::hold(own, here, None).unwrap_err().contains("not a PostgreSQL"));
        assert!(Server::hold(0, here, None).is_err());
        assert!(Server::hold(i32::MAX, here, None).is_err());
    }
}
