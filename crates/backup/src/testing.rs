//! What tests of this crate share.
//!
//! Left out: anything that a test is about. Hazard: a test that cannot be repeated; so randomness comes from seeds, and
//! asynchronous code runs on one thread.

use jiff::Timestamp;

mod backups;
mod cloud;

pub(crate) use backups::{
    PLACE, SEGMENT_BYTES, SYSTEM, archive, archive_of, beginning, encrypted, facts, prepare, read_back,
    repository, segment, segments, take, take_archived, wal,
};
pub(crate) use cloud::Cloud;

/// Numbers from a seed.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Half of it repeats, so that it can be compressed somewhat.
    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 16);
        while bytes.len() < count {
            bytes.extend(self.next().to_le_bytes());
            bytes.extend([0xAB; 8]);
        }
        bytes.truncate(count);
        bytes
    }
}

pub(crate) fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// Runs async code on this thread alone, so that switches of rules and the order of steps hold.
pub(crate) fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}
