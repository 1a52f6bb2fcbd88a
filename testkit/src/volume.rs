//! File systems of their own: small ones to be filled up, and disks that hang or die.
//!
//! A *tmpfs* is quick and can be filled. A *disk* is ext4 on a loop device; it can also hang, as a storage
//! network does, or be gone from one moment to the next, and then it has forgotten what was not synced.
//!
//! Hazard: a mount that stays makes the directory around it impossible to remove; a disk that hangs holds
//! every process that touches it beyond the reach of any signal. `unmount_below` ends both.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::statvfs;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl};

use crate::command::{give_to_postgres, run};
use crate::net::Host;
use crate::wait::wait_until;

/// The file that takes the space.
const FILLER: &str = "filler";
/// Written to see whether the volume lives. Whoever keeps something here has other names.
const PROBE: &str = "testkit-probe";
/// The mount's source, for whoever reads the list of mounts.
const SOURCE: &str = "pgherd-testkit";
/// A write and a sync on a healthy disk take a few milliseconds here.
const HANGS_AFTER: Duration = Duration::from_millis(500);
const EFFECT_DEADLINE: Duration = Duration::from_secs(10);

/// A mounted file system for user postgres, unmounted when it is dropped.
#[derive(Debug)]
pub struct Volume {
    path: PathBuf,
    /// The file behind a disk.
    image: Option<PathBuf>,
}

impl Volume {
    /// Mounts `size_bytes` of memory at `<host's directory>/<name>`.
    #[track_caller]
    pub fn tmpfs(host: &Host, name: &str, size_bytes: u64) -> Volume {
        let path = mount_point(host, name);
        let options = format!("size={size_bytes},mode=0700");
        run("mount", &["-t", "tmpfs", "-o", &options, SOURCE, &path.to_string_lossy()]);
        give_to_postgres(&path);
        Volume { path, image: None }
    }

    /// Mounts an empty disk at `<host's directory>/<name>`. Space is taken only as it is used.
    #[track_caller]
    pub fn disk(host: &Host, name: &str, size_bytes: u64) -> Volume {
        let path = mount_point(host, name);
        let image = host.dir().join(format!("{name}.img"));
        File::create(&image)
            .and_then(|file| file.set_len(size_bytes))
            .unwrap_or_else(|error| panic!("cannot make {}: {error}", image.display()));
        run("mkfs.ext4", &["-q", "-m", "0", &image.to_string_lossy()]);
        let volume = Volume { path, image: Some(image) };
        volume.mount_disk();
        volume
    }

    #[track_caller]
    fn mount_disk(&self) {
        let image = self.image.as_ref().unwrap_or_else(|| panic!("{} is no disk", self.path.display()));
        run("mount", &["-o", "loop", &image.to_string_lossy(), &self.path.to_string_lossy()]);
        give_to_postgres(&self.path);
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
        // In large pieces as long as there is room for them, then block by block. A file system may keep some
        // blocks for itself: it is full when it says so.
        for piece in [1 << 20, 4096] {
            let block = vec![0; piece];
            while self.free_bytes() >= left_bytes.max(1) + if piece > 4096 { piece as u64 } else { 0 } {
                match filler.write_all(&block).and_then(|()| filler.sync_data()) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => return,
                    Err(error) => panic!("fault not injected: cannot fill {}: {error}", path.display()),
                }
            }
        }
    }

    /// Gives the space back that `fill` took.
    #[track_caller]
    pub fn free(&self) {
        std::fs::remove_file(self.path.join(FILLER)).expect("the volume was filled before");
    }

    /// From now on no write to the disk comes back, with an error or without, until [`Volume::resume`].
    #[track_caller]
    pub fn hang(&self) {
        assert!(self.image.is_some(), "only a disk can hang, and {} is none", self.path.display());
        run("fsfreeze", &["--freeze", &self.path.to_string_lossy()]);
        let probe = self.path.join(PROBE);
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let written = File::create(&probe);
            // Nobody waits for it any more when the disk goes on.
            let _late = done.send(written.map(drop));
        });
        if let Ok(written) = ended.recv_timeout(HANGS_AFTER) {
            panic!("fault not injected: a write to {} ended: {written:?}", self.path.display());
        }
    }

    /// The hanging disk goes on; nothing was lost.
    #[track_caller]
    pub fn resume(&self) {
        run("fsfreeze", &["--unfreeze", &self.path.to_string_lossy()]);
    }

    /// The disk is gone: every access fails, and what was not synced is lost, as in a power cut.
    #[track_caller]
    pub fn die(&self) {
        const FS_IOC_SHUTDOWN: Opcode = rustix::ioctl::opcode::read::<u32>(b'X', 125);
        /// The journal is not written out before.
        const WITHOUT_LOG_FLUSH: u32 = 2;
        assert!(self.image.is_some(), "only a disk can die, and {} is none", self.path.display());
        let root = File::open(&self.path).expect("the volume is mounted");
        #[expect(unsafe_code, reason = "no safe wrapper shuts a file system down")]
        // SAFETY: the call reads one 32-bit number of flags, which lives until it returns.
        unsafe { ioctl(&root, Setter::<FS_IOC_SHUTDOWN, u32>::new(WITHOUT_LOG_FLUSH)) }.unwrap_or_else(
            |error| panic!("fault not injected: {} cannot be shut down: {error}", self.path.display()),
        );
        let written = File::create(self.path.join(PROBE));
        let failed =
            written.as_ref().is_err_and(|error| error.raw_os_error() == Some(Errno::IO.raw_os_error()));
        assert!(failed, "fault not injected: a write to {} gave {written:?}", self.path.display());
    }

    /// Mounts the disk again after it died, with what had been synced. Nothing may use it any more.
    ///
    /// Whoever entered another mount namespace meanwhile holds a copy of the mount for a moment, and then the same dead file
    /// system comes back.
    #[track_caller]
    pub fn remount(&self) {
        let path = self.path.to_string_lossy().into_owned();
        let image = self.image.as_ref().unwrap_or_else(|| panic!("{path} is no disk"));
        let (image, probe) = (image.to_string_lossy().into_owned(), self.path.join(PROBE));
        let done = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().map_err(|error| error.to_string())?;
            let words = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() { Ok(()) } else { Err(words) }
        };
        wait_until(&format!("{path} to be alive again"), EFFECT_DEADLINE, || {
            done("umount", &[&path])?;
            done("mount", &["-o", "loop", &image, &path])?;
            let written = File::create(&probe).and_then(|_| std::fs::remove_file(&probe));
            written.map_err(|error| error.to_string())
        });
        give_to_postgres(&self.path);
    }
}

#[track_caller]
fn mount_point(host: &Host, name: &str) -> PathBuf {
    let path = host.dir().join(name);
    std::fs::create_dir(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
    path
}

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
        // Most do not hang, and then this fails.
        let _resumed = Command::new("fsfreeze").args(["--unfreeze", path]).output();
        let _unmounted = Command::new("umount").args(["--lazy", path]).output();
    }
}
