//! What a supervisor tells those who watch: steps, the herd's status, and how it ends. And, as a pure
//! function, which steps a change of status is worth.

use std::collections::BTreeSet;

use pgherd_api::Status;
use pgherd_api::status::{Cluster, DurabilityMode, Gate, Member, Role, State, Sync};
use serde::{Deserialize, Serialize};

/// Also a line on the supervisor's socket: a later version only adds variants and fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Worth a line. A later step of the same node replaces it where there is one line per node.
    Step { node: Option<String>, text: String },
    /// Worth a line, and a person's attention.
    Trouble { node: Option<String>, text: String },
    /// The newest topology.
    Status { status: Box<Status> },
    /// Every standby streams and counts, for the first time since the supervisor began.
    Healthy { after_ms: u64 },
    /// The planned stop has begun.
    Stopping,
    /// Everything has ended in order.
    Stopped,
    /// The supervisor ends with this.
    Failed { message: String, hint: Option<String> },
}

impl Event {
    pub(super) fn step(node: &impl ToString, text: impl Into<String>) -> Event {
        Event::Step { node: Some(node.to_string()), text: text.into() }
    }

    pub(super) fn herd(text: impl Into<String>) -> Event {
        Event::Step { node: None, text: text.into() }
    }

    pub(super) fn trouble(node: &impl ToString, text: impl Into<String>) -> Event {
        Event::Trouble { node: Some(node.to_string()), text: text.into() }
    }

    /// No other event follows it.
    pub fn is_last(&self) -> bool {
        matches!(self, Event::Stopped | Event::Failed { .. })
    }
}

/// The lines that tell how the herd came from one status to the next.
pub(super) fn changes(before: Option<&Status>, after: &Status) -> Vec<Event> {
    let mut events = Vec::new();
    for cluster in &after.clusters {
        let old = before.and_then(|status| status.clusters.iter().find(|old| old.name == cluster.name));
        for member in &cluster.members {
            let old = old.and_then(|old| old.members.iter().find(|old| old.name == member.name));
            let text = told(member);
            // One that has not begun yet is no news.
            let silent = old.is_none() && member.state == State::Unreachable;
            if !silent && old.map(told).as_ref() != Some(&text) {
                events.push(Event::Step { node: Some(member.name.clone()), text });
            }
        }
        let said = sentence(cluster);
        if old.is_none() && cluster.primary.is_none() {
            continue;
        }
        if old.map(sentence).as_ref() != Some(&said) {
            events.push(Event::herd(said));
        }
    }
    events
}

/// What a member is doing, as far as a change of it is worth a line.
fn told(member: &Member) -> String {
    match (member.role, member.state) {
        (Role::Witness | Role::Keeper, State::Unreachable) => "does not answer".to_owned(),
        (Role::Witness, _) => "votes in the store".to_owned(),
        (Role::Primary, State::Running) => "is primary".to_owned(),
        (_, State::Initializing) if member.reason.is_empty() => "has no data yet".to_owned(),
        (_, State::Unreachable) => "does not answer".to_owned(),
        (_, State::Streaming) => match member.sync {
            Some(Sync::Quorum) => "streams, and counts for commits".to_owned(),
            _ => "streams".to_owned(),
        },
        // The reason says more: how far, from whom.
        (_, State::Initializing | State::Cloning | State::Rewinding | State::Barred | State::CatchingUp) => {
            member.reason.clone()
        }
        (_, state) => spelled(state).to_owned(),
    }
}

fn spelled(state: State) -> &'static str {
    match state {
        State::Starting => "starts PostgreSQL",
        State::Running => "runs",
        State::Promoting => "is being promoted",
        State::Paused => "is paused",
        State::Stopped => "PostgreSQL is stopped",
        _ => "changes",
    }
}

fn sentence(cluster: &Cluster) -> String {
    let name = &cluster.name;
    match (&cluster.primary, cluster.gate) {
        (Some(primary), Gate::Open) if cluster.durability.degraded => {
            format!("{name}: open for clients on {primary}, degraded")
        }
        (Some(primary), Gate::Open) => format!("{name}: open for clients on {primary}"),
        (Some(primary), Gate::Draining) => format!("{name}: {primary} hands over"),
        (Some(primary), Gate::Closed) => format!("{name}: {primary} is primary, not open for clients yet"),
        (None, _) => format!("{name}: no primary"),
    }
}

