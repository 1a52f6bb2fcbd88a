//! The first bytes of a client, whatever they are and however they arrive, and the first byte of a server.
//!
//! What must be true, with a reading of the same bytes by hand beside it:
//!
//! - the login answers and ends as the reading by hand does: who is refused and with which SQLSTATE, what was asked
//!   for and in which words, where a handshake begins;
//! - nothing that was received in clear behind a request for encryption is read as if it had come through it;
//! - the same comes out however the bytes are cut, as long as encryption was not asked for;
//! - an end is an end: nothing is read or said behind it;
//! - no packet makes the login hold or say more than a packet can have.

use bytes::BytesMut;
use pgherd_pgwire::startup::options::{Switch, switches};
use pgherd_pgwire::startup::{Answer, Replication, Version, encryption_answer};
use pgherd_proxy::login::{Asked, Login, Method, Step, Tls};

use super::Target;
use crate::input::{Input, Part};
use crate::memory::live_bytes;
use crate::random::Random;
use crate::reached::{Reached, Says};
use crate::wire;

pub const TARGET: Target = Target {
    name: "startup",
    planted: "what stands behind an SSLRequest is read after the answer",
    messages: &[(Says::Opening, b"TtCSGD")],
    make,
    run,
};

const SSL_REQUEST: [u8; 4] = [4, 0xd2, 0x16, 0x2f];
const GSS_REQUEST: [u8; 4] = [4, 0xd2, 0x16, 0x30];
const CANCEL_REQUEST: [u8; 4] = [4, 0xd2, 0x16, 0x2e];
/// `MAX_STARTUP_PACKET_LENGTH` and the length in front of it.
const MAX_PACKET_BYTES: usize = 10_004;
/// A refusal with all its fields; the longest text repeats nothing of the client.
const MAX_SAID_BYTES: usize = 12_000;
const MAX_HELD_BYTES: isize = 64 << 10;

/// Bits of the mode: how TLS stands, and what the hba file says.
fn tls(mode: u8) -> Tls {
    [Tls::Unavailable, Tls::Offered, Tls::Required][usize::from(mode % 3)]
}

fn is_admitted(mode: u8) -> bool {
    mode & 0x40 != 0
}

fn is_server(mode: u8) -> bool {
    mode & 0x80 != 0
}

fn make(random: &mut Random) -> Input {
    let mut mode = random.byte();
    if !random.once_in(20) {
        mode &= 0x7f;
    }
    if is_server(mode) {
        let first = random.pick(b"NSGE");
        let behind = if random.once_in(3) { vec![random.byte()] } else { Vec::new() };
        return Input { mode, parts: vec![Part::new(0, [&[first][..], &behind].concat())] };
    }
    let mut packets = Vec::new();
    for _ in 0..random.below(3) {
        packets.push(match random.below(4) {
            0 => wire::packet(&GSS_REQUEST),
            1 => vec![0x16, 3, 1, 0, 5],
            _ => wire::packet(&SSL_REQUEST),
        });
    }
    let last = if random.once_in(4) {
        let key: Vec<u8> = (0..random.pick(&[4, 32, 256, 3, 257])).map(|at| at as u8).collect();
        wire::packet(&[&CANCEL_REQUEST[..], &[0, 0, 0x12, 0x34], &key].concat())
    } else {
        startup_packet(random)
    };
    packets.push(last);
    // What a client sends on its own account comes by itself, if it is honest.
    let parts = packets.iter().flat_map(|packet| wire::cut(packet, random)).map(|bytes| Part::new(0, bytes));
    Input { mode, parts: parts.collect() }
}

fn startup_packet(random: &mut Random) -> Vec<u8> {
    let mut body =
        random.pick(&[[0, 3, 0, 0], [0, 3, 0, 2], [0, 3, 0, 1], [0, 3, 0x27, 0x0f], [0, 2, 0, 0]]).to_vec();
    if random.once_in(2) {
        body = vec![0, 3, 0, 2 * random.below(2) as u8];
    }
    let known = [
        ("user", "alice"),
        ("database", "shop"),
        ("replication", "database"),
        ("replication", "Tru"),
        ("options", "-c search_path=evil --work-mem=1 -c\\ x=y"),
        ("_pq_.new", "1"),
        ("search_path", "evil"),
        ("user", ""),
        ("", "x"),
        ("client_encoding", "UTF8"),
        ("user", "al\"i'ce;--"),
    ];
    body.extend([wire::text("user"), wire::text("alice")].concat());
    for _ in 0..random.below(5) {
        let (name, value) = random.pick(&known);
        body.extend([wire::text(name), wire::text(value)].concat());
    }
    if random.once_in(30) {
        let long = "x".repeat(random.pick(&[63, 64, 1_000, 1_400]));
        body.extend([wire::text("database"), wire::text(&long)].concat());
    }
    body.push(0);
    wire::packet(&body)
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Waits,
    Asked(Asked),
    Cancel {
        pid: u32,
        key: Vec<u8>,
    },
    /// With an SQLSTATE.
    Refused(String),
    HangUp,
}

