//! What the clients of a proxy notice of a switchover, and of a killed primary.
//!
//! First the proxy is saturated for a while by as many clients as will work later; they then work at half of that
//! rate. Around each event stands the pause, the longest time between two acknowledged writes of whomever, and each
//! statement that failed with its SQLSTATE. After each herd the table is held against all that clients were told.

#![expect(clippy::print_stdout, reason = "the report is what this program is for")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use pgherd_testkit::handover::{self, Account, Clients, Step, TABLE};
use pgherd_testkit::herd::Herd;
use pgherd_testkit::measure::Rounds;

const NODES: [&str; 3] = ["a", "b", "c"];
const WHOLE_DEADLINE: Duration = Duration::from_secs(180);
const BACK_DEADLINE: Duration = Duration::from_secs(120);
/// Work before an event and after the herd is whole again, so that neither measures the other's aftermath.
const STEADY: Duration = Duration::from_secs(3);
/// A herd leads its fourth crash within ten minutes in place, so another one takes its place before.
const KILLS_EACH: u32 = 3;

#[derive(Parser)]
#[command(about = "Measures what clients of a proxy notice while the primary changes")]
struct Arguments {
    /// Of each event
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    #[arg(long, default_value_t = 200)]
    clients: i32,
    /// What happens to the primary; both by default
    #[arg(long = "event", value_enum)]
    events: Vec<Event>,
    /// Transactions a second; half of what saturates the proxy by default
    #[arg(long)]
    rate: Option<f64>,
    /// For how long it is saturated to find that out, in seconds
    #[arg(long, default_value_t = 10)]
    saturate_s: u64,
    /// Print every round
    #[arg(long)]
    verbose: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Event {
    /// A planned change of the primary
    Switchover,
    /// kill -9 of the primary's postmaster
    Kill,
}

#[derive(Default)]
struct Result {
    pauses: Rounds,
    failures: BTreeMap<(Step, String), usize>,
    ended: usize,
    account: Account,
}

fn main() {
    let arguments = Arguments::parse();
    let events = match arguments.events.as_slice() {
        [] => Event::value_variants().to_vec(),
        chosen => chosen.to_vec(),
    };
    let _alone = pgherd_testkit::alone();
    let mut rate = arguments.rate;
    for event in events {
        let mut result = Result::default();
        let mut left = arguments.rounds;
        while left > 0 {
            let rounds = if event == Event::Kill { left.min(KILLS_EACH) } else { left };
            with_one_herd(event, rounds, &arguments, &mut rate, &mut result);
            left -= rounds;
        }
        report(event, &result, rate.unwrap_or_default());
    }
}

fn with_one_herd(
    event: Event,
    rounds: u32,
    arguments: &Arguments,
    rate: &mut Option<f64>,
    result: &mut Result,
) {
    let herd = Herd::of(&NODES).start();
    let (_proxy, address) = herd.start_proxy("front");
    let mut session = herd.session(&herd.primary());
    handover::create_table(&mut session);
    let start = |rate, first| {
        Clients::start(herd.net().client(), address, herd.login(), arguments.clients, rate, first)
    };
    let rate = *rate.get_or_insert_with(|| {
        let clients = start(None, -1_000_000_000);
        // The first second is that of their logins.
        let span = Duration::from_secs(arguments.saturate_s);
        pause(Duration::from_secs(1));
        let before = clients.count();
        pause(span);
        let tps = (clients.count() - before) as f64 / span.as_secs_f64();
        let failures = handover::failures(&clients.stop());
        assert!(failures.is_empty(), "at saturation: {failures:?}");
        println!(
            "saturated at {tps:.0} transactions a second, {} clients; half of it from here on",
            arguments.clients
        );
        tps / 2.0
    });
    session.run(&format!("TRUNCATE {TABLE}"));
    let clients = start(Some(rate), 0);
    for round in 1..=rounds {
        pause(STEADY);
        let (primary, seen) = (herd.primary(), clients.count());
        let began_at = Instant::now();
        match event {
            Event::Switchover => herd.switch_over(None),
            Event::Kill => drop(herd.kill_postmaster(&primary)),
        }
        herd.wait_until_whole(WHOLE_DEADLINE);
        clients.wait_for_writes(BACK_DEADLINE);
        pause(STEADY);
        // Transactions end in another order than they began in.
        let ended =
            clients.ended().split_off(seen.saturating_sub(usize::try_from(arguments.clients).unwrap_or(0)));
        let gap = handover::pause(&ended, began_at).unwrap_or_default();
        result.pauses.add(gap);
        if arguments.verbose {
            println!(
                "round {round} {event:?} of {primary}: {} ms, failed: {:?}",
                gap.as_millis(),
                handover::failures(&ended)
            );
        }
    }
    let ended = clients.stop();
    herd.wait_until_whole(WHOLE_DEADLINE);
    let account = handover::account(&ended, &handover::rows(&mut herd.session(&herd.primary())));
    for (what, count) in handover::failures(&ended) {
        *result.failures.entry(what).or_default() += count;
    }
    result.ended += ended.len();
    let all = &mut result.account;
    all.acknowledged += account.acknowledged;
    all.lost += account.lost;
    all.doubled += account.doubled;
    all.denied += account.denied;
    all.unknown += account.unknown;
}

fn pause(span: Duration) {
    // sleep: a load is given time; nothing is waited for.
    std::thread::sleep(span);
}

fn report(event: Event, result: &Result, rate: f64) {
    let ms = |duration: Option<Duration>| duration.map_or(0, |duration| duration.as_millis());
    let pauses = &result.pauses;
    println!(
        "{event:?}: {} rounds at {rate:.0} transactions a second; pause in ms: best {}, median {}, worst {}, spread {}",
        pauses.count(),
        ms(pauses.best()),
        ms(pauses.median()),
        ms(pauses.worst()),
        ms(pauses.spread())
    );
    let failed: usize = result.failures.values().sum();
    println!("  {failed} of {} transactions failed", result.ended);
    for ((step, sqlstate), count) in &result.failures {
        println!("    {count:>6}  {step:?}: {sqlstate}");
    }
    let Account { acknowledged, lost, doubled, denied, unknown } = result.account;
    println!(
        "  of the rows {acknowledged} acknowledged and there, {lost} lost, {doubled} twice, {denied} there and denied, {unknown} unknown"
    );
    assert_eq!((lost, doubled, denied), (0, 0, 0), "a promise is broken");
}
