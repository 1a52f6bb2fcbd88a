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
        wait("nothing stays of what was fetched ahead", || !copy.data_dir().join("pgherd_fetch").exists());
    });
}
