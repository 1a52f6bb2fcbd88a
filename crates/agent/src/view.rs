//! What the agent knows, as people and programs are shown it: pure functions of one picture.
//!
//! Unknown stays unknown: what nobody has said, or what was said too long ago, is null and never zero.

use std::time::Duration;

use pgherd_api::report::{Event, Explain, Explanation, History, HistoryEntry, HistoryQuery};
use pgherd_api::status::{
    self, Cluster, Durability, DurabilityMode, Gate, Member, Role, State, Status, StoreKind, StoreMember, Sync,
};
use pgherd_core::record::{Record, Rule};
use pgherd_core::spec::{ClusterSpec, NodeSpec};
use pgherd_core::types::{Lsn, NodeName};
use pgherd_dcs::{Health, MemberHealth};

use crate::gossip::{Gossip, Is};
use crate::http::health::{HealthView, Postgres};
use crate::identity::Identity;
use crate::main_loop::Picture;

mod check;

pub(crate) use check::check;

/// What was heard longer ago describes the past.
const STALE: Duration = Duration::from_secs(3);

/// One agent's word, with its age; `None` for one that was never heard.
struct Heard<'a> {
    gossip: &'a Gossip,
    ago: Duration,
}

impl Heard<'_> {
    fn is_fresh(&self) -> bool {
        self.ago <= STALE
    }
}

fn heard<'a>(picture: &'a Picture, node: &NodeName) -> Option<Heard<'a>> {
    if picture.own.node == *node {
        return Some(Heard { gossip: &picture.own, ago: Duration::ZERO });
    }
    let (_, ago, gossip) = picture.peers.iter().find(|(name, _, _)| name == node)?;
    Some(Heard { gossip: gossip.as_ref()?, ago: (*ago)? })
}

pub(crate) fn status(picture: &Picture, store: &Health) -> Status {
    Status {
        herd: picture.spec.name.to_string(),
        generation: picture.spec_generation,
        store: status::Store {
            kind: StoreKind::Raft,
            leader: store.leader.as_ref().map(NodeName::to_string),
            members: store.members.iter().map(|member| store_member(picture, member)).collect(),
        },
        clusters: picture.spec.clusters.iter().map(|cluster| cluster_status(picture, cluster)).collect(),
        proxy: Vec::new(),
    }
}

fn store_member(picture: &Picture, member: &MemberHealth) -> StoreMember {
    let heard = heard(picture, &member.name);
    StoreMember {
        name: member.name.to_string(),
        voter: member.voter,
        reachable: heard.map(|heard| heard.is_fresh()),
    }
}

fn cluster_status(picture: &Picture, cluster: &ClusterSpec) -> Cluster {
    let record = picture.record.as_ref();
    let reign = record.and_then(Record::open_reign);
    let holder = reign.map(|reign| &reign.holder.node);
    let primary = holder.and_then(|node| heard(picture, node)).filter(Heard::is_fresh);
    let leads = primary.as_ref().filter(|heard| heard.gossip.running == Is::Primary);
    let gate = match (reign, leads) {
        (Some(_), Some(heard)) if heard.gossip.show.gate_open => Gate::Open,
        _ => Gate::Closed,
    };
    let rule = record.and_then(|record| record.rules.as_ref()).map(|rules| rules.target());
    let wanted = u32::try_from(cluster.durability.needed()).unwrap_or(u32::MAX);
    let voters = rule.zip(holder).map(|(rule, holder)| voters(rule, holder)).unwrap_or_default();
    let mut members: Vec<Member> =
        cluster.nodes.iter().map(|node| member(picture, record, cluster, node, holder)).collect();
    members.extend(picture.spec.witnesses.iter().map(|witness| witness_member(picture, &witness.name, &witness.host)));
    Cluster {
        name: cluster.name.to_string(),
        system_identifier: record.and_then(|record| record.system).map(|system| system.to_string()),
        term: record.map(|record| record.term.0),
        primary: leads.and(holder).map(NodeName::to_string),
        gate,
        durability: Durability {
            mode: if wanted > 0 { DurabilityMode::Quorum } else { DurabilityMode::Async },
            needed: rule.map_or(wanted, |rule| rule.needed),
            voters,
            degraded: rule.is_some_and(|rule| rule.needed == 0) && wanted > 0,
        },
        members,
        backup: None,
    }
}

fn voters(rule: &Rule, holder: &NodeName) -> Vec<String> {
    rule.voters(holder).map(|member| member.node.to_string()).collect()
}

