//! What agents tell each other directly, several times a second: the body of `POST /v1/peer`.
//!
//! It carries what decisions look at ([`pgherd_core::observation::Report`]) and what only people look at
//! (`show`). Nothing here is agreed upon: a lost or late report delays a decision and never falsifies one.
//!
//! The form is JSON with a version. Fields are only ever added; a reader of an older version ignores them,
//! and a missing one reads as unknown.

use std::time::Duration;

use pgherd_core::observation::{Report, Running};
use pgherd_core::record::Position;
use pgherd_core::types::{Lsn, NodeName, Term, Timeline};
use serde::{Deserialize, Serialize};

pub(crate) const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Gossip {
    pub(crate) version: u32,
    pub(crate) node: NodeName,
    /// A report about another cluster's data would mislead; a wrong herd is refused by the certificate.
    pub(crate) cluster: NodeName,
    #[serde(default)]
    pub(crate) term: Term,
    #[serde(default)]
    pub(crate) running: Is,
    #[serde(default)]
    pub(crate) timeline: Option<Timeline>,
    #[serde(default)]
    pub(crate) flush_lsn: Option<Lsn>,
    /// What the copy is worth, by the terms that the store has recorded for its timelines.
    #[serde(default)]
    pub(crate) holds: Option<Position>,
    #[serde(default)]
    pub(crate) holder_probe_failing: Option<FailingProbe>,
    #[serde(default)]
    pub(crate) wants_rebuild: bool,
    #[serde(default)]
    pub(crate) damage: Option<String>,
    /// The repository has answered this agent lately, where that votes.
    #[serde(default)]
    pub(crate) reaches_repository: bool,
    #[serde(default)]
    pub(crate) show: Show,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Is {
    #[default]
    Unknown,
    Nothing,
    Standby,
    Primary,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FailingProbe {
    pub(crate) node: NodeName,
    pub(crate) for_ms: u64,
}

/// For `status`, `explain` and `check`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Show {
    pub(crate) reason_code: String,
    pub(crate) reason: String,
    /// For how long it has been so.
    pub(crate) for_ms: u64,
    pub(crate) state: Option<pgherd_api::status::State>,
    pub(crate) upstream: Option<NodeName>,
    pub(crate) replay_lag_ms: Option<u64>,
    /// Up to which position a standby's readers see.
    pub(crate) replay_lsn: Option<Lsn>,
    pub(crate) pending_restart: Option<bool>,
    pub(crate) gate_open: bool,
    /// Whether the fence would stop PostgreSQL if this agent froze; `None` where there is none.
    pub(crate) fence_armed: Option<bool>,
    pub(crate) vip: VipShow,
    /// Of PostgreSQL's Unix socket, for proxies on the same host.
    pub(crate) socket_dir: Option<String>,
    /// What the owner of the archive knows of it.
    pub(crate) archive: Option<ArchiveShow>,
    /// The base backup that this node takes.
    pub(crate) backup: Option<BackupShow>,
    /// Generation of the specification that this agent follows.
    pub(crate) spec_generation: u64,
    /// Of the program.
    pub(crate) version: String,
}

/// The address that moves with the gate, as far as it is on this node's host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct VipShow {
    /// With its prefix length.
    pub(crate) held: Option<String>,
    /// Why this host cannot have it.
    pub(crate) trouble: Option<String>,
    /// Another station that says it has it.
    pub(crate) claimed_by: Option<String>,
}

