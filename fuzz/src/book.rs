//! A server by the book, as far as it takes to hold a conversation: it reads what the proxy sends and answers each request
//! with words that nobody else uses.
//!
//! Statements and portals by name, transactions, errors that skip to the next Sync, COPY in both directions. Leaves out
//! what SQL means: a text says itself what becomes of it (`broken` cannot be parsed, `fails` fails, everything unknown is
//! a row). Hazard: a rule that this server breaks shows up as a mistake of the proxy.

use std::collections::BTreeMap;

use pgherd_pgwire::message::{ClientMessage, Target};

use crate::wire::{self, message, text};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    No,
    /// `simple`: by a simple query.
    In {
        simple: bool,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct Book {
    /// The beginning of a message.
    unread: Vec<u8>,
    statements: BTreeMap<Vec<u8>, Vec<u8>>,
    portals: BTreeMap<Vec<u8>, Vec<u8>>,
    status: u8,
    skips: bool,
    copying: Copying,
    is_gone: bool,
    /// In every answer that holds a text, so that no two are alike.
    name: u8,
    serial: u32,
    answers: Vec<u8>,
}

impl Book {
    pub(crate) fn new(name: u8) -> Book {
        Book {
            unread: Vec::new(),
            statements: BTreeMap::new(),
            portals: BTreeMap::new(),
            status: b'I',
            skips: false,
            copying: Copying::No,
            is_gone: false,
            name,
            serial: 0,
            answers: Vec::new(),
        }
    }

    pub(crate) fn take_answers(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.answers)
    }

    /// Whether it could serve somebody else as it is.
    pub(crate) fn owes_nothing(&self) -> bool {
        self.answers.is_empty()
            && self.unread.is_empty()
            && self.status == b'I'
            && self.copying == Copying::No
            && !self.skips
            && !self.is_gone
    }

    pub(crate) fn reads(&mut self, bytes: &[u8]) {
        let mut unread = std::mem::take(&mut self.unread);
        unread.extend_from_slice(bytes);
        let (messages, rest) = wire::whole_messages(&unread);
        for (kind, body) in messages {
            if !self.is_gone {
                self.read(kind, body);
            }
        }
        self.unread = rest.to_vec();
    }

    fn says(&mut self, kind: u8, body: &[u8]) {
        self.answers.extend(message(kind, body));
    }

    fn is_ready(&mut self) {
        if self.status == b'I' {
            self.portals.clear();
        }
        let status = self.status;
        self.says(b'Z', &[status]);
    }

    /// A text that nobody has said before.
    fn word(&mut self, begin: &[u8]) -> Vec<u8> {
        self.serial += 1;
        let serial = format!(" {}{}", char::from(self.name), self.serial);
        [begin, serial.as_bytes()].concat()
    }

    fn fails(&mut self, simple: bool) {
        let word = self.word(b"no");
        let message = String::from_utf8_lossy(&word).into_owned();
        self.answers.extend(wire::report(
            b'E',
            &[(b'S', "ERROR"), (b'V', "ERROR"), (b'C', "42601"), (b'M', &message)],
        ));
        self.copying = Copying::No;
        if self.status == b'T' {
            self.status = b'E';
        }
        if simple {
            self.is_ready();
        } else {
            self.skips = true;
        }
    }

    fn dies(&mut self) {
        self.answers.extend(wire::error("FATAL", "08P01"));
        self.is_gone = true;
    }

    fn read(&mut self, kind: u8, body: &[u8]) {
        if let Copying::In { simple } = self.copying {
            match kind {
                b'd' | b'S' | b'H' => {}
                b'c' => {
                    self.copying = Copying::No;
                    self.completes(b"COPY");
                    if simple {
                        self.is_ready();
                    }
                }
                b'f' => self.fails(simple),
                _ => self.dies(),
            }
            return;
        }
        if self.skips && kind != b'S' && kind != b'X' {
            return;
        }
        // Outside of a COPY they are read over, whatever is in them.
        if matches!(kind, b'd' | b'c' | b'f') {
            return;
        }
        let Ok(asked) = ClientMessage::parse(kind, body) else {
            return self.fails(matches!(kind, b'Q' | b'F'));
        };
        match asked {
            ClientMessage::Query { text } => self.query(text),
            ClientMessage::Parse(parse) => {
                let is_taken = !parse.name.is_empty() && self.statements.contains_key(parse.name);
                if parse.name.is_empty() {
                    self.statements.remove(parse.name);
                }
                if is_taken || parse.text == b"broken" {
                    return self.fails(false);
                }
                self.statements.insert(parse.name.to_vec(), parse.text.to_vec());
                self.says(b'1', b"");
            }
            ClientMessage::Bind(bind) => match self.statements.get(bind.statement) {
                Some(text) => {
                    self.portals.insert(bind.portal.to_vec(), text.clone());
                    self.says(b'2', b"");
                }
                None => self.fails(false),
            },
            ClientMessage::Describe { target, name } => {
                let of = if target == Target::Statement { &self.statements } else { &self.portals };
                let Some(text) = of.get(name).cloned() else { return self.fails(false) };
                if target == Target::Statement {
                    self.says(b't', &[0, 0]);
                }
                if has_rows(&text) { self.describes() } else { self.says(b'n', b"") }
            }
            ClientMessage::Execute { portal, max_rows } => match self.portals.get(portal).cloned() {
                Some(text) => self.execute(&text, max_rows),
                None => self.fails(false),
            },
            ClientMessage::Close { target, name } => {
                let of = if target == Target::Statement { &mut self.statements } else { &mut self.portals };
                of.remove(name);
                self.says(b'3', b"");
            }
            ClientMessage::Sync => {
                self.skips = false;
                self.is_ready();
            }
            ClientMessage::FunctionCall(_) if self.status == b'E' => self.fails(true),
            ClientMessage::FunctionCall(_) => {
                let word = self.word(b"value");
                self.says(b'V', &[&(word.len() as u32).to_be_bytes()[..], &word].concat());
                self.is_ready();
            }
            ClientMessage::Terminate => self.is_gone = true,
            ClientMessage::Flush
            | ClientMessage::CopyData(_)
            | ClientMessage::CopyDone
            | ClientMessage::CopyFail { .. } => {}
        }
    }

    fn query(&mut self, sql: &[u8]) {
        self.statements.remove(&b""[..]);
        if sql.is_empty() {
            self.says(b'I', b"");
            return self.is_ready();
        }
        if has_rows(sql) && self.status != b'E' && sql != b"fails" {
            self.describes();
        }
        if self.does(sql, true) {
            self.is_ready();
        }
    }

    fn execute(&mut self, sql: &[u8], max_rows: u32) {
        if sql.is_empty() {
            return self.says(b'I', b"");
        }
        if max_rows > 0 && has_rows(sql) && self.status != b'E' {
            self.row(sql);
            return self.says(b's', b"");
        }
        self.does(sql, false);
    }

    /// `false`: it has failed, or goes on with a COPY.
    fn does(&mut self, sql: &[u8], simple: bool) -> bool {
        let ends = matches!(sql, b"COMMIT" | b"ROLLBACK");
        if sql == b"broken" || sql == b"fails" || self.status == b'E' && !ends {
            self.fails(simple);
            return false;
        }
        match sql {
            b"BEGIN" => self.status = b'T',
            _ if ends => self.status = b'I',
            b"DISCARD ALL" | b"DEALLOCATE ALL" => self.statements.clear(),
            b"COPY IN" => {
                self.says(b'G', &[0, 0, 0]);
                self.copying = Copying::In { simple };
                return false;
            }
            b"COPY OUT" => {
                self.says(b'H', &[0, 0, 0]);
                let word = self.word(b"data");
                self.says(b'd', &word);
                self.says(b'c', b"");
            }
            _ => {
                if let Some(name) = sql.strip_prefix(b"DEALLOCATE ") {
                    if self.statements.remove(name).is_none() {
                        self.fails(simple);
                        return false;
                    }
                } else {
                    self.row(sql);
                }
            }
        }
        self.completes(sql);
        true
    }

    fn describes(&mut self) {
        let word = self.word(b"a");
        let column = [&word[..], b"\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0"].concat();
        self.says(b'T', &[&[0, 1][..], &column].concat());
    }

    fn row(&mut self, sql: &[u8]) {
        let word = self.word(sql);
        self.says(b'D', &[&[0, 1][..], &(word.len() as u32).to_be_bytes(), &word].concat());
    }

    fn completes(&mut self, sql: &[u8]) {
        let word = self.word(&sql[..sql.len().min(20)]);
        let tag: Vec<u8> = [&word[..], &[0]].concat();
        self.says(b'C', &tag);
    }
}

fn has_rows(sql: &[u8]) -> bool {
    let others =
        [&b"BEGIN"[..], b"COMMIT", b"ROLLBACK", b"DISCARD", b"DEALLOCATE", b"COPY", b"broken", b"fails"];
    !sql.is_empty() && !others.iter().any(|other| sql.starts_with(other))
}

/// What a client asks, for [`Book`]s.
pub(crate) fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &text(sql))
}

pub(crate) fn parse(name: &str, sql: &str) -> Vec<u8> {
    message(b'P', &[text(name), text(sql), vec![0, 0]].concat())
}

pub(crate) fn bind(statement: &str) -> Vec<u8> {
    message(b'B', &[text(""), text(statement), vec![0; 6]].concat())
}
