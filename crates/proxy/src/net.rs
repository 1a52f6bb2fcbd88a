//! Connections: TCP, Unix sockets and TLS behind one type, and their making.
//!
//! Leaves out every byte's meaning. Hazard: bytes that came in clear before a TLS handshake and are read after it; the
//! state machines of the opening refuse them, and [`Rewound`] gives back only what the handshake itself began with.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use pgherd_core::spec::TlsMode;
use pgherd_core::types::NodeName;
use pgherd_pgwire::message::build;
use pgherd_pgwire::startup::{Answer, encryption_answer};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, sockopt};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::local::Local;
use crate::routes::Target;
use crate::timer;
use crate::tls::{self, Attempt, NotConnected};

/// How servers are spoken to: in clear, or with TLS and what it takes to believe that it is that node.
pub trait ServerTls: Send + Sync + 'static {
    /// As strictly as the mode says. `None`: there is no TLS here, whatever the mode.
    fn to_node(&self, node: &NodeName, mode: TlsMode) -> Option<(Arc<ClientConfig>, ServerName<'static>)>;
}

/// For servers on the same machine or in a network of their own.
#[derive(Clone, Copy, Debug)]
pub struct InClear;

impl ServerTls for InClear {
    fn to_node(&self, _: &NodeName, _: TlsMode) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        None
    }
}

/// How the next server is spoken to.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a> {
    pub(crate) tls: &'a dyn ServerTls,
    pub(crate) mode: TlsMode,
}

pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(Local),
    ClientTls(Box<tokio_rustls::server::TlsStream<Rewound>>),
    ServerTls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    /// What it was is in a handshake.
    Taken,
}

/// A side that has said nothing for so long is asked by the kernel whether it is still there: nobody sees a host that lost power,
/// or a firewall that forgot a connection.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
/// Until it is asked again.
const KEEPALIVE_AGAIN: Duration = Duration::from_secs(10);
/// Questions without an answer that end the connection.
const KEEPALIVES: u32 = 3;

/// What every connection over TCP has, on both sides. There is no `TCP_USER_TIMEOUT`: it would end one whose other side takes nothing
/// for a while, too, such as a client that stops in the middle of a result.
pub(crate) fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(tcp, KEEPALIVE_AFTER)?;
    sockopt::set_tcp_keepintvl(tcp, KEEPALIVE_AGAIN)?;
    sockopt::set_tcp_keepcnt(tcp, KEEPALIVES)?;
    Ok(sockopt::set_socket_keepalive(tcp, true)?)
}

/// How often the kernel is asked whether a client that has sent something more is still there.
const LOOKS_WHETHER_CLOSED: Duration = Duration::from_millis(500);

