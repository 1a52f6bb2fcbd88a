//! What other programs compress with.
//!
//! Left out: writing, and xz, lzop and snappy, which Barman knows as well. Hazard: a small file that unpacks into an endless one; whoever reads knows
//! how much it may be, and stops there.

use std::io::Read;

/// How content is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gz,
    /// Deflated, without gzip's header: in bundles of pgBackRest.
    Deflate,
    Lz4,
    Zst,
    Bz2,
}

/// What a file begins with, by its magic bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recognised {
    As(Compression),
    /// Compressed by something that is not read here.
    Other(&'static str),
}

impl Compression {
    /// In the words of pgBackRest's `compress-type`.
    pub(super) fn named(name: &str) -> Option<Compression> {
        Some(match name {
            "none" => Compression::None,
            "gz" => Compression::Gz,
            "lz4" => Compression::Lz4,
            "zst" => Compression::Zst,
            "bz2" => Compression::Bz2,
            _ => return None,
        })
    }

    /// By the end of a file's name, with its dot; none at all is no compression.
    pub(super) fn of_extension(extension: &str) -> Option<Compression> {
        match extension.strip_prefix('.') {
            None if extension.is_empty() => Some(Compression::None),
            Some("none") | None => None,
            Some(name) => Compression::named(name),
        }
    }

    pub(super) fn extension(self) -> &'static str {
        match self {
            Compression::None | Compression::Deflate => "",
            Compression::Gz => ".gz",
            Compression::Lz4 => ".lz4",
            Compression::Zst => ".zst",
            Compression::Bz2 => ".bz2",
        }
    }

    /// Barman's files of WAL do not say it in their names.
    pub(super) fn recognise(content: &[u8]) -> Recognised {
        const MAGICS: [(&[u8], Recognised); 8] = [
            (b"\x1f\x8b", Recognised::As(Compression::Gz)),
            (b"BZh", Recognised::As(Compression::Bz2)),
            (b"\x28\xb5\x2f\xfd", Recognised::As(Compression::Zst)),
            (b"\x04\x22\x4d\x18", Recognised::As(Compression::Lz4)),
            (b"\xfd7zXZ\x00", Recognised::Other("xz")),
            (b"\xff\x06\x00\x00sNaPpY", Recognised::Other("snappy")),
            (b"\x89LZO", Recognised::Other("lzop")),
            (b"-----BEGIN PGP", Recognised::Other("PGP")),
        ];
        let found = MAGICS.iter().find(|(magic, _)| content.starts_with(magic));
        found.map_or(Recognised::As(Compression::None), |(_, recognised)| *recognised)
    }

    pub(super) fn decoder(self, from: Box<dyn Read + Send>) -> Box<dyn Read + Send> {
        match self {
            Compression::None => from,
            Compression::Gz => Box::new(flate2::read::MultiGzDecoder::new(from)),
            Compression::Deflate => Box::new(flate2::read::DeflateDecoder::new(from)),
            Compression::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(from)),
            Compression::Zst => match zstd::stream::read::Decoder::new(from) {
                Ok(decoder) => Box::new(decoder),
                Err(error) => Box::new(Failing(Some(error))),
            },
            Compression::Bz2 => Box::new(bzip2::read::MultiBzDecoder::new(from)),
        }
    }
}

/// A decoder that could not be made says so when it is read.
struct Failing(Option<std::io::Error>);

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        self.0.take().map_or(Ok(0), Err)
    }
}
