"""psycopg 3: libpq with text and binary formats, server-side cursors, COPY, pipelines."""

import asyncio
import datetime
import decimal
import threading
import uuid

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from steps import done, refused, say


def state(error):
    return getattr(error, "sqlstate", None)


def types(db):
    values = [
        None,
        True,
        7,
        2**40,
        -1.5,
        decimal.Decimal("12345678901234567890.000000001"),
        "snow ☃",
        b"\x00\xff\x10",
        datetime.date(2024, 2, 29),
        datetime.datetime(2024, 2, 29, 12, 30, 15, 123456),
        datetime.timedelta(days=3, seconds=5),
        uuid.UUID(int=2**100 + 5),
        [1, None, 3],
        ["a", None, 'b"c'],
        Jsonb({"a": [1, None, "x"]}),
    ]
    casts = [
        "text",
        "bool",
        "int4",
        "int8",
        "float8",
        "numeric",
        "text",
        "bytea",
        "date",
        "timestamp",
        "interval",
        "uuid",
        "int4[]",
        "text[]",
        "jsonb",
    ]
    for binary in (False, True):
        with db.cursor(binary=binary) as cursor:
            for value, cast in zip(values, casts):
                row = cursor.execute(f"SELECT %s::{cast}", [value]).fetchone()
                say(f"type {cast} binary={binary}", row)
            for hint in ("%t", "%b"):
                row = cursor.execute(f"SELECT {hint}::int8 + 1, {hint}::text", [41, "words"]).fetchone()
                say(f"parameters {hint} binary={binary}", row)


def transactions(db):
    db.execute("CREATE TABLE psycopg_t (id int PRIMARY KEY, word text)")
    db.commit()
    with db.transaction():
        db.execute("INSERT INTO psycopg_t VALUES (1, 'one'), (2, NULL)")
    with refused("error in a transaction", state):
        with db.transaction():
            db.execute("INSERT INTO psycopg_t VALUES (3, 'three')")
            db.execute("INSERT INTO psycopg_t VALUES (1, 'again')")
    say("rolled back", db.execute("SELECT * FROM psycopg_t ORDER BY 1").fetchall())
    with refused("a second error", state):
        db.execute("SELECT 1/0")
    with refused("nothing works until the rollback", state):
        db.execute("SELECT 1")
    say("status", db.info.transaction_status.name)
    db.rollback()
    with db.transaction():
        db.execute("INSERT INTO psycopg_t VALUES (3, 'three')")
        with refused("savepoint", state):
            with db.transaction():
                db.execute("INSERT INTO psycopg_t VALUES (4, 'four')")
                db.execute("INSERT INTO psycopg_t VALUES (3, 'three')")
        with db.transaction(force_rollback=True):
            db.execute("DELETE FROM psycopg_t")
        db.execute("UPDATE psycopg_t SET word = 'still' WHERE id = 3")
    say("after savepoints", db.execute("SELECT * FROM psycopg_t ORDER BY 1").fetchall())
    db.commit()
    for level in ("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"):
        db.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        say("isolation", db.execute("SHOW transaction_isolation").fetchone())
        db.commit()
    db.read_only = True
    with refused("read only", state):
        db.execute("DELETE FROM psycopg_t")
    db.rollback()
    db.read_only = None


def prepared(db):
    db.prepare_threshold = 5
    for number in range(12):
        row = db.execute("SELECT %s::int + 1, %s::text", [number, f"w{number}"]).fetchone()
        say("prepared by and by", row)
    count = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT $1::int%%'"
    say("is prepared", db.execute(count).fetchone())
    for number in range(3):
        say("prepared at once", db.execute("SELECT %s::int * 2", [number], prepare=True).fetchone())
    db.execute("PREPARE by_hand(int) AS SELECT $1 * 3")
    say("by hand", db.execute("EXECUTE by_hand(14)").fetchone())
    db.execute("DEALLOCATE by_hand")
    with refused("deallocated", state):
        db.execute("EXECUTE by_hand(14)")
    db.rollback()
    db.execute("CREATE TEMP TABLE shape (a int)")
    for number in range(8):
        db.execute("SELECT * FROM shape", prepare=True).fetchall()
    db.execute("ALTER TABLE shape ADD b text")
    with refused("plan of other columns", state):
        say("columns", len(db.execute("SELECT * FROM shape", prepare=True).description))
    db.rollback()
    # More than the driver keeps.
    db.prepared_max = 10
    for number in range(40):
        db.execute(f"SELECT {number}::int, %s::int", [number], prepare=True)
    say("kept", db.execute("SELECT count(*) <= 12 FROM pg_prepared_statements").fetchone())
    db.execute("DEALLOCATE ALL")
    db.commit()
    say("none is kept", db.execute("SELECT count(*) FROM pg_prepared_statements", prepare=False).fetchone())
    db.commit()


