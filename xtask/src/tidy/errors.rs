//! Error codes and their pages: whoever searches for a code finds what it means and what to do.

use std::collections::BTreeMap;

use super::source::Source;
use super::{Complaint, File};

const PAGES: &str = "docs/errors/";
const WHY: &str = "an operator who meets a code must find its page, and a page must belong to a code";

pub(super) fn check(sources: &[Source<'_>], files: &[File]) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let mut codes: BTreeMap<&str, ()> = BTreeMap::new();
    for source in sources.iter().filter(|source| source.path().starts_with("crates/")) {
        for (at, text) in source.texts.iter().filter(|(at, text)| is_code(text) && !source.is_test(*at)) {
            codes.insert(text, ());
            let page = format!("{PAGES}{text}.md");
            match files.iter().find(|file| file.path == page) {
                None => complaints.push(source.file.complaint(
                    source.line(*at),
                    format!("{text} has no page {page}"),
                    WHY,
                )),
                Some(file) if !file.text.starts_with(&format!("# {text}")) => {
                    complaints.push(file.complaint(
                        1,
                        format!("the page does not begin with \"# {text}\""),
                        WHY,
                    ));
                }
                Some(_) => {}
            }
        }
    }
    for file in files {
        let Some(code) = file.path.strip_prefix(PAGES).and_then(|name| name.strip_suffix(".md")) else {
            continue;
        };
        if is_code(code) && !codes.contains_key(code) {
            complaints.push(file.complaint(0, format!("no code is called {code}"), WHY));
        }
    }
    complaints
}

/// `PGH-` and words in capitals.
fn is_code(text: &str) -> bool {
    let word = |word: &str| {
        !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
    };
    text.strip_prefix("PGH-").is_some_and(|words| words.split('-').all(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_pages_belong_together() {
        let file = |path: &str, text: &str| File { path: path.to_owned(), text: text.to_owned() };
        let files = [
            file(
                "crates/api/src/error.rs",
                "A = \"PGH-ONE\"; B = \"PGH-TWO-WORDS\"; C = \"PGH-three\"; D = \"PGH-FOUR\";",
            ),
            file("docs/errors/PGH-ONE.md", "# PGH-ONE\n"),
            file("docs/errors/PGH-FOUR.md", "# PGH-FIVE\n"),
            file("docs/errors/PGH-GONE.md", "# PGH-GONE\n"),
            file("docs/errors/README.md", "# Errors\n"),
        ];
        let sources: Vec<Source<'_>> = files.iter().filter(|file| file.is_rust()).map(Source::new).collect();
        let told: Vec<String> = check(&sources, &files).into_iter().map(|complaint| complaint.what).collect();
        assert_eq!(
            told,
            [
                "PGH-TWO-WORDS has no page docs/errors/PGH-TWO-WORDS.md",
                "the page does not begin with \"# PGH-FOUR\"",
                "no code is called PGH-GONE",
            ]
        );
    }
}
