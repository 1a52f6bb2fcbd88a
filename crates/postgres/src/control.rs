//! `global/pg_control`, read without a server: who this data directory is and how far it must be replayed.
//!
//! The fields that matter here lie at the same offsets from PostgreSQL 14 to 18 (measured with `offsetof` on
//! each version's headers); only the checksum moved in 18. Leaves out: writing it, but for [`poisoned`], which makes the
//! bytes of a copy that starts with a `backup_label` only.
//!
//! Hazard: the position of a vote is looked for from what this file says. A wrong start would under-report, so
//! a copy that fails its checksum is an error and never a guess.

use std::path::Path;
use std::time::Duration;

use crc_fast::{CrcAlgorithm, checksum};
use pgherd_core::types::{Lsn, SystemId, Timeline};

use crate::durable;
use crate::error::{Error, Result};

/// PostgreSQL rewrites the file in one write that a reader can still see half of.
const TRIES: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);

/// `pg_control_version` and where the CRC lies.
const LAYOUTS: [(u32, usize); 3] = [(1300, 288), (1700, 288), (1800, 292)];

/// PostgreSQL's `DBState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

impl State {
    fn from_number(number: u32) -> Option<State> {
        Some(match number {
            0 => State::StartingUp,
            1 => State::ShutDown,
            2 => State::ShutDownInRecovery,
            3 => State::ShuttingDown,
            4 => State::InCrashRecovery,
            5 => State::InArchiveRecovery,
            6 => State::InProduction,
            _ => return None,
        })
    }

    /// It had accepted writes last, whether or not it was stopped cleanly.
    pub fn was_primary(self) -> bool {
        matches!(self, State::ShutDown | State::ShuttingDown | State::InCrashRecovery | State::InProduction)
    }

    /// No process had the files open when this was written, and all that was to be flushed was.
    pub fn stopped_cleanly(self) -> bool {
        matches!(self, State::ShutDown | State::ShutDownInRecovery)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    pub system_id: SystemId,
    pub state: State,
    /// Where the last checkpoint's record starts, and from where its replay does.
    pub checkpoint: Lsn,
    pub checkpoint_redo: Lsn,
    pub checkpoint_timeline: Timeline,
    /// In recovery: not consistent before this point. Zero outside of recovery.
    pub min_recovery_point: Lsn,
    pub min_recovery_timeline: Timeline,
    /// A base backup whose end has not been replayed yet.
    pub backup_start: Lsn,
    pub backup_end_required: bool,
    pub wal_segment_bytes: u32,
    pub wal_page_bytes: u32,
    /// Of relations: bytes of a page, and pages of a file before the next one begins.
    pub page_bytes: u32,
    pub file_pages: u32,
    pub data_checksums: bool,
    pub limits: Limits,
    pub control_version: u32,
    pub catalog_version: u32,
}

/// The settings that a standby must have at least as large as its primary had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
}

impl Limits {
    pub fn named(&self) -> [(&'static str, u32); 5] {
        [
            ("max_connections", self.max_connections),
            ("max_worker_processes", self.max_worker_processes),
            ("max_wal_senders", self.max_wal_senders),
            ("max_prepared_transactions", self.max_prepared_transactions),
            ("max_locks_per_transaction", self.max_locks_per_transaction),
        ]
    }
}

impl ControlFile {
    /// That of a data directory. Blocks.
    pub fn of(data_dir: &Path) -> Result<ControlFile> {
        ControlFile::read(&data_dir.join("global/pg_control"))
    }

    /// Reads it, again and again for a moment if a running server was caught in the middle of a write. Blocks.
    pub fn read(path: &Path) -> Result<ControlFile> {
        Ok(ControlFile::read_bytes(path)?.1)
    }

    /// The same with the bytes that it was read from. Blocks.
    pub fn read_bytes(path: &Path) -> Result<(Vec<u8>, ControlFile)> {
        let mut tries = 0;
        loop {
            let missing = || Error::Io {
                doing: "read",
                path: path.to_owned(),
                source: std::io::ErrorKind::NotFound.into(),
            };
            let bytes = durable::read(path)?.ok_or_else(missing)?;
            match ControlFile::parse(&bytes) {
                Ok(control) => return Ok((bytes, control)),
                Err(_) if tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(BETWEEN_TRIES);
                }
                Err(what) => return Err(Error::damaged(path, what)),
            }
        }
    }

