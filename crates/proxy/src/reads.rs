//! Which statements provably read, so that a standby answers them as the primary would.
//!
//! A statement is taken for a read if it is one statement that can only read, calls nothing but functions of which the server
//! says that they change nothing ([`Functions`]), and asks nothing that each server answers for itself. Whatever is not
//! certain goes to the primary: being wrong in that direction costs a little of its time. What is left to go wrong, say a
//! view that calls a function that writes, a standby refuses, and then the primary is asked and the text is remembered ([`Texts`]).
//!
//! Leaves out which standby, and whether it has seen what the client wrote ([`crate::positions`]). Hazard: a function whose
//! effect a standby does not refuse, as taking an advisory lock, which would be taken where nobody else looks for it.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

use crate::sql::{Token, Tokens, unquoted};

/// The names of all functions, those that change nothing behind a `q`, the others behind an `x`: by the volatility that the
/// server has noted of them in any schema, so that it does not matter where a name is looked for. Of the volatile ones some
/// only tell time or chance. What begins with `pg_` tells of the server that is asked, or acts on it.
pub const FUNCTIONS_QUERY: &[u8] = b"SELECT CASE WHEN pg_catalog.bool_and(\
     proname OPERATOR(pg_catalog.!~) '^(pg_|inet_|txid_)' AND (provolatile OPERATOR(pg_catalog.<>) 'v' \
     OR pronamespace OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace::pg_catalog.oid \
     AND proname OPERATOR(pg_catalog.=) ANY ('{random,clock_timestamp,timeofday,gen_random_uuid}'))) \
     THEN 'q' ELSE 'x' END OPERATOR(pg_catalog.||) proname::pg_catalog.text \
     FROM pg_catalog.pg_proc GROUP BY proname LIMIT $1::pg_catalog.int8";

/// Words that stand in statements that do more than read, wherever they stand. Some may be names of columns, too.
const WRITES: [&[u8]; 16] = [
    b"insert",
    b"update",
    b"delete",
    b"merge",
    b"into",
    b"share",
    b"call",
    b"copy",
    b"do",
    b"nextval",
    b"lock",
    b"listen",
    b"notify",
    b"truncate",
    b"create",
    b"explain",
];

/// What may stand in front of a parenthesis and is no call: words of expressions, of clauses and of types.
const NO_CALLS: [&[u8]; 75] = [
    b"all",
    b"and",
    b"any",
    b"array",
    b"as",
    b"asc",
    b"between",
    b"bit",
    b"by",
    b"case",
    b"cast",
    b"char",
    b"character",
    b"coalesce",
    b"collation",
    b"cross",
    b"cube",
    b"dec",
    b"decimal",
    b"desc",
    b"distinct",
    b"else",
    b"escape",
    b"except",
    b"exists",
    b"extract",
    b"fetch",
    b"filter",
    b"first",
    b"float",
    b"from",
    b"full",
    b"greatest",
    b"group",
    b"grouping",
    b"having",
    b"ilike",
    b"in",
    b"inner",
    b"intersect",
    b"interval",
    b"is",
    b"join",
    b"lateral",
    b"least",
    b"left",
    b"like",
    b"limit",
    b"materialized",
    b"natural",
    b"not",
    b"nullif",
    b"numeric",
    b"offset",
    b"on",
    b"only",
    b"or",
    b"ordinality",
    b"over",
    b"recursive",
    b"right",
    b"rollup",
    b"row",
    b"select",
    b"sets",
    b"similar",
    b"some",
    b"then",
    b"time",
    b"timestamp",
    b"union",
    b"using",
    b"values",
    b"varchar",
    b"when",
];

/// Behind them stands a name, and a parenthesis behind that is no call either.
const NAMES_FOLLOW: [&[u8]; 3] = [b"as", b"recursive", b"with"];

/// What the server says of its functions ([`FUNCTIONS_QUERY`]).
#[derive(Debug, Default)]
pub struct Functions {
    /// By name: does none of that name change anything?
    change_nothing: HashMap<Box<[u8]>, bool>,
}

impl FromIterator<Vec<u8>> for Functions {
    fn from_iter<I: IntoIterator<Item = Vec<u8>>>(rows: I) -> Functions {
        let split = |row: Vec<u8>| row.split_first().map(|(kind, name)| (name.into(), *kind == b'q'));
        Functions { change_nothing: rows.into_iter().filter_map(split).collect() }
    }
}

impl Functions {
    /// Does this text provably read, and mean the same on every server? Without the zero behind it; under
    /// `standard_conforming_strings` and in an encoding in which no byte of a letter looks like a quote
    /// ([`is_readable`]).
    pub fn only_read_in(&self, text: &[u8]) -> bool {
        only_reads(text, |before, last| self.may_open(before, last))
    }

    /// A parenthesis behind these two: is it no call, or one that changes nothing?
    fn may_open(&self, before: Option<Token<'_>>, last: Option<Token<'_>>) -> bool {
        let is_named = before.is_some_and(|before| NAMES_FOLLOW.iter().any(|word| before.is_word(word)));
        match last {
            Some(Token::Word(word)) => {
                // Some of these words are names that a user's function can have, too.
                let known = self.change_nothing.get(&*word.to_ascii_lowercase());
                is_named || *known.unwrap_or(&is_among(&NO_CALLS, word))
            }
            Some(Token::Quoted(name)) => {
                is_named || self.change_nothing.get(&*unquoted(name, b'"')).is_some_and(|quiet| *quiet)
            }
            Some(Token::Symbol(_) | Token::Text(_)) | None => true,
        }
    }
}

