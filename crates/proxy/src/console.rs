//! The console: what an operator says to the proxy, and what it answers.
//!
//! Whoever connects to the database `pgbouncer` or `pgherd` speaks to the proxy itself, in PgBouncer's words, in Pgpool-II's
//! or in pgherd's ([`command`]). A [`Console`] is the conversation: it reads messages of the simple and of the extended protocol,
//! says which command is to be performed next, and writes what came of it as PostgreSQL would. Drivers that know nothing but
//! the extended protocol, or ask for binary values, get them.
//!
//! Leaves out: sockets and who may come in ([`serve`]), what commands do ([`deeds`]), and what the tables say ([`shown`]).
//! Hazard: whoever gets in can hold up every client of the proxy.

use std::collections::{HashMap, VecDeque};

use bytes::{BufMut, BytesMut};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::frame::{FrameError, Header, Phase, Piece, Scanner, Side, Spill};
use pgherd_pgwire::message::build::{self, Report, Severity};
use pgherd_pgwire::message::{ClientMessage, Format, Malformed, Target, TransactionStatus};

pub use command::{Command, Refused, Show};
pub use table::{Column, Table, Value};

pub(crate) mod aside;
mod command;
mod deeds;
mod herd;
mod pgbouncer;
mod pgpool;
pub(crate) mod serve;
pub(crate) mod shown;
mod table;

/// Nobody says more to a console.
const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Commands of one simple query.
const MOST_COMMANDS: usize = 64;
/// Statements that a client has prepared, and portals.
const MOST_NAMES: usize = 64;
/// The databases that nobody has: they are the console.
pub(crate) const DATABASES: [&str; 2] = ["pgbouncer", "pgherd"];
/// What clients take for PostgreSQL's: the oldest that this proxy serves, so that nobody expects more.
pub(super) const SERVER_VERSION: &str = concat!("14.0 (pgherd ", env!("CARGO_PKG_VERSION"), ")");

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send what was written, and read more.
    More,
    /// Perform it, and say what came of it to [`Console::performed`].
    Perform(Command),
    /// The client said goodbye.
    Left,
    /// It broke the protocol.
    Broken { sqlstate: SqlState, message: String },
}

/// What came of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub table: Option<Table>,
    /// Told beside it.
    pub notice: Option<(String, Option<String>)>,
}

impl Reply {
    pub(super) fn noticing(message: impl Into<String>) -> Reply {
        Reply { table: None, notice: Some((message.into(), None)) }
    }
}

impl From<Table> for Reply {
    fn from(table: Table) -> Reply {
        Reply { table: Some(table), notice: None }
    }
}

/// Which columns a command's table has. Known before it is performed, since clients ask before.
fn columns(command: &Command) -> Option<&'static [Column]> {
    match command {
        Command::Show(show) => shown::columns(*show),
        Command::ShowSetting(name, _) => Some(shown::setting_column(name)),
        Command::SelectOne => Some(&shown::ONE),
        _ => None,
    }
}

#[derive(Debug)]
struct Portal {
    /// `None`: the empty text.
    command: Option<Command>,
    formats: Vec<Format>,
    /// What is left of its rows, once it was performed.
    rows: Option<Performed>,
}

#[derive(Debug)]
struct Performed {
    table: Table,
    next: usize,
}

/// What is being performed, and for whom.
#[derive(Debug)]
enum Doing {
    Nothing,
    /// More of the same query follow.
    Query(VecDeque<Result<Command, Refused>>),
    Execute {
        portal: Vec<u8>,
        max_rows: usize,
    },
}

/// One conversation.
#[derive(Debug)]
pub struct Console {
    scanner: Scanner,
    spill: Spill,
    reading: Option<Header>,
    doing: Doing,
    statements: HashMap<Vec<u8>, Option<Command>>,
    portals: HashMap<Vec<u8>, Portal>,
    /// After an error of the extended protocol: up to the next Sync.
    skips: bool,
    status: TransactionStatus,
    /// May change something.
    may_act: bool,
    read: fn(&str) -> Result<Command, Refused>,
}

impl Console {
    pub fn new(may_act: bool) -> Console {
        Console::reading(command::parse, may_act)
    }

    /// One that knows other commands.
    fn reading(read: fn(&str) -> Result<Command, Refused>, may_act: bool) -> Console {
        Console {
            scanner: Scanner::new(Side::Client, Phase::Session),
            spill: Spill::new(MAX_MESSAGE_BYTES),
            reading: None,
            doing: Doing::Nothing,
            statements: HashMap::new(),
            portals: HashMap::new(),
            skips: false,
            status: TransactionStatus::Idle,
            may_act,
            read,
        }
    }

