//! Base backups of real servers, taken into a directory, restored, recovered and compared with the original.
//!
//! The programs of PostgreSQL are those of `PGHERD_TEST_BIN_DIR`, or the newest that Debian installed. A machine without
//! PostgreSQL fails these tests.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails where it stands, and says what it measured"
)]

mod by_wal;
mod delta;
mod going_on;
#[allow(dead_code, unreachable_pub, reason = "the tests of the driver need more of it")]
#[path = "../../../postgres/tests/it/harness.rs"]
mod harness;
mod incremental;
mod measured;
mod original;
mod restored;
mod taking;
mod throttled;
mod voting;
