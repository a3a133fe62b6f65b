"""The subcommands of `vaeserve-train`, one module each; see `vaeserve_training.__main__`."""
