//! The outside of files: headers, names, and what must not get into a file from the machine it was written on.

use super::{Complaint, File};

/// Words that name no responsibility.
const EMPTY_NAMES: &[&str] = &["common", "helper", "helpers", "manager", "misc", "util", "utils"];

/// Beginnings of paths on somebody's machine, and names of registries and mirrors; spelt in halves so that
/// this file passes. Lists of packages name their registry and are checked by another rule.
const MACHINE: &[&str] = &[
    concat!("/ro", "ot/"),
    concat!("/ho", "me/"),
    concat!("/Us", "ers/"),
    concat!("/wo", "rk/"),
    concat!("index.cra", "tes.io"),
    concat!("artif", "actory"),
    concat!("files.pythonh", "osted.org"),
    concat!("proxy.gol", "ang.org"),
    concat!("deb.deb", "ian.org"),
];
const LISTS: &[&str] = &["Cargo.lock", "deny.toml"];

pub(super) fn check(file: &File) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let mut add = |line, what: String, why| complaints.push(file.complaint(line, what, why));

    if file.is_rust() && !file.text.trim_start().starts_with("//!") {
        let why = "a header says what the file is responsible for, what it leaves out, and the hazard if it misbehaves";
        add(1, "the file does not begin with a //! header".to_owned(), why);
    }
    let name = file.path.rsplit('/').next().unwrap_or(&file.path);
    if name == "mod.rs" {
        let why = "foo.rs beside foo/ shows its name in tabs and search results";
        add(0, "the module is a mod.rs".to_owned(), why);
    }
    let stem = name.split('.').next().unwrap_or(name);
    if file.is_rust() && EMPTY_NAMES.contains(&stem) {
        add(
            0,
            format!("\"{stem}\" names no responsibility"),
            "a file whose name says nothing collects everything",
        );
    }
    if !LISTS.contains(&name) {
        for (index, line) in file.text.lines().enumerate() {
            for place in MACHINE.iter().filter(|place| line.contains(**place)) {
                let why = "the project must not depend on the machine or the network it was written in";
                add(index + 1, format!("\"{place}\" is a place on somebody's machine"), why);
            }
        }
    }
    // Recorded bytes are what they are: a message on the wire has no line end.
    let recorded =
        file.path.contains("/testdata/") || (file.path.contains("/tests/") && file.path.ends_with(".txt"));
    if !file.text.is_empty() && !file.text.ends_with('\n') && !recorded {
        add(0, "the last line does not end".to_owned(), "tools that put lines after it would join them");
    }
    for (index, line) in file.text.lines().enumerate() {
        // Recorded outputs show what a program prints.
        if line.ends_with([' ', '\t']) && !recorded {
            add(index + 1, "blanks at the end of the line".to_owned(), "they show up in every later diff");
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_finds_what_it_is_for() {
        for (path, text, found) in [
            ("crates/a/src/b.rs", "//! Header.\n", 0),
            ("crates/a/src/b.rs", "fn x() {}\n", 1),
            ("crates/a/src/b/mod.rs", "//! Header.\n", 1),
            ("crates/a/src/utils.rs", "//! Header.\n", 1),
            ("a.md", "text \n", 1),
            ("a/testdata/a.txt", "text \n", 0),
            ("a.md", "text", 1),
            ("a.md", concat!("see /ro", "ot/x\n"), 1),
            ("a.md", "in /var/lib/pgherd\n", 0),
            ("Cargo.lock", concat!("index.cra", "tes.io\n"), 0),
        ] {
            let file = File { path: path.to_owned(), text: text.to_owned() };
            assert_eq!(check(&file).len(), found, "{path}: {text}: {:?}", check(&file));
        }
    }
}
