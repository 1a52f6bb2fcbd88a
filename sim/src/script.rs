//! Scenario scripts: what happens, and what every node decides, in the order in which it does.
//!
//! A script is read from top to bottom. Lines that begin with `#` explain. Commands stand one per line; a line
//! `----` after some of them is followed by what the world told meanwhile, up to an empty line. The world of a
//! script has no chance in it: every span is the middle of its range, so the times can be read.
//!
//! ```text
//! herd a b c [witness] [needed=N] [async] [degrade=5s] [backup] [voter] [from-nothing]
//!                         a node may carry :delay, :never (priority 0), :follow=b, :priority=N, :later (its
//!                         host is not there yet, and it has no data)
//!                         with voter the repository is a member of the rule
//! commit N                N commits through the gate that is open
//! run 5s
//! fault KIND NODE [OTHER] [5s]     one of the simulator's faults; a freeze needs its time
//! over KIND NODE [OTHER]           its end
//! switchover [NODE]       force NODE      needed N      remove NODE     restore NODE
//! take-back NODE N        its copy, by N records, for the whole cluster; then
//! lead-restored           or  let-go
//! forget NODE N           its replica of the store is N changes behind
//! show                    term, gate, rule, and what every node holds
//! ```

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::Duration;

use pgherd_core::record::{Proposal, Switchover};
use pgherd_core::spec::{Durability, NodeSpec, Times};

use crate::faults::{Fault, Kind};
use crate::postgres::{State, WaitFor};
use crate::random::Random;
use crate::schedule;
use crate::world::{Clock, MS, SECOND, Time, World};

/// A line that cannot be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub line: usize,
    pub why: String,
}

/// A script after it has run: its text with what was told, and the reasons that it produced.
pub struct Played {
    pub text: String,
    pub reasons: Vec<&'static str>,
    pub violation: Option<String>,
}

/// Runs a script and writes it anew with what it tells.
pub fn play(script: &str) -> Result<Played, Mistake> {
    let mut stage = Stage { world: None, acknowledged: 0, attempts: 0 };
    let mut text = String::new();
    let mut skipping = false;
    for (index, line) in script.lines().enumerate() {
        if skipping {
            skipping = !line.is_empty();
            if skipping {
                continue;
            }
        }
        if line == "----" {
            skipping = true;
            text.push_str("----\n");
            text.push_str(&stage.told());
            continue;
        }
        text.push_str(line);
        text.push('\n');
        if !line.is_empty() && !line.starts_with('#') {
            stage.command(line).map_err(|why| Mistake { line: index + 1, why })?;
        }
    }
    let world = stage.world.as_ref();
    let reasons = world.map(|world| world.coverage.reasons.keys().copied().collect()).unwrap_or_default();
    let violation = world.and_then(|world| world.oracle.violation.as_ref());
    let violation = violation.map(|violation| format!("{}: {}", violation.invariant, violation.detail));
    Ok(Played { text, reasons, violation })
}

struct Stage {
    world: Option<World>,
    acknowledged: u64,
    attempts: u64,
}

impl Stage {
    fn command(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (command, rest) = words.split_first().ok_or("an empty command")?;
        if *command == "herd" {
            self.world = Some(herd(rest)?);
            return Ok(());
        }
        let world = self.world.as_mut().ok_or("a script begins with a herd")?;
        match (*command, rest) {
            ("run", [span]) => {
                let until = world.now + time(span)?;
                world.run(until);
            }
            ("commit", [count]) => commit(world, count.parse().map_err(|_| "commit needs a number")?),
            ("fault", [kind, rest @ ..]) => fault(world, kind, rest)?,
            ("over", [kind, rest @ ..]) => over(world, kind, rest)?,
            ("switchover", to) => {
                let to = to.first().map(|name| node(world, name)).transpose()?;
                let to = to.map(|index| world.nodes[index].name.clone());
                let term = world.store.record.term;
                propose(world, Proposal::Switchover { order: Some(Switchover { term, to }) })?;
            }
            ("force", [name]) => {
                let to = world.nodes[node(world, name)?].name.clone();
                let (term, by) = (world.store.record.term, to.clone());
                propose(world, Proposal::Force { term, to, by })?;
            }
            ("needed", [count]) => {
                let needed = count.parse().map_err(|_| "needed takes a number")?;
                let mut spec = (*world.spec).clone();
                let degrade_after = spec.durability.degrade_after();
                spec.durability = match needed {
                    0 => Durability::Async,
                    needed => Durability::Quorum { needed, degrade_after },
                };
                if let Some(backup) = &mut spec.backup {
                    backup.voter &= needed > 0;
                }
                change_spec(world, spec);
            }
            ("remove", [name]) => {
                let mut spec = (*world.spec).clone();
                spec.nodes.retain(|node| node.name.as_str() != *name);
                change_spec(world, spec);
            }
            ("restore", []) => {
                let spec = (*world.first_spec).clone();
                change_spec(world, spec);
            }
            ("take-back", [name, records]) => {
                let to = node(world, name)?;
                let records = records.parse().map_err(|_| "take-back takes a number of records")?;
                let by = (0..world.nodes.len()).find(|node| world.agent_runs(*node));
                world.take_back(by.ok_or("no agent can take an order")?, to, records);
            }
            ("lead-restored", []) => {
                let (term, by) = (world.store.record.term, world.nodes[0].name.clone());
                propose(world, Proposal::LeadRestored { term, by })?;
            }
            ("let-go", []) => propose(world, Proposal::Restore { order: None })?,
            ("forget", [name, changes]) => {
                let node = node(world, name)?;
                let changes = changes.parse().map_err(|_| "forget takes a number of changes")?;
                world.replica_forgets(node, changes)?;
            }
            ("show", []) => show(world),
            _ => return Err(format!("\"{line}\" is not a command")),
        }
        match &world.oracle.violation {
            Some(violation) => Err(format!("{}: {}", violation.invariant, violation.detail)),
            None => Ok(()),
        }
    }

