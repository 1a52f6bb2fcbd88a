//! What is fuzzed, each against a second reading of the same bytes that shares no code with the first.
//!
//! An input begins with a byte or two that say how the rest arrives. Leaves out where inputs come from. Each
//! target has one planted bug, of a kind that somebody who uses this crate could make. Hazard: a second
//! reading that copies the first one's mistake.

use bytes::BytesMut;

use super::fuzzer::Reached;
use crate::flow::model::Model;
use crate::flow::tests::{ANSWERS, REQUESTS, answer, request};
use crate::flow::{Flow, Request as FlowRequest};
use crate::frame::{Phase, Piece, Scanner, Side, Spill, TypeSet};
use crate::message::build::{self, BindOut};
use crate::message::server::Authentication;
use crate::message::{ClientMessage, ServerMessage, TransactionStatus};
use crate::startup::{self, Opening, Request, StartupError};

pub(super) const STARTUP_SEEDS: &[&[u8]] = &[
    b"\x08\0\0\0\x08\x04\xd2\x16\x2f\0\0\0\x12\0\x03\0\0user\0ab\0x\0y\0\0",
    b"\x04\0\0\0\x08\x04\xd2\x16\x30",
    b"\x50\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01keyk",
    b"\x30\0\0\0\x1d\0\x03\0\x02user\0ab\0replication\0on\0\0",
    b"\x01\x16\x03\x01",
];

/// The reading of a connection's beginning by hand: one letter for each thing that happens.
fn startup_by_hand(first_segment: usize, bytes: &[u8]) -> String {
    let (mut at, mut letters, mut ssl, mut gss) = (0, String::new(), false, false);
    loop {
        let rest = &bytes[at..];
        if at == 0 && rest.first() == Some(&0x16) {
            return letters + "D";
        }
        if rest.len() < 4 {
            return letters + "W";
        }
        let length = rest[..4].iter().fold(0_usize, |sum, byte| sum * 256 + usize::from(*byte));
        if !(8..=10_004).contains(&length) {
            return letters + "L";
        }
        if rest.len() < length {
            return letters + "W";
        }
        let (code, body) = (&rest[4..8], &rest[8..length]);
        let again = match code {
            [4, 0xd2, 0x16, 0x2f] if body.is_empty() => std::mem::replace(&mut ssl, true),
            [4, 0xd2, 0x16, 0x30] if body.is_empty() => std::mem::replace(&mut gss, true),
            [4, 0xd2, 0x16, 0x2e] if (8..=260).contains(&body.len()) => return letters + "C",
            [0, 3, ..] if parameters_by_hand(body) => return letters + "T",
            _ => return letters + "B",
        };
        if again {
            return letters + "R";
        }
        at += length;
        if first_segment > at {
            return letters + "P";
        }
        letters.push(if code[3] == 0x2f { 'S' } else { 'G' });
    }
}

fn parameters_by_hand(body: &[u8]) -> bool {
    let Some(list) = body.strip_suffix(b"\0") else { return false };
    // Every text ends with a zero, so that the last of the pieces between zeros is empty.
    let mut texts: Vec<&[u8]> = list.split(|byte| *byte == 0).collect();
    if texts.pop() != Some(b"") || texts.len() % 2 == 1 || texts.iter().step_by(2).any(|name| name.is_empty())
    {
        return false;
    }
    let last = |name: &[u8]| texts.chunks(2).rev().find(|pair| pair[0] == name).map(|pair| pair[1]);
    let words = "database t tr tru true y ye yes on 1 f fa fal fals false n no of off 0";
    let known = |value: &[u8]| {
        words.split(' ').any(|word| {
            word.as_bytes() == value || word != "database" && word.as_bytes().eq_ignore_ascii_case(value)
        })
    };
    last(b"user").is_some_and(|user| !user.is_empty()) && last(b"replication").is_none_or(known)
}

