//! Who has the address that moves with the gate, and until when.
//!
//! It goes with the right to be read: the holder of the open term has it while its gate is open, for no longer than
//! its newest proof lasts, and gives it up before it shuts anybody out. Whatever becomes of the node afterwards, the
//! address is gone by the end of the lease, and the gate of the next term opens after that
//! ([`lease::predecessor_left`]), or after the old holder has said that it is gone.
//!
//! Hazard: two hosts that answer for one address. Clients would come to either, and to the wrong one for as long as
//! their neighbours remember it.

use crate::action::{Action, Address};
use crate::ha::{Memory, lease};
use crate::observation::{Busy, Observation, Postgres};
use crate::record::Record;
use crate::spec::vip::GONE_BEFORE_LEASE_END;
use crate::types::Instant;

/// Beside `actions`, which are begun afterwards.
pub fn decide(
    memory: &Memory,
    now: Instant,
    seen: &Observation<'_>,
    record: &Record,
    actions: &[Action],
) -> Address {
    if seen.local.busy.is_some_and(Busy::shuts_out) || actions.iter().any(Action::shuts_out) {
        return Address::Drop;
    }
    match seen.local.postgres {
        // An agent that has just started may have left it here, with the connections that use it.
        Postgres::Unknown => return Address::Leave,
        Postgres::Primary(_) if seen.local.gate_open => {}
        _ => return Address::Drop,
    }
    // An election that the incumbent may win moves nothing; but nothing is proven while it lasts.
    let reigns = record.open_reign().is_some_and(|reign| reign.gate_opened && reign.holder.node == *seen.me);
    let proven = lease::proven(memory, seen, record, record.term).filter(|_| reigns);
    match proven.map(|proven| proven + seen.times.lease.saturating_sub(GONE_BEFORE_LEASE_END)) {
        Some(until) if now < until => Address::Hold { until },
        _ => Address::Leave,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::observation::{Local, Primary};
    use crate::record::{Cause, Election, Proposal, Reign};
    use crate::spec::Times;
    use crate::types::{Incarnation, Lsn, Member, NodeName, Term, Timeline};

    const SECOND: Duration = Duration::from_secs(1);

    fn at(s: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(s))
    }

    fn a() -> NodeName {
        "a".parse().unwrap()
    }

    fn reigning() -> Record {
        let holder = Member { node: a(), incarnation: Incarnation(1) };
        let reign = Reign {
            holder,
            timeline: Timeline(2),
            promoted: true,
            elected_at: Lsn::ZERO,
            promoted_at: Lsn::ZERO,
            gate_opened: true,
            predecessor_gone: false,
        };
        Record { term: Term(1), reign: Some(reign), ..Record::empty() }
    }

    fn serving() -> Local {
        Local {
            postgres: Postgres::Primary(Primary::default()),
            gate_open: true,
            heartbeat: Some((Term(1), at(10))),
            ..Local::default()
        }
    }

    fn decided(record: &Record, local: &Local, now: Instant, actions: &[Action]) -> Address {
        let (me, spec, times) = (a(), crate::ha::tests::spec(&["a", "b"]), Times::default());
        let peers = BTreeMap::new();
        let seen = crate::ha::tests::observation(&me, &spec, &times, record, local, &peers);
        decide(&Memory::default(), now, &seen, record, actions)
    }

    #[test]
    fn it_is_held_as_long_as_the_proof_lasts_and_renewed_by_nothing_else() {
        let until = at(10) + (3 * SECOND).saturating_sub(GONE_BEFORE_LEASE_END);
        assert_eq!(decided(&reigning(), &serving(), at(10), &[]), Address::Hold { until });
        assert_eq!(decided(&reigning(), &serving(), at(12), &[]), Address::Hold { until });
        assert_eq!(decided(&reigning(), &serving(), at(13), &[]), Address::Leave);
        let unproven = Local { heartbeat: None, ..serving() };
        assert_eq!(decided(&reigning(), &unproven, at(10), &[]), Address::Leave);
        let renewed = Local { heartbeat: Some((Term(1), at(12))), ..serving() };
        assert_eq!(decided(&reigning(), &renewed, at(13), &[]), Address::Hold { until: until + 2 * SECOND });
    }

    #[test]
    fn nobody_else_and_no_closed_gate_has_it() {
        let closed = Local { gate_open: false, ..serving() };
        assert_eq!(decided(&reigning(), &closed, at(10), &[]), Address::Drop);
        for postgres in [Postgres::Absent, Postgres::Remains, Postgres::Standby(Default::default())] {
            let gone = Local { postgres, ..serving() };
            assert_eq!(decided(&reigning(), &gone, at(10), &[]), Address::Drop);
        }
        let not_looked_at = Local { postgres: Postgres::Unknown, gate_open: false, ..serving() };
        assert_eq!(decided(&reigning(), &not_looked_at, at(10), &[]), Address::Leave);
        let mut others = reigning();
        others.reign.as_mut().unwrap().holder.node = "b".parse().unwrap();
        assert_eq!(decided(&others, &serving(), at(10), &[]), Address::Leave);
        let mut unrecorded = reigning();
        unrecorded.reign.as_mut().unwrap().gate_opened = false;
        assert_eq!(decided(&unrecorded, &serving(), at(10), &[]), Address::Leave);
    }

    #[test]
    fn an_election_neither_takes_it_away_nor_renews_it() {
        let election = Election {
            term: Term(2),
            cause: Cause::AgentSilent,
            opened_by: "b".parse().unwrap(),
            released: false,
            forced: None,
            poisoned: false,
            votes: BTreeMap::new(),
            heirs: BTreeMap::new(),
        };
        let elects = Record { election: Some(election), ..reigning() };
        assert_eq!(decided(&elects, &serving(), at(10), &[]), Address::Leave);
    }

    #[test]
    fn whatever_shuts_clients_out_comes_after_it() {
        let term = Term(1);
        let release = Proposal::Open { term, cause: Cause::Stop, by: a(), released: true, poisoned: false };
        for last in [
            Action::SetGate { term, open: false },
            Action::StopCleanly,
            Action::StopNow,
            Action::Seal { term },
            Action::Propose(release),
        ] {
            let actions = [Action::Checkpoint { term }, last];
            assert_eq!(decided(&reigning(), &serving(), at(10), &actions), Address::Drop, "{actions:?}");
        }
        let closing = Local { busy: Some(Busy::Close), ..serving() };
        assert_eq!(decided(&reigning(), &closing, at(10), &[]), Address::Drop, "it was begun a moment ago");
        let harmless = [Action::Checkpoint { term }, Action::SetGate { term, open: true }];
        assert!(matches!(decided(&reigning(), &serving(), at(10), &harmless), Address::Hold { .. }));
    }
}
