//! How the proxy comes in at a server that says what it likes, or what the book says.
//!
//! Leaves out what comes behind the first ReadyForQuery. Hazard: see [`super`].

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::BytesMut;
use pgherd_pgwire::login::{Login, Purpose, Step};
use pgherd_pgwire::message::ServerMessage;
use pgherd_pgwire::scram::{self, Binding, Proof};
use pgherd_pgwire::startup::Replication;
use pgherd_proxy::server::NotIn;

use super::MAX_SENT_BYTES;
use crate::input::{Input, Part};
use crate::memory::live_bytes;
use crate::random::Random;
use crate::reached::{Reached, Says};
use crate::targets::authentication::{KEYS, VERIFIER, server_signature};
use crate::wire::{self, message, text};

/// What a login may hold: one message, and what the server reported.
const MAX_LOGIN_BYTES: isize = 160 << 10;

const HONEST: u8 = 1;
const NONCE: &str = "nonce-of-the-server";
const OUR_NONCE: &str = "nonce-of-the-proxy";

pub(super) fn make(random: &mut Random) -> Vec<Part> {
    let request = |kind: u8, more: &[u8]| message(b'R', &[&[0, 0, 0, kind], more].concat());
    let ready = message(b'Z', b"I");
    let mut parts = vec![Part::new(HONEST, Vec::new()); 3];
    let key: Vec<u8> = vec![7; 4 + random.pick(&[4, 32, 256])];
    let negotiated = message(b'v', &[&[0, 3, 0, 0, 0, 0, 0, 1][..], &text("_pq_.x")].concat());
    let others = [
        request(0, b""),
        request(2, b""),
        request(3, b""),
        request(5, b"salt"),
        request(7, b""),
        request(8, b"token"),
        request(9, b""),
        request(10, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"),
        request(11, b"r=nonce-of-the-proxyx,s=c2FsdA==,i=4096"),
        request(12, b"v=AAAA"),
        message(b'K', &key),
        wire::parameter_status("TimeZone", random.pick(&["UTC", "Europe/Berlin"])),
        wire::report(b'N', &[(b'S', "NOTICE"), (b'M', "hello")]),
        message(b'A', &[vec![0, 0, 0, 7], text("channel"), text("")].concat()),
        wire::error("FATAL", "57P03"),
        wire::report(b'E', &[(b'M', "no SQLSTATE")]),
        negotiated,
        ready.clone(),
    ];
    let starting = [
        wire::parameter_status("server_version", "15.14"),
        wire::parameter_status("in_hot_standby", "off"),
        message(b'K', &key),
        ready,
    ]
    .concat();
    if random.once_in(2) {
        parts.extend(wire::cut(&starting, random).into_iter().map(|bytes| Part::new(0, bytes)));
    }
    for _ in 0..random.below(3) {
        let at = random.below(parts.len() + 1);
        parts.insert(at, Part::new(0, random.pick(&others)));
    }
    parts
}

/// A bit of the mode: nobody's proof is at hand.
fn is_without_keys(mode: u8) -> bool {
    mode & 0x20 != 0
}

pub(super) fn run(input: &Input, reached: &mut Reached) -> Result<(), String> {
    let all: Vec<Vec<u8>> = said_by_a_server(input)?;
    let pieces: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
    let story = come_in(&pieces, input.mode, reached)?;
    let all = all.concat();
    if all.len() < 400 {
        let bytes: Vec<&[u8]> = all.chunks(1).collect();
        let again = come_in(&bytes, input.mode, &mut Reached::nothing())?;
        if again != story {
            return Err(format!("{again:?} byte by byte, and else {story:?}"));
        }
    }
    judge_login(&story, &all, is_without_keys(input.mode))
}

fn purpose() -> Purpose {
    let parameters = vec![("application_name".to_owned(), "till".to_owned())];
    Purpose {
        user: "alice".to_owned(),
        database: "shop".to_owned(),
        replication: Replication::Off,
        parameters,
        is_certified: false,
    }
}

fn begun(mode: u8) -> Result<(Login, BytesMut), String> {
    let keys = (!is_without_keys(mode)).then(|| Proof::Keys(KEYS.clone()));
    let mut sent = BytesMut::new();
    let login = Login::new(&purpose(), keys, OUR_NONCE.to_owned(), &mut sent);
    Ok((login.map_err(|error| error.to_string())?, sent))
}

/// The bytes of the parts; what an honest server says follows from what the proxy has sent it by then.
fn said_by_a_server(input: &Input) -> Result<Vec<Vec<u8>>, String> {
    let (mut login, mut sent) = begun(input.mode)?;
    sent.clear();
    let (mut all, mut server, mut held): (Vec<Vec<u8>>, Option<scram::Server>, Vec<u8>) =
        (Vec::new(), None, Vec::new());
    for part in &input.parts {
        let times = if part.who & 1 == HONEST { 1 } else { part.times() };
        for _ in 0..times {
            let bytes = if part.who & 1 == HONEST { honest(&sent, &mut server) } else { part.bytes.clone() };
            if all.iter().map(Vec::len).sum::<usize>() > MAX_SENT_BYTES {
                return Ok(all);
            }
            held.extend_from_slice(&bytes);
            all.push(bytes);
            let mut view = held.as_slice();
            // It is judged when all is known.
            drop(login.read(&mut view, &mut sent));
            held = view.to_vec();
        }
    }
    Ok(all)
}

/// The next message of a server that stores the verifier.
fn honest(sent: &[u8], server: &mut Option<scram::Server>) -> Vec<u8> {
    let request = |kind: u8, more: &[u8]| message(b'R', &[&[0, 0, 0, kind], more].concat());
    let messages = wire::whole_messages(sent).0;
    match messages.last() {
        None => request(10, b"SCRAM-SHA-256\0\0"),
        Some((_, body)) => match server.take() {
            Some(begun) => match begun.finish(body) {
                Ok((last, _)) => [request(12, last.as_bytes()), request(0, b"")].concat(),
                Err(_) => wire::error("FATAL", "28P01"),
            },
            None => {
                let first = body.get("SCRAM-SHA-256\0".len() + 4..).unwrap_or_default();
                match scram::Server::start(VERIFIER.clone(), first, Binding::Impossible, NONCE) {
                    Ok((begun, challenge)) => {
                        *server = Some(begun);
                        request(11, challenge.as_bytes())
                    }
                    Err(_) => wire::error("FATAL", "08P01"),
                }
            }
        },
    }
}

#[derive(Debug, PartialEq, Eq)]
struct LoginStory {
    sent: Vec<u8>,
    end: Option<Step>,
}

fn come_in(pieces: &[&[u8]], mode: u8, reached: &mut Reached) -> Result<LoginStory, String> {
    let (mut login, mut sent) = begun(mode)?;
    sent.clear();
    let (mut held, mut end, mut taken_bytes) = (Vec::new(), None, 0);
    for piece in pieces {
        held.extend_from_slice(piece);
        let mut view = held.as_slice();
        let step = login.read(&mut view, &mut sent);
        let taken = held.len() - view.len();
        mark_login(&held[..taken], &step, taken_bytes == 0, reached);
        taken_bytes += taken;
        held.drain(..taken);
        if step != Step::More {
            end = Some(step);
            break;
        }
    }
    let before = live_bytes();
    drop(login);
    let held_bytes = before - live_bytes();
    if end.is_none() && held_bytes > MAX_LOGIN_BYTES {
        return Err(format!("{held_bytes} bytes are held after {taken_bytes}"));
    }
    Ok(LoginStory { sent: sent.to_vec(), end })
}

fn mark_login(taken: &[u8], step: &Step, is_first: bool, reached: &mut Reached) {
    let mut before = u64::from(is_first);
    for (kind, body) in wire::whole_messages(taken).0 {
        if ServerMessage::parse(kind, body).is_err() {
            continue;
        }
        let request = body.get(3).copied().unwrap_or_default();
        let now = match kind {
            b'R' => {
                reached.message(Says::Request, request);
                u64::from(kind) << 8 | u64::from(request)
            }
            kind => {
                reached.message(Says::Server, kind);
                u64::from(kind) << 8
            }
        };
        let end = match step {
            Step::More => 0,
            Step::In(_) => 1,
            Step::Failed(why) => 2 + u64::from(NotIn::from(why.clone()).passes()),
        };
        reached.feature(&[20, before, now, end]);
        before = now;
    }
}

fn judge_login(story: &LoginStory, all: &[u8], is_without_keys: bool) -> Result<(), String> {
    let messages = wire::whole_messages(all).0;
    let sent = wire::whole_messages(&story.sent).0;
    let first = format!("n,,n=,r={OUR_NONCE}");
    let length = (first.len() as u32).to_be_bytes();
    let first = [&text("SCRAM-SHA-256")[..], &length, first.as_bytes()].concat();
    let is_first = |body: &[u8]| body == first;
    let is_told_enough = match sent.as_slice() {
        [] => true,
        [(b'p', initial)] => is_first(initial),
        [(b'p', initial), (b'p', last)] => is_first(initial) && last.starts_with(b"c=biws,r="),
        _ => false,
    };
    if !is_told_enough || is_without_keys && !sent.is_empty() {
        return Err(format!("a server is told {:?}", story.sent.escape_ascii().to_string()));
    }
    let Some(Step::In(welcome)) = &story.end else { return Ok(()) };
    let requests = messages.iter().filter(|(kind, _)| *kind == b'R').map(|(_, body)| *body);
    let requests: Vec<&[u8]> = requests.collect();
    let is_proven = || {
        let [mechanisms, challenge, last, ok] = requests.first_chunk()?;
        let ([0, 0, 0, 11, challenge @ ..], [0, 0, 0, 12, last @ ..]) = (challenge, last) else {
            return None;
        };
        let challenge = std::str::from_utf8(challenge).ok()?;
        let nonce = challenge.split(',').next()?.strip_prefix("r=")?;
        let without_proof = format!("c={},r={nonce}", BASE64.encode("n,,"));
        let signature = server_signature(&format!("n=,r={OUR_NONCE}"), challenge, &without_proof);
        let is_right = *last == format!("v={signature}").into_bytes();
        Some(is_right && mechanisms[..4] == [0, 0, 0, 10] && *ok == [0; 4])
    };
    let is_right = match is_without_keys {
        true => requests.first() == Some(&&[0; 4][..]),
        false => is_proven() == Some(true),
    };
    let is_told_of =
        |name: &[u8]| messages.iter().any(|(kind, body)| *kind == b'S' && body.starts_with(name));
    if !is_right || !welcome.parameters.iter().all(|(name, _)| is_told_of(name)) {
        return Err(format!(
            "in at a server that has not proven itself: {:?}",
            all.escape_ascii().to_string()
        ));
    }
    Ok(())
}
