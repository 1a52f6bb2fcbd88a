//! Other proxies' files as the `[proxy]` part of a herd file.
//!
//! Reads `pgbouncer.ini` ([`pgbouncer`]) and `pgpool.conf` ([`pgpool`]), and the hba and ident files that they name or that lie beside
//! them, and says of each setting what becomes of it: it is taken, or pgherd does so by itself, or it is not taken, and why.
//!
//! Leaves out: everything but the proxy (nodes, failover scripts, replication), and every secret: files of passwords are not
//! opened, and of a line that holds one the value is not told. Hazard: a setting that is passed over in silence, and was what
//! an installation rested on; so an unknown one is named.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_core::spec::Span;
use pgherd_core::spec::hba::HbaLine;
use pgherd_core::spec::ident::IdentLine;
use pgherd_proxy::hba::Hba;
use serde::Serialize;

mod pgbouncer;
mod pgpool;

/// Files that include each other end.
const MOST_FILES: usize = 64;
const MAX_FILE_BYTES: usize = 1 << 20;

/// What becomes of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Taken,
    /// pgherd does so by itself.
    Implied,
    NotTaken,
    /// Nobody knows it: a slip of the pen, or of a version that is not known here.
    Unknown,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Outcome::Taken => "taken",
            Outcome::Implied => "implied",
            Outcome::NotTaken => "not taken",
            Outcome::Unknown => "unknown",
        }
    }
}

/// One setting of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    pub file: String,
    pub line: usize,
    /// As it is called there.
    pub key: String,
    pub outcome: Outcome,
    /// The key of the herd file, or why there is none.
    pub note: String,
}

/// A value for the herd file, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    /// As TOML.
    pub value: String,
    pub from: String,
}

/// What came of the files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Imported {
    pub files: Vec<String>,
    /// Of `[proxy]`, by key.
    pub proxy: BTreeMap<&'static str, Value>,
    /// `[proxy.databases]` and `[proxy.users]`.
    pub databases: BTreeMap<String, Value>,
    pub users: BTreeMap<String, Value>,
    /// For `hba` of `[postgres]`, in their order.
    pub hba: Vec<Value>,
    /// For `ident` of `[postgres]`.
    pub ident: Vec<Value>,
    /// Those of its lines.
    #[serde(skip)]
    maps: BTreeSet<String>,
    pub settings: Vec<Setting>,
}

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("cannot read {}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} has more than {MAX_FILE_BYTES} bytes, and is no such file", .path.display())]
    TooLarge { path: PathBuf },
    #[error("{file}:{line}: {what}")]
    Line { file: String, line: usize, what: &'static str },
    #[error("more than {MOST_FILES} files include each other")]
    TooManyFiles,
}

/// Reads them in their order; where two say the same, the first counts.
pub fn import(files: &[PathBuf]) -> Result<Imported, ImportError> {
    let mut imported = Imported::default();
    for path in files {
        let text = imported.read(path)?;
        match is_pgbouncers(&text) {
            true => pgbouncer::import(&mut imported, path, &text)?,
            false => pgpool::import(&mut imported, path, &text)?,
        }
    }
    Ok(imported)
}

/// It alone has sections.
fn is_pgbouncers(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim();
        matches!(line, "[pgbouncer]" | "[databases]" | "[users]" | "[peers]") || line.starts_with("%include")
    })
}

impl Imported {
    /// Something in them could not be understood.
    pub fn has_unknown(&self) -> bool {
        self.settings.iter().any(|setting| setting.outcome == Outcome::Unknown)
    }

