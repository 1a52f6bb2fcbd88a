//! One connection to a PostgreSQL server: its making, its cleaning, its end.
//!
//! Leaves out who uses it ([`crate::pools`]). Hazard: what one client left in it and the next one finds.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pgherd_core::spec::TlsMode;
use pgherd_core::types::Instant;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::frame::{Header, Phase, Piece, Scanner, Side, Spill};
use pgherd_pgwire::login::{self, Login, Purpose, Step};
use pgherd_pgwire::message::build::{self, BindOut};
use pgherd_pgwire::message::{Key, ServerMessage, TransactionStatus};
use pgherd_pgwire::scram::Proof;
use pgherd_pgwire::startup::Replication;

use crate::clock;
use crate::fence::{Admitted, Bell};
use crate::login::Keys;
use crate::net::{self, ServerTls, Stream, Way};
use crate::pool::Place;
use crate::roster::ServerCard;
use crate::routes::Target;
use crate::server::{NotIn, Welcome};
use crate::session::SYNC_REP_WAIT;
use crate::settings::{self, Found, Values};
use crate::sql::{Effects, Ties};
use crate::statements::{Known, UNKNOWN};
use crate::timer::timeout;
use crate::tls::{self, Attempt, Failed, NotConnected, may_try_again};
use crate::world::nonce;

/// From the first byte to ReadyForQuery.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
const CLEAN_WITHIN: Duration = Duration::from_secs(10);
const CANCEL_WITHIN: Duration = Duration::from_secs(10);
/// An answer to the proxy's own questions that is longer is wrong, what is overheard meanwhile included.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Statements that are kept prepared in one server: as many as PgBouncer's `max_prepared_statements`.
pub(crate) const MOST_STATEMENTS: usize = 200;

pub(crate) struct Backend {
    pub(crate) stream: Stream,
    pub(crate) place: Place,
    pub(crate) welcome: Welcome,
    pub(crate) cancelable: Arc<Cancelable>,
    /// When it had let the proxy in.
    pub(crate) opened: Instant,
    /// When its last client gave it back.
    pub(crate) rests_since: Instant,
    /// Of its last client.
    pub(crate) admitted: Admitted,
    /// What it said of itself when nothing was set in it yet.
    defaults: Arc<Vec<(Vec<u8>, Vec<u8>)>>,
    /// What is set in it over that.
    settings: Arc<Values>,
    /// Notifications that came while the proxy asked something itself; they are its client's.
    pub(crate) overheard: BytesMut,
    /// Which statements are prepared in it.
    pub(crate) known: Known,
    /// What is shown of it, if it is of a pool.
    pub(crate) card: Option<Arc<ServerCard>>,
    /// What wakes its client, in the same case.
    pub(crate) bell: Option<Arc<Bell>>,
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

/// One attempt, from the first byte to ReadyForQuery.
async fn enter(
    target: &Target,
    way: Way<'_>,
    attempt: Attempt,
    purpose: &Purpose,
    keys: Option<Keys>,
) -> Result<(Stream, Welcome), (Failed, NotIn)> {
    let unreachable =
        |error: &dyn std::fmt::Display| (Failed::Otherwise, NotIn::Unreachable(error.to_string()));
    let mut stream = net::connect(target, way, attempt).await.map_err(|error| {
        let failed = match error {
            NotConnected::Handshake(_) => Failed::Handshake,
            NotConnected::Io(_) => Failed::Otherwise,
        };
        (failed, NotIn::Unreachable(error.to_string()))
    })?;
    let encrypted = stream.is_encrypted();
    let nonce = nonce().map_err(|error| unreachable(&error))?;
    let (mut out, mut input) = (BytesMut::new(), BytesMut::new());
    let (proof, hash) = match keys {
        Some(Keys::Scram(keys)) => (Some(Proof::Keys(keys)), None),
        Some(Keys::Md5(hash)) => (None, Some(hash)),
        None => (None, None),
    };
    let login = Login::new(purpose, proof, nonce, &mut out)
        .map_err(|error| (Failed::Otherwise, error.into()))?
        .bound_to(stream.server_certificate_hash());
    let mut login = match hash {
        Some(hash) => login.known_by(hash),
        None => login,
    };
    loop {
        stream.send(&mut out).await.map_err(|error| unreachable(&error))?;
        stream.receive(&mut input).await.map_err(|error| unreachable(&error))?;
        let mut rest = &input[..];
        let step = login.read(&mut rest, &mut out);
        let taken = input.len() - rest.len();
        input.advance(taken);
        match step {
            Step::More => {}
            Step::In(welcome) => return Ok((stream, welcome.into())),
            Step::Failed(error) => {
                let refused = !login.is_authenticated() && matches!(error, login::NotIn::Refused { .. });
                let failed = if refused { Failed::Refused { encrypted } } else { Failed::Otherwise };
                return Err((failed, error.into()));
            }
        }
    }
}

/// What shows a certificate needs TLS, and walsenders have no line for a socket in what agents write.
fn may_come_by_socket(purpose: &Purpose) -> bool {
    !purpose.is_certified && purpose.replication == Replication::Off
}

/// Nobody is there, or somebody else, or no line of its hba file is for a socket.
fn is_worth_tcp(error: &NotIn) -> bool {
    matches!(error, NotIn::Unreachable(_)) || error.is_shut_out()
}

impl Backend {
    /// Over its Unix socket where it is on this host, which saves the kernel's TCP and TLS; else over TCP.
    pub(crate) async fn open(
        place: Place,
        target: Target,
        way: Way<'_>,
        purpose: &Purpose,
        keys: Option<Keys>,
    ) -> Result<Backend, NotIn> {
        let late =
            || NotIn::Unreachable(format!("it has not let anybody in for {} s", CONNECT_WITHIN.as_secs()));
        let opening = async {
            let over_tcp = Target { socket_dir: None, ..target.clone() };
            if target.socket_dir.is_some() && may_come_by_socket(purpose) {
                match Backend::open_by_socket(place.clone(), target, way, purpose, keys.clone()).await {
                    Err(error) if is_worth_tcp(&error) => {
                        tracing::debug!(node = %place.node, %error, "not by its Unix socket");
                    }
                    opened => return opened,
                }
            }
            Backend::open_one_way(place, over_tcp, way, purpose, keys).await
        };
        timeout(CONNECT_WITHIN, opening).await.map_err(|_| late())?
    }

