//! Servers with this crate's own [`crate::login`] in the place of PostgreSQL, and how a server is remembered.

use bytes::BytesMut;
use pgherd_pgwire::login::{Login, NotIn as Refusal, Purpose, Step};
use pgherd_pgwire::message::build::{self, Report, Severity};
use pgherd_pgwire::message::{Key, TransactionStatus};
use pgherd_pgwire::scram::{self, Binding, ClientKeys, Proof, SCRAM_SHA_256, Verifier};
use pgherd_pgwire::startup::Replication;
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use postgres_protocol::password;

use super::*;
use crate::login::{self as of_clients, Method, Tls};

fn purpose() -> Purpose {
    Purpose {
        user: "alice".to_owned(),
        database: "shop".to_owned(),
        replication: Replication::Off,
        parameters: vec![("application_name".to_owned(), "till".to_owned())],
        is_certified: false,
    }
}

fn begun(keys: Option<ClientKeys>) -> (Login, BytesMut) {
    let mut out = BytesMut::new();
    let login =
        Login::new(&purpose(), keys.map(Proof::Keys), "nonce-of-the-proxy".to_owned(), &mut out).unwrap();
    (login, out)
}

fn verifier() -> Verifier {
    Verifier::parse(&password::scram_sha_256(b"correct horse")).unwrap()
}

/// What the password is worth against this verifier.
fn keys(verifier: Verifier) -> ClientKeys {
    let mut client = ScramSha256::new(b"correct horse", ChannelBinding::unsupported());
    let first = client.message().to_vec();
    let (server, challenge) =
        scram::Server::start(verifier, &first, Binding::Impossible, "nonce-of-the-test").unwrap();
    client.update(challenge.as_bytes()).unwrap();
    server.finish(client.message()).unwrap().1
}

fn give(login: &mut Login, bytes: &[u8]) -> (Step, BytesMut) {
    let (mut input, mut out) = (bytes, BytesMut::new());
    (login.read(&mut input, &mut out), out)
}

/// A server that takes the startup packet in `sent` and asks for SCRAM; what it writes.
fn asks(sent: &[u8], verifier: Verifier) -> (of_clients::Login, BytesMut) {
    let (mut server, mut out) =
        (of_clients::Login::new(Tls::Unavailable, "nonce-of-the-server".to_owned()), BytesMut::new());
    assert_eq!(server.read(&mut &sent[..], &mut out), of_clients::Step::Method);
    let asked = server.asked().unwrap();
    assert_eq!((asked.user.as_str(), asked.database.as_str()), ("alice", "shop"));
    assert_eq!(asked.parameters, purpose().parameters);
    assert_eq!(server.method(Method::ScramSha256, &mut out), of_clients::Step::Verifier);
    assert_eq!(server.verifier(verifier, &mut out), of_clients::Step::More);
    (server, out)
}

fn starting(to: &mut BytesMut) {
    build::parameter_status(to, b"TimeZone", b"UTC").unwrap();
    build::parameter_status(to, b"in_hot_standby", b"off").unwrap();
    build::parameter_status(to, b"TimeZone", b"Europe/Berlin").unwrap();
    build::backend_key_data(to, 4711, Key::new(b"seven77").unwrap());
    build::ready_for_query(to, TransactionStatus::Idle);
}

/// What comes of a login at a server that shows a certificate with this hash, to a proxy that sees one with that, when what the
/// server offers is changed on its way.
fn bound(
    of_server: Option<&[u8]>,
    seen: Option<&[u8]>,
    change: impl Fn(BytesMut) -> BytesMut,
) -> (Result<(), Refusal>, Vec<u8>) {
    let stored = verifier();
    let (proxy, startup) = begun(Some(keys(stored.clone())));
    let mut proxy = proxy.bound_to(seen.map(<[u8]>::to_vec));
    let mut server = of_clients::Login::new(Tls::Offered, "nonce-of-the-server".to_owned());
    let (mut asked, mut answer) = (BytesMut::new(), BytesMut::new());
    build::ssl_request(&mut asked);
    assert_eq!(server.read(&mut &asked[..], &mut answer), of_clients::Step::Handshake);
    server.encrypted(of_server.map(<[u8]>::to_vec));
    answer.clear();
    assert_eq!(server.read(&mut &startup[..], &mut answer), of_clients::Step::Method);
    server.method(Method::ScramSha256, &mut answer);
    server.verifier(stored, &mut answer);
    let mut answer = change(answer);
    let mut first = Vec::new();
    loop {
        let (step, sent) = give(&mut proxy, &answer.split());
        if first.is_empty() {
            first = sent.to_vec();
        }
        match step {
            Step::Failed(error) => return (Err(error), first),
            Step::In(_) => return (Ok(()), first),
            Step::More if proxy.is_authenticated() => return (Ok(()), first),
            Step::More => {}
        }
        server.read(&mut &sent[..], &mut answer);
        assert!(!answer.is_empty(), "somebody says something");
    }
}

