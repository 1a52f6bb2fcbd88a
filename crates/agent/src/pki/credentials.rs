//! What a node or a proxy shows of itself and whom it believes: its key, its certificate, the herd's authorities.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::client::{ClientTls, TlsError};
use pgherd_api::identity::{Identity, NoIdentity};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::CLOCK_SKEW;
use super::files::{self, FileError};

/// Names in the node's `pki` directory. PostgreSQL's `ssl_*` settings and libpq's `ssl*` parameters name the
/// same files.
const AUTHORITY_FILE: &str = "ca.pem";
const CERTIFICATE_FILE: &str = "node.pem";
const KEY_FILE: &str = "node.key";

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("not a PEM certificate: {0}")]
    Unreadable(String),
    #[error("{count} certificates where there must be one")]
    NotOne { count: usize },
    #[error("no certificate of an authority")]
    NoAuthority,
    #[error("not an ECDSA P-256 private key in PEM form")]
    Key,
    #[error("the private key does not belong to the certificate")]
    KeyOfAnother,
    #[error(transparent)]
    Identity(#[from] NoIdentity),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the certificate cannot be used: {0}")]
    Rustls(#[from] rustls::Error),
}

/// A fresh key; it never leaves its host.
pub struct NewKey(KeyPair);

impl NewKey {
    pub fn generate() -> Result<NewKey, rcgen::Error> {
        Ok(NewKey(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    pub fn from_pem(pem: &str) -> Result<NewKey, CredentialsError> {
        KeyPair::from_pem(pem).map(NewKey).map_err(|_| CredentialsError::Key)
    }

    /// The request for a certificate, as PEM. It names nobody: names are the authority's business.
    pub fn request(&self) -> Result<String, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serialize_request(&self.0)?.pem()
    }

    /// For a file of mode 0600.
    pub fn expose_pem(&self) -> String {
        self.0.serialize_pem()
    }
}

impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NewKey(…)")
    }
}

/// Checked to belong together when made.
pub struct Credentials {
    identity: Identity,
    authorities: Vec<CertificateDer<'static>>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    key: KeyPair,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    pub fn from_pem(
        authorities: &str,
        certificate: &str,
        key: &str,
    ) -> Result<Credentials, CredentialsError> {
        let key = KeyPair::from_pem(key).map_err(|_| CredentialsError::Key)?;
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(CredentialsError::Key);
        }
        let authorities = certificates(authorities)?;
        if authorities.is_empty() {
            return Err(CredentialsError::NoAuthority);
        }
        let leaf = one_certificate(certificate)?;
        check_key_fits(&leaf, &key)?;
        let (not_before, not_after) = validity(&leaf)?;
        Ok(Credentials {
            identity: Identity::of_certificate(&leaf)?,
            authorities,
            certificate: leaf,
            certificate_pem: certificate.to_owned(),
            key,
            not_before,
            not_after,
        })
    }

    /// From the `pki` directory of a node.
    pub fn load(directory: &Path) -> Result<Credentials, CredentialsError> {
        let paths = Paths::of(directory);
        Credentials::from_pem(
            &files::read_limited(&paths.authority)?,
            &files::read_limited(&paths.certificate)?,
            &files::read_limited(&paths.key)?,
        )
    }

    /// Into the `pki` directory of a node. The key goes first: a certificate without its key would stop the
    /// agent and PostgreSQL from starting, a key without its certificate only makes the node join again.
    pub fn save(
        directory: &Path,
        authorities: &str,
        certificate: &str,
        key: &NewKey,
    ) -> Result<(), CredentialsError> {
        let key_pem = key.expose_pem();
        Credentials::from_pem(authorities, certificate, &key_pem)?;
        let paths = Paths::of(directory);
        files::write_private(&paths.key, &key_pem)?;
        files::write_public(&paths.authority, authorities)?;
        files::write_public(&paths.certificate, certificate)?;
        Ok(())
    }

    /// A renewed certificate for the key that is there. One file changes, in one step.
    pub fn renew(&self, directory: &Path, certificate: &str) -> Result<Credentials, CredentialsError> {
        let authorities: String = self.authorities.iter().map(|authority| pem_of(authority)).collect();
        let renewed = Credentials::from_pem(&authorities, certificate, &self.key.serialize_pem())?;
        if renewed.identity != self.identity {
            return Err(CredentialsError::KeyOfAnother);
        }
        files::write_public(&Paths::of(directory).certificate, certificate)?;
        Ok(renewed)
    }

    /// The request for that certificate, as PEM.
    pub fn renewal_request(&self) -> Result<String, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serialize_request(&self.key)?.pem()
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn expires(&self) -> Timestamp {
        self.not_after
    }

    /// When a third of the time is left.
    pub fn renewal_is_due(&self, now: Timestamp) -> bool {
        let whole_s = self.not_after.as_second() - self.not_before.as_second();
        self.not_after.as_second() - now.as_second() < whole_s / 3
    }

    /// For how long it was made: the next one is asked for as long.
    pub fn valid_for(&self) -> Duration {
        let whole_s = self.not_after.as_second() - self.not_before.as_second();
        Duration::from_secs(u64::try_from(whole_s).unwrap_or(0)).saturating_sub(CLOCK_SKEW)
    }

    /// The host names and addresses that it bears besides its holder's name: the next one bears them too.
    pub fn hosts(&self) -> Vec<String> {
        let Ok((_, parsed)) = X509Certificate::from_der(&self.certificate) else { return Vec::new() };
        let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
        let node = match &self.identity {
            Identity::Node(name) => Some(name.as_str()),
            Identity::Operator(_) | Identity::Proxy(_) => None,
        };
        let host = |name: &GeneralName<'_>| match name {
            GeneralName::DNSName(name) if Some(*name) != node => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
                16 => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
                _ => None,
            },
            _ => None,
        };
        names.value.general_names.iter().filter_map(host).collect()
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn authorities(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    pub fn client_tls(&self) -> Result<ClientTls, CredentialsError> {
        Ok(ClientTls::new(&self.authorities, self.chain(), self.private_key())?)
    }

    /// Lets a running client use these from its next connection on.
    pub fn replace_in(&self, tls: &ClientTls) -> Result<(), CredentialsError> {
        Ok(tls.replace(&self.authorities, self.chain(), self.private_key())?)
    }

    /// The authorities are shown too: a joining node has nothing but a hash to know them by.
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        let mut chain = vec![self.certificate.clone()];
        chain.extend(self.authorities.iter().cloned());
        chain
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }

    pub(super) fn private_key_der(&self) -> &[u8] {
        self.key.serialized_der()
    }
}

