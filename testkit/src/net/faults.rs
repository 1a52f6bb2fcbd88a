//! What is wrong between hosts: packets dropped, refused or lost, by the rules of the receiving host.
//!
//! The faults in force are a list; the rules of a host are computed from the whole list and replaced in one
//! step. So faults can overlap and be lifted one by one, in any order, and nothing has to be undone.
//!
//! Rules stand at the receiver, in `INPUT`: dropped on the way out, a packet would tell its sender so with an
//! error, which no network does.
//!
//! Hazard: a rule that matches nothing. After each change, packets are sent that must meet every new rule,
//! and the rule's own counter must have seen them.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
use rustix::process::Signal;

use super::namespace::Namespace;
use super::{Host, Net, lock};
use crate::command::{run, run_with_input};
use crate::process;
use crate::wait::wait_until;

/// The chain of `INPUT` with the faults in it.
const CHAIN: &str = "PGHERD";
/// A port on which nobody listens: whoever gets through to it is told so at once.
const CLOSED_PORT: u16 = 1;
/// A probe between healthy hosts takes well below a millisecond, over a slow link a round trip.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);
const INJECTION_DEADLINE: Duration = Duration::from_secs(3);
const HEALING_DEADLINE: Duration = Duration::from_secs(10);
/// Probes against a lossy link are many enough that "none was lost" has this chance at most.
const LOSS_PROOF_ERROR: f64 = 1e-9;

/// Names a fault, so that it can be lifted alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultId(u64);

/// What happens to the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// They vanish, as with a cut cable: the sender waits for its own timeout.
    Drop,
    /// TCP is answered with a reset and the rest with "unreachable", as by a firewall or a restarted host.
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Effect {
    Refuse(Refusal),
    /// Each packet is lost with this probability.
    Lose(f64),
}

/// One direction between two hosts.
#[derive(Clone, Debug)]
struct Block {
    from: Host,
    to: Host,
    /// Only TCP with this port at either end.
    port: Option<u16>,
    effect: Effect,
}

#[derive(Debug)]
struct Fault {
    id: u64,
    blocks: Vec<Block>,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    last_id: u64,
    active: Vec<Fault>,
    /// Hosts without power, with the fault that keeps them silent.
    dark: Vec<(String, FaultId)>,
}

/// Puts the empty chain in place.
pub(super) fn prepare(namespace: &Namespace) {
    namespace.enter(|| {
        run("iptables", &["-w", "5", "-N", CHAIN]);
        run("iptables", &["-w", "5", "-A", "INPUT", "-j", CHAIN]);
    });
}

/// A rule of the chain, without the `-A CHAIN`, and whether meeting it is the fault.
struct Rule {
    text: String,
    block: usize,
    is_fault: bool,
}

impl Block {
    fn rules(&self, block: usize) -> Vec<Rule> {
        let source = format!("-s {}", self.from.address());
        let rule = |text: String, is_fault| Rule { text, block, is_fault };
        let ports: Vec<String> = match self.port {
            Some(port) => vec![format!("-p tcp --dport {port}"), format!("-p tcp --sport {port}")],
            None => vec![String::new()],
        };
        let mut rules = Vec::new();
        if self.effect == Effect::Refuse(Refusal::Reset) {
            // The reset that the other side sends must get through, or it is a drop.
            rules.push(rule(format!("{source} -p tcp --tcp-flags RST RST -j RETURN"), false));
        }
        for ports in ports {
            match self.effect {
                Effect::Refuse(Refusal::Drop) => rules.push(rule(format!("{source} {ports} -j DROP"), true)),
                Effect::Lose(probability) => rules.push(rule(
                    format!(
                        "{source} {ports} -m statistic --mode random --probability {probability:.6} -j DROP"
                    ),
                    true,
                )),
                Effect::Refuse(Refusal::Reset) => {
                    let tcp = if self.port.is_some() { ports.clone() } else { "-p tcp".to_owned() };
                    rules.push(rule(format!("{source} {tcp} -j REJECT --reject-with tcp-reset"), true));
                    if self.port.is_none() {
                        rules.push(rule(format!("{source} -j REJECT"), false));
                    }
                }
            }
        }
        rules
    }

