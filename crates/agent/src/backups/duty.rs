//! Takes the base backup that the record wants of this node, and says how it came out.
//!
//! An agent that was started anew in the middle of one begins another one, which goes on from what the first attempt has stored. Leaves out: when and from which node (`core::ha::archive`).

use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use pgherd_backup::name::Place;
use pgherd_core::record::{BackupEnd, BackupOutcome};
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::NodeName;
use pgherd_postgres::base_backup::{Checkpoint, Survey};
use tokio::sync::{mpsc, watch};

use super::catalog::{Catalog, CatalogError};
use super::take::{self, TakeError, Taken};
use super::{MAX_READERS, Progress, create};
use crate::agreed::unix_seconds;
use crate::causes::on_one_line;
use crate::gossip::BackupShow;
use crate::main_loop::{Assigned, Event};
use crate::repository::{self, RepositoryError};
use crate::server::{Server, ServerError};

/// From the end of the copy until all its WAL is in the archive.
const WAL_DEADLINE: Duration = Duration::from_secs(600);

pub(crate) struct Duty {
    pub(crate) server: Server,
    pub(crate) cluster: NodeName,
    pub(crate) node: NodeName,
    pub(crate) assigned: watch::Receiver<Assigned>,
    pub(crate) spec: watch::Receiver<Arc<HerdSpec>>,
    pub(crate) events: mpsc::Sender<Event>,
}

#[derive(Debug, thiserror::Error)]
enum BackUpError {
    #[error("the herd file names no repository any more")]
    NoRepository,
    #[error("the cluster has no system identifier yet")]
    NoSystem,
    #[error("the repository there is another one than the cluster's")]
    AnotherRepository,
    #[error("{0}")]
    Repository(RepositoryError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("the backups that are there cannot be seen")]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Take(#[from] TakeError),
}

/// Until the agent ends.
pub(crate) async fn back_up(mut duty: Duty) {
    loop {
        let wanted = duty.assigned.borrow_and_update().duties.backup;
        let Some(number) = wanted else {
            if duty.assigned.changed().await.is_err() {
                return;
            }
            continue;
        };
        tracing::info!(number, "a base backup begins");
        let mut assigned = duty.assigned.clone();
        let came = tokio::select! {
            came = duty.take(number) => Some(came),
            // Given up by others, or the server is on its way down; dropping it ends it within a piece.
            () = not_wanted(&mut assigned, number) => None,
        };
        let Some(came) = came else {
            tracing::warn!(number, "the base backup is given up");
            if duty.events.send(Event::BackingUp(None)).await.is_err() {
                return;
            }
            continue;
        };
        let outcome = match came {
            Ok(taken) => {
                let (id, stored_bytes) = (taken.manifest.id.to_string(), taken.stored_bytes);
                tracing::info!(
                    number,
                    id,
                    read_bytes = taken.read_bytes,
                    stored_bytes,
                    "the base backup is complete"
                );
                if let Some(changes) = &taken.manifest.changes {
                    let (found_by, why) = (changes.found_by, changes.why.as_deref().unwrap_or_default());
                    tracing::info!(
                        number,
                        ?found_by,
                        why,
                        "what has changed since the last backup was found"
                    );
                }
                for file in &taken.unexplained {
                    tracing::error!(file = file.path, pages = ?file.pages, "pages have changed without WAL");
                }
                for damaged in &taken.damaged {
                    tracing::error!(file = damaged.path, pages = ?damaged.pages, "pages have wrong checksums");
                }
                BackupOutcome::Complete { id }
            }
            Err(error) => {
                let why = on_one_line(&error);
                tracing::warn!(number, error = why, "the base backup has failed");
                BackupOutcome::Failed { why }
            }
        };
        let end = BackupEnd { number, node: duty.node.clone(), unix_seconds: Some(unix_seconds()), outcome };
        for event in [Event::BackingUp(None), Event::BackedUp(Box::new(end))] {
            if duty.events.send(event).await.is_err() {
                return;
            }
        }
        // Until the others have heard of it.
        not_wanted(&mut assigned, number).await;
    }
}

/// Also if the agent ends.
async fn not_wanted(assigned: &mut watch::Receiver<Assigned>, number: u64) {
    drop(assigned.wait_for(|now| now.duties.backup != Some(number)).await);
}

impl Duty {
    async fn take(&self, number: u64) -> Result<Taken, BackUpError> {
        let assigned = self.assigned.borrow().clone();
        let spec = Arc::clone(&self.spec.borrow());
        let cluster = spec.cluster(&self.cluster).ok_or(BackUpError::NoRepository)?;
        let backup = cluster.backup.as_ref().ok_or(BackUpError::NoRepository)?;
        let system = assigned.system.ok_or(BackUpError::NoSystem)?;
        let wanted = self.server.repository(&backup.repository)?;
        let repository = repository::open_at(&wanted).await.map_err(BackUpError::Repository)?;
        let known = assigned.archive.and_then(|archive| archive.repository);
        if known.is_some_and(|known| known != repository.format().repository) {
            return Err(BackUpError::AnotherRepository);
        }
        let catalog = Catalog::read(repository.clone(), Place(system)).await?;
        let primary = assigned.holder.as_ref().filter(|holder| **holder != self.node);
        let primary = primary.and_then(|holder| cluster.node(holder));
        let is_primary = primary.is_none();
        let primary = primary.map(|node| (&node.name, node.host.as_str(), node.port));
        let throttle = backup.throttle.floor();
        let source = self.server.backup_source(primary, throttle.is_some()).await?;
        let timeline = Survey::of(&source.session).await.map_err(TakeError::from)?.timeline;
        let parent = match catalog.archive()? {
            Some(archive) => create::parent(&catalog, &archive, timeline).await?,
            None => None,
        };
        let cores = available_parallelism().map_or(1, usize::from);
        let order = take::Order {
            refresh_bytes: create::refreshed(&catalog),
            find: take::Find::Automatic,
            node: self.node.clone(),
            term: assigned.term,
            // The first one is waited for; a standby's is nobody's burden.
            checkpoint: if is_primary && parent.is_some() { Checkpoint::Spread } else { Checkpoint::Fast },
            readers: (cores / 2).clamp(1, MAX_READERS),
            max_bytes_per_second: None,
            throttle,
            // It takes one after the other.
            silence: Duration::ZERO,
            settle_every: take::SETTLE_EVERY,
            wal_deadline: WAL_DEADLINE,
            parent,
        };
        let (progress, shown) = watch::channel(Progress::default());
        let telling = tell(number, shown, self.events.clone());
        tokio::select! {
            taken = take::take(&repository, source, &order, &progress) => Ok(taken?),
            () = telling => Err(TakeError::Stopped.into()),
        }
    }
}

/// Until the agent ends.
async fn tell(number: u64, mut shown: watch::Receiver<Progress>, events: mpsc::Sender<Event>) {
    loop {
        let Progress { done_bytes, total_bytes, held_to, .. } = *shown.borrow_and_update();
        let show = BackupShow { number, done_bytes, total_bytes, held_to };
        if events.send(Event::BackingUp(Some(show))).await.is_err() || shown.changed().await.is_err() {
            return;
        }
    }
}
