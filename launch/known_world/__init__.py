"""The bundled world's known truth against what a transcoder found."""
