//! Known exchanges, an independent client, and every wrong bit.

use std::num::NonZeroU32;

use aws_lc_rs::pbkdf2;
use postgres_protocol::authentication::sasl;
use proptest::prelude::*;

use super::*;

/// Of a password, as PostgreSQL computes it. Nothing outside these tests knows passwords.
fn verifier_of(password: &str, salt: &[u8], iterations: u32) -> Verifier {
    let mut salted = [0; KEY_BYTES];
    let count = NonZeroU32::new(iterations).unwrap();
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, count, salt, password.as_bytes(), &mut salted);
    let salted = Key(salted);
    let stored = Key(salted.hmac("Client Key")).hash();
    Verifier { salt: salt.to_vec(), iterations, stored, server: Key(salted.hmac("Server Key")) }
}

/// RFC 7677, section 3: user "user", password "pencil".
mod rfc_7677 {
    pub(super) const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";
    pub(super) const CLIENT_NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
    pub(super) const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    pub(super) const CLIENT_FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    pub(super) const SERVER_FIRST: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    pub(super) const CLIENT_FINAL: &str = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                                           p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    pub(super) const SERVER_FINAL: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";
}

fn pencil() -> Verifier {
    verifier_of("pencil", &BASE64.decode(rfc_7677::SALT).unwrap(), 4096)
}

fn start_as_in_the_rfc() -> Server {
    let first = rfc_7677::CLIENT_FIRST.as_bytes();
    let (server, answer) =
        Server::start(pencil(), first, Binding::Impossible, rfc_7677::SERVER_NONCE).unwrap();
    assert_eq!(answer, rfc_7677::SERVER_FIRST);
    server
}

#[test]
fn the_exchange_of_the_rfc() {
    let (answer, _) = start_as_in_the_rfc().finish(rfc_7677::CLIENT_FINAL.as_bytes()).unwrap();
    assert_eq!(answer, rfc_7677::SERVER_FINAL);
}

#[test]
fn no_single_wrong_bit_is_let_in() {
    let right = rfc_7677::CLIENT_FINAL.as_bytes();
    for at in 0..right.len() {
        for bit in 0..8 {
            let mut wrong = right.to_vec();
            wrong[at] ^= 1 << bit;
            let answer = start_as_in_the_rfc().finish(&wrong);
            assert!(answer.is_err(), "{}", String::from_utf8_lossy(&wrong));
        }
    }
    for end in 0..right.len() {
        assert!(start_as_in_the_rfc().finish(&right[..end]).is_err());
    }
    assert!(start_as_in_the_rfc().finish(&[right, b","].concat()).is_err());
}

/// What is won from a client is good for a login in its name, and for nothing else.
#[test]
fn keys_pass_through_to_a_server_with_the_same_password() {
    for (own, server_binding) in
        [(Binding::Impossible, Binding::Impossible), (Binding::To(b"hash"), Binding::To(b"hash"))]
    {
        let (_, keys) = start_as_in_the_rfc().finish(rfc_7677::CLIENT_FINAL.as_bytes()).unwrap();
        let (mut client, first) = Client::start(keys.clone(), own, "ours");
        let (server, answer) = Server::start(pencil(), first.as_bytes(), server_binding, "theirs").unwrap();
        let proof = client.prove(answer.as_bytes()).unwrap();
        let (answer, again) = server.finish(proof.as_bytes()).unwrap();
        assert_eq!(again, keys);
        client.finish(answer.as_bytes()).unwrap();
    }
    let (_, keys) = start_as_in_the_rfc().finish(rfc_7677::CLIENT_FINAL.as_bytes()).unwrap();
    // Another salt means that the password was set anew, be it to the same.
    let changed = verifier_of("pencil", b"another salt", 4096);
    let (mut client, first) = Client::start(keys.clone(), Binding::Impossible, "ours");
    let (_, answer) = Server::start(changed, first.as_bytes(), Binding::Impossible, "theirs").unwrap();
    assert_eq!(client.prove(answer.as_bytes()), Err(ScramError::KeysOutOfDate));
    // The same salt and another password: the server refuses.
    let other = verifier_of("Pencil", &BASE64.decode(rfc_7677::SALT).unwrap(), 4096);
    let (mut client, first) = Client::start(keys, Binding::Impossible, "ours");
    let (server, answer) = Server::start(other, first.as_bytes(), Binding::Impossible, "theirs").unwrap();
    let proof = client.prove(answer.as_bytes()).unwrap();
    assert_eq!(server.finish(proof.as_bytes()), Err(ScramError::WrongProof));
}

