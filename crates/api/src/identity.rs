//! Who a certificate of the herd speaks for.
//!
//! The name that counts is one URI among the subject alternative names, `pgherd:node/a` or
//! `pgherd:operator/anna`. DNS names do not count here: they also hold host names, which are given by
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
}

const NODE_PREFIX: &str = "pgherd:node/";
const OPERATOR_PREFIX: &str = "pgherd:operator/";

/// Why a certificate of the herd's authority speaks for nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("the certificate names {count} nodes and operators of a herd; it must name one")]
    NotOne { count: usize },
}

impl Identity {
    /// As it stands in a certificate.
    pub fn uri(&self) -> String {
        match self {
            Identity::Node(name) => format!("{NODE_PREFIX}{name}"),
            Identity::Operator(name) => format!("{OPERATOR_PREFIX}{name}"),
        }
    }

    fn from_uri(uri: &str) -> Option<Identity> {
        let node = uri.strip_prefix(NODE_PREFIX).map(|name| Identity::Node(name.to_owned()));
        node.or_else(|| uri.strip_prefix(OPERATOR_PREFIX).map(|name| Identity::Operator(name.to_owned())))
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
        }
    }
}
