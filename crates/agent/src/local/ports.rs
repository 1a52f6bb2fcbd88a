//! Which ports a herd on this machine has: three per node, in one block, chosen once and kept; and two of its
//! proxy, those of the herd file where they are free.
//!
//! Two herds that start at the same moment both find a block free. So whoever takes one also takes a name in
//! the kernel (an abstract socket, which lives in the same network namespace as the ports), and holds it as
//! long as it lives.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use pgherd_core::types::NodeName;
use serde::{Deserialize, Serialize};

use super::LocalError;
use super::home::Home;
use crate::pki::write_public;

const FORMAT: u32 = 1;
const FIRST: u16 = 21_000;
/// Ports that the kernel gives to outgoing connections begin above this.
const LAST: u16 = 32_000;
const PER_NODE: u16 = 3;
/// So far below a herd's own block, and as much its own, lie ports for its proxy.
const PROXY_BELOW: u16 = 11_000;
/// Pairs in the ten ports there.
const PROXY_PAIRS: u16 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodePorts {
    pub(super) postgres: u16,
    pub(super) api: u16,
    pub(super) health: u16,
}

impl NodePorts {
    fn all(self) -> [u16; 3] {
        [self.postgres, self.api, self.health]
    }
}

/// The two listeners of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProxyPorts {
    pub(super) read_write: u16,
    pub(super) read_only: u16,
}

/// What the proxy has, and what the herd file asked for then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptForProxy {
    asked: ProxyPorts,
    has: ProxyPorts,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ports {
    format: u32,
    pub(super) nodes: BTreeMap<NodeName, NodePorts>,
    /// A version without proxies passes over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    proxy: Option<KeptForProxy>,
}

/// A block of ports that nobody else may choose while this lives.
#[derive(Debug)]
pub(super) struct Claim {
    _name: UnixListener,
}

impl Ports {
    /// `None` if no herd was made here.
    pub(super) fn load(home: &Home) -> Result<Option<Ports>, LocalError> {
        let path = home.ports_file();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(LocalError::io("read", path)(error)),
        };
        let ports: Ports = serde_json::from_str(&text)
            .map_err(|error| LocalError::PortsMalformed { path: path.clone(), why: error.to_string() })?;
        if ports.format != FORMAT {
            let why = format!("format {}, this program reads {FORMAT}", ports.format);
            return Err(LocalError::PortsMalformed { path, why });
        }
        Ok(Some(ports))
    }

    pub(super) fn save(&self, home: &Home) -> Result<(), LocalError> {
        let path = home.ports_file();
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| LocalError::PortsMalformed { path: path.clone(), why: error.to_string() })?;
        write_public(&path, &format!("{text}\n")).map_err(|error| LocalError::Step {
            what: "keeping the ports".to_owned(),
            output: error.to_string(),
        })
    }

    /// The first free block for these nodes.
    pub(super) fn choose(nodes: &[NodeName]) -> Result<(Ports, Claim), LocalError> {
        let wanted = nodes.len() * usize::from(PER_NODE);
        let size = u16::try_from(wanted).unwrap_or(u16::MAX);
        // Blocks begin at tens, so that a port tells its herd; a larger herd takes several tens.
        let stride = size.div_ceil(10).saturating_mul(10).max(10);
        let mut base = FIRST;
        while base.saturating_add(size) <= LAST {
            let ports = Ports::from_base(base, nodes);
            if let Some(claim) = claim(base)
                && ports.taken().is_none()
            {
                return Ok((ports, claim));
            }
            base += stride;
        }
        Err(LocalError::NoPorts { wanted, first: FIRST })
    }

    /// Claims the block again that was chosen before. Whether its ports are free only the agents find out:
    /// some may be running.
    pub(super) fn claim(&self) -> Option<Claim> {
        claim(self.nodes.values().map(|ports| ports.postgres).min()?)
    }

    fn from_base(base: u16, nodes: &[NodeName]) -> Ports {
        let ports = |first: u16| NodePorts { postgres: first, api: first + 1, health: first + 2 };
        let firsts = (base..).step_by(usize::from(PER_NODE));
        Ports { format: FORMAT, nodes: nodes.iter().cloned().zip(firsts.map(ports)).collect(), proxy: None }
    }

    /// Free ports for a proxy that does not run: those that it had, if the file asks for what it asked for
    /// then, else those that it asks for, else some of the herd's own. `true` if that is news.
    pub(super) fn choose_for_proxy(&mut self, asked: ProxyPorts) -> Result<(ProxyPorts, bool), LocalError> {
        let first = self.nodes.values().map(|ports| ports.postgres).min().unwrap_or(FIRST);
        let first = first.saturating_sub(PROXY_BELOW);
        let had = self.proxy.filter(|kept| kept.asked == asked).map(|kept| kept.has);
        let own = (0..PROXY_PAIRS).map(|pair| first + 2 * pair);
        let own = own.map(|port| ProxyPorts { read_write: port + 1, read_only: port });
        let free = |ports: &ProxyPorts| !ports.all().into_iter().any(is_taken);
        let mut candidates = had.into_iter().chain([asked]).chain(own);
        let has = candidates.find(free).ok_or(LocalError::NoPorts { wanted: 2, first })?;
        let kept = Some(KeptForProxy { asked, has });
        let is_news = self.proxy != kept;
        self.proxy = kept;
        Ok((has, is_news))
    }

    /// A port that another program listens on, and the node that it belongs to.
    fn taken(&self) -> Option<(&NodeName, u16)> {
        self.nodes.iter().find_map(|(node, ports)| Some((node, ports.taken()?)))
    }
}

