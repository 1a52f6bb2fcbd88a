//! The agents' processes: how each is started, found again, and asked for what a person would ask.
//!
//! An agent is started as a person would on a host of its own: `pgherd init` for the first, a token and
//! `pgherd agent` for the others. So the way that is tried out here is the one that production goes.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pgherd_api::Client;
use pgherd_api::join::TokenRequest;
use pgherd_core::types::NodeName;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use super::LocalError;
use super::account::Account;
use super::home::{Home, give_to};
use super::passfile;
use super::ports::{NodePorts, Ports};
use super::process::{self, ProcessId, Running};
use crate::files::agent::{AgentFile, HostPort, Listen};
use crate::identity::{Identity, IdentityError};
use crate::paths;
use crate::pki::{read_limited, write_private, write_public};

/// The command that agents are started with.
const AGENT: &str = "agent";
/// Keys, a store with one member and its first transaction; most of it is waiting for the disk.
const INIT_WITHIN: Duration = Duration::from_secs(60);
/// It is used at once.
const TOKEN_VALID_S: u64 = 300;
const TOKEN_WITHIN: Duration = Duration::from_secs(2);
/// An agent's log is turned over beyond this many bytes.
const MAX_LOG_BYTES: u64 = 16 << 20;

/// What it takes to start agents here.
#[derive(Clone, Debug)]
pub(super) struct Agents {
    pub(super) home: Home,
    pub(super) program: PathBuf,
    pub(super) account: Option<Account>,
    pub(super) ports: Ports,
}

/// An agent that runs: a child of this process, or one that an earlier supervisor left.
#[derive(Debug)]
pub(super) struct AgentProcess {
    pub(super) running: Arc<Running>,
    child: Option<Child>,
}

impl AgentProcess {
    /// Waits for its end, and says how it ended where that can be known.
    pub(super) async fn ended(mut self) -> String {
        self.end().await
    }

    /// The same, for whoever may stop waiting.
    pub(super) async fn end(&mut self) -> String {
        match &mut self.child {
            Some(child) => match child.wait().await {
                Ok(status) => spelled(status),
                Err(error) => format!("it cannot be waited for: {error}"),
            },
            None => {
                self.running.ended().await;
                "it is gone".to_owned()
            }
        }
    }
}

impl AgentProcess {
    /// One that somebody else has started.
    pub(super) fn noted(running: Running, pid_file: &Path) -> Result<AgentProcess, LocalError> {
        note(pid_file, &running)?;
        Ok(AgentProcess { running: Arc::new(running), child: None })
    }
}

fn spelled(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it ended with exit code {code}"),
        (None, Some(signal)) => format!("it was ended by signal {signal}"),
        (None, None) => "it is gone".to_owned(),
    }
}

impl Agents {
    /// Makes what a node's agent needs before it starts. A file that exists is left as it is: since it joined,
    /// it knows more than we do.
    pub(super) fn make_place(&self, node: &NodeName) -> Result<(), LocalError> {
        self.home.make_node(node, self.account.as_ref())?;
        let log_dir = paths::log_dir(&self.home.node_dir(node));
        if !log_dir.is_dir() {
            fs::create_dir(&log_dir).map_err(LocalError::io("create", &log_dir))?;
            let private = fs::Permissions::from_mode(0o700);
            fs::set_permissions(&log_dir, private).map_err(LocalError::io("set the mode of", &log_dir))?;
            give_to(&log_dir, self.account.as_ref())?;
        }
        let path = self.home.agent_file(node);
        if path.is_file() {
            return Ok(());
        }
        let Some(ports) = self.ports.nodes.get(node) else { return Ok(()) };
        let text = agent_file(&self.home, node, *ports, &self.ports).write();
        keep(write_public(&path, &text))?;
        give_to(&path, self.account.as_ref())
    }

    pub(super) fn is_member(&self, node: &NodeName) -> Result<bool, LocalError> {
        match Identity::load(&self.home.node_dir(node)) {
            Ok(_) => Ok(true),
            Err(IdentityError::NotAdmitted { .. }) => Ok(false),
            Err(error) => {
                Err(LocalError::Step { what: format!("reading who {node} is"), output: error.to_string() })
            }
        }
    }

