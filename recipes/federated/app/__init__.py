"""A Flower app: the same files run in a simulation and on machines of their own."""