#[test]
fn a_proof_is_bound_to_the_servers_certificate() {
    let as_it_is = |offer| offer;
    let begins = |first: &[u8], flag: &[u8]| first.windows(flag.len()).any(|window| window == flag);
    let (came, first) = bound(Some(b"its own"), Some(b"its own"), as_it_is);
    assert_eq!(came, Ok(()));
    assert!(begins(&first, b"SCRAM-SHA-256-PLUS") && begins(&first, b"p=tls-server-end-point,,"));

    // Somebody stands between, with a certificate of his own.
    let (came, _) = bound(Some(b"its own"), Some(b"another"), as_it_is);
    assert!(matches!(came, Err(Refusal::Refused { .. })), "{came:?}");
    // He takes the offer away, too; the server hears of it.
    let without = |_: BytesMut| {
        let mut offer = BytesMut::new();
        build::authentication_sasl(&mut offer, &[SCRAM_SHA_256]).unwrap();
        offer
    };
    let (came, first) = bound(Some(b"its own"), Some(b"another"), without);
    assert!(begins(&first, b"y,,") && matches!(came, Err(Refusal::Refused { .. })), "{came:?}");

    // A server that knows of no binding, and one whose certificate has no hash that both know.
    let (came, first) = bound(None, Some(b"its own"), as_it_is);
    assert_eq!((came, begins(&first, b"y,,")), (Ok(()), true));
    let (came, first) = bound(Some(b"its own"), None, as_it_is);
    assert_eq!((came, begins(&first, b"n,,")), (Ok(()), true));
}

#[test]
fn keys_open_a_server_that_stores_the_same_verifier() {
    let stored = verifier();
    let (mut proxy, sent) = begun(Some(keys(stored.clone())));
    let (mut server, mut answer) = asks(&sent, stored);
    let mut rounds = 0;
    let welcome = loop {
        // Byte by byte, as slow networks bring it.
        let (mut step, mut sent, mut left) = (Step::More, BytesMut::new(), Vec::new());
        for byte in answer.split() {
            left.push(byte);
            let mut input = &left[..];
            step = proxy.read(&mut input, &mut sent);
            left = input.to_vec();
        }
        if let Step::In(welcome) = step {
            break welcome;
        }
        assert_eq!(step, Step::More);
        match server.read(&mut &sent[..], &mut answer) {
            of_clients::Step::More => {}
            of_clients::Step::In(_) => starting(&mut answer),
            other => panic!("{other:?}"),
        }
        rounds += 1;
        assert!(rounds < 5);
    };
    let parameters = [("TimeZone", "Europe/Berlin"), ("in_hot_standby", "off")];
    assert_eq!(welcome.parameters, parameters.map(|(name, value)| (name.into(), value.into())));
    assert_eq!((welcome.pid, welcome.key.as_slice()), (4711, &b"seven77"[..]));
}

#[test]
fn a_password_that_was_changed_is_noticed() {
    let (mut proxy, sent) = begun(Some(keys(verifier())));
    let (mut server, answer) = asks(&sent, verifier());
    let (step, sent) = give(&mut proxy, &answer);
    assert_eq!(step, Step::More);
    let mut answer = BytesMut::new();
    assert_eq!(server.read(&mut &sent[..], &mut answer), of_clients::Step::More);
    let (step, sent) = give(&mut proxy, &answer);
    assert_eq!(step, Step::Failed(Refusal::Scram(scram::ScramError::KeysOutOfDate)));
    assert!(sent.is_empty(), "it is told nothing");
    assert!(matches!(give(&mut proxy, &answer).0, Step::Failed(Refusal::Protocol(_))), "and that is the end");
}

#[test]
fn a_refusal_comes_in_the_servers_words() {
    for (sqlstate, passes) in [
        ("57P03", true),
        ("53300", true),
        ("57P01", true),
        ("08006", true),
        ("3D000", false),
        ("28P01", false),
    ] {
        let (mut proxy, _) = begun(None);
        let mut said = BytesMut::new();
        let report = Report {
            severity: Severity::Fatal,
            sqlstate: SqlState::new(sqlstate.as_bytes()).unwrap(),
            message: "not today",
            detail: Some("it is late"),
            hint: None,
        };
        build::error_response(&mut said, &report);
        let (Step::Failed(failure), _) = give(&mut proxy, &said) else { panic!() };
        assert_eq!(
            failure,
            Refusal::Refused {
                sqlstate: report.sqlstate,
                message: "not today".to_owned(),
                detail: Some("it is late".to_owned()),
                hint: None
            }
        );
        assert_eq!(NotIn::from(failure).passes(), passes, "{sqlstate}");
    }
}

#[test]
fn servers_that_say_the_same_of_themselves_are_told_apart_by_a_look() {
    let shelf = Shelf::default();
    let [mut first, mut second] = [(); 2].map(|()| Welcome::default());
    for welcome in [&mut first, &mut second] {
        assert!(welcome.note(b"TimeZone", b"UTC"));
    }
    assert!(Arc::ptr_eq(first.shelved(&shelf), second.shelved(&shelf)));
    assert!(second.note(b"TimeZone", b"UTC"));
    assert!(Arc::ptr_eq(&first.parameters, second.shelved(&shelf)), "that is nothing new");
    assert!(second.note(b"TimeZone", b"CET"));
    assert!(!Arc::ptr_eq(&first.parameters, second.shelved(&shelf)));
    assert_eq!(first.parameters[0].1, b"UTC");
    assert!(first.note(b"TimeZone", b"CET"));
    assert!(Arc::ptr_eq(first.shelved(&shelf), &second.parameters));
}
