//! The address that moves with the gate, on this host: taken, announced, renewed, and given up.
//!
//! Who has it and until when is decided by [`pgherd_core::ha::address`]; here is what is done about it. One thread does
//! all of it and nothing else ([`keeper`]), because it alone keeps the privileges that this takes ([`privilege`]): no
//! other thread of the agent has them, and so nothing that the agent starts, PostgreSQL above all, can have them.
//!
//! The address is never put on an interface for good. It has a lifetime in the kernel, which every proof of the term
//! prolongs, so that it goes at the end of the lease whatever has become of this agent. It bears a mark
//! ([`netlink::OURS`]), by which the next life of this agent knows it as its own; one without the mark belongs to
//! somebody else, and is neither taken nor removed.
//!
//! Hazard: an address that stays. A host whose agent is frozen, or dead, goes on answering for it, and clients come to
//! a server that is not the primary any more.

mod announce;
mod arp;
mod keeper;
mod netlink;
mod privilege;
mod sockets;
#[cfg(test)]
mod tests;

pub use keeper::Keeper;
pub(crate) use keeper::{State, Wish};
pub use privilege::renounce;
