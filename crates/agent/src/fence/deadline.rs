//! By when the fence must act if the main loop takes no further turn.

use std::time::Duration;

use pgherd_core::record::Record;
use pgherd_core::spec::Times;
use pgherd_core::types::Instant;

/// A killed PostgreSQL is gone within this time, so that nobody reads from it at the end of the lease. Shorter
/// than [`STOP_BEFORE_LEASE_END`](pgherd_core::spec::times::STOP_BEFORE_LEASE_END): a living agent comes first.
const KILL_TAKES: Duration = Duration::from_millis(400);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    pub at: Instant,
    /// An agent that was stopped together with the fence gets a moment to speak first.
    pub patient: bool,
}

/// The deadline as of `now`, for the holder of the term. `proven`: the newest moment for which the store has
/// confirmed that the term is open. `None`: the one that was said last stays, as under an agent that has just
/// started and proved nothing yet.
///
/// Where commits need acknowledgements, an old primary that runs on does no harm to them: others take over
/// only after its voters are sealed. Under a rule that needs none, and that somebody else could win an
/// election by, nothing but the lease keeps two primaries apart. A rule whose only member is the holder
/// cannot be won without the holder's own vote, which it gives after it has stopped.
pub fn deadline(now: Instant, times: &Times, record: &Record, proven: Option<Instant>) -> Option<Deadline> {
    let grace = Deadline { at: now + times.agent_grace, patient: true };
    let Some((rules, holder)) = record.rules.as_ref().zip(record.holder()) else { return Some(grace) };
    let only_the_lease =
        rules.in_force().any(|rule| rule.needed == 0 && rule.voters(&holder.node).next().is_some());
    let needs_the_holder = rules.in_force().any(|rule| rule.voters(&holder.node).next().is_none());
    if !only_the_lease || needs_the_holder {
        return Some(grace);
    }
    let end = proven? + times.lease.saturating_sub(KILL_TAKES);
    Some(Deadline { at: end.min(grace.at), patient: false })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pgherd_core::record::{Reign, Rule, Rules};
    use pgherd_core::types::{Lsn, Timeline};

    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(ms))
    }

    fn rule(needed: u32, members: &[&str]) -> Rule {
        Rule {
            needed,
            members: members.iter().map(|member| member.parse().unwrap()).collect::<BTreeSet<_>>(),
        }
    }

    fn record(current: Rule, next: Option<Rule>) -> Record {
        Record {
            reign: Some(Reign {
                holder: "a_1".parse().unwrap(),
                timeline: Timeline(2),
                promoted: true,
                elected_at: Lsn::ZERO,
                promoted_at: Lsn(1),
                gate_opened: true,
                predecessor_gone: true,
            }),
            rules: Some(Rules { current, next, superseded: Vec::new(), change: 0 }),
            ..Record::empty()
        }
    }

    #[test]
    fn grace_where_voters_acknowledge_the_lease_where_none_does() {
        let times = Times::default();
        let grace = Deadline { at: at(100_000 + 10_000), patient: true };
        let lease = Deadline { at: at(99_200 + 3_000 - 400), patient: false };
        let quorum = rule(1, &["a_1", "b_2"]);
        let asynchronous = rule(0, &["a_1", "b_2"]);
        let alone = rule(0, &["a_1"]);
        for (record, wanted) in [
            (record(quorum.clone(), None), grace),
            (record(asynchronous.clone(), None), lease),
            // Nobody can win an election by it without the holder.
            (record(alone.clone(), None), grace),
            // From quorum to async: the list already waits for nobody.
            (record(quorum.clone(), Some(asynchronous.clone())), lease),
            (record(asynchronous, Some(alone.clone())), grace),
            (record(quorum, Some(alone)), grace),
            (Record::empty(), grace),
        ] {
            let rules = record.rules.clone();
            assert_eq!(deadline(at(100_000), &times, &record, Some(at(99_200))), Some(wanted), "{rules:?}");
        }
    }

    #[test]
    fn an_old_proof_gives_no_fresh_time() {
        let record = record(rule(0, &["a_1", "b_2"]), None);
        let late = deadline(at(100_000), &Times::default(), &record, Some(at(90_000)));
        assert!(late.unwrap().at < at(100_000));
        // And no proof at all gives none.
        assert_eq!(deadline(at(100_000), &Times::default(), &record, None), None);
    }
}
