//! Keeps the members of the store in order: voters as the herd file has them, the Raft leader where least is lost
//! with it.
//!
//! Leaves out: who is a member at all (joining and removal), and how members are changed (the store). Hazard: a
//! leader that is moved to a node that has just died leaves the store without one for seconds.

use std::time::Duration;

use pgherd_core::record::Record;
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::NodeName;
use pgherd_dcs::{Arrangement, MemberHealth, RaftStore, Store};

use crate::agreed::{self, StoredSpec};

const TEND_EVERY: Duration = Duration::from_secs(1);
const TEND_WITHIN: Duration = Duration::from_secs(5);
/// A member that has missed so many heartbeats is not given the lead.
const HEARTBEATS_MISSED: u32 = 5;

/// Runs on every member; only the Raft leader finds something to do.
pub(crate) async fn tend(
    raft: RaftStore,
    store: Store,
    cluster: NodeName,
    me: NodeName,
    order: Vec<NodeName>,
) {
    loop {
        tokio::time::sleep(TEND_EVERY).await;
        if let Arrangement::Changed { voters } = raft.arrange(&order, TEND_WITHIN).await {
            let names: Vec<&str> = voters.iter().map(NodeName::as_str).collect();
            tracing::info!(voters = names.join(", "), "the store's voters have changed");
        }
        let health = raft.health().borrow().clone();
        if health.leader.as_ref() != Some(&me) {
            continue;
        }
        let snapshot = store.watch().borrow().clone();
        let Ok((record, _)) = agreed::record(&snapshot, &cluster) else { continue };
        let Ok(Some((stored, _))) = agreed::value::<StoredSpec>(&snapshot, agreed::SPEC) else { continue };
        let Some(to) = better_leader(&stored.spec, &record, &me, &health.members) else { continue };
        match raft.transfer_leadership(&to, TEND_WITHIN).await {
            Ok(()) => tracing::info!(%to, "the Raft leader has moved to where less is lost with it"),
            Err(error) => tracing::info!(%to, %error, "the Raft leader stays where it is for now"),
        }
    }
}

/// Who should lead the store instead of `me`, which does; nobody, if there is none better or the term is young.
///
/// Losing the Raft leader costs an election of the store. Lost with the primary it delays the failover; lost with
/// the last voter it leaves the primary without either proof of its term for about as long as its lease lasts. So a
/// witness is best, and the primary's node is worst.
fn better_leader(
    spec: &HerdSpec,
    record: &Record,
    me: &NodeName,
    members: &[MemberHealth],
) -> Option<NodeName> {
    let reign = record.open_reign().filter(|reign| reign.gate_opened)?;
    let loss = |node: &NodeName| u32::from(spec.node(node).is_some()) + u32::from(*node == reign.holder.node);
    let patience = spec.times.raft_heartbeat * HEARTBEATS_MISSED;
    let lives = |member: &&MemberHealth| {
        let heard = member.last_contact.is_some_and(|at| at.elapsed() < patience);
        member.voter && member.trouble.is_none() && heard
    };
    let others = members.iter().filter(|member| member.name != *me).filter(lives);
    let best = others.min_by_key(|member| loss(&member.name))?;
    (loss(&best.name) < loss(me)).then(|| best.name.clone())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use pgherd_core::record::{Reign, Rule, Rules};
    use pgherd_core::types::{Lsn, Term, Timeline};

    use super::*;
    use crate::files::herd;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// Data nodes a and b, and a witness w.
    fn spec() -> HerdSpec {
        let text = r#"
            name = "shop"
            [postgres]
            version = 15
            [[witness]]
            name = "w"
            host = "192.0.2.3"
            [[cluster]]
            name = "main"
            [[cluster.node]]
            name = "a"
            host = "192.0.2.1"
            [[cluster.node]]
            name = "b"
            host = "192.0.2.2"
        "#;
        herd::read("herd.toml", text).unwrap().spec
    }

    fn led_by(primary: &str) -> Record {
        let holder = format!("{primary}_1").parse().unwrap();
        let current = Rule { needed: 1, members: ["a_1".parse().unwrap(), "b_1".parse().unwrap()].into() };
        Record {
            term: Term(3),
            reign: Some(Reign {
                holder,
                timeline: Timeline(2),
                promoted: true,
                elected_at: Lsn::ZERO,
                promoted_at: Lsn(1),
                gate_opened: true,
                predecessor_gone: true,
            }),
            rules: Some(Rules { current, next: None, superseded: Vec::new(), change: 0 }),
            ..Record::empty()
        }
    }

    fn member(node: &str) -> MemberHealth {
        MemberHealth {
            raft_id: 1,
            name: name(node),
            address: "192.0.2.9:8009".to_owned(),
            host: "192.0.2.9".to_owned(),
            voter: true,
            last_contact: Some(Instant::now()),
            trouble: None,
        }
    }

    fn from(me: &str, record: &Record, members: &[MemberHealth]) -> Option<String> {
        better_leader(&spec(), record, &name(me), members).map(|node| node.to_string())
    }

    #[test]
    fn a_witness_leads_the_store_and_rather_a_standby_than_the_primary() {
        let all = ["a", "b", "w"].map(member);
        assert_eq!(from("a", &led_by("a"), &all).as_deref(), Some("w"));
        assert_eq!(from("b", &led_by("a"), &all).as_deref(), Some("w"));
        assert_eq!(from("w", &led_by("a"), &all), None);
        assert_eq!(from("a", &led_by("a"), &all[..2]).as_deref(), Some("b"));
        assert_eq!(from("b", &led_by("a"), &all[..2]), None, "the primary's node is no better");
    }

    #[test]
    fn a_member_that_may_be_dead_or_cannot_lead_is_not_given_the_lead() {
        let record = led_by("a");
        type Fault = fn(&mut MemberHealth);
        let faults: [Fault; 4] = [
            |member| member.trouble = Some("no answer".to_owned()),
            |member| member.last_contact = None,
            |member| member.last_contact = Instant::now().checked_sub(Duration::from_secs(2)),
            |member| member.voter = false,
        ];
        for fault in faults {
            let mut all = ["a", "b", "w"].map(member);
            fault(&mut all[2]);
            assert_eq!(from("a", &record, &all).as_deref(), Some("b"), "{:?}", all[2]);
            fault(&mut all[1]);
            assert_eq!(from("a", &record, &all), None, "{all:?}");
        }
        // A term that has just begun needs the store as it is.
        let mut young = led_by("a");
        young.reign.as_mut().unwrap().gate_opened = false;
        assert_eq!(from("a", &young, &["a", "b", "w"].map(member)), None);
    }
}
