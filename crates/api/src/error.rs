//! Errors as users and programs see them: one definition per code, and the body that carries them.
//!
//! Every code has its page `docs/errors/<code>.md`; a test compares both sides. A code is never renamed
//! or given another meaning: people search for it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the command line exits with. 0, done, is not an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitClass {
    Failed = 1,
    Usage = 2,
    /// A safety rule said no. Nothing was changed.
    Refused = 3,
    TimedOut = 4,
}

impl ExitClass {
    pub fn exit_code(self) -> u8 {
        self as u8
    }

    /// The class of an answer whose code this version does not know.
    fn of_http_status(status: u16) -> ExitClass {
        match status {
            400 | 404 | 405 | 413 | 415 => ExitClass::Usage,
            409 => ExitClass::Refused,
            408 | 504 => ExitClass::TimedOut,
            _ => ExitClass::Failed,
        }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal $class:ident $status:literal
       $title:literal, $hint:literal;)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $name),* }

        impl Code {
            pub const ALL: &[Code] = &[$(Code::$name),*];

            /// The stable text: `PGH-` and words.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $code),* }
            }

            pub fn exit_class(self) -> ExitClass {
                match self { $(Code::$name => ExitClass::$class),* }
            }

            pub fn http_status(self) -> u16 {
                match self { $(Code::$name => $status),* }
            }

            pub fn title(self) -> &'static str {
                match self { $(Code::$name => $title),* }
            }

            /// What to do next, where the place that raises the error knows nothing better.
            pub fn hint(self) -> &'static str {
                match self { $(Code::$name => $hint),* }
            }
        }
    };
}

codes! {
    // What was asked for cannot be meant.
    RequestMalformed = "PGH-REQUEST-MALFORMED" Usage 400 "the request is not understood",
        "use a pgherd of the same version as the agent: pgherd --version";
    RequestTooLarge = "PGH-REQUEST-TOO-LARGE" Usage 413 "the request is larger than the agent takes",
        "split it, or look for what made it so large";
    RouteUnknown = "PGH-ROUTE-UNKNOWN" Usage 404 "the agent has nothing at this address",
        "use a pgherd of the same version as the agent: pgherd --version";
    MethodNotAllowed = "PGH-METHOD-NOT-ALLOWED" Usage 405 "the address does not take this method",
        "use a pgherd of the same version as the agent: pgherd --version";
    SpecInvalid = "PGH-SPEC-INVALID" Usage 400 "the herd file has mistakes",
        "pgherd validate shows every mistake at once";
    RepositoryMissing = "PGH-REPOSITORY-MISSING" Usage 404 "no repository is named",
        "add [backup] to the herd file, then pgherd apply";
    ClusterUnknown = "PGH-CLUSTER-UNKNOWN" Usage 404 "the herd has no such cluster",
        "pgherd status lists the clusters";
    ClusterAmbiguous = "PGH-CLUSTER-AMBIGUOUS" Usage 400 "the herd has several clusters and none was named",
        "name one with --cluster";
    NodeUnknown = "PGH-NODE-UNKNOWN" Usage 404 "the herd has no such node",
        "pgherd status lists the nodes";
    ChangeUnknown = "PGH-CHANGE-UNKNOWN" Usage 404 "no such switchover or failover is known",
        "pgherd history lists what was done";

    // Credentials.
    CredentialsMissing = "PGH-CREDENTIALS-MISSING" Failed 401 "the agent wants a certificate of this herd",
        "use --url with a client.toml made by pgherd operator add, or run it on the agent's host";
    CredentialsInsufficient = "PGH-CREDENTIALS-INSUFFICIENT" Failed 403 "the certificate is not one for this request",
        "changes are made with an operator's certificate: pgherd operator add";
    CrossOrigin = "PGH-CROSS-ORIGIN" Failed 403 "the request was made by a web page of another origin",
        "none: a page that does this is not to be trusted";
    TokenInvalid = "PGH-TOKEN-INVALID" Failed 403 "the join token is not one of this herd",
        "make another one on any member: pgherd token";
    TokenExpired = "PGH-TOKEN-EXPIRED" Failed 403 "the join token has expired",
        "make another one on any member: pgherd token";
    TokenUsed = "PGH-TOKEN-USED" Failed 403 "the join token was used before",
        "each node needs its own: pgherd token";
    CertificateRequestInvalid = "PGH-CERTIFICATE-REQUEST-INVALID" Usage 400 "the certificate request cannot be granted",
        "look at the cause: a name that belongs to another node, or a key of another kind";
    SignatureInvalid = "PGH-SIGNATURE-INVALID" Failed 403 "the message is not signed by the node that it names",
        "look at the clocks and certificates of both nodes: pgherd doctor";

    // On the way to an agent.
    PeerUnreachable = "PGH-PEER-UNREACHABLE" Failed 503 "no connection to the agent",
        "is it running, and is the port open: pgherd status on its host";
    PeerNotTrusted = "PGH-PEER-NOT-TRUSTED" Failed 502 "the agent and this side do not accept each other's certificates",
        "check herd, address and expiry: the certificates must be of one herd and in date";
    PeerProtocol = "PGH-PEER-PROTOCOL" Failed 502 "the answer is not one of a pgherd agent",
        "check the address, and that both sides run the same version";
    DeadlinePassed = "PGH-DEADLINE-PASSED" TimedOut 504 "no answer in time",
        "pgherd status tells whether it was done nevertheless";

    // What the herd cannot do now.
    NotReady = "PGH-NOT-READY" Failed 503 "the agent is starting and cannot answer yet",
        "try again in a few seconds";
    Busy = "PGH-BUSY" Failed 503 "the agent has as many requests as it takes",
        "try again; pgherd logs names who asks so much";
    StoreUnavailable = "PGH-STORE-UNAVAILABLE" Failed 503 "the store has no majority or cannot be reached",
        "pgherd status shows its members; if most are gone for good: pgherd store recover";
    Internal = "PGH-INTERNAL" Failed 500 "the agent met a condition that it does not know",
        "please report it with the output of pgherd logs";

    // What a safety rule forbids.
    GenerationStale = "PGH-GENERATION-STALE" Refused 409 "the specification has changed since it was looked at",
        "look again with pgherd plan, then pgherd apply";
    ImpactNotAccepted = "PGH-IMPACT-NOT-ACCEPTED" Refused 409 "the change costs more than was agreed to",
        "pgherd plan shows what it does; pgherd apply asks for exactly that";
    ChangeInProgress = "PGH-CHANGE-IN-PROGRESS" Refused 409 "another change of this cluster is under way",
        "pgherd status shows it; wait, or cancel a switchover with pgherd switchover --cancel";
    TargetNotElectable = "PGH-TARGET-NOT-ELECTABLE" Refused 409 "the node may not become primary now",
        "pgherd explain says why, and what it waits for";
    RedundancyTooLow = "PGH-REDUNDANCY-TOO-LOW" Refused 409 "too few copies of acknowledged commits would be left",
        "pgherd explain names the missing voters; bring one back first";
    DataLossNotAccepted = "PGH-DATA-LOSS-NOT-ACCEPTED" Refused 409 "the failover could lose acknowledged commits",
        "pgherd explain says what is at risk; to go on: pgherd failover --to NODE --accept-data-loss";
    ClusterPaused = "PGH-CLUSTER-PAUSED" Refused 409 "the cluster is paused",
        "pgherd resume";
    HerdExists = "PGH-HERD-EXISTS" Refused 409 "a listed host already belongs to a herd",
        "join that one with a token, or remove the host from the file";
    HerdMismatch = "PGH-HERD-MISMATCH" Refused 409 "the node belongs to another herd or an older life of this one",
        "pgherd status on both shows their herds; a node left behind by store recover must join again";
    NameTaken = "PGH-NAME-TAKEN" Refused 409 "a node or operator of this name exists",
        "choose another name, or remove the old one first";
    TermStale = "PGH-TERM-STALE" Refused 409 "the message speaks for a term that has ended",
        "nothing: the herd has gone on without it";

    // What took too long.
    ChangeTimedOut = "PGH-CHANGE-TIMED-OUT" TimedOut 504 "the change did not come to its end in time",
        "pgherd status shows where it stands, pgherd explain what it waits for";
}

