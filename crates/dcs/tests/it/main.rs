//! The stores as their users meet them: through `Store` and `RaftStore` alone.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests as well")]

mod conformance;
mod herd;
mod members;
mod partitions;
mod restarts;