    /// Drops come first, so that a reset never answers for a host that is cut off.
    fn order(&self) -> u8 {
        match self.effect {
            Effect::Refuse(Refusal::Drop) => 0,
            Effect::Lose(_) => 1,
            Effect::Refuse(Refusal::Reset) => 2,
        }
    }

    /// Whether no packet that `other` means gets past this block.
    fn covers(&self, other: &Block) -> bool {
        self.from.name() == other.from.name()
            && self.to.name() == other.to.name()
            && matches!(self.effect, Effect::Refuse(_))
            && (self.port.is_none() || self.port == other.port)
    }
}

impl Net {
    /// No packet between `a` and `b`, in either direction.
    #[track_caller]
    pub fn cut(&self, a: &str, b: &str) -> FaultId {
        self.refuse(a, b, Refusal::Drop)
    }

    /// No packet from `from` to `to`; those in the other direction arrive.
    #[track_caller]
    pub fn cut_one_way(&self, from: &str, to: &str) -> FaultId {
        self.inject(vec![self.block(from, to, None, Effect::Refuse(Refusal::Drop))])
    }

    /// Nothing in either direction, with or without an answer.
    #[track_caller]
    pub fn refuse(&self, a: &str, b: &str, refusal: Refusal) -> FaultId {
        self.both_ways(&[(a, b)], None, Effect::Refuse(refusal))
    }

    /// No TCP between `a` and `b` that has `port` at either end; everything else passes.
    #[track_caller]
    pub fn cut_port(&self, a: &str, b: &str, port: u16) -> FaultId {
        self.both_ways(&[(a, b)], Some(port), Effect::Refuse(Refusal::Drop))
    }

    /// No TCP from `from` to `to` that has `port` at either end; what `to` sends arrives, without an answer.
    #[track_caller]
    pub fn cut_port_one_way(&self, from: &str, to: &str, port: u16) -> FaultId {
        self.inject(vec![self.block(from, to, Some(port), Effect::Refuse(Refusal::Drop))])
    }

    /// `host` neither hears anybody, the client included, nor is heard. No reset, no error.
    #[track_caller]
    pub fn isolate(&self, host: &str) -> FaultId {
        let others = self.hosts().iter().map(Host::name).filter(|other| *other != host);
        self.both_ways(
            &others.map(|other| (host, other)).collect::<Vec<_>>(),
            None,
            Effect::Refuse(Refusal::Drop),
        )
    }

    /// No packet between hosts of different groups. Hosts in no group, such as the client, reach everybody.
    #[track_caller]
    pub fn partition(&self, groups: &[&[&str]]) -> FaultId {
        let mut pairs = Vec::new();
        for (index, group) in groups.iter().enumerate() {
            for other in &groups[index + 1..] {
                pairs.extend(group.iter().flat_map(|a| other.iter().map(move |b| (*a, *b))));
            }
        }
        self.both_ways(&pairs, None, Effect::Refuse(Refusal::Drop))
    }

    /// Each packet between `a` and `b` is lost with `probability`.
    #[track_caller]
    pub fn lose(&self, a: &str, b: &str, probability: f64) -> FaultId {
        assert!((0.001..1.0).contains(&probability), "a probability worth the name, not {probability}");
        self.both_ways(&[(a, b)], None, Effect::Lose(probability))
    }

    /// The power goes: everything on `host` ends in one instant and nobody is told. No process sees another
    /// one die, and the kernel's own goodbyes are lost too. The disk keeps what was written.
    #[track_caller]
    pub fn crash(&self, host: &str) {
        let silence = self.isolate(host);
        let this = self.host(host);
        let freezer = this.freeze();
        for process in this.processes() {
            process.signal(Signal::KILL);
        }
        freezer.thaw();
        process::kill_all(|| this.processes());
        assert!(this.processes().is_empty(), "fault not injected: processes of {host} survive");
        // The kernel would repeat the goodbyes of dead processes for minutes, and be heard after power_on.
        this.enter(|| run("ss", &["--no-header", "--kill", "--tcp", "state", "connected"]));
        lock(&self.state).faults.dark.push((host.to_owned(), silence));
    }

