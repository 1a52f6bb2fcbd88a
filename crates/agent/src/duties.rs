//! What goes on all the time, as the newest decision assigns it: proving the term, probing the holder.
//!
//! A proof counts from the moment of asking. So each attempt notes the time first, and one that hangs is
//! given up at its deadline while the next is already due: a late answer proves what it says about the
//! moment at which it was asked, and is passed on like any other.

use std::sync::Arc;
use std::time::Duration;

use pgherd_core::spec::HerdSpec;
use pgherd_core::spec::times::{DEEP_PROBE_DEADLINE, DEEP_PROBE_EVERY, PROBE_EVERY};
use pgherd_core::types::{Instant, NodeName, Term};
use pgherd_dcs::Store;
use tokio::sync::{mpsc, watch};

use crate::agreed::cluster_key;
use crate::backend::Listeners;
use crate::clock;
use crate::main_loop::{Assigned, Event};
use crate::server::{Remote, Server};

/// Asks the store every `renew` whether the record is as this agent believes.
pub(crate) async fn confirm(
    store: Store,
    cluster: NodeName,
    mut assigned: watch::Receiver<Assigned>,
    spec: watch::Receiver<Arc<HerdSpec>>,
    events: mpsc::Sender<Event>,
) {
    let key = cluster_key(&cluster);
    loop {
        let renew = spec.borrow().times.renew;
        let within = spec.borrow().times.lease;
        let revision = assigned.borrow_and_update().revision;
        if let Some(revision) = revision {
            let asked = clock::now();
            let unchanged = store.confirm(&key, revision, within).await.ok();
            if events.send(Event::Confirmed { revision, asked, unchanged }).await.is_err() {
                return;
            }
            if unchanged == Some(false) {
                // The news is on its way here; ask about the newer record as soon as it is known.
                let news = tokio::time::timeout(renew, assigned.changed()).await;
                if matches!(news, Ok(Err(_))) {
                    return;
                }
                continue;
            }
            tokio::time::sleep(renew.saturating_sub(clock::now().since(asked))).await;
        } else if assigned.changed().await.is_err() {
            return;
        }
    }
}

/// Commits a heartbeat every `renew` while this node holds the term and commits need voters.
pub(crate) async fn heartbeat(
    server: Server,
    mut assigned: watch::Receiver<Assigned>,
    spec: watch::Receiver<Arc<HerdSpec>>,
    events: mpsc::Sender<Event>,
) {
    loop {
        let now = assigned.borrow_and_update().clone();
        if !now.duties.prove_term {
            if assigned.changed().await.is_err() {
                return;
            }
            continue;
        }
        let (renew, lease) = (spec.borrow().times.renew, spec.borrow().times.lease);
        let begun = clock::now();
        // Without voters it still makes traffic, which lets standbys tell an idle primary from a lost one;
        // but it acknowledges itself and proves nothing.
        if let Ok(begun) = server.heartbeat(lease).await
            && now.needed > 0
            && events.send(Event::Heartbeat { term: now.term, begun }).await.is_err()
        {
            return;
        }
        let left = renew.saturating_sub(clock::now().since(begun));
        // A change of duties ends the nap, so that a new reign begins with a proof.
        drop(tokio::time::timeout(left, assigned.changed()).await);
    }
}

