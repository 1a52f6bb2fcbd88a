//! The layout that packs, maps and WAL objects share: a header, frames, a footer with the table of the frames, a trailer.
//!
//! ```text
//! header   48 bytes   "pghrd", kind, version, number of the data key (0: not encrypted), salt
//! frames              one behind the other, without gaps
//! footer              name of the object, what the kind adds, hash of all before the footer, the table; encrypted
//!                     like a frame
//! trailer  48 bytes   number of frames, bytes of the footer, hash of header + footer + the two numbers, "pghrdEND"
//! ```
//!
//! The hash in the trailer stands for the whole object: it covers the table, which has the hash of each frame's content,
//! and the hash of everything stored. Who knows it, from a manifest, can read one frame out of the middle and be sure of it.
//!
//! Numbers are little-endian. An object is written into memory and put at once: the condition of a put that nothing is
//! there exists only for whole objects, and a pack is as large as that allows.
//!
//! Left out: what frames hold. Hazard: an object that is read at the wrong place. Every number is checked against what is
//! really there before anything is read by it, and the name is inside, so that an object under another's name is noticed.

use std::ops::Range;

use bytes::Bytes;

use crate::document::{Damage, FORMAT_VERSION, ReadError};
use crate::frame::{Frame, FrameReader, FrameWriter, LEVEL, MAX_STORED_BYTES, WAL_LEVEL};
use crate::hash::Hash;
use crate::name::Name;
use crate::seal::{Opener, Piece, Pieces, Protection, SALT_BYTES, Salted, Sealer, TAG_BYTES};
use crate::store::Store;

pub(crate) const HEADER_BYTES: usize = 48;
pub(crate) const TRAILER_BYTES: usize = 48;
const MAGIC: &[u8; 5] = b"pghrd";
const END: &[u8; 8] = b"pghrdEND";
/// Frames of one object at most: of a WAL segment of 1 GiB 1024, of a pack of tiny incompressible runs some more.
pub(crate) const MAX_FRAMES: usize = 65_536;
/// What a kind adds to the footer at most.
const MAX_EXTRA_BYTES: usize = 64 * 1024;
const MAX_FOOTER_BYTES: usize =
    2 + Name::MAX_BYTES + 4 + MAX_EXTRA_BYTES + 32 + MAX_FRAMES * Frame::BYTES + TAG_BYTES;
/// Read from the end at first; the footer of an ordinary pack is in it.
const TAIL_BYTES: u64 = 64 * 1024;

/// What an object in this layout is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Pack = b'P' as isize,
    Map = b'M' as isize,
    Wal = b'W' as isize,
}

impl Kind {
    fn describe(byte: u8) -> &'static str {
        match byte {
            b'P' => "pack",
            b'M' => "map",
            b'W' => "WAL object",
            _ => "object of an unknown kind",
        }
    }
}

/// A whole object that can be put, and its hash.
#[derive(Clone, Debug)]
pub(crate) struct Sealed {
    pub bytes: Bytes,
    pub hash: Hash,
}

/// Writes one object into memory.
pub(crate) struct Writer {
    name: Name,
    out: Vec<u8>,
    header: [u8; HEADER_BYTES],
    frames: Vec<Option<Frame>>,
    pieces: Pieces,
    sealer: Option<Sealer>,
    encoder: FrameWriter,
}

/// A frame that has its number and no content yet.
#[derive(Debug)]
pub(crate) struct Reserved(Piece);

impl Reserved {
    pub(crate) fn number(&self) -> u32 {
        self.0.number()
    }
}

impl Writer {
    pub(crate) fn new(kind: Kind, name: Name, protection: &Protection) -> Result<Writer, Damage> {
        let sealer = protection.sealer(name.as_str())?;
        let header = header(kind, sealer.as_ref().map(Sealer::salted));
        let level = if kind == Kind::Wal { WAL_LEVEL } else { LEVEL };
        let encoder = FrameWriter::new(level)
            .map_err(|error| Damage::malformed(format!("zstd does not begin: {error}")))?;
        let (frames, pieces) = (Vec::new(), Pieces::default());
        Ok(Writer { name, out: header.to_vec(), header, frames, pieces, sealer, encoder })
    }

    pub(crate) fn name(&self) -> &Name {
        &self.name
    }

