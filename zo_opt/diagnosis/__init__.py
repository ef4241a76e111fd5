"""Which zo_eps, lr and precision a model and a task can bear, without training."""

EPS_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # values of zo_eps that are tried
