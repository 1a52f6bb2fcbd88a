//! Conversations with the console, message by message, and what its commands do to a proxy without clients.

use pgherd_core::types::Term;
use pgherd_pgwire::message::ServerMessage;
use pgherd_pgwire::message::build::BindOut;

use super::*;
use crate::clock;
use crate::hba::Hba;
use crate::net::InClear;
use crate::routes::{self, Standby};
use crate::verifiers::{AuthQuery, Verifiers};
use crate::wish::{Promote, Unwilling};
use crate::world::{Settings, World};

/// What a client was sent: the types of the messages, and the interesting part of some.
#[derive(Debug, Default, PartialEq, Eq)]
struct Heard {
    kinds: String,
    rows: Vec<Vec<Option<Vec<u8>>>>,
    errors: Vec<(String, String)>,
    tags: Vec<String>,
    status: Vec<TransactionStatus>,
}

fn heard(out: &mut BytesMut) -> Heard {
    let bytes = out.split();
    let (mut input, mut heard) = (&bytes[..], Heard::default());
    let mut scanner = Scanner::new(Side::Server, Phase::Session);
    while let Some(Piece::Header(header)) = scanner.next(&mut input).unwrap() {
        let mut spill = Spill::new(1 << 20);
        let body = scanner.whole(&mut input, &mut spill).unwrap().expect("whole messages");
        heard.kinds.push(char::from(header.kind));
        match ServerMessage::parse(header.kind, body).unwrap() {
            ServerMessage::DataRow(values) => {
                heard.rows.push(values.iter().map(|value| value.map(<[u8]>::to_vec)).collect());
            }
            ServerMessage::ErrorResponse(fields) => {
                let text =
                    |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap_or_default().to_vec()).unwrap();
                heard.errors.push((text(fields.get(b'C')), text(fields.get(b'H'))));
            }
            ServerMessage::CommandComplete { tag } => {
                heard.tags.push(String::from_utf8(tag.to_vec()).unwrap());
            }
            ServerMessage::ReadyForQuery(status) => heard.status.push(status),
            _ => {}
        }
    }
    assert!(input.is_empty(), "whole messages");
    heard
}

fn two_rows() -> Reply {
    let rows = vec![vec!["active".into(), "yes".into()], vec!["paused".into(), Value::Null]];
    Table { columns: shown::columns(Show::State).unwrap(), rows }.into()
}

/// Says this, in pieces of so many bytes, and performs everything with two rows; what is heard, and what was performed.
fn say(console: &mut Console, bytes: &[u8], piece: usize) -> (Heard, Vec<Command>) {
    let (mut out, mut performed, mut input) = (BytesMut::new(), Vec::new(), BytesMut::new());
    for part in bytes.chunks(piece) {
        input.extend_from_slice(part);
        loop {
            let mut rest = &input[..];
            let step = console.read(&mut rest, &mut out);
            let taken = input.len() - rest.len();
            drop(input.split_to(taken));
            match step {
                Step::More => break,
                Step::Perform(command) => {
                    let reply = match &command {
                        Command::Show(_) => Ok(two_rows()),
                        Command::Enable(_) => Err(Refused::new(b"55000", "no")),
                        _ => Ok(Reply::default()),
                    };
                    console.performed(&command, reply, &mut out);
                    performed.push(command);
                }
                step => panic!("{step:?}"),
            }
        }
    }
    (heard(&mut out), performed)
}

fn query(text: &str) -> BytesMut {
    let mut to = BytesMut::new();
    build::query(&mut to, text.as_bytes()).unwrap();
    to
}

/// As a driver does that knows nothing else: under a name, with binary values if it wants.
fn extended(name: &str, text: &str, binary: bool) -> BytesMut {
    let mut to = BytesMut::new();
    build::parse(&mut to, name.as_bytes(), text.as_bytes(), &[]).unwrap();
    build::describe(&mut to, Target::Statement, name.as_bytes()).unwrap();
    let result_formats: &[Format] = if binary { &[Format::Binary] } else { &[] };
    let bind = BindOut { statement: name.as_bytes(), result_formats, ..BindOut::default() };
    build::bind(&mut to, &bind).unwrap();
    build::execute(&mut to, b"", 0).unwrap();
    build::sync(&mut to);
    to
}

