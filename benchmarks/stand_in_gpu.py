"""A stand-in for the driver of a GPU: Triton compiles for it, and launches do nothing."""

from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from crossformer_mm.kernels import triton_launch


class StandInDriver:
    """Answers to what Triton asks of a driver.

    Args:
        capability (int): of the GPU, such as 90.
    """

    def __init__(self, capability: int):
        self.capability = capability
        properties = {'max_shared_mem': 227 * 1024, 'multiprocessor_count': 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # module, function, registers, spills; since Triton 3.4 threads of a program at most
            load_binary=lambda *arguments: (0, 0, 0, 0, 1024)[: 4 + hasattr(triton, 'knobs')],
        )

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.capability, 32)

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *arguments: None


def pretend(capability: int) -> None:
    """Present tensors on the CPU to Triton as tensors on a GPU of this capability."""
    driver.set_active(StandInDriver(capability))
    triton_launch.COMPILED.clear()
