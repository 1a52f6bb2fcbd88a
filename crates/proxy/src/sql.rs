//! What a statement may do to the session it runs in, as far as its text tells.
//!
//! A server connection goes from client to client only if nothing of the former one is left in it. What a statement leaves is
//! known to the server alone (a lock may not have been granted, a `SET` may be rolled back), so the text decides nothing but
//! what to ask the server for when the transaction is over: [`Effects`]. Most statements have none, and that costs a look at
//! the first word and one search for a few words ([`effects`]).
//!
//! It reads tokens, not grammar, and when in doubt it finds too much: then one question is asked in vain.
//!
//! Leaves out: what functions do behind the text. `SELECT f()` whose body calls `set_config` looks like any other SELECT, here
//! as in every pooler; such an application needs session pooling. Hazard: an effect that is not found stays in a connection
//! that somebody else is given.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::LazyLock;

use aho_corasick::automaton::Automaton;
use aho_corasick::dfa::DFA;
use aho_corasick::{Anchored, StartKind};

/// Kinds of state that hold a session to its server, and that the server can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tie {
    AdvisoryLock,
    TemporaryTable,
    HoldableCursor,
    Listen,
    /// By SQL; those of the protocol move.
    PreparedStatement,
}

impl Tie {
    pub const ALL: [Tie; 5] =
        [Tie::AdvisoryLock, Tie::TemporaryTable, Tie::HoldableCursor, Tie::Listen, Tie::PreparedStatement];
}

impl fmt::Display for Tie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tie::AdvisoryLock => "an advisory lock",
            Tie::TemporaryTable => "a temporary table",
            Tie::HoldableCursor => "a cursor with hold",
            Tie::Listen => "LISTEN",
            Tie::PreparedStatement => "a statement prepared by SQL",
        })
    }
}

/// Several of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ties(u8);

impl Ties {
    pub const NONE: Ties = Ties(0);
    pub const ALL: Ties = Ties(0b1_1111);

    pub fn of(ties: &[Tie]) -> Ties {
        Ties(ties.iter().fold(0, |bits, tie| bits | 1 << *tie as u8))
    }

    pub fn contains(self, tie: Tie) -> bool {
        self.0 & 1 << tie as u8 != 0
    }

    #[must_use]
    pub fn and(self, other: Ties) -> Ties {
        Ties(self.0 | other.0)
    }

    pub fn is_empty(self) -> bool {
        self == Ties::NONE
    }

    pub fn iter(self) -> impl Iterator<Item = Tie> {
        Tie::ALL.into_iter().filter(move |tie| self.contains(*tie))
    }
}

/// Which settings a statement may have changed for longer than its transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// In lower case. Some of them may be no settings at all.
    pub names: BTreeSet<String>,
    /// Any may be as it was at the beginning again.
    pub reset: bool,
}

impl Changed {
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && !self.reset
    }

    pub fn absorb(&mut self, other: &Changed) {
        self.names.extend(other.names.iter().cloned());
        self.reset |= other.reset;
    }
}

/// What nobody can move or ask for: the session keeps its server until it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmovable {
    Library,
    RandomSeed,
    /// `set_config` with a name that is not written in the statement.
    UnknownSetting,
    /// Longer than is read.
    TooLarge,
    /// The server did not say what is in it.
    Unanswered,
}

impl fmt::Display for Unmovable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unmovable::Library => "a library that it has loaded",
            Unmovable::RandomSeed => "the seed of random()",
            Unmovable::UnknownSetting => "a setting whose name is not in its statement",
            Unmovable::TooLarge => "a query that was too long to be read",
            Unmovable::Unanswered => "what its server does not say",
        })
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub changed: Changed,
    /// They may be there afterwards, or may be gone.
    pub ties: Ties,
    pub unmovable: Option<Unmovable>,
    /// All prepared statements are gone, those of the protocol, too.
    pub forgets_statements: bool,
    /// It asks for a number that a sequence gave this session before.
    pub recalls_sequences: bool,
}