#[test]
fn simple_queries_are_answered_command_by_command() {
    for piece in [1, 7, 1000] {
        let mut console = Console::new(true);
        let (heard, performed) = say(&mut console, &query("SHOW STATE; PAUSE shop"), piece);
        assert_eq!(heard.kinds, "TDDCCZ");
        assert_eq!(heard.tags, ["SHOW", "PAUSE"]);
        assert_eq!(heard.rows[1], [Some(b"paused".to_vec()), None]);
        assert_eq!(performed, [Command::Show(Show::State), Command::Pause(Some("shop".to_owned()))]);
        assert_eq!(say(&mut console, &query(" ; "), piece).0.kinds, "IZ");
        let (heard, performed) = say(&mut console, &query("ENABLE x; SHOW STATE"), piece);
        assert_eq!((heard.kinds.as_str(), performed.len()), ("EZ", 1), "an error ends the query");
        let (heard, _) = say(&mut console, &query("SHOW NOTHING"), piece);
        assert_eq!(heard.errors[0].0, "42601");
        assert!(heard.errors[0].1.contains("SHOW HELP"), "{:?}", heard.errors);
        let many = "RELOAD;".repeat(MOST_COMMANDS + 1);
        assert_eq!(say(&mut console, &query(&many), piece).0.errors[0].0, "54000");
    }
}

#[test]
fn drivers_that_know_the_extended_protocol_only_are_answered() {
    for piece in [1, 7, 1000] {
        let mut console = Console::new(true);
        let (heard, performed) = say(&mut console, &extended("s0", "show state", true), piece);
        assert_eq!((heard.kinds.as_str(), performed.len()), ("1tT2DDCZ", 1));
        let (heard, _) = say(&mut console, &extended("", "RELOAD", false), piece);
        assert_eq!((heard.kinds.as_str(), heard.tags[0].as_str()), ("1tn2CZ", "RELOAD"));
        assert_eq!(say(&mut console, &extended("", "", false), piece).0.kinds, "1tn2IZ");
        // An error skips up to Sync, and the next one is answered.
        let (heard, performed) = say(&mut console, &extended("s1", "DROP TABLE x", false), piece);
        assert_eq!((heard.kinds.as_str(), performed.len()), ("EZ", 0));
        let (heard, _) = say(&mut console, &extended("s0", "show state", false), piece);
        assert_eq!((heard.kinds.as_str(), heard.errors[0].0.as_str()), ("EZ", "42P05"));
        let (heard, _) = say(&mut console, &extended("", "ENABLE x", false), piece);
        assert_eq!((heard.kinds.as_str(), heard.errors[0].0.as_str()), ("1tn2EZ", "55000"));
        assert_eq!(say(&mut console, &query("SHOW STATE"), piece).0.kinds, "TDDCZ");
    }
}

#[test]
fn rows_come_as_many_at_a_time_as_were_asked_for() {
    let mut console = Console::new(true);
    let mut to = BytesMut::new();
    build::parse(&mut to, b"", b"show state", &[]).unwrap();
    build::bind(&mut to, &BindOut { portal: b"p", ..BindOut::default() }).unwrap();
    for _ in 0..2 {
        build::execute(&mut to, b"p", 1).unwrap();
    }
    build::describe(&mut to, Target::Portal, b"p").unwrap();
    build::close(&mut to, Target::Portal, b"p").unwrap();
    build::execute(&mut to, b"p", 1).unwrap();
    build::sync(&mut to);
    let (heard, performed) = say(&mut console, &to, 1000);
    assert_eq!((heard.kinds.as_str(), performed.len()), ("12DsDCT3EZ", 1), "it is performed once");
    assert_eq!(heard.errors[0].0, "34000");
}

