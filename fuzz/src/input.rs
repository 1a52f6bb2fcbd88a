//! What is tried: a conversation in parts, its form as bytes, and how one becomes another.
//!
//! A part says who speaks and what; what the speakers are is for each target to say. Changes are those that
//! conversations go wrong by: parts are lost, doubled, swapped, split and joined, lengths lie, bits flip, and
//! pieces of other conversations get in between. Leaves out what a good conversation is. Hazard: a change
//! that depends on anything but the input and its seed cannot be repeated.

use crate::random::Random;

const MAX_PARTS: usize = 48;
const MAX_PART_BYTES: usize = 1_500;
/// A part is said up to 2^9 times.
const MAX_TIMES_LOG2: u8 = 9;
const MAX_CHANGES: usize = 4;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    pub who: u8,
    /// It is said so often, as a power of two.
    pub times_log2: u8,
    pub bytes: Vec<u8>,
}

impl Part {
    pub fn new(who: u8, bytes: impl Into<Vec<u8>>) -> Part {
        Part { who, times_log2: 0, bytes: bytes.into() }
    }

    pub fn times(&self) -> usize {
        1 << self.times_log2.min(MAX_TIMES_LOG2)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Input {
    /// What each target makes of it.
    pub mode: u8,
    pub parts: Vec<Part>,
}

impl Input {
    /// Mode, then each part: who, how often, its length in two bytes, its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.mode];
        for part in &self.parts {
            bytes.extend([part.who, part.times_log2]);
            bytes.extend((part.bytes.len() as u16).to_be_bytes());
            bytes.extend_from_slice(&part.bytes);
        }
        bytes
    }

    /// Of any bytes; what is cut off is as long as it is.
    pub fn of_bytes(bytes: &[u8]) -> Input {
        let Some((&mode, mut rest)) = bytes.split_first() else { return Input::default() };
        let mut parts = Vec::new();
        while let Some((&[who, times_log2, high, low], behind)) = rest.split_first_chunk() {
            let length = usize::from(u16::from_be_bytes([high, low])).min(behind.len());
            let (body, behind) = behind.split_at(length);
            parts.push(Part { who, times_log2: times_log2.min(MAX_TIMES_LOG2), bytes: body.to_vec() });
            rest = behind;
        }
        Input { mode, parts }
    }

    /// Each part's bytes once.
    pub fn distinct_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.len()).sum()
    }

    /// The same with some changes; `other` is where pieces of another conversation come from.
    pub fn changed(&self, random: &mut Random, other: impl FnOnce(&mut Random) -> Input) -> Input {
        let mut input = self.clone();
        let changes = 1 + random.below(MAX_CHANGES);
        if random.once_in(2) {
            // Else most of the time goes into what is said again and again.
            input.parts.iter_mut().for_each(|part| part.times_log2 = 0);
        }
        let other = if random.once_in(4) { Some(other(random)) } else { None };
        for _ in 0..changes {
            input.change(random, other.as_ref());
        }
        input.parts.truncate(MAX_PARTS);
        input.parts.iter_mut().for_each(|part| part.bytes.truncate(MAX_PART_BYTES));
        input
    }

    fn change(&mut self, random: &mut Random, other: Option<&Input>) {
        if let Some(other) = other.filter(|other| !other.parts.is_empty() && random.once_in(2)) {
            let from = random.below(other.parts.len());
            let to = from + 1 + random.below(other.parts.len() - from);
            let at = random.below(self.parts.len() + 1);
            self.parts.splice(at..at, other.parts[from..to].iter().cloned());
            return;
        }
        if random.once_in(40) {
            self.mode = random.byte();
        }
        if self.parts.is_empty() {
            self.parts.push(Part::new(random.byte(), Vec::new()));
        }
        let at = random.below(self.parts.len());
        match random.below(14) {
            0 => drop(self.parts.remove(at)),
            1 => self.parts.insert(at, self.parts[at].clone()),
            2 => {
                let to = random.below(self.parts.len());
                self.parts.swap(at, to);
            }
            3 => {
                let part = &mut self.parts[at];
                let behind = part.bytes.split_off(random.below(part.bytes.len() + 1));
                let behind = Part { bytes: behind, ..part.clone() };
                self.parts.insert(at + 1, behind);
            }
            4 if at + 1 < self.parts.len() => {
                let next = self.parts.remove(at + 1);
                self.parts[at].bytes.extend(next.bytes);
            }
            5 => self.parts[at].who = random.byte(),
            6 if random.once_in(4) => {
                self.parts[at].times_log2 = random.below(usize::from(MAX_TIMES_LOG2) + 1) as u8;
            }
            7 => self.parts.truncate(at + 1),
            _ => change_bytes(&mut self.parts[at].bytes, random),
        }
    }

    /// Smaller ones, the smallest first.
    pub fn smaller(&self) -> Vec<Input> {
        let mut all = Vec::new();
        let count = self.parts.len();
        for length in [count / 2, count / 4, 1] {
            if length == 0 || length > count {
                continue;
            }
            for from in (0..=count - length).step_by(length) {
                let mut fewer = self.clone();
                fewer.parts.drain(from..from + length);
                all.push(fewer);
            }
        }
        for (at, part) in self.parts.iter().enumerate() {
            let mut with = |part: Part| {
                let mut smaller = self.clone();
                smaller.parts[at] = part;
                all.push(smaller);
            };
            if part.times_log2 > 0 {
                with(Part { times_log2: part.times_log2 - 1, ..part.clone() });
            }
            let bytes = part.bytes.len();
            for length in [bytes / 2, bytes / 4, bytes / 8, 1] {
                if length == 0 || length > bytes {
                    continue;
                }
                for from in (0..=bytes - length).step_by(length) {
                    let mut shorter = part.clone();
                    shorter.bytes.drain(from..from + length);
                    with(shorter);
                }
            }
        }
        all
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
    32_768,
    65_535,
    65_536,
    0x3fff_fffe,
    0x3fff_ffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    0xffff_ffff,
];

