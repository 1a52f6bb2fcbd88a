//! What one call between two agents costs: it is made several times a second by every agent to every other.
//!
//! `cargo test -p pgherd-agent --test http -- --ignored --nocapture round_trip`

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::herd::{Herd, Server};

const CALLS: u32 = 5000;

/// Client and server together.
const GOAL_US: u128 = 300;

fn thread_cpu() -> Duration {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(spent.tv_sec).unwrap(), u32::try_from(spent.tv_nsec).unwrap())
}

/// Each side on a thread of its own, so that what the thread's clock says is what the side costs.
#[test]
#[ignore = "a measurement: its numbers mean something on a quiet machine only"]
fn round_trip_cost() {
    let herd = Herd::new();
    let (own, other) = (herd.node("a"), herd.node("b"));
    let (ready, address) = std::sync::mpsc::channel();
    let (done, wait) = tokio::sync::oneshot::channel::<()>();
    let serving = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Server::start_as(&own).await;
            ready.send(server.address).unwrap();
            let before = thread_cpu();
            drop(wait.await);
            thread_cpu() - before
        })
    });
    let address = address.recv().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (spent, mut times) = runtime.block_on(async {
        let tls = std::sync::Arc::new(other.client_tls().unwrap());
        let client = pgherd_api::Client::tls(address.to_string(), Some("a"), tls);
        let body = bytes::Bytes::from(format!("\"{}\"", "x".repeat(1000)));
        client.peer_report(body.clone()).await.unwrap();
        let before = thread_cpu();
        let mut times = Vec::new();
        for _ in 0..CALLS {
            let begin = Instant::now();
            client.peer_report(body.clone()).await.unwrap();
            times.push(begin.elapsed());
        }
        (thread_cpu() - before, times)
    });
    done.send(()).unwrap();
    let served = serving.join().unwrap();
    times.sort();
    let at = |percent: usize| times[times.len() * percent / 100].as_micros();
    let each = |total: Duration| total.as_micros() / u128::from(CALLS);
    println!(
        "round trip {} us (p50), {} us (p99); CPU a call: client {} us, server {} us",
        at(50),
        at(99),
        each(spent),
        each(served)
    );
    assert!(each(spent) + each(served) < GOAL_US);
}
