"""Backports of newer PyTorch and OpenCV; delete when the minimum version rises.

Each entry names the release that makes it unnecessary.
"""

import _compat_pickle
import codecs
import collections
import contextlib
import functools
import math
import pickle
import tarfile
import warnings
import zipfile
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List, Optional

import torch
from torch import Tensor

TORCH = tuple(map(int, torch.__version__.split('.')[:2]))


def missing_torch(needed: str) -> str:
    """Return a clause if this PyTorch is older than ``needed``, such as '2.4', or ''."""
    if TORCH >= tuple(map(int, needed.split('.'))):
        return ''
    return f'it needs PyTorch {needed} or newer, this is {torch.__version__}'


# What export needs: sides that may be 1 (backed_size_oblivious), not in 2.6; 2.7 was not tried.
EXPORT = '2.8'
# What Triton kernels need: its Triton is the first to have all that they use.
TRITON = '2.4'

# 2.3: torch.compiler.is_compiling. The compilers before know this to be true inside a graph.
is_compiling: Callable[[], bool] = (
    torch.compiler.is_compiling
    if hasattr(torch.compiler, 'is_compiling')
    else torch._utils.is_compiling
)

# 2.7: torch.compiler.is_exporting. Before, it cannot be told from compiling.
is_exporting: Callable[[], bool] = getattr(torch.compiler, 'is_exporting', is_compiling)

# 2.5: torch.OutOfMemoryError.
OutOfMemoryError: type = getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)


def is_autocast_enabled(device_type: str) -> bool:
    """2.4: ``torch.is_autocast_enabled(device_type)``; before, for 'cpu' and 'cuda' alone."""
    if TORCH >= (2, 4):
        return torch.is_autocast_enabled(device_type)
    return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else torch.is_autocast_enabled()


@functools.cache
def multiplies_bfloat16() -> bool:
    """No release yet: a public way to ask for a CPU's instructions for bfloat16.

    Without any, PyTorch's products and convolutions of bfloat16 take twice the time of float32 with
    AVX-512, and ten to twenty times with less. Before 2.6, PyTorch tells only these two apart: then
    any processor with AVX-512 is taken for one that has the instructions.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    sets = ('avx512_bf16', 'amx_tile')
    checks = [getattr(torch.cpu, f'_is_{one}_supported', None) for one in sets]
    if torch.backends.cpu.get_cpu_capability() != 'AVX512' or None in checks:
        return True
    return any([check() for check in checks if check])


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """2.3: ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``."""
    if TORCH >= (2, 3):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernel: Any = sdpa_kernel(SDPBackend.MATH)
    else:
        kernel = torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)
    with kernel:
        yield


def autocast_dtype(device_type: str) -> torch.dtype:
    """2.4: ``torch.get_autocast_dtype(device_type)``; before, for 'cpu' and 'cuda' alone."""
    if TORCH >= (2, 4):
        return torch.get_autocast_dtype(device_type)
    return (
        torch.get_autocast_cpu_dtype() if device_type == 'cpu' else torch.get_autocast_gpu_dtype()
    )


def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill a tensor as ``torch.nn.init.trunc_normal_`` of 2.1 does, with mean 0, cut at -2 and 2.

    Newer releases draw other random numbers; MMEngine draws these.
    """
    within = math.erf(2 / std / math.sqrt(2))
    with torch.no_grad():
        return tensor.uniform_(-within, within).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2, 2)


# 2.4: torch.library.custom_op --------------------------------------------------------------------

NAMESPACE = 'crossformer_mm'
# Operators are gone with the library that defines them.
_library = torch.library.Library(NAMESPACE, 'FRAGMENT')
_TYPES = {
    Tensor: 'Tensor',
    Optional[Tensor]: 'Tensor?',
    int: 'SymInt',
    List[int]: 'SymInt[]',
    float: 'float',
    bool: 'bool',
    str: 'str',
}


