//! Whether a volume still answers: a small write and sync, bounded in time.
//!
//! A disk that hangs stops every commit while all processes look healthy. Leaves out: what follows from it.
//! Hazard: the thread of a probe that hangs cannot be ended; so there is one probe at a time.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::durable;
use crate::error::{Error, Result};

const PROBE_FILE: &str = ".pgherd_probe";
const PROBE_BYTES: usize = 4096;

/// Probes one directory.
#[derive(Clone, Debug)]
pub struct DiskProbe {
    file: PathBuf,
    one: Arc<Semaphore>,
}

/// Space on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    /// For a process that is not root.
    pub free_bytes: u64,
}

impl DiskProbe {
    pub fn new(dir: &Path) -> DiskProbe {
        DiskProbe { file: dir.join(PROBE_FILE), one: Arc::new(Semaphore::new(1)) }
    }

    /// Writes and syncs; returns how long that took. While an earlier probe still hangs this one fails at its
    /// deadline without another thread.
    pub async fn probe(&self, deadline: Duration) -> Result<Duration> {
        let began = Instant::now();
        let late = || Error::Deadline { doing: "writing and syncing a probe", after: deadline };
        let permit = tokio::time::timeout(deadline, Arc::clone(&self.one).acquire_owned()).await;
        let permit = permit.map_err(|_| late())?.map_err(|_| late())?;
        let file = self.file.clone();
        let work = tokio::task::spawn_blocking(move || {
            let result = write(&file);
            drop(permit);
            result
        });
        let left = deadline.saturating_sub(began.elapsed());
        match tokio::time::timeout(left, work).await {
            Ok(Ok(result)) => result.map(|()| began.elapsed()),
            Ok(Err(lost)) => Err(Error::Answer { what: format!("probing the disk: {lost}") }),
            Err(_) => Err(late()),
        }
    }
}

fn write(path: &Path) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(durable::PRIVATE)
        .open(path)
        .map_err(Error::io("open", path))?;
    file.write_all(&[0x70; PROBE_BYTES]).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// What tells the volume of `path` from others. Blocks.
pub fn device(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path).map_err(Error::io("look at the volume of", path))?.dev())
}

/// The space of the volume that holds `path`. Blocks.
pub fn space(path: &Path) -> Result<Space> {
    let found =
        rustix::fs::statvfs(path).map_err(|errno| Error::io("look at the volume of", path)(errno.into()))?;
    Ok(Space { total_bytes: found.f_blocks * found.f_frsize, free_bytes: found.f_bavail * found.f_frsize })
}
