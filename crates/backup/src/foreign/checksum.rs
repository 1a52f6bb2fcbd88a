//! Checksums of files as other programs write them.
//!
//! Left out: our own, which are in `hash`. Hazard: SHA-1 and CRC-32C find damage and nothing else; who can write into such a place can
//! make any file pass.

use std::fmt;

use aws_lc_rs::digest::{self, Context};
use crc_fast::{CrcAlgorithm, Digest};

use crate::hash::to_hex;

/// What the content of a file should come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    Sha1([u8; 20]),
    Crc32c(u32),
    /// With the bits of its digest.
    Sha2(u16, Box<[u8]>),
}

/// Content that comes piece by piece.
pub enum Checking {
    Sha1(Context),
    Crc32c(Box<Digest>),
    Sha2(u16, Context),
}

impl Check {
    /// Of as many bits as there are; `None` where SHA-2 has no such digest.
    pub(super) fn sha2(bits: u16, digest: Vec<u8>) -> Option<Check> {
        (sha2(bits).is_some() && digest.len() * 8 == usize::from(bits))
            .then(|| Check::Sha2(bits, digest.into_boxed_slice()))
    }

    /// A checking of the same kind.
    pub fn begin(&self) -> Checking {
        match self {
            Check::Sha1(_) => Checking::Sha1(Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY)),
            Check::Crc32c(_) => Checking::Crc32c(Box::new(Digest::new(CrcAlgorithm::Crc32Iscsi))),
            Check::Sha2(bits, _) => {
                Checking::Sha2(*bits, Context::new(sha2(*bits).unwrap_or(&digest::SHA256)))
            }
        }
    }
}

fn sha2(bits: u16) -> Option<&'static digest::Algorithm> {
    match bits {
        224 => Some(&digest::SHA224),
        256 => Some(&digest::SHA256),
        384 => Some(&digest::SHA384),
        512 => Some(&digest::SHA512),
        _ => None,
    }
}

impl Checking {
    pub fn update(&mut self, content: &[u8]) {
        match self {
            Checking::Sha1(context) | Checking::Sha2(_, context) => context.update(content),
            Checking::Crc32c(digest) => digest.update(content),
        }
    }

    pub fn finish(self) -> Check {
        match self {
            Checking::Sha1(context) => {
                let mut sha1 = [0; 20];
                sha1.copy_from_slice(context.finish().as_ref());
                Check::Sha1(sha1)
            }
            Checking::Crc32c(digest) => Check::Crc32c(digest.finalize() as u32),
            Checking::Sha2(bits, context) => Check::Sha2(bits, context.finish().as_ref().into()),
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Check::Sha1(digest) => write!(f, "SHA-1 {}", to_hex(digest)),
            Check::Crc32c(sum) => write!(f, "CRC-32C {sum:08x}"),
            Check::Sha2(bits, digest) => write!(f, "SHA-{bits} {}", to_hex(digest)),
        }
    }
}

/// SHA-1 as 40 digits; upper and lower case are the same.
pub(super) fn sha1(digits: &str) -> Option<[u8; 20]> {
    hex(digits)?.try_into().ok()
}

pub(super) fn hex(digits: &str) -> Option<Vec<u8>> {
    let bytes = digits.as_bytes();
    (bytes.len().is_multiple_of(2) && bytes.iter().all(u8::is_ascii_hexdigit)).then_some(())?;
    bytes.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
