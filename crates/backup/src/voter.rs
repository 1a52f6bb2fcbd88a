//! The repository as a member of the durability rule: what its owner leaves in it, and what those do who elect.
//!
//! Two kinds of objects, each put once and never deleted. `seal/<term>`: whoever streams in this incarnation's name for an older term tells
//! nothing any more. `adopted/<timeline>`: under which term WAL of a timeline was put, as a standby notes it on its disk.
//!
//! * Who streams puts WAL, *then* asks whether there is a seal above its term ([`Voter::is_sealed_above`]), and tells only then.
//! * Who elects puts the seal, *then* lists what is there ([`Voter::seal_and_look`]).
//!
//! So one of the two sees the other, and what was told is in the vote. A listing that lacks the asker's own seal is no answer: it is late, or
//! of a disk that is not mounted.
//!
//! Left out: whose vote it is and what it is worth (`core`). Hazard: a listing that is believed and shows no seal; what is told behind it is
//! an acknowledged commit that no vote has.

use std::collections::{BTreeMap, BTreeSet};

use pgherd_core::observation::Copy;
use pgherd_core::record::Position;
use pgherd_core::types::{Incarnation, Lsn, Term, Timeline};
use serde::{Deserialize, Serialize};

use crate::breakage::{Broken, broken};
use crate::document::{self, Damage, Document, ReadError, WriteError};
use crate::format::Repository;
use crate::name::{Kind, Name, Place};
use crate::store::{Failure, Put, StoreError};

mod end;

pub use end::{Backups, Reached, reached};

/// No term comes behind it: what was sealed so tells nothing any more, ever.
pub const LAST: Term = Term(u64::MAX);

/// Nobody tells that WAL is durable for a term before this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seal {
    incarnation: Incarnation,
    term: Term,
}

impl Document for Seal {
    const KIND: &'static str = "seal";

    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

/// From when this is there, WAL of the timeline is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Adopted {
    incarnation: Incarnation,
    timeline: Timeline,
    /// The one that the timeline was reserved for.
    term: Term,
}

impl Document for Adopted {
    const KIND: &'static str = "adopted";

    fn validate(&self) -> Result<(), String> {
        if self.timeline.0 == 0 { Err("timeline 0".to_owned()) } else { Ok(()) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum VoterError {
    #[error("\"{object}\" in {place} is there and was not listed, so more may be missing in the listing")]
    NotListed { object: Name, place: String },
    #[error(
        "WAL of timeline {timeline} was put into {place} under term {found}, and the herd's record has it under term {wanted}"
    )]
    OtherTerm { timeline: Timeline, place: String, found: Term, wanted: Term },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Tombstone(#[from] crate::tombstone::TombstoneError),
    #[error(transparent)]
    Segment(#[from] crate::wal::SegmentError),
}

impl VoterError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            VoterError::NotListed { .. } => {
                Some("see whether the disk is mounted, and whether this store lists what was just put")
            }
            VoterError::OtherTerm { .. } => {
                Some("two herds must not use one repository for one cluster; give one of them another place")
            }
            VoterError::Store(error) => error.hint(),
            VoterError::Read(_)
            | VoterError::Write(_)
            | VoterError::Tombstone(_)
            | VoterError::Segment(_) => None,
        }
    }
}

/// What was found behind a seal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// None: there is no base backup that WAL leads on from.
    pub copy: Option<Copy>,
    /// From where on there is WAL without a hole up to the copy's end.
    pub from: Lsn,
    pub adopted: BTreeMap<Timeline, Term>,
}

/// The repository in one incarnation.
#[derive(Clone, Debug)]
pub struct Voter {
    repository: Repository,
    place: Place,
    incarnation: Incarnation,
}

impl Voter {
    pub fn new(repository: &Repository, place: Place, incarnation: Incarnation) -> Voter {
        Voter { repository: repository.clone(), place, incarnation }
    }

    /// Puts a seal. One that is there says the same, whoever put it.
    pub async fn seal(&self, term: Term) -> Result<(), VoterError> {
        let seal = Seal { incarnation: self.incarnation, term };
        self.put(&self.place.seal(self.incarnation, term), &seal).await.map(|_| ())
    }

    /// Notes under which term WAL of a timeline is put, before any of it is.
    pub async fn adopt(&self, timeline: Timeline, term: Term) -> Result<(), VoterError> {
        let name = self.place.adopted(self.incarnation, timeline);
        let adopted = Adopted { incarnation: self.incarnation, timeline, term };
        if self.put(&name, &adopted).await? {
            return Ok(());
        }
        let found = self.read_adopted(&name).await?.term;
        if found == term {
            return Ok(());
        }
        let place = self.repository.store().place().to_owned();
        Err(VoterError::OtherTerm { timeline, place, found, wanted: term })
    }

