// The page's state, its controls and its start.

// Names in English and in Chinese.
const KINDS = {
  short: ['Short', '短距离'],
  interval: ['Long: interval', '长距离：interval'],
  block: ['Long: block', '长距离：block'],
  shifted: ['Shifted', '移位窗口'],
};
const VIEWS = {
  attention: ['Attention', '注意力'],
  groups: ['Groups', '分组'],
  features: ['Features', '特征'],
};
const FEATURES = { colours: ['PCA', 'PCA'], magnitude: ['Magnitude', '幅度'] };

const state = {
  language: 'en', // or zh
  stage: 0,
  block: 0,
  kind: 'short',
  head: null,
  row: 0,
  column: 0,
  held: false, // the query stays when the pointer moves
  probe: null, // [row, column] of the key that is pointed at then
  view: 'attention',
  feature: 'colours',
  size: 7,
  yaw: -0.6,
  pitch: 0.62,
  offset: [0, 0],
};

const stageFacts = () => facts.stages[state.stage];

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

let shown = null; // the attention weights of the query

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
  const [[rows], [columns]] = stage.rules[state.kind];
  const table = biasTable(state.stage, state.block, rows, columns);
  shown = attend(heads, stage, state.kind, table, state.row, state.column);
  drawAll();
}

/** Change the state as far as it is possible, and show it. */
function select(change) {
  const before = stageFacts();
  Object.assign(state, change);
  const stage = stageFacts();
  if ('stage' in change && stage !== before) {
    // the same place of the image, a block like it
    for (const axis of ['row', 'column'].filter((name) => !(name in change))) {
      state[axis] = Math.floor(((state[axis] + 0.5) * before.stride) / stage.stride);
    }
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

// ---- Controls -----------------------------------------------------------------------------------

function choice(id, entries, choose) {
  $(id)
    .querySelector('.choice')
    .replaceChildren(
      ...entries.map(([value, names]) => {
        const input = Object.assign(element('input'), { type: 'radio', name: id, value });
        input.addEventListener('change', () => choose(value));
        return element('label', input, element('span', say(...names)));
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
      ...stage.blocks.map((block, i) => {
        const short = block.kind === 'short' || stage.small;
        return new Option(`${i + 1}: ${short ? say('short', '短距离') : say('long', '长距离')}`, i);
      }),
    );
  }
  $('block').value = state.block;
  $('image').classList.toggle('held', state.held);
  const groups = `${stage.groupSize} \u00d7 ${stage.groupSize}`;
  $('bias-says').textContent =
    say(
      `Added to the logit of a query and a key, by their offset (block ${state.block + 1} of ` +
        `stage ${state.stage + 1}, ${headName()})`,
      `按查询与键的偏移加到 logit 上（阶段 ${state.stage + 1} 的块 ${state.block + 1}，${headName()}）`,
    ) +
    (stage.blocks[state.block].bias.kind === 'none'
      ? say(': 0, this model has no position bias.', '：恒为 0，该模型没有位置偏置。')
      : state.size > stage.groupSize
        ? say(
            `. White line: offsets in groups of ${groups}, as configured.`,
            `。白线：配置的组大小 ${groups} 内的偏移。`,
          )
        : say('.', '。'));
}

const before = new Map();

/** Tell if values differ from the last ones of this name. */
function changed(name, ...values) {
  const now = JSON.stringify(values),
    same = before.get(name) === now;
  before.set(name, now);
  return !same;
}

function drawAll() {
  const { stage, block, head, size, offset } = state;
  if (changed('language', state.language)) label();
  drawControls();
  drawTexts();
  drawImage();
  drawHeads();
  if (changed('surface', stage, block, head, size, offset)) drawSurface();
  drawFeatures();
}

const waiting = new Map();

/** Call a function before the next frame; a later call of the same name replaces it. */
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

/** Row and column that an event points at. */
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

/** Rows and columns by which an arrow key moves; undefined for other keys. */
const moveOf = (event) =>
  ({ ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] })[event.key];

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
    select({ row, column, held: event.pointerType === 'mouse' && !state.held, probe: null });
  });
  canvas.addEventListener('keydown', (event) => {
    const stage = stageFacts(),
      rules = stage.rules[state.kind],
      move = moveOf(event);
    const step = !event.shiftKey ? [1, 1] : rules.map((rule) => (rule[1] > 1 ? rule[1] : 5));
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
    const move = moveOf(event);
    if (!move) return;
    event.preventDefault();
    if (event.shiftKey) select({ offset: state.offset.map((o, i) => o + move[i]) });
    else turn(-move[1] * 0.12, move[0] * 0.1);
  });
  $('size').addEventListener('input', (event) => select({ size: Number(event.target.value) }));
  $('above').addEventListener('click', () => {
    [state.yaw, state.pitch] = state.pitch > 1.5 ? [-0.6, 0.62] : [0, Math.PI / 2];
    labelAbove();
    drawSurface();
  });
}

