//! The scanner: limits, types, every split, hostile lengths. Leaves out what bodies mean.

use proptest::prelude::*;

use super::*;

/// Everything a scanner says about `bytes` when they arrive in parts of these sizes, the last one repeated.
fn pieces(
    side: Side,
    phase: Phase,
    bytes: &[u8],
    parts: &[usize],
) -> (Vec<(Header, Vec<u8>)>, Option<FrameError>) {
    let mut scanner = Scanner::new(side, phase);
    let (mut messages, mut held, mut at) = (Vec::new(), Vec::new(), 0);
    let mut sizes = parts.iter().copied().chain(std::iter::repeat(*parts.last().unwrap()));
    while at < bytes.len() {
        let size = sizes.next().unwrap().clamp(1, bytes.len() - at);
        held.extend_from_slice(&bytes[at..at + size]);
        at += size;
        let mut input = held.as_slice();
        loop {
            match scanner.next(&mut input) {
                Ok(Some(Piece::Header(header))) => messages.push((header, Vec::new())),
                Ok(Some(Piece::Body { part, last })) => {
                    assert!(!part.is_empty(), "a piece of a body is never empty");
                    let (header, body) = messages.last_mut().unwrap();
                    body.extend_from_slice(part);
                    assert_eq!(last, body.len() == header.body_bytes as usize);
                }
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(scanner.next(&mut &b"S\0\0\0\x04"[..]), Err(error), "an error is for ever");
                    return (messages, Some(error));
                }
            }
        }
        assert!(input.len() < HEADER_BYTES, "no more than a part of a header is left");
        held = input.to_vec();
    }
    (messages, None)
}

fn header(kind: u8, length: u32) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

fn verdict(side: Side, phase: Phase, kind: u8, length: u32) -> Result<(), FrameError> {
    Scanner::new(side, phase).next(&mut header(kind, length).as_slice()).map(|_| ())
}

/// Manual 55.7: Query, then Sync.
const QUERY_AND_SYNC: &[u8] = b"Q\0\0\0\x0dSELECT 1\0S\0\0\0\x04";

#[test]
fn a_query_and_a_sync_are_two_messages() {
    let (messages, error) = pieces(Side::Client, Phase::Session, QUERY_AND_SYNC, &[100]);
    let query = (Header { kind: b'Q', body_bytes: 9 }, b"SELECT 1\0".to_vec());
    assert_eq!(messages, [query, (Header { kind: b'S', body_bytes: 0 }, Vec::new())]);
    assert_eq!(error, None);
    assert_eq!(messages[0].0.to_bytes(), QUERY_AND_SYNC[..5]);
}

#[test]
fn split_at_every_byte_the_messages_are_the_same() {
    let whole = pieces(Side::Client, Phase::Session, QUERY_AND_SYNC, &[100]);
    for at in 1..QUERY_AND_SYNC.len() {
        assert_eq!(pieces(Side::Client, Phase::Session, QUERY_AND_SYNC, &[at, 100]), whole, "split at {at}");
    }
    assert_eq!(pieces(Side::Client, Phase::Session, QUERY_AND_SYNC, &[1]), whole);
}

/// CVE-2026-6664: a length that overflows when something is added to it or when it is taken for signed.
#[test]
fn cve_2026_6664_lengths_at_the_edges_of_integers_are_refused() {
    for side in [Side::Client, Side::Server] {
        for phase in [Phase::Authentication, Phase::Starting, Phase::Session] {
            for kind in 0..=255 {
                for length in [0, 1, 3, 0x3fff_ffff, 0x7fff_ffff, 0x8000_0000, 0xffff_fffc, 0xffff_ffff] {
                    let error = verdict(side, phase, kind, length).expect_err("no message is that long");
                    assert_eq!(error.sqlstate().to_string(), "08P01");
                }
            }
        }
    }
}

