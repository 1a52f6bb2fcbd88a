//! Judges a history against what the nodes hold in the end.
//!
//! The promises, each with the violation that breaks it:
//!
//! | promise | violation |
//! |---|---|
//! | an acknowledged row is on every node, once | `Lost`, `Duplicated` |
//! | an unknown row is there once or not at all, and the same on all nodes | `Duplicated`, `Differs` |
//! | nothing else is there | `NeverAsked`, `FailedButThere` |
//! | one node acknowledges in a timeline | `TwoNodesInOneTimeline` |
//! | when a newer timeline has acknowledged, no older one takes a write and acknowledges it | `OldTimelineGoesOn` |
//! | a server that is no standby shows every write acknowledged before, and no value comes back | `StaleRead` |
//!
//! The fifth is about writes *asked for* after the newer timeline's first acknowledgement was received. One
//! that was under way may still be acknowledged by the old primary: the new one holds it.
//!
//! The sixth leaves out what a server was asked while its whole host stood still and answered as that woke: nothing of
//! pgherd ran on it either, and these clients are connected directly. A proxy would not have passed it on. Such
//! answers are counted (docs/decisions/2026-11-21-answers-of-a-host-that-wakes.md).
//!
//! Everything here is a function of its arguments, so that planted mistakes prove that each is found.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::Rows;
use crate::history::{History, Insert, Outcome};
use crate::wait::wait_until;

/// So many examples of each kind are printed.
const EXAMPLES: usize = 5;
/// Replaying what an hour of writes left behind takes seconds; more means that a standby is stuck.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(120);

/// What one node holds in the end.
#[derive(Clone, Debug)]
pub struct Holdings {
    pub node: String,
    /// (writer, number), sorted.
    pub rows: Vec<(u32, u64)>,
    pub register: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    Lost {
        node: String,
        row: (u32, u64),
        acknowledged_by: Arc<str>,
        timeline: Option<u32>,
        at: Duration,
    },
    Duplicated {
        node: String,
        row: (u32, u64),
        times: usize,
    },
    NeverAsked {
        node: String,
        row: (u32, u64),
    },
    FailedButThere {
        node: String,
        row: (u32, u64),
        failure: String,
    },
    Differs {
        node: String,
        other: String,
        row: (u32, u64),
    },
    TwoNodesInOneTimeline {
        timeline: u32,
        nodes: (Arc<str>, Arc<str>),
    },
    OldTimelineGoesOn {
        old: (Arc<str>, u32),
        new: (Arc<str>, u32),
        asked_after: Duration,
    },
    /// `asked_at`: since the load began; `None` in the end.
    StaleRead {
        node: String,
        value: u64,
        must_be_at_least: u64,
        because: &'static str,
        asked_at: Option<Duration>,
    },
    ReadOfTheFuture {
        node: String,
        value: u64,
        at_most: u64,
    },
}

impl Violation {
    fn kind(&self) -> &'static str {
        match self {
            Violation::Lost { .. } => "acknowledged rows lost",
            Violation::Duplicated { .. } => "rows that are there more than once",
            Violation::NeverAsked { .. } => "rows that nobody wrote",
            Violation::FailedButThere { .. } => "rows that failed and are there",
            Violation::Differs { .. } => "rows on which nodes differ",
            Violation::TwoNodesInOneTimeline { .. } => "timelines in which two nodes acknowledged",
            Violation::OldTimelineGoesOn { .. } => "writes to an old primary after the new one's first",
            Violation::StaleRead { .. } => "stale reads",
            Violation::ReadOfTheFuture { .. } => "reads of values that nobody wrote",
        }
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Violation::Lost { node, row, acknowledged_by, timeline, at } => {
                let timeline = timeline.map_or_else(|| "?".to_owned(), |timeline| timeline.to_string());
                let at = at.as_secs_f64();
                write!(
                    f,
                    "{row:?} is not on {node}; {acknowledged_by} acknowledged it at {at:.3} s in timeline {timeline}"
                )
            }
            Violation::Duplicated { node, row, times } => write!(f, "{row:?} is on {node} {times} times"),
            Violation::NeverAsked { node, row } => write!(f, "{row:?} is on {node}"),
            Violation::FailedButThere { node, row, failure } => write!(f, "{row:?} is on {node}; {failure}"),
            Violation::Differs { node, other, row } => write!(f, "{row:?} is on {node} and not on {other}"),
            Violation::TwoNodesInOneTimeline { timeline, nodes: (one, other) } => {
                write!(f, "timeline {timeline}: {one} and {other}")
            }
            Violation::OldTimelineGoesOn { old, new, asked_after } => write!(
                f,
                "{} (timeline {}) took a write {:.1} ms after {} (timeline {}) had acknowledged",
                old.0,
                old.1,
                asked_after.as_secs_f64() * 1e3,
                new.0,
                new.1
            ),
            Violation::StaleRead { node, value, must_be_at_least, because, asked_at } => {
                write!(f, "{node} showed {value} when {must_be_at_least} {because}")?;
                asked_at.map_or(Ok(()), |at| write!(f, ", asked at {:.3} s", at.as_secs_f64()))
            }
            Violation::ReadOfTheFuture { node, value, at_most } => {
                write!(f, "{node} showed {value} when {at_most} was the last asked for")
            }
        }
    }
}

