"""The classifier's scores and their gradients: in closed form for known layers, by autograd for others."""
