"""Sigma grids and solvers. A solver is data: a row of coefficients a step, computed in float64."""
