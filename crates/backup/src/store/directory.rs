//! Objects as files of a directory that survive a power cut.
//!
//! An object is written under a temporary name in `.incoming/`, flushed, given its name by a hard link, which never
//! replaces anything, and its directory is flushed; only then is it said to be there. Where a file system has no hard
//! links, it is renamed by a call that does not replace either.
//!
//! A writer holds a lock on its temporary file for as long as it lives, so that a sweep tells leftovers of a crash from
//! what is being written, without looking at a clock.
//!
//! Left out: what the object is. The library that serves the object stores has a directory as well. It is not used: the
//! order of the steps is what durability rests on, so each of them must be reachable for a test that fails there, and its
//! leftovers cannot be told from files that are being written.
//!
//! Hazard: a step left out shows only after a power cut. `tests` cut the power at each one.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use super::{Failed, Failure, Listed, Page};
use crate::hash::to_hex;
use crate::name::{self, Name};

/// Where objects are before they have their names. No object's name begins with a dot.
const INCOMING: &str = ".incoming";

/// The calls that change something on the disk, for tests that fail at one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    MakeDirectory,
    SyncParent,
    Create,
    /// The first half of the bytes.
    Write,
    /// The rest.
    WriteRest,
    SyncFile,
    Link,
    SyncDirectory,
    RemoveTemporary,
    Remove,
}

/// Says whether a step is done at all; tests leave some out.
type Hook = Arc<dyn Fn(Step, &Path) -> io::Result<bool> + Send + Sync>;

pub(crate) struct Directory {
    root: PathBuf,
    /// To whom what root writes belongs: an agent, which runs as somebody else, reads and collects it.
    owner: Option<(u32, u32)>,
    /// Only tests have one.
    hook: Option<Hook>,
}

/// The owner of a repository's directory, where this process is root's and the directory is not.
fn owner_beside_root(root: &Path) -> Option<(u32, u32)> {
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(root).ok().filter(|found| found.uid() != 0)?;
    rustix::process::geteuid().is_root().then(|| (found.uid(), found.gid()))
}

impl Directory {
    pub(crate) fn new(root: PathBuf) -> Directory {
        Directory { owner: owner_beside_root(&root), root, hook: None }
    }

    #[cfg(test)]
    pub(crate) fn with_hook(
        root: PathBuf,
        hook: impl Fn(Step, &Path) -> io::Result<bool> + Send + Sync + 'static,
    ) -> Directory {
        Directory { owner: owner_beside_root(&root), root, hook: Some(Arc::new(hook)) }
    }

    fn step(&self, step: Step, path: &Path, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match &self.hook {
            Some(hook) if !hook(step, path)? => Ok(()),
            _ => work(),
        }
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.root.join(name.as_str())
    }

    /// Whether it was created; if not, an object of that name is there, and is durable.
    pub(crate) fn put(&self, name: &Name, bytes: &[u8]) -> Result<bool, Failed> {
        // Only the objects that come before it may be written where no repository is.
        if name.as_str().starts_with("cluster/") && !self.path(&name::format()).exists() {
            let why = io::Error::new(io::ErrorKind::NotFound, "there is no format object");
            return Err((Failure::NoRepository, Box::new(why)));
        }
        self.write(name, bytes).map_err(failed)
    }

    fn write(&self, name: &Name, bytes: &[u8]) -> io::Result<bool> {
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.root);
        let incoming = self.root.join(INCOMING);
        self.make_directory(&incoming)?;
        self.make_directory(folder)?;

