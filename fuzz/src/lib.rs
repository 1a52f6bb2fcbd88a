//! Fuzzes what the proxy decides about bytes: no sockets, no clock, one thread for each execution.
//!
//! [`targets`] says what is fuzzed and what must be true of it; [`engine`] tries, keeps and shrinks; an [`input`] is a
//! conversation in parts; [`reached`] knows the messages of the manual. Everything follows from a seed, so that
//! whatever is found can be had again with what is printed.
//!
//! Own code, and no library: cargo-fuzz and AFL need another compiler than the one that builds the product
//! (sanitizer coverage is not stable), and a conversation of three parties is no array of bytes. What is given up is
//! coverage of branches; messages and states, seen one after the other, stand in for it.
//!
//! Hazard: a second reading that makes the mistake of the first one finds nothing. So each target has a bug planted
//! on purpose, in what it is shown or in what it answers, that must be found.

mod book;
pub mod engine;
pub mod input;
mod memory;
pub mod random;
pub mod reached;
pub mod targets;
mod wire;
