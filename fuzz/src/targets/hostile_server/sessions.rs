//! How clients fare whose servers say what they like, or what the book says: with a server of their own, or sharing two,
//! by transaction or by statement.
//!
//! Drives sessions as the relay and the sharing client do: what is received is shown, what is passed on goes to the other
//! side, and a server whose client's transaction is over goes to the next one. Leaves out settings and ties, which are
//! asked of real servers. Hazard: see [`super`].

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::BytesMut;
use pgherd_pgwire::message::ServerMessage;
use pgherd_proxy::session::{Loan, Mode, Pass, Passed, Session};
use pgherd_proxy::statements::{Known, Registry};

use super::MAX_SENT_BYTES;
use crate::book::{self, Book};
use crate::input::{Input, Part};
use crate::memory::live_bytes;
use crate::random::Random;
use crate::reached::{Reached, Says};
use crate::wire::{self, message, text};

/// What one call may take for a small chunk: buffers that grow by doubling.
const MAX_GROWN_BYTES: isize = 256 << 10;
/// What a session may hold that has nothing under way, besides what its client has prepared.
const MAX_HELD_BYTES: isize = 24 << 10;

pub(super) fn run(input: &Input, planted: bool, reached: &mut Reached) -> Result<(), String> {
    let sharing = match input.mode % 4 {
        2 => Some(Mode::Transaction),
        3 => Some(Mode::Statement),
        _ => None,
    };
    let is_shared = sharing.is_some();
    let story = Scene::new(sharing, planted).play(input, false, reached)?;
    if is_shared || input.distinct_bytes() > 600 || input.parts.iter().any(|part| part.times_log2 > 0) {
        return Ok(());
    }
    let again = Scene::new(sharing, planted).play(input, true, &mut Reached::nothing())?;
    let is_begun = |one: &[u8], other: &[u8]| other.starts_with(one);
    let is_same = match story.is_out || again.is_out {
        // What came in one piece with what is wrong is not passed on.
        true => {
            story.is_out == again.is_out
                && is_begun(&story.heard, &again.heard)
                && is_begun(&story.sent, &again.sent)
        }
        false => story == again,
    };
    if is_same { Ok(()) } else { Err(format!("{again:?} byte by byte, and else {story:?}")) }
}

/// What a part is about: the lowest bit is the client, the next two say what happens.
const ASKS: u8 = 0;
const HOSTILE: u8 = 1;
const ANSWERS: u8 = 2;
const OTHER: u8 = 3;

fn part(client: u8, what: u8, bytes: impl Into<Vec<u8>>) -> Part {
    Part::new(client & 1 | what << 1, bytes)
}

const TEXTS: &[&str] = &[
    "SELECT 1",
    "SELECT 2",
    "SELECT 3",
    "COPY IN",
    "COPY OUT",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "",
    "broken",
    "fails",
    "DEALLOCATE a",
    "DEALLOCATE ALL",
    "DISCARD ALL",
];

pub(super) fn make(mode: u8, random: &mut Random) -> Vec<Part> {
    let mut parts = Vec::new();
    let clients = if mode % 4 > 1 { 2 } else { 1 };
    for _ in 0..1 + random.below(7) {
        let client = random.below(clients) as u8;
        let asked = asks(random);
        parts.extend(wire::cut(&asked, random).into_iter().map(|bytes| part(client, ASKS, bytes)));
        match random.below(8) {
            0 => parts.push(part(client, HOSTILE, hostile(random))),
            1 => parts.push(part(client, OTHER, vec![random.byte()])),
            2 => {}
            _ => parts.push(part(client, ANSWERS, vec![random.byte()])),
        }
    }
    parts
}

