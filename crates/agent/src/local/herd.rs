//! Which herd lives here: the one that `up` makes by itself, or a herd file with its hosts mapped to this one.

use std::path::{Path, PathBuf};

use pgherd_core::retention::{Policy, Unit};
use pgherd_core::spec::backup::Location;
use pgherd_core::spec::{
    BackupSpec, ClusterSpec, DatabaseSpec, Durability, Format, HerdSpec, NodeSpec, PostgresSource,
    PostgresSpec, ProxySpec, RepositorySpec, Times,
};
use pgherd_core::types::NodeName;
use pgherd_postgres::installation::Installation;

use super::LocalError;
use super::ports::Ports;
use crate::files;

const HOST: &str = "127.0.0.1";
const HERD: &str = "local";
const CLUSTER: &str = "main";
const NODES: [&str; 3] = ["a", "b", "c"];
const DATABASE: &str = "app";

/// Who may connect to a herd that `up` made: clients of this host, with a password.
const HBA: [&str; 3] = [
    "local all all scram-sha-256",
    "host all all 127.0.0.1/32 scram-sha-256",
    "host all all ::1/128 scram-sha-256",
];

/// Three nodes with the newest PostgreSQL of this machine, a database and its owner.
/// Its repository is in `backups`.
pub(super) async fn default_spec(backups: PathBuf) -> Result<HerdSpec, LocalError> {
    let installation = Installation::newest().await?;
    Ok(of_version(installation.version.major, backups))
}

fn of_version(major: u16, backups: PathBuf) -> HerdSpec {
    let repository = RepositorySpec { location: Location::Directory(backups), secret: None };
    let mut backup = BackupSpec::new(repository);
    backup.retention.policy = Some(Policy::Window { count: 7, unit: Unit::Days });
    let name = |text: &str| text.parse::<NodeName>().expect("a lower-case word is a name");
    let sql_name = || DATABASE.parse().expect("a lower-case word is a name");
    HerdSpec {
        format: Format,
        name: name(HERD),
        times: Times::default(),
        clusters: vec![ClusterSpec {
            name: name(CLUSTER),
            durability: Durability::Quorum { needed: 1, degrade_after: None },
            postgres: PostgresSpec {
                source: PostgresSource::Version(major),
                parameters: Default::default(),
                // Everything here is on this host, and so are its clients.
                hba: HBA.map(str::to_owned).to_vec(),
                ident: Vec::new(),
            },
            nodes: NODES.iter().map(|node| NodeSpec::new(name(node), HOST)).collect(),
            databases: vec![DatabaseSpec { name: sql_name(), owner: sql_name() }],
            // Nobody else can log in to a herd that is somebody's own.
            proxy: Some(ProxySpec { console_admins: [DATABASE.to_owned()].into(), ..ProxySpec::default() }),
            vip: None,
            backup: Some(backup),
        }],
        witnesses: Vec::new(),
    }
}

/// Reads a herd file as a person gave it, with its own hosts.
pub(super) fn read(path: &Path) -> Result<HerdSpec, LocalError> {
    let text = std::fs::read_to_string(path).map_err(LocalError::io("read", path))?;
    let read = files::herd::read(&path.display().to_string(), &text).map_err(LocalError::HerdFile)?;
    Ok(read.spec)
}

/// Fails where the PostgreSQL that a herd wants is not on this machine.
pub(super) async fn must_have_postgres(spec: &HerdSpec) -> Result<(), LocalError> {
    for cluster in &spec.clusters {
        match &cluster.postgres.source {
            PostgresSource::Version(major) => Installation::of_version(*major).await?,
            PostgresSource::BinDir(bin_dir) => Installation::at(bin_dir).await?,
        };
    }
    Ok(())
}

/// The same herd with every node on this machine, at the ports it has here, and open to clients of this
/// machine as its own hosts would be to theirs. A node without ports keeps what its file says: it is not of
/// this herd, and the agents will say so.
pub(super) fn mapped(mut spec: HerdSpec, ports: &Ports) -> HerdSpec {
    for node in spec.clusters.iter_mut().flat_map(|cluster| &mut cluster.nodes) {
        if let Some(ports) = ports.nodes.get(&node.name) {
            HOST.clone_into(&mut node.host);
            (node.port, node.api_port) = (ports.postgres, ports.api);
        }
    }
    for cluster in &mut spec.clusters {
        // There is no other host that it could move to.
        cluster.vip = None;
        let lacking = HBA.iter().filter(|line| !cluster.postgres.hba.iter().any(|present| present == *line));
        let lacking: Vec<String> = lacking.map(|line| (*line).to_owned()).collect();
        cluster.postgres.hba.extend(lacking);
    }
    for witness in &mut spec.witnesses {
        if let Some(ports) = ports.nodes.get(&witness.name) {
            HOST.clone_into(&mut witness.host);
            witness.api_port = ports.api;
        }
    }
    spec
}

/// Whether a file names hosts that are not this one, so that mapping them is worth a word.
pub(super) fn names_other_hosts(spec: &HerdSpec) -> bool {
    spec.agents().any(|(_, host, _)| host != HOST && host != "localhost")
}

/// Whether a file has an address that moves between hosts, of which nothing is left here.
pub(super) fn names_vip(spec: &HerdSpec) -> bool {
    spec.clusters.iter().any(|cluster| cluster.vip.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_herd_that_up_makes_is_valid_once_it_has_ports() {
        let spec = of_version(15, "/var/lib/pgherd/backups".into());
        assert!(!spec.check().is_empty(), "three nodes on one host need ports of their own");
        let nodes: Vec<NodeName> = spec.agents().map(|(name, _, _)| name.clone()).collect();
        let (ports, _claim) = Ports::choose(&nodes).unwrap();
        let mapped = mapped(spec, &ports);
        assert_eq!(mapped.check(), []);
        let text = files::herd::write(&mapped);
        assert_eq!(files::herd::read("herd.toml", &text).unwrap().spec, mapped, "{text}");
    }

    #[test]
    fn hosts_of_a_file_are_mapped_and_nothing_else_is() {
        let mut spec = of_version(15, "/var/lib/pgherd/backups".into());
        let (address, interface) = ("192.168.122.10/24".parse().unwrap(), "eth0".to_owned());
        spec.clusters[0].vip = Some(pgherd_core::spec::VipSpec { address, interface });
        spec.clusters[0].nodes[1].host = "192.168.122.198".to_owned();
        assert!(names_other_hosts(&spec));
        let nodes: Vec<NodeName> = spec.agents().map(|(name, _, _)| name.clone()).collect();
        let (ports, _claim) = Ports::choose(&nodes).unwrap();
        spec.clusters[0].postgres.hba = vec!["host all all 192.168.122.0/24 scram-sha-256".to_owned()];
        let mut mapped = mapped(spec.clone(), &ports);
        assert!(!names_other_hosts(&mapped));
        assert_eq!(super::mapped(mapped.clone(), &ports), mapped, "once is enough");
        assert_eq!(mapped.clusters[0].postgres.hba.split_off(1), HBA, "clients are on this machine, too");
        for (mapped, node) in mapped.clusters[0].nodes.iter_mut().zip(&spec.clusters[0].nodes) {
            assert_eq!(mapped.api_port, mapped.port + 1);
            (mapped.host, mapped.port, mapped.api_port) = (node.host.clone(), node.port, node.api_port);
        }
        assert!(names_vip(&spec) && !names_vip(&mapped), "it has nowhere to move");
        mapped.clusters[0].vip.clone_from(&spec.clusters[0].vip);
        assert_eq!(mapped, spec);
    }
}
