//! How a node comes into a herd: as the founder (`pgherd init`), or by a token (`pgherd join` under `agent`).
//!
//! Both end by writing the node's [`Identity`], and both can be begun again after an interruption at any
//! point: what an unfinished attempt left is recognised by the missing identity and replaced.
//!
//! Hazard: a second founder. `init` refuses where any listed host already answers, and a node with an empty
//! directory never begins a store by itself.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::client::{CallError, Client, ClientTls};
use pgherd_api::join::JoinRequest;
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::NodeName;
use pgherd_dcs::{Found, RaftStore, Store, Transaction, Transport, TransportError};

use crate::agreed::{self, AgreedError, Herd, Secrets, StoredSpec};
use crate::identity::{Identity, IdentityError};
use crate::peers;
use crate::pki::{
    Authority, CA_VALIDITY, Credentials, CredentialsError, IssueError, JoinToken, NODE_VALIDITY,
};
use crate::pki::{NewKey, NodeSubject, TokenMalformed};

/// How long a listed host has to answer before `init` takes it for unused.
const PROBE_WITHIN: Duration = Duration::from_secs(1);
const STORE_WITHIN: Duration = Duration::from_secs(10);
const JOIN_WITHIN: Duration = Duration::from_secs(30);

/// Where a node keeps what, apart from PostgreSQL's own directories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    pub state_dir: PathBuf,
    pub raft_dir: PathBuf,
}

impl Directories {
    /// Certificates and key, readable for this user only.
    pub fn pki(&self) -> PathBuf {
        crate::paths::pki_dir(&self.state_dir)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("node {node} is not in the herd file")]
    NotInFile { node: NodeName },
    #[error("{} is a member of herd {herd} already", .state_dir.display())]
    AlreadyMember { state_dir: PathBuf, herd: NodeName },
    #[error("{node} at {address} answers: there may be a herd already")]
    SomebodyAnswers { node: NodeName, address: String },
    #[error("{} holds a member of a store, but {} names no herd", .raft_dir.display(), .state_dir.display())]
    ForeignStore { raft_dir: PathBuf, state_dir: PathBuf },
    #[error("{doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error("the system gives no random numbers")]
    Random,
    #[error("a key cannot be made: {0}")]
    Key(String),
    #[error(transparent)]
    Store(#[from] pgherd_dcs::OpenError),
    #[error(transparent)]
    Agreed(#[from] AgreedError),
    #[error("the join token cannot be used: {0}")]
    Token(#[from] TokenMalformed),
    #[error("no listed member of the herd answered: {last}")]
    NobodyAnswers { last: String },
    #[error(transparent)]
    Refused(Box<CallError>),
    #[error("the herd's answer to the join does not fit: {0}")]
    Answer(String),
}

impl SetupError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            SetupError::NotInFile { .. } => {
                "add the node to the herd file, or name one that is in it".to_owned()
            }
            SetupError::AlreadyMember { .. } => "start it with: pgherd agent".to_owned(),
            SetupError::SomebodyAnswers { .. } => {
                "if that is the herd this node belongs to, join it: run `pgherd token` there, and start this \
                 node's agent with that token"
                    .to_owned()
            }
            SetupError::ForeignStore { raft_dir, .. } => {
                format!("if it is not needed, move {} away and try again", raft_dir.display())
            }
            SetupError::Token(_) => "make a fresh one on a member: pgherd token".to_owned(),
            SetupError::NobodyAnswers { .. } => {
                "check the addresses under `join`, the firewall, and that an agent runs there".to_owned()
            }
            _ => return None,
        })
    }
}

