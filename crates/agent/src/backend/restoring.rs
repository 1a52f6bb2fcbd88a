//! The restore of a whole cluster: the wish goes into the store, one step at a time.
//!
//! What is refused here is refused so that an operator hears why; what must not happen, the record and every agent refuse again.

use pgherd_api::change::{
    Change, ChangeKind, ChangeState, RestoreAnswer, RestoreMoment, RestoreRequest, RestoreStep,
};
use pgherd_api::{Code, Error};
use pgherd_core::ha::restore::{self, Unfit};
use pgherd_core::record::{Moment, Proposal, Record};
use pgherd_core::spec::ClusterSpec;
use pgherd_core::types::{NodeName, Timeline};

use super::changes::REACHED_WITHIN;
use super::{AgentBackend, WITHIN, refused};
use crate::agreed;
use crate::http::backend::Answer;
use crate::main_loop::Picture;
use crate::pki::OperatorName;

impl AgentBackend {
    pub(super) async fn restore_cluster(
        &self,
        operator: &OperatorName,
        request: RestoreRequest,
    ) -> Answer<RestoreAnswer> {
        let picture = self.picture().await?;
        let cluster = self.cluster(&picture, request.cluster.as_deref())?;
        if let Some(known) = self.known(&request.request_id) {
            let node = known.to.clone().unwrap_or_default();
            return Ok(RestoreAnswer { cluster: cluster.to_string(), node, change: Some(known) });
        }
        let record = picture.record.as_ref().ok_or_else(|| Error::of(Code::NotReady))?;
        let spec = picture.spec.cluster(&cluster).ok_or_else(|| Error::of(Code::ClusterUnknown))?;
        let (node, proposal) = match &request.step {
            RestoreStep::Hold { node, moment } => {
                let named = node.as_deref().map(|name| self.target(&picture, name)).transpose()?;
                let moment = read(moment)?;
                if let Some(under_way) = &record.restore {
                    if under_way.moment == moment && named.as_ref().is_none_or(|node| *node == under_way.node)
                    {
                        // Asked for twice.
                        let node = under_way.node.to_string();
                        return Ok(RestoreAnswer { cluster: cluster.to_string(), node, change: None });
                    }
                    return Err(another(under_way));
                }
                let node = may_begin(&picture, spec, record, named)?;
                (node.clone(), Proposal::Restore { order: Some((node, moment)) })
            }
            RestoreStep::Lead => {
                let (node, by) = (may_lead(&picture, record)?, self.identity.node.clone());
                (node, Proposal::LeadRestored { term: record.term, by })
            }
            RestoreStep::LetGo => (under_way(record)?.node.clone(), Proposal::Restore { order: None }),
        };
        agreed::propose(&self.store, &cluster, &proposal, WITHIN).await.map_err(|error| refused(&error))?;
        tracing::warn!(%operator, %node, step = ?request.step, "an operator restores the cluster");
        let change = matches!(request.step, RestoreStep::Lead).then(|| Change {
            request_id: request.request_id.clone(),
            cluster: cluster.to_string(),
            kind: ChangeKind::Restore,
            state: ChangeState::Running,
            from: record.holder().map(|holder| holder.node.to_string()),
            to: Some(node.to_string()),
            at: None,
            term: Some(record.term.0),
            steps: Vec::new(),
            unreached: unreached(&picture, record),
            write_gap_ms: None,
            error: None,
        });
        if let Some(change) = &change {
            self.keep(change.clone());
        }
        Ok(RestoreAnswer { cluster: cluster.to_string(), node: node.to_string(), change })
    }
}

fn read(moment: &RestoreMoment) -> Answer<Moment> {
    let end = moment.end_lsn.parse().map_err(|_| {
        Error::new(Code::RequestMalformed, format!("\"{}\" is no position in WAL", moment.end_lsn))
    })?;
    let (timeline, along) = (Timeline(moment.timeline), Timeline(moment.along));
    Ok(Moment { backup: moment.backup.clone(), timeline, end, along })
}

fn another(under_way: &pgherd_core::record::Restore) -> Error {
    let what = format!("{} is taken back to {} already", under_way.node, under_way.moment);
    Error::new(Code::ChangeInProgress, what).hinting("pgherd restore --cluster NAME --let-go gives that up")
}

