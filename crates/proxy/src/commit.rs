//! How the outcome of a COMMIT is found that was lost with its server.
//!
//! Before a transaction that has written something commits, its server is asked for what it is known by afterwards ([`Mark`]):
//! that is a round trip more, and the reason why nobody has it who has not asked for it. If no answer to the COMMIT comes,
//! the primary of that time is asked for the transaction's number (`pg_xact_status`, manual 9.27.9). Two things make
//! that answer true:
//!
//! - **A number may be somebody else's.** What the former primary had sent to nobody its successor does not know, and it gives the
//!   same number to the next transaction. Where the history of the successor left the former one decides it: whatever the
//!   transaction had written lies before the position in its mark, and its commit behind that. History that was left before
//!   it has no such commit. History that was left behind it has seen the number, and gives it to nobody else. Within one
//!   term a server that was started again may have forgotten what it had not flushed, so that it must be the same start;
//!   with `restart_after_crash` off, as a herd has it, that is a start of the postmaster.
//! - **What has committed may still be on one server alone**, as when the wait for standbys was ended. So something is committed
//!   behind it, synchronously: WAL is in order, and what lies before it is as safe.
//!
//! Leaves out what a client hears then. Hazard: a client that hears of a commit that is not there repeats nothing, and one
//! that hears of a rollback does its work twice.

use std::sync::Arc;
use std::time::Duration;

use pgherd_core::types::{Lsn, Term};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::message::TransactionStatus;

use crate::backend::{Backend, NotDone};
use crate::client::{Left, Wants, begin, gone};
use crate::clock;
use crate::fence::Verdict;
use crate::net::Stream;
use crate::routes::Role;
use crate::session::Session;
use crate::settings::Values;
use crate::timer;
use crate::world::World;

/// What is not decided yet is asked again after this.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
const MARK_WITHIN: Duration = Duration::from_secs(10);
/// Three rows of one value. Nothing is found by a search path, or shown as a setting of the client's has it.
const MARK: &[u8] = b"VALUES (pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text), \
    (pg_catalog.pg_current_wal_insert_lsn()::pg_catalog.text), \
    (EXTRACT(EPOCH FROM pg_catalog.pg_postmaster_start_time())::pg_catalog.text)";
const STATUS: &[u8] = b"VALUES (pg_catalog.pg_xact_status($1::pg_catalog.text::pg_catalog.xid8)), \
    (EXTRACT(EPOCH FROM pg_catalog.pg_postmaster_start_time())::pg_catalog.text)";
/// It has a number of its own, and something is written: a commit without that waits for nobody.
const SECURE: &[u8] =
    b"SELECT pg_catalog.pg_logical_emit_message(true, 'pgherd', ''::pg_catalog.text)::pg_catalog.text";

/// What a transaction that is about to commit is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    term: Term,
    number: String,
    /// What it has written lies before this, and its commit behind it.
    lsn: Lsn,
    /// Since when the server ran, in seconds.
    started: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// And it is as safe as any.
    Committed,
    RolledBack,
    /// It may still commit, or its commit is not safe yet.
    Open,
    Unknown,
}

/// Of one client: whether commits are looked after, and how far that is.
#[derive(Debug, Default)]
pub(crate) enum Check {
    #[default]
    Off,
    On,
    /// What comes next commits, and its server is to be asked before.
    Due,
    /// It was. `None`: it has written nothing.
    Marked(Option<Box<Mark>>),
}

impl Check {
    pub(crate) fn new(is_on: bool) -> Check {
        if is_on { Check::On } else { Check::Off }
    }

    /// Must the server be asked before it gets this?
    pub(crate) fn must_ask(&mut self, session: &Session, unread: &[u8]) -> bool {
        let is_due = matches!(self, Check::On)
            && session.lull() == Some(TransactionStatus::InTransaction)
            && session.commits(unread);
        if is_due {
            *self = Check::Due;
        }
        is_due
    }

    pub(crate) fn is_due(&self) -> bool {
        matches!(self, Check::Due)
    }

    pub(crate) fn is_marked(&self) -> bool {
        matches!(self, Check::Marked(_))
    }

    pub(crate) fn marked(&mut self, mark: Option<Mark>) {
        *self = Check::Marked(mark.map(Box::new));
    }

    /// The server has answered what was asked of it. `true`: that was the commit.
    pub(crate) fn answered(&mut self) -> bool {
        let was_marked = self.is_marked();
        if was_marked {
            *self = Check::On;
        }
        was_marked
    }

    /// What was under way is lost.
    pub(crate) fn take(&mut self) -> Option<Mark> {
        match std::mem::take(self) {
            Check::Marked(mark) => mark.map(|mark| *mark),
            _ => None,
        }
    }
}

/// Asks a server in the middle of a transaction. `None`: it has written nothing, or not so that anybody could tell.
pub(crate) async fn mark(backend: &mut Backend) -> Result<Option<Mark>, NotDone> {
    let mut rows = backend.values_in(TransactionStatus::InTransaction, MARK, MARK_WITHIN).await?.into_iter();
    let mut next = || rows.next().flatten();
    let (number, lsn, started) = (next(), next(), next());
    let text = |bytes| String::from_utf8(bytes).ok();
    Ok((|| {
        Some(Mark {
            term: backend.place.term,
            number: text(number?)?,
            lsn: text(lsn?)?.parse().ok()?,
            started: text(started?)?,
        })
    })())
}

/// Can it have committed in the history of this term's primary? `fork`: where that left the mark's, if it is another one, as far as
/// that is known. `None`: it can, and its number is its own.
fn by_history(mark: &Mark, term: Term, fork: Option<Lsn>) -> Option<Outcome> {
    match fork {
        _ if term == mark.term => None,
        Some(fork) if fork <= mark.lsn => Some(Outcome::RolledBack),
        Some(_) => None,
        None => Some(Outcome::Unknown),
    }
}

