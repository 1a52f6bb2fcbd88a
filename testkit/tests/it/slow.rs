//! Slow links, measured.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use pgherd_testkit::net::Slowness;
use pgherd_testkit::{Host, Net};

const DELAY: Duration = Duration::from_millis(50);
const A_WHILE: Duration = Duration::from_secs(30);

struct Path {
    sender: UdpSocket,
    receiver: UdpSocket,
}

impl Path {
    fn new(from: &Host, to: &Host) -> Path {
        let receiver = to.enter(|| UdpSocket::bind((to.address(), 0)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let sender = from.enter(|| UdpSocket::bind((from.address(), 0)).unwrap());
        Path { sender, receiver }
    }

    fn send(&self, content: &[u8]) {
        self.sender.send_to(content, self.receiver.local_addr().unwrap()).unwrap();
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; 2048];
        let length = self.receiver.recv(&mut buffer).ok()?;
        Some(buffer[..length].to_vec())
    }

    /// Time for one datagram.
    fn latency(&self) -> Duration {
        let start = Instant::now();
        self.send(b"x");
        self.receive().expect("it arrives");
        start.elapsed()
    }
}

#[test]
fn a_delay_adds_up_and_goes_away() {
    let net = Net::new(&["a", "b", "c"]);
    let (a, b, c) = (net.host("a"), net.host("b"), net.host("c"));
    net.slow("a", "b", Slowness::delay(DELAY));
    for (from, to) in [(a, b), (b, a)] {
        let latency = Path::new(from, to).latency();
        assert!(latency >= DELAY, "{latency:?} from {} to {}", from.name(), to.name());
    }
    assert!(Path::new(a, c).latency() < DELAY, "another link is slow as well");
    net.slow_one_way("a", "b", Slowness::delay(DELAY));
    assert!(Path::new(a, b).latency() >= DELAY && Path::new(b, a).latency() < DELAY);
    net.heal();
    assert!(Path::new(a, b).latency() < DELAY);
}

#[test]
fn open_connections_become_slow_and_stay_open() {
    let net = Net::new(&["a", "b"]);
    let (a, b) = (net.host("a"), net.host("b"));
    let listener = b.enter(|| TcpListener::bind((b.address(), 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let mut here = a.enter(|| TcpStream::connect(address)).unwrap();
    let (mut there, _) = listener.accept().unwrap();
    for end in [&here, &there] {
        end.set_nodelay(true).unwrap();
        end.set_read_timeout(Some(A_WHILE)).unwrap();
    }
    let mut round_trip = || {
        let start = Instant::now();
        here.write_all(b"ping").unwrap();
        there.read_exact(&mut [0; 4]).unwrap();
        there.write_all(b"pong").unwrap();
        here.read_exact(&mut [0; 4]).unwrap();
        start.elapsed()
    };
    assert!(round_trip() < DELAY);
    net.slow("a", "b", Slowness::delay(DELAY));
    assert!(round_trip() >= 2 * DELAY);
    net.restore_speed();
    assert!(round_trip() < 2 * DELAY);
}

#[test]
fn jitter_delays_and_never_reorders() {
    let net = Net::new(&["a", "b"]);
    net.slow("a", "b", Slowness::delay(Duration::from_millis(5)).with_jitter(Duration::from_millis(20)));
    let path = Path::new(net.host("a"), net.host("b"));
    for number in 0..100_u8 {
        path.send(&[number]);
    }
    let arrived: Vec<u8> = (0..100).map(|_| path.receive().expect("nothing is lost")[0]).collect();
    assert!(arrived.is_sorted(), "{arrived:?}");
}

#[test]
fn loss_and_duplicates_come_as_often_as_asked() {
    let net = Net::new(&["a", "b"]);
    net.slow("a", "b", Slowness::default().with_loss(0.2).with_duplicates(0.25));
    let path = Path::new(net.host("a"), net.host("b"));
    path.receiver.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let batch = |_| {
        // Few enough that the receiver's buffer loses none of them.
        (0..20).for_each(|_| path.send(b"x"));
        std::iter::from_fn(|| path.receive()).count()
    };
    let arrived: usize = (0..50).map(batch).sum();
    // 1000 × 0.8 × 1.25 is 1000.
    assert!((850..1150).contains(&arrived), "{arrived} arrived");
}

#[test]
fn a_rate_holds_back_what_exceeds_it() {
    let net = Net::new(&["a", "b"]);
    net.slow("a", "b", Slowness::default().with_rate(100_000));
    let path = Path::new(net.host("a"), net.host("b"));
    let start = Instant::now();
    for _ in 0..20 {
        path.send(&[0; 1000]);
    }
    for _ in 0..20 {
        path.receive().expect("the queue is long enough");
    }
    let (taken, least) = (start.elapsed(), Duration::from_millis(200));
    assert!(taken >= least, "20 kB at 100 kB/s took {taken:?}");
}

#[test]
fn tcp_gets_everything_through_a_bad_link() {
    let net = Net::new(&["a", "b"]);
    let bad = Slowness::delay(Duration::from_millis(5)).with_loss(0.02).with_duplicates(0.02);
    net.slow("a", "b", bad);
    let (a, b) = (net.host("a"), net.host("b"));
    let listener = b.enter(|| TcpListener::bind((b.address(), 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let mut here = a.enter(|| TcpStream::connect_timeout(&address, A_WHILE)).unwrap();
    let (mut there, _) = listener.accept().unwrap();
    there.set_read_timeout(Some(A_WHILE)).unwrap();
    let sent: Vec<u8> = (0..500_000_u32).map(|index| (index % 251) as u8).collect();
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            here.write_all(&sent).unwrap();
            here.shutdown(std::net::Shutdown::Write).unwrap();
        });
        there.read_to_end(&mut received).unwrap();
    });
    assert!(sent == received, "{} of {} bytes, or others", received.len(), sent.len());
}

#[test]
fn a_slow_link_can_be_cut() {
    let net = Net::new(&["a", "b"]);
    net.slow("a", "b", Slowness::delay(DELAY));
    net.cut("a", "b");
    let path = Path::new(net.host("a"), net.host("b"));
    path.send(b"x");
    assert!(path.receive().is_none(), "the way through the forwarder is a way around the cut");
    net.heal();
    assert!(path.latency() < DELAY);
}
