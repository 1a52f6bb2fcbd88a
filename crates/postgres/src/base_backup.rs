//! A base backup is read from the data directory of a running server: the session between `pg_backup_start` and
//! `pg_backup_stop`, which files there are ([`listing`]), and their contents ([`reading`]).
//!
//! ```text
//! Survey::of           which cluster and timeline this is, before anything is promised to the repository
//! BaseBackup::begin    the session; it has to stay open, and the backup ends with it
//!   Listing, Reader    files, while the server writes them
//!   control()          last: on a standby it says from where on the copy is consistent
//!   .finish()          what `backup_label` and `tablespace_map` have to say; no file of either name is ever there
//! ```
//!
//! A server on another host sends its files itself ([`streamed`]), as tar archives ([`tar`]).
//!
//! On a standby the copy is of one timeline and one recovery: it is given up if the server is promoted, or follows its
//! upstream to another timeline.
//!
//! Leaves out: where contents go, and waiting for WAL. Hazard: a copy that was not read between start and stop cannot be
//! recovered, and only its restore would show it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_core::types::{Lsn, SystemId, Timeline};

use crate::control::{ControlFile, State};
use crate::error::{Error, Result, within};
use crate::sql::{Session, first_field};

pub mod felt;
pub mod listing;
pub mod reading;
pub mod sent;
pub mod streamed;
pub mod tar;

/// Stands in a data directory while it is being restored: it is none yet.
pub(crate) const MARKER: &str = "pgherd.restoring";
/// Before it the two functions had other names.
const RENAMED_IN: u32 = 150_000;
/// Questions that need no disk.
const ASKING: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaseBackupError {
    #[error("the server's checkpoint is of timeline {checkpoint}, and it is on {timeline} already")]
    TimelineWithoutCheckpoint { checkpoint: Timeline, timeline: Timeline },

    #[error("the standby was promoted during the backup")]
    Promoted,

    #[error("the server went from timeline {from} to {to} during the backup")]
    OtherTimeline { from: Timeline, to: Timeline },

    #[error("the data directory is that of cluster {found}, and the server that of {wanted}")]
    OtherCluster { found: SystemId, wanted: SystemId },

    #[error("{} is a link, where PostgreSQL has none", .path.display())]
    Link { path: PathBuf },

    #[error("PostgreSQL answered {what} with \"{answer}\"")]
    Unreadable { what: &'static str, answer: String },

    #[error(transparent)]
    Other(#[from] Error),
}

impl BaseBackupError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            BaseBackupError::TimelineWithoutCheckpoint { .. } => {
                Some("try again after the new primary's first checkpoint")
            }
            BaseBackupError::Promoted | BaseBackupError::OtherTimeline { .. } => Some("begin a new backup"),
            BaseBackupError::Link { .. } => {
                Some("only tablespaces and pg_wal may lie elsewhere; move it into the data directory")
            }
            BaseBackupError::Other(error) => error.hint(),
            _ => None,
        }
    }
}

/// What a server says of itself before a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    pub system_id: SystemId,
    /// As in `server_version_num`.
    pub version: u32,
    pub timeline: Timeline,
    pub is_standby: bool,
    /// From where the last checkpoint is replayed. No backup that begins from now on begins before it.
    pub redo: Lsn,
}

