//! This machine's `CLOCK_BOOTTIME`, which a routing table's proof is counted on: unlike the monotonic clock it goes on while
//! the machine is suspended, and nobody can set it.

use std::time::Duration;

use pgherd_core::types::Instant;

pub(crate) fn now() -> Instant {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
    Instant::from_boot(Duration::new(seconds, nanos))
}
