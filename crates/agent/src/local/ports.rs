//! Which ports a herd on this machine has: three per node, in one block, chosen once and kept.
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ports {
    format: u32,
    pub(super) nodes: BTreeMap<NodeName, NodePorts>,
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
        Ports { format: FORMAT, nodes: nodes.iter().cloned().zip(firsts.map(ports)).collect() }
    }

    /// A port that another program listens on, and the node that it belongs to.
    fn taken(&self) -> Option<(&NodeName, u16)> {
        self.nodes.iter().find_map(|(node, ports)| Some((node, ports.taken()?)))
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
