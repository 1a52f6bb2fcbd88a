//! Real clusters on network-namespace hosts, real faults, and workloads that check themselves.
//!
//! | module | one sentence |
//! |---|---|
//! | [`net`] | hosts in network namespaces, and what goes wrong between them |
//! | [`process`], [`cgroup`], [`volume`] | what goes wrong on a host: killed, frozen, starved, out of space |
//! | [`herd`] | a herd of the product on these hosts, operated by its command line |
//! | [`chaos`] | faults for a herd, drawn from a seed |
//! | [`workload`] | clients that write what can be checked, and keep book in a [`history`] |
//! | [`checker`] | judges a history against what the nodes hold in the end |
//! | [`handover`] | clients of one address, while the primary behind it changes |
//! | [`whereabouts`] | which hosts have an address, and when |
//! | [`connection`] | one connection, and what is certain about the outcome of a statement |
//! | [`plain`] | PostgreSQL without a herd, failed over by hand: the floor of the benchmarks |
//! | [`port`] | a free port of the machine itself, for benchmarks |
//! | [`measure`] | rounds of a benchmark, and what they are worth |
//! | [`alone`](mod@alone) | one cluster at a time on a machine |
//! | [`wait`] | the only way to wait: for a condition, with a deadline |
//!
//! This is an assertion library. A step that cannot be carried out, a fault that was not injected or a
//! condition that does not come about is the failure of the test, so it panics, with the place in the test.
//! Only what a checker finds in a history is a value: its verdict is the subject, not an accident.
//!
//! It knows the product by its command line and JSON alone, as any user does, and never by its code: a
//! mistake in shared code would be invisible here.
//!
//! Needs root, PostgreSQL's server programs, iproute2, iptables, `/dev/net/tun` and a user `postgres`.

pub mod alone;
mod background;
mod bucket;
pub mod cgroup;
pub mod chaos;
pub mod checker;
pub mod command;
pub mod connection;
pub mod handover;
pub mod herd;
pub mod history;
pub mod measure;
pub mod net;
pub mod plain;
pub mod port;
pub mod process;
pub mod random;
mod shm;
pub mod volume;
pub mod wait;
pub mod whereabouts;
pub mod workload;

pub use alone::alone;
pub use checker::Verdict;
pub use connection::{Answer, Cause, Login, Session};
pub use herd::Herd;
pub use history::History;
pub use net::{CLIENT, Host, Net};
pub use plain::Plain;
pub use wait::wait_until;
pub use whereabouts::Whereabouts;
pub use workload::{Endpoint, Plan, Workload};