    pub fn parse(bytes: &[u8]) -> Result<ControlFile, String> {
        let field = |at: usize| {
            let bytes = bytes.get(at..at + 4).ok_or("it is shorter than its fields")?;
            Ok::<u32, String>(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let wide = |at: usize| Ok::<u64, String>(u64::from(field(at + 4)?) << 32 | u64::from(field(at)?));

        let control_version = field(8)?;
        let Some((_, crc_at)) = LAYOUTS.into_iter().find(|(version, _)| *version == control_version) else {
            return Err(format!("pg_control_version {control_version} is unknown"));
        };
        let wanted = field(crc_at)?;
        let found = checksum(CrcAlgorithm::Crc32Iscsi, &bytes[..crc_at]) as u32;
        if wanted != found {
            return Err(format!("its checksum is {found:08x} and should be {wanted:08x}"));
        }
        let state = field(16)?;
        let wal_segment_bytes = field(228)?;
        let wal_page_bytes = field(224)?;
        let (page_bytes, file_pages) = (field(216)?, field(220)?);
        if !page_bytes.is_power_of_two() || !(1024..=32_768).contains(&page_bytes) || file_pages == 0 {
            return Err(format!("files of {file_pages} pages of {page_bytes} bytes cannot be"));
        }
        let powers = wal_segment_bytes.is_power_of_two() && wal_page_bytes.is_power_of_two();
        if !powers || wal_page_bytes < 1024 || wal_segment_bytes < wal_page_bytes {
            return Err(format!(
                "{wal_segment_bytes} and {wal_page_bytes} cannot be sizes of WAL segment and page"
            ));
        }
        Ok(ControlFile {
            system_id: SystemId(wide(0)?),
            state: State::from_number(state).ok_or_else(|| format!("state {state} is unknown"))?,
            checkpoint: Lsn(wide(32)?),
            checkpoint_redo: Lsn(wide(40)?),
            checkpoint_timeline: Timeline(field(48)?),
            min_recovery_point: Lsn(wide(136)?),
            min_recovery_timeline: Timeline(field(144)?),
            backup_start: Lsn(wide(152)?),
            backup_end_required: bytes[168] != 0,
            wal_segment_bytes,
            wal_page_bytes,
            page_bytes,
            file_pages,
            data_checksums: field(252)? != 0,
            limits: Limits {
                max_connections: field(180)?,
                max_worker_processes: field(184)?,
                max_wal_senders: field(188)?,
                max_prepared_transactions: field(192)?,
                max_locks_per_transaction: field(196)?,
            },
            control_version,
            catalog_version: field(12)?,
        })
    }

    /// The timeline that its WAL was on when this was written. After a promotion the end of recovery is noted
    /// at once, the checkpoint only later.
    pub fn timeline(&self) -> Timeline {
        self.checkpoint_timeline.max(self.min_recovery_timeline)
    }
}

/// Where no checkpoint is, so that a server which looks for one there does not start.
const NO_CHECKPOINT: Lsn = Lsn(0xDEAD);

/// The bytes of a control file whose last checkpoint cannot be found: recovery begins where `backup_label` says, and
/// without one there is no recovery, instead of one that begins too late and leaves pages from the middle of the backup.
pub(crate) fn poisoned(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let control = ControlFile::parse(bytes)?;
    let mut poisoned = bytes.to_vec();
    poisoned[32..40].copy_from_slice(&NO_CHECKPOINT.0.to_le_bytes());
    let crc_at = LAYOUTS.iter().find(|(version, _)| *version == control.control_version);
    let Some((_, crc_at)) = crc_at else { return Err("its layout is unknown".to_owned()) };
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, &poisoned[..*crc_at]) as u32;
    poisoned[*crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    Ok(poisoned)
}
