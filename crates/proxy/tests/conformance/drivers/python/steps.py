"""What a script saw, a line for each step.

A step that fails says how: the comparison of two runs shows it all the same. What differs between two runs of the same
script on the same server, such as process ids and the words of a driver, must not be printed.
"""

import contextlib
import hashlib
import os
import sys
import threading

# A script that hangs is ended here, so that it says where.
SECONDS = 120

DATABASE = "postgres"
HOST, PORT = os.environ["PGHOST"], int(os.environ["PGPORT"])
USER, PASSWORD = os.environ["PGUSER"], os.environ["PGPASSWORD"]


def show(value):
    """The same for the same value; a long one by its length and hash."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value)
        if len(value) > 200:
            return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:16]}"
    if isinstance(value, str) and len(value) > 200:
        return f"{len(value)} characters {hashlib.sha256(value.encode()).hexdigest()[:16]}"
    if isinstance(value, (list, tuple)):
        if len(value) > 50:
            return f"{len(value)} items {show(repr(value))}"
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    return repr(value)


def say(step, *values):
    print(f"{step}: {' '.join(show(value) for value in values)}", flush=True)


@contextlib.contextmanager
def refused(step, sqlstate):
    """The server refuses what is done here; `sqlstate` finds the code in the driver's exception."""
    try:
        yield
    except Exception as error:  # Whatever it is, it is said.
        say(step, "refused", sqlstate(error), type(error).__name__)
    else:
        say(step, "NOT refused")


def done():
    print("done", flush=True)


def give_up():
    print(f"not done within {SECONDS} s", flush=True)
    import faulthandler

    faulthandler.dump_traceback(file=sys.stderr)
    os._exit(3)


_timer = threading.Timer(SECONDS, give_up)
_timer.daemon = True
_timer.start()
