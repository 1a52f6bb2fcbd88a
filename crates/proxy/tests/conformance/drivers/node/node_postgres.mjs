// node-postgres: text formats, unnamed statements unless a query has a name, cursors by portals, pools.

import pg from 'pg'
import Cursor from 'pg-cursor'
import QueryStream from 'pg-query-stream'
import { from as copyFrom, to as copyTo } from 'pg-copy-streams'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { pause, refused, run, say } from './steps.mjs'

const rows = async (db, ...query) => (await db.query(...query)).rows
const big = '0123456789abcdef'.repeat(200 * 1024)

const withClient = (part) => async () => {
  const db = new pg.Client({ application_name: 'pg test' })
  await db.connect()
  await part(db)
  await db.end()
}

const types = withClient(async (db) => {
  const values = {
    int4: 7,
    int8: '1099511627776',
    float8: -1.5,
    numeric: '12345678901234567890.000000001',
    text: 'snow ☃',
    bool: true,
    bytea: Buffer.from([0, 255]),
    'int4[]': [1, null, 3],
    'text[]': ['a', 'b"c', null],
    jsonb: { a: [1, null] },
    int2: null,
    timestamptz: new Date(Date.UTC(2024, 1, 29, 12)),
    interval: '3 days',
    uuid: '00000000-0000-0000-0000-000000000005',
  }
  for (const [cast, value] of Object.entries(values)) {
    say(
      `type ${cast}`,
      await rows(db, { text: `SELECT $1::${cast} AS value`, values: [value], rowMode: 'array' }),
    )
    if (
      !['float8', 'numeric', 'interval', 'jsonb', 'text[]', 'int4[]', 'uuid', 'timestamptz'].includes(cast)
    ) {
      say(
        `type ${cast}, binary`,
        await rows(db, { text: `SELECT $1::${cast} AS value`, values: [value], binary: true }),
      )
    }
  }
})

const transactions = withClient(async (db) => {
  await db.query('CREATE TABLE pg_t (id int PRIMARY KEY, word text)')
  await db.query('BEGIN')
  await db.query('INSERT INTO pg_t VALUES ($1, $2), ($3, NULL)', [1, 'one', 2])
  await db.query('SAVEPOINT s')
  await refused('in a transaction', () => db.query("INSERT INTO pg_t VALUES (1, 'again')"))
  await refused('nothing works until the rollback', () => db.query('SELECT 1'))
  await db.query('ROLLBACK TO s')
  await db.query('COMMIT')
  say('kept', await rows(db, 'SELECT * FROM pg_t ORDER BY id'))
  await db.query('BEGIN; DELETE FROM pg_t; ROLLBACK')
  const several = await db.query("SELECT 1 AS a; SELECT 'two' AS b; UPDATE pg_t SET word = 'w'")
  say(
    'several statements',
    several.map((result) => [result.command, result.rowCount, result.rows]),
  )
  await refused('the second of three', () => db.query('SELECT 1; SELECT 1/0; SELECT 3'))
  say('empty', (await db.query('')).rows)
  await db.query('DROP TABLE pg_t')
})

const prepared = withClient(async (db) => {
  const query = { name: 'by name', text: 'SELECT $1::int + 1 AS n, $2::text AS word' }
  for (let n = 0; n < 12; n++) say('named', await rows(db, { ...query, values: [n, n % 3 ? `w${n}` : null] }))
  for (let n = 0; n < 12; n++) say('unnamed', await rows(db, query.text, [n, 'w']))
  say('prepared', await rows(db, "SELECT count(*) FROM pg_prepared_statements WHERE name = 'by name'"))
  await refused('another text', () => db.query({ name: 'by name', text: 'SELECT 2', values: [] }))
  await refused('wrong parameter', () => db.query({ ...query, values: ['words', 'w'] }))
  await refused('syntax', () => db.query({ name: 'wrong', text: 'SELEKT $1', values: [1] }))
  await db.query('CREATE TEMP TABLE shape (a int)')
  const all = { name: 'shape', text: 'SELECT * FROM shape', values: [] }
  await db.query(all)
  await db.query('ALTER TABLE shape ADD b text')
  await refused('cached plan must not change', () => db.query(all))
  // Not awaited one by one: the driver keeps a queue.
  const many = await Promise.all(
    Array.from({ length: 300 }, (_, n) => rows(db, { ...query, values: [n, 'q'] })),
  )
  say(
    'a queue',
    many.reduce((sum, [row]) => sum + row.n, 0),
  )
})

