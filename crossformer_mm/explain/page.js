'use strict';
// The page's data, which page.py writes, is in script elements:
//   facts                     JSON: the model, its stages and blocks
//   block-S-B                 base64 of zlib: rounded queries and keys of each head of a block
//   colours-S, magnitude-S    base64 of zlib: the features of a stage
// Attention weights of a query are computed when it is pointed at.

const facts = JSON.parse(document.getElementById('facts').textContent);
const $ = (id) => document.getElementById(id);
// Colour maps of Matplotlib (CC0), of which equal steps look equally large.
const INFERNO =
  '000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305c c73e4c dd513a ed6925 f8850f ' +
  'fca50a fac62d f2e661 fcffa4';
const VIRIDIS =
  '440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 ' +
  '7ad151 a5db36 d2e21b fde725';
const inferno = colourMap(INFERNO),
  viridis = colourMap(VIRIDIS);
// Of the framed position's group and of three beside it: Okabe and Ito's, which colour-blind people
// tell apart.
const GROUP_COLOURS = ['#f0e442', '#56b4e9', '#e69f00', '#009e73'];
const KINDS = {
  short: 'Short',
  interval: 'Long: interval',
  block: 'Long: block',
  shifted: 'Shifted',
};
const VIEWS = { attention: 'Attention', groups: 'Groups', features: 'Features' };

const state = {
  stage: 0,
  block: 0,
  kind: 'short',
  head: null,
  row: 0,
  column: 0,
  held: false, // whether the framed position stays where it is
  probe: null, // [row, column] that is pointed at while it does
  view: 'attention',
  feature: 'colours',
  size: 7,
  yaw: -0.6,
  pitch: 0.62,
  offset: [0, 0],
};

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

const rulesOf = (stage, kind) => stage.rules[kind]; // [size, interval, lead] of rows and of columns

/** Positions of an axis in the group of one of them. */
const membersOf = (position, groups) => groups.find((group) => group.includes(position));

/** A position of another group nearby, in whose middle the members of this one are not. */
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

/** The bias of the chosen head, or the mean of all, for groups of size x size. */
function shownBias(size) {
  const table = biasTable(state.stage, state.block, size, size);
  const heads = stageFacts().blocks[state.block].heads,
    offsets = (2 * size - 1) ** 2;
  if (state.head !== null) {
    return table.subarray(state.head * offsets, (state.head + 1) * offsets);
  }
  return meanOf(
    Array.from({ length: heads }, (_, h) => table.subarray(h * offsets, (h + 1) * offsets)),
  );
}

function meanOf(arrays) {
  const mean = new Float64Array(arrays[0].length);
  for (const array of arrays) for (let i = 0; i < mean.length; i++) mean[i] += array[i];
  return mean.map((value) => value / arrays.length);
}

// ---- Attention ----------------------------------------------------------------------------------

const stageFacts = () => facts.stages[state.stage];

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

let shown = null; // the attention of the framed position

const shownWeights = () => (state.head === null ? shown.mean : shown.weights[state.head]);

function weightOf(row, column) {
  const r = shown.rows.indexOf(row),
    c = shown.columns.indexOf(column);
  return r < 0 || c < 0 ? null : shownWeights()[r * shown.columns.length + c];
}

let asked = 0;

/** Compute what the state asks for, and draw it all. */
async function update() {
  const number = ++asked,
    stage = stageFacts(),
    late = setTimeout(() => document.body.classList.add('busy'), 120);
  const heads = await loadBlock(state.stage, state.block);
  clearTimeout(late);
  if (number !== asked) return; // the state has changed
  document.body.classList.remove('busy');
  const rules = rulesOf(stage, state.kind);
  const table = biasTable(state.stage, state.block, rules[0][0], rules[1][0]);
  shown = attend(heads, stage, state.kind, table, state.row, state.column);
  drawAll();
}

/** Change the state as far as it is possible, and show it. */
function select(change) {
  const before = stageFacts(),
    old = [state.row, state.column];
  Object.assign(state, change);
  const stage = stageFacts();
  if ('stage' in change && stage !== before) {
    // the same place of the image, a block like it
    if (!('row' in change)) state.row = Math.floor(((old[0] + 0.5) * before.stride) / stage.stride);
    if (!('column' in change)) {
      state.column = Math.floor(((old[1] + 0.5) * before.stride) / stage.stride);
    }
    if (!('block' in change)) state.block = Math.min(state.block, stage.blocks.length - 1);
    state.probe = null;
  }
  state.block = Math.min(state.block, stage.blocks.length - 1);
  if (('stage' in change || 'block' in change) && !('kind' in change)) state.kind = ownKind();
  if (state.head !== null && state.head >= stage.blocks[state.block].heads) state.head = null;
  state.row = Math.max(0, Math.min(state.row, stage.height - 1));
  state.column = Math.max(0, Math.min(state.column, stage.width - 1));
  state.size = Math.max(2, Math.min(state.size, facts.largestGroup));
  state.offset = state.offset.map((o) => Math.max(1 - state.size, Math.min(o, state.size - 1)));
  return update();
}

