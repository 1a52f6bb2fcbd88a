//! Which server a session may use, and until when that is known.
//!
//! Agents send routing tables; a proxy may listen to several of them, and any may be late, cut off or out of date. Three
//! rules make that harmless:
//!
//! - **Terms only grow.** A table of a lower term than one seen before is ignored, whoever sent it and however fresh it
//!   looks: it tells of a primary that has lost the term.
//! - **A primary that hands over is given nothing new.** Only its own agent says so, and that counts as long as its table.
//! - **A table is worth what is left of its proof.** It counts from before it was read. When it has run out nobody is
//!   known to be the primary, and clients wait instead of guessing: the old one may have been replaced meanwhile.
//!
//! The proof is about the primary. What a standby shows was committed whoever is the primary now, so that reads go on at the
//! standbys of the newest table for as long as no other one is heard: with every agent gone that is all there is. Whether the
//! server is a standby still, it says itself ([`Routes::is_proven`] says when it has to).
//!
//! Leaves out: the transport, and the choice between standbys. Hazard: a write that goes to a former primary.

use std::net::IpAddr;
use std::path::PathBuf;

use pgherd_core::types::{Instant, Lsn, NodeName, Term};

use crate::pool::Place;

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub node: NodeName,
    pub address: IpAddr,
    pub port: u16,
    /// Of use to a proxy on the same host only.
    pub socket_dir: Option<PathBuf>,
}

/// One that may serve reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standby {
    pub target: Target,
    /// Its share of them, beside those of the others. 0: what is under way there goes on, and nothing is begun.
    pub weight: u32,
}

/// What an agent knew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub term: Term,
    /// `None` while nobody may be written to.
    pub primary: Option<Target>,
    pub gate_open: bool,
    /// Those that may serve reads.
    pub standbys: Vec<Standby>,
    /// Where the primary's history left those of former terms.
    pub forks: Vec<(Term, Lsn)>,
    /// Whether the primary is about to hand over. Only its own agent knows; the others say nothing.
    pub draining: Option<bool>,
    /// Counted from before the table was read, on this machine's clock.
    pub valid_until: Instant,
}

/// What a server is wanted for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Primary,
    /// Reads, from this node.
    Standby(NodeName),
}

/// Where a role is found now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    To(Place, Target),
    Hold(Hold),
}

/// Why clients wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// No agent has said anything yet.
    Unknown,
    /// An election or a promotion is under way.
    NoPrimary,
    GateClosed,
    /// The primary is about to hand over; what is under way there goes on.
    Draining,
    /// The node is no standby that may serve reads, or none that is heard of.
    NoStandby,
    /// The newest table has run out: no agent is heard, or none can prove the term.
    OutOfDate,
}

#[derive(Debug, Default)]
pub struct Routes {
    newest: Option<Table>,
    /// The primary of this term is about to hand over, if nothing else is heard of it until then.
    draining: Option<(Term, Instant)>,
}

impl Routes {
    /// Takes a table into account. `false`: it is of a former term and changes nothing.
    ///
    /// Within one term the last word counts. An agent that has not heard yet of a gate that opened makes clients wait
    /// until its next table; one that has not heard of a gate that closed sends them to a server that lets nobody in.
    pub fn learn(&mut self, table: Table) -> bool {
        let stale = self.newest.as_ref().is_some_and(|known| table.term < known.term);
        if stale {
            return false;
        }
        match table.draining {
            Some(true) => self.draining = Some((table.term, table.valid_until)),
            Some(false) => self.draining = None,
            None => {}
        }
        self.newest = Some(table);
        true
    }

    /// Where something can be begun.
    pub fn route(&self, role: &Role, now: Instant) -> Route {
        match self.place(role, now) {
            Route::To(place, _) if self.is_draining(role, &place, now) => Route::Hold(Hold::Draining),
            Route::To(..) if !self.may_begin(role) => Route::Hold(Hold::NoStandby),
            route => route,
        }
    }

    fn may_begin(&self, role: &Role) -> bool {
        match role {
            Role::Primary => true,
            Role::Standby(node) => self.standbys().iter().any(|(known, _)| known == node),
        }
    }

    /// Is what is under way at this place to end, and nothing to be begun?
    pub fn is_draining(&self, role: &Role, place: &Place, now: Instant) -> bool {
        *role == Role::Primary && self.draining.is_some_and(|(term, until)| term == place.term && now < until)
    }

    /// Where what is under way can go on.
    pub fn place(&self, role: &Role, now: Instant) -> Route {
        let Some(table) = &self.newest else { return Route::Hold(Hold::Unknown) };
        if *role == Role::Primary && now >= table.valid_until {
            return Route::Hold(Hold::OutOfDate);
        }
        let found = match (role, &table.primary) {
            (Role::Primary, None) => return Route::Hold(Hold::NoPrimary),
            (Role::Primary, Some(_)) if !table.gate_open => return Route::Hold(Hold::GateClosed),
            (Role::Primary, Some(target)) => Some(target),
            (Role::Standby(node), _) => {
                table.standbys.iter().map(|standby| &standby.target).find(|target| target.node == *node)
            }
        };
        match found {
            Some(target) => Route::To(Place { node: target.node.clone(), term: table.term }, target.clone()),
            None => Route::Hold(Hold::NoStandby),
        }
    }

