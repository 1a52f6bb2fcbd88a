//! ROUTES clients to servers. Knows a routing table, never the store.
//!
//! What is decided here is decided without sockets, threads or a clock, by state machines that are told what happened and
//! answer what is to be done: docs/decisions/2026-11-21-outline-of-the-proxy.md says which, and in which order they come.
//!
//! - [`login`]: who may come in.
//! - [`routes`]: which server a session may use, and until when that is known.
//! - [`pool`]: who gets a server connection, who waits, who is refused.

pub mod hba;
pub mod login;
pub mod pool;
pub mod routes;
pub mod server;
pub mod session;
