//! `sim`: runs schedules by their seeds, tells what they covered, and replays one.
//!
//! ```text
//! sim --schedules 50000 [--seed S]     seeds S, S+1, …; fails on a violation or on something never covered
//! sim --replay SEED [--verbose]        the same run again, with its story
//! sim --variant NAME                   a broken build, until it is caught
//! sim --variants                       every broken build; fails if one is not caught
//! ```
//!
//! Threads are only here: each takes every other seed, and a seed never sees another.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what it finds out is its output")]

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use sim::breakage::Breakage;
use sim::coverage::Coverage;
use sim::schedule::{self, Outcome};
use sim::world::SECOND;

const THREADS: u64 = 2;
/// A broken build that is not caught within this many seeds makes the checkers worthless.
const VARIANT_SEEDS: u64 = 2_000;
/// Below this many schedules something rare may not have occurred, and nothing is said about it.
const COVERAGE_SCHEDULES: u64 = 20_000;

/// A schedule with less of any of these says little.
const EVENTS_MIN: u64 = 200;
const FAULTS_MIN: u64 = 3;
const COMMITS_MIN: u64 = 50;

const USAGE: &str =
    "usage: sim [--schedules N] [--seed S] [--replay SEED] [--variant NAME] [--variants] [--verbose]
       [--threads N] [--keep-going]";

#[derive(Debug)]
struct Arguments {
    schedules: u64,
    seed: u64,
    replay: Option<u64>,
    variant: Option<Breakage>,
    variants: bool,
    verbose: bool,
    keep_going: bool,
    threads: u64,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(mistake) => {
            eprintln!("{mistake}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let well = if let Some(seed) = arguments.replay {
        replay(seed, &arguments)
    } else if arguments.variants {
        Breakage::ALL
            .iter()
            .map(|breakage| variant(*breakage, &arguments))
            .fold(true, std::ops::BitAnd::bitand)
    } else if let Some(breakage) = arguments.variant {
        variant(breakage, &arguments)
    } else {
        schedules(&arguments)
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(mut texts: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        schedules: 1000,
        seed: 1,
        replay: None,
        variant: None,
        variants: false,
        verbose: false,
        keep_going: false,
        threads: THREADS,
    };
    while let Some(text) = texts.next() {
        let mut value = || texts.next().ok_or_else(|| format!("{text} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("\"{text}\" is not a number"));
        match text.as_str() {
            "--schedules" => arguments.schedules = number(value()?)?,
            "--seed" => arguments.seed = number(value()?)?,
            "--replay" => arguments.replay = Some(number(value()?)?),
            "--threads" => arguments.threads = number(value()?)?.max(1),
            "--variant" => {
                let name = value()?;
                arguments.variant =
                    Some(Breakage::named(&name).ok_or_else(|| format!("there is no variant \"{name}\""))?);
            }
            "--variants" => arguments.variants = true,
            "--verbose" => arguments.verbose = true,
            "--keep-going" => arguments.keep_going = true,
            _ => return Err(format!("\"{text}\" is not an option")),
        }
    }
    Ok(arguments)
}

/// What many runs have in common.
#[derive(Default)]
struct Sum {
    runs: u64,
    events: u64,
    commits: u64,
    virtual_time: u64,
    heal_time: u64,
    accepted_loss: u64,
    nothing_left: u64,
    coverage: Coverage,
    /// The least of each that any schedule had, and its seed.
    least_events: Option<(u64, u64)>,
    least_faults: Option<(u64, u64)>,
    least_commits: Option<(u64, u64)>,
    thin: u64,
    violations: Vec<Outcome>,
}

impl Sum {
    fn add(&mut self, outcome: Outcome) {
        self.runs += 1;
        self.events += outcome.events;
        self.commits += outcome.commits;
        self.virtual_time += outcome.virtual_time;
        self.heal_time += outcome.heal_time;
        self.accepted_loss += outcome.accepted_loss;
        self.coverage.add(&outcome.coverage);
        self.nothing_left += u64::from(outcome.nothing_left);
        if outcome.violation.is_none() && !outcome.nothing_left {
            let (events, faults, commits) = (outcome.events, outcome.coverage.faults, outcome.commits);
            self.thin += u64::from(events < EVENTS_MIN || faults < FAULTS_MIN || commits < COMMITS_MIN);
            self.least_events = least(self.least_events, Some((events, outcome.seed)));
            self.least_faults = least(self.least_faults, Some((faults, outcome.seed)));
            self.least_commits = least(self.least_commits, Some((commits, outcome.seed)));
        }
        if outcome.violation.is_some() {
            self.violations.push(Outcome { coverage: Coverage::default(), trace: None, ..outcome });
        }
    }

    fn merge(&mut self, other: Sum) {
        self.runs += other.runs;
        self.events += other.events;
        self.commits += other.commits;
        self.virtual_time += other.virtual_time;
        self.heal_time += other.heal_time;
        self.accepted_loss += other.accepted_loss;
        self.nothing_left += other.nothing_left;
        self.coverage.add(&other.coverage);
        self.thin += other.thin;
        self.least_events = least(self.least_events, other.least_events);
        self.least_faults = least(self.least_faults, other.least_faults);
        self.least_commits = least(self.least_commits, other.least_commits);
        self.violations.extend(other.violations);
    }
}

fn least(one: Option<(u64, u64)>, other: Option<(u64, u64)>) -> Option<(u64, u64)> {
    one.into_iter().chain(other).min()
}

/// Runs seeds on all threads until there are no more, or one is caught and `first_only`.
fn run_all(from: u64, count: u64, breakage: Option<Breakage>, first_only: bool, threads: u64) -> Sum {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut sum = Sum::default();
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    let outcome = schedule::run(from + index, breakage, false);
                    if outcome.violation.is_some() && first_only {
                        stop.store(true, Ordering::Relaxed);
                    }
                    sum.add(outcome);
                }
                total.lock().expect("no thread panics while it holds the sum").merge(sum);
            });
        }
    });
    total.into_inner().expect("no thread panics while it holds the sum")
}

