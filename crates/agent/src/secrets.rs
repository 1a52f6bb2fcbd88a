//! The herd's generated secrets: made once by the founder, kept in the store, handed to nodes that join.

use std::collections::BTreeMap;

use pgherd_core::spec::HerdSpec;

use crate::agreed::Secrets;
use crate::pki::AuthorityKey;

const AUTHORITY_KEY: &str = "authority_key";
const AUTHORITY: &str = "authority";
/// Characters of a generated password: 32 of a 62-letter alphabet are 190 bits.
const PASSWORD_CHARS: usize = 32;

/// PostgreSQL's roles that the herd itself uses, each with no more rights than its purpose needs.
pub(crate) const SUPERUSER: &str = "postgres";
pub(crate) const REPLICATION: &str = "pgherd_replication";
pub(crate) const REWIND: &str = "pgherd_rewind";
pub(crate) const MONITOR: &str = "pgherd_monitor";

impl Secrets {
    /// A fresh set: the authority, and a password for each role of the herd and each owner of a database.
    pub(crate) fn generate(
        spec: &HerdSpec,
        authority: &str,
        key: &AuthorityKey,
    ) -> Result<Secrets, aws_lc_rs::error::Unspecified> {
        let mut secrets = BTreeMap::from([
            (AUTHORITY.to_owned(), authority.to_owned()),
            (AUTHORITY_KEY.to_owned(), key.expose_pem().to_owned()),
        ]);
        let owners = spec.clusters.iter().flat_map(|cluster| &cluster.databases);
        let owners = owners.map(|database| database.owner.as_str());
        for role in [SUPERUSER, REPLICATION, REWIND, MONITOR].into_iter().chain(owners) {
            if let std::collections::btree_map::Entry::Vacant(missing) = secrets.entry(password_key(role)) {
                missing.insert(password()?);
            }
        }
        Ok(Secrets(secrets))
    }

    pub(crate) fn password(&self, role: &str) -> Option<&str> {
        self.0.get(&password_key(role)).map(String::as_str)
    }

    /// The authority's certificate and key, as PEM.
    pub(crate) fn authority(&self) -> Option<(&str, AuthorityKey)> {
        let key = AuthorityKey::from_pem(self.0.get(AUTHORITY_KEY)?.clone());
        Some((self.0.get(AUTHORITY)?, key))
    }
}

fn password_key(role: &str) -> String {
    format!("password/{role}")
}

fn password() -> Result<String, aws_lc_rs::error::Unspecified> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    // Bytes past the last multiple of the alphabet's length are dropped, so that no letter is likelier.
    let usable = 256 - 256 % ALPHABET.len();
    let mut text = String::with_capacity(PASSWORD_CHARS);
    while text.len() < PASSWORD_CHARS {
        let mut bytes = [0_u8; PASSWORD_CHARS];
        aws_lc_rs::rand::fill(&mut bytes)?;
        let letters = bytes.iter().map(|byte| usize::from(*byte)).filter(|byte| *byte < usable);
        text.extend(letters.map(|byte| char::from(ALPHABET[byte % ALPHABET.len()])));
    }
    text.truncate(PASSWORD_CHARS);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_differ_and_need_no_quoting() {
        let (one, other) = (password().unwrap(), password().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.len(), PASSWORD_CHARS);
        assert!(one.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    }

    #[test]
    fn secrets_are_not_printed() {
        let secrets = Secrets(BTreeMap::from([("password/app".to_owned(), "hunter2".to_owned())]));
        assert!(!format!("{secrets:?}").contains("hunter2"));
    }
}
