//! Everything a decision may ask for.
//!
//! An action leaves no choice to its executor, may be repeated, and names the term in whose name it is
//! done: the executor refuses it if this node has adopted a higher one since. A list of actions is
//! ordered: one is begun only after all before it have succeeded, and the rest is dropped at the first
//! that fails. The next decision sees for itself how far things got.

use crate::observation::{Busy, SyncList};
use crate::record::{Moment, Proposal, Vote};
use crate::types::{Instant, Lsn, Member, NodeName, Term, Timeline};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Change the cluster's record by compare-and-set.
    Propose(Proposal),
    /// Note durably that this data directory is `member`'s; with `rebuild` that it is worth nothing until
    /// the action that rewrites it has ended. It is held for nothing then.
    BecomeMember {
        member: Member,
        rebuild: bool,
    },
    /// Note `term` as adopted, while going on as the primary that one is.
    Adopt {
        term: Term,
    },
    InitDb,
    /// Start PostgreSQL as a standby that connects to nobody.
    StartSealed,
    /// Stop PostgreSQL after it has sent what it has; beyond its deadline as [`Action::StopNow`].
    StopCleanly,
    /// Stop PostgreSQL at once and see every process of it gone.
    StopNow,
    /// Stop receiving, durably; then note `term` as adopted and sealed.
    Seal {
        term: Term,
    },
    /// Read the position of the sealed copy and propose the vote with it.
    Vote {
        term: Term,
        template: VoteTemplate,
    },
    /// While sealed, take WAL from another sealed copy up to `until`, from nobody else. The repository's WAL is put beside the copy's own, the
    /// timelines of its vote noted before, and what is behind the last complete record is zeros.
    CatchUp {
        term: Term,
        source: NodeName,
        until: Lsn,
    },
    /// Shut clients out, see everything replayed up to `from`, have `list` proven in effect, then leave recovery on exactly
    /// `timeline`: every lower number is taken, by a `.history` file where it is not.
    Promote {
        term: Term,
        timeline: Timeline,
        /// Where the copy ended when it was elected.
        from: Lsn,
        list: SyncList,
    },
    /// Note `term` as adopted, unseal, and stream from `upstream`.
    Follow {
        term: Term,
        upstream: NodeName,
        timeline: Timeline,
    },
    /// Make `list` PostgreSQL's list of synchronous standbys, and prove it in effect.
    SetSyncList {
        term: Term,
        list: SyncList,
    },
    /// Write a record and note its end, after `list` was proven.
    WriteMarker {
        term: Term,
        list: SyncList,
    },
    /// Let clients in, or shut them out and end their sessions.
    SetGate {
        term: Term,
        open: bool,
    },
    Checkpoint {
        term: Term,
    },
    /// End a replication connection that uses a name that is not its own.
    CutSender {
        term: Term,
        pid: u32,
    },
    CreateSlot {
        term: Term,
        node: NodeName,
    },
    /// Make the data directory anew: from the cluster's repository where that leads to `source`'s WAL, else from `source`.
    Clone {
        term: Term,
        source: NodeName,
    },
    /// Bring a diverged copy back to `source`'s history; where that cannot work, [`Action::Clone`].
    Rewind {
        term: Term,
        source: NodeName,
    },
    /// Make the data directory anew from the cluster's repository, with no WAL behind `moment`, and note durably that it is held there.
    /// It goes on being worth nothing.
    Restore {
        term: Term,
        moment: Moment,
    },
    /// Make the data directory anew from the cluster's repository, with all WAL up to `until` on `timeline` and none behind, and note the timelines
    /// that lead there as adopted. It is a copy that counts then, and connects to nobody.
    Inherit {
        term: Term,
        timeline: Timeline,
        until: Lsn,
    },
}

impl Action {
    /// Whether clients that are here now are shut out by it, or come to nobody.
    pub fn shuts_out(&self) -> bool {
        match self {
            Action::Propose(proposal) => proposal.tells_of_postgres(),
            _ => self.busy().is_some_and(Busy::shuts_out),
        }
    }

