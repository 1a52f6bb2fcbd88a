//! Probing another node's PostgreSQL, as a voter does with the holder's.

use super::*;

/// A standing session and where it leads.
type Standing = ((String, u16), Monitor);

/// Standing sessions to other nodes, one each.
#[derive(Clone)]
pub(crate) struct Remote {
    password: String,
    tls: Option<TlsIdentity>,
    monitors: Arc<tokio::sync::Mutex<BTreeMap<NodeName, Standing>>>,
}

impl Remote {
    pub(crate) async fn new(file: &AgentFile, secrets: &Secrets) -> Result<Remote> {
        let password = secrets.password(secrets::MONITOR).ok_or(ServerError::NoPassword(secrets::MONITOR))?;
        let tls = TlsIdentity::load(&tls_files(file)).await?;
        Ok(Remote { password: password.to_owned(), tls: Some(tls), monitors: Arc::default() })
    }

    /// A trivial command on the standing session, or on a new one.
    pub(crate) async fn probe(
        &self,
        node: &NodeName,
        host: &str,
        port: u16,
        within: Duration,
    ) -> Result<Probe> {
        let place = (host.to_owned(), port);
        let mut monitors = self.monitors.lock().await;
        if monitors.get(node).is_none_or(|(at, _)| *at != place) {
            let tls = self.tls.clone().ok_or(ServerError::None)?;
            let remote = pgherd_postgres::sql::Remote {
                host: node.to_string(),
                address: resolve(host).await?,
                port,
                role: secrets::MONITOR.to_owned(),
                password: Secret::new(self.password.clone()),
                tls,
            };
            monitors.insert(node.clone(), (place, Monitor::new(Target::Remote(Box::new(remote)))));
        }
        let (_, monitor) = monitors.get_mut(node).ok_or(ServerError::None)?;
        Ok(monitor.probe(within).await?)
    }
}
