//! The fence: a small sibling of the agent that can do one thing, stop PostgreSQL.
//!
//! An agent that is frozen or dead can neither stop its primary nor give its term back; the others would
//! have to wait and would never know. The fence does both for it. It is armed only while this node's
//! PostgreSQL is a primary, by the agent, with all that it will need: whom to kill, by when, and one message
//! signed beforehand that says "stopped, term t". When the deadline passes it kills, sees every process gone,
//! and then sends that message, which is a release of the term.
//!
//! **How the agent shows that it lives.** Its main loop writes a deadline ([`Deadline`], on `CLOCK_BOOTTIME`)
//! into a page of memory that both share, at every turn. Nothing queues up and nothing can block, and a loop
//! that is stuck is noticed even if the rest of its process is well. With acknowledging voters the deadline
//! lies `agent_grace` ahead; under a rule that lets commits go on without any it lies before the end of the
//! lease ([`mod@deadline`]).
//!
//! **An agent that comes back.** The fence listens on a socket in the node's state directory and outlives its
//! agent. A new agent connects there and takes it over: from then on its deadlines count. The fence stays
//! armed meanwhile and nothing is disarmed before the new agent has looked at PostgreSQL. Where nobody
//! answers on the socket, the agent starts a fence; one that accepts and then says nothing is hung and is
//! killed first. So there is one fence at a time, and an agent may die at any point in between.
//!
//! **A suspended host, a frozen container.** When both come back at once, the deadline has passed although the
//! agent is as well as the fence. A fence that notices that it was not running itself gives the agent a
//! moment, once, before it kills; not where the end of the lease set the deadline, because there the agent,
//! too, could do nothing but stop PostgreSQL.
//!
//! After it has killed, a fence sends its message and ends. Whoever comes next starts another.
//!
//! Hazard: a fence that fires without need stops a healthy primary; a message sent before every process is
//! gone lets two primaries be read at once. Nothing here may wait for a disk between the deadline and the
//! kill: no log, no file, no name lookup.

mod deadline;
mod handle;
mod kill;
mod process;
mod received;
mod release;
mod watch;
mod wire;

#[cfg(test)]
mod tests;

pub use deadline::{Deadline, deadline};
pub use handle::{Arming, FenceStatus, Handle, Target};
pub use process::{FenceError, run};
pub use received::{ReceiveError, receive};
