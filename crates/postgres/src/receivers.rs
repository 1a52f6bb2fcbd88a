//! Finding the processes of a server by their titles, without its help.
//!
//! Leaves out: what to do with them. Hazard: a child that was just forked has no title yet; who looks for WAL
//! receivers has to wait until it has one.

use std::time::Duration;

use rustix::process::Pid;

use crate::error::{Result, blocking};
use crate::proc::{self, Process, Seen};
use crate::process::Server;

/// What a child of the postmaster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    WalReceiver,
    Startup,
    /// A process of PostgreSQL's own that holds up no replay.
    Own,
    /// A session of pgherd's monitor.
    Monitor,
    /// A session of somebody else.
    Session,
    /// Just forked: it still shows the postmaster's command line.
    Nascent,
}

/// PostgreSQL's own processes, as their titles begin.
const OWN: [&str; 13] = [
    "archiver",
    "autovacuum",
    "background writer",
    "checkpointer",
    "io worker",
    "logger",
    "logical replication",
    "slotsync worker",
    "slot sync worker",
    "stats collector",
    "walsender",
    "walsummarizer",
    "walwriter",
];

/// The postmaster's children. Reads titles, hence on a thread of its own.
pub(crate) async fn children(server: &Server, deadline: Duration) -> Result<Vec<(Kind, Seen)>> {
    let prefix = prefix(server);
    let postmaster = server.postmaster().pid;
    blocking("looking for PostgreSQL's processes", deadline, move || {
        let mut found = Vec::new();
        for child in proc::children_of(postmaster)? {
            let title = child.title();
            // An empty command line is that of a process which is just ending.
            if !title.is_empty() {
                found.push((kind(&title, &prefix), child));
            }
        }
        Ok(found)
    })
    .await
}

/// The WAL receivers that are visible now.
pub(crate) async fn of(server: &Server, deadline: Duration) -> Result<Vec<Process>> {
    let mut held = Vec::new();
    for (kind, seen) in children(server, deadline).await? {
        if kind == Kind::WalReceiver {
            held.extend(hold(&seen)?);
        }
    }
    Ok(held)
}

fn prefix(server: &Server) -> String {
    format!("postgres: {}: ", server.instance().node)
}

/// Holds a process, if it is still the one that was seen.
pub(crate) fn hold(seen: &Seen) -> Result<Option<Process>> {
    let held = Process::open(seen.pid)?;
    let same = |pid: Pid| {
        proc::look(pid).is_some_and(|now| now.parent == seen.parent && now.command == seen.command)
    };
    Ok(held.filter(|process| same(process.pid)))
}

fn kind(title: &str, prefix: &str) -> Kind {
    let Some(what) = title.strip_prefix(prefix) else {
        // The logger is started before the cluster's name is known.
        return if title.starts_with("postgres: ") { Kind::Own } else { Kind::Nascent };
    };
    if what == "walreceiver" || what.starts_with("walreceiver ") {
        return Kind::WalReceiver;
    }
    if what == "startup" || what.starts_with("startup ") {
        return Kind::Startup;
    }
    if OWN.iter().any(|own| what.starts_with(own)) {
        return Kind::Own;
    }
    if what.starts_with(crate::roles::MONITOR) { Kind::Monitor } else { Kind::Session }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_as_postgresql_writes_them() {
        let kind = |title| kind(title, "postgres: walreceiver: ");
        assert_eq!(kind("postgres: walreceiver: walreceiver streaming 0/3000148"), Kind::WalReceiver);
        assert_eq!(kind("postgres: walreceiver: walreceiver"), Kind::WalReceiver);
        assert_eq!(kind("postgres: walreceiver: checkpointer"), Kind::Own);
        assert_eq!(kind("postgres: walreceiver: startup recovering 000000010000000000000003"), Kind::Startup);
        assert_eq!(kind("postgres: walreceiver: app app 10.0.0.1(55732) idle in transaction"), Kind::Session);
        assert_eq!(kind("postgres: walreceiver: pgherd_monitor postgres [local] idle"), Kind::Monitor);
        assert_eq!(
            kind("postgres: walreceiver: walsender pgherd_replication 10.0.0.1(1) streaming"),
            Kind::Own
        );
        assert_eq!(kind("/usr/lib/postgresql/15/bin/postgres -D /herd/walreceiver"), Kind::Nascent);
    }
}
