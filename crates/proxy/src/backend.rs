//! One connection to a PostgreSQL server: its making, its cleaning, its end.
//!
//! Leaves out who uses it ([`crate::pools`]). Hazard: what one client left in it and the next one finds.

use std::time::Duration;

use bytes::{Buf, BytesMut};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::frame::{Phase, Piece, Scanner, Side, Spill};
use pgherd_pgwire::message::build::{self, BindOut};
use pgherd_pgwire::message::{Key, ServerMessage, TransactionStatus};
use pgherd_pgwire::scram::ClientKeys;

use crate::net::{self, ServerTls, Stream};
use crate::pool::Place;
use crate::routes::Target;
use crate::server::{NotIn, Purpose, ServerLogin, Step, Welcome};
use crate::world::nonce;

/// From the first byte to ReadyForQuery.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
const CLEAN_WITHIN: Duration = Duration::from_secs(10);
const CANCEL_WITHIN: Duration = Duration::from_secs(10);
/// An answer to the proxy's own questions that is longer is wrong.
const MAX_ANSWER_BYTES: usize = 1 << 20;

pub(crate) struct Backend {
    pub(crate) stream: Stream,
    pub(crate) place: Place,
    pub(crate) target: Target,
    pub(crate) welcome: Welcome,
}

/// What the proxy asked for itself was answered by an error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotDone {
    #[error("{message} (SQLSTATE {sqlstate})")]
    Refused { sqlstate: SqlState, message: String },
    #[error("{0}")]
    Lost(String),
}

fn lost(error: &dyn std::fmt::Display) -> NotDone {
    NotDone::Lost(error.to_string())
}

/// One statement with its values, without the Sync behind it.
fn call(out: &mut BytesMut, text: &[u8], values: &[Option<&[u8]>]) -> Result<(), NotDone> {
    let bind = BindOut { values, ..BindOut::default() };
    build::parse(out, b"", text, &[])
        .and_then(|()| build::bind(out, &bind))
        .and_then(|()| build::execute(out, b"", 0))
        .map_err(|error| lost(&error))
}

impl Backend {
    pub(crate) async fn open(
        place: Place,
        target: Target,
        tls: &dyn ServerTls,
        purpose: &Purpose,
        keys: Option<ClientKeys>,
    ) -> Result<Backend, NotIn> {
        let unreachable = |error: &dyn std::fmt::Display| NotIn::Unreachable(error.to_string());
        let opening = async {
            let mut stream = net::connect(&target, tls).await.map_err(|error| unreachable(&error))?;
            let nonce = nonce().map_err(|error| unreachable(&error))?;
            let (mut out, mut input) = (BytesMut::new(), BytesMut::new());
            let mut login = ServerLogin::new(purpose, keys, nonce, &mut out)?;
            let welcome = loop {
                stream.send(&mut out).await.map_err(|error| unreachable(&error))?;
                stream.receive(&mut input).await.map_err(|error| unreachable(&error))?;
                let mut rest = &input[..];
                let step = login.read(&mut rest, &mut out);
                let taken = input.len() - rest.len();
                input.advance(taken);
                match step {
                    Step::More => {}
                    Step::In(welcome) => break welcome,
                    Step::Failed(error) => return Err(error),
                }
            };
            Ok((stream, welcome))
        };
        let opened = tokio::time::timeout(CONNECT_WITHIN, opening).await;
        let (stream, welcome) = opened.map_err(|_| {
            NotIn::Unreachable(format!("it has not let anybody in for {} s", CONNECT_WITHIN.as_secs()))
        })??;
        Ok(Backend { stream, place, target, welcome })
    }

    /// Sets what a client's startup packet asks for. `false`: there was nothing to set.
    pub(crate) async fn apply(&mut self, settings: &[(String, String)]) -> Result<bool, NotDone> {
        let mut out = BytesMut::new();
        let is_so = |name: &str, value: &str| {
            let known =
                self.welcome.parameters.iter().find(|(known, _)| known.eq_ignore_ascii_case(name.as_bytes()));
            known.is_some_and(|(_, known)| known == value.as_bytes())
        };
        let to_set = settings.iter().filter(|(name, value)| !is_so(name, value));
        for (name, value) in to_set {
            // As values, which need no quoting and can be nothing else.
            let text = b"SELECT pg_catalog.set_config($1, $2, false)";
            call(&mut out, text, &[Some(name.as_bytes()), Some(value.as_bytes())])?;
        }
        if out.is_empty() {
            return Ok(false);
        }
        build::sync(&mut out);
        self.ask(&mut out, CLEAN_WITHIN).await.map(|_| true)
    }

