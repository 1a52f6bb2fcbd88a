//! WAL of a cluster that another program has archived, file by file: what a copy that was restored from there calls for.
//!
//! Left out: archiving there.

use std::path::{Path, PathBuf};

use pgherd_backup::foreign::Source;
use pgherd_backup::foreign::archive::Archive;
use pgherd_backup::wal::Segments;
use pgherd_postgres::control::ControlFile;

use super::FileError;
use super::fetch::{self, Fetched};

/// The WAL of one cluster in a place of pgBackRest's or Barman's.
pub struct ForeignFiles {
    archive: Archive,
    data_dir: PathBuf,
}

impl ForeignFiles {
    /// Of the cluster that a data directory belongs to.
    pub async fn open(source: &Source, data_dir: &Path) -> Result<ForeignFiles, FileError> {
        let no_data_dir = |source| FileError::DataDir { data_dir: data_dir.to_owned(), source };
        let control = ControlFile::of(data_dir).map_err(no_data_dir)?;
        let segments = Segments::new(control.wal_segment_bytes)?;
        let archive = Archive::open(source, control.system_id, segments)?;
        Ok(ForeignFiles { archive, data_dir: data_dir.to_owned() })
    }

    /// Brings the file `name` to `to`, which is there as a whole or not at all.
    pub async fn fetch(&self, name: &str, to: &Path) -> Result<Fetched, FileError> {
        fetch::fetch(&self.archive, &self.data_dir, name, to).await
    }

    /// Fetches the segment `first` and those behind it before they are asked for. `false`: another process does.
    pub async fn fill(&self, first: &str) -> Result<bool, FileError> {
        fetch::fill(&self.archive, &self.data_dir, first).await
    }
}
