//! PostgreSQL's own regression suite, whose psql comes in through the proxy.
//!
//! A result is compared with what the same server says directly, not with the expected one: what differs from that because
//! of the machine, such as its locales, differs in both.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgherd_proxy::PoolMode;
use tempfile::TempDir;

use crate::harness::{Stand, USER, finish, left_out, story};
use crate::server::programs;

/// A minute on two cores that nobody else uses.
const SOON: Duration = Duration::from_secs(420);
/// Whatever the machine is like, so much of the suite must say what it is expected to say; else it did not run.
const MOST: f64 = 0.95;
/// Of a difference so much is shown.
const SHOWN_LINES: usize = 60;

/// What pg_regress has psql ask for in its startup packet, made the role's own. With session pooling a setting of a startup
/// packet is one that the proxy makes at a server that was there before, so that RESET leads back to the server's value,
/// not to the client's. Where servers are shared the proxy puts that right.
const RESET_VALUES: &str = "ALTER ROLE postgres SET datestyle = 'Postgres, MDY';\
     ALTER ROLE postgres SET timezone = 'America/Los_Angeles';\
     ALTER ROLE postgres SET intervalstyle = 'postgres_verbose'";

/// A difference that is seen by whoever is given a server that another session had before. Which server that is decides
/// whether it shows.
struct Difference {
    test: &'static str,
    /// As `diff` prints them, from directly to through the proxy.
    lines: &'static [&'static str],
    why: &'static str,
}

const DIFFERENCES: &[Difference] = &[
    Difference {
        test: "guc",
        lines: &[
            "> ERROR:  invalid configuration parameter name \"plpgsql.extra_foo_warnings\"",
            "> DETAIL:  \"plpgsql\" is a reserved prefix.",
            "< WARNING:  invalid configuration parameter name \"plpgsql.extra_foo_warnings\", removing it",
            "< DETAIL:  \"plpgsql\" is now a reserved prefix.",
        ],
        why: "the library plpgsql is loaded already where another session has used it",
    },
    Difference {
        test: "stats",
        lines: &["<  t", ">  f"],
        why: "a session that is given a server that was there before is no new session of the database",
    },
    Difference {
        test: "guc",
        lines: &[
            "> ERROR:  invalid configuration parameter name \"plpgsql.extra_foo_warnings\"",
            "> DETAIL:  \"plpgsql\" is a reserved prefix.",
            "< WARNING:  invalid configuration parameter name \"plpgsql.extra_foo_warnings\", removing it",
            "< DETAIL:  \"plpgsql\" is now a reserved prefix.",
        ],
        why: "a library that one session has loaded stays in the server for the next one",
    },
    Difference {
        test: "temp",
        lines: &[
            "< ERROR:  cannot PREPARE a transaction that has operated on temporary objects",
            "> ERROR:  prepared transactions are disabled",
            "> HINT:  Set max_prepared_transactions to a nonzero value.",
        ],
        why: "the schema for temporary tables that one session has made stays, empty, for the next one",
    },
];

/// Tests that statement pooling cannot run, since transactions of several statements are refused.
const BLOCKS: &[&str] = &[
    "advisory_lock",
    "aggregates",
    "alter_generic",
    "alter_table",
    "case",
    "cluster",
    "combocid",
    "constraints",
    "copy",
    "copy2",
    "create_am",
    "create_index",
    "create_operator",
    "create_procedure",
    "create_table",
    "create_table_like",
    "create_view",
    "database",
    "enum",
    "event_trigger",
    "explain",
    "expressions",
    "fast_default",
    "foreign_key",
    "groupingsets",
    "guc",
    "hash_index",
    "incremental_sort",
    "indexing",
    "inherit",
    "insert_conflict",
    "join",
    "join_hash",
    "json",
    "jsonb",
    "largeobject",
    "limit",
    "lock",
    "matview",
    "merge",
    "mvcc",
    "namespace",
    "numeric",
    "partition_prune",
    "plpgsql",
    "portals",
    "portals_p2",
    "privileges",
    "psql",
    "rangefuncs",
    "rowsecurity",
    "rowtypes",
    "select_parallel",
    "sequence",
    "stats",
    "subscription",
    "subselect",
    "tablesample",
    "tablespace",
    "temp",
    "tidrangescan",
    "tidscan",
    "timestamp",
    "timestamptz",
    "timetz",
    "transactions",
    "triggers",
    "truncate",
    "tuplesort",
    "txid",
    "vacuum",
    "with",
    "write_parallel",
    "xid",
];
/// Tests that cannot do without what one of those makes.
const FOLLOW: &[(&str, &str)] = &[
    ("amutils", "it tells of indexes that create_index makes"),
    ("brin", "it asks for an index that create_index makes"),
    ("brin_bloom", "it asks for an index that create_index makes"),
    ("brin_multi", "it asks for an index that create_index makes"),
    ("horology", "it reads a table that timestamp makes"),
    ("memoize", "its plans use indexes that create_index makes"),
    ("misc_functions", "its plans use indexes that create_index makes"),
    ("select", "its rows come in the order of indexes that create_index makes"),
    ("select_distinct", "its plans use indexes that create_index makes"),
    ("select_views", "it reads views that create_view makes"),
    ("union", "its plans use indexes that create_index makes"),
];

/// Why a mode cannot run a test of the suite, if it cannot.
fn cannot_run(test: &str, mode: PoolMode) -> Option<&'static str> {
    if mode != PoolMode::Statement {
        return None;
    }
    if BLOCKS.contains(&test) {
        return Some("it has transactions of several statements");
    }
    FOLLOW.iter().find(|(name, _)| *name == test).map(|(_, why)| *why)
}

