//! Both streams of a connection, cut anywhere: where messages begin and end, what they say, and which answers which.
//!
//! What must be true, with the same bytes read by hand and a server by the book beside it:
//!
//! - the same messages are found, with the same bodies, and the stream is refused at the same byte; types and limits are
//!   those of PostgreSQL's sources, written down a second time;
//! - a body that is read and written again is the same, and of what is announced in it nothing is missing;
//! - what is passed by unseen is passed on byte by byte;
//! - an answer is taken exactly if a server by the book could have given it, as long as anybody can know; and a connection is
//!   never taken for clean while such a server may still owe something;
//! - a length makes nobody hold what has not come.

use bytes::BytesMut;
use pgherd_pgwire::flow::{Answer, Flow, Origin, Request};
use pgherd_pgwire::frame::{Phase, Piece, Scanner, Side, Spill, TypeSet};
use pgherd_pgwire::message::build::{self, BindOut};
use pgherd_pgwire::message::client::{SaslInitial, password};
use pgherd_pgwire::message::server::Authentication;
use pgherd_pgwire::message::{ClientMessage, ServerMessage, TransactionStatus};

use super::Target;
use crate::input::{Input, Part};
use crate::random::Random;
use crate::reached::{Reached, Says};
use crate::wire::{self, message, text};

// The same server by the book that the flow's own tests have.
#[allow(dead_code, reason = "the flow's tests use all of it")]
#[path = "../../../crates/pgwire/src/flow/model.rs"]
mod model;
use model::Model;

pub const TARGET: Target = Target {
    name: "framing",
    planted: "a length is taken as it is",
    messages: &[
        (Says::Proof, b"irpg"),
        (Says::Client, b"BCDEFHPQSXcdf"),
        (Says::Server, b"123ACDEGHIKNSTVWZcdnstv"),
        (Says::Request, &[0, 2, 3, 5, 7, 8, 9, 10, 11, 12]),
    ],
    make,
    run,
};

const CLIENT: u8 = 0;
const SERVER: u8 = 1;
const MAX_STREAM_BYTES: usize = 24 << 10;
/// The book is slow, and what is wrong shows early.
const MAX_JUDGED: usize = 90;

/// Bits of the mode: what the two are busy with when it begins.
fn phases(mode: u8) -> (Phase, Phase) {
    match mode % 4 {
        0 => (Phase::Authentication, Phase::Authentication),
        1 => (Phase::Session, Phase::Starting),
        _ => (Phase::Session, Phase::Session),
    }
}

fn make(random: &mut Random) -> Input {
    let mode = random.byte();
    let mut parts = Vec::new();
    let mut say = |who: u8, bytes: Vec<u8>, random: &mut Random| {
        parts.extend(wire::cut(&bytes, random).into_iter().map(|bytes| Part::new(who, bytes)));
    };
    match phases(mode) {
        (Phase::Authentication, _) => {
            for _ in 0..1 + random.below(3) {
                say(CLIENT, proof(random), random);
                say(SERVER, request(random), random);
            }
            say(SERVER, [message(b'R', &[0; 4]), starting(random)].concat(), random);
        }
        (_, Phase::Starting) => say(SERVER, starting(random), random),
        _ => {
            for _ in 0..1 + random.below(4) {
                let (asked, answered) = exchange(random);
                say(CLIENT, asked, random);
                say(SERVER, answered, random);
            }
            if random.once_in(6) {
                say(CLIENT, message(b'X', b""), random);
            }
        }
    }
    Input { mode, parts }
}

fn proof(random: &mut Random) -> Vec<u8> {
    let initial = [&text("SCRAM-SHA-256")[..], &[0, 0, 0, 3], b"n,,"].concat();
    let kinds = [text("password"), initial, b"c=biws".to_vec(), b"\x01token\xff".to_vec()];
    message(b'p', &random.pick(&kinds))
}

fn request(random: &mut Random) -> Vec<u8> {
    let negotiated = [&[0, 3, 0, 0, 0, 0, 0, 1][..], &text("_pq_.x")].concat();
    if random.once_in(6) {
        return message(b'v', &negotiated);
    }
    let kind = random.pick(&[0, 2, 3, 5, 7, 8, 9, 10, 11, 12]);
    let more: &[u8] = match kind {
        5 => b"salt",
        8 | 11 | 12 => b"data",
        10 => b"SCRAM-SHA-256\0\0",
        _ => b"",
    };
    message(b'R', &[&[0, 0, 0, kind], more].concat())
}

fn starting(random: &mut Random) -> Vec<u8> {
    let key: Vec<u8> = vec![7; 4 + random.pick(&[4, 32])];
    let all = [
        wire::parameter_status("server_version", "15.14"),
        message(b'K', &key),
        wire::report(b'N', &[(b'S', "NOTICE"), (b'M', "hello")]),
    ];
    let mut bytes = Vec::new();
    for _ in 0..random.below(4) {
        bytes.extend(random.pick(&all));
    }
    bytes.extend(message(b'Z', b"I"));
    bytes
}