    fn read(&mut self, path: &Path) -> Result<String, ImportError> {
        if self.files.len() >= MOST_FILES {
            return Err(ImportError::TooManyFiles);
        }
        let bytes =
            std::fs::read(path).map_err(|source| ImportError::Read { path: path.to_owned(), source })?;
        if bytes.len() > MAX_FILE_BYTES {
            return Err(ImportError::TooLarge { path: path.to_owned() });
        }
        self.files.push(path.display().to_string());
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn note(&mut self, at: &At<'_>, key: &str, outcome: Outcome, note: impl Into<String>) {
        let (file, line) = (at.file.to_owned(), at.line);
        self.settings.push(Setting { file, line, key: key.to_owned(), outcome, note: note.into() });
    }

    /// Takes a value for a key of `[proxy]`, unless an earlier file has it.
    fn take(&mut self, at: &At<'_>, key: &str, to: &'static str, value: String) {
        match self.proxy.get(to) {
            Some(first) => {
                let note = format!("{to} is given before, by {}", first.from);
                self.note(at, key, Outcome::NotTaken, note);
            }
            None => {
                self.proxy.insert(to, Value { value, from: at.of(key) });
                self.note(at, key, Outcome::Taken, format!("proxy.{to}"));
            }
        }
    }

    /// A number that the herd file takes, or a remark.
    fn take_number(&mut self, at: &At<'_>, key: &str, text: &str, to: &'static str, least: u64, most: u64) {
        match text.parse::<u64>() {
            Ok(number) if (least..=most).contains(&number) => self.take(at, key, to, number.to_string()),
            _ => {
                let note = format!("{to} of the herd file is {least} to {most}");
                self.note(at, key, Outcome::NotTaken, note);
            }
        }
    }

    /// A time in seconds, with a fraction maybe. `zero`: what the herd file says for 0, if it can be said there.
    fn take_seconds(&mut self, at: &At<'_>, key: &str, text: &str, to: &'static str, zero: Option<&str>) {
        let seconds = text.strip_suffix('s').unwrap_or(text).trim().parse::<f64>().ok();
        let ms = seconds.filter(|seconds| (0.0..1e9).contains(seconds)).map(|seconds| (seconds * 1e3) as u64);
        match (ms, zero) {
            (Some(0), Some(word)) => self.take(at, key, to, quoted(word)),
            (Some(0), None) => {
                self.note(at, key, Outcome::NotTaken, format!("proxy.{to} is a time, and cannot be none"));
            }
            (Some(ms), _) => {
                self.take(at, key, to, quoted(&Span(Duration::from_millis(ms)).to_string()));
            }
            (None, _) => self.note(at, key, Outcome::Unknown, "it is no number of seconds"),
        }
    }

    fn take_roles(&mut self, at: &At<'_>, key: &str, text: &str, to: &'static str) {
        let roles = text.split([',', ' ', '\t']).map(str::trim).filter(|role| !role.is_empty());
        let (own, roles): (Vec<&str>, Vec<&str>) = roles.partition(|role| role.starts_with("pgherd_"));
        if roles.is_empty() || !own.is_empty() {
            return self.note(at, key, Outcome::NotTaken, "it names no role that comes in through a proxy");
        }
        let quoted: Vec<String> = roles.iter().map(|role| quoted(role)).collect();
        self.take(at, key, to, format!("[{}]", quoted.join(", ")));
    }

    /// Lines of an hba file, as far as a proxy of the herd and its PostgreSQL have the same idea of them.
    fn hba(&mut self, path: &Path) -> Result<(), ImportError> {
        let text = self.read(path)?;
        let file = path.display().to_string();
        for (number, line) in (1..).zip(text.lines()) {
            let at = At { file: &file, line: number };
            let rule = line.split('#').next().unwrap_or_default().trim();
            if rule.is_empty() {
                continue;
            }
            let words: Vec<&str> = rule.split_whitespace().collect();
            let kind = words[0].to_ascii_lowercase();
            let method = words.iter().rev().find(|word| !word.contains('=')).copied().unwrap_or_default();
            let shown: String = words[..words.len().min(3)].join(" ");
            if kind == "local" {
                self.note(&at, &shown, Outcome::NotTaken, "clients of a proxy come over TCP");
            } else if Hba::parse([rule]).is_err() {
                self.note(&at, &shown, Outcome::Unknown, "it is no line that PostgreSQL reads");
            } else if matches!(method, "scram-sha-256" | "reject") {
                self.hba.push(Value { value: quoted(rule), from: format!("{file}:{number}") });
                self.note(&at, &shown, Outcome::Taken, "postgres.hba");
            } else if method == "cert" {
                match HbaLine::parse(rule, None).map(|line| line.map) {
                    Ok(Some((map, _))) if !self.maps.contains(&map) => {
                        let note = format!("no line that was taken belongs to the map {map}");
                        self.note(&at, &shown, Outcome::NotTaken, note);
                    }
                    Ok(_) => {
                        self.hba.push(Value { value: quoted(rule), from: format!("{file}:{number}") });
                        let note = "postgres.hba; list its roles in certificate_users of [proxy]";
                        self.note(&at, &shown, Outcome::Taken, note);
                    }
                    Err(error) => self.note(&at, &shown, Outcome::NotTaken, error.to_string()),
                }
            } else {
                let note = format!("the method {method}: clients prove themselves with scram-sha-256");
                self.note(&at, &shown, Outcome::NotTaken, note);
            }
        }
        Ok(())
    }

    /// Lines of an ident file.
    fn ident(&mut self, path: &Path) -> Result<(), ImportError> {
        let text = self.read(path)?;
        let file = path.display().to_string();
        for (number, line) in (1..).zip(text.lines()) {
            let at = At { file: &file, line: number };
            let rule = line.trim();
            if rule.is_empty() || rule.starts_with('#') {
                continue;
            }
            let shown = rule.split_whitespace().next().unwrap_or_default().to_owned();
            match IdentLine::parse(rule, None) {
                Ok(line) => {
                    self.maps.insert(line.map);
                    self.ident.push(Value { value: quoted(rule), from: format!("{file}:{number}") });
                    self.note(&at, &shown, Outcome::Taken, "postgres.ident");
                }
                Err(error) => self.note(&at, &shown, Outcome::NotTaken, error.to_string()),
            }
        }
        Ok(())
    }

    /// The part of a herd file, which is valid by itself, with everything else as remarks below it.
    pub fn to_toml(&self) -> String {
        let mut text =
            format!("# Made from {}. Nothing is in it that pgherd has by itself.\n", self.files.join(", "));
        let mut line = |left: String, from: &str| {
            writeln!(text, "{left:<40} # {from}").expect("writing to a String cannot fail");
        };
        if !(self.proxy.is_empty() && self.databases.is_empty() && self.users.is_empty()) {
            line("[proxy]".to_owned(), "belongs into the herd file");
        }
        for (key, value) in &self.proxy {
            line(format!("{key} = {}", value.value), &value.from);
        }
        for (table, values) in [("databases", &self.databases), ("users", &self.users)] {
            if !values.is_empty() {
                line(format!("\n[proxy.{table}]"), "pool, for these");
                for (name, value) in values {
                    line(format!("{} = {}", quoted(name), value.value), &value.from);
                }
            }
        }
        if !(self.hba.is_empty() && self.ident.is_empty()) {
            text.push_str(
                "\n[postgres]                               # add these lines to the one that is there\n",
            );
        }
        for (key, values) in [("hba", &self.hba), ("ident", &self.ident)] {
            if values.is_empty() {
                continue;
            }
            writeln!(text, "{key} = [").expect("writing to a String cannot fail");
            for value in values {
                writeln!(
                    text,
                    "  {},{:>width$} # {}",
                    value.value,
                    "",
                    value.from,
                    width = 36_usize.saturating_sub(value.value.len())
                )
                .expect("writing to a String cannot fail");
            }
            text.push_str("]\n");
        }
        for outcome in [Outcome::Unknown, Outcome::NotTaken, Outcome::Implied] {
            let of: Vec<&Setting> =
                self.settings.iter().filter(|setting| setting.outcome == outcome).collect();
            if !of.is_empty() {
                writeln!(text, "\n# {}:", outcome.word()).expect("writing to a String cannot fail");
            }
            for Setting { file, line, key, note, .. } in of {
                writeln!(text, "#   {file}:{line}: {key}: {note}").expect("writing to a String cannot fail");
            }
        }
        text
    }
}

/// A line of a file.
struct At<'a> {
    file: &'a str,
    line: usize,
}

impl At<'_> {
    fn of(&self, key: &str) -> String {
        format!("{}:{}: {key}", self.file, self.line)
    }
}

/// As TOML; also right where a name or a value holds what would end a remark.
fn quoted(text: &str) -> String {
    toml_edit::Value::from(text).to_string()
}

/// What becomes of a setting, by its name.
#[derive(Clone, Copy)]
enum Fate {
    Implied(&'static str),
    Not(&'static str),
}

impl Imported {
    fn fate(&mut self, at: &At<'_>, key: &str, fate: Fate) {
        match fate {
            Fate::Implied(why) => self.note(at, key, Outcome::Implied, why),
            Fate::Not(why) => self.note(at, key, Outcome::NotTaken, why),
        }
    }
}

#[cfg(test)]
mod tests;
