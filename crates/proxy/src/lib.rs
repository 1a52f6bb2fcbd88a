//! ROUTES clients to servers. Knows a routing table, never the store.
//!
//! What is decided here is decided without sockets, threads or a clock, by state machines that are told what happened and
//! answer what is to be done: docs/decisions/2026-11-21-outline-of-the-proxy.md says which, and in which order they come.
//!
//! - [`login`], [`hba`], [`ident`], [`names`]: who may come in.
//! - [`routes`]: which server a session may use, and until when that is known.
//! - [`pool`]: who gets a server connection, who waits, who is refused.
//! - [`session`]: what happens to the bytes between a client and its server.
//! - [`sql`], [`settings`], [`statements`]: what a client may leave in a server, and what has to follow it to the next one.
//! - [`reads`]: what may be read from a standby.
//! - [`console`]: what an operator says to the proxy, and what it shows; [`counts`]: what is counted.
//! - [`server`]: how the proxy comes in at a server in a client's name; [`tls`]: what is believed of a certificate.
//! - [`succession`]: how one process of a proxy takes over from another one.
//!
//! [`Proxy`] acts: threads with an event loop each, sockets, TLS. Everything below it only carries bytes to the machines
//! above, and does what they answer.

mod backend;
mod cancel;
mod catalog;
mod census;
mod client;
mod clock;
mod commit;
pub mod console;
pub mod counts;
mod fence;
pub mod hba;
pub mod ident;
mod local;
pub mod login;
pub mod names;
mod net;
mod nodes;
pub mod observed;
mod own;
pub mod pool;
mod pools;
mod positions;
mod proxy;
mod readers;
pub mod reads;
mod relay;
mod retry;
mod roster;
pub mod routes;
pub mod server;
pub mod session;
pub mod settings;
mod share;
pub mod sql;
pub mod statements;
pub mod succession;
mod timer;
pub mod tls;
mod trial;
mod verifiers;
mod watch;
mod wish;
mod world;

pub use net::{ALPN, InClear, ServerTls};
pub use pools::Name;
pub use proxy::{Access, Config, Ending, Proxy, StartError};
pub use tls::ClientTls;
pub use verifiers::AuthQuery;
pub use wish::{Promote, Promotion, Reload, Unwilling, Wish};
pub use world::{ConsoleAccess, PoolMode, Pooling, Reads, Settings, Timeouts};
