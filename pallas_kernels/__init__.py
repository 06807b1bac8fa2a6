"""Attention kernels for latent caches: arrays in, arrays out.

This package knows no Flax, no model, no checkpoint and no mesh. Each operation is a folder: `api`
checks and chooses, `reference` is plain jnp, `triton` is Pallas lowered through Triton, `tiles`
holds shapes and tile choices. `backend` is the registry that picks among them.
"""
