"""A model and a text become a store, at once or while training reads it."""