    /// Takes memory for so many bytes at once: an object that grows by and by is copied again and again.
    pub(crate) fn expecting(mut self, bytes: usize) -> Writer {
        self.out.reserve(bytes);
        self
    }

    /// Bytes so far.
    pub(crate) fn stored(&self) -> usize {
        self.out.len()
    }

    pub(crate) fn frames(&self) -> usize {
        self.frames.len()
    }

    /// A number for a frame whose content comes later.
    pub(crate) fn reserve(&mut self) -> Reserved {
        self.frames.push(None);
        Reserved(self.pieces.take())
    }

    pub(crate) fn fill(&mut self, reserved: Reserved, content: &[u8]) -> Result<(), Damage> {
        let number = reserved.number() as usize;
        let (stored, method) =
            self.encoder.encode(content, reserved.0, &self.header, self.sealer.as_ref())?;
        let frame = Frame {
            offset: self.out.len() as u64,
            stored: stored.len() as u32,
            plain: content.len() as u32,
            method,
            hash: Hash::of(content),
        };
        self.out.extend_from_slice(stored);
        if let Some(slot) = self.frames.get_mut(number) {
            *slot = Some(frame);
        }
        Ok(())
    }

    pub(crate) fn push(&mut self, content: &[u8]) -> Result<u32, Damage> {
        let reserved = self.reserve();
        let number = reserved.number();
        self.fill(reserved, content)?;
        Ok(number)
    }

    /// `extra` is what the kind has to say about the whole object.
    pub(crate) fn finish(mut self, extra: &[u8]) -> Result<Sealed, Damage> {
        let count = self.frames.len();
        if count > MAX_FRAMES || extra.len() > MAX_EXTRA_BYTES {
            let what = format!("{count} frames and {} bytes in the footer", extra.len());
            return Err(Damage::malformed(what));
        }
        let mut footer = Vec::with_capacity(count * Frame::BYTES + extra.len() + 256);
        let name = self.name.as_str().as_bytes();
        footer.extend((name.len() as u16).to_le_bytes());
        footer.extend(name);
        footer.extend((extra.len() as u32).to_le_bytes());
        footer.extend(extra);
        footer.extend(Hash::of(&self.out).0);
        for frame in &self.frames {
            let frame = frame.ok_or_else(|| Damage::malformed("a frame was reserved and not filled"))?;
            frame.encode(&mut footer);
        }
        if let Some(sealer) = &self.sealer {
            sealer.seal(self.pieces.take(), &self.header, &mut footer)?;
        }
        let hash = identity(&self.header, &footer, count as u32);
        self.out.extend_from_slice(&footer);
        self.out.extend_from_slice(&(count as u32).to_le_bytes());
        self.out.extend_from_slice(&(footer.len() as u32).to_le_bytes());
        self.out.extend_from_slice(&hash.0);
        self.out.extend_from_slice(END);
        Ok(Sealed { bytes: self.out.into(), hash })
    }
}

fn header(kind: Kind, salted: Option<Salted>) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..5].copy_from_slice(MAGIC);
    header[5] = kind as u8;
    header[6..8].copy_from_slice(&(FORMAT_VERSION as u16).to_le_bytes());
    if let Some(Salted { key, salt }) = salted {
        header[8..12].copy_from_slice(&key.to_le_bytes());
        header[12..12 + SALT_BYTES].copy_from_slice(&salt);
    }
    header
}

fn identity(header: &[u8; HEADER_BYTES], footer: &[u8], count: u32) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(footer);
    hasher.update(&count.to_le_bytes()).update(&(footer.len() as u32).to_le_bytes());
    Hash::finished(&hasher)
}

/// The header, footer and trailer of an object, verified. Frames are read by it.
pub(crate) struct Table {
    pub hash: Hash,
    /// What the kind added.
    pub extra: Vec<u8>,
    frames: Vec<Frame>,
    header: [u8; HEADER_BYTES],
    opener: Option<Opener>,
    /// Of header and frames, as they are stored.
    body: Hash,
}

