//! The rules between the parts of a specification, each with its reason and what to do instead.
//!
//! An error names its place by keys and indices ([`Place`]), so that whoever has the text can point into it.
//! Everything that is wrong is told at once; a rule whose premise is broken by another error stays silent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::time::Duration;

use super::backup::{self, AzureKeyFile, Location, RepositorySpec, SecretFile};
use super::hba::{HbaError, HbaLine, HbaWrong};
use super::ident::{IdentLine, MappedRole};
use super::parameters::{self, AT_LEAST_THE_PRIMARYS, ParameterError};
use super::times::{Span, TimesError};
use super::vip::{self, Prefixed, Unsuitable};
use super::{
    ClusterSpec, Durability, HerdSpec, MAX_PRIORITY, NodeSpec, PostgresSource, ProxyTls, SqlName, TlsMode,
    is_host,
};
use crate::types::NodeName;

/// Nodes of one cluster. The primary keeps a slot and a WAL sender for each; elections look at all of them.
pub const MAX_NODES: usize = 32;
/// PostgreSQL counts `recovery_min_apply_delay` in milliseconds in 31 bits, which is not quite 25 days.
pub const MAX_DELAY: Duration = Duration::from_secs(24 * 24 * 3600);
/// A day without the declared redundancy is not a degraded cluster but an asynchronous one.
pub const MAX_DEGRADE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Where in a specification: `cluster[0].node[2].follow`, in the words of the herd file.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(pub Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Key(String),
    Index(usize),
}

impl Place {
    pub fn key(&self, key: impl Into<String>) -> Place {
        let mut steps = self.0.clone();
        steps.push(Step::Key(key.into()));
        Place(steps)
    }

    pub fn index(&self, index: usize) -> Place {
        let mut steps = self.0.clone();
        steps.push(Step::Index(index));
        Place(steps)
    }

    /// Whether this is `outer` or lies in it.
    pub fn is_in(&self, outer: &Place) -> bool {
        self.0.starts_with(&outer.0)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if position == 0 => write!(f, "{key}")?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    pub at: Place,
    pub wrong: Wrong,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.wrong)
    }
}

impl std::error::Error for SpecError {}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    Times(TimesError),
    NoCluster,
    SeveralClusters,
    NoNode,
    TooManyNodes { nodes: usize },
    NameTwice { name: NodeName, first: Place },
    NameReserved { name: NodeName },
    Host { host: String },
    PortZero,
    PortTwice { host: String, port: u16, by: NodeName, first: Place },
    ProxyPortTwice { port: u16, first: Place },
    ProxyPortOfNode { port: u16, by: NodeName, first: Place },
    FileNotAbsolute,
    CertificateWithoutKey { lacks: &'static str },
    NoClientAuthority { wanted: &'static str },
    CertificateUser { name: String },
    Priority { priority: u16 },
    FollowsItself,
    FollowsUnknown { follow: NodeName, meant: Option<NodeName> },
    FollowsInACircle { circle: Vec<NodeName> },
    Delay { delay: Duration },
    NeededZero,
    TooFewElectable { needed: usize, electable: usize, voter: bool },
    NoneElectable,
    DegradeTooSoon { degrade_after: Duration, suspect: Duration },
    DegradeTooLate { degrade_after: Duration },
    Version { version: u16 },
    BinDirNotAbsolute,
    Parameter(ParameterError),
    ParameterOfOneNode { name: String },
    Hba(HbaError),
    DatabaseTwice { name: SqlName, first: Place },
    DatabaseReserved { name: SqlName },
    RoleReserved { name: SqlName },
    VipUnsuitable { address: Prefixed, why: Unsuitable },
    VipOfNode { address: Prefixed, name: NodeName, first: Place },
    VipTwice { address: Prefixed, first: Place },
    VipInterface { name: String },
    VipOnLoopback { host: String },
    VipOnOneHost { host: String },
    VipNeedsLease { lease: Duration, least: Duration },
    Keeper { name: NodeName, is_node: bool },
    VoterOfNothing,
    VoterInDirectory { hosts: usize },
    ArchiveInterval { interval: Duration },
    ScheduleFields { fields: usize },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wrong::Times(error) => error.fmt(f),
            Wrong::NoCluster => write!(f, "the herd has no cluster"),
            Wrong::SeveralClusters => write!(f, "a second cluster in one herd is not built yet"),
            Wrong::NoNode => write!(f, "the cluster has no node"),
            Wrong::TooManyNodes { nodes } => {
                write!(f, "the cluster has {nodes} nodes, more than {MAX_NODES}")
            }
            Wrong::NameTwice { name, .. } => write!(f, "the name \"{name}\" is taken"),
            Wrong::NameReserved { name } => {
                write!(f, "the name \"{name}\" is reserved: pgherd's own begin so")
            }
            Wrong::Host { host } => write!(f, "\"{host}\" is neither an IP address nor the name of a host"),
            Wrong::PortZero => write!(f, "a port is 1 to 65535"),
            Wrong::PortTwice { host, port, by, .. } => {
                write!(f, "port {port} of {host} is taken by \"{by}\"")
            }
            Wrong::ProxyPortTwice { port, .. } => write!(f, "port {port} of the proxies is given twice"),
            Wrong::ProxyPortOfNode { port, by, .. } => {
                write!(f, "port {port} is taken by \"{by}\", and all of the herd is on one host")
            }
            Wrong::FileNotAbsolute => write!(f, "the path is not absolute"),
            Wrong::CertificateWithoutKey { lacks } => write!(f, "{lacks} is not given"),
            Wrong::CertificateUser { name } => {
                write!(f, "\"{name}\" cannot be written into pg_hba.conf as the name of one role")
            }
            Wrong::NoClientAuthority { wanted } => {
                write!(f, "{wanted} needs client_tls_ca_file: whose certificates are clients to show?")
            }
            Wrong::Priority { priority } => write!(f, "priority {priority} is more than {MAX_PRIORITY}"),
            Wrong::FollowsItself => write!(f, "the node follows itself"),
            Wrong::FollowsUnknown { follow, .. } => {
                write!(f, "the cluster has no node \"{follow}\" to follow")
            }
            Wrong::FollowsInACircle { circle } => {
                let names: Vec<&str> = circle.iter().map(NodeName::as_str).collect();
                write!(f, "the nodes follow each other in a circle: {}", names.join(" -> "))
            }
            Wrong::Delay { delay } => {
                write!(f, "a delay is 1ms to {}, not {}", Span(MAX_DELAY), Span(*delay))
            }
            Wrong::NeededZero => write!(f, "needed is 0: no standby would have an acknowledged commit"),
            Wrong::TooFewElectable { needed, electable, voter } => write!(
                f,
                "needed = {needed} asks for {} nodes that may become primary{}, and there {}",
                needed.saturating_add(usize::from(!voter)),
                if *voter { " beside the repository" } else { "" },
                if *electable == 1 { "is 1".to_owned() } else { format!("are {electable}") }
            ),
            Wrong::VoterOfNothing => {
                write!(
                    f,
                    "voter = true has commits wait for the repository, and with durability = \"async\" they wait for nobody"
                )
            }
            Wrong::VoterInDirectory { hosts } => write!(
                f,
                "voter = true with a directory that {hosts} hosts mount: what one of them has written another may see a minute later, and acknowledged commits would be lost by that"
            ),
            Wrong::NoneElectable => {
                write!(f, "no node may become primary: all are delayed or have priority 0")
            }
            Wrong::DegradeTooSoon { degrade_after, suspect } => write!(
                f,
                "degrade_after is {}, less than suspect ({}): a hiccup would put acknowledged commits at risk",
                Span(*degrade_after),
                Span(*suspect)
            ),
            Wrong::DegradeTooLate { degrade_after } => write!(
                f,
                "degrade_after is {}, more than {}: nobody waits that long for a commit",
                Span(*degrade_after),
                Span(MAX_DEGRADE_AFTER)
            ),
            Wrong::Version { version } => {
                let (first, last) = (parameters::VERSIONS.start(), parameters::VERSIONS.end());
                write!(f, "PostgreSQL {version} is not supported; {first} to {last} are")
            }
            Wrong::BinDirNotAbsolute => write!(f, "bin_dir is not an absolute path"),
            Wrong::Parameter(error) => error.fmt(f),
            Wrong::ParameterOfOneNode { name } => write!(
                f,
                "{name} must be the same on every node: a standby with less than its primary does not start, and \
                 any node may become primary"
            ),
            Wrong::Hba(error) => error.fmt(f),
            Wrong::DatabaseTwice { name, .. } => write!(f, "the database \"{name}\" is listed twice"),
            Wrong::DatabaseReserved { name } => write!(f, "the database \"{name}\" is PostgreSQL's own"),
            Wrong::RoleReserved { name } => write!(f, "the role \"{name}\" is reserved"),
            Wrong::VipUnsuitable { address, why } => write!(f, "{address} {why}"),
            Wrong::VipOfNode { address, name, .. } => {
                write!(f, "{} is the address of \"{name}\" itself, which never moves", address.address)
            }
            Wrong::VipTwice { address, .. } => {
                write!(f, "{} moves with the gate of another cluster", address.address)
            }
            Wrong::VipInterface { name } => {
                write!(f, "\"{name}\" is no interface that an address can be announced from")
            }
            Wrong::VipOnLoopback { host } => {
                write!(f, "a node is on {host}, and an address that moves needs nodes on a network")
            }
            Wrong::VipOnOneHost { host } => {
                write!(f, "all nodes are on {host}, and an address that moves needs hosts to move between")
            }
            Wrong::Keeper { name, is_node: true } => {
                write!(
                    f,
                    "{name} has a cluster's data on its host, and would lose its backups together with them"
                )
            }
            Wrong::Keeper { name, is_node: false } => write!(f, "there is no witness \"{name}\""),
            Wrong::ArchiveInterval { interval } => write!(
                f,
                "archive_interval is {} to {}, not {}",
                Span(backup::SHORTEST_ARCHIVE_INTERVAL),
                Span(backup::LONGEST_ARCHIVE_INTERVAL),
                Span(*interval)
            ),
            Wrong::ScheduleFields { fields } => {
                write!(
                    f,
                    "a schedule has five fields (minute, hour, day, month, day of the week), not {fields}"
                )
            }
            Wrong::VipNeedsLease { lease, least } => write!(
                f,
                "lease is {}, and an address that goes by itself needs {} at least, with this renew",
                Span(*lease),
                Span(*least)
            ),
        }
    }
}

