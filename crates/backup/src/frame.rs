//! One frame: up to 1 MiB of content, compressed if that helps, encrypted if the repository is, with the hash of the
//! content.
//!
//! Left out: where frames lie in an object (`container`), and what their content is. Hazard: content that differs from what
//! was written. So the hash is that of the plain content, and nothing leaves this module that does not have it: a mistake
//! of the compressor, of the cipher or of a disk looks the same.

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

use crate::breakage::{Broken, broken};
use crate::document::Damage;
use crate::hash::Hash;
use crate::seal::{Opener, Piece, Sealer, TAG_BYTES};

/// Plain bytes of one frame at most. A reader holds some of them per stream, and reads this much for one page.
pub(crate) const MAX_FRAME_BYTES: usize = 1024 * 1024;
/// zstd's level: the highest that still compresses faster than a disk of the year delivers.
pub(crate) const LEVEL: i32 = 3;
/// Of WAL: the owner of a stream has to keep up with its primary, and catch up with it. WAL of many rows becomes as small as with the level above
/// in less than half of the time; one of many whole pages a fifth larger.
pub(crate) const WAL_LEVEL: i32 = 1;

/// How the content of a frame is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// As it is: it would not become smaller.
    Raw = 0,
    Zstd = 1,
}

impl Method {
    fn parse(byte: u8) -> Option<Method> {
        [Method::Raw, Method::Zstd].into_iter().find(|method| *method as u8 == byte)
    }
}

/// What the table of an object says about a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// From the beginning of the object.
    pub offset: u64,
    /// Bytes in the object.
    pub stored: u32,
    /// Bytes of content.
    pub plain: u32,
    pub method: Method,
    pub hash: Hash,
}

impl Frame {
    /// Bytes of one entry of the table.
    pub(crate) const BYTES: usize = 8 + 4 + 4 + 1 + 32;

    pub(crate) fn encode(&self, to: &mut Vec<u8>) {
        to.extend(self.offset.to_le_bytes());
        to.extend(self.stored.to_le_bytes());
        to.extend(self.plain.to_le_bytes());
        to.push(self.method as u8);
        to.extend(self.hash.0);
    }

    pub(crate) fn decode(bytes: &[u8; Frame::BYTES]) -> Result<Frame, Damage> {
        let part = |at: usize| <[u8; 4]>::try_from(&bytes[at..at + 4]).unwrap_or_default();
        let method = Method::parse(bytes[16]).ok_or_else(|| Damage::malformed("an unknown method"))?;
        let plain = u32::from_le_bytes(part(12));
        if plain == 0 || plain as usize > MAX_FRAME_BYTES {
            return Err(Damage::malformed(format!("a frame of {plain} bytes")));
        }
        Ok(Frame {
            offset: u64::from(u32::from_le_bytes(part(0))) | u64::from(u32::from_le_bytes(part(4))) << 32,
            stored: u32::from_le_bytes(part(8)),
            plain,
            method,
            hash: Hash(<[u8; 32]>::try_from(&bytes[17..]).unwrap_or_default()),
        })
    }
}

/// Compresses and encrypts; one for each object that is written.
pub(crate) struct FrameWriter {
    compressor: Compressor<'static>,
    /// What was encoded last: memory that is not asked for anew with each frame.
    stored: Vec<u8>,
}

impl FrameWriter {
    pub(crate) fn new(level: i32) -> std::io::Result<FrameWriter> {
        Ok(FrameWriter { compressor: Compressor::new(level)?, stored: Vec::new() })
    }

    /// The stored form of `content`, and how it is stored.
    pub(crate) fn encode(
        &mut self,
        content: &[u8],
        piece: Piece,
        about: &[u8],
        sealer: Option<&Sealer>,
    ) -> Result<(&[u8], Method), Damage> {
        if content.is_empty() || content.len() > MAX_FRAME_BYTES {
            return Err(Damage::malformed(format!("a frame of {} bytes", content.len())));
        }
        let stored = &mut self.stored;
        stored.clear();
        stored.reserve(compress_bound(content.len()) + TAG_BYTES);
        let bytes = self
            .compressor
            .compress_to_buffer(content, stored)
            .map_err(|error| Damage::malformed(format!("zstd does not compress: {error}")))?;
        let method = if bytes < content.len() { Method::Zstd } else { Method::Raw };
        if method == Method::Raw {
            stored.clear();
            stored.extend_from_slice(content);
        }
        if let Some(sealer) = sealer {
            sealer.seal(piece, about, stored)?;
        }
        Ok((stored.as_slice(), method))
    }
}

