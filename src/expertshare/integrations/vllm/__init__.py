"""A policy inside vLLM: an entry point of the group `vllm.general_plugins`, off without EXPERTSHARE_POLICY."""

from expertshare.integrations.vllm.plugin import RoutingFunction, register

__all__ = ["RoutingFunction", "register"]
