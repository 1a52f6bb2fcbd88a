//! The agent's side: one task that sees to it that there is a fence and that it knows what the agent wants.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use pgherd_api::peer::Fenced;
use pgherd_core::types::Term;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::Deadline;
use super::kill::kill_peer;
use super::wire::{self, Answer, Arm, Beats, Directory, Hello, Order, Received};
use crate::files::agent::AgentFile;
use crate::paths;

/// A fence that was just started needs so long at most until it listens.
const START_WITHIN: Duration = Duration::from_secs(5);
const START_POLL: Duration = Duration::from_millis(5);
/// One that says nothing for so long is hung.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const PING_EVERY: Duration = Duration::from_secs(2);
/// Before another is started after one was lost; doubles while they do not last.
const RESTART_AFTER: Duration = Duration::from_millis(100);
const RESTART_AFTER_MOST: Duration = Duration::from_secs(30);
/// One that lived so long was not the trouble.
const LASTED: Duration = Duration::from_secs(60);
/// After it refused to be armed, because PostgreSQL was another process by then.
const ARM_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// How a fence is started.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    /// In a directory of the node that nobody else may enter. At most 107 bytes.
    pub(super) socket: PathBuf,
}

/// Another agent, to be told that the term is given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its certificate must name this node.
    pub node: String,
    /// `host:port`.
    pub address: String,
}

/// What the fence is to do once the agent is silent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arming {
    pub term: Term,
    /// Its process number; the fence sees for itself that it is a PostgreSQL in `data_dir`.
    pub postmaster: i32,
    pub data_dir: PathBuf,
    pub agent_grace: Duration,
    /// Made by [`sign_fenced`](crate::pki::sign_fenced) for this very term.
    pub message: Fenced,
    pub targets: Vec<Target>,
    /// PEM.
    pub authorities: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FenceStatus {
    /// None while there is no fence.
    pub pid: Option<i32>,
    pub armed: Option<Term>,
    /// Its memory cannot be paged out.
    pub locked: bool,
    /// Why there is none, or why it is not armed as it should be.
    pub trouble: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wish {
    /// Nothing is known about PostgreSQL yet: whatever an earlier agent armed stays armed.
    Keep,
    Disarmed,
    Armed(Arc<Arming>),
}

/// Clones share everything.
#[derive(Clone)]
pub struct Handle {
    beats: Arc<Beats>,
    wish: watch::Sender<Wish>,
    status: watch::Receiver<FenceStatus>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("status", &*self.status.borrow()).finish_non_exhaustive()
    }
}

impl Handle {
    /// Takes over the fence of an earlier agent of this node, or starts one with the program that runs now, and
    /// keeps one there until [`retire`] is called. Must be called within a runtime.
    ///
    /// [`retire`]: Handle::retire
    pub fn start(file: &AgentFile) -> io::Result<Handle> {
        let program = std::env::current_exe()?;
        let socket = paths::socket_dir(&file.state_dir).join("fence.sock");
        Handle::launch(Launch { program, args: vec!["fence".into()], socket })
    }

    pub(super) fn launch(launch: Launch) -> io::Result<Handle> {
        let beats = Arc::new(Beats::create()?);
        let (wish, wishes) = watch::channel(Wish::Keep);
        let (tell, status) = watch::channel(FenceStatus::default());
        let keeper = Keeper { launch, beats: Arc::clone(&beats), wishes, status: tell };
        tokio::spawn(keeper.run());
        Ok(Handle { beats, wish, status })
    }

    /// To be called by the main loop itself, at each turn: "I live; act if I have not said so again by then".
    /// Never waits.
    pub fn beat(&self, deadline: Deadline) {
        if let Err(error) = self.beats.write(deadline) {
            tracing::error!(%error, "the fence cannot be told that this agent lives, and will act");
        }
    }

    pub fn arm(&self, arming: Arming) {
        self.wish(Wish::Armed(Arc::new(arming)));
    }

