"""`python -m expertshare.evaluation.harness`: the harness's own command, with `--model expertshare` registered."""

import expertshare.evaluation.harness.model  # noqa: F401  (registers it)
from expertshare.evaluation.harness.source import OUR_TASKS

if __name__ == "__main__":
    import sys

    from lm_eval.__main__ import cli_evaluate

    if "run" in sys.argv[1:2] and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(OUR_TASKS)]
    cli_evaluate()
