//! Sessions that share servers, message by message, and the same cut into pieces.

use pgherd_pgwire::message::TransactionStatus;
use proptest::prelude::*;

use super::*;
use crate::session::Pass;
use crate::sql::Tie;
use crate::statements::MAX_GATHERED_BYTES;

fn bytes(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut to = BytesMut::new();
    write(&mut to);
    to.to_vec()
}

fn parse(name: &str, text: &str) -> Vec<u8> {
    bytes(|to| build::parse(to, name.as_bytes(), text.as_bytes(), &[23]).unwrap())
}

fn bind(statement: &str) -> Vec<u8> {
    let out = build::BindOut {
        portal: b"p",
        statement: statement.as_bytes(),
        values: &[Some(b"a value")],
        ..Default::default()
    };
    bytes(|to| build::bind(to, &out).unwrap())
}

fn describe(statement: &str) -> Vec<u8> {
    bytes(|to| build::describe(to, Target::Statement, statement.as_bytes()).unwrap())
}

fn close(statement: &str) -> Vec<u8> {
    bytes(|to| build::close(to, Target::Statement, statement.as_bytes()).unwrap())
}

fn execute() -> Vec<u8> {
    bytes(|to| build::execute(to, b"p", 0).unwrap())
}

fn query(text: &str) -> Vec<u8> {
    bytes(|to| build::query(to, text.as_bytes()).unwrap())
}

fn sync() -> Vec<u8> {
    bytes(build::sync)
}

fn ready() -> Vec<u8> {
    bytes(|to| build::ready_for_query(to, TransactionStatus::Idle))
}

fn error() -> Vec<u8> {
    let body = b"SERROR\0VERROR\0C42P01\0Mno\0\0";
    [&Header { kind: b'E', body_bytes: body.len() as u32 }.to_bytes()[..], body].concat()
}

/// A client and its server, and pieces of at most so many bytes on the way between them.
struct Pair {
    session: Session,
    most: usize,
}

impl Pair {
    fn new(most: usize) -> Pair {
        let mut session = Session::sharing(Mode::Transaction, Arc::default());
        session.attach(fresh());
        Pair { session, most }
    }

    /// What the server gets, and what the client is answered at once.
    fn asks(&mut self, parts: &[Vec<u8>]) -> (Vec<u8>, Vec<u8>) {
        let (mut answers, session) = (BytesMut::new(), &mut self.session);
        let to_server = pieces(&parts.concat(), self.most, |chunk, edited| {
            let passed = session.from_client(chunk, edited, &mut answers).unwrap();
            (owned(passed.pass), passed.taken_bytes)
        });
        (to_server, answers.to_vec())
    }

    /// What the client gets.
    fn answers(&mut self, parts: &[Vec<u8>]) -> Vec<u8> {
        let session = &mut self.session;
        pieces(&parts.concat(), self.most, |chunk, edited| {
            let passed = session.from_server(chunk, edited).unwrap();
            (owned(passed.pass), passed.taken_bytes)
        })
    }

    /// From now on it has another server.
    fn moves(&mut self) -> Known {
        assert!(self.session.is_over());
        let known = self.session.detach().unwrap().known;
        self.session.attach(fresh());
        known
    }
}

fn fresh() -> Loan {
    Loan::new(Known::new(3), 0)
}

fn owned(pass: Pass<'_>) -> Option<Vec<u8>> {
    match pass {
        Pass::AsItCame(bytes) => Some(bytes.to_vec()),
        Pass::Edited => None,
    }
}

fn pieces(
    stream: &[u8],
    most: usize,
    mut show: impl FnMut(&[u8], &mut BytesMut) -> (Option<Vec<u8>>, usize),
) -> Vec<u8> {
    let (mut passed, mut pending) = (Vec::new(), Vec::new());
    for piece in stream.chunks(most) {
        pending.extend_from_slice(piece);
        let mut edited = BytesMut::new();
        let (as_it_came, taken) = show(&pending, &mut edited);
        passed.extend_from_slice(&as_it_came.unwrap_or_else(|| edited.to_vec()));
        pending.drain(..taken);
    }
    passed
}

/// The types of messages.
fn kinds(mut stream: &[u8]) -> String {
    let mut kinds = String::new();
    while let Some((&kind, rest)) = stream.split_first() {
        let length = u32::from_be_bytes(*rest.first_chunk().unwrap()) as usize;
        kinds.push(char::from(kind));
        stream = &rest[length..];
    }
    kinds
}

const PIECES: [usize; 4] = [usize::MAX >> 1, 64, 7, 1];

fn done(kinds: &[u8]) -> Vec<u8> {
    kinds.iter().flat_map(|kind| Header { kind: *kind, body_bytes: 0 }.to_bytes()).collect()
}

fn complete(tag: &str) -> Vec<u8> {
    bytes(|to| build::command_complete(to, tag).unwrap())
}

