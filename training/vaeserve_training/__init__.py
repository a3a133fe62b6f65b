"""Train, evaluate and export variational autoencoders. See `fit.py` for the loop and `export.py` for the graphs."""
