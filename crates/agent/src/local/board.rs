//! Where a supervisor hangs out what happens, for any number of watchers who come and go; and where they
//! hang out the one thing that they can ask for: that it stops.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use pgherd_api::Status;
use tokio::sync::{broadcast, watch};

use super::event::Event;

/// Lines that somebody who comes later is shown.
const KEPT_LINES: usize = 100;
/// Events that wait for a slow watcher; older ones it misses, and the next status makes up for that.
const QUEUE: usize = 256;

#[derive(Clone, Debug)]
pub struct Board {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    past: Mutex<Past>,
    events: broadcast::Sender<Event>,
    stop: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Past {
    lines: VecDeque<Event>,
    status: Option<Box<Status>>,
    /// `Healthy`, and the last event of all.
    marks: Vec<Event>,
}

impl Default for Board {
    fn default() -> Board {
        let shared = Shared {
            past: Mutex::default(),
            events: broadcast::Sender::new(QUEUE),
            stop: watch::Sender::new(false),
        };
        Board { shared: Arc::new(shared) }
    }
}

impl Board {
    pub(super) fn tell(&self, event: Event) {
        let mut past = self.shared.past.lock().unwrap_or_else(PoisonError::into_inner);
        match &event {
            Event::Step { .. } | Event::Trouble { .. } => {
                past.lines.push_back(event.clone());
                if past.lines.len() > KEPT_LINES {
                    past.lines.pop_front();
                }
            }
            Event::Status { status } => past.status = Some(status.clone()),
            Event::Healthy { .. } | Event::Stopping | Event::Stopped | Event::Failed { .. } => {
                past.marks.push(event.clone());
            }
        }
        // Nobody watching is no failure. Sent under the lock, so that a newcomer misses nothing.
        let _watchers = self.shared.events.send(event);
    }

    /// How things stand, and from then on everything. How they came to stand so is told only while the herd is
    /// not healthy yet: then it is what somebody waits for.
    pub fn watch(&self) -> Subscription {
        let past = self.shared.past.lock().unwrap_or_else(PoisonError::into_inner);
        let status = past.status.clone().map(|status| Event::Status { status });
        let healthy = past.marks.iter().any(|mark| matches!(mark, Event::Healthy { .. }));
        let lines = past.lines.iter().filter(|_| !healthy).cloned();
        let missed = lines.chain(status).chain(past.marks.iter().cloned()).collect();
        Subscription { missed, events: self.shared.events.subscribe() }
    }

    /// Asks for a planned stop. Once asked, it is not taken back.
    pub fn stop(&self) {
        self.shared.stop.send_replace(true);
    }

    pub(super) async fn asked_to_stop(&self) {
        let mut stop = self.shared.stop.subscribe();
        if stop.wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// One watcher's view of the board.
#[derive(Debug)]
pub struct Subscription {
    missed: VecDeque<Event>,
    events: broadcast::Receiver<Event>,
}

impl Subscription {
    /// The next event; `None` when the supervisor is gone.
    pub async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.missed.pop_front() {
            return Some(event);
        }
        loop {
            match self.events.recv().await {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_latecomer_is_told_what_was() {
        let board = Board::default();
        let mut early = board.watch();
        board.tell(Event::step(&"a", "initdb"));
        let mut late = board.watch();
        board.tell(Event::Healthy { after_ms: 5 });
        let mut later = board.watch();
        board.tell(Event::Stopped);
        for watcher in [&mut early, &mut late] {
            assert_eq!(watcher.next().await, Some(Event::step(&"a", "initdb")));
            assert_eq!(watcher.next().await, Some(Event::Healthy { after_ms: 5 }));
            assert_eq!(watcher.next().await, Some(Event::Stopped));
        }
        assert_eq!(later.next().await, Some(Event::Healthy { after_ms: 5 }));
        assert_eq!(later.next().await, Some(Event::Stopped));
        drop(board);
        assert_eq!(early.next().await, None);
    }

    #[tokio::test]
    async fn a_wish_to_stop_is_not_missed() {
        let board = Board::default();
        board.stop();
        board.asked_to_stop().await;
    }
}
