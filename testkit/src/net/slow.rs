//! Slow links: delay, jitter, loss, duplicates and a rate between two hosts, by packets through user space.
//!
//! ```text
//!   host a                  forwarder (a thread of the test)               host b
//!   route to b ── tun "slow" ──▶ queue, ordered by when it is due ──▶ tun "slow" ── as if it came by wire
//! ```
//!
//! Whole packets are moved, so both ends keep their own TCP with its retransmissions, windows and timeouts;
//! a relay that ends TCP would hide just what a slow link does to it. It stands in for netem, which is a
//! kernel module that small virtual machines do not have.
//!
//! A host gets its device when it is first needed; a link is slow while the two hosts have routes to each
//! other through it. Addresses stay the same, so cuts (`faults`) work on slow links too.
//!
//! Hazard: a forwarder that is itself starved adds delay of its own. Tests with it assert lower bounds.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Opcode, Setter, ioctl};

use super::{Host, Net, lock};
use crate::command::run;
use crate::random::Random;
use crate::wait::wait_until;

/// The device's name on every host.
const DEVICE: &str = "slow";
/// What waits on one direction of a link at most; more is dropped, as a router's queue does.
const QUEUE_LIMIT_BYTES: usize = 1 << 20;
/// More than any packet on a device whose MTU is 1500.
const PACKET_MAX_BYTES: usize = 1 << 16;
const PROOF_DEADLINE: Duration = Duration::from_secs(20);

/// What a direction of a link does to packets. The order of packets is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slowness {
    pub delay: Duration,
    /// Up to this much more than `delay`, drawn for each packet.
    pub jitter: Duration,
    /// The probability for a packet to be lost.
    pub loss: f64,
    /// The probability for a packet to arrive twice.
    pub duplicates: f64,
    pub rate_bytes_per_s: Option<u64>,
}

impl Slowness {
    pub fn delay(delay: Duration) -> Slowness {
        Slowness { delay, ..Slowness::default() }
    }

    pub fn with_jitter(self, jitter: Duration) -> Slowness {
        Slowness { jitter, ..self }
    }

    pub fn with_loss(self, loss: f64) -> Slowness {
        assert!((0.0..=1.0).contains(&loss), "a probability, not {loss}");
        Slowness { loss, ..self }
    }

    pub fn with_duplicates(self, duplicates: f64) -> Slowness {
        assert!((0.0..=1.0).contains(&duplicates), "a probability, not {duplicates}");
        Slowness { duplicates, ..self }
    }

    pub fn with_rate(self, bytes_per_s: u64) -> Slowness {
        assert!(bytes_per_s > 0, "a link without any rate is a cut");
        Slowness { rate_bytes_per_s: Some(bytes_per_s), ..self }
    }
}

type Direction = (Ipv4Addr, Ipv4Addr);

/// What one direction has seen.
#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    arrived: u64,
    lost: u64,
    duplicated: u64,
}

#[derive(Debug, Default)]
pub(super) struct SlowLinks {
    forwarder: Option<Forwarder>,
    slow: Vec<(Host, Host)>,
}

impl Net {
    /// Makes the link between `a` and `b` slow in both directions, each with a delay of its own.
    #[track_caller]
    pub fn slow(&self, a: &str, b: &str, how: Slowness) {
        self.set_slow(a, b, how, how);
    }

    /// Slow from `from` to `to` only; the way back has no delay.
    #[track_caller]
    pub fn slow_one_way(&self, from: &str, to: &str, how: Slowness) {
        self.set_slow(from, to, how, Slowness::default());
    }

    /// Makes all links slow, those of the client too if `clients` says so.
    #[track_caller]
    pub fn slow_everywhere(&self, how: Slowness, clients: bool) {
        let hosts: Vec<&str> = self.hosts().iter().skip(usize::from(!clients)).map(Host::name).collect();
        for (index, a) in hosts.iter().enumerate() {
            for b in &hosts[index + 1..] {
                self.slow(a, b, how);
            }
        }
    }

    /// Ends all slow links. Packets on the way arrive when they are due.
    #[track_caller]
    pub fn restore_speed(&self) {
        let links = std::mem::take(&mut lock(&self.state).slow.slow);
        for (a, b) in links {
            for (here, there) in [(&a, &b), (&b, &a)] {
                let target = format!("{}/32", there.address());
                run("ip", &["-n", here.0.namespace.name(), "route", "del", &target, "dev", DEVICE]);
            }
        }
    }

    #[track_caller]
    fn set_slow(&self, a: &str, b: &str, there: Slowness, back: Slowness) {
        assert!(a != b, "there is no network between {a} and itself");
        let (a, b) = (self.host(a).clone(), self.host(b).clone());
        let mut state = lock(&self.state);
        let links = &mut state.slow;
        let forwarder = links.forwarder.get_or_insert_with(Forwarder::start);
        for host in [&a, &b] {
            forwarder.attach(host);
        }
        let directions = [(&a, &b, there), (&b, &a, back)];
        for (from, to, how) in &directions {
            forwarder.set((from.address(), to.address()), *how);
        }
        for (from, to, _) in &directions {
            let (target, source) = (format!("{}/32", to.address()), from.address().to_string());
            let inside = from.0.namespace.name();
            run("ip", &["-n", inside, "route", "replace", &target, "dev", DEVICE, "src", &source]);
        }
        for (from, to, how) in &directions {
            forwarder.prove(from, to, *how);
        }
        let known = |(x, y): &(Host, Host)| {
            [x.name(), y.name()] == [a.name(), b.name()] || [x.name(), y.name()] == [b.name(), a.name()]
        };
        if !links.slow.iter().any(known) {
            links.slow.push((a, b));
        }
    }
}

