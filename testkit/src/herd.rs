//! A herd of the product, on hosts of its own, operated as people operate it: by its command line.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use pgherd_testkit::{Herd, Workload};
//! let herd = Herd::of(&["a", "b", "c"]).start();
//! let workload = herd.start_workload();
//! herd.kill_postmaster(&herd.primary());
//! workload.wait_for_writes(Duration::from_secs(5));
//! herd.wait_until_whole(Duration::from_secs(60));
//! herd.verdict(&workload.stop()).assert_clean();
//! herd.assert_quiet(&["PostgreSQL was killed"]);
//! ```
//!
//! Agents run as user postgres, each on its host, started and restarted by the test in the place of an init
//! system. Nothing here knows how the product works inside; processes are found by what they are.
//!
//! Hazard: a helper that mends something, or waits where an operator would not, hides a fault of the product.

mod logs;
mod reports;
mod status;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

pub use reports::{Check, Explanation, HistoryEntry};
pub use status::{Cluster, Durability, Member, Status, Store, StoreMember, Vip};

use crate::bucket;
use crate::checker::{Asker, Verdict, holdings};
use crate::command::{HostCommand, give_to_postgres};
use crate::connection::{Login, Rows, Session};
use crate::history::History;
use crate::net::{Host, Net, lock};
use crate::plain::bin_dir;
use crate::process::{self, Process};
use crate::volume::Volume;
use crate::wait::{try_until, wait_until};
use crate::workload::{Endpoint, Plan, Workload, create_tables};

/// Below a host's directory.
const STATE_DIR: &str = "pgherd";
const WAL_DIR: &str = "wal";
const REPOSITORY_DIR: &str = "repository";
/// Below the network's directory: of a bucket, the same for all hosts.
const KEYS_DIR: &str = "keys";
/// Of [`Layout::with_bucket`].
pub const BUCKET_HOST: &str = "s3";
const CLUSTER: &str = "main";
const DATABASE: &str = "app";
pub const POSTGRES_PORT: u16 = 5432;
/// Of a proxy, unless its file says otherwise; it leads to the primary.
pub const PROXY_PORT: u16 = 9999;
/// As [`PROXY_PORT`], for reads; it leads to standbys.
pub const PROXY_READ_PORT: u16 = 9998;
pub const API_PORT: u16 = 8009;
/// initdb, two clones and the elections of the store take some seconds; a busy machine takes a few times that.
const START_DEADLINE: Duration = Duration::from_secs(180);
/// A question to an agent, and the start of the program that asks it.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// Each look starts a process; more often would take the CPU from those that are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Names a directory in which the logs of every herd are kept, also of one that did well.
const KEEP_LOGS: &str = "PGHERD_KEEP_LOGS";

/// A herd to be started: names, and what its file says beyond the defaults.
#[derive(Clone, Debug)]
pub struct Layout {
    nodes: Vec<(String, Vec<String>)>,
    witnesses: Vec<String>,
    times: Vec<String>,
    cluster: Vec<String>,
    proxy: Vec<String>,
    parameters: Vec<String>,
    volumes: Vec<(String, Place, Medium, u64)>,
    vip: bool,
    keeper: Option<String>,
    bucket: bool,
    backup: Vec<String>,
}

/// What of a node lies on a volume of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// All of it: the agent's state, the store's log, PostgreSQL.
    Everything,
    /// `pg_wal` alone.
    Wal,
    /// A keeper's repository ([`Layout::with_keeper`]).
    Repository,
}

/// What the volume is made of; see [`Volume`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    Memory,
    Disk,
}

impl Layout {
    pub fn with_witness(mut self, name: &str) -> Layout {
        self.witnesses.push(name.to_owned());
        self
    }

    /// A line of `[times]`, such as `lease = "5s"`.
    pub fn with_time(mut self, line: &str) -> Layout {
        self.times.push(line.to_owned());
        self
    }

