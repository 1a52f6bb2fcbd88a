//! Plain PostgreSQL, set up and failed over by hand: a primary and standbys of which any one must flush.
//!
//! It has two uses. It is the floor of the benchmarks: the least that a failover takes when a script does the
//! steps and nobody has to find out what happened, agree or be careful. And the kit's own workloads and
//! checkers are tried on it, also where it is broken on purpose.
//!
//! The order of a failover is that of any safe one: seal the standbys, so that nothing more of the old primary
//! can be acknowledged; only then compare what they hold; promote the one with most.
//!
//! Hazard: it is no model to run. Nothing here notices that a node is gone, or keeps two scripts from running.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::checker::{Asker, Holdings, holdings};
use crate::connection::{Login, Session};
use crate::net::{Host, Net};
use crate::process::{self, Process};
use crate::wait::wait_until;
use crate::workload::Endpoint;

const PORT: u16 = 5432;
const PASSWORD: &str = "floor";
const STEP_DEADLINE: Duration = Duration::from_secs(60);
/// Where Debian puts the server's programs of each major version.
const DEBIAN_VERSIONS: &str = "/usr/lib/postgresql";

/// The directory with PostgreSQL's server programs: `$PG_BIN_DIR`, else Debian's newest.
pub fn bin_dir() -> PathBuf {
    if let Some(given) = std::env::var_os("PG_BIN_DIR") {
        return PathBuf::from(given);
    }
    let entries = std::fs::read_dir(DEBIAN_VERSIONS).into_iter().flatten().flatten();
    let versions = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let newest = versions.max().expect("PostgreSQL is to be installed, or PG_BIN_DIR to be set");
    Path::new(DEBIAN_VERSIONS).join(newest.to_string()).join("bin")
}

/// Which standbys must flush a commit before it is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    AnyOne,
    /// None: what the checkers must find losses in.
    Async,
}

/// One PostgreSQL on one host.
#[derive(Debug)]
struct Node {
    host: Host,
    client: Host,
    data_dir: PathBuf,
    /// The script's own standing connection; closed when the server is known to be gone.
    admin: Option<Session>,
}

/// A primary, its standbys, and the hand that moves them.
#[derive(Debug)]
pub struct Plain {
    nodes: Vec<Node>,
    primary: usize,
    durability: Durability,
}

fn superuser() -> Login {
    Login { user: "postgres".to_owned(), password: PASSWORD.to_owned(), database: "postgres".to_owned() }
}

impl Plain {
    /// Sets the cluster up on these hosts, the first as primary, and waits until it is whole.
    pub fn start(net: &Net, hosts: &[&str], durability: Durability) -> Plain {
        let node = |name: &&str| {
            let host = net.host(name).clone();
            Node { data_dir: host.dir().join("data"), host, client: net.client().clone(), admin: None }
        };
        let mut this = Plain { nodes: hosts.iter().map(node).collect(), primary: 0, durability };
        this.nodes[0].initdb(&net.subnet());
        this.nodes[0].start();
        let list = this.synchronous_list(0);
        this.nodes[0].set("synchronous_standby_names", &list);
        for standby in 1..this.nodes.len() {
            this.clone_from_primary(standby);
        }
        this.wait_until_whole();
        this
    }

    /// For workloads and checkers.
    pub fn login(&self) -> Login {
        superuser()
    }

    pub fn endpoints(&self) -> Vec<Endpoint> {
        let endpoint = |node: &Node| Endpoint { node: node.host.name().to_owned(), address: node.address() };
        self.nodes.iter().map(endpoint).collect()
    }

    pub fn primary(&self) -> &str {
        self.nodes[self.primary].host.name()
    }

    pub fn admin(&mut self, node: &str) -> &mut Session {
        let index = self.index(node);
        self.nodes[index].admin()
    }

