//! What the owner of the archive does, for as long as the record names this node: it opens the repository, streams WAL into it, knows what is
//! there, for `status` and for the word that a base backup is due, and has the members asked for what is missing.
//!
//! Leaves out: who owns it (`core::ha::archive`), and the base backups themselves. Hazard: WAL of one cluster in two repositories is worth
//! little; so the one that was seen first is in the record, and another one in its place is refused.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_backup::format::{OpenError, Repository};
use pgherd_backup::manifest::Manifest;
use pgherd_backup::name::Place;
use pgherd_backup::receive::Branch;
use pgherd_backup::voter::{self, Voter, VoterError};
use pgherd_backup::wal::{
    Archive, BackupRange, Gap as Missing, Inventory, Segments, Wanted, missing, window,
};
use pgherd_core::action::StreamOrder;
use pgherd_core::ha::archive::{self, Agreed, is_drill_due, is_due};
use pgherd_core::observation::ArchiveView;
use pgherd_core::record::{self, BackupOutcome};
use pgherd_core::retention::Retention;
use pgherd_core::spec::{BackupSpec, HerdSpec, RepositorySpec};
use pgherd_core::types::{Incarnation, Lsn, NodeName, SystemId};
use pgherd_postgres::replication::SlotName;
use pgherd_postgres::{base_backup, conf, slots};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::asking::{Asking, Ended};
use super::holes::{Holes, Member, Other};
use super::shelf::Shelf;
use super::voting::Votes;
use super::{Archiving, Gap, Order, State, Status};
use crate::backoff::Backoff;
use crate::backups::catalog::{Catalog, CatalogError};
use crate::backups::keeping::{self, KeepingError, Rules};
use crate::causes::on_one_line;
use crate::gossip::ArchiveShow;
use crate::main_loop::{ArchiveSeen, Assigned, Event, Incarnations};
use crate::peers::{self, Peers};
use crate::repository::{self, Another, RepositoryError};
use crate::schedule::Schedule;
use crate::server::{Server, ServerError};

/// How often the others are told.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// How often the policy is carried out, besides when a base backup has ended.
const EXPIRE_EVERY: Duration = Duration::from_secs(3600);
/// How often the repository is listed, besides when a base backup has ended: nobody else writes to it but in a hurry.
const LOOK_EVERY: Duration = Duration::from_secs(300);
/// While a base backup is taken: it cannot end while WAL is missing that it needs.
const LOOK_IN_BACKUP: Duration = Duration::from_secs(30);
/// After a look that has failed.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Gaps that are told.
const MAX_GAPS: usize = 5;

pub(crate) struct Owner {
    pub(crate) server: Server,
    pub(crate) cluster: NodeName,
    pub(crate) node: NodeName,
    pub(crate) peers: Peers,
    pub(crate) assigned: watch::Receiver<Assigned>,
    pub(crate) spec: watch::Receiver<Arc<HerdSpec>>,
    pub(crate) events: mpsc::Sender<Event>,
}

#[derive(Debug, thiserror::Error)]
enum OwnError {
    #[error("{0}")]
    Repository(RepositoryError),
    #[error(transparent)]
    Another(#[from] Another),
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// Why it cannot be seen what is there.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Voter(#[from] VoterError),
}

/// Keeps at it until the agent ends.
pub(crate) async fn own(mut owner: Owner) {
    let mut backoff = Backoff::between(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let Some((spec, system)) = owner.wanted() else {
            if owner.changed().await.is_err() {
                return;
            }
            continue;
        };
        let begun = Instant::now();
        let outcome = owner.hold(&spec, system).await;
        let Some(Err(error)) = outcome else {
            if owner.events.send(Event::Archive(None)).await.is_err() {
                return;
            }
            continue;
        };
        let trouble = told(&error);
        tracing::warn!(error = trouble, "the repository cannot be used at the moment");
        let show = ArchiveShow { trouble: Some(trouble), ..ArchiveShow::default() };
        let seen = ArchiveSeen { view: ArchiveView::default(), show };
        if owner.events.send(Event::Archive(Some(Box::new(seen)))).await.is_err() {
            return;
        }
        // A change of what is wanted ends the pause.
        drop(tokio::time::timeout(backoff.after(begun.elapsed()), owner.changed()).await);
    }
}

/// With what to do about it.
fn told(error: &OwnError) -> String {
    let hint = match error {
        OwnError::Repository(error) => error.hint(),
        OwnError::Another(_) => Some(Another::HINT.to_owned()),
        OwnError::Server(_) => None,
    };
    let what = match error {
        OwnError::Repository(error) => on_one_line(error),
        error => on_one_line(error),
    };
    hint.map_or_else(|| what.clone(), |hint| format!("{what} ({hint})"))
}

impl Owner {
    /// What is to be done here now; `None`: nothing.
    fn wanted(&mut self) -> Option<(BackupSpec, SystemId)> {
        let system = {
            let assigned = self.assigned.borrow_and_update();
            assigned.duties.archive.then_some(assigned.system)??
        };
        let spec = self.spec.borrow_and_update().cluster(&self.cluster)?.backup.clone()?;
        Some((spec, system))
    }

