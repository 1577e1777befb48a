// Drawing: the image, the texts and panels around it, the features.

// Colour maps of Matplotlib (CC0), of which equal steps look equally large.
const inferno = colourMap(
  '000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305c c73e4c dd513a ed6925 f8850f ' +
    'fca50a fac62d f2e661 fcffa4',
);
const viridis = colourMap(
  '440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 ' +
    '7ad151 a5db36 d2e21b fde725',
);
// Groups of the query and of three neighbours: Okabe and Ito's colours, which colour-blind people
// tell apart.
const GROUP_COLOURS = ['#f0e442', '#56b4e9', '#e69f00', '#009e73'];

/** The text in the language of the page. */
const say = (english, chinese) => (state.language === 'zh' ? chinese : english);

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
const headName = () =>
  state.head === null
    ? say('mean of all heads', '所有头的均值')
    : say(`head ${state.head}`, `头 ${state.head}`);

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

const setAriaLabel = (shown, text) => shown.setAttribute('aria-label', text);

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
function prepared(canvas) {
  const { width: wide, height: high } = canvas.getBoundingClientRect(),
    ratio = window.devicePixelRatio;
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

/** Small members of early stages, which are apart, are drawn as larger discs. */
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
  const apart = Math.min(...stageFacts().rules[state.kind].map((rule) => rule[1]));
  let place = 0;
  for (const row of shown.rows) {
    for (const column of shown.columns) {
      context.fillStyle = css(inferno(weights[place++] / largest));
      drawMember(context, row, column, cell, apart);
    }
  }
}

function drawGroups(context, cell, wide, high) {
  const stage = stageFacts(),
    rules = stage.rules[state.kind],
    groups = stage.groups[state.kind];
  const apart = Math.min(...rules.map((rule) => rule[1]));
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

// ---- Texts and panels ---------------------------------------------------------------------------

function describeGroups() {
  const stage = stageFacts(),
    [[rows, interval], [columns]] = stage.rules[state.kind],
    apart = interval > 1 ? say(`, every ${ordinal(interval)}`, `，步长为 ${interval}`) : '',
    size = `${Math.min(rows, stage.height)} \u00d7 ${Math.min(columns, stage.width)}`;
  return say(`groups of up to ${size} positions${apart}`, `每组至多 ${size} 个位置${apart}`);
}

/** Compare the groups that are shown with those that the block has in the model. */
function describeKind() {
  const { small, rules } = stageFacts(),
    own = ownKind();
  if (small) {
    return say(
      'The map is small: every block attends at short distance.',
      '特征图较小：所有块都使用短距离注意力。',
    );
  }
  if (state.kind === own) {
    return say(
      'These are the groups that this block has in the model.',
      '这是该块在模型中的分组。',
    );
  }
  if (JSON.stringify(rules[own]) === JSON.stringify(rules[state.kind])) {
    return say(
      'On this map these are the groups that this block has in the model.',
      '在这张特征图上，这就是该块在模型中的分组。',
    );
  }
  return say(
    `In the model this block has the groups of \u201c${KINDS[own][0]}\u201d; shown is what ` +
      'its queries, keys and bias give in these.',
    `该块在模型中的分组是“${KINDS[own][1]}”；这里显示的是其查询、键和偏置在当前分组下的结果。`,
  );
}

/** Row and column of a weight of the query. */
const positionOf = (i) => [
  shown.rows[Math.floor(i / shown.columns.length)],
  shown.columns[i % shown.columns.length],
];

function drawTexts() {
  const stage = stageFacts(),
    weights = shownWeights();
  const map = `${stage.height} \u00d7 ${stage.width}`,
    pixels = `${stage.stride} \u00d7 ${stage.stride}`;
  const place = say(
    `${map} positions, ${pixels} pixels each; ${describeGroups()}. `,
    `${map} 个位置，每个 ${pixels} 像素；${describeGroups()}。`,
  );
  $('note').replaceChildren(element('b', place), describeKind());
  const largest = weights.reduce((a, b) => Math.max(a, b)),
    most = positionOf(weights.indexOf(largest));
  const even = percent(1 / weights.length);
  $('readout').textContent = say(
    `Row ${state.row}, column ${state.column}${state.held ? ' (held)' : ''} ` +
      `attends to ${weights.length} positions (${headName()}); largest weight: row ${most[0]}, ` +
      `column ${most[1]}, ${percent(largest)}; uniform weights would be ${even}.`,
    `第 ${state.row} 行第 ${state.column} 列${state.held ? '（已固定）' : ''}` +
      `关注 ${weights.length} 个位置（${headName()}）；最大权重：第 ${most[0]} 行第 ${most[1]} 列，` +
      `${percent(largest)}；若均匀分布，则各为 ${even}。`,
  );
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
      weight === null
        ? say(
            `Row ${row}, column ${column} is not in its group: no weight.`,
            `第 ${row} 行第 ${column} 列不在其分组内：没有权重。`,
          )
        : say(
            `Row ${row}, column ${column} has the weight ${percent(weight)}.`,
            `第 ${row} 行第 ${column} 列的权重为 ${percent(weight)}。`,
          );
  } else if (state.held) {
    text = say(
      'Held. Point at a key to read its attention weight.',
      '已固定。指向一个键即可读出其注意力权重。',
    );
  }
  $('probe').textContent = text;
}

