//! Passwords: kept out of logs, errors and statements.

use std::fmt;

/// A password. Prints as nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// A fresh one: 160 random bits in letters and digits, which need quoting nowhere.
    pub fn random() -> Result<Secret, crate::error::Error> {
        const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
        let mut bytes = [0_u8; 32];
        aws_lc_rs::rand::fill(&mut bytes)
            .map_err(|_| crate::error::Error::Answer { what: "the kernel gave no random bytes".into() })?;
        Ok(Secret(bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()))
    }

    /// For the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What PostgreSQL stores in place of a password: enough to check one, not to be one.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier(String);

impl Verifier {
    /// SCRAM-SHA-256 with a random salt and PostgreSQL's number of iterations.
    pub fn of(secret: &Secret) -> Verifier {
        Verifier(postgres_protocol::password::scram_sha_256(secret.0.as_bytes()))
    }

    /// One that was stored. `None` if it is not a SCRAM-SHA-256 verifier.
    pub fn parse(text: &str) -> Option<Verifier> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (iterations, rest) = rest.split_once(':')?;
        let (salt, keys) = rest.split_once('$')?;
        let (stored, server) = keys.split_once(':')?;
        let base64 = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
        };
        let right = iterations.parse::<u32>().is_ok_and(|n| n >= 4096)
            && [salt, stored, server].into_iter().all(base64);
        right.then(|| Verifier(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_print_themselves() {
        let secret = Secret::random().unwrap();
        assert_eq!(secret.reveal().len(), 32);
        assert_ne!(secret, Secret::random().unwrap());
        let verifier = Verifier::of(&secret);
        let printed = format!("{secret:?} {verifier:?}");
        assert!(!printed.contains(secret.reveal()) && !printed.contains('$'));
        assert_eq!(Verifier::parse(verifier.as_str()), Some(verifier));
        assert_eq!(Verifier::parse("md5d41d8cd98f00b204e9800998ecf8427e"), None);
        assert_eq!(Verifier::parse("SCRAM-SHA-256$4096:'; DROP$x:y"), None);
    }
}
