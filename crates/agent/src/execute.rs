//! Doing what was decided to PostgreSQL, one list of actions at a time.
//!
//! The executor leaves nothing open: it does exactly what an action says, refuses one whose term this node
//! has left behind, and drops the rest of a list at the first action that fails. It looks at PostgreSQL
//! after the last action and reports what it saw, so that the next decision is made on the result and not on
//! hope. A stop preempts whatever is under way.
//!
//! What must survive a crash is on disk before what relies on it happens, as each action says in
//! [`pgherd_core::action`].
//!
//! Hazard: an order of steps that is wrong here undoes what the core proved. Read an action's arm together
//! with its description.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use pgherd_core::action::Action;
use pgherd_core::ha::election;
use pgherd_core::observation::{Busy, Durable};
use pgherd_core::record::{Proposal, Record, Standing};
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::{Lsn, NodeName, Term, Timeline};
use pgherd_dcs::Store;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

use crate::agreed;
use crate::causes::on_one_line;
use crate::clock;
use crate::durable::{DurableError, DurableFile};
use crate::main_loop::{DeedsChange, Done, Event, Seen};
use crate::pace::Pace;
use crate::server::{Server, ServerError};
use crate::vip::Keeper;

/// A proposal inside a list is given up after this long, and the rest of the list with it.
const PROPOSAL_WITHIN: Duration = Duration::from_secs(5);
/// What an action may take before the executor gives up; those that copy data have no such limit.
const STOP_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(crate) enum DeedError {
    #[error("the action belongs to term {asked}, and this node has taken part in term {adopted}")]
    Stale { asked: Term, adopted: Term },
    #[error(transparent)]
    Durable(#[from] DurableError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Agreed(#[from] agreed::AgreedError),
    #[error("{0} is not in the specification")]
    UnknownNode(NodeName),
    #[error("the repository has not voted up to {0}")]
    NoSuchVote(Lsn),
    #[error("there is a copy here that is not to be replaced")]
    NotToBeReplaced,
}

/// What every list of actions works with.
pub(crate) struct Workshop {
    pub(crate) me: NodeName,
    pub(crate) cluster: NodeName,
    pub(crate) server: Server,
    pub(crate) durable: Mutex<DurableFile>,
    pub(crate) store: Store,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) keeper: Keeper,
    pub(crate) pace: std::sync::Mutex<Pace>,
}

pub(crate) struct Executor {
    workshop: Arc<Workshop>,
    current: Option<JoinHandle<()>>,
}

/// What the local PostgreSQL is held by while `actions` are done.
pub(crate) fn busy_with(actions: &[Action]) -> Busy {
    actions.iter().find_map(Action::busy).unwrap_or(Busy::Configure)
}

impl Executor {
    pub(crate) fn new(workshop: Arc<Workshop>) -> Executor {
        Executor { workshop, current: None }
    }

    /// Begins a list; whatever was under way is dropped, which only a stop may ask for.
    pub(crate) fn begin(&mut self, actions: Vec<Action>, record: Record, spec: &HerdSpec) {
        let preempted = self.current.take().filter(|task| !task.is_finished());
        let (workshop, spec) = (Arc::clone(&self.workshop), spec.clone());
        self.current = Some(tokio::spawn(async move {
            if let Some(task) = preempted {
                task.abort();
                // It ends at its next await; programs that it started die with their handles.
                drop(task.await);
            }
            workshop.run(actions, record, spec).await;
        }));
    }
}

