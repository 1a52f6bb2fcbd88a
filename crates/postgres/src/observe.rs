//! Everything that the agent wants to know of a server, in one query on a standing session; probes; heartbeats.
//!
//! An answer is a fact about the past. Each has the moment at which it was asked for, and a caller that counts time
//! counts from there. Unknown is `None`, never zero.
//!
//! Leaves out: what follows from it. Hazard: a heartbeat whose wait was cancelled comes back like one that was
//! acknowledged, but for a warning (S6); it is told apart by the routine that reported it, whatever the language.

use std::time::{Duration, SystemTime};

use pgherd_core::types::{Lsn, SystemId, Timeline};
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use crate::error::{Error, Result, within};
use crate::instance::Instance;
use crate::roles;
use crate::slots::WalStatus;
use crate::sql::{Remote, Session};

/// What PostgreSQL says of a role that does not exist, as of one that may not log in.
const NO_SUCH_ROLE: SqlState = SqlState::INVALID_AUTHORIZATION_SPECIFICATION;
/// The routine in PostgreSQL that waits for standbys, and that warns when its wait was cancelled.
const SYNC_REP_WAIT: &str = "SyncRepWaitForLSN";
/// What pgherd's messages in WAL begin with.
const MESSAGE_PREFIX: &str = "pgherd";

/// A server as it saw itself.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct View {
    pub in_recovery: bool,
    #[serde(with = "as_text")]
    pub system_id: SystemId,
    /// The timeline that a primary writes; on a standby the one that it receives, or replayed last.
    pub timeline: Timeline,
    /// Primary: what is on its disk.
    #[serde(deserialize_with = "lsn")]
    pub flush_lsn: Option<Lsn>,
    #[serde(deserialize_with = "lsn")]
    pub insert_lsn: Option<Lsn>,
    /// Standby: what was synced since it started to stream; null before.
    #[serde(deserialize_with = "lsn")]
    pub receive_lsn: Option<Lsn>,
    /// Standby: where the last replayed record ends. A [`crate::wal::Boundary`].
    #[serde(deserialize_with = "lsn")]
    pub replay_lsn: Option<Lsn>,
    pub replay_paused: bool,
    /// How long ago the primary wrote what was replayed last. Grows on an idle primary.
    pub replay_age_ms: Option<f64>,
    #[serde(deserialize_with = "epoch")]
    pub started: SystemTime,
    /// The list as a session shows that was opened when this monitor connected, or has reloaded since.
    pub synchronous_standby_names: String,
    pub pending_restart: Vec<String>,
    pub senders: Vec<Sender>,
    pub receiver: Option<Receiver>,
    pub slots: Vec<SlotView>,
    /// Commits that wait for standbys, and for how long the oldest has.
    pub waiting_commits: i64,
    pub oldest_wait_ms: Option<f64>,
    pub sessions: i64,
    pub max_connections: i64,
}

