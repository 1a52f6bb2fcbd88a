//! TLS for sessions to other nodes: the herd's CA, this node's certificate, the other's name verified.
//!
//! Hazard: a server that is believed by its address alone could be anybody's.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};
use tokio_rustls::TlsConnector;

use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::instance::TlsFiles;

/// Who we are to other nodes, and whom we believe.
#[derive(Clone, Debug)]
pub struct TlsIdentity(Arc<rustls::ClientConfig>);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    #[error("the certificates in {file} cannot be used: {what}")]
    Unusable { file: String, what: String },
    #[error(transparent)]
    Other(#[from] Error),
}

impl TlsIdentity {
    /// Reads the three files. Called again after a renewal.
    pub async fn load(files: &TlsFiles) -> Result<TlsIdentity, TlsError> {
        let files = files.clone();
        blocking("reading certificates", std::time::Duration::from_secs(10), move || build(&files)).await
    }

    /// Whom a file of authorities signs is believed, and nobody is shown a certificate.
    pub async fn of_authorities(file: &std::path::Path) -> Result<TlsIdentity, TlsError> {
        let file = file.to_owned();
        blocking("reading certificates", std::time::Duration::from_secs(10), move || {
            Ok(TlsIdentity(Arc::new(believing(&file)?.with_no_client_auth())))
        })
        .await
    }

    pub(crate) fn tls(&self) -> TlsConnector {
        TlsConnector::from(Arc::clone(&self.0))
    }

    pub(crate) fn connector(&self) -> Connector {
        Connector(self.tls())
    }
}

fn unusable(file: &std::path::Path, what: String) -> TlsError {
    TlsError::Unusable { file: file.display().to_string(), what }
}

fn read(file: &std::path::Path) -> Result<Vec<u8>> {
    durable::read(file)?.ok_or_else(|| Error::Io {
        doing: "read",
        path: file.to_owned(),
        source: io::ErrorKind::NotFound.into(),
    })
}

fn certificates(file: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(file)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    found.map_err(|error| unusable(file, error.to_string()))
}

type Believing = rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert>;

fn believing(authorities: &std::path::Path) -> Result<Believing, TlsError> {
    let mut roots = rustls::RootCertStore::empty();
    for root in certificates(authorities)? {
        roots.add(root).map_err(|error| unusable(authorities, error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(authorities, error.to_string()))?;
    Ok(config.with_root_certificates(roots))
}

fn build(files: &TlsFiles) -> Result<TlsIdentity, TlsError> {
    let config = believing(&files.ca)?;
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .map_err(|error| unusable(&files.key, error.to_string()))?;
    let config =
        config.with_client_auth_cert(chain, key).map_err(|error| unusable(&files.cert, error.to_string()))?;
    Ok(TlsIdentity(Arc::new(config)))
}

#[derive(Clone)]
pub(crate) struct Connector(TlsConnector);

pub(crate) struct Connect {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl<S> MakeTlsConnect<S> for Connector
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = Encrypted<S>;
    type TlsConnect = Connect;
    type Error = rustls::pki_types::InvalidDnsNameError;

    fn make_tls_connect(&mut self, host: &str) -> Result<Connect, Self::Error> {
        Ok(Connect { connector: self.0.clone(), name: ServerName::try_from(host)?.to_owned() })
    }
}

impl<S> TlsConnect<S> for Connect
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = Encrypted<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Encrypted<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move { Ok(Encrypted(self.connector.connect(self.name, stream).await?)) })
    }
}

pub(crate) struct Encrypted<S>(tokio_rustls::client::TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> tokio_postgres::tls::TlsStream for Encrypted<S> {
    /// The server is known by its certificate and name, so that binding the password to the channel adds nothing.
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Encrypted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Encrypted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
