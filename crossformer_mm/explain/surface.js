// The position bias as a surface that turns.

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
  const factor = Math.exp(value).toFixed(2);
  $('offset').textContent =
    describeOffset(row, column) +
    say(
      `: ${signed(value, 3)}, which multiplies its weight by ${factor} (${headName()}).`,
      `：${signed(value, 3)}，权重因此变为 ${factor} 倍（${headName()}）。`,
    );
  $('size-shown').textContent = `${size} \u00d7 ${size}`;
  $('size').value = size;
}

function describeOffset(row, column) {
  if (state.language === 'zh') {
    const along = (offset, back, forth, unit) =>
      offset ? `${offset > 0 ? back : forth} ${Math.abs(offset)} ${unit}` : '';
    const where = [along(row, '上方', '下方', '行'), along(column, '左侧', '右侧', '列')];
    return row || column ? `${where.filter(Boolean).join('、')}的键` : '查询自身';
  }
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
      text(say('columns', '列')),
      ...project(near[0] * far, part * reach * 0.85, 0).slice(0, 2),
    );
    context.fillText(
      text(say('rows', '行')),
      ...project(part * reach * 0.85, near[1] * far, 0).slice(0, 2),
    );
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
