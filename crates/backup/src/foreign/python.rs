//! Values as Barman writes them into `backup.info`: as Python shows them.
//!
//! ```text
//! tablespaces=[('sp', 16384, '/tmp/imp/ts')]
//! backup_label='START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n…'
//! parent_backup_id=None
//! ```
//!
//! Left out: everything that Barman does not write there. Hazard: half a value that is taken for one; what is not understood to its end is none.

/// A tablespace: name, number and place.
pub(super) type Tablespace = (String, u32, String);

/// A string in single or double quotes.
pub(super) fn string(text: &str) -> Option<String> {
    let (value, rest) = quoted(text)?;
    rest.is_empty().then_some(value)
}

/// `[('sp', 16384, '/tmp/imp/ts')]`, or none.
pub(super) fn tablespaces(text: &str) -> Option<Vec<Tablespace>> {
    let mut spaces = Vec::new();
    if text == "None" {
        return Some(spaces);
    }
    let mut rest = text.strip_prefix('[')?.trim_start();
    loop {
        if let Some(end) = rest.strip_prefix(']') {
            return end.trim().is_empty().then_some(spaces);
        }
        let (name, after) = quoted(rest.strip_prefix('(')?.trim_start())?;
        let after = after.trim_start().strip_prefix(',')?.trim_start();
        let digits = after.len() - after.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
        let (oid, after) = (after[..digits].parse().ok()?, after[digits..].trim_start().strip_prefix(',')?);
        let (place, after) = quoted(after.trim_start())?;
        let after = after.trim_start();
        rest = after.strip_prefix(',').unwrap_or(after).trim_start().strip_prefix(')')?.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
        spaces.push((name, oid, place));
    }
}

/// The string that a text begins with, and what is behind it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let quote = text.chars().next().filter(|first| matches!(first, '\'' | '"'))?;
    let mut value = String::new();
    let mut letters = text.char_indices().skip(1);
    while let Some((at, letter)) = letters.next() {
        match letter {
            letter if letter == quote => return Some((value, &text[at + 1..])),
            '\\' => {
                let (_, escape) = letters.next()?;
                value.push(match escape {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    '\\' | '\'' | '"' => escape,
                    'x' => number(&mut letters, 2)?,
                    'u' => number(&mut letters, 4)?,
                    'U' => number(&mut letters, 8)?,
                    _ => return None,
                });
            }
            letter => value.push(letter),
        }
    }
    None
}

fn number(letters: &mut impl Iterator<Item = (usize, char)>, digits: usize) -> Option<char> {
    let digits: String = letters.take(digits).map(|(_, letter)| letter).collect();
    char::from_u32(u32::from_str_radix(&digits, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_python_shows_them() {
        assert_eq!(string(r"'a\n\'b\' \x41\\'").as_deref(), Some("a\n'b' A\\"));
        assert_eq!(string("\"it's\"").as_deref(), Some("it's"));
        for wrong in ["", "'", "a", "'a", "'a'b", r"'\", r"'\q'", r"'\xZZ'", "None"] {
            assert_eq!(string(wrong), None, "{wrong}");
        }
        let two = tablespaces("[('sp', 16384, '/tmp/ts'), (\"o'x\", 16385, '/b c')]");
        let space = |name: &str, oid, place: &str| (name.to_owned(), oid, place.to_owned());
        assert_eq!(two, Some(vec![space("sp", 16384, "/tmp/ts"), space("o'x", 16385, "/b c")]));
        assert_eq!(tablespaces("None"), Some(vec![]));
        assert_eq!(tablespaces("[]"), Some(vec![]));
        for wrong in
            ["", "[", "[(", "[('a', -1, '/b')]", "[('a', 1, '/b')", "[('a', 99999999999, '/b')]", "[]x"]
        {
            assert_eq!(tablespaces(wrong), None, "{wrong}");
        }
    }
}
