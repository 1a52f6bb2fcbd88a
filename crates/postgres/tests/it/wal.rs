//! The end of WAL, judged against `pg_waldump` and against PostgreSQL's own recovery.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::control::{ControlFile, State};
use pgherd_postgres::process::StopMode;
use pgherd_postgres::promote::{Order, promote};
use pgherd_postgres::seal::seal;
use pgherd_postgres::wal::{Boundary, EndOfWal, WalFiles, end_of_wal};
use pgherd_postgres::{Instance, InstanceSpec, conf::SyncNames};

use crate::harness::{Herd, Node, SOON, ask, start, story, superuser, until};

/// `pg_waldump`'s last record on a timeline: where it starts.
fn last_record_by_waldump(instance: &Instance, timeline: Timeline, from: Lsn) -> Lsn {
    let output = Command::new(instance.installation.program("pg_waldump"))
        .arg("--path")
        .arg(instance.pg_wal())
        .args(["--timeline", &timeline.to_string(), "--start", &from.to_string()])
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let lsn = last.split("lsn: ").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
    // pg_waldump pads with zeros.
    let (high, low) = lsn.split_once('/').unwrap();
    Lsn(u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap())
}

/// Writes rows of many sizes from several sessions until it is dropped.
struct Load(Vec<tokio::task::JoinHandle<()>>);

impl Load {
    async fn on(instance: &Instance, sessions: usize) -> Load {
        let session = superuser(instance).await;
        session.batch_execute("CREATE TABLE IF NOT EXISTS load (id bigserial, filler text)").await.unwrap();
        let mut tasks = Vec::new();
        for number in 0..sessions {
            let session = superuser(instance).await;
            session.batch_execute("SET synchronous_commit = off").await.unwrap();
            tasks.push(tokio::spawn(async move {
                let mut size = 7 * number;
                loop {
                    // Up to several pages, so that records cross pages and segments.
                    size = (size * 31 + 17) % 40_000;
                    let insert = "INSERT INTO load (filler) SELECT string_agg(md5(random()::text), '') \
                                  FROM generate_series(1, $1::bigint)";
                    if session.execute(insert, &[&((size / 32) as i64)]).await.is_err() {
                        return;
                    }
                }
            }));
        }
        Load(tasks)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

async fn written_to(instance: &Instance, lsn: Lsn) {
    let session = superuser(instance).await;
    until("enough WAL is written", async || {
        let now: Lsn = ask(&session, "SELECT pg_current_wal_lsn()").await.parse().unwrap();
        (now >= lsn).then_some(())
    })
    .await;
}

story! {
    async fn a_primary_killed_under_load_ends_where_pg_waldump_says() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let mut server = nodes[0].server.clone();
        for round in 1..=3_u64 {
            let load = Load::on(server.instance(), 4).await;
            let control = ControlFile::read(&server.instance().control_file()).unwrap();
            written_to(server.instance(), Lsn(control.checkpoint.0 + (20 << 20) * round)).await;
            server.stop(StopMode::Kill, SOON).await.unwrap();
            drop(load);

            let control = ControlFile::read(&server.instance().control_file()).unwrap();
            assert_eq!(control.state, State::InProduction);
            let began = Instant::now();
            let end = end_of_wal(server.instance(), None).unwrap();
            eprintln!("{} bytes from {} to {} in {:?}, torn: {}", end.bytes_read, control.checkpoint, end.lsn, began.elapsed(), end.torn);
            // The new timeline's first checkpoint may not have come about.
            let from = end.history.begin_of(end.timeline).unwrap().max(control.checkpoint);
            let judged = last_record_by_waldump(server.instance(), end.timeline, from);
            assert_eq!(end.last_record, Some(judged));

            // From any record on the way the answer is the same.
            let near = Boundary { timeline: end.timeline, lsn: judged };
            assert_eq!(end_of_wal(server.instance(), Some(near)).unwrap().lsn, end.lsn);
            let exact = Boundary { timeline: end.timeline, lsn: end.lsn };
            let nothing_behind = end_of_wal(server.instance(), Some(exact)).unwrap();
            assert_eq!((nothing_behind.lsn, nothing_behind.last_record), (end.lsn, None));

            // PostgreSQL's own recovery ends there, too: the new timeline forks at the end.
            server = start(server.instance()).await;
            let timeline = Timeline(end.timeline.0 + 1);
            let order = Order { timeline, at_least: end.lsn, names: SyncNames::Empty };
            let promoted = promote(&server, &order, SOON).await.unwrap();
            assert_eq!(promoted.fork, end.lsn);
        }
    }
}

/// A copy of what the end of WAL is read from, to be damaged.
fn copy_of(herd: &Herd, instance: &Instance, name: &str) -> Instance {
    let dir = herd.path().join(name);
    fs::create_dir_all(dir.join("global")).unwrap();
    fs::create_dir_all(dir.join("pg_wal")).unwrap();
    fs::copy(instance.control_file(), dir.join("global/pg_control")).unwrap();
    for entry in fs::read_dir(instance.pg_wal()).unwrap().flatten() {
        if entry.metadata().unwrap().is_file() {
            fs::copy(entry.path(), dir.join("pg_wal").join(entry.file_name())).unwrap();
        }
    }
    Instance::new(InstanceSpec { data_dir: dir, ..InstanceSpec::clone(instance) }).unwrap()
}

fn overwrite(files: &WalFiles, timeline: Timeline, at: Lsn, bytes: &[u8]) {
    let path = files.segment_path(timeline, files.segment_of(at));
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at.0 % u64::from(files.segment_bytes)).unwrap();
}

