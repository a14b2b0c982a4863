"""All collectives of the model: rank grid, forward/backward pairs, parameters cut over tensor ranks."""
