//! From TOML to typed values, collecting every mistake on the way.
//!
//! A reader never stops at a mistake: a value that cannot be read is `None` to the caller, is told once, and
//! its place is remembered as broken, so that rules which rest on it stay silent.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use pgherd_core::spec::{Place, Step, nearest};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::duration;
use super::finding::{Findings, Kind, Mistake};

/// The longest text that is read; a herd of the greatest size is a hundredth of it.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// One key of a file: the definition from which reading, "did you mean" and the reference page come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) name: &'static str,
    /// What it takes, for messages and the reference.
    pub(super) takes: &'static str,
    /// As it is written after the equals sign, or the header of a table.
    pub(super) example: &'static str,
    /// Empty where the key is required.
    pub(super) default: &'static str,
    pub(super) doc: &'static str,
    /// Whether this version implements it.
    pub(super) built: bool,
}

/// A table of a file and the keys that it may have.
#[derive(Debug)]
pub(super) struct Section {
    /// As it is written: `[[cluster.node]]`, empty for the top of the file.
    pub(super) header: &'static str,
    pub(super) keys: &'static [Key],
}

/// A key that is built.
pub(super) const fn key(
    name: &'static str,
    takes: &'static str,
    example: &'static str,
    default: &'static str,
    doc: &'static str,
) -> Key {
    Key { name, takes, example, default, doc, built: true }
}

impl Section {
    pub(super) fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }
}

/// A table that is being read.
pub(super) struct Table<'a> {
    pub(super) at: Place,
    /// Where to point for what is missing.
    pub(super) span: Range<usize>,
    section: &'static Section,
    table: &'a DeTable<'a>,
}

pub(super) type Value<'a> = Spanned<DeValue<'a>>;

/// Where a place is in the text.
#[derive(Clone, Debug)]
struct Spot {
    key: Range<usize>,
    value: Range<usize>,
}

pub(super) struct Reader<'a> {
    text: &'a str,
    mistakes: Vec<Mistake>,
    spots: BTreeMap<Place, Spot>,
    broken: Vec<Place>,
    /// Sections and keys that somebody wanted the value of. A key that is defined and not here would be
    /// taken and ignored; a test compares.
    pub(super) asked: BTreeSet<(&'static str, &'static str)>,
}

/// What a caller gets for a value that could not be read is told apart from one that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Read<T> {
    Absent,
    /// Told already.
    Broken,
    Is(T),
}

impl<T> Read<T> {
    pub(super) fn or(self, default: T) -> T {
        match self {
            Read::Is(value) => value,
            Read::Absent | Read::Broken => default,
        }
    }

    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Read<U> {
        match self {
            Read::Is(value) => Read::Is(change(value)),
            Read::Absent => Read::Absent,
            Read::Broken => Read::Broken,
        }
    }

    pub(super) fn some(self) -> Option<T> {
        match self {
            Read::Is(value) => Some(value),
            Read::Absent | Read::Broken => None,
        }
    }
}

