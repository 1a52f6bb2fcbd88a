//! A repository on the disk of a witness, which is its keeper: how the others come to it ([`client`]), and what it does for them ([`serve`]).
//!
//! Leaves out: what objects mean, and who may ask (`http`). Hazard: two directories that are taken for one repository. Who asks says which
//! one is meant, and a keeper whose herd file names another one does nothing.

use std::path::{Path, PathBuf};

use pgherd_backup::store::Failure;
use pgherd_core::spec::backup::{Location, Through};
use pgherd_core::spec::{HerdSpec, RepositorySpec};
use pgherd_core::types::NodeName;

use crate::peers;

pub(crate) mod client;
pub(crate) mod serve;

/// The repository as this agent's host comes to it: the keeper's own disk for the keeper itself, and for all others the way to it.
pub(crate) fn from_here(
    repository: &RepositorySpec,
    herd: &HerdSpec,
    me: &NodeName,
    credentials: &Path,
) -> RepositorySpec {
    let mut here = repository.clone();
    if let Location::Kept { keeper, path, through } = &mut here.location {
        if keeper == me {
            here.location = Location::Directory(path.clone());
        } else if let Some((_, host, port)) = herd.agents().find(|(name, _, _)| *name == keeper) {
            *through =
                Some(Through { address: peers::address(host, port), credentials: credentials.to_owned() });
        }
    }
    here
}

/// The directories that an agent keeps for the others.
pub(crate) fn directories<'a>(herd: &'a HerdSpec, me: &'a NodeName) -> impl Iterator<Item = &'a PathBuf> {
    let backups = herd.clusters.iter().filter_map(|cluster| cluster.backup.as_ref());
    backups.filter_map(move |backup| match &backup.repository.location {
        Location::Kept { keeper, path, .. } if keeper == me => Some(path),
        _ => None,
    })
}

/// The two words for one failure.
fn to_wire(failure: Failure) -> pgherd_api::objects::Failure {
    use pgherd_api::objects::Failure as Wire;
    match failure {
        Failure::Absent => Wire::Absent,
        Failure::Present => Wire::Present,
        Failure::Full => Wire::Full,
        Failure::Denied => Wire::Denied,
        Failure::NoRepository => Wire::NoRepository,
        Failure::TooLarge => Wire::TooLarge,
        Failure::Misbehaving => Wire::Misbehaving,
        Failure::Failed => Wire::Failed,
    }
}

fn of_wire(failure: pgherd_api::objects::Failure) -> Failure {
    use pgherd_api::objects::Failure as Wire;
    match failure {
        Wire::Absent => Failure::Absent,
        Wire::Present => Failure::Present,
        Wire::Full => Failure::Full,
        Wire::Denied => Failure::Denied,
        Wire::NoRepository => Failure::NoRepository,
        Wire::TooLarge => Failure::TooLarge,
        Wire::Misbehaving => Failure::Misbehaving,
        Wire::Failed => Failure::Failed,
    }
}
