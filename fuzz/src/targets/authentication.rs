//! A client that proves who it is, message by message in any order; and both sides of SCRAM.
//!
//! Nonces, salt and keys are the same in every execution, so that a conversation can hold the right proof. What must
//! be true, with the exchange calculated by hand from RFC 5802 beside it:
//!
//! - a client is in only with the proof that its own words and the server's call for, bound to the connection where it
//!   says so, and then its keys are the user's;
//! - a good exchange comes in, and the server proves itself to it;
//! - anything out of its order is the end;
//! - nobody can tell a user who does not exist from one whose password is another one;
//! - the same comes out however the bytes are cut, and no message makes the login hold or say more than it has;
//! - the proxy believes a server only if that has proven that it knows the verifier.

use std::sync::LazyLock;

use aws_lc_rs::{digest, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::BytesMut;
use pgherd_pgwire::scram::{self, Binding, ClientKeys, Verifier};
use pgherd_proxy::login::{Keys, Login, Method, Step, Tls};

use super::Target;
use crate::input::{Input, Part};
use crate::memory::live_bytes;
use crate::random::Random;
use crate::reached::{Reached, Says};
use crate::wire;

pub const TARGET: Target = Target {
    name: "authentication",
    planted: "a proof is taken for right without a look at it",
    messages: &[(Says::Proof, b"ir"), (Says::Request, &[0, 10, 11, 12])],
    make,
    run,
};

const PLAIN: &str = "SCRAM-SHA-256";
const PLUS: &str = "SCRAM-SHA-256-PLUS";
const NONCE: &str = "nonce-of-the-proxy";
const CERTIFICATE_HASH: &[u8] = b"the hash of a certificate, 32 by";
const SALT: &[u8; 16] = b"salt of the user";
const CLIENT_KEY: &[u8; 32] = b"the key that only the client has";
const SERVER_KEY: &[u8; 32] = b"the key that the server has, too";
/// So many pieces are read in one execution: the time of all of them together counts.
const MAX_PIECES: usize = 1_000;
/// What a message of this phase may have, twice over.
const MAX_HELD_BYTES: isize = 192 << 10;
/// The longest nonce that is taken, and what stands around it in the answers.
const MAX_SAID_BYTES: usize = 12_000;

fn mac(key: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message).as_ref().to_vec()
}

fn stored_key() -> Vec<u8> {
    digest::digest(&digest::SHA256, CLIENT_KEY).as_ref().to_vec()
}

pub(super) static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    let [salt, stored, server] = [&SALT[..], &stored_key(), SERVER_KEY].map(|bytes| BASE64.encode(bytes));
    Verifier::parse(&format!("SCRAM-SHA-256$4096:{salt}${stored}:{server}")).expect("as PostgreSQL stores it")
});

/// What a right proof reveals.
pub(super) static KEYS: LazyLock<ClientKeys> = LazyLock::new(|| {
    let first = b"n,,n=,r=x";
    let begun = scram::Server::start(VERIFIER.clone(), first, Binding::Impossible, NONCE);
    let (server, challenge) = begun.expect("a good beginning");
    let last = client_final("n,,", b"", "n=,r=x", &challenge).expect("a challenge");
    server.finish(last.as_bytes()).expect("a right proof").1
});

fn server_first(client_nonce: &str) -> String {
    format!("r={client_nonce}{NONCE},s={},i=4096", BASE64.encode(SALT))
}

/// The right answer to a challenge.
fn client_final(header: &str, hash: &[u8], bare: &str, challenge: &str) -> Option<String> {
    let nonce = challenge.split(',').next()?.strip_prefix("r=")?;
    let binding = BASE64.encode([header.as_bytes(), hash].concat());
    let without_proof = format!("c={binding},r={nonce}");
    Some(format!("{without_proof},p={}", BASE64.encode(proof(bare, challenge, &without_proof))))
}

fn proof(bare: &str, challenge: &str, without_proof: &str) -> Vec<u8> {
    let signature = mac(&stored_key(), format!("{bare},{challenge},{without_proof}").as_bytes());
    CLIENT_KEY.iter().zip(signature).map(|(key, byte)| key ^ byte).collect()
}

pub(super) fn server_signature(bare: &str, challenge: &str, without_proof: &str) -> String {
    BASE64.encode(mac(SERVER_KEY, format!("{bare},{challenge},{without_proof}").as_bytes()))
}

/// Bits of the mode.
fn is_encrypted(mode: u8) -> bool {
    mode & 1 != 0
}

