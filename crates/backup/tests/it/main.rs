//! The crate from outside, against a real PostgreSQL.
//!
//! The programs of PostgreSQL are those of `PGHERD_TEST_BIN_DIR`, or the newest that Debian installed. A machine without
//! PostgreSQL fails these tests.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

mod records;
mod recovering;
#[path = "../../../pgwire/tests/it/server.rs"]
mod server;