fn schedules(arguments: &Arguments) -> bool {
    let begun = Instant::now();
    let mut sum =
        run_all(arguments.seed, arguments.schedules, None, !arguments.keep_going, arguments.threads);
    let seconds = begun.elapsed().as_secs_f64();
    let runs = sum.runs.max(1);
    let each = |total: u64| total as f64 / runs as f64;
    println!(
        "{runs} schedules in {seconds:.1} s: {:.0} a second on {} threads",
        runs as f64 / seconds,
        arguments.threads
    );
    println!(
        "each: {:.0} events, {:.1} faults, {:.0} commits, {:.1} elections, {:.1} failovers, {:.1} s of life, healed in {:.1} s",
        each(sum.events),
        each(sum.coverage.faults),
        each(sum.commits),
        each(sum.coverage.elections),
        each(sum.coverage.failovers),
        each(sum.virtual_time) / SECOND as f64,
        each(sum.heal_time) / SECOND as f64,
    );
    println!(
        "all: {} fenced, {} forced, {} records lost where that was declared, {} left without any copy",
        sum.coverage.fenced, sum.coverage.forced, sum.accepted_loss, sum.nothing_left
    );
    let said = |least: Option<(u64, u64)>| {
        least.map_or_else(String::new, |(least, seed)| format!("{least} (seed {seed})"))
    };
    println!(
        "least: {} events, {} faults, {} commits; {} schedules thinner than asked for",
        said(sum.least_events),
        said(sum.least_faults),
        said(sum.least_commits),
        sum.thin
    );
    let (reasons, actions) = (&sum.coverage.reasons, &sum.coverage.actions);
    let rarest = reasons.iter().chain(actions).min_by_key(|(_, count)| **count);
    let rarest = rarest.map_or_else(String::new, |(code, count)| format!("; rarest: {code}, {count} times"));
    println!("coverage: {} reasons, {} actions and proposals{rarest}", reasons.len(), actions.len());
    if arguments.verbose {
        for (code, count) in reasons.iter().chain(actions) {
            println!("  {count:>9} {code}");
        }
    }
    sum.violations.sort_by_key(|outcome| outcome.seed);
    for outcome in sum.violations.iter().take(40) {
        tell(outcome);
    }
    if sum.violations.len() > 1 {
        println!("{} schedules broke an invariant", sum.violations.len());
    }
    let missing = sum.coverage.missing();
    let complete = missing.is_empty() || arguments.schedules < COVERAGE_SCHEDULES;
    if !missing.is_empty() {
        println!("never occurred: {}", missing.join(", "));
    }
    sum.violations.is_empty() && complete && sum.thin == 0
}

fn tell(outcome: &Outcome) {
    if let Some(violation) = &outcome.violation {
        println!(
            "seed {} at {:.3} s: {}: {}",
            outcome.seed,
            violation.at as f64 / SECOND as f64,
            violation.invariant,
            violation.detail
        );
    }
}

fn variant(breakage: Breakage, arguments: &Arguments) -> bool {
    let sum =
        run_all(arguments.seed, VARIANT_SEEDS, Some(breakage), !arguments.keep_going, arguments.threads);
    match sum.violations.iter().min_by_key(|outcome| outcome.seed) {
        Some(outcome) => {
            print!("{} caught by {} of {} schedules: ", breakage.name(), sum.violations.len(), sum.runs);
            tell(outcome);
            true
        }
        None => {
            println!("{} NOT caught in {} schedules", breakage.name(), sum.runs);
            false
        }
    }
}

fn replay(seed: u64, arguments: &Arguments) -> bool {
    let outcome = schedule::run(seed, arguments.variant, true);
    if arguments.verbose {
        println!("{}", outcome.trace.as_deref().unwrap_or_default());
    }
    tell(&outcome);
    outcome.violation.is_none()
}
