//! What a server has sent, against the manifest that it sends behind.
//!
//! The manifest names the files in the order in which they came, one in a line, with sizes and checksums. So what came is written down as it
//! comes, and both are read beside each other: in files without a name, since both grow with the number of files.
//!
//! Leaves out: what WAL is needed, which the manifest says as well and the end of the stream said before. Blocks. Hazard: a file that
//! was changed on its way, or left out of its archive, would be in a backup that says nothing of it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crc_fast::{CrcAlgorithm, Digest};
use serde::Deserialize;

/// A line of a manifest at most: a path of 4096 bytes, in hexadecimal digits at worst, and some numbers.
const MAX_LINE_BYTES: u64 = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum SentError {
    #[error("what the server has sent cannot be written down")]
    Io(#[from] io::Error),
    #[error("the server's manifest cannot be read: {what}")]
    Manifest { what: String },
    #[error("{path} is not what the server's manifest says of it: {what}")]
    Differs { path: String, what: String },
}

/// The checksum of a file that comes.
pub struct FileSum(Digest, u64);

impl Default for FileSum {
    fn default() -> FileSum {
        FileSum(Digest::new(CrcAlgorithm::Crc32Iscsi), 0)
    }
}

impl FileSum {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
        self.1 += bytes.len() as u64;
    }
}

/// Files that have come, and the manifest.
pub struct Sent {
    files: BufWriter<File>,
    manifest: BufWriter<File>,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "Path")]
    path: Option<String>,
    /// Where the path is not UTF-8, in hexadecimal digits.
    #[serde(rename = "Encoded-Path")]
    encoded: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: String,
    #[serde(rename = "Checksum")]
    checksum: String,
}

impl Sent {
    /// With its files in `dir`.
    pub fn new(dir: &Path) -> Result<Sent, SentError> {
        Ok(Sent { files: BufWriter::new(unnamed(dir)?), manifest: BufWriter::new(unnamed(dir)?) })
    }

    /// The next file that has come to its end.
    pub fn file(&mut self, path: &[u8], sum: FileSum) -> Result<(), SentError> {
        let FileSum(digest, size) = sum;
        // As PostgreSQL prints it: byte by byte, the lowest first.
        let sum = hex(&(digest.finalize() as u32).to_le_bytes());
        writeln!(self.files, "{sum} {size} {}", hex(path))?;
        Ok(())
    }

    pub fn manifest(&mut self, bytes: &[u8]) -> Result<(), SentError> {
        Ok(self.manifest.write_all(bytes)?)
    }

    /// Compares all of it.
    pub fn compare(self) -> Result<(), SentError> {
        let wrong = |what: &str| SentError::Manifest { what: what.to_owned() };
        let (mut files, mut manifest) = (again(self.files)?, again(self.manifest)?);
        let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        let mut sum = None;
        while let Some(line) = line(&mut manifest)? {
            if let Some(rest) = line.strip_prefix("\"Manifest-Checksum\": \"") {
                sum = rest.split('"').next().map(str::to_owned);
                break;
            }
            digest.update(line.as_bytes());
            let entry = line.trim_end().trim_end_matches(',');
            if !entry.starts_with("{ \"Path\"") && !entry.starts_with("{ \"Encoded-Path\"") {
                continue;
            }
            let said: Line = serde_json::from_str(entry)
                .map_err(|error| SentError::Manifest { what: error.to_string() })?;
            let path = match (&said.path, &said.encoded) {
                (Some(path), None) => hex(path.as_bytes()),
                (None, Some(encoded)) => encoded.to_ascii_lowercase(),
                _ => return Err(wrong("a file without a path")),
            };
            let shown = || said.path.clone().unwrap_or_else(|| path.clone());
            if said.algorithm != "CRC32C" {
                return Err(wrong("a checksum that was not asked for"));
            }
            let came = self::line(&mut files)?;
            let came = came.as_deref().map(str::trim_end).unwrap_or_default();
            let wanted = format!("{} {} {path}", said.checksum.to_ascii_lowercase(), said.size);
            if came != wanted {
                let what = match came.split(' ').nth(2) == Some(path.as_str()) {
                    true => "its size or its checksum is another one",
                    false => "it has not come",
                };
                return Err(SentError::Differs { path: shown(), what: what.to_owned() });
            }
        }
        let sum = sum.ok_or_else(|| wrong("it has no end"))?;
        if sum.to_ascii_lowercase() != hex(digest.finish().as_ref()) {
            return Err(wrong("its own checksum is another one"));
        }
        match line(&mut files)? {
            None => Ok(()),
            Some(_) => Err(wrong("files have come that it does not name")),
        }
    }
}