/** The kind of groups that the chosen block itself has. */
function ownKind() {
  const stage = stageFacts();
  if (stage.blocks[state.block].kind === 'short') return 'short';
  return stage.definition in stage.rules ? stage.definition : 'short';
}

// ---- Colours, numbers ---------------------------------------------------------------------------

function colourMap(text) {
  const stops = text
    .split(' ')
    .map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const colours = Array.from({ length: 256 }, (_, level) => {
    const place = (level / 255) * (stops.length - 1),
      low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((v, i) => Math.round(v + (place - low) * (stops[low + 1][i] - v)));
  });
  return (value) => colours[Math.round(Math.max(0, Math.min(1, value || 0)) * 255)];
}

const css = ([r, g, b], alpha = 1) => `rgba(${r},${g},${b},${alpha})`;
const gradient = (map) =>
  `linear-gradient(90deg, ${[0, 0.2, 0.4, 0.6, 0.8, 1].map((v) => css(map(v))).join()})`;
const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function percent(share) {
  const value = share * 100;
  return `${
    value >= 9.95 ? value.toFixed(1) : value >= 0.0995 ? value.toFixed(2) : value.toPrecision(2)
  }\u00a0%`;
}

const signed = (value, digits) => (value < 0 ? '\u2212' : '+') + Math.abs(value).toFixed(digits);
const ordinal = (n) =>
  `${n}${n % 100 > 10 && n % 100 < 14 ? 'th' : { 1: 'st', 2: 'nd', 3: 'rd' }[n % 10] || 'th'}`;
const headName = () => (state.head === null ? 'mean of all heads' : `head ${state.head}`);

// ---- The image ----------------------------------------------------------------------------------

const photo = new Image();
let faded = null; // the image in light grey

