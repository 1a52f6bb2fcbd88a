//! How fast a base backup is read, so that it does not make the server slow for its clients.
//!
//! What clients wait for is measured each [`TICK`]: an answer, a flush of WAL, a page from the disk, on a standby replay. What is
//! usual is the lowest that was seen: before the copy, and in its first moments, which go slowly for that. From then on it is read as fast
//! as it can be, until something takes clearly longer than usual. Then the pace is halved, again and again as long as
//! that does not help, and rises by equal steps when it does: up to just below where it was too much, and after a rest beyond. Each time
//! that this fails the rest is twice as long, so that a constant load is left alone ever more.
//!
//! | what happens | what comes of it |
//! |---|---|
//! | one or two measurements in five are slow | nothing: the one in the middle counts |
//! | something is not measured, or cannot be any more | nothing: what is not known is no reason to hold back |
//! | a measurement does not come back | how long it has been under way counts, so that it is slow |
//! | it stays slow at the least pace for [`LEAST_FOR`] | it is not the backup's doing: this is what is usual now |
//! | nobody works with the server for [`NOBODY_FOR`] | there is nobody to hold back for |
//!
//! Leaves out: measuring, and waiting. Hazard: a backup that never ends is none; so the pace has a [`Floor`], whatever is measured.

use core::fmt;
use core::num::{NonZeroU32, NonZeroU64};
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

const MIB: NonZeroU64 = NonZeroU64::new(1024 * 1024).expect("it is not 0");
/// Between two measurements of a kind, and two judgements.
pub const TICK: Duration = Duration::from_millis(500);
/// A backup that nothing else is said for takes no longer than this by being held back,
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// and is read as fast as this, in bytes a second: some disks can do less than the first would ask of them.
const LEAST: u64 = 8 * MIB.get();
/// Measurements of a kind that are looked at together: two and a half seconds of them,
const RECENT: usize = 5;
/// of which there have to be so many.
const ENOUGH: usize = 3;
/// At the beginning it is read at the least pace for so long, where somebody works with the server.
const LEARNING: Duration = Duration::from_secs(2);
/// Clients who come and go are still there.
pub const NOBODY_FOR: Duration = Duration::from_secs(10);
/// From a cut to the first rise, and from the pace that was good to what may be too much.
const FIRST_REST: Duration = Duration::from_secs(4);
/// An attempt takes a second or two in which clients feel it: one in five minutes at last.
const LONGEST_REST: Duration = Duration::from_secs(300);
/// Between two rises: longer than it takes to see what came of one.
const RISE_EVERY: Duration = Duration::from_secs(2);
/// A rise is so much of the pace that was too much, and stops so much below it.
const STEP: u64 = 8;
/// At the least pace a backup does next to nothing.
pub const LEAST_FOR: Duration = Duration::from_secs(60);

/// What clients wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Of a small question to the server.
    Answer,
    /// Of a page to the disk of WAL, as a commit does.
    Flush,
    /// Of a page from the disk, where PostgreSQL says how long that takes.
    Read,
    /// On a standby, from when WAL is there until it is replayed.
    Replay,
}

impl Measure {
    /// What is not worth a slower backup, however quick it is usually.
    fn tolerance(self) -> Duration {
        match self {
            // A processor that is busy lets somebody else have a turn after some milliseconds.
            Measure::Answer | Measure::Flush | Measure::Read => Duration::from_millis(10),
            Measure::Replay => Duration::from_secs(2),
        }
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Measure::Answer => "an answer",
            Measure::Flush => "a flush of WAL",
            Measure::Read => "a page from the disk",
            Measure::Replay => "replay",
        })
    }
}

/// The pace below which a backup is not held back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Floor {
    /// As much as it takes to read everything in a day, and 8 MiB a second at least.
    #[default]
    Day,
    /// In bytes a second.
    Rate(NonZeroU64),
}

impl Floor {
    pub fn of_mib(mib: NonZeroU32) -> Floor {
        Floor::Rate(NonZeroU64::from(mib).saturating_mul(MIB))
    }

    fn pace(self, total_bytes: u64) -> u64 {
        match self {
            Floor::Day => LEAST.max(total_bytes / LONGEST.as_secs()),
            Floor::Rate(rate) => rate.get(),
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Whether somebody works with the server, who could be made to wait. Unknown: he may.
    pub clients: Option<bool>,
    /// Of what came back, or has been under way for longer than a tick.
    pub times: BTreeMap<Measure, Duration>,
    /// So far; none while the copy has not begun.
    pub read_bytes: Option<u64>,
    /// 0 while it is not known.
    pub total_bytes: u64,
}

/// What takes longer than usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow {
    pub what: Measure,
    pub takes: Duration,
    pub usually: Duration,
}

/// The pace of one backup.
#[derive(Clone, Debug)]
pub struct Pacing {
    floor: Floor,
    courses: BTreeMap<Measure, Course>,
    /// When so many bytes had been read.
    read: VecDeque<(Duration, u64)>,
    /// When somebody worked with the server last.
    clients_at: Option<Duration>,
    learning: Learning,
    held: Option<Held>,
    rest: Duration,
    judged: Option<Duration>,
    held_back: Duration,
    slow: Option<Slow>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Learning {
    /// There was nobody to learn it for.
    NotYet,
    Since(Duration),
    Done,
}

/// The measurements of a kind.
#[derive(Clone, Debug, Default)]
struct Course {
    recent: VecDeque<Duration>,
    usual: Option<Duration>,
}

impl Course {
    fn push(&mut self, time: Duration) {
        self.recent.truncate(RECENT - 1);
        self.recent.push_front(time);
    }

