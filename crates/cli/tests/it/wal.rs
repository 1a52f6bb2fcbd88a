//! A server that no herd has archives with `pgherd wal push`, and a copy of it recovers with `pgherd wal fetch`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::run::PGHERD;
use crate::server::{Server, as_user, programs, sql};

const SOON: Duration = Duration::from_secs(60);
/// Names the program to whom the build directory is closed.
const PROGRAM: &str = "PGHERD_TEST_PROGRAM";

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < SOON, "{what}");
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(arguments: &[&str]) -> String {
    let output = Command::new(std::env::var(PROGRAM).unwrap()).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether it went well, and what it has said.
fn try_run(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(std::env::var(PROGRAM).unwrap()).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// A copy of a backup that recovers by fetching.
fn copy_that_recovers(backup: &Path, to: PathBuf, repository: &str) -> PathBuf {
    assert!(Command::new("cp").arg("-a").args([backup, &to]).status().unwrap().success());
    let program = std::env::var(PROGRAM).unwrap();
    let settings = format!(
        "archive_mode = off\nrestore_command = '{program} wal fetch --repository {repository} %f %p'\n"
    );
    fs::write(to.join("postgresql.auto.conf"), settings).unwrap();
    fs::write(to.join("recovery.signal"), "").unwrap();
    to
}

#[test]
fn as_root_a_server_archives_and_a_copy_recovers_with_commands_alone() {
    // The program is copied to where user postgres can execute it.
    let place = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = std::env::var_os(PROGRAM).map_or_else(|| place.path().join("pgherd"), PathBuf::from);
    if !program.exists() {
        fs::copy(PGHERD, &program).unwrap();
    }
    let test = "wal::as_root_a_server_archives_and_a_copy_recovers_with_commands_alone";
    as_user(test, &[(PROGRAM, &program)], || {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        fs::create_dir(at("objects")).unwrap();
        fs::write(at("secret"), "a passphrase of a test\n").unwrap();
        fs::set_permissions(at("secret"), PermissionsExt::from_mode(0o600)).unwrap();
        let repository = at("repository.toml");
        let text =
            format!("repository = \"file://{}\"\npassphrase_file = \"{}\"\n", at("objects"), at("secret"));
        fs::write(&repository, text).unwrap();
        run(&["backup", "init", "--repository", &repository]);

        let mut server = Server::start();
        let program = std::env::var(PROGRAM).unwrap();
        server.kill_and_start(&format!(
            "archive_mode = on\narchive_command = '{program} wal push --repository {repository} %p'\n"
        ));
        sql(&server, "CREATE TABLE t (n int, filler text)");
        let backup = at("backup");
        let taken = Command::new(programs().join("pg_basebackup"))
            .args(["-h", "127.0.0.1", "-U", "postgres", "-X", "none", "-c", "fast", "-D", &backup, "-p"])
            .arg(server.port.to_string())
            .output()
            .unwrap();
        assert!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
        // More than one spool full of what is fetched ahead would take long; some segments show it.
        sql(&server, "INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 200000) g");
        let last = sql(&server, "SELECT pg_walfile_name(pg_switch_wal())");
        wait("everything is archived", || {
            sql(&server, "SELECT last_archived_wal FROM pg_stat_archiver") >= last
        });
        assert_eq!(sql(&server, "SELECT failed_count FROM pg_stat_archiver"), "0");
        let data_dir = server.data_dir().display().to_string();
        let listed = run(&["wal", "list", "--repository", &repository, "--data-dir", &data_dir]);
        assert_eq!(listed.lines().count(), 1, "one run without a hole: {listed}");
        assert!(listed.contains(&last), "{listed}");

        // What was written is found, and a switch returns when it is in the repository.
        let of = ["--repository", &repository, "--data-dir", &data_dir];
        let wal = |what: &[&str]| try_run(&[&["wal"], what, &of[..]].concat());
        let before = sql(&server, "SELECT now() AT TIME ZONE 'UTC'") + "+00";
        let lsn = sql(&server, "SELECT pg_current_wal_insert_lsn()");
        let insert = "BEGIN; INSERT INTO t VALUES (-1, 'found'); INSERT INTO t VALUES (-2, 'found'); \
                      SELECT pg_current_xact_id(); COMMIT";
        let xid = sql(&server, insert).lines().find(|line| line.parse::<u64>().is_ok()).unwrap().to_owned();
        let segment = sql(&server, &format!("SELECT pg_walfile_name('{lsn}')"));
        let (ok, said, _) = wal(&["find", "--lsn", &lsn]);
        assert!(!ok && said.is_empty(), "it is not archived yet: {said}");
        let (ok, switched, told) = wal(&["switch", "--timeout", "60s"]);
        assert!(ok, "{told}");
        assert_eq!(switched.trim(), segment, "{told}");
        assert!(run(&[&["wal", "list"], &of[..]].concat()).contains(&segment));
        let (ok, said, told) = wal(&["find", "--lsn", &lsn]);
        assert!(
            ok && said.lines().count() == 1 && said.starts_with(&format!("{segment}  timeline 1  ")),
            "{said}{told}"
        );
        let (ok, said, told) = wal(&["find", "--xid", &xid]);
        assert!(ok && said.lines().count() == 2, "its first record and its end: {said}{told}");
        assert!(said.lines().next().unwrap().ends_with(&format!("a record of transaction {xid}")), "{said}");
        assert!(said.lines().last().unwrap().contains(&format!("commit of transaction {xid} at ")), "{said}");
        assert!(said.lines().all(|line| line.starts_with(&segment)), "{said}");
        let (ok, said, told) = wal(&["--json", "find", "--time", &before]);
        assert!(ok, "{told}");
        assert!(said.contains("\"record\": \"commit\"") && said.contains(&segment), "{said}");
        assert!(said.contains(&format!("\"xid\": {xid}")), "the first that ended since {before}: {said}");
        for (sought, told) in [
            (["--xid", "4000000000"], "transaction 4000000000 is not in the archive"),
            (["--time", "2100-01-01T00:00:00Z"], "is not in the archive"),
            (["--lsn", "FF/0"], "LSN FF/0 is not in the archive"),
            (["--lsn", "here"], "is no position in the WAL"),
            (["--time", "2026-11-20 20:54:54"], "Europe/Berlin"),
            (["--xid", "1"], "it is no transaction's number"),
        ] {
            let (ok, said, error) = wal(&[&["find"], &sought[..]].concat());
            assert!(!ok && said.is_empty() && error.contains(told), "{sought:?}: {said}{error}");
        }
        // Where nothing archives it says so, with what the server knows.
        let archives = sql(&server, "SELECT quote_literal(current_setting('archive_command'))");
        sql(&server, "ALTER SYSTEM SET archive_command = 'false'");
        sql(&server, "SELECT pg_reload_conf()");
        sql(&server, "INSERT INTO t VALUES (-3, 'late')");
        let (ok, said, told) = wal(&["switch", "--timeout", "3s"]);
        assert!(!ok && said.is_empty(), "{said}");
        assert!(told.contains("has not come into") && told.contains("archive_mode is on"), "{told}");
        assert!(told.contains("pg_stat_archiver"), "{told}");
        sql(&server, &format!("ALTER SYSTEM SET archive_command = {archives}"));
        sql(&server, "SELECT pg_reload_conf()");
        let (ok, _, told) = wal(&["switch", "--timeout", "60s"]);
        assert!(ok, "{told}");

        // A repository that is not there does not end the recovery; the server does not come up with less.
        fs::rename(at("objects"), at("unmounted")).unwrap();
        let unsure = copy_that_recovers(Path::new(&backup), place.path().join("unsure"), &repository);
        let ended = Command::new(programs().join("postgres"))
            .args(["-h", "", "-k", &place.path().display().to_string(), "-D"])
            .arg(&unsure)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!ended.status.success() && said.contains("FATAL"), "{said}");
        assert!(said.contains("there is no directory"), "the command says why: {said}");
        fs::rename(at("unmounted"), at("objects")).unwrap();

        let copy =
            Server::over(copy_that_recovers(Path::new(&backup), place.path().join("copy"), &repository));
        wait("recovery ends", || sql(&copy, "SELECT pg_is_in_recovery()") == "f");
        assert_eq!(
            sql(&copy, "SELECT count(*), sum(n) FROM t"),
            sql(&server, "SELECT count(*), sum(n) FROM t")
        );
        // What the copy writes is on another timeline, and what both have is told once.
        let of_copy = copy.data_dir();
        let lsn = sql(&copy, "SELECT pg_current_wal_insert_lsn()");
        let xid_of_copy =
            sql(&copy, "BEGIN; INSERT INTO t VALUES (-4, 'copy'); SELECT pg_current_xact_id(); COMMIT");
        let xid_of_copy = xid_of_copy.lines().find(|line| line.parse::<u64>().is_ok()).unwrap();
        let segment = sql(&copy, "SELECT pg_walfile_name(pg_switch_wal())");
        for name in ["00000002.history", &segment] {
            let file = of_copy.join("pg_wal").join(name).display().to_string();
            run(&["wal", "push", of[0], of[1], of[2], &of_copy.display().to_string(), &file]);
        }
        let (ok, said, told) = wal(&["find", "--xid", xid_of_copy]);
        assert!(ok && said.lines().all(|line| line.contains("timeline 2  ")), "{said}{told}");
        assert!(wal(&["find", "--lsn", &lsn]).1.contains("timeline 2"));
        let (_, said, _) = wal(&["find", "--xid", &xid]);
        assert_eq!(said.lines().count(), 2, "{said}");
        wait("nothing stays of what was fetched ahead", || !copy.data_dir().join("pgherd_fetch").exists());
    });
}