fn change_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    let end = (at + 1 + random.below(16)).min(bytes.len());
    match random.below(9) {
        0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        1 if at < bytes.len() => bytes[at] = random.byte(),
        2 => bytes.insert(at, random.byte()),
        3 => drop(bytes.drain(at..end)),
        4 => bytes.truncate(at),
        5 => {
            let again = bytes[at..end].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, again);
        }
        6 if at + 4 <= bytes.len() => {
            bytes[at..at + 4].copy_from_slice(&random.pick(LENGTHS).to_be_bytes());
        }
        // Of the first message, where it most often stands.
        7 if bytes.len() >= 5 => {
            let length = match random.below(3) {
                0 => random.pick(LENGTHS),
                1 => u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) ^ 1 << random.below(32),
                _ => bytes.len() as u32 - 1,
            };
            bytes[1..5].copy_from_slice(&length.to_be_bytes());
        }
        _ if at < bytes.len() => bytes[at] = random.pick(&[0, 1, 4, 0x7f, 0x80, 0xff]),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_its_bytes() {
        let input = Input {
            mode: 7,
            parts: vec![
                Part::new(1, *b"abc"),
                Part { who: 2, times_log2: 3, bytes: vec![] },
                Part::new(0, vec![0; 300]),
            ],
        };
        assert_eq!(Input::of_bytes(&input.to_bytes()), input);
        assert_eq!(Input::of_bytes(b""), Input::default());
        assert_eq!(Input::of_bytes(b"\x01\x02\x00\xff\xffab").parts, [Part::new(2, *b"ab")]);
    }

    #[test]
    fn a_change_follows_from_its_seed() {
        let input =
            Input { mode: 0, parts: vec![Part::new(0, *b"Q\0\0\0\x05\0"), Part::new(1, *b"Z\0\0\0\x05I")] };
        let changed = |seed| input.changed(&mut Random::new(seed), |_| Input::default());
        assert!((0..200).all(|seed| changed(seed) == changed(seed)));
        assert!((0..200).filter(|seed| changed(*seed) != input).count() > 150);
        assert_eq!(Input::default().smaller(), []);
        assert!(input.smaller().iter().all(|smaller| smaller.to_bytes().len() < input.to_bytes().len()));
    }
}