    /// What every node holds, by the script's own connections.
    #[track_caller]
    pub fn holdings(&mut self) -> Vec<Holdings> {
        let mut askers: Vec<(String, Asker<'_>)> = Vec::new();
        for node in &mut self.nodes {
            let name = node.host.name().to_owned();
            askers.push((name, Box::new(|statement| node.admin().try_run(statement))));
        }
        holdings(askers)
    }

    pub fn data_dir(&self, node: &str) -> &Path {
        &self.nodes[self.index(node)].data_dir
    }

    #[track_caller]
    fn index(&self, name: &str) -> usize {
        let position = self.nodes.iter().position(|node| node.host.name() == name);
        position.unwrap_or_else(|| panic!("there is no node {name} in this cluster"))
    }

    /// Every standby streams, and as many are counted as the durability says.
    #[track_caller]
    pub fn wait_until_whole(&mut self) {
        let standbys = (self.nodes.len() - 1).to_string();
        let counted = if self.durability == Durability::AnyOne { &standbys } else { "0" };
        let expected = vec![vec![Some(standbys.clone()), Some(counted.to_owned())]];
        let primary = self.nodes[self.primary].admin();
        wait_until("all standbys to stream", STEP_DEADLINE, || {
            let rows = primary.try_run(
                "SELECT count(*), count(*) FILTER (WHERE sync_state = 'quorum') \
                 FROM pg_stat_replication WHERE state = 'streaming'",
            )?;
            if rows == expected { Ok(()) } else { Err(format!("{rows:?}, expected {expected:?}")) }
        });
    }

    /// Kills the primary's postmaster; when it has been done.
    #[track_caller]
    pub fn kill_primary(&mut self) -> Instant {
        let old = &mut self.nodes[self.primary];
        let postmaster = old.postmaster();
        let killed_at = Instant::now();
        assert!(postmaster.signal(Signal::KILL), "fault not injected: {postmaster} was gone before");
        old.admin = None;
        killed_at
    }

    /// The hand-scripted failover: seal the standbys, promote the most advanced, point the rest at it.
    #[track_caller]
    pub fn fail_over(&mut self) {
        let survivors: Vec<usize> = (0..self.nodes.len()).filter(|index| *index != self.primary).collect();
        let positions: Vec<u64> = std::thread::scope(|scope| {
            let old = self.primary;
            let standbys = self.nodes.iter_mut().enumerate().filter(|(index, _)| *index != old);
            let sealing: Vec<_> = standbys.map(|(_, node)| scope.spawn(|| node.seal())).collect();
            sealing.into_iter().map(|thread| thread.join().expect("sealing a standby")).collect()
        });
        let most = positions.iter().max().expect("there are standbys");
        let winner =
            survivors[positions.iter().position(|position| position == most).expect("it is one of them")];
        self.promote(winner);
        for other in survivors.into_iter().filter(|other| *other != winner) {
            self.follow(other);
        }
    }

    /// The hand-scripted switchover to the next node: stop the primary cleanly, promote, point the rest at it.
    /// Returns when the stop began.
    #[track_caller]
    pub fn switch_over(&mut self) -> Instant {
        let old = self.primary;
        let next = (old + 1) % self.nodes.len();
        self.nodes[old].admin().run("CHECKPOINT");
        let postmaster = self.nodes[old].postmaster();
        let began_at = Instant::now();
        // A fast shutdown ends when the standbys have all of the WAL, so nobody has to be asked what it holds.
        assert!(postmaster.signal(Signal::INT), "{postmaster} was gone before");
        self.nodes[old].admin = None;
        postmaster.wait_gone(STEP_DEADLINE);
        self.promote(next);
        for other in (0..self.nodes.len()).filter(|other| ![old, next].contains(other)) {
            self.follow(other);
        }
        began_at
    }

    /// Makes a stopped old primary a standby again: it goes on if it was stopped cleanly, and is cloned anew if
    /// it crashed.
    #[track_caller]
    pub fn rejoin(&mut self, node: &str) {
        let index = self.index(node);
        assert!(index != self.primary, "{node} is the primary");
        let this = &mut self.nodes[index];
        process::kill_all(|| process::of_data_dir(&this.data_dir));
        if this.control_data("Database cluster state") == "shut down" {
            let conninfo = self.conninfo(index);
            self.nodes[index].write_standby_files(&conninfo);
            self.nodes[index].start();
        } else {
            std::fs::remove_dir_all(&this.data_dir).expect("the data directory is there");
            self.clone_from_primary(index);
        }
    }

    fn promote(&mut self, winner: usize) {
        let list = self.synchronous_list(winner);
        let node = &mut self.nodes[winner];
        // Before anybody can write there.
        node.set("synchronous_standby_names", &list);
        node.admin().run("SELECT pg_promote(false)");
        self.primary = winner;
    }

    fn follow(&mut self, standby: usize) {
        let conninfo = self.conninfo(standby);
        self.nodes[standby].set("primary_conninfo", &conninfo);
    }

    fn clone_from_primary(&mut self, standby: usize) {
        let source = self.nodes[self.primary].host.address().to_string();
        let conninfo = self.conninfo(standby);
        let node = &mut self.nodes[standby];
        node.host
            .command(bin_dir().join("pg_basebackup"))
            .args(["--checkpoint=fast", "--no-sync", "--host", &source, "--username=postgres", "--pgdata"])
            .arg(&node.data_dir)
            .env("PGPASSWORD", PASSWORD)
            .as_postgres()
            .run();
        node.write_standby_files(&conninfo);
        node.start();
    }

    fn conninfo(&self, standby: usize) -> String {
        let (source, name) = (self.nodes[self.primary].host.address(), self.nodes[standby].host.name());
        format!("host={source} port={PORT} user=postgres password={PASSWORD} application_name={name}")
    }

    fn synchronous_list(&self, primary: usize) -> String {
        if self.durability == Durability::Async {
            return String::new();
        }
        let others = self.nodes.iter().enumerate().filter(|(index, _)| *index != primary);
        let names: Vec<&str> = others.map(|(_, node)| node.host.name()).collect();
        format!("ANY 1 ({})", names.join(", "))
    }
}

impl Node {
    fn address(&self) -> SocketAddr {
        (self.host.address(), PORT).into()
    }

