//! Control groups: all processes of a host stopped in one instant, or short of CPU time.
//!
//! Both generations of cgroups work. Where the machine has the first one's freezer, that is used, because a
//! program under test that makes groups of its own makes them in the second, and would be moved out of them.
//!
//! Hazard: a group that stays frozen holds processes that no signal can end; `remove_everywhere` thaws first.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::Process;
use crate::wait::wait_until;

const EFFECT_DEADLINE: Duration = Duration::from_secs(10);
/// The period over which a quota counts, the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// A tree of directories per controller.
    One,
    /// One tree.
    Two,
}

/// Where a controller lives on this machine.
fn mount_of(controller: &str) -> Option<(Generation, PathBuf)> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let mut second = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(path), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        match kind {
            "cgroup" if options.split(',').any(|option| option == controller) => {
                return Some((Generation::One, PathBuf::from(path)));
            }
            "cgroup2" => second = Some((Generation::Two, PathBuf::from(path))),
            _ => {}
        }
    }
    second
}

/// The tops of the trees in which the kit makes groups.
pub(crate) fn roots() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = [mount_of("freezer"), mount_of("cpu"), mount_of("")]
        .into_iter()
        .flatten()
        .map(|(_, path)| path)
        .collect();
    roots.dedup();
    roots
}

/// Removes all groups whose name starts with `prefix`. For teardown: it goes on where it can.
pub(crate) fn remove_everywhere(prefix: &str) {
    for root in roots() {
        let entries = std::fs::read_dir(&root).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_str().is_some_and(|n| n.starts_with(prefix)))
        {
            remove(&entry.path());
        }
    }
}

