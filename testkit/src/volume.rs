//! Small file systems of their own, to be filled up: a tmpfs at a path on a host.
//!
//! Hazard: a mount that stays makes the directory around it impossible to remove, and takes memory.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use rustix::fs::statvfs;

use crate::command::{give_to_postgres, run};
use crate::net::Host;

/// The file that takes the space.
const FILLER: &str = "filler";

/// A tmpfs, unmounted when it is dropped.
#[derive(Debug)]
pub struct Volume {
    path: PathBuf,
}

impl Volume {
    /// Mounts `size_bytes` of memory at `<host's directory>/<name>` for user postgres.
    #[track_caller]
    pub fn tmpfs(host: &Host, name: &str, size_bytes: u64) -> Volume {
        let path = host.dir().join(name);
        std::fs::create_dir(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
        let options = format!("size={size_bytes},mode=0700");
        run("mount", &["-t", "tmpfs", "-o", &options, NAME, &path.to_string_lossy()]);
        give_to_postgres(&path);
        Volume { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn free_bytes(&self) -> u64 {
        let stat = statvfs(&self.path).unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
        stat.f_bavail * stat.f_frsize
    }

    /// Takes all space that is left.
    #[track_caller]
    pub fn fill(&self) {
        self.fill_leaving(0);
    }

    /// Takes all space but about `left_bytes`.
    #[track_caller]
    pub fn fill_leaving(&self, left_bytes: u64) {
        let path = self.path.join(FILLER);
        let mut filler =
            File::options().create(true).append(true).open(&path).expect("the volume is mounted");
        let block = [0; 4096];
        while self.free_bytes() > left_bytes {
            match filler.write_all(&block) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error()) => break,
                Err(error) => panic!("fault not injected: cannot fill {}: {error}", path.display()),
            }
        }
        assert!(
            self.free_bytes() <= left_bytes,
            "fault not injected: {} bytes of {} are still free",
            self.free_bytes(),
            self.path.display()
        );
    }

    /// Gives the space back that `fill` took.
    #[track_caller]
    pub fn free(&self) {
        std::fs::remove_file(self.path.join(FILLER)).expect("the volume was filled before");
    }
}

/// The mount's source, for whoever reads the list of mounts.
const NAME: &str = "pgherd-testkit";

impl Drop for Volume {
    fn drop(&mut self) {
        unmount_below(&self.path);
    }
}

/// Unmounts everything at or below `directory`, at once or when its last user ends. For teardown.
pub(crate) fn unmount_below(directory: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut paths: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|path| Path::new(path).starts_with(directory))
        .collect();
    // The innermost first.
    paths.sort_by_key(|path| std::cmp::Reverse(path.len()));
    for path in paths {
        let _unmounted = std::process::Command::new("umount").args(["--lazy", path]).output();
    }
}