#[test]
fn limits_are_those_of_postgresql() {
    for (kind, greatest) in
        [(b'Q', LARGE_MESSAGE_BYTES), (b'B', LARGE_MESSAGE_BYTES), (b'D', 10_000), (b'f', 10_000)]
    {
        assert_eq!(verdict(Side::Client, Phase::Session, kind, greatest), Ok(()));
        assert!(verdict(Side::Client, Phase::Session, kind, greatest + 1).is_err());
    }
    assert_eq!(verdict(Side::Client, Phase::Authentication, b'p', 65_535), Ok(()));
    assert!(verdict(Side::Client, Phase::Authentication, b'p', 65_536).is_err());
    for (kind, greatest) in [(b'D', LARGE_MESSAGE_BYTES), (b'C', 30_000), (b'Z', 5), (b'1', 4)] {
        assert_eq!(verdict(Side::Server, Phase::Session, kind, greatest), Ok(()));
        assert!(verdict(Side::Server, Phase::Session, kind, greatest + 1).is_err());
    }
    assert!(
        verdict(Side::Server, Phase::Starting, b'K', 4 + 4 + 3).is_err(),
        "a key has four bytes at least"
    );
    assert_eq!(verdict(Side::Server, Phase::Starting, b'K', 4 + 4 + 256), Ok(()));
    assert!(verdict(Side::Server, Phase::Starting, b'K', 4 + 4 + 257).is_err());
}

#[test]
fn types_are_allowed_per_side_and_phase_and_refused_by_their_first_byte() {
    let allowed = |side, phase| {
        let known = |kind: &u8| Scanner::new(side, phase).next(&mut &[*kind][..]).is_ok();
        String::from_utf8((0..=255).filter(known).collect()).unwrap()
    };
    assert_eq!(allowed(Side::Client, Phase::Authentication), "p");
    assert_eq!(allowed(Side::Client, Phase::Session), "BCDEFHPQSXcdf");
    assert_eq!(allowed(Side::Server, Phase::Authentication), "ERv");
    assert_eq!(allowed(Side::Server, Phase::Starting), "AEKNSZ");
    assert_eq!(allowed(Side::Server, Phase::Session), "123ACDEGHINSTVWZcdnst");
}

/// CVE-2026-6665: a malicious server's nonce was longer than what held it.
#[test]
fn cve_2026_6665_what_a_server_sends_during_authentication_is_short() {
    assert_eq!(verdict(Side::Server, Phase::Authentication, b'R', 2_000), Ok(()));
    assert!(verdict(Side::Server, Phase::Authentication, b'R', 2_001).is_err());
    assert!(verdict(Side::Server, Phase::Authentication, b'E', 30_001).is_err());
}

/// CVE-2026-107350: a second startup message, or anything but an answer, while a client authenticates.
#[test]
fn cve_2026_107350_a_startup_message_during_authentication_is_refused() {
    let second = b"\0\0\0\x12\0\x03\0\0user\0admin\0\0";
    let (messages, error) = pieces(Side::Client, Phase::Authentication, second, &[100]);
    assert!(messages.is_empty());
    assert!(matches!(error, Some(FrameError::UnexpectedType { kind: 0, .. })), "{error:?}");
}

#[test]
fn a_run_passes_by_what_nobody_looks_at_and_stops_before_what_somebody_does() {
    let stream = b"D\0\0\0\x06abD\0\0\0\x04Z\0\0\0\x05ID\0\0\0\x08";
    let stop = TypeSet::of(b"ZE");
    let mut scanner = Scanner::new(Side::Server, Phase::Session);
    let mut input = &stream[..];
    assert_eq!(scanner.run(&mut input, stop), Ok(&stream[..12]));
    assert_eq!(scanner.run(&mut input, stop), Ok(&b""[..]), "ReadyForQuery is for next()");
    assert_eq!(scanner.next(&mut input), Ok(Some(Piece::Header(Header { kind: b'Z', body_bytes: 1 }))));
    assert_eq!(scanner.next(&mut input), Ok(Some(Piece::Body { part: b"I", last: true })));
    assert_eq!(scanner.run(&mut input, stop), Ok(&stream[18..]));
    assert_eq!(scanner.body_left_bytes(), 4);
    assert_eq!(scanner.run(&mut &b"wxyzD\0?"[..], stop), Ok(&b"wxyz"[..]));
}

