//! Tries inputs: makes one, or changes one that reached something, and keeps what reaches more.
//!
//! Every input follows from its [`Lineage`]: the seed that made the first of its line, and one seed for each
//! change. So any execution can be had again without those before it. Leaves out what is right ([`crate::targets`]).
//!
//! An execution may cost [`MOST_CPU`] of its thread's time. The clock on the wall says which ones are looked at
//! again, since it is never less; what counts is the least of three more executions by the thread's own clock.
//!
//! Hazard: features that do not tell deep states apart leave it at the surface.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::input::Input;
use crate::random::Random;
use crate::reached::Reached;
use crate::targets::Target;

/// What one input may cost.
pub const MOST_CPU: Duration = Duration::from_millis(10);
const LOOKED_AGAIN: usize = 3;
const MAX_KEPT: usize = 6_000;
const MAX_LINEAGE: usize = 40;
/// One in so many is made anew instead of changed.
const FRESH_ONE_IN: usize = 8;
const MAX_SHRINKS: usize = 20_000;
const PROGRESS_EVERY: u64 = 1 << 12;

/// Where an input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage(pub Vec<u64>);

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seeds: Vec<String> = self.0.iter().map(u64::to_string).collect();
        f.write_str(&seeds.join(":"))
    }
}

impl Lineage {
    pub fn parse(text: &str) -> Option<Lineage> {
        text.split(':').map(|seed| seed.parse().ok()).collect::<Option<_>>().map(Lineage)
    }

    pub fn input(&self, target: &Target) -> Input {
        let Some((first, changes)) = self.0.split_first() else { return Input::default() };
        let made = (target.make)(&mut Random::new(*first));
        changes.iter().fold(made, |input, seed| input.changed(&mut Random::new(*seed), target.make))
    }
}

/// Something that is wrong.
#[derive(Clone, Debug)]
pub struct Finding {
    pub execution: u64,
    pub lineage: Lineage,
    pub what: String,
    /// The least input in which something is wrong, and what.
    pub least: (Input, String),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (input, what) = &self.least;
        writeln!(f, "execution {}: {}", self.execution, self.what)?;
        writeln!(f, "  the same again: --replay {}", self.lineage)?;
        write!(f, "  at its least: {what}\n  b\"{}\"", input.to_bytes().escape_ascii())
    }
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub executions: u64,
    pub elapsed: Duration,
    pub kept: usize,
    pub reached: Reached,
    pub slowest: Option<(Duration, Lineage)>,
    pub finding: Option<Finding>,
}

/// How it goes, now and then.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    pub executions: u64,
    pub kept: usize,
    pub features: usize,
    pub slowest: Duration,
}

pub fn run(
    target: &Target,
    planted: bool,
    executions: u64,
    seed: u64,
    mut tell: impl FnMut(Progress),
) -> Outcome {
    let began = Instant::now();
    let mut random = Random::new(seed);
    let mut reached = Reached::default();
    let mut kept: Vec<(Lineage, Input)> = Vec::new();
    let mut slowest: Option<(Duration, Lineage)> = None;
    let (mut finding, mut execution) = (None, 0);
    while execution < executions && finding.is_none() {
        execution += 1;
        let fresh = kept.is_empty() || random.once_in(FRESH_ONE_IN);
        let parent = (!fresh).then(|| random.below(kept.len()));
        // Later ones are rarer and deeper.
        let parent = parent.map(|at| if random.once_in(2) { at } else { at.max(random.below(kept.len())) });
        let own_seed = random.number();
        let (lineage, input) = match parent {
            Some(at) => {
                let (Lineage(line), input) = &kept[at];
                let lineage = Lineage([line.as_slice(), &[own_seed]].concat());
                (lineage, input.changed(&mut Random::new(own_seed), target.make))
            }
            None => (Lineage(vec![own_seed]), (target.make)(&mut Random::new(own_seed))),
        };
        let at = Instant::now();
        let mut verdict = tried(target, &input, planted, &mut reached);
        let wall = at.elapsed();
        if verdict.is_ok() && slowest.as_ref().is_none_or(|(known, _)| wall > *known) {
            let cpu = cpu_time(target, &input, planted);
            if slowest.as_ref().is_none_or(|(known, _)| cpu > *known) {
                slowest = Some((cpu, lineage.clone()));
            }
            if cpu > MOST_CPU {
                verdict = Err(format!("it costs {:.1} ms", cpu.as_secs_f64() * 1_000.0));
            }
        }
        if let Err(what) = verdict {
            let least = least(target, &input, planted, &what);
            finding = Some(Finding { execution, lineage, what, least });
            break;
        }
        if reached.take_more() && kept.len() < MAX_KEPT && lineage.0.len() < MAX_LINEAGE {
            kept.push((lineage, input));
        }
        if execution.is_multiple_of(PROGRESS_EVERY) {
            let slowest = slowest.as_ref().map_or(Duration::ZERO, |(cpu, _)| *cpu);
            tell(Progress { executions: execution, kept: kept.len(), features: reached.features(), slowest });
        }
    }
    Outcome { executions: execution, elapsed: began.elapsed(), kept: kept.len(), reached, slowest, finding }
}

/// One execution. A panic is a finding like any other one.
pub fn tried(target: &Target, input: &Input, planted: bool, reached: &mut Reached) -> Result<(), String> {
    quiet_panics();
    IS_TRYING.set(true);
    let verdict = catch_unwind(AssertUnwindSafe(|| (target.run)(input, planted, reached)));
    IS_TRYING.set(false);
    verdict.unwrap_or_else(|_| Err(PANIC.take().unwrap_or_else(|| "a panic".to_owned())))
}

/// The least of several.
fn cpu_time(target: &Target, input: &Input, planted: bool) -> Duration {
    let now = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let mut reached = Reached::nothing();
    let times = (0..LOOKED_AGAIN).map(|_| {
        let before = now();
        // What it says was judged before; here only the time counts.
        drop(tried(target, input, planted, &mut reached));
        now().saturating_sub(before)
    });
    times.min().unwrap_or_default()
}

/// The smallest input found in which something is wrong still; if it was slow, one that is slow.
fn least(target: &Target, input: &Input, planted: bool, what: &str) -> (Input, String) {
    let is_slow = what.starts_with("it costs");
    let mut least = (input.clone(), what.to_owned());
    let mut tries = 0;
    'smaller: loop {
        for smaller in least.0.smaller() {
            tries += 1;
            if tries > MAX_SHRINKS {
                return least;
            }
            if is_slow {
                if cpu_time(target, &smaller, planted) > MOST_CPU {
                    least.0 = smaller;
                    continue 'smaller;
                }
            } else if let Err(what) = tried(target, &smaller, planted, &mut Reached::nothing()) {
                least = (smaller, what);
                continue 'smaller;
            }
        }
        return least;
    }
}

thread_local! {
    static IS_TRYING: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Panics of an execution are told with its input and not before.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if IS_TRYING.get() {
                PANIC.set(Some(panic.to_string().replace('\n', ": ")));
            } else {
                others(panic);
            }
        }));
    });
}
