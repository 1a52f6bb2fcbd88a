//! Where it is measured: a directory, PostgreSQL in it, the data set, and commands as the user who owns both.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgherd_testkit::command::{give_to_postgres, postgres_user};
use pgherd_testkit::port::free_port;

use crate::Arguments;

pub(crate) const USER: &str = "postgres";
const DATABASE: &str = "postgres";
/// Directory of its modules.
const BARMAN: &str = "barman-modules";
/// Whoever fetches ahead has ended by then.
const LEFT_WITHIN: Duration = Duration::from_secs(20);
/// One that has to recover.
const STARTS_WITHIN: Duration = Duration::from_secs(120);
/// Rows of documents for each of pgbench's hundred thousand accounts.
const DOCUMENTS_PER_SCALE: u64 = 23_333;
/// What applications write beside numbers: identifiers in no order, documents, times, and an index of each.
const DOCUMENTS: &str = "CREATE TABLE documents (id uuid, at timestamptz, body jsonb);
    INSERT INTO documents SELECT gen_random_uuid(), timestamptz '2026-01-01' + n * interval '1.7 s',
      jsonb_build_object('customer', (random() * 1e6)::int, 'state', (ARRAY['new','paid','sent','returned'])[1 + (random() * 3)::int],
        'price', round((random() * 1000)::numeric, 2), 'note', md5(n::text),
        'tags', jsonb_build_array((random() * 1e9)::int, (random() * 1e9)::int))
      FROM generate_series(1, ROWS) AS n;
    ALTER TABLE documents ADD PRIMARY KEY (id);
    CREATE INDEX ON documents (at);
    CREATE INDEX ON documents ((body ->> 'customer'))";

pub(crate) struct Scene {
    bin_dir: PathBuf,
    dir: PathBuf,
    /// Removed at the end, if nobody has named one.
    _temporary: Option<tempfile::TempDir>,
}

/// A PostgreSQL that runs; stopped at the end.
pub(crate) struct Server {
    postmaster: Child,
    pub(crate) data_dir: PathBuf,
    pub(crate) socket_dir: PathBuf,
    pub(crate) port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        // A fast shutdown, so that the data set is as whole as it was.
        if let Some(pid) = rustix::process::Pid::from_raw(self.postmaster.id() as i32) {
            rustix::process::kill_process(pid, rustix::process::Signal::INT).ok();
        }
        self.postmaster.wait().ok();
    }
}

