//! Faults drawn from a seed, one after the other, as a schedule that can be printed, read and run again.
//!
//! A schedule depends on its seed and the names of the hosts alone, never on what happens while it runs: the
//! same seed gives the same faults. Which node is meant by "the primary" is found out when its turn comes.
//!
//! Every fault here is one from which a herd of three has to come back by itself, with everything that was
//! acknowledged: all disks survive. Faults may follow each other before the herd is whole again, because they
//! do so in machine rooms as well.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::herd::Herd;
use crate::history::StoodStill;
use crate::net::{CLIENT, Refusal, Slowness};
use crate::process;
use crate::random::Random;
use crate::wait::try_until;

/// Whom a fault meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Who holds the term when the turn comes; nobody, if the herd has no primary just then.
    Primary,
    /// Always this one.
    Host(String),
}

/// What happens, for as long as the step lasts.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    KillPostmaster(Target),
    /// One process of PostgreSQL by its title.
    KillProcess(Target, &'static str),
    KillAgent(Target),
    KillFence(Target),
    FreezeAgent(Target),
    FreezePostmaster(Target),
    FreezeHost(Target),
    Starve(Target, u64),
    Crash(Target),
    CrashEverything,
    Isolate(Target),
    /// Cut off from the other hosts, while clients still reach it.
    IsolateFromPeers(Target),
    IsolateOneWay(Target, Direction),
    CutReplication(Target),
    CutAgents(Target),
    Reset(Target),
    Flap(Target, u32),
    Lose(f64),
    Slow(Slowness),
    SwitchOver,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    In,
    Out,
}

/// A fault, how long it lasts, and what comes after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub fault: Fault,
    pub lasts: Duration,
    /// Whether the next one waits until the herd is whole; else it comes at once.
    pub then_wait: bool,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let after = if self.then_wait { "then until whole" } else { "then the next at once" };
        write!(f, "{:?} for {:.1} s, {after}", self.fault, self.lasts.as_secs_f64())
    }
}

/// The endless sequence of a seed.
#[derive(Clone, Debug)]
pub struct Schedule {
    random: Random,
    hosts: Vec<String>,
}

/// Shorter than what anybody notices, and longer than every time limit of the product.
const SHORTEST_MS: u64 = 200;
const LONGEST_MS: u64 = 25_000;
/// Out of a hundred faults, so many hit whoever is primary.
const PRIMARY_PERCENT: f64 = 0.6;
const WAIT_PERCENT: f64 = 0.75;

impl Schedule {
    pub fn new(seed: u64, hosts: &[&str]) -> Schedule {
        assert!(!hosts.is_empty(), "faults need hosts");
        Schedule { random: Random::new(seed), hosts: hosts.iter().map(|host| (*host).to_owned()).collect() }
    }

    fn target(&mut self) -> Target {
        // Both are drawn, so that the numbers after them do not depend on this choice.
        let (primary, host) = (self.random.chance(PRIMARY_PERCENT), self.random.pick(&self.hosts).clone());
        if primary { Target::Primary } else { Target::Host(host) }
    }

    fn lasts(&mut self) -> Duration {
        // Short ones are as likely as long ones: uniform in the exponent.
        let (low, high) = ((SHORTEST_MS as f64).ln(), (LONGEST_MS as f64).ln());
        Duration::from_millis((low + (high - low) * self.random.fraction()).exp() as u64)
    }
}

impl Iterator for Schedule {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        const TITLES: [&str; 6] =
            ["checkpointer", "background writer", "walwriter", "walreceiver", "walsender", "startup"];
        let target = self.target();
        let lasts = self.lasts();
        let then_wait = self.random.chance(WAIT_PERCENT);
        let title = *self.random.pick(&TITLES);
        let direction = *self.random.pick(&[Direction::In, Direction::Out]);
        let percent = self.random.between(2, 30);
        let loss = 0.02 + 0.2 * self.random.fraction();
        let (delay, jitter) = (self.random.between(5, 150), self.random.between(1, 50));
        let flaps = self.random.between(2, 6) as u32;
        let fault = match self.random.between(0, 24) {
            0..3 => Fault::KillPostmaster(target),
            3 => Fault::KillProcess(target, title),
            4..6 => Fault::KillAgent(target),
            6 => Fault::KillFence(target),
            7 => Fault::FreezeAgent(target),
            8 => Fault::FreezePostmaster(target),
            9..11 => Fault::FreezeHost(target),
            11 => Fault::Starve(target, percent),
            12..14 => Fault::Crash(target),
            14 => Fault::CrashEverything,
            15 => Fault::Isolate(target),
            16 => Fault::IsolateFromPeers(target),
            17 => Fault::IsolateOneWay(target, direction),
            18 => Fault::CutReplication(target),
            19 => Fault::CutAgents(target),
            20 => Fault::Reset(target),
            21 => Fault::Flap(target, flaps),
            22 => match self.random.chance(0.5) {
                true => Fault::Lose(loss),
                false => {
                    let slow = Slowness::delay(Duration::from_millis(delay));
                    Fault::Slow(slow.with_jitter(Duration::from_millis(jitter)).with_loss(loss / 10.0))
                }
            },
            _ => Fault::SwitchOver,
        };
        Some(Step { fault, lasts, then_wait })
    }
}