/// A row of `pg_stat_replication` with the certificate and the slot of its connection: a name alone proves nothing.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Sender {
    pub pid: i32,
    pub application_name: String,
    pub address: Option<String>,
    pub role: Option<String>,
    /// The subject of its client certificate.
    pub client_dn: Option<String>,
    /// The slot that this connection uses.
    pub slot: Option<String>,
    pub state: Option<String>,
    pub sync_state: Option<String>,
    pub sync_priority: Option<i32>,
    #[serde(deserialize_with = "lsn")]
    pub sent_lsn: Option<Lsn>,
    #[serde(deserialize_with = "lsn")]
    pub write_lsn: Option<Lsn>,
    #[serde(deserialize_with = "lsn")]
    pub flush_lsn: Option<Lsn>,
    #[serde(deserialize_with = "lsn")]
    pub replay_lsn: Option<Lsn>,
    pub replay_lag_ms: Option<f64>,
    pub reply_age_ms: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Receiver {
    pub pid: i32,
    pub status: Option<String>,
    pub timeline: Option<Timeline>,
    #[serde(deserialize_with = "lsn")]
    pub flushed_lsn: Option<Lsn>,
    pub sender_host: Option<String>,
    pub sender_port: Option<i32>,
    pub slot: Option<String>,
    pub message_age_ms: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SlotView {
    pub name: String,
    pub logical: bool,
    pub active_pid: Option<i32>,
    #[serde(deserialize_with = "lsn")]
    pub restart_lsn: Option<Lsn>,
    #[serde(deserialize_with = "wal_status")]
    pub wal_status: Option<WalStatus>,
}

/// One row, one column of JSON: cheaper to prepare once than six statements, and all of one snapshot.
const VIEW: &str = r#"
SELECT json_build_object(
  'in_recovery', r.in_recovery,
  'system_id', (SELECT system_identifier::text FROM pg_control_system()),
  'timeline', CASE WHEN r.in_recovery
      THEN greatest((SELECT max(received_tli) FROM pg_stat_wal_receiver),
                    (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
                    (SELECT timeline_id FROM pg_control_checkpoint()))
      ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END,
  'flush_lsn', CASE WHEN r.in_recovery THEN NULL ELSE pg_current_wal_flush_lsn() END,
  'insert_lsn', CASE WHEN r.in_recovery THEN NULL ELSE pg_current_wal_insert_lsn() END,
  'receive_lsn', pg_last_wal_receive_lsn(),
  'replay_lsn', CASE WHEN r.in_recovery THEN pg_last_wal_replay_lsn() END,
  'replay_paused', CASE WHEN r.in_recovery THEN pg_is_wal_replay_paused() ELSE false END,
  'replay_age_ms', CASE WHEN r.in_recovery
      THEN extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) * 1000 END,
  'started', extract(epoch FROM pg_postmaster_start_time()),
  'synchronous_standby_names', current_setting('synchronous_standby_names'),
  'pending_restart', (SELECT coalesce(json_agg(name ORDER BY name), '[]') FROM pg_settings WHERE pending_restart),
  'senders', (SELECT coalesce(json_agg(json_build_object(
        'pid', w.pid, 'application_name', w.application_name, 'address', host(w.client_addr), 'role', w.usename,
        'client_dn', t.client_dn, 'slot', s.slot_name, 'state', w.state, 'sync_state', w.sync_state,
        'sync_priority', w.sync_priority, 'sent_lsn', w.sent_lsn, 'write_lsn', w.write_lsn,
        'flush_lsn', w.flush_lsn, 'replay_lsn', w.replay_lsn,
        'replay_lag_ms', extract(epoch FROM w.replay_lag) * 1000,
        'reply_age_ms', extract(epoch FROM clock_timestamp() - w.reply_time) * 1000)), '[]')
      FROM pg_stat_replication w
      LEFT JOIN pg_stat_ssl t ON t.pid = w.pid
      LEFT JOIN pg_replication_slots s ON s.active_pid = w.pid),
  'receiver', (SELECT json_build_object(
        'pid', pid, 'status', status, 'timeline', received_tli, 'flushed_lsn', flushed_lsn,
        'sender_host', sender_host, 'sender_port', sender_port, 'slot', slot_name,
        'message_age_ms', extract(epoch FROM clock_timestamp() - last_msg_receipt_time) * 1000)
      FROM pg_stat_wal_receiver WHERE pid IS NOT NULL),
  'slots', (SELECT coalesce(json_agg(json_build_object(
        'name', slot_name, 'logical', slot_type = 'logical', 'active_pid', active_pid,
        'restart_lsn', restart_lsn, 'wal_status', wal_status)), '[]') FROM pg_replication_slots),
  'waiting_commits', a.waiting, 'oldest_wait_ms', a.oldest_wait_ms, 'sessions', a.sessions,
  'max_connections', current_setting('max_connections')::bigint
)::text
FROM (SELECT pg_is_in_recovery() AS in_recovery) r,
     (SELECT count(*) FILTER (WHERE backend_type = 'client backend') AS sessions,
             count(*) FILTER (WHERE wait_event = 'SyncRep') AS waiting,
             extract(epoch FROM clock_timestamp() - min(query_start) FILTER (WHERE wait_event = 'SyncRep')) * 1000
                 AS oldest_wait_ms
      FROM pg_stat_activity) a
"#;

/// Where the server is.
#[derive(Clone, Debug)]
pub enum Target {
    /// This machine's, by its socket, as this role.
    Local {
        instance: Instance,
        role: String,
    },
    /// This machine's, as the monitor; as the superuser as long as the herd has no roles, before its first
    /// promotion.
    Own(Instance),
    Remote(Box<Remote>),
}

impl Target {
    pub async fn connect(&self, deadline: Duration) -> Result<Session> {
        match self {
            Target::Local { instance, role } => Session::local(instance, role, deadline).await,
            Target::Own(instance) => match Session::local(instance, roles::MONITOR, deadline).await {
                Err(Error::Connect { source, .. }) if source.code() == Some(&NO_SUCH_ROLE) => {
                    Session::local(instance, roles::SUPERUSER, deadline).await
                }
                session => session,
            },
            Target::Remote(remote) => Session::remote(remote, deadline).await,
        }
    }
}

/// A standing session that is opened again when it broke. One caller at a time.
#[derive(Debug)]
pub struct Monitor {
    target: Target,
    session: Option<(Session, tokio_postgres::Statement)>,
}

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A trivial command came back on the standing session.
    Answered { after: Duration },
    /// The standing session is gone or silent, and a new one answered.
    AnsweredAnew { after: Duration },
}

