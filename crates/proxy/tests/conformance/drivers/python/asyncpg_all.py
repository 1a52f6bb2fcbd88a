"""asyncpg: everything prepared and binary, Flush instead of Sync within a statement, pools that reset connections."""

import asyncio
import datetime
import decimal
import io
import ipaddress
import uuid

import asyncpg

from steps import done, refused, say


def state(error):
    return getattr(error, "sqlstate", None)


async def types(db):
    values = {
        "bool": True,
        "int2": -2,
        "int4": 7,
        "int8": 2**40,
        "float4": 0.5,
        "float8": -1.5,
        "numeric": decimal.Decimal("12345678901234567890.000000001"),
        "text": "snow ☃",
        "bytea": b"\x00\xff",
        "date": datetime.date(2024, 2, 29),
        "time": datetime.time(1, 2, 3),
        "uuid": uuid.UUID(int=5),
        "timestamptz": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
        "interval": datetime.timedelta(days=3, seconds=5),
        "int4[]": [1, None, 3],
        "text[]": [["a", 'b"c'], ["", "d"]],
        "inet": ipaddress.ip_address("192.0.2.1"),
        "point": asyncpg.Point(1, 2),
        "int4range": asyncpg.Range(1, 5),
        "json": '{"a": 1}',
        "jsonb": '{"a": [1, null]}',
        "bit": asyncpg.BitString("1"),
        "char": b"c",
        "name": "n",
    }
    for cast, value in values.items():
        quoted = '"char"' if cast == "char" else cast
        say(f"type {cast}", list(await db.fetchrow(f"SELECT $1::{quoted}, NULL::{quoted}", value)))
    await db.execute(
        "CREATE TYPE asyncpg_pair AS (a int, b text); CREATE TYPE asyncpg_mood AS ENUM ('good', 'bad')"
    )
    row = await db.fetchrow(
        "SELECT ROW(1, 'x')::asyncpg_pair, $1::asyncpg_mood, ARRAY[ROW(2, NULL)::asyncpg_pair]", "bad"
    )
    say("types of its own", [list(row[0]), row[1], [list(pair) for pair in row[2]]])
    # Another statement is asked for the types: introspection within a statement.
    await db.set_type_codec("jsonb", encoder=str, decoder=lambda text: f"decoded {text}", schema="pg_catalog")
    say("codec", await db.fetchval("SELECT '[1]'::jsonb"))
    await db.reset_type_codec("jsonb", schema="pg_catalog")


async def transactions(db):
    await db.execute("CREATE TABLE asyncpg_t (id int PRIMARY KEY, word text)")
    async with db.transaction():
        await db.execute("INSERT INTO asyncpg_t VALUES ($1, $2), ($3, NULL)", 1, "one", 2)
    with refused("error in a transaction", state):
        async with db.transaction():
            await db.execute("INSERT INTO asyncpg_t VALUES (3, 'three')")
            await db.execute("INSERT INTO asyncpg_t VALUES ($1, 'again')", 1)
    async with db.transaction(isolation="serializable", readonly=True, deferrable=True):
        say(
            "isolation",
            await db.fetchval("SHOW transaction_isolation"),
            await db.fetchval("SHOW transaction_read_only"),
        )
    async with db.transaction():
        await db.execute("INSERT INTO asyncpg_t VALUES (3, 'three')")
        with refused("savepoint", state):
            async with db.transaction():
                await db.execute("INSERT INTO asyncpg_t VALUES (4, 'four')")
                await db.execute("SELECT 1/0")
        await db.execute("UPDATE asyncpg_t SET word = 'still' WHERE id = 3")
    say("after savepoints", [list(row) for row in await db.fetch("SELECT * FROM asyncpg_t ORDER BY 1")])
    hand = db.transaction()
    await hand.start()
    with refused("failed", state):
        await db.fetchval("SELECT no_such_column")
    with refused("nothing works until the rollback", state):
        await db.fetchval("SELECT 1")
    await hand.rollback()
    say("and goes on", await db.fetchval("SELECT 'on'"))