    /// Returns when something is not as it was.
    async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        tokio::select! {
            changed = self.assigned.changed() => changed,
            changed = self.spec.changed() => changed,
        }
    }

    fn archive(&self) -> Option<record::Archive> {
        self.assigned.borrow().archive.clone()
    }

    /// One reign over the repository. `None`: it has ended because it is not wanted any more.
    async fn hold(&mut self, spec: &BackupSpec, system: SystemId) -> Option<Result<(), OwnError>> {
        let known = self.archive().and_then(|archive| archive.repository);
        let place = match self.server.repository(&spec.repository) {
            Ok(place) => place,
            Err(error) => return Some(Err(error.into())),
        };
        let opened = tokio::select! {
            opened = open(&place, known.as_deref()) => opened,
            () = self.is_over(spec, system) => return None,
        };
        let repository = match opened {
            Ok(repository) => repository,
            Err(error) => return Some(Err(error)),
        };
        let mut votes = self.assigned.borrow().duties.voter.clone();
        let mut archiving = match self.begin(spec, system, &repository, votes.as_ref()).await? {
            Ok(archiving) => archiving,
            Err(error) => return Some(Err(error)),
        };
        let mut status = archiving.status();
        let mut sight = Sight::new(repository.clone(), place, system, self.segments().await);
        let mut asking = Asking::default();
        let mut expiring = Expiring { system, after: None, due: Instant::now(), task: None };
        let mut tick = tokio::time::interval(TELL_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let wanted = self.wanted();
            if wanted.as_ref().is_none_or(|(now, of)| now != spec || *of != system) {
                break;
            }
            let Some(archive) = self.archive() else { break };
            let now_votes = self.assigned.borrow().duties.voter.clone();
            if now_votes != votes {
                // Whatever was confirmed under the former order ends before anything is under the new one.
                votes = now_votes;
                archiving.end().await;
                archiving = match self.begin(spec, system, &repository, votes.as_ref()).await? {
                    Ok(archiving) => archiving,
                    Err(error) => return Some(Err(error)),
                };
                status = archiving.status();
            }
            let ended = archive.ended.as_ref().map_or(0, |end| end.number);
            // While a base backup is taken nothing goes: what it refers to is pinned, and the disk has enough to do.
            if archive.backup.is_none() && expiring.turn(&sight.repository, ended, &spec.retention).await {
                sight.look_at = Instant::now();
            }
            match asking.ended().await {
                Some(Ended::Filled) => sight.look_at = Instant::now(),
                Some(Ended::Failed) => sight.look_at = Instant::now() + LOOK_AGAIN,
                Some(Ended::Nothing) | None => {}
            }
            let streamed = status.borrow_and_update().clone();
            let line = Line::of(self.assigned.borrow().agreed.clone(), &streamed);
            if archive.backup.is_some() {
                sight.look_within(LOOK_IN_BACKUP);
            }
            if sight.line.agreed != line.agreed {
                // What was missing of another line may be on none now.
                asking.give_up();
                sight.holes = None;
            }
            sight.look(ended, line, self.assigned.borrow().incarnations, streamed.durable);
            asking.begin(&mut sight.holes, || self.members());
            let seen = sight.seen(&streamed, spec, &archive, &asking);
            if self.events.send(Event::Archive(Some(Box::new(seen)))).await.is_err() {
                break;
            }
            tokio::select! {
                _ = tick.tick() => {}
                () = sight.looked() => {}
                // Not wanted any more is to be noticed at once: a server that stops waits for this stream. So is another order to vote: commits
                // may wait for it.
                changed = self.changed() => if changed.is_err() { break },
            }
        }
        archiving.end().await;
        None
    }

