"""One get_config() per file; installed as sync_jax.configs, for --config=NAME in any folder."""