    /// Only once PostgreSQL has been seen to be no primary.
    pub fn disarm(&self) {
        self.wish(Wish::Disarmed);
    }

    fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|before| {
            let changed = *before != wish;
            *before = wish;
            changed
        });
    }

    pub fn status(&self) -> watch::Receiver<FenceStatus> {
        self.status.clone()
    }

    /// For an agent that ends together with its PostgreSQL: the fence is disarmed and ends too.
    pub async fn retire(self) {
        self.disarm();
        let mut status = self.status.clone();
        let disarmed = status.wait_for(|status| status.pid.is_none() || status.armed.is_none());
        // Without an agent it ends by itself a while later.
        drop(timeout(ANSWER_WITHIN, disarmed).await);
        drop(self);
        drop(timeout(ANSWER_WITHIN, status.wait_for(|status| status.pid.is_none())).await);
    }
}

#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error("{doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("the fence ended as soon as it was started")]
    EndedAtOnce,
    #[error("the fence did not listen within {} ms", START_WITHIN.as_millis())]
    NotListening,
    #[error("the fence has ended")]
    Ended,
    #[error("the fence does not answer")]
    Hung,
    #[error("talking to the fence")]
    Talk(#[source] io::Error),
    #[error("the fence is of another version: {why}")]
    Misunderstood { why: String },
}

/// How the time with one fence ended well.
enum Served {
    /// Every handle is gone.
    Retired,
    /// It is of another version and not needed at the moment.
    Outdated,
}

struct Keeper {
    launch: Launch,
    beats: Arc<Beats>,
    wishes: watch::Receiver<Wish>,
    status: watch::Sender<FenceStatus>,
}

