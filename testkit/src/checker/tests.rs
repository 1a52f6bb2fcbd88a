//! Each promise broken once on purpose, beside what looks like it and is allowed.

use super::*;
use crate::connection::Cause;
use crate::history::{PrimaryRead, Set, StoodStill};

/// A history told in milliseconds.
struct Story {
    history: History,
    numbers: u64,
}

impl Story {
    fn new() -> Story {
        Story { history: History::new(), numbers: 0 }
    }

    fn at(&self, ms: u64) -> Instant {
        self.history.started_at + Duration::from_millis(ms)
    }

    /// An insert by writer 0; its number is returned.
    fn insert(&mut self, (asked, ended): (u64, u64), node: &str, timeline: u32, outcome: Outcome) -> u64 {
        self.numbers += 1;
        let timeline = (outcome == Outcome::Acknowledged).then_some(timeline);
        let (asked_at, ended_at) = (self.at(asked), self.at(ended));
        let (node, number) = (node.into(), self.numbers);
        self.history.inserts.push(Insert { writer: 0, number, node, asked_at, ended_at, outcome, timeline });
        number
    }

    fn acknowledged(&mut self, when: (u64, u64), node: &str, timeline: u32) -> u64 {
        self.insert(when, node, timeline, Outcome::Acknowledged)
    }

    fn set(&mut self, (asked, ended): (u64, u64), value: u64, outcome: Outcome) {
        let (asked_at, ended_at) = (self.at(asked), self.at(ended));
        self.history.sets.push(Set { value, asked_at, ended_at, outcome });
    }

    fn read(&mut self, (asked, ended): (u64, u64), node: &str, value: u64) {
        let (asked_at, ended_at) = (self.at(asked), self.at(ended));
        self.history.reads.push(PrimaryRead { value, node: node.into(), asked_at, ended_at });
    }

    /// The violations when node a holds the first rows, b the second.
    fn violations(&self, a: &[u64], b: &[u64]) -> Vec<Violation> {
        let holding = |node: &str, numbers: &[u64]| {
            let mut rows: Vec<(u32, u64)> = numbers.iter().map(|number| (0, *number)).collect();
            rows.sort_unstable();
            Holdings { node: node.to_owned(), rows, register: None }
        };
        Verdict::of(&self.history, &[holding("a", a), holding("b", b)]).violations
    }
}

fn unknown() -> Outcome {
    Outcome::Unknown(Cause::Timeout)
}

fn failed() -> Outcome {
    Outcome::Failed(Cause::Sqlstate("25006".to_owned()))
}

#[test]
fn a_good_history_is_clean() {
    let mut story = Story::new();
    let one = story.acknowledged((0, 5), "a", 1);
    let two = story.acknowledged((10, 15), "a", 1);
    let perhaps = story.insert((20, 1020), "a", 1, unknown());
    let _perhaps_not = story.insert((20, 1020), "a", 1, unknown());
    story.insert((20, 21), "b", 1, failed());
    let after = story.acknowledged((1500, 1510), "b", 2);
    let rows = [one, two, perhaps, after];
    assert_eq!(story.violations(&rows, &rows), []);
    let holdings = Holdings { node: "a".to_owned(), rows: rows.map(|row| (0, row)).to_vec(), register: None };
    let verdict = Verdict::of(&story.history, &[holdings]);
    verdict.assert_clean();
    assert_eq!(
        (verdict.acknowledged, verdict.failed, verdict.unknown, verdict.unknown_and_there),
        (3, 1, 2, 1)
    );
}

#[test]
#[should_panic(expected = "nothing was tested")]
fn a_history_without_an_acknowledgement_proves_nothing() {
    let mut story = Story::new();
    story.insert((0, 1), "a", 1, failed());
    Verdict::of(&story.history, &[Holdings { node: "a".to_owned(), rows: vec![], register: None }])
        .assert_clean();
}

#[test]
fn a_lost_row_is_found_on_one_node_and_on_all() {
    let mut story = Story::new();
    let kept = story.acknowledged((0, 5), "a", 1);
    let lost = story.acknowledged((10, 15), "a", 1);
    let lost_on = |node: &str| Violation::Lost {
        node: node.to_owned(),
        row: (0, lost),
        acknowledged_by: "a".into(),
        timeline: Some(1),
        at: Duration::from_millis(15),
    };
    assert_eq!(story.violations(&[kept], &[kept]), [lost_on("a"), lost_on("b")]);
    let on_one = story.violations(&[kept, lost], &[kept]);
    assert!(on_one.contains(&lost_on("b")) && !on_one.contains(&lost_on("a")), "{on_one:?}");
}