fn asks(random: &mut Random) -> Vec<u8> {
    let name = |random: &mut Random| random.pick(&["a", "b", ""]);
    let mut bytes = Vec::new();
    if random.once_in(3) {
        return book::query(random.pick(TEXTS));
    }
    for _ in 0..1 + random.below(5) {
        bytes.extend(match random.below(12) {
            0..3 => book::parse(name(random), random.pick(TEXTS)),
            3..6 => book::bind(name(random)),
            6..8 => message(b'E', &[0, 0, 0, 0, random.pick(&[0, 0, 1])]),
            8 => message(b'D', &[&[random.pick(b"SP")][..], &text(name(random))].concat()),
            9 => message(b'C', &[&[random.pick(b"SSP")][..], &text(name(random))].concat()),
            10 => message(random.pick(b"dcfHX"), random.pick::<&[u8]>(&[b"", b"\0", b"data\0"])),
            _ => message(b'F', b"\0\0\0\x07\0\0\0\0\0\0"),
        });
    }
    if !random.once_in(4) {
        bytes.extend(message(b'S', b""));
    }
    bytes
}

/// Something that a server can say, whether it was asked or not.
fn hostile(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..1 + random.below(3) {
        let kind = random.pick(b"123ACDEGHINSTVWZZcdnst");
        bytes.extend(match kind {
            b'A' => message(kind, &[vec![0, 0, 0, 7], text("channel"), text("x")].concat()),
            b'C' => message(kind, &text("SELECT 666")),
            b'D' => message(kind, b"\0\x01\0\0\0\x04evil"),
            b'E' => wire::error(random.pick(&["ERROR", "FATAL"]), "XX000"),
            b'N' => wire::report(
                kind,
                &[(b'S', "WARNING"), (b'C', "01000"), (b'R', random.pick(&["x", "SyncRepWaitForLSN"]))],
            ),
            b'S' => wire::parameter_status(
                random.pick(&["TimeZone", "search_path", "x"]),
                random.pick(&["a", "b"]),
            ),
            b'T' => message(kind, b"\0\x01evil\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0"),
            b'V' => message(kind, b"\0\0\0\x04evil"),
            b'G' | b'H' | b'W' => message(kind, &[0, 0, 0]),
            b'Z' => message(kind, &[random.pick(b"IITE")]),
            b'd' => message(kind, b"evil"),
            b't' => message(kind, &[0, 0]),
            kind => message(kind, b""),
        });
    }
    bytes
}

/// What came of a client with a server of its own.
#[derive(Debug, PartialEq, Eq)]
struct Story {
    heard: Vec<u8>,
    sent: Vec<u8>,
    is_out: bool,
}

struct Client {
    session: Session,
    /// Which server it has.
    at: Option<usize>,
    /// Sent by it, and not taken.
    unread: Vec<u8>,
    /// Said by its server, and not taken.
    unheard: Vec<u8>,
    asked: Walk,
    sent: Walk,
    heard: Walk,
    /// Whole messages of its server since it has that, of those kinds that hold something.
    said: VecDeque<Vec<u8>>,
    saying: Vec<u8>,
    /// Of a COPY that failed nobody may know what the server read of it.
    may_be_in_doubt: bool,
    has_waited: bool,
    sharing: Option<Mode>,
    is_out: bool,
    all_heard: Vec<u8>,
    all_sent: Vec<u8>,
    all_asked: Vec<u8>,
}

/// Counts the messages of a stream by their types, as soon as their headers are there.
struct Walk {
    counts: [u32; 128],
    unread: Vec<u8>,
}

impl Walk {
    fn new() -> Walk {
        Walk { counts: [0; 128], unread: Vec::new() }
    }

    /// Calls `each` for every message that ends here.
    fn walk(&mut self, bytes: &[u8], mut each: impl FnMut(u8, &[u8])) {
        let counts = &mut self.counts;
        let mut walk = |bytes: &[u8]| {
            let (messages, rest) = wire::whole_messages(bytes);
            for (kind, body) in messages {
                counts[usize::from(kind & 0x7f)] += 1;
                each(kind, body);
            }
            rest.len()
        };
        if self.unread.is_empty() {
            let left = walk(bytes);
            self.unread.extend_from_slice(&bytes[bytes.len() - left..]);
        } else {
            self.unread.extend_from_slice(bytes);
            let left = walk(&self.unread);
            self.unread.drain(..self.unread.len() - left);
        }
    }

