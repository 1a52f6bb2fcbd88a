//! Who may set an address on an interface: one thread, and no process that it or another starts.
//!
//! An agent is given `CAP_NET_ADMIN` and `CAP_NET_RAW` by whoever starts it, as ambient capabilities, which programs
//! that it starts would have in turn. Capabilities are a thread's, so the first thread gives them up, for good, before
//! it starts any other: what descends from it, threads and programs alike, has none.
//!
//! Hazard: a PostgreSQL with these is a superuser's way to the host's network. Order matters in [`renounce`]: a set that
//! is not empty when the second thread starts is inherited.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

const NEEDED: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW);

/// What is missing, in the words of capabilities(7); `None`: this thread may do it.
pub(super) fn missing() -> Option<&'static str> {
    let has = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
    match (has.contains(CapabilitySet::NET_ADMIN), has.contains(CapabilitySet::NET_RAW)) {
        (true, true) => None,
        (false, true) => Some("CAP_NET_ADMIN"),
        (true, false) => Some("CAP_NET_RAW"),
        (false, false) => Some("CAP_NET_ADMIN and CAP_NET_RAW"),
    }
}

/// Keeps the two for this thread alone, and nothing else. What is missing, if that fails.
pub(super) fn keep_for_this_thread() -> Option<&'static str> {
    let sets = CapabilitySets { effective: NEEDED, permitted: NEEDED, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).err().map(|_| "CAP_NET_ADMIN and CAP_NET_RAW")
}

/// Gives the two up for this thread and all that it will ever start. What goes from the inheritable and the permitted
/// set goes from the ambient one by itself.
pub fn renounce() -> io::Result<()> {
    let has = capabilities(None)?;
    let without = |set: CapabilitySet| set.difference(NEEDED);
    let sets = CapabilitySets {
        effective: without(has.effective),
        permitted: without(has.permitted),
        inheritable: without(has.inheritable),
    };
    Ok(set_capabilities(None, sets)?)
}