def cursors(db):
    with db.cursor(name="scan") as cursor:
        cursor.itersize = 100
        cursor.execute("SELECT n, repeat('x', n) FROM generate_series(1, 1000) n")
        say("server-side cursor", sum(n + len(text) for n, text in cursor))
    with db.cursor(name="scroll", scrollable=True) as cursor:
        cursor.execute("SELECT generate_series(1, 50)")
        cursor.scroll(40)
        say("scrolled", cursor.fetchmany(3))
        cursor.scroll(-10)
        say("back", cursor.fetchone())
        cursor.scroll(0, mode="absolute")
        say("to the beginning", cursor.fetchmany(2))
    db.commit()
    with db.cursor(name="held", withhold=True) as cursor:
        cursor.execute("SELECT generate_series(1, 500)")
        say("before the commit", cursor.fetchmany(2))
        db.commit()
        db.execute("SELECT 1")
        db.commit()
        say("after it", cursor.fetchmany(2), len(cursor.fetchall()))
    db.commit()
    with refused("not held", state):
        with db.cursor(name="gone") as cursor:
            cursor.execute("SELECT generate_series(1, 500)")
            db.commit()
            cursor.fetchone()
    db.rollback()


def copies(db):
    db.execute("CREATE TABLE psycopg_copy (id int, word text, data bytea)")
    for form in ("", "(FORMAT BINARY)"):
        with db.cursor().copy(f"COPY psycopg_copy FROM STDIN {form}") as copy:
            if form:
                copy.set_types(["int4", "text", "bytea"])
            for number in range(20000):
                word = None if number % 7 == 0 else f"tab\there {number}"
                copy.write_row((number, word, bytes([number % 256]) * (number % 50)))
        summary = (
            "SELECT count(*), sum(id), count(word), sum(length(data)), md5(string_agg(word, ',' ORDER BY id))"
        )
        say(f"copied in {form}", db.execute(f"{summary} FROM psycopg_copy").fetchone())
        with db.cursor().copy(f"COPY (SELECT * FROM psycopg_copy ORDER BY id) TO STDOUT {form}") as copy:
            say(f"copied out {form}", b"".join(copy))
        db.execute("TRUNCATE psycopg_copy")
    db.commit()
    with refused("wrong line", state):
        with db.cursor().copy("COPY psycopg_copy FROM STDIN") as copy:
            copy.write("1\tone\t\\\\x\nno number\n")
            for _ in range(2000):
                copy.write("2\t" + "x" * 1000 + "\t\\\\x\n")
    db.rollback()
    with refused("given up by the client", state):
        with db.cursor().copy("COPY psycopg_copy FROM STDIN") as copy:
            copy.write("1\tone\t\\\\x\n")
            raise ValueError("no more")
    db.rollback()
    with refused("left early", state):
        with db.cursor().copy(
            "COPY (SELECT n, repeat('y', 1000) FROM generate_series(1, 20000) n) TO STDOUT"
        ) as copy:
            say("first row", copy.read_row())
            raise ValueError("no more")
    db.rollback()
    say("and goes on", db.execute("SELECT 'on'").fetchone())
    db.commit()


def notifications(db):
    with psycopg.connect(autocommit=True) as other:
        db.execute("LISTEN psycopg_news")
        db.commit()
        other.execute("NOTIFY psycopg_news, 'first'")
        other.execute("SELECT pg_notify('psycopg_news', repeat('n', 7000))")
        for notify in db.notifies(timeout=20, stop_after=2):
            say("notified", notify.channel, notify.payload)
        db.rollback()
        with db.transaction():
            db.execute("NOTIFY psycopg_news, 'own'")
        for notify in db.notifies(timeout=20, stop_after=1):
            say("by itself", notify.payload)
        db.rollback()
        db.execute("UNLISTEN *")
        db.commit()
    notices = []
    db.add_notice_handler(
        lambda notice: notices.append((notice.severity, notice.sqlstate, notice.message_primary))
    )
    db.execute("DO $$ BEGIN RAISE NOTICE 'look'; RAISE WARNING 'mind'; END $$")
    say("notices", notices)
    db.commit()


def cancels(db):
    begun = threading.Timer(0.5, db.cancel)
    begun.start()
    with refused("cancelled", state):
        db.execute("SELECT pg_sleep(60)")
    begun.join()
    db.rollback()
    begun = threading.Timer(0.5, db.cancel_safe)
    begun.start()
    with refused("cancelled again", state):
        db.execute("SELECT pg_sleep(60)")
    begun.join()
    db.rollback()
    say("and goes on", db.execute("SELECT 'on'").fetchone())
    db.execute("SET LOCAL statement_timeout = '50ms'")
    with refused("out of time", state):
        db.execute("SELECT pg_sleep(60)")
    db.rollback()


