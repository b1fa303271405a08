"""Tuning: the cheapest policy that keeps a promised share of vanilla's quality, with the evidence for it.

`tuner.tune` does it all. Import from the modules: a verb that only reads a policy file loads no optimiser.
"""
