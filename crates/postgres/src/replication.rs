//! A connection for physical replication: opened, let in, and read message by message.
//!
//! By the Unix socket, or over TLS as [`crate::sql::Session::remote`] does it: the other's certificate and name are verified before a
//! proof is given. What is asked and what is answered is [`pgherd_pgwire::replication`].
//!
//! Leaves out: from where on, what becomes of the WAL, what is reported and when. Hazard: a position that is reported lets the
//! server remove the WAL before it, so nothing here reports by itself.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, Bytes, BytesMut};
use pgherd_core::types::{Lsn, SystemId, Timeline};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::frame::{FrameError, Header, Phase, Piece, Scanner, Side};
use pgherd_pgwire::login::{self, Login, Purpose};
use pgherd_pgwire::message::server::Fields;
use pgherd_pgwire::message::{Malformed, ServerMessage, build};
use pgherd_pgwire::replication::{
    Command, Identity, MAX_ROW_BYTES, Next, SlotPosition, StatusUpdate, Streamed, segment_bytes, setting,
    timeline_history,
};
use pgherd_pgwire::scram::{Password, Proof};
use pgherd_pgwire::startup::{Answer, Replication as Kind, encryption_answer};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::error::{Error, within};
use crate::instance::Instance;
use crate::secret::Secret;
use crate::sql::{Remote, TlsIdentity};

pub use pgherd_pgwire::replication::SlotName;

/// What is read at a time: several messages of a WAL sender that is behind.
const READ_BYTES: usize = 512 * 1024;
/// Every message here is a row or a piece of WAL.
const MAX_MESSAGE_BYTES: usize = MAX_ROW_BYTES + 64;
/// A report is some forty bytes; a server that takes none for so long is gone.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// Between the epochs of Unix and PostgreSQL.
const EPOCH_SECONDS: u64 = 946_684_800;
const READY_FOR_QUERY: u8 = b'Z';
const APPLICATION_NAME: &str = "pgherd wal";

/// Where WAL comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// As this role, through the socket.
    Local {
        socket: PathBuf,
        role: String,
    },
    Remote(Box<Remote>),
    /// A server that no herd has.
    Foreign(Box<Foreign>),
}

/// A server that no herd has, by TCP. A socket of this host is [`Source::Local`].
#[derive(Clone, Debug)]
pub struct Foreign {
    pub host: String,
    pub port: u16,
    pub role: String,
    pub password: Option<Secret>,
    /// Without one, nothing is encrypted and nobody's certificate is looked at.
    pub tls: Option<TlsIdentity>,
}

