"""The implementations of the layers, one module each; a module is imported when first picked."""
