//! What inputs have reached: message types, which are printed, and features, by which inputs are kept.
//!
//! A message type counts as reached when the code under test took a whole message for one of that type. Coverage
//! of the machine code would need another compiler; what a target saw one after the other is a good stand-in.

use std::collections::BTreeMap;

/// Who says a message of that type; bytes alone are not unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Says {
    /// A client, before everything else.
    Opening,
    /// The kinds of type `p`, which only the state tells apart.
    Proof,
    Client,
    Server,
    /// The kinds of type `R`, by their number.
    Request,
}

/// All messages of the manual (PostgreSQL 18, 54.7), with the letter or number that each target marks them by.
pub const MESSAGES: &[(Says, u8, &str)] = &[
    (Says::Opening, b'T', "StartupMessage 3.0"),
    (Says::Opening, b't', "StartupMessage 3.2"),
    (Says::Opening, b'C', "CancelRequest"),
    (Says::Opening, b'S', "SSLRequest"),
    (Says::Opening, b'G', "GSSENCRequest"),
    (Says::Opening, b'D', "ClientHello"),
    (Says::Proof, b'i', "SASLInitialResponse"),
    (Says::Proof, b'r', "SASLResponse"),
    (Says::Proof, b'p', "PasswordMessage"),
    (Says::Proof, b'g', "GSSResponse"),
    (Says::Client, b'B', "Bind"),
    (Says::Client, b'C', "Close"),
    (Says::Client, b'D', "Describe"),
    (Says::Client, b'E', "Execute"),
    (Says::Client, b'F', "FunctionCall"),
    (Says::Client, b'H', "Flush"),
    (Says::Client, b'P', "Parse"),
    (Says::Client, b'Q', "Query"),
    (Says::Client, b'S', "Sync"),
    (Says::Client, b'X', "Terminate"),
    (Says::Client, b'c', "CopyDone"),
    (Says::Client, b'd', "CopyData"),
    (Says::Client, b'f', "CopyFail"),
    (Says::Server, b'1', "ParseComplete"),
    (Says::Server, b'2', "BindComplete"),
    (Says::Server, b'3', "CloseComplete"),
    (Says::Server, b'A', "NotificationResponse"),
    (Says::Server, b'C', "CommandComplete"),
    (Says::Server, b'D', "DataRow"),
    (Says::Server, b'E', "ErrorResponse"),
    (Says::Server, b'G', "CopyInResponse"),
    (Says::Server, b'H', "CopyOutResponse"),
    (Says::Server, b'I', "EmptyQueryResponse"),
    (Says::Server, b'K', "BackendKeyData"),
    (Says::Server, b'N', "NoticeResponse"),
    (Says::Server, b'S', "ParameterStatus"),
    (Says::Server, b'T', "RowDescription"),
    (Says::Server, b'V', "FunctionCallResponse"),
    (Says::Server, b'W', "CopyBothResponse"),
    (Says::Server, b'Z', "ReadyForQuery"),
    (Says::Server, b'c', "CopyDone"),
    (Says::Server, b'd', "CopyData"),
    (Says::Server, b'n', "NoData"),
    (Says::Server, b's', "PortalSuspended"),
    (Says::Server, b't', "ParameterDescription"),
    (Says::Server, b'v', "NegotiateProtocolVersion"),
    (Says::Request, 0, "AuthenticationOk"),
    (Says::Request, 2, "AuthenticationKerberosV5"),
    (Says::Request, 3, "AuthenticationCleartextPassword"),
    (Says::Request, 5, "AuthenticationMD5Password"),
    (Says::Request, 7, "AuthenticationGSS"),
    (Says::Request, 8, "AuthenticationGSSContinue"),
    (Says::Request, 9, "AuthenticationSSPI"),
    (Says::Request, 10, "AuthenticationSASL"),
    (Says::Request, 11, "AuthenticationSASLContinue"),
    (Says::Request, 12, "AuthenticationSASLFinal"),
];

const FEATURE_BITS: usize = 1 << 18;

#[derive(Clone, Debug)]
pub struct Reached {
    features: Vec<u64>,
    count: usize,
    types: BTreeMap<(Says, u8), u64>,
    /// Something was reached for the first time.
    is_more: bool,
}

impl Default for Reached {
    fn default() -> Reached {
        Reached { features: vec![0; FEATURE_BITS / 64], ..Reached::nothing() }
    }
}

impl Reached {
    /// For an execution that was made before: nothing is remembered.
    pub fn nothing() -> Reached {
        Reached { features: Vec::new(), count: 0, types: BTreeMap::new(), is_more: false }
    }

    pub fn message(&mut self, says: Says, kind: u8) {
        if self.features.is_empty() {
            return;
        }
        *self.types.entry((says, kind)).or_default() += 1;
        self.feature(&[says as u64, u64::from(kind)]);
    }

    /// What is seen together; several of them may fall into one, which then is reached once only.
    pub fn feature(&mut self, parts: &[u64]) {
        if self.features.is_empty() {
            return;
        }
        let hash = parts.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, part| {
            (hash ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        });
        let at = (hash ^ hash >> 32) as usize % FEATURE_BITS;
        let (word, bit) = (&mut self.features[at / 64], 1 << (at % 64));
        if *word & bit == 0 {
            *word |= bit;
            self.count += 1;
            self.is_more = true;
        }
    }

    pub fn features(&self) -> usize {
        self.count
    }

    /// Whether something is new since this was asked last.
    pub fn take_more(&mut self) -> bool {
        std::mem::take(&mut self.is_more)
    }

    /// How often each message was taken for what it is.
    pub fn messages(&self) -> impl Iterator<Item = (&'static str, u64)> {
        MESSAGES.iter().filter_map(|(says, kind, name)| Some((*name, *self.types.get(&(*says, *kind))?)))
    }

    /// Names of those of these that were not reached.
    pub fn missing(&self, messages: &[(Says, &[u8])]) -> Vec<&'static str> {
        let missing = |(says, kind, _): &&(Says, u8, &str)| {
            let is_asked_for = messages.iter().any(|(known, kinds)| known == says && kinds.contains(kind));
            is_asked_for && !self.types.contains_key(&(*says, *kind))
        };
        MESSAGES.iter().filter(missing).map(|(_, _, name)| *name).collect()
    }
}
