//! A base backup is held back when it makes the server slow for its clients: what they feel is measured here, `core::throttle` says
//! which pace follows, and the readers keep to it.
//!
//! The server is asked over a session of its own, and the disk is flushed by a thread of its own: neither waits for the other, and what does
//! not come back counts as long as it has been under way. What cannot be measured is not, which is said once, and holds nothing back.
//!
//! Leaves out: what is slow. Hazard: it must never stop a backup, so nothing of it fails one.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgherd_core::throttle::{Floor, Measure, Pacing, Seen, TICK};
use pgherd_core::types::Lsn;
use pgherd_postgres::base_backup::felt::{self, Felt, Reads, WalDisk};
use pgherd_postgres::sql::Session;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::Throttle;

/// Of fewer pages it is chance how long they took.
const ENOUGH_PAGES: u64 = 8;
/// Positions that are remembered, one for each measurement: replay that is further behind than this is far behind.
const MAX_MARKS: usize = 3600;
/// A thread that waits for a disk needs no more.
const STACK_BYTES: usize = 256 * 1024;

/// Ends with this.
#[derive(Debug)]
#[must_use]
pub(super) struct Throttling(tokio::task::JoinHandle<()>);

impl Drop for Throttling {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Begins to measure. What is measured before the copy begins is what is usual.
pub(super) fn begin(
    floor: Floor,
    session: Option<Session>,
    data_dir: PathBuf,
    throttle: Arc<Throttle>,
) -> Throttling {
    let felt = Felts { server: Question::of_server(session), ..Felts::new(Question::of_disk(data_dir)) };
    Throttling(tokio::spawn(hold(floor, felt, throttle)))
}

async fn hold(floor: Floor, mut felt: Felts, throttle: Arc<Throttle>) {
    let began = Instant::now();
    let mut pacing = Pacing::new(floor);
    let mut was_held = false;
    felt.look(began);
    // The first answers are there by then.
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (clients, times) = felt.look(Instant::now());
        let (read_bytes, total_bytes) = throttle.passed();
        let pace = pacing.judge(began.elapsed(), &Seen { clients, times, read_bytes, total_bytes });
        throttle.hold(pace, pacing.held_back());
        let is_held = pacing.is_held();
        if let Some(slow) = pacing.slow().filter(|_| is_held && !was_held) {
            let (what, bytes_per_second) = (slow.what.to_string(), pace);
            let (takes_ms, usually_ms) = (slow.takes.as_millis() as u64, slow.usually.as_millis() as u64);
            tracing::info!(
                what,
                takes_ms,
                usually_ms,
                bytes_per_second,
                "the server has become slow, the backup holds back"
            );
        }
        if was_held && !is_held {
            let seconds = pacing.held_back().as_secs();
            tracing::info!(seconds, "the backup does not hold back any more");
        }
        was_held = is_held;
    }
}

/// Something that is asked again and again, and may not come back.
struct Question<T> {
    ask: Option<mpsc::Sender<Ask<T>>>,
    asked: Option<(Instant, oneshot::Receiver<(Duration, T)>)>,
}

type Ask<T> = oneshot::Sender<(Duration, T)>;

impl Question<Felt> {
    fn of_server(session: Option<Session>) -> Question<Felt> {
        let Some(session) = session else { return Question { ask: None, asked: None } };
        let (ask, mut asked) = mpsc::channel::<Ask<Felt>>(1);
        tokio::spawn(async move {
            while let Some(mut answer) = asked.recv().await {
                let began = Instant::now();
                // Nobody waits for it any more.
                let felt = tokio::select! {
                    felt = felt::ask(&session) => felt,
                    () = answer.closed() => return,
                };
                match felt {
                    Ok(felt) => drop(answer.send((began.elapsed(), felt))),
                    Err(error) => {
                        tracing::warn!(%error, "a backup does not see any more whether the server answers slowly");
                        return;
                    }
                }
            }
        });
        Question { ask: Some(ask), asked: None }
    }
}

impl Question<()> {
    /// A thread that hangs in a flush cannot be ended, and nothing waits for it.
    fn of_disk(data_dir: PathBuf) -> Question<()> {
        let (ask, mut asked) = mpsc::channel::<Ask<()>>(1);
        let mut flushing = move || {
            let mut disk = WalDisk::open(&data_dir)?;
            while let Some(answer) = asked.blocking_recv() {
                let took = disk.flush()?;
                answer.send((took, ())).ok();
            }
            Ok::<_, pgherd_postgres::Error>(())
        };
        let thread = std::thread::Builder::new().name("flush".to_owned()).stack_size(STACK_BYTES);
        let begun = thread.spawn(move || {
            if let Err(error) = flushing() {
                tracing::warn!(%error, "a backup does not see whether flushes of WAL are slow");
            }
        });
        Question { ask: begun.is_ok().then_some(ask), asked: None }
    }
}

impl<T> Question<T> {
    /// What has come since it was asked, or how long it has not; and asks again.
    fn look(&mut self, now: Instant) -> Option<(Duration, Option<T>)> {
        let came = match &mut self.asked {
            None => None,
            Some((began, answer)) => match answer.try_recv() {
                Ok((took, what)) => Some((took, Some(what))),
                Err(oneshot::error::TryRecvError::Empty) => return Some((now.duration_since(*began), None)),
                Err(oneshot::error::TryRecvError::Closed) => {
                    self.ask = None;
                    None
                }
            },
        };
        let (answer, answered) = oneshot::channel();
        let asked = self.ask.as_ref().is_some_and(|ask| ask.try_send(answer).is_ok());
        self.asked = asked.then_some((now, answered));
        came
    }
}

