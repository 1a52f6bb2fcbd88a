//! A server that is made here changes files and writes WAL; what is remembered from the WAL has to be all that it has changed.

#![allow(clippy::single_range_in_vec_init, reason = "ranges of pages are compared, often of one")]

use std::collections::BTreeMap;

use pgherd_core::types::Timeline;

use super::*;
use crate::breakage::{Broken, breaking};
use crate::testing::{Cloud, Random, SYSTEM, archive, repository, run, segment};
use crate::wal::records::tests::{FIRST, Writer};

const SEGMENT: usize = 1 << 20;
/// Small, so that relations have several files.
const FILE_PAGES: u32 = 16;

/// What each page of each relation is: a number that is never used twice.
type Contents = BTreeMap<RelationFile, Vec<u64>>;

struct Server {
    random: Random,
    wal: Writer,
    files: Contents,
    last: u64,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn of(file: RelationFile) -> [u32; 3] {
    [file.tablespace, file.database, file.number]
}

impl Server {
    fn new(seed: u64) -> Server {
        let mut server =
            Server { random: Random(seed), wal: Writer::of(SYSTEM), files: Contents::new(), last: 0 };
        for database in [5, 6] {
            for number in 0..6 {
                let file = RelationFile { tablespace: 1663 + number / 3, database, number: 16384 + number };
                let pages = (0..40).map(|_| server.new_content()).collect();
                server.files.insert(file, pages);
            }
        }
        server
    }

