//! The write-ahead log of the whole world: who wrote which record, and which copy holds what.
//!
//! A **hand** is one promotion: the records that one server wrote on one timeline. Two servers that promote
//! themselves to the same timeline *number* are two hands; PostgreSQL cannot tell them apart, this file
//! can. Copies never store records. A copy is a [`Point`]: a hand and how many records from the very
//! first one it holds, because WAL is prefix-closed.
//!
//! One record is one position and takes [`RECORD_BYTES`] of LSN. Records are whole: the real driver reads up
//! to the last complete valid record and nothing here tears one.

use pgherd_core::types::{Lsn, Term, Timeline};

/// Large, so that a burst of commits makes a standby lag by more than what a voter may.
pub const RECORD_BYTES: u64 = 1 << 20;

pub type HandId = usize;

/// The end of a copy, or a place in somebody's history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    pub hand: HandId,
    pub at: u64,
}

#[derive(Clone, Debug)]
pub struct Hand {
    pub number: Timeline,
    /// The reign that it was promoted for; `None`: by a person, outside pgherd.
    pub term: Option<Term>,
    pub node: usize,
    pub parent: Option<HandId>,
    /// Records before this one are the parent's.
    pub begin: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Wal {
    hands: Vec<Hand>,
}

pub fn lsn(at: u64) -> Lsn {
    Lsn(at * RECORD_BYTES)
}

pub fn at(lsn: Lsn) -> u64 {
    lsn.0 / RECORD_BYTES
}

impl Wal {
    pub fn found(&mut self, node: usize) -> HandId {
        self.add(Hand { number: Timeline(1), term: None, node, parent: None, begin: 0 })
    }

    pub fn promote(&mut self, from: Point, number: Timeline, term: Option<Term>, node: usize) -> HandId {
        self.add(Hand { number, term, node, parent: Some(from.hand), begin: from.at })
    }

    fn add(&mut self, hand: Hand) -> HandId {
        self.hands.push(hand);
        self.hands.len() - 1
    }

    pub fn hand(&self, id: HandId) -> &Hand {
        &self.hands[id]
    }

    pub fn hand_of(&self, number: Timeline, term: Option<Term>) -> Option<HandId> {
        self.hands.iter().position(|hand| hand.number == number && hand.term == term)
    }

    pub fn number(&self, point: Point) -> Timeline {
        self.hands[point.hand].number
    }

    /// The hands in the history of `hand`, the newest first.
    pub fn lineage(&self, hand: HandId) -> impl Iterator<Item = HandId> + '_ {
        std::iter::successors(Some(hand), |id| self.hands[*id].parent)
    }

    /// Where the history of `hand` has each timeline begin, as its `.history` file says.
    pub fn begins(&self, hand: HandId) -> Vec<(Timeline, Lsn)> {
        let mut begins: Vec<_> =
            self.lineage(hand).map(|id| (self.hands[id].number, lsn(self.hands[id].begin))).collect();
        begins.reverse();
        begins
    }

    /// The same place, on the hand that wrote the last record before it.
    pub fn settle(&self, mut point: Point) -> Point {
        while let Some(parent) = self.hands[point.hand].parent
            && point.at <= self.hands[point.hand].begin
        {
            point.hand = parent;
        }
        point
    }

    /// Does a copy that ends at `copy` hold everything up to `point`?
    pub fn holds(&self, copy: Point, point: Point) -> bool {
        let point = self.settle(point);
        let mut limit = copy.at;
        for id in self.lineage(copy.hand) {
            if id == point.hand {
                return point.at <= limit;
            }
            limit = limit.min(self.hands[id].begin);
        }
        false
    }

    /// The last place that two copies share.
    pub fn common(&self, one: Point, other: Point) -> Point {
        let mut limit = one.at;
        for id in self.lineage(one.hand) {
            let point = Point { hand: id, at: limit };
            let mut theirs = other.at;
            for other_id in self.lineage(other.hand) {
                if other_id == id {
                    return self.settle(Point { at: point.at.min(theirs), ..point });
                }
                theirs = theirs.min(self.hands[other_id].begin);
            }
            limit = limit.min(self.hands[id].begin);
        }
        Point { hand: one.hand, at: 0 }
    }

    /// The place `at` in the history of `hand`.
    pub fn place(&self, hand: HandId, at: u64) -> Point {
        self.settle(Point { hand, at })
    }

    /// What PostgreSQL itself checks when `copy` asks `upstream` for more: timelines by their *numbers*, and
    /// that the copy ends before its timeline was left. `None`: refused.
    pub fn admits(&self, upstream: Point, copy: Point) -> Option<HandId> {
        let number = self.number(copy);
        let mut left = upstream.at;
        for id in self.lineage(upstream.hand) {
            if self.hands[id].number == number {
                return (copy.at <= left).then_some(id);
            }
            left = self.hands[id].begin;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_hands_of_one_number_are_told_apart_here_and_not_by_postgresql() {
        let mut wal = Wal::default();
        let root = wal.found(0);
        let fork = Point { hand: root, at: 5 };
        let one = wal.promote(fork, Timeline(2), Some(Term(1)), 0);
        let other = wal.promote(fork, Timeline(2), None, 1);
        let (one, other) = (Point { hand: one, at: 9 }, Point { hand: other, at: 7 });
        assert!(wal.holds(one, fork) && wal.holds(other, fork));
        assert!(!wal.holds(one, other));
        assert_eq!(wal.common(one, other), fork);
        assert_eq!(wal.admits(one, other), Some(one.hand), "by its number it looks like the same timeline");
        assert_eq!(wal.admits(other, one), None, "it ends beyond the other");
        assert_eq!(wal.settle(Point { hand: one.hand, at: 5 }), fork);
    }
}