/// What is missing until every standby streams and counts; empty when nothing is.
pub(super) fn missing(status: &Status) -> Vec<String> {
    let mut missing = Vec::new();
    for cluster in &status.clusters {
        if cluster.primary.is_none() || cluster.gate != Gate::Open {
            missing.push(sentence(cluster));
        }
        if cluster.durability.degraded {
            missing.push(format!("{}: degraded", cluster.name));
        }
        let voters: BTreeSet<&str> = cluster.durability.voters.iter().map(String::as_str).collect();
        for member in &cluster.members {
            let settled = match member.role {
                Role::Primary => member.state == State::Running,
                Role::Standby => {
                    // One that follows another standby streams and cannot count.
                    let cascades = member.upstream != cluster.primary;
                    let counts = voters.contains(member.name.as_str()) && member.sync == Some(Sync::Quorum);
                    let needs_to = cluster.durability.mode == DurabilityMode::Quorum && !cascades;
                    member.state == State::Streaming && (counts || !needs_to)
                }
                Role::Delayed => member.state == State::Streaming,
                Role::Witness | Role::Keeper => member.state != State::Unreachable,
            };
            if !settled {
                missing.push(format!("{} {}", member.name, told(member)));
            }
        }
    }
    let silent = status.store.members.iter().filter(|member| member.reachable == Some(false));
    missing.extend(silent.map(|member| format!("{} does not answer in the store", member.name)));
    if status.store.leader.is_none() {
        missing.push("the store has no leader".to_owned());
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        let member = |name: &str, role: &str, state: &str, sync: &str, upstream: Option<&str>| {
            serde_json::json!({"name": name, "host": "127.0.0.1", "port": 1, "role": role, "state": state,
                "timeline": 1, "lsn": "0/1", "lag_bytes": 0, "replay_lag_ms": 0, "sync": sync,
                "upstream": upstream, "reason": "r", "pending_restart": false})
        };
        let text = serde_json::json!({"herd": "local", "generation": 1, "proxy": [],
            "store": {"kind": "raft", "leader": "b", "members": [{"name": "a", "voter": true, "reachable": true}]},
            "clusters": [{"name": "main", "system_identifier": "1", "term": 1, "primary": "a", "gate": "open",
                "durability": {"mode": "quorum", "needed": 1, "voters": ["b", "c"], "degraded": false},
                "members": [member("a", "primary", "running", "primary", None),
                    member("b", "standby", "streaming", "quorum", Some("a")),
                    member("c", "standby", "streaming", "quorum", Some("a"))],
                "backup": null}]});
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn healthy_is_when_nothing_is_missing() {
        assert_eq!(missing(&status()), [] as [String; 0]);
        let with = |change: &dyn Fn(&mut Status)| {
            let mut status = status();
            change(&mut status);
            missing(&status)
        };
        assert_eq!(with(&|status| status.clusters[0].gate = Gate::Closed).len(), 1);
        assert_eq!(
            with(&|status| {
                status.clusters[0].durability.voters.pop();
            }),
            ["c streams, and counts for commits"].map(|_| "c streams, and counts for commits".to_owned())
        );
        assert_eq!(with(&|status| status.clusters[0].members[1].state = State::Cloning), ["b r"]);
        assert_eq!(with(&|status| status.store.leader = None), ["the store has no leader"]);
        assert_eq!(with(&|status| status.store.members[0].reachable = Some(false)).len(), 1);
    }

    #[test]
    fn without_a_quorum_streaming_is_enough() {
        let mut status = status();
        status.clusters[0].members[1].sync = Some(Sync::Potential);
        assert_eq!(missing(&status).len(), 1);
        status.clusters[0].durability.mode = DurabilityMode::Async;
        status.clusters[0].durability.voters.clear();
        status.clusters[0].members[1].sync = Some(Sync::Async);
        assert!(missing(&status).is_empty());
    }

    #[test]
    fn a_cascading_standby_need_not_count() {
        let mut status = status();
        status.clusters[0].durability.voters.pop();
        status.clusters[0].members[2].upstream = Some("b".to_owned());
        assert!(missing(&status).is_empty());
    }

    #[test]
    fn only_what_changed_is_told() {
        let before = status();
        assert_eq!(changes(Some(&before), &before), []);
        assert_eq!(changes(None, &before).len(), 4, "three nodes and the cluster");
        let mut beginning = status();
        beginning.clusters[0].primary = None;
        beginning.clusters[0].members[1].state = State::Unreachable;
        assert_eq!(changes(None, &beginning).len(), 2, "what has not begun is no news");
        let mut after = status();
        after.clusters[0].members[1].state = State::Cloning;
        after.clusters[0].members[1].reason = "cloning 42 %".to_owned();
        // Positions move all the time and are no news.
        after.clusters[0].members[2].lsn = Some("0/2".to_owned());
        assert_eq!(changes(Some(&before), &after), [Event::step(&"b", "cloning 42 %")]);
    }
}
