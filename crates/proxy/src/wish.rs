//! What an operator wants of whoever runs the proxy, who hears what came of it.
//!
//! Leaves out how it is done: the proxy knows nothing of agents.

use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};

use crate::timer::timeout;

/// Operators who wait at a time.
const MOST: usize = 16;
/// For so long one waits for the outcome: agents that do not answer are given up before.
const WITHIN: Duration = Duration::from_secs(15);

/// To be answered by whoever has taken it.
#[derive(Debug)]
pub struct Wish<T, E> {
    pub what: T,
    answer: oneshot::Sender<Result<(), E>>,
}

impl<T, E> Wish<T, E> {
    pub fn done(self, outcome: Result<(), E>) {
        // Whoever has left meanwhile needs no answer.
        drop(self.answer.send(outcome));
    }
}

/// That what has changed outside of the proxy is taken over. An error says what was not, and why.
pub type Reload = Wish<(), String>;

/// That another node becomes the primary.
pub type Promotion = Wish<Promote, Unwilling>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promote {
    pub to: String,
    /// Who wants it: a role that the proxy has let in.
    pub role: String,
}

/// Why the herd does not do it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwilling {
    pub why: String,
    pub hint: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Wishes<T, E> {
    wanted: mpsc::Sender<Wish<T, E>>,
    taken: Mutex<mpsc::Receiver<Wish<T, E>>>,
}

impl<T, E> Default for Wishes<T, E> {
    fn default() -> Wishes<T, E> {
        let (wanted, taken) = mpsc::channel(MOST);
        Wishes { wanted, taken: Mutex::new(taken) }
    }
}

impl<T, E> Wishes<T, E> {
    /// `None`: nobody has answered in time.
    pub(crate) async fn ask(&self, what: T) -> Option<Result<(), E>> {
        let (sender, answer) = oneshot::channel();
        self.wanted.try_send(Wish { what, answer: sender }).ok()?;
        timeout(WITHIN, answer).await.ok()?.ok()
    }

    pub(crate) async fn next(&self) -> Wish<T, E> {
        match self.taken.lock().await.recv().await {
            Some(wish) => wish,
            // Never: the sender lives as long as this.
            None => std::future::pending().await,
        }
    }
}
