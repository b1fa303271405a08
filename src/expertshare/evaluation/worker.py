"""A process that answers jobs: pickled SolverSetup, then pickled Jobs on stdin; a pickled answer or error for each.

It ends with its stdin, so none outlives its parent, however that ends. Started by `pool`, not by people.
"""

from __future__ import annotations

import os
import pickle
import sys

import torch

from expertshare.errors import ExpertShareError
from expertshare.evaluation.solving import Solver


def main() -> None:
    """Answer until stdin ends."""
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # whatever prints must not get between the replies
        try:
            setup = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        torch.set_num_threads(setup.threads)
        solver: Solver | None = None
        while True:
            try:
                job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                solver = solver or Solver.load(setup)
                reply: object = solver.solve(job)
            except ExpertShareError as error:
                reply = error
            pickle.dump(reply, replies)
            replies.flush()


if __name__ == "__main__":
    main()
