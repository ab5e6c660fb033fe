"""The step that never touches a zero, and the kernels behind it."""