/// Decrypts and decompresses; one for whoever reads frame after frame.
#[derive(Default)]
pub(crate) struct FrameReader {
    decompressor: Option<Decompressor<'static>>,
}

impl FrameReader {
    /// The content of a frame, checked against its hash.
    pub(crate) fn decode(
        &mut self,
        frame: &Frame,
        number: u32,
        stored: &[u8],
        about: &[u8],
        opener: Option<&Opener>,
    ) -> Result<Vec<u8>, Damage> {
        let mut opened = Vec::new();
        let stored = match opener {
            Some(opener) => {
                opened.extend_from_slice(stored);
                opener.open(number, about, &mut opened)?;
                &opened
            }
            None => stored,
        };
        let plain = frame.plain as usize;
        let content = match frame.method {
            Method::Raw => stored.to_vec(),
            Method::Zstd => {
                // The capacity is the limit: what would become larger is an error.
                self.decompressor()?.decompress(stored, plain).map_err(|error| {
                    Damage::malformed(format!("frame {number} does not decompress: {error}"))
                })?
            }
        };
        if content.len() != plain {
            return Err(Damage::malformed(format!("frame {number} has another length than it says")));
        }
        if Hash::of(&content) != frame.hash && !broken(Broken::NoFrameHash) {
            return Err(Damage::HashDiffers);
        }
        Ok(content)
    }

    fn decompressor(&mut self) -> Result<&mut Decompressor<'static>, Damage> {
        let decompressor = match self.decompressor.take() {
            Some(decompressor) => decompressor,
            None => Decompressor::new()
                .map_err(|error| Damage::malformed(format!("zstd does not begin: {error}")))?,
        };
        Ok(self.decompressor.insert(decompressor))
    }
}

/// Bytes that a frame may take in an object.
pub(crate) const MAX_STORED_BYTES: usize = MAX_FRAME_BYTES + TAG_BYTES;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{Pieces, Protection, test_protection};
    use proptest::prelude::*;

    fn round_trip(content: &[u8], protection: &Protection) {
        let sealer = protection.sealer("a").unwrap();
        let mut pieces = Pieces::default();
        let mut writer = FrameWriter::new(LEVEL).unwrap();
        let (stored, method) = writer.encode(content, pieces.take(), b"x", sealer.as_ref()).unwrap();
        let frame = Frame {
            offset: 7,
            stored: stored.len() as u32,
            plain: content.len() as u32,
            method,
            hash: Hash::of(content),
        };
        let mut entry = Vec::new();
        frame.encode(&mut entry);
        assert_eq!(Frame::decode(entry.as_slice().try_into().unwrap()).unwrap(), frame);
        let opener = protection.opener("a", sealer.map(|sealer| sealer.salted())).unwrap();
        let mut reader = FrameReader::default();
        assert_eq!(reader.decode(&frame, 0, stored, b"x", opener.as_ref()).unwrap(), content);
        // A table that lies about the length costs no memory and returns nothing.
        for plain in [frame.plain - 1, frame.plain + 1] {
            let lie = Frame { plain, ..frame };
            assert!(reader.decode(&lie, 0, stored, b"x", opener.as_ref()).is_err());
        }
        assert_eq!(
            reader.decode(&frame, 0, stored, b"x", opener.as_ref()).unwrap(),
            content,
            "it goes on after a failure"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn content_comes_back(
            random in proptest::collection::vec(any::<u8>(), 1..5000),
            repeated in 0usize..20,
        ) {
            let content = [random.clone(), vec![random[0]; repeated * 1000]].concat();
            round_trip(&content, &Protection::Plain);
            round_trip(&content, &test_protection(&[1]));
        }
    }

    #[test]
    fn a_frame_has_at_least_one_byte_and_at_most_a_mebibyte() {
        round_trip(&vec![0; MAX_FRAME_BYTES], &Protection::Plain);
        let mut writer = FrameWriter::new(LEVEL).unwrap();
        for wrong in [0, MAX_FRAME_BYTES + 1] {
            let refused = writer.encode(&vec![0; wrong], Pieces::default().take(), b"", None);
            assert!(refused.is_err(), "{wrong} bytes");
        }
    }
}
