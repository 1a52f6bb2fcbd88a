//! Fills holes of the archive with what members of the herd still have in their `pg_wal`.
//!
//! Each member is asked in turn for each file that is missing, and what it gives is looked at before it is archived: it has to be of the line of history
//! that was agreed on, and joined to what is archived before and behind it ([`pgherd_backup::wal::offered`]). It is put like everything else, if
//! nothing is there yet. The last file of a hole is looked for first: what is behind it is archived, and shows whether its end is right, as it does for the one before it then.
//! A member that does not answer is not asked again in the same round, and one that gives something else is passed over.
//!
//! Leaves out: what is missing and who is asked (`core`, [`pgherd_backup::wal::missing`]), and when a round is made (`owner`). Hazard: see
//! [`pgherd_backup::wal::offered`]. That a member is of this herd does not make what it says true.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use pgherd_api::client::{CallError, Client};
use pgherd_api::wal::{WalAsk, WalTold, WalWanted};
use pgherd_backup::receive::Object;
use pgherd_backup::wal::offered::{self, Expected, Tail, Unfit};
use pgherd_backup::wal::{
    Archive, Archived, History, HistoryError, Inventory, Segment, Segments, WalError, Wanted,
};
use pgherd_core::types::{Lsn, SystemId, Timeline};

use crate::causes::on_one_line;

/// For a segment of no size,
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// and so much more for each MiB of one: its server reads it from a disk that has something else to do.
const EACH_MIB_WITHIN: Duration = Duration::from_secs(1);

/// What somebody is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    pub system: SystemId,
    pub segments: Segments,
    pub wanted: Wanted,
}

impl Want {
    /// PostgreSQL's name of it.
    pub(crate) fn file(&self) -> String {
        match self.wanted {
            Wanted::History(timeline) => format!("{:08X}.history", timeline.0),
            Wanted::Segment(segment) => self.segments.file_name(segment),
            Wanted::End { segment, .. } => format!("{}.partial", self.segments.file_name(segment)),
        }
    }

    fn to_wire(self) -> WalAsk {
        let (timeline, wanted) = match self.wanted {
            Wanted::History(timeline) => (timeline, WalWanted::History),
            Wanted::Segment(segment) => (segment.timeline, WalWanted::Segment { number: segment.number }),
            Wanted::End { segment, until } => {
                let bytes = (until.0 - self.segments.start(segment).0) as u32;
                (segment.timeline, WalWanted::End { number: segment.number, bytes })
            }
        };
        WalAsk {
            system_identifier: self.system.to_string(),
            timeline: timeline.0,
            segment_bytes: self.segments.bytes(),
            wanted,
        }
    }
}

/// Why somebody has not given it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotGiven {
    /// It has not got it.
    Absent(String),
    /// Nobody knows whether it has.
    Silent(String),
}

/// Somebody who may have it.
pub trait Member: Send + Sync {
    fn name(&self) -> &str;
    fn ask<'a>(&'a self, want: &'a Want) -> BoxFuture<'a, Result<Bytes, NotGiven>>;
}

/// Another agent.
pub(crate) struct Other {
    pub(crate) name: String,
    pub(crate) client: Client,
}

impl Member for Other {
    fn name(&self) -> &str {
        &self.name
    }

    fn ask<'a>(&'a self, want: &'a Want) -> BoxFuture<'a, Result<Bytes, NotGiven>> {
        async move {
            let mib = want.segments.bytes() >> 20;
            let client = self.client.within(ANSWER_WITHIN + EACH_MIB_WITHIN.saturating_mul(mib));
            match client.wal(&want.to_wire()).await {
                Ok((WalTold::Bytes, bytes)) => Ok(bytes),
                Ok((WalTold::Absent { why }, _)) => Err(NotGiven::Absent(why)),
                Err(error @ CallError::Answered { .. }) => Err(NotGiven::Absent(on_one_line(&error))),
                Err(error) => Err(NotGiven::Silent(on_one_line(&error))),
            }
        }
        .boxed()
    }
}

