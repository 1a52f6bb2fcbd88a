//! A proxy's process from its beginning to its end: alone or in the place of another one, what it is asked to do meanwhile, and
//! how it leaves.
//!
//! What two processes say to each other is [`pgherd_proxy::succession`]. Leaves out what the herd wants and how it is learnt
//! ([`super`]). Hazard: a process that nobody can reach and that never ends; so one that is asked twice ends at once.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use pgherd_proxy::succession::{Heritage, Place, PlaceError, Standing, Succession, SuccessionError, Turn};
use pgherd_proxy::{Ending, Proxy};
use sd_notify::NotifyState;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};

use super::{ProxyError, Task};

/// What a process leaves to its successor beside the listeners of clients.
pub(super) const METRICS: &str = "metrics";
/// For transactions when the proxy is asked to end, as when the primary is handed over.
const SERVERS_WITHIN: Duration = Duration::from_secs(5);

/// How a process begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// There must be no other one.
    Alone,
    /// In the place of the one that runs.
    TakesOver,
    /// Whichever of the two it is.
    Either,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub start: Start,
    /// So long the clients of the process that is taken over may stay.
    pub clients_within: Option<Duration>,
    /// What a successor is started with.
    pub successor: (PathBuf, Vec<OsString>),
}

/// What a process is asked to do while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Transactions may end; asked again, at once.
    End,
    /// Lets nobody in, and ends when the last client has left.
    EndAfterClients,
    /// Starts another process, which takes over.
    Succeed,
}

/// Where the processes of a proxy find each other; `None`: there is no such place, and this one cannot be taken over.
pub(super) fn place(path: &std::path::Path, start: Start) -> Result<Option<Place>, ProxyError> {
    match (Place::open(path), start) {
        (Ok(place), _) => Ok(Some(place)),
        // Clients are served nevertheless.
        (Err(error @ PlaceError::Io { .. }), Start::Alone | Start::Either) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "this process cannot be taken over by another one"
            );
            Ok(None)
        }
        (Err(error), _) => Err(SuccessionError::from(error).into()),
    }
}

/// What is already seen to be wrong is told at once, and not when an agent has answered.
pub(super) async fn must_run(place: &Place, path: &std::path::Path) -> Result<(), ProxyError> {
    let processes = place.processes().await.map_err(SuccessionError::from)?;
    match processes.iter().any(|process| process.accepts) {
        true => Ok(()),
        false => Err(SuccessionError::NoneRuns { place: path.to_owned() }.into()),
    }
}

pub(super) async fn inherit(turn: Option<&Turn>, start: Start) -> Result<Option<Heritage>, ProxyError> {
    let Some(turn) = turn else { return Ok(None) };
    Ok(match start {
        Start::Alone => {
            turn.must_be_alone().await?;
            None
        }
        Start::TakesOver => Some(turn.inherit().await?),
        Start::Either => match turn.inherit().await {
            Ok(heritage) => Some(heritage),
            Err(SuccessionError::NoneRuns { .. }) => None,
            Err(error) => return Err(error.into()),
        },
    })
}

/// A process that has begun.
pub(super) struct Life {
    pub(super) proxy: Arc<Proxy>,
    succession: Option<Succession>,
    standing: Option<watch::Receiver<Standing>>,
    finishing: Option<(Ending, Task)>,
    successor: (PathBuf, Vec<OsString>),
}

/// What has become of it.
pub(super) enum Turned {
    Standing(Standing),
    Ended,
}

impl Life {
    pub(super) async fn begin(
        proxy: Arc<Proxy>,
        turn: Option<Turn>,
        heritage: Option<Heritage>,
        others: Vec<(String, OwnedFd)>,
        options: &Options,
    ) -> Result<Life, ProxyError> {
        let succession = match turn {
            Some(turn) => {
                Some(Succession::begin(turn, heritage, &proxy, others, options.clients_within).await?)
            }
            None => None,
        };
        // Under systemd: of the processes of this service it is this one that is to be signalled and watched.
        notify(&[NotifyState::Ready, NotifyState::MainPid(std::process::id())]);
        let standing = succession.as_ref().map(Succession::standing);
        let successor = options.successor.clone();
        Ok(Life { proxy, succession, standing, finishing: None, successor })
    }

    /// Until something about it is another thing than before.
    pub(super) async fn turned(&mut self) -> Turned {
        let finished = async {
            match &mut self.finishing {
                Some((_, task)) => drop((&mut task.0).await),
                None => std::future::pending().await,
            }
        };
        let standing = async {
            if let Some(standing) = &mut self.standing
                && standing.changed().await.is_ok()
            {
                return *standing.borrow_and_update();
            }
            // There is no succession, or it has ended.
            std::future::pending().await
        };
        tokio::select! {
            () = finished => Turned::Ended,
            standing = standing => match standing {
                Standing::Over => Turned::Ended,
                other => Turned::Standing(other),
            },
        }
    }

    pub(super) async fn follow(&mut self, order: Order) {
        match order {
            Order::End => {
                let patient = Ending::AfterServers { within: Some(SERVERS_WITHIN) };
                let again = matches!(&self.finishing, Some((Ending::AfterServers { within: Some(_) }, _)));
                self.end(if again { Ending::Now } else { patient }).await;
            }
            Order::EndAfterClients => self.end(Ending::AfterClients).await,
            Order::Succeed => self.succeed(),
        }
    }

    pub(super) async fn end(&mut self, how: Ending) {
        tracing::info!(?how, clients = self.proxy.guests(), "the proxy is asked to end");
        if let Some(succession) = &self.succession {
            succession.leave().await;
        }
        let proxy = Arc::clone(&self.proxy);
        self.finishing = Some((how, Task(tokio::spawn(async move { proxy.finish(how).await }))));
    }

    /// Of the program that lies where this one's lay when it was started, which may be a newer one. What it writes goes to where
    /// this process writes to.
    fn succeed(&self) {
        let (program, arguments) = &self.successor;
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                return tracing::error!(program = %program.display(), %error, "a successor cannot be started");
            }
        };
        tracing::info!(program = %program.display(), pid = child.id(), "a successor is started");
        // It is waited for as long as this process lives, so that nothing is left of it, either.
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) if status.success() => {}
                Ok(status) => {
                    tracing::error!(%status, "the successor that this process has started has ended");
                }
                Err(error) => tracing::error!(%error, "the successor that was started cannot be waited for"),
            }
        });
    }
}

fn notify(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// Nothing but an order to end is of any use to a process that has not begun.
pub(super) async fn asked_to_end(orders: &mut mpsc::UnboundedReceiver<Order>) {
    loop {
        match orders.recv().await {
            Some(Order::End | Order::EndAfterClients) => return,
            Some(Order::Succeed) => tracing::warn!("this process has not begun, and needs no successor"),
            None => std::future::pending().await,
        }
    }
}
