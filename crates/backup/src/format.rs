//! The first object of a repository: which one it is, in which format, and whether it is encrypted.
//!
//! A [`Repository`] is what everything else works on: a store whose format was read, with its keys. The format object is
//! written last when a repository is made, so that there is none, or a complete one.
//!
//! Left out: everything about clusters. Hazard: a format that is guessed at restores nonsense, so a number that is not
//! known is refused, and bytes of today's format lie in `testdata/` for every later version to read.

use jiff::Timestamp;
use pgherd_core::types::SystemId;
use serde::{Deserialize, Serialize};

use crate::document::{self, Damage, Document, ReadError, WriteError};
use crate::hash::{from_hex, to_hex};
use crate::keys::{ITERATIONS, Keys, KeysError, Secret};
use crate::name::{self, Name};
use crate::seal::{Protection, SealError};
use crate::store::{Failure, Put, Store, StoreError};

/// What the format object says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// 16 random bytes. Two repositories that were once copies of each other have the same.
    pub repository: String,
    pub encrypted: bool,
    pub created: Timestamp,
}

impl Document for Format {
    const KIND: &'static str = "format";

    fn validate(&self) -> Result<(), String> {
        match from_hex::<16>(&self.repository) {
            Some(_) => Ok(()),
            None => Err(format!("\"{}\" is not a repository's id", self.repository)),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("there is no repository in {place}")]
    NoRepository { place: String },
    #[error("there is a repository in {place} already")]
    Exists { place: String },
    #[error("the repository in {place} is encrypted: a passphrase file or a key file is needed")]
    SecretNeeded { place: String },
    #[error("the repository in {place} is not encrypted, and a passphrase or key was given for it")]
    NotEncrypted { place: String },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// A repository that was opened. Clones share the store.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Store,
    format: Format,
    keys: Option<Keys>,
    protection: Protection,
}

impl Repository {
    /// Makes a repository where there is none, after the store has shown that it overwrites nothing.
    pub async fn create(
        store: Store,
        secret: Option<&Secret>,
        now: Timestamp,
    ) -> Result<Repository, OpenError> {
        Repository::create_with(store, secret, now, ITERATIONS).await
    }

    pub(crate) async fn create_with(
        store: Store,
        secret: Option<&Secret>,
        now: Timestamp,
        iterations: u32,
    ) -> Result<Repository, OpenError> {
        let place = || store.place().to_owned();
        match store.head(&name::format()).await {
            Ok(_) => return Err(OpenError::Exists { place: place() }),
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error.into()),
        }
        store.probe().await?;
        let repository = to_hex(&crate::seal::random::<16>()?);
        // The keys lie under the repository's own id: those of somebody who was slower are nobody's.
        let keys = match secret {
            Some(secret) => Some(Keys::create(&store, &repository, secret, iterations).await?),
            None => None,
        };
        let format = Format { repository, encrypted: secret.is_some(), created: now };
        match document::put(&store, &name::format(), &format, &Protection::Plain).await {
            Ok(Put::Created | Put::Same) => Ok(Repository::with(store, format, keys)),
            Err(WriteError::Store(error)) if error.failure == Failure::Present => {
                if keys.is_some() {
                    store.delete(&name::keys(&format.repository, 1)).await?;
                }
                Err(OpenError::Exists { place: place() })
            }
            Err(error) => Err(error.into()),
        }
    }

    pub async fn open(store: Store, secret: Option<&Secret>) -> Result<Repository, OpenError> {
        let place = store.place().to_owned();
        let Some(format) = document::find::<Format>(&store, &name::format(), &Protection::Plain).await?
        else {
            return Err(OpenError::NoRepository { place });
        };
        let keys = match (format.encrypted, secret) {
            (true, Some(secret)) => Some(Keys::open(&store, &format.repository, secret).await?),
            (true, None) => return Err(OpenError::SecretNeeded { place }),
            // Whoever gives a key believes that nobody else can read what is written.
            (false, Some(_)) => return Err(OpenError::NotEncrypted { place }),
            (false, None) => None,
        };
        Ok(Repository::with(store, format, keys))
    }

    fn with(store: Store, format: Format, keys: Option<Keys>) -> Repository {
        let protection = match &keys {
            Some(keys) => Protection::Encrypted(keys.ring().clone()),
            None => Protection::Plain,
        };
        Repository { store, format, keys, protection }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// For somebody who has a thread of his own; see [`Store::on_own_thread`].
    #[must_use]
    pub fn on_own_thread(&self) -> Repository {
        Repository { store: self.store.on_own_thread(), ..self.clone() }
    }

    pub fn format(&self) -> &Format {
        &self.format
    }

    /// Of an encrypted repository.
    pub fn keys(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    pub(crate) fn protection(&self) -> &Protection {
        &self.protection
    }

    /// The clusters of which it has anything, in order of their names as texts.
    pub async fn clusters(&self) -> Result<Vec<SystemId>, ReadError> {
        let mut clusters = Vec::new();
        let mut after: Option<Name> = None;
        loop {
            let page = self.store.list(name::CLUSTERS, after.as_ref(), 1).await?;
            let Some(object) = page.objects.into_iter().next() else { return Ok(clusters) };
            let found = name::cluster_of(&object.name).ok_or_else(|| {
                let damage = Damage::malformed("it has no name of an object of a cluster".to_owned());
                ReadError::damaged(&self.store, &object.name, damage)
            })?;
            clusters.push(found.0);
            // Of one cluster the first object is enough.
            after = Some(found.last());
        }
    }

    /// What change hashes are keyed with: nobody who can only write into the database knows it, so that nobody can make
    /// two contents that look the same to them.
    pub(crate) fn change_key(&self) -> [u8; 32] {
        blake3::derive_key("pgherd change hashes 1", self.format.repository.as_bytes())
    }
}

#[cfg(test)]
mod tests;
