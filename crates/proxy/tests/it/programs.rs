//! PostgreSQL's own programs through the proxy: what libpq and its tools do that no driver does.

use std::process::Output;
use std::time::Duration;

use pgherd_core::spec::TlsMode;
use pgherd_core::types::Term;
use pgherd_proxy::ClientTls;
use pgherd_proxy::routes::Table;
use tokio::process::Command;

use crate::harness::{PASSWORD, SOON, Scene, one, settings, story, until};
use crate::server::programs;

pub(crate) async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(programs().join(program));
    command.args(arguments).env("PGPASSWORD", PASSWORD).env("HOME", "/tmp").kill_on_drop(true);
    tokio::time::timeout(SOON, command.output()).await.expect("in time").unwrap()
}

pub(crate) async fn psql(conninfo: &str, query: &str) -> Result<String, String> {
    let output = run("psql", &["-XAt", "-v", "ON_ERROR_STOP=1", "-d", conninfo, "-c", query]).await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim().to_owned();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// A certificate for the proxy, and the file that says whom to believe.
fn certificate(dir: &std::path::Path) -> ClientTls {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(dir.join("ca.pem"), made.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    ClientTls::new(vec![made.cert.der().clone()], key, None).unwrap()
}

pub(crate) fn with_tls(scene: &Scene, dir: &std::path::Path, required: bool) {
    let mut changed = settings();
    changed.client_tls = Some(certificate(dir));
    changed.client_mode = if required { TlsMode::Require } else { TlsMode::Prefer };
    scene.proxy.replace(changed);
}

story! {
    async fn clients_have_tls_in_all_of_libpqs_modes(scene) {
        let dir = tempfile::tempdir().unwrap();
        let encrypted = |mode: &str| {
            let ca = dir.path().join("ca.pem");
            scene.conninfo("alice", &format!("sslmode={mode} sslrootcert={}", ca.display()))
        };
        for (mode, answer) in [("disable", true), ("prefer", true), ("require", false)] {
            assert_eq!(psql(&encrypted(mode), "SELECT 1").await.is_ok(), answer, "without a certificate, {mode}");
        }
        with_tls(scene, dir.path(), false);
        for mode in ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] {
            assert_eq!(psql(&encrypted(mode), "SELECT 1").await, Ok("1".to_owned()), "{mode}");
        }
        // The proof is bound to the connection, so that nobody stands between.
        let bound = format!("{} channel_binding=require", encrypted("verify-full"));
        assert_eq!(psql(&bound, "SELECT 1").await, Ok("1".to_owned()));
        let large = "SELECT length(string_agg(md5(n::text), '')) FROM generate_series(1, 200000) n";
        assert_eq!(psql(&encrypted("require"), large).await, Ok("6400000".to_owned()));

        with_tls(scene, dir.path(), true);
        let refused = psql(&encrypted("disable"), "SELECT 1").await.unwrap_err();
        assert!(refused.contains("this proxy takes connections with TLS only"), "{refused}");
        assert_eq!(psql(&encrypted("verify-full"), "SELECT 1").await, Ok("1".to_owned()));
    }
}

story! {
    async fn walsenders_and_base_backups_go_through(scene) {
        let mut changed = settings();
        changed.hba = pgherd_proxy::hba::Hba::parse(["host all,replication all all scram-sha-256"]).unwrap();
        scene.proxy.replace(changed);
        let (dir, port) = (tempfile::tempdir().unwrap(), scene.proxy.addresses()[0].port().to_string());
        let to = ["-h", "127.0.0.1", "-U", "alice", "-p", &port];
        let backup = dir.path().join("backup");
        let output = run(
            "pg_basebackup",
            &[&to[..], &["-X", "stream", "-c", "fast", "-D", backup.to_str().unwrap()]].concat(),
        )
        .await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let output = run("pg_verifybackup", &[backup.to_str().unwrap()]).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

        let admin = scene.admin().await;
        let wal = dir.path().join("wal");
        std::fs::create_dir(&wal).unwrap();
        admin.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        one(&admin, "SELECT pg_create_physical_replication_slot('receiver', true)").await;
        let end = one(&admin, "SELECT pg_current_wal_lsn() + 100").await;
        let arguments = ["-D", wal.to_str().unwrap(), "--slot", "receiver", "--endpos", &end, "--no-loop"];
        let receiving = tokio::spawn({
            let arguments: Vec<String> = to.iter().chain(&arguments).map(|text| (*text).to_owned()).collect();
            async move { run("pg_receivewal", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).await }
        });
        admin.batch_execute("CREATE TABLE t (id int); SELECT pg_switch_wal()").await.unwrap();
        let output = receiving.await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(std::fs::read_dir(&wal).unwrap().count() > 0);

        // A walsender with a database takes queries, too.
        let logical = scene.conninfo("alice", "replication=database");
        assert!(psql(&logical, "IDENTIFY_SYSTEM").await.unwrap().ends_with("|shop"));
        admin
            .batch_execute(
                "SELECT pg_create_logical_replication_slot('decoded', 'test_decoding');\
                 CREATE TABLE told (word text); INSERT INTO told VALUES ('by the proxy')",
            )
            .await
            .unwrap();
        let end = one(&admin, "SELECT pg_current_wal_lsn()").await;
        let conninfo = scene.conninfo("alice", "");
        let arguments = ["-d", &conninfo, "--slot", "decoded", "--start", "-f", "-", "--endpos", &end, "--no-loop"];
        let output = run("pg_recvlogical", &arguments).await;
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(told.contains("INSERT: word[text]:'by the proxy'"), "{told}");
    }
}

story! {
    async fn walsenders_wait_for_a_primary(scene) {
        let mut changed = settings();
        changed.hba = pgherd_proxy::hba::Hba::parse(["host all,replication all all scram-sha-256"]).unwrap();
        changed.limits.hold = SOON;
        scene.proxy.replace(changed.clone());
        let none = || Table { gate_open: false, ..scene.table(2, None) };
        assert!(scene.proxy.learn(none()));
        let conninfo = scene.conninfo("alice", "replication=database");
        let waiting = tokio::spawn({
            let conninfo = conninfo.clone();
            async move { psql(&conninfo, "IDENTIFY_SYSTEM").await }
        });
        let waits = async || scene.proxy.guests() == 1;
        until("it waits", waits).await;
        assert!(!waiting.is_finished());
        scene.route(3, "a");
        assert!(waiting.await.unwrap().unwrap().ends_with("|shop"));
        // Not for ever, and not when nobody waits any more.
        changed.limits.hold = Duration::from_millis(50);
        scene.proxy.replace(changed);
        assert!(scene.proxy.learn(Table { term: Term(4), ..none() }));
        let refused = psql(&conninfo, "IDENTIFY_SYSTEM").await.unwrap_err();
        assert!(refused.contains("there was no primary for too long"), "{refused}");
    }
}
