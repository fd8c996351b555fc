// tardis-dev: the frames decoded and through its `normalizeMessages`, the async iteration its users get rows from
// (`run`), and through its mappers of trades and book tickers alone (`mappers_only`).
import { readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { dirname, join } from "node:path";

// The package is where the running Node is.
const require = createRequire(join(dirname(process.execPath), "..", "..", "frames.cjs"));
const { normalizeTrades, normalizeBookTickers } = require("tardis-dev");
const { normalizeMessages } = require("tardis-dev/dist/handy.js");

const EXCHANGES = { binance: "binance", "binance-usdm": "binance-futures", kraken: "kraken", coinbase: "coinbase" };
let frames = [];
let name = "";
let kept;

const mappers = () => [normalizeTrades, normalizeBookTickers].map((one) => one(name, new Date()));

function load({ path, exchange }) {
  frames = readFileSync(path, "utf8").trimEnd().split("\n").map((line) => line.slice(line.indexOf(" ") + 1));
  name = EXCHANGES[exchange];
  return normalized();
}

async function* messages() {
  for (const data of frames) yield { localTimestamp: new Date(), message: JSON.parse(data) };
}

async function normalized() {
  let rows = 0;
  const stream = normalizeMessages(name, undefined, messages(), mappers(), mappers, false, () => true, new Date());
  for await (const row of stream) {
    kept = row;
    rows += 1;
  }
  return rows;
}

function mapped() {
  let rows = 0;
  const all = mappers();
  for (const data of frames) {
    const message = JSON.parse(data);
    const localTimestamp = new Date();
    for (const mapper of all) {
      if (mapper.canHandle(message)) {
        for (const row of mapper.map(message, localTimestamp)) {
          kept = row;
          rows += 1;
        }
      }
    }
  }
  return rows;
}

async function timed(once, seconds) {
  let rows = 0;
  const begin = process.cpuUsage();
  for (;;) {
    rows += await once();
    const { user, system } = process.cpuUsage(begin);
    const spent = (user + system) / 1e6;
    if (spent >= seconds) return { rows, seconds: spent };
  }
}

const calls = {
  load,
  run: ({ seconds }) => timed(normalized, seconds),
  mappers_only: ({ seconds }) => timed(mapped, seconds),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { call, ...asked } = JSON.parse(line);
  let answer;
  try {
    answer = { result: await calls[call](asked) };
  } catch (error) {
    answer = { error: String(error.stack) };
  }
  writeSync(1, JSON.stringify(answer) + "\n");
}
