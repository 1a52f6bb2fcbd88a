//! The client among agents that are slow, dead, cut off or restarted.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pgherd_api::client::Phase;
use pgherd_api::{CallError, Client};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::herd::{Herd, Server};

/// Passes connections on and counts them; nothing gets through while it is cut.
struct Wire {
    address: String,
    opened: Arc<AtomicUsize>,
    delay_ms: u64,
    cut: watch::Sender<bool>,
}

impl Wire {
    async fn to(server: &Server) -> Wire {
        Wire::delayed(server, 0).await
    }

    /// Each connection is passed on only after a while, as over a slow line.
    async fn delayed(server: &Server, delay_ms: u64) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = server.address;
        let opened = Arc::new(AtomicUsize::new(0));
        let (cut, is_cut) = watch::channel(false);
        let count = Arc::clone(&opened);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let mut is_cut = is_cut.clone();
                tokio::spawn(async move {
                    // sleep: the delay of the wire.
                    tokio::time::sleep(Duration::from_millis(delay_ms)).await;
                    drop(is_cut.wait_for(|cut| !cut).await);
                    let mut far = TcpStream::connect(target).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        () = async { drop(is_cut.wait_for(|cut| *cut).await) } => std::future::pending().await,
                    }
                });
            }
        });
        Wire { address, opened, delay_ms, cut }
    }

    fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    fn client(&self, herd: &Herd) -> Client {
        let tls = Arc::new(herd.node("b").client_tls().unwrap());
        Client::tls(self.address.clone(), Some("a"), tls)
    }
}

#[tokio::test]
async fn one_connection_serves_call_after_call() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let wire = Wire::to(&server).await;
    let client = wire.client(&herd);
    for _ in 0..100 {
        client.peer_report("{}".into()).await.unwrap();
    }
    assert_eq!(wire.opened(), 1);
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.peer_report("{}".into()).await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert!(wire.opened() <= 20, "{} connections for 20 calls at once", wire.opened());
}

#[tokio::test]
async fn a_stalled_connection_ends_at_the_deadline_and_is_not_used_again() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let wire = Wire::to(&server).await;
    let client = wire.client(&herd);
    client.status().await.unwrap();
    server.backend.slow_ms.store(60_000, Ordering::Relaxed);
    let begin = Instant::now();
    let error = client.within(Duration::from_millis(200)).peer_report("{}".into()).await.unwrap_err();
    assert!(
        matches!(error, CallError::DeadlinePassed { deadline_ms: 200, phase: Phase::Waiting, .. }),
        "{error:?}"
    );
    assert!(!error.was_not_done(), "it may well have been");
    assert!(begin.elapsed() < Duration::from_secs(2));
    server.backend.slow_ms.store(0, Ordering::Relaxed);
    client.peer_report("{}".into()).await.unwrap();
    assert_eq!(wire.opened(), 2);
}

#[tokio::test]
async fn a_dead_agent_delays_only_its_own_calls() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let alive = server.client(&herd.node("b"));
    alive.status().await.unwrap();
    // Accepts by its backlog, and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tls = Arc::new(herd.node("b").client_tls().unwrap());
    let dead =
        Client::tls(silent.local_addr().unwrap().to_string(), Some("c"), tls).within(Duration::from_secs(2));
    let waiting: Vec<_> = (0..10)
        .map(|_| {
            let dead = dead.clone();
            tokio::spawn(async move { dead.status().await })
        })
        .collect();
    let begin = Instant::now();
    for _ in 0..100 {
        alive.status().await.unwrap();
    }
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    for call in waiting {
        let error = call.await.unwrap().unwrap_err();
        assert!(matches!(error, CallError::DeadlinePassed { phase: Phase::Connecting, .. }), "{error:?}");
        assert!(error.was_not_done());
    }
}

#[tokio::test]
async fn nobody_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let tls = Arc::new(Herd::new().node("b").client_tls().unwrap());
    let error = Client::tls(address, Some("c"), tls).status().await.unwrap_err();
    let CallError::Unreachable { cause, .. } = &error else { panic!("{error:?}") };
    assert!(cause.contains("refused"), "{cause}");
    let error = Client::unix("/nonexistent/agent.sock").status().await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable { .. }), "{error:?}");
    assert_eq!(error.to_error().code, "PGH-PEER-UNREACHABLE");
}