#[test]
fn a_statement_has_the_name_that_all_share() {
    for most in PIECES {
        let mut pair = Pair::new(most);
        let (asked, answered) =
            pair.asks(&[parse("mine", "SELECT $1"), describe("mine"), bind("mine"), execute(), sync()]);
        let expected =
            [parse("pgherd_1", "SELECT $1"), describe("pgherd_1"), bind("pgherd_1"), execute(), sync()];
        assert_eq!((asked, answered), (expected.concat(), Vec::new()), "{most}");
        let answers = [done(b"12"), complete("SELECT 1"), ready()];
        let described =
            [done(b"1"), bytes(|to| build::parameter_description(to, &[23]).unwrap()), done(b"n2")];
        let answers = [&described[..], &answers[1..]].concat();
        assert_eq!(pair.answers(&answers), answers.concat());

        // The same server knows it, whoever asks for it by whatever name.
        let (asked, answered) = pair.asks(&[parse("other", "SELECT $1"), bind("other"), sync()]);
        assert_eq!(asked, [bind("pgherd_1"), sync()].concat());
        // At once if the server has nothing to say, or else with what it says next.
        let answered = [answered, pair.answers(&[done(b"2"), ready()])].concat();
        assert_eq!(answered, [done(b"12"), ready()].concat());

        // Another one does not.
        pair.moves();
        let (asked, _) = pair.asks(&[bind("mine"), execute(), sync()]);
        assert_eq!(asked, [parse("pgherd_1", "SELECT $1"), bind("pgherd_1"), execute(), sync()].concat());
        let answers = [done(b"2"), complete("SELECT 1"), ready()].concat();
        assert_eq!(
            pair.answers(&[done(b"1"), answers.clone()]),
            answers,
            "what it did not ask for it does not hear"
        );
        assert!(pair.session.is_over() && pair.session.take_effects().is_none());
    }
}

#[test]
fn an_answer_of_the_proxys_own_comes_when_it_is_its_turn() {
    for most in PIECES {
        let mut pair = Pair::new(most);
        pair.asks(&[parse("a", "SELECT 1"), sync()]);
        pair.answers(&[done(b"1"), ready()]);
        let (asked, answered) =
            pair.asks(&[bind("a"), execute(), parse("b", "SELECT 1"), close("a"), bind("b"), sync()]);
        assert_eq!(kinds(&asked), "BEBS");
        assert_eq!(answered, Vec::<u8>::new());
        let answers = pair.answers(&[done(b"2"), complete("SELECT 1"), done(b"2"), ready()]);
        assert_eq!(kinds(&answers), "2C132Z", "{most}");
        // Closed for the client, and kept for everybody else.
        let (asked, _) = pair.asks(&[bind("a"), sync()]);
        assert_eq!(asked, [bind("a"), sync()].concat());
        pair.answers(&[error(), ready()]);
        // Nothing but answers of the proxy's own.
        let (asked, answered) = pair.asks(&[close("b"), parse("c", "SELECT 1")]);
        assert_eq!((asked.len(), kinds(&answered).as_str()), (0, "31"));
        assert!(pair.session.is_over());
    }
}

#[test]
fn what_the_server_skips_has_not_happened() {
    for most in PIECES {
        let mut pair = Pair::new(most);
        pair.asks(&[parse("a", "SELECT 1"), sync()]);
        pair.answers(&[done(b"1"), ready()]);
        let (asked, answered) =
            pair.asks(&[bind("a"), close("a"), parse("a", "SELECT 2"), parse("b", "SELECT 3"), sync()]);
        assert_eq!((kinds(&asked).as_str(), answered.len()), ("BPPS", 0));
        assert_eq!(kinds(&pair.answers(&[error(), ready()])), "EZ");
        let (asked, _) = pair.asks(&[bind("a"), bind("b"), sync()]);
        assert_eq!(asked, [bind("pgherd_1"), bind("b"), sync()].concat(), "as it was before");
        pair.answers(&[done(b"2"), error(), ready()]);
        // Whether the server has it nobody knows.
        let (asked, _) = pair.asks(&[parse("b", "SELECT 3"), sync()]);
        assert_eq!(asked, [close("pgherd_3"), parse("pgherd_3", "SELECT 3"), sync()].concat());
        assert_eq!(kinds(&pair.answers(&[done(b"31"), ready()])), "1Z");
        // A server that is skipping is sent what the client says.
        pair.asks(&[bind("no"), bytes(build::flush)]);
        pair.answers(&[error()]);
        let (asked, answered) = pair.asks(&[parse("x", "SELECT 1"), close("b"), sync()]);
        assert_eq!((kinds(&asked).as_str(), answered.len()), ("PCS", 0));
        assert_eq!(kinds(&pair.answers(&[ready()])), "Z");
        assert!(pair.session.is_over());
    }
}

#[test]
fn a_server_is_nobody_elses_in_the_middle_of_what_it_says() {
    let setting = bytes(|to| build::parameter_status(to, b"TimeZone", b"UTC").unwrap());
    for at in 0..=setting.len() {
        let mut pair = Pair::new(usize::MAX >> 1);
        pair.asks(&[query("SELECT 1")]);
        let mut unread = [complete("SELECT 1"), ready(), setting[..at].to_vec()].concat();
        let mut edited = BytesMut::new();
        let taken = pair.session.from_server(&unread, &mut edited).unwrap().taken_bytes;
        assert_eq!(pair.session.is_over(), at == 0 || at == setting.len(), "{at} bytes of the next message");
        unread.drain(..taken);
        unread.extend_from_slice(&setting[at..]);
        pair.session.from_server(&unread, &mut edited).unwrap();
        assert!(pair.session.is_over());
    }
}