impl Survey {
    pub async fn of(session: &Session) -> Result<Survey, BaseBackupError> {
        // On a standby the checkpoint can be older than the timeline that it replays.
        let query = "SELECT s.system_identifier, pg_catalog.current_setting('server_version_num'), c.redo_lsn, \
                     CASE WHEN pg_catalog.pg_is_in_recovery() \
                       THEN GREATEST(c.timeline_id, r.min_recovery_end_timeline)::pg_catalog.text \
                       ELSE pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END, \
                     pg_catalog.pg_is_in_recovery() \
                     FROM pg_catalog.pg_control_system() s, pg_catalog.pg_control_checkpoint() c, \
                     pg_catalog.pg_control_recovery() r";
        let answer = within("asking PostgreSQL about itself", ASKING, async {
            session.simple_query(query).await.map_err(Error::sql("tell about itself"))
        })
        .await?;
        let field = |at: usize| first_field(&answer, at).unwrap_or_default();
        let is_standby = field(4) == "t";
        let timeline = match is_standby {
            true => field(3).parse().ok(),
            false => field(3).get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()),
        };
        let all = || {
            Some(Survey {
                // The column is a signed number.
                system_id: SystemId(field(0).parse::<i64>().ok()? as u64),
                version: field(1).parse().ok()?,
                timeline: Timeline(timeline?),
                is_standby,
                redo: field(2).parse().ok()?,
            })
        };
        all().ok_or_else(|| BaseBackupError::Unreadable {
            what: "who it is",
            answer: (0..5).map(field).collect::<Vec<_>>().join(", "),
        })
    }
}

/// How the checkpoint that a backup begins with is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checkpoint {
    /// At once, as fast as the disk can.
    Fast,
    /// As PostgreSQL spreads its own ones, which takes minutes.
    Spread,
}

/// A backup that the server knows of. Dropping it ends the session, and with it the backup.
#[derive(Debug)]
pub struct BaseBackup {
    session: Session,
    survey: Survey,
    start: Lsn,
}

/// What the server returned at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    pub stop: Lsn,
    pub backup_label: Vec<u8>,
    pub tablespace_map: Vec<u8>,
}

impl BaseBackup {
    /// Makes a checkpoint, so it takes its time. `session` is allowed to call the function and has this to itself.
    pub async fn begin(
        session: Session,
        survey: Survey,
        label: &str,
        checkpoint: Checkpoint,
        deadline: Duration,
    ) -> Result<BaseBackup, BaseBackupError> {
        let fast = checkpoint == Checkpoint::Fast;
        let query = match survey.version < RENAMED_IN {
            true => "SELECT pg_catalog.pg_start_backup($1, $2, false)::pg_catalog.text",
            false => "SELECT pg_catalog.pg_backup_start($1, $2)::pg_catalog.text",
        };
        let answer: String = within("beginning a backup", deadline, async {
            let row = session.query_one(query, &[&label, &fast]).await;
            Ok::<_, Error>(row.map_err(Error::sql("begin a backup"))?.get(0))
        })
        .await?;
        let start = answer
            .parse()
            .map_err(|_| BaseBackupError::Unreadable { what: "where the backup begins", answer })?;
        let backup = BaseBackup { session, survey, start };
        let checkpoint = backup.checkpoint_timeline().await?;
        match checkpoint == backup.timeline() {
            true => Ok(backup),
            false => {
                let timeline = backup.timeline();
                Err(BaseBackupError::TimelineWithoutCheckpoint { checkpoint, timeline })
            }
        }
    }

    /// Where recovery of the copy will begin.
    pub fn start(&self) -> Lsn {
        self.start
    }

    pub fn timeline(&self) -> Timeline {
        self.survey.timeline
    }

    pub fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Fails if what is read from now on would be of another timeline or recovery.
    pub async fn still(&self) -> Result<(), BaseBackupError> {
        let now = Survey::of(&self.session).await?;
        if self.survey.is_standby && !now.is_standby {
            return Err(BaseBackupError::Promoted);
        }
        let (from, to) = (self.survey.timeline, now.timeline);
        if from == to { Ok(()) } else { Err(BaseBackupError::OtherTimeline { from, to }) }
    }

    /// Compares the copied control file with what the backup is of: a standby notes there what it replays.
    pub fn judge(&self, control: &ControlFile) -> Result<(), BaseBackupError> {
        if control.system_id != self.survey.system_id {
            let (found, wanted) = (control.system_id, self.survey.system_id);
            return Err(BaseBackupError::OtherCluster { found, wanted });
        }
        if !self.survey.is_standby {
            return Ok(());
        }
        if control.state != State::InArchiveRecovery {
            return Err(BaseBackupError::Promoted);
        }
        let (from, to) = (self.survey.timeline, control.timeline());
        if from == to { Ok(()) } else { Err(BaseBackupError::OtherTimeline { from, to }) }
    }