impl Wrong {
    /// What to do instead, as a full clause.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Wrong::NoCluster => "add a [[cluster]] with its [[cluster.node]]s",
            Wrong::NoNode => "add at least one [[cluster.node]]",
            Wrong::SeveralClusters => "make a herd file of its own for it",
            Wrong::NameTwice { .. } => "names of nodes and witnesses are unique in the herd",
            Wrong::NameReserved { .. } => "choose one that does not begin with \"pgherd\"",
            Wrong::Host { .. } => "leave out port and scheme: host = \"192.0.2.10\"",
            Wrong::PortTwice { .. } => "nodes on one host need a port and an api_port each",
            Wrong::ProxyPortTwice { .. } => {
                "port leads to the primary and read_port to standbys, and each cluster has its own"
            }
            Wrong::ProxyPortOfNode { .. } => "choose one that no node has as its port or api_port",
            Wrong::FileNotAbsolute => "write it from the root: every proxy reads it on its own host",
            Wrong::CertificateWithoutKey { .. } => {
                "client_tls_cert_file and client_tls_key_file belong together; without both clients are shown the herd's own"
            }
            Wrong::CertificateUser { .. } => {
                "rename the role: names without quotes, that do not begin with /, + or @"
            }
            Wrong::NoClientAuthority { .. } => "client_tls_ca_file = \"/etc/pgherd/clients.pem\"",
            Wrong::Priority { .. } => {
                "0 is never promoted, 100 the default; greater is preferred between equals"
            }
            Wrong::FollowsUnknown { meant: Some(meant), .. } => {
                return Some(format!("did you mean \"{meant}\"?"));
            }
            Wrong::FollowsUnknown { meant: None, .. } => "only a node of the same cluster can be followed",
            Wrong::FollowsItself | Wrong::FollowsInACircle { .. } => {
                "leave \"follow\" out where a node is to follow the primary"
            }
            Wrong::NeededZero => "durability = \"async\" says so openly",
            Wrong::TooFewElectable { .. } => {
                "add nodes that are not delayed and have a priority above 0, ask for fewer, or set durability = \
                 \"async\", with which a failover may lose the last commits"
            }
            Wrong::NoneElectable => "give one node a priority above 0 and no delay",
            Wrong::VoterOfNothing => "set durability = \"quorum\", or leave voter out",
            Wrong::VoterInDirectory { .. } => {
                "keeper = NAME has it on the disk of one [[witness]]; an s3://, gs:// or azure:// repository may vote as well"
            }
            Wrong::BinDirNotAbsolute => {
                "name the directory of initdb and postgres: \"/usr/lib/postgresql/15/bin\""
            }
            Wrong::ParameterOfOneNode { .. } => "set it in [postgres] parameters",
            Wrong::RoleReserved { .. } => "the owner is a role of the application, such as \"app\"",
            Wrong::VipUnsuitable { .. } | Wrong::VipOfNode { .. } => {
                "give a free address of the nodes' network, with its prefix length: \"192.168.122.10/24\""
            }
            Wrong::VipTwice { .. } => "each cluster has an address of its own",
            Wrong::VipInterface { .. } => {
                "name the one that the nodes' network is on, as ip address shows it: \"eth0\""
            }
            Wrong::VipOnLoopback { .. } | Wrong::VipOnOneHost { .. } => {
                "leave it out: clients reach a herd on one machine through its proxy"
            }
            Wrong::VipNeedsLease { .. } => "set a longer lease, or a shorter renew",
            Wrong::Keeper { .. } => "name a [[witness]] on a host of its own",
            Wrong::ArchiveInterval { .. } => {
                "it is how much may be lost with the primary; \"never\" archives whole segments alone"
            }
            Wrong::ScheduleFields { .. } => {
                "\"0 2 * * *\" is two o'clock each night, in UTC; \"never\" takes none by itself"
            }
            Wrong::Parameter(error) => return error.hint(),
            Wrong::Hba(error) => return error.hint(),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// What is allowed and probably not meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecWarning {
    pub at: Place,
    pub doubt: Doubt,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    Md5,
    MapOfMembers { role: String },
    ServersUnverified { mode: TlsMode },
    LoneVoter { name: NodeName },
    StoreWithoutSpare { agents: usize },
    StoreOnOneHost { host: String, held: usize, agents: usize },
    LoopbackAmongHosts { host: String },
    NeverPromotedVoter { name: NodeName },
    Raised { name: String, to: u64 },
    DirectoryOnEachHost { hosts: usize },
    NothingGoes,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doubt::Md5 => {
                write!(f, "md5 lets clients log in with a method that can be replayed by whoever reads it")
            }
            Doubt::MapOfMembers { role } => {
                write!(f, "a proxy does not know who is a member of {role}, and lets nobody in by this line")
            }
            Doubt::ServersUnverified { mode } => {
                let risk = match mode {
                    TlsMode::Disable | TlsMode::Allow => {
                        "whoever is between a proxy and a server reads what they say"
                    }
                    TlsMode::VerifyCa => {
                        "a proxy takes any host with a certificate of the herd for the server"
                    }
                    _ => "a proxy takes whoever answers for the server",
                };
                write!(f, "with {mode} {risk}")
            }
            Doubt::LoneVoter { .. } => {
                write!(f, "writes stop while either of the two nodes is away, since each commit needs both")
            }
            Doubt::StoreWithoutSpare { agents } => write!(
                f,
                "{agents} agents keep the store, so its majority is gone when {}",
                if *agents == 1 { "it is" } else { "one of them is" }
            ),
            Doubt::StoreOnOneHost { host, held, agents } => {
                write!(f, "{host} holds {held} of the store's {agents} votes, so it is gone with that host")
            }
            Doubt::LoopbackAmongHosts { host } => write!(f, "{host} is another machine on each of the hosts"),
            Doubt::NeverPromotedVoter { name } => write!(
                f,
                "{name} counts for commits but is never promoted: when it alone has the last ones, another node \
                 must fetch them from it first"
            ),
            Doubt::DirectoryOnEachHost { hosts } => write!(
                f,
                "the nodes are on {hosts} hosts, and the repository's directory must be the same one on all of them"
            ),
            Doubt::NothingGoes => write!(f, "without retention no base backup and no WAL ever goes"),
            Doubt::Raised { name, to } => write!(f, "{name} is {to} at least, so that is what it will be"),
        }
    }
}