    /// The power comes back. Nothing runs yet.
    #[track_caller]
    pub fn power_on(&self, host: &str) {
        let silence = {
            let dark = &mut lock(&self.state).faults.dark;
            let index = dark.iter().position(|(name, _)| name == host);
            dark.remove(index.unwrap_or_else(|| panic!("{host} has not crashed"))).1
        };
        self.lift(silence);
    }

    /// Whether `host` has crashed and has no power yet.
    pub fn is_dark(&self, host: &str) -> bool {
        lock(&self.state).faults.dark.iter().any(|(name, _)| name == host)
    }

    /// Ends one fault and proves that the hosts reach each other again, other faults aside.
    #[track_caller]
    pub fn lift(&self, id: FaultId) {
        self.lift_where(|fault| fault.id == id.0);
    }

    /// Ends all faults, slow links included, and proves it. Crashed hosts stay dark.
    #[track_caller]
    pub fn heal(&self) {
        self.restore_speed();
        let dark: Vec<u64> = lock(&self.state).faults.dark.iter().map(|(_, silence)| silence.0).collect();
        self.lift_where(|fault| !dark.contains(&fault.id));
    }

    #[track_caller]
    fn block(&self, from: &str, to: &str, port: Option<u16>, effect: Effect) -> Block {
        assert!(from != to, "there is no network between {from} and itself");
        Block { from: self.host(from).clone(), to: self.host(to).clone(), port, effect }
    }

    #[track_caller]
    fn both_ways(&self, pairs: &[(&str, &str)], port: Option<u16>, effect: Effect) -> FaultId {
        let directions = pairs.iter().flat_map(|(a, b)| [(*a, *b), (*b, *a)]);
        self.inject(directions.map(|(from, to)| self.block(from, to, port, effect)).collect())
    }

    #[track_caller]
    fn inject(&self, blocks: Vec<Block>) -> FaultId {
        assert!(!blocks.is_empty(), "fault not injected: it concerns nobody");
        let mut state = lock(&self.state);
        state.faults.last_id += 1;
        let id = state.faults.last_id;
        state.faults.active.push(Fault { id, blocks: blocks.clone() });
        for host in
            self.hosts().iter().filter(|host| blocks.iter().any(|block| block.to.name() == host.name()))
        {
            state.faults.apply(host);
        }
        for block in &blocks {
            state.faults.prove(block);
        }
        FaultId(id)
    }

    #[track_caller]
    fn lift_where(&self, chosen: impl Fn(&Fault) -> bool) {
        let mut state = lock(&self.state);
        let (lifted, kept) =
            std::mem::take(&mut state.faults.active).into_iter().partition(|fault| chosen(fault));
        state.faults.active = kept;
        let lifted: Vec<Block> = Vec::<Fault>::into_iter(lifted).flat_map(|fault| fault.blocks).collect();
        for host in
            self.hosts().iter().filter(|host| lifted.iter().any(|block| block.to.name() == host.name()))
        {
            state.faults.apply(host);
        }
        for block in &lifted {
            if state.faults.touch(&block.from, &block.to) {
                continue;
            }
            let what = format!("{} to reach {} again", block.from.name(), block.to.name());
            wait_until(&what, HEALING_DEADLINE, || answers(&block.from, &block.to));
        }
    }
}

impl Faults {
    fn touch(&self, one: &Host, other: &Host) -> bool {
        let names = [one.name(), other.name()];
        let blocks = self.active.iter().flat_map(|fault| &fault.blocks);
        blocks.into_iter().any(|block| names.contains(&block.from.name()) && names.contains(&block.to.name()))
    }

    /// The blocks at one receiver, in the order of its rules.
    fn at(&self, receiver: &Host) -> Vec<&Block> {
        let blocks = self.active.iter().flat_map(|fault| &fault.blocks);
        let mut here: Vec<&Block> = blocks.filter(|block| block.to.name() == receiver.name()).collect();
        here.sort_by_key(|block| block.order());
        here
    }

    fn rules_at(&self, receiver: &Host) -> Vec<Rule> {
        let blocks = self.at(receiver);
        blocks.iter().enumerate().flat_map(|(index, block)| block.rules(index)).collect()
    }

