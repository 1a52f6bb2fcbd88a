//! Which name in a certificate may be which role: lines in the format of `pg_ident.conf` (manual 21.2), which an hba line names
//! by `map=`.
//!
//! Lines only let in, so that their order does not matter, and one that a proxy cannot judge keeps nobody out whom another lets
//! in. What it cannot judge is who is a member of a role, and what `\1` stands for where an expression can be read in more than
//! one way: PostgreSQL takes the longest of them, others the first, and here neither is guessed.
//!
//! Hazard: a line that is read otherwise than PostgreSQL reads it.

use pgherd_core::spec::hba::HbaError;
use pgherd_core::spec::ident::{Expression, IdentLine, MappedRole, SystemName};
use regex::bytes::{Regex, RegexBuilder};

/// A line that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ident line {number} (\"{line}\"): {what}")]
pub struct IdentError {
    pub number: usize,
    pub line: String,
    pub what: String,
}

/// Names that are longer are matched with nothing: the ways to cut them are many.
const MAX_NAME_BYTES: usize = 1024;
/// Of an expression in memory. Greater ones are refused when they are read.
const MAX_EXPRESSION_BYTES: usize = 1 << 20;

#[derive(Clone, Debug, Default)]
pub struct Maps {
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
struct Line {
    number: usize,
    map: String,
    system: System,
    role: Role,
}

#[derive(Clone, Debug)]
enum System {
    Is(String),
    Matches(Regex),
    /// In three parts, each as a whole: the one in the middle is what the role is made of.
    Cut(Box<[Regex; 3]>),
}

#[derive(Clone, Debug)]
enum Role {
    Is(String),
    Captured { before: String, after: String },
    All,
    MemberOf(String),
    Matches(Regex),
}

/// May it be this role?
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    Yes,
    No,
    /// Why that cannot be said, by the first line of which it is so.
    Unclear(String),
}

/// What the group of an expression holds.
enum Captured<'a> {
    Nothing,
    One(&'a [u8]),
    OneOfSeveral,
}

impl Maps {
    /// Lines that are empty or comments count, and mean nothing.
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<Maps, IdentError> {
        let mut parsed = Vec::new();
        for (number, text) in (1..).zip(lines) {
            let content = text.trim_start();
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            let wrong = |what| IdentError { number, line: text.to_owned(), what };
            // Which PostgreSQL it is was asked where the herd file was read.
            let line = IdentLine::parse(text, None).map_err(|error: HbaError| wrong(error.to_string()))?;
            parsed.push(Line::new(number, line).map_err(|error| wrong(error.to_string()))?);
        }
        Ok(Maps { lines: parsed })
    }

    /// `name`: in the certificate, of which the hba line says which it is.
    pub(crate) fn judge(&self, map: &str, name: &str, role: &str) -> Mapped {
        let mut unclear = None;
        for line in self.lines.iter().filter(|line| line.map == map) {
            match line.judge(name, role) {
                Mapped::Yes => return Mapped::Yes,
                Mapped::No => {}
                Mapped::Unclear(why) => {
                    unclear.get_or_insert(why);
                }
            }
        }
        unclear.map_or(Mapped::No, Mapped::Unclear)
    }
}

impl Line {
    fn new(number: usize, line: IdentLine) -> Result<Line, regex::Error> {
        let role = match line.role {
            MappedRole::Is(name) => Role::Is(name),
            MappedRole::Captured { before, after } => Role::Captured { before, after },
            MappedRole::All => Role::All,
            MappedRole::MemberOf(name) => Role::MemberOf(name),
            MappedRole::Matches(expression) => Role::Matches(compile(expression.text())?),
        };
        let system = match line.system {
            SystemName::Is(name) => System::Is(name),
            SystemName::Matches(expression) => match (&role, expression.around_the_group()) {
                (Role::Captured { .. }, Some(parts)) => System::Cut(Box::new(cut(parts)?)),
                _ => System::Matches(of(&expression)?),
            },
        };
        Ok(Line { number, map: line.map, system, role })
    }

