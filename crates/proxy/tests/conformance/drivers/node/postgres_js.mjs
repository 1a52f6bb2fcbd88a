// postgres.js: pipelines everything, prepares everything, cancels by closing, a connection of its own for LISTEN.

import postgres from 'postgres'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { pause, refused, run, say } from './steps.mjs'

const notices = []
const connect = (more = {}) =>
  postgres({ max: 4, onnotice: ({ severity, message }) => notices.push([severity, message]), ...more })
const big = '0123456789abcdef'.repeat(200 * 1024)

const withClient = (part, more) => async () => {
  const sql = connect(more)
  await part(sql)
  await sql.end()
}

const types = withClient(async (sql) => {
  say(
    'types',
    await sql`SELECT ${7}::int4 AS a, ${2 ** 40}::int8 AS b, ${-1.5}::float8 AS c, ${'snow ☃'}::text AS d,
    ${true}::bool AS e, ${null}::int AS f, ${Buffer.from([0, 255])}::bytea AS g, ${[1, 2, 3]}::int4[] AS h,
    ${sql.json({ a: [1, null] })}::jsonb AS i, ${new Date(Date.UTC(2024, 1, 29))}::timestamptz AS j, '1.50'::numeric AS k`,
  )
  say(
    'columns',
    (await sql`SELECT 1 AS one, 'x' AS two`).columns.map(({ name, type }) => [name, type]),
  )
  say('values', await sql`SELECT 1, NULL, 'x'`.values(), await sql`SELECT 'raw'`.raw())
  const [row] = await sql`SELECT ${'it'} AS ${sql('quoted "name"')}`
  say('names', row)
})

const transactions = withClient(async (sql) => {
  await sql`CREATE TABLE js_t (id int PRIMARY KEY, word text)`
  await sql`INSERT INTO js_t ${sql([
    { id: 1, word: 'one' },
    { id: 2, word: null },
  ])}`
  await refused('in a transaction', () =>
    sql.begin(async (sql) => {
      await sql`INSERT INTO js_t VALUES (3, 'three')`
      await sql`INSERT INTO js_t VALUES (1, 'again')`
    }),
  )
  const answer = await sql.begin('ISOLATION LEVEL SERIALIZABLE', async (sql) => {
    await sql`INSERT INTO js_t VALUES (3, 'three')`
    await refused('savepoint', () =>
      sql.savepoint(async (sql) => {
        await sql`DELETE FROM js_t`
        await sql`SELECT 1/0`
      }),
    )
    await sql.savepoint((sql) => sql`UPDATE js_t SET word = 'still' WHERE id = 3`)
    return sql`SHOW transaction_isolation`
  })
  say('isolation', answer)
  say('kept', await sql`SELECT * FROM js_t ORDER BY id`)
  // Not awaited one by one: several transactions, each with its pipeline.
  const sums = await Promise.all(
    Array.from({ length: 30 }, (_, n) =>
      sql.begin((sql) => [
        sql`SELECT ${n}::int AS n`,
        sql`SELECT count(*)::int AS n FROM js_t`,
        sql`SELECT ${n * 2}::int AS n`,
      ]),
    ),
  )
  say(
    'pipelines',
    sums.map((results) => results.reduce((sum, [row]) => sum + row.n, 0)),
  )
  await refused('a pipeline with an error', () =>
    sql.begin((sql) => [sql`INSERT INTO js_t VALUES (9, 'nine')`, sql`SELECT no_such_column`, sql`SELECT 1`]),
  )
  say('several statements', await sql`SELECT 1 AS a; SELECT 'two' AS b`.simple())
  await refused('the second of three', () => sql`SELECT 1; SELECT 1/0; SELECT 3`.simple())
  say('kept', await sql`SELECT count(*) FROM js_t`)
  await sql`DROP TABLE js_t`
})

const prepared = withClient(
  async (sql) => {
    for (let n = 0; n < 12; n++)
      say('prepared', await sql`SELECT ${n}::int + 1 AS n, ${n % 3 ? `w${n}` : null}::text AS word`)
    say(
      'there',
      await sql`SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%AS word%' AND statement NOT LIKE '%pg_pre%'`,
    )
    say('described', (await sql`SELECT ${1}::int, ${'x'}::text`.describe()).types)
    await sql`CREATE TEMP TABLE shape (a int)`
    const all = () => sql`SELECT * FROM shape`
    await all()
    await sql`ALTER TABLE shape ADD b text`
    say('after a change', await all().catch((error) => error.code))
    await refused('syntax', () => sql`SELEKT ${1}`)
    await refused('wrong parameter', () => sql`SELECT ${'words'}::int`)
    const many = await Promise.all(Array.from({ length: 500 }, (_, n) => sql`SELECT ${n}::int AS n`))
    say(
      'at the same time',
      many.reduce((sum, [row]) => sum + row.n, 0),
    )
  },
  { max: 1 },
)