    /// Begins to stream: from this very server, or as a member of the rule from the holder's. `None`: a node is in no specification any more.
    async fn begin(
        &self,
        spec: &BackupSpec,
        system: SystemId,
        repository: &Repository,
        votes: Option<&StreamOrder>,
    ) -> Option<Result<Archiving, OwnError>> {
        let from = votes.map_or(&self.node, |order| &order.source);
        let (host, port) = self.spec.borrow().node(from).map(|(_, node)| (node.host.clone(), node.port))?;
        let source = match self.server.archive_source(from, (&host, port)).await {
            Ok(source) => source,
            Err(error) => return Some(Err(error.into())),
        };
        let archive_slot = SlotName::new(slots::ARCHIVE);
        if let Some(order) = votes {
            return Some(Ok(Archiving::begin_voting(Votes {
                order: order.clone(),
                source,
                slot: SlotName::new(&conf::slot_name(&order.member))?,
                archive_slot: archive_slot?,
                repository: repository.clone(),
                system,
                piece_every: spec.archive_interval,
            })));
        }
        Some(Ok(Archiving::begin(Order {
            source,
            slot: archive_slot,
            repository: repository.clone(),
            system,
            // This server follows the herd: a timeline that it is on is the agreed one, and what the archive has of another one
            // behind the fork was never acknowledged.
            branch: Branch::Leave,
            // What nobody keeps any more would hold up all that is still to come.
            gap: Gap::Leave,
            piece_every: spec.archive_interval,
            until: None,
        })))
    }

    /// As this server has them; a repository without a backup does not say it.
    async fn segments(&self) -> Option<Segments> {
        let data_dir = self.server.instance()?.data_dir.clone();
        let control = tokio::task::spawn_blocking(move || base_backup::control(&data_dir)).await;
        Segments::new(control.ok()?.ok()?.1.wal_segment_bytes).ok()
    }

    /// Who is asked for what is missing.
    fn members(&self) -> Vec<Box<dyn Member>> {
        let (spec, primary) = (self.spec.borrow().clone(), self.assigned.borrow().holder.clone());
        let Some(cluster) = spec.cluster(&self.cluster) else { return Vec::new() };
        let addresses = peers::addresses(&spec, &self.node);
        let member = |node: &NodeName| -> Option<Box<dyn Member>> {
            if *node == self.node {
                return Some(Box::new(Shelf::new(node.as_str(), self.server.instance()?.data_dir.clone())));
            }
            let client = self.peers.client(node, addresses.get(node)?);
            Some(Box::new(Other { name: node.to_string(), client }))
        };
        archive::askees(cluster, &self.node, primary.as_ref()).filter_map(member).collect()
    }

    async fn is_over(&mut self, spec: &BackupSpec, system: SystemId) {
        let (spec, system) = (spec.clone(), system);
        loop {
            if self.changed().await.is_err() || self.wanted() != Some((spec.clone(), system)) {
                return;
            }
        }
    }
}

/// The policy of the herd file, carried out beside the stream.
struct Expiring {
    system: SystemId,
    /// The base backup that had ended when it was carried out last.
    after: Option<u64>,
    due: Instant,
    task: Option<JoinHandle<()>>,
}

impl Expiring {
    /// Begins when it is time to. `true`: it has come to an end, and other backups may be there.
    async fn turn(&mut self, repository: &Repository, ended: u64, retention: &Retention) -> bool {
        if let Some(task) = self.task.take_if(|task| task.is_finished()) {
            if let Err(error) = task.await {
                tracing::error!(%error, "carrying out the retention policy has ended by itself");
            }
            return true;
        }
        if self.task.is_none() && (self.after != Some(ended) || Instant::now() >= self.due) {
            (self.after, self.due) = (Some(ended), Instant::now() + EXPIRE_EVERY);
            let (repository, system, retention) = (repository.clone(), self.system, *retention);
            self.task = Some(tokio::spawn(async move {
                if let Err(error) = expire(&repository, system, &retention).await {
                    tracing::warn!(error = on_one_line(&error), "the retention policy cannot be carried out");
                }
            }));
        }
        false
    }
}

