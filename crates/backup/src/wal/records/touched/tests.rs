//! Records of every kind that says what it changes, made by hand in the form of each version.

use super::super::added::{HAS_DATA, HAS_IMAGE, SAME_RELATION};
use super::super::{
    BLOCK_DATA_LONG, BLOCK_DATA_SHORT, BLOCK_ORIGIN, BLOCK_TOPLEVEL_XID, RECORD_HEADER_BYTES,
};
use super::*;
use crate::breakage::breaking;
use pgherd_core::types::Lsn;

const FILE: RelationFile = RelationFile { tablespace: 1663, database: 5, number: 16384 };
const OTHER: RelationFile = RelationFile { tablespace: 1664, database: 0, number: 1262 };

const IMAGE_HAS_HOLE: u8 = 0x01;
const IMAGE_PGLZ: u8 = 0x04;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn of(file: RelationFile) -> [u32; 3] {
    [file.tablespace, file.database, file.number]
}

/// A record with these bytes behind its header.
fn record(manager: u8, info: u8, body: &[u8]) -> Vec<u8> {
    let mut head = vec![0; RECORD_HEADER_BYTES];
    head[0..4].copy_from_slice(&((RECORD_HEADER_BYTES + body.len()) as u32).to_le_bytes());
    (head[16], head[17]) = (info, manager);
    [head, body.to_vec()].concat()
}

/// Data of its own, in front of which stands how long it is.
fn data(data: &[u8]) -> Vec<u8> {
    [&[BLOCK_DATA_SHORT, data.len() as u8][..], data].concat()
}

fn touched(head: &[u8], major: u16) -> Result<Vec<Touched>, Untold> {
    let record = Record { start: Lsn(8), end: Lsn(16), major, head };
    let mut all = Vec::new();
    record.touched(8192, |touched| all.push(touched)).map(|()| all)
}

fn page(file: RelationFile, block: u32) -> Touched {
    Touched::Page { file, block }
}

#[test]
fn blocks_are_found_whatever_stands_between_them() {
    // The origin of a change, a page with data, one of the same relation that is an image with a hole, and forks that do not count.
    let mut body = vec![BLOCK_ORIGIN, 7, 0, BLOCK_TOPLEVEL_XID, 1, 2, 3, 4];
    body.extend([0, HAS_DATA, 3, 0]);
    body.extend(words(&of(FILE)));
    body.extend(words(&[9]));
    body.extend([1, HAS_IMAGE | SAME_RELATION, 0, 0, 100, 0, 24, 0, IMAGE_HAS_HOLE]);
    body.extend(words(&[131_072]));
    body.extend([2, HAS_IMAGE | 2, 0, 0, 50, 0, 24, 0, IMAGE_HAS_HOLE | IMAGE_PGLZ, 0, 1]);
    body.extend(words(&of(OTHER)));
    body.extend(words(&[3]));
    body.extend([3, SAME_RELATION, 0, 0]);
    body.extend(words(&[4]));
    let wanted = vec![page(FILE, 9), page(FILE, 131_072), page(OTHER, 4)];
    let with_data = [&body[..], &[BLOCK_DATA_SHORT, 2], &[0; 3 + 100 + 50 + 2]].concat();
    assert_eq!(touched(&record(10, 0, &with_data), 15), Ok(wanted.clone()));
    let long = [&body[..], &[BLOCK_DATA_LONG, 0, 1, 0, 0], &[0; 3 + 100 + 50 + 256]].concat();
    assert_eq!(touched(&record(11, 0x30, &long), 18), Ok(wanted.clone()));
    // Without data of its own nothing says that there is no further block.
    let without = [&body[..], &[0; 3 + 100 + 50]].concat();
    assert_eq!(touched(&record(20, 0, &without), 15), Ok(wanted.clone()));
    // Only its beginning is kept of a long record; what it changes stands there.
    let mut cut = record(10, 0, &without);
    cut.truncate(cut.len() - 120);
    assert_eq!(touched(&cut, 15), Ok(wanted));
    let ends_inside = record(10, 0, &body[..20]);
    assert_eq!(touched(&ends_inside, 15), Err(Untold::Malformed { manager: 10 }));
}

#[test]
fn an_image_that_is_compressed_is_told_by_the_bit_of_its_version() {
    // In 14 the bit of one that is applied is where 15 has that of a compressed one.
    let mut body = vec![0, HAS_IMAGE, 0, 0, 50, 0, 24, 0, IMAGE_HAS_HOLE | 0x04];
    body.extend(words(&of(FILE)));
    body.extend(words(&[9]));
    body.extend([0; 50]);
    assert_eq!(touched(&record(0, 0xB0, &body), 14), Ok(vec![page(FILE, 9)]));
    let mut body = vec![0, HAS_IMAGE, 0, 0, 50, 0, 24, 0, IMAGE_HAS_HOLE | 0x04, 0, 1];
    body.extend(words(&of(FILE)));
    body.extend(words(&[9]));
    body.extend([0; 50]);
    for major in 15..=18 {
        assert_eq!(touched(&record(0, 0xB0, &body), major), Ok(vec![page(FILE, 9)]), "{major}");
    }
}

