//! A real server and this crate agree: on where messages end, what they say, and what is owed.
//!
//! Every byte in either direction goes through a scanner, every message through its view and through the
//! flow, so a disagreement about any of them fails. Leaves out TLS. Answers are compared by
//! their types.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::flow::{Answer, Event, Flow, Origin, Request};
use pgherd_pgwire::frame::{Phase, Piece, Scanner, Side, Spill, TypeSet};
use pgherd_pgwire::message::build::{self, BindOut};
use pgherd_pgwire::message::server::Authentication;
use pgherd_pgwire::message::{ClientMessage, Key, ServerMessage, Target, TransactionStatus};
use pgherd_pgwire::scram::{self, Binding, ScramError, Verifier};
use pgherd_pgwire::startup::{self, Version};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

use crate::server::{Server, as_user};

/// A client that believes nothing before the crate has agreed.
struct Client {
    stream: TcpStream,
    sent: Scanner,
    received: Scanner,
    unread: Vec<u8>,
    flow: Flow,
    pid: u32,
    key: Vec<u8>,
    /// The body of the last message that was no ParameterStatus.
    body: Vec<u8>,
    last: Option<Event>,
}

/// A socket on which nothing can hang for ever.
fn dial(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

impl Client {
    fn connect(server: &Server, more: &[(&[u8], &[u8])]) -> Client {
        Client::open(dial(server), Version::V3_0, more).0
    }

    /// Sends the startup message.
    fn begin(mut stream: TcpStream, version: Version, parameters: &[(&[u8], &[u8])]) -> Client {
        let mut to = BytesMut::new();
        build::startup_message(&mut to, version, parameters).unwrap();
        stream.write_all(&to).unwrap();
        Client {
            stream,
            sent: Scanner::new(Side::Client, Phase::Session),
            received: Scanner::new(Side::Server, Phase::Authentication),
            unread: Vec::new(),
            flow: Flow::new(TransactionStatus::Idle),
            pid: 0,
            key: Vec::new(),
            body: Vec::new(),
            last: None,
        }
    }

    /// Starts a session; also the types of all messages up to ReadyForQuery, without the ParameterStatus.
    fn open(stream: TcpStream, version: Version, more: &[(&[u8], &[u8])]) -> (Client, String) {
        let parameters = [&[(&b"user"[..], &b"postgres"[..])], more].concat();
        let mut client = Client::begin(stream, version, &parameters);
        let types = client.reach_ready();
        (client, types)
    }

    fn reach_ready(&mut self) -> String {
        let client = self;
        let mut types = String::new();
        while !types.ends_with('Z') {
            let (kind, body) = client.message().expect("the server answers a startup message");
            match ServerMessage::parse(kind, &body).unwrap() {
                ServerMessage::Authentication(Authentication::Ok) => client.received.enter(Phase::Starting),
                ServerMessage::ParameterStatus { .. } => continue,
                ServerMessage::BackendKeyData { pid, key } => {
                    (client.pid, client.key) = (pid, key.as_bytes().to_vec());
                }
                ServerMessage::ReadyForQuery(status) => {
                    assert_eq!(status, TransactionStatus::Idle);
                    client.received.enter(Phase::Session);
                }
                ServerMessage::NegotiateProtocolVersion(_) => client.body.clone_from(&body),
                other => panic!("{other:?} while starting"),
            }
            types.push(char::from(kind));
        }
        types
    }

    /// Logs in with what a client has proven elsewhere.
    fn prove(&mut self, keys: scram::ClientKeys) -> Result<(), ScramError> {
        let (mut exchange, first) = scram::Client::start(keys, Binding::Impossible, "nonce-of-the-test");
        let mut to = BytesMut::new();
        loop {
            let (kind, body) = self.message().expect("the server asks for a proof");
            let message = ServerMessage::parse(kind, &body).unwrap();
            let ServerMessage::Authentication(asked) = message else { panic!("{message:?}") };
            to.clear();
            match asked {
                Authentication::Sasl(mechanisms) => {
                    assert!(mechanisms.iter().any(|name| name == scram::SCRAM_SHA_256.as_bytes()));
                    let first = Some(first.as_bytes());
                    build::sasl_initial_response(&mut to, scram::SCRAM_SHA_256, first).unwrap();
                }
                Authentication::SaslContinue(data) => {
                    build::sasl_response(&mut to, exchange.prove(data)?.as_bytes()).unwrap();
                }
                Authentication::SaslFinal(data) => return exchange.finish(data),
                other => panic!("{other:?}"),
            }
            self.stream.write_all(&to).unwrap();
        }
    }

    fn send(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let mut to = BytesMut::new();
        write(&mut to);
        let (mut input, mut spill) = (&to[..], Spill::new(1 << 20));
        while let Some(piece) = self.sent.next(&mut input).expect("a client's message is well framed") {
            let Piece::Header(header) = piece else { panic!("a body was left") };
            let body = self.sent.whole(&mut input, &mut spill).unwrap().expect("what is built is whole");
            ClientMessage::parse(header.kind, body).expect("what is built can be read");
            let request = Request::of(header.kind, body.first().copied()).unwrap();
            self.flow.request(request, Origin::Client).unwrap();
        }
        self.stream.write_all(&to).unwrap();
    }

    /// The next message; `None` at the end of the stream.
    fn message(&mut self) -> Option<(u8, Vec<u8>)> {
        let (mut kind, mut spill) = (None, Spill::new(1 << 20));
        loop {
            let mut input = self.unread.as_slice();
            if kind.is_none()
                && let Some(Piece::Header(header)) = self.received.next(&mut input).expect("well framed")
            {
                kind = Some(header.kind);
            }
            if let Some(kind) = kind
                && let Some(body) = self.received.whole(&mut input, &mut spill).unwrap()
            {
                let body = body.to_vec();
                self.unread = input.to_vec();
                return Some((kind, body));
            }
            self.unread = input.to_vec();
            if !self.read_more() {
                assert!(kind.is_none() && self.unread.is_empty(), "the stream ends between two messages");
                return None;
            }
        }
    }

    /// Passes on all messages of one type unseen, as a proxy does with rows; whether there were any.
    fn pass(&mut self, kind: u8) -> bool {
        let mut any = false;
        loop {
            let mut input = self.unread.as_slice();
            any |= !self.received.run(&mut input, TypeSet::all_but(&[kind])).expect("well framed").is_empty();
            self.unread = input.to_vec();
            if self.unread.first().is_some_and(|next| *next != kind) {
                return any;
            }
            assert!(self.read_more(), "the server goes on");
        }
    }

    /// Whether there was more.
    fn read_more(&mut self) -> bool {
        let mut chunk = [0; 8_192];
        let count = self.stream.read(&mut chunk).expect("the server answers in time");
        self.unread.extend_from_slice(&chunk[..count]);
        count > 0
    }

    /// Reads up to a message of one of these types, and returns all types: repeated ones once, and no
    /// ParameterStatus.
    fn until(&mut self, stop: &[u8]) -> String {
        let mut types = String::new();
        loop {
            if let Some(kind) = self.flow.repeatable()
                && !stop.contains(&kind)
                && self.pass(kind)
                && !types.ends_with(char::from(kind))
            {
                types.push(char::from(kind));
            }
            let (kind, body) = self.message().expect("the server goes on");
            ServerMessage::parse(kind, &body).expect("what a server sends can be read");
            let answer = Answer::of(kind, &body).unwrap();
            self.last = Some(self.flow.answer(answer).unwrap_or_else(|breach| panic!("{types}: {breach}")));
            if kind == b'S' {
                continue;
            }
            if !types.ends_with(char::from(kind)) || !matches!(kind, b'D' | b'd') {
                types.push(char::from(kind));
            }
            self.body = body;
            if stop.contains(&kind) {
                return types;
            }
        }
    }

    /// The first bytes of the server's next message, which stay to be read.
    fn peek(&mut self) -> [u8; 9] {
        let mut first = [0; 9];
        self.stream.read_exact(&mut first).expect("the server answers in time");
        self.unread.extend_from_slice(&first);
        first
    }

    fn query(&mut self, text: &str) -> String {
        self.send(|to| build::query(to, text.as_bytes()).unwrap());
        self.until(b"Z")
    }

    /// The only value of a query's only row.
    fn value(&mut self, text: &str) -> String {
        self.send(|to| build::query(to, text.as_bytes()).unwrap());
        assert_eq!(self.until(b"D"), "TD");
        let value = match ServerMessage::parse(b'D', &self.body) {
            Ok(ServerMessage::DataRow(row)) => row.iter().next().unwrap().unwrap().to_vec(),
            other => panic!("{other:?}"),
        };
        assert_eq!(self.until(b"Z"), "CZ");
        String::from_utf8(value).unwrap()
    }

    fn sqlstate(&self) -> Option<SqlState> {
        match ServerMessage::parse(b'E', &self.body) {
            Ok(ServerMessage::ErrorResponse(fields)) => fields.sqlstate(),
            _ => None,
        }
    }
}

/// Parse, Bind and Execute of one statement.
fn run(to: &mut BytesMut, text: &str) {
    build::parse(to, b"", text.as_bytes(), &[]).unwrap();
    build::bind(to, &BindOut::default()).unwrap();
    build::execute(to, b"", 0).unwrap();
}

fn rows(to: &mut BytesMut, text: &str) {
    build::copy_data(to, text.as_bytes()).unwrap();
}

#[test]
fn a_real_server_and_the_crate_agree() {
    as_user(concat!("real::", "a_real_server_and_the_crate_agree"), &[], || {
        let began = Instant::now();
        let server = Server::start();
        starting(&server);
        startup_packets(&server);
        types_and_limits(&server);
        simple_queries(&server);
        pipelines(&server);
        copies(&server);
        failing_copies(&server);
        out_of_turn(&server);
        cancelling(&server);
        replicating(&server);
        proving(&server);
        drop(server);
        eprintln!("agreed in {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(60), "a small test became a long one");
    });
}

/// Manual 55.2.1 and 55.2.10.
fn starting(server: &Server) {
    let mut stream = dial(server);
    let mut to = BytesMut::new();
    build::ssl_request(&mut to);
    stream.write_all(&to).unwrap();
    let mut answer = [0; 100];
    let count = stream.read(&mut answer).unwrap();
    assert_eq!(startup::encryption_answer(&answer[..count], b'S'), Ok(Some(startup::Answer::Refused)));
    let (mut client, types) = Client::open(stream, Version(3 << 16 | 99), &[(b"_pq_.unheard_of", b"1")]);
    assert_eq!(types, "vRKZ");
    let Ok(ServerMessage::NegotiateProtocolVersion(spoken)) = ServerMessage::parse(b'v', &client.body) else {
        panic!("{:?}", client.body);
    };
    assert!([Version::V3_0, Version::V3_2].contains(&spoken.version), "a whole number: {:?}", spoken.version);
    assert_eq!(spoken.unknown_options().collect::<Vec<_>>(), [b"_pq_.unheard_of"]);
    assert!((4..=256).contains(&client.key.len()));
    assert_eq!(client.query("SELECT 1"), "TDCZ");
    client.send(build::terminate);
    assert_eq!(client.message(), None);

    // The server's reading of the options is that of `startup::options`.
    let options = br"-c application_name=a\ b\\c --extra-float-digits=2";
    let mut client = Client::connect(server, &[(b"options", options)]);
    client.send(|to| build::query(to, b"SHOW application_name").unwrap());
    assert_eq!(client.until(b"D"), "TD");
    let switches: Vec<_> = startup::options::switches(options).collect();
    let startup::options::Switch::Setting { value, .. } = &switches[0] else { panic!("{switches:?}") };
    assert!(client.body.ends_with(value), "{:?} ends with {value:?}", client.body);
    assert_eq!((client.until(b"Z"), switches.len()), ("CZ".to_owned(), 2));
}

/// Startup packets that are let in here are let in there, and no others.
fn startup_packets(server: &Server) {
    let named = |length: usize| {
        let name = vec![b'x'; length];
        [b"\0\x03\0\0user\0postgres\0application_name\0", name.as_slice(), b"\0\0"].concat()
    };
    let (longest, too_long) = (named(9_963), named(9_964));
    let mut packets: Vec<Vec<u8>> = [
        &b"\0\x03\0\0user\0postgres\0\0"[..],
        b"\0\x03\0\x63user\0postgres\0\0",
        b"\0\x03\0\0user\0postgres\0_pq_.x\0\0\0",
        b"\0\x03\0\0user\0nobody\0user\0postgres\0\0",
        b"\0\x03\0\0user\0postgres\0database\0\0\0",
        b"\0\x03\0\0user\0postgres\0",
        b"\0\x03\0\0user\0postgres",
        b"\0\x03\0\0user\0postgres\0\0\0",
        b"\0\x03\0\0user\0postgres\0\0x",
        b"\0\x03\0\0user\0postgres\0b\0\0",
        b"\0\x03\0\0user\0\0\0",
        b"\0\x03\0\0\0",
        b"\0\x03\0\0",
        b"\0\x02\0\0user\0postgres\0\0",
        b"\0\x04\0\0user\0postgres\0\0",
        &longest,
        &too_long,
    ]
    .map(<[u8]>::to_vec)
    .to_vec();
    let values = ["on", "of", "o", "1", "2", "TRUE", "tru", "truer", "Yes", "f", "database", "DATABASE", ""];
    packets.extend(
        values.map(|value| format!("\0\x03\0\0user\0postgres\0replication\0{value}\0\0").into_bytes()),
    );
    assert_eq!(longest.len(), startup::MAX_PACKET_BYTES);
    for body in packets {
        let packet = [&(body.len() as u32 + 4).to_be_bytes()[..], &body].concat();
        let read = startup::Opening::new().read(&mut packet.as_slice());
        let ours = matches!(read, Ok(Some(startup::Request::Startup(_))));
        let mut stream = dial(server);
        stream.write_all(&packet).unwrap();
        let mut first = [0];
        // One that is longer than it may be is not read, which may reset the connection.
        let theirs = stream.read(&mut first).is_ok_and(|count| count == 1 && matches!(first[0], b'R' | b'v'));
        assert_eq!(ours, theirs, "{}: {read:?}", packet.escape_ascii());
    }
}

/// What the scanner refuses of a client, the server refuses, and nothing else.
fn types_and_limits(server: &Server) {
    let refuses = |bytes: &[u8]| Scanner::new(Side::Client, Phase::Session).next(&mut &bytes[..]).is_err();
    for kind in 0..=u8::MAX {
        let mut client = Client::connect(server, &[]);
        client.stream.write_all(&[kind, 0, 0, 0, 3]).unwrap();
        // A type that it knows, with a length that it does not like, ends the connection without a word.
        let answer = client.message().map(|(answer, body)| {
            client.body = body;
            answer
        });
        assert_eq!(answer, refuses(&[kind]).then_some(b'E'), "type {kind:#04x}");
        let refused = answer.map(|_| SqlState::PROTOCOL_VIOLATION);
        assert_eq!(refused, client.sqlstate(), "type {kind:#04x}");
    }
    for (kind, greatest) in [(b'C', 10_000), (b'D', 10_000), (b'E', 10_000), (b'Q', 0x3fff_fffe_u32)] {
        let header = |length: u32| [&[kind][..], &length.to_be_bytes()].concat();
        assert!(!refuses(&header(greatest)) && refuses(&header(greatest + 1)));
        let mut client = Client::connect(server, &[]);
        client.stream.write_all(&header(greatest + 1)).unwrap();
        assert_eq!(client.message(), None, "one more than {greatest} for type {kind:#04x}");
        // A gigabyte is not asked for: the server would allocate it at once.
        if greatest < 1 << 20 {
            let mut client = Client::connect(server, &[]);
            let mut message = header(greatest);
            message.resize(1 + greatest as usize, 0);
            client.stream.write_all(&message).unwrap();
            let answer = client.message().map(|(answer, _)| answer);
            assert_eq!(
                answer,
                Some(b'E'),
                "{greatest} for type {kind:#04x} is read, and then not understood"
            );
            client.stream.write_all(b"S\0\0\0\x04").unwrap();
            assert_eq!(client.message(), Some((b'Z', b"I".to_vec())), "the session goes on");
        }
    }
}

/// Manual 55.2.2 and 55.2.5.
fn simple_queries(server: &Server) {
    let mut client = Client::connect(server, &[]);
    assert_eq!(client.query(""), "IZ");
    assert_eq!(client.query("SELECT 1; SELECT 2"), "TDCTDCZ");
    assert_eq!(client.query("SELECT 1; SELECT 1/0; SELECT 2"), "TDCEZ");
    assert_eq!(client.query("SELECT repeat('x', 100000) FROM generate_series(1, 30)"), "TDCZ");
    assert!(client.flow.is_clean());
    assert_eq!(client.query("BEGIN"), "CZ");
    assert!(!client.flow.is_clean());
    assert_eq!(client.query("SELECT 1/0"), "EZ");
    assert_eq!(client.flow.status(), TransactionStatus::Failed);
    assert_eq!(client.query("ROLLBACK"), "CZ");
    // Rules that add rows to an INSERT.
    let rules = "CREATE TEMP TABLE ruled (a int);
        CREATE RULE one AS ON INSERT TO ruled DO ALSO SELECT 1;
        CREATE RULE two AS ON INSERT TO ruled DO ALSO SELECT 2";
    assert_eq!(client.query(rules), "CCCZ");
    assert_eq!(client.query("INSERT INTO ruled VALUES (1)"), "TDTDCZ");
    // Function 1397 is abs(int4), its argument and its result in binary.
    let absolute = b"F\0\0\0\x18\0\0\x05\x75\0\x01\0\x01\0\x01\0\0\0\x04\xff\xff\xff\xfb\0\x01";
    client.send(|to| to.extend_from_slice(absolute));
    assert_eq!(client.until(b"Z"), "VZ");
    client.send(|to| to.extend_from_slice(b"F\0\0\0\x0e\0\0\0\0\0\0\0\0\0\0"));
    assert_eq!(client.until(b"Z"), "EZ");
    assert!(client.flow.is_clean());
}

/// Manual 55.2.3 and 55.2.4.
fn pipelines(server: &Server) {
    let mut client = Client::connect(server, &[]);
    client.send(|to| {
        run(to, "SELECT 1");
        build::sync(to);
        run(to, "SELECT 1/0");
        run(to, "SELECT 2");
        build::query(to, b"SELECT 3").unwrap();
        build::sync(to);
        run(to, "SELECT 4");
        build::query(to, b"SELECT 5").unwrap();
        build::sync(to);
    });
    assert_eq!(client.flow.outstanding(), 17);
    assert_eq!(client.until(b"Z"), "12DCZ");
    // The division is found when the statement is planned, or when it is executed.
    assert_eq!(client.until(b"E").replace('2', ""), "1E");
    assert_eq!(client.until(b"Z"), "Z");
    assert_eq!(client.until(b"Z"), "12DCTDCZ");
    assert_eq!(client.until(b"Z"), "Z");
    assert!(client.flow.is_clean());

    client.send(|to| {
        build::parse(to, b"named", b"SELECT $1::int4 + g FROM generate_series(1, 5) g", &[]).unwrap();
        build::describe(to, Target::Statement, b"named").unwrap();
        let values: [Option<&[u8]>; 1] = [Some(b"1")];
        build::bind(to, &BindOut { statement: b"named", values: &values, ..BindOut::default() }).unwrap();
        build::describe(to, Target::Portal, b"").unwrap();
        build::execute(to, b"", 2).unwrap();
        build::flush(to);
    });
    assert_eq!(client.until(b"s"), "1tT2TDs");
    assert!(!client.flow.is_clean(), "the batch is open though nothing is outstanding");
    assert_eq!(client.flow.outstanding(), 0);
    client.send(|to| {
        build::execute(to, b"", 0).unwrap();
        build::close(to, Target::Statement, b"named").unwrap();
        build::sync(to);
    });
    assert_eq!(client.until(b"Z"), "DC3Z");
    // A deferred constraint fails at the Sync, behind a complete answer.
    assert_eq!(client.query("CREATE TEMP TABLE d (a int UNIQUE DEFERRABLE INITIALLY DEFERRED)"), "CZ");
    client.send(|to| {
        run(to, "INSERT INTO d VALUES (1), (1)");
        build::sync(to);
    });
    assert_eq!(client.until(b"Z"), "12CEZ");
    assert!(client.flow.is_clean());
}

/// Manual 55.2.6.
fn copies(server: &Server) {
    let mut client = Client::connect(server, &[]);
    assert_eq!(client.query("CREATE TEMP TABLE t (a int)"), "CZ");
    assert_eq!(client.query("COPY (SELECT generate_series(1, 9)) TO STDOUT; SELECT 1"), "HdcCTDCZ");
    client.send(|to| {
        run(to, "COPY (SELECT 1) TO STDOUT");
        build::sync(to);
    });
    assert_eq!(client.until(b"Z"), "12HdcCZ");

    client.send(|to| build::query(to, b"COPY t FROM STDIN").unwrap());
    assert_eq!(client.until(b"G"), "G");
    assert!(client.flow.is_copying_in());
    client.send(|to| {
        rows(to, "1\n2\n");
        build::sync(to);
        build::flush(to);
        build::copy_done(to);
    });
    assert_eq!(client.until(b"Z"), "CZ", "Sync and Flush were ignored");
    // Everything at once, and a query behind it.
    client.send(|to| {
        build::query(to, b"COPY t FROM STDIN").unwrap();
        rows(to, "3\n");
        build::copy_done(to);
        build::query(to, b"SELECT 1").unwrap();
    });
    assert_eq!(client.until(b"Z") + &client.until(b"Z"), "GCZTDCZ");
    // In a batch: the Sync before the data is ignored, the one behind it is not.
    client.send(|to| {
        run(to, "COPY t FROM STDIN");
        build::sync(to);
    });
    assert_eq!(client.until(b"G"), "12G");
    client.send(|to| {
        rows(to, "4\n");
        build::copy_done(to);
        build::sync(to);
    });
    assert_eq!(client.until(b"Z"), "CZ");
    assert!(client.flow.is_clean());
    client.send(|to| build::query(to, b"SELECT count(*) FROM t").unwrap());
    client.until(b"D");
    assert_eq!(client.body, b"\0\x01\0\0\0\x014", "four rows arrived");
    client.until(b"Z");
}

fn failing_copies(server: &Server) {
    let mut client = Client::connect(server, &[]);
    assert_eq!(client.query("CREATE TEMP TABLE t (a int)"), "CZ");
    // Bad data, refused by the client, and a table that is not there, each with its data behind it.
    client.send(|to| {
        build::query(to, b"COPY t FROM STDIN").unwrap();
        rows(to, "x\n");
        rows(to, "1\n");
        build::copy_done(to);
        build::query(to, b"COPY t FROM STDIN").unwrap();
        build::copy_fail(to, b"no").unwrap();
        build::query(to, b"COPY nowhere FROM STDIN").unwrap();
        rows(to, "1\n");
        build::copy_done(to);
        build::query(to, b"SELECT 1").unwrap();
    });
    let answers: Vec<String> = (0..4).map(|_| client.until(b"Z")).collect();
    assert_eq!(answers, ["GEZ", "GEZ", "EZ", "TDCZ"]);
    assert!(client.flow.is_clean());
    // In a batch that waits with its Sync.
    client.send(|to| {
        run(to, "COPY t FROM STDIN");
        rows(to, "x\n");
        build::copy_done(to);
        build::query(to, b"SELECT 'skipped'").unwrap();
        build::sync(to);
    });
    assert_eq!(client.until(b"Z"), "12GEZ");
    // In a batch whose COPY never begins both Syncs are answered.
    client.send(|to| {
        run(to, "COPY nowhere FROM STDIN");
        build::sync(to);
        rows(to, "1\n");
        build::copy_done(to);
        build::sync(to);
    });
    assert_eq!(client.until(b"Z") + &client.until(b"Z"), "12EZZ");
    assert!(client.flow.is_clean());
    // With a Sync in front of the data: doubt, though the server means well.
    client.send(|to| {
        run(to, "COPY t FROM STDIN");
        build::sync(to);
        rows(to, "x\n");
        build::copy_done(to);
        build::sync(to);
    });
    assert_eq!(client.until(b"Z"), "12GEZ");
    assert!(client.flow.in_doubt() && !client.flow.is_clean());
}

/// Manual 55.2.7: what comes without being asked for.
fn out_of_turn(server: &Server) {
    let mut client = Client::connect(server, &[]);
    assert_eq!(client.query("SET application_name = 'x'; LISTEN c"), "CCZ");
    assert_eq!(client.query("DO $$ BEGIN RAISE NOTICE 'n'; END $$"), "NCZ");
    let mut other = Client::connect(server, &[]);
    assert_eq!(other.query("NOTIFY c, 'payload'"), "CZ");
    assert_eq!(client.until(b"A"), "A");
    assert!(client.flow.is_clean());
    assert_eq!(other.query(&format!("SELECT pg_terminate_backend({})", client.pid)), "TDCZ");
    assert_eq!(client.until(b"E"), "E");
    assert_eq!((client.last, client.sqlstate()), (Some(Event::Closing), SqlState::new(b"57P01")));
    assert!(!client.flow.is_clean());
    assert_eq!(client.message(), None);
}

/// Manual 55.2.8.
fn cancelling(server: &Server) {
    let mut client = Client::connect(server, &[]);
    client.send(|to| build::query(to, b"SELECT pg_sleep(600)").unwrap());
    let began = Instant::now();
    // Repeated: the first may come before the statement has begun, and is then without effect.
    let cancelled = loop {
        let mut to = BytesMut::new();
        build::cancel_request(&mut to, client.pid, Key::new(&client.key).unwrap());
        let mut stream = dial(server);
        stream.write_all(&to).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "a cancel is not answered");
        client.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let ready = client.stream.peek(&mut [0; 1]).is_ok();
        client.stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        if ready {
            break client.until(b"E");
        }
        assert!(began.elapsed() < Duration::from_secs(20), "the query is never cancelled");
    };
    // Where it reached the server before the row description did the client, that never comes.
    assert!(matches!(cancelled.as_str(), "TE" | "E"), "{cancelled}");
    assert_eq!(client.sqlstate(), SqlState::new(b"57014"));
    assert_eq!(client.until(b"Z"), "Z");
    assert!(client.flow.is_clean());
}

/// Manual 55.4: a walsender, a stream both ways, and a base backup.
fn replicating(server: &Server) {
    let mut client = Client::connect(server, &[(b"replication", b"true")]);
    client.send(|to| build::query(to, b"IDENTIFY_SYSTEM").unwrap());
    assert_eq!(client.until(b"D"), "TD");
    let Ok(ServerMessage::DataRow(row)) = ServerMessage::parse(b'D', &client.body) else { panic!("no row") };
    let position = String::from_utf8(row.iter().nth(2).flatten().unwrap().to_vec()).unwrap();
    assert_eq!(client.until(b"Z"), "CZ");
    client.send(|to| build::query(to, format!("START_REPLICATION {position}").as_bytes()).unwrap());
    assert_eq!(client.until(b"W"), "W");
    assert!(client.flow.is_copying_in());
    client.send(build::copy_done);
    assert_eq!(client.until(b"Z").replace('d', ""), "cCCZ", "for the COPY and for the command");
    assert!(client.flow.is_clean());
    assert_eq!(client.query("BASE_BACKUP (CHECKPOINT 'fast', WAIT false, MANIFEST 'no')"), "TDCTDCHdcTDCCZ");
    assert!(client.flow.is_clean());
}

/// Manual 55.3: what a client proves to somebody in between is good for a login in its name, until its password changes.
fn proving(server: &Server) {
    let mut admin = Client::connect(server, &[]);
    assert_eq!(admin.query("CREATE ROLE proven LOGIN PASSWORD 'correct horse'"), "CZ");
    server.admit("host all proven all scram-sha-256\nhost all all all trust\n");
    assert_eq!(admin.query("SELECT pg_reload_conf()"), "TDCZ");

    let stored = admin.value("SELECT rolpassword FROM pg_authid WHERE rolname = 'proven'");
    let verifier = Verifier::parse(&stored).expect("a verifier as this server stores it");
    let prove = |password: &[u8]| {
        let mut typed = ScramSha256::new(password, ChannelBinding::unsupported());
        let (between, answer) =
            scram::Server::start(verifier.clone(), typed.message(), Binding::Impossible, "ours").unwrap();
        typed.update(answer.as_bytes()).unwrap();
        let (last, keys) = between.finish(typed.message())?;
        typed.finish(last.as_bytes()).unwrap();
        Ok::<_, ScramError>(keys)
    };
    assert_eq!(prove(b"Correct horse"), Err(ScramError::WrongProof));
    let keys = prove(b"correct horse").unwrap();

    let parameters: [(&[u8], &[u8]); 2] = [(b"user", b"proven"), (b"database", b"postgres")];
    // A new session may begin before the reload has come through, and is let in unasked.
    let log_in = || {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let mut client = Client::begin(dial(server), Version::V3_0, &parameters);
            let asked = client.peek() != [b'R', 0, 0, 0, 8, 0, 0, 0, 0];
            if asked {
                return (client.prove(keys.clone()), client);
            }
            assert!(Instant::now() < until, "the server asks for no proof");
        }
    };
    let (proven, mut client) = log_in();
    assert_eq!(proven, Ok(()));
    assert_eq!(client.reach_ready(), "RKZ");
    assert_eq!(client.value("SELECT current_user"), "proven");
    assert_eq!(admin.query("ALTER ROLE proven PASSWORD 'correct horse'"), "CZ");
    assert_eq!(log_in().0, Err(ScramError::KeysOutOfDate), "the salt is another one");
}
