"""Many runs over combinations of settings: planned, run here, in processes or through a launcher, compared."""

from .multirun import run_each as run_each