/// What is missing, and of what.
#[derive(Clone, Debug)]
pub struct Holes {
    pub archive: Archive,
    pub inventory: Inventory,
    /// The line of history that was agreed on.
    pub history: History,
    /// In the order in which it is to be archived.
    pub missing: Vec<Wanted>,
}

/// How asking came out.
#[derive(Debug, Default)]
pub struct Round {
    /// Files, and who gave them.
    pub filled: Vec<(String, String)>,
    pub left: Vec<Wanted>,
    /// What each said who was asked, of one that is left; for people.
    pub said: BTreeMap<String, String>,
}

/// What was given and is not taken.
#[derive(Debug, thiserror::Error)]
enum NotTaken {
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("its last record, which begins at {at}, goes on in the next segment, and nobody has that")]
    Open { at: Lsn },
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error("its history of timeline {timeline} is not the one that the herd's history came by")]
    OtherHistory { timeline: Timeline },
    #[error("looking at it has failed: {0}")]
    Lost(#[from] tokio::task::JoinError),
}

/// Asks for all that is missing. An error is one of the archive; what was filled before it stays.
pub async fn fill(mut holes: Holes, members: &[Box<dyn Member>]) -> Result<Round, WalError> {
    let mut asking = Asking { members, silent: BTreeMap::new(), last: None };
    let mut round = Round::default();
    // Histories come before what is on their timeline.
    let (histories, files): (Vec<_>, Vec<_>) = std::mem::take(&mut holes.missing)
        .into_iter()
        .partition(|wanted| matches!(wanted, Wanted::History(_)));
    for wanted in histories.into_iter().chain(files.into_iter().rev()) {
        let want = Want { system: holes.archive.system(), segments: holes.archive.segments(), wanted };
        let (name, bytes, mut said) = match asking.ask(&holes, &want).await {
            Ok(given) => given,
            Err(said) => {
                round.leave(wanted, said);
                continue;
            }
        };
        match holes.archive.put(&object(wanted, bytes)).await {
            Ok(Archived::Created | Archived::Same) => {
                if let Wanted::Segment(segment) = wanted {
                    holes.inventory.add(segment);
                }
                round.filled.push((want.file(), name.to_owned()));
            }
            Err(error @ WalError::Conflict { .. }) => {
                let why = on_one_line(&error);
                tracing::error!(
                    file = want.file(),
                    from = name,
                    why,
                    "what came for a hole of the archive is another content"
                );
                said.insert(name.to_owned(), why);
                round.leave(wanted, said);
            }
            Err(error) => return Err(error),
        }
    }
    round.filled.sort();
    round.left.sort();
    Ok(round)
}

/// Those who are asked in one round.
struct Asking<'a> {
    members: &'a [Box<dyn Member>],
    /// Who has not answered, and how.
    silent: BTreeMap<String, String>,
    /// What was given last, if it was right as far as could be seen.
    last: Option<(Segment, Bytes)>,
}

type Said = BTreeMap<String, String>;

