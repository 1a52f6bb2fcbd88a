//! An operator wants what has changed outside of the proxy to be taken over, and hears what came of it.
//!
//! Leaves out what that is and how it is done: whoever runs the proxy knows.

use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};

use crate::timer::timeout;

/// Operators who wait at a time.
const MOST: usize = 16;
/// For so long one waits for the outcome: agents that do not answer are given up before.
const WITHIN: Duration = Duration::from_secs(15);

/// To be answered by whoever has taken it.
#[derive(Debug)]
pub struct Reload(oneshot::Sender<Result<(), String>>);

impl Reload {
    /// An error says what was not taken over, and why.
    pub fn done(self, outcome: Result<(), String>) {
        // Whoever has left meanwhile needs no answer.
        drop(self.0.send(outcome));
    }
}

#[derive(Debug)]
pub(crate) struct Reloads {
    wanted: mpsc::Sender<Reload>,
    taken: Mutex<mpsc::Receiver<Reload>>,
}

impl Default for Reloads {
    fn default() -> Reloads {
        let (wanted, taken) = mpsc::channel(MOST);
        Reloads { wanted, taken: Mutex::new(taken) }
    }
}

impl Reloads {
    /// `None`: nobody has answered in time.
    pub(crate) async fn ask(&self) -> Option<Result<(), String>> {
        let (sender, answer) = oneshot::channel();
        self.wanted.try_send(Reload(sender)).ok()?;
        timeout(WITHIN, answer).await.ok()?.ok()
    }

    pub(crate) async fn next(&self) -> Reload {
        match self.taken.lock().await.recv().await {
            Some(reload) => reload,
            // Never: the sender lives as long as this.
            None => std::future::pending().await,
        }
    }
}