/// Thaws, empties and removes one group.
fn remove(group: &Path) {
    for (file, running) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        if group.join(file).exists() {
            let _thawed = std::fs::write(group.join(file), running);
        }
    }
    let root = group.parent().expect("a group lies below its root");
    let began = Instant::now();
    // Busy until the last process has left, and one that is moved may have had a child meanwhile.
    while std::fs::remove_dir(group).is_err() && group.exists() && began.elapsed() < EFFECT_DEADLINE {
        for pid in members(group) {
            // A process that has ended since needs no move.
            let _moved = std::fs::write(root.join("cgroup.procs"), pid.to_string());
        }
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn members(group: &Path) -> Vec<i32> {
    let text = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// A set of processes that do not run until this is dropped.
#[derive(Debug)]
#[must_use = "the processes go on as soon as this is dropped"]
pub struct Freezer {
    generation: Generation,
    group: PathBuf,
    /// Where each process came from, to go back to; of use with the second generation only.
    origins: Vec<(i32, PathBuf)>,
}

impl Freezer {
    #[track_caller]
    pub(crate) fn freeze(name: &str, find: impl Fn() -> Vec<Process>) -> Freezer {
        let (generation, root) =
            mount_of("freezer").expect("fault not injected: no cgroup freezer is mounted");
        Freezer::freeze_in(generation, &root, name, find)
    }

    /// With a given generation, for the kit's own tests.
    #[doc(hidden)]
    #[track_caller]
    pub fn freeze_with(
        generation: Generation,
        name: &str,
        find: impl Fn() -> Vec<Process>,
    ) -> Option<Freezer> {
        let controller = if generation == Generation::One { "freezer" } else { "" };
        let (found, root) = mount_of(controller)?;
        (found == generation).then(|| Freezer::freeze_in(found, &root, name, find))
    }

    #[track_caller]
    fn freeze_in(
        generation: Generation,
        root: &Path,
        name: &str,
        find: impl Fn() -> Vec<Process>,
    ) -> Freezer {
        let group = root.join(name);
        assert!(!is_frozen(&group, generation), "{name} is frozen already");
        // The kernel keeps a group for a moment whose last process has just ended.
        wait_until(&format!("{name} to be gone since the last time"), EFFECT_DEADLINE, || {
            if group.exists() {
                remove(&group);
            }
            if group.exists() { Err(format!("it holds {:?}", members(&group))) } else { Ok(()) }
        });
        make(&group);
        let mut freezer = Freezer { generation, group, origins: Vec::new() };
        // The group is frozen first: each process stops as it enters, and can fork no more.
        match generation {
            Generation::One => put(&freezer.group, "freezer.state", "FROZEN"),
            Generation::Two => put(&freezer.group, "cgroup.freeze", "1"),
        }
        loop {
            let members = members(&freezer.group);
            let outside: Vec<Process> = find().into_iter().filter(|p| !members.contains(&p.pid())).collect();
            if outside.is_empty() {
                break;
            }
            for process in outside {
                freezer.take(&process, root);
            }
        }
        assert!(!members(&freezer.group).is_empty(), "fault not injected: there is nobody to freeze");
        freezer.prove_frozen();
        freezer
    }

    fn take(&mut self, process: &Process, root: &Path) {
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap_or_default();
        let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
        // One that ended meanwhile cannot be moved, and need not be.
        if std::fs::write(self.group.join("cgroup.procs"), process.pid().to_string()).is_ok()
            && self.generation == Generation::Two
            && let Some(own) = own
        {
            self.origins.push((process.pid(), root.join(own)));
        }
    }

    #[track_caller]
    fn prove_frozen(&self) {
        wait_until("the processes of the group to be frozen", EFFECT_DEADLINE, || {
            match is_frozen(&self.group, self.generation) {
                true => Ok(()),
                false => Err("the kernel says that they are not".to_owned()),
            }
        });
    }

    /// Lets them run again.
    pub fn thaw(self) {}
}

impl Drop for Freezer {
    fn drop(&mut self) {
        for (pid, origin) in &self.origins {
            let _gone_meanwhile = std::fs::write(origin.join("cgroup.procs"), pid.to_string());
        }
        remove(&self.group);
    }
}

fn is_frozen(group: &Path, generation: Generation) -> bool {
    let (file, frozen) = match generation {
        Generation::One => ("freezer.state", "FROZEN"),
        Generation::Two => ("cgroup.events", "frozen 1"),
    };
    std::fs::read_to_string(group.join(file)).is_ok_and(|state| state.contains(frozen))
}

/// A limit on the CPU time of some processes until this is dropped.
#[derive(Debug)]
#[must_use = "the limit ends as soon as this is dropped"]
pub struct Starvation {
    group: PathBuf,
}

impl Starvation {
    /// `percent` of one core for all of them together; 100 is one whole core.
    #[track_caller]
    pub(crate) fn starve(name: &str, percent: u64, find: impl Fn() -> Vec<Process>) -> Starvation {
        let (generation, root) =
            mount_of("cpu").expect("fault not injected: no cgroup of the CPU is mounted");
        let group = root.join(name);
        assert!(!group.exists(), "{name} is starved already");
        if generation == Generation::Two {
            put(&root, "cgroup.subtree_control", "+cpu");
        }
        make(&group);
        let quota_us = CPU_PERIOD_US * percent / 100;
        match generation {
            Generation::One => {
                put(&group, "cpu.cfs_period_us", &CPU_PERIOD_US.to_string());
                put(&group, "cpu.cfs_quota_us", &quota_us.to_string());
            }
            Generation::Two => put(&group, "cpu.max", &format!("{quota_us} {CPU_PERIOD_US}")),
        }
        let starvation = Starvation { group };
        // Children are born into the group, so a round that finds nobody new is the last.
        loop {
            let members = members(&starvation.group);
            let outside: Vec<Process> = find().into_iter().filter(|p| !members.contains(&p.pid())).collect();
            if outside.is_empty() {
                break;
            }
            for process in outside {
                let _ended_meanwhile =
                    std::fs::write(starvation.group.join("cgroup.procs"), process.pid().to_string());
            }
        }
        assert!(!members(&starvation.group).is_empty(), "fault not injected: there is nobody to starve");
        starvation
    }

    /// How often the kernel has held the processes back. A test of starvation asserts that it grew.
    pub fn throttled(&self) -> u64 {
        let text = std::fs::read_to_string(self.group.join("cpu.stat")).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or_default()
    }
}

impl Drop for Starvation {
    fn drop(&mut self) {
        remove(&self.group);
    }
}

#[track_caller]
fn make(group: &Path) {
    std::fs::create_dir(group)
        .unwrap_or_else(|error| panic!("fault not injected: cannot make {}: {error}", group.display()));
}

#[track_caller]
fn put(group: &Path, file: &str, value: &str) {
    let path = group.join(file);
    std::fs::write(&path, value)
        .unwrap_or_else(|error| panic!("fault not injected: cannot write {}: {error}", path.display()));
}
