//! The bodies of the RPCs between members, version 1: JSON in an envelope that says who speaks to whom.
//!
//! The envelope carries the herd, its generation, and both ends' number and disk, and every one of them is
//! checked before the body is looked at: an RPC that reaches the wrong process, a member of a store that was
//! given up, or a disk that lost its contents is refused with a sentence, never half understood.
//!
//! Left out: how bytes travel and who may send them (the agent: mutual TLS). Hazard: a field lost in
//! conversion. `transfer` in a vote request is the one that nobody would miss until leadership is handed
//! over.

use pgherd_core::types::NodeName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::members::DiskId;
use super::record::{Bytes, Commit, LogEntry, LogId, RecordError, Vote};
use super::types;
use crate::raft::{JoinRequest, Joined};

/// The version spoken. A body of a newer version is refused.
pub(super) const VERSION: u8 = 1;

/// What an RPC asks for; its text is the name given to the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rpc {
    Append,
    Vote,
    PreVote,
    Snapshot,
    Transfer,
    /// An operation that only the leader can do.
    Lead,
}

impl Rpc {
    pub(super) fn name(self) -> &'static str {
        match self {
            Rpc::Append => "append",
            Rpc::Vote => "vote",
            Rpc::PreVote => "pre-vote",
            Rpc::Snapshot => "snapshot",
            Rpc::Transfer => "transfer",
            Rpc::Lead => "lead",
        }
    }

    pub(super) fn named(name: &str) -> Option<Rpc> {
        [Rpc::Append, Rpc::Vote, Rpc::PreVote, Rpc::Snapshot, Rpc::Transfer, Rpc::Lead]
            .into_iter()
            .find(|rpc| rpc.name() == name)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sender {
    pub(super) id: u64,
    pub(super) name: NodeName,
    pub(super) disk: DiskId,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Receiver {
    pub(super) id: u64,
    pub(super) disk: DiskId,
}

/// What is checked before the body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Envelope {
    pub(super) v: u8,
    pub(super) herd: String,
    pub(super) generation: u64,
    pub(super) from: Sender,
    pub(super) to: Receiver,
}

#[derive(Serialize)]
struct Asking<'a, T> {
    #[serde(flatten)]
    envelope: &'a Envelope,
    ask: &'a T,
}

#[derive(Deserialize)]
struct Asked<T> {
    ask: T,
}

#[derive(Serialize, Deserialize)]
struct Answering<T> {
    v: u8,
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    answer: Option<T>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused: Option<Refusal>,
}

fn none<T>() -> Option<T> {
    None
}

/// Why an RPC was not even looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RefusalCode {
    Version,
    Herd,
    Generation,
    /// Meant for another member, or for this one's earlier disk.
    Receiver,
    /// The sender is not who it says, or lost the disk it was known by.
    Sender,
    /// The sender was removed from the store.
    Removed,
    Malformed,
    /// This member cannot take part: its disk failed, it is stopping, it is overloaded.
    Unable,
    /// A code of a later version.
    #[serde(other)]
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Refusal {
    pub(super) code: RefusalCode,
    pub(super) why: String,
}

impl Refusal {
    pub(super) fn new(code: RefusalCode, why: impl Into<String>) -> Refusal {
        Refusal { code, why: why.into() }
    }
}

impl From<RecordError> for Refusal {
    fn from(error: RecordError) -> Refusal {
        Refusal::new(RefusalCode::Malformed, error.to_string())
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("writing to memory, with no map that has odd keys")
}

pub(super) fn ask<T: Serialize>(envelope: &Envelope, ask: &T) -> Vec<u8> {
    json(&Asking { envelope, ask })
}

pub(super) fn envelope(body: &[u8]) -> Result<Envelope, Refusal> {
    #[derive(Deserialize)]
    struct Version {
        v: u8,
    }
    let malformed = |error: serde_json::Error| Refusal::new(RefusalCode::Malformed, error.to_string());
    let Version { v } = serde_json::from_slice(body).map_err(malformed)?;
    if v > VERSION {
        let why = format!("an RPC of version {v}, this member speaks version {VERSION}");
        return Err(Refusal::new(RefusalCode::Version, why));
    }
    serde_json::from_slice(body).map_err(malformed)
}

pub(super) fn asked<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    let asked: Result<Asked<T>, _> = serde_json::from_slice(body);
    asked.map(|asked| asked.ask).map_err(|error| Refusal::new(RefusalCode::Malformed, error.to_string()))
}

