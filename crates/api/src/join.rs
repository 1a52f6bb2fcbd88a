//! How nodes, operators and proxies get their certificates.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `POST /v1/tokens`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenRequest {
    /// Only a node of this name may use it; null: any node of the herd file that has not joined.
    pub node: Option<String>,
    pub valid_for_s: u64,
}

/// The one time that the token is shown; afterwards only a hash of it exists.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    pub token: String,
    /// RFC 3339.
    pub expires: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// `POST /v1/join`, the only request that is answered without a client certificate: its token speaks for it.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub token: String,
    pub node: String,
    /// PEM. The private key never leaves the joining host.
    pub csr: String,
    /// Host names and IP addresses that the certificate should name besides the node.
    pub hosts: Vec<String>,
    /// `host:port` where the others reach the joining agent's API.
    pub api_address: String,
    /// Members of the store on one host fail together; this says which host it is.
    pub host: String,
    /// The random name of the joining node's store directory: its admission is good for no other one.
    pub store_disk: String,
    /// Version of the joining program, so that one that is too old is refused here and not later.
    pub version: String,
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("node", &self.node)
            .field("hosts", &self.hosts)
            .field("api_address", &self.api_address)
            .field("host", &self.host)
            .field("store_disk", &self.store_disk)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// PEM.
    pub certificate: String,
    /// PEM, one or more while the herd changes its authority.
    pub ca: String,
    pub herd_id: String,
    pub herd: String,
    /// Generation of the store, which grows when a lost majority was overridden.
    pub herd_generation: u64,
    /// Never used before and never again.
    pub raft_id: u64,
    pub members: Vec<JoinMember>,
    pub spec_generation: u64,
    /// By name: the passwords and keys that this node needs. Not for logs; stored with mode 0600.
    pub secrets: std::collections::BTreeMap<String, String>,
}

impl fmt::Debug for JoinAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinAnswer")
            .field("herd_id", &self.herd_id)
            .field("raft_id", &self.raft_id)
            .field("members", &self.members)
            .field("spec_generation", &self.spec_generation)
            .field("secrets", &self.secrets.len())
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinMember {
    pub name: String,
    pub raft_id: Option<u64>,
    /// `host:port`.
    pub api_address: String,
    pub voter: bool,
}

/// `POST /v1/renew`: a node asks for a certificate to follow the one that it uses for this request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RenewRequest {
    pub csr: String,
    pub hosts: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RenewAnswer {
    pub certificate: String,
    pub ca: String,
}

/// `POST /v1/operators`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperatorRequest {
    pub name: String,
    /// PEM; made where the operator sits, so that the key stays there.
    pub csr: String,
    pub valid_for_s: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperatorAnswer {
    pub certificate: String,
    pub ca: String,
    pub herd: String,
    /// `https://host:port` of every agent, for `client.toml`.
    pub urls: Vec<String>,
    /// RFC 3339.
    pub expires: String,
}

/// `POST /v1/proxies`: a certificate for a proxy, which it shows to agents and to PostgreSQL, and to its own
/// clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProxyRequest {
    /// As names of nodes are: a lower-case letter, then up to 47 of a-z, 0-9 and '_'.
    pub name: String,
    /// PEM; made where the proxy runs, so that the key stays there.
    pub csr: String,
    /// Host names and IP addresses by which clients reach the proxy.
    pub hosts: Vec<String>,
    pub valid_for_s: u64,
}

/// `POST /v1/proxies/renew`: a proxy asks for a certificate to follow the one that it uses for this request,
/// and so under the same name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProxyRenewRequest {
    pub csr: String,
    pub hosts: Vec<String>,
    /// A year at most.
    pub valid_for_s: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProxyAnswer {
    pub certificate: String,
    pub ca: String,
    pub herd: String,
    /// `https://host:port` of every agent.
    pub urls: Vec<String>,
    /// RFC 3339.
    pub expires: String,
}
