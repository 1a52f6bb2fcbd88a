//! What a proxy looks like from outside, in numbers: for metrics.
//!
//! By database, and in all; who the users and the clients are is for the console. Databases have a limit here, so that what is
//! made of it does: those beyond the first are summed up.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use pgherd_core::types::{NodeName, Term};

use crate::console::shown::{Doing, Seen};
use crate::counts::{Events, Pin, Totals};
use crate::routes::Route;

/// Databases that are told apart, in the order of their names.
pub const MOST_DATABASES: usize = 200;
const OTHERS: &str = "(others)";

/// One moment.
#[derive(Clone, Debug)]
pub struct Observation {
    pub started_at: SystemTime,
    pub clients: Clients,
    pub most_clients: usize,
    pub databases: BTreeMap<String, Database>,
    pub events: Events,
    /// Clients that keep their servers, by reason; one may have several.
    pub pinned: Vec<(Pin, u64)>,
    pub nodes: BTreeMap<NodeName, Work>,
    /// The highest that was heard of.
    pub term: Option<Term>,
    /// Clients may begin something at the primary.
    pub gate_open: bool,
    /// For how long what was heard of it counts; zero if it counts no more.
    pub proof_left: Duration,
    pub paused_all: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clients {
    pub active: u64,
    pub idle: u64,
    pub waiting: u64,
    /// Coming in.
    pub login: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Database {
    pub totals: Totals,
    pub active: u64,
    pub idle: u64,
    pub opening: u64,
    pub closing: u64,
    pub waiting: u64,
    /// How long the first client that waits has waited.
    pub longest_wait: Duration,
    pub paused: bool,
}

/// What went to a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub queries: u64,
    pub transactions: u64,
}

pub(crate) fn observe(seen: &Seen) -> Observation {
    let mut databases: BTreeMap<String, Database> = BTreeMap::new();
    for ((database, _), totals) in &seen.totals {
        databases.entry(database.clone()).or_default().totals.add(totals);
    }
    for pool in &seen.pools {
        let database = databases.entry(pool.name.database.clone()).or_default();
        let counts = pool.counts;
        for (to, from) in [
            (&mut database.active, counts.lent),
            (&mut database.idle, counts.idle),
            (&mut database.opening, counts.opening),
            (&mut database.closing, counts.closing),
            (&mut database.waiting, counts.waiting),
        ] {
            *to += u64::from(from);
        }
        database.longest_wait = database.longest_wait.max(counts.max_wait);
    }
    for (name, database) in &mut databases {
        database.paused = seen.paused.has(name);
    }
    let (mut clients, mut pinned) =
        (Clients::default(), Pin::ALL.iter().map(|pin| (*pin, 0)).collect::<Vec<_>>());
    let linked = seen.linked();
    for client in &linked {
        *match client.doing {
            Doing::Active => &mut clients.active,
            Doing::Idle => &mut clients.idle,
            Doing::Waiting { .. } => &mut clients.waiting,
        } += 1;
        if let Some((pins, _)) = client.card.pinned() {
            pinned.iter_mut().filter(|(pin, _)| pins.contains(*pin)).for_each(|(_, count)| *count += 1);
        }
    }
    clients.login = seen.connected.saturating_sub(seen.clients.len() as u64);
    let work = seen.work.iter();
    let table = seen.nodes.table.as_ref().map(|(table, _)| table);
    Observation {
        started_at: seen.started_at,
        clients,
        most_clients: seen.settings.max_clients,
        databases: limited(databases),
        events: seen.events.clone(),
        pinned,
        nodes: work
            .map(|(node, (queries, transactions))| {
                (node.clone(), Work { queries: *queries, transactions: *transactions })
            })
            .collect(),
        term: table.map(|table| table.term),
        gate_open: matches!(seen.primary, Route::To(..)),
        proof_left: table.map_or(Duration::ZERO, |table| table.valid_until.since(seen.now)),
        paused_all: seen.paused.all,
    }
}

fn limited(databases: BTreeMap<String, Database>) -> BTreeMap<String, Database> {
    let mut limited = BTreeMap::new();
    for (name, database) in databases {
        if limited.len() < MOST_DATABASES {
            limited.insert(name, database);
            continue;
        }
        let others: &mut Database = limited.entry(OTHERS.to_owned()).or_default();
        others.totals.add(&database.totals);
        others.active += database.active;
        others.idle += database.idle;
        others.opening += database.opening;
        others.closing += database.closing;
        others.waiting += database.waiting;
        others.longest_wait = others.longest_wait.max(database.longest_wait);
        others.paused |= database.paused;
    }
    limited
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_beyond_the_limit_are_summed_up() {
        let one = || Database {
            waiting: 2,
            totals: Totals { queries: 3, ..Totals::default() },
            ..Database::default()
        };
        let many = (0..MOST_DATABASES + 5).map(|n| (format!("d{n:04}"), one())).collect();
        let limited = limited(many);
        assert_eq!(limited.len(), MOST_DATABASES + 1);
        let others = &limited[OTHERS];
        assert_eq!((others.waiting, others.totals.queries), (10, 15));
    }
}
