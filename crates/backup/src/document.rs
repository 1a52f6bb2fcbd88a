//! Small objects that people can read: one line that says what it is and gives the hash of the rest, then JSON.
//!
//! ```text
//! pgherd manifest 1 <BLAKE3 of the rest>
//! { … }
//! ```
//!
//! In an encrypted repository the first line goes on with ` key=<number> salt=<32 bytes>`, and the rest is sealed. The
//! hash is that of what is stored, so that damage can be found without keys.
//!
//! Left out: what the documents mean. Hazard: a field that is read as something else than was written; so a document has to
//! hash to what it says, and unknown fields are refused by those who define them.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::hash::{Hash, from_hex, to_hex};
use crate::name::Name;
use crate::seal::{Pieces, Protection, Salted, SealError};
use crate::store::{Put, Store, StoreError};

/// The version of everything in a repository. What is written by a newer one is refused, never guessed at.
pub const FORMAT_VERSION: u32 = 1;
/// The largest document is the manifest of a backup of some 300,000 packs.
pub const MAX_DOCUMENT_BYTES: u64 = 64 * 1024 * 1024;

/// Something that is stored as a document.
pub(crate) trait Document: Serialize + DeserializeOwned {
    /// What the first line calls it.
    const KIND: &'static str;

    /// Everything that JSON and types do not say.
    fn validate(&self) -> Result<(), String>;
}

/// What is wrong with the content of an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("it does not begin as an object of pgherd does")]
    NotOurs,
    #[error("it is a {found}, where a {wanted} should be")]
    OtherKind { found: String, wanted: &'static str },
    #[error(
        "it was written by a newer pgherd (format {found}, this one reads up to {FORMAT_VERSION}); use that one"
    )]
    Newer { found: u32 },
    #[error("its content is not what was written: the hash differs")]
    HashDiffers,
    #[error("it cannot be decrypted")]
    Sealed(#[from] SealError),
    #[error("it contradicts itself: {what}")]
    Malformed { what: String },
    #[error("it is another object than \"{wanted}\"")]
    OtherObject { wanted: String },
}

impl Damage {
    pub(crate) fn malformed(what: impl Into<String>) -> Damage {
        Damage::Malformed { what: what.into() }
    }
}

/// An object that cannot be had, or cannot be believed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("\"{object}\" in {place} cannot be used")]
    Damaged {
        object: String,
        place: String,
        #[source]
        damage: Damage,
    },
}

impl ReadError {
    pub(crate) fn damaged(store: &Store, name: &Name, damage: Damage) -> ReadError {
        ReadError::Damaged { object: name.to_string(), place: store.place().to_owned(), damage }
    }

    pub fn is_absent(&self) -> bool {
        matches!(self, ReadError::Store(error) if error.is_absent())
    }
}

/// An object that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("\"{object}\" cannot be written")]
    Refused {
        object: String,
        #[source]
        damage: Damage,
    },
}

impl WriteError {
    pub(crate) fn refused(name: &Name, damage: impl Into<Damage>) -> WriteError {
        WriteError::Refused { object: name.to_string(), damage: damage.into() }
    }
}

pub(crate) fn encode<D: Document>(
    document: &D,
    name: &Name,
    protection: &Protection,
) -> Result<Bytes, Damage> {
    document.validate().map_err(Damage::malformed)?;
    let mut body =
        serde_json::to_vec_pretty(document).map_err(|error| Damage::malformed(error.to_string()))?;
    body.push(b'\n');
    let kind = D::KIND;
    let about = format!("pgherd {kind} {FORMAT_VERSION}");
    let mut salted = String::new();
    if let Some(sealer) = protection.sealer(name.as_str())? {
        sealer.seal(Pieces::default().take(), about.as_bytes(), &mut body)?;
        let Salted { key, salt } = sealer.salted();
        salted = format!(" key={key} salt={}", to_hex(&salt));
    }
    let mut bytes = format!("{about} {}{salted}\n", Hash::of(&body)).into_bytes();
    bytes.append(&mut body);
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(Damage::malformed(format!("{} bytes, the limit is {MAX_DOCUMENT_BYTES}", bytes.len())));
    }
    Ok(bytes.into())
}

