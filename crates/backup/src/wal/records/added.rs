//! Rows that a record puts into a table: the new row of an `INSERT`, one that is changed in its place, or all that are on a page that was
//! written as a whole.
//!
//! What an `UPDATE` changes refers to the row before it, and is not put together here. Pages that were compressed by zstd or pglz are read; lz4 is not.
//! Leaves out: whether a row is visible, or its transaction was committed. Hazard: a row that is taken for another table's; so the file is compared.

use super::{BLOCK_DATA_LONG, BLOCK_DATA_SHORT, BLOCK_ORIGIN, BLOCK_TOPLEVEL_XID, Data, MAX_BLOCK_ID};
use super::{RECORD_HEADER_BYTES, Record, RelationFile, u16_at, u32_at};

const RM_HEAP: u8 = 10;
/// `XLOG_HEAP_INSERT`, in the bits that say what a record of this kind is.
const INSERT: u8 = 0x00;
/// `XLOG_HEAP_INPLACE`.
const INPLACE: u8 = 0x70;
const OPERATION_BITS: u8 = 0x70;

/// `xlogrecord.h`.
const FORK_BITS: u8 = 0x0F;
pub(super) const HAS_IMAGE: u8 = 0x10;
pub(super) const HAS_DATA: u8 = 0x20;
pub(super) const SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;
const IMAGE_COMPRESSED_14: u8 = 0x02;
const IMAGE_PGLZ: u8 = 0x04;
const IMAGE_LZ4: u8 = 0x08;
const IMAGE_ZSTD: u8 = 0x10;

/// `SizeofHeapTupleHeader`, and `xl_heap_header` that stands for it in a record.
const TUPLE_HEADER_BYTES: usize = 23;
const SHORT_HEADER_BYTES: usize = 5;

const PAGE_HEADER_BYTES: usize = 24;
const LINE_BYTES: usize = 4;
const LINE_NORMAL: u32 = 1;

struct Block<'a> {
    file: RelationFile,
    fork: u8,
    image: Option<(Image, &'a [u8])>,
    data: &'a [u8],
}

#[derive(Clone, Copy)]
pub(super) struct Image {
    bytes: usize,
    hole_at: usize,
    hole_bytes: usize,
    info: u8,
}

impl Record<'_> {
    /// Calls `each` with the columns of every row that this record puts into one of the files that are `wanted`, as they lie there.
    pub fn added(
        &self,
        page_bytes: usize,
        wanted: impl Fn(&RelationFile) -> bool,
        mut each: impl FnMut(RelationFile, &[u8]),
    ) {
        // A cut record says as much as is there.
        for block in self.blocks(page_bytes).unwrap_or_default() {
            if block.fork != 0 || !wanted(&block.file) {
                continue;
            }
            let mut each = |row: &[u8]| each(block.file, row);
            if let Some((image, bytes)) = block.image {
                if let Some(page) = image.page(bytes, self.major, page_bytes) {
                    rows(&page, &mut each);
                }
            } else if self.head[17] == RM_HEAP {
                let row = match self.head[16] & OPERATION_BITS {
                    INSERT => block.data.get(4).and_then(|header| {
                        let before = usize::from(*header).checked_sub(TUPLE_HEADER_BYTES)?;
                        block.data.get(SHORT_HEADER_BYTES + before..)
                    }),
                    INPLACE => Some(block.data),
                    _ => None,
                };
                row.into_iter().for_each(&mut each);
            }
        }
    }

    /// The blocks that it changes, in its order.
    fn blocks(&self, page_bytes: usize) -> Option<Vec<Block<'_>>> {
        let mut found = Vec::new();
        let mut data = self.described(page_bytes, |described| found.push(described))?;
        let mut blocks = Vec::with_capacity(found.len());
        for Described { file, fork, image, bytes, .. } in found {
            let image = match image {
                Some(image) => Some((image, data.take(image.bytes)?)),
                None => None,
            };
            blocks.push(Block { file, fork, image, data: data.take(bytes)? });
        }
        Some(blocks)
    }

    /// Calls `each` for the descriptions of blocks in front of a record's data, in the way of `DecodeXLogRecord`. What is behind
    /// them, as far as the record's beginning was kept.
    pub(super) fn described(&self, page_bytes: usize, mut each: impl FnMut(Described)) -> Option<Data<'_>> {
        let mut data = Data(&self.head[RECORD_HEADER_BYTES..]);
        let whole = (u32_at(self.head, 0) as usize).checked_sub(RECORD_HEADER_BYTES)?;
        let kept = data.0.len();
        // What the descriptions announce; when no more than that is left of the record, there is no further one.
        let (mut announced, mut last) = (0_usize, None);
        while whole.saturating_sub(kept - data.0.len()) > announced {
            match data.take(1)?[0] {
                BLOCK_DATA_SHORT => {
                    data.take(1)?;
                    break;
                }
                BLOCK_DATA_LONG => {
                    data.take(4)?;
                    break;
                }
                BLOCK_ORIGIN => {
                    data.take(2)?;
                }
                BLOCK_TOPLEVEL_XID => {
                    data.take(4)?;
                }
                0..=MAX_BLOCK_ID => {
                    let flags = data.take(1)?[0];
                    let bytes = usize::from(u16_at(data.take(2)?, 0));
                    let bytes = if flags & HAS_DATA != 0 { bytes } else { 0 };
                    let image = match flags & HAS_IMAGE != 0 {
                        true => Some(data.image(self.major, page_bytes)?),
                        false => None,
                    };
                    let file = match flags & SAME_RELATION != 0 {
                        true => last?,
                        false => data.file()?,
                    };
                    last = Some(file);
                    announced += bytes + image.map_or(0, |image| image.bytes);
                    each(Described { file, fork: flags & FORK_BITS, block: data.u32()?, image, bytes });
                }
                _ => return None,
            }
        }
        Some(data)
    }
}