function fade() {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [facts.width, facts.height];
  const context = canvas.getContext('2d');
  context.drawImage(photo, 0, 0);
  const pixels = context.getImageData(0, 0, facts.width, facts.height);
  for (let i = 0, d = pixels.data; i < d.length; i += 4) {
    d[i] = d[i + 1] = d[i + 2] = 130 + 0.42 * (0.3 * d[i] + 0.59 * d[i + 1] + 0.11 * d[i + 2]);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** A canvas as sharp as the screen; drawn on in pixels of the page. */
function prepared(canvas, height) {
  const box = canvas.getBoundingClientRect(),
    ratio = window.devicePixelRatio || 1;
  const wide = box.width,
    high = height || box.height;
  [canvas.width, canvas.height] = [Math.round(wide * ratio), Math.round(high * ratio)];
  const context = canvas.getContext('2d');
  context.setTransform(canvas.width / wide, 0, 0, canvas.height / high, 0, 0);
  return { context, wide, high };
}

/** A side of a position on the page. */
const cellSize = () =>
  (stageFacts().stride * $('image').getBoundingClientRect().width) / facts.width;

function drawImage() {
  const { context, wide, high } = prepared($('image')),
    cell = cellSize();
  context.imageSmoothingEnabled = true;
  context.drawImage(!shown || state.view === 'features' ? photo : faded, 0, 0, wide, high);
  if (!shown) return; // the photo, until a block is unpacked
  if (state.view === 'features') drawFeatureOver(context, cell);
  else if (state.view === 'groups') drawGroups(context, cell, wide, high);
  else drawAttention(context, cell);
  frame(context, state.row, state.column, cell, '#ffffff');
  if (state.held && state.probe) frame(context, ...state.probe, cell, '#7df9ff');
}

/** Members are small and apart in early stages: then they are drawn larger, as discs. */
const asDiscs = (cell, apart) => apart > 1 && cell < 8;

function drawMember(context, row, column, cell, apart) {
  // Large ones leave the image visible between them.
  const inset = cell < 12 ? 0 : 0.14 * cell,
    side = inset ? cell - 2 * inset : cell + 0.3;
  context.beginPath();
  if (!asDiscs(cell, apart)) context.rect(column * cell + inset, row * cell + inset, side, side);
  else
    context.arc(
      (column + 0.5) * cell,
      (row + 0.5) * cell,
      Math.max(apart * 0.45 * cell, 1.2),
      0,
      7,
    );
  context.fill();
}

function drawAttention(context, cell) {
  const weights = shownWeights(),
    largest = weights.reduce((a, b) => Math.max(a, b));
  const apart = Math.min(...rulesOf(stageFacts(), state.kind).map((rule) => rule[1]));
  let place = 0;
  for (const row of shown.rows) {
    for (const column of shown.columns) {
      const value = weights[place++] / largest;
      context.fillStyle = css(inferno(value));
      drawMember(context, row, column, cell, apart);
    }
  }
}

function drawGroups(context, cell, wide, high) {
  const stage = stageFacts(),
    rules = rulesOf(stage, state.kind);
  const apart = Math.min(...rules.map((rule) => rule[1]));
  const groups = stage.groups[state.kind];
  const other = [
    beside(state.row, stage.height, rules[0]),
    beside(state.column, stage.width, rules[1]),
  ];
  const four = [[state.row, state.column], [state.row, other[1]], [other[0], state.column], other];
  four
    .map((place, i) => [place, GROUP_COLOURS[i]])
    .reverse()
    .forEach(([[row, column], colour]) => {
      context.fillStyle = colour;
      context.globalAlpha = 0.8;
      for (const r of membersOf(row, groups[0])) {
        for (const c of membersOf(column, groups[1])) {
          drawMember(context, r, c, cell, apart / 2);
        }
      }
    });
  context.globalAlpha = 1;
  context.strokeStyle = 'rgba(255,255,255,0.55)';
  context.lineWidth = 1;
  context.beginPath();
  const [[size, interval, lead], [size2, interval2, lead2]] = rules;
  for (let r = size * interval - lead; r < stage.height; r += size * interval) {
    context.moveTo(0, r * cell);
    context.lineTo(wide, r * cell);
  }
  for (let c = size2 * interval2 - lead2; c < stage.width; c += size2 * interval2) {
    context.moveTo(c * cell, 0);
    context.lineTo(c * cell, high);
  }
  context.stroke();
}

function drawFeatureOver(context, cell) {
  const map = features[state.stage] && features[state.stage][state.feature];
  if (!map) return;
  context.imageSmoothingEnabled = false;
  context.drawImage(map, 0, 0, map.width * cell, map.height * cell);
}

/** Outline a position, so that it is seen however small it is. */
function frame(context, row, column, cell, colour) {
  const side = Math.max(cell, 9),
    x = (column + 0.5) * cell - side / 2;
  const y = (row + 0.5) * cell - side / 2;
  for (const [line, style] of [
    [4, '#000000'],
    [2, colour],
  ]) {
    context.lineWidth = line;
    context.strokeStyle = style;
    context.strokeRect(x, y, side, side);
  }
}

// ---- What stands around the image ---------------------------------------------------------------

function describeGroups() {
  const stage = stageFacts(),
    rules = rulesOf(stage, state.kind);
  const sides = [Math.min(rules[0][0], stage.height), Math.min(rules[1][0], stage.width)];
  const interval = rules[0][1],
    apart = interval > 1 ? `, every ${ordinal(interval)}` : '';
  return `groups of up to ${sides[0]} \u00d7 ${sides[1]} positions${apart}`;
}

function drawTexts() {
  const stage = stageFacts(),
    own = ownKind(),
    weights = shownWeights();
  const note = $('note');
  note.textContent = '';
  const place = document.createElement('b');
  place.textContent =
    `${stage.height} \u00d7 ${stage.width} positions, ` +
    `${stage.stride} \u00d7 ${stage.stride} pixels each; ${describeGroups()}. `;
  note.append(place);
  const same = JSON.stringify(stage.rules[own]) === JSON.stringify(stage.rules[state.kind]);
  if (stage.small) note.append('The map is small: every block attends at short distance.');
  else if (state.kind === own)
    note.append('These are the groups that this block has in the model.');
  else if (same) note.append('On this map these are the groups that this block has in the model.');
  else {
    note.append(
      `In the model this block has the groups of \u201c${KINDS[own]}\u201d; shown is what ` +
        'its queries, keys and bias give in these.',
    );
  }
  const largest = weights.reduce((a, b) => Math.max(a, b)),
    at = weights.indexOf(largest);
  const most = [
    shown.rows[Math.floor(at / shown.columns.length)],
    shown.columns[at % shown.columns.length],
  ];
  $('readout').textContent =
    `Row ${state.row}, column ${state.column}${state.held ? ' (held)' : ''} ` +
    `attends to ${weights.length} positions (${headName()}); largest weight: row ${most[0]}, ` +
    `column ${most[1]}, ${percent(largest)}; uniform weights would be ${percent(1 / weights.length)}.`;
  drawProbe();
  drawLegend(largest);
  drawMost(weights);
}

function drawProbe() {
  let text = '';
  if (state.held && state.probe) {
    const [row, column] = state.probe,
      weight = weightOf(row, column);
    text =
      `Row ${row}, column ${column} ` +
      (weight === null ? 'is not in its group: no weight.' : `has the weight ${percent(weight)}.`);
  } else if (state.held) text = 'Held. Point at a key to read its attention weight.';
  $('probe').textContent = text;
}

function drawLegend(largest) {
  const groups = state.view === 'groups',
    stage = stageFacts();
  const bar = $('legend-bar');
  bar.hidden = groups;
  bar.style.display = groups ? 'none' : '';
  if (state.view === 'attention') {
    bar.style.background = gradient(inferno);
    $('legend-low').textContent = '0\u00a0%';
    $('legend-high').textContent = percent(largest);
    $('legend-unit').textContent =
      'attention weight' +
      (asDiscs(cellSize(), rulesOf(stage, state.kind)[0][1])
        ? ' (positions are drawn larger)'
        : '') +
      '; light grey: not in the group';
  } else if (groups) {
    const rules = rulesOf(stage, state.kind);
    const [{ length: down }, { length: across }] = stage.groups[state.kind],
      count = down * across;
    $('legend-low').textContent = '';
    $('legend-high').replaceChildren(
      ...GROUP_COLOURS.slice(0, 2).flatMap((colour, i) => [
        swatch(colour),
        i ? 'and others: groups next to it' : 'the group of the query',
      ]),
    );
    const cut = [stage.height, stage.width].some((side, i) => rules[i][0] * rules[i][1] < side);
    $('legend-unit').textContent =
      `${count} group${count > 1 ? 's' : ''} in all` + (cut ? '; no group crosses a line' : '');
  } else if (state.feature === 'magnitude') {
    bar.style.background = gradient(viridis);
    [$('legend-low').textContent, $('legend-high').textContent] = stage.magnitude.map((value) =>
      value.toPrecision(3),
    );
    $('legend-unit').textContent =
      'root mean square of the channels; here ' +
      magnitudeAt(state.row, state.column).toPrecision(3);
  } else {
    bar.style.display = 'none';
    $('legend-low').textContent = $('legend-high').textContent = '';
    $('legend-unit').textContent =
      `first three principal components of ${stage.channels} channels as RGB`;
  }
}

function swatch(colour) {
  const dot = document.createElement('span');
  dot.className = 'swatch';
  dot.style.background = colour;
  return dot;
}

function drawMost(weights) {
  const order = Array.from(weights.keys())
    .sort((a, b) => weights[b] - weights[a])
    .slice(0, 5);
  $('most').replaceChildren(
    ...order.map((i) => {
      const row = shown.rows[Math.floor(i / shown.columns.length)];
      const column = shown.columns[i % shown.columns.length];
      const away = [row - state.row, column - state.column];
      const line = document.createElement('tr'),
        bar = document.createElement('i');
      bar.style.width = `${(weights[i] / weights[order[0]]) * 100}%`;
      const texts = [
        `${row}, ${column}`,
        away[0] || away[1] ? away.map((a) => signed(a, 0)).join(', ') : 'itself',
        percent(weights[i]),
      ];
      for (const text of [...texts, bar]) {
        const data = document.createElement('td');
        data.append(text);
        line.append(data);
      }
      return line;
    }),
  );
}

function drawHeads() {
  const { heads } = stageFacts().blocks[state.block],
    box = $('heads');
  if (box.children.length !== heads + 1) {
    box.replaceChildren(
      ...Array.from({ length: heads + 1 }, (_, i) => {
        const button = document.createElement('button');
        button.type = 'button';
        button.append(document.createElement('canvas'), document.createElement('span'));
        button.addEventListener('click', () => select({ head: i ? i - 1 : null }));
        return button;
      }),
    );
  }
  const maps = [shown.mean, ...shown.weights],
    maxima = maps.map((weights) => weights.reduce((a, b) => Math.max(a, b))),
    scale = Math.max(...maxima);
  Array.from(box.children).forEach((button, i) => {
    const [canvas, label] = button.children,
      largest = maxima[i];
    paint(canvas, shown.columns.length, shown.rows.length, (place) =>
      inferno(maps[i][place] / scale),
    );
    const name = i ? `${i - 1}` : 'mean';
    label.textContent = `${name}\n${percent(largest)}`;
    button.setAttribute(
      'aria-label',
      `${i ? `Head ${name}` : 'Mean of all heads'}, at most ` + percent(largest),
    );
    button.setAttribute('aria-pressed', String((i ? i - 1 : null) === state.head));
  });
}

/** One pixel for each value. */
function paint(canvas, width, height, colour) {
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext('2d'),
    pixels = context.createImageData(width, height);
  const data = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < width * height; i++) {
    const [red, green, blue] = colour(i);
    data[i] = 0xff000000 | (blue << 16) | (green << 8) | red;
  }
  context.putImageData(pixels, 0, 0);
}

// ---- The position bias as a surface -------------------------------------------------------------

let projected = null; // x, y of each point of the surface on its canvas

function drawSurface() {
  const size = state.size,
    side = 2 * size - 1,
    values = shownBias(size),
    reach = size - 1;
  let low = Infinity,
    high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  // A difference of 0.01 changes a weight by a hundredth: less is shown as none.
  const span = Math.max(high - low, 0.01),
    bottom = (low + high - span) / 2;
  const { context, wide, high: tall } = prepared($('surface'));
  const cos = Math.cos(state.yaw),
    sin = Math.sin(state.yaw);
  const up = Math.cos(state.pitch),
    flat = Math.sin(state.pitch);
  const across = 2 * (Math.abs(cos) + Math.abs(sin)); // of the floor, in its depth
  const unit = Math.min(wide / (across + 0.6), tall / (across * flat + 1.1 * up + 0.5));
  /** Row and column offset, and the bias from 0 to 1, on the canvas; the third says how near. */
  const project = (row, column, level) => {
    const x = column / reach,
      y = row / reach,
      depth = x * sin + y * cos;
    return [
      wide / 2 + unit * (x * cos - y * sin),
      tall / 2 + unit * (depth * flat - (level - 0.5) * 1.1 * up),
      depth,
    ];
  };
  const level = (row, column) => (values[(row + reach) * side + column + reach] - bottom) / span;
  context.clearRect(0, 0, wide, tall);
  drawFloor(context, project, reach);

  projected = { points: new Float32Array(2 * side * side), size };
  for (let row = -reach, i = 0; row <= reach; row++) {
    for (let column = -reach; column <= reach; column++, i += 2) {
      const [x, y] = project(row, column, level(row, column));
      projected.points[i] = x;
      projected.points[i + 1] = y;
    }
  }
  // From far to near, so that near parts cover far ones.
  const rows = Array.from({ length: side - 1 }, (_, i) => i),
    columns = rows.slice();
  if (cos < 0) rows.reverse();
  if (sin < 0) columns.reverse();
  const point = (r, c) => [
    projected.points[2 * (r * side + c)],
    projected.points[2 * (r * side + c) + 1],
  ];
  context.lineWidth = 0.6;
  context.lineJoin = 'round';
  for (const r of rows) {
    for (const c of columns) {
      const mean =
        (level(r - reach, c - reach) +
          level(r + 1 - reach, c - reach) +
          level(r - reach, c + 1 - reach) +
          level(r + 1 - reach, c + 1 - reach)) /
        4;
      const colour = viridis(mean);
      context.fillStyle = css(colour);
      context.strokeStyle = side > 40 ? css(colour) : css(colour.map((v) => v * 0.72));
      context.beginPath();
      context.moveTo(...point(r, c));
      context.lineTo(...point(r, c + 1));
      context.lineTo(...point(r + 1, c + 1));
      context.lineTo(...point(r + 1, c));
      context.closePath();
      context.fill();
      context.stroke();
    }
  }
  drawConfigured(context, project, level, size);
  drawAxes(context, project, reach);
  const [row, column] = state.offset,
    [x, y] = project(row, column, level(row, column));
  context.beginPath();
  context.arc(x, y, 5, 0, 7);
  context.fillStyle = '#ffffff';
  context.strokeStyle = '#000000';
  context.lineWidth = 2;
  context.fill();
  context.stroke();

  $('bias-low').textContent = signed(bottom, 2);
  $('bias-high').textContent = signed(bottom + span, 2);
  const value = values[(row + reach) * side + column + reach];
  $('offset').textContent =
    `${describeOffset(row, column)}: ${signed(value, 3)}, which multiplies ` +
    `its weight by ${Math.exp(value).toFixed(2)} (${headName()}).`;
  $('size-shown').textContent = `${size} \u00d7 ${size}`;
  $('size').value = size;
}

function describeOffset(row, column) {
  const count = (offset, unit) => `${Math.abs(offset)} ${unit}${Math.abs(offset) > 1 ? 's' : ''}`;
  const parts = [];
  if (row) parts.push(`${count(row, 'row')} ${row > 0 ? 'above' : 'below'}`);
  if (column) parts.push(`${count(column, 'column')} ${column > 0 ? 'left' : 'right'}`);
  return parts.length ? `A key ${parts.join(' and ')}` : 'A position itself';
}

/** The square of offsets below the surface. */
function drawFloor(context, project, reach) {
  const corners = [
    [-1, -1],
    [-1, 1],
    [1, 1],
    [1, -1],
  ].map(([r, c]) => project(r * reach, c * reach, 0));
  context.strokeStyle = themed('--soft');
  context.lineWidth = 1;
  context.beginPath();
  corners.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
  context.stroke();
}

/** The two axes, at the near sides of the floor; numbers at their ends. */
function drawAxes(context, project, reach) {
  context.fillStyle = themed('--soft');
  context.font = '12px system-ui, sans-serif';
  context.textAlign = 'center';
  context.textBaseline = 'middle';
  const near = [Math.cos(state.yaw) < 0 ? -1 : 1, Math.sin(state.yaw) < 0 ? -1 : 1];
  const far = reach * 1.17;
  for (const part of [-1, 0, 1]) {
    const text = (name) => (part ? signed(part * reach, 0) : name);
    context.fillText(
      text('columns'),
      ...project(near[0] * far, part * reach * 0.85, 0).slice(0, 2),
    );
    context.fillText(text('rows'), ...project(part * reach * 0.85, near[1] * far, 0).slice(0, 2));
  }
}

/** Outline the offsets of groups as large as the config says. */
function drawConfigured(context, project, level, size) {
  const edge = stageFacts().groupSize - 1;
  if (edge >= size - 1 || !edge) return;
  const line = [];
  for (let i = -edge; i < edge; i++) line.push([-edge, i]);
  for (let i = -edge; i < edge; i++) line.push([i, edge]);
  for (let i = edge; i > -edge; i--) line.push([edge, i]);
  for (let i = edge; i > -edge; i--) line.push([i, -edge]);
  context.beginPath();
  line.forEach(([row, column], i) => {
    const [x, y] = project(row, column, level(row, column));
    if (i) context.lineTo(x, y);
    else context.moveTo(x, y);
  });
  context.closePath();
  context.strokeStyle = '#ffffff';
  context.lineWidth = 1.6;
  context.stroke();
}

/** The offset whose point is nearest to a place on the canvas. */
function offsetAt(x, y) {
  const { points, size } = projected;
  let best = 0,
    nearest = Infinity;
  for (let i = 0; i < points.length; i += 2) {
    const distance = (points[i] - x) ** 2 + (points[i + 1] - y) ** 2;
    if (distance < nearest) [nearest, best] = [distance, i / 2];
  }
  return [Math.floor(best / (2 * size - 1)) - size + 1, (best % (2 * size - 1)) - size + 1];
}

// ---- Features -----------------------------------------------------------------------------------

const features = []; // of each stage {colours, magnitude}: canvases, and `levels`

async function loadFeatures() {
  await Promise.all(
    facts.stages.map(async (stage, i) => {
      const [rgb, levels] = await Promise.all([inflate(`colours-${i}`), inflate(`magnitude-${i}`)]);
      features[i] = { levels };
      for (const kind of ['colours', 'magnitude']) {
        const canvas = (features[i][kind] = document.createElement('canvas'));
        paint(
          canvas,
          stage.width,
          stage.height,
          kind === 'colours'
            ? (place) => rgb.subarray(3 * place, 3 * place + 3)
            : (place) => viridis(levels[place] / 255),
        );
      }
    }),
  );
  drawFeatures();
}

function magnitudeAt(row, column) {
  const stage = stageFacts(),
    [low, high] = stage.magnitude;
  return low + (features[state.stage].levels[row * stage.width + column] / 255) * (high - low);
}

function drawFeatures() {
  if (features.filter(Boolean).length < facts.stages.length) return;
  if (changed('features', state.feature)) showFeatures();
  Array.from($('features').querySelectorAll('button')).forEach((button, i) =>
    button.setAttribute('aria-pressed', String(state.view === 'features' && state.stage === i)),
  );
}

function showFeatures() {
  $('features-says').textContent =
    state.feature === 'colours'
      ? 'Output of each stage: the first three principal components as RGB. Similar colours are ' +
        'similar features.'
      : 'Output of each stage: the root mean square of its channels.';
  $('features').replaceChildren(
    ...facts.stages.map((stage, i) => {
      const figure = document.createElement('figure'),
        button = document.createElement('button');
      button.type = 'button';
      button.append(features[i][state.feature]);
      button.setAttribute('aria-label', `Features of stage ${i + 1} over the image`);
      button.addEventListener('click', () => select({ stage: i, view: 'features' }));
      const caption = document.createElement('figcaption');
      caption.textContent =
        `Stage ${i + 1}: ${stage.channels} ch.` +
        (state.feature === 'magnitude'
          ? ` ${stage.magnitude.map((value) => value.toPrecision(2)).join(' to ')}`
          : '');
      figure.append(button, caption);
      return figure;
    }),
  );
}

// ---- Controls -----------------------------------------------------------------------------------

function choice(id, entries, choose) {
  $(id)
    .querySelector('.choice')
    .replaceChildren(
      ...entries.map(([value, name]) => {
        const label = document.createElement('label'),
          input = document.createElement('input');
        const text = document.createElement('span');
        [input.type, input.name, input.value, text.textContent] = ['radio', id, value, name];
        input.addEventListener('change', () => choose(value));
        label.append(input, text);
        return label;
      }),
    );
}

function check(id, value) {
  for (const input of $(id).querySelectorAll('input'))
    input.checked = input.value === String(value);
}

function drawControls() {
  const stage = stageFacts();
  check('stages', state.stage);
  check('views', state.view);
  check('feature-kinds', state.feature);
  check('kinds', state.kind);
  if (changed('blocks', state.stage)) {
    $('block').replaceChildren(
      ...stage.blocks.map(
        (block, i) =>
          new Option(`${i + 1}: ${block.kind === 'short' || stage.small ? 'short' : 'long'}`, i),
      ),
    );
  }
  $('block').value = state.block;
  $('image').classList.toggle('held', state.held);
  const groups = stage.groupSize;
  $('bias-says').textContent =
    `Added to the logit of a query and a key, by their offset (block ${state.block + 1} of ` +
    `stage ${state.stage + 1}, ${headName()})` +
    (stage.blocks[state.block].bias.kind === 'none'
      ? ': 0, this model has no position bias.'
      : state.size > groups
        ? `. White line: offsets in groups of ${groups} \u00d7 ${groups}, as configured.`
        : '.');
}

const before = new Map();

/** Whether values are others than the last time under this name. */
function changed(name, ...values) {
  const now = JSON.stringify(values),
    same = before.get(name) === now;
  before.set(name, now);
  return !same;
}

function drawAll() {
  const { stage, block, head, size, offset } = state;
  drawControls();
  drawTexts();
  drawImage();
  drawHeads();
  if (changed('surface', stage, block, head, size, offset)) drawSurface();
  drawFeatures();
}

const waiting = new Map();

/** Do something once before the next frame: of what has the same name, the last. */
function later(name, action) {
  if (!waiting.size) {
    requestAnimationFrame(() => {
      const actions = Array.from(waiting.values());
      waiting.clear();
      for (const each of actions) each();
    });
  }
  waiting.set(name, action);
}

/** Row and column of what an event points at. */
function pointedAt(event) {
  const box = $('image').getBoundingClientRect(),
    stage = stageFacts();
  const along = (at, start, length, pixels, count) =>
    Math.max(0, Math.min(count - 1, Math.floor((((at - start) / length) * pixels) / stage.stride)));
  return [
    along(event.clientY, box.top, box.height, facts.height, stage.height),
    along(event.clientX, box.left, box.width, facts.width, stage.width),
  ];
}

function listenToImage() {
  const canvas = $('image');
  let pointed = null;
  canvas.addEventListener('pointermove', (event) => {
    pointed = pointedAt(event);
    later('point', () => {
      const [row, column] = pointed;
      if (state.held && event.pointerType === 'mouse') {
        state.probe = [row, column];
        drawProbe();
        drawImage();
      } else if (row !== state.row || column !== state.column) select({ row, column });
    });
  });
  canvas.addEventListener('pointerleave', () => {
    state.probe = null;
    if (shown) drawProbe();
  });
  canvas.addEventListener('pointerdown', (event) => {
    const [row, column] = pointedAt(event);
    if (event.pointerType !== 'mouse') select({ row, column, held: false, probe: null });
    else if (state.held) select({ row, column, held: false, probe: null });
    else select({ row, column, held: true });
  });
  canvas.addEventListener('keydown', (event) => {
    const stage = stageFacts(),
      rules = rulesOf(stage, state.kind);
    const step = !event.shiftKey ? [1, 1] : rules.map((rule) => (rule[1] > 1 ? rule[1] : 5));
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
      event.key
    ];
    if (move) {
      select({ row: state.row + move[0] * step[0], column: state.column + move[1] * step[1] });
    } else if (event.key === 'Home') {
      select({ row: Math.floor(stage.height / 2), column: Math.floor(stage.width / 2) });
    } else if (event.key === 'Enter' || event.key === ' ') {
      select({ held: !state.held, probe: null });
    } else if (event.key >= '1' && event.key <= String(facts.stages.length)) {
      select({ stage: Number(event.key) - 1 });
    } else return;
    event.preventDefault();
  });
}

