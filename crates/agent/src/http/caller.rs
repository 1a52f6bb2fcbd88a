//! Who is calling, and the parameters by which handlers say whom they let in.
//!
//! The connection knows: its certificate was verified in the handshake, or it came through the Unix socket.
//! Each type below can only be had from a request whose caller fits; else the request ends here, before
//! its body is read.

use std::fmt;
use std::net::SocketAddr;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use pgherd_api::identity::Identity;
use pgherd_api::{Code, Error};
use pgherd_core::types::{Malformed, NodeName};

use super::answer::Refusal;
use crate::pki::OperatorName;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    Node(NodeName),
    Operator(OperatorName),
    Proxy(NodeName),
    Anonymous,
}

impl Caller {
    /// A certificate that names nobody, or a name that cannot be, is no caller at all: its connection ends.
    pub(super) fn of_identity(identity: Option<Identity>) -> Result<Caller, Malformed> {
        match identity {
            None => Ok(Caller::Anonymous),
            Some(Identity::Node(name)) => Ok(Caller::Node(name.parse()?)),
            Some(Identity::Operator(name)) => Ok(Caller::Operator(name.parse()?)),
            Some(Identity::Proxy(name)) => Ok(Caller::Proxy(name.parse()?)),
        }
    }
}

/// Another node of the herd.
#[derive(Debug)]
pub(super) struct ByNode(pub(super) NodeName);

/// A person, or a program in a person's name.
#[derive(Debug)]
pub(super) struct ByOperator(pub(super) OperatorName);

/// Any node or operator of the herd.
#[derive(Debug)]
pub(super) struct ByMember;

/// A proxy of the herd.
#[derive(Debug)]
pub(super) struct ByProxy(pub(super) NodeName);

/// Any node, operator or proxy of the herd.
#[derive(Debug)]
pub(super) struct ByFollower {
    /// Its name, if it is a proxy.
    pub(super) proxy: Option<NodeName>,
}

/// Whoever reaches the listener. The handler has to check what the body says; the address is for the log.
#[derive(Debug)]
pub(super) struct ByAnyone {
    pub(super) address: Address,
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Remote(SocketAddr),
    Socket,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Remote(address) => address.fmt(f),
            Address::Socket => f.write_str("the socket"),
        }
    }
}

fn caller(parts: &Parts) -> Caller {
    parts.extensions.get::<Caller>().cloned().unwrap_or(Caller::Anonymous)
}

fn refused(caller: &Caller, wanted: &str) -> Refusal {
    Refusal(match caller {
        Caller::Anonymous => Error::of(Code::CredentialsMissing),
        Caller::Node(name) => {
            Error::new(Code::CredentialsInsufficient, format!("this is for {wanted}, and {name} is a node"))
        }
        Caller::Operator(name) => Error::new(
            Code::CredentialsInsufficient,
            format!("this is for {wanted}, and {name} is an operator"),
        ),
        Caller::Proxy(name) => {
            Error::new(Code::CredentialsInsufficient, format!("this is for {wanted}, and {name} is a proxy"))
        }
    })
}

impl<S: Sync> FromRequestParts<S> for ByNode {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<ByNode, Refusal> {
        match caller(parts) {
            Caller::Node(name) => Ok(ByNode(name)),
            other => Err(refused(&other, "nodes")),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ByOperator {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<ByOperator, Refusal> {
        match caller(parts) {
            Caller::Operator(name) => Ok(ByOperator(name)),
            other => Err(refused(&other, "operators")),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ByMember {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<ByMember, Refusal> {
        match caller(parts) {
            Caller::Node(_) | Caller::Operator(_) => Ok(ByMember),
            other => Err(refused(&other, "nodes and operators")),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ByProxy {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<ByProxy, Refusal> {
        match caller(parts) {
            Caller::Proxy(name) => Ok(ByProxy(name)),
            other => Err(refused(&other, "proxies")),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ByFollower {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<ByFollower, Refusal> {
        match caller(parts) {
            Caller::Node(_) | Caller::Operator(_) => Ok(ByFollower { proxy: None }),
            Caller::Proxy(name) => Ok(ByFollower { proxy: Some(name) }),
            Caller::Anonymous => Err(refused(&Caller::Anonymous, "members of the herd")),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ByAnyone {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<ByAnyone, Refusal> {
        let address = parts.extensions.get().copied().unwrap_or(Address::Socket);
        Ok(ByAnyone { address })
    }
}
