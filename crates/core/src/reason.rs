//! Why a node does, or does not do, what it does right now. One sentence each; waiting is a reason too.
//!
//! The sentences are what `pgherd status` and `pgherd explain` print, what a change of them logs, and what
//! tests assert. [`Reason::code`] is the same without the values, stable for machines.

use std::collections::BTreeSet;
use std::fmt;

use crate::observation::Busy;
use crate::record::{Cause, Moment, Position};
use crate::types::{Lsn, Member, NodeName, Term, Timeline};

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident { $($field:ident: $type:ty),* } = $code:literal,)+) => {
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$doc])* $variant { $($field: $type),* },)+
        }

        impl Reason {
            /// Every code there is, for the checks that each one occurs.
            pub const CODES: &'static [&'static str] = &[$($code),+];

            pub fn code(&self) -> &'static str {
                match self {
                    $(Reason::$variant { .. } => $code,)+
                }
            }
        }
    };
}

reasons! {
    // The store and this node itself.
    StoreNeverRead {} = "store-never-read",
    RecordBehind { term: Term } = "record-behind",
    RecordUnconfirmed {} = "record-unconfirmed",
    Occupied { with: Busy } = "occupied",
    LookingAtPostgres {} = "looking-at-postgres",
    Witnessing {} = "witnessing",
    NotInSpecification {} = "not-in-specification",
    OperatorStopped {} = "operator-stopped",
    // Bootstrap.
    Founding {} = "founding",
    WaitingForFounder { founder: Option<NodeName> } = "waiting-for-founder",
    OpeningFirstElection {} = "opening-first-election",
    // Elections.
    Opening { cause: Cause } = "opening-election",
    RepositoryAwaited { holder: NodeName } = "repository-awaited",
    LettingOthersVote { term: Term } = "letting-others-vote",
    Sealing { term: Term } = "sealing",
    Voting { term: Term } = "voting",
    VotedRunning { term: Term } = "voted-running",
    StoppingToVote { term: Term } = "stopping-to-vote",
    NoVote { term: Term } = "no-vote",
    WaitingForVotes { term: Term, missing: BTreeSet<NodeName> } = "waiting-for-votes",
    WaitingForBetterVotes { term: Term, missing: BTreeSet<NodeName> } = "waiting-for-better-votes",
    WaitingForForced { term: Term, named: NodeName } = "waiting-for-forced",
    WaitingForHolderVote { term: Term, holder: NodeName } = "waiting-for-holder-vote",
    NobodyElectable { term: Term } = "nobody-electable",
    CatchingUpToLead { term: Term, source: NodeName, until: Position } = "catching-up-to-lead",
    WaitingForCatchUp { term: Term, candidate: NodeName } = "waiting-for-catch-up",
    WaitingForHeir { term: Term } = "waiting-for-heir",
    BecomingHeir { term: Term } = "becoming-heir",
    Inheriting { term: Term, until: Position } = "inheriting",
    Deciding { term: Term, winner: NodeName } = "deciding",
    // The holder.
    StartingToPromote { term: Term } = "starting-to-promote",
    Promoting { term: Term, timeline: Timeline } = "promoting",
    WithdrawingPromotion { term: Term } = "withdrawing-promotion",
    RecordingPromotion { term: Term } = "recording-promotion",
    ClearingRemains {} = "clearing-remains",
    GivingBack { term: Term, cause: Cause } = "giving-back",
    DataGone { term: Term } = "data-gone",
    Damaged { what: String } = "damaged",
    LeaseEnding { term: Term } = "lease-ending",
    LeaseEnded { term: Term } = "lease-ended",
    GateWaitsForVoters { until: Lsn, have: u32, needed: u32 } = "gate-waits-for-voters",
    GateWaitsForLease { predecessor_ms_left: u64 } = "gate-waits-for-lease",
    GateWaitsForList {} = "gate-waits-for-list",
    OpeningGate { term: Term } = "opening-gate",
    SettingList {} = "setting-list",
    ChangingRule { to: String } = "changing-rule",
    UndoingRule {} = "undoing-rule",
    ProvingRule { have: u32, needed: u32 } = "proving-rule",
    CommitsWait { have: u32, needed: u32 } = "commits-wait",
    CommitsWaitForRepository { have: u32, needed: u32 } = "commits-wait-for-repository",
    Degraded {} = "degraded",
    CuttingImpostor { claimed: Option<Member> } = "cutting-impostor",
    SwitchoverWaits { to: Option<NodeName>, why: &'static str } = "switchover-waits",
    Draining { to: Option<NodeName> } = "draining",
    SwitchingOver { to: Option<NodeName> } = "switching-over",
    HoldsTerm { term: Term } = "holds-term",
    // Everyone else.
    StrayPrimary { term: Term } = "stray-primary",
    WaitingForPromotion { term: Term, holder: NodeName } = "waiting-for-promotion",
    StartingLater { holder: NodeName } = "starting-later",
    StartingSealed {} = "starting-sealed",
    PointingAt { upstream: NodeName } = "pointing-at",
    Follows { upstream: NodeName } = "follows",
    NotReceiving { upstream: NodeName } = "not-receiving",
    WaitsToLoseVote {} = "waits-to-lose-vote",
    WaitsForSafeCopies { holder: NodeName } = "waits-for-safe-copies",
    WaitsForSource { source: NodeName } = "waits-for-source",
    Enlisting {} = "enlisting",
    Cloning { source: NodeName } = "cloning",
    Restoring { source: NodeName } = "restoring",
    Rewinding { source: NodeName } = "rewinding",
    TakingBack { moment: Moment } = "taking-back",
    Held { moment: Moment } = "held",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Reason::*;
        match self {
            StoreNeverRead {} => write!(f, "has not reached the store yet, and begins nothing before"),
            RecordBehind { term } => {
                write!(f, "has already taken part in term {term}, and waits for news of it from the store")
            }
            RecordUnconfirmed {} => {
                write!(
                    f,
                    "waits until the store confirms that what it shows since the start is its newest word"
                )
            }
            Occupied { with } => write!(f, "{}", with.gerund()),
            LookingAtPostgres {} => write!(f, "is looking at its PostgreSQL"),
            Witnessing {} => write!(f, "votes in the store and has no PostgreSQL"),
            NotInSpecification {} => {
                write!(f, "is not in the specification, and keeps its PostgreSQL stopped")
            }
            OperatorStopped {} => write!(f, "was stopped by an operator"),
            Founding {} => write!(f, "is the first node, and makes the cluster"),
            WaitingForFounder { founder: Some(node) } => write!(f, "waits until {node} has made the cluster"),
            WaitingForFounder { founder: None } => write!(f, "waits for the first node of the file to begin"),
            OpeningFirstElection {} => write!(f, "opens the cluster's first election"),
            Opening { cause } => write!(f, "opens an election: {cause}"),
            RepositoryAwaited { holder } => write!(
                f,
                "opens no election though {holder} is lost: an acknowledged commit may be only in the repository, which does not answer"
            ),
            LettingOthersVote { term } => {
                write!(
                    f,
                    "lets the others vote first in the election of term {term}, which can do without it"
                )
            }
            Sealing { term } => write!(f, "stops receiving, to vote in the election of term {term}"),
            Voting { term } => write!(f, "votes in the election of term {term}"),
            VotedRunning { term } => {
                write!(f, "is a running primary, and said so in the election of term {term}")
            }
            StoppingToVote { term } => {
                write!(f, "stops its PostgreSQL: term {term} is being elected and this copy may not go on")
            }
            NoVote { term } => write!(f, "has no copy that counts in the election of term {term}"),
            WaitingForVotes { term, missing } => write!(
                f,
                "term {term} waits for votes: an acknowledged commit may be only on {}",
                names(missing, "one that has not answered")
            ),
            WaitingForBetterVotes { term, missing } => {
                write!(f, "term {term} waits a moment for {}", names(missing, "better votes"))
            }
            WaitingForForced { term, named } => {
                write!(f, "term {term} waits for {named}, which an operator named to lead it")
            }
            WaitingForHolderVote { term, holder } => {
                write!(
                    f,
                    "term {term} waits a moment for {holder}, which may be alive and then simply goes on"
                )
            }
            NobodyElectable { term } => {
                write!(
                    f,
                    "nobody may lead term {term}: every copy that counts and answered is barred, delayed or has priority 0"
                )
            }
            CatchingUpToLead { term, source, until } => {
                let source = called(source);
                write!(f, "takes WAL up to {until} from {source}, which cannot lead term {term} itself")
            }
            WaitingForCatchUp { term, candidate } => {
                write!(
                    f,
                    "term {term} waits until {candidate} has taken the WAL that only a member holds which cannot lead"
                )
            }
            WaitingForHeir { term } => write!(
                f,
                "term {term} waits for a node without data: the repository holds the most and cannot lead, so that a new copy of it must"
            ),
            BecomingHeir { term } => {
                write!(f, "asks to be made from the repository, because nobody else can lead term {term}")
            }
            Inheriting { term, until } => write!(
                f,
                "makes its data directory from the repository, up to {until}, which nobody who answers and may lead term {term} holds"
            ),
            Deciding { term, winner } => write!(f, "ends the election: {winner} leads term {term}"),
            StartingToPromote { term } => {
                write!(f, "won term {term}, and starts its PostgreSQL to be promoted")
            }
            Promoting { term, timeline } => {
                write!(f, "won term {term}, and is promoted onto timeline {timeline}")
            }
            WithdrawingPromotion { term } => {
                write!(f, "restarts its PostgreSQL: a promotion for term {term} may still be under way in it")
            }
            RecordingPromotion { term } => write!(f, "records where term {term} begins"),
            ClearingRemains {} => write!(f, "ends what is left of its dead PostgreSQL"),
            GivingBack { term, cause } => write!(f, "gives term {term} back: {cause}"),
            DataGone { term } => write!(f, "gives term {term} back: its data directory is gone"),
            Damaged { what } => write!(f, "is damaged, and hands over: {what}"),
            LeaseEnding { term } => write!(
                f,
                "stops its PostgreSQL: neither the store nor the voters have confirmed term {term} for almost a lease"
            ),
            LeaseEnded { term } => {
                write!(
                    f,
                    "stopped its PostgreSQL because nobody confirmed term {term}, and waits for the store"
                )
            }
            GateWaitsForVoters { until, have, needed } => write!(
                f,
                "admits no client yet: {have} of {needed} needed voters have confirmed the WAL up to {until}"
            ),
            GateWaitsForLease { predecessor_ms_left } => write!(
                f,
                "admits no client for another {predecessor_ms_left} ms, while the former primary might still answer reads"
            ),
            GateWaitsForList {} => {
                write!(f, "admits no client before its list of synchronous standbys is proven in effect")
            }
            OpeningGate { term } => write!(f, "admits clients in term {term}"),
            SettingList {} => write!(f, "proves its list of synchronous standbys in effect"),
            ChangingRule { to } => write!(f, "changes the durability rule to {to}"),
            UndoingRule {} => {
                write!(f, "goes back to the former durability rule: a new voter does not answer")
            }
            ProvingRule { have, needed } => {
                write!(
                    f,
                    "proves the new durability rule: {have} of {needed} needed voters have flushed the marker"
                )
            }
            CommitsWait { have, needed } => {
                write!(f, "holds the term, but commits wait: {have} of {needed} needed voters stream")
            }
            CommitsWaitForRepository { have, needed } => write!(
                f,
                "holds the term, but commits wait: {have} of {needed} needed voters stream, and the repository, which is one, confirms nothing"
            ),
            Degraded {} => write!(f, "holds the term, degraded: commits are on this node alone"),
            CuttingImpostor { claimed: Some(member) } => {
                write!(f, "ends a replication connection that claims to be {member} and is not")
            }
            CuttingImpostor { claimed: None } => {
                write!(f, "ends a replication connection on a member's slot that is not the member's")
            }
            SwitchoverWaits { to: Some(node), why } => write!(f, "switchover to {node} waits: {why}"),
            SwitchoverWaits { to: None, why } => write!(f, "switchover waits: {why}"),
            Draining { to: Some(node) } => {
                write!(f, "lets the proxies' transactions end before it hands over to {node}")
            }
            Draining { to: None } => f.write_str("lets the proxies' transactions end before it hands over"),
            SwitchingOver { to: Some(node) } => write!(f, "hands over to {node}"),
            SwitchingOver { to: None } => write!(f, "hands over"),
            HoldsTerm { term } => write!(f, "holds term {term}"),
            StrayPrimary { term } => {
                write!(f, "stops its PostgreSQL: it is a primary, and term {term} belongs to another node")
            }
            WaitingForPromotion { term, holder } => {
                write!(f, "waits until {holder} is promoted for term {term}")
            }
            StartingLater { holder } => {
                write!(f, "starts its PostgreSQL a moment later, so that nothing slows {holder} down")
            }
            StartingSealed {} => write!(f, "starts its PostgreSQL, which connects to nobody yet"),
            PointingAt { upstream } => write!(f, "is being pointed at {upstream}"),
            Follows { upstream } => write!(f, "streams from {upstream}"),
            NotReceiving { upstream } => write!(f, "is pointed at {upstream} and receives nothing from it"),
            WaitsToLoseVote {} => {
                write!(f, "must be rebuilt, and waits until the durability rule no longer counts this copy")
            }
            WaitsForSafeCopies { holder } => write!(
                f,
                "must be rebuilt, and waits until {holder} and enough others hold everything acknowledged"
            ),
            WaitsForSource { source } => {
                write!(f, "must copy its data from {source}, and cannot reach the PostgreSQL there")
            }
            Enlisting {} => {
                write!(f, "asks for a fresh incarnation, so that no former copy of it ever counts again")
            }
            Cloning { source } => write!(f, "copies its data directory anew from {source}"),
            Restoring { source } => {
                write!(
                    f,
                    "makes its data directory anew, from the repository or, where that does not serve, from {source}"
                )
            }
            Rewinding { source } => {
                write!(f, "rewinds its copy, which has diverged, to the history of {source}")
            }
            TakingBack { moment } => write!(
                f,
                "is taken back to {moment}: its copy is made anew from backup {}, and replays WAL up to there",
                moment.backup
            ),
            Held { moment } => write!(
                f,
                "is held at {moment}, and neither follows nor votes, until an operator has it lead or lets it go"
            ),
        }
    }
}

fn names(nodes: &BTreeSet<NodeName>, otherwise: &str) -> String {
    let names: Vec<&str> = nodes.iter().map(called).collect();
    match names.as_slice() {
        [] => otherwise.to_owned(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

/// The repository has no name that an operator has given it.
fn called(node: &NodeName) -> &str {
    if node.is_repository() { "the repository" } else { node.as_str() }
}

impl Busy {
    /// "is …", for a sentence.
    fn gerund(self) -> &'static str {
        match self {
            Busy::InitDb => "is making a new cluster",
            Busy::Clone => "is copying its data directory",
            Busy::Restore => "is restoring its data directory to an earlier moment",
            Busy::Rewind => "is rewinding its data directory",
            Busy::Start => "is starting PostgreSQL",
            Busy::Stop => "is stopping PostgreSQL",
            Busy::Seal => "is sealing itself",
            Busy::Promote => "is being promoted",
            Busy::Follow => "is being pointed at its upstream",
            Busy::Configure => "is changing its configuration",
            Busy::Close => "is shutting clients out",
            Busy::CatchUp => "is taking WAL that only a member holds which cannot lead",
        }
    }
}
