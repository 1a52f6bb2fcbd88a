//! What a transaction costs a proxy: CPU of its process, throughput, latency, beside its peers in the same run.
//!
//! One PostgreSQL, and in front of it each subject, all with the same pooling, SCRAM on both sides and without TLS. pgbench
//! runs through them in turns, round after round, so that what else the machine does meets all of them. CPU is user and system
//! time of the subject's processes alone, from `/proc`.
//!
//! With `--idle`, also what a client costs that does nothing: so many come in and stay, and when all are there each of them
//! asks for something. That is for those that need no process and no server for each client.
//!
//! Hazard: on two cores subject, server and pgbench share the machine, so that throughput says
//! as much of the other two.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the report is what this program is for")]

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use pgherd_testkit::command::{give_to_postgres, postgres_user};
use pgherd_testkit::port::free_port;

const USER: &str = "postgres";
const PASSWORD: &str = "bench";
const PROTOCOLS: [&str; 3] = ["simple", "extended", "prepared"];
const SOON: Duration = Duration::from_secs(20);
/// Whoever is told to end and has not by then is killed.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(5);
/// So many clients log in at once: none of them waits for so long that it is refused.
const AT_ONCE: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Pool {
    Session,
    Transaction,
}

#[derive(Parser)]
#[command(about = "Measures what a transaction costs a proxy, beside its peers")]
struct Arguments {
    /// The proxy's program: the example in_front_of of pgherd-proxy
    #[arg(long, value_name = "FILE")]
    proxy: PathBuf,
    /// Rounds for each subject, protocol and number of clients
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Length of a round
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Numbers of clients
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64])]
    clients: Vec<u32>,
    /// For how long a client has its server
    #[arg(long, value_enum, default_value_t = Pool::Session)]
    pool: Pool,
    /// Servers [default: 200 for session pooling, else 20]
    #[arg(long)]
    pool_size: Option<u32>,
    /// Threads of pgherd's proxy
    #[arg(long, default_value_t = 1)]
    workers: u16,
    /// So many clients come in, stay, and do nothing; descriptors limit them
    #[arg(long, value_name = "CLIENTS", default_value_t = 0)]
    idle: usize,
    /// Without its peers, for a profile
    #[arg(long)]
    alone: bool,
    /// Directory of PostgreSQL's programs [default: Debian's newest]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

fn main() {
    let arguments = Arguments::parse();
    let scene = Scene::new(&arguments);
    let subjects = scene.subjects(&arguments);
    println!(
        "median of {} rounds of {} s of pgbench -S; CPU of the subject's process alone",
        arguments.rounds, arguments.seconds
    );
    println!(
        "{:<10}{:>8}  {:<14}{:>12}{:>9}{:>12}{:>14}",
        "protocol", "clients", "subject", "µs/trans.", "ratio", "trans./s", "latency µs"
    );
    for protocol in PROTOCOLS {
        for clients in &arguments.clients {
            let mut measured: Vec<Vec<Round>> = subjects.iter().map(|_| Vec::new()).collect();
            for _ in 0..arguments.rounds {
                for (subject, rounds) in subjects.iter().zip(&mut measured) {
                    rounds.extend(scene.round(subject, protocol, *clients, arguments.seconds));
                }
            }
            let peer = subjects.iter().position(|subject| subject.name == "PgBouncer");
            // Before 1.21 it knows no prepared statements in transaction pooling.
            let peer = peer.filter(|peer| !measured[*peer].is_empty());
            let cpu = |at: usize| median(measured[at].iter().map(|round| round.cpu_us));
            for (at, subject) in subjects.iter().enumerate() {
                if measured[at].is_empty() {
                    println!("{protocol:<10}{clients:>8}  {:<14}{:>12}", subject.name, "refused");
                    continue;
                }
                let rate = median(measured[at].iter().map(|round| round.rate));
                let ratio = peer.filter(|_| subject.process.is_some()).map(|peer| cpu(at) / cpu(peer));
                println!(
                    "{protocol:<10}{clients:>8}  {:<14}{:>12}{:>9}{rate:>12.0}{:>14.0}",
                    subject.name,
                    subject.process.as_ref().map_or("-".to_owned(), |_| format!("{:.1}", cpu(at))),
                    ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")),
                    f64::from(*clients) * 1e6 / rate,
                );
            }
        }
    }
    if arguments.idle > 0 {
        println!(
            "\n{:<14}{:>10}{:>14}{:>18}{:>12}",
            "subject", "clients", "kB/client", "logins/s", "answered"
        );
        for subject in subjects.iter().filter(|subject| subject.holds_many) {
            scene.idle(subject, arguments.idle);
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Round {
    cpu_us: f64,
    rate: f64,
}

struct Subject {
    name: &'static str,
    port: u16,
    /// `None`: PostgreSQL itself.
    process: Option<Process>,
    /// A client needs neither a process nor a server of its own.
    holds_many: bool,
}

/// Ends with the run.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Children of a parent that is killed would stay.
        let children = family(self.0.id()).into_iter().filter(|pid| *pid != self.0.id()).collect::<Vec<_>>();
        // One that is profiled writes what it has counted when it ends by itself.
        if let Some(pid) = rustix::process::Pid::from_raw(self.0.id() as i32) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
        }
        let began = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) && began.elapsed() < LAST_WORDS_WITHIN {
            // sleep: between two looks.
            std::thread::sleep(Duration::from_millis(20));
        }
        self.0.kill().ok();
        for child in children.into_iter().filter_map(|pid| rustix::process::Pid::from_raw(pid as i32)) {
            rustix::process::kill_process(child, rustix::process::Signal::KILL).ok();
        }
        self.0.wait().ok();
    }
}

