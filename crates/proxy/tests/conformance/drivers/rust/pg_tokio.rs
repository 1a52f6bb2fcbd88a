//! tokio-postgres: everything in binary, statements by name, requests of many tasks in one stream.

use std::future::poll_fn;
use std::pin::pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt, TryStreamExt};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::binary_copy::{BinaryCopyInWriter, BinaryCopyOutStream};
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Error, IsolationLevel, NoTls, SimpleQueryMessage};

use super::Seen;

pub(super) async fn script(url: &str, seen: &mut Seen) {
    let (mut client, mut told) = connect(url).await.unwrap();
    types(&client, seen).await;
    transactions(&mut client, seen).await;
    prepared(&client, seen).await;
    portals(&mut client, seen).await;
    copies(&client, seen).await;
    notifications(url, &client, &mut told, seen).await;
    cancels(&client, seen).await;
    pipelines(&client, seen).await;
    large(&client, seen).await;
    simple_queries(&client, seen).await;
    client.batch_execute("DROP TABLE tokio_t, tokio_copy").await.unwrap();
    logins(url, seen).await;
}

/// What the server says by itself comes out of the channel.
async fn connect(url: &str) -> Result<(Client, UnboundedReceiver<String>), Error> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
    let (tell, told) = unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            let text = match message {
                AsyncMessage::Notice(notice) => format!("{} {}", notice.severity(), notice.message()),
                AsyncMessage::Notification(told) => format!("{} {}", told.channel(), told.payload()),
                _ => continue,
            };
            tell.send(text).ok();
        }
    });
    Ok((client, told))
}

/// SQLSTATE, or that the server had no part in it.
fn state<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "NOT refused".to_owned(),
        Err(error) => error.code().map_or("not by the server".to_owned(), |code| code.code().to_owned()),
    }
}

async fn types(client: &Client, seen: &mut Seen) {
    let moment = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    let row = client
        .query_one(
            "SELECT $1::bool, $2::int2, $3::int4, $4::int8, $5::float8, $6::text, $7::bytea, $8::timestamptz, \
             $9::int4[], $10::text, NULL::int4, $11::\"char\"",
            &[&true, &-2_i16, &7_i32, &(1_i64 << 40), &-1.5_f64, &"snow ☃", &[0_u8, 255].as_slice(), &moment, &[
                Some(1),
                None,
                Some(3_i32),
            ]
            .as_slice(), &None::<String>, &99_i8],
        )
        .await
        .unwrap();
    seen.say(
        "types",
        row.columns().iter().map(|column| column.type_().name().to_owned()).collect::<Vec<_>>(),
    );
    seen.say(
        "numbers",
        (row.get::<_, bool>(0), row.get::<_, i16>(1), row.get::<_, i32>(2), row.get::<_, i64>(3)),
    );
    seen.say("more", (row.get::<_, f64>(4), row.get::<_, String>(5), row.get::<_, Vec<u8>>(6)));
    seen.say("time", row.get::<_, SystemTime>(7) == moment);
    seen.say(
        "nulls",
        (row.get::<_, Vec<Option<i32>>>(8), row.get::<_, Option<String>>(9), row.get::<_, Option<i32>>(10)),
    );
    client
        .batch_execute(
            "CREATE TYPE tokio_mood AS ENUM ('good', 'bad'); CREATE DOMAIN tokio_d AS tokio_mood[]",
        )
        .await
        .unwrap();
    // For types that it does not know the driver asks the server within a statement.
    let statement = client.prepare("SELECT $1::tokio_mood, ARRAY[$1]::tokio_d").await.unwrap();
    seen.say(
        "types of its own",
        (statement.params()[0].name().to_owned(), statement.columns()[1].type_().name().to_owned()),
    );
    drop(statement);
    client.batch_execute("DROP TYPE tokio_mood CASCADE").await.unwrap();
}