/// The thread that moves packets, and what it shares with those who change links.
#[derive(Debug)]
struct Forwarder {
    shared: Arc<Mutex<Shared>>,
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    links: HashMap<Direction, Slowness>,
    traffic: HashMap<Direction, Traffic>,
    devices: Vec<(Ipv4Addr, Arc<File>)>,
    stop: bool,
}

impl Forwarder {
    fn start() -> Forwarder {
        let (read, wake) = rustix::pipe::pipe().expect("a pipe needs two descriptors only");
        let shared = Arc::new(Mutex::new(Shared::default()));
        let inside = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("slow links".to_owned())
            .spawn(move || Mover::new(inside, File::from(read)).run())
            .expect("one more thread is possible");
        Forwarder { shared, wake, thread: Some(thread) }
    }

    /// Gives a host its device, if it has none.
    fn attach(&self, host: &Host) {
        if lock(&self.shared).devices.iter().any(|(address, _)| *address == host.address()) {
            return;
        }
        let device = host.enter(open_device);
        run("ip", &["-n", host.0.namespace.name(), "link", "set", DEVICE, "up"]);
        lock(&self.shared).devices.push((host.address(), Arc::new(device)));
        self.wake();
    }

    fn set(&self, direction: Direction, how: Slowness) {
        lock(&self.shared).links.insert(direction, how);
        self.wake();
    }

    fn wake(&self) {
        rustix::io::write(&self.wake, &[1]).expect("the forwarder reads its pipe");
    }

    /// Sends datagrams until the forwarder has done to one of them what `how` asks for.
    #[track_caller]
    fn prove(&self, from: &Host, to: &Host, how: Slowness) {
        let direction = (from.address(), to.address());
        let traffic = || lock(&self.shared).traffic.get(&direction).copied().unwrap_or_default();
        let before = traffic();
        // Bound but never read: only its address matters.
        let target = to.enter(|| UdpSocket::bind((to.address(), 0)).expect("a free UDP port"));
        let address = target.local_addr().expect("a bound socket has an address");
        let sender = from.enter(|| UdpSocket::bind((from.address(), 0)).expect("a free UDP port"));
        let what = format!("packets from {} to {} to be slow ({how:?})", from.name(), to.name());
        wait_until(&what, PROOF_DEADLINE, || {
            // A full queue of the socket is met by the next try.
            let _sent = sender.send_to(&[0], address);
            let now = traffic();
            let proven = now.arrived > before.arrived
                && (how.loss == 0.0 || now.lost > before.lost)
                && (how.duplicates == 0.0 || now.duplicated > before.duplicated);
            if proven { Ok(()) } else { Err(format!("the forwarder saw {now:?}, before {before:?}")) }
        });
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        lock(&self.shared).stop = true;
        self.wake();
        if let Some(thread) = self.thread.take() {
            // If it panicked, the tests have seen a network without packets already.
            let _ended = thread.join();
        }
    }
}

/// Creates the device in the namespace of the calling thread. It goes away with its descriptor.
fn open_device() -> File {
    const IFF_TUN: u16 = 0x0001;
    const IFF_NO_PI: u16 = 0x1000;
    const TUNSETIFF: Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 202);
    /// `struct ifreq`: a name, and a union of which `TUNSETIFF` reads the flags.
    #[repr(C)]
    struct InterfaceRequest {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap_or_else(|error| panic!("cannot open /dev/net/tun, which slow links need: {error}"));
    let mut name = [0; 16];
    name[..DEVICE.len()].copy_from_slice(DEVICE.as_bytes());
    let request = InterfaceRequest { name, flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    #[expect(unsafe_code, reason = "no safe wrapper names a TUN device")]
    // SAFETY: TUNSETIFF reads one `struct ifreq`, which `InterfaceRequest` has the size and layout of, and
    // keeps no pointer to it.
    unsafe { ioctl(&device, Setter::<TUNSETIFF, InterfaceRequest>::new(request)) }
        .unwrap_or_else(|error| panic!("cannot make a TUN device: {error}"));
    rustix::io::ioctl_fionbio(&device, true).expect("a TUN device can be non-blocking");
    device
}

/// A packet that waits for its time. Ordered by that, then by arrival.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    number: u64,
    direction: Direction,
    packet: Vec<u8>,
}

#[derive(Default)]
struct Queue {
    bytes: usize,
    /// When the link has sent what was given to it before, at its rate.
    free_at: Option<Instant>,
    /// The last packet's time: nothing overtakes.
    last_due: Option<Instant>,
}