    /// A line of `[[cluster]]`, such as `needed = 2`.
    pub fn with_cluster(mut self, line: &str) -> Layout {
        self.cluster.push(line.to_owned());
        self
    }

    /// A line of `[proxy]`, such as `commit_check = true`.
    pub fn with_proxy(mut self, line: &str) -> Layout {
        self.proxy.push(line.to_owned());
        self
    }

    /// A line of a node's `[[cluster.node]]`, such as `delay = "20s"`.
    #[track_caller]
    pub fn with_node(mut self, name: &str, line: &str) -> Layout {
        let node = self.nodes.iter_mut().find(|(known, _)| known == name);
        node.unwrap_or_else(|| panic!("there is no node {name}")).1.push(line.to_owned());
        self
    }

    /// A PostgreSQL setting for all nodes, as `name = value` of TOML.
    pub fn with_parameter(mut self, assignment: &str) -> Layout {
        self.parameters.push(assignment.to_owned());
        self
    }

    /// An address that moves with the gate ([`Net::spare_address`]), and agents that are given what it takes to set it.
    pub fn with_vip(mut self) -> Layout {
        self.vip = true;
        self
    }

    /// A witness with the herd's repository on its disk ([`Herd::repository`]).
    pub fn with_keeper(mut self, name: &str) -> Layout {
        self.keeper = Some(name.to_owned());
        self.with_witness(name)
    }

    /// The herd's repository is in a bucket, on the host [`BUCKET_HOST`], which has no agent.
    pub fn with_bucket(mut self) -> Layout {
        self.bucket = true;
        self
    }

    /// A line of `[backup]`, of a herd that has a keeper or a bucket, such as `voter = true`.
    pub fn with_backup(mut self, line: &str) -> Layout {
        self.backup.push(line.to_owned());
        self
    }

    /// Puts a part of a node on a volume of its own, which can then be filled, and a disk can hang or die.
    pub fn with_volume(mut self, node: &str, place: Place, medium: Medium, size_bytes: u64) -> Layout {
        self.volumes.push((node.to_owned(), place, medium, size_bytes));
        self
    }

    fn make_volumes(&self, net: &Net) -> Vec<(String, Volume)> {
        let make = |(node, place, medium, size_bytes): &(String, Place, Medium, u64)| {
            let make = match medium {
                Medium::Memory => Volume::tmpfs,
                Medium::Disk => Volume::disk,
            };
            let name = match place {
                Place::Everything => STATE_DIR,
                Place::Wal => WAL_DIR,
                Place::Repository => REPOSITORY_DIR,
            };
            (node.clone(), make(net.host(node), name, *size_bytes))
        };
        self.volumes.iter().map(make).collect()
    }

    /// What the agent of a host knows before it is asked to join.
    fn write_agent_file(&self, herd: &Herd, agent: &str) {
        let dir = herd.dir(agent);
        let mut text = format!("name = \"{agent}\"\nstate_dir = \"{}\"\n", dir.display());
        if self.volumes.iter().any(|(node, place, ..)| node == agent && *place == Place::Wal) {
            let wal = herd.host(agent).dir().join(WAL_DIR).join("pg_wal");
            writeln!(text, "wal_dir = \"{}\"", wal.display()).expect("a string takes any text");
        }
        if agent != herd.agents[0] {
            let first = herd.host(&herd.agents[0]).address();
            writeln!(text, "join = [\"{first}:{API_PORT}\"]").expect("a string takes any text");
        }
        let file = dir.join("agent.toml");
        // A volume may be mounted there already.
        std::fs::create_dir_all(&dir).expect("the host's directory is there");
        std::fs::write(&file, text).expect("the agent's directory is there");
        give_to_postgres(&dir);
        give_to_postgres(&file);
    }

    fn hosts(&self) -> Vec<&str> {
        self.nodes.iter().map(|(name, _)| name).chain(&self.witnesses).map(String::as_str).collect()
    }

