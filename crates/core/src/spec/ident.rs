//! One line of `pg_ident.conf`, as the herd file gives it: whom a certificate or an operating system knows by which name may be
//! which role.
//!
//! PostgreSQL and proxies read these lines, each by its own means. So only such [`Expression`]s are taken as mean the same to
//! both, and nothing that an older PostgreSQL takes for something else. A line that does not parse would make PostgreSQL do
//! without the whole file, pgherd's own lines included, which is why the grammar is checked to the end.

mod expression;

pub use expression::Expression;

use super::hba::{Field, HbaError, HbaWrong, Token, single, split, wrong};

/// A line that PostgreSQL takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentLine {
    pub map: String,
    /// What the other side calls the client.
    pub system: SystemName,
    /// What it may be here.
    pub role: MappedRole,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SystemName {
    Is(String),
    Matches(Expression),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MappedRole {
    Is(String),
    /// What the first group of the system's name has matched, between these.
    Captured {
        before: String,
        after: String,
    },
    /// Any.
    All,
    MemberOf(String),
    Matches(Expression),
}

/// What stands in a role's place for what the first group has matched.
const CAPTURED: &str = "\\1";
/// From this major on the role may be `all`, `+role` or an expression; before that each is the name of a role.
const KEYWORDS_SINCE: u16 = 16;

impl IdentLine {
    pub fn parse(line: &str, version: Option<u16>) -> Result<IdentLine, HbaError> {
        let mut fields = split(line)?.into_iter();
        let end = line.trim_end().len();
        let mut next = |what| {
            let lacks = HbaError { at: end..line.len(), wrong: HbaWrong::NoMapping { lacks: what } };
            fields.next().ok_or(lacks)
        };
        let map = next("the name of a map")?;
        let map = name(&map, "the name of a map")?;
        check_map(map)?;
        let system = next("the name in the other system")?;
        let system = name(&system, "the name in the other system")?;
        let (expression, role) = match system.text.strip_prefix('/') {
            // In quotes as well.
            Some(text) => (Some(expression(system, text)?), next("the role")?),
            None => (None, next("the role")?),
        };
        if let Some(more) = fields.next() {
            return Err(HbaError { at: more.at, wrong: HbaWrong::MoreThanMapping });
        }
        let role = mapped(&role, expression.as_ref(), version)?;
        let system = match expression {
            Some(expression) => SystemName::Matches(expression),
            None => SystemName::Is(system.text.clone()),
        };
        Ok(IdentLine { map: map.text.clone(), system, role })
    }
}

/// Of a map: pgherd's own are not the herd file's.
pub(super) fn check_map(token: &Token) -> Result<(), HbaError> {
    if token.text.starts_with("pgherd") {
        return Err(wrong(token, HbaWrong::OwnMap { word: token.text.clone() }));
    }
    Ok(())
}

fn name<'a>(field: &'a Field, what: &'static str) -> Result<&'a Token, HbaError> {
    let token = single(field, what)?;
    if token.text.starts_with('@') && !token.quoted {
        return Err(wrong(token, HbaWrong::FileReference { word: token.text.clone() }));
    }
    if token.text.is_empty() {
        return Err(wrong(token, HbaWrong::NoMapping { lacks: what }));
    }
    Ok(token)
}

fn expression(token: &Token, text: &str) -> Result<Expression, HbaError> {
    Expression::parse(text).map_err(|why| wrong(token, HbaWrong::RegularExpression { why: why.to_owned() }))
}

fn mapped(
    field: &Field,
    expression_before: Option<&Expression>,
    version: Option<u16>,
) -> Result<MappedRole, HbaError> {
    let token = name(field, "the role")?;
    let text = token.text.as_str();
    let since = |what| match version {
        Some(version) if version < KEYWORDS_SINCE => {
            Err(wrong(token, HbaWrong::NotInVersion { what, first: KEYWORDS_SINCE }))
        }
        _ => Ok(()),
    };
    if let Some(text) = text.strip_prefix('/') {
        since("a regular expression for the role in pg_ident.conf")?;
        return Ok(MappedRole::Matches(expression(token, text)?));
    }
    if !token.quoted && text == "all" {
        since("the keyword all in pg_ident.conf")?;
        return Ok(MappedRole::All);
    }
    if let Some(role) = text.strip_prefix('+').filter(|_| !token.quoted) {
        since("a group of roles in pg_ident.conf")?;
        return Ok(MappedRole::MemberOf(role.to_owned()));
    }
    if text.starts_with("pgherd") {
        return Err(wrong(token, HbaWrong::OwnRole { word: text.to_owned() }));
    }
    match (expression_before, text.split_once(CAPTURED)) {
        (Some(expression), Some((before, after))) => {
            if expression.around_the_group().is_none() {
                return Err(wrong(token, HbaWrong::NoGroup));
            }
            Ok(MappedRole::Captured { before: before.to_owned(), after: after.to_owned() })
        }
        _ => Ok(MappedRole::Is(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> IdentLine {
        IdentLine::parse(line, Some(16)).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn what_postgresql_reads_is_read() {
        let line = parse("people  \"CN=Anna B,O=Shop\"\tanna # hers");
        assert_eq!(line.map, "people");
        assert_eq!(line.system, SystemName::Is("CN=Anna B,O=Shop".to_owned()));
        assert_eq!(line.role, MappedRole::Is("anna".to_owned()));
        let line = parse("people /^(.*)@example\\.com$ app_\\1_x");
        let SystemName::Matches(expression) = line.system else { panic!("{line:?}") };
        assert_eq!(expression.text(), "^(.*)@example\\.com$");
        let (before, after) = ("app_".to_owned(), "_x".to_owned());
        assert_eq!(line.role, MappedRole::Captured { before, after });
        assert_eq!(parse("people anna all").role, MappedRole::All);
        assert_eq!(parse("people anna \"all\"").role, MappedRole::Is("all".to_owned()));
        assert_eq!(parse("people anna +staff").role, MappedRole::MemberOf("staff".to_owned()));
        assert_eq!(parse("people anna \"+staff\"").role, MappedRole::Is("+staff".to_owned()));
        assert!(matches!(parse("people anna \"/^a,b$\"").role, MappedRole::Matches(_)), "in quotes as well");
        // Without an expression there is no group.
        assert_eq!(parse("people anna \\1").role, MappedRole::Is("\\1".to_owned()));
        // As in PostgreSQL, the first one only.
        let (before, after) = (String::new(), "\\1".to_owned());
        assert_eq!(parse("people /^(a)$ \\1\\1").role, MappedRole::Captured { before, after });
    }

    #[test]
    fn each_mistake_is_told_at_its_place() {
        for (line, at, told) in [
            ("", 0..0, "the line ends before the name of a map"),
            ("# people anna anna", 18..18, "the line ends before the name of a map"),
            ("people anna", 11..11, "the line ends before the role"),
            ("people anna anna anna", 17..21, "a mapping ends with the role"),
            ("people anna,b anna", 7..13, "is one word, not a list"),
            ("people CN=Anna,O=Shop anna", 7..21, "is one word, not a list"),
            ("people \"\" anna", 7..9, "the line ends before the name in the other system"),
            ("people @file anna", 7..12, "refers to a file"),
            ("pgherd_proxied anna anna", 0..14, "one of pgherd's own maps"),
            ("people anna pgherd_proxy", 12..24, "one of pgherd's own roles"),
            ("people /(a anna", 7..10, "is no regular expression"),
            ("people /^a(?i)b$ anna", 7..16, "flags"),
            ("people /^a$ \\1", 12..14, "no group that is there exactly once"),
            ("people /^(a)*$ \\1", 15..17, "no group that is there exactly once"),
            ("people anna all", 12..15, "exists from PostgreSQL 16"),
            ("people anna +staff", 12..18, "exists from PostgreSQL 16"),
            ("people anna /^a", 12..15, "exists from PostgreSQL 16"),
            ("people anna anna \\", 17..18, "joins the next line"),
            ("people anna anna # \\", 19..20, "joins the next line"),
            ("people anna \"anna", 12..17, "the quote is not closed"),
            ("people anna anna\npgherd a b", 16..17, "line break"),
        ] {
            let error = IdentLine::parse(line, Some(15)).expect_err(line);
            assert!(error.to_string().contains(told), "{line}: {error}");
            assert_eq!(error.at, at, "{line}: {error}");
        }
    }
}
