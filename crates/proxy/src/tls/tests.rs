//! The order of attempts, and what certificates say.

use rcgen::{CertificateParams, DnType, KeyPair};

use super::*;
use crate::names::Names;

/// For each mode, what is tried when each attempt fails as the server makes it fail.
fn tried(mode: TlsMode, has_tls: bool, failed: impl Fn(bool) -> Failed) -> Vec<Attempt> {
    let mut tried = Vec::new();
    for attempt in attempts(mode) {
        tried.push(*attempt);
        let encrypted = *attempt != Attempt::Clear && has_tls;
        if !may_try_again(*attempt, failed(encrypted)) {
            break;
        }
    }
    tried
}

#[test]
fn the_other_way_is_tried_when_libpq_tries_it_and_not_else() {
    use Attempt::{Clear, Demanded, Offered};
    let refused = |encrypted| Failed::Refused { encrypted };
    let handshake = |encrypted| if encrypted { Failed::Handshake } else { Failed::Otherwise };
    let otherwise = |_| Failed::Otherwise;
    for (mode, refused_with_tls, refused_without, no_handshake) in [
        (TlsMode::Disable, &[Clear][..], &[Clear][..], &[Clear][..]),
        (TlsMode::Allow, &[Clear, Offered], &[Clear, Offered], &[Clear]),
        (TlsMode::Prefer, &[Offered, Clear], &[Offered], &[Offered, Clear]),
        (TlsMode::Require, &[Demanded], &[Demanded], &[Demanded]),
        (TlsMode::VerifyCa, &[Demanded], &[Demanded], &[Demanded]),
        (TlsMode::VerifyFull, &[Demanded], &[Demanded], &[Demanded]),
    ] {
        assert_eq!(tried(mode, true, refused), refused_with_tls, "{mode}");
        assert_eq!(tried(mode, false, refused), refused_without, "{mode}");
        assert_eq!(tried(mode, true, handshake), no_handshake, "{mode}");
        assert_eq!(tried(mode, true, otherwise).len(), 1, "{mode}: a server that is away is away either way");
    }
}

fn made(names: &[&str], key: &KeyPair) -> CertificateDer<'static> {
    let mut params = CertificateParams::new(vec!["host".to_owned()]).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    for name in names {
        params.distinguished_name.push(DnType::CommonName, *name);
    }
    params.self_signed(key).unwrap().der().clone()
}

#[test]
fn a_certificate_names_one_user_or_nobody() {
    let key = KeyPair::generate().unwrap();
    let common_name = |certificate: &CertificateDer<'_>| Names::of(certificate).common;
    assert_eq!(common_name(&made(&["anna"], &key)).as_deref(), Some("anna"));
    assert_eq!(common_name(&made(&["Änne Müller"], &key)).as_deref(), Some("Änne Müller"));
    assert_eq!(common_name(&made(&[], &key)), None, "the name of its host is no user's");
    assert_eq!(common_name(&made(&[""], &key)), None);
    assert_eq!(common_name(&made(&["anna\0x"], &key)), None);
    assert_eq!(common_name(&CertificateDer::from(vec![1, 2, 3])), None);
}

#[test]
fn a_binding_is_by_the_hash_that_the_certificate_is_signed_with() {
    for (algorithm, bytes) in [
        (&rcgen::PKCS_ECDSA_P256_SHA256, Some(32)),
        (&rcgen::PKCS_ECDSA_P384_SHA384, Some(48)),
        // It is signed without one, and PostgreSQL knows no binding to it either.
        (&rcgen::PKCS_ED25519, None),
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let certificate = made(&["a"], &key);
        assert_eq!(end_point(&certificate).map(|hash| hash.len()), bytes, "{algorithm:?}");
    }
    assert_eq!(end_point(&CertificateDer::from(Vec::new())), None);
}