/// The archive, by its owner.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ArchiveShow {
    pub(crate) timeline: Option<Timeline>,
    /// Up to where WAL is in the repository.
    pub(crate) durable: Option<Lsn>,
    /// Commits are confirmed by that.
    pub(crate) votes: bool,
    /// All that the server had flushed so long ago is there; `None`: not known.
    pub(crate) behind_ms: Option<u64>,
    /// Why it does not go on.
    pub(crate) trouble: Option<String>,
    /// From when on, in seconds since 1970, any moment up to now can be restored.
    pub(crate) window_from: Option<i64>,
    /// The newest base backup that leads to the present,
    pub(crate) newest: Option<String>,
    /// and when that began.
    pub(crate) newest_began: Option<i64>,
    /// Base backups that are there.
    pub(crate) backups: u32,
    /// Missing WAL with something behind it.
    pub(crate) gaps: Vec<String>,
    /// What those said who were asked for missing WAL and have not given it.
    pub(crate) asked: Option<String>,
    /// What they gave last.
    pub(crate) filled: Option<FilledShow>,
}

/// WAL that the archive lacked, and has from members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct FilledShow {
    pub(crate) unix_seconds: i64,
    pub(crate) files: u32,
    pub(crate) from: Vec<String>,
}

/// How far a base backup is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BackupShow {
    pub(crate) number: u64,
    pub(crate) done_bytes: u64,
    /// 0 while it is not known.
    pub(crate) total_bytes: u64,
    /// To how many bytes a second it is held back for the server's clients, if it is.
    pub(crate) held_to: Option<u64>,
}

impl Gossip {
    /// Of an agent that knows nothing yet, not even its cluster.
    pub(crate) fn silent(node: &NodeName) -> Gossip {
        Gossip {
            version: VERSION,
            node: node.clone(),
            cluster: node.clone(),
            term: Term::default(),
            running: Is::Unknown,
            timeline: None,
            flush_lsn: None,
            holds: None,
            holder_probe_failing: None,
            wants_rebuild: false,
            damage: None,
            reaches_repository: false,
            show: Show::default(),
        }
    }

    pub(crate) fn to_report(&self) -> Report {
        Report {
            term: self.term,
            running: match self.running {
                Is::Unknown => Running::Unknown,
                Is::Nothing => Running::Nothing,
                Is::Standby => Running::Standby,
                Is::Primary => Running::Primary,
            },
            holds: self.holds,
            holder_probe_failing: self
                .holder_probe_failing
                .as_ref()
                .map(|probe| (probe.node.clone(), Duration::from_millis(probe.for_ms))),
            wants_rebuild: self.wants_rebuild,
            damage: self.damage.clone(),
            reaches_repository: self.reaches_repository,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_version_is_still_read_and_what_is_new_is_ignored() {
        let stored = r#"{"version":1,"node":"b","cluster":"main","term":4,"running":"standby","timeline":3,
            "flush_lsn":"0/5000060","holds":{"term":3,"lsn":"0/5000060"},"holder_probe_failing":{"node":"a","for_ms":1700},"wants_rebuild":false,
            "damage":null,"show":{"reason_code":"follows","reason":"streams from a","for_ms":5},"later":{"x":1}}"#;
        let gossip: Gossip = serde_json::from_str(stored).unwrap();
        let report = gossip.to_report();
        assert_eq!((report.term, report.running), (Term(4), Running::Standby));
        assert_eq!(report.holds, Some(Position { term: Term(3), lsn: Lsn(0x500_0060) }));
        assert_eq!(report.holder_probe_failing, Some(("a".parse().unwrap(), Duration::from_millis(1700))));
        assert_eq!(gossip.show.reason, "streams from a");

        let sparse: Gossip = serde_json::from_str(r#"{"version":1,"node":"b","cluster":"main"}"#).unwrap();
        assert_eq!(sparse.to_report(), Report::default());
    }

    #[test]
    fn whether_the_repository_answers_reaches_the_others() {
        let silent = Gossip::silent(&"b".parse().unwrap());
        for reaches_repository in [true, false] {
            let said = serde_json::to_string(&Gossip { reaches_repository, ..silent.clone() }).unwrap();
            let heard: Gossip = serde_json::from_str(&said).unwrap();
            assert_eq!(heard.to_report().reaches_repository, reaches_repository);
        }
    }
}