    fn count(&self, kinds: &[u8]) -> u32 {
        let begun = self.unread.len() >= 5 && kinds.contains(&self.unread[0]);
        kinds.iter().map(|kind| self.counts[usize::from(*kind)]).sum::<u32>() + u32::from(begun)
    }
}

struct Backend {
    book: Book,
    known: Option<Known>,
    /// Nobody but the book has spoken since it was opened.
    is_honest: bool,
}

struct Scene {
    /// `None`: there is one client, with a server of its own.
    sharing: Option<Mode>,
    planted: bool,
    registry: Arc<Registry>,
    clients: [Client; 2],
    servers: [Backend; 2],
    /// Servers that were opened.
    opened: u8,
    distinct_bytes: usize,
    before: u64,
}

impl Client {
    fn new(sharing: Option<Mode>, registry: &Arc<Registry>) -> Client {
        let session = match sharing {
            Some(mode) => Session::sharing(mode, Arc::clone(registry)),
            None => Session::new(),
        };
        Client {
            session,
            at: None,
            unread: Vec::new(),
            unheard: Vec::new(),
            asked: Walk::new(),
            sent: Walk::new(),
            heard: Walk::new(),
            said: VecDeque::new(),
            saying: Vec::new(),
            may_be_in_doubt: false,
            has_waited: false,
            sharing,
            is_out: false,
            all_heard: Vec::new(),
            all_sent: Vec::new(),
            all_asked: Vec::new(),
        }
    }
}

impl Scene {
    fn new(sharing: Option<Mode>, planted: bool) -> Scene {
        let registry = Arc::<Registry>::default();
        let clients = [(); 2].map(|()| Client::new(sharing, &registry));
        let mut opened = b'A';
        let servers = [(); 2].map(|()| {
            opened += 1;
            Backend { book: Book::new(opened), known: Some(Known::new(2)), is_honest: true }
        });
        Scene { sharing, planted, registry, clients, servers, opened, distinct_bytes: 0, before: 0 }
    }

