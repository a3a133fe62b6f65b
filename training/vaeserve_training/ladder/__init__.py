"""From one memorised image to a VAE that generates, one step at a time: `vaeserve-train ladder`.

`codes.py` is the heart: the steps share one decoder and one training loop (`training.py`), and differ in where the
decoder's input comes from. `scale.py` says how large everything is, `registry.py` lists the steps.
"""
