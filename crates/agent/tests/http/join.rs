//! A node joins: with nothing but a token, to a certificate that works.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use pgherd_agent::pki::{Credentials, JoinToken, NewKey, NodeSubject, TokenRefused, Use, key_of_request};
use pgherd_api::client::ClientTls;
use pgherd_api::join::{JoinAnswer, JoinRequest};
use pgherd_api::{CallError, Client, Code, Error};
use pgherd_core::types::NodeName;

use crate::herd::{Herd, Server, YEAR};

#[tokio::test]
async fn a_token_makes_a_stranger_a_member_once() {
    let herd = Arc::new(Herd::new());
    let server = Server::start(&herd).await;
    let in_an_hour = Timestamp::from_second(Timestamp::now().as_second() + 3600).unwrap();
    let issued = JoinToken::issue(herd.authority.pin(), "4f1c", None, in_an_hour).unwrap();

    // The backend, as the agent has it: look the record up, check, mark as used, answer.
    let record = Arc::new(Mutex::new(issued.record));
    let authority = Arc::clone(&herd);
    *server.backend.join.lock().unwrap() = Some(Box::new(move |request: JoinRequest| {
        let token = JoinToken::parse(&request.token)
            .map_err(|error| Error::new(Code::TokenInvalid, error.to_string()))?;
        let node: NodeName = request.node.parse().unwrap();
        let key = key_of_request(&request.csr).unwrap();
        let mut record = record.lock().unwrap();
        match record.check(&token, &node, &key, Timestamp::now()) {
            Ok(Use::First(used)) => *record = used,
            Ok(Use::Again) => {}
            Err(TokenRefused::Used) => return Err(Error::of(Code::TokenUsed)),
            Err(other) => return Err(Error::new(Code::TokenInvalid, other.to_string())),
        }
        let subject = NodeSubject { name: &node, hosts: &request.hosts, others: &[] };
        let authority = &authority.authority;
        let certificate = authority.issue_node(&request.csr, &subject, Timestamp::now(), YEAR).unwrap();
        Ok(JoinAnswer {
            certificate,
            ca: authority.certificate_pem().to_owned(),
            herd_id: token.herd_id,
            herd: "shop".to_owned(),
            herd_generation: 1,
            raft_id: 17,
            members: Vec::new(),
            spec_generation: 7,
            secrets: BTreeMap::from([("replication".to_owned(), "canary".to_owned())]),
        })
    }));

    // The joining host: an address and the token's text.
    let token = JoinToken::parse(&issued.text).unwrap();
    let client = Client::tls(server.address.to_string(), None, Arc::new(ClientTls::pinned(token.pin)));
    let key = NewKey::generate().unwrap();
    let request = JoinRequest {
        token: issued.text.clone(),
        node: "c".to_owned(),
        csr: key.request().unwrap(),
        hosts: vec!["127.0.0.1".to_owned()],
        api_address: "127.0.0.1:8009".to_owned(),
        host: "h3".to_owned(),
        store_disk: "d".to_owned(),
        version: "0.1.0".to_owned(),
    };
    let answer = client.join(&request).await.unwrap();
    assert_eq!((answer.raft_id, answer.herd_id.as_str()), (17, "4f1c"));
    assert!(!format!("{answer:?}{request:?}").contains("canary"), "a secret in a debug text");
    assert!(!format!("{request:?}").contains(&issued.text), "a token in a debug text");

    let directory = tempfile::tempdir().unwrap();
    Credentials::save(directory.path(), &answer.ca, &answer.certificate, &key).unwrap();
    let member = server.client(&Credentials::load(directory.path()).unwrap());
    member.peer_report("{}".into()).await.unwrap();
    assert_eq!(server.backend.last_call().unwrap(), "c: report");

    client.join(&request).await.expect("the same node may ask again for an answer that was lost");
    let thief = JoinRequest { csr: NewKey::generate().unwrap().request().unwrap(), ..request };
    let refused = client.join(&thief).await.unwrap_err();
    let CallError::Answered { http_status: 403, error, .. } = &refused else { panic!("{refused:?}") };
    assert!(error.is(Code::TokenUsed));
}
