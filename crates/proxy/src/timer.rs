//! Waiting for a time.
//!
//! A worker's runtime has no timers: with them it would look at the clock, and at what waits for it, around each wait for its
//! sockets, though most often nothing waits for a time. What is to wait on a worker waits at its proxy's keeper, a thread with
//! a runtime that has them, and is woken from there. Anywhere else these are tokio's own functions.
//!
//! Leaves out times that are compared and not waited for. Hazard: tokio's own functions panic on a worker, so that `tidy` lets
//! nobody else in this crate call them.

use std::cell::OnceCell;
use std::time::Duration;

use tokio::runtime::Handle;
pub(crate) use tokio::time::Sleep;
use tokio::time::{Instant, Timeout};

thread_local! {
    static KEEPER: OnceCell<Handle> = const { OnceCell::new() };
}

/// What waits on this thread waits there from now on. The keeper must be there for as long as anything does.
pub(crate) fn keep_at(keeper: &Handle) {
    KEEPER.with(|known| {
        known.get_or_init(|| keeper.clone());
    });
}

fn at_keeper<T>(begin: impl FnOnce() -> T) -> T {
    KEEPER.with(|keeper| {
        // What is begun belongs to the runtime that is entered then, wherever it is waited for.
        let _entered = keeper.get().map(Handle::enter);
        begin()
    })
}

pub(crate) fn sleep(duration: Duration) -> Sleep {
    at_keeper(|| tokio::time::sleep(duration))
}

pub(crate) fn sleep_until(at: Instant) -> Sleep {
    at_keeper(|| tokio::time::sleep_until(at))
}

pub(crate) fn timeout<F: Future>(within: Duration, future: F) -> Timeout<F> {
    at_keeper(|| tokio::time::timeout(within, future))
}

pub(crate) fn timeout_at<F: Future>(until: Instant, future: F) -> Timeout<F> {
    at_keeper(|| tokio::time::timeout_at(until, future))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::runtime::Builder;
    use tokio::sync::oneshot;

    use super::*;

    /// Longer than anything takes that is not to be waited for.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_waits_on_a_thread_without_timers_is_woken_by_its_keeper() {
        let keeper = Builder::new_current_thread().enable_time().build().unwrap();
        let handle = keeper.handle().clone();
        let (done, is_done) = oneshot::channel::<()>();
        let worker = std::thread::spawn(move || {
            keep_at(&handle);
            let runtime = Builder::new_current_thread().enable_io().build().unwrap();
            let waited = runtime.block_on(async {
                let began = Instant::now();
                let brief = Duration::from_millis(20);
                let late = timeout(brief, pending::<()>()).await.is_err();
                let as_late = timeout_at(Instant::now() + brief, pending::<()>()).await.is_err();
                // A task of the worker's own, so that waking is what makes it go on.
                let in_time = tokio::spawn(timeout(LONG, async { 7 })).await.unwrap();
                (late, as_late, in_time.ok(), began.elapsed() >= 2 * brief)
            });
            drop(done);
            waited
        });
        keeper.block_on(is_done).unwrap_err();
        assert_eq!(worker.join().unwrap(), (true, true, Some(7), true));
    }

    #[tokio::test]
    async fn elsewhere_nobody_is_needed_for_it() {
        assert!(timeout(Duration::from_millis(1), pending::<()>()).await.is_err());
        assert!(timeout(LONG, async {}).await.is_ok());
    }
}
