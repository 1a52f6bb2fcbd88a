//! The health port as load balancers speak to it.

use std::net::SocketAddr;
use std::sync::Arc;

use pgherd_agent::http::{Stop, serve_health};
use pgherd_agent::metrics::{Measurements, Metrics};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::fake::Fake;
use crate::limits::exchange;

async fn start() -> (SocketAddr, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let metrics = Arc::new(Metrics::new("shop", Some("main"), "a"));
    metrics.measured(Measurements { term: Some(4), ..Measurements::default() });
    let (sender, stop) = Stop::new();
    tokio::spawn(serve_health(listener, Arc::new(Fake::default()), metrics, stop));
    (address, sender)
}

async fn ask(address: SocketAddr, head: &str) -> (String, String) {
    let request = format!("{head}\r\nConnection: close\r\n\r\n");
    let answer = exchange(TcpStream::connect(address).await.unwrap(), &request).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer.as_str(), ""));
    (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
}

#[tokio::test]
async fn the_methods_that_load_balancers_use() {
    let (address, _stop) = start().await;
    for (request, status) in [
        ("GET /primary HTTP/1.1\r\nHost: a", "HTTP/1.1 200 OK"),
        // HAProxy's default check has no Host.
        ("OPTIONS /primary HTTP/1.0", "HTTP/1.0 200 OK"),
        ("OPTIONS /replica HTTP/1.0", "HTTP/1.0 503 Service Unavailable"),
        ("HEAD /replica?lag=16MB HTTP/1.1\r\nHost: a", "HTTP/1.1 503 Service Unavailable"),
        ("GET /health/ HTTP/1.1\r\nHost: a", "HTTP/1.1 200 OK"),
        ("GET /standby-leader HTTP/1.1\r\nHost: a", "HTTP/1.1 503 Service Unavailable"),
        ("GET /replica?lag=much HTTP/1.1\r\nHost: a", "HTTP/1.1 400 Bad Request"),
        ("GET /nothing HTTP/1.1\r\nHost: a", "HTTP/1.1 404 Not Found"),
        ("GET /v1/status HTTP/1.1\r\nHost: a", "HTTP/1.1 404 Not Found"),
        ("POST /primary HTTP/1.1\r\nHost: a\r\nContent-Length: 0", "HTTP/1.1 405 Method Not Allowed"),
        ("DELETE /switchover HTTP/1.1\r\nHost: a", "HTTP/1.1 405 Method Not Allowed"),
        ("PATCH /config HTTP/1.1\r\nHost: a\r\nContent-Length: 0", "HTTP/1.1 405 Method Not Allowed"),
    ] {
        let (found, body) = ask(address, request).await;
        assert_eq!(found, status, "{request}");
        if !request.starts_with("GET") {
            assert_eq!(body, "", "{request}");
        }
    }
}

#[tokio::test]
async fn the_body_speaks_patronis_words() {
    let (address, _stop) = start().await;
    let (_, body) = ask(address, "GET /patroni HTTP/1.1\r\nHost: a").await;
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["role"], "primary");
    assert_eq!(body["state"], "running");
    assert_eq!(body["xlog"]["location"], 0x500_0060);
    assert_eq!(body["server_version"], 150_014);
    assert_eq!(body["timeline"], 4);
    assert_eq!(body["database_system_identifier"], "7710");
    assert_eq!((&body["patroni"]["scope"], &body["patroni"]["name"]), (&"main".into(), &"a".into()));
}

#[tokio::test]
async fn metrics_are_open_metrics_text() {
    let (address, _stop) = start().await;
    let (status, body) = ask(address, "GET /metrics HTTP/1.1\r\nHost: a").await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert!(body.contains(r#"pgherd_term{herd="shop",cluster="main",node="a"} 4.0"#), "{body}");
    assert!(body.ends_with("# EOF\n"));
}