struct Mover {
    shared: Arc<Mutex<Shared>>,
    woken: File,
    waiting: BinaryHeap<Reverse<Waiting>>,
    queues: HashMap<Direction, Queue>,
    random: Random,
    count: u64,
}

impl Mover {
    fn new(shared: Arc<Mutex<Shared>>, woken: File) -> Mover {
        Mover {
            shared,
            woken,
            waiting: BinaryHeap::new(),
            queues: HashMap::new(),
            random: Random::new(u64::from(std::process::id())),
            count: 0,
        }
    }

    fn run(mut self) {
        let mut buffer = vec![0; PACKET_MAX_BYTES];
        loop {
            let devices = {
                let shared = lock(&self.shared);
                if shared.stop {
                    return;
                }
                shared.devices.clone()
            };
            let woken = self.wait(&devices);
            if woken {
                // Whatever was written there, the loop looks at everything again.
                let _bytes = (&self.woken).read(&mut buffer).expect("own pipe");
            }
            for (_, device) in &devices {
                // Non-blocking: an error is "nothing more", or a device that went with its namespace.
                while let Ok(length) = (&**device).read(&mut buffer) {
                    self.take_in(&buffer[..length]);
                }
            }
            self.send_due(&devices);
        }
    }

    /// Until a packet arrives, one is due, or somebody changed something; true for the last.
    fn wait(&self, devices: &[(Ipv4Addr, Arc<File>)]) -> bool {
        let timeout = self.waiting.peek().map(|Reverse(next)| {
            let left = next.due.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }
        });
        let mut descriptors = vec![PollFd::new(&self.woken, PollFlags::IN)];
        descriptors.extend(devices.iter().map(|(_, device)| PollFd::new(&**device, PollFlags::IN)));
        match poll(&mut descriptors, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => !descriptors[0].revents().is_empty(),
            Err(error) => panic!("poll of {} and others: {error}", self.woken.as_raw_fd()),
        }
    }

    fn take_in(&mut self, packet: &[u8]) {
        let Some(direction) = addresses(packet) else { return };
        let mut shared = lock(&self.shared);
        let how = shared.links.get(&direction).copied().unwrap_or_default();
        let traffic = shared.traffic.entry(direction).or_default();
        traffic.arrived += 1;
        let queue = self.queues.entry(direction).or_default();
        if self.random.chance(how.loss) || queue.bytes + packet.len() > QUEUE_LIMIT_BYTES {
            traffic.lost += 1;
            return;
        }
        let copies = if self.random.chance(how.duplicates) { 2 } else { 1 };
        traffic.duplicated += copies - 1;
        drop(shared);
        let now = Instant::now();
        for _ in 0..copies {
            let sent = match how.rate_bytes_per_s {
                Some(rate) => {
                    let start = queue.free_at.map_or(now, |free| free.max(now));
                    start + Duration::from_secs_f64(packet.len() as f64 / rate as f64)
                }
                None => now,
            };
            queue.free_at = Some(sent);
            let jitter = how.jitter.mul_f64(self.random.fraction());
            let due = queue.last_due.map_or(now, |last| last).max(sent + how.delay + jitter);
            queue.last_due = Some(due);
            queue.bytes += packet.len();
            self.count += 1;
            let waiting = Waiting { due, number: self.count, direction, packet: packet.to_owned() };
            self.waiting.push(Reverse(waiting));
        }
    }

    fn send_due(&mut self, devices: &[(Ipv4Addr, Arc<File>)]) {
        let now = Instant::now();
        while self.waiting.peek().is_some_and(|Reverse(next)| next.due <= now) {
            let Some(Reverse(next)) = self.waiting.pop() else { return };
            if let Some(queue) = self.queues.get_mut(&next.direction) {
                queue.bytes -= next.packet.len();
            }
            if let Some((_, device)) = devices.iter().find(|(address, _)| *address == next.direction.1) {
                // A host that is going away takes no packet, and nobody would be told on a wire either.
                let _written = (&**device).write(&next.packet);
            }
        }
    }
}

/// Source and destination of an IPv4 packet; `None` for anything else, which is dropped.
fn addresses(packet: &[u8]) -> Option<Direction> {
    let header = packet.get(..20).filter(|header| header[0] >> 4 == 4)?;
    let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    Some((address(12), address(16)))
}

#[cfg(test)]
mod tests {
    use super::addresses;

    #[test]
    fn only_ipv4_packets_have_a_direction() {
        let mut packet = [0_u8; 28];
        packet[0] = 0x45;
        packet[12..20].copy_from_slice(&[10, 1, 2, 3, 10, 4, 5, 6]);
        let direction = addresses(&packet).unwrap();
        assert_eq!(
            (direction.0.to_string().as_str(), direction.1.to_string().as_str()),
            ("10.1.2.3", "10.4.5.6")
        );
        packet[0] = 0x60;
        assert!(addresses(&packet).is_none(), "IPv6 has other offsets");
        assert!(addresses(&[0x45; 19]).is_none(), "half a header");
    }
}
