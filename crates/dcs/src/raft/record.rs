//! The form in which log entries, votes, memberships and state leave this process, version 1.
//!
//! The log on disk and the RPC bodies share these types. A record on disk is one byte of version and JSON; an
//! RPC body has its version in its envelope (`wire`). Fields are only ever added, with a default; anything
//! else is a new version, and `testdata/` keeps bytes of every version that was ever written.
//!
//! Hazard: a record misread is a vote or a commit forgotten. What does not parse is an error, never a
//! default.

use std::sync::Arc;

use openraft::entry::RaftEntry;
use openraft::vote::RaftLeaderId;
use pgherd_core::types::NodeName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::members::DiskId;
use super::types::{self, Command, Outcome};
use crate::store::{Check, Entry as StoredEntry, Revision, Transaction};

/// The version written. Older ones are read.
pub(super) const VERSION: u8 = 1;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RecordError {
    #[error("{what} has format version {version} of a newer program, this one reads up to {VERSION}")]
    Newer { what: &'static str, version: u8 },
    #[error("{what} is damaged: {why}")]
    Damaged { what: &'static str, why: String },
}

impl From<RecordError> for std::io::Error {
    fn from(error: RecordError) -> std::io::Error {
        std::io::Error::new(std::io::ErrorKind::InvalidData, error)
    }
}

pub(super) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    serde_json::to_writer(&mut bytes, value).expect("writing to memory, with no map that has odd keys");
    bytes
}

pub(super) fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, RecordError> {
    let damaged = |why: String| RecordError::Damaged { what, why };
    let (version, body) = bytes.split_first().ok_or_else(|| damaged("it is empty".to_owned()))?;
    match *version {
        VERSION => serde_json::from_slice(body).map_err(|error| damaged(error.to_string())),
        0 => Err(damaged("its version is 0".to_owned())),
        version => Err(RecordError::Newer { what, version }),
    }
}

/// Bytes as JSON: as text where they are text, which nearly all values are, else in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) Vec<u8>);

#[derive(Deserialize)]
#[serde(untagged)]
enum BytesForm {
    Text(String),
    Hex { hex: String },
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Hex {
            hex: String,
        }
        match std::str::from_utf8(&self.0) {
            Ok(text) => to.serialize_str(text),
            Err(_) => {
                const DIGITS: &[u8; 16] = b"0123456789abcdef";
                let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
                let hex = self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
                Hex { hex }.serialize(to)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
        let hex = match BytesForm::deserialize(from)? {
            BytesForm::Text(text) => return Ok(Bytes(text.into_bytes())),
            BytesForm::Hex { hex } => hex,
        };
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let pairs = hex.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        pairs.collect::<Option<_>>().map(Bytes).ok_or_else(|| serde::de::Error::custom("odd hexadecimal"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LogId {
    pub(super) term: u64,
    pub(super) leader: u64,
    pub(super) index: u64,
}

impl From<types::LogId> for LogId {
    fn from(id: types::LogId) -> LogId {
        LogId { term: id.leader_id.term, leader: id.leader_id.node_id, index: id.index }
    }
}

impl From<LogId> for types::LogId {
    fn from(id: LogId) -> types::LogId {
        types::LogId::new(RaftLeaderId::new(id.term, id.leader), id.index)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Vote {
    pub(super) term: u64,
    pub(super) node: u64,
    pub(super) committed: bool,
}

impl From<types::Vote> for Vote {
    fn from(vote: types::Vote) -> Vote {
        Vote { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
    }
}

impl From<Vote> for types::Vote {
    fn from(vote: Vote) -> types::Vote {
        types::Vote { leader_id: RaftLeaderId::new(vote.term, vote.node), committed: vote.committed }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Member {
    pub(super) id: u64,
    pub(super) name: NodeName,
    pub(super) address: String,
    pub(super) host: String,
    pub(super) disk: DiskId,
}

impl Member {
    pub(super) fn new(id: u64, member: &super::members::Member) -> Member {
        let super::members::Member { name, address, host, disk } = member.clone();
        Member { id, name, address, host, disk }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Membership {
    /// One set of voters; two while a change is under way, and then a majority of each is needed.
    pub(super) voters: Vec<Vec<u64>>,
    pub(super) members: Vec<Member>,
}

impl From<&types::Membership> for Membership {
    fn from(membership: &types::Membership) -> Membership {
        let voters = membership.get_joint_config().iter().map(|set| set.iter().copied().collect()).collect();
        Membership {
            voters,
            members: membership.nodes().map(|(id, member)| Member::new(*id, member)).collect(),
        }
    }
}

impl TryFrom<Membership> for types::Membership {
    type Error = RecordError;
    fn try_from(membership: Membership) -> Result<types::Membership, RecordError> {
        let voters = membership.voters.into_iter().map(|set| set.into_iter().collect()).collect();
        let members = membership.members.into_iter().map(|Member { id, name, address, host, disk }| {
            (id, super::members::Member { name, address, host, disk })
        });
        let members: std::collections::BTreeMap<_, _> = members.collect();
        types::Membership::new(voters, members)
            .map_err(|error| RecordError::Damaged { what: "a membership", why: error.to_string() })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredMembership {
    pub(super) log_id: Option<LogId>,
    pub(super) membership: Membership,
}

impl From<&types::StoredMembership> for StoredMembership {
    fn from(stored: &types::StoredMembership) -> StoredMembership {
        StoredMembership {
            log_id: stored.log_id().map(LogId::from),
            membership: Membership::from(stored.membership()),
        }
    }
}

impl TryFrom<StoredMembership> for types::StoredMembership {
    type Error = RecordError;
    fn try_from(stored: StoredMembership) -> Result<types::StoredMembership, RecordError> {
        let membership = stored.membership.try_into()?;
        Ok(types::StoredMembership::new(stored.log_id.map(types::LogId::from), membership))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CheckRecord {
    key: String,
    /// Absent: the key must not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revision: Option<Revision>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PutRecord {
    key: String,
    value: Bytes,
}

/// A [`Command`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Commit {
    request: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    checks: Vec<CheckRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    puts: Vec<PutRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    deletes: Vec<String>,
}

impl From<&Command> for Commit {
    fn from(command: &Command) -> Commit {
        let Transaction { checks, puts, deletes } = &command.transaction;
        let check = |check: &Check| CheckRecord { key: check.key.clone(), revision: check.revision };
        let put =
            |(key, value): &(String, Vec<u8>)| PutRecord { key: key.clone(), value: Bytes(value.clone()) };
        Commit {
            request: command.request.to_string(),
            checks: checks.iter().map(check).collect(),
            puts: puts.iter().map(put).collect(),
            deletes: deletes.clone(),
        }
    }
}

impl From<Commit> for Command {
    fn from(commit: Commit) -> Command {
        let check = |record: CheckRecord| Check { key: record.key, revision: record.revision };
        let transaction = Transaction {
            checks: commit.checks.into_iter().map(check).collect(),
            puts: commit.puts.into_iter().map(|put| (put.key, put.value.0)).collect(),
            deletes: commit.deletes,
        };
        Command { request: Arc::from(commit.request), transaction }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Payload {
    /// The first entry of a new leader.
    Blank,
    Commit(Commit),
    Members(Membership),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LogEntry {
    id: LogId,
    payload: Payload,
}

impl From<&types::LogEntry> for LogEntry {
    fn from(entry: &types::LogEntry) -> LogEntry {
        let payload = match &entry.payload {
            openraft::EntryPayload::Blank => Payload::Blank,
            openraft::EntryPayload::Normal(command) => Payload::Commit(command.into()),
            openraft::EntryPayload::Membership(membership) => Payload::Members(membership.into()),
        };
        LogEntry { id: entry.log_id().into(), payload }
    }
}

impl LogEntry {
    /// `TryFrom` is not free: openraft's entry is generic.
    pub(super) fn into_raft(self) -> Result<types::LogEntry, RecordError> {
        let payload = match self.payload {
            Payload::Blank => openraft::EntryPayload::Blank,
            Payload::Commit(commit) => openraft::EntryPayload::Normal(commit.into()),
            Payload::Members(membership) => openraft::EntryPayload::Membership(membership.try_into()?),
        };
        Ok(types::LogEntry::new(self.id.into(), payload))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeyRecord {
    key: String,
    value: Bytes,
    revision: Revision,
}

/// A request that was answered, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answered {
    pub(super) request: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) revision: Option<Revision>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) conflict: Option<String>,
}

impl Answered {
    pub(super) fn outcome(self) -> Outcome {
        match (self.revision, self.conflict) {
            (Some(revision), _) => Outcome::Committed(revision),
            (None, Some(key)) => Outcome::Conflict(key),
            (None, None) => Outcome::Nothing,
        }
    }

    pub(super) fn new(request: &str, outcome: &Outcome) -> Answered {
        let (revision, conflict) = match outcome {
            Outcome::Committed(revision) => (Some(*revision), None),
            Outcome::Conflict(key) => (None, Some(key.clone())),
            Outcome::Nothing => (None, None),
        };
        Answered { request: request.to_owned(), revision, conflict }
    }
}

/// The whole state at a log index: what stands in for the log before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Snapshot {
    pub(super) applied: Option<LogId>,
    pub(super) membership: StoredMembership,
    pub(super) revision: Revision,
    keys: Vec<KeyRecord>,
    /// Oldest first.
    pub(super) answered: Vec<Answered>,
}

impl Snapshot {
    pub(super) fn new(
        applied: Option<types::LogId>,
        membership: &types::StoredMembership,
        state: &crate::state::State,
        answered: Vec<Answered>,
    ) -> Snapshot {
        let snapshot = state.snapshot();
        let keys = snapshot.iter().map(|(key, entry)| KeyRecord {
            key: key.to_owned(),
            value: Bytes(entry.value.clone()),
            revision: entry.revision,
        });
        Snapshot {
            applied: applied.map(LogId::from),
            membership: membership.into(),
            revision: state.revision(),
            keys: keys.collect(),
            answered,
        }
    }

    pub(super) fn take_state(&mut self) -> crate::state::State {
        let keys = std::mem::take(&mut self.keys).into_iter().map(|record| {
            let entry = StoredEntry { value: record.value.0, revision: record.revision };
            (Arc::from(record.key), Arc::new(entry))
        });
        crate::state::State::new(self.revision, keys.collect())
    }
}

/// Who this directory belongs to; written once, before anything else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) herd: String,
    pub(super) name: NodeName,
    pub(super) disk: DiskId,
    /// What the store said to the request to join; absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) membership: Option<Admission>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Admission {
    pub(super) raft_id: u64,
    /// Of the herd: grows when a store is made anew from its survivors, so that the others are refused.
    pub(super) generation: u64,
    /// This directory began the store, alone, and may do so again only as long as its log is empty.
    #[serde(default)]
    pub(super) founder: bool,
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::raft::members;

    /// Compares `bytes` with the file that was stored when their version was current, and returns the file.
    /// With `PGHERD_WRITE_FIXTURES` set it writes the file instead; existing ones never change.
    pub(in super::super) fn fixture(name: &str, bytes: &[u8]) -> Vec<u8> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name);
        if std::env::var_os("PGHERD_WRITE_FIXTURES").is_some() && !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
        let stored = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (stored_text, text) = (String::from_utf8_lossy(&stored), String::from_utf8_lossy(bytes));
        assert_eq!(
            stored_text, text,
            "{name}: what this version writes has changed, so it is another version"
        );
        stored
    }

    pub(in super::super) fn disk(digit: &str) -> DiskId {
        serde_json::from_value(serde_json::Value::String(digit.repeat(32))).unwrap()
    }

    pub(in super::super) fn membership() -> types::Membership {
        let member = |name: &str, digit| members::Member {
            name: name.parse().unwrap(),
            address: format!("{name}.example:8009"),
            host: format!("{name}.example"),
            disk: disk(digit),
        };
        let nodes = std::collections::BTreeMap::from([
            (1, member("a", "1")),
            (4, member("b", "2")),
            (9, member("c", "3")),
        ]);
        types::Membership::new(vec![BTreeSet::from([1, 4]), BTreeSet::from([1])], nodes).unwrap()
    }

    pub(in super::super) fn command() -> Command {
        let transaction = Transaction::new()
            .require("clusters/main/election", Revision(17))
            .require_absent("clusters/main/term")
            .put("clusters/main/term", "{\"term\":4}")
            .put("binary", vec![0x00, 0xff, 0x10])
            .delete("clusters/main/election");
        Command { request: Arc::from("00ff-7"), transaction }
    }

    fn log_id(index: u64) -> types::LogId {
        LogId { term: 3, leader: 4, index }.into()
    }

    pub(in super::super) fn entries() -> Vec<types::LogEntry> {
        let payloads = [
            openraft::EntryPayload::Blank,
            openraft::EntryPayload::Normal(command()),
            openraft::EntryPayload::Membership(membership()),
        ];
        let entries = payloads.into_iter().zip(20..);
        entries.map(|(payload, index)| types::LogEntry::new(log_id(index), payload)).collect()
    }

    #[test]
    fn records_of_version_1_are_still_read_and_still_written() {
        for (entry, name) in entries().iter().zip(["blank", "commit", "members"]) {
            let stored = fixture(&format!("record-v1/entry-{name}"), &encode(&LogEntry::from(entry)));
            assert_eq!(decode::<LogEntry>("an entry", &stored).unwrap().into_raft().unwrap(), *entry);
        }
        let vote = types::Vote::from(Vote { term: 3, node: 4, committed: true });
        let stored = fixture("record-v1/vote", &encode(&Vote::from(vote)));
        assert_eq!(types::Vote::from(decode::<Vote>("a vote", &stored).unwrap()), vote);
        let stored = fixture("record-v1/log-id", &encode(&LogId::from(log_id(22))));
        assert_eq!(types::LogId::from(decode::<LogId>("a log id", &stored).unwrap()), log_id(22));

        let admission = Admission { raft_id: 1, generation: 2, founder: true };
        let (herd, name) = ("4ac0".to_owned(), "a".parse().unwrap());
        let identity = Identity { herd, name, disk: disk("1"), membership: Some(admission) };
        let stored = fixture("record-v1/identity", &encode(&identity));
        assert_eq!(decode::<Identity>("an identity", &stored).unwrap(), identity);
        let prepared = Identity { membership: None, ..identity };
        let stored = fixture("record-v1/identity-prepared", &encode(&prepared));
        assert_eq!(decode::<Identity>("an identity", &stored).unwrap(), prepared);

        let mut state = crate::state::State::default();
        state.apply(&Transaction::new().put("a", "text").put("b", vec![0xff]), Revision(21)).unwrap();
        let stored_membership = types::StoredMembership::new(Some(log_id(22)), membership());
        let answered = vec![
            Answered::new("00ff-7", &Outcome::Committed(Revision(21))),
            Answered::new("00ff-8", &Outcome::Conflict("a".to_owned())),
        ];
        let snapshot = Snapshot::new(Some(log_id(22)), &stored_membership, &state, answered);
        let stored = fixture("record-v1/snapshot", &encode(&snapshot));
        let mut read = decode::<Snapshot>("a snapshot", &stored).unwrap();
        assert_eq!(read, snapshot);
        assert_eq!(types::StoredMembership::try_from(read.membership.clone()).unwrap(), stored_membership);
        assert_eq!(read.take_state().snapshot(), state.snapshot());
        let outcomes: Vec<_> = read.answered.into_iter().map(Answered::outcome).collect();
        assert_eq!(outcomes, [Outcome::Committed(Revision(21)), Outcome::Conflict("a".to_owned())]);
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_says_so() {
        let newer = decode::<Vote>("the vote", b"\x02{}").unwrap_err();
        assert!(newer.to_string().contains("format version 2"), "{newer}");
        for damaged in [
            &b""[..],
            b"\x00{}",
            b"\x01",
            b"\x01{\"term\":1}",
            b"\x01{\"term\":-1,\"node\":1,\"committed\":true}",
        ] {
            let error = decode::<Vote>("the vote", damaged).unwrap_err();
            assert!(matches!(error, RecordError::Damaged { what: "the vote", .. }), "{error}");
        }
        let voter_unknown = Membership { voters: vec![vec![1]], members: vec![] };
        assert!(types::Membership::try_from(voter_unknown).is_err());
        for odd in ["{\"hex\":\"0\"}", "{\"hex\":\"zz\"}", "{\"hex\":\"+1\"}", "7"] {
            assert!(serde_json::from_str::<Bytes>(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn all_bytes_survive_json() {
        let all: Vec<u8> = (0..=255).collect();
        for bytes in [all, b"text".to_vec(), Vec::new(), "\u{0}\u{7f}\u{2028}\"\\\\".into()] {
            let json = serde_json::to_string(&Bytes(bytes.clone())).unwrap();
            assert_eq!(serde_json::from_str::<Bytes>(&json).unwrap().0, bytes);
        }
    }
}