impl Effects {
    /// Of a statement that was not read to its end, and holds a word that matters.
    pub fn unknown() -> Effects {
        Effects {
            changed: Changed { names: BTreeSet::new(), reset: true },
            ties: Ties::ALL,
            unmovable: Some(Unmovable::TooLarge),
            forgets_statements: true,
            recalls_sequences: true,
        }
    }

    pub fn is_none(&self) -> bool {
        let Effects { changed, ties, unmovable, forgets_statements, recalls_sequences } = self;
        changed.is_empty()
            && ties.is_empty()
            && unmovable.is_none()
            && !(*forgets_statements || *recalls_sequences)
    }

    pub fn absorb(&mut self, other: &Effects) {
        self.changed.absorb(&other.changed);
        self.ties = self.ties.and(other.ties);
        self.unmovable = self.unmovable.or(other.unmovable);
        self.forgets_statements |= other.forgets_statements;
        self.recalls_sequences |= other.recalls_sequences;
    }
}

/// Parts of words that matter wherever they stand.
const WORDS: [&str; 7] = ["set_config", "advisory", "temp", "hold", "setseed", "lastval", "currval"];
/// The longest of them, less one: so much of a piece may be the beginning of a word.
pub const WORD_OVERLAP_BYTES: usize = 9;

/// For each state of the search, the state behind each byte: [`FOUND`] behind the last one of a word. The first one is where
/// a search begins.
type Steps = Vec<[u8; 256]>;
const FOUND: u8 = u8::MAX;

/// Every text is searched, by one step for each of its bytes: an automaton of the library is walked through once, and what a
/// search could be asked for besides is left behind.
static SEARCH: LazyLock<Steps> = LazyLock::new(|| {
    let words = DFA::builder()
        .ascii_case_insensitive(true)
        .start_kind(StartKind::Unanchored)
        .build(WORDS)
        .expect("seven short words");
    let mut states = vec![words.start_state(Anchored::No).expect("it is built for this")];
    let mut steps = Steps::new();
    while let Some(state) = states.get(steps.len()).copied() {
        steps.push(std::array::from_fn(|byte| {
            let next = words.next_state(Anchored::No, state, byte as u8);
            if words.is_match(next) {
                return FOUND;
            }
            let known = states.iter().position(|state| *state == next).unwrap_or(states.len());
            if known == states.len() {
                states.push(next);
            }
            u8::try_from(known)
                .ok()
                .filter(|known| *known != FOUND)
                .expect("a state for each of their letters")
        }));
    }
    steps
});

/// Is one of [`WORDS`] in it?
fn has_word(text: &[u8]) -> bool {
    let steps = &**SEARCH;
    let mut state = 0;
    text.iter().any(|byte| {
        state = steps[usize::from(state)][usize::from(*byte)];
        state == FOUND
    })
}

/// First words of statements that matter.
const HEADS: [&[u8]; 11] = [
    b"set",
    b"reset",
    b"discard",
    b"listen",
    b"unlisten",
    b"load",
    b"prepare",
    b"deallocate",
    b"do",
    b"drop",
    b"close",
];

/// Of a whole text, without the zero behind it.
pub fn effects(text: &[u8]) -> Effects {
    let several = memchr::memchr(b';', text).is_some_and(|at| !is_blank(&text[at + 1..]));
    let (word, _) = first_word(text);
    let matters = HEADS.iter().any(|head| word.eq_ignore_ascii_case(head));
    if !several && !matters && !has_word(text) {
        return Effects::default();
    }
    let mut reader = Reader { effects: Effects::default(), everywhere: false };
    reader.read(text, 0);
    reader.effects
}

/// Could a piece of a text that is too long to be read matter? To be asked with [`WORD_OVERLAP_BYTES`] of the piece before
/// in front.
pub fn may_matter(piece: &[u8]) -> bool {
    // Behind a semicolon any head can stand.
    has_word(piece) || piece.contains(&b';') || HEADS.iter().any(|head| contains_word(piece, head))
}

fn contains_word(piece: &[u8], word: &[u8]) -> bool {
    piece.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word))
}

