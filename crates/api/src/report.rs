//! What a herd reports besides its status: history, explanations, checks, and the result of a drill.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `GET /v1/history`, newest entry last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct History {
    pub entries: Vec<HistoryEntry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// RFC 3339.
    pub at: String,
    pub cluster: String,
    pub event: Event,
    /// The term that began with, or was in force at, this event.
    pub term: Option<u64>,
    pub timeline: Option<u32>,
    pub from: Option<String>,
    pub to: Option<String>,
    /// Stable code of the reason (values are added over time), and the sentence for people.
    pub reason_code: String,
    pub reason: String,
    /// Acknowledged transactions that the new primary lacks: 0, or counted; null when it cannot be known.
    pub lost_transactions: Option<u64>,
    /// Bytes of WAL of the old primary past the fork.
    pub lost_bytes: Option<u64>,
    /// From closing to opening the gate.
    pub write_gap_ms: Option<u64>,
    /// The operator who asked for it; null where the herd acted by itself.
    pub operator: Option<String>,
}

/// Readers must expect values that they do not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    Bootstrap,
    Election,
    /// The elected node is primary.
    Promoted,
    /// Clients are let in.
    GateOpened,
    Failover,
    ForcedFailover,
    Switchover,
    Rejoin,
    Reclone,
    RuleChanged,
    Degraded,
    Restored,
    Barred,
    Unbarred,
    SpecApplied,
    NodeJoined,
    NodeRemoved,
    StoreRecovered,
    Paused,
    Resumed,
    #[serde(other)]
    Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HistoryQuery {
    pub cluster: Option<String>,
    /// The newest so many entries; the server has a limit of its own.
    pub limit: Option<u32>,
}

/// `GET /v1/explain`: why each node does, or does not do, what it does right now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explain {
    pub nodes: Vec<Explanation>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    pub cluster: Option<String>,
    pub node: String,
    /// Stable code of the reason; values are added over time.
    pub reason_code: String,
    /// One sentence.
    pub reason: String,
    /// What it waits for, each in one sentence; empty when it waits for nothing.
    pub waiting_for: Vec<String>,
    /// The command that would override or repair it, where there is one.
    pub hint: Option<String>,
    /// How long this has been the reason.
    pub for_ms: Option<u64>,
    /// Age of what is known about the node; null when nothing is.
    pub age_ms: Option<u64>,
}

/// `GET /v1/check`: one line a check, in the words and numbers of monitoring plugins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckReport {
    pub checks: Vec<CheckItem>,
}

impl CheckReport {
    /// What `pgherd check` exits with: critical beats warning beats unknown beats ok. A report without a
    /// single check knows nothing.
    pub fn worst(&self) -> CheckState {
        let severity = |state: CheckState| match state {
            CheckState::Ok => 0,
            CheckState::Unknown => 1,
            CheckState::Warning => 2,
            CheckState::Critical => 3,
        };
        let states = self.checks.iter().map(|item| item.state);
        states.max_by_key(|state| severity(*state)).unwrap_or(CheckState::Unknown)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckItem {
    /// Stable name, such as `primary` or `voters`.
    pub check: String,
    pub cluster: Option<String>,
    pub node: Option<String>,
    pub state: CheckState,
    /// One line.
    pub message: String,
    /// The measured value with its unit, where there is one: `lag_bytes=4096`.
    pub measure: Option<String>,
    pub hint: Option<String>,
}

/// Travels as the number that a monitoring plugin exits with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum CheckState {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    Unknown = 3,
}

impl CheckState {
    pub fn exit_code(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for CheckState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            CheckState::Ok => "OK",
            CheckState::Warning => "WARNING",
            CheckState::Critical => "CRITICAL",
            CheckState::Unknown => "UNKNOWN",
        })
    }
}

impl From<CheckState> for u8 {
    fn from(state: CheckState) -> u8 {
        state.exit_code()
    }
}

impl TryFrom<u8> for CheckState {
    type Error = String;
    fn try_from(number: u8) -> Result<CheckState, String> {
        match number {
            0 => Ok(CheckState::Ok),
            1 => Ok(CheckState::Warning),
            2 => Ok(CheckState::Critical),
            3 => Ok(CheckState::Unknown),
            _ => Err(format!("{number} is not the state of a check: 0 ok, 1 warning, 2 critical, 3 unknown")),
        }
    }
}

/// `pgherd drill --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillResult {
    pub fault: String,
    /// Longest time without an acknowledged write; null when writes never came back.
    pub write_gap_ms: Option<u64>,
    pub read_gap_ms: Option<u64>,
    pub acknowledged: u64,
    /// Acknowledged, and not found afterwards.
    pub lost: u64,
    /// Found more often than written.
    pub duplicates: u64,
    pub client_errors: u64,
    pub old_primary: Option<String>,
    pub new_primary: Option<String>,
    /// Until as many voters as before counted again; null when that did not happen in time.
    pub redundancy_back_ms: Option<u64>,
}
