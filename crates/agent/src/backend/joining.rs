//! Certificates: for joining nodes, for nodes whose own is about to expire, for operators and for proxies.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pgherd_api::join::{
    JoinAnswer, JoinMember, JoinRequest, OperatorAnswer, OperatorRequest, ProxyAnswer, ProxyRenewRequest,
    ProxyRequest, RenewAnswer, RenewRequest, Token, TokenRequest,
};
use pgherd_api::peer::Fenced;
use pgherd_api::{Code, Error};
use pgherd_core::types::NodeName;
use pgherd_dcs::{CommitError, Keys, Transaction};

use super::{AgentBackend, WITHIN, local_view, refused, secrets};
use crate::agreed::{self, AgreedError, StoredSpec};
use crate::fence::{self, ReceiveError};
use crate::http::backend::Answer;
use crate::peers;
use crate::pki::{
    Authority, IssueError, JoinToken, NODE_VALIDITY, NodeSubject, OperatorName, PROXY_VALIDITY, ProxySubject,
    TokenRecord, TokenRefused, Use, key_of_request,
};

/// Longest life of a join token: long enough to set up a rack, short enough that a forgotten one dies.
const TOKEN_VALID_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Adding a member to the store takes a commit and a survey.
const ADMIT_WITHIN: Duration = Duration::from_secs(15);

impl AgentBackend {
    pub(super) async fn create_token(&self, operator: &OperatorName, request: TokenRequest) -> Answer<Token> {
        let (spec, _) = self.stored_spec()?;
        let node = match &request.node {
            None => None,
            Some(name) => Some(in_herd(&spec, name)?),
        };
        let valid_for = Duration::from_secs(request.valid_for_s).min(TOKEN_VALID_MAX);
        let expires = Timestamp::now() + SignedDuration::try_from(valid_for).unwrap_or_default();
        let authority = self.authority()?;
        let issued = JoinToken::issue(authority.pin(), &self.identity.herd_id, node, expires)
            .map_err(|_| Error::new(Code::Internal, "the system gives no random numbers"))?;
        let key = agreed::token_key(&issued.record.id);
        let value = agreed::to_json(&key, &issued.record).map_err(|error| refused(&error))?;
        let stored = Transaction::new().require_absent(key.clone()).put(key, value);
        self.store.commit(stored, WITHIN).await.map_err(|error| refused(&error.into()))?;
        tracing::info!(%operator, node = request.node, %expires, "made a join token");
        Ok(Token { token: issued.text, expires: expires.to_string() })
    }

    /// Admits a node. Every step can be repeated with the same token and key, so that an answer that was lost
    /// costs nothing.
    pub(super) async fn admit(&self, request: JoinRequest) -> Answer<JoinAnswer> {
        let token =
            JoinToken::parse(&request.token).map_err(|error| Error::of(Code::TokenInvalid).because(error))?;
        if token.herd_id != self.identity.herd_id {
            return Err(Error::of(Code::HerdMismatch));
        }
        let (spec, generation) = self.stored_spec()?;
        let node = in_herd(&spec, &request.node)?;
        let key = key_of_request(&request.csr).map_err(|error| not_granted(&error))?;
        self.use_token(&token, &node, &key).await?;

        let disk = serde_json::from_value(serde_json::Value::String(request.store_disk.clone()))
            .map_err(|error| Error::of(Code::RequestMalformed).because(error))?;
        let wish = pgherd_dcs::JoinRequest {
            herd: self.identity.herd_id.clone(),
            name: node.clone(),
            address: request.api_address.clone(),
            host: request.host.clone(),
            disk,
        };
        let joined = self.raft.add_member(wish, ADMIT_WITHIN).await;
        let joined = joined.map_err(|error| refused(&AgreedError::from(error)))?;
        let authority = self.authority()?;
        let certificate = issue_node(&authority, &request.csr, &node, &request.hosts, &spec)?;
        tracing::info!(%node, raft_id = joined.raft_id, address = request.api_address, "a node has joined");
        let members = self.raft.health().borrow().members.clone();
        let members = members.into_iter().map(|member| JoinMember {
            name: member.name.to_string(),
            raft_id: Some(member.raft_id),
            api_address: member.address,
            voter: member.voter,
        });
        Ok(JoinAnswer {
            certificate,
            ca: authority.certificate_pem().to_owned(),
            herd_id: self.identity.herd_id.clone(),
            herd: self.identity.herd.to_string(),
            herd_generation: joined.generation,
            raft_id: joined.raft_id,
            members: members.collect(),
            spec_generation: generation,
            // What it needs beyond its certificate it reads from the store, of which it is a member now.
            secrets: Default::default(),
        })
    }