fn under_way(record: &Record) -> Answer<&pgherd_core::record::Restore> {
    record.restore.as_ref().ok_or_else(|| {
        Error::new(Code::ChangeUnknown, "no node is taken back to an earlier moment")
            .hinting("pgherd restore --cluster NAME with a target begins it")
    })
}

/// Whose copy: the one that is named, or the first standby of the least priority that can be done without.
fn may_begin(
    picture: &Picture,
    spec: &ClusterSpec,
    record: &Record,
    named: Option<NodeName>,
) -> Answer<NodeName> {
    if spec.backup.is_none() {
        return Err(Error::new(
            Code::RepositoryMissing,
            "the herd file names no repository for this cluster",
        )
        .hinting("a backup from elsewhere is restored into a directory: pgherd restore --to DIR"));
    }
    if record.archive.as_ref().is_none_or(|archive| archive.repository.is_none()) {
        return Err(Error::new(Code::NotReady, "no node has seen the repository yet"));
    }
    if record.open_reign().is_none_or(|reign| !reign.gate_opened) {
        return Err(Error::new(Code::ChangeInProgress, "an election is under way, or nobody is let in yet"));
    }
    let fit = |node: &NodeName| {
        restore::is_fit(spec, record, node).map_err(|unfit| of_unfit(node, unfit)).and_then(|()| {
            match is_silent(picture, node) {
                true => {
                    Err(Error::new(Code::TargetNotElectable, format!("{node} has not been heard lately")))
                }
                false => Ok(()),
            }
        })
    };
    if let Some(node) = named {
        return fit(&node).map(|()| node);
    }
    let mut nodes: Vec<_> = spec.nodes.iter().collect();
    nodes.sort_by_key(|node| node.priority);
    let mut why = None;
    for node in nodes {
        match fit(&node.name) {
            Ok(()) => return Ok(node.name.clone()),
            // Why the primary is not it says nothing.
            Err(error) if record.holder().is_none_or(|holder| holder.node != node.name) => {
                why.get_or_insert(error);
            }
            Err(_) => {}
        }
    }
    Err(why.unwrap_or_else(|| {
        Error::new(
            Code::RedundancyTooLow,
            "the cluster has one node, which goes on serving until another one leads",
        )
        .hinting("add a node; or stop the herd, and restore into a directory: pgherd restore --to DIR")
    }))
}

fn of_unfit(node: &NodeName, unfit: Unfit) -> Error {
    let electable = |why: String| Error::new(Code::TargetNotElectable, why);
    match unfit {
        Unfit::NoCopy => electable(format!("{node} has no PostgreSQL")),
        Unfit::Primary => electable(format!("{node} is the primary, which goes on until another one leads"))
            .hinting("name a standby with --to, or none"),
        Unfit::NotElectable => electable(format!("{node} is never promoted, or barred")),
        Unfit::TooFewLeft { left, needed } => Error::new(
            Code::RedundancyTooLow,
            format!("without {node} commits would wait: {left} other standbys are there, and {needed} must confirm each"),
        )
        .hinting("add a node, or set durability in the herd file to what is left for that time: pgherd apply"),
    }
}

fn may_lead(picture: &Picture, record: &Record) -> Answer<NodeName> {
    let restore = under_way(record)?;
    let node = restore.node.clone();
    if restore.held.is_none() {
        return Err(Error::new(Code::NotReady, format!("{node} is not there yet"))
            .hinting("pgherd explain says how far it is"));
    }
    if record.election.is_some() {
        return Err(Error::new(Code::ChangeInProgress, "an election is under way"));
    }
    if is_silent(picture, &node) {
        return Err(Error::new(Code::TargetNotElectable, format!("{node} has not been heard lately")));
    }
    Ok(node)
}

fn is_silent(picture: &Picture, node: &NodeName) -> bool {
    let heard = picture.peers.iter().find(|(name, _, _)| name == node).and_then(|(_, ago, _)| *ago);
    *node != picture.own.node && heard.is_none_or(|ago| ago > REACHED_WITHIN)
}

/// Who may go on without hearing of it, and so is not sealed.
fn unreached(picture: &Picture, record: &Record) -> Vec<String> {
    let voters = record.rules.iter().flat_map(|rules| rules.in_force()).flat_map(|rule| &rule.members);
    let silent = voters.filter(|member| is_silent(picture, &member.node));
    let mut unreached: Vec<String> = silent.map(|member| member.node.to_string()).collect();
    unreached.sort();
    unreached.dedup();
    unreached
}