const unprepared = withClient(
  async (sql) => {
    const many = await Promise.all(
      Array.from({ length: 100 }, (_, n) => sql`SELECT ${n}::int AS n, ${'x'.repeat(n)}::text AS x`),
    )
    say(
      'unnamed',
      many.reduce((sum, [row]) => sum + row.n + row.x.length, 0),
    )
    say('none is there', await sql`SELECT count(*) FROM pg_prepared_statements`)
  },
  { max: 1, prepare: false },
)

const cursors = withClient(
  async (sql) => {
    let total = 0
    for await (const rows of sql`SELECT n, repeat('x', n) AS x FROM generate_series(1, 1000) n`.cursor(70)) {
      total += rows.reduce((sum, row) => sum + row.n + row.x.length, 0)
    }
    say('portal by portal', total)
    for await (const [row] of sql`SELECT generate_series(1, 100000) AS n`.cursor(1)) {
      if (row.n === 3) break
    }
    await sql`SELECT generate_series(1, 1000) AS n`.cursor(10, ([row]) =>
      row.n > 30 ? sql.CLOSE : undefined,
    )
    total = 0
    await sql`SELECT generate_series(1, 20000) AS n`.forEach((row) => (total += row.n))
    say('one by one', total)
    await refused('later', async () => {
      for await (const _ of sql`SELECT 100 / (50 - n) FROM generate_series(1, 100) n`.cursor(20)) total += 1
    })
    await sql.begin(async (sql) => {
      await sql`DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 300) AS n`
    })
    say('and goes on', await sql`FETCH 3 FROM held`)
  },
  { max: 1 },
)

const copies = withClient(
  async (sql) => {
    await sql`CREATE TABLE js_copy (id int, word text)`
    const lines = function* () {
      for (let n = 0; n < 20000; n++) yield `${n}\t${n % 7 ? `word ${n}` : '\\N'}\n`
    }
    await pipeline(Readable.from(lines()), await sql`COPY js_copy FROM STDIN`.writable())
    const chunks = []
    const out = await sql`COPY (SELECT * FROM js_copy ORDER BY id) TO STDOUT`.readable()
    out.on('data', (chunk) => chunks.push(chunk))
    await new Promise((resolve) => out.on('end', resolve))
    say('copied', Buffer.concat(chunks), await sql`SELECT count(*) AS all, count(word) AS words FROM js_copy`)
    await refused('into nothing', () => sql`COPY no_such_table FROM STDIN`.writable())
    say('and goes on', await sql`SELECT 'on' AS it`)
    await sql`DROP TABLE js_copy`
  },
  { max: 1 },
)

const notifications = withClient(async (sql) => {
  const heard = []
  let all
  const done = new Promise((resolve) => (all = resolve))
  const { unlisten } = await sql.listen('js_news', (payload) => {
    heard.push(payload)
    if (heard.length === 2) all()
  })
  await sql.notify('js_news', 'first')
  await sql`SELECT pg_notify('js_news', ${'n'.repeat(7000)})`
  await done
  say('notified', ...heard)
  await unlisten()
  await sql`DO $$ BEGIN RAISE NOTICE 'look'; RAISE WARNING 'mind'; END $$`
  say('notices', notices)
})

const cancels = withClient(
  async (sql) => {
    const sleeping = sql`SELECT pg_sleep(60)`
    const ended = refused('cancelled', () => sleeping)
    await pause(500)
    await sleeping.cancel()
    await ended
    say('and goes on', await sql`SELECT 'on' AS it`)
    await refused('out of time', () => sql`SET statement_timeout = 50; SELECT pg_sleep(60)`.simple())
  },
  { max: 1 },
)

const large = withClient(
  async (sql) => {
    say('large values', await sql`SELECT ${big}::text AS text, ${Buffer.from(big)}::bytea AS data`)
    const four = await Promise.all([1, 2, 3, 4].map(() => sql`SELECT ${big}::text AS text`))
    say(
      'both ways at the same time',
      four.map(([row]) => row.text),
    )
    const many = await sql`SELECT repeat('r', 1000) AS r FROM generate_series(1, 20000)`
    say(
      'many rows',
      many.length,
      many.reduce((sum, row) => sum + row.r.length, 0),
    )
  },
  { max: 1 },
)

const settings = async () => {
  const sql = connect({
    connection: { application_name: 'js test', work_mem: '7MB', search_path: 'a,b' },
    max: 1,
  })
  for (const name of ['application_name', 'work_mem', 'search_path'])
    say('setting', await sql`SELECT current_setting(${name}) AS s`)
  say('reported', sql.parameters.server_encoding, sql.parameters.DateStyle, sql.parameters.is_superuser)
  const reserved = await sql.reserve()
  say('reserved', await reserved`SELECT 'reserved' AS it`)
  reserved.release()
  await sql.end()
  await refused('no such database', () => connect({ database: 'no_such_database' })`SELECT 1`)
}

await run(types, transactions, prepared, unprepared, cursors, copies, notifications, cancels, large, settings)
