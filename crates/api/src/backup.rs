//! Backups as they are told: what a repository has of a cluster, what a restore would do, and what came of it. The commands print the same
//! documents with `--json` as agents answer.
//!
//! Times are RFC 3339 in UTC; positions, system identifiers and backups are text. Words are PostgreSQL's and Barman's.

use serde::{Deserialize, Serialize};

/// `pgherd restore --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restore {
    pub plan: RestorePlan,
    /// Null where nothing was done: `--dry-run`.
    pub restored: Option<Restored>,
}

/// What a restore does, and where the recovery behind it ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestorePlan {
    pub repository: String,
    pub system_identifier: String,
    pub postgresql_version: String,
    pub data_dir: String,
    pub standing: Standing,
    pub backup: String,
    pub backup_ended: String,
    pub backup_end_lsn: String,
    /// In words.
    pub target: String,
    /// Where the table was dropped before which recovery ends; null where the target is another one.
    pub dropped: Option<DroppedTable>,
    /// Where recovery goes, and over which timelines.
    pub timeline: u32,
    pub timelines: Vec<u32>,
    /// WAL that recovery reads: from this position, so many segments.
    pub wal_from: String,
    pub wal_segments: u64,
    pub end: RecoveryEnd,
    pub files: u64,
    pub bytes: u64,
    pub volumes: Vec<Volume>,
    pub wal_dir: Option<String>,
    pub tablespaces: Vec<TablespacePlace>,
    pub restore_command: String,
    /// What PostgreSQL does at the target; null where recovery goes to the end of the WAL, and the server is promoted.
    pub target_action: Option<String>,
    pub settings: Vec<SettingChange>,
    /// Settings that lead out of the data directory and stay as they are.
    pub outside: Vec<SettingOutside>,
    /// What is known of a backup that another program took: how its files are verified, what is different then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

/// What a restore of a whole cluster does. Nothing of it is done by telling it: `--dry-run`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterRestorePlan {
    pub cluster: String,
    /// Whose copy is taken back first; null: the standby that can best be done without.
    pub node: Option<String>,
    /// Who leads until then.
    pub primary: Option<String>,
    pub repository: String,
    pub system_identifier: String,
    pub postgresql_version: String,
    pub backup: String,
    pub target: String,
    pub dropped: Option<DroppedTable>,
    pub timelines: Vec<u32>,
    pub wal_from: String,
    pub wal_segments: u64,
    pub end: RecoveryEnd,
    /// How much WAL the primary has written behind the end, and all of it is given up; null where it is not known.
    pub lost_wal_bytes: Option<u64>,
    /// The backup's.
    pub bytes: u64,
}

/// That a table was dropped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DroppedTable {
    /// With its schema.
    pub table: String,
    pub database: String,
    pub oid: u32,
    /// Whether its whole database was dropped.
    pub with_database: bool,
    pub xid: u32,
    /// When that transaction was committed.
    pub at: String,
    /// Everything before this position is from before it.
    pub lsn: String,
}

/// What is at the place that is restored into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    Empty,
    /// An earlier restore that did not come to its end.
    Interrupted,
    DataDirectory,
}

/// Where a recovery ends: everything before the position is applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryEnd {
    pub lsn: String,
    pub timeline: u32,
    /// The last transaction that will be there; null where none ended between the start of the backup and here.
    pub last: Option<Transaction>,
    /// The first one that will not; null where none ends behind it.
    pub next: Option<Transaction>,
}

/// The end of a transaction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transaction {
    pub xid: u32,
    pub at: String,
    pub lsn: String,
}

/// A file system, and what comes onto it. WAL that recovery fetches is not counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    pub places: Vec<String>,
    pub needed_bytes: u64,
    pub free_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TablespacePlace {
    pub oid: u32,
    /// Where the server that was backed up had it.
    pub was: String,
    pub place: String,
}

/// A setting that a restore changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SettingChange {
    pub file: String,
    pub name: String,
    /// Null where there was none, and where it can hold a password.
    pub was: Option<String>,
    /// Null where it is taken out.
    pub now: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SettingOutside {
    pub file: String,
    pub name: String,
    pub value: String,
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restored {
    pub files: u64,
    pub bytes: u64,
    /// Written, because it was not there.
    pub fetched_bytes: u64,
    /// Files and directories that did not belong, and were deleted.
    pub deleted: u64,
    pub seconds: f64,
}

/// `pgherd restore --table --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TableRestore {
    pub plan: TablePlan,
    /// Null where nothing was done: `--dry-run`.
    pub brought: Option<Brought>,
}

