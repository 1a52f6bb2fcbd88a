//! The data keys of a repository, wrapped by a key that only the operator has.
//!
//! A document holds all data keys, each sealed with a key derived from a passphrase (PBKDF2) or from a key file, and a
//! fresh salt. Rotation writes the next generation of that document: with one more data key, with another secret, or
//! both. Nothing else is rewritten: an object names the data key that it was written with. Generations are objects of their
//! own and not part of the format object, so that those an old passphrase opens can be deleted, although nothing in a
//! repository is ever overwritten.
//!
//! Left out: where a passphrase or key file lies (the herd file says). Hazard: whoever loses the secret loses every backup;
//! the old generations are deleted only after the new one was read back with the new secret.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;

use aws_lc_rs::pbkdf2;
use serde::{Deserialize, Serialize};

use crate::document::{self, Document, ReadError, WriteError};
use crate::hash::{from_hex, to_hex};
use crate::name::{self, Name};
use crate::seal::{DataKey, KEY_BYTES, KeyRing, Pieces, Protection, SALT_BYTES, Salted, SealError, Sealer};
use crate::store::{Put, Store, StoreError};

/// Rounds of PBKDF2-HMAC-SHA256, as OWASP advises since 2023: a third of a second for whoever has the passphrase.
pub const ITERATIONS: u32 = 600_000;
/// More would only make a damaged document hang.
const MAX_ITERATIONS: u32 = 100_000_000;
/// One data key for each month of a century.
const MAX_KEYS: usize = 1200;
/// Shorter passphrases can be guessed whatever is done with them.
pub const MIN_PASSPHRASE_BYTES: usize = 12;

/// What opens a repository. It is not printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    Passphrase(String),
    Key([u8; KEY_BYTES]),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Secret::Passphrase(_) => "Secret::Passphrase(…)",
            Secret::Key(_) => "Secret::Key(…)",
        })
    }
}

/// A file that is no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    #[error("a passphrase has at least {MIN_PASSPHRASE_BYTES} bytes on one line")]
    BadPassphrase,
    #[error("a key file has 64 lower-case hexadecimal digits on one line, as `openssl rand -hex 32` prints")]
    BadKey,
}

impl Secret {
    /// From the content of a passphrase file: its one line.
    pub fn passphrase(content: &str) -> Result<Secret, SecretError> {
        let line = content.strip_suffix('\n').unwrap_or(content);
        if line.len() < MIN_PASSPHRASE_BYTES || line.contains(['\n', '\r', '\0']) {
            return Err(SecretError::BadPassphrase);
        }
        Ok(Secret::Passphrase(line.to_owned()))
    }

    /// From the content of a key file.
    pub fn key(content: &str) -> Result<Secret, SecretError> {
        let line = content.strip_suffix('\n').unwrap_or(content);
        from_hex(line).map(Secret::Key).ok_or(SecretError::BadKey)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "the keys of the repository in {place} cannot be opened: the passphrase or key file is not the one they were wrapped with (generation {generation})"
    )]
    WrongSecret { place: String, generation: u32 },
    #[error("the keys of the repository in {place} are wrapped with a {wanted}, and a {given} was given")]
    OtherKindOfSecret { place: String, wanted: &'static str, given: &'static str },
    #[error("the repository in {place} is encrypted, and none of its key objects is there")]
    NoKeys { place: String },
    #[error("somebody else has rotated the keys of the repository in {place} meanwhile; open it again")]
    Rotated { place: String },
    #[error("keys cannot be wrapped")]
    Seal(#[from] SealError),
}

/// How the key that wraps the others is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Derivation {
    Passphrase { iterations: u32 },
    Key {},
}

impl Derivation {
    fn describe(&self) -> &'static str {
        match self {
            Derivation::Passphrase { .. } => "passphrase",
            Derivation::Key {} => "key file",
        }
    }
}

/// One generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wrapped {
    repository: String,
    generation: u32,
    derivation: Derivation,
    salt: String,
    /// By number, each sealed.
    keys: BTreeMap<u32, String>,
}

impl Document for Wrapped {
    const KIND: &'static str = "keys";

    fn validate(&self) -> Result<(), String> {
        if self.keys.is_empty() || self.keys.len() > MAX_KEYS {
            return Err(format!("{} keys, the limits are 1 and {MAX_KEYS}", self.keys.len()));
        }
        if from_hex::<SALT_BYTES>(&self.salt).is_none() {
            return Err("the salt is not 32 bytes".to_owned());
        }
        if self.keys.values().any(|key| from_hex::<WRAPPED_BYTES>(key).is_none()) {
            return Err(format!("a wrapped key is not {WRAPPED_BYTES} bytes"));
        }
        match self.derivation {
            Derivation::Passphrase { iterations } if !(1..=MAX_ITERATIONS).contains(&iterations) => {
                Err(format!("{iterations} iterations"))
            }
            _ => Ok(()),
        }
    }
}

