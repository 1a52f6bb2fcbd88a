//! TLS on both sides: what is believed of the other one, and what a certificate says.
//!
//! How strictly servers are judged is one of libpq's six modes ([`TlsMode`]). Below `verify-full` less is asked of their
//! certificates, and below `require` they may have none; [`attempts`] is the order in which libpq tries. Clients are asked for
//! a certificate where there is an authority for them; who needs none and shows a wrong one is refused all the same, as by
//! PostgreSQL.
//!
//! Leaves out: files, and who makes certificates. Hazard: a verifier that believes too much. The one that asks for nothing is
//! used for `require` and less, and never for the proxy's own questions.

use std::fmt;
use std::io;
use std::sync::Arc;

use aws_lc_rs::digest;
use pgherd_core::spec::TlsMode;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs as provider, verify_tls12_signature,
    verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use x509_parser::oid_registry::{
    OID_PKCS1_MD5WITHRSAENC, OID_PKCS1_SHA1WITHRSA, OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA,
    OID_PKCS1_SHA512WITHRSA, OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ECDSA_WITH_SHA512,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::net::ALPN;

/// How one connection to a server is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    Clear,
    /// TLS is asked for; a server that has none may be spoken to in clear.
    Offered,
    /// Or not at all.
    Demanded,
}

/// In their order. What can fail so that the next one is worth a try says [`may_try_again`].
pub(crate) fn attempts(mode: TlsMode) -> &'static [Attempt] {
    match mode {
        TlsMode::Disable => &[Attempt::Clear],
        TlsMode::Allow => &[Attempt::Clear, Attempt::Offered],
        TlsMode::Prefer => &[Attempt::Offered, Attempt::Clear],
        TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull => &[Attempt::Demanded],
    }
}

/// How far an attempt came that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The server granted TLS, and then there was no handshake.
    Handshake,
    /// The server refused in its own words, before it had let the proxy in.
    Refused {
        encrypted: bool,
    },
    Otherwise,
}

/// Is it worth to try the other way? As libpq: after a handshake that failed, or a refusal that may be for the way itself.
pub(crate) fn may_try_again(attempt: Attempt, failed: Failed) -> bool {
    match (attempt, failed) {
        (Attempt::Offered, Failed::Handshake) => true,
        // What was granted no TLS was tried in clear already.
        (Attempt::Offered, Failed::Refused { encrypted }) => encrypted,
        (Attempt::Clear, Failed::Refused { .. }) => true,
        _ => false,
    }
}

/// What a server's certificate must be.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Any: `require` and less.
    Anything,
    /// Signed by one of these, whatever it is for: `verify-ca`.
    Authorities(Arc<RootCertStore>),
}

/// For connections to servers that are believed less than `verify-full` asks. `shown`: the own certificate, with what it is
/// signed by, and its key.
pub fn to_servers(
    trust: Trust,
    shown: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let crypto = provider::default_provider();
    let algorithms = crypto.signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(Arc::new(crypto))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Lenient { trust, algorithms }));
    let mut config = match shown {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    // A session that is resumed is not verified again.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Lenient {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Trust::Authorities(roots) = &self.trust {
            let parsed = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    /// Whoever shows a certificate must have its key, also where the certificate may be any.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What clients are shown, and whose certificates they may show.
#[derive(Clone)]
pub struct ClientTls {
    pub config: Arc<ServerConfig>,
    /// `tls-server-end-point` of the certificate (RFC 5929), for channel binding.
    pub certificate_hash: Option<Vec<u8>>,
    /// There is an authority for certificates of clients: what one shows was verified.
    pub verifies_clients: bool,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("verifies_clients", &self.verifies_clients).finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum UnusableTls {
    #[error("there is no certificate")]
    NoCertificate,
    #[error(transparent)]
    Certificate(#[from] rustls::Error),
    #[error("the authority for clients cannot be used: {0}")]
    Authority(String),
}

impl ClientTls {
    /// `chain` begins with the certificate itself.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        authorities: Option<&[CertificateDer<'static>]>,
    ) -> Result<ClientTls, UnusableTls> {
        let crypto: Arc<CryptoProvider> = Arc::new(provider::default_provider());
        let certificate_hash = end_point(chain.first().ok_or(UnusableTls::NoCertificate)?);
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&crypto)).with_safe_default_protocol_versions()?;
        let builder = match authorities {
            None => builder.with_no_client_auth(),
            Some(authorities) => {
                let unusable = |error: &dyn fmt::Display| UnusableTls::Authority(error.to_string());
                let mut roots = RootCertStore::empty();
                for authority in authorities {
                    roots.add(authority.clone()).map_err(|error| unusable(&error))?;
                }
                // Who must have one is said by the mode and by lines of hba, in words that the client can read.
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), crypto)
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| unusable(&error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(chain, key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A certificate that was replaced, or has expired, would live on in sessions that are resumed.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let verifies_clients = authorities.is_some();
        Ok(ClientTls { config: Arc::new(config), certificate_hash, verifies_clients })
    }
}

/// `tls-server-end-point` (RFC 5929, section 4.1): the certificate's hash by the function that it is signed with, or by
/// SHA-256 where that is weaker. `None`: its signature has no such function, or one that is not known.
pub fn end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let oid = &parsed.signature_algorithm.algorithm;
    let known = [
        (OID_PKCS1_MD5WITHRSAENC, &digest::SHA256),
        (OID_PKCS1_SHA1WITHRSA, &digest::SHA256),
        (OID_PKCS1_SHA256WITHRSA, &digest::SHA256),
        (OID_PKCS1_SHA384WITHRSA, &digest::SHA384),
        (OID_PKCS1_SHA512WITHRSA, &digest::SHA512),
        (OID_SIG_ECDSA_WITH_SHA256, &digest::SHA256),
        (OID_SIG_ECDSA_WITH_SHA384, &digest::SHA384),
        (OID_SIG_ECDSA_WITH_SHA512, &digest::SHA512),
    ];
    let (_, function) = known.into_iter().find(|(known, _)| known == oid)?;
    Some(digest::digest(function, certificate).as_ref().to_vec())
}

/// Why there was no connection.
#[derive(Debug)]
pub(crate) enum NotConnected {
    Io(io::Error),
    Handshake(io::Error),
}

impl From<io::Error> for NotConnected {
    fn from(error: io::Error) -> NotConnected {
        NotConnected::Io(error)
    }
}

impl fmt::Display for NotConnected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotConnected::Io(error) => error.fmt(f),
            NotConnected::Handshake(error) => write!(f, "TLS: {error}"),
        }
    }
}

#[cfg(test)]
mod tests;
