//! One client, from its first byte to its last.
//!
//! Comes in ([`crate::login`]), waits for a server ([`crate::pools`]), is relayed to it ([`crate::relay`]), and leaves it as
//! clean as it was found. Whatever goes wrong, the client hears one sentence with an SQLSTATE before it is closed.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::login::{self, Purpose};
use pgherd_pgwire::message::build::{self, Report, Severity};
use pgherd_pgwire::message::{Key, TransactionStatus};
use pgherd_pgwire::startup::options::{Switch, switches};
use pgherd_pgwire::startup::{Replication, Version};
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::backend::{Backend, NotDone, cancel};
use crate::cancel::{Cancels, Ticket};
use crate::census::Counted;
use crate::commit::{self, Check, Outcome};
use crate::console::serve as console;
use crate::counts::NoEntry;
use crate::fence::Admission;
use crate::hba::{self, Certificate, ClientCert};
use crate::login::{Asked, Keys, Login, Method, Step};
use crate::names::Names;
use crate::net::{self, Stream};
use crate::pool::{ClientId, Place, Refusal, Worker};
use crate::pools::{Lent, Name, NotLent, OnePool};
use crate::positions::{Mark, Who};
use crate::proxy::Access;
use crate::readers::find_reader;
use crate::relay::{End, Link, relay};
use crate::roster::{Card, Entry, Newcomer};
use crate::routes::{Role, Route, Target};
use crate::server::NotIn;
use crate::session::{CANCELED, Fault, Lost, Mode, Session};
use crate::settings::Values;
use crate::share::share;
use crate::timer::{sleep_until, timeout, timeout_at};
use crate::watch::Overdue;
use crate::world::{PoolMode, World, nonce, random};

/// For the last sentence: whoever does not take it by then does not hear it.
const FAREWELL_WITHIN: Duration = Duration::from_secs(2);