impl ProxyPorts {
    pub(super) fn all(self) -> [u16; 2] {
        [self.read_write, self.read_only]
    }
}

impl NodePorts {
    /// One of them that somebody listens on.
    fn taken(self) -> Option<u16> {
        self.all().into_iter().find(|port| is_taken(*port))
    }

    /// One of the agent's own; PostgreSQL may be running without its agent.
    pub(super) fn agents_taken(self) -> Option<u16> {
        [self.api, self.health].into_iter().find(|port| is_taken(*port))
    }
}

fn is_taken(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err()
}

fn claim(base: u16) -> Option<Claim> {
    let name = SocketAddr::from_abstract_name(format!("pgherd-ports-{base}")).ok()?;
    UnixListener::bind_addr(&name).ok().map(|name| Claim { _name: name })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(names: &[&str]) -> Vec<NodeName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn a_block_is_chosen_once_and_the_next_herd_gets_another() {
        let three = nodes(&["a", "b", "c"]);
        let (first, claim) = Ports::choose(&three).unwrap();
        let (second, _claim) = Ports::choose(&three).unwrap();
        let all = |ports: &Ports| ports.nodes.values().flat_map(|node| node.all()).collect::<Vec<u16>>();
        assert!(all(&first).iter().all(|port| !all(&second).contains(port)), "{first:?} {second:?}");
        assert_eq!(all(&first).len(), 9);
        assert!(first.claim().is_none(), "it is held");
        drop(claim);
        assert!(first.claim().is_some());
    }

    #[test]
    fn a_block_with_a_listener_in_it_is_passed_over() {
        let three = nodes(&["a", "b", "c"]);
        let (free, claim) = Ports::choose(&three).unwrap();
        let port = free.nodes.values().next_back().unwrap().health;
        let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        drop(claim);
        assert_eq!(free.taken().map(|(node, port)| (node.as_str(), port)), Some(("c", port)));
        let (next, _claim) = Ports::choose(&three).unwrap();
        assert_ne!(next, free);
    }

    #[test]
    fn a_proxy_has_what_the_file_asks_for_or_ports_of_its_herd_and_keeps_them() {
        let (mut ports, _claim) = Ports::choose(&nodes(&["a", "b", "c"])).unwrap();
        let listen = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let (one, other) = (listen(0), listen(0));
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let asked = ProxyPorts { read_write: port(&one), read_only: port(&other) };
        // One of the two is taken, so both are others.
        drop(one);
        let (has, is_news) = ports.choose_for_proxy(asked).unwrap();
        assert!(is_news && has.all().iter().all(|port| !asked.all().contains(port)), "{has:?}");
        let base = ports.nodes.values().map(|node| node.postgres).min().unwrap() - PROXY_BELOW;
        assert!(has.all().iter().all(|port| (base..base + 10).contains(port)), "{has:?}");

        // Clients know them by now, also when what was asked for is free again.
        drop(other);
        assert_eq!(ports.choose_for_proxy(asked).unwrap(), (has, false));
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        ports.save(&home).unwrap();
        let mut again = Ports::load(&home).unwrap().unwrap();
        assert_eq!(again.choose_for_proxy(asked).unwrap(), (has, false));
        // Unless somebody has taken one.
        let taken = listen(has.read_only);
        assert_eq!(again.choose_for_proxy(asked).unwrap(), (asked, true));
        drop(taken);
        // Or the file asks for others.
        let free = (listen(0), listen(0));
        let new = ProxyPorts { read_write: port(&free.0), read_only: port(&free.1) };
        drop(free);
        assert_eq!(ports.choose_for_proxy(new).unwrap(), (new, true));
    }

    #[test]
    fn what_is_kept_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        assert_eq!(Ports::load(&home).unwrap(), None);
        let ports = Ports::from_base(21_000, &nodes(&["a", "b"]));
        ports.save(&home).unwrap();
        assert_eq!(Ports::load(&home).unwrap(), Some(ports));
        std::fs::write(home.ports_file(), "{\"format\": 2, \"nodes\": {}}").unwrap();
        assert!(matches!(Ports::load(&home), Err(LocalError::PortsMalformed { .. })));
    }
}
