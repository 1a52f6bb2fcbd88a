//! Servers of every kind, and what is said to them. The other half of it, a server that asks as PostgreSQL does, is in the
//! proxy, whose tests let the two speak with each other.

use postgres_protocol::password;

use super::*;
use crate::message::Key;
use crate::scram::{Password, ScramError, Server, Verifier};

fn purpose() -> Purpose {
    Purpose {
        user: "alice".to_owned(),
        database: "shop".to_owned(),
        replication: Replication::Physical,
        parameters: vec![("application_name".to_owned(), "till".to_owned())],
        is_certified: false,
    }
}

fn proof() -> Proof {
    Proof::Password(Password::new("correct horse").unwrap())
}

fn begun(proof: Option<Proof>) -> (Login, BytesMut) {
    let mut out = BytesMut::new();
    let login = Login::new(&purpose(), proof, "nonce-of-the-client".to_owned(), &mut out).unwrap();
    (login, out)
}

fn give(login: &mut Login, bytes: &[u8]) -> (Step, BytesMut) {
    let (mut input, mut out) = (bytes, BytesMut::new());
    (login.read(&mut input, &mut out), out)
}

fn starting(to: &mut BytesMut) {
    build::parameter_status(to, b"TimeZone", b"UTC").unwrap();
    build::backend_key_data(to, 4711, Key::new(b"seven77").unwrap());
    build::ready_for_query(to, TransactionStatus::Idle);
}