/// What a client asks, and what a server may answer.
fn exchange(random: &mut Random) -> (Vec<u8>, Vec<u8>) {
    let query = |sql: &str| message(b'Q', &text(sql));
    let parse = message(b'P', &[text("s"), text("SELECT $1"), vec![0, 1, 0, 0, 0, 23]].concat());
    let bind =
        message(b'B', &[text(""), text("s"), b"\0\x01\0\0\0\x01\0\0\0\x01x\0\x01\0\x01".to_vec()].concat());
    let describe = |what: u8| message(b'D', &[&[what][..], b"s\0"].concat());
    let execute = message(b'E', &[text(""), vec![0; 4]].concat());
    let sync = message(b'S', b"");
    let columns = message(b'T', b"\0\x01a\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0");
    let row = message(b'D', b"\0\x02\0\0\0\x011\xff\xff\xff\xff");
    let complete = message(b'C', &text("SELECT 1"));
    let ready = message(b'Z', &[random.pick(b"IITE")]);
    let error = wire::error("ERROR", "42P01");
    let copy = |kind: u8| message(kind, &[0, 0, 1, 0, 0]);
    let data = message(b'd', b"1\tx\n");
    let done = message(b'c', b"");
    let join = |parts: &[&Vec<u8>]| parts.iter().flat_map(|part| part.iter().copied()).collect::<Vec<u8>>();
    let simple = |kind: u8| message(kind, b"");
    match random.below(12) {
        0 => (query("SELECT 1"), join(&[&columns, &row, &row, &complete, &ready])),
        1 => (query(""), join(&[&simple(b'I'), &ready])),
        2 => (query("x"), join(&[&error, &ready])),
        3 => (
            join(&[&parse, &bind, &describe(b'P'), &execute, &sync]),
            join(&[&simple(b'1'), &simple(b'2'), &columns, &row, &complete, &ready]),
        ),
        4 => (
            join(&[&parse, &describe(b'S'), &message(b'H', b""), &message(b'C', b"Ss\0"), &sync]),
            join(&[&simple(b'1'), &message(b't', b"\0\x01\0\0\0\x17"), &simple(b'n'), &simple(b'3'), &ready]),
        ),
        5 => (join(&[&bind, &execute, &sync]), join(&[&simple(b'2'), &row, &simple(b's'), &ready])),
        6 => (
            join(&[&bind, &execute, &sync, &query("SELECT 2")]),
            join(&[&error, &ready, &columns, &complete, &ready]),
        ),
        7 => (
            join(&[&query("COPY t FROM STDIN"), &data, &data, &done]),
            join(&[&copy(b'G'), &complete, &ready]),
        ),
        8 => (
            join(&[&query("COPY t FROM STDIN"), &data, &message(b'f', &text("no"))]),
            join(&[&copy(b'G'), &error, &ready]),
        ),
        9 => (query("COPY t TO STDOUT"), join(&[&copy(b'H'), &data, &data, &done, &complete, &ready])),
        10 => (
            join(&[&query("START_REPLICATION 0/0"), &data, &done]),
            join(&[&copy(b'W'), &data, &done, &complete, &ready]),
        ),
        _ => (
            message(b'F', b"\0\0\0\x07\0\0\0\x01\0\0\0\x01x\0\0"),
            join(&[
                &message(b'V', b"\0\0\0\x01x"),
                &wire::parameter_status("TimeZone", "UTC"),
                &message(b'A', &[vec![0, 0, 0, 7], text("channel"), text("")].concat()),
                &wire::report(b'N', &[(b'S', "NOTICE"), (b'R', "x")]),
                &ready,
            ]),
        ),
    }
}

/// One direction, as the code under test sees it.
struct Stream {
    side: Side,
    scanner: Scanner,
    spill: Spill,
    /// Received and not taken.
    held: Vec<u8>,
    /// The message whose body is being gathered.
    inside: Option<u8>,
    messages: Vec<(u8, Vec<u8>)>,
    passed: Vec<u8>,
    is_wrong: bool,
    planted: bool,
    received_bytes: usize,
}

impl Stream {
    fn new(side: Side, phase: Phase, planted: bool) -> Stream {
        Stream {
            side,
            scanner: Scanner::new(side, phase),
            spill: Spill::new(1 << 30),
            held: Vec::new(),
            inside: None,
            messages: Vec::new(),
            passed: Vec::new(),
            is_wrong: false,
            planted,
            received_bytes: 0,
        }
    }

