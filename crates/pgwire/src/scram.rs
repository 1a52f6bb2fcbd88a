//! SCRAM-SHA-256 and -PLUS (RFC 5802, RFC 7677), both sides, as PostgreSQL speaks them (`auth-scram.c`, `fe-auth-scram.c`).
//!
//! A proxy is the server of its client and a client of its server, and knows no password. It asks the client for a proof
//! against the [`Verifier`] that PostgreSQL stores. A right proof reveals the client's key; with that and the server's key
//! from the verifier the proxy logs in to the server in the client's name, for as long as the password stays the same.
//!
//! Pure: nonces come from the caller, who takes them from a cryptographic source and uses each once. Everything from
//! the other side has a bounded length, since the frame around it has, and is looked at once.
//!
//! Leaves out: the SASL messages around it, SASLprep (a [`Password`] is one that it leaves as it is), where verifiers come
//! from. Hazard: whoever passes
//! here without the password is in; and an answer that differs for users who do not exist tells who does
//! ([`Verifier::of_nobody`]).

use std::fmt;
use std::num::NonZeroU32;

use aws_lc_rs::{constant_time, digest, hmac, pbkdf2};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::SqlState;

pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";
const KEY_BYTES: usize = 32;
/// What PostgreSQL takes when it is not told otherwise (`scram_iterations`).
const ITERATIONS: u32 = 4096;
const SALT_BYTES: usize = 16;
/// Of a password, that a server may ask for: some hundred milliseconds. PostgreSQL's `scram_iterations` goes up to 2147483647,
/// which would be minutes that anybody in a server's place could have (CVE-2026-42198).
pub const MAX_ITERATIONS: u32 = 600_000;
/// Far more than any driver sends (libpq: 24). Without a limit a client would choose the length of our answer.
const MAX_NONCE_BYTES: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScramError {
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// Somebody between the two may have removed the offer of the stronger mechanism.
    #[error("the client thinks that the server has no channel binding, and it was offered")]
    Downgraded,
    #[error("the channel binding does not fit this connection")]
    Binding,
    #[error("the password does not match")]
    WrongProof,
    #[error("the server asks for {found} iterations, and {MAX_ITERATIONS} are made at most")]
    TooManyIterations { found: u32 },
    /// The password was changed on the server since these keys were won.
    #[error("the server has another password than the one that the client proved")]
    KeysOutOfDate,
    #[error("the server refused: {0}")]
    Refused(String),
    #[error("the server could not prove that it knows the password")]
    WrongServer,
}

impl ScramError {
    /// What PostgreSQL reports for it; of the client's side, what the proxy does.
    pub fn sqlstate(&self) -> SqlState {
        match self {
            ScramError::Malformed(_) | ScramError::Downgraded | ScramError::TooManyIterations { .. } => {
                SqlState::PROTOCOL_VIOLATION
            }
            ScramError::WrongProof => SqlState::INVALID_PASSWORD,
            ScramError::Binding
            | ScramError::KeysOutOfDate
            | ScramError::Refused(_)
            | ScramError::WrongServer => SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        }
    }
}

type Result<T> = std::result::Result<T, ScramError>;

/// Worth as much as a password. Compared in constant time, and never shown.
#[derive(Clone)]
pub struct Key([u8; KEY_BYTES]);

impl Key {
    fn hmac(&self, message: &str) -> [u8; KEY_BYTES] {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.0), message.as_bytes());
        array(tag.as_ref()).expect("SHA-256 gives 32 bytes")
    }

    fn hash(&self) -> Key {
        Key(array(digest::digest(&digest::SHA256, &self.0).as_ref()).expect("SHA-256 gives 32 bytes"))
    }

    fn xor(&self, other: &[u8; KEY_BYTES]) -> Key {
        Key(std::array::from_fn(|at| self.0[at] ^ other[at]))
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

fn array(bytes: &[u8]) -> Option<[u8; KEY_BYTES]> {
    bytes.try_into().ok()
}

/// What PostgreSQL stores of a password (`pg_authid.rolpassword`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verifier {
    salt: Vec<u8>,
    iterations: u32,
    stored: Key,
    server: Key,
}