    /// The one in the middle, or what is below it.
    fn typical(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.recent.iter().copied().collect();
        sorted.sort_unstable();
        (sorted.len() >= ENOUGH).then(|| sorted[(sorted.len() - 1) / 2])
    }

    fn learn(&mut self) {
        self.usual = [self.usual, self.typical()].into_iter().flatten().min();
    }
}

/// That a backup is held back.
#[derive(Clone, Copy, Debug)]
struct Held {
    pace: u64,
    /// What was too much.
    ceiling: u64,
    step: u64,
    /// When the pace was changed last, and whether it rose then.
    since: Duration,
    has_risen: bool,
    is_beyond: bool,
}

impl Pacing {
    pub fn new(floor: Floor) -> Pacing {
        Pacing {
            floor,
            courses: BTreeMap::new(),
            read: VecDeque::new(),
            clients_at: None,
            learning: Learning::NotYet,
            held: None,
            rest: FIRST_REST,
            judged: None,
            held_back: Duration::ZERO,
            slow: None,
        }
    }

    /// How many bytes a second may be read from now on; `None`: as many as can be. `now` is by a clock that only goes forward.
    pub fn judge(&mut self, now: Duration, seen: &Seen) -> Option<u64> {
        let before = self.judged.replace(now).unwrap_or(now);
        if self.held.is_some() {
            self.held_back += now.saturating_sub(before);
        }
        if seen.clients != Some(false) {
            self.clients_at = Some(now);
        }
        for (measure, time) in &seen.times {
            self.courses.entry(*measure).or_default().push(*time);
        }
        self.slow = None;
        let Some(read) = seen.read_bytes else {
            self.learn();
            return None;
        };
        let rate = self.rate(now, read);
        if self.clients_at.is_none_or(|at| now.saturating_sub(at) >= NOBODY_FOR) {
            (self.held, self.rest) = (None, FIRST_REST);
            return None;
        }
        let least = self.floor.pace(seen.total_bytes);
        match self.learning {
            Learning::NotYet => {
                // What was measured while it was read at full speed is not what is usual.
                self.forget_recent();
                self.learning = Learning::Since(now);
                return Some(least);
            }
            Learning::Since(since) if now.saturating_sub(since) < LEARNING => return Some(least),
            Learning::Since(_) | Learning::Done => self.learning = Learning::Done,
        }
        self.learn();
        self.slow = self.slowest();
        match self.slow {
            Some(_) => self.cut(now, rate, least),
            None => self.rise(now, rate),
        }
        self.held.map(|held| held.pace)
    }

    /// Whether something was slow, and the pace follows it.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// For how long it was held back so far.
    pub fn held_back(&self) -> Duration {
        self.held_back
    }

    /// What was found too slow by the last judgement.
    pub fn slow(&self) -> Option<Slow> {
        self.slow
    }

    fn cut(&mut self, now: Duration, rate: u64, least: u64) {
        let from = match &mut self.held {
            Some(held) if held.pace <= least => {
                if now.saturating_sub(held.since) >= LEAST_FOR {
                    held.since = now;
                    for course in self.courses.values_mut() {
                        course.usual = course.typical().or(course.usual);
                    }
                }
                return;
            }
            Some(held) => held.pace.min(rate.max(least)),
            None => rate.max(least),
        };
        if self.held.is_some_and(|held| held.is_beyond) {
            self.rest = LONGEST_REST.min(self.rest * 2);
        }
        let step = (from / STEP).max(1);
        let pace = (from / 2).max(least);
        self.held = Some(Held { pace, ceiling: from, step, since: now, has_risen: false, is_beyond: false });
        // Only what is measured from now on says whether it helped.
        self.forget_recent();
    }

    fn rise(&mut self, now: Duration, rate: u64) {
        let Some(held) = &mut self.held else { return };
        let good = held.ceiling - held.ceiling / STEP;
        let is_beyond = held.pace >= good;
        let rest = match (is_beyond, held.is_beyond, held.has_risen) {
            (true, false, _) => self.rest,
            (false, _, false) => FIRST_REST,
            _ => RISE_EVERY,
        };
        if now.saturating_sub(held.since) < rest {
            return;
        }
        (held.since, held.has_risen, held.is_beyond) = (now, true, is_beyond);
        if !is_beyond {
            held.pace = good.min(held.pace.saturating_add(held.step));
            return;
        }
        if rate < held.pace / 2 {
            // Something else is what it waits for.
            (self.held, self.rest) = (None, FIRST_REST);
            return;
        }
        held.pace = held.pace.saturating_add(held.step);
        held.step = held.step.saturating_mul(2);
    }

    fn slowest(&self) -> Option<Slow> {
        self.courses.iter().find_map(|(what, course)| {
            let (takes, usually) = (course.typical()?, course.usual?);
            (takes > usually * 2 + what.tolerance()).then_some(Slow { what: *what, takes, usually })
        })
    }

    fn learn(&mut self) {
        self.courses.values_mut().for_each(Course::learn);
    }

    fn forget_recent(&mut self) {
        self.courses.values_mut().for_each(|course| course.recent.clear());
    }

    /// Bytes a second, lately.
    fn rate(&mut self, now: Duration, read: u64) -> u64 {
        self.read.truncate(RECENT - 1);
        self.read.push_front((now, read));
        let Some((then, before)) = self.read.back() else { return 0 };
        let ms = now.saturating_sub(*then).as_millis().max(1);
        let rate = u128::from(read.saturating_sub(*before)) * 1000 / ms;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests;
