"""pg8000: pure Python, text formats, unnamed statements unless it is told otherwise."""

import datetime
import decimal
import io
import uuid

import pg8000.dbapi
import pg8000.native

from steps import DATABASE, HOST, PASSWORD, PORT, USER, done, refused, say

ADDRESS = {"user": USER, "password": PASSWORD, "host": HOST, "port": PORT, "database": DATABASE}


def state(error):
    return error.args[0].get("C") if error.args and isinstance(error.args[0], dict) else None


def native():
    db = pg8000.native.Connection(**ADDRESS, application_name="pg8000 test")
    values = {
        "int4": 7,
        "int8": 2**40,
        "float8": -1.5,
        "numeric": decimal.Decimal("12345678901234567890.000000001"),
        "text": "snow ☃",
        "bytea": b"\x00\xff",
        "bool": True,
        "date": datetime.date(2024, 2, 29),
        "timestamp": datetime.datetime(2024, 2, 29, 12, 30),
        "interval": datetime.timedelta(days=3),
        "uuid": uuid.UUID(int=5),
        "int4[]": [1, None, 3],
        "text[]": ["a", 'b"c', None],
        "jsonb": '{"a": [1, null]}',
        "int2": None,
    }
    for cast, value in values.items():
        say(f"type {cast}", db.run(f"SELECT CAST(:value AS {cast})", value=value))
    statement = db.prepare("SELECT CAST(:a AS int) + 1, CAST(:b AS text)")
    for number in range(12):
        say("prepared", statement.run(a=number, b=None if number % 3 == 0 else f"w{number}"))
    say(
        "it is there",
        db.run("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT CAST%'"),
    )
    statement.close()
    say(
        "it is not", db.run("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT CAST%'")
    )
    db.run("CREATE TABLE pg8000_t (id int PRIMARY KEY, word text)")
    db.run("START TRANSACTION")
    db.run("INSERT INTO pg8000_t VALUES (1, 'one'), (2, NULL)")
    db.run("SAVEPOINT s")
    with refused("in a transaction", state):
        db.run("INSERT INTO pg8000_t VALUES (1, 'again')")
    with refused("nothing works until the rollback", state):
        db.run("SELECT 1")
    db.run("ROLLBACK TO s")
    db.run("COMMIT")
    say("kept", db.run("SELECT * FROM pg8000_t ORDER BY 1"), db.row_count, [c["name"] for c in db.columns])
    out = io.BytesIO(b"".join(b"%d\tword %d\n" % (n, n) for n in range(10, 20000)))
    db.run("COPY pg8000_t FROM STDIN", stream=out)
    back = io.BytesIO()
    db.run("COPY (SELECT * FROM pg8000_t ORDER BY id) TO STDOUT WITH (FORMAT csv)", stream=back)
    say("copied", back.getvalue())
    with refused("wrong line", state):
        db.run("COPY pg8000_t FROM STDIN", stream=io.BytesIO(b"no number\tx\n" * 5000))
    db.run("LISTEN pg8000_news")
    other = pg8000.native.Connection(**ADDRESS)
    other.run("NOTIFY pg8000_news, 'hello'")
    db.run("NOTIFY pg8000_news, 'own'")
    db.run("SELECT 1")
    say("notified", sorted((channel, payload) for _, channel, payload in db.notifications))
    other.close()
    db.run("DO $$ BEGIN RAISE NOTICE 'look'; END $$")
    say("notices", [notice[b"M"] for notice in db.notices])
    big = "0123456789abcdef" * (200 * 1024)
    say("large values", db.run("SELECT CAST(:big AS text), CAST(:data AS bytea)", big=big, data=big.encode()))
    say("settings", db.run("SHOW application_name"), db.parameter_statuses["client_encoding"])
    with refused("out of time", state):
        db.run("SET statement_timeout = 50; SELECT pg_sleep(60)")
    db.run("DROP TABLE pg8000_t")
    db.close()


def dbapi():
    db = pg8000.dbapi.connect(**ADDRESS)
    cursor = db.cursor()
    cursor.execute("CREATE TEMP TABLE t (id int, word text)")
    cursor.executemany("INSERT INTO t VALUES (%s, %s)", [(n, f"w{n}") for n in range(200)])
    cursor.execute("DECLARE c CURSOR WITH HOLD FOR SELECT * FROM t ORDER BY id")
    cursor.execute("FETCH 5 FROM c")
    say("cursor", cursor.fetchall())
    db.commit()
    cursor.execute("FETCH 2 FROM c")
    say("held", cursor.fetchmany(2), cursor.rowcount)
    with refused("failed", state):
        cursor.execute("SELECT 1/0")
    db.rollback()
    db.autocommit = True
    cursor.execute("SELECT 'on', count(*) FROM t")
    say("and goes on", cursor.fetchone())
    db.autocommit = False
    xid = db.xid(1, "global", "branch")
    with refused("two phases are off", state):
        db.tpc_begin(xid)
        cursor.execute("SELECT 1")
        db.tpc_prepare()
    db.close()
    with refused("wrong password", state):
        pg8000.dbapi.connect(**{**ADDRESS, "password": "wrong"})


native()
dbapi()
done()