    /// An agent that runs already: the one that was noted, or one that was started and not noted, because its
    /// supervisor died in between.
    pub(super) fn adopt(&self, node: &NodeName) -> Result<Option<AgentProcess>, LocalError> {
        self.find(&self.home.pid_file(node), &self.home.node_dir(node), AGENT)
    }

    /// The process of one command of this program that stands in `dir`, and was noted or not.
    pub(super) fn find(
        &self,
        pid_file: &Path,
        dir: &Path,
        name: &str,
    ) -> Result<Option<AgentProcess>, LocalError> {
        let watch = LocalError::io("watch the process in", dir);
        let noted =
            fs::read_to_string(pid_file).ok().and_then(|text| serde_json::from_str::<ProcessId>(&text).ok());
        let bin_dir = self.home.bin_dir();
        let found = (|| -> std::io::Result<Option<Running>> {
            if let Some(noted) = noted
                && let Some(running) = Running::reopen(&noted)?
                && running.runs_program_in(&bin_dir)
                && running.stands_in(dir)
            {
                return Ok(Some(running));
            }
            for pid in process::of_command(&bin_dir, Some(dir), name) {
                if let Some(running) = Running::open(pid)? {
                    return Ok(Some(running));
                }
            }
            Ok(None)
        })();
        let Some(running) = found.map_err(watch)? else { return Ok(None) };
        AgentProcess::noted(running, pid_file).map(Some)
    }

    /// Makes the herd, with this node as its first member.
    pub(super) async fn init(&self, node: &NodeName) -> Result<(), LocalError> {
        let mut command = self.command(&self.home.node_dir(node), "init");
        command.arg("--config").arg(self.home.agent_file(node)).arg("--herd").arg(self.home.herd_file());
        command.stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let what = format!("pgherd init for {node}");
        let run = async {
            let child = command.spawn().map_err(LocalError::io("run", &self.program))?;
            child.wait_with_output().await.map_err(LocalError::io("run", &self.program))
        };
        let output = tokio::time::timeout(INIT_WITHIN, run)
            .await
            .map_err(|_| LocalError::Deadline { what: what.clone(), after_s: INIT_WITHIN.as_secs() })??;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(LocalError::Step { what, output: if said.is_empty() { output.status.to_string() } else { said } })
    }

    /// Starts a node's agent; with a token it joins the herd first.
    pub(super) async fn start(
        &self,
        node: &NodeName,
        token: Option<&str>,
    ) -> Result<AgentProcess, LocalError> {
        // What is in the way is told here, where a person reads it, and not only in the agent's log.
        if let Some(port) = self.ports.nodes.get(node).and_then(|ports| ports.agents_taken()) {
            return Err(LocalError::PortTaken { node: node.clone(), port });
        }
        let log = self.open_log(&paths::agent_log(&self.home.node_dir(node)))?;
        let mut command = self.command(&self.home.node_dir(node), AGENT);
        command.arg("--own-session").arg("--config").arg(self.home.agent_file(node));
        if token.is_some() {
            command.args(["--token-file", "-"]).stdin(Stdio::piped());
        }
        let failed = || LocalError::io("duplicate", paths::agent_log(&self.home.node_dir(node)));
        command.stdout(log.try_clone().map_err(failed())?).stderr(log);
        let mut child = command.spawn().map_err(LocalError::io("run", &self.program))?;
        if let (Some(token), Some(mut stdin)) = (token, child.stdin.take()) {
            // An agent that ends before it has read this says why in its log.
            let _unread = stdin.write_all(format!("{token}\n").as_bytes()).await;
        }
        self.watch_child(child, &self.home.pid_file(node), &format!("the agent of {node}")).await
    }