    async fn use_token(&self, token: &JoinToken, node: &NodeName, key_spki: &[u8]) -> Answer<()> {
        let key = agreed::token_key(&token.id);
        let seen = self.store.read(&Keys::one(key.clone()), WITHIN).await;
        let seen = seen.map_err(|error| refused(&error.into()))?;
        let record = agreed::value::<TokenRecord>(&seen, &key).map_err(|error| refused(&error))?;
        let Some((record, revision)) = record else { return Err(Error::of(Code::TokenInvalid)) };
        match record.check(token, node, key_spki, Timestamp::now()) {
            Ok(Use::Again) => Ok(()),
            Ok(Use::First(used)) => {
                let value = agreed::to_json(&key, &used).map_err(|error| refused(&error))?;
                let write = Transaction::new().require(key.clone(), revision).put(key, value);
                match self.store.commit(write, WITHIN).await {
                    Ok(_) => Ok(()),
                    Err(CommitError::Conflict { .. }) => Err(Error::of(Code::TokenUsed)),
                    Err(error) => Err(refused(&error.into())),
                }
            }
            Err(error) => {
                let code = match error {
                    TokenRefused::Unknown | TokenRefused::OtherNode => Code::TokenInvalid,
                    TokenRefused::Expired => Code::TokenExpired,
                    TokenRefused::Used => Code::TokenUsed,
                };
                Err(Error::of(code).because(error))
            }
        }
    }

    pub(super) async fn renew_certificate(
        &self,
        node: &NodeName,
        request: RenewRequest,
    ) -> Answer<RenewAnswer> {
        let (spec, _) = self.stored_spec()?;
        let authority = self.authority()?;
        let certificate = issue_node(&authority, &request.csr, node, &request.hosts, &spec)?;
        Ok(RenewAnswer { certificate, ca: authority.certificate_pem().to_owned() })
    }

    pub(super) async fn add_operator(
        &self,
        operator: &OperatorName,
        request: OperatorRequest,
    ) -> Answer<OperatorAnswer> {
        let name: OperatorName = request.name.parse().map_err(|error: pgherd_core::types::Malformed| {
            Error::of(Code::RequestMalformed).because(error)
        })?;
        let (spec, _) = self.stored_spec()?;
        let authority = self.authority()?;
        let now = Timestamp::now();
        let valid_for = Duration::from_secs(request.valid_for_s);
        let certificate = authority
            .issue_operator(&request.csr, &name, now, valid_for)
            .map_err(|error| not_granted(&error))?;
        let expires = expiry(&authority, now, valid_for);
        tracing::info!(by = %operator, %name, %expires, "made an operator's certificate");
        Ok(OperatorAnswer {
            certificate,
            ca: authority.certificate_pem().to_owned(),
            herd: self.identity.herd.to_string(),
            urls: urls(&spec),
            expires: expires.to_string(),
        })
    }

    pub(super) async fn add_proxy(
        &self,
        operator: &OperatorName,
        request: ProxyRequest,
    ) -> Answer<ProxyAnswer> {
        let name: NodeName = request.name.parse().map_err(|error: pgherd_core::types::Malformed| {
            Error::of(Code::RequestMalformed).because(error)
        })?;
        let answer = self.issue_proxy(&name, &request.csr, &request.hosts, request.valid_for_s)?;
        tracing::info!(by = %operator, %name, expires = answer.expires, "made a proxy's certificate");
        Ok(answer)
    }

    pub(super) async fn renew_proxy(
        &self,
        proxy: &NodeName,
        request: ProxyRenewRequest,
    ) -> Answer<ProxyAnswer> {
        let valid_for_s = request.valid_for_s.min(PROXY_VALIDITY.as_secs());
        let answer = self.issue_proxy(proxy, &request.csr, &request.hosts, valid_for_s)?;
        tracing::info!(name = %proxy, expires = answer.expires, "a proxy renewed its certificate");
        Ok(answer)
    }

