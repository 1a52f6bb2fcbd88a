//! A proxy's certificates: its own, by which agents and servers know it, and what its clients are shown.
//!
//! Their files may be replaced while it runs, by the proxy itself, by an operator or by a tool: they are looked at again and
//! again, and what has changed holds for the connections that come then; nobody is dropped. Files that do not fit together
//! change nothing. Hazard: half of a replacement, so a file is in force only with those that belong to it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use jiff::Timestamp;
use pgherd_api::client::ClientTls;
use pgherd_api::identity::Identity;
use pgherd_api::proxy::Tls;
use pgherd_core::spec::TlsMode;
use pgherd_core::types::NodeName;
use pgherd_proxy::ServerTls;
use pgherd_proxy::tls::{Trust, UnusableTls, to_servers};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::pki::{Credentials, CredentialsError, FileError, Paths, certificates, read_limited};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificatesError {
    #[error("the proxy's certificate in {} cannot be used", .dir.display())]
    Own { dir: PathBuf, source: CredentialsError },
    #[error("the certificate in {} is that of {found}, and {wanted} is the proxy's name", .dir.display())]
    AnotherName { dir: PathBuf, found: Identity, wanted: NodeName },
    #[error(transparent)]
    Read(#[from] FileError),
    #[error("{} cannot be used: {why}", .path.display())]
    File { path: PathBuf, why: String },
    #[error("what clients are shown cannot be used")]
    Tls(#[from] UnusableTls),
    #[error("\"{mode}\" of {key} is a mode that this version of the proxy does not know")]
    Mode { key: &'static str, mode: String },
}

/// What stands in the proxy's own files.
#[derive(PartialEq, Eq)]
struct OwnTexts {
    authority: String,
    certificate: String,
    key: String,
}

/// And in those that the herd file names for clients.
#[derive(PartialEq, Eq)]
struct ShownTexts {
    certificate: Option<String>,
    key: Option<String>,
    authority: Option<String>,
    own: Option<String>,
}

pub(super) struct Certificates {
    pki_dir: PathBuf,
    name: NodeName,
    pub(super) credentials: Credentials,
    pub(super) to_agents: Arc<ClientTls>,
    pub(super) to_nodes: Arc<ToNodes>,
    own: OwnTexts,
    /// What clients are shown, and what it was made of.
    shown: Option<(ShownTexts, pgherd_proxy::ClientTls)>,
}

/// What is in force afterwards is another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) own: bool,
    /// Also who signs the certificates of servers.
    pub(super) authorities: bool,
    pub(super) shown: bool,
}

impl Certificates {
    pub(super) fn load(pki_dir: PathBuf, name: NodeName) -> Result<Certificates, CertificatesError> {
        let own = read_own(&pki_dir)?;
        let credentials = credentials(&pki_dir, &name, &own)?;
        let unusable = |source| CertificatesError::Own { dir: pki_dir.clone(), source };
        let to_agents = Arc::new(credentials.client_tls().map_err(unusable)?);
        let to_nodes = ToNodes::new(Arc::clone(&to_agents), &credentials)?;
        let to_nodes = Arc::new(to_nodes);
        Ok(Certificates { pki_dir, name, credentials, to_agents, to_nodes, own, shown: None })
    }

    /// Looks at all files, and puts in force what has changed. An error leaves everything as it was, but for the own
    /// certificate if only what clients are shown is wrong.
    pub(super) fn look(&mut self, wanted: &Tls) -> Result<Changed, CertificatesError> {
        let mut changed = Changed::default();
        let own = read_own(&self.pki_dir)?;
        if own != self.own {
            let renewed = credentials(&self.pki_dir, &self.name, &own)?;
            let unusable = |source| CertificatesError::Own { dir: self.pki_dir.clone(), source };
            let lower = Lower::new(&renewed)?;
            renewed.replace_in(&self.to_agents).map_err(unusable)?;
            self.to_nodes.lower.store(Arc::new(lower));
            changed.own = true;
            changed.authorities = renewed.authorities() != self.credentials.authorities();
            tracing::info!(
                serial = serial(renewed.certificate()),
                expires = %renewed.expires(),
                "the proxy has another certificate"
            );
            (self.credentials, self.own) = (renewed, own);
        }
        let texts = self.read_shown(wanted)?;
        if self.shown.as_ref().is_none_or(|(known, _)| *known != texts) {
            let shown = self.make_shown(wanted, &texts)?;
            changed.shown = true;
            self.shown = Some((texts, shown));
        }
        Ok(changed)
    }

    /// A renewed certificate for the key that is there, into its file; the next look finds it.
    pub(super) fn save(&self, certificate: &str) -> Result<(), CredentialsError> {
        self.credentials.renew(&self.pki_dir, certificate).map(drop)
    }

    /// As of the last look that found it to be right.
    pub(super) fn shown(&self) -> Option<&pgherd_proxy::ClientTls> {
        self.shown.as_ref().map(|(_, shown)| shown)
    }

    pub(super) fn renewal_is_due(&self) -> bool {
        self.credentials.renewal_is_due(Timestamp::now())
    }

    fn read_shown(&self, wanted: &Tls) -> Result<ShownTexts, FileError> {
        let read = |path: &Option<String>| -> Result<Option<String>, FileError> {
            path.as_ref().map(|path| read_limited(Path::new(path))).transpose()
        };
        // Without files for it the proxy's own is shown, and what is shown follows that.
        let own = wanted.client_cert_file.is_none().then(|| self.credentials.certificate_pem().to_owned());
        Ok(ShownTexts {
            certificate: read(&wanted.client_cert_file)?,
            key: read(&wanted.client_key_file)?,
            authority: read(&wanted.client_ca_file)?,
            own,
        })
    }

    fn make_shown(
        &self,
        wanted: &Tls,
        texts: &ShownTexts,
    ) -> Result<pgherd_proxy::ClientTls, CertificatesError> {
        let (chain, key) = match (&texts.certificate, &texts.key) {
            (Some(certificate), Some(key)) => (
                certificates_in(wanted.client_cert_file.as_ref(), certificate)?,
                private_key(wanted.client_key_file.as_ref(), key)?,
            ),
            _ => (self.credentials.chain(), self.credentials.private_key()),
        };
        let authorities = match &texts.authority {
            None => None,
            Some(text) => Some(certificates_in(wanted.client_ca_file.as_ref(), text)?),
        };
        let serial = chain.first().map(serial);
        let shown = pgherd_proxy::ClientTls::new(chain, key, authorities.as_deref())?;
        let asks = authorities.is_some();
        tracing::info!(serial, asks, "clients are shown this certificate from now on");
        Ok(shown)
    }
}

fn read_own(pki_dir: &Path) -> Result<OwnTexts, CertificatesError> {
    let paths = Paths::of(pki_dir);
    let read = |path: &Path| {
        let unread =
            |error: FileError| CertificatesError::Own { dir: pki_dir.to_owned(), source: error.into() };
        read_limited(path).map_err(unread)
    };
    Ok(OwnTexts {
        authority: read(&paths.authority)?,
        certificate: read(&paths.certificate)?,
        key: read(&paths.key)?,
    })
}

fn credentials(pki_dir: &Path, name: &NodeName, own: &OwnTexts) -> Result<Credentials, CertificatesError> {
    let credentials = Credentials::from_pem(&own.authority, &own.certificate, &own.key)
        .map_err(|source| CertificatesError::Own { dir: pki_dir.to_owned(), source })?;
    if *credentials.identity() == Identity::Proxy(name.to_string()) {
        return Ok(credentials);
    }
    let (dir, found) = (pki_dir.to_owned(), credentials.identity().clone());
    Err(CertificatesError::AnotherName { dir, found, wanted: name.clone() })
}

fn certificates_in(
    path: Option<&String>,
    text: &str,
) -> Result<Vec<CertificateDer<'static>>, CertificatesError> {
    let path = || path.map(PathBuf::from).unwrap_or_default();
    let found = certificates(text)
        .map_err(|error| CertificatesError::File { path: path(), why: error.to_string() })?;
    match found.is_empty() {
        true => Err(CertificatesError::File { path: path(), why: "no certificate in it".to_owned() }),
        false => Ok(found),
    }
}

fn private_key(path: Option<&String>, text: &str) -> Result<PrivateKeyDer<'static>, CertificatesError> {
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|_| CertificatesError::File {
        path: path.map(PathBuf::from).unwrap_or_default(),
        why: "no private key in PEM form without a password".to_owned(),
    })
}

