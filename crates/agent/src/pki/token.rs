//! One-time join tokens.
//!
//! A token is all that a joining node knows: which authority to believe (a hash), which herd it joins, and a
//! secret that shows it may. The store keeps a record with a hash of the secret. 256 random bits cannot be
//! guessed, so a plain hash is as good as a slow one.
//!
//! "Once" is once per key: whoever repeats a request with the key that used the token (because the answer
//! was lost on the way) gets the same answer again; any other key is refused.

use std::fmt;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use pgherd_api::client::CaPin;
use pgherd_core::types::NodeName;
use serde::{Deserialize, Serialize};

const PREFIX: &str = "pgherd-join-";
const VERSION: u8 = 1;
const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 4;
const FIXED_BYTES: usize = 1 + 32 + 8 + ID_BYTES + SECRET_BYTES;
const MAX_HERD_ID_BYTES: usize = 64;

/// As text it is longer than any token; checked before anything is decoded.
const MAX_TEXT_BYTES: usize = 512;

/// What the text of a token says. Made by [`JoinToken::parse`] on both sides.
#[derive(Clone)]
pub struct JoinToken {
    pub pin: CaPin,
    pub herd_id: String,
    pub expires: Timestamp,
    /// Finds the record in the store.
    pub id: String,
    secret: [u8; SECRET_BYTES],
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("id", &self.id)
            .field("herd_id", &self.herd_id)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// What the store keeps, under its `id`. Its JSON form is stored, and read by later versions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    pub id: String,
    /// SHA-256, hexadecimal.
    secret_hash: String,
    /// Only this node may use it; None: any.
    pub node: Option<NodeName>,
    pub expires_s: i64,
    /// SHA-256 of the public key that used it.
    #[serde(default)]
    used_by: Option<String>,
}

/// Show `text` once, store `record`, forget both.
pub struct IssuedToken {
    pub text: String,
    pub record: TokenRecord,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenMalformed {
    #[error("this is not a join token: those begin with \"{PREFIX}\"")]
    NotAToken,
    #[error("the join token is cut short or has a typing error")]
    Damaged,
    #[error("the join token is of a later version of pgherd")]
    Later,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    #[error("the join token is not one of this herd")]
    Unknown,
    #[error("the join token has expired")]
    Expired,
    #[error("the join token was made for another node")]
    OtherNode,
    #[error("the join token was used before")]
    Used,
}

/// The result of a check that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// Store this record by compare-and-set before the node is told anything.
    First(TokenRecord),
    /// The same key again: answer as before.
    Again,
}

impl JoinToken {
    pub fn issue(
        pin: CaPin,
        herd_id: &str,
        node: Option<NodeName>,
        expires: Timestamp,
    ) -> Result<IssuedToken, aws_lc_rs::error::Unspecified> {
        let mut random = [0; ID_BYTES + SECRET_BYTES];
        aws_lc_rs::rand::fill(&mut random)?;
        let (id, secret) = random.split_at(ID_BYTES);
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&pin.0);
        bytes.extend_from_slice(&expires.as_second().to_be_bytes());
        bytes.extend_from_slice(id);
        bytes.extend_from_slice(secret);
        bytes.extend_from_slice(herd_id.as_bytes());
        bytes.extend_from_slice(&checksum(&bytes));
        let record = TokenRecord {
            id: hex(id),
            secret_hash: hex(digest(&SHA256, secret).as_ref()),
            node,
            expires_s: expires.as_second(),
            used_by: None,
        };
        Ok(IssuedToken { text: format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes)), record })
    }

    pub fn parse(text: &str) -> Result<JoinToken, TokenMalformed> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(TokenMalformed::NotAToken)?;
        if encoded.len() > MAX_TEXT_BYTES {
            return Err(TokenMalformed::Damaged);
        }
        let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| TokenMalformed::Damaged)?;
        match bytes.first() {
            Some(&VERSION) => {}
            Some(version) if *version > VERSION => return Err(TokenMalformed::Later),
            _ => return Err(TokenMalformed::Damaged),
        }
        if bytes.len() < FIXED_BYTES + CHECKSUM_BYTES {
            return Err(TokenMalformed::Damaged);
        }
        let (body, sum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
        if checksum(body) != sum {
            return Err(TokenMalformed::Damaged);
        }
        let mut rest = &body[1..];
        let pin = CaPin(take(&mut rest));
        let expires_s = i64::from_be_bytes(take(&mut rest));
        let id: [u8; ID_BYTES] = take(&mut rest);
        let secret = take(&mut rest);
        let herd_id = String::from_utf8(rest.to_vec()).map_err(|_| TokenMalformed::Damaged)?;
        if herd_id.len() > MAX_HERD_ID_BYTES {
            return Err(TokenMalformed::Damaged);
        }
        let expires = Timestamp::from_second(expires_s).map_err(|_| TokenMalformed::Damaged)?;
        Ok(JoinToken { pin, herd_id, expires, id: hex(&id), secret })
    }
}