#[test]
fn a_row_that_is_there_twice_is_found_whether_acknowledged_or_unknown() {
    let mut story = Story::new();
    let sure = story.acknowledged((0, 5), "a", 1);
    let unsure = story.insert((10, 1010), "a", 1, unknown());
    let rows = [sure, sure, unsure, unsure, unsure];
    let twice =
        |node: &str, number, times| Violation::Duplicated { node: node.to_owned(), row: (0, number), times };
    let expected = [twice("a", sure, 2), twice("a", unsure, 3), twice("b", sure, 2), twice("b", unsure, 3)];
    assert_eq!(story.violations(&rows, &rows), expected);
}

#[test]
fn rows_that_failed_or_were_never_asked_for_are_found() {
    let mut story = Story::new();
    let sure = story.acknowledged((0, 5), "a", 1);
    let refused = story.insert((10, 11), "b", 1, failed());
    let found = story.violations(&[sure, refused, 99], &[sure, refused, 99]);
    let never = |node: &str| Violation::NeverAsked { node: node.to_owned(), row: (0, 99) };
    assert!(found.contains(&never("a")) && found.contains(&never("b")), "{found:?}");
    let refused =
        found.iter().filter(|v| matches!(v, Violation::FailedButThere { row, .. } if row.1 == refused));
    assert_eq!((refused.count(), found.len()), (2, 4));
}

#[test]
fn nodes_that_differ_in_an_unknown_row_have_diverged() {
    let mut story = Story::new();
    let sure = story.acknowledged((0, 5), "a", 1);
    let unsure = story.insert((10, 1010), "a", 1, unknown());
    let differs = |node: &str, other: &str| {
        let (node, other) = (node.to_owned(), other.to_owned());
        [Violation::Differs { node, other, row: (0, unsure) }]
    };
    assert_eq!(story.violations(&[sure, unsure], &[sure]), differs("a", "b"));
    assert_eq!(story.violations(&[sure], &[sure, unsure]), differs("b", "a"));
}

#[test]
fn two_nodes_in_one_timeline_are_found() {
    let mut story = Story::new();
    let rows = [story.acknowledged((0, 5), "a", 3), story.acknowledged((10, 15), "b", 3)];
    let expected = Violation::TwoNodesInOneTimeline { timeline: 3, nodes: ("a".into(), "b".into()) };
    assert_eq!(story.violations(&rows, &rows), [expected]);
}

#[test]
fn an_old_primary_that_takes_writes_after_the_new_ones_first_is_found() {
    let mut story = Story::new();
    let before = story.acknowledged((0, 5), "a", 1);
    let first_of_new = story.acknowledged((100, 110), "b", 2);
    let late = story.acknowledged((111, 115), "a", 1);
    let rows = [before, first_of_new, late];
    let expected = Violation::OldTimelineGoesOn {
        old: ("a".into(), 1),
        new: ("b".into(), 2),
        asked_after: Duration::from_millis(1),
    };
    assert_eq!(story.violations(&rows, &rows), [expected]);
}

#[test]
fn a_write_under_way_may_still_be_acknowledged_by_the_old_primary() {
    let mut story = Story::new();
    let under_way = story.acknowledged((90, 130), "a", 1);
    let first_of_new = story.acknowledged((100, 110), "b", 2);
    let rows = [under_way, first_of_new];
    assert_eq!(story.violations(&rows, &rows), []);
}

#[test]
fn reads_of_an_atomic_register_are_clean() {
    let mut story = Story::new();
    let row = story.acknowledged((0, 5), "a", 1);
    story.set((0, 10), 1, Outcome::Acknowledged);
    story.read((5, 6), "a", 0); // while the first is under way, both are right
    story.read((7, 8), "a", 1);
    story.set((20, 1020), 2, unknown());
    story.read((30, 31), "a", 1);
    story.read((32, 40), "b", 2);
    story.set((1030, 1040), 3, failed());
    story.read((1050, 1051), "b", 2);
    assert_eq!(story.violations(&[row], &[row]), []);
}

