//! One task beside each member: sends heartbeats, keeps the log small, knows the health and says what
//! changed.
//!
//! Left out: elections and replication (openraft). Hazard: silence. A member that cannot take part any more
//! must show in [`Health::failed`], because everything else goes on looking as it did.

use std::sync::Arc;

use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;

use super::Timing;
use super::disk::Disk;
use super::log::Log;
use super::network::Peers;
use super::types::{Metrics, Raft};
use crate::store::{Health, Kind, MemberHealth, Role};

/// The log is compacted when it has grown beyond this, however few entries that is, and then none are kept.
const MAX_LOG_BYTES: usize = 8 * 1024 * 1024;

pub(super) fn start(
    raft: Raft,
    peers: Arc<Peers>,
    disk: Disk,
    log: Log,
    timing: Timing,
) -> (watch::Receiver<Health>, AbortHandle) {
    let first = health(&raft.metrics().borrow_watched(), &peers, None);
    let (sender, receiver) = watch::channel(first);
    let keeper = tokio::spawn(keep(raft, peers, disk, log, timing, sender));
    (receiver, keeper.abort_handle())
}

async fn keep(
    raft: Raft,
    peers: Arc<Peers>,
    disk: Disk,
    log: Log,
    timing: Timing,
    sender: watch::Sender<Health>,
) {
    let mut metrics = raft.metrics();
    let mut disk_failed = disk.failed();
    let mut removed = peers.removed.subscribe();
    let mut beat = tokio::time::interval(timing.heartbeat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let running = tokio::select! {
            changed = metrics.changed() => changed.is_ok(),
            changed = disk_failed.changed() => changed.is_ok(),
            changed = removed.changed() => changed.is_ok(),
            _ = beat.tick() => {
                let leads = metrics.borrow_watched().state == ServerState::Leader;
                if leads && raft.trigger().heartbeat().await.is_err() {
                    tracing::debug!("raft stopped before a heartbeat");
                }
                if log.bytes() > MAX_LOG_BYTES {
                    let now = metrics.borrow_watched().clone();
                    compact(&raft, &now).await;
                }
                true
            }
        };
        let (now, was_removed) = {
            let metrics = metrics.borrow_watched();
            let removal = removed.borrow().clone().or_else(|| removal(&metrics, &peers));
            let was_removed = removal.is_some();
            (health(&metrics, &peers, disk_failed.borrow().clone().or(removal)), was_removed)
        };
        publish(&sender, now, was_removed);
        if !running {
            return;
        }
    }
}

/// One step: what a snapshot covers goes, and when that is gone already, a new snapshot is made.
async fn compact(raft: &Raft, metrics: &Metrics) {
    let asked = match metrics.snapshot {
        Some(snapshot) if metrics.purged < metrics.snapshot => raft.trigger().purge_log(snapshot.index).await,
        _ if metrics.snapshot < metrics.last_applied => raft.trigger().snapshot().await,
        _ => Ok(()),
    };
    if let Err(error) = asked {
        tracing::debug!(%error, "raft stopped before its log was compacted");
    }
}

/// Says what changed. A removal was somebody's will; any other end needs a person.
fn publish(sender: &watch::Sender<Health>, now: Health, was_removed: bool) {
    sender.send_if_modified(|health| {
        let changed = *health != now;
        if health.leader != now.leader {
            match &now.leader {
                Some(leader) => tracing::info!(%leader, raft_term = now.raft_term, "raft leader"),
                None => tracing::info!(raft_term = now.raft_term, "no raft leader"),
            }
        }
        let names = |health: &Health, voter: bool| {
            let members = health.members.iter().filter(|member| member.voter == voter);
            members.map(|member| member.name.to_string()).collect::<Vec<_>>().join(" ")
        };
        let (voters, learners) = (names(&now, true), names(&now, false));
        if (names(health, true), names(health, false)) != (voters.clone(), learners.clone()) {
            tracing::info!(voters, learners, "raft members");
        }
        if let (None, Some(why)) = (&health.failed, &now.failed) {
            if was_removed {
                tracing::warn!(why, "this member takes no part in the store any more");
            } else {
                tracing::error!(why, "this member takes no part in the store any more");
            }
        }
        *health = now;
        changed
    });
}

/// The sentence, if the membership that this member has seen last is one without it, made after its join.
fn removal(metrics: &Metrics, peers: &Peers) -> Option<String> {
    let own = &peers.own;
    let committed = &metrics.committed_membership_config;
    let after_the_join = committed.log_id().is_some_and(|log_id| own.id < log_id.index);
    let gone = after_the_join && committed.membership().get_node(&own.id).is_none();
    gone.then(|| format!("{} with raft id {} was removed", own.name, own.id))
}

fn health(metrics: &Metrics, peers: &Peers, failed: Option<String>) -> Health {
    let own = &peers.own;
    let membership = metrics.membership_config.membership();
    let voters: std::collections::BTreeSet<u64> = membership.voter_ids().collect();
    peers.retain(|id| membership.get_node(&id).is_some());
    let members = membership.nodes().map(|(id, member)| {
        let contact = peers.contact(*id);
        let myself = *id == own.id;
        MemberHealth {
            raft_id: *id,
            name: member.name.clone(),
            address: member.address.clone(),
            host: member.host.clone(),
            voter: voters.contains(id),
            last_contact: if myself { Some(std::time::Instant::now()) } else { contact.heard },
            trouble: contact.trouble(),
        }
    });
    let failed =
        failed.or_else(|| metrics.running_state.as_ref().err().map(|error| format!("raft stopped: {error}")));
    let leader = metrics.current_leader.filter(|_| failed.is_none());
    let role = match metrics.state {
        _ if failed.is_some() => Role::Stopped,
        ServerState::Leader => Role::Leader,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Learner => Role::Learner,
        ServerState::Shutdown => Role::Stopped,
    };
    Health {
        kind: Kind::Raft,
        leader: leader.and_then(|id| membership.get_node(&id)).map(|member| member.name.clone()),
        role,
        raft_term: metrics.current_term,
        members: members.collect(),
        failed,
    }
}
