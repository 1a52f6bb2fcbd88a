//! Everything a decision may look at.
//!
//! Unknown is a value: `None` means that nobody looked or nobody answered, never zero. What was seen
//! elsewhere carries the moment at which it was asked for, on this machine's own clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::action::SealOrder;
use crate::ha::election;
use crate::record::{BackupEnd, DrillEnd, Moment, Position, Record};
use crate::spec::{ClusterSpec, Times};
use crate::types::{Incarnation, Instant, Lsn, Member, NodeName, Stream, SystemId, Term, Timeline};

#[derive(Clone, Debug)]
pub struct Observation<'a> {
    pub me: &'a NodeName,
    pub times: &'a Times,
    pub spec: &'a ClusterSpec,
    pub store: StoreView<'a>,
    pub local: &'a Local,
    pub peers: &'a BTreeMap<NodeName, Peer>,
    /// Failovers by a crash of the primary in the last ten minutes, from the record's events.
    pub recent_crashes: u32,
}

/// What this agent knows of the store.
#[derive(Clone, Copy, Debug)]
pub struct StoreView<'a> {
    /// The newest record seen; it may be behind the store's. `None` before the first read.
    pub record: Option<&'a Record>,
    /// When the newest linearizable confirmation was *asked for* that found `record` unchanged, and its term open.
    pub confirmed: Option<Instant>,
    /// Since this agent started, the store has said of a record that was shown here that it is its newest word.
    /// Before that the replica may show less than what this node has acted on in an earlier life.
    pub caught_up: bool,
    /// Whether the last call to the store went through.
    pub reachable: bool,
}

/// This node.
#[derive(Clone, Debug, Default)]
pub struct Local {
    pub durable: Durable,
    pub postgres: Postgres,
    /// The operation that holds this PostgreSQL now; nothing else is begun on it.
    pub busy: Option<Busy>,
    /// Up to where a standby has replayed.
    pub replayed: Option<Lsn>,
    /// Damage seen on this node, in words.
    pub damage: Option<String>,
    /// An operator asked this agent to stop its PostgreSQL and stay away.
    pub stopping: bool,
    /// When the newest heartbeat was *begun* that `needed` >= 1 voters acknowledged, and its term.
    pub heartbeat: Option<(Term, Instant)>,
    /// The list of synchronous standbys that a new connection shows, that every WAL sender agrees with,
    /// and that commits are proven to wait for.
    pub list: Option<SyncList>,
    /// The list that was current when the marker was written, and the marker's end.
    pub marker: Option<(SyncList, Lsn)>,
    /// Whether PostgreSQL admits clients: to a standby, for reads.
    pub gate_open: bool,
    /// A checkpoint was completed for this switchover.
    pub checkpointed_for: Option<Term>,
    /// Since [`Duties::drain`](crate::action::Duties::drain) was given in this term, every proxy that follows this node
    /// has said that no transaction of its clients is left here.
    pub drained_for: Option<Term>,
    /// What this node has seen of the repository, as its owner.
    pub archive: Option<ArchiveView>,
    /// What it has seen of it as anybody who may seal it.
    pub repository: RepositoryView,
    /// How the base backup came out that this node took last.
    pub backup_ended: Option<BackupEnd>,
    /// How the drill came out that this node made last.
    pub drill_ended: Option<DrillEnd>,
}

/// What the owner of the archive knows of the repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArchiveView {
    /// Its identifier, once it has been opened.
    pub repository: Option<String>,
    /// WAL is on its way into it.
    pub streams: bool,
    /// A base backup is due by the schedule, or because there is none that leads to the present,
    pub backup_is_due: bool,
    /// as far as was seen after the end of the one with this number.
    pub after: u64,
    /// A drill is due by the schedule,
    pub drill_is_due: bool,
    /// as far as was seen after the one that began then.
    pub drill_after: Option<u64>,
    /// The highest incarnation of a repository that has left something there, 0 for none; `None`: nobody has looked.
    pub admitted: Option<Incarnation>,
}

/// What an agent knows of a repository that votes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepositoryView {
    /// When the newest call was begun that it has answered.
    pub answered: Option<Instant>,
    /// What this agent found in it behind its own seal.
    pub sealed: Option<SealedRepository>,
}

/// What is in the repository as it was listed after it had been sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedRepository {
    pub order: SealOrder,
    /// What can be made of it, from a base backup and the WAL behind that up to the first hole: the end of the last complete valid record.
    pub copy: Copy,
    /// Somebody whose copy ends before this cannot take the rest from there: the WAL is missing, or was deleted with an older backup.
    pub from: Lsn,
    /// Under which term its owners went onto each timeline for this incarnation.
    pub adopted: BTreeMap<Timeline, Term>,
}

