"""Benchmarks: expert layers, forwards and whole generations, each beside what people would use instead."""
