//! Clients of every kind, byte by byte.

use pgherd_pgwire::message::server::{Authentication, ServerMessage};
use pgherd_pgwire::startup::SSL_REQUEST;
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use postgres_protocol::password;
use proptest::prelude::*;

use super::*;

const TLS_HELLO: &[u8] = &[0x16, 3, 1, 0, 5];

fn fresh(tls: Tls) -> Login {
    Login::new(tls, "nonce-of-the-test".to_owned())
}

fn startup(parameters: &[(&[u8], &[u8])]) -> BytesMut {
    let mut to = BytesMut::new();
    build::startup_message(&mut to, Version::V3_0, parameters).unwrap();
    to
}

fn alice() -> BytesMut {
    startup(&[(b"user", b"alice"), (b"database", b"shop"), (b"application_name", b"till")])
}

fn ssl_request() -> BytesMut {
    let mut to = BytesMut::new();
    build::ssl_request(&mut to);
    to
}

/// Gives the login these bytes and takes what it writes.
fn give(login: &mut Login, bytes: &[u8]) -> (Step, Vec<u8>) {
    let (mut input, mut out) = (bytes, BytesMut::new());
    let step = login.read(&mut input, &mut out);
    (step, out.to_vec())
}

/// Splits what a server wrote into messages.
fn messages(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    while let [kind, a, b, c, d, rest @ ..] = bytes {
        let body_bytes = u32::from_be_bytes([*a, *b, *c, *d]) as usize - 4;
        found.push((*kind, rest[..body_bytes].to_vec()));
        bytes = &rest[body_bytes..];
    }
    assert!(bytes.is_empty(), "{bytes:?}");
    found
}

fn refusal(bytes: &[u8]) -> (String, String) {
    let all = messages(bytes);
    let (kind, body) = all.last().expect("an answer");
    let Ok(ServerMessage::ErrorResponse(fields)) = ServerMessage::parse(*kind, body) else {
        panic!("{all:?}");
    };
    assert!(fields.is_fatal());
    let message = String::from_utf8(fields.message().unwrap().to_vec()).unwrap();
    (fields.sqlstate().unwrap().to_string(), message)
}

fn verifier() -> Verifier {
    Verifier::parse(&password::scram_sha_256(b"correct horse")).unwrap()
}

/// A login that waits for the client's choice of a mechanism, and what it offered.
fn offered(mut login: Login, packet: &[u8], verifier: Verifier) -> (Login, Vec<String>) {
    assert_eq!(give(&mut login, packet).0, Step::Method);
    let mut out = BytesMut::new();
    assert_eq!(login.method(Method::ScramSha256, &mut out), Step::Verifier);
    assert_eq!(login.verifier(verifier, &mut out), Step::More);
    let all = messages(&out);
    let Ok(ServerMessage::Authentication(Authentication::Sasl(names))) =
        ServerMessage::parse(b'R', &all[0].1)
    else {
        panic!("{all:?}");
    };
    let names = names.iter().map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
    (login, names)
}

fn challenge(bytes: &[u8]) -> Vec<u8> {
    match ServerMessage::parse(b'R', &messages(bytes)[0].1) {
        Ok(ServerMessage::Authentication(Authentication::SaslContinue(data))) => data.to_vec(),
        other => panic!("{other:?}"),
    }
}

fn initial(mechanism: &str, first: Option<&[u8]>) -> BytesMut {
    let mut to = BytesMut::new();
    build::sasl_initial_response(&mut to, mechanism, first).unwrap();
    to
}

fn response(data: &[u8]) -> BytesMut {
    let mut to = BytesMut::new();
    build::sasl_response(&mut to, data).unwrap();
    to
}

#[test]
fn what_a_client_asks_for_is_kept_in_its_words() {
    let mut login = fresh(Tls::Unavailable);
    let packet = startup(&[
        (b"user", b"alice"),
        (b"replication", b"database"),
        (b"options", b"-c search_path=evil"),
        (b"_pq_.new", b"1"),
        (b"client_encoding", b"UTF8"),
    ]);
    let (step, out) = give(&mut login, &packet);
    assert_eq!(step, Step::Method);
    assert!(matches!(
        ServerMessage::parse(b'v', &messages(&out)[0].1),
        Ok(ServerMessage::NegotiateProtocolVersion(_))
    ));
    let asked = login.asked().unwrap();
    assert_eq!((asked.user.as_str(), asked.database.as_str()), ("alice", "alice"));
    assert_eq!((asked.replication, asked.version), (Replication::Logical, Version::V3_0));
    let kept = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(asked.parameters, [kept("options", "-c search_path=evil"), kept("client_encoding", "UTF8")]);
}

