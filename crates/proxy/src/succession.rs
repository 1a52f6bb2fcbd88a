//! How one process of a proxy takes over from another one, so that no client is refused or dropped: for a new version, or a new
//! place to run.
//!
//! ```text
//!   the former one                                the successor
//!   accepts            ◄── hello ──────────────   has its settings, and accepts nobody
//!                      ─── listener … all ────►   has the listeners; hears of the primary
//!                      ◄── ready ──────────────
//!   accepts no more    ─── yours ─────────────►   accepts
//!   keeps its clients  ◄── serving ────────────
//!   on probation: [`PROBATION`]
//!   closes its listeners, and ends with its last client
//! ```
//!
//! Both have the same listeners, so that whoever connects meanwhile waits in the kernel's queue and is accepted by one of them:
//! there is no moment at which nobody listens. The conversation is also how each knows of the other's death. A successor
//! that goes without a farewell, until the probation is over, leaves the former one to accept again as if nothing had happened. A
//! former one that goes leaves everything to its successor. One that is only slow is given up.
//!
//! Each process keeps its own clients, servers and keys. A cancel that comes to the successor with a key that it has not given
//! out goes to all processes that were there before it.
//!
//! Leaves out: agents, files and signals (the `agent` crate). Hazard: two that accept nothing because each believes in the other;
//! so every wait here has an end, and at its end the former one accepts.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::proxy::{Access, Ending, Proxy};
use crate::timer::{sleep, timeout};

mod place;
mod wire;

use place::{Beginning, OwnSocket};
pub use place::{Found, Place, PlaceError};
use wire::{Link, VERSION, Word};

/// For a word that needs no thought.
const WORD_WITHIN: Duration = Duration::from_secs(5);
/// A successor has the listeners, and asks what the herd wants and where the primary is.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Nobody accepts meanwhile.
const SERVING_WITHIN: Duration = Duration::from_secs(5);
/// After this the former process has no listeners any more. A program that is of no use dies sooner.
const PROBATION: Duration = Duration::from_secs(10);
/// A server that is to cancel something answers within that, or not at all.
const CANCEL_WITHIN: Duration = Duration::from_secs(20);
/// Conversations at a time, and cancels that are passed on at a time: strangers can send cancels.
const MOST_TALKS: usize = 32;
const MOST_CANCELS: usize = 16;
/// Listeners that are handed over: two for each core of a large machine.
const MOST_LISTENERS: usize = 4096;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuccessionError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("this proxy runs already, as process {pid}")]
    RunsAlready { pid: i32 },
    #[error("no process of this proxy accepts clients, by what stands in {}", .place.display())]
    NoneRuns { place: PathBuf },
    #[error("the proxy runs as the user with the number {owner}, and this process as {own}")]
    AnotherUser { owner: u32, own: u32 },
    #[error("process {pid} does not hand the proxy over: {why}")]
    Refused { pid: i32, why: String },
    #[error("process {pid}, which runs the proxy, is not understood")]
    NotUnderstood {
        pid: i32,
        #[source]
        source: io::Error,
    },
}

/// A socket that listens, where clients came in before.
#[derive(Debug)]
pub struct Inherited {
    pub(crate) access: Access,
    pub(crate) address: SocketAddr,
    pub(crate) listener: TcpListener,
}

/// What a process was given by the one before it.
#[derive(Debug)]
pub struct Heritage {
    link: Link,
    pid: i32,
    pub listeners: Vec<Inherited>,
    others: Vec<(String, OwnedFd)>,
}

impl Heritage {
    /// What the former process had beside its listeners, under the name that it was given there.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        let at = self.others.iter().position(|(other, _)| other == name)?;
        Some(self.others.swap_remove(at).1)
    }
}

/// A process that is about to begin: there is no other one until this is dropped.
#[derive(Debug)]
pub struct Turn {
    place: Arc<Place>,
    _beginning: Beginning,
}

