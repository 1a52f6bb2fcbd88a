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

use super::{BLOCK_DATA_LONG, BLOCK_DATA_SHORT, BLOCK_ORIGIN, BLOCK_TOPLEVEL_XID, Data, MAX_BLOCK_ID};
use super::{DBASE_DROP, DBASE_DROP_BEFORE_15, RECORD_HEADER_BYTES, Record, RelationFile, Rest, u32_at};
use super::{RM_DBASE, RM_XACT, RM_XLOG, TYPE_BITS, XACT_ABORT, XACT_ABORT_PREPARED, XACT_COMMIT};
use super::{XACT_COMMIT_PREPARED, XACT_HAS_INFO, XACT_TYPE_BITS};
use crate::breakage::{Broken, broken};

/// `rmgrlist.h`; the last of PostgreSQL's own is the same from 14 to 18. What is above belongs to extensions.
const RM_SMGR: u8 = 2;
const RM_TBLSPC: u8 = 5;
const RM_LAST: u8 = 21;

/// `xlogrecord.h`.
const FORK_BITS: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const SAME_RELATION: u8 = 0x80;
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
        self.pages(page_bytes, each).ok_or_else(malformed)
    }

    /// The blocks of main forks, from the descriptions in front of a record's data, in the way of `DecodeXLogRecord`.
    fn pages(&self, page_bytes: usize, mut each: impl FnMut(Touched)) -> Option<()> {
        let mut data = Data(&self.head[RECORD_HEADER_BYTES..]);
        let whole = (u32_at(self.head, 0) as usize).checked_sub(RECORD_HEADER_BYTES)?;
        let described = data.0.len();
        // What the descriptions announce; when no more than that is left of the record, there is no further one.
        let (mut announced, mut last) = (0_usize, None);
        while whole.saturating_sub(described - data.0.len()) > announced {
            match data.take(1)?[0] {
                BLOCK_DATA_SHORT => {
                    data.take(1)?;
                    break;
                }
                BLOCK_DATA_LONG => {
                    data.take(4)?;
                    break;
                }
                BLOCK_ORIGIN => {
                    data.take(2)?;
                }
                BLOCK_TOPLEVEL_XID => {
                    data.take(4)?;
                }
                0..=MAX_BLOCK_ID => {
                    let flags = data.take(1)?[0];
                    let bytes = usize::from(super::u16_at(data.take(2)?, 0));
                    if flags & HAS_DATA != 0 {
                        announced += bytes;
                    }
                    if flags & HAS_IMAGE != 0 {
                        announced += data.image(self.major, page_bytes)?.bytes();
                    }
                    let file = match flags & SAME_RELATION != 0 {
                        true => last?,
                        false => data.file()?,
                    };
                    last = Some(file);
                    let block = data.u32()?;
                    if flags & FORK_BITS == MAIN_FORK {
                        each(Touched::Page { file, block });
                    }
                }
                _ => return None,
            }
        }
        Some(())
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
    fn file(&mut self) -> Option<RelationFile> {
        Some(RelationFile { tablespace: self.u32()?, database: self.u32()?, number: self.u32()? })
    }
}

#[cfg(test)]
mod tests;