/// What a server says of a transaction that is its own, or whose history it has.
fn by_status(mark: &Mark, term: Term, status: Option<&[u8]>, started: Option<&[u8]>) -> Outcome {
    if term == mark.term && started != Some(mark.started.as_bytes()) {
        return Outcome::Unknown;
    }
    match status {
        Some(b"committed") => Outcome::Committed,
        Some(b"aborted") => Outcome::RolledBack,
        Some(b"in progress") => Outcome::Open,
        // It is too old.
        _ => Outcome::Unknown,
    }
}

/// Asks the primary of this time, in a session whose commits are synchronous. What it says counts as long as it is the primary.
pub(crate) async fn outcome(
    mark: &Mark,
    backend: &mut Backend,
    fork: Option<Lsn>,
    within: Duration,
) -> Result<Outcome, NotDone> {
    let term = backend.place.term;
    if let Some(outcome) = by_history(mark, term, fork) {
        return Ok(outcome);
    }
    let rows = match backend.values(STATUS, &[Some(&mark.number)], within).await {
        Ok(rows) => rows,
        // "transaction ID … is in the future": nothing of it has come here, its commit least of all.
        Err(NotDone::Refused { sqlstate: SqlState::INVALID_PARAMETER_VALUE, .. }) if term != mark.term => {
            return Ok(Outcome::RolledBack);
        }
        Err(error) => return Err(error),
    };
    let mut rows = rows.iter().map(Option::as_deref);
    let (status, started) = (rows.next().flatten(), rows.next().flatten());
    let outcome = by_status(mark, term, status, started);
    if outcome == Outcome::Committed {
        backend.values_in(TransactionStatus::Idle, SECURE, within).await?;
    }
    Ok(outcome)
}

/// Looks a lost commit up, as long as clients wait for a primary. `settings`: those of the client. Whoever leaves meanwhile need not
/// hear of it.
pub(crate) async fn look_up(
    mark: &Mark,
    stream: &Stream,
    wants: &Wants,
    settings: &Values,
    world: &Arc<World>,
) -> Result<Outcome, Left> {
    let settings = Arc::new(settings.with("synchronous_commit", "on"));
    let (pool, asked) = (wants.pool(&Role::Primary, world), clock::now());
    let left = || world.settings.load().limits.hold.saturating_sub(clock::now().since(asked));
    while !left().is_zero() {
        let lent = tokio::select! {
            biased;
            lent = wants.lend(&pool, world) => lent,
            left = gone(stream, &wants.card) => return Err(left),
        };
        // It has waited for a primary as long as any client does.
        let Ok(lent) = lent else { break };
        // Others that were idle at the same server are as lost.
        let Ok(mut lent) = begin(&pool, lent, &settings, false, world).await else { continue };
        let fork = world.fence.fork(mark.term, lent.backend.place.term);
        let found = outcome(mark, &mut lent.backend, fork, left()).await;
        let verdict = pool.admission(lent.server, &lent.backend, world).verdict();
        match &found {
            Err(NotDone::Lost(why)) => {
                tracing::info!(why, "a server was lost while it was asked for a commit");
                pool.gone(lent.server, world);
            }
            Ok(_) | Err(NotDone::Refused { .. }) => pool.give_back(lent, true, world),
        }
        match found {
            Ok(outcome @ (Outcome::Committed | Outcome::RolledBack | Outcome::Unknown))
                if matches!(verdict, Verdict::Admitted | Verdict::Draining) =>
            {
                return Ok(outcome);
            }
            Err(NotDone::Refused { sqlstate, message }) => {
                tracing::warn!(%sqlstate, message, "a server does not tell what became of a commit");
                break;
            }
            Ok(_) => timer::sleep(AGAIN_AFTER).await,
            Err(NotDone::Lost(_)) => {}
        }
    }
    Ok(Outcome::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark() -> Mark {
        Mark { term: Term(4), number: "731".to_owned(), lsn: Lsn(1000), started: "1.5".to_owned() }
    }

    #[test]
    fn history_that_was_left_before_the_commit_does_not_have_it() {
        assert_eq!(by_history(&mark(), Term(4), None), None, "the same primary");
        assert_eq!(by_history(&mark(), Term(5), Some(Lsn(999))), Some(Outcome::RolledBack));
        assert_eq!(by_history(&mark(), Term(5), Some(Lsn(1000))), Some(Outcome::RolledBack));
        assert_eq!(by_history(&mark(), Term(5), Some(Lsn(1001))), None);
        assert_eq!(by_history(&mark(), Term(7), None), Some(Outcome::Unknown), "too long ago");
    }

    #[test]
    fn a_server_that_was_started_again_knows_nothing_for_certain() {
        let says = |term, status: &'static str, started: &'static str| {
            by_status(&mark(), Term(term), Some(status.as_bytes()), Some(started.as_bytes()))
        };
        assert_eq!(says(4, "committed", "1.5"), Outcome::Committed);
        assert_eq!(says(4, "aborted", "1.5"), Outcome::RolledBack);
        assert_eq!(says(4, "in progress", "1.5"), Outcome::Open);
        for status in ["committed", "aborted", "in progress"] {
            assert_eq!(says(4, status, "1.6"), Outcome::Unknown);
        }
        assert_eq!(says(5, "committed", "1.6"), Outcome::Committed, "another one always has another start");
        assert_eq!(by_status(&mark(), Term(5), None, Some(b"1.6")), Outcome::Unknown);
    }
}