def pipelines(db):
    with db.pipeline() as pipeline:
        cursors = [db.execute("SELECT %s::int, repeat('p', %s)", [n, n * 10]) for n in range(50)]
        pipeline.sync()
        say("pipeline", sum(cursor.fetchone()[0] for cursor in cursors))
        wanted = db.execute("SELECT 'in between'")
        say("result within", wanted.fetchone())
    with refused("error in a pipeline", state):
        with db.pipeline():
            db.execute("CREATE TABLE psycopg_never (id int)")
            db.execute("SELECT 1/0")
            db.execute("SELECT 'skipped'")
    db.rollback()
    say("was undone", db.execute("SELECT to_regclass('psycopg_never')").fetchone())
    db.commit()
    with db.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE many (id int, word text)")
        cursor.executemany("INSERT INTO many VALUES (%s, %s)", [(n, f"m{n}") for n in range(2000)])
        say("many", cursor.rowcount, cursor.execute("SELECT sum(id) FROM many").fetchone())
        cursor.executemany("SELECT %s::int", [(n,) for n in range(30)], returning=True)
        total = cursor.fetchone()[0]
        while cursor.nextset():
            total += cursor.fetchone()[0]
        say("many answers", total)
    db.commit()
    with psycopg.connect(autocommit=True) as auto, auto.pipeline() as pipeline:
        good = auto.execute("SELECT 'good'")
        pipeline.sync()
        with refused("one part fails", state):
            auto.execute("SELECT no_such_column")
            pipeline.sync()
        pipeline.sync()
        say("the others do not", good.fetchone(), auto.execute("SELECT 'after'").fetchone())


def large(db):
    big = "0123456789abcdef" * (400 * 1024)
    for binary in (False, True):
        with db.cursor(binary=binary) as cursor:
            row = cursor.execute(
                "SELECT %s::text, %s::bytea, length(%s::text)", [big, big.encode(), big]
            ).fetchone()
            say(f"large values binary={binary}", row)
    say(
        "many rows",
        sum(len(row[0]) for row in db.execute("SELECT repeat('r', 1000) FROM generate_series(1, 20000)")),
    )
    say("one wide row", db.execute("SELECT " + ", ".join(f"{n}" for n in range(1600))).fetchone())
    with db.pipeline():
        cursors = [db.execute("SELECT %s::text", [big]) for _ in range(4)]
        say("large values both ways at the same time", [cursor.fetchone() for cursor in cursors])
    db.commit()


def simple_queries(db):
    with psycopg.ClientCursor(db) as cursor:
        cursor.execute(
            "SELECT 1; SELECT 'two'; CREATE TEMP TABLE several (id int); INSERT INTO several VALUES (1), (2)"
        )
        say(
            "several statements",
            cursor.fetchall(),
            cursor.nextset(),
            cursor.fetchall(),
            cursor.nextset(),
            cursor.statusmessage,
            cursor.nextset(),
            cursor.statusmessage,
            cursor.nextset(),
        )
        cursor.execute("")
        say("empty", cursor.statusmessage)
        with refused("the second of three", state):
            cursor.execute("SELECT 1; SELECT 1/0; SELECT 3")
        db.rollback()
        cursor.execute(sql.SQL("SELECT {}").format(sql.Literal("it's")))
        say("quoted", cursor.fetchone())
    db.commit()


def settings():
    with psycopg.connect(options="-c work_mem=7MB -c search_path=a,b", application_name="psycopg test") as db:
        for name in ("work_mem", "search_path", "application_name", "client_encoding", "server_encoding"):
            say("setting", name, db.execute(f"SHOW {name}").fetchone())
        db.execute("SET application_name = 'other'")
        db.execute("SET TIME ZONE 'Asia/Kolkata'")
        say(
            "reported",
            [
                db.info.parameter_status(name)
                for name in (
                    "application_name",
                    "TimeZone",
                    "DateStyle",
                    "IntervalStyle",
                    "integer_datetimes",
                    "standard_conforming_strings",
                    "is_superuser",
                    "session_authorization",
                )
            ],
        )
        db.rollback()
        say("reported after the rollback", db.info.parameter_status("TimeZone"))
        db.execute("SET client_encoding = 'LATIN1'")
        say("latin", db.execute("SELECT 'ä'::text || %s", ["ö"]).fetchone(), db.info.encoding)
    with refused("no such database", state):
        psycopg.connect(dbname="no_such_database")
    say("server", psycopg.connect().info.server_version // 10000 > 9)


async def at_once():
    async def one(number):
        async with await psycopg.AsyncConnection.connect() as db:
            rows = await (await db.execute("SELECT %s::int + generate_series(1, 100)", [number])).fetchall()
            return sum(row[0] for row in rows)

    say("at the same time", await asyncio.gather(*(one(number) for number in range(25))))
    async with await psycopg.AsyncConnection.connect() as db:
        task = asyncio.create_task(db.execute("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.5)
        task.cancel()
        try:
            await task
        except BaseException as error:
            say("task cancelled", type(error).__name__)
        await db.rollback()
        say("and goes on", await (await db.execute("SELECT 'on'")).fetchone())


with psycopg.connect() as connection:
    for part in (
        types,
        transactions,
        prepared,
        cursors,
        copies,
        notifications,
        cancels,
        pipelines,
        large,
        simple_queries,
    ):
        part(connection)
    connection.execute("DROP TABLE psycopg_t, psycopg_copy")
settings()
asyncio.run(at_once())
done()