#[test]
fn files_that_are_made_cut_off_and_deleted_are_told() {
    let made = |fork| record(RM_SMGR, SMGR_CREATE, &data(&words(&[of(FILE).as_slice(), &[fork]].concat())));
    assert_eq!(touched(&made(0), 15), Ok(vec![Touched::From { file: FILE, block: 0 }]));
    assert_eq!(touched(&made(3), 15), Ok(vec![]), "an init fork is none that is remembered");
    let cut = words(&[&[77], of(FILE).as_slice(), &[7]].concat());
    assert_eq!(
        touched(&record(RM_SMGR, SMGR_TRUNCATE, &data(&cut)), 15),
        Ok(vec![Touched::From { file: FILE, block: 77 }])
    );
    let mut end = vec![0; 8];
    end.extend(words(&[super::super::HAS_RELFILELOCATORS, 2]));
    end.extend(words(&of(FILE)));
    end.extend(words(&of(OTHER)));
    let both = vec![Touched::From { file: FILE, block: 0 }, Touched::From { file: OTHER, block: 0 }];
    for kind in [XACT_COMMIT, XACT_COMMIT_PREPARED, XACT_ABORT, XACT_ABORT_PREPARED] {
        assert_eq!(touched(&record(RM_XACT, kind | XACT_HAS_INFO, &data(&end)), 15), Ok(both.clone()));
        let cut = record(RM_XACT, kind | XACT_HAS_INFO, &data(&end[..30]));
        assert_eq!(touched(&cut, 15), Err(Untold::Malformed { manager: RM_XACT }));
    }
    assert_eq!(touched(&record(RM_XACT, XACT_PREPARE, &data(&[0; 90])), 15), Ok(vec![]));
    let dropped = record(RM_TBLSPC, TBLSPC_DROP, &data(&words(&[16385])));
    assert_eq!(touched(&dropped, 15), Ok(vec![Touched::Tablespace(16385)]));
}

#[test]
fn databases_are_made_in_the_ways_of_each_version() {
    let kinds = |major| {
        [0x00, 0x10, 0x20, 0x30]
            .map(|kind| touched(&record(RM_DBASE, kind, &data(&words(&[16390, 1663, 1, 1663]))), major))
    };
    let told = Ok(vec![Touched::Database(16390)]);
    let unknown = |kind| Err(Untold::Type { manager: RM_DBASE, kind });
    assert_eq!(kinds(14), [told.clone(), told.clone(), unknown(0x20), unknown(0x30)]);
    for major in 15..=18 {
        assert_eq!(kinds(major), [told.clone(), told.clone(), told.clone(), unknown(0x30)], "{major}");
    }
}

#[test]
fn what_is_not_known_for_certain_is_an_error() {
    for manager in [22, 128, 255] {
        assert_eq!(touched(&record(manager, 0, &data(&[0; 8])), 15), Err(Untold::Manager { manager }));
    }
    for (manager, kind) in [(RM_SMGR, 0x30), (RM_TBLSPC, 0x20), (RM_XACT, 0x70), (RM_XLOG, 0xC0)] {
        let unknown = Err(Untold::Type { manager, kind });
        assert_eq!(touched(&record(manager, kind, &data(&[0; 40])), 15), unknown);
    }
    for manager in [RM_SMGR, RM_DBASE, RM_TBLSPC] {
        let short = record(manager, 0x10, &data(&[0; 3]));
        assert_eq!(touched(&short, 15), Err(Untold::Malformed { manager }));
    }
    let changed =
        |level| record(RM_XLOG, XLOG_PARAMETER_CHANGE, &data(&words(&[100, 8, 10, 0, 64, level, 0])));
    assert_eq!(touched(&changed(WAL_LEVEL_MINIMAL), 15), Err(Untold::MinimalWal));
    assert_eq!(touched(&changed(1), 15), Ok(vec![]));
    assert_eq!(touched(&changed(2), 15), Ok(vec![]));
}

#[test]
fn records_without_files_tell_nothing() {
    for (manager, info) in
        [(RM_XLOG, 0x40), (RM_XLOG, 0xD0), (RM_XLOG, 0xE0), (3, 0), (6, 0x20), (7, 0), (8, 0x10), (21, 0)]
    {
        assert_eq!(touched(&record(manager, info, &data(&[0; 16])), 17), Ok(vec![]), "{manager} {info}");
        assert!(touched(&record(manager, info, &[]), 17).is_ok(), "{manager} {info}");
    }
}

#[test]
fn a_build_that_passes_over_records_of_one_kind_does_not_find_them() {
    let mut body = vec![0, 0, 0, 0];
    body.extend(words(&of(FILE)));
    body.extend(words(&[9]));
    let head = record(10, 0, &body);
    assert_eq!(touched(&head, 15), Ok(vec![page(FILE, 9)]));
    let passed = breaking(Some(Broken::KindIgnored { manager: 10 }), || touched(&head, 15));
    assert_eq!(passed, Ok(vec![]));
}

proptest::proptest! {
    #[test]
    fn no_bytes_are_too_strange(
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
        manager in 0_u8..25, info in proptest::num::u8::ANY, major in 14_u16..19, more in 0_u32..100
    ) {
        let mut head = record(manager, info, &bytes);
        let length = head.len() as u32 + more;
        head[0..4].copy_from_slice(&length.to_le_bytes());
        let _told = touched(&head, major);
        head[0..4].copy_from_slice(&more.to_le_bytes());
        let _told = touched(&head, major);
    }
}
