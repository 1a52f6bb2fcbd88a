//! How long nobody can write: failover and switchover, beside the floor measured in the same run.
//!
//! Each round has a writer per node, 20 ms apart, that waits for each reply; a commit counts only with its
//! reply and without a warning. The gap is the longest time between two acknowledgements around the fault.
//! Rounds alternate between the subjects, and the primary rotates. After each round every node is checked
//! for lost, doubled and foreign rows; a round that breaks a promise ends the run.

#![expect(clippy::print_stdout, reason = "the report is what this program is for")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use pgherd_testkit::herd::Herd;
use pgherd_testkit::measure::Rounds;
use pgherd_testkit::plain::Durability;
use pgherd_testkit::workload::{Writers, create_tables};
use pgherd_testkit::{History, Host, Net, Plain, Plan, Verdict, Workload};

/// More than any round may take to accept writes again.
const WRITES_BACK_DEADLINE: Duration = Duration::from_secs(120);
/// Detection, promotion, rewind or clone of a small database, on a machine that may be busy.
const WHOLE_DEADLINE: Duration = Duration::from_secs(180);
/// Writes before the fault, so that connections stand and caches are warm.
const WRITES_BEFORE: usize = 25;
const NODES: [&str; 3] = ["a", "b", "c"];

#[derive(Parser)]
#[command(about = "Measures how long writes are interrupted, beside the hand-scripted floor")]
struct Arguments {
    /// Rounds for each subject and fault
    #[arg(long, default_value_t = 30)]
    rounds: u32,
    /// What to measure; everything by default
    #[arg(long = "fault", value_enum)]
    faults: Vec<Fault>,
    /// Whose primary is lost; all by default
    #[arg(long = "subject", value_enum)]
    subjects: Vec<SubjectName>,
    /// Print every round
    #[arg(long)]
    verbose: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Fault {
    /// kill -9 of the primary's postmaster
    Kill,
    /// A planned change of the primary
    Switchover,
    /// The primary's host is cut off from everybody, clients included, without a reset
    Cut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum SubjectName {
    /// Plain PostgreSQL and a script that knows what happened
    Floor,
    /// pgherd with its defaults
    Herd,
}

/// Something whose primary can be lost.
trait Subject {
    fn name(&self) -> SubjectName;
    /// Whether the fault means anything here.
    fn knows(&self, fault: Fault) -> bool;
    fn plan(&self) -> Plan;
    fn client(&self) -> Host;
    /// What has to be there before the writers begin.
    fn prepare(&mut self, fault: Fault);
    fn verdict(&mut self, history: &History) -> Verdict;
    /// Injects the fault; when it began. May return before writes are back.
    fn strike(&mut self, fault: Fault) -> Instant;
    /// Brings the cluster back to full redundancy.
    fn mend(&mut self);
}

/// The floor: a script that knows what happened and asks nobody.
struct Floor {
    net: Net,
    cluster: Plain,
    old: String,
}

impl Floor {
    fn start() -> Floor {
        let net = Net::new(&NODES);
        let cluster = Plain::start(&net, &NODES, Durability::AnyOne);
        Floor { net, cluster, old: String::new() }
    }
}

impl Subject for Floor {
    fn name(&self) -> SubjectName {
        SubjectName::Floor
    }

    /// Nothing is detected here, so a lost host would be the same as a killed postmaster.
    fn knows(&self, fault: Fault) -> bool {
        fault != Fault::Cut
    }

    fn plan(&self) -> Plan {
        Plan::new(self.cluster.endpoints(), self.cluster.login())
    }

    fn client(&self) -> Host {
        self.net.client().clone()
    }

    fn prepare(&mut self, _fault: Fault) {
        let primary = self.cluster.primary().to_owned();
        create_tables(self.cluster.admin(&primary));
    }

    fn verdict(&mut self, history: &History) -> Verdict {
        Verdict::of(history, &self.cluster.holdings())
    }

    fn strike(&mut self, fault: Fault) -> Instant {
        self.old = self.cluster.primary().to_owned();
        match fault {
            Fault::Kill => {
                let began_at = self.cluster.kill_primary();
                self.cluster.fail_over();
                began_at
            }
            Fault::Switchover => self.cluster.switch_over(),
            Fault::Cut => unreachable!("the floor does not know it"),
        }
    }

    fn mend(&mut self) {
        self.cluster.rejoin(&self.old);
        self.cluster.wait_until_whole();
    }
}

/// A herd leads its fourth crash within ten minutes back on the same node, lest a statement that kills its server
/// walks through all of them. That is another story than a failover, so another herd takes its place before.
const CRASHES_EACH: u32 = 3;

struct Herds {
    herd: Option<Herd>,
    crashes: u32,
}

impl Herds {
    fn start() -> Herds {
        Herds { herd: Some(Herd::of(&NODES).start()), crashes: 0 }
    }

    fn herd(&self) -> &Herd {
        self.herd.as_ref().expect("one is there but while it is exchanged")
    }
}

impl Subject for Herds {
    fn name(&self) -> SubjectName {
        SubjectName::Herd
    }

    fn knows(&self, _fault: Fault) -> bool {
        true
    }

    fn prepare(&mut self, fault: Fault) {
        if fault == Fault::Kill {
            if self.crashes == CRASHES_EACH {
                // The one before goes first: they share the machine.
                self.herd = None;
                *self = Herds::start();
            }
            self.crashes += 1;
        }
        self.herd().create_tables();
    }

    fn plan(&self) -> Plan {
        self.herd().plan()
    }

    fn client(&self) -> Host {
        self.herd().net().client().clone()
    }

    fn verdict(&mut self, history: &History) -> Verdict {
        self.herd().verdict(history)
    }

    fn strike(&mut self, fault: Fault) -> Instant {
        let herd = self.herd();
        let primary = herd.primary();
        match fault {
            Fault::Kill => herd.kill_postmaster(&primary),
            Fault::Switchover => {
                let began_at = Instant::now();
                herd.switch_over(None);
                began_at
            }
            Fault::Cut => {
                let began_at = Instant::now();
                herd.net().isolate(&primary);
                began_at
            }
        }
    }

    fn mend(&mut self) {
        self.herd().net().heal();
        self.herd().wait_until_whole(WHOLE_DEADLINE);
    }
}

/// One round; the gap, and the history for whoever wants more.
fn round(subject: &mut dyn Subject, fault: Fault) -> (Duration, History) {
    subject.prepare(fault);
    let plan = Plan {
        writers: Writers::OnePerNode,
        register: false,
        // Longer than any gap: a writer that gave up and came back would lengthen it.
        statement_deadline: WRITES_BACK_DEADLINE,
        ..subject.plan()
    };
    let workload = Workload::start(&subject.client(), plan);
    pgherd_testkit::wait_until("the first writes", WRITES_BACK_DEADLINE, || match workload.acknowledged() {
        enough if enough >= WRITES_BEFORE => Ok(()),
        few => Err(format!("{few} acknowledged")),
    });
    let began_at = subject.strike(fault);
    workload.wait_for_writes(WRITES_BACK_DEADLINE);
    subject.mend();
    let history = workload.stop();
    subject.verdict(&history).assert_clean();
    let gap = history.write_gap(began_at).expect("writes came back, the round waited for them");
    (gap, history)
}

fn main() {
    let arguments = Arguments::parse();
    let faults = match arguments.faults.as_slice() {
        [] => Fault::value_variants().to_vec(),
        chosen => chosen.to_vec(),
    };
    let _alone = pgherd_testkit::alone();
    let wanted = |name| arguments.subjects.is_empty() || arguments.subjects.contains(&name);
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    if wanted(SubjectName::Floor) {
        subjects.push(Box::new(Floor::start()));
    }
    if wanted(SubjectName::Herd) {
        subjects.push(Box::new(Herds::start()));
    }
    let mut results: BTreeMap<(Fault, SubjectName), Rounds> = BTreeMap::new();
    for number in 1..=arguments.rounds {
        for fault in &faults {
            for subject in subjects.iter_mut().filter(|subject| subject.knows(*fault)) {
                let (gap, history) = round(subject.as_mut(), *fault);
                results.entry((*fault, subject.name())).or_default().add(gap);
                if arguments.verbose {
                    let (name, writes) = (subject.name(), history.acknowledged().count());
                    println!("round {number} {fault:?} {name:?}: {} ms, {writes} writes", gap.as_millis());
                }
            }
        }
    }
    report(&results);
}

fn report(results: &BTreeMap<(Fault, SubjectName), Rounds>) {
    println!("write gap in ms; ratio: median against the floor's median of this run");
    println!(
        "{:<12} {:<8} {:>6} {:>8} {:>8} {:>8} {:>8} {:>7}",
        "fault", "subject", "rounds", "best", "median", "worst", "spread", "ratio"
    );
    for ((fault, subject), rounds) in results {
        let ms = |duration: Option<Duration>| duration.map_or(0, |duration| duration.as_millis());
        let floor = results.get(&(*fault, SubjectName::Floor)).and_then(Rounds::median);
        let ratio = match (rounds.median(), floor) {
            (Some(median), Some(floor)) => format!("{:.2}", median.as_secs_f64() / floor.as_secs_f64()),
            _ => "-".to_owned(),
        };
        println!(
            "{:<12} {:<8} {:>6} {:>8} {:>8} {:>8} {:>8} {ratio:>7}",
            format!("{fault:?}").to_lowercase(),
            format!("{subject:?}").to_lowercase(),
            rounds.count(),
            ms(rounds.best()),
            ms(rounds.median()),
            ms(rounds.worst()),
            ms(rounds.spread()),
        );
    }
}
