//! `fuzz`: executes targets by a seed, tells what they reached and what was slowest, and replays an execution.
//!
//! ```text
//! fuzz [--executions N] [--target T] [--seed S]   all targets, two at a time; fails on a finding, on a message
//!                                                 that was never reached, and on an input that costs over 10 ms
//! fuzz --target T --replay SEED:SEED…             one execution again
//! fuzz --target T --input 'b"…"'                  an input as it was printed
//! fuzz --planted [--target T]                     the bugs that were planted; fails if one is not found
//! ```

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what it finds out is its output")]

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fuzz::engine::{self, Lineage, Outcome};
use fuzz::input::Input;
use fuzz::reached::Reached;
use fuzz::targets::{self, Target};

const THREADS: usize = 2;
const EXECUTIONS: u64 = 100_000;
/// Below this many executions something rare may not have been reached, and nothing is said about it.
const REACHED_EXECUTIONS: u64 = 100_000;
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

const USAGE: &str = "usage: fuzz [--executions N] [--target T] [--seed S] [--planted]
            [--replay SEEDS] [--input BYTES] [--threads N]";

struct Arguments {
    executions: u64,
    seed: u64,
    target: Option<&'static Target>,
    planted: bool,
    replay: Option<Lineage>,
    input: Option<Input>,
    threads: usize,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(mistake) => {
            eprintln!("{mistake}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let well = match (&arguments.replay, &arguments.input, arguments.target) {
        (Some(lineage), _, Some(target)) => again(target, &lineage.input(target), arguments.planted),
        (_, Some(input), Some(target)) => again(target, input, arguments.planted),
        (None, None, _) => all(&arguments),
        _ => {
            eprintln!("--replay and --input need a --target\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(mut texts: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        executions: EXECUTIONS,
        seed: 1,
        target: None,
        planted: false,
        replay: None,
        input: None,
        threads: THREADS,
    };
    while let Some(text) = texts.next() {
        let mut value = || texts.next().ok_or_else(|| format!("{text} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("\"{text}\" is not a number"));
        match text.as_str() {
            "--executions" => arguments.executions = number(value()?)?,
            "--seed" => arguments.seed = number(value()?)?,
            "--threads" => arguments.threads = number(value()?)?.clamp(1, 64) as usize,
            "--target" => {
                let name = value()?;
                let target = targets::named(&name);
                arguments.target = Some(target.ok_or_else(|| format!("there is no target \"{name}\""))?);
            }
            "--planted" => arguments.planted = true,
            "--replay" => {
                let seeds = value()?;
                let lineage = Lineage::parse(&seeds);
                arguments.replay = Some(lineage.ok_or_else(|| format!("\"{seeds}\" is no list of seeds"))?);
            }
            "--input" => {
                let text = value()?;
                let bytes = unescaped(&text).ok_or_else(|| format!("{text} is no byte string"))?;
                arguments.input = Some(Input::of_bytes(&bytes));
            }
            _ => return Err(format!("\"{text}\" is not an option")),
        }
    }
    Ok(arguments)
}

/// A byte string as it is printed, with or without its quotes.
fn unescaped(text: &str) -> Option<Vec<u8>> {
    let text = text.strip_prefix("b\"").and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let (mut bytes, mut letters) = (Vec::new(), text.bytes());
    while let Some(letter) = letters.next() {
        if letter != b'\\' {
            bytes.push(letter);
            continue;
        }
        bytes.push(match letters.next()? {
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'0' => 0,
            b'x' => {
                let digits = [letters.next()?, letters.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            quoted => quoted,
        });
    }
    Some(bytes)
}

fn again(target: &Target, input: &Input, planted: bool) -> bool {
    println!("b\"{}\"", input.to_bytes().escape_ascii());
    let verdict = engine::tried(target, input, planted, &mut Reached::nothing());
    match &verdict {
        Ok(()) => println!("{}: nothing is wrong", target.name),
        Err(what) => println!("{}: {what}", target.name),
    }
    verdict.is_ok()
}

fn all(arguments: &Arguments) -> bool {
    let chosen: Vec<&Target> = match arguments.target {
        Some(target) => vec![target],
        None => targets::ALL.iter().collect(),
    };
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads.min(chosen.len()) {
            scope.spawn(|| {
                while let Some(target) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = one(target, arguments);
                    if !told(target, arguments, &outcome) {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    failed.into_inner() == 0
}

fn one(target: &Target, arguments: &Arguments) -> Outcome {
    let began = Instant::now();
    let mut told_at = began;
    engine::run(target, arguments.planted, arguments.executions, arguments.seed, |progress| {
        if told_at.elapsed() >= PROGRESS_EVERY {
            told_at = Instant::now();
            eprintln!(
                "{}: {} of {}, {:.0} a second, {} kept, {} features, slowest {:.3} ms",
                target.name,
                progress.executions,
                arguments.executions,
                progress.executions as f64 / began.elapsed().as_secs_f64(),
                progress.kept,
                progress.features,
                progress.slowest.as_secs_f64() * 1_000.0,
            );
        }
    })
}

/// Whether it went well.
fn told(target: &Target, arguments: &Arguments, outcome: &Outcome) -> bool {
    let mut lines = vec![format!(
        "{}, seed {}: {} executions in {:.1} s, {:.0} a second, {} inputs kept, {} features",
        target.name,
        arguments.seed,
        outcome.executions,
        outcome.elapsed.as_secs_f64(),
        outcome.executions as f64 / outcome.elapsed.as_secs_f64(),
        outcome.kept,
        outcome.reached.features(),
    )];
    if let Some((cpu, lineage)) = &outcome.slowest {
        lines.push(format!("  slowest: {:.3} ms, --replay {lineage}", cpu.as_secs_f64() * 1_000.0));
    }
    let messages: Vec<String> =
        outcome.reached.messages().map(|(name, count)| format!("{name} {count}")).collect();
    lines.push(format!("  {} message types reached: {}", messages.len(), messages.join(", ")));
    let missing = outcome.reached.missing(target.messages);
    let counts = !arguments.planted && outcome.executions >= REACHED_EXECUTIONS;
    let complete = missing.is_empty() || !counts;
    if !missing.is_empty() && !arguments.planted {
        lines.push(format!("  never reached: {}", missing.join(", ")));
    }
    let well = match (&outcome.finding, arguments.planted) {
        (None, false) => complete,
        (Some(finding), planted) => {
            if planted {
                lines.push(format!("  found {}:", target.planted));
            }
            lines.push(format!("  {finding}"));
            planted
        }
        (None, true) => {
            lines.push(format!("  {} was NOT found", target.planted));
            false
        }
    };
    println!("{}", lines.join("\n"));
    well
}