/// A connection to a fence.
struct Link {
    /// Not a stream but a socket of packets; the wrapper only waits on it.
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl Keeper {
    async fn run(mut self) {
        let mut pause = RESTART_AFTER;
        loop {
            let began = Instant::now();
            match self.serve().await {
                Ok(Served::Retired) => {
                    self.status.send_replace(FenceStatus::default());
                    return;
                }
                Ok(Served::Outdated) => continue,
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "no fence for a moment; another is started");
                    let trouble = Some(error.to_string());
                    self.status.send_replace(FenceStatus { trouble, ..FenceStatus::default() });
                }
            }
            pause = if began.elapsed() >= LASTED { RESTART_AFTER } else { pause };
            sleep(pause).await;
            pause = (pause * 2).min(RESTART_AFTER_MOST);
        }
    }

    async fn serve(&mut self) -> Result<Served, KeepError> {
        let (mut link, hello) = self.take_over().await?;
        let served = self.attend(&mut link, hello).await;
        if matches!(served, Err(KeepError::Hung)) {
            link.kill()?;
        }
        served
    }

    async fn attend(&mut self, link: &mut Link, hello: Hello) -> Result<Served, KeepError> {
        let armed = hello.armed.map(Term);
        tracing::info!(
            pid = hello.pid,
            locked = hello.locked,
            armed = armed.map(|term| term.0),
            "the fence stands"
        );
        self.status.send_replace(FenceStatus {
            pid: Some(hello.pid),
            armed,
            locked: hello.locked,
            trouble: None,
        });
        let mut told = Wish::Keep;
        let mut ping_at = Instant::now() + PING_EVERY;
        let mut arm_again_at = None;
        loop {
            let wish = self.wishes.borrow_and_update().clone();
            if wish != told && arm_again_at.is_none_or(|at| Instant::now() >= at) {
                arm_again_at = None;
                match self.tell(link, &wish).await? {
                    None => told = wish,
                    Some(why) => {
                        tracing::warn!(why, "the fence is not armed; it is tried again");
                        self.status.send_modify(|status| status.trouble = Some(why));
                        arm_again_at = Some(Instant::now() + ARM_AGAIN_AFTER);
                    }
                }
                continue;
            }
            let nothing_armed = self.status.borrow().armed.is_none();
            if hello.format != wire::FORMAT && nothing_armed {
                link.ask(&Order::Retire, None).await?;
                link.ended().await;
                return Ok(Served::Outdated);
            }
            tokio::select! {
                changed = self.wishes.changed() => if changed.is_err() {
                    link.ask(&Order::Retire, None).await?;
                    if nothing_armed {
                        link.ended().await;
                    }
                    return Ok(Served::Retired);
                },
                () = link.ended() => return Err(KeepError::Ended),
                () = tokio::time::sleep_until(ping_at) => {
                    link.ask(&Order::Ping, None).await?;
                    ping_at = Instant::now() + PING_EVERY;
                }
                () = sleep_until_or_never(arm_again_at) => {}
            }
        }
    }

    /// `Some`: why the fence does not do it.
    async fn tell(&self, link: &mut Link, wish: &Wish) -> Result<Option<String>, KeepError> {
        let order = match wish {
            Wish::Keep => return Ok(None),
            Wish::Disarmed => Order::Disarm,
            Wish::Armed(arming) => match prepare(arming).await {
                Ok(arm) => Order::Arm(Box::new(arm)),
                Err(why) => return Ok(Some(why)),
            },
        };
        match link.ask(&order, None).await? {
            Answer::Armed { term } => {
                tracing::debug!(term, "the fence is armed");
                self.status.send_modify(|status| (status.armed, status.trouble) = (Some(Term(term)), None));
                Ok(None)
            }
            Answer::Disarmed => {
                self.status.send_modify(|status| (status.armed, status.trouble) = (None, None));
                Ok(None)
            }
            Answer::Refused { why, .. } => Ok(Some(why)),
            other => Err(KeepError::Misunderstood { why: format!("it answered {other:?}") }),
        }
    }

    async fn take_over(&self) -> Result<(Link, Hello), KeepError> {
        let order = Order::TakeOver { format: wire::FORMAT };
        if let Some(mut link) = self.connect()? {
            match link.ask(&order, Some(&self.beats)).await {
                Ok(Answer::Hello(hello)) => return Ok((link, hello)),
                // It was just ending.
                Err(KeepError::Ended | KeepError::Talk(_)) => {}
                Ok(_) | Err(_) => link.kill()?,
            }
        }
        let mut link = self.launch().await?;
        match link.ask(&order, Some(&self.beats)).await? {
            Answer::Hello(hello) => Ok((link, hello)),
            other => Err(KeepError::Misunderstood { why: format!("it answered {other:?}") }),
        }
    }

    fn io_error(&self, doing: &'static str) -> impl Fn(io::Error) -> KeepError + '_ {
        move |source| KeepError::Io { doing, path: self.launch.socket.clone(), source }
    }

    /// `None` if nobody listens there.
    fn connect(&self) -> Result<Option<Link>, KeepError> {
        let socket = self.socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        match connect(&socket, &self.address()?) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => return Ok(None),
            Err(errno) => return Err(self.io_error("connect to")(errno.into())),
        }
        let socket = UnixStream::from_std(socket.into()).map_err(KeepError::Talk)?;
        Ok(Some(Link { socket, buffer: vec![0; wire::MAX_PACKET_BYTES] }))
    }

    fn socket(&self, flags: SocketFlags) -> Result<OwnedFd, KeepError> {
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|errno| self.io_error("make a socket for")(errno.into()))
    }

    fn address(&self) -> Result<SocketAddrUnix, KeepError> {
        SocketAddrUnix::new(&self.launch.socket)
            .map_err(|errno| self.io_error("use as a socket")(errno.into()))
    }

    /// Starts a fence. It gets the bound socket as its standard input, and listens on it by itself, so that
    /// the kernel names *it* as the one at the other end.
    async fn launch(&self) -> Result<Link, KeepError> {
        match fs::remove_file(&self.launch.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(self.io_error("remove")(error));
            }
            _ => {}
        }
        let socket = self.socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        bind(&socket, &self.address()?).map_err(|errno| self.io_error("bind")(errno.into()))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&self.launch.socket, mode).map_err(self.io_error("set the mode of"))?;
        let mut child = tokio::process::Command::new(&self.launch.program)
            .args(&self.launch.args)
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .kill_on_drop(false)
            .spawn()
            .map_err(|source| KeepError::Io { doing: "run", path: self.launch.program.clone(), source })?;
        let until = Instant::now() + START_WITHIN;
        loop {
            if let Some(link) = self.connect()? {
                // Its end is seen at the socket; this only takes note of it, so that it leaves no zombie.
                let _reaper: JoinHandle<_> = tokio::spawn(async move { child.wait().await });
                return Ok(link);
            }
            if let Ok(Some(_)) = child.try_wait() {
                return Err(KeepError::EndedAtOnce);
            }
            if Instant::now() >= until {
                // Without a listener it waits for nobody: it must not be there when the next one is.
                drop(child.kill().await);
                return Err(KeepError::NotListening);
            }
            sleep(START_POLL).await;
        }
    }
}

