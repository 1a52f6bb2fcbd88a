//! Seals, and what is found behind them: over a store whose listings are late, and WAL with holes.

use std::ops::Range;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_core::types::{Lsn, SystemId};

use super::*;
use crate::breakage::breaking;
use crate::receive::Object;
use crate::store::Store;
use crate::testing::{
    Cloud, PLACE, Random, SEGMENT_BYTES, SYSTEM, archive, encrypted, repository, run, segment, take_archived,
};
use crate::wal::Archive;
use crate::wal::records::tests::{FIRST, Writer};

const SEG: u64 = SEGMENT_BYTES as u64;
const INCARNATION: Incarnation = Incarnation(7);

fn voter(repository: &Repository) -> Voter {
    Voter::new(repository, PLACE, INCARNATION)
}

/// As `core` counts where all timelines are known: the later one, and the further one on it.
fn worth(_: &BTreeMap<Timeline, Term>, copy: &Copy) -> Position {
    Position { term: Term(copy.timeline.0.into()), lsn: copy.end.unwrap_or_default() }
}

/// WAL of so many bytes at least, and where its records end.
fn written(bytes: u64, seed: u64) -> (Writer, Vec<Lsn>) {
    let (mut writer, mut random) = (Writer::of(SYSTEM), Random(seed));
    let mut ends = Vec::new();
    while (writer.bytes.len() as u64) < bytes {
        let length = random.below(3000) as usize;
        let data = random.bytes(length);
        writer.write(10, 0, &data);
        ends.push(Lsn((FIRST * SEG + writer.bytes.len() as u64).next_multiple_of(8)));
    }
    (writer, ends)
}

async fn put_whole(archive: &Archive, writer: &Writer, numbers: Range<u64>) {
    for number in numbers {
        let from = ((number - FIRST) * SEG) as usize;
        let content = &writer.bytes[from..from + SEG as usize];
        archive.put_segment(segment(1, number), content).await.unwrap();
    }
}

async fn put_piece(archive: &Archive, writer: &Writer, number: u64, offsets: Range<usize>) {
    let begin = ((number - FIRST) * SEG) as usize;
    let content = writer.bytes[begin + offsets.start..begin + offsets.end].to_vec().into();
    let piece = Object::Piece { segment: segment(1, number), from: offsets.start as u32, content };
    archive.put(&piece).await.unwrap();
}

/// The last record that ends at `at` or before.
fn last_end(ends: &[Lsn], at: Lsn) -> Lsn {
    ends.iter().rev().find(|end| **end <= at).copied().unwrap()
}

async fn end(repository: &Repository, term: u64) -> Option<Lsn> {
    let sealed = voter(repository).seal_and_look(Term(term), worth).await.unwrap();
    sealed.copy.map(|copy| copy.end.unwrap())
}

#[test]
fn a_seal_ends_older_terms_and_no_others() {
    run(async {
        let cloud = Cloud::new(1);
        for repository in [repository(&cloud).await, encrypted(&Cloud::new(2)).await] {
            let voter = voter(&repository);
            voter.seal(Term(9)).await.unwrap();
            assert!(!voter.is_sealed_above(Term(9)).await.unwrap());
            voter.seal(Term(9)).await.unwrap();
            // Ten comes behind nine: names are not compared as words.
            voter.seal(Term(10)).await.unwrap();
            assert!(voter.is_sealed_above(Term(9)).await.unwrap());
            assert!(!voter.is_sealed_above(Term(10)).await.unwrap());
            let other = Voter::new(&repository, PLACE, Incarnation(8));
            other.seal(Term(3)).await.unwrap();
            assert!(!other.is_sealed_above(Term(3)).await.unwrap(), "that was another incarnation's");
            let all = incarnations(&repository, PLACE).await.unwrap();
            assert_eq!(all, [INCARNATION, Incarnation(8)].into());
        }
    });
}

#[test]
fn a_listing_that_lacks_the_own_seal_is_no_answer() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let voter = voter(&repository);
        voter.seal(Term(4)).await.unwrap();
        cloud.bad(|weather| weather.listing_late = Duration::from_secs(5));
        let refused = voter.is_sealed_above(Term(4)).await.unwrap_err();
        assert!(matches!(refused, VoterError::NotListed { .. }), "{refused}");
        assert!(refused.hint().is_some_and(|hint| hint.contains("mounted")));
        cloud.pass(Duration::from_secs(6));
        assert!(!voter.is_sealed_above(Term(4)).await.unwrap());
    });
    // A disk that is not there any more lists nothing.
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let repository =
            Repository::create(Store::directory(dir.path()), None, Timestamp::now()).await.unwrap();
        let voter = voter(&repository);
        voter.seal(Term(4)).await.unwrap();
        std::fs::rename(dir.path().join("cluster"), dir.path().join(".away")).unwrap();
        assert!(voter.is_sealed_above(Term(4)).await.is_err());
    });
}

