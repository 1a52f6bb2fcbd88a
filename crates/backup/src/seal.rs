//! Encryption of one object: AES-256-GCM under a key that belongs to this object alone.
//!
//! # Why no nonce is ever used twice
//!
//! GCM breaks when one key sees one nonce twice. So the key of an object is derived (HKDF-SHA256) from a data key, from
//! 32 random bytes that are drawn when its `Sealer` is made, and from the object's name. Two sealers have the same key
//! only if they drew the same 256 bits for the same name under the same data key. Within one sealer the nonce is the number
//! of the piece, each number can be used once, and the sealer can neither be copied nor made again from what is stored:
//! from the stored salt only an `Opener` can be made, which does not encrypt. Nothing that survives a crash has to be
//! remembered for this, and it holds for any number of writers, hosts and repetitions. A machine that is copied while it
//! runs, so that both halves draw the same numbers, would have to write different pieces under the same name; a backup's
//! name is taken once, by its intent, and a WAL segment's content is decided by its name.
//!
//! What is sealed also covers the number of the piece and what the caller says about the object, so that pieces cannot
//! change places.
//!
//! Left out: where data keys come from (`keys`). Hazard: whoever holds a data key reads everything; keys have no `Debug`
//! that shows them.

use std::collections::BTreeMap;
use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::rand::{SecureRandom, SystemRandom};

/// What sealing adds to each piece.
pub const TAG_BYTES: usize = MAX_TAG_LEN;
pub const SALT_BYTES: usize = 32;
pub const KEY_BYTES: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("the operating system gave no random numbers")]
    NoRandomness,
    #[error("encryption failed")]
    NotSealed,
    #[error("it was not encrypted with data key {key}, or was changed since")]
    NotOpened { key: u32 },
    #[error(
        "it is encrypted with data key {key}, which is not among the keys of this repository that were opened"
    )]
    UnknownKey { key: u32 },
    #[error("it is encrypted, and the repository has no keys")]
    NoKeys,
    #[error("it is not encrypted, and everything in this repository should be")]
    NotEncrypted,
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], SealError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| SealError::NoRandomness)?;
    Ok(bytes)
}

/// What objects' keys are derived from. Rotation adds one; the older ones open what was written with them.
#[derive(Clone, PartialEq, Eq)]
pub struct DataKey(pub(crate) [u8; KEY_BYTES]);

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(…)")
    }
}

/// The data keys of a repository, by number; the last one is for what is written from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRing {
    pub(crate) keys: BTreeMap<u32, DataKey>,
}

impl KeyRing {
    /// Number of the key that is used for writing.
    pub fn current(&self) -> Option<u32> {
        self.keys.last_key_value().map(|(number, _)| *number)
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// How objects of a repository are protected: all of them are encrypted, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protection {
    Plain,
    Encrypted(KeyRing),
}

/// What an object says about its encryption, in the open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salted {
    pub key: u32,
    pub salt: [u8; SALT_BYTES],
}

impl Protection {
    /// For a new object of this name.
    pub(crate) fn sealer(&self, name: &str) -> Result<Option<Sealer>, SealError> {
        let Protection::Encrypted(ring) = self else { return Ok(None) };
        let (number, key) = ring.keys.last_key_value().ok_or(SealError::NoKeys)?;
        let salted = Salted { key: *number, salt: random()? };
        Ok(Some(Sealer { key: derive(key, &salted, name)?, salted }))
    }

    /// For an object that is there. An object that is not encrypted although the repository is was put there by somebody
    /// without the keys.
    pub(crate) fn opener(&self, name: &str, salted: Option<Salted>) -> Result<Option<Opener>, SealError> {
        match (self, salted) {
            (Protection::Plain, None) => Ok(None),
            (Protection::Plain, Some(_)) => Err(SealError::NoKeys),
            (Protection::Encrypted(_), None) => Err(SealError::NotEncrypted),
            (Protection::Encrypted(ring), Some(salted)) => {
                let key = ring.keys.get(&salted.key).ok_or(SealError::UnknownKey { key: salted.key })?;
                Ok(Some(Opener { key: derive(key, &salted, name)?, number: salted.key }))
            }
        }
    }
}

/// Encrypts the pieces of one new object. See the head of this file for why it is not `Clone`.
pub(crate) struct Sealer {
    key: LessSafeKey,
    salted: Salted,
}

/// The right to use one number of an object once.
#[derive(Debug)]
pub(crate) struct Piece(u32);

impl Piece {
    pub(crate) fn number(&self) -> u32 {
        self.0
    }
}

/// Hands out the numbers of one object's pieces, each once.
#[derive(Default)]
pub(crate) struct Pieces(u32);

