//! The agent's listeners over real sockets, with a backend that answers from a list.

#![allow(clippy::unwrap_used, reason = "all of this is tests, their shared functions too")]

mod access;
mod fake;
mod health;
mod herd;
mod join;
mod limits;
mod metrics;
mod peers;
mod round_trip;
mod streams;
