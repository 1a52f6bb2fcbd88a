//! What others do to a proxy while its clients want to be served.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant as Moment};

use bytes::BytesMut;
use pgherd_pgwire::message::build;
use pgherd_pgwire::startup::Version;
use pgherd_proxy::Proxy;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::Client;

use crate::harness::{SOON, Scene, config, connect, one, settings, story, told, until};

/// A client that asks again and again, and how long it waited at most.
struct Steady {
    stop: Arc<AtomicBool>,
    worst_us: Arc<AtomicU64>,
    asking: tokio::task::JoinHandle<u64>,
}

impl Steady {
    async fn begin(client: Client) -> Steady {
        let (stop, worst_us) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, worst) = (Arc::clone(&stop), Arc::clone(&worst_us));
        let asking = tokio::spawn(async move {
            let mut answers = 0;
            while !stopped.load(Ordering::Relaxed) {
                let asked = Moment::now();
                assert_eq!(one(&client, "SELECT 'there'").await, "there");
                worst.fetch_max(asked.elapsed().as_micros() as u64, Ordering::Relaxed);
                answers += 1;
            }
            answers
        });
        Steady { stop, worst_us, asking }
    }

    /// Each of its questions was answered in time, or it would have ended by a fault.
    async fn end(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let answers = self.asking.await.unwrap();
        (answers, Duration::from_micros(self.worst_us.load(Ordering::Relaxed)))
    }
}

impl Scene {
    fn knock(&self) -> io::Result<TcpStream> {
        TcpStream::connect(self.proxy.addresses()[0])
    }
}

fn startup(user: &str) -> BytesMut {
    let mut startup = BytesMut::new();
    let asked: [(&[u8], &[u8]); 2] = [(b"user", user.as_bytes()), (b"database", b"mall")];
    build::startup_message(&mut startup, Version::V3_0, &asked).unwrap();
    startup
}

/// As many in a minute as are to be borne.
const A_MINUTE: u32 = 20_000;

story! {
    async fn thousands_who_knock_disturb_nobody(scene) {
        let attempts: u32 = std::env::var("PGHERD_ATTEMPTS").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000);
        let steady = Steady::begin(connect(&scene.sharing("alice", "")).await.unwrap()).await;
        let began = Moment::now();
        let startup = startup("alice");
        let mut knocking = Vec::new();
        for number in 0..attempts {
            let at = began + Duration::from_secs(60) * number / A_MINUTE;
            // sleep: so many in a minute, and no more.
            tokio::time::sleep_until(at.into()).await;
            if number % 5 == 4 {
                // Comes in, and is served.
                let conninfo = scene.sharing("alice", "");
                knocking.push(tokio::spawn(async move {
                    let client = connect(&conninfo).await.unwrap();
                    assert_eq!(one(&client, "SELECT 'in'").await, "in");
                }));
                continue;
            }
            let (address, startup) = (scene.proxy.addresses()[0], startup.clone());
            knocking.push(tokio::task::spawn_blocking(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(SOON)).unwrap();
                match number % 5 {
                    // Leaves without a word,
                    0 => {}
                    // or with something that is no startup packet,
                    1 => stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap(),
                    // or is asked for its password, and has none.
                    _ => {
                        stream.write_all(&startup).unwrap();
                        let mut kind = [0];
                        stream.read_exact(&mut kind).unwrap();
                        assert_eq!(&kind, b"R");
                    }
                }
            }));
        }
        for knock in knocking {
            knock.await.unwrap();
        }
        let took = began.elapsed();
        let (answers, worst) = steady.end().await;
        println!("{attempts} attempts in {took:?}; meanwhile {answers} answers, the slowest after {worst:?}");
        assert!(answers > 0);
        until("they are gone", async || scene.proxy.clients() == 0).await;
    }
}

story! {
    async fn whoever_is_in_stays_in_when_there_are_no_descriptors_left(scene) {
        let steady = Steady::begin(connect(&scene.sharing("alice", "")).await.unwrap()).await;
        let before = getrlimit(Resource::Nofile);
        let open = fs::read_dir("/proc/self/fd").unwrap().count() as u64;
        setrlimit(Resource::Nofile, Rlimit { current: Some(open + 20), ..before }).unwrap();
        // Client and proxy share the descriptors here: some of these are connected, and nobody can accept them.
        let mut crowd = Vec::new();
        let began = Moment::now();
        while let Ok(stream) = scene.knock() {
            crowd.push(stream);
            assert!(began.elapsed() < SOON, "descriptors have no end");
        }
        assert!(!crowd.is_empty());
        // sleep: the proxy has time to fail.
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(crowd);
        setrlimit(Resource::Nofile, before).unwrap();
        let after = connect(&scene.sharing("alice", "")).await.unwrap();
        assert_eq!(one(&after, "SELECT 'in'").await, "in");
        assert!(steady.end().await.0 > 0);
    }
}

fn resident_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// From now on a byte comes through only now and then.
struct Slow {
    stream: tokio::net::TcpStream,
    is_slow: Arc<AtomicBool>,
    until: Pin<Box<tokio::time::Sleep>>,
}

