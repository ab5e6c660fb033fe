"""Many runs over combinations of settings."""

from .multirun import run_each as run_each