/// The planted bug: what stands behind an SSLRequest is read only after the answer.
pub(super) fn startup(input: &[u8], planted: bool, reached: &mut Reached) -> Result<(), String> {
    let Some((segment, bytes)) = input.split_first() else { return Ok(()) };
    let first_segment = usize::from(*segment).min(bytes.len());
    let (mut opening, mut letters) = (Opening::new(), String::new());
    let (mut at, mut arrived) = (0, first_segment);
    let end = loop {
        let mut view = &bytes[at..arrived];
        if planted && view.get(4..8) == Some(b"\x04\xd2\x16\x2f") {
            view = &view[..8];
        }
        let shown = view.len();
        match opening.read(&mut view) {
            Ok(None) if arrived == bytes.len() => break 'W',
            Ok(None) => arrived += 1,
            Ok(Some(asked @ (Request::Ssl | Request::GssEnc))) => {
                at += shown - view.len();
                letters.push(if asked == Request::Ssl { 'S' } else { 'G' });
                opening.answered(startup::Answer::Refused, view).map_err(|error| error.to_string())?;
            }
            Ok(Some(Request::DirectTls)) => break 'D',
            Ok(Some(Request::Cancel(cancel))) => {
                let mut to = BytesMut::new();
                build::cancel_request(&mut to, cancel.pid, cancel.key);
                same(&to, &bytes[at..at + to.len()])?;
                break 'C';
            }
            Ok(Some(Request::Startup(message))) => {
                let pairs: Vec<(&[u8], &[u8])> = message.parameters().collect();
                let mut to = BytesMut::new();
                build::startup_message(&mut to, message.version, &pairs)
                    .map_err(|error| error.to_string())?;
                same(&to, &bytes[at..at + to.len()])?;
                break 'T';
            }
            Err(StartupError::Length { .. }) => break 'L',
            Err(StartupError::RequestedAgain) => break 'R',
            Err(StartupError::DataBeforeAnswer) => break 'P',
            Err(_) => break 'B',
        }
    };
    letters.push(end);
    letters.bytes().for_each(|letter| reached.kind(letter));
    reached.feature(letters.bytes().fold(1, |sum, letter| sum * 31 + u32::from(letter)));
    reached.feature(0x1_0000 + u32::from(bytes.len() as u16 / 8));
    let expected = startup_by_hand(first_segment, bytes);
    if letters == expected { Ok(()) } else { Err(format!("{letters}, by hand {expected}")) }
}

fn same(one: &[u8], other: &[u8]) -> Result<(), String> {
    if one == other { Ok(()) } else { Err(format!("{} became {}", other.escape_ascii(), one.escape_ascii())) }
}

/// Types with the least and greatest length, written down a second time from the sources of PostgreSQL.
fn limits_by_hand(side: Side, phase: Phase) -> &'static [(&'static str, u32, u32)] {
    match (side, phase) {
        (Side::Client, Phase::Authentication) => &[("p", 4, 65_535)],
        (Side::Client, _) => &[("QPBFd", 4, 0x3fff_fffe), ("CDEcfX", 4, 10_000), ("SH", 4, 4)],
        (Side::Server, Phase::Authentication) => &[("R", 8, 2_000), ("Ev", 5, 30_000)],
        (Side::Server, Phase::Starting) => {
            &[("K", 12, 264), ("S", 6, 30_000), ("ENA", 5, 0x3fff_fffe), ("Z", 5, 5)]
        }
        (Side::Server, Phase::Session) => &[
            ("TDdVENA", 4, 0x3fff_fffe),
            ("t", 6, 262_146),
            ("CSGHW", 5, 30_000),
            ("123nsIc", 4, 4),
            ("Z", 5, 5),
        ],
    }
}

/// Messages with as much of their bodies as there is, and whether the bytes go wrong behind them.
type Framed<'a> = (Vec<(u8, &'a [u8], bool)>, bool);

fn frames_by_hand(side: Side, mut phase: Phase, mut bytes: &[u8]) -> Framed<'_> {
    let mut messages = Vec::new();
    loop {
        let Some(kind) = bytes.first() else { return (messages, false) };
        let limits = limits_by_hand(side, phase).iter().find(|limits| limits.0.contains(char::from(*kind)));
        let Some((_, least, greatest)) = limits.filter(|_| kind.is_ascii()) else { return (messages, true) };
        if bytes.len() < 5 {
            return (messages, false);
        }
        let length = bytes[1..5].iter().fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte));
        if !(least..=greatest).contains(&&length) {
            return (messages, true);
        }
        let end = 1 + length as usize;
        let complete = bytes.len() >= end;
        let body = &bytes[5..end.min(bytes.len())];
        messages.push((*kind, body, complete));
        if !complete {
            return (messages, false);
        }
        phase = phase_after(phase, *kind, body);
        bytes = &bytes[end..];
    }
}

