//! The planned stop of a herd: in an order in which no standby misses what the primary has written.
//!
//! First the primary: its gate is closed, and PostgreSQL's own fast shutdown waits until the standbys have
//! its last WAL. Only then the standbys, and when no PostgreSQL is left the agents, all at once: an agent
//! that went earlier would look to the others like a failure to act on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgherd_api::Client;
use pgherd_api::status::State;
use pgherd_core::types::NodeName;
use rustix::process::Signal;

use super::LocalError;
use super::event::Event;
use super::process::{self, Running};

/// A shutdown checkpoint of a busy server; standbys that are gone are not waited for by the agent.
const PRIMARY_WITHIN: Duration = Duration::from_secs(60);
const STANDBY_WITHIN: Duration = Duration::from_secs(60);
/// An agent without a PostgreSQL has little to do before it ends.
const AGENT_WITHIN: Duration = Duration::from_secs(10);
/// PostgreSQL without an agent: a fast shutdown first, then an immediate one, then none of its own.
const ORPHAN_STEPS: [(Signal, Duration); 3] = [
    (Signal::INT, Duration::from_secs(30)),
    (Signal::QUIT, Duration::from_secs(5)),
    (Signal::KILL, Duration::from_secs(10)),
];
/// For an agent to see what has happened to its PostgreSQL.
const SEEN_WITHIN: Duration = Duration::from_secs(3);
/// For fences to see that nobody needs them any more.
const FENCES_WITHIN: Duration = Duration::from_secs(3);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One node that is to be stopped.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) node: NodeName,
    pub(super) client: Client,
    pub(super) data_dir: PathBuf,
    /// `None` if its agent does not run.
    pub(super) agent: Option<Arc<Running>>,
}

pub(super) async fn in_order(
    targets: &[Target],
    bin_dir: &Path,
    tell: &impl Fn(Event),
) -> Result<(), LocalError> {
    let primary = primary_of(targets).await;
    let is_primary = |target: &&Target| primary.as_deref() == Some(target.node.as_str());
    for target in targets.iter().filter(is_primary) {
        stop_postgres(target, PRIMARY_WITHIN, tell).await;
    }
    let standbys = targets.iter().filter(|target| !is_primary(target));
    futures_util::future::join_all(standbys.map(|target| stop_postgres(target, STANDBY_WITHIN, tell))).await;
    futures_util::future::join_all(targets.iter().map(|target| end_agent(target, tell))).await;
    futures_util::future::join_all(targets.iter().map(|target| end_orphans(target, tell))).await;
    let left: Vec<String> = targets
        .iter()
        .filter(|target| process::postgres_stands_in(&target.data_dir))
        .map(|target| target.node.to_string())
        .collect();
    if !left.is_empty() {
        return Err(LocalError::StillRunning { nodes: left });
    }
    end_fences(bin_dir).await;
    Ok(())
}

/// With every PostgreSQL of the herd gone a fence has nothing left to guard. Most see that themselves; one
/// that was left armed would wait for agents to tell, which are gone too.
async fn end_fences(bin_dir: &Path) {
    let gone = async {
        while !process::of_command(bin_dir, None, "fence").is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    if tokio::time::timeout(FENCES_WITHIN, gone).await.is_ok() {
        return;
    }
    for pid in process::of_command(bin_dir, None, "fence") {
        match Running::open(pid) {
            Ok(Some(fence)) if fence.runs_program_in(bin_dir) => {
                tracing::info!(pid, "ends a fence that nobody needs any more");
                fence.signal(Signal::KILL);
                fence.ended_within(AGENT_WITHIN).await;
            }
            _ => {}
        }
    }
}

/// The primary, as the first agent that answers knows it.
async fn primary_of(targets: &[Target]) -> Option<String> {
    for target in targets {
        if let Ok(status) = target.client.within(ANSWER_WITHIN).status().await {
            return status.clusters.into_iter().find_map(|cluster| cluster.primary);
        }
    }
    None
}

/// Has a node's agent stop its PostgreSQL and keep it stopped.
async fn stop_postgres(target: &Target, within: Duration, tell: &impl Fn(Event)) {
    let Some(agent) = &target.agent else { return };
    if !process::postgres_stands_in(&target.data_dir) {
        return;
    }
    tell(Event::step(&target.node, "stops PostgreSQL"));
    agent.signal(super::STOP_POSTGRES);
    let gone = async {
        while process::postgres_stands_in(&target.data_dir) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    if tokio::time::timeout(within, gone).await.is_err() {
        return tell(Event::trouble(
            &target.node,
            format!("PostgreSQL has not stopped in {} s", within.as_secs()),
        ));
    }
    // An agent that has seen it itself has let its fence go; one that was ended before has not.
    let seen = async {
        while !says_stopped(target).await {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let _in_time = tokio::time::timeout(SEEN_WITHIN, seen).await;
    tell(Event::step(&target.node, "PostgreSQL is stopped"));
}

async fn says_stopped(target: &Target) -> bool {
    let Ok(status) = target.client.within(ANSWER_WITHIN).status().await else { return false };
    let mut members = status.clusters.iter().flat_map(|cluster| &cluster.members);
    members.any(|member| member.name == target.node.as_str() && member.state == State::Stopped)
}

async fn end_agent(target: &Target, tell: &impl Fn(Event)) {
    let Some(agent) = &target.agent else { return };
    agent.signal(Signal::TERM);
    // A frozen one gets the signal only once it runs again.
    agent.signal(Signal::CONT);
    if agent.ended_within(AGENT_WITHIN).await {
        return;
    }
    tell(Event::trouble(&target.node, "the agent does not end, and is killed"));
    agent.signal(Signal::KILL);
    agent.ended_within(AGENT_WITHIN).await;
}

/// What an agent could not stop, or what had none: nothing may be left that writes behind our back.
async fn end_orphans(target: &Target, tell: &impl Fn(Event)) {
    for (signal, within) in ORPHAN_STEPS {
        if !process::postgres_stands_in(&target.data_dir) {
            return;
        }
        tell(Event::trouble(
            &target.node,
            format!("PostgreSQL runs without an agent, and is sent {signal:?}"),
        ));
        process::signal_postgres_in(&target.data_dir, signal);
        let gone = async {
            while process::postgres_stands_in(&target.data_dir) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        // Whether it worked, the next look tells.
        let _in_time = tokio::time::timeout(within, gone).await;
    }
}