#[test]
fn what_was_not_prepared_or_bound_is_an_error() {
    let mut console = Console::new(true);
    for (write, code) in [
        (
            &(|to: &mut BytesMut| build::bind(to, &BindOut { statement: b"x", ..BindOut::default() }))
                as &dyn Fn(&mut BytesMut) -> _,
            "26000",
        ),
        (&|to: &mut BytesMut| build::describe(to, Target::Statement, b"x"), "26000"),
        (&|to: &mut BytesMut| build::describe(to, Target::Portal, b"x"), "34000"),
        (&|to: &mut BytesMut| build::execute(to, b"x", 0), "34000"),
    ] {
        let mut to = BytesMut::new();
        write(&mut to).unwrap();
        build::sync(&mut to);
        let (heard, _) = say(&mut console, &to, 1000);
        assert_eq!((heard.kinds.as_str(), heard.errors[0].0.as_str()), ("EZ", code));
    }
    // Parameters, formats that do not fit, and more of everything than anybody needs.
    let mut to = BytesMut::new();
    build::parse(&mut to, b"", b"show state", &[]).unwrap();
    build::bind(&mut to, &BindOut { values: &[Some(b"1")], ..BindOut::default() }).unwrap();
    build::sync(&mut to);
    assert_eq!(say(&mut console, &to, 1000).0.errors[0].0, "08P01");
    let codes: Vec<String> = (0..=MOST_NAMES)
        .flat_map(|n| say(&mut console, &extended(&format!("n{n}"), "show state", false), 1000).0.errors)
        .map(|(code, _)| code)
        .collect();
    assert_eq!(codes, ["54000", "54000"], "the unnamed one is one of them");
}

#[test]
fn whoever_may_look_may_change_nothing() {
    let mut console = Console::new(false);
    for text in [
        "PAUSE",
        "RESUME",
        "KILL",
        "KILL_CLIENT 1",
        "DISABLE x",
        "ENABLE x",
        "RELOAD",
        "RECONNECT",
        "DETACH b",
        "ATTACH b",
        "PROMOTE b",
        "WAIT_CLOSE",
        "SHUTDOWN",
        "SHUTDOWN WAIT_FOR_CLIENTS",
    ] {
        for bytes in [query(text), extended("", text, false)] {
            let (heard, performed) = say(&mut console, &bytes, 1000);
            assert_eq!((heard.errors[0].0.as_str(), performed), ("42501", Vec::new()), "{text}");
        }
    }
    let (heard, _) = say(&mut console, &query("SHOW STATE; SET datestyle = iso; SELECT 1"), 1000);
    assert_eq!(heard.tags, ["SHOW", "SET", "SELECT 1"]);
}

#[test]
fn drivers_that_begin_transactions_have_them() {
    let mut console = Console::new(true);
    let mut status = |text: &str| {
        let heard = say(&mut console, &query(text), 1000).0;
        (
            heard.status[0],
            heard.tags.join(","),
            heard.errors.into_iter().map(|(code, _)| code).collect::<String>(),
        )
    };
    let is = |status, tags: &str, errors: &str| (status, tags.to_owned(), errors.to_owned());
    assert_eq!(status("BEGIN; SHOW STATE"), is(TransactionStatus::InTransaction, "BEGIN,SHOW", ""));
    assert_eq!(status("SHOW NOTHING"), is(TransactionStatus::Failed, "", "42601"));
    assert_eq!(status("SHOW STATE"), is(TransactionStatus::Failed, "", "25P02"));
    assert_eq!(status("COMMIT"), is(TransactionStatus::Idle, "ROLLBACK", ""));
    assert_eq!(status("START TRANSACTION; ROLLBACK"), is(TransactionStatus::Idle, "BEGIN,ROLLBACK", ""));
}

#[test]
fn what_no_client_sends_ends_the_conversation() {
    for bytes in [&b"Q\0\0\0\x03"[..], b"Q\0\x0f\0\0", b"!", b"P\0\0\0\x05x"] {
        let mut input = bytes;
        let step = Console::new(true).read(&mut input, &mut BytesMut::new());
        assert!(matches!(step, Step::Broken { .. }), "{bytes:?}: {step:?}");
    }
    let mut input = &b"X\0\0\0\x04"[..];
    assert_eq!(Console::new(true).read(&mut input, &mut BytesMut::new()), Step::Left);
}

