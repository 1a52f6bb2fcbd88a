//! Texts that may be read elsewhere, and texts that may not.

use super::*;

/// A user's function is called as a word that is most often none.
fn functions() -> Functions {
    let known = [
        "qcount",
        "qsum",
        "qnow",
        "qlower",
        "qMy Function",
        "qquiet",
        "qpg_get_expr",
        "qpg_is_in_recovery",
        "xpg_advisory_lock",
        "xlike",
    ];
    known.iter().map(|row| row.as_bytes().to_vec()).collect()
}

fn reads(text: &str) -> bool {
    functions().only_read_in(text.as_bytes())
}

#[test]
fn what_can_only_read_may_go_to_a_standby() {
    for text in [
        "SELECT 1",
        "select * from t where id = $1;  -- and no more; really",
        "SELECT count(*), sum(a) FROM t WHERE b IN (1, 2) AND (c OR NOT (d)) GROUP BY (e) HAVING count(*) > (1)",
        "SELECT lower(a)::varchar(10), CAST(b AS numeric(8,2)), EXTRACT(year FROM now()) FROM t",
        "WITH RECURSIVE x(a) AS (SELECT 1) SELECT a FROM x",
        "WITH x (a, b) AS (SELECT 1, 2), y AS MATERIALIZED (VALUES (1)) SELECT * FROM x JOIN y ON (true)",
        "(SELECT 1) UNION ALL (SELECT 2) ORDER BY 1",
        "VALUES (1), (2)",
        "TABLE t",
        "SELECT 'INSERT INTO; nextval(''s'')', $$ update $$, \"update\" FROM t",
        "SELECT \"My Function\"(1), pg_catalog.now()",
        "SELECT sum(a) OVER (PARTITION BY b), count(*) FILTER (WHERE c) FROM t WINDOW w AS (ORDER BY d)",
        "SELECT a FROM t AS u(a) WHERE EXISTS (SELECT) AND b = ANY (ARRAY[(1)])",
        "SELECT QUIET(1)",
        "/* why */ SELECT 1",
        "SELECT * FROM information_schema.tables",
        "SELECT count(*) FROM pg_class",
        "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef",
        "SELECT t.oid FROM pg_catalog.pg_type t JOIN \"pg_namespace\" n ON t.typnamespace = n.oid",
    ] {
        assert!(reads(text), "{text}");
    }
}

#[test]
fn whatever_else_it_may_be_goes_to_the_primary() {
    for text in [
        "",
        ";",
        "INSERT INTO t VALUES (1)",
        "SELECT 1; SELECT 2",
        "SELECT 1; DELETE FROM t",
        "SELECT * FROM t FOR UPDATE",
        "SELECT * FROM t FOR NO KEY UPDATE",
        "SELECT * FROM t FOR SHARE",
        "SELECT * FROM t FOR KEY SHARE",
        "SELECT * INTO u FROM t",
        "WITH gone AS (DELETE FROM t RETURNING *) SELECT * FROM gone",
        "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x",
        "SELECT nextval('s')",
        "SELECT unknown(1)",
        "SELECT like(1)",
        "SELECT shop.unknown (1)",
        "SELECT \"unknown\"(1)",
        "SELECT \"my function\"(1)",
        "SELECT /* */ pg_advisory_lock(7)",
        "SELECT pg_catalog.pg_advisory_lock(7)",
        "SELECT * FROM pg_stat_activity",
        "SELECT * FROM \"pg_locks\"",
        "SELECT * FROM PG_STAT_REPLICATION",
        "SELECT count(*) FROM pg_class, pg_settings",
        "SELECT pg_is_in_recovery()",
        "SELECT pg_get_viewdef(1)",
        "SELECT pg_type(1)",
        "EXPLAIN ANALYZE SELECT 1",
        "SHOW transaction_read_only",
        "BEGIN",
        "COPY t TO STDOUT",
        "SET x = 1",
        "DO 'BEGIN END'",
        "CALL p()",
        "FETCH 1 FROM c",
        "U&\"sel\\0065ct\" 1",
        "SELECT U&\"\\006eow\"()",
    ] {
        assert!(!reads(text), "{text}");
    }
}

#[test]
fn a_text_that_cannot_be_told_apart_is_not_read() {
    assert!(is_readable(b"UTF8", b"on") && is_readable(b"SQL_ASCII", b"on") && is_readable(b"EUC_JP", b"on"));
    assert!(!is_readable(b"UTF8", b"off") && !is_readable(b"sjis", b"on") && !is_readable(b"GB18030", b"on"));
}

#[test]
fn a_text_is_remembered_for_a_while() {
    let refused = Texts::default();
    assert!(!refused.remembers(b"SELECT f()"));
    refused.remember(b"SELECT f()");
    assert!(refused.remembers(b"SELECT f()") && !refused.remembers(b"SELECT g()"));
    for number in 0..MAX_REMEMBERED {
        refused.remember(number.to_string().as_bytes());
    }
    assert!(!refused.remembers(b"SELECT f()"), "it does not grow for ever");
}
