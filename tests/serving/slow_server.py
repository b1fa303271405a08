"""The command line, with a model whose forwards take FORWARD_S seconds more: what test_process starts."""

import os
import sys
import time

from expertshare.cli import main
from expertshare.models.transformer import MoETransformer

_forward = MoETransformer.forward
_SECONDS = float(os.environ["FORWARD_S"])


def _slow(*arguments, **options):  # type: ignore[no-untyped-def]
    time.sleep(_SECONDS)
    return _forward(*arguments, **options)


MoETransformer.forward = _slow  # type: ignore[method-assign]
main(sys.argv[1:])
