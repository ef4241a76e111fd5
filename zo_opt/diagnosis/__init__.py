"""Which zo_eps, lr and precision a model and a task can bear, without training."""