#[test]
fn a_server_that_does_not_know_the_password_is_found_out() {
    let keys = || start_as_in_the_rfc().finish(rfc_7677::CLIENT_FINAL.as_bytes()).unwrap().1;
    let last = |answer: &str| {
        let (mut client, _) = Client::start(keys(), Binding::Impossible, rfc_7677::CLIENT_NONCE);
        client.prove(rfc_7677::SERVER_FIRST.as_bytes()).unwrap();
        client.finish(answer.as_bytes())
    };
    let wrong = format!("v={}", BASE64.encode([7; KEY_BYTES]));
    assert_eq!(last(&wrong), Err(ScramError::WrongServer));
    assert_eq!(last("e=invalid-proof"), Err(ScramError::Refused("invalid-proof".to_owned())));
    let told = format!("e={}\n\u{1b}[2J", "x".repeat(500));
    assert_eq!(last(&told), Err(ScramError::Refused("x".repeat(64))));
    assert!(
        matches!(last("v="), Err(ScramError::Malformed(_)))
            && matches!(last(""), Err(ScramError::Malformed(_)))
    );
    // Its signature before any proof was sent.
    let (client, _) = Client::start(keys(), Binding::Impossible, rfc_7677::CLIENT_NONCE);
    assert_eq!(client.finish(rfc_7677::SERVER_FINAL.as_bytes()), Err(ScramError::WrongServer));
}

#[test]
fn channel_binding_cannot_be_taken_away() {
    let start = |first: &str, binding| Server::start(pencil(), first.as_bytes(), binding, "n").map(drop);
    let plus = Binding::To(b"hash of the certificate");
    assert_eq!(start("y,,n=,r=x", Binding::Impossible), Ok(()));
    assert_eq!(start("y,,n=,r=x", Binding::Offered), Err(ScramError::Downgraded));
    assert_eq!(start("n,,n=,r=x", Binding::Offered), Ok(()));
    assert!(matches!(start("n,,n=,r=x", plus), Err(ScramError::Malformed(_))));
    assert!(matches!(
        start("p=tls-server-end-point,,n=,r=x", Binding::Offered),
        Err(ScramError::Malformed(_))
    ));
    assert!(matches!(start("p=tls-unique,,n=,r=x", plus), Err(ScramError::Malformed(_))));
    // The client is connected to somebody with another certificate, who passes its messages on.
    let keys = start_as_in_the_rfc().finish(rfc_7677::CLIENT_FINAL.as_bytes()).unwrap().1;
    let (mut client, first) = Client::start(keys, Binding::To(b"hash of another one"), "ours");
    let (server, answer) = Server::start(pencil(), first.as_bytes(), plus, "theirs").unwrap();
    let proof = client.prove(answer.as_bytes()).unwrap();
    assert_eq!(server.finish(proof.as_bytes()), Err(ScramError::Binding));
}

#[test]
fn what_the_client_may_not_say() {
    let long = format!("n,,n=,r={}", "x".repeat(MAX_NONCE_BYTES + 1));
    for wrong in [
        "",
        "n",
        "n,",
        "n,,",
        "n,,n=user",
        "n,,r=x,n=user",
        "n,,n=,r=",
        "n,,n=,r=a b",
        "n,,n=,r=\u{e9}",
        "x,,n=,r=x",
        "n,a=admin,n=,r=x",
        "n,,m=ext,n=,r=x",
        "n,,n=,m=ext,r=x",
        "n,,n=,r=x\0",
        &long,
    ] {
        let answer = Server::start(pencil(), wrong.as_bytes(), Binding::Impossible, "n");
        assert!(matches!(answer, Err(ScramError::Malformed(_))), "{wrong}: {answer:?}");
    }
    assert!(Server::start(pencil(), b"n,,n=,r=\xff", Binding::Impossible, "n").is_err());
    // Extensions that are not mandatory are passed over, as PostgreSQL does.
    assert!(Server::start(pencil(), b"n,,n=,r=x,z=1", Binding::Impossible, "n").is_ok());
}

#[test]
fn what_the_server_may_not_say() {
    let keys = start_as_in_the_rfc().finish(rfc_7677::CLIENT_FINAL.as_bytes()).unwrap().1;
    for wrong in [
        "",
        "r=ours",
        "r=oursX",
        "r=other,s=AAAA,i=1",
        "r=ours,s=AAAA,i=1",
        "r=oursX,s=*,i=1",
        "r=oursX,s=AAAA,i=0",
        "r=oursX,s=AAAA,i=-1",
        "r=oursX,s=AAAA,i=99999999999",
        "r=oursX,s=AAAA,i=1,z=1",
        "m=x,r=oursX,s=AAAA,i=1",
    ] {
        let (mut client, _) = Client::start(keys.clone(), Binding::Impossible, "ours");
        assert!(matches!(client.prove(wrong.as_bytes()), Err(ScramError::Malformed(_))), "{wrong}");
    }
}