fn is_also_nobody(mode: u8) -> bool {
    mode & 6 == 2
}

fn is_also_cut(mode: u8) -> bool {
    mode & 6 == 4
}

fn is_server(mode: u8) -> bool {
    mode & 0xc0 == 0xc0
}

fn initial(mechanism: &str, first: Option<&[u8]>) -> Vec<u8> {
    let length = first.map_or(u32::MAX, |first| first.len() as u32);
    let body = [&wire::text(mechanism)[..], &length.to_be_bytes(), first.unwrap_or_default()].concat();
    wire::message(b'p', &body)
}

/// The one who speaks: bytes as they are, or the right answer to the last challenge.
const AS_IT_IS: u8 = 0;
const RIGHT_ANSWER: u8 = 1;

fn make(random: &mut Random) -> Input {
    let mut mode = random.byte();
    if is_server(mode) {
        return make_server(mode, random);
    }
    mode &= 0x3f;
    let plus = is_encrypted(mode) && random.once_in(2);
    let mechanism = if plus { PLUS } else { PLAIN };
    let header = match plus {
        true => "p=tls-server-end-point,,",
        false if is_encrypted(mode) || random.once_in(2) => "n,,",
        false => "y,,",
    };
    let nonce = match random.below(6) {
        0 => "n".repeat(random.pick(&[1, 64, 1_023, 1_024])),
        _ => "fyko+d2lbbFgONRv9qkxdawL".to_owned(),
    };
    let bare = format!("n={},r={nonce}", if random.once_in(2) { "alice" } else { "" });
    let first = format!("{header}{bare}");
    let mut parts = Vec::new();
    if random.once_in(3) {
        parts.push(Part::new(AS_IT_IS, initial(mechanism, None)));
        parts.push(Part::new(AS_IT_IS, wire::message(b'p', first.as_bytes())));
    } else {
        parts.push(Part::new(AS_IT_IS, initial(mechanism, Some(first.as_bytes()))));
    }
    if random.once_in(2) {
        parts.push(Part::new(RIGHT_ANSWER, Vec::new()));
    } else {
        let hash = if plus { CERTIFICATE_HASH } else { b"" };
        let last = client_final(header, hash, &bare, &server_first(&nonce)).unwrap_or_default();
        parts.extend(
            wire::cut(&wire::message(b'p', last.as_bytes()), random)
                .into_iter()
                .map(|bytes| Part::new(0, bytes)),
        );
    }
    if random.once_in(10) {
        let others =
            [wire::message(b'p', &wire::text("password")), wire::message(b'Q', &wire::text("SELECT 1"))];
        let at = random.below(parts.len() + 1);
        parts.insert(at, Part::new(AS_IT_IS, random.pick(&others)));
    }
    Input { mode, parts }
}

fn run(input: &Input, planted: bool, reached: &mut Reached) -> Result<(), String> {
    if is_server(input.mode) {
        return server_of_ours(input, reached);
    }
    let encrypted = is_encrypted(input.mode);
    let (ours, sent) = converse(input, None, encrypted, VERIFIER.clone(), planted, reached)?;
    let is_right = is_right_by_hand(&sent.concat(), encrypted);
    if matches!(ours.end, Step::In(_)) != is_right {
        return Err(format!("{:?}, by hand {is_right}: {}", ours.end, sent.concat().escape_ascii()));
    }
    if let Step::In(keys) = &ours.end {
        if *keys != Some(Keys::Scram(KEYS.clone())) {
            return Err("it came in with the keys of somebody else".to_owned());
        }
        let kinds: Vec<u8> = wire::whole_messages(&ours.said).0.iter().map(|(kind, _)| *kind).collect();
        if kinds.last() != Some(&b'R') || !ours.said.ends_with(&[0, 0, 0, 8, 0, 0, 0, 0]) {
            return Err("it came in without AuthenticationOk".to_owned());
        }
    }
    // The same bytes for somebody who does not exist,
    let nothing = &mut Reached::nothing();
    if is_also_nobody(input.mode) {
        let nobody = Verifier::of_nobody("alice", &[7; 32]);
        let (theirs, _) = converse(input, Some(&sent), encrypted, nobody, false, nothing)?;
        let is_refused = matches!(ours.end, Step::In(_)) && theirs.end == Step::Refused;
        if !is_refused && (theirs.shape() != ours.shape() || theirs.end != ours.end) {
            return Err(format!("it can be told that there is nobody: {ours:?}, {theirs:?}"));
        }
    }
    // and cut otherwise.
    let bytes: Vec<Vec<u8>> = sent.concat().chunks(1).map(<[u8]>::to_vec).collect();
    if is_also_cut(input.mode) && bytes.len() < 400 {
        let (again, _) = converse(input, Some(&bytes), encrypted, VERIFIER.clone(), planted, nothing)?;
        if again != ours {
            return Err(format!("{again:?} byte by byte, and else {ours:?}"));
        }
    }
    Ok(())
}

