//! Objects that are written once: on a directory, in an object store, or where another agent keeps them.
//!
//! | operation | promise |
//! |---|---|
//! | [`put`](Store::put) | after `Ok` the whole object is durable under its name; nothing was overwritten |
//! | [`read`](Store::read), [`read_range`](Store::read_range) | exactly the bytes asked for, or an error |
//! | [`list`](Store::list) | in order of names, page by page; may be late, as some object stores are |
//! | [`delete`](Store::delete) | after `Ok` the object is gone |
//!
//! A failure is one of three kinds, because callers act on them differently: the object is absent for certain, it is
//! present already with another content, or nobody knows. Absent is certain only while the repository itself is there: a
//! disk that is not mounted looks like an empty repository, and PostgreSQL would end its recovery early and promote.
//!
//! Left out: what objects mean. Hazard: a `put` that says `Ok` before the bytes are durable makes the archive feign
//! safety; one that overwrites destroys the only copy of something.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use crate::name::{self, Name};

mod cloud;
pub(crate) mod directory;
mod remote;
#[cfg(test)]
mod tests;

pub use cloud::{AzureCredentials, AzureKey, Credentials, GcsCredentials};
use directory::Directory;
#[cfg(test)]
use directory::Step;
pub use remote::{Remote, RemoteAnswer};

/// Objects of one page of a listing: ten of S3's own pages, one MB of names. A directory is read anew for each.
pub const MAX_PAGE: usize = 10_000;
/// Largest object: a pack with its footer, or the WAL segment of 1 GiB that does not compress.
pub const MAX_OBJECT_BYTES: u64 = 1100 * 1024 * 1024;

/// What was being done when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    Opening,
    Writing,
    Reading,
    Listing,
    Deleting,
    Sweeping,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Doing::Opening => "opening",
            Doing::Writing => "writing",
            Doing::Reading => "reading",
            Doing::Listing => "listing",
            Doing::Deleting => "deleting",
            Doing::Sweeping => "sweeping",
        })
    }
}

/// Why something is not known to have worked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no such object, for certain.
    Absent,
    /// There is one of that name with another content. It was left as it is.
    Present,
    /// No space is left, or a quota is used up.
    Full,
    /// The store does not let us: permissions, credentials, a read-only file system.
    Denied,
    /// The place does not hold a repository, so that nothing can be said of its objects.
    NoRepository,
    /// The object is larger than whatever may stand under that name.
    TooLarge,
    /// The store does not do what it must do: listings out of order, bodies that are cut off, objects overwritten.
    Misbehaving,
    /// Anything else: the network, a timeout, a disk.
    Failed,
}

impl Failure {
    /// Whether nobody knows how it is, so that the caller must neither go on as if the object were absent, nor as if it
    /// were there.
    pub fn is_unsure(self) -> bool {
        !matches!(self, Failure::Absent | Failure::Present)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Failure::Absent => "there is no such object",
            Failure::Present => "another object has that name",
            Failure::Full => "no space is left",
            Failure::Denied => "it is not permitted",
            Failure::NoRepository => "there is no repository (is the disk mounted, does the bucket exist?)",
            Failure::TooLarge => "the object is too large",
            Failure::Misbehaving => "the store does not keep its promises",
            Failure::Failed => "the outcome is not known",
        })
    }
}

pub type Source = Box<dyn Error + Send + Sync>;

/// What failed, at which object, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{doing} \"{object}\" in {place}: {failure}")]
pub struct StoreError {
    pub doing: Doing,
    pub object: String,
    pub place: Arc<str>,
    pub failure: Failure,
    #[source]
    pub source: Option<Source>,
}

impl StoreError {
    pub fn is_absent(&self) -> bool {
        self.failure == Failure::Absent
    }

    pub fn hint(&self) -> Option<&'static str> {
        match (self.doing, self.failure) {
            (_, Failure::Denied) => Some(
                "whoever runs this, or the key that the repository's file names, has to be permitted to read, write, list and delete there",
            ),
            (Doing::Opening, _) => Some("see what the repository's file says of the place and of its key"),
            _ => None,
        }
    }
}

