//! Messages by hand: written for conversations, and read a second time without the code under test.
//!
//! Leaves out what they mean. Hazard: see the crate's.

use crate::random::Random;

/// A message with its type byte and a length that is right.
pub(crate) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend((body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// A packet without a type byte.
pub(crate) fn packet(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32 + 4).to_be_bytes()[..], body].concat()
}

pub(crate) fn report(kind: u8, fields: &[(u8, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (code, value) in fields {
        body.push(*code);
        body.extend(text(value));
    }
    body.push(0);
    message(kind, &body)
}

pub(crate) fn error(severity: &str, sqlstate: &str) -> Vec<u8> {
    report(b'E', &[(b'S', severity), (b'V', severity), (b'C', sqlstate), (b'M', "no")])
}

pub(crate) fn parameter_status(name: &str, value: &str) -> Vec<u8> {
    message(b'S', &[text(name), text(value)].concat())
}

/// Whole messages of a stream with a type byte each, and what is left behind them. Any type, any length.
pub(crate) fn whole_messages(mut bytes: &[u8]) -> (Vec<(u8, &[u8])>, &[u8]) {
    let mut messages = Vec::new();
    while bytes.len() >= 5 {
        let length = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) as usize;
        if length < 4 || bytes.len() < 1 + length {
            break;
        }
        messages.push((bytes[0], &bytes[5..=length]));
        bytes = &bytes[1 + length..];
    }
    (messages, bytes)
}

/// The first field with this code of a report's body.
pub(crate) fn field(body: &[u8], code: u8) -> Option<&[u8]> {
    let mut rest = body;
    while let Some((&known, behind)) = rest.split_first() {
        if known == 0 {
            return None;
        }
        let end = behind.iter().position(|byte| *byte == 0)?;
        if known == code {
            return Some(&behind[..end]);
        }
        rest = &behind[end + 1..];
    }
    None
}

/// Cuts bytes into a few pieces, most often into one.
pub(crate) fn cut(bytes: &[u8], random: &mut Random) -> Vec<Vec<u8>> {
    if bytes.len() < 2 || !random.once_in(3) {
        return vec![bytes.to_vec()];
    }
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while rest.len() > 1 && pieces.len() < 6 {
        let (piece, behind) = rest.split_at(1 + random.below(rest.len() - 1));
        pieces.push(piece.to_vec());
        rest = behind;
    }
    pieces.push(rest.to_vec());
    pieces
}
