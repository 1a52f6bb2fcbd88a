//! The crate from outside, against a real PostgreSQL.
//!
//! The programs of PostgreSQL are those of `PGHERD_TEST_BIN_DIR`, or the newest that Debian installed. A machine without
//! PostgreSQL fails these tests.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

mod records;
mod recovering;
#[path = "../../../pgwire/tests/it/server.rs"]
mod server;

/// What `psql` prints.
fn sql(server: &server::Server, script: &str) -> String {
    let output = std::process::Command::new(server::programs().join("psql"))
        .args(["-h", "127.0.0.1", "-U", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1", "-p"])
        .args([&server.port.to_string(), "-c", script, "postgres"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
