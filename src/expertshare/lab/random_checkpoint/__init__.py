"""Checkpoints of random weights in the exact shape of a released model, with routers that agree as published."""