/// What stands in front of a record's data about a block that it changes.
pub(super) struct Described {
    pub(super) file: RelationFile,
    pub(super) fork: u8,
    pub(super) block: u32,
    image: Option<Image>,
    bytes: usize,
}

impl Data<'_> {
    /// `XLogRecordBlockImageHeader`, and the length of the hole where that is not what is missing to a page.
    pub(super) fn image(&mut self, major: u16, page_bytes: usize) -> Option<Image> {
        let bytes = usize::from(u16_at(self.take(2)?, 0));
        let hole_at = usize::from(u16_at(self.take(2)?, 0));
        let info = self.take(1)?[0];
        let compressed = if major < 15 { IMAGE_COMPRESSED_14 } else { IMAGE_PGLZ | IMAGE_LZ4 | IMAGE_ZSTD };
        let hole_bytes = match (info & IMAGE_HAS_HOLE != 0, info & compressed != 0) {
            (false, _) => 0,
            (true, true) => usize::from(u16_at(self.take(2)?, 0)),
            (true, false) => page_bytes.checked_sub(bytes)?,
        };
        Some(Image { bytes, hole_at, hole_bytes, info })
    }
}

impl Image {
    /// The page. None for one that was compressed in a way that is not read here.
    fn page(&self, bytes: &[u8], major: u16, page_bytes: usize) -> Option<Vec<u8>> {
        let without_hole = page_bytes.checked_sub(self.hole_bytes)?;
        let is_pglz = self.info & if major < 15 { IMAGE_COMPRESSED_14 } else { IMAGE_PGLZ } != 0;
        let mut page = if is_pglz {
            pglz(bytes, without_hole)?
        } else if major >= 15 && self.info & IMAGE_ZSTD != 0 {
            zstd::bulk::decompress(bytes, without_hole).ok()?
        } else if major >= 15 && self.info & IMAGE_LZ4 != 0 {
            return None;
        } else {
            bytes.to_vec()
        };
        if page.len() != without_hole || self.hole_at > page.len() {
            return None;
        }
        page.splice(self.hole_at..self.hole_at, std::iter::repeat_n(0, self.hole_bytes));
        Some(page)
    }
}

/// `pglz_decompress`: a byte of flags for eight things, each a byte or a way back.
fn pglz(mut bytes: &[u8], wanted: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(wanted);
    while let [flags, rest @ ..] = bytes {
        bytes = rest;
        for bit in 0..8 {
            if bytes.is_empty() || out.len() >= wanted {
                break;
            }
            if flags >> bit & 1 == 0 {
                let (byte, rest) = bytes.split_first()?;
                out.push(*byte);
                bytes = rest;
                continue;
            }
            let (way, rest) = bytes.split_at_checked(2)?;
            bytes = rest;
            let mut length = usize::from(way[0] & 0x0F) + 3;
            let back = usize::from(way[0] & 0xF0) << 4 | usize::from(way[1]);
            if length == 18 {
                let (more, rest) = bytes.split_first()?;
                length += usize::from(*more);
                bytes = rest;
            }
            for _ in 0..length.min(wanted - out.len()) {
                let from = out.len().checked_sub(back).filter(|_| back > 0)?;
                out.push(out[from]);
            }
        }
        if out.len() >= wanted {
            break;
        }
    }
    (out.len() == wanted).then_some(out)
}