/// What was said in clear, and how it ended.
type Story = (Vec<u8>, End);

fn run(input: &Input, planted: bool, reached: &mut Reached) -> Result<(), String> {
    let segments: Vec<&[u8]> = input.parts.iter().map(|part| part.bytes.as_slice()).collect();
    if is_server(input.mode) {
        return server_answers(&segments);
    }
    let tls = tls(input.mode);
    let read = drive(&segments, tls, is_admitted(input.mode), planted, reached)?;
    let by_hand = by_hand(&segments, tls);
    if read != by_hand {
        return Err(format!("{read:?}, by hand {by_hand:?}"));
    }
    // Where encryption was asked for it counts what came together.
    let all = segments.concat();
    let bytes: Vec<&[u8]> = all.chunks(1).collect();
    let again = drive(&bytes, tls, false, planted, &mut Reached::nothing())?;
    let has_answered = |story: &Story| story.0.iter().any(|byte| matches!(byte, b'S' | b'N'));
    let cannot_tell = has_answered(&read) || has_answered(&again) || all.first() == Some(&0x16);
    if again == read || cannot_tell {
        return Ok(());
    }
    Err(format!("{again:?} byte by byte, and else {read:?}"))
}

fn drive(
    segments: &[&[u8]],
    tls: Tls,
    admitted: bool,
    planted: bool,
    reached: &mut Reached,
) -> Result<Story, String> {
    let mut login = Login::new(tls, "nonce".to_owned());
    let (mut pending, mut said) = (Vec::new(), BytesMut::new());
    let (mut end, mut history) = (End::Waits, 0);
    'segments: for segment in segments {
        pending.extend_from_slice(segment);
        loop {
            let mut view = pending.as_slice();
            if planted && view.get(4..8) == Some(&SSL_REQUEST) {
                view = &view[..8];
            }
            let (shown, said_before, live) = (view.len(), said.len(), live_bytes());
            let step = login.read(&mut view, &mut said);
            let taken = shown - view.len();
            if live_bytes() - live > MAX_HELD_BYTES || said.len() > MAX_SAID_BYTES {
                return Err(format!("{} bytes more are held, {} were said", live_bytes() - live, said.len()));
            }
            history = mark(&pending[..taken], &step, &said[said_before..], history, reached);
            pending.drain(..taken);
            match step {
                Step::More if planted && !pending.is_empty() && taken > 0 => {}
                Step::More => break,
                Step::Handshake => {
                    // What is left is the beginning of the handshake, or nothing.
                    if !pending.is_empty() && pending[0] != 0x16 {
                        return Err(format!(
                            "{:?} is left for the handshake",
                            pending.escape_ascii().to_string()
                        ));
                    }
                    pending.clear();
                    login.encrypted(None);
                    break;
                }
                Step::Method => {
                    let asked = login.asked().cloned().ok_or("nothing was asked for")?;
                    look_into(&asked)?;
                    let (method, expected) = match admitted {
                        true => (Method::Admit, Step::In(None)),
                        false => (Method::ScramSha256, Step::Verifier),
                    };
                    let mut answer = BytesMut::new();
                    let step = login.method(method, &mut answer);
                    if step != expected || admitted != (answer.as_ref() == wire::message(b'R', &[0; 4])) {
                        return Err(format!("{step:?} instead of {expected:?}, and said {answer:?}"));
                    }
                    end = End::Asked(asked);
                    break 'segments;
                }
                Step::Cancel { pid, key } => {
                    end = End::Cancel { pid, key };
                    break 'segments;
                }
                Step::Refused => {
                    let messages = wire::whole_messages(&said[said_before..]).0;
                    let Some((b'E', body)) = messages.last() else {
                        return Err(format!("refused without a word: {said:?}"));
                    };
                    let sqlstate = wire::field(body, b'C').unwrap_or_default();
                    end = End::Refused(String::from_utf8_lossy(sqlstate).into_owned());
                    said.truncate(said_before);
                    break 'segments;
                }
                Step::HangUp => {
                    end = End::HangUp;
                    break 'segments;
                }
                Step::Verifier | Step::In(_) => return Err(format!("{step:?} without a method")),
            }
        }
    }
    if matches!(end, End::Refused(_) | End::HangUp | End::Cancel { .. }) {
        let said_before = said.len();
        let step = login.read(&mut &b"\0\0\0\x08\x04\xd2\x16\x2f"[..], &mut said);
        if step != Step::HangUp || said.len() != said_before {
            return Err(format!("{step:?} after the end"));
        }
    }
    Ok((said.to_vec(), end))
}

