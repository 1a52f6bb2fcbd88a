//! The fence's own life: wait, listen to the agent, look at the clock, and once, perhaps, fire.
//!
//! One thread and no runtime. Says nothing until it has sent its message: a log that hangs must not be what
//! keeps PostgreSQL alive.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use pgherd_api::client::ClientTls;
use pgherd_core::types::Instant;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::net::{SocketFlags, accept_with, listen};
use rustix::process::{Resource, chdir, getpid, getrlimit, setsid};
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::kill::Server;
use super::release::{self, Outcome};
use super::watch::{Verdict, Watch};
use super::wire::{self, Answer, Arm, Beats, Hello, Order, Received};
use super::{Deadline, Target};
use crate::clock;

/// Connections that wait to be accepted. There is one agent.
const BACKLOG: i32 = 4;
/// A fence whose agent died before it connected ends after this long.
const UNCLAIMED: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    #[error("a fence is started by its agent, with a socket as standard input")]
    NotStartedByAgent { source: io::Error },
    #[error("the fence cannot wait for its agent")]
    Wait { source: io::Error },
}

/// What a fence was armed with.
struct Armed {
    term: u64,
    server: Server,
    grace: Duration,
    /// JSON, ready to be sent.
    message: Vec<u8>,
    targets: Vec<Target>,
    tls: Arc<ClientConfig>,
}

struct Fence {
    listener: OwnedFd,
    agent: Option<OwnedFd>,
    buffer: Vec<u8>,
    locked: bool,
    armed: Option<Armed>,
    /// Of the agent that took over last. It stays when that agent dies.
    beats: Option<Beats>,
    /// Holds until an agent's loop has written its first one.
    inherited: Option<Deadline>,
    watch: Watch,
    started: Instant,
    /// An agent has been there.
    claimed: bool,
    retired: bool,
}

/// `pgherd fence`. Returns when it has fired, or when nobody needs it any more.
pub fn run() -> Result<(), FenceError> {
    let started_wrongly = |source| FenceError::NotStartedByAgent { source };
    let listener = io::stdin().as_fd().try_clone_to_owned().map_err(started_wrongly)?;
    listen(&listener, BACKLOG).map_err(|errno| started_wrongly(errno.into()))?;
    // No signal to the agent's group and no terminal that closes reaches it. It fails where the caller made
    // it the first of a group, which is as good.
    setsid().ok();
    // A program file that was given capabilities gives them to every process that runs it; this one needs none.
    crate::vip::renounce().ok();
    // It keeps no file system from being unmounted.
    chdir("/").ok();
    let now = clock::now();
    let mut fence = Fence {
        listener,
        agent: None,
        buffer: vec![0; wire::MAX_PACKET_BYTES],
        locked: stay_in_memory(),
        armed: None,
        beats: None,
        inherited: None,
        watch: Watch::new(now),
        started: now,
        claimed: false,
        retired: false,
    };
    match fence.wait().map_err(|source| FenceError::Wait { source })? {
        Some(armed) => fence.fire(&armed),
        None => Ok(()),
    }
}

/// As far as this user may: a fence that must be read back from a disk that does not answer is none, and
/// neither is one that was killed to free some memory.
fn stay_in_memory() -> bool {
    fs::write("/proc/self/oom_score_adj", "-1000").ok();
    let limit = getrlimit(Resource::Memlock).current;
    // Under a limit, locking what comes later would make a later allocation fail, which is worse.
    let future = if limit.is_none() { MlockAllFlags::FUTURE } else { MlockAllFlags::empty() };
    mlockall(MlockAllFlags::CURRENT | future).is_ok()
}