fn phase_after(phase: Phase, kind: u8, body: &[u8]) -> Phase {
    match (kind, phase) {
        (b'R', Phase::Authentication) if body == [0; 4] => Phase::Starting,
        (b'Z', Phase::Starting) => Phase::Session,
        _ => phase,
    }
}

/// How the bytes arrive: the size of the parts, and the phase.
fn arrival(input: &[u8]) -> Option<(usize, Phase, &[u8])> {
    let (&[part, phase], bytes) = input.split_first_chunk()?;
    let phase = [Phase::Session, Phase::Starting, Phase::Authentication][usize::from(phase % 3)];
    Some((1 + usize::from(part), phase, bytes))
}

pub(super) const CLIENT_SEEDS: &[&[u8]] = &[
    b"\x40\0Q\0\0\0\x0dSELECT 1\0S\0\0\0\x04X\0\0\0\x04",
    b"\x06\0P\0\0\0\x0da\0b\0\0\x01\0\0\0\x17B\0\0\0\x17\0a\0\0\x01\0\x01\0\x01\0\0\0\x01x\0\x01\0\0",
    b"\x03\0D\0\0\0\x06Sa\0H\0\0\0\x04E\0\0\0\x09\0\0\0\0\0C\0\0\0\x06Pa\0S\0\0\0\x04",
    b"\x02\0d\0\0\0\x06a\nc\0\0\0\x04f\0\0\0\x06x\0F\0\0\0\x0e\0\0\0\x01\0\0\0\0\0\0",
    b"\x07\x02p\0\0\0\x08pwd\0p\0\0\0\x0bSCR\0\0\0\0\x03n,,",
];

/// The planted bug: the header of a Flush that is cut off behind its third byte is not kept for the next
/// part.
pub(super) fn client_frames(input: &[u8], planted: bool, reached: &mut Reached) -> Result<(), String> {
    let Some((part, phase, bytes)) = arrival(input) else { return Ok(()) };
    let mut scanner = Scanner::new(Side::Client, phase);
    let (mut messages, mut held, mut wrong) = (Vec::<(u8, Vec<u8>, bool)>::new(), Vec::new(), false);
    'parts: for part in bytes.chunks(part) {
        held.extend_from_slice(part);
        let mut view = held.as_slice();
        loop {
            match scanner.next(&mut view) {
                Ok(Some(Piece::Header(header))) => {
                    messages.push((header.kind, Vec::new(), header.body_bytes == 0));
                }
                Ok(Some(Piece::Body { part, last })) => {
                    let message = messages.last_mut().ok_or("a body without a header")?;
                    message.1.extend_from_slice(part);
                    message.2 = last;
                }
                Ok(None) => break,
                Err(_) => {
                    wrong = true;
                    break 'parts;
                }
            }
        }
        held = if planted && view == b"H\0\0" { Vec::new() } else { view.to_vec() };
    }
    let mut before = 0;
    for (kind, body, complete) in &messages {
        reached.kind(*kind);
        let readable = *complete && *kind != b'p' && read_back(*kind, body)?;
        reached.feature(
            u32::from(*kind) << 8 | u32::from(before) << 16 | u32::from(readable) << 1 | u32::from(*complete),
        );
        before = *kind;
    }
    let (expected, wrong_by_hand) = frames_by_hand(Side::Client, phase, bytes);
    agree(messages.iter().map(|(kind, body, complete)| (*kind, body.as_slice(), *complete)), &expected)?;
    if wrong == wrong_by_hand { Ok(()) } else { Err(format!("wrong: {wrong}, by hand {wrong_by_hand}")) }
}

fn agree<'a>(
    found: impl Iterator<Item = (u8, &'a [u8], bool)>,
    expected: &[(u8, &[u8], bool)],
) -> Result<(), String> {
    let found: Vec<_> = found.collect();
    if found == expected { Ok(()) } else { Err(format!("{found:?}, by hand {expected:?}")) }
}