#[test]
fn what_a_server_reports_again_and_again_is_kept_once() {
    let mut pair = Pair::new(64);
    pair.asks(&[query("SELECT 1")]);
    let report = |name: usize, value: usize| {
        bytes(|to| {
            build::parameter_status(to, name.to_string().as_bytes(), value.to_string().as_bytes()).unwrap();
        })
    };
    for value in 0..1000 {
        pair.answers(&[report(0, value)]);
    }
    pair.answers(&[complete("SELECT 1"), ready()]);
    assert_eq!(pair.session.detach().unwrap().noted, [(b"0".to_vec(), b"999".to_vec())]);
    let all: Vec<u8> = (0..1000).flat_map(|name| report(name, 0)).collect();
    let fault = pair.session.from_server(&all, &mut BytesMut::new()).unwrap_err();
    assert!(matches!(fault, Fault::Server(_)), "{fault:?}");
}

#[test]
fn in_a_transaction_that_has_failed_the_server_says_so() {
    let status = |status| bytes(|to| build::ready_for_query(to, status));
    let mut pair = Pair::new(64);
    pair.asks(&[parse("a", "SELECT 1"), sync()]);
    pair.answers(&[done(b"1"), ready()]);
    pair.asks(&[query("BEGIN"), query("broken")]);
    let begun = [complete("BEGIN"), status(TransactionStatus::InTransaction)].concat();
    pair.answers(&[begun, error(), status(TransactionStatus::Failed)]);
    // It has that text, and would refuse it now.
    let (asked, answered) = pair.asks(&[parse("b", "SELECT 1"), sync()]);
    let again = [close("pgherd_1"), parse("pgherd_1", "SELECT 1"), sync()].concat();
    assert_eq!((asked, answered.len()), (again, 0));
    let refused = pair.answers(&[done(b"3"), error(), status(TransactionStatus::Failed)]);
    assert_eq!(kinds(&refused), "EZ");
    pair.asks(&[query("ROLLBACK")]);
    pair.answers(&[complete("ROLLBACK"), ready()]);
    // It is not the client's, and whether the server has it nobody knows.
    assert_eq!(pair.asks(&[bind("b"), sync()]).0, [bind("b"), sync()].concat());
    pair.answers(&[error(), ready()]);
    assert_eq!(kinds(&pair.asks(&[bind("a"), sync()]).0), "CPBS");
}

#[test]
fn a_statement_without_a_name_moves_too() {
    for most in PIECES {
        let mut pair = Pair::new(most);
        let (asked, _) = pair.asks(&[parse("", "SELECT 1"), sync()]);
        assert_eq!(asked, [parse("", "SELECT 1"), sync()].concat());
        pair.answers(&[done(b"1"), ready()]);
        let (asked, _) = pair.asks(&[bind(""), sync()]);
        assert_eq!(kinds(&asked), "BS");
        pair.answers(&[done(b"2"), ready()]);
        pair.moves();
        let (asked, _) = pair.asks(&[bind(""), sync()]);
        assert_eq!(asked, [parse("", "SELECT 1"), bind(""), sync()].concat());
        assert_eq!(kinds(&pair.answers(&[done(b"12"), ready()])), "2Z");
        // A simple query forgets it, wherever it is.
        pair.asks(&[query("SELECT 2")]);
        pair.answers(&[complete("SELECT 1"), ready()]);
        pair.moves();
        let (asked, _) = pair.asks(&[bind(""), sync()]);
        assert_eq!(kinds(&asked), "BS");
    }
}

#[test]
fn statements_that_are_too_many_are_closed_and_come_back() {
    let mut pair = Pair::new(64);
    for number in 1..=4 {
        pair.asks(&[parse(&format!("s{number}"), &format!("SELECT {number}")), sync()]);
        let closes = if number > 3 { done(b"13") } else { done(b"1") };
        assert_eq!(kinds(&pair.answers(&[closes, ready()])), "1Z");
    }
    let (asked, _) = pair.asks(&[bind("s1"), sync()]);
    let again = [parse("pgherd_1", "SELECT 1"), close("pgherd_2"), bind("pgherd_1"), sync()];
    assert_eq!(asked, again.concat());
    assert_eq!(kinds(&pair.answers(&[done(b"132"), ready()])), "2Z");
}

#[test]
fn a_client_that_deallocates_by_sql_loses_its_own_statement() {
    for most in PIECES {
        let mut pair = Pair::new(most);
        pair.asks(&[parse("a", "SELECT 1"), sync()]);
        pair.answers(&[done(b"1"), ready()]);
        let (asked, answered) = pair.asks(&[query("DEALLOCATE a")]);
        assert_eq!((asked.len(), answered), (0, [complete("DEALLOCATE"), ready()].concat()));
        let (asked, _) = pair.asks(&[bind("a"), sync()]);
        assert_eq!(asked, [bind("a"), sync()].concat());
        pair.answers(&[error(), ready()]);

        pair.asks(&[parse("b", "SELECT 1"), sync()]);
        pair.answers(&[ready()]);
        pair.moves();
        let (asked, _) = pair.asks(&[parse("", "DEALLOCATE b"), bind(""), execute(), sync()]);
        let text = bytes(|to| build::parse(to, b"", b"DEALLOCATE pgherd_1", &[]).unwrap());
        assert_eq!(asked, [parse("pgherd_1", "SELECT 1"), text, bind(""), execute(), sync()].concat());
        assert_eq!(kinds(&pair.answers(&[done(b"112"), complete("DEALLOCATE"), ready()])), "12CZ");

        pair.asks(&[parse("c", "SELECT 1"), sync()]);
        pair.answers(&[done(b"31"), ready()]);
        pair.asks(&[query("DISCARD ALL")]);
        pair.answers(&[complete("DISCARD ALL"), ready()]);
        let (asked, _) = pair.asks(&[bind("c"), sync()]);
        assert_eq!(asked, [bind("c"), sync()].concat());
    }
}

