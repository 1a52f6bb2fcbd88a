//! The driver against a real PostgreSQL: Debian's, or the programs in `PGHERD_TEST_BIN_DIR`.
//!
//! PostgreSQL refuses root, and the agent runs as `postgres`; so a test that is started by root runs itself again
//! as that user. A machine without PostgreSQL fails these tests.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails where it stands, and says what it measured"
)]

mod configuring;
mod harness;
mod lifecycle;
mod observing;
mod reign;
mod rejoining;
mod replicating;
mod scratch;
mod sealing;
mod wal;
