//! The herd's own certificates: its authority, the certificates of nodes, operators and proxies, join tokens,
//! and the signed message by which a fenced node gives up its term.
//!
//! One kind of key everywhere: ECDSA P-256, which PostgreSQL, libpq and rustls all take. A node's one
//! certificate serves the API, PostgreSQL's server side and its replication connections.
//!
//! Leaves out: where the authority's key and the token records are stored (the store), and who may ask for
//! a certificate (`http`). Nothing here reads a clock; `now` is always given.
//!
//! Hazard: whoever holds the authority's key is every node and every operator. It is handed out as text for
//! the store alone, never printed, never part of an answer.

mod authority;
mod credentials;
mod fenced;
mod files;
mod tls;
mod token;

pub use authority::{
    Authority, AuthorityKey, CA_VALIDITY, IssueError, NODE_VALIDITY, NodeSubject, OPERATOR_VALIDITY,
    OperatorName, PROXY_VALIDITY, ProxySubject, key_of_request,
};
pub(crate) use credentials::certificates;
pub use credentials::{Credentials, CredentialsError, NewKey, Paths};
pub use fenced::{FencedRefused, sign_fenced, verify_fenced};
pub use files::{FileError, read_limited, write_private, write_public};
pub use tls::{ServerTls, authenticated};
pub use token::{IssuedToken, JoinToken, TokenMalformed, TokenRecord, TokenRefused, Use};