impl Source {
    pub fn local(instance: &Instance, role: &str) -> Source {
        let socket = instance.socket_dir.join(format!(".s.PGSQL.{}", instance.port));
        Source::Local { socket, role: role.to_owned() }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Local { socket, .. } => write!(f, "{}", socket.display()),
            Source::Remote(remote) => write!(f, "{} ({}:{})", remote.host, remote.address, remote.port),
            Source::Foreign(foreign) => write!(f, "{}, port {}", foreign.host, foreign.port),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplicationError {
    #[error("{server} cannot be reached: {source}")]
    Io { server: Arc<str>, source: io::Error },
    #[error("{server} does not let anybody in for replication: {source}")]
    NotIn { server: Arc<str>, source: login::NotIn },
    #[error("{server} refused {command}: {message} (SQLSTATE {sqlstate}){}", .detail.as_deref().map(|detail| format!("; {detail}")).unwrap_or_default())]
    Refused { server: Arc<str>, command: String, sqlstate: SqlState, message: String, detail: Option<String> },
    #[error("{server} has ended the connection")]
    Closed { server: Arc<str> },
    #[error("{server} broke the protocol: {what}")]
    Protocol { server: Arc<str>, what: String },
    #[error(transparent)]
    Other(#[from] Error),
}

/// Refusals that somebody can do something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    SlotMissing,
    SlotInUse,
    /// It keeps nothing any more (`max_slot_wal_keep_size`, `idle_replication_slot_timeout`).
    SlotInvalidated,
    /// The server does not have the WAL that was asked for any more.
    WalRemoved,
}

impl ReplicationError {
    pub fn refusal(&self) -> Option<Refusal> {
        let ReplicationError::Refused { sqlstate, .. } = self else { return None };
        match sqlstate.as_bytes() {
            b"42704" => Some(Refusal::SlotMissing),
            b"55006" => Some(Refusal::SlotInUse),
            b"55000" => Some(Refusal::SlotInvalidated),
            b"58P01" => Some(Refusal::WalRemoved),
            _ => None,
        }
    }
}

type Result<T, E = ReplicationError> = std::result::Result<T, E>;

/// What a stream says.
#[derive(Clone, PartialEq, Eq)]
pub enum Message {
    Wal {
        start: Lsn,
        wal: Bytes,
        server_end: Lsn,
    },
    Keepalive {
        server_end: Lsn,
        wants_reply: bool,
    },
    /// All of this timeline has come; see [`Replication::next_timeline`].
    TimelineEnds,
}

/// How a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    Streaming,
    /// There is nothing on this timeline behind the position that was asked for.
    Ended(NextTimeline),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextTimeline {
    pub timeline: Timeline,
    pub from: Lsn,
}

/// Which server it is, and what it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identified {
    pub system: SystemId,
    pub timeline: Timeline,
    pub end: Lsn,
    pub segment_bytes: u32,
}

/// From where on a slot keeps WAL; `None`: it keeps nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept(pub Option<(Timeline, Lsn)>);

enum Link {
    Local(UnixStream),
    Clear(TcpStream),
    Encrypted(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Link {
    async fn send(&mut self, bytes: &mut BytesMut) -> io::Result<()> {
        match self {
            Link::Local(stream) => stream.write_all_buf(bytes).await,
            Link::Clear(stream) => stream.write_all_buf(bytes).await,
            Link::Encrypted(stream) => {
                stream.write_all_buf(bytes).await?;
                stream.flush().await
            }
        }
    }

    async fn receive(&mut self, into: &mut BytesMut) -> io::Result<usize> {
        into.reserve(READ_BYTES);
        match self {
            Link::Local(stream) => stream.read_buf(into).await,
            Link::Clear(stream) => stream.read_buf(into).await,
            Link::Encrypted(stream) => stream.read_buf(into).await,
        }
    }
}

/// A connection. Dropping it ends it.
pub struct Replication {
    server: Arc<str>,
    link: Link,
    input: BytesMut,
    scanner: Scanner,
    /// Of the message whose body is still to come.
    header: Option<Header>,
    /// A command was asked whose answer has not come to its end: it was refused.
    owes_ready: bool,
}

impl Replication {
    pub async fn open(source: &Source, deadline: Duration) -> Result<Replication> {
        Replication::open_as(source, APPLICATION_NAME, deadline).await
    }

    /// Under a name that the server's list of synchronous standbys may have.
    pub async fn open_as(source: &Source, name: &str, deadline: Duration) -> Result<Replication> {
        within("opening a connection for replication", deadline, async {
            let server: Arc<str> = source.to_string().into();
            let failed = |source| ReplicationError::Io { server: Arc::clone(&server), source };
            let (link, role, proof) = match source {
                Source::Local { socket, role } => {
                    (Link::Local(UnixStream::connect(socket).await.map_err(failed)?), role, None)
                }
                Source::Remote(remote) => {
                    let password = Password::new(remote.password.reveal()).map(Proof::Password);
                    let at = SocketAddr::new(remote.address, remote.port);
                    let stream = TcpStream::connect(at).await.map_err(failed)?;
                    (encrypted(stream, &remote.host, &remote.tls, &server).await?, &remote.role, password)
                }
                Source::Foreign(foreign) => {
                    let Foreign { host, port, role, password, tls } = &**foreign;
                    let password = password.as_ref().and_then(|password| Password::new(password.reveal()));
                    let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
                    let link = match tls {
                        Some(tls) => encrypted(stream, host, tls, &server).await?,
                        None => Link::Clear(stream),
                    };
                    (link, role, password.map(Proof::Password))
                }
            };
            let this = Replication {
                server,
                link,
                input: BytesMut::new(),
                scanner: Scanner::new(Side::Server, Phase::Session),
                header: None,
                owes_ready: false,
            };
            this.come_in(role, proof, name).await
        })
        .await
    }

    async fn come_in(mut self, role: &str, proof: Option<Proof>, name: &str) -> Result<Replication> {
        let purpose = Purpose {
            user: role.to_owned(),
            database: "replication".to_owned(),
            replication: Kind::Physical,
            parameters: vec![("application_name".to_owned(), name.to_owned())],
            is_certified: false,
        };
        let not_in = |source| ReplicationError::NotIn { server: Arc::clone(&self.server), source };
        let mut out = BytesMut::new();
        let mut login = Login::new(&purpose, proof, nonce()?, &mut out).map_err(not_in)?;
        loop {
            self.send(&mut out).await?;
            self.receive().await?;
            let mut rest = &self.input[..];
            let step = login.read(&mut rest, &mut out);
            let taken = self.input.len() - rest.len();
            self.input.advance(taken);
            match step {
                login::Step::More => {}
                login::Step::In(_) => return Ok(self),
                login::Step::Failed(source) => {
                    return Err(ReplicationError::NotIn { server: self.server, source });
                }
            }
        }
    }

    /// Which server it is.
    pub async fn identify(&mut self, deadline: Duration) -> Result<Identified> {
        within("asking a server who it is", deadline, async {
            let row = self.row(&Command::IdentifySystem).await?;
            let identity = self.read(&row, Identity::read)?;
            let row = self.row(&Command::ShowSegmentBytes).await?;
            let segment_bytes = self.read(&row, segment_bytes)?;
            Ok(Identified {
                system: SystemId(identity.system_identifier),
                timeline: Timeline(identity.timeline),
                end: Lsn(identity.end),
                segment_bytes,
            })
        })
        .await
    }

    /// A setting of the server.
    pub async fn show(&mut self, name: &'static str, deadline: Duration) -> Result<String> {
        within("asking for a setting", deadline, async {
            let row = self.row(&Command::Show(name)).await?;
            self.read(&row, setting)
        })
        .await
    }

    /// A timeline's history file.
    pub async fn history(&mut self, timeline: Timeline, deadline: Duration) -> Result<Bytes> {
        within("asking for a timeline's history", deadline, async {
            let row = self.row(&Command::TimelineHistory(timeline.0)).await?;
            let content = self.read(&row, |row| timeline_history(timeline.0, row))?;
            Ok(row.slice_ref(content))
        })
        .await
    }

    /// What a slot keeps; `None`: there is no such slot. PostgreSQL answers this as of version 15.
    pub async fn slot(&mut self, slot: &SlotName, deadline: Duration) -> Result<Option<Kept>> {
        within("asking for a slot", deadline, async {
            let row = self.row(&Command::ReadReplicationSlot(slot)).await?;
            let position = self.read(&row, SlotPosition::read)?;
            let kept = |slot: SlotPosition| Kept(slot.restart.map(|at| (Timeline(at.timeline), Lsn(at.at))));
            Ok(position.map(kept))
        })
        .await
    }

    /// Begins to stream.
    pub async fn start(
        &mut self,
        slot: Option<&SlotName>,
        timeline: Timeline,
        start: Lsn,
        deadline: Duration,
    ) -> Result<Started> {
        let command = Command::StartReplication { slot, start: start.0, timeline: timeline.0 };
        within("beginning to stream", deadline, async {
            self.ask(&command).await?;
            loop {
                let (kind, body) = self.message().await?;
                match self.parse(kind, &body)? {
                    ServerMessage::CopyBothResponse(_) => return Ok(Started::Streaming),
                    ServerMessage::DataRow(row) => {
                        let next = self.next_of(Next::read(&row))?;
                        self.until_ready(&command).await?;
                        return Ok(Started::Ended(next));
                    }
                    message => self.pass_over(&message, &command)?,
                }
            }
        })
        .await
    }

    /// The next message of a stream. May be cancelled at any time: what came is kept.
    pub async fn next(&mut self) -> Result<Message> {
        loop {
            let (kind, body) = self.message().await?;
            match self.parse(kind, &body)? {
                ServerMessage::CopyData(data) => {
                    return match Streamed::parse(data).map_err(|error| self.malformed(&error))? {
                        Streamed::Wal { start, wal, server_end } => Ok(Message::Wal {
                            start: Lsn(start),
                            wal: body.slice_ref(wal),
                            server_end: Lsn(server_end),
                        }),
                        Streamed::Keepalive { server_end, wants_reply } => {
                            Ok(Message::Keepalive { server_end: Lsn(server_end), wants_reply })
                        }
                    };
                }
                ServerMessage::CopyDone => return Ok(Message::TimelineEnds),
                // It shuts down, and has sent all that it has.
                ServerMessage::CommandComplete { .. } => {
                    return Err(ReplicationError::Closed { server: Arc::clone(&self.server) });
                }
                message => self.pass_over(&message, &"to go on streaming")?,
            }
        }
    }

    /// What follows the timeline that has ended. The connection can be asked and started again then.
    pub async fn next_timeline(&mut self, deadline: Duration) -> Result<NextTimeline> {
        within("asking for the next timeline", deadline, async {
            let mut out = BytesMut::new();
            build::copy_done(&mut out);
            self.send(&mut out).await?;
            let doing = "to end a timeline";
            loop {
                let (kind, body) = self.message().await?;
                match self.parse(kind, &body)? {
                    ServerMessage::DataRow(row) => {
                        let next = self.next_of(Next::read(&row))?;
                        self.until_ready(&doing).await?;
                        return Ok(next);
                    }
                    ServerMessage::ReadyForQuery(_) => {
                        return Err(self.protocol("a timeline that has ended and has no successor"));
                    }
                    message => self.pass_over(&message, &doing)?,
                }
            }
        })
        .await
    }

    /// Reports: everything before `flushed` may be forgotten by the server, and a commit there acknowledged.
    pub async fn report(&mut self, flushed: Lsn, wants_reply: bool) -> Result<()> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = i64::try_from(since.saturating_sub(Duration::from_secs(EPOCH_SECONDS)).as_micros());
        // What is in memory only is not said to be written: `remote_write` would take it for a copy.
        let update =
            StatusUpdate { written: flushed.0, flushed: flushed.0, at: at.unwrap_or(0), wants_reply };
        let mut out = BytesMut::new();
        update.write(&mut out).map_err(|error| self.protocol(error.to_string()))?;
        within("reporting to a server", WRITE_WITHIN, self.send(&mut out)).await
    }

    fn next_of(&self, next: Result<Next, Malformed>) -> Result<NextTimeline> {
        let next = next.map_err(|error| self.malformed(&error))?;
        Ok(NextTimeline { timeline: Timeline(next.timeline), from: Lsn(next.from) })
    }

    pub(crate) async fn ask(&mut self, command: &Command<'_>) -> Result<()> {
        while self.owes_ready {
            let (kind, _) = self.message().await?;
            self.owes_ready = kind != READY_FOR_QUERY;
        }
        let mut out = BytesMut::new();
        let text = command.to_string();
        build::query(&mut out, text.as_bytes()).map_err(|error| self.protocol(error.to_string()))?;
        self.owes_ready = true;
        self.send(&mut out).await
    }

    /// The one row of a command's answer, as the body of its message.
    pub(crate) async fn row(&mut self, command: &Command<'_>) -> Result<Bytes> {
        self.ask(command).await?;
        let mut row = None;
        loop {
            let (kind, body) = self.message().await?;
            match self.parse(kind, &body)? {
                ServerMessage::DataRow(_) if row.is_none() => row = Some(body),
                ServerMessage::ReadyForQuery(_) => {
                    self.owes_ready = false;
                    return row.ok_or_else(|| self.protocol(format!("no answer to {command}")));
                }
                message => self.pass_over(&message, command)?,
            }
        }
    }

    pub(crate) fn read<'b, T>(
        &self,
        row: &'b Bytes,
        read: impl FnOnce(&pgherd_pgwire::message::client::Values<'b>) -> Result<T, Malformed>,
    ) -> Result<T> {
        match ServerMessage::parse(b'D', row) {
            Ok(ServerMessage::DataRow(values)) => read(&values).map_err(|error| self.malformed(&error)),
            Ok(_) => Err(self.protocol("a row that is none")),
            Err(error) => Err(self.malformed(&error)),
        }
    }

    async fn until_ready(&mut self, doing: &(dyn fmt::Display + Sync)) -> Result<()> {
        loop {
            let (kind, body) = self.message().await?;
            match self.parse(kind, &body)? {
                ServerMessage::ReadyForQuery(_) => {
                    self.owes_ready = false;
                    return Ok(());
                }
                message => self.pass_over(&message, doing)?,
            }
        }
    }

    /// What may come at any time, and what only describes or ends an answer.
    pub(crate) fn pass_over(
        &self,
        message: &ServerMessage<'_>,
        doing: &(dyn fmt::Display + Sync),
    ) -> Result<()> {
        match message {
            ServerMessage::ErrorResponse(fields) => Err(self.refused(fields, doing)),
            ServerMessage::NoticeResponse(_)
            | ServerMessage::ParameterStatus { .. }
            | ServerMessage::RowDescription(_)
            | ServerMessage::CommandComplete { .. }
            | ServerMessage::CopyDone => Ok(()),
            _ => Err(self.protocol(format!("an answer that is none, {doing}"))),
        }
    }

    fn refused(&self, fields: &Fields<'_>, doing: &(dyn fmt::Display + Sync)) -> ReplicationError {
        let text = |code| fields.get(code).map(|text| String::from_utf8_lossy(text).into_owned());
        ReplicationError::Refused {
            server: Arc::clone(&self.server),
            command: doing.to_string(),
            sqlstate: fields.sqlstate().unwrap_or(SqlState::PROTOCOL_VIOLATION),
            message: text(b'M').unwrap_or_default(),
            detail: text(b'D'),
        }
    }

    pub(crate) fn parse<'b>(&self, kind: u8, body: &'b [u8]) -> Result<ServerMessage<'b>> {
        ServerMessage::parse(kind, body).map_err(|error| self.malformed(&error))
    }

