//! A server that no herd has, whose WAL goes into a repository by `pgherd wal push`, and the program that its user can execute.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::run::PGHERD;
use crate::server::{Server, as_user, sql};

pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Names the program to whom the build directory is closed.
const PROGRAM: &str = "PGHERD_TEST_PROGRAM";

/// Runs a story as a user who may run PostgreSQL, with a copy of the program that he may execute.
pub(crate) fn story(test: &str, story: impl FnOnce()) {
    story_with(test, &[], story);
}

/// The same, with more for it to know.
pub(crate) fn story_with(test: &str, environment: &[(&str, &Path)], story: impl FnOnce()) {
    let place = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = std::env::var_os(PROGRAM).map_or_else(|| place.path().join("pgherd"), PathBuf::from);
    if !program.exists() {
        fs::copy(PGHERD, &program).unwrap();
    }
    as_user(test, &[environment, &[(PROGRAM, &program)]].concat(), story);
}

#[track_caller]
pub(crate) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < SOON, "{what}");
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn program() -> Command {
    // Where nobody gave one, the tests run as the user who built it.
    Command::new(std::env::var_os(PROGRAM).unwrap_or_else(|| PGHERD.into()))
}

/// A server with a table of its transactions, and an encrypted repository.
pub(crate) struct Scene {
    pub(crate) place: tempfile::TempDir,
    pub(crate) server: Server,
    pub(crate) repository: String,
}

impl Scene {
    pub(crate) fn new() -> Scene {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        fs::create_dir(at("objects")).unwrap();
        fs::write(at("secret"), "a passphrase of a test\n").unwrap();
        fs::set_permissions(at("secret"), PermissionsExt::from_mode(0o600)).unwrap();
        // A name that has to be quoted.
        let repository = at("it's 100%.toml");
        let text =
            format!("repository = \"file://{}\"\npassphrase_file = \"{}\"\n", at("objects"), at("secret"));
        fs::write(&repository, text).unwrap();
        Scene::over(repository, place)
    }

    /// With the repository that a file names, whose directory goes with the scene.
    pub(crate) fn over(repository: String, place: tempfile::TempDir) -> Scene {
        let made = program().args(["backup", "init", "--repository", &repository]).output().unwrap();
        assert!(made.status.success(), "{}", said(&made));
        let mut server = Server::start();
        let command = program().get_program().to_str().unwrap().to_owned();
        let quoted = repository.replace('\'', "'\\''").replace('%', "%%");
        let archive = format!("{command} wal push --repository '{quoted}' %p")
            .replace('\\', "\\\\")
            .replace('\'', "''");
        server.kill_and_start(&format!("archive_mode = on\narchive_command = '{archive}'\n"));
        sql(&server, "CREATE TABLE ledger (n serial PRIMARY KEY, xid bigint)");
        Scene { place, server, repository }
    }

    pub(crate) fn at(&self, name: &str) -> String {
        self.place.path().join(name).display().to_string()
    }

    /// The program with these arguments, and the repository.
    pub(crate) fn call(&self, arguments: &[&str]) -> Output {
        program().args(arguments).args(["--repository", &self.repository]).output().unwrap()
    }

    /// What it prints.
    #[track_caller]
    pub(crate) fn told(&self, arguments: &[&str]) -> String {
        let output = self.call(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let told = self.told(&[arguments, &["--json"]].concat());
        serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"))
    }

    /// Why it was not done, with the exit code.
    #[track_caller]
    pub(crate) fn refused(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.call(arguments);
        assert!(!output.status.success(), "{arguments:?} was done: {}", said(&output));
        (output.status.code().unwrap(), said(&output))
    }

    /// Takes a backup, and returns it as it is told.
    #[track_caller]
    pub(crate) fn back_up(&self, options: &[&str]) -> Value {
        let data_dir = self.server.data_dir().display().to_string();
        let created =
            self.json(&[&["backup", "create", "--fast", "--data-dir", &data_dir], options].concat());
        created["backup"].clone()
    }

    /// Transactions of one row each.
    pub(crate) fn write(&self, count: usize) -> Vec<u64> {
        (0..count).map(|_| write(&self.server)).collect()
    }

    /// Completes the segment that is written, and waits until it is archived.
    pub(crate) fn archive_everything(&self) {
        let last = sql(&self.server, "SELECT pg_walfile_name(pg_switch_wal())");
        wait("everything is archived", || {
            sql(&self.server, "SELECT last_archived_wal FROM pg_stat_archiver") >= last
        });
    }
}

/// One transaction.
pub(crate) fn write(server: &Server) -> u64 {
    let row = "INSERT INTO ledger (xid) VALUES (pg_current_xact_id()::text::bigint) RETURNING xid";
    sql(server, row).parse().unwrap()
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