story! {
    async fn whatever_is_damaged_the_end_lies_before_it() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let a = nodes[0].instance();
        ask(&superuser(a).await, "CHECKPOINT").await;
        let load = Load::on(a, 3).await;
        let from: Lsn = ask(&superuser(a).await, "SELECT pg_current_wal_lsn()").await.parse().unwrap();
        written_to(a, Lsn(from.0 + (2 << 20))).await;
        nodes[0].server.stop(StopMode::Kill, SOON).await.unwrap();
        drop(load);

        let control = ControlFile::read(&a.control_file()).unwrap();
        let files = WalFiles::of(a, &control).unwrap();
        let end = end_of_wal(a, None).unwrap();
        let last = end.last_record.unwrap();

        let damaged = copy_of(&herd, a, "damaged");
        let its = WalFiles { dir: damaged.pg_wal(), ..files };
        let span = end.lsn.0 - control.checkpoint.0 - 200;
        let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
        for _ in 0..300 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = Lsn(control.checkpoint.0 + 150 + (seed >> 20) % span);
            let mut byte = [0];
            let path = its.segment_path(end.timeline, its.segment_of(at));
            let offset = at.0 % u64::from(its.segment_bytes);
            fs::File::open(&path).unwrap().read_exact_at(&mut byte, offset).unwrap();
            overwrite(&its, end.timeline, at, &[byte[0] ^ (1 << (seed % 8))]);
            let found = end_of_wal(&damaged, None).unwrap();
            // Three bytes of padding in a record's header, and alignment behind it, mean nothing.
            assert!(found.lsn <= at || found.lsn == end.lsn, "damaged at {at}, ended at {}", found.lsn);
            overwrite(&its, end.timeline, at, &byte);
        }
        assert_eq!(end_of_wal(&damaged, None).unwrap().lsn, end.lsn, "all damage was undone");

        // A record whose end was not written: the tail is still what the file had before.
        overwrite(&its, end.timeline, Lsn(end.lsn.0 - 9), &[0xA5; 4]);
        let torn = end_of_wal(&damaged, None).unwrap();
        assert_eq!((torn.lsn, torn.torn), (align(last), true));

        // The record of the checkpoint itself is gone: an error, not a guess.
        overwrite(&its, end.timeline, Lsn(control.checkpoint.0 + 24), &[0xFF; 8]);
        assert!(end_of_wal(&damaged, None).is_err());
    }
}

/// A record at the start of a page lies behind the page's header; the log ended before it.
fn align(lsn: Lsn) -> Lsn {
    match lsn.0 % 8192 {
        24 | 40 => Lsn(lsn.0 - lsn.0 % 8192),
        _ => lsn,
    }
}

