//! One page of a relation: its position in WAL, and PostgreSQL's checksum of it.
//!
//! Leaves out: what is on a page. Hazard: a page that is being written while it is read looks damaged. So a page is
//! judged only if it was last changed before the backup began, and whoever asks reads again what looks wrong.

use pgherd_core::types::Lsn;

/// `PageHeaderData`: where the checksum lies, where the end of the free space, and its length without line pointers.
const CHECKSUM: std::ops::Range<usize> = 8..10;
const UPPER: std::ops::Range<usize> = 14..16;
const HEADER_BYTES: usize = 24;

/// Lanes of PostgreSQL's checksum, a variant of FNV-1a that a compiler can vectorise (`checksum_impl.h`).
const LANES: usize = 32;
const PRIME: u32 = 16_777_619;
const OFFSETS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// The position behind the last record that changed the page.
pub(crate) fn lsn(page: &[u8]) -> Lsn {
    let half = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|byte| page[at + byte])));
    Lsn(half(0) << 32 | half(4))
}

/// Whether a page that was last changed before `start` is not as PostgreSQL wrote it. `block` counts over all files of
/// the fork. `page` has at least a page's header.
pub(crate) fn looks_damaged(page: &[u8], block: u32, start: Lsn) -> bool {
    if page.len() < HEADER_BYTES {
        return false;
    }
    // A page that was never initialised has no checksum, and nothing else either.
    if page[UPPER] == [0, 0] {
        return page.iter().any(|byte| *byte != 0);
    }
    lsn(page) < start && page[CHECKSUM] != checksum(page, block).to_le_bytes()
}

fn checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = OFFSETS;
    let (rows, _) = page.as_chunks::<{ LANES * 4 }>();
    for (number, row) in rows.iter().enumerate() {
        let (words, _) = row.as_chunks::<4>();
        let mut values = [0; LANES];
        for (value, word) in values.iter_mut().zip(words) {
            *value = u32::from_le_bytes(*word);
        }
        if number == 0 {
            // The checksum itself counts as zero.
            values[CHECKSUM.start / 4] &= 0xFFFF_0000;
        }
        mix(&mut sums, &values);
    }
    for _ in 0..2 {
        mix(&mut sums, &[0; LANES]);
    }
    let folded = sums.iter().fold(0, |folded, sum| folded ^ sum) ^ block;
    (folded % 65_535 + 1) as u16
}

fn mix(sums: &mut [u32; LANES], values: &[u32; LANES]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        let mixed = *sum ^ value;
        *sum = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_BYTES: usize = 8192;

    fn page(changed: Lsn, block: u32) -> Vec<u8> {
        let mut page: Vec<u8> = (0..PAGE_BYTES).map(|at| (at * 7 % 251) as u8).collect();
        page[..4].copy_from_slice(&((changed.0 >> 32) as u32).to_le_bytes());
        page[4..8].copy_from_slice(&(changed.0 as u32).to_le_bytes());
        let sum = checksum(&page, block);
        page[CHECKSUM].copy_from_slice(&sum.to_le_bytes());
        page
    }

    #[test]
    fn every_changed_byte_and_a_page_at_another_place_is_seen() {
        let (changed, start) = (Lsn(0x1_0000_0010), Lsn(0x1_0000_0020));
        let right = page(changed, 5);
        assert!(!looks_damaged(&right, 5, start));
        assert!(looks_damaged(&right, 6, start), "it is another page's");
        for at in (8..PAGE_BYTES).step_by(97) {
            let mut wrong = right.clone();
            wrong[at] ^= 1;
            assert!(looks_damaged(&wrong, 5, start), "byte {at}");
        }
    }

    #[test]
    fn pages_that_changed_since_the_start_and_those_without_content_are_not_judged() {
        let start = Lsn(0x1_0000_0020);
        let mut torn = page(start, 5);
        torn[5000] ^= 1;
        assert!(!looks_damaged(&torn, 5, start), "WAL has all of it");
        assert!(!looks_damaged(&[0; PAGE_BYTES], 5, start));
        let mut stained = vec![0; PAGE_BYTES];
        stained[4000] = 1;
        assert!(looks_damaged(&stained, 5, start), "nobody writes into a page without a header");
    }
}
