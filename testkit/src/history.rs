//! What clients did and what they were told, with times: the evidence that checkers judge.
//!
//! All times are readings of one clock, CLOCK_MONOTONIC of the machine on which all hosts are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::Cause;

/// What a client knows about something that it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has the server's word, without a warning.
    Acknowledged,
    /// It certainly did not happen.
    Failed(Cause),
    /// It may have happened, or may not.
    Unknown(Cause),
}

/// The row (`writer`, `number`), asked for once.
#[derive(Clone, Debug)]
pub struct Insert {
    pub writer: u32,
    pub number: u64,
    pub node: Arc<str>,
    /// Before the first byte was sent.
    pub asked_at: Instant,
    /// After the last byte of the answer, or when the client gave up.
    pub ended_at: Instant,
    pub outcome: Outcome,
    /// The timeline into which the acknowledging server wrote the row.
    pub timeline: Option<u32>,
}

/// The register set to `value`; its one writer writes 1, 2, 3 and so on.
#[derive(Clone, Debug)]
pub struct Set {
    pub value: u64,
    pub asked_at: Instant,
    pub ended_at: Instant,
    pub outcome: Outcome,
}

/// The register read from a server that said it is no standby.
#[derive(Clone, Debug)]
pub struct PrimaryRead {
    pub value: u64,
    pub node: Arc<str>,
    pub asked_at: Instant,
    pub ended_at: Instant,
}

#[derive(Clone, Debug)]
pub struct History {
    pub started_at: Instant,
    pub inserts: Vec<Insert>,
    pub sets: Vec<Set>,
    pub reads: Vec<PrimaryRead>,
    /// Hosts that were frozen as a whole.
    pub stood_still: Vec<StoodStill>,
}

/// A host of which nothing ran for a while, neither server nor agent nor fence.
#[derive(Clone, Debug)]
pub struct StoodStill {
    pub node: Arc<str>,
    /// Between these two moments it began to run again.
    pub waking_at: Instant,
    pub awake_at: Instant,
}

impl StoodStill {
    /// Was it asked before it ran again, and answered as it did? Then the answer was on its way before anything could
    /// look at a clock.
    pub(crate) fn answered(&self, read: &PrimaryRead) -> bool {
        read.node == self.node && read.asked_at < self.awake_at && read.ended_at >= self.waking_at
    }
}

/// One bucket of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    pub acknowledged: u32,
    pub failed: u32,
    pub unknown: u32,
}

impl History {
    pub fn new() -> History {
        History {
            started_at: Instant::now(),
            inserts: Vec::new(),
            sets: Vec::new(),
            reads: Vec::new(),
            stood_still: Vec::new(),
        }
    }

    pub fn acknowledged(&self) -> impl Iterator<Item = &Insert> {
        self.inserts.iter().filter(|insert| insert.outcome == Outcome::Acknowledged)
    }

    /// When each acknowledgement came, in order.
    fn acknowledgement_times(&self) -> Vec<Instant> {
        let mut times: Vec<Instant> = self.acknowledged().map(|insert| insert.ended_at).collect();
        times.sort_unstable();
        times
    }

    /// The longest time without an acknowledgement among those that ended after `fault`: from the last
    /// acknowledgement before it to the first one after it. `None` if writes did not come back.
    pub fn write_gap(&self, fault: Instant) -> Option<Duration> {
        let times = self.acknowledgement_times();
        let pairs = times.windows(2).filter(|pair| pair[1] >= fault);
        pairs.map(|pair| pair[1] - pair[0]).max()
    }

    /// Outcomes of inserts by the time at which they ended.
    pub fn availability(&self, bucket: Duration) -> Vec<Bucket> {
        let mut series = Vec::new();
        for insert in &self.inserts {
            let since_start = insert.ended_at.saturating_duration_since(self.started_at);
            let index = (since_start.as_nanos() / bucket.as_nanos()) as usize;
            if series.len() <= index {
                series.resize(index + 1, Bucket::default());
            }
            match insert.outcome {
                Outcome::Acknowledged => series[index].acknowledged += 1,
                Outcome::Failed(_) => series[index].failed += 1,
                Outcome::Unknown(_) => series[index].unknown += 1,
            }
        }
        series
    }

    /// How often each cause ended an insert without an acknowledgement.
    pub fn causes(&self) -> BTreeMap<Cause, usize> {
        let mut causes = BTreeMap::new();
        for insert in &self.inserts {
            if let Outcome::Failed(cause) | Outcome::Unknown(cause) = &insert.outcome {
                *causes.entry(cause.clone()).or_default() += 1;
            }
        }
        causes
    }

    /// One line an insert, for whoever has to find out what happened.
    pub fn dump(&self, path: &Path) -> std::io::Result<()> {
        let mut text = String::from("# ended ms, took ms, writer, number, node, timeline, outcome\n");
        for insert in &self.inserts {
            let at = insert.ended_at.saturating_duration_since(self.started_at).as_secs_f64() * 1e3;
            let took = (insert.ended_at - insert.asked_at).as_secs_f64() * 1e3;
            let timeline = insert.timeline.map_or_else(|| "-".to_owned(), |timeline| timeline.to_string());
            let outcome = match &insert.outcome {
                Outcome::Acknowledged => "acknowledged".to_owned(),
                Outcome::Failed(cause) => format!("failed: {cause}"),
                Outcome::Unknown(cause) => format!("unknown: {cause}"),
            };
            let Insert { writer, number, node, .. } = insert;
            writeln!(text, "{at:.3} {took:.3} {writer} {number} {node} {timeline} {outcome}")
                .expect("a string takes any text");
        }
        std::fs::write(path, text)
    }
}

impl Default for History {
    fn default() -> History {
        History::new()
    }
}
