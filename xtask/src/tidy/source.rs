//! A Rust file as the rules see it: code, texts and comments apart, and tests apart from the rest.

use std::ops::Range;

use super::File;

pub(super) struct Source<'a> {
    pub(super) file: &'a File,
    /// The text with comments and the contents of literals blanked, letter for letter, so that places stay true.
    pub(super) code: String,
    /// Contents of text literals, with their places.
    pub(super) texts: Vec<(usize, String)>,
    tests: Vec<Range<usize>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(file: &'a File) -> Source<'a> {
        let (code, texts) = split(&file.text);
        let tests = test_modules(&code);
        Source { file, code, texts, tests }
    }

    pub(super) fn path(&self) -> &str {
        &self.file.path
    }

    pub(super) fn line(&self, at: usize) -> usize {
        self.code.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1
    }

    /// Whether this place is code of tests: a module under `cfg(test)`, or a file of `tests/`.
    pub(super) fn is_test(&self, at: usize) -> bool {
        let path = self.path();
        path.contains("/tests/")
            || path.ends_with("/tests.rs")
            || self.tests.iter().any(|range| range.contains(&at))
    }

    /// Places of a word in the code, where it is not a part of a longer one.
    pub(super) fn find(&self, word: &str) -> Vec<usize> {
        let bytes = self.code.as_bytes();
        let part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let whole = |at: usize| {
            let before =
                at == 0 || !part(bytes[at - 1]) || !word.as_bytes().first().is_some_and(|byte| part(*byte));
            let after = bytes.get(at + word.len()).is_none_or(|byte| !part(*byte))
                || !word.as_bytes().last().is_some_and(|byte| part(*byte));
            before && after
        };
        self.code.match_indices(word).map(|(at, _)| at).filter(|at| whole(*at)).collect()
    }
}

fn split(text: &str) -> (String, Vec<(usize, String)>) {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut texts = Vec::new();
    let blank = |code: &mut Vec<u8>, range: Range<usize>| {
        for byte in &mut code[range] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = if rest.starts_with(b"//") {
            let end = rest.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |newline| at + newline);
            blank(&mut code, at..end);
            end
        } else if rest.starts_with(b"/*") {
            let end = block_comment_end(bytes, at);
            blank(&mut code, at..end);
            end
        } else if let Some((open, hashes)) = raw_text(bytes, at) {
            let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
            let length = bytes[open..].windows(close.len()).position(|window| window == close);
            let inner = open..length.map_or(bytes.len(), |length| open + length);
            texts.push((inner.start, text[inner.clone()].to_owned()));
            blank(&mut code, inner.clone());
            (inner.end + close.len()).min(bytes.len())
        } else if rest[0] == b'"' {
            let mut end = at + 1;
            while end < bytes.len() && bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            let end = end.min(bytes.len());
            texts.push((at + 1, text.get(at + 1..end).unwrap_or("").to_owned()));
            blank(&mut code, at + 1..end);
            (end + 1).min(bytes.len())
        } else if rest[0] == b'\'' {
            match letter_end(text, at) {
                Some(end) => {
                    blank(&mut code, at + 1..end - 1);
                    end
                }
                // A lifetime.
                None => at + 1,
            }
        } else {
            at + 1
        };
        at = end;
    }
    (String::from_utf8_lossy(&code).into_owned(), texts)
}

fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at < bytes.len() {
        match &bytes[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] if depth == 1 => return at + 2,
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Where the contents of a raw text begin, and its number of hashes.
fn raw_text(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let in_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    let prefix =
        [b"br".as_slice(), b"cr", b"r"].into_iter().find(|prefix| bytes[at..].starts_with(prefix))?;
    let after = &bytes[at + prefix.len()..];
    let hashes = after.iter().take_while(|byte| **byte == b'#').count();
    (!in_word && after.get(hashes) == Some(&b'"')).then_some((at + prefix.len() + hashes + 1, hashes))
}

/// The end of a letter literal such as `'a'` or `'\n'`; `None` for a lifetime.
fn letter_end(text: &str, at: usize) -> Option<usize> {
    let inner = &text[at + 1..];
    let first = inner.chars().next()?;
    if first == '\\' {
        // Past the letter that the backslash is for, which may be a quote.
        let escaped = inner[1..].chars().next()?.len_utf8();
        let close = inner[1 + escaped..].find('\'')?;
        return Some(at + 1 + 1 + escaped + close + 1);
    }
    let close = at + 1 + first.len_utf8();
    (text.as_bytes().get(close) == Some(&b'\'')).then_some(close + 1)
}

/// What stands in the braces after `#[cfg(test)] mod …`.
fn test_modules(code: &str) -> Vec<Range<usize>> {
    let mut modules = Vec::new();
    for (at, _) in code.match_indices("#[cfg(test)]") {
        let after = &code[at..];
        let Some(open) = after.find('{') else { continue };
        // An attribute of something without braces, such as `mod tests;` or `use`, ends before.
        if after[..open].contains(';') {
            continue;
        }
        let mut depth = 0;
        let close = after[open..].bytes().position(|byte| {
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        modules.push(at..close.map_or(code.len(), |close| at + open + close + 1));
    }
    modules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_texts_and_comments_are_told_apart() {
        let text = r####"// std::fs in a comment
let a = "std::fs \" x"; /* std::fs /* nested */ std::fs */ let c = '"'; let d = '\''; fn f<'a>(x: &'a str) {}
let b = r#"std::fs " quote"#; std::fs::read(b"std::fs");
#[cfg(test)]
mod tests { fn g() { std::fs::write(); } }
"####;
        let file = File { path: "crates/core/src/a.rs".to_owned(), text: text.to_owned() };
        let source = Source::new(&file);
        let found = source.find("std::fs");
        assert_eq!(found.iter().map(|at| source.line(*at)).collect::<Vec<_>>(), [3, 5]);
        assert_eq!(found.iter().map(|at| source.is_test(*at)).collect::<Vec<_>>(), [false, true]);
        let texts: Vec<&str> = source.texts.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, ["std::fs \\\" x", "std::fs \" quote", "std::fs"]);
        assert_eq!(source.code.len(), text.len());
    }

    #[test]
    fn words_are_found_whole() {
        let file = File {
            path: "a.rs".to_owned(),
            text: "use tokio::x; tokio_postgres::y; my_tokio; time::sleep(".to_owned(),
        };
        let source = Source::new(&file);
        assert_eq!(source.find("tokio"), [4]);
        assert_eq!(source.find("time::sleep(").len(), 1);
    }

    #[test]
    fn any_text_can_be_split() {
        for text in [
            "",
            "\"",
            "'",
            "'\\",
            "r#\"",
            "/*",
            "b'",
            "'ä",
            "\"\\",
            "r###",
            "#[cfg(test)]",
            "#[cfg(test)] mod a {",
        ] {
            let file = File { path: "a.rs".to_owned(), text: text.to_owned() };
            Source::new(&file);
        }
    }
}
