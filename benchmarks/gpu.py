"""Check and measure CrossFormer on a GPU in ten minutes: is it right there, and how fast?

    python benchmarks/gpu.py --out work_dirs/gpu.json

Needs PyTorch with CUDA, Triton and einops. Swin-T is MMDetection's, torchvision's or timm's.

Each section runs in a process of its own with a time limit, in this order:
  compile    fill Triton's cache, on all cores
  default    training steps of CrossFormer-S without attention_path, also with_cp, against plain
  sanitizer  compute-sanitizer, if it is installed, on a few tiny maps
  check      random maps and groups against float64, values and gradients; bits that repeat
  layers     device time of each layer's attention, by kernel, and of other ways to compute it
  models     inference and training steps of CrossFormer-S and Swin-T
  learn      training steps on the GPU against the same on the CPU
  tune       other tiles of each kernel, for crossformer_mm/kernels/triton_launch.py

What a section plans and does not reach is listed as not run. Results are written after each one.
--smoke runs everything on the CPU in Triton's interpreter, on sizes that tell nothing.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LIMITS = dict(compile=80, default=60, sanitizer=90, check=90, layers=70, models=110)  # seconds
LIMITS.update(learn=40, tune=60, tiny=40)
DEFAULT = [name for name in LIMITS if name != 'tiny']  # which `sanitizer` runs


def parse(arguments) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu.json'), help='results')
    parser.add_argument('--sections', nargs='+', choices=LIMITS, default=DEFAULT, metavar='NAME')
    parser.add_argument('--image', type=int, nargs=2, default=(800, 1216), metavar=('H', 'W'))
    parser.add_argument('--smoke', action='store_true', help='on the CPU, tiny: does it run?')
    return parser.parse_args(arguments)


OPTIONS = parse(sys.argv[1:] if __name__ == '__main__' else ['--smoke'])
SMOKE = OPTIONS.smoke
if SMOKE:
    os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is imported
    OPTIONS.image = (12, 12)
os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'  # CUDA must not be started before a fork

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]
import harness
from harness import NotRun, both_passes, device_time, peer, relative, run_all, within

try:
    import triton

    from crossformer_mm import CrossFormer, block, kernels
    from crossformer_mm.compat import TRITON, missing_torch
except ModuleNotFoundError as error:
    needs = 'benchmarks/gpu.py needs PyTorch, Triton and einops'
    sys.exit(f'error: {error.name} is not installed; {needs}')
if missing_torch(TRITON):
    sys.exit(f'error: benchmarks/gpu.py: {missing_torch(TRITON)}.')
from crossformer_mm.grouping import AxisRule, fit_rule, group_map, stage_rules
from crossformer_mm.kernels import bias, fused, plain, self_test, triton_launch
from crossformer_mm.position_bias import bias_of_pairs

DEVICE = torch.device('cpu') if SMOKE else torch.device('cuda', 0)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
MIXED = DTYPES[SMOKE]  # of automatic mixed precision
# Largest errors of an attention, relative to the largest exact value or 1.
ROUNDING = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NEAR = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}  # of losses, gradients
# Stages of CrossFormer-S: stride of the map, heads, interval.
STAGES, HEAD_DIM, GROUP = ((4, 3, 8), (8, 6, 4), (16, 12, 2), (32, 24, 1)), 32, 7
if SMOKE:
    STAGES, HEAD_DIM, GROUP = ((4, 1, 2),), 16, 3
LONG = ('stage 1 long', 'stage 3 long')  # the longest groups


def amp(dtype, device=DEVICE):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def random_inputs(shape, rows, columns, heads, dim, dtype) -> tuple:
    """qkv, table, the output's gradient, and the other arguments of an attention."""
    qkv, grad = (randn(*shape, count * heads * dim, dtype=dtype) for count in (3, 1))
    sides = (2 * fit_rule(n, rule).size - 1 for n, rule in zip(shape[1:], (rows, columns)))
    return qkv, randn(heads, *sides), grad, (rows, columns, heads, dim**-0.5)


