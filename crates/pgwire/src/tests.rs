//! What no input may cost. Everything else about hostile bytes is asked by the crate `fuzz`.

use std::time::{Duration, Instant};

use crate::flow::Answer;
use crate::frame::{Phase, Piece, Scanner, Side};
use crate::message::{ClientMessage, ServerMessage};
use crate::startup::options;

/// CVE-2026-107349, CVE-2026-107348: input that costs more than it weighs. Sixteen megabytes of what makes
/// each reader work most take milliseconds if time is linear, and hours if it is not.
#[test]
fn no_input_costs_more_than_linear_time() {
    const BYTES: usize = 16 << 20;
    let began = Instant::now();
    let fields: Vec<u8> = b"M\0".iter().copied().cycle().take(BYTES).chain([0]).collect();
    let Ok(ServerMessage::ErrorResponse(error)) = ServerMessage::parse(b'E', &fields) else {
        panic!("unreadable")
    };
    assert_eq!((error.iter().count(), error.sqlstate()), (BYTES / 2, None));
    assert_eq!(Answer::of(b'E', &fields), Ok(Answer::Error { fatal: false }));
    let empty = [&b"\0\x03\0\0\x7f\xff\xff\xff"[..], &vec![0; BYTES]].concat();
    assert!(ServerMessage::parse(b'v', &empty).is_err());
    assert!(ServerMessage::parse(b'R', &[&b"\0\0\0\x0a"[..], &vec![b'x'; BYTES]].concat()).is_err());
    assert!(ClientMessage::parse(b'B', &vec![0; BYTES]).is_err());
    let spaces: Vec<u8> = b"\\ -- =".iter().copied().cycle().take(BYTES).collect();
    assert!(options::switches(&spaces).count() > 0);
    let mut scanner = Scanner::new(Side::Server, Phase::Session);
    let answers: Vec<u8> = b"1\0\0\0\x04".iter().copied().cycle().take(5 * (BYTES / 5)).collect();
    let (mut input, mut messages) = (answers.as_slice(), 0);
    while let Some(Piece::Header(_)) = scanner.next(&mut input).unwrap() {
        messages += 1;
    }
    assert_eq!(messages, BYTES / 5);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}
