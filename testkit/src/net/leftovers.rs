//! What killed test runs left behind: namespaces, processes, control groups, mounts, directories, shared memory.
//!
//! Each carries the process id of its maker in its name. Only those whose maker is dead are touched, so that
//! test runs beside this one are safe.

use std::path::Path;

use super::NAME_PREFIX;
use super::namespace::{NETNS_DIR, Namespace};
use crate::cgroup;
use crate::volume;

/// Removes all of it. A failure here is left to the step that then finds the name taken.
pub(super) fn remove() {
    for name in orphans(Path::new(NETNS_DIR)) {
        // The processes may be frozen: they could not die.
        cgroup::remove_everywhere(&name);
        // Another test process may be removing the same leftovers at this moment.
        if let Ok(namespace) = Namespace::open(&name) {
            namespace.destroy();
        }
    }
    for root in cgroup::roots() {
        for name in orphans(&root) {
            cgroup::remove_everywhere(&name);
        }
    }
    crate::shm::remove_orphans();
    let directories = std::env::temp_dir();
    for name in orphans(&directories) {
        let path = directories.join(name);
        volume::unmount_below(&path);
        let _removed = std::fs::remove_dir_all(&path);
    }
}

fn orphans(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| maker(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())).collect()
}

/// The process id in a name of the kit: `pgh<pid>x<number>` and whatever follows a dash.
fn maker(name: &str) -> Option<u32> {
    let (pid, rest) = name.strip_prefix(NAME_PREFIX)?.split_once('x')?;
    let number = rest.split('-').next()?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::maker;

    #[test]
    fn only_names_of_the_kit_have_a_maker() {
        assert_eq!(maker("pgh123x0"), Some(123));
        assert_eq!(maker("pgh123x7-client"), Some(123));
        for other in ["pgherd", "pgh", "pghx1", "pgh12", "pgh12xa", "xpgh12x1", "pgh-1x2", "pghostx1"] {
            assert_eq!(maker(other), None, "{other} is not ours to remove");
        }
    }
}
