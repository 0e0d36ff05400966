"""The subcommands of ``jitops``: each module adds its parser and runs the command."""