impl Doubt {
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Doubt::DirectoryOnEachHost { .. } => {
                "keeper = NAME puts it on the disk of a [[witness]]; or mount it from one place, or use an s3://, gs:// or azure:// repository: a host that finds another directory there archives nothing"
            }
            Doubt::NothingGoes => "retention = \"RECOVERY WINDOW OF 7 DAYS\", or \"REDUNDANCY 3\"",
            Doubt::ServersUnverified { .. } => {
                "leave it out: the herd's own certificates need no care, and verify-full is the default"
            }
            Doubt::MapOfMembers { .. } => {
                "list the roles, if clients with certificates come through a proxy; PostgreSQL itself understands it"
            }
            Doubt::Md5 => "scram-sha-256 works with every driver of the last years",
            Doubt::LoneVoter { .. } => "add a third node, or set degrade_after to how long commits may wait",
            Doubt::StoreWithoutSpare { .. } => "add a [[witness]] on another host",
            Doubt::StoreOnOneHost { .. } => "spread the nodes, or add a [[witness]] on another host",
            Doubt::LoopbackAmongHosts { .. } => "give the address by which the other hosts reach it",
            Doubt::NeverPromotedVoter { .. } => {
                "a delay instead keeps a node out of the durability rule as well"
            }
            Doubt::Raised { .. } => "leave it out, or ask for more",
        };
        Some(hint.to_owned())
    }
}