/// How a put came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    /// An object with these very bytes was there: somebody else's, or our own whose answer was lost.
    Same,
}

/// What a listing says of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: Name,
    pub bytes: u64,
    /// By the clock of the store.
    pub modified: Timestamp,
}

/// A part of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub objects: Vec<Listed>,
    /// Whether there may be more behind the last one.
    pub more: bool,
}

/// A handle; clones share everything. It prints no credentials.
#[derive(Clone)]
pub struct Store {
    behind: Behind,
    place: Arc<str>,
    /// Whoever holds this handle may be held up by a disk.
    may_block: bool,
}

#[derive(Clone)]
enum Behind {
    Directory(Arc<Directory>),
    Cloud(Arc<dyn object_store::ObjectStore>),
    Remote(Arc<dyn Remote>),
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.place)
    }
}

impl Store {
    /// A directory, which must exist: one that is made on the way would hide that a disk is not mounted.
    pub fn directory(path: impl Into<PathBuf>) -> Store {
        let path = path.into();
        let place = path.display().to_string().into();
        Store { behind: Behind::Directory(Arc::new(Directory::new(path))), place, may_block: false }
    }

    /// `s3://bucket/prefix`.
    pub fn s3(url: &str, credentials: Credentials) -> Result<Store, StoreError> {
        Store::cloud(url, cloud::s3(url, credentials))
    }

    /// `gs://bucket/prefix`.
    pub fn gcs(url: &str, credentials: GcsCredentials) -> Result<Store, StoreError> {
        Store::cloud(url, cloud::gcs(url, credentials))
    }

    /// `azure://container/prefix`.
    pub fn azure(url: &str, credentials: AzureCredentials) -> Result<Store, StoreError> {
        Store::cloud(url, cloud::azure(url, credentials))
    }

    fn cloud(
        url: &str,
        opened: Result<Arc<dyn object_store::ObjectStore>, Source>,
    ) -> Result<Store, StoreError> {
        let place: Arc<str> = url.into();
        match opened {
            Ok(behind) => Ok(Store { behind: Behind::Cloud(behind), place, may_block: false }),
            Err(source) => Err(StoreError {
                doing: Doing::Opening,
                object: String::new(),
                place,
                failure: Failure::Failed,
                source: Some(source),
            }),
        }
    }

    /// Somebody else's store, at `place` in messages.
    pub fn remote(place: &str, remote: Arc<dyn Remote>) -> Store {
        Store { behind: Behind::Remote(remote), place: place.into(), may_block: false }
    }

    #[cfg(test)]
    pub(crate) fn over(behind: Arc<dyn object_store::ObjectStore>) -> Store {
        Store { behind: Behind::Cloud(behind), place: "a test".into(), may_block: false }
    }

    #[cfg(test)]
    pub(crate) fn with_directory(directory: Directory) -> Store {
        Store { behind: Behind::Directory(Arc::new(directory)), place: "a test".into(), may_block: false }
    }

