//! What is written before anything else of a base backup: that it was begun, from which parent, and which WAL it needs.
//!
//! From when an intent is durable, its parent, the packs that the parent names, and WAL from its position on are kept,
//! until it is known how the backup ended. That is decided by one object, `backup/<id>`, which exists once: it is the
//! manifest, or the word that the backup was given up. Whoever writes it first wins, so that a writer that was thought
//! dead cannot commit what was collected meanwhile, and nobody's clock decides.
//!
//! Signs of life are objects too. They only say when it is worthwhile to give a backup up.
//!
//! Left out: taking the backup. Hazard: packs of the parent that vanish under a backup that refers to them. `collect` has
//! the order in which things are looked at.

use jiff::Timestamp;
use pgherd_core::types::{Lsn, NodeName, SystemId, Term, Timeline};
use serde::{Deserialize, Serialize};

use crate::document::Document;
use crate::hash::from_hex;
use crate::name::BackupId;

/// The first object of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    pub id: BackupId,
    /// Whose packs it may refer to.
    pub parent: Option<BackupId>,
    pub system_identifier: SystemId,
    pub timeline: Timeline,
    /// No WAL from here on is deleted while the backup is being taken.
    pub wal_from: Lsn,
    /// Who takes it, and under which term.
    pub node: NodeName,
    pub term: Term,
    pub begun: Timestamp,
    /// A backup that nobody completes, from which it wants to go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continues: Option<BackupId>,
    /// 16 random bytes: two that begin in the same second are not the same.
    pub writer: String,
}

impl Document for Intent {
    const KIND: &'static str = "intent";

    fn validate(&self) -> Result<(), String> {
        if self.parent.is_some_and(|parent| parent >= self.id) {
            return Err("its parent is not older than itself".to_owned());
        }
        if self.continues.is_some_and(|former| former >= self.id) {
            return Err("what it goes on from is not older than itself".to_owned());
        }
        if from_hex::<16>(&self.writer).is_none() {
            return Err("its writer is not 16 bytes".to_owned());
        }
        if self.timeline.0 == 0 {
            return Err("timeline 0".to_owned());
        }
        Ok(())
    }
}

/// A sign of life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heartbeat {
    pub id: BackupId,
    pub number: u32,
    pub at: Timestamp,
}

impl Document for Heartbeat {
    const KIND: &'static str = "heartbeat";

    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Stands where the manifest would: this backup was given up, and will never have one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Abandoned {
    pub id: BackupId,
    pub at: Timestamp,
    pub why: String,
    /// The backup that goes on from it, and may refer to its packs: they are kept as long as that one is being taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued_by: Option<BackupId>,
}

impl Document for Abandoned {
    const KIND: &'static str = "abandoned";

    fn validate(&self) -> Result<(), String> {
        match self.continued_by.is_some_and(|by| by <= self.id) {
            true => Err("what goes on from it is not newer than itself".to_owned()),
            false => Ok(()),
        }
    }
}