/// Does a step to a herd and takes the fault away again. What the init system of a host does, starting an
/// agent that ended, is done here. `Err` says why the step could not be done now, such as a process that the
/// last fault has left no time to come back; that is noted and no failure. Hosts that were frozen are added to `still`.
pub fn strike(herd: &Herd, step: &Step, still: &mut Vec<StoodStill>) -> Result<(), String> {
    let net = herd.net();
    let until = Instant::now() + step.lasts;
    // sleep: the fault lasts as long as the schedule says.
    let pass = || std::thread::sleep(until.saturating_duration_since(Instant::now()));
    let resolve = |target: &Target| match target {
        Target::Host(host) => Ok(host.clone()),
        Target::Primary => herd.status()?.cluster().primary.clone().ok_or("there is no primary".to_owned()),
    };
    let peers = |host: &str| -> Vec<String> {
        herd.agents().into_iter().filter(|other| *other != host).map(str::to_owned).collect()
    };
    match &step.fault {
        Fault::KillPostmaster(target) => {
            let host = resolve(target)?;
            let postmaster = process::postmaster_of(&herd.data_dir(&host));
            postmaster.filter(|it| it.signal(Signal::KILL)).ok_or(format!("no PostgreSQL on {host}"))?;
            pass();
        }
        Fault::KillProcess(target, title) => {
            let host = resolve(target)?;
            let family = process::of_data_dir(&herd.data_dir(&host));
            let found = family.into_iter().find(|it| it.command_line().join(" ").contains(title));
            found.filter(|it| it.signal(Signal::KILL)).ok_or(format!("no {title} on {host}"))?;
            pass();
        }
        Fault::KillAgent(target) => {
            let host = resolve(target)?;
            let agent = herd.find_agent(&host).ok_or(format!("no agent on {host}"))?;
            agent.signal(Signal::KILL);
            pass();
            herd.start_agent(&host);
        }
        Fault::KillFence(target) => {
            let host = resolve(target)?;
            let fence = herd.find_fence(&host).ok_or(format!("no fence on {host}"))?;
            fence.signal(Signal::KILL);
            pass();
        }
        Fault::FreezeAgent(target) => {
            let host = resolve(target)?;
            let agent = herd.find_agent(&host).ok_or(format!("no agent on {host}"))?;
            agent.signal(Signal::STOP);
            pass();
            agent.signal(Signal::CONT);
        }
        Fault::FreezePostmaster(target) => {
            let host = resolve(target)?;
            let postmaster = process::postmaster_of(&herd.data_dir(&host));
            let postmaster = postmaster.ok_or(format!("no PostgreSQL on {host}"))?;
            postmaster.signal(Signal::STOP);
            pass();
            postmaster.signal(Signal::CONT);
        }
        Fault::FreezeHost(target) => {
            let host = resolve(target)?;
            let frozen = herd.host(&host).freeze();
            pass();
            let waking_at = Instant::now();
            frozen.thaw();
            still.push(StoodStill { node: host.as_str().into(), waking_at, awake_at: Instant::now() });
        }
        Fault::Starve(target, percent) => {
            let starved = herd.host(&resolve(target)?).starve(*percent);
            pass();
            drop(starved);
        }
        Fault::Crash(target) => {
            let host = resolve(target)?;
            herd.crash(&host);
            pass();
            herd.power_on(&host);
        }
        Fault::CrashEverything => {
            for host in herd.agents() {
                herd.crash(host);
            }
            pass();
            for host in herd.agents() {
                herd.power_on(host);
            }
        }
        Fault::Isolate(target) => {
            let fault = net.isolate(&resolve(target)?);
            pass();
            net.lift(fault);
        }
        Fault::IsolateFromPeers(target) => {
            let host = resolve(target)?;
            let peers = peers(&host);
            let peers: Vec<&str> = peers.iter().map(String::as_str).collect();
            let fault = net.partition(&[&[host.as_str()], peers.as_slice()]);
            pass();
            net.lift(fault);
        }
        Fault::IsolateOneWay(target, direction) => {
            let host = resolve(target)?;
            let cuts: Vec<_> = peers(&host)
                .iter()
                .map(|peer| match direction {
                    Direction::In => net.cut_one_way(peer, &host),
                    Direction::Out => net.cut_one_way(&host, peer),
                })
                .collect();
            pass();
            cuts.into_iter().for_each(|cut| net.lift(cut));
        }
        Fault::CutReplication(target) | Fault::CutAgents(target) => {
            let host = resolve(target)?;
            let agents = matches!(step.fault, Fault::CutAgents(_));
            let port = if agents { crate::herd::API_PORT } else { crate::herd::POSTGRES_PORT };
            let cuts: Vec<_> = peers(&host).iter().map(|peer| net.cut_port(&host, peer, port)).collect();
            pass();
            cuts.into_iter().for_each(|cut| net.lift(cut));
        }
        Fault::Reset(target) => {
            let host = resolve(target)?;
            let mut others = peers(&host);
            others.push(CLIENT.to_owned());
            let cuts: Vec<_> = others.iter().map(|other| net.refuse(&host, other, Refusal::Reset)).collect();
            pass();
            cuts.into_iter().for_each(|cut| net.lift(cut));
        }
        Fault::Flap(target, times) => {
            let host = resolve(target)?;
            let pause = step.lasts / (2 * times);
            for _ in 0..*times {
                let fault = net.isolate(&host);
                // sleep: as long as the link is down in this flap.
                std::thread::sleep(pause);
                net.lift(fault);
                // sleep: as long as it is up.
                std::thread::sleep(pause);
            }
        }
        Fault::Lose(probability) => {
            let hosts = herd.agents();
            let mut losses = Vec::new();
            for (index, a) in hosts.iter().enumerate() {
                losses.extend(hosts[index + 1..].iter().map(|b| net.lose(a, b, *probability)));
            }
            pass();
            losses.into_iter().for_each(|loss| net.lift(loss));
        }
        Fault::Slow(how) => {
            net.slow_everywhere(*how, false);
            pass();
            net.restore_speed();
        }
        Fault::SwitchOver => {
            let host = resolve(&Target::Primary)?;
            let command = herd.pgherd(&host).args(["switchover", "--yes"]);
            let output = command.try_output().map_err(|overdue| overdue.to_string())?;
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
            }
        }
    }
    Ok(())
}

