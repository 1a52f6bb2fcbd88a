//! One cluster at a time: what is measured on two cores must not share them with another test's cluster.

use std::fs::File;

use rustix::fs::{FlockOperation, flock};

/// Held while a test has the machine for itself. The lock ends with the process, however that ends.
#[derive(Debug)]
#[must_use = "another test may start a cluster as soon as this is dropped"]
pub struct Alone(#[expect(dead_code, reason = "the lock lives as long as its descriptor")] File);

/// Waits until no other test on this machine has a cluster, in this process or another.
pub fn alone() -> Alone {
    let path = std::env::temp_dir().join("pgherd-testkit.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
    // One description a call: threads of one process exclude each other as well.
    while let Err(error) = flock(&file, FlockOperation::LockExclusive) {
        assert!(error == rustix::io::Errno::INTR, "cannot lock {}: {error}", path.display());
    }
    Alone(file)
}
