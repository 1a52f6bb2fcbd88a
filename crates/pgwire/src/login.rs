//! The client's side of a login: from the startup packet to the first ReadyForQuery.
//!
//! It proves that it knows the password, or what a password is worth ([`Proof`]), by SCRAM alone, and takes no other kind of
//! question for an answer. A server that wants to know a password in clear is refused, so that whoever stands in a server's
//! place learns nothing. Only who has nothing but what is stored for md5 ([`Login::known_by`]) answers to that, and then to
//! nothing else.
//!
//! Leaves out: sockets, TLS, timeouts, what is done behind it. Hazard: what a server says before it has proven itself is not
//! believed further than it must be.

use bytes::BytesMut;

use crate::SqlState;
use crate::frame::{Phase, Piece, Scanner, Side, Spill};
use crate::md5::Md5Hash;
use crate::message::server::Authentication;
use crate::message::{ServerMessage, TransactionStatus, build};
use crate::scram::{self, Binding, Proof, SCRAM_SHA_256, SCRAM_SHA_256_PLUS};
use crate::startup::{Replication, Version};

/// Greatest message of a server that is letting somebody in: some of its messages may be translated and long.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Who comes, and what for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Purpose {
    pub user: String,
    pub database: String,
    pub replication: Replication,
    /// What else the startup packet says.
    pub parameters: Vec<(String, String)>,
    /// The certificate that was shown may be proof enough.
    pub is_certified: bool,
}

/// Parameters that a server may report; PostgreSQL 18 reports 15 of its own.
pub const MAX_PARAMETERS: usize = 128;

/// What a server said of itself and of the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// In their order, each once.
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    pub pid: u32,
    pub key: Vec<u8>,
}

/// A parameter has this value from now on; each is there once. `false`: there are too many.
#[must_use]
pub fn note(parameters: &mut Vec<(Vec<u8>, Vec<u8>)>, name: &[u8], value: &[u8]) -> bool {
    let has_room = parameters.len() < MAX_PARAMETERS;
    match parameters.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = value.to_vec(),
        None if !has_room => return false,
        None => parameters.push((name.to_vec(), value.to_vec())),
    }
    true
}

/// Why a server did not let somebody in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotIn {
    /// In its own words.
    #[error("{message} (SQLSTATE {sqlstate})")]
    Refused { sqlstate: SqlState, message: String, detail: Option<String>, hint: Option<String> },
    #[error("the server asks for {0}, and nothing but a SCRAM proof is given")]
    Method(&'static str),
    #[error(transparent)]
    Scram(#[from] scram::ScramError),
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
}

/// What the caller has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send what was written, and read more.
    More,
    /// The server takes statements. Bytes that were not taken belong to the session.
    In(Welcome),
    Failed(NotIn),
}

#[derive(Debug)]
enum Stage {
    /// Whatever the server wants to know.
    Asked(Option<Proof>),
    /// The same of somebody who has this and nothing else.
    AskedForMd5(Md5Hash),
    Proving(Box<scram::Client>),
    /// It has proven that it knows the password, too.
    Proven,
    /// It was answered, and has proven nothing: md5 goes one way only.
    Answered,
    Starting,
    Ended,
}

#[derive(Debug)]
pub struct Login {
    scanner: Scanner,
    spill: Spill,
    reading: Option<u8>,
    stage: Stage,
    nonce: String,
    /// `tls-server-end-point` of the server, where it is spoken to with TLS.
    certificate_hash: Option<Vec<u8>>,
    authenticated: bool,
    is_certified: bool,
    welcome: Welcome,
}

