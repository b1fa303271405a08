"""Expert stores: where the weights of experts live while a model runs, and the files that they come from."""

from expertshare.experts.budgeted import BudgetedStore
from expertshare.experts.layout import ExpertLayout, has_expert_layout, read_manifest
from expertshare.experts.opening import ExpertMemory, StoreOptions, open_store
from expertshare.experts.slab import SlabFormat, format_size, parse_size
from expertshare.experts.slot_memory import DeviceSlots
from expertshare.experts.store import MappedStore, ResidentExperts, ResidentSlabs, SlabStore, StoreStatistics

__all__ = [
    "BudgetedStore",
    "DeviceSlots",
    "ExpertLayout",
    "ExpertMemory",
    "MappedStore",
    "ResidentExperts",
    "ResidentSlabs",
    "SlabFormat",
    "SlabStore",
    "StoreOptions",
    "StoreStatistics",
    "format_size",
    "has_expert_layout",
    "open_store",
    "parse_size",
    "read_manifest",
]