async fn transactions(client: &mut Client, seen: &mut Seen) {
    client.batch_execute("CREATE TABLE tokio_t (id int PRIMARY KEY, word text)").await.unwrap();
    let transaction =
        client.build_transaction().isolation_level(IsolationLevel::Serializable).start().await.unwrap();
    let inserted =
        transaction.execute("INSERT INTO tokio_t VALUES ($1, $2), ($3, NULL)", &[&1_i32, &"one", &2_i32]);
    seen.say("inserted", inserted.await.unwrap());
    seen.say(
        "isolation",
        transaction.query_one("SHOW transaction_isolation", &[]).await.unwrap().get::<_, String>(0),
    );
    transaction.commit().await.unwrap();

    let mut transaction = client.transaction().await.unwrap();
    transaction.execute("INSERT INTO tokio_t VALUES (3, 'three')", &[]).await.unwrap();
    let inner = transaction.savepoint("it").await.unwrap();
    seen.say("savepoint", state(inner.execute("INSERT INTO tokio_t VALUES (3, 'again')", &[]).await));
    seen.say("nothing works", state(inner.query("SELECT 1", &[]).await));
    inner.rollback().await.unwrap();
    let inner = transaction.transaction().await.unwrap();
    inner.execute("UPDATE tokio_t SET word = 'still' WHERE id = 3", &[]).await.unwrap();
    inner.commit().await.unwrap();
    transaction.commit().await.unwrap();

    // Dropped, not ended: the driver sends the rollback by itself.
    let transaction = client.transaction().await.unwrap();
    transaction.execute("DELETE FROM tokio_t", &[]).await.unwrap();
    drop(transaction);
    let rows = client.query("SELECT id, word FROM tokio_t ORDER BY id", &[]).await.unwrap();
    seen.say(
        "kept",
        rows.iter().map(|row| (row.get::<_, i32>(0), row.get::<_, Option<String>>(1))).collect::<Vec<_>>(),
    );
    let reading = client.build_transaction().read_only(true).start().await.unwrap();
    seen.say("read only", state(reading.execute("DELETE FROM tokio_t", &[]).await));
    reading.rollback().await.unwrap();
}

async fn prepared(client: &Client, seen: &mut Seen) {
    let statement = client.prepare("SELECT $1::int + 1, $2::text").await.unwrap();
    for number in 0..12_i32 {
        let word = (number % 3 != 0).then(|| format!("w{number}"));
        let row = client.query_one(&statement, &[&number, &word]).await.unwrap();
        seen.say("prepared", (row.get::<_, i32>(0), row.get::<_, Option<String>>(1)));
    }
    let count = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT $1::int + 1%'";
    seen.say("there", client.query_one(count, &[]).await.unwrap().get::<_, i64>(0));
    drop(statement);
    seen.say("closed", client.query_one(count, &[]).await.unwrap().get::<_, i64>(0));
    let typed = client.query_typed("SELECT $1 * 2", &[(&21_i32, Type::INT4)]).await.unwrap();
    seen.say("unnamed", typed[0].get::<_, i32>(0));
    client.batch_execute("CREATE TEMP TABLE shape (a int)").await.unwrap();
    let statement = client.prepare("SELECT * FROM shape").await.unwrap();
    client.query(&statement, &[]).await.unwrap();
    client.batch_execute("ALTER TABLE shape ADD b text").await.unwrap();
    seen.say("cached plan must not change", state(client.query(&statement, &[]).await));
    seen.say("syntax", state(client.prepare("SELEKT $1").await));
    seen.say("zero", state(client.query("SELECT 1 / $1::int", &[&0_i32]).await));
}

async fn portals(client: &mut Client, seen: &mut Seen) {
    let transaction = client.transaction().await.unwrap();
    let statement = transaction.prepare("SELECT generate_series(1, $1::int)").await.unwrap();
    let (long, short) = (
        transaction.bind(&statement, &[&1000_i32]).await.unwrap(),
        transaction.bind(&statement, &[&3_i32]).await.unwrap(),
    );
    let mut counts = Vec::new();
    loop {
        let rows = transaction.query_portal(&long, 130).await.unwrap();
        counts.push(rows.len());
        if counts.len() == 2 {
            seen.say("another one", transaction.query_portal(&short, 2).await.unwrap().len());
        }
        if rows.len() < 130 {
            break;
        }
    }
    seen.say("portal by portal", counts);
    transaction
        .batch_execute("DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 300)")
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    let rows = client.query("FETCH 3 FROM held", &[]).await.unwrap();
    seen.say("held", rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>());
    client.batch_execute("CLOSE held").await.unwrap();
}

