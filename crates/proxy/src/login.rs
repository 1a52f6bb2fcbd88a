//! How a client comes in: from its first byte to the moment at which it has proven who it is.
//!
//! A [`Login`] reads what the client sends and writes the answers. What it cannot know it asks for, one thing at a time:
//! a TLS handshake, what the hba file says of this client, the verifier of a password. It ends in one of four ways: the
//! client is in, it wanted a cancel, it was refused and told why, or it is to be hung up on without a word.
//!
//! Nothing in a startup packet takes effect before the proof: until then it is a list of texts (CVE-2025-12819). A user who
//! does not exist is asked for a proof like any other one; the verifier of nobody makes that look the same.
//!
//! Leaves out: sockets and TLS; the hba file; timeouts; what a server tells its client first (ParameterStatus,
//! BackendKeyData). Hazard: everybody who can reach the port gets this far, and whoever gets through it is trusted.

use bytes::BytesMut;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::frame::{AUTHENTICATION_MESSAGE_BYTES, Phase, Piece, Scanner, Side, Spill};
use pgherd_pgwire::md5::Md5Hash;
use pgherd_pgwire::message::build::{self, Report, Severity};
use pgherd_pgwire::message::client::{SaslInitial, password, sasl_response};
use pgherd_pgwire::scram::{
    self, Binding, ClientKeys, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramError, Verifier,
};
use pgherd_pgwire::startup::{Answer, Opening, Replication, Request, StartupMessage, Version};

/// PostgreSQL's names have no more (`NAMEDATALEN`, less its zero). It cuts what is longer, and so must whoever judges by names:
/// or a line of the hba file that is about `x…x` would not be about `x…xy`, who is the same user.
pub const MAX_NAME_BYTES: usize = 63;

/// Whether clients can have TLS here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// There is no certificate.
    Unavailable,
    Offered,
    /// Whoever does not ask for it is refused.
    Required,
}

/// What a client wants, in its own words, none of which is proven yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub user: String,
    pub database: String,
    pub replication: Replication,
    /// What is spoken with it.
    pub version: Version,
    /// Everything else, in its order: settings for the session, `options` among them.
    pub parameters: Vec<(String, String)>,
}

/// What the hba file says of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// It has shown enough already, such as a certificate.
    Admit,
    ScramSha256,
    /// The same, but for a password that is stored for md5: [`Login::takes_md5`].
    Md5,
    /// With the message that it is told.
    Reject {
        message: String,
    },
}

/// What a client has shown to know, and what opens a server that stores the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    Scram(ClientKeys),
    Md5(Md5Hash),
}

/// What the caller has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read more from the client.
    More,
    /// Send what was written, do the handshake, and call [`Login::encrypted`].
    Handshake,
    /// Call [`Login::method`] with what the hba file says of [`Login::asked`].
    Method,
    /// Call [`Login::verifier`] with what is stored for the user, or with that of nobody; or, if it is stored for md5 and that is
    /// allowed, [`Login::md5`].
    Verifier,
    /// It is in: AuthenticationOk is written.
    In(Option<Keys>),
    /// It wants to cancel what the connection with this key does. Nobody is told whether that exists.
    Cancel { pid: u32, key: Vec<u8> },
    /// Send what was written, and close.
    Refused,
    /// Close. An answer would not be understood.
    HangUp,
}

#[derive(Debug)]
enum Stage {
    Opening,
    Handshake,
    Method,
    Verifier,
    /// The mechanisms were offered.
    Choosing(Verifier),
    /// It chose one and sent nothing with it.
    Starting(Verifier, Mechanism),
    Proving(scram::Server),
    /// It was asked for md5.
    Salted(Md5Hash, [u8; 4]),
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mechanism {
    Plain,
    Plus,
}

#[derive(Debug)]
pub struct Login {
    tls: Tls,
    opening: Opening,
    scanner: Scanner,
    spill: Spill,
    /// The header of a message was read, its body was not.
    has_header: bool,
    stage: Stage,
    encrypted: bool,
    /// `tls-server-end-point`, where the handshake gave it.
    certificate_hash: Option<Vec<u8>>,
    asked: Option<Asked>,
    /// What it was told, when it was refused.
    refused: Option<SqlState>,
    nonce: String,
    takes_md5: bool,
}

impl Login {
    /// `nonce`: printable, without a comma, from a cryptographic source, for this login alone.
    pub fn new(tls: Tls, nonce: String) -> Login {
        Login {
            tls,
            opening: Opening::new(),
            scanner: Scanner::new(Side::Client, Phase::Authentication),
            spill: Spill::new(AUTHENTICATION_MESSAGE_BYTES as usize),
            has_header: false,
            stage: Stage::Opening,
            encrypted: false,
            certificate_hash: None,
            asked: None,
            refused: None,
            nonce,
            takes_md5: false,
        }
    }

