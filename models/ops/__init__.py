"""Pure array functions that hold the mathematics of the models; no parameters, no configuration objects."""
