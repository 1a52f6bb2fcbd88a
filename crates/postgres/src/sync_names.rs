//! `synchronous_standby_names`: setting it, and proving that it is in force.
//!
//! A commit waits for standbys only if a flag in shared memory says that there is a list, and the checkpointer sets
//! that flag when it comes to read the configuration. While the checkpointer is busy, a list that every new session
//! shows is not in force, and commits return at once (S8). So:
//!
//! - A list that waits is on disk before a server starts, and from then on none is empty: the flag is up from the
//!   checkpointer's first breath. A note beside the data directory says so for the postmaster it is true for.
//! - Where that is not known, a checkpoint is asked for: the checkpointer reads its configuration before it begins
//!   one, so that when it is done the list that a new session showed before is in force.
//! - What a WAL sender counts is its own copy of the list, too: [`senders_disagree`] compares their priorities.
//!
//! Leaves out: which list, and when its names count. Hazard: acknowledged commits that no standby has.

use std::time::Duration;

use pgherd_core::types::Stream;

use crate::conf::{AUTO_CONF, Managed, SyncNames, put_blocking, read_blocking, write_blocking};
use crate::durable;
use crate::error::{Error, Result, blocking, within};
use crate::instance::Instance;
use crate::proc;
use crate::process::Server;
use crate::roles;
use crate::sql::{Session, first_field};

const FILES: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(3);
/// How long an idle checkpointer is looked for before a checkpoint is asked of it.
const IDLE_CHECKPOINTER: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    #[error("synchronous_standby_names is '{shown}' and should be '{wanted}'")]
    NotLoaded { shown: String, wanted: String },
    #[error(transparent)]
    Other(#[from] Error),
}

impl SyncError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            SyncError::NotLoaded { .. } => {
                Some("ALTER SYSTEM RESET synchronous_standby_names, if somebody set it")
            }
            SyncError::Other(error) => error.hint(),
        }
    }
}

/// What is written down; in force once [`prove`] says so.
pub async fn written(instance: &Instance) -> Result<SyncNames> {
    let instance = instance.clone();
    blocking("reading pgherd.conf", FILES, move || Ok(read_blocking(&instance)?.synchronous_standby_names))
        .await
}

/// Writes the list, durably, and tells a running server.
pub async fn set(instance: &Instance, server: Option<&Server>, names: &SyncNames) -> Result<()> {
    let changed = {
        let (instance, names) = (instance.clone(), names.clone());
        blocking("writing synchronous_standby_names", FILES, move || {
            if !names.waits() {
                // First the note, then the list: a kill in between costs a checkpoint, never a commit.
                durable::remove(&note_path(&instance))?;
            }
            let mut managed = read_blocking(&instance)?;
            managed.synchronous_standby_names = names;
            write_blocking(&instance, &managed)
        })
        .await?
    };
    match server {
        Some(server) if changed => server.reload(),
        _ => Ok(()),
    }
}

/// The same for a standby that is about to be promoted, which is started with another list should its machine die
/// before: nobody waits for the disk, and the caller tells the server.
pub(crate) async fn put(instance: &Instance, names: &SyncNames) -> Result<()> {
    let (instance, names) = (instance.clone(), names.clone());
    blocking("writing synchronous_standby_names", FILES, move || {
        if !names.waits() {
            durable::remove(&note_path(&instance))?;
        }
        let managed = read_blocking(&instance)?;
        put_blocking(&instance, &Managed { synchronous_standby_names: names, ..managed })
    })
    .await
}

/// Returns when `names` is in force for every commit that begins from now on, WAL senders aside; with the superuser's
/// session that it took.
pub async fn prove(server: &Server, names: &SyncNames, deadline: Duration) -> Result<Session, SyncError> {
    within("proving synchronous_standby_names", deadline, async {
        let session = match shown(server, names, deadline).await {
            Ok(session) => session,
            Err(error) => {
                // Another list is in force, perhaps an empty one: what was known of the flag is void.
                let instance = server.instance().clone();
                blocking("removing a note", FILES, move || durable::remove(&note_path(&instance))).await?;
                return Err(error);
            }
        };
        if !names.waits() {
            return Ok(session);
        }
        let who = Postmaster::of(server);
        let instance = server.instance().clone();
        let noted = blocking("reading a note", FILES, move || Note::read(&instance)).await?;
        match noted {
            Some(Note::InForce(noted)) if Some(&noted) == who.as_ref() => return Ok(session),
            // The list was there when the server started. Once the checkpointer is seen in its main loop it has
            // passed the place where it first reads the configuration.
            Some(Note::Started(noted)) if Some(&noted) == who.as_ref() => {
                if !checkpointer_is_idle(&session).await? {
                    checkpoint(&session).await?;
                }
            }
            _ => checkpoint(&session).await?,
        }
        if let Some(who) = who {
            let instance = server.instance().clone();
            blocking("writing a note", FILES, move || Note::InForce(who).write(&instance)).await?;
        }
        Ok(session)
    })
    .await
}