const WRAPPED_BYTES: usize = KEY_BYTES + crate::seal::TAG_BYTES;

/// The keys of one repository, opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    repository: String,
    generation: u32,
    ring: KeyRing,
}

impl Keys {
    pub fn ring(&self) -> &KeyRing {
        &self.ring
    }

    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The first generation, with one data key.
    pub(crate) async fn create(
        store: &Store,
        repository: &str,
        secret: &Secret,
        iterations: u32,
    ) -> Result<Keys, KeysError> {
        let keys = BTreeMap::from([(1, DataKey(crate::seal::random()?))]);
        let first = Keys { repository: repository.to_owned(), generation: 1, ring: KeyRing { keys } };
        first.write(store, secret, iterations).await?;
        Ok(first)
    }

    /// The newest generation that the secret opens. A listing may be late, so it is asked for the next one by name.
    pub(crate) async fn open(store: &Store, repository: &str, secret: &Secret) -> Result<Keys, KeysError> {
        let listed = store.list_all(&name::all_keys(repository)).await?;
        let mut newest =
            listed.iter().filter_map(|listed| listed.name.last().parse().ok()).max().unwrap_or(0);
        let mut found = None;
        loop {
            let next = newest + u32::from(found.is_some() || newest == 0);
            let name = name::keys(repository, next);
            match document::find::<Wrapped>(store, &name, &Protection::Plain).await? {
                Some(wrapped) if wrapped.generation == next && wrapped.repository == repository => {
                    newest = next;
                    found = Some(wrapped);
                }
                Some(_) => {
                    let wanted = name.to_string();
                    let damage = document::Damage::OtherObject { wanted };
                    return Err(ReadError::damaged(store, &name, damage).into());
                }
                None => break,
            }
        }
        let Some(wrapped) = found else { return Err(KeysError::NoKeys { place: store.place().to_owned() }) };
        let wrong = match unwrap(&wrapped, secret, store) {
            Err(wrong @ (KeysError::WrongSecret { .. } | KeysError::OtherKindOfSecret { .. })) => wrong,
            opened => return opened,
        };
        // The former secret is as good until its generation is retired: hosts get the new one one after the other.
        let mut older: Vec<&Name> = listed.iter().map(|listed| &listed.name).collect();
        older.retain(|name| **name < name::keys(repository, newest));
        for name in older.into_iter().rev() {
            let Some(wrapped) = document::find::<Wrapped>(store, name, &Protection::Plain).await? else {
                continue;
            };
            let is_its_own =
                wrapped.repository == repository && *name == name::keys(repository, wrapped.generation);
            if let (true, Ok(keys)) = (is_its_own, unwrap(&wrapped, secret, store)) {
                return Ok(keys);
            }
        }
        Err(wrong)
    }

    /// Writes the next generation: with one more data key if `add` says so, wrapped with `secret`, which may be another
    /// one. What was written before stays readable. The former secret opens the former generation until [`Keys::retire`], and with it
    /// everything but what a data key sealed that was added since.
    pub async fn rotate(&self, store: &Store, secret: &Secret, add: bool) -> Result<Keys, KeysError> {
        self.rotate_with(store, secret, add, ITERATIONS).await
    }

    pub(crate) async fn rotate_with(
        &self,
        store: &Store,
        secret: &Secret,
        add: bool,
        iterations: u32,
    ) -> Result<Keys, KeysError> {
        let mut next = Keys { generation: self.generation + 1, ..self.clone() };
        if add {
            let number = self.ring.current().unwrap_or(0) + 1;
            next.ring.keys.insert(number, DataKey(crate::seal::random()?));
        }
        next.write(store, secret, iterations).await?;
        Ok(next)
    }