impl Table {
    /// From the first bytes of an object of `total` bytes and some of its last ones. `Err(Some(bytes))`: so many of the last
    /// bytes are needed.
    fn parse(
        kind: Kind,
        name: &Name,
        protection: &Protection,
        head: &[u8],
        tail: &[u8],
        total: u64,
    ) -> Result<Result<Table, u64>, Damage> {
        let header: [u8; HEADER_BYTES] =
            head.get(..HEADER_BYTES).and_then(|head| head.try_into().ok()).ok_or(Damage::NotOurs)?;
        if &header[..5] != MAGIC {
            return Err(Damage::NotOurs);
        }
        let wanted = Kind::describe(kind as u8);
        if header[5] != kind as u8 {
            return Err(Damage::OtherKind { found: Kind::describe(header[5]).to_owned(), wanted });
        }
        let version = u32::from(u16::from_le_bytes([header[6], header[7]]));
        if version > FORMAT_VERSION {
            return Err(Damage::Newer { found: version });
        }
        if version == 0 {
            return Err(Damage::NotOurs);
        }
        let (footer_end, trailer) = tail
            .len()
            .checked_sub(TRAILER_BYTES)
            .and_then(|at| Some((at, <[u8; TRAILER_BYTES]>::try_from(&tail[at..]).ok()?)))
            .ok_or_else(|| Damage::malformed("it is cut off"))?;
        if &trailer[40..] != END {
            return Err(Damage::malformed("its end is missing"));
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| trailer[at + byte]));
        let (count, length) = (number(0), number(4) as usize);
        let most = total.saturating_sub((HEADER_BYTES + TRAILER_BYTES) as u64);
        if length > MAX_FOOTER_BYTES || length as u64 > most || count as usize > MAX_FRAMES {
            return Err(Damage::malformed(format!("a footer of {length} bytes for {count} frames")));
        }
        let Some(begin) = footer_end.checked_sub(length) else {
            return Ok(Err((length + TRAILER_BYTES) as u64));
        };
        let footer = &tail[begin..footer_end];
        let hash = identity(&header, footer, count);
        if hash.0 != trailer[8..40] {
            return Err(Damage::HashDiffers);
        }

        let key = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let salt = <[u8; SALT_BYTES]>::try_from(&header[12..12 + SALT_BYTES]).unwrap_or_default();
        let salted = (key != 0).then_some(Salted { key, salt });
        let opener = protection.opener(name.as_str(), salted)?;
        let mut footer = footer.to_vec();
        if let Some(opener) = &opener {
            opener.open(count, &header, &mut footer)?;
        }
        let end = total - (TRAILER_BYTES + length) as u64;
        let (extra, body, frames) = parse_footer(&footer, name, count as usize, end)?;
        Ok(Ok(Table { hash, extra, frames, header, opener, body }))
    }

    /// Of an object that is read as a whole; everything in it is verified but the content of the frames.
    pub(crate) fn of_whole(
        kind: Kind,
        name: &Name,
        protection: &Protection,
        bytes: &[u8],
    ) -> Result<Table, Damage> {
        let table = Table::parse(kind, name, protection, bytes, bytes, bytes.len() as u64)?
            .map_err(|_| Damage::malformed("it is cut off"))?;
        if Hash::of(&bytes[..table.end() as usize]) != table.body {
            return Err(Damage::HashDiffers);
        }
        Ok(table)
    }

    /// As [`Table::read`], of the object with this hash and no other one.
    pub(crate) async fn read_known(
        kind: Kind,
        name: &Name,
        hash: Hash,
        protection: &Protection,
        store: &Store,
    ) -> Result<Table, ReadError> {
        let table = Table::read(kind, name, protection, store).await?;
        match table.hash == hash {
            true => Ok(table),
            false => Err(ReadError::damaged(store, name, Damage::OtherObject { wanted: name.to_string() })),
        }
    }

    /// Reads header and footer of an object, and nothing else of it.
    pub(crate) async fn read(
        kind: Kind,
        name: &Name,
        protection: &Protection,
        store: &Store,
    ) -> Result<Table, ReadError> {
        let total = store.head(name).await?.bytes;
        let damaged = |damage| ReadError::damaged(store, name, damage);
        if total < (HEADER_BYTES + TRAILER_BYTES) as u64 {
            return Err(damaged(Damage::malformed("it is cut off")));
        }
        let head = store.read_range(name, 0..HEADER_BYTES as u64).await?;
        let mut tail = store.read_range(name, total.saturating_sub(TAIL_BYTES)..total).await?;
        match Table::parse(kind, name, protection, &head, &tail, total).map_err(damaged)? {
            Ok(table) => Ok(table),
            Err(bytes) => {
                tail = store.read_range(name, total.saturating_sub(bytes)..total).await?;
                Table::parse(kind, name, protection, &head, &tail, total)
                    .map_err(damaged)?
                    .map_err(|_| damaged(Damage::malformed("it is cut off")))
            }
        }
    }

    pub(crate) fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Where the footer begins.
    fn end(&self) -> u64 {
        self.frames
            .iter()
            .map(|frame| frame.offset + u64::from(frame.stored))
            .max()
            .unwrap_or(HEADER_BYTES as u64)
    }

    /// Where a frame is stored.
    pub(crate) fn place(&self, number: u32) -> Result<Range<u64>, Damage> {
        let frame = self.frame(number)?;
        Ok(frame.offset..frame.offset + u64::from(frame.stored))
    }

    fn frame(&self, number: u32) -> Result<&Frame, Damage> {
        let missing = || Damage::malformed(format!("there is no frame {number}"));
        self.frames.get(number as usize).ok_or_else(missing)
    }

    /// The content of a frame, from what is stored at its place.
    pub(crate) fn open(&self, number: u32, stored: &[u8], by: &mut FrameReader) -> Result<Vec<u8>, Damage> {
        let frame = self.frame(number)?;
        if stored.len() != frame.stored as usize {
            return Err(Damage::malformed(format!("frame {number} is cut off")));
        }
        by.decode(frame, number, stored, &self.header, self.opener.as_ref())
    }

    /// The content of a frame of an object that is there as a whole.
    pub(crate) fn open_in(
        &self,
        number: u32,
        object: &[u8],
        by: &mut FrameReader,
    ) -> Result<Vec<u8>, Damage> {
        let place = self.place(number)?;
        let stored = object.get(place.start as usize..place.end as usize);
        self.open(number, stored.ok_or_else(|| Damage::malformed("it is cut off"))?, by)
    }

    /// The content of a frame, read from the store.
    pub(crate) async fn fetch(
        &self,
        number: u32,
        name: &Name,
        store: &Store,
        by: &mut FrameReader,
    ) -> Result<Vec<u8>, ReadError> {
        let damaged = |damage| ReadError::damaged(store, name, damage);
        let place = self.place(number).map_err(damaged)?;
        let stored = store.read_range(name, place).await?;
        self.open(number, &stored, by).map_err(damaged)
    }
}

