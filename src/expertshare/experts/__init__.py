"""Expert stores: where the weights of experts live while a model runs."""

from expertshare.experts.resident import ResidentExperts

__all__ = ["ResidentExperts"]
