//! Prepared statements that follow their client from server to server.
//!
//! A client calls a statement by a name of its own ([`Names`]). Servers know it by a name that all clients share, since it
//! stands for the same thing everywhere: the same text, the same parameter types, prepared under the same settings
//! ([`Registry`]). Before a client uses one, its server must have it ([`Known`]): if not it is parsed there once more, in front
//! of whatever needs it.
//!
//! Both sides are told of a statement when it is sent, and are put right when the server has refused or skipped it: what a
//! client believes of its own names must be what a server of its own would say.
//!
//! Leaves out: messages. Hazard: a name that means one text to the proxy and another one to the server answers a client's
//! question with somebody else's statement.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::sql::{self, Effects};

/// What all names of the proxy's own begin with.
pub const PREFIX: &[u8] = b"pgherd_";
/// There is no statement without a name.
pub const NONE: u64 = 0;
/// There may be one.
pub const UNKNOWN: u64 = u64::MAX;
/// The registry forgets what nobody has any more whenever it has grown by this factor.
const GROWTH: usize = 2;
const LEAST_SWEPT: usize = 1024;
const LEAST_SWEPT_BYTES: usize = 64 << 20;
/// Long messages of clients that are under way and not whole, together: else each client could have its own in memory.
pub const MAX_GATHERED_BYTES: usize = 256 << 20;
/// Statements that all clients together have prepared: texts, each once, and their clients' names for them.
pub const MAX_KEPT_BYTES: usize = 1 << 30;
/// What a name takes besides itself.
const NAME_BYTES: usize = 160;
/// Of what is never heard of again: see [`pgherd_pgwire::flow::Flow::in_doubt`].
pub const NO_TICKET: u64 = u64::MAX;
/// A list that grew beyond this is given back when it is empty.
const KEPT_OPEN: usize = 64;
/// A longer text is not kept to be overwritten by the next one, and is counted.
const SHORT_BYTES: usize = 4096;

/// A text that was or will be prepared.
#[derive(Debug)]
pub struct Statement {
    number: u64,
    /// On servers.
    name: Box<[u8]>,
    key: Key,
    effects: Effects,
    may_commit: bool,
    is_retired: AtomicBool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    text: Arc<Text>,
    types: Box<[u32]>,
    meaning: u64,
}

/// As long as anybody has it, it takes its room.
#[derive(Debug)]
struct Text {
    bytes: Box<[u8]>,
    _room: Room,
}

impl PartialEq for Text {
    fn eq(&self, other: &Text) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Text {}

impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bytes.hash(state);
    }
}

impl Statement {
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    pub fn text(&self) -> &[u8] {
        &self.key.text.bytes
    }

    /// Of the parameters, as far as they were given.
    pub fn types(&self) -> &[u32] {
        &self.key.types
    }

    /// Under which settings ([`crate::settings::Values::meaning`]).
    pub fn meaning(&self) -> u64 {
        self.key.meaning
    }

    pub fn effects(&self) -> &Effects {
        &self.effects
    }

    pub fn may_commit(&self) -> bool {
        self.may_commit
    }

    /// Its rows are not what its clients were told: a table has changed. Nobody parses it again, since a client that has
    /// not asked anew would take the new rows for the old ones.
    pub fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::Relaxed)
    }
}

/// All statements of all clients, each once.
#[derive(Debug)]
pub struct Registry {
    by_key: Mutex<ByKey>,
    next_number: AtomicU64,
    gathered: Arc<Account>,
    kept: Arc<Account>,
}

impl Default for Registry {
    fn default() -> Registry {
        Registry::with_room(MAX_KEPT_BYTES)
    }
}

/// Memory of which all clients together get so much.
#[derive(Debug)]
struct Account {
    taken_bytes: AtomicUsize,
    most_bytes: usize,
}

impl Account {
    fn new(most_bytes: usize) -> Arc<Account> {
        Arc::new(Account { taken_bytes: AtomicUsize::new(0), most_bytes })
    }

