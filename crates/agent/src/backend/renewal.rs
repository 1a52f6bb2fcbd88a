//! A node's certificate is followed by another before it ends, without anybody doing anything.
//!
//! Every agent is a member of the store, where the authority's key is, so it asks itself. The key stays: one
//! file changes, and listeners, clients and PostgreSQL take it up while they run.
//!
//! Hazard: a certificate that ends takes its node out of the herd, and with it its vote.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::Error;
use pgherd_api::client::ClientTls;
use pgherd_api::join::RenewRequest;
use pgherd_postgres::process;
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::AgentBackend;
use crate::pki::{Credentials, CredentialsError, ServerTls};

const LOOK_EVERY: Duration = Duration::from_secs(3600);
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// What goes on with the new certificate.
pub(crate) struct Renewal {
    pub(crate) pki_dir: PathBuf,
    pub(crate) server: Arc<ServerTls>,
    pub(crate) clients: Arc<ClientTls>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum RenewalError {
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error("a request cannot be made: {0}")]
    Request(String),
    #[error(transparent)]
    NotGranted(#[from] Error),
}

impl AgentBackend {
    /// For ever.
    pub(crate) async fn keep_certificate(self: Arc<Self>, renewal: Renewal) {
        loop {
            let next = match self.renew_own(&renewal, Timestamp::now()).await {
                Ok(None) => LOOK_EVERY,
                Ok(Some(expires)) => {
                    tracing::info!(%expires, "this node's certificate was renewed");
                    LOOK_EVERY
                }
                Err(error) => {
                    tracing::warn!(%error, "this node's certificate is due, and cannot be renewed yet");
                    AGAIN_AFTER
                }
            };
            tokio::time::sleep(next).await;
        }
    }

    /// `None` if it is not due.
    pub(super) async fn renew_own(
        &self,
        renewal: &Renewal,
        now: Timestamp,
    ) -> Result<Option<Timestamp>, RenewalError> {
        let present = Credentials::load(&renewal.pki_dir)?;
        if !present.renewal_is_due(now) {
            return Ok(None);
        }
        let csr = present.renewal_request().map_err(|error| RenewalError::Request(error.to_string()))?;
        let hosts = hosts(present.certificate(), self.identity.node.as_str());
        let answer = self.renew_certificate(&self.identity.node, RenewRequest { csr, hosts }).await?;
        let renewed = present.renew(&renewal.pki_dir, &answer.certificate)?;
        renewal.server.replace(&renewed)?;
        renewed.replace_in(&renewal.clients)?;
        self.certificate_expires.store(Arc::new(renewed.expires()));
        if let Some(instance) = self.instance.get()
            && let Ok(process::Found::Running(server)) = process::Server::find(instance).await
            && let Err(error) = server.reload()
        {
            // It reads the file again at its next reload or start, and that is years before the old one ends.
            tracing::info!(%error, "PostgreSQL was not told of the new certificate");
        }
        Ok(Some(renewed.expires()))
    }
}

/// The names and addresses that a certificate bears besides the node's own: the next one bears them too.
pub(super) fn hosts(certificate: &CertificateDer<'_>, node: &str) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) if *name != node => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => None,
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(host).collect()
}