impl Monitor {
    pub fn new(target: Target) -> Monitor {
        Monitor { target, session: None }
    }

    /// Sees everything; opens the session if there is none.
    pub async fn view(&mut self, deadline: Duration) -> Result<View> {
        let until = Instant::now() + deadline;
        let result = within("asking PostgreSQL for its state", deadline, async {
            let (session, statement) = self.open(until).await?;
            let row = session.query_one(statement, &[]).await.map_err(Error::sql("show its state"))?;
            let text: String = row.get(0);
            serde_json::from_str(&text)
                .map_err(|error| Error::Answer { what: format!("PostgreSQL's view of itself: {error}") })
        })
        .await;
        self.keep_if_good(result)
    }

    /// Is it there? First on the standing session with a third of the time, then on a new one.
    pub async fn probe(&mut self, deadline: Duration) -> Result<Probe> {
        let began = Instant::now();
        let until = began + deadline;
        if let Some((session, _)) = &self.session {
            let asked = session.simple_query("SELECT 1");
            if let Ok(Ok(_)) = tokio::time::timeout(deadline / 3, asked).await {
                return Ok(Probe::Answered { after: began.elapsed() });
            }
        }
        self.session = None;
        let result = within("probing PostgreSQL", deadline, async {
            let (session, _) = self.open(until).await?;
            session.simple_query("SELECT 1").await.map_err(Error::sql("answer"))?;
            Ok(Probe::AnsweredAnew { after: began.elapsed() })
        })
        .await;
        self.keep_if_good(result)
    }

    /// Asks whether a new session is let in; leaves the standing one alone.
    pub async fn probe_new(&self, deadline: Duration) -> Result<Duration> {
        let began = Instant::now();
        within("probing PostgreSQL with a new session", deadline, async {
            let session = self.target.connect(deadline).await?;
            session.simple_query("SELECT 1").await.map_err(Error::sql("answer"))?;
            Ok(began.elapsed())
        })
        .await
    }

    /// Ends a session or WAL sender. `false`: there was none of that number.
    pub async fn terminate(&mut self, pid: i32, deadline: Duration) -> Result<bool> {
        let until = Instant::now() + deadline;
        let result = within("ending a session", deadline, async {
            let (session, _) = self.open(until).await?;
            let row = session.query_one("SELECT pg_catalog.pg_terminate_backend($1)", &[&pid]).await;
            Ok(row.map_err(Error::sql("end a session"))?.get(0))
        })
        .await;
        self.keep_if_good(result)
    }

    /// Drops the session; the next call opens another.
    pub fn disconnect(&mut self) {
        self.session = None;
    }

    async fn open(&mut self, until: Instant) -> Result<&(Session, tokio_postgres::Statement)> {
        if self.session.as_ref().is_none_or(|(session, _)| session.is_closed()) {
            self.session = None;
            let session = self.target.connect(until.saturating_duration_since(Instant::now())).await?;
            let statement = session.prepare(VIEW).await.map_err(Error::sql("prepare a query"))?;
            self.session = Some((session, statement));
        }
        Ok(self.session.as_ref().expect("it was opened above"))
    }

    /// After a failure the session may still owe an answer to a question that nobody waits for.
    fn keep_if_good<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.session = None;
        }
        result
    }
}

/// A small commit every now and then: its acknowledgement proves that voters still count for this primary.
#[derive(Debug)]
pub struct Heart {
    target: Target,
    session: Option<std::sync::Arc<Session>>,
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    asked: Instant,
    answer: oneshot::Receiver<Result<Beat, Error>>,
}

/// What became of a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// It was acknowledged under the list in force; with a list that waits, by voters.
    Acknowledged { asked: Instant },
    /// Somebody cancelled its wait. It proves nothing.
    Cancelled,
}

impl Heart {
    pub fn new(target: Target) -> Heart {
        Heart { target, session: None, pending: None }
    }

