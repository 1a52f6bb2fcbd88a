//! Cuts, refusals and losses, seen by ordinary sockets.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use pgherd_testkit::net::Refusal;
use pgherd_testkit::{CLIENT, Host, Net, wait_until};

/// Ten times what a packet needs here, and little enough to wait for its absence.
const SOON: Duration = Duration::from_millis(100);

/// A listener on one host that any other may connect to.
fn listen(host: &Host, port: u16) -> TcpListener {
    host.enter(|| TcpListener::bind((host.address(), port)).unwrap())
}

fn connect(from: &Host, to: &TcpListener) -> std::io::Result<TcpStream> {
    let address = to.local_addr().unwrap();
    from.enter(|| TcpStream::connect_timeout(&address, SOON))
}

/// An accepted connection: the end at `from`, then the end at the listener.
fn connection(from: &Host, to: &TcpListener) -> (TcpStream, TcpStream) {
    let here = connect(from, to).unwrap();
    let (there, _) = to.accept().unwrap();
    for end in [&here, &there] {
        end.set_read_timeout(Some(SOON)).unwrap();
        end.set_nodelay(true).unwrap();
    }
    (here, there)
}

/// Whether what goes into one end comes out of the other, with time for a retransmission.
fn arrives(mut from: &TcpStream, mut to: &TcpStream) -> bool {
    from.write_all(b"x").is_ok() && to.read(&mut [0; 16]).is_ok_and(|bytes| bytes > 0)
}

fn datagram_arrives(from: &Host, to: &Host) -> bool {
    let receiver = to.enter(|| UdpSocket::bind((to.address(), 0)).unwrap());
    receiver.set_read_timeout(Some(SOON)).unwrap();
    let target: SocketAddr = receiver.local_addr().unwrap();
    from.enter(|| UdpSocket::bind((from.address(), 0)).unwrap().send_to(b"x", target).unwrap());
    receiver.recv(&mut [0]).is_ok()
}

#[test]
fn hosts_talk_to_each_other_and_to_nobody_else() {
    let net = Net::new(&["a", "b"]);
    let (a, b) = (net.host("a"), net.host("b"));
    let listener = listen(b, 5432);
    for from in net.hosts() {
        assert!(connect(from, &listener).is_ok(), "{} cannot reach b", from.name());
    }
    let receiver = b.enter(|| UdpSocket::bind((b.address(), 0)).unwrap());
    receiver.set_read_timeout(Some(SOON)).unwrap();
    // The machine may have no route at all, or one that leads elsewhere.
    let _sent = UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", receiver.local_addr().unwrap());
    assert!(receiver.recv(&mut [0]).is_err(), "the machine itself must not be in the network");
    let again = Net::new(&["a", "b"]);
    assert!(connect(again.host("a"), &listener).is_err(), "two networks must not see each other");
    // The same port on another host is free, and so is loopback's.
    let _same_port = listen(a, 5432);
    a.enter(|| TcpListener::bind("127.0.0.1:5432").unwrap());
}

#[test]
fn a_cut_stops_both_directions_of_that_pair_and_healing_brings_them_back() {
    let net = Net::new(&["a", "b", "c"]);
    let (a, b, c) = (net.host("a"), net.host("b"), net.host("c"));
    let listener = listen(b, 5432);
    let (at_a, at_b) = connection(a, &listener);
    net.cut("a", "b");
    assert!(!arrives(&at_a, &at_b) && !arrives(&at_b, &at_a), "an open connection goes on");
    assert_eq!(connect(a, &listener).unwrap_err().kind(), ErrorKind::TimedOut, "a cut is silent");
    assert!(datagram_arrives(c, b) && datagram_arrives(a, c) && datagram_arrives(net.client(), b));
    net.heal();
    assert!(connect(a, &listener).is_ok());
    wait_until("the old connection to go on by retransmission", Duration::from_secs(10), || {
        if (&at_b).read(&mut [0; 16]).is_ok_and(|bytes| bytes > 0) {
            Ok(())
        } else {
            Err("nothing".to_owned())
        }
    });
}

#[test]
fn a_one_way_cut_leaves_the_other_way_open() {
    let net = Net::new(&["a", "b"]);
    let (a, b) = (net.host("a"), net.host("b"));
    net.cut_one_way("a", "b");
    assert!(!datagram_arrives(a, b));
    assert!(datagram_arrives(b, a));
    net.heal();
    assert!(datagram_arrives(a, b));
}