function drawLegend(largest) {
  const stage = stageFacts(),
    rules = stage.rules[state.kind];
  let colours = null, // of the bar between the ends
    ends = ['', ''],
    unit = '';
  if (state.view === 'attention') {
    [colours, ends] = [inferno, ['0\u00a0%', percent(largest)]];
    const larger = asDiscs(cellSize(), rules[0][1]);
    unit = say(
      `attention weight${larger ? ' (positions are drawn larger)' : ''}; grey: not in the group`,
      `注意力权重${larger ? '（位置放大显示）' : ''}；灰色：不在分组内`,
    );
  } else if (state.view === 'groups') {
    const [{ length: down }, { length: across }] = stage.groups[state.kind],
      count = down * across;
    const own = [swatch(GROUP_COLOURS[0]), say('the group of the query', '查询所在的分组')],
      others = say('and others: groups next to it', '及其他颜色：相邻的分组');
    ends = ['', element('span', ...own, swatch(GROUP_COLOURS[1]), others)];
    const cut = [stage.height, stage.width].some((side, i) => rules[i][0] * rules[i][1] < side);
    unit = say(
      `${count} group${count > 1 ? 's' : ''} in all${cut ? '; no group crosses a line' : ''}`,
      `共 ${count} 组${cut ? '；分组不跨越白线' : ''}`,
    );
  } else if (state.feature === 'magnitude') {
    [colours, ends] = [viridis, stage.magnitude.map((value) => value.toPrecision(3))];
    unit =
      say('root mean square of the channels; here ', '各通道的均方根；当前位置：') +
      magnitudeAt(state.row, state.column).toPrecision(3);
  } else {
    unit = say(
      `first three principal components of ${stage.channels} channels as RGB`,
      `${stage.channels} 个通道的前三个主成分，显示为 RGB`,
    );
  }
  $('legend-bar').style.display = colours ? '' : 'none';
  if (colours) $('legend-bar').style.background = gradient(colours);
  $('legend-low').replaceChildren(ends[0]);
  $('legend-high').replaceChildren(ends[1]);
  $('legend-unit').textContent = unit;
}

function swatch(colour) {
  const dot = element('span');
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
      const [row, column] = positionOf(i),
        away = [row - state.row, column - state.column],
        bar = element('i');
      bar.style.width = `${(weights[i] / weights[order[0]]) * 100}%`;
      const cells = [
        `${row}, ${column}`,
        away[0] || away[1] ? away.map((a) => signed(a, 0)).join(', ') : say('itself', '自身'),
        percent(weights[i]),
        bar,
      ];
      return element('tr', ...cells.map((cell) => element('td', cell)));
    }),
  );
}

function drawHeads() {
  const { heads } = stageFacts().blocks[state.block],
    box = $('heads');
  if (box.children.length !== heads + 1) {
    box.replaceChildren(
      ...Array.from({ length: heads + 1 }, (_, i) => {
        const button = element('button', element('canvas'), element('span'));
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
    const name = i ? `${i - 1}` : say('mean', '均值');
    label.textContent = `${name}\n${percent(largest)}`;
    setAriaLabel(
      button,
      (i ? say(`Head ${name}`, `头 ${name}`) : say('Mean of all heads', '所有头的均值')) +
        say(', at most ', '，最大 ') +
        percent(largest),
    );
    button.setAttribute('aria-pressed', String((i ? i - 1 : null) === state.head));
  });
}

/** Draw one pixel for each value, and return the canvas. */
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
  return canvas;
}

// ---- Features -----------------------------------------------------------------------------------

const features = []; // of each stage {colours, magnitude}: canvases, and `levels`

async function loadFeatures() {
  await Promise.all(
    facts.stages.map(async (stage, i) => {
      const [rgb, levels] = await Promise.all([inflate(`colours-${i}`), inflate(`magnitude-${i}`)]);
      const map = (colour) => paint(element('canvas'), stage.width, stage.height, colour);
      features[i] = {
        levels,
        colours: map((place) => rgb.subarray(3 * place, 3 * place + 3)),
        magnitude: map((place) => viridis(levels[place] / 255)),
      };
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
      ? say(
          'Output of each stage: the first three principal components as RGB. Similar colours ' +
            'are similar features.',
          '各阶段的输出：前三个主成分显示为 RGB，颜色相近表示特征相似。',
        )
      : say(
          'Output of each stage: the root mean square of its channels.',
          '各阶段的输出：通道的均方根。',
        );
  $('features').replaceChildren(
    ...facts.stages.map((stage, i) => {
      const button = element('button', features[i][state.feature]);
      setAriaLabel(
        button,
        say(`Features of stage ${i + 1} over the image`, `在图像上显示阶段 ${i + 1} 的特征`),
      );
      button.addEventListener('click', () => select({ stage: i, view: 'features' }));
      const caption =
        say(`Stage ${i + 1}: ${stage.channels} ch.`, `阶段 ${i + 1}：${stage.channels} 通道`) +
        (state.feature === 'magnitude'
          ? ` ${stage.magnitude.map((value) => value.toPrecision(2)).join(say(' to ', ' 至 '))}`
          : '');
      return element('figure', button, element('figcaption', caption));
    }),
  );
}
