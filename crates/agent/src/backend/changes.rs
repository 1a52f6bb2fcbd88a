//! Switchover and forced failover: the wish goes into the store, and its progress is read off the record.

use std::fmt;
use std::time::Duration;

use pgherd_api::change::{
    BackupAsked, BackupRequest, Change, ChangeKind, ChangeState, ChangeStep, FailoverRequest, PromoteRequest,
    SwitchoverCancelRequest, SwitchoverRequest,
};
use pgherd_api::{Code, Error};
use pgherd_core::record::{Proposal, Record, Switchover};
use pgherd_core::types::{NodeName, Term};

use super::{AgentBackend, WITHIN, local_view, refused};
use crate::agreed;
use crate::http::backend::Answer;
use crate::pki::OperatorName;

/// Changes that are remembered for whoever asks again; the oldest go first.
const CHANGES_KEPT: usize = 64;
/// An agent that has been silent for longer cannot be sealed by a forced failover.
pub(super) const REACHED_WITHIN: Duration = Duration::from_secs(3);

impl AgentBackend {
    pub(super) async fn begin_switchover(
        &self,
        operator: &impl fmt::Display,
        request: SwitchoverRequest,
    ) -> Answer<Change> {
        if let Some(known) = self.known(&request.request_id) {
            return Ok(known);
        }
        let picture = self.picture().await?;
        let cluster = self.cluster(&picture, request.cluster.as_deref())?;
        if request.at.is_some() {
            return Err(Error::new(Code::RequestMalformed, "a switchover at a later time is not built yet")
                .hinting("leave out --at, and run it when it is time"));
        }
        let record = picture.record.as_ref().ok_or_else(|| Error::of(Code::NotReady))?;
        let to = request.to.as_deref().map(|name| self.target(&picture, name)).transpose()?;
        let reign = record
            .open_reign()
            .ok_or_else(|| Error::new(Code::ChangeInProgress, "an election is under way"))?;
        if !reign.gate_opened {
            return Err(Error::new(Code::ChangeInProgress, "the primary does not admit clients yet"));
        }
        if record.switchover.as_ref().is_some_and(|order| order.term == record.term) {
            return Err(Error::new(Code::ChangeInProgress, "a switchover was asked for already")
                .hinting("pgherd switchover --cancel takes it back, as long as it has not handed over"));
        }
        if to.as_ref() == Some(&reign.holder.node) {
            return Err(Error::new(
                Code::TargetNotElectable,
                format!("{} is the primary", reign.holder.node),
            ));
        }
        may_lead(&picture.spec, record, to.as_ref())?;
        let order = Switchover { term: record.term, to: to.clone() };
        agreed::propose(&self.store, &cluster, &Proposal::Switchover { order: Some(order) }, WITHIN)
            .await
            .map_err(|error| refused(&error))?;
        tracing::info!(%operator, to = to.as_ref().map(NodeName::as_str), "a switchover was asked for");
        let change = Change {
            request_id: request.request_id.clone(),
            cluster: cluster.to_string(),
            kind: ChangeKind::Switchover,
            state: ChangeState::Running,
            from: Some(reign.holder.node.to_string()),
            to: to.map(|node| node.to_string()),
            at: None,
            term: Some(record.term.0),
            steps: Vec::new(),
            unreached: Vec::new(),
            write_gap_ms: None,
            error: None,
        };
        self.keep(change.clone());
        Ok(change)
    }

    /// A proxy stands where clients reach it, so by itself it may ask for none. Who may is in the herd file: a role that has proved itself there,
    /// and that is named there for all that the console can do.
    pub(super) async fn promote_from_console(
        &self,
        proxy: &NodeName,
        request: PromoteRequest,
    ) -> Answer<Change> {
        let picture = self.picture().await?;
        let cluster = super::cluster_of(&picture.spec, request.cluster.as_deref())?;
        let role = &request.role;
        if !cluster.proxy.as_ref().is_some_and(|spec| spec.console_admins.contains(role)) {
            let why = format!("console_admins of cluster {} does not name the role {role:?}", cluster.name);
            let hint = "name it in [proxy] of the herd file; then: pgherd apply";
            return Err(Error::new(Code::CredentialsInsufficient, why).hinting(hint));
        }
        let by = format!("{role:?} in the console of proxy {proxy}");
        let PromoteRequest { request_id, cluster, to, .. } = request;
        self.begin_switchover(&by, SwitchoverRequest { request_id, cluster, to: Some(to), at: None }).await
    }

