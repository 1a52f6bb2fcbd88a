//! The program as a person runs it: its command line, and a herd on this machine.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "all of this is tests, their shared functions too"
)]

mod backed_up;
mod backups;
mod before_drop;
mod command_line;
mod drills;
mod exact;
mod foreign;
mod herd;
mod holes;
mod repository;
mod restore;
mod restore_cluster;
mod run;
mod s3;
#[path = "../../../pgwire/tests/it/server.rs"]
mod server;
mod stories;
mod streamed;
mod tables;
mod wal;
