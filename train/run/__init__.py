"""What surrounds the steps: checkpoints, checks, records, evaluation, optimizers."""