    /// Of the server that is meant: a path is the same on many hosts, and inside of containers.
    async fn open_by_socket(
        place: Place,
        target: Target,
        way: Way<'_>,
        purpose: &Purpose,
        keys: Option<Keys>,
    ) -> Result<Backend, NotIn> {
        let way = Way { mode: TlsMode::Disable, ..way };
        let mut backend = Backend::open_one_way(place, target, way, purpose, keys).await?;
        let name = backend.show(b"SHOW cluster_name").await?;
        match name == backend.place.node.as_str().as_bytes() {
            true => Ok(backend),
            false => {
                let found = String::from_utf8_lossy(&name).into_owned();
                Err(NotIn::Unreachable(format!("\"{found}\" is there")))
            }
        }
    }

    async fn open_one_way(
        place: Place,
        target: Target,
        way: Way<'_>,
        purpose: &Purpose,
        keys: Option<Keys>,
    ) -> Result<Backend, NotIn> {
        let mut attempts = tls::attempts(way.mode).iter().peekable();
        let (stream, welcome) = loop {
            // Each mode has one at least.
            let attempt = attempts.next().copied().unwrap_or(Attempt::Demanded);
            match enter(&target, way, attempt, purpose, keys.clone()).await {
                Ok(entered) => break entered,
                Err((failed, error)) if attempts.peek().is_some() && may_try_again(attempt, failed) => {
                    tracing::debug!(node = %target.node, mode = %way.mode, %error, "the other way is tried");
                }
                Err((_, error)) => return Err(error),
            }
        };
        // A cancel goes the way that led there.
        let mode = if stream.is_encrypted() { way.mode.max(TlsMode::Require) } else { TlsMode::Disable };
        let cancelable = Arc::new(Cancelable { target, mode, pid: welcome.pid, key: welcome.key.clone() });
        let (settings, known) = (Arc::default(), Known::new(MOST_STATEMENTS));
        let defaults = Arc::clone(&welcome.parameters);
        let overheard = BytesMut::new();
        let opened = clock::now();
        Ok(Backend {
            stream,
            place,
            welcome,
            cancelable,
            opened,
            rests_since: opened,
            admitted: Admitted::default(),
            defaults,
            settings,
            overheard,
            known,
            card: None,
            bell: None,
        })
    }

