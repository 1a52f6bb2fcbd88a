//! Where the processes of one proxy find each other: a directory that is their user's alone.
//!
//! Each process listens on a socket of its own there, under a name that nobody had before. So there is no name that has to
//! change hands, and a process that was killed leaves nothing but a name that the next one removes. A lock is held by
//! whoever is about to begin, so that one process begins after the other.
//!
//! Leaves out what is said ([`super::wire`]). Hazard: whoever can write into the directory gets the proxy's listeners, and so
//! its clients.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use tokio::time::Instant;

use super::wire::{Link, Word};
use crate::timer::{sleep, timeout};
use crate::world::{NoRandomness, random};

const SUFFIX: &str = ".sock";
const LOCK: &str = "lock";
/// Conversations that wait to be heard.
const BACKLOG: i32 = 64;
/// One that begins waits for another one to have begun, or to have given up.
const LOCK_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A process that lives answers at once, unless it is frozen.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    #[error("cannot use {}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} belongs to the user with the number {owner}, and this process runs as {own}", .path.display())]
    AnotherUser { path: PathBuf, owner: u32, own: u32 },
    #[error("another process of this proxy has been about to begin for {} s", .0.as_secs())]
    Locked(Duration),
    #[error("the system has no random bytes")]
    NoRandomness,
}

impl From<NoRandomness> for PlaceError {
    fn from(_: NoRandomness) -> PlaceError {
        PlaceError::NoRandomness
    }
}

/// The directory. Sockets in it are reached through its descriptor, so that its path may be longer than a socket's may.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    dir: OwnedFd,
}

/// Held while a process begins.
#[derive(Debug)]
pub(super) struct Beginning {
    _file: File,
}

/// The name under which a process is found; removed when it is dropped.
#[derive(Debug)]
pub(super) struct OwnSocket {
    path: PathBuf,
}

impl Drop for OwnSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(%error, path = %self.path.display(), "a socket is left behind");
        }
    }
}

/// A process of the proxy that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub pid: i32,
    /// As whom it runs.
    pub uid: u32,
    /// `false`: it only has clients that came earlier, and ends with the last of them.
    pub accepts: bool,
    /// Without those at the console.
    pub clients: u64,
}

impl Place {
    /// For a process that is to run there: made if it is missing, and closed to others.
    pub fn open(path: &Path) -> Result<Place, PlaceError> {
        let failed = |source| PlaceError::Io { path: path.to_owned(), source };
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        let found = fs::metadata(path).map_err(failed)?;
        let own = rustix::process::geteuid().as_raw();
        if found.uid() != own {
            return Err(PlaceError::AnotherUser { path: path.to_owned(), owner: found.uid(), own });
        }
        if found.mode() & 0o077 != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        }
        Place::look(path)
    }

    /// For whoever only wants to know who runs there.
    pub fn look(path: &Path) -> Result<Place, PlaceError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty());
        let dir = dir.map_err(|error| PlaceError::Io { path: path.to_owned(), source: error.into() })?;
        Ok(Place { path: path.to_owned(), dir })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self) -> impl Fn(io::Error) -> PlaceError + '_ {
        |source| PlaceError::Io { path: self.path.clone(), source }
    }

    /// As the kernel takes it, however long the directory's own path is.
    fn short(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd())).join(name)
    }

    /// Waits for its turn.
    pub(super) async fn begin(&self) -> Result<Beginning, PlaceError> {
        let path = self.path.join(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|source| PlaceError::Io { path: path.clone(), source })?;
        let until = Instant::now() + LOCK_WITHIN;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Beginning { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => sleep(LOOK_EVERY).await,
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(PlaceError::Locked(LOCK_WITHIN)),
                Err(error) => return Err(PlaceError::Io { path, source: error.into() }),
            }
        }
    }

    /// A socket of its own.
    pub(super) fn listen(&self) -> Result<(OwnedFd, OwnSocket), PlaceError> {
        let name: String = random::<8>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = name + SUFFIX;
        let made = || -> io::Result<OwnedFd> {
            let socket = socket()?;
            let short = self.short(&name);
            bind(&socket, &SocketAddrUnix::new(&short)?)?;
            fs::set_permissions(&short, fs::Permissions::from_mode(0o600))?;
            listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let path = self.path.join(&name);
        match made() {
            Ok(socket) => Ok((socket, OwnSocket { path })),
            Err(source) => {
                drop(OwnSocket { path: path.clone() });
                Err(PlaceError::Io { path, source })
            }
        }
    }

    pub(super) fn connect(&self, name: &str) -> io::Result<Link> {
        let socket = socket()?;
        connect(&socket, &SocketAddrUnix::new(self.short(name))?)?;
        Link::new(socket)
    }

    /// Names of sockets, of processes that live or not.
    fn names(&self) -> Result<Vec<String>, PlaceError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(self.failed())? {
            let entry = entry.map_err(self.failed())?;
            match entry.file_name().into_string() {
                Ok(name) if name.ends_with(SUFFIX) => names.push(name),
                _ => {}
            }
        }
        Ok(names)
    }

    /// Names of sockets behind which somebody listens, even if it is frozen. To be called in one's turn: names of the dead are
    /// removed.
    pub(super) fn living(&self) -> Result<Vec<String>, PlaceError> {
        let names = self.names()?.into_iter();
        Ok(names
            .filter(|name| match self.connect(name) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    drop(OwnSocket { path: self.path.join(name) });
                    false
                }
                Err(error) => error.kind() != io::ErrorKind::NotFound,
                Ok(_) => true,
            })
            .collect())
    }

    /// Every process that answers, with its socket's name.
    pub(super) async fn answering(&self) -> Result<Vec<(String, Found)>, PlaceError> {
        let mut found = Vec::new();
        for name in self.names()? {
            let Ok(link) = self.connect(&name) else { continue };
            match timeout(ANSWER_WITHIN, status(&link)).await {
                Ok(Ok(Some(process))) => found.push((name, process)),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::debug!(name, %error, "a process does not say how it is"),
                Err(_) => tracing::warn!(name, "a process of this proxy does not answer"),
            }
        }
        Ok(found)
    }

    /// Every process that answers.
    pub async fn processes(&self) -> Result<Vec<Found>, PlaceError> {
        Ok(self.answering().await?.into_iter().map(|(_, found)| found).collect())
    }
}

