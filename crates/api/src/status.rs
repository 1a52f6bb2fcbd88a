//! `pgherd status --json` and `GET /v1/status`: the topology of a herd at one moment.
//!
//! This is the contract that other programs read first, so it is spelled out here field by field and its
//! JSON Schema is checked in. Every enum of this file is closed within `/v1/`.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// Name of the herd.
    pub herd: String,
    /// Generation of the specification that the store holds.
    pub generation: u64,
    pub store: Store,
    pub clusters: Vec<Cluster>,
    /// Listeners of the proxies that are known; empty where there are none.
    pub proxy: Vec<ProxyListener>,
}

/// Where agreement lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Store {
    pub kind: StoreKind,
    /// The store's own leader: null while it has none or none is known. Never a word about PostgreSQL.
    pub leader: Option<String>,
    pub members: Vec<StoreMember>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    Raft,
    Etcd,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StoreMember {
    pub name: String,
    /// False while it only learns.
    pub voter: bool,
    /// As seen by the agent that answered; null when it has not tried yet.
    pub reachable: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Cluster {
    pub name: String,
    /// PostgreSQL's system identifier, as text; null before initdb.
    pub system_identifier: Option<String>,
    /// Number of the reign; 0 before the first primary; null when the store could not be asked.
    pub term: Option<u64>,
    /// Who holds the term; null while nobody does.
    pub primary: Option<String>,
    pub gate: Gate,
    pub durability: Durability,
    pub members: Vec<Member>,
    /// Null where no backup is configured.
    pub backup: Option<Backup>,
    /// Null where the herd file has no address that moves with the gate.
    pub vip: Option<Vip>,
    /// Null unless somebody has the cluster go back to an earlier moment.
    pub restore: Option<Restore>,
}

/// A cluster on its way back to an earlier moment: the copy of one node is taken there, and leads when an operator says so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Restore {
    pub node: String,
    /// The base backup that its copy is made from.
    pub backup: String,
    /// Every record before this position is in it, and none behind.
    pub end_lsn: String,
    pub timeline: u32,
    /// It is there, and waits for an operator's word.
    pub held: bool,
    /// Why it did not get there the last time; it is tried again.
    pub trouble: Option<String>,
}

/// An address that is where clients are let in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Vip {
    /// With the length of its network's prefix.
    pub address: String,
    pub interface: String,
    /// The node that says it has it; null while none does.
    pub holder: Option<String>,
    /// What is wrong with it, a sentence for each node where something is.
    pub trouble: Vec<String>,
}

/// Whether clients may use the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Gate {
    Open,
    Closed,
    /// A switchover lets running transactions end; no new ones are let in.
    Draining,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Durability {
    pub mode: DurabilityMode,
    /// How many voters must flush each commit.
    pub needed: u32,
    /// The standbys that count, and `pgherd_repository` where the repository does.
    pub voters: Vec<String>,
    /// Commits are acknowledged by fewer than `needed` voters, because `degrade_after` said so.
    pub degraded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DurabilityMode {
    Quorum,
    Async,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Member {
    pub name: String,
    pub host: String,
    /// PostgreSQL's port; null on a witness or keeper.
    pub port: Option<u16>,
    pub role: Role,
    pub state: State,
    pub timeline: Option<u32>,
    /// Flush position, in PostgreSQL's notation.
    pub lsn: Option<String>,
    /// The primary's flush position minus this one's.
    pub lag_bytes: Option<u64>,
    pub replay_lag_ms: Option<u64>,
    /// Null where it does not apply or is not known.
    pub sync: Option<Sync>,
    /// The node that this one streams from.
    pub upstream: Option<String>,
    /// One sentence: why it is what it is.
    pub reason: String,
    /// A changed parameter waits for a restart; null when not known.
    pub pending_restart: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Primary,
    Standby,
    Delayed,
    Witness,
    Keeper,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Initializing,
    Starting,
    Running,
    Streaming,
    #[serde(rename = "catching up")]
    CatchingUp,
    Promoting,
    Rewinding,
    Cloning,
    Paused,
    Stopped,
    Unreachable,
    /// Damaged: never elected, and without a vote until healthy or rebuilt.
    Barred,
}

/// What a member is worth for a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sync {
    Primary,
    Quorum,
    Potential,
    Async,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Backup {
    /// Any moment in it can be restored; null before the first usable base backup.
    pub recovery_window: Option<RecoveryWindow>,
    /// Name of the newest usable base backup.
    pub last: Option<String>,
    /// How far the archive is behind its server.
    pub wal_lag_seconds: Option<f64>,
    /// Where the repository is.
    pub repository: String,
    /// The node that streams WAL into it; null while none does.
    pub owner: Option<String>,
    /// Base backups that are there; null while the owner is not heard.
    pub backups: Option<u32>,
    /// Null while none is taken.
    pub running: Option<BackupRunning>,
    /// The newest attempt that has ended; null before the first.
    pub ended: Option<BackupEnded>,
    /// The last drill by the schedule; null before the first.
    pub drill: Option<BackupDrill>,
    /// WAL that is missing with something behind it: positions there cannot be restored.
    pub gaps: Vec<String>,
    /// What the nodes said that were asked for missing WAL and do not have it; null if nothing is missing or nobody was asked yet.
    pub asked: Option<String>,
    /// Missing WAL that nodes gave last; null if that was not needed since this node owns the archive.
    pub filled: Option<BackupFilled>,
    /// Why WAL does not go on into the repository; null if it does.
    pub trouble: Option<String>,
}

/// An attempt to take a base backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BackupEnded {
    /// Attempts are counted.
    pub number: u64,
    pub node: String,
    /// RFC 3339, by the clock of that node; null if it did not say so itself.
    pub at: Option<String>,
    /// Its name in the repository; null if it failed.
    pub name: Option<String>,
    /// Why it failed; null if it is complete.
    pub failed: Option<String>,
}

/// WAL that was missing in the repository, and that nodes still had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BackupFilled {
    /// RFC 3339, by the clock of the owner.
    pub at: String,
    pub files: u32,
    pub from: Vec<String>,
}

/// A backup was restored to see whether it can be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BackupDrill {
    /// On whose host.
    pub node: String,
    /// RFC 3339, when it began, by the clock of that node.
    pub at: String,
    pub seconds: u64,
    /// Null if it did not come so far.
    pub backup: Option<String>,
    /// Why it failed; null if it passed.
    pub failed: Option<String>,
}

/// A base backup under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BackupRunning {
    pub number: u64,
    /// Whose server is copied.
    pub node: String,
    pub done_bytes: Option<u64>,
    /// Null while it is not known.
    pub total_bytes: Option<u64>,
    /// To how many bytes a second it is held back at this moment, for the sake of the server's clients; null if it is not.
    pub held_back_to: Option<u64>,
}

/// RFC 3339 times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RecoveryWindow {
    pub from: String,
    pub to: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProxyListener {
    pub cluster: String,
    /// `address:port`.
    pub listen: String,
    pub target: ProxyTarget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProxyTarget {
    ReadWrite,
    ReadOnly,
}

/// JSON Schema (draft 2020-12) of what is written: every field is present, and unknown is null.
pub fn schema() -> serde_json::Value {
    let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
    generator.into_root_schema_for::<Status>().to_value()
}