/// Waits for the proxies while they are asked to let their clients' transactions end.
pub(crate) async fn drain(
    proxies: Listeners,
    mut assigned: watch::Receiver<Assigned>,
    events: mpsc::Sender<Event>,
) {
    loop {
        let asked = assigned.borrow_and_update().drain;
        let wait = async {
            if let Some(drain) = asked {
                proxies.all_drained(drain).await;
                // The main loop is gone only when the agent ends.
                drop(events.send(Event::Drained(drain)).await);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = wait => {}
            another = assigned.wait_for(|now| now.drain != asked) => {
                if another.is_err() {
                    return;
                }
            }
        }
    }
}

/// Sees to the proxies' role once in each term of this node, after its gate has opened: nobody waits for it.
pub(crate) async fn proxy_role(server: Server, mut assigned: watch::Receiver<Assigned>) {
    let mut done: Option<Term> = None;
    loop {
        let now = assigned.borrow_and_update().clone();
        if !now.duties.prove_term || done == Some(now.term) {
            if assigned.changed().await.is_err() {
                return;
            }
            continue;
        }
        let again_after = match server.ensure_proxy_role().await {
            Ok(None) => ROLE_LOOK_EVERY,
            Ok(Some(was_wrong)) => {
                if was_wrong {
                    tracing::info!("the proxies' role was missing or wrong, and was put right");
                }
                done = Some(now.term);
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, "the proxies' role cannot be put right yet");
                ROLE_AGAIN_AFTER
            }
        };
        tokio::time::sleep(again_after).await;
    }
}

/// Probes the holder's PostgreSQL from here, as a voter: a trivial command on a standing connection, and on
/// a new one where that fails or hangs.
pub(crate) async fn probe(
    remote: Remote,
    mut assigned: watch::Receiver<Assigned>,
    spec: watch::Receiver<Arc<HerdSpec>>,
    events: mpsc::Sender<Event>,
) {
    let mut failing_since: Option<(NodeName, Instant)> = None;
    loop {
        let now = assigned.borrow_and_update().clone();
        let holder = now.holder.filter(|_| now.duties.probe_holder);
        let Some(holder) = holder else {
            if assigned.changed().await.is_err() {
                return;
            }
            continue;
        };
        let address = spec.borrow().node(&holder).map(|(_, node)| (node.host.clone(), node.port));
        let begun = clock::now();
        let alive = match &address {
            Some((host, port)) => remote.probe(&holder, host, *port, probe_within(&spec)).await.is_ok(),
            None => false,
        };
        failing_since = match (alive, failing_since.take()) {
            (true, _) => None,
            (false, Some((node, since))) if node == holder => Some((node, since)),
            (false, _) => Some((holder.clone(), begun)),
        };
        let since = failing_since.as_ref().map(|(_, since)| *since);
        if events.send(Event::Probed { node: holder, failing_since: since }).await.is_err() {
            return;
        }
        tokio::time::sleep(PROBE_EVERY.saturating_sub(clock::now().since(begun))).await;
    }
}

/// Asks PostgreSQL every second for a new session. One that lets nobody in is damaged as far as the herd is
/// concerned, however well its standing sessions answer (a frozen postmaster looks just like that).
pub(crate) async fn health(server: Server, events: mpsc::Sender<Event>) {
    let mut failures = 0_u32;
    let mut damaged = false;
    loop {
        tokio::time::sleep(DEEP_PROBE_EVERY).await;
        failures = if server.lets_in(DEEP_PROBE_DEADLINE).await { 0 } else { failures + 1 };
        let now = failures >= FAILURES_ARE_DAMAGE;
        if now == damaged {
            continue;
        }
        damaged = now;
        let damage = now.then(|| "PostgreSQL lets nobody in".to_owned());
        if events.send(Event::Damage(damage)).await.is_err() {
            return;
        }
    }
}

/// The gate of a new primary opens within a second or so, and no client misses the role before a proxy asks.
const ROLE_LOOK_EVERY: Duration = Duration::from_secs(1);
/// Somebody has locked the table of roles, or the disk is full.
const ROLE_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// One probe may meet a moment of overload; two in a row have lasted for as many deadlines.
const FAILURES_ARE_DAMAGE: u32 = 2;

/// A probe that has not answered for this long has failed: half of `suspect`, so that two fit into it.
fn probe_within(spec: &watch::Receiver<Arc<HerdSpec>>) -> Duration {
    (spec.borrow().times.suspect / 2).max(Duration::from_millis(500))
}