/// The files, for the settings that name them.
#[derive(Clone, Debug)]
pub struct Paths {
    pub authority: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Paths {
    pub fn of(directory: &Path) -> Paths {
        Paths {
            authority: directory.join(AUTHORITY_FILE),
            certificate: directory.join(CERTIFICATE_FILE),
            key: directory.join(KEY_FILE),
        }
    }
}

pub(crate) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    parsed.map_err(|error| CredentialsError::Unreadable(error.to_string()))
}

pub(super) fn one_certificate(pem: &str) -> Result<CertificateDer<'static>, CredentialsError> {
    let mut found = certificates(pem)?;
    match (found.pop(), found.len()) {
        (Some(certificate), 0) => Ok(certificate),
        (last, others) => Err(CredentialsError::NotOne { count: others + usize::from(last.is_some()) }),
    }
}

pub(super) fn check_key_fits(
    certificate: &CertificateDer<'_>,
    key: &KeyPair,
) -> Result<(), CredentialsError> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|error| CredentialsError::Unreadable(error.to_string()))?;
    match parsed.subject_public_key_info().as_ref() == key.subject_public_key_info() {
        true => Ok(()),
        false => Err(CredentialsError::KeyOfAnother),
    }
}

pub(super) fn not_after(certificate: &CertificateDer<'_>) -> Result<Timestamp, CredentialsError> {
    validity(certificate).map(|(_, not_after)| not_after)
}