    /// What holds PostgreSQL while this is done; `None` for what is between the agent, its disk and the store.
    pub fn busy(&self) -> Option<Busy> {
        Some(match self {
            Action::Propose(_) | Action::BecomeMember { .. } | Action::Adopt { .. } => return None,
            Action::InitDb => Busy::InitDb,
            Action::StartSealed => Busy::Start,
            Action::StopCleanly | Action::StopNow => Busy::Stop,
            Action::Seal { .. } | Action::Vote { .. } => Busy::Seal,
            Action::CatchUp { .. } => Busy::CatchUp,
            Action::Promote { .. } => Busy::Promote,
            Action::Follow { .. } => Busy::Follow,
            Action::SetGate { open: false, .. } => Busy::Close,
            Action::SetSyncList { .. }
            | Action::WriteMarker { .. }
            | Action::SetGate { open: true, .. }
            | Action::Checkpoint { .. }
            | Action::CutSender { .. }
            | Action::CreateSlot { .. } => Busy::Configure,
            Action::Clone { .. } => Busy::Clone,
            Action::Restore { .. } => Busy::Restore,
            Action::Inherit { .. } => Busy::Clone,
            Action::Rewind { .. } => Busy::Rewind,
        })
    }
}

/// What a vote says besides the position, which is read when the copy is sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VoteTemplate {
    pub member: Member,
    pub electable: bool,
    pub priority: u32,
}

/// As whom the owner of the archive streams, where the repository votes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamOrder {
    pub member: Member,
    /// In whose name: nothing is told once there is a seal above it.
    pub term: Term,
    pub source: NodeName,
    pub timeline: Timeline,
    /// The term that the timeline was reserved for.
    pub line: Term,
}

/// For which election the repository is sealed, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealOrder {
    pub member: Member,
    pub term: Term,
}

/// What goes on all the time while a goal lasts, besides the actions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Duties {
    /// Commit a heartbeat every `renew`, and ask the store every `renew` whether the term is open.
    pub prove_term: bool,
    /// Probe the holder's PostgreSQL every quarter of a second.
    pub probe_holder: bool,
    /// Have the fence armed for this term.
    pub fence: Option<Term>,
    /// Keep a slot for every other member on this standby: one that is pointed here, now or after a promotion, finds
    /// the WAL that it lacks.
    pub keep_slots: bool,
    /// Stream WAL into the cluster's repository, and see to what is there.
    pub archive: bool,
    /// Do so from there, and as a member of the rule as soon as a base backup is there with all WAL behind it. Before anything is put on
    /// this timeline `adopted/<timeline>` says so, with the term that it was reserved for, and `seal/<term>` ends whoever streams for an older one. A piece is put,
    /// *then* it is asked whether there is a seal above the term, and it is told as flushed only if there is none: else no more is told.
    pub voter: Option<StreamOrder>,
    /// Ask the repository every [`ASK_EVERY`](crate::ha::repository::ASK_EVERY) whether it answers.
    pub ask_repository: bool,
    /// Put `seal/<term>` into the repository, and *then* list what is there; until it has been seen.
    pub seal_repository: Option<SealOrder>,
    /// Take the base backup of this number from the server here.
    pub backup: Option<u64>,
    /// Restore a backup on this host, to see whether it can be.
    pub drill: bool,
    /// Tell the proxies to begin nothing on this primary, and see when nothing of theirs is left on it.
    pub drain: bool,
}

/// What becomes of the address that moves with the gate, where the herd file has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Address {
    /// Not enough is known: it is neither taken nor given up. If it is there it goes by itself at the end of what it
    /// was last given.
    #[default]
    Leave,
    /// It is this node's, and goes by itself at `until` unless it is given more.
    Hold { until: Instant },
    /// It is taken away before anything else is done.
    Drop,
}

impl VoteTemplate {
    /// The vote, once the position is known.
    pub fn fill(
        &self,
        standing: crate::record::Standing,
        position: crate::record::Position,
        timeline: Timeline,
        begins: Vec<(Timeline, Lsn)>,
        known: bool,
    ) -> Vote {
        Vote {
            member: self.member.clone(),
            standing,
            position,
            timeline,
            begins,
            electable: self.electable && known,
            priority: self.priority,
        }
    }
}
