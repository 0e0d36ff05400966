"""The subcommands of ``jitops``: each module adds its own parser, and runs it."""