async fn status(link: &Link) -> io::Result<Option<Found>> {
    let peer = link.peer()?;
    link.send(&Word::Status).await?;
    Ok(match link.receive().await? {
        Some((Word::State { accepts, clients }, _)) => {
            Some(Found { pid: peer.pid, uid: peer.uid, accepts, clients })
        }
        _ => None,
    })
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_place_is_its_users_alone_and_names_of_the_dead_are_removed() {
        let base = tempfile::tempdir().unwrap();
        // Longer than the path of a socket may be.
        let long = base.path().join("x".repeat(120));
        fs::create_dir(&long).unwrap();
        let run = long.join("run");
        fs::create_dir(&run).unwrap();
        fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).unwrap();
        let place = Place::open(&run).unwrap();
        assert_eq!(fs::metadata(&run).unwrap().mode() & 0o777, 0o700);

        let (socket, own) = place.listen().unwrap();
        assert_eq!(fs::metadata(&own.path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(place.living().unwrap().len(), 1);
        // It is killed.
        drop(socket);
        std::mem::forget(own);
        assert_eq!(place.names().unwrap().len(), 1);
        assert!(place.answering().await.unwrap().is_empty() && place.living().unwrap().is_empty());
        assert!(place.names().unwrap().is_empty());
        let (_socket, own) = place.listen().unwrap();
        drop(own);
        assert!(place.names().unwrap().is_empty(), "one that ends leaves nothing");
    }

    #[tokio::test]
    async fn one_begins_after_the_other() {
        let base = tempfile::tempdir().unwrap();
        let place = Place::open(&base.path().join("run")).unwrap();
        let first = place.begin().await.unwrap();
        let other = Place::open(place.path()).unwrap();
        assert!(timeout(Duration::from_millis(120), other.begin()).await.is_err());
        drop(first);
        timeout(Duration::from_secs(20), other.begin()).await.unwrap().unwrap();
    }

    #[test]
    fn what_belongs_to_somebody_else_is_no_place() {
        if rustix::process::geteuid().is_root() {
            let base = tempfile::tempdir().unwrap();
            std::os::unix::fs::chown(base.path(), Some(1), Some(1)).unwrap();
            let error = Place::open(base.path()).unwrap_err();
            assert!(matches!(error, PlaceError::AnotherUser { owner: 1, own: 0, .. }), "{error}");
        } else {
            let error = Place::open(Path::new("/")).unwrap_err();
            assert!(matches!(error, PlaceError::AnotherUser { owner: 0, .. }), "{error}");
        }
    }
}
