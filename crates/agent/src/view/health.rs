//! What load balancers and Prometheus are told about this node.

use std::time::Duration;

use pgherd_api::status::Role;
use pgherd_core::observation::Postgres;

use super::{Sight, status};
use crate::gossip::Is;
use crate::http::health::{HealthView, Postgres as Up};
use crate::identity::Identity;
use crate::metrics::Measurements;

pub(crate) fn health(sight: &Sight<'_>) -> HealthView {
    let (picture, own) = (sight.picture, &sight.picture.own);
    let node = sight.cluster().and_then(|cluster| cluster.node(sight.me()));
    let role = node.map_or(Role::Witness, |node| status::role(sight, node));
    let standby = match &picture.postgres {
        Postgres::Standby(standby) => Some(standby),
        _ => None,
    };
    HealthView {
        cluster: own.cluster.to_string(),
        node: own.node.to_string(),
        role,
        gate_open: own_gate_open(sight),
        postgres: match picture.postgres {
            Postgres::Primary(_) | Postgres::Standby(_) => Up::Running,
            Postgres::Starting | Postgres::Unknown => Up::Starting,
            Postgres::Stopped(_) | Postgres::Remains | Postgres::Absent => Up::Stopped,
        },
        replication_state: standby.map(|standby| {
            if standby.receiving { "streaming".to_owned() } else { "in archive recovery".to_owned() }
        }),
        is_voter: is_voter(sight),
        every_voter_needed: sight.rule().is_some_and(|rule| rule.needed as usize == sight.voters().len()),
        in_read_pool: node.is_some_and(|node| sight.in_read_pool(node)),
        primary_lsn: sight.primary_flush().map(|lsn| lsn.0),
        received_lsn: standby.and(own.flush_lsn).map(|lsn| lsn.0),
        replayed_lsn: standby.and(own.show.replay_lsn).map(|lsn| lsn.0),
        agent_is_alive: true,
        is_paused: false,
        timeline: own.timeline.map(|timeline| timeline.0),
        system_identifier: sight.record().and_then(|record| record.system).map(|system| system.to_string()),
        server_version: None,
        pending_restart: own.show.pending_restart == Some(true),
        postmaster_start_time: None,
        store_last_seen_s: picture.confirmed.map(|at| {
            let ago = i64::try_from(picture.now.since(at).as_secs()).unwrap_or(i64::MAX);
            sight.now.as_second().saturating_sub(ago)
        }),
    }
}

/// Before the first picture nothing is known, and no path but those about the agent itself passes.
pub(crate) fn unknown_health(identity: &Identity) -> HealthView {
    HealthView {
        cluster: identity.herd.to_string(),
        node: identity.node.to_string(),
        role: Role::Standby,
        gate_open: false,
        postgres: Up::Starting,
        replication_state: None,
        is_voter: false,
        every_voter_needed: false,
        in_read_pool: false,
        primary_lsn: None,
        received_lsn: None,
        replayed_lsn: None,
        agent_is_alive: true,
        is_paused: false,
        timeline: None,
        system_identifier: None,
        server_version: None,
        pending_restart: false,
        postmaster_start_time: None,
        store_last_seen_s: None,
    }
}

/// This node holds the term, and its own PostgreSQL lets clients in.
fn own_gate_open(sight: &Sight<'_>) -> bool {
    let holds = sight.primary() == Some(sight.me()) && sight.picture.own.running == Is::Primary;
    holds && sight.gate_open() && sight.picture.deeds.gate_open
}

fn is_voter(sight: &Sight<'_>) -> bool {
    let needed = sight.rule().map_or(0, |rule| rule.needed);
    needed > 0 && sight.voters().iter().any(|voter| voter.node == *sight.me())
}

pub(crate) fn measurements(sight: &Sight<'_>) -> Measurements {
    let (picture, own) = (sight.picture, &sight.picture.own);
    let record = sight.record();
    let is_data_node = sight.cluster().is_some_and(|cluster| cluster.node(sight.me()).is_some());
    let holds = record.map(|_| sight.primary() == Some(sight.me()));
    let others = picture.spec.agents().filter(|(name, _, _)| *name != sight.me());
    let (mut peers, mut heard) = (0, 0);
    for (name, _, _) in others {
        peers += 1;
        heard += u64::from(sight.seen(name).is_heard());
    }
    let proven = picture.confirmed.max(picture.heartbeat);
    let left = proven.map(|at| picture.spec.times.lease.saturating_sub(picture.now.since(at)));
    let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let standby = match &picture.postgres {
        Postgres::Standby(standby) => Some(standby),
        _ => None,
    };
    Measurements {
        term: record.map(|record| record.term.0),
        primary: holds.filter(|_| is_data_node),
        gate_open: record.filter(|_| is_data_node).map(|_| own_gate_open(sight)),
        degraded: record.map(|_| sight.degraded()),
        voters: sight.rule().map(|_| number(sight.voters().len())),
        needed: sight.rule().map(|rule| u64::from(rule.needed)),
        postgres_running: match picture.postgres {
            Postgres::Unknown => None,
            Postgres::Primary(_) | Postgres::Standby(_) => Some(true),
            _ => is_data_node.then_some(false),
        },
        streaming: standby.map(|standby| standby.receiving),
        barred: record.filter(|_| is_data_node).map(|_| sight.barred(sight.me()).is_some()),
        paused: None,
        pending_restart: own.show.pending_restart,
        timeline: own.timeline.map(|timeline| u64::from(timeline.0)),
        flush_lsn: own.flush_lsn.map(|lsn| lsn.0),
        replay_lsn: standby.and(own.show.replay_lsn).map(|lsn| lsn.0),
        lag: match is_data_node {
            true => status::lag_bytes(sight, sight.seen(sight.me())),
            false => None,
        },
        replay_lag: standby.and(own.show.replay_lag_ms).map(|ms| Duration::from_millis(ms).as_secs_f64()),
        store_leader: Some(sight.store.role == pgherd_dcs::Role::Leader),
        store_members: Some(number(sight.store.members.len())),
        store_reachable: Some(picture.store_reachable),
        peers: Some(peers),
        peers_reachable: Some(heard),
        lease_remaining: left.filter(|_| holds == Some(true)).map(|left| left.as_secs_f64()),
        fence_armed: own.show.fence_armed,
        vip_held: sight
            .cluster()
            .and_then(|cluster| cluster.vip.as_ref())
            .filter(|_| is_data_node)
            .map(|_| own.show.vip.held.is_some()),
        certificate_remaining: sight
            .certificate_expires
            .map(|expires| (expires.as_second() - sight.now.as_second()) as f64),
        spec_generation: Some(picture.spec_generation),
    }
}