/// What came of a login.
#[derive(Debug, PartialEq, Eq)]
struct Story {
    said: Vec<u8>,
    end: Step,
}

impl Story {
    /// What can be seen without knowing secrets: types, lengths, and what errors say.
    fn shape(&self) -> Vec<(u8, usize, &[u8])> {
        let messages = wire::whole_messages(&self.said).0;
        messages
            .into_iter()
            .map(|(kind, body)| (kind, body.len(), if kind == b'E' { body } else { &[] }))
            .collect()
    }
}

/// `sent`: these bytes, whatever the input says. Returns what was sent.
fn converse(
    input: &Input,
    sent: Option<&[Vec<u8>]>,
    encrypted: bool,
    verifier: Verifier,
    planted: bool,
    reached: &mut Reached,
) -> Result<(Story, Vec<Vec<u8>>), String> {
    let mut login = Login::new(if encrypted { Tls::Offered } else { Tls::Unavailable }, NONCE.to_owned());
    let mut said = BytesMut::new();
    if encrypted {
        let request = wire::packet(&[4, 0xd2, 0x16, 0x2f]);
        if login.read(&mut request.as_slice(), &mut said) != Step::Handshake {
            return Err("no handshake".to_owned());
        }
        login.encrypted(Some(CERTIFICATE_HASH.to_vec()));
    }
    let startup = wire::packet(b"\0\x03\0\0user\0alice\0\0");
    let asked = login.read(&mut startup.as_slice(), &mut said);
    let wanted = login.method(Method::ScramSha256, &mut said);
    let mut end = login.verifier(verifier, &mut said);
    if (asked, wanted, &end) != (Step::Method, Step::Verifier, &Step::More) {
        return Err("it did not begin".to_owned());
    }
    mark(&end, &said, 0, reached);
    said.clear();
    let (mut pending, mut all, mut given): (Vec<u8>, Vec<u8>, Vec<Vec<u8>>) = Default::default();
    // What is calculated is not repeated: that would measure this code, and not the login's.
    let times = |part: &Part| if part.who & 1 == RIGHT_ANSWER { 1 } else { part.times() };
    let from_input = || input.parts.iter().flat_map(|part| std::iter::repeat_n(part, times(part)));
    let mut replayed = sent.map(<[Vec<u8>]>::iter);
    let mut parts = from_input();
    loop {
        let bytes = match &mut replayed {
            Some(replayed) => replayed.next().cloned(),
            None => parts.next().map(|part| match part.who & 1 {
                RIGHT_ANSWER => right_answer(&all, &said).unwrap_or_else(|| part.bytes.clone()),
                _ => part.bytes.clone(),
            }),
        };
        let Some(bytes) = bytes.filter(|_| sent.is_some() || given.len() < MAX_PIECES) else { break };
        all.extend_from_slice(&bytes);
        pending.extend_from_slice(&bytes);
        given.push(bytes);
        let (mut view, said_before, live) = (pending.as_slice(), said.len(), live_bytes());
        end = login.read(&mut view, &mut said);
        let taken = pending.len() - view.len();
        if live_bytes() - live > MAX_HELD_BYTES || said.len() > MAX_SAID_BYTES {
            return Err(format!("{} bytes more are held, {} were said", live_bytes() - live, said.len()));
        }
        let answer = said.get(said_before..).unwrap_or_default();
        mark(&end, answer, taken, reached);
        pending.drain(..taken);
        if planted && wire::field(answer.get(5..).unwrap_or_default(), b'C') == Some(b"28P01") {
            said.truncate(said_before);
            said.extend(wire::message(b'R', &[0; 4]));
            end = Step::In(Some(Keys::Scram(KEYS.clone())));
        }
        if !matches!(end, Step::More) {
            break;
        }
    }
    match &end {
        Step::More => {}
        Step::Refused | Step::In(_) => {
            let step = login.read(&mut &b"p\0\0\0\x05x"[..], &mut BytesMut::new());
            if step != Step::HangUp {
                return Err(format!("{step:?} after the end"));
            }
        }
        other => return Err(format!("{other:?}")),
    }
    Ok((Story { said: said.to_vec(), end }, given))
}

