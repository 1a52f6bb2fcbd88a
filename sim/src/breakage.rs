//! Builds that break one rule each, to prove that the checkers see it.
//!
//! Core itself is never built wrongly: a breakage changes what the simulated executor or PostgreSQL does, or
//! what core is shown and what it answered. None of this can be switched on in the product.

use std::collections::BTreeMap;

use pgherd_core::action::Action;
use pgherd_core::ha::{Decision, Memory, election};
use pgherd_core::observation::{Observation, Postgres};
use pgherd_core::reason::Reason;
use pgherd_core::record::{Position, Proposal, Record};
use pgherd_core::types::{Instant, Lsn, Term, Timeline};

macro_rules! breakages {
    ($($variant:ident = $name:literal,)+) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Breakage {
            $($variant,)+
        }

        impl Breakage {
            pub const ALL: &'static [Breakage] = &[$(Breakage::$variant,)+];

            pub fn name(self) -> &'static str {
                match self {
                    $(Breakage::$variant => $name,)+
                }
            }
        }
    };
}

breakages! {
    NoSeal = "no-seal",
    SealNotDurable = "seal-not-durable",
    ReceiverRestartsAfterTheSeal = "receiver-restarts-after-the-seal",
    PositionByLsnOnly = "position-by-lsn-only",
    PositionByTimelineNumber = "position-by-timeline-number",
    ReusedTimelineNumber = "reused-timeline-number",
    BarredHolderSkipped = "barred-holder-skipped",
    NamePublishedBeforeItCaughtUp = "name-published-before-it-caught-up",
    MarkerJudgedByCommit = "marker-judged-by-commit",
    EmptyList = "empty-list",
    RuleChangedInOneStep = "rule-changed-in-one-step",
    RuleWithoutTheOldPrimary = "rule-without-the-old-primary",
    RecloneOfANeededCopy = "reclone-of-a-needed-copy",
    LatePromotion = "late-promotion",
    NoGate = "no-gate",
    GateCountedFromTheOpening = "gate-counted-from-the-opening",
    AcknowledgedInSpiteOfTheWarning = "acknowledged-in-spite-of-the-warning",
    ReleasedBeforeEveryBackendWasGone = "released-before-every-backend-was-gone",
    LeaseCountedFromReceipt = "lease-counted-from-receipt",
    UnadoptedStandbyCounts = "unadopted-standby-counts",
    GateLeftOpenByPromotion = "gate-left-open-by-promotion",
    OwnSleepCountsAsSilence = "own-sleep-counts-as-silence",
    OwnCutCountsAsSilence = "own-cut-counts-as-silence",
    AddressOutlivesItsLease = "address-outlives-its-lease",
    AddressKeptThroughAStop = "address-kept-through-a-stop",
    PieceReportedBeforeTheQuestion = "piece-reported-before-the-question",
    ListingBeforeTheSeal = "listing-before-the-seal",
    HoleCountedAsCovered = "hole-counted-as-covered",
    HoleReported = "hole-reported",
    PromotionDoesNotWaitForWhatWasFetched = "promotion-does-not-wait-for-what-was-fetched",
    StreamOutlivesItsOrder = "stream-outlives-its-order",
}

impl Breakage {
    pub fn named(name: &str) -> Option<Breakage> {
        Breakage::ALL.iter().copied().find(|breakage| breakage.name() == name)
    }
}

/// What a broken `Record::apply` would have made of `proposal`.
pub fn rewrite(breakage: Breakage, before: &Record, proposal: &Proposal, mut next: Record) -> Record {
    let decided = before.election.is_some() && next.election.is_none();
    match (breakage, proposal) {
        (Breakage::RuleChangedInOneStep, Proposal::ProposeRule { rule, .. }) => {
            if let Some(rules) = &mut next.rules {
                rules.current = rule.clone();
                rules.next = None;
            }
        }
        (Breakage::RuleWithoutTheOldPrimary, _) if decided && before.holder() != next.holder() => {
            if let (Some(rules), Some(old)) = (&mut next.rules, before.holder())
                && rules.current.members.len() > rules.current.needed as usize + 1
            {
                rules.current.members.remove(old);
            }
        }
        (Breakage::BarredHolderSkipped, Proposal::Vote { vote, .. }) if !vote.electable => {
            if let Some(election) = &mut next.election
                && let Some(vote) = election.votes.get_mut(&vote.member.node)
            {
                vote.position = Position::default();
            }
        }
        (Breakage::ReusedTimelineNumber, _) if decided && before.holder() != next.holder() => {
            let parent = next.lines.last().and_then(|line| line.parent);
            if let (Some(parent), Some(mut line)) = (parent, next.lines.pop()) {
                line.timeline = Timeline(parent.0 + 1);
                next.lines.retain(|other| other.timeline != line.timeline);
                if let Some(reign) = &mut next.reign {
                    reign.timeline = line.timeline;
                }
                next.lines.push(line);
                next.lines.sort_by_key(|line| line.timeline);
            }
        }
        _ => {}
    }
    next
}