/// What a client is told before it is closed.
pub(crate) struct Farewell {
    sqlstate: SqlState,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

impl Farewell {
    pub(crate) fn new(sqlstate: SqlState, message: impl Into<String>) -> Farewell {
        Farewell { sqlstate, message: message.into(), detail: None, hint: None }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Farewell {
        Farewell { hint: Some(hint.into()), ..self }
    }

    /// In PgBouncer's words.
    fn dismissed() -> Farewell {
        Farewell::new(SqlState::ADMIN_SHUTDOWN, "admin forced disconnect")
    }

    /// In PostgreSQL's words.
    pub(crate) fn canceled() -> Farewell {
        Farewell::new(SqlState::QUERY_CANCELED, CANCELED)
    }

    /// In PostgreSQL's words.
    fn too_late() -> Farewell {
        Farewell::new(SqlState::QUERY_CANCELED, "canceling authentication due to timeout")
            .hint("It is login_timeout in [proxy] of the herd file.")
    }

    fn write(&self, to: &mut BytesMut) {
        let report = Report {
            severity: Severity::Fatal,
            sqlstate: self.sqlstate,
            message: &self.message,
            detail: self.detail.as_deref(),
            hint: self.hint.as_deref(),
        };
        build::error_response(to, &report);
    }
}

impl From<Fault> for Farewell {
    fn from(fault: Fault) -> Farewell {
        match fault {
            Fault::Client { sqlstate, message } => Farewell::new(sqlstate, message),
            fault @ Fault::Server(_) => Farewell::new(SqlState::PROTOCOL_VIOLATION, fault.to_string()),
        }
    }
}

impl From<NotIn> for Farewell {
    fn from(error: NotIn) -> Farewell {
        match error {
            NotIn::Login(login::NotIn::Refused { sqlstate, message, detail, hint }) => {
                Farewell { sqlstate, message, detail, hint }
            }
            NotIn::Login(login::NotIn::Scram(error)) => Farewell {
                hint: Some("If the password was just changed, connect again.".to_owned()),
                ..Farewell::new(error.sqlstate(), format!("the server did not let the proxy in: {error}"))
            },
            error => Farewell::new(
                SqlState::CONNECTION_FAILURE,
                format!("the proxy cannot reach the server: {error}"),
            ),
        }
    }
}

impl From<NotLent> for Farewell {
    fn from(why: NotLent) -> Farewell {
        let (sqlstate, message) = match why {
            NotLent::Rejected(error) => return error.into(),
            NotLent::Refused(Refusal::TooManyWaiting) => {
                (SqlState::TOO_MANY_CONNECTIONS, "too many clients are waiting for a server")
            }
            NotLent::Refused(Refusal::QueryWait) => {
                (SqlState::TOO_MANY_CONNECTIONS, "no server connection became free in time")
            }
            NotLent::Refused(Refusal::Paused) => {
                return Farewell {
                    hint: Some(
                        "An administrator has paused it; RESUME in the proxy's console ends that.".to_owned(),
                    ),
                    ..Farewell::new(SqlState::CANNOT_CONNECT_NOW, "the database is paused")
                };
            }
            NotLent::Refused(Refusal::NoRoute | Refusal::Rejected) => {
                (SqlState::CANNOT_CONNECT_NOW, "there was no primary for too long")
            }
        };
        Farewell {
            hint: Some(
                "pgherd explain says what the herd is doing, pgherd status who is the primary.".to_owned(),
            ),
            ..Farewell::new(sqlstate, message)
        }
    }
}

/// Why a client did not come in.
enum Out {
    /// It is gone, or is not to be answered.
    Silent,
    /// What it hears of it stands there already.
    Said,
    Told(Farewell),
}

impl From<std::io::Error> for Out {
    fn from(_: std::io::Error) -> Out {
        Out::Silent
    }
}

/// A client that has proven who it is.
struct Guest {
    stream: Stream,
    out: BytesMut,
    proven: Box<Proven>,
    entry: Entry,
}

/// What it has asked for, and the keys by which it has shown that it may. In a box, which goes from hand to hand: each of them
/// would keep room for it.
struct Proven {
    asked: Asked,
    keys: Option<Keys>,
}

/// Where a client came in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Door {
    pub(crate) access: Access,
    pub(crate) worker: Worker,
}

/// `here`: what lasts as long as the client is there.
pub(crate) fn serve(
    stream: TcpStream,
    address: SocketAddr,
    door: Door,
    world: Arc<World>,
    here: impl Send,
) -> impl Future<Output = ()> + Send {
    // In a box, so that a client that is in does not carry what it took to come in; and outside of what follows, which would
    // keep room for what is put into the box.
    let entering = Box::pin(enter_in_time(stream, address, Arc::clone(&world)));
    async move {
        if let Some(mut guest) = entering.await {
            let (stream, out, card) = (&mut guest.stream, &mut guest.out, &guest.entry.card);
            let left = stay(stream, out, guest.proven, door, card, &world).await;
            let is_told = !matches!(left, Ok(Left::ByItself));
            match left {
                // The server has said why.
                Ok(Left::ByItself | Left::Told) => {}
                Ok(Left::Dismissed) => Farewell::dismissed().write(&mut guest.out),
                Err(farewell) => farewell.write(&mut guest.out),
            }
            if is_told {
                Box::pin(say(&mut guest.stream, &mut guest.out)).await;
            }
        }
        drop(here);
    }
}

/// How a client went that needs no farewell.
pub(crate) enum Left {
    ByItself,
    Told,
    /// Somebody has ended it, and it can be told so.
    Dismissed,
}

/// Until the client is gone, or somebody has ended it.
pub(crate) async fn gone(stream: &Stream, card: &Card) -> Left {
    let mut gone = std::pin::pin!(stream.gone());
    std::future::poll_fn(|cx| match card.is_dismissed() {
        true => std::task::Poll::Ready(Left::Dismissed),
        false => gone.as_mut().poll(cx).map(|()| Left::ByItself),
    })
    .await
}

/// Why a client waits for a server no longer.
pub(crate) enum Stopped {
    Left(Left),
    /// It has canceled what it wants of it.
    Canceled,
}

pub(crate) async fn stops_waiting(stream: &Stream, card: &Card, ticket: &Ticket) -> Stopped {
    // In a box, and made when it is looked at first: most find a server at once.
    let waiting = Box::pin(async {
        let waits = ticket.waits();
        tokio::select! {
            left = gone(stream, card) => Stopped::Left(left),
            () = waits.canceled() => Stopped::Canceled,
        }
    });
    waiting.await
}

/// The last words, of the proxy or of a server. What the client still sends is read and dropped for a moment: a connection
/// that is closed with unread bytes is reset, and then its client may never read what it was told.
async fn say(stream: &mut Stream, out: &mut BytesMut) {
    let saying = async {
        stream.send(out).await?;
        stream.shutdown().await?;
        let mut ignored = BytesMut::with_capacity(1024);
        while stream.receive(&mut ignored).await.is_ok() {
            ignored.clear();
        }
        std::io::Result::Ok(())
    };
    if let Ok(Err(error)) = timeout(FAREWELL_WITHIN, saying).await {
        tracing::debug!(%error, "a client may not have heard why it was closed");
    }
}

/// Whoever does not come in hears why, also if it took too long.
async fn enter_in_time(stream: TcpStream, address: SocketAddr, world: Arc<World>) -> Option<Guest> {
    let (mut stream, mut out) = (Stream::Tcp(stream), BytesMut::new());
    let until = Instant::now() + world.settings.load().login_timeout;
    let entering = timeout_at(until, enter(&mut stream, &mut out, address.ip(), until, &world)).await;
    let entered = entering.unwrap_or_else(|_| {
        out.clear();
        world.ledger.no_entry(NoEntry::TooLate);
        Err(Out::Told(Farewell::too_late()))
    });
    let proven = match entered {
        Ok(proven) => proven,
        Err(Out::Silent) => return None,
        Err(last_word) => {
            if let Out::Told(farewell) = last_word {
                farewell.write(&mut out);
            }
            say(&mut stream, &mut out).await;
            return None;
        }
    };
    let asked = &proven.asked;
    let named = |(name, _): &&(String, String)| name == "application_name";
    let newcomer = Newcomer {
        id: world.next_client(),
        address,
        local: stream.addresses().map_or(address, |(local, _)| local),
        user: &asked.user,
        database: &asked.database,
        application_name: asked.parameters.iter().find(named).map_or("", |(_, value)| value),
        replication: asked.replication,
        is_encrypted: stream.is_encrypted(),
    };
    let entry = world.roster.enter(newcomer).await;
    Some(Guest { stream, out, proven, entry })
}

/// What the client is told so far stands in `out`.
async fn enter(
    stream: &mut Stream,
    out: &mut BytesMut,
    address: IpAddr,
    until: Instant,
    world: &Arc<World>,
) -> Result<Box<Proven>, Out> {
    let nonce = nonce().map_err(|_| Out::Silent)?;
    let settings = world.settings.load_full();
    let mut login = Login::new(settings.tls(), nonce);
    let mut input = BytesMut::new();
    let keys = converse(stream, &mut login, address, until, world, &mut input, out).await?;
    let asked = login.asked().ok_or(Out::Silent)?.clone();
    if !input.is_empty() {
        // Nothing may be sent before ReadyForQuery; what is, is read when there is a server. No driver does so.
        world.ledger.no_entry(NoEntry::Protocol);
        let message = "statements came before the first ReadyForQuery";
        return Err(Out::Told(Farewell::new(SqlState::PROTOCOL_VIOLATION, message)));
    }
    Ok(Box::new(Proven { asked, keys }))
}

async fn converse(
    stream: &mut Stream,
    login: &mut Login,
    address: IpAddr,
    until: Instant,
    world: &Arc<World>,
    input: &mut BytesMut,
    out: &mut BytesMut,
) -> Result<Option<Keys>, Out> {
    let settings = world.settings.load_full();
    let mut certificate = match &settings.client_tls {
        Some(tls) if tls.verifies_clients => Certificate::None,
        _ => Certificate::NotAskedFor,
    };
    loop {
        let mut rest = &input[..];
        let mut step = login.read(&mut rest, out);
        let taken = input.len() - rest.len();
        input.advance(taken);
        if step == Step::Method {
            let Some(asked) = login.asked() else { return Err(Out::Silent) };
            let from = hba::From { address, encrypted: login.is_encrypted(), certificate: &certificate };
            let method = method(asked, from, &settings);
            step = login.method(method, out);
        }
        if step == Step::Verifier {
            let user = login.asked().map(|asked| asked.user.clone()).unwrap_or_default();
            let known = world.verifiers.of(&user, until, world).await.map_err(|error| {
                world.ledger.no_entry(NoEntry::Unavailable);
                Out::Told(unchecked(&error))
            })?;
            step = match known.md5.filter(|_| login.takes_md5()) {
                Some(hash) if settings.md5_passwords => {
                    let salt = random()
                        .map_err(|error| Out::Told(unchecked(&NotIn::Unreachable(error.to_string()))))?;
                    login.md5(hash, salt, out)
                }
                Some(_) => login.md5_is_off(out),
                None => login.verifier(known.verifier, out),
            };
        }
        match step {
            Step::More | Step::Method | Step::Verifier => {
                stream.send(out).await?;
                stream.receive(input).await?;
            }
            Step::Handshake => {
                stream.send(out).await?;
                let Some(tls) = &settings.client_tls else { return Err(Out::Silent) };
                let direct = !input.is_empty();
                let shown = handshake(stream, input.split(), Arc::clone(&tls.config), direct).await?;
                if let Some(shown) = shown {
                    certificate = Certificate::Verified(Names::of(&shown));
                }
                login.encrypted(tls.certificate_hash.clone());
            }
            Step::In(keys) => return Ok(keys),
            Step::Cancel { pid, key } => {
                if !world.cancels.cancel(pid, &key, &*world.server_tls).await
                    && let Some(elders) = world.elders.get()
                {
                    elders.cancel(pid, &key).await;
                }
                // Nothing is said, but with TLS its end is: without that libpq takes the cancel for failed (as of 17).
                return Err(Out::Said);
            }
            Step::Refused => {
                login.refused().into_iter().for_each(|sqlstate| world.ledger.no_entry(NoEntry::of(sqlstate)));
                return Err(Out::Said);
            }
            Step::HangUp => return Err(Out::Silent),
        }
    }
}

/// The proxy could not ask for a verifier. Why is nothing for a stranger.
fn unchecked(error: &NotIn) -> Farewell {
    tracing::warn!(%error, "a client is refused, since passwords cannot be checked");
    Farewell::new(SqlState::CANNOT_CONNECT_NOW, "passwords cannot be checked at the moment")
}

/// `direct`: nobody had asked for it, and then the client must say what it wants to speak (manual 55.2.11).
async fn handshake(
    stream: &mut Stream,
    front: BytesMut,
    config: Arc<rustls::ServerConfig>,
    direct: bool,
) -> Result<Option<CertificateDer<'static>>, Out> {
    let accepted = net::accept_tls(stream.take_tcp()?, front, config).await?;
    if direct && accepted.protocol.as_deref() != Some(net::ALPN) {
        return Err(Out::Silent);
    }
    *stream = accepted.stream;
    Ok(accepted.certificate)
}

