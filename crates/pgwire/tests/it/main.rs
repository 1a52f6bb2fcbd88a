//! The crate from outside: against a real PostgreSQL, and against a machine that mutates bytes.
//!
//! The programs of PostgreSQL are those of `PGHERD_TEST_BIN_DIR`, or the newest that Debian installed. A
//! machine without PostgreSQL fails these tests.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails where it stands, and says what it measured"
)]

mod real;
mod server;
