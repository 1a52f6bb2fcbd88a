//! Which changes of the record are worth a line of `pgherd history`, and how it reads.

use pgherd_core::record::{Cause, Election, Proposal, Record, Standing};

/// A line's stable code and its sentence, for a change that was accepted; `None` for what only machines
/// care about.
pub(crate) fn line(before: &Record, after: &Record, proposal: &Proposal) -> Option<(&'static str, String)> {
    if let Some(election) = before.election_ended_by(proposal, after) {
        return decided(&election, after);
    }
    Some(match proposal {
        Proposal::Founded { node, system, .. } => {
            ("founded", format!("{node} made the cluster, system identifier {system}"))
        }
        Proposal::Enlist { node, .. } => {
            ("enlisted", format!("{node} begins a new copy as {}", after.member(node)?))
        }
        Proposal::Open { cause, by, .. } => {
            let term = after.election.as_ref()?.term;
            (code_of(*cause), format!("{by} opened the election of term {term}: {cause}"))
        }
        Proposal::Force { to, by, .. } => {
            ("forced", format!("an operator at {by} forced {to} to lead next, and accepted data loss"))
        }
        Proposal::Unvote { node, .. } => {
            before.election.as_ref()?.forced.as_ref().filter(|named| *named == node)?;
            ("force-void", format!("{node} has no copy that could lead, and is no longer forced to"))
        }
        Proposal::Promoted { begin, .. } => {
            let reign = after.reign.as_ref()?;
            let (node, timeline) = (&reign.holder.node, reign.timeline);
            ("promoted", format!("{node} is primary on timeline {timeline} from {begin} on"))
        }
        Proposal::GateOpened { term } => ("gate-opened", format!("clients are let in, term {term}")),
        Proposal::FinishRule { rule, .. } => ("rule-changed", format!("durability rule: {rule}")),
        Proposal::UndoRule { .. } => {
            ("rule-undone", "the change of the durability rule is undone".to_owned())
        }
        Proposal::Bar { node, why: Some(why) } => ("barred", format!("{node} is barred: {why}")),
        Proposal::Bar { node, why: None } => ("unbarred", format!("{node} is no longer barred")),
        Proposal::Switchover { order: Some(order) } => match &order.to {
            Some(node) => ("switchover-asked", format!("an operator asked for a switchover to {node}")),
            None => ("switchover-asked", "an operator asked for a switchover".to_owned()),
        },
        Proposal::Switchover { order: None } => {
            ("switchover-cancelled", "the switchover was cancelled".to_owned())
        }
        Proposal::Restore { order: Some((node, moment)) } => (
            "restore-asked",
            format!("{node} is taken back to {moment}, for a restore of the cluster"),
        ),
        Proposal::Restore { order: None } => {
            let node = &before.restore.as_ref()?.node;
            ("restore-let-go", format!("{node} is let go: the cluster is not restored"))
        }
        Proposal::Held { member } => {
            let moment = &after.restore.as_ref()?.moment;
            ("restore-held", format!("{} is held at {moment}, and waits for an operator's word", member.node))
        }
        Proposal::NotHeld { node, why } => {
            ("restore-trouble", format!("{node} could not be taken back: {why}"))
        }
        Proposal::LeadRestored { by, .. } => {
            let restore = before.restore.as_ref()?;
            let (node, moment) = (&restore.node, &restore.moment);
            (
                "restore-leads",
                format!("an operator at {by} had {node} lead next, and gave up what came behind {moment}"),
            )
        }
        Proposal::AdmitRepository { .. } => {
            ("repository-admitted", "the repository may count for commits from here on".to_owned())
        }
        Proposal::DismissRepository { .. } => {
            ("repository-dismissed", "the repository counts for no commits any more".to_owned())
        }
        Proposal::Inherit { node, .. } => (
            "inherits",
            format!("{node} is made from the repository to lead, because nobody else can who answers"),
        ),
        Proposal::Found { .. }
        | Proposal::Gone { .. }
        | Proposal::Vote { .. }
        | Proposal::Decide { .. }
        | Proposal::ProposeRule { .. }
        // Base backups have their own list.
        | Proposal::OwnArchive { .. }
        | Proposal::UseRepository { .. }
        | Proposal::AskForBackup
        | Proposal::BeginBackup { .. }
        | Proposal::EndBackup { .. }
        | Proposal::EndDrill { .. } => return None,
    })
}

/// A failover by a crash counts towards a statement that kills every server it reaches.
pub(crate) const CRASH: &str = "election-crash";

fn code_of(cause: Cause) -> &'static str {
    match cause {
        Cause::Bootstrap => "election-bootstrap",
        Cause::Crash => CRASH,
        Cause::Stop => "election-stop",
        Cause::Switchover => "election-switchover",
        Cause::Damage => "election-damage",
        Cause::LeaseLost => "election-lease-lost",
        Cause::Unreachable => "election-unreachable",
        Cause::AgentSilent => "election-agent-silent",
        Cause::Fenced => "election-fenced",
        Cause::Forced => "election-forced",
    }
}

fn decided(election: &Election, after: &Record) -> Option<(&'static str, String)> {
    let reign = after.reign.as_ref()?;
    let (term, winner) = (election.term, &reign.holder.node);
    let vote = election.votes.get(winner)?;
    if vote.standing == Standing::Running {
        return Some(("incumbent", format!("{winner} is alive and goes on in term {term}")));
    }
    let votes: Vec<String> =
        election.votes.values().map(|vote| format!("{} at {}", vote.member.node, vote.position)).collect();
    Some(("elected", format!("{winner} leads term {term}; votes: {}", votes.join(", "))))
}
