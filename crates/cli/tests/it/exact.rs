//! Any moment of a herd's past, exactly: random targets over a load with two failovers in it. What has to be there is told by
//! `pg_waldump`, which knows nothing of this program, over the WAL that the repository has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use rustix::process::Signal;
use serde_json::Value;

use crate::backed_up::{backup, of_app};
use crate::herd::{Herd, kill, wait_for};
use crate::repository::{program, said, story};
use crate::server::{Server, programs, sql};

const ACCOUNTS: u64 = 100;
const BALANCE: i64 = 1000;
const WRITERS: u64 = 3;
/// Transfers before each of the two failovers, and after the last one.
const TRANSFERS: u64 = 60;
const TARGETS: usize = 20;

/// The end of a transaction, as WAL has it.
#[derive(Clone, Debug)]
struct End {
    xid: u64,
    at: Timestamp,
    lsn: u64,
    committed: bool,
}

struct Random(u64);

impl Random {
    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    (u64::from_str_radix(high, 16).unwrap() << 32) | u64::from_str_radix(low, 16).unwrap()
}

fn show(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF)
}

/// Moves money until so many transfers are acknowledged; notes which.
fn transfer(
    herd: &Herd,
    numbers: &AtomicU64,
    acknowledged: &Mutex<BTreeSet<u64>>,
    stop: &AtomicBool,
    seed: u64,
) {
    let mut random = Random(seed);
    while !stop.load(Ordering::Relaxed) {
        let n = numbers.fetch_add(1, Ordering::Relaxed);
        let (from, to) = (random.next() % ACCOUNTS, random.next() % ACCOUNTS);
        let amount = random.next() % 50;
        // In one order of accounts, so that nobody waits for each other.
        let signed =
            |account: u64| if account == from { format!("- {amount}") } else { format!("+ {amount}") };
        let moves: String = [from.min(to), from.max(to)]
            .into_iter()
            .map(|account| {
                let sign = if from == to { "+ 0".to_owned() } else { signed(account) };
                format!("update accounts set balance = balance {sign} where id = {account}; ")
            })
            .collect();
        let statement = format!(
            "begin; {moves} insert into transfers values ({n}, pg_current_xact_id()::text::bigint, {amount}); commit"
        );
        // One whose end nobody heard of may be there or not.
        if herd.sql(&statement).is_ok() {
            acknowledged.lock().unwrap().insert(n);
        }
    }
}

/// Every end of a transaction on the line of history that leads to the newest timeline, in the order of WAL.
fn ends(herd: &Herd, repository: &Path) -> Vec<End> {
    let wal = herd.dir.join("wal_for_an_oracle");
    fs::create_dir(&wal).unwrap();
    let data_dir = herd.dir.join(herd.primary().unwrap()).join("data");
    let call = |arguments: &[&str]| {
        let mut command = program();
        command.arg("wal").arg(arguments[0]).arg("--repository").arg(repository);
        command.arg("--data-dir").arg(&data_dir).args(&arguments[1..]).output().unwrap()
    };
    let fetch = |name: &str| {
        let output = call(&["fetch", name, wal.join(name).to_str().unwrap(), "--no-ahead"]);
        output.status.code().unwrap()
    };
    let listed = call(&["list", "--json"]);
    let listed: Value =
        serde_json::from_slice(&listed.stdout).unwrap_or_else(|_| panic!("{}", said(&listed)));
    let timelines = listed["runs"].as_array().unwrap().iter().map(|run| run["timeline"].as_u64().unwrap());
    let newest = timelines.max().unwrap() as u32;
    assert_eq!(fetch(&format!("{newest:08X}.history")), 0, "{listed}");
    let history = wal.join(format!("{newest:08X}.history"));
    let history = fs::read_to_string(history).unwrap();
    // Each timeline of the line with the segment that it begins in, the newest first.
    let mut begins = vec![];
    let mut begin = 0;
    for line in history.lines().filter(|line| !line.trim().is_empty()) {
        let mut words = line.split_whitespace();
        begins.push((words.next().unwrap().parse::<u32>().unwrap(), begin >> 24));
        begin = lsn(words.next().unwrap());
    }
    begins.push((newest, begin >> 24));
    begins.reverse();

    // Of each segment the newest timeline's file, which has what was written before its fork, too. Under one timeline's name `pg_waldump`
    // reads all of it in one go, as recovery does.
    let named =
        |timeline: u32, number: u64| format!("{timeline:08X}{:08X}{:08X}", number >> 8, number & 0xFF);
    let bring = |number: u64| {
        let on = begins.iter().filter(|(_, begin)| *begin <= number);
        on.map(|(timeline, _)| named(*timeline, number)).find(|name| fetch(name) == 0).map(|name| {
            fs::rename(wal.join(name), wal.join(named(newest, number))).unwrap();
        })
    };
    // The archive begins with the herd, not with WAL.
    let first = (1..64).find(|number| bring(*number).is_some()).unwrap();
    let count = (first..).take_while(|number| bring(*number).is_some()).count();
    let output = Command::new(programs().join("pg_waldump"))
        .env("TZ", "UTC")
        .args(["-r", "Transaction", "-t", &newest.to_string(), "-s", &show(first << 24), "-p"])
        .arg(&wal)
        .output()
        .unwrap();
    // It ends with an error: there is no record any more.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.is_empty(), "{count} segments from {first} on: {}", said(&output));
    fs::remove_dir_all(&wal).unwrap();
    text.lines().filter_map(end).collect()
}