    /// `unseen`: types that are passed by. Those are no messages here.
    fn receive(&mut self, bytes: &[u8], unseen: &[u8]) -> Result<(), String> {
        let mut held = std::mem::take(&mut self.held);
        held.extend_from_slice(bytes);
        self.received_bytes += bytes.len();
        let mut view = held.as_slice();
        while !self.is_wrong {
            let at_header = self.inside.is_none() && self.scanner.body_left_bytes() == 0 && view.len() >= 5;
            let is_done = if self.planted && at_header && view[1] != 0 {
                // The planted bug: a length that is too long loses the bits that make it so.
                let shown = [&view[..1], &[0], &view[2..]].concat();
                let mut rest = shown.as_slice();
                let is_done = self.step(&mut rest, unseen)?;
                view = &view[shown.len() - rest.len()..];
                is_done
            } else {
                self.step(&mut view, unseen)?
            };
            if self.spill.capacity_bytes() > 64 + 4 * self.received_bytes {
                return Err(format!("{} bytes are held", self.spill.capacity_bytes()));
            }
            if is_done {
                break;
            }
        }
        self.held = view.to_vec();
        Ok(())
    }

    /// `true`: it needs more bytes.
    fn step(&mut self, view: &mut &[u8], unseen: &[u8]) -> Result<bool, String> {
        if let Some(kind) = self.inside {
            let Ok(whole) = self.scanner.whole(view, &mut self.spill) else {
                return Err("a body that fits was refused".to_owned());
            };
            let Some(body) = whole else { return Ok(true) };
            self.inside = None;
            self.passed.extend_from_slice(body);
            if self.side == Side::Server {
                self.scanner.enter(phase_after(self.scanner.phase(), kind, body));
            }
            self.messages.push((kind, body.to_vec()));
            return Ok(false);
        }
        if !unseen.is_empty() || self.scanner.body_left_bytes() > 0 {
            let stop = TypeSet::all_but(unseen);
            match self.scanner.run(view, stop) {
                Ok(run) => self.passed.extend_from_slice(run),
                Err(_) => {
                    self.is_wrong = true;
                    return Ok(true);
                }
            }
        }
        match self.scanner.next(view) {
            Ok(Some(Piece::Header(header))) => {
                self.passed.extend_from_slice(&header.to_bytes());
                self.inside = Some(header.kind);
                Ok(false)
            }
            Ok(Some(Piece::Body { .. })) => Err("run() left a part of a body".to_owned()),
            Ok(None) => Ok(true),
            Err(_) => {
                self.is_wrong = true;
                Ok(true)
            }
        }
    }
}

fn phase_after(phase: Phase, kind: u8, body: &[u8]) -> Phase {
    match (kind, phase) {
        (b'R', Phase::Authentication) if body == [0; 4] => Phase::Starting,
        (b'Z', Phase::Starting) => Phase::Session,
        _ => phase,
    }
}

fn run(input: &Input, planted: bool, reached: &mut Reached) -> Result<(), String> {
    let (client_phase, server_phase) = phases(input.mode);
    let mut client = Stream::new(Side::Client, client_phase, planted);
    let mut server = Stream::new(Side::Server, server_phase, planted);
    // One bit says whether data passes by unseen, as it does in a relay.
    let unseen: &[u8] = if input.mode & 0x80 != 0 { b"Dd" } else { b"" };
    let judges = client_phase == Phase::Session && server_phase == Phase::Session && unseen.is_empty();
    let mut judge = Judge::default();
    let (mut from_client, mut from_server) = (Vec::new(), Vec::new());
    'parts: for part in &input.parts {
        for _ in 0..part.times() {
            let (stream, all) = match part.who & 1 {
                CLIENT => (&mut client, &mut from_client),
                _ => (&mut server, &mut from_server),
            };
            if all.len() + part.bytes.len() > MAX_STREAM_BYTES {
                break 'parts;
            }
            all.extend_from_slice(&part.bytes);
            let known = stream.messages.len();
            let unseen = if stream.side == Side::Server { unseen } else { b"" };
            stream.receive(&part.bytes, unseen)?;
            let side = stream.side;
            for (kind, body) in &stream.messages[known..] {
                if judges {
                    judge.message(side, *kind, body, reached)?;
                }
            }
        }
    }
    for (stream, bytes, phase, unseen) in
        [(&client, &from_client, client_phase, &b""[..]), (&server, &from_server, server_phase, unseen)]
    {
        compare(stream, bytes, phase, unseen, reached)?;
    }
    Ok(())
}