/// What a broken reader of WAL would have called the position of a copy.
pub fn position(
    breakage: Breakage,
    record: &Record,
    adopted: &BTreeMap<Timeline, Term>,
    timeline: Timeline,
    end: Lsn,
    begins: &[(Timeline, Lsn)],
) -> (Position, bool) {
    match breakage {
        Breakage::PositionByLsnOnly => {
            let term = record.lines.last().map_or(Term(0), |line| line.term);
            (Position { term, lsn: end }, true)
        }
        Breakage::PositionByTimelineNumber | Breakage::ReusedTimelineNumber => {
            (Position { term: Term(u64::from(timeline.0)), lsn: end }, true)
        }
        _ => election::position(record, adopted, timeline, end, begins),
    }
}

/// What a broken `decide` would have answered. `opened`: when the last election was.
pub fn distort(
    breakage: Breakage,
    memory: &mut Memory,
    seen: &Observation<'_>,
    opened: Instant,
    decision: &mut Decision,
) {
    let Some(record) = seen.store.record else { return };
    let holds = record.holder().is_some_and(|holder| holder.node == *seen.me);
    match breakage {
        Breakage::NoGate => {
            let primary = matches!(seen.local.postgres, Postgres::Primary(_));
            if holds && primary && record.election.is_none() && !seen.local.gate_open {
                decision.actions.insert(0, Action::SetGate { term: record.term, open: true });
            }
        }
        Breakage::NamePublishedBeforeItCaughtUp => {
            if matches!(decision.reason, Reason::ProvingRule { .. }) {
                decision.actions = finish(record);
            }
        }
        Breakage::MarkerJudgedByCommit => {
            // What the executor reports of a COMMIT that came back at once.
            let returned = seen.local.marker.as_ref().is_some_and(|(_, end)| *end == RETURNED);
            if returned && matches!(decision.reason, Reason::ProvingRule { .. }) {
                decision.actions = finish(record);
            }
        }
        Breakage::OwnSleepCountsAsSilence => memory.looked = None,
        Breakage::OwnCutCountsAsSilence => {
            let Some(now) = memory.looked else { return };
            memory.heard.values_mut().for_each(|heard| *heard = now);
        }
        Breakage::GateCountedFromTheOpening => {
            if let Some((term, _)) = memory.election_seen {
                memory.sealed_seen = Some((term, opened));
            }
        }
        Breakage::RecloneOfANeededCopy => {
            let waits =
                matches!(decision.reason, Reason::WaitsToLoseVote {} | Reason::WaitsForSafeCopies { .. });
            let holder = record.holder().map(|holder| holder.node.clone());
            let member = seen.local.durable.member.clone();
            if let (true, Some(source), Some(member)) = (waits, holder, member) {
                decision.actions = vec![
                    Action::BecomeMember { member, rebuild: true },
                    Action::Clone { term: record.term, source },
                ];
            }
        }
        _ => {}
    }
}

/// Where a marker ends whose COMMIT returned, for a build that looks at nothing else.
pub const RETURNED: Lsn = Lsn(u64::MAX);

fn finish(record: &Record) -> Vec<Action> {
    let rules = record.rules.as_ref();
    let change = rules.and_then(|rules| Some((rules.next.clone()?, rules.change)));
    let finish = |(rule, change)| Proposal::FinishRule { term: record.term, rule, change };
    change.map(finish).map(Action::Propose).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_name_means_one_breakage() {
        let names: BTreeSet<_> = Breakage::ALL.iter().map(|breakage| breakage.name()).collect();
        assert_eq!(names.len(), Breakage::ALL.len());
        assert!(Breakage::ALL.iter().all(|breakage| Breakage::named(breakage.name()) == Some(*breakage)));
    }
}