/// All that is measured.
struct Felts {
    server: Question<Felt>,
    disk: Question<()>,
    /// What the server said last, as long as it is asked.
    clients: Option<bool>,
    replay: Replay,
    reads: Option<Reads>,
}

impl Felts {
    fn new(disk: Question<()>) -> Felts {
        let server = Question { ask: None, asked: None };
        Felts { server, disk, clients: None, replay: Replay::default(), reads: None }
    }

    fn look(&mut self, now: Instant) -> (Option<bool>, BTreeMap<Measure, Duration>) {
        let mut times = BTreeMap::new();
        if let Some((took, _)) = self.disk.look(now) {
            times.insert(Measure::Flush, took);
        }
        let Some((took, answer)) = self.server.look(now) else { return (None, times) };
        times.insert(Measure::Answer, took);
        let Some(felt) = answer else { return (self.clients, times) };
        let mut is_written = false;
        if let Some((received, replayed)) = felt.replay {
            is_written = self.replay.has_come(now, received);
            times.insert(Measure::Replay, self.replay.behind(now, replayed));
        }
        times.extend(self.reads(felt.reads).map(|took| (Measure::Read, took)));
        // On a standby, commits of the primary may wait for what it flushes.
        self.clients = Some(felt.clients || is_written);
        (self.clients, times)
    }

    /// What a page took since it was looked last.
    fn reads(&mut self, reads: Option<Reads>) -> Option<Duration> {
        let now = reads?;
        let before = *self.reads.get_or_insert(now);
        let pages = now.pages.saturating_sub(before.pages);
        if pages < ENOUGH_PAGES {
            return None;
        }
        self.reads = reads;
        Some(now.took.saturating_sub(before.took) / u32::try_from(pages).unwrap_or(u32::MAX))
    }
}

/// How long WAL that has come waits to be replayed. Moments of commits would not do: a large transaction has none for hours.
#[derive(Debug, Default)]
struct Replay {
    received: Option<Lsn>,
    /// When WAL up to there was seen first.
    marks: VecDeque<(Instant, Lsn)>,
}

impl Replay {
    /// Says whether it is more than before.
    fn has_come(&mut self, now: Instant, received: Lsn) -> bool {
        let more = self.received.is_some_and(|before| received > before);
        if more && self.marks.len() < MAX_MARKS {
            self.marks.push_back((now, received));
        }
        self.received = Some(received);
        more
    }

    fn behind(&mut self, now: Instant, replayed: Lsn) -> Duration {
        while self.marks.front().is_some_and(|(_, received)| *received <= replayed) {
            self.marks.pop_front();
        }
        self.marks.front().map_or(Duration::ZERO, |(since, _)| now.duration_since(*since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_come_back_counts_as_long_as_it_has_been_under_way() {
        let (ask, mut asked) = mpsc::channel::<Ask<u8>>(1);
        let mut question = Question { ask: Some(ask), asked: None };
        let began = Instant::now();
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        assert_eq!(question.look(at(0)), None, "now it is asked");
        assert_eq!(question.look(at(1)), Some((Duration::from_secs(1), None)));
        assert_eq!(question.look(at(70)), Some((Duration::from_secs(70), None)));
        let answer = asked.recv().await.unwrap();
        answer.send((Duration::from_secs(71), 5)).unwrap();
        assert_eq!(question.look(at(72)), Some((Duration::from_secs(71), Some(5))));
        assert!(asked.try_recv().is_ok(), "and asked again");
    }

    #[tokio::test]
    async fn what_nobody_answers_any_more_is_not_known() {
        let (ask, mut asked) = mpsc::channel::<Ask<u8>>(1);
        let mut question = Question { ask: Some(ask), asked: None };
        let now = Instant::now();
        question.look(now);
        drop(asked.recv().await);
        drop(asked);
        for _ in 0..3 {
            assert_eq!(question.look(now), None);
        }
    }

    #[test]
    fn replay_is_behind_since_what_it_lacks_has_come() {
        let began = Instant::now();
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        let mut replay = Replay::default();
        assert!(!replay.has_come(at(0), Lsn(100)), "what was there before is not known");
        assert_eq!(replay.behind(at(0), Lsn(50)), Duration::ZERO);
        assert!(replay.has_come(at(1), Lsn(200)));
        assert!(replay.has_come(at(2), Lsn(300)));
        assert_eq!(replay.behind(at(4), Lsn(199)), Duration::from_secs(3));
        assert_eq!(replay.behind(at(5), Lsn(200)), Duration::from_secs(3), "only the second one is missing");
        assert!(!replay.has_come(at(9), Lsn(300)));
        assert_eq!(replay.behind(at(9), Lsn(300)), Duration::ZERO);
    }

    #[test]
    fn pages_are_counted_together_until_they_are_enough() {
        let mut felts = Felts::new(Question { ask: None, asked: None });
        let reads = |pages, ms| Some(Reads { pages, took: Duration::from_millis(ms) });
        assert_eq!(felts.reads(reads(1000, 500)), None);
        assert_eq!(felts.reads(reads(1004, 520)), None);
        assert_eq!(felts.reads(reads(1010, 600)), Some(Duration::from_millis(10)));
        assert_eq!(felts.reads(reads(1010, 600)), None, "nobody has read anything");
        assert_eq!(felts.reads(None), None, "it is not tracked any more");
    }
}