    pub(crate) fn malformed(&self, error: &Malformed) -> ReplicationError {
        self.protocol(error.to_string())
    }

    pub(crate) fn protocol(&self, what: impl Into<String>) -> ReplicationError {
        ReplicationError::Protocol { server: Arc::clone(&self.server), what: what.into() }
    }

    async fn send(&mut self, bytes: &mut BytesMut) -> Result<()> {
        let sent = self.link.send(bytes).await;
        sent.map_err(|source| ReplicationError::Io { server: Arc::clone(&self.server), source })
    }

    async fn receive(&mut self) -> Result<()> {
        match self.link.receive(&mut self.input).await {
            Ok(0) => Err(ReplicationError::Closed { server: Arc::clone(&self.server) }),
            Ok(_) => Ok(()),
            Err(source) => Err(ReplicationError::Io { server: Arc::clone(&self.server), source }),
        }
    }

    /// The answer to the last command has come to its end.
    pub(crate) fn is_answered(&mut self) {
        self.owes_ready = false;
    }

    /// The next whole message.
    pub(crate) async fn message(&mut self) -> Result<(u8, Bytes)> {
        loop {
            if let Some(message) = self.take().map_err(|error| self.protocol(error.to_string()))? {
                return Ok(message);
            }
            self.receive().await?;
        }
    }

