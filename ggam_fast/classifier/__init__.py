"""The classifier's scores and their gradients: known layers in closed form, any other module by autograd."""
