//! The table "from a fault to the code" in `ARCHITECTURE.md`: every function, script and test that it names
//! exists.
//!
//! Columns: fault | decided by | script | test. `decided by` names functions in backticks, by their path in
//! `core` (`ha::election::result`) or with the crate before it (`agent::execute::seal`). `script` names files
//! of `crates/core/testdata/`. `test` names files with or without a function (`testkit/tests/it/ha.rs::b01`).
//! Several are separated by commas; a dash in the last stands for what is not written yet. A fault that nothing
//! decides is no row.

use super::source::Source;
use super::{Complaint, File};

const PAGE: &str = "ARCHITECTURE.md";
const COLUMNS: [&str; 4] = ["fault", "decided by", "script", "test"];
const SCRIPTS: &str = "crates/core/testdata/";
const WHY: &str = "the table is how a reader gets from a fault to the code; a wrong row leads nowhere";

pub(super) fn check(files: &[File]) -> Vec<Complaint> {
    let Some(page) = files.iter().find(|file| file.path == PAGE) else {
        return vec![Complaint {
            path: PAGE.to_owned(),
            line: 0,
            what: "the page is gone".to_owned(),
            why: WHY,
        }];
    };
    let lines: Vec<&str> = page.text.lines().collect();
    let Some(head) = lines.iter().position(|line| cells(line) == COLUMNS) else {
        return vec![page.complaint(0, format!("no table has the columns {}", COLUMNS.join(" | ")), WHY)];
    };
    let rows: Vec<(usize, Vec<&str>)> = lines[head + 1..]
        .iter()
        .enumerate()
        .map(|(index, line)| (head + 2 + index, cells(line)))
        .take_while(|(_, cells)| !cells.is_empty())
        .skip(1)
        .collect();
    if rows.is_empty() {
        return vec![page.complaint(head + 1, "the table of faults has no rows", WHY)];
    }
    let mut complaints = Vec::new();
    for (line, row) in rows {
        let [_, functions, scripts, tests] = row.as_slice() else {
            complaints.push(page.complaint(line, "the row has not four cells", WHY));
            continue;
        };
        let mut add = |what: String| complaints.push(page.complaint(line, what, WHY));
        if names(functions).is_empty() {
            add("the row names no function in backticks".to_owned());
        }
        if names(scripts).is_empty() {
            add("the row names no script in backticks".to_owned());
        }
        for function in names(functions) {
            if !function_exists(files, function) {
                add(format!("no function is called {function}"));
            }
        }
        for script in names(scripts) {
            let path = format!("{SCRIPTS}{script}");
            if !files.iter().any(|file| file.path == path) {
                add(format!("there is no script {path}"));
            }
        }
        // What is not written yet is shown as a dash, so that the gap is seen by whoever reads the table.
        if names(tests).is_empty() && !matches!(*tests, "–" | "-") {
            add("the row names no test in backticks, and no dash says so".to_owned());
        }
        for test in names(tests) {
            let (path, function) =
                test.split_once("::").map_or((test, None), |(path, name)| (path, Some(name)));
            let file = files.iter().find(|file| file.path == path);
            let found = file.is_some_and(|file| function.is_none_or(|name| defines(file, name)));
            if !found {
                add(format!("there is no test {test}"));
            }
        }
    }
    complaints
}

/// The cells of a row; none for a line that is no row.
fn cells(line: &str) -> Vec<&str> {
    let Some(inner) = line.trim().strip_prefix('|').and_then(|line| line.strip_suffix('|')) else {
        return Vec::new();
    };
    inner.split('|').map(str::trim).collect()
}

/// What stands in backticks.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// `a::b::c`: a function `c` in `crates/core/src/a/b.rs`, or in the crate `a`. A method is named with its type:
/// `record::Record::apply`.
fn function_exists(files: &[File], path: &str) -> bool {
    let parts: Vec<&str> = path.split("::").collect();
    let Some((name, modules)) = parts.split_last() else { return false };
    let modules: Vec<&str> = modules
        .iter()
        .copied()
        .filter(|part| !part.starts_with(|letter: char| letter.is_uppercase()))
        .collect();
    let file_of = |krate: &str, modules: &[&str]| match modules {
        [] => format!("crates/{krate}/src/lib.rs"),
        modules => format!("crates/{krate}/src/{}.rs", modules.join("/")),
    };
    let mut candidates = vec![file_of("core", &modules)];
    if let Some((krate, rest)) = modules.split_first() {
        candidates.push(file_of(krate, rest));
    }
    files.iter().any(|file| candidates.contains(&file.path) && defines(file, name))
}

fn defines(file: &File, function: &str) -> bool {
    let source = Source::new(file);
    !source.find(&format!("fn {function}")).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(table: &str) -> Vec<String> {
        let file = |path: &str, text: &str| File { path: path.to_owned(), text: text.to_owned() };
        let files = [
            file(
                "ARCHITECTURE.md",
                &format!("# A\n\n| fault | decided by | script | test |\n|---|---|---|---|\n{table}\nText\n"),
            ),
            file("crates/core/src/ha/election.rs", "pub fn result() {}"),
            file("crates/core/src/record.rs", "impl Record { pub fn apply() {} }"),
            file("crates/agent/src/execute.rs", "fn seal() {}"),
            file("crates/core/testdata/lost-host.txt", ""),
            file("testkit/tests/it/ha.rs", "fn b01_lost_host() {}"),
        ];
        check(&files).into_iter().map(|complaint| format!("{}: {}", complaint.line, complaint.what)).collect()
    }

    #[test]
    fn rows_name_what_exists() {
        let good = "| host lost | `ha::election::result`, `record::Record::apply`, `agent::execute::seal` | `lost-host.txt` | `testkit/tests/it/ha.rs::b01_lost_host` |";
        assert_eq!(told(good), Vec::<String>::new());
        let dash = "| host lost | `ha::election::result` | `lost-host.txt` | – |";
        assert_eq!(told(dash), Vec::<String>::new());
        assert_eq!(told(""), ["3: the table of faults has no rows"]);
        assert_eq!(
            told(
                "| x | `ha::election::gone` | `gone.txt` | `testkit/tests/it/ha.rs::gone` |\n| y | – | | |\n| z |"
            ),
            [
                "5: no function is called ha::election::gone",
                "5: there is no script crates/core/testdata/gone.txt",
                "5: there is no test testkit/tests/it/ha.rs::gone",
                "6: the row names no function in backticks",
                "6: the row names no script in backticks",
                "6: the row names no test in backticks, and no dash says so",
                "7: the row has not four cells",
            ]
        );
        assert_eq!(check(&[])[0].what, "the page is gone");
    }
}
