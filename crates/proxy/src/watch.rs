//! Ends what lasts too long, where the operator has said how long that is.
//!
//! Hazard: work that was fast is ended, since what came before it was not told apart from it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::session::{Doing, Session};
use crate::timer::{Sleep, sleep_until};
use crate::world::Timeouts;

/// What has lasted too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overdue {
    Idle,
    IdleInTransaction,
    Transaction,
    Query,
}

pub(crate) struct Watch {
    timeouts: Timeouts,
    doing: Doing,
    since: Instant,
    /// Of the transaction, and which one that is.
    open_since: Instant,
    transaction: u64,
    sleep: Pin<Box<Sleep>>,
}

impl Watch {
    /// `None`: nothing can be overdue.
    pub(crate) fn new(timeouts: Timeouts) -> Option<Watch> {
        let now = Instant::now();
        (timeouts != Timeouts::default()).then(|| Watch {
            timeouts,
            doing: Doing::default(),
            since: now,
            open_since: now,
            transaction: 0,
            sleep: Box::pin(sleep_until(now)),
        })
    }

    pub(crate) fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// Nothing was watched for a while.
    pub(crate) fn begin(&mut self) {
        (self.since, self.open_since) = (Instant::now(), Instant::now());
    }

    /// Wakes the task when there may be something.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, session: &Session) -> Poll<Overdue> {
        let (now, doing) = (Instant::now(), session.doing());
        if doing != self.doing {
            if doing.transaction() != self.transaction || self.doing.is_idle() {
                (self.transaction, self.open_since) = (doing.transaction(), now);
            }
            (self.doing, self.since) = (doing, now);
        }
        let at = |since: Instant, within: Option<Duration>, what| within.map(|within| (since + within, what));
        let Timeouts { idle, idle_transaction, transaction, query } = self.timeouts;
        let first = match doing {
            Doing::Idle { .. } => [at(self.since, idle, Overdue::Idle), None],
            Doing::IdleInTransaction { .. } => [
                at(self.since, idle_transaction, Overdue::IdleInTransaction),
                at(self.open_since, transaction, Overdue::Transaction),
            ],
            Doing::Waits { .. } => [
                at(self.since, query, Overdue::Query),
                at(self.open_since, transaction, Overdue::Transaction),
            ],
        };
        let Some((when, what)) = first.into_iter().flatten().min_by_key(|(when, _)| *when) else {
            return Poll::Pending;
        };
        if self.sleep.deadline() != when {
            self.sleep.as_mut().reset(when);
        }
        self.sleep.as_mut().poll(cx).map(|()| what)
    }
}