    /// What the world has told since the last time.
    fn told(&mut self) -> String {
        let Some(world) = &mut self.world else { return String::new() };
        let clients = &world.clients;
        if (clients.attempts, clients.acknowledged) != (self.attempts, self.acknowledged) {
            let (attempts, acknowledged) =
                (clients.attempts - self.attempts, clients.acknowledged - self.acknowledged);
            (self.attempts, self.acknowledged) = (clients.attempts, clients.acknowledged);
            world.tell(None, |_| format!("clients: {attempts} commits, {acknowledged} acknowledged"));
        }
        world.trace.replace(String::new()).unwrap_or_default()
    }
}

fn herd(words: &[&str]) -> Result<World, String> {
    let mut nodes = Vec::new();
    let (mut witness, mut from_nothing, mut backup, mut voter) = (false, false, false, false);
    let mut empty = BTreeSet::new();
    let (mut needed, mut degrade_after, mut lossy) = (1, None, false);
    for word in words {
        match word.split_once('=') {
            None if *word == "witness" => witness = true,
            None if *word == "from-nothing" => from_nothing = true,
            None if *word == "async" => lossy = true,
            None if *word == "backup" => backup = true,
            None if *word == "voter" => (backup, voter) = (true, true),
            Some(("needed", count)) => needed = count.parse().map_err(|_| "needed takes a number")?,
            Some(("degrade", span)) => degrade_after = Some(Duration::from_micros(time(span)?)),
            _ => {
                let later = word.strip_suffix(":later");
                let node = node_spec(later.unwrap_or(word))?;
                empty.extend(later.map(|_| node.name.clone()));
                nodes.push(node);
            }
        }
    }
    let durability = if lossy { Durability::Async } else { Durability::Quorum { needed, degrade_after } };
    let mut spec = schedule::cluster_spec(nodes, durability);
    spec.backup = backup.then(schedule::repository);
    if let Some(backup) = &mut spec.backup {
        backup.voter = voter;
    }
    let mut world = World::new(Random::still(), Times::default(), spec, witness);
    (world.repository.used, world.empty) = (voter, empty);
    for node in &mut world.nodes {
        node.clock = Clock { start: 100 * SECOND, parts_per_million: 0 };
    }
    if from_nothing {
        for node in 0..world.nodes.len() {
            world.start_agent(node);
        }
    } else {
        schedule::establish(&mut world);
        world.run(SECOND);
    }
    world.trace = Some(String::new());
    Ok(world)
}

fn node_spec(word: &str) -> Result<NodeSpec, String> {
    let (name, options) = word.split_once(':').unwrap_or((word, ""));
    if name.len() != 1 || !name.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return Err(format!("\"{name}\" is not a node of a script, which are named by one letter"));
    }
    let mut spec = schedule::spec_of(name);
    for option in options.split(':').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            None if option == "delay" => spec.delay = Some(Duration::from_secs(300)),
            None if option == "never" => spec.priority = 0,
            Some(("follow", upstream)) => {
                spec.follow = Some(upstream.parse().map_err(|_| format!("\"{upstream}\" is not a node"))?);
            }
            Some(("priority", priority)) => {
                spec.priority = priority.parse().map_err(|_| "a priority is a number")?;
            }
            _ => return Err(format!("\"{option}\" is not an option of a node")),
        }
    }
    Ok(spec)
}