/// What the checks found.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub violations: Vec<Violation>,
    pub acknowledged: usize,
    pub failed: usize,
    pub unknown: usize,
    /// Unknown inserts whose row is there.
    pub unknown_and_there: usize,
    pub primary_reads: usize,
    /// Of these, stale ones of a host that was just waking.
    pub waking_reads: usize,
}

impl Verdict {
    pub fn of(history: &History, holdings: &[Holdings]) -> Verdict {
        assert!(!holdings.is_empty(), "without a look at a node there is nothing to judge");
        let mut violations = Vec::new();
        let inserts: HashMap<(u32, u64), &Insert> =
            history.inserts.iter().map(|insert| ((insert.writer, insert.number), insert)).collect();
        assert_eq!(inserts.len(), history.inserts.len(), "a writer used a number twice");
        for node in holdings {
            check_rows(history, &inserts, node, &mut violations);
        }
        for other in &holdings[1..] {
            check_same(&holdings[0], other, &mut violations);
        }
        check_timelines(history, &mut violations);
        let waking_reads = check_register(history, holdings, &mut violations);
        let is_there = |insert: &&Insert| {
            let row = (insert.writer, insert.number);
            holdings.iter().any(|node| node.rows.binary_search(&row).is_ok())
        };
        let unknown = || history.inserts.iter().filter(|i| matches!(i.outcome, Outcome::Unknown(_)));
        Verdict {
            violations,
            acknowledged: history.acknowledged().count(),
            failed: history.inserts.iter().filter(|i| matches!(i.outcome, Outcome::Failed(_))).count(),
            unknown: unknown().count(),
            unknown_and_there: unknown().filter(is_there).count(),
            primary_reads: history.reads.len(),
            waking_reads,
        }
    }

    /// Fails the test if any promise was broken, or if nothing was promised.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.acknowledged > 0, "no write was acknowledged: nothing was tested\n{self}");
        assert!(self.violations.is_empty(), "{self}");
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} inserts acknowledged, {} failed, {} unknown ({} of them there), {} reads of a primary: ",
            self.acknowledged, self.failed, self.unknown, self.unknown_and_there, self.primary_reads
        )?;
        if self.waking_reads > 0 {
            write!(f, "{} stale ones of a host that was waking; ", self.waking_reads)?;
        }
        if self.violations.is_empty() {
            return f.write_str("every promise kept");
        }
        let mut kinds: BTreeMap<&str, Vec<&Violation>> = BTreeMap::new();
        for violation in &self.violations {
            kinds.entry(violation.kind()).or_default().push(violation);
        }
        for (kind, found) in kinds {
            write!(f, "\n{} {kind}", found.len())?;
            for example in found.iter().take(EXAMPLES) {
                write!(f, "\n    {example}")?;
            }
            if found.len() > EXAMPLES {
                write!(f, "\n    …")?;
            }
        }
        Ok(())
    }
}