async fn copies(client: &Client, seen: &mut Seen) {
    client.batch_execute("CREATE TABLE tokio_copy (id int, word text)").await.unwrap();
    let mut sink = pin!(client.copy_in("COPY tokio_copy FROM STDIN").await.unwrap());
    for number in 0..20_000 {
        sink.send(Bytes::from(format!("{number}\tword {number}\n"))).await.unwrap();
    }
    seen.say("copied in", sink.finish().await.unwrap());
    let sink = client.copy_in("COPY tokio_copy FROM STDIN (FORMAT binary)").await.unwrap();
    let mut writer = pin!(BinaryCopyInWriter::new(sink, &[Type::INT4, Type::TEXT]));
    for number in 0..5000_i32 {
        let word = (number % 7 != 0).then(|| "b".repeat(number as usize % 90));
        writer.as_mut().write(&[&number, &word]).await.unwrap();
    }
    seen.say("copied in, binary", writer.finish().await.unwrap());
    let out = client.copy_out("COPY (SELECT * FROM tokio_copy ORDER BY id, word) TO STDOUT").await.unwrap();
    let bytes = out.try_fold(0, |sum, part| async move { Ok(sum + part.len()) }).await.unwrap();
    seen.say("copied out", bytes);
    let out = client.copy_out("COPY tokio_copy TO STDOUT (FORMAT binary)").await.unwrap();
    let rows: Vec<_> = BinaryCopyOutStream::new(out, &[Type::INT4, Type::TEXT]).try_collect().await.unwrap();
    let sum: i64 = rows.iter().map(|row| i64::from(row.get::<i32>(0))).sum();
    seen.say("copied out, binary", (rows.len(), sum));
    let mut sink = pin!(client.copy_in("COPY tokio_copy FROM STDIN").await.unwrap());
    sink.send(Bytes::from_static(b"no number\tx\n")).await.unwrap();
    seen.say("wrong line", state(sink.finish().await));
    // Dropped, not finished: the driver says CopyFail.
    let mut sink = Box::pin(client.copy_in::<_, Bytes>("COPY tokio_copy FROM STDIN").await.unwrap());
    sink.send(Bytes::from_static(b"1\tx\n")).await.unwrap();
    drop(sink);
    let mut out = Box::pin(client.copy_out("COPY tokio_copy TO STDOUT").await.unwrap());
    assert!(out.next().await.is_some());
    drop(out);
    seen.say(
        "and goes on",
        client.query_one("SELECT count(*) FROM tokio_copy", &[]).await.unwrap().get::<_, i64>(0),
    );
}

async fn notifications(url: &str, client: &Client, told: &mut UnboundedReceiver<String>, seen: &mut Seen) {
    while told.try_recv().is_ok() {}
    client.batch_execute("LISTEN tokio_news").await.unwrap();
    let (other, _) = connect(url).await.unwrap();
    other.execute("SELECT pg_notify('tokio_news', $1)", &[&"n".repeat(7000)]).await.unwrap();
    seen.say("notified", told.recv().await.map(|text| text.len()));
    client.batch_execute("NOTIFY tokio_news, 'own'; DO $$ BEGIN RAISE WARNING 'mind'; END $$").await.unwrap();
    let mut both = [told.recv().await, told.recv().await];
    both.sort();
    seen.say("both", both);
    client.batch_execute("UNLISTEN *").await.unwrap();
}