fn time(text: &str) -> Result<Time, String> {
    let units = [("ms", MS), ("s", SECOND)];
    let parsed = units.iter().find_map(|(unit, micros)| {
        let number = text.strip_suffix(unit)?;
        Some(number.parse::<Time>().ok()? * micros)
    });
    parsed.ok_or_else(|| format!("\"{text}\" is not a time such as 200ms or 5s"))
}

fn node(world: &World, name: &str) -> Result<usize, String> {
    world
        .nodes
        .iter()
        .position(|node| node.name.as_str() == name)
        .ok_or_else(|| format!("there is no node \"{name}\""))
}

fn fault(world: &mut World, kind: &str, rest: &[&str]) -> Result<(), String> {
    let (index, kind, node, other) = meant(world, kind, rest)?;
    let name = world.nodes[node].name.clone();
    world.tell(None, |_| format!("FAULT {} {name}", kind.name()));
    world.inject(index, kind, node, other);
    Ok(())
}

fn over(world: &mut World, kind: &str, rest: &[&str]) -> Result<(), String> {
    let (index, kind, node, other) = meant(world, kind, rest)?;
    let name = world.nodes[node].name.clone();
    world.tell(None, |_| format!("the fault {} {name} is over", kind.name()));
    world.repair(index, kind, node, other);
    Ok(())
}

fn meant(world: &mut World, kind: &str, rest: &[&str]) -> Result<(usize, Kind, usize, usize), String> {
    let kind = Kind::named(kind).ok_or_else(|| format!("there is no fault \"{kind}\""))?;
    let (mut nodes, mut lasts) = (Vec::new(), 0);
    for word in rest {
        match time(word) {
            Ok(span) => lasts = span,
            Err(_) => nodes.push(node(world, word)?),
        }
    }
    let first = nodes.first().copied().unwrap_or(0);
    let other = nodes.get(1).copied().unwrap_or(first);
    world.faults.push(Fault::new(world.now, lasts, kind, first, other));
    Ok((world.faults.len() - 1, kind, first, other))
}

fn commit(world: &mut World, count: u64) {
    let Some(open) = (0..world.nodes.len()).find(|node| world.lets_clients_in(*node)) else {
        world.tell(None, |_| "clients: no gate is open".to_owned());
        return;
    };
    for _ in 0..count {
        world.clients.attempts += 1;
        world.write(open, Some(WaitFor::Client));
    }
}

fn propose(world: &mut World, proposal: Proposal) -> Result<(), String> {
    let by = (0..world.nodes.len()).find(|node| world.agent_runs(*node) && world.store_answers(*node));
    let by = by.ok_or("no agent can take an order")?;
    world.person_proposes(by, proposal);
    Ok(())
}

fn change_spec(world: &mut World, spec: pgherd_core::spec::ClusterSpec) {
    world.spec = Rc::new(spec);
    for node in 0..world.nodes.len() {
        world.think_within(node, 10 * MS);
    }
}

/// The state of things, in a few lines.
fn show(world: &mut World) {
    let record = Rc::clone(&world.store.record);
    let mut text = format!("term {}", record.term);
    let holder = record.holder().map_or("nobody".to_owned(), ToString::to_string);
    let state = match (&record.election, &record.reign) {
        (Some(_), _) => "closed".to_owned(),
        (None, Some(reign)) if reign.gate_opened => format!("held by {holder}, gate open"),
        (None, _) => format!("held by {holder}, gate closed"),
    };
    // Writing into a String cannot fail.
    write!(text, ", {state}").expect("a String takes any text");
    if let Some(rules) = &record.rules {
        write!(text, "; {}", rules.current).expect("a String takes any text");
        for other in rules.superseded.iter().chain(&rules.next) {
            write!(text, ", then {other}").expect("a String takes any text");
        }
    }
    world.tell(None, |_| text);
    for index in 0..world.nodes.len() {
        let there = &world.nodes[index];
        if !there.has_postgres {
            continue;
        }
        let server = &there.postgres;
        let state = match server.state {
            _ if !there.host_up => "host lost",
            State::Absent => "no copy",
            State::Stopped => "stopped",
            State::Starting => "starting",
            State::Standby if server.receiver.is_some() => "streams",
            State::Standby => "standby",
            State::Promoting => "promoting",
            State::Primary => "primary",
            State::Stopping | State::Remains | State::Killed => "stopping",
        };
        let member = world.member(index).map_or("no member".to_owned(), ToString::to_string);
        let end = if server.has_copy() { world.end_text(index) } else { "nothing".to_owned() };
        world.tell(Some(index), |_| format!("{member}, {state}, {end}"));
    }
    if let Some(member) = world.repository_member() {
        world.tell(None, |world| format!("{member} has {}", world.repository_text()));
    }
}