fn check_rows(
    history: &History,
    inserts: &HashMap<(u32, u64), &Insert>,
    node: &Holdings,
    violations: &mut Vec<Violation>,
) {
    assert!(node.rows.is_sorted(), "the rows of {} are to be sorted", node.node);
    for same in node.rows.chunk_by(|one, other| one == other) {
        let (row, name) = (same[0], node.node.clone());
        if same.len() > 1 {
            violations.push(Violation::Duplicated { node: name.clone(), row, times: same.len() });
        }
        match inserts.get(&row).map(|insert| &insert.outcome) {
            None => violations.push(Violation::NeverAsked { node: name, row }),
            Some(Outcome::Failed(cause)) => {
                violations.push(Violation::FailedButThere { node: name, row, failure: cause.to_string() });
            }
            Some(Outcome::Acknowledged | Outcome::Unknown(_)) => {}
        }
    }
    for insert in history.acknowledged() {
        let row = (insert.writer, insert.number);
        if node.rows.binary_search(&row).is_err() {
            violations.push(Violation::Lost {
                node: node.node.clone(),
                row,
                acknowledged_by: Arc::clone(&insert.node),
                timeline: insert.timeline,
                at: insert.ended_at.saturating_duration_since(history.started_at),
            });
        }
    }
}

fn check_same(one: &Holdings, other: &Holdings, violations: &mut Vec<Violation>) {
    for (here, there) in [(one, other), (other, one)] {
        let missing = here.rows.iter().filter(|row| there.rows.binary_search(row).is_err());
        violations.extend(missing.map(|row| Violation::Differs {
            node: here.node.clone(),
            other: there.node.clone(),
            row: *row,
        }));
    }
}

fn check_timelines(history: &History, violations: &mut Vec<Violation>) {
    let mut first: BTreeMap<u32, &Insert> = BTreeMap::new();
    let mut nodes: BTreeMap<u32, Vec<&Arc<str>>> = BTreeMap::new();
    for insert in history.acknowledged() {
        let Some(timeline) = insert.timeline else { continue };
        let known = first.entry(timeline).or_insert(insert);
        if insert.ended_at < known.ended_at {
            *known = insert;
        }
        let known = nodes.entry(timeline).or_default();
        if !known.contains(&&insert.node) {
            known.push(&insert.node);
        }
    }
    for (timeline, nodes) in nodes {
        violations.extend(nodes.iter().skip(1).map(|other| Violation::TwoNodesInOneTimeline {
            timeline,
            nodes: (Arc::clone(nodes[0]), Arc::clone(other)),
        }));
    }
    for insert in history.acknowledged() {
        let Some(timeline) = insert.timeline else { continue };
        let newer = first.range(timeline + 1..).map(|(_, newer)| newer).min_by_key(|newer| newer.ended_at);
        if let Some(newer) = newer.filter(|newer| newer.ended_at < insert.asked_at) {
            violations.push(Violation::OldTimelineGoesOn {
                old: (Arc::clone(&insert.node), timeline),
                new: (Arc::clone(&newer.node), newer.timeline.unwrap_or_default()),
                asked_after: insert.asked_at - newer.ended_at,
            });
        }
    }
}

/// The greatest value among those at or before a moment.
struct Running(Vec<(Instant, u64)>);

impl Running {
    fn new(mut values: Vec<(Instant, u64)>) -> Running {
        values.sort_unstable();
        let mut greatest = 0;
        for (_, value) in &mut values {
            greatest = greatest.max(*value);
            *value = greatest;
        }
        Running(values)
    }

    fn strictly_before(&self, moment: Instant) -> u64 {
        self.up_to(self.0.partition_point(|(at, _)| *at < moment))
    }

    fn at_or_before(&self, moment: Instant) -> u64 {
        self.up_to(self.0.partition_point(|(at, _)| *at <= moment))
    }

    fn up_to(&self, count: usize) -> u64 {
        count.checked_sub(1).map_or(0, |last| self.0[last].1)
    }
}

