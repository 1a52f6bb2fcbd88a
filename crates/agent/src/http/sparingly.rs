//! Warnings that a stranger can cause as often as he likes: one a minute, with the number of those left out.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// One for each kind of warning; clones count together.
#[derive(Clone, Default)]
pub(super) struct Sparingly(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    last: Option<Instant>,
    left_out: u64,
}

impl Sparingly {
    pub(super) fn warn(&self, message: fmt::Arguments<'_>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| last.elapsed() < WARN_INTERVAL) {
            state.left_out += 1;
            return;
        }
        tracing::warn!(left_out = state.left_out, "{message}");
        *state = State { last: Some(Instant::now()), left_out: 0 };
    }
}
