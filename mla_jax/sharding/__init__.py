"""Many devices: the mesh, the layout of weights and caches on it, and what a step exchanges.

`mesh` names the axes and checks that a model fits them; `layout` says where arrays lie and runs a
step on every device's own part; `collectives` is what those parts say to each other.
"""

from mla_jax.sharding.layout import shard_model
from mla_jax.sharding.mesh import check_mesh, make_mesh

__all__ = ["check_mesh", "make_mesh", "shard_model"]