    /// What the client asked for; known from [`Step::Method`] on.
    pub fn asked(&self) -> Option<&Asked> {
        self.asked.as_ref()
    }

    /// Why it was refused, if it was.
    pub fn refused(&self) -> Option<SqlState> {
        self.refused
    }

    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// Reads from the front of `input`, which must begin with what the last call left; writes answers to `out`. To be
    /// called with whatever was received, also with nothing, after each step that was done.
    pub fn read(&mut self, input: &mut &[u8], out: &mut BytesMut) -> Step {
        match &self.stage {
            Stage::Opening => self.open(input, out),
            Stage::Handshake => Step::Handshake,
            Stage::Method => Step::Method,
            Stage::Verifier => Step::Verifier,
            Stage::Choosing(_) | Stage::Starting(..) | Stage::Proving(_) | Stage::Salted(..) => {
                self.prove(input, out)
            }
            Stage::Ended => Step::HangUp,
        }
    }

    /// The handshake is done. `certificate_hash`: of the certificate that the client was shown (RFC 5929), if it is known.
    pub fn encrypted(&mut self, certificate_hash: Option<Vec<u8>>) {
        debug_assert!(matches!(self.stage, Stage::Handshake), "nobody asked for a handshake");
        (self.encrypted, self.certificate_hash, self.stage) = (true, certificate_hash, Stage::Opening);
    }

    /// What the hba file says.
    pub fn method(&mut self, method: Method, out: &mut BytesMut) -> Step {
        debug_assert!(matches!(self.stage, Stage::Method), "nobody asked for a method");
        match method {
            Method::Admit => {
                build::authentication_ok(out);
                self.end(Step::In(None))
            }
            Method::ScramSha256 | Method::Md5 => {
                self.takes_md5 = method == Method::Md5;
                self.stage = Stage::Verifier;
                Step::Verifier
            }
            Method::Reject { message } => {
                self.refuse(out, SqlState::INVALID_AUTHORIZATION_SPECIFICATION, &message)
            }
        }
    }

    /// What is stored for the user.
    pub fn verifier(&mut self, verifier: Verifier, out: &mut BytesMut) -> Step {
        debug_assert!(matches!(self.stage, Stage::Verifier), "nobody asked for a verifier");
        let all = [SCRAM_SHA_256_PLUS, SCRAM_SHA_256];
        let offered = if self.certificate_hash.is_some() { &all[..] } else { &all[1..] };
        if build::authentication_sasl(out, offered).is_err() {
            return self.end(Step::HangUp);
        }
        self.stage = Stage::Choosing(verifier);
        Step::More
    }

    /// Its line says so; whoever asks SCRAM of a user who has no such password asks in vain.
    pub fn takes_md5(&self) -> bool {
        self.takes_md5
    }

    /// What is stored for the user, for md5. `salt`: from a cryptographic source, for this login alone.
    pub fn md5(&mut self, hash: Md5Hash, salt: [u8; 4], out: &mut BytesMut) -> Step {
        debug_assert!(matches!(self.stage, Stage::Verifier) && self.takes_md5, "nobody asked for it");
        build::authentication_md5_password(out, salt);
        self.stage = Stage::Salted(hash, salt);
        Step::More
    }

    /// It is stored for md5, and nobody comes in by that.
    pub fn md5_is_off(&mut self, out: &mut BytesMut) -> Step {
        let user = self.asked.as_ref().map_or("", |asked| &asked.user);
        let message =
            format!("the password of user \"{user}\" is stored for md5, which this proxy does not take");
        let hint = "Set it again, so that it is stored for SCRAM: \\password in psql, with password_encryption = 'scram-sha-256'. \
                    Until then md5_passwords = true in [proxy] of the herd file lets md5 in.";
        self.refuse_with(out, SqlState::INVALID_AUTHORIZATION_SPECIFICATION, &message, Some(hint))
    }