pub(crate) fn decode<D: Document>(bytes: &[u8], name: &Name, protection: &Protection) -> Result<D, Damage> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or(Damage::NotOurs)?;
    let (line, body) = (&bytes[..end], &bytes[end + 1..]);
    let line = std::str::from_utf8(line).map_err(|_| Damage::NotOurs)?;
    let mut words = line.split(' ');
    if words.next() != Some("pgherd") {
        return Err(Damage::NotOurs);
    }
    let kind = words.next().ok_or(Damage::NotOurs)?;
    if kind != D::KIND {
        return Err(Damage::OtherKind { found: kind.to_owned(), wanted: D::KIND });
    }
    let version = words.next().and_then(number).ok_or(Damage::NotOurs)?;
    if version > FORMAT_VERSION {
        return Err(Damage::Newer { found: version });
    }
    if version == 0 {
        return Err(Damage::NotOurs);
    }
    let hash: Hash = words.next().and_then(|word| word.parse().ok()).ok_or(Damage::NotOurs)?;
    let salted = match (words.next(), words.next()) {
        (None, None) => None,
        (Some(key), Some(salt)) => {
            let key = key.strip_prefix("key=").and_then(number).ok_or(Damage::NotOurs)?;
            let salt = salt.strip_prefix("salt=").and_then(from_hex).ok_or(Damage::NotOurs)?;
            Some(Salted { key, salt })
        }
        _ => return Err(Damage::NotOurs),
    };
    if words.next().is_some() {
        return Err(Damage::NotOurs);
    }
    if Hash::of(body) != hash {
        return Err(Damage::HashDiffers);
    }
    let mut body = body.to_vec();
    if let Some(opener) = protection.opener(name.as_str(), salted)? {
        opener.open(0, format!("pgherd {kind} {version}").as_bytes(), &mut body)?;
    }
    let document: D = serde_json::from_slice(&body).map_err(|error| Damage::malformed(error.to_string()))?;
    document.validate().map_err(Damage::malformed)?;
    Ok(document)
}

/// A number in its one spelling.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number: &u32| number.to_string() == text)
}

pub(crate) async fn put<D: Document>(
    store: &Store,
    name: &Name,
    document: &D,
    protection: &Protection,
) -> Result<Put, WriteError> {
    let bytes = encode(document, name, protection).map_err(|damage| WriteError::refused(name, damage))?;
    Ok(store.put(name, bytes).await?)
}

pub(crate) async fn read<D: Document>(
    store: &Store,
    name: &Name,
    protection: &Protection,
) -> Result<D, ReadError> {
    let bytes = store.read(name, MAX_DOCUMENT_BYTES).await?;
    decode(&bytes, name, protection).map_err(|damage| ReadError::damaged(store, name, damage))
}

/// `None` where it is absent for certain.
pub(crate) async fn find<D: Document>(
    store: &Store,
    name: &Name,
    protection: &Protection,
) -> Result<Option<D>, ReadError> {
    match read(store, name, protection).await {
        Ok(document) => Ok(Some(document)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::test_protection;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Note {
        text: String,
    }

    impl Document for Note {
        const KIND: &'static str = "note";
        fn validate(&self) -> Result<(), String> {
            if self.text.is_empty() { Err("there is no text".to_owned()) } else { Ok(()) }
        }
    }

    fn name() -> Name {
        "a/note".parse().unwrap()
    }

    #[test]
    fn every_changed_byte_of_a_document_is_noticed() {
        let note = Note { text: "as it was".to_owned() };
        for protection in [Protection::Plain, test_protection(&[1])] {
            let bytes = encode(&note, &name(), &protection).unwrap();
            assert_eq!(decode::<Note>(&bytes, &name(), &protection).unwrap(), note);
            for at in 0..bytes.len() {
                for flip in [0x01, 0x20, 0x80] {
                    let mut changed = bytes.to_vec();
                    changed[at] ^= flip;
                    let read = decode::<Note>(&changed, &name(), &protection);
                    assert!(read.is_err(), "byte {at} ^ {flip:#x} was not noticed: {read:?}");
                }
            }
            for cut in 0..bytes.len() {
                assert!(decode::<Note>(&bytes[..cut], &name(), &protection).is_err(), "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_newer_format_is_refused_by_its_number() {
        let bytes = encode(&Note { text: "x".to_owned() }, &name(), &Protection::Plain).unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let newer = text.replacen("note 1 ", "note 2 ", 1);
        let refused = decode::<Note>(newer.as_bytes(), &name(), &Protection::Plain).unwrap_err();
        assert_eq!(refused, Damage::Newer { found: 2 });
        assert!(refused.to_string().contains("newer pgherd"), "{refused}");
        let other = text.replacen("note", "page", 1);
        let refused = decode::<Note>(other.as_bytes(), &name(), &Protection::Plain).unwrap_err();
        assert_eq!(refused.to_string(), "it is a page, where a note should be");
    }

    #[test]
    fn what_would_not_be_read_is_not_written() {
        let refused = encode(&Note { text: String::new() }, &name(), &Protection::Plain).unwrap_err();
        assert_eq!(refused, Damage::malformed("there is no text"));
    }
}