impl Login {
    /// Writes the startup packet. Without a proof only a server that asks for none lets somebody in, as it does those whose
    /// certificate is proof enough. `nonce` as for [`scram::Client::start`].
    pub fn new(
        purpose: &Purpose,
        proof: Option<Proof>,
        nonce: String,
        out: &mut BytesMut,
    ) -> Result<Login, NotIn> {
        let replication = match purpose.replication {
            Replication::Off => None,
            Replication::Physical => Some("true"),
            Replication::Logical => Some("database"),
        };
        let mut parameters: Vec<(&[u8], &[u8])> =
            vec![(b"user", purpose.user.as_bytes()), (b"database", purpose.database.as_bytes())];
        parameters.extend(replication.map(|word| (&b"replication"[..], word.as_bytes())));
        parameters.extend(purpose.parameters.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
        build::startup_message(out, Version::V3_0, &parameters)
            .map_err(|error| NotIn::Protocol(error.to_string()))?;
        Ok(Login {
            scanner: Scanner::new(Side::Server, Phase::Authentication),
            spill: Spill::new(MAX_MESSAGE_BYTES),
            reading: None,
            stage: Stage::Asked(proof),
            nonce,
            certificate_hash: None,
            authenticated: false,
            is_certified: purpose.is_certified,
            welcome: Welcome::default(),
        })
    }

    /// The proof is for the server with this certificate, and worth nothing to whoever stands between: RFC 5929.
    pub fn bound_to(self, certificate_hash: Option<Vec<u8>>) -> Login {
        Login { certificate_hash, ..self }
    }

    /// What the server stores for md5 is all that is known of the password.
    pub fn known_by(self, hash: Md5Hash) -> Login {
        Login { stage: Stage::AskedForMd5(hash), ..self }
    }

    /// The server has let it in: what it still refuses is not about who came or how.
    pub fn is_authenticated(&self) -> bool {
        self.authenticated
    }

    /// Reads from the front of `input`, which must begin with what the last call left; writes answers to `out`.
    pub fn read(&mut self, input: &mut &[u8], out: &mut BytesMut) -> Step {
        loop {
            let step = self.message(input, out);
            match step {
                Ok(None) => {}
                Ok(Some(Step::More)) => return Step::More,
                Ok(Some(step)) => {
                    self.stage = Stage::Ended;
                    return step;
                }
                Err(error) => {
                    self.stage = Stage::Ended;
                    return Step::Failed(error);
                }
            }
        }
    }

    /// `None`: there may be another one.
    fn message(&mut self, input: &mut &[u8], out: &mut BytesMut) -> Result<Option<Step>, NotIn> {
        let protocol = |error: &dyn std::fmt::Display| NotIn::Protocol(error.to_string());
        let kind = match self.reading {
            Some(kind) => kind,
            None => match self.scanner.next(input).map_err(|error| protocol(&error))? {
                Some(Piece::Header(header)) => {
                    self.reading = Some(header.kind);
                    header.kind
                }
                _ => return Ok(Some(Step::More)),
            },
        };
        let mut spill = std::mem::replace(&mut self.spill, Spill::new(0));
        let body = self.scanner.whole(input, &mut spill).map_err(|error| protocol(&error));
        let step = match body {
            Ok(Some(body)) => {
                self.reading = None;
                let message = ServerMessage::parse(kind, body).map_err(|error| protocol(&error));
                message.and_then(|message| self.said(&message, out))
            }
            Ok(None) => Ok(Some(Step::More)),
            Err(error) => Err(error),
        };
        self.spill = spill;
        step
    }

    fn said(&mut self, message: &ServerMessage<'_>, out: &mut BytesMut) -> Result<Option<Step>, NotIn> {
        match message {
            ServerMessage::ErrorResponse(fields) => {
                let text = |code| fields.get(code).map(|text| String::from_utf8_lossy(text).into_owned());
                Err(NotIn::Refused {
                    sqlstate: fields.sqlstate().unwrap_or(SqlState::CONNECTION_FAILURE),
                    message: text(b'M').unwrap_or_default(),
                    detail: text(b'D'),
                    hint: text(b'H'),
                })
            }
            ServerMessage::NoticeResponse(_) | ServerMessage::NotificationResponse { .. } => Ok(None),
            ServerMessage::Authentication(asked) => self.authentication(asked, out),
            ServerMessage::ParameterStatus { name, value } => {
                let has_room = note(&mut self.welcome.parameters, name, value);
                has_room.then_some(None).ok_or_else(|| NotIn::Protocol("too many parameters".to_owned()))
            }
            ServerMessage::BackendKeyData { pid, key } => {
                (self.welcome.pid, self.welcome.key) = (*pid, key.as_bytes().to_vec());
                Ok(None)
            }
            ServerMessage::ReadyForQuery(TransactionStatus::Idle) => {
                Ok(Some(Step::In(std::mem::take(&mut self.welcome))))
            }
            _ => Err(NotIn::Protocol("an answer to what was not asked".to_owned())),
        }
    }

    fn authentication(
        &mut self,
        asked: &Authentication<'_>,
        out: &mut BytesMut,
    ) -> Result<Option<Step>, NotIn> {
        let unsendable = |error: build::Unsendable| NotIn::Protocol(error.to_string());
        match (asked, std::mem::replace(&mut self.stage, Stage::Ended)) {
            // Whoever asks for no proof at all although there could be one may not be the server.
            (Authentication::Ok, Stage::Asked(proof)) if proof.is_some() && !self.is_certified => {
                Err(NotIn::Method("no proof at all"))
            }
            (Authentication::Ok, Stage::AskedForMd5(_)) if !self.is_certified => {
                Err(NotIn::Method("no proof at all"))
            }
            (
                Authentication::Ok,
                Stage::Asked(_) | Stage::AskedForMd5(_) | Stage::Proven | Stage::Answered,
            ) => {
                (self.stage, self.authenticated) = (Stage::Starting, true);
                self.scanner.enter(Phase::Starting);
                Ok(None)
            }
            (Authentication::Md5Password { salt }, Stage::AskedForMd5(hash)) => {
                build::password(out, &hash.answer(*salt)).map_err(unsendable)?;
                self.stage = Stage::Answered;
                Ok(None)
            }
            // Another password is stored since.
            (Authentication::Sasl(_), Stage::AskedForMd5(_)) => Err(scram::ScramError::KeysOutOfDate.into()),
            (Authentication::CleartextPassword, _) => Err(NotIn::Method("a password in clear")),
            (Authentication::Md5Password { .. }, _) => Err(NotIn::Method("an md5 password")),
            (Authentication::Sasl(mechanisms), Stage::Asked(Some(proof))) => {
                let offers = |mechanism: &str| mechanisms.iter().any(|name| name == mechanism.as_bytes());
                // Keys make a proof of their own, so that it can be bound to this connection, whatever the one was bound to that
                // revealed them. A server is told when it seems to offer no binding: somebody may have taken it away.
                let (mechanism, binding) = match &self.certificate_hash {
                    Some(hash) if offers(SCRAM_SHA_256_PLUS) => (SCRAM_SHA_256_PLUS, Binding::To(hash)),
                    Some(_) => (SCRAM_SHA_256, Binding::Offered),
                    None => (SCRAM_SHA_256, Binding::Impossible),
                };
                if !offers(mechanism) {
                    return Err(NotIn::Method("an unknown SASL mechanism"));
                }
                let (client, first) = scram::Client::start(proof, binding, &self.nonce);
                build::sasl_initial_response(out, mechanism, Some(first.as_bytes())).map_err(unsendable)?;
                self.stage = Stage::Proving(Box::new(client));
                Ok(None)
            }
            (Authentication::Sasl(_), Stage::Asked(None)) => Err(NotIn::Method("a password")),
            (Authentication::SaslContinue(data), Stage::Proving(mut client)) => {
                let proof = client.prove(data)?;
                build::sasl_response(out, proof.as_bytes()).map_err(unsendable)?;
                self.stage = Stage::Proving(client);
                Ok(None)
            }
            (Authentication::SaslFinal(data), Stage::Proving(client)) => {
                client.finish(data)?;
                self.stage = Stage::Proven;
                Ok(None)
            }
            _ => Err(NotIn::Protocol("an authentication message out of its order".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests;
