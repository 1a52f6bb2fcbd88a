//! Which hosts have an address, from one moment to the next.
//!
//! On each host a thread of its own tries to bind a socket to the address, which a kernel allows only while it has it.
//! That asks the kernel itself, hundreds of times a second, and starts no process.
//!
//! Hazard: what lasts shorter than a look is not seen. [`Whereabouts::longest_look`] tells how long that was.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::net::{Host, Net, lock};

const LOOK_EVERY: Duration = Duration::from_millis(3);

/// Looks until it is dropped.
#[derive(Debug)]
pub struct Whereabouts {
    hosts: Vec<(String, Arc<Mutex<Seen>>)>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Seen {
    /// From when to when, as far as it has been seen.
    spans: Vec<(Instant, Instant)>,
    last_look: Instant,
    is_there: bool,
    longest_look: Duration,
}

impl Whereabouts {
    pub fn of(address: Ipv4Addr, net: &Net) -> Whereabouts {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut hosts, mut threads) = (Vec::new(), Vec::new());
        for host in net.hosts() {
            let seen = Arc::new(Mutex::new(Seen {
                spans: Vec::new(),
                last_look: Instant::now(),
                is_there: false,
                longest_look: Duration::ZERO,
            }));
            hosts.push((host.name().to_owned(), Arc::clone(&seen)));
            let (host, stop) = (host.clone(), Arc::clone(&stop));
            threads.push(std::thread::spawn(move || look(&host, address, &seen, &stop)));
        }
        Whereabouts { hosts, stop, threads }
    }

    /// Where it is now.
    pub fn now(&self) -> Vec<String> {
        let there = self.hosts.iter().filter(|(_, seen)| lock(seen).is_there);
        there.map(|(name, _)| name.clone()).collect()
    }

    /// For how long together it was on two hosts at once, and on which.
    pub fn overlaps(&self) -> Vec<(String, String, Duration)> {
        let mut overlaps = Vec::new();
        for (index, (name, seen)) in self.hosts.iter().enumerate() {
            let spans = lock(seen).spans.clone();
            for (other, seen) in &self.hosts[index + 1..] {
                let others = lock(seen).spans.clone();
                let both = |(from, to): (Instant, Instant), (other_from, other_to): (Instant, Instant)| {
                    to.min(other_to).saturating_duration_since(from.max(other_from))
                };
                let pairs = spans.iter().flat_map(|span| others.iter().map(|other| both(*span, *other)));
                let sum: Duration = pairs.sum();
                if !sum.is_zero() {
                    overlaps.push((name.clone(), other.clone(), sum));
                }
            }
        }
        overlaps
    }

    /// When it was last seen on a host.
    pub fn last_on(&self, host: &str) -> Option<Instant> {
        let (_, seen) = self.hosts.iter().find(|(name, _)| name == host)?;
        lock(seen).spans.last().map(|(_, to)| *to)
    }

    /// For how long it was not on a host between the first and the last time that it was.
    pub fn gaps_on(&self, host: &str) -> Duration {
        let seen = self.hosts.iter().find(|(name, _)| name == host);
        let spans = seen.map(|(_, seen)| lock(seen).spans.clone()).unwrap_or_default();
        spans.windows(2).map(|pair| pair[1].0 - pair[0].1).sum()
    }

    /// The longest time between two looks on any host.
    pub fn longest_look(&self) -> Duration {
        self.hosts.iter().map(|(_, seen)| lock(seen).longest_look).max().unwrap_or_default()
    }
}

impl Drop for Whereabouts {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // What fails already must not fail twice.
            let _ended = thread.join();
        }
    }
}

fn look(host: &Host, address: Ipv4Addr, seen: &Mutex<Seen>, stop: &AtomicBool) {
    host.move_here();
    while !stop.load(Ordering::Relaxed) {
        let is_there = UdpSocket::bind((address, 0)).is_ok();
        let now = Instant::now();
        {
            let mut seen = lock(seen);
            seen.longest_look = seen.longest_look.max(now - seen.last_look);
            match (is_there, seen.is_there) {
                (true, false) => seen.spans.push((now, now)),
                (true, true) => {
                    if let Some(span) = seen.spans.last_mut() {
                        span.1 = now;
                    }
                }
                (false, _) => {}
            }
            (seen.is_there, seen.last_look) = (is_there, now);
        }
        // sleep: between two looks.
        std::thread::sleep(LOOK_EVERY);
    }
}
