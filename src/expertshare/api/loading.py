"""From what a caller names to what the verbs work with: a model, its expert store, policies, decoding options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from expertshare import native
from expertshare.decoding import DecodingOptions
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import Setup
from expertshare.experts import ExpertMemory, StoreOptions, has_expert_layout, open_store
from expertshare.experts.opening import check_options
from expertshare.models import LoadedModel, ModelFacts, describe, load_model
from expertshare.models.checkpoint import resolve_source
from expertshare.models.loading import check_fits, check_pinned_fits, usable_device
from expertshare.routing import RoutingPolicy, native_policy, parse_policies, parse_policy
from expertshare.tuning.policy_file import PolicyFile, check_model

Model = str | Path | LoadedModel
Policy = str | RoutingPolicy | PolicyFile
DecodingValue = int | float | str | bool | None
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(
    model: Model,
    *,
    dtype: str | torch.dtype | None = None,
    store: str | StoreOptions | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """A model from a directory or hub id; one that is loaded is passed through. dtype: by default the checkpoint's.
    device: cpu (the default) or cuda; one that is loaded has to be there.

    Torch's threads are lowered to the cores that a control group leaves, unless OMP_NUM_THREADS says their number.
    store: how its experts will be kept; a model that `expertshare convert` did not write is then refused. So is, before
    its weights are read, a model that does not fit into memory; experts in a store count if it is said which.
    """
    if isinstance(model, LoadedModel):
        if device is not None and model.model.device.type != (where := usable_device(device).type):
            raise ConfigError(
                f"expected a model on the device {where!r}, got one that is loaded on {model.model.device}: leave "
                "the device out, or load the model there"
            )
        return model
    native.keep_to_quota()
    path = resolve_source(model)
    if store is not None and not has_expert_layout(path):
        raise _not_converted(model)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}. {nearest(dtype, DTYPES)}")
        dtype = DTYPES[dtype]
    return load_model(
        path, dtype, device or "cpu", expert_memory=_store_options(store).memory if store is not None else None
    )


def info(model: Model) -> ModelFacts:
    """Architecture, router rule, bytes per expert, smallest coreset."""
    return describe(load(model))


@contextmanager
def opened(loaded: LoadedModel, wanted: str | StoreOptions | None, setup: Setup) -> Iterator[Setup]:
    """The setup with an open store, where the model is a converted one."""
    if loaded.layout is None:
        if wanted is not None:
            raise _not_converted(loaded.path)
        yield setup
        return
    options, device = _store_options(wanted), loaded.model.device
    check_options(options, device)
    check_fits(loaded.path, options.memory, dense_is_loaded=True, device=device)
    check_pinned_fits(loaded.path, options)
    with open_store(loaded.path, loaded.layout, options, device) as store:
        yield replace(setup, store=store, store_options=options)


def _store_options(wanted: str | StoreOptions | None) -> StoreOptions:
    return wanted if isinstance(wanted, StoreOptions) else StoreOptions(memory=ExpertMemory.parse(wanted or "all"))


def _not_converted(model: str | Path) -> ConfigError:
    return ConfigError(
        f"expected a model in the expert layout, because an expert store was asked for, got {model}: run `expertshare "
        "convert` first, or leave out --expert-memory, --host-memory, --direct-io and --no-prefetch"
    )


def listed(policies: Sequence[Policy]) -> list[RoutingPolicy | PolicyFile]:
    """Each policy by itself; a text may name several, parted by commas."""
    return [p for given in policies for p in (parse_policies([given]) if isinstance(given, str) else [given])]


def parsed(policy: Policy | None) -> RoutingPolicy | PolicyFile | None:
    """The policy that a text names; anything else as it is. Raises PolicyError."""
    return parse_policy(policy) if isinstance(policy, str) else policy


def for_model(policy: RoutingPolicy | PolicyFile | None, loaded: LoadedModel) -> RoutingPolicy:
    """The policy, None being what the checkpoint was trained with. Raises PolicyError for one from a file that was made
    with another model."""
    if isinstance(policy, PolicyFile):
        check_model(policy, loaded)
        return policy.policy
    return policy or native_policy(loaded.config)


def as_records(records: Sequence[PromptRecord | str]) -> list[PromptRecord]:
    """A bare prompt is a record without a reference."""
    return [PromptRecord(prompt=record) if isinstance(record, str) else record for record in records]


def decoding_options(values: Mapping[str, DecodingValue]) -> DecodingOptions:
    """DecodingOptions from names and values; InputError for a name that is none of its fields."""
    known = [field.name for field in fields(DecodingOptions)]
    for name in values:
        if name not in known:
            raise InputError(f"unknown decoding option {name!r}. {nearest(name, known)}")
    return DecodingOptions(**values)  # type: ignore[arg-type]
