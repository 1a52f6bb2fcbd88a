//! Sessions message by message, and the same cut into pieces.

use pgherd_pgwire::message::build::ColumnOut;
use proptest::prelude::*;

use super::*;

fn bytes(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut to = BytesMut::new();
    write(&mut to);
    to.to_vec()
}

/// Shows a stream in pieces of at most `most` bytes, as a socket would; returns what is passed on.
fn shown(
    stream: &[u8],
    most: usize,
    mut show: impl FnMut(&[u8], &mut BytesMut) -> (Option<Vec<u8>>, usize),
) -> Vec<u8> {
    let (mut passed, mut pending) = (Vec::new(), Vec::new());
    for piece in stream.chunks(most.max(1)) {
        pending.extend_from_slice(piece);
        let mut edited = BytesMut::new();
        let (as_it_came, taken) = show(&pending, &mut edited);
        match as_it_came {
            Some(bytes) => {
                assert!(edited.is_empty());
                passed.extend_from_slice(&bytes);
            }
            None => passed.extend_from_slice(&edited),
        }
        pending.drain(..taken);
    }
    passed
}

fn owned(passed: Passed<'_>) -> (Option<Vec<u8>>, usize) {
    match passed.pass {
        Pass::AsItCame(bytes) => (Some(bytes.to_vec()), passed.taken_bytes),
        Pass::Edited => (None, passed.taken_bytes),
    }
}

fn from_client(session: &mut Session, stream: &[u8], most: usize) -> Vec<u8> {
    shown(stream, most, |chunk, edited| {
        owned(session.from_client(chunk, edited, &mut BytesMut::new()).unwrap())
    })
}

fn from_server(session: &mut Session, stream: &[u8], most: usize) -> Vec<u8> {
    shown(stream, most, |chunk, edited| owned(session.from_server(chunk, edited).unwrap()))
}

fn query(text: &str) -> Vec<u8> {
    bytes(|to| build::query(to, text.as_bytes()).unwrap())
}

fn ready(status: TransactionStatus) -> Vec<u8> {
    bytes(|to| build::ready_for_query(to, status))
}

fn complete(tag: &str) -> Vec<u8> {
    bytes(|to| build::command_complete(to, tag).unwrap())
}

