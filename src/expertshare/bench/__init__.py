"""Benchmarks: expert layers, forwards and whole generations, each beside what people would use instead."""

from expertshare.bench.cases import CASES, Case, find_case
from expertshare.bench.contenders import CONTENDERS, contenders
from expertshare.bench.experts import bench_experts
from expertshare.bench.forward import ForwardSettings, bench_forward
from expertshare.bench.generate import Subject, bench_generate, random_subject
from expertshare.bench.gpu import gpu_device, gpu_memory_bytes, measure_gpu
from expertshare.bench.machine import Machine, measure_machine
from expertshare.bench.stage import ExpertsSettings

__all__ = [
    "CASES",
    "CONTENDERS",
    "Case",
    "ExpertsSettings",
    "ForwardSettings",
    "Machine",
    "Subject",
    "bench_experts",
    "bench_forward",
    "bench_generate",
    "contenders",
    "find_case",
    "gpu_device",
    "gpu_memory_bytes",
    "measure_gpu",
    "measure_machine",
    "random_subject",
]