/// `history`: what came before, which is told apart, too.
fn mark(taken: &[u8], step: &Step, said: &[u8], history: u64, reached: &mut Reached) -> u64 {
    let kind = match (step, taken.get(4..8)) {
        (Step::Handshake, None) => b'D',
        (Step::Handshake | Step::More, Some(code)) if code == SSL_REQUEST => b'S',
        (Step::Handshake | Step::More, Some(code)) if code == GSS_REQUEST => b'G',
        (Step::Cancel { .. }, _) => b'C',
        (Step::Method, Some([0, 3, 0, 2])) => b't',
        (Step::Method, _) => b'T',
        _ => 0,
    };
    if kind != 0 {
        reached.message(Says::Opening, kind);
    }
    // Several requests are read in one go; the last one is at the end of what was taken.
    for request in taken.windows(8).filter(|request| request[..4] == [0, 0, 0, 8]) {
        match request[4..] {
            [4, 0xd2, 0x16, 0x2f] if said.contains(&b'N') => reached.message(Says::Opening, b'S'),
            [4, 0xd2, 0x16, 0x30] if said.contains(&b'N') => reached.message(Says::Opening, b'G'),
            _ => {}
        }
    }
    let first = said.first().copied().unwrap_or_default();
    reached.feature(&[1, u64::from(kind), u64::from(first), taken.len().min(64) as u64 / 4]);
    if said.len() > 5 {
        let state = wire::field(&said[5..], b'C').unwrap_or_default();
        reached.feature(&[2, u64::from(kind), state.iter().fold(0, |sum, byte| sum * 64 + u64::from(*byte))]);
        let text = wire::field(&said[5..], b'M').unwrap_or_default();
        let letters = text.iter().filter(|byte| byte.is_ascii_alphabetic());
        let hash = letters.fold(0_u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        reached.feature(&[8, history, hash]);
    }
    let history = history << 8 | u64::from(kind);
    reached.feature(&[9, history, u64::from(first)]);
    history
}

/// What is asked for is a text and nothing more.
fn look_into(asked: &Asked) -> Result<(), String> {
    for (name, value) in &asked.parameters {
        if name.contains('\0') || value.contains('\0') || name.is_empty() {
            return Err(format!("a parameter {name:?}={value:?}"));
        }
        let mut bytes = 0;
        for switch in switches(value.as_bytes()) {
            bytes += match switch {
                Switch::Setting { name, value } => name.len() + value.len(),
                Switch::Other(text) => text.len(),
            };
        }
        if bytes > value.len() {
            return Err(format!("more was found in {value:?} than stands there"));
        }
    }
    Ok(())
}

fn refused(sqlstate: &str) -> End {
    End::Refused(sqlstate.to_owned())
}

/// The same by hand.
fn by_hand(segments: &[&[u8]], tls: Tls) -> Story {
    let (mut said, mut held) = (Vec::new(), Vec::new());
    let (mut ssl, mut gss, mut encrypted, mut is_first) = (false, false, false, true);
    for segment in segments {
        held.extend_from_slice(segment);
        if is_first && held.first() == Some(&0x16) {
            if tls == Tls::Unavailable {
                return (said, End::HangUp);
            }
            (ssl, gss, encrypted, is_first) = (true, true, true, false);
            held.clear();
            continue;
        }
        if held.len() < 4 {
            continue;
        }
        let length = held[..4].iter().fold(0_usize, |sum, byte| sum * 256 + usize::from(*byte));
        if !(8..=MAX_PACKET_BYTES).contains(&length) {
            return (said, refused("08P01"));
        }
        if held.len() < length {
            continue;
        }
        is_first = false;
        let packet: Vec<u8> = held.drain(..length).skip(4).collect();
        let (code, body) = packet.split_at(4);
        if (code == SSL_REQUEST || code == GSS_REQUEST) && body.is_empty() {
            let again = std::mem::replace(if code == SSL_REQUEST { &mut ssl } else { &mut gss }, true);
            if again || !held.is_empty() {
                return (said, refused("08P01"));
            }
            if code == SSL_REQUEST && tls != Tls::Unavailable {
                (gss, encrypted) = (true, true);
                said.push(b'S');
            } else {
                said.push(b'N');
            }
            continue;
        }
        if code == CANCEL_REQUEST && (8..=260).contains(&body.len()) {
            let pid = u32::from_be_bytes([body[0], body[1], body[2], body[3]]);
            return (said, End::Cancel { pid, key: body[4..].to_vec() });
        }
        if code[..2] != [0, 3] {
            let known = [SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST];
            let sqlstate = if known.iter().any(|known| known == code) { "08P01" } else { "0A000" };
            return (said, refused(sqlstate));
        }
        let version = u32::from_be_bytes([code[0], code[1], code[2], code[3]]);
        let end = asked_by_hand(version, body, &mut said, tls == Tls::Required && !encrypted);
        return (said, end);
    }
    (said, End::Waits)
}

fn asked_by_hand(version: u32, body: &[u8], said: &mut Vec<u8>, lacks_tls: bool) -> End {
    let Some(list) = body.strip_suffix(b"\0") else { return refused("08P01") };
    // Every text ends with a zero, so that the last of the pieces between zeros is empty.
    let mut texts: Vec<&[u8]> = list.split(|byte| *byte == 0).collect();
    let names_are_there = |texts: &[&[u8]]| texts.iter().step_by(2).all(|name| !name.is_empty());
    if texts.pop() != Some(b"") || texts.len() % 2 == 1 || !names_are_there(&texts) {
        return refused("08P01");
    }
    let last = |name: &[u8]| texts.chunks(2).rev().find(|pair| pair[0] == name).map(|pair| pair[1]);
    let Some(user) = last(b"user").filter(|user| !user.is_empty()) else { return refused("28000") };
    let words =
        |words: &str, value: &[u8]| words.split(' ').any(|word| word.as_bytes().eq_ignore_ascii_case(value));
    let replication = match last(b"replication") {
        None => Replication::Off,
        Some(b"database") => Replication::Logical,
        Some(value) if words("t tr tru true y ye yes on 1", value) => Replication::Physical,
        Some(value) if words("f fa fal fals false n no of off 0", value) => Replication::Off,
        Some(_) => return refused("08P01"),
    };
    let database = last(b"database").filter(|name| !name.is_empty()).unwrap_or(user);
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    // `NAMEDATALEN`; in the middle of a letter nothing is cut.
    let name = |bytes: &[u8]| {
        let name = text(bytes)?;
        let fits =
            name.char_indices().map(|(at, letter)| at + letter.len_utf8()).take_while(|end| *end <= 63);
        let end = fits.last().unwrap_or(0);
        Some(name[..end].to_owned())
    };
    let is_named = |name: &[u8]| [&b"user"[..], b"database", b"replication"].contains(&name);
    let others = texts.chunks(2).filter(|pair| !is_named(pair[0]) && !pair[0].starts_with(b"_pq_."));
    let others: Option<Vec<(String, String)>> =
        others.map(|pair| Some((text(pair[0])?, text(pair[1])?))).collect();
    let (Some(user), Some(database), Some(parameters)) = (name(user), name(database), others) else {
        return refused("08P01");
    };
    if lacks_tls {
        return refused("28000");
    }
    let spoken = if version & 0xffff >= 2 { 0x0003_0002 } else { 0x0003_0000 };
    let unknown: Vec<&[u8]> =
        texts.chunks(2).map(|pair| pair[0]).filter(|name| name.starts_with(b"_pq_.")).collect();
    if version != spoken || !unknown.is_empty() {
        let mut body = u32::to_be_bytes(spoken).to_vec();
        body.extend((unknown.len() as u32).to_be_bytes());
        unknown.iter().for_each(|name| body.extend([name, &b"\0"[..]].concat()));
        said.extend(wire::message(b'v', &body));
    }
    End::Asked(Asked { user, database, replication, version: Version(spoken), parameters })
}

/// The other side: what a server answers to a request for encryption is one byte.
fn server_answers(segments: &[&[u8]]) -> Result<(), String> {
    let received = segments.first().copied().unwrap_or_default();
    for granting in [b'S', b'G'] {
        let read = encryption_answer(received, granting);
        let right = match received {
            [] => matches!(read, Ok(None)),
            [b'N'] => matches!(read, Ok(Some(Answer::Refused))),
            [byte] if *byte == granting => matches!(read, Ok(Some(Answer::Granted))),
            _ => read.is_err(),
        };
        if !right {
            return Err(format!("{read:?} for {:?}", received.escape_ascii().to_string()));
        }
    }
    Ok(())
}
