//! A mutation fuzzer: takes an input that reached something, changes it a little, keeps it if it reached
//! more.
//!
//! What is reached is said by the target itself, as features, because coverage of the machine code would need
//! another compiler. Everything follows from one seed. Leaves out what is right or wrong. Hazard: features
//! that do not tell deep states apart leave it at the surface, so targets mark pairs of what they see.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

const MAX_INPUT_BYTES: usize = 400;
const MAX_KEPT: usize = 4_000;
const MAX_CHANGES: u64 = 4;

/// Tries one input; `planted` turns on the target's own bug. What it returns as an error is a finding.
pub(super) type Target = fn(input: &[u8], planted: bool, reached: &mut Reached) -> Result<(), String>;

/// What the inputs so far have reached.
#[derive(Default)]
pub(super) struct Reached {
    features: BTreeSet<u32>,
    types: BTreeSet<char>,
    more: bool,
}

impl Reached {
    pub(super) fn kind(&mut self, kind: u8) {
        self.types.insert(char::from(kind));
        self.feature(u32::from(kind));
    }

    pub(super) fn feature(&mut self, feature: u32) {
        self.more |= self.features.insert(feature);
    }
}

pub(super) struct Finding {
    pub execution: u64,
    pub text: String,
}

pub(super) struct Outcome {
    pub executions: u64,
    pub elapsed: Duration,
    pub kept: usize,
    pub features: usize,
    pub types: String,
    pub finding: Option<Finding>,
}

/// SplitMix64: small, and the same on every machine.
pub(super) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

pub(super) fn run(target: Target, seeds: &[&[u8]], planted: bool, executions: u64, seed: u64) -> Outcome {
    let began = Instant::now();
    let mut random = Random(seed);
    let mut reached = Reached::default();
    let mut kept: Vec<Vec<u8>> = Vec::new();
    let (mut finding, mut execution) = (None, 0);
    while execution < executions && finding.is_none() {
        let input = match seeds.get(execution as usize) {
            Some(seed) => seed.to_vec(),
            None => mutated(&kept, &mut random),
        };
        execution += 1;
        reached.more = false;
        let verdict = catch_unwind(AssertUnwindSafe(|| target(&input, planted, &mut reached)));
        let wrong = match verdict {
            Ok(Ok(())) => None,
            Ok(Err(wrong)) => Some(wrong),
            Err(_) => Some("panic".to_owned()),
        };
        finding = wrong.map(|text| Finding { execution, text: format!("{text}: {}", input.escape_ascii()) });
        if (reached.more || kept.is_empty()) && kept.len() < MAX_KEPT {
            kept.push(input);
        }
    }
    Outcome {
        executions: execution,
        elapsed: began.elapsed(),
        kept: kept.len(),
        features: reached.features.len(),
        types: reached.types.into_iter().collect(),
        finding,
    }
}

/// Numbers that lengths go wrong at.
const LENGTHS: &[u32] = &[
    0,
    1,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    12,
    255,
    264,
    265,
    2_000,
    2_001,
    10_000,
    10_001,
    10_004,
    10_005,
    30_000,
    30_001,
    65_535,
    65_536,
    0x3fff_fffe,
    0x3fff_ffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    0xffff_ffff,
];

fn mutated(kept: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = kept[random.below(kept.len())].clone();
    for _ in 0..=random.next() % MAX_CHANGES {
        let at = random.below(bytes.len() + 1);
        let length = 1 + random.below(16);
        let end = (at + length).min(bytes.len());
        match random.next() % 10 {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => bytes.insert(at, random.next() as u8),
            3 => drop(bytes.drain(at..end)),
            4 => bytes.truncate(at),
            5 => {
                // Something that is there already, once more.
                let again = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, again);
            }
            6 if at + 4 <= bytes.len() => {
                let length = LENGTHS[random.below(LENGTHS.len())];
                bytes[at..at + 4].copy_from_slice(&length.to_be_bytes());
            }
            7 => {
                // The end of another input.
                let other = &kept[random.below(kept.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            8 => {
                // A part of another input in between.
                let other = &kept[random.below(kept.len())];
                let from = random.below(other.len() + 1);
                let to = (from + length).min(other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            _ if at < bytes.len() => bytes[at] = [0, 1, 4, 0x7f, 0x80, 0xff][random.below(6)],
            _ => {}
        }
    }
    bytes.truncate(MAX_INPUT_BYTES);
    bytes
}