/// Nothing of it costs more than it weighs, and nothing panics.
#[test]
fn any_bytes_are_answered_or_refused() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let parts: Vec<BytesMut> = vec![
        query("show state"),
        query("begin; show pools; nonsense"),
        extended("a", "show state", true),
        extended("", "pause", false),
    ];
    for _ in 0..20_000 {
        let mut bytes: Vec<u8> =
            (0..1 + next() % 3).flat_map(|_| parts[(next() % 4) as usize].to_vec()).collect();
        for _ in 0..next() % 4 {
            let at = (next() as usize) % bytes.len();
            bytes[at] = next() as u8;
        }
        let (mut console, mut out, mut rest) = (Console::new(true), BytesMut::new(), &bytes[..]);
        while let Step::Perform(command) = console.read(&mut rest, &mut out) {
            console.performed(&command, Ok(two_rows()), &mut out);
        }
        assert!(out.len() < 100 * bytes.len() + 10_000);
    }
}

fn world() -> std::sync::Arc<World> {
    let query = AuthQuery { user: "proxy".to_owned(), database: "postgres".to_owned(), secret_of: None };
    let verifiers = Verifiers::new(query).unwrap();
    let world =
        World::new(Settings::new(Hba::default()), std::sync::Arc::new(InClear), verifiers, Vec::new());
    std::sync::Arc::new(world)
}

/// Names and types as PgBouncer 1.25 and Pgpool-II 4.7 have them, written down from their sources.
#[test]
fn columns_are_those_of_the_dialects() {
    let recorded = include_str!("columns.txt");
    let mut checked = 0;
    for line in recorded.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (table, columns) = line.split_once(": ").unwrap();
        let show = Show::ALL.iter().find(|show| show.word() == table).expect(table);
        let mut described = BytesMut::new();
        table::describe(shown::columns(*show).unwrap(), &[], &mut described);
        let mut body = &described[5..];
        let mut found = Vec::new();
        let count = u16::from_be_bytes([body[0], body[1]]);
        body = &body[2..];
        for _ in 0..count {
            let end = body.iter().position(|byte| *byte == 0).unwrap();
            let oid = u32::from_be_bytes(body[end + 7..end + 11].try_into().unwrap());
            let letter = match oid {
                25 => 's',
                23 => 'i',
                20 => 'q',
                1700 => 'N',
                oid => panic!("type {oid}"),
            };
            found.push(format!("{}={letter}", String::from_utf8_lossy(&body[..end])));
            body = &body[end + 19..];
        }
        assert_eq!(found.join(" "), columns, "SHOW {table}");
        checked += 1;
    }
    assert_eq!(checked, 20);
}

