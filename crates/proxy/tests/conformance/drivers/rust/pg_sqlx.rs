//! sqlx: a cache of named statements, a pool that tests its connections, streams that are left in the middle.

use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{StreamExt, TryStreamExt};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolCopyExt, PgPoolOptions};
use sqlx::{Connection, Error, Executor, Row};

use super::Seen;

pub(super) async fn script(url: &str, seen: &mut Seen) {
    let mut db = PgConnection::connect(url).await.unwrap();
    types(&mut db, seen).await;
    transactions(&mut db, seen).await;
    prepared(&mut db, seen).await;
    streams(&mut db, seen).await;
    copies(&mut db, seen).await;
    large(&mut db, seen).await;
    db.close().await.unwrap();
    notifications(url, seen).await;
    pools(url, seen).await;
    logins(url, seen).await;
}

/// SQLSTATE, or that the server had no part in it.
fn state<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "NOT refused".to_owned(),
        Err(Error::Database(error)) => error.code().unwrap_or_default().into_owned(),
        Err(_) => "not by the server".to_owned(),
    }
}

async fn types(db: &mut PgConnection, seen: &mut Seen) {
    let row = sqlx::query(
        "SELECT $1::bool, $2::int4, $3::int8, $4::float8, $5::text, $6::bytea, $7::int4[], $8::text",
    )
    .bind(true)
    .bind(7_i32)
    .bind(1_i64 << 40)
    .bind(-1.5_f64)
    .bind("snow ☃")
    .bind(vec![0_u8, 255])
    .bind(vec![Some(1_i32), None, Some(3)])
    .bind(None::<String>)
    .fetch_one(&mut *db)
    .await
    .unwrap();
    seen.say(
        "numbers",
        (row.get::<bool, _>(0), row.get::<i32, _>(1), row.get::<i64, _>(2), row.get::<f64, _>(3)),
    );
    seen.say("more", (row.get::<String, _>(4), row.get::<Vec<u8>, _>(5), row.get::<Vec<Option<i32>>, _>(6)));
    seen.say("null", row.get::<Option<String>, _>(7));
    let rows = sqlx::raw_sql("SELECT 1::int4 AS a, NULL::text AS b; SELECT 2::int4, 'two'")
        .fetch_all(&mut *db)
        .await;
    let rows = rows.unwrap();
    seen.say("in text", rows.iter().map(|row| row.get::<i32, _>(0)).collect::<Vec<_>>());
}

async fn transactions(db: &mut PgConnection, seen: &mut Seen) {
    db.execute("CREATE TABLE sqlx_t (id int PRIMARY KEY, word text)").await.unwrap();
    let mut transaction = db.begin().await.unwrap();
    transaction.execute("INSERT INTO sqlx_t VALUES (1, 'one'), (2, NULL)").await.unwrap();
    let mut inner = transaction.begin().await.unwrap();
    seen.say("savepoint", state(inner.execute("INSERT INTO sqlx_t VALUES (1, 'again')").await));
    seen.say("nothing works", state(inner.execute("SELECT 1").await));
    inner.rollback().await.unwrap();
    let mut inner = transaction.begin().await.unwrap();
    inner.execute("INSERT INTO sqlx_t VALUES (3, 'three')").await.unwrap();
    inner.commit().await.unwrap();
    transaction.commit().await.unwrap();
    let mut dropped = db.begin().await.unwrap();
    dropped.execute("DELETE FROM sqlx_t").await.unwrap();
    drop(dropped);
    let words: Vec<(i32, Option<String>)> =
        sqlx::query_as("SELECT * FROM sqlx_t ORDER BY id").fetch_all(&mut *db).await.unwrap();
    seen.say("kept", words);
    let mut reading = db.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.unwrap();
    seen.say("read only", state(reading.execute("DELETE FROM sqlx_t").await));
    reading.rollback().await.unwrap();
}