/// `rmgr: Transaction len … tx: 743, lsn: 0/015…, prev …, desc: COMMIT 2026-01-01 00:00:00.000000 UTC; …`.
fn end(line: &str) -> Option<End> {
    let after = |word: &str| line.split_once(word).map(|(_, rest)| rest.trim());
    let committed = line.contains("desc: COMMIT ");
    let rest = after("desc: COMMIT ").or_else(|| after("desc: ABORT "))?;
    let at = rest.split_once(" UTC")?.0.replace(' ', "T") + "Z";
    let number = |word| after(word).and_then(|rest| rest.split([',', ' ']).next());
    Some(End {
        xid: number("tx:")?.parse().ok()?,
        at: at.parse().ok()?,
        lsn: lsn(number("lsn:")?),
        committed,
    })
}

/// How many of the ends are before a recovery's, by PostgreSQL's manual (20.5.5), and how it is asked for.
fn choose(ends: &[End], from: usize, random: &mut Random) -> (usize, Vec<String>) {
    let at = from + random.below(ends.len() - from);
    let end = &ends[at];
    let exclusive = random.below(2) == 1;
    let (mut options, there) = match random.below(3) {
        0 => {
            // At a commit, or between it and another one. Clocks of two primaries need not agree; it ends at the first that is later.
            let between = random.below(2) == 1;
            let moment = if between { end.at + jiff::SignedDuration::from_micros(1) } else { end.at };
            let is_later = |end: &End| if exclusive { end.at >= moment } else { end.at > moment };
            let there = ends.iter().position(is_later).unwrap_or(ends.len());
            (vec!["--target-time".to_owned(), moment.to_string()], there)
        }
        1 => {
            let there = if exclusive { at } else { at + 1 };
            (vec!["--target-xid".to_owned(), end.xid.to_string()], there)
        }
        _ => {
            let there = if exclusive { at } else { at + 1 };
            (vec!["--target-lsn".to_owned(), show(end.lsn)], there)
        }
    };
    options.extend(exclusive.then(|| "--exclusive".to_owned()));
    (there, options)
}