    /// Where it is, as the herd file says it.
    fn repository(&self, net: &Net) -> Option<String> {
        if self.bucket {
            return Some(bucket::lines(net.host(BUCKET_HOST), &net.dir().join(KEYS_DIR)));
        }
        let keeper = self.keeper.as_ref()?;
        let place = net.host(keeper).dir().join(REPOSITORY_DIR);
        Some(format!("repository = \"file://{}\"\nkeeper = \"{keeper}\"", place.display()))
    }

    fn herd_file(&self, net: &Net) -> String {
        let mut text = String::from("name = \"story\"\n\n[times]\n");
        let mut line = |line: &str| writeln!(text, "{line}").expect("a string takes any text");
        self.times.iter().for_each(|time| line(time));
        line("\n[postgres]");
        line(&format!("bin_dir = \"{}\"", bin_dir().display()));
        line(&format!("hba = [\"host all all {} scram-sha-256\"]", net.subnet()));
        line(&format!("parameters = {{ {} }}", self.parameters.join(", ")));
        line("\n[proxy]");
        self.proxy.iter().for_each(|setting| line(setting));
        if let Some(repository) = self.repository(net) {
            line("\n[backup]\nschedule = \"never\"\nretention = \"REDUNDANCY 3\"");
            line(&repository);
            self.backup.iter().for_each(|setting| line(setting));
        }
        for witness in &self.witnesses {
            line("\n[[witness]]");
            line(&format!("name = \"{witness}\"\nhost = \"{}\"", net.host(witness).address()));
        }
        line("\n[[cluster]]");
        line(&format!("name = \"{CLUSTER}\""));
        self.cluster.iter().for_each(|setting| line(setting));
        for (name, settings) in &self.nodes {
            line("\n[[cluster.node]]");
            line(&format!("name = \"{name}\"\nhost = \"{}\"", net.host(name).address()));
            settings.iter().for_each(|setting| line(setting));
        }
        if self.vip {
            line(&vip_table(net.spare_address()));
        }
        line("\n[[cluster.database]]");
        line(&format!("name = \"{DATABASE}\"\nowner = \"{DATABASE}\""));
        text
    }

    /// Makes the hosts and starts the herd as an operator does: `init` on the first node, its agent, a token
    /// for each other, their agents. Returns when it is whole.
    #[track_caller]
    pub fn start(self) -> Herd {
        let mut hosts = self.hosts();
        hosts.extend(self.bucket.then_some(BUCKET_HOST));
        let net = Net::new(&hosts);
        let program = install(&net);
        let file = net.dir().join("herd.toml");
        std::fs::write(&file, self.herd_file(&net)).expect("the directory of the network is there");
        let nodes: Vec<String> = self.nodes.iter().map(|(name, _)| name.clone()).collect();
        let agents: Vec<String> = self.hosts().into_iter().map(str::to_owned).collect();
        let volumes = self.make_volumes(&net);
        let (login, privileged) = (Mutex::new(None), self.vip);
        let herd = Herd { volumes, net, program, file, nodes, agents, login, privileged };
        for agent in &herd.agents {
            self.write_agent_file(&herd, agent);
        }
        if let Some(keeper) = &self.keeper {
            let place = herd.repository(keeper);
            // A volume may be mounted there already.
            std::fs::create_dir_all(&place).expect("the host's directory is there");
            give_to_postgres(&place);
        }
        if self.bucket {
            bucket::start(herd.host(BUCKET_HOST), herd.net.client(), &herd.net.dir().join(KEYS_DIR));
        }
        let first = herd.agents[0].clone();
        herd.pgherd(&first).args(["init", "--herd"]).arg(&herd.file).run();
        herd.start_agent(&first);
        for other in &herd.agents[1..] {
            herd.join(other, &first);
        }
        herd.wait_until_whole(START_DEADLINE);
        herd.create_tables();
        herd
    }
}

/// The part of a herd file that asks for an address that moves.
pub fn vip_table(address: std::net::Ipv4Addr) -> String {
    format!("\n[cluster.vip]\naddress = \"{address}/24\"\ninterface = \"eth0\"")
}