/// pgherd's own roles come from where they are at home, never through a proxy.
fn method(asked: &Asked, from: hba::From<'_>, settings: &crate::world::Settings) -> Method {
    let reject = |message| Method::Reject { message };
    if asked.user.starts_with("pgherd_") {
        return reject(format!("role \"{}\" does not come in through a proxy", asked.user));
    }
    match settings.hba.method(asked, from, ClientCert::of(settings.client_mode)) {
        // Its certificate is worth nothing to PostgreSQL, and there is no password that would be.
        Method::Admit if !settings.certificate_users.contains(&asked.user) => reject(format!(
            "certificate_users of [proxy] does not list role \"{}\", for which PostgreSQL wants a password",
            asked.user
        )),
        method => method,
    }
}

/// Has a server, uses it, leaves it.
async fn stay(
    stream: &mut Stream,
    out: &mut BytesMut,
    proven: Box<Proven>,
    mut door: Door,
    card: &Arc<Card>,
    world: &Arc<World>,
) -> Result<Left, Farewell> {
    let asked = &proven.asked;
    let ticket = Cancels::enter(world, asked.version >= Version::V3_2)
        .map_err(|error| Farewell::new(SqlState::CONNECTION_FAILURE, error.to_string()))?;
    if console::is_meant(asked) {
        return Box::pin(console::serve(stream, out, asked, &ticket, card, world)).await;
    }
    if world.disabled().contains(&asked.database) {
        world.ledger.no_entry(NoEntry::Disabled);
        let message = format!("database \"{}\" is disabled", asked.database);
        return Err(Farewell::new(SqlState::CANNOT_CONNECT_NOW, message)
            .hint("An administrator lets nobody in; ENABLE in the proxy's console ends that."));
    }
    if asked.replication != Replication::Off {
        return Box::pin(replicate(stream, out, &proven, &ticket, card, world)).await;
    }
    let _counted = count(asked, world)?;
    let Startup { settings: startup, access, splits } = startup(asked, door.access)?;
    door.access = access;
    let (database, user) = (asked.database.clone(), asked.user.clone());
    let mark = world.marks.of(Who { database, user, address: card.address.ip() });
    let splits = splits.unwrap_or(world.settings.load().reads.split) && access == Access::ReadWrite;
    // Before the client stays: settings that are looked at keep their place, and there are few.
    let mode = world.settings.load().pooling.of(&asked.database, &asked.user);
    let wants = Wants { client: card.id, card: Arc::clone(card), proven, door, mark, splits };
    match mode {
        // In a box, so that those who share servers are not as large as those who keep one.
        PoolMode::Session => Box::pin(keep(stream, out, &wants, startup, &ticket, world)).await,
        PoolMode::Transaction => share(stream, out, &wants, startup, &ticket, Mode::Transaction, world).await,
        PoolMode::Statement => share(stream, out, &wants, startup, &ticket, Mode::Statement, world).await,
    }
}

