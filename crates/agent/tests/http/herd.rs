//! A herd of listeners: an authority, certificates from it and from elsewhere, and a server to call.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_agent::http::{Api, Stop, serve_tls};
use pgherd_agent::pki::{Authority, CA_VALIDITY, Credentials, NewKey, NodeSubject, ProxySubject, ServerTls};
use pgherd_api::Client;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::fake::Fake;

pub(crate) const YEAR: Duration = Duration::from_secs(365 * 86400);

pub(crate) fn days_ago(days: i64) -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second() - days * 86400).unwrap()
}

pub(crate) struct Herd {
    pub(crate) authority: Authority,
}

impl Herd {
    pub(crate) fn new() -> Herd {
        let name = "shop".parse().unwrap();
        let (authority, _) = Authority::create(&name, "4f1c", days_ago(400), CA_VALIDITY).unwrap();
        Herd { authority }
    }

    pub(crate) fn node(&self, name: &str) -> Credentials {
        self.node_made(name, Timestamp::now(), YEAR)
    }

    pub(crate) fn node_made(&self, name: &str, at: Timestamp, validity: Duration) -> Credentials {
        let key = NewKey::generate().unwrap();
        let subject =
            NodeSubject { name: &name.parse().unwrap(), hosts: &["127.0.0.1".to_owned()], others: &[] };
        let pem = self.authority.issue_node(&key.request().unwrap(), &subject, at, validity).unwrap();
        Credentials::from_pem(self.authority.certificate_pem(), &pem, &key.expose_pem()).unwrap()
    }

    pub(crate) fn operator(&self, name: &str) -> Credentials {
        let key = NewKey::generate().unwrap();
        let request = key.request().unwrap();
        let pem =
            self.authority.issue_operator(&request, &name.parse().unwrap(), Timestamp::now(), YEAR).unwrap();
        Credentials::from_pem(self.authority.certificate_pem(), &pem, &key.expose_pem()).unwrap()
    }

    pub(crate) fn proxy(&self, name: &str) -> Credentials {
        let key = NewKey::generate().unwrap();
        let request = key.request().unwrap();
        let subject =
            ProxySubject { name: &name.parse().unwrap(), hosts: &["127.0.0.1".to_owned()], nodes: &[] };
        let pem = self.authority.issue_proxy(&request, &subject, Timestamp::now(), YEAR).unwrap();
        Credentials::from_pem(self.authority.certificate_pem(), &pem, &key.expose_pem()).unwrap()
    }

    /// Shows a certificate of another authority, and believes this one all the same.
    pub(crate) fn stranger(&self, name: &str) -> Credentials {
        let other = Herd::new();
        let key = NewKey::generate().unwrap();
        let subject = NodeSubject { name: &name.parse().unwrap(), hosts: &[], others: &[] };
        let request = key.request().unwrap();
        let pem = other.authority.issue_node(&request, &subject, Timestamp::now(), YEAR).unwrap();
        Credentials::from_pem(self.authority.certificate_pem(), &pem, &key.expose_pem()).unwrap()
    }
}

/// A running API of the node `a`. Stops when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) backend: Arc<Fake>,
    pub(crate) tls: Arc<ServerTls>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(herd: &Herd) -> Server {
        Server::start_as(&herd.node("a")).await
    }

    pub(crate) async fn start_as(credentials: &Credentials) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backend = Arc::new(Fake::default());
        let tls = Arc::new(ServerTls::new(credentials).unwrap());
        let (sender, stop) = Stop::new();
        let api = Api::new(Arc::clone(&backend));
        let task = tokio::spawn(serve_tls(listener, Arc::clone(&tls), api, stop));
        Server { address, backend, tls, stop: sender, task }
    }

    pub(crate) async fn stop(self) {
        self.stop.send(true).unwrap();
        self.task.await.unwrap();
    }

    /// A client that dials the node `a`.
    pub(crate) fn client(&self, credentials: &Credentials) -> Client {
        self.client_for("a", credentials)
    }

    pub(crate) fn client_for(&self, node: &str, credentials: &Credentials) -> Client {
        let tls = Arc::new(credentials.client_tls().unwrap());
        Client::tls(self.address.to_string(), Some(node), tls).within(Duration::from_secs(5))
    }
}
