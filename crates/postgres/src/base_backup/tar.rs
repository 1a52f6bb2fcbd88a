//! The tar archives of a base backup, taken apart as they come: header by header, and nothing of a content is kept.
//!
//! A reader of our own, since what comes is what one program writes: ustar headers without prefixes, sizes in octal or, from 8 GiB
//! on, in base 256, and nothing but files, directories and links. Whatever else stands in a header is an error.
//!
//! Leaves out: what is done with it, and which archive it is. Hazard: a name or a size that is read wrongly puts a content where it does
//! not belong, so a header has to fit its checksum, and an archive ends where a block does.

use bytes::{Buf, Bytes};

const BLOCK_BYTES: usize = 512;
const NAME: std::ops::Range<usize> = 0..100;
const MODE: std::ops::Range<usize> = 100..108;
const SIZE: std::ops::Range<usize> = 124..136;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const KIND: usize = 156;
const LINK: std::ops::Range<usize> = 157..257;
const MAGIC: std::ops::Range<usize> = 257..262;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberKind {
    File,
    Directory,
    Symlink(Vec<u8>),
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub path: Vec<u8>,
    pub kind: MemberKind,
    /// Permissions.
    pub mode: u32,
    pub size: u64,
}

/// A piece of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Member(Member),
    /// Of the member before, which is at its end when so many bytes have come as it has.
    Content(Bytes),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    #[error("a header does not fit its checksum")]
    Checksum,
    #[error("a header has {what} that PostgreSQL does not write")]
    Header { what: &'static str },
    #[error("it ends in the middle of a member")]
    CutOff,
    #[error("something follows its end")]
    BehindEnd,
}

/// One archive, from its beginning.
#[derive(Debug, Default)]
pub struct Archive {
    header: Vec<u8>,
    /// Of the member that is being read: what is left of its content, and the padding behind that.
    content: u64,
    padding: usize,
    /// A block of zeros has come.
    at_end: bool,
}

impl Archive {
    /// The next part of what has come; `None`: more has to come.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Part>, TarError> {
        loop {
            if input.is_empty() {
                return Ok(None);
            }
            if self.content > 0 {
                let bytes = (input.len() as u64).min(self.content);
                self.content -= bytes;
                return Ok(Some(Part::Content(input.split_to(bytes as usize))));
            }
            if self.padding > 0 {
                let bytes = self.padding.min(input.len());
                input.advance(bytes);
                self.padding -= bytes;
                continue;
            }
            let bytes = (BLOCK_BYTES - self.header.len()).min(input.len());
            self.header.extend_from_slice(&input.split_to(bytes));
            if self.header.len() < BLOCK_BYTES {
                return Ok(None);
            }
            let header = std::mem::take(&mut self.header);
            if header.iter().all(|byte| *byte == 0) {
                self.at_end = true;
                continue;
            }
            if self.at_end {
                return Err(TarError::BehindEnd);
            }
            let member = read(&header)?;
            self.content = member.size;
            self.padding = (member.size.next_multiple_of(BLOCK_BYTES as u64) - member.size) as usize;
            return Ok(Some(Part::Member(member)));
        }
    }

    /// Whether all of it has come. PostgreSQL before 15 sends no blocks of zeros.
    pub fn finish(self) -> Result<(), TarError> {
        match (self.header.is_empty(), self.content, self.padding) {
            (true, 0, 0) => Ok(()),
            _ => Err(TarError::CutOff),
        }
    }
}

fn read(header: &[u8]) -> Result<Member, TarError> {
    let wrong = |what| TarError::Header { what };
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(at, byte)| if CHECKSUM.contains(&at) { u64::from(b' ') } else { u64::from(*byte) })
        .sum();
    if number(&header[CHECKSUM]) != Some(sum) {
        return Err(TarError::Checksum);
    }
    if &header[MAGIC] != b"ustar" {
        return Err(wrong("a format"));
    }
    let size = number(&header[SIZE]).filter(|size| *size <= i64::MAX as u64).ok_or(wrong("a size"))?;
    let mode = number(&header[MODE]).ok_or(wrong("permissions"))? as u32 & 0o7777;
    let kind = match header[KIND] {
        b'0' | 0 => MemberKind::File,
        b'5' => MemberKind::Directory,
        b'2' => MemberKind::Symlink(text(&header[LINK]).to_vec()),
        _ => return Err(wrong("a kind")),
    };
    if kind != MemberKind::File && size > 0 {
        return Err(wrong("a content of what is no file"));
    }
    let name = text(&header[NAME]);
    let path = name.strip_suffix(b"/").unwrap_or(name);
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let plain = |part: &[u8]| !part.is_empty() && part != b"." && part != b"..";
    if !path.split(|byte| *byte == b'/').all(plain) {
        return Err(wrong("a path"));
    }
    Ok(Member { path: path.to_vec(), kind, mode, size })
}

