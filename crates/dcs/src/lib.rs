//! Where agreement lives: a small store of keys with compare-and-set, confirmation and watch.
mod memory;
mod raft;
mod state;
mod store;

pub use memory::{Memory, MemoryStore};
pub use raft::{
    Arrangement, Candidate, Config, DiskId, Found, JoinRequest, Joined, MAX_RPC_BYTES, MAX_VOTERS, OpenError,
    RaftStore, Times, Transport, TransportError, choose_voters,
};
pub use store::{
    Check, CommitError, DEFAULT_TIMEOUT, Entry, Health, Keys, Kind, MAX_KEY_BYTES, MAX_KEYS, MAX_OPERATIONS,
    MAX_STORE_BYTES, MAX_TRANSACTION_BYTES, MAX_VALUE_BYTES, MemberHealth, Revision, Role, Snapshot, Store,
    StoreError, Transaction,
};
