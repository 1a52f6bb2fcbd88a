//! The shared layout: round trips, every kind of damage, and the promise that a range read is as sure as a whole one.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::breakage::{Broken, breaking};
use crate::seal::test_protection;
use crate::store::Store;
use crate::testing::{Cloud, Random, run};

fn name() -> Name {
    "cluster/1/packs/20261120T000000/00000000".parse().unwrap()
}

fn object(frames: &[Vec<u8>], extra: &[u8], protection: &Protection) -> Sealed {
    let mut writer = Writer::new(Kind::Pack, name(), protection).unwrap();
    // The first frame is reserved and filled last, as a frame of small files is.
    let reserved = writer.reserve();
    for frame in &frames[1..] {
        writer.push(frame).unwrap();
    }
    writer.fill(reserved, &frames[0]).unwrap();
    writer.finish(extra).unwrap()
}

fn read_all(bytes: &[u8], protection: &Protection) -> Result<(Vec<Vec<u8>>, Vec<u8>), Damage> {
    let table = Table::of_whole(Kind::Pack, &name(), protection, bytes)?;
    let frames = (0..table.frames().len() as u32)
        .map(|number| table.open_in(number, bytes, &mut FrameReader::default()));
    Ok((frames.collect::<Result<_, _>>()?, table.extra.clone()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn frames_come_back(sizes in proptest::collection::vec(1usize..6000, 1..12), seed: u64, sealed: bool) {
        let mut random = Random(seed);
        let frames: Vec<Vec<u8>> = sizes.iter().map(|size| random.bytes(*size)).collect();
        let protection = if sealed { test_protection(&[1]) } else { Protection::Plain };
        let object = object(&frames, b"extra", &protection);
        let (read, extra) = read_all(&object.bytes, &protection).unwrap();
        prop_assert_eq!(read, frames);
        prop_assert_eq!(extra, b"extra");
    }

    #[test]
    fn any_bytes_are_an_error_and_no_more(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(read_all(&bytes, &Protection::Plain).is_err());
        // With a beginning and an end that are right, it gets further.
        let mut framed = header(Kind::Pack, None).to_vec();
        framed.extend(&bytes);
        framed.extend(END);
        prop_assert!(read_all(&framed, &Protection::Plain).is_err());
    }
}

#[test]
fn every_changed_byte_of_an_object_that_is_read_as_a_whole_is_noticed() {
    let mut random = Random(7);
    let frames = [random.bytes(300), random.bytes(500)];
    for protection in [Protection::Plain, test_protection(&[1])] {
        let bytes = object(&frames, b"extra", &protection).bytes.to_vec();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            assert!(read_all(&changed, &protection).is_err(), "byte {at} of {}", bytes.len());
            assert!(read_all(&bytes[..at], &protection).is_err(), "cut at {at}");
        }
    }
}

/// Damage to frames, read one by one out of the middle: the content that was written, or an error.
fn damaged_frames_that_are_returned(rounds: u64) -> u64 {
    let mut random = Random(11);
    let frames: Vec<Vec<u8>> = (0..4).map(|_| random.bytes(2000)).collect();
    let sealed = object(&frames, b"", &Protection::Plain);
    let table = Table::of_whole(Kind::Pack, &name(), &Protection::Plain, &sealed.bytes).unwrap();
    let mut wrong = 0;
    for _ in 0..rounds {
        let number = random.below(4) as u32;
        let place = table.place(number).unwrap();
        let mut stored = sealed.bytes[place.start as usize..place.end as usize].to_vec();
        let at = random.below(stored.len() as u64) as usize;
        stored[at] ^= 1 << random.below(8);
        if let Ok(content) = table.open(number, &stored, &mut FrameReader::default()) {
            wrong += u64::from(content != frames[number as usize]);
        }
    }
    wrong
}

#[test]
fn a_frame_with_a_changed_byte_is_never_returned() {
    assert_eq!(damaged_frames_that_are_returned(1000), 0);
    let without = breaking(Some(Broken::NoFrameHash), || damaged_frames_that_are_returned(1000));
    assert!(without > 100, "a build without frame hashes is caught: {without} wrong reads");
}

#[test]
fn an_object_is_not_taken_for_another() {
    let object = object(&[vec![1; 100], vec![2; 100]], b"", &Protection::Plain);
    let other: Name = "cluster/1/packs/20261120T000000/00000001".parse().unwrap();
    let damage = Table::of_whole(Kind::Pack, &other, &Protection::Plain, &object.bytes).err().unwrap();
    assert_eq!(damage, Damage::OtherObject { wanted: other.to_string() });
    let damage = Table::of_whole(Kind::Map, &name(), &Protection::Plain, &object.bytes).err().unwrap();
    assert_eq!(damage.to_string(), "it is a pack, where a map should be");
    let mut newer = object.bytes.to_vec();
    newer[6] = 2;
    let damage = Table::of_whole(Kind::Pack, &name(), &Protection::Plain, &newer).err().unwrap();
    assert_eq!(damage, Damage::Newer { found: 2 });
    let damage = Table::of_whole(Kind::Pack, &name(), &test_protection(&[1]), &object.bytes).err().unwrap();
    assert!(damage.to_string().contains("cannot be decrypted"), "{damage}");
}

#[test]
fn a_footer_that_is_longer_than_the_first_read_is_read_again() {
    let frames: Vec<Vec<u8>> = (0..3000u32).map(|number| number.to_le_bytes().to_vec()).collect();
    let object = object(&frames, b"", &Protection::Plain);
    let cloud = Cloud::new(1);
    let store = Store::over(Arc::clone(&cloud) as Arc<dyn object_store::ObjectStore>);
    run(async {
        store.put(&name(), object.bytes.clone()).await.unwrap();
        let table = Table::read(Kind::Pack, &name(), &Protection::Plain, &store).await.unwrap();
        assert_eq!(table.hash, object.hash);
        assert_eq!(
            table.fetch(2999, &name(), &store, &mut FrameReader::default()).await.unwrap(),
            frames[2999]
        );
        assert!(table.fetch(3000, &name(), &store, &mut FrameReader::default()).await.is_err());
    });
}

#[test]
fn a_frame_that_was_reserved_has_to_be_filled() {
    let mut writer = Writer::new(Kind::Pack, name(), &Protection::Plain).unwrap();
    let _reserved = writer.reserve();
    assert!(writer.finish(b"").is_err());
}