def value_and_gradients(attention, qkv, table, grad, arguments) -> tuple:
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = attention(qkv, table, *arguments)
    return (out.detach(), *torch.autograd.grad(out, (qkv, table), grad.to(out.dtype)))


def build(**options) -> nn.Module:
    """CrossFormer-S, without stochastic depth unless named, always with the same weights."""
    torch.manual_seed(0)
    if SMOKE:
        options.update(merge_sizes=(), group_size=(GROUP,), interval=(2,), out_indices=(0,))
        options.update(arch=dict(embed_dims=16, depths=(2,), num_heads=(1,)))
    return CrossFormer(**{'drop_path_rate': 0.0, **options}).to(DEVICE).train()


def image_of(batch: int, sides=None):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, *(sides or OPTIONS.image), generator=generator).to(DEVICE)


def train(model, image, dtype, steps: int) -> list:
    """Losses of steps of AdamW towards features of 1."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-4), []
    torch.manual_seed(2)  # of stochastic depth
    for _ in range(steps):
        optimizer.zero_grad()
        with amp(dtype, image.device):
            loss = sum((feature.float() - 1).square().mean() for feature in model(image))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return losses


def fill(kind) -> dict:
    """Compile the kernels of a kind, by running their self-test."""
    fault = kind.find_fault(True)
    return dict(fault=fault, passed=not fault)


def run_compile(log) -> None:
    """Compile blocks of 64 and biases by self-tests, smaller blocks by the cases of ``check``."""
    types = list(itertools.product(DTYPES, (HEAD_DIM, 64, 16)))
    kinds = [self_test.Kind(DEVICE, *t, small) for t in types for small in (True, False)]
    kinds += [
        bias.Kind('bias_triton', DEVICE, width, width // 2, False, 1e-5)
        for width in (6, 12, 24, 48)
    ]
    tasks = {str(kind): (fill, (kind,)) for kind in kinds}
    for (dtype, dim), side in itertools.product(types, (4, 5)):
        case = (1, side, side), AxisRule(side, 1), AxisRule(side, 1), 2, dim, dtype
        tasks[f'{dtype} {dim} {side}x{side}'] = compare, case
    if SMOKE:  # one bias and one map
        tasks = dict(list(tasks.items())[len({*kinds}) - 4 :: 4][:2])
    with harness.FORK.Pool(min(len(tasks), os.cpu_count() or 1)) as pool:
        waiting = {name: pool.apply_async(*task) for name, task in tasks.items()}
        run_all({name: result.get for name, result in waiting.items()}, log)


def run_default(log) -> None:
    image = image_of(1 if SMOKE else 2)

    def steps(dtype, evaluate=False, **options) -> dict:
        self_test.PASSED.clear()  # as in a new process
        options['drop_path_rate'] = 0.2
        model, reference = build(**options), build(**{**options, 'attention_path': 'plain'})
        if evaluate:
            with torch.inference_mode(), amp(dtype):
                model(image)
        losses = train(model, image, dtype, 2)
        with mock.patch.object(block, 'SUMS_ON', ''):
            expected = train(reference, image, dtype, 2)
        grads, exact = ([p.grad for p in m.parameters()] for m in (model, reference))
        largest = float(max(grad.abs().max() for grad in exact))
        errors = relative(losses, expected, 1e-9) + relative(grads, exact, largest)
        with amp(dtype):
            paths = sorted({path for stage in model.layers for path in stage.attention_paths()})
        passed = within(errors, NEAR[dtype]) and all(path.startswith('fused') for path in paths)
        return dict(paths=paths, largest_error=harness.worst(errors), passed=passed)

    items = {'evaluated first': partial(steps, torch.bfloat16, evaluate=True)}
    items['float32, with_cp'] = partial(steps, torch.float32, with_cp=True)
    if not SMOKE:
        items['bfloat16, with_cp'] = partial(steps, torch.bfloat16, with_cp=True)
        items.update({str(dtype)[6:]: partial(steps, dtype) for dtype in DTYPES})
        items["float32, lda='block'"] = partial(steps, torch.float32, lda='block')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='CrossFormer')
        run_all(items, log)


def run_sanitizer(log) -> None:
    def sanitize(tool: str) -> dict:
        program = shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'
        if SMOKE or not Path(program).exists():
            raise NotRun('compute-sanitizer is not installed, or this is a smoke test')
        out = str(OPTIONS.out.with_suffix(f'.{tool}.json'))
        command = [program, '--tool', tool, '--target-processes', 'all', '--error-exitcode', '9']
        command += [sys.executable, __file__, '--sections', 'tiny', '--out', out]
        done = subprocess.run(command, capture_output=True, text=True)
        if 'stopped after' in done.stdout:
            raise NotRun('it takes too long')
        return dict(passed=done.returncode == 0, output=(done.stdout + done.stderr)[-2000:])

    run_all({tool: partial(sanitize, tool) for tool in ('memcheck', 'racecheck')}, log)


def compare(*case) -> dict:
    """Fused attention of :func:`random_inputs` against float64 on the same device."""
    qkv, table, grad, arguments = inputs = random_inputs(*case)
    ours, again = (value_and_gradients(fused.attend, *inputs) for _ in range(2))
    wide = qkv.double(), table.double(), grad.double(), arguments
    errors = relative(ours, value_and_gradients(plain.attend, *wide))
    same = all(torch.equal(a, b) for a, b in zip(ours, again))
    return dict(errors=errors, same=same, passed=same and within(errors, ROUNDING[qkv.dtype]))


def random_case(chance: random.Random, longest: int) -> tuple:
    """Arguments of :func:`compare`; of a cost that float64 can bear."""
    while True:
        batch, height, width = chance.randint(1, 3), *(chance.randint(1, longest) for _ in 'hw')
        lda = chance.choice(('interval', 'block', 'none'))
        rules = stage_rules(height, width, chance.randint(1, 14), chance.randint(1, 8), lda)
        rows, columns = chance.choice(rules)
        heads, dim = chance.randint(1, 4), chance.choice((16, 32, 64))
        if batch * height * width * rows.size * columns.size * heads < 3e7:
            return (batch, height, width), rows, columns, heads, dim, chance.choice(DTYPES)


def check_large_map() -> dict:
    """The last group of a map whose numbers cannot be counted in 32 bits, against a crop."""
    if SMOKE or torch.cuda.mem_get_info()[0] < 60 * 2**30:
        raise NotRun('it takes a GPU with 60 GiB of free memory')
    rule, side, start = AxisRule(7, 1), 4100, 4095  # the crop is the last group, of 5x5
    corner = (slice(None), slice(start, None), slice(start, None))
    full = [torch.zeros(1, side, side, n, device=DEVICE, dtype=torch.bfloat16) for n in (192, 64)]
    for x in full:
        x[corner] = randn(*x[corner].shape)
    (qkv, grad), table, arguments = full, randn(2, 13, 13), (rule, rule, 2, 0.2)
    ours = value_and_gradients(fused.attend, qkv, table, grad, arguments)
    crop = qkv[corner].double(), table.double(), grad[corner].double(), arguments
    ours = ours[0][corner], ours[1][corner], ours[2]
    errors = relative(ours, value_and_gradients(plain.attend, *crop))
    return dict(errors=errors, passed=within(errors, ROUNDING[torch.bfloat16]))


def random_cases(count: int, longest: int) -> dict:
    chance = random.Random(0)
    cases = (random_case(chance, longest) for _ in range(count))
    return {f'{number}: {case}': partial(compare, *case) for number, case in enumerate(cases)}


def run_check(log) -> None:
    large = {'more than 2^31 numbers': check_large_map}
    run_all({**large, **(random_cases(2, 5) if SMOKE else random_cases(200, 120))}, log)


run_tiny = partial(run_all, random_cases(12, 20))


def layers_of(batch: int = 2) -> dict:
    """Inputs of both kinds of attention in each stage, by name."""
    layers = {}
    for stage, (stride, heads, interval) in enumerate(STAGES, 1):
        sides = tuple(-(-side // stride) for side in OPTIONS.image)
        for kind, rules in zip(('short', 'long'), stage_rules(*sides, GROUP, interval, 'interval')):
            inputs = random_inputs((batch, *sides), *rules, heads, HEAD_DIM, MIXED)
            layers[f'stage {stage} {kind}'] = inputs
    return layers


def on_groups(qkv, table, grad, arguments, flex: bool) -> dict:
    """PyTorch's attention with a bias, on as many full groups, their tokens side by side."""
    rows, columns, heads, scale = arguments
    members = max(group_map(*qkv.shape[1:3], rows, columns, DEVICE), key=lambda m: m[0].numel())
    height, width = members.shape[1:]
    shape = (-(-grad.numel() // (heads * HEAD_DIM * height * width)), heads, height * width)
    q, k, v, grad = (randn(*shape, HEAD_DIM, dtype=qkv.dtype) for _ in 'qkvg')

    def with_mask(q, k, v, table):
        bias = bias_of_pairs(table, height, width)[None].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    def with_flex(q, k, v, table):
        def bias(score, group, head, query, key):
            row = query // width - key // width + height - 1
            return score + table[head, row, query % width - key % width + width - 1]

        return compiled(q, k, v, score_mod=bias, scale=scale)

    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # or the limit of recompilations would count all layers together
        compiled = flex_attention if SMOKE else torch.compile(flex_attention, dynamic=False)
    return both_passes(with_flex if flex else with_mask, (q, k, v, table), grad)


def run_layers(log) -> None:
    """In 16 bits, as with automatic mixed precision; the table in float32. FlexAttention last."""
    items, last = {}, {}
    for name, (qkv, table, grad, arguments) in layers_of().items():
        for way, attend in (('fused', fused.attend), ('plain', plain.attend)):
            run = partial(lambda attend, rest, q, t: attend(q, t, *rest), attend, arguments)
            items[f'{name} {way}'] = partial(both_passes, run, (qkv, table), grad)
        run = partial(peer(on_groups), qkv, table, grad, arguments)
        items[f'{name} sdpa'] = partial(run, False)
        if name in LONG:
            last[f'{name} flex'] = partial(run, True)
    run_all({**items, **last}, log)


def build_swin() -> nn.Module:
    """Swin-T without stochastic depth, without a head."""
    vision = dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=[7, 7])
    vision.update(patch_size=[4, 4], stochastic_depth_prob=0.0)
    timm = dict(features_only=True, strict_img_size=False, drop_path_rate=0.0)
    sources = {
        'mmdet.models.backbones.swin': lambda m: m.SwinTransformer(drop_path_rate=0.0),
        'torchvision.models.swin_transformer': lambda m: m.SwinTransformer(**vision).features,
        'timm': lambda m: m.create_model('swin_tiny_patch4_window7_224', **timm),
    }
    reasons = []
    for source, make in sources.items():
        try:
            return make(importlib.import_module(source)).to(DEVICE)
        except Exception as error:  # versions that do not fit raise all kinds
            reasons.append(f'{source}: {type(error).__name__}: {error}')
    raise NotRun('; '.join(reasons))


def infer(make, how: str) -> dict:
    model, image = make().eval(), image_of(1)
    if how == 'compiled':
        model = torch.compile(model, backend='eager' if SMOKE else 'inductor')
    with torch.inference_mode(), amp(MIXED):
        model(image)
        if how != 'graph':
            return harness.measure(lambda: model(image))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(image)
        return harness.measure(graph.replay)


def step_of(make) -> dict:
    model, image = make().train(), image_of(1 if SMOKE else 2)

    def step():
        model.zero_grad(set_to_none=True)
        with amp(MIXED):
            loss = sum(feature.float().mean() for feature in model(image))
        loss.backward()

    return harness.measure(step)


def run_models(log) -> None:
    options = {'': {}, ', plain': dict(attention_path='plain')}
    if not SMOKE:
        options.update({', with_cp': dict(with_cp=True), ", lda='block'": dict(lda='block')})
    makes = {f'CrossFormer-S{name}': partial(build, **more) for name, more in options.items()}
    makes['Swin-T'] = peer(build_swin) if not SMOKE else lambda: nn.Conv2d(3, 4, 4)
    items = {f'training, {name}': partial(step_of, make) for name, make in makes.items()}
    ways = ('eager', 'compiled') if SMOKE else ('eager', 'graph', 'compiled')
    for how, name in itertools.product(ways, ('CrossFormer-S', 'Swin-T')):
        tried = peer(infer) if name == 'Swin-T' else infer
        items[f'inference, {name}, {how}'] = partial(tried, makes[name], how)
    run_all(items, log)


def run_learn(log, steps: int = 2 if SMOKE else 30) -> None:
    """A small model from the same weights, on both devices."""
    arch = dict(arch=dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)))
    image = image_of(2, None if SMOKE else (96, 128))
    reference = build(attention_path='plain', **arch).cpu()
    expected = train(reference, image.cpu(), torch.float32, steps)

    def learn(dtype) -> dict:
        errors = relative(train(build(**arch), image, dtype, steps), expected, 1e-9)
        return dict(errors=errors, passed=within(errors, NEAR[dtype]))

    run_all({str(d)[6:]: partial(learn, d) for d in (torch.float32, torch.bfloat16)}, log)