impl HerdSpec {
    /// Every rule that does not hold, in the order of the file.
    pub fn check(&self) -> Vec<SpecError> {
        let mut errors = Vec::new();
        let root = Place::default();
        let mut add = |at: Place, wrong: Wrong| errors.push(SpecError { at, wrong });

        for error in self.times.check() {
            add(root.key("times").key(error.time().key()), Wrong::Times(error));
        }
        match self.clusters.len() {
            0 => add(root.key("cluster"), Wrong::NoCluster),
            1 => {}
            _ => add(root.key("cluster").index(1), Wrong::SeveralClusters),
        }

        let mut names: BTreeMap<&NodeName, Place> = BTreeMap::new();
        let mut ports: BTreeMap<(&str, u16), (&NodeName, Place)> = BTreeMap::new();
        for (at, name, host, port, api_port) in self.addresses() {
            if name.as_str().starts_with("pgherd") {
                add(at.key("name"), Wrong::NameReserved { name: name.clone() });
            }
            match names.get(name) {
                Some(first) => {
                    add(at.key("name"), Wrong::NameTwice { name: name.clone(), first: first.clone() });
                }
                None => {
                    names.insert(name, at.key("name"));
                }
            }
            if !is_host(host) {
                add(at.key("host"), Wrong::Host { host: host.to_owned() });
                continue;
            }
            for (key, port) in [("port", port), ("api_port", Some(api_port))] {
                let (at, Some(port)) = (at.key(key), port) else { continue };
                if port == 0 {
                    add(at, Wrong::PortZero);
                } else if let Some((by, first)) = ports.get(&(host, port)) {
                    let (host, by, first) = (host.to_owned(), (*by).clone(), first.clone());
                    add(at, Wrong::PortTwice { host, port, by, first });
                } else {
                    ports.insert((host, port), (name, at));
                }
            }
        }

        // Where proxies run is not in the file. They share a host with the nodes for certain if there is one.
        let one_host =
            self.agents().all(|(_, host, _)| self.agents().next().is_some_and(|(_, first, _)| first == host));
        let mut proxies: BTreeMap<u16, Place> = BTreeMap::new();
        for (index, cluster) in self.clusters.iter().enumerate() {
            let Some(proxy) = &cluster.proxy else { continue };
            let at = root.key("cluster").index(index).key("proxy");
            for (key, port) in [("port", proxy.port), ("read_port", proxy.read_port)] {
                let at = at.key(key);
                let of_node = ports.iter().find(|((_, taken), _)| one_host && *taken == port);
                if port == 0 {
                    add(at, Wrong::PortZero);
                } else if let Some(first) = proxies.get(&port) {
                    add(at, Wrong::ProxyPortTwice { port, first: first.clone() });
                } else if let Some((_, (by, first))) = of_node {
                    add(at, Wrong::ProxyPortOfNode { port, by: (*by).clone(), first: first.clone() });
                } else {
                    proxies.insert(port, at);
                }
            }
            check_tls(&proxy.tls, &root.key("cluster").index(index).key("proxy"), &mut add);
        }

        for (index, cluster) in self.clusters.iter().enumerate() {
            let Some(spec) = &cluster.backup else { continue };
            let at = root.key("cluster").index(index).key("backup");
            let bounds = backup::SHORTEST_ARCHIVE_INTERVAL..=backup::LONGEST_ARCHIVE_INTERVAL;
            if let Some(interval) = spec.archive_interval.filter(|interval| !bounds.contains(interval)) {
                add(at.key("archive_interval"), Wrong::ArchiveInterval { interval });
            }
            for (key, schedule) in [("schedule", &spec.schedule), ("drill", &spec.drill)] {
                let fields = schedule.as_ref().map(|schedule| schedule.split_ascii_whitespace().count());
                if let Some(fields) = fields.filter(|fields| *fields != 5) {
                    add(at.key(key), Wrong::ScheduleFields { fields });
                }
            }
            if spec.drill_dir.as_ref().is_some_and(|dir| !dir.is_absolute()) {
                add(at.key("drill_dir"), Wrong::FileNotAbsolute);
            }
            if let Location::Kept { keeper, .. } = &spec.repository.location
                && !self.witnesses.iter().any(|witness| witness.name == *keeper)
            {
                let is_node = self.node(keeper).is_some();
                add(at.key("keeper"), Wrong::Keeper { name: keeper.clone(), is_node });
            }
            for (key, path) in files_of(&spec.repository) {
                if !path.is_absolute() {
                    add(at.key(key), Wrong::FileNotAbsolute);
                }
            }
            if spec.voter {
                if matches!(cluster.durability, Durability::Async) {
                    add(at.key("voter"), Wrong::VoterOfNothing);
                }
                // Whoever elects seals it, and whoever streams has to see that at once: no mounted directory promises it.
                let hosts: BTreeSet<&str> = self.agents().map(|(_, host, _)| host).collect();
                if hosts.len() > 1 && matches!(spec.repository.location, Location::Directory(_)) {
                    add(at.key("voter"), Wrong::VoterInDirectory { hosts: hosts.len() });
                }
            }
        }

        let mut vips: BTreeMap<core::net::IpAddr, Place> = BTreeMap::new();
        for (index, cluster) in self.clusters.iter().enumerate() {
            let Some(vip) = &cluster.vip else { continue };
            let at = root.key("cluster").index(index).key("vip");
            let address = vip.address;
            if let Some(why) = vip::unsuitable(address) {
                add(at.key("address"), Wrong::VipUnsuitable { address, why });
            }
            let same = |host: &str| host.parse().is_ok_and(|host: core::net::IpAddr| host == address.address);
            if let Some((first, name, ..)) = self.addresses().find(|(_, _, host, ..)| same(host)) {
                let (name, first) = (name.clone(), first.key("host"));
                add(at.key("address"), Wrong::VipOfNode { address, name, first });
            }
            match vips.get(&address.address) {
                Some(first) => add(at.key("address"), Wrong::VipTwice { address, first: first.clone() }),
                None => drop(vips.insert(address.address, at.key("address"))),
            }
            if !vip::is_interface(&vip.interface) {
                add(at.key("interface"), Wrong::VipInterface { name: vip.interface.clone() });
            }
            let hosts: BTreeSet<&str> = cluster.nodes.iter().map(|node| node.host.as_str()).collect();
            let host = || hosts.first().map_or_else(String::new, |host| (*host).to_owned());
            if let Some(host) = hosts.iter().find(|host| is_loopback(host)) {
                add(at, Wrong::VipOnLoopback { host: (*host).to_owned() });
            } else if hosts.len() == 1 && cluster.nodes.len() > 1 {
                add(at, Wrong::VipOnOneHost { host: host() });
            }
            let least = self.times.renew + vip::GONE_BEFORE_LEASE_END + vip::SHORTEST_LIFE;
            if self.times.lease < least {
                let lease = self.times.lease;
                add(root.key("times").key("lease"), Wrong::VipNeedsLease { lease, least });
            }
        }

        for (index, cluster) in self.clusters.iter().enumerate() {
            cluster.check(&root.key("cluster").index(index), self.times.suspect, &mut add);
        }
        errors
    }

    /// Everything that is allowed and worth a second look.
    pub fn doubts(&self) -> Vec<SpecWarning> {
        let mut doubts = Vec::new();
        let root = Place::default();
        let mut add = |at: Place, doubt: Doubt| doubts.push(SpecWarning { at, doubt });

        for (index, cluster) in self.clusters.iter().enumerate() {
            let at = root.key("cluster").index(index);
            let version = cluster.postgres.version();
            for (line, text) in cluster.postgres.hba.iter().enumerate() {
                if HbaLine::parse(text, version).is_ok_and(|line| line.method == "md5") {
                    add(at.key("postgres").key("hba").index(line), Doubt::Md5);
                }
            }
            for (line, text) in cluster.postgres.ident.iter().enumerate() {
                if let Ok(IdentLine { role: MappedRole::MemberOf(role), .. }) =
                    IdentLine::parse(text, version)
                {
                    add(at.key("postgres").key("ident").index(line), Doubt::MapOfMembers { role });
                }
            }
            if let Some(spec) = &cluster.backup {
                let hosts: BTreeSet<&str> = cluster.nodes.iter().map(|node| node.host.as_str()).collect();
                if hosts.len() > 1 && matches!(spec.repository.location, Location::Directory(_)) {
                    add(
                        at.key("backup").key("repository"),
                        Doubt::DirectoryOnEachHost { hosts: hosts.len() },
                    );
                }
                let keeps_all = spec.retention.policy.is_none();
                if keeps_all {
                    add(at.key("backup"), Doubt::NothingGoes);
                }
            }
            let mode = cluster.proxy.as_ref().map(|proxy| proxy.tls.server_mode);
            if let Some(mode) = mode.filter(|mode| *mode < TlsMode::VerifyFull) {
                add(at.key("proxy").key("server_tls_mode"), Doubt::ServersUnverified { mode });
            }
            let everywhere = (at.key("postgres"), &cluster.postgres.parameters);
            let of_nodes = cluster.nodes.iter().enumerate();
            let of_nodes =
                of_nodes.map(|(position, node)| (at.key("node").index(position), &node.parameters));
            for (at, parameters) in std::iter::once(everywhere).chain(of_nodes) {
                for (name, value) in parameters {
                    let number = parameters::number(name, value, version);
                    if let (Some(number), Some(floor)) = (number, parameters::floor(name))
                        && number < floor as f64
                    {
                        let at = at.key("parameters").key(name.clone());
                        add(at, Doubt::Raised { name: name.clone(), to: floor });
                    }
                }
            }
            let Durability::Quorum { needed, degrade_after } = &cluster.durability else { continue };
            let voters: Vec<&NodeSpec> = cluster.nodes.iter().filter(|node| node.voter_candidate()).collect();
            let repository = cluster.backup.as_ref().is_some_and(|backup| backup.voter);
            if let ([_, lone], 1, None, false) = (voters.as_slice(), needed, degrade_after, repository) {
                add(at.key("degrade_after"), Doubt::LoneVoter { name: lone.name.clone() });
            }
            for (position, node) in cluster.nodes.iter().enumerate() {
                if node.voter_candidate() && !node.electable() {
                    let at = at.key("node").index(position).key("priority");
                    add(at, Doubt::NeverPromotedVoter { name: node.name.clone() });
                }
            }
        }

        let voters = self.store_voters(|_| true);
        let hosts: BTreeMap<&NodeName, &str> = self.agents().map(|(name, host, _)| (name, host)).collect();
        let distinct: BTreeSet<&str> = hosts.values().copied().collect();
        // Everything on one host is a herd to try things with; its host is what it stands and falls with.
        if distinct.len() > 1 {
            if voters.len() < 3 {
                add(root.key("cluster"), Doubt::StoreWithoutSpare { agents: hosts.len() });
            }
            for host in &distinct {
                let held = voters.iter().filter(|name| hosts.get(name) == Some(host)).count();
                if voters.len() >= 3 && held * 2 > voters.len() {
                    let (host, agents) = ((*host).to_owned(), voters.len());
                    add(root.key("cluster"), Doubt::StoreOnOneHost { host, held, agents });
                }
            }
            for (at, _, host, _, _) in self.addresses() {
                let loopback = is_loopback(host);
                if loopback || host == "localhost" {
                    add(at.key("host"), Doubt::LoopbackAmongHosts { host: host.to_owned() });
                }
            }
        }
        doubts
    }

