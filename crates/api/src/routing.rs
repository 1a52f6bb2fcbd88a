//! `GET /v1/routing`: a stream of routing tables for the proxies, as JSON lines.
//!
//! A table is worth something only for as long as its proof is: `valid_for_ms` counts from the moment
//! that the sender wrote the line, and is what is left of the proof, not a fresh allowance. A receiver
//! counts it on `CLOCK_BOOTTIME` from before its read and stops using the table when it has run out.

use serde::{Deserialize, Serialize};

use crate::status::Gate;

/// All of it may be left out. A proxy says who it is and where its clients reach it; for as long as its stream
/// lives, the agent lists that in `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingQuery {
    /// Needed in a herd of several clusters.
    pub cluster: Option<String>,
    /// The name in the certificate of whoever asks; nobody speaks for another.
    pub proxy: Option<String>,
    /// Tells processes of one proxy from each other, of which two are there while one takes over from the other. Anything
    /// that nobody else has.
    pub process: Option<String>,
    /// `address:port` of the listener that leads to the primary.
    pub listen: Option<String>,
    /// `address:port` of the listener that leads to standbys.
    pub read_listen: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingTable {
    pub herd_id: String,
    pub cluster: String,
    /// A table of a lower term than one seen before is never used.
    pub term: u64,
    pub gate: Gate,
    /// Null while nobody may be written to.
    pub primary: Option<RoutingTarget>,
    /// Those that may serve reads.
    pub standbys: Vec<RoutingStandby>,
    pub proof: Proof,
    pub valid_for_ms: u64,
    /// The primary is about to hand over, as its own agent says: nothing is to be begun on it. A proxy none of whose
    /// clients has a transaction there says so with this number ([`Drained`]). Null otherwise, and from all others.
    #[serde(default)]
    pub drain: Option<u64>,
    /// Where the primary's history left those of former terms, the latest first; no more than [`MAX_FORKS`].
    #[serde(default)]
    pub forks: Vec<Fork>,
}

/// What is asked of forks is asked soon.
pub const MAX_FORKS: usize = 8;

/// What the primary of this term wrote behind `lsn` is in no later history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    pub term: u64,
    pub lsn: String,
}

/// `POST /v1/drained`, to the agent that asked for it: nothing of this proxy's clients is left on the primary, and nothing
/// will be begun there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// Of the drain that is answered; one that is over is nobody's business any more.
    pub drain: u64,
    /// As it was said when the routing table was asked for ([`RoutingQuery::process`]).
    #[serde(default)]
    pub process: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingTarget {
    pub node: String,
    /// An IP address: no name is looked up while routing.
    pub address: String,
    pub port: u16,
    /// Directory of the Unix socket, of use to a proxy on the same host only.
    pub socket_dir: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingStandby {
    #[serde(flatten)]
    pub target: RoutingTarget,
    pub replay_lsn: Option<String>,
    pub lag_bytes: Option<u64>,
    /// Its share of reads, beside those of the others. 0: it is too far behind for new ones, and those that are under way there go
    /// on.
    pub weight: u32,
}

/// What the table's validity rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proof {
    /// The store confirmed linearizably that the term is open.
    Store,
    /// The primary's heartbeat was acknowledged by the needed voters.
    Heartbeat,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_an_agent_that_knows_neither_drains_nor_forks_is_read() {
        let table = r#"{"herd_id":"4f1c","cluster":"main","term":4,"gate":"open","primary":null,"standbys":[],
            "proof":"store","valid_for_ms":2500}"#;
        let table: RoutingTable = serde_json::from_str(table).unwrap();
        assert_eq!((table.term, table.drain, table.forks), (4, None, Vec::new()));
    }

    #[test]
    fn a_proxy_that_does_not_name_its_process_is_heard() {
        let drained: Drained = serde_json::from_str(r#"{"drain":7}"#).unwrap();
        assert_eq!(drained, Drained { drain: 7, process: None });
    }
}
