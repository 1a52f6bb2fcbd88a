//! Actions and proposals as one short line each, for replays and for the recorded scripts.

use pgherd_core::action::Action;
use pgherd_core::observation::SyncList;
use pgherd_core::record::{BackupOutcome, Proposal, Standing};

pub fn list(list: &SyncList) -> String {
    if list.needed == 0 {
        return "nobody".to_owned();
    }
    let names: Vec<String> = list.names.iter().map(ToString::to_string).collect();
    format!("any {} of ({})", list.needed, names.join(", "))
}

pub fn proposal(proposal: &Proposal) -> String {
    match proposal {
        Proposal::Found { node } => format!("{node} founds the cluster"),
        Proposal::Founded { node, needed, .. } => format!("{node} has founded the cluster, needed {needed}"),
        Proposal::Enlist { node, from } => format!("{node} gets a new incarnation after {from}"),
        Proposal::Open { term, cause, released, poisoned, .. } => {
            let released = if *released { ", released" } else { "" };
            let poisoned = if *poisoned { ", poisoned" } else { "" };
            format!("term {term} is closed: {cause}{released}{poisoned}")
        }
        Proposal::Force { term, to, .. } => format!("term {term} is closed, {to} is forced to lead next"),
        Proposal::Gone { holder, .. } => format!("{holder} is gone for certain"),
        Proposal::Vote { term, vote } => {
            let standing = match vote.standing {
                Standing::Running => "running",
                Standing::Sealed => "sealed",
            };
            let may = if vote.electable { "" } else { ", may not lead" };
            format!("{} votes in term {term}: {standing} at {}{may}", vote.member, vote.position)
        }
        Proposal::Unvote { node, .. } => format!("{node} has no copy that counts, and is not waited for"),
        Proposal::Decide { term, winner, patient } => {
            let patient = if *patient { ", the others are not waited for" } else { "" };
            format!("{winner} leads term {term}{patient}")
        }
        Proposal::Promoted { term, begin, at } => format!("term {term} begins at {begin}, gate at {at}"),
        Proposal::GateOpened { term } => format!("the gate of term {term} is open"),
        Proposal::ProposeRule { rule, .. } => format!("next rule: {rule}"),
        Proposal::UndoRule { .. } => "back to the rule before".to_owned(),
        Proposal::FinishRule { rule, .. } => format!("rule: {rule}"),
        Proposal::Bar { node, why: Some(why) } => format!("{node} is barred: {why}"),
        Proposal::Bar { node, why: None } => format!("{node} is no longer barred"),
        Proposal::Switchover { order: Some(order) } => match &order.to {
            Some(node) => format!("switchover of term {} to {node} is ordered", order.term),
            None => format!("switchover of term {} is ordered", order.term),
        },
        Proposal::Switchover { order: None } => "the switchover is cancelled".to_owned(),
        Proposal::OwnArchive { archive: Some((place, owner)), .. } => {
            format!("{owner} owns the archive at {place}")
        }
        Proposal::OwnArchive { archive: None, .. } => "there is no archive any more".to_owned(),
        Proposal::UseRepository { repository, .. } => format!("the repository is {repository}"),
        Proposal::AskForBackup => "a base backup is asked for".to_owned(),
        Proposal::BeginBackup { node, .. } => format!("a base backup of {node} begins"),
        Proposal::EndDrill { end } => format!("a drill of {} has ended", end.node),
        Proposal::Restore { order: Some((node, moment)) } => {
            format!("{node} is to be taken back to {moment}")
        }
        Proposal::Restore { order: None } => "nobody is to be taken back any more".to_owned(),
        Proposal::Held { member } => format!("{member} is held there"),
        Proposal::NotHeld { node, why } => format!("{node} could not be taken back: {why}"),
        Proposal::LeadRestored { term, .. } => format!("term {term} is closed, who is held leads next"),
        Proposal::AdmitRepository { owner, .. } => format!("{owner} has the repository admitted"),
        Proposal::DismissRepository { .. } => "the repository is dismissed".to_owned(),
        Proposal::Inherit { node, term, .. } => {
            format!("{node} is to be made from the repository for term {term}")
        }
        Proposal::EndBackup { end } => match &end.outcome {
            BackupOutcome::Complete { id } => format!("base backup {id} of {} is complete", end.node),
            BackupOutcome::Failed { why } => format!("the base backup of {} has failed: {why}", end.node),
        },
    }
}

pub fn action(action: &Action) -> String {
    match action {
        Action::Propose(change) => format!("propose: {}", proposal(change)),
        Action::BecomeMember { member, rebuild: false } => format!("become {member}"),
        Action::BecomeMember { member, rebuild: true } => format!("become {member}, to be rebuilt"),
        Action::Adopt { term } => format!("adopt term {term}"),
        Action::InitDb => "initdb".to_owned(),
        Action::StartSealed => "start sealed".to_owned(),
        Action::StopCleanly => "stop cleanly".to_owned(),
        Action::StopNow => "stop now".to_owned(),
        Action::Seal { term } => format!("seal for term {term}"),
        Action::Vote { term, .. } => format!("read the position and vote in term {term}"),
        Action::CatchUp { source, until, .. } => format!("catch up from {source} to {until}"),
        Action::Promote { term, timeline, list: names, .. } => {
            format!("promote for term {term} onto timeline {timeline}, waiting for {}", list(names))
        }
        Action::Follow { term, upstream, timeline } => {
            format!("follow {upstream} in term {term} on timeline {timeline}")
        }
        Action::SetSyncList { list: names, .. } => format!("wait for {}", list(names)),
        Action::WriteMarker { list: names, .. } => format!("write a marker under {}", list(names)),
        Action::SetGate { open: true, .. } => "open the gate".to_owned(),
        Action::SetGate { open: false, .. } => "close the gate".to_owned(),
        Action::Checkpoint { .. } => "checkpoint".to_owned(),
        Action::CutSender { pid, .. } => format!("cut WAL sender {pid}"),
        Action::CreateSlot { node, .. } => format!("create the slot of {node}"),
        Action::Clone { source, .. } => format!("clone from {source}"),
        Action::Rewind { source, .. } => format!("rewind to {source}"),
        Action::Inherit { until, timeline, .. } => {
            format!("make its copy from the repository up to {until} on timeline {timeline}")
        }
        Action::Restore { moment, .. } => format!("restore its copy up to {moment}"),
    }
}
