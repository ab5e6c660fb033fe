"""What a transcoder is: weights, activations, normalisation, its file."""
