//! "PostgreSQL of this member is stopped and its term given up": signed while all is well, sent by the fence
//! after it has killed PostgreSQL, believed by whoever knows the herd's authority.
//!
//! Hazard: a message that leaves the fence before every process is gone lets the next primary open its
//! gate too early. It must be kept in memory, never on disk or in a log.

use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use jiff::Timestamp;
use pgherd_api::identity::{Identity, NoIdentity};
use pgherd_api::peer::Fenced;
use pgherd_core::types::{Member, NodeName, Term};
use rustls::crypto::aws_lc_rs as provider;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::anchor_from_trusted_cert;

use super::credentials::one_certificate;
use super::token::hex;
use super::{Credentials, CredentialsError};

#[derive(Debug, thiserror::Error)]
pub enum FencedRefused {
    #[error("the message is of herd {0}")]
    OtherHerd(String),
    #[error("the message names the member \"{0}\", which is none")]
    Member(String),
    #[error("the certificate in the message: {0}")]
    Certificate(#[from] CredentialsError),
    #[error("the certificate in the message is not one of this herd, or not in date: {0}")]
    NotTrusted(webpki::Error),
    #[error(transparent)]
    Identity(#[from] NoIdentity),
    #[error("the message about {member} is signed by {signer}")]
    OtherNode { member: String, signer: Identity },
    #[error("the signature is wrong")]
    Signature,
}

pub fn sign_fenced(
    credentials: &Credentials,
    herd_id: &str,
    cluster: &NodeName,
    member: &Member,
    term: Term,
) -> Result<Fenced, aws_lc_rs::error::Unspecified> {
    let mut message = Fenced {
        herd_id: herd_id.to_owned(),
        cluster: cluster.to_string(),
        member: member.to_string(),
        term: term.0,
        certificate: credentials.certificate_pem().to_owned(),
        signature: String::new(),
    };
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, credentials.private_key_der())
        .map_err(|_| aws_lc_rs::error::Unspecified)?;
    let signature = key.sign(&SystemRandom::new(), &signed_bytes(&message))?;
    message.signature = hex(signature.as_ref());
    Ok(message)
}

/// Who says it. What a sender may release, its own member, is part of the check; whether the term is still
/// open is the caller's.
pub fn verify_fenced(
    message: &Fenced,
    herd_id: &str,
    authorities: &[CertificateDer<'_>],
    now: Timestamp,
) -> Result<(Member, Term), FencedRefused> {
    if message.herd_id != herd_id {
        return Err(FencedRefused::OtherHerd(message.herd_id.clone()));
    }
    let member: Member = message.member.parse().map_err(|_| FencedRefused::Member(message.member.clone()))?;
    let certificate = one_certificate(&message.certificate)?;
    let parsed = webpki::EndEntityCert::try_from(&certificate).map_err(FencedRefused::NotTrusted)?;
    let anchors: Result<Vec<_>, _> = authorities.iter().map(anchor_from_trusted_cert).collect();
    let anchors = anchors.map_err(FencedRefused::NotTrusted)?;
    let since_epoch = SystemTime::from(now).duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    parsed
        .verify_for_usage(
            provider::default_provider().signature_verification_algorithms.all,
            &anchors,
            &[],
            UnixTime::since_unix_epoch(since_epoch),
            webpki::KeyUsage::client_auth(),
            None,
            None,
        )
        .map_err(FencedRefused::NotTrusted)?;
    match Identity::of_certificate(&certificate)? {
        Identity::Node(name) if name == member.node.as_str() => {}
        signer => return Err(FencedRefused::OtherNode { member: message.member.clone(), signer }),
    }
    let signature = from_hex(&message.signature).ok_or(FencedRefused::Signature)?;
    parsed
        .verify_signature(webpki::aws_lc_rs::ECDSA_P256_SHA256, &signed_bytes(message), &signature)
        .map_err(|_| FencedRefused::Signature)?;
    Ok((member, Term(message.term)))
}

/// Each part with its length before it, so that no two messages have the same bytes, behind a text that no
/// other signature of this key begins with.
fn signed_bytes(message: &Fenced) -> Vec<u8> {
    let mut bytes = b"pgherd: stopped and released, version 1\0".to_vec();
    for part in [&message.herd_id, &message.cluster, &message.member] {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part.as_bytes());
    }
    bytes.extend_from_slice(&message.term.to_be_bytes());
    bytes
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    /// An ASN.1 signature of P-256 has at most 72 bytes.
    const MAX_SIGNATURE_BYTES: usize = 72;
    if !text.len().is_multiple_of(2) || text.len() > 2 * MAX_SIGNATURE_BYTES || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{Authority, CA_VALIDITY, NODE_VALIDITY, NewKey, NodeSubject};

    fn now() -> Timestamp {
        "2026-11-20T20:54:54Z".parse().unwrap()
    }

    fn authority() -> Authority {
        Authority::create(&"shop".parse().unwrap(), "4f1c", now(), CA_VALIDITY).unwrap().0
    }

    fn credentials(authority: &Authority, name: &str) -> Credentials {
        let key = NewKey::generate().unwrap();
        let request = key.request().unwrap();
        let pem = if let Some(operator) = name.strip_prefix("operator:") {
            authority.issue_operator(&request, &operator.parse().unwrap(), now(), NODE_VALIDITY)
        } else {
            let subject = NodeSubject { name: &name.parse().unwrap(), hosts: &[], others: &[] };
            authority.issue_node(&request, &subject, now(), NODE_VALIDITY)
        };
        Credentials::from_pem(authority.certificate_pem(), &pem.unwrap(), &key.expose_pem()).unwrap()
    }

    fn message(credentials: &Credentials) -> Fenced {
        let member = "a_3".parse().unwrap();
        sign_fenced(credentials, "4f1c", &"main".parse().unwrap(), &member, Term(7)).unwrap()
    }

    fn verify(message: &Fenced, authority: &Authority) -> Result<(Member, Term), FencedRefused> {
        verify_fenced(message, "4f1c", &[authority.certificate().clone()], now())
    }

    #[test]
    fn a_node_speaks_for_its_own_member() {
        let authority = authority();
        let (member, term) = verify(&message(&credentials(&authority, "a")), &authority).unwrap();
        assert_eq!((member.to_string().as_str(), term), ("a_3", Term(7)));
    }

    #[test]
    fn nobody_else_speaks_for_it() {
        let authority = authority();
        for other in ["b", "operator:a"] {
            let refused = verify(&message(&credentials(&authority, other)), &authority);
            assert!(matches!(refused, Err(FencedRefused::OtherNode { .. })), "{other}");
        }
        let stranger = message(&credentials(&self::authority(), "a"));
        assert!(matches!(verify(&stranger, &authority), Err(FencedRefused::NotTrusted(_))));
    }

    #[test]
    fn every_part_is_signed() {
        let authority = authority();
        let signed = message(&credentials(&authority, "a"));
        let changes: &[fn(&mut Fenced)] = &[
            |message| message.term += 1,
            |message| message.cluster.push('x'),
            |message| message.member = "a_4".to_owned(),
            |message| message.signature.replace_range(0..2, "00"),
            |message| message.signature.clear(),
            |message| message.signature = "zz".to_owned(),
            |message| message.signature = "ü".repeat(8),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut changed = signed.clone();
            change(&mut changed);
            let refused = verify(&changed, &authority);
            assert!(matches!(refused, Err(FencedRefused::Signature)), "change {index}: {refused:?}");
        }
        let mut elsewhere = signed;
        elsewhere.herd_id = "other".to_owned();
        assert!(matches!(verify(&elsewhere, &authority), Err(FencedRefused::OtherHerd(_))));
    }

    /// The same letters cut elsewhere are another message.
    #[test]
    fn parts_cannot_move_into_each_other() {
        let signed = message(&credentials(&authority(), "a"));
        let moved = Fenced { herd_id: "4f1cm".to_owned(), cluster: "ain".to_owned(), ..signed.clone() };
        assert_eq!(signed.herd_id.clone() + &signed.cluster, moved.herd_id.clone() + &moved.cluster);
        assert_ne!(signed_bytes(&signed), signed_bytes(&moved));
    }

    #[test]
    fn an_expired_node_is_not_believed() {
        let authority = authority();
        let signed = message(&credentials(&authority, "a"));
        let later = Timestamp::from_second(now().as_second() + 6 * 365 * 86400).unwrap();
        let refused = verify_fenced(&signed, "4f1c", &[authority.certificate().clone()], later);
        assert!(matches!(refused, Err(FencedRefused::NotTrusted(_))));
    }
}
