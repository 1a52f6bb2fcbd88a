// What a script saw, a line for each step; the same for the same, whatever was between it and the server.

import { createHash } from 'node:crypto'

// A script that hangs is ended here, so that it says where.
const SECONDS = 120

const hash = (bytes) => createHash('sha256').update(bytes).digest('hex').slice(0, 16)

const short = (_, value) => {
  if (value?.type === 'Buffer') value = Buffer.from(value.data)
  if (Buffer.isBuffer(value))
    return value.length > 50 ? `${value.length} bytes ${hash(value)}` : value.toString('hex')
  if (typeof value === 'string' && value.length > 200) return `${value.length} characters ${hash(value)}`
  if (Array.isArray(value) && value.length > 50) return `${value.length} items ${hash(JSON.stringify(value))}`
  return typeof value === 'bigint' ? `${value}n` : value
}

export const say = (step, ...values) =>
  console.log(`${step}: ${values.map((value) => JSON.stringify(value, short)).join(' ')}`)

export const refused = async (step, what) => {
  try {
    await what()
    say(step, 'NOT refused')
  } catch (error) {
    say(step, 'refused', error.code ?? null, error.severity ?? null, error.constructor.name)
  }
}

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

export const run = async (...parts) => {
  const timer = setTimeout(() => {
    console.log(`not done within ${SECONDS} s`)
    process.exit(3)
  }, SECONDS * 1000)
  for (const part of parts) await part()
  clearTimeout(timer)
  console.log('done')
}