#[test]
fn what_a_transaction_may_leave_behind_is_told_when_it_is_over() {
    for most in PIECES {
        let mut pair = Pair::new(most);
        pair.asks(&[query("BEGIN")]);
        pair.answers(&[
            complete("BEGIN"),
            bytes(|to| build::ready_for_query(to, TransactionStatus::InTransaction)),
        ]);
        assert!(!pair.session.is_over());
        pair.asks(&[query("SET work_mem = 1"), parse("l", "LISTEN a"), bind("l"), execute(), sync()]);
        assert!(!pair.session.is_over());
        pair.answers(&[complete("SET"), ready(), done(b"12"), complete("LISTEN"), ready()]);
        assert!(pair.session.is_over());
        let effects = pair.session.take_effects();
        assert!(effects.changed.names.contains("work_mem") && effects.ties.contains(Tie::Listen));
        assert!(!pair.session.is_over() && pair.session.take_effects().is_none());
        // Read under settings that nobody else has.
        pair.session.go_on(0);
        let (asked, _) = pair.asks(&[bind("l"), sync()]);
        assert_eq!(kinds(&asked), "CPBS");
        pair.answers(&[done(b"312"), ready()]);
        // Executed again, it has its effects again.
        assert!(pair.session.take_effects().ties.contains(Tie::Listen));
    }
}

#[test]
fn a_question_of_the_proxys_own_does_not_take_the_place_of_the_statement_without_a_name() {
    for most in PIECES {
        let mut pair = Pair::new(most);
        pair.asks(&[parse("", "SELECT 1"), bind(""), execute(), sync()]);
        pair.answers(&[done(b"12"), complete("SELECT 1"), ready()]);
        // What it left behind was asked for, and it keeps its server.
        pair.session.lost_unnamed();
        pair.session.go_on(0);
        let (asked, _) = pair.asks(&[bind(""), execute(), sync()]);
        assert_eq!(asked, [parse("", "SELECT 1"), bind(""), execute(), sync()].concat());
        // That it was parsed once more is the proxy's own business.
        let heard = pair.answers(&[done(b"12"), complete("SELECT 1"), ready()]);
        assert_eq!(heard, [done(b"2"), complete("SELECT 1"), ready()].concat());
        let (asked, _) = pair.asks(&[bind(""), execute(), sync()]);
        assert_eq!(asked, [bind(""), execute(), sync()].concat(), "it is its own again");
    }
}

#[test]
fn what_has_committed_is_answered_in_the_lost_servers_place() {
    let in_transaction = || bytes(|to| build::ready_for_query(to, TransactionStatus::InTransaction));
    for most in PIECES {
        for (asked, heard, rest) in [
            (vec![query("COMMIT")], vec![], vec![complete("COMMIT"), ready()]),
            (vec![query("commit work;")], vec![complete("COMMIT")], vec![ready()]),
            (
                vec![parse("c", "COMMIT"), bind("c"), execute(), sync()],
                vec![],
                vec![done(b"12"), complete("COMMIT"), ready()],
            ),
            (
                vec![parse("", "END"), bind(""), execute(), sync()],
                vec![done(b"12")],
                vec![complete("COMMIT"), ready()],
            ),
        ] {
            let mut pair = Pair::new(most);
            pair.asks(&[query("BEGIN")]);
            pair.answers(&[complete("BEGIN"), in_transaction()]);
            assert!(pair.session.commits(&asked.concat()), "{asked:?}");
            pair.asks(&asked);
            pair.answers(&heard);
            let mut answers = BytesMut::new();
            assert!(pair.session.committed(&mut answers));
            assert_eq!(answers, rest.concat(), "{asked:?}");
            assert!(
                pair.session.is_clean() && !pair.session.committed(&mut answers),
                "there is no other one"
            );
        }
    }
    // More than that is no commit alone.
    let session = Pair::new(PIECES[0]).session;
    for more in [
        vec![query("COMMIT AND CHAIN")],
        vec![query("ROLLBACK")],
        vec![query("INSERT INTO t VALUES (1); COMMIT")],
        vec![parse("", "COMMIT"), bind(""), execute()],
        vec![parse("", "COMMIT"), bind(""), execute(), bind(""), execute(), sync()],
        vec![parse("", "COMMIT"), bind("other"), execute(), sync()],
        vec![parse("", "COMMIT"), parse("s", "SELECT 1"), bind("s"), execute(), sync()],
    ] {
        assert!(!session.commits(&more.concat()), "{more:?}");
    }
}