    fn play(mut self, input: &Input, byte_by_byte: bool, reached: &mut Reached) -> Result<Story, String> {
        self.distinct_bytes = input.distinct_bytes();
        if self.sharing.is_none() {
            self.clients[0].at = Some(0);
        }
        let mut sent = 0;
        'parts: for part in &input.parts {
            let who = if self.sharing.is_some() { usize::from(part.who & 1) } else { 0 };
            let what = part.who >> 1 & 3;
            for _ in 0..if what == ASKS || what == HOSTILE { part.times() } else { 1 } {
                sent += part.bytes.len();
                if sent > MAX_SENT_BYTES {
                    break 'parts;
                }
                let pieces = || part.bytes.chunks(if byte_by_byte { 1 } else { usize::MAX });
                match what {
                    ASKS => {
                        for piece in pieces() {
                            self.clients[who].unread.extend_from_slice(piece);
                            self.pump(who, reached)?;
                        }
                    }
                    HOSTILE => {
                        for piece in pieces() {
                            self.says(who, piece, false, reached)?;
                        }
                    }
                    ANSWERS => {
                        let Some(at) = self.clients[who].at else { continue };
                        let answers = self.servers[at].book.take_answers();
                        let size = if byte_by_byte { 1 } else { answers.len().max(1) };
                        for piece in answers.chunks(size) {
                            self.says(who, piece, true, reached)?;
                        }
                        self.pump(1 - who, reached)?;
                    }
                    _ => {
                        if self.sharing.is_some() {
                            self.leaves(who)?;
                            self.pump(1 - who, reached)?;
                        }
                    }
                }
            }
        }
        self.end()
    }

    /// As a relay does it, until nothing moves any more.
    fn pump(&mut self, who: usize, reached: &mut Reached) -> Result<(), String> {
        for _ in 0..2_000 {
            if !self.settle(who)? || !self.asks(who, reached)? {
                return Ok(());
            }
        }
        Err("it goes on without end".to_owned())
    }

    /// What the client has sent is looked at. `false`: nothing came of it.
    fn asks(&mut self, who: usize, reached: &mut Reached) -> Result<bool, String> {
        let least = if self.sharing.is_some() { 5 } else { 1 };
        let client = &mut self.clients[who];
        if client.is_out || client.unread.len() < least && client.at.is_none() || client.unread.is_empty() {
            return Ok(false);
        }
        if client.at.is_none() {
            if client.unread[0] == b'X' {
                client.is_out = true;
                return Ok(false);
            }
            let mut answers = BytesMut::new();
            if let Some(taken) = client.session.answer_without_server(&client.unread, &mut answers) {
                let taken: Vec<u8> = client.unread.drain(..taken).collect();
                client.asked.walk(&taken, |_, _| {});
                client.hears(&answers, true)?;
                return Ok(true);
            }
            let Some(at) = (0..2).find(|at| self.servers[*at].known.is_some()) else { return Ok(false) };
            let known = self.servers[at].known.take().ok_or("it is lent")?;
            client.session.attach(Loan::new(known, 0));
            client.at = Some(at);
            client.said.clear();
            client.saying.clear();
        }
        let client = &mut self.clients[who];
        let Some(at) = client.at else { return Ok(false) };
        if !client.session.has_room() || client.session.has_left() {
            client.has_waited |= !client.session.has_room();
            return Ok(false);
        }
        let (mut edited, mut answers, live) = (BytesMut::new(), BytesMut::new(), live_bytes());
        let passed = client.session.from_client(&client.unread, &mut edited, &mut answers);
        let grown = live_bytes() - live;
        if grown > MAX_GROWN_BYTES + 32 * client.unread.len() as isize {
            return Err(format!("{grown} bytes more are held for {}", client.unread.len()));
        }
        let (bytes, taken) = match passed {
            Ok(Passed { pass: Pass::AsItCame(bytes), taken_bytes }) => (bytes.to_vec(), taken_bytes),
            Ok(Passed { pass: Pass::Edited, taken_bytes }) => (edited.to_vec(), taken_bytes),
            Err(_) => {
                client.is_out = true;
                self.closes(at);
                return Ok(false);
            }
        };
        let taken: Vec<u8> = client.unread.drain(..taken).collect();
        let (before, has_waited) = (&mut self.before, u64::from(client.has_waited));
        client.asked.walk(&taken, |kind, _| {
            reached.feature(&[30, u64::from(kind), *before, has_waited]);
            *before = u64::from(kind);
        });
        client.all_asked.extend_from_slice(&taken);
        client.all_sent.extend_from_slice(&bytes);
        client.hears(&answers, true)?;
        client.sent.walk(&bytes, |_, _| {});
        if client.sent.count(b"X") > 0 {
            return Err("a farewell reached the server".to_owned());
        }
        self.servers[at].book.reads(&bytes);
        Ok(!taken.is_empty())
    }

    /// Its server says something; without one, whatever server is idle does.
    fn says(&mut self, who: usize, bytes: &[u8], is_book: bool, reached: &mut Reached) -> Result<(), String> {
        let Some(at) = self.clients[who].at else {
            // Whoever speaks while nobody has it is closed.
            if let Some(idle) = (0..2).find(|at| self.servers[*at].known.is_some()) {
                self.closes(idle);
            }
            return Ok(());
        };
        self.servers[at].is_honest &= is_book;
        let client = &mut self.clients[who];
        if client.is_out {
            return Ok(());
        }
        client.unheard.extend_from_slice(bytes);
        client.saying.extend_from_slice(bytes);
        let (messages, rest) = wire::whole_messages(&client.saying);
        for (kind, body) in messages {
            let holds_something =
                matches!(kind, b'D' | b'T' | b'C' | b'd' | b'E' | b'N' | b'A' | b'S' | b'V');
            if holds_something {
                client.said.push_back(message(kind, body));
            }
            client.may_be_in_doubt |= matches!(kind, b'G' | b'W');
        }
        client.saying = rest.to_vec();
        let (mut edited, live) = (BytesMut::new(), live_bytes());
        let passed = client.session.from_server(&client.unheard, &mut edited);
        let grown = live_bytes() - live;
        if grown > MAX_GROWN_BYTES + 32 * client.unheard.len() as isize {
            return Err(format!("{grown} bytes more are held for {}", client.unheard.len()));
        }
        let (heard, taken) = match passed {
            Ok(Passed { pass: Pass::AsItCame(bytes), taken_bytes }) => (bytes.to_vec(), taken_bytes),
            Ok(Passed { pass: Pass::Edited, taken_bytes }) => (edited.to_vec(), taken_bytes),
            Err(_) => {
                client.is_out = true;
                self.closes(at);
                return Ok(());
            }
        };
        for (kind, body) in wire::whole_messages(&client.unheard[..taken]).0 {
            if ServerMessage::parse(kind, body).is_ok() {
                reached.message(Says::Server, kind);
            }
            let bits = u64::from(client.session.is_idle())
                | u64::from(is_book) << 1
                | u64::from(self.sharing.is_some()) << 2;
            reached.feature(&[31, u64::from(kind), self.before, bits]);
            self.before = u64::from(kind) << 8;
        }
        client.unheard.drain(..taken);
        client.hears(&heard, false)?;
        self.pump(who, reached)
    }

    /// A transaction is over: the server is the next one's. `false`: the client is out.
    fn settle(&mut self, who: usize) -> Result<bool, String> {
        let client = &mut self.clients[who];
        let (Some(at), true) = (client.at, self.sharing.is_some()) else { return Ok(!client.is_out) };
        let is_ready = client.all_heard.ends_with(b"Z\0\0\0\x05I");
        if client.is_out || !(client.session.is_over() || self.planted && is_ready) {
            return Ok(!client.is_out);
        }
        if !client.unheard.is_empty() {
            return Err("a server is given away in the middle of what it says".to_owned());
        }
        let server = &mut self.servers[at];
        if server.is_honest && !server.book.owes_nothing() {
            return Err(format!("a server is given away that owes something: {:?}", server.book));
        }
        client.session.take_effects();
        server.known = client.session.detach().map(|loan| loan.known);
        client.at = None;
        Ok(true)
    }

    /// The connection to a server is closed, and another one opened.
    fn closes(&mut self, at: usize) {
        self.opened = self.opened.wrapping_add(1);
        self.servers[at] =
            Backend { book: Book::new(self.opened), known: Some(Known::new(2)), is_honest: true };
        for client in self.clients.iter_mut().filter(|client| client.at == Some(at)) {
            client.at = None;
            // The client is told so, and closed.
            client.is_out = true;
        }
    }

    /// A client is gone, and another one comes.
    fn leaves(&mut self, who: usize) -> Result<(), String> {
        let client = &self.clients[who];
        if let Some(at) = client.at {
            let server = &self.servers[at];
            if client.session.is_clean() && server.is_honest && !server.book.owes_nothing() {
                return Err(format!("a server is cleaned that owes something: {:?}", server.book));
            }
            self.closes(at);
        }
        self.clients[who] = Client::new(self.sharing, &self.registry);
        Ok(())
    }

    fn end(self) -> Result<Story, String> {
        let limit = MAX_HELD_BYTES + 16 * self.distinct_bytes as isize;
        let mut story = None;
        for client in self.clients {
            let Client { mut session, all_heard, all_sent, all_asked, is_out, .. } = client;
            if self.sharing.is_none() && !is_out && !all_asked.starts_with(&all_sent) {
                return Err("a server of its own is sent something else".to_owned());
            }
            // What follows an error up to the next Sync is remembered until then.
            let mut edited = [BytesMut::new(), BytesMut::new(), BytesMut::new()];
            let [to_server, answers, to_client] = &mut edited;
            let (sync, ready) = (message(b'S', b""), message(b'Z', b"I"));
            // Neither is part of a message that came before.
            let is_whole = |passed: &Passed<'_>, bytes: &[u8]| passed.pass == Pass::AsItCame(bytes);
            let is_idle = session.is_idle()
                && !is_out
                && client.at.is_some()
                && session
                    .from_client(&sync, to_server, answers)
                    .is_ok_and(|passed| is_whole(&passed, &sync))
                && session.from_server(&ready, to_client).is_ok_and(|passed| is_whole(&passed, &ready))
                // What a server had begun to say may be so long that this was the middle of it.
                && session.is_idle();
            let before = live_bytes();
            drop(session);
            let held = before - live_bytes();
            if is_idle && held > limit {
                return Err(format!("{held} bytes are held, and nothing is under way"));
            }
            story.get_or_insert(Story { heard: all_heard, sent: all_sent, is_out });
        }
        story.ok_or_else(|| "nobody was there".to_owned())
    }
}

