"""How a loss at theta + eps z is obtained: trainables on one axis, perturbation, substitution, copies, and the modes that choose among them."""
