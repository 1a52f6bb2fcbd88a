//! ACTS: the daemon of a node. It observes, asks `core` what to do, and does it.
//!
//! [`daemon`] wires everything; `main_loop` is the one loop; `execute` does what was decided to PostgreSQL, and
//! `server` is how it and the looks at PostgreSQL use the driver. [`local`] is the supervisor of `pgherd up`,
//! [`proxy`] the process that clients connect to, [`fence`] the sibling process that can only stop PostgreSQL, [`setup`] how a
//! node comes into a herd. Of backups: [`repository`] opens what a file names, `kept` is how it comes to the disk of a witness,
//! [`archive`] streams WAL into it, [`backups`]
//! takes base backups and restores them, [`wal`] is what PostgreSQL's commands call, [`named_server`] finds a server that no herd has.
//!
//! Left out: decisions. What cannot be read off an action must not be done.

pub mod agreed;
pub mod archive;
mod backend;
mod backoff;
pub mod backups;
mod causes;
mod clock;
pub mod daemon;
mod durable;
mod duties;
mod execute;
pub mod fence;
pub mod files;
pub mod foreign_server;
mod gossip;
mod guard;
mod history;
pub mod http;
pub mod identity;
pub mod import;
mod kept;
pub mod local;
mod main_loop;
pub mod metrics;
mod mind;
pub mod named_server;
mod pace;
pub mod paths;
mod peers;
pub mod pki;
pub mod proxy;
pub mod repository;
mod schedule;
mod secrets;
mod server;
pub mod setup;
mod slots;
mod tending;
mod transport;
mod view;
pub mod vip;
pub mod wal;
mod wire;
