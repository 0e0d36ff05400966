"""What ``jitops doctor`` looks at, a module each."""