impl Scene {
    pub(crate) fn new(arguments: &Arguments) -> Scene {
        let bin_dir = arguments.bin_dir.clone().unwrap_or_else(|| {
            let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
            let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
            let newest = installed.map(|entry| entry.path()).max_by_key(|path| version(path));
            newest.expect("PostgreSQL is not installed: apt-get install postgresql").join("bin")
        });
        let (dir, temporary) = match &arguments.dir {
            Some(dir) => {
                std::fs::create_dir_all(dir).expect("the directory can be made");
                (std::fs::canonicalize(dir).expect("the directory is there"), None)
            }
            None => {
                let made = tempfile::Builder::new().prefix("pgherd-bench-").tempdir().expect("a directory");
                (made.path().to_owned(), Some(made))
            }
        };
        let scene = Scene { bin_dir, dir, _temporary: temporary };
        scene.give(&scene.dir);
        // Where the checkout lies only its owner may be able to go.
        for (name, program) in [("pgherd", &arguments.pgherd), ("receive_wal", &arguments.receiver)] {
            let copy = scene.dir.join(name);
            std::fs::copy(program, &copy)
                .unwrap_or_else(|error| panic!("{} cannot be copied: {error}", program.display()));
            std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).expect("the file is ours");
        }
        if let Some(modules) = &arguments.barman {
            let mut copy = Command::new("cp");
            copy.arg("-rT").arg(modules).arg(scene.path(BARMAN));
            scene.done("cp", copy);
        }
        scene
    }

    /// Barman, whose modules were copied here, or the one that is installed.
    pub(crate) fn barman(&self) -> Command {
        let modules = self.path(BARMAN);
        if !modules.exists() {
            return self.command("barman");
        }
        let mut command = self.command("/usr/bin/python3");
        command.env("PYTHONPATH", modules).args(["-c", "from barman.cli import main; main()"]);
        command
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }

    fn give(&self, path: &Path) {
        if rustix::process::geteuid().is_root() {
            give_to_postgres(path);
        }
    }

    /// An empty directory of the user's.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        self.remove(name);
        std::fs::create_dir(&path).expect("the directory is ours");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).expect("the directory is ours");
        self.give(&path);
        path
    }

    pub(crate) fn remove(&self, name: &str) {
        let path = self.path(name);
        if path.is_dir() {
            let began = Instant::now();
            while let Err(error) = std::fs::remove_dir_all(&path) {
                // A process that a command has left behind still writes there.
                let is_in_use = error.kind() == std::io::ErrorKind::DirectoryNotEmpty;
                assert!(is_in_use && began.elapsed() < LEFT_WITHIN, "{}: {error}", path.display());
            }
        } else if path.exists() {
            std::fs::remove_file(&path).expect("the file is ours");
        }
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).expect("the directory is ours");
        self.give(&path);
        path
    }

    /// A command as the user that PostgreSQL runs as.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.dir).env("HOME", &self.dir).stdin(Stdio::null());
        if rustix::process::geteuid().is_root() {
            let (uid, gid) = postgres_user();
            command.uid(uid).gid(gid);
        }
        command
    }

    /// A command that is part of no measurement.
    pub(crate) fn done(&self, what: &str, mut command: Command) -> String {
        let output = command.output().unwrap_or_else(|error| panic!("{what} does not start: {error}"));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{what}: {}\n{said}{complained}", output.status);
        said
    }

    pub(crate) fn initdb(&self, name: &str) {
        self.remove(name);
        let mut command = self.command(self.program("initdb"));
        command.args(["-k", "--no-sync", "-A", "trust", "-U", USER, "-D"]).arg(self.path(name));
        self.done("initdb", command);
    }

    /// Starts PostgreSQL in the directory of that name.
    pub(crate) fn start(&self, name: &str, settings: &[&str]) -> Server {
        let (data_dir, port) = (self.path(name), free_port());
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).expect("the directory is ours");
        let mut command = self.command(self.program("postgres"));
        command.arg("-D").arg(&data_dir).args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k"]);
        command.arg(&self.dir).args(["-c", "shared_buffers=512MB", "-c", "autovacuum=off"]);
        command.args(["-c", "checkpoint_timeout=1h", "-c", "max_wal_senders=10"]);
        for setting in settings {
            command.args(["-c", setting]);
        }
        command.stderr(log).stdout(Stdio::null()).process_group(0);
        let postmaster = command.spawn().expect("postgres runs");
        let server = Server { postmaster, data_dir, socket_dir: self.dir.clone(), port };
        let began = Instant::now();
        let state = server.data_dir.join("postmaster.pid");
        while !std::fs::read_to_string(&state).is_ok_and(|text| text.contains("ready")) {
            assert!(began.elapsed() < STARTS_WITHIN, "PostgreSQL does not start: {name}.log");
            // sleep: between two looks.
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// The server with the data set, which is made where it is not there.
    pub(crate) fn data_set(&self, scale: u32) -> Server {
        let name = format!("server-{scale}");
        let made = self.path(&format!("{name}.made"));
        if !made.exists() {
            eprintln!("making the data set, of scale {scale}");
            self.initdb(&name);
            let server = self.start(&name, &["fsync=off", "max_wal_size=2GB", "maintenance_work_mem=256MB"]);
            let mut pgbench = self.command(self.program("pgbench"));
            pgbench.args(["-i", "-q", "-s", &scale.to_string()]);
            self.done("pgbench -i", server.at(pgbench));
            let rows = (u64::from(scale) * DOCUMENTS_PER_SCALE).to_string();
            server.sql(self, &DOCUMENTS.replace("ROWS", &rows));
            server.sql(self, "VACUUM ANALYZE");
            server.sql(self, "CHECKPOINT");
            drop(server);
            std::fs::write(made, "").expect("the directory is ours");
        }
        let archive = ["archive_mode=on", "max_wal_size=1GB", "min_wal_size=80MB"];
        let server = self.start(&name, &archive);
        server.archive(self, "true");
        server.sql(self, "CHECKPOINT");
        server
    }

    /// Everything is on the disk before the next one begins.
    pub(crate) fn settle(&self) {
        rustix::fs::sync();
    }
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.postmaster.id()
    }

    /// What a program of PostgreSQL's needs to come here.
    pub(crate) fn at(&self, mut command: Command) -> Command {
        command.env("PGHOST", &self.socket_dir).env("PGPORT", self.port.to_string());
        command.env("PGUSER", USER).env("PGDATABASE", DATABASE);
        command
    }

    /// Statements, each on its own; the last one's answer.
    pub(crate) fn sql(&self, scene: &Scene, statements: &str) -> String {
        let mut command = self.at(scene.command(scene.program("psql")));
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", statements]);
        scene.done(statements, command).trim().to_owned()
    }

    /// From now on WAL is archived by this command.
    pub(crate) fn archive(&self, scene: &Scene, command: &str) {
        // What was there is archived by the command before.
        self.sql(scene, "SELECT pg_switch_wal()");
        self.set(scene, "archive_command", command);
    }

    pub(crate) fn set(&self, scene: &Scene, name: &str, value: &str) {
        self.sql(scene, &format!("ALTER SYSTEM SET {name} = '{}'", value.replace('\'', "''")));
        self.sql(scene, "SELECT pg_reload_conf()");
        let began = Instant::now();
        while self.sql(scene, &format!("SHOW {name}")) != value {
            assert!(began.elapsed() < STARTS_WITHIN, "{name} is not taken over");
            // sleep: between two looks.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Changes pages here and there, as pgbench does without its small tables.
    pub(crate) fn change(&self, scene: &Scene, seconds: u32) -> String {
        let mut pgbench = self.at(scene.command(scene.program("pgbench")));
        pgbench.args(["-N", "-n", "-c", "4", "-j", "1", "-T", &seconds.to_string()]);
        scene.done("pgbench -N", pgbench)
    }
}