        let random = crate::seal::random::<8>().map_err(io::Error::other)?;
        let temporary = incoming.join(format!("{}.{}", name.as_str().replace('/', "+"), to_hex(&random)));
        self.step(Step::Create, &temporary, || Ok(()))?;
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        let given = self
            .owner
            .map_or(Ok(()), |(user, group)| std::os::unix::fs::fchown(&file, Some(user), Some(group)));
        let linked = given.and_then(|()| self.fill(&mut file, &temporary, &path, bytes));
        // Whatever came of it: the bytes have their name by now, or never will.
        let removed = self.step(Step::RemoveTemporary, &temporary, || remove(&temporary));
        let created = linked?;
        // Without this the next power cut takes the name away, whether it is ours or that of whoever was faster.
        self.step(Step::SyncDirectory, folder, || sync(folder))?;
        if !created {
            // Whoever was faster may have been killed when he had made a directory, and not flushed the one above it.
            let above = folder.ancestors().skip(1).take_while(|above| above.starts_with(&self.root));
            for directory in above {
                self.step(Step::SyncParent, directory, || sync(directory))?;
            }
        }
        // A file that could not be removed wastes space until the next sweep, and the object is there.
        if let Err(error) = removed {
            tracing::warn!(file = %temporary.display(), %error, "a temporary file is left in the repository");
        }
        Ok(created)
    }

    /// Makes the temporary file whole and durable, then gives it its name.
    fn fill(&self, file: &mut File, temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<bool> {
        file.try_lock().map_err(io::Error::from)?;
        let (first, rest) = bytes.split_at(bytes.len() / 2);
        self.step(Step::Write, temporary, || file.write_all(first))?;
        self.step(Step::WriteRest, temporary, || file.write_all(rest))?;
        // A name for bytes that are not on the disk yet would be an empty object after a power cut.
        self.step(Step::SyncFile, temporary, || file.sync_all())?;
        let linked = self.step(Step::Link, path, || fs::hard_link(temporary, path));
        match linked {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) if no_links(&error) => rename(temporary, path),
            Err(error) => Err(error),
        }
    }

    /// Makes a directory and those above it, each durable before anything is put into it.
    fn make_directory(&self, directory: &Path) -> io::Result<()> {
        if directory == self.root || directory.is_dir() {
            return Ok(());
        }
        let parent = directory.parent().unwrap_or(&self.root);
        self.make_directory(parent)?;
        match self.step(Step::MakeDirectory, directory, || fs::create_dir(directory)) {
            Ok(()) => {
                if let Some((user, group)) = self.owner {
                    std::os::unix::fs::chown(directory, Some(user), Some(group))?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
            Err(error) => return Err(error),
        }
        self.step(Step::SyncParent, parent, || sync(parent))
    }

    pub(crate) fn read(&self, name: &Name, limit: u64) -> Result<Bytes, Failed> {
        let mut file = File::open(self.path(name)).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        if bytes > limit {
            let why = format!("{bytes} bytes, the limit is {limit}");
            return Err((Failure::TooLarge, why.into()));
        }
        let mut content = Vec::with_capacity(bytes as usize);
        file.read_to_end(&mut content).map_err(failed)?;
        Ok(content.into())
    }

    pub(crate) fn read_range(&self, name: &Name, range: Range<u64>) -> Result<Bytes, Failed> {
        let mut file = File::open(self.path(name)).map_err(failed)?;
        file.seek(SeekFrom::Start(range.start)).map_err(failed)?;
        let mut content = Vec::new();
        let wanted = range.end.saturating_sub(range.start);
        file.take(wanted).read_to_end(&mut content).map_err(failed)?;
        Ok(content.into())
    }

    pub(crate) fn head(&self, name: &Name) -> Result<Listed, Failed> {
        listed(name.clone(), &self.path(name)).map_err(failed)
    }

    pub(crate) fn delete(&self, name: &Name) -> Result<(), Failed> {
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.root);
        self.step(Step::Remove, &path, || fs::remove_file(&path)).map_err(failed)?;
        self.step(Step::SyncDirectory, folder, || sync(folder)).map_err(failed)
    }

    pub(crate) fn list(&self, prefix: &str, after: Option<&Name>, limit: usize) -> Result<Page, Failed> {
        // A missing folder has no objects; a missing repository has no listing.
        fs::metadata(&self.root).map_err(|error| match failed(error) {
            (Failure::Absent, source) => (Failure::NoRepository, source),
            other => other,
        })?;
        let mut page = Page::default();
        self.walk(prefix.trim_end_matches('/'), after, limit, &mut page).map_err(failed)?;
        Ok(page)
    }

    /// In order of whole names: `a-b` comes before `a/b`, as a dash comes before a slash. Holds one directory at a time
    /// in memory for each level.
    fn walk(&self, folder: &str, after: Option<&Name>, limit: usize, page: &mut Page) -> io::Result<()> {
        let entries = match fs::read_dir(self.root.join(folder)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut names: Vec<String> = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Ok(name) = OsString::into_string(entry.file_name()) else { continue };
            let slash = if entry.file_type()?.is_dir() { "/" } else { "" };
            let name = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            names.push(format!("{name}{slash}"));
        }
        names.sort();
        for name in names {
            if let Some(directory) = name.strip_suffix('/') {
                // Everything in there begins with `name`; whether all of it comes before `after` can be seen from that.
                let past = after.is_some_and(|after| {
                    name.as_str() < after.as_str() && !after.as_str().starts_with(&name)
                });
                if !past && !directory.rsplit('/').next().is_some_and(|last| last.starts_with('.')) {
                    self.walk(directory, after, limit, page)?;
                }
            } else if after.is_none_or(|after| name.as_str() > after.as_str()) {
                // What has no name of an object is nobody's: somebody's notes, a file system's lost files.
                let Ok(object) = name.parse::<Name>() else { continue };
                if page.objects.len() == limit {
                    page.more = true;
                } else {
                    match listed(object, &self.root.join(&name)) {
                        Ok(object) => page.objects.push(object),
                        // Deleted since the directory was read.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            if page.more {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Removes temporary files whose writer is gone.
    pub(crate) fn sweep(&self) -> Result<usize, Failed> {
        let entries = match fs::read_dir(self.root.join(INCOMING)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(failed(error)),
        };
        let mut swept = 0;
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            // Somebody is writing it. A writer that has not locked its file yet notices that we have, and gives up.
            if file.try_lock().is_err() {
                continue;
            }
            self.step(Step::Remove, &path, || remove(&path)).map_err(failed)?;
            swept += 1;
        }
        Ok(swept)
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        // It was renamed to its name, or swept.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Whether the file system has no hard links.
fn no_links(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let codes = [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS];
    error.raw_os_error().is_some_and(|code| codes.iter().any(|errno| errno.raw_os_error() == code))
}

fn rename(temporary: &Path, path: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn listed(name: Name, path: &Path) -> io::Result<Listed> {
    let metadata = fs::metadata(path)?;
    let modified = Timestamp::try_from(metadata.modified()?).map_err(io::Error::other)?;
    Ok(Listed { name, bytes: metadata.len(), modified })
}

fn failed(error: io::Error) -> Failed {
    let failure = match error.kind() {
        io::ErrorKind::NotFound => Failure::Absent,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Failure::Full
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Failure::Denied,
        _ => Failure::Failed,
    };
    (failure, Box::new(error))
}
