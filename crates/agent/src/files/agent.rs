//! `agent.toml`: what one host's agent has to know before it can ask anybody, from its text and back.
//!
//! Everything else comes from the store. The file is written by `init` and by joining, and read at every start.
//!
//! Hazard: directories that lie in each other. A re-clone empties the data directory, and with it whatever was
//! put inside: the store's log, which forgets its vote, or the record that a node has sealed itself.

use std::fmt;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use pgherd_core::spec::{DEFAULT_API_PORT, is_host};
use pgherd_core::types::NodeName;

use super::finding::{Findings, Kind, Mistake};
use super::reader::{Read, Reader, Section, Table, key};

/// The port of the plain health paths.
pub const DEFAULT_HEALTH_PORT: u16 = 8008;
/// Agents to ask when joining or coming back; more than a herd has nodes helps nobody.
pub const MAX_JOIN: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentFile {
    pub name: NodeName,
    /// The herd's random id; `None` until it has joined one.
    pub herd: Option<HerdId>,
    /// APIs of agents that know the herd.
    pub join: Vec<HostPort>,
    /// What the agent must not forget: certificates, terms, seals.
    pub state_dir: PathBuf,
    pub data_dir: PathBuf,
    /// `None`: in the data directory, as initdb has it.
    pub wal_dir: Option<PathBuf>,
    pub raft_dir: PathBuf,
    /// The API, mutual TLS.
    pub listen: Listen,
    /// Health paths and metrics, plain HTTP.
    pub health_listen: Listen,
}

/// The random name of a herd: what keeps two herds apart that are called the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HerdId(String);

impl HerdId {
    pub const MIN_BYTES: usize = 8;
    pub const MAX_BYTES: usize = 64;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HerdId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A text of an agent file that is not what its key takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not {what}")]
pub struct Malformed {
    pub what: &'static str,
    pub text: String,
}

impl FromStr for HerdId {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<HerdId, Malformed> {
        let letters =
            text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if letters && (HerdId::MIN_BYTES..=HerdId::MAX_BYTES).contains(&text.len()) {
            return Ok(HerdId(text.to_owned()));
        }
        Err(Malformed {
            what: "a herd id: 8 to 64 lower-case letters, digits and hyphens",
            text: text.to_owned(),
        })
    }
}

/// Where somebody can be reached: `192.0.2.10:8009`, `[2001:db8::1]:8009`, `db-1.example.com:8009`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    pub host: String,
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Host and port of `host:port` and `[v6]:port`; the host may be empty.
fn split_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    match host.strip_prefix('[') {
        Some(rest) => {
            let inner = rest.strip_suffix(']')?;
            inner.contains(':').then_some((inner, port))
        }
        None => (!host.contains(':')).then_some((host, port)),
    }
}

impl FromStr for HostPort {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<HostPort, Malformed> {
        match split_port(text) {
            Some((host, port)) if is_host(host) => Ok(HostPort { host: host.to_owned(), port }),
            _ => Err(Malformed {
                what: "an address with its port, as in \"192.0.2.10:8009\"",
                text: text.to_owned(),
            }),
        }
    }
}

/// Where to listen: on one address, or on all of them (`:8009`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    pub address: Option<IpAddr>,
    pub port: u16,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => std::net::SocketAddr::new(address, self.port).fmt(f),
            None => write!(f, ":{}", self.port),
        }
    }
}

impl FromStr for Listen {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Listen, Malformed> {
        let malformed = || Malformed {
            what: "where to listen: \":8009\" for all addresses, or one with its port, \"192.0.2.10:8009\"",
            text: text.to_owned(),
        };
        let (host, port) = split_port(text).ok_or_else(malformed)?;
        if host.is_empty() {
            return Ok(Listen { address: None, port });
        }
        let address: IpAddr = host.parse().map_err(|_| malformed())?;
        Ok(Listen { address: (!address.is_unspecified()).then_some(address), port })
    }
}

const NONE: &str = "none";

static TOP: Section = Section {
    header: "",
    keys: &[
        key("name", "a text", "\"a\"", "", "the node's name in the herd file"),
        key(
            "herd",
            "a text",
            "the herd's id",
            NONE,
            "the herd that this host belongs to; written by joining it",
        ),
        key("join", "texts", "[\"192.0.2.10:8009\"]", NONE, "agents of the herd to ask"),
        key(
            "state_dir",
            "a path",
            "\"/var/lib/pgherd\"",
            "",
            "where the agent keeps what it must not forget",
        ),
        key("data_dir", "a path", "\"/srv/pgdata\"", "state_dir/data", "PostgreSQL's data directory"),
        key("wal_dir", "a path", "\"/wal/pgwal\"", "in data_dir", "a directory of its own for WAL"),
        key(
            "raft_dir",
            "a path",
            "\"/raft/pgherd\"",
            "state_dir/raft",
            "the store's log, best on another disk than the data",
        ),
        key("listen", "a text", "\":8009\"", ":8009", "where the API listens, with mutual TLS"),
        key(
            "health_listen",
            "a text",
            "\":8008\"",
            ":8008",
            "where the health paths and metrics listen, without TLS",
        ),
    ],
};

