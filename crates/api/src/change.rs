//! Switchover, failover and the restore of a cluster: what is asked for, and how far it has come.
//!
//! Asking is idempotent. The asker makes up `request_id`; asking again with the same one (an answer was
//! lost, a command was repeated) joins the change that is under way or tells how it ended.

use serde::{Deserialize, Serialize};

/// `POST /v1/switchover`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwitchoverRequest {
    pub request_id: String,
    /// May be null where the herd has one cluster.
    pub cluster: Option<String>,
    /// Null: the best one.
    pub to: Option<String>,
    /// RFC 3339; null: now.
    pub at: Option<String>,
}

/// `POST /v1/promote`: a switchover that somebody asked a proxy for, in its console.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromoteRequest {
    pub request_id: String,
    /// May be null where the herd has one cluster.
    pub cluster: Option<String>,
    pub to: String,
    /// PostgreSQL's role that proved itself there. It has to be one of `console_admins`.
    pub role: String,
}

/// `POST /v1/switchover/cancel`: takes back one that is scheduled, or that has not handed over yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwitchoverCancelRequest {
    pub cluster: Option<String>,
}

/// `POST /v1/failover`, for when the rules forbid an automatic one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailoverRequest {
    pub request_id: String,
    pub cluster: Option<String>,
    pub to: String,
    /// Without it the request is refused with what would be lost.
    pub accept_data_loss: bool,
}

/// `POST /v1/restore`: the whole cluster goes back to an earlier moment, in two steps. First the copy of one node is taken there and held,
/// while the others go on; then it leads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreRequest {
    pub request_id: String,
    pub cluster: Option<String>,
    #[serde(flatten)]
    pub step: RestoreStep,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum RestoreStep {
    Hold {
        /// Null: the standby that can best be done without.
        node: Option<String>,
        moment: RestoreMoment,
    },
    /// Whatever came behind the moment is given up.
    Lead,
    /// It follows again.
    LetGo,
}

/// Where a copy out of the repository is to end, as a plan says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreMoment {
    pub backup: String,
    pub timeline: u32,
    pub end_lsn: String,
    /// The timeline in whose files, and those before it, the repository has this WAL.
    pub along: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreAnswer {
    pub cluster: String,
    /// Whose copy is taken back, leads, or is let go.
    pub node: String,
    /// How it comes to lead; `GET /v1/changes/{request_id}` tells how far it is. Null for the other steps.
    pub change: Option<Change>,
}

/// `POST /v1/backups`: takes a base backup now, from the node that a scheduled one would be taken from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupRequest {
    pub cluster: Option<String>,
}

/// The base backup that was asked for. `GET /v1/status` tells how far it is, and how it ended, under this number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupAsked {
    pub cluster: String,
    pub number: u64,
}

/// Answer to switchover and failover, and to `GET /v1/changes/{request_id}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    pub request_id: String,
    pub cluster: String,
    pub kind: ChangeKind,
    pub state: ChangeState,
    pub from: Option<String>,
    pub to: Option<String>,
    /// RFC 3339, for one that is scheduled.
    pub at: Option<String>,
    /// The term that it led to, once there is one.
    pub term: Option<u64>,
    /// In order; the last one is under way unless `state` says that all is over.
    pub steps: Vec<ChangeStep>,
    /// Nodes that may have held acknowledged commits and were not reached. Only a forced failover has them.
    pub unreached: Vec<String>,
    pub write_gap_ms: Option<u64>,
    /// Why it failed, for `failed` only.
    pub error: Option<crate::Error>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    Switchover,
    Failover,
    Restore,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeState {
    Scheduled,
    Running,
    Done,
    /// Nothing was changed, or all of it was undone.
    Cancelled,
    Failed,
}

impl ChangeState {
    pub fn is_over(self) -> bool {
        matches!(self, ChangeState::Done | ChangeState::Cancelled | ChangeState::Failed)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeStep {
    /// One line: `checkpoint on a`.
    pub what: String,
    pub took_ms: Option<u64>,
}
