//! Session settings that follow their client from server to server.
//!
//! What a client has set is what its server says it is, asked when a transaction in which something may have been set is over
//! ([`question`]): so values are PostgreSQL's own, and what was rolled back, or was local to a function, is not there. Before
//! a server is given to a client, it is brought from what it has to what the client has ([`Values::changes_to`]); most often
//! that is the same, and costs nothing.
//!
//! Leaves out: who asks. Hazard: a `search_path` or a role that stays behind shows one tenant's rows to another.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use crate::sql::{Changed, Tie, Ties};

/// They change neither what a text means nor what comes out of it, so that statements can be shared over them.
const MEANINGLESS: [&str; 7] = [
    "application_name",
    "client_min_messages",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "statement_timeout",
    "transaction_timeout",
];
/// What the server is to send of warnings, by which it says that a commit was not waited for ([`Values::for_server`]).
const MESSAGES: &str = "client_min_messages";
const WARNING: &str = "warning";
const ROLE: &str = "role";
const SESSION_AUTHORIZATION: &str = "session_authorization";

/// What is set in a session over what it began with; names in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Values {
    by_name: BTreeMap<String, String>,
    meaning: u64,
}

impl Default for Values {
    fn default() -> Values {
        Values::new(BTreeMap::new())
    }
}

impl FromIterator<(String, String)> for Values {
    /// The last one of a name counts.
    fn from_iter<I: IntoIterator<Item = (String, String)>>(values: I) -> Values {
        Values::new(values.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect())
    }
}

impl Values {
    fn new(by_name: BTreeMap<String, String>) -> Values {
        let mut meaning = DefaultHasher::new();
        for value in by_name.iter().filter(|(name, _)| !MEANINGLESS.contains(&name.as_str())) {
            value.hash(&mut meaning);
        }
        Values { meaning: meaning.finish(), by_name }
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.by_name.get(name).map(String::as_str)
    }

    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.by_name.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The same for sessions in which the same text means the same.
    pub fn meaning(&self) -> u64 {
        self.meaning
    }

    /// Does the client want no warnings?
    pub fn hides_warnings(&self) -> bool {
        self.get(MESSAGES).is_some_and(|level| is_silent(level.as_bytes()))
    }

    /// These, and one more.
    pub fn with(&self, name: &str, value: &str) -> Values {
        let mut by_name = self.by_name.clone();
        by_name.insert(name.to_owned(), value.to_owned());
        Values::new(by_name)
    }

    /// What a server is to have for a client that has these: it always warns, and whoever wants no warnings is not shown them.
    pub fn for_server(self: &Arc<Values>) -> Arc<Values> {
        if !self.hides_warnings() {
            return Arc::clone(self);
        }
        Arc::new(self.with(MESSAGES, WARNING))
    }

    /// What is to be set, in this order, so that a session that has these has those; `None` for what it began with.
    pub fn changes_to<'a>(&'a self, to: &'a Values) -> Vec<(&'a str, Option<&'a str>)> {
        if self == to {
            return Vec::new();
        }
        let is_identity = |name: &str| name == ROLE || name == SESSION_AUTHORIZATION;
        // Another role may not be allowed to set what was set before it was taken on.
        let former = [ROLE, SESSION_AUTHORIZATION].into_iter().filter(|name| self.get(name).is_some());
        let mut changes: Vec<_> = former.map(|name| (name, None)).collect();
        let gone = self.by_name.keys().filter(|name| !is_identity(name) && !to.by_name.contains_key(*name));
        changes.extend(gone.map(|name| (name.as_str(), None)));
        let other = to.iter().filter(|(name, value)| !is_identity(name) && self.get(name) != Some(*value));
        changes.extend(other.map(|(name, value)| (name, Some(value))));
        let identities = [SESSION_AUTHORIZATION, ROLE].into_iter();
        changes.extend(identities.filter_map(|name| to.get(name).map(|value| (name, Some(value)))));
        changes
    }
}

/// `fatal` and `panic` are former names of `error`.
fn is_silent(level: &[u8]) -> bool {
    [&b"error"[..], b"fatal", b"panic"].iter().any(|known| level.eq_ignore_ascii_case(known))
}

/// What a server's startup packet has to say, whose role or database has this `client_min_messages`, so that it warns.
pub(crate) fn startup_that_warns(level: &[u8]) -> Option<(String, String)> {
    is_silent(level).then(|| (MESSAGES.to_owned(), WARNING.to_owned()))
}

/// Equal values in one place, so that whether two are equal can be told by where they are: clients of an application have all
/// the same, and a server is compared with its next client for each transaction.
#[derive(Debug, Default)]
pub struct Shelf<T = Values> {
    values: Mutex<HashSet<Arc<T>>>,
}

/// So many are kept before those are looked for that nobody has any more.
const LEAST_SHELVED: usize = 256;

impl<T: Eq + Hash> Shelf<T> {
    /// The one that is equal to this.
    pub fn one(&self, values: Arc<T>) -> Arc<T> {
        let mut shelf = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = shelf.get(&values) {
            return Arc::clone(known);
        }
        if shelf.len() >= LEAST_SHELVED && shelf.len() == shelf.capacity() {
            shelf.retain(|known| Arc::strong_count(known) > 1);
        }
        shelf.insert(Arc::clone(&values));
        values
    }
}