    fn open(&mut self, input: &mut &[u8], out: &mut BytesMut) -> Step {
        loop {
            let request = match self.opening.read(input) {
                Ok(Some(request)) => request,
                Ok(None) => return Step::More,
                Err(error) => return self.refuse(out, error.sqlstate(), &error.to_string()),
            };
            let answer = match request {
                // Without a certificate there is nothing to say in a language that it would understand.
                Request::DirectTls if self.tls == Tls::Unavailable => return self.end(Step::HangUp),
                Request::DirectTls => {
                    self.stage = Stage::Handshake;
                    return Step::Handshake;
                }
                Request::Ssl if self.tls == Tls::Unavailable => Answer::Refused,
                Request::Ssl => Answer::Granted,
                // Never: the client goes on with SSLRequest, or in clear.
                Request::GssEnc => Answer::Refused,
                Request::Cancel(cancel) => {
                    let (pid, key) = (cancel.pid, cancel.key.as_bytes().to_vec());
                    return self.end(Step::Cancel { pid, key });
                }
                Request::Startup(startup) => {
                    let asked = match asked(&startup) {
                        Ok(asked) => asked,
                        Err((sqlstate, message)) => return self.refuse(out, sqlstate, message),
                    };
                    let unknown: Vec<&[u8]> = startup.protocol_options().collect();
                    let unknown = startup.must_negotiate().then_some(unknown.as_slice());
                    return self.started(asked, unknown, out);
                }
            };
            if let Err(error) = self.opening.answered(answer, input) {
                return self.refuse(out, error.sqlstate(), &error.to_string());
            }
            out.extend_from_slice(if answer == Answer::Granted { b"S" } else { b"N" });
            if answer == Answer::Granted {
                self.stage = Stage::Handshake;
                return Step::Handshake;
            }
        }
    }

    /// `unknown`: the options of the protocol that it asked for, if it must be told that none is known.
    fn started(&mut self, asked: Asked, unknown: Option<&[&[u8]]>, out: &mut BytesMut) -> Step {
        if self.tls == Tls::Required && !self.encrypted {
            let sqlstate = SqlState::INVALID_AUTHORIZATION_SPECIFICATION;
            return self.refuse(out, sqlstate, "this proxy takes connections with TLS only");
        }
        if let Some(unknown) = unknown
            && build::negotiate_protocol_version(out, asked.version, unknown.iter().copied()).is_err()
        {
            return self.end(Step::HangUp);
        }
        self.asked = Some(asked);
        self.stage = Stage::Method;
        Step::Method
    }

    fn prove(&mut self, input: &mut &[u8], out: &mut BytesMut) -> Step {
        loop {
            if !self.has_header {
                match self.scanner.next(input) {
                    Ok(Some(Piece::Header(_))) => self.has_header = true,
                    Ok(_) => return Step::More,
                    Err(error) => return self.refuse(out, error.sqlstate(), &error.to_string()),
                }
            }
            let mut spill = std::mem::replace(&mut self.spill, Spill::new(0));
            let step = match self.scanner.whole(input, &mut spill) {
                Ok(Some(body)) => {
                    self.has_header = false;
                    self.answer(body, out)
                }
                Ok(None) => Some(Step::More),
                Err(error) => Some(self.refuse(out, error.sqlstate(), &error.to_string())),
            };
            self.spill = spill;
            if let Some(step) = step {
                return step;
            }
        }
    }

    /// One message of the exchange; `None`: the next one may be here already.
    fn answer(&mut self, body: &[u8], out: &mut BytesMut) -> Option<Step> {
        let (verifier, mechanism, first) = match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Choosing(verifier) => {
                let initial = match SaslInitial::read(body) {
                    Ok(initial) => initial,
                    Err(error) => {
                        return Some(self.refuse(out, SqlState::PROTOCOL_VIOLATION, &error.to_string()));
                    }
                };
                let mechanism = match initial.mechanism {
                    name if name == SCRAM_SHA_256.as_bytes() => Mechanism::Plain,
                    name if name == SCRAM_SHA_256_PLUS.as_bytes() && self.certificate_hash.is_some() => {
                        Mechanism::Plus
                    }
                    _ => {
                        let message = "client selected an invalid SASL authentication mechanism";
                        return Some(self.refuse(out, SqlState::PROTOCOL_VIOLATION, message));
                    }
                };
                let Some(first) = initial.response else {
                    // It is asked for what it left out (RFC 4422, section 3).
                    self.stage = Stage::Starting(verifier, mechanism);
                    return self.challenge(b"", out);
                };
                (verifier, mechanism, first)
            }
            Stage::Starting(verifier, mechanism) => (verifier, mechanism, sasl_response(body)),
            Stage::Proving(server) => return Some(self.finish(server, sasl_response(body), out)),
            Stage::Salted(hash, salt) => return Some(self.compare(hash, salt, body, out)),
            _ => return Some(Step::HangUp),
        };
        let binding = match (mechanism, &self.certificate_hash) {
            (Mechanism::Plus, Some(hash)) => Binding::To(hash),
            (_, Some(_)) => Binding::Offered,
            (_, None) => Binding::Impossible,
        };
        match scram::Server::start(verifier, first, binding, &self.nonce) {
            Ok((server, challenge)) => {
                self.stage = Stage::Proving(server);
                self.challenge(challenge.as_bytes(), out)
            }
            Err(error) => Some(self.refuse(out, error.sqlstate(), &error.to_string())),
        }
    }