/// Makes a new herd with this node as its only member.
pub async fn init(spec: &HerdSpec, node: &NodeName, dirs: &Directories) -> Result<Identity, SetupError> {
    let Some((_, host, port)) = spec.agents().find(|(name, _, _)| *name == node) else {
        return Err(SetupError::NotInFile { node: node.clone() });
    };
    let (host, address) = (host.to_owned(), peers::address(host, port));
    refuse_member(dirs)?;
    nobody_answers(spec, node).await?;
    begin(dirs)?;

    let herd_id = random_id()?;
    let now = Timestamp::now();
    let (authority, key) = Authority::create(&spec.name, &herd_id, now, CA_VALIDITY)?;
    let own_key = NewKey::generate().map_err(|error| SetupError::Key(error.to_string()))?;
    let request = own_key.request().map_err(|error| SetupError::Key(error.to_string()))?;
    let others: Vec<NodeName> = others(spec, node);
    let hosts = [host.clone()];
    let subject = NodeSubject { name: node, hosts: &hosts, others: &others };
    let certificate = authority.issue_node(&request, &subject, now, NODE_VALIDITY)?;
    Credentials::save(&dirs.pki(), authority.certificate_pem(), &certificate, &own_key)?;

    let config = store_config(dirs, &herd_id, node, &address, &host, spec);
    let raft = RaftStore::create(config, Arc::new(Alone)).await?;
    let store = Store::from(raft.clone());
    let secrets =
        Secrets::generate(spec, authority.certificate_pem(), &key).map_err(|_| SetupError::Random)?;
    let herd =
        Herd { format: 1, name: spec.name.clone(), id: herd_id.clone(), generation: raft.generation() };
    let first = Transaction::new()
        .require_absent(agreed::HERD)
        .put(agreed::HERD, agreed::to_json(agreed::HERD, &herd)?)
        .put(agreed::SPEC, agreed::to_json(agreed::SPEC, &StoredSpec { generation: 1, spec: spec.clone() })?)
        .put(agreed::SECRETS, agreed::to_json(agreed::SECRETS, &secrets)?);
    let written = store.commit(first, STORE_WITHIN).await.map_err(AgreedError::from);
    raft.shutdown().await;
    written?;

    let identity = Identity::new(spec.name.clone(), herd_id, node.clone(), address, host, None);
    identity.save(&dirs.state_dir)?;
    let marker = dirs.state_dir.join(UNFINISHED);
    fs::remove_file(&marker).map_err(io_error("remove", &marker))?;
    Ok(identity)
}

/// Stands while `init` is at work, so that what it left behind when it was interrupted is known as its own.
const UNFINISHED: &str = "init.unfinished";

/// What a joining node says of itself.
#[derive(Clone, Debug)]
pub struct Joining {
    pub node: NodeName,
    pub token: String,
    /// `host:port` of members; one that answers is enough.
    pub members: Vec<String>,
    /// Names and addresses under which PostgreSQL's clients reach this node.
    pub hosts: Vec<String>,
    pub host: String,
    pub api_address: String,
}