/// With a deadline shorter than the handshake, calls fail, but the handshake goes on and a later call finds it
/// done. Else a line with long round trips would never carry a single call. The deadline divides the delay, so
/// that the connection is ready when the call that waits for it has no time left to use it: that call must not
/// take it down with itself, time after time.
#[tokio::test]
async fn a_handshake_outlives_the_call_that_wanted_it() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let wire = Wire::delayed(&server, 600).await;
    let client = wire.client(&herd).within(Duration::from_millis(150));
    let begin = Instant::now();
    let mut failed = 0;
    while let Err(error) = client.status().await {
        assert!(matches!(error, CallError::DeadlinePassed { phase: Phase::Connecting, .. }), "{error:?}");
        assert!(begin.elapsed() < Duration::from_secs(5), "never connected");
        failed += 1;
    }
    assert!(failed >= 2, "the line is too fast for this test: {failed} with {} ms", wire.delay_ms);
    assert!(wire.opened() <= 2, "{} connections were begun for one", wire.opened());
}

#[tokio::test]
async fn calls_come_through_soon_after_a_cut_ends() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let wire = Wire::to(&server).await;
    let client = wire.client(&herd).within(Duration::from_millis(200));
    client.status().await.unwrap();
    wire.cut.send(true).unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        client.status().await.unwrap_err();
    }
    assert!(wire.opened() < 10, "{} connections begun in 3 s of a cut", wire.opened());
    wire.cut.send(false).unwrap();
    let healed = Instant::now();
    while client.status().await.is_err() {
        assert!(healed.elapsed() < Duration::from_secs(3), "still cut off");
    }
    assert!(healed.elapsed() < Duration::from_millis(1500), "{:?} after the cut", healed.elapsed());
}

/// The kept connection belongs to an agent that is gone; the call finds the new one by itself.
#[tokio::test]
async fn a_restarted_agent_is_found_at_once() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let client = server.client(&herd.node("b"));
    client.peer_report("{}".into()).await.unwrap();
    let address = server.address;
    server.stop().await;
    let listener = TcpListener::bind(address).await.unwrap();
    let backend = Arc::new(crate::fake::Fake::default());
    let tls = Arc::new(pgherd_agent::pki::ServerTls::new(&herd.node("a")).unwrap());
    let (_sender, stop) = pgherd_agent::http::Stop::new();
    let api = pgherd_agent::http::Api::new(Arc::clone(&backend));
    tokio::spawn(pgherd_agent::http::serve_tls(listener, tls, api, stop));
    client.peer_report("{}".into()).await.unwrap();
    assert_eq!(backend.last_call().unwrap(), "b: report");
}

#[tokio::test]
async fn what_answers_must_be_an_agent() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let directory = tempfile::tempdir().unwrap();
    for (name, answer) in [
        ("an error page", "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>"),
        ("a page", "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"),
        ("no HTTP", "SSH-2.0-OpenSSH_9.2p1\r\n"),
        ("half an answer", "HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\n{"),
    ] {
        let path = directory.path().join(name);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let read = stream.read(&mut head).await.unwrap();
            assert!(read > 0);
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let error = Client::unix(&path).within(Duration::from_secs(3)).status().await.unwrap_err();
        let fits = match name {
            "half an answer" => matches!(error, CallError::Broken { .. }),
            _ => matches!(error, CallError::Protocol { .. }),
        };
        assert!(fits, "{name}: {error:?}");
    }
}

#[tokio::test]
async fn an_answer_without_end_is_not_swallowed_whole() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("endless");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 1024];
        let read = stream.read(&mut head).await.unwrap();
        assert!(read > 0);
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let junk = vec![b' '; 1 << 20];
        while stream.write_all(&junk).await.is_ok() {}
    });
    let error = Client::unix(&path).status().await.unwrap_err();
    let CallError::Protocol { cause, .. } = &error else { panic!("{error:?}") };
    assert!(cause.contains("longer than"), "{cause}");
}