#[test]
fn nobody_looks_like_somebody() {
    let secret = [9; KEY_BYTES];
    let nobody = Verifier::of_nobody("ghost", &secret);
    assert_eq!(nobody, Verifier::of_nobody("ghost", &secret), "or who asks twice would know");
    assert_ne!(nobody.salt, Verifier::of_nobody("other", &secret).salt);
    assert_eq!((nobody.salt.len(), nobody.iterations), (16, 4096));
    let (server, answer) = Server::start(nobody, b"n,,n=,r=x", Binding::Impossible, "y").unwrap();
    assert!(answer.starts_with("r=xy,s=") && answer.ends_with(",i=4096"));
    let proof = format!("c=biws,r=xy,p={}", BASE64.encode([0; KEY_BYTES]));
    assert_eq!(server.finish(proof.as_bytes()), Err(ScramError::WrongProof));
}

#[test]
fn whoever_shares_a_verifier_shares_what_nobody_has() {
    let [one, same, other] =
        ["SCRAM-SHA-256$x", "SCRAM-SHA-256$x", "SCRAM-SHA-256$y"].map(Verifier::secret_from);
    assert_eq!(Verifier::of_nobody("ghost", &one), Verifier::of_nobody("ghost", &same));
    assert_ne!(Verifier::of_nobody("ghost", &one).salt, Verifier::of_nobody("ghost", &other).salt);
}

#[test]
fn verifiers_as_postgresql_stores_them() {
    let key = BASE64.encode([1; KEY_BYTES]);
    let right = format!("SCRAM-SHA-256$4096:{}${key}:{key}", rfc_7677::SALT);
    assert_eq!(Verifier::parse(&right).unwrap().iterations, 4096);
    for wrong in [
        "",
        "md5d41d8cd98f00b204e9800998ecf8427e",
        &right.replace("4096", "0"),
        &right.replace("4096", "+1"),
        &right.replace(rfc_7677::SALT, ""),
        &right.replace("4096:", "4096"),
        &right[..right.len() - 1],
        &format!("{right}A"),
    ] {
        assert!(Verifier::parse(wrong).is_none(), "{wrong}");
    }
    let shown = format!("{:?}", Verifier::parse(&right).unwrap());
    assert!(shown.ends_with("stored: Key, server: Key }"), "{shown}");
}

proptest! {
    /// Against a client that is not ours, with any password.
    #[test]
    fn an_independent_client_comes_in_with_its_password_and_with_no_other(
        password in "[a-zA-Z0-9 _-]{1,20}",
        other in "[a-zA-Z0-9 _-]{1,20}",
        salt in prop::collection::vec(any::<u8>(), 1..40),
        nonce in "[!-+--~]{1,40}",
    ) {
        let verifier = verifier_of(&password, &salt, 3);
        for (typed, right) in [(&password, true), (&other, other == password)] {
            let mut client = sasl::ScramSha256::new(typed.as_bytes(), sasl::ChannelBinding::unsupported());
            let started = Server::start(verifier.clone(), client.message(), Binding::Impossible, &nonce);
            let (server, first) = started.unwrap();
            client.update(first.as_bytes()).unwrap();
            match server.finish(client.message()) {
                Ok((last, _)) => {
                    prop_assert!(right);
                    prop_assert!(client.finish(last.as_bytes()).is_ok());
                }
                Err(error) => prop_assert!(!right && error == ScramError::WrongProof, "{error}"),
            }
        }
    }

    /// No message from either side is more than an error.
    #[test]
    fn any_bytes_are_an_error_at_most(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let started = Server::start(pencil_without_work(), &bytes, Binding::Impossible, "n");
        prop_assert!(started.is_err());
        let (server, _) = Server::start(pencil_without_work(), b"n,,n=,r=x", Binding::Impossible, "n").unwrap();
        prop_assert!(server.finish(&bytes).is_err());
        let keys = ClientKeys {
            client: Key([1; KEY_BYTES]), server: Key([2; KEY_BYTES]), salt: vec![3], iterations: 1,
        };
        let (mut client, _) = Client::start(keys, Binding::Impossible, "n");
        prop_assert!(client.prove(&bytes).is_err());
        prop_assert!(client.finish(&bytes).is_err());
    }
}

fn pencil_without_work() -> Verifier {
    verifier_of("pencil", b"salt", 1)
}

/// CVE-2023-22332: credentials that somebody else can read. A verifier's keys are worth as much as the password.
#[test]
fn no_key_is_printed() {
    let verifier = pencil();
    let printed = format!("{verifier:?} {:?} {:?}", start_as_in_the_rfc(), Key([0x41; KEY_BYTES]));
    for key in [&verifier.stored, &verifier.server] {
        let bytes = format!("{:?}", key.0);
        assert!(!printed.contains(&bytes) && !printed.contains(&BASE64.encode(key.0)), "{printed}");
    }
    assert!(!printed.contains("65, 65") && !printed.contains("AAAA"), "{printed}");
}
