//! Repeated measurements and the few numbers that say what they are worth.

use std::time::Duration;

/// Durations of the rounds of one benchmark.
#[derive(Clone, Debug, Default)]
pub struct Rounds(Vec<Duration>);

impl Rounds {
    pub fn add(&mut self, measured: Duration) {
        let place = self.0.partition_point(|known| *known <= measured);
        self.0.insert(place, measured);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The value that `part` of the rounds do not exceed; linear between neighbours.
    fn quantile(&self, part: f64) -> Option<Duration> {
        let place = part * (self.0.len().checked_sub(1)?) as f64;
        let (low, high) = (self.0[place.floor() as usize], self.0[place.ceil() as usize]);
        Some(low + (high - low).mul_f64(place.fract()))
    }

    pub fn median(&self) -> Option<Duration> {
        self.quantile(0.5)
    }

    pub fn best(&self) -> Option<Duration> {
        self.0.first().copied()
    }

    pub fn worst(&self) -> Option<Duration> {
        self.0.last().copied()
    }

    /// The middle half lies this far apart.
    pub fn spread(&self) -> Option<Duration> {
        Some(self.quantile(0.75)? - self.quantile(0.25)?)
    }
}

#[cfg(test)]
mod tests {
    use super::Rounds;
    use std::time::Duration;

    #[test]
    fn the_numbers_of_rounds_do_not_depend_on_their_order() {
        let mut rounds = Rounds::default();
        assert_eq!((rounds.median(), rounds.worst(), rounds.spread()), (None, None, None));
        for ms in [400, 100, 300, 200, 1000] {
            rounds.add(Duration::from_millis(ms));
        }
        let ms = |duration: Option<Duration>| duration.unwrap().as_millis();
        assert_eq!((ms(rounds.best()), ms(rounds.median()), ms(rounds.worst())), (100, 300, 1000));
        assert_eq!(ms(rounds.spread()), 200);
        rounds.add(Duration::from_millis(400));
        assert_eq!(ms(rounds.median()), 350);
    }
}
