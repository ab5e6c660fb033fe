"""From a store of activations to a transcoder."""
