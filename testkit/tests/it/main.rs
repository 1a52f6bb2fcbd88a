//! The kit tested on itself: every fault does what its name says, and every checker finds what was planted.

#![allow(clippy::unwrap_used, reason = "all of this is tests, their shared functions too")]

mod herd;
mod hosts;
mod net;
mod plain;
mod slow;
