//! What clients of a server feel while it is backed up: what a small question takes, what a flush of WAL takes, how far replay is.
//!
//! Nothing is written into WAL: a transaction of ours would go to every standby and subscriber, and would wait for the standbys as well. So the
//! flush is one of a file without a name in `pg_wal`, of a page that is written again and again as PostgreSQL writes the segment that it is in: on
//! the same disk, and gone with its last descriptor, whatever kills us.
//!
//! Leaves out: how often, and what follows (`core::throttle`). Hazard: what is measured too often is a load itself; two flushes of a page a
//! second are one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgherd_core::types::Lsn;
use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result};
use crate::sql::{Session, first_field};

const PAGE_BYTES: usize = 8192;

/// What the server says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Felt {
    /// Whether somebody works with it, or did so in the last seconds. Sessions of our own do not count.
    pub clients: bool,
    /// On a standby that replays as soon as it can: up to where WAL has come, and up to where it is replayed.
    pub replay: Option<(Lsn, Lsn)>,
    /// Pages that were read from the disk so far, and what all of them took, where `track_io_timing` is on.
    pub reads: Option<Reads>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reads {
    pub pages: u64,
    pub took: Duration,
}

/// Asks, without a deadline: how long it takes is what it is about.
pub async fn ask(session: &Session) -> Result<Felt> {
    // What cannot be asked of a primary is not evaluated there. Before version 15 the sums are made by another process for each who asks.
    let query = "SELECT \
        EXISTS (SELECT FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend' \
          AND application_name <> 'pgherd' AND pid <> pg_catalog.pg_backend_pid() \
          AND (state IS NULL OR state IN ('active', 'fastpath function call', 'disabled') \
            OR state_change > pg_catalog.now() - interval '2 s')), \
        CASE WHEN pg_catalog.pg_is_in_recovery() THEN \
          CASE WHEN pg_catalog.pg_is_wal_replay_paused() THEN NULL \
            WHEN pg_catalog.current_setting('recovery_min_apply_delay') = '0' \
            THEN pg_catalog.pg_last_wal_receive_lsn() END END, \
        CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() END, \
        CASE WHEN pg_catalog.current_setting('track_io_timing') = 'on' \
          AND pg_catalog.current_setting('server_version_num')::pg_catalog.int4 >= 150000 \
          THEN (SELECT pg_catalog.sum(blks_read) FROM pg_catalog.pg_stat_database) END, \
        CASE WHEN pg_catalog.current_setting('track_io_timing') = 'on' \
          AND pg_catalog.current_setting('server_version_num')::pg_catalog.int4 >= 150000 \
          THEN (SELECT pg_catalog.sum(blk_read_time) FROM pg_catalog.pg_stat_database) END";
    let answer = session.simple_query(query).await.map_err(Error::sql("tell what its clients feel"))?;
    let field = |at: usize| first_field(&answer, at);
    let lsn = |at: usize| field(at).and_then(|text| text.parse::<Lsn>().ok());
    let pages = field(3).and_then(|text| text.parse().ok());
    let ms: Option<f64> = field(4).and_then(|text| text.parse().ok());
    let took = ms.and_then(|ms| Duration::try_from_secs_f64(ms / 1000.0).ok());
    Ok(Felt {
        clients: field(0).as_deref() != Some("f"),
        replay: lsn(1).zip(lsn(2)),
        reads: pages.zip(took).map(|(pages, took)| Reads { pages, took }),
    })
}

/// The disk that WAL is on. Blocks.
#[derive(Debug)]
pub struct WalDisk {
    dir: PathBuf,
    file: File,
    page: Vec<u8>,
}

impl WalDisk {
    /// Fails where the file system has no files without a name, as over NFS.
    pub fn open(data_dir: &Path) -> Result<WalDisk> {
        let dir = data_dir.join("pg_wal");
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(&dir, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| Error::io("make a file without a name in", &dir)(error.into()))?;
        let mut disk = WalDisk { dir, file: file.into(), page: vec![0; PAGE_BYTES] };
        // From here on it keeps its size and its place.
        disk.flush()?;
        Ok(disk)
    }

    /// Writes a page to the disk, and says how long that took.
    pub fn flush(&mut self) -> Result<Duration> {
        self.page[0] = self.page[0].wrapping_add(1);
        let began = Instant::now();
        self.file.write_all_at(&self.page, 0).map_err(Error::io("write a page in", &self.dir))?;
        self.file.sync_data().map_err(Error::io("flush a page in", &self.dir))?;
        Ok(began.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_leaves_nothing_in_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("pg_wal")).unwrap();
        let mut disk = WalDisk::open(dir.path()).unwrap();
        assert!(disk.flush().unwrap() > Duration::ZERO);
        let names = std::fs::read_dir(dir.path().join("pg_wal")).unwrap();
        assert_eq!(names.count(), 0, "a backup, a rewind or PostgreSQL itself would meet it");
        assert_eq!(disk.file.metadata().unwrap().len(), PAGE_BYTES as u64, "it does not grow");
    }

    #[test]
    fn without_a_directory_it_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let error = WalDisk::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("pg_wal"), "{error}");
    }
}
