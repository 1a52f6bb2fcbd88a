//! Tables that are made up: their columns, their rows, and both as messages.
//!
//! Clients may want values as text or in binary form; a driver that asks for binary ones reads nothing else.

use bytes::{BufMut, BytesMut};
use pgherd_pgwire::message::Format;
use pgherd_pgwire::message::build::{self, ColumnOut};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    pub name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Int4,
    Int8,
    Numeric,
}

pub(super) const fn text(name: &'static str) -> Column {
    Column { name, kind: Kind::Text }
}

pub(super) const fn int4(name: &'static str) -> Column {
    Column { name, kind: Kind::Int4 }
}

pub(super) const fn int8(name: &'static str) -> Column {
    Column { name, kind: Kind::Int8 }
}

pub(super) const fn numeric(name: &'static str) -> Column {
    Column { name, kind: Kind::Numeric }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Not known, or without meaning here.
    Null,
    Text(String),
    Number(u64),
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(text)
    }
}

macro_rules! from_numbers {
    ($($number:ty),*) => {
        $(impl From<$number> for Value {
            fn from(number: $number) -> Value {
                Value::Number(u64::try_from(number).unwrap_or(u64::MAX))
            }
        })*
    };
}

from_numbers!(u16, u32, u64, usize, u128);

impl From<bool> for Value {
    /// As PgBouncer says it.
    fn from(so: bool) -> Value {
        Value::Number(u64::from(so))
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(known: Option<T>) -> Value {
        known.map_or(Value::Null, Into::into)
    }
}

/// Rows are as long as there are columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub columns: &'static [Column],
    pub rows: Vec<Vec<Value>>,
}

impl Kind {
    /// Of `pg_type`: its number, and its size.
    fn oid_and_bytes(self) -> (u32, i16) {
        match self {
            Kind::Text => (25, -1),
            Kind::Int4 => (23, 4),
            Kind::Int8 => (20, 8),
            Kind::Numeric => (1700, -1),
        }
    }
}

/// RowDescription. `formats` as in a Bind: none for text, one for all, or one for each.
pub(super) fn describe(columns: &[Column], formats: &[Format], out: &mut BytesMut) {
    let columns_out: Vec<ColumnOut<'_>> = columns
        .iter()
        .map(|column| {
            let (type_oid, type_bytes) = column.kind.oid_and_bytes();
            ColumnOut { name: column.name, type_oid, type_bytes }
        })
        .collect();
    let begin = out.len();
    if build::row_description(out, &columns_out).is_err() {
        debug_assert!(false, "names of columns are short, and have no zero");
        return;
    }
    // What was written says text for each column; the format is the last of what is said of it.
    let mut at = begin + 7;
    for (index, column) in columns.iter().enumerate() {
        at += column.name.len() + 1 + 18;
        if format(formats, index) == Format::Binary {
            out[at - 1] = 1;
        }
    }
}

pub(super) fn format(formats: &[Format], index: usize) -> Format {
    match formats {
        [] => Format::Text,
        [all] => *all,
        each => each.get(index).copied().unwrap_or(Format::Text),
    }
}

/// DataRow. `false`: it would be longer than a message can be.
#[must_use]
pub(super) fn row(columns: &[Column], values: &[Value], formats: &[Format], out: &mut BytesMut) -> bool {
    let encoded: Vec<Option<Vec<u8>>> = columns
        .iter()
        .zip(values)
        .enumerate()
        .map(|(index, (column, value))| encode(column.kind, value, format(formats, index)))
        .collect();
    let borrowed: Vec<Option<&[u8]>> = encoded.iter().map(Option::as_deref).collect();
    build::data_row(out, &borrowed).is_ok()
}

fn encode(kind: Kind, value: &Value, format: Format) -> Option<Vec<u8>> {
    let number = match value {
        Value::Null => return None,
        Value::Text(text) => return Some(text.clone().into_bytes()),
        Value::Number(number) => *number,
    };
    if format == Format::Text || kind == Kind::Text {
        let most = match kind {
            Kind::Int4 => i32::MAX as u64,
            Kind::Int8 => i64::MAX as u64,
            Kind::Text | Kind::Numeric => u64::MAX,
        };
        return Some(number.min(most).to_string().into_bytes());
    }
    Some(match kind {
        Kind::Int4 => i32::try_from(number).unwrap_or(i32::MAX).to_be_bytes().to_vec(),
        Kind::Int8 => i64::try_from(number).unwrap_or(i64::MAX).to_be_bytes().to_vec(),
        Kind::Text | Kind::Numeric => numeric_bytes(number),
    })
}

/// As `numeric_send` in `numeric.c`: digits of ten thousand each, those that are zero at the end left out.
fn numeric_bytes(number: u64) -> Vec<u8> {
    let (mut digits, mut rest) = (Vec::new(), number);
    while rest > 0 {
        digits.push((rest % 10_000) as u16);
        rest /= 10_000;
    }
    digits.reverse();
    let weight = digits.len().saturating_sub(1) as u16;
    while digits.last() == Some(&0) {
        digits.pop();
    }
    let mut bytes = Vec::new();
    for half in [digits.len() as u16, weight, 0, 0].into_iter().chain(digits) {
        bytes.put_u16(half);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_postgresql_sends_them() {
        let halves = |number: u64| {
            let bytes = numeric_bytes(number);
            bytes.chunks(2).map(|half| u16::from_be_bytes([half[0], half[1]])).collect::<Vec<_>>()
        };
        assert_eq!(halves(0), [0, 0, 0, 0]);
        assert_eq!(halves(7), [1, 0, 0, 0, 7]);
        assert_eq!(halves(120_000_000), [2, 2, 0, 0, 1, 2000]);
        assert_eq!(halves(12_345_678), [2, 1, 0, 0, 1234, 5678]);
        let int = |kind, number, format| encode(kind, &Value::Number(number), format).unwrap();
        assert_eq!(int(Kind::Int4, 258, Format::Binary), [0, 0, 1, 2]);
        assert_eq!(
            int(Kind::Int4, u64::MAX, Format::Text),
            b"2147483647",
            "what does not fit is as large as it can be"
        );
        assert_eq!(int(Kind::Int8, u64::MAX, Format::Binary), i64::MAX.to_be_bytes());
        assert_eq!(encode(Kind::Int4, &Value::Null, Format::Binary), None);
    }

    #[test]
    fn columns_say_in_which_form_their_values_come() {
        static COLUMNS: [Column; 2] = [text("a"), int4("port")];
        let format_of = |formats: &[Format]| {
            let mut out = BytesMut::new();
            describe(&COLUMNS, formats, &mut out);
            let second = out.len() - 1;
            let first = second - "port".len() - 1 - 18;
            [out[first], out[second]]
        };
        assert_eq!(format_of(&[]), [0, 0]);
        assert_eq!(format_of(&[Format::Binary]), [1, 1]);
        assert_eq!(format_of(&[Format::Text, Format::Binary]), [0, 1]);
    }
}
