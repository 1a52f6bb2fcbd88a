//! What other programs depend on: the JSON contract of `status` and the pages of the error codes.

#![allow(clippy::unwrap_used, reason = "all of this is tests, their shared functions too")]

mod errors;
mod schema;
