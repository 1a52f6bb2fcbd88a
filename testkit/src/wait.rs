//! Waiting for a condition with a deadline: the only way in which a test waits.

use std::time::{Duration, Instant};

/// Short against everything measured here, long enough not to take a core from what is waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Asks `probe` until it has an answer. `Err` says why not yet; the last one is part of the failure.
#[track_caller]
pub fn wait_until<T>(what: &str, deadline: Duration, probe: impl FnMut() -> Result<T, String>) -> T {
    match try_until(deadline, POLL_INTERVAL, probe) {
        Ok(answer) => answer,
        Err(reason) => panic!("waited {:.1} s for {what}; last seen: {reason}", deadline.as_secs_f64()),
    }
}

/// As [`wait_until`], for a probe that costs more, and a caller that has more to say than its last answer.
pub fn try_until<T>(
    deadline: Duration,
    poll_interval: Duration,
    mut probe: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let start = Instant::now();
    loop {
        match probe() {
            Err(_) if start.elapsed() < deadline => std::thread::sleep(poll_interval),
            ended => return ended,
        }
    }
}