    /// Replaces the chain of one host in one step; the counters start at zero.
    fn apply(&self, receiver: &Host) {
        let mut script = format!("*filter\n:{CHAIN} - [0:0]\n");
        for rule in self.rules_at(receiver) {
            writeln!(script, "-A {CHAIN} {}", rule.text).expect("a string takes any text");
        }
        script.push_str("COMMIT\n");
        receiver.enter(|| run_with_input("iptables-restore", &["-w", "5", "--noflush"], &script));
    }

    /// Sends what the block must stop, and wants to see it in the counters of the rules that stop it.
    #[track_caller]
    fn prove(&self, block: &Block) {
        let probes = match block.effect {
            Effect::Refuse(_) => 1,
            Effect::Lose(probability) => (LOSS_PROOF_ERROR.ln() / (1.0 - probability).ln()).ceil() as u32,
        };
        let blocks = self.at(&block.to);
        let rules = self.rules_at(&block.to);
        let what =
            format!("packets from {} to {} to meet the injected fault", block.from.name(), block.to.name());
        let port = block.port.unwrap_or(CLOSED_PORT);
        // Both ends of a port have a rule each; each has to be met.
        for (source_port, target_port) in [(CLOSED_PORT, port), (port, CLOSED_PORT)] {
            let before = refused(&block.to, &rules, &blocks, block);
            for _ in 0..probes {
                send_segment(&block.from, block.to.address(), source_port, target_port);
            }
            wait_until(&what, INJECTION_DEADLINE, || {
                match refused(&block.to, &rules, &blocks, block) > before {
                    true => Ok(()),
                    false => Err(format!("none of {probes} was stopped by the rules of {}", block.to.name())),
                }
            });
        }
    }
}

/// How many packets the rules of `block`, or of blocks that leave it nothing, have stopped.
fn refused(receiver: &Host, rules: &[Rule], blocks: &[&Block], block: &Block) -> u64 {
    let listing = receiver.enter(|| run("iptables", &["-w", "5", "-nvxL", CHAIN]));
    let counters: Vec<u64> = listing
        .lines()
        .skip(2) // the chain's name and the heading
        .map(|line| {
            let count = line.split_whitespace().next().and_then(|count| count.parse().ok());
            count.unwrap_or_else(|| panic!("iptables printed a line without a counter: {line}"))
        })
        .collect();
    assert_eq!(counters.len(), rules.len(), "the rules of {} are not those set:\n{listing}", receiver.name());
    let same = |other: &Block| {
        other.from.name() == block.from.name() && other.port == block.port && other.effect == block.effect
    };
    rules
        .iter()
        .zip(counters)
        .filter(|(rule, _)| rule.is_fault && (same(blocks[rule.block]) || blocks[rule.block].covers(block)))
        .map(|(_, count)| count)
        .sum()
}

/// One TCP segment of no connection. Whoever gets it answers with a reset; a listener stays as it is.
fn send_segment(from: &Host, to: Ipv4Addr, source_port: u16, target_port: u16) {
    const ACK: u8 = 0x10;
    const HEADER_WORDS: u8 = 5;
    let mut segment = [0_u8; HEADER_WORDS as usize * 4];
    segment[0..2].copy_from_slice(&source_port.to_be_bytes());
    segment[2..4].copy_from_slice(&target_port.to_be_bytes());
    segment[12] = HEADER_WORDS << 4;
    segment[13] = ACK;
    from.enter(|| {
        let raw = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::TCP))
            .expect("root may open raw sockets");
        sendto(&raw, &segment, SendFlags::empty(), &SocketAddrV4::new(to, 0))
            .unwrap_or_else(|error| panic!("cannot send a probe from {} to {to}: {error}", from.name()));
    });
}

/// Whether a connection attempt from one host gets an answer from the other: here, that the port is closed.
pub(super) fn answers(from: &Host, to: &Host) -> Result<(), String> {
    let target = SocketAddr::from((to.address(), CLOSED_PORT));
    match from.enter(|| TcpStream::connect_timeout(&target, PROBE_TIMEOUT)) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error.to_string()),
        Ok(_) => Err(format!("somebody listens on port {CLOSED_PORT}")),
    }
}