#[test]
fn a_right_password_comes_in_and_brings_its_keys() {
    let (mut login, names) = offered(fresh(Tls::Unavailable), &alice(), verifier());
    assert_eq!(names, [SCRAM_SHA_256]);
    let mut client = ScramSha256::new(b"correct horse", ChannelBinding::unsupported());
    let (step, out) = give(&mut login, &initial(SCRAM_SHA_256, Some(client.message())));
    assert_eq!(step, Step::More);
    client.update(&challenge(&out)).unwrap();
    let (step, out) = give(&mut login, &response(client.message()));
    assert!(matches!(step, Step::In(Some(_))), "{step:?}");
    let all = messages(&out);
    let Ok(ServerMessage::Authentication(Authentication::SaslFinal(last))) =
        ServerMessage::parse(b'R', &all[0].1)
    else {
        panic!("{all:?}");
    };
    client.finish(last).unwrap();
    assert_eq!(all[1], (b'R', vec![0, 0, 0, 0]), "AuthenticationOk");
    assert_eq!(give(&mut login, b"").0, Step::HangUp, "a login is over when it is over");
}

#[test]
fn a_client_that_waits_to_be_asked_is_asked() {
    let (mut login, _) = offered(fresh(Tls::Unavailable), &alice(), verifier());
    let mut client = ScramSha256::new(b"correct horse", ChannelBinding::unsupported());
    let (_, out) = give(&mut login, &initial(SCRAM_SHA_256, None));
    assert_eq!(challenge(&out), b"");
    let (_, out) = give(&mut login, &response(client.message()));
    client.update(&challenge(&out)).unwrap();
    assert!(matches!(give(&mut login, &response(client.message())).0, Step::In(Some(_))));
}

#[test]
fn a_wrong_password_and_a_user_who_does_not_exist_are_told_the_same() {
    for stored in [verifier(), Verifier::of_nobody("alice", &[7; 32])] {
        let (mut login, names) = offered(fresh(Tls::Unavailable), &alice(), stored);
        assert_eq!(names, [SCRAM_SHA_256]);
        let mut client = ScramSha256::new(b"battery staple", ChannelBinding::unsupported());
        let (_, out) = give(&mut login, &initial(SCRAM_SHA_256, Some(client.message())));
        client.update(&challenge(&out)).unwrap();
        let (step, out) = give(&mut login, &response(client.message()));
        assert_eq!(step, Step::Refused);
        let told = ("28P01".to_owned(), "password authentication failed for user \"alice\"".to_owned());
        assert_eq!(refusal(&out), told);
    }
}

/// Asked for md5, with that salt.
fn salted(salt: [u8; 4]) -> Login {
    let mut login = fresh(Tls::Unavailable);
    assert_eq!(give(&mut login, &alice()).0, Step::Method);
    let mut out = BytesMut::new();
    assert_eq!(login.method(Method::Md5, &mut out), Step::Verifier);
    assert!(login.takes_md5());
    let hash = Md5Hash::parse("md527d601e4766ef321bab4559b3758b31c").unwrap();
    assert_eq!(login.md5(hash, salt, &mut out), Step::More);
    assert_eq!(messages(&out), [(b'R', [&[0, 0, 0, 5][..], &salt].concat())]);
    login
}

#[test]
fn what_is_stored_for_md5_lets_in_whoever_answers_by_it() {
    let answer = |password: &[u8], salt| {
        let mut to = BytesMut::new();
        let answer = postgres_protocol::authentication::md5_hash(b"alice", password, salt);
        build::password(&mut to, answer.as_bytes()).unwrap();
        to
    };
    let (step, out) = give(&mut salted(*b"salt"), &answer(b"correct horse", *b"salt"));
    assert!(matches!(step, Step::In(Some(Keys::Md5(_)))), "{step:?}");
    assert_eq!(messages(&out), [(b'R', vec![0, 0, 0, 0])]);

    let told = ("28P01".to_owned(), "password authentication failed for user \"alice\"".to_owned());
    let mut in_clear = BytesMut::new();
    build::password(&mut in_clear, b"correct horse").unwrap();
    for wrong in [answer(b"battery staple", *b"salt"), answer(b"correct horse", *b"SALT"), in_clear] {
        let (step, out) = give(&mut salted(*b"salt"), &wrong);
        assert_eq!((step, refusal(&out)), (Step::Refused, told.clone()));
    }
    for broken in [&b"p\0\0\0\x05\0"[..], b"p\0\0\0\x04", b"p\0\0\0\x06ab", b"Q\0\0\0\x0dSELECT 1\0"] {
        let (step, out) = give(&mut salted(*b"salt"), broken);
        assert_eq!((step, refusal(&out).0.as_str()), (Step::Refused, "08P01"), "{broken:?}");
    }

    // Where nobody comes in by it, it is said so.
    let mut login = fresh(Tls::Unavailable);
    assert_eq!(give(&mut login, &alice()).0, Step::Method);
    let mut out = BytesMut::new();
    login.method(Method::Md5, &mut out);
    assert_eq!(login.md5_is_off(&mut out), Step::Refused);
    let (sqlstate, message) = refusal(&out);
    assert_eq!(sqlstate, "28000");
    assert!(message.contains("\"alice\" is stored for md5"), "{message}");
}