const cursors = withClient(async (db) => {
  const cursor = db.query(new Cursor("SELECT n, repeat('x', n) AS x FROM generate_series(1, $1) n", [1000]))
  let [total, batch] = [0, await cursor.read(70)]
  while (batch.length) {
    total += batch.reduce((sum, row) => sum + row.n + row.x.length, 0)
    batch = await cursor.read(70)
  }
  say('portal by portal', total)
  await cursor.close()
  const left = db.query(new Cursor('SELECT generate_series(1, 100000) n'))
  say('left early', await left.read(3))
  await left.close()
  total = 0
  for await (const row of db.query(
    new QueryStream('SELECT generate_series(1, 20000) n', [], { batchSize: 333 }),
  ))
    total += row.n
  say('streamed', total)
  const broken = db.query(new Cursor('SELECT 100 / (50 - n) AS x FROM generate_series(1, 100) n'))
  say('before the error', (await broken.read(40)).length)
  await refused('later', () => broken.read(40))
  await broken.close().catch(() => {})
  await db.query('BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 300) n; COMMIT')
  say(
    'held',
    await rows(db, 'FETCH 2 FROM held'),
    await rows(db, 'MOVE 100 IN held'),
    await rows(db, 'FETCH 1 FROM held'),
  )
})

const copies = withClient(async (db) => {
  await db.query('CREATE TABLE pg_copy (id int, word text)')
  const lines = function* () {
    for (let n = 0; n < 20000; n++) yield `${n}\t${n % 7 ? `word ${n}` : '\\N'}\n`
  }
  await pipeline(Readable.from(lines()), db.query(copyFrom('COPY pg_copy FROM STDIN')))
  for (const format of ['text', 'csv', 'binary']) {
    const out = db.query(copyTo(`COPY (SELECT * FROM pg_copy ORDER BY id) TO STDOUT (FORMAT ${format})`))
    const chunks = []
    for await (const chunk of out) chunks.push(chunk)
    const bytes = Buffer.concat(chunks)
    await db.query('TRUNCATE pg_copy')
    await pipeline(Readable.from([bytes]), db.query(copyFrom(`COPY pg_copy FROM STDIN (FORMAT ${format})`)))
    say(
      `copied ${format}`,
      bytes,
      await rows(db, 'SELECT count(*) AS all, count(word) AS words FROM pg_copy'),
    )
  }
  await refused('wrong line', () =>
    pipeline(Readable.from(['no number\tx\n']), db.query(copyFrom('COPY pg_copy FROM STDIN'))),
  )
  say('and goes on', await rows(db, "SELECT 'on' AS it"))
  await db.query('DROP TABLE pg_copy')
})

const notifications = withClient(async (db) => {
  const heard = []
  const all = new Promise((resolve) =>
    db.on('notification', ({ channel, payload }) => {
      heard.push([channel, payload])
      if (heard.length === 3) resolve()
    }),
  )
  const notices = []
  db.on('notice', ({ severity, code, message }) => notices.push([severity, code, message]))
  await db.query('LISTEN pg_news')
  const other = new pg.Client()
  await other.connect()
  await other.query("NOTIFY pg_news, 'first'")
  await other.query("SELECT pg_notify('pg_news', $1)", ['n'.repeat(7000)])
  await db.query("NOTIFY pg_news, 'own'")
  await all
  say('notified', ...heard)
  await db.query("DO $$ BEGIN RAISE NOTICE 'look'; RAISE WARNING 'mind'; END $$")
  say('notices', notices)
  await other.end()
})

const cancels = withClient(async (db) => {
  const sleeping = refused('cancelled', () => db.query('SELECT pg_sleep(60)'))
  await pause(500)
  // What a client sends itself: the key that it was given.
  const canceller = new pg.Client()
  canceller.connection.on('connect', () => canceller.connection.cancel(db.processID, db.secretKey))
  canceller.connection.connect(db.port, db.host)
  await sleeping
  canceller.connection.stream.destroy()
  say('and goes on', await rows(db, "SELECT 'on' AS it"))
  await refused('out of time', () => db.query('SET statement_timeout = 50; SELECT pg_sleep(60)'))
})

const large = withClient(async (db) => {
  say('large values', await rows(db, 'SELECT $1::text AS text, $2::bytea AS data', [big, Buffer.from(big)]))
  const many = await rows(db, "SELECT repeat('r', 1000) AS r FROM generate_series(1, 20000)")
  say(
    'many rows',
    many.length,
    many.reduce((sum, row) => sum + row.r.length, 0),
  )
})

const pools = async () => {
  const pool = new pg.Pool({ max: 8 })
  const answers = await Promise.all(
    Array.from({ length: 200 }, (_, n) => rows(pool, 'SELECT $1::int * 2 AS n', [n])),
  )
  say(
    'pool',
    answers.reduce((sum, [row]) => sum + row.n, 0),
    pool.totalCount,
  )
  const client = await pool.connect()
  await refused('in the pool', () => client.query('SELECT 1/0'))
  client.release(true)
  await pool.end()
  await refused('no such database', () => new pg.Client({ database: 'no_such_database' }).connect())
  const told = new pg.Client({ options: '-c work_mem=7MB -c search_path=a,b', statement_timeout: 12345 })
  await told.connect()
  for (const name of ['work_mem', 'search_path', 'statement_timeout'])
    say('setting', await rows(told, `SHOW ${name}`))
  await told.end()
}

await run(types, transactions, prepared, cursors, copies, notifications, cancels, large, pools)
