//! Four tables in `ARCHITECTURE.md`, "from a fault to the code", "from an attack to what shows it", "from a weakness of
//! others to what shows that it is not ours" and "from a case of backups to what shows it": every function, script and test that they
//! name exists.
//!
//! Columns: fault | decided by | script | test. `decided by` names functions in backticks, by their path in
//! `core` (`ha::election::result`) or with the crate before it (`agent::execute::seal`). `script` names files
//! of `crates/core/testdata/`. `test` names files with or without a function (`testkit/tests/it/ha.rs::b01`).
//! Several are separated by commas. A fault that nothing decides is no row.
//!
//! The others have the columns: attack | shown by, weakness | shown by, and case | shown by. There a name is a script (`x.txt`), a test with its function,
//! or a broken build of the simulator (`sim --variant no-seal`).

use super::source::Source;
use super::{Complaint, File};

const PAGE: &str = "ARCHITECTURE.md";
const COLUMNS: [&str; 4] = ["fault", "decided by", "script", "test"];
const ATTACK_COLUMNS: [&str; 2] = ["attack", "shown by"];
const WEAKNESS_COLUMNS: [&str; 2] = ["weakness", "shown by"];
const CASE_COLUMNS: [&str; 2] = ["case", "shown by"];
const SCRIPTS: &str = "crates/core/testdata/";
const VARIANT: &str = "sim --variant ";
const VARIANTS: &str = "sim/src/breakage.rs";
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
    let (rows, mut complaints) = table(page, &COLUMNS);
    complaints.extend(check_shown(files, page, &ATTACK_COLUMNS));
    complaints.extend(check_shown(files, page, &WEAKNESS_COLUMNS));
    complaints.extend(check_shown(files, page, &CASE_COLUMNS));
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
        for script in names(scripts).into_iter().filter(|script| !script_exists(files, script)) {
            add(format!("there is no script {SCRIPTS}{script}"));
        }
        if names(tests).is_empty() {
            add("the row names no test in backticks".to_owned());
        }
        for test in names(tests).into_iter().filter(|test| !test_exists(files, test)) {
            add(format!("there is no test {test}"));
        }
    }
    complaints
}

fn check_shown(files: &[File], page: &File, columns: &[&str]) -> Vec<Complaint> {
    let (rows, mut complaints) = table(page, columns);
    for (line, row) in rows {
        let shown_by = row.get(1).map(|cell| names(cell)).unwrap_or_default();
        let mut add = |what: String| complaints.push(page.complaint(line, what, WHY));
        if shown_by.is_empty() {
            add("the row names nothing in backticks that shows it".to_owned());
        }
        for name in shown_by {
            let exists = match name.strip_prefix(VARIANT) {
                Some(variant) => {
                    let variants = files.iter().find(|file| file.path == VARIANTS);
                    variants.is_some_and(|file| file.text.contains(&format!("= \"{variant}\",")))
                }
                None if name.ends_with(".txt") => script_exists(files, name),
                None => test_exists(files, name),
            };
            if !exists {
                add(format!("there is no {name}"));
            }
        }
    }
    complaints
}

/// The rows of the table with these columns, with their lines; or what is wrong with it.
fn table<'a>(page: &'a File, columns: &[&str]) -> (Vec<(usize, Vec<&'a str>)>, Vec<Complaint>) {
    let lines: Vec<&str> = page.text.lines().collect();
    let Some(head) = lines.iter().position(|line| cells(line) == columns) else {
        let missing = format!("no table has the columns {}", columns.join(" | "));
        return (Vec::new(), vec![page.complaint(0, missing, WHY)]);
    };
    let rows: Vec<(usize, Vec<&str>)> = lines[head + 1..]
        .iter()
        .enumerate()
        .map(|(index, line)| (head + 2 + index, cells(line)))
        .take_while(|(_, cells)| !cells.is_empty())
        .skip(1)
        .collect();
    let empty = rows.is_empty().then(|| page.complaint(head + 1, "the table has no rows", WHY));
    (rows, empty.into_iter().collect())
}

fn script_exists(files: &[File], script: &str) -> bool {
    files.iter().any(|file| file.path.strip_prefix(SCRIPTS) == Some(script))
}

/// A file, or a function in one.
fn test_exists(files: &[File], test: &str) -> bool {
    let (path, function) = test.split_once("::").map_or((test, None), |(path, name)| (path, Some(name)));
    let file = files.iter().find(|file| file.path == path);
    file.is_some_and(|file| function.is_none_or(|name| defines(file, name)))
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

    const GOOD_ATTACK: &str = "| S1 | `sim --variant no-seal`, `lost-host.txt` |";

    fn told(table: &str) -> Vec<String> {
        told_of(table, GOOD_ATTACK)
    }

    fn told_of(table: &str, attacks: &str) -> Vec<String> {
        let file = |path: &str, text: &str| File { path: path.to_owned(), text: text.to_owned() };
        let text = format!(
            "# A\n\n| fault | decided by | script | test |\n|---|---|---|---|\n{table}\nText\n\n\
             | attack | shown by |\n|---|---|\n{attacks}\n\n\
             | weakness | shown by |\n|---|---|\n{GOOD_ATTACK}\n\n\
             | case | shown by |\n|---|---|\n{GOOD_ATTACK}\n"
        );
        let files = [
            file("ARCHITECTURE.md", &text),
            file("sim/src/breakage.rs", "NoSeal = \"no-seal\",\n"),
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
        assert_eq!(told(""), ["3: the table has no rows"]);
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
                "6: the row names no test in backticks",
                "7: the row has not four cells",
            ]
        );
        assert_eq!(check(&[])[0].what, "the page is gone");
    }

    #[test]
    fn attacks_are_shown_by_what_exists() {
        let good = "| host lost | `ha::election::result` | `lost-host.txt` | `testkit/tests/it/ha.rs::b01_lost_host` |";
        assert_eq!(
            told_of(
                good,
                "| S1 | `sim --variant no-sea`, `x.txt`, `testkit/tests/it/ha.rs::b02` |\n| S2 | – |"
            ),
            [
                "10: there is no sim --variant no-sea",
                "10: there is no x.txt",
                "10: there is no testkit/tests/it/ha.rs::b02",
                "11: the row names nothing in backticks that shows it",
            ]
        );
    }
}
