//! Hosts: network namespaces joined by one switch, and the faults between them.
//!
//! ```text
//!   client        a           b           c          one namespace each: own loopback, own eth0, own rules
//!     └───────────┴───── switch ───────────┘          one more, with a bridge; nothing touches the machine's own
//! ```
//!
//! Because the switch is a namespace too, a network can neither disturb the machine it runs on nor another
//! network, and ports need not be picked. Each network still has a subnet of its own, so that an address in
//! a log tells which test it belongs to.
//!
//! Names carry the id of the process that made them. Teardown runs on drop, also while a panic unwinds; what a
//! killed run left behind is recognised by its dead id and removed when the next network is made.
//!
//! Hazard: a fault that was not injected makes a test that cannot fail. Each fault is therefore followed by
//! packets that must meet it, and the test fails unless they did (`faults`).

mod faults;
mod leftovers;
mod namespace;
mod slow;

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use faults::{FaultId, Refusal};
pub use slow::Slowness;

use crate::cgroup::{self, Freezer, Starvation};
use crate::command::{HostCommand, give_to_postgres, run};
use crate::process::Process;
use crate::wait::wait_until;
use faults::Faults;
use namespace::Namespace;
use slow::SlowLinks;

/// All names of namespaces, directories and control groups of the kit start with this.
const NAME_PREFIX: &str = "pgh";
/// The host from which workloads come; every network has it.
pub const CLIENT: &str = "client";
/// Linux gives names of interfaces 15 bytes; with the `v` in front this is more than enough for any test.
const HOST_NAME_MAX_BYTES: usize = 12;

/// Some hosts and a client, connected. Dropping it ends everything that runs on them.
#[derive(Debug)]
pub struct Net {
    name: String,
    hosts: Vec<Host>,
    switch: Namespace,
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    faults: Faults,
    slow: SlowLinks,
}

/// One host: its address, its directory, its processes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    address: Ipv4Addr,
    dir: PathBuf,
    namespace: Namespace,
}

impl Net {
    /// Makes the hosts `names` and the client. Needs root.
    pub fn new(names: &[&str]) -> Net {
        assert!(rustix::process::geteuid().is_root(), "network namespaces need root");
        leftovers::remove();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{NAME_PREFIX}{}x{count}", std::process::id());
        let dir = std::env::temp_dir().join(&name);
        std::fs::create_dir(&dir).unwrap_or_else(|error| panic!("cannot make {}: {error}", dir.display()));

        let switch = Namespace::create(&format!("{name}-switch"));
        run("ip", &["-n", switch.name(), "link", "add", "bridge", "type", "bridge", "forward_delay", "0"]);
        run("ip", &["-n", switch.name(), "link", "set", "bridge", "up"]);
        let mut net = Net {
            name,
            hosts: Vec::new(),
            switch,
            dir,
            state: Mutex::new(State { faults: Faults::default(), slow: SlowLinks::default() }),
        };
        let subnet = (std::process::id().wrapping_mul(31).wrapping_add(count)) as u16;
        for (index, host) in [CLIENT].iter().chain(names).enumerate() {
            let last = u8::try_from(index + 1).expect("far fewer hosts than addresses");
            let [high, low] = subnet.to_be_bytes();
            net.add_host(host, Ipv4Addr::new(10, high, low, last));
        }
        net.prove_connected();
        net
    }

