//! Each target, as often as every push can afford, and the bug that was planted in it.

#![allow(
    clippy::print_stderr,
    reason = "what was reached and found is worth reading when a test is looked at"
)]

use fuzz::engine::{self, Lineage};
use fuzz::random::Random;
use fuzz::reached::Reached;
use fuzz::targets::{self, Target};

const EXECUTIONS: u64 = 100_000;

fn target(name: &str) -> &'static Target {
    targets::named(name).expect("a target")
}

fn finds_nothing(name: &str) {
    let target = target(name);
    let outcome = engine::run(target, false, EXECUTIONS, 1, |_| {});
    if let Some(finding) = outcome.finding {
        panic!("{name}: {finding}");
    }
    assert_eq!(outcome.executions, EXECUTIONS);
    let missing = outcome.reached.missing(target.messages);
    assert!(missing.is_empty(), "{name} has never reached {}", missing.join(", "));
    let messages: Vec<_> = outcome.reached.messages().map(|(message, _)| message).collect();
    let (cpu, lineage) = outcome.slowest.expect("one of them is the slowest");
    eprintln!("{name}: {} kept, slowest {cpu:?} ({lineage}), reached {}", outcome.kept, messages.join(", "));
}

fn finds_the_planted_bug(name: &str) {
    let target = target(name);
    let outcome = engine::run(target, true, EXECUTIONS, 1, |_| {});
    let finding = outcome.finding.unwrap_or_else(|| panic!("{name} has not found: {}", target.planted));
    eprintln!("{name} found \"{}\": {finding}", target.planted);
    // What is printed leads there again, in the build with the bug and in no other one.
    let input = finding.lineage.input(target);
    let again = |input, planted| engine::tried(target, input, planted, &mut Reached::nothing());
    assert_eq!(again(&input, true), Err(finding.what));
    assert_eq!(again(&finding.least.0, true), Err(finding.least.1));
    assert_eq!(again(&input, false), Ok(()));
    assert!(finding.least.0.to_bytes().len() <= input.to_bytes().len());
}

#[test]
fn startup() {
    finds_nothing("startup");
}

#[test]
fn authentication() {
    finds_nothing("authentication");
}

#[test]
fn framing() {
    finds_nothing("framing");
}

#[test]
fn hostile_server() {
    finds_nothing("hostile-server");
}

#[test]
fn every_planted_bug_is_found() {
    for target in targets::ALL {
        finds_the_planted_bug(target.name);
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for target in targets::ALL {
        let run = || {
            let outcome = engine::run(target, false, 500, 7, |_| {});
            (outcome.kept, outcome.reached.features(), outcome.reached.messages().collect::<Vec<_>>())
        };
        assert_eq!(run(), run(), "{}", target.name);
        let input = (target.make)(&mut Random::new(7));
        assert_eq!(Lineage(vec![7]).input(target), input);
        assert_eq!(Lineage::parse("7:8:9"), Some(Lineage(vec![7, 8, 9])));
    }
}
