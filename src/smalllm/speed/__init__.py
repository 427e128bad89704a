"""How fast this machine prepares, trains, decodes and serves."""
