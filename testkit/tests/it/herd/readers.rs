//! Clients that read from standbys while the primary changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use pgherd_testkit::Session;
use pgherd_testkit::connection::Answer;

use super::*;

/// One session that asks a node without end whether it is a standby, and what it has.
struct Reader {
    node: String,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Read>,
}

/// What a reader has met.
struct Read {
    answers: usize,
    longest: Duration,
    /// When the session was cut, if it was.
    cut_at: Option<Instant>,
    saw_a_primary: bool,
}

impl Reader {
    fn start(herd: &Herd, node: &str) -> Reader {
        let session = herd.session(node);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || read(session, &stopped));
        Reader { node: node.to_owned(), stop, thread }
    }

    fn stop(self) -> (String, Read) {
        self.stop.store(true, Ordering::Relaxed);
        (self.node, self.thread.join().expect("a reader does not panic"))
    }
}

fn read(mut session: Session, stop: &AtomicBool) -> Read {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut read = Read { answers: 0, longest: Duration::ZERO, cut_at: None, saw_a_primary: false };
    while !stop.load(Ordering::Relaxed) {
        let asked_at = Instant::now();
        match session.ask("SELECT pg_is_in_recovery(), count(*) FROM register", PATIENCE) {
            Answer::Done(rows) => {
                read.answers += 1;
                read.longest = read.longest.max(asked_at.elapsed());
                read.saw_a_primary |= rows[0][0].as_deref() == Some("f");
            }
            Answer::Refused(_) | Answer::Unknown(_) => {
                read.cut_at = Some(Instant::now());
                return read;
            }
        }
        // sleep: a client's pace; without one it would take a core from what is measured.
        std::thread::sleep(Duration::from_millis(5));
    }
    read
}

#[test]
fn a_failover_cuts_the_readers_of_the_winner_before_it_leads_and_no_others() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let before = herd.status().unwrap();
    let workload = herd.start_workload();
    let readers = ["b", "c"].map(|node| Reader::start(&herd, node));
    let killed_at = herd.kill_postmaster("a");
    let after = fails_over(&herd, &workload, &before, killed_at, AT_ONCE);
    let winner = primary(&after).expect("a term that serves clients has a primary").to_owned();
    herd.wait_until_whole(WHOLE);
    let history = workload.history();
    let led_at = history.acknowledged().filter(|insert| *insert.node == *winner);
    let led_at = led_at.map(|insert| insert.ended_at).min().expect("the winner took writes");
    for (node, read) in readers.map(Reader::stop) {
        assert!(read.answers > 0, "{node} was never read");
        assert!(!read.saw_a_primary, "a session from before the failover saw {node} as a primary");
        match read.cut_at {
            Some(cut_at) if node == winner => assert!(cut_at <= led_at, "{node} led before it cut readers"),
            Some(_) => panic!("{node} did not win, and cut its readers"),
            None if node == winner => panic!("{node} leads, and a session of its time as a standby lives"),
            None => {
                assert!(read.longest < AT_ONCE * SLACK, "{node} kept a reader waiting {:?}", read.longest);
            }
        }
    }
    all_is_well(&herd, workload);
}
