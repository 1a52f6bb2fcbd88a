//! Ports of the machine itself, for benchmarks; a host of a [`net`](crate::net) has all of its own.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// Nobody listens there, and it is below those that the kernel gives to outgoing connections.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 24_000 + (std::process::id() % 500) as u16 * 10;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
