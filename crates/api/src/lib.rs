//! What pgherd says and is told over HTTP: the types of `/v1/`, the routes, the error codes, and a client.
//!
//! Responsible for: the shapes that programs outside this repository depend on. They are wire types and
//! nothing else: `core` never sees them, and they never see `core` (positions and system identifiers are
//! text here). Leaves out: any server code and any decision.
//!
//! Compatibility of `/v1/`: fields are only ever added, and a reader ignores those it does not know. What
//! is unknown is null, never 0 and never left out. A value is added to an enum only where its
//! documentation says that readers must expect that.
//!
//! Hazard: a changed spelling breaks every script that reads `--json`. `schema/status.json` is checked in
//! and compared by a test, so that such a change is at least seen.

pub mod backup;
pub mod change;
pub mod client;
pub mod error;
pub mod identity;
pub mod join;
pub mod logs;
pub mod objects;
pub mod peer;
pub mod proxy;
pub mod report;
pub mod route;
pub mod routing;
pub mod spec;
pub mod status;
pub mod wal;

pub use client::{CallError, Client, Endpoint};
pub use error::{Code, Error, ExitClass};
pub use status::Status;
