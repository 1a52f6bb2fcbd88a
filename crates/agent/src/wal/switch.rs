//! Ends the segment that a server writes, and waits until that is durable in the repository.
//!
//! Who brings it there is somebody else's business: `archive_command`, or a stream. Leaves out herds, whose archive has each second of
//! WAL without a switch. Hazard: a segment that is taken for durable; it is only when the repository lists it.

use std::path::PathBuf;
use std::time::Duration;

use pgherd_backup::wal::{Archive, Segment, SegmentError, Segments, WalError};
use pgherd_core::spec::Span;
use pgherd_core::types::Lsn;
use pgherd_postgres::base_backup::switch_wal;
use pgherd_postgres::sql::Session;
use tokio::time::{Instant, sleep};

use crate::named_server::{NamedServer, NamedServerError, Reached};
use crate::repository::{self, RepositoryError};

const ASKING: Duration = Duration::from_secs(10);
const SWITCHING: Duration = Duration::from_secs(30);
/// How often the repository is looked at. A look is one small request.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Of which server, and how long it may take.
#[derive(Clone)]
pub struct Order {
    /// File that names the repository.
    pub repository: PathBuf,
    pub server: NamedServer,
    pub deadline: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Server(#[from] NamedServerError),
    #[error("the server is a standby, and only a primary writes WAL")]
    Standby,
    #[error(transparent)]
    Postgres(#[from] pgherd_postgres::Error),
    #[error(transparent)]
    Segments(#[from] SegmentError),
    #[error(transparent)]
    Wal(#[from] WalError),
    #[error("{segment} has not come into {place} within {}; the server says: {archiver}", Span(*.within))]
    NotThere { segment: String, place: String, within: Duration, archiver: String },
}

impl SwitchError {
    pub fn hint(&self) -> Option<String> {
        match self {
            SwitchError::Repository(error) => error.hint(),
            SwitchError::Server(error) => error.hint(),
            SwitchError::Standby => Some("run it on the primary's host".to_owned()),
            SwitchError::Postgres(error) => error.hint().map(str::to_owned),
            SwitchError::NotThere { .. } => Some(
                "see whether archive_command = 'pgherd wal push --repository FILE %p' is set and works (pg_stat_archiver, the \
                 server's log), or whether the stream runs"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// A server that has switched.
pub struct Switched {
    archive: Archive,
    place: String,
    session: Session,
    segment: Segment,
    deadline: Duration,
    /// The name of the segment that ended last.
    pub file: String,
    /// Up to which position it reaches.
    pub end: Lsn,
    /// Nothing was written since the last switch, so that this one did nothing.
    pub was_switched: bool,
}

/// Switches; what is waited for then is in what it returns.
pub async fn switch(order: Order) -> Result<Switched, SwitchError> {
    let located = order.server.locate()?;
    let segments = Segments::new(located.control.wal_segment_bytes)?;
    // Before anything is done to the server: what cannot be watched is not begun.
    let repository = repository::open(&order.repository).await?;
    let Reached { session, survey } = located.reach().await?;
    if survey.is_standby {
        return Err(SwitchError::Standby);
    }
    let end = switch_wal(&session, SWITCHING).await?;
    // The position is behind the switch's record. Right at a segment's beginning nothing had been written since the last one.
    let of = |lsn| Segment { timeline: survey.timeline, number: segments.number(lsn) };
    let was_switched = end == segments.start(of(end));
    let segment = of(Lsn(end.0.saturating_sub(1)));
    let archive = Archive::new(&repository, survey.system_id, segments);
    Ok(Switched {
        place: repository.store().place().to_owned(),
        archive,
        session,
        file: segments.file_name(segment),
        end: segments.end(segment),
        segment,
        deadline: order.deadline,
        was_switched,
    })
}

impl Switched {
    /// Where it is waited for.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Returns when the repository has it. Dropping the future leaves everything as it is.
    pub async fn wait(&self) -> Result<(), SwitchError> {
        let until = Instant::now() + self.deadline;
        let Segment { timeline, .. } = self.segment;
        loop {
            match self.archive.prove(timeline, self.archive.segments().start(self.segment), self.end).await {
                Ok(_) => return Ok(()),
                Err(WalError::Missing { .. }) if Instant::now() + LOOK_EVERY < until => {
                    sleep(LOOK_EVERY).await;
                }
                Err(WalError::Missing { .. }) => {
                    return Err(SwitchError::NotThere {
                        segment: self.file.clone(),
                        place: self.place.clone(),
                        within: self.deadline,
                        archiver: self.archiver().await,
                    });
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What the server says of its archiver: most often the reason.
    async fn archiver(&self) -> String {
        const QUERY: &str = "SELECT 'archive_mode is ' || pg_catalog.current_setting('archive_mode') \
            || CASE WHEN last_failed_time > coalesce(last_archived_time, '-infinity') \
               THEN ', and archiving ' || last_failed_wal || ' failed ' || failed_count || ' times' \
               WHEN last_archived_wal IS NULL THEN ', and nothing was archived' \
               ELSE ', and ' || last_archived_wal || ' was archived last' END \
            FROM pg_catalog.pg_stat_archiver";
        let asked = tokio::time::timeout(ASKING, self.session.query_one(QUERY, &[])).await;
        match asked {
            Ok(Ok(row)) => row.get(0),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "nothing any more".to_owned(),
        }
    }
}