function listenToSurface() {
  const canvas = $('surface');
  let from = null;
  const turn = (yaw, pitch) => {
    state.yaw = (state.yaw + yaw) % (2 * Math.PI);
    state.pitch = Math.max(0.1, Math.min(Math.PI / 2, state.pitch + pitch));
    later('surface', drawSurface);
  };
  canvas.addEventListener('pointerdown', (event) => {
    from = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (from) {
      turn((from[0] - event.clientX) / 110, (event.clientY - from[1]) / 140);
      from = [event.clientX, event.clientY];
    } else {
      const box = canvas.getBoundingClientRect();
      state.offset = offsetAt(event.clientX - box.left, event.clientY - box.top);
      later('surface', drawSurface);
    }
  });
  for (const end of ['pointerup', 'pointercancel'])
    canvas.addEventListener(end, () => (from = null));
  canvas.addEventListener('keydown', (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
      event.key
    ];
    if (!move) return;
    event.preventDefault();
    if (event.shiftKey) select({ offset: state.offset.map((o, i) => o + move[i]) });
    else turn(-move[1] * 0.12, move[0] * 0.1);
  });
  $('size').addEventListener('input', (event) => select({ size: Number(event.target.value) }));
  $('above').addEventListener('click', () => {
    const above = state.pitch > 1.5;
    [state.yaw, state.pitch] = above ? [-0.6, 0.62] : [0, Math.PI / 2];
    $('above').textContent = above ? 'From above' : 'From the side';
    drawSurface();
  });
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $('theme').textContent = theme === 'dark' ? 'Light' : 'Dark';
  $('theme').setAttribute('aria-label', `Use ${theme === 'dark' ? 'light' : 'dark'} colours`);
  if (shown) drawSurface();
}

