//! Keeps base backups and WAL, so that any moment of the past can be restored.
//!
//! This crate holds the repository. It decides nothing about when a backup is taken or deleted (`core`), and starts
//! nothing by itself (the agent); it writes and reads objects, and says what is there.
//!
//! # The promise
//!
//! * Nothing is ever overwritten. Every object is put once, under the condition that there is none of its name ([`store`]).
//! * What is said to be durable is durable: files are flushed before they have their names, and a backup has a manifest
//!   only when packs, maps and WAL are proven to be there ([`backup`]).
//! * A changed byte is found before it is returned. Frames have the hash of their content, objects that of all they hold,
//!   and manifests have those of the objects (`container`, [`manifest`]).
//! * Nothing that a manifest or a live intent refers to is deleted ([`collect`]).
//! * Absent means absent: an archive that cannot be reached, or is not mounted, is an error of another kind.
//!
//! # Where to begin
//!
//! | module | what it has |
//! |---|---|
//! | [`store`] | objects on a directory or in an object store |
//! | [`name`] | what is where |
//! | [`format`](mod@format), [`keys`], [`seal`] | which repository it is, and how it is encrypted |
//! | [`document`], `container`, `frame` | the two layouts: small objects that people can read, and large ones |
//! | [`pack`], [`map`], [`manifest`] | contents of files, the list of files, the commit point |
//! | [`intent`], [`backup`] | taking a backup |
//! | [`wal`] | the archive, its records, and the recovery window |
//! | [`changed`] | which pages WAL has changed since a backup |
//! | [`receive`] | what becomes of a stream of WAL |
//! | [`voter`] | the repository as a member of the durability rule |
//! | [`recovery`] | from what is wanted back to what has to be restored |
//! | [`keep`], [`tombstone`], [`collect`] | keeping and deleting |
//! | [`foreign`] | what pgBackRest and Barman have kept |
//!
//! The layout of every object is in `docs/reference/repository-format.md`.
//!
//! Left out: PostgreSQL, schedules, retention, commands. Hazard: this is the copy of the data that remains when everything
//! else is lost; a mistake here is noticed on that day.

pub mod backup;
mod breakage;
pub mod changed;
pub mod collect;
mod container;
pub mod document;
pub mod drops;
pub mod foreign;
pub mod format;
pub mod former;
mod frame;
pub mod hash;
pub mod intent;
pub mod keep;
pub mod keys;
pub mod manifest;
pub mod map;
pub mod name;
pub mod pack;
pub mod receive;
pub mod recovery;
pub mod seal;
pub mod store;
pub mod tombstone;
pub mod voter;
pub mod wal;

#[cfg(test)]
mod testing;