impl<'a> Asking<'a> {
    /// Who gives what is wanted, or what all of them said.
    async fn ask(&mut self, holes: &Holes, want: &Want) -> Result<(&'a str, Bytes, Said), Said> {
        let wanted = want.wanted;
        let last = self.last.take_if(|_| matches!(wanted, Wanted::Segment(_)));
        let neighbours = Neighbours::of(holes, wanted, last).await;
        let mut said = Said::new();
        for member in self.members {
            let name = member.name();
            if let Some(why) = self.silent.get(name) {
                said.insert(name.to_owned(), why.clone());
                continue;
            }
            let bytes = match member.ask(want).await {
                Ok(bytes) => bytes,
                Err(NotGiven::Absent(why)) => {
                    said.insert(name.to_owned(), why);
                    continue;
                }
                Err(NotGiven::Silent(why)) => {
                    said.insert(name.to_owned(), why.clone());
                    self.silent.insert(name.to_owned(), why);
                    continue;
                }
            };
            let taken = taken(holes, wanted, &neighbours, &bytes).await;
            if let (Wanted::Segment(segment), Ok(()) | Err(NotTaken::Open { .. })) = (wanted, &taken) {
                // Also of one whose end is not known the beginning shows what the end of the one before has to be.
                self.last = Some((segment, bytes.clone()));
            }
            match taken {
                Ok(()) => return Ok((name, bytes, said)),
                Err(not_taken) => {
                    let why = on_one_line(&not_taken);
                    tracing::warn!(
                        file = want.file(),
                        from = name,
                        why,
                        "what came for a hole of the archive is not taken"
                    );
                    said.insert(name.to_owned(), why);
                }
            }
        }
        Err(said)
    }
}

impl Round {
    fn leave(&mut self, wanted: Wanted, said: Said) {
        self.said = said;
        self.left.push(wanted);
    }

    /// Who gave something.
    pub fn givers(&self) -> BTreeSet<&str> {
        self.filled.iter().map(|(_, name)| name.as_str()).collect()
    }
}

/// What is archived before and behind a segment.
#[derive(Clone, Default)]
struct Neighbours {
    before: Option<Bytes>,
    behind: Option<Bytes>,
}

impl Neighbours {
    /// `last`: what was given last. A neighbour that cannot be read is none: what is given has to speak for itself then.
    async fn of(holes: &Holes, wanted: Wanted, last: Option<(Segment, Bytes)>) -> Neighbours {
        let (segment, is_whole) = match wanted {
            Wanted::History(_) => return Neighbours::default(),
            Wanted::Segment(segment) => (segment, true),
            Wanted::End { segment, .. } => (segment, false),
        };
        let read = async |number: Option<u64>| {
            let there = holes.inventory.whole_on(&holes.history, number?)?;
            holes.archive.segment(there).await.ok()
        };
        let before = read(segment.number.checked_sub(1)).await;
        let behind = match last.filter(|(last, _)| is_whole && last.number == segment.number + 1) {
            Some((_, content)) => Some(content),
            None => read(Some(segment.number + 1).filter(|_| is_whole)).await,
        };
        Neighbours { before, behind }
    }
}

/// Whether it is what is missing.
async fn taken(
    holes: &Holes,
    wanted: Wanted,
    neighbours: &Neighbours,
    bytes: &Bytes,
) -> Result<(), NotTaken> {
    let (history, bytes, neighbours) = (holes.history.clone(), bytes.clone(), neighbours.clone());
    let (system, segments) = (holes.archive.system(), holes.archive.segments());
    let looking = tokio::task::spawn_blocking(move || {
        let (before, behind) = (neighbours.before.as_deref(), neighbours.behind.as_deref());
        let expected = Expected { system, segments, history: Some(&history), before, behind };
        match wanted {
            Wanted::Segment(segment) => match offered::whole(expected, segment, &bytes)? {
                Tail::Sure => {}
                Tail::Open { at } => return Err(NotTaken::Open { at }),
            },
            Wanted::End { segment, until } => offered::end(expected, segment, until, &bytes)?,
            Wanted::History(timeline) => {
                let came_by = history.forks().iter().take_while(|fork| fork.timeline < timeline);
                let given = History::parse(timeline, &bytes)?;
                if !given.forks().iter().eq(came_by) {
                    return Err(NotTaken::OtherHistory { timeline });
                }
            }
        }
        Ok(())
    });
    looking.await?
}

fn object(wanted: Wanted, content: Bytes) -> Object {
    match wanted {
        Wanted::History(timeline) => Object::History { timeline, content },
        Wanted::Segment(segment) => Object::Segment { segment, content },
        Wanted::End { segment, .. } => Object::Partial { segment, content },
    }
}