/// The columns of every row that stands on a page of a table, whether it is visible or not.
pub fn rows(page: &[u8], mut each: impl FnMut(&[u8])) {
    if page.len() < PAGE_HEADER_BYTES {
        return;
    }
    let lower = usize::from(u16_at(page, 12)).min(page.len());
    let mut at = PAGE_HEADER_BYTES;
    while at + LINE_BYTES <= lower {
        let line = u32_at(page, at);
        at += LINE_BYTES;
        let (offset, flags, length) = ((line & 0x7FFF) as usize, line >> 15 & 3, (line >> 17) as usize);
        let row = page.get(offset..offset + length).filter(|_| flags == LINE_NORMAL);
        let columns = row.and_then(|row| row.get(usize::from(*row.get(TUPLE_HEADER_BYTES - 1)?)..));
        columns.into_iter().for_each(&mut each);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page with these rows, of 24 bytes of header each.
    fn page(rows: &[&[u8]]) -> Vec<u8> {
        let mut page = vec![0; 8192];
        let (mut lower, mut upper) = (PAGE_HEADER_BYTES, page.len());
        for row in rows {
            upper -= (24 + row.len()).next_multiple_of(8);
            page[upper + 22] = 24;
            page[upper + 24..upper + 24 + row.len()].copy_from_slice(row);
            let line = upper as u32 | LINE_NORMAL << 15 | ((24 + row.len()) as u32) << 17;
            page[lower..lower + 4].copy_from_slice(&line.to_le_bytes());
            lower += 4;
        }
        page[12..14].copy_from_slice(&(lower as u16).to_le_bytes());
        page[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        page
    }

    const FILE: RelationFile = RelationFile { tablespace: 1663, database: 5, number: 1259 };

    fn record(info: u8, image: Option<(u8, u16, &[u8], Option<u16>)>, data: &[u8]) -> Vec<u8> {
        let mut head = vec![0; RECORD_HEADER_BYTES];
        (head[16], head[17]) = (info, RM_HEAP);
        let flags = if image.is_some() { HAS_IMAGE } else { 0 } | if data.is_empty() { 0 } else { HAS_DATA };
        head.extend([0, flags]);
        head.extend((data.len() as u16).to_le_bytes());
        if let Some((info, hole_at, bytes, hole)) = image {
            head.extend((bytes.len() as u16).to_le_bytes());
            head.extend(hole_at.to_le_bytes());
            head.push(info);
            head.extend(hole.into_iter().flat_map(u16::to_le_bytes));
        }
        for number in [FILE.tablespace, FILE.database, FILE.number, 7] {
            head.extend(number.to_le_bytes());
        }
        head.extend([BLOCK_DATA_SHORT, 3]);
        if let Some((_, _, bytes, _)) = image {
            head.extend(bytes);
        }
        head.extend(data);
        head.extend([1, 0, 0]);
        let whole = head.len() as u32;
        head[..4].copy_from_slice(&whole.to_le_bytes());
        head
    }

    fn added(head: &[u8], major: u16) -> Vec<Vec<u8>> {
        let (start, end) = (pgherd_core::types::Lsn(8), pgherd_core::types::Lsn(16));
        let record = Record { start, end, major, head };
        let mut rows = Vec::new();
        record.added(8192, |file| *file == FILE, |_, row| rows.push(row.to_vec()));
        record.added(8192, |file| file.number == 1260, |_, row| panic!("{row:?} is another table's"));
        rows
    }

    #[test]
    fn a_row_comes_in_a_record_or_with_its_page() {
        let row = [1, 2, 3, 4];
        let inserted = [&[0, 0, 0, 0, 24, 0][..], &row].concat();
        assert_eq!(added(&record(0x80, None, &inserted), 15), [row.to_vec()]);
        assert_eq!(added(&record(INPLACE, None, &row), 15), [row.to_vec()]);
        assert_eq!(
            added(&record(0x20, None, &inserted), 15),
            Vec::<Vec<u8>>::new(),
            "what is updated refers to a row"
        );

        let page = page(&[b"first", b"second"]);
        let hole_at = u16_at(&page, 12);
        let hole_bytes = u16_at(&page, 14) - hole_at;
        let without = [&page[..usize::from(hole_at)], &page[usize::from(hole_at + hole_bytes)..]].concat();
        let both = [b"first".to_vec(), b"second".to_vec()];
        for head in [
            record(0, Some((IMAGE_HAS_HOLE, hole_at, &without, None)), &[]),
            record(0x20, Some((0, 0, &page, None)), &[]),
            record(
                0,
                Some((
                    IMAGE_HAS_HOLE | IMAGE_ZSTD,
                    hole_at,
                    &zstd::bulk::compress(&without, 1).unwrap(),
                    Some(hole_bytes),
                )),
                &[],
            ),
        ] {
            assert_eq!(added(&head, 15), both);
        }
        // A byte, and then the same again, as often as it takes.
        let lengths = [0x02, 0, 0x0F, 1, 255, 0x04, 0x00, 0x0F, 1, 0];
        assert_eq!(pglz(&lengths[..5], 1 + 273), Some(vec![0; 274]));
        assert_eq!(pglz(&[0x01, 0x0F, 1, 0], 20), None, "there is nothing to go back to");
        let lz4 = record(0, Some((IMAGE_HAS_HOLE | IMAGE_LZ4, hole_at, &without, Some(hole_bytes))), &[]);
        assert!(added(&lz4, 15).is_empty());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300), major in 14_u16..19) {
            let mut head = vec![0; RECORD_HEADER_BYTES];
            head[17] = RM_HEAP;
            head.extend(&bytes);
            let (start, end) = (pgherd_core::types::Lsn(8), pgherd_core::types::Lsn(16));
            Record { start, end, major, head: &head }.added(8192, |_| true, |_, _| {});
            rows(&bytes, |_| {});
            let _page = pglz(&bytes, 500);
        }
    }
}