impl Drop for Expiring {
    /// Whoever owns the repository next carries it out; what was begun is found there.
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Opens the repository that is wanted, or makes it where there never was one.
async fn open(place: &RepositorySpec, known: Option<&str>) -> Result<Repository, OwnError> {
    let found = match repository::open_at(place).await {
        Err(RepositoryError::Open(OpenError::NoRepository { .. })) if known.is_none() => {
            match repository::create_at(place).await {
                // Another owner of a moment ago was faster.
                Err(RepositoryError::Open(OpenError::Exists { .. })) => repository::open_at(place).await,
                made => made,
            }
        }
        found => found,
    };
    let repository = found.map_err(OwnError::Repository)?;
    if let Some(known) = known {
        repository::must_be(known, &repository)?;
    }
    Ok(repository)
}

/// What a look at what is missing depends on, besides what is there: each change of it makes another one worthwhile.
#[derive(Clone, Default, PartialEq)]
struct Line {
    agreed: Option<Agreed>,
    /// The stream is on that line, so that its history is in the archive.
    is_archived: bool,
    /// How often the stream has left a gap.
    gaps: u64,
}

impl Line {
    fn of(agreed: Option<Agreed>, status: &Status) -> Line {
        let timeline = agreed.as_ref().map(|agreed| agreed.timeline);
        let is_archived = timeline.is_some() && status.timeline == timeline && status.durable.is_some();
        Line { agreed, is_archived, gaps: status.gaps }
    }
}

/// What is known of the repository.
struct Sight {
    repository: Repository,
    /// Where it was opened.
    place: RepositorySpec,
    system: SystemId,
    /// The size of this server's segments.
    segments: Option<Segments>,
    /// What the last look began with.
    line: Line,
    /// What it found missing that could be asked for.
    holes: Option<Holes>,
    known: Known,
    /// The end of a base backup that `known` has.
    ended: Option<u64>,
    look_at: Instant,
    /// A store that does not answer takes minutes to say so: what the stream does is told meanwhile.
    looking: Option<JoinHandle<Look>>,
    trouble: Option<String>,
    /// Up to which moment all is durable that the server had flushed.
    complete: Option<Instant>,
    /// Since when there is what was missing at first.
    found: Option<Instant>,
    /// The highest incarnation of a voter that has left something there, 0 for none.
    admitted: Option<Incarnation>,
    /// Those that were sealed for good.
    gone: BTreeSet<Incarnation>,
}

#[derive(Clone, Default)]
struct Known {
    from: Option<Timestamp>,
    newest: Option<Newest>,
    /// The newest that a hole keeps from leading to the present.
    before_hole: Option<Timestamp>,
    backups: u32,
    gaps: Vec<String>,
    /// What the members can be asked for; `None` if that cannot be told, as the archive is not on the line that was agreed on.
    missing: Option<Vec<Wanted>>,
}

#[derive(Clone)]
struct Newest {
    id: String,
    began: Timestamp,
}

/// How a look came out.
type Look = Result<Box<Surveyed>, Unseen>;

struct Surveyed {
    ended: u64,
    line: Line,
    admitted: Incarnation,
    known: Known,
    holes: Option<Holes>,
    gone: BTreeSet<Incarnation>,
}

struct Unseen {
    trouble: String,
    /// The same repository, opened anew.
    fresh: Option<Repository>,
}

impl Drop for Sight {
    fn drop(&mut self) {
        if let Some(looking) = &self.looking {
            looking.abort();
        }
    }
}

impl Sight {
    fn new(
        repository: Repository,
        place: RepositorySpec,
        system: SystemId,
        segments: Option<Segments>,
    ) -> Sight {
        Sight {
            repository,
            place,
            system,
            segments,
            line: Line::default(),
            holes: None,
            known: Known::default(),
            ended: None,
            look_at: Instant::now(),
            looking: None,
            trouble: None,
            complete: None,
            found: None,
            admitted: None,
            gone: BTreeSet::new(),
        }
    }

    /// The next look is not later than so long from now.
    fn look_within(&mut self, span: Duration) {
        self.look_at = self.look_at.min(Instant::now() + span);
    }