    fn challenge(&mut self, challenge: &[u8], out: &mut BytesMut) -> Option<Step> {
        build::authentication_sasl_continue(out, challenge).is_err().then(|| self.end(Step::HangUp))
    }

    fn finish(&mut self, server: scram::Server, last: &[u8], out: &mut BytesMut) -> Step {
        match server.finish(last) {
            Ok((answer, keys)) => {
                if build::authentication_sasl_final(out, answer.as_bytes()).is_err() {
                    return self.end(Step::HangUp);
                }
                build::authentication_ok(out);
                self.end(Step::In(Some(Keys::Scram(keys))))
            }
            Err(ScramError::WrongProof) => self.refuse_password(out),
            Err(error) => self.refuse(out, error.sqlstate(), &error.to_string()),
        }
    }

    fn compare(&mut self, hash: Md5Hash, salt: [u8; 4], body: &[u8], out: &mut BytesMut) -> Step {
        match password(body) {
            Ok(answer) if hash.is_answered(salt, answer) => {
                build::authentication_ok(out);
                self.end(Step::In(Some(Keys::Md5(hash))))
            }
            Ok(_) => self.refuse_password(out),
            Err(error) => self.refuse(out, SqlState::PROTOCOL_VIOLATION, &error.to_string()),
        }
    }

    /// In PostgreSQL's words, whether there is such a user or not.
    fn refuse_password(&mut self, out: &mut BytesMut) -> Step {
        let user = self.asked.as_ref().map_or("", |asked| &asked.user);
        let message = format!("password authentication failed for user \"{user}\"");
        self.refuse(out, SqlState::INVALID_PASSWORD, &message)
    }

    fn refuse(&mut self, out: &mut BytesMut, sqlstate: SqlState, message: &str) -> Step {
        self.refuse_with(out, sqlstate, message, None)
    }

    fn refuse_with(
        &mut self,
        out: &mut BytesMut,
        sqlstate: SqlState,
        message: &str,
        hint: Option<&str>,
    ) -> Step {
        let report = Report { severity: Severity::Fatal, sqlstate, message, detail: None, hint };
        build::error_response(out, &report);
        self.refused = Some(sqlstate);
        self.end(Step::Refused)
    }

    fn end(&mut self, step: Step) -> Step {
        self.stage = Stage::Ended;
        self.spill.release();
        step
    }
}

/// The packet's contents, if they are texts. PostgreSQL takes any bytes here, in an encoding that nobody knows; whoever
/// compares names with those of a file must know.
fn asked(startup: &StartupMessage<'_>) -> Result<Asked, (SqlState, &'static str)> {
    let text = |bytes: &[u8]| {
        let not_text = (SqlState::PROTOCOL_VIOLATION, "startup packet contains bytes that are not UTF-8");
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| not_text)
    };
    let named =
        |name: &[u8]| matches!(name, b"user" | b"database" | b"replication") || name.starts_with(b"_pq_.");
    let others = startup.parameters().filter(|(name, _)| !named(name));
    let replication = startup.replication();
    let bad = (SqlState::PROTOCOL_VIOLATION, "invalid value for parameter \"replication\"");
    let name = |bytes: &[u8]| {
        text(bytes).map(|mut name| {
            let mut end = name.len().min(MAX_NAME_BYTES);
            while !name.is_char_boundary(end) {
                end -= 1;
            }
            name.truncate(end);
            name
        })
    };
    Ok(Asked {
        user: name(startup.user())?,
        database: name(startup.database())?,
        replication: replication.map_err(|_| bad)?,
        version: startup.version.spoken(),
        parameters: others.map(|(name, value)| Ok((text(name)?, text(value)?))).collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests;
