//! The server of a data directory on this host, found and asked whose it is.
//!
//! For commands that somebody types, without a herd. Hazard: another server than the one that was meant; what the directory says of its
//! cluster is compared with what the server says, before anything is done to it.

use std::path::PathBuf;
use std::time::Duration;

use pgherd_core::types::SystemId;
use pgherd_postgres::Secret;
use pgherd_postgres::base_backup::{BaseBackupError, Survey};
use pgherd_postgres::control::ControlFile;
use pgherd_postgres::process::listens_at;
use pgherd_postgres::sql::{Nearby, Session};

const CONNECTING: Duration = Duration::from_secs(10);
/// What PostgreSQL listens on when nothing says otherwise.
const USUAL_PORT: u16 = 5432;

/// Which server, and how it is reached.
#[derive(Clone)]
pub struct NamedServer {
    pub data_dir: PathBuf,
    /// Directory of the server's socket or an address; what its own file says where there is none.
    pub host: Option<String>,
    pub port: Option<u16>,
    pub role: String,
    pub password: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum NamedServerError {
    #[error("{} is no data directory", .data_dir.display())]
    DataDir { data_dir: PathBuf, source: pgherd_postgres::Error },
    #[error("no PostgreSQL runs in {}", .data_dir.display())]
    NotRunning { data_dir: PathBuf },
    #[error("{} is that of cluster {found}, and the server at {host}, port {port}, that of {wanted}", .data_dir.display())]
    OtherServer { data_dir: PathBuf, found: SystemId, wanted: SystemId, host: String, port: u16 },
    #[error(transparent)]
    Driver(#[from] pgherd_postgres::Error),
    #[error(transparent)]
    Postgres(#[from] BaseBackupError),
}

impl NamedServerError {
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            NamedServerError::DataDir { .. } => return None,
            NamedServerError::NotRunning { .. } => "start it, or say with --host and --port where it listens",
            NamedServerError::OtherServer { .. } => {
                "--data-dir is what the server shows as data_directory; --host and --port say where it listens"
            }
            NamedServerError::Driver(pgherd_postgres::Error::Connect { .. }) => {
                "--host, --port and --user say how to connect, PGPASSWORD is used where the server asks for a password; the role \
                 has to be a superuser; to switch WAL, EXECUTE on pg_switch_wal() is enough"
            }
            NamedServerError::Driver(error) => error.hint()?,
            NamedServerError::Postgres(error) => error.hint()?,
        };
        Some(hint.to_owned())
    }
}

/// What the directory says, and where its server listens; the server was not asked yet.
pub(crate) struct Located {
    data_dir: PathBuf,
    pub(crate) control: ControlFile,
    nearby: Nearby,
}

/// A session of the server that was meant.
pub(crate) struct Reached {
    pub(crate) session: Session,
    pub(crate) survey: Survey,
}

impl NamedServer {
    pub(crate) fn locate(self) -> Result<Located, NamedServerError> {
        let NamedServer { data_dir, host, port, role, password } = self;
        let control = ControlFile::of(&data_dir)
            .map_err(|source| NamedServerError::DataDir { data_dir: data_dir.clone(), source })?;
        let said = host.clone().zip(port.or(Some(USUAL_PORT)));
        let Some((own_host, own_port)) = listens_at(&data_dir)?.or(said) else {
            return Err(NamedServerError::NotRunning { data_dir });
        };
        let (host, port) = (host.unwrap_or(own_host), port.unwrap_or(own_port));
        let nearby = Nearby { host, port, role, password: password.map(Secret::new) };
        Ok(Located { data_dir, control, nearby })
    }
}

impl Located {
    pub(crate) async fn reach(&self) -> Result<Reached, NamedServerError> {
        let Located { data_dir, control, nearby } = self;
        let session = Session::nearby(nearby, CONNECTING).await?;
        let survey = Survey::of(&session).await?;
        if survey.system_id != control.system_id {
            let (data_dir, host, port) = (data_dir.clone(), nearby.host.clone(), nearby.port);
            let (found, wanted) = (control.system_id, survey.system_id);
            return Err(NamedServerError::OtherServer { data_dir, found, wanted, host, port });
        }
        Ok(Reached { session, survey })
    }
}
