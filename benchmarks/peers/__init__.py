"""What the scripts beside this folder share: a model to measure, and the same weights in the forms that peers read."""