    /// Every node and witness: its place, name, host, PostgreSQL's port and the API's.
    fn addresses(&self) -> impl Iterator<Item = (Place, &NodeName, &str, Option<u16>, u16)> {
        let root = Place::default();
        let clusters = root.key("cluster");
        let witnesses = root.key("witness");
        let nodes = self.clusters.iter().enumerate().flat_map(move |(index, cluster)| {
            let nodes = clusters.index(index).key("node");
            cluster.nodes.iter().enumerate().map(move |(position, node)| {
                (nodes.index(position), &node.name, node.host.as_str(), Some(node.port), node.api_port)
            })
        });
        nodes.chain(self.witnesses.iter().enumerate().map(move |(index, witness)| {
            (witnesses.index(index), &witness.name, witness.host.as_str(), None, witness.api_port)
        }))
    }
}

/// `localhost`, or an address that is another machine on each of the hosts.
fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<core::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl ClusterSpec {
    fn check(&self, at: &Place, suspect: Duration, add: &mut impl FnMut(Place, Wrong)) {
        if self.name.as_str().starts_with("pgherd") {
            add(at.key("name"), Wrong::NameReserved { name: self.name.clone() });
        }
        match self.nodes.len() {
            0 => add(at.key("node"), Wrong::NoNode),
            nodes if nodes > MAX_NODES => add(at.key("node"), Wrong::TooManyNodes { nodes }),
            _ => self.check_durability(at, suspect, add),
        }
        for (position, node) in self.nodes.iter().enumerate() {
            self.check_node(node, &at.key("node").index(position), add);
        }
        self.check_postgres(&at.key("postgres"), add);
        self.check_databases(&at.key("database"), add);
    }

    fn check_durability(&self, at: &Place, suspect: Duration, add: &mut impl FnMut(Place, Wrong)) {
        let electable = self.nodes.iter().filter(|node| node.electable()).count();
        let voter = self.backup.as_ref().is_some_and(|backup| backup.voter);
        match &self.durability {
            _ if electable == 0 => add(at.key("node"), Wrong::NoneElectable),
            Durability::Quorum { needed: 0, .. } => add(at.key("needed"), Wrong::NeededZero),
            Durability::Quorum { needed, .. } if electable + usize::from(voter) <= *needed => {
                add(at.key("needed"), Wrong::TooFewElectable { needed: *needed, electable, voter });
            }
            _ => {}
        }
        if let Some(degrade_after) = self.durability.degrade_after() {
            if degrade_after < suspect {
                add(at.key("degrade_after"), Wrong::DegradeTooSoon { degrade_after, suspect });
            } else if degrade_after > MAX_DEGRADE_AFTER {
                add(at.key("degrade_after"), Wrong::DegradeTooLate { degrade_after });
            }
        }
    }

    fn check_node(&self, node: &NodeSpec, at: &Place, add: &mut impl FnMut(Place, Wrong)) {
        if node.priority > MAX_PRIORITY {
            add(at.key("priority"), Wrong::Priority { priority: node.priority });
        }
        if let Some(delay) = node.delay.filter(|delay| delay.is_zero() || *delay > MAX_DELAY) {
            add(at.key("delay"), Wrong::Delay { delay });
        }
        if let Some(follow) = &node.follow {
            if *follow == node.name {
                add(at.key("follow"), Wrong::FollowsItself);
            } else if self.node(follow).is_none() {
                let others = self.nodes.iter().filter(|other| other.name != node.name);
                let meant = super::nearest(follow.as_str(), others.map(|other| other.name.as_str()));
                let meant = meant.and_then(|name| name.parse().ok());
                add(at.key("follow"), Wrong::FollowsUnknown { follow: follow.clone(), meant });
            } else if let Some(circle) = self.circle_from(node) {
                // Told once, at the circle's first node in the file.
                let first = self.nodes.iter().find(|other| circle.contains(&other.name));
                if first.is_some_and(|first| first.name == node.name) {
                    add(at.key("follow"), Wrong::FollowsInACircle { circle });
                }
            }
        }
        for (name, value) in &node.parameters {
            let at = at.key("parameters").key(name.clone());
            if AT_LEAST_THE_PRIMARYS.contains(&name.as_str()) || name == "wal_level" {
                add(at, Wrong::ParameterOfOneNode { name: name.clone() });
            } else if let Err(error) = parameters::check(name, value, self.postgres.version()) {
                add(at, Wrong::Parameter(error));
            }
        }
    }

    /// The circle that a node is part of, from it back to it.
    fn circle_from(&self, node: &NodeSpec) -> Option<Vec<NodeName>> {
        let mut circle = vec![node.name.clone()];
        let mut at = node;
        while let Some(next) = at.follow.as_ref().and_then(|name| self.node(name)) {
            circle.push(next.name.clone());
            if next.name == node.name {
                return Some(circle);
            }
            if circle.len() > self.nodes.len() {
                return None;
            }
            at = next;
        }
        None
    }

    fn check_postgres(&self, at: &Place, add: &mut impl FnMut(Place, Wrong)) {
        let version = self.postgres.version();
        match &self.postgres.source {
            PostgresSource::Version(version) if !parameters::VERSIONS.contains(version) => {
                // Every parameter would be told to be missing from a major that does not exist.
                return add(at.key("version"), Wrong::Version { version: *version });
            }
            PostgresSource::BinDir(path) if !path.is_absolute() => {
                add(at.key("bin_dir"), Wrong::BinDirNotAbsolute);
            }
            _ => {}
        }
        for (name, value) in &self.postgres.parameters {
            if let Err(error) = parameters::check(name, value, version) {
                add(at.key("parameters").key(name.clone()), Wrong::Parameter(error));
            }
        }
        let ident = &self.postgres.ident;
        let mapped: Vec<Result<IdentLine, HbaError>> =
            ident.iter().map(|text| IdentLine::parse(text, version)).collect();
        let is_map = |name: &str| mapped.iter().flatten().any(|line| line.map == name);
        // A map that is not known may be the one whose lines are wrong.
        let all_are_lines = mapped.iter().all(Result::is_ok);
        for (line, text) in self.postgres.hba.iter().enumerate() {
            let unknown = match HbaLine::parse(text, version) {
                Ok(HbaLine { map: Some((name, at)), .. }) if all_are_lines && !is_map(&name) => {
                    HbaError { at, wrong: HbaWrong::UnknownMap { name } }
                }
                Ok(_) => continue,
                Err(error) => error,
            };
            add(at.key("hba").index(line), Wrong::Hba(unknown));
        }
        for (line, found) in mapped.into_iter().enumerate() {
            if let Err(error) = found {
                add(at.key("ident").index(line), Wrong::Hba(error));
            }
        }
    }

    fn check_databases(&self, at: &Place, add: &mut impl FnMut(Place, Wrong)) {
        let mut seen: BTreeMap<&SqlName, Place> = BTreeMap::new();
        for (index, database) in self.databases.iter().enumerate() {
            let at = at.index(index);
            let (name, owner) = (&database.name, &database.owner);
            if matches!(name.as_str(), "postgres" | "template0" | "template1") {
                add(at.key("name"), Wrong::DatabaseReserved { name: name.clone() });
            } else if let Some(first) = seen.get(name) {
                add(at.key("name"), Wrong::DatabaseTwice { name: name.clone(), first: first.clone() });
            } else {
                seen.insert(name, at.key("name"));
            }
            let reserved = ["pg_", "pgherd"].iter().any(|prefix| owner.as_str().starts_with(prefix));
            if reserved || matches!(owner.as_str(), "postgres" | "public" | "none") {
                add(at.key("owner"), Wrong::RoleReserved { name: owner.clone() });
            }
        }
    }
}

