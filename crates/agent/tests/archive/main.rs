//! WAL of real servers comes into a repository: under load, with receivers that are killed, and over promotions.
//!
//! The programs of PostgreSQL are those of `PGHERD_TEST_BIN_DIR`, or the newest that Debian installed. A machine without
//! PostgreSQL fails these tests.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails where it stands, and says what it measured"
)]

#[allow(dead_code, reason = "another crate's tests use the rest")]
#[path = "../../../postgres/tests/it/harness.rs"]
mod harness;
mod holes;
mod killed;
mod measured;
mod pieces;
mod promotions;
mod refusals;
mod scene;
