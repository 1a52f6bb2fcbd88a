//! What the operator wants, already validated: the herd file as values, without its text.
//!
//! Reading a file, its line numbers and its defaults are `agent::files`' business; here are the types that the
//! store keeps (as JSON, with a version) and the rules between them ([`HerdSpec::check`]), so that no way into
//! the store can go round a rule. [`plan`] tells what a change would do.
//!
//! Hazard: decisions trust a specification. One that passes `check` and still names a delayed node as a voter,
//! or two nodes by one name, loses data or promotes the wrong server.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::types::{Malformed, NodeName};

pub mod backup;
pub mod check;
pub mod hba;
pub mod ident;
mod nearest;
pub mod parameters;
pub mod plan;
mod proxy;
pub mod times;
mod tls;
pub mod vip;

pub use backup::{BackupSpec, RepositorySpec};
pub use check::{Place, SpecError, SpecWarning, Step};
pub use nearest::nearest;
pub use proxy::{OptionValue, Pool, ProxyOption, ProxySpec};
pub use times::{Span, Times};
pub use tls::{ProxyTls, TlsMode};
pub use vip::VipSpec;

/// The form in which the store keeps a specification. A reader refuses a later one instead of guessing.
pub const FORMAT: u32 = 1;

/// PostgreSQL's port, and the ports of an agent's API.
pub const DEFAULT_PORT: u16 = 5432;
pub const DEFAULT_API_PORT: u16 = 8009;
pub const DEFAULT_PRIORITY: u16 = 100;
/// A proxy's two ports.
pub const DEFAULT_PROXY_PORT: u16 = 9999;
pub const DEFAULT_PROXY_READ_PORT: u16 = 9998;
pub const DEFAULT_POOL_SIZE: u32 = 20;
pub const MAX_PRIORITY: u16 = 1000;
pub const DEFAULT_READ_WEIGHT: u16 = 1;
pub const MAX_READ_WEIGHT: u16 = 1000;
/// Raft's voters at most: a sixth would cost a round trip and tolerate no further loss.
pub const MAX_STORE_VOTERS: usize = 5;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HerdSpec {
    pub format: Format,
    pub name: NodeName,
    pub times: Times,
    pub clusters: Vec<ClusterSpec>,
    pub witnesses: Vec<WitnessSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterSpec {
    pub name: NodeName,
    pub durability: Durability,
    pub postgres: PostgresSpec,
    pub nodes: Vec<NodeSpec>,
    pub databases: Vec<DatabaseSpec>,
    /// Without one, proxies go by the defaults. A version that knows no proxies reads what has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxySpec>,
    /// An address that moves with the gate. A version that knows none reads what has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vip: Option<VipSpec>,
    /// Where WAL and base backups go. A version that knows no backups reads what has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupSpec>,
}

/// What an acknowledged commit has been through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "mode", deny_unknown_fields)]
pub enum Durability {
    /// `needed` voters beside the primary have flushed it.
    Quorum {
        needed: usize,
        /// After this long without enough voters commits go on with fewer, declared; `None`: they wait.
        #[serde(rename = "degrade_after_ms", with = "optional_millis")]
        degrade_after: Option<Duration>,
    },
    /// Only the primary has; a failover may lose the last commits, and counts them.
    Async,
}

impl Durability {
    /// How many voters must flush each commit: the W of the rules, 0 under `async`.
    pub fn needed(&self) -> usize {
        match self {
            Durability::Quorum { needed, .. } => *needed,
            Durability::Async => 0,
        }
    }

    pub fn degrade_after(&self) -> Option<Duration> {
        match self {
            Durability::Quorum { degrade_after, .. } => *degrade_after,
            Durability::Async => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresSpec {
    pub source: PostgresSource,
    /// Values as `postgresql.conf` takes them, without quotes.
    pub parameters: BTreeMap<String, String>,
    /// Lines of `pg_hba.conf`, after pgherd's own.
    pub hba: Vec<String>,
    /// Lines of `pg_ident.conf`, after pgherd's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ident: Vec<String>,
}

impl PostgresSpec {
    /// The major, where it was named; a directory of binaries is asked by whoever can.
    pub fn version(&self) -> Option<u16> {
        match &self.source {
            PostgresSource::Version(version) => Some(*version),
            PostgresSource::BinDir(_) => None,
        }
    }
}

/// Which PostgreSQL runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PostgresSource {
    /// The distribution's packages of this major version.
    Version(u16),
    /// The directory that holds `postgres`, `initdb` and the rest.
    BinDir(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    pub name: NodeName,
    pub host: String,
    pub port: u16,
    pub api_port: u16,
    /// Breaks ties between equal positions, greatest first; 0: never promoted.
    pub priority: u16,
    /// Streams from this node instead of the primary, unless that one is the primary or gone.
    pub follow: Option<NodeName>,
    /// Applies this long after the primary has committed.
    #[serde(rename = "delay_ms", with = "optional_millis")]
    pub delay: Option<Duration>,
    /// Over the cluster's.
    pub parameters: BTreeMap<String, String>,
    /// As a standby, its share of the reads beside those of the others; 0: none.
    #[serde(default = "default_read_weight", skip_serializing_if = "is_default_read_weight")]
    pub read_weight: u16,
}

fn default_read_weight() -> u16 {
    DEFAULT_READ_WEIGHT
}

fn is_default_read_weight(weight: &u16) -> bool {
    *weight == DEFAULT_READ_WEIGHT
}

impl NodeSpec {
    /// A node with the file's defaults.
    pub fn new(name: NodeName, host: impl Into<String>) -> NodeSpec {
        NodeSpec {
            name,
            host: host.into(),
            port: DEFAULT_PORT,
            api_port: DEFAULT_API_PORT,
            priority: DEFAULT_PRIORITY,
            follow: None,
            delay: None,
            parameters: BTreeMap::new(),
            read_weight: DEFAULT_READ_WEIGHT,
        }
    }

    /// May ever be promoted.
    pub fn electable(&self) -> bool {
        self.delay.is_none() && self.priority > 0
    }

    /// May ever count for a commit. A node that `follow`s another can, while it streams from the primary
    /// ([`ClusterSpec::upstream`]); one with priority 0 can, and is then streamed from before another leads.
    pub fn voter_candidate(&self) -> bool {
        self.delay.is_none()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessSpec {
    pub name: NodeName,
    pub host: String,
    pub api_port: u16,
}

/// A database that `init` creates, with its owner, a role that can log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatabaseSpec {
    pub name: SqlName,
    pub owner: SqlName,
}

/// The name of a database or role. Narrower than what PostgreSQL takes, so that it never needs quoting in a
/// conninfo, a `pg_hba.conf` or a file name; SQL quotes it all the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SqlName(String);

impl SqlName {
    /// PostgreSQL cuts longer names, silently.
    pub const MAX_BYTES: usize = 63;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SqlName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for SqlName {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<SqlName, Malformed> {
        let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
        let rest = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        if first && rest && text.len() <= SqlName::MAX_BYTES {
            return Ok(SqlName(text.to_owned()));
        }
        Err(Malformed {
            what: "a name of a database or role: a letter or underscore, then up to 62 letters, digits, \
                   underscores or hyphens",
            text: text.to_owned(),
        })
    }
}

impl Serialize for SqlName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SqlName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<SqlName, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl HerdSpec {
    pub fn cluster(&self, name: &NodeName) -> Option<&ClusterSpec> {
        self.clusters.iter().find(|cluster| cluster.name == *name)
    }

    /// A node and the cluster that it belongs to.
    pub fn node(&self, name: &NodeName) -> Option<(&ClusterSpec, &NodeSpec)> {
        self.clusters.iter().find_map(|cluster| Some((cluster, cluster.node(name)?)))
    }

    /// Everyone who keeps the store, in file order: name, host, port of the API.
    pub fn agents(&self) -> impl Iterator<Item = (&NodeName, &str, u16)> {
        let nodes = self.clusters.iter().flat_map(|cluster| &cluster.nodes);
        let nodes = nodes.map(|node| (&node.name, node.host.as_str(), node.api_port));
        nodes.chain(
            self.witnesses.iter().map(|witness| (&witness.name, witness.host.as_str(), witness.api_port)),
        )
    }

    /// Has this witness a repository on its disk?
    pub fn is_keeper(&self, name: &NodeName) -> bool {
        let backups = self.clusters.iter().filter_map(|cluster| cluster.backup.as_ref());
        let mut locations = backups.map(|backup| &backup.repository.location);
        locations.any(|location| matches!(location, backup::Location::Kept { keeper, .. } if keeper == name))
    }

    /// Who of the agents that have joined votes in the store: the largest odd number up to
    /// [`MAX_STORE_VOTERS`], distinct hosts first, in file order. An even number would cost a round trip
    /// without tolerating one loss more.
    pub fn store_voters(&self, joined: impl Fn(&NodeName) -> bool) -> Vec<NodeName> {
        let (mut first_on_host, mut others, mut hosts) = (Vec::new(), Vec::new(), BTreeSet::new());
        for (name, host, _) in self.agents().filter(|(name, _, _)| joined(name)) {
            if hosts.insert(host) { first_on_host.push(name.clone()) } else { others.push(name.clone()) }
        }
        first_on_host.append(&mut others);
        let count = first_on_host.len().min(MAX_STORE_VOTERS);
        first_on_host.truncate(if count % 2 == 0 { count.saturating_sub(1) } else { count });
        first_on_host
    }
}

impl ClusterSpec {
    /// Of its proxies; the default where the file says nothing.
    pub fn proxy_option(&self, option: ProxyOption) -> OptionValue {
        self.proxy.as_ref().map_or(option.default(), |proxy| proxy.option(option))
    }

    pub fn node(&self, name: &NodeName) -> Option<&NodeSpec> {
        self.nodes.iter().find(|node| node.name == *name)
    }

    /// Whom a standby streams from while all are up: the one that it `follow`s, else the primary.
    pub fn upstream<'a>(&'a self, node: &'a NodeSpec, primary: &'a NodeName) -> &'a NodeName {
        node.follow.as_ref().unwrap_or(primary)
    }

    /// The parameters of one node: the cluster's, with the node's own over them.
    pub fn parameters(&self, node: &NodeSpec) -> BTreeMap<String, String> {
        let mut parameters = self.postgres.parameters.clone();
        parameters.extend(node.parameters.clone());
        parameters
    }
}

/// An address that other hosts can be told to connect to, or the name of a host.
pub fn is_host(text: &str) -> bool {
    match text.parse::<core::net::IpAddr>() {
        Ok(address) => !address.is_unspecified() && !address.is_multicast(),
        Err(_) => is_host_name(text),
    }
}

/// A name as resolvers take it, underscores included; a last label of digits alone is a mistyped address.
fn is_host_name(text: &str) -> bool {
    const MAX_BYTES: usize = 253;
    const MAX_LABEL_BYTES: usize = 63;
    let label = |label: &str| {
        let edges = !label.starts_with('-') && !label.ends_with('-');
        let letters = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        !label.is_empty() && label.len() <= MAX_LABEL_BYTES && edges && letters
    };
    let last = text.rsplit('.').next().unwrap_or(text);
    text.len() <= MAX_BYTES && text.split('.').all(label) && !last.bytes().all(|byte| byte.is_ascii_digit())
}

/// The version under which a specification is stored: written as a number, read only if it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Format;

impl Serialize for Format {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(FORMAT)
    }
}

impl<'de> Deserialize<'de> for Format {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Format, D::Error> {
        match u32::deserialize(from)? {
            FORMAT => Ok(Format),
            other => Err(serde::de::Error::custom(format!(
                "the specification is stored in format {other}, this program reads format {FORMAT}"
            ))),
        }
    }
}

/// A duration as whole milliseconds, which every JSON reader keeps exactly.
mod millis {
    use super::*;

    pub(super) fn serialize<S: Serializer>(span: &Duration, to: S) -> Result<S::Ok, S::Error> {
        let ms = u64::try_from(span.as_millis()).map_err(serde::ser::Error::custom)?;
        to.serialize_u64(ms)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

mod optional_millis {
    use super::*;

    pub(super) fn serialize<S: Serializer>(span: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        match span {
            Some(span) => millis::serialize(span, to),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Duration::from_millis))
    }
}

/// The herd of the design's example, for tests of this module.
#[cfg(test)]
pub(crate) fn example() -> HerdSpec {
    let name = |text: &str| text.parse::<NodeName>().unwrap();
    let mut nodes: Vec<NodeSpec> = [("a", 253), ("b", 198), ("c", 192), ("d", 34)]
        .map(|(node, host)| NodeSpec::new(name(node), format!("192.168.122.{host}")))
        .into();
    nodes[2].follow = Some(name("b"));
    nodes[3].delay = Some(Duration::from_secs(300));
    HerdSpec {
        format: Format,
        name: name("shop"),
        times: Times::default(),
        clusters: vec![ClusterSpec {
            name: name("main"),
            durability: Durability::Quorum { needed: 1, degrade_after: None },
            postgres: PostgresSpec {
                source: PostgresSource::Version(15),
                parameters: [("max_connections", "100"), ("shared_buffers", "256MB")]
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into(),
                hba: vec!["host all all 192.168.122.0/24 scram-sha-256".to_owned()],
                ident: Vec::new(),
            },
            nodes,
            databases: vec![DatabaseSpec { name: "testix".parse().unwrap(), owner: "app".parse().unwrap() }],
            proxy: None,
            vip: None,
            backup: None,
        }],
        witnesses: vec![WitnessSpec {
            name: name("w"),
            host: "192.168.122.40".to_owned(),
            api_port: DEFAULT_API_PORT,
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_follow_from_delay_and_priority() {
        let spec = example();
        let of = |name: &str| spec.node(&name.parse().unwrap()).unwrap().1.clone();
        assert!(of("a").electable() && of("a").voter_candidate());
        assert!(of("c").electable() && of("c").voter_candidate());
        assert!(!of("d").electable() && !of("d").voter_candidate());
        let never = NodeSpec { priority: 0, ..of("a") };
        assert!(!never.electable() && never.voter_candidate());
    }

    #[test]
    fn a_follower_of_the_primary_streams_from_it() {
        let spec = example();
        let (cluster, c) = spec.node(&"c".parse().unwrap()).unwrap();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        assert_eq!(cluster.upstream(c, &a), &b);
        assert_eq!(cluster.upstream(c, &b), &b);
        assert_eq!(cluster.upstream(&cluster.nodes[1], &a), &a);
    }

    #[test]
    fn the_stores_voters_are_odd_and_on_distinct_hosts_first() {
        let mut spec = example();
        let names = |spec: &HerdSpec, joined: &[&str]| {
            let voters = spec.store_voters(|name| joined.contains(&name.as_str()));
            voters.iter().map(NodeName::to_string).collect::<Vec<_>>()
        };
        assert_eq!(names(&spec, &["a", "b", "c", "d", "w"]), ["a", "b", "c", "d", "w"]);
        assert_eq!(names(&spec, &["a", "b", "c", "w"]), ["a", "b", "c"]);
        assert_eq!(names(&spec, &["a", "b"]), ["a"]);
        assert_eq!(names(&spec, &["b"]), ["b"]);
        assert_eq!(names(&spec, &[]), Vec::<String>::new());
        spec.clusters[0].nodes[1].host = spec.clusters[0].nodes[0].host.clone();
        assert_eq!(names(&spec, &["a", "b", "c", "w"]), ["a", "c", "w"]);
    }

    #[test]
    fn hosts_are_addresses_or_names() {
        for right in ["10.0.0.1", "::1", "db-1", "db_1.example.com", "a", "127.0.0.1"] {
            assert!(is_host(right), "{right}");
        }
        let long = "x".repeat(254);
        for wrong in
            ["", "10.0.0.256", "10.0.0", "-a", "a..b", "a b", "a:5432", "[::1]", "0.0.0.0", "ä", &long]
        {
            assert!(!is_host(wrong), "{wrong}");
        }
    }
}
