//! What agents, and the fence, tell each other besides opaque bodies (Raft, peer reports), whose contents
//! belong to those who write them.

use serde::{Deserialize, Serialize};

/// `POST /v1/fenced`: "PostgreSQL of `member` is stopped, every process of it, and its term is given up".
///
/// Signed beforehand with the node's key, because the fence that sends it has no time and no code to spare.
/// Whoever has the message can send it: it is true only because the fence keeps it until after the kill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    pub herd_id: String,
    pub cluster: String,
    /// Node and incarnation, as in `b_7`.
    pub member: String,
    pub term: u64,
    /// PEM of the node's certificate, so that whoever receives this needs to know the authority alone.
    pub certificate: String,
    /// ECDSA P-256 with SHA-256, ASN.1, in hexadecimal.
    pub signature: String,
}
