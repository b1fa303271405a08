"""Compiles every kernel for an H100 (sm_90) on a machine without a GPU, and prints what it got as JSON.

Run without TRITON_INTERPRET: `python compile_for_hopper.py`. Triton brings its own ptxas; nothing is run. With
cuobjdump beside that, registers and bytes of the stack (spills) are printed too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expertshare.kernels.triton.backend import tiles_for
from expertshare.kernels.triton.device import commit, experts, head, route

POINTERS = {
    "*fp32": (
        *("affinity", "best", "choice", "expert_scale", "out", "probability", "sure", "thresholds", "total", "weights"),
    ),
    "*i64": ("control", "eos", "found", "ids", "keys", "load", "proposed", "report", "tokens", "unique"),
    "*i32": ("count", "excluded", "first", "order", "token", "used"),
    "*i1": ("active", "answer", "edited", "frozen", "live", "masked", "member", "previous"),
    "*fp64": ("mass",),
}
TYPES = {f"{name}_ptr": kind for kind, names in POINTERS.items() for name in names} | {
    **dict.fromkeys(("capacity", "length", "size", "slots", "num_pairs", "num_rows"), "i32"),
    **dict.fromkeys(
        ("share_bits", "saturation_bits", "drop_bits", "codes_stride", "scales_stride", "minima_stride"), "i64"
    ),
    "scaling": "fp32",
}
MINI = {"NUM_EXPERTS": 256, "TOP_K": 8}
GROUPED = {"NUM_GROUPS": 8, "KEPT": 4, "NGP": 8, "GSP": 32}
FREE = {"NUM_GROUPS": 1, "KEPT": 1, "NGP": 1, "GSP": 256}
CODES = {"bf16": ("*bf16", "*bf16", 0, 1), "int8": ("*i32", "*fp32", 8, 2048), "int4": ("*i32", "*fp16", 4, 32)}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], *, warps: int, stages: int = 3) -> Any:
    """For pointers and strides as torch's allocator gives them: multiples of 16 bytes."""
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else types[name] for name in names}
    even = [n for n, name in enumerate(names) if kinds[name].startswith("*") or name.endswith("stride")]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs=constants,
        attrs={(number,): [["tt.divisibility", 16]] for number in even},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def described(code: Any) -> dict[str, int]:
    """Size, shared memory, and what of Hopper's it uses."""
    ptx = code.asm["ptx"]
    return {
        "cubin_bytes": len(code.asm["cubin"]),
        "shared_bytes": code.metadata.shared,
        "async_copies": ptx.count("cp.async.c"),
        "matrix_products": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
        **_resources(code.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    return {"registers": int(found[1]), "stack_bytes": int(found[2])} if found else {}


def selection() -> dict[str, dict[str, int]]:
    """At LLaDA2.0-mini's router."""
    votes = {"RANKING": 1, "WHOLE_FRONT": False, "HAS_SHARE": False, "TOKENS": 8, "KEYS_AT_A_TIME": 16}
    votes |= {"ONLY_MASKED": False, "HAS_PREVIOUS": False}
    forms = {
        "block-top-p, grouped": {"FRONT": 0, "HAS_SHARE": True, **GROUPED},
        "protected-vote": {"FRONT": 1, **FREE},
        "protected-vote, masked, reused": {"FRONT": 1, "ONLY_MASKED": True, "HAS_PREVIOUS": True, **FREE},
        "coverage": {"FRONT": 0, "RANKING": 3, **FREE},
    }
    made = {
        f"coreset {name}": described(compiled(route.coreset_kernel, TYPES, {**MINI, **votes, **form}, warps=8))
        for name, form in forms.items()
    }
    rule = {"TOP_KP": 8, "RENORMALISE": True, "HAS_EXPERT_SCALE": False, "TOKENS": 4, "HAS_DROP": True, **GROUPED}
    made["plan"] = described(compiled(route.plan_kernel, TYPES, {**MINI, **rule}, warps=4))
    return made


def layers(num_tokens: int) -> dict[str, dict[str, int]]:
    """Experts at mini's widths and the head, with weights of every kind."""
    made = {}
    for name, (codes, scales, bits, group) in CODES.items():
        types = {**TYPES, "codes_ptr": codes, "scales_ptr": scales, "minima_ptr": scales}
        types |= {"x_ptr": "*bf16"}
        kind = {"BITS": bits, "GROUP": group, "HAS_MINIMA": bits == 4, "EXPERTSP": 256}
        for projection, depth, width in (("gate_up", 2048, 512), ("down", 512, 2048)):
            tiles = tiles_for(projection, num_tokens, 2048, 2048, torch.bfloat16)  # type: ignore[arg-type]
            sizes = {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, **MINI, **kind}
            gated = projection == "gate_up"
            sizes |= {"DEPTH": depth, "WIDTH": width, "GATED": gated}
            types["y_ptr"] = "*bf16" if gated else "*fp32"
            code = compiled(experts.project_kernel, types, sizes, warps=tiles.warps, stages=tiles.stages)
            made[f"{projection} {name} {num_tokens}"] = described(code)
        if bits == 4:
            continue
        tiles = tiles_for("head", num_tokens, 2048, 157_184, torch.bfloat16)
        sizes = {"VOCABULARY": 157_184, "DEPTH": 2048, "BITS": bits, "NUM_EXCLUDED": 1}
        sizes |= {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth}
        code = compiled(head.head_kernel, types, sizes, warps=tiles.warps, stages=tiles.stages)
        made[f"head {name} {num_tokens}"] = described(code)
    return made


def rest() -> dict[str, dict[str, int]]:
    """The small ones."""
    types = {**TYPES, "y_ptr": "*bf16"}
    mix = {**MINI, "DEPTH": 2048, "BN": 1024}
    best = {"NUM_TILES": 2456, "TILES": 1024}
    block = {"LENGTH": 32, "LP": 32}
    rule = {**block, "NUM_EOS": 1, "RP": 4, "AT_A_TIME": 16}
    return {
        "finite": described(compiled(commit.finite_kernel, types, block, warps=1)),
        "commit": described(compiled(commit.commit_kernel, types, rule, warps=4)),
        "schedule": described(compiled(experts.schedule_kernel, types, {"PAIRS": 256}, warps=4)),
        "mix": described(compiled(experts.mix_kernel, types, mix, warps=4)),
        "best of tiles": described(compiled(head.best_of_tiles_kernel, types, best, warps=4)),
    }


if __name__ == "__main__":
    json.dump({**selection(), **layers(32), **layers(64), **rest()}, sys.stdout, indent=1)
