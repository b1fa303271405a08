"""Benchmarks: expert layers, forwards and whole generations, each beside what people would use instead."""

from expertshare.lab.bench.cases import CASES, Case, find_case
from expertshare.lab.bench.contenders import CONTENDERS, contenders
from expertshare.lab.bench.experts import bench_experts
from expertshare.lab.bench.forward import ForwardSettings, bench_forward
from expertshare.lab.bench.generate import Subject, bench_generate, random_subject
from expertshare.lab.bench.machine import Machine, gpu_device, measure_gpu, measure_machine, memory_limit_bytes
from expertshare.lab.bench.stage import ExpertsSettings

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
    "measure_gpu",
    "measure_machine",
    "memory_limit_bytes",
    "random_subject",
]
