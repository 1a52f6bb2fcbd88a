//! The proxy between real clients and a real server.
//!
//! The programs of PostgreSQL are those of `PGHERD_TEST_BIN_DIR`, or the newest that Debian installed. A
//! machine without PostgreSQL fails these tests.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

mod by_socket;
mod commits;
mod console;
mod draining;
mod harness;
mod limits;
mod md5;
mod programs;
mod protection;
mod reading;
#[path = "../../../pgwire/tests/it/server.rs"]
mod server;
mod sessions;
mod sharing;
mod succession;
mod tls;
mod unheard;