/// Makes this node a member of a herd that exists.
pub async fn join(joining: &Joining, dirs: &Directories) -> Result<Identity, SetupError> {
    refuse_member(dirs)?;
    let token = JoinToken::parse(&joining.token)?;
    make_directories(dirs)?;
    let config = pgherd_dcs::Config {
        dir: dirs.raft_dir.clone(),
        herd: token.herd_id.clone(),
        name: joining.node.clone(),
        address: joining.api_address.clone(),
        host: joining.host.clone(),
        times: pgherd_dcs::Times::default(),
    };
    let wish = RaftStore::prepare(&config).await?;
    let key = pending_key(dirs)?;
    let request = JoinRequest {
        token: joining.token.clone(),
        node: joining.node.to_string(),
        csr: key.request().map_err(|error| SetupError::Key(error.to_string()))?,
        hosts: joining.hosts.clone(),
        api_address: joining.api_address.clone(),
        host: joining.host.clone(),
        store_disk: wish.disk.as_str().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let tls = Arc::new(ClientTls::pinned(token.pin));
    let mut last = "none is listed".to_owned();
    for member in &joining.members {
        let client = Client::tls(member, None, Arc::clone(&tls)).within(JOIN_WITHIN);
        let answer = match client.join(&request).await {
            Ok(answer) => answer,
            Err(error @ CallError::Answered { http_status: 400..=499, .. }) => {
                return Err(SetupError::Refused(Box::new(error)));
            }
            Err(error) => {
                last = format!("{member}: {error}");
                continue;
            }
        };
        Credentials::save(&dirs.pki(), &answer.ca, &answer.certificate, &key)?;
        let herd: NodeName = answer
            .herd
            .parse()
            .map_err(|error: pgherd_core::types::Malformed| SetupError::Answer(error.to_string()))?;
        let admission = pgherd_dcs::Joined {
            herd: answer.herd_id.clone(),
            generation: answer.herd_generation,
            raft_id: answer.raft_id,
            disk: wish.disk.clone(),
        };
        let identity = Identity::new(
            herd,
            answer.herd_id,
            joining.node.clone(),
            joining.api_address.clone(),
            joining.host.clone(),
            Some(admission),
        );
        identity.save(&dirs.state_dir)?;
        // The key has its place beside its certificate by now.
        drop(fs::remove_file(dirs.state_dir.join(PENDING_KEY)));
        return Ok(identity);
    }
    Err(SetupError::NobodyAnswers { last })
}

/// A key that is waiting for its certificate. Asking again with the same one lets a used token answer again,
/// so that an answer lost on the way costs nothing.
const PENDING_KEY: &str = "join.key";

fn pending_key(dirs: &Directories) -> Result<NewKey, SetupError> {
    let path = dirs.state_dir.join(PENDING_KEY);
    if let Ok(pem) = fs::read_to_string(&path) {
        return Ok(NewKey::from_pem(&pem)?);
    }
    let key = NewKey::generate().map_err(|error| SetupError::Key(error.to_string()))?;
    crate::durable::write_synced(&path, key.expose_pem().as_bytes(), 0o600)
        .map_err(io_error("write", &path))?;
    Ok(key)
}

/// How this node's member of the store is opened, at its creation as ever after.
pub fn store_config(
    dirs: &Directories,
    herd_id: &str,
    node: &NodeName,
    address: &str,
    host: &str,
    spec: &HerdSpec,
) -> pgherd_dcs::Config {
    pgherd_dcs::Config {
        dir: dirs.raft_dir.clone(),
        herd: herd_id.to_owned(),
        name: node.clone(),
        address: address.to_owned(),
        host: host.to_owned(),
        times: pgherd_dcs::Times { heartbeat: spec.times.raft_heartbeat, election: spec.times.raft_election },
    }
}

fn refuse_member(dirs: &Directories) -> Result<(), SetupError> {
    match Identity::load(&dirs.state_dir) {
        Ok(identity) => {
            Err(SetupError::AlreadyMember { state_dir: dirs.state_dir.clone(), herd: identity.herd })
        }
        Err(IdentityError::NotAdmitted { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A founder's store directory without an identity beside it is an attempt of ours that was interrupted, if
/// the marker says so; otherwise it is somebody's store, and stays.
fn begin(dirs: &Directories) -> Result<(), SetupError> {
    let marker = dirs.state_dir.join(UNFINISHED);
    make_directories(dirs)?;
    if fs::exists(&marker).unwrap_or(false) {
        for left in [&dirs.raft_dir, &dirs.pki()] {
            match fs::remove_dir_all(left) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("remove", left)(error));
                }
                _ => {}
            }
        }
        return make_directories(dirs);
    }
    let occupied = fs::read_dir(&dirs.raft_dir).is_ok_and(|mut entries| entries.next().is_some());
    if occupied {
        let (raft_dir, state_dir) = (dirs.raft_dir.clone(), dirs.state_dir.clone());
        return Err(SetupError::ForeignStore { raft_dir, state_dir });
    }
    crate::durable::write_synced(&marker, b"", 0o600).map_err(io_error("write", &marker))
}

/// For this user alone: they hold a key.
fn make_directories(dirs: &Directories) -> Result<(), SetupError> {
    for dir in [dirs.state_dir.clone(), dirs.pki()] {
        let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(&dir);
        made.map_err(io_error("create", &dir))?;
    }
    Ok(())
}

async fn nobody_answers(spec: &HerdSpec, node: &NodeName) -> Result<(), SetupError> {
    let probes = peers::addresses(spec, node).into_iter().map(|(name, address)| async move {
        let connect = tokio::net::TcpStream::connect(address.clone());
        let answers = matches!(tokio::time::timeout(PROBE_WITHIN, connect).await, Ok(Ok(_)));
        answers.then_some((name, address))
    });
    match futures_util::future::join_all(probes).await.into_iter().flatten().next() {
        Some((node, address)) => Err(SetupError::SomebodyAnswers { node, address }),
        None => Ok(()),
    }
}

fn others(spec: &HerdSpec, node: &NodeName) -> Vec<NodeName> {
    spec.agents().map(|(name, _, _)| name.clone()).filter(|name| name != node).collect()
}

fn random_id() -> Result<String, SetupError> {
    let mut bytes = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| SetupError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SetupError {
    let path = path.to_owned();
    move |source| SetupError::Io { doing, path, source }
}

/// The founder alone has nobody to talk to.
struct Alone;

impl Transport for Alone {
    fn call(
        &self,
        peer: &NodeName,
        _address: &str,
        _rpc: &'static str,
        _body: Vec<u8>,
        _timeout: Duration,
    ) -> futures_util::future::BoxFuture<'static, Result<Vec<u8>, TransportError>> {
        let why = format!("{peer} has not joined yet");
        Box::pin(async move { Err(TransportError::NotSent(why)) })
    }
}

/// Opens this node's member of the store, for the first time or again.
pub async fn open_store(
    config: pgherd_dcs::Config,
    identity: &Identity,
    transport: Arc<dyn Transport>,
) -> Result<RaftStore, pgherd_dcs::OpenError> {
    match (RaftStore::inspect(&config).await?, &identity.admission) {
        (Found::Prepared, Some(admission)) => RaftStore::join(config, admission.clone(), transport).await,
        _ => RaftStore::open(config, transport).await,
    }
}