impl<'a> Reader<'a> {
    /// The top table of a text, as far as it could be parsed, with every mistake of its syntax told.
    pub(super) fn parse(text: &'a str) -> (Reader<'a>, Spanned<DeTable<'a>>) {
        let mut reader = Reader {
            text,
            mistakes: Vec::new(),
            spots: BTreeMap::new(),
            broken: Vec::new(),
            asked: BTreeSet::new(),
        };
        if text.len() > MAX_BYTES {
            let message = format!("the file has {} bytes, more than {MAX_BYTES}", text.len());
            reader.mistakes.push(Mistake::new(Kind::Syntax, 0..0, message));
            reader.broken.push(Place::default());
            return (reader, Spanned::new(0..0, DeTable::new()));
        }
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let span = error.span().unwrap_or(0..0);
            let message = error.message().trim_end_matches(", expected nothing");
            reader.mistakes.push(Mistake::new(Kind::Syntax, span, message));
            reader.broken.push(Place::default());
        }
        (reader, table)
    }

    pub(super) fn top<'t>(
        &mut self,
        table: &'t Spanned<DeTable<'t>>,
        section: &'static Section,
    ) -> Table<'t> {
        let table = Table { at: Place::default(), span: 0..0, section, table: table.get_ref() };
        self.check_keys(&table);
        table
    }

    pub(super) fn mistake(&mut self, mistake: Mistake) {
        self.mistakes.push(mistake);
    }

    /// Tells a mistake in a value and remembers its place as broken.
    pub(super) fn broken(&mut self, at: &Place, mistake: Mistake) {
        self.broken.push(at.clone());
        self.mistakes.push(mistake);
    }

    pub(super) fn has_errors(&self) -> bool {
        self.mistakes.iter().any(|mistake| mistake.kind != Kind::Doubt)
    }

    /// Whether a broken value is `at`, in it, or around it.
    pub(super) fn is_broken(&self, at: &Place) -> bool {
        self.broken.iter().any(|broken| broken.is_in(at) || at.is_in(broken))
    }

    pub(super) fn broken_places(&self) -> &[Place] {
        &self.broken
    }

    pub(super) fn finish(mut self, file: &str) -> Findings {
        // What a parser makes of a broken text is a guess. The keys in it are still those that were written.
        if self.mistakes.iter().any(|mistake| mistake.kind == Kind::Syntax) {
            let told = [Kind::Syntax, Kind::UnknownKey, Kind::NotBuiltYet];
            self.mistakes.retain(|mistake| told.contains(&mistake.kind));
        }
        Findings::new(file, self.text, self.mistakes)
    }

    /// The value's letters, or those of the nearest thing around it that is in the text.
    pub(super) fn span_of(&self, at: &Place) -> Range<usize> {
        self.spot(at).map_or(0..0, |spot| spot.value.clone())
    }

    /// Whether the text says something at this very place.
    pub(super) fn has(&self, at: &Place) -> bool {
        self.spots.contains_key(at)
    }

    pub(super) fn key_span_of(&self, at: &Place) -> Range<usize> {
        self.spot(at).map_or(0..0, |spot| spot.key.clone())
    }

    fn spot(&self, at: &Place) -> Option<&Spot> {
        (0..=at.0.len()).rev().find_map(|length| self.spots.get(&Place(at.0[..length].to_vec())))
    }

    /// Part of a text value, given in bytes of the value; the whole value where letters are written in
    /// another way than they are meant.
    pub(super) fn span_in_text(&self, at: &Place, part: Range<usize>) -> Range<usize> {
        let whole = self.span_of(at);
        let raw = self.text.get(whole.clone()).unwrap_or("");
        let quote = raw.chars().next();
        let plain = matches!(quote, Some('"' | '\''))
            && !raw.starts_with("\"\"\"")
            && !raw.starts_with("'''")
            && (quote == Some('\'') || !raw.contains('\\'));
        if !plain {
            return whole;
        }
        let from = (whole.start + 1 + part.start).min(whole.end - 1);
        from..(whole.start + 1 + part.end).clamp(from, whole.end - 1)
    }

    pub(super) fn remember(&mut self, at: &Place, key: Range<usize>, value: Range<usize>) {
        self.spots.insert(at.clone(), Spot { key, value });
    }

    fn check_keys(&mut self, table: &Table<'_>) {
        for (key, value) in table.table.iter() {
            let (name, span) = (key.get_ref().as_ref(), key.span());
            self.remember(&table.at.key(name), span.clone(), value.span());
            match table.section.key(name) {
                Some(known) if known.built => {}
                Some(known) => {
                    let message = format!("\"{name}\" is not built yet: {}", known.doc);
                    let hint = "leave it out; this version would not act on it";
                    self.broken(
                        &table.at.key(name),
                        Mistake::new(Kind::NotBuiltYet, span, message).hint(hint),
                    );
                }
                None => {
                    let mistake = Mistake::new(Kind::UnknownKey, span, format!("unknown key \"{name}\""));
                    let known = table.section.keys.iter().map(|key| key.name);
                    let hint = match nearest(name, known.clone()) {
                        Some(meant) => format!("did you mean \"{meant}\"?"),
                        None => {
                            let built = table.section.keys.iter().filter(|key| key.built).map(|key| key.name);
                            format!("here are known: {}", built.collect::<Vec<_>>().join(", "))
                        }
                    };
                    // What it was meant to set is not known, so nothing that lacks here is told as missing
                    // because of it.
                    if let Some(meant) = nearest(name, known) {
                        self.broken.push(table.at.key(meant));
                    }
                    self.mistake(mistake.hint(hint));
                }
            }
        }
    }

    /// A value of a table; a required one that is not there is told.
    fn value<'t>(&mut self, table: &Table<'t>, key: &str) -> Read<&'t Value<'t>> {
        let known = table.section.key(key).expect("keys are read by the names that define them");
        self.asked.insert((table.section.header, known.name));
        match table.table.get(key) {
            Some(value) => Read::Is(value),
            None if !known.default.is_empty() => Read::Absent,
            None => {
                let at = table.at.key(key);
                let silent = self.is_broken(&at);
                if !silent {
                    let message = format!("\"{key}\" is missing: {}", known.doc);
                    let mistake = Mistake::new(Kind::MissingKey, table.span.clone(), message);
                    let example = known.example;
                    let hint = if example.contains(&format!("[{key}]")) || example.starts_with("[[") {
                        format!("begin it with {example}")
                    } else {
                        format!("for example {key} = {example}")
                    };
                    self.broken(&at, mistake.hint(hint));
                }
                Read::Broken
            }
        }
    }

    /// One of the kinds of values, or a mistake that names what was expected and what is there.
    pub(super) fn wrong_type(&mut self, at: &Place, value: &Value<'_>, takes: &str) {
        let is = match value.get_ref() {
            DeValue::String(_) => "a text",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        };
        let message = match at.0.as_slice() {
            [.., Step::Key(key), Step::Index(_)] => format!("each of \"{key}\" is {takes}, not {is}"),
            [.., Step::Key(key)] => format!("\"{key}\" takes {takes}, not {is}"),
            _ => format!("here stands {takes}, not {is}"),
        };
        let mistake = Mistake::new(Kind::WrongType, value.span(), message);
        self.broken(at, mistake);
    }

    pub(super) fn wrong_value(&mut self, at: &Place, message: impl Into<String>, hint: Option<String>) {
        let mut mistake = Mistake::new(Kind::WrongValue, self.span_of(at), message);
        mistake.hint = hint;
        self.broken(at, mistake);
    }

    /// What a key takes, with an example.
    fn takes(table: &Table<'_>, key: &str) -> String {
        table.section.key(key).map_or(String::new(), |key| match key.example {
            "" => key.takes.to_owned(),
            example => format!("{} such as {example}", key.takes),
        })
    }

    pub(super) fn text(&mut self, table: &Table<'_>, key: &str) -> Read<String> {
        let value = match self.value(table, key) {
            Read::Is(value) => value,
            Read::Absent => return Read::Absent,
            Read::Broken => return Read::Broken,
        };
        match value.get_ref() {
            DeValue::String(text) => Read::Is(text.to_string()),
            _ => {
                self.wrong_type(&table.at.key(key), value, &Reader::takes(table, key));
                Read::Broken
            }
        }
    }

    /// A text that is one of the program's types.
    pub(super) fn parsed<T>(&mut self, table: &Table<'_>, key: &str) -> Read<T>
    where
        T: std::str::FromStr,
        T::Err: std::fmt::Display,
    {
        match self.text(table, key) {
            Read::Is(text) => match text.parse() {
                Ok(value) => Read::Is(value),
                Err(error) => {
                    self.wrong_value(&table.at.key(key), error.to_string(), None);
                    Read::Broken
                }
            },
            Read::Absent => Read::Absent,
            Read::Broken => Read::Broken,
        }
    }

    pub(super) fn whole(&mut self, table: &Table<'_>, key: &str, least: u64, most: u64) -> Read<u64> {
        let value = match self.value(table, key) {
            Read::Is(value) => value,
            Read::Absent => return Read::Absent,
            Read::Broken => return Read::Broken,
        };
        let at = table.at.key(key);
        let DeValue::Integer(number) = value.get_ref() else {
            self.wrong_type(&at, value, &Reader::takes(table, key));
            return Read::Broken;
        };
        match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) if (i128::from(least)..=i128::from(most)).contains(&number) => Read::Is(number as u64),
            _ => {
                self.wrong_value(&at, format!("\"{key}\" is {least} to {most}, not {number}"), None);
                Read::Broken
            }
        }
    }

    pub(super) fn switch(&mut self, table: &Table<'_>, key: &str) -> Read<bool> {
        let value = match self.value(table, key) {
            Read::Is(value) => value,
            Read::Absent => return Read::Absent,
            Read::Broken => return Read::Broken,
        };
        match value.get_ref() {
            DeValue::Boolean(on) => Read::Is(*on),
            _ => {
                self.wrong_type(&table.at.key(key), value, &Reader::takes(table, key));
                Read::Broken
            }
        }
    }

    /// A time; `word` stands for none.
    pub(super) fn time(
        &mut self,
        table: &Table<'_>,
        key: &str,
        word: Option<&str>,
    ) -> Read<Option<Duration>> {
        let value = match self.value(table, key) {
            Read::Is(value) => value,
            Read::Absent => return Read::Absent,
            Read::Broken => return Read::Broken,
        };
        let at = table.at.key(key);
        let text = match value.get_ref() {
            DeValue::String(text) => text.as_ref(),
            DeValue::Integer(number) => {
                let message = format!("\"{key}\" has no unit");
                self.wrong_value(&at, message, Some(format!("write \"{number}s\" for seconds")));
                return Read::Broken;
            }
            _ => {
                self.wrong_type(&at, value, &Reader::takes(table, key));
                return Read::Broken;
            }
        };
        if word == Some(text) {
            return Read::Is(None);
        }
        match duration::parse(text) {
            Ok(time) => Read::Is(Some(time)),
            Err(not) => {
                let also = word.map(|word| format!(", or \"{word}\"")).unwrap_or_default();
                let hint = match not.meant {
                    Some(meant) => format!("did you mean \"{meant}\"? a time is {}{also}", duration::GRAMMAR),
                    None => format!("a time is {}{also}", duration::GRAMMAR),
                };
                self.wrong_value(&at, format!("\"{text}\" is not a time"), Some(hint));
                Read::Broken
            }
        }
    }

    pub(super) fn array<'t>(&mut self, table: &Table<'t>, key: &str) -> Read<&'t [Value<'t>]> {
        let value = match self.value(table, key) {
            Read::Is(value) => value,
            Read::Absent => return Read::Absent,
            Read::Broken => return Read::Broken,
        };
        match value.get_ref().as_array() {
            Some(array) => {
                for (index, item) in array.iter().enumerate() {
                    self.remember(&table.at.key(key).index(index), item.span(), item.span());
                }
                Read::Is(&array[..])
            }
            None => {
                self.wrong_type(&table.at.key(key), value, &Reader::takes(table, key));
                Read::Broken
            }
        }
    }

    pub(super) fn texts(&mut self, table: &Table<'_>, key: &str) -> Vec<String> {
        let Read::Is(items) = self.array(table, key) else { return Vec::new() };
        let mut texts = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match item.get_ref() {
                DeValue::String(text) => texts.push(text.to_string()),
                _ => {
                    self.wrong_type(&table.at.key(key).index(index), item, "a text");
                    // Keeps the places of the others true.
                    texts.push(String::new());
                }
            }
        }
        texts
    }

    /// A table in a table: `[postgres]`, or `parameters = { … }`.
    pub(super) fn table<'t>(
        &mut self,
        table: &Table<'t>,
        key: &str,
        section: &'static Section,
    ) -> Read<Table<'t>> {
        let value = match self.value(table, key) {
            Read::Is(value) => value,
            Read::Absent => return Read::Absent,
            Read::Broken => return Read::Broken,
        };
        let at = table.at.key(key);
        let span = self.key_span_of(&at);
        self.table_of(value, at, span, section)
    }

    /// Tables of one kind: `[[cluster.node]]`.
    pub(super) fn tables<'t>(
        &mut self,
        table: &Table<'t>,
        key: &str,
        section: &'static Section,
    ) -> Vec<Read<Table<'t>>> {
        let at = table.at.key(key);
        // The slip of one bracket is worth naming: TOML takes it, and means another thing.
        if let Some(value) = table.table.get(key)
            && value.get_ref().is_table()
        {
            let message = format!("there can be several of these, so each begins with {}", section.header);
            let mistake = Mistake::new(Kind::WrongType, self.key_span_of(&at), message);
            self.broken(&at, mistake);
            return Vec::new();
        }
        let Read::Is(items) = self.array(table, key) else { return Vec::new() };
        let read = |(index, item): (usize, &'t Value<'t>)| {
            let span = item.span();
            self.table_of(item, at.index(index), span, section)
        };
        items.iter().enumerate().map(read).collect()
    }

    fn table_of<'t>(
        &mut self,
        value: &'t Value<'t>,
        at: Place,
        span: Range<usize>,
        section: &'static Section,
    ) -> Read<Table<'t>> {
        let Some(inner) = value.get_ref().as_table() else {
            self.wrong_type(&at, value, "a table");
            return Read::Broken;
        };
        // A header's own letters, not all of what stands below it.
        let line_end =
            self.text[span.start..].find('\n').map_or(self.text.len(), |newline| span.start + newline);
        let span = span.start..span.end.min(line_end).max(span.start);
        let table = Table { at, span, section, table: inner };
        self.remember(&table.at, table.span.clone(), table.span.clone());
        self.check_keys(&table);
        Read::Is(table)
    }

    /// `parameters`: names of the user's choice with texts, numbers or booleans, as PostgreSQL spells them.
    pub(super) fn settings(&mut self, table: &Table<'_>, key: &str) -> BTreeMap<String, String> {
        let mut settings = BTreeMap::new();
        let Read::Is(value) = self.value(table, key) else { return settings };
        let at = table.at.key(key);
        let Some(inner) = value.get_ref().as_table() else {
            self.wrong_type(&at, value, &Reader::takes(table, key));
            return settings;
        };
        for (name, value) in inner.iter() {
            let at = at.key(name.get_ref().as_ref());
            self.remember(&at, name.span(), value.span());
            let text = match value.get_ref() {
                DeValue::String(text) => text.to_string(),
                DeValue::Boolean(flag) => if *flag { "on" } else { "off" }.to_owned(),
                DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                    Ok(number) => number.to_string(),
                    Err(_) => number.to_string(),
                },
                DeValue::Float(number) => number.as_str().to_owned(),
                DeValue::Table(_) => {
                    // `pg_stat_statements.max = 1` without quotes is a table to TOML.
                    let name = name.get_ref();
                    let message = format!("\"{name}\" is a table here, and a parameter is none");
                    let hint =
                        format!("write the name of an extension's parameter in quotes: \"{name}.…\" = …");
                    self.broken(
                        &at,
                        Mistake::new(Kind::WrongType, self.key_span_of(&at), message).hint(hint),
                    );
                    continue;
                }
                DeValue::Datetime(_) | DeValue::Array(_) => {
                    self.wrong_type(&at, value, "a text, a number, or true or false");
                    continue;
                }
            };
            settings.insert(name.get_ref().to_string(), text);
        }
        settings
    }
}