impl Workshop {
    async fn run(&self, actions: Vec<Action>, record: Record, spec: HerdSpec) {
        let mut deeds = DeedsChange::default();
        let mut promoted = None;
        for action in actions {
            if let Some(busy) = action.busy()
                && self.events.send(Event::Working(Some(busy))).await.is_err()
            {
                return;
            }
            let pause = self.pace().before(&action);
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            let begun = clock::now();
            match self.perform(&action, &record, &spec, &mut deeds).await {
                Ok(seen) => {
                    promoted = seen;
                    self.pace().done(&action);
                    let took_ms = clock::now().since(begun).as_millis();
                    tracing::debug!(took_ms, ?action, "done");
                }
                Err(error) => {
                    if report(&action, &error) {
                        self.pace().failed(&action);
                    }
                    break;
                }
            }
        }
        let seen = match promoted {
            Some(seen) => seen,
            None => self.server.look().await,
        };
        let durable = self.durable.lock().await.now().clone();
        // The loop is gone only when the agent ends.
        drop(self.events.send(Event::Done(Box::new(Done { durable, deeds, seen: Some(seen) }))).await);
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does one action. A promotion returns what it left behind, so that nobody has to look first.
    async fn perform(
        &self,
        action: &Action,
        record: &Record,
        spec: &HerdSpec,
        deeds: &mut DeedsChange,
    ) -> Result<Option<Seen>, DeedError> {
        let server = &self.server;
        if action.shuts_out() {
            // Whoever came by the address that moves with the gate would be refused, or answered by nobody.
            self.keeper.settled().await;
        }
        match action {
            Action::Propose(proposal) => self.propose(proposal).await?,
            Action::BecomeMember { member, rebuild } => {
                self.remember(|durable| {
                    durable.member = Some(member.clone());
                    durable.rebuilding = *rebuild;
                    durable.held = None;
                    if *rebuild {
                        // Another copy: what the former one had seen says nothing about it.
                        durable.adopted.clear();
                        durable.promoting = None;
                    }
                })
                .await?;
            }
            Action::Adopt { term } => {
                self.current(*term).await?;
                self.remember(|durable| durable.term = *term).await?;
            }
            Action::InitDb => {
                self.remember(|durable| durable.rebuilding = true).await?;
                server.init_db().await?;
                self.remember(|durable| durable.rebuilding = false).await?;
            }
            Action::StartSealed => {
                deeds.forget = true;
                server.start_sealed().await?;
                // A promotion that was asked of a former process died with it.
                self.remember(|durable| durable.promoting = None).await?;
            }
            Action::StopCleanly => {
                server.stop_cleanly(STOP_WITHIN).await?;
                deeds.forget = true;
                self.remember(|durable| durable.promoting = None).await?;
            }
            Action::StopNow => {
                server.stop_now().await?;
                deeds.forget = true;
                self.remember(|durable| durable.promoting = None).await?;
            }
            Action::Seal { term } => {
                self.current(*term).await?;
                server.seal().await?;
                // The vote is sent only after this is on disk: a crash in between leaves a sealed node that
                // votes again, never an unsealed one that has voted.
                self.remember(|durable| {
                    durable.term = *term;
                    durable.sealed = Some(*term);
                })
                .await?;
            }
            Action::Vote { term, template } => {
                self.current(*term).await?;
                let end = server.sealed_end().await?;
                let adopted = self.durable.lock().await.now().adopted.clone();
                let (position, known) =
                    election::position(record, &adopted, end.timeline, end.lsn, &end.begins);
                let electable = known && end.consistent;
                let vote = template.fill(Standing::Sealed, position, end.timeline, end.begins, electable);
                self.propose(&Proposal::Vote { term: *term, vote }).await?;
            }
            Action::CatchUp { term, source, until } => {
                self.current(*term).await?;
                if source.is_repository() {
                    let voted = server.voted(vote_of_repository(record, *until)?).await?;
                    // A timeline that its WAL is of counts for this copy under the term under which it counted there.
                    self.remember(|durable| durable.adopted.extend(chain(record, voted.timeline()))).await?;
                    server.take(&voted).await?;
                    return Ok(None);
                }
                let from = place(spec, source)?;
                let member = self.member().await;
                server.catch_up(source, from, member.as_ref(), *until).await?;
            }
            Action::Promote { term, timeline, from, list } => {
                self.current(*term).await?;
                self.remember(|durable| {
                    durable.term = *term;
                    durable.promoting = Some((*term, *timeline));
                    durable.adopted.insert(*timeline, *term);
                })
                .await?;
                deeds.gate_open = Some(false);
                let promoted = server.promote(*timeline, *from, list).await?;
                if list.names.is_empty() {
                    // Nobody can follow before it was rewound, and no client comes in before somebody follows.
                    server.checkpoint_beside()?;
                }
                if record.lines.len() <= 2 {
                    // The cluster's first promotion: before it nobody could create the herd's roles.
                    server.create_roles(spec, &self.cluster).await?;
                }
                // Before anybody is pointed here, so that the first attempt to stream succeeds.
                let others: Vec<&NodeName> = record.nodes.keys().filter(|node| **node != self.me).collect();
                if !server.has_slots(&others) {
                    server.create_slots(&others).await?;
                }
                deeds.forget = true;
                return Ok(Some(server.look_of(&promoted, record).await));
            }
            Action::Follow { term, upstream, timeline } => {
                self.current(*term).await?;
                let from = place(spec, upstream)?;
                let lines = chain(record, *timeline);
                let durable = self.durable.lock().await.now().clone();
                let known = lines.iter().all(|(line, term)| durable.adopted.get(line) == Some(term));
                if !known && durable.sealed.is_none() {
                    // The former receiver is gone before these timelines are noted: what it could still bring, from
                    // an upstream that somebody promotes by hand, would pass for theirs.
                    if !server.stop_receiving().await? {
                        tracing::info!(
                            "PostgreSQL has ended, so that nothing of a former term is received; it starts anew"
                        );
                        return Ok(None);
                    }
                }
                self.remember(|durable| {
                    durable.term = *term;
                    durable.sealed = None;
                    durable.adopted.extend(lines.iter().copied());
                })
                .await?;
                let member = self.member().await;
                server.follow(upstream, from, member.as_ref(), (*term, *timeline)).await?;
            }
            Action::SetSyncList { term, list } => {
                self.current(*term).await?;
                server.set_sync_list(list).await?;
            }
            Action::WriteMarker { term, list } => {
                self.current(*term).await?;
                let end = server.write_marker().await?;
                deeds.marker = Some((list.clone(), end));
            }
            Action::SetGate { term, open } => {
                self.current(*term).await?;
                server.set_gate(*open).await?;
                deeds.gate_open = Some(*open);
                // What was noted for a promotion has served; nobody had to wait for its end on disk.
                if self.durable.lock().await.now().promoting.is_some() {
                    self.remember(|durable| {
                        durable.promoting = None;
                        durable.sealed = None;
                    })
                    .await?;
                }
            }
            Action::Checkpoint { term } => {
                self.current(*term).await?;
                server.checkpoint().await?;
                deeds.checkpointed_for = Some(*term);
            }
            Action::CutSender { term, pid } => {
                self.current(*term).await?;
                server.terminate(*pid).await?;
            }
            Action::CreateSlot { term, node } => {
                self.current(*term).await?;
                server.create_slots(&[node]).await?;
            }
            Action::Clone { term, source } => {
                self.current(*term).await?;
                let from = place(spec, source)?;
                server.clone_from(source, from).await?;
                let lines = record.reign.as_ref().map(|reign| chain(record, reign.timeline));
                self.remember(|durable| {
                    durable.rebuilding = false;
                    durable.adopted.extend(lines.into_iter().flatten());
                })
                .await?;
            }
            Action::Rewind { term, source } => {
                self.current(*term).await?;
                let from = place(spec, source)?;
                let lines = record.reign.as_ref().map(|reign| chain(record, reign.timeline));
                if server.rewind(source, from).await? {
                    self.remember(|durable| {
                        durable.rebuilding = false;
                        durable.adopted.extend(lines.into_iter().flatten());
                    })
                    .await?;
                }
                // Otherwise the directory counts as unfinished, and is cloned next.
            }
            Action::Inherit { term, timeline, until } => {
                self.current(*term).await?;
                if !self.durable.lock().await.now().rebuilding {
                    return Err(DeedError::NotToBeReplaced);
                }
                let ends_on = server.inherit((*timeline, *until)).await?;
                self.remember(|durable| {
                    durable.rebuilding = false;
                    durable.adopted.extend(chain(record, ends_on));
                })
                .await?;
            }
            Action::Restore { term, moment } => {
                self.current(*term).await?;
                if let Err(error) = server.restore_to(moment).await {
                    // Told to everybody: it is an operator who waits for it.
                    let why = on_one_line(&error);
                    let told = self.propose(&Proposal::NotHeld { node: self.me.clone(), why }).await;
                    if let Err(error) = told {
                        tracing::debug!(%error, "nobody was told of it");
                    }
                    return Err(error.into());
                }
                let lines = chain(record, moment.timeline);
                self.remember(|durable| {
                    durable.adopted.extend(lines);
                    durable.held = Some(moment.clone());
                })
                .await?;
            }
        }
        Ok(None)
    }

    async fn propose(&self, proposal: &Proposal) -> Result<(), DeedError> {
        let agreed = agreed::propose(&self.store, &self.cluster, proposal, PROPOSAL_WITHIN).await?;
        // The loop is gone only when the agent ends.
        drop(self.events.send(Event::Agreed(Box::new(agreed))).await);
        Ok(())
    }

    async fn remember(&self, change: impl FnOnce(&mut Durable)) -> Result<(), DeedError> {
        Ok(self.durable.lock().await.change(change)?)
    }

    async fn member(&self) -> Option<pgherd_core::types::Member> {
        self.durable.lock().await.now().member.clone()
    }

    /// Refuses what is late.
    async fn current(&self, asked: Term) -> Result<(), DeedError> {
        let adopted = self.durable.lock().await.now().term;
        if asked < adopted { Err(DeedError::Stale { asked, adopted }) } else { Ok(()) }
    }
}

/// Every timeline in the history of `timeline`, with the term it was reserved for.
fn chain(record: &Record, timeline: Timeline) -> Vec<(Timeline, Term)> {
    let mut chain = Vec::new();
    let mut at = Some(timeline);
    while let Some(line) = at.and_then(|number| record.line(number)) {
        chain.push((line.timeline, line.term));
        at = line.parent.filter(|parent| *parent < line.timeline);
    }
    chain
}

/// On which line the repository has voted, if that was up to there.
fn vote_of_repository(record: &Record, until: Lsn) -> Result<(Timeline, Lsn), DeedError> {
    let votes = record.election.as_ref().map(|election| &election.votes);
    let vote = votes.and_then(|votes| votes.get(&NodeName::repository()));
    let vote = vote.filter(|vote| vote.position.lsn == until).ok_or(DeedError::NoSuchVote(until))?;
    Ok((vote.timeline, until))
}

/// Where a node's PostgreSQL listens.
fn place<'a>(spec: &'a HerdSpec, node: &NodeName) -> Result<(&'a str, u16), DeedError> {
    let (_, node) = spec.node(node).ok_or_else(|| DeedError::UnknownNode(node.clone()))?;
    Ok((node.host.as_str(), node.port))
}

/// A refused or late action is the protocol at work; what PostgreSQL or the disk refused needs a look: `true`.
fn report(action: &Action, error: &DeedError) -> bool {
    match error {
        DeedError::Stale { .. } | DeedError::Agreed(agreed::AgreedError::Refused(_)) => {
            tracing::debug!(%error, ?action, "dropped");
            false
        }
        DeedError::Agreed(_) => {
            tracing::info!(%error, ?action, "the store did not take it; deciding anew");
            false
        }
        DeedError::Durable(_)
        | DeedError::Server(_)
        | DeedError::UnknownNode(_)
        | DeedError::NoSuchVote(_)
        | DeedError::NotToBeReplaced => {
            tracing::warn!(error = %on_one_line(error), ?action, "failed; deciding anew");
            true
        }
    }
}
