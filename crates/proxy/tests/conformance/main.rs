//! The same scripts directly and through the proxy: whoever works with PostgreSQL must see no difference.
//!
//! What is run is fetched by `.ci/conformance`, which `make test` calls; what it has not fetched is a failure here. The
//! programs of PostgreSQL are those of `PGHERD_TEST_BIN_DIR`, or the newest that Debian installed.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

mod bench;
mod drivers;
mod harness;
mod libpq;
mod regress;
#[path = "../../../pgwire/tests/it/server.rs"]
mod server;
