//! What is fuzzed, and what must be true of it whatever comes.

use crate::input::Input;
use crate::random::Random;
use crate::reached::{Reached, Says};

pub mod authentication;
pub mod framing;
pub mod hostile_server;
pub mod startup;

pub struct Target {
    pub name: &'static str,
    /// The bug that can be planted.
    pub planted: &'static str,
    /// What must be reached: letters of [`crate::reached::MESSAGES`].
    pub messages: &'static [(Says, &'static [u8])],
    /// A conversation that is mostly good.
    pub make: fn(&mut Random) -> Input,
    /// Tries one; an error is a finding.
    pub run: fn(&Input, planted: bool, &mut Reached) -> Result<(), String>,
}

pub const ALL: &[Target] =
    &[startup::TARGET, authentication::TARGET, framing::TARGET, hostile_server::TARGET];

pub fn named(name: &str) -> Option<&'static Target> {
    ALL.iter().find(|target| target.name == name)
}
