"""From text to a store of activations."""
