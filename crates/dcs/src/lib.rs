//! Where agreement lives: a small store of keys with compare-and-set, confirmation and watch.
//!
//! # The contract
//!
//! A [`Store`] holds at most ten thousand small values under text keys; what they mean is its callers'
//! business. It offers five things, over embedded Raft ([`RaftStore`]), in memory for tests ([`Memory`]), and
//! each in a form that etcd has as well:
//!
//! | operation | promise |
//! |---|---|
//! | [`read`](Store::read) | linearizable; all keys of one read at one moment |
//! | [`commit`](Store::commit) | all checks hold, then all writes happen at one new [`Revision`], or none |
//! | [`confirm`](Store::confirm) | linearizable answer whether a key is still at a revision; writes nothing |
//! | [`watch`](Store::watch) | what has arrived here: maybe stale, never going back, the last state not missed |
//! | [`health`](Store::health) | who leads, who belongs, who answers, why this member stopped |
//!
//! Every call that may wait takes a timeout and keeps it. A commit has four ways not to succeed: a check
//! failed ([`CommitError::Conflict`]); it can never succeed (`Refused`); it did not happen (`Unavailable`);
//! nobody knows (`Unknown`). Only after the last must the caller read before it goes on; a retry inside the
//! call never applies twice.
//!
//! A lease that rests on `confirm` or `commit` is counted from **before** the call: the answer proves that no
//! other state was agreed on at some moment after the question, not at the moment of the answer. Nothing in
//! this crate reads a clock to decide what is true, except that a Raft leader which has heard from no
//! majority for an election time refuses new commits early; correctness does not rest on it.
//!
//! # Life of a Raft member
//!
//! The agent gives a [`Transport`] for calls to other members, and passes what it receives to
//! [`RaftStore::handle`], with the name in the caller's certificate.
//!
//! * The founder: [`RaftStore::create`], once in the life of a herd.
//! * Everybody else joins in three steps. [`RaftStore::prepare`] makes the directory and a [`JoinRequest`];
//!   any member takes it to [`RaftStore::add_member`] and gets a [`Joined`] back; [`RaftStore::join`] opens
//!   the directory with it. Each step can be repeated after a crash: [`RaftStore::inspect`] says how far a
//!   directory has come.
//! * After that, [`RaftStore::open`]. It never begins a store, whatever the directory holds.
//! * A joined member learns and does not vote. [`RaftStore::arrange`], called by every agent over and over
//!   with the order of the herd file, makes the right ones vote: see [`choose_voters`].
//! * [`RaftStore::transfer_leadership`] moves the Raft leader, [`RaftStore::remove_member`] ends a membership
//!   for good, [`RaftStore::shutdown`] stops a member and frees its directory.
//!
//! A member's number is the log index of its join and is bound to a random number on its disk. A directory
//! that lost its contents has another one, so it is nobody until it joins again, under a new number; its old
//! one is removed then. Members refuse each other's calls unless herd, generation of the store, number and
//! disk all agree.
//!
//! When the disk fails, the member stops for good until it is opened again, and [`Health::failed`] says why;
//! nothing here takes the process down.
//!
//! # Logs
//!
//! openraft logs every failed call and many steps of its own at WARN and above. This crate says once what an
//! operator needs (leader, members, who does not answer, failure), so a program that uses it silences
//! `openraft`: [`QUIET`] has the directive.
//!
//! # What is absent
//!
//! Election rules, leases and everything else about PostgreSQL (`core`), connections and certificates (the
//! agent). Recovery from the loss of a majority has its place in the generation that every call carries.

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

/// For the filter of `tracing`: openraft's own lines are for its developers.
pub const QUIET: &str = "openraft=off";
