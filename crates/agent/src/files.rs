//! The files that people write: `herd.toml` and `agent.toml`, from their text to values and back.
//!
//! Texts come in, values or findings go out; which file is read, and when, is the caller's business. Rules
//! between values are `core::spec`'s, and are told here with the line that broke them. Every mistake is told
//! at once, each with its place, and a key that this version does not implement is refused.
//!
//! Hazard: a key that is taken and has no effect. Its author believes that it holds.

pub mod agent;
pub mod finding;
pub mod herd;
pub mod proxy;
pub mod repository;

mod duration;
mod reader;

pub use finding::{Finding, Findings, Severity};