function labelAbove() {
  $('above').textContent =
    state.pitch > 1.5 ? say('From the side', '侧视') : say('From above', '俯视');
}

const isDark = () => document.documentElement.dataset.theme === 'dark';

function setDark(dark) {
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  labelTheme();
  if (shown) drawSurface();
}

function labelTheme() {
  $('theme').textContent = isDark() ? say('Light', '浅色') : say('Dark', '深色');
  setAriaLabel(
    $('theme'),
    isDark() ? say('Use light colours', '使用浅色') : say('Use dark colours', '使用深色'),
  );
}

/** Write the texts that only depend on the language. */
function label() {
  const { height, width, stages } = facts,
    pixels = `${width} \u00d7 ${height}`,
    caption = facts.caption || [''];
  document.documentElement.lang = state.language;
  $('language').textContent = say('中文', 'English');
  $('about').textContent = say(
    `${facts.image} (${pixels} pixels as the model gets it), ${facts.model}, ` +
      `long distance by \u201c${stages[0].definition}\u201d`,
    `${facts.image}（输入模型的尺寸：${pixels} 像素），${facts.model}，长距离注意力采用 ${stages[0].definition}`,
  );
  $('caption').textContent = say(caption[0], caption[caption.length - 1]);
  setAriaLabel(
    $('image'),
    say(
      "The image. Arrow keys move the query, with Shift by a group's interval or five.",
      '图像。方向键移动查询，加 Shift 则移动一个间隔或五个位置。',
    ),
  );
  setAriaLabel(
    $('surface'),
    say(
      'The position bias as a surface. Arrow keys turn it, with Shift they choose an offset.',
      '位置偏置的曲面。方向键旋转曲面，加 Shift 选择偏移。',
    ),
  );
  const share = Number((facts.usual * 100).toPrecision(1)),
    worst = percent(facts.worst).replace('\u00a0%', '');
  $('precision').textContent = say(
    "This page computes attention weights from the model's queries, keys and position bias. " +
      `Queries and keys are rounded to keep the page small: a weight is off by about ${share} % ` +
      `of its value; the largest difference found was ${worst} percentage points.`,
    '本页面根据模型的查询、键和位置偏置计算注意力权重。为减小文件，查询和键经过舍入：' +
      `权重的相对误差约为 ${share} %，实测最大偏差为 ${worst} 个百分点。`,
  );
  choice(
    'stages',
    stages.map((_, i) => [i, [i + 1, i + 1]]),
    (stage) => select({ stage }),
  );
  choice(
    'kinds',
    Object.keys(stages[0].rules).map((kind) => [kind, KINDS[kind]]),
    (kind) => select({ kind }),
  );
  choice('views', Object.entries(VIEWS), (view) => select({ view }));
  choice('feature-kinds', Object.entries(FEATURES), (feature) => select({ feature }));
  labelTheme();
  labelAbove();
  for (const name of ['blocks', 'features', 'surface']) before.delete(name); // they have texts, too
}

function setUp() {
  const { height, width } = facts;
  state.language = (fromAddress().language ?? navigator.language).startsWith('zh') ? 'zh' : 'en';
  changed('language', state.language);
  label();
  $('language').addEventListener('click', () => select({ language: say('zh', 'en') }));
  $('image').style.aspectRatio = `${width} / ${height}`;
  $('image').style.maxWidth = `calc(max(100vh - 372px, 280px) * ${width / height})`;
  $('size').max = facts.largestGroup;
  $('bias-bar').style.background = gradient(viridis);
  $('block').addEventListener('change', () => select({ block: Number($('block').value) }));
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  setDark(dark.matches);
  dark.addEventListener('change', () => setDark(dark.matches));
  $('theme').addEventListener('click', () => setDark(!isDark()));
  listenToImage();
  listenToSurface();
  new ResizeObserver(() => later('all', () => shown && (drawImage(), drawSurface()))).observe(
    document.body,
  );
}

/** Read the state in a link, page.html#language=zh&stage=1&block=2, counted as the page shows it. */
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)),
    change = {};
  const take = (name, fits, value) => {
    const text = asked.get(name);
    if (text !== null && fits(text)) change[name] = value(text);
  };
  take('language', (text) => ['en', 'zh'].includes(text), String);
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
    $('readout').textContent =
      'This page needs a browser of 2023 or newer. 本页面需要 2023 年或更新的浏览器。';
    return;
  }
  setUp();
  photo.src = facts.jpeg;
  await photo.decode();
  faded = fade();
  drawImage();
  await new Promise(requestAnimationFrame); // the photo is seen before a block is unpacked
  // Opens at the first long-distance block of the stage with most blocks.
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
