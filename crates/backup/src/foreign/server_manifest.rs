//! The manifest that PostgreSQL writes with a base backup: `backup_manifest`.
//!
//! Left out: incremental backups. Hazard: a manifest that was cut off; its last line has the SHA-256 of all before it.

use std::collections::BTreeMap;

use aws_lc_rs::digest::{SHA256, digest};
use pgherd_core::types::Lsn;
use serde::Deserialize;

use super::checksum::{Check, hex};

/// A file in it: its size, and a checksum if the server was not told to leave it out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Noted {
    pub(super) size: u64,
    pub(super) check: Option<Check>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    files: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    checksum: Option<String>,
}

#[derive(Deserialize)]
struct Tail {
    #[serde(rename = "Start-LSN")]
    start: String,
    #[serde(rename = "End-LSN")]
    end: String,
}

/// Every file by its path. `Err` says what is wrong.
pub(super) fn files(text: &[u8]) -> Result<BTreeMap<Vec<u8>, Noted>, String> {
    const SUM: &[u8] = b"\"Manifest-Checksum\": \"";
    let cut = || "it does not end with its checksum".to_owned();
    let body = text.strip_suffix(b"\n").ok_or_else(cut)?;
    let last = body.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1).ok_or_else(cut)?;
    let digits = body[last..].strip_prefix(SUM).and_then(|rest| rest.strip_suffix(b"\"}")).ok_or_else(cut)?;
    let wanted = std::str::from_utf8(digits).ok().and_then(hex).ok_or_else(cut)?;
    if digest(&SHA256, &text[..last]).as_ref() != wanted {
        return Err("its content is not what its checksum says".to_owned());
    }
    let document: Document = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if !(1..=2).contains(&document.version) {
        return Err(format!("it has version {}", document.version));
    }
    let mut files = BTreeMap::new();
    for entry in document.files {
        let path = match (entry.path, entry.encoded_path) {
            (Some(path), None) => path.into_bytes(),
            (None, Some(digits)) => hex(&digits).ok_or("it has a path that is none")?,
            _ => return Err("it has a file without a path".to_owned()),
        };
        let shown = || String::from_utf8_lossy(&path).escape_debug().to_string();
        let check = match (entry.algorithm.as_deref(), entry.checksum.as_deref()) {
            (None | Some("NONE"), _) => None,
            (Some(algorithm), Some(digits)) => {
                let digest = hex(digits);
                let check = digest.and_then(|digest| match algorithm {
                    // As the bytes lie in memory.
                    "CRC32C" => digest.try_into().ok().map(u32::from_le_bytes).map(Check::Crc32c),
                    sha => Check::sha2(sha.strip_prefix("SHA")?.parse().ok()?, digest),
                });
                Some(check.ok_or_else(|| format!("the checksum of {} is none", shown()))?)
            }
            (Some(_), None) => return Err(format!("it has no checksum of {}", shown())),
        };
        if files.insert(path.clone(), Noted { size: entry.size, check }).is_some() {
            return Err(format!("\"{}\" is in it twice", shown()));
        }
    }
    Ok(files)
}

/// Where the backup is consistent, from the end of a manifest.
pub(super) fn stop(tail: &[u8]) -> Option<(Lsn, Lsn)> {
    let text = String::from_utf8_lossy(tail);
    let (_, rest) = text.rsplit_once("\"WAL-Ranges\": [")?;
    let (ranges, _) = rest.split_once(']')?;
    let ranges: Vec<Tail> = serde_json::from_str(&format!("[{ranges}]")).ok()?;
    // Several, if the server that was backed up, a standby, came to another timeline meanwhile.
    let start = ranges.iter().filter_map(|range| range.start.parse().ok()).min()?;
    let end = ranges.iter().filter_map(|range| range.end.parse().ok()).max()?;
    Some((start, end))
}