/// As `openssl x509 -serial` shows it.
fn serial(certificate: &CertificateDer<'_>) -> String {
    X509Certificate::from_der(certificate)
        .map_or_else(|_| String::new(), |(_, parsed)| parsed.raw_serial_as_string())
}

/// By the name that libpq gives it.
pub(super) fn mode(key: &'static str, text: &str) -> Result<TlsMode, CertificatesError> {
    TlsMode::named(text).ok_or_else(|| CertificatesError::Mode { key, mode: text.to_owned() })
}

/// Servers are believed as agents are: by the herd's authority and the name of their node; or less, where the herd file
/// wants less.
pub(super) struct ToNodes {
    full: Arc<ClientTls>,
    lower: ArcSwap<Lower>,
}

struct Lower {
    authority: Arc<ClientConfig>,
    anything: Arc<ClientConfig>,
}

impl Lower {
    fn new(credentials: &Credentials) -> Result<Lower, CertificatesError> {
        let unusable = |error: rustls::Error| CertificatesError::Tls(error.into());
        let mut roots = RootCertStore::empty();
        for authority in credentials.authorities() {
            roots.add(authority.clone()).map_err(unusable)?;
        }
        let config = |trust| {
            to_servers(trust, Some((credentials.chain(), credentials.private_key()))).map_err(unusable)
        };
        Ok(Lower {
            authority: config(Trust::Authorities(Arc::new(roots)))?,
            anything: config(Trust::Anything)?,
        })
    }
}

impl ToNodes {
    fn new(full: Arc<ClientTls>, credentials: &Credentials) -> Result<ToNodes, CertificatesError> {
        Ok(ToNodes { full, lower: ArcSwap::from_pointee(Lower::new(credentials)?) })
    }
}

impl ServerTls for ToNodes {
    fn to_node(&self, node: &NodeName, mode: TlsMode) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        let name = ServerName::try_from(node.to_string()).expect("a node's name is a DNS label");
        let config = match mode {
            TlsMode::VerifyFull => self.full.to_nodes(),
            TlsMode::VerifyCa => Arc::clone(&self.lower.load().authority),
            _ => Arc::clone(&self.lower.load().anything),
        };
        Some((config, name))
    }
}

#[cfg(test)]
mod tests;