    fn judge(&self, name: &str, role: &str) -> Mapped {
        let number = self.number;
        if name.len() > MAX_NAME_BYTES {
            return Mapped::No;
        }
        let captured = match &self.system {
            System::Is(expected) if expected != name => return Mapped::No,
            System::Matches(expression) if !expression.is_match(name.as_bytes()) => return Mapped::No,
            System::Is(_) | System::Matches(_) => None,
            System::Cut(parts) => match cuts(parts, name.as_bytes()) {
                Captured::Nothing => return Mapped::No,
                Captured::One(captured) => Some(captured),
                Captured::OneOfSeveral => {
                    return Mapped::Unclear(format!(
                        "ident line {number} can be read in more than one way of this certificate: \\1 would not be certain"
                    ));
                }
            },
        };
        let is = match &self.role {
            Role::Is(expected) => expected == role,
            Role::Captured { before, after } => {
                let middle =
                    role.strip_prefix(before.as_str()).and_then(|rest| rest.strip_suffix(after.as_str()));
                middle.map(str::as_bytes) == captured && captured.is_some()
            }
            Role::All => true,
            Role::Matches(expression) => expression.is_match(role.as_bytes()),
            Role::MemberOf(group) => {
                return Mapped::Unclear(format!(
                    "ident line {number} asks for what a proxy cannot know: who is a member of role \"{group}\""
                ));
            }
        };
        if is { Mapped::Yes } else { Mapped::No }
    }
}

fn of(expression: &Expression) -> Result<Regex, regex::Error> {
    compile(expression.text())
}

fn cut(parts: &[String; 3]) -> Result<[Regex; 3], regex::Error> {
    let whole = |part: &str| compile(&format!("^(?:{part})$"));
    Ok([whole(&parts[0])?, whole(&parts[1])?, whole(&parts[2])?])
}

/// Byte by byte, as PostgreSQL does before it knows an encoding.
fn compile(text: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(text)
        .unicode(false)
        .dot_matches_new_line(true)
        .size_limit(MAX_EXPRESSION_BYTES)
        .dfa_size_limit(MAX_EXPRESSION_BYTES)
        .build()
}