async fn prepared(db: &mut PgConnection, seen: &mut Seen) {
    let count = "SELECT count(*) FROM pg_prepared_statements";
    for number in 0..12_i32 {
        let query = sqlx::query_as::<_, (i32, Option<String>)>("SELECT $1 + 1, $2").bind(number);
        let row =
            query.bind((number % 3 != 0).then(|| format!("w{number}"))).fetch_one(&mut *db).await.unwrap();
        seen.say("prepared", row);
    }
    seen.say("there", db.cached_statements_size());
    for number in 0..12_i32 {
        let query = sqlx::query_scalar::<_, i32>("SELECT $1 * 2").bind(number).persistent(false);
        seen.say("unnamed", query.fetch_one(&mut *db).await.unwrap());
    }
    // More than its cache keeps: the oldest are closed.
    for number in 0..150_i32 {
        let text = format!("SELECT {number} + $1::int");
        let sum: i32 = sqlx::query_scalar(&text).bind(1_i32).fetch_one(&mut *db).await.unwrap();
        assert_eq!(sum, number + 1);
    }
    let kept: i64 = sqlx::query_scalar(count).fetch_one(&mut *db).await.unwrap();
    seen.say("kept", (kept, db.cached_statements_size()));
    db.clear_cached_statements().await.unwrap();
    let kept: i64 = sqlx::query_scalar(count).persistent(false).fetch_one(&mut *db).await.unwrap();
    seen.say("closed", kept);
    let described = db.describe("SELECT id, word FROM sqlx_t WHERE id = $1").await;
    let described =
        described.map(|of| (of.columns.len(), of.nullable)).map_err(|error| state::<()>(Err(error)));
    seen.say("described", described);
    db.execute("CREATE TEMP TABLE shape (a int)").await.unwrap();
    sqlx::query("SELECT * FROM shape").fetch_all(&mut *db).await.unwrap();
    db.execute("ALTER TABLE shape ADD b text").await.unwrap();
    seen.say(
        "cached plan must not change",
        state(sqlx::query("SELECT * FROM shape").fetch_all(&mut *db).await),
    );
    seen.say("syntax", state(sqlx::query("SELEKT $1").bind(1_i32).execute(&mut *db).await));
    seen.say("zero", state(sqlx::query("SELECT 1 / $1").bind(0_i32).execute(&mut *db).await));
    let several = sqlx::raw_sql("SELECT 1; SELECT 1/0; SELECT 3").fetch_all(&mut *db).await;
    seen.say("the second of three", state(several));
}

async fn streams(db: &mut PgConnection, seen: &mut Seen) {
    let mut rows = sqlx::query_scalar::<_, i32>("SELECT generate_series(1, 100000)").fetch(&mut *db);
    let first = (rows.next().await.unwrap().unwrap(), rows.next().await.unwrap().unwrap());
    drop(rows);
    seen.say("left early", first);
    // What is left of it is read over before the next statement.
    let mut rows = sqlx::query_scalar::<_, i32>("SELECT generate_series(1, 20000)").fetch(&mut *db);
    let mut sum = 0_i64;
    while let Some(number) = rows.try_next().await.unwrap() {
        sum += i64::from(number);
    }
    drop(rows);
    seen.say("streamed", sum);
    let mut rows = sqlx::query_scalar::<_, i32>("SELECT 100 / (5000 - n) FROM generate_series(1, 9000) n")
        .fetch(&mut *db);
    let mut count = 0;
    let error = loop {
        match rows.try_next().await {
            Ok(Some(_)) => count += 1,
            other => break state(other),
        }
    };
    drop(rows);
    seen.say("later", (count, error));
    db.execute("BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 300); COMMIT")
        .await
        .unwrap();
    let held: Vec<i32> = sqlx::query_scalar("FETCH 3 FROM held").fetch_all(&mut *db).await.unwrap();
    seen.say("held", held);
    db.execute("CLOSE held").await.unwrap();
}

async fn copies(db: &mut PgConnection, seen: &mut Seen) {
    db.execute("CREATE TABLE sqlx_copy (id int, word text)").await.unwrap();
    let mut copy = db.copy_in_raw("COPY sqlx_copy FROM STDIN").await.unwrap();
    let lines: String = (0..20_000).map(|number| format!("{number}\tword {number}\n")).collect();
    for part in lines.as_bytes().chunks(10_001) {
        copy.send(part).await.unwrap();
    }
    seen.say("copied in", copy.finish().await.unwrap());
    for form in ["text", "csv", "binary"] {
        let statement = format!("COPY (SELECT * FROM sqlx_copy ORDER BY id) TO STDOUT (FORMAT {form})");
        let out = db.copy_out_raw(&statement).await.unwrap();
        let bytes = out.try_fold(0, |sum, part| async move { Ok(sum + part.len()) }).await.unwrap();
        seen.say("copied out", (form, bytes));
    }
    let mut copy = db.copy_in_raw("COPY sqlx_copy FROM STDIN").await.unwrap();
    copy.send(&b"no number\tx\n"[..]).await.unwrap();
    seen.say("wrong line", state(copy.finish().await));
    let mut copy = db.copy_in_raw("COPY sqlx_copy FROM STDIN").await.unwrap();
    copy.send(&b"1\tx\n"[..]).await.unwrap();
    copy.abort("no more").await.unwrap();
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlx_copy").fetch_one(&mut *db).await.unwrap();
    seen.say("and goes on", count);
    db.execute("DROP TABLE sqlx_copy, sqlx_t").await.unwrap();
}