    fn room_for(self: &Arc<Account>, bytes: usize) -> Option<Room> {
        let add = |taken: usize| taken.checked_add(bytes).filter(|all| *all <= self.most_bytes);
        self.taken_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        Some(Room { of: Arc::clone(self), bytes })
    }

    fn taken_bytes(&self) -> usize {
        self.taken_bytes.load(Ordering::Relaxed)
    }
}

/// A part of it, for as long as it is there.
#[derive(Debug)]
pub struct Room {
    of: Arc<Account>,
    bytes: usize,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.of.taken_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct ByKey {
    statements: HashMap<Key, Weak<Statement>>,
    sweep_at: usize,
    sweep_at_bytes: usize,
}

impl ByKey {
    /// Forgets what nobody has any more.
    fn sweep(&mut self, kept: &Account) {
        self.statements.retain(|_, statement| statement.strong_count() > 0);
        self.sweep_at = self.statements.len() * GROWTH;
        self.sweep_at_bytes = kept.taken_bytes() * GROWTH;
    }

    fn must_be_swept(&self, kept: &Account) -> bool {
        self.statements.len() >= self.sweep_at.max(LEAST_SWEPT)
            || kept.taken_bytes() >= self.sweep_at_bytes.max(LEAST_SWEPT_BYTES)
    }
}

impl Registry {
    /// For so many bytes of what was prepared.
    pub fn with_room(bytes: usize) -> Registry {
        Registry {
            by_key: Mutex::default(),
            next_number: AtomicU64::new(0),
            gathered: Account::new(MAX_GATHERED_BYTES),
            kept: Account::new(bytes),
        }
    }

    /// `None`: there is no room for it.
    pub fn of(&self, text: &[u8], types: &[u32], meaning: u64) -> Option<Arc<Statement>> {
        Some(self.one(Key { text: self.text(text)?, types: types.into(), meaning }))
    }

    /// The same one under other settings, or anew where it has been retired.
    pub fn again(&self, statement: &Statement, meaning: u64) -> Arc<Statement> {
        self.one(Key { meaning, ..statement.key.clone() })
    }

    /// One of which no server has heard, and which no other client will get.
    pub fn unshared(&self, text: &[u8], types: &[u32], meaning: u64) -> Option<Arc<Statement>> {
        Some(self.fresh(Key { text: self.text(text)?, types: types.into(), meaning }))
    }

    fn text(&self, text: &[u8]) -> Option<Arc<Text>> {
        Some(Arc::new(Text { bytes: text.into(), _room: self.room_to_keep(text.len())? }))
    }

    /// For what a client has prepared, and will use again.
    pub fn room_to_keep(&self, bytes: usize) -> Option<Room> {
        self.kept.room_for(bytes).or_else(|| {
            self.by_key().sweep(&self.kept);
            self.kept.room_for(bytes)
        })
    }

    /// For a client's name.
    pub fn room_for_name(&self, name: &[u8]) -> Option<Room> {
        self.room_to_keep(NAME_BYTES + name.len())
    }

    fn by_key(&self) -> MutexGuard<'_, ByKey> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn one(&self, key: Key) -> Arc<Statement> {
        let mut by_key = self.by_key();
        if by_key.must_be_swept(&self.kept) {
            by_key.sweep(&self.kept);
        }
        let entry = by_key.statements.entry(key);
        if let Entry::Occupied(known) = &entry
            && let Some(statement) = known.get().upgrade()
        {
            return statement;
        }
        let statement = self.fresh(entry.key().clone());
        let weak = Arc::downgrade(&statement);
        entry.and_modify(|known| *known = weak.clone()).or_insert(weak);
        statement
    }