#[test]
fn a_transaction_begins_with_its_first_statement() {
    let in_transaction = || bytes(|to| build::ready_for_query(to, TransactionStatus::InTransaction));
    for most in PIECES {
        let mut pair = Pair::new(most);
        let mut answers = BytesMut::new();
        let begin = query("BEGIN READ ONLY");
        let taken = pair.session.answer_without_server(&[&begin[..], b"Q"].concat(), &mut answers);
        assert_eq!(taken, Some(begin.len()));
        assert_eq!(&answers[..], [complete("BEGIN"), in_transaction()].concat());
        assert_eq!(
            pair.session.answer_without_server(&begin, &mut answers),
            None,
            "PostgreSQL warns of the second"
        );
        pair.session.attach(fresh());
        let (asked, _) = pair.asks(&[bind("a"), sync()]);
        assert_eq!(asked, [begin.clone(), bind("a"), sync()].concat());
        assert_eq!(pair.session.lost(), crate::session::Lost::Transaction);
        let answers = pair.answers(&[complete("BEGIN"), in_transaction(), done(b"2"), in_transaction()]);
        assert_eq!(answers, [done(b"2"), in_transaction()].concat());
        assert!(!pair.session.is_over());
        assert_eq!(kinds(&pair.asks(&[query("COMMIT")]).0), "Q");
        pair.answers(&[complete("COMMIT"), ready()]);
        assert!(pair.session.is_over());

        // One in which nothing happened needs no server at all.
        for (end, tag) in [("END", "COMMIT"), ("ROLLBACK", "ROLLBACK")] {
            let mut answers = BytesMut::new();
            pair.session.answer_without_server(&begin, &mut answers).unwrap();
            answers.clear();
            pair.session.answer_without_server(&query(end), &mut answers).unwrap();
            assert_eq!(&answers[..], [complete(tag), ready()].concat());
            assert_eq!(pair.session.answer_without_server(&query(end), &mut answers), None);
        }
        assert_eq!(
            pair.session.answer_without_server(&begin[..9], &mut BytesMut::new()),
            None,
            "it is not all there"
        );
    }
}

#[test]
fn a_pipeline_without_end_is_taken_as_there_is_room() {
    // Far more requests than can be outstanding, and nothing but the last of them is answered without it.
    const MANY: usize = 20_000;
    for most in [usize::MAX >> 1, 1 << 16, 61] {
        let mut pair = Pair::new(most);
        pair.asks(&[parse("a", "SELECT 1"), sync()]);
        pair.answers(&[done(b"1"), ready()]);
        let pipeline = [bind("a"), execute()].concat().repeat(MANY);
        let expected = [bind("pgherd_1"), execute()].concat().repeat(MANY);
        let answers = [done(b"2"), complete("SELECT 1")].concat();
        let (mut asked, mut pending, mut answered) = (Vec::new(), pipeline.as_slice(), 0);
        while !pending.is_empty() {
            let mut edited = BytesMut::new();
            let chunk = &pending[..pending.len().min(most)];
            let passed = pair.session.from_client(chunk, &mut edited, &mut BytesMut::new()).unwrap();
            let taken = passed.taken_bytes;
            asked.extend(owned(passed.pass).unwrap_or_else(|| edited.to_vec()));
            pending = &pending[taken..];
            // The server answers what it was asked so far.
            if !pair.session.has_room() || taken < chunk.len() {
                let whole = kinds_whole(&asked) / 2;
                pair.answers(&[answers.repeat(whole - answered)]);
                answered = whole;
            }
        }
        assert!(asked == expected, "{most}: {} {}", asked.len(), expected.len());
    }
}

/// How many whole messages there are.
fn kinds_whole(mut stream: &[u8]) -> usize {
    let mut count = 0;
    while stream.len() > 4 {
        let length = u32::from_be_bytes(*stream[1..].first_chunk().unwrap()) as usize + 1;
        if stream.len() < length {
            break;
        }
        stream = &stream[length..];
        count += 1;
    }
    count
}

#[test]
fn behind_a_copy_that_may_end_in_doubt_everything_waits() {
    let copy_in = || [&Header { kind: b'G', body_bytes: 3 }.to_bytes()[..], &[0, 0, 0]].concat();
    for most in PIECES {
        let mut pair = Pair::new(most);
        pair.asks(&[parse("a", "COPY t FROM STDIN"), bind("a"), execute(), sync()]);
        pair.answers(&[done(b"12"), copy_in()]);
        let data = bytes(|to| build::copy_data(to, b"bad").unwrap());
        let end = [data, bytes(build::copy_done), sync()].concat();
        let mut edited = BytesMut::new();
        let behind = [end.clone(), close("a"), sync()].concat();
        let mut answers = BytesMut::new();
        let passed = pair.session.from_client(&behind, &mut edited, &mut answers).unwrap();
        assert_eq!((passed.taken_bytes, answers.len()), (end.len(), 0));
        assert!(!pair.session.has_room());
        // It failed, and whether the first Sync was read nobody knows: the server answers what comes.
        assert_eq!(kinds(&pair.answers(&[error(), ready()])), "EZ");
        assert!(pair.session.has_room());
        let (asked, answered) = pair.asks(&[close("a"), parse("b", "COPY t FROM STDIN"), bind("b"), sync()]);
        assert_eq!((kinds(&asked).as_str(), answered.len()), ("CPBS", 0));
        assert_eq!(kinds(&pair.answers(&[done(b"312"), ready()])), "312Z");
        assert!(!pair.session.is_over(), "nobody else gets such a server");
    }
}

#[test]
fn a_few_bytes_do_not_become_many_at_once() {
    const LONG: usize = 100_000;
    const BINDS: usize = 400;
    let mut pair = Pair::new(1 << 16);
    for name in ["a", "b", "c", "d"] {
        pair.asks(&[parse(name, &format!("SELECT '{name}{}'", " ".repeat(LONG))), sync()]);
        let closed = if name == "d" { done(b"13") } else { done(b"1") };
        pair.answers(&[closed, ready()]);
    }
    // One more than the server keeps, so that each of them is parsed again.
    let binds: Vec<u8> = (0..BINDS).flat_map(|at| bind(["a", "b", "c", "d"][at % 4])).collect();
    let (mut pending, mut sent, mut calls) = (binds.as_slice(), Vec::new(), 0);
    while !pending.is_empty() {
        let mut edited = BytesMut::new();
        let passed = pair.session.from_client(pending, &mut edited, &mut BytesMut::new()).unwrap();
        assert!(passed.taken_bytes > 0 && edited.len() < MAX_EDITED_BYTES + 2 * LONG, "{}", edited.len());
        pending = &pending[passed.taken_bytes..];
        sent.extend(owned(passed.pass).unwrap_or_else(|| edited.to_vec()));
        calls += 1;
    }
    assert_eq!(kinds(&sent), "PCB".repeat(BINDS));
    assert!(calls > BINDS * LONG / (2 * MAX_EDITED_BYTES), "{calls}");
}