impl Fence {
    /// Until it must fire, or is not needed any more.
    fn wait(&mut self) -> io::Result<Option<Armed>> {
        loop {
            // What the agent has said by now counts before the clock does.
            self.accept();
            self.hear();
            let now = clock::now();
            let pause = match self.watch.look(now, self.deadline(now)) {
                Verdict::Fire => return Ok(self.armed.take()),
                Verdict::Wait(pause) => pause,
            };
            // With nothing to guard it is of no use to a later agent, which starts its own as fast.
            let abandoned = self.agent.is_none() && (self.claimed || now.since(self.started) >= UNCLAIMED);
            if self.armed.is_none() && (self.retired || abandoned) {
                return Ok(None);
            }
            let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
            polled.extend(self.agent.iter().map(|agent| PollFd::new(agent, PollFlags::IN)));
            let pause = Timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos().max(1_000_000)) };
            match poll(&mut polled, Some(&pause)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// `None` while nothing is armed.
    fn deadline(&self, now: Instant) -> Option<Deadline> {
        let armed = self.armed.as_ref()?;
        let latest = Deadline { at: now + armed.grace, patient: true };
        let said = self.beats.as_ref().and_then(Beats::read).or(self.inherited).unwrap_or(latest);
        // No word of an agent, however wrong, makes it wait for ever.
        Some(Deadline { at: said.at.min(latest.at), ..said })
    }

    /// The newest agent is the agent.
    fn accept(&mut self) {
        while let Ok(agent) = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            (self.agent, self.claimed) = (Some(agent), true);
        }
    }

    fn hear(&mut self) {
        while let Some(agent) = self.agent.take() {
            let answer = match wire::receive::<Order>(agent.as_fd(), &mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.agent = Some(agent);
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.agent = Some(agent);
                    continue;
                }
                // What was armed stays armed: an agent that is gone is what the fence is for.
                Err(_) | Ok(Received::End) => return,
                Ok(Received::Malformed(why)) => Answer::Misunderstood { why },
                Ok(Received::Packet(order, page)) => self.obey(order, page),
            };
            if wire::send(agent.as_fd(), &answer, None).is_ok() {
                self.agent = Some(agent);
            }
        }
    }

    fn obey(&mut self, order: Order, page: Option<Beats>) -> Answer {
        match order {
            Order::TakeOver { .. } => {
                self.retired = false;
                if let Some(page) = page {
                    let newest = self.beats.as_ref().and_then(Beats::read);
                    self.inherited = newest.or(self.inherited);
                    self.beats = Some(page);
                }
                Answer::Hello(Hello {
                    format: wire::FORMAT,
                    pid: getpid().as_raw_nonzero().get(),
                    armed: self.armed.as_ref().map(|armed| armed.term),
                    locked: self.locked,
                })
            }
            Order::Arm(arm) => {
                let term = arm.term;
                match Armed::new(*arm) {
                    Ok(armed) => {
                        self.armed = Some(armed);
                        Answer::Armed { term }
                    }
                    Err(why) => Answer::Refused { term, why },
                }
            }
            Order::Disarm => {
                self.armed = None;
                self.inherited = None;
                Answer::Disarmed
            }
            Order::Ping => Answer::Pong,
            Order::Retire => {
                self.retired = true;
                Answer::Pong
            }
        }
    }

    fn fire(self, armed: &Armed) -> Result<(), FenceError> {
        // From here on an agent finds nobody and does not wait for an answer.
        stop_listening(self.listener.as_fd());
        drop(self.agent);
        armed.server.kill();
        let outcome = release::send(armed.message.clone(), &armed.targets, &armed.tls);
        let term = armed.term;
        match outcome {
            Outcome::Told { node } => {
                tracing::info!(term, %node, "the agent was silent: PostgreSQL is stopped, and the term given back");
            }
            Outcome::TermOver { node } => {
                tracing::info!(term, %node, "the agent was silent: PostgreSQL is stopped; the term had ended");
            }
            Outcome::NotTold { last } => {
                tracing::warn!(term, %last, "the agent was silent: PostgreSQL is stopped; no other agent could be told");
            }
        }
        Ok(())
    }
}

/// A descriptor of it is still open as standard input, so closing ours would not do.
fn stop_listening(listener: BorrowedFd<'_>) {
    rustix::net::shutdown(listener, rustix::net::Shutdown::Both).ok();
}

impl Armed {
    /// Everything that can fail is done here, while the agent is there to be told.
    fn new(arm: Arm) -> Result<Armed, String> {
        let authorities: Result<Vec<CertificateDer<'static>>, _> =
            CertificateDer::pem_slice_iter(arm.authorities.as_bytes()).collect();
        let authorities = authorities.map_err(|error| format!("the authorities: {error}"))?;
        Ok(Armed {
            term: arm.term,
            server: Server::hold(arm.postmaster, arm.directory, arm.shm_id)?,
            grace: Duration::from_millis(arm.grace_ms),
            message: serde_json::to_vec(&arm.message).map_err(|error| error.to_string())?,
            targets: arm.targets,
            tls: ClientTls::believing(&authorities).map_err(|error| error.to_string())?,
        })
    }
}