story! {
    fn the_regression_suite_says_the_same_with_session_pooling(suite: "regress") {
        says_the_same(suite, PoolMode::Session);
    }
}

story! {
    fn the_regression_suite_says_the_same_with_transaction_pooling(suite: "regress") {
        says_the_same(suite, PoolMode::Transaction);
    }
}

story! {
    fn what_of_the_regression_suite_needs_no_transactions_says_the_same_with_statement_pooling(suite: "regress") {
        // A test that would do without is not left out.
        for test in BLOCKS {
            let Ok(text) = fs::read_to_string(suite.join(format!("sql/{test}.sql"))) else { continue };
            let mut lines = text.lines().map(|line| line.trim_start().to_ascii_lowercase());
            let begins = lines.any(|line| line.starts_with("begin") || line.starts_with("start transaction"));
            assert!(begins, "{test} has no transactions of several statements");
        }
        says_the_same(suite, PoolMode::Statement);
    }
}

fn says_the_same(suite: &Path, mode: PoolMode) {
    let dir = TempDir::new().unwrap();
    let schedule = dir.path().join("schedule");
    let scheduled = make_schedule(&suite.join("parallel_schedule"), mode, &schedule);
    let direct = Results::of(suite, &schedule, None, dir.path());
    assert_eq!(direct.files.len(), scheduled, "each test of the schedule has a result");
    let passed = (scheduled - direct.failed) as f64;
    assert!(
        passed > MOST * scheduled as f64,
        "{} tests fail without the proxy: {}",
        direct.failed,
        direct.said
    );
    let proxied = Results::of(suite, &schedule, Some(mode), dir.path());

    let names = |results: &Results| results.files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&direct), names(&proxied), "{}", proxied.said);
    let (mut differences, mut known_ones) = (String::new(), String::new());
    for (name, path) in &direct.files {
        let diff = Command::new("diff").args([path, &proxied.files[name]]).output().unwrap();
        let diff = String::from_utf8_lossy(&diff.stdout).into_owned();
        let lines: Vec<&str> = diff.lines().filter(|line| line.starts_with(['<', '>'])).collect();
        let known = DIFFERENCES.iter().find(|known| known.test == name && known.lines == lines);
        let known = known.map(|known| known.why).or(left_out(name, "", mode));
        if let Some(why) = known.filter(|_| !lines.is_empty()) {
            known_ones += &format!("{name}: {why}\n");
        } else if !lines.is_empty() {
            differences += &format!("{name}:\n");
            differences.extend(diff.lines().take(SHOWN_LINES).flat_map(|line| [line, "\n"]));
        }
    }
    assert!(
        differences.is_empty(),
        "the proxy makes a difference:\n{differences}\nbesides those that are known:\n{known_ones}"
    );
}

/// Of what this mode can run; how many tests that are.
fn make_schedule(whole: &Path, mode: PoolMode, to: &Path) -> usize {
    let (mut schedule, mut count) = (String::new(), 0);
    for line in fs::read_to_string(whole).unwrap().lines() {
        let Some(names) = line.strip_prefix("test:") else {
            // What may fail, such as `ignore: random`, and comments.
            schedule += &format!("{line}\n");
            continue;
        };
        let names: Vec<&str> =
            names.split_whitespace().filter(|name| cannot_run(name, mode).is_none()).collect();
        count += names.len();
        if !names.is_empty() {
            schedule += &format!("test: {}\n", names.join(" "));
        }
    }
    fs::write(to, schedule).unwrap();
    count
}

struct Results {
    /// What psql printed, by the name of the test.
    files: BTreeMap<String, PathBuf>,
    /// Tests that say something else than expected.
    failed: usize,
    said: String,
}

impl Results {
    fn of(suite: &Path, schedule: &Path, mode: Option<PoolMode>, dir: &Path) -> Results {
        // Both write to the same place, since some tests know where they write.
        let output = dir.join("output");
        fs::create_dir(&output).unwrap();
        let stand = Stand::new(mode);
        if matches!(mode, None | Some(PoolMode::Session)) {
            stand.psql(RESET_VALUES);
        }
        let bin = programs();
        let mut command = stand.command(bin.with_file_name("lib/pgxs/src/test/regress/pg_regress"));
        command.arg(format!("--inputdir={}", suite.display()));
        if version(&bin) >= 16 {
            command.arg(format!("--expecteddir={}", suite.display()));
        }
        command
            .arg(format!("--outputdir={}", output.display()))
            .arg(format!("--dlpath={}", suite.join("lib").display()))
            .arg(format!("--bindir={}", bin.display()))
            .arg(format!("--schedule={}", schedule.display()))
            .args(["--host=127.0.0.1", &format!("--port={}", stand.port()), &format!("--user={USER}")])
            .current_dir(dir);
        let ended = finish(&mut command, SOON);
        let said = ended.stdout + &ended.stderr;
        assert!(ended.status.code().is_some(), "{}: {said}", ended.status);
        assert_eq!(stand.was_used_for("regression"), mode.is_some(), "{said}");
        let kept = dir.join(if mode.is_some() { "proxied" } else { "direct" });
        fs::rename(&output, &kept).unwrap();
        let results = fs::read_dir(kept.join("results")).unwrap_or_else(|error| panic!("{error}: {said}"));
        let files = results
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "out"));
        let files =
            files.map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path)).collect();
        // pg_regress 15 says "FAILED", later ones "not ok".
        let failed =
            said.lines().filter(|line| line.contains("... FAILED") || line.starts_with("not ok ")).count();
        Results { files, failed, said }
    }
}

/// Of PostgreSQL.
fn version(bin: &Path) -> u32 {
    let output = Command::new(bin.join("pg_config")).arg("--version").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let number = said.trim_start_matches(|c: char| !c.is_ascii_digit());
    number.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}
