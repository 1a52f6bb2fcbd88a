//! Waiting for a condition with a deadline: the only way in which a test waits.

use std::time::{Duration, Instant};

/// Short against everything measured here, long enough not to take a core from what is waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Asks `probe` until it has an answer. `Err` says why not yet; the last one is part of the failure.
#[track_caller]
pub fn wait_until<T>(what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match probe() {
            Ok(answer) => return answer,
            Err(reason) if start.elapsed() >= deadline => {
                panic!("waited {:.1} s for {what}; last seen: {reason}", deadline.as_secs_f64())
            }
            Err(_) => std::thread::sleep(POLL_INTERVAL),
        }
    }
}
