//! One network namespace: makes it, runs things in it, finds what runs in it, takes it away.
//!
//! Everything that has a socket on a host is made by a thread that has moved into that host's namespace
//! before; a child process inherits the namespace of the thread that starts it. So nothing has to run
//! between fork and exec, and no wrapper process stands between a test and the process it wants to kill.
//!
//! Hazard: a thread that stays in a namespace would make sockets there for whoever uses it next, so
//! threads that moved are never reused.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::run;
use crate::process::{self, Process};

/// Where `ip netns` keeps the names.
pub(super) const NETNS_DIR: &str = "/run/netns";

#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
    file: File,
    inode: u64,
}

impl Namespace {
    pub(super) fn create(name: &str) -> Namespace {
        run("ip", &["netns", "add", name]);
        let this =
            Namespace::open(name).unwrap_or_else(|error| panic!("cannot open namespace {name}: {error}"));
        // An IPv6 link-local path between two hosts would be a way around every rule of iptables.
        this.enter(|| {
            for scope in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
                // A kernel without IPv6 has no such file, and needs none.
                if Path::new(&path).exists() {
                    std::fs::write(&path, "1").expect("root may switch IPv6 off in its own namespace");
                }
            }
        });
        run("ip", &["-n", name, "link", "set", "lo", "up"]);
        this
    }

    /// Opens a namespace that exists already, such as a leftover.
    pub(super) fn open(name: &str) -> std::io::Result<Namespace> {
        let file = File::open(Path::new(NETNS_DIR).join(name))?;
        let inode = file.metadata()?.ino();
        Ok(Namespace { name: name.to_owned(), file, inode })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread of its own inside the namespace and waits for it.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.move_here();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread, for good. Only for threads that end with their work.
    pub(crate) fn move_here(&self) {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
            .unwrap_or_else(|error| panic!("cannot enter namespace {} (are you root?): {error}", self.name));
    }

    /// Every process whose main thread lives here, whoever started it.
    pub(crate) fn processes(&self) -> Vec<Process> {
        process::all(|pid| {
            let link = format!("/proc/{pid}/ns/net");
            std::fs::metadata(link).is_ok_and(|found| found.ino() == self.inode)
        })
    }

    /// Kills what runs here and removes the name. Used on teardown, so it goes on where it can.
    pub(super) fn destroy(&self) {
        process::kill_all(|| self.processes());
        // Nothing can be done about a failure here; the next run tries again and would fail loudly.
        let _gone = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}
