//! What texts are taken for.

use proptest::prelude::*;

use super::*;

fn of(text: &str) -> Effects {
    effects(text.as_bytes())
}

fn changed(text: &str) -> Vec<String> {
    let effects = of(text);
    assert_eq!((effects.ties, effects.unmovable, effects.changed.reset), (Ties::NONE, None, false), "{text}");
    effects.changed.names.into_iter().collect()
}

fn ties(text: &str) -> Vec<Tie> {
    let effects = of(text);
    assert_eq!(effects.unmovable, None, "{text}");
    effects.ties.iter().collect()
}

#[test]
fn most_statements_leave_nothing() {
    for text in [
        "",
        ";",
        "SELECT 1",
        "select * from \"set\" where a = 'LISTEN x; SET y = 1'",
        "UPDATE t SET a = 1, b = 'set_' WHERE c",
        "INSERT INTO t (templates, household) VALUES ($1, $2) RETURNING id;",
        "BEGIN; UPDATE t SET a = 1; COMMIT",
        "SELECT pg_try_advisory_xact_lock(1), pg_advisory_xact_lock_shared(2)",
        "SET LOCAL work_mem = '1MB'",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SET CONSTRAINTS ALL DEFERRED",
        "SELECT set_config('a.b', f(1, 'x'), true)",
        "/* SET a = 1; */ -- LISTEN b\n SELECT 1; -- LOAD 'c'",
        "/* /* nested */ ; SET x = 1 */ SELECT 2",
        "SELECT $tag$; SET a = 1; $tag$, $1, $$ ; LISTEN b $$",
        "SELECT E'\\'; SET a = 1'",
        "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN SET a = 1; END $$",
        "EXECUTE it(1)",
        "COPY t FROM STDIN",
    ] {
        assert_eq!(of(text), Effects::default(), "{text}");
    }
}

#[test]
fn settings_are_known_by_their_names() {
    for (text, names) in [
        ("SET work_mem TO '1MB'", &["work_mem"][..]),
        ("set session Work_Mem = 5", &["work_mem"]),
        (" /* c */ SET app.tenant = '7'", &["app.tenant"]),
        ("SET \"App\".\"Tenant\" = '7'", &["app.tenant"]),
        ("SET app.of.Tenant = 7; SET a.b.\"C\".d TO 1", &["a.b.c.d", "app.of.tenant"]),
        ("SET TIME ZONE 'UTC'", &["timezone"]),
        ("SET NAMES 'latin1'", &["client_encoding"]),
        ("SET SCHEMA 'x'", &["search_path"]),
        ("SET ROLE bob", &["role"]),
        ("SET SESSION AUTHORIZATION bob", &["session_authorization"]),
        (
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            &[
                "default_transaction_deferrable",
                "default_transaction_isolation",
                "default_transaction_read_only",
            ],
        ),
        ("BEGIN; SET a = 1; SELECT 2; SET b TO 2; COMMIT", &["a", "b"]),
        ("SELECT set_config('Search_Path', '', false)", &["search_path"]),
        ("SELECT pg_catalog.set_config('a.b', (SELECT max(x) FROM t), $1)", &["a.b"]),
        ("WITH x AS (SELECT set_config('a', f(',', 2), false)) SELECT * FROM x", &["a"]),
        ("DO $$ BEGIN IF x THEN SET a = 1; END IF; END $$", &["a"]),
        ("DO $$ BEGIN EXECUTE 'SET b = 1'; PERFORM set_config('c', '', false); END $$", &["b", "c"]),
    ] {
        assert_eq!(changed(text), names, "{text}");
    }
    for text in
        ["RESET work_mem", "reset all", "SET work_mem TO DEFAULT", "SET a.b = default", "SET a.b.c = default"]
    {
        assert!(of(text).changed.reset, "{text}");
    }
    for text in ["SELECT set_config($1, $2, false)", "SELECT set_config('a.' || x, 'y', false) FROM t"] {
        assert_eq!(of(text).unmovable, Some(Unmovable::UnknownSetting), "{text}");
    }
}

