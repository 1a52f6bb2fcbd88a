//! The stores as their users meet them: through `Store` and `RaftStore` alone.

mod conformance;
mod herd;
mod members;
mod partitions;
mod restarts;
