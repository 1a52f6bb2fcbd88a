//! pgherd's own tables: the routing table as this proxy has it, why clients keep their servers, and what has happened.

use pgherd_core::types::NodeName;

use super::shown::{Seen, zoned};
use super::table::{Column, Value, int4, int8, text};
use crate::counts::Pin;
use crate::nodes::Role;
use crate::pool::Use;
use crate::routes::{Hold, Route};

pub(super) static PGHERD: [Column; 18] = [
    text("node"),
    text("address"),
    int4("port"),
    text("role"),
    int8("term"),
    text("gate"),
    text("reads"),
    int8("table_age_ms"),
    int8("proof_ms"),
    int4("pools"),
    int4("sv_active"),
    int4("sv_idle"),
    int4("sv_opening"),
    int4("sv_closing"),
    int4("pins"),
    int8("transactions"),
    int8("queries"),
    text("since"),
];
pub(super) static PINS: [Column; 8] = [
    int8("client"),
    text("user"),
    text("database"),
    text("reason"),
    text("since"),
    text("node"),
    int4("server_pid"),
    text("application_name"),
];
pub(super) static EVENTS: [Column; 3] = [text("event"), text("kind"), int8("count")];

type Rows = Vec<Vec<Value>>;

/// Whether clients may begin something at the primary, and if not why.
pub(super) fn gate(route: &Route) -> &'static str {
    match route {
        Route::To(..) => "open",
        Route::Hold(Hold::Unknown) => "no agent has been heard",
        Route::Hold(Hold::NoPrimary) => "no primary",
        Route::Hold(Hold::GateClosed) => "closed",
        Route::Hold(Hold::Draining) => "draining",
        Route::Hold(Hold::NoStandby) => "no standby",
        Route::Hold(Hold::OutOfDate) => "the proof has run out",
    }
}

/// One row for each node that was heard of.
pub(super) fn pgherd(seen: &Seen) -> Rows {
    let clients = seen.linked();
    let table = seen.nodes.table.as_ref();
    let row = |(name, node): (&NodeName, &crate::nodes::Node)| {
        let (mut pools, mut uses) = (0_u32, [0_u32; 4]);
        for pool in &seen.pools {
            let here = pool
                .servers
                .iter()
                .filter(|(_, _, card)| card.as_ref().is_some_and(|card| card.place.node == *name));
            let before = uses;
            for (doing, ..) in here {
                uses[match doing {
                    Use::Lent { .. } => 0,
                    Use::Idle => 1,
                    Use::Opening => 2,
                    Use::Closing => 3,
                }] += 1;
            }
            // What is being opened has no card yet.
            let is_its = match &pool.name.role {
                crate::routes::Role::Primary => node.role == Role::Primary,
                crate::routes::Role::Standby(of) => of == name,
            };
            if is_its {
                uses[2] += pool.counts.opening;
            }
            pools += u32::from(uses != before);
        }
        let pinned = clients.iter().filter(|client| {
            client.card.pinned().is_some() && client.server.is_some_and(|server| server.place.node == *name)
        });
        let (queries, transactions) = seen.work.get(name).copied().unwrap_or_default();
        let [lent, idle, opening, closing] = uses;
        let is_primary = node.role == Role::Primary;
        vec![
            name.as_str().into(),
            node.address.to_string().into(),
            node.port.into(),
            match node.role {
                Role::Primary => "primary",
                Role::Standby => "standby",
                Role::Away => "unknown",
            }
            .into(),
            table.map(|(table, _)| table.term.0).into(),
            if is_primary { gate(&seen.primary).into() } else { Value::Null },
            match node.role {
                _ if seen.detached.contains(name) => "detached",
                Role::Standby => "yes",
                Role::Primary => "where no standby takes them",
                Role::Away => "no",
            }
            .into(),
            table.map(|(_, learnt)| seen.since(*learnt).as_millis()).into(),
            table.map(|(table, _)| table.valid_until.since(seen.now).as_millis()).into(),
            pools.into(),
            lent.into(),
            idle.into(),
            opening.into(),
            closing.into(),
            pinned.count().into(),
            transactions.into(),
            queries.into(),
            zoned(node.since),
        ]
    };
    seen.nodes.nodes.iter().map(row).collect()
}

pub(super) fn reason(pin: Pin) -> &'static str {
    match pin {
        Pin::AdvisoryLock => "an advisory lock",
        Pin::TemporaryTable => "a temporary table",
        Pin::HoldableCursor => "a cursor with hold",
        Pin::Listen => "LISTEN",
        Pin::PreparedStatement => "a statement prepared by SQL",
        Pin::Library => "LOAD",
        Pin::RandomSeed => "setseed()",
        Pin::UnknownSetting => "set_config with a name that is not written in its statement",
        Pin::TooLarge => "a query that was too long to be read",
        Pin::Unanswered => "its server does not say what was left in it",
    }
}

/// One row for each client that keeps its server, and reason.
pub(super) fn pins(seen: &Seen) -> Rows {
    let mut rows = Vec::new();
    for client in seen.linked() {
        let Some((pins, since)) = client.card.pinned() else { continue };
        for pin in pins.iter() {
            rows.push(vec![
                client.card.id.0.into(),
                (*client.card.user).into(),
                (*client.card.database).into(),
                reason(pin).into(),
                zoned(seen.wall(since)),
                client.server.map(|server| server.place.node.to_string()).into(),
                client.server.map(|server| server.pid).into(),
                (*client.card.application_name).into(),
            ]);
        }
    }
    rows
}

/// What has happened since the proxy was started.
pub(super) fn events(seen: &Seen) -> Rows {
    let row = |event: &str, kind: &str, count: u64| vec![event.into(), kind.into(), count.into()];
    let events = &seen.events;
    let mut rows: Rows = Vec::new();
    rows.extend(events.no_entry.iter().map(|(why, count)| row("refused", why.word(), *count)));
    rows.extend(events.pins.iter().map(|(pin, count)| row("pinned", pin.word(), *count)));
    rows.extend(events.ended.iter().map(|(what, count)| row("ended", what.word(), *count)));
    rows.push(row("given_another_server", "", events.spared));
    rows.push(row("held", "", seen.totals.values().map(|totals| totals.held).sum()));
    rows
}