#[test]
fn a_cut_port_stops_that_port_only_whoever_connected() {
    let net = Net::new(&["a", "b"]);
    let (a, b) = (net.host("a"), net.host("b"));
    let (database, api) = (listen(b, 5432), listen(b, 8009));
    let (to_database, from_database) = connection(a, &database);
    let (to_api, from_api) = connection(a, &api);
    net.cut_port("a", "b", 5432);
    assert!(!arrives(&to_database, &from_database), "requests arrive");
    assert!(!arrives(&from_database, &to_database), "what the server sends by itself, such as WAL, arrives");
    assert!(connect(a, &database).is_err());
    assert!(arrives(&to_api, &from_api) && arrives(&from_api, &to_api) && connect(a, &api).is_ok());
}

#[test]
fn a_port_that_is_cut_one_way_takes_what_nobody_answers() {
    let net = Net::new(&["a", "b"]);
    let (a, b) = (net.host("a"), net.host("b"));
    let (database, api) = (listen(b, 5432), listen(b, 8009));
    let (to_database, from_database) = connection(a, &database);
    net.cut_port_one_way("a", "b", 5432);
    assert!(!arrives(&to_database, &from_database), "requests arrive");
    assert!(arrives(&from_database, &to_database), "what the server sends by itself does not");
    assert!(connect(a, &database).is_err() && connect(a, &api).is_ok());
}

#[test]
fn a_reset_is_an_answer_and_a_drop_is_none() {
    let net = Net::new(&["a", "b"]);
    let listener = listen(net.host("b"), 5432);
    let (mut at_a, _at_b) = connection(net.host("a"), &listener);
    net.refuse("a", "b", Refusal::Reset);
    assert_eq!(connect(net.host("a"), &listener).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    at_a.write_all(b"x").unwrap();
    assert_eq!(at_a.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn an_isolated_host_reaches_nobody_and_the_others_go_on() {
    let net = Net::new(&["a", "b", "c"]);
    net.isolate("a");
    for other in [CLIENT, "b", "c"] {
        assert!(!datagram_arrives(net.host("a"), net.host(other)), "a reaches {other}");
        assert!(!datagram_arrives(net.host(other), net.host("a")), "{other} reaches a");
    }
    assert!(datagram_arrives(net.host("b"), net.host("c")) && datagram_arrives(net.client(), net.host("c")));
}

#[test]
fn a_partition_separates_groups_and_leaves_the_rest_alone() {
    let net = Net::new(&["a", "b", "c"]);
    net.partition(&[&["a", "b"], &["c"]]);
    let reaches = |from, to| datagram_arrives(net.host(from), net.host(to));
    assert!(reaches("a", "b") && reaches("b", "a"));
    assert!(!reaches("a", "c") && !reaches("c", "a") && !reaches("b", "c") && !reaches("c", "b"));
    assert!(reaches(CLIENT, "a") && reaches(CLIENT, "c"));
}

#[test]
fn faults_overlap_and_are_lifted_one_by_one() {
    let net = Net::new(&["a", "b", "c"]);
    let reaches = |from, to| datagram_arrives(net.host(from), net.host(to));
    let isolated = net.isolate("a");
    let cut = net.cut("a", "b");
    let port = net.cut_port("a", "b", 5432);
    net.lift(isolated);
    assert!(reaches("a", "c") && !reaches("a", "b"));
    net.lift(cut);
    assert!(reaches("a", "b"));
    let listener = listen(net.host("b"), 5432);
    assert!(connect(net.host("a"), &listener).is_err(), "the third fault is still there");
    net.lift(port);
    assert!(connect(net.host("a"), &listener).is_ok());
}

#[test]
fn a_lossy_link_loses_about_as_much_as_asked() {
    let net = Net::new(&["a", "b"]);
    net.lose("a", "b", 0.2);
    let (a, b) = (net.host("a"), net.host("b"));
    let receiver = b.enter(|| UdpSocket::bind((b.address(), 0)).unwrap());
    let sender = a.enter(|| UdpSocket::bind((a.address(), 0)).unwrap());
    receiver.set_read_timeout(Some(SOON)).unwrap();
    let arrived = (0..1000)
        .filter(|_| {
            sender.send_to(b"x", receiver.local_addr().unwrap()).unwrap();
            receiver.set_nonblocking(true).unwrap();
            receiver.recv(&mut [0]).is_ok()
        })
        .count();
    // Seven standard deviations on each side.
    assert!((710..890).contains(&arrived), "{arrived} of 1000 arrived at 20 % loss");
}

#[test]
#[should_panic(expected = "was stopped by the rules")]
fn a_fault_that_has_no_effect_fails_the_test() {
    let net = Net::new(&["a", "b"]);
    net.host("b").command("iptables").args(["-F", "INPUT"]).run();
    net.cut("a", "b");
}
