//! What the proxy makes of a server that lets it in, or does not.
//!
//! How it comes in is [`pgherd_pgwire::login`], the mirror of [`crate::login`]: it knows no password, and proves with the keys
//! that the client's own proof revealed.
//!
//! Leaves out: sockets and TLS, timeouts. Hazard: of what a server says before it has proven itself only an error's texts
//! reach the client.

use std::sync::Arc;

use pgherd_pgwire::SqlState;
use pgherd_pgwire::login;

use crate::settings::Shelf;

/// What a server said of itself and of the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// In their order, each once. Clients remember what they were told, which most often is the same for all.
    pub parameters: Arc<Vec<(Vec<u8>, Vec<u8>)>>,
    pub pid: u32,
    pub key: Vec<u8>,
    /// The parameters are where all that are equal are.
    is_shelved: bool,
}

impl Welcome {
    /// The parameters, from now on where all that are equal are.
    pub fn shelved(&mut self, shelf: &Shelf<Vec<(Vec<u8>, Vec<u8>)>>) -> &Arc<Vec<(Vec<u8>, Vec<u8>)>> {
        if !std::mem::replace(&mut self.is_shelved, true) {
            self.parameters = shelf.one(Arc::clone(&self.parameters));
        }
        &self.parameters
    }

    /// A parameter has this value from now on. `false`: there are too many.
    #[must_use]
    pub fn note(&mut self, name: &[u8], value: &[u8]) -> bool {
        if self.parameters.iter().any(|(known, is)| known == name && is == value) {
            return true;
        }
        self.is_shelved = false;
        login::note(Arc::make_mut(&mut self.parameters), name, value)
    }
}

impl From<login::Welcome> for Welcome {
    fn from(said: login::Welcome) -> Welcome {
        Welcome { parameters: Arc::new(said.parameters), pid: said.pid, key: said.key, is_shelved: false }
    }
}

/// Why a server did not let the proxy in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotIn {
    #[error(transparent)]
    Login(#[from] login::NotIn),
    /// For whoever carries the bytes.
    #[error("{0}")]
    Unreachable(String),
}

impl NotIn {
    /// The same will not be said of the next attempt, or not by the next primary.
    pub fn passes(&self) -> bool {
        match self {
            // Starting, stopping, recovering; out of connections, memory or disk; connections that fail.
            NotIn::Login(login::NotIn::Refused { sqlstate, .. }) => {
                let class = &sqlstate.as_bytes()[..2];
                *sqlstate == SqlState::CANNOT_CONNECT_NOW
                    || *sqlstate == SqlState::ADMIN_SHUTDOWN
                    || class == b"53"
                    || class == b"08"
            }
            NotIn::Unreachable(_) => true,
            NotIn::Login(_) => false,
        }
    }

    /// No line of its hba file lets this client in: also what a server says that an agent has closed to clients a moment ago,
    /// before the table that tells of it has come.
    pub fn is_shut_out(&self) -> bool {
        let refused = SqlState::INVALID_AUTHORIZATION_SPECIFICATION;
        matches!(self, NotIn::Login(login::NotIn::Refused { sqlstate, .. }) if *sqlstate == refused)
    }
}

#[cfg(test)]
mod tests;
