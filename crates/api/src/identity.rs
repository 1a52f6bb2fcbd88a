//! Who a certificate of the herd speaks for.
//!
//! The name that counts is one URI among the subject alternative names, `pgherd:node/a`, `pgherd:operator/anna`
//! or `pgherd:proxy/up`. DNS names do not count here: they also hold host names, which are given by
//! people, and a host called `b` must not make its node pass for the node `b`.
//!
//! Hazard: reading an identity out of a certificate that was not verified to come from the herd's
//! authority. Both callers (the client's verifier, the server after its handshake) verify first.

use std::fmt;

use rustls::pki_types::CertificateDer;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    Node(String),
    Operator(String),
    Proxy(String),
}

const NODE_PREFIX: &str = "pgherd:node/";
const OPERATOR_PREFIX: &str = "pgherd:operator/";
const PROXY_PREFIX: &str = "pgherd:proxy/";

/// Why a certificate of the herd's authority speaks for nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("the certificate names {count} nodes, operators and proxies of a herd; it must name one")]
    NotOne { count: usize },
}

impl Identity {
    /// As it stands in a certificate.
    pub fn uri(&self) -> String {
        match self {
            Identity::Node(name) => format!("{NODE_PREFIX}{name}"),
            Identity::Operator(name) => format!("{OPERATOR_PREFIX}{name}"),
            Identity::Proxy(name) => format!("{PROXY_PREFIX}{name}"),
        }
    }

    fn from_uri(uri: &str) -> Option<Identity> {
        let after = |prefix| uri.strip_prefix(prefix).map(str::to_owned);
        let node = after(NODE_PREFIX).map(Identity::Node);
        let operator = || after(OPERATOR_PREFIX).map(Identity::Operator);
        node.or_else(operator).or_else(|| after(PROXY_PREFIX).map(Identity::Proxy))
    }

    /// The one identity that the certificate names. Two would let a node act as an operator.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Identity, NoIdentity> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|error| NoIdentity::Unreadable(error.to_string()))?;
        let mut found: Vec<Identity> = parsed.valid_uri_names().filter_map(Identity::from_uri).collect();
        match (found.pop(), found.len()) {
            (Some(identity), 0) => Ok(identity),
            (last, others) => Err(NoIdentity::NotOne { count: others + usize::from(last.is_some()) }),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Node(name) => write!(f, "node {name}"),
            Identity::Operator(name) => write!(f, "operator {name}"),
            Identity::Proxy(name) => write!(f, "proxy {name}"),
        }
    }
}