impl AgentFile {
    /// A file with the defaults of a host.
    pub fn new(name: NodeName, state_dir: impl Into<PathBuf>) -> AgentFile {
        let state_dir = state_dir.into();
        AgentFile {
            name,
            herd: None,
            join: Vec::new(),
            data_dir: state_dir.join("data"),
            wal_dir: None,
            raft_dir: state_dir.join("raft"),
            state_dir,
            listen: Listen { address: None, port: DEFAULT_API_PORT },
            health_listen: Listen { address: None, port: DEFAULT_HEALTH_PORT },
        }
    }

    /// Reads an agent file; `file` is its name for messages.
    pub fn read(file: &str, text: &str) -> Result<AgentFile, Findings> {
        let (mut reader, top) = Reader::parse(text);
        let top = reader.top(&top, &TOP);
        let unreadable = || "unreadable".parse().expect("a lower-case word is a name");
        let name = reader.parsed(&top, "name").or(unreadable());
        let herd = reader.parsed(&top, "herd").some();
        let join = read_join(&mut reader, &top);
        let state_dir = read_dir(&mut reader, &top, "state_dir").unwrap_or_else(|| PathBuf::from("/"));
        let mut agent = AgentFile::new(name, state_dir);
        (agent.herd, agent.join) = (herd, join);
        if let Some(dir) = read_dir(&mut reader, &top, "data_dir") {
            agent.data_dir = dir;
        }
        agent.wal_dir = read_dir(&mut reader, &top, "wal_dir");
        if let Some(dir) = read_dir(&mut reader, &top, "raft_dir") {
            agent.raft_dir = dir;
        }
        agent.listen = reader.parsed(&top, "listen").or(agent.listen);
        agent.health_listen = reader.parsed(&top, "health_listen").or(agent.health_listen);

        check_directories(&agent, &mut reader, &top);
        let (one, other) = (agent.listen, agent.health_listen);
        let same_address = one.address.is_none() || other.address.is_none() || one.address == other.address;
        if one.port == other.port && same_address && !reader.has_errors() {
            let at = top.at.key("health_listen");
            let message = format!("listen and health_listen share port {}", one.port);
            let mistake = Mistake::new(Kind::BrokenRule, reader.span_of(&at), message);
            reader.mistake(mistake.hint("give health_listen a port of its own"));
        }
        if reader.has_errors() { Err(reader.finish(file)) } else { Ok(agent) }
    }

    /// The file; reading it back gives the same values.
    pub fn write(&self) -> String {
        let quoted = |text: String| toml_edit::Value::from(text).to_string();
        let path = |path: &Path| quoted(path.display().to_string());
        let mut file = String::from("# What this host's agent knows before it asks the store.\n");
        let mut line = |key: &str, value: String| file.push_str(&format!("{key} = {value}\n"));
        line("name", quoted(self.name.to_string()));
        if let Some(herd) = &self.herd {
            line("herd", quoted(herd.to_string()));
        }
        if !self.join.is_empty() {
            let join: Vec<String> = self.join.iter().map(|address| quoted(address.to_string())).collect();
            line("join", format!("[{}]", join.join(", ")));
        }
        line("state_dir", path(&self.state_dir));
        line("data_dir", path(&self.data_dir));
        if let Some(wal_dir) = &self.wal_dir {
            line("wal_dir", path(wal_dir));
        }
        line("raft_dir", path(&self.raft_dir));
        line("listen", quoted(self.listen.to_string()));
        line("health_listen", quoted(self.health_listen.to_string()));
        file
    }
}

fn read_join(reader: &mut Reader<'_>, top: &Table<'_>) -> Vec<HostPort> {
    let texts = reader.texts(top, "join");
    let at = top.at.key("join");
    if texts.len() > MAX_JOIN {
        reader.wrong_value(&at, format!("join lists {} agents, more than {MAX_JOIN}", texts.len()), None);
        return Vec::new();
    }
    let mut join = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let at = at.index(index);
        if reader.is_broken(&at) {
            continue;
        }
        match text.parse() {
            Ok(address) => join.push(address),
            Err(error) => reader.wrong_value(&at, Malformed::to_string(&error), None),
        }
    }
    join
}