    /// Is what the newest table says still what an agent could prove?
    pub fn is_proven(&self, now: Instant) -> bool {
        self.newest.as_ref().is_some_and(|table| now < table.valid_until)
    }

    /// Those that reads may go to, with their weights.
    pub fn standbys(&self) -> Vec<(NodeName, u32)> {
        let standbys =
            self.newest.iter().flat_map(|table| &table.standbys).filter(|standby| standby.weight > 0);
        standbys.map(|standby| (standby.target.node.clone(), standby.weight)).collect()
    }

    /// Where the history of the primary of term `now` left that of term `former`, if that is known.
    pub fn fork(&self, former: Term, now: Term) -> Option<Lsn> {
        let table = self.newest.as_ref().filter(|table| table.term == now)?;
        table.forks.iter().find(|(term, _)| *term == former).map(|(_, lsn)| *lsn)
    }

    /// The highest term that was heard of, for `SHOW`.
    pub fn term(&self) -> Option<Term> {
        self.newest.as_ref().map(|table| table.term)
    }

    /// When [`Routes::place`] of the primary changes by itself.
    pub fn wake_at(&self) -> Option<Instant> {
        self.newest.as_ref().map(|table| table.valid_until)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn target(node: &str) -> Target {
        let address = Ipv4Addr::LOCALHOST.into();
        Target { node: node.parse().unwrap(), address, port: 5432, socket_dir: None }
    }

    /// Of `node` as primary with an open gate, good until `until`.
    fn table(term: u64, node: &str, until: u64) -> Table {
        Table {
            term: Term(term),
            primary: Some(target(node)),
            gate_open: true,
            standbys: vec![Standby { target: target("s"), weight: 3 }],
            forks: vec![(Term(term - 1), Lsn(term * 100))],
            draining: None,
            valid_until: at(until),
        }
    }

    impl Routes {
        fn admits(&self, role: &Role, place: &Place, now: Instant) -> bool {
            matches!(self.route(role, now), Route::To(present, _) if present == *place)
        }
    }

    fn place(term: u64, node: &str) -> Place {
        Place { node: node.parse().unwrap(), term: Term(term) }
    }

    #[test]
    fn a_former_term_is_ignored_however_long_it_says_it_lasts() {
        let mut routes = Routes::default();
        assert_eq!(routes.route(&Role::Primary, at(0)), Route::Hold(Hold::Unknown));
        assert!(routes.learn(table(4, "a", 10)));
        assert_eq!(routes.route(&Role::Primary, at(1)), Route::To(place(4, "a"), target("a")));
        assert!(routes.learn(Table { primary: None, ..table(5, "a", 10) }), "term 5 has no primary yet");
        assert!(!routes.learn(table(4, "a", 100)));
        assert_eq!(routes.route(&Role::Primary, at(1)), Route::Hold(Hold::NoPrimary));
        assert!(routes.learn(table(5, "b", 10)));
        assert!(!routes.learn(table(4, "a", 100)));
        assert_eq!(routes.route(&Role::Primary, at(1)), Route::To(place(5, "b"), target("b")));
        assert!(routes.admits(&Role::Primary, &place(5, "b"), at(1)));
        assert!(
            !routes.admits(&Role::Primary, &place(4, "a"), at(1))
                && !routes.admits(&Role::Primary, &place(5, "a"), at(1))
        );
        assert_eq!(routes.term(), Some(Term(5)));
    }

    #[test]
    fn nobody_is_known_to_be_the_primary_when_the_proof_has_run_out() {
        let mut routes = Routes::default();
        routes.learn(table(4, "a", 10));
        assert_eq!(routes.wake_at(), Some(at(10)));
        assert!(routes.admits(&Role::Primary, &place(4, "a"), at(9)));
        assert!(!routes.admits(&Role::Primary, &place(4, "a"), at(10)));
        assert_eq!(routes.route(&Role::Primary, at(10)), Route::Hold(Hold::OutOfDate));
        routes.learn(table(4, "a", 13));
        assert!(routes.admits(&Role::Primary, &place(4, "a"), at(12)), "the same connections are good again");
    }

    #[test]
    fn within_a_term_the_last_word_counts() {
        let mut routes = Routes::default();
        routes.learn(table(4, "a", 10));
        routes.learn(Table { gate_open: false, ..table(4, "a", 10) });
        assert_eq!(routes.route(&Role::Primary, at(1)), Route::Hold(Hold::GateClosed));
        routes.learn(table(4, "a", 8));
        assert!(
            routes.admits(&Role::Primary, &place(4, "a"), at(7))
                && !routes.admits(&Role::Primary, &place(4, "a"), at(8))
        );
    }

    #[test]
    fn nothing_is_begun_on_a_primary_that_hands_over_and_what_is_under_way_goes_on() {
        let mut routes = Routes::default();
        routes.learn(table(4, "a", 10));
        routes.learn(Table { draining: Some(true), ..table(4, "a", 10) });
        let draining = |routes: &Routes, now| {
            assert_eq!(routes.place(&Role::Primary, at(now)), Route::To(place(4, "a"), target("a")));
            routes.route(&Role::Primary, at(now)) == Route::Hold(Hold::Draining)
        };
        assert!(draining(&routes, 1));
        assert!(routes.admits(&Role::Standby("s".parse().unwrap()), &place(4, "s"), at(1)), "reads go on");
        routes.learn(table(4, "a", 20));
        assert!(draining(&routes, 9), "another agent does not know");
        assert!(!draining(&routes, 10), "nothing was heard of it again");
        routes.learn(Table { draining: Some(true), ..table(4, "a", 20) });
        assert!(draining(&routes, 10));
        routes.learn(Table { draining: Some(false), ..table(4, "a", 20) });
        assert!(!draining(&routes, 10), "it was given up");
        routes.learn(Table { draining: Some(true), ..table(4, "a", 20) });
        routes.learn(table(5, "b", 20));
        assert!(routes.admits(&Role::Primary, &place(5, "b"), at(11)), "that was the former primary");
    }

    #[test]
    fn a_fork_is_that_of_the_term_that_was_asked_for() {
        let mut routes = Routes::default();
        assert_eq!(routes.fork(Term(3), Term(4)), None);
        routes.learn(table(4, "a", 10));
        assert_eq!(routes.fork(Term(3), Term(4)), Some(Lsn(400)));
        assert_eq!(routes.fork(Term(2), Term(4)), None, "too long ago");
        routes.learn(table(5, "b", 10));
        assert_eq!(routes.fork(Term(3), Term(4)), None, "that primary is one no more");
        assert_eq!(routes.fork(Term(4), Term(5)), Some(Lsn(500)));
    }

    #[test]
    fn reads_go_to_standbys_of_the_present_term_only() {
        let mut routes = Routes::default();
        let standby = |node: &str| Role::Standby(node.parse().unwrap());
        assert_eq!(routes.standbys(), []);
        routes.learn(table(4, "a", 10));
        assert_eq!(routes.standbys(), [("s".parse::<NodeName>().unwrap(), 3)]);
        assert_eq!(routes.route(&standby("s"), at(9)), Route::To(place(4, "s"), target("s")));
        assert_eq!(routes.route(&standby("a"), at(9)), Route::Hold(Hold::NoStandby));
        routes.learn(Table { primary: None, ..table(5, "a", 20) });
        assert!(routes.admits(&standby("s"), &place(5, "s"), at(1)), "reads need no primary");
        assert!(!routes.admits(&standby("s"), &place(4, "s"), at(1)));
    }

    #[test]
    fn a_standby_that_is_too_far_behind_ends_what_it_has_and_begins_nothing() {
        let mut routes = Routes::default();
        let standby = Role::Standby("s".parse().unwrap());
        let late = Standby { target: target("s"), weight: 0 };
        routes.learn(Table { standbys: vec![late], ..table(4, "a", 10) });
        assert_eq!(routes.standbys(), []);
        assert_eq!(routes.route(&standby, at(1)), Route::Hold(Hold::NoStandby));
        assert_eq!(
            routes.place(&standby, at(1)),
            Route::To(place(4, "s"), target("s")),
            "what is under way goes on"
        );
    }

    /// The primary may have been replaced; what a standby has replayed has been committed all the same.
    #[test]
    fn reads_outlive_the_proof_and_writes_never_do() {
        let mut routes = Routes::default();
        let standby = Role::Standby("s".parse().unwrap());
        assert!(!routes.is_proven(at(0)));
        assert_eq!(routes.route(&standby, at(0)), Route::Hold(Hold::Unknown));
        routes.learn(table(4, "a", 10));
        assert!(routes.is_proven(at(9)) && !routes.is_proven(at(10)));
        for later in [10, 11, 1_000_000] {
            assert_eq!(routes.route(&Role::Primary, at(later)), Route::Hold(Hold::OutOfDate));
            assert_eq!(routes.place(&Role::Primary, at(later)), Route::Hold(Hold::OutOfDate));
            assert!(routes.admits(&standby, &place(4, "s"), at(later)));
            assert_eq!(routes.standbys().len(), 1);
        }
        let a = Role::Standby("a".parse().unwrap());
        assert_eq!(routes.route(&a, at(11)), Route::Hold(Hold::NoStandby), "the former primary is none");
        // An agent is back, and knows that the standby is the primary.
        routes.learn(Table { standbys: Vec::new(), ..table(5, "s", 20) });
        assert_eq!(routes.route(&standby, at(12)), Route::Hold(Hold::NoStandby));
        assert!(routes.admits(&Role::Primary, &place(5, "s"), at(12)));
    }
}