def define_operator(
    name: str,
    function: Callable,
    fake: Callable,
    *,
    setup_context: Optional[Callable] = None,
    backward: Optional[Callable] = None,
) -> Callable:
    """Define an operator of PyTorch from a function, ``torch.ops.crossformer_mm.NAME``.

    Tracers and compilers take it as one node and do not trace into it. Without ``backward`` asking
    for a gradient raises a RuntimeError: call it, and another for the gradient, from a
    ``torch.autograd.Function``.

    Args:
        name (str): of the operator, without namespace.
        function (Callable): takes and returns what its annotations say. It is called below
            autograd, and must not return one of its arguments or a view of one.
        fake (Callable): the same without data: takes the same arguments, with shapes alone, and
            returns empty tensors of the right shapes, types and strides.
        setup_context, backward (Callable, optional): as of
            ``torch.library.register_autograd``.

    Returns:
        Callable: the operator; takes what ``function`` takes, by position.
    """
    tags = [
        getattr(torch.Tag, tag)
        for tag in ('pt2_compliant_tag', 'needs_fixed_stride_order')
        if hasattr(torch.Tag, tag)
    ]
    # Strides matter to a function that works on addresses; tags: 2.2.
    _library.define(name + schema_of(function), **(dict(tags=tags) if tags else {}))
    _library.impl(name, function, 'CompositeExplicitAutograd')
    register_fake(name, fake)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def refuse(ctx, *gradients):
        raise RuntimeError(f'{NAMESPACE}::{name} has no autograd formula.')

    register_autograd(name, operator, backward or refuse, setup_context)
    return operator


def schema_of(function: Callable) -> str:
    """Return the schema of a function by its annotations."""
    types = dict(function.__annotations__)
    result = types.pop('return')
    parts = getattr(result, '__args__', None)
    returns = f"({', '.join(_TYPES[part] for part in parts)})" if parts else _TYPES[result]
    return f"({', '.join(f'{_TYPES[kind]} {name}' for name, kind in types.items())}) -> {returns}"


def register_fake(name: str, fake: Callable) -> None:
    """2.4: ``torch.library.register_fake``."""
    if TORCH >= (2, 4):
        torch.library.register_fake(f'{NAMESPACE}::{name}', fake, lib=_library)
    else:
        _library.impl(name, fake, 'Meta')


def register_autograd(
    name: str, operator: Callable, backward: Callable, setup_context: Optional[Callable]
) -> None:
    """2.4: ``torch.library.register_autograd``."""
    if TORCH >= (2, 4):
        torch.library.register_autograd(
            f'{NAMESPACE}::{name}', backward, setup_context=setup_context, lib=_library
        )
        return

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    function: Any = type(
        name,
        (torch.autograd.Function,),
        dict(
            forward=staticmethod(forward),
            backward=staticmethod(backward),
            setup_context=staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        ),
    )
    _library.impl(name, lambda *args: function.apply(*args), 'Autograd')


# 2.4: compilers that take operators ---------------------------------------------------------------


def compiled_since_2_4(forward: Callable) -> Callable:
    """Exclude a method from older compilers, which take minutes to fail on it, with a warning."""
    if TORCH >= (2, 4):
        return forward
    import torch._dynamo

    @functools.cache  # once
    def say() -> None:
        warnings.warn(
            f'CrossFormer is not compiled: {missing_torch("2.4")}. The rest of the model is.'
        )

    # Compilers recognise a call by its wrapper, and cannot trace into it.
    say, as_it_is = torch._dynamo.disable(say), torch._dynamo.disable(forward)

    @functools.wraps(forward)
    def run(*args, **kwargs):
        if is_compiling():
            say()
        return as_it_is(*args, **kwargs)

    return run


# 2.6: torch.serialization.safe_globals with pairs ------------------------------------------------


