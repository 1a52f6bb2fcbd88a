//! Regular expressions that mean the same to PostgreSQL and to a proxy.
//!
//! PostgreSQL reads Spencer's "advanced" ones, byte by byte (a certificate is looked at before any encoding is known), and finds
//! the longest match; others read Perl's, and find the first. Whether there is a match does not depend on that. What a group
//! holds does, so for a group that is asked for the text is cut up ([`Expression::around_the_group`]): whoever matches tries each
//! way to cut, and goes on only if there is one.
//!
//! Hazard: a form that is taken here and means something else there lets in somebody else.

use regex_syntax::ast::parse::ParserBuilder;
use regex_syntax::ast::{
    AssertionKind, Ast, ClassAsciiKind, ClassBracketed, ClassPerlKind, ClassSet, ClassSetItem, GroupKind,
    Literal, LiteralKind, RepetitionKind, RepetitionRange,
};

/// Of an expression, in bytes.
const MAX_BYTES: usize = 1000;
/// Of what it is when its counts are written out: PostgreSQL refuses what is too complex, and with it the whole file.
const MAX_WRITTEN_OUT: u32 = 5000;
/// PostgreSQL's `DUPMAX`.
const MAX_COUNT: u32 = 255;
const MAX_DEPTH: u32 = 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    text: String,
    around: Option<[String; 3]>,
}

impl Expression {
    pub(super) fn parse(text: &str) -> Result<Expression, &'static str> {
        if text.is_empty() {
            return Err("the regular expression is empty, and would match everything");
        }
        if text.len() > MAX_BYTES {
            return Err("the regular expression has more than 1000 characters");
        }
        if !text.is_ascii() {
            return Err(
                "a regular expression has only ASCII characters here: what others match depends on who reads it",
            );
        }
        let ast = ParserBuilder::new().nest_limit(MAX_DEPTH).build().parse(text);
        let ast = ast.map_err(|_| "it is no regular expression that PostgreSQL and proxies read alike")?;
        if size(&ast)? > MAX_WRITTEN_OUT {
            return Err("the regular expression is too complex: its counts multiply");
        }
        Ok(Expression { text: text.to_owned(), around: around(text, &ast) })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// What stands before the first group, in it, and behind it: each to be matched as a whole. `None`: there is no group, or
    /// it may be there several times or not at all, or what stands around it asks where it is.
    pub fn around_the_group(&self) -> Option<&[String; 3]> {
        self.around.as_ref()
    }
}

fn around(text: &str, ast: &Ast) -> Option<[String; 3]> {
    let lone = [ast.clone()];
    let items = match ast {
        Ast::Concat(concat) => concat.asts.as_slice(),
        _ => &lone,
    };
    let is = |item: Option<&Ast>, kind: AssertionKind| matches!(item, Some(Ast::Assertion(assertion)) if assertion.kind == kind);
    let begins = is(items.first(), AssertionKind::StartLine);
    let ends = is(items.last(), AssertionKind::EndLine);
    let items = &items[usize::from(begins)..items.len() - usize::from(ends)];
    if items.iter().any(has_assertion) {
        return None;
    }
    let group = items.iter().find_map(|item| match item {
        Ast::Group(group) if matches!(group.kind, GroupKind::CaptureIndex(1)) => Some(group),
        _ => None,
    })?;
    let from = usize::from(begins);
    let to = text.len() - usize::from(ends);
    let (start, end) = (group.span.start.offset, group.span.end.offset);
    let anything = |is_tied: bool| if is_tied { "" } else { ".*" };
    Some([
        format!("{}{}", anything(begins), &text[from..start]),
        text[start + 1..end - 1].to_owned(),
        format!("{}{}", &text[end..to], anything(ends)),
    ])
}

fn has_assertion(ast: &Ast) -> bool {
    match ast {
        Ast::Assertion(_) => true,
        Ast::Repetition(repetition) => has_assertion(&repetition.ast),
        Ast::Group(group) => has_assertion(&group.ast),
        Ast::Alternation(alternation) => alternation.asts.iter().any(has_assertion),
        Ast::Concat(concat) => concat.asts.iter().any(has_assertion),
        _ => false,
    }
}

/// Refuses what the two do not read alike.
fn size(ast: &Ast) -> Result<u32, &'static str> {
    match ast {
        Ast::Empty(_) | Ast::Dot(_) => Ok(1),
        Ast::Flags(_) => Err("PostgreSQL has other flags than (?i)"),
        Ast::Literal(literal) => plain(literal).map(|()| 1),
        Ast::Assertion(assertion) => match assertion.kind {
            AssertionKind::StartLine | AssertionKind::EndLine => Ok(1),
            _ => Err("of what asserts a place only ^ and $ mean the same to PostgreSQL"),
        },
        Ast::ClassUnicode(_) => Err("PostgreSQL has no \\p"),
        Ast::ClassPerl(_) => Ok(1),
        Ast::ClassBracketed(class) => bracketed(class).map(|()| 1),
        Ast::Repetition(repetition) => {
            match &*repetition.ast {
                Ast::Repetition(_) => return Err("a count stands behind a count"),
                Ast::Assertion(_) | Ast::Empty(_) => {
                    return Err("a count stands where nothing can be counted");
                }
                _ => {}
            }
            let times = match &repetition.op.kind {
                RepetitionKind::ZeroOrOne | RepetitionKind::ZeroOrMore | RepetitionKind::OneOrMore => 1,
                RepetitionKind::Range(
                    RepetitionRange::Exactly(most)
                    | RepetitionRange::AtLeast(most)
                    | RepetitionRange::Bounded(_, most),
                ) => *most,
            };
            if times > MAX_COUNT {
                return Err("PostgreSQL counts to 255");
            }
            Ok(size(&repetition.ast)?.saturating_mul(times.max(1)))
        }
        Ast::Group(group) => match &group.kind {
            GroupKind::CaptureIndex(_) => size(&group.ast),
            GroupKind::NonCapturing(flags) if flags.items.is_empty() => size(&group.ast),
            GroupKind::NonCapturing(_) => Err("PostgreSQL has other flags than (?i)"),
            GroupKind::CaptureName { .. } => Err("PostgreSQL has no groups with names"),
        },
        Ast::Alternation(alternation) => sum(&alternation.asts),
        Ast::Concat(concat) => sum(&concat.asts),
    }
}

