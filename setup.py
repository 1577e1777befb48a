"""The parts of a build that pyproject.toml cannot say: the kernel in C++ and what is put into
``crossformer_mm/.mim``."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
NO_EXTENSION = 'CROSSFORMER_MM_NO_EXTENSION'

# Attention on the CPU. Where there is no compiler the package is installed without it, and
# PyTorch does its work. It takes addresses of arrays and nothing of PyTorch or of one Python, so
# that it fits every version of both.
CSRC = 'crossformer_mm/kernels/csrc'
kernel = Extension(
    'crossformer_mm.kernels._native',
    sorted(glob(f'{CSRC}/*.cpp')),
    optional=True,
    depends=sorted(glob(f'{CSRC}/*.h')),
    define_macros=[('Py_LIMITED_API', '0x03090000')],
    py_limited_api=True,
)

# Where mmengine.hub and mim look for what is beside the package here.
MIM = 'crossformer_mm/.mim'
BESIDE = {'configs': ('**/*.py', '**/metafile.yml'), 'tools': ('*.py', '*.sh')}


class BuildKernel(build_ext):
    """Sets the flags of GCC and Clang, and compiles all sources at the same time."""

    def build_extension(self, ext) -> None:
        if self.compiler.compiler_type == 'msvc':
            raise CompileError(
                "the kernel is written in vectors of GCC's and Clang's, which this "
                'compiler does not have'
            )
        ext.extra_compile_args = ['-std=c++17', '-O3', '-g0', '-ffp-contract=fast', '-pthread']
        ext.extra_link_args = ['-pthread']
        compile_sources = self.compiler.compile
        with ThreadPoolExecutor() as pool:
            self.compiler.compile = lambda sources, **options: [
                name
                for names in pool.map(lambda one: compile_sources([one], **options), sources)
                for name in names
            ]
            super().build_extension(ext)


class BuildWithConfigs(build_py):
    """Adds configs, tools and the model index; for an editable install as links, where the system
    has links for everybody, or else as copies that the next install renews."""

    def run(self) -> None:
        super().run()
        folder = (HERE if self.editable_mode else Path(self.build_lib)) / MIM
        remove(folder)
        folder.mkdir(parents=True)
        for name in ('model-index.yml', *BESIDE):
            if self.editable_mode and link(folder / name, HERE / name):
                continue
            for path in self.files_of(name):
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(HERE / path, target)

    @staticmethod
    def files_of(name: str) -> list:
        """The files of a folder of the checkout that users get, as paths from the checkout."""
        found = {
            path.relative_to(HERE)
            for pattern in BESIDE.get(name, ())
            for path in (HERE / name).glob(pattern)
        } or {Path(name)}
        return sorted(found)

    def get_outputs(self, include_bytecode=True) -> list:
        copies = (
            []
            if self.editable_mode
            else [
                str(Path(self.build_lib) / MIM / path)
                for name in ('model-index.yml', *BESIDE)
                for path in self.files_of(name)
            ]
        )
        return super().get_outputs(include_bytecode) + copies


def remove(folder: Path) -> None:
    """A folder of links and copies, but never what a link leads to."""
    for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.is_dir():
        folder.rmdir()


def link(path: Path, target: Path) -> bool:
    try:
        os.symlink(os.path.relpath(target, path.parent), path, target.is_dir())
        return True
    except OSError:  # Windows: only for developers
        return False


extensions = [] if os.environ.get(NO_EXTENSION) else [kernel]
setup(
    ext_modules=extensions,
    cmdclass=dict(build_ext=BuildKernel, build_py=BuildWithConfigs),
    options=dict(bdist_wheel=dict(py_limited_api='cp39')) if extensions else {},
)