fn member(
    picture: &Picture,
    record: Option<&Record>,
    cluster: &ClusterSpec,
    node: &NodeSpec,
    holder: Option<&NodeName>,
) -> Member {
    let heard = heard(picture, &node.name);
    let fresh = heard.as_ref().filter(|heard| heard.is_fresh()).map(|heard| heard.gossip);
    let is_primary = fresh.is_some_and(|gossip| gossip.running == Is::Primary) && holder == Some(&node.name);
    let barred = record.and_then(|record| record.nodes.get(&node.name)).and_then(|entry| entry.barred.as_ref());
    let primary_lsn = holder.and_then(|holder| self::heard(picture, holder)).and_then(|heard| heard.gossip.flush_lsn);
    let lsn = fresh.and_then(|gossip| gossip.flush_lsn);
    let state = match fresh {
        None => State::Unreachable,
        Some(_) if barred.is_some() => State::Barred,
        Some(gossip) => match gossip.show.state.unwrap_or(State::Starting) {
            // Streaming says that it keeps up; one that is far behind is still catching up.
            State::Streaming if lag(primary_lsn, lsn).is_some_and(|lag| lag > CATCHING_UP_BYTES) => State::CatchingUp,
            state => state,
        },
    };
    Member {
        name: node.name.to_string(),
        host: node.host.clone(),
        port: Some(node.port),
        role: if is_primary {
            Role::Primary
        } else if node.delay.is_some() {
            Role::Delayed
        } else {
            Role::Standby
        },
        state,
        timeline: fresh.and_then(|gossip| gossip.timeline).map(|timeline| timeline.0),
        lsn: lsn.map(|lsn| lsn.to_string()),
        lag_bytes: if is_primary { lsn.map(|_| 0) } else { lag(primary_lsn, lsn) },
        replay_lag_ms: match (is_primary, fresh) {
            (true, Some(_)) => Some(0),
            (_, Some(gossip)) => gossip.show.replay_lag_ms,
            _ => None,
        },
        sync: sync(record, cluster, node, is_primary, fresh),
        upstream: fresh.and_then(|gossip| gossip.show.upstream.as_ref()).map(NodeName::to_string),
        reason: match &heard {
            None => "has not been heard yet".to_owned(),
            Some(heard) if !heard.is_fresh() => silence(heard.ago),
            Some(heard) => heard.gossip.show.reason.clone(),
        },
        pending_restart: fresh.and_then(|gossip| gossip.show.pending_restart),
    }
}

/// Behind by more than this a standby is shown as catching up.
const CATCHING_UP_BYTES: u64 = 16 << 20;

fn lag(primary: Option<Lsn>, own: Option<Lsn>) -> Option<u64> {
    Some(primary?.bytes_since(own?))
}

fn silence(ago: Duration) -> String {
    format!("has not been heard for {} s", ago.as_secs())
}

fn sync(
    record: Option<&Record>,
    cluster: &ClusterSpec,
    node: &NodeSpec,
    is_primary: bool,
    fresh: Option<&Gossip>,
) -> Option<Sync> {
    if is_primary {
        return Some(Sync::Primary);
    }
    let rule = record?.rules.as_ref()?.target();
    let gossip = fresh?;
    if gossip.running != Is::Standby {
        return None;
    }
    Some(match (rule.contains_node(&node.name), rule.needed) {
        (true, 1..) => Sync::Quorum,
        _ if cluster.durability.needed() > 0 && node.voter_candidate() => Sync::Potential,
        _ => Sync::Async,
    })
}

fn witness_member(picture: &Picture, name: &NodeName, host: &str) -> Member {
    let heard = heard(picture, name);
    let fresh = heard.as_ref().is_some_and(Heard::is_fresh);
    Member {
        name: name.to_string(),
        host: host.to_owned(),
        port: None,
        role: Role::Witness,
        state: if fresh { State::Running } else { State::Unreachable },
        timeline: None,
        lsn: None,
        lag_bytes: None,
        replay_lag_ms: None,
        sync: None,
        upstream: None,
        reason: match &heard {
            None => "has not been heard yet".to_owned(),
            Some(heard) if !heard.is_fresh() => silence(heard.ago),
            Some(heard) => heard.gossip.show.reason.clone(),
        },
        pending_restart: None,
    }
}

pub(crate) fn explain(picture: &Picture, _store: &Health) -> Explain {
    let cluster = picture.spec.clusters.first().map(|cluster| cluster.name.to_string());
    let nodes = picture.spec.agents().map(|(name, _, _)| explanation(picture, cluster.clone(), name));
    Explain { nodes: nodes.collect() }
}

