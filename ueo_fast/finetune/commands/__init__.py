"""What the subcommands of `ueo-fast` do: one file each, options and all."""