    /// A handle for somebody who has a thread of his own: a directory is read and written on it, and not handed to another thread for each
    /// piece. On a thread that others wait for it would hold them up.
    #[must_use]
    pub fn on_own_thread(&self) -> Store {
        Store { may_block: true, ..self.clone() }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Failed> + Send + 'static,
    ) -> Result<T, Failed> {
        if self.may_block {
            return work();
        }
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => Err((Failure::Failed, Box::new(error))),
        }
    }

    /// Where it is, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    fn error(&self, doing: Doing, object: &str, failure: Failure, source: Option<Source>) -> StoreError {
        StoreError { doing, object: object.to_owned(), place: Arc::clone(&self.place), failure, source }
    }

    /// Writes an object that is not there. If there is one already with the same bytes, that is as good: an answer that
    /// was lost on the way looks the same. One with other bytes is left as it is, and is [`Failure::Present`].
    pub async fn put(&self, name: &Name, bytes: Bytes) -> Result<Put, StoreError> {
        let put = match &self.behind {
            Behind::Directory(directory) => {
                let (directory, name, bytes) = (Arc::clone(directory), name.clone(), bytes.clone());
                self.blocking(move || directory.put(&name, &bytes)).await
            }
            Behind::Cloud(cloud) => cloud::put(&**cloud, name, &bytes).await,
            // It has looked at what is there.
            Behind::Remote(remote) => {
                let put = remote.put(name, bytes).await;
                return put.map_err(|(failure, source)| {
                    self.error(Doing::Writing, name.as_str(), failure, Some(source))
                });
            }
        };
        let created = put.map_err(|(failure, source)| {
            // A store without the bucket says that it finds nothing; nothing was absent that we asked for.
            let failure = if failure == Failure::Absent { Failure::Failed } else { failure };
            self.error(Doing::Writing, name.as_str(), failure, Some(source))
        })?;
        if created {
            return Ok(Put::Created);
        }
        let there = self.read_plainly(name, MAX_OBJECT_BYTES).await?;
        if there == bytes {
            return Ok(Put::Same);
        }
        Err(self.error(Doing::Writing, name.as_str(), Failure::Present, None))
    }

    /// All of an object that has no more than `limit` bytes.
    pub async fn read(&self, name: &Name, limit: u64) -> Result<Bytes, StoreError> {
        match self.read_plainly(name, limit).await {
            Err(error) if error.is_absent() => Err(self.confirm_absence(name, error).await),
            other => other,
        }
    }

    /// Exactly the bytes of `range`.
    pub async fn read_range(&self, name: &Name, range: Range<u64>) -> Result<Bytes, StoreError> {
        let read = match &self.behind {
            Behind::Directory(directory) => {
                let (directory, name, range) = (Arc::clone(directory), name.clone(), range.clone());
                self.blocking(move || directory.read_range(&name, range)).await
            }
            Behind::Cloud(cloud) => cloud::read_range(&**cloud, name, range.clone()).await,
            Behind::Remote(remote) => remote.read_range(name, range.clone()).await,
        };
        match read
            .map_err(|(failure, source)| self.error(Doing::Reading, name.as_str(), failure, Some(source)))
        {
            Ok(bytes) if bytes.len() as u64 != range.end.saturating_sub(range.start) => {
                Err(self.error(Doing::Reading, name.as_str(), Failure::Misbehaving, None))
            }
            Err(error) if error.is_absent() => Err(self.confirm_absence(name, error).await),
            other => other,
        }
    }

    /// Size and time of an object.
    pub async fn head(&self, name: &Name) -> Result<Listed, StoreError> {
        match self.head_plainly(name).await {
            Err(error) if error.is_absent() => Err(self.confirm_absence(name, error).await),
            other => other,
        }
    }

    /// Objects whose names begin with `prefix` and come behind `after`, in order of names.
    /// `prefix` ends with a slash: what is listed is a folder, as a directory has them.
    pub async fn list(&self, prefix: &str, after: Option<&Name>, limit: usize) -> Result<Page, StoreError> {
        let limit = limit.clamp(1, MAX_PAGE);
        let listed = match &self.behind {
            Behind::Directory(directory) => {
                let (directory, prefix, after) = (Arc::clone(directory), prefix.to_owned(), after.cloned());
                self.blocking(move || directory.list(&prefix, after.as_ref(), limit)).await
            }
            Behind::Cloud(cloud) => cloud::list(&**cloud, prefix, after, limit).await,
            Behind::Remote(remote) => remote.list(prefix, after, limit).await,
        };
        let page =
            listed.map_err(|(failure, source)| self.error(Doing::Listing, prefix, failure, Some(source)))?;
        let mut before = after;
        for object in &page.objects {
            if before.is_some_and(|before| *before >= object.name)
                || !object.name.as_str().starts_with(prefix)
            {
                return Err(self.error(Doing::Listing, object.name.as_str(), Failure::Misbehaving, None));
            }
            before = Some(&object.name);
        }
        Ok(page)
    }

    /// A whole listing, for kinds of which there are few.
    pub async fn list_all(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let mut all: Vec<Listed> = Vec::new();
        loop {
            let page = self.list(prefix, all.last().map(|last| &last.name), MAX_PAGE).await?;
            all.extend(page.objects);
            if !page.more {
                return Ok(all);
            }
        }
    }

    /// Deletes an object; one that is not there is as good as deleted.
    pub async fn delete(&self, name: &Name) -> Result<(), StoreError> {
        let deleted = match &self.behind {
            Behind::Directory(directory) => {
                let (directory, name) = (Arc::clone(directory), name.clone());
                self.blocking(move || directory.delete(&name)).await
            }
            Behind::Cloud(cloud) => cloud::delete(&**cloud, name).await,
            Behind::Remote(remote) => remote.delete(name).await,
        };
        match deleted {
            Ok(()) | Err((Failure::Absent, _)) => Ok(()),
            Err((failure, source)) => Err(self.error(Doing::Deleting, name.as_str(), failure, Some(source))),
        }
    }

    /// Removes what writers that are gone have left behind; says how many files that were. Object stores leave nothing.
    pub async fn sweep(&self) -> Result<usize, StoreError> {
        match &self.behind {
            Behind::Directory(directory) => {
                let directory = Arc::clone(directory);
                let swept = self.blocking(move || directory.sweep()).await;
                swept.map_err(|(failure, source)| self.error(Doing::Sweeping, "", failure, Some(source)))
            }
            Behind::Cloud(_) => Ok(0),
            Behind::Remote(remote) => {
                let swept = remote.sweep().await;
                swept.map_err(|(failure, source)| self.error(Doing::Sweeping, "", failure, Some(source)))
            }
        }
    }

    /// Tries out that nothing is ever overwritten: some stores ignore the condition of a put and overwrite in silence.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let random = crate::seal::random()
            .map_err(|error| self.error(Doing::Opening, "probe/", Failure::Failed, Some(Box::new(error))))?;
        let name = name::probe(u64::from_le_bytes(random));
        self.put(&name, Bytes::from_static(b"the first")).await?;
        let second = self.put(&name, Bytes::from_static(b"the second")).await;
        let kept = self.read_plainly(&name, MAX_OBJECT_BYTES).await?;
        self.delete(&name).await?;
        match second {
            Err(error) if error.failure == Failure::Present && kept == "the first" => Ok(()),
            Err(error) if error.failure != Failure::Present => Err(error),
            _ => Err(self.error(Doing::Writing, name.as_str(), Failure::Misbehaving, None)),
        }
    }

    async fn read_plainly(&self, name: &Name, limit: u64) -> Result<Bytes, StoreError> {
        let read = match &self.behind {
            Behind::Directory(directory) => {
                let (directory, name) = (Arc::clone(directory), name.clone());
                self.blocking(move || directory.read(&name, limit)).await
            }
            Behind::Cloud(cloud) => cloud::read(&**cloud, name, limit).await,
            Behind::Remote(remote) => remote.read(name, limit).await,
        };
        read.map_err(|(failure, source)| self.error(Doing::Reading, name.as_str(), failure, Some(source)))
    }

    async fn head_plainly(&self, name: &Name) -> Result<Listed, StoreError> {
        let head = match &self.behind {
            Behind::Directory(directory) => {
                let (directory, name) = (Arc::clone(directory), name.clone());
                self.blocking(move || directory.head(&name)).await
            }
            Behind::Cloud(cloud) => cloud::head(&**cloud, name).await,
            Behind::Remote(remote) => remote.head(name).await,
        };
        head.map_err(|(failure, source)| self.error(Doing::Reading, name.as_str(), failure, Some(source)))
    }

    /// An object is absent for certain only if the repository is there.
    async fn confirm_absence(&self, name: &Name, error: StoreError) -> StoreError {
        let format = name::format();
        if *name == format {
            return error;
        }
        match self.head_plainly(&format).await {
            Ok(_) => error,
            Err(missing) if missing.is_absent() => {
                self.error(Doing::Reading, name.as_str(), Failure::NoRepository, None)
            }
            Err(other) => other,
        }
    }
}

/// What the two kinds of stores return: the caller knows object and place.
pub(crate) type Failed = (Failure, Source);