TILES = {  # (queries, keys, warps, stages) to try next to the present ones
    'forward': [(64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3)],
    'backward_queries': [(64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 4, 2)],
    'backward_keys': [(64, 64, 4, 1), (32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)],
    'backward_pairs': [(64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 1)],
}


def run_tune(log) -> None:
    """Device time of each kernel on the long distance layers of stages 1 and 3."""
    layers = [inputs for name, inputs in layers_of().items() if name in LONG]

    def attempt(kernel: str, tile) -> dict:
        key, before = (kernel, MIXED.itemsize), dict(triton_launch.TILES)
        triton_launch.TILES[key] = triton_launch.Tile(*tile) if tile else before[key]
        try:
            runs = [partial(value_and_gradients, fused.attend, *inputs) for inputs in layers]
            times = [device_time(run, repeat=2) for run in runs]
        finally:
            triton_launch.TILES.update(before)
        took = sum(ms for found in times for name, ms in found.items() if kernel in name)
        return dict(kernel=kernel, tile=tile, ms=took)

    tiles = {name: [None, *others[: 1 if SMOKE else None]] for name, others in TILES.items()}
    tried = [(name, tile) for name in tiles for tile in tiles[name]][: 2 if SMOKE else None]
    run_all({f'{name} {tile or "now"}': partial(attempt, name, tile) for name, tile in tried}, log)


def main() -> None:
    if not SMOKE and not torch.cuda.is_available():
        sys.exit('error: no GPU is there; --smoke tries the script on the CPU')
    torch.backends.cudnn.allow_tf32 = False
    if SMOKE:
        torch.set_num_threads(1)
        native = kernels.PATHS['native']  # which would be chosen
        kernels.PATHS['native'] = native._replace(why_not=lambda call: 'this is a smoke test')
    results = dict(command=' '.join(['python', *sys.argv]), torch=torch.__version__)
    results.update(triton=triton.__version__, image=list(OPTIONS.image))
    if shutil.which('nvidia-smi'):
        query = ['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader']
        results['gpu'] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(json.dumps(results), flush=True)
    sections, lines = results.setdefault('sections', {}), OPTIONS.out.with_suffix('.jsonl')
    for name in OPTIONS.sections:
        print(f'\n== {name}', flush=True)
        sections[name] = harness.run_section(globals()[f'run_{name}'], LIMITS[name], lines)
        OPTIONS.out.write_text(json.dumps(results, indent=1) + '\n')
    print(f'\nResults: {OPTIONS.out}')
    if not harness.report(sections):
        sys.exit('error: something failed, see above')


if __name__ == '__main__':
    main()
