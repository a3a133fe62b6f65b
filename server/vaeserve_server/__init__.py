"""The vaeserve server: verified bundles behind gRPC. See `app.py` for its life cycle."""
