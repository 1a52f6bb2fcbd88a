//! Drivers: what their scripts print is compared line by line.
//!
//! The scripts stand beside this file and share the rules of `steps`: a line for each step, and nothing in it that differs
//! between two runs on the same server.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use pgherd_proxy::PoolMode;
use tempfile::TempDir;

use crate::harness::{Stand, finish, left_out, story};

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
        see_no_difference(&PYTHON, fetched, PoolMode::Session);
    }
}

story! {
    fn drivers_for_python_see_no_difference_with_transaction_pooling(fetched: "python") {
        see_no_difference(&PYTHON, fetched, PoolMode::Transaction);
    }
}

story! {
    fn drivers_for_node_see_no_difference_with_session_pooling(fetched: "node") {
        see_no_difference(&NODE, fetched, PoolMode::Session);
    }
}

story! {
    fn drivers_for_node_see_no_difference_with_transaction_pooling(fetched: "node") {
        see_no_difference(&NODE, fetched, PoolMode::Transaction);
    }
}

fn see_no_difference(language: &Language, fetched: &Path, mode: PoolMode) {
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
        let outputs = scripts.map(|path| (path, output(&stand, language, dir.path(), path, fetched)));
        let outputs: Vec<_> = outputs.collect();
        assert_eq!(stand.was_used_for("postgres"), mode.is_some());
        outputs
    });
    let [direct, proxied] = outputs;
    let mut differences = String::new();
    for ((path, direct), (_, proxied)) in direct.iter().zip(&proxied) {
        let difference = difference(direct, proxied, |step| left_out(path, step, mode).is_some());
        differences.extend(difference.map(|lines| format!("{path}:\n{lines}")));
    }
    assert!(differences.is_empty(), "there is a difference:\n{differences}");
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

/// Of two runs of a script. A step that is left out must be there, and may say something else.
fn difference(direct: &str, proxied: &str, is_left_out: impl Fn(&str) -> bool) -> Option<String> {
    let step =
        |line: Option<&str>| line.and_then(|line| line.split_once(": ")).map(|(step, _)| step.to_owned());
    let mut lines = [direct, proxied].map(str::lines);
    let (mut shown, mut count) = (String::new(), 0);
    loop {
        let [direct, proxied] = lines.each_mut().map(Iterator::next);
        if direct.is_none() && proxied.is_none() {
            return (count > 0).then_some(shown);
        }
        let is_left_out =
            step(direct) == step(proxied) && step(direct).is_some_and(|step| is_left_out(&step));
        if direct != proxied && !is_left_out {
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
    let difference = |direct, proxied| difference(direct, proxied, |step| step == "out");
    assert_eq!(difference("a: 1\nb\n", "a: 1\nb\n"), None);
    let said = "directly          b\nthrough the proxy c\n";
    assert_eq!(difference("a\nb\n", "a\nc\n").as_deref(), Some(said));
    let said = "directly          nothing\nthrough the proxy out: 1\n";
    assert_eq!(difference("a\n", "a\nout: 1\n").as_deref(), Some(said));
    assert_eq!(difference("out: 1\n", "out: 2\n"), None);
}