/// Does it ask for what a sequence gave before? A quick look at bytes as they came, whatever they are.
pub fn may_recall_sequences(bytes: &[u8]) -> bool {
    memchr::memchr2_iter(b'v', b'V', bytes).any(|at| {
        let word = bytes.get(at.saturating_sub(4)..at + 3).unwrap_or_default();
        word.eq_ignore_ascii_case(b"currval") || word.eq_ignore_ascii_case(b"lastval")
    })
}

/// Could it end a transaction? Its first word decides; what begins otherwise, or holds several statements, could.
pub fn may_commit(text: &[u8]) -> bool {
    let text = text.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text);
    let (word, _) = first_word(text);
    let ends = [&b"commit"[..], b"end", b"prepare", b"call", b"do"];
    word.is_empty()
        || memchr::memchr(b';', text).is_some()
        || ends.iter().any(|end| word.eq_ignore_ascii_case(end))
}

/// What a statement does that only begins or only ends a transaction, so that nobody can tell whether it is done now or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bracket {
    /// With the tag that answers it.
    Begin(&'static str),
    Commit,
    Rollback,
}

/// How they begin.
const BRACKETS: [&[u8]; 6] = [b"begin", b"start", b"commit", b"end", b"rollback", b"abort"];

/// `None`: something else, or not certain to succeed, as `BEGIN READ WRITE` is not on a standby.
pub fn bracket(text: &[u8]) -> Option<Bracket> {
    let (word, _) = first_word(text);
    if !BRACKETS.iter().any(|known| word.eq_ignore_ascii_case(known)) {
        return None;
    }
    let mut tokens = Tokens::of(text);
    let Some(Token::Word(first)) = tokens.next() else { return None };
    let word = first.to_ascii_lowercase();
    let bracket = match word.as_slice() {
        b"begin" => Bracket::Begin("BEGIN"),
        b"start" if tokens.next()?.is_word(b"transaction") => Bracket::Begin("START TRANSACTION"),
        b"commit" | b"end" => Bracket::Commit,
        b"rollback" | b"abort" => Bracket::Rollback,
        _ => return None,
    };
    let mut rest: Vec<Vec<u8>> = Vec::new();
    for token in tokens {
        match token {
            Token::Word(word) => rest.push(word.to_ascii_lowercase()),
            Token::Symbol(b',') if matches!(bracket, Bracket::Begin(_)) => {}
            Token::Symbol(b';') => {}
            _ => return None,
        }
    }
    let mut words: &[Vec<u8>] = &rest;
    if word != b"start"
        && words.first().is_some_and(|word| matches!(word.as_slice(), b"work" | b"transaction"))
    {
        words = &words[1..];
    }
    if !matches!(bracket, Bracket::Begin(_)) {
        return words.is_empty().then_some(bracket);
    }
    let modes: [&[&[u8]]; 7] = [
        &[b"isolation", b"level", b"serializable"],
        &[b"isolation", b"level", b"repeatable", b"read"],
        &[b"isolation", b"level", b"read", b"committed"],
        &[b"isolation", b"level", b"read", b"uncommitted"],
        &[b"read", b"only"],
        &[b"not", b"deferrable"],
        &[b"deferrable"],
    ];
    while !words.is_empty() {
        let mode = modes
            .iter()
            .find(|mode| words.len() >= mode.len() && words.iter().zip(**mode).all(|(a, b)| a == b))?;
        words = &words[mode.len()..];
    }
    Some(bracket)
}

/// The statement that `DEALLOCATE [PREPARE] name` names, if that is all there is: its name, and where that stands.
pub fn deallocated(text: &[u8]) -> Option<(Vec<u8>, std::ops::Range<usize>)> {
    let (word, _) = first_word(text);
    if !word.eq_ignore_ascii_case(b"deallocate") {
        return None;
    }
    let mut tokens = Tokens::of(text);
    tokens.next()?;
    let (mut token, mut range) = tokens.next_with_range()?;
    if token.is_word(b"prepare")
        && let Some(next) = tokens.next_with_range()
        && !matches!(next.0, Token::Symbol(_))
    {
        (token, range) = next;
    }
    let name = match token {
        Token::Word(b) if b.eq_ignore_ascii_case(b"all") => return None,
        Token::Word(word) => word.to_ascii_lowercase(),
        Token::Quoted(name) => unquoted(name, b'"'),
        _ => return None,
    };
    tokens.all(|rest| rest == Token::Symbol(b';')).then_some((name, range))
}

