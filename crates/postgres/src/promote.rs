//! A standby becomes the primary, on the timeline that was reserved for it.
//!
//! Order, and what each step is there for:
//! 1. The decided list is written and proven loaded ([`crate::sync_names`]): no commit may pass it by.
//! 2. A note says that a promotion is under way, so that an agent that comes back knows: it cannot be withdrawn,
//!    and one that comes late is a second primary (S13).
//! 3. Every lower number gets a history file, so that PostgreSQL takes the reserved one (S3).
//! 4. The gate is closed, which a standby's readers came in by, and sessions are ended: what they would read or
//!    write afterwards is not on enough nodes yet (rule 9), and a reader in conflict with replay holds a promotion
//!    up for as long as it likes.
//! 5. Replay has come to where this node voted for: PostgreSQL that is asked between two looks at `pg_wal` leaves recovery without a third one, and
//!    without the WAL that was put there meanwhile.
//!    Then the trigger, without SQL: a file and a signal.
//! 6. `standby.signal` is put back and synced as soon as PostgreSQL has removed it (rule 7).
//! 7. The number and the fork are compared with what was decided. A primary that took another number, or lacks
//!    what the node voted for, is killed before anybody is let in.
//! 8. WAL goes on beyond everything that a standby which connected before the promotion can have flushed. What this
//!    node had received may end in the middle of a record, behind the fork; its WAL senders have passed that on, and
//!    go on showing it as flushed until their standbys answer for the first time on the new timeline. So only what
//!    lies behind it proves anything.
//!
//! Leaves out: opening the gate again. Hazard: everything that an election is about.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use pgherd_core::types::{Lsn, Timeline};
use rustix::process::Signal;

use crate::conf::SyncNames;
use crate::control::{ControlFile, State};
use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::hba::{self, Gate, HbaError, Rules};
use crate::instance::Instance;
use crate::process::{GoneError, Server, ensure_gone};
use crate::receivers::{self, Kind};
use crate::roles;
use crate::sql::{Session, first_field};
use crate::sync_names::{self, SyncError};
use crate::wal::history::{self, History, ReserveError};
use crate::wal::{self, Boundary, EndOfWal};

const FILES: Duration = Duration::from_secs(10);
/// The steps of a promotion take milliseconds each.
const POLL: Duration = Duration::from_millis(1);
/// Sessions that come back are ended again this often.
const END_SESSIONS_EVERY: Duration = Duration::from_millis(20);
/// For so long replay may stand still before the end: then it does not read the rest, or not yet, and is asked as it is.
const REPLAY_STANDS: Duration = Duration::from_secs(2);
/// For killing a server that must not be.
const KILL: Duration = Duration::from_secs(10);

/// What was decided. Leaves no choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The number that the new timeline must get.
    pub timeline: Timeline,
    /// What this node voted for: the fork may not lie before it.
    pub at_least: Lsn,
    pub names: SyncNames,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promoted {
    pub timeline: Timeline,
    /// The timeline that was left, and where: what the old term had.
    pub forked_from: Timeline,
    pub fork: Lsn,
    /// The end of WAL as it stood after the promotion: what the gate waits for (rule 9).
    pub end: Lsn,
    pub sessions_ended: usize,
    pub took: Took,
}

