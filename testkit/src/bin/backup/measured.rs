//! One command from its beginning to its end: time, CPU, memory; and the rounds of one subject.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at the memory of a subject.
const LOOK: Duration = Duration::from_millis(100);

/// What one run took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    pub(crate) seconds: f64,
    /// Of its own processes.
    pub(crate) cpu: f64,
    /// Of PostgreSQL meanwhile.
    pub(crate) server_cpu: f64,
    pub(crate) stored_bytes: u64,
    pub(crate) memory_bytes: u64,
}

/// Runs a command that must succeed. `server` is the postmaster, if there is one.
pub(crate) fn run(what: &str, mut command: Command, server: Option<u32>) -> Run {
    let (before, server_before) = (ours(), server.map_or(0.0, family_cpu));
    let began = Instant::now();
    // In a group of its own, by which its processes are found.
    command.process_group(0);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap_or_else(|error| panic!("{what} does not start: {error}"));
    let (group, over, most) = (child.id(), AtomicBool::new(false), AtomicU64::new(0));
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                most.fetch_max(memory_of(group), Ordering::Relaxed);
                std::thread::park_timeout(LOOK);
            }
        });
        let output = child.wait_with_output().expect("a started child can be waited for");
        over.store(true, Ordering::Relaxed);
        output
    });
    let seconds = began.elapsed().as_secs_f64();
    assert!(
        output.status.success(),
        "{what}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Run {
        seconds,
        cpu: ours() - before,
        server_cpu: server.map_or(0.0, family_cpu) - server_before,
        stored_bytes: 0,
        memory_bytes: most.into_inner(),
    }
}

/// Of `/proc/PID/stat`, behind the name; `None`: it is gone.
fn stat(pid: &str) -> Option<Vec<u64>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
}

fn processes() -> impl Iterator<Item = String> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = all.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// CPU of the children that this process has waited for, with theirs.
fn ours() -> f64 {
    stat("self").map_or(0.0, |stat| seconds(stat[13] + stat[14]))
}

/// CPU of a process and its children, those included that are gone.
pub(crate) fn family_cpu(pid: u32) -> f64 {
    let whole = |stat: &Vec<u64>| seconds(stat[11..=14].iter().sum());
    let own = stat(&pid.to_string()).map_or(0.0, |stat| whole(&stat));
    let children = processes().filter_map(|other| stat(&other)).filter(|stat| stat[1] == u64::from(pid));
    own + children.map(|stat| whole(&stat)).sum::<f64>()
}

/// What the processes of a group hold for themselves alone.
fn memory_of(group: u32) -> u64 {
    let is_of_it = |pid: &String| stat(pid).is_some_and(|stat| stat[2] == u64::from(group));
    let held = |pid: String| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    processes().filter(is_of_it).filter_map(held).sum::<u64>() * 1024
}

/// Bytes of the files below a directory.
pub(crate) fn bytes_below(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
            Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |metadata| metadata.len()),
            _ => 0,
        })
        .sum()
}

/// What is in memory of files that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    Warm,
    Cold,
}

/// Who has just written a directory has it in the page cache or not; who reads it next begins like everybody else.
/// What has not reached the disk stays in the cache.
pub(crate) fn put_in_cache(dir: &Path, cache: Cache) {
    for entry in std::fs::read_dir(dir).expect("what was restored can be listed") {
        let entry = entry.expect("what was restored can be listed");
        let kind = entry.file_type().expect("it has a kind");
        if kind.is_dir() {
            put_in_cache(&entry.path(), cache);
        } else if kind.is_file() {
            let mut file = File::open(entry.path()).expect("it can be opened");
            match cache {
                Cache::Warm => drop(std::io::copy(&mut file, &mut std::io::sink()).expect("it can be read")),
                Cache::Cold => {
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("it is a file");
                }
            }
        }
    }
}

/// All rounds, by what was done and who did it, in the order in which they came first.
#[derive(Default)]
pub(crate) struct Rounds {
    order: Vec<(&'static str, &'static str)>,
    runs: BTreeMap<(&'static str, &'static str), Vec<Run>>,
    is_verbose: bool,
}

impl Rounds {
    pub(crate) fn new(is_verbose: bool) -> Rounds {
        Rounds { is_verbose, ..Rounds::default() }
    }

    pub(crate) fn add(&mut self, mode: &'static str, subject: &'static str, run: Run) {
        if self.is_verbose {
            println!(
                "{mode:<14}{subject:<24}{:>8.2} s{:>8.2} s CPU{:>8.2} s server{:>10.1} MB",
                run.seconds,
                run.cpu,
                run.server_cpu,
                run.stored_bytes as f64 / 1e6
            );
        }
        let key = (mode, subject);
        if !self.runs.contains_key(&key) {
            self.order.push(key);
        }
        self.runs.entry(key).or_default().push(run);
    }

    fn median(&self, mode: &'static str, subject: &str, of: fn(&Run) -> f64) -> Option<f64> {
        let runs = self.runs.iter().find(|((of, who), _)| *of == mode && *who == subject)?.1;
        Some(quantile(runs, of, 0.5))
    }

    /// Ratios of time and CPU are those to `peer` and to `floor`.
    pub(crate) fn report(&self, peer: &str, floor: &str) {
        println!(
            "{:<13}{:<22}{:>8}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}{:>11}{:>9}",
            "what",
            "who",
            "time s",
            "worst",
            "spread",
            "/ peer",
            "/ floor",
            "CPU s",
            "/ floor",
            "server",
            "stored MB",
            "mem. MB"
        );
        for key in &self.order {
            let (mode, subject) = *key;
            let runs = &self.runs[key];
            let of = |of: fn(&Run) -> f64| quantile(runs, of, 0.5);
            let ratio = |other: &str, of: fn(&Run) -> f64| {
                let theirs = self.median(mode, other, of).filter(|theirs| *theirs > 0.0);
                theirs.map_or("-".to_owned(), |theirs| format!("{:.2}", quantile(runs, of, 0.5) / theirs))
            };
            let spread = quantile(runs, |run| run.seconds, 0.75) - quantile(runs, |run| run.seconds, 0.25);
            println!(
                "{mode:<13}{subject:<22}{:>8.2}{:>8.2}{spread:>8.2}{:>8}{:>8}{:>9.2}{:>8}{:>8.2}{:>11.1}{:>9.0}",
                of(|run| run.seconds),
                quantile(runs, |run| run.seconds, 1.0),
                ratio(peer, |run| run.seconds),
                ratio(floor, |run| run.seconds),
                of(|run| run.cpu),
                ratio(floor, |run| run.cpu),
                of(|run| run.server_cpu),
                of(|run| run.stored_bytes as f64) / 1e6,
                quantile(runs, |run| run.memory_bytes as f64, 1.0) / 1e6,
            );
        }
    }
}

fn quantile(runs: &[Run], of: fn(&Run) -> f64, part: f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let place = part * (values.len() - 1) as f64;
    let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// What is measured on, and what else it does at the moment.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZeroUsize::get);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split_whitespace().take(3).collect();
    format!("{cores} cores, load before the run {}", load.join(" "))
}