struct Scene {
    bin_dir: PathBuf,
    port: u16,
    server: Option<Process>,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new(arguments: &Arguments) -> Scene {
        let bin_dir = arguments.bin_dir.clone().unwrap_or_else(|| {
            let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
            let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
            let newest = installed.map(|entry| entry.path()).max_by_key(|path| version(path));
            newest.expect("PostgreSQL is not installed: apt-get install postgresql").join("bin")
        });
        let dir = tempfile::Builder::new().prefix("pgherd-bench-").tempdir().expect("a directory");
        give_to_postgres(dir.path());
        let mut scene = Scene { bin_dir, port: free_port(), server: None, dir };
        scene.start_server();
        scene
    }

    /// A command as the user that PostgreSQL and PgBouncer run as.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir.path()).env("PGPASSWORD", PASSWORD).env("HOME", self.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if rustix::process::geteuid().is_root() {
            let (uid, gid) = postgres_user();
            command.uid(uid).gid(gid);
        }
        command
    }

    fn start_server(&mut self) {
        let data = self.dir.path().join("data");
        let made = self
            .command(self.bin_dir.join("initdb"))
            .args(["--no-sync", "-A", "trust", "-U", USER, "-D"])
            .arg(&data)
            .status();
        assert!(made.expect("initdb runs").success(), "initdb failed");
        let socket_dir = self.dir.path().display().to_string();
        let server = self
            .command(self.bin_dir.join("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-p", &self.port.to_string(), "-h", "127.0.0.1", "-k", &socket_dir])
            .args([
                "-c",
                "cluster_name=only",
                "-c",
                "max_connections=400",
                "-c",
                "shared_buffers=256MB",
                "-c",
                "fsync=off",
            ])
            .spawn();
        self.server = Some(Process(server.expect("postgres runs")));
        let began = Instant::now();
        let state = data.join("postmaster.pid");
        while !std::fs::read_to_string(&state).is_ok_and(|text| text.contains("ready")) {
            assert!(began.elapsed() < SOON, "PostgreSQL does not start");
            // sleep: between two looks.
            std::thread::sleep(Duration::from_millis(20));
        }
        for statement in [
            "CREATE ROLE bench LOGIN PASSWORD 'bench'",
            "CREATE ROLE pgherd_proxy LOGIN",
            "GRANT SELECT (rolname, rolcanlogin, rolvaliduntil, rolpassword) ON pg_authid TO pgherd_proxy",
            "CREATE DATABASE bench OWNER bench",
        ] {
            self.psql(statement);
        }
        let lines = "local all postgres,pgherd_proxy trust\nhost all postgres,pgherd_proxy 127.0.0.1/32 trust\n\
                     local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";
        self.write("data/pg_hba.conf", lines);
        self.psql("SELECT pg_reload_conf()");
        let port = self.port.to_string();
        let filled = self
            .command("pgbench")
            .args(["-q", "-i", "-s", "5", "-h", "127.0.0.1", "-p", &port, "-U", "bench", "bench"])
            .status();
        assert!(filled.expect("pgbench is installed with postgresql").success(), "pgbench -i failed");
    }

    fn psql(&self, statement: &str) {
        let port = self.port.to_string();
        let done = self
            .command("psql")
            .args(["-X", "-q", "-h", "127.0.0.1", "-p", &port, "-U", USER, "-d", "postgres", "-c", statement])
            .status();
        assert!(done.expect("psql is installed").success(), "{statement}");
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("the directory is ours");
        give_to_postgres(&path);
        path.display().to_string()
    }

    fn subjects(&self, arguments: &Arguments) -> Vec<Subject> {
        let direct = Subject { name: "direct", port: self.port, process: None, holds_many: false };
        let mut subjects = if arguments.alone { Vec::new() } else { vec![direct] };
        // Where the checkout lies only its owner may be able to go.
        let program = self.dir.path().join("in_front_of");
        std::fs::copy(&arguments.proxy, &program).expect("the proxy's program is there");
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("the file is ours");
        let (pool, least) = match arguments.pool {
            Pool::Session => ("session", 200),
            Pool::Transaction => ("transaction", 20),
        };
        let pool_size = arguments.pool_size.unwrap_or(least).to_string();
        let server = format!("127.0.0.1:{}", self.port);
        let unix = format!("unix:{}:{}", self.dir.path().display(), self.port);
        for (name, server) in [("pgherd", &server), ("pgherd, Unix", &unix)] {
            let port = free_port();
            let mut command = self.command(&program);
            command.args([&format!("127.0.0.1:{port}"), server, &arguments.workers.to_string()]);
            command.args([pool_size.as_str(), pool]);
            subjects.extend(started(name, port, command));
        }
        if arguments.alone {
            return subjects;
        }
        let port = free_port();
        let users = self.write("users.txt", "\"bench\" \"bench\"\n");
        let file = self.write(
            "pgbouncer.ini",
            &format!(
                "[databases]\nbench = host=127.0.0.1 port={} dbname=bench\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
                 listen_port = {port}\nauth_type = scram-sha-256\nauth_file = {users}\npool_mode = {pool}\n\
                 default_pool_size = {pool_size}\nmax_client_conn = 15000\nunix_socket_dir =\nlog_connections = 0\n\
                 log_disconnections = 0\n",
                self.port
            ),
        );
        let mut command = self.command("pgbouncer");
        command.arg(file);
        subjects.extend(started("PgBouncer", port, command));
        let port = free_port();
        let file = self.write(
            "haproxy.cfg",
            &format!(
                "global\n  nbthread 1\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  \
                 timeout server 1h\nlisten bench\n  bind 127.0.0.1:{port}\n  server only 127.0.0.1:{}\n",
                self.port
            ),
        );
        let mut command = self.command("haproxy");
        command.args(["-f", &file, "-db"]);
        subjects.extend(started("HAProxy", port, command));
        subjects.extend(self.pgpool(arguments));
        for subject in &mut subjects {
            let shares = arguments.pool == Pool::Transaction;
            subject.holds_many = shares && matches!(subject.name, "pgherd" | "PgBouncer");
        }
        subjects
    }

    /// A process for each client; each keeps its server for whoever comes next with the same name.
    fn pgpool(&self, arguments: &Arguments) -> Option<Subject> {
        let (port, pcp_port) = (free_port(), free_port());
        let children = arguments.clients.iter().max().copied().unwrap_or(1) + 2;
        let dir = self.dir.path().display();
        let passwords = self.write("pool_passwd", "bench:TEXTbench\n");
        let hba = self.write("pool_hba.conf", "host all all 127.0.0.1/32 scram-sha-256\n");
        let file = self.write(
            "pgpool.conf",
            &format!(
                "backend_clustering_mode = 'raw'\nlisten_addresses = '127.0.0.1'\nport = {port}\n\
                 unix_socket_directories = '{dir}'\npcp_listen_addresses = '127.0.0.1'\npcp_port = {pcp_port}\n\
                 pcp_socket_dir = '{dir}'\nbackend_hostname0 = '127.0.0.1'\nbackend_port0 = {}\n\
                 backend_flag0 = 'DISALLOW_TO_FAILOVER'\nenable_pool_hba = on\npool_passwd = '{passwords}'\n\
                 num_init_children = {children}\nmax_pool = 1\nconnection_cache = on\nhealth_check_period = 0\n\
                 pid_file_name = '{dir}/pgpool.pid'\nlogdir = '{dir}'\nwork_dir = '{dir}'\n",
                self.port
            ),
        );
        let mut command = self.command("pgpool");
        command.args(["-n", "-f", &file, "-a", &hba]);
        started("Pgpool-II", port, command)
    }

    /// What one of so many clients costs that are there and do nothing.
    fn idle(&self, subject: &Subject, clients: usize) {
        let Some(process) = &subject.process else { return };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let conninfo =
            format!("host=127.0.0.1 port={} user=bench dbname=bench password={PASSWORD}", subject.port);
        let before = resident_bytes(process.0.id());
        let began = Instant::now();
        let (took, resident, answered) = runtime.block_on(async {
            let mut there = Vec::with_capacity(clients);
            while there.len() < clients {
                let many = AT_ONCE.min(clients - there.len());
                let coming = (0..many).map(|_| {
                    let conninfo = conninfo.clone();
                    tokio::spawn(async move {
                        let (client, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls)
                            .await
                            .expect("it lets clients in");
                        tokio::spawn(connection);
                        client
                    })
                });
                for client in coming.collect::<Vec<_>>() {
                    there.push(client.await.expect("no panic"));
                }
            }
            let (took, resident) = (began.elapsed(), resident_bytes(process.0.id()));
            let mut answered = 0;
            for client in &there {
                answered += usize::from(client.simple_query("SELECT 1").await.is_ok());
            }
            (took, resident, answered)
        });
        println!(
            "{:<14}{clients:>10}{:>14.1}{:>18.0}{answered:>12}",
            subject.name,
            resident.saturating_sub(before) as f64 / 1024.0 / clients as f64,
            clients as f64 / took.as_secs_f64(),
        );
    }

    /// `None`: it does not do what was asked of it.
    fn round(&self, subject: &Subject, protocol: &str, clients: u32, seconds: u32) -> Option<Round> {
        let cpu = || subject.process.as_ref().map_or(0.0, |process| cpu_us(process.0.id()));
        let (port, clients, seconds) = (subject.port.to_string(), clients.to_string(), seconds.to_string());
        let before = cpu();
        let output = self
            .command("pgbench")
            .args(["-S", "-n", "-M", protocol, "-c", &clients, "-j", "1", "-T", &seconds])
            .args(["-h", "127.0.0.1", "-p", &port, "-U", "bench", "bench"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .expect("pgbench is installed with postgresql");
        let used = cpu() - before;
        let said = String::from_utf8_lossy(&output.stdout);
        let number = |after: &str| {
            let rest = said.split_once(after).map(|(_, rest)| rest.trim_start())?;
            rest.split(|c: char| !(c.is_ascii_digit() || c == '.')).next()?.parse::<f64>().ok()
        };
        match (number("actually processed:"), number("tps =")) {
            (Some(count), Some(rate)) if output.status.success() => {
                Some(Round { cpu_us: used / count, rate })
            }
            _ => {
                let said = String::from_utf8_lossy(&output.stderr);
                let error = said.lines().find(|line| line.contains("error")).unwrap_or(&said);
                eprintln!("{}: {error}", subject.name);
                assert_ne!(subject.name, "pgherd", "{said}");
                None
            }
        }
    }
}

/// `None` if its program is not installed.
fn started(name: &'static str, port: u16, mut command: Command) -> Option<Subject> {
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("without {name}, which cannot be run ({error}): is it installed?");
            return None;
        }
    };
    let process = Process(child);
    let began = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(began.elapsed() < SOON, "{name} does not listen");
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(Subject { name, port, process: Some(process), holds_many: false })
}

/// Of `/proc/PID/stat`, behind the name; `None`: it is gone.
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

/// The process and its children.
fn family(pid: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_of_it = |other: &u32| *other == pid || stat(*other).is_some_and(|stat| stat[1] == pid.to_string());
    pids.filter(is_of_it).collect()
}

/// User and system time of all threads, of the children that are there and of those that were.
fn cpu_us(pid: u32) -> f64 {
    let ticks = |pid: u32, at: &[usize]| {
        let stat = stat(pid).unwrap_or_default();
        at.iter().filter_map(|at| stat.get(*at)?.parse::<f64>().ok()).sum::<f64>()
    };
    let used: f64 = family(pid)
        .into_iter()
        .map(|one| ticks(one, if one == pid { &[11, 12, 13, 14] } else { &[11, 12] }))
        .sum();
    used * 1e6 / rustix::param::clock_ticks_per_second() as f64
}

fn resident_bytes(pid: u32) -> u64 {
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm")).expect("the subject runs");
    let pages = pages.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("a number of pages") * rustix::param::page_size() as u64
}
