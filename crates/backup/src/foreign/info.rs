//! pgBackRest's files of information: sections, and in each line a key and a JSON value. The last one is the SHA-1 of all others.
//!
//! ```text
//! [backup]
//! backup-label="20261122-214843F"
//!
//! [backrest]
//! backrest-checksum="b313d70035a3570a1d4076fcbbff24fcc2b835a0"
//! ```
//!
//! The sum is that of the JSON object that the file stands for, `{"backup":{"backup-label":"…"}}`, without itself.
//!
//! Left out: what keys mean. Hazard: a damaged file that reads well; so nothing of it counts before the sum was compared.

use std::io::{BufRead, Read};

use aws_lc_rs::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY};
use serde::de::IgnoredAny;

use super::checksum::sha1;
use crate::hash::to_hex;

/// What encrypted files begin with.
pub(super) const ENCRYPTED: &[u8] = b"Salted__";
/// The only format that there is since 2.x.
const FORMAT: &[u8] = b"5";
/// A file with millions of damaged pages has a long line.
const MAX_LINE_BYTES: u64 = 64 * 1024 * 1024;
/// Keys are paths at most; behind that no `=` ends one.
const MAX_KEY_BYTES: usize = 2 * super::MAX_PATH_BYTES;

/// Calls `each` with section, key and value of every line. `Err` says what is wrong; then nothing of it counts.
pub(super) fn read(
    mut from: impl BufRead,
    mut each: impl FnMut(&[u8], &[u8], &str) -> Result<(), String>,
) -> Result<(), String> {
    let mut sum = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    sum.update(b"{");
    let (mut section, mut summed): (Vec<u8>, Option<Vec<u8>>) = (Vec::new(), None);
    let (mut wanted, mut format) = (None, false);
    let (mut line, mut number) = (Vec::new(), 0_u64);
    loop {
        line.clear();
        number += 1;
        let read = from.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line);
        let bytes = read.map_err(|error| error.to_string())?;
        if bytes == 0 {
            break;
        }
        if bytes as u64 > MAX_LINE_BYTES {
            return Err(format!("line {number} is longer than {MAX_LINE_BYTES} bytes"));
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        if text.is_empty() {
            continue;
        }
        if let Some(name) = text.strip_prefix(b"[").and_then(|text| text.strip_suffix(b"]")) {
            section = name.to_vec();
            continue;
        }
        let (key, value) = split(text).ok_or_else(|| format!("line {number} has no key and value"))?;
        if section.is_empty() {
            return Err(format!("line {number} is in no section"));
        }
        if section == b"backrest" && key == b"backrest-checksum" {
            wanted = serde_json::from_str::<String>(value).ok().and_then(|digits| sha1(&digits));
            continue;
        }
        match &summed {
            Some(last) if *last == section => sum.update(b","),
            last => {
                sum.update(if last.is_some() { b"},\"" } else { b"\"" });
                sum.update(&section);
                sum.update(b"\":{");
                summed = Some(section.clone());
            }
        }
        sum.update(&quoted(key));
        sum.update(b":");
        sum.update(value.as_bytes());
        if section == b"backrest" && key == b"backrest-format" {
            if value.as_bytes() != FORMAT {
                return Err(format!("it has format {value}, and format 5 is read here"));
            }
            format = true;
        }
        each(&section, key, value)?;
    }
    sum.update(b"}}");
    let found = sum.finish();
    match wanted {
        Some(wanted) if wanted == found.as_ref() && format => Ok(()),
        Some(wanted) if wanted == found.as_ref() => Err("it does not say which format it has".to_owned()),
        Some(wanted) => Err(format!(
            "its content has SHA-1 {}, and it says that it should have {}",
            to_hex(found.as_ref()),
            to_hex(&wanted)
        )),
        None => Err("it ends without the checksum that it should end with".to_owned()),
    }
}

/// A key may have `=` in it: what is behind the right one is JSON.
fn split(line: &[u8]) -> Option<(&[u8], &str)> {
    let ends = line.iter().take(MAX_KEY_BYTES).enumerate().filter(|(_, byte)| **byte == b'=');
    ends.map(|(at, _)| at).filter(|at| *at > 0).find_map(|at| {
        let value = std::str::from_utf8(&line[at + 1..]).ok()?;
        serde_json::from_str::<IgnoredAny>(value).ok()?;
        Some((&line[..at], value))
    })
}

/// A key as pgBackRest writes it in JSON.
fn quoted(key: &[u8]) -> Vec<u8> {
    let mut quoted = Vec::with_capacity(key.len() + 2);
    quoted.push(b'"');
    for byte in key {
        match byte {
            b'"' | b'\\' => quoted.extend([b'\\', *byte]),
            b'\n' => quoted.extend(b"\\n"),
            b'\r' => quoted.extend(b"\\r"),
            b'\t' => quoted.extend(b"\\t"),
            0x08 => quoted.extend(b"\\b"),
            0x0C => quoted.extend(b"\\f"),
            _ => quoted.push(*byte),
        }
    }
    quoted.push(b'"');
    quoted
}

/// With its sum at the end, for tests that make such files.
#[cfg(test)]
pub(super) fn write(sections: &[(&str, &[(&str, String)])]) -> String {
    let mut sum = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    let mut text = String::new();
    sum.update(b"{");
    for (at, (section, lines)) in sections.iter().enumerate() {
        sum.update(format!("{}\"{section}\":{{", if at == 0 { "" } else { "}," }).as_bytes());
        text += &format!("[{section}]\n");
        for (at, (key, value)) in lines.iter().enumerate() {
            sum.update(if at == 0 { b"" } else { b"," });
            sum.update(&quoted(key.as_bytes()));
            sum.update(format!(":{value}").as_bytes());
            text += &format!("{key}={value}\n");
        }
        text.push('\n');
    }
    sum.update(b"}}");
    text + &format!("[backrest]\nbackrest-checksum=\"{}\"\n", to_hex(sum.finish().as_ref()))
}
