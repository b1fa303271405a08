"""Expert stores: where the weights of experts live while a model runs, and the files that they come from."""

from expertshare.experts.budgeted import BudgetedStore
from expertshare.experts.device_slots import DeviceSlots
from expertshare.experts.layout import ExpertLayout, has_expert_layout, read_manifest
from expertshare.experts.opening import StoreOptions, open_store
from expertshare.experts.slab import SlabFormat
from expertshare.experts.store import ExpertMemory, SlabStore, StoreStatistics, format_size, parse_size
from expertshare.experts.whole import MappedStore, ResidentExperts, ResidentSlabs

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