impl Verifier {
    /// `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`. `None` for anything else, such as an md5 hash.
    pub fn parse(text: &str) -> Option<Verifier> {
        let (iterations, rest) = text.strip_prefix("SCRAM-SHA-256$")?.split_once(':')?;
        let (salt, keys) = rest.split_once('$')?;
        let (stored, server) = keys.split_once(':')?;
        let key = |text: &str| Some(Key(array(&BASE64.decode(text).ok()?)?));
        Some(Verifier {
            salt: BASE64.decode(salt).ok().filter(|salt| !salt.is_empty())?,
            iterations: number(iterations)?,
            stored: key(stored)?,
            server: key(server)?,
        })
    }

    /// For a user who does not exist or has no such password: the exchange looks like any other one, always with the same
    /// salt for the same user and `secret`, and no proof is right.
    pub fn of_nobody(user: &str, secret: &[u8; KEY_BYTES]) -> Verifier {
        let secret = Key(*secret);
        let mut salt = secret.hmac(&format!("salt of {user}")).to_vec();
        salt.truncate(SALT_BYTES);
        // Nobody knows what hashes to this.
        let stored = Key(secret.hmac(&format!("stored key of {user}")));
        let server = Key(secret.hmac(&format!("server key of {user}")));
        Verifier { salt, iterations: ITERATIONS, stored, server }
    }

    /// A secret for [`Verifier::of_nobody`] from what is stored of somebody's password: whoever knows that may know who exists.
    pub fn secret_from(stored: &str) -> [u8; KEY_BYTES] {
        let key = Key(array(digest::digest(&digest::SHA256, stored.as_bytes()).as_ref())
            .expect("SHA-256 gives 32 bytes"));
        key.hmac("of those who do not exist")
    }
}

/// What a right proof is worth: the login to a server that stores the same verifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientKeys {
    client: Key,
    server: Key,
    salt: Vec<u8>,
    iterations: u32,
}

/// A password. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// `None` unless it is printable ASCII: anything else SASLprep may change, and the proof would be of another password.
    pub fn new(text: &str) -> Option<Password> {
        let is_plain = !text.is_empty() && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
        is_plain.then(|| Password(text.to_owned()))
    }

    fn keys(&self, salt: Vec<u8>, iterations: u32) -> Result<ClientKeys> {
        let count = NonZeroU32::new(iterations).filter(|count| count.get() <= MAX_ITERATIONS);
        let count = count.ok_or(ScramError::TooManyIterations { found: iterations })?;
        let mut salted = [0; KEY_BYTES];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, count, &salt, self.0.as_bytes(), &mut salted);
        let salted = Key(salted);
        let (client, server) = (Key(salted.hmac("Client Key")), Key(salted.hmac("Server Key")));
        Ok(ClientKeys { client, server, salt, iterations })
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

/// What a client proves with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    Keys(ClientKeys),
    Password(Password),
}

impl From<ClientKeys> for Proof {
    fn from(keys: ClientKeys) -> Proof {
        Proof::Keys(keys)
    }
}

/// What binds an exchange to the TLS connection that it goes over: `tls-server-end-point` (RFC 5929), the hash of the
/// server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding<'a> {
    /// No TLS, or nothing known of the certificate.
    Impossible,
    /// The server offers it, and the client chose a mechanism without.
    Offered,
    /// The client chose SCRAM-SHA-256-PLUS.
    To(&'a [u8]),
}

/// The server's side, from its first answer on.
#[derive(Debug)]
pub struct Server {
    verifier: Verifier,
    /// What the client's second message must repeat: its first header, and the certificate's hash.
    header: Vec<u8>,
    nonce: String,
    client_first_bare: String,
    server_first: String,
}