    /// Reads from the front of `input`, and writes answers to `out`.
    pub fn read(&mut self, input: &mut &[u8], out: &mut BytesMut) -> Step {
        loop {
            if let Some(command) = self.next_command(out) {
                return Step::Perform(command);
            }
            match self.message(input, out) {
                Ok(Some(Step::More)) => {}
                Ok(Some(step)) => return step,
                Ok(None) => return Step::More,
                Err((sqlstate, message)) => return Step::Broken { sqlstate, message },
            }
        }
    }

    /// What came of the command of the last [`Step::Perform`].
    pub fn performed(&mut self, command: &Command, outcome: Result<Reply, Refused>, out: &mut BytesMut) {
        let reply = match outcome {
            Ok(reply) => reply,
            Err(refused) => return self.refused(&refused, out),
        };
        if let Some((message, detail)) = &reply.notice {
            notice(message, detail.as_deref(), out);
        }
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => debug_assert!(false, "nothing was to be performed"),
            Doing::Query(rest) => {
                self.doing = Doing::Query(rest);
                if let Some(Table { columns, rows }) = &reply.table {
                    table::describe(columns, &[], out);
                    if !rows.iter().all(|values| table::row(columns, values, &[], out)) {
                        return self.refused(&too_long(), out);
                    }
                }
                complete(command.tag(), out);
            }
            Doing::Execute { portal, max_rows } => {
                match (self.portals.get_mut(&portal), reply.table) {
                    (Some(known), Some(table)) => {
                        known.rows = Some(Performed { table, next: 0 });
                        self.fetch(&portal, max_rows, out);
                    }
                    _ => complete(command.tag(), out),
                };
            }
        }
    }

    /// The next one of a simple query; `None`: it is over, or there is none.
    fn next_command(&mut self, out: &mut BytesMut) -> Option<Command> {
        loop {
            let Doing::Query(rest) = &mut self.doing else { return None };
            let Some(next) = rest.pop_front() else {
                self.doing = Doing::Nothing;
                build::ready_for_query(out, self.status);
                return None;
            };
            match next.and_then(|command| self.judge(command)) {
                Ok(command) => match self.of_transactions(&command) {
                    Some(tag) => complete(tag, out),
                    None => return Some(command),
                },
                Err(refused) => self.refused(&refused, out),
            }
        }
    }

    fn judge(&self, command: Command) -> Result<Command, Refused> {
        let ends = matches!(command, Command::Commit | Command::Rollback);
        if self.status == TransactionStatus::Failed && !ends {
            return Err(Refused::new(
                b"25P02",
                "current transaction is aborted, commands ignored until end of transaction block",
            ));
        }
        if command.acts() && !self.may_act {
            return Err(Refused::new(b"42501", format!("permission denied for {}", command.tag())).hint(
                "Roles in console_readers may SHOW; those in console_admins of [proxy] may do everything.",
            ));
        }
        Ok(command)
    }

    /// There are no transactions here, but drivers that cannot do without have them.
    fn of_transactions(&mut self, command: &Command) -> Option<&'static str> {
        match command {
            Command::Begin => self.status = TransactionStatus::InTransaction,
            Command::Commit if self.status == TransactionStatus::Failed => {
                self.status = TransactionStatus::Idle;
                return Some("ROLLBACK");
            }
            Command::Commit | Command::Rollback => self.status = TransactionStatus::Idle,
            _ => return None,
        }
        Some(command.tag())
    }

    fn refused(&mut self, refused: &Refused, out: &mut BytesMut) {
        error(refused, out);
        if self.status == TransactionStatus::InTransaction {
            self.status = TransactionStatus::Failed;
        }
        match &mut self.doing {
            Doing::Query(rest) => rest.clear(),
            _ => {
                self.doing = Doing::Nothing;
                self.skips = true;
            }
        }
    }

    /// `None`: it has not come yet.
    fn message(&mut self, input: &mut &[u8], out: &mut BytesMut) -> Result<Option<Step>, (SqlState, String)> {
        let frame = |error: FrameError| (error.sqlstate(), error.to_string());
        if self.reading.is_none() {
            match self.scanner.next(input).map_err(frame)? {
                Some(Piece::Header(header)) => self.reading = Some(header),
                _ => return Ok(None),
            }
        }
        let Some(header) = self.reading else { return Ok(None) };
        let mut spill = std::mem::replace(&mut self.spill, Spill::new(0));
        let body = self.scanner.whole(input, &mut spill).map_err(frame);
        let step = match body {
            Ok(Some(body)) => {
                self.reading = None;
                self.said(header.kind, body, out).map(Some)
            }
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        self.spill = spill;
        step
    }

    fn said(&mut self, kind: u8, body: &[u8], out: &mut BytesMut) -> Result<Step, (SqlState, String)> {
        let malformed = |error: Malformed| (error.sqlstate(), error.to_string());
        if self.skips && !matches!(kind, b'S' | b'X') {
            return Ok(Step::More);
        }
        let done = match ClientMessage::parse(kind, body).map_err(malformed)? {
            ClientMessage::Terminate => return Ok(Step::Left),
            ClientMessage::Query { text } => {
                self.query(text, out);
                Ok(())
            }
            ClientMessage::Sync => {
                self.skips = false;
                if self.status == TransactionStatus::Idle {
                    // As the end of a transaction, which ends portals.
                    self.portals.clear();
                }
                build::ready_for_query(out, self.status);
                Ok(())
            }
            ClientMessage::Flush | ClientMessage::CopyData(_) => Ok(()),
            ClientMessage::CopyDone | ClientMessage::CopyFail { .. } => Ok(()),
            ClientMessage::Parse(parse) => self.parse(parse.name, parse.text, out),
            ClientMessage::Bind(bind) => {
                let formats = bind.result_formats.iter().collect();
                self.bind(bind.portal, bind.statement, bind.values.count(), formats, out)
            }
            ClientMessage::Describe { target, name } => self.describe(target, name, out),
            ClientMessage::Close { target, name } => {
                match target {
                    Target::Statement => drop(self.statements.remove(name)),
                    Target::Portal => drop(self.portals.remove(name)),
                }
                build::close_complete(out);
                Ok(())
            }
            ClientMessage::Execute { portal, max_rows } => match self.execute(portal, max_rows as usize, out)
            {
                Ok(Some(command)) => return Ok(Step::Perform(command)),
                Ok(None) => Ok(()),
                Err(refused) => Err(refused),
            },
            ClientMessage::FunctionCall(_) => {
                error(&Refused::new(b"0A000", "there are no functions here"), out);
                build::ready_for_query(out, self.status);
                Ok(())
            }
        };
        if let Err(refused) = done {
            self.refused(&refused, out);
        }
        Ok(Step::More)
    }

    fn query(&mut self, text: &[u8], out: &mut BytesMut) {
        let commands = match self.texts(text) {
            Ok(texts) if texts.is_empty() => {
                build::empty_query_response(out);
                return build::ready_for_query(out, self.status);
            }
            Ok(texts) => texts.into_iter().map(self.read).collect(),
            Err(refused) => VecDeque::from([Err(refused)]),
        };
        self.doing = Doing::Query(commands);
    }

    fn texts<'a>(&self, text: &'a [u8]) -> Result<Vec<&'a str>, Refused> {
        let text =
            std::str::from_utf8(text).map_err(|_| Refused::new(b"22021", "a command is not valid UTF-8"))?;
        let texts = command::split(text);
        match texts.len() > MOST_COMMANDS {
            true => Err(Refused::new(b"54000", format!("more than {MOST_COMMANDS} commands in one query"))),
            false => Ok(texts),
        }
    }

    fn parse(&mut self, name: &[u8], text: &[u8], out: &mut BytesMut) -> Result<(), Refused> {
        let command = match self.texts(text)?.as_slice() {
            [] => None,
            [one] => Some(self.judge((self.read)(one)?)?),
            _ => {
                let several = "cannot insert multiple commands into a prepared statement";
                return Err(Refused::new(b"42601", several));
            }
        };
        if !name.is_empty() && self.statements.contains_key(name) {
            let name = String::from_utf8_lossy(name);
            return Err(Refused::new(b"42P05", format!("prepared statement \"{name}\" already exists")));
        }
        room(self.statements.len())?;
        self.statements.insert(name.to_vec(), command);
        build::parse_complete(out);
        Ok(())
    }

    fn bind(
        &mut self,
        portal: &[u8],
        statement: &[u8],
        values: usize,
        formats: Vec<Format>,
        out: &mut BytesMut,
    ) -> Result<(), Refused> {
        let command = self.statement(statement)?.clone();
        if values > 0 {
            let message = format!("bind message supplies {values} parameters, but a command takes none");
            return Err(Refused::new(b"08P01", message));
        }
        let count = command.as_ref().and_then(columns).map_or(0, <[Column]>::len);
        if formats.len() > 1 && formats.len() != count {
            let message =
                format!("bind message has {} result formats but query has {count} columns", formats.len());
            return Err(Refused::new(b"08P01", message));
        }
        if !portal.is_empty() && self.portals.contains_key(portal) {
            let name = String::from_utf8_lossy(portal);
            return Err(Refused::new(b"42P03", format!("cursor \"{name}\" already exists")));
        }
        room(self.portals.len())?;
        self.portals.insert(portal.to_vec(), Portal { command, formats, rows: None });
        build::bind_complete(out);
        Ok(())
    }

    fn statement(&self, name: &[u8]) -> Result<&Option<Command>, Refused> {
        self.statements.get(name).ok_or_else(|| {
            let name = String::from_utf8_lossy(name);
            Refused::new(b"26000", format!("prepared statement \"{name}\" does not exist"))
        })
    }

    fn describe(&mut self, target: Target, name: &[u8], out: &mut BytesMut) -> Result<(), Refused> {
        let (command, formats) = match target {
            Target::Statement => {
                let command = self.statement(name)?;
                if build::parameter_description(out, &[]).is_err() {
                    return Err(too_long());
                }
                (command, &[][..])
            }
            Target::Portal => {
                let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
                (&portal.command, portal.formats.as_slice())
            }
        };
        match command.as_ref().and_then(columns) {
            Some(columns) => table::describe(columns, formats, out),
            None => build::no_data(out),
        }
        Ok(())
    }

    /// What has to be performed for it, if it was not.
    fn execute(
        &mut self,
        name: &[u8],
        max_rows: usize,
        out: &mut BytesMut,
    ) -> Result<Option<Command>, Refused> {
        let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
        let Some(command) = portal.command.clone() else {
            build::empty_query_response(out);
            return Ok(None);
        };
        if portal.rows.is_some() {
            self.fetch(name, max_rows, out);
            return Ok(None);
        }
        let command = self.judge(command)?;
        if let Some(tag) = self.of_transactions(&command) {
            complete(tag, out);
            return Ok(None);
        }
        self.doing = Doing::Execute { portal: name.to_vec(), max_rows };
        Ok(Some(command))
    }

    /// The next rows of a portal that was performed.
    fn fetch(&mut self, name: &[u8], max_rows: usize, out: &mut BytesMut) {
        let Some(Portal { command: Some(command), formats, rows: Some(rows) }) = self.portals.get_mut(name)
        else {
            return;
        };
        let Performed { table: Table { columns, rows: all }, next } = rows;
        let end = match max_rows {
            0 => all.len(),
            most => all.len().min(*next + most),
        };
        let fits = all[*next..end].iter().all(|values| table::row(columns, values, formats, out));
        *next = end;
        let (is_over, tag) = (end == all.len(), command.tag());
        if !fits {
            self.refused(&too_long(), out);
        } else if max_rows > 0 && !is_over {
            // PortalSuspended.
            out.put_slice(b"s\0\0\0\x04");
        } else {
            complete(tag, out);
        }
    }
}