/// One more of its user and of its database, unless that is one too many.
fn count(asked: &Asked, world: &World) -> Result<(Counted, Counted), Farewell> {
    let settings = world.settings.load();
    let too_many = |what: &str, name: &str, option: &str| Farewell {
        hint: Some(format!("As many as {option} in [proxy] of the herd file allows are connected.")),
        ..Farewell::new(SqlState::TOO_MANY_CONNECTIONS, format!("too many connections for {what} \"{name}\""))
    };
    let user = world.users.enter(&asked.user, settings.max_user_clients);
    let user = user.ok_or_else(|| too_many("role", &asked.user, "max_user_clients"))?;
    let database = world.databases.enter(&asked.database, settings.max_database_clients);
    let database = database.ok_or_else(|| too_many("database", &asked.database, "max_database_clients"))?;
    Ok((user, database))
}

/// Has one server from the beginning to the end.
async fn keep(
    stream: &mut Stream,
    out: &mut BytesMut,
    wants: &Wants,
    startup: Vec<(String, String)>,
    ticket: &Ticket,
    world: &Arc<World>,
) -> Result<Left, Farewell> {
    let found = tokio::select! {
        found = wants.first(world) => found?,
        left = gone(stream, &wants.card) => return Ok(left),
    };
    let (pool, mut lent) = found;
    // Nobody tells its transactions apart.
    let _writes = pool.is_of_the_primary().then(|| wants.mark.writes());
    if !lent.backend.is_fresh()
        && let Err(error) = lent.backend.clean().await
    {
        pool.give_back(lent, false, world);
        return Err(Farewell::new(SqlState::CONNECTION_FAILURE, format!("the server was lost: {error}")));
    }
    let startup = Arc::new(wants.settings(startup, &lent.backend));
    let lent = begin(&pool, lent, &startup.for_server(), false, world).await?;
    let Lent { server, mut backend } = lent;
    if let Some(card) = &backend.card {
        card.statements.forget();
    }
    let mut session = Session::new();
    session.hide_warnings(startup.hides_warnings());
    let mut link = Link::asking(&wants.card, world);
    link.watch(world.settings.load().timeouts);
    link.check = Check::new(world.settings.load().checks_commits && pool.is_of_the_primary());
    let greeting = greet(stream, out, &backend, ticket).await;
    let end = match greeting {
        Ok(()) => {
            let mut admission = pool.admission(server, &backend, world);
            use_server(stream, &mut backend, &mut admission, &mut session, &mut link, ticket).await
        }
        Err(end) => end,
    };
    // A cancel that is on its way hits this client's server, and nobody else's.
    ticket.has(None).await;
    if session.server_is_orphaned() {
        pool.replace_idle(&backend.place, world);
    }
    stop_at_server(&end, &backend, world);
    let lent = Lent { server, backend };
    if let Some(mark) = lost_commit(&end, &session, &mut link) {
        let place = lent.backend.place.clone();
        give_up(&pool, lent, &end, world);
        let set = startup.for_server();
        let lookup = Box::pin(look_up(&mark, stream, &mut session, &mut link, wants, &set, world)).await;
        *out = link.take_unsaid();
        return match lookup {
            Lookup::Committed => Err(committed_and_gone(&place)),
            Lookup::Lost(lost) => end.farewell(lost, &session, &place),
            Lookup::Left(left) => Ok(left),
        };
    }
    *out = link.take_unsaid();
    let left = left(&end, &session, &lent.backend, world);
    match end {
        End::ClientLeft if session.is_clean() => {
            let dirty = !startup.is_empty() || session.used();
            leave(&pool, lent, dirty, world).await;
        }
        end => give_up(&pool, lent, &end, world),
    }
    left
}

