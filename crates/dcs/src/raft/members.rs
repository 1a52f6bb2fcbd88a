//! Who belongs to the store, and who of them votes.
//!
//! Left out: changing the membership (`raft.rs` does it, on the leader). Hazard: an identity used twice. A
//! member that forgot what it acknowledged, under the number it had before, can outvote those who remember;
//! therefore a number is bound to the disk it was given for, and a disk that lost its contents has another
//! [`DiskId`].

use std::collections::BTreeSet;
use std::fmt;
use std::io::Read;

use pgherd_core::types::NodeName;
use serde::{Deserialize, Serialize};

/// More voters make commits slower and outages hardly rarer.
pub const MAX_VOTERS: usize = 5;

/// A random number written when a Raft directory is created.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId(String);

impl DiskId {
    pub(super) fn random() -> std::io::Result<DiskId> {
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(DiskId(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A member as the membership in the log has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: NodeName,
    pub(crate) address: String,
    pub(crate) host: String,
    pub(crate) disk: DiskId,
}

#[cfg(test)]
impl Default for Member {
    /// Only the storage tests of openraft make members without a name.
    fn default() -> Member {
        let name = "nobody".parse().expect("a valid name");
        Member { name, address: String::new(), host: String::new(), disk: DiskId(String::new()) }
    }
}

/// A member that may vote: a voter, or a learner that has caught up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub name: NodeName,
    pub host: String,
    /// Heard of lately. One that is not keeps its vote only while nobody else could use it.
    pub alive: bool,
}

/// The voters: the largest odd number up to [`MAX_VOTERS`], the living before the silent, distinct hosts
/// first, in the order given.
pub fn choose_voters(candidates: &[Candidate]) -> BTreeSet<NodeName> {
    let size = candidates.len().min(MAX_VOTERS);
    let size = if size.is_multiple_of(2) { size.saturating_sub(1) } else { size };
    let mut hosts = BTreeSet::new();
    let mut chosen = BTreeSet::new();
    for alive in [true, false] {
        for distinct_host in [true, false] {
            for candidate in candidates.iter().filter(|candidate| candidate.alive == alive) {
                let host_is_new = !hosts.contains(&candidate.host);
                if chosen.len() < size && !chosen.contains(&candidate.name) && (host_is_new || !distinct_host)
                {
                    hosts.insert(&candidate.host);
                    chosen.insert(candidate.name.clone());
                }
            }
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a@1 b@2 c@2!` reads: node a on host 1, b on host 2, c on host 2 and silent.
    fn voters(candidates: &str) -> String {
        let candidates: Vec<_> = candidates
            .split_whitespace()
            .map(|text| {
                let (name, host) = text.split_once('@').unwrap();
                let host = host.trim_end_matches('!');
                let alive = !text.ends_with('!');
                Candidate { name: name.parse().unwrap(), host: host.to_owned(), alive }
            })
            .collect();
        let names: Vec<_> = choose_voters(&candidates).iter().map(ToString::to_string).collect();
        names.join(" ")
    }

    #[test]
    fn the_largest_odd_number_up_to_five() {
        assert_eq!(voters(""), "");
        assert_eq!(voters("a@1"), "a");
        assert_eq!(voters("a@1 b@2"), "a", "two voters would survive no loss and fail twice as often");
        assert_eq!(voters("a@1 b@2 c@3"), "a b c");
        assert_eq!(voters("a@1 b@2 c@3 d@4"), "a b c");
        assert_eq!(voters("a@1 b@2 c@3 d@4 e@5 f@6 g@7"), "a b c d e");
    }

    #[test]
    fn distinct_hosts_first_then_the_order_given() {
        assert_eq!(voters("a@1 b@1 c@1"), "a b c", "one host is no reason to have fewer");
        assert_eq!(voters("a@1 b@1 c@2 d@3"), "a c d");
        assert_eq!(voters("a@1 b@1 c@2 d@2"), "a b c");
        assert_eq!(voters("d@1 c@2 b@3 a@4"), "b c d", "order, not name");
    }

    #[test]
    fn the_silent_keep_their_votes_until_somebody_can_take_them() {
        assert_eq!(voters("a@1 b@2 c@3!"), "a b c", "a dead voter never shrinks the group");
        assert_eq!(voters("a@1 b@2 c@3! d@4"), "a b d");
        assert_eq!(voters("a@1 b@2 c@3! d@2"), "a b d", "alive on a used host beats dead on a distinct one");
        assert_eq!(voters("a@1 b@2! c@3! d@4 e@5"), "a b c d e");
    }

    #[test]
    fn disk_ids_differ() {
        assert_ne!(DiskId::random().unwrap(), DiskId::random().unwrap());
        assert_eq!(DiskId::random().unwrap().as_str().len(), 32);
    }
}