impl TokenRecord {
    /// Whether `node`, with the key of its certificate request, may join by `token`. The secret is compared
    /// first and in constant time, so that nothing is learnt about a record without knowing it.
    pub fn check(
        &self,
        token: &JoinToken,
        node: &NodeName,
        request_key_spki: &[u8],
        now: Timestamp,
    ) -> Result<Use, TokenRefused> {
        let shown = hex(digest(&SHA256, &token.secret).as_ref());
        let matches = verify_slices_are_equal(shown.as_bytes(), self.secret_hash.as_bytes()).is_ok();
        if !matches || token.id != self.id {
            return Err(TokenRefused::Unknown);
        }
        let key = hex(digest(&SHA256, request_key_spki).as_ref());
        match &self.used_by {
            Some(user) if *user == key => return Ok(Use::Again),
            Some(_) => return Err(TokenRefused::Used),
            None => {}
        }
        if now.as_second() >= self.expires_s {
            return Err(TokenRefused::Expired);
        }
        if self.node.as_ref().is_some_and(|only| only != node) {
            return Err(TokenRefused::OtherNode);
        }
        Ok(Use::First(TokenRecord { used_by: Some(key), ..self.clone() }))
    }

    /// Records are of no use after this, neither for joining nor for a better error message.
    pub fn may_be_forgotten(&self, now: Timestamp) -> bool {
        const KEPT_AFTER_EXPIRY_S: i64 = 7 * 24 * 60 * 60;
        now.as_second() > self.expires_s.saturating_add(KEPT_AFTER_EXPIRY_S)
    }
}

/// The next `N` bytes. The caller has checked the length of the whole.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (head, tail) = rest.split_first_chunk().expect("the length was checked against FIXED_BYTES");
    *rest = tail;
    *head
}

/// Against typing errors only.
fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash = digest(&SHA256, bytes);
    take(&mut hash.as_ref())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes everything");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"the joiner's public key";

    fn now() -> Timestamp {
        "2026-11-20T20:54:54Z".parse().unwrap()
    }

    fn in_an_hour() -> Timestamp {
        Timestamp::from_second(now().as_second() + 3600).unwrap()
    }

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    fn issue(only: Option<NodeName>) -> (JoinToken, TokenRecord) {
        let issued = JoinToken::issue(CaPin([7; 32]), "4f1c-herd", only, in_an_hour()).unwrap();
        (JoinToken::parse(&issued.text).unwrap(), issued.record)
    }

    #[test]
    fn a_token_says_what_it_was_made_with() {
        let (token, record) = issue(None);
        assert_eq!((token.pin, token.herd_id.as_str()), (CaPin([7; 32]), "4f1c-herd"));
        assert_eq!((token.expires, token.id.as_str()), (in_an_hour(), record.id.as_str()));
    }

    #[test]
    fn neither_record_nor_debug_output_holds_the_secret() {
        let (token, record) = issue(None);
        let stored = serde_json::to_string(&record).unwrap();
        assert!(!stored.contains(&hex(&token.secret)));
        assert!(!format!("{token:?}").contains(&hex(&token.secret)));
        assert!(!format!("{token:?}").contains(&format!("{:?}", token.secret)));
    }

    #[test]
    fn a_token_works_once_but_its_user_may_ask_again() {
        let (token, record) = issue(None);
        let Ok(Use::First(used)) = record.check(&token, &node("b"), KEY, now()) else { panic!("refused") };
        assert_eq!(used.check(&token, &node("b"), KEY, now()), Ok(Use::Again));
        assert_eq!(used.check(&token, &node("b"), b"another key", now()), Err(TokenRefused::Used));
    }

    #[test]
    fn what_is_wrong_is_refused_for_its_own_reason() {
        let (token, record) = issue(Some(node("b")));
        let (other_token, _) = issue(None);
        assert_eq!(record.check(&other_token, &node("b"), KEY, now()), Err(TokenRefused::Unknown));
        assert_eq!(record.check(&token, &node("c"), KEY, now()), Err(TokenRefused::OtherNode));
        assert_eq!(record.check(&token, &node("b"), KEY, in_an_hour()), Err(TokenRefused::Expired));
        let forged = JoinToken { secret: [0; SECRET_BYTES], ..token };
        assert_eq!(record.check(&forged, &node("b"), KEY, in_an_hour()), Err(TokenRefused::Unknown));
    }

    #[test]
    fn every_cut_and_every_flipped_character_is_noticed() {
        let issued = JoinToken::issue(CaPin([7; 32]), "4f1c", None, in_an_hour()).unwrap();
        for length in 0..issued.text.len() {
            assert!(JoinToken::parse(&issued.text[..length]).is_err(), "cut to {length}");
        }
        for at in PREFIX.len()..issued.text.len() {
            let mut text = issued.text.clone().into_bytes();
            text[at] = if text[at] == b'A' { b'B' } else { b'A' };
            let text = String::from_utf8(text).unwrap();
            assert!(JoinToken::parse(&text).is_err(), "flipped at {at}");
        }
        assert_eq!(JoinToken::parse("").unwrap_err(), TokenMalformed::NotAToken);
        assert_eq!(
            JoinToken::parse(&format!("{PREFIX}{}", "A".repeat(1 << 20))).unwrap_err(),
            TokenMalformed::Damaged
        );
        let later = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode([2; 100]));
        assert_eq!(JoinToken::parse(&later).unwrap_err(), TokenMalformed::Later);
    }

    /// A record that an earlier version stored has no `used_by`.
    #[test]
    fn a_record_without_a_user_is_unused() {
        let stored = r#"{"id":"00","secret_hash":"ff","node":null,"expires_s":1}"#;
        let record: TokenRecord = serde_json::from_str(stored).unwrap();
        assert_eq!(record.used_by, None);
    }
}
