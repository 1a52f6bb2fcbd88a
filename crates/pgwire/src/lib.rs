//! The PostgreSQL wire protocol as bytes and state machines.
//!
//! Responsible for knowing where a message begins and ends ([`frame`]), what opens a connection
//! ([`startup`]), what the few messages mean that somebody between client and server must understand
//! ([`message`]), what a server still owes its client ([`flow`]), how both prove a password to each
//! other ([`scram`], and [`md5`] for old ones), how a client comes in ([`login`]), and what is streamed for replication
//! ([`replication`]). Leaves out sockets, TLS, timers and every decision on what to do with a message:
//! callers bring bytes and take bytes.
//!
//! Hazard: a byte counted wrongly, or an answer taken for complete too early, gives one client the rows of
//! another. So every input is taken for hostile, whichever side it comes from; what PostgreSQL itself would
//! refuse is refused here, and an error ends the connection that it came from.
//!
//! The manual is cited by the sections of PostgreSQL 15, chapter 55; protocol 3.2 by PostgreSQL 18, chapter
//! 54.

pub mod flow;
pub mod frame;
pub mod login;
pub mod md5;
pub mod message;
pub mod replication;
pub mod scram;
pub mod sqlstate;
pub mod startup;

pub use sqlstate::SqlState;

#[cfg(test)]
mod tests;