impl Code {
    pub fn from_text(text: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.as_str() == text)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The body of every answer that is not a success: what happened, why, and the next command.
///
/// The code is text, so that a code of a later version survives its way through an older one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub code: String,
    pub message: String,
    pub cause: Option<String>,
    pub hint: Option<String>,
}

impl Error {
    /// With the code's own hint; `message` is about this very case and names the place.
    pub fn new(code: Code, message: impl Into<String>) -> Error {
        Error {
            code: code.as_str().to_owned(),
            message: message.into(),
            cause: None,
            hint: Some(code.hint().to_owned()),
        }
    }

    /// The message is the code's title.
    pub fn of(code: Code) -> Error {
        Error::new(code, code.title())
    }

    pub fn because(mut self, cause: impl fmt::Display) -> Error {
        self.cause = Some(cause.to_string());
        self
    }

    pub fn hinting(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// None for a code of a later version.
    pub fn known(&self) -> Option<Code> {
        Code::from_text(&self.code)
    }

    pub fn is(&self, code: Code) -> bool {
        self.code == code.as_str()
    }

    pub fn http_status(&self) -> u16 {
        self.known().map_or(500, Code::http_status)
    }

    /// What to exit with, given the HTTP status that the error came with.
    pub fn exit_class(&self, http_status: u16) -> ExitClass {
        self.known().map_or_else(|| ExitClass::of_http_status(http_status), Code::exit_class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_well_formed() {
        let mut seen = std::collections::BTreeSet::new();
        for code in Code::ALL {
            let text = code.as_str();
            assert!(seen.insert(text), "{text} is defined twice");
            assert!(text.starts_with("PGH-"));
            assert!(
                text[4..]
                    .split('-')
                    .all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_uppercase()))
            );
            assert_eq!(Code::from_text(text), Some(*code));
            assert!(!code.title().ends_with('.') && !code.hint().ends_with('.'));
        }
    }

    /// The class survives even where the code is not known: an older command line must not call a refusal
    /// a failure.
    #[test]
    fn the_http_status_tells_the_class_of_an_unknown_code() {
        for code in Code::ALL {
            let class = ExitClass::of_http_status(code.http_status());
            assert_eq!(class, code.exit_class(), "{code} travels as {}", code.http_status());
        }
    }
}