fn report(kind: u8, fields: &[(u8, &str)]) -> Vec<u8> {
    let mut body: Vec<u8> = Vec::new();
    for (code, text) in fields {
        body.push(*code);
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    body.push(0);
    let header = Header { kind, body_bytes: body.len() as u32 };
    [&header.to_bytes()[..], &body].concat()
}

fn canceled_wait() -> Vec<u8> {
    report(
        b'N',
        &[
            (b'S', "WARNUNG"),
            (b'V', "WARNING"),
            (b'C', "01000"),
            (b'M', "storniere das Warten"),
            (b'R', "SyncRepWaitForLSN"),
        ],
    )
}

fn error(severity: &str) -> Vec<u8> {
    report(b'E', &[(b'S', severity), (b'V', severity), (b'C', "42601"), (b'M', "no")])
}

fn rows(count: usize) -> Vec<u8> {
    bytes(|to| {
        build::row_description(to, &[ColumnOut { name: "x", type_oid: 25, type_bytes: -1 }]).unwrap();
        for row in 0..count {
            build::data_row(to, &[Some(row.to_string().as_bytes())]).unwrap();
        }
    })
}

/// What the error says that stands where a warning stood, and what is left without it.
fn without_error(passed: &[u8]) -> (SqlState, Vec<u8>) {
    let mut scanner = Scanner::new(Side::Server, Phase::Session);
    let (mut input, mut left, mut found) = (passed, Vec::new(), None);
    while let Some(Piece::Header(header)) = scanner.next(&mut input).unwrap() {
        let mut spill = Spill::new(100_000);
        let body = scanner.whole(&mut input, &mut spill).unwrap().unwrap();
        if header.kind == b'E' {
            let ServerMessage::ErrorResponse(fields) = ServerMessage::parse(b'E', body).unwrap() else {
                panic!()
            };
            found = fields.sqlstate();
        } else {
            left.extend_from_slice(&header.to_bytes());
            left.extend_from_slice(body);
        }
    }
    (found.expect("there is an error"), left)
}

/// As a server reports it whose backends are told to end: it sends nothing more.
#[test]
fn a_wait_that_is_canceled_by_the_end_of_the_server_is_its_last_word() {
    for (sqlstate, is_last) in [("57P01", true), ("01000", false)] {
        let mut session = Session::new();
        from_client(&mut session, &query("COMMIT"), 7);
        let fields = [(b'S', "WARNING"), (b'V', "WARNING"), (b'C', sqlstate), (b'R', "SyncRepWaitForLSN")];
        let mut edited = BytesMut::new();
        let warning = report(b'N', &fields);
        let passed = session.from_server(&warning, &mut edited).unwrap();
        assert_eq!(passed.pass, Pass::Edited);
        let said = edited.escape_ascii().to_string();
        assert!(said.contains("C08007"), "{said}");
        assert_eq!(said.contains("SFATAL"), is_last, "{said}");
        assert_eq!((session.server_leaves(), session.server_has_ended()), (is_last, is_last));
        assert_eq!(session.lost(), Lost::Unknown);
    }
}

#[test]
fn whoever_wants_no_warnings_hears_of_a_canceled_wait_and_of_no_other() {
    let mut session = Session::new();
    session.hide_warnings(true);
    from_client(&mut session, &query("COMMIT"), 7);
    let notice = |level| report(b'N', &[(b'S', level), (b'V', level), (b'C', "01000"), (b'M', "look")]);
    let said =
        [notice("WARNING"), notice("INFO"), complete("COMMIT"), ready(TransactionStatus::Idle)].concat();
    let heard = from_server(&mut session, &said, 7);
    assert_eq!(heard, [notice("INFO"), complete("COMMIT"), ready(TransactionStatus::Idle)].concat());
    from_client(&mut session, &query("COMMIT"), 7);
    let said = [canceled_wait(), complete("COMMIT"), ready(TransactionStatus::Idle)].concat();
    let (code, _) = without_error(&from_server(&mut session, &said, 7));
    assert_eq!(code, SqlState::TRANSACTION_RESOLUTION_UNKNOWN);
}

#[test]
fn what_needs_no_change_is_passed_on_in_place() {
    let mut session = Session::new();
    let asked = [query("SELECT x FROM t"), query("SELECT 1")].concat();
    let mut edited = BytesMut::new();
    let passed = session.from_client(&asked, &mut edited, &mut BytesMut::new()).unwrap();
    assert_eq!(passed, Passed { pass: Pass::AsItCame(&asked), taken_bytes: asked.len() });
    let one = [rows(3), complete("SELECT 3"), ready(TransactionStatus::Idle)].concat();
    let answers =
        [&one[..], &report(b'N', &[(b'M', "hello")]), &error("ERROR"), &ready(TransactionStatus::Idle)]
            .concat();
    assert!(!session.is_clean());
    let passed = session.from_server(&answers, &mut edited).unwrap();
    assert_eq!(passed, Passed { pass: Pass::AsItCame(&answers), taken_bytes: answers.len() });
    assert!(edited.is_empty() && session.is_clean() && session.used());
}

#[test]
fn a_farewell_stays_here() {
    let mut session = Session::new();
    let asked = [query("SELECT 1"), bytes(build::terminate), query("SELECT 2")].concat();
    assert_eq!(from_client(&mut session, &asked, 1000), query("SELECT 1"));
    assert!(session.has_left() && !session.is_clean());
    let answer = [rows(1), complete("SELECT 1"), ready(TransactionStatus::Idle)].concat();
    from_server(&mut session, &answer, 1000);
    assert!(session.is_clean(), "the server never heard of it");
}

#[test]
fn a_commit_that_no_standby_has_is_an_error() {
    for most in [1, 2, 7, 50, 10_000] {
        let mut session = Session::new();
        from_client(&mut session, &query("INSERT INTO t VALUES (1)"), 1000);
        let setting = report(b'S', &[]);
        let answer = [
            report(b'N', &[(b'M', "before")]),
            canceled_wait(),
            complete("INSERT 0 1"),
            setting.clone(),
            report(b'N', &[(b'M', "after")]),
            ready(TransactionStatus::Idle),
        ];
        let passed = from_server(&mut session, &answer.concat(), most);
        let (sqlstate, left) = without_error(&passed);
        assert_eq!(sqlstate, SqlState::TRANSACTION_RESOLUTION_UNKNOWN);
        let kept = [&answer[0], &setting, &answer[4], &answer[5]].map(|bytes| bytes.clone()).concat();
        assert_eq!(left, kept, "in pieces of {most}");
        assert!(session.is_clean());

        // The next answer is heard again.
        from_client(&mut session, &query("SELECT x FROM t"), 1000);
        let next = [rows(1), complete("SELECT 1"), ready(TransactionStatus::Idle)].concat();
        assert_eq!(from_server(&mut session, &next, most), next);
    }
}

#[test]
fn a_pipeline_hears_of_it_in_place_of_what_follows() {
    let mut session = Session::new();
    let asked = bytes(|to| {
        build::parse(to, b"", b"INSERT INTO t VALUES (1)", &[]).unwrap();
        build::bind(to, &build::BindOut::default()).unwrap();
        build::execute(to, b"", 0).unwrap();
        build::sync(to);
        build::parse(to, b"", b"SELECT 1", &[]).unwrap();
        build::sync(to);
    });
    from_client(&mut session, &asked, 1000);
    let first = bytes(|to| {
        build::parse_complete(to);
        build::bind_complete(to);
        build::command_complete(to, "INSERT 0 1").unwrap();
    });
    let (idle, parsed) = (ready(TransactionStatus::Idle), bytes(build::parse_complete));
    let answer = [&first[..], &canceled_wait(), &idle, &parsed, &idle].concat();
    let (_, left) = without_error(&from_server(&mut session, &answer, 1000));
    assert_eq!(left, [&first[..], &idle, &parsed, &idle].concat());
    assert!(session.is_clean());
}

#[test]
fn what_is_lost_with_a_server_is_told_as_it_is() {
    let mut session = Session::new();
    assert_eq!(session.lost(), Lost::Nothing);
    from_client(&mut session, &query("INSERT INTO t VALUES (1)"), 1000);
    assert_eq!(session.lost(), Lost::Unknown, "it commits by itself");

    let open = [complete("BEGIN"), ready(TransactionStatus::InTransaction)].concat();
    for (text, lost) in [
        ("INSERT INTO t VALUES (1)", Lost::Transaction),
        ("  select ';'", Lost::Unknown),
        ("COMMIT", Lost::Unknown),
        ("end;", Lost::Unknown),
        ("PREPARE TRANSACTION 'x'", Lost::Unknown),
        ("INSERT INTO t VALUES (1); COMMIT", Lost::Unknown),
        ("/* x */ COMMIT", Lost::Unknown),
        ("ROLLBACK", Lost::Transaction),
        ("SAVEPOINT s;", Lost::Transaction),
    ] {
        let mut session = Session::new();
        from_client(&mut session, &query("BEGIN"), 1000);
        from_server(&mut session, &open, 1000);
        assert_eq!(session.lost(), Lost::Transaction);
        from_client(&mut session, &query(text), 1000);
        assert_eq!(session.lost(), lost, "{text}");
    }

    let mut session = Session::new();
    from_client(&mut session, &query("BEGIN"), 1000);
    from_server(&mut session, &open, 1000);
    // A query of which a part was sent.
    from_client(&mut session, &query("INSERT INTO t VALUES (1)")[..12], 1000);
    assert_eq!(session.lost(), Lost::Unknown);
}

/// `FATAL` with SQLSTATE 57P01, as a backend reports it from there.
fn shut_down(routine: &str) -> Vec<u8> {
    report(b'E', &[(b'S', "FATAL"), (b'V', "FATAL"), (b'C', "57P01"), (b'M', "no"), (b'R', routine)])
}

#[test]
fn a_server_that_tells_of_its_own_end_alone_is_not_passed_on() {
    let idle = [complete("SELECT 0"), ready(TransactionStatus::Idle)].concat();
    let open = [complete("BEGIN"), ready(TransactionStatus::InTransaction)].concat();
    // What was answered before, what is asked then and how far it was answered, and what is true of it.
    type Case<'a> = (&'a [u8], &'a str, &'a [u8], &'a str, Lost);
    let cases: [Case<'_>; 8] = [
        (&idle, "INSERT INTO t VALUES (1)", b"", "secure_read", Lost::Unbegun),
        (&idle, "INSERT INTO t VALUES (1)", &complete("INSERT 0 1"), "secure_read", Lost::Unknown),
        (&idle, "INSERT INTO t VALUES (1)", b"", "secure_write", Lost::Unknown),
        (&open, "COMMIT", b"", "secure_read", Lost::Transaction),
        (&open, "COMMIT", &complete("COMMIT"), "secure_read", Lost::Unknown),
        (&open, "SELECT 1", b"", "secure_read", Lost::Transaction),
        (&open, "", b"", "secure_read", Lost::Transaction),
        (&idle, "", b"", "secure_read", Lost::Nothing),
    ];
    for (before, asked, answered, routine, lost) in cases {
        let mut session = Session::new();
        from_client(&mut session, &query("SELECT 0"), 1000);
        from_server(&mut session, before, 1000);
        if !asked.is_empty() {
            from_client(&mut session, &query(asked), 1000);
        }
        let said = [answered, &shut_down(routine)].concat();
        assert_eq!(from_server(&mut session, &said, 1000), answered, "{asked}");
        assert!(!session.server_has_ended() && session.can_be_told());
        assert_eq!(session.lost(), lost, "{asked} {routine}");
    }
    // An administrator's word is for the client, unless the primary is drained.
    let word = shut_down("ProcessInterrupts");
    let mut session = Session::new();
    assert_eq!(from_server(&mut session, &word, 1000), word);
    assert!(session.server_has_ended());
    let mut session = Session::new();
    session.expect_shutdown(true);
    from_client(&mut session, &query("SELECT 1"), 1000);
    assert_eq!(from_server(&mut session, &word, 1000), b"");
    assert_eq!(session.lost(), Lost::Unknown);
}

#[test]
fn nothing_is_said_in_the_middle_of_a_message() {
    let mut session = Session::new();
    from_client(&mut session, &query("SELECT x FROM t"), 1000);
    let row = rows(1);
    let notice = report(b'N', &[(b'M', "hello")]);
    let answer = [&row[..], &notice, &complete("SELECT 1"), &ready(TransactionStatus::Idle)].concat();
    let mut edited = BytesMut::new();
    let mut unread = Vec::new();
    // Byte by byte: it may be told exactly where what it has heard ends with a message.
    let mut heard = Vec::new();
    for byte in answer {
        unread.push(byte);
        edited.clear();
        let passed = session.from_server(&unread, &mut edited).unwrap();
        match passed.pass {
            Pass::AsItCame(bytes) => heard.extend_from_slice(bytes),
            Pass::Edited => heard.extend_from_slice(&edited),
        }
        let taken = passed.taken_bytes;
        unread.drain(..taken);
        let mut scanner = Scanner::new(Side::Server, Phase::Session);
        let mut input = &heard[..];
        while let Some(piece) = scanner.next(&mut input).unwrap() {
            let _ = piece;
        }
        let between = scanner.body_left_bytes() == 0 && input.is_empty();
        assert_eq!(session.can_be_told(), between, "after {} bytes", heard.len());
    }
}

#[test]
fn bytes_that_are_no_messages_end_a_session() {
    let mut edited = BytesMut::new();
    let fault = Session::new().from_client(b"\x01\0\0\0\x04", &mut edited, &mut BytesMut::new()).unwrap_err();
    assert!(matches!(fault, Fault::Client { sqlstate: SqlState::PROTOCOL_VIOLATION, .. }), "{fault:?}");
    let fault = Session::new().from_client(b"D\0\0\0\x05x", &mut edited, &mut BytesMut::new()).unwrap_err();
    assert!(matches!(fault, Fault::Client { sqlstate: SqlState::PROTOCOL_VIOLATION, .. }), "{fault:?}");
    let unasked = complete("SELECT 1");
    assert!(matches!(Session::new().from_server(&unasked, &mut edited), Err(Fault::Server(_))));
}

#[test]
fn who_pipelines_without_end_waits() {
    let mut session = Session::new();
    let syncs: Vec<u8> = (0..20_000).flat_map(|_| bytes(build::sync)).collect();
    let mut edited = BytesMut::new();
    let passed = session.from_client(&syncs, &mut edited, &mut BytesMut::new()).unwrap();
    assert_eq!(passed.taken_bytes, pgherd_pgwire::flow::MAX_OUTSTANDING * HEADER_BYTES);
    assert!(!session.has_room());
    from_server(&mut session, &ready(TransactionStatus::Idle), 1000);
    assert!(session.has_room());
}

proptest! {
    /// However a conversation is cut, the same is passed on.
    #[test]
    fn pieces_make_no_difference(most in 1usize..60, count in 0usize..20, long in 0usize..40_000) {
        let text = format!("SELECT '{}'", "x".repeat(long));
        let asked = [query(&text), query("COPY t FROM STDIN"), bytes(|to| {
            build::copy_data(to, b"a row").unwrap();
            build::copy_data(to, &vec![b'y'; long]).unwrap();
            build::copy_done(to);
        })].concat();
        let mut session = Session::new();
        prop_assert_eq!(from_client(&mut session, &asked, most), asked);
        let copy_in = vec![b'G', 0, 0, 0, 7, 0, 0, 0];
        let notice = report(b'N', &[(b'M', &"z".repeat(long))]);
        let failed = report(b'E', &[(b'V', "ERROR"), (b'M', &"e".repeat(long))]);
        let answer = [rows(count), notice, failed, ready(TransactionStatus::Idle), copy_in,
            complete("COPY 2"), ready(TransactionStatus::Idle)].concat();
        prop_assert_eq!(from_server(&mut session, &answer, most), answer);
        prop_assert!(session.is_clean());
    }
}