/// Every way to cut the name so that each part fits.
fn cuts<'a>([before, group, after]: &[Regex; 3], name: &'a [u8]) -> Captured<'a> {
    let all = 0..=name.len();
    let starts: Vec<usize> = all.clone().filter(|at| before.is_match(&name[..*at])).collect();
    let ends: Vec<usize> = all.filter(|at| after.is_match(&name[*at..])).collect();
    let mut found: Option<&[u8]> = None;
    for start in starts {
        for end in ends.iter().copied().filter(|end| *end >= start) {
            let middle = &name[start..end];
            if group.is_match(middle) {
                // Wherever it stands, it is the same role.
                match found {
                    Some(known) if known != middle => return Captured::OneOfSeveral,
                    _ => found = Some(middle),
                }
            }
        }
    }
    found.map_or(Captured::Nothing, Captured::One)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(lines: &[&str], name: &str, role: &str) -> Mapped {
        Maps::parse(lines.iter().copied()).unwrap().judge("people", name, role)
    }

    fn unclear(mapped: Mapped) -> String {
        match mapped {
            Mapped::Unclear(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_are_roles_as_the_lines_say() {
        let dn = "CN=Anna B,OU=Till\\, left,O=Shop";
        for (line, name, role, expected) in [
            ("people anna@example.com anna", "anna@example.com", "anna", true),
            ("people anna@example.com anna", "anna@example.com", "bob", false),
            ("people anna@example.com anna", "Anna@example.com", "anna", false),
            ("people anna@example.com Anna", "anna@example.com", "anna", false),
            ("others anna@example.com anna", "anna@example.com", "anna", false),
            ("people \"CN=Anna B,OU=Till\\, left,O=Shop\" anna", dn, "anna", true),
            ("people \"CN=Anna B,OU=Till, left,O=Shop\" anna", dn, "anna", false),
            ("people \"a \"\"b\"\"\" anna", "a \"b\"", "anna", true),
            ("people /@example\\.com$ anna", "anna@example.com", "anna", true),
            ("people /@example\\.com anna", "anna@example.com.org", "anna", true),
            ("people /@EXAMPLE\\.com$ anna", "anna@example.com", "anna", false),
            ("people \"/^CN=.*,O=Shop$\" anna", dn, "anna", true),
            ("people /^(.*)@example\\.com$ \\1", "anna@example.com", "anna", true),
            ("people /^(.*)@example\\.com$ \\1", "anna@example.com", "bob", false),
            ("people /^(.*)@example\\.com$ \\1", "anna@example.org", "anna", false),
            ("people /^(.*)@example\\.com$ \"app_\\1_x\"", "anna@example.com", "app_anna_x", true),
            ("people /^(.*)@example\\.com$ \"app_\\1_x\"", "anna@example.com", "app__x", false),
            ("people \"/^CN=([^,]*),\" \\1", dn, "Anna B", true),
            ("people \"/^CN=([^,]*),\" \\1", dn, "Anna", false),
            ("people anna \\1", "anna", "\\1", true),
            ("people anna all", "anna", "whoever", true),
            ("people anna \"all\"", "anna", "whoever", false),
            ("people anna \"all\"", "anna", "all", true),
            ("people anna /^app_", "anna", "app_one", true),
            ("people anna /^app_", "anna", "an_app_one", false),
            ("people /^.{6}$ anna", "änna", "anna", false),
            ("people /^.{5}$ anna", "änna", "anna", true),
        ] {
            let expected = if expected { Mapped::Yes } else { Mapped::No };
            assert_eq!(judge(&[line], name, role), expected, "{line}: {name} as {role}");
        }
    }

    #[test]
    fn any_line_that_fits_is_enough() {
        let lines = ["", "# who is who", "people anna +staff", "people /^a anna", "people anna bob"];
        assert_eq!(judge(&lines, "anna", "anna"), Mapped::Yes);
        assert_eq!(judge(&lines, "anna", "bob"), Mapped::Yes);
        assert_eq!(judge(&lines, "bob", "anna"), Mapped::No);
        let why = unclear(judge(&lines, "anna", "carol"));
        assert_eq!(why, "ident line 3 asks for what a proxy cannot know: who is a member of role \"staff\"");
    }

    /// PostgreSQL takes the longest, and others the first.
    #[test]
    fn what_a_group_holds_is_not_guessed() {
        for (line, name, roles) in [
            ("people /^(a|ab)(.*)$ \\1", "abc", ["a", "ab"]),
            ("people /(.*)@example\\.com \\1", "a@example.com.b@example.com", ["a", "a@example.com.b"]),
            ("people /^(a?)(ab)? \\1", "ab", ["a", ""]),
        ] {
            for role in roles {
                let why = unclear(judge(&[line], name, role));
                assert!(why.starts_with("ident line 1 can be read in more than one way"), "{line}: {why}");
            }
        }
        // One way to stand at two places is the same role.
        assert_eq!(judge(&["people /(b) \\1"], "abab", "b"), Mapped::Yes);
        let long = "a".repeat(MAX_NAME_BYTES + 1);
        assert_eq!(judge(&["people /^(a*)$ \\1"], &long, &long), Mapped::No);
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let error = Maps::parse(["people a a", "# none", "people /(a b"]).unwrap_err();
        assert_eq!((error.number, error.line.as_str()), (3, "people /(a b"));
        assert!(
            error.to_string().starts_with("ident line 3 (\"people /(a b\"): it is no regular expression"),
            "{error}"
        );
    }
}
