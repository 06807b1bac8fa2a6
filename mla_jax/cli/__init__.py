"""The `mla-jax` command: one small file a subcommand."""