/// An absolute path without `..`, so that two paths can be compared by their words.
fn read_dir(reader: &mut Reader<'_>, top: &Table<'_>, key: &str) -> Option<PathBuf> {
    let Read::Is(text) = reader.text(top, key) else { return None };
    let at = top.at.key(key);
    let path = PathBuf::from(&text);
    let dots = path.components().any(|part| matches!(part, Component::ParentDir));
    if !path.is_absolute() || dots || text.chars().any(char::is_control) {
        let message = format!("\"{key}\" is not an absolute path without \"..\"");
        reader.wrong_value(&at, message, Some(format!("write it from the root: {key} = \"/var/lib/…\"")));
        return None;
    }
    if path.parent().is_none() {
        reader.wrong_value(&at, format!("\"{key}\" is the root of the file system"), None);
        return None;
    }
    // Without a slash at the end or dots between, as it will be compared and shown.
    Some(path.components().collect())
}

fn check_directories(agent: &AgentFile, reader: &mut Reader<'_>, top: &Table<'_>) {
    let wal_dir = agent.wal_dir.as_deref();
    let inside = |inner: &Path, outer: &Path| inner.starts_with(outer);
    let data = agent.data_dir.as_path();
    let mut rules: Vec<(&str, bool, &str)> = vec![
        ("state_dir", inside(&agent.state_dir, data), "state_dir lies in data_dir, which a re-clone empties"),
        (
            "raft_dir",
            inside(&agent.raft_dir, data),
            "raft_dir lies in data_dir, which a re-clone empties; a store that forgets its vote may elect two leaders",
        ),
        (
            "raft_dir",
            inside(data, &agent.raft_dir),
            "data_dir lies in raft_dir, which belongs to the store alone",
        ),
        (
            "raft_dir",
            inside(&agent.state_dir, &agent.raft_dir),
            "state_dir lies in raft_dir, which belongs to the store alone",
        ),
    ];
    if let Some(wal) = wal_dir {
        rules.extend([
            ("wal_dir", inside(wal, data), "wal_dir lies in data_dir; leave it out to have WAL there"),
            ("wal_dir", inside(data, wal), "data_dir lies in wal_dir"),
            ("wal_dir", inside(&agent.raft_dir, wal), "raft_dir lies in wal_dir, which a re-clone empties"),
            (
                "wal_dir",
                inside(wal, &agent.raft_dir),
                "wal_dir lies in raft_dir, which belongs to the store alone",
            ),
            ("wal_dir", inside(&agent.state_dir, wal), "state_dir lies in wal_dir, which a re-clone empties"),
        ]);
    }
    for (key, broken, why) in rules {
        let directories = ["state_dir", "data_dir", "raft_dir", "wal_dir"];
        let unread = directories.iter().any(|key| reader.is_broken(&top.at.key(*key)));
        if broken && !unread {
            let span = reader.span_of(&top.at.key(key));
            reader.mistake(Mistake::new(Kind::BrokenRule, span, why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_file_gets_the_defaults() {
        let agent =
            AgentFile::read("agent.toml", "name = \"a\"\nstate_dir = \"/var/lib/pgherd/\"\n").unwrap();
        assert_eq!(agent, AgentFile::new("a".parse().unwrap(), "/var/lib/pgherd"));
        assert_eq!(agent.data_dir, Path::new("/var/lib/pgherd/data"));
        assert_eq!(
            (agent.listen.to_string(), agent.health_listen.to_string()),
            (":8009".into(), ":8008".into())
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        let agent = AgentFile {
            herd: Some("0123456789abcdef".parse().unwrap()),
            join: vec!["192.0.2.1:8009".parse().unwrap(), "[2001:db8::1]:8010".parse().unwrap()],
            wal_dir: Some("/wal/\"odd\" name".into()),
            listen: "[::1]:9009".parse().unwrap(),
            ..AgentFile::new("a".parse().unwrap(), "/srv/pgherd")
        };
        assert_eq!(AgentFile::read("agent.toml", &agent.write()).unwrap(), agent);
    }

    #[test]
    fn addresses_have_ports() {
        for right in ["a:1", "192.0.2.1:65535", "[::1]:8009"] {
            assert_eq!(right.parse::<HostPort>().unwrap().to_string(), right);
        }
        for wrong in ["", "a", ":1", "a:0", "a:65536", "::1:8009", "[a]:1", "http://a:1", "a b:1", "[::1]"] {
            assert!(wrong.parse::<HostPort>().is_err(), "{wrong}");
        }
        assert_eq!("0.0.0.0:1".parse::<Listen>().unwrap(), ":1".parse().unwrap());
        assert!("localhost:1".parse::<Listen>().is_err());
    }
}