fn sum(asts: &[Ast]) -> Result<u32, &'static str> {
    asts.iter().try_fold(1_u32, |sum, ast| Ok(sum.saturating_add(size(ast)?)))
}

fn plain(literal: &Literal) -> Result<(), &'static str> {
    match literal.kind {
        LiteralKind::Verbatim | LiteralKind::Meta | LiteralKind::Superfluous => Ok(()),
        _ => Err("a backslash before a letter or a digit means something else to PostgreSQL"),
    }
}

fn bracketed(class: &ClassBracketed) -> Result<(), &'static str> {
    match &class.kind {
        ClassSet::Item(ClassSetItem::Union(union)) => {
            let last = union.items.len().saturating_sub(1);
            union.items.iter().enumerate().try_for_each(|(at, member)| item(member, at == 0 || at == last))
        }
        ClassSet::Item(member) => item(member, true),
        ClassSet::BinaryOp(_) => Err("PostgreSQL knows no operations in brackets"),
    }
}

fn item(item: &ClassSetItem, at_an_end: bool) -> Result<(), &'static str> {
    let is_dash = |literal: &Literal| literal.c == '-' && literal.kind == LiteralKind::Verbatim;
    match item {
        ClassSetItem::Literal(literal) if is_dash(literal) && !at_an_end => {
            Err("a - in brackets stands first, last, between the ends of a range, or behind a backslash")
        }
        ClassSetItem::Literal(literal) => plain(literal),
        ClassSetItem::Range(range) if is_dash(&range.start) || is_dash(&range.end) => {
            Err("a - is no end of a range")
        }
        ClassSetItem::Range(range) => plain(&range.start).and(plain(&range.end)),
        ClassSetItem::Ascii(class)
            if !class.negated && !matches!(class.kind, ClassAsciiKind::Ascii | ClassAsciiKind::Word) =>
        {
            Ok(())
        }
        ClassSetItem::Ascii(_) => Err("PostgreSQL has no such class of characters"),
        ClassSetItem::Perl(class)
            if !class.negated
                && matches!(
                    class.kind,
                    ClassPerlKind::Digit | ClassPerlKind::Space | ClassPerlKind::Word
                ) =>
        {
            Ok(())
        }
        ClassSetItem::Perl(_) => Err("not every PostgreSQL takes \\D, \\S and \\W in brackets"),
        ClassSetItem::Empty(_)
        | ClassSetItem::Unicode(_)
        | ClassSetItem::Bracketed(_)
        | ClassSetItem::Union(_) => Err("PostgreSQL knows no brackets in brackets"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_read_alike_is_taken() {
        for text in [
            "^(.*)@example\\.com$",
            "^CN=([^,]+),OU=(Shop|Store),.*$",
            "^[a-z_][a-z0-9_-]{0,62}$",
            "^[]a]+[^]a]$",
            "^[[:alpha:]_][\\w.]*\\d{3}$",
            "a|b|",
            "^(?:ab)?c+?$",
            "x{2}",
            "\\@\\-\\/",
        ] {
            assert!(Expression::parse(text).is_ok(), "{text}: {:?}", Expression::parse(text));
        }
    }

    #[test]
    fn what_they_would_not_is_refused() {
        for text in [
            "",
            "ä",
            "(",
            "a**",
            "a{2}{3}",
            "^*",
            "(|a",
            "(?i)a",
            "(?i:a)",
            "(?P<n>a)",
            "(?=a)",
            "\\Aa",
            "a\\z",
            "\\ba",
            "\\na",
            "\\x41",
            "\\pL",
            "[[a]]",
            "[a&&b]",
            "[a--b]",
            "[a-c-e]",
            "[[:^alpha:]]",
            "[[:word:]]",
            "[[.a.]]",
            "[\\D]",
            "a{256}",
            "(a{99}){99}",
            "***=a",
            "\\1",
            "\\<a",
            "a{,3}",
        ] {
            assert!(Expression::parse(text).is_err(), "{text}");
        }
        assert!(Expression::parse(&"a".repeat(1001)).is_err());
    }

    #[test]
    fn what_stands_around_a_group_is_cut_up() {
        let around = |text: &str| {
            let expression = Expression::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"));
            expression.around_the_group().map(|parts| parts.join(" "))
        };
        assert_eq!(around("^(.*)@a$").as_deref(), Some(" .* @a"));
        assert_eq!(around("^CN=([^,]+),(x|y)").as_deref(), Some("CN= [^,]+ ,(x|y).*"));
        assert_eq!(around("(a|b)").as_deref(), Some(".* a|b .*"));
        assert_eq!(around("^(?:x)(a(b))$").as_deref(), Some("(?:x) a(b) "));
        for none in ["^a$", "^(a)*$", "^(?:(a))$", "(a)|b", "a$(b)", "^(^a)$"] {
            assert_eq!(around(none), None, "{none}");
        }
    }
}
