"""Who computes a network: engines, what they can do, which one is taken and why."""
