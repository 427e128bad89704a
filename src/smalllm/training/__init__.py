"""How a model learns: schedule, optimizer, objective and the loop."""
