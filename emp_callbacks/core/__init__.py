"""Maths on tensors: torch only; no modules, no ranks, no files."""