/// Opens sessions until one shows `names`: it inherits what the postmaster has read.
async fn shown(server: &Server, names: &SyncNames, deadline: Duration) -> Result<Session, SyncError> {
    let until = tokio::time::Instant::now() + deadline;
    let wanted = names.to_string();
    loop {
        let session = Session::local(server.instance(), roles::SUPERUSER, deadline).await?;
        let rows = session.simple_query("SHOW synchronous_standby_names").await;
        let shown = first_field(&rows.map_err(Error::sql("show its list"))?, 0).unwrap_or_default();
        if shown == wanted {
            return Ok(session);
        }
        if tokio::time::Instant::now() + POLL >= until {
            return Err(SyncError::NotLoaded { shown, wanted });
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn checkpointer_is_idle(session: &Session) -> Result<bool> {
    let until = tokio::time::Instant::now() + IDLE_CHECKPOINTER;
    let query = "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity \
                 WHERE backend_type = 'checkpointer' AND wait_event = 'CheckpointerMain')";
    while tokio::time::Instant::now() < until {
        let row = session.query_one(query, &[]).await.map_err(Error::sql("show its checkpointer"))?;
        if row.get(0) {
            return Ok(true);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(false)
}

async fn checkpoint(session: &Session) -> Result<()> {
    session.batch_execute("CHECKPOINT").await.map_err(Error::sql("write a checkpoint"))
}

/// A WAL sender that does not count as the list says it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disagreement {
    pub application_name: String,
    pub pid: i32,
    pub priority: i32,
}

/// WAL senders that count although `names` does not name them: they still hold another list and release commits by
/// it. One whose priority is 0 neither counts nor releases anything (`SyncRepReleaseWaiters`), and the list that it
/// takes up next is the present one.
pub async fn senders_disagree(
    session: &Session,
    names: &SyncNames,
    deadline: Duration,
) -> Result<Vec<Disagreement>> {
    let streams: &[Stream] = match names {
        SyncNames::Any { streams, .. } => streams,
        SyncNames::Empty | SyncNames::Nobody => &[],
    };
    let listed: Vec<String> = streams.iter().map(Stream::to_string).collect();
    let query = "SELECT application_name, pid, sync_priority FROM pg_catalog.pg_stat_replication \
                 WHERE sync_priority > 0 AND lower(application_name) <> ALL ($1)";
    within("comparing priorities", deadline, async {
        let rows = session.query(query, &[&listed]).await.map_err(Error::sql("list its WAL senders"))?;
        Ok(rows
            .iter()
            .map(|row| Disagreement { application_name: row.get(0), pid: row.get(1), priority: row.get(2) })
            .collect())
    })
    .await
}

/// One life of a postmaster: its number and, because numbers are used again, when it began.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Postmaster(String);

impl Postmaster {
    fn of(server: &Server) -> Option<Postmaster> {
        let pid = server.postmaster().pid;
        Some(Postmaster(format!("{} {}", pid.as_raw_nonzero(), proc::started_at(pid)?)))
    }
}

/// What is known of the flag, for one postmaster.
enum Note {
    /// A list that waits was on disk when it started, and none was empty since.
    Started(Postmaster),
    InForce(Postmaster),
}

impl Note {
    fn read(instance: &Instance) -> Result<Option<Note>> {
        let text = durable::read_text(&note_path(instance))?.unwrap_or_default();
        Ok(match text.trim().split_once(' ') {
            Some(("started", who)) => Some(Note::Started(Postmaster(who.to_owned()))),
            Some(("in-force", who)) => Some(Note::InForce(Postmaster(who.to_owned()))),
            _ => None,
        })
    }

    fn write(&self, instance: &Instance) -> Result<()> {
        let text = match self {
            Note::Started(Postmaster(who)) => format!("started {who}\n"),
            Note::InForce(Postmaster(who)) => format!("in-force {who}\n"),
        };
        // The postmaster that it is true for does not outlive the machine either.
        durable::put(&note_path(instance), text.as_bytes(), durable::PRIVATE)
    }
}

/// Called when a server was started; a list that is empty leaves no note. Blocks.
pub(crate) fn note_start(server: &Server) -> Result<()> {
    let instance = server.instance();
    let waits = read_blocking(instance)?.synchronous_standby_names.waits();
    // ALTER SYSTEM wins over what we wrote.
    let altered = durable::read_text(&instance.data_dir.join(AUTO_CONF))?.unwrap_or_default();
    match Postmaster::of(server) {
        Some(who) if waits && !altered.contains("synchronous_standby_names") => {
            Note::Started(who).write(instance)
        }
        _ => durable::remove(&note_path(instance)).map(drop),
    }
}

fn note_path(instance: &Instance) -> std::path::PathBuf {
    instance.private_dir.join("synchronous_list")
}
