//! A repository that votes, as every agent sees it that could seal it, witnesses too: does it answer, and what is in it behind a seal?
//!
//! Both are asked for as the newest decision says ([`Duties`](pgherd_core::action::Duties)). An answer counts from when it was asked for. What was
//! found behind a seal is shown for as long as the order is the same; an attempt whose answer is lost is made again.
//!
//! Leaves out: what is put and listed in which order ([`pgherd_backup::voter`]), and whether it counts (`core`). Hazard: the seal of another
//! repository than the record's ends nobody's stream; so its identifier is compared first.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pgherd_backup::format::Repository;
use pgherd_backup::name::{self, Place};
use pgherd_backup::store::StoreError;
use pgherd_backup::voter::{Voter, VoterError};
use pgherd_core::action::SealOrder;
use pgherd_core::ha::election;
use pgherd_core::ha::repository::ASK_EVERY;
use pgherd_core::observation::{Copy, SealedRepository};
use pgherd_core::record::{Position, Record};
use pgherd_core::spec::{HerdSpec, RepositorySpec};
use pgherd_core::types::{NodeName, Term, Timeline};
use tokio::sync::{mpsc, oneshot, watch};

use crate::causes::on_one_line;
use crate::clock;
use crate::kept;
use crate::main_loop::{Assigned, Event};
use crate::repository::{self, Another, RepositoryError};

/// One that takes longer is as good as one that does not answer: an election would wait for it.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// A seal with everything that is listed behind it. One that takes longer is begun anew, so that nothing which never comes back is waited for.
const SEALED_WITHIN: Duration = Duration::from_secs(60);
/// From one attempt to seal it to the next.
const SEAL_AGAIN: Duration = Duration::from_millis(250);

/// Where an agent is, and what it follows.
#[derive(Clone)]
pub(crate) struct Sealing {
    pub(crate) cluster: NodeName,
    pub(crate) node: NodeName,
    pub(crate) pki_dir: PathBuf,
    pub(crate) assigned: watch::Receiver<Assigned>,
    pub(crate) spec: watch::Receiver<Arc<HerdSpec>>,
    pub(crate) events: mpsc::Sender<Event>,
}