function setUp() {
  const { height, width } = facts,
    stages = facts.stages;
  $('about').textContent =
    `${facts.image} (${width} \u00d7 ${height} pixels as the model gets it), ` +
    `${facts.model}, long distance by \u201c${stages[0].definition}\u201d`;
  $('caption').textContent = facts.caption || '';
  $('image').style.aspectRatio = `${width} / ${height}`;
  $('image').style.maxWidth = `calc(max(100vh - 372px, 280px) * ${width / height})`;
  $('size').max = facts.largestGroup;
  $('bias-bar').style.background = gradient(viridis);
  choice(
    'stages',
    stages.map((_, i) => [i, String(i + 1)]),
    (stage) => select({ stage }),
  );
  choice(
    'kinds',
    Object.keys(stages[0].rules).map((kind) => [kind, KINDS[kind]]),
    (kind) => select({ kind }),
  );
  choice('views', Object.entries(VIEWS), (view) => select({ view }));
  choice(
    'feature-kinds',
    [
      ['colours', 'PCA'],
      ['magnitude', 'Magnitude'],
    ],
    (feature) => select({ feature }),
  );
  $('block').addEventListener('change', () => select({ block: Number($('block').value) }));
  $('precision').textContent =
    "This page computes attention weights from the model's queries, keys and position bias. " +
    'Queries and keys are rounded to keep the page small: a weight is off by about ' +
    `${Number((facts.usual * 100).toPrecision(1))} % of its value; the largest difference found ` +
    `was ${percent(facts.worst).replace('\u00a0%', '')} percentage points.`;
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  setTheme(dark.matches ? 'dark' : 'light');
  dark.addEventListener('change', () => setTheme(dark.matches ? 'dark' : 'light'));
  $('theme').addEventListener('click', () =>
    setTheme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark'),
  );
  listenToImage();
  listenToSurface();
  new ResizeObserver(() => later('all', () => shown && (drawImage(), drawSurface()))).observe(
    document.body,
  );
}

