//! What a repository has up to the end that it voted with: for a copy that lacks some of it, and for one that is made of nothing else.
//!
//! It is read as the vote was: along the vote's line of history, up to the end of the last record, whatever lies behind that or behind a hole.
//! What the last segment has behind it is zeros, as PostgreSQL leaves them. PostgreSQL gets no `restore_command`: it would fetch what
//! nobody has voted with.
//!
//! Leaves out: what the vote is worth, and who leads (`core`); the files of a server (`pgherd_postgres`). Hazard: WAL that is not that of the
//! vote. So whatever is missing is a failure, and where it overlaps with what a copy has both have to be the same.

use std::ops::RangeInclusive;

use futures_util::{StreamExt, TryStreamExt};
use pgherd_backup::name::Place;
use pgherd_backup::voter::{Backups, VoterError};
use pgherd_backup::wal::{Archive, History, Inventory, Segment, Segments};
use pgherd_core::record::Record;
use pgherd_core::spec::RepositorySpec;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::Instance;
use pgherd_postgres::clone::Filling;
use pgherd_postgres::wal::{self, history, history_name};
use tokio::sync::watch;

use super::Progress;
use super::member::{self, AT_ONCE, Filled, Found, MemberError, STALL};

/// The WAL of a vote.
#[derive(Clone, Debug)]
pub struct Voted {
    archive: Archive,
    inventory: Inventory,
    /// It ends on the timeline that the last record is of.
    history: History,
    until: Lsn,
}

/// A file for `pg_wal`.
type File = (String, Vec<u8>);

impl Voted {
    /// Looks what there is of a line up to `until`. Where nobody knows the line's last timeline, its vote counts up to the fork only.
    pub async fn read(archive: Archive, timeline: Timeline, until: Lsn) -> Result<Voted, MemberError> {
        let inventory = archive.inventory().await?;
        let of = |timeline| inventory.history(timeline).ok_or(MemberError::NoBackup(timeline));
        let history = of(of(timeline)?.timeline_at(last_byte(until)))?.clone();
        Ok(Voted { archive, inventory, history, until })
    }

    /// That of the last record.
    pub fn timeline(&self) -> Timeline {
        self.history.timeline()
    }

    pub(crate) fn until(&self) -> Lsn {
        self.until
    }

    /// The segments from the one on in which somebody begins.
    fn numbers(&self, from: Lsn) -> RangeInclusive<u64> {
        let segments = self.archive.segments();
        segments.number(from)..=segments.number(last_byte(self.until))
    }

    /// Puts what a sealed copy lacks, that ends on a timeline at a position, beside its own WAL.
    pub async fn bring(&self, copy: &Instance, (timeline, end): (Timeline, Lsn)) -> Result<(), MemberError> {
        for (name, content) in self.histories(timeline).await? {
            beside(copy, move |copy| wal::put_beside(copy, &name, &content)).await?;
        }
        let segments = self.archive.segments();
        for number in self.numbers(end) {
            let fetched = tokio::time::timeout(STALL, self.segment(number)).await;
            let (name, content) = fetched.unwrap_or(Err(MemberError::Stalled(STALL)))?;
            let own = Segment { timeline, number };
            if number == segments.number(end) {
                let bytes = usize::try_from(end.bytes_since(segments.start(own))).unwrap_or(usize::MAX);
                let file = segments.file_name(own);
                let there = beside(copy, move |copy| wal::beginning(copy, &file, bytes)).await?;
                if there.is_some_and(|there| !content.starts_with(&there)) {
                    return Err(MemberError::Differs { file: segments.file_name(own) });
                }
            }
            beside(copy, move |copy| wal::put_beside(copy, &name, &content)).await?;
        }
        Ok(())
    }

    /// A segment under the name that a recovery along the line looks for.
    async fn segment(&self, number: u64) -> Result<File, MemberError> {
        let segments = self.archive.segments();
        let (whole, start) = (segments.bytes() as usize, segments.position(number));
        let end = segments.position(number + 1).min(self.until);
        let named = Segment { timeline: self.history.timeline_at(last_byte(end)), number };
        let mut content = match self.inventory.whole_on(&self.history, number) {
            Some(there) => self.archive.segment(there).await?.to_vec(),
            None => self.archive.beginning_on(&self.history, number).await?,
        };
        let kept = usize::try_from(end.bytes_since(start)).unwrap_or(usize::MAX);
        if content.len() < kept {
            return Err(MemberError::Missing { end: self.until, file: segments.file_name(named) });
        }
        content.truncate(kept);
        content.resize(whole, 0);
        Ok((segments.file_name(named), content))
    }