async fn large(db: &mut PgConnection, seen: &mut Seen) {
    let big = "0123456789abcdef".repeat(400 * 1024);
    let query = sqlx::query_as::<_, (String, Vec<u8>)>("SELECT $1, $2").bind(&big).bind(big.as_bytes());
    let (text, bytes) = query.fetch_one(&mut *db).await.unwrap();
    seen.say("large values", (text == big, bytes == big.as_bytes()));
    let rows: Vec<String> = sqlx::query_scalar("SELECT repeat('r', 1000) FROM generate_series(1, 20000)")
        .fetch_all(&mut *db)
        .await
        .unwrap();
    seen.say("many rows", rows.iter().map(String::len).sum::<usize>());
}

async fn notifications(url: &str, seen: &mut Seen) {
    let mut listener = PgListener::connect(url).await.unwrap();
    listener.listen_all(["sqlx_news", "sqlx_more"]).await.unwrap();
    let mut db = PgConnection::connect(url).await.unwrap();
    sqlx::query("SELECT pg_notify('sqlx_news', $1)").bind("n".repeat(7000)).execute(&mut db).await.unwrap();
    db.execute("NOTIFY sqlx_more, 'second'").await.unwrap();
    for _ in 0..2 {
        let told = listener.recv().await.unwrap();
        seen.say("notified", (told.channel().to_owned(), told.payload().len()));
    }
    listener.unlisten_all().await.unwrap();
    db.close().await.unwrap();
}

async fn pools(url: &str, seen: &mut Seen) {
    let pool = PgPoolOptions::new().max_connections(8).connect(url).await.unwrap();
    let many =
        join_all((0..300_i32).map(|number| {
            let pool = pool.clone();
            async move {
                sqlx::query_scalar::<_, i32>("SELECT $1 * 2").bind(number).fetch_one(&pool).await.unwrap()
            }
        }));
    seen.say("pool", many.await.iter().sum::<i32>());
    // A future that is dropped leaves its connection in the middle of a statement.
    let given_up = sqlx::query("SELECT pg_sleep(0.3)").execute(&pool);
    seen.say("given up", tokio::time::timeout(Duration::from_millis(50), given_up).await.is_err());
    seen.say("and goes on", sqlx::query_scalar::<_, i32>("SELECT 42").fetch_one(&pool).await.unwrap());
    let mut transaction = pool.begin().await.unwrap();
    seen.say("failed", state(transaction.execute("SELECT 1/0").await));
    drop(transaction);
    copy_through(&pool, seen).await;
    pool.close().await;
}

async fn copy_through(pool: &PgPool, seen: &mut Seen) {
    pool.execute("CREATE TABLE sqlx_pool (id int)").await.unwrap();
    let mut copy = pool.copy_in_raw("COPY sqlx_pool FROM STDIN").await.unwrap();
    copy.send(&b"1\n2\n"[..]).await.unwrap();
    seen.say("copied in", copy.finish().await.unwrap());
    pool.execute("DROP TABLE sqlx_pool").await.unwrap();
}

async fn logins(url: &str, seen: &mut Seen) {
    let options: PgConnectOptions = url.parse().unwrap();
    let told =
        options.clone().application_name("sqlx").options([("work_mem", "7MB"), ("search_path", "a,b")]);
    let mut db = PgConnection::connect_with(&told).await.unwrap();
    for name in ["application_name", "work_mem", "search_path"] {
        let query = sqlx::query_scalar::<_, String>("SELECT current_setting($1)").bind(name);
        seen.say("setting", query.fetch_one(&mut db).await.unwrap());
    }
    db.execute("SET statement_timeout = 50").await.unwrap();
    seen.say("out of time", state(db.execute("SELECT pg_sleep(60)").await));
    db.close().await.unwrap();
    for wrong in [options.clone().database("no_such_database"), options.clone().password("wrong")] {
        seen.say("not let in", state(PgConnection::connect_with(&wrong).await));
    }
}