#[test]
fn a_timeline_is_adopted_under_one_term() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let voter = voter(&repository);
        voter.adopt(Timeline(5), Term(4)).await.unwrap();
        cloud.pass(Duration::from_secs(1));
        voter.adopt(Timeline(5), Term(4)).await.unwrap();
        let refused = voter.adopt(Timeline(5), Term(6)).await.unwrap_err();
        let is_meant = |error: &VoterError| {
            matches!(error, VoterError::OtherTerm { found: Term(4), wanted: Term(6), .. })
        };
        assert!(is_meant(&refused), "{refused}");
        assert_eq!(voter.adopted().await.unwrap(), [(Timeline(5), Term(4))].into());
    });
}

#[test]
fn the_vote_ends_at_the_last_whole_record_in_front_of_the_first_hole() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let (writer, ends) = written(5 * SEG + SEG / 2, 11);
        let archive = archive(&repository);
        put_whole(&archive, &writer, FIRST..FIRST + 2).await;
        assert_eq!(end(&repository, 1).await, None, "there is no base backup");
        take_archived(&repository, FIRST, ends[5], cloud.now()).await;

        // Pieces, cut anywhere, and something behind a hole: a piece counts whatever lies behind it.
        put_piece(&archive, &writer, FIRST + 2, 0..5001).await;
        put_piece(&archive, &writer, FIRST + 2, 4000..9000).await;
        put_piece(&archive, &writer, FIRST + 2, 9104..20_000).await;
        let at = |number: u64, offset: u64| Lsn((FIRST + number) * SEG + offset);
        assert_eq!(end(&repository, 2).await, Some(last_end(&ends, at(2, 9000))));
        put_whole(&archive, &writer, FIRST + 4..FIRST + 5).await;
        assert_eq!(end(&repository, 3).await, Some(last_end(&ends, at(2, 9000))));

        put_piece(&archive, &writer, FIRST + 2, 9000..9104).await;
        assert_eq!(end(&repository, 4).await, Some(last_end(&ends, at(2, 20_000))));
        put_whole(&archive, &writer, FIRST + 2..FIRST + 4).await;
        assert_eq!(end(&repository, 5).await, Some(last_end(&ends, at(5, 0))), "the hole is filled");
    });
}

#[test]
fn a_vote_says_from_where_on_wal_can_be_had_by_somebody_who_has_a_copy() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let (writer, ends) = written(5 * SEG, 17);
        let archive = archive(&repository);
        put_whole(&archive, &writer, FIRST..FIRST + 2).await;
        put_whole(&archive, &writer, FIRST + 3..FIRST + 5).await;
        let stop = last_end(&ends, Lsn((FIRST + 4) * SEG));
        take_archived(&repository, FIRST + 3, stop, cloud.now()).await;
        let from = async |term| voter(&repository).seal_and_look(Term(term), worth).await.unwrap().from;
        assert_eq!(from(1).await, Lsn((FIRST + 3) * SEG), "there is a hole in front of the backup");
        put_piece(&archive, &writer, FIRST + 2, 0..SEG as usize - 1).await;
        assert_eq!(from(2).await, Lsn((FIRST + 3) * SEG));
        put_piece(&archive, &writer, FIRST + 2, SEG as usize - 1..SEG as usize).await;
        assert_eq!(from(3).await, Lsn(FIRST * SEG), "and nothing before it was ever there");
    });
}

