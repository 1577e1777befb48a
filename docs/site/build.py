"""Build the documentation site: gather its pages in build/pages, then run MkDocs on them.

python docs/site/build.py

The pages are README.md and the other Markdown files at the top, docs/*.md, and whatever these link
to: tables of benchmarks/, and configs, each as a page. Links are written as GitHub reads them and
are changed to fit the site's folders; one that leads nowhere ends the build, as does any warning
of MkDocs.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / 'build' / 'pages'
TOP = {
    'README.md': 'index.md',
    'README_zh-CN.md': 'index.zh.md',
    'CONTRIBUTING.md': 'CONTRIBUTING.md',
    'CHANGELOG.md': 'CHANGELOG.md',
}
LINK = re.compile(r'(\]\()([^)\s]+)(\))')
# The reference, by page: title, and modules or objects of crossformer_mm.
API = {
    'backbone': (
        'Backbone',
        'backbone.CrossFormer backbone.CrossFormerStage embedding block layers',
    ),
    'attention': ('Attention', 'attention position_bias grouping kernels'),
    'checkpoint': ('Checkpoints', 'checkpoint'),
    'engine': (
        'Training and testing',
        'engine.runner.CarefulRunner engine.runner.CarefulFlexibleRunner '
        'engine.runner.RobustRunnerMixin '
        'engine.weight_checks.SafeLoadingHook engine.weight_checks.CheckWeightsHook '
        'engine.atomic_checkpoints.WholeFilesHook engine.atomic_checkpoints.WholeFileBackend '
        'engine.dataset_guard.CheckDataHook engine.randomness.SeedHook '
        'engine.randomness.CountedSampler engine.resuming.ResumeHook '
        'engine.layer_decay.LayerDecayOptimWrapperConstructor engine.sharding.ShardedStrategy',
    ),
    'hooks': ('Hooks and FLOPs', 'hooks flops classification'),
    'export': (
        'Export',
        'export.any_size export.fixed_size export.models export.operators export.onnx_file '
        'export.metadata without_torch.model',
    ),
}


def place_of(file: Path) -> Path:
    """Return the path below PAGES of a file of the repository."""
    name = file.relative_to(ROOT).as_posix()
    if name in TOP:
        return Path(TOP[name])
    if file.suffix == '.py':  # shown as a page
        return Path(name).with_suffix('.md')
    return Path(name.removeprefix('docs/'))


def gather(file: Path, done: set) -> None:
    """Copy a file, and whatever it links to."""
    if file in done:
        return
    done.add(file)
    target = PAGES / place_of(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.py':
        code = file.read_text(encoding='utf-8')
        start = '---\nsearch: {exclude: true}\n---\n'
        page = f'{start}# {file.relative_to(ROOT)}\n\n```python\n{code}```\n'
        target.write_text(page, encoding='utf-8')
        return
    if file.suffix != '.md':
        shutil.copyfile(file, target)
        return

    def fitted(link: re.Match) -> str:
        name, mark, title = link[2].partition('#')
        if '://' in name or not name:
            return link[0]
        there = (file.parent / name).resolve()
        if not there.is_file():
            sys.exit(f"error: {file.relative_to(ROOT)} links to '{name}', which does not exist.")
        gather(there, done)
        # The i18n plugin takes the reader's language by itself.
        place = str(place_of(there)).replace('.zh.md', '.md')
        path = os.path.relpath(place, place_of(file).parent)
        return f'{link[1]}{path}{mark}{title}{link[3]}'

    text = file.read_text(encoding='utf-8')
    # The site has a switch of its own.
    text = re.sub(
        r'^(English \| \[简体中文\].*|\[English\].* \| 简体中文)\n\n', '', text, flags=re.M
    )
    parts = re.split(r'(^```.*?^```$)', text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [LINK.sub(fitted, part) for part in parts[::2]]
    start = '---\nhide: [navigation]\n---\n' if target.name.startswith('index.') else ''
    target.write_text(start + ''.join(parts), encoding='utf-8')


def write_reference() -> None:
    (PAGES / 'api').mkdir()
    for name, (title, modules) in API.items():
        lines = [f'# {title}']
        for name_of_one in modules.split():
            module = re.sub(r'\.[A-Z].*', '', name_of_one)
            path = ROOT / 'crossformer_mm' / module.replace('.', '/')
            if path.with_suffix('.py').is_file() or (path / '__init__.py').is_file():
                lines += ['', f'::: crossformer_mm.{name_of_one}']
        (PAGES / 'api' / f'{name}.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    done: set = set()
    for file in [*(ROOT / name for name in TOP), *sorted((ROOT / 'docs').glob('*.md'))]:
        gather(file, done)
    shutil.copyfile(ROOT / 'docs/site/extra.css', PAGES / 'extra.css')
    write_reference()
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet']
    quiet = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}  # of what comes after MkDocs
    sys.exit(subprocess.run(command, cwd=ROOT, env=quiet).returncode)


if __name__ == '__main__':
    main()
