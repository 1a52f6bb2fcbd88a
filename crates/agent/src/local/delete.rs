//! What `down --delete` removes: what pgherd made, and nothing else.
//!
//! Hazard: somebody's own files in the directory. What is not known by name stops the whole removal, before
//! anything is removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::LocalError;
use super::home::{Home, Lock};
use super::ports::Ports;
use super::proxy::COMMAND;
use crate::paths;

/// Of a herd's directory, beside one directory per node.
const OF_HERD: [&str; 10] =
    ["herd.toml", "ports.json", "pgpass", "ca.pem", "bin", "lock", "run", "log", "proxy", "backups"];
/// Of the proxy's directory.
const OF_PROXY: [&str; 4] = ["proxy.toml", "pki", "run", "log"];
/// Of a node's directory: what its agent keeps.
const OF_NODE: [&str; 14] = [
    "agent.toml",
    "data",
    "raft",
    "pki",
    "run",
    "log",
    "postgres",
    "herd.json",
    "node.json",
    "spec.json",
    "pgpass",
    paths::REPOSITORY_FILE,
    "init.unfinished",
    "join.key",
];
/// What a crash leaves beside a file that was about to be replaced.
const HALF_WRITTEN: [&str; 2] = [".new", ".tmp"];

/// What is there to be removed.
#[derive(Debug)]
pub struct Remains {
    home: Home,
    /// Directories of nodes, whose data cannot be had back.
    pub nodes: Vec<PathBuf>,
    pub bytes: u64,
    /// Whether base backups and WAL are among it.
    pub backups: bool,
}

/// Looks at what a removal would remove, and refuses where there is something that pgherd did not make.
/// `None` if there is no herd.
pub fn remains(home: &Home) -> Result<Option<Remains>, LocalError> {
    let Some(ports) = Ports::load(home)? else { return Ok(None) };
    let is_node = |name: &str| ports.nodes.keys().any(|node| node.as_str() == name);
    let mut unknown = unknown_in(home.dir(), |name| OF_HERD.contains(&name) || is_node(name))?;
    let nodes: Vec<PathBuf> =
        ports.nodes.keys().map(|node| home.node_dir(node)).filter(|dir| dir.is_dir()).collect();
    for (dir, node) in nodes.iter().zip(ports.nodes.keys()) {
        let strange = unknown_in(dir, |name| OF_NODE.contains(&name))?;
        unknown.extend(strange.into_iter().map(|name| format!("{node}/{name}")));
    }
    // A node may have the name, and then there is no proxy.
    if !is_node(COMMAND) && home.proxy_dir().is_dir() {
        let strange = unknown_in(&home.proxy_dir(), |name| OF_PROXY.contains(&name))?;
        unknown.extend(strange.into_iter().map(|name| format!("{COMMAND}/{name}")));
    }
    if !unknown.is_empty() {
        return Err(LocalError::Unknown { dir: home.dir().to_owned(), names: unknown });
    }
    Ok(Some(Remains {
        home: home.clone(),
        bytes: size_of(home.dir()),
        backups: home.backups_dir().is_dir(),
        nodes,
    }))
}

impl Remains {
    /// Removes it. Nothing of the herd may run any more, and none may begin: hence the lock.
    pub fn remove(self, _lock: Lock) -> Result<(), LocalError> {
        for dir in self.nodes.iter().map(PathBuf::as_path).chain([self.home.dir()]) {
            let sockets = paths::socket_dir(dir);
            if !sockets.starts_with(dir) {
                remove(&sockets)?;
            }
        }
        for node in &self.nodes {
            remove(node)?;
        }
        for name in OF_HERD {
            remove(&self.home.dir().join(name))?;
        }
        // Half-written files are all that can be left.
        remove(self.home.dir())
    }
}

/// A file, a directory with all that is in it, or a link, but never what a link leads to.
fn remove(path: &Path) -> Result<(), LocalError> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LocalError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Names in a directory that are not known, half-written files aside.
fn unknown_in(dir: &Path, known: impl Fn(&str) -> bool) -> Result<Vec<String>, LocalError> {
    let mut unknown = Vec::new();
    for entry in fs::read_dir(dir).map_err(LocalError::io("read", dir))? {
        let name = entry.map_err(LocalError::io("read", dir))?.file_name().to_string_lossy().into_owned();
        let whole = HALF_WRITTEN.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
        if !known(whole) {
            unknown.push(name);
        }
    }
    unknown.sort();
    Ok(unknown)
}

/// Bytes of all files below, links not followed; what cannot be read counts nothing.
fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_of(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory as `up` leaves it, with two nodes.
    fn herd() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("herd"));
        home.make(None).unwrap();
        let nodes: Vec<pgherd_core::types::NodeName> = ["a", "b"].map(|name| name.parse().unwrap()).into();
        Ports::choose(&nodes).unwrap().0.save(&home).unwrap();
        for node in &nodes {
            let data = home.node_dir(node).join("data");
            fs::create_dir_all(&data).unwrap();
            fs::write(data.join("PG_VERSION"), "15\n").unwrap();
            fs::write(home.node_dir(node).join("agent.toml.new"), "").unwrap();
        }
        home.make_proxy(None).unwrap();
        fs::write(home.proxy_file(), "name = \"up\"\n").unwrap();
        fs::write(home.proxy_log(), "").unwrap();
        (dir, home)
    }

    #[test]
    fn what_pgherd_made_goes() {
        let (_dir, home) = herd();
        let found = remains(&home).unwrap().unwrap();
        assert_eq!(found.nodes.len(), 2);
        assert!(found.bytes >= 6);
        let lock = Lock::take(&home).unwrap().unwrap();
        found.remove(lock).unwrap();
        assert!(!home.dir().exists());
        assert!(remains(&home).unwrap().is_none());
    }

    #[test]
    fn a_strange_file_anywhere_stops_it_all() {
        for place in ["diary.txt", "a/diary.txt", "proxy/diary.txt"] {
            let (_dir, home) = herd();
            fs::write(home.dir().join(place), "dear diary").unwrap();
            match remains(&home) {
                Err(LocalError::Unknown { names, .. }) => assert_eq!(names, [place]),
                other => panic!("{other:?}"),
            }
            assert!(home.node_dir(&"a".parse().unwrap()).join("data/PG_VERSION").exists());
        }
    }

    #[test]
    fn a_link_is_removed_and_what_it_leads_to_is_not() {
        let (dir, home) = herd();
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join("kept"), "").unwrap();
        fs::remove_dir_all(home.log_dir()).unwrap();
        std::os::unix::fs::symlink(&elsewhere, home.log_dir()).unwrap();
        let lock = Lock::take(&home).unwrap().unwrap();
        remains(&home).unwrap().unwrap().remove(lock).unwrap();
        assert!(elsewhere.join("kept").exists());
    }
}
