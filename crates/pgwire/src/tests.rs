//! Every entrance for hostile bytes, fuzzed: deterministic, a little with every run of the tests, much on
//! request.
//!
//! `PGHERD_FUZZ_EXECUTIONS` says how often each target is tried, 10^5 times if it does not;
//! `PGHERD_FUZZ_SEED` starts elsewhere. For each target there is a bug planted on purpose that the quick
//! budget must find: a fuzzer that finds nothing ever shows nothing. Leaves out what is compared, which is in
//! `targets`.

use std::time::{Duration, Instant};

use crate::flow::Answer;
use crate::frame::{Phase, Piece, Scanner, Side};
use crate::message::{ClientMessage, ServerMessage};
use crate::startup::options;

mod fuzzer;
mod targets;

use fuzzer::{Outcome, Target};

const QUICK_EXECUTIONS: u64 = 100_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

fn fuzz(name: &str, target: Target, seeds: &[&[u8]]) -> Outcome {
    let seed = number("PGHERD_FUZZ_SEED").unwrap_or(1);
    let planted = fuzzer::run(target, seeds, true, QUICK_EXECUTIONS, seed);
    let found = planted.finding.unwrap_or_else(|| panic!("{name}: the planted bug was not found"));
    let executions = number("PGHERD_FUZZ_EXECUTIONS").unwrap_or(QUICK_EXECUTIONS);
    let outcome = fuzzer::run(target, seeds, false, executions, seed);
    if let Some(finding) = &outcome.finding {
        panic!("{name}, seed {seed}, execution {}: {}", finding.execution, finding.text);
    }
    let per_second = outcome.executions as f64 / outcome.elapsed.as_secs_f64();
    eprintln!(
        "{name}: {} executions, {per_second:.0} per second, {} kept, {} features, types {}; planted bug \
         found at execution {}: {}",
        outcome.executions, outcome.kept, outcome.features, outcome.types, found.execution, found.text,
    );
    outcome
}

fn reaches(outcome: &Outcome, types: &str) {
    for kind in types.chars() {
        assert!(outcome.types.contains(kind), "type {kind} was never reached, only {}", outcome.types);
    }
}

#[test]
fn fuzz_startup() {
    let outcome = fuzz("startup", targets::startup, targets::STARTUP_SEEDS);
    // The letters that the target gives to its verdicts.
    reaches(&outcome, "SGCTDLBPWR");
}

#[test]
fn fuzz_framing_of_clients() {
    let outcome = fuzz("framing of clients", targets::client_frames, targets::CLIENT_SEEDS);
    reaches(&outcome, "BCDEFHPQSXcdfp");
}

#[test]
fn fuzz_framing_of_servers() {
    let outcome = fuzz("framing of servers", targets::server_frames, targets::SERVER_SEEDS);
    reaches(&outcome, "123ACDEGHIKNRSTVWZcdnstv");
}

#[test]
fn fuzz_flow() {
    let outcome = fuzz("flow", targets::flow, targets::FLOW_SEEDS);
    reaches(&outcome, "QPBspECSHFdcfX123tTnDIGWVZeN!");
}

#[test]
fn the_same_seed_finds_the_same() {
    let run = || fuzzer::run(targets::flow, targets::FLOW_SEEDS, true, QUICK_EXECUTIONS, 7).finding.unwrap();
    let (one, other) = (run(), run());
    assert_eq!((one.execution, one.text), (other.execution, other.text));
}

/// CVE-2026-107349, CVE-2026-107348: input that costs more than it weighs. Sixteen megabytes of what makes
/// each reader work most take milliseconds if time is linear, and hours if it is not.
#[test]
fn no_input_costs_more_than_linear_time() {
    const BYTES: usize = 16 << 20;
    let began = Instant::now();
    let fields: Vec<u8> = b"M\0".iter().copied().cycle().take(BYTES).chain([0]).collect();
    let Ok(ServerMessage::ErrorResponse(error)) = ServerMessage::parse(b'E', &fields) else {
        panic!("unreadable")
    };
    assert_eq!((error.iter().count(), error.sqlstate()), (BYTES / 2, None));
    assert_eq!(Answer::of(b'E', &fields), Ok(Answer::Error { fatal: false }));
    let empty = [&b"\0\x03\0\0\x7f\xff\xff\xff"[..], &vec![0; BYTES]].concat();
    assert!(ServerMessage::parse(b'v', &empty).is_err());
    assert!(ServerMessage::parse(b'R', &[&b"\0\0\0\x0a"[..], &vec![b'x'; BYTES]].concat()).is_err());
    assert!(ClientMessage::parse(b'B', &vec![0; BYTES]).is_err());
    let spaces: Vec<u8> = b"\\ -- =".iter().copied().cycle().take(BYTES).collect();
    assert!(options::switches(&spaces).count() > 0);
    let mut scanner = Scanner::new(Side::Server, Phase::Session);
    let answers: Vec<u8> = b"1\0\0\0\x04".iter().copied().cycle().take(5 * (BYTES / 5)).collect();
    let (mut input, mut messages) = (answers.as_slice(), 0);
    while let Some(Piece::Header(_)) = scanner.next(&mut input).unwrap() {
        messages += 1;
    }
    assert_eq!(messages, BYTES / 5);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}