    fn new_content(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn some_file(&mut self) -> Option<RelationFile> {
        let at = self.random.below(self.files.len().max(1) as u64) as usize;
        self.files.keys().nth(at).copied()
    }

    fn write(&mut self, manager: u8, info: u8, data: &[u8]) {
        self.wal.write(manager, info, &[&[255, data.len() as u8][..], data].concat());
    }

    /// Some pages of one or two relations, with data or as images.
    fn change_pages(&mut self) {
        let (manager, info) =
            if self.random.below(4) == 0 { (0, 0xB0) } else { (10 + self.random.below(4) as u8, 0) };
        let (mut body, mut behind) = (Vec::new(), 0);
        let mut last = None;
        for id in 0..=self.random.below(3) as u8 {
            let Some(file) = self.some_file() else { return };
            let pages = self.files[&file].len() as u64;
            // One behind the end now and then, as a relation grows.
            let block = self.random.below(pages + 1) as u32;
            let content = self.new_content();
            let there = self.files.get_mut(&file).unwrap();
            match there.get_mut(block as usize) {
                Some(page) => *page = content,
                None => there.push(content),
            }
            let same = if last == Some(file) { 0x80 } else { 0 };
            let image = if self.random.below(3) == 0 { 0x10 } else { 0 };
            body.extend([id, same | image | 0x20, 30, 0]);
            behind += 30;
            if image != 0 {
                body.extend([200, 0, 24, 0, 1]);
                behind += 200;
            }
            if same == 0 {
                body.extend(words(&of(file)));
            }
            body.extend(words(&[block]));
            last = Some(file);
        }
        body.extend([255, 5]);
        body.extend(vec![0; behind + 5]);
        self.wal.write(manager, info, &body);
    }

    fn step(&mut self) {
        match self.random.below(40) {
            // Cut off, and longer again by pages of zeros, of which WAL has no word.
            0 => {
                let Some(file) = self.some_file() else { return };
                let block = self.random.below(self.files[&file].len() as u64 + 1) as u32;
                self.write(2, 0x20, &words(&[&[block], of(file).as_slice(), &[1]].concat()));
                let pages = self.files.get_mut(&file).unwrap();
                let before = pages.len();
                pages.truncate(block as usize);
                pages.resize(before, 0);
            }
            // Dropped, and made again with the same number.
            1 => {
                let Some(file) = self.some_file() else { return };
                self.write(2, 0x10, &words(&[of(file).as_slice(), &[0]].concat()));
                let pages = (0..self.random.below(50)).map(|_| 0).collect();
                self.files.insert(file, pages);
            }
            // A database with another one's files.
            2 => {
                self.write(4, 0, &words(&[6, 1663, 5, 1663]));
                self.files.retain(|file, _| file.database != 6);
                let copies: Vec<_> = self.files.iter().map(|(file, pages)| (*file, pages.clone())).collect();
                self.files.extend(
                    copies.into_iter().map(|(file, pages)| (RelationFile { database: 6, ..file }, pages)),
                );
            }
            3 => {
                self.write(5, 0, &words(&[1664]));
                for (_, pages) in self.files.iter_mut().filter(|(file, _)| file.tablespace == 1664) {
                    pages.iter_mut().for_each(|page| {
                        self.last += 1;
                        *page = self.last;
                    });
                }
            }
            4..=9 => self.write(8, 0x10, &[0; 20]),
            // What is no main fork.
            10..=14 => {
                let Some(file) = self.some_file() else { return };
                let mut body = vec![0, 2, 0, 0];
                body.extend(words(&of(file)));
                body.extend(words(&[0]));
                self.wal.write(10, 0, &body);
            }
            _ => self.change_pages(),
        }
    }
}

async fn put(archive: &Archive, timeline: u32, wal: &[u8]) {
    for (number, content) in (FIRST..).zip(wal.chunks(SEGMENT)) {
        archive.put_segment(segment(timeline, number), content).await.unwrap();
    }
}

fn never() -> Stopped {
    Arc::new(|| false)
}

fn nothing() -> Nearby {
    Arc::new(|_| None)
}

/// A backup whose files are read one after the other while everything goes on, and what has changed by the next one. The page that is lost, if one is.
fn lost(seed: u64) -> Option<(RelationFile, usize)> {
    run(async {
        let mut server = Server::new(seed);
        (0..100).for_each(|_| server.step());
        let start = server.wal.next();
        let mut parent = Contents::new();
        let names: Vec<RelationFile> = server.files.keys().copied().collect();
        for file in names {
            (0..3).for_each(|_| server.step());
            parent.extend(server.files.get(&file).map(|pages| (file, pages.clone())));
        }
        (0..server.random.below(300)).for_each(|_| server.step());
        let next = server.wal.next();
        let at_next = server.files.clone();
        (0..50).for_each(|_| server.step());

        let repository = repository(&Cloud::new(1)).await;
        let archive = archive(&repository);
        put(&archive, 1, &server.wal.filled()).await;
        let collecting = Collecting::begin(archive, History::first(), start, FILE_PAGES, nothing(), never());
        let (changed, _) = collecting.up_to(next).await.unwrap();
        for (relation, pages) in &at_next {
            for (block, page) in pages.iter().enumerate() {
                let Some(was) = parent.get(relation).and_then(|was| was.get(block)) else { continue };
                let (segment, number) = (block as u32 / FILE_PAGES, block as u32 % FILE_PAGES);
                let file = MainFile { relation: *relation, segment };
                let ranges = changed.ranges(&file, FILE_PAGES);
                let is_read = ranges.iter().any(|range| range.contains(&number));
                assert!(is_read || !changed.has(&file, number), "what was changed is read");
                if was != page && !is_read {
                    return Some((*relation, block));
                }
            }
        }
        None
    })
}

#[test]
fn every_page_that_differs_from_a_backup_is_named() {
    for seed in 0..60 {
        assert_eq!(lost(seed), None, "seed {seed}");
    }
}

#[test]
fn a_build_that_passes_over_records_of_one_kind_is_caught() {
    // WAL itself, whose images of pages count; storage; databases; tablespaces; heaps and three kinds of indexes.
    for manager in [0, 2, 4, 5, 10, 11, 12, 13] {
        let caught =
            (0..60).any(|seed| breaking(Some(Broken::KindIgnored { manager }), || lost(seed)).is_some());
        assert!(caught, "records of resource manager {manager} are passed over, and nothing notices");
    }
}

#[test]
fn a_build_that_leaves_out_one_page_is_caught() {
    for block in [0, 7, 15, 16, 39] {
        let caught =
            (0..60).any(|seed| breaking(Some(Broken::PageLeftOut { block }), || lost(seed)).is_some());
        assert!(caught, "page {block} is left out, and nothing notices");
    }
}

fn file(number: u32) -> RelationFile {
    RelationFile { tablespace: 1663, database: 5, number }
}

/// A record that changes one page.
fn change(wal: &mut Writer, number: u32, block: u32) {
    let mut body = vec![0, 0, 0, 0];
    body.extend(words(&of(file(number))));
    body.extend(words(&[block]));
    wal.write(10, 0, &body);
}

async fn collected(archive: &Archive, history: History, from: Lsn, to: Lsn) -> Result<Changed, Uncovered> {
    let collecting = Collecting::begin(archive.clone(), history, from, 1000, nothing(), never());
    Ok(collecting.up_to(to).await?.0)
}

fn pages(changed: &Changed, number: u32) -> Vec<Range<u32>> {
    changed.ranges(&MainFile { relation: file(number), segment: 0 }, 1000)
}

#[test]
fn wal_counts_from_the_parents_start_to_the_next_one() {
    run(async {
        let archive = archive(&repository(&Cloud::new(1)).await);
        let mut wal = Writer::of(SYSTEM);
        change(&mut wal, 1, 1);
        let from = wal.next();
        change(&mut wal, 2, 7);
        // Over the end of a segment.
        while wal.bytes.len() < SEGMENT + 100 {
            change(&mut wal, 2, 7);
        }
        let to = wal.next();
        change(&mut wal, 3, 9);
        put(&archive, 1, &wal.filled()).await;
        let changed = collected(&archive, History::first(), from, to).await.unwrap();
        assert_eq!(pages(&changed, 2), [7..8]);
        assert!(pages(&changed, 3).is_empty(), "its own recovery brings that");

        // Without a record there or behind it, nobody knows whether something is missing in front of it.
        let end = wal.next();
        let error = collected(&archive, History::first(), from, end).await.unwrap_err();
        assert!(matches!(error, Uncovered::Ended { .. }), "{error}");
    });
}

#[test]
fn without_complete_wal_nothing_is_concluded() {
    run(async {
        let archive = archive(&repository(&Cloud::new(1)).await);
        let mut wal = Writer::of(SYSTEM);
        let from = wal.next();
        while wal.bytes.len() < 3 * SEGMENT + 100 {
            change(&mut wal, 2, 7);
        }
        let to = wal.next();
        change(&mut wal, 3, 9);
        let all = wal.filled();
        let segments: Vec<&[u8]> = all.chunks(SEGMENT).collect();
        for at in [0, 1, 3] {
            archive.put_segment(segment(1, FIRST + at), segments[at as usize]).await.unwrap();
        }
        let error = collected(&archive, History::first(), from, to).await.unwrap_err();
        assert!(matches!(&error, Uncovered::Missing { file } if file.ends_with("00000005")), "{error}");

        // The server itself may have it, or have another file under its name.
        let with = |content: Vec<u8>| {
            let nearby: Nearby = Arc::new(move |asked| (asked.number == FIRST + 2).then(|| content.clone()));
            let collecting =
                Collecting::begin(archive.clone(), History::first(), from, 1000, nearby, never());
            collecting.up_to(to)
        };
        assert_eq!(pages(&with(segments[2].to_vec()).await.unwrap().0, 2), [7..8]);
        let error = with(segments[1].to_vec()).await.unwrap_err();
        assert!(matches!(error, Uncovered::Ended { .. }), "{error}");

        archive.put_segment(segment(1, FIRST + 2), segments[2]).await.unwrap();
        let over: Stopped = Arc::new(|| true);
        let given_up = Collecting::begin(archive.clone(), History::first(), from, 1000, nothing(), over);
        assert!(matches!(given_up.up_to(to).await, Err(Uncovered::Stopped)));
        assert!(collected(&archive, History::first(), from, to).await.is_ok());
        let mut other = segments[1].to_vec();
        other[5000] ^= 1;
        archive.put_segment(segment(1, FIRST + 1), &other).await.unwrap_err();
        let error = collected(&archive, History::first(), from, to).await.unwrap_err();
        assert!(matches!(error, Uncovered::Contradicted { .. }), "{error}");
    });
}

#[test]
fn the_end_has_to_be_the_servers_own() {
    run(async {
        let archive = archive(&repository(&Cloud::new(1)).await);
        let mut wal = Writer::of(SYSTEM);
        let from = wal.next();
        let mut other = wal.clone();
        for wal in [&mut wal, &mut other] {
            change(wal, 2, 7);
        }
        // From here on two servers go on by themselves, with the same numbers.
        other.write(8, 0x10, &[255, 0]);
        for wal in [&mut wal, &mut other] {
            while wal.bytes.len() < 2 * SEGMENT + 100 {
                change(wal, 2, 7);
            }
        }
        let to = wal.next();
        change(&mut wal, 3, 9);
        put(&archive, 1, &other.filled()).await;
        let by = |own: Vec<u8>| {
            let last: Nearby =
                Arc::new(move |asked| (asked.number == FIRST + 2).then(|| own[2 * SEGMENT..].to_vec()));
            Collecting::begin(archive.clone(), History::first(), from, 1000, last, never()).up_to(to)
        };
        let error = by(wal.filled()).await.unwrap_err();
        assert!(matches!(error, Uncovered::Ended { .. }), "{error}");
        change(&mut other, 3, 9);
        change(&mut other, 3, 9);
        assert!(by(other.filled()).await.is_ok());
    });
}

#[test]
fn what_there_is_of_a_segment_is_read() {
    run(async {
        let archive = archive(&repository(&Cloud::new(1)).await);
        let mut wal = Writer::of(SYSTEM);
        let from = wal.next();
        change(&mut wal, 2, 7);
        let to = wal.next();
        while wal.bytes.len() < 20_000 {
            change(&mut wal, 3, 9);
        }
        let begun = wal.bytes[..2 * 8192].to_vec().into();
        let piece = crate::receive::Object::Piece { segment: segment(1, FIRST), from: 0, content: begun };
        archive.put(&piece).await.unwrap();
        let changed = collected(&archive, History::first(), from, to).await.unwrap();
        assert_eq!((pages(&changed, 2), pages(&changed, 3)), (vec![7..8], vec![]));
    });
}

#[test]
fn only_the_line_of_history_counts() {
    run(async {
        let archive = archive(&repository(&Cloud::new(1)).await);
        let mut old = Writer::of(SYSTEM);
        let from = old.next();
        while old.bytes.len() < SEGMENT + 100 {
            change(&mut old, 2, 7);
        }
        let until = old.next();
        let mut new = old.clone();
        new.timeline = 2;
        // What the old primary wrote behind the fork never happened.
        change(&mut old, 3, 1);
        change(&mut new, 4, 1);
        while new.bytes.len() < 2 * SEGMENT + 100 {
            change(&mut new, 5, 1);
        }
        let to = new.next();
        change(&mut new, 6, 1);
        put(&archive, 1, &old.filled()).await;
        let history =
            History::new(Timeline(2), vec![crate::wal::Fork { timeline: Timeline(1), until }]).unwrap();
        let error = collected(&archive, history.clone(), from, to).await.unwrap_err();
        assert!(matches!(error, Uncovered::Missing { .. }), "{error}");
        let filled = new.filled();
        for (number, content) in (FIRST..).zip(filled.chunks(SEGMENT)).skip(1) {
            archive.put_segment(segment(2, number), content).await.unwrap();
        }
        let changed = collected(&archive, history, from, to).await.unwrap();
        let found = [2, 3, 4, 5, 6].map(|number| pages(&changed, number).len());
        assert_eq!(found, [1, 0, 1, 1, 0]);
    });
}

#[test]
fn records_in_doubt_end_it() {
    let ended_by = |manager: u8, info: u8, data: &[u8]| {
        run(async {
            let archive = archive(&repository(&Cloud::new(1)).await);
            let mut wal = Writer::of(SYSTEM);
            let from = wal.next();
            wal.write(manager, info, &[&[255, data.len() as u8][..], data].concat());
            let to = wal.next();
            change(&mut wal, 1, 1);
            put(&archive, 1, &wal.filled()).await;
            collected(&archive, History::first(), from, to).await.map(|_| ())
        })
    };
    let minimal = ended_by(0, 0x60, &words(&[100, 8, 10, 0, 64, 0, 0]));
    assert!(minimal.unwrap_err().to_string().contains("wal_level was minimal"));
    assert!(ended_by(0, 0x60, &words(&[100, 8, 10, 0, 64, 1, 0])).is_ok());
    let error = ended_by(200, 0, &[0; 8]).unwrap_err();
    assert!(matches!(error, Uncovered::Record { what: Untold::Manager { manager: 200 }, .. }), "{error}");
}

#[test]
fn memory_is_bounded_and_more_counts_as_changed() {
    let note = |changed: &mut Changed, number, block| changed.note_page(file(number), block);
    let mut changed = Changed::new(131_072);
    for block in (0..20_000).step_by(3) {
        note(&mut changed, 1, block).unwrap();
    }
    let one = MainFile { relation: file(1), segment: 0 };
    assert!(matches!(changed.files[&one], Pages::Bits(_)));
    assert!((0..20_000).all(|page| changed.has(&one, page) == (page % 3 == 0)));
    assert_eq!(changed.ranges(&one, 10), [0..1, 3..4, 6..7, 9..10]);
    assert!(changed.bytes < FILE_BYTES + 131_072 / 8 + 8, "{}", changed.bytes);

    let mut changed = Changed::new(131_072).with_limit(10 * FILE_BYTES + 4 * MAX_FEW);
    for block in 0..20_000 {
        note(&mut changed, 1, block * 2).unwrap();
    }
    assert!(matches!(changed.files[&one], Pages::All));
    assert_eq!(changed.ranges(&one, 9), [0..9]);
    let too_many = (2..200).find(|number| note(&mut changed, *number, 0).is_err());
    assert!(too_many.is_some_and(|number| number > 5), "{too_many:?}");
    assert!(changed.bytes <= changed.limit);
}

#[test]
fn what_is_near_is_one_range_and_ends_with_the_file() {
    let mut changed = Changed::new(100);
    for block in [1, 3, 7, 98, 99, 100, 150] {
        changed.note_page(file(1), block).unwrap();
    }
    changed.note(Touched::From { file: file(1), block: 160 }).unwrap();
    changed.note(Touched::From { file: file(2), block: 0 }).unwrap();
    changed.note(Touched::Database(9)).unwrap();
    let ranges =
        |number, segment, pages| changed.ranges(&MainFile { relation: file(number), segment }, pages);
    assert_eq!(ranges(1, 0, 100), [1..4, 7..8, 98..100]);
    assert_eq!(ranges(1, 0, 7), vec![1..4]);
    assert_eq!(ranges(1, 1, 100), [0..1, 50..51, 60..100]);
    assert_eq!(ranges(1, 2, 10), vec![0..10]);
    assert_eq!(ranges(2, 3, 10), vec![0..10]);
    assert!(ranges(3, 0, 10).is_empty());
    let elsewhere = RelationFile { tablespace: 16385, database: 9, number: 4 };
    assert_eq!(changed.ranges(&MainFile { relation: elsewhere, segment: 0 }, 3), vec![0..3]);
    assert!(changed.ranges(&MainFile { relation: elsewhere, segment: 0 }, 0).is_empty());
}

#[test]
fn files_of_main_forks_are_known_by_their_paths() {
    let found = |path: &str| {
        MainFile::parse(path.as_bytes()).map(|MainFile { relation, segment }| (of(relation), segment))
    };
    assert_eq!(found("base/5/16384"), Some(([1663, 5, 16384], 0)));
    assert_eq!(found("base/5/16384.12"), Some(([1663, 5, 16384], 12)));
    assert_eq!(found("global/1262"), Some(([1664, 0, 1262], 0)));
    assert_eq!(found("pg_tblspc/16385/PG_15_202209061/5/1.2"), Some(([16385, 5, 1], 2)));
    for path in [
        "base/5/16384_vm",
        "base/5/16384_fsm.1",
        "base/5/16384_init",
        "base/5/t3_16384",
        "base/5/pg_filenode.map",
        "base/5/PG_VERSION",
        "global/pg_control",
        "pg_xact/0000",
        "pg_multixact/members/0000",
        "base/5/016384",
        "base/x/1",
        "base/5/1.2.3",
        "base/5/1.",
        "base/5/6/7",
        "5/6",
        "16384",
        "pg_tblspc/16385/other/5/1",
    ] {
        assert_eq!(found(path), None, "{path}");
    }
}
