//! `pgherd check`: the questions that a monitoring system asks, each answered in one line.

use pgherd_api::report::{CheckItem, CheckReport, CheckState};
use pgherd_core::record::Record;
use pgherd_core::types::NodeName;
use pgherd_dcs::Health;

use super::{Heard, heard, lag, status};
use crate::gossip::Is;
use crate::main_loop::Picture;

/// A standby behind by more than this is worth a look.
const LAG_WARNING_BYTES: u64 = 64 << 20;

pub(crate) fn check(picture: &Picture, store: &Health) -> CheckReport {
    let mut checks = vec![check_store(picture, store)];
    let shown = status(picture, store);
    for cluster in &shown.clusters {
        let name = Some(cluster.name.clone());
        let item = |check: &str, state, message: String, hint: Option<&str>| CheckItem {
            check: check.to_owned(),
            cluster: name.clone(),
            node: None,
            state,
            message,
            measure: None,
            hint: hint.map(str::to_owned),
        };
        let explain = Some("pgherd explain says what each node waits for");
        checks.push(match &cluster.primary {
            Some(primary) => item("primary", CheckState::Ok, format!("{primary} is primary"), None),
            None => item("primary", CheckState::Critical, "there is no primary".to_owned(), explain),
        });
        checks.push(match cluster.gate {
            pgherd_api::status::Gate::Open => item("gate", CheckState::Ok, "clients are let in".to_owned(), None),
            _ => item("gate", CheckState::Critical, "no client is let in".to_owned(), explain),
        });
        let live = live_voters(picture, &cluster.durability.voters);
        let needed = cluster.durability.needed as usize;
        checks.push(if cluster.durability.degraded {
            item("durability", CheckState::Warning, "degraded: commits are on the primary alone".to_owned(), explain)
        } else if live < needed {
            let message = format!("commits wait: {live} of {needed} needed voters stream");
            item("durability", CheckState::Critical, message, explain)
        } else if live == needed && needed > 0 {
            let message = format!("{live} voters stream and {needed} are needed: the next loss makes commits wait");
            item("durability", CheckState::Warning, message, explain)
        } else {
            item("durability", CheckState::Ok, format!("{live} voters stream, {needed} are needed"), None)
        });
    }
    for (node, _, _) in picture.spec.agents() {
        checks.extend(check_node(picture, node));
    }
    CheckReport { checks }
}

fn live_voters(picture: &Picture, voters: &[String]) -> usize {
    let live = |name: &&String| {
        picture.spec.agents().any(|(node, _, _)| {
            let fresh = heard(picture, node).filter(Heard::is_fresh);
            node.as_str() == name.as_str() && fresh.is_some_and(|heard| heard.gossip.running == Is::Standby)
        })
    };
    voters.iter().filter(live).count()
}

fn check_store(picture: &Picture, store: &Health) -> CheckItem {
    let voters = store.members.iter().filter(|member| member.voter).count();
    let answering = store
        .members
        .iter()
        .filter(|member| member.voter && heard(picture, &member.name).is_some_and(|heard| heard.is_fresh()))
        .count();
    let (state, message) = match &store.leader {
        None => (CheckState::Critical, "the store has no leader".to_owned()),
        Some(_) if answering < voters => {
            (CheckState::Warning, format!("{answering} of {voters} voters of the store answer"))
        }
        Some(leader) => (CheckState::Ok, format!("{voters} voters, led by {leader}")),
    };
    let hint = (state != CheckState::Ok).then(|| "pgherd status shows the store's members".to_owned());
    CheckItem { check: "store".to_owned(), cluster: None, node: None, state, message, measure: None, hint }
}

fn check_node(picture: &Picture, node: &NodeName) -> Vec<CheckItem> {
    let cluster = picture.spec.node(node).map(|(cluster, _)| cluster.name.to_string());
    let item = |check: &str, state, message: String| CheckItem {
        check: check.to_owned(),
        cluster: cluster.clone(),
        node: Some(node.to_string()),
        state,
        message,
        measure: None,
        hint: None,
    };
    let Some(heard) = heard(picture, node) else {
        return vec![item("agent", CheckState::Warning, format!("{node} has not been heard yet"))];
    };
    if !heard.is_fresh() {
        let message = format!("{node} has not been heard for {} s", heard.ago.as_secs());
        return vec![item("agent", CheckState::Warning, message)];
    }
    let mut items = vec![item("agent", CheckState::Ok, format!("{node} answers"))];
    let record = picture.record.as_ref();
    let barred = record.and_then(|record| record.nodes.get(node)).and_then(|entry| entry.barred.as_ref());
    if let Some(why) = barred {
        items.push(item("barred", CheckState::Critical, format!("{node} is barred: {why}")));
    }
    if heard.gossip.running == Is::Standby {
        let holder = record.and_then(Record::holder).map(|holder| &holder.node);
        let primary = holder.and_then(|holder| super::heard(picture, holder)).and_then(|heard| heard.gossip.flush_lsn);
        items.push(match lag(primary, heard.gossip.flush_lsn) {
            None => item("lag", CheckState::Unknown, format!("the lag of {node} is not known")),
            Some(bytes) => {
                let state = if bytes > LAG_WARNING_BYTES { CheckState::Warning } else { CheckState::Ok };
                let mut lag = item("lag", state, format!("{node} is {bytes} bytes behind"));
                lag.measure = Some(format!("lag_bytes={bytes}"));
                lag
            }
        });
    }
    if heard.gossip.show.pending_restart == Some(true) {
        items.push(item("restart", CheckState::Warning, format!("a changed parameter waits for a restart of {node}")));
    }
    items
}