    /// Takes everything back that a session can have left behind.
    pub(crate) async fn clean(&mut self) -> Result<(), NotDone> {
        let mut out = BytesMut::new();
        build::query(&mut out, b"DISCARD ALL").map_err(|error| lost(&error))?;
        self.ask(&mut out, CLEAN_WITHIN).await.map(|_| ())
    }

    /// The rows of a query, of which each has one value.
    pub(crate) async fn values(
        &mut self,
        query: &[u8],
        value: &str,
        within: Duration,
    ) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        let mut out = BytesMut::new();
        call(&mut out, query, &[Some(value.as_bytes())])?;
        build::sync(&mut out);
        self.ask(&mut out, within).await
    }

    /// Sends what stands in `out` and reads up to ReadyForQuery, which must find no transaction.
    async fn ask(&mut self, out: &mut BytesMut, within: Duration) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        let asking = async {
            self.stream.send(out).await.map_err(|error| lost(&error))?;
            self.answer().await
        };
        let late = || NotDone::Lost(format!("it has not answered for {} s", within.as_secs()));
        tokio::time::timeout(within, asking).await.map_err(|_| late())?
    }

    async fn answer(&mut self) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        let mut scanner = Scanner::new(Side::Server, Phase::Session);
        let (mut input, mut kind, mut refused, mut rows) = (BytesMut::new(), None, None, Vec::new());
        let mut spill = Spill::new(MAX_ANSWER_BYTES);
        loop {
            let mut rest = &input[..];
            while kind.is_some() || !rest.is_empty() {
                if kind.is_none() {
                    match scanner.next(&mut rest).map_err(|error| lost(&error))? {
                        Some(Piece::Header(header)) => kind = Some(header.kind),
                        _ => break,
                    }
                }
                let Some(known) = kind else { break };
                let Some(body) = scanner.whole(&mut rest, &mut spill).map_err(|error| lost(&error))? else {
                    break;
                };
                kind = None;
                match ServerMessage::parse(known, body).map_err(|error| lost(&error))? {
                    ServerMessage::ReadyForQuery(TransactionStatus::Idle) => {
                        return refused.map_or(Ok(rows), Err);
                    }
                    ServerMessage::ReadyForQuery(_) => {
                        return Err(NotDone::Lost("a transaction is open".to_owned()));
                    }
                    ServerMessage::ErrorResponse(fields) => {
                        let message =
                            String::from_utf8_lossy(fields.message().unwrap_or_default()).into_owned();
                        let sqlstate = fields.sqlstate().unwrap_or(SqlState::PROTOCOL_VIOLATION);
                        if fields.is_fatal() {
                            return Err(NotDone::Lost(message));
                        }
                        refused.get_or_insert(NotDone::Refused { sqlstate, message });
                    }
                    ServerMessage::ParameterStatus { name, value } => self.welcome.note(name, value),
                    ServerMessage::DataRow(values) => {
                        rows.extend(values.iter().next().map(|value| value.map(<[u8]>::to_vec)));
                    }
                    _ => {}
                }
            }
            let taken = input.len() - rest.len();
            input.advance(taken);
            self.stream.receive(&mut input).await.map_err(|error| lost(&error))?;
        }
    }

    /// Says goodbye, so that the server writes no complaint into its log.
    pub(crate) async fn close(mut self) {
        let mut out = BytesMut::new();
        build::terminate(&mut out);
        let goodbye = tokio::time::timeout(Duration::from_secs(1), self.stream.send(&mut out)).await;
        if let Ok(Err(error)) = goodbye {
            tracing::debug!(%error, "a server was gone before it was told goodbye");
        }
    }
}

/// Who is asked to cancel.
#[derive(Clone, Debug)]
pub(crate) struct Cancelable {
    pub(crate) target: Target,
    pub(crate) pid: u32,
    pub(crate) key: Vec<u8>,
}

/// Asks the server to cancel what that backend does, and waits until it has passed that on: afterwards the cancel can hit
/// nothing else.
pub(crate) async fn cancel(who: &Cancelable, tls: &dyn ServerTls) {
    let asking = async {
        let mut stream = net::connect(&who.target, tls).await?;
        let mut out = BytesMut::new();
        let key = Key::new(&who.key).map_err(std::io::Error::other)?;
        build::cancel_request(&mut out, who.pid, key);
        stream.send(&mut out).await?;
        // The server closes without a word.
        let mut nothing = BytesMut::new();
        match stream.receive(&mut nothing).await {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            other => other,
        }
    };
    match tokio::time::timeout(CANCEL_WITHIN, asking).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a cancel did not reach the server"),
        Err(_) => tracing::debug!("a cancel did not reach the server in time"),
    }
}
