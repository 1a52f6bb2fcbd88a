//! A data directory comes into being under a name of its own beside its place, and is renamed when it is whole:
//! what stands at `data_dir` is complete, whenever the power goes. It leaves the same way.
//!
//! So a half-made directory is known by its name and can be removed on sight, and a directory that somebody else
//! filled is never touched.
//!
//! Leaves out: filling it ([`crate::initdb`], [`crate::clone`]). Hazard: removes whole trees.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::proc;

/// Behind the data directory's name.
const UNFINISHED: &str = "pgherd_unfinished";
const DISCARDED: &str = "pgherd_discarded";
/// Inside of `wal_dir`.
const WAL: &str = "pg_wal";

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MakingError {
    #[error("{} is not empty", .data_dir.display())]
    NotEmpty { data_dir: PathBuf },

    #[error("{} cannot be replaced: it is a mount point, or its parent belongs to somebody else", .data_dir.display())]
    NotReplaceable { data_dir: PathBuf, source: Error },

    #[error("PostgreSQL runs in {}", .data_dir.display())]
    Running { data_dir: PathBuf },

    #[error(transparent)]
    Other(#[from] Error),
}

impl MakingError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            MakingError::NotEmpty { .. } => {
                Some("pgherd fills empty directories only: choose another one, or move what is there away")
            }
            MakingError::NotReplaceable { .. } => Some("choose a directory below the mount point"),
            MakingError::Running { .. } => Some("stop it first"),
            MakingError::Other(error) => error.hint(),
        }
    }
}

/// The places of a data directory that is being made.
#[derive(Clone, Debug)]
pub(crate) struct Making {
    instance: Instance,
    pub(crate) data_dir: PathBuf,
    /// `Some` where WAL has a volume of its own.
    pub(crate) wal_dir: Option<PathBuf>,
}

impl Making {
    /// Removes what an earlier attempt left and refuses a directory that has anything in it. Blocks.
    pub(crate) fn begin(instance: &Instance) -> Result<Making, MakingError> {
        remove_leftovers(instance)?;
        if !durable::is_empty_or_missing(&instance.data_dir)? {
            return Err(MakingError::NotEmpty { data_dir: instance.data_dir.clone() });
        }
        let data_dir = beside(&instance.data_dir, UNFINISHED);
        if let Some(parent) = data_dir.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        durable::create_private_dir(&data_dir)
            .map_err(|source| MakingError::NotReplaceable { data_dir: instance.data_dir.clone(), source })?;
        let wal_dir = match &instance.wal_dir {
            None => None,
            Some(volume) => {
                fs::create_dir_all(volume).map_err(Error::io("create", volume))?;
                // No data directory points to it: it would stand at its place.
                remove_tree(&volume.join(WAL))?;
                let dir = beside(&volume.join(WAL), UNFINISHED);
                durable::create_private_dir(&dir)?;
                Some(dir)
            }
        };
        Ok(Making { instance: instance.clone(), data_dir, wal_dir })
    }

    /// Puts it in its place, durably. Blocks.
    pub(crate) fn finish(&self) -> Result<(), MakingError> {
        if let (Some(made), Some(volume)) = (&self.wal_dir, &self.instance.wal_dir) {
            let place = volume.join(WAL);
            durable::rename(made, &place)?;
            let link = self.data_dir.join("pg_wal");
            fs::remove_file(&link).map_err(Error::io("remove", &link))?;
            std::os::unix::fs::symlink(&place, &link).map_err(Error::io("link", &link))?;
        }
        durable::sync_dir(&self.data_dir)?;
        let place = &self.instance.data_dir;
        durable::rename(&self.data_dir, place)
            .map_err(|source| MakingError::NotReplaceable { data_dir: place.clone(), source })
    }
}

/// Removes what an earlier attempt to make or to discard this data directory left. Blocks.
pub(crate) fn remove_leftovers(instance: &Instance) -> Result<()> {
    for suffix in [UNFINISHED, DISCARDED] {
        remove_tree(&beside(&instance.data_dir, suffix))?;
        if let Some(volume) = &instance.wal_dir {
            remove_tree(&beside(&volume.join(WAL), suffix))?;
        }
    }
    Ok(())
}

/// Removes a data directory that pgherd made: first from its place, at once and durably, then from the disk. Only
/// for a stopped server, and only after rule 11 allows it. Blocks.
pub(crate) fn discard(instance: &Instance) -> Result<(), MakingError> {
    if !proc::of_data_dir(&instance.data_dir)?.is_empty() {
        return Err(MakingError::Running { data_dir: instance.data_dir.clone() });
    }
    remove_leftovers(instance)?;
    if instance.data_dir.exists() {
        let aside = beside(&instance.data_dir, DISCARDED);
        durable::rename(&instance.data_dir, &aside)
            .map_err(|source| MakingError::NotReplaceable { data_dir: instance.data_dir.clone(), source })?;
    }
    if let Some(volume) = &instance.wal_dir
        && volume.join(WAL).exists()
    {
        durable::rename(&volume.join(WAL), &beside(&volume.join(WAL), DISCARDED))?;
    }
    remove_leftovers(instance)?;
    // What was half rewound is gone with it.
    crate::rewind::forget_interrupted(instance)?;
    Ok(())
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(suffix);
    path.with_file_name(name)
}

/// Removes a tree; follows no link out of it.
fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