    pub(super) async fn ask_for_backup(
        &self,
        operator: &OperatorName,
        request: BackupRequest,
    ) -> Answer<BackupAsked> {
        let picture = self.picture().await?;
        let cluster = self.cluster(&picture, request.cluster.as_deref())?;
        let named = picture.spec.cluster(&cluster).is_some_and(|cluster| cluster.backup.is_some());
        if !named {
            return Err(Error::new(
                Code::RepositoryMissing,
                "the herd file names no repository for this cluster",
            )
            .hinting("add [backup] with its repository to the file, then pgherd apply"));
        }
        let asked = match agreed::propose(&self.store, &cluster, &Proposal::AskForBackup, WITHIN).await {
            Ok(agreed) => agreed.record,
            // Somebody has asked already, or nobody owns the archive yet.
            Err(agreed::AgreedError::Refused(_)) => {
                self.picture().await?.record.unwrap_or_else(Record::empty)
            }
            Err(error) => return Err(refused(&error)),
        };
        let archive = asked.archive.filter(|archive| archive.asked).ok_or_else(|| {
            Error::new(Code::NotReady, "no node streams WAL into the repository yet")
                .hinting("pgherd status tells when one does")
        })?;
        tracing::info!(%operator, "a base backup was asked for");
        Ok(BackupAsked { cluster: cluster.to_string(), number: archive.begun + 1 })
    }

    pub(super) async fn cancel_switchover(
        &self,
        operator: &OperatorName,
        request: SwitchoverCancelRequest,
    ) -> Answer<Change> {
        let picture = self.picture().await?;
        let cluster = self.cluster(&picture, request.cluster.as_deref())?;
        let cancelled =
            agreed::propose(&self.store, &cluster, &Proposal::Switchover { order: None }, WITHIN).await;
        cancelled.map_err(|error| match error {
            agreed::AgreedError::Refused(_) => {
                Error::new(Code::ChangeUnknown, "no switchover waits, or it has handed over already")
            }
            other => refused(&other),
        })?;
        tracing::info!(%operator, "the switchover was cancelled");
        let mut changes = self.changes();
        let running = changes.values_mut().find(|change| {
            change.kind == ChangeKind::Switchover
                && change.cluster == cluster.as_str()
                && !change.state.is_over()
        });
        let cancelled = match running {
            Some(change) => {
                change.state = ChangeState::Cancelled;
                change.clone()
            }
            // Asked for at another agent, which will find it gone.
            None => Change {
                request_id: String::new(),
                cluster: cluster.to_string(),
                kind: ChangeKind::Switchover,
                state: ChangeState::Cancelled,
                from: None,
                to: None,
                at: None,
                term: None,
                steps: Vec::new(),
                unreached: Vec::new(),
                write_gap_ms: None,
                error: None,
            },
        };
        Ok(cancelled)
    }

    pub(super) async fn force_failover(
        &self,
        operator: &OperatorName,
        request: FailoverRequest,
    ) -> Answer<Change> {
        if let Some(known) = self.known(&request.request_id) {
            return Ok(known);
        }
        let picture = self.picture().await?;
        let cluster = self.cluster(&picture, request.cluster.as_deref())?;
        let to = self.target(&picture, &request.to)?;
        let record = picture.record.as_ref().ok_or_else(|| Error::of(Code::NotReady))?;
        let silent = |node: &NodeName| {
            let heard = picture.peers.iter().find(|(name, _, _)| name == node).and_then(|(_, ago, _)| *ago);
            *node != picture.own.node && heard.is_none_or(|ago| ago > REACHED_WITHIN)
        };
        let voters = record.rules.iter().flat_map(|rules| rules.in_force()).flat_map(|rule| &rule.members);
        let mut unreached: Vec<String> =
            voters.filter(|member| silent(&member.node)).map(|member| member.node.to_string()).collect();
        unreached.sort();
        unreached.dedup();
        if !request.accept_data_loss {
            let at_risk = match unreached.as_slice() {
                [] => "every voter answers, so an election can be won without force".to_owned(),
                names => format!("acknowledged commits may be only on {}", names.join(", ")),
            };
            return Err(Error::of(Code::DataLossNotAccepted).because(at_risk));
        }
        if silent(&to) {
            return Err(Error::new(Code::TargetNotElectable, format!("{to} has not been heard lately")));
        }
        let force = Proposal::Force { term: record.term, to: to.clone(), by: self.identity.node.clone() };
        agreed::propose(&self.store, &cluster, &force, WITHIN).await.map_err(|error| refused(&error))?;
        tracing::warn!(%operator, %to, unreached = unreached.join(", "), "an operator forced a failover");
        let change = Change {
            request_id: request.request_id.clone(),
            cluster: cluster.to_string(),
            kind: ChangeKind::Failover,
            state: ChangeState::Running,
            from: record.holder().map(|holder| holder.node.to_string()),
            to: Some(to.to_string()),
            at: None,
            term: Some(record.term.0),
            steps: Vec::new(),
            unreached,
            write_gap_ms: None,
            error: None,
        };
        self.keep(change.clone());
        Ok(change)
    }