    fn fresh(&self, key: Key) -> Arc<Statement> {
        let number = self.number();
        let name = [PREFIX, number.to_string().as_bytes()].concat().into();
        let (effects, may_commit) = (sql::effects(&key.text.bytes), sql::may_commit(&key.text.bytes));
        Arc::new(Statement { number, name, key, effects, may_commit, is_retired: AtomicBool::new(false) })
    }

    /// For a message that comes in parts and must be seen whole. `None`: others are being gathered that take it all.
    pub fn room_for(&self, bytes: usize) -> Option<Room> {
        self.gathered.room_for(bytes)
    }

    /// Never given before.
    pub fn number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A server has found that a table has changed. Who prepares the same text from now on gets another statement.
    pub fn retire(&self, statement: &Statement) {
        statement.is_retired.store(true, Ordering::Relaxed);
        let mut by_key = self.by_key();
        let is_it = |known: &Weak<Statement>| std::ptr::eq(known.as_ptr(), statement);
        if by_key.statements.get(&statement.key).is_some_and(is_it) {
            by_key.statements.remove(&statement.key);
        }
    }
}

/// What must be done before a server can be asked for a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Nothing,
    Parse,
    /// It may be there, and may be another one.
    CloseAndParse,
}

/// The statements of one server.
#[derive(Debug)]
pub struct Known {
    by_number: HashMap<u64, Held>,
    uses: u64,
    /// The number of the unnamed one.
    unnamed: u64,
    most: usize,
}

#[derive(Debug)]
struct Held {
    statement: Arc<Statement>,
    last_use: u64,
    is_sure: bool,
}

impl Known {
    /// At most so many.
    pub fn new(most: usize) -> Known {
        Known { by_number: HashMap::new(), uses: 0, unnamed: NONE, most: most.max(1) }
    }

    pub fn is_empty(&self) -> bool {
        self.by_number.is_empty()
    }

    pub fn len(&self) -> usize {
        self.by_number.len()
    }

    /// From now on the statement is taken to be there.
    pub fn need(&mut self, statement: &Arc<Statement>) -> Need {
        self.uses += 1;
        match self.by_number.entry(statement.number) {
            Entry::Vacant(vacant) => {
                let statement = Arc::clone(statement);
                vacant.insert(Held { statement, last_use: self.uses, is_sure: true });
                Need::Parse
            }
            Entry::Occupied(mut held) => {
                let held = held.get_mut();
                held.last_use = self.uses;
                match std::mem::replace(&mut held.is_sure, true) {
                    true => Need::Nothing,
                    false => Need::CloseAndParse,
                }
            }
        }
    }

    /// It is there for certain.
    pub fn has(&self, statement: &Statement) -> bool {
        self.by_number.get(&statement.number).is_some_and(|held| held.is_sure)
    }

    /// One too many: the one that was used longest ago, which is to be closed.
    pub fn evict(&mut self) -> Option<Arc<Statement>> {
        if self.by_number.len() <= self.most {
            return None;
        }
        let (&oldest, _) = self.by_number.iter().min_by_key(|(_, held)| held.last_use)?;
        self.by_number.remove(&oldest).map(|held| held.statement)
    }

    /// Nobody knows whether it is there.
    pub fn doubt(&mut self, statement: &Arc<Statement>) {
        let unknown = || Held { statement: Arc::clone(statement), last_use: self.uses, is_sure: false };
        self.by_number.entry(statement.number).or_insert_with(unknown).is_sure = false;
    }

    pub fn doubt_all(&mut self) {
        self.by_number.values_mut().for_each(|held| held.is_sure = false);
    }

    /// The server has none.
    pub fn clear(&mut self) {
        self.by_number.clear();
        self.unnamed = NONE;
    }

    /// [`NONE`], [`UNKNOWN`], or that of the statement without a name.
    pub fn unnamed(&self) -> u64 {
        self.unnamed
    }

    pub fn set_unnamed(&mut self, number: u64) {
        self.unnamed = number;
    }
}