#[test]
fn nobody_comes_in_without_what_the_hba_file_asks_for() {
    let mut admitted = fresh(Tls::Unavailable);
    let mut out = BytesMut::new();
    assert_eq!(give(&mut admitted, &alice()).0, Step::Method);
    // Whatever it sends meanwhile is not looked at.
    assert_eq!(give(&mut admitted, &response(b"impatient")).0, Step::Method);
    assert_eq!(admitted.method(Method::Admit, &mut out), Step::In(None));
    assert_eq!(messages(&out), [(b'R', vec![0, 0, 0, 0])]);

    let mut rejected = fresh(Tls::Unavailable);
    let mut out = BytesMut::new();
    assert_eq!(give(&mut rejected, &alice()).0, Step::Method);
    let message = "no pg_hba.conf entry for host \"192.0.2.7\"".to_owned();
    assert_eq!(rejected.method(Method::Reject { message: message.clone() }, &mut out), Step::Refused);
    assert_eq!(refusal(&out), ("28000".to_owned(), message));

    for wrong in [&b"Q\0\0\0\x0dSELECT 1\0"[..], b"X\0\0\0\x04", b"p\0\x01\0\0"] {
        let (mut login, _) = offered(fresh(Tls::Unavailable), &alice(), verifier());
        let (step, out) = give(&mut login, wrong);
        assert_eq!((step, refusal(&out).0.as_str()), (Step::Refused, "08P01"), "{wrong:?}");
    }
}

#[test]
fn tls_is_offered_demanded_or_not_there() {
    let (step, out) = give(&mut fresh(Tls::Unavailable), &ssl_request());
    assert_eq!((step, out), (Step::More, b"N".to_vec()));
    assert_eq!(give(&mut fresh(Tls::Unavailable), TLS_HELLO), (Step::HangUp, vec![]));
    assert_eq!(give(&mut fresh(Tls::Offered), TLS_HELLO), (Step::Handshake, vec![]));

    let mut polite = fresh(Tls::Required);
    assert_eq!(give(&mut polite, &ssl_request()), (Step::Handshake, b"S".to_vec()));
    polite.encrypted(None);
    assert!(polite.is_encrypted());
    assert_eq!(give(&mut polite, &alice()).0, Step::Method);

    let (step, out) = give(&mut fresh(Tls::Required), &alice());
    assert_eq!((step, refusal(&out).0.as_str()), (Step::Refused, "28000"));
    assert_eq!(give(&mut fresh(Tls::Offered), &alice()).0, Step::Method, "without TLS where that is allowed");
}

/// CVE-2012-4575: a name that is longer than what holds it.
#[test]
fn names_are_cut_where_postgresql_cuts_them() {
    for (bytes, kept) in [(62, 62), (63, 63), (64, 63), (4_000, 63)] {
        let mut login = fresh(Tls::Unavailable);
        let (user, database) = ("u".repeat(bytes), "d".repeat(bytes));
        let packet = startup(&[(b"user", user.as_bytes()), (b"database", database.as_bytes())]);
        assert_eq!(give(&mut login, &packet).0, Step::Method);
        let asked = login.asked().unwrap();
        assert_eq!((asked.user.as_str(), asked.database.as_str()), (&user[..kept], &database[..kept]));
    }
    let mut login = fresh(Tls::Unavailable);
    // A letter of two bytes across the end is left out.
    assert_eq!(give(&mut login, &startup(&[(b"user", "ü".repeat(40).as_bytes())])).0, Step::Method);
    assert_eq!(login.asked().unwrap().user, "ü".repeat(31));
}