type Footer = (Vec<u8>, Hash, Vec<Frame>);

fn parse_footer(footer: &[u8], name: &Name, count: usize, end: u64) -> Result<Footer, Damage> {
    let mut rest = footer;
    let mut take = |bytes: usize| {
        let (taken, left) =
            rest.split_at_checked(bytes).ok_or_else(|| Damage::malformed("its footer is cut off"))?;
        rest = left;
        Ok::<&[u8], Damage>(taken)
    };
    let length = take(2)?;
    let inside = take(usize::from(u16::from_le_bytes([length[0], length[1]])))?;
    if inside != name.as_str().as_bytes() {
        return Err(Damage::OtherObject { wanted: name.to_string() });
    }
    let length = take(4)?;
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
    let extra = take(length.min(MAX_EXTRA_BYTES + 1))?.to_vec();
    let body = Hash(<[u8; 32]>::try_from(take(32)?).unwrap_or_default());
    let entries = take(count * Frame::BYTES)?;
    if !rest.is_empty() {
        return Err(Damage::malformed("its footer is longer than its table"));
    }
    let (entries, _) = entries.as_chunks::<{ Frame::BYTES }>();
    let frames = entries.iter().map(Frame::decode).collect::<Result<Vec<Frame>, Damage>>()?;
    // Frames lie one behind the other, in the order in which they were filled.
    let mut order: Vec<&Frame> = frames.iter().collect();
    order.sort_by_key(|frame| frame.offset);
    let mut at = HEADER_BYTES as u64;
    for frame in order {
        if frame.offset != at || frame.stored == 0 || frame.stored as usize > MAX_STORED_BYTES {
            return Err(Damage::malformed("its frames overlap or leave gaps"));
        }
        at += u64::from(frame.stored);
    }
    if at != end {
        return Err(Damage::malformed("its frames do not end where its footer begins"));
    }
    Ok((extra, body, frames))
}

#[cfg(test)]
mod tests;