    fn take(&mut self) -> Result<Option<(u8, Bytes)>, FrameError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let mut rest = &self.input[..];
                let Some(Piece::Header(header)) = self.scanner.next(&mut rest)? else { return Ok(None) };
                let taken = self.input.len() - rest.len();
                self.input.advance(taken);
                self.header = Some(header);
                header
            }
        };
        let body_bytes = header.body_bytes as usize;
        if body_bytes > MAX_MESSAGE_BYTES {
            let max_bytes = MAX_MESSAGE_BYTES;
            return Err(FrameError::TooLargeToHold { body_bytes: header.body_bytes, max_bytes });
        }
        if self.input.len() < body_bytes {
            return Ok(None);
        }
        let body = self.input.split_to(body_bytes).freeze();
        if body_bytes > 0 {
            // It counts what is taken, and has nothing to say about it.
            self.scanner.next(&mut &body[..])?;
        }
        self.header = None;
        Ok(Some((header.kind, body)))
    }
}

/// TLS to another node. Whatever it sends in clear before is nobody's word.
async fn encrypted(mut stream: TcpStream, host: &str, tls: &TlsIdentity, server: &Arc<str>) -> Result<Link> {
    let failed = |source| ReplicationError::Io { server: Arc::clone(server), source };
    let broken = |what: String| ReplicationError::Protocol { server: Arc::clone(server), what };
    stream.set_nodelay(true).map_err(failed)?;
    let mut request = BytesMut::new();
    build::ssl_request(&mut request);
    stream.write_all_buf(&mut request).await.map_err(failed)?;
    let mut answer = BytesMut::with_capacity(64);
    stream.read_buf(&mut answer).await.map_err(failed)?;
    match encryption_answer(&answer, b'S').map_err(|error| broken(error.to_string()))? {
        Some(Answer::Granted) => {}
        Some(Answer::Refused) => return Err(broken("it does not speak TLS".to_owned())),
        None => return Err(ReplicationError::Closed { server: Arc::clone(server) }),
    }
    let name = ServerName::try_from(host.to_owned()).map_err(|error| broken(error.to_string()))?;
    let stream = tls.tls().connect(name, stream).await.map_err(failed)?;
    Ok(Link::Encrypted(Box::new(stream)))
}

fn nonce() -> Result<String, Error> {
    let mut bytes = [0_u8; 18];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::Answer { what: "the kernel gave no random bytes".into() })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
