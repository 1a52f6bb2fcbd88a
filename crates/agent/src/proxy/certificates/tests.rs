//! Files that are replaced, rightly and wrongly.

use std::time::Duration;

use super::*;
use crate::pki::{Authority, CA_VALIDITY, NewKey, ProxySubject, write_private, write_public};

fn authority() -> Authority {
    let now = Timestamp::now();
    Authority::create(&"shop".parse().unwrap(), "4f1c", now, CA_VALIDITY).unwrap().0
}

fn issue(authority: &Authority, name: &str, key: &NewKey) -> String {
    let name = name.parse().unwrap();
    let subject = ProxySubject { name: &name, hosts: &["127.0.0.1".to_owned()], nodes: &[] };
    let lasts = Duration::from_secs(86_400);
    authority.issue_proxy(&key.request().unwrap(), &subject, Timestamp::now(), lasts).unwrap()
}

fn save(dir: &Path, authority: &Authority, name: &str) {
    let key = NewKey::generate().unwrap();
    Credentials::save(dir, authority.certificate_pem(), &issue(authority, name, &key), &key).unwrap();
}

fn load(dir: &Path) -> Result<Certificates, CertificatesError> {
    Certificates::load(dir.to_owned(), "up".parse().unwrap())
}

const NOTHING: Changed = Changed { own: false, authorities: false, shown: false };

#[test]
fn the_own_certificate_is_replaced_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let (herds, pki) = (authority(), dir.path());
    save(pki, &herds, "up");
    let mut certificates = load(pki).unwrap();
    let wanted = Tls::default();
    assert_eq!(certificates.look(&wanted).unwrap(), Changed { shown: true, ..NOTHING });
    assert_eq!(certificates.look(&wanted).unwrap(), NOTHING);
    let first = certificates.credentials.certificate().clone();

    // A certificate without its key, as in the middle of a replacement; another proxy's; none at all.
    let paths = Paths::of(pki);
    let next = NewKey::generate().unwrap();
    let pem = issue(&herds, "up", &next);
    write_public(&paths.certificate, &pem).unwrap();
    let error = certificates.look(&wanted).unwrap_err();
    assert!(
        matches!(error, CertificatesError::Own { source: CredentialsError::KeyOfAnother, .. }),
        "{error:?}"
    );
    save(pki, &herds, "other");
    assert!(matches!(certificates.look(&wanted), Err(CertificatesError::AnotherName { .. })));
    write_public(&paths.certificate, "nonsense").unwrap();
    assert!(certificates.look(&wanted).is_err());
    assert_eq!(*certificates.credentials.certificate(), first, "what is right stays");
    assert!(load(pki).is_err(), "and nobody starts with it");

    write_private(&paths.key, &next.expose_pem()).unwrap();
    write_public(&paths.certificate, &pem).unwrap();
    assert_eq!(certificates.look(&wanted).unwrap(), Changed { own: true, shown: true, authorities: false });
    assert_ne!(*certificates.credentials.certificate(), first);

    // One that the proxy asked for itself; and then the herd's authority is another one.
    let renewed = issue(&herds, "up", &next);
    certificates.save(&renewed).unwrap();
    assert_eq!(certificates.look(&wanted).unwrap(), Changed { own: true, shown: true, authorities: false });
    save(pki, &authority(), "up");
    assert_eq!(certificates.look(&wanted).unwrap(), Changed { own: true, shown: true, authorities: true });
    assert_eq!(certificates.look(&wanted).unwrap(), NOTHING);
}

#[test]
fn what_clients_are_shown_can_be_another_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki");
    std::fs::create_dir(&pki).unwrap();
    save(&pki, &authority(), "up");
    let mut certificates = load(&pki).unwrap();
    let file = |name: &str| Some(dir.path().join(name).display().to_string());
    let wanted = Tls {
        client_cert_file: file("db.pem"),
        client_key_file: file("db.key"),
        client_ca_file: file("clients.pem"),
        ..Tls::default()
    };
    assert!(matches!(certificates.look(&wanted), Err(CertificatesError::Read(_))), "they are not there yet");
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let made = rcgen::generate_simple_self_signed(["db.example.com".to_owned()]).unwrap();
    put("db.pem", &made.cert.pem());
    put("db.key", &made.signing_key.serialize_pem());
    put("clients.pem", authority().certificate_pem());
    assert_eq!(certificates.look(&wanted).unwrap(), Changed { shown: true, ..NOTHING });
    assert!(certificates.shown().unwrap().verifies_clients);
    assert_eq!(certificates.look(&wanted).unwrap(), NOTHING);
    let shown = certificates.shown().unwrap().certificate_hash.clone();

    let other = rcgen::generate_simple_self_signed(["db.example.com".to_owned()]).unwrap();
    for (name, broken) in [
        ("db.key", other.signing_key.serialize_pem()),
        ("db.key", "nonsense".to_owned()),
        ("db.pem", String::new()),
        ("clients.pem", "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n".to_owned()),
    ] {
        let path = dir.path().join(name);
        let right = std::fs::read_to_string(&path).unwrap();
        put(name, &broken);
        let error = certificates.look(&wanted).unwrap_err();
        let is_named = error.to_string().contains(name) || matches!(error, CertificatesError::Tls(_));
        assert!(is_named, "{name}: {error}");
        assert_eq!(certificates.shown().unwrap().certificate_hash, shown, "{name}");
        put(name, &right);
    }
    assert_eq!(certificates.look(&wanted).unwrap(), NOTHING, "what was right is right again");

    put("db.pem", &other.cert.pem());
    put("db.key", &other.signing_key.serialize_pem());
    // The own certificate is not what clients see, and is none of their business.
    save(&pki, &authority(), "up");
    assert_eq!(certificates.look(&wanted).unwrap(), Changed { own: true, authorities: true, shown: true });
    assert_ne!(certificates.shown().unwrap().certificate_hash, shown);
    let without = Tls::default();
    assert_eq!(certificates.look(&without).unwrap(), Changed { shown: true, ..NOTHING });
    assert!(!certificates.shown().unwrap().verifies_clients);
}

#[test]
fn a_mode_of_a_later_version_is_not_guessed_at() {
    assert_eq!(mode("client_tls_mode", "verify-ca").unwrap(), TlsMode::VerifyCa);
    let error = mode("client_tls_mode", "post-quantum").unwrap_err();
    assert_eq!(
        error.to_string(),
        "\"post-quantum\" of client_tls_mode is a mode that this version of the proxy does not know"
    );
}
