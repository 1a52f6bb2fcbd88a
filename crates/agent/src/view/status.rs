//! `pgherd status`: the contract in [`pgherd_api::status`], field by field.

use pgherd_api::status::{
    Backup, BackupDrill, BackupEnded, BackupFilled, BackupRunning, Cluster, Durability, DurabilityMode, Gate,
    Member, RecoveryWindow, Restore, Role, State, Status, Store, StoreKind, StoreMember, Sync, Vip,
};
use pgherd_core::record::{self, BackupEnd, BackupOutcome, DrillEnd};
use pgherd_core::spec::{self, ClusterSpec, NodeSpec, WitnessSpec};
use pgherd_core::types::NodeName;
use pgherd_dcs::{Kind, MemberHealth};

use super::{Seen, Sight};

/// A standby that streams and is further behind than this is shown as catching up.
const CATCHING_UP_BYTES: u64 = 16 << 20;

pub(crate) fn status(sight: &Sight<'_>) -> Status {
    let spec = &sight.picture.spec;
    Status {
        herd: spec.name.to_string(),
        generation: sight.picture.spec_generation,
        store: store(sight),
        clusters: spec.clusters.iter().map(|of| cluster(sight, of, &spec.witnesses)).collect(),
        proxy: Vec::new(),
    }
}

fn store(sight: &Sight<'_>) -> Store {
    Store {
        kind: match sight.store.kind {
            // The memory store is for tests alone; it has the embedded one's ways.
            Kind::Raft | Kind::Memory => StoreKind::Raft,
        },
        leader: sight.store.leader.as_ref().map(NodeName::to_string),
        members: sight.store.members.iter().map(|member| store_member(sight, member)).collect(),
    }
}

fn store_member(sight: &Sight<'_>, member: &MemberHealth) -> StoreMember {
    StoreMember {
        name: member.name.to_string(),
        voter: member.voter,
        reachable: super::check::store_member_reachable(sight, member),
    }
}

fn cluster(sight: &Sight<'_>, spec: &ClusterSpec, witnesses: &[WitnessSpec]) -> Cluster {
    let ours = spec.name == sight.picture.own.cluster;
    let record = sight.record().filter(|_| ours);
    let nodes = spec.nodes.iter().map(|node| member(sight, node));
    Cluster {
        name: spec.name.to_string(),
        system_identifier: record.and_then(|record| record.system).map(|system| system.to_string()),
        term: record.map(|record| record.term.0),
        primary: sight.primary().filter(|_| ours).map(NodeName::to_string),
        gate: if ours && sight.gate_open() { Gate::Open } else { Gate::Closed },
        durability: durability(sight, spec, ours),
        members: nodes.chain(witnesses.iter().map(|of| witness(sight, of))).collect(),
        backup: spec.backup.as_ref().filter(|_| ours).map(|wanted| backup(sight, wanted)),
        vip: spec.vip.as_ref().map(|wanted| vip(sight, spec, wanted)),
        restore: record.and_then(|record| record.restore.as_ref()).map(restore),
    }
}

fn restore(restore: &record::Restore) -> Restore {
    Restore {
        node: restore.node.to_string(),
        backup: restore.moment.backup.clone(),
        end_lsn: restore.moment.end.to_string(),
        timeline: restore.moment.timeline.0,
        held: restore.held.is_some(),
        trouble: restore.trouble.clone(),
    }
}

fn backup(sight: &Sight<'_>, wanted: &spec::BackupSpec) -> Backup {
    let archive = sight.archive();
    let says = sight.archive_says();
    let running = archive.and_then(|archive| archive.backup.as_ref()).map(|running| {
        let show = sight.seen(&running.node).says.and_then(|says| says.show.backup.as_ref());
        let show = show.filter(|show| show.number == running.number);
        BackupRunning {
            number: running.number,
            node: running.node.to_string(),
            done_bytes: show.map(|show| show.done_bytes),
            total_bytes: show.map(|show| show.total_bytes).filter(|total| *total > 0),
            held_back_to: show.and_then(|show| show.held_to),
        }
    });
    Backup {
        recovery_window: sight
            .recovery_window()
            .map(|(from, to)| RecoveryWindow { from: moment(from), to: moment(to) }),
        last: says.and_then(|says| says.newest.clone()),
        wal_lag_seconds: says.and_then(|says| says.behind_ms).map(|ms| ms as f64 / 1000.0),
        repository: wanted.repository.location.to_string(),
        owner: archive.map(|archive| archive.owner.to_string()),
        backups: says.map(|says| says.backups),
        running,
        ended: archive.and_then(|archive| archive.ended.as_ref()).map(ended),
        drill: archive.and_then(|archive| archive.drill.as_ref()).map(drill),
        gaps: says.map_or_else(Vec::new, |says| says.gaps.clone()),
        asked: says.and_then(|says| says.asked.clone()),
        filled: says.and_then(|says| says.filled.as_ref()).map(|filled| BackupFilled {
            at: moment(filled.unix_seconds),
            files: filled.files,
            from: filled.from.clone(),
        }),
        trouble: sight.archive_trouble(),
    }
}

fn drill(end: &DrillEnd) -> BackupDrill {
    BackupDrill {
        node: end.node.to_string(),
        at: moment(i64::try_from(end.began_unix_seconds).unwrap_or(i64::MAX)),
        seconds: end.seconds,
        backup: end.backup.clone(),
        failed: end.failed.clone(),
    }
}

