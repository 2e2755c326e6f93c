"""A model's weights: which are adapted, how they are stored (quantized, sharded, tied), and who may write to them."""
