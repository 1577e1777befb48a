"""Install the finder at every start of this Python: ``python -m crossformer_mm.mmcv_ops``.

For programs that import MMDetection or mmcv's operators before crossformer_mm. Writes one file into
site-packages, which does nothing once crossformer_mm is gone. PyTorch is imported only when mmcv
imports its operators.
"""

import os
import sysconfig

from . import __file__ as module

# Each line of a .pth file that begins with "import" is executed.
LINE = (
    'import os; file = {!a}; os.path.isfile(file) and (exec(open(file, encoding="utf-8").read(), '
    'scope := dict(__name__="crossformer_mm.mmcv_ops", __file__=file)), scope["install"]())\n'
)


def main() -> None:
    path = os.path.join(sysconfig.get_path('purelib'), 'crossformer_mm_mmcv_ops.pth')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(LINE.format(os.path.abspath(module)))
    print(f'{path}: mmcv finds its operators at every start of this Python; delete it to undo')


if __name__ == '__main__':
    main()