fn ended(end: &BackupEnd) -> BackupEnded {
    let (name, failed) = match &end.outcome {
        BackupOutcome::Complete { id } => (Some(id.clone()), None),
        BackupOutcome::Failed { why } => (None, Some(why.clone())),
    };
    let at = end.unix_seconds.and_then(|at| i64::try_from(at).ok()).map(moment);
    BackupEnded { number: end.number, node: end.node.to_string(), at, name, failed }
}

/// RFC 3339, to the second.
fn moment(unix_seconds: i64) -> String {
    jiff::Timestamp::from_second(unix_seconds).map_or_else(|_| unix_seconds.to_string(), |at| at.to_string())
}

fn vip(sight: &Sight<'_>, cluster: &ClusterSpec, wanted: &spec::VipSpec) -> Vip {
    let troubles = cluster.nodes.iter().filter_map(|node| Some((&node.name, sight.vip_trouble(&node.name)?)));
    Vip {
        address: wanted.address.to_string(),
        interface: wanted.interface.clone(),
        holder: sight.vip_holders(cluster).first().map(ToString::to_string),
        trouble: troubles.map(|(node, why)| format!("{node}: {why}")).collect(),
    }
}

fn durability(sight: &Sight<'_>, spec: &ClusterSpec, ours: bool) -> Durability {
    let rule = sight.rule().filter(|_| ours);
    let wanted = u32::try_from(spec.durability.needed()).unwrap_or(u32::MAX);
    Durability {
        mode: match spec.durability {
            spec::Durability::Quorum { .. } => DurabilityMode::Quorum,
            spec::Durability::Async => DurabilityMode::Async,
        },
        needed: rule.map_or(wanted, |rule| rule.needed),
        voters: match ours && rule.is_some_and(|rule| rule.needed > 0) {
            true => sight.voters().into_iter().map(|voter| voter.node.to_string()).collect(),
            false => Vec::new(),
        },
        degraded: ours && sight.degraded(),
    }
}

/// Everyone but the holder of the open term is a standby, whatever its PostgreSQL takes itself for.
pub(super) fn role(sight: &Sight<'_>, node: &NodeSpec) -> Role {
    if sight.primary() == Some(&node.name) {
        Role::Primary
    } else if node.delay.is_some() {
        Role::Delayed
    } else {
        Role::Standby
    }
}

fn member<'a>(sight: &Sight<'a>, node: &'a NodeSpec) -> Member {
    let seen = sight.seen(&node.name);
    let role = role(sight, node);
    let says = seen.says;
    let state = state(sight, seen);
    Member {
        name: node.name.to_string(),
        host: node.host.clone(),
        port: Some(node.port),
        role,
        state,
        timeline: says.and_then(|says| says.timeline).map(|timeline| timeline.0),
        lsn: says.and_then(|says| says.flush_lsn).map(|lsn| lsn.to_string()),
        lag_bytes: lag_bytes(sight, seen),
        replay_lag_ms: match role {
            Role::Primary => says.map(|_| 0),
            _ => says.and_then(|says| says.show.replay_lag_ms),
        },
        sync: sync(sight, node, state),
        upstream: says.and_then(|says| says.show.upstream.as_ref()).map(NodeName::to_string),
        reason: says.map_or_else(|| seen.silence(), |says| says.show.reason.clone()),
        pending_restart: says.and_then(|says| says.show.pending_restart),
    }
}

pub(super) fn role_of_witness(is_keeper: bool) -> Role {
    if is_keeper { Role::Keeper } else { Role::Witness }
}

fn witness<'a>(sight: &Sight<'a>, witness: &'a WitnessSpec) -> Member {
    let seen = sight.seen(&witness.name);
    Member {
        name: witness.name.to_string(),
        host: witness.host.clone(),
        port: None,
        role: role_of_witness(sight.picture.spec.is_keeper(&witness.name)),
        state: if seen.is_heard() { State::Running } else { State::Unreachable },
        timeline: None,
        lsn: None,
        lag_bytes: None,
        replay_lag_ms: None,
        sync: None,
        upstream: None,
        reason: seen.says.map_or_else(|| seen.silence(), |says| says.show.reason.clone()),
        pending_restart: None,
    }
}

pub(super) fn state(sight: &Sight<'_>, seen: Seen<'_>) -> State {
    let Some(says) = seen.says else { return State::Unreachable };
    if sight.barred(seen.name).is_some() {
        return State::Barred;
    }
    match says.show.state.unwrap_or(State::Starting) {
        // To stream says that it keeps up.
        State::Streaming if lag_bytes(sight, seen).is_some_and(|lag| lag >= CATCHING_UP_BYTES) => {
            State::CatchingUp
        }
        state => state,
    }
}

pub(super) fn lag_bytes(sight: &Sight<'_>, seen: Seen<'_>) -> Option<u64> {
    Some(sight.primary_flush()?.bytes_since(seen.says?.flush_lsn?))
}

fn sync(sight: &Sight<'_>, node: &NodeSpec, state: State) -> Option<Sync> {
    if sight.primary() == Some(&node.name) {
        return Some(Sync::Primary);
    }
    if state != State::Streaming {
        return None;
    }
    let rules = sight.record()?.rules.as_ref()?;
    let member = sight.record()?.member(&node.name)?;
    Some(match &rules.next {
        _ if rules.target().needed == 0 => Sync::Async,
        Some(next) if next.members.contains(&member) && !rules.current.members.contains(&member) => {
            Sync::Potential
        }
        _ if rules.target().members.contains(&member) => Sync::Quorum,
        _ => Sync::Async,
    })
}
