//! The specification of a herd: read it, see what another herd file would change, apply that.

use serde::{Deserialize, Serialize};

/// `GET /v1/spec`: what the store holds. Without secrets: those never leave the store in an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub generation: u64,
    /// The herd file's text, as it was applied.
    pub text: String,
}

/// `POST /v1/plan`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanRequest {
    /// The whole herd file.
    pub text: String,
    /// For messages: where the text came from.
    pub file: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The generation that this plan was made against; `apply` wants it back.
    pub generation: u64,
    pub changes: Vec<PlannedChange>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedChange {
    /// The place in the herd file: `cluster.main.node.d`.
    pub path: String,
    pub from: Option<String>,
    pub to: Option<String>,
    pub impact: Impact,
    /// What will be done about it, in one sentence.
    pub action: String,
}

/// What a change costs, from nothing to data. In this order, so that the greatest of a plan is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Impact {
    None,
    Reload,
    Restart,
    Switchover,
    Clone,
    /// Something is removed that cannot be had back.
    Destroy,
}

/// `POST /v1/apply`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApplyRequest {
    pub text: String,
    pub file: Option<String>,
    /// The plan's. Another one in the store by now: refused, because then this is not what was looked at.
    pub generation: u64,
    /// The greatest impact that the operator agreed to.
    pub accept: Impact,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// The one that is in force now.
    pub generation: u64,
    pub changes: Vec<PlannedChange>,
}