    /// How far a change has come, by the record.
    pub(super) async fn how_goes(&self, request_id: &str) -> Answer<Change> {
        let mut change = self.known(request_id).ok_or_else(|| Error::of(Code::ChangeUnknown))?;
        if change.state.is_over() {
            return Ok(change);
        }
        let cluster: NodeName = change.cluster.parse().map_err(|_| Error::of(Code::Internal))?;
        let (record, _) =
            agreed::record(&local_view(&self.store), &cluster).map_err(|error| refused(&error))?;
        let begun = Term(change.term.unwrap_or(0));
        change.steps = steps(&record, begun);
        if record.term > begun
            && let Some(reign) = record.open_reign()
            && reign.gate_opened
        {
            change.state = ChangeState::Done;
            change.term = Some(record.term.0);
            let wanted = change.to.replace(reign.holder.node.to_string());
            if wanted.as_ref().is_some_and(|wanted| *wanted != reign.holder.node.as_str()) {
                change.error = Some(Error::new(
                    Code::TargetNotElectable,
                    format!("{} leads instead: it held more when the votes were counted", reign.holder.node),
                ));
                change.state = ChangeState::Failed;
            }
        } else if change.kind == ChangeKind::Switchover && record.term == begun && record.switchover.is_none()
        {
            change.state = ChangeState::Cancelled;
        }
        if change.state.is_over() {
            // Kept with the term that it began in until now, so that asking again compares the same.
            self.keep(change.clone());
        }
        Ok(change)
    }

    pub(super) fn target(&self, picture: &crate::main_loop::Picture, name: &str) -> Answer<NodeName> {
        let nodes = picture.spec.clusters.iter().flat_map(|cluster| &cluster.nodes);
        let found = nodes.map(|node| &node.name).find(|node| node.as_str() == name);
        found.cloned().ok_or_else(|| Error::new(Code::NodeUnknown, format!("the herd has no node {name}")))
    }

    pub(super) fn known(&self, request_id: &str) -> Option<Change> {
        self.changes().get(request_id).cloned()
    }

    pub(super) fn keep(&self, change: Change) {
        let mut changes = self.changes();
        if changes.len() >= CHANGES_KEPT {
            let over = changes.iter().find(|(_, change)| change.state.is_over()).map(|(id, _)| id.clone());
            over.and_then(|id| changes.remove(&id));
        }
        changes.insert(change.request_id.clone(), change);
    }
}

fn may_lead(spec: &pgherd_core::spec::HerdSpec, record: &Record, to: Option<&NodeName>) -> Answer<()> {
    let Some(node) = to else { return Ok(()) };
    let refuse = |why: &str| Err(Error::new(Code::TargetNotElectable, format!("{node} {why}")));
    if !spec.node(node).is_some_and(|(_, node)| node.electable()) {
        return refuse("is never promoted: it is delayed, or has priority 0");
    }
    if let Some(why) = record.nodes.get(node).and_then(|entry| entry.barred.as_ref()) {
        return refuse(&format!("is barred: {why}"));
    }
    if !record.rules.as_ref().is_some_and(|rules| rules.current.contains_node(node)) {
        return refuse("does not count for commits now, so it may lack some");
    }
    Ok(())
}

/// What the record shows of the way from `begun` on.
fn steps(record: &Record, begun: Term) -> Vec<ChangeStep> {
    let events = record.events.iter().filter(|event| event.term >= begun);
    let mut steps: Vec<ChangeStep> =
        events.map(|event| ChangeStep { what: event.text.clone(), took_ms: None }).collect();
    let asked = steps.iter().rposition(|step| step.what.starts_with("an operator"));
    steps.drain(..asked.unwrap_or(0));
    steps
}
