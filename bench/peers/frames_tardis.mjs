// tardis-dev: the frames decoded and through its mappers of trades and book tickers, as its real-time streams do.
import { readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { dirname, join } from "node:path";

// The package is where the running Node is.
const require = createRequire(join(dirname(process.execPath), "..", "..", "frames.cjs"));
const { normalizeTrades, normalizeBookTickers } = require("tardis-dev");

const EXCHANGES = { binance: "binance", "binance-usdm": "binance-futures", kraken: "kraken", coinbase: "coinbase" };
let frames = [];
let mappers = [];
let kept;

function load({ path, exchange }) {
  frames = readFileSync(path, "utf8").trimEnd().split("\n").map((line) => line.slice(line.indexOf(" ") + 1));
  mappers = [normalizeTrades, normalizeBookTickers].map((one) => one(EXCHANGES[exchange], new Date()));
  return handled();
}

function handled() {
  let rows = 0;
  for (const data of frames) {
    const message = JSON.parse(data);
    const localTimestamp = new Date();
    for (const mapper of mappers) {
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

function run({ seconds }) {
  let rows = 0;
  const begin = performance.now();
  for (;;) {
    rows += handled();
    const spent = (performance.now() - begin) / 1000;
    if (spent >= seconds) return { rows, seconds: spent };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { call, ...asked } = JSON.parse(line);
  let answer;
  try {
    answer = { result: { load, run }[call](asked) };
  } catch (error) {
    answer = { error: String(error.stack) };
  }
  writeSync(1, JSON.stringify(answer) + "\n");
}