    /// Ends the backup. On a primary PostgreSQL begins a new segment of WAL, so that the last one can be archived.
    pub async fn finish(self, deadline: Duration) -> Result<Finished, BaseBackupError> {
        let query = match self.survey.version < RENAMED_IN {
            true => {
                "SELECT lsn::pg_catalog.text, labelfile, spcmapfile FROM pg_catalog.pg_stop_backup(false, false)"
            }
            false => {
                "SELECT lsn::pg_catalog.text, labelfile, spcmapfile FROM pg_catalog.pg_backup_stop(false)"
            }
        };
        let row = within("ending a backup", deadline, async {
            self.session.query_one(query, &[]).await.map_err(Error::sql("end a backup"))
        })
        .await?;
        self.still().await?;
        let answer: String = row.get(0);
        let stop = answer
            .parse()
            .map_err(|_| BaseBackupError::Unreadable { what: "where the backup ends", answer })?;
        let text = |at: usize| row.get::<_, Option<String>>(at).unwrap_or_default().into_bytes();
        Ok(Finished { stop, backup_label: text(1), tablespace_map: text(2) })
    }

    async fn checkpoint_timeline(&self) -> Result<Timeline, BaseBackupError> {
        let query = "SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()";
        let answer = within("asking for the last checkpoint", ASKING, async {
            self.session.simple_query(query).await.map_err(Error::sql("tell its last checkpoint"))
        })
        .await?;
        let answer = first_field(&answer, 0).unwrap_or_default();
        let timeline = answer.parse().map(Timeline);
        timeline.map_err(|_| BaseBackupError::Unreadable { what: "its last checkpoint", answer })
    }
}

/// Makes a checkpoint, or on a standby what stands for one: its control file is up to date then.
pub async fn checkpoint_now(session: &Session, deadline: Duration) -> Result<()> {
    within("making a checkpoint", deadline, async {
        session.simple_query("CHECKPOINT").await.map(|_| ()).map_err(Error::sql("make a checkpoint"))
    })
    .await
}

/// Begins a new segment of WAL, so that the one before can be archived. `session` is on the primary. Where the switch ended; where
/// nothing was written since the last one, the beginning of the segment that is in use.
pub async fn switch_wal(session: &Session, deadline: Duration) -> Result<Lsn> {
    within("switching to a new segment of WAL", deadline, async {
        let switched = session.simple_query("SELECT pg_catalog.pg_switch_wal()").await;
        let switched = switched.map_err(Error::sql("switch to a new segment of WAL"))?;
        let answer = first_field(&switched, 0).unwrap_or_default();
        answer.parse().map_err(|_| Error::Answer { what: format!("pg_switch_wal() gave \"{answer}\"") })
    })
    .await
}

/// The control file as it is, and what it says. Blocks.
pub fn control(data_dir: &Path) -> Result<(Vec<u8>, ControlFile)> {
    ControlFile::read_bytes(&data_dir.join("global/pg_control"))
}

/// What a server itself has of a segment of WAL: all of its file, of which the end may not be written yet, or be another one's. Blocks.
pub fn own_wal(data_dir: &Path, file: &str, segment_bytes: u32) -> Option<Vec<u8>> {
    let content = std::fs::read(data_dir.join("pg_wal").join(file)).ok()?;
    (content.len() as u64 == u64::from(segment_bytes)).then_some(content)
}

/// How a timeline came about, as its server has it. Blocks.
pub fn own_history(data_dir: &Path, timeline: Timeline) -> Option<Vec<u8>> {
    std::fs::read(data_dir.join("pg_wal").join(crate::wal::history_name(timeline))).ok()
}
