"""The sections of ``jitops doctor``: one module for each."""
