//! What the runs have been through: every reason and every action must occur somewhere, or a part of core
//! was never tried.

use std::collections::BTreeMap;

use pgherd_core::action::Action;
use pgherd_core::reason::Reason;
use pgherd_core::record::Proposal;

/// Reasons that no schedule can produce, and why.
pub const IMPOSSIBLE_REASONS: &[(&str, &str)] = &[];

#[derive(Clone, Debug, Default)]
pub struct Coverage {
    pub reasons: BTreeMap<&'static str, u64>,
    pub actions: BTreeMap<&'static str, u64>,
    pub elections: u64,
    pub failovers: u64,
    pub fenced: u64,
    pub faults: u64,
    pub forced: u64,
}

impl Coverage {
    pub fn reason(&mut self, code: &'static str) {
        *self.reasons.entry(code).or_default() += 1;
    }

    pub fn action(&mut self, action: &Action) {
        *self.actions.entry(kind(action)).or_default() += 1;
    }

    pub fn add(&mut self, other: &Coverage) {
        for (code, count) in &other.reasons {
            *self.reasons.entry(code).or_default() += count;
        }
        for (kind, count) in &other.actions {
            *self.actions.entry(kind).or_default() += count;
        }
        self.elections += other.elections;
        self.failovers += other.failovers;
        self.fenced += other.fenced;
        self.faults += other.faults;
        self.forced += other.forced;
    }

    /// What never occurred and should have.
    pub fn missing(&self) -> Vec<&'static str> {
        let impossible = |code: &str| IMPOSSIBLE_REASONS.iter().any(|(known, _)| *known == code);
        let reasons =
            Reason::CODES.iter().filter(|code| !self.reasons.contains_key(*code) && !impossible(code));
        let actions = KINDS.iter().filter(|kind| !self.actions.contains_key(*kind));
        reasons.chain(actions).copied().collect()
    }
}

/// Every kind of action and of proposal, but for a person's wish for a base backup, and the word of a repository that does not serve.
pub const KINDS: &[&str] = &[
    "Found",
    "Founded",
    "Enlist",
    "Open",
    "Force",
    "Gone",
    "Vote",
    "Unvote",
    "Decide",
    "Promoted",
    "GateOpened",
    "ProposeRule",
    "UndoRule",
    "FinishRule",
    "Bar",
    "Switchover",
    "OwnArchive",
    "UseRepository",
    "BeginBackup",
    "EndBackup",
    "EndDrill",
    "TakeBack",
    "Held",
    "LeadRestored",
    "AdmitRepository",
    "DismissRepository",
    "Inherit",
    "MakeHeir",
    "BecomeMember",
    "Adopt",
    "InitDb",
    "StartSealed",
    "StopCleanly",
    "StopNow",
    "Seal",
    "VoteSealed",
    "CatchUp",
    "Promote",
    "Follow",
    "SetSyncList",
    "WriteMarker",
    "SetGate",
    "Checkpoint",
    "CutSender",
    "CreateSlot",
    "Clone",
    "Rewind",
    "Restore",
];

pub fn kind(action: &Action) -> &'static str {
    match action {
        Action::Propose(proposal) => match proposal {
            Proposal::Found { .. } => "Found",
            Proposal::Founded { .. } => "Founded",
            Proposal::Enlist { .. } => "Enlist",
            Proposal::Open { .. } => "Open",
            Proposal::Force { .. } => "Force",
            Proposal::Gone { .. } => "Gone",
            Proposal::Vote { .. } => "Vote",
            Proposal::Unvote { .. } => "Unvote",
            Proposal::Decide { .. } => "Decide",
            Proposal::Promoted { .. } => "Promoted",
            Proposal::GateOpened { .. } => "GateOpened",
            Proposal::ProposeRule { .. } => "ProposeRule",
            Proposal::UndoRule { .. } => "UndoRule",
            Proposal::FinishRule { .. } => "FinishRule",
            Proposal::Bar { .. } => "Bar",
            Proposal::Switchover { .. } => "Switchover",
            Proposal::OwnArchive { .. } => "OwnArchive",
            Proposal::UseRepository { .. } => "UseRepository",
            Proposal::AskForBackup => "AskForBackup",
            Proposal::BeginBackup { .. } => "BeginBackup",
            Proposal::EndBackup { .. } => "EndBackup",
            Proposal::EndDrill { .. } => "EndDrill",
            Proposal::Restore { .. } => "TakeBack",
            Proposal::Held { .. } => "Held",
            Proposal::NotHeld { .. } => "NotHeld",
            Proposal::LeadRestored { .. } => "LeadRestored",
            Proposal::AdmitRepository { .. } => "AdmitRepository",
            Proposal::DismissRepository { .. } => "DismissRepository",
            Proposal::Inherit { .. } => "Inherit",
        },
        Action::BecomeMember { .. } => "BecomeMember",
        Action::Adopt { .. } => "Adopt",
        Action::InitDb => "InitDb",
        Action::StartSealed => "StartSealed",
        Action::StopCleanly => "StopCleanly",
        Action::StopNow => "StopNow",
        Action::Seal { .. } => "Seal",
        Action::Vote { .. } => "VoteSealed",
        Action::CatchUp { .. } => "CatchUp",
        Action::Promote { .. } => "Promote",
        Action::Follow { .. } => "Follow",
        Action::SetSyncList { .. } => "SetSyncList",
        Action::WriteMarker { .. } => "WriteMarker",
        Action::SetGate { .. } => "SetGate",
        Action::Checkpoint { .. } => "Checkpoint",
        Action::CutSender { .. } => "CutSender",
        Action::CreateSlot { .. } => "CreateSlot",
        Action::Clone { .. } => "Clone",
        Action::Rewind { .. } => "Rewind",
        Action::Restore { .. } => "Restore",
        Action::Inherit { .. } => "MakeHeir",
    }
}