/// Which tables come from where, and into which server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TablePlan {
    /// Of the scratch server that they are fetched from.
    pub restore: RestorePlan,
    pub database: String,
    pub tables: Vec<PlannedTable>,
    /// Under their own names, with all that belongs to them.
    pub in_place: bool,
    pub into: TableTarget,
}

/// A table, and where it comes. Without a schema both are what is found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedTable {
    pub table: String,
    pub brought_as: String,
}

/// A server that gets tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TableTarget {
    pub database: String,
    pub role: String,
    /// Null through a Unix socket.
    pub address: Option<String>,
    pub port: Option<u16>,
    pub postgresql_version: String,
}

/// What came of it, in one transaction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Brought {
    pub tables: Vec<BroughtTable>,
    /// Of the dump that brought them.
    pub bytes: u64,
    /// To restore the backup, to recover it, to bring the tables over.
    pub restore_seconds: f64,
    pub recovery_seconds: f64,
    pub transfer_seconds: f64,
}

/// A table of an earlier moment, as it is there now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BroughtTable {
    pub table: String,
    pub brought_as: String,
    pub rows: u64,
    pub partitions: u64,
    /// Null: who brought it.
    pub owner: Option<String>,
    pub indexes: Vec<String>,
    pub constraints: Vec<String>,
    /// That it owns; they go on where they were.
    pub sequences: Vec<String>,
    /// What of it did not come along.
    pub left_out: Vec<String>,
}

/// `pgherd backup drill --json`: what came of restoring a backup into a server that was thrown away afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drill {
    pub repository: String,
    pub system_identifier: String,
    pub postgresql_version: String,
    pub backup: String,
    /// In words.
    pub target: String,
    /// When it began.
    pub at: String,
    pub passed: bool,
    pub seconds: f64,
    pub files: u64,
    pub bytes: u64,
    /// Null where it was not restored.
    pub restore_seconds: Option<f64>,
    pub recovery: Option<DrillRecovery>,
    /// In the order in which they were made. After a failure of the recovery there are no others.
    pub checks: Vec<DrillCheck>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillRecovery {
    /// Between the start of the backup and the end.
    pub wal_bytes: u64,
    /// From the start of the server until it was promoted.
    pub seconds: f64,
    /// Where it was to end.
    pub lsn: String,
    pub timeline: u32,
    pub last: Option<Transaction>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillCheck {
    /// `recovery`, `queries`, `indexes` or `checksums`.
    pub name: String,
    pub outcome: DrillOutcome,
    /// What was looked at, or what is wrong.
    pub told: Vec<String>,
    pub seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrillOutcome {
    Passed,
    Failed,
    /// There was nothing to look at, or nothing to look with.
    Skipped,
}

/// `pgherd backup create --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Created {
    pub repository: String,
    pub backup: Backup,
    pub read_bytes: u64,
    /// What is the same as in the parent, and what of that was written anew.
    pub kept_bytes: u64,
    pub refreshed_bytes: u64,
    /// Files that were dropped while it was taken.
    pub vanished: u64,
    /// Pages whose checksums are wrong; the backup has them as they are.
    pub damaged: Vec<DamagedFile>,
    /// Pages that have changed since the parent though no WAL has changed them; the backup has them as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unexplained: Vec<DamagedFile>,
    pub seconds: f64,
}

/// Pages of a file that are not as PostgreSQL wrote them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DamagedFile {
    pub path: String,
    pub pages: Vec<u32>,
}

/// `pgherd backup list --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Backups {
    pub repository: String,
    pub system_identifier: String,
    /// Null where nothing can be restored.
    pub recovery_window: Option<RecoveryWindow>,
    /// WAL that is missing, with something behind it.
    pub gaps: Vec<WalGap>,
    /// The oldest first.
    pub backups: Vec<Backup>,
}

/// Any moment between the two can be restored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryWindow {
    pub from: String,
    pub from_backup: String,
    pub from_lsn: String,
    /// When the last transaction that is there was committed; null where none of the last segments has one.
    pub to: Option<String>,
    pub to_lsn: String,
    pub to_timeline: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WalGap {
    pub timeline: u32,
    pub from: String,
    pub to: String,
}

/// That a backup is kept, whatever a retention policy says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Keep {
    /// `full`: with all WAL since; `standalone`: with its own.
    pub target: String,
    /// Null: until it is released.
    pub until: Option<String>,
    pub since: String,
}