/// Up to the first zero.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// In octal digits, or in base 256 behind a byte of 128.
fn number(field: &[u8]) -> Option<u64> {
    if field.first() == Some(&0x80) {
        let (high, low) = field[1..].split_at(field.len().checked_sub(9)?);
        let low: [u8; 8] = low.try_into().ok()?;
        return high.iter().all(|byte| *byte == 0).then(|| u64::from_be_bytes(low));
    }
    let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    u64::from_str_radix(text, 8).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(name: &str, kind: u8, size: u64, link: &str) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[MODE].copy_from_slice(b"0000600\0");
        match size < 1 << 33 {
            true => block[SIZE].copy_from_slice(format!("{size:011o} ").as_bytes()),
            false => {
                block[SIZE.start] = 0x80;
                block[SIZE.end - 8..SIZE.end].copy_from_slice(&size.to_be_bytes());
            }
        }
        block[KIND] = kind;
        block[LINK.start..LINK.start + link.len()].copy_from_slice(link.as_bytes());
        block[MAGIC].copy_from_slice(b"ustar");
        block[CHECKSUM].copy_from_slice(b"        ");
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn archive(end: bool) -> Vec<u8> {
        let mut bytes = header("base/5/", b'5', 0, "");
        bytes.extend(header("base/5/1259", b'0', 700, ""));
        bytes.extend([7; 700]);
        bytes.extend([0; 324]);
        bytes.extend(header("base/5/empty", b'0', 0, ""));
        bytes.extend(header("pg_tblspc/16384", b'2', 0, "/srv/fast"));
        if end {
            bytes.extend([0; 2 * BLOCK_BYTES]);
        }
        bytes
    }

    /// Members, and all contents one behind the other.
    fn take_apart(bytes: &[u8], piece: usize) -> Result<(Vec<Member>, Vec<u8>), TarError> {
        let mut archive = Archive::default();
        let (mut members, mut content) = (Vec::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            let mut input = Bytes::copy_from_slice(piece);
            while let Some(part) = archive.next(&mut input)? {
                match part {
                    Part::Member(member) => members.push(member),
                    Part::Content(bytes) => content.extend_from_slice(&bytes),
                }
            }
        }
        archive.finish().map(|()| (members, content))
    }

    #[test]
    fn an_archive_is_the_same_in_whatever_pieces_it_comes() {
        for (end, piece) in [(true, 1), (false, 1), (true, 511), (true, 513), (false, 100_000)] {
            let (members, content) = take_apart(&archive(end), piece).unwrap();
            let paths: Vec<_> = members.iter().map(|member| String::from_utf8_lossy(&member.path)).collect();
            assert_eq!(paths, ["base/5", "base/5/1259", "base/5/empty", "pg_tblspc/16384"]);
            assert_eq!((members[1].size, members[1].mode), (700, 0o600));
            assert_eq!(members[3].kind, MemberKind::Symlink(b"/srv/fast".to_vec()));
            assert_eq!(content, [7; 700]);
        }
    }

    #[test]
    fn what_is_cut_off_or_not_a_header_is_an_error() {
        let whole = archive(false);
        for bytes in [1, 511, 513, 1100, 1024 + 700, 1024 + 1023] {
            assert_eq!(take_apart(&whole[..bytes], 4096), Err(TarError::CutOff), "{bytes}");
        }
        let mut bad = archive(true);
        bad[3] ^= 1;
        assert_eq!(take_apart(&bad, 4096), Err(TarError::Checksum));
        for (bad, what) in [
            (header("a/../../etc/passwd", b'0', 0, ""), "a path"),
            (header("/etc/passwd", b'0', 0, ""), "a path"),
            (header("", b'0', 0, ""), "a path"),
            (header("a", b'1', 0, "b"), "a kind"),
            (header("a", b'5', 9, ""), "a content of what is no file"),
        ] {
            assert_eq!(take_apart(&bad, 4096), Err(TarError::Header { what }));
        }
        let behind = [archive(true), header("a", b'0', 0, "")].concat();
        assert_eq!(take_apart(&behind, 4096), Err(TarError::BehindEnd));
    }

    #[test]
    fn a_checksum_in_base_256_is_none() {
        let mut bad = header("a", b'0', 0, "");
        bad[CHECKSUM.start] = 0x80;
        assert_eq!(take_apart(&bad, 4096), Err(TarError::Checksum));
    }

    #[test]
    fn a_size_of_more_than_eight_gigabytes_is_read() {
        assert_eq!(read(&header("a", b'0', 9 << 33, "")).unwrap().size, 9 << 33);
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_are_an_error_at_most(bytes in prop::collection::vec(any::<u8>(), 0..2000), piece in 1_usize..700) {
            take_apart(&bytes, piece).ok();
        }
    }
}