    /// Begins to look, if it is time to, or a base backup has ended since, or the line is another one.
    fn look(&mut self, ended: u64, line: Line, incarnations: Incarnations, durable: Option<Lsn>) {
        if self.looking.is_some() {
            return;
        }
        let is_dismissed = self
            .admitted
            .is_some_and(|admitted| incarnations.is_former(admitted) && !self.gone.contains(&admitted));
        let is_news =
            (self.ended != Some(ended) || self.line != line || is_dismissed) && self.trouble.is_none();
        if !is_news && Instant::now() < self.look_at {
            return;
        }
        // Whoever wants one earlier than that says so meanwhile.
        self.look_at = Instant::now() + LOOK_EVERY;
        let (repository, system, segments) = (self.repository.clone(), self.system, self.segments);
        let (place, mut gone) = (self.place.clone(), self.gone.clone());
        self.looking = Some(tokio::spawn(async move {
            let surveyed = async {
                let admitted = voter::incarnations(&repository, Place(system)).await?;
                for former in admitted.iter().filter(|number| incarnations.is_former(**number)) {
                    if !gone.contains(former) {
                        // Whoever still streams for it is ended, and a collection need not keep what it has voted with.
                        Voter::new(&repository, Place(system), *former).seal(voter::LAST).await?;
                        gone.insert(*former);
                    }
                }
                let agreed = line.agreed.as_ref().filter(|_| line.is_archived);
                let (known, holes) = survey(&repository, system, segments, agreed.zip(durable)).await?;
                Ok::<_, LookError>((admitted.last().copied().unwrap_or_default(), known, holes))
            };
            match surveyed.await {
                Ok((admitted, known, holes)) => {
                    Ok(Box::new(Surveyed { ended, line, admitted, known, holes, gone }))
                }
                Err(error) => {
                    // Its keys may have been changed since.
                    let fresh = repository::open_at(&place).await.ok();
                    let fresh =
                        fresh.filter(|fresh| fresh.format().repository == repository.format().repository);
                    Err(Unseen { trouble: on_one_line(&error), fresh })
                }
            }
        }));
    }

    /// Returns once a look has ended, and is what was seen then.
    async fn looked(&mut self) {
        let Some(looking) = &mut self.looking else { return std::future::pending().await };
        let look = looking.await;
        self.looking = None;
        let unseen = match look {
            Ok(Ok(surveyed)) => {
                let Surveyed { ended, line, admitted, known, holes, gone } = *surveyed;
                (self.known, self.holes, self.line, self.gone) = (known, holes, line, gone);
                (self.admitted, self.ended, self.trouble) = (Some(admitted), Some(ended), None);
                return;
            }
            Ok(Err(unseen)) => unseen,
            Err(error) => Unseen { trouble: error.to_string(), fresh: None },
        };
        tracing::warn!(error = unseen.trouble, "what is in the repository cannot be seen");
        self.trouble = Some(unseen.trouble);
        self.look_within(LOOK_AGAIN);
        self.repository = unseen.fresh.unwrap_or_else(|| self.repository.clone());
    }

