//! The failures that every operation on a PostgreSQL shares, and the two ways to bound one in time.
//!
//! What a caller branches on has its own enum beside its operation (`SealError`, `PromoteError`, …) and wraps
//! this one. Leaves out: logging. An error is logged once, by the agent that handles it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },

    #[error("{program} failed ({status}): {output}")]
    Program { program: &'static str, status: String, output: String },

    #[error("PostgreSQL refused to {doing}: {}", sql_text(.source))]
    Sql { doing: &'static str, source: tokio_postgres::Error },

    #[error("cannot connect to {server}: {}", sql_text(.source))]
    Connect { server: String, source: tokio_postgres::Error },

    #[error("{doing} took longer than {} ms", .after.as_millis())]
    Deadline { doing: &'static str, after: Duration },

    #[error("{} is damaged: {what}", .path.display())]
    Damaged { path: PathBuf, what: String },

    #[error("{what}")]
    Answer { what: String },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { doing, path, source }
    }

    pub(crate) fn sql(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> Error {
        move |source| Error::Sql { doing, source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Error {
        Error::Damaged { path: path.to_owned(), what: what.into() }
    }

    /// The kernel's own verdict, if the failure was one of a file.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Error::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    /// No space left, or a quota reached: the node is barred until there is room again, and needs no rebuild.
    pub fn is_out_of_space(&self) -> bool {
        matches!(self.io_kind(), Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }

    /// What a person should look at next, where that is more than the message says.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    Some("the directory must belong to the user that runs the agent, with mode 0700 or 0750")
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Some("free space on this volume; the node joins again by itself")
                }
                io::ErrorKind::ReadOnlyFilesystem => {
                    Some("the kernel remounts a file system read-only after an I/O error: look at dmesg")
                }
                _ => None,
            },
            Error::Deadline { .. } => {
                Some("the machine or its disk may be overloaded or hung: look at dmesg and iostat")
            }
            Error::Damaged { .. } => Some("a node with a damaged file is rebuilt: pgherd reinit"),
            Error::Connect { .. } => Some("is PostgreSQL running, and does its log say why it refuses?"),
            _ => None,
        }
    }
}

/// The server's own message where there is one: `tokio_postgres` prints only "db error".
pub fn sql_text(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} ({})", db.message(), db.code().code());
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Runs `work` on a thread that may block. After the deadline the caller goes on and the thread is left to the
/// kernel: a thread in a hung `fsync` cannot be ended.
pub(crate) async fn blocking<T, E, F>(doing: &'static str, deadline: Duration, work: F) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Error> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    match tokio::time::timeout(deadline, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(lost)) => Err(Error::Answer { what: format!("{doing}: {lost}") }.into()),
        Err(_) => Err(Error::Deadline { doing, after: deadline }.into()),
    }
}

/// Bounds a future that already returns this crate's errors.
pub(crate) async fn within<T, E: From<Error>>(
    doing: &'static str,
    deadline: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match tokio::time::timeout(deadline, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Deadline { doing, after: deadline }.into()),
    }
}