fn unnamed(dir: &Path) -> Result<File, SentError> {
    let mut random = [0; 8];
    aws_lc_rs::rand::fill(&mut random).map_err(|_| io::Error::other("the kernel gave no random bytes"))?;
    let path = dir.join(format!("pgherd-sent-{}", hex(&random)));
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

fn again(file: BufWriter<File>) -> Result<BufReader<File>, SentError> {
    let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    Ok(BufReader::new(file))
}

fn line(file: &mut BufReader<File>) -> Result<Option<String>, SentError> {
    let mut bytes = Vec::new();
    let read = io::Read::take(&mut *file, MAX_LINE_BYTES).read_until(b'\n', &mut bytes)?;
    if read as u64 == MAX_LINE_BYTES {
        return Err(SentError::Manifest { what: "a line is too long".to_owned() });
    }
    let text =
        String::from_utf8(bytes).map_err(|_| SentError::Manifest { what: "it is not UTF-8".to_owned() })?;
    Ok((read > 0).then_some(text))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a server of version 15 writes it, of two files.
    fn manifest(lines: &str) -> String {
        let text = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [{lines}\n],\n\"WAL-Ranges\": [\n\
             {{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }}\n],\n"
        );
        let sum = hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes()).as_ref());
        format!("{text}\"Manifest-Checksum\": \"{sum}\"}}\n")
    }

    const LINES: &str = "\n{ \"Path\": \"PG_VERSION\", \"Size\": 9, \"Last-Modified\": \"2026-11-20 20:54:54 GMT\", \
         \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"839206e3\" },\n\
         { \"Encoded-Path\": \"ff\", \"Size\": 0, \"Last-Modified\": \"2026-11-20 20:54:54 GMT\", \
         \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"00000000\" }";

    fn compare(files: &[(&[u8], &[u8])], manifest: &str) -> Result<(), SentError> {
        let dir = tempfile::tempdir().unwrap();
        let mut sent = Sent::new(dir.path()).unwrap();
        for (path, content) in files {
            let mut sum = FileSum::default();
            sum.update(content);
            sent.file(path, sum).unwrap();
        }
        for piece in manifest.as_bytes().chunks(7) {
            sent.manifest(piece).unwrap();
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
        sent.compare()
    }

    #[test]
    fn what_came_is_what_the_manifest_says() {
        // The check value of CRC-32C is that of these nine digits.
        let whole: [(&[u8], &[u8]); 2] = [(b"PG_VERSION", b"123456789"), (b"\xff", b"")];
        compare(&whole, &manifest(LINES)).unwrap();
        let told =
            |files: &[(&[u8], &[u8])], manifest: &str| compare(files, manifest).unwrap_err().to_string();
        assert!(told(&[(b"PG_VERSION", b"123456780"), whole[1]], &manifest(LINES)).contains("its size or"));
        assert!(told(&whole[..1], &manifest(LINES)).contains("it has not come"));
        assert!(told(&[whole[0], whole[1], (b"more", b"")], &manifest(LINES)).contains("does not name"));
        let text = manifest(LINES);
        assert!(told(&whole, &text.replace("0/2000028", "0/2000029")).contains("its own checksum"));
        assert!(told(&whole, &text[..text.len() - 90]).contains("it has no end"));
        assert!(told(&whole, "").contains("it has no end"));
    }
}
