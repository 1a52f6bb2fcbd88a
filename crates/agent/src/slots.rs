//! Keeps on a standby the slots that other members would stream from, were they pointed here.
//!
//! One that the file sends to this standby needs its slot here now, and everyone needs one the moment this node
//! leads. A slot that nobody streams from holds WAL back for ever; so it is moved along with what its member has,
//! as far as that is known. On a primary slots are a matter of decisions, and this has nothing to do.
//!
//! Hazard: a slot that is moved too far lets WAL go that its member lacks, which then must be copied anew.

use std::sync::Arc;
use std::time::Duration;

use pgherd_core::observation::Postgres;
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::{Lsn, Member, NodeName};
use tokio::sync::{mpsc, oneshot, watch};

use crate::causes::on_one_line;
use crate::main_loop::{Assigned, Event, Picture};
use crate::server::Server;

/// A member that is pointed here waits for its slot at most this long.
const KEEP_EVERY: Duration = Duration::from_secs(1);

pub(crate) async fn keep(
    server: Server,
    mut assigned: watch::Receiver<Assigned>,
    events: mpsc::Sender<Event>,
) {
    let mut failing = false;
    loop {
        if !assigned.borrow_and_update().duties.keep_slots {
            if assigned.changed().await.is_err() {
                return;
            }
            continue;
        }
        let (ask, answer) = oneshot::channel();
        if events.send(Event::Ask(ask)).await.is_err() {
            return;
        }
        let Ok(picture) = answer.await else { return };
        let kept = server.keep_slots(&wanted(&picture)).await;
        // Once for each time that it begins to fail: a server that is being stopped refuses for a while.
        match (&kept, failing) {
            (Err(error), false) => {
                tracing::info!(error = %on_one_line(error), "cannot keep the slots of the other members");
            }
            (Ok(()), true) => tracing::info!("keeps the slots of the other members again"),
            _ => {}
        }
        failing = kept.is_err();
        tokio::time::sleep(KEEP_EVERY).await;
    }
}

/// Keeps the archive's slot on every server of a cluster that has a repository: whoever owns the archive next finds here the WAL that it has not got.
pub(crate) async fn keep_archive(
    server: Server,
    spec: watch::Receiver<Arc<HerdSpec>>,
    cluster: NodeName,
    events: mpsc::Sender<Event>,
) {
    let (mut failing, mut gone) = (false, false);
    loop {
        tokio::time::sleep(KEEP_EVERY).await;
        let wanted = spec.borrow().cluster(&cluster).is_some_and(|cluster| cluster.backup.is_some());
        if !wanted && gone {
            continue;
        }
        let (ask, answer) = oneshot::channel();
        if events.send(Event::Ask(ask)).await.is_err() {
            return;
        }
        let Ok(picture) = answer.await else { return };
        if !matches!(picture.postgres, Postgres::Standby(_) | Postgres::Primary(_)) {
            continue;
        }
        let kept = server.keep_archive_slot(wanted, archived(&picture)).await;
        match (&kept, failing) {
            (Err(error), false) => {
                tracing::info!(error = %on_one_line(error), "cannot keep the slot of the archive");
            }
            (Ok(()), true) => tracing::info!("keeps the slot of the archive again"),
            _ => {}
        }
        failing = kept.is_err();
        gone = !wanted && kept.is_ok();
    }
}

/// Up to where the WAL of the timeline that is followed here is in the archive, as its owner says.
fn archived(picture: &Picture) -> Option<Lsn> {
    let owner = &picture.record.as_ref()?.archive.as_ref()?.owner;
    let others = picture.peers.iter().filter_map(|(_, _, says)| says.as_ref());
    let says = std::iter::once(&picture.own).chain(others).find(|says| says.node == *owner)?;
    let show = says.show.archive.as_ref()?;
    show.durable.filter(|_| show.timeline == picture.postgres.copy().map(|copy| copy.timeline))
}

/// The members whose slots should be here, and up to where they have WAL. That counts only on the timeline that is
/// followed here: on another one the same position is other WAL.
fn wanted(picture: &Picture) -> Vec<(Member, Option<Lsn>)> {
    let Some(record) = &picture.record else { return Vec::new() };
    let Postgres::Standby(standby) = &picture.postgres else { return Vec::new() };
    let has = |node: &NodeName| {
        if node.is_repository() {
            return archived(picture);
        }
        let (_, _, says) = picture.peers.iter().find(|(peer, ..)| peer == node)?;
        let says = says.as_ref().filter(|says| says.timeline == Some(standby.copy.timeline))?;
        says.flush_lsn
    };
    let others = record.nodes.keys().filter(|node| **node != picture.own.node);
    others.filter_map(|node| Some((record.member(node)?, has(node)))).collect()
}
