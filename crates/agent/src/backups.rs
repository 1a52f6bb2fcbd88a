//! Base backups: taken from a server into a repository ([`take`] where its directory is here, `streamed` where it sends it), and restored into a directory
//! ([`restore`]). [`create`] and [`recover`] are what commands and agents call for the two; [`catalog`] says what is there, [`keeping`] what
//! of it stays, [`check`] and [`verify`] whether it can be relied upon; `member` makes a node of a herd from one, and [`foreign`]
//! restores what pgBackRest or Barman has kept. [`scratch`] is a server of an
//! earlier moment for a while: [`tables`] fetches tables from one, and a [`drill`] shows that everything can be restored. Files go through several
//! readers beside each other, each on a thread
//! of its own: the agent's runtime proves a lease, and must not wait for a compressor.
//!
//! Leaves out: which backup, when and from which node, which is decided. Hazard: takes disk, network and processor from
//! PostgreSQL; so a limit holds for all readers together, and what nobody waits for any more stops within a piece.

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
pub mod verify;

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
            step: None,
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

/// A limit of bytes a second that all readers share.
#[derive(Debug)]
struct Throttle {
    bytes_per_second: Option<NonZeroU64>,
    /// When the next piece may pass.
    next: Mutex<Instant>,
}

impl Throttle {
    fn new(bytes_per_second: Option<NonZeroU64>) -> Throttle {
        Throttle { bytes_per_second, next: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may pass.
    async fn pass(&self, bytes: usize) {
        let Some(limit) = self.bytes_per_second else { return };
        let at = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let at = (*next).max(Instant::now());
            *next = at + Duration::from_secs_f64(bytes as f64 / limit.get() as f64);
            at
        };
        tokio::time::sleep_until(at.into()).await;
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
}