/// `ALL`, or `PREPARE ALL`.
fn is_all(mut rest: Tokens<'_>) -> bool {
    let first = rest.next();
    let all = |token: Option<Token<'_>>| token.is_some_and(|token| token.is_word(b"all"));
    all(first) || first.is_some_and(|token| token.is_word(b"prepare")) && all(rest.next())
}

fn is_blank(text: &[u8]) -> bool {
    text.iter().all(u8::is_ascii_whitespace)
}

/// Behind blanks and comments; and what follows it.
pub(crate) fn first_word(text: &[u8]) -> (&[u8], &[u8]) {
    let mut tokens = Tokens::of(text);
    tokens.skip_blanks();
    let rest = &text[tokens.at..];
    let end = rest.iter().position(|byte| !is_word_byte(*byte)).unwrap_or(rest.len());
    rest.split_at(end)
}

fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

pub(crate) fn unquoted(quoted: &[u8], quote: u8) -> Vec<u8> {
    let mut plain = Vec::with_capacity(quoted.len());
    let mut bytes = quoted.iter().copied();
    while let Some(byte) = bytes.next() {
        plain.push(byte);
        if byte == quote {
            bytes.next();
        }
    }
    plain
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token<'a> {
    Word(&'a [u8]),
    /// What stands between double quotes.
    Quoted(&'a [u8]),
    /// What stands between single quotes or dollar quotes.
    Text(&'a [u8]),
    Symbol(u8),
}

impl Token<'_> {
    pub(crate) fn is_word(self, word: &[u8]) -> bool {
        matches!(self, Token::Word(known) if known.eq_ignore_ascii_case(word))
    }
}

/// Manual 4.1, as far as it takes to know where words begin and texts end.
#[derive(Clone, Debug)]
pub(crate) struct Tokens<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        self.next_with_range().map(|(token, _)| token)
    }
}

impl<'a> Tokens<'a> {
    pub(crate) fn of(text: &'a [u8]) -> Tokens<'a> {
        Tokens { text, at: 0 }
    }

    fn rest(&self) -> &'a [u8] {
        &self.text[self.at.min(self.text.len())..]
    }

    fn skip_blanks(&mut self) {
        loop {
            let rest = self.rest();
            if rest.first().is_some_and(u8::is_ascii_whitespace) || rest.first() == Some(&0x0b) {
                self.at += 1;
            } else if rest.starts_with(b"--") {
                self.at += rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')).unwrap_or(rest.len());
            } else if rest.starts_with(b"/*") {
                self.at += comment(rest);
            } else {
                return;
            }
        }
    }

    fn next_with_range(&mut self) -> Option<(Token<'a>, std::ops::Range<usize>)> {
        self.skip_blanks();
        let (begin, rest) = (self.at, self.rest());
        let (token, length) = match *rest.first()? {
            b'"' => quoted(rest, b'"', false, Token::Quoted),
            b'\'' => quoted(rest, b'\'', false, Token::Text),
            b'e' | b'E' if rest.get(1) == Some(&b'\'') => {
                let (token, length) = quoted(&rest[1..], b'\'', true, Token::Text);
                (token, length + 1)
            }
            b'$' => dollar(rest),
            byte if is_word_byte(byte) => {
                let end = |byte: &u8| !is_word_byte(*byte) && *byte != b'$';
                let length = rest.iter().position(end).unwrap_or(rest.len());
                (Token::Word(&rest[..length]), length)
            }
            byte => (Token::Symbol(byte), 1),
        };
        self.at += length;
        Some((token, begin..self.at))
    }
}

