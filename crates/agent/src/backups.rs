//! Base backups: taken from a server into a repository ([`take`] where its directory is here, `streamed` where it sends it), and restored into a directory
//! ([`restore`]). [`create`] and [`recover`] are what commands and agents call for the two; [`catalog`] says what is there, [`keeping`] what
//! of it stays, [`check`] and [`verify`] whether it can be relied upon; `member` makes a node of a herd from one, and [`foreign`]
//! restores what pgBackRest or Barman has kept. [`scratch`] is a server of an
//! earlier moment for a while: [`tables`] fetches tables from one, and a [`drill`] shows that everything can be restored. Files go through several
//! readers beside each other, each on a thread
//! of its own: the agent's runtime proves a lease, and must not wait for a compressor.
//!
//! Leaves out: which backup, when and from which node, which is decided. Hazard: takes disk, network and processor from
//! PostgreSQL; so limits hold for all readers together (`throttling` finds out what clients leave), and what nobody waits for any more
//! stops within a piece.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub mod catalog;
pub mod check;
pub mod create;
pub mod drill;
pub(crate) mod drilling;
pub(crate) mod duty;
mod finding;
pub mod foreign;
pub mod keeping;
pub(crate) mod member;
pub mod recover;
pub mod restore;
pub mod scratch;
mod storing;
mod streamed;
pub mod tables;
pub mod take;
pub mod target;
mod throttling;
pub mod verify;
pub mod voted;

/// Readers at most. Each holds a pack and some pieces in memory, some 100 MB.
pub const MAX_READERS: usize = 16;
/// Read and written at a time: whole groups of change hashes, and a frame of a full backup.
const PIECE_BYTES: usize = 1024 * 1024;
/// Files that are listed and wait for a reader.
const QUEUE: usize = 64;
/// Between two reports of progress.
const REPORT: Duration = Duration::from_millis(500);

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub done_bytes: u64,
    /// 0 while it is not known.
    pub total_bytes: u64,
    pub done_files: u64,
    /// What is being done, where that is more than one thing.
    pub step: Option<&'static str>,
    /// To how many bytes a second a backup is held back for the server's clients at this moment, and for how long it was so far.
    pub held_to: Option<u64>,
    pub held_back: Duration,
}

/// What all readers have done so far.
#[derive(Debug, Default)]
struct Done {
    bytes: AtomicU64,
    files: AtomicU64,
    total_bytes: AtomicU64,
}

impl Done {
    fn progress(&self) -> Progress {
        Progress {
            done_bytes: self.bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            done_files: self.files.load(Ordering::Relaxed),
            ..Progress::default()
        }
    }
}

/// Tells readers that nobody waits for them any more.
#[derive(Clone, Debug, Default)]
struct Stop(Arc<AtomicBool>);

impl Stop {
    fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Says so when it is dropped.
    fn when_dropped(&self) -> StopWhenDropped {
        StopWhenDropped(self.clone())
    }
}

#[derive(Debug)]
#[must_use]
struct StopWhenDropped(Stop);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Limits of bytes a second that all readers share: one that was asked for, and one that the server's clients leave.
#[derive(Debug)]
struct Throttle {
    bytes_per_second: Option<NonZeroU64>,
    /// 0: no limit.
    pace: AtomicU64,
    held_back_ms: AtomicU64,
    has_begun: AtomicBool,
    passed: AtomicU64,
    /// 0 while it is not known.
    total_bytes: AtomicU64,
    /// When the next piece may pass.
    next: Mutex<Instant>,
}

impl Throttle {
    fn new(bytes_per_second: Option<NonZeroU64>) -> Throttle {
        Throttle {
            bytes_per_second,
            pace: AtomicU64::default(),
            held_back_ms: AtomicU64::default(),
            has_begun: AtomicBool::default(),
            passed: AtomicU64::default(),
            total_bytes: AtomicU64::default(),
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until so many bytes may pass.
    async fn pass(&self, bytes: usize) {
        self.passed.fetch_add(bytes as u64, Ordering::Relaxed);
        let Some(limit) = self.limit() else { return };
        let at = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let at = (*next).max(Instant::now());
            *next = at + Duration::from_secs_f64(bytes as f64 / limit.get() as f64);
            at
        };
        tokio::time::sleep_until(at.into()).await;
    }

    /// The lower one of the two.
    fn limit(&self) -> Option<NonZeroU64> {
        let pace = NonZeroU64::new(self.pace.load(Ordering::Relaxed));
        [self.bytes_per_second, pace].into_iter().flatten().min()
    }

    /// From now on bytes pass.
    fn begin(&self) {
        self.has_begun.store(true, Ordering::Relaxed);
    }

    /// What has passed, if it has begun, and what there is.
    fn passed(&self) -> (Option<u64>, u64) {
        let passed = self.passed.load(Ordering::Relaxed);
        let has_begun = self.has_begun.load(Ordering::Relaxed);
        (has_begun.then_some(passed), self.total_bytes.load(Ordering::Relaxed))
    }

    /// Holds back to so many bytes a second; none: not any more.
    fn hold(&self, pace: Option<u64>, held_back: Duration) {
        self.pace.store(pace.unwrap_or(0), Ordering::Relaxed);
        self.held_back_ms.store(held_back.as_millis() as u64, Ordering::Relaxed);
    }

    fn held_to(&self) -> Option<u64> {
        Some(self.pace.load(Ordering::Relaxed)).filter(|pace| *pace > 0)
    }

    fn held_back(&self) -> Duration {
        Duration::from_millis(self.held_back_ms.load(Ordering::Relaxed))
    }
}

/// A thread of its own for work that takes processor and disk.
fn on_a_thread<T: Send + 'static, F: Future<Output = T>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || runtime.block_on(work()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_readers_together_keep_to_a_limit() {
        let throttle = Arc::new(Throttle::new(NonZeroU64::new(10_000_000)));
        let began = Instant::now();
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let throttle = Arc::clone(&throttle);
                tokio::spawn(async move {
                    for _ in 0..10 {
                        throttle.pass(100_000).await;
                    }
                })
            })
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        // 4 MB at 10 MB/s, less the last piece, for which nobody waits.
        assert!(began.elapsed() >= Duration::from_millis(390), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn the_lower_one_of_two_limits_holds_and_each_can_come_and_go() {
        let throttle = Throttle::new(NonZeroU64::new(1_000_000));
        let limit = |throttle: &Throttle| throttle.limit().map(NonZeroU64::get);
        throttle.hold(Some(100_000), Duration::from_secs(3));
        assert_eq!(limit(&throttle), Some(100_000), "held back");
        assert_eq!((throttle.held_to(), throttle.held_back()), (Some(100_000), Duration::from_secs(3)));
        throttle.hold(Some(5_000_000), Duration::from_secs(4));
        assert_eq!(limit(&throttle), Some(1_000_000), "clients leave more than was asked for");
        throttle.hold(None, Duration::from_secs(4));
        assert_eq!((limit(&throttle), throttle.held_to()), (Some(1_000_000), None));
        let free = Throttle::new(None);
        assert_eq!(limit(&free), None);
        free.pass(3_000_000).await;
        assert_eq!(free.passed(), (None, 0), "the copy has not begun");
        free.begin();
        assert_eq!(free.passed(), (Some(3_000_000), 0));
    }
}
