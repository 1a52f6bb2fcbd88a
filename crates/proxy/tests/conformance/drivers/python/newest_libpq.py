"""What only a new libpq can do: protocol 3.2, TLS without asking for it first, cancels over TLS."""

import threading
import time

import psycopg
from psycopg import pq

from steps import DATABASE, HOST, PASSWORD, PORT, USER, done, refused, say


def connect(**more):
    return psycopg.connect(
        host=HOST, port=PORT, user=USER, password=PASSWORD, dbname=DATABASE, autocommit=True, **more
    )


def state(error):
    return getattr(error, "sqlstate", None)


def protocol(**more):
    with connect(**more) as db:
        row = db.execute("SELECT %s::int", [7]).fetchone()
        return db.pgconn.full_protocol_version, db.pgconn.ssl_in_use, row


def cancelled(db):
    """The state that a statement which would sleep ends with, when it is cancelled."""
    ended = []

    def sleep():
        try:
            db.execute("SELECT pg_sleep(60)")
        except psycopg.Error as error:
            ended.append(state(error))

    sleeps = threading.Thread(target=sleep)
    sleeps.start()
    with connect(sslmode="require") as other:
        asks = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'"
        while other.execute(asks).fetchone()[0] == 0:
            time.sleep(0.005)
    db.cancel_safe(timeout=20)
    sleeps.join()
    return ended, db.execute("SELECT 1").fetchone()


say("libpq", pq.version() >= 180000, psycopg.capabilities.has_cancel_safe())
for version in ("3.0", "3.2", "latest"):
    say(f"protocol {version}", *protocol(sslmode="disable", max_protocol_version=version))
say("protocol 3.2 and no less", *protocol(sslmode="require", min_protocol_version="3.2", max_protocol_version="3.2"))
say("direct TLS", *protocol(sslmode="require", sslnegotiation="direct"))
say("direct TLS, protocol 3.2", *protocol(sslmode="require", sslnegotiation="direct", max_protocol_version="3.2"))
say("bound", *protocol(sslmode="require", sslnegotiation="direct", channel_binding="require"))
for version in ("3.0", "3.2"):
    for negotiation in ("postgres", "direct"):
        with connect(sslmode="require", sslnegotiation=negotiation, max_protocol_version=version) as db:
            say(f"cancel {version} {negotiation}", *cancelled(db))
with connect(sslmode="require", max_protocol_version="3.2") as db:
    with db.pipeline():
        cursors = [db.execute("SELECT %s::int", [number]) for number in range(3)]
        say("pipeline", [cursor.fetchone() for cursor in cursors])
    with refused("division", state):
        db.execute("SELECT 1/0")
    say("behind it", db.execute("SELECT 1").fetchone())
done()