    /// Commits a message and waits for its acknowledgement, until the deadline. One that is late is not given up: the
    /// next call waits for the same one, and its proof then counts from when that was asked. Cancelling it would make
    /// the server report a commit that no voter has.
    pub async fn beat(&mut self, deadline: Duration) -> Result<Beat> {
        let until = Instant::now() + deadline;
        if self.pending.is_none() {
            let session = match self.session.take().filter(|session| !session.is_closed()) {
                Some(session) => session,
                None => std::sync::Arc::new(self.connect(deadline).await?),
            };
            self.session = Some(std::sync::Arc::clone(&session));
            let (tell, answer) = oneshot::channel();
            let asked = Instant::now();
            tokio::spawn(async move {
                let beat = commit(&session, asked).await;
                // Nobody listens if the heart was dropped.
                tell.send(beat).ok();
            });
            self.pending = Some(Pending { asked, answer });
        }
        let pending = self.pending.as_mut().expect("it was set above");
        match tokio::time::timeout_at(until, &mut pending.answer).await {
            Err(_) => {
                Err(Error::Deadline { doing: "waiting for a heartbeat's acknowledgement", after: deadline })
            }
            Ok(answer) => {
                self.pending = None;
                let lost = || Error::Answer { what: "a heartbeat was lost".into() };
                let beat = answer.map_err(|_| lost()).flatten();
                if beat.is_err() {
                    self.session = None;
                }
                beat
            }
        }
    }

    /// When the heartbeat was asked for that has not been answered yet.
    pub fn pending_since(&self) -> Option<Instant> {
        self.pending.as_ref().map(|pending| pending.asked)
    }

    async fn connect(&self, deadline: Duration) -> Result<Session> {
        within("connecting for heartbeats", deadline, async {
            let session = self.target.connect(deadline).await?;
            session
                .batch_execute("SET synchronous_commit = on; SET client_min_messages = warning; SET statement_timeout = 0")
                .await
                .map_err(Error::sql("prepare for heartbeats"))?;
            Ok(session)
        })
        .await
    }
}

async fn commit(session: &Session, asked: Instant) -> Result<Beat> {
    session.take_notices();
    let query = format!("SELECT pg_catalog.pg_logical_emit_message(true, '{MESSAGE_PREFIX}', 'heartbeat')");
    session.simple_query(&query).await.map_err(Error::sql("commit a heartbeat"))?;
    let cancelled = session.take_notices().iter().any(|notice| notice.routine() == Some(SYNC_REP_WAIT));
    Ok(if cancelled { Beat::Cancelled } else { Beat::Acknowledged { asked } })
}

/// Writes a marker and returns where WAL ended, on this primary's disk, once the marker was in it. Waits for no
/// standby: who has it shows in their flush positions (rule 6).
pub async fn marker(session: &Session, text: &str, deadline: Duration) -> Result<Lsn> {
    within("writing a marker", deadline, async {
        session
            .batch_execute("SET synchronous_commit = local")
            .await
            .map_err(Error::sql("commit without standbys"))?;
        let query = "SELECT pg_catalog.pg_logical_emit_message(true, $1, $2)::text";
        session.query_one(query, &[&MESSAGE_PREFIX, &text]).await.map_err(Error::sql("write a marker"))?;
        // A statement of its own, behind the commit, so that it counts the commit's record, too.
        let row = session
            .query_one("SELECT pg_catalog.pg_current_wal_flush_lsn()::text", &[])
            .await
            .map_err(Error::sql("tell its position"))?;
        let text: String = row.get(0);
        text.parse().map_err(|error| Error::Answer { what: format!("a position: {error}") })
    })
    .await
}

/// Writes a checkpoint and waits for it; on a standby a restartpoint. `session` is a superuser's.
pub async fn checkpoint(session: &Session, deadline: Duration) -> Result<()> {
    within("writing a checkpoint", deadline, async {
        session.batch_execute("CHECKPOINT").await.map_err(Error::sql("write a checkpoint"))
    })
    .await
}

/// Lets a paused replay go on.
pub async fn resume_replay(session: &Session, deadline: Duration) -> Result<()> {
    within("resuming replay", deadline, async {
        let query =
            "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_wal_replay_resume() END";
        session.simple_query(query).await.map(drop).map_err(Error::sql("resume replay"))
    })
    .await
}

fn lsn<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Lsn>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

fn wal_status<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<WalStatus>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    Ok(text.as_deref().and_then(crate::slots::parse_status))
}

fn epoch<'de, D: serde::Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
    let seconds = f64::deserialize(from)?;
    let since = Duration::try_from_secs_f64(seconds).map_err(serde::de::Error::custom)?;
    Ok(SystemTime::UNIX_EPOCH + since)
}

mod as_text {
    use pgherd_core::types::SystemId;
    use serde::{Deserialize, Deserializer};

    /// PostgreSQL counts the identifier as signed.
    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemId, D::Error> {
        let text = String::deserialize(from)?;
        let number: i64 = text.parse().map_err(serde::de::Error::custom)?;
        Ok(SystemId(number as u64))
    }
}