#[test]
fn stale_reads_are_found() {
    let mut story = Story::new();
    let row = story.acknowledged((0, 5), "a", 1);
    story.set((0, 10), 1, Outcome::Acknowledged);
    story.set((11, 20), 2, Outcome::Acknowledged);
    story.read((21, 22), "a", 1);
    let stale = |value, must_be_at_least, because, asked_at| {
        let asked_at = Some(Duration::from_millis(asked_at));
        [Violation::StaleRead { node: "a".to_owned(), value, must_be_at_least, because, asked_at }]
    };
    let found = story.violations(&[row], &[row]);
    assert_eq!(found, stale(1, 2, "was acknowledged before", 21));
    assert_eq!(found[0].to_string(), "a showed 1 when 2 was acknowledged before, asked at 0.021 s");

    let mut story = Story::new();
    let row = story.acknowledged((0, 5), "a", 1);
    story.set((0, 1000), 1, unknown());
    story.read((10, 11), "b", 1);
    story.read((12, 13), "a", 0);
    assert_eq!(story.violations(&[row], &[row]), stale(0, 1, "was read before", 12));
}

#[test]
fn what_a_host_answers_as_it_wakes_is_counted_and_nothing_that_it_is_asked_later() {
    let told = |when: (u64, u64), node: &str| {
        let mut story = Story::new();
        let row = story.acknowledged((0, 5), "a", 1);
        story.set((0, 10), 1, Outcome::Acknowledged);
        story.set((11, 20), 2, Outcome::Acknowledged);
        let (waking_at, awake_at) = (story.at(50), story.at(52));
        story.history.stood_still.push(StoodStill { node: "a".into(), waking_at, awake_at });
        story.read(when, node, 1);
        story.violations(&[row], &[row])
    };
    assert_eq!(told((30, 51), "a"), []);
    // Asked when it ran again, answered before it woke, and of another node.
    for (when, node) in [((53, 54), "a"), ((30, 49), "a"), ((30, 51), "b")] {
        let because = "was acknowledged before";
        let node_name = node.to_owned();
        let asked_at = Some(Duration::from_millis(when.0));
        let stale =
            Violation::StaleRead { node: node_name, value: 1, must_be_at_least: 2, because, asked_at };
        assert_eq!(told(when, node), [stale], "{when:?} {node}");
    }
}

#[test]
fn a_value_that_nobody_asked_for_yet_is_found() {
    let mut story = Story::new();
    let row = story.acknowledged((0, 5), "a", 1);
    story.set((10, 20), 1, Outcome::Acknowledged);
    story.read((5, 9), "a", 1);
    let expected = Violation::ReadOfTheFuture { node: "a".to_owned(), value: 1, at_most: 0 };
    assert_eq!(story.violations(&[row], &[row]), [expected]);
}

#[test]
fn a_register_that_is_behind_in_the_end_is_found() {
    let mut story = Story::new();
    let row = story.acknowledged((0, 5), "a", 1);
    story.set((0, 10), 1, Outcome::Acknowledged);
    let holdings = Holdings { node: "a".to_owned(), rows: vec![(0, row)], register: Some(0) };
    let verdict = Verdict::of(&story.history, &[holdings]);
    assert!(
        matches!(verdict.violations[..], [Violation::StaleRead { must_be_at_least: 1, .. }]),
        "{verdict}"
    );
}

#[test]
fn the_write_gap_lies_between_the_acknowledgements_around_the_fault() {
    let mut story = Story::new();
    for ms in [10, 500, 520, 900, 920] {
        story.acknowledged((ms - 5, ms), "a", 1);
    }
    let gap = |story: &Story, fault| story.history.write_gap(story.at(fault));
    assert_eq!(gap(&story, 530), Some(Duration::from_millis(380)));
    assert_eq!(gap(&story, 930), None, "writes never came back");
    story.insert((930, 940), "a", 1, unknown());
    assert_eq!(gap(&story, 930), None, "an unknown outcome is no write");
}

#[test]
fn availability_counts_by_the_end_of_each_insert() {
    let mut story = Story::new();
    story.acknowledged((0, 5), "a", 1);
    story.acknowledged((90, 99), "a", 1);
    story.insert((90, 110), "a", 1, failed());
    story.insert((90, 310), "a", 1, unknown());
    let bucket = |acknowledged, failed, unknown| crate::history::Bucket { acknowledged, failed, unknown };
    let expected = [bucket(2, 0, 0), bucket(0, 1, 0), bucket(0, 0, 0), bucket(0, 0, 1)];
    assert_eq!(story.history.availability(Duration::from_millis(100)), expected);
}
