"""Clients that exchange seeds and scalars: rounds of FedKSeed on private rows, run by Flower; a tuned model is the K numbers of a pool of seeds."""
