//! The five characters that say what kind of error an ErrorResponse reports.
//!
//! Leaves out the list of all codes: only those are here that this crate attaches to its own refusals.
//! Hazard: a code that was never checked would travel to clients as part of a message, so a value of the type
//! is always five digits or capitals.

use std::fmt;

/// An SQLSTATE, manual appendix A.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SqlState([u8; 5]);

impl SqlState {
    pub const PROTOCOL_VIOLATION: SqlState = SqlState(*b"08P01");
    pub const FEATURE_NOT_SUPPORTED: SqlState = SqlState(*b"0A000");
    pub const INVALID_AUTHORIZATION_SPECIFICATION: SqlState = SqlState(*b"28000");
    pub const INVALID_PASSWORD: SqlState = SqlState(*b"28P01");
    pub const PROGRAM_LIMIT_EXCEEDED: SqlState = SqlState(*b"54000");
    pub const OUT_OF_MEMORY: SqlState = SqlState(*b"53200");
    pub const TOO_MANY_CONNECTIONS: SqlState = SqlState(*b"53300");
    pub const CONNECTION_FAILURE: SqlState = SqlState(*b"08006");
    pub const TRANSACTION_RESOLUTION_UNKNOWN: SqlState = SqlState(*b"08007");
    pub const INVALID_PARAMETER_VALUE: SqlState = SqlState(*b"22023");
    pub const SERIALIZATION_FAILURE: SqlState = SqlState(*b"40001");
    pub const IDLE_IN_TRANSACTION_SESSION_TIMEOUT: SqlState = SqlState(*b"25P03");
    pub const TRANSACTION_TIMEOUT: SqlState = SqlState(*b"25P04");
    pub const QUERY_CANCELED: SqlState = SqlState(*b"57014");
    pub const IDLE_SESSION_TIMEOUT: SqlState = SqlState(*b"57P05");
    pub const ADMIN_SHUTDOWN: SqlState = SqlState(*b"57P01");
    pub const CANNOT_CONNECT_NOW: SqlState = SqlState(*b"57P03");

    /// `None` unless the text is five digits or capital letters.
    pub fn new(text: &[u8]) -> Option<SqlState> {
        let code: [u8; 5] = text.try_into().ok()?;
        let fits = code.iter().all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase());
        fits.then_some(SqlState(code))
    }

    pub fn as_bytes(&self) -> &[u8; 5] {
        &self.0
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{}", char::from(*byte)))
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_five_digits_or_capitals() {
        assert_eq!(SqlState::new(b"08P01"), Some(SqlState::PROTOCOL_VIOLATION));
        for wrong in [&b""[..], b"0800", b"080011", b"08p01", b"08\x0001", b"08 01"] {
            assert_eq!(SqlState::new(wrong), None, "{wrong:?}");
        }
    }
}
