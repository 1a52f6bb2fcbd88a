//! A backup is read from servers of many kinds, which take longer when it is read too fast for them.

use super::*;

const MIB: u64 = super::MIB.get();
/// As fast as the readers can.
const FASTEST: u64 = 400 * MIB;
const USUAL: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(60);

/// A backup of a server, and what became of it.
struct Run {
    pacing: Pacing,
    now: Duration,
    read: u64,
    pace: Option<u64>,
    /// Times at which the pace went down.
    cuts: Vec<Duration>,
}

impl Run {
    fn new() -> Run {
        let pacing = Pacing::new(Floor::Day);
        Run { pacing, now: Duration::ZERO, read: 0, pace: None, cuts: Vec::new() }
    }

    /// One that has seen clients and knows what is usual.
    fn learnt() -> Run {
        let mut run = Run::new();
        run.go(LEARNING, |_| USUAL);
        run.tick(Some(true), Some(USUAL));
        assert_eq!(run.pace, None);
        run.cuts.clear();
        run
    }

    fn tick(&mut self, clients: Option<bool>, flush: Option<Duration>) {
        self.now += TICK;
        self.read += self.speed() / 2;
        let times = flush.map(|flush| (Measure::Flush, flush)).into_iter().collect();
        let read_bytes = Some(self.read);
        let before = self.speed();
        self.pace = self.pacing.judge(self.now, &Seen { clients, times, read_bytes, total_bytes: 0 });
        if self.speed() < before {
            self.cuts.push(self.now);
        }
    }

    /// For so long, of a server that takes as long as `flush` says at a speed.
    fn go(&mut self, span: Duration, flush: impl Fn(u64) -> Duration) {
        let end = self.now + span;
        while self.now < end {
            let took = flush(self.speed());
            self.tick(Some(true), Some(took));
        }
    }

    fn speed(&self) -> u64 {
        self.pace.unwrap_or(FASTEST).min(FASTEST)
    }
}