/// As [`Functions::only_read_in`] for somebody who knows no function: what it refuses does more than read, whatever its functions
/// do.
pub fn may_only_read(text: &[u8]) -> bool {
    only_reads(text, |_, _| true)
}

/// `may_open`: what a parenthesis behind these two may do.
fn only_reads(text: &[u8], may_open: impl Fn(Option<Token<'_>>, Option<Token<'_>>) -> bool) -> bool {
    let mut tokens = Tokens::of(text).filter(|token| *token != Token::Symbol(b';')).peekable();
    if several(text) {
        return false;
    }
    // `(SELECT …) UNION …`
    while tokens.next_if_eq(&Token::Symbol(b'(')).is_some() {}
    let begins = [&b"select"[..], b"with", b"values", b"table"];
    if !tokens.peek().is_some_and(|first| begins.iter().any(|word| first.is_word(word))) {
        return false;
    }
    let (mut before, mut last) = (None, None);
    for token in tokens {
        let fits = match token {
            Token::Word(word) => !is_among(&WRITES, word) && !is_the_servers_own(word),
            Token::Quoted(name) => !is_the_servers_own(name),
            Token::Symbol(b'(') => may_open(before, last),
            Token::Symbol(_) | Token::Text(_) => true,
        };
        if !fits {
            return false;
        }
        (before, last) = (last, Some(token));
    }
    true
}

/// Can a text be told apart into words? Encodings in which a byte of a letter can be a quote or a backslash cannot
/// (manual 24.3.1: those that are for clients only).
pub fn is_readable(client_encoding: &[u8], standard_conforming_strings: &[u8]) -> bool {
    let for_clients_only = [&b"BIG5"[..], b"GB18030", b"GBK", b"JOHAB", b"SHIFT_JIS_2004", b"SJIS", b"UHC"];
    standard_conforming_strings == b"on"
        && !for_clients_only.iter().any(|encoding| client_encoding.eq_ignore_ascii_case(encoding))
}

/// More than one statement.
fn several(text: &[u8]) -> bool {
    text.contains(&b';')
        && Tokens::of(text).skip_while(|token| *token != Token::Symbol(b';')).nth(1).is_some()
}

fn is_among(words: &[&[u8]], word: &[u8]) -> bool {
    words.iter().any(|known| word.eq_ignore_ascii_case(known))
}

/// What each server says of itself: `pg_stat_activity`, `pg_locks`, `pg_is_in_recovery` and so on.
fn is_the_servers_own(name: &[u8]) -> bool {
    let prefix = name.get(..3).unwrap_or_default();
    prefix.eq_ignore_ascii_case(b"pg_") && !is_among(&REPLICATED, name)
}

/// Names with PostgreSQL's prefix that mean the same on each server: system catalogs, which are replicated as other tables
/// are (manual 53), views of nothing else (manual 54), and functions that read nothing else (manual 9.27.5). Drivers
/// look up types in them, and libraries their tables.
const REPLICATED: [&[u8]; 56] = [
    b"pg_aggregate",
    b"pg_am",
    b"pg_amop",
    b"pg_amproc",
    b"pg_attrdef",
    b"pg_attribute",
    b"pg_auth_members",
    b"pg_cast",
    b"pg_catalog",
    b"pg_class",
    b"pg_collation",
    b"pg_constraint",
    b"pg_conversion",
    b"pg_database",
    b"pg_depend",
    b"pg_description",
    b"pg_enum",
    b"pg_event_trigger",
    b"pg_extension",
    b"pg_foreign_server",
    b"pg_foreign_table",
    b"pg_function_is_visible",
    b"pg_get_constraintdef",
    b"pg_get_expr",
    b"pg_get_functiondef",
    b"pg_get_indexdef",
    b"pg_get_partkeydef",
    b"pg_get_triggerdef",
    b"pg_get_userbyid",
    b"pg_get_viewdef",
    b"pg_index",
    b"pg_indexes",
    b"pg_inherits",
    b"pg_language",
    b"pg_matviews",
    b"pg_namespace",
    b"pg_opclass",
    b"pg_operator",
    b"pg_opfamily",
    b"pg_partitioned_table",
    b"pg_policy",
    b"pg_proc",
    b"pg_range",
    b"pg_rewrite",
    b"pg_roles",
    b"pg_sequence",
    b"pg_shdescription",
    b"pg_statistic_ext",
    b"pg_table_is_visible",
    b"pg_tables",
    b"pg_tablespace",
    b"pg_trigger",
    b"pg_type",
    b"pg_type_is_visible",
    b"pg_user",
    b"pg_views",
];

/// How many texts are remembered; then all of them are forgotten, and learnt once more.
const MAX_REMEMBERED: usize = 10_000;

/// Texts that are known for something.
#[derive(Debug, Default)]
pub struct Texts {
    texts: Mutex<HashSet<u64>>,
}

impl Texts {
    pub fn remember(&self, text: &[u8]) {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if texts.len() >= MAX_REMEMBERED {
            texts.clear();
        }
        texts.insert(hash(text));
    }

    /// A text may be taken for another one, once in a lifetime of the universe.
    pub fn remembers(&self, text: &[u8]) -> bool {
        let texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        !texts.is_empty() && texts.contains(&hash(text))
    }
}

fn hash(text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