#[test]
fn in_doubt_nothing_is_remembered_that_nobody_will_settle() {
    let copy_in = [&Header { kind: b'G', body_bytes: 3 }.to_bytes()[..], &[0, 0, 0]].concat();
    let mut pair = Pair::new(usize::MAX >> 1);
    pair.asks(&[parse("a", "COPY t FROM STDIN"), bind("a"), execute(), sync()]);
    pair.answers(&[done(b"12"), copy_in]);
    pair.asks(&[sync()]);
    pair.answers(&[error()]);
    for _ in 0..100 {
        pair.asks(&[bind("a"), parse("", "SELECT 1"), close("")]);
    }
    let shared = pair.session.shared.as_ref().unwrap();
    assert_eq!((shared.used.len(), shared.names.open_changes()), (0, 0));
}

#[test]
fn a_long_query_goes_by_and_is_searched() {
    let long = |word: &str| {
        let text = format!("SELECT '{} {word} '", " ".repeat(2 * MAX_QUERY_BYTES as usize));
        bytes(|to| build::query(to, text.as_bytes()).unwrap())
    };
    for most in [usize::MAX >> 1, 1 << 16, 4099] {
        let mut pair = Pair::new(most);
        for (word, matters) in [("none", false), ("pg_advisory_lock", true)] {
            let asked = long(word);
            assert!(pair.asks(std::slice::from_ref(&asked)).0 == asked);
            pair.answers(&[complete("SELECT 1"), ready()]);
            assert_eq!(pair.session.take_effects().unmovable.is_some(), matters, "{word} {most}");
        }
    }
}

#[test]
fn long_statements_that_are_not_whole_have_room_together() {
    let registry: Arc<Registry> = Arc::default();
    let client = || {
        let mut session = Session::sharing(Mode::Transaction, Arc::clone(&registry));
        session.attach(fresh());
        session
    };
    let long = parse("s", &"x".repeat(MAX_STATEMENT_BYTES as usize - 100));
    let (first, rest) = long.split_at(1000);
    let say = |session: &mut Session, bytes: &[u8]| {
        session.from_client(bytes, &mut BytesMut::new(), &mut BytesMut::new()).map(|_| ())
    };
    let mut clients: Vec<Session> =
        (0..MAX_GATHERED_BYTES / MAX_STATEMENT_BYTES as usize).map(|_| client()).collect();
    assert!(clients.iter_mut().all(|client| say(client, first).is_ok()));
    let refused = say(&mut client(), first).unwrap_err();
    assert!(matches!(refused, Fault::Client { sqlstate: SqlState::OUT_OF_MEMORY, .. }), "{refused:?}");
    assert!(say(&mut client(), &parse("s", &"x".repeat(60_000))[..1000]).is_ok(), "a short one needs none");
    // There is room again when one is whole, and when a client goes.
    assert!(say(&mut clients[0], rest).is_ok() && say(&mut client(), first).is_ok());
    let mut others = [client(), client()];
    assert!(say(&mut others[0], first).is_ok() && say(&mut others[1], first).is_err());
    clients.pop();
    assert!(say(&mut client(), first).is_ok());
}

#[test]
fn names_that_only_the_proxy_gives_are_nobodys() {
    let mut pair = Pair::new(64);
    let mut edited = BytesMut::new();
    let fault = pair.session.from_client(&bind("pgherd_7"), &mut edited, &mut BytesMut::new()).unwrap_err();
    assert!(matches!(fault, Fault::Client { .. }), "{fault:?}");
    let endless = [&b"B\0\x01\0\0"[..], &[b'x'; 40_000]].concat();
    let mut pair = Pair::new(64);
    let fault = endless
        .chunks(1000)
        .find_map(|chunk| pair.session.from_client(chunk, &mut BytesMut::new(), &mut BytesMut::new()).err());
    assert!(matches!(fault, Some(Fault::Client { .. })), "{fault:?}");
}

#[test]
fn a_server_that_ends_before_it_was_asked_is_not_heard() {
    let fatal = b"SFATAL\0VFATAL\0C57P01\0Mterminating\0\0";
    let fatal = [&Header { kind: b'E', body_bytes: fatal.len() as u32 }.to_bytes()[..], fatal].concat();
    let mut pair = Pair::new(64);
    assert!(pair.session.is_untouched());
    assert_eq!(pair.answers(std::slice::from_ref(&fatal)), b"");
    assert!(pair.session.is_untouched());
    pair.session.detach();
    pair.session.attach(fresh());
    assert_eq!(kinds(&pair.asks(&[query("SELECT 1")]).0), "Q");
    assert!(!pair.session.is_untouched());
    assert_eq!(pair.answers(std::slice::from_ref(&fatal)), fatal);
}

/// A server by the book, as far as statements and transactions go.
struct Server {
    statements: std::collections::BTreeMap<Vec<u8>, Vec<u8>>,
    status: TransactionStatus,
    skips: bool,
    answers: Vec<u8>,
    /// The texts that were bound, and those of simple queries.
    executed: Vec<Vec<u8>>,
    /// So many of them go well until a cancel comes.
    canceled_after: Option<usize>,
}