    fn add_host(&mut self, name: &str, address: Ipv4Addr) {
        let right =
            name.len() <= HOST_NAME_MAX_BYTES && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        assert!(right, "a host's name is up to {HOST_NAME_MAX_BYTES} letters and digits, not {name:?}");
        assert!(self.hosts.iter().all(|host| host.name() != name), "two hosts are called {name}");
        let namespace = Namespace::create(&format!("{}-{name}", self.name));
        let (switch, inside) = (self.switch.name(), namespace.name());
        let port = format!("v{name}");
        run(
            "ip",
            &["-n", switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", inside],
        );
        run("ip", &["-n", switch, "link", "set", &port, "master", "bridge", "up"]);
        run("ip", &["-n", inside, "addr", "add", &format!("{address}/24"), "dev", "eth0"]);
        run("ip", &["-n", inside, "link", "set", "eth0", "up"]);
        faults::prepare(&namespace);
        let dir = self.dir.join(name);
        std::fs::create_dir(&dir).unwrap_or_else(|error| panic!("cannot make {}: {error}", dir.display()));
        give_to_postgres(&dir);
        self.hosts.push(Host(Arc::new(Inner { name: name.to_owned(), address, dir, namespace })));
    }

    /// The bridge needs a moment until its ports forward.
    fn prove_connected(&self) {
        for host in self.hosts.iter().skip(1) {
            let what = format!("the client to reach {}", host.name());
            wait_until(&what, Duration::from_secs(10), || faults::answers(self.client(), host));
        }
    }

    #[track_caller]
    pub fn host(&self, name: &str) -> &Host {
        self.hosts
            .iter()
            .find(|host| host.name() == name)
            .unwrap_or_else(|| panic!("there is no host {name} in this network"))
    }

    pub fn client(&self) -> &Host {
        &self.hosts[0]
    }

    /// All hosts, the client first.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// An address of this network that no host has.
    pub fn spare_address(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.client().address().octets();
        Ipv4Addr::new(a, b, c, 200)
    }

    /// The smallest CIDR block with all hosts, for `pg_hba.conf`.
    pub fn subnet(&self) -> String {
        let [a, b, c, _] = self.client().address().octets();
        format!("{a}.{b}.{c}.0/24")
    }

    /// A directory for all hosts together, removed at the end.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // Frozen processes do not die, and a network without packets makes clients wait for their timeouts.
        cgroup::remove_everywhere(&format!("{}-", self.name));
        for host in &self.hosts {
            host.0.namespace.destroy();
        }
        self.switch.destroy();
        crate::shm::remove_orphans();
        crate::volume::unmount_below(&self.dir);
        // What stays here is found by the next run; a panic in a drop would hide the failure that matters.
        let _removed = std::fs::remove_dir_all(&self.dir);
    }
}

impl Host {
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn address(&self) -> Ipv4Addr {
        self.0.address
    }

    /// A directory of this host, owned by user postgres, removed with the network.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// A program to run here, as root unless told otherwise.
    pub fn command(&self, program: impl AsRef<OsStr>) -> HostCommand {
        HostCommand::new(self, program.as_ref())
    }

    /// Runs `work` on a thread of its own with this host's network: its sockets are this host's.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.0.namespace.enter(work)
    }

    /// The hardware address of its interface.
    #[track_caller]
    pub fn station(&self) -> String {
        let shown = run("ip", &["-n", self.0.namespace.name(), "-o", "link", "show", "eth0"]);
        let mac = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        mac.unwrap_or_else(|| panic!("{} has no Ethernet: {shown}", self.name())).to_owned()
    }

    /// By which station this host would reach an address of its network, if it remembers one.
    #[track_caller]
    pub fn neighbour(&self, address: Ipv4Addr) -> Option<String> {
        let shown = run("ip", &["-n", self.0.namespace.name(), "neigh", "show", "to", &address.to_string()]);
        shown.split_whitespace().skip_while(|word| *word != "lladdr").nth(1).map(str::to_owned)
    }

    /// Moves the calling thread to this host for the rest of its life.
    pub(crate) fn move_here(&self) {
        self.0.namespace.move_here();
    }

    /// Every process on this host.
    pub fn processes(&self) -> Vec<Process> {
        self.0.namespace.processes()
    }

    /// Stops every process of this host at once, as a hypervisor does, until the value is dropped.
    #[track_caller]
    pub fn freeze(&self) -> Freezer {
        Freezer::freeze(&format!("{}-frozen", self.0.namespace.name()), || self.processes())
    }

    /// Leaves all processes of this host together `percent` of one core, until the value is dropped.
    #[track_caller]
    pub fn starve(&self, percent: u64) -> Starvation {
        Starvation::starve(&format!("{}-starved", self.0.namespace.name()), percent, || self.processes())
    }
}

/// Locks a mutex whose data stays right when a test's assertion fails while it is held.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