/// The files that a repository needs on each host, by their keys.
fn files_of(repository: &RepositorySpec) -> Vec<(&'static str, &Path)> {
    let mut files = Vec::new();
    match &repository.location {
        Location::S3 { access_key_file, secret_key_file, .. } => {
            files.extend(access_key_file.as_deref().map(|path| ("access_key_file", path)));
            files.extend(secret_key_file.as_deref().map(|path| ("secret_key_file", path)));
        }
        Location::Gcs { service_account_file, .. } => {
            files.extend(service_account_file.as_deref().map(|path| ("service_account_file", path)));
        }
        Location::Azure { key, .. } => files.extend(key.as_ref().map(|key| match key {
            AzureKeyFile::AccountKey(path) => ("account_key_file", path.as_path()),
            AzureKeyFile::SasToken(path) => ("sas_token_file", path.as_path()),
        })),
        Location::Directory(_) | Location::Kept { .. } => {}
    }
    match &repository.secret {
        Some(SecretFile::Passphrase(path)) => files.push(("passphrase_file", path)),
        Some(SecretFile::Key(path)) => files.push(("key_file", path)),
        None => {}
    }
    files
}

fn check_tls(tls: &ProxyTls, at: &Place, add: &mut impl FnMut(Place, Wrong)) {
    for (key, file) in tls.files() {
        if file.is_some_and(|file| !file.starts_with('/')) {
            add(at.key(key), Wrong::FileNotAbsolute);
        }
    }
    match (&tls.client_cert_file, &tls.client_key_file) {
        (Some(_), None) => {
            add(
                at.key("client_tls_cert_file"),
                Wrong::CertificateWithoutKey { lacks: "client_tls_key_file" },
            );
        }
        (None, Some(_)) => {
            add(
                at.key("client_tls_key_file"),
                Wrong::CertificateWithoutKey { lacks: "client_tls_cert_file" },
            );
        }
        _ => {}
    }
    // What PostgreSQL takes for a pattern, a group or a file it takes for one in quotes, too, from some version on.
    let is_plain = |name: &str| {
        !name.starts_with(['/', '+', '@'])
            && !name.contains(|letter: char| letter == '"' || letter.is_control())
    };
    for (index, name) in tls.certificate_users.iter().enumerate().filter(|(_, name)| !is_plain(name)) {
        add(at.key("certificate_users").index(index), Wrong::CertificateUser { name: name.clone() });
    }
    if tls.client_ca_file.is_none() {
        if tls.client_mode >= TlsMode::VerifyCa {
            add(at.key("client_tls_mode"), Wrong::NoClientAuthority { wanted: tls.client_mode.as_str() });
        }
        if !tls.certificate_users.is_empty() {
            add(at.key("certificate_users"), Wrong::NoClientAuthority { wanted: "certificate_users" });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BackupSpec, ProxySpec, RepositorySpec, VipSpec, example};

    fn errors(change: impl FnOnce(&mut HerdSpec)) -> Vec<String> {
        let mut spec = example();
        change(&mut spec);
        spec.check().iter().map(SpecError::to_string).collect()
    }

    fn one(change: impl FnOnce(&mut HerdSpec), told: &str) {
        let errors = errors(change);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains(told), "{} does not tell {told}", errors[0]);
    }

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    #[test]
    fn a_repository_lies_on_the_disk_of_a_witness_or_of_nobody() {
        let kept = |keeper: &'static str| {
            move |spec: &mut HerdSpec| {
                let (keeper, path) = (name(keeper), "/srv/backups".into());
                let location = Location::Kept { keeper, path, through: None };
                spec.clusters[0].backup = Some(BackupSpec::new(RepositorySpec { location, secret: None }));
            }
        };
        assert_eq!(errors(kept("w")), Vec::<String>::new());
        one(kept("a"), "cluster[0].backup.keeper: a has a cluster's data on its host");
        one(kept("v"), "cluster[0].backup.keeper: there is no witness \"v\"");
        let mut spec = example();
        kept("w")(&mut spec);
        assert!(
            spec.is_keeper(&name("w")) && !spec.is_keeper(&name("a")) && !example().is_keeper(&name("w"))
        );
        let directory = |doubt: &Doubt| matches!(doubt, Doubt::DirectoryOnEachHost { .. });
        assert!(!spec.doubts().iter().any(|told| directory(&told.doubt)), "one disk is one place");
    }

    #[test]
    fn files_of_keys_are_the_same_ones_wherever_an_agent_is_started() {
        let in_cloud = |location: Location| {
            move |spec: &mut HerdSpec| {
                spec.clusters[0].backup = Some(BackupSpec::new(RepositorySpec { location, secret: None }));
            }
        };
        let gcs = |file: &str| Location::Gcs {
            url: "gs://bucket/shop".to_owned(),
            endpoint: None,
            allow_http: false,
            service_account_file: Some(file.into()),
        };
        let azure = |key| Location::Azure {
            url: "azure://container/shop".to_owned(),
            account: "shop".to_owned(),
            endpoint: None,
            allow_http: false,
            key: Some(key),
        };
        assert_eq!(errors(in_cloud(gcs("/etc/pgherd/account.json"))), Vec::<String>::new());
        assert_eq!(
            errors(in_cloud(azure(AzureKeyFile::SasToken("/etc/pgherd/sas".into())))),
            Vec::<String>::new()
        );
        one(in_cloud(gcs("account.json")), "cluster[0].backup.service_account_file: ");
        one(in_cloud(azure(AzureKeyFile::AccountKey("key".into()))), "cluster[0].backup.account_key_file: ");
        one(in_cloud(azure(AzureKeyFile::SasToken("sas".into()))), "cluster[0].backup.sas_token_file: ");
        let mut spec = example();
        in_cloud(gcs("/etc/pgherd/account.json"))(&mut spec);
        let directory = |doubt: &Doubt| matches!(doubt, Doubt::DirectoryOnEachHost { .. });
        assert!(!spec.doubts().iter().any(|told| directory(&told.doubt)), "a bucket is one place");
    }

    #[test]
    fn the_example_of_the_design_passes() {
        assert_eq!(errors(|_| {}), Vec::<String>::new());
        assert_eq!(example().doubts(), []);
    }

    #[test]
    fn each_rule_refuses_what_it_is_for() {
        one(|spec| spec.clusters.clear(), "cluster: the herd has no cluster");
        one(
            |spec| spec.clusters[0].nodes[3].name = name("a"),
            "cluster[0].node[3].name: the name \"a\" is taken",
        );
        one(|spec| spec.witnesses[0].name = name("a"), "witness[0].name: the name \"a\" is taken");
        one(|spec| spec.witnesses[0].name = name("pgherd_nobody"), "reserved");
        one(|spec| spec.clusters[0].nodes[0].host = "http://a".to_owned(), "neither an IP address nor");
        one(|spec| spec.clusters[0].nodes[0].host = "0.0.0.0".to_owned(), "neither an IP address nor");
        one(|spec| spec.clusters[0].nodes[0].port = 0, "a port is 1 to 65535");
        one(|spec| spec.clusters[0].nodes[0].api_port = 5432, "port 5432 of 192.168.122.253 is taken by");
        one(
            |spec| {
                spec.witnesses[0].host = spec.clusters[0].nodes[0].host.clone();
            },
            "witness[0].api_port: port 8009 of 192.168.122.253 is taken by \"a\"",
        );
        let proxy = |port, read_port| {
            move |spec: &mut HerdSpec| {
                spec.clusters[0].proxy = Some(ProxySpec { port, read_port, ..ProxySpec::default() });
            }
        };
        let tls = |change: fn(&mut ProxyTls)| {
            move |spec: &mut HerdSpec| {
                let mut tls = ProxyTls::default();
                change(&mut tls);
                spec.clusters[0].proxy = Some(ProxySpec { tls, ..ProxySpec::default() });
            }
        };
        one(
            tls(|tls| tls.client_mode = TlsMode::VerifyCa),
            "cluster[0].proxy.client_tls_mode: verify-ca needs client_tls_ca_file: whose certificates are clients to show?",
        );
        one(
            tls(|tls| tls.certificate_users = ["anna".to_owned()].into()),
            "cluster[0].proxy.certificate_users: certificate_users needs client_tls_ca_file: whose certificates are clients to show?",
        );
        one(
            tls(|tls| tls.client_ca_file = Some("ca.pem".to_owned())),
            "cluster[0].proxy.client_tls_ca_file: the path is not absolute",
        );
        one(
            tls(|tls| tls.client_cert_file = Some("/a.pem".to_owned())),
            "cluster[0].proxy.client_tls_cert_file: client_tls_key_file is not given",
        );
        one(
            tls(|tls| tls.client_key_file = Some("/a.key".to_owned())),
            "cluster[0].proxy.client_tls_key_file: client_tls_cert_file is not given",
        );
        one(proxy(0, 9998), "cluster[0].proxy.port: a port is 1 to 65535");
        one(proxy(7000, 7000), "cluster[0].proxy.read_port: port 7000 of the proxies is given twice");
        one(
            |spec| {
                spec.witnesses.clear();
                spec.clusters[0].nodes.truncate(1);
                spec.clusters[0].durability = Durability::Async;
                proxy(5432, 9998)(spec);
            },
            "cluster[0].proxy.port: port 5432 is taken by \"a\", and all of the herd is on one host",
        );
        assert_eq!(errors(proxy(5432, 8009)), Vec::<String>::new(), "a proxy may have a host of its own");
        let vip = |address: &'static str, interface: &'static str| {
            move |spec: &mut HerdSpec| {
                let address = address.parse().unwrap();
                spec.clusters[0].vip = Some(VipSpec { address, interface: interface.to_owned() });
            }
        };
        assert_eq!(errors(vip("192.168.122.10/24", "eth0")), Vec::<String>::new());
        one(
            vip("192.168.122.0/24", "eth0"),
            "cluster[0].vip.address: 192.168.122.0/24 is the address of the network itself",
        );
        one(
            vip("192.168.122.198/24", "eth0"),
            "cluster[0].vip.address: 192.168.122.198 is the address of \"b\" itself",
        );
        one(vip("192.168.122.40/24", "eth0"), "is the address of \"w\" itself");
        one(
            vip("192.168.122.10/24", "lo"),
            "cluster[0].vip.interface: \"lo\" is no interface that an address can be announced from",
        );
        one(
            |spec| {
                vip("192.168.122.10/24", "eth0")(spec);
                spec.clusters[0].nodes[0].host = "127.0.0.1".to_owned();
            },
            "cluster[0].vip: a node is on 127.0.0.1",
        );
        one(
            |spec| {
                vip("192.168.122.10/24", "eth0")(spec);
                for (index, node) in spec.clusters[0].nodes.iter_mut().enumerate() {
                    node.host = "db".to_owned();
                    node.port += index as u16;
                    node.api_port += index as u16;
                }
            },
            "cluster[0].vip: all nodes are on db",
        );
        one(
            |spec| {
                vip("192.168.122.10/24", "eth0")(spec);
                spec.times.renew = Duration::from_millis(300);
                spec.times.raft_election = Duration::from_secs(1);
                spec.times.lease = Duration::from_millis(1_650);
            },
            "times.lease: lease is 1650ms, and an address that goes by itself needs 1700ms at least",
        );
        let two = errors(|spec| {
            vip("192.168.122.10/24", "eth0")(spec);
            let mut second = spec.clusters[0].clone();
            second.nodes.clear();
            spec.clusters.push(second);
        });
        let twice = "cluster[1].vip.address: 192.168.122.10 moves with the gate of another cluster";
        assert!(two.iter().any(|error| error == twice), "{two:?}");
        one(|spec| spec.clusters[0].nodes[0].priority = 1001, "priority 1001 is more than 1000");
        one(
            |spec| spec.clusters[0].nodes[2].follow = Some(name("c")),
            "node[2].follow: the node follows itself",
        );
        one(|spec| spec.clusters[0].nodes[2].follow = Some(name("z")), "no node \"z\"");
        one(|spec| spec.clusters[0].nodes[1].follow = Some(name("c")), "a circle: b -> c -> b");
        one(|spec| spec.clusters[0].nodes[3].delay = Some(Duration::ZERO), "a delay is 1ms");
        one(|spec| spec.clusters[0].durability = quorum(0, None), "needed is 0");
        one(
            |spec| spec.clusters[0].durability = quorum(3, None),
            "asks for 4 nodes that may become primary, and there are 3",
        );
        one(|spec| spec.clusters[0].durability = quorum(usize::MAX, None), "asks for");
        let votes = |durability: Durability, url: Option<&str>| {
            let location = match url {
                Some(url) => {
                    let (endpoint, allow_http, service_account_file) = (None, false, None);
                    Location::Gcs { url: url.to_owned(), endpoint, allow_http, service_account_file }
                }
                None => Location::Directory("/srv/backups".into()),
            };
            move |spec: &mut HerdSpec| {
                let mut backup = BackupSpec::new(RepositorySpec { location, secret: None });
                backup.voter = true;
                spec.clusters[0].backup = Some(backup);
                spec.clusters[0].durability = durability;
            }
        };
        assert_eq!(errors(votes(quorum(3, None), Some("gs://bucket"))), [] as [&str; 0], "one more voter");
        one(
            votes(quorum(4, None), Some("gs://bucket")),
            "asks for 4 nodes that may become primary beside the repository, and there are 3",
        );
        one(votes(Durability::Async, Some("gs://bucket")), "backup.voter: voter = true has commits wait");
        one(votes(quorum(1, None), None), "backup.voter: voter = true with a directory that");
        one(|spec| spec.clusters[0].durability = quorum(1, Some(1_000)), "less than suspect");
        one(|spec| spec.clusters[0].durability = quorum(1, Some(90_000_000)), "nobody waits that long");
        one(
            |spec| spec.clusters[0].postgres.source = PostgresSource::Version(13),
            "PostgreSQL 13 is not supported",
        );
        one(
            |spec| spec.clusters[0].postgres.source = PostgresSource::BinDir("bin".into()),
            "not an absolute path",
        );
        one(
            |spec| spec.clusters[0].postgres.hba = vec!["hostssl all all all cert map=people".to_owned()],
            "cluster[0].postgres.hba[0]: no line of ident belongs to the map \"people\"",
        );
        one(
            |spec| {
                spec.clusters[0].postgres.hba = vec!["hostssl all all all cert map=people".to_owned()];
                spec.clusters[0].postgres.ident = vec!["people anna".to_owned()];
            },
            "cluster[0].postgres.ident[0]: the line ends before the role",
        );
        let mapped = errors(|spec| {
            spec.clusters[0].postgres.hba = vec!["hostssl all all all cert map=people".to_owned()];
            spec.clusters[0].postgres.ident = vec!["people Anna anna".to_owned()];
        });
        assert!(mapped.is_empty(), "{mapped:?}");
        one(
            |spec| spec.clusters[0].postgres.hba = vec!["host all all all trust".to_owned()],
            "trust is refused",
        );
        one(|spec| spec.clusters[0].databases[0].name = "template1".parse().unwrap(), "PostgreSQL's own");
        one(|spec| spec.clusters[0].databases[0].owner = "pg_monitor".parse().unwrap(), "is reserved");
        one(
            |spec| spec.clusters[0].databases.push(example().clusters[0].databases[0].clone()),
            "listed twice",
        );
        let set = |name: &'static str, value: &'static str| {
            move |spec: &mut HerdSpec| {
                spec.clusters[0].postgres.parameters.insert(name.to_owned(), value.to_owned());
            }
        };
        one(set("fsync", "off"), "cluster[0].postgres.parameters.fsync: \"fsync\" is not yours to set");
        one(set("wal_level", "minimal"), "wal_level = minimal is refused");
        one(
            |spec| {
                let parameters = &mut spec.clusters[0].nodes[1].parameters;
                parameters.insert("max_connections".to_owned(), "10".to_owned());
            },
            "must be the same on every node",
        );
        one(
            |spec| {
                for node in &mut spec.clusters[0].nodes {
                    node.priority = 0;
                }
            },
            "no node may become primary",
        );
    }

    #[test]
    fn a_circle_that_a_node_only_leads_into_is_told_at_the_circle() {
        let errors = errors(|spec| {
            let nodes = &mut spec.clusters[0].nodes;
            nodes[0].follow = Some(name("b"));
            nodes[1].follow = Some(name("c"));
            nodes[2].follow = Some(name("b"));
        });
        assert_eq!(
            errors,
            ["cluster[0].node[1].follow: the nodes follow each other in a circle: b -> c -> b"]
        );
    }

    #[test]
    fn doubts_are_told_and_do_not_refuse() {
        let doubts = |change: &dyn Fn(&mut HerdSpec)| {
            let mut spec = example();
            change(&mut spec);
            assert_eq!(spec.check(), []);
            spec.doubts().into_iter().map(|warning| warning.doubt).collect::<Vec<_>>()
        };
        let md5 = doubts(&|spec| spec.clusters[0].postgres.hba.push("host all all all md5".to_owned()));
        assert_eq!(md5, [Doubt::Md5]);
        for mode in TlsMode::ALL {
            let told = doubts(&|spec| {
                let tls = ProxyTls { server_mode: mode, ..ProxyTls::default() };
                spec.clusters[0].proxy = Some(ProxySpec { tls, ..ProxySpec::default() });
            });
            let doubt = (mode != TlsMode::VerifyFull).then_some(Doubt::ServersUnverified { mode });
            assert_eq!(told, Vec::from_iter(doubt), "{mode}");
        }
        let two = doubts(&|spec| {
            spec.clusters[0].nodes.truncate(2);
            spec.witnesses.clear();
        });
        assert_eq!(two, [Doubt::LoneVoter { name: name("b") }, Doubt::StoreWithoutSpare { agents: 2 }]);
        let one_host = doubts(&|spec| {
            for (index, node) in spec.clusters[0].nodes.iter_mut().enumerate().skip(1) {
                node.host = "192.168.122.253".to_owned();
                (node.port, node.api_port) = (6000 + index as u16, 7000 + index as u16);
            }
        });
        let host = "192.168.122.253".to_owned();
        assert_eq!(one_host, [Doubt::StoreOnOneHost { host, held: 4, agents: 5 }]);
        let loopback = doubts(&|spec| spec.witnesses[0].host = "127.0.0.1".to_owned());
        assert_eq!(loopback, [Doubt::LoopbackAmongHosts { host: "127.0.0.1".to_owned() }]);
        let raised = doubts(&|spec| {
            let few = ("max_wal_senders".to_owned(), "3".to_owned());
            spec.clusters[0].postgres.parameters.extend([few]);
        });
        assert_eq!(raised, [Doubt::Raised { name: "max_wal_senders".to_owned(), to: 16 }]);
        let voter = doubts(&|spec| spec.clusters[0].nodes[1].priority = 0);
        assert_eq!(voter, [Doubt::NeverPromotedVoter { name: name("b") }]);
    }

    fn quorum(needed: usize, degrade_after_ms: Option<u64>) -> Durability {
        Durability::Quorum { needed, degrade_after: degrade_after_ms.map(Duration::from_millis) }
    }
}