    /// Notes a process that was just started, for the next supervisor.
    pub(super) async fn watch_child(
        &self,
        mut child: Child,
        pid_file: &Path,
        what: &str,
    ) -> Result<AgentProcess, LocalError> {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let opened = pid.map(Running::open).transpose().map_err(LocalError::io("watch", &self.program))?;
        let Some(running) = opened.flatten() else {
            let output = match child.wait().await {
                Ok(status) => spelled(status),
                Err(error) => error.to_string(),
            };
            return Err(LocalError::Step { what: format!("starting {what}"), output });
        };
        note(pid_file, &running)?;
        Ok(AgentProcess { running: Arc::new(running), child: Some(child) })
    }

    /// A token with which only this node can join; `None` while no member can make one.
    pub(super) async fn token(&self, node: &NodeName) -> Option<String> {
        let request = TokenRequest { node: Some(node.to_string()), valid_for_s: TOKEN_VALID_S };
        for client in self.clients() {
            match client.within(TOKEN_WITHIN).token_create(&request).await {
                Ok(token) => return Some(token.token),
                Err(error) => tracing::debug!(%error, "no token yet"),
            }
        }
        None
    }

    /// A client for each node's agent, in the order of their names.
    pub(super) fn clients(&self) -> Vec<Client> {
        self.ports.nodes.keys().map(|node| Client::unix(self.socket(node))).collect()
    }

    pub(super) fn socket(&self, node: &NodeName) -> PathBuf {
        paths::api_socket(&self.home.node_dir(node))
    }

