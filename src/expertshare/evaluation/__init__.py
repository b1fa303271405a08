"""Evaluation: answer many prompts under one policy, and compare policies on the same prompts.

`runner` answers, `comparison` compares policies, `evaluating` runs tasks and benchmarks into a directory. Import from
the modules: some of them (`prompts`, `scoring`) need no torch.
"""