    /// Deletes the generations before this one, after this one was read back with `secret`.
    pub async fn retire(&self, store: &Store, secret: &Secret) -> Result<usize, KeysError> {
        let newest = Keys::open(store, &self.repository, secret).await?;
        if newest != *self {
            return Err(KeysError::Rotated { place: store.place().to_owned() });
        }
        let own = name::keys(&self.repository, self.generation);
        let listed = store.list_all(&name::all_keys(&self.repository)).await?;
        // A former secret opens a former generation, and is the one that has to go.
        if listed.iter().any(|other| other.name > own) {
            return Err(KeysError::Rotated { place: store.place().to_owned() });
        }
        let mut deleted = 0;
        for old in listed {
            if old.name < own {
                store.delete(&old.name).await?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    async fn write(&self, store: &Store, secret: &Secret, iterations: u32) -> Result<(), KeysError> {
        let name = name::keys(&self.repository, self.generation);
        let derivation = match secret {
            Secret::Passphrase(_) => Derivation::Passphrase { iterations },
            Secret::Key(_) => Derivation::Key {},
        };
        let mut wrapped = Wrapped {
            repository: self.repository.clone(),
            generation: self.generation,
            derivation,
            salt: String::new(),
            keys: BTreeMap::new(),
        };
        // The salt is drawn by the sealer, which lets nobody choose it.
        let (sealer, salt) = sealer(&wrapped, secret, &name)?;
        wrapped.salt = salt;
        let mut pieces = Pieces::default();
        for (number, key) in &self.ring.keys {
            let mut content = key.0.to_vec();
            sealer.seal(pieces.take(), &about(&wrapped, *number), &mut content)?;
            wrapped.keys.insert(*number, to_hex(&content));
        }
        let written = document::put(store, &name, &wrapped, &Protection::Plain).await;
        match written {
            Ok(Put::Created | Put::Same) => Ok(()),
            Err(WriteError::Store(error)) if error.failure == crate::store::Failure::Present => {
                Err(KeysError::Rotated { place: store.place().to_owned() })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// What a wrapped key is sealed together with.
fn about(wrapped: &Wrapped, number: u32) -> Vec<u8> {
    format!("pgherd data key {number} of {}", wrapped.repository).into_bytes()
}

/// The name of what wraps: with the repository and the generation, so that nothing else has the same.
fn wrapping_name(name: &Name) -> String {
    format!("wrapping {name}")
}

/// What the keys of this generation are sealed and opened by.
fn wrapping(wrapped: &Wrapped, secret: &Secret) -> Protection {
    let stretched = stretch(&wrapped.derivation, secret, wrapped.repository.as_bytes());
    Protection::Encrypted(KeyRing { keys: BTreeMap::from([(0, stretched)]) })
}

fn sealer(wrapped: &Wrapped, secret: &Secret, name: &Name) -> Result<(Sealer, String), SealError> {
    let sealer = wrapping(wrapped, secret).sealer(&wrapping_name(name))?.ok_or(SealError::NoKeys)?;
    let salt = to_hex(&sealer.salted().salt);
    Ok((sealer, salt))
}

/// The salt of the stretching is the repository's random id: it has to differ between repositories, and the same
/// passphrase in two generations of one is the same passphrase anyhow.
fn stretch(derivation: &Derivation, secret: &Secret, salt: &[u8]) -> DataKey {
    match secret {
        Secret::Key(key) => DataKey(*key),
        Secret::Passphrase(passphrase) => {
            let iterations = match derivation {
                Derivation::Passphrase { iterations } => *iterations,
                Derivation::Key {} => ITERATIONS,
            };
            let mut key = [0; KEY_BYTES];
            let rounds = NonZeroU32::new(iterations).unwrap_or(NonZeroU32::MIN);
            pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, salt, passphrase.as_bytes(), &mut key);
            DataKey(key)
        }
    }
}

fn unwrap(wrapped: &Wrapped, secret: &Secret, store: &Store) -> Result<Keys, KeysError> {
    let given = match secret {
        Secret::Passphrase(_) => "passphrase",
        Secret::Key(_) => "key file",
    };
    let wanted = wrapped.derivation.describe();
    if given != wanted {
        return Err(KeysError::OtherKindOfSecret { place: store.place().to_owned(), wanted, given });
    }
    let wrong = || KeysError::WrongSecret { place: store.place().to_owned(), generation: wrapped.generation };
    let name = name::keys(&wrapped.repository, wrapped.generation);
    let salt = from_hex(&wrapped.salt).ok_or_else(wrong)?;
    let opener = wrapping(wrapped, secret).opener(&wrapping_name(&name), Some(Salted { key: 0, salt }))?;
    let opener = opener.ok_or(SealError::NoKeys)?;
    let mut keys = BTreeMap::new();
    for (piece, (number, content)) in (0..).zip(&wrapped.keys) {
        let mut content = from_hex::<WRAPPED_BYTES>(content).map(|bytes| bytes.to_vec()).unwrap_or_default();
        opener.open(piece, &about(wrapped, *number), &mut content).map_err(|_| wrong())?;
        keys.insert(*number, DataKey(content.try_into().map_err(|_| wrong())?));
    }
    Ok(Keys {
        repository: wrapped.repository.clone(),
        generation: wrapped.generation,
        ring: KeyRing { keys },
    })
}