/// What the server is asked when a transaction is over in which `changed` may have been set, and ties may have been made.
/// Its one parameter is [`names`]. `None`: nothing.
///
/// It is asked under whatever `search_path` the client has set, so that everything in it says where it is from.
pub fn question(changed: &Changed, ties: Ties) -> Option<String> {
    let mut parts = Vec::new();
    if changed.reset {
        parts.push(
            "SELECT 's' OPERATOR(pg_catalog.||) name OPERATOR(pg_catalog.||) '=' OPERATOR(pg_catalog.||) setting \
             FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session' \
             AND name OPERATOR(pg_catalog.!~~) 'transaction\\_%'"
                .to_owned(),
        );
    }
    if !changed.is_empty() {
        let mut asked = "SELECT 'n' OPERATOR(pg_catalog.||) asked OPERATOR(pg_catalog.||) \
             coalesce('=' OPERATOR(pg_catalog.||) pg_catalog.current_setting(asked, true), '') \
             FROM pg_catalog.unnest($1::pg_catalog.text[]) asked"
            .to_owned();
        if changed.reset {
            // Of the others it was just said whether they are set.
            asked += " WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_settings \
                WHERE pg_catalog.lower(name) OPERATOR(pg_catalog.=) asked)";
        }
        parts.push(asked);
    }
    for tie in ties.iter() {
        let (letter, there) = match tie {
            Tie::AdvisoryLock => (
                'a',
                "SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
                 AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted",
            ),
            Tie::TemporaryTable => (
                't',
                "SELECT FROM pg_catalog.pg_depend WHERE refclassid OPERATOR(pg_catalog.=) \
                 'pg_catalog.pg_namespace'::pg_catalog.regclass::pg_catalog.oid \
                 AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()",
            ),
            Tie::HoldableCursor => ('c', "SELECT FROM pg_catalog.pg_cursors WHERE is_holdable"),
            Tie::Listen => ('l', "SELECT pg_catalog.pg_listening_channels()"),
            Tie::PreparedStatement => ('p', "SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql"),
        };
        parts.push(format!("SELECT '{letter}' WHERE EXISTS ({there})"));
    }
    (!parts.is_empty()).then(|| {
        let asked = parts.join(" UNION ALL ");
        // A parameter that is not used would have no type; and no limit is what NULL means.
        if changed.is_empty() { format!("{asked} LIMIT $1::pg_catalog.int8") } else { asked }
    })
}

/// The parameter of [`question`]: the names that are asked for one by one, as an array.
pub fn names(changed: &Changed, values: &Values) -> Option<String> {
    if changed.is_empty() {
        return None;
    }
    let more = values.by_name.keys().filter(|name| changed.reset && is_hidden(name));
    let mut array = String::from("{");
    for name in changed.names.iter().chain(more) {
        if array.len() > 1 {
            array.push(',');
        }
        array.push('"');
        for letter in name.chars() {
            if matches!(letter, '"' | '\\') {
                array.push('\\');
            }
            array.push(letter);
        }
        array.push('"');
    }
    array.push('}');
    Some(array)
}

/// What came of a [`question`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What the server has now.
    pub server: Values,
    /// What the client has now: where the server is as it began, what the client came with counts.
    pub client: Values,
    pub ties: Ties,
}

impl Found {
    /// A client that wants no warnings, as `former` says, has not changed that: then the server's level is not its own.
    pub fn keep_silence(&mut self, former: &Values, changed: &Changed) {
        if former.hides_warnings()
            && self.client.get(MESSAGES) == Some(WARNING)
            && !changed.names.contains(MESSAGES)
            && let Some(level) = former.get(MESSAGES)
        {
            let mut by_name = std::mem::take(&mut self.client).by_name;
            by_name.insert(MESSAGES.to_owned(), level.to_owned());
            self.client = Values::new(by_name);
        }
    }

    /// `before`: what the server had; `startup`: what the client came with.
    pub fn read(
        rows: impl IntoIterator<Item = String>,
        changed: &Changed,
        before: &Values,
        startup: &Values,
    ) -> Found {
        let mut server = if changed.reset { BTreeMap::new() } else { before.by_name.clone() };
        let mut ties = Vec::new();
        for row in rows {
            let (letter, rest) = row.split_at_checked(1).unwrap_or_default();
            match (letter, rest.split_once('=')) {
                ("s", Some((name, value))) => {
                    server.insert(name.to_ascii_lowercase(), value.to_owned());
                }
                // Nobody is anybody but the one who came in.
                ("n", Some((ROLE, "none"))) => {
                    server.remove(ROLE);
                }
                // An application's own setting is empty once it is reset, and not unknown, wherever its client goes.
                ("n", Some((name, value))) => {
                    server.insert(name.to_owned(), value.to_owned());
                }
                // It is no setting.
                ("n", None) => {
                    server.remove(rest);
                }
                ("a", _) => ties.push(Tie::AdvisoryLock),
                ("t", _) => ties.push(Tie::TemporaryTable),
                ("c", _) => ties.push(Tie::HoldableCursor),
                ("l", _) => ties.push(Tie::Listen),
                ("p", _) => ties.push(Tie::PreparedStatement),
                _ => {}
            }
        }
        let mut client = server.clone();
        if changed.reset {
            for (name, value) in &startup.by_name {
                client.entry(name.clone()).or_insert_with(|| value.clone());
            }
        }
        Found { server: Values::new(server), client: Values::new(client), ties: Ties::of(&ties) }
    }
}

/// Is it left out of `pg_settings`? What extensions and applications named is, and who somebody is.
fn is_hidden(name: &str) -> bool {
    name.contains('.') || name == ROLE || name == SESSION_AUTHORIZATION
}

#[cfg(test)]
mod tests;
