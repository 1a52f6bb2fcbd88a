//! One connection to a PostgreSQL, with the kit's one rule about outcomes: what is not certain is unknown.
//!
//! | what came back | outcome |
//! |---|---|
//! | the command's end, and no doubt about its replication | done |
//! | the command's end, after a warning that the wait for synchronous replication was ended | unknown |
//! | an ERROR of the server | certainly not done: the transaction was rolled back |
//! | FATAL, PANIC, a lost connection, no answer in time | unknown |
//!
//! Statements go by the simple protocol, in which the end of a command is sent after its commit; in the
//! extended one it is sent before, and only the readiness for the next command says that it is committed.
//!
//! Hazard: an outcome that is too good makes the checkers blind, one that is too bad makes them cry wolf.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_postgres::error::Severity;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, SimpleQueryMessage};

use crate::net::Host;

/// The function of the server that warns when a commit is not known to be replicated. Its texts are several,
/// and translated; its name is the same from 14 to 18.
const DOUBTFUL_ROUTINE: &str = "SyncRepWaitForLSN";

/// Who connects, to which database.
#[derive(Clone, Debug)]
pub struct Login {
    pub user: String,
    pub password: String,
    pub database: String,
}

/// Why something did not end well.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The server said so, with this SQLSTATE.
    Sqlstate(String),
    /// The server acknowledged it and warned that it may be on the primary alone.
    NotReplicated,
    /// No answer in time.
    Timeout,
    /// The connection ended.
    ConnectionLost,
    /// There was no connection to send it on.
    NotConnected,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cause::Sqlstate(code) => write!(f, "SQLSTATE {code}"),
            Cause::NotReplicated => f.write_str("wait for synchronous replication ended early"),
            Cause::Timeout => f.write_str("no answer in time"),
            Cause::ConnectionLost => f.write_str("connection lost"),
            Cause::NotConnected => f.write_str("no connection"),
        }
    }
}

/// The rows of an answer as text.
pub type Rows = Vec<Vec<Option<String>>>;

/// What became of a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done(Rows),
    /// Certainly without effect; the connection is good for the next one.
    Refused(Cause),
    Unknown(Cause),
}

/// A connection whose messages are moved by a task of the current runtime.
#[derive(Debug)]
pub(crate) struct Connection {
    client: Client,
    driver: JoinHandle<()>,
    doubts: Arc<AtomicU64>,
}

impl Connection {
    /// Connects from the namespace of the calling thread.
    pub(crate) async fn open(
        to: SocketAddr,
        login: &Login,
        application_name: &str,
        deadline: Duration,
    ) -> Result<Connection, String> {
        let mut config = Config::new();
        config
            .host(to.ip().to_string())
            .port(to.port())
            .user(&login.user)
            .password(&login.password)
            .dbname(&login.database)
            .application_name(application_name);
        let opened = tokio::time::timeout(deadline, config.connect(NoTls)).await;
        let (client, mut connection) =
            opened.map_err(|_| Cause::Timeout.to_string())?.map_err(|error| describe(&error))?;
        let doubts = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&doubts);
        let driver = tokio::spawn(async move {
            // A notice comes before the end of its command, so it is counted before the command's end is
            // handed to whoever waits for it.
            while let Some(Ok(message)) =
                std::future::poll_fn(|context| connection.poll_message(context)).await
            {
                if let AsyncMessage::Notice(notice) = message
                    && notice.routine() == Some(DOUBTFUL_ROUTINE)
                {
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Connection { client, driver, doubts })
    }

    /// Sends one statement, without a deadline: the caller has one.
    pub(crate) async fn ask(&self, statement: &str) -> Answer {
        let doubts_before = self.doubts.load(Ordering::Relaxed);
        match self.client.simple_query(statement).await {
            Ok(_) if self.doubts.load(Ordering::Relaxed) != doubts_before => {
                Answer::Unknown(Cause::NotReplicated)
            }
            Ok(messages) => Answer::Done(rows(messages)),
            Err(error) => match error.as_db_error() {
                // Without a severity that can be read, nothing is certain.
                Some(known) if known.parsed_severity() == Some(Severity::Error) => {
                    Answer::Refused(Cause::Sqlstate(known.code().code().to_owned()))
                }
                Some(known) => Answer::Unknown(Cause::Sqlstate(known.code().code().to_owned())),
                None => Answer::Unknown(Cause::ConnectionLost),
            },
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

fn rows(messages: Vec<SimpleQueryMessage>) -> Rows {
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
        }
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

/// The server's own words, which the library's error keeps one level down.
fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(known) => {
            format!("{}: {} (SQLSTATE {})", known.severity(), known.message(), known.code().code())
        }
        None => error.to_string(),
    }
}

/// A connection for a test's own questions, one after the other.
#[derive(Debug)]
pub struct Session {
    // Dropped before the runtime that drives it.
    connection: Connection,
    runtime: Runtime,
    peer: String,
}

impl Session {
    const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

    /// Connects from `host`.
    pub fn open(host: &Host, to: SocketAddr, login: &Login) -> Result<Session, String> {
        let peer = format!("{} at {to}", login.user);
        let runtime = single_threaded_runtime();
        let connection = host
            .enter(|| runtime.block_on(Connection::open(to, login, "testkit", Session::CONNECT_DEADLINE)))
            .map_err(|error| format!("cannot connect as {peer}: {error}"))?;
        Ok(Session { connection, runtime, peer })
    }

    /// Sends one statement and waits for its outcome.
    pub fn ask(&mut self, statement: &str, deadline: Duration) -> Answer {
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(deadline, self.connection.ask(statement)).await });
        answer.unwrap_or(Answer::Unknown(Cause::Timeout))
    }

    /// As [`Session::ask`] with time enough for anything in a test; the rows, or what went wrong.
    pub fn try_run(&mut self, statement: &str) -> Result<Rows, String> {
        const DEADLINE: Duration = Duration::from_secs(60);
        match self.ask(statement, DEADLINE) {
            Answer::Done(rows) => Ok(rows),
            Answer::Refused(cause) | Answer::Unknown(cause) => {
                Err(format!("{} answered {statement:?} with: {cause}", self.peer))
            }
        }
    }

    /// The rows; anything else fails the test.
    #[track_caller]
    pub fn run(&mut self, statement: &str) -> Rows {
        match self.try_run(statement) {
            Ok(rows) => rows,
            Err(error) => panic!("{error}"),
        }
    }

    /// The one value of a statement that has one.
    #[track_caller]
    pub fn value(&mut self, statement: &str) -> Option<String> {
        let mut rows = self.run(statement);
        assert_eq!(rows.len(), 1, "{statement:?} must give one row");
        rows.remove(0).into_iter().next().flatten()
    }
}

/// A runtime that lives on the thread that waits for it, so that its sockets are made where that thread is.
pub(crate) fn single_threaded_runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime needs descriptors only")
}