/// A server that is quick up to so many bytes a second.
fn quick_up_to(capacity: u64) -> impl Fn(u64) -> Duration {
    move |speed| if speed > capacity { SLOW } else { USUAL }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn what_nobody_works_with_is_read_as_fast_as_it_can_be() {
    let mut run = Run::new();
    for _ in 0..200 {
        run.tick(Some(false), Some(seconds(3)));
        assert_eq!(run.pace, None);
    }
    assert_eq!(run.pacing.held_back(), Duration::ZERO);
}

#[test]
fn it_is_read_slowly_until_it_is_known_what_is_usual_and_then_at_full_speed() {
    let mut run = Run::new();
    let mut slow = 0;
    for _ in 0..20 {
        run.tick(Some(true), Some(USUAL));
        slow += u32::from(run.pace.is_some());
    }
    assert_eq!((slow, run.pace), (4, None), "two seconds of learning");
    assert_eq!(run.pacing.held_back(), Duration::ZERO, "nothing was slow");
}

#[test]
fn what_was_measured_while_nobody_was_there_is_not_what_is_usual() {
    let mut run = Run::new();
    for _ in 0..100 {
        run.tick(Some(false), Some(SLOW));
    }
    // Somebody comes, and it goes on being slow at that speed.
    run.go(seconds(60), quick_up_to(100 * MIB));
    assert!(run.speed() <= 100 * MIB, "{:?}", run.pace);
}

#[test]
fn it_slows_down_until_the_server_is_quick_again_and_recovers_when_it_can() {
    let mut run = Run::learnt();
    run.go(seconds(15), quick_up_to(60 * MIB));
    assert!(run.speed() <= 60 * MIB, "after a few halvings it is below: {:?}", run.pace);
    assert_eq!(run.pacing.slow(), None);
    run.go(seconds(120), |_| USUAL);
    assert_eq!(run.pace, None, "nothing holds it back any more");
    let held = run.pacing.held_back();
    assert!(held > seconds(10) && held < seconds(120), "{held:?}");
}

#[test]
fn what_is_slow_is_told() {
    let mut run = Run::learnt();
    while run.pace.is_none() {
        run.tick(Some(true), Some(SLOW));
    }
    assert_eq!(run.pacing.slow(), Some(Slow { what: Measure::Flush, takes: SLOW, usually: USUAL }));
    assert_eq!(run.cuts.len(), 1);
}

#[test]
fn a_constant_load_is_disturbed_ever_less_and_uses_most_of_what_there_is() {
    for capacity in [20 * MIB, 33 * MIB, 100 * MIB, 399 * MIB] {
        let mut run = Run::learnt();
        run.go(seconds(3600), quick_up_to(capacity));
        let (early, before) = (run.cuts.len(), run.read);
        run.go(seconds(3600), quick_up_to(capacity));
        let late = run.cuts.len() - early;
        // One attempt in five minutes, and now and then one more halving.
        assert!(early <= 60 && late <= 26, "{capacity}: {early}, then {late}");
        let used = (run.read - before) / 3600 * 100 / capacity;
        assert!((75..=101).contains(&used), "{used} % of {capacity}");
    }
}

#[test]
fn single_slow_ones_are_passed_over() {
    let mut run = Run::learnt();
    for number in 0..500 {
        let flush = if number % 5 < 2 { seconds(1) } else { USUAL };
        run.tick(Some(true), Some(flush));
        assert_eq!(run.pace, None, "{number}");
    }
}

#[test]
fn a_little_more_than_nothing_is_not_slow() {
    let mut run = Run::learnt();
    run.go(seconds(60), |_| Duration::from_millis(9));
    assert!(run.cuts.is_empty(), "nine times as long, and nobody would notice");
}

#[test]
fn it_never_goes_below_the_least_and_always_ends() {
    // Anything at all is measured, or is not.
    for seed in 1..200_u64 {
        let mut state = seed;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut run = Run::new();
        for _ in 0..2000 {
            let clients = [Some(true), Some(true), None, Some(false)][random(4) as usize];
            let flush = match random(6) {
                0 => None,
                1 => Some(Duration::MAX / 4),
                2 => Some(Duration::ZERO),
                _ => Some(Duration::from_millis(random(200))),
            };
            run.tick(clients, flush);
            assert!(run.speed() >= LEAST, "{seed}: {:?}", run.pace);
        }
        assert!(run.read >= LEAST * 1000, "{seed}: a thousand seconds at the least pace");
        run.go(seconds(900), |_| Duration::ZERO);
        assert_eq!(run.pace, None, "{seed}: whatever was before, calm ends it");
    }
}

#[test]
fn what_is_slow_at_the_least_pace_too_is_not_the_backups_doing() {
    let mut run = Run::learnt();
    run.go(seconds(30), |_| SLOW);
    assert_eq!(run.pace, Some(LEAST));
    run.go(seconds(240), |_| SLOW);
    assert_eq!(run.pace, None, "the server has become slower by itself, and stays so");
    run.cuts.clear();
    run.go(seconds(3600), |_| SLOW);
    assert!(run.cuts.is_empty());
    // It is quick again, and that is usual from then on.
    run.go(seconds(60), |_| USUAL);
    run.go(seconds(60), quick_up_to(100 * MIB));
    assert!(!run.cuts.is_empty());
}

#[test]
fn what_does_not_come_back_is_slow_and_what_cannot_be_measured_is_not() {
    let mut run = Run::learnt();
    let asked = run.now;
    while run.now < asked + seconds(20) {
        let waited = run.now - asked;
        run.tick(Some(true), Some(waited));
    }
    assert_eq!(run.pace, Some(LEAST));
    // It has not come back, and is given up.
    for _ in 0..500 {
        run.tick(None, None);
    }
    assert_eq!(run.pace, None);
    let mut blind = Run::new();
    for _ in 0..10 {
        blind.tick(None, None);
    }
    assert_eq!(blind.pace, None);
}

#[test]
fn when_clients_go_away_it_is_free_soon() {
    let mut run = Run::learnt();
    run.go(seconds(20), quick_up_to(10 * MIB));
    assert!(run.pace.is_some());
    run.tick(Some(false), Some(SLOW));
    assert!(run.pace.is_some(), "they may come back");
    for _ in 0..20 {
        run.tick(Some(false), Some(SLOW));
    }
    assert_eq!(run.pace, None);
}

#[test]
fn the_least_is_a_days_or_what_was_said() {
    assert_eq!(Floor::Day.pace(0), 8 * MIB);
    assert_eq!(Floor::Day.pace(86_400 * 50 * MIB), 50 * MIB);
    let said = Floor::of_mib(NonZeroU32::new(3).unwrap());
    assert_eq!(said.pace(86_400 * 50 * MIB), 3 * MIB);
}

#[test]
fn before_the_copy_it_is_learnt_and_nothing_is_held_back() {
    let mut pacing = Pacing::new(Floor::Day);
    let seen = |flush, read_bytes| {
        let times = [(Measure::Flush, flush)].into();
        Seen { clients: Some(true), times, read_bytes, total_bytes: 0 }
    };
    for tick in 0..6 {
        assert_eq!(pacing.judge(TICK * tick, &seen(USUAL, None)), None);
    }
    // The copy begins, and even at the least pace it is slow at once.
    for tick in 6..20 {
        pacing.judge(TICK * tick, &seen(SLOW, Some(0)));
    }
    assert_eq!(pacing.slow().map(|slow| slow.usually), Some(USUAL));
}
