//! The files of people: recorded findings for bad ones, and properties that hold for any.

#![allow(clippy::unwrap_used, reason = "all of this is tests, their shared functions too")]

mod golden;
mod properties;