/// Why a server is not as its client needs it.
pub(crate) enum NotBegun {
    /// It does not set what the client has.
    Refused(Farewell),
    /// It is lost, and another one may be there.
    Lost(Farewell),
}

impl From<NotBegun> for Farewell {
    fn from(why: NotBegun) -> Farewell {
        match why {
            NotBegun::Refused(farewell) | NotBegun::Lost(farewell) => farewell,
        }
    }
}

/// Brings a server to what its client has set. Most often that is there already.
pub(crate) async fn begin(
    pool: &Arc<OnePool>,
    lent: Lent,
    settings: &Arc<Values>,
    forgets_sequences: bool,
    world: &Arc<World>,
) -> Result<Lent, NotBegun> {
    if !forgets_sequences && lent.backend.is_like(settings) {
        return Ok(lent);
    }
    Box::pin(bring(pool, lent, settings, forgets_sequences, world)).await
}

async fn bring(
    pool: &Arc<OnePool>,
    mut lent: Lent,
    settings: &Arc<Values>,
    forgets_sequences: bool,
    world: &Arc<World>,
) -> Result<Lent, NotBegun> {
    match lent.backend.become_like(settings, forgets_sequences).await {
        Ok(()) => Ok(lent),
        Err(NotDone::Refused { sqlstate, message }) => {
            // Some of it may be set.
            leave(pool, lent, true, world).await;
            Err(NotBegun::Refused(Farewell::new(sqlstate, message)))
        }
        Err(NotDone::Lost(why)) => {
            pool.gone(lent.server, world);
            let message = format!("the server was lost before anything was sent to it: {why}");
            Err(NotBegun::Lost(Farewell::new(SqlState::CONNECTION_FAILURE, message)))
        }
    }
}

/// What a client wants of servers.
pub(crate) struct Wants {
    client: ClientId,
    pub(crate) card: Arc<Card>,
    proven: Box<Proven>,
    door: Door,
    /// When it wrote.
    mark: Arc<Mark>,
    /// What only reads goes to standbys, though it may write.
    splits: bool,
}

impl Wants {
    /// What is to be set in a server for it.
    pub(crate) fn settings(&self, startup: Vec<(String, String)>, backend: &Backend) -> Values {
        startup.into_iter().filter(|(name, value)| !backend.is_default(name, value)).collect()
    }

    pub(crate) fn pool(&self, role: &Role, world: &World) -> Arc<OnePool> {
        let (database, user) = (self.proven.asked.database.clone(), self.proven.asked.user.clone());
        world.pools.of(Name { database, user, role: role.clone() }, self.proven.keys.clone(), world)
    }

    pub(crate) async fn lend(&self, pool: &Arc<OnePool>, world: &Arc<World>) -> Result<Lent, NotLent> {
        pool.lend(self.client, self.door.worker, world).await
    }

    /// Its database and its user.
    pub(crate) fn names(&self) -> (&str, &str) {
        (&self.proven.asked.database, &self.proven.asked.user)
    }

    pub(crate) fn client(&self) -> ClientId {
        self.client
    }

    pub(crate) fn mark(&self) -> &Mark {
        &self.mark
    }

