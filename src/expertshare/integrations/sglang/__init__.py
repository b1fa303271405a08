"""A policy inside SGLang: an entry point of the group `sglang.srt.plugins`, off without EXPERTSHARE_POLICY."""

from expertshare.integrations.sglang.plugin import TARGET, SelectExperts, register

__all__ = ["TARGET", "SelectExperts", "register"]