/// Copies the program to where user postgres can run it.
#[track_caller]
fn install(net: &Net) -> PathBuf {
    let built = std::env::var_os("PGHERD_BIN").map_or_else(built_program, PathBuf::from);
    let program = net.dir().join("pgherd");
    std::fs::copy(&built, &program)
        .unwrap_or_else(|error| panic!("cannot copy {} (cargo build -p pgherd): {error}", built.display()));
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("it was just made");
    program
}

/// What `cargo build` makes, beside the program that runs now.
fn built_program() -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let profile = own.ancestors().skip(1).find(|directory| directory.join("deps").is_dir());
    profile.expect("tests and benchmarks lie in cargo's target directory").join("pgherd")
}

/// A herd that runs.
#[derive(Debug)]
pub struct Herd {
    net: Net,
    volumes: Vec<(String, Volume)>,
    program: PathBuf,
    file: PathBuf,
    /// Nodes with PostgreSQL.
    nodes: Vec<String>,
    /// Nodes and witnesses.
    agents: Vec<String>,
    login: Mutex<Option<Login>>,
    /// Agents are given capabilities.
    privileged: bool,
}

impl Herd {
    /// The first words of a story: a herd of these nodes.
    pub fn of(nodes: &[&str]) -> Layout {
        Layout {
            nodes: nodes.iter().map(|name| ((*name).to_owned(), Vec::new())).collect(),
            witnesses: Vec::new(),
            times: Vec::new(),
            cluster: Vec::new(),
            proxy: Vec::new(),
            parameters: Vec::new(),
            volumes: Vec::new(),
            vip: false,
            keeper: None,
            bucket: false,
            backup: Vec::new(),
        }
    }

    /// The network, for its faults.
    pub fn net(&self) -> &Net {
        &self.net
    }

    pub fn nodes(&self) -> Vec<&str> {
        self.nodes.iter().map(String::as_str).collect()
    }

    /// Nodes and witnesses.
    pub fn agents(&self) -> Vec<&str> {
        self.agents.iter().map(String::as_str).collect()
    }

    pub fn host(&self, name: &str) -> &Host {
        self.net.host(name)
    }

    /// The herd file that it was started with.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The directory of an agent: its state, logs, and by default PostgreSQL's data.
    pub fn dir(&self, agent: &str) -> PathBuf {
        self.host(agent).dir().join(STATE_DIR)
    }

    /// The volume that a node was given.
    #[track_caller]
    pub fn volume(&self, node: &str) -> &Volume {
        let found = self.volumes.iter().find(|(of, _)| of == node);
        &found.unwrap_or_else(|| panic!("{node} has no volume of its own")).1
    }

    /// Where a keeper has the repository.
    pub fn repository(&self, keeper: &str) -> PathBuf {
        self.host(keeper).dir().join(REPOSITORY_DIR)
    }

    pub fn data_dir(&self, node: &str) -> PathBuf {
        self.dir(node).join("data")
    }

    // ---- the operator's hands

    /// The command line on an agent's host, with that agent's directory, as its user.
    pub fn pgherd(&self, agent: &str) -> HostCommand {
        let command = self.host(agent).command(&self.program).as_postgres();
        command.env("PGHERD_DIR", self.dir(agent)).env("RUST_BACKTRACE", "1")
    }

    /// Starts an agent as an init system does.
    #[track_caller]
    pub fn start_agent(&self, name: &str) -> Process {
        self.agent_command(name, self.privileged).log_to(&self.agent_log(name)).spawn()
    }

    /// As [`Herd::start_agent`], for one that was given nothing beyond its user.
    #[track_caller]
    pub fn start_unprivileged_agent(&self, name: &str) -> Process {
        self.agent_command(name, false).log_to(&self.agent_log(name)).spawn()
    }