impl Link {
    async fn ask(&mut self, order: &Order, page: Option<&Beats>) -> Result<Answer, KeepError> {
        wire::send(self.socket.as_fd(), order, page).map_err(KeepError::Talk)?;
        match timeout(ANSWER_WITHIN, self.receive()).await {
            Err(_) => Err(KeepError::Hung),
            Ok(Err(error)) => Err(KeepError::Talk(error)),
            Ok(Ok(Received::Packet(Answer::Misunderstood { why }, _) | Received::Malformed(why))) => {
                Err(KeepError::Misunderstood { why })
            }
            Ok(Ok(Received::Packet(answer, _))) => Ok(answer),
            Ok(Ok(Received::End)) => Err(KeepError::Ended),
        }
    }

    async fn receive(&mut self) -> io::Result<Received<Answer>> {
        loop {
            self.socket.readable().await?;
            let socket = &self.socket;
            let read = || wire::receive(socket.as_fd(), &mut self.buffer);
            match socket.try_io(Interest::READABLE, read) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return received,
            }
        }
    }

    /// A fence speaks only when it is asked: if there is something to read now, it is its end.
    async fn ended(&mut self) {
        drop(self.receive().await);
    }

    /// A fence that accepts and does not answer would fire when it wakes up.
    fn kill(&self) -> Result<(), KeepError> {
        let socket = self.socket.as_fd();
        let peer =
            rustix::net::sockopt::socket_peercred(socket).map_err(|errno| KeepError::Talk(errno.into()))?;
        tracing::warn!(pid = peer.pid.as_raw_nonzero().get(), "the fence does not answer, and is replaced");
        kill_peer(socket, peer.pid).map_err(|errno| KeepError::Talk(errno.into()))
    }
}

/// Looks up what the fence must not look up when the time has come.
async fn prepare(arming: &Arc<Arming>) -> Result<Arm, String> {
    let arming = Arc::clone(arming);
    let looked = tokio::task::spawn_blocking(move || {
        let directory = fs::metadata(&arming.data_dir).map_err(|error| failed(&arming.data_dir, &error))?;
        let pid_file = arming.data_dir.join(pgherd_postgres::instance::POSTMASTER_PID);
        let pid_text = fs::read_to_string(&pid_file).map_err(|error| failed(&pid_file, &error))?;
        Ok(Arm {
            term: arming.term.0,
            postmaster: arming.postmaster,
            directory: Directory::of(&directory),
            shm_id: shm_id(&pid_text),
            grace_ms: u64::try_from(arming.agent_grace.as_millis()).unwrap_or(u64::MAX),
            message: arming.message.clone(),
            targets: arming.targets.clone(),
            authorities: arming.authorities.clone(),
        })
    });
    looked.await.unwrap_or_else(|error| Err(error.to_string()))
}

fn failed(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

/// The seventh line of `postmaster.pid`: key and number of the shared memory segment.
fn shm_id(pid_text: &str) -> Option<i64> {
    pid_text.lines().nth(6)?.split_ascii_whitespace().nth(1)?.parse().ok()
}

async fn sleep_until_or_never(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