impl Turn {
    /// Waits for another process that is about to begin.
    pub async fn wait(place: Place) -> Result<Turn, SuccessionError> {
        let beginning = place.begin().await?;
        Ok(Turn { place: Arc::new(place), _beginning: beginning })
    }

    async fn active(&self) -> Result<Option<(String, Found)>, SuccessionError> {
        Ok(self.place.answering().await?.into_iter().find(|(_, found)| found.accepts))
    }

    /// For a process that is to begin by itself.
    pub async fn must_be_alone(&self) -> Result<(), SuccessionError> {
        match self.active().await? {
            Some((_, Found { pid, .. })) => Err(SuccessionError::RunsAlready { pid }),
            None => Ok(()),
        }
    }

    /// Asks the process that accepts for its listeners. It goes on accepting until [`Succession::begin`].
    pub async fn inherit(&self) -> Result<Heritage, SuccessionError> {
        let Some((name, Found { pid, uid, .. })) = self.active().await? else {
            return Err(SuccessionError::NoneRuns { place: self.place.path().to_owned() });
        };
        let own = rustix::process::geteuid().as_raw();
        if uid != own {
            return Err(SuccessionError::AnotherUser { owner: uid, own });
        }
        let misunderstood = |source| SuccessionError::NotUnderstood { pid, source };
        let link = self.place.connect(&name).map_err(misunderstood)?;
        link.send(&Word::Hello { version: VERSION }).await.map_err(misunderstood)?;
        let mut heritage = Heritage { link, pid, listeners: Vec::new(), others: Vec::new() };
        loop {
            let heard = timeout(WORD_WITHIN, heritage.link.receive()).await;
            let heard =
                heard.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(misunderstood)?;
            match heard {
                Some((Word::Listener { access, address }, Some(fd)))
                    if heritage.listeners.len() < MOST_LISTENERS =>
                {
                    heritage.listeners.push(Inherited { access, address, listener: fd.into() });
                }
                Some((Word::Other { name }, Some(fd))) => heritage.others.push((name, fd)),
                Some((Word::All, _)) => return Ok(heritage),
                Some((Word::Refused { why }, _)) => return Err(SuccessionError::Refused { pid, why }),
                Some((word, _)) => {
                    let what = format!("it says \"{}\" where listeners were expected", word.write());
                    return Err(misunderstood(io::Error::new(io::ErrorKind::InvalidData, what)));
                }
                None => return Err(misunderstood(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }
}

/// What a process is to the proxy that it is one of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is about to accept clients.
    Coming,
    Accepts,
    /// Another one accepts, and is on probation.
    Aside,
    /// Another one accepts, or none. It goes on with its clients, and does not listen.
    Retired,
    /// Another one accepts, and its last client has left.
    Over,
}

/// A running process's part in it. Until this is dropped the process is found by others.
#[derive(Debug)]
pub struct Succession {
    inner: Arc<Inner>,
    answering: JoinHandle<()>,
    _own: OwnSocket,
}

impl Drop for Succession {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

struct Inner {
    proxy: Arc<Proxy>,
    /// What goes along with the listeners.
    others: Mutex<Vec<(String, OwnedFd)>>,
    standing: watch::Sender<Standing>,
    handing: tokio::sync::Mutex<()>,
    /// It was asked to end, and hands over to nobody.
    leaving: watch::Sender<bool>,
    /// To the process before this one, while that may have to accept again.
    former: Mutex<Option<Arc<Link>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("standing", &*self.standing.borrow()).finish_non_exhaustive()
    }
}

impl Succession {
    /// Makes this process the one that accepts. `others`: what a successor is to be given beside the listeners. So long the
    /// clients of the former process may stay; without a time, as long as they like.
    pub async fn begin(
        turn: Turn,
        heritage: Option<Heritage>,
        proxy: &Arc<Proxy>,
        others: Vec<(String, OwnedFd)>,
        clients_within: Option<Duration>,
    ) -> Result<Succession, SuccessionError> {
        let place = Arc::clone(&turn.place);
        proxy.forward_cancels(Elders::new(Arc::clone(&place), place.living()?));
        let (socket, own) = place.listen()?;
        let io = |source| PlaceError::Io { path: place.path().to_owned(), source };
        let socket = UnixListener::from_std(socket.into()).map_err(io)?;
        let inner = Arc::new(Inner {
            proxy: Arc::clone(proxy),
            others: Mutex::new(others),
            standing: watch::Sender::new(Standing::Coming),
            handing: tokio::sync::Mutex::default(),
            leaving: watch::Sender::new(false),
            former: Mutex::default(),
        });
        let answering = tokio::spawn(answer_all(socket, Arc::clone(&inner)));
        let succession = Succession { inner, answering, _own: own };
        match heritage {
            Some(heritage) => succession.inner.succeed(heritage, clients_within).await?,
            None => succession.inner.accepts(),
        }
        Ok(succession)
    }

    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.inner.standing.subscribe()
    }

    /// This process is about to end because somebody wants it to: none is to accept in its place.
    pub async fn leave(&self) {
        self.inner.release_former().await;
        self.inner.leaving.send_replace(true);
        if *self.inner.standing.borrow() == Standing::Accepts {
            // A successor that waits for its turn hears of it.
            drop(timeout(WORD_WITHIN, self.inner.handing.lock()).await);
        }
        self.inner
            .standing
            .send_if_modified(|standing| std::mem::replace(standing, Standing::Retired) != Standing::Retired);
        self.inner.others().clear();
    }
}

impl Inner {
    fn former(&self) -> MutexGuard<'_, Option<Arc<Link>>> {
        self.former.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn others(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accepts(&self) {
        self.proxy.open();
        self.standing.send_replace(Standing::Accepts);
    }

    /// The successor's part.
    async fn succeed(
        &self,
        heritage: Heritage,
        clients_within: Option<Duration>,
    ) -> Result<(), SuccessionError> {
        let Heritage { link, pid, .. } = heritage;
        // Whatever goes wrong with it, but that it says no, means that it is gone.
        let told = async {
            link.send(&Word::Ready).await?;
            link.receive().await
        };
        match timeout(READY_WITHIN, told).await {
            Ok(Ok(Some((Word::Yours, _)))) => {}
            Ok(Ok(Some((Word::Refused { why }, _)))) => return Err(SuccessionError::Refused { pid, why }),
            Ok(Ok(Some((word, _)))) => {
                let source = io::Error::other(format!("it says \"{}\"", word.write()));
                return Err(SuccessionError::NotUnderstood { pid, source });
            }
            Ok(Ok(None) | Err(_)) => {
                tracing::warn!(pid, "the process before this one has ended before it had handed over");
                self.accepts();
                return Ok(());
            }
            Err(_) => {
                let source = io::ErrorKind::TimedOut.into();
                return Err(SuccessionError::NotUnderstood { pid, source });
            }
        }
        self.accepts();
        if let Err(error) = link.send(&Word::Serving { clients_within }).await {
            // It has given this process up, or is gone.
            if let Ok(Some((Word::Refused { why }, _))) = link.receive().await {
                self.proxy.close().await;
                return Err(SuccessionError::Refused { pid, why });
            }
            tracing::warn!(pid, %error, "the process before this one has ended before it had clients to keep");
        }
        *self.former() = Some(Arc::new(link));
        Ok(())
    }

    async fn release_former(&self) {
        let former = self.former().take();
        if let Some(former) = former
            && let Err(error) = former.send(&Word::Goodbye).await
        {
            tracing::debug!(%error, "the process before this one needs no farewell");
        }
    }

    async fn answer(self: Arc<Inner>, link: Link) {
        let talk = async {
            let peer = link.peer()?;
            let own = rustix::process::geteuid().as_raw();
            // The directory lets nobody else in; root might be a supervisor.
            if peer.uid != own && peer.uid != 0 {
                tracing::warn!(peer.pid, peer.uid, "a stranger is not answered");
                return Ok(());
            }
            match timeout(WORD_WITHIN, link.receive()).await.map_err(|_| io::ErrorKind::TimedOut)?? {
                Some((Word::Status, _)) => {
                    let accepts = *self.standing.borrow() == Standing::Accepts;
                    link.send(&Word::State { accepts, clients: self.proxy.guests() }).await
                }
                Some((Word::Cancel { pid, key }, _)) => {
                    let known = self.proxy.cancel(pid, &key).await;
                    link.send(&if known { Word::Known } else { Word::Unknown }).await
                }
                Some((Word::Hello { version }, _)) => {
                    let refused = match self.try_hand_over(&link, version, peer, own).await {
                        Ok(()) => return Ok(()),
                        Err(refused) => refused,
                    };
                    tracing::warn!(successor = peer.pid, why = %refused, "this process is not taken over");
                    link.send(&Word::Refused { why: refused }).await
                }
                Some((word, _)) => {
                    let why = format!("nobody begins with \"{}\"", word.write());
                    link.send(&Word::Refused { why }).await
                }
                None => Ok(()),
            }
        };
        let outcome: io::Result<()> = talk.await;
        if let Err(error) = outcome {
            tracing::debug!(%error, "another process was not understood, or has left");
        }
    }

    /// The former process's part, to its very end. An error: nothing has changed, and this is why.
    async fn try_hand_over(
        &self,
        link: &Link,
        version: u32,
        peer: wire::Peer,
        own: u32,
    ) -> Result<(), String> {
        if version != VERSION {
            return Err(format!(
                "it speaks version {VERSION} of the handover, and the successor version {version}"
            ));
        }
        if peer.uid != own {
            return Err(format!(
                "it runs as the user with the number {own}, and the successor as {}",
                peer.uid
            ));
        }
        if *self.standing.borrow() != Standing::Accepts {
            return Err("it does not accept clients itself".to_owned());
        }
        let Ok(_handing) = self.handing.try_lock() else {
            return Err("another successor is before this one".to_owned());
        };
        let ready = async {
            for Inherited { access, address, listener } in self.proxy.listeners()? {
                link.send_with(&Word::Listener { access, address }, Some(listener.as_fd())).await?;
            }
            let others: Vec<(String, OwnedFd)> = self
                .others()
                .iter()
                .map(|(name, fd)| Ok((name.clone(), fd.try_clone()?)))
                .collect::<io::Result<_>>()?;
            for (name, fd) in others {
                link.send_with(&Word::Other { name }, Some(fd.as_fd())).await?;
            }
            link.send(&Word::All).await?;
            link.receive().await
        };
        let mut leaving = self.leaving.subscribe();
        let ready = tokio::select! {
            ready = timeout(READY_WITHIN, ready) => ready,
            _ = leaving.wait_for(|leaving| *leaving) => return Err("it was asked to end".to_owned()),
        };
        match ready {
            Ok(Ok(Some((Word::Ready, _)))) => {}
            Ok(Ok(Some((word, _)))) => return Err(format!("the successor says \"{}\"", word.write())),
            Ok(Ok(None)) => return Err("the successor has ended before it was ready".to_owned()),
            Ok(Err(error)) => return Err(format!("it could not be told to the successor: {error}")),
            Err(_) => return Err(format!("it was not ready within {} s", READY_WITHIN.as_secs())),
        }
        self.proxy.shut().await;
        let serving = async {
            link.send(&Word::Yours).await?;
            link.receive().await
        };
        let clients_within = match timeout(SERVING_WITHIN, serving).await {
            Ok(Ok(Some((Word::Serving { clients_within }, _)))) => clients_within,
            outcome => {
                self.proxy.open();
                return Err(match outcome {
                    Ok(Ok(Some((word, _)))) => format!("the successor says \"{}\"", word.write()),
                    Ok(Ok(None) | Err(_)) => "the successor has ended before it accepted clients".to_owned(),
                    Err(_) => format!("the successor did not accept within {} s", SERVING_WITHIN.as_secs()),
                });
            }
        };
        self.retire(link, peer.pid, clients_within).await;
        Ok(())
    }

    async fn retire(&self, link: &Link, successor: i32, clients_within: Option<Duration>) {
        self.proxy.retire();
        self.standing.send_replace(Standing::Aside);
        tracing::info!(
            successor,
            clients = self.proxy.guests(),
            "another process accepts the clients from now on"
        );
        self.release_former().await;
        let mut leaving = self.leaving.subscribe();
        let released = tokio::select! {
            heard = timeout(PROBATION, link.receive()) => match heard {
                Ok(heard) => matches!(heard, Ok(Some((Word::Goodbye, _)))),
                Err(_) => true,
            },
            _ = leaving.wait_for(|leaving| *leaving) => true,
        };
        if !released {
            tracing::error!(
                successor,
                "the process that had taken over is gone, and this one accepts clients again"
            );
            self.proxy.stay();
            self.accepts();
            return;
        }
        self.proxy.close().await;
        self.others().clear();
        self.standing.send_replace(Standing::Retired);
        tracing::info!(clients = self.proxy.guests(), "this process ends with its last client");
        let gone = self.proxy.guests_gone();
        let in_time = match clients_within {
            Some(within) => timeout(within, gone).await.is_ok(),
            None => {
                gone.await;
                true
            }
        };
        if !in_time {
            tracing::warn!(clients = self.proxy.guests(), "the time of those who have not left is over");
        }
        self.proxy.finish(Ending::Now).await;
        self.standing.send_replace(Standing::Over);
    }
}

/// Answers whoever comes, for ever.
async fn answer_all(socket: UnixListener, inner: Arc<Inner>) {
    let talks = Arc::new(Semaphore::new(MOST_TALKS));
    loop {
        // It is never closed.
        let Ok(talk) = Arc::clone(&talks).acquire_owned().await else { return };
        match socket.accept().await {
            Ok((stream, _)) => {
                let inner = Arc::clone(&inner);
                tokio::spawn(async move {
                    inner.answer(Link::from(stream)).await;
                    drop(talk);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "another process of this proxy cannot be heard");
                sleep(WORD_WITHIN).await;
            }
        }
    }
}

/// The processes that were there before this one, and that may have given out keys for cancels.
#[derive(Debug)]
pub(crate) struct Elders {
    place: Arc<Place>,
    names: Mutex<Vec<String>>,
    talks: Semaphore,
}

impl Elders {
    fn new(place: Arc<Place>, names: Vec<String>) -> Elders {
        Elders { place, names: Mutex::new(names), talks: Semaphore::new(MOST_CANCELS) }
    }

    fn names(&self) -> MutexGuard<'_, Vec<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does nothing if nobody has this key, and does not tell.
    pub(crate) async fn cancel(&self, pid: u32, key: &[u8]) {
        let names = self.names().clone();
        if names.is_empty() {
            return;
        }
        let Ok(_talk) = self.talks.acquire().await else { return };
        for name in names {
            match timeout(CANCEL_WITHIN, self.ask(&name, pid, key)).await {
                Ok(Ok(true)) => return,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => {
                    use io::ErrorKind::{ConnectionRefused, NotFound};
                    if matches!(error.kind(), ConnectionRefused | NotFound) {
                        // It has ended, and its clients before it.
                        self.names().retain(|other| *other != name);
                    } else {
                        tracing::debug!(%error, "a cancel could not be passed on");
                    }
                }
                Err(_) => tracing::warn!(
                    "a process of this proxy does not answer, and may have the key of a cancel"
                ),
            }
        }
    }

    async fn ask(&self, name: &str, pid: u32, key: &[u8]) -> io::Result<bool> {
        let link = self.place.connect(name)?;
        link.send(&Word::Cancel { pid, key: key.to_vec() }).await?;
        Ok(matches!(link.receive().await?, Some((Word::Known, _))))
    }
}

#[cfg(test)]
mod tests;
