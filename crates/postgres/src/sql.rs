//! Connections to a PostgreSQL: through its Unix socket, or over TLS to another node's.
//!
//! Every session has an empty search path, so that functions and operators are PostgreSQL's own. Notices are
//! kept, because one of them says that a commit was not replicated. There is no statement timeout on the server's
//! side: it would cancel the wait of a commit for its standbys.
//!
//! Leaves out: pooling; each caller holds its own session. Hazard: a session of the superuser on a database of
//! users; so `postgres` is the only database that is ever connected to, but for
//! creating an application's, and in a server that is thrown away.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::poll_fn;
use tokio_postgres::error::DbError;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, SimpleQueryMessage};

use crate::error::{Error, Result, within};
use crate::instance::Instance;
use crate::secret::Secret;

mod tls;

pub use tls::{TlsError, TlsIdentity};

/// Of the notices between two statements, how many are kept.
const MAX_NOTICES: usize = 64;

/// In a scratch server, what is set for a database or a role of the original must not load anything there, nor stand in the way.
pub(crate) const SCRATCH_OPTIONS: &str = "-c session_preload_libraries= -c local_preload_libraries= -c session_replication_role=replica \
     -c default_transaction_read_only=off -c statement_timeout=0 -c lock_timeout=0";

/// Where names without a schema are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchPath {
    /// Among PostgreSQL's own only.
    Empty,
    /// As the role and the database have it.
    OfDatabase,
}

/// What a statement answered first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstField {
    /// It returns no rows.
    NoRows,
    /// It returns rows, and there was none.
    Empty,
    Null,
    Value(String),
}

/// A session. Dropping it closes the connection.
#[derive(Debug)]
pub struct Session {
    client: Client,
    notices: Arc<Mutex<Vec<DbError>>>,
}

impl std::ops::Deref for Session {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

/// Where another node's PostgreSQL is, and who we are to it.
#[derive(Clone, Debug)]
pub struct Remote {
    /// Named in the certificate that it must show.
    pub host: String,
    pub address: IpAddr,
    pub port: u16,
    pub role: String,
    pub password: Secret,
    pub tls: TlsIdentity,
}

/// Where a server of this host listens, and who speaks to it. What goes over TCP is not encrypted, and does not leave the host.
#[derive(Clone, Debug)]
pub struct Nearby {
    /// The directory of its socket, or an address.
    pub host: String,
    pub port: u16,
    pub role: String,
    pub password: Option<Secret>,
}

impl Session {
    /// Connects to a server of this host that no herd has.
    pub async fn nearby(nearby: &Nearby, deadline: Duration) -> Result<Session> {
        let mut config = base(&nearby.role);
        config.host(&nearby.host).port(nearby.port);
        if let Some(password) = &nearby.password {
            config.password(password.reveal());
        }
        within("connecting to PostgreSQL", deadline, async {
            let server = format!("PostgreSQL at {}, port {}", nearby.host, nearby.port);
            let refused = |source| Error::Connect { server, source };
            let (client, connection) = config.connect(tokio_postgres::NoTls).await.map_err(refused)?;
            Ok(Session::drive(client, connection))
        })
        .await
    }

    /// Connects to the local server by its socket, as `role`.
    pub async fn local(instance: &Instance, role: &str, deadline: Duration) -> Result<Session> {
        let mut config = base(role);
        config.host_path(&instance.socket_dir).port(instance.port);
        within("connecting to the local PostgreSQL", deadline, async {
            let refused =
                |source| Error::Connect { server: format!("PostgreSQL of {}", instance.node), source };
            let (client, connection) = config.connect(tokio_postgres::NoTls).await.map_err(refused)?;
            Ok(Session::drive(client, connection))
        })
        .await
    }