impl Server {
    /// Reads the client's first message; returns the answer to send. `nonce`: printable, without a comma, never used before.
    pub fn start(
        verifier: Verifier,
        client_first: &[u8],
        binding: Binding<'_>,
        nonce: &str,
    ) -> Result<(Server, String)> {
        let message = text(client_first)?;
        let (flag, rest) = message.split_once(',').ok_or(ScramError::Malformed("no binding flag"))?;
        let mut header = Vec::new();
        match (flag, binding) {
            ("n", Binding::To(_)) => {
                return Err(ScramError::Malformed("SCRAM-SHA-256-PLUS without channel binding"));
            }
            ("y", Binding::Offered | Binding::To(_)) => return Err(ScramError::Downgraded),
            ("n", _) | ("y", Binding::Impossible) => {}
            ("p=tls-server-end-point", Binding::To(hash)) => header.extend_from_slice(hash),
            ("p=tls-server-end-point", _) => {
                return Err(ScramError::Malformed("channel binding without SCRAM-SHA-256-PLUS"));
            }
            (other, _) if other.starts_with("p=") => {
                return Err(ScramError::Malformed("a channel binding other than tls-server-end-point"));
            }
            _ => return Err(ScramError::Malformed("an unknown binding flag")),
        }
        let (authorization, bare) = rest.split_once(',').ok_or(ScramError::Malformed("no identity"))?;
        if !authorization.is_empty() {
            return Err(ScramError::Malformed("another identity than the user's own is not supported"));
        }
        header.splice(0..0, format!("{flag},,").into_bytes());

        let mut attributes = bare.split(',');
        // PostgreSQL's user is the one of the startup packet; what is named here does not count.
        attribute(attributes.next(), 'n')?;
        let theirs = attribute(attributes.next(), 'r')?;
        if !is_nonce(theirs) {
            return Err(ScramError::Malformed("a nonce that is empty, too long or not printable"));
        }
        let nonce = format!("{theirs}{nonce}");
        let salt = BASE64.encode(&verifier.salt);
        let server_first = format!("r={nonce},s={salt},i={}", verifier.iterations);
        let client_first_bare = bare.to_owned();
        let server =
            Server { verifier, header, nonce, client_first_bare, server_first: server_first.clone() };
        Ok((server, server_first))
    }

    /// Reads the client's second message. A right proof gives the last message to send, and the client's keys.
    pub fn finish(self, client_final: &[u8]) -> Result<(String, ClientKeys)> {
        let message = text(client_final)?;
        let (without_proof, proof) =
            message.rsplit_once(",p=").ok_or(ScramError::Malformed("no proof at its end"))?;
        let proof = BASE64.decode(proof).ok().and_then(|proof| array(&proof));
        let proof = proof.ok_or(ScramError::Malformed("a proof that is none"))?;
        let mut attributes = without_proof.split(',');
        let header = BASE64.decode(attribute(attributes.next(), 'c')?);
        if header.ok().as_deref() != Some(&self.header) {
            return Err(ScramError::Binding);
        }
        if attribute(attributes.next(), 'r')? != self.nonce {
            return Err(ScramError::Malformed("another nonce than was agreed on"));
        }
        let Verifier { salt, iterations, stored, server } = self.verifier;
        let exchange = format!("{},{},{without_proof}", self.client_first_bare, self.server_first);
        let client = Key(proof).xor(&stored.hmac(&exchange));
        if client.hash() != stored {
            return Err(ScramError::WrongProof);
        }
        let answer = format!("v={}", BASE64.encode(server.hmac(&exchange)));
        Ok((answer, ClientKeys { client, server, salt, iterations }))
    }
}

/// The client's side.
#[derive(Debug)]
pub struct Client {
    proof: Proof,
    header: Vec<u8>,
    nonce: String,
    /// Set when the proof is sent.
    expected: Option<Key>,
}

