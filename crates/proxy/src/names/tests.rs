//! Subjects as OpenSSL writes them: `openssl x509 -noout -subject -nameopt RFC2253`.

use rustls::pki_types::pem::PemObject as _;

use super::*;

/// What OpenSSL writes, between bars, in front of each certificate.
const SUBJECTS: &str = include_str!("../../testdata/subjects.txt");

fn certificates() -> Vec<(String, CertificateDer<'static>)> {
    let pem = |text: &str| CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
    let each = SUBJECTS.split_inclusive("-----END CERTIFICATE-----\n").filter(|text| !text.trim().is_empty());
    each.map(|text| {
        let subject = text.trim_start().lines().next().unwrap();
        let subject = subject.strip_prefix('|').and_then(|rest| rest.strip_suffix('|')).unwrap();
        (subject.to_owned(), pem(text))
    })
    .collect()
}

#[test]
fn a_subject_is_written_as_openssl_writes_it() {
    let certificates = certificates();
    assert!(certificates.len() >= 12, "{}", certificates.len());
    for (expected, certificate) in certificates {
        assert_eq!(Names::of(&certificate).subject, Some(expected));
    }
}

#[test]
fn one_common_name_is_one_and_two_are_none() {
    let common = |subject: &str| {
        let certificates = certificates();
        let (_, found) = certificates.iter().find(|(known, _)| known == subject).expect(subject);
        Names::of(found).common
    };
    let plain = "CN=ssltestuser-dn,OU=Testing,OU=Engineering,O=PGDG,street=Way 1,L=Munich,ST=Bavaria,C=DE";
    assert_eq!(common(plain).as_deref(), Some("ssltestuser-dn"));
    assert_eq!(common("CN=two,CN=one,O=x"), None);
    assert_eq!(Names::of(&CertificateDer::from_slice(b"nothing")), Names::default());
}