impl Client {
    /// `is_own`: the proxy's own answer, while the server has not said anything.
    fn hears(&mut self, bytes: &[u8], is_own: bool) -> Result<(), String> {
        self.all_heard.extend_from_slice(bytes);
        let (said, mut wrong, mut is_open) = (&mut self.said, None, false);
        self.heard.walk(bytes, |kind, body| {
            is_open |= kind == b'Z' && body != b"I";
            if !belongs(said, kind, body, is_own) {
                wrong.get_or_insert_with(|| message(kind, body));
            }
        });
        if let Some(wrong) = wrong {
            return Err(format!(
                "it hears what its server has not said: {:?}",
                wrong.escape_ascii().to_string()
            ));
        }
        if self.may_be_in_doubt {
            return Ok(());
        }
        if is_open && self.sharing == Some(Mode::Statement) {
            return Err("a transaction is open behind one statement".to_owned());
        }
        let limits: [(&[u8], &[u8]); 7] = [
            (b"Z", b"QSF"),
            (b"1", b"P"),
            (b"2", b"B"),
            (b"3", b"C"),
            (b"t", b"D"),
            (b"V", b"F"),
            (b"s", b"E"),
        ];
        for (answers, questions) in limits {
            let (heard, asked) = (self.heard.count(answers), self.asked.count(questions));
            if heard > asked {
                let kind = answers.escape_ascii();
                return Err(format!("{heard} answers of type {kind} to {asked} questions"));
            }
        }
        Ok(())
    }
}

/// Whether the server has said it, behind what was heard before; or the proxy says so by itself.
fn belongs(said: &mut VecDeque<Vec<u8>>, kind: u8, body: &[u8], is_own: bool) -> bool {
    if !holds_something(kind) {
        return true;
    }
    let own_tags: [&[u8]; 4] = [b"DEALLOCATE\0", b"BEGIN\0", b"COMMIT\0", b"ROLLBACK\0"];
    if kind == b'C' && own_tags.contains(&body) || kind == b'E' && wire::field(body, b'C') == Some(b"08007") {
        return true;
    }
    let is_it = |said: &Vec<u8>| said[0] == kind && said[5..] == *body;
    let at = said.iter().position(is_it).filter(|_| !is_own);
    at.map(|at| said.drain(..=at)).is_some()
}

/// Messages of a server that can be told from others of their type.
fn holds_something(kind: u8) -> bool {
    matches!(kind, b'D' | b'T' | b'C' | b'd' | b'E' | b'N' | b'A' | b'S' | b'V')
}