async def prepared(db):
    statement = await db.prepare("SELECT $1::int + 1, $2::text")
    say(
        "parameters",
        [kind.name for kind in statement.get_parameters()],
        [a.type.name for a in statement.get_attributes()],
    )
    for number in range(10):
        say("prepared", list(await statement.fetchrow(number, None if number % 3 == 0 else f"w{number}")))
    other = await db.prepare("SELECT generate_series(1, $1::int)", name="by_name")
    say(
        "two of them",
        [len(await other.fetch(number)) for number in (3, 0, 500)],
        await statement.fetchval(1, ""),
    )
    say("named", await db.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name = 'by_name'"))
    await statement.executemany([(n, "m") for n in range(300)])
    # More than its cache keeps.
    for number in range(150):
        await db.fetchval(f"SELECT {number}::int + $1", 1)
    say("kept", await db.fetchval("SELECT count(*) <= 110 FROM pg_prepared_statements"))
    await db.execute("CREATE TABLE asyncpg_shape (a int)")
    await db.fetch("SELECT * FROM asyncpg_shape")
    await db.execute("ALTER TABLE asyncpg_shape ADD b text; INSERT INTO asyncpg_shape VALUES (1, 'b')")
    say("prepared again", [list(row) for row in await db.fetch("SELECT * FROM asyncpg_shape")])
    async with db.transaction():
        await db.execute("SELECT 1")
        await db.execute("ALTER TABLE asyncpg_shape ADD c text")
        with refused("cached plan must not change", state):
            await db.fetch("SELECT * FROM asyncpg_shape")
    say("and goes on", [list(row) for row in await db.fetch("SELECT * FROM asyncpg_shape")])
    with refused("wrong type", state):
        await db.fetchval("SELECT $1::int", "words")
    with refused("syntax", state):
        await db.prepare("SELEKT 1")
    await db.reload_schema_state()
    await db.execute("DEALLOCATE ALL; DROP TABLE asyncpg_shape")


async def cursors(db):
    async with db.transaction():
        total = 0
        async for row in db.cursor(
            "SELECT n, repeat('x', n) FROM generate_series(1, $1) n", 1000, prefetch=70
        ):
            total += row[0] + len(row[1])
        say("portal by portal", total)
        cursor = await db.cursor("SELECT generate_series(1, 200)")
        other = await db.cursor("SELECT generate_series(1000, 1200)")
        say("two portals", len(await cursor.fetch(50)), (await other.fetchrow())[0])
        say("forward", await cursor.forward(100), (await cursor.fetchrow())[0], len(await cursor.fetch(1000)))
        await db.execute("DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 300)")
    say("held", [row[0] for row in await db.fetch("FETCH 3 FROM held")])
    await db.execute("MOVE 100 IN held")
    say("moved", [row[0] for row in await db.fetch("FETCH 2 FROM held")])
    await db.execute("CLOSE held")


async def copies(db):
    await db.execute("CREATE TABLE asyncpg_copy (id int, word text, data bytea)")
    rows = [(n, None if n % 7 == 0 else f"tab\there {n}", bytes([n % 256]) * (n % 50)) for n in range(20000)]
    say("records in", await db.copy_records_to_table("asyncpg_copy", records=rows))
    for form in ("text", "csv", "binary"):
        out = io.BytesIO()
        await db.copy_from_query("SELECT * FROM asyncpg_copy ORDER BY id", output=out, format=form)
        say(f"out {form}", out.getvalue())
        await db.execute("TRUNCATE asyncpg_copy")
        out.seek(0)
        say(f"in {form}", await db.copy_to_table("asyncpg_copy", source=out, format=form))
    with refused("wrong bytes", state):
        await db.copy_to_table("asyncpg_copy", source=io.BytesIO(b"not a number\n" * 50000))

    async def breaks():
        yield b"1\tone\t\\\\x\n"
        raise ValueError("no more")

    with refused("given up by the client", state):
        await db.copy_to_table("asyncpg_copy", source=breaks())

    async def full(_):
        raise ValueError("no room")

    with refused("out, given up by the client", state):
        await db.copy_from_query("SELECT repeat('y', 1000) FROM generate_series(1, 20000)", output=full)
    say("and goes on", await db.fetchval("SELECT count(*) FROM asyncpg_copy"))


async def notifications(db):
    heard = asyncio.Queue()
    await db.add_listener(
        "asyncpg_news", lambda _db, _pid, channel, payload: heard.put_nowait((channel, payload))
    )
    other = await asyncpg.connect()
    await other.execute("SELECT pg_notify('asyncpg_news', $1)", "n" * 7000)
    await other.execute("NOTIFY asyncpg_news, 'second'")
    await db.execute("NOTIFY asyncpg_news, 'own'")
    for _ in range(3):
        say("notified", await asyncio.wait_for(heard.get(), 20))
    await other.close()
    await db.execute("UNLISTEN *")
    notices = []
    db.add_log_listener(
        lambda _db, message: notices.append((message.severity, message.sqlstate, message.message))
    )
    await db.execute("DO $$ BEGIN RAISE NOTICE 'look'; RAISE WARNING 'mind'; END $$")
    await asyncio.sleep(0)
    say("notices", notices)


async def cancels(db):
    try:
        await db.fetch("SELECT pg_sleep(60)", timeout=0.5)
    except asyncio.TimeoutError:
        say("timed out")
    say("and goes on", await db.fetchval("SELECT 'on'"))
    task = asyncio.create_task(db.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0.3)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        say("cancelled")
    say("and goes on", await db.fetchval("SELECT 'on'"))
    async with db.transaction():
        with refused("within a transaction", state):
            async with db.transaction():
                await db.execute("SELECT pg_sleep(60)", timeout=0.3)
        say("the transaction is there", await db.fetchval("SELECT 'on'"))


async def large(db):
    big = "0123456789abcdef" * (400 * 1024)
    say(
        "large values",
        list(await db.fetchrow("SELECT $1::text, $2::bytea, length($1::text)", big, big.encode())),
    )
    rows = await db.fetch("SELECT repeat('r', 1000) FROM generate_series(1, 20000)")
    say("many rows", sum(len(row[0]) for row in rows))
    await db.execute("CREATE TEMP TABLE asyncpg_many (id int, word text)")
    await db.executemany("INSERT INTO asyncpg_many VALUES ($1, $2)", [(n, "w" * 300) for n in range(20000)])
    say("many executions", list(await db.fetchrow("SELECT sum(id), sum(length(word)) FROM asyncpg_many")))
    with refused("one of many fails", state):
        await db.executemany(
            "INSERT INTO asyncpg_many VALUES ($1::int / $2::int, 'x')",
            [(1, 1)] * 500 + [(1, 0)] + [(1, 1)] * 500,
        )
    say("none of them was made", await db.fetchval("SELECT count(*) FROM asyncpg_many"))
    returned = await db.fetchmany(
        "INSERT INTO asyncpg_many VALUES ($1, 'r') RETURNING id * 2", [(n,) for n in range(50)]
    )
    say("many returned", [row[0] for row in returned])


async def pools():
    async with asyncpg.create_pool(min_size=2, max_size=6) as pool:

        async def one(number):
            async with pool.acquire() as db:
                await db.execute(f"SET work_mem = '{number + 1}MB'")
                await db.execute("SELECT pg_advisory_lock($1)", number)
                return await db.fetchval("SELECT $1::int * 2", number)

        say("pool", await asyncio.gather(*(one(number) for number in range(30))))
        say(
            "was reset",
            await pool.fetchval("SHOW work_mem"),
            await pool.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"),
        )
        await pool.expire_connections()
        say("fresh ones", await pool.fetchval("SELECT 'fresh'"))


async def settings():
    db = await asyncpg.connect(
        server_settings={"work_mem": "7MB", "application_name": "asyncpg test", "jit": "off"}
    )
    for name in ("work_mem", "application_name", "jit"):
        say("setting", name, await db.fetchval(f"SHOW {name}"))
    await db.execute("SET TIME ZONE 'Asia/Kolkata'")
    status = db.get_settings()
    say(
        "reported",
        status.TimeZone,
        status.client_encoding,
        status.is_superuser,
        status.standard_conforming_strings,
    )
    say("server", db.get_server_version().major > 9)
    await db.close()
    with refused("wrong setting", state):
        await asyncpg.connect(server_settings={"work_mem": "much"})
    with refused("no such database", state):
        await asyncpg.connect(database="no_such_database")
    with refused("wrong password", state):
        await asyncpg.connect(password="wrong")


async def main():
    db = await asyncpg.connect()
    for part in (types, transactions, prepared, cursors, copies, notifications, cancels, large):
        await part(db)
    await db.execute("DROP TABLE asyncpg_t, asyncpg_copy; DROP TYPE asyncpg_pair, asyncpg_mood")
    await db.close()
    await pools()
    await settings()


asyncio.run(main())
done()