/// How long a comment is; they can be nested.
fn comment(text: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

fn quoted<'a>(
    text: &'a [u8],
    quote: u8,
    escapes: bool,
    token: impl Fn(&'a [u8]) -> Token<'a>,
) -> (Token<'a>, usize) {
    let mut at = 1;
    while at < text.len() {
        if escapes && text[at] == b'\\' {
            at += 2;
        } else if text[at] != quote {
            at += 1;
        } else if text.get(at + 1) == Some(&quote) {
            at += 2;
        } else {
            return (token(&text[1..at]), at + 1);
        }
    }
    (token(&text[1..]), text.len())
}

/// `$tag$ … $tag$`, or a lonely dollar: a parameter.
fn dollar(text: &[u8]) -> (Token<'_>, usize) {
    let tag = text[1..].iter().position(|byte| !is_word_byte(*byte)).map_or(text.len(), |end| end + 1);
    if text.get(tag) != Some(&b'$') || text[1].is_ascii_digit() {
        return (Token::Symbol(b'$'), 1);
    }
    let (quote, body) = text.split_at(tag + 1);
    let end = body.windows(quote.len()).position(|part| part == quote);
    match end {
        Some(end) => (Token::Text(&body[..end]), quote.len() + end + quote.len()),
        None => (Token::Text(body), text.len()),
    }
}

/// So many tokens are looked at for the end of a call; each call of a text looks ahead, and is looked ahead at.
const MAX_CALL_TOKENS: usize = 64;

/// How deep texts inside of texts are read: a DO block that executes a text that holds a text.
const MAX_DEPTH: usize = 4;

struct Reader {
    effects: Effects,
    /// In the body of a DO block every word may begin a statement.
    everywhere: bool,
}

impl Reader {
    /// `depth`: of texts around this one.
    fn read(&mut self, text: &[u8], depth: usize) {
        let mut tokens = Tokens::of(text);
        let (mut is_head, mut in_do) = (true, false);
        while let Some(token) = tokens.next() {
            match token {
                Token::Symbol(b';') => (is_head, in_do) = (true, false),
                Token::Symbol(_) | Token::Quoted(_) => is_head = false,
                Token::Text(text) => {
                    is_head = false;
                    if (in_do || self.everywhere) && depth < MAX_DEPTH {
                        let was = std::mem::replace(&mut self.everywhere, true);
                        self.read(text, depth + 1);
                        self.everywhere = was;
                    }
                }
                Token::Word(word) => {
                    if is_head || self.everywhere {
                        in_do |= word.eq_ignore_ascii_case(b"do");
                        self.head(word, tokens.clone());
                    }
                    self.word(word, tokens.clone());
                    is_head = false;
                }
            }
        }
    }

    fn tie(&mut self, tie: Tie) {
        self.effects.ties = self.effects.ties.and(Ties::of(&[tie]));
    }

    /// The first word of a statement, and what follows it.
    fn head(&mut self, word: &[u8], rest: Tokens<'_>) {
        match word.to_ascii_lowercase().as_slice() {
            b"set" => self.set(rest),
            b"reset" => self.effects.changed.reset = true,
            b"discard" => {
                self.effects.ties = Ties::ALL;
                self.effects.changed.reset = true;
                self.effects.forgets_statements |= is_all(rest);
            }
            b"listen" | b"unlisten" => self.tie(Tie::Listen),
            b"load" => self.effects.unmovable = Some(Unmovable::Library),
            b"prepare" => self.tie(Tie::PreparedStatement),
            b"deallocate" => {
                self.tie(Tie::PreparedStatement);
                self.effects.forgets_statements |= is_all(rest);
            }
            // The last of them may be gone.
            b"drop" => self.tie(Tie::TemporaryTable),
            b"close" => self.tie(Tie::HoldableCursor),
            _ => {}
        }
    }

    /// `SET [SESSION | LOCAL] …`, manual: SET, SET ROLE, SET SESSION AUTHORIZATION, SET TRANSACTION, SET CONSTRAINTS.
    fn set(&mut self, mut rest: Tokens<'_>) {
        let mut next = |name: &mut Vec<u8>| {
            *name = match rest.next() {
                Some(Token::Word(word)) => word.to_ascii_lowercase(),
                Some(Token::Quoted(quoted)) => unquoted(quoted, b'"').to_ascii_lowercase(),
                _ => return None,
            };
            Some(())
        };
        let (mut name, mut second) = (Vec::new(), Vec::new());
        if next(&mut name).is_none() {
            return;
        }
        if name == b"session" {
            let Some(()) = next(&mut name) else { return };
            match name.as_slice() {
                b"authorization" => name = b"session_authorization".to_vec(),
                b"characteristics" => {
                    let defaults = ["deferrable", "isolation", "read_only"];
                    let names = defaults.map(|name| format!("default_transaction_{name}"));
                    self.effects.changed.names.extend(names);
                    return;
                }
                _ => {}
            }
        }
        match name.as_slice() {
            b"local" | b"transaction" | b"constraints" => return,
            b"time" => name = b"timezone".to_vec(),
            b"names" => name = b"client_encoding".to_vec(),
            b"schema" => name = b"search_path".to_vec(),
            b"xml" => name = b"xmloption".to_vec(),
            _ => {}
        }
        // `SET x TO DEFAULT` and `SET x = DEFAULT`.
        let mut ahead = rest.clone();
        let mut behind = ahead.next();
        // An application may name its own in as many parts as it likes.
        while matches!(behind, Some(Token::Symbol(b'.'))) {
            let mut next = |name: &mut Vec<u8>| match ahead.next() {
                Some(Token::Word(word)) => *name = word.to_ascii_lowercase(),
                Some(Token::Quoted(quoted)) => *name = unquoted(quoted, b'"').to_ascii_lowercase(),
                _ => {}
            };
            second.clear();
            next(&mut second);
            name.push(b'.');
            name.extend_from_slice(&second);
            behind = ahead.next();
        }
        if ahead.next().is_some_and(|value| value.is_word(b"default")) {
            self.effects.changed.reset = true;
        }
        if let Ok(name) = String::from_utf8(name) {
            self.effects.changed.names.insert(name);
        }
    }

    /// Any word, and what follows it.
    fn word(&mut self, word: &[u8], mut rest: Tokens<'_>) {
        let word = word.to_ascii_lowercase();
        let contains = |part: &[u8]| contains_word(&word, part);
        if word == b"set_config" {
            self.set_config(rest);
        } else if contains(b"advisory") {
            // Those of a transaction end with it.
            if !contains(b"advisory_xact") {
                self.tie(Tie::AdvisoryLock);
            }
        } else if matches!(word.as_slice(), b"temp" | b"temporary") || word.starts_with(b"pg_temp") {
            self.tie(Tie::TemporaryTable);
        } else if word == b"hold" {
            self.tie(Tie::HoldableCursor);
        } else if word == b"setseed" && rest.next() == Some(Token::Symbol(b'(')) {
            self.effects.unmovable = Some(Unmovable::RandomSeed);
        } else if matches!(word.as_slice(), b"lastval" | b"currval") {
            self.effects.recalls_sequences = true;
        }
    }

    /// `set_config(name, value, is_local)`.
    fn set_config(&mut self, mut rest: Tokens<'_>) {
        if rest.next() != Some(Token::Symbol(b'(')) {
            return;
        }
        let name = rest.next();
        let ends = rest.next() == Some(Token::Symbol(b','));
        // A value, up to the third argument.
        let (mut depth, mut local, mut is_whole) = (0, None, false);
        for token in rest.take(MAX_CALL_TOKENS) {
            match token {
                Token::Symbol(b'(') => depth += 1,
                Token::Symbol(b')') if depth == 0 => {
                    is_whole = true;
                    break;
                }
                Token::Symbol(b')') => depth -= 1,
                Token::Symbol(b',') if depth == 0 => local = None,
                Token::Word(word) => local = Some(word),
                _ => local = None,
            }
        }
        let local = local.filter(|_| is_whole);
        match name {
            Some(Token::Text(name)) if ends => {
                if !local.is_some_and(|word| word.eq_ignore_ascii_case(b"true")) {
                    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
                    self.effects.changed.names.insert(name);
                }
            }
            _ if local.is_some_and(|word| word.eq_ignore_ascii_case(b"true")) => {}
            _ => self.effects.unmovable = Some(Unmovable::UnknownSetting),
        }
    }
}

#[cfg(test)]
mod tests;