#[test]
fn ties_to_a_server_are_found() {
    for (text, tie) in [
        ("SELECT pg_advisory_lock(1)", Tie::AdvisoryLock),
        ("select PG_TRY_ADVISORY_LOCK_SHARED(1, 2)", Tie::AdvisoryLock),
        ("SELECT pg_advisory_unlock_all()", Tie::AdvisoryLock),
        ("CREATE TEMP TABLE t (a int)", Tie::TemporaryTable),
        ("CREATE LOCAL TEMPORARY VIEW v AS SELECT 1", Tie::TemporaryTable),
        ("SELECT 1 AS a INTO TEMP t", Tie::TemporaryTable),
        ("CREATE TABLE pg_temp.t ()", Tie::TemporaryTable),
        ("DROP TABLE t", Tie::TemporaryTable),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", Tie::HoldableCursor),
        ("CLOSE ALL", Tie::HoldableCursor),
        ("LISTEN news", Tie::Listen),
        ("UNLISTEN *", Tie::Listen),
        ("PREPARE it AS SELECT 1", Tie::PreparedStatement),
        ("DEALLOCATE it", Tie::PreparedStatement),
        ("DO $$ BEGIN CREATE TEMP TABLE t (); END $$", Tie::TemporaryTable),
        ("SELECT 1; LISTEN news;", Tie::Listen),
    ] {
        assert_eq!(ties(text), [tie], "{text}");
    }
    assert_eq!(of("DISCARD ALL").ties, Ties::ALL);
    for text in ["DISCARD ALL", "DEALLOCATE ALL", "deallocate prepare all"] {
        assert!(of(text).forgets_statements, "{text}");
    }
    assert!(!of("DISCARD PLANS").forgets_statements && !of("DEALLOCATE it").forgets_statements);
    // What asyncpg sends before a connection goes back to its pool.
    let reset = of("SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;");
    assert_eq!(reset.ties, Ties::of(&[Tie::AdvisoryLock, Tie::HoldableCursor, Tie::Listen]));
    assert!(reset.changed.reset && reset.unmovable.is_none());
}

#[test]
fn what_cannot_be_asked_for_is_found() {
    assert_eq!(of("LOAD 'auto_explain'").unmovable, Some(Unmovable::Library));
    assert_eq!(of("SELECT setseed(0.5)").unmovable, Some(Unmovable::RandomSeed));
    assert!(of("SELECT lastval()").recalls_sequences && of("SELECT CurrVal('s')").recalls_sequences);
    assert!(may_recall_sequences(b"P\0\0\0\x10\0select LASTVAL()\0") && !may_recall_sequences(b"Q last val"));
}

#[test]
fn a_statement_that_is_deallocated_is_named() {
    let name = |text: &str| deallocated(text.as_bytes()).map(|(name, at)| (name, text[at].to_owned()));
    let found = |name: &str, at: &str| Some((name.as_bytes().to_vec(), at.to_owned()));
    assert_eq!(name("DEALLOCATE _pg3_0"), found("_pg3_0", "_pg3_0"));
    assert_eq!(name(" deallocate prepare \"A\"\"b\" ;"), found("A\"b", "\"A\"\"b\""));
    assert_eq!(name("DEALLOCATE Prepare"), found("prepare", "Prepare"));
    for text in ["DEALLOCATE ALL", "DEALLOCATE a; SELECT 1", "SELECT 1", "DEALLOCATE", "DEALLOCATE 'a'"] {
        assert_eq!(name(text), None, "{text}");
    }
}

#[test]
fn what_only_begins_or_ends_a_transaction_is_known() {
    let of = |text: &str| bracket(text.as_bytes());
    for text in ["BEGIN", " begin work;", "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"] {
        assert_eq!(of(text), Some(Bracket::Begin("BEGIN")), "{text}");
    }
    let start = "START TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE";
    assert_eq!(of(start), Some(Bracket::Begin("START TRANSACTION")));
    assert_eq!(
        [of("COMMIT"), of("end work;"), of("ABORT TRANSACTION")],
        [Some(Bracket::Commit), Some(Bracket::Commit), Some(Bracket::Rollback)]
    );
    for text in [
        "",
        "BEGIN READ WRITE",
        "BEGIN; SELECT 1",
        "BEGIN ISOLATION LEVEL",
        "BEGIN 'x'",
        "START",
        "ROLLBACK TO a",
        "COMMIT AND CHAIN",
        "COMMIT PREPARED 'x'",
        "SELECT 1",
    ] {
        assert_eq!(of(text), None, "{text}");
    }
}

