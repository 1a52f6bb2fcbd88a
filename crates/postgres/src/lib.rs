//! Drives one local PostgreSQL, 14 to 18. Nothing else in pgherd touches a data directory or starts PostgreSQL's
//! programs. It decides nothing: the agent asks, and every operation does one thing, has a deadline, and can be
//! repeated after a crash at any line.
//!
//! | module | |
//! |---|---|
//! | [`installation`] | where PostgreSQL's programs are, and their version |
//! | [`instance`] | one PostgreSQL: its directories, addresses, certificates |
//! | [`conf`] | `postgresql.conf`, `pgherd.conf`, what `ALTER SYSTEM` overrides |
//! | [`hba`] | who may connect: the gate |
//! | [`roles`] | pgherd's own roles and the application's |
//! | [`initdb`], [`clone`] | a data directory comes into being |
//! | [`base_backup`], [`restoring`] | a data directory is read while its server runs, and written |
//! | [`scratch`] | a server apart from all others, for a while |
//! | [`process`] | start, adopt, watch, stop; stopped means gone |
//! | [`control`], `page` | `pg_control` and pages of relations, without a server |
//! | [`wal`] | the end of WAL on disk, timelines and their forks |
//! | [`seal`] | no further byte of the old term, durably |
//! | [`promote`] | becomes primary on the reserved timeline |
//! | [`follow`] | streams from an upstream |
//! | [`rewind`] | undoes what the primary does not have |
//! | [`sync_names`] | the list of synchronous standbys, proven in force |
//! | [`slots`] | physical slots |
//! | [`replication`] | a stream of WAL from a server |
//! | [`observe`] | one query that sees everything; probes and heartbeats |
//! | [`logs`], [`disk`] | PostgreSQL's log files; whether the disk answers |
//! | [`sql`], [`secret`] | sessions and passwords |
//!
//! Hazard: it runs as the owner of the data. Each module says what it can destroy.

pub mod base_backup;
pub mod clone;
pub mod conf;
pub mod control;
pub mod disk;
mod durable;
pub mod error;
pub mod follow;
pub mod hba;
pub mod initdb;
pub mod installation;
pub mod instance;
pub mod logs;
mod making;
pub mod observe;
mod page;
mod proc;
pub mod process;
pub mod promote;
mod receivers;
pub mod replication;
pub mod restoring;
pub mod rewind;
pub mod roles;
pub mod scratch;
pub mod seal;
pub mod secret;
pub mod slots;
pub mod sql;
pub mod sync_names;
pub mod wal;

pub use error::Error;
pub use installation::Installation;
pub use instance::{Instance, InstanceSpec, TlsFiles};
pub use making::MakingError;
pub use process::Server;
pub use secret::{Secret, Verifier};