    fn agent_command(&self, name: &str, privileged: bool) -> HostCommand {
        if !privileged {
            return self.pgherd(name).arg("agent");
        }
        // As systemd does with `User=` and `AmbientCapabilities=`.
        let capabilities = "+net_admin,+net_raw";
        let user = ["--reuid=postgres", "--regid=postgres", "--clear-groups"].map(str::to_owned);
        let given = ["--inh-caps", "--ambient-caps"].map(|set| format!("{set}={capabilities}"));
        let command =
            self.host(name).command("setpriv").args(user).args(given).arg(&self.program).arg("agent");
        let command = command.env("HOME", self.host(name).dir()).env("USER", "postgres");
        command.env("PGHERD_DIR", self.dir(name)).env("RUST_BACKTRACE", "1")
    }

    /// Joins `name` with a token from `member`, and starts its agent.
    #[track_caller]
    pub fn join(&self, name: &str, member: &str) {
        let what = format!("{member} to give a token for {name}");
        let token = wait_until(&what, START_DEADLINE, || {
            let output = self.pgherd(member).args(["token", name]).within(ANSWER_DEADLINE).try_output();
            let output = output.map_err(|overdue| overdue.to_string())?;
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            if output.status.success() { Ok(output.stdout) } else { Err(words) }
        });
        let token_file = self.host(name).dir().join("token");
        std::fs::write(&token_file, token).expect("the host's directory is there");
        give_to_postgres(&token_file);
        self.agent_command(name, self.privileged)
            .arg("--token-file")
            .arg(&token_file)
            .log_to(&self.agent_log(name))
            .spawn();
    }

    /// A proxy on the client's host, as on any host that runs nothing else; the address that leads to the primary.
    #[track_caller]
    pub fn start_proxy(&self, name: &str) -> (Process, SocketAddr) {
        let (client, first) = (self.net.client(), &self.agents[0]);
        let dir = self.dir(first).join(format!("proxy-{name}"));
        let host = client.address().to_string();
        self.pgherd(first).args(["proxy", "add", name, "--host", &host, "--to"]).arg(&dir).run();
        let log = client.dir().join(format!("proxy-{name}.log"));
        let command = client.command(&self.program).as_postgres().env("RUST_BACKTRACE", "1");
        let process = command.arg("proxy").arg("--dir").arg(&dir).log_to(&log).spawn();
        let address = SocketAddr::from((client.address(), PROXY_PORT));
        wait_until(&format!("the proxy {name} to lead to the primary"), START_DEADLINE, || {
            Session::open(client, address, &self.login()).map(drop)
        });
        (process, address)
    }

    /// `pgherd switchover`, to a node or to the best one; waits for its end.
    #[track_caller]
    pub fn switch_over(&self, to: Option<&str>) {
        let by = self.primary();
        let command = self.pgherd(&by).args(["switchover", "--yes"]);
        match to {
            Some(to) => command.args(["--to", to]).run(),
            None => command.run(),
        };
    }

    // ---- what it says

    /// What one agent answers.
    pub fn status_from(&self, agent: &str) -> Result<Status, String> {
        self.json(agent, "status")
    }

    /// Starts the agent of every host with power that has none, as an init system does when one has ended by
    /// itself; their names.
    pub fn revive_agents(&self) -> Vec<String> {
        let lost = |name: &&String| !self.net.is_dark(name) && self.find_agent(name).is_none();
        let lost: Vec<String> = self.agents.iter().filter(lost).cloned().collect();
        for name in &lost {
            self.start_agent(name);
        }
        lost
    }

    /// What the first agent says that answers, those on hosts without processes left out.
    pub fn status(&self) -> Result<Status, String> {
        let mut errors = Vec::new();
        for agent in &self.agents {
            if self.find_agent(agent).is_none() {
                errors.push(format!("{agent} has no agent running"));
                continue;
            }
            match self.status_from(agent) {
                Ok(status) => return Ok(status),
                Err(error) => errors.push(error),
            }
        }
        Err(errors.join("\n"))
    }