/// Whether a body is readable; what is read must be written as it was.
fn read_back(kind: u8, body: &[u8]) -> Result<bool, String> {
    let Ok(message) = ClientMessage::parse(kind, body) else { return Ok(false) };
    let mut to = BytesMut::new();
    let written = match message {
        ClientMessage::Query { text } => build::query(&mut to, text),
        ClientMessage::Parse(parse) => {
            let types: Vec<u32> = parse.types.iter().collect();
            build::parse(&mut to, parse.name, parse.text, &types)
        }
        ClientMessage::Bind(bind) => {
            let (formats, results): (Vec<_>, Vec<_>) =
                (bind.formats.iter().collect(), bind.result_formats.iter().collect());
            let values: Vec<_> = bind.values.iter().collect();
            let out = BindOut {
                portal: bind.portal,
                statement: bind.statement,
                formats: &formats,
                values: &values,
                result_formats: &results,
            };
            build::bind(&mut to, &out)
        }
        ClientMessage::Describe { target, name } => build::describe(&mut to, target, name),
        ClientMessage::Close { target, name } => build::close(&mut to, target, name),
        ClientMessage::CopyFail { reason } => build::copy_fail(&mut to, reason),
        ClientMessage::CopyData(data) => build::copy_data(&mut to, data),
        _ => return Ok(true),
    };
    written.map_err(|error| error.to_string())?;
    same(&to[5..], body)?;
    Ok(true)
}

pub(super) const SERVER_SEEDS: &[&[u8]] = &[
    b"\x50\x02R\0\0\0\x08\0\0\0\0S\0\0\0\x08a\0b\0K\0\0\0\x0c\0\0\0\x01keykZ\0\0\0\x05IC\0\0\0\x06a\0",
    b"\x06\x02v\0\0\0\x0c\0\x03\0\0\0\0\0\0R\0\0\0\x0d\0\0\0\x0aSCR\0\0E\0\0\0\x0bC42P01\0\0",
    b"\x06\0T\0\0\0\x1a\0\x01a\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0\
      D\0\0\0\x0b\0\x01\0\0\0\x011C\0\0\0\x06a\0Z\0\0\0\x05I",
    b"\x03\x001\0\0\0\x042\0\0\0\x043\0\0\0\x04n\0\0\0\x04s\0\0\0\x04I\0\0\0\x04t\0\0\0\x0a\0\x01\0\0\0\x17",
    b"\x09\0G\0\0\0\x07\0\0\0H\0\0\0\x07\0\0\0W\0\0\0\x07\0\0\0\
      d\0\0\0\x05xc\0\0\0\x04V\0\0\0\x08\xff\xff\xff\xff",
    b"\x11\x01A\0\0\0\x0a\0\0\0\x07a\0\0N\0\0\0\x07Mx\0\0Z\0\0\0\x05T",
];

/// The planted bug: a ReadyForQuery whose status comes in a later part than its header is passed on unseen.
pub(super) fn server_frames(input: &[u8], planted: bool, reached: &mut Reached) -> Result<(), String> {
    let Some((part, phase, bytes)) = arrival(input) else { return Ok(()) };
    let stop = TypeSet::of(b"RESZ");
    let (mut scanner, mut spill) = (Scanner::new(Side::Server, phase), Spill::new(1 << 30));
    let (mut passed, mut seen, mut held, mut wrong) = (Vec::new(), Vec::new(), Vec::new(), false);
    let mut inside: Option<u8> = None;
    'parts: for part in bytes.chunks(part) {
        held.extend_from_slice(part);
        let mut view = held.as_slice();
        loop {
            if let Some(kind) = inside {
                let Ok(whole) = scanner.whole(&mut view, &mut spill) else {
                    return Err("a small body".to_owned());
                };
                let Some(body) = whole else { break };
                inside = None;
                passed.extend_from_slice(body);
                scanner.enter(phase_after(scanner.phase(), kind, body));
                seen.push((kind, body.to_vec()));
            }
            let Ok(run) = scanner.run(&mut view, stop) else {
                wrong = true;
                break 'parts;
            };
            passed.extend_from_slice(run);
            match scanner.next(&mut view) {
                Ok(Some(Piece::Header(header))) => {
                    passed.extend_from_slice(&header.to_bytes());
                    let unseen = planted && header.kind == b'Z' && view.is_empty();
                    inside = (!unseen).then_some(header.kind);
                }
                Ok(Some(Piece::Body { .. })) => return Err("run() left a part of a body".to_owned()),
                Ok(None) => break,
                Err(_) => {
                    wrong = true;
                    break 'parts;
                }
            }
        }
        held = view.to_vec();
    }
    let (expected, wrong_by_hand) = frames_by_hand(Side::Server, phase, bytes);
    let mut before = 0;
    for (kind, body, complete) in &expected {
        reached.kind(*kind);
        let readable = *complete && readable(*kind, body)?;
        reached.feature(u32::from(*kind) << 8 | u32::from(before) << 16 | u32::from(readable));
        before = *kind;
    }
    let looked_at = expected.iter().filter(|(kind, _, complete)| *complete && stop.contains(*kind)).copied();
    let looked_at: Vec<_> = looked_at.collect();
    agree(seen.iter().map(|(kind, body)| (*kind, body.as_slice(), true)), &looked_at)?;
    // Everything that was not held back went on, byte for byte.
    same(&passed, &bytes[..passed.len()])?;
    if wrong == wrong_by_hand { Ok(()) } else { Err(format!("wrong: {wrong}, by hand {wrong_by_hand}")) }
}