pub(super) fn answer<T: Serialize>(answer: Result<T, Refusal>) -> Vec<u8> {
    let (answer, refused) = match answer {
        Ok(answer) => (Some(answer), None),
        Err(refusal) => (None, Some(refusal)),
    };
    json(&Answering { v: VERSION, answer, refused })
}

/// The answer, or the other side's refusal.
pub(super) fn answered<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    let malformed =
        |why: String| Refusal::new(RefusalCode::Malformed, format!("an answer that is none: {why}"));
    let answering: Answering<T> =
        serde_json::from_slice(body).map_err(|error| malformed(error.to_string()))?;
    match (answering.answer, answering.refused) {
        (Some(answer), None) => Ok(answer),
        (_, Some(refusal)) => Err(refusal),
        (None, None) => Err(malformed("neither an answer nor a refusal".to_owned())),
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Append {
    vote: Vote,
    prev: Option<LogId>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    entries: Vec<LogEntry>,
    commit: Option<LogId>,
}

impl From<&openraft::raft::AppendEntriesRequest<types::TypeConfig>> for Append {
    fn from(request: &openraft::raft::AppendEntriesRequest<types::TypeConfig>) -> Append {
        Append {
            vote: request.vote.into(),
            prev: request.prev_log_id.map(LogId::from),
            entries: request.entries.iter().map(LogEntry::from).collect(),
            commit: request.leader_commit.map(LogId::from),
        }
    }
}

impl TryFrom<Append> for openraft::raft::AppendEntriesRequest<types::TypeConfig> {
    type Error = RecordError;
    fn try_from(append: Append) -> Result<Self, RecordError> {
        Ok(openraft::raft::AppendEntriesRequest {
            vote: append.vote.into(),
            prev_log_id: append.prev.map(types::LogId::from),
            entries: append.entries.into_iter().map(LogEntry::into_raft).collect::<Result<_, _>>()?,
            leader_commit: append.commit.map(types::LogId::from),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Appended {
    All,
    Upto(Option<LogId>),
    Conflict,
    HigherVote(Vote),
}

impl From<openraft::raft::AppendEntriesResponse<types::TypeConfig>> for Appended {
    fn from(response: openraft::raft::AppendEntriesResponse<types::TypeConfig>) -> Appended {
        use openraft::raft::AppendEntriesResponse as Response;
        match response {
            Response::Success => Appended::All,
            Response::PartialSuccess(upto) => Appended::Upto(upto.map(LogId::from)),
            Response::Conflict => Appended::Conflict,
            Response::HigherVote(vote) => Appended::HigherVote(vote.into()),
        }
    }
}

impl From<Appended> for openraft::raft::AppendEntriesResponse<types::TypeConfig> {
    fn from(appended: Appended) -> Self {
        use openraft::raft::AppendEntriesResponse as Response;
        match appended {
            Appended::All => Response::Success,
            Appended::Upto(upto) => Response::PartialSuccess(upto.map(types::LogId::from)),
            Appended::Conflict => Response::Conflict,
            Appended::HigherVote(vote) => Response::HigherVote(vote.into()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AskVote {
    vote: Vote,
    last: Option<LogId>,
    /// The leader itself asked for this election; voters grant it in spite of the leader's lease.
    transfer: bool,
}

impl From<&openraft::raft::VoteRequest<types::TypeConfig>> for AskVote {
    fn from(request: &openraft::raft::VoteRequest<types::TypeConfig>) -> AskVote {
        AskVote {
            vote: request.vote.into(),
            last: request.last_log_id.map(LogId::from),
            transfer: request.leadership_transfer,
        }
    }
}

impl From<AskVote> for openraft::raft::VoteRequest<types::TypeConfig> {
    fn from(ask: AskVote) -> Self {
        let mut request = Self::new(ask.vote.into(), ask.last.map(types::LogId::from));
        request.leadership_transfer = ask.transfer;
        request
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Voted {
    vote: Vote,
    granted: bool,
    last: Option<LogId>,
}

impl From<openraft::raft::VoteResponse<types::TypeConfig>> for Voted {
    fn from(response: openraft::raft::VoteResponse<types::TypeConfig>) -> Voted {
        Voted {
            vote: response.vote.into(),
            granted: response.vote_granted,
            last: response.last_log_id.map(LogId::from),
        }
    }
}

impl From<Voted> for openraft::raft::VoteResponse<types::TypeConfig> {
    fn from(voted: Voted) -> Self {
        let vote: types::Vote = voted.vote.into();
        Self::new(vote, voted.last.map(types::LogId::from), voted.granted)
    }
}

/// A part of a snapshot. Parts of one transfer come in order, one at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SnapshotPart {
    pub(super) vote: Vote,
    /// Of this attempt; a part of another one starts anew.
    pub(super) transfer: String,
    pub(super) offset: u64,
    pub(super) total: u64,
    pub(super) bytes: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SnapshotTaken {
    /// Kept; the next part may come.
    Part,
    /// The whole is installed, or the sender is not the leader any more: its vote is lower than this.
    Whole(Vote),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Transfer {
    from: Vote,
    to: u64,
    last: Option<LogId>,
}

impl From<&openraft::raft::TransferLeaderRequest<types::TypeConfig>> for Transfer {
    fn from(request: &openraft::raft::TransferLeaderRequest<types::TypeConfig>) -> Transfer {
        Transfer {
            from: (*request.from_leader()).into(),
            to: *request.to_node_id(),
            last: request.last_log_id().copied().map(LogId::from),
        }
    }
}

impl From<Transfer> for openraft::raft::TransferLeaderRequest<types::TypeConfig> {
    fn from(transfer: Transfer) -> Self {
        Self::new(transfer.from.into(), transfer.to, transfer.last.map(types::LogId::from))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Transferred {
    Agreed,
    VoteChanged { expected: Vote, actual: Vote },
    LogNotFlushed { expected: Option<LogId>, actual: Option<LogId> },
}

impl From<openraft::raft::TransferLeaderResponse<types::TypeConfig>> for Transferred {
    fn from(response: openraft::raft::TransferLeaderResponse<types::TypeConfig>) -> Transferred {
        use openraft::raft::TransferLeaderError as Error;
        match response {
            Ok(()) => Transferred::Agreed,
            Err(Error::VoteChanged { expected, actual }) => {
                Transferred::VoteChanged { expected: expected.into(), actual: actual.into() }
            }
            Err(Error::LogNotFlushed { expected, actual }) => Transferred::LogNotFlushed {
                expected: expected.map(LogId::from),
                actual: actual.map(LogId::from),
            },
        }
    }
}

impl From<Transferred> for openraft::raft::TransferLeaderResponse<types::TypeConfig> {
    fn from(transferred: Transferred) -> Self {
        use openraft::raft::TransferLeaderError as Error;
        match transferred {
            Transferred::Agreed => Ok(()),
            Transferred::VoteChanged { expected, actual } => {
                Err(Error::VoteChanged { expected: expected.into(), actual: actual.into() })
            }
            Transferred::LogNotFlushed { expected, actual } => Err(Error::LogNotFlushed {
                expected: expected.map(types::LogId::from),
                actual: actual.map(types::LogId::from),
            }),
        }
    }
}

/// An operation for the leader, and how long its caller waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lead {
    pub(super) within_ms: u64,
    pub(super) op: Op,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Op {
    Commit(Commit),
    /// How far must one have applied the log to see everything committed before this question?
    ReadIndex,
    AddMember(JoinRequest),
    RemoveMember {
        name: NodeName,
    },
    TransferLeadership {
        to: NodeName,
    },
    Survey,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Led {
    Committed {
        revision: u64,
    },
    Conflict {
        key: String,
    },
    ReadIndex {
        index: u64,
    },
    Joined(Joined),
    Done,
    Survey(Vec<Surveyed>),
    /// Asked the wrong member; the caller looks for the leader again.
    NotLeader {
        leader: Option<u64>,
    },
    /// Did not happen, may be tried again.
    Unavailable {
        why: String,
    },
    /// May have happened.
    Unknown {
        why: String,
    },
    /// Did not happen, and trying again is no use.
    Refused {
        why: String,
    },
}

/// A member as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Surveyed {
    pub(super) id: u64,
    pub(super) name: NodeName,
    pub(super) address: String,
    pub(super) host: String,
    pub(super) voter: bool,
    /// Since its last answer; absent: none since the leader leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) silent_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) trouble: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::record::tests::{command, disk, entries, fixture};

    fn envelope_of_b() -> Envelope {
        let from = Sender { id: 4, name: "b".parse().unwrap(), disk: disk("2") };
        Envelope {
            v: VERSION,
            herd: "4ac0".to_owned(),
            generation: 2,
            from,
            to: Receiver { id: 1, disk: disk("1") },
        }
    }

    fn vote(term: u64) -> types::Vote {
        Vote { term, node: 4, committed: true }.into()
    }

    fn log_id(index: u64) -> types::LogId {
        LogId { term: 3, leader: 4, index }.into()
    }

    /// What is asked, through the stored bytes and back.
    fn asked_again<T: Serialize + DeserializeOwned>(name: &str, question: &T) -> T {
        let stored = fixture(&format!("wire-v1/{name}.json"), &ask(&envelope_of_b(), question));
        assert_eq!(envelope(&stored).unwrap(), envelope_of_b());
        asked(&stored).unwrap()
    }

    fn answered_again<T: Serialize + DeserializeOwned>(name: &str, given: T) -> T {
        answered(&fixture(&format!("wire-v1/{name}.json"), &answer(Ok(given)))).unwrap()
    }

    #[test]
    fn requests_of_version_1_are_still_read_and_still_written() {
        let append = openraft::raft::AppendEntriesRequest::<types::TypeConfig> {
            vote: vote(3),
            prev_log_id: Some(log_id(19)),
            entries: entries(),
            leader_commit: Some(log_id(18)),
        };
        let read = asked_again("append", &Append::from(&append));
        let read = openraft::raft::AppendEntriesRequest::<types::TypeConfig>::try_from(read).unwrap();
        assert_eq!(format!("{read:?}"), format!("{append:?}"));

        for transfer in [false, true] {
            let mut request =
                openraft::raft::VoteRequest::<types::TypeConfig>::new(vote(4), Some(log_id(22)));
            request.leadership_transfer = transfer;
            let read = asked_again(&format!("vote-{transfer}"), &AskVote::from(&request));
            assert_eq!(openraft::raft::VoteRequest::from(read), request, "a vote that lost a field");
        }
        let request =
            openraft::raft::TransferLeaderRequest::<types::TypeConfig>::new(vote(3), 9, Some(log_id(22)));
        let read = asked_again("transfer", &Transfer::from(&request));
        assert_eq!(openraft::raft::TransferLeaderRequest::from(read), request);

        let bytes = Bytes(vec![1, 0xff]);
        let part =
            SnapshotPart { vote: vote(3).into(), transfer: "77".to_owned(), offset: 0, total: 2, bytes };
        assert_eq!(asked_again("snapshot", &part), part);
        let join = JoinRequest {
            herd: "4ac0".to_owned(),
            name: "d".parse().unwrap(),
            address: "d.example:8009".to_owned(),
            host: "d.example".to_owned(),
            disk: disk("4"),
        };
        let ops = [
            ("commit", Op::Commit(Commit::from(&command()))),
            ("read-index", Op::ReadIndex),
            ("add-member", Op::AddMember(join)),
            ("remove-member", Op::RemoveMember { name: "c".parse().unwrap() }),
            ("transfer-leadership", Op::TransferLeadership { to: "c".parse().unwrap() }),
            ("survey", Op::Survey),
        ];
        for (name, op) in ops {
            let lead = Lead { within_ms: 1500, op };
            assert_eq!(asked_again(&format!("lead-{name}"), &lead), lead);
        }
    }

    #[test]
    fn answers_of_version_1_are_still_read_and_still_written() {
        use openraft::raft::AppendEntriesResponse as Response;
        let responses: [(_, Response<types::TypeConfig>); 4] = [
            ("all", Response::Success),
            ("upto", Response::PartialSuccess(Some(log_id(20)))),
            ("conflict", Response::Conflict),
            ("higher-vote", Response::HigherVote(vote(9))),
        ];
        for (name, response) in responses {
            let read = answered_again(&format!("appended-{name}"), Appended::from(response.clone()));
            assert_eq!(Response::from(read), response);
        }
        let response =
            openraft::raft::VoteResponse::<types::TypeConfig>::new(vote(4), Some(log_id(22)), true);
        let read = answered_again("voted", Voted::from(response.clone()));
        assert_eq!(openraft::raft::VoteResponse::from(read), response);

        let refused: openraft::raft::TransferLeaderResponse<types::TypeConfig> =
            Err(openraft::raft::TransferLeaderError::LogNotFlushed {
                expected: Some(log_id(22)),
                actual: None,
            });
        let read = answered_again("transferred", Transferred::from(refused.clone()));
        assert_eq!(openraft::raft::TransferLeaderResponse::from(read), refused);
        let whole = SnapshotTaken::Whole(vote(3).into());
        assert_eq!(answered_again("snapshot-taken", whole.clone()), whole);

        let joined = Joined { herd: "4ac0".to_owned(), generation: 2, raft_id: 23, disk: disk("4") };
        let surveyed = Surveyed {
            id: 1,
            name: "a".parse().unwrap(),
            address: "a.example:8009".to_owned(),
            host: "a.example".to_owned(),
            voter: true,
            silent_ms: Some(12),
            trouble: None,
        };
        let why = || "a sentence".to_owned();
        let all = [
            ("committed", Led::Committed { revision: 21 }),
            ("conflict", Led::Conflict { key: "a".to_owned() }),
            ("read-index", Led::ReadIndex { index: 22 }),
            ("joined", Led::Joined(joined)),
            ("done", Led::Done),
            ("survey", Led::Survey(vec![surveyed])),
            ("not-leader", Led::NotLeader { leader: Some(9) }),
            ("unavailable", Led::Unavailable { why: why() }),
            ("unknown", Led::Unknown { why: why() }),
            ("refused", Led::Refused { why: why() }),
        ];
        for (name, led) in all {
            assert_eq!(answered_again(&format!("led-{name}"), led.clone()), led);
        }
        let refusal = Refusal::new(RefusalCode::Generation, "a sentence");
        let stored = fixture("wire-v1/refusal.json", &answer::<()>(Err(refusal.clone())));
        assert_eq!(answered::<Voted>(&stored), Err(refusal));
    }

    #[test]
    fn a_later_version_may_add_fields_and_codes_but_not_change_the_envelope() {
        let body = br#"{"v":1,"refused":{"code":"from-the-future","why":"new","more":1},"also":[]}"#;
        assert_eq!(answered::<Voted>(body), Err(Refusal::new(RefusalCode::Other, "new")));
        assert_eq!(envelope(br#"{"v":2,"what":"ever"}"#).unwrap_err().code, RefusalCode::Version);
        for neither in [&b"{}"[..], b"{\"v\":1}", b"", b"{\"v\":1,\"answer\":{}}"] {
            assert_eq!(answered::<Voted>(neither).unwrap_err().code, RefusalCode::Malformed);
        }
    }
}
