//! The server's side of TLS, replaceable while it runs, and who is at the other end of a connection.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use pgherd_api::identity::{Identity, NoIdentity};
use rustls::crypto::aws_lc_rs;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection, version};

use super::{Credentials, CredentialsError};

/// Taken anew for each connection; those that are open keep what they began with.
pub struct ServerTls(ArcSwap<ServerConfig>);

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

impl ServerTls {
    pub fn new(credentials: &Credentials) -> Result<ServerTls, CredentialsError> {
        Ok(ServerTls(ArcSwap::from_pointee(server_config(credentials)?)))
    }

    /// Nothing changes if the new ones cannot be used.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), CredentialsError> {
        self.0.store(Arc::new(server_config(credentials)?));
        Ok(())
    }

    pub fn config(&self) -> Arc<ServerConfig> {
        self.0.load_full()
    }
}

/// A client without a certificate is let through the handshake, because a joining node has none; what it
/// may do then is decided request by request. A client with a wrong one is not.
fn server_config(credentials: &Credentials) -> Result<ServerConfig, CredentialsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in credentials.authorities() {
        roots.add(authority.clone())?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| CredentialsError::Unreadable(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(credentials.chain(), credentials.private_key())?;
    // A resumed session would skip the check whether the client's certificate has expired since.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// Who proved to be at the other end, after the handshake; None without a certificate.
pub fn authenticated(connection: &ServerConnection) -> Result<Option<Identity>, NoIdentity> {
    let shown = connection.peer_certificates().and_then(|chain| chain.first());
    shown.map(Identity::of_certificate).transpose()
}