/// Also of a proxy in which nothing has happened yet.
#[tokio::test]
async fn every_row_has_as_many_values_as_there_are_columns() {
    let world = world();
    world.ledger.of("shop", "alice").opened();
    for show in Show::ALL {
        let reply = deeds::perform(&Command::Show(*show), "alice", &world).await.unwrap();
        match (reply.table, shown::columns(*show)) {
            (None, None) => assert!(reply.notice.is_some_and(|(_, detail)| detail.is_some())),
            (Some(table), Some(columns)) => {
                assert_eq!(table.columns, columns);
                assert!(table.rows.iter().all(|row| row.len() == columns.len()), "{show:?}");
            }
            other => panic!("{show:?}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn what_is_paused_can_be_resumed_and_nothing_else() {
    let world = world();
    let act = async |command: Command| {
        deeds::perform(&command, "alice", &world).await.map_err(|refused| refused.message)
    };
    let shop = || Some("shop".to_owned());
    assert!(act(Command::Resume(None)).await.is_err() && act(Command::Resume(shop())).await.is_err());
    act(Command::Pause(shop())).await.unwrap();
    assert_eq!(act(Command::Pause(shop())).await.unwrap_err(), "already paused");
    act(Command::Pause(None)).await.unwrap();
    assert_eq!(act(Command::Pause(None)).await.unwrap_err(), "already paused");
    act(Command::Resume(None)).await.unwrap();
    assert!(!world.pools.paused().has("shop"), "that resumes everything");
    act(Command::Kill(shop())).await.unwrap();
    assert!(world.pools.paused().has("shop") && !world.pools.paused().has("mall"));
    act(Command::Resume(shop())).await.unwrap();
    for name in DATABASES {
        assert!(act(Command::Pause(Some(name.to_owned()))).await.is_err());
    }
    act(Command::Disable("shop".to_owned())).await.unwrap();
    assert!(world.disabled().contains("shop"));
    act(Command::Enable("shop".to_owned())).await.unwrap();
    assert!(world.disabled().is_empty());
    assert!(act(Command::KillClient(7)).await.is_err());
    assert!(act(Command::Detach("b".to_owned())).await.is_err());
}

#[tokio::test]
async fn whom_the_herd_promotes_the_console_waits_for() {
    let world = world();
    let target = |node: &str| routes::Target {
        node: node.parse().unwrap(),
        address: std::net::Ipv4Addr::LOCALHOST.into(),
        port: 5432,
        socket_dir: None,
    };
    let learn = |primary: &str, standby: &str| {
        let now = clock::now();
        let table = routes::Table {
            term: Term(1),
            primary: Some(target(primary)),
            gate_open: true,
            standbys: vec![Standby { target: target(standby), weight: 1 }],
            forks: Vec::new(),
            draining: None,
            valid_until: now,
        };
        world.nodes.learn(table, now);
    };
    learn("a", "b");
    let promote = async |node: &str| {
        let command = Command::Promote(node.to_owned());
        deeds::perform(&command, "alice", &world).await.map(|reply| reply.notice.unwrap().0)
    };
    let wish = Promote { to: "b".to_owned(), role: "alice".to_owned() };

    assert_eq!(promote("a").await.unwrap(), "a is the primary already");
    let unknown = promote("z").await.unwrap_err();
    assert_eq!(unknown.sqlstate.as_bytes(), b"42704");

    let refuse = async {
        let wanted = world.promotions.next().await;
        assert_eq!(wanted.what, wish);
        wanted.done(Err(Unwilling { why: "it lags".to_owned(), hint: Some("wait".to_owned()) }));
    };
    let (refused, ()) = tokio::join!(promote("b"), refuse);
    let refused = refused.unwrap_err();
    assert_eq!(
        (refused.message.as_str(), refused.hint.as_deref()),
        ("b is not promoted: it lags", Some("wait"))
    );

    // By its number. Somebody else becomes the primary for a moment before.
    let hand_over = async {
        let wanted = world.promotions.next().await;
        assert_eq!(wanted.what, wish);
        wanted.done(Ok(()));
        learn("c", "a");
        tokio::task::yield_now().await;
        learn("b", "a");
    };
    let (promoted, ()) = tokio::join!(promote("1"), hand_over);
    assert_eq!(promoted.unwrap(), "b is the primary");
}

/// What is asked of the proxy in an ordinary session.
mod aside {
    use super::super::aside::Aside;
    use super::*;

    const IDLE: TransactionStatus = TransactionStatus::Idle;

    fn answer(aside: &mut Aside, bytes: &[u8]) -> (usize, String) {
        let mut out = BytesMut::new();
        let taken = aside.answer(bytes, IDLE, &mut out).unwrap().unwrap_or(0);
        (taken, heard(&mut out).kinds)
    }

    #[test]
    fn what_is_not_meant_for_the_proxy_is_left() {
        let mut aside = Aside::new(&world());
        for text in [
            "SELECT 1",
            "show pool",
            "SHOW search_path",
            "",
            "show pool_nodes_of_mine",
            "/* x */ show pool_nodes",
        ] {
            for bytes in [query(text), extended("s", text, false)] {
                let taken = answer(&mut aside, &bytes);
                // A name that only begins so is answered with an error, as Pgpool-II would.
                let expected = if text.starts_with("show pool_") { bytes.len() } else { 0 };
                assert_eq!(taken.0, expected, "{text}");
            }
        }
        assert_eq!(answer(&mut aside, b"Q\0\0").0, 0, "a header that is not there yet");
        assert_eq!(answer(&mut aside, &query("show pool_nodes")[..9]).0, 0);
    }

    #[test]
    fn both_protocols_are_answered_and_what_follows_is_left() {
        let mut aside = Aside::new(&world());
        let asked = query("Show Pool_Nodes;");
        let both = [&asked[..], &query("SELECT 1")].concat();
        assert_eq!(answer(&mut aside, &both), (asked.len(), "TCZ".to_owned()));
        let asked = extended("", "SHOW pool_version", false);
        let both = [&asked[..], &query("SELECT 1")].concat();
        assert_eq!(answer(&mut aside, &both), (asked.len(), "1tT2DCZ".to_owned()));
        let secret = query("show pool_processes");
        assert_eq!(answer(&mut aside, &secret).1, "EZ", "users and databases are for the console");
    }

    /// In whatever pieces it comes; and prepared once, executed twice.
    #[test]
    fn once_a_statement_is_the_proxys_everything_up_to_sync_is() {
        let asked = extended("s", "show pool_version", true);
        for cut in 20..asked.len() {
            let mut aside = Aside::new(&world());
            let (mut taken, mut kinds) = answer(&mut aside, &asked[..cut]);
            if taken == 0 {
                continue;
            }
            // The beginning of a header comes again.
            assert!(cut - taken < 5);
            let (rest, more) = answer(&mut aside, &asked[taken..]);
            taken += rest;
            kinds += &more;
            assert_eq!((taken, kinds.as_str()), (asked.len(), "1tT2DCZ"), "cut at {cut}");

            let mut again = BytesMut::new();
            build::bind(&mut again, &BindOut { statement: b"s", ..BindOut::default() }).unwrap();
            build::execute(&mut again, b"", 0).unwrap();
            build::sync(&mut again);
            assert_eq!(answer(&mut aside, &again), (again.len(), "2DCZ".to_owned()));
            let mut other = BytesMut::new();
            build::bind(&mut other, &BindOut { statement: b"t", ..BindOut::default() }).unwrap();
            assert_eq!(answer(&mut aside, &other).0, 0, "that one is PostgreSQL's");
            let mut close = BytesMut::new();
            build::close(&mut close, Target::Statement, b"s").unwrap();
            build::sync(&mut close);
            assert_eq!(answer(&mut aside, &close), (close.len(), "3Z".to_owned()));
            assert_eq!(answer(&mut aside, &again).0, 0, "it is no more");
        }
    }

    #[test]
    fn an_unnamed_statement_is_the_proxys_until_another_may_be() {
        let mut aside = Aside::new(&world());
        let mut prepare = BytesMut::new();
        build::parse(&mut prepare, b"", b"show pool_nodes", &[]).unwrap();
        build::sync(&mut prepare);
        let mut execute = BytesMut::new();
        build::bind(&mut execute, &BindOut::default()).unwrap();
        build::execute(&mut execute, b"", 0).unwrap();
        build::sync(&mut execute);
        assert_eq!(answer(&mut aside, &prepare), (prepare.len(), "1Z".to_owned()));
        assert_eq!(answer(&mut aside, &execute), (execute.len(), "2CZ".to_owned()));
        assert_eq!(answer(&mut aside, &query("SELECT 1")).0, 0);
        assert_eq!(answer(&mut aside, &execute).0, 0);
    }

    #[test]
    fn nothing_else_goes_to_postgresql_in_the_middle_of_it() {
        let mut aside = Aside::new(&world());
        let mut mixed = BytesMut::new();
        build::parse(&mut mixed, b"a", b"show pool_nodes", &[]).unwrap();
        build::parse(&mut mixed, b"b", b"DELETE FROM t", &[]).unwrap();
        build::sync(&mut mixed);
        assert_eq!(answer(&mut aside, &mixed), (mixed.len(), "1EZ".to_owned()));
        let mut leaving = BytesMut::new();
        build::parse(&mut leaving, b"c", b"show pool_nodes", &[]).unwrap();
        let said = leaving.len();
        build::terminate(&mut leaving);
        assert_eq!(answer(&mut aside, &leaving), (said, "1".to_owned()), "whoever leaves leaves the session");
    }
}
