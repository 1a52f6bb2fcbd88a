//! The driver against a real PostgreSQL: Debian's, or the programs in `PGHERD_TEST_BIN_DIR`.
//!
//! PostgreSQL refuses root, and the agent runs as `postgres`; so a test that is started by root runs itself again
//! as that user. A machine without PostgreSQL fails these tests.

mod harness;
mod lifecycle;
mod reign;
mod sealing;
mod wal;