fn compare(
    stream: &Stream,
    bytes: &[u8],
    phase: Phase,
    unseen: &[u8],
    reached: &mut Reached,
) -> Result<(), String> {
    let (expected, is_wrong) = frames_by_hand(stream.side, phase, bytes);
    let expected: Vec<_> = expected.into_iter().filter(|(kind, _)| !unseen.contains(kind)).collect();
    let found: Vec<(u8, &[u8])> =
        stream.messages.iter().map(|(kind, body)| (*kind, body.as_slice())).collect();
    if found != expected {
        return Err(format!("{found:?}, by hand {expected:?}"));
    }
    if stream.is_wrong != is_wrong {
        return Err(format!("wrong: {}, by hand {is_wrong}", stream.is_wrong));
    }
    if bytes.get(..stream.passed.len()) != Some(&stream.passed) {
        return Err("what is passed on is not what came".to_owned());
    }
    let (mut phase, mut before) = (phase, 0);
    for (kind, body) in found {
        let readable = match (stream.side, phase) {
            (Side::Client, Phase::Authentication) => proof_is_readable(body, reached),
            (Side::Client, _) => {
                let readable = read_back(kind, body)?;
                if readable {
                    reached.message(Says::Client, kind);
                }
                readable
            }
            (Side::Server, _) => is_readable(kind, body, reached)?,
        };
        phase = if stream.side == Side::Server { phase_after(phase, kind, body) } else { phase };
        reached.feature(&[stream.side as u64, phase as u64, u64::from(kind), before, u64::from(readable)]);
        before = u64::from(kind);
    }
    Ok(())
}

/// The four messages of type `p`: which of them a body can be.
fn proof_is_readable(body: &[u8], reached: &mut Reached) -> bool {
    let initial = SaslInitial::read(body).is_ok_and(|initial| initial.mechanism == b"SCRAM-SHA-256");
    let password = password(body).is_ok();
    reached.message(
        Says::Proof,
        match (initial, password) {
            (true, _) => b'i',
            (_, true) => b'p',
            _ if body.starts_with(b"c=") => b'r',
            _ => b'g',
        },
    );
    initial || password
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

/// Whole messages, and whether the bytes go wrong behind them.
fn frames_by_hand(side: Side, mut phase: Phase, mut bytes: &[u8]) -> (Vec<(u8, &[u8])>, bool) {
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
        if bytes.len() < end {
            return (messages, false);
        }
        let body = &bytes[5..end];
        messages.push((*kind, body));
        phase = if side == Side::Server { phase_after(phase, *kind, body) } else { phase };
        bytes = &bytes[end..];
    }
}

/// Whether a client's body is readable; what is read must be written as it was.
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
    if to[5..] == *body {
        Ok(true)
    } else {
        Err(format!("{:?} became {to:?}", body.escape_ascii().to_string()))
    }
}

/// Whether a server's body is readable; what is read must be as much as was announced, and lie inside.
fn is_readable(kind: u8, body: &[u8], reached: &mut Reached) -> Result<bool, String> {
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
        ServerMessage::NegotiateProtocolVersion(asked) => {
            8 + asked.unknown_options().map(|name| name.len() + 1).sum::<usize>() == body.len()
        }
        _ => true,
    };
    match kind {
        b'R' => reached.message(Says::Request, body[3]),
        kind => reached.message(Says::Server, kind),
    }
    if complete {
        Ok(true)
    } else {
        Err(format!("less was read of {:?} than announced", body.escape_ascii().to_string()))
    }
}

/// The flow, beside a server by the book.
struct Judge {
    flow: Flow,
    model: Model,
    judged: usize,
    /// A server or a client has left the protocol.
    is_over: bool,
    before: u64,
}

impl Default for Judge {
    fn default() -> Judge {
        let flow = Flow::new(TransactionStatus::Idle);
        Judge { flow, model: Model::new(), judged: 0, is_over: false, before: 0 }
    }
}

impl Judge {
    fn message(&mut self, side: Side, kind: u8, body: &[u8], reached: &mut Reached) -> Result<(), String> {
        self.judged += 1;
        if self.is_over || self.judged > MAX_JUDGED {
            return Ok(());
        }
        let outstanding = self.flow.outstanding().min(3) as u64;
        let bits = u64::from(self.flow.is_skipping()) | u64::from(self.flow.in_doubt()) << 1;
        let now = side as u64 + 2 * u64::from(kind);
        reached.feature(&[9, now, self.before, outstanding, bits]);
        self.before = now;
        if side == Side::Client {
            match Request::of(kind, body.first().copied()) {
                Ok(request) if self.flow.request(request, Origin::Client).is_ok() => self.model.send(request),
                _ => self.is_over = true,
            }
            return Ok(());
        }
        let Ok(answer) = Answer::of(kind, body) else {
            self.is_over = true;
            return Ok(());
        };
        let possible = self.model.says(answer);
        let accepted = self.flow.answer(answer);
        if !self.flow.in_doubt() && accepted.is_ok() != possible {
            return Err(format!("{accepted:?}, by the book {possible}"));
        }
        if self.flow.is_clean() && (!possible || self.model.may_be_busy()) {
            return Err("taken for clean too early".to_owned());
        }
        self.is_over = !possible || accepted.is_err();
        Ok(())
    }
}
