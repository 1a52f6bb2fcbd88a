//! A proxy's metrics over HTTP: one path, and few who ask at a time.

use std::time::Duration;

use pgherd_agent::http::{Stop, serve_metrics};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SOON: Duration = Duration::from_secs(20);

async fn ask(address: std::net::SocketAddr, request: &str) -> String {
    let asking = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // One that was refused is reset.
        drop(stream.read_to_string(&mut answer).await);
        answer
    };
    tokio::time::timeout(SOON, asking).await.expect("in time")
}

#[tokio::test]
async fn metrics_are_all_there_is_and_few_may_ask_at_a_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = Stop::new();
    let serving = tokio::spawn(serve_metrics(listener, || "pgherd_proxy_x 1\n# EOF\n".to_owned(), stopped));
    let answer = ask(address, "GET /metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("# EOF\n"), "{answer}");
    assert!(answer.contains("application/openmetrics-text"), "{answer}");
    assert!(ask(address, "GET /").await.starts_with("HTTP/1.1 404"));
    assert!(ask(address, "POST /metrics").await.starts_with("HTTP/1.1 405"));

    // Those who only hold a connection do not keep others from theirs for ever, and are few.
    let mut held = Vec::new();
    for _ in 0..16 {
        held.push(TcpStream::connect(address).await.unwrap());
    }
    let until = tokio::time::Instant::now() + SOON;
    while !ask(address, "GET /metrics").await.is_empty() {
        assert!(tokio::time::Instant::now() < until, "a seventeenth is refused");
    }
    drop(held);
    while ask(address, "GET /metrics").await.is_empty() {
        assert!(tokio::time::Instant::now() < until, "there is room again");
    }
    stop.send_replace(true);
    tokio::time::timeout(SOON, serving).await.expect("in time").unwrap();
}