#[derive(Debug, thiserror::Error)]
enum SealingError {
    #[error("{0}")]
    Repository(RepositoryError),
    #[error("the herd file names no repository, or the record knows none")]
    NoRepository,
    #[error(transparent)]
    Another(#[from] Another),
    #[error(transparent)]
    Voter(#[from] VoterError),
    #[error("the repository in {place} has no base backup that leads to any of its WAL")]
    Empty { place: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("it has not answered for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("this agent ends")]
    Ends,
}

impl SealingError {
    fn hint(&self) -> Option<String> {
        match self {
            SealingError::Repository(error) => error.hint(),
            SealingError::Another(_) => Some(Another::HINT.to_owned()),
            SealingError::Voter(error) => error.hint().map(str::to_owned),
            SealingError::Store(error) => error.hint().map(str::to_owned),
            SealingError::Empty { .. } => {
                Some("the election goes on as soon as the others suffice".to_owned())
            }
            SealingError::NoRepository | SealingError::Silent(_) | SealingError::Ends => None,
        }
    }
}

/// Asks it whether it answers, while that is wanted.
pub(crate) async fn ask(mut this: Sealing) {
    let mut opened = None;
    loop {
        if !this.assigned.borrow_and_update().duties.ask_repository {
            if this.assigned.changed().await.is_err() {
                return;
            }
            continue;
        }
        let asked = clock::now();
        match this.answers(&mut opened).await {
            Ok(()) => {
                if this.events.send(Event::RepositoryAnswered { asked }).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(error = on_one_line(&error), "the repository does not answer");
                opened = None;
            }
        }
        let left = ASK_EVERY.saturating_sub(clock::now().since(asked));
        // What is wanted may have changed by then.
        drop(tokio::time::timeout(left, this.assigned.changed()).await);
    }
}

/// Seals it for each election that lacks its vote, and shows what is in it.
pub(crate) async fn seal(mut this: Sealing) {
    let (mut opened, mut seen) = (None, None);
    let mut told = String::new();
    loop {
        let order = this.assigned.borrow_and_update().duties.seal_repository.clone();
        let Some(order) = order.filter(|order| seen.as_ref() != Some(order)) else {
            if this.assigned.changed().await.is_err() {
                return;
            }
            continue;
        };
        let asked = clock::now();
        let mut until = this.assigned.clone();
        let looked = tokio::select! {
            looked = tokio::time::timeout(SEALED_WITHIN, this.seal_and_look(&order, &mut opened)) => {
                looked.unwrap_or(Err(SealingError::Silent(SEALED_WITHIN)))
            }
            // Another election: what was under way is nobody's.
            over = until.wait_for(|now| now.duties.seal_repository.as_ref() != Some(&order)) => {
                if over.is_err() {
                    return;
                }
                continue;
            }
        };
        let event = match looked {
            Ok(sealed) => {
                tracing::info!(term = %order.term, end = ?sealed.copy.end, timeline = %sealed.copy.timeline, "has sealed the repository");
                seen = Some(order);
                told.clear();
                Event::RepositorySealed { asked, sealed: Box::new(sealed) }
            }
            Err(SealingError::Ends) => return,
            Err(error) => {
                let text = on_one_line(&error);
                // What goes on failing is told once.
                if text != told {
                    tracing::warn!(term = %order.term, error = text, hint = error.hint(), "the repository cannot be sealed");
                    told = text;
                }
                opened = None;
                drop(tokio::time::timeout(SEAL_AGAIN, this.assigned.changed()).await);
                continue;
            }
        };
        if this.events.send(event).await.is_err() {
            return;
        }
    }
}

/// A repository, and as what it was opened.
type Opened = Option<(RepositorySpec, Repository)>;

impl Sealing {
    async fn answers(&self, opened: &mut Opened) -> Result<(), SealingError> {
        let call = async {
            let repository = self.repository(opened).await?;
            repository.store().head(&name::format()).await?;
            Ok(())
        };
        tokio::time::timeout(ANSWER_WITHIN, call).await.unwrap_or(Err(SealingError::Silent(ANSWER_WITHIN)))
    }

    async fn seal_and_look(
        &self,
        order: &SealOrder,
        opened: &mut Opened,
    ) -> Result<SealedRepository, SealingError> {
        let repository = self.repository(opened).await?;
        let record = self.record().await?;
        let system = record.system.ok_or(SealingError::NoRepository)?;
        let voter = Voter::new(&repository, Place(system), order.member.incarnation);
        let worth = |adopted: &BTreeMap<Timeline, Term>, copy: &Copy| -> Position {
            let end = copy.end.unwrap_or_default();
            election::position(&record, adopted, copy.timeline, end, &copy.begins).0
        };
        let sealed = voter.seal_and_look(order.term, worth).await?;
        let place = || SealingError::Empty { place: repository.store().place().to_owned() };
        let copy = sealed.copy.ok_or_else(place)?;
        Ok(SealedRepository { order: order.clone(), copy, from: sealed.from, adopted: sealed.adopted })
    }

    /// As the herd file names it, and no other one than the record's.
    async fn repository(&self, opened: &mut Opened) -> Result<Repository, SealingError> {
        let known = self.assigned.borrow().archive.as_ref().and_then(|archive| archive.repository.clone());
        let spec = self.spec.borrow().clone();
        let named = spec.cluster(&self.cluster).and_then(|cluster| cluster.backup.as_ref());
        let (Some(known), Some(named)) = (known, named) else { return Err(SealingError::NoRepository) };
        let here = kept::from_here(&named.repository, &spec, &self.node, &self.pki_dir);
        if let Some((_, repository)) = opened.as_ref().filter(|(of, _)| *of == here) {
            return Ok(repository.clone());
        }
        let repository = repository::open_at(&here).await.map_err(SealingError::Repository)?;
        repository::must_be(&known, &repository)?;
        *opened = Some((here, repository.clone()));
        Ok(repository)
    }

    /// As new as the order at least, which was made of it.
    async fn record(&self) -> Result<Record, SealingError> {
        let (ask, answer) = oneshot::channel();
        self.events.send(Event::Ask(ask)).await.map_err(|_| SealingError::Ends)?;
        let picture = answer.await.map_err(|_| SealingError::Ends)?;
        picture.record.ok_or(SealingError::NoRepository)
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use pgherd_backup::store::Store;
    use pgherd_core::record;
    use pgherd_core::spec::BackupSpec;
    use pgherd_core::spec::backup::Location;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    struct Scene {
        dir: tempfile::TempDir,
        assigned: watch::Sender<Assigned>,
        heard: mpsc::Receiver<Event>,
        sealing: Sealing,
        /// Keeps the herd as it is.
        _spec: watch::Sender<Arc<HerdSpec>>,
    }

    /// An agent that is to ask a repository with this identifier, or with its own.
    async fn scene(known: Option<&str>) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::directory(dir.path());
        let made = Repository::create(store, None, Timestamp::now()).await.unwrap();
        let mut herd = crate::files::herd::read("herd.toml", crate::backend::tests::HERD).unwrap().spec;
        let location = Location::Directory(dir.path().to_owned());
        herd.clusters[0].backup = Some(BackupSpec::new(RepositorySpec { location, secret: None }));
        let archive = record::Archive {
            place: "file:///x".to_owned(),
            repository: Some(known.map_or_else(|| made.format().repository.clone(), ToOwned::to_owned)),
            owner: "a".parse().unwrap(),
            term: Term(1),
            begun: 0,
            asked: false,
            backup: None,
            ended: None,
            drill: None,
        };
        let mut now = Assigned { archive: Some(archive), ..Assigned::default() };
        now.duties.ask_repository = true;
        let (assigned, follows) = watch::channel(now);
        let (spec_sender, spec) = watch::channel(Arc::new(herd));
        let (events, heard) = mpsc::channel(4);
        let sealing = Sealing {
            cluster: "main".parse().unwrap(),
            node: "w".parse().unwrap(),
            pki_dir: PathBuf::new(),
            assigned: follows,
            spec,
            events,
        };
        Scene { dir, assigned, heard, sealing, _spec: spec_sender }
    }

    #[tokio::test]
    async fn an_answer_counts_from_when_it_was_asked_for_and_only_while_that_is_wanted() {
        let mut scene = scene(None).await;
        let before = clock::now();
        let task = tokio::spawn(ask(scene.sealing.clone()));
        let event = tokio::time::timeout(SOON, scene.heard.recv()).await.unwrap().unwrap();
        let Event::RepositoryAnswered { asked } = event else { panic!("{event:?}") };
        assert!(before <= asked && asked <= clock::now());
        scene.assigned.send_modify(|now| now.duties.ask_repository = false);
        // One may have been on its way; then there is silence until the task ends with its herd.
        drop(scene.assigned);
        tokio::time::timeout(SOON, task).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn another_repository_or_none_does_not_answer() {
        let mut other = scene(Some("0123")).await;
        let refused = other.sealing.answers(&mut None).await.unwrap_err();
        assert!(matches!(&refused, SealingError::Another(another) if another.known == "0123"), "{refused}");
        assert!(refused.hint().is_some());

        let scene = scene(None).await;
        let mut opened = None;
        scene.sealing.answers(&mut opened).await.unwrap();
        std::fs::remove_file(scene.dir.path().join("format")).unwrap();
        scene.sealing.answers(&mut opened).await.unwrap_err();
        assert!(other.heard.try_recv().is_err(), "nobody was told anything");
    }
}