    /// One that warns whoever asks nothing else of it. A role or a database may have `client_min_messages = error`, and with it a
    /// commit that was not waited for would look like any other. What the startup packet says goes before what those have, and is
    /// what a RESET leads back to (manual 20.1.3).
    pub(crate) async fn open_to_write(
        place: Place,
        target: Target,
        way: Way<'_>,
        mut purpose: Purpose,
        keys: Option<Keys>,
    ) -> Result<Backend, NotIn> {
        let mut backend = Backend::open(place.clone(), target.clone(), way, &purpose, keys.clone()).await?;
        let level = backend.show(b"SHOW client_min_messages").await?;
        match settings::startup_that_warns(&level) {
            None => Ok(backend),
            Some(parameter) => {
                drop(backend);
                purpose.parameters.push(parameter);
                Backend::open(place, target, way, &purpose, keys).await
            }
        }
    }

    /// What it answers to that, when it has just been opened: afterwards it is as fresh as before.
    async fn show(&mut self, query: &[u8]) -> Result<Vec<u8>, NotDone> {
        let mut out = BytesMut::new();
        build::query(&mut out, query).map_err(|error| lost(&error))?;
        let rows = self.ask(&mut out, CLEAN_WITHIN).await?;
        self.known.clear();
        Ok(rows.into_iter().next().flatten().unwrap_or_default())
    }

    /// Sets what a client has set, and nothing else. `forgets_sequences`: what they gave to others must not be told.
    pub(crate) async fn become_like(
        &mut self,
        settings: &Arc<Values>,
        forgets_sequences: bool,
    ) -> Result<(), NotDone> {
        let mut out = BytesMut::new();
        if forgets_sequences {
            call(&mut out, b"DISCARD SEQUENCES", &[])?;
        }
        for (name, value) in self.settings.changes_to(settings) {
            // As values, which need no quoting and can be nothing else.
            let text = b"SELECT pg_catalog.set_config($1, $2, false)";
            call(&mut out, text, &[Some(name.as_bytes()), value.map(str::as_bytes)])?;
        }
        if !out.is_empty() {
            build::sync(&mut out);
            self.ask(&mut out, CLEAN_WITHIN).await?;
        }
        self.settings = Arc::clone(settings);
        Ok(())
    }

    /// What came of a transaction with these effects, for a client that came in with `startup`.
    pub(crate) async fn inspect(&mut self, effects: &Effects, startup: &Values) -> Result<Found, NotDone> {
        let Some(question) = settings::question(&effects.changed, effects.ties) else {
            let (server, client) = (Values::clone(&self.settings), Values::clone(&self.settings));
            return Ok(Found { server, client, ties: Ties::NONE });
        };
        let names = settings::names(&effects.changed, &self.settings);
        let rows = self.values(question.as_bytes(), &[names.as_deref()], CLEAN_WITHIN).await?;
        // A value in another encoding could not be set again as it was.
        let rows = rows.into_iter().flatten().map(String::from_utf8);
        let rows: Vec<String> = rows.collect::<Result<_, _>>().map_err(|_| NotDone::Refused {
            sqlstate: SqlState::FEATURE_NOT_SUPPORTED,
            message: "a setting is not valid UTF-8".to_owned(),
        })?;
        let found = Found::read(rows, &effects.changed, &self.settings, startup);
        self.settings = Arc::new(found.server.clone());
        Ok(found)
    }

    /// Takes everything back that a session can have left behind.
    pub(crate) async fn clean(&mut self) -> Result<(), NotDone> {
        let mut out = BytesMut::new();
        build::query(&mut out, b"DISCARD ALL").map_err(|error| lost(&error))?;
        self.ask(&mut out, CLEAN_WITHIN).await?;
        self.settings = Arc::default();
        self.overheard.clear();
        self.known.clear();
        Ok(())
    }

    /// What a client has set is set in it, and nothing else.
    pub(crate) fn is_like(&self, settings: &Arc<Values>) -> bool {
        Arc::ptr_eq(&self.settings, settings) || self.settings == *settings
    }

    /// Needs not be set.
    pub(crate) fn is_default(&self, name: &str, value: &str) -> bool {
        let is_so = |(known, is): &(Vec<u8>, Vec<u8>)| {
            known.eq_ignore_ascii_case(name.as_bytes()) && is == value.as_bytes()
        };
        self.defaults.iter().any(is_so)
    }