/// Fills a segment on the primary and lets both nodes recycle what they can. Returns the position that both have.
async fn turn(a: &Node, b: &Node) -> Lsn {
    let (on_a, on_b) = (a.session().await, b.session().await);
    on_a.batch_execute("SET synchronous_commit = local").await.unwrap();
    let fill = "INSERT INTO turn SELECT repeat(md5(random()::text), 3) FROM generate_series(1, 3000)";
    on_a.batch_execute(fill).await.unwrap();
    on_a.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    on_a.batch_execute("CHECKPOINT").await.unwrap();
    ask(&on_a, "SELECT pg_logical_emit_message(true, 'x', 'y')").await;
    let sent: Lsn = ask(&on_a, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    until("the standby replayed it", async || {
        let replayed: Lsn = ask(&on_b, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
        (replayed >= sent).then_some(())
    })
    .await;
    on_b.batch_execute("CHECKPOINT").await.unwrap();
    sent
}

/// True if bytes of an older segment follow the end on `node`.
fn old_bytes_follow(node: &Node, end: Lsn) -> bool {
    let files =
        WalFiles::of(node.instance(), &ControlFile::read(&node.instance().control_file()).unwrap()).unwrap();
    let bytes = fs::read(files.segment_path(Timeline(2), files.segment_of(end))).unwrap();
    bytes[(end.0 % u64::from(files.segment_bytes)) as usize..].iter().any(|byte| *byte != 0)
}

story! {
    async fn a_standby_with_recycled_segments_ends_where_it_received() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        for node in [a, b] {
            let session = node.session().await;
            for setting in ["max_wal_size = '48MB'", "min_wal_size = '32MB'", "wal_keep_size = 0", "checkpoint_timeout = '30s'"] {
                session.batch_execute(&format!("ALTER SYSTEM SET {setting}")).await.unwrap();
            }
            session.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        }
        let at_b = b.session().await;
        a.session().await.batch_execute("CREATE TABLE turn (filler text)").await.unwrap();
        let mut turns = 0;
        while !old_bytes_follow(b, turn(a, b).await) {
            turns += 1;
            assert!(turns < 40, "the standby never recycled a segment");
        }

        for round in 0..20 {
            // Ends at another place in a page each time.
            let session = a.session().await;
            let text = format!("SELECT pg_logical_emit_message(true, 'x', repeat('y', {}))", 37 * round);
            ask(&session, &text).await;
            let sent: Lsn = ask(&session, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
            until("the standby replayed it", async || {
                let replayed: Lsn = ask(&at_b, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
                (replayed >= sent).then_some(())
            })
            .await;
            let replayed: Lsn = ask(&at_b, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
            let known = Boundary { timeline: Timeline(2), lsn: replayed };
            let found = end_of_wal(b.instance(), Some(known)).unwrap();
            let slow = end_of_wal(b.instance(), None).unwrap();
            let received: Lsn = ask(&at_b, "SELECT pg_last_wal_receive_lsn()").await.parse().unwrap();
            assert!(found.lsn >= replayed && found.lsn <= received, "{} in {replayed}..{received}", found.lsn);
            assert!(slow.lsn >= replayed && slow.lsn <= received, "{} in {replayed}..{received}", slow.lsn);
        }
        // What autovacuum has written meanwhile may have covered what was left of the old segment.
        while !old_bytes_follow(b, end_of_wal(b.instance(), None).unwrap().lsn) {
            turns += 1;
            assert!(turns < 40, "else this has tested nothing");
            turn(a, b).await;
        }

        let sealed = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        b.server.stop(StopMode::Kill, SOON).await.unwrap();
        let control = ControlFile::read(&b.instance().control_file()).unwrap();
        let judged = last_record_by_waldump(b.instance(), Timeline(2), control.checkpoint);
        assert_eq!(end_of_wal(b.instance(), None).unwrap().last_record, Some(judged));
        assert_eq!(end_of_wal(b.instance(), None).unwrap().lsn, sealed.end.lsn);
    }
}

story! {
    async fn a_fork_segment_that_was_fetched_in_part_hides_nothing() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b", "c"]).await;
        let [a, b, c] = &nodes[..] else { unreachable!() };
        herd.wait_for(a, 2, &[&b.member, &c.member]).await;
        let session = a.session().await;
        session.batch_execute("CREATE TABLE t (x text); INSERT INTO t SELECT md5(i::text) FROM generate_series(1, 5000) i").await.unwrap();
        drop(session);
        a.server.stop(StopMode::Kill, SOON).await.unwrap();
        let on_b = seal(b.instance(), Some(&b.server), None, SOON).await.unwrap();
        let on_c = seal(c.instance(), Some(&c.server), None, SOON).await.unwrap();
        let (b, c, on_b, on_c) = if on_b.end.lsn >= on_c.end.lsn { (b, c, on_b, on_c) } else { (c, b, on_c, on_b) };
        let order = Order { timeline: Timeline(3), at_least: on_b.end.lsn, names: SyncNames::Empty };
        let promoted = promote(&b.server, &order, SOON).await.unwrap();
        pgherd_postgres::slots::ensure(&b.session().await, &c.member, SOON).await.unwrap();

        // c is killed while it fetches the segment of the fork, which PostgreSQL does from its start: it has the
        // history and the first pages of the new file, and all of the old one.
        c.server.stop(StopMode::Kill, SOON).await.unwrap();
        let control = ControlFile::read(&c.instance().control_file()).unwrap();
        let files = WalFiles::of(c.instance(), &control).unwrap();
        let segment = files.segment_of(promoted.fork);
        fs::copy(b.instance().pg_wal().join("00000003.history"), c.instance().pg_wal().join("00000003.history")).unwrap();
        let mut bytes = fs::read(b.instance().pg_wal().join(files.segment_name(Timeline(3), segment))).unwrap();
        let kept = (promoted.fork.0 % u64::from(files.segment_bytes)) as usize / 2;
        bytes[kept..].fill(0);
        fs::write(files.segment_path(Timeline(3), segment), bytes).unwrap();

        let end: EndOfWal = end_of_wal(c.instance(), None).unwrap();
        assert_eq!((end.timeline, end.lsn), (Timeline(2), on_c.end.lsn), "what it acknowledged is still counted");
        assert_eq!(end.newest, Timeline(3));
        let covered = end.covered_by.clone().expect("the short file is noticed");

        // A start moves it away, so that PostgreSQL reads it all.
        herd.follow(c.instance(), None, b.instance(), &c.member).await;
        let again = start(c.instance()).await;
        assert!(covered.with_extension("incomplete").exists());
        let session = superuser(again.instance()).await;
        until("c has followed the fork", async || {
            (ask(&session, "SELECT max(received_tli) FROM pg_stat_wal_receiver").await == "3").then_some(())
        })
        .await;
        assert_eq!(ask(&session, "SELECT count(*) FROM t").await, "5000");
    }
}

story! {
    async fn pg_control_says_what_pg_controldata_says() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        for node in &nodes {
            ask(&node.session().await, "CHECKPOINT").await;
            node.server.stop(StopMode::Fast, SOON).await.unwrap();
            let control = ControlFile::read(&node.instance().control_file()).unwrap();
            let said = controldata(node.instance());
            let says = |what: &str| said.iter().find(|(name, _)| name == what).map(|(_, value)| value.as_str()).unwrap();
            assert_eq!(control.system_id.to_string(), says("Database system identifier"));
            assert_eq!(control.checkpoint.to_string(), says("Latest checkpoint location"));
            assert_eq!(control.checkpoint_redo.to_string(), says("Latest checkpoint's REDO location"));
            assert_eq!(control.checkpoint_timeline.to_string(), says("Latest checkpoint's TimeLineID"));
            assert_eq!(control.min_recovery_point.to_string(), says("Minimum recovery ending location"));
            assert_eq!(control.min_recovery_timeline.to_string(), says("Min recovery ending loc's timeline"));
            assert_eq!(control.backup_start.to_string(), says("Backup start location"));
            assert_eq!(control.wal_segment_bytes.to_string(), says("Bytes per WAL segment"));
            assert_eq!(control.wal_page_bytes.to_string(), says("WAL block size"));
            assert_eq!(control.data_checksums, says("Data page checksum version") != "0");
            assert_eq!(control.control_version.to_string(), says("pg_control version number"));
            for (name, value) in control.limits.named() {
                let what = match name {
                    "max_prepared_transactions" => "max_prepared_xacts setting".to_owned(),
                    "max_locks_per_transaction" => "max_locks_per_xact setting".to_owned(),
                    name => format!("{name} setting"),
                };
                assert_eq!(value.to_string(), says(&what));
            }
            let state = says("Database cluster state");
            assert_eq!(control.state == State::ShutDown, state == "shut down");
            assert_eq!(control.state == State::ShutDownInRecovery, state == "shut down in recovery");
        }
    }
}

fn controldata(instance: &Instance) -> Vec<(String, String)> {
    let output = Command::new(instance.installation.program("pg_controldata"))
        .arg(&instance.data_dir as &Path)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

story! {
    async fn the_end_behind_a_known_place_is_found_in_no_time() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &["b"]).await;
        let [a, b] = &nodes[..] else { unreachable!() };
        ask(&a.session().await, "CREATE TABLE big AS SELECT md5(i::text) x FROM generate_series(1, 1500000) i").await;
        let session = b.session().await;
        let sent: Lsn = ask(&a.session().await, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        until("the standby replayed it", async || {
            let replayed: Lsn = ask(&session, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
            (replayed >= sent).then_some(())
        })
        .await;
        let replayed: Lsn = ask(&session, "SELECT pg_last_wal_replay_lsn()").await.parse().unwrap();
        let timed = |known| {
            let began = Instant::now();
            let end = end_of_wal(b.instance(), known).unwrap();
            (began.elapsed(), end)
        };
        let (all, end) = timed(None);
        let rate = end.bytes_read as f64 / all.as_secs_f64() / 1e6;
        let (quick, _) = timed(Some(Boundary { timeline: Timeline(2), lsn: replayed }));
        eprintln!("{} MB in {all:?}: {rate:.0} MB/s; behind a known place {quick:?}", end.bytes_read >> 20);
        assert!(quick < Duration::from_millis(500) && quick < all.max(Duration::from_millis(50)));
    }
}