/// Waits until the herd is whole, and restarts agents that end by themselves meanwhile, as an init system
/// does; how many that were.
#[track_caller]
pub fn settle(herd: &Herd, deadline: Duration) -> usize {
    const ROUND: Duration = Duration::from_secs(1);
    let end = Instant::now() + deadline;
    let mut revived = 0;
    while Instant::now() + ROUND < end {
        revived += herd.revive_agents().len();
        let whole = try_until(ROUND, ROUND / 5, || herd.status()?.whole());
        if whole.is_ok() {
            return revived;
        }
    }
    // Fails with all there is to know.
    herd.wait_until_whole(ROUND);
    revived
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_schedule() {
        let steps = |seed| Schedule::new(seed, &["a", "b", "c"]).take(200).collect::<Vec<_>>();
        assert_eq!(steps(1), steps(1));
        assert_ne!(steps(1), steps(2));
    }

    #[test]
    fn every_kind_of_fault_comes_and_lasts_as_long_as_it_may() {
        let steps: Vec<Step> = Schedule::new(1, &["a", "b", "c"]).take(2000).collect();
        let kinds: std::collections::HashSet<_> =
            steps.iter().map(|step| std::mem::discriminant(&step.fault)).collect();
        assert_eq!(kinds.len(), 20, "some kind of fault is never drawn");
        let allowed = Duration::from_millis(SHORTEST_MS - 1)..=Duration::from_millis(LONGEST_MS);
        assert!(steps.iter().all(|step| allowed.contains(&step.lasts)));
        let short = steps.iter().filter(|step| step.lasts < Duration::from_secs(2)).count();
        assert!((700..1300).contains(&short), "{short} of 2000 are short");
    }
}
