//! A herd under faults drawn from a seed, for as long as asked, and the account at the end: nothing that was
//! acknowledged may be lost, and nobody has to do anything.
//!
//! When it ends badly, the same seed gives the same faults in the same order. Times differ from run to run,
//! so what happens between them may as well.

#![expect(clippy::print_stdout, reason = "the report is what this program is for")]

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use clap::Parser;
use pgherd_testkit::chaos::{Schedule, settle, strike};
use pgherd_testkit::{Herd, History, alone};

/// After the last fault, and between two faults where the schedule says so: no person is there to help.
const WHOLE_DEADLINE: Duration = Duration::from_secs(180);
const BUCKET: Duration = Duration::from_millis(100);

#[derive(Parser)]
#[command(about = "Faults drawn from a seed against a herd of three; checks at the end that nothing is lost")]
struct Arguments {
    /// Where the faults come from; drawn and printed if not given
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Print the schedule and do nothing
    #[arg(long, value_name = "STEPS")]
    print: Option<usize>,
}

fn main() {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(random_seed);
    println!("seed {seed}");
    let nodes = ["a", "b", "c"];
    let mut schedule = Schedule::new(seed, &nodes);
    if let Some(steps) = arguments.print {
        schedule.take(steps).for_each(|step| println!("{step}"));
        return;
    }
    let _alone = alone();
    let herd = Herd::of(&nodes).start();
    let begun = Instant::now();
    let end = begun + Duration::from_secs(60 * arguments.minutes);
    let at = || format!("{:>7.1} s", begun.elapsed().as_secs_f64());
    let workload = herd.start_workload();
    let mut still = Vec::new();
    // Whatever fails, what clients saw is kept for whoever has to find out why.
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let (mut steps, mut revived) = (0, 0);
        while Instant::now() < end {
            let step = schedule.next().expect("a schedule has no end");
            println!("{} {step}", at());
            match strike(&herd, &step, &mut still) {
                Ok(()) => steps += 1,
                Err(why) => println!("{} not done: {why}", at()),
            }
            if step.then_wait {
                revived += settle(&herd, WHOLE_DEADLINE);
                workload.wait_for_writes(WHOLE_DEADLINE);
            }
        }
        revived += settle(&herd, WHOLE_DEADLINE);
        workload.wait_for_writes(WHOLE_DEADLINE);
        println!("{revived} agents had ended by themselves and were restarted");
        steps
    }));
    let mut history = workload.stop();
    history.stood_still = still;
    match ended {
        Ok(steps) => {
            let verdict = herd.verdict(&history);
            if !verdict.violations.is_empty() {
                keep(seed, &history, &herd);
            }
            report(&history, steps, begun.elapsed());
            println!("{verdict}");
            verdict.assert_clean();
        }
        Err(panic) => {
            keep(seed, &history, &herd);
            println!("{} ended by a failure; seed {seed}", at());
            std::panic::resume_unwind(panic);
        }
    }
}

/// From the clock: any seed is as good as another, as long as it is printed.
fn random_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos() as u64 % 1_000_000_000)
}

/// Logs and history outlive the hosts.
fn keep(seed: u64, history: &History, herd: &Herd) {
    let directory = std::env::temp_dir().join(format!("pgherd-chaos-{seed}"));
    let kept = std::fs::create_dir_all(&directory)
        .and_then(|()| history.dump(&directory.join("history")))
        .and_then(|()| herd.copy_logs(&directory));
    match kept {
        Ok(()) => println!("history and logs are in {}", directory.display()),
        Err(error) => println!("cannot keep history and logs in {}: {error}", directory.display()),
    }
}

fn report(history: &History, steps: u32, elapsed: Duration) {
    let buckets = history.availability(BUCKET);
    let without = buckets.iter().filter(|bucket| bucket.acknowledged == 0).count();
    let timelines: std::collections::BTreeSet<_> =
        history.acknowledged().map(|insert| insert.timeline).collect();
    let gap = history.write_gap(history.started_at).unwrap_or_default();
    println!(
        "{steps} faults in {:.1} minutes; {} timelines; {:.1} % of {} ms buckets with acknowledged writes; \
         longest gap {:.1} s",
        elapsed.as_secs_f64() / 60.0,
        timelines.len(),
        100.0 - 100.0 * without as f64 / buckets.len().max(1) as f64,
        BUCKET.as_millis(),
        gap.as_secs_f64(),
    );
    println!("inserts that were not acknowledged, by cause:");
    for (cause, count) in history.causes() {
        println!("{count:>10} {cause}");
    }
}