/// A base backup. What is only in its manifest is null for one that has none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Backup {
    pub id: String,
    pub status: BackupStatus,
    /// Why it has this status, where there is more to say.
    pub why: Option<String>,
    pub keep: Option<Keep>,
    /// Whether its own WAL is all there; null where nobody looked, and for one that was not completed.
    pub can_be_restored: Option<bool>,
    pub node: Option<String>,
    pub term: Option<u64>,
    pub mode: Option<BackupMode>,
    /// The backup that it was built upon. It is complete without it.
    pub parent: Option<String>,
    /// An attempt that was not completed, from which it went on; null: from none.
    #[serde(default)]
    pub continues: Option<String>,
    pub timeline: Option<u32>,
    pub begin_time: Option<String>,
    pub end_time: Option<String>,
    pub begin_lsn: Option<String>,
    pub end_lsn: Option<String>,
    pub begin_wal: Option<String>,
    pub end_wal: Option<String>,
    pub files: Option<u64>,
    /// Of the cluster.
    pub size_bytes: Option<u64>,
    /// What it added to the repository, and all that it refers to there.
    pub stored_bytes: Option<u64>,
    pub referenced_bytes: Option<u64>,
    pub postgresql_version: Option<String>,
    pub data_checksums: Option<bool>,
    /// How it was found what has changed since the parent; null of a full backup, and of one by an older version.
    #[serde(default)]
    pub changes: Option<FoundChanges>,
    /// For how long it was held back for the sake of the server's clients; null where that was no second.
    #[serde(default)]
    pub held_back_seconds: Option<u64>,
}

/// How an incremental backup was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundChanges {
    pub found_by: FoundBy,
    /// Why it was not by WAL, where that was not asked for.
    pub why: Option<String>,
    /// Of the server's files, and of WAL.
    pub read_bytes: u64,
    pub wal_bytes: u64,
    /// Pages that have changed without a word in WAL.
    pub unexplained_pages: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundBy {
    /// Only what WAL names was read.
    Wal,
    /// Everything was read, and compared with the parent.
    Comparison,
    /// Everything was read and compared, and held against WAL.
    Both,
    #[serde(other)]
    Unknown,
}

/// In Barman's words where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum BackupStatus {
    /// It is being taken, or was when its writer died.
    Started,
    Done,
    /// It was given up.
    Failed,
    /// It is to go when its grace has passed; until then it can be taken back.
    Deleted,
    #[serde(other)]
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupMode {
    Full,
    Incremental,
}

/// `pgherd backup expire --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Expiry {
    pub policy: String,
    pub minimum_redundancy: u32,
    /// The newest first.
    pub verdicts: Vec<Verdict>,
    /// Null where nothing was done: `--dry-run`.
    pub collected: Option<Collected>,
}

/// What a retention policy makes of a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub id: String,
    /// `VALID`, `OBSOLETE`, `POTENTIALLY_OBSOLETE`, `NONE`, `KEEP:FULL` or `KEEP:STANDALONE`.
    pub label: String,
    pub goes: bool,
    /// Which WAL it needs: `since`, all from its start on; `own`, up to its stop; null for one that goes.
    pub wal: Option<String>,
    /// One sentence.
    pub reason: String,
}

/// What a collection did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Collected {
    /// Backups whose deletion began or went on.
    pub swept: Vec<String>,
    /// Backups that nobody was taking any more.
    pub abandoned: Vec<String>,
    /// Backups that are deleted and stay until their grace has passed.
    pub waiting: Vec<String>,
    pub packs: u64,
    pub maps: u64,
    pub wal: u64,
    pub bytes: u64,
}

/// `pgherd backup verify --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    pub backups: Vec<VerifiedBackup>,
    pub wal: VerifiedWal,
}

impl Verification {
    pub fn is_sound(&self) -> bool {
        let wal = &self.wal;
        wal.damaged.is_empty()
            && wal.gaps.is_empty()
            && self.backups.iter().all(|backup| backup.damaged.is_empty())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerifiedBackup {
    pub id: String,
    /// Read to their ends, and found as they were written.
    pub files: u64,
    pub bytes: u64,
    pub damaged: Vec<Damage>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerifiedWal {
    pub segments: u64,
    pub damaged: Vec<Damage>,
    pub gaps: Vec<WalGap>,
}

/// What cannot be read back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Damage {
    /// The file of the data directory, or of WAL; null where a map is damaged, so that nobody knows which ones it has.
    pub file: Option<String>,
    /// What is wrong, with the object.
    pub what: String,
}