    /// Connects to a database of a server that nobody else uses, by the socket in `dir`.
    pub(crate) async fn scratch(
        dir: &Path,
        port: u16,
        role: &str,
        database: &str,
        path: SearchPath,
        deadline: Duration,
    ) -> Result<Session> {
        let mut config = base(role);
        config.options(match path {
            SearchPath::Empty => format!("-c search_path= {SCRATCH_OPTIONS}"),
            SearchPath::OfDatabase => SCRATCH_OPTIONS.to_owned(),
        });
        config.host_path(dir).port(port).dbname(database);
        within("connecting to the scratch server", deadline, async {
            let refused = |source| Error::Connect { server: "the scratch server".to_owned(), source };
            let (client, connection) = config.connect(tokio_postgres::NoTls).await.map_err(refused)?;
            Ok(Session::drive(client, connection))
        })
        .await
    }

    /// Connects to another node's server, verifying its certificate and name.
    pub async fn remote(remote: &Remote, deadline: Duration) -> Result<Session> {
        let mut config = base(&remote.role);
        config
            .host(&remote.host)
            .hostaddr(remote.address)
            .port(remote.port)
            .password(remote.password.reveal())
            .ssl_mode(tokio_postgres::config::SslMode::Require)
            .tcp_user_timeout(deadline.max(Duration::from_secs(1)))
            .keepalives_idle(Duration::from_secs(2));
        within("connecting to another node's PostgreSQL", deadline, async {
            let server = format!("{} ({}:{})", remote.host, remote.address, remote.port);
            let refused = |source| Error::Connect { server, source };
            let (client, connection) = config.connect(remote.tls.connector()).await.map_err(refused)?;
            Ok(Session::drive(client, connection))
        })
        .await
    }

    fn drive<S, T>(client: Client, mut connection: Connection<S, T>) -> Session
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
        T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let notices = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&notices);
        // A notice is put down here before the same task hands over the end of its statement, so that whoever
        // waited for the statement sees it. The task ends with the client, after it has said goodbye.
        tokio::spawn(async move {
            while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
                match message {
                    Ok(AsyncMessage::Notice(notice)) => {
                        let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        if kept.len() < MAX_NOTICES {
                            kept.push(notice);
                        }
                    }
                    Ok(_) => {}
                    // The statement that waits is told the same.
                    Err(_) => break,
                }
            }
        });
        Session { client, notices }
    }

    /// The notices since this was asked last.
    pub(crate) fn take_notices(&self) -> Vec<DbError> {
        std::mem::take(&mut *self.notices.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// The first field of the first row that a text of statements answers with.
    pub async fn first_field(&self, statements: &str) -> Result<FirstField> {
        let answer =
            self.client.simple_query(statements).await.map_err(Error::sql("carry a statement out"))?;
        let mut found = FirstField::NoRows;
        for message in answer {
            match message {
                SimpleQueryMessage::Row(row) => {
                    return Ok(row
                        .get(0)
                        .map_or(FirstField::Null, |value| FirstField::Value(value.to_owned())));
                }
                SimpleQueryMessage::RowDescription(_) => found = FirstField::Empty,
                _ => {}
            }
        }
        Ok(found)
    }

    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// The number of the backend that serves this session.
    pub async fn backend_pid(&self, deadline: Duration) -> Result<i32> {
        within("asking for the backend's number", deadline, async {
            let row = self.client.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await;
            Ok(row.map_err(Error::sql("tell its process number"))?.get(0))
        })
        .await
    }
}

fn base(role: &str) -> Config {
    let mut config = Config::new();
    config.user(role).dbname("postgres").application_name("pgherd").options("-c search_path=");
    config
}

/// An identifier in a statement.
pub fn name(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\"").replace('\0', ""))
}

/// A string in a statement.
pub fn literal(text: &str) -> String {
    let text = text.replace('\0', "").replace('\'', "''");
    if text.contains('\\') { format!(" E'{}'", text.replace('\\', "\\\\")) } else { format!("'{text}'") }
}

/// A field of the first row of an answer to a simple query, which takes one round trip where others take two.
pub(crate) fn first_field(answer: &[SimpleQueryMessage], field: usize) -> Option<String> {
    answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(field).map(str::to_owned),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_strings_stay_what_they_are() {
        assert_eq!(name("app"), "\"app\"");
        assert_eq!(name("a\"; DROP"), "\"a\"\"; DROP\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"\'"), r" E'\\'''");
    }
}