fn room(taken: usize) -> Result<(), Refused> {
    match taken >= MOST_NAMES {
        true => Err(Refused::new(b"54000", format!("more than {MOST_NAMES} statements or portals"))),
        false => Ok(()),
    }
}

fn no_portal(name: &[u8]) -> Refused {
    let name = String::from_utf8_lossy(name);
    Refused::new(b"34000", format!("portal \"{name}\" does not exist"))
}

fn too_long() -> Refused {
    Refused::new(b"54000", "the answer is longer than a message can be")
}

fn complete(tag: &str, out: &mut BytesMut) {
    let fits = build::command_complete(out, tag);
    debug_assert!(fits.is_ok(), "tags are short");
}

fn error(refused: &Refused, out: &mut BytesMut) {
    let Refused { sqlstate, message, detail, hint } = refused;
    let report = Report {
        severity: Severity::Error,
        sqlstate: *sqlstate,
        message,
        detail: detail.as_deref(),
        hint: hint.as_deref(),
    };
    build::error_response(out, &report);
}

fn notice(message: &str, detail: Option<&str>, out: &mut BytesMut) {
    let sqlstate = SqlState::new(b"00000").unwrap_or(SqlState::FEATURE_NOT_SUPPORTED);
    let report = Report { severity: Severity::Notice, sqlstate, message, detail, hint: None };
    build::notice_response(out, &report);
}

#[cfg(test)]
mod tests;
