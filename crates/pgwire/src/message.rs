//! What messages say: views that borrow from the body, and builders that append to a buffer.
//!
//! [`client`] and [`server`] hold the views, one for each side that sends; [`build`] writes messages. A view
//! is made from a whole body and checks all of it, as PostgreSQL's `pq_getmsg*` functions do: lengths inside
//! the message, terminators, and that nothing is left over. It copies and allocates nothing. Leaves out
//! framing ([`crate::frame`]) and what is allowed when ([`crate::flow`]).
//!
//! Hazard: a text that ends elsewhere than its sender thinks puts words into somebody else's mouth.

use crate::SqlState;

pub mod build;
pub mod client;
pub(crate) mod cursor;
pub mod server;

pub use client::ClientMessage;
pub use server::ServerMessage;

/// A body that is not what its type says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {message} message: {defect}")]
pub struct Malformed {
    pub message: &'static str,
    pub defect: Defect,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    #[error("no data left in message")]
    Short,
    #[error("a text does not end")]
    Unterminated,
    #[error("{bytes} bytes are left over")]
    Trailing { bytes: usize },
    #[error("a value is out of range")]
    Value,
    #[error("unknown type {kind:#04x}")]
    Type { kind: u8 },
}

impl Malformed {
    pub(crate) fn value(message: &'static str) -> Malformed {
        Malformed { message, defect: Defect::Value }
    }

    pub fn sqlstate(&self) -> SqlState {
        SqlState::PROTOCOL_VIOLATION
    }
}

/// The secret that a cancel is recognised by: four bytes, as of protocol 3.2 up to 256 (PostgreSQL 18, 54.7).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key<'a>(&'a [u8]);

impl<'a> Key<'a> {
    pub const MIN_BYTES: usize = 4;
    pub const MAX_BYTES: usize = 256;

    pub fn new(bytes: &'a [u8]) -> Result<Key<'a>, Malformed> {
        let fits = (Key::MIN_BYTES..=Key::MAX_BYTES).contains(&bytes.len());
        fits.then_some(Key(bytes)).ok_or(Malformed::value("key"))
    }

    pub fn as_bytes(&self) -> &'a [u8] {
        self.0
    }
}

/// Whoever knows the key can cancel, so it is not printed.
impl std::fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({} bytes)", self.0.len())
    }
}

/// What Describe and Close are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Statement,
    Portal,
}

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Binary,
}

/// The transaction status in ReadyForQuery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    Idle,
    InTransaction,
    Failed,
}

impl TransactionStatus {
    pub fn from_byte(byte: u8) -> Option<TransactionStatus> {
        match byte {
            b'I' => Some(TransactionStatus::Idle),
            b'T' => Some(TransactionStatus::InTransaction),
            b'E' => Some(TransactionStatus::Failed),
            _ => None,
        }
    }

    pub fn to_byte(self) -> u8 {
        match self {
            TransactionStatus::Idle => b'I',
            TransactionStatus::InTransaction => b'T',
            TransactionStatus::Failed => b'E',
        }
    }
}

#[cfg(test)]
mod tests;
