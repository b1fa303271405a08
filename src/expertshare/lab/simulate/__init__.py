"""A capacity model for many GPUs, fed by recorded routing: `expertshare simulate` (docs/scaling.md)."""
