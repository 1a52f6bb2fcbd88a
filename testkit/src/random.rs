//! Reproducible randomness: the same seed gives the same numbers, everywhere and for ever.

/// SplitMix64: full period, no state to get wrong, and good enough to draw faults and lose packets.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    pub fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// In `[0, 1)`.
    pub fn fraction(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.fraction() < probability
    }

    /// In `[low, high)`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        assert!(low < high, "an empty range has no number");
        low + self.bits() % (high - low)
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.between(0, from.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn a_seed_gives_the_same_numbers_and_another_seed_others() {
        let draw =
            |seed| (0..8).map(|_| 0).scan(Random::new(seed), |random, _: i32| Some(random.bits())).collect();
        let (first, again, other): (Vec<u64>, Vec<u64>, Vec<u64>) = (draw(7), draw(7), draw(8));
        assert_eq!(first, again);
        assert_ne!(first, other);
    }

    #[test]
    fn chances_come_out_about_right() {
        let mut random = Random::new(1);
        let hits = (0..100_000).filter(|_| random.chance(0.1)).count();
        assert!((9_000..11_000).contains(&hits), "{hits} of 100,000 at 10 %");
        assert!(!random.chance(0.0) && random.chance(1.0));
    }
}
