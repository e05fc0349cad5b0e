"""Passes over many tensors at once on an accelerator, in Triton; `choice` says where they are used."""
