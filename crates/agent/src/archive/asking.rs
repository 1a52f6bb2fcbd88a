//! When the members are asked for what the archive lacks, and what came of it.
//!
//! A round is made beside the stream as soon as something is found to be missing that nobody was asked for yet, and again every few minutes: a former primary may
//! have come back with it.
//!
//! Leaves out: the round itself ([`super::holes`]). Hazard: a backup is due where nobody has what is missing; so a round has to end, however many do
//! not answer.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_backup::wal::{WalError, Wanted};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;

use super::holes::{self, Holes, Member, Round};
use crate::causes::on_one_line;
use crate::gossip::FilledShow;

/// Who did not have it may have it later.
const AGAIN_EVERY: Duration = Duration::from_secs(300);

/// What was asked for, and is being asked for.
#[derive(Default)]
pub(super) struct Asking {
    task: Option<JoinHandle<Result<Round, WalError>>>,
    /// What the last round has left.
    left: BTreeSet<Wanted>,
    ended: Option<Instant>,
    said: Option<String>,
    filled: Option<FilledShow>,
}

/// What has come of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The archive has something that it had not.
    Filled,
    Nothing,
    /// The archive could not be written to.
    Failed,
}

impl Asking {
    /// The round that has ended since, if one has.
    pub(super) async fn ended(&mut self) -> Option<Ended> {
        let task = self.task.take_if(|task| task.is_finished())?;
        Some(self.settle(task.await))
    }

    fn settle(&mut self, outcome: Result<Result<Round, WalError>, JoinError>) -> Ended {
        self.ended = Some(Instant::now());
        let round = match outcome {
            Ok(Ok(round)) => round,
            Ok(Err(error)) => {
                tracing::warn!(
                    error = on_one_line(&error),
                    "holes of the archive cannot be filled at the moment"
                );
                return Ended::Failed;
            }
            Err(error) => {
                tracing::error!(%error, "filling holes of the archive has ended by itself");
                return Ended::Failed;
            }
        };
        let said = round.said.iter().map(|(name, why)| format!("{name}: {why}"));
        let said = Some(said.collect::<Vec<_>>().join("; ")).filter(|_| !round.left.is_empty());
        let left: BTreeSet<Wanted> = round.left.iter().copied().collect();
        if let Some(said) = said.as_ref().filter(|_| left != self.left) {
            tracing::warn!(files = left.len(), said, "nobody gives WAL that the archive lacks");
        }
        (self.left, self.said) = (left, said);
        let (Some((first, _)), Some((last, _))) = (round.filled.first(), round.filled.last()) else {
            return Ended::Nothing;
        };
        let from: Vec<String> = round.givers().into_iter().map(str::to_owned).collect();
        let files = round.filled.len();
        tracing::info!(files, first, last, from = from.join(", "), "a hole of the archive was filled");
        let unix_seconds = Timestamp::now().as_second();
        self.filled =
            Some(FilledShow { unix_seconds, files: u32::try_from(files).unwrap_or(u32::MAX), from });
        Ended::Filled
    }

    /// Begins a round, if there is something to ask for that was not asked for lately.
    pub(super) fn begin(
        &mut self,
        holes: &mut Option<Holes>,
        members: impl FnOnce() -> Vec<Box<dyn Member>>,
    ) {
        let rests = self.ended.is_some_and(|ended| ended.elapsed() < AGAIN_EVERY);
        let is_wanted =
            |holes: &mut Holes| !(holes.missing.is_empty() || rests && self.knows(&holes.missing));
        if self.task.is_none()
            && let Some(holes) = holes.take_if(is_wanted)
        {
            let members = members();
            self.task = Some(tokio::spawn(async move { holes::fill(holes, &members).await }));
        }
    }

    /// Ends a round that is under way. What it has archived stays.
    pub(super) fn give_up(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    /// Nothing of it that nobody was asked for.
    pub(super) fn knows(&self, missing: &[Wanted]) -> bool {
        missing.iter().all(|wanted| self.left.contains(wanted))
    }

    /// What was answered by those who do not have it; nothing if all was given.
    pub(super) fn said(&self) -> Option<&String> {
        self.said.as_ref()
    }

    pub(super) fn filled(&self) -> Option<&FilledShow> {
        self.filled.as_ref()
    }
}

impl Drop for Asking {
    /// Whoever owns the archive next asks again.
    fn drop(&mut self) {
        self.give_up();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use pgherd_backup::format::Repository;
    use pgherd_backup::store::Store;
    use pgherd_backup::wal::{Archive, History, Inventory, Segments};
    use pgherd_core::types::{SystemId, Timeline};

    use super::super::holes::{NotGiven, Want};
    use super::*;

    /// Has the history of timeline 2, and nothing else.
    struct One;

    impl Member for One {
        fn name(&self) -> &str {
            "b"
        }

        fn ask<'a>(&'a self, want: &'a Want) -> BoxFuture<'a, Result<Bytes, NotGiven>> {
            let given = match want.wanted {
                Wanted::History(Timeline(2)) => Ok(Bytes::from("1\t0/8\tno reason\n")),
                _ => Err(NotGiven::Absent("it has none".to_owned())),
            };
            std::future::ready(given).boxed()
        }
    }

    async fn round(asking: &mut Asking, holes: &mut Option<Holes>) -> Option<Ended> {
        asking.begin(holes, || vec![Box::new(One)]);
        while asking.task.as_ref().is_some_and(|task| !task.is_finished()) {
            tokio::task::yield_now().await;
        }
        asking.ended().await
    }

    #[tokio::test]
    async fn a_round_is_made_for_what_nobody_was_asked_for_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let repository = Repository::create(Store::directory(dir.path()), None, now).await.unwrap();
        let segments = Segments::new(1 << 20).unwrap();
        let line = b"1\t0/8\tno reason\n2\t0/9\tno reason\n3\t0/A\tno reason\n";
        let holes = |timelines: &[u32]| {
            Some(Holes {
                archive: Archive::new(&repository, SystemId(42), segments),
                inventory: Inventory::new(segments),
                history: History::parse(Timeline(4), line).unwrap(),
                missing: timelines.iter().map(|timeline| Wanted::History(Timeline(*timeline))).collect(),
            })
        };
        let wanted = |timeline| Wanted::History(Timeline(timeline));
        let mut asking = Asking::default();
        assert_eq!(round(&mut asking, &mut holes(&[])).await, None, "nothing is missing");
        assert!(asking.knows(&[]) && !asking.knows(&[wanted(3)]));

        let mut both = holes(&[2, 3]);
        assert_eq!(round(&mut asking, &mut both).await, Some(Ended::Filled));
        assert!(both.is_none(), "it is looked again before the next one");
        assert!(asking.knows(&[wanted(3)]));
        assert_eq!(asking.said().unwrap(), "b: it has none");
        let filled = asking.filled().unwrap();
        assert_eq!((filled.files, filled.from.as_slice()), (1, &["b".to_owned()][..]));
        assert_eq!(round(&mut asking, &mut holes(&[3])).await, None, "nobody has it");
        asking.ended = Instant::now().checked_sub(AGAIN_EVERY);
        assert_eq!(
            round(&mut asking, &mut holes(&[3])).await,
            Some(Ended::Nothing),
            "somebody may have come back"
        );

        asking.begin(&mut holes(&[2]), || vec![Box::new(One)]);
        asking.give_up();
        assert_eq!(asking.ended().await, None);
        std::fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(round(&mut asking, &mut holes(&[2])).await, Some(Ended::Failed));
        assert!(asking.knows(&[wanted(3)]) && !asking.knows(&[wanted(2)]), "nobody knows");
    }
}
