"""Expert stores: where the weights of experts live while a model runs, and the files that they come from."""

from expertshare.experts.budgeted import BudgetedStore
from expertshare.experts.device_slots import DeviceSlots
from expertshare.experts.layout import ExpertLayout, has_expert_layout, read_manifest
from expertshare.experts.opening import StoreOptions, open_store
from expertshare.experts.resident import ResidentExperts
from expertshare.experts.sizes import ExpertMemory, format_size, parse_size
from expertshare.experts.slab import SlabFormat
from expertshare.experts.statistics import StoreStatistics
from expertshare.experts.store import SlabStore
from expertshare.experts.whole import MappedStore, ResidentSlabs

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