impl AsyncRead for Slow {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.is_slow.load(Ordering::Relaxed) {
            return Pin::new(&mut this.stream).poll_read(cx, to);
        }
        std::task::ready!(this.until.as_mut().poll(cx));
        let mut byte = [0];
        let mut one = ReadBuf::new(&mut byte);
        std::task::ready!(Pin::new(&mut this.stream).poll_read(cx, &mut one))?;
        to.put_slice(one.filled());
        this.until.as_mut().reset(tokio::time::Instant::now() + Duration::from_millis(50));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Slow {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

story! {
    async fn whoever_reads_slowly_costs_a_server_and_no_memory(scene) {
        let admin = scene.admin().await;
        let steady = Steady::begin(connect(&scene.sharing("alice", "")).await.unwrap()).await;
        let is_slow = Arc::new(AtomicBool::new(false));
        let stream = tokio::net::TcpStream::connect(scene.proxy.addresses()[0]).await.unwrap();
        // sleep: none.
        let until_now = Box::pin(tokio::time::sleep(Duration::ZERO));
        let slow = Slow { stream, is_slow: Arc::clone(&is_slow), until: until_now };
        let config: tokio_postgres::Config = scene.sharing("alice", "").parse().unwrap();
        let (client, connection) = config.connect_raw(slow, tokio_postgres::NoTls).await.unwrap();
        let connection = tokio::spawn(connection);
        let before = resident_bytes();
        is_slow.store(true, Ordering::Relaxed);
        let asking = tokio::spawn(async move {
            drop(client.simple_query("SELECT repeat('x', 1000) FROM generate_series(1, 1000000)").await);
        });
        let waits = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'ClientWrite'";
        until("its server waits for it", async || one(&admin, waits).await == "1").await;
        // sleep: what would grow has time to grow.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let grown = resident_bytes().saturating_sub(before);
        println!("grown by {grown} bytes of a gigabyte");
        assert!(grown < 64 << 20, "{grown}");
        connection.abort();
        asking.await.unwrap();
        assert!(steady.end().await.0 > 0);
        until("its server is free", async || one(&admin, waits).await == "0").await;
    }
}

story! {
    async fn a_server_that_stops_answering_holds_its_own_client_and_no_longer_than_it_may(scene) {
        let mut impatient = settings();
        impatient.timeouts.query = Some(Duration::from_millis(300));
        scene.proxy.replace(impatient);
        let steady = Steady::begin(connect(&scene.sharing("alice", "")).await.unwrap()).await;
        let stuck = connect(&scene.conninfo("alice", "")).await.unwrap();
        let backend = one(&stuck, "SELECT pg_backend_pid()::text").await;
        let signal = |name: &str| assert!(Command::new("kill").args([name, &backend]).status().unwrap().success());
        signal("-STOP");
        let error = stuck.simple_query("SELECT 1").await.unwrap_err();
        assert_eq!(told(&error).0, "57014");
        assert!(steady.end().await.0 > 0);
        signal("-CONT");
        let admin = scene.admin().await;
        let there = format!("SELECT count(*)::text FROM pg_stat_activity WHERE pid = {backend}");
        until("it was closed", async || one(&admin, &there).await == "0").await;
    }
}

/// The salt that somebody is shown who would prove a password as this user.
fn salt(address: SocketAddr, user: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(&startup(user))?;
    let mut said = |expected: &[u8]| {
        let mut header = [0; 5];
        stream.read_exact(&mut header)?;
        let [kind, length @ ..] = header;
        assert_eq!(kind, b'R');
        let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
        stream.read_exact(&mut body)?;
        stream.write_all(expected)?;
        io::Result::Ok(String::from_utf8_lossy(&body).into_owned())
    };
    let mut first = BytesMut::new();
    build::sasl_initial_response(&mut first, "SCRAM-SHA-256", Some(b"n,,n=,r=abc")).unwrap();
    said(&first)?;
    let challenge = said(b"")?;
    Ok(challenge.split(',').find_map(|part| part.strip_prefix("s=")).unwrap().to_owned())
}

story! {
    async fn whoever_does_not_exist_has_one_salt_with_all_proxies_as_those_who_do(scene) {
        let other = Proxy::start(config(&scene.trusts), settings()).unwrap();
        assert!(other.learn(scene.table(1, Some("a"))));
        let addresses = [scene.proxy.addresses()[0], other.addresses()[0]];
        let salts = tokio::task::spawn_blocking(move || {
            ["alice", "ghost", "shade", "nologin"].map(|user| addresses.map(|address| salt(address, user).unwrap()))
        });
        let salts = salts.await.unwrap();
        for [one, other] in &salts {
            assert_eq!(one, other, "{salts:?}");
        }
        let all: BTreeSet<&String> = salts.iter().flatten().collect();
        assert_eq!(all.len(), salts.len(), "each user has another one");
        // Nor does it depend on whom the proxies trust or where they are, but on a secret of the servers.
        let admin = scene.admin().await;
        admin.batch_execute("ALTER ROLE monitor PASSWORD 'another one'").await.unwrap();
        let address = addresses[0];
        until("what was known is asked again", async || {
            let now = tokio::task::spawn_blocking(move || salt(address, "ghost").unwrap());
            now.await.unwrap() != salts[1][0]
        })
        .await;
    }
}
