//! A node's certificate is followed by another before it ends, without anybody doing anything.
//!
//! Every agent is a member of the store, where the authority's key is, so it asks itself. The key stays: one
//! file changes, and listeners, clients and PostgreSQL take it up while they run.
//!
//! Hazard: a certificate that ends takes its node out of the herd, and with it its vote.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::Error;
use pgherd_api::client::ClientTls;
use pgherd_api::join::RenewRequest;
use pgherd_postgres::process;

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
        let hosts = present.hosts();
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