fn explanation(picture: &Picture, cluster: Option<String>, node: &NodeName) -> Explanation {
    let heard = heard(picture, node);
    let age_ms = heard.as_ref().map(|heard| millis(heard.ago));
    let (reason_code, reason, for_ms) = match &heard {
        None => ("never-heard".to_owned(), "has not been heard since this agent started".to_owned(), None),
        Some(heard) if !heard.is_fresh() => {
            let last = heard.gossip.show.reason.as_str();
            let said = if last.is_empty() { String::new() } else { format!("; the last it said was that it {last}") };
            ("unreachable".to_owned(), format!("{}{said}", silence(heard.ago)), Some(millis(heard.ago)))
        }
        Some(heard) => {
            let show = &heard.gossip.show;
            (show.reason_code.clone(), show.reason.clone(), Some(show.for_ms + millis(heard.ago)))
        }
    };
    let waiting = heard.as_ref().map(|heard| heard.gossip.show.waiting_for.as_slice()).unwrap_or_default();
    let hint = match reason_code.as_str() {
        "waiting-for-votes" | "nobody-electable" => Some(
            "bring one of them back; if it is gone for good: pgherd failover --to NODE --accept-data-loss".to_owned(),
        ),
        "commits-wait" => {
            Some("bring a voter back, or set degrade_after in the herd file and pgherd apply it".to_owned())
        }
        "unreachable" | "never-heard" => Some(format!("is its host up, and its agent: pgherd logs --node {node}")),
        _ => None,
    };
    Explanation {
        cluster,
        node: node.to_string(),
        reason_code,
        reason,
        waiting_for: waiting.iter().map(|name| format!("the vote of {name}")).collect(),
        hint,
        for_ms,
        age_ms,
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn history(picture: &Picture, query: &HistoryQuery) -> History {
    let cluster = picture.spec.clusters.first().map(|cluster| cluster.name.to_string()).unwrap_or_default();
    let events = picture.record.iter().flat_map(|record| &record.events);
    let mut entries: Vec<HistoryEntry> = events
        .map(|event| HistoryEntry {
            at: i64::try_from(event.unix_seconds)
                .ok()
                .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
                .map_or_else(String::new, |at| at.to_string()),
            cluster: cluster.clone(),
            event: event_of(&event.code),
            term: Some(event.term.0),
            timeline: None,
            from: None,
            to: None,
            reason_code: event.code.clone(),
            reason: event.text.clone(),
            lost_transactions: None,
            lost_bytes: None,
            write_gap_ms: None,
            operator: None,
        })
        .collect();
    if let Some(limit) = query.limit {
        let excess = entries.len().saturating_sub(limit as usize);
        entries.drain(..excess);
    }
    History { entries }
}

fn event_of(code: &str) -> Event {
    match code {
        "founded" | "election-bootstrap" => Event::Bootstrap,
        "election-switchover" | "switchover-asked" | "switchover-cancelled" => Event::Switchover,
        "forced" | "election-forced" => Event::ForcedFailover,
        "election-crash" | "election-damage" | "election-lease-lost" | "election-unreachable"
        | "election-agent-silent" | "election-fenced" | "election-stop" => Event::Failover,
        "elected" | "incumbent" | "promoted" | "gate-opened" => Event::Election,
        "enlisted" => Event::Reclone,
        "rule-changed" | "rule-undone" => Event::RuleChanged,
        "barred" => Event::Barred,
        "unbarred" => Event::Unbarred,
        _ => Event::Unknown,
    }
}

/// For the health paths of this node.
pub(crate) fn health(picture: &Picture, _store: &Health) -> HealthView {
    let own = &picture.own;
    let record = picture.record.as_ref();
    let spec = picture.spec.node(&own.node);
    let holds = record.and_then(Record::open_reign).is_some_and(|reign| reign.holder.node == own.node);
    let leads = holds && own.running == Is::Primary;
    let rule = record.and_then(|record| record.rules.as_ref()).map(|rules| rules.target());
    let delayed = spec.is_some_and(|(_, node)| node.delay.is_some());
    let holder = record.and_then(|record| record.holder());
    let primary_lsn = holder.and_then(|holder| heard(picture, &holder.node)).and_then(|heard| heard.gossip.flush_lsn);
    HealthView {
        cluster: own.cluster.to_string(),
        node: own.node.to_string(),
        role: match (spec, leads, delayed) {
            (None, _, _) => Role::Witness,
            (_, true, _) => Role::Primary,
            (_, _, true) => Role::Delayed,
            _ => Role::Standby,
        },
        gate_open: leads && own.show.gate_open,
        postgres: match own.running {
            Is::Primary | Is::Standby => Postgres::Running,
            Is::Nothing => Postgres::Stopped,
            Is::Unknown => Postgres::Starting,
        },
        replication_state: match own.show.state {
            Some(State::Streaming | State::CatchingUp) if own.show.upstream.is_some() => Some("streaming".to_owned()),
            Some(State::CatchingUp) => Some("in archive recovery".to_owned()),
            _ => None,
        },
        is_voter: rule.is_some_and(|rule| rule.needed > 0 && rule.contains_node(&own.node)) && !leads,
        every_voter_needed: rule.is_some_and(|rule| rule.members.len() == rule.needed as usize + 1),
        in_read_pool: !delayed,
        primary_lsn: primary_lsn.map(|lsn| lsn.0),
        received_lsn: own.flush_lsn.map(|lsn| lsn.0),
        replayed_lsn: own.flush_lsn.map(|lsn| lsn.0),
        agent_is_alive: true,
        is_paused: false,
        timeline: own.timeline.map(|timeline| timeline.0),
        system_identifier: record.and_then(|record| record.system).map(|system| system.to_string()),
        server_version: None,
        pending_restart: own.show.pending_restart.unwrap_or(false),
        postmaster_start_time: None,
        store_last_seen_s: None,
    }
}

/// Before the first picture nothing is known, and no path passes.
pub(crate) fn unknown_health(identity: &Identity) -> HealthView {
    HealthView {
        cluster: identity.herd.to_string(),
        node: identity.node.to_string(),
        role: Role::Standby,
        gate_open: false,
        postgres: Postgres::Starting,
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