    /// The primary with an open gate, waiting for one if there is none.
    #[track_caller]
    pub fn primary(&self) -> String {
        let mut primary = String::new();
        self.wait_for("a primary", START_DEADLINE, |status| {
            primary = status.cluster().primary.clone().ok_or("there is none")?;
            Ok(())
        });
        primary
    }

    /// The nodes that are not primary, in the order of the herd file.
    #[track_caller]
    pub fn standbys(&self) -> Vec<String> {
        let primary = self.primary();
        self.nodes.iter().filter(|node| **node != primary).cloned().collect()
    }

    /// Waits until the answer of the herd satisfies `condition`; the last answer and the ends of all logs are
    /// in the failure.
    #[track_caller]
    pub fn wait_for(
        &self,
        what: &str,
        deadline: Duration,
        mut condition: impl FnMut(&Status) -> Result<(), String>,
    ) -> Status {
        let mut last = None;
        let waited = try_until(deadline, LOOK_INTERVAL, || {
            let status = self.status()?;
            let met = condition(&status);
            last = Some(status.clone());
            met.map(|()| status)
        });
        match waited {
            Ok(status) => status,
            Err(reason) => {
                let last = last.map_or_else(|| "nothing".to_owned(), |status| status.to_string());
                let seconds = deadline.as_secs_f64();
                panic!(
                    "waited {seconds:.1} s for {what}: {reason}\n--- last answer\n{last}\n{}",
                    self.log_tails()
                )
            }
        }
    }

    /// Waits for full redundancy: gate open, every standby streams on the primary's timeline and counts.
    #[track_caller]
    pub fn wait_until_whole(&self, deadline: Duration) -> Status {
        self.wait_for("the herd to be whole", deadline, |status| {
            let agents = self.agents.len();
            let known = status.store.members.len();
            if known != agents {
                return Err(format!("{known} of {agents} agents are members of the store"));
            }
            status.whole()
        })
    }

    // ---- faults of processes; those of the network are `net()`'s

    /// kill -9 of the postmaster alone.
    #[track_caller]
    pub fn kill_postmaster(&self, node: &str) -> std::time::Instant {
        let postmaster = self.postmaster(node);
        let killed_at = std::time::Instant::now();
        assert!(
            postmaster.signal(rustix::process::Signal::KILL),
            "fault not injected: {postmaster} was gone before"
        );
        killed_at
    }

    /// The same, until the last process it leaves has gone: a backend may answer once more before it finds out.
    /// Returns from when on nobody can.
    #[track_caller]
    pub fn kill_postmaster_and_backends(&self, node: &str) -> std::time::Instant {
        let family = process::of_data_dir(&self.data_dir(node));
        self.kill_postmaster(node);
        for process in family {
            process.wait_gone(Duration::from_secs(20));
        }
        std::time::Instant::now()
    }

    #[track_caller]
    pub fn postmaster(&self, node: &str) -> Process {
        process::postmaster_of(&self.data_dir(node))
            .unwrap_or_else(|| panic!("fault not injected: PostgreSQL does not run on {node}"))
    }

    /// A process of PostgreSQL by its title, such as `checkpointer`.
    #[track_caller]
    pub fn postgres_process(&self, node: &str, title: &str) -> Process {
        let family = process::of_data_dir(&self.data_dir(node));
        let found = family.into_iter().find(|process| process.command_line().join(" ").contains(title));
        found.unwrap_or_else(|| {
            panic!("fault not injected: no process of PostgreSQL on {node} is called {title}")
        })
    }

    #[track_caller]
    pub fn agent(&self, name: &str) -> Process {
        self.find_agent(name).unwrap_or_else(|| panic!("fault not injected: no agent runs on {name}"))
    }

    pub fn find_agent(&self, name: &str) -> Option<Process> {
        self.own_processes(name, "agent").into_iter().next()
    }

    /// The fence beside a primary's agent.
    #[track_caller]
    pub fn fence(&self, node: &str) -> Process {
        self.find_fence(node).unwrap_or_else(|| panic!("fault not injected: no fence runs on {node}"))
    }

