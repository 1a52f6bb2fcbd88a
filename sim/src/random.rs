//! The one source of chance: a small generator (SplitMix64), so that a seed alone decides a whole run.
//!
//! Own code instead of a crate: a change of a library's algorithm would make every seed of the past
//! worthless.

/// A stream of numbers that its seed decides.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
    /// Every draw takes the middle of its range; for scripts, where a reader should see round numbers.
    still: bool,
}

impl Random {
    pub fn new(seed: u64) -> Random {
        Random { state: seed ^ 0x6A09_E667_F3BC_C908, still: false }
    }

    /// A generator without chance: ranges give their middle, and nothing unlikely happens.
    pub fn still() -> Random {
        Random { state: 0, still: true }
    }

    pub fn is_still(&self) -> bool {
        self.still
    }

    #[expect(
        clippy::should_implement_trait,
        reason = "a source of numbers that never ends is no iterator to its users"
    )]
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to `bound` - 1; 0 if there is nothing to choose from.
    pub fn below(&mut self, bound: u64) -> u64 {
        if self.still || bound < 2 {
            return 0;
        }
        // The bias of a multiplication is far below what a test could notice.
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// From `least` to `most`, both possible.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        if self.still {
            return least + (most - least) / 2;
        }
        least + self.below(most - least + 1)
    }

    /// True once in `in_how_many`, on average.
    pub fn once_in(&mut self, in_how_many: u64) -> bool {
        !self.still && self.below(in_how_many) == 0
    }
}
