//! DECIDES what a node of a herd does. The part to read first.
//!
//! # Contract
//!
//! [`ha::decide`] is a pure function of remembered state, `now` and an [`observation::Observation`]. It
//! returns a goal, ordered [`action::Action`]s, one [`reason::Reason`] and the next wake-up. It is called
//! again whenever anything changed, and at the wake-up; it looks at the whole observation and never at what
//! just changed, so a missed or a repeated call is harmless. It never assumes that an earlier action worked:
//! success shows in the next observation.
//!
//! What several nodes must agree on is one [`record::Record`] in the store. It changes only through
//! [`record::Record::apply`], a pure function too, under compare-and-set.
//!
//! Absent here, and checked: I/O, clocks, randomness, threads, async, hash maps (their order is not fixed).
//!
//! # Where to find what
//!
//! - [`record`]: what is agreed, and which changes of it are safe: terms, elections, rules, timelines.
//! - [`ha`]: what is wise: the one function where roles branch, and a module per role.
//! - [`durability`]: which rule the primary should be under, and the steps from one rule to the next.
//! - [`retention`]: which base backups are kept, and which may go.
//! - [`throttle`]: how fast a base backup is read, so that clients do not feel it.
//! - [`reason`]: every sentence that `pgherd explain` can say.
//! - `testdata/`: scenario scripts with recorded decisions; their file names are the manual.

pub mod action;
pub mod durability;
pub mod ha;
pub mod invariants;
pub mod observation;
pub mod reason;
pub mod record;
pub mod retention;
pub mod spec;
pub mod throttle;
pub mod types;