/// Whether a body is readable; what is read must be as much as was announced, and lie inside.
fn readable(kind: u8, body: &[u8]) -> Result<bool, String> {
    let Ok(message) = ServerMessage::parse(kind, body) else { return Ok(false) };
    let complete = match message {
        ServerMessage::DataRow(values) => values.iter().count() == values.count(),
        ServerMessage::RowDescription(rows) => rows.columns().count() == rows.count(),
        ServerMessage::ParameterDescription(oids) => oids.iter().count() == oids.count(),
        ServerMessage::ErrorResponse(fields) | ServerMessage::NoticeResponse(fields) => {
            fields.iter().map(|(_, value)| value.len() + 2).sum::<usize>() + 1 == body.len()
        }
        ServerMessage::Authentication(Authentication::Sasl(names)) => {
            4 + names.iter().map(|name| name.len() + 1).sum::<usize>() < body.len() + 1
        }
        _ => true,
    };
    if complete { Ok(true) } else { Err(format!("less was read of {} than announced", body.escape_ascii())) }
}

pub(super) const FLOW_SEEDS: &[&[u8]] = &[
    b"Q\xd4\xc4\xc3\xda",
    b"PBspES\xb1\xb2\xf4\xee\xd4\xc4\xf3\xda",
    b"Q\xc7dc\xc3\xdaX",
    b"Q\xc7df\xe5\xda",
    b"PBES\xb1\xb2\xc7dcS\xc3\xda",
    b"Q\xd7d\xe4c\xe3\xc3\xdaHC",
    b"F\xd6\xdaQ\xc8\xe4\xe3\xc3\xda",
    b"PQS\xe5\xdaQ\xc9\xceZ",
];

/// Requests are written as their types, answers as theirs with the highest bit. The planted bug: a CopyFail
/// is taken for a CopyDone.
pub(super) fn flow(input: &[u8], planted: bool, reached: &mut Reached) -> Result<(), String> {
    let (mut flow, mut model) = (Flow::new(TransactionStatus::Idle), Model::new());
    let mut before = 0;
    for byte in input.iter().take(60) {
        let kind = byte & 0x7f;
        let from_client = *byte < 0x80;
        let known = if from_client { REQUESTS } else { ANSWERS };
        if !known.contains(&kind) {
            continue;
        }
        reached.kind(kind);
        let outstanding = flow.outstanding().min(3) as u32;
        reached.feature(1 << 24 | u32::from(before) << 16 | u32::from(*byte) << 8 | outstanding);
        before = *byte;
        if from_client {
            let told = match request(kind) {
                FlowRequest::CopyFail if planted => FlowRequest::CopyDone,
                told => told,
            };
            if flow.request(told, crate::flow::Origin::Client).is_ok() {
                model.send(request(kind));
            }
            continue;
        }
        let possible = model.says(answer(kind));
        let accepted = flow.answer(answer(kind));
        if !flow.in_doubt() && accepted.is_ok() != possible {
            return Err(format!("{accepted:?}, by the book {possible}"));
        }
        if flow.is_clean() && (!possible || model.may_be_busy()) {
            return Err("taken for clean too early".to_owned());
        }
        if !possible || accepted.is_err() {
            return Ok(());
        }
    }
    Ok(())
}
