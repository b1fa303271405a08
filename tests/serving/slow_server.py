"""The command line, with a model whose forwards take 20 ms more: for test_process, in a process of its own."""

import sys
import time

from expertshare.cli import main
from expertshare.models.transformer import MoETransformer

_forward = MoETransformer.forward


def _slow(*arguments, **options):  # type: ignore[no-untyped-def]
    time.sleep(0.02)
    return _forward(*arguments, **options)


MoETransformer.forward = _slow  # type: ignore[method-assign]
main(sys.argv[1:])
