//! `pgherd agent`: the daemon of one host, and how it joins a herd when it is given a token.

use std::io::Read;
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};

use clap::Args;
use pgherd_agent::files::agent::{AgentFile, HostPort, Listen};
use pgherd_agent::identity::{Identity, IdentityError};
use pgherd_agent::setup::{self, Directories, Joining};
use pgherd_agent::vip::Keeper;
use pgherd_agent::{daemon, pki};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{self, note};

/// Run this host's agent
///
/// With a token it joins the herd first. PostgreSQL goes on when the agent is restarted or upgraded: ending
/// the agent does not end it.
#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// Agent file [default: agent.toml in the directory]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Name of this host's node, where there is no agent file yet
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Agent of the herd to join, as host:port; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    join: Vec<HostPort>,
    /// File with the join token; - reads it from stdin
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Address under which the others reach this host [default: the one that routes to them]
    #[arg(long, value_name = "HOST", requires = "token_file")]
    host: Option<String>,
    /// Leave the session and terminal of whoever started it
    #[arg(long, hide = true)]
    own_session: bool,
}

pub(crate) fn run(args: AgentArgs, global: &Global) -> Result<(), Failure> {
    // Before there is a second thread, or a program that this one has started.
    let keeper = Keeper::start()
        .map_err(|error| Failure::failed("cannot see to the capabilities of this process").because(error))?;
    if args.own_session {
        // It fails only where the process leads a group already, and then it is not in its parent's.
        let _already = rustix::process::setsid();
    }
    output::trace_as_log(global.verbose);
    let place = AgentPlace::find(args.config.clone(), global)?;
    let mut file = place.read_or_make(args.node.as_deref(), |_| None)?;
    if !args.join.is_empty() {
        file.join.clone_from(&args.join);
    }
    refuse_root("agent")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed("cannot start a runtime").because(error))?;
    runtime.block_on(async {
        if let Some(token_file) = &args.token_file {
            join(&mut file, token_file, args.host.as_deref()).await?;
            place.write(&file)?;
        }
        daemon::run(file, keeper, asked_to_end()?).await.map_err(Failure::from)
    })
}

/// PostgreSQL refuses to run as root, and says so only after an agent has made files that nobody else can read.
pub(super) fn refuse_root(command: &str) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::usage(format!("pgherd {command} does not run as root"))
        .because("PostgreSQL refuses root, and runs as the same user as its agent")
        .hint(format!("runuser -u postgres -- pgherd {command} …")))
}

/// Resolves at the first SIGTERM or Ctrl-C.
pub(super) fn asked_to_end() -> Result<impl Future<Output = ()>, Failure> {
    let listen =
        |kind| signal(kind).map_err(|error| Failure::failed("cannot wait for signals").because(error));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Joins, unless this host is a member already: then the token is of no use, and none is spent.
async fn join(file: &mut AgentFile, token_file: &Path, host: Option<&str>) -> Result<(), Failure> {
    match Identity::load(&file.state_dir) {
        Ok(identity) => {
            note(&format!(
                "{} is a member of herd {} already; the token is not used",
                file.name, identity.herd
            ));
            return Ok(());
        }
        Err(IdentityError::NotAdmitted { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    if file.join.is_empty() {
        return Err(Failure::usage("no agent of the herd is named")
            .hint("name one with --join host:port, or with join = [\"host:port\"] in the agent file"));
    }
    let token = read_token(token_file)?;
    let host = match host {
        Some(host) => host.to_owned(),
        None => own_address(file)?,
    };
    let joining = Joining {
        node: file.name.clone(),
        token: token.trim().to_owned(),
        members: file.join.iter().map(ToString::to_string).collect(),
        hosts: vec![host.clone()],
        api_address: HostPort { host: host.clone(), port: file.listen.port }.to_string(),
        host,
    };
    let identity = setup::join(&joining, &dirs(file)).await?;
    file.herd = identity.herd_id.parse().ok();
    note(&format!("{} has joined herd {}", file.name, identity.herd));
    Ok(())
}

/// From a file or stdin: an argument would stand in the process list.
fn read_token(path: &Path) -> Result<String, Failure> {
    if path == Path::new("-") {
        let mut token = String::new();
        let read = std::io::stdin().lock().take(MAX_TOKEN_BYTES).read_to_string(&mut token);
        read.map_err(|error| Failure::failed("cannot read the token from stdin").because(error))?;
        return Ok(token);
    }
    pki::read_limited(path).map_err(|error| Failure::failed("cannot read the token").because(error))
}

/// Many times the length of a token.
const MAX_TOKEN_BYTES: u64 = 4096;

/// The address on which it listens, else the one from which packets to the herd would leave.
fn own_address(file: &AgentFile) -> Result<String, Failure> {
    if let Listen { address: Some(address), .. } = file.listen {
        return Ok(address.to_string());
    }
    let towards = |member: &HostPort| -> Option<String> {
        let to: SocketAddr = (member.host.as_str(), member.port).to_socket_addrs().ok()?.next()?;
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        // Connecting a datagram socket sends nothing; it only chooses the route.
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    file.join.iter().find_map(towards).ok_or_else(|| {
        Failure::failed("cannot tell under which address the others reach this host")
            .because("no route leads to any of the agents to join")
            .hint("name it with --host")
    })
}

pub(super) fn dirs(file: &AgentFile) -> Directories {
    Directories { state_dir: file.state_dir.clone(), raft_dir: file.raft_dir.clone() }
}

/// Where this host's agent file is, or will be.
#[derive(Debug)]
pub(super) struct AgentPlace {
    path: PathBuf,
    dir: PathBuf,
}

impl AgentPlace {
    pub(super) fn find(config: Option<PathBuf>, global: &Global) -> Result<AgentPlace, Failure> {
        let dir = global.dir()?;
        Ok(AgentPlace { path: config.unwrap_or_else(|| dir.join("agent.toml")), dir })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file, or one with a host's defaults for the node that was named.
    pub(super) fn read_or_make(
        &self,
        node: Option<&str>,
        api_port: impl Fn(&str) -> Option<u16>,
    ) -> Result<AgentFile, Failure> {
        match std::fs::read_to_string(&self.path) {
            Ok(text) => {
                let file = AgentFile::read(&self.path.display().to_string(), &text)?;
                match node.filter(|node| *node != file.name.as_str()) {
                    Some(node) => Err(Failure::usage(format!(
                        "{} is the file of node {}, and --node says {node}",
                        self.path.display(),
                        file.name
                    ))),
                    None => Ok(file),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let Some(node) = node else {
                    return Err(Failure::usage(format!("there is no {}", self.path.display()))
                        .hint("name this host's node with --node, or the file with --config"));
                };
                let name =
                    node.parse().map_err(|error| Failure::usage("--node does not read").because(error))?;
                let mut file = AgentFile::new(name, &self.dir);
                if let Some(port) = api_port(node) {
                    file.listen.port = port;
                }
                Ok(file)
            }
            Err(error) => Err(Failure::io("read", &self.path, &error)),
        }
    }

    pub(super) fn write(&self, file: &AgentFile) -> Result<(), Failure> {
        if let Some(parent) = self.path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| Failure::io("create", parent, &error))?;
        }
        pki::write_public(&self.path, &file.write())
            .map_err(|error| Failure::failed("cannot keep the agent file").because(error))
    }
}
