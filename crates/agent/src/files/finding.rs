//! What is wrong with a file, and where: as a person reads it, and as JSON.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

/// Letters of a line that are shown at most; of a longer one, those around the mistake.
const MAX_SHOWN: usize = 120;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

/// The kinds of findings, by which programs tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Syntax,
    UnknownKey,
    /// The design has it, this version does not.
    NotBuiltYet,
    MissingKey,
    WrongType,
    WrongValue,
    /// Values that do not go together.
    BrokenRule,
    /// Allowed, and probably not meant.
    Doubt,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Syntax => "syntax",
            Kind::UnknownKey => "unknown-key",
            Kind::NotBuiltYet => "not-built-yet",
            Kind::MissingKey => "missing-key",
            Kind::WrongType => "wrong-type",
            Kind::WrongValue => "wrong-value",
            Kind::BrokenRule => "broken-rule",
            Kind::Doubt => "doubt",
        }
    }
}

/// One mistake, with its place in bytes of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    pub(super) severity: Severity,
    pub(super) kind: Kind,
    pub(super) span: Range<usize>,
    pub(super) message: String,
    pub(super) hint: Option<String>,
    /// Another place that has to do with it, and how.
    pub(super) related: Option<(Range<usize>, &'static str)>,
}

impl Mistake {
    pub(super) fn new(kind: Kind, span: Range<usize>, message: impl Into<String>) -> Mistake {
        let severity = if kind == Kind::Doubt { Severity::Warning } else { Severity::Error };
        Mistake { severity, kind, span, message: message.into(), hint: None, related: None }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Mistake {
        self.hint = Some(hint.into());
        self
    }
}

/// A mistake with everything that is needed to show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub kind: Kind,
    pub file: String,
    /// From 1; columns count letters, not bytes.
    pub line: usize,
    pub column: usize,
    /// Letters that the mistake covers in that line, at least 1.
    pub width: usize,
    /// The line itself, without control characters.
    pub text: String,
    pub message: String,
    pub hint: Option<String>,
    pub related: Option<Related>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Related {
    pub line: usize,
    pub column: usize,
    pub message: String,
}

/// All findings of a file, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Findings(pub Vec<Finding>);

impl Findings {
    pub(super) fn new(file: &str, text: &str, mut mistakes: Vec<Mistake>) -> Findings {
        mistakes.sort_by(|one, other| {
            (one.span.start, one.span.end, one.kind).cmp(&(other.span.start, other.span.end, other.kind))
        });
        mistakes.dedup();
        let finding = |mistake: Mistake| {
            let (line, column, shown) = locate(text, mistake.span.start);
            // A place past the end, or one that cuts a letter in two, covers nothing.
            let covered = text.get(mistake.span.start..mistake.span.end.min(text.len())).unwrap_or("");
            let width = covered.chars().take_while(|letter| !matches!(letter, '\n' | '\r')).count().max(1);
            let related = mistake.related.map(|(span, message)| {
                let (line, column, _) = locate(text, span.start);
                Related { line, column, message: message.to_owned() }
            });
            Finding {
                severity: mistake.severity,
                kind: mistake.kind,
                file: file.to_owned(),
                line,
                column,
                width,
                text: plain(shown),
                message: plain(&mistake.message),
                hint: mistake.hint.as_deref().map(plain),
                related,
            }
        };
        Findings(mistakes.into_iter().map(finding).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn errors(&self) -> usize {
        self.0.iter().filter(|finding| finding.severity == Severity::Error).count()
    }
}

/// Line and column of a byte, and the whole line.
fn locate(text: &str, at: usize) -> (usize, usize, &str) {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    let end = text[at..].find('\n').map_or(text.len(), |newline| at + newline);
    let line = text[..start].bytes().filter(|byte| *byte == b'\n').count() + 1;
    (line, text[start..at].chars().count() + 1, text[start..end].trim_end_matches('\r'))
}

/// A text from a file on somebody's terminal: what would move the cursor or change colours becomes a mark,
/// one for one, so that columns stay true.
fn plain(text: &str) -> String {
    text.chars()
        .map(|letter| match letter {
            '\t' => ' ',
            // Besides control characters those that turn the direction of writing round.
            letter
                if letter.is_control()
                    || matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                '\u{fffd}'
            }
            letter => letter,
        })
        .collect()
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let Finding { file, line, column, .. } = self;
        writeln!(f, "{severity}[{}]: {}", self.kind.as_str(), self.message)?;
        let number = line.to_string();
        let margin = " ".repeat(number.len());
        writeln!(f, "{margin}--> {file}:{line}:{column}")?;

        let letters: Vec<char> = self.text.chars().collect();
        let begin = (column - 1).saturating_sub(MAX_SHOWN / 3);
        let begin = if letters.len() <= MAX_SHOWN { 0 } else { begin.min(letters.len() - MAX_SHOWN) };
        let shown: String = letters.iter().skip(begin).take(MAX_SHOWN).collect();
        let (before, after) =
            (if begin > 0 { "…" } else { "" }, if begin + MAX_SHOWN < letters.len() { "…" } else { "" });
        let indent = " ".repeat(before.chars().count() + column - 1 - begin.min(column - 1));
        let carets =
            "^".repeat(self.width.min(MAX_SHOWN.saturating_sub(column - 1 - begin.min(column - 1)).max(1)));
        writeln!(f, "{margin} |")?;
        writeln!(f, "{number} | {}", format!("{before}{shown}{after}").trim_end())?;
        writeln!(f, "{margin} | {indent}{carets}")?;
        if let Some(related) = &self.related {
            writeln!(f, "{margin} = {file}:{}:{}: {}", related.line, related.column, related.message)?;
        }
        if let Some(hint) = &self.hint {
            writeln!(f, "{margin} = help: {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            finding.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Findings {}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, span: Range<usize>) -> String {
        Findings::new("herd.toml", text, vec![Mistake::new(Kind::WrongValue, span, "no").hint("yes")])
            .to_string()
    }

    #[test]
    fn a_finding_points_at_its_letters() {
        assert_eq!(
            shown("a = 1\nä\tb = \"x\"\n", 13..16),
            "error[wrong-value]: no\n --> herd.toml:2:7\n  |\n2 | ä b = \"x\"\n  |       ^^^\n  = help: yes\n"
        );
    }

    #[test]
    fn a_place_past_the_end_or_in_the_middle_of_a_letter_is_still_shown() {
        let backwards = Range { start: 2, end: 1 };
        for span in [0..0, 1..1, 1..2, 99..100, backwards] {
            assert!(shown("ä", span).contains("herd.toml:1:"));
        }
        assert!(shown("", 0..0).contains("herd.toml:1:1"));
    }

    #[test]
    fn long_lines_are_cut_around_the_mistake_and_carets_stay_under_it() {
        let text = format!("{}WRONG{}", "x".repeat(500), "y".repeat(500));
        let shown = shown(&text, 500..505);
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines.iter().all(|line| line.chars().count() < MAX_SHOWN + 10), "{shown}");
        let at = |line: &str, what: char| line.chars().position(|letter| letter == what);
        assert_eq!(at(lines[3], 'W'), at(lines[4], '^'), "{shown}");
        assert_eq!(lines[4].matches('^').count(), 5);
    }

    #[test]
    fn a_file_cannot_write_to_the_terminal() {
        let shown = shown("a = \"\u{1b}[31m\u{202e}\"", 4..5);
        assert!(!shown.contains('\u{1b}') && !shown.contains('\u{202e}'));
    }
}