#[test]
fn as_root_twenty_random_targets_over_two_failovers_are_exact() {
    story("exact::as_root_twenty_random_targets_over_two_failovers_are_exact", || {
        let seed = std::env::var("PGHERD_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
        let seed = seed.unwrap_or(now);
        eprintln!("PGHERD_SEED={seed}");
        let mut random = Random(seed);

        let herd = Herd::new();
        herd.up();
        herd.wait_whole();
        herd.sql("create table accounts (id int primary key, balance bigint not null)").unwrap();
        herd.sql("create table transfers (n bigint primary key, xid bigint not null, amount int)").unwrap();
        herd.sql(&format!(
            "insert into accounts select n, {BALANCE} from generate_series(0, {}) n",
            ACCOUNTS - 1
        ))
        .unwrap();
        // From here on every moment has both tables.
        let first = herd.run(&["backup", "create"]).trim().to_owned();

        let (numbers, acknowledged, stop) = (AtomicU64::new(1), Mutex::default(), AtomicBool::new(false));
        std::thread::scope(|threads| {
            for writer in 0..WRITERS {
                let (herd, numbers, acknowledged, stop) = (&herd, &numbers, &acknowledged, &stop);
                threads.spawn(move || transfer(herd, numbers, acknowledged, stop, seed ^ writer));
            }
            let more = || {
                let before = acknowledged.lock().unwrap().len() as u64;
                wait_for("transfers", || match acknowledged.lock().unwrap().len() as u64 {
                    now if now >= before + TRANSFERS => Ok(()),
                    now => Err(format!("{now} acknowledged")),
                });
            };
            for _ in 0..2 {
                more();
                let former = herd.primary().unwrap();
                kill(herd.postmaster(&former).unwrap(), Signal::KILL).unwrap();
                more();
                herd.wait_whole();
                // So that some targets begin with a backup of the middle.
                herd.run(&["backup", "create"]);
            }
            more();
            stop.store(true, Ordering::Relaxed);
        });
        let last: u64 = herd
            .sql("insert into transfers values (0, pg_current_xact_id()::text::bigint, 0) returning xid")
            .unwrap()
            .parse()
            .unwrap();
        let repository = herd.dir.join("a/repository.toml");
        let dry = |options: &[&str]| {
            let mut command = program();
            command.args(["restore", "--json", "--dry-run", "--to"]).arg(herd.dir.join("dry"));
            command.arg("--repository").arg(&repository).args(options).output().unwrap()
        };
        wait_for("the last transaction to be archived", || {
            let output = dry(&["--target-xid", &last.to_string()]);
            if output.status.success() { Ok(()) } else { Err(said(&output)) }
        });

        // Nothing that was acknowledged is gone, and what is there is on the line that recovery follows.
        let acknowledged = acknowledged.into_inner().unwrap();
        let rows: BTreeMap<u64, u64> = herd
            .sql("select xid, n from transfers")
            .unwrap()
            .lines()
            .map(|line| line.split_once('|').unwrap())
            .map(|(xid, n)| (xid.parse().unwrap(), n.parse().unwrap()))
            .collect();
        let there: BTreeSet<u64> = rows.values().copied().collect();
        let lost: Vec<&u64> = acknowledged.difference(&there).collect();
        assert!(lost.is_empty(), "acknowledged and not there: {lost:?}");
        let ends = ends(&herd, &repository);
        let known: BTreeSet<u64> = ends.iter().filter(|end| end.committed).map(|end| end.xid).collect();
        let unknown: Vec<&u64> = rows.keys().filter(|xid| !known.contains(xid)).collect();
        assert!(unknown.is_empty(), "committed, and not in the WAL of the archive: {unknown:?}");

        // Everything behind the first backup, whose end is told by the program alone.
        let listed: Value = serde_json::from_str(&herd.run(&["backup", "show", &first, "--json"])).unwrap();
        let consistent = lsn(listed["end_lsn"].as_str().unwrap_or_else(|| panic!("{listed}")));
        let from = ends.iter().position(|end| end.lsn >= consistent).unwrap();
        eprintln!(
            "{} acknowledged, {} ends of transactions behind the first backup",
            acknowledged.len(),
            ends.len() - from
        );
        let copy = herd.dir.join("copy");
        for turn in 1..=TARGETS {
            let (count, options) = choose(&ends, from, &mut random);
            let output = program()
                .args(["restore", "--json", "--to"])
                .arg(&copy)
                .arg("--repository")
                .arg(&repository)
                .args(["--target-action", "promote"])
                .args(&options)
                .output()
                .unwrap();
            assert!(output.status.success(), "{turn}: {options:?}: {}", said(&output));
            compare(&ends[..count], &rows, &copy, &format!("target {turn}: {options:?}"));
        }
        assert!(backup(&herd).unwrap()["gaps"].as_array().is_none_or(Vec::is_empty));
    });
}

/// Recovers a copy, and compares what is there with what was committed.
fn compare(ends: &[End], rows: &BTreeMap<u64, u64>, copy: &Path, what: &str) {
    fs::write(copy.join("pg_hba.conf"), "host all all 127.0.0.1/32 trust\n").unwrap();
    let server = Server::over(copy.to_owned());
    crate::repository::wait(what, || sql(&server, "SELECT pg_is_in_recovery()") == "f");
    let wanted: BTreeSet<u64> =
        ends.iter().filter(|end| end.committed).filter_map(|end| rows.get(&end.xid)).copied().collect();
    let found: BTreeSet<u64> = of_app(&server, "SELECT n FROM transfers")
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| line.parse().unwrap())
        .collect();
    let (missing, beyond): (Vec<_>, Vec<_>) =
        (wanted.difference(&found).collect(), found.difference(&wanted).collect());
    assert!(missing.is_empty() && beyond.is_empty(), "{what}: missing {missing:?}, beyond {beyond:?}");
    let total = of_app(&server, "SELECT sum(balance) FROM accounts");
    assert_eq!(total, (ACCOUNTS as i64 * BALANCE).to_string(), "{what}");
    let port = server.port.to_string();
    let checked = Command::new(programs().join("pg_amcheck"))
        .args([
            "--install-missing",
            "--heapallindexed",
            "-h",
            "127.0.0.1",
            "-U",
            "postgres",
            "-p",
            &port,
            "app",
        ])
        .output()
        .unwrap();
    assert!(checked.status.success(), "{what}: {}", said(&checked));
}
