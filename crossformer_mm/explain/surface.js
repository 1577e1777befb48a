// The position bias as a surface that turns.

let projected = []; // points of the surface: offset, bias from 0 to 1, and x, y on the canvas

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
  /** x, y on the canvas of an offset and a bias from 0 to 1. */
  const project = (row, column, level) => {
    const x = column / reach,
      y = row / reach,
      depth = x * sin + y * cos;
    return [
      wide / 2 + unit * (x * cos - y * sin),
      tall / 2 + unit * (depth * flat - (level - 0.5) * 1.1 * up),
    ];
  };
  context.clearRect(0, 0, wide, tall);
  drawFloor(context, project, reach);

  projected = Array.from(values, (value, i) => {
    const [row, column] = [Math.floor(i / side) - reach, (i % side) - reach],
      height = (value - bottom) / span;
    return { row, column, height, at: project(row, column, height) };
  });
  const pointOf = (row, column) => projected[(row + reach) * side + column + reach];
  // From far to near, so that near parts cover far ones.
  const rows = Array.from({ length: side - 1 }, (_, i) => i),
    columns = rows.slice();
  if (cos < 0) rows.reverse();
  if (sin < 0) columns.reverse();
  context.lineWidth = 0.6;
  context.lineJoin = 'round';
  for (const r of rows) {
    for (const c of columns) {
      const first = r * side + c;
      const corners = [first, first + 1, first + side + 1, first + side].map((i) => projected[i]);
      const colour = viridis(corners.reduce((sum, corner) => sum + corner.height / 4, 0));
      context.fillStyle = css(colour);
      context.strokeStyle = side > 40 ? css(colour) : css(colour.map((v) => v * 0.72));
      outline(
        context,
        corners.map((corner) => corner.at),
      );
      context.fill();
      context.stroke();
    }
  }
  drawConfigured(context, pointOf, reach);
  drawAxes(context, project, reach);
  const [row, column] = state.offset,
    [x, y] = pointOf(row, column).at;
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

/** Begin a closed path through points. */
function outline(context, points) {
  context.beginPath();
  for (const point of points) context.lineTo(...point);
  context.closePath();
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
  outline(context, corners);
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
    const along = part * reach * 0.85;
    context.fillText(text(say('columns', '列')), ...project(near[0] * far, along, 0));
    context.fillText(text(say('rows', '行')), ...project(along, near[1] * far, 0));
  }
}

/** Outline the offsets of groups as large as the config says. */
function drawConfigured(context, pointOf, reach) {
  const edge = stageFacts().groupSize - 1;
  if (edge >= reach || !edge) return;
  const line = [];
  for (let i = -edge; i < edge; i++) line.push([-edge, i]);
  for (let i = -edge; i < edge; i++) line.push([i, edge]);
  for (let i = edge; i > -edge; i--) line.push([edge, i]);
  for (let i = edge; i > -edge; i--) line.push([i, -edge]);
  outline(
    context,
    line.map((offset) => pointOf(...offset).at),
  );
  context.strokeStyle = '#ffffff';
  context.lineWidth = 1.6;
  context.stroke();
}

/** The offset whose point is nearest to a place on the canvas. */
function offsetAt(x, y) {
  const distance = ({ at }) => (at[0] - x) ** 2 + (at[1] - y) ** 2;
  const nearest = projected.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  return [nearest.row, nearest.column];
}