/// A statement without a name, which lives until the next one, or the next simple query.
#[derive(Debug, Default)]
pub struct Unnamed {
    /// Never given again; or [`NONE`].
    pub number: u64,
    pub text: Vec<u8>,
    pub types: Vec<u32>,
    pub effects: Effects,
    pub may_commit: bool,
    /// If it is long.
    room: Option<Room>,
}

impl Unnamed {
    fn is_short(&self) -> bool {
        self.text.capacity() <= SHORT_BYTES
    }
}

/// What a client's names mean to it.
#[derive(Debug, Default)]
pub struct Names {
    by_name: HashMap<Box<[u8]>, Named>,
    unnamed: Unnamed,
    /// One that is over, whose memory serves the next one.
    spare: Unnamed,
    /// What the server has not confirmed, in the order in which it was sent.
    open: VecDeque<Change>,
}

#[derive(Debug)]
struct Named {
    statement: Arc<Statement>,
    /// The number of the query in which it was first bound or described; 0: none yet.
    used_in: u64,
    _room: Room,
}

/// What a request changes, and what was before it.
#[derive(Debug)]
struct Change {
    ticket: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    /// A name of the client's. `parsed`: which the server parses for it.
    Name {
        name: Box<[u8]>,
        former: Option<Named>,
        parsed: Option<Arc<Statement>>,
    },
    /// The statement without a name.
    Unnamed(Unnamed),
    /// The server's only: it is parsed, or closed, for the proxy's own need.
    Server(Arc<Statement>),
    ServerUnnamed,
}

