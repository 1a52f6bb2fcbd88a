//! SplitMix64: small, and the same on every machine, so that a seed says everything about an execution.
//!
//! Own code instead of a crate, for the reason that `sim` has: a change of a library's algorithm would make
//! every seed of the past worthless.

#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed ^ 0x6a09_e667_f3bc_c908)
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// From 0 to `bound` - 1; 0 if there is nothing to choose from.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.number()) * bound.max(1) as u128) >> 64) as usize
    }

    pub fn once_in(&mut self, in_how_many: usize) -> bool {
        self.below(in_how_many) == 0
    }

    pub fn byte(&mut self) -> u8 {
        self.number() as u8
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}