#[test]
fn what_ends_a_transaction_is_known_by_its_first_word() {
    for text in
        ["COMMIT", "end;", "PREPARE TRANSACTION 'x'", "/* x */ commit", "CALL f()", "", "SELECT 1; COMMIT"]
    {
        assert!(may_commit(text.as_bytes()), "{text}");
    }
    for text in ["SELECT 1", "UPDATE t SET a = 1;", "ROLLBACK", "-- x\nSELECT 1"] {
        assert!(!may_commit(text.as_bytes()), "{text}");
    }
}

/// Whole words, and what they are made of.
const PIECES: &str = "set|_|config|Set_Con|fig|adv|isory|te|mp|TEMP|hol|d|ho|setse|ed|last|val|VAL|curr|lastcurrval|s| |\u{e9}";

proptest! {
    /// By the table of steps as by looking at each place.
    #[test]
    fn a_word_is_found_wherever_it_stands(
        pieces in proptest::collection::vec(proptest::sample::select(PIECES.split('|').collect::<Vec<_>>()), 0..12)
    ) {
        let text = pieces.concat();
        let stands = WORDS.iter().any(|word| contains_word(text.as_bytes(), word.as_bytes()));
        prop_assert_eq!(has_word(text.as_bytes()), stands, "{}", text);
    }
}

proptest! {
    /// Any bytes are read to an end, whatever they are.
    #[test]
    fn no_text_is_too_strange(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        effects(&text);
        deallocated(&text);
        may_commit(&text);
    }

    /// What matters is found wherever the cut is.
    #[test]
    fn pieces_are_searched_across_their_seams(cut in 0_usize..40, word in 0..WORDS.len()) {
        let text = format!("{:>20}{}{:>20}", "", WORDS[word], "");
        let cut = cut.min(text.len());
        let begin = cut.saturating_sub(WORD_OVERLAP_BYTES);
        prop_assert!(may_matter(&text.as_bytes()[..cut]) || may_matter(&text.as_bytes()[begin..]));
    }
}

/// CVE-2026-107348: input that costs more than it weighs. A megabyte of what makes the reader look ahead most takes
/// a moment if time is linear, and minutes if it is not.
#[test]
fn no_text_costs_more_than_it_weighs() {
    const BYTES: usize = 1 << 20;
    let pieces = [
        "set_config(",
        "set_config('a',",
        "set_config(a, b, ",
        "do $$ ",
        "do $$ set_config(",
        "/*",
        "/* */ ",
        "$a$",
        "$a ",
        "$1",
        "$$",
        "e'\\",
        "'",
        "\"",
        "set x.",
        "set x = default;",
        "deallocate ",
        "((",
        "lastval ",
        "advisory ",
        "temp;",
        ";",
        "-- \n",
    ];
    let began = std::time::Instant::now();
    for piece in pieces {
        let text = piece.repeat(BYTES / piece.len());
        let text = text.as_bytes();
        let looked = (effects(text), may_matter(text), may_commit(text), bracket(text), deallocated(text));
        assert!(looked.3.is_none() && looked.4.is_none(), "{piece}");
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_call_whose_end_is_far_away_is_not_taken_for_local() {
    let long = format!("select set_config('a', {}, true)", "x || ".repeat(100) + "y");
    assert!(effects(long.as_bytes()).changed.names.contains("a"));
    let nameless = format!("select set_config(n, {}, true)", "x || ".repeat(100) + "y");
    assert_eq!(effects(nameless.as_bytes()).unmovable, Some(Unmovable::UnknownSetting));
}
