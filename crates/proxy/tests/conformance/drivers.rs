//! Drivers: what their scripts print is compared line by line.
//!
//! The scripts stand beside this file and share the rules of `steps`: a line for each step, and nothing in it that differs
//! between two runs on the same server.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

use crate::harness::{Mode, Stand, finish, story};

mod rust;

/// A script ends itself before.
const SOON: Duration = Duration::from_secs(150);
/// Differing lines that are shown of each script.
const SHOWN_LINES: usize = 20;

macro_rules! files {
    ($($path:literal),* $(,)?) => { &[$(($path, include_str!(concat!("drivers/", $path)))),*] };
}

struct Language {
    program: &'static str,
    /// Those that are run, after what they import.
    scripts: &'static [(&'static str, &'static str)],
    imported: &'static [(&'static str, &'static str)],
}

const PYTHON: Language = Language {
    // As Debian names it: what was fetched was made for it.
    program: "/usr/bin/python3",
    scripts: files![
        "python/psycopg_3.py",
        "python/asyncpg_all.py",
        "python/pg8000_native.py",
        "python/sqlalchemy_orm.py",
    ],
    imported: files!["python/steps.py"],
};

const NODE: Language = Language {
    program: "node",
    scripts: files!["node/node_postgres.mjs", "node/postgres_js.mjs"],
    imported: files!["node/steps.mjs"],
};

story! {
    fn drivers_for_python_see_no_difference_with_session_pooling(fetched: "python") {
        see_no_difference(&PYTHON, fetched, Mode::Session);
    }
}

story! {
    fn drivers_for_node_see_no_difference_with_session_pooling(fetched: "node") {
        see_no_difference(&NODE, fetched, Mode::Session);
    }
}

fn see_no_difference(language: &Language, fetched: &Path, mode: Mode) {
    let dir = TempDir::new().unwrap();
    for (path, text) in language.scripts.iter().chain(language.imported) {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    // Where Node.js looks for what a script imports.
    symlink(fetched.join("node_modules"), dir.path().join("node_modules")).unwrap();
    let outputs = [None, Some(mode)].map(|mode| {
        let stand = Stand::new(mode);
        let scripts = language.scripts.iter().map(|(path, _)| *path);
        let scripts = scripts.filter(|path| !mode.is_some_and(|mode| mode.leaves_out(path)));
        let outputs = scripts.map(|path| (path, output(&stand, language, dir.path(), path, fetched)));
        let outputs: Vec<_> = outputs.collect();
        assert_eq!(stand.was_used_for("postgres"), mode.is_some());
        outputs
    });
    let [direct, proxied] = outputs;
    for (path, proxied) in proxied {
        let (_, direct) =
            direct.iter().find(|(other, _)| *other == path).expect("nothing is left out directly");
        assert_same(path, direct, &proxied);
    }
}

/// What a script printed, up to its end.
fn output(stand: &Stand, language: &Language, dir: &Path, path: &str, fetched: &Path) -> String {
    let mut command = stand.command(language.program);
    command
        .arg(dir.join(path))
        .current_dir(dir)
        .env("PGDATABASE", "postgres")
        .env("PYTHONPATH", fetched)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("NODE_NO_WARNINGS", "1");
    let ended = finish(&mut command, SOON);
    let is_whole = ended.status.success() && ended.stdout.ends_with("\ndone\n");
    assert!(is_whole, "{path}, port {}: {}\n{}\n{}", stand.port(), ended.status, ended.stdout, ended.stderr);
    ended.stdout
}

/// Of two runs of a script.
fn assert_same(script: &str, direct: &str, proxied: &str) {
    if let Some(difference) = difference(direct, proxied) {
        panic!("{script} sees a difference:\n{difference}");
    }
}

fn difference(direct: &str, proxied: &str) -> Option<String> {
    let mut lines = [direct, proxied].map(str::lines);
    let (mut shown, mut count) = (String::new(), 0);
    loop {
        let [direct, proxied] = lines.each_mut().map(Iterator::next);
        if direct.is_none() && proxied.is_none() {
            return (count > 0).then_some(shown);
        }
        if direct != proxied {
            count += 1;
            if count <= SHOWN_LINES {
                let [direct, proxied] = [direct, proxied].map(|line| line.unwrap_or("nothing"));
                writeln!(shown, "directly          {direct}\nthrough the proxy {proxied}").unwrap();
            }
        }
    }
}

#[test]
fn a_line_that_differs_or_is_missing_is_a_difference() {
    assert_eq!(difference("a\nb\n", "a\nb\n"), None);
    let said = "directly          b\nthrough the proxy c\n";
    assert_eq!(difference("a\nb\n", "a\nc\n").as_deref(), Some(said));
    let said = "directly          nothing\nthrough the proxy b\n";
    assert_eq!(difference("a\n", "a\nb\n").as_deref(), Some(said));
}
