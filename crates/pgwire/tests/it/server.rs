//! A PostgreSQL server for one test: made, started, and gone afterwards however the test ends. The tests of `proxy` include
//! this file, too.
//!
//! PostgreSQL refuses root, so a test that is started by root runs itself again as `postgres`. The server
//! hangs on a pipe of this process: when the process is gone, even killed, a shell at the other end stops the
//! server and removes its directory. Leaves out configuration beyond what the tests need. Hazard: a server
//! that is left behind holds a port and memory of a machine that others use.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const USER: &str = "postgres";
const SOON: Duration = Duration::from_secs(30);

/// Stops the server when its standard input ends. Its Unix socket is beside its data directory: in it, it would be a file of every
/// base backup.
const KEEPER: &str = r#"
trap '' INT TERM HUP
mkdir -p -m 700 "$2.socket"
"$1/postgres" -D "$2" -p "$3" -k "$2.socket" -h 127.0.0.1 -c cluster_name=a -c wal_level=logical -c fsync=off -c shared_buffers=16MB </dev/null &
read -r _
kill -INT $!
wait $!
rm -rf "$2" "$2.socket"
"#;

/// Runs a story; as root, runs the same test again as `postgres`, with `environment`, and fails if that does.
pub(crate) fn as_user(test: &str, environment: &[(&str, &Path)], story: impl FnOnce()) {
    if !is_root() {
        return story();
    }
    // The build directory may be closed to others. Each test has a copy of its own: several may be threads of one process.
    static COPIES: AtomicU32 = AtomicU32::new(0);
    let number = COPIES.fetch_add(1, Ordering::Relaxed);
    let copy = std::env::temp_dir().join(format!("pgherd-it-{}-{number}", std::process::id()));
    fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).unwrap();
    let again = Command::new(&copy)
        .args(["--exact", test, "--nocapture"])
        .envs(environment.iter().copied())
        .current_dir("/tmp")
        .uid(id("-u"))
        .gid(id("-g"))
        .status();
    fs::remove_file(&copy).unwrap();
    let again = again.expect("the test runs again as an unprivileged user");
    assert!(again.success(), "as {USER}: {again}");
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn id(flag: &str) -> u32 {
    let output = Command::new("id").args([flag, USER]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().expect("the tests need a user postgres")
}

pub(crate) fn programs() -> PathBuf {
    if let Some(dir) = std::env::var_os("PGHERD_TEST_BIN_DIR") {
        return dir.into();
    }
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let newest = installed.map(|entry| entry.path()).max_by_key(|path| version(path));
    newest.expect("the tests need a PostgreSQL server: install Debian's postgresql package").join("bin")
}

pub(crate) struct Server {
    keeper: Child,
    dir: PathBuf,
    pub(crate) port: u16,
}

impl Server {
    pub(crate) fn start() -> Server {
        let programs = programs();
        let dir = fresh_dir();
        let made = Command::new(programs.join("initdb"))
            .args(["--no-sync", "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C", "-D"])
            .arg(&dir)
            .output()
            .unwrap();
        if !made.status.success() {
            fs::remove_dir_all(&dir).ok();
            panic!("initdb: {}", String::from_utf8_lossy(&made.stderr));
        }
        Server::run(dir)
    }

    /// One that streams from `primary`, which must let user `postgres` in without a password.
    #[allow(dead_code, reason = "not every crate that includes this file has standbys")]
    pub(crate) fn standby_of(primary: &Server) -> Server {
        let dir = fresh_dir();
        let made = Command::new(programs().join("pg_basebackup"))
            .args([
                "--no-sync",
                "-R",
                "-c",
                "fast",
                "-h",
                "127.0.0.1",
                "-U",
                USER,
                "-p",
                &primary.port.to_string(),
                "-D",
            ])
            .arg(&dir)
            .output()
            .unwrap();
        if !made.status.success() {
            fs::remove_dir_all(&dir).ok();
            panic!("pg_basebackup: {}", String::from_utf8_lossy(&made.stderr));
        }
        Server::run(dir)
    }

    /// Over a data directory that is there.
    #[allow(dead_code, reason = "not every crate that includes this file makes data directories by itself")]
    pub(crate) fn over(dir: PathBuf) -> Server {
        Server::run(dir)
    }

    fn run(dir: PathBuf) -> Server {
        let port = free_port();
        let keeper = Server::keep(&dir, port);
        Server { keeper, dir, port }
    }

    /// As it is after a loss of power, but for what the disk had not. It begins anew with these lines of configuration.
    #[allow(dead_code, reason = "not every crate that includes this file kills servers")]
    pub(crate) fn kill_and_start(&mut self, configuration: &str) {
        let postmaster = self.postmaster();
        let children = Command::new("ps").args(["-o", "pid=", "--ppid", &postmaster]).output().unwrap();
        let children = String::from_utf8(children.stdout).unwrap();
        let processes: Vec<&str> = children.split_whitespace().chain([postmaster.as_str()]).collect();
        // One that has just ended by itself makes the command fail; that all are gone is seen below.
        Command::new("kill").arg("-9").args(&processes).status().unwrap();
        let began = Instant::now();
        // One that lives still holds the shared memory, and then no other one starts.
        let is_there = |process: &&str| Path::new("/proc").join(process).join("exe").exists();
        while processes.iter().any(is_there) || TcpListener::bind(("127.0.0.1", self.port)).is_err() {
            assert!(began.elapsed() < SOON, "the server is not gone");
            // sleep: between two looks.
            std::thread::sleep(Duration::from_millis(10));
        }
        fs::remove_file(self.dir.join("postmaster.pid")).unwrap();
        // So has its socket a lock of that process.
        fs::remove_dir_all(self.socket_dir()).unwrap();
        let own = self.dir.join("postgresql.auto.conf");
        fs::write(&own, fs::read_to_string(&own).unwrap() + configuration).unwrap();
        // The former keeper would remove the directory.
        self.keeper.kill().unwrap();
        self.keeper.wait().unwrap();
        self.keeper = Server::keep(&self.dir, self.port);
    }

    fn keep(dir: &Path, port: u16) -> Child {
        let keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .args([programs().as_os_str(), dir.as_os_str(), port.to_string().as_ref()])
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        // Its last line says when clients are let in.
        let state = dir.join("postmaster.pid");
        while !fs::read_to_string(&state).is_ok_and(|text| text.contains("ready")) {
            assert!(began.elapsed() < SOON, "the server is not ready");
            // sleep: between two looks.
            std::thread::sleep(Duration::from_millis(10));
        }
        keeper
    }

    /// The process that all its others come from.
    #[allow(dead_code, reason = "not every crate that includes this file kills servers")]
    pub(crate) fn postmaster(&self) -> String {
        let state = fs::read_to_string(self.dir.join("postmaster.pid")).unwrap();
        state.lines().next().unwrap().to_owned()
    }

    #[allow(dead_code, reason = "not every crate that includes this file reads what the server writes")]
    pub(crate) fn data_dir(&self) -> &Path {
        &self.dir
    }

    #[allow(dead_code, reason = "not every crate that includes this file comes by the socket")]
    pub(crate) fn socket_dir(&self) -> PathBuf {
        self.dir.with_extension("socket")
    }

    /// Replaces pg_ident.conf.
    #[allow(dead_code, reason = "not every crate that includes this file lets certificates in")]
    pub(crate) fn map(&self, lines: &str) {
        fs::write(self.dir.join("pg_ident.conf"), lines).unwrap();
    }

    /// Replaces pg_hba.conf.
    #[allow(dead_code, reason = "not every crate that includes this file decides who comes in")]
    pub(crate) fn admit(&self, lines: &str) {
        fs::write(self.dir.join("pg_hba.conf"), lines).unwrap();
    }
}

/// What `psql` prints. Several statements are one transaction.
#[allow(dead_code, reason = "not every crate that includes this file asks by psql")]
pub(crate) fn sql(server: &Server, script: &str) -> String {
    let output = Command::new(programs().join("psql"))
        .args(["-h", "127.0.0.1", "-U", USER, "-XAtq", "-v", "ON_ERROR_STOP=1", "-p"])
        .args([&server.port.to_string(), "-c", script, "postgres"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        self.keeper.wait().ok();
    }
}

fn fresh_dir() -> PathBuf {
    static SERVERS: AtomicU32 = AtomicU32::new(0);
    let number = SERVERS.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("pgherd-pgwire-{}-{number}", std::process::id()))
}

/// Below the kernel's range for outgoing connections, so that a port that is free now stays free until it is
/// used.
fn free_port() -> u16 {
    let start = 21_000 + (std::process::id() % 900) as u16 * 10;
    (start..start + 1_000).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}