async fn cancels(client: &Client, seen: &mut Seen) {
    for _ in 0..3 {
        let token = client.cancel_token();
        let sleeping = client.batch_execute("SELECT pg_sleep(60)");
        let canceling = async {
            // sleep: until the statement runs; one that came too early would cancel nothing.
            tokio::time::sleep(Duration::from_millis(300)).await;
            token.cancel_query(NoTls).await
        };
        let (slept, cancelled) = tokio::join!(sleeping, canceling);
        seen.say("cancelled", (state(slept), cancelled.is_ok()));
    }
    seen.say(
        "out of time",
        state(client.batch_execute("SET statement_timeout = 50; SELECT pg_sleep(60)").await),
    );
    client.batch_execute("RESET statement_timeout").await.unwrap();
}

async fn pipelines(client: &Client, seen: &mut Seen) {
    let statement = &client.prepare("SELECT $1::int / $2::int").await.unwrap();
    let many = join_all((0..2000_i32).map(|number| async move {
        let answer = client.query_one(statement, &[&number, &(number % 10)]).await;
        answer
            .map(|row| row.get::<_, i32>(0))
            .map_err(|error| error.code().map(|code| code.code().to_owned()))
    }))
    .await;
    let sum: i32 = many.iter().flatten().sum();
    seen.say(
        "at the same time",
        (sum, many.iter().filter(|answer| answer.is_err()).count(), &many[0], &many[1999]),
    );
    let mixed = tokio::join!(
        client.query_one("SELECT repeat('x', 100000)", &[]),
        client.simple_query("SELECT 1; SELECT 1/0; SELECT 3"),
        client.prepare("SELECT no_such_column"),
        client.query_one("SELECT 'last'", &[]),
    );
    seen.say("mixed", (mixed.0.unwrap().get::<_, String>(0).len(), state(mixed.1), state(mixed.2)));
    seen.say("last", mixed.3.unwrap().get::<_, String>(0));
}

async fn large(client: &Client, seen: &mut Seen) {
    let big = &"0123456789abcdef".repeat(400 * 1024);
    let bytes = &big.as_bytes();
    let row = client.query_one("SELECT $1::text, $2::bytea", &[big, bytes]).await.unwrap();
    seen.say("large values", (row.get::<_, &str>(0) == big, row.get::<_, &[u8]>(1) == *bytes));
    let four =
        join_all((0..4).map(|_| async move { client.query_one("SELECT $1::text", &[big]).await })).await;
    seen.say(
        "both ways at the same time",
        four.iter().all(|row| row.as_ref().unwrap().get::<_, &str>(0) == big),
    );
    let rows = client.query("SELECT repeat('r', 1000) FROM generate_series(1, 20000)", &[]).await.unwrap();
    seen.say("many rows", rows.iter().map(|row| row.get::<_, &str>(0).len()).sum::<usize>());
}

async fn simple_queries(client: &Client, seen: &mut Seen) {
    let messages =
        client.simple_query("SELECT 1, NULL; ; UPDATE tokio_t SET word = 'w'; SELECT 'x' WHERE false");
    for message in messages.await.unwrap() {
        match message {
            SimpleQueryMessage::Row(row) => seen.say("row", (row.get(0), row.get(1))),
            SimpleQueryMessage::CommandComplete(count) => seen.say("complete", count),
            _ => seen.say("columns", ()),
        }
    }
    seen.say("empty", client.simple_query("").await.unwrap().len());
    seen.say("several with parameters", state(client.query("SELECT 1; SELECT 2", &[]).await));
}

async fn logins(url: &str, seen: &mut Seen) {
    let options =
        format!("{url}?application_name=tokio&options=-c%20work_mem%3D7MB%20-c%20search_path%3Da,b");
    let (client, _) = connect(&options).await.unwrap();
    for name in ["application_name", "work_mem", "search_path"] {
        let row = client.query_one("SELECT current_setting($1)", &[&name]).await.unwrap();
        seen.say("setting", row.get::<_, String>(0));
    }
    let elsewhere = format!("{}no_such_database", url.strip_suffix("postgres").unwrap());
    for wrong in [elsewhere, url.replace("correct", "wrong")] {
        seen.say("not let in", state(connect(&wrong).await));
    }
}