/** What a link asks for: page.html#stage=1&block=2&view=groups; counted as the page shows it. */
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)),
    change = {};
  const take = (name, fits, value) => {
    const text = asked.get(name);
    if (text !== null && fits(text)) change[name] = value(text);
  };
  const whole = (low, high) => (text) => /^\d+$/.test(text) && +text >= low && +text <= high;
  take('stage', whole(1, facts.stages.length), (text) => text - 1);
  const stage = facts.stages[change.stage ?? state.stage];
  take('block', whole(1, stage.blocks.length), (text) => text - 1);
  take('kind', (text) => text in stage.rules, String);
  take('view', (text) => text in VIEWS, String);
  take('head', whole(0, stage.blocks[change.block ?? 0].heads - 1), Number);
  take('row', whole(0, stage.height - 1), Number);
  take('column', whole(0, stage.width - 1), Number);
  return change;
}

async function start() {
  if (!('DecompressionStream' in window)) {
    $('readout').textContent = 'This page needs a browser of 2023 or newer.';
    return;
  }
  setUp();
  photo.src = facts.jpeg;
  await photo.decode();
  faded = fade();
  drawImage();
  await new Promise(requestAnimationFrame); // the photo is seen before a block is unpacked
  // The stage with most blocks has learnt most of what is worth seeing; its first at long distance.
  const counts = facts.stages.map((stage) => stage.blocks.length);
  const stage = counts.lastIndexOf(Math.max(...counts)),
    { stride, blocks } = facts.stages[stage];
  await select({
    stage,
    block: Math.min(1, blocks.length - 1),
    head: facts.head,
    size: facts.stages[stage].groupSize,
    row: Math.floor(facts.position[1] / stride),
    column: Math.floor(facts.position[0] / stride),
  });
  await select(fromAddress());
  document.body.dataset.ready = Math.round(performance.now());
  await loadFeatures();
}

// For scripts and tests: choose, and read what is shown.
window.explain = {
  ready: start(),
  select,
  state: () => ({ ...state }),
  attention: () => ({
    rows: shown.rows,
    columns: shown.columns,
    weights: Array.from(shownWeights()),
  }),
  bias: () => Array.from(shownBias(state.size)),
};
