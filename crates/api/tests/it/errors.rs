//! Every code has its page, every page its code, and both say the same.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pgherd_api::{Code, ExitClass};

fn pages() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/errors")
}

fn exit_line(class: ExitClass) -> &'static str {
    match class {
        ExitClass::Failed => "Exit code 1: failed.",
        ExitClass::Usage => "Exit code 2: usage.",
        ExitClass::Refused => "Exit code 3: refused by a safety rule.",
        ExitClass::TimedOut => "Exit code 4: timed out.",
    }
}

#[test]
fn every_code_has_a_page_that_agrees_with_it() {
    for code in Code::ALL {
        let path = pages().join(format!("{code}.md"));
        let page =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut lines = page.lines();
        assert_eq!(lines.next(), Some(format!("# {code}").as_str()), "first line of {}", path.display());
        assert_eq!(lines.next(), Some(""));
        let title = lines.next().unwrap_or_default();
        let said = format!("{} {}", sentence(code.title()), exit_line(code.exit_class()));
        assert_eq!(title, said, "third line of {}", path.display());
        for section in ["## What happened", "## What to do"] {
            let text =
                page.split_once(section).map(|(_, rest)| rest.split("\n## ").next().unwrap_or_default());
            let words = text.unwrap_or_default().split_whitespace().count();
            assert!(words >= 8, "\"{section}\" of {} says too little", path.display());
        }
    }
}

#[test]
fn every_page_has_a_code() {
    let codes: BTreeSet<String> = Code::ALL.iter().map(|code| format!("{code}.md")).collect();
    for entry in std::fs::read_dir(pages()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "README.md" || codes.contains(&name), "docs/errors/{name} is the page of no code");
    }
}

#[test]
fn the_index_lists_every_code() {
    let index = std::fs::read_to_string(pages().join("README.md")).unwrap();
    for code in Code::ALL {
        let line = format!("| [{code}]({code}.md) | {} | {} |", code.exit_class().exit_code(), code.title());
        assert!(index.lines().any(|found| found == line), "docs/errors/README.md lacks the line: {line}");
    }
    let rows = index.lines().filter(|line| line.starts_with("| [")).count();
    assert_eq!(rows, Code::ALL.len());
}

fn sentence(title: &str) -> String {
    let mut letters = title.chars();
    let first = letters.next().map(|letter| letter.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}
