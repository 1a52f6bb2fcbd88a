//! Servers that say what they like, to a proxy that logs in to them, and that lends them to its clients.
//!
//! Beside bytes of any kind there is a server by the book, which answers what the proxy asks of it; so a conversation goes
//! deep before it goes wrong. What must be true:
//!
//! - the proxy is in only at a server that has proven that it knows the verifier, and tells no server anything but its
//!   name and its proof;
//! - whatever a client hears was said by the server that it had at that moment, in that order, or is one of the few answers of
//!   the proxy's own; it hears no more answers than it has asked questions;
//! - a server is given to the next client only between two messages, and, if it is honest, when it owes nothing;
//! - who shares servers by statement is told of no transaction that is open;
//! - what a server reads are whole messages of a client, and never its farewell; with a server of its own they are
//!   exactly the client's;
//! - with a server of its own the same comes out however the bytes are cut;
//! - when nothing is under way, what the proxy holds does not depend on how often anything was said.

use super::Target;
use crate::input::Input;
use crate::random::Random;
use crate::reached::{Reached, Says};

mod login;
mod sessions;

pub const TARGET: Target = Target {
    name: "hostile-server",
    planted: "a server is given away at its first ReadyForQuery",
    messages: &[
        (Says::Server, b"123ACDEGHIKNSTVWZcdnstv"),
        (Says::Request, &[0, 2, 3, 5, 7, 8, 9, 10, 11, 12]),
    ],
    make,
    run,
};

/// What is said in one execution at most.
const MAX_SENT_BYTES: usize = 16 << 10;

fn make(random: &mut Random) -> Input {
    let mode = random.byte();
    match mode % 4 {
        0 => Input { mode, parts: login::make(random) },
        _ => Input { mode, parts: sessions::make(mode, random) },
    }
}

fn run(input: &Input, planted: bool, reached: &mut Reached) -> Result<(), String> {
    if input.mode.is_multiple_of(4) {
        return login::run(input, reached);
    }
    sessions::run(input, planted, reached)
}
