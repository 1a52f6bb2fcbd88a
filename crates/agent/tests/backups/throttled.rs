//! A backup is held back while the server is slow, and only for clients who work with it.

use std::num::NonZeroU64;

use pgherd_agent::backups::Progress;
use pgherd_agent::backups::create::{self, Remark, Server};
use pgherd_agent::backups::take::{Find, Order, Source, TakeError, Taken, take};
use pgherd_agent::named_server::NamedServer;
use pgherd_core::throttle::Floor;
use pgherd_postgres::sql::Session;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;

use crate::harness::{SOON, ask, story, until};
use crate::original::{Original, digest, order, slow};
use crate::restored::{Copy, at};

/// So fast that a backup lasts for as long as a test does something meanwhile.
const FAST: u64 = 6_000_000;
const LEAST: u64 = 1_000_000;

/// A process that stands still until this is dropped, as one does that waits for a disk.
struct Stopped(Pid);

impl Stopped {
    fn process(number: i32) -> Stopped {
        let pid = Pid::from_raw(number).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).ok();
    }
}

/// A source that can be asked how it does, and the number of the process that answers.
async fn probed(original: &Original) -> (Source, i32) {
    let mut source = original.source(0, original.session().await, None);
    let probe = original.session().await;
    let number = probe.backend_pid(SOON).await.unwrap();
    source.probe = Some(probe);
    (source, number)
}

fn down_to(bytes_per_second: u64, order: Order) -> Order {
    Order { throttle: NonZeroU64::new(bytes_per_second).map(Floor::Rate), ..order }
}

type Taking = tokio::task::JoinHandle<Result<Taken, TakeError>>;

fn begin(original: &Original, source: Source, order: Order) -> (Taking, watch::Receiver<Progress>) {
    let (progress, seen) = watch::channel(Progress::default());
    let repository = original.repository.clone();
    (tokio::spawn(async move { take(&repository, source, &order, &progress).await }), seen)
}

/// Waits until a backup that is under way is so far.
async fn comes(
    what: &str,
    seen: &mut watch::Receiver<Progress>,
    so_far: impl FnMut(&Progress) -> bool,
) -> Progress {
    let came = tokio::time::timeout(SOON, seen.wait_for(so_far)).await;
    *came
        .unwrap_or_else(|_| panic!("waited for: {what}"))
        .unwrap_or_else(|_| panic!("it has ended before {what}"))
}

story! {
    async fn a_backup_is_held_back_while_the_server_does_not_answer_and_goes_on_all_the_same() {
        let original = Original::new(&[]).await;
        original.pgbench(&["-i", "-s", "5", "-q"]).await;
        let _archiving = original.archiving();
        let mut bench = original.start_pgbench(&["-c", "1", "-R", "20", "-T", "600"]);
        let (source, answering) = probed(&original).await;
        let (taking, mut seen) = begin(&original, source, down_to(LEAST, slow(None, FAST)));

        let free = |now: &Progress| now.done_bytes > 8_000_000 && now.held_to.is_none();
        comes("it knows what is usual, and nothing holds it back", &mut seen, free).await;
        let stopped = Stopped::process(answering);
        let least = comes("the least pace", &mut seen, |now| now.held_to == Some(LEAST)).await;
        assert!(!least.held_back.is_zero());
        comes("a backup always goes on", &mut seen, |now| now.done_bytes > least.done_bytes + 2_000_000).await;
        drop(stopped);
        comes("it recovers", &mut seen, |now| now.held_to.is_none_or(|to| to > LEAST)).await;

        let taken = taking.await.unwrap().unwrap();
        assert!(taken.manifest.held_back_seconds.is_some_and(|seconds| seconds > 0), "the backup says so");
        bench.kill().await.unwrap();
        let (wanted, end) = (original.digest().await, original.archive_everything().await);
        let archive = original.archive_as_files().await;
        let copy = Copy::of(&original, "r").await;
        copy.restore(&original, &taken.manifest, copy.wish(&archive, at(end))).await.unwrap();
        assert_eq!(digest(&copy.recover().await).await, wanted);
        copy.stop();
    }
}

story! {
    async fn for_a_server_that_nobody_works_with_nothing_is_held_back() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        let (source, _) = probed(&original).await;
        // At a byte a second it would not come to its end.
        let (taking, _seen) = begin(&original, source, down_to(1, order(None)));
        let taken = tokio::time::timeout(SOON, taking).await.expect("nobody is there").unwrap().unwrap();
        assert_eq!(taken.manifest.held_back_seconds, None);
    }
}

story! {
    async fn a_backup_whose_probe_is_ended_goes_on_without_it() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        let (source, answering) = probed(&original).await;
        let (taking, mut seen) = begin(&original, source, down_to(LEAST, slow(None, FAST)));
        comes("it is read", &mut seen, |now| now.done_bytes > 1_000_000).await;
        original.run(&format!("SELECT pg_terminate_backend({answering})")).await;
        taking.await.unwrap().expect("what measures is no reason to fail");
    }
}

story! {
    async fn a_backup_whose_probe_cannot_be_opened_is_taken_and_says_why_it_is_not_held_back() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        let session = original.session().await;
        let most: usize = ask(&session, "SHOW max_connections").await.parse().unwrap();
        let instance = original.primary();
        let mut others = Vec::new();
        until("somebody has every connection", async || {
            match Session::local(instance, "postgres", SOON).await {
                Ok(other) => others.push(other),
                Err(_) => return Some(()),
            }
            None
        })
        .await;
        // One is left, which the backup itself needs.
        others.pop();
        let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
        until("one connection is left", async || {
            (ask(&session, count).await == (most - 1).to_string()).then_some(())
        })
        .await;
        let repository = original.herd.path().join("repository.toml");
        let place = original.repository.store().place();
        std::fs::write(&repository, format!("repository = \"file://{place}\"\n")).unwrap();
        let server = NamedServer {
            data_dir: instance.data_dir.clone(),
            host: Some(instance.socket_dir.display().to_string()),
            port: Some(instance.port),
            role: "postgres".to_owned(),
            password: None,
        };
        let prepared = create::prepare(create::Order {
            repository,
            server: Server::Here(server),
            node: "a".to_owned(),
            full: true,
            find: Find::Automatic,
            checkpoint_fast: true,
            readers: 1,
            max_bytes_per_second: None,
            throttle: Some(Floor::Day),
            wal_deadline: SOON,
        })
        .await
        .expect("what measures is no reason to fail");
        let [Remark::NotProbed { cause }] = prepared.remarks.as_slice() else { panic!("{:?}", prepared.remarks) };
        assert!(cause.contains("too many clients"), "{cause}");
        prepared.run(&watch::Sender::new(Progress::default())).await.unwrap();
    }
}