    /// It says itself that it only replays. PostgreSQL tells that at the beginning, and when it is promoted.
    pub(crate) fn is_standby(&self) -> bool {
        let is_so = |(name, is): &(Vec<u8>, Vec<u8>)| name == b"in_hot_standby" && is == b"on";
        self.welcome.parameters.iter().any(is_so)
    }

    /// As it was when it was opened.
    pub(crate) fn is_fresh(&self) -> bool {
        self.settings.is_empty() && self.known.is_empty()
    }

    /// The rows of a query that takes these values; each row has one.
    pub(crate) async fn values(
        &mut self,
        query: &[u8],
        values: &[Option<&str>],
        within: Duration,
    ) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        let mut out = BytesMut::new();
        let values: Vec<Option<&[u8]>> = values.iter().map(|value| value.map(str::as_bytes)).collect();
        call(&mut out, query, &values)?;
        build::sync(&mut out);
        self.ask(&mut out, within).await
    }

    /// Of a query that takes none, with this status before and after it. In a client's transaction, that fails if this does.
    pub(crate) async fn values_in(
        &mut self,
        status: TransactionStatus,
        query: &[u8],
        within: Duration,
    ) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        let mut out = BytesMut::new();
        call(&mut out, query, &[])?;
        build::sync(&mut out);
        self.ask_in(status, &mut out, within).await
    }

    /// Sends what stands in `out` and reads up to ReadyForQuery, which must find no transaction.
    async fn ask(&mut self, out: &mut BytesMut, within: Duration) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        self.ask_in(TransactionStatus::Idle, out, within).await
    }

    async fn ask_in(
        &mut self,
        expected: TransactionStatus,
        out: &mut BytesMut,
        within: Duration,
    ) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        // The questions are unnamed statements themselves.
        self.known.set_unnamed(UNKNOWN);
        let asking = async {
            self.stream.send(out).await.map_err(|error| lost(&error))?;
            self.answer(expected).await
        };
        let late = || NotDone::Lost(format!("it has not answered for {} s", within.as_secs()));
        timeout(within, asking).await.map_err(|_| late())?
    }

    async fn answer(&mut self, expected: TransactionStatus) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        let mut scanner = Scanner::new(Side::Server, Phase::Session);
        let (mut input, mut kind, mut refused, mut rows) = (BytesMut::new(), None, None, Vec::new());
        let mut spill = Spill::new(MAX_ANSWER_BYTES);
        let (mut is_ready, mut kept_bytes) = (false, 0);
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
                kept_bytes += if matches!(known, b'A' | b'D') { body.len() } else { 0 };
                if kept_bytes > MAX_ANSWER_BYTES {
                    return Err(NotDone::Lost("it answers without end".to_owned()));
                }
                if known == b'A' {
                    let header = Header { kind: known, body_bytes: body.len() as u32 };
                    self.overheard.extend_from_slice(&header.to_bytes());
                    self.overheard.extend_from_slice(body);
                }
                match ServerMessage::parse(known, body).map_err(|error| lost(&error))? {
                    ServerMessage::ReadyForQuery(status) if status == expected => is_ready = true,
                    ServerMessage::ReadyForQuery(TransactionStatus::Failed) if refused.is_some() => {
                        is_ready = true;
                    }
                    ServerMessage::ReadyForQuery(status) => {
                        return Err(NotDone::Lost(format!("its transaction is {status:?}")));
                    }
                    ServerMessage::NoticeResponse(fields) if fields.get(b'R') == Some(SYNC_REP_WAIT) => {
                        refused.get_or_insert(NotDone::Refused {
                            sqlstate: SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
                            message: "the commit was not confirmed by the standbys".to_owned(),
                        });
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
                    ServerMessage::ParameterStatus { name, value } if !self.welcome.note(name, value) => {
                        return Err(NotDone::Lost("it reports too many parameters".to_owned()));
                    }
                    ServerMessage::DataRow(values) => {
                        rows.extend(values.iter().next().map(|value| value.map(<[u8]>::to_vec)));
                    }
                    _ => {}
                }
            }
            // A notification may follow, and may be cut in two.
            if is_ready && kind.is_none() && rest.is_empty() {
                return refused.map_or(Ok(rows), Err);
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
        let goodbye = timeout(Duration::from_secs(1), self.stream.send(&mut out)).await;
        if let Ok(Err(error)) = goodbye {
            tracing::debug!(%error, "a server was gone before it was told goodbye");
        }
    }
}