    fn initdb(&self, subnet: &str) {
        let password_file = self.host.dir().join("password");
        std::fs::write(&password_file, PASSWORD).expect("the host's directory is there");
        self.host
            .command(bin_dir().join("initdb"))
            .args(["--username=postgres", "--auth=scram-sha-256", "--data-checksums", "--no-sync"])
            .arg(format!("--pwfile={}", password_file.display()))
            .arg(format!("--pgdata={}", self.data_dir.display()))
            .as_postgres()
            .run();
        let settings = format!(
            "listen_addresses = '*'\nport = {PORT}\nunix_socket_directories = ''\nwal_level = replica\n\
             max_wal_senders = 10\nwal_keep_size = '256MB'\nhot_standby = on\nrestart_after_crash = off\n\
             wal_retrieve_retry_interval = '100ms'\nlog_line_prefix = '%m [%p] '\nlog_replication_commands = on\n"
        );
        append(&self.data_dir.join("postgresql.conf"), &settings);
        let rules =
            format!("host all all {subnet} scram-sha-256\nhost replication all {subnet} scram-sha-256\n");
        append(&self.data_dir.join("pg_hba.conf"), &rules);
    }

    #[track_caller]
    fn start(&mut self) {
        let log = self.host.dir().join("postgresql.log");
        self.host
            .command(bin_dir().join("postgres"))
            .arg("-D")
            .arg(&self.data_dir)
            .log_to(&log)
            .as_postgres()
            .spawn();
        let (client, address) = (&self.client, self.address());
        let what = format!("PostgreSQL on {} to take connections", self.host.name());
        self.admin = Some(wait_until(&what, STEP_DEADLINE, || {
            Session::open(client, address, &superuser()).map_err(|error| format!("{error}\n{}", tail(&log)))
        }));
    }

    #[track_caller]
    fn admin(&mut self) -> &mut Session {
        self.admin.as_mut().unwrap_or_else(|| panic!("PostgreSQL on {} does not run", self.host.name()))
    }

    #[track_caller]
    fn postmaster(&self) -> Process {
        process::postmaster_of(&self.data_dir)
            .unwrap_or_else(|| panic!("PostgreSQL on {} does not run", self.host.name()))
    }

    fn set(&mut self, name: &str, value: &str) {
        let admin = self.admin();
        admin.run(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        admin.run("SELECT pg_reload_conf()");
    }

    /// Receives nothing more, and says up to where it has.
    fn seal(&mut self) -> u64 {
        self.set("primary_conninfo", "");
        // A reload alone does not stop a receiver while replay has to wait for something else.
        let receiver = self.admin().run("SELECT pid FROM pg_stat_wal_receiver");
        if let Some([Some(pid)]) = receiver.first().map(Vec::as_slice)
            && let Some(receiver) = Process::by_pid(pid.parse().expect("a process id is a number"))
        {
            receiver.signal(Signal::TERM);
            receiver.wait_gone(STEP_DEADLINE);
        }
        let position = self.admin().value("SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn");
        position.and_then(|bytes| bytes.parse().ok()).expect("a standby that has streamed has a position")
    }

    fn write_standby_files(&self, conninfo: &str) {
        let settings = format!("primary_conninfo = '{conninfo}'\n");
        std::fs::write(self.data_dir.join("postgresql.auto.conf"), settings)
            .expect("the data directory is there");
        let signal = self.data_dir.join("standby.signal");
        std::fs::write(&signal, "").expect("the data directory is there");
        crate::command::give_to_postgres(&signal);
    }

    fn control_data(&self, field: &str) -> String {
        let text =
            self.host.command(bin_dir().join("pg_controldata")).arg(&self.data_dir).as_postgres().run();
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("pg_controldata has no {field}:\n{text}")).trim().to_owned()
    }
}

fn append(path: &Path, text: &str) {
    use std::io::Write;
    let mut file = std::fs::File::options()
        .append(true)
        .open(path)
        .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
    file.write_all(text.as_bytes())
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}

/// The end of a log, for a failure message.
pub(crate) fn tail(log: &Path) -> String {
    const LINES: usize = 20;
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