impl Names {
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.by_name.get(name).map(|named| &named.statement)
    }

    /// It is bound or described in the query with this number, counted from 1.
    pub fn use_in(&mut self, name: &[u8], query: u64) -> Option<Arc<Statement>> {
        let named = self.by_name.get_mut(name)?;
        if named.used_in == 0 {
            named.used_in = query;
        }
        Some(Arc::clone(&named.statement))
    }

    /// Before this query it was neither bound nor described, so that nobody was told of its rows.
    pub fn is_new_in(&self, name: &[u8], query: u64) -> bool {
        self.by_name.get(name).is_some_and(|named| named.used_in == 0 || named.used_in == query)
    }

    /// As if nobody had used it yet, and as if it had been parsed only now.
    pub fn renew(&mut self, name: &[u8], statement: Arc<Statement>) {
        if let Some(named) = self.by_name.get_mut(name) {
            (named.statement, named.used_in) = (statement, 0);
        }
    }

    /// As if it had not been parsed.
    pub fn undo(&mut self, name: &[u8]) {
        self.by_name.remove(name);
    }

    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    pub fn unnamed(&self) -> &Unnamed {
        &self.unnamed
    }

    fn change(&mut self, ticket: u64, what: What) {
        // Nobody will ever confirm it or take it back.
        if ticket != NO_TICKET {
            self.open.push_back(Change { ticket, what });
        }
    }

    fn give_back(&mut self) {
        if self.open.is_empty() && self.open.capacity() > KEPT_OPEN {
            self.open = VecDeque::new();
        }
    }

    /// By the request with this ticket. `is_parsed`: by the server, and not only here.
    pub fn define(
        &mut self,
        name: &[u8],
        statement: Arc<Statement>,
        room: Room,
        ticket: u64,
        is_parsed: bool,
    ) {
        let parsed = is_parsed.then(|| Arc::clone(&statement));
        let former = self.by_name.insert(name.into(), Named { statement, used_in: 0, _room: room });
        self.change(ticket, What::Name { name: name.into(), former, parsed });
    }

    /// Prepared under other settings now; it is the same to the client.
    pub fn replace(&mut self, name: &[u8], statement: Arc<Statement>) {
        if let Some(known) = self.by_name.get_mut(name) {
            known.statement = statement;
        }
    }

    pub fn remove(&mut self, name: &[u8], ticket: u64) {
        let former = self.by_name.remove(name);
        self.change(ticket, What::Name { name: name.into(), former, parsed: None });
    }

    /// The statement without a name, which takes room if it is long. `None`: there is none.
    pub fn define_unnamed(
        &mut self,
        registry: &Registry,
        text: &[u8],
        types: impl Iterator<Item = u32>,
        ticket: u64,
    ) -> Option<u64> {
        let room = match text.len() > SHORT_BYTES {
            true => Some(registry.room_to_keep(text.len())?),
            false => None,
        };
        let number = registry.number();
        let mut unnamed = std::mem::take(&mut self.spare);
        (unnamed.number, unnamed.room) = (number, room);
        unnamed.text.clear();
        unnamed.text.extend_from_slice(text);
        unnamed.types.clear();
        unnamed.types.extend(types);
        (unnamed.effects, unnamed.may_commit) = match &self.unnamed {
            // Drivers say the same again and again.
            former if former.text == text && !text.is_empty() => (former.effects.clone(), former.may_commit),
            _ => (sql::effects(text), sql::may_commit(text)),
        };
        let former = std::mem::replace(&mut self.unnamed, unnamed);
        self.change(ticket, What::Unnamed(former));
        Some(number)
    }

    pub fn remove_unnamed(&mut self, ticket: u64) {
        let former = std::mem::take(&mut self.unnamed);
        self.change(ticket, What::Unnamed(former));
    }

    /// By a simple query, which is read whether anything has failed before or not.
    pub fn forget_unnamed(&mut self) {
        self.unnamed.number = NONE;
        if !self.unnamed.is_short() {
            self.unnamed = Unnamed::default();
        }
    }

    /// A statement is parsed, or closed, for the proxy's own need.
    pub fn at_server(&mut self, statement: Arc<Statement>, ticket: u64) {
        self.change(ticket, What::Server(statement));
    }

    pub fn unnamed_at_server(&mut self, ticket: u64) {
        self.change(ticket, What::ServerUnnamed);
    }

    #[cfg(test)]
    pub(crate) fn open_changes(&self) -> usize {
        self.open.len()
    }

    pub fn clear(&mut self) {
        self.by_name.clear();
        self.forget_unnamed();
    }

    /// The request with this ticket was done.
    pub fn confirm(&mut self, ticket: u64) {
        // Most often it is the first one, or there is none.
        if self.open.front().is_some_and(|change| change.ticket == ticket)
            && let Some(Change { what: What::Unnamed(former), .. }) = self.open.pop_front()
            && former.is_short()
        {
            self.spare = former;
        }
        self.give_back();
    }

    /// The request with this ticket was not done, and all behind it will be skipped. A statement without a name that cannot
    /// be parsed has taken the place of the former one first: `exec_parse_message` in `postgres.c`.
    pub fn refuse(&mut self, ticket: u64) {
        let found = self.open.iter_mut().find(|change| change.ticket == ticket);
        if let Some(Change { what: What::Unnamed(former), .. }) = found {
            former.number = NONE;
        }
    }

    /// Requests before this ticket that were not confirmed never will be: takes back what they changed.
    pub fn settle(&mut self, ticket: u64, known: &mut Known) {
        let undone = self.open.iter().take_while(|change| change.ticket < ticket).count();
        for Change { what, .. } in self.open.drain(..undone).rev() {
            match what {
                What::Name { name, former, parsed } => {
                    if let Some(parsed) = parsed {
                        known.doubt(&parsed);
                    }
                    match former {
                        Some(former) => self.by_name.insert(name, former),
                        None => self.by_name.remove(&name),
                    };
                }
                What::Unnamed(former) => {
                    self.unnamed = former;
                    known.set_unnamed(UNKNOWN);
                }
                What::Server(statement) => known.doubt(&statement),
                What::ServerUnnamed => known.set_unnamed(UNKNOWN),
            }
        }
        self.give_back();
    }
}

#[cfg(test)]
mod tests;