    fn seen(
        &mut self,
        status: &Status,
        spec: &BackupSpec,
        archive: &record::Archive,
        asking: &Asking,
    ) -> ArchiveSeen {
        let streams = status.state == State::Streaming && status.durable.is_some();
        if streams {
            self.complete = match (status.behind_since, self.complete) {
                (None, _) => Some(Instant::now()),
                (Some(since), Some(_)) => Some(since),
                // How old it is what the stream has found when it began, nobody knows; what has come since is younger.
                (Some(since), None) => {
                    let found = *self.found.get_or_insert(since);
                    (since != found).then_some(since)
                }
            };
        }
        // Without a stream it grows: the server writes on.
        let behind = self.complete.map(|complete| complete.elapsed());
        let trouble = status.last_error.as_ref().map(|error| on_one_line(&**error));
        let now = Timestamp::now();
        let failed = archive.ended.as_ref().filter(|end| matches!(end.outcome, BackupOutcome::Failed { .. }));
        let failed = failed.and_then(|end| i64::try_from(end.unix_seconds?).ok());
        let began = self.known.newest.as_ref().map(|newest| newest.began.as_second());
        let before_hole = self.known.before_hole.map(Timestamp::as_second);
        let was_asked = self.known.missing.as_ref().is_some_and(|missing| asking.knows(missing));
        let last = |schedule: &Option<String>| Schedule::parse(schedule.as_deref()?).ok()?.last(now);
        let scheduled = last(&spec.schedule);
        let drilled = archive.drill.as_ref().map(|drill| drill.began_unix_seconds);
        let drilled_at = drilled.and_then(|at| i64::try_from(at).ok());
        ArchiveSeen {
            view: ArchiveView {
                repository: Some(self.repository.format().repository.clone()),
                streams,
                backup_is_due: is_due(
                    now.as_second(),
                    archive::newest(began, before_hole, was_asked),
                    scheduled,
                    failed,
                ),
                // Before the first look nothing is known.
                after: self.ended.unwrap_or(u64::MAX),
                drill_is_due: is_drill_due(began, last(&spec.drill), drilled_at),
                drill_after: drilled,
                admitted: self.admitted,
            },
            show: ArchiveShow {
                timeline: status.timeline,
                durable: status.durable,
                votes: status.votes,
                behind_ms: behind.map(|behind| u64::try_from(behind.as_millis()).unwrap_or(u64::MAX)),
                trouble: trouble.or_else(|| self.trouble.clone()).or_else(|| {
                    let is_unseen = self.ended.is_none();
                    is_unseen.then(|| "what is in the repository has not been seen yet".to_owned())
                }),
                window_from: self.known.from.map(Timestamp::as_second),
                newest: self.known.newest.as_ref().map(|newest| newest.id.clone()),
                newest_began: began,
                backups: self.known.backups,
                gaps: self.known.gaps.clone(),
                asked: asking.said().filter(|_| !self.known.gaps.is_empty()).cloned(),
                filled: asking.filled().cloned(),
            },
        }
    }
}

/// Base backups that are there, what can be restored with them, and what could be asked for that is missing.
async fn survey(
    repository: &Repository,
    system: SystemId,
    segments: Option<Segments>,
    line: Option<(&Agreed, Lsn)>,
) -> Result<(Known, Option<Holes>), CatalogError> {
    let catalog = Catalog::read(repository.clone(), Place(system)).await?;
    let of_server = || segments.map(|segments| Archive::new(repository, system, segments));
    let Some(archive) = catalog.archive()?.or_else(of_server) else { return Ok(Default::default()) };
    let inventory = archive.inventory().await?;
    let ranges = catalog.ranges();
    let window = window(&ranges, &inventory);
    let leads = |manifest: &&Manifest| {
        let reach = window.reaches.iter().find(|reach| reach.backup.id == manifest.id);
        window.to.is_some() && reach.is_some_and(|reach| reach.end == window.to)
    };
    // Behind a gap at the end of what can be reached WAL goes on, and nothing leads there: if nobody has what is missing, another base backup is due.
    // What the stream puts at this moment may be there in another order.
    let is_coming = |gap: &&Missing| {
        line.is_some_and(|(agreed, durable)| gap.timeline == agreed.timeline && gap.from >= durable)
    };
    let gaps = window.gaps.iter().filter(|gap| !is_coming(gap));
    let is_cut = gaps.clone().any(|gap| window.to == Some((gap.timeline, gap.from)));
    let newest = catalog.manifests().rev().find(leads);
    let mut known = Known {
        from: window.from.filter(|_| !is_cut).map(|from| from.stopped),
        newest: newest
            .filter(|_| !is_cut)
            .map(|newest| Newest { id: newest.id.to_string(), began: newest.facts.started }),
        before_hole: newest.filter(|_| is_cut).map(|newest| newest.facts.started),
        backups: u32::try_from(catalog.manifests().count()).unwrap_or(u32::MAX),
        gaps: gaps
            .take(MAX_GAPS)
            .map(|gap| format!("timeline {}, {} to {}", gap.timeline, gap.from, gap.to))
            .collect(),
        missing: None,
    };
    let Some((agreed, durable)) = line else { return Ok((known, None)) };
    let missing = wanted(&archive, &inventory, &ranges, agreed, durable).await?;
    known.missing.clone_from(&missing);
    let history = inventory.history(agreed.timeline).cloned();
    let holes = history.zip(missing).map(|(history, missing)| Holes { archive, inventory, history, missing });
    Ok((known, holes))
}

/// What is missing of the line that was agreed on, from the oldest backup on it up to what the stream has archived. `None`: the archive has not
/// got its history.
async fn wanted(
    archive: &Archive,
    inventory: &Inventory,
    backups: &[BackupRange],
    agreed: &Agreed,
    durable: Lsn,
) -> Result<Option<Vec<Wanted>>, CatalogError> {
    let Some(history) = inventory.history(agreed.timeline) else { return Ok(None) };
    let left: Vec<_> = history.forks().iter().map(|fork| (fork.timeline, fork.until)).collect();
    if !agreed.is(agreed.timeline, &left) {
        tracing::error!(timeline = %agreed.timeline, "the repository has another history of the timeline than the herd's record; nothing is asked for");
        return Ok(Some(Vec::new()));
    }
    let on_it = backups.iter().filter(|backup| history.passes(backup.timeline, backup.stop));
    let oldest = on_it.map(|backup| backup.start).min();
    // The first backup may be under way, and needs it all.
    let first = inventory.first_on(history).map(|number| Lsn(number * u64::from(archive.segments().bytes())));
    let Some(from) = oldest.or(first) else { return Ok(Some(Vec::new())) };
    let ends = archive.ends().await?;
    Ok(Some(missing(inventory, history, from..durable, |segment| ends.contains(&segment))))
}

/// Lets go of what the herd file does not want to be kept, and says what that was.
async fn expire(
    repository: &Repository,
    system: SystemId,
    retention: &Retention,
) -> Result<(), KeepingError> {
    let Some(policy) = retention.policy else { return Ok(()) };
    let rules = Rules {
        policy: policy.to_string(),
        minimum_redundancy: retention.minimum_redundancy,
        daily: retention.tiers.daily,
        weekly: retention.tiers.weekly,
        monthly: retention.tiers.monthly,
    };
    let catalog = Catalog::read(repository.clone(), Place(system)).await?;
    let preview = keeping::preview(&catalog, &rules).await?;
    for verdict in preview.verdicts.iter().filter(|verdict| verdict.goes) {
        tracing::info!(
            backup = verdict.id,
            why = verdict.reason,
            "a base backup goes, once its grace has passed"
        );
    }
    let done = keeping::expire(&catalog, &rules, preview, keeping::GRACE).await?;
    if let Some(collected) = done.collected.filter(|collected| collected.bytes > 0) {
        tracing::info!(bytes = collected.bytes, backups = ?collected.swept, "what nothing needs any more is gone");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use bytes::Bytes;
    use pgherd_backup::name::Name;
    use pgherd_backup::store::{Failure, Listed, Page, Put, Remote, RemoteAnswer, Store, StoreError};
    use pgherd_core::spec::backup::Location;
    use pgherd_core::types::{Term, Timeline};

    use super::*;

    #[tokio::test]
    async fn a_repository_that_was_dismissed_is_sealed_for_good_and_no_other_one() {
        let dir = tempfile::tempdir().unwrap();
        let repository =
            Repository::create(Store::directory(dir.path()), None, Timestamp::now()).await.unwrap();
        let place = RepositorySpec { location: Location::Directory(dir.path().to_owned()), secret: None };
        let voter = |number| Voter::new(&repository, Place(SystemId(1)), Incarnation(number));
        for number in [3, 7, 9] {
            voter(number).seal(Term(4)).await.unwrap();
        }
        let is_sealed = async |number| voter(number).is_sealed_above(Term(4)).await.unwrap();
        let mut sight = Sight::new(repository.clone(), place, SystemId(1), None);
        // 7 is the member, 3 was one, and 9 is of a record that this agent has not seen yet.
        let known = Incarnations { last: Incarnation(8), repository: Some(Incarnation(7)) };
        sight.look(0, Line::default(), known, None);
        sight.looked().await;
        assert!(is_sealed(3).await && !is_sealed(7).await && !is_sealed(9).await);
        assert_eq!(sight.admitted, Some(Incarnation(9)), "the next one is above it");

        let known = Incarnations { last: Incarnation(9), repository: None };
        sight.look(0, Line::default(), known, None);
        sight.looked().await;
        assert!(is_sealed(7).await && is_sealed(9).await);
    }

    /// A store that answers, until it does not for as long as it is told to.
    struct Sleeper {
        store: Store,
        sleeps: watch::Sender<bool>,
    }

    impl Sleeper {
        fn awake<'a, T>(
            &'a self,
            answer: impl Future<Output = Result<T, StoreError>> + Send + 'a,
        ) -> RemoteAnswer<'a, T> {
            Box::pin(async move {
                self.sleeps.subscribe().wait_for(|sleeps| !sleeps).await.expect("it is there itself");
                answer.await.map_err(|error| match error.is_absent() {
                    true => (Failure::Absent, error.into()),
                    false => (Failure::Failed, error.into()),
                })
            })
        }
    }

