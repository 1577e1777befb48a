'use strict';
// The page's data, which page.py writes, is in script elements:
//   facts                     JSON: the model, its stages and blocks
//   block-S-B                 base64 of zlib: rounded queries and keys of each head of a block
//   colours-S, magnitude-S    base64 of zlib: the features of a stage
// Attention weights of a query are computed when it is pointed at.

const facts = JSON.parse(document.getElementById('facts').textContent);
const $ = (id) => document.getElementById(id);

// ---- Data ---------------------------------------------------------------------------------------

function bytesOf(base64) {
  const text = atob(base64),
    bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function inflate(id) {
  const packed = new Blob([bytesOf($(id).textContent)]).stream();
  const whole = packed.pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(whole).arrayBuffer());
}

const floatsOf = (base64) => new Float32Array(bytesOf(base64).buffer);

const loaded = new Map(); // a few blocks: one of stage 1 may take 20 MB

function loadBlock(stage, block) {
  const id = `block-${stage}-${block}`;
  if (!loaded.has(id)) {
    if (loaded.size > 4) loaded.delete(loaded.keys().next().value);
    loaded.set(id, unpack(id, facts.stages[stage], facts.stages[stage].blocks[block]));
  }
  return loaded.get(id);
}

/** Queries and keys of each head, whole numbers (axes, positions), and the factors of the axes. */
async function unpack(id, stage, block) {
  const bytes = await inflate(id),
    total = bytes.length / 2,
    whole = new Int16Array(total);
  for (let i = 0; i < total; i++) {
    const unsigned = bytes[i] | (bytes[total + i] << 8);
    whole[i] = (unsigned >>> 1) ^ -(unsigned & 1);
  }
  const count = stage.height * stage.width;
  let at = 0;
  const next = (axes) => whole.subarray(at, (at += axes * count));
  return block.factors.map((factors) => ({
    factors,
    queries: next(factors.length),
    keys: next(factors.length),
  }));
}

// ---- Groups -------------------------------------------------------------------------------------

// stage.rules[kind] has [size, interval, lead] of rows and of columns.

/** Positions of an axis in the group of one of them. */
const membersOf = (position, groups) => groups.find((group) => group.includes(position));

/** Position of a neighbour group, whose members are not next to this group's. */
function beside(position, length, [size, interval]) {
  const step = interval > 1 ? Math.floor(interval / 2) : size;
  const other = position + step < length ? position + step : position - step;
  return Math.max(other, 0);
}

// ---- Position bias: as crossformer_mm/position_bias.py ------------------------------------------

const biasTables = new Map();

/** (heads, 2 * rows - 1, 2 * columns - 1) of the biases of offsets, query - key. */
function biasTable(stage, block, rows, columns) {
  const name = [stage, block, rows, columns].join();
  if (!biasTables.has(name)) {
    if (biasTables.size > 60) biasTables.clear();
    const { heads, bias } = facts.stages[stage].blocks[block];
    const offsets = (2 * rows - 1) * (2 * columns - 1);
    let table;
    if (bias.kind === 'mlp') table = mlpTable(bias, heads, rows, columns);
    else if (bias.kind === 'tables') table = floatsOf(bias.tables[`${rows}x${columns}`]);
    else table = new Float32Array(heads * offsets);
    biasTables.set(name, table);
  }
  return biasTables.get(name);
}

function mlpTable(bias, heads, rows, columns) {
  const width = bias.width,
    values = floatsOf(bias.values);
  let at = 0;
  const next = (length) => values.subarray(at, (at += length));
  const first = [next(2 * width), next(width)];
  const layers = [width, width, heads].map((out) => ({
    out,
    gain: next(width),
    shift: next(width),
    weight: next(out * width),
    add: next(out),
  }));
  const table = new Float32Array(heads * (2 * rows - 1) * (2 * columns - 1));
  const offsets = table.length / heads,
    normed = new Float64Array(width);
  let x = new Float64Array(width),
    place = 0;
  for (let row = 1 - rows; row < rows; row++) {
    for (let column = 1 - columns; column < columns; column++, place++) {
      for (let i = 0; i < width; i++) {
        x[i] = first[0][2 * i] * row + first[0][2 * i + 1] * column + first[1][i];
      }
      layers.forEach((layer, number) => {
        let mean = 0,
          variance = 0;
        for (let i = 0; i < width; i++) mean += x[i] / width;
        for (let i = 0; i < width; i++) variance += (x[i] - mean) ** 2 / width;
        const scale = 1 / Math.sqrt(variance + bias.epsilon);
        for (let i = 0; i < width; i++) {
          normed[i] = Math.max(0, (x[i] - mean) * scale * layer.gain[i] + layer.shift[i]);
        }
        const out = new Float64Array(layer.out);
        for (let o = 0; o < layer.out; o++) {
          let sum = layer.add[o];
          for (let i = 0; i < width; i++) sum += layer.weight[o * width + i] * normed[i];
          out[o] = sum + (bias.residual && number < 2 ? x[o] : 0);
        }
        x = out;
      });
      for (let h = 0; h < heads; h++) table[h * offsets + place] = x[h];
      x = new Float64Array(width);
    }
  }
  return table;
}

function meanOf(arrays) {
  const mean = new Float64Array(arrays[0].length);
  for (const array of arrays) for (let i = 0; i < mean.length; i++) mean[i] += array[i];
  return mean.map((value) => value / arrays.length);
}

// ---- Attention ----------------------------------------------------------------------------------

/** Attention weights of a query, head by head, over its group, row by row. */
function attend(heads, stage, kind, table, row, column) {
  const [rows, columns] = [row, column].map((at, i) => membersOf(at, stage.groups[kind][i]));
  const [high, wide] = stage.rules[kind].map(([size]) => size),
    count = stage.height * stage.width;
  const offsets = (2 * high - 1) * (2 * wide - 1),
    query = row * stage.width + column;
  const rowInGroup = rows.indexOf(row),
    columnInGroup = columns.indexOf(column);
  const weights = heads.map(({ factors, queries, keys }, h) => {
    const logits = new Float64Array(rows.length * columns.length);
    let place = 0;
    for (let r = 0; r < rows.length; r++) {
      const line = high - 1 + rowInGroup - r;
      for (let c = 0; c < columns.length; c++) {
        const across = wide - 1 + columnInGroup - c;
        logits[place++] = table[h * offsets + line * (2 * wide - 1) + across];
      }
    }
    factors.forEach((factor, axis) => {
      const part = factor * queries[axis * count + query];
      place = 0;
      for (const r of rows) {
        const line = axis * count + r * stage.width;
        for (const c of columns) logits[place++] += part * keys[line + c];
      }
    });
    const largest = logits.reduce((a, b) => Math.max(a, b));
    let sum = 0;
    for (let i = 0; i < logits.length; i++) sum += logits[i] = Math.exp(logits[i] - largest);
    return logits.map((value) => value / sum);
  });
  return { rows, columns, weights, mean: meanOf(weights) };
}