/// Has the other side said that it sends no more, or is the connection broken?
fn is_closed(tcp: &TcpStream) -> bool {
    let mut asked = [PollFd::new(tcp, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    rustix::event::poll(&mut asked, Some(&now)).is_ok() && asked[0].revents().intersects(ended)
}

impl Stream {
    /// Nothing has come, and the other side has not closed: true of an idle server. Asks the kernel, since the runtime may
    /// not have heard yet.
    pub(crate) fn is_quiet(&self) -> bool {
        let fd = match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => match stream.fd() {
                Some(fd) => fd,
                None => return false,
            },
            Stream::ServerTls(stream) => stream.get_ref().0.as_fd(),
            Stream::ClientTls(stream) => stream.get_ref().0.inner.as_fd(),
            Stream::Taken => return false,
        };
        let mut byte = [0];
        let peeked = rustix::net::recv(fd, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(peeked, Err(rustix::io::Errno::AGAIN))
    }

    pub(crate) async fn send(&mut self, out: &mut BytesMut) -> io::Result<()> {
        if !out.is_empty() {
            self.write_all(out).await?;
            out.clear();
            self.flush().await?;
        }
        Ok(())
    }

    /// More bytes behind those that are there; an end is an error.
    pub(crate) async fn receive(&mut self, input: &mut BytesMut) -> io::Result<()> {
        match self.read_buf(input).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// For a handshake, which gives it back in another form.
    pub(crate) fn take_tcp(&mut self) -> io::Result<TcpStream> {
        match std::mem::replace(self, Stream::Taken) {
            Stream::Tcp(stream) => Ok(stream),
            _ => Err(io::Error::other("TLS inside TLS")),
        }
    }

    /// Until the other side has closed, without taking what it has sent before.
    pub(crate) async fn gone(&self) {
        let tcp = match self {
            Stream::Tcp(stream) => stream,
            Stream::ClientTls(stream) => &stream.get_ref().0.inner,
            _ => return std::future::pending().await,
        };
        if matches!(tcp.peek(&mut [0]).await, Ok(0) | Err(_)) {
            return;
        }
        // It is readable, as it was, when an end comes behind what is there: most often a Terminate, or TLS's own farewell.
        while !is_closed(tcp) {
            timer::sleep(LOOKS_WHETHER_CLOSED).await;
        }
    }

    /// Of this side and of the other one; nothing for a Unix socket.
    pub(crate) fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        let tcp = match self {
            Stream::Tcp(stream) => stream,
            Stream::ClientTls(stream) => &stream.get_ref().0.inner,
            Stream::ServerTls(stream) => stream.get_ref().0,
            Stream::Unix(_) | Stream::Taken => return None,
        };
        Some((tcp.local_addr().ok()?, tcp.peer_addr().ok()?))
    }

    /// What binds a proof to this connection, to a server or from a client that showed a certificate.
    pub(crate) fn server_certificate_hash(&self) -> Option<Vec<u8>> {
        match self {
            Stream::ServerTls(stream) => tls::end_point(stream.get_ref().1.peer_certificates()?.first()?),
            _ => None,
        }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        matches!(self, Stream::ClientTls(_) | Stream::ServerTls(_))
    }

    /// Has TLS put what was written on its way?
    pub(crate) fn must_flush(&self) -> bool {
        self.is_encrypted()
    }
}

macro_rules! each {
    ($self:ident, $stream:ident => $body:expr) => {
        match $self.get_mut() {
            Stream::Tcp($stream) => $body,
            Stream::Unix($stream) => $body,
            Stream::ClientTls($stream) => $body,
            Stream::ServerTls($stream) => $body,
            Stream::Taken => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// A connection with what was read too early put back in front: a TLS handshake that nobody had announced.
pub(crate) struct Rewound {
    front: Bytes,
    inner: TcpStream,
}

impl AsyncRead for Rewound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.front.has_remaining() {
            let count = self.front.len().min(buf.remaining());
            buf.put_slice(&self.front.split_to(count));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// What is spoken inside of TLS, as of PostgreSQL 17.
pub const ALPN: &[u8] = b"postgresql";

/// What came of a handshake with a client.
pub(crate) struct Accepted {
    pub(crate) stream: Stream,
    /// What the client said that it will speak.
    pub(crate) protocol: Option<Vec<u8>>,
    /// What it has shown of itself, if anything.
    pub(crate) certificate: Option<CertificateDer<'static>>,
}

/// The server's side of a handshake; `front` was received already.
pub(crate) async fn accept_tls(
    inner: TcpStream,
    front: BytesMut,
    config: Arc<ServerConfig>,
) -> io::Result<Accepted> {
    let rewound = Rewound { front: front.freeze(), inner };
    let encrypted = TlsAcceptor::from(config).accept(rewound).await?;
    let session = encrypted.get_ref().1;
    let protocol = session.alpn_protocol().map(<[u8]>::to_vec);
    let certificate = session.peer_certificates().and_then(|chain| chain.first()).cloned();
    Ok(Accepted { stream: Stream::ClientTls(Box::new(encrypted)), protocol, certificate })
}

/// Connects to a server, over its Unix socket where it has one here. As in libpq, there is no TLS on that.
pub(crate) async fn connect(target: &Target, way: Way<'_>, attempt: Attempt) -> Result<Stream, NotConnected> {
    if let Some(dir) = &target.socket_dir {
        return Ok(Stream::Unix(connect_here(&socket(dir, target.port)).await?));
    }
    let mut stream = TcpStream::connect(SocketAddr::new(target.address, target.port)).await?;
    prepare(&stream)?;
    if attempt == Attempt::Clear {
        return Ok(Stream::Tcp(stream));
    }
    let Some((config, name)) = way.tls.to_node(&target.node, way.mode) else {
        return Ok(Stream::Tcp(stream));
    };
    let mut asked = BytesMut::new();
    build::ssl_request(&mut asked);
    stream.write_all(&asked).await?;
    // One byte and no more: what a man in the middle put behind it is not read as the server's (CVE-2021-23222).
    let mut answer = [0];
    stream.read_exact(&mut answer).await?;
    match encryption_answer(&answer, b'S') {
        Ok(Some(Answer::Granted)) => {}
        Ok(Some(Answer::Refused)) if attempt == Attempt::Offered => return Ok(Stream::Tcp(stream)),
        Ok(_) => return Err(io::Error::other("the server has no TLS").into()),
        Err(error) => return Err(io::Error::other(error).into()),
    }
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(NotConnected::Handshake)?;
    Ok(Stream::ServerTls(Box::new(stream)))
}

/// To somebody who is the same user here. What TLS proves elsewhere, the kernel says of them (as libpq's `requirepeer`).
async fn connect_here(socket: &Path) -> io::Result<Local> {
    let stream = UnixStream::connect(socket).await?;
    let (theirs, ours) = (sockopt::socket_peercred(&stream)?.uid, rustix::process::geteuid());
    match theirs == ours || ours.is_root() {
        true => Local::new(stream),
        false => Err(io::Error::other(format!(
            "{} is of user {}, and this proxy runs as {}",
            socket.display(),
            theirs.as_raw(),
            ours.as_raw()
        ))),
    }
}

fn socket(dir: &Path, port: u16) -> std::path::PathBuf {
    dir.join(format!(".s.PGSQL.{port}"))
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::PrivateKeyDer;
    use rustls::pki_types::pem::PemObject as _;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;

    struct Trusting(Arc<ClientConfig>);

    impl ServerTls for Trusting {
        fn to_node(&self, _: &NodeName, _: TlsMode) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
            Some((Arc::clone(&self.0), ServerName::try_from("node").unwrap()))
        }
    }

    fn configs() -> (Arc<ServerConfig>, Trusting) {
        let made = rcgen::generate_simple_self_signed(["node".to_owned()]).unwrap();
        let certificate = CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(made.signing_key.serialize_pem().as_bytes()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let server = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key);
        let client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        (Arc::new(server.unwrap()), Trusting(Arc::new(client)))
    }

    /// A server that answers a request for TLS with these bytes and goes on with the handshake, and what the proxy then
    /// reads of it.
    async fn read_behind(answer: &'static [u8], attempt: Attempt) -> Result<Vec<u8>, NotConnected> {
        let (server, trusting) = configs();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            stream.read_exact(&mut [0; 8]).await?;
            stream.write_all(answer).await?;
            let mut encrypted = TlsAcceptor::from(server).accept(stream).await?;
            encrypted.write_all(b"said by the server").await?;
            encrypted.shutdown().await
        });
        let node = "node".parse().unwrap();
        let target = Target { node, address: address.ip(), port: address.port(), socket_dir: None };
        let connected = connect(&target, Way { tls: &trusting, mode: TlsMode::Prefer }, attempt).await;
        let mut read = BytesMut::new();
        if let Ok(mut stream) = connected {
            stream.receive(&mut read).await?;
            serving.await.unwrap()?;
            return Ok(read.to_vec());
        }
        serving.abort();
        connected.map(|_| Vec::new())
    }

    /// CVE-2021-23222, CVE-2021-43767: what a man in the middle sends in clear is never read as the server's; and
    /// CVE-2024-10977: of a text in clear nothing is told.
    #[tokio::test]
    async fn what_stands_behind_the_answer_to_a_request_for_tls_is_not_the_servers() {
        let granted = read_behind(b"S", Attempt::Demanded).await;
        assert_eq!(granted.unwrap(), b"said by the server");
        let refused = read_behind(b"N", Attempt::Demanded).await.unwrap_err();
        assert_eq!(refused.to_string(), "the server has no TLS");
        // A server that may have none is not believed either in what is no answer.
        for attempt in [Attempt::Offered, Attempt::Demanded] {
            for wrong in [&b"SR\0\0\0\x08\0\0\0\0Z\0\0\0\x05I"[..], b"SS", b"E\0\0\0\x0cSFATAL\0\0", b"R"] {
                let error = read_behind(wrong, attempt).await.unwrap_err().to_string();
                assert!(!error.contains("FATAL"), "{error}");
            }
        }
    }

    #[tokio::test]
    async fn who_is_silent_is_asked_whether_he_is_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let node = "node".parse().unwrap();
        let target = Target { node, address: address.ip(), port: address.port(), socket_dir: None };
        let (accepted, way) = (listener.accept(), Way { tls: &InClear, mode: TlsMode::Disable });
        let (accepted, connected) = tokio::join!(accepted, connect(&target, way, Attempt::Clear));
        let (client, Ok(Stream::Tcp(server))) = (accepted.unwrap().0, connected) else { panic!("not TCP") };
        assert!(!sockopt::socket_keepalive(&client).unwrap(), "nobody is asked by himself");
        prepare(&client).unwrap();
        for tcp in [client, server] {
            assert!(sockopt::socket_keepalive(&tcp).unwrap() && tcp.nodelay().unwrap());
            assert_eq!(sockopt::tcp_keepidle(&tcp).unwrap(), KEEPALIVE_AFTER);
            assert_eq!(sockopt::tcp_keepintvl(&tcp).unwrap(), KEEPALIVE_AGAIN);
            assert_eq!(sockopt::tcp_keepcnt(&tcp).unwrap(), KEEPALIVES);
        }
    }
}
