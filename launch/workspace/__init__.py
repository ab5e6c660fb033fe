"""What verbs work with: run folders, sources of models and text, trackers."""
