//! PROVES: a deterministic simulator of a cluster around core.
//!
//! The decisions are the product's own (`pgherd_core`); everything around them is a model, as hostile as the
//! real world and faster: clocks that are wrong by 1 %, a store that lags and loses answers, links that fail
//! in one direction, agents that die between any two steps, servers that promote late, hosts that come
//! back without their disks. One seed decides a whole run, event by event, and prints the same run again.
//!
//! After every step the [`checkers`] compare the world's own books with what must hold. After the
//! faults the world is healed and has to converge. [Breakages](breakage) break one rule each and must be caught.
//!
//! # What is assumed
//!
//! - [`store`]: compare-and-set happens at one moment or not at all; a confirmation is linearizable.
//! - [`deeds`]: each action keeps the contract in `pgherd_core::action`, step by step; what was
//!   made durable survives, and files are synced in the order given there.
//! - [`postgres`] and [`replication`]: flushed WAL survives; a WAL sender sends what is flushed; a stopped process
//!   acknowledges nothing; PostgreSQL compares timelines by number. A disk that is put back to an old image,
//!   or that lies about fsync, is outside.
//! - [`repository`]: what is put stays, and a listing that begins after a put has ended sees it.
//! - [`clients`]: a client that got no answer, or a warning, claims nothing.

pub mod agent;
pub mod breakage;
pub mod checkers;
pub mod clients;
pub mod coverage;
pub mod deeds;
pub mod faults;
pub mod postgres;
pub mod random;
pub mod replication;
pub mod repository;
pub mod schedule;
pub mod script;
pub mod store;
pub mod story;
pub mod wal;
pub mod world;