    fn issue_proxy(
        &self,
        name: &NodeName,
        csr: &str,
        hosts: &[String],
        valid_for_s: u64,
    ) -> Answer<ProxyAnswer> {
        let (spec, _) = self.stored_spec()?;
        let authority = self.authority()?;
        let nodes: Vec<NodeName> = spec.agents().map(|(node, _, _)| node.clone()).collect();
        let (now, valid_for) = (Timestamp::now(), Duration::from_secs(valid_for_s));
        let subject = ProxySubject { name, hosts, nodes: &nodes };
        let certificate =
            authority.issue_proxy(csr, &subject, now, valid_for).map_err(|error| not_granted(&error))?;
        Ok(ProxyAnswer {
            certificate,
            ca: authority.certificate_pem().to_owned(),
            herd: self.identity.herd.to_string(),
            urls: urls(&spec),
            expires: expiry(&authority, now, valid_for).to_string(),
        })
    }

    /// "PostgreSQL of this member is stopped": gives the member's term back for it.
    pub(super) async fn take_fenced(&self, message: Fenced) -> Answer<()> {
        let authorities = crate::pki::certificates(&self.authorities)
            .map_err(|error| Error::of(Code::Internal).because(error))?;
        let (herd_id, me) = (&self.identity.herd_id, &self.identity.node);
        fence::receive(&message, herd_id, &authorities, me, &self.store, WITHIN).await.map_err(|error| {
            match error {
                ReceiveError::Refused(_) => Error::of(Code::SignatureInvalid).because(error),
                ReceiveError::Cluster(_) => Error::of(Code::RequestMalformed).because(error),
                ReceiveError::TermOver { .. } => Error::of(Code::TermStale).because(error),
                ReceiveError::Agreed(error) => refused(&error),
            }
        })
    }

    fn authority(&self) -> Answer<Authority> {
        let secrets = secrets(&self.store)?;
        let (certificate, key) = secrets.authority().ok_or_else(|| Error::of(Code::NotReady))?;
        Authority::from_pem(certificate, &key).map_err(|error| Error::of(Code::Internal).because(error))
    }

    pub(super) fn stored_spec(&self) -> Answer<(pgherd_core::spec::HerdSpec, u64)> {
        match agreed::value::<StoredSpec>(&local_view(&self.store), agreed::SPEC) {
            Ok(Some((stored, _))) => Ok((stored.spec, stored.generation)),
            Ok(None) => Err(Error::of(Code::NotReady)),
            Err(error) => Err(refused(&error)),
        }
    }
}

fn in_herd(spec: &pgherd_core::spec::HerdSpec, name: &str) -> Answer<NodeName> {
    let found = spec.agents().find(|(node, _, _)| node.as_str() == name);
    found.map(|(node, _, _)| node.clone()).ok_or_else(|| {
        Error::new(Code::NodeUnknown, format!("{name} is not in the herd file"))
            .hinting("add it to the herd file and `pgherd apply` that first")
    })
}

/// Nothing that is issued outlives the authority.
fn expiry(authority: &Authority, now: Timestamp, valid_for: Duration) -> Timestamp {
    let expires = SignedDuration::try_from(valid_for).ok().and_then(|span| now.checked_add(span).ok());
    expires.unwrap_or(authority.expires()).min(authority.expires())
}

pub(super) fn urls(spec: &pgherd_core::spec::HerdSpec) -> Vec<String> {
    spec.agents().map(|(_, host, port)| format!("https://{}", peers::address(host, port))).collect()
}

fn issue_node(
    authority: &Authority,
    csr: &str,
    node: &NodeName,
    hosts: &[String],
    spec: &pgherd_core::spec::HerdSpec,
) -> Answer<String> {
    let others: Vec<NodeName> =
        spec.agents().map(|(name, _, _)| name.clone()).filter(|name| name != node).collect();
    let subject = NodeSubject { name: node, hosts, others: &others };
    authority.issue_node(csr, &subject, Timestamp::now(), NODE_VALIDITY).map_err(|error| not_granted(&error))
}

fn not_granted(error: &IssueError) -> Error {
    Error::of(Code::CertificateRequestInvalid).because(error)
}