impl Pieces {
    pub(crate) fn take(&mut self) -> Piece {
        let piece = Piece(self.0);
        // An object has some thousands of pieces; four thousand million do not fit into the largest one.
        self.0 += 1;
        piece
    }
}

impl Sealer {
    pub(crate) fn salted(&self) -> Salted {
        self.salted
    }

    /// `content` becomes its encrypted form, longer by [`TAG_BYTES`].
    pub(crate) fn seal(&self, piece: Piece, about: &[u8], content: &mut Vec<u8>) -> Result<(), SealError> {
        let nonce = nonce(piece.0);
        self.key.seal_in_place_append_tag(nonce, Aad::from(about), content).map_err(|_| SealError::NotSealed)
    }
}

pub(crate) struct Opener {
    key: LessSafeKey,
    number: u32,
}

impl Opener {
    pub(crate) fn open(&self, piece: u32, about: &[u8], content: &mut Vec<u8>) -> Result<(), SealError> {
        let wrong = SealError::NotOpened { key: self.number };
        let plain = self.key.open_in_place(nonce(piece), Aad::from(about), content).map_err(|_| wrong)?;
        let bytes = plain.len();
        content.truncate(bytes);
        Ok(())
    }
}

fn nonce(piece: u32) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 4..].copy_from_slice(&piece.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn derive(key: &DataKey, salted: &Salted, name: &str) -> Result<LessSafeKey, SealError> {
    let derived = Salt::new(HKDF_SHA256, &salted.salt).extract(&key.0);
    let about = [b"pgherd object ".as_slice(), name.as_bytes()];
    let key = derived.expand(&about, &AES_256_GCM).map_err(|_| SealError::NotSealed)?;
    Ok(LessSafeKey::new(UnboundKey::from(key)))
}

#[cfg(test)]
pub(crate) fn test_protection(numbers: &[u32]) -> Protection {
    let key = |number: &u32| (*number, DataKey([*number as u8; KEY_BYTES]));
    Protection::Encrypted(KeyRing { keys: numbers.iter().map(key).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_at_its_place_only() {
        let protection = test_protection(&[1, 2]);
        let sealer = protection.sealer("a/b").unwrap().unwrap();
        let mut pieces = Pieces::default();
        let mut sealed = Vec::new();
        for _ in 0..2 {
            let mut content = b"the same content".to_vec();
            sealer.seal(pieces.take(), b"about", &mut content).unwrap();
            sealed.push(content);
        }
        assert_ne!(sealed[0], sealed[1], "two pieces of one content must not look the same");
        let salted = sealer.salted();
        assert_eq!(salted.key, 2, "the newest key is the one to write with");
        let open = |protection: &Protection, name: &str, salted, piece, about: &[u8]| {
            let opener = protection.opener(name, Some(salted))?.unwrap();
            let mut content = sealed[0].clone();
            opener.open(piece, about, &mut content).map(|()| content)
        };
        assert_eq!(open(&protection, "a/b", salted, 0, b"about").unwrap(), b"the same content");
        let wrong = Err(SealError::NotOpened { key: 2 });
        assert_eq!(open(&protection, "a/b", salted, 1, b"about"), wrong, "another piece");
        assert_eq!(open(&protection, "a/c", salted, 0, b"about"), wrong, "another object");
        assert_eq!(open(&protection, "a/b", salted, 0, b"other"), wrong, "another header");
        let first = Salted { key: 1, ..salted };
        assert_eq!(open(&protection, "a/b", first, 0, b"about"), Err(SealError::NotOpened { key: 1 }));
        let lost = Salted { key: 3, ..salted };
        assert_eq!(open(&protection, "a/b", lost, 0, b"about"), Err(SealError::UnknownKey { key: 3 }));
    }

    #[test]
    fn two_sealers_of_one_name_have_different_keys() {
        let protection = test_protection(&[1]);
        let seal = || {
            let mut content = b"x".to_vec();
            let sealer = protection.sealer("a").unwrap().unwrap();
            sealer.seal(Pieces::default().take(), b"", &mut content).unwrap();
            content
        };
        assert_ne!(seal(), seal());
    }

    #[test]
    fn encrypted_and_plain_are_not_mixed() {
        let salted = Salted { key: 1, salt: [0; SALT_BYTES] };
        assert_eq!(Protection::Plain.opener("a", Some(salted)).err(), Some(SealError::NoKeys));
        assert_eq!(test_protection(&[1]).opener("a", None).err(), Some(SealError::NotEncrypted));
    }

    #[test]
    fn no_key_is_printed() {
        let printed = format!("{:?}", test_protection(&[77]));
        assert!(!printed.contains("77, 77") && printed.contains("DataKey(…)"), "{printed}");
    }
}