    pub(crate) fn splits(&self) -> bool {
        self.splits
    }

    pub(crate) fn access(&self) -> Access {
        self.door.access
    }

    /// The server with which it comes in.
    pub(crate) async fn first(&self, world: &Arc<World>) -> Result<(Arc<OnePool>, Lent), Farewell> {
        let found = self.find(world).await;
        match &found {
            Ok((pool, _)) => pool.count_login(),
            Err(_) => world.ledger.no_entry(NoEntry::Server),
        }
        found
    }

    /// A server. Whoever wants to read is content with the primary, too, when no standby has room for it in time.
    pub(crate) async fn find(&self, world: &Arc<World>) -> Result<(Arc<OnePool>, Lent), Farewell> {
        if self.door.access == Access::ReadOnly {
            let since = world.settings.load().reads.your_writes.then(|| self.mark.last());
            if let Some(found) = find_reader(self, since, world).await? {
                return Ok(found);
            }
        }
        let pool = self.pool(&Role::Primary, world);
        let lent = self.lend(&pool, world).await?;
        Ok((pool, lent))
    }
}

impl Overdue {
    /// In PostgreSQL's words, where it has any.
    pub(crate) fn farewell(self) -> Farewell {
        let (sqlstate, message, option) = match self {
            Overdue::Idle => (
                SqlState::IDLE_SESSION_TIMEOUT,
                "terminating connection due to idle-session timeout",
                "client_idle_timeout",
            ),
            Overdue::IdleInTransaction => (
                SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
                "terminating connection due to idle-in-transaction timeout",
                "idle_transaction_timeout",
            ),
            Overdue::Transaction => (
                SqlState::TRANSACTION_TIMEOUT,
                "terminating connection due to transaction timeout",
                "transaction_timeout",
            ),
            Overdue::Query => (
                SqlState::QUERY_CANCELED,
                "terminating connection due to the proxy's query timeout",
                "query_timeout",
            ),
        };
        Farewell {
            hint: Some(format!("It is {option} in [proxy] of the herd file.")),
            ..Farewell::new(sqlstate, message)
        }
    }
}

/// What a server still does for a client that is closed it need not do any more.
pub(crate) fn stop_at_server(end: &End, backend: &Backend, world: &Arc<World>) {
    if let End::Overdue(Overdue::Query | Overdue::Transaction) = end {
        let (who, here) = (Arc::clone(&backend.cancelable), Arc::clone(world));
        tokio::spawn(async move { cancel(&who, &*here.server_tls).await });
    }
}

/// Of a server that nobody is to have any more.
pub(crate) fn give_up(pool: &Arc<OnePool>, lent: Lent, end: &End, world: &Arc<World>) {
    match end {
        End::ServerLost(_) => pool.gone(lent.server, world),
        _ => pool.give_back(lent, false, world),
    }
}

/// Gives a server back on which nothing is under way.
pub(crate) async fn leave(pool: &Arc<OnePool>, mut lent: Lent, dirty: bool, world: &Arc<World>) {
    if dirty && let Err(error) = lent.backend.clean().await {
        tracing::info!(%error, pid = lent.backend.welcome.pid, "a server could not be cleaned, and is closed");
        return pool.give_back(lent, false, world);
    }
    pool.give_back(lent, true, world);
}

/// Up to and with the first ReadyForQuery.
pub(crate) async fn greet(
    stream: &mut Stream,
    out: &mut BytesMut,
    backend: &Backend,
    ticket: &Ticket,
) -> Result<(), End> {
    let fault = |error: &dyn std::fmt::Display| End::Fault(Fault::Server(error.to_string()));
    for (name, value) in backend.welcome.parameters.iter() {
        build::parameter_status(out, name, value).map_err(|error| fault(&error))?;
    }
    let key = Key::new(ticket.key()).map_err(|error| fault(&error))?;
    build::backend_key_data(out, ticket.pid, key);
    build::ready_for_query(out, TransactionStatus::Idle);
    stream.send(out).await.map_err(|_| End::ClientLeft)?;
    *out = BytesMut::new();
    Ok(())
}

pub(crate) async fn use_server(
    stream: &mut Stream,
    backend: &mut Backend,
    admission: &mut Admission,
    session: &mut Session,
    link: &mut Link,
    ticket: &Ticket,
) -> End {
    ticket.has(Some(&backend.cancelable)).await;
    relay(stream, backend, session, admission, link).await
}

/// What the client has to hear of it, which is counted.
pub(crate) fn left(end: &End, session: &Session, backend: &Backend, world: &World) -> Result<Left, Farewell> {
    if end.takes_the_server() {
        world.ledger.ended(session.lost());
    }
    end.farewell(session.lost(), session, &backend.place)
}

/// What is known of the commit that was lost with its server, if that is what was lost and its client has heard nothing of it.
pub(crate) fn lost_commit(end: &End, session: &Session, link: &mut Link) -> Option<commit::Mark> {
    let is_open = end.takes_the_server()
        && session.lost() == Lost::Unknown
        && session.can_be_told()
        && !session.server_has_ended();
    link.check.take().filter(|_| is_open)
}