    impl Remote for Sleeper {
        fn put<'a>(&'a self, name: &'a Name, bytes: Bytes) -> RemoteAnswer<'a, Put> {
            self.awake(self.store.put(name, bytes))
        }

        fn read<'a>(&'a self, name: &'a Name, limit: u64) -> RemoteAnswer<'a, Bytes> {
            self.awake(self.store.read(name, limit))
        }

        fn read_range<'a>(&'a self, name: &'a Name, range: Range<u64>) -> RemoteAnswer<'a, Bytes> {
            self.awake(self.store.read_range(name, range))
        }

        fn head<'a>(&'a self, name: &'a Name) -> RemoteAnswer<'a, Listed> {
            self.awake(self.store.head(name))
        }

        fn list<'a>(
            &'a self,
            prefix: &'a str,
            after: Option<&'a Name>,
            limit: usize,
        ) -> RemoteAnswer<'a, Page> {
            self.awake(self.store.list(prefix, after, limit))
        }

        fn delete<'a>(&'a self, name: &'a Name) -> RemoteAnswer<'a, ()> {
            self.awake(self.store.delete(name))
        }

        fn sweep(&self) -> RemoteAnswer<'_, usize> {
            self.awake(self.store.sweep())
        }
    }

    #[tokio::test]
    async fn how_far_behind_the_stream_is_does_not_wait_for_a_store_that_does_not_answer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::directory(dir.path());
        drop(Repository::create(store.clone(), None, Timestamp::now()).await.unwrap());
        let sleeps = watch::Sender::new(false);
        let sleeper = Arc::new(Sleeper { store, sleeps: sleeps.clone() });
        let repository = Repository::open(Store::remote("of a test", sleeper), None).await.unwrap();
        let place = RepositorySpec { location: Location::Directory(dir.path().to_owned()), secret: None };
        let spec = BackupSpec::new(place.clone());
        let mut sight = Sight::new(repository, place, SystemId(1), None);
        let known = Incarnations { last: Incarnation(9), repository: None };
        let tells = |sight: &mut Sight, status: &Status| {
            sight.look(0, Line::default(), known, None);
            sight.seen(status, &spec, &archive(), &Asking::default()).show
        };
        let streams = Status { state: State::Streaming, durable: Some(Lsn(8)), ..Status::default() };
        let first = tells(&mut sight, &streams);
        assert!(first.trouble.is_some_and(|trouble| trouble.contains("not been seen yet")));
        sight.looked().await;
        let second = tells(&mut sight, &streams);
        assert_eq!(second.trouble, None);
        assert!(sight.looking.is_none(), "nothing is news");

        sleeps.send_replace(true);
        sight.look_at = Instant::now();
        let since = Instant::now().checked_sub(Duration::from_secs(7));
        let show = tells(&mut sight, &Status { behind_since: since, ..streams.clone() });
        assert!(show.behind_ms.is_some_and(|ms| ms >= 7000), "{show:?}");
        assert!(sight.looking.is_some(), "it looks meanwhile");

        sleeps.send_replace(false);
        sight.looked().await;
        assert!(sight.looking.is_none() && sight.trouble.is_none());
    }

    fn archive() -> record::Archive {
        record::Archive {
            place: "file:///x".to_owned(),
            repository: None,
            owner: "b".parse().unwrap(),
            term: Term(1),
            begun: 0,
            asked: false,
            backup: None,
            ended: None,
            drill: None,
        }
    }

    #[tokio::test]
    async fn a_hole_makes_a_backup_due_only_when_all_were_asked() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let repository = Repository::create(Store::directory(dir.path()), None, now).await.unwrap();
        let place = RepositorySpec { location: Location::Directory(dir.path().to_owned()), secret: None };
        let (spec, system) = (BackupSpec::new(place.clone()), SystemId(42));
        let mut sight = Sight::new(repository, place, system, None);
        let record = archive();
        let asking = Asking::default();
        let mut is_due = |before_hole: Option<Timestamp>, missing: Option<Vec<Wanted>>| {
            (sight.known.before_hole, sight.known.missing) = (before_hole, missing);
            sight.seen(&Status::default(), &spec, &record, &asking).view.backup_is_due
        };
        let hole = vec![Wanted::History(Timeline(3))];
        assert!(is_due(None, Some(Vec::new())), "there is no backup at all");
        assert!(is_due(None, Some(hole.clone())), "and that waits for nobody");
        assert!(!is_due(Some(now), Some(hole)), "it may be filled");
        assert!(!is_due(Some(now), None), "it is not known yet who could be asked for what");
        assert!(is_due(Some(now), Some(Vec::new())), "nobody can be asked for it");
    }

    #[test]
    fn each_change_of_the_line_makes_another_look_worthwhile() {
        let agreed = |timeline| Some(Agreed { timeline: Timeline(timeline), forks: Vec::new() });
        let mut status = Status { timeline: Some(Timeline(3)), ..Status::default() };
        assert!(!Line::of(agreed(3), &status).is_archived, "nothing of it is durable yet");
        status.durable = Some(Lsn(8));
        let line = Line::of(agreed(3), &status);
        assert!(line.is_archived);
        assert!(!Line::of(agreed(4), &status).is_archived, "the stream is not there yet");
        assert!(!Line::of(None, &status).is_archived);
        status.gaps = 1;
        assert!(Line::of(agreed(3), &status) != line, "it has left a gap");
    }
}
