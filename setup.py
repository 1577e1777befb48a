from pathlib import Path

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent
version = {}
exec((here / 'crossformer_mm' / 'version.py').read_text(), version)

# Attention on the CPU. Where there is no compiler the package is installed without it, and
# PyTorch does its work. It takes addresses of arrays and nothing of PyTorch or of one Python, so
# that it fits every version of both.
native = Extension(
    'crossformer_mm.kernels._native', ['crossformer_mm/kernels/native.cpp'], optional=True,
    depends=['crossformer_mm/kernels/native_kernel.h'],
    define_macros=[('Py_LIMITED_API', '0x03090000')], py_limited_api=True,
    extra_compile_args=['-std=c++17', '-O3', '-ffp-contract=fast', '-pthread'],
    extra_link_args=['-pthread'])

# The maintained and the last OpenMMLab releases install the same import packages,
# so that requiring one would break an environment with the other: a user names
# the family by an extra, or has one already.
setup(
    name='crossformer-mm',
    version=version['__version__'],
    description='CrossFormer and CrossFormer++ backbones for MMDetection and MMSegmentation',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['crossformer_mm', 'crossformer_mm.*']),
    # Where mmengine.hub and mim look for what is beside the package here: .mim holds links.
    package_data={'crossformer_mm': ['.mim/model-index.yml', '.mim/configs/**/*.py',
                                     '.mim/configs/*/metafile.yml', '.mim/tools/*.py',
                                     '.mim/tools/*.sh']},
    ext_modules=[native],
    options=dict(bdist_wheel=dict(py_limited_api='cp310')),
    exclude_package_data={'crossformer_mm': ['.mim/tools/write_model_zoo.py']},
    python_requires='>=3.10',
    install_requires=['torch>=2.6', 'einops>=0.6'],
    extras_require={
        'onedl': ['onedl-mmengine>=0.10.12', 'onedl-mmcv>=2.3.6', 'onedl-mmdetection>=3.5.1',
                  'onedl-mmsegmentation>=1.4.2', 'ftfy', 'regex'],
        'openmmlab': ['mmengine>=0.10.7', 'mmcv>=2.1.0', 'mmdet>=3.3.0', 'mmsegmentation>=1.2.2',
                      'ftfy', 'regex'],
        # To pretrain. The torchvision that pip chooses fits a torch from the same index; beside
        # others see requirements/torchvision.txt.
        'onedl-pretrain': ['onedl-mmpretrain>=1.3.6', 'torchvision'],
        'openmmlab-pretrain': ['mmpretrain>=1.2.0', 'torchvision'],
        'tensorboard': ['tensorboard'],
        'safetensors': ['safetensors'],
        'export': ['onnx>=1.23', 'onnxruntime>=1.23', 'onnxscript>=0.7'],
    },
)