    /// Puts what clients on this machine need where they find it. `false`: no member has it yet.
    pub(super) fn keep_client_files(&self) -> Result<bool, LocalError> {
        for node in self.ports.nodes.keys() {
            let dir = self.home.node_dir(node);
            let (passfile, ca) = (passfile::path(&dir), dir.join("pki").join("ca.pem"));
            if let (Ok(passwords), Ok(ca)) = (read_limited(&passfile), read_limited(&ca)) {
                keep(write_private(&self.home.passfile(), &passwords))?;
                keep(write_public(&self.home.ca_file(), &ca))?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Turns over logs that have grown too long. Agents append, so an emptied file is written from its
    /// beginning; what is written in between is lost with the copy's tail at worst.
    pub(super) fn turn_logs_over(&self) {
        let agents = self.ports.nodes.keys().map(|node| paths::agent_log(&self.home.node_dir(node)));
        for log in agents.chain([self.home.proxy_log()]) {
            if let Err(error) = turn_over(&log, self.account.as_ref()) {
                tracing::warn!(error = %error, path = %log.display(), "cannot turn the log over");
            }
        }
    }

    /// A command of this program, as the user that agents run as, in `dir`.
    pub(super) fn command(&self, dir: &Path, name: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(name).current_dir(dir).stdin(Stdio::null()).env_clear();
        // PostgreSQL's programs are called by their paths; the rest is what every program may count on.
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("LANG", "C.UTF-8");
        for kept in ["TZ", "PGHERD_LOG"] {
            if let Some(value) = std::env::var_os(kept) {
                command.env(kept, value);
            }
        }
        match &self.account {
            Some(account) => {
                command.uid(account.uid).gid(account.gid);
                command.env("HOME", &account.home).env("USER", &account.name);
            }
            None => {
                for kept in ["HOME", "USER"] {
                    if let Some(value) = std::env::var_os(kept) {
                        command.env(kept, value);
                    }
                }
            }
        }
        command
    }

    pub(super) fn open_log(&self, path: &Path) -> Result<File, LocalError> {
        let file =
            File::options().create(true).append(true).open(path).map_err(LocalError::io("open", path))?;
        give_to(path, self.account.as_ref())?;
        Ok(file)
    }
}

fn note(pid_file: &Path, running: &Running) -> Result<(), LocalError> {
    let text = serde_json::to_string(&running.id).map_err(|error| LocalError::Step {
        what: "noting a process".to_owned(),
        output: error.to_string(),
    })?;
    keep(write_private(pid_file, &text))
}

pub(super) fn keep(written: Result<(), crate::pki::FileError>) -> Result<(), LocalError> {
    written.map_err(|error| LocalError::Step { what: "keeping a file".to_owned(), output: error.to_string() })
}

/// What a node's agent is told before it knows anybody.
fn agent_file(home: &Home, node: &NodeName, own: NodePorts, ports: &Ports) -> AgentFile {
    let here = |port| Listen { address: Some(std::net::Ipv4Addr::LOCALHOST.into()), port };
    let mut file = AgentFile::new(node.clone(), home.node_dir(node));
    (file.listen, file.health_listen) = (here(own.api), here(own.health));
    let others = ports.nodes.iter().filter(|(other, _)| *other != node);
    file.join = others.map(|(_, ports)| HostPort { host: "127.0.0.1".to_owned(), port: ports.api }).collect();
    file
}

fn turn_over(log: &Path, account: Option<&Account>) -> Result<(), LocalError> {
    match fs::metadata(log) {
        Ok(meta) if meta.len() > MAX_LOG_BYTES => {}
        _ => return Ok(()),
    }
    let old = log.with_extension("log.1");
    fs::copy(log, &old).map_err(LocalError::io("write", &old))?;
    give_to(&old, account)?;
    let file = File::options().write(true).open(log).map_err(LocalError::io("open", log))?;
    file.set_len(0).map_err(LocalError::io("empty", log))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agents(dir: &Path) -> Agents {
        let nodes: Vec<NodeName> = ["a", "b"].iter().map(|name| name.parse().unwrap()).collect();
        let (ports, _claim) = Ports::choose(&nodes).unwrap();
        let home = Home::at(dir);
        home.make(None).unwrap();
        Agents { home, program: "/bin/sleep".into(), account: None, ports }
    }

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    #[test]
    fn an_agent_file_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let agents = agents(dir.path());
        agents.make_place(&node("a")).unwrap();
        let path = agents.home.agent_file(&node("a"));
        let file = AgentFile::read("agent.toml", &fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(file.join.len(), 1);
        assert_eq!(file.join[0].port, agents.ports.nodes[&node("b")].api);
        fs::write(&path, "changed").unwrap();
        agents.make_place(&node("a")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "changed");
        assert!(!agents.is_member(&node("a")).unwrap());
    }

    #[tokio::test]
    async fn an_agent_is_taken_over_only_if_it_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let agents = agents(dir.path());
        let (a, b) = (node("a"), node("b"));
        agents.make_place(&a).unwrap();
        agents.make_place(&b).unwrap();
        assert!(agents.adopt(&a).unwrap().is_none());

        // A stranger whose number stands in the file: another program, another directory.
        let mut stranger = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(stranger.id().cast_signed()).unwrap();
        fs::write(agents.home.pid_file(&a), serde_json::to_string(&id).unwrap()).unwrap();
        assert!(agents.adopt(&a).unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();

        // A program of ours in a's directory, that nobody noted.
        let placed = agents.home.bin_dir().join("pgherd-x");
        fs::copy("/usr/bin/tail", &placed).unwrap();
        fs::write(agents.home.node_dir(&a).join("agent"), "").unwrap();
        let mut ours = std::process::Command::new(&placed)
            .args(["agent", "-f"])
            .current_dir(agents.home.node_dir(&a))
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let adopted = loop {
            if let Some(adopted) = agents.adopt(&a).unwrap() {
                break adopted;
            }
            assert!(std::time::Instant::now() < deadline, "it runs our program in a's directory");
        };
        assert_eq!(adopted.running.id.pid, ours.id().cast_signed());
        assert!(agents.adopt(&b).unwrap().is_none(), "it is a's");
        let again = agents.adopt(&a).unwrap().expect("now it is noted");
        ours.kill().unwrap();
        assert_eq!(again.ended().await, "it is gone");
        ours.wait().unwrap();
        assert!(agents.adopt(&a).unwrap().is_none());
    }

    #[test]
    fn a_long_log_is_turned_over() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("agent.log");
        fs::write(&log, "short").unwrap();
        turn_over(&log, None).unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "short");
        File::options().write(true).open(&log).unwrap().set_len(MAX_LOG_BYTES + 1).unwrap();
        turn_over(&log, None).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().len(), 0);
        assert_eq!(fs::metadata(dir.path().join("agent.log.1")).unwrap().len(), MAX_LOG_BYTES + 1);
    }
}