/// What this node's own disk remembers; it survives any crash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Durable {
    /// The incarnation whose data directory this is.
    pub member: Option<Member>,
    /// The highest term that this node followed or voted in.
    pub term: Term,
    /// Sealed for the election of this term: nothing of an older one is received any more.
    pub sealed: Option<Term>,
    /// Under which term this node went onto each timeline.
    pub adopted: BTreeMap<Timeline, Term>,
    /// A promotion was begun and its end has not been recorded.
    pub promoting: Option<(Term, Timeline)>,
    /// The data directory is being made or rewritten and is worth nothing until that has ended.
    pub rebuilding: bool,
    /// Its WAL ends at this moment, to which the whole cluster may go back. It stays worth nothing until it has won for that.
    pub held: Option<Moment>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Postgres {
    /// Not looked at yet.
    #[default]
    Unknown,
    /// There is no data directory.
    Absent,
    /// There is one, and no process of it. The position is read from its WAL.
    Stopped(Copy),
    /// Processes are left of a server that is dead or dying.
    Remains,
    /// Alive, but not yet open for queries.
    Starting,
    Standby(Standby),
    Primary(Primary),
}

impl Postgres {
    /// The copy, where its timeline is known.
    pub fn copy(&self) -> Option<&Copy> {
        match self {
            Postgres::Stopped(copy) => Some(copy),
            Postgres::Standby(standby) => Some(&standby.copy),
            Postgres::Primary(primary) => Some(&primary.copy),
            Postgres::Unknown | Postgres::Absent | Postgres::Remains | Postgres::Starting => None,
        }
    }

    /// Up to where the copy goes; a primary's, up to where it has flushed.
    pub fn end(&self) -> Option<Lsn> {
        match self {
            Postgres::Primary(primary) => Some(primary.flush_lsn),
            _ => self.copy()?.end,
        }
    }
}

/// A data directory as far as its files tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copy {
    pub system: Option<SystemId>,
    pub timeline: Timeline,
    /// End of the last complete valid record; `None` until the WAL has been read.
    pub end: Option<Lsn>,
    /// Where each timeline of its history began.
    pub begins: Vec<(Timeline, Lsn)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standby {
    pub copy: Copy,
    /// What its configuration names as upstream, under which term; `None`: nobody.
    pub follows: Option<(NodeName, Term)>,
    pub receiving: bool,
    /// Replay cannot go on: the timelines of this copy and its upstream have parted.
    pub diverged: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Primary {
    pub copy: Copy,
    pub flush_lsn: Lsn,
    pub senders: Vec<Sender>,
    /// Slots of herd members that exist here.
    pub slots: BTreeSet<NodeName>,
}

/// One WAL sender, as `pg_stat_replication` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    pub pid: u32,
    /// The member that its `application_name` claims to be, if it reads as one that has adopted this timeline.
    pub member: Option<Member>,
    /// Its certificate names that node, and it streams from that node's own slot.
    pub genuine: bool,
    pub streaming: bool,
    pub flush_lsn: Option<Lsn>,
}

/// PostgreSQL's list of synchronous standbys: any `needed` of `names`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct SyncList {
    pub needed: u32,
    pub names: BTreeSet<Stream>,
}

/// What holds the local PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    InitDb,
    Clone,
    /// The copy is taken back to an earlier moment.
    Restore,
    Rewind,
    Start,
    Stop,
    Seal,
    Promote,
    Follow,
    Configure,
    /// The gate is being closed.
    Close,
    CatchUp,
}

impl Busy {
    /// Whether it ends the time in which clients come here.
    pub fn shuts_out(self) -> bool {
        match self {
            Busy::Configure => false,
            Busy::InitDb
            | Busy::Clone
            | Busy::Restore
            | Busy::Rewind
            | Busy::Start
            | Busy::Stop
            | Busy::Seal
            | Busy::Promote
            | Busy::Follow
            | Busy::Close
            | Busy::CatchUp => true,
        }
    }
}

/// Another agent, and what it said last.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// When it was last heard; `None`: never since this agent started.
    pub heard: Option<Instant>,
    /// The slowest recent round trip to it.
    pub round_trip: Duration,
    /// Since when this agent's own probes of the PostgreSQL there have failed.
    pub probe_failing_since: Option<Instant>,
    pub report: Option<Report>,
}

/// What an agent tells the others about itself, several times a second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub term: Term,
    pub running: Running,
    /// What its copy is worth; `None` while that is not known.
    pub holds: Option<Position>,
    /// For how long this agent's probes of the holder's PostgreSQL have failed; `None`: they succeed, or
    /// there are none.
    pub holder_probe_failing: Option<(NodeName, Duration)>,
    /// Its copy must be rewritten before it can follow; it asks to lose its vote.
    pub wants_rebuild: bool,
    pub damage: Option<String>,
    /// The repository has answered it lately, where that votes.
    pub reaches_repository: bool,
}

impl Report {
    /// What this node tells about itself; what it has seen of others is added by its agent.
    pub fn of(local: &Local, record: Option<&Record>) -> Report {
        let running = match &local.postgres {
            Postgres::Unknown | Postgres::Starting | Postgres::Remains => Running::Unknown,
            Postgres::Absent | Postgres::Stopped(_) => Running::Nothing,
            Postgres::Standby(_) => Running::Standby,
            Postgres::Primary(_) => Running::Primary,
        };
        let (copy, end) = (local.postgres.copy(), local.postgres.end());
        let holds = copy.zip(end).zip(record).map(|((copy, end), record)| {
            let adopted = &local.durable.adopted;
            election::position(record, adopted, copy.timeline, end, &copy.begins).0
        });
        Report { term: local.durable.term, running, holds, damage: local.damage.clone(), ..Report::default() }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Running {
    #[default]
    Unknown,
    Nothing,
    Standby,
    Primary,
}