    pub fn find_fence(&self, node: &str) -> Option<Process> {
        self.own_processes(node, "fence").into_iter().next()
    }

    /// Processes of the product that run a command. Of a process and its children, the parent is the first.
    fn own_processes(&self, host: &str, command: &str) -> Vec<Process> {
        let runs = |process: &Process| {
            let line = process.command_line();
            let program = line.first().and_then(|program| Path::new(program).file_name()?.to_str());
            program.is_some_and(|program| program.starts_with("pgherd"))
                && line.iter().skip(1).find(|word| !word.starts_with('-')).map(String::as_str)
                    == Some(command)
        };
        let mut found: Vec<Process> = self.host(host).processes().into_iter().filter(runs).collect();
        let pids: HashSet<i32> = found.iter().map(Process::pid).collect();
        found.sort_by_key(|process| process.parent().is_some_and(|parent| pids.contains(&parent)));
        found
    }

    /// kill -9 of everything that runs on a host, in one instant: agent, fence and PostgreSQL. Its kernel
    /// lives, and closes what they had open.
    #[track_caller]
    pub fn kill_everything(&self, name: &str) {
        let host = self.host(name);
        let frozen = host.freeze();
        let processes = host.processes();
        assert!(!processes.is_empty(), "fault not injected: nothing runs on {name}");
        for process in &processes {
            process.signal(rustix::process::Signal::KILL);
        }
        frozen.thaw();
        for process in &processes {
            process.wait_gone(ANSWER_DEADLINE);
        }
    }

    /// The power goes; see [`Net::crash`].
    #[track_caller]
    pub fn crash(&self, name: &str) {
        self.net.crash(name);
    }

    /// The power comes back, and the init system starts the agent.
    #[track_caller]
    pub fn power_on(&self, name: &str) {
        self.net.power_on(name);
        self.start_agent(name);
    }

    // ---- clients

    pub fn endpoints(&self) -> Vec<Endpoint> {
        let endpoint = |node: &String| Endpoint { node: node.clone(), address: self.address(node) };
        self.nodes.iter().map(endpoint).collect()
    }

    fn address(&self, node: &str) -> SocketAddr {
        (self.host(node).address(), POSTGRES_PORT).into()
    }

    /// The application's role, with the password that the herd has made for it.
    #[track_caller]
    pub fn login(&self) -> Login {
        let mut known = lock(&self.login);
        known.get_or_insert_with(|| self.read_login()).clone()
    }

