//! The names under which this crate uses openraft's types. They stay inside `raft`: what is written to disk
//! (`record`) or sent (`wire`) has types of its own, and openraft is built without serde, so that the
//! compiler keeps it so.

use std::fmt;
use std::sync::Arc;

use openraft::type_config::alias;

use super::members::Member;
use crate::store::{Revision, Transaction};

openraft::declare_raft_types!(
    pub(crate) TypeConfig:
        D = Command,
        R = Outcome,
        Node = Member,
);

pub(super) type Raft = openraft::Raft<TypeConfig, super::state_machine::StateMachine>;
pub(super) type LogId = alias::LogIdOf<TypeConfig>;
pub(super) type Vote = alias::VoteOf<TypeConfig>;
pub(super) type LogEntry = alias::EntryOf<TypeConfig>;
pub(super) type Membership = openraft::Membership<u64, Member>;
pub(super) type StoredMembership = alias::StoredMembershipOf<TypeConfig>;
pub(super) type SnapshotMeta = alias::SnapshotMetaOf<TypeConfig>;
pub(super) type RaftSnapshot = alias::SnapshotOf<TypeConfig, Arc<Vec<u8>>>;
pub(super) type Metrics = openraft::RaftMetrics<TypeConfig>;

/// A transaction with the number of the request that brought it, the same in every retry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) request: Arc<str>,
    pub(crate) transaction: Transaction,
}

impl fmt::Display for Command {
    /// Values may be secrets: only the request is printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}", self.request)
    }
}

/// What applying a log entry led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Committed(Revision),
    Conflict(String),
    /// The entry was Raft's own: a new leader's first, a membership.
    Nothing,
}