/// A name is a name, whatever it looks like; and a zero ends it, so that nothing can stand behind one.
#[test]
fn names_with_quotes_are_names() {
    let strange = "al\"i'ce\\; DROP ROLE bob --\n";
    let (mut login, _) =
        offered(fresh(Tls::Unavailable), &startup(&[(b"user", strange.as_bytes())]), verifier());
    assert_eq!(login.asked().unwrap().user, strange);
    let mut client = ScramSha256::new(b"battery staple", ChannelBinding::unsupported());
    let (_, out) = give(&mut login, &initial(SCRAM_SHA_256, Some(client.message())));
    client.update(&challenge(&out)).unwrap();
    let (step, out) = give(&mut login, &response(client.message()));
    let told = format!("password authentication failed for user \"{strange}\"");
    assert_eq!((step, refusal(&out)), (Step::Refused, ("28P01".to_owned(), told)));

    let with_zero = b"\0\0\0\x24\0\x03\0\0user\0alice\0\0database\0shop\0\0\0";
    assert_eq!(give(&mut fresh(Tls::Unavailable), with_zero).0, Step::Refused);
}

/// CVE-2025-46801, CVE-2015-6817: a way in that only some settings leave open.
#[test]
fn no_setting_lets_a_wrong_password_in() {
    for (tls, encrypted, bound) in [
        (Tls::Unavailable, false, false),
        (Tls::Offered, false, false),
        (Tls::Offered, true, false),
        (Tls::Offered, true, true),
        (Tls::Required, true, true),
    ] {
        for (stored, password) in [
            (verifier_of_few(), &b"battery staple"[..]),
            (verifier_of_few(), b""),
            (Verifier::of_nobody("alice", &[7; 32]), b"correct horse"),
            (Verifier::of_nobody("alice", &[7; 32]), b""),
        ] {
            let mut login = fresh(tls);
            if encrypted {
                assert_eq!(give(&mut login, &ssl_request()).0, Step::Handshake);
                login.encrypted(bound.then(|| b"hash".to_vec()));
            }
            let (mut login, names) = offered(login, &alice(), stored);
            let mechanism = names[0].as_str();
            let binding = match bound {
                true => ChannelBinding::tls_server_end_point(b"hash".to_vec()),
                false => ChannelBinding::unsupported(),
            };
            let mut client = ScramSha256::new(password, binding);
            let (_, out) = give(&mut login, &initial(mechanism, Some(client.message())));
            client.update(&challenge(&out)).unwrap();
            let (step, out) = give(&mut login, &response(client.message()));
            assert_eq!(
                (step, refusal(&out).0.as_str()),
                (Step::Refused, "28P01"),
                "{tls:?} {encrypted} {bound}"
            );
        }
    }
}

/// CVE-2021-23214: what came in clear behind a request for encryption is never read as if it had been encrypted.
#[test]
fn bytes_stuffed_behind_a_request_for_tls_end_the_connection() {
    for tls in [Tls::Offered, Tls::Unavailable] {
        let stuffed = [&ssl_request()[..], &alice()].concat();
        let (step, out) = give(&mut fresh(tls), &stuffed);
        assert_eq!((step, refusal(&out).0.as_str()), (Step::Refused, "08P01"));
    }
}

#[test]
fn channel_binding_is_offered_where_the_certificate_is_known_and_cannot_be_removed() {
    let behind_tls = || {
        let mut login = fresh(Tls::Offered);
        assert_eq!(give(&mut login, &ssl_request()).0, Step::Handshake);
        login.encrypted(Some(b"hash".to_vec()));
        offered(login, &alice(), verifier())
    };
    let (mut login, names) = behind_tls();
    assert_eq!(names, [SCRAM_SHA_256_PLUS, SCRAM_SHA_256]);
    let mut client =
        ScramSha256::new(b"correct horse", ChannelBinding::tls_server_end_point(b"hash".to_vec()));
    let (_, out) = give(&mut login, &initial(SCRAM_SHA_256_PLUS, Some(client.message())));
    client.update(&challenge(&out)).unwrap();
    assert!(matches!(give(&mut login, &response(client.message())).0, Step::In(Some(_))));
    // Somebody in between removed the offer, or shows another certificate.
    let (mut login, _) = behind_tls();
    let client = ScramSha256::new(b"correct horse", ChannelBinding::unrequested());
    let (step, out) = give(&mut login, &initial(SCRAM_SHA_256, Some(client.message())));
    assert_eq!((step, refusal(&out).0.as_str()), (Step::Refused, "08P01"));
    let (mut login, _) = behind_tls();
    let mut client =
        ScramSha256::new(b"correct horse", ChannelBinding::tls_server_end_point(b"other".to_vec()));
    let (_, out) = give(&mut login, &initial(SCRAM_SHA_256_PLUS, Some(client.message())));
    client.update(&challenge(&out)).unwrap();
    assert_eq!(give(&mut login, &response(client.message())).0, Step::Refused);
    // It was not offered here.
    let (mut login, _) = offered(fresh(Tls::Unavailable), &alice(), verifier());
    assert_eq!(give(&mut login, &initial(SCRAM_SHA_256_PLUS, Some(b"n,,n=,r=x"))).0, Step::Refused);
}