fn mark(end: &Step, said: &[u8], taken: usize, reached: &mut Reached) {
    let mut seen = [0_u64; 4];
    for ((kind, body), seen) in wire::whole_messages(said).0.into_iter().zip(&mut seen) {
        let request = body.get(3).copied().unwrap_or_default();
        if kind == b'R' {
            reached.message(Says::Request, request);
        }
        match (kind, request) {
            (b'R', 11) if body.len() > 4 => reached.message(Says::Proof, b'i'),
            (b'R', 12) => reached.message(Says::Proof, b'r'),
            _ => {}
        }
        let text = wire::field(body, b'M').unwrap_or_default();
        // What else stands there may be the client's own words.
        let begin = &text[..text.len().min(40)];
        let hash = begin
            .iter()
            .filter(|byte| byte.is_ascii_alphabetic())
            .fold(0_u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        *seen = u64::from(kind) << 32 | u64::from(request) << 24 ^ hash;
    }
    let step = matches!(end, Step::More) as u64 | (matches!(end, Step::In(_)) as u64) << 1;
    reached.feature(&[3, step, seen[0], seen[1], seen[2]]);
    reached.feature(&[4, step, seen[0], taken.min(256) as u64 / 64]);
}

/// The proof for what was sent and said so far, in a message; `None` if that is no beginning.
fn right_answer(sent: &[u8], said: &[u8]) -> Option<Vec<u8>> {
    let (messages, _) = wire::whole_messages(sent);
    let (_, bodies): (Vec<u8>, Vec<&[u8]>) = messages.into_iter().unzip();
    let (_, first, _) = first_by_hand(&bodies)?;
    let first = std::str::from_utf8(first).ok()?;
    let mut commas = first.match_indices(',').map(|(at, _)| at);
    let header_end = commas.nth(1)? + 1;
    let (header, bare) = first.split_at(header_end);
    let messages = wire::whole_messages(said).0;
    let (_, challenge) = messages.iter().rfind(|(kind, body)| *kind == b'R' && body.len() > 4)?;
    let challenge = std::str::from_utf8(&challenge[4..]).ok()?;
    let hash = if header.starts_with('p') { CERTIFICATE_HASH } else { b"" };
    Some(wire::message(b'p', client_final(header, hash, bare, challenge)?.as_bytes()))
}

/// Mechanism, client-first-message, and how many messages these were.
fn first_by_hand<'a>(bodies: &[&'a [u8]]) -> Option<(&'a [u8], &'a [u8], usize)> {
    let initial = bodies.first()?;
    let end = initial.iter().position(|byte| *byte == 0)?;
    let (mechanism, rest) = (&initial[..end], &initial[end + 1..]);
    let (length, data) = rest.split_first_chunk::<4>()?;
    match i32::from_be_bytes(*length) {
        -1 if data.is_empty() => Some((mechanism, bodies.get(1)?, 2)),
        length if usize::try_from(length) == Ok(data.len()) => Some((mechanism, data, 1)),
        _ => None,
    }
}

/// Whether these bytes are an exchange with the right proof, to the last byte that was read.
fn is_right_by_hand(sent: &[u8], encrypted: bool) -> bool {
    let is_right = || -> Option<bool> {
        let (messages, _) = wire::whole_messages(sent);
        let small = |(kind, body): &(u8, &[u8])| *kind == b'p' && body.len() + 4 <= 65_535;
        let bodies: Vec<&[u8]> =
            messages.iter().take_while(|message| small(message)).map(|(_, body)| *body).collect();
        let (mechanism, first, used) = first_by_hand(&bodies)?;
        let last = std::str::from_utf8(bodies.get(used)?).ok()?;
        let first = std::str::from_utf8(first).ok()?;
        if first.contains('\0') || last.contains('\0') {
            return None;
        }
        let header = if mechanism == PLUS.as_bytes() && encrypted {
            "p=tls-server-end-point,,"
        } else if mechanism != PLAIN.as_bytes() {
            return None;
        } else if first.starts_with("y,") && !encrypted {
            "y,,"
        } else {
            "n,,"
        };
        let hash = if header.starts_with('p') { CERTIFICATE_HASH } else { b"" };
        let bare = first.strip_prefix(header)?;
        let mut attributes = bare.split(',');
        attributes.next()?.strip_prefix("n=")?;
        let nonce = attributes.next()?.strip_prefix("r=")?;
        if nonce.is_empty() || nonce.len() > 1024 || !nonce.bytes().all(|byte| (0x21..0x7f).contains(&byte)) {
            return None;
        }
        let (without_proof, given) = last.rsplit_once(",p=")?;
        let mut attributes = without_proof.split(',');
        let bound = BASE64.decode(attributes.next()?.strip_prefix("c=")?).ok()?;
        let repeated = attributes.next()?.strip_prefix("r=")?;
        let right = proof(bare, &server_first(nonce), without_proof);
        Some(
            bound == [header.as_bytes(), hash].concat()
                && repeated == format!("{nonce}{NONCE}")
                && BASE64.decode(given).ok()? == right,
        )
    };
    is_right().unwrap_or(false)
}