impl Client {
    /// Returns the first message to send. `nonce` as for [`Server::start`].
    pub fn start(proof: impl Into<Proof>, binding: Binding<'_>, nonce: &str) -> (Client, String) {
        let flag = match binding {
            Binding::Impossible => "n",
            Binding::Offered => "y",
            Binding::To(_) => "p=tls-server-end-point",
        };
        let mut header = format!("{flag},,").into_bytes();
        if let Binding::To(hash) = binding {
            header.extend_from_slice(hash);
        }
        let first = format!("{flag},,n=,r={nonce}");
        (Client { proof: proof.into(), header, nonce: nonce.to_owned(), expected: None }, first)
    }

    /// Reads the server's first message; returns the proof to send.
    pub fn prove(&mut self, server_first: &[u8]) -> Result<String> {
        let message = text(server_first)?;
        let mut attributes = message.split(',');
        let nonce = attribute(attributes.next(), 'r')?;
        let theirs = nonce.strip_prefix(self.nonce.as_str());
        if !theirs.is_some_and(is_nonce) {
            return Err(ScramError::Malformed("a nonce that does not go on with ours"));
        }
        let salt = BASE64.decode(attribute(attributes.next(), 's')?);
        let salt = salt.map_err(|_| ScramError::Malformed("a salt that is none"))?;
        let iterations = number(attribute(attributes.next(), 'i')?);
        let iterations = iterations.ok_or(ScramError::Malformed("a number of iterations that is none"))?;
        if attributes.next().is_some() {
            return Err(ScramError::Malformed("something behind its end"));
        }
        let keys = match &self.proof {
            Proof::Keys(keys) if keys.salt == salt && keys.iterations == iterations => keys.clone(),
            Proof::Keys(_) => return Err(ScramError::KeysOutOfDate),
            Proof::Password(password) => password.keys(salt, iterations)?,
        };
        let without_proof = format!("c={},r={nonce}", BASE64.encode(&self.header));
        let exchange = format!("n=,r={},{message},{without_proof}", self.nonce);
        self.expected = Some(Key(keys.server.hmac(&exchange)));
        let proof = keys.client.xor(&keys.client.hash().hmac(&exchange));
        Ok(format!("{without_proof},p={}", BASE64.encode(proof.0)))
    }

    /// Reads the server's last message: without this anybody could be the server.
    pub fn finish(self, server_final: &[u8]) -> Result<()> {
        let message = text(server_final)?;
        if let Some(why) = message.strip_prefix("e=") {
            // One word of RFC 5802; whatever else it is, it goes into logs.
            return Err(ScramError::Refused(why.chars().take(64).filter(|c| !c.is_control()).collect()));
        }
        let signature = message.strip_prefix("v=").ok_or(ScramError::Malformed("no signature"))?;
        let signature = BASE64.decode(signature).ok().and_then(|bytes| array(&bytes)).map(Key);
        let signature = signature.ok_or(ScramError::Malformed("a signature that is none"))?;
        if self.expected.as_ref() == Some(&signature) { Ok(()) } else { Err(ScramError::WrongServer) }
    }
}

fn text(bytes: &[u8]) -> Result<&str> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(ScramError::Malformed("not a text")),
    }
}

/// The value of the attribute that has to stand here.
fn attribute(found: Option<&str>, name: char) -> Result<&str> {
    let found = found.unwrap_or_default();
    if found.starts_with("m=") {
        return Err(ScramError::Malformed("a mandatory extension, and none is supported"));
    }
    let value = found.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
    value.ok_or(ScramError::Malformed(match name {
        'n' => "no user name (n=)",
        'r' => "no nonce (r=)",
        's' => "no salt (s=)",
        'i' => "no number of iterations (i=)",
        _ => "no channel binding (c=)",
    }))
}

fn is_nonce(text: &str) -> bool {
    (1..=MAX_NONCE_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A positive number without sign or leading zeros' tricks.
fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| digits && *number > 0)
}

#[cfg(test)]
mod tests;