/// What comes of a password at a server that stores the verifier of "correct horse".
fn at_a_server(password: &str) -> Result<Welcome, ScramError> {
    let (mut login, startup) = begun(Some(Proof::Password(Password::new(password).unwrap())));
    assert!(startup.windows(16).any(|bytes| bytes == b"replication\0true"), "{startup:?}");
    let verifier = Verifier::parse(&password::scram_sha_256(b"correct horse")).unwrap();
    let mut said = BytesMut::new();
    build::authentication_sasl(&mut said, &[SCRAM_SHA_256]).unwrap();
    let (step, first) = give(&mut login, &said.split());
    assert_eq!(step, Step::More);
    let first = &first[5 + SCRAM_SHA_256.len() + 1 + 4..];
    let (server, challenge) =
        Server::start(verifier, first, Binding::Impossible, "nonce-of-the-server").unwrap();
    build::authentication_sasl_continue(&mut said, challenge.as_bytes()).unwrap();
    let (_, last) = give(&mut login, &said.split());
    let (answer, _) = server.finish(&last[5..])?;
    build::authentication_sasl_final(&mut said, answer.as_bytes()).unwrap();
    build::authentication_ok(&mut said);
    starting(&mut said);
    match give(&mut login, &said).0 {
        Step::In(welcome) => Ok(welcome),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_password_opens_the_server_that_stores_its_verifier() {
    let welcome = at_a_server("correct horse").unwrap();
    assert_eq!((welcome.pid, welcome.key.as_slice()), (4711, &b"seven77"[..]));
    assert_eq!(welcome.parameters, [(b"TimeZone".to_vec(), b"UTC".to_vec())]);
    assert_eq!(at_a_server("correct horses"), Err(ScramError::WrongProof));
}

#[test]
fn cve_2026_42198_a_server_does_not_choose_how_long_a_password_is_worked_on() {
    let (mut login, _) = begun(Some(proof()));
    let mut said = BytesMut::new();
    build::authentication_sasl(&mut said, &[SCRAM_SHA_256]).unwrap();
    let challenge = "r=nonce-of-the-clientx,s=c2FsdA==,i=2147483647";
    build::authentication_sasl_continue(&mut said, challenge.as_bytes()).unwrap();
    let (step, _) = give(&mut login, &said);
    assert_eq!(step, Step::Failed(NotIn::Scram(ScramError::TooManyIterations { found: 2_147_483_647 })));
}

#[test]
fn a_password_that_saslprep_could_change_is_none() {
    for wrong in ["", "ü", "a\0b", "a\u{a0}b", "tab\t"] {
        assert_eq!(Password::new(wrong), None, "{wrong:?}");
    }
    assert!(!format!("{:?}", proof()).contains("horse"));
}

#[test]
fn a_server_lets_nobody_in_without_a_proof_unless_the_certificate_is_one() {
    let mut ok = BytesMut::new();
    build::authentication_ok(&mut ok);
    starting(&mut ok);
    for (is_certified, expected) in [(false, false), (true, true)] {
        let mut out = BytesMut::new();
        let purpose = Purpose { is_certified, ..purpose() };
        let login = Login::new(&purpose, Some(proof()), "nonce".to_owned(), &mut out);
        let (step, _) = give(&mut login.unwrap(), &ok);
        assert_eq!(matches!(step, Step::In(_)), expected, "{step:?}");
    }
}

#[test]
fn nothing_but_a_proof_is_an_answer() {
    type Ask = fn(&mut BytesMut);
    let asks: [(&str, Ask); 4] = [
        ("a password in clear", build::authentication_cleartext_password),
        ("an md5 password", |to| build::authentication_md5_password(to, [1; 4])),
        ("no proof at all", build::authentication_ok),
        ("an unknown SASL mechanism", |to| build::authentication_sasl(to, &["PLAIN"]).unwrap()),
    ];
    for (method, ask) in asks {
        let (mut login, _) = begun(Some(proof()));
        let mut asked = BytesMut::new();
        ask(&mut asked);
        let (step, sent) = give(&mut login, &asked);
        assert_eq!(step, Step::Failed(NotIn::Method(method)));
        assert!(sent.is_empty(), "nothing is told to whoever asks for {method}");
    }
    let (mut login, _) = begun(None);
    let mut asked = BytesMut::new();
    build::authentication_sasl(&mut asked, &[SCRAM_SHA_256]).unwrap();
    assert_eq!(give(&mut login, &asked).0, Step::Failed(NotIn::Method("a password")));

    // Where a certificate is proof enough.
    let (mut login, _) = begun(None);
    let mut welcome = BytesMut::new();
    build::authentication_ok(&mut welcome);
    starting(&mut welcome);
    assert!(matches!(give(&mut login, &welcome).0, Step::In(_)));
}

/// A server may be anybody's until it has proven itself, and after that it may be wrong.
#[test]
fn a_server_cannot_report_without_end() {
    let (mut login, _) = begun(None);
    let mut said = BytesMut::new();
    build::authentication_ok(&mut said);
    for value in 0..10_000 {
        build::parameter_status(&mut said, b"TimeZone", value.to_string().as_bytes()).unwrap();
    }
    assert_eq!(give(&mut login, &said).0, Step::More, "the same one is reported whenever it changes");
    let mut said = BytesMut::new();
    for name in 0..MAX_PARAMETERS {
        build::parameter_status(&mut said, name.to_string().as_bytes(), b"x").unwrap();
    }
    assert!(matches!(give(&mut login, &said).0, Step::Failed(NotIn::Protocol(_))));
}

#[test]
fn who_is_known_by_md5_alone_answers_to_that_and_to_nothing_else() {
    let hash = || Md5Hash::parse("md527d601e4766ef321bab4559b3758b31c").unwrap();
    let known = || begun(None).0.known_by(hash());
    let mut login = known();
    let mut asked = BytesMut::new();
    build::authentication_md5_password(&mut asked, *b"salt");
    let (step, sent) = give(&mut login, &asked.split());
    let expected = postgres_protocol::authentication::md5_hash(b"alice", b"correct horse", *b"salt");
    assert_eq!((step, &sent[5..]), (Step::More, format!("{expected}\0").as_bytes()));
    build::authentication_ok(&mut asked);
    starting(&mut asked);
    assert!(matches!(give(&mut login, &asked).0, Step::In(_)));

    type Ask = fn(&mut BytesMut);
    let asks: [(NotIn, Ask); 3] = [
        (NotIn::Method("a password in clear"), build::authentication_cleartext_password),
        (NotIn::Method("no proof at all"), build::authentication_ok),
        (NotIn::Scram(ScramError::KeysOutOfDate), |to| {
            build::authentication_sasl(to, &[SCRAM_SHA_256]).unwrap();
        }),
    ];
    for (refused, ask) in asks {
        let (mut login, mut asked) = (known(), BytesMut::new());
        ask(&mut asked);
        let (step, sent) = give(&mut login, &asked);
        assert_eq!(step, Step::Failed(refused));
        assert!(sent.is_empty());
    }
    // Once.
    let (mut login, mut asked) = (known(), BytesMut::new());
    build::authentication_md5_password(&mut asked, *b"salt");
    give(&mut login, &asked.clone());
    assert!(matches!(give(&mut login, &asked).0, Step::Failed(_)));
}