fn validity(certificate: &CertificateDer<'_>) -> Result<(Timestamp, Timestamp), CredentialsError> {
    let unreadable = |error: &dyn fmt::Display| CredentialsError::Unreadable(error.to_string());
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| unreadable(&error))?;
    let moment = |seconds: i64| Timestamp::from_second(seconds).map_err(|error| unreadable(&error));
    let validity = parsed.validity();
    Ok((moment(validity.not_before.timestamp())?, moment(validity.not_after.timestamp())?))
}

fn pem_of(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in encoded.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;
    use crate::pki::{Authority, CA_VALIDITY, NodeSubject};

    fn now() -> Timestamp {
        "2026-11-20T20:54:54Z".parse().unwrap()
    }

    fn issue(authority: &Authority, request: &str, days: u64) -> String {
        let subject = NodeSubject { name: &"a".parse().unwrap(), hosts: &[], others: &[] };
        authority.issue_node(request, &subject, now(), Duration::from_secs(days * 86400)).unwrap()
    }

    #[test]
    fn saved_credentials_come_back_with_the_modes_that_postgresql_wants() {
        let directory = tempfile::tempdir().unwrap();
        let (authority, _) = Authority::create(&"shop".parse().unwrap(), "4f1c", now(), CA_VALIDITY).unwrap();
        let key = NewKey::generate().unwrap();
        let certificate = issue(&authority, &key.request().unwrap(), 90);
        Credentials::save(directory.path(), authority.certificate_pem(), &certificate, &key).unwrap();

        let loaded = Credentials::load(directory.path()).unwrap();
        assert_eq!(loaded.identity(), &Identity::Node("a".to_owned()));
        for (file, mode) in [("node.key", 0o600), ("node.pem", 0o644), ("ca.pem", 0o644)] {
            let metadata = std::fs::metadata(directory.path().join(file)).unwrap();
            assert_eq!(metadata.permissions().mode() & 0o777, mode, "{file}");
        }

        let renewed = issue(&authority, &loaded.renewal_request().unwrap(), 180);
        let renewed = loaded.renew(directory.path(), &renewed).unwrap();
        assert!(renewed.expires() > loaded.expires());
        assert_eq!(Credentials::load(directory.path()).unwrap().expires(), renewed.expires());
    }

    #[test]
    fn what_does_not_belong_together_is_not_saved() {
        let directory = tempfile::tempdir().unwrap();
        let (authority, _) = Authority::create(&"shop".parse().unwrap(), "4f1c", now(), CA_VALIDITY).unwrap();
        let certificate = issue(&authority, &NewKey::generate().unwrap().request().unwrap(), 90);
        let other = NewKey::generate().unwrap();
        let refused = Credentials::save(directory.path(), authority.certificate_pem(), &certificate, &other);
        assert!(matches!(refused, Err(CredentialsError::KeyOfAnother)));
        assert!(Credentials::load(directory.path()).is_err());
    }

    #[test]
    fn renewal_is_due_when_a_third_is_left() {
        let (authority, _) = Authority::create(&"shop".parse().unwrap(), "4f1c", now(), CA_VALIDITY).unwrap();
        let key = NewKey::generate().unwrap();
        let certificate = issue(&authority, &key.request().unwrap(), 90);
        let credentials =
            Credentials::from_pem(authority.certificate_pem(), &certificate, &key.expose_pem()).unwrap();
        let after_days = |days: i64| Timestamp::from_second(now().as_second() + days * 86400).unwrap();
        assert!(!credentials.renewal_is_due(after_days(59)));
        assert!(credentials.renewal_is_due(after_days(61)));
        assert!(credentials.renewal_is_due(after_days(91)), "after the end, too");
    }
}