    /// Whether there is a seal above `term`, of which the asker has put its own before. Only an answer is one: an error says nothing.
    pub async fn is_sealed_above(&self, term: Term) -> Result<bool, VoterError> {
        let own = self.place.seal(self.incarnation, term);
        // From the own one on: names are ordered as terms are.
        let before = term.0.checked_sub(1).map(|before| self.place.seal(self.incarnation, Term(before)));
        let all = self.place.seals_of(self.incarnation);
        let page = self.repository.store().list(&all, before.as_ref(), 2).await?;
        if let Some(above) = page.objects.iter().find(|listed| listed.name > own) {
            self.term_of(&above.name)?;
            return Ok(true);
        }
        match page.objects.iter().any(|listed| listed.name == own) {
            true => Ok(false),
            false => {
                Err(VoterError::NotListed { object: own, place: self.repository.store().place().to_owned() })
            }
        }
    }

    /// Under which term WAL of each timeline was put.
    pub async fn adopted(&self) -> Result<BTreeMap<Timeline, Term>, VoterError> {
        let mut all = BTreeMap::new();
        let listed = self.repository.store().list_all(&self.place.adopted_of(self.incarnation)).await?;
        for listed in listed {
            let adopted = self.read_adopted(&listed.name).await?;
            all.insert(adopted.timeline, adopted.term);
        }
        Ok(all)
    }

    /// Seals it for the election of `term`, and then looks what is there: on the line where `worth` is the highest, the end of the last record that can be
    /// had of a base backup.
    pub async fn seal_and_look(
        &self,
        term: Term,
        worth: impl Fn(&BTreeMap<Timeline, Term>, &Copy) -> Position,
    ) -> Result<Sealed, VoterError> {
        if !broken(Broken::ListingBeforeSeal) {
            self.seal(term).await?;
        }
        let adopted = self.adopted().await?;
        let backups = Backups::read(&self.repository, self.place).await?;
        let furthest = backups.furthest(|copy| worth(&adopted, copy)).await?;
        if broken(Broken::ListingBeforeSeal) {
            self.seal(term).await?;
        }
        // What was listed is of the place where the seal is. That somebody has sealed it above by now is no matter: what is told ends there.
        self.is_sealed_above(term).await?;
        let from = furthest.as_ref().map_or(Lsn::ZERO, |(_, from)| *from);
        Ok(Sealed { copy: furthest.map(|(copy, _)| copy), from, adopted })
    }

    /// Puts an object that is put once; `false`: there is one, which says something else, or the same under another salt.
    async fn put<D: Document>(&self, name: &Name, document: &D) -> Result<bool, VoterError> {
        match document::put(self.repository.store(), name, document, self.repository.protection()).await {
            Ok(Put::Created | Put::Same) => Ok(true),
            Err(WriteError::Store(error)) if error.failure == Failure::Present => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn read_adopted(&self, name: &Name) -> Result<Adopted, VoterError> {
        let (store, protection) = (self.repository.store(), self.repository.protection());
        let adopted = document::read::<Adopted>(store, name, protection).await?;
        match self.place.adopted(self.incarnation, adopted.timeline) == *name {
            true => Ok(adopted),
            false => Err(self.other(name)),
        }
    }

    fn term_of(&self, name: &Name) -> Result<Term, VoterError> {
        let term = name.last().parse().map(Term).ok();
        let term = term.filter(|term| self.place.seal(self.incarnation, *term) == *name);
        term.ok_or_else(|| self.other(name))
    }

    fn other(&self, name: &Name) -> VoterError {
        let damage = Damage::OtherObject { wanted: name.to_string() };
        ReadError::damaged(self.repository.store(), name, damage).into()
    }
}

/// Every incarnation that has left something there. A new one has to be above all of them: their seals are there for ever.
pub async fn incarnations(
    repository: &Repository,
    place: Place,
) -> Result<BTreeSet<Incarnation>, VoterError> {
    let all = place.all(Kind::Voters);
    let mut found = BTreeSet::new();
    for listed in repository.store().list_all(&all).await? {
        let number = listed.name.as_str().strip_prefix(&all).and_then(|rest| rest.split('/').next());
        let number = number.and_then(|number| number.parse().ok()).map(Incarnation).ok_or_else(|| {
            let what = "it has no name of what a voter leaves".to_owned();
            ReadError::damaged(repository.store(), &listed.name, Damage::Malformed { what })
        })?;
        found.insert(number);
    }
    Ok(found)
}

/// Whether the repository is a member of a rule, as far as it can be told from what is there: it was one, and its last incarnation was not sealed for
/// good.
pub(crate) async fn is_member(repository: &Repository, place: Place) -> Result<bool, VoterError> {
    let Some(newest) = incarnations(repository, place).await?.last().copied() else { return Ok(false) };
    match repository.store().head(&place.seal(newest, LAST)).await {
        Ok(_) => Ok(false),
        Err(error) if error.is_absent() => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
