//! Slow, large, many, and broken: what a stranger tries.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgherd_api::client::{ClientTls, Request};
use pgherd_api::{CallError, Client, Code};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::herd::{Herd, Server};

pub(crate) async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server that has had enough may reset the connection after its answer.
    drop(stream.read_to_end(&mut answer).await);
    String::from_utf8_lossy(&answer).into_owned()
}

async fn closes_within(mut stream: TcpStream, deadline: Duration) -> bool {
    let mut alert = Vec::new();
    tokio::time::timeout(deadline, stream.read_to_end(&mut alert)).await.is_ok()
}

#[tokio::test]
async fn a_connection_without_a_handshake_is_closed() {
    let server = Server::start(&Herd::new()).await;
    let silent = TcpStream::connect(server.address).await.unwrap();
    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain.write_all(b"GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert!(closes_within(plain, Duration::from_secs(2)).await, "plain HTTP is no handshake");
    assert!(closes_within(silent, Duration::from_secs(7)).await, "silence is no handshake");
}

/// Half-open connections from one address fill its places and nobody else's: the nodes' own connections are
/// counted elsewhere, and those that come after are let in as places become free.
#[tokio::test]
async fn half_open_connections_do_not_cut_off_the_herd() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let node = server.client(&herd.node("b"));
    node.status().await.unwrap();
    let mut flood = Vec::new();
    for _ in 0..300 {
        flood.push(TcpStream::connect(server.address).await.unwrap());
    }
    node.status().await.expect("an open connection goes on during the flood");
    let newcomer = server.client(&herd.node("c"));
    let deadline = Instant::now() + Duration::from_secs(15);
    while let Err(error) = newcomer.status().await {
        assert!(Instant::now() < deadline, "no way in after the handshake deadline: {error:?}");
        // sleep: between two attempts.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_head_that_never_ends_is_cut_off_and_large_ones_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let listener = pgherd_agent::http::bind_socket(&path).unwrap();
    let (_sender, stop) = pgherd_agent::http::Stop::new();
    let api = pgherd_agent::http::Api::new(Arc::new(crate::fake::Fake::default()));
    tokio::spawn(pgherd_agent::http::serve_socket(listener, api, stop));
    let connect = async || tokio::net::UnixStream::connect(&path).await.unwrap();

    let long = format!("GET /v1/{} HTTP/1.1\r\n\r\n", "x".repeat(20_000));
    let answer = exchange(connect().await, &long).await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    let many: String = (0..100).map(|number| format!("X-{number}: x\r\n")).collect();
    let answer = exchange(connect().await, &format!("GET /v1/status HTTP/1.1\r\n{many}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    for garbage in
        ["\0\0\0\0\r\n\r\n", "GET  HTTP/1.1\r\n\r\n", "GET /v1/status HTTP/9.9\r\n\r\n", "é\r\n\r\n"]
    {
        let answer = exchange(connect().await, garbage).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") || answer.is_empty(), "{garbage:?}: {answer}");
    }

    // A byte now and then, for ever.
    let mut slow = connect().await;
    slow.write_all(b"GET /v1/status HTTP/1.1\r\nX: ").await.unwrap();
    let begin = Instant::now();
    let mut answer = [0; 64];
    loop {
        assert!(begin.elapsed() < Duration::from_secs(14), "it is still listened to");
        if slow.write_all(b"x").await.is_err() {
            break;
        }
        let read = tokio::time::timeout(Duration::from_millis(200), slow.read(&mut answer)).await;
        if matches!(read, Ok(Ok(0) | Err(_))) {
            break;
        }
    }
}

#[tokio::test]
async fn bodies_have_limits() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let operator = server.client(&herd.operator("anna"));
    let node = server.client(&herd.node("b"));
    let nobody =
        Client::tls(server.address.to_string(), Some("a"), Arc::new(ClientTls::pinned(herd.authority.pin())));
    let of = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    let code = |answer: Result<bytes::Bytes, CallError>| match answer {
        Err(CallError::Answered { error, .. }) => error.known(),
        // The server may close before the client has written all of it.
        Err(CallError::Broken { .. }) => Some(Code::RequestTooLarge),
        other => panic!("{other:?}"),
    };
    let send = |client: &Client, path: &str, bytes: usize| {
        let (client, request) = (client.clone(), Request::post(path, of(bytes).into()));
        async move { client.send(request).await }
    };
    assert_eq!(code(send(&operator, "/v1/plan", 1 << 20).await), Some(Code::RequestMalformed), "it is read");
    assert_eq!(code(send(&operator, "/v1/plan", (1 << 20) + 1).await), Some(Code::RequestTooLarge));
    assert_eq!(code(send(&nobody, "/v1/join", 32 << 10).await), Some(Code::RequestMalformed), "it is read");
    assert_eq!(code(send(&nobody, "/v1/join", (32 << 10) + 1).await), Some(Code::RequestTooLarge));
    assert!(send(&node, "/v1/raft/append", 8 << 20).await.is_ok(), "a snapshot fits");
    assert!(operator.status().await.is_ok() && nobody.status().await.is_err());
}

/// Out of descriptors, the listener waits for better times. In a process of its own, because the limit is
/// the whole process's.
#[test]
fn the_listener_survives_running_out_of_descriptors() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "limits::child_without_descriptors", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("served again"), "{text}");
}

#[test]
#[ignore = "takes its process's descriptors away: run by the test above"]
fn child_without_descriptors() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let herd = Herd::new();
        let server = Server::start(&herd).await;
        let client = server.client(&herd.node("b")).within(Duration::from_secs(10));
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(open + 20), ..limit }).unwrap();
        // Every descriptor that is left; the connections wait in the listener's queue.
        let mut hoard = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            hoard.push(file);
        }
        // One for the client's side. Its counterpart finds none.
        hoard.pop();
        let waiting = tokio::spawn(async move { client.status().await });
        // sleep: the accept must be seen to fail for a while.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(std::fs::File::open("/dev/null").is_err(), "a descriptor is left, so nothing was tried");
        assert!(!waiting.is_finished(), "it was served without a descriptor");
        hoard.truncate(2);
        waiting.await.unwrap().unwrap();
        writeln!(std::io::stdout(), "served again").unwrap();
    });
}