#[test]
fn a_run_can_be_limited_to_rows() {
    let rows = TypeSet::all_but(b"D");
    assert!(!rows.contains(b'D') && rows.contains(b'C') && rows.contains(0));
    let mut scanner = Scanner::new(Side::Server, Phase::Session);
    let mut input = &b"D\0\0\0\x04D\0\0\0\x05xC\0\0\0\x05\0"[..];
    assert_eq!(scanner.run(&mut input, rows).map(<[u8]>::len), Ok(11));
    assert_eq!(input[0], b'C');
}

#[test]
fn a_run_hands_out_what_came_before_an_error_and_then_the_error() {
    let mut scanner = Scanner::new(Side::Server, Phase::Session);
    let mut input = &b"D\0\0\0\x06ab?\0\0\0\x04"[..];
    assert_eq!(scanner.run(&mut input, TypeSet::of(b"")), Ok(&b"D\0\0\0\x06ab"[..]));
    assert!(matches!(
        scanner.run(&mut input, TypeSet::of(b"")),
        Err(FrameError::UnexpectedType { kind: b'?', .. })
    ));
    assert!(scanner.next(&mut &b"D\0\0\0\x04"[..]).is_err());
}

#[test]
fn a_whole_body_is_borrowed_if_it_is_there_and_gathered_if_it_is_not() {
    let mut spill = Spill::new(9);
    let mut scanner = Scanner::new(Side::Client, Phase::Session);
    let mut input = QUERY_AND_SYNC;
    scanner.next(&mut input).unwrap();
    assert_eq!(scanner.whole(&mut input, &mut spill), Ok(Some(&b"SELECT 1\0"[..])));
    assert_eq!(spill.capacity_bytes(), 0, "nothing was copied");

    for at in 5..QUERY_AND_SYNC.len() - 6 {
        let mut scanner = Scanner::new(Side::Client, Phase::Session);
        let (mut first, mut second) = QUERY_AND_SYNC.split_at(at);
        scanner.next(&mut first).unwrap();
        assert_eq!(scanner.whole(&mut first, &mut spill), Ok(None), "split at {at}");
        assert_eq!(scanner.whole(&mut second, &mut spill), Ok(Some(&b"SELECT 1\0"[..])));
        assert_eq!(second, b"S\0\0\0\x04");
    }
    spill.release();
    assert_eq!(spill.capacity_bytes(), 0);
}

#[test]
fn a_body_that_does_not_fit_is_refused_before_a_byte_is_kept() {
    let mut spill = Spill::new(8);
    let mut scanner = Scanner::new(Side::Client, Phase::Session);
    let mut input = QUERY_AND_SYNC;
    scanner.next(&mut input).unwrap();
    let error = scanner.whole(&mut input, &mut spill).unwrap_err();
    assert_eq!(error, FrameError::TooLargeToHold { body_bytes: 9, max_bytes: 8 });
    assert_eq!(spill.capacity_bytes(), 0);
}

proptest! {
    #[test]
    fn whatever_the_parts_the_messages_are_the_same(
        messages in prop::collection::vec((prop::sample::select(b"QPBFd".to_vec()), 0..300_usize), 1..6),
        parts in prop::collection::vec(1..40_usize, 1..20),
    ) {
        let mut stream = Vec::new();
        for (kind, body) in &messages {
            stream.extend_from_slice(&Header { kind: *kind, body_bytes: *body as u32 }.to_bytes());
            stream.extend((0..*body).map(|at| at as u8));
        }
        let whole = pieces(Side::Client, Phase::Session, &stream, &[stream.len()]);
        prop_assert_eq!(whole.0.len(), messages.len());
        prop_assert_eq!(pieces(Side::Client, Phase::Session, &stream, &parts), whole);
    }

    #[test]
    fn hostile_bytes_are_judged_alike_however_they_are_split(
        bytes in prop::collection::vec(
            prop_oneof![Just(0_u8), Just(4), Just(b'D'), Just(b'Z'), Just(b'S'), any::<u8>()],
            1..200,
        ),
        parts in prop::collection::vec(1..9_usize, 1..10),
    ) {
        for (side, phase) in [(Side::Client, Phase::Session), (Side::Server, Phase::Session)] {
            let whole = pieces(side, phase, &bytes, &[bytes.len()]);
            prop_assert_eq!(pieces(side, phase, &bytes, &parts), whole);
        }
    }
}
