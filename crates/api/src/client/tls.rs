//! Which agents a client believes, and what it shows of itself.
//!
//! Hazard: believing the wrong one. An agent is believed if its certificate comes from the herd's
//! authority, may serve, and names the node that was dialled. A joining node, which has no authority yet,
//! believes the one whose hash its token carries, and nothing else.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use aws_lc_rs::digest;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs as provider, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, PeerIncompatible, RootCertStore,
    SignatureScheme, version,
};

use crate::identity::Identity;

#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the herd's authority cannot be used: {0}")]
    Authority(rustls::Error),
    #[error("the own certificate and key cannot be used: {0}")]
    Identity(rustls::Error),
}

/// SHA-256 of an authority's certificate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CaPin(pub [u8; 32]);

impl CaPin {
    pub fn of(certificate: &CertificateDer<'_>) -> CaPin {
        let hash = digest::digest(&digest::SHA256, certificate);
        CaPin(hash.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl fmt::Debug for CaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CaPin(")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// The TLS side of clients: shared by all clients of a process and replaced while they run.
#[derive(Debug)]
pub struct ClientTls {
    configs: RwLock<Arc<Configs>>,
    /// Grows with each replacement, so that idle connections of an earlier one are not used again.
    generation: AtomicU64,
}

#[derive(Debug)]
struct Configs {
    /// The server name is the node's, and must be the one in the certificate.
    named: Arc<ClientConfig>,
    /// Any node of the herd.
    any: Arc<ClientConfig>,
}

impl ClientTls {
    /// Believes the given authorities and shows `certificate`, whose first element is the leaf.
    pub fn new(
        authorities: &[CertificateDer<'static>],
        certificate: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<ClientTls, TlsError> {
        let configs = Configs::mutual(authorities, certificate, key)?;
        Ok(ClientTls { configs: RwLock::new(Arc::new(configs)), generation: AtomicU64::new(0) })
    }

    /// Believes any node below the authority with this hash, and shows nothing: for joining.
    pub fn pinned(pin: CaPin) -> ClientTls {
        let trust = Trust::Pin(pin);
        let configs = Configs {
            named: Configs::anonymous(trust.clone(), Expect::Dialled),
            any: Configs::anonymous(trust, Expect::AnyNode),
        };
        ClientTls { configs: RwLock::new(Arc::new(configs)), generation: AtomicU64::new(0) }
    }

    /// The bare configuration that believes the node which is dialled and shows nothing: for the fence, whose
    /// one message carries its own proof and which has no runtime to run a [`Client`](super::Client) on.
    pub fn believing(authorities: &[CertificateDer<'static>]) -> Result<Arc<ClientConfig>, TlsError> {
        let trust = Trust::Roots(Arc::new(roots(authorities)?));
        Ok(Configs::anonymous(trust, Expect::Dialled))
    }

    /// From now on, new connections use these. Nothing is changed where they do not fit together.
    pub fn replace(
        &self,
        authorities: &[CertificateDer<'static>],
        certificate: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), TlsError> {
        let configs = Configs::mutual(authorities, certificate, key)?;
        *self.configs.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(configs);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// What believes the node that is dialled, by its name, and shows the own certificate: for other protocols
    /// than HTTP, such as PostgreSQL's own.
    pub fn to_nodes(&self) -> Arc<ClientConfig> {
        self.config(false)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn config(&self, any_node: bool) -> Arc<ClientConfig> {
        let configs = self.configs.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(if any_node { &configs.any } else { &configs.named })
    }
}

impl Configs {
    fn mutual(
        authorities: &[CertificateDer<'static>],
        certificate: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Configs, TlsError> {
        let trust = Trust::Roots(Arc::new(roots(authorities)?));
        let config = |expect| {
            let verifier = AgentVerifier::new(trust.clone(), expect);
            let built = builder(verifier).with_client_auth_cert(certificate.clone(), key.clone_key());
            built.map(finish).map_err(TlsError::Identity)
        };
        Ok(Configs { named: config(Expect::Dialled)?, any: config(Expect::AnyNode)? })
    }

    fn anonymous(trust: Trust, expect: Expect) -> Arc<ClientConfig> {
        finish(builder(AgentVerifier::new(trust, expect)).with_no_client_auth())
    }
}

fn roots(authorities: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(TlsError::Authority)?;
    }
    Ok(roots)
}

fn builder(verifier: AgentVerifier) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&[&version::TLS13])
        .expect("the provider has cipher suites of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
}

/// A resumed session would skip the checks of [`AgentVerifier`], expiry among them, and saves little where
/// connections are kept.
fn finish(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

#[derive(Clone, Debug)]
enum Trust {
    Roots(Arc<RootCertStore>),
    Pin(CaPin),
}

#[derive(Clone, Copy, Debug)]
enum Expect {
    Dialled,
    AnyNode,
}

#[derive(Debug)]
struct AgentVerifier {
    trust: Trust,
    expect: Expect,
    algorithms: WebPkiSupportedAlgorithms,
}

impl AgentVerifier {
    fn new(trust: Trust, expect: Expect) -> AgentVerifier {
        let provider: CryptoProvider = provider::default_provider();
        AgentVerifier { trust, expect, algorithms: provider.signature_verification_algorithms }
    }
}

/// Put into a [`CertificateError::Other`], whose text reaches the user.
#[derive(Debug, thiserror::Error)]
enum Untrusted {
    #[error("the other end shows no authority with the hash in the token")]
    NotThePinnedAuthority,
    #[error("the other end is {found}, and {wanted} was dialled")]
    AnotherNode { found: Identity, wanted: String },
    #[error("the other end is {0}, not a node")]
    NotANode(Identity),
    #[error("{0}")]
    NoIdentity(#[from] crate::identity::NoIdentity),
}

impl From<Untrusted> for rustls::Error {
    fn from(reason: Untrusted) -> rustls::Error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(reason))))
    }
}

impl ServerCertVerifier for AgentVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let verify = |roots: &RootCertStore| {
            verify_server_cert_signed_by_trust_anchor(&parsed, roots, &[], now, self.algorithms.all)
        };
        match &self.trust {
            Trust::Roots(roots) => verify(roots)?,
            Trust::Pin(pin) => {
                let pinned = intermediates.iter().find(|shown| CaPin::of(shown) == *pin);
                let mut roots = RootCertStore::empty();
                roots.add(pinned.ok_or(Untrusted::NotThePinnedAuthority)?.clone().into_owned())?;
                verify(&roots)?;
            }
        }
        match (Identity::of_certificate(end_entity).map_err(Untrusted::from)?, self.expect) {
            (Identity::Node(_), Expect::AnyNode) => Ok(ServerCertVerified::assertion()),
            (Identity::Node(name), Expect::Dialled) if name == server_name.to_str() => {
                Ok(ServerCertVerified::assertion())
            }
            (found @ Identity::Node(_), Expect::Dialled) => {
                Err(Untrusted::AnotherNode { found, wanted: server_name.to_str().into_owned() }.into())
            }
            (found, _) => Err(Untrusted::NotANode(found).into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13))
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