#[test]
fn a_line_that_goes_on_elsewhere_repeats_what_was_before_its_fork() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let (mut writer, ends) = written(2 * SEG + 30_000, 5);
        let archive = archive(&repository);
        put_whole(&archive, &writer, FIRST..FIRST + 2).await;
        take_archived(&repository, FIRST, ends[5], cloud.now()).await;
        let fork = *ends.last().unwrap();
        let offset = (fork.0 % SEG) as usize;
        let history = format!("1\t{fork}\tx\n");
        archive.put_history(Timeline(5), history.as_bytes()).await.unwrap();
        let begin = 2 * SEG as usize;
        let look =
            async |term| voter(&repository).seal_and_look(Term(term), worth).await.unwrap().copy.unwrap();

        // The old one's end alone.
        writer.bytes.resize(begin + offset, 0);
        archive.put_partial(segment(1, FIRST + 2), &writer.bytes[begin..]).await.unwrap();
        let copy = look(1).await;
        assert_eq!((copy.timeline, copy.end), (Timeline(1), Some(fork)));

        // The new timeline begins with the old one's bytes.
        writer.timeline = 5;
        writer.write(10, 0, &[7; 500]);
        let content = writer.bytes[begin..].to_vec().into();
        archive.put(&Object::Piece { segment: segment(5, FIRST + 2), from: 0, content }).await.unwrap();
        let copy = look(2).await;
        assert_eq!(copy.timeline, Timeline(5));
        assert!(copy.end > Some(fork));
        assert_eq!(copy.begins, [(Timeline(1), Lsn::ZERO), (Timeline(5), fork)]);
    });
}

/// A server that puts a record and asks, while somebody seals: is what was told in the vote?
fn told_is_in_the_vote(seed: u64) -> bool {
    run(async {
        let cloud = Cloud::new(seed);
        let repository = repository(&cloud).await;
        let (writer, ends) = written(SEG + SEG / 4, seed);
        let archive = archive(&repository);
        put_whole(&archive, &writer, FIRST..FIRST + 1).await;
        take_archived(&repository, FIRST, ends[5], cloud.now()).await;
        let owner = voter(&repository);
        owner.seal(Term(1)).await.unwrap();
        cloud.bad(|weather| weather.interleave = 4);
        let mut told = Lsn::ZERO;
        let streams = async {
            for bytes in (1..40).map(|piece| piece * 4000) {
                // What there is of a segment, as a piece is, but made on this thread: a seed means one order of steps.
                let content = &writer.bytes[SEG as usize..SEG as usize + bytes];
                archive.put_partial(segment(1, FIRST + 1), content).await.unwrap();
                if owner.is_sealed_above(Term(1)).await.unwrap() {
                    return;
                }
                told = Lsn((FIRST + 1) * SEG + bytes as u64);
            }
        };
        let seals = async {
            for _ in 0..seed * 3 {
                tokio::task::yield_now().await;
            }
            voter(&repository).seal_and_look(Term(2), worth).await.unwrap().copy.unwrap().end.unwrap()
        };
        let ((), voted) = tokio::join!(streams, seals);
        told == Lsn::ZERO || voted >= last_end(&ends, told)
    })
}

#[test]
fn whatever_was_told_is_in_the_vote_and_a_listing_before_the_seal_is_caught() {
    let held = |rule| breaking(rule, || (0..40).filter(|seed| told_is_in_the_vote(*seed)).count());
    assert_eq!(held(None), 40);
    assert!(held(Some(Broken::ListingBeforeSeal)) < 40, "nobody notices a listing that comes first");
}

#[test]
fn a_voters_last_backup_and_its_objects_stay() {
    use crate::collect::{Patience, collect};
    use crate::tombstone;

    run(async {
        const HOUR: Duration = Duration::from_secs(3600);
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        let (writer, ends) = written(3 * SEG, 5);
        let archive = archive(&repository);
        put_whole(&archive, &writer, FIRST..FIRST + 3).await;
        let backup = take_archived(&repository, FIRST, ends[5], cloud.now()).await;
        let voter = voter(&repository);
        voter.seal(Term(4)).await.unwrap();
        voter.adopt(Timeline(1), Term(1)).await.unwrap();
        tombstone::bury(&repository, PLACE, backup.id, "by hand", cloud.now()).await.unwrap();
        cloud.pass(3 * HOUR);
        let patience = Patience { grace: HOUR, lease: HOUR };
        let collected = async || collect(&repository, PLACE, patience, cloud.now()).await.unwrap();
        assert_eq!(collected().await.waiting, [backup.id].into());
        assert!(end(&repository, 5).await.is_some(), "it still votes");

        // For good: it counts for nothing any more, and the backup is like any other.
        voter.seal(LAST).await.unwrap();
        assert_eq!(collected().await.swept, [backup.id].into());
        let left = cloud.names().iter().filter(|name| name.contains("/voter/")).count();
        assert_eq!(left, 4);
    });
}

#[test]
fn a_voter_is_of_one_cluster() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        voter(&repository).seal(Term(4)).await.unwrap();
        let other = Place(SystemId(9));
        assert_eq!(incarnations(&repository, other).await.unwrap(), BTreeSet::new());
    });
}