/// Who is asked to cancel.
#[derive(Clone, Debug)]
pub(crate) struct Cancelable {
    pub(crate) target: Target,
    /// How it was reached.
    pub(crate) mode: TlsMode,
    pub(crate) pid: u32,
    pub(crate) key: Vec<u8>,
}

/// Asks the server to cancel what that backend does, and waits until it has passed that on: afterwards the cancel can hit
/// nothing else.
pub(crate) async fn cancel(who: &Cancelable, tls: &dyn ServerTls) {
    let asking = async {
        let attempt = if who.mode.is_demanded() { Attempt::Demanded } else { Attempt::Clear };
        let connected = net::connect(&who.target, Way { tls, mode: who.mode }, attempt).await;
        let mut stream = connected.map_err(|error| std::io::Error::other(error.to_string()))?;
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
    match timeout(CANCEL_WITHIN, asking).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a cancel did not reach the server"),
        Err(_) => tracing::debug!("a cancel did not reach the server in time"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use pgherd_core::types::{NodeName, Term};
    use pgherd_pgwire::message::ClientMessage;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::UnixStream;

    use super::*;
    use crate::local::Local;

    pub(crate) fn backend(stream: Stream) -> Backend {
        let node: NodeName = "a".parse().unwrap();
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let target = Target { node: node.clone(), address, port: 1, socket_dir: None };
        Backend {
            stream,
            place: Place { node, term: Term(1) },
            welcome: Welcome::default(),
            cancelable: Arc::new(Cancelable { target, mode: TlsMode::Disable, pid: 1, key: Vec::new() }),
            opened: clock::now(),
            rests_since: clock::now(),
            admitted: Admitted::default(),
            defaults: Arc::default(),
            settings: Arc::default(),
            overheard: BytesMut::new(),
            known: Known::new(1),
            card: None,
            bell: None,
        }
    }

    /// A server that answers one of the proxy's own questions with these, again and again.
    async fn asked(answer: Vec<u8>) -> Result<Vec<Option<Vec<u8>>>, NotDone> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let speaking = tokio::spawn(async move {
            // Until nobody listens any more.
            while theirs.write_all(&answer).await.is_ok() {}
        });
        let mut backend = backend(Stream::Unix(Local::new(ours).unwrap()));
        let answered = backend.values(b"SELECT 1", &[], Duration::from_secs(20)).await;
        drop(backend);
        speaking.await.unwrap();
        answered
    }

    /// Whatever a user or a setting is called, it stands where nothing is read as SQL.
    #[test]
    fn a_name_is_a_value_and_no_text() {
        let (mut out, name) = (BytesMut::new(), b"x' OR true; DROP ROLE \"alice\" --");
        call(&mut out, b"SELECT $1", &[Some(name)]).unwrap();
        let mut scanner = Scanner::new(Side::Client, Phase::Session);
        let (mut input, mut texts, mut values) = (&out[..], Vec::new(), Vec::new());
        while let Some(Piece::Header(header)) = scanner.next(&mut input).unwrap() {
            let mut spill = Spill::new(1000);
            let body = scanner.whole(&mut input, &mut spill).unwrap().unwrap();
            match ClientMessage::parse(header.kind, body).unwrap() {
                ClientMessage::Parse(parse) => texts.push(parse.text.to_vec()),
                ClientMessage::Bind(bind) => values.extend(bind.values.iter().flatten().map(<[u8]>::to_vec)),
                other => assert!(matches!(other, ClientMessage::Execute { .. }), "{other:?}"),
            }
        }
        assert_eq!((texts, values), (vec![b"SELECT $1".to_vec()], vec![name.to_vec()]));
    }

    #[tokio::test]
    async fn an_answer_has_an_end() {
        let mut row = BytesMut::new();
        build::data_row(&mut row, &[Some(&[b'x'; 1000])]).unwrap();
        let heard = [&b"A\0\0\0\x0e\0\0\0\x07"[..], b"news\0\0"].concat();
        for without_end in [row.to_vec(), heard] {
            let answered = asked(without_end).await;
            assert_eq!(answered, Err(NotDone::Lost("it answers without end".to_owned())));
        }
    }
}