/// A register with one writer is atomic just if each read shows at least what was acknowledged before it
/// began, at most what was asked for before it ended, and no less than any read that had ended before. Returns how many
/// stale reads were those of a host that was waking.
fn check_register(history: &History, holdings: &[Holdings], violations: &mut Vec<Violation>) -> usize {
    let acknowledged = history.sets.iter().filter(|set| set.outcome == Outcome::Acknowledged);
    let acknowledged = Running::new(acknowledged.map(|set| (set.ended_at, set.value)).collect());
    let asked = Running::new(history.sets.iter().map(|set| (set.asked_at, set.value)).collect());
    let read = Running::new(history.reads.iter().map(|read| (read.ended_at, read.value)).collect());
    let bounds = [(&acknowledged, "was acknowledged before"), (&read, "was read before")];
    let mut waking = 0;
    for this in &history.reads {
        let must_be = |bound: &Running| bound.strictly_before(this.asked_at);
        let is_stale = bounds.iter().any(|(bound, _)| this.value < must_be(bound));
        let was_waking = is_stale && history.stood_still.iter().any(|host| host.answered(this));
        waking += usize::from(was_waking);
        for (bound, because) in bounds {
            let must_be_at_least = must_be(bound);
            if this.value < must_be_at_least && !was_waking {
                let node = this.node.to_string();
                let asked_at = Some(this.asked_at.saturating_duration_since(history.started_at));
                let value = this.value;
                violations.push(Violation::StaleRead { node, value, must_be_at_least, because, asked_at });
            }
        }
        let at_most = asked.at_or_before(this.ended_at);
        if this.value > at_most {
            let node = this.node.to_string();
            violations.push(Violation::ReadOfTheFuture { node, value: this.value, at_most });
        }
    }
    let at_the_end = acknowledged.up_to(acknowledged.0.len());
    for node in holdings {
        if let Some(value) = node.register.filter(|value| *value < at_the_end) {
            violations.push(Violation::StaleRead {
                node: node.node.clone(),
                value,
                must_be_at_least: at_the_end,
                because: "was acknowledged, in the end",
                asked_at: None,
            });
        }
    }
    waking
}

/// A way to ask one node something in SQL, whatever its role, and whoever else may not.
pub type Asker<'a> = Box<dyn FnMut(&str) -> Result<Rows, String> + 'a>;

/// Reads what every node holds, standbys after they have replayed all that the primary had written.
#[track_caller]
pub fn holdings(mut nodes: Vec<(String, Asker<'_>)>) -> Vec<Holdings> {
    let mut end = None;
    for (node, ask) in &mut nodes {
        if value(node, ask, "SELECT pg_is_in_recovery()") == "f" {
            assert!(end.is_none(), "{node} is a primary, and not the only one");
            end = Some(value(node, ask, "SELECT pg_current_wal_flush_lsn()"));
        }
    }
    let end = end.expect("one of the nodes is the primary");
    nodes.into_iter().map(|(node, mut ask)| one_holding(node, &mut ask, &end)).collect()
}

/// The one value of a statement that has one. A node that does not answer yet is asked again.
#[track_caller]
fn value(node: &str, ask: &mut Asker<'_>, statement: &str) -> String {
    let what = format!("{node} to answer {statement}");
    let mut rows = wait_until(&what, CATCH_UP_DEADLINE, || ask(statement));
    rows.pop()
        .and_then(|mut row| row.pop().flatten())
        .unwrap_or_else(|| panic!("{node} has no value for {statement}"))
}

#[track_caller]
fn one_holding(node: String, ask: &mut Asker<'_>, end: &str) -> Holdings {
    // A server that was promoted still has the position at which its recovery ended.
    let behind = format!(
        "SELECT CASE WHEN pg_is_in_recovery() \
         THEN pg_wal_lsn_diff('{end}', pg_last_wal_replay_lsn()) ELSE 0 END"
    );
    wait_until(&format!("{node} to replay up to {end}"), CATCH_UP_DEADLINE, || {
        match value(&node, ask, &behind).parse::<i64>() {
            Ok(bytes) if bytes <= 0 => Ok(()),
            other => Err(format!("{other:?} bytes behind")),
        }
    });
    let mut rows = Vec::new();
    let statement = "SELECT writer, string_agg(number::text, ' ') FROM writes GROUP BY writer";
    for row in wait_until(&format!("{node} to show its rows"), CATCH_UP_DEADLINE, || ask(statement)) {
        let [Some(writer), Some(numbers)] = &row[..] else {
            panic!("two columns without nulls, not {row:?}")
        };
        let writer: u32 = writer.parse().expect("writers are numbered from 0");
        rows.extend(numbers.split(' ').map(|number| (writer, number.parse().expect("numbers are positive"))));
    }
    rows.sort_unstable();
    let register = value(&node, ask, "SELECT max(value) FROM register").parse().ok();
    Holdings { node, rows, register }
}

#[cfg(test)]
mod tests;