impl Default for Server {
    fn default() -> Server {
        Server {
            statements: std::collections::BTreeMap::new(),
            status: TransactionStatus::Idle,
            skips: false,
            answers: Vec::new(),
            executed: Vec::new(),
            canceled_after: None,
        }
    }
}

impl Server {
    fn reads(&mut self, mut stream: &[u8]) {
        while let Some((&kind, rest)) = stream.split_first() {
            let length = u32::from_be_bytes(*rest.first_chunk().unwrap()) as usize;
            let body = &rest[4..length];
            stream = &rest[length..];
            self.read(ClientMessage::parse(kind, body).unwrap());
        }
    }

    fn read(&mut self, message: ClientMessage<'_>) {
        let has_failed = self.status == TransactionStatus::Failed;
        match message {
            ClientMessage::Sync => {
                self.skips = false;
                self.is_ready();
            }
            _ if self.skips => {}
            ClientMessage::Parse(parse) => {
                // The one without a name makes room for the next one.
                if parse.name.is_empty() {
                    self.statements.remove(parse.name);
                }
                // A text that says so cannot be parsed.
                if has_failed || parse.text == b"broken" || self.statements.contains_key(parse.name) {
                    return self.fails();
                }
                self.statements.insert(parse.name.to_vec(), parse.text.to_vec());
                self.answers.extend(done(b"1"));
            }
            ClientMessage::Bind(bind) => match self.statements.get(bind.statement).cloned() {
                Some(text) if !has_failed && !self.is_canceled() => {
                    self.executed.push(text);
                    self.answers.extend(done(b"2"));
                }
                _ => self.fails(),
            },
            ClientMessage::Close { name, .. } => {
                self.statements.remove(name);
                self.answers.extend(done(b"3"));
            }
            ClientMessage::Query { text } => {
                self.statements.remove(&b""[..]);
                let ends = matches!(text, b"COMMIT" | b"ROLLBACK");
                if !ends && (has_failed || text == b"broken" || text != b"BEGIN" && self.is_canceled()) {
                    self.fails();
                    self.skips = false;
                } else {
                    match text {
                        b"BEGIN" => self.status = TransactionStatus::InTransaction,
                        _ if ends => self.status = TransactionStatus::Idle,
                        _ => self.executed.push(text.to_vec()),
                    }
                    self.answers.extend(complete("OK"));
                }
                self.is_ready();
            }
            other => panic!("{other:?}"),
        }
    }

    fn is_canceled(&mut self) -> bool {
        match &mut self.canceled_after {
            Some(0) => {
                self.canceled_after = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn is_ready(&mut self) {
        let status = self.status;
        self.answers.extend(bytes(|to| build::ready_for_query(to, status)));
    }

    fn fails(&mut self) {
        self.skips = true;
        if self.status == TransactionStatus::InTransaction {
            self.status = TransactionStatus::Failed;
        }
        self.answers.extend(error());
    }

    /// Of anybody's, who may have it as it is.
    fn is_idle(&self) -> bool {
        self.status == TransactionStatus::Idle && !self.skips && self.answers.is_empty()
    }
}

#[derive(Clone, Debug)]
enum Act {
    Parse(u8, u8),
    Bind(u8),
    Close(u8),
    Query(u8),
    /// What was said so far goes on its way, without a Sync.
    Flush,
    Sync,
    /// To another server, when the transaction is over.
    Move(u8),
    /// Hits what its server does next, after so many that go well.
    Cancel(u8),
    /// The client is gone, and another one comes.
    Leave,
    /// A server dies.
    Die(u8),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0_u8..3, 0_u8..5).prop_map(|(name, text)| Act::Parse(name, text)),
        8 => (0_u8..3).prop_map(Act::Bind),
        4 => (0_u8..3).prop_map(Act::Close),
        8 => prop_oneof![Just(0_u8), Just(1), Just(2), Just(2), Just(3), Just(4)].prop_map(Act::Query),
        2 => Just(Act::Flush),
        6 => Just(Act::Sync),
        6 => (0_u8..2).prop_map(Act::Move),
        2 => (0_u8..3).prop_map(Act::Cancel),
        1 => Just(Act::Leave),
        1 => (0_u8..2).prop_map(Act::Die),
    ]
}

/// A client, the server of its own that it never has, and the one of all that it has now.
struct Guest {
    session: Session,
    own: Server,
    at: Option<usize>,
    /// Said, and not sent yet.
    asked: Vec<u8>,
}

impl Guest {
    fn new(registry: &Arc<Registry>) -> Guest {
        let session = Session::sharing(Mode::Transaction, Arc::clone(registry));
        Guest { session, own: Server::default(), at: None, asked: Vec::new() }
    }
}

/// Servers for all, with what is known of those that nobody has.
struct Servers([(Server, Option<Known>); 2]);

impl Servers {
    fn fresh() -> (Server, Option<Known>) {
        (Server::default(), Some(Known::new(2)))
    }

    /// The client gives its server back, if it may.
    fn take_back(&mut self, guest: &mut Guest) -> Result<(), TestCaseError> {
        let Some(at) = guest.at.filter(|_| guest.session.is_over()) else { return Ok(()) };
        prop_assert!(self.0[at].0.is_idle(), "a server is given away that owes something");
        guest.session.take_effects();
        self.0[at].1 = guest.session.detach().map(|loan| loan.known);
        guest.at = None;
        Ok(())
    }

