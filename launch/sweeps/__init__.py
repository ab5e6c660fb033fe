"""Many runs over combinations of settings."""