#[test]
fn a_cancel_needs_no_login() {
    let mut to = BytesMut::new();
    let key = pgherd_pgwire::message::Key::new(&[9; 32]).unwrap();
    build::cancel_request(&mut to, 4711, key);
    let cancel = Step::Cancel { pid: 4711, key: vec![9; 32] };
    assert_eq!(give(&mut fresh(Tls::Required), &to), (cancel, vec![]));
}

#[test]
fn names_that_are_no_text_are_refused() {
    let (step, out) = give(&mut fresh(Tls::Unavailable), &startup(&[(b"user", b"al\xffice")]));
    assert_eq!((step, refusal(&out).0.as_str()), (Step::Refused, "08P01"));
    let (step, out) =
        give(&mut fresh(Tls::Unavailable), &startup(&[(b"user", b"a"), (b"replication", b"maybe")]));
    assert_eq!((step, refusal(&out).0.as_str()), (Step::Refused, "08P01"));
}

proptest! {
    /// However its bytes are cut, a client comes in, and never earlier than with its last byte.
    #[test]
    fn a_login_in_pieces_is_the_same(cuts in prop::collection::vec(1..40_usize, 1..60)) {
        let mut login = fresh(Tls::Unavailable);
        let mut client = ScramSha256::new(b"correct horse", ChannelBinding::unsupported());
        let (mut cuts, mut unread, mut out) = (cuts.into_iter().cycle(), Vec::new(), BytesMut::new());
        let mut waiting: Vec<u8> = alice().to_vec();
        let mut proofs = 0;
        loop {
            let taken = cuts.next().unwrap().min(waiting.len());
            unread.extend(waiting.drain(..taken));
            let mut input = unread.as_slice();
            let mut step = login.read(&mut input, &mut out);
            unread = input.to_vec();
            if step == Step::Method {
                step = login.method(Method::ScramSha256, &mut out);
                prop_assert_eq!(&step, &Step::Verifier);
                out.clear();
                step = login.verifier(verifier_of_few(), &mut out);
                out.clear();
                waiting.extend_from_slice(&initial(SCRAM_SHA_256, Some(client.message())));
            }
            if let Step::In(keys) = step {
                prop_assert!(keys.is_some() && waiting.is_empty() && unread.is_empty());
                break;
            }
            prop_assert_eq!(step, Step::More);
            if !out.is_empty() {
                client.update(&challenge(&out)).unwrap();
                out.clear();
                proofs += 1;
                waiting.extend_from_slice(&response(client.message()));
            }
            prop_assert!(proofs <= 1);
        }
    }

    /// Bytes of any kind let nobody in, and cost no more than an answer.
    #[test]
    fn noise_does_not_come_in(noise in prop::collection::vec(any::<u8>(), 0..400), behind in any::<bool>()) {
        let mut login = fresh(Tls::Unavailable);
        if behind {
            login = offered(login, &alice(), verifier_of_few()).0;
        }
        let (mut input, mut out) = (noise.as_slice(), BytesMut::new());
        for _ in 0..4 {
            let step = login.read(&mut input, &mut out);
            prop_assert!(!matches!(step, Step::In(_)), "{:?}", step);
        }
        prop_assert!(out.len() < 1_000);
    }
}

/// Made once: PostgreSQL's number of iterations takes its time.
fn verifier_of_few() -> Verifier {
    static MADE: std::sync::OnceLock<Verifier> = std::sync::OnceLock::new();
    MADE.get_or_init(verifier).clone()
}

#[test]
fn the_request_for_tls_is_the_one_of_the_manual() {
    assert_eq!(ssl_request(), [&8_u32.to_be_bytes()[..], &SSL_REQUEST.to_be_bytes()].concat());
}