    fn lend(&mut self, to: usize, guest: &mut Guest) {
        if let Some(known) = self.0[to].1.take() {
            guest.session.attach(Loan::new(known, 0));
            guest.at = Some(to);
        }
    }
}

/// What was asked goes to the server in pieces, and what that answers comes back.
fn exchange(guest: &mut Guest, servers: &mut Servers, most: usize) -> Result<(), TestCaseError> {
    let mut batch = std::mem::take(&mut guest.asked);
    let (mut heard, canceled_after) = (BytesMut::new(), guest.own.canceled_after);
    guest.own.reads(&batch);
    // One that found nothing to do is over.
    guest.own.canceled_after = None;
    // What can be answered without a server is.
    while guest.at.is_none()
        && let Some(taken) = guest.session.answer_without_server(&batch, &mut heard)
    {
        batch.drain(..taken);
    }
    if guest.at.is_none() && !batch.is_empty() {
        let free = (0..2).find(|at| servers.0[*at].1.is_some()).expect("one for each client");
        servers.lend(free, guest);
    }
    if let Some(at) = guest.at {
        let (session, server) = (&mut guest.session, &mut servers.0[at].0);
        server.executed.clear();
        server.canceled_after = canceled_after;
        let mut answers = BytesMut::new();
        let sent = pieces(&batch, most, |chunk, edited| {
            let passed = session.from_client(chunk, edited, &mut answers).unwrap();
            (owned(passed.pass), passed.taken_bytes)
        });
        heard.extend_from_slice(&answers);
        server.reads(&sent);
        server.canceled_after = None;
        let answered = std::mem::take(&mut server.answers);
        heard.extend(pieces(&answered, most, |chunk, edited| {
            let passed = session.from_server(chunk, edited).unwrap();
            (owned(passed.pass), passed.taken_bytes)
        }));
        prop_assert_eq!(&server.executed, &guest.own.executed);
    }
    prop_assert_eq!(kinds(&heard), kinds(&guest.own.answers));
    let statuses = |stream: &[u8]| {
        let ready = stream.windows(6).filter(|message| message.starts_with(b"Z\0\0\0\x05"));
        ready.map(|message| message[5]).collect::<Vec<u8>>()
    };
    prop_assert_eq!(statuses(&heard), statuses(&guest.own.answers));
    guest.own.answers.clear();
    guest.own.executed.clear();
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    /// Whatever clients do with their statements and transactions, however they are moved between servers that others
    /// have used, and whoever cancels, goes or dies meanwhile: each hears what one server of its own would have answered,
    /// the same texts are executed, and nobody is given a server that owes anything to somebody else.
    #[test]
    fn nobody_can_tell_that_servers_are_shared(
        acts in proptest::collection::vec((0_u8..2, act()), 0..120),
        most in 1_usize..40,
    ) {
        let registry = Arc::<Registry>::default();
        let mut servers = Servers([(); 2].map(|()| Servers::fresh()));
        let mut guests = [(); 2].map(|()| Guest::new(&registry));
        for (who, act) in acts {
            let guest = &mut guests[usize::from(who)];
            let name = |name: u8| ["a", "b", ""][usize::from(name)];
            match act {
                Act::Parse(at, text) => {
                    let texts = ["SELECT 1", "SELECT 2", "SELECT 3", "SELECT 4", "broken"];
                    guest.asked.extend(parse(name(at), texts[usize::from(text)]));
                }
                Act::Bind(at) => guest.asked.extend(bind(name(at))),
                Act::Close(at) => guest.asked.extend(close(name(at))),
                Act::Query(text) => {
                    // Behind what was not sent yet it ends a batch, which no driver does.
                    if guest.asked.is_empty() && !guest.own.skips {
                        let texts = ["SELECT 5", "broken", "BEGIN", "COMMIT", "ROLLBACK"];
                        let text = texts[usize::from(text)];
                        // PostgreSQL warns of a second one, or of one too many.
                        let is_idle = guest.own.status == TransactionStatus::Idle;
                        if (text == "BEGIN") == is_idle || !["BEGIN", "COMMIT", "ROLLBACK"].contains(&text) {
                            guest.asked.extend(query(text));
                            exchange(guest, &mut servers, most)?;
                        }
                    }
                }
                Act::Flush => exchange(guest, &mut servers, most)?,
                Act::Sync => {
                    guest.asked.extend(sync());
                    exchange(guest, &mut servers, most)?;
                }
                Act::Move(to) => {
                    servers.take_back(guest)?;
                    if guest.at.is_none() {
                        servers.lend(usize::from(to), guest);
                    }
                }
                Act::Cancel(after) => guest.own.canceled_after = guest.at.map(|_| usize::from(after)),
                Act::Leave => {
                    servers.take_back(guest)?;
                    if let Some(at) = guest.at {
                        // What is clean is kept once it was cleaned; what nobody knows goes with the connection.
                        let is_clean = guest.session.is_clean();
                        prop_assert!(!is_clean || servers.0[at].0.is_idle(), "it is taken for clean");
                        servers.0[at] = Servers::fresh();
                    }
                    *guest = Guest::new(&registry);
                }
                Act::Die(at) => {
                    let at = usize::from(at);
                    servers.0[at] = Servers::fresh();
                    // Whoever had it is told so, and closed.
                    for guest in guests.iter_mut().filter(|guest| guest.at == Some(at)) {
                        *guest = Guest::new(&registry);
                    }
                }
            }
        }
    }
}