    /// The histories of the line behind a timeline. Numbers between that no timeline of the line has are reserved, as where they were promoted past.
    async fn histories(&self, behind: Timeline) -> Result<Vec<File>, MemberError> {
        let on_the_way = |number| {
            number == self.timeline() || self.history.forks().iter().any(|fork| fork.timeline == number)
        };
        let mut files = Vec::new();
        for number in (behind.0 + 1).max(2)..=self.timeline().0 {
            let number = Timeline(number);
            let content = match on_the_way(number) {
                true => self.archive.history_file(number).await?.1.to_vec(),
                false => history::placeholder(number).into_bytes(),
            };
            files.push((history_name(number), content));
        }
        Ok(files)
    }
}

/// That of the repository which was agreed on.
pub(crate) async fn open(
    repository: &RepositorySpec,
    record: &Record,
    segment_bytes: u32,
    (timeline, until): (Timeline, Lsn),
) -> Result<Voted, MemberError> {
    let system = record.system.ok_or(MemberError::NotAgreed)?;
    member::in_time(async {
        let repository = member::agreed(repository, record).await?;
        let segments = Segments::new(segment_bytes).map_err(VoterError::from)?;
        Voted::read(Archive::new(&repository, system, segments), timeline, until).await
    })
    .await
}

/// Fills a directory with a base backup and the WAL behind it up to where the repository's vote ends.
pub async fn fill(
    repository: &RepositorySpec,
    record: &Record,
    (timeline, until): (Timeline, Lsn),
    filling: &Filling,
    progress: &watch::Sender<Progress>,
) -> Result<Filled, MemberError> {
    let (found, voted) = member::in_time(async {
        let (repository, catalog) = member::open(repository, record).await?;
        let archive = catalog.archive()?.ok_or(MemberError::NoBackup(timeline))?;
        let voted = Voted::read(archive.clone(), timeline, until).await?;
        let timeline = voted.timeline();
        let backups = Backups::read(&repository, Place(archive.system())).await?;
        let leading = backups.leading_to(&archive, &voted.inventory, &voted.history, until).await?;
        let id = leading.ok_or(MemberError::NoBackup(timeline))?.id;
        let manifest = catalog.manifests().find(|manifest| manifest.id == id);
        let manifest = manifest.ok_or(MemberError::NoBackup(timeline))?.clone();
        // What is agreed of timelines is said twice, and has to be the same.
        let left = record.left(manifest.timeline, timeline);
        if record.line(timeline).is_none() || left.is_some_and(|left| left < manifest.stop) {
            return Err(MemberError::NotOurs { end: until, timeline });
        }
        let wal_bytes = voted.numbers(manifest.start).count() as u64 * u64::from(archive.segments().bytes());
        member::room(filling, &manifest, wal_bytes)?;
        Ok((Found { repository, archive, manifest, timeline }, voted))
    })
    .await?;
    tracing::info!(backup = %found.manifest.id, %until, %timeline, "making a copy from the repository, to lead");
    let work = async {
        let bytes = member::restore(&found, filling, progress).await?;
        for (name, content) in voted.histories(Timeline(1)).await? {
            filling.put_wal(name, content).await?;
        }
        let numbers = voted.numbers(found.manifest.start);
        let segments = numbers.clone().count() as u64;
        progress.send_modify(|progress| {
            progress.total_bytes += segments * u64::from(found.archive.segments().bytes());
        });
        let fetch = |number| {
            let voted = voted.clone();
            async move { voted.segment(number).await }
        };
        let wanted: Vec<_> = numbers.map(fetch).collect();
        let mut files = futures_util::stream::iter(wanted).buffered(AT_ONCE);
        while let Some((name, content)) = files.try_next().await? {
            let bytes = content.len() as u64;
            filling.put_wal(name, content).await?;
            progress.send_modify(|progress| progress.done_bytes += bytes);
        }
        Ok(Filled { backup: found.manifest.id.to_string(), bytes, segments, end: until })
    };
    tokio::select! {
        done = work => done,
        () = member::stalled(progress.subscribe()) => Err(MemberError::Stalled(STALL)),
    }
}

/// Files of a server, on a thread that may wait for them.
async fn beside<T: Send + 'static>(
    copy: &Instance,
    work: impl FnOnce(&Instance) -> Result<T, pgherd_postgres::Error> + Send + 'static,
) -> Result<T, MemberError> {
    let copy = copy.clone();
    match tokio::task::spawn_blocking(move || work(&copy)).await {
        Ok(done) => Ok(done?),
        Err(lost) => std::panic::resume_unwind(lost.into_panic()),
    }
}

fn last_byte(end: Lsn) -> Lsn {
    Lsn(end.0.saturating_sub(1))
}