class ForeignObject(ValueError):
    """A file holds an object that is neither plain data nor allowed, the class or function ``name``
    with its module; nothing of it was run."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def load_plain(file, map_location, allowed: list) -> Any:
    """``torch.load(file, weights_only=True)`` that also takes what is allowed.

    Before 2.6 nothing can be allowed, or not under another name, and an archive of TorchScript
    would be run; there the file is read here, by rules at least as narrow.

    Args:
        file: open for reading, at its beginning.
        map_location: as of ``torch.load``.
        allowed (list): as of ``torch.serialization.safe_globals``.

    Raises:
        ForeignObject: the file holds anything else.
        Exception: the file is damaged or an archive of TorchScript; nothing of it was run.
    """
    if TORCH < (2, 6):
        return load_by_own_rules(file, map_location, allowed)
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            # To name the object; torch lists those of archives only.
            archive = zipfile.is_zipfile(file)
            file.seek(0)
            if not archive:
                load_by_own_rules(file, map_location, allowed)
            elif foreign := torch.serialization.get_unsafe_globals_in_checkpoint(file):
                raise ForeignObject(min(foreign)) from None
            raise


def load_by_own_rules(file, map_location, allowed: list) -> Any:
    """Read a file as :func:`load_plain` does, without ``torch.load``."""
    # What torch.load does, by its own parts: it asks the environment whether a reader may be
    # given, and another reader of archives might see other things in the same file.
    theirs, reader = torch.serialization, plain_pickle(allowed)
    if tarfile.is_tarfile(file):
        raise pickle.UnpicklingError('of a release before PyTorch 0.1.10')
    file.seek(0)
    if not theirs._is_zipfile(file):
        return theirs._legacy_load(file, map_location, reader, encoding='utf-8')
    with theirs._open_zipfile_reader(file) as archive:
        if theirs._is_torchscript_zip(archive):
            raise pickle.UnpicklingError('a TorchScript archive')
        return theirs._load(archive, map_location, reader, encoding='utf-8')


# What every release since 2.6 allows by itself.
ALLOWED_SINCE = {
    '_codecs.encode': codecs.encode,
    'torch.device': torch.device,
    'builtins.set': set,
    'builtins.bytearray': bytearray,
    'collections.Counter': collections.Counter,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


def plain_pickle(allowed: list) -> SimpleNamespace:
    """Build what ``torch.load`` uses of the module ``pickle``, for plain data and tensors."""
    from torch._weights_only_unpickler import _get_allowed_globals

    named = {**_get_allowed_globals(), **ALLOWED_SINCE}
    named.update(
        entry[::-1]
        if isinstance(entry, tuple)
        else (f'{entry.__module__}.{entry.__qualname__}', entry)
        for entry in allowed
    )

    def check(value, what: str) -> None:
        if not any(value is one for one in named.values()):
            raise pickle.UnpicklingError(f'{what} {value}')

    steps: Any = pickle._Unpickler  # the one in Python, whose steps can be replaced

    class Unpickler(steps):
        def find_class(self, module: str, name: str):
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            if f'{module}.{name}' not in named:
                raise ForeignObject(f'{module}.{name}')
            return named[f'{module}.{name}']

        def reduce(self):
            check(self.stack[-2], 'call of')
            self.load_reduce()

        def new(self):
            check(self.stack[-2], 'instance of')
            self.load_newobj()

        def build(self):
            check(type(self.stack[-2]), 'state of')
            self.load_build()

        def storage(self):
            if not isinstance(self.stack[-1], tuple) or self.stack[-1][0] not in (
                'storage',
                b'storage',
            ):
                raise pickle.UnpicklingError('a module with its source')
            self.load_binpersid()

        dispatch = {
            **steps.dispatch,
            pickle.REDUCE[0]: reduce,
            pickle.NEWOBJ[0]: new,
            pickle.BUILD[0]: build,
            pickle.BINPERSID[0]: storage,
        }
        for code in 'INST OBJ NEWOBJ_EX PERSID EXT1 EXT2 EXT4'.split():
            del dispatch[getattr(pickle, code)[0]]

    def load(file, **options):
        return Unpickler(file, **options).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__='plain_pickle')
