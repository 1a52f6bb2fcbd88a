//! The `options` of a startup packet: a command line for the backend in one text.
//!
//! Splits it as PostgreSQL's `pg_split_opts` (`postinit.c`) does and recognises settings as its
//! `process_postgres_switches` and `ParseLongOption` do. Leaves out which settings exist and who may set
//! them. Hazard: a setting that was seen differently from PostgreSQL follows the wrong client.

use std::borrow::Cow;

/// The arguments: split at white space, where a backslash takes the next byte literally and one at the end is
/// dropped.
pub fn split(options: &[u8]) -> impl Iterator<Item = Cow<'_, [u8]>> {
    let mut rest = options;
    std::iter::from_fn(move || {
        let begin = rest.iter().position(|byte| !is_space(*byte))?;
        rest = &rest[begin..];
        let (mut escaped, mut escapes, mut length) = (false, false, rest.len());
        for (at, byte) in rest.iter().enumerate() {
            if is_space(*byte) && !escaped {
                length = at;
                break;
            }
            escaped = !escaped && *byte == b'\\';
            escapes |= escaped;
        }
        let (argument, after) = rest.split_at(length);
        rest = after;
        Some(if escapes { Cow::Owned(unescaped(argument)) } else { Cow::Borrowed(argument) })
    })
}

/// C's `isspace`, which unlike Rust's counts the vertical tab.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

fn unescaped(argument: &[u8]) -> Vec<u8> {
    let mut escaped = false;
    let plain = argument.iter().copied().filter(|byte| {
        escaped = !escaped && *byte == b'\\';
        !escaped
    });
    plain.collect()
}

/// What one or two arguments mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Switch {
    /// `-c name=value` or `--name=value`; dashes in the name have become underscores.
    Setting { name: Vec<u8>, value: Vec<u8> },
    /// Any other argument: a switch for one setting (`-d 1`), or something that PostgreSQL will refuse.
    Other(Vec<u8>),
}

/// The arguments as settings.
pub fn switches(options: &[u8]) -> impl Iterator<Item = Switch> {
    let mut arguments = split(options);
    std::iter::from_fn(move || {
        let argument = arguments.next()?;
        let assignment = match &*argument {
            b"-c" => arguments.next().map(Cow::into_owned),
            [b'-', b'c', joined @ ..] => Some(joined.to_vec()),
            [b'-', b'-', long @ ..] => Some(long.to_vec()),
            _ => None,
        };
        Some(assignment.and_then(setting).unwrap_or_else(|| Switch::Other(argument.into_owned())))
    })
}

/// `name=value`; without a name or a sign of equality it is no setting (CVE-2026-107349: an empty name).
fn setting(assignment: Vec<u8>) -> Option<Switch> {
    let equals = assignment.iter().position(|byte| *byte == b'=').filter(|at| *at > 0)?;
    let name = assignment[..equals].iter().map(|byte| if *byte == b'-' { b'_' } else { *byte }).collect();
    Some(Switch::Setting { name, value: assignment[equals + 1..].to_vec() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn strings(options: &str) -> Vec<String> {
        split(options.as_bytes()).map(|one| String::from_utf8_lossy(&one).into_owned()).collect()
    }

    #[test]
    fn arguments_are_split_at_white_space_and_a_backslash_takes_the_next_byte_as_it_is() {
        assert_eq!(strings(""), [""; 0]);
        assert_eq!(strings(" \t\n\x0b\x0c\r"), [""; 0]);
        assert_eq!(strings("-c a=b  --c=d"), ["-c", "a=b", "--c=d"]);
        assert_eq!(strings(r"-c search_path=a\ b"), ["-c", "search_path=a b"]);
        assert_eq!(strings(r"a\\b \\ c\"), [r"a\b", r"\", "c"]);
        assert_eq!(strings(r"\ "), [" "]);
        assert_eq!(strings(r"\"), [""], "PostgreSQL, too, makes an empty argument of a lone backslash");
    }

    #[test]
    fn settings_are_what_postgresql_takes_for_settings() {
        let set = |name: &str, value: &str| Switch::Setting { name: name.into(), value: value.into() };
        let found: Vec<Switch> = switches(b"-c a-b=c --d-e=f=g -cx= -d 1 --=y -c =z -c q -c").collect();
        let other = |text: &str| Switch::Other(text.into());
        let rest = ["-d", "1", "--=y", "-c", "-c", "-c"].map(other);
        assert_eq!(found, [vec![set("a_b", "c"), set("d_e", "f=g"), set("x", "")], rest.to_vec()].concat());
    }

    proptest! {
        #[test]
        fn what_is_escaped_comes_back(
            arguments in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 0..10),
        ) {
            let mut text = Vec::new();
            for argument in &arguments {
                text.push(b' ');
                for byte in argument {
                    if is_space(*byte) || *byte == b'\\' {
                        text.push(b'\\');
                    }
                    text.push(*byte);
                }
            }
            let back: Vec<Vec<u8>> = split(&text).map(Cow::into_owned).collect();
            prop_assert_eq!(back, arguments);
        }
    }
}
