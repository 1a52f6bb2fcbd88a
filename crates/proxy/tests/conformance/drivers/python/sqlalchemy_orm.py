"""SQLAlchemy over three drivers: its pool, its ORM, its server-side cursors, its two-phase and isolation settings."""

import asyncio

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from steps import DATABASE, HOST, PASSWORD, PORT, USER, done, refused, say


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "orm_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(50), unique=True)
    books: Mapped[list["Book"]] = relationship(back_populates="author", cascade="all, delete-orphan")


class Book(Base):
    __tablename__ = "orm_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(sa.ForeignKey("orm_author.id"))
    title: Mapped[str | None]
    data: Mapped[bytes | None]
    more: Mapped[dict | None] = mapped_column(sa.JSON)
    author: Mapped[Author] = relationship(back_populates="books")


def state(error):
    original = getattr(error, "orig", error)
    if original.args and isinstance(original.args[0], dict):
        return original.args[0].get("C")
    return getattr(original, "sqlstate", None)


def url(driver):
    return sa.URL.create(f"postgresql+{driver}", USER, PASSWORD, HOST, PORT, DATABASE)


def synchronous(driver):
    engine = sa.create_engine(url(driver), pool_size=3, pool_pre_ping=True)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        for number in range(20):
            books = [
                Book(title=f"title {n}" if n % 2 else None, data=bytes([n]), more={"n": [n]})
                for n in range(5)
            ]
            session.add(Author(name=f"author {number}", books=books))
        session.commit()
        found = session.scalars(sa.select(Author).where(Author.name.like("%1%")).order_by(Author.id)).all()
        say(f"{driver} found", [(author.name, len(author.books), author.books[2].more) for author in found])
        session.add(Author(name="author 1"))
        with refused(f"{driver} unique", state):
            session.flush()
        session.rollback()
        with session.begin_nested():
            session.add(Author(name="nested"))
        try:
            with session.begin_nested():
                session.add(Author(name="undone"))
                session.flush()
                raise ValueError
        except ValueError:
            pass
        session.commit()
        count = sa.select(sa.func.count()).select_from(Author)
        say(f"{driver} nested", session.scalar(count.where(Author.name.in_(["nested", "undone"]))))
        session.delete(found[0])
        session.commit()
        say(
            f"{driver} deleted",
            session.scalar(count),
            session.scalar(sa.select(sa.func.count()).select_from(Book)),
        )
        session.bulk_insert_mappings(Author, [{"name": f"bulk {n}"} for n in range(3000)])
        session.commit()
        say(f"{driver} bulk", session.scalar(count))
    with engine.connect() as db:
        rows = db.execution_options(stream_results=True, yield_per=100).execute(
            sa.text("SELECT generate_series(1, 5000)")
        )
        say(f"{driver} streamed", sum(row[0] for row in rows))
    for level in ("SERIALIZABLE", "AUTOCOMMIT", "READ COMMITTED"):
        with engine.connect().execution_options(isolation_level=level) as db:
            say(f"{driver} {level}", db.scalar(sa.text("SHOW transaction_isolation")))
    inspector = sa.inspect(engine)
    say(
        f"{driver} inspected",
        inspector.get_columns("orm_book")[1]["name"],
        inspector.get_foreign_keys("orm_book")[0]["referred_table"],
        inspector.get_unique_constraints("orm_author")[0]["column_names"],
    )
    Base.metadata.drop_all(engine)
    engine.dispose()


async def asynchronous(driver):
    engine = create_async_engine(url(driver), pool_size=5)
    async with engine.begin() as db:
        await db.run_sync(Base.metadata.create_all)

    async def one(number):
        async with engine.begin() as db:
            await db.execute(sa.insert(Author).values(name=f"async {number}"))
            return await db.scalar(
                sa.select(sa.func.length(Author.name)).where(Author.name == f"async {number}")
            )

    say(f"{driver} at the same time", await asyncio.gather(*(one(number) for number in range(20))))
    async with engine.connect() as db:
        total = 0
        result = await db.stream(sa.text("SELECT generate_series(1, 5000)"))
        async for row in result:
            total += row[0]
        say(f"{driver} streamed", total)
        with refused(f"{driver} failed", state):
            await db.execute(sa.text("SELECT 1/0"))
        await db.rollback()
        say(f"{driver} goes on", await db.scalar(sa.text("SELECT 'on'")))
    async with engine.begin() as db:
        await db.run_sync(Base.metadata.drop_all)
    await engine.dispose()


for name in ("psycopg", "pg8000"):
    synchronous(name)
for name in ("asyncpg", "psycopg"):
    asyncio.run(asynchronous(name))
done()
