//! The other end of a fence's message: a node that was stopped for its agent gives its term back.

use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::peer::Fenced;
use pgherd_core::record::{Cause, Proposal, Record, Refusal};
use pgherd_core::types::{Malformed, Member, NodeName, Term};
use pgherd_dcs::{Keys, Store};
use rustls::pki_types::CertificateDer;

use crate::agreed::{self, AgreedError};
use crate::pki::{FencedRefused, verify_fenced};

/// Somebody else may open the election meanwhile; then the message still says that the holder is gone.
const ATTEMPTS: u32 = 5;

#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error(transparent)]
    Refused(#[from] FencedRefused),
    #[error(transparent)]
    Cluster(#[from] Malformed),
    #[error("{member} gives term {term} back, and term {now} is held by {holder}")]
    TermOver { member: Member, term: Term, now: Term, holder: String },
    #[error(transparent)]
    Agreed(#[from] AgreedError),
}

/// Believes a message that is signed by the node that it speaks for, and tells the store.
pub async fn receive(
    message: &Fenced,
    herd_id: &str,
    authorities: &[CertificateDer<'_>],
    me: &NodeName,
    store: &Store,
    within: Duration,
) -> Result<(), ReceiveError> {
    let (member, term) = verify_fenced(message, herd_id, authorities, Timestamp::now())?;
    let cluster: NodeName = message.cluster.parse()?;
    let key = agreed::cluster_key(&cluster);
    let mut outcome = Err(AgreedError::Refused(Refusal::Stale));
    for _ in 0..ATTEMPTS {
        // Not from the local view, which may not have heard of the term yet.
        let snapshot = store.read(&Keys::one(key.clone()), within).await.map_err(AgreedError::from)?;
        let (record, _) = agreed::record(&snapshot, &cluster)?;
        let Some(proposal) = proposal(&record, &member, term, me)? else { return Ok(()) };
        outcome = agreed::propose(store, &cluster, &proposal, within).await;
        match outcome {
            Err(AgreedError::Refused(Refusal::Stale)) => {}
            Ok(_) => {
                tracing::info!(%member, term = term.0, "the fence stopped the primary, whose term is given back");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(outcome.err().unwrap_or(AgreedError::Refused(Refusal::Stale)).into())
}

/// What the message means for the record; `None` if the record says so already.
fn proposal(
    record: &Record,
    member: &Member,
    term: Term,
    me: &NodeName,
) -> Result<Option<Proposal>, ReceiveError> {
    if record.term != term || record.holder() != Some(member) {
        let holder = record.holder().map_or("nobody".to_owned(), Member::to_string);
        return Err(ReceiveError::TermOver { member: member.clone(), term, now: record.term, holder });
    }
    Ok(match &record.election {
        None => Some(Proposal::Open {
            term,
            cause: Cause::Fenced,
            by: me.clone(),
            released: true,
            poisoned: false,
        }),
        Some(election) if election.released => None,
        Some(election) => Some(Proposal::Gone { term: election.term, holder: member.clone() }),
    })
}

#[cfg(test)]
mod tests {
    use pgherd_core::record::{Reign, Rule, Rules};
    use pgherd_core::types::{Lsn, SystemId, Timeline};
    use pgherd_dcs::Memory;

    use super::*;
    use crate::agreed::to_json;
    use crate::pki::{Authority, CA_VALIDITY, Credentials, NODE_VALIDITY, NewKey, NodeSubject, sign_fenced};

    const WITHIN: Duration = Duration::from_secs(5);

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    /// Term 7 is held by a_3, with b_2 as voter.
    fn record() -> Record {
        let holder: Member = "a_3".parse().unwrap();
        Record {
            system: Some(SystemId(7)),
            term: Term(7),
            reign: Some(Reign {
                holder: holder.clone(),
                timeline: Timeline(4),
                promoted: true,
                elected_at: Lsn::ZERO,
                promoted_at: Lsn(1),
                gate_opened: true,
                predecessor_gone: true,
            }),
            rules: Some(Rules {
                current: Rule { members: [holder, "b_2".parse().unwrap()].into(), needed: 1 },
                next: None,
                superseded: Vec::new(),
                change: 0,
            }),
            ..Record::empty()
        }
    }

    struct Scene {
        store: Store,
        authority: Authority,
        credentials: Credentials,
    }

    impl Scene {
        async fn with(record: &Record) -> Scene {
            let now = Timestamp::now();
            let (authority, _) = Authority::create(&name("shop"), "4f1c", now, CA_VALIDITY).unwrap();
            let key = NewKey::generate().unwrap();
            let node = name("a");
            let subject = NodeSubject { name: &node, hosts: &[], others: &[] };
            let pem = authority.issue_node(&key.request().unwrap(), &subject, now, NODE_VALIDITY).unwrap();
            let credentials =
                Credentials::from_pem(authority.certificate_pem(), &pem, &key.expose_pem()).unwrap();
            let store = Store::from(Memory::new().handle(&name("b")));
            let key = agreed::cluster_key(&name("main"));
            let put = pgherd_dcs::Transaction::new().put(key.clone(), to_json(&key, record).unwrap());
            store.commit(put, WITHIN).await.unwrap();
            Scene { store, authority, credentials }
        }

        async fn receive(&self, member: &str, term: u64) -> Result<(), ReceiveError> {
            let member = member.parse().unwrap();
            let message = sign_fenced(&self.credentials, "4f1c", &name("main"), &member, Term(term)).unwrap();
            let authorities = [self.authority.certificate().clone()];
            receive(&message, "4f1c", &authorities, &name("b"), &self.store, WITHIN).await
        }

        fn record(&self) -> Record {
            agreed::record(&self.store.watch().borrow(), &name("main")).unwrap().0
        }
    }

    #[tokio::test]
    async fn it_opens_an_election_in_which_the_holder_counts_as_gone() {
        let scene = Scene::with(&record()).await;
        scene.receive("a_3", 7).await.unwrap();
        let election = scene.record().election.unwrap();
        assert_eq!((election.term, election.cause, election.released), (Term(8), Cause::Fenced, true));
        // The message comes to several agents, and from each of their answers may be lost.
        scene.receive("a_3", 7).await.unwrap();
    }

    #[tokio::test]
    async fn in_an_election_that_is_open_it_says_that_the_holder_is_gone() {
        let silent = Proposal::Open {
            term: Term(7),
            cause: Cause::AgentSilent,
            by: name("b"),
            released: false,
            poisoned: false,
        };
        let scene = Scene::with(&record().apply(&silent).unwrap()).await;
        scene.receive("a_3", 7).await.unwrap();
        let election = scene.record().election.unwrap();
        assert_eq!((election.cause, election.released), (Cause::AgentSilent, true));
    }

    #[tokio::test]
    async fn it_says_nothing_about_another_term_or_another_life_of_the_node() {
        let scene = Scene::with(&record()).await;
        for (member, term) in [("a_3", 6), ("a_3", 8), ("a_2", 7)] {
            let refused = scene.receive(member, term).await;
            assert!(matches!(refused, Err(ReceiveError::TermOver { .. })), "{member} {term}: {refused:?}");
        }
        let refused = scene.receive("b_2", 7).await;
        assert!(matches!(refused, Err(ReceiveError::Refused(FencedRefused::OtherNode { .. }))));
        assert_eq!(scene.record(), record());
    }
}
