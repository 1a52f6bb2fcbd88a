//! WAL that a server still keeps: what the owner of the archive asks the other agents for, where the repository lacks some.
//!
//! A request has numbers only, so that no path comes from it. An answer is a line of JSON and, behind it, the bytes, as with
//! [`crate::objects`].

use serde::{Deserialize, Serialize};

/// Largest answer: a segment, and the line before it.
pub const MAX_WAL_BYTES: usize = (1 << 30) + (1 << 20);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalAsk {
    /// Of the cluster, as PostgreSQL prints it.
    pub system_identifier: String,
    pub timeline: u32,
    /// Of the cluster's segments. A server whose segments have another size has nothing to give.
    pub segment_bytes: u32,
    pub wanted: WalWanted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalWanted {
    /// How the timeline came about.
    History,
    /// All of a segment; its number counts from position 0.
    Segment { number: u64 },
    /// The beginning of a segment in which the timeline ended.
    End { number: u64, bytes: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalTold {
    /// They are behind the line.
    Bytes,
    /// It has not got it, or what it has is not that.
    Absent { why: String },
}
