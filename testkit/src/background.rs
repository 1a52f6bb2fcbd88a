//! Clients on a thread of their own, until they are told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::connection::single_threaded_runtime;
use crate::net::Host;

/// Ends when it is stopped or dropped.
#[derive(Debug)]
pub(crate) struct Background {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Runs `work` with the network of `host`; it is to end soon after the flag that it is given says so.
    pub(crate) fn start<F: Future<Output = ()>>(
        name: &str,
        host: &Host,
        work: impl FnOnce(Arc<AtomicBool>) -> F + Send + 'static,
    ) -> Background {
        let stop = Arc::new(AtomicBool::new(false));
        let (host, told) = (host.clone(), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                host.move_here();
                single_threaded_runtime().block_on(work(told));
            })
            .expect("one more thread is possible");
        Background { stop, thread: Some(thread) }
    }

    /// Lets it end what is under way. What panicked has seen nothing that is worth anything.
    #[track_caller]
    pub(crate) fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("only stop and drop take it").join();
        assert!(ended.is_ok(), "the clients panicked, and what they saw is worth nothing");
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What fails already must not fail twice.
            let _ended = thread.join();
        }
    }
}
