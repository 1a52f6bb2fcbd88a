//! How an entry of a map is written: numbers of seven bits a byte, packs once, runs by their index.
//!
//! Left out: what an entry may say (`Entry::validate`). Hazard: bytes that mean two things; a number has one spelling, and
//! nothing stands behind an entry that is not read.

use super::{Change, Entry, Kind};
use crate::document::Damage;
use crate::hash::Hash;
use crate::pack::{PackId, Run};

/// The entry of a file of a quarter of a tebibyte that is in one piece.
const MAX_ENTRY_BYTES: usize = 128 * 1024 * 1024;

fn put_number(mut number: u64, to: &mut Vec<u8>) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

/// Length, then: kind, path, mode, and of a file size, hash, packs, runs, change hashes.
pub(super) fn encode(entry: &Entry, to: &mut Vec<u8>) -> Result<(), Damage> {
    let mut body = Vec::with_capacity(entry.path.len() + 64 + entry.changes.len() * 8);
    let bytes = |bytes: &[u8], to: &mut Vec<u8>| {
        put_number(bytes.len() as u64, to);
        to.extend_from_slice(bytes);
    };
    let kind = match entry.kind {
        Kind::Directory => 0,
        Kind::File => 1,
        Kind::Symlink(_) => 2,
    };
    body.push(kind);
    bytes(&entry.path, &mut body);
    put_number(u64::from(entry.mode), &mut body);
    match &entry.kind {
        Kind::Directory => {}
        Kind::Symlink(target) => bytes(target, &mut body),
        Kind::File => {
            put_number(entry.size, &mut body);
            body.push(u8::from(entry.hash.is_some()));
            body.extend(entry.hash.iter().flat_map(|hash| hash.0));
            // Packs once, then by their place in this list: a pack's name is longer than all else of a run.
            let mut packs: Vec<PackId> = entry.runs.iter().map(|run| run.pack).collect();
            packs.sort();
            packs.dedup();
            put_number(packs.len() as u64, &mut body);
            for pack in &packs {
                body.extend_from_slice(pack.backup.bytes());
                put_number(u64::from(pack.number), &mut body);
            }
            put_number(entry.runs.len() as u64, &mut body);
            for run in &entry.runs {
                let pack = packs.binary_search(&run.pack).unwrap_or_default();
                put_number(u64::from(run.pages), &mut body);
                put_number(pack as u64, &mut body);
                put_number(u64::from(run.frame), &mut body);
                put_number(u64::from(run.at), &mut body);
            }
            body.extend(entry.changes.iter().flat_map(|change| change.0));
        }
    }
    if body.len() > MAX_ENTRY_BYTES {
        return Err(Damage::malformed(format!("an entry of {} bytes", body.len())));
    }
    put_number(body.len() as u64, to);
    to.append(&mut body);
    Ok(())
}

/// Reads what is in an entry.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Damage> {
        let (taken, rest) =
            self.0.split_at_checked(bytes).ok_or_else(|| Damage::malformed("an entry is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u64, Damage> {
        let (number, bytes) = take_number(self.0)?.ok_or_else(|| Damage::malformed("an entry is cut off"))?;
        self.0 = &self.0[bytes..];
        Ok(number)
    }

    fn small(&mut self) -> Result<u32, Damage> {
        u32::try_from(self.number()?).map_err(|_| Damage::malformed("a number that is too large"))
    }

    /// A number of things that take at least `each` bytes.
    fn count(&mut self, each: usize) -> Result<usize, Damage> {
        let count = self.number()?;
        if count > (self.0.len() / each) as u64 {
            return Err(Damage::malformed("more things than there is room for"));
        }
        Ok(count as usize)
    }

    fn bytes(&mut self) -> Result<Vec<u8>, Damage> {
        let count = self.count(1)?;
        Ok(self.take(count)?.to_vec())
    }
}

/// A number and how many bytes it took; none if it is not all there.
fn take_number(from: &[u8]) -> Result<Option<(u64, usize)>, Damage> {
    let mut number = 0;
    for (index, byte) in from.iter().enumerate() {
        let bits = u64::from(byte & 0x7f);
        if index > 9 || index == 9 && bits > 1 || (*byte == 0 && index > 0) {
            return Err(Damage::malformed("a number that is too long"));
        }
        number |= bits << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((number, index + 1)));
        }
    }
    Ok(None)
}

/// The first entry of a stream and how many bytes it took; none if it is not all there.
pub(super) fn decode(stream: &[u8]) -> Result<Option<(Entry, usize)>, Damage> {
    let Some((length, prefix)) = take_number(stream)? else { return Ok(None) };
    if length > MAX_ENTRY_BYTES as u64 {
        return Err(Damage::malformed(format!("an entry of {length} bytes")));
    }
    let end = prefix + length as usize;
    let Some(body) = stream.get(prefix..end) else { return Ok(None) };
    let mut cursor = Cursor(body);
    let kind = cursor.take(1)?[0];
    let path = cursor.bytes()?;
    let mode = cursor.small()?;
    let entry = match kind {
        0 => Entry::directory(path, mode),
        2 => Entry { mode, ..Entry::symlink(path, cursor.bytes()?) },
        1 => decode_file(path, mode, &mut cursor)?,
        _ => return Err(Damage::malformed("an entry of an unknown kind")),
    };
    if !cursor.0.is_empty() {
        return Err(Damage::malformed("an entry with something behind it"));
    }
    Ok(Some((entry, end)))
}

fn decode_file(path: Vec<u8>, mode: u32, cursor: &mut Cursor<'_>) -> Result<Entry, Damage> {
    let size = cursor.number()?;
    let hash = match cursor.take(1)?[0] {
        0 => None,
        1 => Some(Hash(<[u8; 32]>::try_from(cursor.take(32)?).unwrap_or_default())),
        _ => return Err(Damage::malformed("a hash that neither is there nor is not")),
    };
    let mut packs = Vec::new();
    for _ in 0..cursor.count(16)? {
        let backup = std::str::from_utf8(cursor.take(15)?).ok().and_then(|text| text.parse().ok());
        let backup = backup.ok_or_else(|| Damage::malformed("a pack of no backup"))?;
        packs.push(PackId { backup, number: cursor.small()? });
    }
    let mut runs = Vec::new();
    for _ in 0..cursor.count(4)? {
        let pages = cursor.small()?;
        let pack = *packs
            .get(cursor.small()? as usize)
            .ok_or_else(|| Damage::malformed("a run in a pack that is not listed"))?;
        runs.push(Run { pages, pack, frame: cursor.small()?, at: cursor.small()? });
    }
    let (changes, rest) = cursor.0.as_chunks::<8>();
    cursor.0 = rest;
    let changes = changes.iter().map(|change| Change(*change)).collect();
    Ok(Entry { path, kind: Kind::File, mode, size, hash, runs, changes })
}