/// What came of it.
pub(crate) enum Lookup {
    /// It has committed, and the client is to hear that.
    Committed,
    Lost(Lost),
    Left(Left),
}

/// Its server must be given back before: another one is needed, and it may have been the last one of its pool. `settings`: those of
/// the client.
pub(crate) async fn look_up(
    mark: &commit::Mark,
    stream: &Stream,
    session: &mut Session,
    link: &mut Link,
    wants: &Wants,
    settings: &Values,
    world: &Arc<World>,
) -> Lookup {
    let found = match commit::look_up(mark, stream, wants, settings, world).await {
        Ok(found) => found,
        Err(left) => return Lookup::Left(left),
    };
    let (database, user) = wants.names();
    tracing::info!(database, user, ?mark, ?found, "a commit that was lost with its server was looked up");
    let lost = match found {
        Outcome::Committed if link.tell_committed(session) => {
            world.ledger.spared();
            return Lookup::Committed;
        }
        Outcome::RolledBack => Lost::Transaction,
        Outcome::Committed | Outcome::Open | Outcome::Unknown => Lost::Unknown,
    };
    world.ledger.ended(lost);
    Lookup::Lost(lost)
}

/// It has committed, and what else it had done went with the server.
pub(crate) fn committed_and_gone(place: &Place) -> Farewell {
    let message = "the server was lost, and with it what this session had set there; its last transaction has committed";
    Farewell {
        detail: Some(format!("It was node {} in term {}.", place.node, place.term.0)),
        ..Farewell::new(SqlState::ADMIN_SHUTDOWN, message)
    }
}

impl End {
    /// `lost`: what is known of the work that was under way.
    pub(crate) fn farewell(&self, lost: Lost, session: &Session, place: &Place) -> Result<Left, Farewell> {
        Err(match self {
            End::ClientLeft | End::Over => return Ok(Left::ByItself),
            // In the middle of a message there is nothing to say but the end.
            _ if !session.can_be_told() => return Ok(Left::ByItself),
            End::ServerLost(_) if session.server_has_ended() => return Ok(Left::Told),
            End::ServerLost(why) => Farewell {
                detail: Some(format!("{}: {why}.", place.node)),
                ..Farewell::new(lost.sqlstate(), format!("the server was lost; {}", lost.sentence()))
            },
            End::Dismissed => return Ok(Left::Dismissed),
            End::Rerouted => Farewell {
                detail: Some(format!("Node {} is not what it was in term {}.", place.node, place.term.0)),
                hint: Some("Connect again: the same address leads to the new primary.".to_owned()),
                ..Farewell::new(lost.sqlstate(), format!("the primary has changed; {}", lost.sentence()))
            },
            End::Overdue(overdue) => overdue.farewell(),
            End::Fault(fault) => fault.clone().into(),
        })
    }
}

/// Where the primary is, as soon as there is one: walsenders have no pool to wait in, and wait as long.
async fn await_primary(
    stream: &Stream,
    card: &Card,
    world: &Arc<World>,
) -> Result<Result<(Place, Target), Left>, Farewell> {
    let mut changes = world.fence.subscribe();
    let until = Instant::now() + world.settings.load().limits.hold;
    let mut left = std::pin::pin!(gone(stream, card));
    loop {
        changes.mark_unchanged();
        if let Route::To(place, target) = world.fence.route(&Role::Primary) {
            return Ok(Ok((place, target)));
        }
        tokio::select! {
            left = &mut left => return Ok(Err(left)),
            // The sender is as old as the fence.
            _ = changes.changed() => {}
            () = sleep_until(until) => return Err(NotLent::Refused(Refusal::NoRoute).into()),
        }
    }
}

/// A walsender is its client's from the beginning to the end, with all that its startup packet says.
async fn replicate(
    stream: &mut Stream,
    out: &mut BytesMut,
    Proven { asked, keys }: &Proven,
    ticket: &Ticket,
    card: &Arc<Card>,
    world: &Arc<World>,
) -> Result<Left, Farewell> {
    let (place, target) = match await_primary(stream, card, world).await? {
        Ok(found) => found,
        Err(left) => return Ok(left),
    };
    let purpose = Purpose {
        user: asked.user.clone(),
        database: asked.database.clone(),
        replication: asked.replication,
        parameters: asked.parameters.clone(),
        is_certified: world.settings.load().certificate_users.contains(&asked.user),
    };
    let mut backend = Backend::open(place, target, world.way(), &purpose, keys.clone()).await?;
    let (mut session, mut link) = (Session::new(), Link::of(card));
    let end = match greet(stream, out, &backend, ticket).await {
        Ok(()) => {
            let (fence, place) = (Arc::clone(&world.fence), backend.place.clone());
            let mut admission = Admission::new(fence, Role::Primary, place, world.fence.bell(), None);
            use_server(stream, &mut backend, &mut admission, &mut session, &mut link, ticket).await
        }
        Err(end) => end,
    };
    ticket.has(None).await;
    *out = link.take_unsaid();
    let left = left(&end, &session, &backend, world);
    backend.close().await;
    left
}

