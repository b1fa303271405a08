"""Tests of the routing room: contract, golden values, router rules, minimum coreset, errors."""
