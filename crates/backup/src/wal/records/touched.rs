//! Which pages of relations a record changes, and which files as a whole.
//!
//! Every record names the blocks that it changes in one form, whichever resource manager wrote it (`XLogRecordBlockHeader`), since without that
//! neither images of pages nor recovery could work (`access/transam/README`, "Write-Ahead Log Coding"). PostgreSQL makes an exception of the free
//! space map, which is hardly logged at all, and of the visibility map, whose bits are cleared by records that name the page of the table only. So
//! nothing is to be concluded from here for any fork but the main one.
//!
//! What changes files and not blocks says so in its data: `storage_xlog.h`, `dbcommands_xlog.h`, `tablespace.h`, and the ends of transactions, behind
//! which files are deleted.
//!
//! Leaves out: what a page has become. Hazard: a change that is not told makes an incremental backup restore an older page; so whatever is not
//! known for certain is an error, and whoever asks compares contents instead.

use super::{DBASE_DROP, DBASE_DROP_BEFORE_15, Data, Record, RelationFile, Rest};
use super::{RM_DBASE, RM_XACT, RM_XLOG, TYPE_BITS, XACT_ABORT, XACT_ABORT_PREPARED, XACT_COMMIT};
use super::{XACT_COMMIT_PREPARED, XACT_HAS_INFO, XACT_TYPE_BITS};
use crate::breakage::{Broken, broken};

/// `rmgrlist.h`; the last of PostgreSQL's own is the same from 14 to 18. What is above belongs to extensions.
const RM_SMGR: u8 = 2;
const RM_TBLSPC: u8 = 5;
const RM_LAST: u8 = 21;

/// `xlogrecord.h`.
const MAIN_FORK: u8 = 0;

/// `pg_control.h`. Of the numbers for records about WAL itself two mean nothing yet.
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_WITHOUT_MEANING: [u8; 2] = [0xC0, 0xF0];
/// `xl_parameter_change`: `wal_level` stands behind five numbers.
const BEFORE_WAL_LEVEL_BYTES: usize = 20;
const WAL_LEVEL_MINIMAL: u32 = 0;

const SMGR_CREATE: u8 = 0x10;
const SMGR_TRUNCATE: u8 = 0x20;

const DBASE_CREATE: u8 = 0x00;
const DBASE_CREATE_WAL_LOG: u8 = 0x10;

const TBLSPC_CREATE: u8 = 0x00;
const TBLSPC_DROP: u8 = 0x10;

const XACT_PREPARE: u8 = 0x10;
const XACT_ASSIGNMENT: u8 = 0x50;
const XACT_INVALIDATIONS: u8 = 0x60;

/// Something that a record changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// A page of the main fork.
    Page {
        file: RelationFile,
        block: u32,
    },
    /// Everything of the main fork from this block on: it is cut off there, made anew (from 0 on) or deleted.
    From {
        file: RelationFile,
        block: u32,
    },
    /// All relations of a database, in whichever tablespace.
    Database(u32),
    Tablespace(u32),
}

/// Why nothing can be concluded from a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untold {
    #[error("a record of resource manager {manager}, which is an extension's")]
    Manager { manager: u8 },
    #[error("a record of type {kind:02X} of resource manager {manager}, which is not known")]
    Type { manager: u8, kind: u8 },
    #[error("a record of resource manager {manager} that cannot be read")]
    Malformed { manager: u8 },
    #[error("wal_level was minimal, so that not every change is in WAL")]
    MinimalWal,
}

impl Record<'_> {
    /// Calls `each` for all that this record changes of the main forks of relations.
    pub fn touched(&self, page_bytes: usize, mut each: impl FnMut(Touched)) -> Result<(), Untold> {
        let (info, manager) = (self.head[16], self.head[17]);
        if manager > RM_LAST {
            return Err(Untold::Manager { manager });
        }
        if broken(Broken::KindIgnored { manager }) {
            return Ok(());
        }
        let malformed = || Untold::Malformed { manager };
        let kind = if manager == RM_XACT { info & XACT_TYPE_BITS } else { info & TYPE_BITS };
        let unknown = Err(Untold::Type { manager, kind });
        match manager {
            RM_XLOG if kind == XLOG_PARAMETER_CHANGE => {
                let mut data = self.data().ok_or_else(malformed)?;
                data.take(BEFORE_WAL_LEVEL_BYTES).ok_or_else(malformed)?;
                if data.u32().ok_or_else(malformed)? == WAL_LEVEL_MINIMAL {
                    return Err(Untold::MinimalWal);
                }
            }
            RM_XLOG if XLOG_WITHOUT_MEANING.contains(&kind) => return unknown,
            RM_XACT => match kind {
                XACT_COMMIT | XACT_COMMIT_PREPARED | XACT_ABORT | XACT_ABORT_PREPARED => {
                    for file in self.deleted(info).ok_or_else(malformed)? {
                        each(Touched::From { file, block: 0 });
                    }
                }
                XACT_PREPARE | XACT_ASSIGNMENT | XACT_INVALIDATIONS => {}
                _ => return unknown,
            },
            RM_SMGR => {
                let mut data = self.data().ok_or_else(malformed)?;
                match kind {
                    SMGR_CREATE => {
                        let file = data.file().ok_or_else(malformed)?;
                        let fork = data.u32().ok_or_else(malformed)?;
                        if fork == u32::from(MAIN_FORK) {
                            each(Touched::From { file, block: 0 });
                        }
                    }
                    SMGR_TRUNCATE => {
                        let block = data.u32().ok_or_else(malformed)?;
                        let file = data.file().ok_or_else(malformed)?;
                        each(Touched::From { file, block });
                    }
                    _ => return unknown,
                }
            }
            RM_DBASE => {
                // In 14 there is one way to make a database, and a drop has the number of the second way.
                let last = if self.major >= 15 { DBASE_DROP } else { DBASE_DROP_BEFORE_15 };
                match kind {
                    DBASE_CREATE | DBASE_CREATE_WAL_LOG | DBASE_DROP if kind <= last => {
                        let database = self.data().and_then(|mut data| data.u32()).ok_or_else(malformed)?;
                        each(Touched::Database(database));
                    }
                    _ => return unknown,
                }
            }
            RM_TBLSPC => match kind {
                TBLSPC_CREATE | TBLSPC_DROP => {
                    let tablespace = self.data().and_then(|mut data| data.u32()).ok_or_else(malformed)?;
                    each(Touched::Tablespace(tablespace));
                }
                _ => return unknown,
            },
            _ => {}
        }
        let told = self.described(page_bytes, |described| {
            if described.fork == MAIN_FORK {
                each(Touched::Page { file: described.file, block: described.block });
            }
        });
        told.map(drop).ok_or_else(malformed)
    }

    /// Files that go with the end of a transaction.
    fn deleted(&self, info: u8) -> Option<Vec<RelationFile>> {
        let mut rest = Rest::default();
        if info & XACT_HAS_INFO != 0 {
            let mut data = self.data()?;
            data.time()?;
            data.rest_of_transaction(self.major, &mut rest)?;
        }
        Some(rest.dropped)
    }
}

impl Data<'_> {
    pub(super) fn file(&mut self) -> Option<RelationFile> {
        Some(RelationFile { tablespace: self.u32()?, database: self.u32()?, number: self.u32()? })
    }
}

#[cfg(test)]
mod tests;