    #[track_caller]
    fn read_login(&self) -> Login {
        let path = self.dir(&self.agents[0]).join("pgpass");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("the herd has no passwords for clients in {}: {error}", path.display())
        });
        let mine = text.lines().filter_map(|line| {
            let fields: Vec<&str> = line.splitn(5, ':').collect();
            let [_host, _port, database, user, password] = fields[..] else { return None };
            (["*", DATABASE].contains(&database) && user == DATABASE).then(|| password.to_owned())
        });
        let password = mine.into_iter().next();
        let password = password.unwrap_or_else(|| panic!("{} has no password of {DATABASE}", path.display()));
        Login { user: DATABASE.to_owned(), password, database: DATABASE.to_owned() }
    }

    /// A connection of the application to one node.
    #[track_caller]
    pub fn session(&self, node: &str) -> Session {
        wait_until(&format!("{node} to take a connection"), START_DEADLINE, || {
            Session::open(self.net.client(), self.address(node), &self.login())
        })
    }

    pub fn plan(&self) -> Plan {
        Plan::new(self.endpoints(), self.login())
    }

    /// Makes the workload's tables, empty, on the primary.
    #[track_caller]
    pub fn create_tables(&self) {
        create_tables(&mut self.session(&self.primary()));
    }

    /// Starts the usual clients: some that look for the primary, one that stays with each node, a register.
    #[track_caller]
    pub fn start_workload(&self) -> Workload {
        self.start_workload_with(self.plan())
    }

    /// As [`Herd::start_workload`], with other clients.
    #[track_caller]
    pub fn start_workload_with(&self, plan: Plan) -> Workload {
        let workload = Workload::start(self.net.client(), plan);
        workload.wait_for_writes(ANSWER_DEADLINE);
        workload
    }

    /// Judges what clients saw against what every node holds. The herd has to be whole.
    #[track_caller]
    pub fn verdict(&self, history: &History) -> Verdict {
        let mut askers: Vec<(String, Asker<'_>)> = Vec::new();
        for node in &self.nodes {
            askers.push((node.clone(), Box::new(|statement| self.ask_locally(node, statement))));
        }
        Verdict::of(history, &holdings(askers))
    }

    /// As the superuser on the node's own host, who comes in whether or not clients do.
    pub fn ask_locally(&self, node: &str, statement: &str) -> Result<Rows, String> {
        const SEPARATOR: char = '\t';
        let output = self
            .host(node)
            .command(bin_dir().join("psql"))
            .args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--set=ON_ERROR_STOP=1"])
            .arg(format!("--field-separator={SEPARATOR}"))
            .arg(format!("--host={}", self.dir(node).join("run").display()))
            .args(["--username=postgres", "--dbname", DATABASE, "--command", statement])
            .as_postgres()
            .try_output()
            .map_err(|overdue| overdue.to_string())?;
        if !output.status.success() {
            return Err(format!("{node}: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let cell = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Ok(text.lines().map(|line| line.split(SEPARATOR).map(cell).collect()).collect())
    }

    // ---- logs

    pub fn agent_log(&self, name: &str) -> PathBuf {
        self.host(name).dir().join("agent.log")
    }

    /// The ends of all logs of all hosts.
    pub fn log_tails(&self) -> String {
        let mut text = String::new();
        for agent in &self.agents {
            for path in logs::below(self.host(agent).dir()) {
                write!(text, "--- {}\n{}\n", path.display(), logs::tail(&path))
                    .expect("a string takes any text");
            }
        }
        text
    }

    /// Copies all logs of all hosts to a directory that outlives the herd.
    pub fn copy_logs(&self, to: &Path) -> std::io::Result<()> {
        let hosts = self.agents.iter().map(|agent| self.host(agent)).chain([self.net.client()]);
        for path in hosts.flat_map(|host| logs::below(host.dir())) {
            let name = path.strip_prefix(self.net.dir()).unwrap_or(&path).to_string_lossy().replace('/', "-");
            std::fs::copy(&path, to.join(name))?;
        }
        Ok(())
    }

    /// Fails the test if an agent logged an ERROR or a WARN that contains none of the expected texts.
    #[track_caller]
    pub fn assert_quiet(&self, expected: &[&str]) {
        let mut found = String::new();
        for agent in &self.agents {
            let log = std::fs::read(self.agent_log(agent)).unwrap_or_default();
            for line in logs::unexpected(&String::from_utf8_lossy(&log), expected) {
                writeln!(found, "{agent}: {line}").expect("a string takes any text");
            }
        }
        assert!(found.is_empty(), "agents logged what nobody expected:\n{found}");
    }
}

impl Drop for Herd {
    /// A failed test leaves its logs behind; the directories of the hosts go with the network.
    fn drop(&mut self) {
        let wanted = std::env::var_os(KEEP_LOGS);
        if wanted.is_none() && !std::thread::panicking() {
            return;
        }
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("herd").replace("::", "-");
        let directory = wanted.map_or_else(|| std::env::temp_dir().join("pgherd-failed"), PathBuf::from);
        let directory = directory.join(test);
        let kept = std::fs::create_dir_all(&directory).and_then(|()| self.copy_logs(&directory));
        let told = match kept {
            Ok(()) => format!("all logs are in {}\n", directory.display()),
            Err(error) => format!("cannot keep the logs in {}: {error}\n", directory.display()),
        };
        // Nobody reads a stderr that is closed.
        drop(std::io::stderr().write_all(told.as_bytes()));
    }
}