/// Where the time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Took {
    pub list: Duration,
    /// From the trigger to the primary that takes writes.
    pub promotion: Duration,
    pub total: Duration,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromoteError {
    #[error("not promoted: {0}")]
    List(#[from] SyncError),

    #[error("not promoted: {0}")]
    Reserve(#[from] ReserveError),

    #[error("not promoted: the gate cannot be closed: {0}")]
    Gate(#[from] HbaError),

    #[error("not promoted: PostgreSQL is not in recovery")]
    NotAStandby,

    #[error("PostgreSQL ended while it was promoted")]
    Died,

    #[error("the promotion had not ended after {} ms; PostgreSQL was killed, so that it does not come late", .after.as_millis())]
    TooSlow { after: Duration },

    #[error("PostgreSQL took timeline {found}, and {reserved} was reserved; it was killed")]
    WrongTimeline { found: Timeline, reserved: Timeline },

    #[error("PostgreSQL was promoted at {fork}, and this node voted for {voted}; it was killed")]
    FellShort { fork: Lsn, voted: Lsn },

    #[error("a server that must not run could not be killed: {0}")]
    NotGone(#[from] GoneError),

    #[error(transparent)]
    Other(#[from] Error),
}

/// Promotes a sealed standby. Whatever fails once the trigger was given ends with the server killed, so that no
/// promotion comes late: `server.is_dead()` tells.
pub async fn promote(server: &Server, order: &Order, deadline: Duration) -> Result<Promoted, PromoteError> {
    let began = Instant::now();
    let instance = server.instance();
    let before = read_control(instance).await?;
    if !matches!(before.state, State::InArchiveRecovery | State::ShutDownInRecovery | State::StartingUp) {
        return Err(PromoteError::NotAStandby);
    }

    let listed = async {
        // Both files are written before the one reload, and one session shows that both were read.
        sync_names::put(instance, &order.names).await?;
        hba::put(instance, Gate::Closed, &Rules::default()).await?;
        let asked = SystemTime::now();
        server.reload()?;
        let session = sync_names::prove(server, &order.names, deadline).await?;
        let Standing { loaded, received, replayed } = standing(&session).await?;
        if loaded < asked {
            hba::set(server, Gate::Closed, &Rules::default(), deadline).await?;
        }
        Ok((began.elapsed(), received, replayed))
    };
    let reserved = {
        let (instance, reserved) = (instance.clone(), order.timeline);
        blocking("reserving a timeline", FILES, move || {
            let current = newest_timeline(&instance)?;
            history::reserve(&instance.pg_wal(), current, reserved)?;
            // Not synced: it is for an agent that dies, and a machine that dies takes the promotion with it.
            let note = note_path(&instance);
            std::fs::write(&note, format!("{reserved}\n")).map_err(Error::io("write", note))?;
            Ok::<_, PromoteError>(())
        })
    };
    // Both to their end: a write that is left to itself would race with that of the next attempt.
    let (listed, reserved) = tokio::join!(listed, reserved);
    let (list, received, replayed) = match reserved.and(listed) {
        Ok(listed) => listed,
        Err(error) => {
            let instance = instance.clone();
            blocking("giving up a promotion", FILES, move || forget_pending(&instance)).await?;
            return Err(error);
        }
    };

    let promoted = async {
        if replayed < order.at_least {
            see_replayed(server, order.at_least, deadline).await?;
        }
        let promoted = after_trigger(server, order, deadline).await?;
        let end = write_beyond(instance, received, promoted.end, deadline).await?;
        Ok::<_, PromoteError>(Promoted { end, ..promoted })
    };
    match promoted.await {
        Ok(promoted) => {
            Ok(Promoted { took: Took { list, total: began.elapsed(), ..promoted.took }, ..promoted })
        }
        Err(error) => {
            ensure_gone(instance, KILL).await?;
            let instance = instance.clone();
            blocking("ending a promotion", FILES, move || forget_pending(&instance)).await?;
            Err(error)
        }
    }
}

async fn after_trigger(server: &Server, order: &Order, deadline: Duration) -> Result<Promoted, PromoteError> {
    let instance = server.instance();
    let triggered = Instant::now();
    let mut ended = BTreeSet::new();
    end_sessions(server, &mut ended).await?;
    let trigger = instance.data_dir.join("promote");
    std::fs::write(&trigger, "").map_err(Error::io("create", &trigger))?;
    server.signal(Signal::USR1)?;

    let control = wait(server, triggered, deadline, &mut ended).await?;
    let promotion = triggered.elapsed();
    let (forked_from, fork, end) = check(instance, &control, order).await?;
    {
        let instance = instance.clone();
        blocking("ending a promotion", FILES, move || {
            // Whatever removed it, and whenever: a primary without it would come back as one by itself.
            durable::touch(&instance.standby_signal())?;
            forget_pending(&instance)
        })
        .await?;
    }
    let took = Took { promotion, ..Took::default() };
    Ok(Promoted {
        timeline: order.timeline,
        forked_from,
        fork,
        end: end.lsn,
        sessions_ended: ended.len(),
        took,
    })
}

/// Waits until replay has come to the end that was voted for, or stands still. Readers who hold it up are ended, as behind the trigger.
async fn see_replayed(server: &Server, at_least: Lsn, deadline: Duration) -> Result<()> {
    let began = Instant::now();
    // By the role whose sessions are not ended here.
    let Ok(session) = Session::local(server.instance(), roles::MONITOR, deadline).await else {
        return Ok(());
    };
    let (mut last, mut moved) = (Lsn::ZERO, began);
    let (mut ended, mut sessions_ended) = (BTreeSet::new(), None::<Instant>);
    while began.elapsed() < deadline && moved.elapsed() < REPLAY_STANDS {
        // What cannot be told is left to the trigger, behind which the end is compared.
        let Ok(answer) = session.simple_query("SELECT pg_catalog.pg_last_wal_replay_lsn()").await else {
            return Ok(());
        };
        let replayed = first_field(&answer, 0).and_then(|lsn| lsn.parse().ok()).unwrap_or_default();
        if replayed >= at_least {
            return Ok(());
        }
        if replayed > last {
            (last, moved) = (replayed, Instant::now());
        }
        if sessions_ended.is_none_or(|at| at.elapsed() >= END_SESSIONS_EVERY) {
            end_sessions(server, &mut ended).await?;
            sessions_ended = Some(Instant::now());
        }
        tokio::time::sleep(POLL).await;
    }
    tracing::info!(replayed = %last, %at_least, "replay stands still before the end that was voted for");
    Ok(())
}

struct Standing {
    /// When the postmaster last read its files, before it began this session.
    loaded: SystemTime,
    /// Up to where this standby has WAL for those who stream from it, whole records or not.
    received: Lsn,
    replayed: Lsn,
}

/// Ends a pause of replay, too: the trigger would do that as well, but only when PostgreSQL next looks, which it does once a second.
async fn standing(session: &Session) -> Result<Standing> {
    let query = "SELECT (extract(epoch FROM pg_catalog.pg_conf_load_time()) * 1000000)::bigint, \
                 greatest(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn()), \
                 pg_catalog.pg_last_wal_replay_lsn(), \
                 CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_wal_replay_resume() END";
    let answer =
        session.simple_query(query).await.map_err(Error::sql("tell what it has loaded and received"))?;
    let micros = first_field(&answer, 0).and_then(|micros| micros.parse().ok()).unwrap_or_default();
    let lsn = |column| first_field(&answer, column).and_then(|lsn| lsn.parse().ok()).unwrap_or_default();
    let loaded = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
    Ok(Standing { loaded, received: lsn(1), replayed: lsn(2) })
}

/// Writes so much WAL, if `end` does not lie behind `received` anyway, and returns where it ends then.
async fn write_beyond(instance: &Instance, received: Lsn, end: Lsn, deadline: Duration) -> Result<Lsn> {
    if end > received {
        return Ok(end);
    }
    // Every session from before was ended.
    let session = Session::local(instance, roles::SUPERUSER, deadline).await?;
    // With its commit it reaches the disk, which is what standbys are sent; it must not wait for them.
    session.batch_execute("SET synchronous_commit = local").await.map_err(Error::sql("write WAL"))?;
    let bytes = i32::try_from(received.bytes_since(end) + 1).unwrap_or(i32::MAX);
    let query = "SELECT pg_catalog.pg_logical_emit_message(true, 'pgherd', pg_catalog.repeat('.', $1))::text";
    let row = session.query_one(query, &[&bytes]).await.map_err(Error::sql("write WAL"))?;
    let written: Lsn = row.get::<_, String>(0).parse().unwrap_or(end);
    tracing::debug!(%received, %end, %written, "went on beyond what standbys may have flushed");
    Ok(written)
}

/// The timeline of a promotion that was begun and is not known to have ended: by an agent that died meanwhile. The
/// node may neither follow nor vote before it has ended or PostgreSQL was stopped (rule 8). Blocks.
pub fn pending(instance: &Instance) -> Result<Option<Timeline>> {
    let text = durable::read_text(&note_path(instance))?;
    Ok(text.and_then(|text| text.trim().parse().ok()).map(Timeline))
}

/// Ends a promotion that an earlier agent began: waits for it as [`promote`] would have, and puts `standby.signal` back.
/// Returns the control file of the primary; whether its timeline is the decided one is for the caller. Whatever fails
/// ends with the server killed.
pub async fn settle(server: &Server, deadline: Duration) -> Result<ControlFile, PromoteError> {
    let instance = server.instance();
    let settled = match wait(server, Instant::now(), deadline, &mut BTreeSet::new()).await {
        Ok(control) => {
            let kept = instance.clone();
            blocking("ending a promotion", FILES, move || durable::touch(&kept.standby_signal())).await?;
            Ok(control)
        }
        Err(error) => {
            ensure_gone(instance, KILL).await?;
            Err(error)
        }
    };
    let instance = instance.clone();
    blocking("ending a promotion", FILES, move || forget_pending(&instance)).await?;
    settled
}

/// Forgets a begun promotion; only when PostgreSQL is stopped, or was seen to have ended it. Blocks.
pub fn forget_pending(instance: &Instance) -> Result<()> {
    durable::remove(&note_path(instance)).map(drop)
}

async fn wait(
    server: &Server,
    triggered: Instant,
    deadline: Duration,
    ended: &mut BTreeSet<i32>,
) -> Result<ControlFile, PromoteError> {
    let instance = server.instance();
    let mut sessions_ended = Instant::now();
    loop {
        if !instance.standby_signal().exists() {
            let instance = instance.clone();
            blocking("putting standby.signal back", FILES, move || {
                durable::touch(&instance.standby_signal())
            })
            .await?;
        }
        let control = read_control(instance).await?;
        if control.state == State::InProduction {
            return Ok(control);
        }
        if server.is_dead() {
            return Err(PromoteError::Died);
        }
        if triggered.elapsed() >= deadline {
            return Err(PromoteError::TooSlow { after: deadline });
        }
        if sessions_ended.elapsed() >= END_SESSIONS_EVERY {
            end_sessions(server, ended).await?;
            sessions_ended = Instant::now();
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Ends every session but pgherd's own.
async fn end_sessions(server: &Server, ended: &mut BTreeSet<i32>) -> Result<()> {
    for (kind, seen) in receivers::children(server, FILES).await? {
        if kind == Kind::Session
            && let Some(process) = receivers::hold(&seen)?
            && process.signal(Signal::TERM)?
        {
            ended.insert(process.pid.as_raw_nonzero().get());
        }
    }
    Ok(())
}

async fn check(
    instance: &Instance,
    control: &ControlFile,
    order: &Order,
) -> Result<(Timeline, Lsn, EndOfWal), PromoteError> {
    let (control, order, instance) = (control.clone(), order.clone(), instance.clone());
    blocking("checking a promotion", FILES, move || {
        let found = control.timeline();
        let history = History::read(&instance.pg_wal(), found)?;
        let Some(fork) =
            history.as_ref().and_then(|history| history.forks().last()).filter(|_| found == order.timeline)
        else {
            return Err(PromoteError::WrongTimeline { found, reserved: order.timeline });
        };
        if fork.end < order.at_least {
            return Err(PromoteError::FellShort { fork: fork.end, voted: order.at_least });
        }
        let known = Boundary { timeline: found, lsn: fork.end };
        Ok((fork.timeline, fork.end, wal::end_of_wal(&instance, Some(known))?))
    })
    .await
}

/// The timeline that PostgreSQL counts on from: the newest that it follows.
fn newest_timeline(instance: &Instance) -> Result<Timeline> {
    let control = ControlFile::read(&instance.control_file())?;
    let followed = History::newest_from(&instance.pg_wal(), control.timeline(), control.checkpoint)?;
    Ok(followed.timeline())
}

async fn read_control(instance: &Instance) -> Result<ControlFile> {
    let path = instance.control_file();
    blocking("reading pg_control", FILES, move || ControlFile::read(&path)).await
}

fn note_path(instance: &Instance) -> std::path::PathBuf {
    instance.private_dir.join("promoting")
}