/// What a startup packet sets.
struct Startup {
    /// In PostgreSQL's order: the command line first.
    settings: Vec<(String, String)>,
    access: Access,
    /// Said by the client.
    splits: Option<bool>,
}

/// Settings that are the proxy's, and that no server hears of.
const ACCESS: &str = "pgherd.target_session_attrs";
const SPLITS: &str = "pgherd.split_reads";

fn startup(asked: &Asked, access: Access) -> Result<Startup, Farewell> {
    let not_taken = |what: String| Farewell {
        hint: Some("Settings can be given as -c name=value.".to_owned()),
        ..Farewell::new(SqlState::FEATURE_NOT_SUPPORTED, what)
    };
    let mut settings = Vec::new();
    for (_, options) in asked.parameters.iter().filter(|(name, _)| name == "options") {
        for switch in switches(options.as_bytes()) {
            let text = |bytes: Vec<u8>| {
                String::from_utf8(bytes).map_err(|_| not_taken("options are not valid UTF-8".to_owned()))
            };
            match switch {
                Switch::Setting { name, value } => settings.push((text(name)?, text(value)?)),
                Switch::Other(switch) => {
                    let switch = text(switch)?;
                    return Err(not_taken(format!(
                        "the proxy does not take the command-line argument \"{switch}\""
                    )));
                }
            }
        }
    }
    let others = asked.parameters.iter().filter(|(name, _)| name != "options");
    settings.extend(others.cloned());
    let mut startup = Startup { settings: Vec::new(), access, splits: None };
    for (name, value) in settings {
        let wrong = |values: &str| Farewell {
            hint: Some(format!("It is one of: {values}.")),
            ..Farewell::new(
                SqlState::INVALID_PARAMETER_VALUE,
                format!("invalid value for parameter \"{name}\": \"{value}\""),
            )
        };
        match name.as_str() {
            ACCESS => match value.as_str() {
                "any" => {}
                "read-write" | "primary" => startup.access = Access::ReadWrite,
                "read-only" | "standby" | "prefer-standby" => startup.access = Access::ReadOnly,
                _ => return Err(wrong("any, read-write, primary, read-only, standby, prefer-standby")),
            },
            SPLITS => match value.to_ascii_lowercase().as_str() {
                "on" | "true" | "yes" | "1" => startup.splits = Some(true),
                "off" | "false" | "no" | "0" => startup.splits = Some(false),
                _ => return Err(wrong("on, off")),
            },
            _ => startup.settings.push((name, value)),
        }
    }
    if startup.access == Access::ReadOnly {
        // Where there is no standby the primary refuses what a standby refuses.
        startup.settings.push(("default_transaction_read_only".to_owned(), "on".to_owned()));
    }
    Ok(startup)
}

/// Tells one client too many, if it is worth a word: it has not said anything yet.
pub(crate) async fn refuse(stream: TcpStream) {
    let mut out = BytesMut::new();
    Farewell::new(SqlState::TOO_MANY_CONNECTIONS, "sorry, too many clients already").write(&mut out);
    say(&mut Stream::Tcp(stream), &mut out).await;
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;

    use super::*;
    use crate::hba::Hba;
    use crate::net::InClear;
    use crate::verifiers::{AuthQuery, Verifiers};
    use crate::world::Settings;

    /// Most clients say nothing most of the time, and then this is the larger part of what each of them costs: a future keeps
    /// room for what was moved through it, so that it grows by a line that looks innocent.
    #[tokio::test]
    async fn a_client_that_waits_is_small() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let query = AuthQuery { user: "proxy".to_owned(), database: "postgres".to_owned(), secret_of: None };
        let settings = Settings::new(Hba::default());
        let verifiers = Verifiers::new(query).unwrap();
        let world = Arc::new(World::new(settings, Arc::new(InClear), verifiers, Vec::new()));
        let door = Door { access: Access::ReadWrite, worker: Worker(0) };
        let task_bytes = size_of_val(&serve(stream, address, door, world, ()));
        assert!(task_bytes <= 1_500, "{task_bytes}");
    }

    /// What the proxy's own connection was told is not told to whoever comes along.
    #[test]
    fn a_stranger_is_not_told_why_passwords_cannot_be_checked() {
        let refused = login::NotIn::Refused {
            sqlstate: SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
            message: "permission denied for table pg_authid".to_owned(),
            detail: Some("of 10.0.0.1".to_owned()),
            hint: Some("GRANT".to_owned()),
        };
        for error in [refused.into(), NotIn::Unreachable("10.0.0.1: connection refused".to_owned())] {
            let mut out = BytesMut::new();
            unchecked(&error).write(&mut out);
            let said = out.escape_ascii().to_string();
            let secrets = ["pg_authid", "10.0.0.1", "GRANT", "28000"];
            assert!(said.contains("57P03") && !secrets.iter().any(|secret| said.contains(secret)), "{said}");
        }
    }
}