// The proxy as the client of a server: what that says stands in the parts.

/// The server's own words at this point, instead of the part's.
const HONEST: u8 = 1;
const OUR_NONCE: &str = "nonce-of-our-own";

fn make_server(mode: u8, random: &mut Random) -> Input {
    let challenge = server_first(OUR_NONCE);
    let first = match random.below(3) {
        0 => challenge.clone(),
        1 => format!("r={OUR_NONCE}x,s={},i=4096", BASE64.encode(SALT)),
        _ => format!(
            "r={OUR_NONCE}x,s={},i={}",
            BASE64.encode(SALT),
            random.pick(&[1, 4095, 1 << 30, u32::MAX])
        ),
    };
    let without_proof = format!("c={},r={OUR_NONCE}{NONCE}", BASE64.encode("n,,"));
    let signature = server_signature(&format!("n=,r={OUR_NONCE}"), &challenge, &without_proof);
    let last = if random.once_in(4) { "e=other-error".to_owned() } else { format!("v={signature}") };
    let parts = vec![
        Part::new(u8::from(random.once_in(2)) * HONEST, first),
        Part::new(u8::from(random.once_in(3)) * HONEST, last),
    ];
    Input { mode, parts }
}

fn server_of_ours(input: &Input, reached: &mut Reached) -> Result<(), String> {
    let (mut client, client_first) = scram::Client::start(KEYS.clone(), Binding::Impossible, OUR_NONCE);
    let bare = client_first.strip_prefix("n,,").ok_or("another beginning than it was asked for")?;
    let mut parts = input.parts.iter();
    let challenge = match parts.next() {
        Some(part) if part.who & 1 == HONEST => server_first(OUR_NONCE).into_bytes(),
        Some(part) => part.bytes.clone(),
        None => return Ok(()),
    };
    let live = live_bytes();
    let proof = client.prove(&challenge);
    if live_bytes() - live > MAX_HELD_BYTES {
        return Err("more is held than a challenge can have".to_owned());
    }
    reached.feature(&[6, u64::from(proof.is_ok()), challenge.len() as u64 / 32]);
    let Ok(proof) = proof else {
        let honest = challenge == server_first(OUR_NONCE).into_bytes();
        return if honest { Err("an honest challenge was refused".to_owned()) } else { Ok(()) };
    };
    let challenge = String::from_utf8(challenge).map_err(|_| "a challenge that is no text")?;
    let theirs = challenge
        .strip_prefix(&format!("r={OUR_NONCE}"))
        .map(|rest| rest.split(',').next().unwrap_or_default());
    let fits = challenge.ends_with(&format!(",s={},i=4096", BASE64.encode(SALT)));
    if theirs.is_none_or(str::is_empty) || !fits {
        return Err(format!("a challenge was taken: {challenge}"));
    }
    let (without_proof, _) = proof.rsplit_once(",p=").ok_or("no proof")?;
    let signature = server_signature(bare, &challenge, without_proof);
    let right = format!("v={signature}").into_bytes();
    let last = match parts.next() {
        Some(part) if part.who & 1 == HONEST => right.clone(),
        Some(part) => part.bytes.clone(),
        None => return Ok(()),
    };
    let finished = client.finish(&last);
    reached.feature(&[7, u64::from(finished.is_ok()), last.len() as u64 / 8]);
    // The last bits of a text in base 64 count for nothing, and are refused.
    if finished.is_ok() == (last == right) { Ok(()) } else { Err(format!("{finished:?} for {last:?}")) }
}
