//! Reads the data types of messages (manual 55.6) off the front of a body.
//!
//! Leaves out what they mean. Hazard: none of the numbers it reads is true before it was compared with what
//! is there.

use std::ffi::CStr;

use super::{Defect, Format, Malformed};

/// What was not yet read of the body of `message`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor<'a> {
    message: &'static str,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(message: &'static str, body: &'a [u8]) -> Cursor<'a> {
        Cursor { message, rest: body }
    }

    pub(crate) fn wrong(&self, defect: Defect) -> Malformed {
        Malformed { message: self.message, defect }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(self.wrong(Defect::Short))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(self.wrong(Defect::Short))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_be_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn i32(&mut self) -> Result<i32, Malformed> {
        self.array().map(i32::from_be_bytes)
    }

    /// A String: up to a zero, which is taken as well.
    pub(crate) fn text(&mut self) -> Result<&'a [u8], Malformed> {
        // Looks at several bytes at once: the text of a statement may be long.
        let text = CStr::from_bytes_until_nul(self.rest).map_err(|_| self.wrong(Defect::Unterminated))?;
        self.rest = &self.rest[text.count_bytes() + 1..];
        Ok(text.to_bytes())
    }

    /// A value with its length in front; -1 is NULL and any other negative length wrong.
    pub(crate) fn value(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        match self.i32()? {
            -1 => Ok(None),
            length => {
                let length = usize::try_from(length).map_err(|_| self.wrong(Defect::Value))?;
                self.bytes(length).map(Some)
            }
        }
    }

    /// A number and so many format codes.
    pub(crate) fn formats(&mut self) -> Result<Formats<'a>, Malformed> {
        let count = usize::from(self.u16()?);
        let codes = self.bytes(2 * count)?;
        let known = codes.chunks_exact(2).all(|code| code[0] == 0 && code[1] <= 1);
        known.then_some(Formats { codes }).ok_or(self.wrong(Defect::Value))
    }

    /// A number and so many object identifiers.
    pub(crate) fn oids(&mut self) -> Result<Oids<'a>, Malformed> {
        let count = usize::from(self.u16()?);
        Ok(Oids { bytes: self.bytes(4 * count)? })
    }

    /// A number and so many values.
    pub(crate) fn values(&mut self) -> Result<Values<'a>, Malformed> {
        let count = self.u16()?;
        let cursor = *self;
        for _ in 0..count {
            self.value()?;
        }
        Ok(Values { count, cursor })
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Nothing must be left.
    pub(crate) fn end<T>(&self, read: T) -> Result<T, Malformed> {
        match self.rest.len() {
            0 => Ok(read),
            bytes => Err(self.wrong(Defect::Trailing { bytes })),
        }
    }
}

/// Format codes, each 0 or 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formats<'a> {
    codes: &'a [u8],
}

impl<'a> Formats<'a> {
    pub fn count(&self) -> usize {
        self.codes.len() / 2
    }

    pub fn iter(&self) -> impl Iterator<Item = Format> + use<'a> {
        self.codes.chunks_exact(2).map(|code| if code[1] == 0 { Format::Text } else { Format::Binary })
    }
}

/// Object identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oids<'a> {
    bytes: &'a [u8],
}

impl<'a> Oids<'a> {
    pub fn count(&self) -> usize {
        self.bytes.len() / 4
    }

    /// As they stand on the wire, for a key of a map.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.bytes.chunks_exact(4).map(|oid| u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]))
    }
}

/// Values with their lengths, all of which were checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Values<'a> {
    count: u16,
    cursor: Cursor<'a>,
}

impl<'a> Values<'a> {
    pub fn count(&self) -> usize {
        usize::from(self.count)
    }

    pub fn iter(&self) -> impl Iterator<Item = Option<&'a [u8]>> + use<'a> {
        let mut cursor = self.cursor;
        (0..self.count).map_while(move |_| cursor.value().ok())
    }
}
