//! Two hosts and a bystander, each a network namespace on one switch, and an address that moves between them. They
//! need root, and `ip`.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant as Moment};

use pgherd_core::action::Address;
use pgherd_core::spec::VipSpec;
use rustix::thread::{LinkNameSpaceType, capabilities, move_into_link_name_space};

use super::keeper::{Keeper, State, Wish};
use crate::clock;

const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 5432;
const V4: &str = "10.77.0.9/24";
const V6: &str = "fd77::9/64";
/// The most that a kernel may be late; `GONE_BEFORE_LEASE_END` is what has been seen.
const KERNEL_LATE: Duration = Duration::from_secs(1);

struct Net {
    name: String,
    hosts: [Host; 3],
}

struct Host(String);

impl Net {
    fn new() -> Net {
        assert!(rustix::process::geteuid().is_root(), "this test needs root, for network namespaces");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pghvip{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (switch, hosts) = (format!("{name}s"), ["a", "b", "c"].map(|host| Host(format!("{name}{host}"))));
        let net = Net { name, hosts };
        ip(&["netns", "add", &switch]);
        ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0"]);
        ip(&["-n", &switch, "link", "set", "bridge", "up"]);
        for (index, Host(host)) in net.hosts.iter().enumerate() {
            let port = format!("p{index}");
            ip(&["netns", "add", host]);
            ip(&["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", host]);
            ip(&["-n", &switch, "link", "set", &port, "master", "bridge", "up"]);
            ip(&["-n", host, "link", "set", "lo", "up"]);
            ip(&["-n", host, "link", "set", "eth0", "up"]);
            ip(&["-n", host, "addr", "add", &format!("10.77.0.{}/24", index + 1), "dev", "eth0"]);
            ip(&["-n", host, "addr", "add", &format!("fd77::{}/64", index + 1), "dev", "eth0", "nodad"]);
        }
        net
    }

    fn a(&self) -> &Host {
        &self.hosts[0]
    }

    fn b(&self) -> &Host {
        &self.hosts[1]
    }

    fn bystander(&self) -> &Host {
        &self.hosts[2]
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let hosts = self.hosts.iter().map(|host| host.0.clone());
        for name in hosts.chain([format!("{}s", self.name)]) {
            // A panic here would hide the one that matters.
            let _gone = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

impl Host {
    fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            let namespace = File::open(format!("/run/netns/{}", self.0)).unwrap();
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap())
    }

    /// As PostgreSQL does with `*`, for one family.
    fn listen(&self, address: &str) -> TcpListener {
        let any = if address == V4 { "0.0.0.0" } else { "::" };
        self.enter(|| TcpListener::bind((any, PORT)).unwrap())
    }

    fn keeper(&self) -> Keeper {
        self.enter(|| Keeper::start().unwrap())
    }

    /// `ip`'s line about the address, if it is here.
    fn shows(&self, address: &str) -> Option<String> {
        let all = ip(&["-n", &self.0, "-o", "addr", "show"]);
        all.lines().find(|line| line.contains(&format!(" {address} "))).map(str::to_owned)
    }

    fn mac(&self) -> String {
        let link = ip(&["-n", &self.0, "-o", "link", "show", "eth0"]);
        link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned()
    }

    fn knows(&self, address: &str) -> String {
        ip(&["-n", &self.0, "neigh", "show", "to", address.split('/').next().unwrap()])
    }
}

fn vip(address: &str) -> VipSpec {
    VipSpec { address: address.parse().unwrap(), interface: "eth0".to_owned() }
}

/// As the main loop says it, who has a proof of now.
fn hold(keeper: &Keeper, vip: &VipSpec, within: Duration) {
    let address = Address::Hold { until: clock::now() + within };
    keeper.wish(Wish { vip: Some(vip.clone()), port: PORT, address });
}

fn drop_it(keeper: &Keeper, vip: &VipSpec) {
    keeper.wish(Wish { vip: Some(vip.clone()), port: PORT, address: Address::Drop });
}

const LEASE: Duration = Duration::from_millis(2_600);

fn wait_until(what: &str, mut met: impl FnMut() -> bool) {
    let begun = Moment::now();
    while !met() {
        assert!(begun.elapsed() < SOON, "waited for {what}");
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn state_is(keeper: &Keeper, what: &str, met: impl Fn(&State) -> bool) -> State {
    let begun = Moment::now();
    loop {
        let state = keeper.state();
        if met(&state) {
            return state;
        }
        assert!(begun.elapsed() < SOON, "waited for {what}: {state:?}");
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_is_there_while_it_is_held_and_goes_by_itself() {
    let net = Net::new();
    for address in [V4, V6] {
        let _listener = net.a().listen(address);
        let (vip, keeper) = (vip(address), net.a().keeper());
        let begun = Moment::now();
        while begun.elapsed() < 2 * LEASE {
            hold(&keeper, &vip, LEASE);
            wait_until("it to be there", || net.a().shows(address).is_some());
            // sleep: proofs come so often.
            std::thread::sleep(Duration::from_millis(250));
            assert!(net.a().shows(address).is_some(), "prolonged without a gap");
        }
        let line = net.a().shows(address).unwrap();
        assert!(!line.contains("valid_lft forever"), "{line}");

        // Nobody prolongs it: the thread removes it in time, before the kernel is late with it.
        let last = Moment::now();
        hold(&keeper, &vip, LEASE);
        keeper.wish(Wish { vip: Some(vip.clone()), port: PORT, address: Address::Leave });
        wait_until("its end", || net.a().shows(address).is_none());
        let lasted = last.elapsed();
        assert!(lasted < LEASE, "{lasted:?}");
        settled(&keeper);
        assert_eq!(keeper.state().held, None);
    }
}

#[test]
fn the_kernel_removes_what_a_dead_agent_has_left() {
    let net = Net::new();
    for address in [V4, V6] {
        let _listener = net.a().listen(address);
        let (vip, keeper) = (vip(address), net.a().keeper());
        let held = Moment::now();
        hold(&keeper, &vip, LEASE);
        wait_until("it to be there", || net.a().shows(address).is_some());
        // Its thread ends without a word, as that of an agent that is killed.
        drop(keeper);
        wait_until("the kernel to remove it", || net.a().shows(address).is_none());
        let lasted = held.elapsed();
        assert!(lasted > Duration::from_secs(1), "the thread gave it up: {lasted:?}");
        // It is told whole seconds, rounded down.
        assert!(lasted < Duration::from_secs(2) + KERNEL_LATE, "{lasted:?}");
    }
}

#[test]
fn the_next_life_of_an_agent_takes_it_over_or_removes_it() {
    let net = Net::new();
    let _listener = net.a().listen(V4);
    let vip = vip(V4);
    let hurried = Duration::from_secs(30);
    let left = |host: &Host| {
        let keeper = host.keeper();
        hold(&keeper, &vip, hurried);
        wait_until("it to be there", || host.shows(V4).is_some());
    };
    left(net.a());
    let next = net.a().keeper();
    // Before anything is known, it stays.
    next.wish(Wish { vip: Some(vip.clone()), port: PORT, address: Address::Leave });
    settled(&next);
    assert!(net.a().shows(V4).is_some());
    hold(&next, &vip, hurried);
    let taken = state_is(&next, "it to be taken over", |state| state.held.is_some());
    assert_eq!(taken.trouble, None);
    drop(next);
    let standby = net.a().keeper();
    drop_it(&standby, &vip);
    settled(&standby);
    assert_eq!(net.a().shows(V4), None, "what a former life has left is not for thirty seconds");
}

fn settled(keeper: &Keeper) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(keeper.settled());
}

#[test]
fn what_somebody_else_has_put_there_is_neither_taken_nor_removed() {
    let net = Net::new();
    let _listener = net.a().listen(V4);
    let vip = vip(V4);
    for finite in [false, true] {
        let life: &[&str] = if finite { &["valid_lft", "600", "preferred_lft", "600"] } else { &[] };
        ip(&[&["-n", &net.a().0, "addr", "add", V4, "dev", "eth0"], life].concat());
        let keeper = net.a().keeper();
        hold(&keeper, &vip, LEASE);
        let state = state_is(&keeper, "a word about it", |state| state.trouble.is_some());
        assert_eq!(state.held, None);
        let told = state.trouble.unwrap();
        assert_eq!(told, "10.77.0.9 is on this host already, and was not put there by pgherd");
        drop_it(&keeper, &vip);
        settled(&keeper);
        assert!(net.a().shows(V4).is_some(), "it is not ours to remove");
        ip(&["-n", &net.a().0, "addr", "del", V4, "dev", "eth0"]);
        // It is taken as soon as it is free.
        wait_until("it to be taken", || {
            hold(&keeper, &vip, LEASE);
            keeper.state().held.is_some()
        });
        drop_it(&keeper, &vip);
        settled(&keeper);
    }
}

#[test]
fn what_is_in_the_way_is_told_before_it_is_needed() {
    let net = Net::new();
    let told = |vip: &VipSpec, address: Address| {
        let keeper = net.b().keeper();
        keeper.wish(Wish { vip: Some(vip.clone()), port: PORT, address });
        state_is(&keeper, "a word", |state| state.trouble.is_some()).trouble.unwrap()
    };
    let missing = VipSpec { interface: "eth7".to_owned(), ..vip(V4) };
    assert_eq!(told(&missing, Address::Drop), "there is no interface eth7 on this host");
    let until = clock::now() + SOON;
    let deaf = told(&vip(V4), Address::Hold { until });
    assert_eq!(deaf, "PostgreSQL does not listen on 10.77.0.9 until it is restarted");
    ip(&["-n", &net.b().0, "link", "set", "eth0", "down"]);
    assert_eq!(told(&vip(V4), Address::Drop), "the interface eth0 is down");
    // An agent that was given nothing. This thread is not used for anything else.
    let keeper = net.b().enter(|| {
        super::renounce().unwrap();
        Keeper::start().unwrap()
    });
    drop_it(&keeper, &vip(V4));
    let state = state_is(&keeper, "a word", |state| state.trouble.is_some());
    let told =
        "this agent was started without CAP_NET_ADMIN and CAP_NET_RAW, and cannot set 10.77.0.9/24 on eth0";
    assert_eq!(state.trouble.as_deref(), Some(told));
}

#[test]
fn whoever_starts_it_has_no_privilege_left() {
    let net = Net::new();
    let left = net.a().enter(|| {
        let keeper = Keeper::start().unwrap();
        (keeper, capabilities(None).unwrap(), super::privilege::missing())
    });
    assert_eq!(left.2, Some("CAP_NET_ADMIN and CAP_NET_RAW"));
    let needed = rustix::thread::CapabilitySet::NET_ADMIN | rustix::thread::CapabilitySet::NET_RAW;
    for set in [left.1.effective, left.1.permitted, left.1.inheritable] {
        assert!(!set.intersects(needed));
    }
    // And the one that keeps them has nothing else.
    let _listener = net.a().listen(V4);
    hold(&left.0, &vip(V4), LEASE);
    state_is(&left.0, "it to be held", |state| state.held.is_some());
    let threads = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = |name: &str| {
        let name = format!("{name}\n");
        move |path: &std::path::PathBuf| {
            std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm == name)
        }
    };
    for thread in threads.filter(named("address")) {
        let status = std::fs::read_to_string(thread.join("status")).unwrap();
        let of = |set: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        assert_eq!((of("CapPrm:"), of("CapEff:")), (needed.bits(), needed.bits()), "{status}");
        assert_eq!((of("CapInh:"), of("CapAmb:")), (0, 0), "{status}");
    }
}

#[test]
fn neighbours_hear_where_it_is_without_a_packet_of_their_own() {
    let net = Net::new();
    for address in [V4, V6] {
        let _listeners = (net.a().listen(address), net.b().listen(address));
        let (vip, a, b) = (vip(address), net.a().keeper(), net.b().keeper());
        hold(&a, &vip, LEASE);
        state_is(&a, "a to have it", |state| state.held.is_some());
        let to = (vip.address.address, PORT);
        let _connected = net.bystander().enter(|| TcpStream::connect(to).unwrap());
        assert!(net.bystander().knows(address).contains(&net.a().mac()));
        drop_it(&a, &vip);
        settled(&a);
        let asked = Moment::now();
        hold(&b, &vip, LEASE);
        wait_until("the bystander to know better", || {
            net.bystander().knows(address).contains(&net.b().mac())
        });
        let took = asked.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
        drop_it(&b, &vip);
        settled(&b);
    }
}

#[test]
fn clients_hear_at_once_that_their_connection_is_over() {
    let net = Net::new();
    for address in [V4, V6] {
        let listener = net.a().listen(address);
        let (vip, keeper) = (vip(address), net.a().keeper());
        hold(&keeper, &vip, LEASE);
        state_is(&keeper, "it to be held", |state| state.held.is_some());
        let to = (vip.address.address, PORT);
        let mut client = net.bystander().enter(|| TcpStream::connect(to).unwrap());
        let (mut served, _) = listener.accept().unwrap();
        served.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        // One by the host's own address stays.
        let own = if address == V4 { "10.77.0.1" } else { "fd77::1" };
        let own = (own.parse::<std::net::IpAddr>().unwrap(), PORT);
        let mut other = net.bystander().enter(|| TcpStream::connect(own).unwrap());
        let (mut other_served, _) = listener.accept().unwrap();

        drop_it(&keeper, &vip);
        settled(&keeper);
        client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        other_served.write_all(b"y").unwrap();
        other.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn somebody_else_who_claims_it_is_told_of_and_contradicted() {
    let net = Net::new();
    for address in [V4, V6] {
        let _listener = net.a().listen(address);
        let vip = vip(address);
        // An old owner that nobody reaches, and that still has it.
        let others: &[&str] = &["-n", &net.b().0, "addr", "add", address, "dev", "eth0"];
        ip(&[others, if address == V6 { &["nodad"] } else { &[] }].concat());
        let keeper = net.a().keeper();
        let asked = Moment::now();
        hold(&keeper, &vip, 2 * SOON);
        state_is(&keeper, "it to be held", |state| state.held.is_some());
        let took = asked.elapsed();
        assert!(took < Duration::from_millis(500), "nobody is waited for: {took:?}");
        let state = state_is(&keeper, "the other to be told of", |state| state.claimed_by.is_some());
        assert_eq!(state.claimed_by, Some(net.b().mac()));
        ip(&["-n", &net.b().0, "addr", "del", address, "dev", "eth0"]);
        drop_it(&keeper, &vip);
        settled(&keeper);
        assert_eq!(keeper.state(), State::default(), "and forgotten");
    }
}
