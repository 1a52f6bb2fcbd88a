//! Passwords that are stored for md5, both sides (manual 21.5, 55.2.3): what PostgreSQL did before SCRAM.
//!
//! What is stored is all that a login needs, so that whoever has read it once can log in ([`Md5Hash`] is worth a password), and
//! one answer can be replayed when its salt of four bytes comes again. Nothing here makes that better; who takes it is for the
//! caller to decide.
//!
//! Leaves out: the messages around it, where salts come from. Hazard: as for [`crate::scram`].

use std::fmt;

use aws_lc_rs::constant_time;
use md5::{Digest as _, Md5};

/// In hexadecimal digits.
const DIGITS: usize = 32;
const PREFIX: &str = "md5";

/// What PostgreSQL stores: of the password and the name behind it. Never shown.
#[derive(Clone)]
pub struct Md5Hash([u8; DIGITS]);

impl Md5Hash {
    /// `md5` and 32 digits, as PostgreSQL judges it (`get_password_type`).
    pub fn parse(text: &str) -> Option<Md5Hash> {
        let digits = text.strip_prefix(PREFIX)?.as_bytes();
        let are_digits = digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        digits.try_into().ok().filter(|_| are_digits).map(Md5Hash)
    }

    /// The answer to whoever asks with this salt, as it is sent.
    pub fn answer(&self, salt: [u8; 4]) -> Vec<u8> {
        let digest = Md5::new().chain_update(self.0).chain_update(salt).finalize();
        let digits = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let digits = digits.map(|digit| b"0123456789abcdef"[usize::from(digit)]);
        PREFIX.bytes().chain(digits).collect()
    }

    /// In constant time.
    pub fn is_answered(&self, salt: [u8; 4], answer: &[u8]) -> bool {
        constant_time::verify_slices_are_equal(&self.answer(salt), answer).is_ok()
    }
}

impl PartialEq for Md5Hash {
    fn eq(&self, other: &Md5Hash) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for Md5Hash {}

impl fmt::Debug for Md5Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Md5Hash")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `SELECT rolpassword` after `CREATE ROLE alice PASSWORD 'correct horse'` with `password_encryption = md5`.
    const STORED: &str = "md527d601e4766ef321bab4559b3758b31c";

    #[test]
    fn an_answer_is_the_one_that_drivers_give() {
        let hash = Md5Hash::parse(STORED).unwrap();
        for salt in [*b"salt", [0; 4], [255, 0, 17, 128]] {
            let expected = postgres_protocol::authentication::md5_hash(b"alice", b"correct horse", salt);
            assert_eq!(String::from_utf8(hash.answer(salt)).unwrap(), expected);
            assert!(hash.is_answered(salt, expected.as_bytes()));
            assert!(!hash.is_answered([1, 2, 3, 4], expected.as_bytes()));
            assert!(!hash.is_answered(salt, &expected.as_bytes()[..34]) && !hash.is_answered(salt, b""));
            let another = postgres_protocol::authentication::md5_hash(b"alice", b"correct horsf", salt);
            assert!(!hash.is_answered(salt, another.as_bytes()));
        }
        assert_eq!(format!("{hash:?}"), "Md5Hash");
    }

    #[test]
    fn what_is_stored_otherwise_is_none() {
        for text in [
            "",
            "md5",
            &STORED[3..],
            &STORED[..34],
            &format!("{STORED}0"),
            &STORED.to_uppercase(),
            &STORED.replace("md5", "md4"),
            "md5g41d8cd98f00b204e9800998ecf8427e",
            "SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:c2VydmVy",
        ] {
            assert_eq!(Md5Hash::parse(text), None, "{text}");
        }
    }
}
